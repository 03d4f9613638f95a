"""Times whole models on the CPU: ``python -m benchmarks models``.

A model is a chain of four square layers with other modules between them, in three forms: with nn.Linear in float32,
packed by ``pack(model)``, and fused by ``pack(model, fuse=True)``. Before anything is timed, the fused form must give
the packed form's output bit for bit. The forms take turns in one process, and a time is the median of its turns. This
is repeated in several processes, because the placement of memory differs between processes. A ratio is the median of
the processes' ratios.

The peak of the memory that torch allocates in a call is measured too, by torch's profiler. The last layer of these
models has one output, so that nearly all of the memory lies between the layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from bitorch_qlinear import kernels, pack

from .measuring import (
    HERE,
    ROUNDS,
    TURNS,
    Call,
    Figures,
    Times,
    at_least,
    describe,
    median,
    microseconds,
    prepare,
    ratio,
    setting,
    write_json,
)
from .models_process import FLOAT, FUSED, HARDTANH, LAYERS, NAMES, NORM, PACKED, REACT, SCALED, make
from .peers import evaluation

Case = tuple[str, int, list[int]]
"""A variant, the size of a layer, and the batches."""

BATCHES = [1, 16, 256]
CASES: list[Case] = [
    *((HARDTANH, size, BATCHES) for size in (256, 1024, 4096)),
    *((variant, 1024, BATCHES) for variant in (NORM, REACT, SCALED)),
]
QUICK: list[Case] = [(HARDTANH, 1024, BATCHES)]
PROCESSES = 5
MEMORY = {"size": 1024, "batch": 32768}

# How many times as fast as the packed form the fused one must be, by size and batch. No other row has a bound.
LEAST = {
    **{(256, batch): 2.0 for batch in BATCHES},
    (1024, 1): 2.0,
    (1024, 16): 1.65,
    (1024, 256): 1.35,
    (4096, 1): 1.5,
    (4096, 256): 1.15,
}
# AVX2 must reach this share of the bounds.
AVX2_SHARE = 0.95


def time_once(cases: list[Case], rounds: int, kernel: str | None) -> list[list[Times]]:
    """Time all cases in a process of its own, and return the times by case and batch.

    Args:
        cases: The models and their batches.
        rounds: The number of turns of each form.
        kernel: The CPU kernel that the process must take; None lets it choose.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.models_process", str(rounds), json.dumps(cases)]
    environment = os.environ | ({"BITORCH_QLINEAR_CPU_KERNEL": kernel} if kernel else {})
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=HERE.parent, env=environment)
    found: list[list[Times]] = json.loads(said.stdout)
    return found


def peak_bytes(call: Call) -> int:
    """Return the largest number of bytes that torch's allocations in a call held at the same time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    events = sorted((event for event in trace if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in events), initial=0))


def measure_memory(size: int, batch: int) -> Figures:
    """Return the peak of each form's memory in a call, in bytes by name, and what it was measured with."""
    x = torch.randn(batch, size)
    grown = {}
    for name in NAMES:
        model = make(HARDTANH, size, name != FLOAT, outputs=1)
        if name != FLOAT:
            model = pack(model, fuse=name == FUSED)
        call = evaluation(model, x)
        call()  # The first call prepares what later ones share.
        grown[name] = peak_bytes(call)
    return {"size": size, "batch": batch, "bytes": grown}


def measure_times(cases: list[Case], processes: int, rounds: int, kernel: str | None) -> list[Figures]:
    """Time all cases in each of several processes, and return a result for each case and batch.

    Args:
        cases: The models and their batches.
        processes: The number of processes that time, one after another.
        rounds: The number of turns of each form in a process.
        kernel: The CPU kernel; None lets the processes choose.
    """
    runs = [time_once(cases, rounds, kernel) for _ in tqdm(range(processes), leave=False, unit="process")]
    return [
        {"variant": variant, "size": size, "batch": batch, "processes": [run[case][place] for run in runs]}
        for case, (variant, size, batches) in enumerate(cases)
        for place, batch in enumerate(batches)
    ]


