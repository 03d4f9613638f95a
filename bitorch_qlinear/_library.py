"""Loads the compiled parts and checks that they belong to this Python code."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from . import _sources
from ._version import __version__

_REMEDY = "run `make build` in a checkout, or `pip install --no-build-isolation --force-reinstall --no-deps .`"
_OPERATORS = Path(__file__).with_name("_ops_cpu.so")
_CUDA_OPERATORS = Path(__file__).with_name("_ops_cuda.so")


def _check_build(part: str, version: str, sources: str | None, expected: str | None, expected_of: str) -> None:
    """Check that a compiled part belongs to this Python code.

    Args:
        part: The part's name in error messages.
        version: The version that it was built for.
        sources: The digest of the sources that it was built from, or None if it is too old to have one.
        expected: The digest that it should have.
        expected_of: The owner of the expected digest, for error messages.

    Raises:
        ImportError: The part does not belong to this code, for example after ``git pull`` without ``make``.
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
    # Check the version before any other function is looked up, because an old library may lack the function.
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
    """Return the reason why CUDA tensors have no kernels, or "" if they have."""
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
    strings = ("kernels", "kernel", "force_kernel", "tile", "force_tile", "choice", "check_environment")
    library = _load(_CUDA_OPERATORS, "bitorch_qlinear_cuda", strings)
    library.bitorch_qlinear_cuda_code.argtypes = [ctypes.c_int]
    library.bitorch_qlinear_cuda_kernels.argtypes = [ctypes.c_int] * 2
    library.bitorch_qlinear_cuda_force_kernel.argtypes = [ctypes.c_char_p]
    library.bitorch_qlinear_cuda_force_tile.argtypes = [ctypes.c_char_p]
    library.bitorch_qlinear_cuda_choice.argtypes = [ctypes.c_int] * 3 + [ctypes.c_int64] * 4 + [ctypes.c_bool]
    return library


def _load_module_info() -> dict[str, str]:
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"bitorch_qlinear._C is not built for this Python ({error}): {_REMEDY}.") from error
    build: dict[str, str] = _C.build_info()
    built_from = build.get("sources")
    # An installed package has no sources beside it, so the digest is None and the parts are compared with each other.
    in_checkout = _sources.digest(Path(__file__).parents[1])
    _check_build("module _C", build["version"], built_from, in_checkout or built_from, "those in csrc")
    return build


build_info = _load_module_info()
cpu_library = _load_operators()

stale_forms = ctypes.c_uint64.in_dll(cpu_library, "bitorch_qlinear_stale_forms")
"""Counts the prepared forms that an operator refused because they were made from other words than it was given."""

operators = torch.ops.bitorch_qlinear
"""The operators. A module that takes them from here can rely on them being loaded."""

no_cuda_reason = _reason_against_cuda(build_info, torch.version.cuda)
"""The reason why CUDA tensors are computed in float, or "" if they have kernels."""
has_cuda = not no_cuda_reason
cuda_library = _load_cuda_operators() if has_cuda else None

# Apply the environment's choice of kernels now, so that a wrong BITORCH_QLINEAR_CPU_KERNEL or BITORCH_QLINEAR_CUDA_...
# raises at import and not in the first product.
if _error := cpu_library.bitorch_qlinear_force_kernel(None).decode():
    raise RuntimeError(_error)
if cuda_library is not None and (_error := cuda_library.bitorch_qlinear_cuda_check_environment().decode()):
    raise RuntimeError(_error)
