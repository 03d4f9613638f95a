"""Compile the shared objects of bitorch_qlinear; pyproject.toml describes the package.

bitorch_qlinear._ops_cpu  has the operators for the CPU, on LibTorch's stable ABI. It uses no symbol of Python, so that
                          C++ programs can load it too, and one binary serves every torch from 2.10.
bitorch_qlinear._ops_cuda has the same operators for CUDA, and is built if torch and nvcc support it. It is a separate
                          library because it needs torch's CUDA libraries: a CPU-only torch does not load it.
bitorch_qlinear._C        is a small pybind11 module that reports what was built, and compares modules. It includes no
                          header of torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path
from unittest import mock

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "bitorch_qlinear" / "_version.py"))["__version__"]
SOURCES = runpy.run_path(str(ROOT / "bitorch_qlinear" / "_sources.py"))["digest"](ROOT)
# The build writes the digest for csrc/sources.cpp to the first. It writes a record of what built the libraries in the
# package to the second, for tools/environment.py.
GENERATED = str(ROOT / "build" / "generated")
BUILT_BY = ROOT / "build" / "built-by"
INSTALL = "pip install --no-build-isolation ."
MIN_TORCH = (2, 10)
SETUPTOOLS = "setuptools>=70.1"


def fail(sentence: str) -> None:
    """End the build with one sentence instead of a traceback."""
    raise SystemExit(f"bitorch_qlinear: {sentence}")


try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    # pip's build isolation hides an installed torch. If torch were a build requirement in pyproject.toml, pip would
    # fetch a second one of several gigabytes and compile against that. So --no-build-isolation is needed.
    fail(
        f"torch is not installed: install it first (pip install torch '{SETUPTOOLS}' ninja pybind11), "
        f"then run '{INSTALL}' (without build isolation, which hides an installed torch)."
    )
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
    fail(f"torch {torch.__version__} is too old: install torch 2.10 or later, then run '{INSTALL}'.")
try:
    import pybind11
except ModuleNotFoundError:
    fail(f"pybind11 is not installed: run 'pip install pybind11', then '{INSTALL}'.")


def decide_cuda(switch: str | None, torch_cuda: str | None, nvcc: str | None) -> tuple[bool, str]:
    """Decide whether the CUDA operators are built, and say why.

    torch.cuda.is_available() is not asked, because a builder without a GPU would then silently make a CPU wheel.

    Args:
        switch: The environment's BITORCH_QLINEAR_BUILD_CUDA: "0", "1", or None or "" for no choice.
        torch_cuda: torch.version.cuda, None in a CPU build of torch.
        nvcc: The version of CUDA's compiler, None if it is missing.

    Returns:
        The decision and its reason.

    Raises:
        ValueError: The switch has another value, or asks for CUDA although something is missing.
    """
    if switch not in (None, "", "0", "1"):
        raise ValueError(f"BITORCH_QLINEAR_BUILD_CUDA must be 0 or 1, not {switch!r}.")
    if switch == "0":
        return False, "BITORCH_QLINEAR_BUILD_CUDA=0"
    lacks = []
    if torch_cuda is None:
        lacks.append("this torch is built without CUDA")
    if nvcc is None:
        lacks.append("there is no nvcc with its headers")
    if torch_cuda and nvcc and torch_cuda.split(".")[0] != nvcc.split(".")[0]:
        lacks.append(f"this torch is built for CUDA {torch_cuda} and nvcc is of CUDA {nvcc}")
    missing = ", ".join(lacks)
    if switch == "1" and missing:
        raise ValueError(f"BITORCH_QLINEAR_BUILD_CUDA=1 asks for the CUDA operators, but: {missing}.")
    if missing:
        return False, missing
    return True, "BITORCH_QLINEAR_BUILD_CUDA=1" if switch == "1" else f"nvcc {nvcc} and torch for CUDA {torch_cuda}"


def find_cuda_home() -> str | None:
    """Return the folder of the CUDA toolkit, or None.

    An nvcc on PATH may be a wrapper outside of the toolkit, from which torch would guess a folder without headers.
    """
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and str(Path(nvcc).resolve().parents[1])]
    for home in (*filter(None, guesses), "/usr/local/cuda"):
        if os.path.exists(f"{home}/include/cuda_runtime.h") and os.path.exists(f"{home}/bin/nvcc"):
            return home
    return None


def nvcc_version(cuda_home: str | None) -> str | None:
    """Return the version of a toolkit's compiler, such as "13.0", or None if it is unknown."""
    if cuda_home is None:
        return None
    said = subprocess.run([f"{cuda_home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found and found[1]


CUDA_HOME = find_cuda_home()
try:
    BUILD_CUDA, CUDA_REASON = decide_cuda(
        switch=os.environ.get("BITORCH_QLINEAR_BUILD_CUDA"), torch_cuda=torch.version.cuda, nvcc=nvcc_version(CUDA_HOME)
    )
except ValueError as error:
    fail(str(error))

# The library has machine code for each of these, and PTX for GPUs between and after them: that of 8.0, the first with
# asynchronous copies. Only the "a" of 90a allows the instructions that Hopper alone has.
CUDA_ARCHITECTURES = ["75", "80", "86", "89", "90a", "100", "120"]
CUDA_PTX = "80"
# torch's own variable counts too: TORCH_CUDA_ARCH_LIST="9.0a" compiles for one machine in a seventh of the time.
CHOSEN_ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
# If targets are chosen, csrc/cuda/records.h leaves wgmma_sm90a out unless all GPUs of 9.0 get the code of 9.0a. Code of
# 9.0, which lacks the kernel, would run on the same GPUs, and nothing promises which of the two a driver takes.
CHOSEN = {target.removesuffix("+PTX") for target in re.split("[ ;]+", CHOSEN_ARCHITECTURES)}
HAS_SM90A = "9.0a" in CHOSEN and CHOSEN.isdisjoint({"9.0", "Hopper"})
CUDA_TARGETS = ""  # the targets of the CUDA operators, as _C reports them; "" if they are not built
if BUILD_CUDA:
    CUDA_TARGETS = CHOSEN_ARCHITECTURES or ", ".join(f"sm_{a}" for a in CUDA_ARCHITECTURES) + f", compute_{CUDA_PTX}"

# At this import torch decides where CUDA is. Without CUDA operators the two variables are empty, not absent, so torch
# does not look for CUDA, and does not warn that it found no GPU.
with mock.patch.dict(os.environ, {"CUDA_HOME": CUDA_HOME} if BUILD_CUDA else {"CUDA_HOME": "", "CUDA_PATH": ""}):
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
    # Error messages contain file names. This keeps the paths of the build machine out of them (the last match wins).
    f"-ffile-prefix-map={ROOT}=.",
    f"-ffile-prefix-map={SITE}=.",
    # -march must not be added: each kernel file names its own target, and dispatch picks one at run time.
]
VERSION_MACRO = ("BITORCH_QLINEAR_VERSION", f'"{VERSION}"')
HEADERS = sorted([*glob("csrc/**/*.h", recursive=True), *glob("csrc/**/*.cuh", recursive=True)])
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fvisibility=hidden,-Wall,-Wextra",
    "-Xptxas=-warn-spills",
    # torch's build adds the chosen targets itself. If none is chosen, these keep it from adding its own.
    *([] if CHOSEN_ARCHITECTURES else (f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES)),
    *([] if CHOSEN_ARCHITECTURES else [f"-gencode=arch=compute_{CUDA_PTX},code=compute_{CUDA_PTX}"]),
]


