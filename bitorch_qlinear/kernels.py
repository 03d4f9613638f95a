"""The kernels that can compute here, the one that does, and a way to force another, for tests and measurements.

Every kernel computes the same bits; only the time differs. By default the CPU kernel is the best one that the processor
can run, and the CUDA kernel is chosen by the device and the sizes of each product. The environment variables
``BITORCH_QLINEAR_CPU_KERNEL`` and ``BITORCH_QLINEAR_CUDA_KERNEL`` force a kernel for a whole process, and
:func:`forced` forces one inside a block. ``BITORCH_QLINEAR_CUDA_TILE`` (128x256, 128x192, 128x128 or 64x64) forces the
tile of the CUDA kernels ``mma_sm80`` and ``wgmma_sm90a``, if they have it, and ``BITORCH_QLINEAR_CUDA_EARLY_START=0``
makes every product wait for the launch before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from . import _kernels, _library

__all__ = ["active", "available", "forced"]


def available() -> list[str]:
    """Return the names of the CPU kernels that this processor can run.

    Returns:
        The names, best first; the last is "scalar", which every processor can run.
    """
    return _kernels.available_kernels()


def active() -> str:
    """Return the name of the CPU kernel that computes, one of :func:`available`."""
    return _kernels.active_kernel()


@contextlib.contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Make one kernel compute inside a ``with`` block, and restore the former choice at its end.

    A CPU kernel computes everything on the CPU. A CUDA kernel computes all products on CUDA devices that it can
    compute: ``skinny`` takes at most 16 rows, ``skinny_mma_sm80`` 64, and the fused kernels few values of real x, which
    they pack themselves. Blocks can be nested; for each of CPU and CUDA the innermost counts. The choice holds for the
    whole process, so do not force kernels in several threads at once.

    A prepared weight (:func:`bitorch_qlinear.functional.prepare_weight`) belongs to the CPU kernel that was active when
    it was made; with another CPU kernel the operators prepare the weight in each call. The CUDA kernels share one form.

    Args:
        name: One of :func:`available`, a CUDA kernel, or None to change nothing.

    Yields:
        Nothing.

    Raises:
        ValueError: No kernel has this name, this processor cannot run it, or it is a CUDA kernel and this installation
            has no CUDA operators. Nothing has changed then. (On a CUDA device that lacks the forced kernel, the first
            product raises RuntimeError.)
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
