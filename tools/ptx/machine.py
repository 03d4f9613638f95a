"""Compile PTX, launch kernels and report what they did: the interpreter as tests use it.

    module = Module.from_source(cuda_text, "sm_80")
    y = np.empty(n, np.float32)
    report = module.launch("scale", grid=4, block=128, args=[In(x), Out(y), n, 2.0], seed=3)

A plain array is an input, which no thread may write. A launch that does something forbidden raises PtxFault.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .parser import (
    BUFFER_OFFSET,
    BUFFER_SHIFT,
    LOCAL_START,
    PARAM_START,
    SHARED_START,
    TYPE_BYTES,
    Address,
    Float,
    Immediate,
    Instruction,
    Kernel,
    Name,
    Operand,
    PtxError,
    Register,
    Sink,
    TensorAddress,
    Variable,
    Vector,
    parse,
)

HERE = Path(__file__).parent
# A block has at most these KiB of shared memory, by target (CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability").
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
# No access may touch these bytes between two variables. A multiple of 128 leaves every variable in its banks.
SHARED_GAP, SMALL_GAP = 128, 16


# ---- The compiled interpreter ----------------------------------------------------------------------------------------
def cache_directory() -> Path:
    """Return a directory of this checkout that git ignores, or a temporary one if the checkout is read-only."""
    directory = HERE / "__pycache__"
    try:
        directory.mkdir(exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    directory = Path(tempfile.gettempdir()) / f"ptx-interpreter-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def build_once(name: str, make: Any) -> Path:
    """Return the cached file `name`; if several processes ask for it, only one of them makes it."""
    target = cache_directory() / name
    if not target.exists():
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                partial = target.with_suffix(".partial")
                make(partial)
                partial.replace(target)
    return target


class _Operand(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("kind", "reg", "count", "unused")] + [("value", ctypes.c_int64)]


class _Region(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint32), ("size", ctypes.c_uint32)]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("data", ctypes.c_void_p),
        ("initialised", ctypes.c_void_p),
        ("writable", ctypes.c_uint32),
        ("constant", ctypes.c_uint32),
        ("dependent", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("shadow", ctypes.c_void_p),
    ]


class _TensorMap(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("rank", "element_bytes", "swizzle", "unused")),
        ("size", ctypes.c_uint64 * 5),
        ("stride", ctypes.c_uint64 * 5),
        ("box", ctypes.c_uint32 * 5),
        ("unused2", ctypes.c_uint32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("limit", ctypes.c_uint64),
        ("dynamic_shared", ctypes.c_uint32),
        ("total_shared", ctypes.c_uint32),
        ("shared", ctypes.POINTER(_Region)),
        ("shared_count", ctypes.c_uint64),
        ("local", ctypes.POINTER(_Region)),
        ("local_count", ctypes.c_uint64),
        ("params", ctypes.POINTER(_Region)),
        ("param_count", ctypes.c_uint64),
        ("param_bytes", ctypes.c_char_p),
        ("param_size", ctypes.c_uint64),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint64),
        ("counts", ctypes.c_void_p),
        ("shuffle_blocks", ctypes.c_uint32),
        ("collectives_order", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32 * 3),
        ("registers_at_entry", ctypes.c_uint32),
        ("explicit_cluster", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("tensor_maps", ctypes.POINTER(_TensorMap)),
        ("tensor_map_count", ctypes.c_uint64),
    ]


class _Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char * 64),
        ("message", ctypes.c_char * 1400),
        ("block", ctypes.c_int32 * 3),
        ("thread", ctypes.c_int32 * 3),
        ("pc", ctypes.c_int32),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """Load the interpreter, and compile it first (about 20 s) unless a library of the same sources exists."""
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "c++")
    # The interpreter switches rounding modes at run time, and a product and a sum must not become one fma.
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-frounding-math"]
    sources = [HERE / "interpreter.cpp", *sorted((HERE / "interpreter").glob("*.h"))]
    key = hashlib.sha256(repr((compiler, flags)).encode() + b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]

    def make(path: Path) -> None:
        subprocess.run([*compiler.split(), *flags, "-o", str(path), str(sources[0])], check=True)

    lib = ctypes.CDLL(str(build_once(f"interpreter-{key}.so", make)))
    lib.ptx_program.restype = ctypes.c_void_p
    lib.ptx_program.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    lib.ptx_free.restype = None
    lib.ptx_free.argtypes = [ctypes.c_void_p]
    lib.ptx_special.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64]
    lib.ptx_instruction.argtypes = [
        *(ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Operand)),
        *(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_char_p, ctypes.c_uint64),
    ]
    lib.ptx_launch.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Launch), ctypes.POINTER(_Fault)]
    return lib


# ---- nvcc ------------------------------------------------------------------------------------------------------------
def nvcc() -> str | None:
    toolkit = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (toolkit if os.access(toolkit, os.X_OK) else None)


@functools.cache
def nvcc_release() -> str:
    """Return the release of nvcc, such as "13.0", or "" if there is no nvcc."""
    compiler = nvcc()
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout if compiler else ""
    found = re.search(r"release (\S+),", text)
    return found[1] if found else ""


def compile_ptx(source: str | Path, arch: str, flags: Sequence[str] = ()) -> str:
    """Return the PTX that nvcc emits for CUDA text or a file, with source lines."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("there is no nvcc here")
    path = source if isinstance(source, Path) else None
    text = source.read_text() if isinstance(source, Path) else source
    command = [compiler, "--ptx", "-lineinfo", "-std=c++17", f"-arch={arch}", *flags]
    with tempfile.TemporaryDirectory() as directory:
        if path is None:
            path = Path(directory) / "kernel.cu"
            path.write_text(text)
        out = Path(directory) / "out.ptx"
        done = subprocess.run([*command, path.name, "-o", str(out)], cwd=path.parent, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr or done.stdout}")
        return out.read_text()


