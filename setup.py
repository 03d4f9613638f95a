"""Compiles the shared objects of bitorch_qlinear; what the package is stands in pyproject.toml.

bitorch_qlinear._ops_cpu  operators for the CPU, on LibTorch's stable ABI. No Python symbol in it, so that C++ programs
                          can load it too, and one binary serves every torch from 2.10.
bitorch_qlinear._C        small pybind11 module that says what was built. No torch header in it.
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import shutil
import sys
from glob import glob
from pathlib import Path
from unittest import mock

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "bitorch_qlinear" / "_version.py"))["__version__"]
INSTALL = "pip install --no-build-isolation ."
MIN_TORCH = (2, 10)


def fail(sentence: str) -> None:
    """End the build with one sentence instead of a traceback."""
    raise SystemExit(f"bitorch_qlinear: {sentence}")


try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    # pip's build isolation hides an installed torch, and as a build requirement pip would fetch a second one of several
    # gigabytes and compile against that: hence --no-build-isolation, and torch is not in pyproject's build-system.
    fail(
        f"torch is not there to compile against: install it first (pip install torch setuptools ninja pybind11), "
        f"then run '{INSTALL}' (without build isolation, which hides an installed torch)."
    )
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
    fail(f"torch {torch.__version__} is too old: install torch 2.10 or later, then run '{INSTALL}'.")
try:
    import pybind11
except ModuleNotFoundError:
    fail(f"pybind11 is not there to compile against: run 'pip install pybind11', then '{INSTALL}'.")


def decide_cuda(
    switch: str | None, torch_cuda_version: str | None, nvcc_found: bool, has_sources: bool
) -> tuple[bool, str]:
    """Whether the CUDA operators are built, and why.

    Never by torch.cuda.is_available(): a builder without a GPU would then make a CPU wheel in silence.

    Args:
        switch: The environment's BITORCH_QLINEAR_CUDA: "0", "1", or None or "" for no choice.
        torch_cuda_version: torch.version.cuda, None in a CPU build of torch.
        nvcc_found: Whether CUDA's compiler is there.
        has_sources: Whether there is CUDA code to compile.

    Returns:
        The decision and its reason.

    Raises:
        ValueError: The switch has another value, or asks for CUDA where something is missing.
    """
    if switch not in (None, "", "0", "1"):
        raise ValueError(f"BITORCH_QLINEAR_CUDA must be 0 or 1, not {switch!r}.")
    if switch == "0":
        return False, "BITORCH_QLINEAR_CUDA=0"
    needs = (
        (has_sources, "this version has no CUDA operators yet"),
        (torch_cuda_version is not None, "this torch is built without CUDA"),
        (nvcc_found, "there is no nvcc"),
    )
    missing = ", ".join(lack for there, lack in needs if not there)
    if switch == "1" and missing:
        raise ValueError(f"BITORCH_QLINEAR_CUDA=1 asks for the CUDA operators, but: {missing}.")
    if missing:
        return False, missing
    return True, "BITORCH_QLINEAR_CUDA=1" if switch == "1" else f"nvcc and torch for CUDA {torch_cuda_version}"


def find_nvcc() -> str | None:
    """The path of CUDA's compiler, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), *(f"{h}/bin" for h in homes if h)]))


try:
    BUILD_CUDA, CUDA_REASON = decide_cuda(
        switch=os.environ.get("BITORCH_QLINEAR_CUDA"),
        torch_cuda_version=torch.version.cuda,
        nvcc_found=find_nvcc() is not None,
        has_sources=os.path.exists("csrc/cuda/ops_cuda.cpp"),
    )
except ValueError as error:
    fail(str(error))
CUDA_TARGETS = ""  # of the CUDA operators, as _C reports them: "" where they are not built

# This import settles where torch believes CUDA to be. Without CUDA operators the two are empty, not absent: torch then
# looks for none, and does not warn that it found no GPU.
with mock.patch.dict(os.environ, {} if BUILD_CUDA else {"CUDA_HOME": "", "CUDA_PATH": ""}):
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

