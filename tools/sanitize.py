"""Run every CUDA kernel under NVIDIA's compute-sanitizer: ``python -m tools.sanitize``.

Four tools watch one small program each, side by side: memcheck (accesses that are misaligned or outside an allocation),
racecheck (shared memory), synccheck (barriers) and initcheck (reads of memory that was never written). A tool that is
missing or that the machine refuses is reported in a line and is no failure. A tool that runs out of time is reported
with the kernels that it had finished and makes the exit code 124, which means neither clean nor a finding.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bitorch_qlinear import _kernels
from bitorch_qlinear import functional as F
from bitorch_qlinear.kernels import forced

ROOT = Path(__file__).parents[1]
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]
# torch probes CUDA for features that may be missing; such an error is no finding. The operators check their launches.
OPTIONS = {"memcheck": ["--report-api-errors", "no"]}
FOUND = 86  # the exit code of compute-sanitizer for a finding; no other program uses it
REFUSED = "not supported|denied"  # the messages of a tool that the machine refuses
OUT_OF_TIME = 124  # our own exit code, equal to that of the command timeout
RIGHT, ALL_RIGHT = "right: ", "every result is right"  # the lines of the program after each kernel and at its end


# ---- inside ----------------------------------------------------------------------------------------


def selection(multiprocessors: int) -> list[tuple[int, int, int]]:
    """Return shapes at the edges of all tiles: one row, one past a tile, and products that fill the wide tiles."""
    small = [
        (1, 1, 1),
        (1, 257, 1025),
        (3, 70, 129),
        (16, 65, 4097),
        (40, 33, 5000),
        (65, 67, 513),
        (129, 131, 512),
        (7, 9, 0),
    ]
    return small + [(129, width * multiprocessors + 1, 33) for width in (128, 256)]


def check_product(m: int, n: int, k: int, device: torch.device) -> None:
    """Compare all operators at one size with those of the CPU.

    The comparison runs on the CPU, because the tools slow down everything on the GPU.

    Raises:
        AssertionError: A result differs.
    """
    wide, words = torch.randn(m, k + 1), F.pack_bits(torch.randn(n, k))
    bias, scale = torch.randn(n, dtype=torch.float16), torch.randn(n)
    # x is a view whose rows are neither adjacent nor aligned.
    x, gpu_x, gpu_words = wide[:, 1:], wide.to(device)[:, 1:], words.to(device)
    vectors = {"bias": bias.to(device), "scale": scale.to(device)}
    prepared = F.prepare_weight(gpu_words, k)
    want = F.linear_train(x, words, k, bias=bias, scale=scale, threshold=1.0)
    for form, out in itertools.product((prepared, None), (torch.float32, torch.bfloat16)):
        y = F.linear(gpu_x, gpu_words, k, weight_prepared=form, out_dtype=out, **vectors)
        assert torch.equal(y.cpu(), F.linear(x, words, k, bias=bias, scale=scale, out_dtype=out)), (m, n, k, out)
    results = F.linear_train(gpu_x, gpu_words, k, weight_prepared=prepared, threshold=1.0, **vectors)
    assert all(torch.equal(result.cpu(), wanted) for result, wanted in zip(results, want, strict=True)), (m, n, k)
    integers = F.binary_linear(results[1], gpu_words, k, out_dtype=torch.int32)
    assert torch.equal(integers.cpu(), F.binary_linear(want[1], words, k, out_dtype=torch.int32)), (m, n, k)
    values = F.unpack_bits(results[1], k, torch.float16)
    assert torch.equal(values.cpu(), F.unpack_bits(want[1], k, torch.float16)), (m, n, k)


def inside() -> None:
    """Run the program that each tool watches."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    kernels = _kernels.device_cuda_kernels(device)
    shapes = selection(torch.cuda.get_device_properties(device).multi_processor_count)
    for kernel in kernels:
        with forced(kernel):
            for shape in shapes:
                # The skinny kernels take at most 16 rows, except this one.
                if shape[0] <= (64 if kernel == "skinny_mma_sm80" else 16) or "skinny" not in kernel:
                    check_product(*shape, device)
        print(f"{RIGHT}{kernel}", flush=True)
    torch.cuda.synchronize()
    print(ALL_RIGHT)


# ---- outside ---------------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """Return the path of one of CUDA's tools, on PATH or in the toolkit; None if it is missing."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(name) or next(
        (found for home in places if home and (found := shutil.which(f"{home}/bin/{name}"))), None
    )


def verdict(code: int | None, output: str, seconds: float) -> tuple[int, str]:
    """Judge the run of a tool.

    Args:
        code: The exit code of the tool; None if it ran out of time.
        output: Everything that it wrote.
        seconds: Its time limit.

    Returns:
        Our exit code for the run, and the line that reports it.
    """
    lines = output.strip().splitlines() or ["no output"]
    summary = next((line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), "")
    right = ", ".join(line.removeprefix(RIGHT) for line in lines if line.startswith(RIGHT)) or "none"
    if code == FOUND:
        return 1, f"found something: {summary}; right results: {right}"
    if "AssertionError" in output:
        return 1, f"a wrong result: {lines[-1].strip('= ')}; right results: {right}"
    if code is None:
        return OUT_OF_TIME, f"out of time after {seconds:.0f} s; right results: {right}"
    if code == 0 and summary and ALL_RIGHT in output:
        return 0, f"clean: {summary}; right results: {right}"
    if "Traceback" in output and not re.search(REFUSED, output):
        return 1, f"the program failed: {lines[-1].strip('= ')}; right results: {right}"
    refusal = next((line for line in lines if re.search(f"{REFUSED}|Error|error", line)), lines[-1])
    return 0, f"refused or failed by itself (exit code {code}): {refusal.strip('= ')}; right results: {right}"


def run_tools(command: list[str], program: list[str], seconds: float) -> int:
    """Run all tools at once, print a line and the output of each, and return the most serious exit code."""
    # Without torch's cache every tensor is an allocation of its own, whose bounds the tools know.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    end, codes, texts = time.monotonic() + seconds, set(), {}
    with tempfile.TemporaryDirectory() as folder:
        started = {}
        for tool in TOOLS:
            options = ["--tool", tool, "--error-exitcode", str(FOUND), *OPTIONS.get(tool, [])]
            with Path(folder, tool).open("w") as output:  # a pipe would fill up and block the tool
                started[tool] = subprocess.Popen(
                    [*command, *options, *program], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
                )
        for tool, process in started.items():
            ended = wait(process, end - time.monotonic())
            texts[tool] = Path(folder, tool).read_text(errors="replace")
            code, line = verdict(ended, texts[tool], seconds)
            codes.add(code)
            print(f"{tool}: {line}", flush=True)
    for tool, text in texts.items():
        print(f"\n---- {tool} ----\n{text}")
    return min(codes - {0}, default=0)


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Return the exit code of a process; None if it ran out of time and was killed."""
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--inside", action="store_true", help="the program that the tools run")
    parser.add_argument("--seconds", type=float, default=80.0, help="the time limit for all tools together (80)")
    options = parser.parse_args()
    if options.inside:
        inside()
    elif (sanitizer := find_tool("compute-sanitizer")) is None:
        print("compute-sanitizer was not found: nothing was sanitized.")
    else:
        sys.exit(run_tools([sanitizer], [sys.executable, "-m", "tools.sanitize", "--inside"], options.seconds))


if __name__ == "__main__":
    main()
