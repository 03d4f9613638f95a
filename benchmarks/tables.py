"""Writes the tables in README.md and docs/ from the results in ``results/``: ``python -m benchmarks tables``.

A page takes a table between two markers: ``<!-- NAME: written by ... -->`` and ``<!-- /NAME -->``. Nothing is measured
without ``--measure``, ``--demo`` or ``--examples``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

from bitorch_qlinear import kernels
from examples.digits import report as demo

from . import cpu, memory, models, targets, train
from .gpu.plot import plot as plot_gpu
from .gpu.tables import read as read_gpu
from .measuring import (
    HERE,
    RESULTS,
    ROUNDS,
    Figures,
    Shape,
    describe,
    load_shapes,
    median,
    named,
    prepare,
    ratio,
    setting,
    write_json,
)
from .peers import BITORCH, LINEAR, PACKED, PACKED_LAYER, QLINEAR

ROOT = HERE.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "examples.md"]
COMMAND = "python -m benchmarks tables"
RUN = "python -m benchmarks train --run --json benchmarks/results/train_run.json"
# README.md shows the first of these runs.
DEMO_SEEDS = range(5)
# The programs whose output is on a page as they print it.
EXAMPLES = ("transformer", "mixer", "adapter", "serving")


# ---- measuring -------------------------------------------------------------------------------------


def measure() -> None:
    """Run all benchmarks in one process, so that their results are of one commit, and write them and the plots."""
    prepare(1)
    where, start = setting(), time.monotonic()

    inference = cpu.measure(load_shapes(quick=True), ["float32"], [1], ROUNDS)
    inference |= {"sizes": cpu.measure_sizes(ROUNDS), "crossover": cpu.crossovers(), "setting": where}
    print(cpu.report(inference), flush=True)
    training = train.measure(named(train.QUICK), ROUNDS) | {"setting": where}
    print(train.report(training), flush=True)
    resident = memory.measure(**memory.SIZES) | {"setting": where}
    print(memory.table(resident), flush=True)
    reached = targets.measure(targets.collect(inference, training, ROUNDS))
    print(targets.table(reached), flush=True)

    files = {"cpu": inference, "train": training, "memory": resident}
    for name, figures in (files | {"targets": {"targets": reached, "setting": where}}).items():
        write_json(RESULTS / f"{name}.json", figures)
    cpu.draw(inference, RESULTS)
    measure_avx2(where)
    measure_models(where)
    print(f"measured in {time.monotonic() - start:.0f} s")


def measure_avx2(where: Figures) -> None:
    """Measure the targets with the AVX2 kernel too if it is not the best one; otherwise remove an earlier file."""
    path = RESULTS / "targets_avx2.json"
    path.unlink(missing_ok=True)
    if "avx2" not in kernels.available()[1:]:
        return
    prepare(1)
    with kernels.forced("avx2"):
        figures = targets.measure(targets.measure_runs(ROUNDS))
    write_json(path, {"targets": figures, "setting": where | {"kernel": "avx2"}})
    print(targets.table(figures), flush=True)


def measure_models(where: Figures) -> None:
    """Time whole models with the best kernel, and with AVX2 if that is another one."""
    for kernel, name in ((None, "models"), ("avx2", "models_avx2")):
        path = RESULTS / f"{name}.json"
        path.unlink(missing_ok=True)
        if kernel is None or kernel in kernels.available()[1:]:
            figures = models.measure(models.CASES, models.PROCESSES, ROUNDS, kernel)
            figures["setting"] = where | ({"kernel": kernel} if kernel else {})
            write_json(path, figures)
            print(models.report(figures), flush=True)


def draw() -> None:
    """Draw all plots again from the results."""
    if inference := load("cpu"):
        cpu.draw(inference, RESULTS)
    folder = RESULTS / "gpu"
    if (folder / "gpu.json").exists():
        plot_gpu(folder / "gpu.png", read_gpu(folder / "gpu.json"))


def run_demo() -> None:
    """Run the demo once for each of ``DEMO_SEEDS``; keep the first run, and the test accuracies of all runs."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in DEMO_SEEDS:
            path = Path(folder) / f"{seed}.json"
            command = [sys.executable, "-m", "examples.digits", "--seed", str(seed), "--json", str(path)]
            subprocess.run(command, check=True)
            runs.append(json.loads(path.read_text()))
    accuracies = {name: [run["test_accuracy"][name] for run in runs] for name in runs[0]["test_accuracy"]}
    write_json(RESULTS / "demo.json", runs[0] | {"test_accuracy_by_seed": accuracies})


