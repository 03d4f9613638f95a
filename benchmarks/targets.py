"""Measures what the CPU path aims at: ``python -m benchmarks targets``.

Each row is a ratio of medians in one process: float32, with bias, one thread unless a row says two, packing of the
input inside and weights packed before, on whatever processor is here; ``--kernel avx2`` keeps to AVX2 where there is
more. Larger is better. A row whose peer is absent says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from bitorch_qlinear import QLinear, _library
from bitorch_qlinear import functional as F

from .measuring import Shape, describe, interleaved, median, prepare, ratio, setting, write_json
from .peers import BITORCH, BNN, LINEAR, PACKED, QLINEAR, contestants, evaluation
from .train import step_times

SWEEP_BYTES = 64 << 20


class Target(NamedTuple):
    """What is measured, what it must reach and what it should."""

    work: str
    least: float
    goal: float | None
    measure: Callable[[int], float]


def product(m: int, k: int, n: int) -> Shape:
    return Shape("", "", m, k, n)


def forward(m: int, k: int, n: int, baseline: str = LINEAR, name: str = QLINEAR) -> Callable[[int], float]:
    """A contestant's speed against another's."""

    def measure(rounds: int) -> float:
        made = contestants(product(m, k, n))
        if baseline in made.absent:
            raise LookupError(made.absent[baseline])
        return ratio(interleaved({each: made.calls[each] for each in (baseline, name)}, rounds), baseline, name)

    return measure


def after_a_sweep(rounds: int) -> float:
    """The first call after 64 MB were written, the cached weights gone."""
    calls = contestants(product(1, 4096, 4096)).calls
    swept = torch.empty(SWEEP_BYTES, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {LINEAR: [], QLINEAR: []}
    for i in range(2 * rounds):
        for name, values in seconds.items():
            swept.fill_(i % 256)
            start = time.perf_counter()
            calls[name]()
            values.append(time.perf_counter() - start)
    return statistics.median(seconds[LINEAR]) / statistics.median(seconds[QLINEAR])


def odd_against_even(rounds: int) -> float:
    """The smallest rate of an odd shape by that of its even neighbour."""
    pairs = [
        (product(511, 4095, 4097), product(512, 4096, 4096)),
        (product(127, 1023, 1025), product(128, 1024, 1024)),
        (product(15, 4095, 4097), product(16, 4096, 4096)),
    ]
    found = []
    for odd, even in pairs:
        times = interleaved({str(shape): contestants(shape).calls[QLINEAR] for shape in (odd, even)}, rounds)
        rates = [shape.multiply_adds / median(times, str(shape)) for shape in (odd, even)]
        found.append(rates[0] / rates[1])
    return min(found)


def packing(rounds: int) -> float:
    x = torch.randn(512, 4096)
    return ratio(interleaved({"sum": x.sum, "pack": lambda: F.pack_bits(x)}, rounds), "sum", "pack")


def training_step(baseline: str) -> Callable[[int], float]:
    def measure(rounds: int) -> float:
        times, absent = step_times(product(512, 4096, 4096), rounds, [baseline, QLINEAR])
        if baseline in absent:
            raise LookupError(absent[baseline])
        return ratio(times, baseline, QLINEAR)

    return measure


def identity_input(rounds: int) -> float:
    x, linear = torch.randn(512, 4096), nn.Linear(4096, 4096)
    layer = QLinear.from_linear(linear, input_quantization="identity").requires_grad_(False)
    return ratio(interleaved({LINEAR: evaluation(linear, x), QLINEAR: evaluation(layer, x)}, rounds), LINEAR, QLINEAR)


def two_threads(rounds: int) -> float:
    """One thread's time by that of two, in turns."""
    call = contestants(product(512, 4096, 4096)).calls[QLINEAR]

    def with_threads(count: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(count)
            call()

        return run

    before = torch.get_num_threads()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count, values in seconds.items():
            run = with_threads(count)
            run()
            start = time.perf_counter()
            run()
            values.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return statistics.median(seconds[1]) / statistics.median(seconds[2])


def flatness(rounds: int) -> float:
    """The smallest rate from 256³ to 4096³ by the largest, packing excluded."""
    shapes = [product(size, size, size) for size in (256, 512, 1024, 2048, 4096)]
    times = interleaved({str(shape): contestants(shape).calls[PACKED] for shape in shapes}, min(rounds, 7))
    rates = [shape.multiply_adds / median(times, str(shape)) for shape in shapes]
    return min(rates) / max(rates)


TARGETS = [
    Target("512 × 4096 → 4096, × nn.Linear", 18, 25, forward(512, 4096, 4096)),
    Target("the same, × bnn-lab's GEMM", 3, 4, forward(512, 4096, 4096, BNN)),
    Target("128 × 1024 → 1024, × nn.Linear", 14, 20, forward(128, 1024, 1024)),
    Target("16 × 4096 → 4096, × nn.Linear", 28, 40, forward(16, 4096, 4096)),
    Target("1 × 4096 → 4096, × nn.Linear, warm", 40, 60, forward(1, 4096, 4096)),
    Target("the first call after a 64 MB sweep", 0, None, after_a_sweep),
    Target("odd shapes, × the even neighbour's rate", 0.85, 0.95, odd_against_even),
    Target("64 × 64 → 64, × nn.Linear", 1, 2, forward(64, 64, 64)),
    Target("1 × 64 → 64, × nn.Linear", 0.8, None, forward(1, 64, 64)),
    Target("packing 512 × 4096 float32, × torch.sum", 0.8, 1, packing),
    Target("training step 512 × 4096 → 4096, × nn.Linear", 3.5, 5, training_step(LINEAR)),
    Target("the same, × bitorch's QLinear", 4, 6, training_step(BITORCH)),
    Target("`identity` input, 512 × 4096 → 4096, × nn.Linear", 3, 4.5, identity_input),
    Target("two threads, 512 × 4096 → 4096, × one", 1.7, None, two_threads),
    Target("rates from 256³ to 4096³, the least × the best", 0.83, None, flatness),
]


def verdict(figure: dict[str, Any]) -> str:
    """In a word."""
    if figure["measured"] is None:
        return f"not measured: {figure['why']}"
    if figure["least"] == 0:
        return "shown"
    if figure["measured"] < figure["least"]:
        return "missed"
    return "goal met" if figure["goal"] is None or figure["measured"] >= figure["goal"] else "pass"


def measure(rounds: int) -> list[dict[str, Any]]:
    """Every target with what was measured, or why it was not."""
    figures = []
    for target in tqdm(TARGETS, leave=False, unit="target"):
        figure = {"work": target.work, "least": target.least, "goal": target.goal, "measured": None, "why": ""}
        try:
            figure["measured"] = target.measure(rounds)
        except LookupError as error:
            figure["why"] = str(error)
        figures.append(figure)
    return figures


def table(figures: list[dict[str, Any]], style: str = "simple") -> str:
    def shown(value: float | None) -> str:
        return f"{value:.3g}" if value else ""

    rows = [[f["work"], shown(f["measured"]), shown(f["least"]), shown(f["goal"]), verdict(f)] for f in figures]
    text: str = tabulate(
        rows,
        headers=["work", "measured", "pass", "goal", ""],
        tablefmt=style,
        disable_numparse=True,
        colalign=["left", "right", "right", "right", "left"],
    )
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contestant (15)")
    parser.add_argument("--kernel", choices=_library.available_kernels(), help="instead of the best one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(argv)
    prepare(1, options.kernel)
    figures = {"targets": measure(options.rounds), "setting": setting()}
    print(table(figures["targets"]))
    print(describe(figures["setting"]))
    if options.json:
        write_json(options.json, figures)
