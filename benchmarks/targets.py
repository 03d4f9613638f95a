"""Measures what the CPU path aims at: ``python -m benchmarks targets``.

Each row is a ratio of medians in one process: of PackedQLinear where it names no other layer, float32, with bias, one
thread unless a row says two, packing of the input inside, on whatever processor is here; ``--kernel avx2`` keeps to
AVX2 where there is more. Larger is better. A row whose peer is absent says so. ``make benchmark`` takes the ratios of
whole shapes from what it has measured in the same process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from bitorch_qlinear import PackedQLinear, QLinear, kernels
from bitorch_qlinear import functional as F

from . import cpu, train
from .measuring import (
    HERE,
    ROUNDS,
    TURNS,
    Call,
    Shape,
    Times,
    describe,
    interleaved,
    load_shapes,
    median,
    named,
    prepare,
    ratio,
    setting,
    write_json,
)
from .peers import BITORCH, BNN, LINEAR, PACKED, PACKED_LAYER, QLINEAR, contestants, evaluation

INFERENCE = ["large batch", "medium batch", "small batch", "one row", "64 cubed", "tiny"]
TRAINING = ["large batch"]
ODD_AND_EVEN = {
    "odd sizes": "large batch",
    "odd sizes, medium": "medium batch",
    "odd sizes, small": "small batch",
}
SWEEP_BYTES = 64 << 20
# Each takes seconds.
IMPORTS = 5
# The seconds that torch's import takes, and those that ours adds.
IMPORT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import bitorch_qlinear
print(middle - start, time.perf_counter() - middle)
"""


class Known(NamedTuple):
    """What other benchmarks measured already.

    Attributes:
        inference: Times by the name of a shape.
        training: The same of training steps.
        sizes: The smallest product and the cubes.
        threads: Quartiles of PackedQLinear's seconds by the name of a shape and the number of threads.
        absent: Peers that were not timed, and why.
    """

    inference: dict[str, Times]
    training: dict[str, Times]
    sizes: list[dict[str, Any]]
    threads: dict[str, dict[int, list[float]]]
    absent: dict[str, str]


class Measured(NamedTuple):
    """A ratio, and the quartiles of the seconds that it is made of."""

    value: float
    seconds_quartiles: dict[str, Any]


class Target(NamedTuple):
    """A piece of work, the ratio that it must reach and the one that it should."""

    work: str
    least: float
    goal: float | None
    measure: Callable[[Known, int], Measured]


# ---- whole shapes ----------------------------------------------------------------------------------


def by_threads(rounds: int) -> dict[str, dict[int, list[float]]]:
    """Quartiles of PackedQLinear's seconds with one thread and with two, in turns."""
    if (os.cpu_count() or 1) < 2:
        return {}
    made = {
        shape.name: contestants(shape, names=[PACKED_LAYER]).calls[PACKED_LAYER] for shape in load_shapes(quick=True)
    }
    # Each turn takes all shapes: what else runs on the machine comes and goes in seconds, and slows all alike.
    counts = {(name, count): count for name in made for count in (1, 2)}
    times = interleaved({key: made[key[0]] for key in counts}, rounds, threads=counts)
    return {name: {count: times[name, count] for count in (1, 2)} for name in made}


def known(inference: dict[str, Any], training: dict[str, Any], rounds: int) -> Known:
    """Collect what other benchmarks measured (the first results of a name count), and time the threads."""

    def times(figures: dict[str, Any]) -> dict[str, Times]:
        return {result["name"]: result["seconds_quartiles"] for result in reversed(figures["results"])}

    absent = inference["absent"]["float32"] | training["absent"]
    return Known(times(inference), times(training), inference["sizes"], by_threads(rounds), absent)


def needed(rounds: int) -> Known:
    """Measure what the targets need, and no more."""
    inference = cpu.measure(named(INFERENCE), ["float32"], [1], rounds, [LINEAR, QLINEAR, PACKED_LAYER, BNN])
    inference["sizes"] = cpu.measure_sizes(rounds)
    return known(inference, train.measure(named(TRAINING), rounds), rounds)


def compared(times: Times, baseline: str, name: str) -> Measured:
    return Measured(ratio(times, baseline, name), {each: times[each] for each in (baseline, name)})


def times_baseline(times: Times, absent: Mapping[str, str], baseline: str, name: str) -> Measured:
    """How many times as fast a layer is as a baseline, which may be absent."""
    if baseline not in times:
        raise LookupError(absent[baseline])
    return compared(times, baseline, name)