def compile_cached(source: str, arch: str, flags: Sequence[str] = ()) -> str:
    """Call compile_ptx once per checkout, for a text that includes only headers of the toolkit."""
    key = hashlib.sha256(repr((source, arch, tuple(flags), nvcc_release())).encode()).hexdigest()[:16]
    return build_once(f"{key}.ptx", lambda path: path.write_text(compile_ptx(source, arch, flags))).read_text()


# ---- Global memory ---------------------------------------------------------------------------------------------------
class Buffer:
    """An array in global memory. It starts `misalign` bytes past a multiple of 256, as allocations are aligned."""

    writable = False

    def __init__(self, array: np.ndarray, name: str = "", misalign: int = 0) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("a buffer must be a contiguous array")
        self.array, self.name, self.misalign = array, name, misalign
        self.initialised: np.ndarray | None = None  # one byte for each byte; None if all are initialised

    def at(self, offset: int) -> Pointer:
        """Return a pointer `offset` bytes into the buffer."""
        return Pointer(self, offset)

    @property
    def unwritten(self) -> int:
        """The number of bytes that have not been written yet."""
        return 0 if self.initialised is None else int((self.initialised == 0).sum())


class In(Buffer):
    """Read only."""


class InOut(Buffer):
    """A buffer that holds values and may be written."""

    writable = True


class Out(Buffer):
    """A buffer without values: each byte must be written before it is read. The values of the array are overwritten."""

    writable = True

    def __init__(self, array: np.ndarray, name: str = "", misalign: int = 0) -> None:
        super().__init__(array, name, misalign)
        array.reshape(-1).view(np.uint8)[:] = 0xCD
        self.initialised = np.zeros(max(array.nbytes, 1), np.uint8)


@dataclass(frozen=True)
class Pointer:
    buffer: Buffer
    offset: int


# The bytes of a tensor map begin with this number (interpreter/bulk_copy.h), and the map's index follows.
TENSOR_MAP_MAGIC = int.from_bytes(b"TNSORMAP", "little")