def operator_library(name: str, sources: list[str], libraries: list[str], cuda: bool = False) -> Extension:
    """Return the extension of a plain shared object of operators, for torch.ops.load_library."""
    device = "cuda" if cuda else "cpu"
    # torch's headers are system headers, so that they do not warn under -Wextra.
    cxx_flags = [*COMPILE_FLAGS, *(f"-isystem{path}" for path in include_paths(device))]
    return Extension(
        f"bitorch_qlinear.{name}",
        sources,
        depends=[*HEADERS, "setup.py"],
        include_dirs=["csrc", GENERATED],
        library_dirs=library_paths(device),
        # All C functions of the stable ABI are in libtorch_cpu and libtorch_cuda. c10 and torch_python would tie the
        # library to one torch.
        libraries=libraries,
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            VERSION_MACRO,
            *([("USE_CUDA", None)] if cuda else []),
            *([("BITORCH_QLINEAR_WITHOUT_SM90A", None)] if cuda and CHOSEN_ARCHITECTURES and not HAS_SM90A else []),
        ],
        extra_compile_args={"cxx": cxx_flags, "nvcc": NVCC_FLAGS},
        # Undefined symbols are errors, so a Python symbol that slips in stops the link.
        extra_link_args=["-Wl,-z,defs"],
        language="c++",
    )


EXTENSIONS = [
    operator_library(
        "_ops_cpu",
        [
            "csrc/torch/ops.cpp",
            "csrc/torch/ops_cpu.cpp",
            "csrc/torch/record.cpp",
            "csrc/sources.cpp",
            *sorted(glob("csrc/cpu/*.cpp")),
        ],
        ["torch", "torch_cpu"],
    ),
    Extension(
        "bitorch_qlinear._C",
        ["csrc/module.cpp", "csrc/module_state.cpp", "csrc/sources.cpp", "csrc/cpu/cpu_features.cpp"],
        depends=[*HEADERS, "setup.py"],
        include_dirs=["csrc", GENERATED, pybind11.get_include()],
        define_macros=[
            VERSION_MACRO,
            ("BITORCH_QLINEAR_TORCH_VERSION", f'"{torch.__version__}"'),
            ("BITORCH_QLINEAR_CUDA_TARGETS", f'"{CUDA_TARGETS}"'),
            ("BITORCH_QLINEAR_CUDA_REASON", f'"{CUDA_REASON}"'),
            ("BITORCH_QLINEAR_CUDA_VERSION", f'"{torch.version.cuda if BUILD_CUDA else ""}"'),
        ],
        extra_compile_args=COMPILE_FLAGS,
        language="c++",
    ),
]
if BUILD_CUDA:
    EXTENSIONS.append(
        operator_library(
            "_ops_cuda",
            [
                "csrc/torch/ops_cuda.cpp",
                "csrc/sources.cpp",
                *sorted([*glob("csrc/cuda/*.cpp"), *glob("csrc/cuda/*.cu")]),
            ],
            ["torch", "torch_cpu", "torch_cuda", "cudart"],
            cuda=True,
        )
    )


