"""Measures the targets of the CPU path: ``python -m benchmarks targets``.

Each row says how many times as fast the first is as the one it is compared with, by medians measured in turns in one
process: float32, with bias, packing of the input included, and one thread unless the row says two. A row whose peer is
absent says so. ``--kernel avx2`` measures the AVX2 kernel on a processor that has a better one. ``make benchmark``
takes the times of whole shapes from what it has measured in the same process.
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
# Each process takes seconds.
IMPORTS = 5


class Runs(NamedTuple):
    """The times that targets share, which other benchmarks measured, and the turns of what a target measures itself.

    Attributes:
        inference: Times by the name of a shape.
        training: Times of training steps by the name of a shape.
        sizes: Times of the smallest product and of the cubes.
        threads: Quartiles of PackedQLinear's seconds by the name of a shape and the number of threads.
        absent: Why peers were not timed, by name.
        rounds: The number of turns.
    """

    inference: dict[str, Times]
    training: dict[str, Times]
    sizes: list[dict[str, Any]]
    threads: dict[str, dict[int, list[float]]]
    absent: dict[str, str]
    rounds: int


class Measured(NamedTuple):
    """A ratio, and the quartiles of the seconds that it was computed from."""

    value: float
    seconds_quartiles: dict[str, Any]


class Target(NamedTuple):
    """A ratio that must be reached.

    Attributes:
        work: What is compared with what: "A against B" is how many times as fast as B A is.
        least: The ratio that passes, or 0 if the row is only shown.
        goal: The ratio that is aimed at, if it is a larger one.
        measure: Computes the ratio. It raises LookupError, with the reason, if a part of it cannot be measured.
    """

    work: str
    least: float
    goal: float | None
    measure: Callable[[Runs], Measured]


# ---- whole shapes ----------------------------------------------------------------------------------


def by_threads(rounds: int) -> dict[str, dict[int, list[float]]]:
    """Time PackedQLinear with one thread and with two, in turns; nothing if there is only one processor."""
    if (os.cpu_count() or 1) < 2:
        return {}
    made = {
        shape.name: contestants(shape, names=[PACKED_LAYER]).calls[PACKED_LAYER] for shape in load_shapes(quick=True)
    }
    # Each turn takes all shapes, so that other load on the machine, which changes within seconds, slows all alike.
    counts = {(name, count): count for name in made for count in (1, 2)}
    times = interleaved({key: made[key[0]] for key in counts}, rounds, threads=counts)
    return {name: {count: times[name, count] for count in (1, 2)} for name in made}


def collect(inference: dict[str, Any], training: dict[str, Any], rounds: int) -> Runs:
    """Collect what other benchmarks measured, the first result of each name, and time the threads."""

    def times(figures: dict[str, Any]) -> dict[str, Times]:
        return {result["name"]: result["seconds_quartiles"] for result in reversed(figures["results"])}

    absent = inference["absent"]["float32"] | training["absent"]
    return Runs(times(inference), times(training), inference["sizes"], by_threads(rounds), absent, rounds)


def measure_runs(rounds: int) -> Runs:
    """Measure the shapes that the targets need, and no others."""
    inference = cpu.measure(named(INFERENCE), ["float32"], [1], rounds, [LINEAR, QLINEAR, PACKED_LAYER, BNN])
    inference["sizes"] = cpu.measure_sizes(rounds)
    return collect(inference, train.measure(named(TRAINING), rounds), rounds)


def compared(times: Times, baseline: str, name: str) -> Measured:
    """Return how many times as fast as the baseline a contestant is."""
    return Measured(ratio(times, baseline, name), {each: times[each] for each in (baseline, name)})


def times_baseline(times: Times, absent: Mapping[str, str], baseline: str, name: str) -> Measured:
    """Return how many times as fast as the baseline a layer is; LookupError if the baseline is absent."""
    if baseline not in times:
        raise LookupError(absent[baseline])
    return compared(times, baseline, name)


def inference(shape: str, baseline: str = LINEAR, name: str = PACKED_LAYER) -> Callable[[Runs], Measured]:
    """Make a target's ``measure``: a layer's speed at a shape."""
    return lambda runs: times_baseline(runs.inference[shape], runs.absent, baseline, name)


def training(shape: str, baseline: str = LINEAR) -> Callable[[Runs], Measured]:
    """Make a target's ``measure``: QLinear's speed in a training step at a shape."""
    return lambda runs: times_baseline(runs.training[shape], runs.absent, baseline, QLINEAR)


def flatness(runs: Runs) -> Measured:
    """Divide the smallest rate of the cubes by the largest; packing is not part of their times."""
    cubes = runs.sizes[1:]
    rates = [cpu.rate(cube) for cube in cubes]
    return Measured(min(rates) / max(rates), {cube["name"]: cube["seconds_quartiles"][PACKED] for cube in cubes})


def two_threads(names: list[str] | None = None) -> Callable[[Runs], Measured]:
    """Make a target's ``measure``: two threads' speed for the shape that gains least, of these or of all."""

    def gain(times: Mapping[int, list[float]]) -> float:
        return times[1][1] / times[2][1]

    def measure(runs: Runs) -> Measured:
        if not runs.threads:
            raise LookupError("one processor")
        name = min(names or runs.threads, key=lambda name: gain(runs.threads[name]))
        times = runs.threads[name]
        return Measured(gain(times), {f"{name}, {count}": times[count] for count in (1, 2)})

    return measure


# ---- measured only for the targets -------------------------------------------------------------------


def after_a_sweep(runs: Runs) -> Measured:
    """Time the first call after 64 MB were written, which evicts the weights from the caches."""
    (shape,) = named(["one row"])
    calls = contestants(shape, names=[LINEAR, PACKED_LAYER]).calls
    swept = torch.empty(SWEEP_BYTES, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {LINEAR: [], PACKED_LAYER: []}
    for i in range(2 * runs.rounds):
        for name, values in seconds.items():
            swept.fill_(i % 256)
            start = time.perf_counter()
            calls[name]()
            values.append(time.perf_counter() - start)
    times = {name: statistics.quantiles(values, n=4) for name, values in seconds.items()}
    return compared(times, LINEAR, PACKED_LAYER)


def odd_against_even(runs: Runs) -> Measured:
    """Divide the rate of each odd shape by that of its even neighbour, and return the smallest quotient."""
    shapes = {shape.name: shape for shape in load_shapes()}

    def pair(odd: Shape, even: Shape) -> Measured:
        calls = {shape.name: contestants(shape, names=[PACKED_LAYER]).calls[PACKED_LAYER] for shape in (odd, even)}
        times = interleaved(calls, runs.rounds)
        work = odd.multiply_adds / even.multiply_adds
        return Measured(work * median(times, even.name) / median(times, odd.name), times)

    return min(pair(shapes[odd], shapes[even]) for odd, even in ODD_AND_EVEN.items())


def packing(runs: Runs) -> Measured:
    """Time the packing of a matrix, and a sum that reads the same matrix."""
    x = torch.randn(512, 4096)
    return compared(interleaved({"sum": x.sum, "pack": lambda: F.pack_bits(x)}, runs.rounds), "sum", "pack")


def identity_input(name: str) -> Callable[[Runs], Measured]:
    """Make a target's ``measure``: a packed layer whose input stays real, at a shape."""

    def measure(runs: Runs) -> Measured:
        (shape,) = named([name])
        x, linear = torch.randn(shape.m, shape.k), nn.Linear(shape.k, shape.n)
        layer = PackedQLinear.from_float(QLinear.from_linear(linear, input_quantization="identity"))
        calls = {LINEAR: evaluation(linear, x), PACKED_LAYER: evaluation(layer, x)}
        return compared(interleaved(calls, runs.rounds), LINEAR, PACKED_LAYER)

    return measure


