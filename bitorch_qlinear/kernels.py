"""Which kernels compute, and how to make one of them compute everything: for tests, measurements and comparisons.

Every kernel computes the same bits; only the time differs. Without a choice of yours the CPU kernel is the best one
that the processor can run, and the CUDA kernel is chosen by the device and the sizes of each product. The environment's
``BITORCH_QLINEAR_CPU_KERNEL`` and ``BITORCH_QLINEAR_CUDA_KERNEL`` choose for a whole process, :func:`forced` for a
while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import _kernels, _library

__all__ = ["active", "available", "forced"]


def available() -> list[str]:
    """List the CPU kernels that this processor can run.

    Returns:
        Their names, best first; the last is "scalar", which every processor can run.
    """
    return _kernels.available_kernels()


def active() -> str:
    """Name the CPU kernel that computes.

    Returns:
        One of :func:`available`.
    """
    return _kernels.active_kernel()


@contextlib.contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Make one kernel compute inside a ``with`` block, and restore the former choice at its end.

    A CPU kernel computes everything on the CPU, and a CUDA kernel computes all products on CUDA devices that it takes:
    the skinny ones take at most 16 rows. One block of each can be nested, and a block inside another wins. The choice
    is the whole process's: do not force kernels in several threads at once.

    A prepared weight (:func:`bitorch_qlinear.functional.prepare_weight`) belongs to the CPU kernel that was active when
    it was made, and with another one the operators prepare anew in each call; the CUDA kernels share one form.

    Args:
        name: One of :func:`available`, a CUDA kernel, or None to leave everything as it is.

    Yields:
        Nothing.

    Raises:
        ValueError: There is no such kernel, this processor cannot run it, or it is a CUDA kernel and there are no CUDA
            operators. Nothing has changed then. (A CUDA device that lacks a forced kernel raises RuntimeError at the
            first product.)
    """
    if name is None:
        yield
    elif name in available():
        before = active()
        _kernels.force_kernel(name)
        try:
            yield
        finally:
            _kernels.force_kernel(before)
    elif name in _kernels.CUDA_KERNELS and _library.has_cuda:
        before = _kernels.forced_cuda_kernel()
        _kernels.force_cuda_kernel(name)
        try:
            yield
        finally:
            _kernels.force_cuda_kernel(before)
    else:
        raise ValueError(_refusal(name))


def _refusal(name: object) -> str:
    choices = f"a CPU kernel that this processor can run ({', '.join(available())})"
    if _library.has_cuda:
        choices += f" or a CUDA kernel ({', '.join(_kernels.CUDA_KERNELS)})"
    elif name in _kernels.CUDA_KERNELS:
        return (
            f"name: expected {choices}, got {name!r}, a CUDA kernel; there are no CUDA operators here: "
            f"{_library.no_cuda_reason}"
        )
    return f"name: expected {choices}, got {name!r}"
