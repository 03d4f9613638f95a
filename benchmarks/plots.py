"""Pictures of the CPU benchmark's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .measuring import describe, median, ratio
from .peers import BITORCH, BNN, INT8, LINEAR, PACKED, QLINEAR

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    LINEAR: "#999999",
    QLINEAR: "#0072B2",
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


def save(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def ratios(figures: dict[str, Any], path: Path) -> None:
    """How many times as fast as nn.Linear, by shape, of the first type and number of threads."""
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
        if name == QLINEAR:
            axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(results)), [f"{r['name']}: {r['m']} × {r['k']} → {r['n']}" for r in results], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("times as fast as nn.Linear")
    axes.legend(fontsize=8)
    axes.set_title(describe(figures["setting"]), fontsize=7)
    save(pyplot, figure, path)


def times(figures: dict[str, Any], path: Path) -> None:
    """Time against size, with the best rate that was measured as the limit."""
    results = sorted(alike(figures), key=lambda r: r["m"] * r["k"] * r["n"])
    pyplot = drawing()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, colour in COLOURS.items():
        points = [
            (r["m"] * r["k"] * r["n"], 1e6 * median(r["seconds_quartiles"], name))
            for r in results
            if name in r["seconds_quartiles"] and r["m"] > 1
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name, color=colour, markersize=4)
    best = max(r["m"] * r["k"] * r["n"] / median(r["seconds_quartiles"], PACKED) for r in results)
    ends = [results[0], results[-1]]
    sizes = [r["m"] * r["k"] * r["n"] for r in ends]
    limit = f"the best rate measured, {best / 1e9:.0f} G multiply-adds/s"
    axes.plot(sizes, [1e6 * size / best for size in sizes], "--", color="black", linewidth=0.8, label=limit)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("multiply-adds (more than one row)")
    axes.set_ylabel("µs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(describe(figures["setting"]), fontsize=7)
    save(pyplot, figure, path)


def alike(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of the first type and number of threads."""
    first = figures["results"][0]
    return [r for r in figures["results"] if (r["dtype"], r["threads"]) == (first["dtype"], first["threads"])]