SITE = Path(torch.__file__).parent.parent
COMPILE_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Results must not depend on whether the processor has fused multiply-add.
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    # Error messages carry file names: keep the paths of the build machine out of them (the last match wins).
    f"-ffile-prefix-map={ROOT}=.",
    f"-ffile-prefix-map={SITE}=.",
    # No -march here, ever: each kernel file names its own target, and dispatch picks one at run time.
]
VERSION_MACRO = ("BITORCH_QLINEAR_VERSION", f'"{VERSION}"')
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))


def operator_library(name: str, sources: list[str], libraries: list[str]) -> Extension:
    """A plain shared object of operators, for torch.ops.load_library."""
    return Extension(
        f"bitorch_qlinear.{name}",
        sources,
        depends=[*HEADERS, "setup.py"],
        include_dirs=["csrc"],
        library_dirs=library_paths(),
        # The stable ABI's C functions are all in libtorch_cpu; c10 and torch_python would tie us to one torch.
        libraries=libraries,
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), VERSION_MACRO],
        # As system headers, torch's own do not warn under -Wextra.
        extra_compile_args=[*COMPILE_FLAGS, *(f"-isystem{path}" for path in include_paths())],
        # Nothing undefined: a Python symbol that slips in stops the link.
        extra_link_args=["-Wl,-z,defs"],
        language="c++",
    )


EXTENSIONS = [
    operator_library(
        "_ops_cpu",
        ["csrc/ops.cpp", "csrc/ops_cpu.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        ["torch", "torch_cpu"],
    ),
    Extension(
        "bitorch_qlinear._C",
        ["csrc/module.cpp", "csrc/cpu/cpu_features.cpp"],
        depends=[*HEADERS, "setup.py"],
        include_dirs=["csrc", pybind11.get_include()],
        define_macros=[
            VERSION_MACRO,
            ("BITORCH_QLINEAR_TORCH_VERSION", f'"{torch.__version__}"'),
            ("BITORCH_QLINEAR_CUDA_TARGETS", f'"{CUDA_TARGETS}"'),
        ],
        extra_compile_args=COMPILE_FLAGS,
        language="c++",
    ),
]
# The CUDA operators' library, _ops_cuda of csrc/cuda/*, is added here where BUILD_CUDA.


class BuildExt(BuildExtension):
    """torch's build_ext, for incremental builds and operator libraries that are no Python modules."""

    def finalize_options(self) -> None:
        """Keep the objects between builds: pip's editable install would compile in a new temporary folder each time."""
        super().finalize_options()
        tag = f"{sys.implementation.cache_tag}-{platform.machine()}-torch{torch.__version__}"
        self.build_temp = os.path.join("build", f"objects-{tag}")

    def build_extensions(self) -> None:
        """Say what was decided about CUDA, where a build sees it once."""
        print(f"bitorch_qlinear: CUDA operators {'on' if BUILD_CUDA else 'off'} ({CUDA_REASON})", flush=True)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """A folder for each extension: they share a source file and compile it with different flags."""
        shared = self.build_temp
        self.build_temp = os.path.join(shared, ext.name)
        super().build_extension(ext)
        self.build_temp = shared

    def get_ext_filename(self, fullname: str) -> str:
        """_ops_cpu.so, without the tag of a Python version that it does not depend on."""
        if fullname.rpartition(".")[2].startswith("_ops_"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


def choose_compiler() -> None:
    """Settle on one C++ compiler for torch's ninja file and for setuptools' linker, which choose differently."""
    chosen = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    if shutil.which(shlex.split(chosen)[0]) is None:
        fail(f"there is no C++ compiler '{chosen}': install one (Debian, Ubuntu: apt install g++) or name it in CXX.")
    os.environ["CXX"] = chosen


def put_ninja_on_path() -> None:
    """Torch looks for ninja on PATH, where an environment that is not activated has none."""
    try:
        import ninja
    except ModuleNotFoundError:
        return  # one of the system serves as well; without any, torch compiles file by file
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


if __name__ == "__main__":
    choose_compiler()
    put_ninja_on_path()
    # The license stands here, not in pyproject.toml, whose form for it changed with setuptools 77: both sides work so.
    setup(license="Apache-2.0", ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExt})
