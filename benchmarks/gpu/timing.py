"""Seconds of GPU work, by CUDA events around replays of CUDA graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
Timer = Callable[[list[Call], bool], list[float]]
"""Times the calls of one graph, after a flush of the L2 cache or not; returns seconds a call, one number a replay."""


class GraphTimer:
    """A Timer that captures the calls in a CUDA graph and replays it between CUDA events."""

    SECONDS = 0.04  # The replays of one measurement take about this long.
    LEAST, MOST = 15, 200  # A measurement has at least and at most so many replays.
    FLUSH = 3  # A flush touches so many times the size of the L2 cache.

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.written, self.read = (torch.zeros(self.FLUSH * cache // 4, device="cuda") for _ in range(2))
        self.total = torch.zeros((), device="cuda")

    def flush(self) -> None:
        """Fill the L2 cache with useless lines, the last of which were only read.

        If they had been written, the call that is timed next would pay for writing them back to memory.
        """
        self.written.fill_(1.0)
        torch.sum(self.read, 0, out=self.total)

    def capture(self, calls: list[Call]) -> torch.cuda.CUDAGraph:
        """Capture all calls in a graph, after one call of each, in which libraries allocate and choose algorithms."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph

    def replay(self, graph: torch.cuda.CUDAGraph, rounds: int, flush: bool) -> list[float]:
        """Return the seconds of each replay. A flush also lets the host run ahead, so that no launch is late."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for start, end in events:
            if flush:
                self.flush()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def __call__(self, calls: list[Call], flush: bool) -> list[float]:
        graph = self.capture(calls)
        pilot = statistics.median(self.replay(graph, 3, flush))
        rounds = min(self.MOST, max(self.LEAST, round(self.SECONDS / max(pilot, 1e-9))))
        return [seconds / len(calls) for seconds in self.replay(graph, rounds, flush)]


def quartiles(seconds: list[float]) -> list[float]:
    """Return the quartiles of one or more measurements, with the median in the middle."""
    return statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
