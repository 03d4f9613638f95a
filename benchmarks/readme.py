"""Writes the README's tables from the figures in ``results/``: ``python -m benchmarks.readme``."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bitorch_qlinear import kernels
from examples.digits import report as demo

from . import cpu, memory, targets, train
from .measuring import RESULTS, ROUNDS, describe, load_shapes, median, named, prepare, ratio, setting, write_json
from .peers import BITORCH, LINEAR, PACKED, PACKED_LAYER, QLINEAR

README = Path(__file__).parents[1] / "README.md"
RUN = "python -m benchmarks train --run --json benchmarks/results/train_run.json"
# The first run is the one that the README shows.
DEMO_SEEDS = range(5)

Figures = dict[str, Any]


# ---- measuring -------------------------------------------------------------------------------------


def measure() -> None:
    """All benchmarks in one process, so that their figures are of one commit, into the files and plots of results/."""
    prepare(1)
    where, start = setting(), time.monotonic()

    inference = cpu.measure(load_shapes(quick=True), ["float32"], [1], ROUNDS)
    inference |= {"sizes": cpu.measure_sizes(ROUNDS), "crossover": cpu.crossovers(), "setting": where}
    print(cpu.report(inference), flush=True)
    training = train.measure(named(train.QUICK), ROUNDS) | {"setting": where}
    print(train.report(training), flush=True)
    resident = memory.measure(**memory.SIZES) | {"setting": where}
    print(memory.table(resident), flush=True)
    reached = targets.measure(targets.known(inference, training, ROUNDS), ROUNDS)
    print(targets.table(reached), flush=True)

    files = {"cpu": inference, "train": training, "memory": resident}
    for name, figures in (files | {"targets": {"targets": reached, "setting": where}}).items():
        write_json(RESULTS / f"{name}.json", figures)
    cpu.draw(inference, RESULTS)
    measure_avx2(where)
    print(f"measured in {time.monotonic() - start:.0f} s")


def measure_avx2(where: Figures) -> None:
    """The targets with the AVX2 kernel where there is a better one; an earlier file goes where there is none."""
    path = RESULTS / "targets_avx2.json"
    path.unlink(missing_ok=True)
    if "avx2" not in kernels.available()[1:]:
        return
    prepare(1)
    with kernels.forced("avx2"):
        figures = targets.measure(targets.needed(ROUNDS), ROUNDS)
    write_json(path, {"targets": figures, "setting": where | {"kernel": "avx2"}})
    print(targets.table(figures), flush=True)


def run_demo() -> None:
    """Run the demo once for each of `DEMO_SEEDS`, and keep the first run and the test accuracies of all."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in DEMO_SEEDS:
            path = Path(folder) / f"{seed}.json"
            command = [sys.executable, "-m", "examples.digits", "--seed", str(seed), "--json", str(path)]
            subprocess.run(command, check=True)
            runs.append(json.loads(path.read_text()))
    accuracies = {name: [run["test_accuracy"][name] for run in runs] for name in runs[0]["test_accuracy"]}
    write_json(RESULTS / "demo.json", runs[0] | {"test_accuracy_by_seed": accuracies})


# ---- tables ----------------------------------------------------------------------------------------


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def comparison(inference: Figures, training: Figures) -> str:
    """The table of what one gets instead of nn.Linear and bitorch."""
    wanted = [
        (inference, "large batch", PACKED_LAYER, "inference, packed"),
        (inference, "one row", PACKED_LAYER, "inference, packed"),
        (inference, "odd sizes", PACKED_LAYER, "inference, packed"),
        (inference, "tiny", PACKED_LAYER, "inference, packed"),
        (inference, "large batch", QLINEAR, "inference, not packed"),
        (inference, "small batch", QLINEAR, "inference, not packed"),
        (training, "large batch", QLINEAR, "training step"),
        (training, "small batch", QLINEAR, "training step"),
    ]
    rows = []
    for figures, name, layer, title in wanted:
        result = next(result for result in figures["results"] if result["name"] == name)
        times = result["seconds_quartiles"]
        theirs = milliseconds(median(times, BITORCH)) if BITORCH in times else "absent"
        rows.append(
            f"| {title}, {result['m']} × {result['k']} → {result['n']} | {milliseconds(median(times, LINEAR))} "
            f"| {theirs} | not timed | {milliseconds(median(times, layer))}, "
            f"**{ratio(times, LINEAR, layer):.3g} ×** nn.Linear's speed |"
        )
    return "\n".join(
        [
            "| | `nn.Linear` | bitorch 0.4.1 | bitorch-engine | bitorch_qlinear |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "| checkpoint of a 4096 × 4096 layer | 64 MiB | 64 MiB | not measured | 2 MiB packed |",
            "| computes a binary layer with | – | float32 | bits | bits |",
            "| sizes | any | any | K divisible by 8 or 128 | any |",
            "| needs | torch | torch | its own build of torch; gcc 9 to 11 | torch 2.10 or later; any C++20 compiler |",
            "",
            "Packed is a PackedQLinear, which `pack(model)` makes; not packed is a QLinear in eval mode, which packs "
            "its weights in every call. Both pack their input inside; float32, with bias; medians of interleaved runs. "
            f"Measured by `make benchmark`: {describe(inference['setting'])}.{absent(inference, training)}",
        ]
    )


