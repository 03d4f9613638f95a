"""Run each CUDA kernel of the GPU for the first time, in a process of its own that is stopped if it hangs.

A kernel that waits for ever would otherwise take the time of all tests and benchmarks behind it. ``make gpu`` starts
nothing else if this fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 20  # of one kernel, of which torch and the device need several until the first launch
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
                got = functional.linear(x.to(device), on_device, k, weight_prepared=prepared).cpu()
                wrong = int((got != want).sum())
                assert wrong == 0, f"{m} x {n} x {k}: {wrong} of {want.numel()} outputs are wrong"


def kernels_of_the_gpu() -> list[str]:
    """Return the names of the kernels that the current GPU has, from a process that may fail instead of this one."""
    code = "import torch, bitorch_qlinear as b; print(*b._kernels.device_cuda_kernels(torch.device('cuda')))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=SECONDS
    ).stdout.split()


def verdict(command: list[str], seconds: float = SECONDS) -> str:
    """Run a command and return "ok", or in one line what went wrong."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"hangs: stopped after {seconds} s"
    lines = [f"exit code {done.returncode}", *done.stdout.strip().splitlines()]
    return "ok" if done.returncode == 0 else lines[-1]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_first", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", help="check this kernel in this process")
    options = parser.parse_args()
    if options.kernel:
        return check(options.kernel)
    names = kernels_of_the_gpu()
    with ThreadPoolExecutor(WORKERS) as pool:
        commands = ([sys.executable, "-m", "tools.gpu_first", "--kernel", name] for name in names)
        verdicts = list(pool.map(verdict, commands))
    for name, said in zip(names, verdicts, strict=True):
        print(f"{name:24} {said}", flush=True)
    if not names or set(verdicts) != {"ok"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
