"""Loads the compiled parts and checks that they belong to this Python code; the switch between CPU kernels."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch

from . import _sources
from ._version import __version__

_REMEDY = "run `make build` in a checkout, or `pip install --no-build-isolation --force-reinstall --no-deps .`"
_OPERATORS = Path(__file__).with_name("_ops_cpu.so")
_CUDA_OPERATORS = Path(__file__).with_name("_ops_cuda.so")


def _check_build(part: str, version: str, sources: str | None, expected: str | None, expected_of: str) -> None:
    """Check that a compiled part belongs to this Python code.

    Args:
        part: What the part is called.
        version: The version that it was built for.
        sources: The digest of the sources that it was built from, or None if it is too old to have one.
        expected: The digest that it should have.
        expected_of: Whose digest that is.

    Raises:
        ImportError: It does not: ``git pull`` without ``make``, for example.
    """
    if version != __version__:
        raise ImportError(
            f"bitorch_qlinear {__version__} found its {part} built for version {version}: a stale build; {_REMEDY}."
        )
    if sources is None or sources != expected:
        raise ImportError(
            f"bitorch_qlinear {__version__} found its {part} built from other sources than {expected_of}: "
            f"a stale build; {_REMEDY}."
        )


def _load(path: Path, prefix: str, functions: tuple[str, ...]) -> ctypes.CDLL:
    """Register a library's operators with torch and return a handle to the plain C functions beside them."""
    if not path.exists():
        raise ImportError(f"bitorch_qlinear's operators are not built ({path.name} is missing): {_REMEDY}.")
    try:
        torch.ops.load_library(path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"bitorch_qlinear's operators cannot be loaded by torch {torch.__version__} (2.10 or later is needed): "
            f"{error}; {_REMEDY}."
        ) from error
    # Checked before any other function is looked up, because an old library may lack it.
    version = getattr(library, f"{prefix}_version")
    sources = getattr(library, f"{prefix}_sources", None)  # absent from libraries before 0.1.0
    for function in filter(None, (version, sources)):
        function.restype = ctypes.c_char_p
    _check_build(
        part="operators",
        version=version().decode(),
        sources=sources().decode() if sources else None,
        expected=build_info["sources"],
        expected_of="its module _C",
    )
    for name in functions:
        getattr(library, f"{prefix}_{name}").restype = ctypes.c_char_p
    return library


def _load_operators() -> ctypes.CDLL:
    library = _load(_OPERATORS, "bitorch_qlinear", ("kernels", "kernel", "kernel_reason", "force_kernel"))
    library.bitorch_qlinear_force_kernel.argtypes = [ctypes.c_char_p]
    library.bitorch_qlinear_least_sign_outputs.restype = ctypes.c_int64
    library.bitorch_qlinear_prepared_bytes.restype = ctypes.c_int64
    library.bitorch_qlinear_prepared_bytes.argtypes = [ctypes.c_bool, ctypes.c_int64, ctypes.c_int64]
    library.bitorch_qlinear_cuda_layout.restype = ctypes.c_int64
    return library


def _reason_against_cuda(build: dict[str, str], torch_cuda: str | None) -> str:
    """Why there are no kernels for CUDA tensors, or ""."""
    if torch_cuda is None:
        return "this torch is built without CUDA"
    if not build["cuda_targets"]:
        return f"bitorch_qlinear was built without CUDA operators ({build['cuda_reason']})"
    if build["cuda_version"].split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"bitorch_qlinear's operators are built for CUDA {build['cuda_version']}, this torch for CUDA {torch_cuda}"
        )
    return ""


def _load_cuda_operators() -> ctypes.CDLL:
    library = _load(_CUDA_OPERATORS, "bitorch_qlinear_cuda", ("kernels", "kernel", "force_kernel", "choice"))
    library.bitorch_qlinear_cuda_kernels.argtypes = [ctypes.c_int]
    library.bitorch_qlinear_cuda_force_kernel.argtypes = [ctypes.c_char_p]
    library.bitorch_qlinear_cuda_choice.argtypes = [ctypes.c_int] * 2 + [ctypes.c_int64] * 3
    return library


def _load_module_info() -> dict[str, str]:
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"bitorch_qlinear._C is not built for this Python ({error}): {_REMEDY}.") from error
    build: dict[str, str] = _C.build_info()
    built_from = build.get("sources")
    # None for an installed package, which has no sources beside it: then the parts are compared with each other only.
    in_checkout = _sources.digest(Path(__file__).parents[1])
    _check_build("module _C", build["version"], built_from, in_checkout or built_from, "those in csrc")
    return build


build_info = _load_module_info()
_library = _load_operators()

stale_forms = ctypes.c_uint64.in_dll(_library, "bitorch_qlinear_stale_forms")
"""How many prepared forms the operators found that were not made of the words that came with them."""

operators = torch.ops.bitorch_qlinear
"""The operators; whoever takes them from here has them loaded, whatever was imported first."""

