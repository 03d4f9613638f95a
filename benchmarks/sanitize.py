"""Runs every CUDA kernel under NVIDIA's compute-sanitizer: ``python -m benchmarks.sanitize``.

Four runs of one small program, side by side: memcheck (accesses outside of an allocation or misaligned), racecheck
(shared memory), synccheck (barriers) and initcheck (reads of what nobody wrote). A tool that is missing or that the
machine refuses is reported in a line and is no failure. One that runs out of time is reported with the kernels that it
had been through, and makes the exit code 124: neither clean nor a finding.
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
# torch asks CUDA for what it may lack, and goes on: no finding. Our launches are checked where they are made.
OPTIONS = {"memcheck": ["--report-api-errors", "no"]}
FOUND = 86  # compute-sanitizer's exit code where it found something: nobody else's
REFUSED = "not supported|denied"  # what a tool says that the machine does not let work
OUT_OF_TIME = 124  # ours, as the command timeout has it
RIGHT, ALL_RIGHT = "right: ", "every result is right"  # what the program says after a kernel, and at its end


# ---- inside ----------------------------------------------------------------------------------------


def selection(multiprocessors: int) -> list[tuple[int, int, int]]:
    """Edges of all tiles: one row, one past a tile, and products wide enough for the wide tiles."""
    small = [(1, 1, 1), (1, 257, 1025), (3, 70, 129), (16, 65, 4097), (65, 67, 513), (129, 131, 512), (7, 9, 0)]
    return small + [(129, width * multiprocessors + 1, 33) for width in (128, 256)]


def check_product(m: int, n: int, k: int, device: torch.device) -> None:
    """All operators at one size, against the CPU's kernel; compared on the CPU, because the tools slow everything down.

    Raises:
        AssertionError: They differ.
    """
    wide, words = torch.randn(m, k + 1), F.pack_bits(torch.randn(n, k))
    bias, scale = torch.randn(n, dtype=torch.float16), torch.randn(n)
    x, gpu_x, gpu_words = wide[:, 1:], wide.to(device)[:, 1:], words.to(device)  # rows apart, aligned nowhere
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
    """The program that runs under a tool."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    kernels = _kernels.available_cuda_kernels(torch.cuda.get_device_capability(device))
    shapes = selection(torch.cuda.get_device_properties(device).multi_processor_count)
    for kernel in kernels:
        with forced(kernel):
            for shape in shapes:
                if shape[0] <= 16 or not kernel.startswith("skinny"):  # which takes no more rows
                    check_product(*shape, device)
        print(f"{RIGHT}{kernel}", flush=True)
    torch.cuda.synchronize()
    print(ALL_RIGHT)


# ---- outside ---------------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """One of CUDA's tools, on PATH or in the toolkit."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(name) or next(
        (found for home in places if home and (found := shutil.which(f"{home}/bin/{name}"))), None
    )


def verdict(code: int | None, output: str, seconds: float) -> tuple[int, str]:
    """The exit code that a tool's run deserves, and what to say of it.

    Args:
        code: The tool's own, None where it was stopped for its time.
        output: All that it wrote.
        seconds: That it had.
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
    """Run all tools at once, print a line and the whole output of each; the exit code of all: a finding counts most."""
    # Without torch's own cache every tensor is an allocation, whose ends the tools know.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    end, codes, texts = time.monotonic() + seconds, set(), {}
    with tempfile.TemporaryDirectory() as folder:
        started = {}
        for tool in TOOLS:
            options = ["--tool", tool, "--error-exitcode", str(FOUND), *OPTIONS.get(tool, [])]
            with Path(folder, tool).open("w") as output:  # a pipe would fill up, and hold its tool back
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
    """A process's exit code, or None if it was killed for its time."""
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--inside", action="store_true", help="the program that the tools run")
    parser.add_argument("--seconds", type=float, default=80.0, help="for all tools (80)")
    options = parser.parse_args()
    if options.inside:
        inside()
    elif (sanitizer := find_tool("compute-sanitizer")) is None:
        print("compute-sanitizer is not there: nothing was sanitized.")
    else:
        sys.exit(run_tools([sanitizer], [sys.executable, "-m", "benchmarks.sanitize", "--inside"], options.seconds))


if __name__ == "__main__":
    main()
