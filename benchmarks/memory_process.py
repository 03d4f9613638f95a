"""Measures the memory of one model in a process of its own, which ``benchmarks.memory`` starts for each kind of layer.

``python -m benchmarks.memory_process KIND SIZE COUNT BATCH`` prints the bytes as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from bitorch_qlinear import PackedQLinear, QLinear
from examples.digits.costs import resident_bytes

KINDS = {"float32 nn.Linear": nn.Linear, "QLinear (eval)": QLinear, "PackedQLinear": PackedQLinear}


def peak() -> int:
    """Return the largest number of resident bytes that this process has had since it started.

    (getrusage's number is not used, because it begins at the peak of the process that started this one.)
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measure(kind: str, size: int, count: int, batch: int) -> dict[str, int]:
    """Make a model of ``count`` square layers, compute a batch, and return the bytes of its weights and the growth."""
    torch.set_num_threads(1)
    layer = KINDS[kind]
    x = torch.randn(batch, size)
    with torch.inference_mode():
        QLinear(64, 64).eval()(torch.randn(1, 64))  # The first call loads and allocates what later ones share.
    before = peak()
    model = nn.Sequential(*[layer(size, size) for _ in range(count)]).eval()
    made = peak()
    with torch.inference_mode():
        for _ in range(3):
            model(x)
    return {"resident": resident_bytes(model), "made": made - before, "computed": peak() - before}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
