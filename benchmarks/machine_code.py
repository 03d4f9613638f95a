"""Reads the machine code of a library of CUDA kernels, by NVIDIA's cuobjdump: no GPU is needed, and nothing is run.

What a kernel's loops and registers say is in here; what is made of it: benchmarks/gpu_model.py, which estimates, and
tests/build/test_machine_code.py, which holds each target's machine code to what the kernels' sources promise.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple


def _folders() -> Iterator[Path]:
    """Where cuobjdump may lie: with the toolkit that compiled, in triton's package, in PyPI's nvidia-cuda-cuobjdump."""
    nvcc = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]):
        if home:
            yield Path(home) / "bin"
    yield Path("/usr/local/cuda/bin")
    for package, below in (("triton", "backends/nvidia/bin"), ("nvidia", "cu*/bin"), ("nvidia", "cuda_cuobjdump/bin")):
        if spec := importlib.util.find_spec(package):
            for folder in spec.submodule_search_locations or ():
                yield from sorted(Path(folder).glob(below))


def find_cuobjdump() -> Path:
    """The tool that lists machine code, with nvdisasm, which it calls, beside it.

    Raises:
        FileNotFoundError: There is none.
    """
    for folder in _folders():
        if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            return folder / "cuobjdump"
    raise FileNotFoundError(
        "cuobjdump, which lists the machine code of kernels, is neither in a CUDA toolkit nor in triton's package: "
        "pip install nvidia-cuda-cuobjdump."
    )


def lines(library: Path, *options: str) -> Iterator[str]:
    """What cuobjdump prints of a library."""
    with subprocess.Popen([find_cuobjdump(), *options, library], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(options)} failed with {process.returncode} on {library}.")


# ---- names ---------------------------------------------------------------------------------------------------------

_SYMBOL = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}\d+([a-z_]+)(.*)")
# The first template argument of a kernel: its output's type, or what it packs or unpacks.
_TYPES = {"d": "float64", "f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16", "i": "int32"}
_TYPES |= {"h": "1 byte", "t": "2 bytes", "j": "4 bytes", "m": "8 bytes"}


class Kernel(NamedTuple):
    """A kernel as its mangled name tells it."""

    source: str  # the file, such as gemm_mma_sm80
    type: str  # "" where it is no template
    sizes: tuple[int, ...]  # of its Shape
    flags: tuple[bool, ...]
    vectors: bool  # pack's, of its two ways to read
    symbol: str

    def __str__(self) -> str:
        way = ["Vectors" if self.vectors else "Values"] if self.source == "pack" else []
        arguments = [self.type, *map(str, self.sizes), *(str(flag).lower() for flag in self.flags), *way]
        return f"{self.source}<{', '.join(filter(None, arguments))}>"


def parse_symbol(symbol: str) -> Kernel:
    """A kernel of ours from its mangled name."""
    found = _SYMBOL.search(symbol)
    assert found, symbol
    source, _, rest = found.groups()
    kind = re.match(rf"I(?:NS0_2AsI)?({'|'.join(_TYPES)})", rest)
    sizes = tuple(int(size) for size in re.findall(r"Li(\d+)E", rest))
    flags = tuple(flag == "1" for flag in re.findall(r"Lb([01])E", rest))
    return Kernel(source, _TYPES[kind[1]] if kind else "", sizes, flags, "7Vectors" in rest, symbol)


# ---- instructions ----------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    address: int
    predicate: str  # such as @!P0, or ""
    name: str  # with its modifiers, such as LDG.E.128.CONSTANT
    operands: str

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes to."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None


# The comment behind each instruction is its code, whose second half has a line of its own.
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/ +(?:(@!?U?PT?\d?) +)?([\w.]+)(?: +(.*?))? *;")


def parse_sass(lines: Iterable[str]) -> Iterator[tuple[Kernel, list[Instruction]]]:
    """The kernels in what `cuobjdump -sass` prints, one after the other: they are long."""
    symbol, instructions = "", []
    for line in lines:
        if found := _INSTRUCTION.match(line):
            address, predicate, name, operands = found.groups()
            instructions.append(Instruction(int(address, 16), predicate or "", name, operands or ""))
        elif "Function : " in line:
            if symbol:
                yield parse_symbol(symbol), instructions
            symbol, instructions = line.split("Function : ")[1].strip(), []
    if symbol:
        yield parse_symbol(symbol), instructions


def disassemble(library: Path, target: str) -> Iterator[tuple[Kernel, list[Instruction]]]:
    """Every kernel of one target, such as sm_80."""
    return parse_sass(lines(library, "-sass", "-arch", target))


def count(names: Mapping[str, int], *kinds: str) -> int:
    """Instructions of some kinds among those that are counted by name."""
    return sum(number for name, number in names.items() if name.partition(".")[0] in kinds)


# ---- what it takes of a multiprocessor -------------------------------------------------------------------------------


class Resources(NamedTuple):
    registers: int  # of a thread
    shared: int  # static, bytes; from 9.0 on with what the system reserves
    stack: int
    local: int


_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def parse_resources(lines: Iterable[str]) -> dict[str, dict[Kernel, Resources]]:
    """Resources by target and kernel, from what `cuobjdump -res-usage` prints."""
    used: dict[str, dict[Kernel, Resources]] = {}
    target = symbol = ""
    for line in lines:
        if line.startswith("arch = "):
            target = line.split()[2]
        elif line.startswith(" Function "):
            symbol = line.split()[1].rstrip(":")
        elif found := _RESOURCES.search(line):
            registers, stack, shared, local = map(int, found.groups())
            used.setdefault(target, {})[parse_symbol(symbol)] = Resources(registers, shared, stack, local)
    return used


def resources(library: Path) -> dict[str, dict[Kernel, Resources]]:
    """What each kernel takes, by target: those that the library has machine code for."""
    return parse_resources(lines(library, "-res-usage"))


class Bounds(NamedTuple):
    """What __launch_bounds__ says."""

    threads: int
    blocks: int  # that share a multiprocessor


def parse_bounds(lines: Iterable[str]) -> dict[Kernel, Bounds]:
    """The launch bounds in what `cuobjdump -ptx` prints: machine code does not tell them."""
    bounds: dict[Kernel, Bounds] = {}
    kernel = None
    for line in lines:
        if found := re.search(r"\.entry (\w+)", line):
            kernel = parse_symbol(found[1])
        elif kernel and (found := re.match(r"\.maxntid (\d+)", line)):
            bounds[kernel] = Bounds(int(found[1]), 1)
        elif kernel and (found := re.match(r"\.minnctapersm (\d+)", line)):
            bounds[kernel] = bounds[kernel]._replace(blocks=int(found[1]))
    return bounds


def launch_bounds(library: Path) -> dict[Kernel, Bounds]:
    """The launch bounds of the kernels that the library has PTX of."""
    return parse_bounds(lines(library, "-ptx"))


def ptx_targets(library: Path) -> set[str]:
    """The targets that the library has PTX for, as sm_80."""
    return {found[1] for line in lines(library, "-lptx") if (found := re.search(r"\.(sm_\w+)\.ptx", line))}


class Chip(NamedTuple):
    """What blocks share of a multiprocessor (programming guide, "Technical Specifications per Compute Capability").

    65536 registers are the same everywhere; a warp gets them by 256, and from the quarter of them that is its own.
    """

    warps: int
    blocks: int
    shared: int
    reserved: int  # of shared memory for each block; where cuobjdump counts it, 0


_KIB = 1024
CHIPS = {
    "sm_75": Chip(32, 16, 64 * _KIB, 0),
    "sm_80": Chip(64, 32, 164 * _KIB, _KIB),
    "sm_86": Chip(48, 16, 100 * _KIB, _KIB),
    "sm_89": Chip(48, 24, 100 * _KIB, _KIB),
    "sm_90a": Chip(64, 32, 228 * _KIB, 0),
    "sm_100": Chip(64, 32, 228 * _KIB, 0),
    "sm_120": Chip(48, 24, 100 * _KIB, 0),
}
_QUARTERS, _REGISTERS, _WARP, _REGISTER_UNIT = 4, 65536, 32, 256


def resident_blocks(chip: Chip, used: Resources, threads: int, dynamic: int = 0) -> int:
    """How many blocks of so many threads, with so many bytes of dynamic shared memory each, find room."""
    warps = -(-threads // _WARP)
    of_warp = -(-used.registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    room = min(chip.warps, _REGISTERS // _QUARTERS // of_warp * _QUARTERS)
    shared = used.shared + dynamic + chip.reserved
    return min(chip.blocks, room // warps, chip.shared // shared if shared else chip.blocks)


# ---- loops -----------------------------------------------------------------------------------------------------------


class Loop(NamedTuple):
    """A loop: the instructions from a backward branch's target to the branch."""

    first: int
    last: int

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and self.first <= address <= self.last

    def of(self, instructions: list[Instruction]) -> list[Instruction]:
        return [i for i in instructions if i.address in self]


