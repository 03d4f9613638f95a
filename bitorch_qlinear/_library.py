"""Loads the compiled parts and checks that they belong to this Python code; the switch between CPU kernels."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ._version import __version__

_REMEDY = "run `make build` in a checkout, or `pip install --no-build-isolation --force-reinstall --no-deps .`"
_OPERATORS = Path(__file__).with_name("_ops_cpu.so")

generation = 0
"""How often the active kernel changed: weights prepared before the last change belong to another kernel."""


def _check_version(part: str, version: str) -> None:
    if version != __version__:
        raise ImportError(
            f"bitorch_qlinear {__version__} found its {part} built for version {version}: a stale build; {_REMEDY}."
        )


def _load_operators() -> ctypes.CDLL:
    """Register the operators with torch and return a handle to the plain C functions beside them."""
    if not _OPERATORS.exists():
        raise ImportError(f"bitorch_qlinear's operators are not built ({_OPERATORS.name} is missing): {_REMEDY}.")
    try:
        torch.ops.load_library(_OPERATORS)
        library = ctypes.CDLL(str(_OPERATORS))
    except OSError as error:
        raise ImportError(
            f"bitorch_qlinear's operators cannot be loaded by torch {torch.__version__} (2.10 or later is needed): "
            f"{error}; {_REMEDY}."
        ) from error
    for name in ("version", "kernels", "kernel", "kernel_reason", "force_kernel"):
        getattr(library, f"bitorch_qlinear_{name}").restype = ctypes.c_char_p
    library.bitorch_qlinear_force_kernel.argtypes = [ctypes.c_char_p]
    _check_version("operators", library.bitorch_qlinear_version().decode())
    return library


def _load_module_info() -> dict[str, str]:
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"bitorch_qlinear._C is not built for this Python ({error}): {_REMEDY}.") from error
    build: dict[str, str] = _C.build_info()
    _check_version("module _C", build["version"])
    return build


build_info = _load_module_info()
_library = _load_operators()


def available_kernels() -> list[str]:
    """Names of the CPU kernels that this processor can run, best first."""
    return str(_library.bitorch_qlinear_kernels().decode()).split(", ")


def active_kernel() -> str:
    """Name of the CPU kernel that runs."""
    return str(_library.bitorch_qlinear_kernel().decode())


def active_kernel_reason() -> str:
    """Why it is this one, in words."""
    return str(_library.bitorch_qlinear_kernel_reason().decode())


def force_kernel(name: str | None) -> None:
    """Make one CPU kernel the active one in the whole process; for tests and benchmarks.

    Prepared weights that a caller holds are refused from then on. The layers prepare theirs anew at the next eager
    call; beneath a compiled model, call ``PackedQLinear.repack()``.

    Args:
        name: One of :func:`available_kernels`, or None for the automatic choice.

    Raises:
        RuntimeError: The processor cannot run it, or there is none of that name. Nothing has changed then.
    """
    global generation
    error = _library.bitorch_qlinear_force_kernel((name or "").encode()).decode()
    if error:
        raise RuntimeError(error)
    generation += 1


def prepared_layout() -> tuple[int, int, int]:
    """The active kernel's prepared form: outputs a panel, values of K a unit, bytes a unit of a panel."""
    layout = (ctypes.c_int64 * 3)()
    _library.bitorch_qlinear_layout(layout)
    return layout[0], layout[1], layout[2]


# A wrong BITORCH_QLINEAR_CPU is an error now, not at the first product.
if _error := _library.bitorch_qlinear_force_kernel(None).decode():
    raise RuntimeError(_error)
