"""Measures the memory of a packed model on the CPU: ``python -m benchmarks memory``.

Each model has a few square layers and lives in a process of its own. Measured are the resident bytes of its weights,
and how far the process grew at most while the model was made and until it had computed a batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .measuring import HERE, at_least, describe, prepare, setting, write_json
from .memory_process import KINDS

SIZES = {"size": 4096, "count": 4, "batch": 64}


def measure(size: int, count: int, batch: int) -> dict[str, Any]:
    """Measure a model of each kind of layer in a process of its own."""
    figures = {}
    for kind in KINDS:
        module = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory_process"]
        command = [*module, kind, str(size), str(count), str(batch)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
        figures[kind] = json.loads(said.stdout)
    return {"size": size, "layers": count, "batch": batch, "bytes": figures}


def table(figures: dict[str, Any], style: str = "simple") -> str:
    """Return the bytes by kind of layer, in MiB."""
    rows = [
        [name, *(f"{measured[key] / 2**20:,.1f}" for key in ("resident", "made", "computed"))]
        for name, measured in figures["bytes"].items()
    ]
    size = figures["size"]
    headers = [
        f"{figures['layers']} layers {size} → {size}, MiB",
        "weights resident",
        "peak after making",
        f"peak after a batch of {figures['batch']}",
    ]
    text: str = tabulate(
        rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=["left"] + ["right"] * 3
    )
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=at_least(1), default=SIZES["size"], help="the width of a layer (%(default)s)")
    parser.add_argument("--layers", type=at_least(1), default=SIZES["count"], help="the number of layers (%(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=SIZES["batch"], help="the rows of the batch (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(argv)
    prepare(1)
    where = setting()
    figures = measure(options.size, options.layers, options.batch) | {"setting": where}
    print(table(figures))
    print(describe(figures["setting"]))
    if options.json:
        write_json(options.json, figures)
