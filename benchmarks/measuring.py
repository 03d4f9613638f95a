"""What the CPU benchmarks share: shapes, interleaved times, the setting that goes with every figure, and its file."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

from bitorch_qlinear import _library
from bitorch_qlinear.demo import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"

Call = Callable[[], object]
Quartiles = list[float]
Times = dict[str, Quartiles]
"""Quartiles of the seconds a call, by contestant: the median is in the middle."""

# A turn of a contestant: long enough for the clock, short enough that a busy neighbour hits all alike.
TURN_SECONDS = 2e-3


class Shape(NamedTuple):
    """y[m][n] of a product over k, and what the figures call it."""

    name: str
    group: str
    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.m} × {self.k} → {self.n}"

    @property
    def multiply_adds(self) -> int:
        return self.m * self.k * self.n


def load_shapes(quick: bool = False) -> list[Shape]:
    """The shapes of ``shapes.csv``, or those of the quick selection."""
    with (HERE / "shapes.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["quick"] or not quick]
    return [Shape(row["name"], row["group"], int(row["m"]), int(row["k"]), int(row["n"])) for row in rows]


def interleaved(contestants: Mapping[str, Call], rounds: int) -> Times:
    """Time the contestants in turns, after a warm-up, with torch's present number of threads."""
    threads = torch.get_num_threads()
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in contestants.items()}
    calls = {name: max(1, round(TURN_SECONDS / timer.timeit(2).mean)) for name, timer in timers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(calls[name]).mean)
    return {name: statistics.quantiles(values, n=4) for name, values in seconds.items()}


def median(times: Times, name: str) -> float:
    return times[name][1]


def ratio(times: Times, baseline: str, name: str) -> float:
    """How many times as fast as the baseline, by medians."""
    return median(times, baseline) / median(times, name)


def commit() -> str:
    """The commit that was measured, with a + where files differ from it."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()


def setting() -> dict[str, str | int]:
    """What the figures depend on: processor, capability, kernel, threads, versions, commit, date."""
    return environment(torch.device("cpu")) | {"commit": commit()}


def describe(where: Mapping[str, str | int]) -> str:
    """The setting in a line."""
    return (
        f"{where['processor']}, capability {where['cpu_capability']}, kernel {where['kernel']}, "
        f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}, torch {where['torch']}, "
        f"commit {where['commit']}, {str(where['date'])[:10]}"
    )


def prepare(threads: int, kernel: str | None = None) -> None:
    """Pin the threads, the seed, and the kernel if one is named."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _library.force_kernel(kernel)


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}" if seconds < 1e-4 else f"{1e6 * seconds:,.0f}"
