"""Writes the README's tables from the figures in ``results/``: ``python -m benchmarks.readme``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bitorch_qlinear import _library, demo

from . import cpu, memory, targets, train
from .measuring import RESULTS, describe, median, ratio

README = Path(__file__).parents[1] / "README.md"


def measure(every: list[list[str]]) -> None:
    """Run modules of Python."""
    for command in every:
        print("$ python -m", *command, flush=True)
        subprocess.run([sys.executable, "-m", *command], check=True)


def commands() -> list[list[str]]:
    """What is measured; the AVX2 kernel on its own where there is a better one."""
    files = {name: str(RESULTS / f"{name}.json") for name in ("cpu", "train", "memory", "targets", "targets_avx2")}
    every = [
        ["benchmarks", "cpu", "--quick", "--json", files["cpu"], "--plots", str(RESULTS)],
        ["benchmarks", "train", "--quick", "--rounds", "7", "--json", files["train"]],
        ["benchmarks", "memory", "--json", files["memory"]],
        ["benchmarks", "targets", "--json", files["targets"]],
    ]
    if "avx2" in _library.available_kernels()[1:]:
        every.append(["benchmarks", "targets", "--kernel", "avx2", "--json", files["targets_avx2"]])
    return every


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def comparison(inference: dict, training: dict) -> str:
    """The table of what one gets instead of nn.Linear and bitorch."""
    wanted = [
        (inference, "large batch", "inference"),
        (inference, "one row", "inference"),
        (inference, "odd sizes", "inference"),
        (inference, "tiny", "inference"),
        (training, "large batch", "training step"),
        (training, "small batch", "training step"),
    ]
    rows = []
    for figures, name, title in wanted:
        result = next(result for result in figures["results"] if result["name"] == name)
        times = result["seconds_quartiles"]
        rows.append(
            f"| {title}, {result['m']} × {result['k']} → {result['n']} | {milliseconds(median(times, 'nn.Linear'))} "
            f"| {milliseconds(median(times, 'bitorch QLinear'))} | not timed "
            f"| {milliseconds(median(times, 'QLinear'))}, "
            f"**{ratio(times, 'nn.Linear', 'QLinear'):.3g} ×** nn.Linear's speed |"
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
            f"Measured by `make benchmark`: {describe(inference['setting'])}; float32 input packed inside, with bias; "
            "medians of interleaved runs.",
        ]
    )


def target_table(figures: dict, avx2: dict | None) -> str:
    """The targets, and beside what was measured the AVX2 kernel's figures where it is not the best."""
    parts = [targets.table(figures["targets"], "github"), "", f"Measured on {describe(figures['setting'])}."]
    if avx2:
        parts += ["", "With the AVX2 kernel, on the same processor, which has AVX-512:", ""]
        parts += [targets.table(avx2["targets"], "github")]
    return "\n".join(parts)


def benchmark_tables(inference: dict, training: dict, resident: dict) -> str:
    """What make benchmark measured, in full."""
    crossover = [
        f"faster than nn.Linear at batch {batch} from K = N = {size} on"
        for batch, size in inference["crossover"].items()
        if size
    ]
    return "\n\n".join(
        [
            cpu.table(inference["results"], "github"),
            f"QLinear packs its input inside, packed × packed leaves that out. QLinear is {', '.join(crossover)}.",
            train.table(training["results"], "github"),
            memory.table(resident, "github"),
        ]
    )


def demo_output(figures: dict) -> str:
    """The demo's own report."""
    accuracy, seconds = figures["test_accuracy"], figures["training"]["seconds"]
    report = demo.report(figures["models"], figures["environment"])
    return f"```text\ntest accuracy {accuracy:.2%} after {seconds:.0f} s of training\n\n{report}\n```"


def fill(text: str, block: str, content: str) -> str:
    """Put content between the markers of a block."""
    head, marker, rest = text.partition(f"<!-- {block}: ")
    comment, _, rest = rest.partition("-->\n")
    _, end, tail = rest.partition(f"<!-- /{block} -->")
    if not (marker and end):
        raise ValueError(f"README.md has no block {block!r}")
    return f"{head}{marker}{comment}-->\n\n{content}\n\n{end}{tail}"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def blocks() -> dict[str, str]:
    """What belongs between the README's markers."""
    avx2 = load("targets_avx2") if (RESULTS / "targets_avx2.json").exists() else None
    return {
        "comparison": comparison(load("cpu"), load("train")),
        "targets": target_table(load("targets"), avx2),
        "benchmarks": benchmark_tables(load("cpu"), load("train"), load("memory")),
        "demo": demo_output(load("demo")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="run the benchmarks first")
    parser.add_argument("--demo", action="store_true", help="run the demo first")
    options = parser.parse_args()
    if options.measure:
        measure(commands())
    if options.demo:
        measure([["bitorch_qlinear.demo", "--json", str(RESULTS / "demo.json")]])
    text = README.read_text()
    for block, content in blocks().items():
        text = fill(text, block, content)
    README.write_text(text)


if __name__ == "__main__":
    main()
