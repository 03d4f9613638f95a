"""What this installation is made of and which kernel runs here."""

from __future__ import annotations

import torch

from . import _C, _library
from ._version import __version__

__all__ = ["info"]


def info() -> dict[str, str | list[str]]:
    """Describe the installation: versions, compiler, CUDA targets, processor, and the active kernel with its reason.

    Returns:
        ``version``, ``compiler``, ``torch_built`` and ``torch_running``, ``cuda`` (what the CUDA operators were
        compiled for, or why there are none), ``cuda_devices`` (each with the kernels that it can run, and which of
        them computes some products and why), ``cuda_kernel`` (the forced one, or that each product's sizes choose),
        ``cpu_capability``, ``kernels`` (those that this processor can run, best first), ``kernel`` (the active one)
        and ``kernel_reason``.
    """
    build = _library.build_info
    return {
        "version": __version__,
        "compiler": build["compiler"],
        "torch_built": build["torch"],
        "torch_running": torch.__version__,
        "cuda": _library.no_cuda_reason or build["cuda_targets"],
        "cuda_devices": _cuda_devices(),
        "cuda_kernel": (_library.forced_cuda_kernel() or "chosen by each product's sizes")
        if _library.has_cuda
        else "none",
        "cpu_capability": _C.cpu_capability(),
        "kernels": _library.available_kernels(),
        "kernel": _library.active_kernel(),
        "kernel_reason": _library.active_kernel_reason(),
    }


def _cuda_devices() -> list[str]:
    if not _library.has_cuda:
        return []
    return [_cuda_device(index) for index in range(torch.cuda.device_count())]


def _cuda_device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    kernels = ", ".join(_library.available_cuda_kernels(capability))
    device = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    if not kernels:
        return f"{device}: no kernel, 7.5 or later is needed"
    choices = "; ".join(
        f"{rows} × 4096 → 4096: " + _library.cuda_choice(capability, properties.multi_processor_count, rows, 4096, 4096)
        for rows in (1, 16, 4096)
    )
    return f"{device}: {kernels}; {choices}"
