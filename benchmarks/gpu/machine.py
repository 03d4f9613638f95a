"""The machine that a run was measured on: versions, clocks, and the rate of the tensor cores' instruction for bits."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitorch_qlinear import _library
from examples.digits.costs import environment
from tools.sanitize import find_tool

from .contestants import random_rows
from .measurements import reason
from .tables import shown
from .timing import GraphTimer, quartiles

SMI_FIELDS = "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"


def nvidia_smi() -> str:
    """Return the clocks and the temperature that nvidia-smi reads. No setting is changed."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is missing"
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer: {reason(error)}"
    return " | ".join((said.stdout or said.stderr).strip().splitlines())


def clocks_at_work() -> str:
    """Return what nvidia-smi reads while matrix products run."""
    a, b = (random_rows(8192, 8192, torch.device("cuda")) for _ in range(2))
    for _ in range(1000):  # They keep an H100 busy for about a second and a half.
        torch.mm(a, b)
    read = nvidia_smi()
    torch.cuda.synchronize()
    return read


RATE = Path(__file__).with_name("rates.cu")


def rate_of_the_instruction(capability: tuple[int, int], multiprocessors: int, out: Tensor) -> str:
    """Measure how many operations a second the tensor cores' instruction for bits does alone, and return it as text.

    Args:
        capability: The device's compute capability.
        multiprocessors: The number of its multiprocessors.
        out: Memory for the results: 1024 int32 for each multiprocessor.
    """
    if not (8, 0) <= capability <= (9, 0):
        return f"{capability[0]}.{capability[1]} has no such instruction"
    with tempfile.TemporaryDirectory() as folder:
        target, library = "sm_{}{}".format(*capability), f"{folder}/rate.so"
        command = [
            find_tool("nvcc") or "nvcc",
            "-O3",
            "-std=c++17",
            f"-arch={target}",
            "-shared",
            "-Xcompiler",
            "-fPIC",
        ]
        try:
            subprocess.run([*command, "-o", library, str(RATE)], check=True, capture_output=True, timeout=60)
            function = ctypes.CDLL(library).bmma_rate
        except (OSError, subprocess.SubprocessError) as error:
            return f"not measured: {reason(error)}"
    function.restype = ctypes.c_double
    rate = function(ctypes.c_int(multiprocessors), ctypes.c_void_p(out.data_ptr()))
    return f"{shown(rate / 1e12)} TOPS" if rate else "not measured: CUDA reports an error"


def gpu_setting(timer: GraphTimer) -> dict[str, Any]:
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    kernel = environment(device) | {"kernel": "by each product's sizes"}
    one = torch.ones(1, device=device)
    return {
        **kernel,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "built_for": _library.build_info["cuda_targets"],
        "graph_of_one_element_us": round(1e6 * quartiles(timer([lambda: one + one], True))[1], 2),
        "bits_instruction_alone": rate_of_the_instruction(
            (properties.major, properties.minor),
            properties.multi_processor_count,
            torch.empty(1024 * properties.multi_processor_count, dtype=torch.int32, device=device),
        ),
        "clocks_idle": nvidia_smi(),
        "clocks_at_work": clocks_at_work(),
    }