def inference(shape: str, baseline: str = LINEAR, name: str = PACKED_LAYER) -> Callable[[Known, int], Measured]:
    """A layer's speed at a known shape."""
    return lambda known, _: times_baseline(known.inference[shape], known.absent, baseline, name)


def training(shape: str, baseline: str = LINEAR) -> Callable[[Known, int], Measured]:
    """QLinear's speed in a training step of a known shape."""
    return lambda known, _: times_baseline(known.training[shape], known.absent, baseline, QLINEAR)


def flatness(known: Known, rounds: int) -> Measured:
    """The smallest rate of the cubes by the largest, packing excluded."""
    cubes = known.sizes[1:]
    rates = [cpu.rate(cube) for cube in cubes]
    return Measured(min(rates) / max(rates), {cube["name"]: cube["seconds_quartiles"][PACKED] for cube in cubes})


def two_threads(known: Known, names: list[str]) -> Measured:
    """One thread's time by that of two, for the shape of these that gains least."""
    if not known.threads:
        raise LookupError("one processor")

    def gain(times: Mapping[int, list[float]]) -> float:
        return times[1][1] / times[2][1]

    name = min(names, key=lambda name: gain(known.threads[name]))
    return Measured(gain(known.threads[name]), {f"{name}, {count}": known.threads[name][count] for count in (1, 2)})


# ---- what is measured for the targets alone ----------------------------------------------------------


