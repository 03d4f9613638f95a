"""Run the launchers of csrc/cuda without a GPU: their launches are recorded, and the interpreter executes them.

    popc = Launcher("gemm_popc")
    error, launches = popc(job)              # a Struct of csrc/cuda/kernels.h, with buffers for its pointers
    launches[0].grid, launches[0].run()

A launcher can also take the place of its file's Module in a test that states which launch it expects: the launcher is
called, and its launch, which must equal the expected one, is executed.

The launchers are compiled by nvcc, unchanged, and linked with runtime.cpp instead of CUDA's runtime.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.ptx.machine import (
    SHARED_LIMIT,
    Buffer,
    Module,
    Pointer,
    Report,
    Struct,
    TensorMap,
    build_once,
    dim3,
    nvcc,
    nvcc_release,
)

from ..product import CUDA, layout, module, source

HERE = Path(__file__).parent
MAPS_BYTES = 3 * 128
"""The bytes of the only argument that consists of tensor maps."""
NAMES = ["pack", "pack_limited", "unpack", "align", "gemm_popc", "gemm_skinny", "gemm_skinny_mma_sm80", "gemm_mma_sm75"]
NAMES += ["gemm_mma_sm80", "gemm_mma_int8_sm80", "gemm_wgmma_sm90a", "gemm_fused_skinny", "gemm_fused_skinny_mma_sm80"]
NAMES += ["gemm_fused_cluster_sm90"]
SUCCESS, INVALID_VALUE, INVALID_CONFIGURATION = 0, 1, 9  # cudaError_t
# Host code is the same for all targets. For this one the tensor-core kernels of sm_80 are empty, which saves seconds.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-gencode=arch=compute_75,code=compute_75",
    "-Wno-deprecated-gpu-targets",
    "-Xcompiler=-fPIC",
]
TARGET = "sm_80"
"""The target whose PTX is executed; nearly all kernels run there."""
TARGETS = {"gemm_wgmma_sm90a": "sm_90a", "gemm_fused_cluster_sm90": "sm_90a"}
"""The target of a launcher whose kernels do not."""
INSTEAD = ("gemm_popc", "gemm_fused_skinny_mma_sm80")
"""Launchers to which another one may leave a product."""
ADDRESS_SHIFT = 40
"""The fake addresses of buffers are 2**40 apart, which exceeds any size in a launch that is executed."""


# ---- Compilation -----------------------------------------------------------------------------------------------------
def _object(path: str, text: str, more: Sequence[str] = (), depends: str = "") -> Path:
    """Return an object file, made once from a text in a file of this name, which is part of its kernels' names."""
    key = hashlib.sha256(repr((path, text, FLAGS, nvcc_release(), depends)).encode()).hexdigest()[:16]

    def make(out: Path) -> None:
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / path).write_text(text)
            command = [nvcc(), *FLAGS, *more, "-c", path, "-o", str(out)]
            done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc: {done.stderr or done.stdout}")

    return build_once(f"{key}.o", make)


_OnLaunch = ctypes.CFUNCTYPE(
    *(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint32)),
    *(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
    ctypes.c_int,
)


@functools.cache
def library(name: str = "", text: str = "") -> ctypes.CDLL:
    """Return a library of all launchers; `text` takes the place of csrc/cuda's file of that name."""
    objects = [_object(f"{each}.cu", text if each == name else source(f"{each}.cu")) for each in NAMES]
    objects.append(_object("runtime.cpp", (HERE / "runtime.cpp").read_text()))
    objects.append(
        _object("launchers.cpp", (HERE / "launchers.cpp").read_text(), [f"-I{CUDA}"], depends=source("kernels.h"))
    )
    # -Bsymbolic binds to the functions of runtime.cpp even if the process has loaded CUDA's runtime.
    command = [nvcc(), *FLAGS, "-shared", "-cudart=none", "-Xlinker=-Bsymbolic,-z,defs", *map(str, objects), "-o"]
    key = hashlib.sha256(repr(command).encode()).hexdigest()[:16]

    def make(out: Path) -> None:
        subprocess.run([*command, str(out)], check=True)

    found = ctypes.CDLL(str(build_once(f"launchers-{key}.so", make)))
    found.runtime_on_launch.argtypes = [_OnLaunch]
    found.runtime_errors.argtypes = [ctypes.c_int, ctypes.c_int]
    found.runtime_multiprocessors.argtypes = [ctypes.c_int]
    found.runtime_device.argtypes = [ctypes.c_int, ctypes.c_int]
    for each in NAMES:
        getattr(found, f"launch_{each}").argtypes = [
            *(ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_void_p),
        ]
    return found


