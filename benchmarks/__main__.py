"""The benchmarks: ``python -m benchmarks NAME``. Each has a ``--help`` of its own."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "cpu": ("benchmarks.cpu", "time inference on the CPU against nn.Linear, bitorch, bnn-lab and int8"),
    "train": ("benchmarks.train", "time training steps and count saved bytes, or time a whole training run"),
    "memory": ("benchmarks.memory", "measure the resident weights and the peak memory of a packed model"),
    "models": ("benchmarks.models", "time whole models in float32, packed and fused, and measure their activations"),
    "targets": ("benchmarks.targets", "measure the targets of the CPU path and say which ones are met"),
    "check": ("benchmarks.check", "compare the committed results with a fresh run"),
    "tables": ("benchmarks.tables", "write the tables in README.md and docs/ from the committed results"),
    "gpu": ("benchmarks.gpu.__main__", "time the CUDA kernels against cuBLAS"),
    "gpu-model": ("tools.gpu_model", "estimate how fast the CUDA kernels can be, without a GPU"),
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
