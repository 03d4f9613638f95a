"""The questions that Python asks the compiled libraries: which kernels exist and compute, and how a form is laid out.

:mod:`bitorch_qlinear.kernels` is the public part of it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ._library import cpu_library, cuda_library, no_cuda_reason

# ---- CPU kernels ----------------------------------------------------------------------------------------------------


def available_kernels() -> list[str]:
    """Return the names of the CPU kernels that this processor can run, best first."""
    return str(cpu_library.bitorch_qlinear_kernels().decode()).split(", ")


def active_kernel() -> str:
    """Return the name of the CPU kernel that computes."""
    return str(cpu_library.bitorch_qlinear_kernel().decode())


def active_kernel_reason() -> str:
    """Return the reason why this CPU kernel computes, in words."""
    return str(cpu_library.bitorch_qlinear_kernel_reason().decode())


def force_kernel(name: str | None) -> None:
    """Make one CPU kernel compute in the whole process; for tests and benchmarks.

    Weights that were prepared for another kernel are then prepared again in each call; a packed layer prepares its own
    weights once more, after its next eager call.

    Args:
        name: One of :func:`available_kernels`, or None for the automatic choice.

    Raises:
        RuntimeError: The processor cannot run the kernel, or no kernel has that name. Nothing has changed then.
    """
    global _least_sign_outputs
    error = cpu_library.bitorch_qlinear_force_kernel((name or "").encode()).decode()
    if error:
        raise RuntimeError(error)
    _least_sign_outputs = cpu_library.bitorch_qlinear_least_sign_outputs()


# torch.compile can read a plain number; it cannot call the library.
_least_sign_outputs: int = cpu_library.bitorch_qlinear_least_sign_outputs()


def least_sign_outputs() -> int:
    """Return the smallest number of outputs for which the active kernel's ``multiply_signs`` beats the BLAS.

    The number holds for float32, and half as many summed values suffice. For the other dtypes see
    `_sign_gemm.beats_blas`.
    """
    return _least_sign_outputs


# ---- prepared forms -------------------------------------------------------------------------------------------------


class PreparedLayout(NamedTuple):
    """The prepared form of the active CPU kernel.

    Attributes:
        panel: Outputs in a panel.
        unit: Values of K in a unit.
        unit_bytes: Bytes that a panel takes for a unit.
        number: The layout number in the form's header.
    """

    panel: int
    unit: int
    unit_bytes: int
    number: int


CUDA_LAYOUT: int = cpu_library.bitorch_qlinear_cuda_layout()
"""The layout number of CUDA's prepared form, which all CUDA kernels read."""


def prepared_layout() -> PreparedLayout:
    """Return the layout of the active CPU kernel's prepared form."""
    layout = (ctypes.c_int64 * 4)()
    cpu_library.bitorch_qlinear_layout(layout)
    return PreparedLayout(*layout)


def prepared_bytes(device_type: str, n: int, k: int) -> int:
    """Return the size of the prepared form of n rows of k values, in bytes.

    Args:
        device_type: "cuda" for CUDA's form; all other types mean that of the active CPU kernel.
        n: Rows of the weight.
        k: Values in a row.
    """
    return int(cpu_library.bitorch_qlinear_prepared_bytes(device_type == "cuda", n, k))


# ---- CUDA kernels ---------------------------------------------------------------------------------------------------

CUDA_KERNELS = (
    *("popc", "skinny", "skinny_mma_sm80", "mma_sm75", "mma_sm80", "mma_int8_sm80"),
    *("wgmma_sm90a", "fused_skinny", "fused_skinny_mma_sm80", "fused_cluster_sm90"),
)
"""Names of all CUDA kernels, which a build without CUDA operators has nowhere else. A test compares them with csrc."""


def cuda_code(index: int) -> int:
    """Return the compute capability that the code of a device was compiled for, such as 80 for 8.0.

    It is lower than the device's if the device runs code of an earlier one. It is 0 if CUDA does not tell it, or if
    there are no CUDA operators.
    """
    return 0 if cuda_library is None else int(cuda_library.bitorch_qlinear_cuda_code(index))