@functools.cache
def without_file(kernel: str) -> str:
    """Return a mangled name without that of its file's anonymous namespace, which begins with its length."""
    while match := re.search(r"(\d+)_GLOBAL__N__", kernel):
        kernel = kernel[: match.start()] + "1N" + kernel[match.end(1) + int(match[1]) :]
    return kernel


@functools.cache
def _kernels(module: Module) -> dict[str, str]:
    return {without_file(name): name for name in module.ptx.kernels}


# ---- Launches --------------------------------------------------------------------------------------------------------
@dataclass
class Launch:
    module: Module
    kernel: str  # its name in the module
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    most_dynamic: int  # the limit to which the kernel's dynamic shared memory was raised, or 0
    stream: int
    arguments: list[bytes]
    behind_pack: bool  # whether it may start before the kernel in front of it has ended
    cluster: int  # the blocks of a cluster, or 0 if there are no clusters
    buffers: list[Buffer] = field(default_factory=list)

    def check(self) -> None:
        """Assert the limits of every GPU ("Technical Specifications per Compute Capability") and of the kernel."""
        compiled = self.module.kernel(self.kernel)
        threads = self.block[0] * self.block[1] * self.block[2]
        (bound,) = re.findall(r"\.maxntid\s+(\d+)", self.module.ptx.kernels.texts[self.kernel][0])
        assert 1 <= self.grid[0] < 2**31 and all(1 <= size <= 65535 for size in self.grid[1:]), self
        assert min(self.block) >= 1 and threads <= int(bound) <= 1024 and threads % 32 == 0 and self.block[2] == 1, self
        assert self.shared_bytes == 0 or compiled.dynamic_at is not None, self
        assert self.cluster <= 8 and (self.cluster == 0 or self.grid[0] % self.cluster == 0), self
        if self.most_dynamic == 0:
            assert compiled.static_shared + self.shared_bytes <= 48 * 1024, self
        else:
            # The limit is that of sm_86, the smallest of the targets that have such kernels.
            limit = SHARED_LIMIT[90 if self.module.ptx.target == "sm_90a" else 86]
            assert self.shared_bytes <= self.most_dynamic <= 1024 * limit - compiled.static_shared, self

    def run(self, seed: int = 0) -> Report:
        arguments = [self._with_buffers(argument) for argument in self.arguments]
        more = {"cluster": self.cluster} if self.cluster else {}
        return self.module.launch(self.kernel, self.grid, self.block, arguments, self.shared_bytes, seed, **more)

    def _with_buffers(self, argument: bytes) -> Struct:
        """Return the argument with buffers in place of their fake addresses, and tensor maps with buffers."""
        if len(argument) == MAPS_BYTES:
            return Struct("128s" * 3, *(self._map(argument[at : at + 128]) for at in range(0, MAPS_BYTES, 128)))
        words, rest = divmod(len(argument), 8)
        *values, tail = struct.unpack(f"={words}Q{rest}s", argument)
        return Struct(f"={words}Q{rest}s", *map(self._pointer, values), tail)

    def _map(self, figures: bytes) -> TensorMap | bytes:
        """Return the tensor map that runtime.cpp describes, or the bytes of one that is not used."""
        address, width, rows, stride, *box = struct.unpack_from("=6Q", figures)
        if not address:
            return figures
        memory = self._pointer(address)
        assert isinstance(memory, Pointer), figures
        return TensorMap(memory, (width, rows), (stride,), (box[0], box[1]), 4, 128)

    def _pointer(self, value: int) -> int | Pointer:
        index = (value >> ADDRESS_SHIFT) - 1
        if not 0 <= index < len(self.buffers):
            return value
        return self.buffers[index].at(value - _address(index, self.buffers[index]))


def _address(index: int, buffer: Buffer) -> int:
    return (index + 1 << ADDRESS_SHIFT) + buffer.misalign


