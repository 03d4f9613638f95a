"""The benchmarks: ``python -m benchmarks NAME``; each has a ``--help`` of its own."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "cpu": ("benchmarks.cpu", "inference on the CPU against nn.Linear, bitorch, bnn-lab and int8"),
    "train": ("benchmarks.train", "training steps and saved bytes, and a whole run"),
    "memory": ("benchmarks.memory", "resident weights and peaks of a packed model"),
    "targets": ("benchmarks.targets", "what the CPU path aims at, and what it reaches"),
    "gpu": ("benchmarks.gpu", "the CUDA kernels against cuBLAS"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        lines = [f"  {each:10} {what}" for each, (_, what) in COMMANDS.items()]
        print("\n".join(["usage: python -m benchmarks NAME [options]", "", *lines]))
        raise SystemExit(0 if name in ("-h", "--help") else 2)
    importlib.import_module(COMMANDS[name][0]).main(sys.argv[2:])


if __name__ == "__main__":
    main()