def after_a_sweep(known: Known, rounds: int) -> Measured:
    """The first call after 64 MB were written, with the weights gone from the caches."""
    (shape,) = named(["one row"])
    calls = contestants(shape, names=[LINEAR, PACKED_LAYER]).calls
    swept = torch.empty(SWEEP_BYTES, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {LINEAR: [], PACKED_LAYER: []}
    for i in range(2 * rounds):
        for name, values in seconds.items():
            swept.fill_(i % 256)
            start = time.perf_counter()
            calls[name]()
            values.append(time.perf_counter() - start)
    times = {name: statistics.quantiles(values, n=4) for name, values in seconds.items()}
    return compared(times, LINEAR, PACKED_LAYER)


def odd_against_even(known: Known, rounds: int) -> Measured:
    """The smallest rate of an odd shape by that of its even neighbour."""
    shapes = {shape.name: shape for shape in load_shapes()}

    def pair(odd: Shape, even: Shape) -> Measured:
        calls = {shape.name: contestants(shape, names=[PACKED_LAYER]).calls[PACKED_LAYER] for shape in (odd, even)}
        times = interleaved(calls, rounds)
        work = odd.multiply_adds / even.multiply_adds
        return Measured(work * median(times, even.name) / median(times, odd.name), times)

    return min(pair(shapes[odd], shapes[even]) for odd, even in ODD_AND_EVEN.items())


def packing(known: Known, rounds: int) -> Measured:
    x = torch.randn(512, 4096)
    return compared(interleaved({"sum": x.sum, "pack": lambda: F.pack_bits(x)}, rounds), "sum", "pack")


def identity_input(name: str) -> Callable[[Known, int], Measured]:
    """A packed layer whose input stays real, at a shape."""

    def measure(known: Known, rounds: int) -> Measured:
        (shape,) = named([name])
        x, linear = torch.randn(shape.m, shape.k), nn.Linear(shape.k, shape.n)
        layer = PackedQLinear.from_float(QLinear.from_linear(linear, input_quantization="identity"))
        calls = {LINEAR: evaluation(linear, x), PACKED_LAYER: evaluation(layer, x)}
        return compared(interleaved(calls, rounds), LINEAR, PACKED_LAYER)

    return measure


def gradient_of_the_input(known: Known, rounds: int) -> Measured:
    """Forward and the gradient of x, of weights that need none."""
    (shape,) = named(["large batch"])
    x, gradient = torch.randn(shape.m, shape.k, requires_grad=True), torch.randn(shape.m, shape.n)
    linear = nn.Linear(shape.k, shape.n).requires_grad_(False)
    packed = PackedQLinear.from_float(QLinear.from_linear(linear, gradient_cancellation_threshold=1.0))

    def step(layer: nn.Module) -> Call:
        return lambda: torch.autograd.grad(layer(x), x, gradient)

    return compared(interleaved({LINEAR: step(linear), PACKED_LAYER: step(packed)}, rounds), LINEAR, PACKED_LAYER)


def importing(known: Known, rounds: int) -> Measured:
    """The time of torch's import by what ours adds to it, each time in a new process."""
    seconds: dict[str, list[float]] = {"torch": [], "bitorch_qlinear": []}
    for _ in range(min(rounds, IMPORTS) + 1):  # the first one reads the files from the disk
        said = subprocess.run(
            [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=HERE.parent
        )
        for values, each in zip(seconds.values(), said.stdout.split(), strict=True):
            values.append(float(each))
    times = {name: statistics.quantiles(values[1:], n=4) for name, values in seconds.items()}
    return compared(times, "torch", "bitorch_qlinear")


EVAL = "QLinear in eval mode, which packs its weights in every call,"
TARGETS = [
    # What the Zen 4 with AVX-512 reached before: no less is wanted of the four rows without a goal.
    Target("512 × 4096 → 4096, × nn.Linear", 24, None, inference("large batch")),
    Target("the same, × bnn-lab's GEMM", 3, 4, inference("large batch", BNN)),
    Target("128 × 1024 → 1024, × nn.Linear", 14, 20, inference("medium batch")),
    Target("16 × 4096 → 4096, × nn.Linear", 46, None, inference("small batch")),
    Target("1 × 4096 → 4096, × nn.Linear, warm", 66, None, inference("one row")),
    Target("the first call after a 64 MB sweep", 0, None, after_a_sweep),
    Target("odd shapes, × the even neighbour's rate", 0.85, 0.95, odd_against_even),
    Target("64 × 64 → 64, × nn.Linear", 1, 2, inference("64 cubed")),
    Target("1 × 64 → 64, × nn.Linear", 0.95, None, inference("tiny")),
    Target(f"{EVAL} 512 × 4096 → 4096, × nn.Linear", 12, None, inference("large batch", name=QLINEAR)),
    Target("the same, 16 × 4096 → 4096", 1.5, None, inference("small batch", name=QLINEAR)),
    Target("the same, 1 × 64 → 64", 0.67, None, inference("tiny", name=QLINEAR)),
    Target("packing 512 × 4096 float32, × torch.sum", 0.8, 1, packing),
    Target("training step 512 × 4096 → 4096, × nn.Linear", 3.5, 5, training("large batch")),
    Target("the same, × bitorch's QLinear", 4, 6, training("large batch", BITORCH)),
    Target("forward and gradient of the input, 512 × 4096 → 4096, × nn.Linear", 0, None, gradient_of_the_input),
    Target("`identity` input, 512 × 4096 → 4096, × nn.Linear", 3, 4.5, identity_input("large batch")),
    Target("`identity` input, 1 × 1024 → 1024, × nn.Linear", 1, None, identity_input("one row, narrow")),
    Target("two threads, 512 × 4096 → 4096, × one", 1.7, None, lambda known, _: two_threads(known, ["large batch"])),
    # The smallest shapes have one thread's worth of work: the two are equal there except for the noise.
    Target(
        "two threads, × one, the slowest of the quick shapes (0.95: equal except for noise)",
        0.95,
        1,
        lambda known, _: two_threads(known, list(known.threads)),
    ),
    Target("rates from 256³ to 4096³, the least × the best", 0.83, None, flatness),
    Target("`import torch`, × what `import bitorch_qlinear` adds", 10, None, importing),
]


def verdict(figure: dict[str, Any]) -> str:
    """Say in a word whether a target is met."""
    if figure["measured"] is None:
        return f"not measured: {figure['why']}"
    if figure["least"] == 0:
        return "shown"
    if figure["measured"] < figure["least"]:
        return "missed"
    return "goal met" if figure["goal"] is not None and figure["measured"] >= figure["goal"] else "pass"


def measure(known: Known, rounds: int) -> list[dict[str, Any]]:
    """Every target with what was measured, or why it was not."""
    figures = []
    for target in tqdm(TARGETS, leave=False, unit="target"):
        figure = {"work": target.work, "least": target.least, "goal": target.goal, "measured": None, "why": ""}
        try:
            figure["measured"], figure["seconds_quartiles"] = target.measure(known, rounds)
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
    parser.add_argument("--rounds", type=TURNS, default=ROUNDS, help=f"turns of each contestant ({ROUNDS})")
    parser.add_argument("--kernel", choices=kernels.available(), help="instead of the best one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(argv)
    prepare(1)
    with kernels.forced(options.kernel):
        where = setting()
        figures: dict[str, Any] = {"targets": measure(needed(options.rounds), options.rounds), "setting": where}
    print(table(figures["targets"]))
    print(describe(figures["setting"]))
    if options.json:
        write_json(options.json, figures)