def gradient_of_the_input(runs: Runs) -> Measured:
    """Time a forward and the gradient of x, with weights that need no gradient."""
    (shape,) = named(["large batch"])
    x, gradient = torch.randn(shape.m, shape.k, requires_grad=True), torch.randn(shape.m, shape.n)
    linear = nn.Linear(shape.k, shape.n).requires_grad_(False)
    packed = PackedQLinear.from_float(QLinear.from_linear(linear, gradient_cancellation_threshold=1.0))

    def step(layer: nn.Module) -> Call:
        return lambda: torch.autograd.grad(layer(x), x, gradient)

    return compared(interleaved({LINEAR: step(linear), PACKED_LAYER: step(packed)}, runs.rounds), LINEAR, PACKED_LAYER)


def importing(runs: Runs) -> Measured:
    """Divide the time of torch's import by what the package's import adds to it, in a new process each time."""
    seconds: dict[str, list[float]] = {"torch": [], "bitorch_qlinear": []}
    for _ in range(min(runs.rounds, IMPORTS) + 1):  # The first one reads the files from the disk.
        command = [sys.executable, "-m", "benchmarks.import_process"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
        for values, each in zip(seconds.values(), said.stdout.split(), strict=True):
            values.append(float(each))
    times = {name: statistics.quantiles(values[1:], n=4) for name, values in seconds.items()}
    return compared(times, "torch", "bitorch_qlinear")


TARGETS = [
    # The rows with a bound of 24, 46, 66 and 12 hold what a Zen 4 with AVX-512 reached, so that nothing is lost.
    Target("PackedQLinear against nn.Linear, 512 × 4096 → 4096", 24, None, inference("large batch")),
    Target("PackedQLinear against bnn-lab's product, 512 × 4096 → 4096", 3, 4, inference("large batch", BNN)),
    Target("PackedQLinear against nn.Linear, 128 × 1024 → 1024", 14, 20, inference("medium batch")),
    Target("PackedQLinear against nn.Linear, 16 × 4096 → 4096", 46, None, inference("small batch")),
    Target("PackedQLinear against nn.Linear, 1 × 4096 → 4096", 66, None, inference("one row")),
    Target("PackedQLinear against nn.Linear, 1 × 4096 → 4096, after 64 MB were written", 0, None, after_a_sweep),
    Target("PackedQLinear at odd sizes against even sizes, by rate, slowest of three", 0.85, 0.95, odd_against_even),
    Target("PackedQLinear against nn.Linear, 64 × 64 → 64", 1, 2, inference("64 cubed")),
    Target("PackedQLinear against nn.Linear, 1 × 64 → 64", 0.95, None, inference("tiny")),
    Target(
        "QLinear in eval mode against nn.Linear, 512 × 4096 → 4096", 12, None, inference("large batch", name=QLINEAR)
    ),
    Target(
        "QLinear in eval mode against nn.Linear, 16 × 4096 → 4096", 1.5, None, inference("small batch", name=QLINEAR)
    ),
    Target("QLinear in eval mode against nn.Linear, 1 × 64 → 64", 0.67, None, inference("tiny", name=QLINEAR)),
    Target("packing 512 × 4096 float32 values against their torch.sum", 0.8, 1, packing),
    Target("training step of QLinear against nn.Linear, 512 × 4096 → 4096", 3.5, 5, training("large batch")),
    Target("training step of QLinear against bitorch's, 512 × 4096 → 4096", 4, 6, training("large batch", BITORCH)),
    Target(
        "forward and gradient of x, PackedQLinear against nn.Linear, 512 × 4096 → 4096", 0, None, gradient_of_the_input
    ),
    Target(
        "PackedQLinear with `identity` input against nn.Linear, 512 × 4096 → 4096",
        3,
        4.5,
        identity_input("large batch"),
    ),
    Target(
        "PackedQLinear with `identity` input against nn.Linear, 1 × 1024 → 1024",
        1,
        None,
        identity_input("one row, narrow"),
    ),
    Target("PackedQLinear with two threads against one, 512 × 4096 → 4096", 1.7, None, two_threads(["large batch"])),
    # The smallest shapes have work for one thread only, so that the ratio is 1 there except for noise.
    Target("PackedQLinear with two threads against one, slowest of the quick shapes", 0.95, 1, two_threads()),
    Target("slowest cube from 256³ to 4096³ against the fastest, by rate, packed before", 0.83, None, flatness),
    Target("`import bitorch_qlinear`, without torch's share, against `import torch`", 10, None, importing),
]


def verdict(figure: dict[str, Any]) -> str:
    """Return in a word whether a target is met."""
    if figure["measured"] is None:
        return f"not measured: {figure['why']}"
    if figure["least"] == 0:
        return "shown"
    if figure["measured"] < figure["least"]:
        return "missed"
    return "goal met" if figure["goal"] is not None and figure["measured"] >= figure["goal"] else "pass"


def measure(runs: Runs) -> list[dict[str, Any]]:
    """Measure every target, or note why it cannot be measured."""
    figures = []
    for target in tqdm(TARGETS, leave=False, unit="target"):
        figure = {"work": target.work, "least": target.least, "goal": target.goal, "measured": None, "why": ""}
        try:
            figure["measured"], figure["seconds_quartiles"] = target.measure(runs)
        except LookupError as error:
            figure["why"] = str(error)
        figures.append(figure)
    return figures


def table(figures: list[dict[str, Any]], style: str = "simple") -> str:
    """Return all targets with their ratios, bounds and results."""

    def shown(value: float | None) -> str:
        return f"{value:.3g}" if value else ""

    rows = [[f["work"], shown(f["measured"]), shown(f["least"]), shown(f["goal"]), verdict(f)] for f in figures]
    text: str = tabulate(
        rows,
        headers=["target", "measured", "pass", "goal", "result"],
        tablefmt=style,
        disable_numparse=True,
        colalign=["left", "right", "right", "right", "left"],
    )
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=TURNS, default=ROUNDS, help=f"the turns of each contestant ({ROUNDS})")
    parser.add_argument("--kernel", choices=kernels.available(), help="the kernel, instead of the best one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(argv)
    prepare(1)
    with kernels.forced(options.kernel):
        where = setting()
        figures: dict[str, Any] = {"targets": measure(measure_runs(options.rounds)), "setting": where}
    print(table(figures["targets"]))
    print(describe(figures["setting"]))
    if options.json:
        write_json(options.json, figures)