def run_examples() -> None:
    """Run the example programs one after another, and keep what they print."""
    prepare(1)
    where = setting()
    outputs = {}
    for name in EXAMPLES:
        command = [sys.executable, "-W", "ignore", "-m", f"examples.{name}"]
        outputs[name] = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
        print(outputs[name], flush=True)
    write_json(RESULTS / "examples.json", {"outputs": outputs, "setting": where})


# ---- tables ----------------------------------------------------------------------------------------


def milliseconds(seconds: float) -> str:
    """Format a time with three significant digits."""
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def comparison(inference: Figures, training: Figures) -> str:
    """Return the README's table: the times of nn.Linear, bitorch and this package at a few shapes."""
    rows = [
        (inference, "large batch", PACKED_LAYER),
        (inference, "one row", PACKED_LAYER),
        (inference, "odd sizes", PACKED_LAYER),
        (inference, "tiny", PACKED_LAYER),
        (inference, "large batch", QLINEAR),
        (inference, "small batch", QLINEAR),
        (training, "large batch", QLINEAR),
        (training, "small batch", QLINEAR),
    ]
    cells = []
    for figures, name, layer in rows:
        result = next(result for result in figures["results"] if result["name"] == name)
        times = result["seconds_quartiles"]
        cells.append(
            [
                f"`{layer}`, {'inference' if figures is inference else 'training step'}",
                str(Shape.of(result)),
                milliseconds(median(times, LINEAR)),
                milliseconds(median(times, BITORCH)) if BITORCH in times else "absent",
                milliseconds(median(times, layer)),
                f"**{gain:.3g}**" if (gain := ratio(times, LINEAR, layer)) > 1 else f"{gain:.3g}",
            ]
        )
    where = inference["setting"]
    bitorch = f"bitorch {where['bitorch']}" if "bitorch" in where else "bitorch"
    headers = ["layer", "rows × inputs → outputs", "time of `nn.Linear`", f"time of {bitorch}", "our time"]
    return (
        f"{markdown(cells, [*headers, 'times as fast as `nn.Linear`'], words=2)}\n\n"
        "Times are medians for one call, in float32 and with a bias. `PackedQLinear`, which `pack(model)` makes, packs "
        "its input in every call; `QLinear` packs its weights, too. A training step is a forward and all gradients. "
        f"Measured by `make benchmark`: {describe(where)}.{absent(inference, training)}"
    )


def markdown(rows: list[list[str]], headers: list[str], words: int = 1) -> str:
    """Format a Markdown table whose first columns are words and the others numbers."""
    sides = ["left"] * words + ["right"] * (len(headers) - words)
    text: str = tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=sides)
    return text


def absent(inference: Figures, training: Figures) -> str:
    """Return a sentence that lists the peers that were not timed, if there are any."""
    names = cpu.absent_text(inference["absent"]) + [
        f"{name} (training): {why}" for name, why in training["absent"].items()
    ]
    return f" Absent, and so not timed: {'; '.join(names)}." if names else ""


def target_table(figures: Figures) -> str:
    """Return the targets with their ratios, bounds and results."""
    return f"{targets.table(figures['targets'], 'pipe')}\n\nMeasured on {describe(figures['setting'])}."


def avx2_table(figures: Figures | None) -> str:
    """Return the targets with the AVX2 kernel, if it was measured beside a better one."""
    return target_table(figures) if figures else "AVX2 is the best kernel of the machine above, or it has no AVX2."


