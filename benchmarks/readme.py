"""Writes the README's tables from the figures in ``results/``: ``python -m benchmarks.readme [--measure]``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bitorch_qlinear import demo

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"


def measure() -> None:
    """Run benchmark and demo, one thread and torch's default."""
    for module, name in (("benchmarks", "linear"), ("bitorch_qlinear.demo", "demo")):
        subprocess.run([sys.executable, "-m", module, "--json", RESULTS / f"{name}.json"], check=True)


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def comparison(figures: dict) -> str:
    """The table of what one gets instead of nn.Linear and bitorch."""
    wanted = [
        ("large batch", "eval", "inference"),
        ("one row", "eval", "inference"),
        ("odd sizes", "eval", "inference"),
        ("tiny", "eval", "inference"),
        ("large batch", "training step", "training step"),
        ("small batch", "training step", "training step"),
    ]
    by_name = {result["name"]: result for result in figures["results"]}
    rows = []
    for name, mode, title in wanted:
        result = by_name[name]
        median = {layer: quartiles[1] for layer, quartiles in result["seconds_quartiles"][mode].items()}
        ratio = median["nn.Linear"] / median["QLinear"]
        rows.append(
            f"| {title}, {result['m']} × {result['k']} → {result['n']} | {milliseconds(median['nn.Linear'])} "
            f"| {milliseconds(median['bitorch QLinear'])} | not timed "
            f"| {milliseconds(median['QLinear'])}, **{ratio:.3g} ×** nn.Linear's speed |"
        )
    setting = figures["setting"]
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
            f"Measured on {setting['date'][:10]} by `python -m benchmarks`: {setting['processor']}, capability "
            f"{setting['cpu_capability']}, kernel {setting['kernel']}, {setting['threads']} thread, torch "
            f"{setting['torch']}; float32 input packed inside, with bias; medians of interleaved runs.",
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="run benchmark and demo first")
    if parser.parse_args().measure:
        measure()
    text = README.read_text()
    text = fill(text, "comparison", comparison(json.loads((RESULTS / "linear.json").read_text())))
    text = fill(text, "demo", demo_output(json.loads((RESULTS / "demo.json").read_text())))
    README.write_text(text)


if __name__ == "__main__":
    main()
