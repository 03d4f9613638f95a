"""Compares the committed results with a fresh run: ``python -m benchmarks check`` (``make benchmark-check``).

On the processor and with the kernel that the results name, it is an error if QLinear or PackedQLinear lost more than
30 % of its ratio to nn.Linear at any shape, in inference or training, or a packed or fused whole model lost as much of
its ratio to the float one. On another machine the ratios are only printed.
"""

from __future__ import annotations

import argparse
import json
import statistics

from tabulate import tabulate
from tqdm import tqdm

from . import cpu, models, train
from .measuring import RESULTS, Figures, Shape, describe, prepare, ratio, setting
from .peers import LINEAR, PACKED_LAYER, QLINEAR

TOLERANCE = 0.3
ROUNDS = 9
# The placement of memory differs between processes, so whole models are timed in several.
PROCESSES = 3
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


def models_again(committed: Figures) -> list[Figures]:
    """Time the whole models of committed results again."""
    batches: dict[tuple[str, int], list[int]] = {}
    for result in committed["results"]:
        batches.setdefault((result["variant"], result["size"]), []).append(result["batch"])
    cases: list[models.Case] = [(variant, size, each) for (variant, size), each in batches.items()]
    return models.measure_times(cases, PROCESSES, ROUNDS, None)


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


def compare_models(committed: list[Figures], fresh: list[Figures]) -> list[tuple[str, float, float]]:
    """Return what :func:`compare` does for whole models, with the median of the processes' ratios."""
    found = {(new["variant"], new["size"], new["batch"]): new for new in fresh}
    rows = []
    for old in committed:
        variant, size, batch = key = old["variant"], old["size"], old["batch"]
        for name in (models.PACKED, models.FUSED):
            before, now = (statistics.median(models.ratios(each, models.FLOAT, name)) for each in (old, found[key]))
            rows.append((f"{name} model of {size} wide layers, {variant}, batch {batch}", before, now))
    return rows


def fallen(rows: list[tuple[str, float, float]]) -> list[str]:
    """Return the titles of those that lost more than the tolerance."""
    return [name for name, old, new in rows if new < old * (1 - TOLERANCE)]


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    committed = {name: load(name) for name in ("cpu", "train", "models")}
    prepare(committed["cpu"]["setting"]["threads"])
    here = setting()
    forward, steps = again(committed["cpu"], committed["train"])
    rows = {
        "cpu": compare(committed["cpu"]["results"], forward),
        "train": compare(committed["train"]["results"], steps),
        "models": compare_models(committed["models"]["results"], models_again(committed["models"])),
    }
    shown = [row for each in rows.values() for row in each]
    print(tabulate(shown, headers=["times as fast as nn.Linear", "committed", "now"], floatfmt=".2f"))
    print(f"now: {describe(here)}")
    lost = []
    for name, figures in committed.items():
        judged = all(here[key] == figures["setting"][key] for key in ("processor", "kernel"))
        unjudged = "" if judged else " (another processor or kernel: not judged)"
        print(f"{name}.json: {describe(figures['setting'])}{unjudged}")
        lost += fallen(rows[name]) if judged else []
    if lost:
        raise SystemExit(f"more than {TOLERANCE:.0%} slower than committed: {', '.join(lost)}")


if __name__ == "__main__":
    main()