def smallest_cube(inference: Figures) -> str:
    """Say why the rate of the smallest cube is below that of the large ones."""
    smallest, cube, *others = inference["sizes"]
    best = max(cpu.rate(result) for result in (cube, *others))
    took, call = (1e6 * median(result["seconds_quartiles"], PACKED) for result in (cube, smallest))
    product = 1e6 * Shape.of(cube).multiply_adds / best
    edge = cube["n"]
    return (
        f"A call has a fixed cost, and each output must be written. {edge} × {edge} → {edge} takes {took:.1f} µs "
        f"(packed × packed). At the best rate measured, {best / 1e9:,.0f} G multiply-adds/s, the product alone would "
        f"take {product:.1f} µs. {Shape.of(smallest)}, with hardly any arithmetic, takes {call:.1f} µs. The rest is "
        f"spent on outputs that are sums of only {edge} products each."
    )


def flatness(inference: Figures) -> str:
    """Say where the time of small products goes, if the cubes were timed."""
    if not inference.get("sizes"):
        return "The cubes are not timed yet: `make benchmark`."
    timed = [result["n"] for result in inference["sizes"][1:] if LINEAR in result["seconds_quartiles"]]
    edge = max(timed)
    return (
        f"{smallest_cube(inference)} `nn.Linear` is timed up to {edge} × {edge} → {edge} only, to keep the run short."
    )


def inference_table(inference: Figures) -> str:
    """Return the times of all shapes, and the sizes from which PackedQLinear is faster than nn.Linear."""
    crossover = [cpu.crossover_text(batch, size) for batch, size in inference["crossover"].items()]
    return (
        f"{cpu.table(inference['results'], 'pipe')}\n\n"
        f"For square layers, {'; '.join(crossover)}. Measured on {describe(inference['setting'])}."
        f"{absent(inference, {'absent': {}})}"
    )


MODELS_MISSING = "Not measured yet: `python -m benchmarks models --json benchmarks/results/models.json`."


def models_table(figures: Figures | None) -> str:
    """Return the times of all whole models, and the memory between their layers."""
    if figures is None:
        return MODELS_MISSING
    return f"{models.table(figures, 'pipe')}\n\n{models.memory_text(figures)} {models.where_text(figures)}"


def models_avx2_table(figures: Figures | None) -> str:
    """Return the times of all whole models with AVX2, if it was measured beside a better kernel."""
    if figures is None:
        return "AVX2 is the best kernel of the machine above, or it has no AVX2."
    return f"{models.table(figures, 'pipe')}\n\n{models.where_text(figures)}"


def models_summary(figures: Figures | None) -> str:
    """Return the README's table of whole models: the usual modules between the layers, one row and many."""
    if figures is None:
        return MODELS_MISSING
    rows = []
    for result in figures["results"]:
        if result["variant"] == models.HARDTANH and result["batch"] in (1, 256):
            gain = statistics.median(models.ratios(result, models.FLOAT, models.FUSED))
            rows.append(
                [
                    f"{figures['layers']} × {result['size']}",
                    str(result["batch"]),
                    *(milliseconds(models.seconds(result, name)) for name in models.NAMES),
                    f"**{gain:.3g}**" if gain > 1 else f"{gain:.3g}",
                ]
            )
    headers = ["whole model", "batch", "`nn.Linear`", "`pack(model)`", "`pack(model, fuse=True)`"]
    return (
        f"{markdown(rows, [*headers, 'fused, times as fast as `nn.Linear`'])}\n\n"
        f"Square layers with {models.HARDTANH.replace(', ', ' and ')} between them. {models.where_text(figures)}"
    )


def training_run(figures: Figures | None) -> str:
    """Return both training runs, which make benchmark does not repeat."""
    if figures is None:
        return f"Not measured yet: `{RUN}`."
    run = figures["run"]
    return (
        f"{train.run_table(run, 'pipe')}\n\nBoth runs have the same initial weights and batches and end at "
        f"{run['wanted_accuracy']:.0%} of the test images; the time includes an evaluation after each epoch. "
        f"Measured by `{RUN}`: {describe(figures['setting'])}."
    )


DEMO_MISSING = f"Not measured yet: `{COMMAND} --demo`."