@dataclass(frozen=True)
class TensorMap:
    """A CUtensorMap over a buffer, as cuTensorMapEncodeTiled makes it without interleaving, filling with zeros.

    An argument of a launch, or a value of a Struct with the format `128s`, which must lie at a multiple of 64 bytes.
    Dimension 0 is the innermost one. The checks are those of the driver.

    Args:
        buffer: The memory; a pointer moves its beginning.
        size: Elements of each dimension.
        strides: Bytes from one element to the next, of each dimension but the first.
        box: Elements of each dimension of the box that an instruction copies.
        element_bytes: 1, 2, 4 or 8.
        swizzle: 0, 32, 64 or 128 bytes.
    """

    buffer: Buffer | Pointer
    size: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_bytes: int = 1
    swizzle: int = 0

    def check(self, base: int) -> None:
        rank = len(self.size)
        if not 1 <= rank <= 5 or len(self.box) != rank or len(self.strides) != rank - 1:
            raise ValueError(
                f"a tensor map of {rank} dimensions, {len(self.strides)} strides and {len(self.box)} of a box"
            )
        if self.element_bytes not in (1, 2, 4, 8) or self.swizzle not in (0, 32, 64, 128):
            raise ValueError(f"elements of {self.element_bytes} bytes or a swizzle of {self.swizzle} do not exist")
        if base % 16:
            raise ValueError(f"a tensor map's memory begins at {base:#x}, which is not a multiple of 16")
        if not all(1 <= n <= 1 << 32 for n in self.size):
            raise ValueError(f"the sizes {self.size} of a tensor map are not between 1 and 2^32")
        if not all(n % 16 == 0 and 0 <= n < 1 << 40 for n in self.strides):
            raise ValueError(f"the strides {self.strides} of a tensor map are not multiples of 16 below 2^40")
        if not all(1 <= n <= 256 for n in self.box):
            raise ValueError(f"the sizes {self.box} of a tensor map's box are not between 1 and 256")
        row = self.box[0] * self.element_bytes
        if row % 16 or (self.swizzle and row > self.swizzle):
            raise ValueError(
                f"a row of {row} bytes of a tensor map's box is no multiple of 16, or wider than the swizzle"
            )


@dataclass(frozen=True)
class Struct:
    """A struct passed by value, with a format and values as for struct.pack.

    A buffer stands for a pointer (Q), a TensorMap for its bytes (128s).
    """

    format: str
    values: tuple[Any, ...]

    def __init__(self, format: str, *values: Any) -> None:
        object.__setattr__(self, "format", format)
        object.__setattr__(self, "values", values)


# ---- Results ---------------------------------------------------------------------------------------------------------
class PtxFault(Exception):
    """The fault that stopped a launch. `kind` names the detector."""

    def __init__(self, kind: str, message: str, where: str, line: int, source: str, block: Any, thread: Any) -> None:
        super().__init__(f"{kind}: {message}\n  {where}")
        self.kind, self.message, self.line, self.source = kind, message, line, source
        self.block, self.thread = tuple(block), tuple(thread)


COLUMNS = ("warps", "threads", "wavefronts", "wavefronts_least", "sectors", "sectors_least")


@dataclass
class Report:
    """The counts of a launch: one row for each instruction, with the columns of COLUMNS."""

    kernel: str
    opcodes: list[str]
    lines: list[int]
    sources: list[str]
    counts: np.ndarray

    def _sum(self, column: str) -> int:
        return int(self.counts[:, COLUMNS.index(column)].sum())

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        """The number of executed instructions by opcode, summed over all threads."""
        total: Counter[str] = Counter()
        for opcode, count in zip(self.opcodes, self.counts[:, 1], strict=True):
            if count:
                total[opcode] += int(count)
        return total

    @property
    def thread_instructions(self) -> int:
        return self._sum("threads")

    @property
    def warp_instructions(self) -> int:
        return self._sum("warps")

    @property
    def bank_conflicts(self) -> int:
        """The wavefronts of shared memory beyond those that the accesses would need without conflicts."""
        return self._sum("wavefronts") - self._sum("wavefronts_least")

    @property
    def sectors(self) -> int:
        """The 32-byte sectors of global memory that the accesses of the warps touched."""
        return self._sum("sectors")

    @property
    def sectors_needed(self) -> int:
        """The sectors that would suffice if the accessed bytes lay side by side."""
        return self._sum("sectors_least")

    def _excess(self, column: str, least: str) -> dict[str, int]:
        found: Counter[str] = Counter()
        excess = self.counts[:, COLUMNS.index(column)] - self.counts[:, COLUMNS.index(least)]
        for source, count in zip(self.sources, excess, strict=True):
            if count > 0:
                found[source] += int(count)
        return dict(found)

    def conflicts_by_source(self) -> dict[str, int]:
        """Return the extra wavefronts by source line."""
        return self._excess("wavefronts", "wavefronts_least")

    def excess_sectors_by_source(self) -> dict[str, int]:
        """Return the sectors that were touched beyond those needed, by source line."""
        return self._excess("sectors", "sectors_least")

    def __str__(self) -> str:
        lines = [
            f"{self.kernel}: {self.warp_instructions} warp instructions, {self.thread_instructions} of threads",
            f"  shared memory: {self._sum('wavefronts')} wavefronts, {self.bank_conflicts} of them by bank conflicts",
            f"  global memory: {self.sectors} sectors touched, {self.sectors_needed} needed",
        ]
        lines += [f"    {n} extra wavefronts at {source}" for source, n in self.conflicts_by_source().items()]
        lines += [f"    {n} extra sectors at {source}" for source, n in self.excess_sectors_by_source().items()]
        lines += [f"  {count:>10} {opcode}" for opcode, count in self.instructions.most_common()]
        return "\n".join(lines)