def absent(inference: Figures, training: Figures) -> str:
    """A sentence that names the peers that were not timed, if any."""
    names = cpu.absent_text(inference["absent"]) + [
        f"{name} (training): {why}" for name, why in training["absent"].items()
    ]
    return f" Absent, and so not timed: {'; '.join(names)}." if names else ""


def target_table(figures: Figures, avx2: Figures | None) -> str:
    """The targets, and beside what was measured the AVX2 kernel's figures where it is not the best."""
    parts = [targets.table(figures["targets"], "github"), "", f"Measured on {describe(figures['setting'])}."]
    if avx2:
        parts += ["", "With the AVX2 kernel, on the same processor, which has AVX-512:", ""]
        parts += [targets.table(avx2["targets"], "github")]
    return "\n".join(parts)


def smallest_cube(inference: Figures) -> str:
    """Where the time of the smallest cube goes: why its rate is below that of the large ones."""
    smallest, cube, *others = inference["sizes"]
    best = max(cpu.rate(result) for result in (cube, *others))
    took, call = (1e6 * median(result["seconds_quartiles"], PACKED) for result in (cube, smallest))
    product = 1e6 * cpu.multiply_adds(cube) / best
    edge = cube["n"]
    return (
        f"A call costs something at any size, and each output must be written. Of the {took:.1f} µs of {edge}³ "
        f"(packed × packed), {product:.1f} µs are its product at the best rate measured, "
        f"{best / 1e9:,.0f} G multiply-adds/s; {call:.1f} µs are what "
        f"{smallest['m']} × {smallest['k']} → {smallest['n']} takes too; the rest is for outputs of only {edge} "
        "multiply-adds each."
    )


def flatness(inference: Figures) -> str:
    """The cubes' plot and its caption, where they were timed."""
    if not inference.get("sizes"):
        return "The cubes are not timed yet: `make benchmark`."
    timed = [result["n"] for result in inference["sizes"][1:] if LINEAR in result["seconds_quartiles"]]
    return (
        f"{smallest_cube(inference)}\n\n![Time of a multiply-add against size](benchmarks/results/cpu_time.png)\n\n"
        f"nn.Linear is timed up to {max(timed)}³, to keep the run short."
    )


def benchmark_tables(inference: Figures, training: Figures, resident: Figures) -> str:
    """What make benchmark measured, in full."""
    crossover = [cpu.crossover_text(batch, size) for batch, size in inference["crossover"].items()]
    return "\n\n".join(
        [
            cpu.table(inference["results"], "github"),
            "Medians, ± half the distance between the quartiles. QLinear packs its input and its weights in every "
            "call, PackedQLinear its input alone, packed × packed neither. Of square layers, "
            f"{'; '.join(crossover)}.{absent(inference, training)}",
            train.table(training["results"], "github"),
            memory.table(resident, "github"),
        ]
    )


def training_run(figures: Figures | None) -> str:
    """The whole training run, which make benchmark does not repeat."""
    if figures is None:
        return f"Not measured yet: `{RUN}`."
    run = figures["run"]
    return (
        f"{train.run_table(run, 'github')}\n\nFrom the same initial weights, on the same batches, to "
        f"{run['wanted_accuracy']:.0%} of the test images, evaluations included. `{RUN}`: "
        f"{describe(figures['setting'])}."
    )


def demo_output(figures: Figures | None) -> str:
    """Return the demo's own report, and what the binary layers cost in accuracy over several splits of the images.

    One split decides nothing: the networks differ by fewer images than two splits do.
    """
    if figures is None:
        return "Not measured yet: `python -m benchmarks.readme --demo`."
    accuracies = figures["test_accuracy_by_seed"]
    seeds = len(accuracies[demo.BINARY])
    shown = {
        name: f"{statistics.mean(values):.2%} ({min(values):.2%} to {max(values):.2%})"
        for name, values in accuracies.items()
    }
    return (
        f"```text\n{demo.text(figures)}\n```\n\nMean test accuracy over {seeds} splits of the images and initial "
        f"weights (`--seed 0` to `{seeds - 1}`, in brackets the lowest and the highest): binary {shown[demo.BINARY]}, "
        f"float32 {shown[demo.FLOAT]}."
    )


def fill(text: str, block: str, content: str) -> str:
    """Put content between the markers of a block."""
    head, marker, rest = text.partition(f"<!-- {block}: ")
    comment, _, rest = rest.partition("-->\n")
    _, end, tail = rest.partition(f"<!-- /{block} -->")
    if not (marker and end):
        raise ValueError(f"README.md has no block {block!r}")
    return f"{head}{marker}{comment}-->\n\n{content}\n\n{end}{tail}"


def load(name: str) -> Figures | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def blocks() -> dict[str, str]:
    """What belongs between the README's markers."""
    inference, training = load("cpu"), load("train")
    return {
        "comparison": comparison(inference, training),
        "targets": target_table(load("targets"), load("targets_avx2")),
        "cubes": flatness(inference),
        "benchmarks": benchmark_tables(inference, training, load("memory")),
        "training run": training_run(load("train_run")),
        "demo": demo_output(load("demo")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="run the benchmarks first")
    parser.add_argument("--demo", action="store_true", help="run the demo first")
    options = parser.parse_args()
    if options.measure:
        measure()
    if options.demo:
        run_demo()
    text = README.read_text()
    for block, content in blocks().items():
        text = fill(text, block, content)
    README.write_text(text)


if __name__ == "__main__":
    main()
