"""Pictures of the CPU benchmark's results."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from .measuring import Figures, Shape, Times, describe, median, ratio
from .peers import BITORCH, BNN, INT8, LINEAR, PACKED, PACKED_LAYER, QLINEAR

# Readers with any kind of colour blindness can tell these colours of Okabe and Ito apart.
COLOURS = {
    LINEAR: "#999999",
    QLINEAR: "#E69F00",
    PACKED_LAYER: "#0072B2",
    PACKED: "#56B4E9",
    BITORCH: "#D55E00",
    BNN: "#009E73",
    INT8: "#CC79A7",
}
LEGEND = {
    LINEAR: "nn.Linear",
    QLINEAR: "QLinear: packs input and weights in each call",
    PACKED_LAYER: "PackedQLinear: packs its input in each call",
    PACKED: "packed × packed: both are packed before",
    BITORCH: "bitorch's QLinear",
    BNN: "bnn-lab's product: both are packed before",
    INT8: "int8: torch's dynamic quantization",
}
# Inches. At 100 pixels an inch a picture fills the 830 pixels of a README; it is saved with twice as many pixels.
WIDTH = 8.3
PIXELS = 200


def drawing() -> Any:
    """Return pyplot, set up for pictures that are readable on light and on dark pages."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcdefaults()
    pyplot.rcParams.update({"font.size": 9, "figure.facecolor": "white", "savefig.facecolor": "white"})
    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def save(
    pyplot: Any,
    figure: Any,
    path: Path,
    title: str,
    machine: str,
    legend: tuple[list[Any], list[str]],
) -> None:
    """Save a picture with its title and the machine above the axes and the legend below them.

    Args:
        pyplot: What :func:`drawing` returned.
        figure: The picture, which is closed.
        path: The PNG file. Its folder is made if it is missing.
        title: What the picture shows.
        machine: The machine and the versions that were measured.
        legend: What the legend explains, and the text of each entry.
    """
    small = textwrap.fill(machine, 150)
    inches = figure.get_size_inches()[1]
    head = 0.35 + 0.14 * (small.count("\n") + 1)
    figure.set_layout_engine("constrained", rect=(0, 0, 0.985, 1 - head / inches))
    figure.text(0.012, 1 - 0.08 / inches, title, fontsize=11, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.32 / inches, small, fontsize=7.5, color="#555555", va="top")
    figure.legend(*legend, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=PIXELS)
    pyplot.close(figure)


def ratios(figures: Figures, path: Path) -> None:
    """Draw how many times as fast as nn.Linear each contestant is, for the first type and number of threads.

    A bar begins at nn.Linear's speed, 1, and the error bar spans the contestant's quartiles.
    """
    results = alike(figures)
    pyplot = drawing()
    figure, axes = pyplot.subplots(figsize=(WIDTH, 1.7 + 0.56 * len(results)))
    names = [name for name in COLOURS if name != LINEAR and any(name in r["seconds_quartiles"] for r in results)]
    height = 0.84 / len(names)
    for i, name in enumerate(names):
        rows = [(row, r["seconds_quartiles"]) for row, r in enumerate(results) if name in r["seconds_quartiles"]]
        places = [row + height * (i - (len(names) - 1) / 2) for row, _ in rows]
        values = [ratio(times, LINEAR, name) for _, times in rows]
        axes.barh(
            places,
            [value - 1 for value in values],
            height,
            left=1,
            xerr=errors([times for _, times in rows], name),
            error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
            label=LEGEND[name],
            color=COLOURS[name],
        )
    # The numbers stand in columns beside the bars, because no bar then runs through them.
    for column, name in enumerate(name for name in (QLINEAR, PACKED_LAYER) if name in names):
        place = 1.07 + 0.16 * column
        text = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "center", "fontsize": 8}
        axes.text(place, -0.7, name, color=COLOURS[name], fontweight="bold", **text)
        for row, result in enumerate(results):
            if name in result["seconds_quartiles"]:
                axes.text(place, row, f"{ratio(result['seconds_quartiles'], LINEAR, name):.3g} ×", **text)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(results)), [f"{r['name']}\n{Shape.of(r)}" for r in results], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(results) - 0.45, -0.55)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("times as fast as nn.Linear (products are rows × inputs → outputs)")
    title = "Speed of binary layers and of int8 on a CPU, as a multiple of nn.Linear's"
    save(pyplot, figure, path, title, describe(figures["setting"]), axes.get_legend_handles_labels())