def demo_accuracy(figures: Figures | None) -> str:
    """Return what the binary layers cost in accuracy over several splits of the images.

    One split decides nothing: the networks differ by fewer images than two splits do.
    """
    if figures is None:
        return DEMO_MISSING
    accuracies = figures["test_accuracy_by_seed"]
    rows = [
        [demo.TRAINED[name], *(f"{value:.2%}" for value in (statistics.mean(values), min(values), max(values)))]
        for name, values in ((name, accuracies[name]) for name in demo.TRAINED)
    ]
    seeds = len(accuracies[demo.BINARY])
    return (
        f"{markdown(rows, ['hidden layers', 'mean test accuracy', 'lowest', 'highest'])}\n\n"
        f"{seeds} splits of the images and initial weights (`--seed 0` to `{seeds - 1}`)."
    )


def demo_output(figures: Figures | None) -> str:
    """Return the demo's own report."""
    return DEMO_MISSING if figures is None else f"```text\n{demo.text(figures)}\n```"


EXAMPLES_MISSING = f"Not run yet: `{COMMAND} --examples`."


def examples_setting(figures: Figures | None) -> str:
    """Return a sentence that says where the examples ran."""
    return f"The outputs on this page are from {describe(figures['setting'])}." if figures else EXAMPLES_MISSING


def example_output(figures: Figures | None, name: str) -> str:
    """Return what an example printed, without the wide table of `explain`."""
    if figures is None:
        return EXAMPLES_MISSING
    paragraphs = figures["outputs"][name].strip().split("\n\n")
    shown = [paragraph for paragraph in paragraphs if "computed by" not in paragraph.partition("\n")[0]]
    return "```text\n{}\n```".format("\n\n".join(shown))


def fill(text: str, contents: dict[str, str]) -> str:
    """Replace what is between the markers of a page.

    Args:
        text: The page, with any of the blocks.
        contents: The new content by the name of the block.

    Raises:
        ValueError: A block is unknown, or its second marker is missing.
    """

    def replaced(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in contents:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(contents)}")
        return f"<!-- {name}: written by `{COMMAND}` -->\n\n{contents[name]}\n\n<!-- /{name} -->"

    opening = r"<!-- (?P<name>[^:\n]+): written by [^\n]*? -->"
    filled = re.sub(rf"{opening}\n.*?<!-- /(?P=name) -->", replaced, text, flags=re.DOTALL)
    starts, ends = re.findall(opening, filled), re.findall(r"<!-- /([^\n]+?) -->", filled)
    if unclosed := [name for name in starts if name not in ends]:
        raise ValueError(f"no end of the table {unclosed[0]!r}: <!-- /{unclosed[0]} --> is missing")
    return filled


def load(name: str) -> Figures | None:
    """Read a file of results, if it exists."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def blocks() -> dict[str, str]:
    """Return the content of each table by its name."""
    inference, training, resident = load("cpu"), load("train"), load("memory")
    return {
        "comparison": comparison(inference, training),
        "targets": target_table(load("targets")),
        "targets avx2": avx2_table(load("targets_avx2")),
        "cubes": flatness(inference),
        "inference": inference_table(inference),
        "training steps": train.table(training["results"], "pipe"),
        "memory": memory.table(resident, "pipe"),
        "training run": training_run(load("train_run")),
        "models": models_table(load("models")),
        "models avx2": models_avx2_table(load("models_avx2")),
        "models summary": models_summary(load("models")),
        "demo accuracy": demo_accuracy(load("demo")),
        "demo": demo_output(load("demo")),
        "examples setting": examples_setting(load("examples")),
        **{f"example {name}": example_output(load("examples"), name) for name in EXAMPLES},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="run the benchmarks first")
    parser.add_argument("--demo", action="store_true", help="run the demo first")
    parser.add_argument("--examples", action="store_true", help="run the other examples first")
    parser.add_argument("--plots", action="store_true", help="draw the plots from the results, too")
    options = parser.parse_args(argv)
    if options.measure:
        measure()
    if options.demo:
        run_demo()
    if options.examples:
        run_examples()
    if options.plots:
        draw()
    contents = blocks()
    for page in PAGES:
        page.write_text(fill(page.read_text(), contents))


if __name__ == "__main__":
    main()