def measure(cases: list[Case], processes: int, rounds: int, kernel: str | None = None) -> Figures:
    """Time all cases as :func:`measure_times` does, and measure the memory of each form."""
    results = measure_times(cases, processes, rounds, kernel)
    with kernels.forced(kernel):
        return {"layers": LAYERS, "rounds": rounds, "results": results, "memory": measure_memory(**MEMORY)}


def seconds(result: Figures, name: str) -> float:
    """Return the median over the processes of a form's seconds."""
    return statistics.median(median(times, name) for times in result["processes"])


def ratios(result: Figures, baseline: str, name: str) -> list[float]:
    """Return how many times as fast as the baseline a form is in each process, in ascending order."""
    return sorted(ratio(times, baseline, name) for times in result["processes"])


def least(result: Figures, kernel: str) -> float | None:
    """Return the bound of a case, if it has one."""
    bound = LEAST.get((result["size"], result["batch"])) if result["variant"] == HARDTANH else None
    return bound if bound is None or kernel != "avx2" else AVX2_SHARE * bound


def table(figures: Figures, style: str = "simple") -> str:
    """Return the times and ratios of all cases."""
    rows = []
    for result in figures["results"]:
        gains = ratios(result, PACKED, FUSED)
        gain, bound = statistics.median(gains), least(result, figures["setting"]["kernel"])
        rows.append(
            [
                f"{figures['layers']} × {result['size']}, {result['variant']}",
                str(result["batch"]),
                microseconds(seconds(result, FLOAT)),
                *(f"{statistics.median(ratios(result, FLOAT, name)):.3g}" for name in (PACKED, FUSED)),
                f"{gain:.2f}",
                f"{gains[0]:.2f} to {gains[-1]:.2f}",
                "" if bound is None else f"{bound:.3g}",
                "" if bound is None else "pass" if gain >= bound else "missed",
            ]
        )
    headers = ["model", "batch", f"{FLOAT}, µs", f"{PACKED}, ×", f"{FUSED}, ×", f"{FUSED} against {PACKED}"]
    headers += ["in single processes", "bound", "result"]
    sides = ["left"] + ["right"] * 7 + ["left"]
    text: str = tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=sides)
    return text


def memory_text(figures: Figures) -> str:
    """Return a sentence with the peak memory of each form."""
    sizes = figures["memory"]
    mebibytes = {name: found / 2**20 for name, found in sizes["bytes"].items()}
    return (
        f"While {figures['layers']} layers with {sizes['size']} inputs compute a batch of {sizes['batch']:,} rows, the "
        f"tensors that torch allocates take at most {mebibytes[FLOAT]:.0f} MiB in float32, {mebibytes[PACKED]:.0f} MiB "
        f"packed, and {mebibytes[FUSED]:.1f} MiB fused: 1/{mebibytes[PACKED] / mebibytes[FUSED]:.1f} of packed."
    )


def where_text(figures: Figures) -> str:
    """Return a sentence that says how often, and on what, was measured."""
    count = len(figures["results"][0]["processes"])
    return (
        f"Medians over {count} process{'es' if count != 1 else ''} of {figures['rounds']} turns each: "
        f"{describe(figures['setting'])}. A ratio is the median of the processes' ratios, so it need not be the "
        "quotient of two medians here."
    )


def report(figures: Figures) -> str:
    """Return everything that was measured, as text."""
    return "\n".join([table(figures), memory_text(figures), where_text(figures)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="time one model, in one process")
    parser.add_argument(
        "--processes", type=at_least(1), help=f"how many processes time, one after another ({PROCESSES})"
    )
    parser.add_argument("--rounds", type=TURNS, default=ROUNDS, help=f"the turns of each form ({ROUNDS})")
    parser.add_argument("--kernel", choices=kernels.available(), help="the kernel, instead of the best one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    options = parser.parse_args(argv)
    prepare(1)
    with kernels.forced(options.kernel):
        where = setting()
    processes = options.processes or (1 if options.quick else PROCESSES)
    figures = measure(QUICK if options.quick else CASES, processes, options.rounds, options.kernel)
    figures["setting"] = where
    print(report(figures))
    if options.json:
        write_json(options.json, figures)
