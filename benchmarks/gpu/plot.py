"""The picture of a run, gpu.png."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .. import plots
from ..measuring import Shape
from .contestants import BF16, FP8, FP16, INT8, PACKED, PACKING
from .measurements import COLD, WARM, Results
from .targets import median, quotient

LEGEND = {
    PACKED: "x packed before the call",
    PACKING: "bf16 x, packed in the call",
    FP16: "nn.Linear in fp16",
    FP8: "torch._scaled_mm in fp8",
    INT8: "torch._int_mm in int8",
}
COLOURS = dict(zip(LEGEND, ("#56B4E9", "#0072B2", "#999999", "#D55E00", "#CC79A7"), strict=True))
MODES = {COLD: "L2 cache flushed before each call", WARM: "operands in the L2 cache, if they fit"}


def plot(path: Path, figures: Results) -> None:
    """Draw how many times as fast as nn.Linear in bf16 each contestant is, by the rows of x, for each weight."""
    shapes = {(row["k"], row["n"], row["m"]) for row in figures.products}
    rows_of = Counter((k, n) for k, n, _ in shapes)
    # A single number of rows makes no line.
    weights = [pair for pair in dict.fromkeys((row["k"], row["n"]) for row in figures.products) if rows_of[pair] > 1]
    if not weights:
        return
    pyplot = plots.drawing()
    size = (plots.WIDTH, 1 + 1.75 * len(weights))
    figure, grid = pyplot.subplots(len(weights), 2, figsize=size, squeeze=False, sharex="row", sharey="row")
    for line, (k, n) in zip(grid, weights, strict=True):
        batches = sorted({row["m"] for row in figures.products if (row["k"], row["n"]) == (k, n)})
        for axes, (mode, caption) in zip(line, MODES.items(), strict=True):
            for name, label in LEGEND.items():
                times = [[median(figures, Shape(m, k, n), each, mode) for each in (BF16, name)] for m in batches]
                points = [(m, quotient(*pair)) for m, pair in zip(batches, times, strict=True) if None not in pair]
                rows, ratios = [m for m, _ in points], [ratio for _, ratio in points]
                axes.plot(rows, ratios, "o-", label=label, color=COLOURS[name], markersize=3.5, linewidth=1.3)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(batches, [str(m) for m in batches])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_tick_params(labelleft=True)
            axes.grid(alpha=0.3)
            axes.set_title(f"{k} inputs → {n} outputs, {caption}", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("rows of x")
    figure.supylabel("times as fast as nn.Linear in bf16", fontsize=9)
    where = figures.setting
    versions = [f"{name} {where[name]}" for name in ("torch", "cuda") if name in where]
    machine = [str(where.get("device", "")), *versions, str(where.get("date", ""))[:10]]
    title = "Speed of binary products on a GPU, as a multiple of nn.Linear's in bf16"
    plots.save(pyplot, figure, path, title, ", ".join(machine), grid[0, 0].get_legend_handles_labels())
