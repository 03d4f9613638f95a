"""Times inference on the CPU: ``python -m benchmarks cpu``.

The shapes are those of shapes.csv, and all layers have a bias. The contestants of a shape take turns in one process. A
time is the median of the turns ± half the distance between their quartiles. A ratio (×) is how many times as fast as
nn.Linear a contestant is, by medians. QLinear packs its input and its weights in every call, PackedQLinear only its
input, and packed × packed neither. The sizes below which nn.Linear is faster than PackedQLinear are searched for, too.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from bitorch_qlinear import kernels

from . import plots
from .measuring import (
    ROUNDS,
    THREADS,
    TURNS,
    Call,
    Shape,
    describe,
    interleaved,
    load_shapes,
    median,
    microseconds,
    prepare,
    ratio,
    setting,
    spread,
    write_json,
)
from .peers import LINEAR, NAMES, PACKED, PACKED_LAYER, contestants

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
CROSSOVER_BATCHES = (1, 64)
CROSSOVER_RANGE = (16, 2048)
CROSSOVER_ROUNDS = 7
# nn.Linear is timed only for cubes up to this size, because 4096³ takes it 1.5 s on Zen 4.
LINEAR_MULTIPLY_ADDS = 2048**3


def measure(
    shapes: list[Shape], dtypes: list[str], threads: list[int], rounds: int, names: Collection[str] = tuple(NAMES)
) -> dict[str, Any]:
    """Time each shape with each type and number of threads, and note the peers that were absent, by type."""
    results: list[dict[str, Any]] = []
    absent: dict[str, dict[str, str]] = {dtype: {} for dtype in dtypes}
    cases = [(shape, dtype, count) for count in threads for dtype in dtypes for shape in shapes]
    before = torch.get_num_threads()
    for shape, dtype, count in tqdm(cases, leave=False, unit="shape"):
        torch.set_num_threads(count)
        calls, missing = contestants(shape, DTYPES[dtype], names)
        absent[dtype] |= missing
        times = interleaved(calls, rounds)
        results.append({**shape.fields(), "dtype": dtype, "threads": count, "seconds_quartiles": times})
    torch.set_num_threads(before)
    return {"results": results, "absent": absent}


def measure_sizes(rounds: int) -> list[dict[str, Any]]:
    """Time the smallest product and the cubes from 256³ on, all in the same turns, so that their rates compare."""
    every = sorted(load_shapes(), key=lambda shape: shape.multiply_adds)
    shapes = every[:1] + [shape for shape in every if shape.m == shape.k == shape.n >= 256]
    calls: dict[tuple[Shape, str], Call] = {}
    for shape in shapes:
        names = [PACKED_LAYER, PACKED] + [LINEAR] * (shape.multiply_adds <= LINEAR_MULTIPLY_ADDS)
        calls |= {(shape, name): call for name, call in contestants(shape, names=names).calls.items()}
    times = interleaved(calls, rounds)
    return [
        {**shape.fields(), "seconds_quartiles": {name: times[of, name] for of, name in times if of == shape}}
        for shape in shapes
    ]


def rate(result: dict[str, Any], name: str = PACKED) -> float:
    """Return the multiply-adds a second of one contestant."""
    return Shape.of(result).multiply_adds / median(result["seconds_quartiles"], name)


def bisect(low: int, high: int, wins: Callable[[int], bool]) -> int | None:
    """Return the smallest size in [low, high] that wins, or None if the largest does not.

    Every size above one that wins must win, too.
    """
    if not wins(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle + 1, high)
    return high


def crossover(batch: int) -> int | None:
    """Find the smallest K = N from which PackedQLinear is faster than nn.Linear."""

    def wins(size: int) -> bool:
        calls = contestants(Shape(batch, size, size), names=(LINEAR, PACKED_LAYER)).calls
        return ratio(interleaved(calls, CROSSOVER_ROUNDS), LINEAR, PACKED_LAYER) >= 1

    return bisect(*CROSSOVER_RANGE, wins)


def crossovers() -> dict[str, int | None]:
    """Return the crossovers by batch, which is a string because it is a key in JSON."""
    return {str(batch): crossover(batch) for batch in tqdm(CROSSOVER_BATCHES, leave=False, unit="crossover")}


def crossover_text(batch: str, size: int | None) -> str:
    """Describe a crossover, or say that one of the two wins everywhere."""
    low, high = CROSSOVER_RANGE
    if size is None:
        return f"at batch {batch} nn.Linear is still faster at K = N = {high}, the largest size tried"
    if size == low:
        return f"at batch {batch} PackedQLinear is faster at all sizes tried, K = N = {low} to {high}"
    return f"at batch {batch} PackedQLinear is faster from K = N = {size} on"


def absent_text(absent: dict[str, dict[str, str]]) -> list[str]:
    """List the peers that were not timed, with the type and the reason."""
    return [f"{name} ({dtype}): {why}" for dtype, missing in absent.items() for name, why in missing.items()]


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def table(results: list[dict[str, Any]], style: str = "simple") -> str:
    """Return a table of nn.Linear's times and the others' ratios, with their geometric means in the last line."""
    present = [name for name in NAMES if any(name in result["seconds_quartiles"] for result in results)]
    rows: list[list[str]] = []
    ratios: dict[str, list[float]] = {name: [] for name in present}
    for result in results:
        times = result["seconds_quartiles"]
        cells = []
        for name in present[1:]:
            if name in times:
                ratios[name].append(ratio(times, LINEAR, name))
            cells.append(f"{ratio(times, LINEAR, name):.2f} {spread(times, name)}" if name in times else "")
        where = [result["dtype"], str(result["threads"])]
        baseline = f"{microseconds(median(times, LINEAR))} {spread(times, LINEAR)}"
        rows.append([result["name"], str(Shape.of(result)), *where, baseline, *cells])
    means = [f"{geometric_mean(ratios[name]):.2f}" if ratios[name] else "" for name in present[1:]]
    rows.append(["geometric mean", "", "", "", "", *means])
    headers = ["name", "shape", "dtype", "threads", f"{LINEAR}, µs", *(f"{name}, ×" for name in present[1:])]
    sides = ["left"] * 3 + ["right"] * (len(headers) - 3)
    text: str = tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=sides)
    return text


def report(figures: dict[str, Any]) -> str:
    """Return everything that was measured, as text."""
    lines = [table(figures["results"]), ""]
    if sizes := figures.get("sizes"):
        lines += [f"packed × packed, {result['name']}: {rate(result) / 1e9:,.1f} G multiply-adds/s" for result in sizes]
    lines += [crossover_text(batch, size) for batch, size in figures["crossover"].items()]
    lines += [f"absent: {each}" for each in absent_text(figures["absent"])]
    return "\n".join([*lines, describe(figures["setting"])])


def draw(figures: dict[str, Any], folder: Path) -> None:
    """Draw the plots of what was measured."""
    plots.ratios(figures, folder / "cpu_ratio.png")
    if figures.get("sizes"):
        plots.sizes(figures, folder / "cpu_time.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = load_shapes()
    parser.add_argument("--quick", action="store_true", help="time a selection of the shapes")
    parser.add_argument(
        "--only", choices=[shape.name for shape in shapes], metavar="NAME", help="time one shape of shapes.csv"
    )
    parser.add_argument("--threads", type=THREADS, nargs="+", default=[1], help="torch's threads (1)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), nargs="+", default=["float32"], help="the type of x and y (float32)"
    )
    parser.add_argument(
        "--peers",
        choices=NAMES[1:],
        nargs="+",
        default=NAMES[1:],
        metavar="NAME",
        help=f"who is timed beside {LINEAR} (all)",
    )
    parser.add_argument("--rounds", type=TURNS, default=ROUNDS, help=f"the turns of each contestant ({ROUNDS})")
    parser.add_argument("--kernel", choices=kernels.available(), help="the kernel, instead of the best one")
    parser.add_argument("--no-crossover", action="store_true", help="do not search for the smallest sizes that win")
    parser.add_argument("--sizes", action="store_true", help="time the cubes from 256³ to 4096³ in the same turns too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write cpu_ratio.png, and cpu_time.png of --sizes")
    options = parser.parse_args(argv)
    prepare(options.threads[0])
    if options.quick or options.only:
        shapes = [shape for shape in load_shapes(options.quick) if options.only in (None, shape.name)]
    with kernels.forced(options.kernel):
        where = setting()
        figures = measure(shapes, options.dtype, options.threads, options.rounds, [LINEAR, *options.peers])
        figures["sizes"] = measure_sizes(options.rounds) if options.sizes else []
        figures["crossover"] = {} if options.no_crossover else crossovers()
    figures["setting"] = where
    print(report(figures))
    if options.json:
        write_json(options.json, figures)
    if options.plots:
        draw(figures, options.plots)
