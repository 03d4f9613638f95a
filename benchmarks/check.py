"""Compares the committed results with a fresh run: ``python -m benchmarks check`` (``make benchmark-check``).

On the processor and with the kernel that the results name, it is an error if QLinear or PackedQLinear lost more than
30 % of its ratio to nn.Linear at any shape, in inference or training. On another machine the ratios are only printed.
"""

from __future__ import annotations

import argparse
import json

from tabulate import tabulate
from tqdm import tqdm

from . import cpu, train
from .measuring import RESULTS, Figures, Shape, describe, prepare, ratio, setting
from .peers import LINEAR, PACKED_LAYER, QLINEAR

TOLERANCE = 0.3
ROUNDS = 9
NAMES = [LINEAR, QLINEAR, PACKED_LAYER]


def load(name: str) -> Figures:
    figures: Figures = json.loads((RESULTS / f"{name}.json").read_text())
    return figures


def again(inference: Figures, training: Figures) -> tuple[list[Figures], list[Figures]]:
    """Time the shapes, types and numbers of threads of committed results again."""
    forward = [
        cpu.measure([Shape.of(result)], [result["dtype"]], [result["threads"]], ROUNDS, NAMES)["results"][0]
        for result in tqdm(inference["results"], leave=False, unit="shape")
    ]
    prepare(training["setting"]["threads"])
    return forward, train.measure([Shape.of(result) for result in training["results"]], ROUNDS, NAMES)["results"]


def title(result: Figures, layer: str) -> str:
    """Return the name of a layer and a shape, with the type and the threads if they are not the usual ones."""
    if "dtype" not in result:
        return f"{layer}, training step, {result['name']}"
    threads = "" if result["threads"] == 1 else f", {result['threads']} threads"
    dtype = "" if result["dtype"] == "float32" else f", {result['dtype']}"
    return f"{layer}, {result['name']}{dtype}{threads}"


def compare(committed: list[Figures], fresh: list[Figures]) -> list[tuple[str, float, float]]:
    """Return a title, the committed and the fresh ratio for each shape and each layer that was timed."""
    rows = []
    for old, new in zip(committed, fresh, strict=True):
        before, now = old["seconds_quartiles"], new["seconds_quartiles"]
        layers = [name for name in NAMES[1:] if name in before]
        rows += [(title(old, name), ratio(before, LINEAR, name), ratio(now, LINEAR, name)) for name in layers]
    return rows


def fallen(rows: list[tuple[str, float, float]]) -> list[str]:
    """Return the titles of those that lost more than the tolerance."""
    return [name for name, old, new in rows if new < old * (1 - TOLERANCE)]


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    inference, training = load("cpu"), load("train")
    prepare(inference["setting"]["threads"])
    here = setting()
    forward, steps = again(inference, training)
    rows = compare(inference["results"], forward) + compare(training["results"], steps)
    print(tabulate(rows, headers=["times as fast as nn.Linear", "committed", "now"], floatfmt=".2f"))
    print(f"committed: {describe(inference['setting'])}\nnow: {describe(here)}")
    if any(here[key] != inference["setting"][key] for key in ("processor", "kernel")):
        print("Another processor or kernel: nothing is judged.")
    elif lost := fallen(rows):
        raise SystemExit(f"more than {TOLERANCE:.0%} slower than committed: {', '.join(lost)}")


if __name__ == "__main__":
    main()
