"""Pictures of the CPU benchmark's figures."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from .measuring import describe, median, ratio
from .peers import BITORCH, BNN, INT8, LINEAR, PACKED, PACKED_LAYER, QLINEAR

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    LINEAR: "#999999",
    QLINEAR: "#E69F00",
    PACKED_LAYER: "#0072B2",
    PACKED: "#56B4E9",
    BITORCH: "#D55E00",
    BNN: "#009E73",
    INT8: "#CC79A7",
}


def drawing() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(pyplot: Any, figure: Any, path: Path, where: dict[str, Any]) -> None:
    """Save a picture with its setting above and the legend below, where they hide nothing."""
    figure.suptitle(textwrap.fill(describe(where), 140), fontsize=8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def ratios(figures: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast as nn.Linear each contestant is, for the first type and number of threads."""
    results = alike(figures)
    pyplot = drawing()
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.5 * len(results)), layout="constrained")
    names = [name for name in COLOURS if name != LINEAR and any(name in r["seconds_quartiles"] for r in results)]
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        rows = [(row, r["seconds_quartiles"]) for row, r in enumerate(results) if name in r["seconds_quartiles"]]
        places = [row + height * (i - (len(names) - 1) / 2) for row, _ in rows]
        values = [ratio(times, LINEAR, name) for _, times in rows]
        bars = axes.barh(places, values, height, label=name, color=COLOURS[name])
        if name in (QLINEAR, PACKED_LAYER):
            axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(results)), [f"{r['name']}: {r['m']} × {r['k']} → {r['n']}" for r in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("times as fast as nn.Linear")
    save(pyplot, figure, path, figures["setting"])


def sizes(figures: dict[str, Any], path: Path) -> None:
    """Draw the time of a multiply-add against the edge of a cube, above the limits that the same run measured."""
    smallest, *cubes = figures["sizes"]
    pyplot = drawing()
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for name in (LINEAR, PACKED_LAYER, PACKED):
        timed = [r for r in cubes if name in r["seconds_quartiles"]]
        places = [r["n"] for r in timed]
        axes.plot(places, [picoseconds(r, name) for r in timed], "o-", label=name, color=COLOURS[name], markersize=4)
    edges = [r["n"] for r in cubes]
    best = min(picoseconds(r, PACKED) for r in cubes)
    call = 1e12 * median(smallest["seconds_quartiles"], PACKED)
    at_best = f"the best rate, {1e3 / best:,.0f} G multiply-adds/s"
    axes.axhline(best, linestyle="--", color="black", linewidth=0.8, label=at_best)
    axes.axhspan(best, 1.2 * best, color="black", alpha=0.08, label="within 20 % of it")
    shape = f"{smallest['m']} × {smallest['k']} → {smallest['n']}"
    with_call = f"and what a packed call of {shape} takes, {call / 1e6:.1f} µs"
    axes.plot(edges, [best + call / edge**3 for edge in edges], ":", color="black", linewidth=1.5, label=with_call)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=best / 2)
    axes.set_xticks(edges, [f"{edge}³" for edge in edges])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("time of a multiply-add, ps")
    axes.grid(alpha=0.3)
    save(pyplot, figure, path, figures["setting"])


def picoseconds(result: dict[str, Any], name: str) -> float:
    """The time of one multiply-add."""
    multiply_adds: int = result["m"] * result["k"] * result["n"]
    return 1e12 * median(result["seconds_quartiles"], name) / multiply_adds


def alike(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of the first type and number of threads."""
    first = figures["results"][0]
    return [r for r in figures["results"] if (r["dtype"], r["threads"]) == (first["dtype"], first["threads"])]
