"""Run each CUDA kernel of the GPU for the first time, in a process of its own that is stopped if it hangs.

A kernel that waits for ever would otherwise take the time of all tests and benchmarks behind it. The exit code is 124
if a kernel hangs, after which ``make gpu`` starts nothing else, and 1 if one fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .gpu_run import OUT_OF_TIME

ROOT = Path(__file__).parents[1]
SECONDS = 18  # of one kernel, of which torch and the device need several until the first launch
MOST_ROWS = {"skinny": 16, "skinny_mma_sm80": 64}
MOST_ROWS |= {"fused_skinny": 4, "fused_skinny_mma_sm80": 16, "fused_cluster_sm90": 16}
WORKERS = 5  # fewer would take longer, and more would share the device with a kernel that hangs


def products(kernel: str) -> list[tuple[int, int, int]]:
    """Return rows, outputs and values in a row: one tile, an edge in each direction, many stages and many tiles."""
    most = MOST_ROWS.get(kernel, 700)
    return [(1, 40, 64), (most, 300, 1024), (most, 129, 8160), (most, 2500, 4096)]


def check(kernel: str) -> None:
    """Compare a kernel with the CPU's in its first products.

    Raises:
        AssertionError: A result differs, or the kernel is not the one that computes.
    """
    import torch

    from bitorch_qlinear import _kernels, functional, kernels

    device = torch.device("cuda", 0)
    torch.zeros(1, device=device).item()
    print("torch is imported, and the device works", flush=True)
    capability, code = torch.cuda.get_device_capability(device), _kernels.cuda_code(0)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    fused = kernel.startswith("fused")
    generator = torch.Generator().manual_seed(0)
    for m, n, k in products(kernel):
        x = torch.randn(m, k, generator=generator).bfloat16()
        words = functional.pack_bits(torch.randn(n, k, generator=generator))
        want = functional.linear(x, words, k)
        with kernels.forced(kernel):
            chosen = _kernels.cuda_choice(capability, multiprocessors, m, n, k, x.itemsize * fused, code)
            assert chosen.split()[0].rstrip(":") == kernel, f"{m} x {n} x {k} is computed by {chosen}"
            on_device = words.to(device)
            form = functional.prepare_weight(on_device, k)
            for prepared in (None, form):
                print(f"{m} x {n} x {k} {'without' if prepared is None else 'with'} a form", flush=True)
                got = functional.linear(x.to(device), on_device, k, weight_prepared=prepared).cpu()
                wrong = int((got != want).sum())
                assert wrong == 0, f"{m} x {n} x {k}: {wrong} of {want.numel()} outputs are wrong"


def kernels_of_the_gpu() -> list[str]:
    """Return the names of the kernels that the current GPU has, from a process that may fail instead of this one."""
    code = "import torch, bitorch_qlinear as b; print(*b._kernels.device_cuda_kernels(torch.device('cuda')))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=SECONDS
    ).stdout.split()


class Verdict(NamedTuple):
    """What a process said about a kernel.

    Attributes:
        text: "ok", or in one line what went wrong.
        output: All that the process printed.
        hangs: Whether it had to be stopped.
    """

    text: str
    output: str
    hangs: bool = False


def verdict(command: list[str], seconds: float = SECONDS) -> Verdict:
    """Run a command and return what became of it."""
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        last = (output.strip().splitlines() or ["nothing was printed"])[-1]
        return Verdict(f"hangs: stopped after {seconds:g} s, at: {last}", output, hangs=True)
    output = done.stdout.decode(errors="replace")
    lines = [f"exit code {done.returncode}", *output.strip().splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return Verdict("ok" if done.returncode == 0 else (errors or lines)[-1], output)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_first", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", help="check this kernel in this process")
    options = parser.parse_args()
    if options.kernel:
        return check(options.kernel)
    names, verdicts = kernels_of_the_gpu(), []
    commands = ([sys.executable, "-m", "tools.gpu_first", "--kernel", name] for name in names)
    with ThreadPoolExecutor(WORKERS) as pool:
        for name, said in zip(names, pool.map(verdict, commands), strict=True):
            print(f"{name:24} {said.text}", flush=True)
            verdicts.append(said)
    for name, said in zip(names, verdicts, strict=True):
        if said.text != "ok":
            print(f"\n{name} printed:\n{said.output}", flush=True)
    if any(said.hangs for said in verdicts):
        raise SystemExit(OUT_OF_TIME)
    if not names:
        raise SystemExit("the GPU has no kernel: it needs compute capability 7.5 or later")
    if any(said.text != "ok" for said in verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
