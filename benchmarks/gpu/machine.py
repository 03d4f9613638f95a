"""The machine that a run was measured on: versions, clocks, and the rates of its parts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import torch

from bitorch_qlinear import _library
from examples.digits.costs import environment

from .contestants import random_rows
from .measurements import reason
from .rates import rates_of_the_gpu
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


def gpu_setting(timer: GraphTimer) -> dict[str, Any]:
    """Describe the machine. Its rates are measured, and shown, before anything else is done on it."""
    rates = rates_of_the_gpu()
    for name, text in rates.items():
        print(f"{name}: {text}", file=sys.stderr, flush=True)
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
        **rates,
        "clocks_idle": nvidia_smi(),
        "clocks_at_work": clocks_at_work(),
    }