def _with_addresses(fields: Struct, buffers: list[Buffer]) -> bytes:
    """Return a struct with fake addresses in place of its buffers, and append those that `buffers` lacks."""

    def address(value: Any) -> Any:
        if value is None:
            return 0
        if isinstance(value, Pointer):
            return address(value.buffer) + value.offset
        if not isinstance(value, Buffer):
            return value
        if not any(value is known for known in buffers):
            buffers.append(value)
        index = next(i for i, known in enumerate(buffers) if known is value)
        return _address(index, value)

    return struct.pack(fields.format, *map(address, fields.values))


class Launcher:
    """A launcher of csrc/cuda; `text` takes the place of its file.

    Only gemm_mma_sm80 and gemm_wgmma_sm90a use `tile`.
    """

    def __init__(self, name: str, tile: int = 0, text: str = "") -> None:
        self.name, self.tile = name, tile
        self.library = library(name, text) if text else library()
        self.module = module(f"{name}.cu", TARGETS.get(name, TARGET))
        self.ptx = self.module.ptx
        self.launched: set[str] = set()
        """The kernels that were launched so far."""
        self.execute = True
        """Whether `launch` executes the kernel that is launched."""

    def __call__(
        self,
        job: Struct,
        tile: int | None = None,
        stream: int = 0,
        errors: tuple[int, int] = (SUCCESS, SUCCESS),
        behind_pack: bool = False,
        other: Struct | None = None,
    ) -> tuple[int, list[Launch]]:
        """Return the launcher's error and its launches; the runtime returns `errors` for a launch and an attribute.

        `other` is what pack and align do in the same launch, a struct Align.
        """
        buffers: list[Buffer] = []
        launches: list[Launch] = []
        raised: list[Exception] = []

        def on_launch(*launch: Any) -> None:  # an exception would not reach Python through C++
            try:
                launches.append(self._record(*launch, buffers))
            except Exception as error:
                raised.append(error)

        function = _OnLaunch(on_launch)
        self.library.runtime_on_launch(function)
        self.library.runtime_errors(*errors)
        data = _with_addresses(job, buffers)
        if self.name in ("pack", "align"):
            data += _with_addresses(other, buffers) if other else bytes(struct.calcsize(layout("Align")))
        tile = self.tile if tile is None else tile
        error = getattr(self.library, f"launch_{self.name}")(data, len(data), tile, behind_pack, stream)
        assert not raised, raised
        assert error >= 0, f"{self.name}: a struct of {len(data)} bytes has the wrong size"
        assert self.library.cudaGetLastError() == SUCCESS, "the launcher does not clear its error"
        for launch in launches:
            launch.check()
        return error, launches

    def _record(
        self,
        name: bytes,
        grid: Any,
        block: Any,
        shared_bytes: int,
        most_dynamic: int,
        stream: int | None,
        arguments: Any,
        behind_pack: int,
        cluster: int,
        buffers: list[Buffer],
    ) -> Launch:
        found = self.module
        for other in INSTEAD:
            if other != self.name and f"{other}_cu" in name.decode():
                found = module(f"{other}.cu", TARGET)
        kernel = _kernels(found)[without_file(name.decode())]
        self.launched.add(kernel)
        sizes = [parameter.size or 0 for parameter in found.ptx.kernels[kernel].params]
        values = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)]
        sides = (tuple(grid[:3]), tuple(block[:3]))
        rest = shared_bytes, most_dynamic, stream or 0, values, bool(behind_pack), cluster, buffers
        return Launch(found, kernel, *sides, *rest)

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        seed: int = 0,
        cluster: int = 0,
    ) -> Report | None:
        """Do as Module.launch, through the launcher, which must launch exactly this in the caller's stream."""
        stream = 4096 + seed
        others = [argument for argument in args[1:] if isinstance(argument, Struct)]
        error, launches = self(args[0], stream=stream, other=others[0] if others else None)
        assert (error, len(launches)) == (SUCCESS, 1), args
        launch = launches[0]
        what = (launch.kernel, launch.grid, launch.block, launch.shared_bytes, launch.stream, launch.cluster)
        assert what == (kernel, dim3(grid), dim3(block), shared_bytes, stream, cluster) and not launch.behind_pack, args
        for actual, expected in zip(launch.arguments[1:], args[1:], strict=True):
            if isinstance(expected, Struct):
                assert actual == _with_addresses(expected, launch.buffers), args
            elif isinstance(expected, int):
                assert int.from_bytes(actual, "little", signed=not isinstance(expected, bool)) == expected, args
        return launch.run(seed) if self.execute else None
