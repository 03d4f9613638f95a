"""``python -m benchmarks gpu``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from bitorch_qlinear import _library

from . import __doc__ as description
from .machine import gpu_setting, nvidia_smi
from .measurements import Results, measure
from .plot import plot
from .shapes import LARGE, SHAPES
from .tables import as_json, report, write
from .timing import GraphTimer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write gpu.json, gpu.md and gpu.png there")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")
    parser.add_argument("--seconds", type=float, default=110.0, help="start no measurement later than this (110)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks gpu: there is no NVIDIA GPU that this torch can use.")
    if not _library.has_cuda:
        raise SystemExit(f"benchmarks gpu: there are no CUDA operators: {_library.no_cuda_reason}.")
    start = time.monotonic()
    torch.manual_seed(0)
    timer = GraphTimer()
    setting = gpu_setting(timer)

    def keep(figures: Results) -> None:
        if options.results:
            write(options.results, figures)
        print(f"{len(figures.compared)} of {len(SHAPES)} products", file=sys.stderr, flush=True)

    left = options.seconds - (time.monotonic() - start)
    figures = measure(SHAPES, LARGE.k, torch.device("cuda"), timer, setting["l2_bytes"], setting, left, keep)
    setting["clocks_after"] = nvidia_smi()
    print(as_json(figures) if options.json else report(figures), flush=True)
    if options.results:
        write(options.results, figures)
        try:
            plot(options.results / "gpu.png", figures)
        except ImportError as error:
            print(f"no plot: {error}")
    if figures.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
