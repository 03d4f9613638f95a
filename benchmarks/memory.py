"""Measures the memory of a packed model on the CPU: ``python -m benchmarks memory``.

Each model, of a few square layers, lives in a process of its own: resident bytes of its weights, and how far the
process grew, at most, while it was made and while it computed a batch.
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

KINDS = {"float32 nn.Linear": "Linear", "QLinear (eval)": "QLinear", "PackedQLinear": "PackedQLinear"}
SIZES = {"size": 4096, "count": 4, "batch": 64}
# Peaks are of the process: what was resident before is taken away. Not getrusage's, which begins at the peak of the
# process that started this one.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
from torch import nn
import bitorch_qlinear
from examples.digits.costs import resident_bytes
torch.set_num_threads(1)
kind, size, count, batch = sys.argv[1], *map(int, sys.argv[2:])
layer = getattr(bitorch_qlinear, kind, nn.Linear)
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
x = torch.randn(batch, size)
with torch.inference_mode():
    bitorch_qlinear.QLinear(64, 64).eval()(torch.randn(1, 64))  # what is loaded or allocated once
before = peak()
model = nn.Sequential(*[layer(size, size) for _ in range(count)]).eval()
made = peak()
with torch.inference_mode():
    for _ in range(3):
        model(x)
print(json.dumps({"resident": resident_bytes(model), "made": made - before, "computed": peak() - before}))
"""


def measure(size: int, count: int, batch: int) -> dict[str, Any]:
    """Bytes by kind of layer."""
    figures = {}
    for name, kind in KINDS.items():
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, kind, str(size), str(count), str(batch)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
        figures[name] = json.loads(said.stdout)
    return {"size": size, "layers": count, "batch": batch, "bytes": figures}


def table(figures: dict[str, Any], style: str = "simple") -> str:
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
    parser.add_argument("--size", type=at_least(1), default=SIZES["size"], help="width of a layer (%(default)s)")
    parser.add_argument("--layers", type=at_least(1), default=SIZES["count"], help="how many (%(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=SIZES["batch"], help="rows (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(argv)
    prepare(1)
    where = setting()
    figures = measure(options.size, options.layers, options.batch) | {"setting": where}
    print(table(figures))
    print(describe(figures["setting"]))
    if options.json:
        write_json(options.json, figures)
