"""Read the machine code of a library of CUDA kernels with NVIDIA's cuobjdump; no GPU is needed and nothing is run.

This module finds the loops, registers and shared memory of each kernel. tools/gpu_model.py estimates speeds from them,
and tests/build/test_machine_code.py compares the machine code of each target with what the kernels' sources promise.
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
    """Yield the folders that may hold cuobjdump: those of the toolkit, triton and the package nvidia-cuda-cuobjdump."""
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
    """Return the path of cuobjdump, beside which lies nvdisasm, which it calls.

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
    """Yield the lines that cuobjdump prints about a library."""
    with subprocess.Popen([find_cuobjdump(), *options, library], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"cuobjdump {' '.join(options)} failed with {process.returncode} on {library}.")


# ---- names ---------------------------------------------------------------------------------------------------------

_SYMBOL = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}\d+([a-z_]+)(.*)")
# The first template argument of a kernel is the type of its output, or of the values that it packs or unpacks.
_TYPES = {"d": "float64", "f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16", "i": "int32"}
_TYPES["NS0_3BitE"] = "bits"
_TYPES |= {"h": "1 byte", "t": "2 bytes", "j": "4 bytes", "m": "8 bytes"}


class Kernel(NamedTuple):
    """A kernel as its mangled name describes it."""

    source: str  # the file, such as gemm_mma_sm80
    type: str  # "" if the kernel is no template
    sizes: tuple[int, ...]  # the template arguments of its Shape
    flags: tuple[bool, ...]
    vectors: bool  # whether pack reads vectors, the faster of its two ways
    symbol: str

    def __str__(self) -> str:
        """Return the name as C++ would write it."""
        way = ["Vectors" if self.vectors else "Values"] if self.source == "pack" else []
        arguments = [self.type, *map(str, self.sizes), *(str(flag).lower() for flag in self.flags), *way]
        return f"{self.source}<{', '.join(filter(None, arguments))}>"


def parse_symbol(symbol: str) -> Kernel:
    """Parse the mangled name of one of our kernels."""
    found = _SYMBOL.search(symbol)
    assert found, symbol
    source, _, rest = found.groups()
    kind = re.match(rf"I(?:NS0_2AsI)?({'|'.join(_TYPES)})", rest)
    sizes = tuple(int(size) for size in re.findall(r"Li(\d+)E", rest))
    flags = tuple(flag == "1" for flag in re.findall(r"Lb([01])E", rest))
    return Kernel(source, _TYPES[kind[1]] if kind else "", sizes, flags, "7Vectors" in rest, symbol)


# ---- instructions ----------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """A machine instruction."""

    address: int
    predicate: str  # such as @!P0, or ""
    name: str  # with its modifiers, such as LDG.E.128.CONSTANT
    operands: str

    @property
    def kind(self) -> str:
        """The name without its modifiers."""
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch jumps to."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None


# Each instruction is followed by its code in a comment; the second half of the code has a line of its own.
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/ +(?:(@!?U?PT?\d?) +)?([\w.]+)(?: +(.*?))? *;")


def parse_sass(lines: Iterable[str]) -> Iterator[tuple[Kernel, list[Instruction]]]:
    """Yield the kernels in the output of `cuobjdump -sass` one by one, because each is long."""
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
    """Yield every kernel of one target, such as sm_80, with its instructions."""
    return parse_sass(lines(library, "-sass", "-arch", target))


def count(names: Mapping[str, int], *kinds: str) -> int:
    """Return how many of the instructions, counted by name, are of some kinds."""
    return sum(number for name, number in names.items() if name.partition(".")[0] in kinds)


# ---- resources of a multiprocessor -----------------------------------------------------------------------------------


class Resources(NamedTuple):
    """The resources of a multiprocessor that a kernel takes."""

    registers: int  # registers of a thread
    shared: int  # bytes of static shared memory; from 9.0 on they include what the system reserves
    stack: int
    local: int


_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def parse_resources(lines: Iterable[str]) -> dict[str, dict[Kernel, Resources]]:
    """Parse the output of `cuobjdump -res-usage` into resources by target and kernel."""
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
    """Return the resources of each kernel, by each target for which the library has machine code."""
    return parse_resources(lines(library, "-res-usage"))


class Bounds(NamedTuple):
    """The values of __launch_bounds__."""

    threads: int
    blocks: int  # the least number of blocks that share a multiprocessor