def loops(instructions: list[Instruction]) -> list[Loop]:
    """Innermost first; without the ways of warps whose threads have parted, which lie behind the kernel's end."""
    end = min((i.target for i in instructions if ".DIV" in i.name and i.target is not None), default=2**31)
    found = {Loop(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address < end}
    return sorted(found, key=lambda loop: loop.last - loop.first)


def main_loops(instructions: list[Instruction], kind: str) -> list[Loop]:
    """The loops that hold most of the instructions of a kind; of nested ones the outer."""
    counts = {loop: sum(i.kind == kind for i in loop.of(instructions)) for loop in loops(instructions)}
    most = [loop for loop, count in counts.items() if count == max(counts.values()) > 0]
    return [loop for loop in most if not any(loop != other and loop.first in other for other in most)]


def one_pass(
    instructions: list[Instruction], loop: Loop, work: Collection[str], whole: Mapping[str, int]
) -> Counter[str]:
    """Instructions by name that a warp executes in one pass of a loop, far from all edges.

    That is the shortest of the ways through the loop with the most instructions of certain kinds.

    Args:
        instructions: All of the kernel.
        loop: One of its loops.
        work: Those kinds.
        whole: By kind, how many instructions all passes of an inner loop have together: how often an inner loop is
            passed is not to be seen in its code.
    """
    inner = [other for other in loops(instructions) if other != loop and other.first in loop and other.last in loop]
    body = loop.of(instructions)
    times = _times(body, inner, whole)
    following = _best_ways(body, inner, times, work)
    # ptxas sets loads that never happen before asynchronous copies: @!PT LDS RZ.
    names = {i.address: "NOP" if i.predicate == "@!PT" else i.name for i in body}
    counts: Counter[str] = Counter()
    address: int | None = loop.first
    while address is not None:
        counts[names[address]] += times[address]
        address = following[address]
    return counts


def _times(body: list[Instruction], inner: list[Loop], whole: Mapping[str, int]) -> dict[int, int]:
    """How often each instruction of a loop is executed in one pass that comes by it."""
    times = dict.fromkeys((i.address for i in body), 1)
    for loop in inner:
        counts = Counter(i.kind for i in loop.of(body))
        kind = next((kind for kind in whole if counts[kind]), None)
        assert kind, f"an inner loop at {loop.first:#x} of unknown passes"
        passes, rest = divmod(whole[kind], counts[kind])
        assert passes and not rest, f"an inner loop of {counts[kind]} {kind} does not make {whole[kind]}"
        for i in loop.of(body):
            times[i.address] *= passes
    return times


def _best_ways(
    body: list[Instruction], inner: list[Loop], times: Mapping[int, int], work: Collection[str]
) -> dict[int, int | None]:
    """Which instruction follows each on the way to the loop's end with the most work, of several the shortest.

    Branches out of the loop are no way. An inner loop whose branch back is always taken is left by another of its own.
    """
    ends = {loop.last: loop for loop in inner}
    value: dict[int, tuple[int, int]] = {}
    following: dict[int, int | None] = {}
    for i, after in reversed(list(zip(body, [*body[1:], None], strict=True))):
        to = [] if after is None or (i.kind == "BRA" and not conditional(i)) else [after.address]
        to += _targets(ends[i.address].of(body) if i.address in ends else [i])
        ways = [address for address in to if i.address < address <= body[-1].address]
        following[i.address] = max(ways, key=value.__getitem__, default=None)
        done, left = max((value[address] for address in ways), default=(0, 0))
        value[i.address] = done + times[i.address] * (i.kind in work), left - times[i.address]
    return following


def _targets(instructions: list[Instruction]) -> list[int]:
    return [i.target for i in instructions if i.target is not None]


def conditional(branch: Instruction) -> bool:
    """Whether a branch is not always taken: by a predicate before it or before its target, or if threads diverge."""
    return bool(branch.predicate) or "," in branch.operands or ".DIV" in branch.name