no_cuda_reason = _reason_against_cuda(build_info, torch.version.cuda)
"""Why CUDA tensors are computed in float, or "": then there are kernels for them."""
has_cuda = not no_cuda_reason
_cuda_library = _load_cuda_operators() if has_cuda else None


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

    Weights that were prepared for another kernel are prepared anew in each call; the layers make theirs anew at the
    next eager call.

    Args:
        name: One of :func:`available_kernels`, or None for the automatic choice.

    Raises:
        RuntimeError: The processor cannot run it, or there is none of that name. Nothing has changed then.
    """
    global _least_sign_outputs
    error = _library.bitorch_qlinear_force_kernel((name or "").encode()).decode()
    if error:
        raise RuntimeError(error)
    _least_sign_outputs = _library.bitorch_qlinear_least_sign_outputs()


def least_sign_outputs() -> int:
    """From how many outputs on the active kernel's ``multiply_signs`` is faster than unpacking and the BLAS.

    Of half as many values to sum on, and in float32: see ``autograd.times_signs``.
    """
    return _least_sign_outputs


class PreparedLayout(NamedTuple):
    """The active CPU kernel's prepared form.

    Attributes:
        panel: Outputs a panel.
        unit: Values of K a unit.
        unit_bytes: Bytes of a unit of a panel.
        number: By which the form's header names it.
    """

    panel: int
    unit: int
    unit_bytes: int
    number: int


CUDA_LAYOUT: int = _library.bitorch_qlinear_cuda_layout()
"""The number of CUDA's prepared form, one for all kernels (csrc/cuda/check_prepared.cuh)."""


def prepared_layout() -> PreparedLayout:
    """The active CPU kernel's prepared form."""
    layout = (ctypes.c_int64 * 4)()
    _library.bitorch_qlinear_layout(layout)
    return PreparedLayout(*layout)


CUDA_KERNELS = ("popc", "skinny", "skinny_mma_sm80", "mma_sm75", "mma_sm80", "mma_int8_sm80")
"""Names of all CUDA kernels (csrc/cuda/heuristics.h): a build without CUDA operators knows them by this list alone."""


def prepared_bytes(device_type: str, n: int, k: int) -> int:
    """Bytes of the prepared form of n rows of k values: CUDA's on "cuda", the active CPU kernel's elsewhere."""
    return int(_library.bitorch_qlinear_prepared_bytes(device_type == "cuda", n, k))


def available_cuda_kernels(capability: tuple[int, int]) -> list[str]:
    """Names of the CUDA kernels that a compute capability can run; none where there are no CUDA operators."""
    if _cuda_library is None:
        return []
    names = str(_cuda_library.bitorch_qlinear_cuda_kernels(10 * capability[0] + capability[1]).decode())
    return names.split(", ") if names else []


def cuda_choice(capability: tuple[int, int], multiprocessors: int, m: int, n: int, k: int) -> str:
    """Which CUDA kernel computes a product on such a device, and why; or what is wrong, in words.

    Raises:
        RuntimeError: There are no CUDA operators.
    """
    if _cuda_library is None:
        raise RuntimeError(f"bitorch_qlinear has no CUDA kernels here: {no_cuda_reason}.")
    number = 10 * capability[0] + capability[1]
    return str(_cuda_library.bitorch_qlinear_cuda_choice(number, multiprocessors, m, n, k).decode())


def forced_cuda_kernel() -> str:
    """Name of the CUDA kernel that is forced, or "" where each product's sizes choose it."""
    return "" if _cuda_library is None else str(_cuda_library.bitorch_qlinear_cuda_kernel().decode())


def force_cuda_kernel(name: str | None) -> None:
    """Make one CUDA kernel compute all products that it can, in the whole process; for tests and benchmarks.

    All CUDA kernels read one prepared form: nothing has to be prepared anew.

    Args:
        name: One of :func:`available_cuda_kernels`, or None for the automatic choice. On a device that lacks it,
            products are errors.

    Raises:
        RuntimeError: There are no CUDA operators, or there is no kernel of that name. Nothing has changed then.
    """
    if _cuda_library is None:
        raise RuntimeError(f"bitorch_qlinear has no CUDA kernels here: {no_cuda_reason}.")
    error = _cuda_library.bitorch_qlinear_cuda_force_kernel((name or "").encode()).decode()
    if error:
        raise RuntimeError(error)


# A wrong BITORCH_QLINEAR_CPU_KERNEL or BITORCH_QLINEAR_CUDA_KERNEL is an error now, not at the first product.
if _error := _library.bitorch_qlinear_force_kernel(None).decode():
    raise RuntimeError(_error)
# A plain number, which torch.compile can read.
_least_sign_outputs: int = _library.bitorch_qlinear_least_sign_outputs()
if _cuda_library is not None and (_error := _cuda_library.bitorch_qlinear_cuda_force_kernel(None).decode()):
    raise RuntimeError(_error)