# ---- Modules ---------------------------------------------------------------------------------------------------------
def _align(value: int, to: int) -> int:
    return -(-value // to) * to


def dim3(value: int | Sequence[int]) -> tuple[int, int, int]:
    dims = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    return (*dims, 1, 1, 1)[:3]  # type: ignore[return-value]


@dataclass
class _Compiled:
    """A kernel as the interpreter holds it, with the places of its variables."""

    kernel: Kernel
    handle: int
    shared: list[tuple[int, int]] = field(default_factory=list)
    static_shared: int = 0
    dynamic_at: int | None = None
    local: list[tuple[int, int]] = field(default_factory=list)
    params: list[int] = field(default_factory=list)


class Module:
    def __init__(self, ptx: str) -> None:
        self.text = ptx
        self.ptx = parse(ptx)
        self._compiled: dict[str, _Compiled] = {}
        # The variables of a module live as long as the module.
        self.variables: dict[str, Buffer] = {}
        for variable in self.ptx.variables.values():
            if variable.space in ("global", "const"):
                self.variables[variable.name] = self._module_buffer(variable)

    @classmethod
    def from_ptx(cls, text: str) -> Module:
        return cls(text)

    @classmethod
    def from_source(cls, source: str | Path, arch: str = "sm_80", flags: Sequence[str] = ()) -> Module:
        """Compile CUDA text, with a cache, or a file, without one because the files that it includes may change."""
        return cls(
            compile_ptx(source, arch, flags) if isinstance(source, Path) else compile_cached(source, arch, flags)
        )

    def __del__(self) -> None:
        for compiled in getattr(self, "_compiled", {}).values():
            library().ptx_free(compiled.handle)

    @staticmethod
    def _module_buffer(variable: Variable) -> Buffer:
        if variable.size is None:
            raise PtxError(f"the size of '{variable.name}' is not known")
        data = np.frombuffer(bytearray(variable.initial or bytes(variable.size)), np.uint8)
        return (In if variable.space == "const" else InOut)(data, variable.name)

    # ---- Compilation
    def kernel(self, name: str) -> _Compiled:
        if name not in self._compiled:
            if name not in self.ptx.kernels:
                raise PtxError(f"there is no kernel '{name}'; there are {sorted(self.ptx.kernels)}")
            self._compiled[name] = self._compile(self.ptx.kernels[name])
        return self._compiled[name]

    def _compile(self, kernel: Kernel) -> _Compiled:
        bits = bytes(kernel.registers)
        compiled = _Compiled(kernel, library().ptx_program(bits, len(bits)))
        symbols = self._place(compiled)
        error = ctypes.create_string_buffer(400)
        try:
            for name, reg in kernel.specials.items():
                if library().ptx_special(compiled.handle, reg, name.encode(), error, len(error)):
                    raise PtxError(error.value.decode())
            for instruction in kernel.instructions:
                encoded = [
                    e for operand in instruction.operands for e in self._encode(kernel, symbols, instruction, operand)
                ]
                guard = instruction.guard
                failed = library().ptx_instruction(
                    *(compiled.handle, instruction.opcode.encode(), (_Operand * max(len(encoded), 1))(*encoded)),
                    *(len(encoded), guard.index if guard else -1, bool(guard and guard.negated), error, len(error)),
                )
                if failed:
                    raise PtxError(f"PTX line {instruction.line}: {error.value.decode()}")
        except PtxError:
            library().ptx_free(compiled.handle)
            raise
        return compiled

    def _place(self, compiled: _Compiled) -> dict[str, int]:
        """Return the addresses of all variables that the kernel can name."""
        kernel = compiled.kernel
        symbols = {}
        for index, name in enumerate(self.variables):
            symbols[name] = ((index + 1) << BUFFER_SHIFT) + BUFFER_OFFSET
        used = set()
        for instruction in kernel.instructions:
            for operand in instruction.operands:
                if isinstance(operand, TensorAddress):
                    operand = operand.address
                base = operand.base if isinstance(operand, Address) else operand
                if isinstance(base, Name):
                    used.add(base.text)
        at = PARAM_START
        for param in kernel.params:
            at = _align(at, max(param.align, 16))
            symbols[param.name] = at
            compiled.params.append(at)
            at += (param.size or 0) + SMALL_GAP
        shared, local = SHARED_START, LOCAL_START
        dynamic: list[Variable] = []
        for variable in (*self.ptx.variables.values(), *kernel.variables.values()):
            if variable.space == "shared" and (variable.name in kernel.variables or variable.name in used):
                if variable.size is None:
                    dynamic.append(variable)
                    continue
                shared = _align(shared, max(variable.align, SHARED_GAP))
                symbols[variable.name] = shared
                compiled.shared.append((shared, variable.size))
                compiled.static_shared += variable.size
                shared += variable.size + SHARED_GAP
            elif variable.space == "local":
                local = _align(local, max(variable.align, 16))
                symbols[variable.name] = local
                compiled.local.append((local, variable.size or 0))
                local += (variable.size or 0) + SMALL_GAP
            elif variable.name in kernel.variables and variable.space != "shared":
                raise PtxError(f".{variable.space} '{variable.name}' within a kernel is not known")
        if dynamic:
            # Hopper's swizzles need 1024. A kernel that relies on a larger alignment than it declares is not caught.
            shared = _align(shared, max(1024, *(v.align for v in dynamic)))
            compiled.dynamic_at = shared
            symbols |= {v.name: shared for v in dynamic}
        return symbols

    def _encode(self, kernel: Kernel, symbols: dict[str, int], i: Instruction, operand: Operand) -> list[_Operand]:
        if isinstance(operand, Register):
            return [_Operand(0, operand.index, int(operand.negated), 0, 0)]
        if isinstance(operand, Immediate):
            return [_Operand(1, -1, 0, 0, ctypes.c_int64(operand.value).value)]
        if isinstance(operand, Float):
            return [_Operand(2 if operand.width == 32 else 3, -1, 0, 0, ctypes.c_int64(operand.bits).value)]
        if isinstance(operand, Sink):
            return [_Operand(7, -1, 0, 0, 0)]
        if isinstance(operand, Vector):
            elements = [e for one in operand.elements for e in self._encode(kernel, symbols, i, one)]
            return [_Operand(5, -1, len(elements), 0, 0), *elements]
        if isinstance(operand, TensorAddress):
            (base,) = self._encode(kernel, symbols, i, operand.address)
            coordinates = self._encode(kernel, symbols, i, operand.coordinates)
            return [_Operand(9, base.reg, len(coordinates) - 1, 0, base.value), *coordinates[1:]]
        if isinstance(operand, Address):
            if isinstance(operand.base, Register):
                return [_Operand(4, operand.base.index, 0, 0, operand.offset)]
            value = 0
            if operand.base is not None:
                value = self._symbol(symbols, operand.base.text, i)
            return [_Operand(4, -1, 0, 0, value + operand.offset)]
        label = kernel.find(kernel.labels, i.scope, operand.text)
        if label is not None:
            return [_Operand(6, -1, 0, 0, label)]
        targets = kernel.find(kernel.targets, i.scope, operand.text)
        if targets is not None:
            labels = [kernel.find(kernel.labels, i.scope, t) for t in targets]
            return [_Operand(8, -1, len(labels), 0, 0), *(_Operand(6, -1, 0, 0, label) for label in labels)]
        return [_Operand(1, -1, 0, 0, self._symbol(symbols, operand.text, i) + operand.offset)]

    @staticmethod
    def _symbol(symbols: dict[str, int], name: str, i: Instruction) -> int:
        if name not in symbols:
            raise PtxError(f"PTX line {i.line}: '{name}' is not declared")
        return symbols[name]

    # ---- Launch
    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared_bytes: int = 0,
        seed: int = 0,
        *,
        cluster: int | Sequence[int] | None = None,
        dependent: Sequence[Buffer] = (),
        shuffle_blocks: bool = True,
        collectives_order: bool = False,
        limit: int = 200_000_000,
    ) -> Report:
        """Run a grid to its end or to a PtxFault.

        The seed draws the order of blocks (unless `shuffle_blocks` is off), of warps and of a warp's atomics.
        `cluster` is the size of a cluster in blocks, if the kernel does not declare it: its blocks run together.
        `dependent` are the buffers that the kernel before may still use, which this one may touch after
        `griddepcontrol.wait` only (a programmatic dependent launch).
        `collectives_order` lets shfl, vote, match and redux order memory among their lanes, which PTX does not promise.
        A run that executes more than `limit` warp instructions is considered endless.
        """
        compiled = self.kernel(kernel)
        grid, block = dim3(grid), dim3(block)
        threads = block[0] * block[1] * block[2]
        if not 0 < threads <= 1024 or min(grid) < 1:
            raise ValueError(f"grid {grid} of blocks {block} cannot be launched")
        clusters = self._cluster(compiled.kernel, grid, cluster)
        total = compiled.static_shared + shared_bytes
        capability = int(re.sub(r"\D", "", self.ptx.target) or 0)
        if total > 1024 * SHARED_LIMIT.get(capability, 227):
            raise ValueError(f"{total} bytes of shared memory are more than {self.ptx.target} has")
        shared = list(compiled.shared)
        if shared_bytes and compiled.dynamic_at is not None:
            shared.append((compiled.dynamic_at, shared_bytes))
        buffers = list(self.variables.values())
        maps: list[_TensorMap] = []
        params = self._pack(compiled, args, buffers, maps)
        if any(not any(buffer is known for known in buffers) for buffer in dependent):
            raise ValueError("a dependent buffer is no argument of the launch")
        counts = np.zeros((max(len(compiled.kernel.instructions), 1), len(COLUMNS)), np.uint64)

        def regions(places: Sequence[tuple[int, int]]) -> Any:
            return (_Region * max(len(places), 1))(*(_Region(*place) for place in places))

        places = [(at, p.size or 0) for at, p in zip(compiled.params, compiled.kernel.params, strict=True)]
        table = (_Buffer * max(len(buffers), 1))(*(self._buffer(k, b) for k, b in enumerate(buffers)))
        for buffer in dependent:
            table[next(k for k, known in enumerate(buffers) if known is buffer)].dependent = True
        # At entry a thread has an equal share of 64 Ki registers, unless .maxnreg says less; setmaxnreg starts from it.
        registers = compiled.kernel.max_registers or min(65536 // _align(threads, 128) // 8 * 8, 255)
        launch = _Launch(
            *((ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block), seed, limit, shared_bytes, total),
            *(regions(shared), len(shared), regions(compiled.local), len(compiled.local)),
            *(regions(places), len(places), params, len(params), table, len(buffers), counts.ctypes.data),
            *(shuffle_blocks, collectives_order, (ctypes.c_uint32 * 3)(*clusters), registers),
            *(
                cluster is not None or bool(compiled.kernel.cluster),
                0,
                (_TensorMap * max(len(maps), 1))(*maps),
                len(maps),
            ),
        )
        fault = _Fault()
        if library().ptx_launch(compiled.handle, ctypes.byref(launch), ctypes.byref(fault)):
            raise self._fault(compiled.kernel, fault)
        instructions = compiled.kernel.instructions
        return Report(
            kernel,
            [i.opcode for i in instructions],
            [i.line for i in instructions],
            [self._source(i) for i in instructions],
            counts.astype(np.int64),
        )

    @staticmethod
    def _cluster(kernel: Kernel, grid: tuple[int, int, int], asked: int | Sequence[int] | None) -> tuple[int, int, int]:
        own = dim3(kernel.cluster) if kernel.cluster else None
        size = own or dim3(1)
        if asked is not None:
            size = dim3(asked)
            if own not in (None, size):
                raise ValueError(f"'{kernel.name}' is compiled for clusters of {own} blocks, not {size}")
        if min(size) < 1 or size[0] * size[1] * size[2] > 16 or any(g % c for g, c in zip(grid, size, strict=True)):
            raise ValueError(f"a grid of {grid} blocks cannot have clusters of {size}")
        return size

    @staticmethod
    def _base(index: int, buffer: Buffer) -> int:
        return ((index + 1) << BUFFER_SHIFT) + BUFFER_OFFSET + buffer.misalign

    def _buffer(self, index: int, buffer: Buffer) -> _Buffer:
        initialised = buffer.initialised.ctypes.data if buffer.initialised is not None else None
        constant = self.ptx.variables[buffer.name].space == "const" if index < len(self.variables) else False
        name = (buffer.name or f"buffer {index - len(self.variables)}").encode()
        data = buffer.array.ctypes.data
        return _Buffer(
            *(
                self._base(index, buffer),
                buffer.array.nbytes,
                data,
                initialised,
                buffer.writable,
                constant,
                0,
                0,
                name,
                None,
            )
        )

    def _pack(self, compiled: _Compiled, args: Sequence[Any], buffers: list[Buffer], maps: list[_TensorMap]) -> bytes:
        params = compiled.kernel.params
        if len(args) != len(params):
            raise ValueError(f"'{compiled.kernel.name}' has {len(params)} parameters, not {len(args)}")

        def address(value: Any) -> int:
            if value is None:
                return 0
            if isinstance(value, Pointer):
                return address(value.buffer) + value.offset
            for index, known in enumerate(buffers):
                if known is value:
                    return self._base(index, known)
            buffers.append(value)
            return self._base(len(buffers) - 1, value)

        def tensor_map(value: TensorMap) -> bytes:
            base = address(value.buffer)
            value.check(base)
            rank = len(value.size)
            entry = _TensorMap(base, rank, value.element_bytes, value.swizzle)
            entry.size[:rank], entry.box[:rank] = value.size, value.box
            entry.stride[:rank] = (value.element_bytes, *value.strides)
            maps.append(entry)
            return struct.pack("<QQ112x", TENSOR_MAP_MAGIC, len(maps) - 1)

        data = b""
        for number, (at, param, arg) in enumerate(zip(compiled.params, params, args, strict=True)):
            if isinstance(arg, np.ndarray) and arg.ndim:
                arg = In(arg)
            if isinstance(arg, Buffer) and not arg.name:
                arg.name = f"argument {number}"
            size = param.size or 0
            if isinstance(arg, Struct):
                pointers = (Buffer, Pointer, type(None))
                values = (tensor_map(v) if isinstance(v, TensorMap) else v for v in arg.values)
                value = struct.pack(arg.format, *(address(v) if isinstance(v, pointers) else v for v in values))
            elif isinstance(arg, TensorMap):
                value = tensor_map(arg)
            elif isinstance(arg, bytes):
                value = arg
            elif arg is None or isinstance(arg, (Buffer, Pointer)):
                value = address(arg).to_bytes(8, "little")
            elif param.type in ("f32", "f64"):
                value = struct.pack("<f" if param.type == "f32" else "<d", arg)
            elif isinstance(arg, np.generic) and arg.dtype.kind == "f":
                value = arg.tobytes()
            elif isinstance(arg, float):
                raise TypeError(f"parameter {number} is of type .{param.type}, not a float")
            else:
                least, most = -(1 << 8 * TYPE_BYTES[param.type] - 1), (1 << 8 * TYPE_BYTES[param.type]) - 1
                if not least <= int(arg) <= most:
                    raise OverflowError(f"{arg} does not fit parameter {number} of type .{param.type}")
                value = (int(arg) & most).to_bytes(TYPE_BYTES[param.type], "little")
            if len(value) != size:
                raise ValueError(f"parameter {number} has {size} bytes, not {len(value)}")
            data = data.ljust(at - PARAM_START, b"\0") + value
        return data

    # ---- Places in the source
    def _source(self, i: Instruction) -> str:
        places = [f"{Path(self.ptx.files.get(file, '?')).name}:{line}" for file, line in i.source]
        return ", inlined at ".join(places)

    def _where(self, kernel: Kernel, pc: int) -> str:
        if not 0 <= pc < len(kernel.instructions):
            return "no instruction"
        i = kernel.instructions[pc]
        text = self.text.splitlines()[i.line - 1].strip()
        source = self._source(i)
        return f"PTX line {i.line} `{text}`" + (f" ({source})" if source else "")

    def _fault(self, kernel: Kernel, fault: _Fault) -> PtxFault:
        message = fault.message.decode(errors="replace")
        message = re.sub("\x01(\\d+)\x02", lambda match: self._where(kernel, int(match[1])), message)
        instruction = kernel.instructions[min(fault.pc, len(kernel.instructions) - 1)]
        where = (
            f"{kernel.name}, block {tuple(fault.block)}, thread {tuple(fault.thread)}, {self._where(kernel, fault.pc)}"
        )
        return PtxFault(
            *(fault.kind.decode(), message, where, instruction.line, self._source(instruction)),
            *(fault.block, fault.thread),
        )
