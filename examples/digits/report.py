"""The results of a run as text and as a plot. Both need no more than the dictionary that ``--json`` writes."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .costs import BATCHES, FLOAT32, FUSED, PACKED, QLINEAR, Costs
from .model import Training, require

__all__ = ["BINARY", "FLOAT", "collect", "plot", "text"]

BINARY, FLOAT = "binary", "float32"
"""The two networks that are trained. The costs have the binary one three times: as trained, packed, and fused."""

TRAINED = {FLOAT: "nn.Linear and ReLU, float32", BINARY: "QLinear, binary"}

# These are Okabe and Ito's colours, which colour-blind readers can tell apart.
GREY, ORANGE, BLUE, GREEN = "#999999", "#E69F00", "#0072B2", "#009E73"
COLOURS = {FLOAT32: GREY, QLINEAR: ORANGE, PACKED: BLUE, FUSED: GREEN}
FUSED_NOTE = (
    " FusedSequential\n"
    "is the model of pack(model, fuse=True): its layers hand each other words, and limits on counts replace the\n"
    "BatchNorms between them. (These limits, about 20 bytes for each hidden output, are not in the sizes above.)"
)
PARTS = {"layer": "one hidden layer", "model": "the whole model"}

Results = dict[str, Any]


def collect(
    settings: dict[str, int],
    training: dict[str, Training],
    test_images: int,
    costs: Costs,
    environment: dict[str, str | int],
) -> Results:
    """Return all results as one dictionary, which JSON can hold.

    Args:
        settings: What the command line chose.
        training: The training of the `BINARY` and of the `FLOAT` network.
        test_images: Number of images behind each test accuracy.
        costs: Bytes and latencies by model.
        environment: The machine and the versions.
    """
    return {
        "environment": environment,
        "settings": settings,
        "training": {name: run._asdict() for name, run in training.items()},
        "test_accuracy": {name: run.test_accuracy[-1] for name, run in training.items()},
        "test_images": test_images,
        "identical_predictions": True,  # pack_and_check and export_and_check raise otherwise
        "models": costs,
    }


# ---- text ----


def tabulate(rows: list[list[str]], headers: list[str]) -> str:
    """Lay out a table whose first column is aligned left and whose others are aligned right."""
    table: str = require("tabulate", "tabulate").tabulate(
        rows, headers=headers, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
    )
    return table


def training_table(results: Results) -> str:
    """Return a table of both networks' test accuracy and the median time of an epoch."""
    images = results["test_images"]
    rows = [
        [
            TRAINED[name],
            f"{results['test_accuracy'][name]:.2%}",
            f"{round(images * results['test_accuracy'][name])} of {images}",
            f"{statistics.median(results['training'][name]['epoch_seconds']):.2g} s",
        ]
        for name in TRAINED
    ]
    return tabulate(rows, ["hidden layers", "test accuracy", "recognized", "median epoch"])


def cost_table(costs: Costs, columns: dict[str, str], unit: float) -> str:
    """Return a table with a row for each model and, in brackets, float32's cost divided by the model's; "-" if unknown.

    Args:
        costs: The costs of all models.
        columns: The header of each cost that is shown, by the cost's name.
        unit: Bytes or seconds in one unit of the table.
    """

    def cell(model: str, metric: str) -> str:
        if metric not in costs[model]:
            return "-"
        value, reference = costs[model][metric], costs[FLOAT32][metric]
        shown = f"{value / unit:,.0f}" if value >= 10 * unit else f"{value / unit:.1f}"
        return shown if model == FLOAT32 else f"{shown} ({reference / value:.3g}×)"

    rows = [[model, *(cell(model, metric) for metric in columns)] for model in costs]
    return tabulate(rows, ["", *columns.values()])


def machine(environment: dict[str, Any]) -> str:
    """Return one line about the machine and the versions."""
    threads = environment["threads"]
    return (
        f"{environment['processor']}, {environment['cpu_capability']}; kernel: {environment['kernel']}; "
        f"device: {environment['device']}; threads: {threads}; torch {environment['torch']}"
    )


