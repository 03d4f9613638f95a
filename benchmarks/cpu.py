"""Times inference on the CPU: ``python -m benchmarks cpu``.

Shapes of shapes.csv, with bias; the contestants of a shape take turns in one process, and ratios are of medians. Those
of QLinear include the packing of the input, those of packed × packed leave it out; weights are packed before (eval
mode keeps them). The sizes below which nn.Linear is faster are searched for and printed.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from bitorch_qlinear import _library

from . import plots
from .measuring import (
    Shape,
    describe,
    interleaved,
    load_shapes,
    median,
    microseconds,
    prepare,
    ratio,
    setting,
    write_json,
)
from .peers import LINEAR, NAMES, QLINEAR, contestants

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
CROSSOVER_BATCHES = (1, 64)
CROSSOVER_RANGE = (16, 2048)


def measure(shapes: list[Shape], dtypes: list[str], threads: list[int], rounds: int) -> dict[str, Any]:
    """Quartiles of the seconds a call for each shape, type and number of threads, and who was absent."""
    results, absent = [], {}
    cases = [(shape, dtype, count) for count in threads for dtype in dtypes for shape in shapes]
    for shape, dtype, count in tqdm(cases, leave=False, unit="shape"):
        torch.set_num_threads(count)
        calls, missing = contestants(shape, DTYPES[dtype])
        absent |= missing
        times = interleaved(calls, rounds)
        results.append({**shape._asdict(), "dtype": dtype, "threads": count, "seconds_quartiles": times})
    return {"results": results, "absent": absent}


def bisect(low: int, high: int, wins: Callable[[int], bool]) -> int | None:
    """The smallest size in [low, high] that wins, if those above one that wins do too; None if the largest does not."""
    if not wins(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle + 1, high)
    return high


def crossover(batch: int, rounds: int) -> int | None:
    """From which K = N on QLinear is faster than nn.Linear."""

    def wins(size: int) -> bool:
        calls = contestants(Shape("", "", batch, size, size)).calls
        return ratio(interleaved({name: calls[name] for name in (LINEAR, QLINEAR)}, rounds), LINEAR, QLINEAR) >= 1

    return bisect(*CROSSOVER_RANGE, wins)


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def table(results: list[dict[str, Any]], style: str = "simple") -> str:
    """nn.Linear's time, and how many times as fast the others are; their geometric means in the last line."""
    present = [name for name in NAMES if any(name in result["seconds_quartiles"] for result in results)]
    rows: list[list[str]] = []
    ratios: dict[str, list[float]] = {name: [] for name in present}
    for result in results:
        times = result["seconds_quartiles"]
        cells = []
        for name in present[1:]:
            if name in times:
                ratios[name].append(ratio(times, LINEAR, name))
            cells.append(f"{ratio(times, LINEAR, name):.2f}" if name in times else "")
        shape = f"{result['m']} × {result['k']} → {result['n']}"
        where = [result["dtype"], str(result["threads"])]
        rows.append([result["name"], shape, *where, microseconds(median(times, LINEAR)), *cells])
    means = [f"{geometric_mean(ratios[name]):.2f}" if ratios[name] else "" for name in present[1:]]
    rows.append(["geometric mean", "", "", "", "", *means])
    headers = ["", "shape", "type", "threads", f"{LINEAR}, µs", *(f"{name}, ×" for name in present[1:])]
    sides = ["left"] * 3 + ["right"] * (len(headers) - 3)
    text: str = tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=sides)
    return text


def report(figures: dict[str, Any]) -> str:
    """Everything that was measured, as text."""
    lines = [table(figures["results"]), ""]
    for batch, size in figures["crossover"].items():
        found = f"from K = N = {size} on" if size else f"not up to K = N = {CROSSOVER_RANGE[1]}"
        lines.append(f"faster than nn.Linear at batch {batch}: {found}")
    lines += [f"absent: {name}: {why}" for name, why in figures["absent"].items()]
    return "\n".join([*lines, describe(figures["setting"])])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = load_shapes()
    parser.add_argument("--quick", action="store_true", help="a selection of the shapes")
    parser.add_argument("--only", choices=[shape.name for shape in shapes], metavar="NAME", help="one of shapes.csv")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="torch's threads (1)")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=["float32"], help="of x and y (float32)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contestant (15)")
    parser.add_argument("--kernel", choices=_library.available_kernels(), help="instead of the best one")
    parser.add_argument("--no-crossover", action="store_true", help="do not search for the smallest sizes that win")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write cpu_ratio.png and cpu_time.png")
    options = parser.parse_args(argv)
    prepare(options.threads[0], options.kernel)
    if options.quick or options.only:
        shapes = [shape for shape in load_shapes(options.quick) if options.only in (None, shape.name)]
    figures = measure(shapes, options.dtype, options.threads, options.rounds)
    torch.set_num_threads(options.threads[0])
    batches = () if options.no_crossover else CROSSOVER_BATCHES
    figures["crossover"] = {batch: crossover(batch, 7) for batch in tqdm(batches, leave=False, unit="crossover")}
    figures["setting"] = setting()
    print(report(figures))
    if options.json:
        write_json(options.json, figures)
    if options.plots:
        plots.ratios(figures, options.plots / "cpu_ratio.png")
        plots.times(figures, options.plots / "cpu_time.png")