def touch_changed_sources(record: Path) -> None:
    """Give sources that changed without becoming newer the present time, because ninja compares only times.

    A copy that keeps times leaves such sources. Their old objects would be linked with the digest of the new sources.

    Args:
        record: The file with the sources' digests at the last build with the same objects. Today's replace them.
    """
    known = json.loads(record.read_text()) if record.exists() else {}
    found = {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in glob("csrc/**/*.*", recursive=True)}
    for path, digest in found.items():
        if known.get(path, digest) != digest and os.path.getmtime(path) <= os.path.getmtime(record):
            os.utime(path)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(found, indent=1))


class BuildExt(BuildExtension):
    """torch's build_ext, changed for incremental builds and for operator libraries that are not Python modules."""

    def finalize_options(self) -> None:
        """Keep the objects between builds; pip's editable install would compile in a new temporary folder each time."""
        super().finalize_options()
        tag = f"{sys.implementation.cache_tag}-{platform.machine()}-torch{torch.__version__}"
        self.build_temp = os.path.join("build", f"objects-{tag}")

    def build_extensions(self) -> None:
        """Print the decision about CUDA once, and compile."""
        # This test is here and not above, because an sdist has the same files in every environment.
        if os.environ.get("BITORCH_QLINEAR_CUDA"):
            fail("BITORCH_QLINEAR_CUDA is now named BITORCH_QLINEAR_BUILD_CUDA: set that one instead.")
        touch_changed_sources(Path(self.build_temp) / "sources.json")
        header, text = Path(GENERATED) / "sources_digest.h", f'#define BITORCH_QLINEAR_SOURCES "{SOURCES}"\n'
        if not header.exists() or header.read_text() != text:  # else it keeps its time, and nothing is compiled again
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_text(text)
            self.force = True  # torch does so with ninja; setuptools alone does not know of this header
        print(f"bitorch_qlinear: CUDA operators {'on' if BUILD_CUDA else 'off'} ({CUDA_REASON})", flush=True)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Use a folder for each extension, because they share a source file and compile it with different flags."""
        shared = self.build_temp
        self.build_temp = os.path.join(shared, ext.name)
        super().build_extension(ext)
        self.build_temp = shared

    def copy_extensions_to_source(self) -> None:
        """Record which build replaces the libraries in the package, for make in other environments of this checkout."""
        BUILT_BY.write_text("")  # libraries of an interrupted copy belong to no build
        super().copy_extensions_to_source()
        BUILT_BY.write_text(os.environ.get("BITORCH_QLINEAR_BUILT_BY", "") + "\n")

    def get_ext_filename(self, fullname: str) -> str:
        """Return a name such as _ops_cpu.so, without the tag of a Python, on which the library does not depend."""
        if fullname.rpartition(".")[2].startswith("_ops_"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


def check_setuptools() -> None:
    """End the build with a sentence if setuptools cannot make the wheel that pip asks it for."""
    if not {"dist_info", "bdist_wheel", "editable_wheel"}.intersection(sys.argv):
        return
    for module in ("setuptools.command.bdist_wheel", "wheel.bdist_wheel"):  # setuptools before 70.1 used the second
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
            return
    fail(
        f"this setuptools ({setuptools.__version__}) cannot make wheels: run \"pip install '{SETUPTOOLS}'\", "
        f"then '{INSTALL}'."
    )


def choose_compiler() -> None:
    """Choose one C++ compiler for torch's ninja file and for setuptools' linker, which choose differently."""
    chosen = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    if shutil.which(shlex.split(chosen)[0]) is None:
        fail(f"there is no C++ compiler '{chosen}': install one (Debian, Ubuntu: apt install g++) or name it in CXX.")
    os.environ["CXX"] = chosen


def put_ninja_on_path() -> None:
    """Put the ninja of this environment on PATH, where torch looks for it, in case the environment is not activated."""
    try:
        import ninja
    except ModuleNotFoundError:
        return  # the system's ninja serves as well; without any, torch compiles file by file
    if ninja.BIN_DIR:  # "" if its module belongs to another environment
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])


if __name__ == "__main__":
    check_setuptools()
    choose_compiler()
    put_ninja_on_path()
    # The license is not in pyproject.toml, because its form there changed with setuptools 77; any version takes this.
    setup(license="Apache-2.0", ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExt})