def available_cuda_kernels(capability: tuple[int, int], code: int = 0) -> list[str]:
    """Return the names of the CUDA kernels that a compute capability can run; none without CUDA operators.

    Args:
        capability: The device's compute capability.
        code: What :func:`cuda_code` returns; 0 stands for code of that capability.
    """
    if cuda_library is None:
        return []
    names = str(cuda_library.bitorch_qlinear_cuda_kernels(10 * capability[0] + capability[1], code).decode())
    return names.split(", ") if names else []


def device_cuda_kernels(device: torch.device) -> list[str]:
    """Return the names of the CUDA kernels that a device of this machine can run."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return available_cuda_kernels(torch.cuda.get_device_capability(device), cuda_code(index))


def cuda_choice(
    capability: tuple[int, int],
    multiprocessors: int,
    m: int,
    n: int,
    k: int,
    value_bytes: int = 0,
    code: int = 0,
    float64: bool = False,
) -> str:
    """Return which CUDA kernel computes a product on such a device and why, or what is wrong, in words.

    ``value_bytes`` is the size of a value of x, or 0 if x is packed. ``code`` is that of
    :func:`available_cuda_kernels`. ``float64`` says whether the result is float64.

    Raises:
        RuntimeError: This installation has no CUDA operators.
    """
    if cuda_library is None:
        raise RuntimeError(f"bitorch_qlinear has no CUDA kernels here: {no_cuda_reason}.")
    number = 10 * capability[0] + capability[1]
    choice = cuda_library.bitorch_qlinear_cuda_choice(number, code, multiprocessors, m, n, k, value_bytes, float64)
    return str(choice.decode())


def forced_cuda_kernel() -> str:
    """Return the name of the forced CUDA kernel, or "" if the sizes of each product choose the kernel."""
    return "" if cuda_library is None else str(cuda_library.bitorch_qlinear_cuda_kernel().decode())


def force_cuda_kernel(name: str | None) -> None:
    """Make one CUDA kernel compute all products that it can, in the whole process; for tests and benchmarks.

    All CUDA kernels read one prepared form, so prepared weights stay valid.

    Args:
        name: One of :func:`available_cuda_kernels`, or None for the automatic choice. On a device that lacks the
            kernel, products raise RuntimeError.

    Raises:
        RuntimeError: This installation has no CUDA operators, or no kernel has that name. Nothing has changed then.
    """
    if cuda_library is None:
        raise RuntimeError(f"bitorch_qlinear has no CUDA kernels here: {no_cuda_reason}.")
    error = cuda_library.bitorch_qlinear_cuda_force_kernel((name or "").encode()).decode()
    if error:
        raise RuntimeError(error)


def forced_cuda_tile() -> str:
    """Return the name of the forced tile, or "" if the sizes of each product choose it."""
    return "" if cuda_library is None else str(cuda_library.bitorch_qlinear_cuda_tile().decode())


def force_cuda_tile(name: str | None) -> None:
    """Make kernels compute all products with one tile, in the whole process; for tests and benchmarks.

    Args:
        name: The rows and columns of y: "128x256" or "64x64" for ``mma_sm80``, "128x192" for ``wgmma_sm90a``, "128x128"
            for both, or None for the automatic choice. A kernel that lacks the tile keeps the automatic choice.

    Raises:
        RuntimeError: This installation has no CUDA operators, or no tile has that name. Nothing has changed then.
    """
    if cuda_library is None:
        raise RuntimeError(f"bitorch_qlinear has no CUDA kernels here: {no_cuda_reason}.")
    error = cuda_library.bitorch_qlinear_cuda_force_tile((name or "").encode()).decode()
    if error:
        raise RuntimeError(error)


@contextlib.contextmanager
def forced_tile(name: str | None) -> Iterator[None]:
    """Make the CUDA kernels compute with one tile inside a ``with`` block, as :func:`force_cuda_tile` does.

    None changes nothing.
    """
    if name is None:
        yield
        return
    before = forced_cuda_tile()
    force_cuda_tile(name)
    try:
        yield
    finally:
        force_cuda_tile(before)