def text(results: Results) -> str:
    """Return the three tables and the line about the machine."""
    costs, epochs, images = results["models"], results["settings"]["epochs"], results["test_images"]
    sizes = {
        f"{kind}_{part}_bytes": f"{title}\n{name}\n[kB]"
        for kind, title in (("checkpoint", "on disk"), ("resident", "in memory"))
        for part, name in (("hidden", "hidden layers"), ("model", "whole model"))
    }
    latencies = {
        f"latency_{part}_batch{batch}_s": f"{name}\nbatch {batch}\n[µs]"
        for part, name in (("layer", "one hidden layer"), ("model", "whole model"))
        for batch in BATCHES
    }
    paragraphs = [
        f"Accuracy after {epochs} epochs from the same initial weights, on the same batches\n"
        f"(one test image is {1 / images:.2%}, and another --seed keeps other images for the test)",
        training_table(results),
        "Size of the weights, as a checkpoint on disk and in memory (1 kB is 1000 bytes; in brackets: how many times\n"
        "smaller than float32)",
        cost_table(costs, sizes, 1e3),
        "Median time of one hidden layer and of the whole model (in brackets: times as fast as float32). QLinear\n"
        "packs its weights in every call, PackedQLinear has them packed." + FUSED_NOTE * (FUSED in costs),
        cost_table(costs, latencies, 1e-6),
        machine(results["environment"]),
    ]
    return "\n\n".join(paragraphs)


# ---- plot ----


def plot(path: Path, results: Results) -> None:
    """Draw the training of both networks and the latencies of all models into a PNG.

    Its fonts are chosen for the 830 pixels that a README is wide; it has twice as many for sharp screens.
    """
    require("matplotlib", "matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot", "matplotlib")
    with pyplot.rc_context({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(8.3, 5.2), layout="constrained")
        heading, above, below = figure.subfigures(3, 1, height_ratios=[0.5, 2.2, 2.5])
        heading.text(
            0.01, 0.55, "A binary classifier of handwritten digits and its float32 twin", size=12, weight="bold"
        )
        heading.text(0.01, 0.15, machine(results["environment"]), size=7, color="#555555")
        plot_training(above, results["training"])
        plot_latencies(below, results["models"])
        figure.savefig(path, format="png", dpi=200)
        pyplot.close(figure)


def plot_training(figure: Any, training: dict[str, Any]) -> None:
    """Draw loss and test accuracy against the epoch, on axes of their own because their scales differ."""
    left, right = figure.subplots(1, 2, sharex=True)
    opaque = {"framealpha": 1, "edgecolor": "none"}  # no grid line crosses the legends
    for name, colour in ((FLOAT, GREY), (BINARY, ORANGE)):
        run = training[name]
        epochs = range(1, len(run["loss"]) + 1)
        percent = [100 * value for value in run["test_accuracy"]]
        left.plot(epochs, run["loss"], "o-", color=colour, markersize=3, label=TRAINED[name])
        label = f"{name}: {percent[-1]:.2f} % in the end"
        right.plot(epochs, percent, "o-", color=colour, markersize=3, label=label)
    left.set_title("Training loss (cross entropy)")
    left.legend(**opaque)
    right.set_title("Test accuracy [%]")
    right.legend(**opaque, loc="lower right")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)


def plot_latencies(figure: Any, costs: Costs) -> None:
    """Draw bars from zero; each pair of part and batch has an axis of its own, so that lengths compare as times do."""
    grid = figure.subplots(len(PARTS), len(BATCHES), sharey="row")
    for row, (part, title) in zip(grid, PARTS.items(), strict=True):
        for axes, batch in zip(row, BATCHES, strict=True):
            metric = f"latency_{part}_batch{batch}_s"
            values = {model: 1e3 * costs[model][metric] for model in costs if metric in costs[model]}
            bars = axes.barh(list(values), list(values.values()), color=[COLOURS[model] for model in values])
            labels = [latency_label(value, values[FLOAT32]) for value in values.values()]
            axes.bar_label(bars, labels, padding=4)
            axes.set_title(f"Median time of {title}, batch {batch}")
            axes.set_xlim(0, 2 * max(values.values()))  # the labels need room
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_visible(False)  # each bar is labelled with its time
            axes.spines["bottom"].set_visible(False)
        row[0].invert_yaxis()  # shared by all axes of the row: float32 is on top


def latency_label(milliseconds: float, reference: float) -> str:
    """Return a bar's time and how many times as fast as float32 it is."""
    shown = f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{1e3 * milliseconds:.3g} µs"
    return shown if milliseconds == reference else f"{shown}, {reference / milliseconds:.3g} times as fast"