def errors(several: list[Times], name: str) -> list[list[float]]:
    """Return how far the ratios at a contestant's quartiles lie below and above those at its medians.

    The quartiles of two turns are extrapolated, and the lower one may not be positive. Then the upper end is left out.
    """
    below, above = [], []
    for times in several:
        low, _, high = times[name]
        middle = ratio(times, LINEAR, name)
        below.append(middle - median(times, LINEAR) / high)
        above.append(median(times, LINEAR) / low - middle if low > 0 else 0.0)
    return [below, above]


def sizes(figures: Figures, path: Path) -> None:
    """Draw the time of a multiply-add against the edge of a cube, above the limits that the same run measured."""
    smallest, *cubes = figures["sizes"]
    pyplot = drawing()
    figure, axes = pyplot.subplots(figsize=(WIDTH, 4.4))
    for name in (LINEAR, PACKED_LAYER, PACKED):
        timed = [r for r in cubes if name in r["seconds_quartiles"]]
        lows, middles, highs = zip(*(picoseconds(r, name) for r in timed), strict=True)
        bars = [[middle - low for low, middle in zip(lows, middles, strict=True)]]
        bars += [[high - middle for middle, high in zip(middles, highs, strict=True)]]
        style = {"marker": "o", "markersize": 4, "capsize": 2, "color": COLOURS[name], "label": LEGEND[name]}
        axes.errorbar([r["n"] for r in timed], middles, bars, **style)
    edges = [r["n"] for r in cubes]
    best = min(picoseconds(r, PACKED)[1] for r in cubes)
    call = 1e12 * median(smallest["seconds_quartiles"], PACKED)
    at_best = f"best rate measured: {1e3 / best:,.0f} G multiply-adds/s"
    axes.axhline(best, linestyle="--", color="black", linewidth=0.8, label=at_best)
    axes.axhspan(
        best, 1.2 * best, color="black", alpha=0.08, linewidth=0, label="up to 20 % above the best rate's time"
    )
    with_call = f"best rate, plus {call / 1e6:.1f} µs a call (the time of {Shape.of(smallest)})"
    axes.plot(edges, [best + call / edge**3 for edge in edges], ":", color="black", linewidth=1.5, label=with_call)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.85 * best)
    axes.set_xticks(edges, [f"{edge} × {edge} → {edge}" for edge in edges])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    axes.set_ylabel("picoseconds a multiply-add")
    axes.set_xlabel("rows × inputs → outputs")
    axes.grid(alpha=0.3)
    title = "Time of one multiply-add on a CPU, by the size of the product"
    handles, labels = axes.get_legend_handles_labels()
    measured = [labels.index(LEGEND[name]) for name in (LINEAR, PACKED_LAYER, PACKED)]
    order = measured + [i for i in range(len(labels)) if i not in measured]
    legend = [handles[i] for i in order], [labels[i] for i in order]
    save(pyplot, figure, path, title, describe(figures["setting"]), legend)


def picoseconds(result: dict[str, Any], name: str) -> list[float]:
    """Return the quartiles of the time of one multiply-add."""
    return [1e12 * seconds / Shape.of(result).multiply_adds for seconds in result["seconds_quartiles"][name]]


def alike(figures: Figures) -> list[dict[str, Any]]:
    """Return the results of the first type and number of threads."""
    first = figures["results"][0]
    return [r for r in figures["results"] if (r["dtype"], r["threads"]) == (first["dtype"], first["threads"])]