def parse_bounds(lines: Iterable[str]) -> dict[Kernel, Bounds]:
    """Parse launch bounds from the output of `cuobjdump -ptx`; machine code does not hold them."""
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
    """Return the launch bounds of the kernels for which the library has PTX."""
    return parse_bounds(lines(library, "-ptx"))


def ptx_targets(library: Path) -> set[str]:
    """Return the targets for which the library has PTX, such as sm_80."""
    return {found[1] for line in lines(library, "-lptx") if (found := re.search(r"\.(sm_\w+)\.ptx", line))}


class Chip(NamedTuple):
    """The limits of a multiprocessor that its blocks share.

    They are those of the programming guide, "Technical Specifications per Compute Capability". Every chip has 65536
    registers; a warp gets them in groups of 256, and only from its own quarter of them.
    """

    warps: int
    blocks: int
    shared: int
    reserved: int  # bytes of shared memory that the system reserves for a block; 0 if cuobjdump counts them


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
    """Return how many blocks fit on a multiprocessor, given their threads and bytes of dynamic shared memory."""
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
        """Return whether an address lies in the loop."""
        return isinstance(address, int) and self.first <= address <= self.last

    def of(self, instructions: list[Instruction]) -> list[Instruction]:
        """Return the instructions of the loop."""
        return [i for i in instructions if i.address in self]


def loops(instructions: list[Instruction]) -> list[Loop]:
    """Return the loops, innermost first, without those behind the end of the kernel, where diverged warps run."""
    end = min((i.target for i in instructions if ".DIV" in i.name and i.target is not None), default=2**31)
    found = {Loop(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address < end}
    return sorted(found, key=lambda loop: loop.last - loop.first)


def main_loops(
    instructions: list[Instruction], kind: str, marks: Collection[str] = (), inner: bool = False
) -> list[Loop]:
    """Return the loops with the most instructions of a kind, among those that have any of the kinds `marks`, if given.

    Of nested loops, that is the outer one, or with `inner` the innermost.
    """
    counts = {loop: sum(i.kind == kind for i in loop.of(instructions)) for loop in loops(instructions)}
    counts = {loop: count for loop, count in counts.items() if count}
    if marks:
        counts = {loop: count for loop, count in counts.items() if any(i.kind in marks for i in loop.of(instructions))}
    if inner:
        around = {a for a in counts for b in counts if a != b and counts[b] and b.first in a and b.last in a}
        counts = {loop: count for loop, count in counts.items() if loop not in around}
    most = [loop for loop, count in counts.items() if count == max(counts.values())]
    return [loop for loop in most if not any(loop != other and loop.first in other for other in most)]


def one_pass(
    instructions: list[Instruction], loop: Loop, work: Collection[str], whole: Mapping[str, int]
) -> Counter[str]:
    """Count by name the instructions that a warp executes in one pass of a loop, far from all edges.

    That is the shortest of the ways through the loop with the most instructions of certain kinds.

    Args:
        instructions: All instructions of the kernel.
        loop: One of its loops.
        work: The kinds of instructions that count as work.
        whole: The number of instructions, by kind, that all passes of an inner loop execute together. The code does not
            show how many passes an inner loop makes.
    """
    inner = [other for other in loops(instructions) if other != loop and other.first in loop and other.last in loop]
    body = loop.of(instructions)
    times = _times(body, inner, whole)
    following = _best_ways(body, inner, times, work)
    # ptxas puts loads that are never executed before asynchronous copies: @!PT LDS RZ.
    names = {i.address: "NOP" if i.predicate == "@!PT" else i.name for i in body}
    counts: Counter[str] = Counter()
    address: int | None = loop.first
    while address is not None:
        counts[names[address]] += times[address]
        address = following[address]
    return counts


def _times(body: list[Instruction], inner: list[Loop], whole: Mapping[str, int]) -> dict[int, int]:
    """Return how often each instruction of a loop is executed in one pass that reaches it."""
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
    """Find the successor of each address on the way with the most work to the end of a loop, the shortest of several.

    Branches out of the loop are not followed. An inner loop whose branch back is always taken ends by another branch.
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
    """Return whether a branch is not always taken: a predicate guards it or its target, or threads diverge."""
    return bool(branch.predicate) or "," in branch.operands or ".DIV" in branch.name
