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
        compiled for, or that they are not in), ``cpu_capability``, ``kernels`` (those that this processor can run,
        best first), ``kernel`` (the active one) and ``kernel_reason``.
    """
    build = _library.build_info
    return {
        "version": __version__,
        "compiler": build["compiler"],
        "torch_built": build["torch"],
        "torch_running": torch.__version__,
        "cuda": build["cuda_targets"] or "not built in",
        "cpu_capability": _C.cpu_capability(),
        "kernels": _library.available_kernels(),
        "kernel": _library.active_kernel(),
        "kernel_reason": _library.active_kernel_reason(),
    }
