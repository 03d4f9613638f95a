"""Estimate from machine code how near the kernels can come to the peak of a chip: ``python -m tools.gpu_model``.

No hardware is used, and nothing is measured. A row of the main table is a kernel on a target. It lists the resources
of a multiprocessor that a thread and a block take, and the clocks for which one pass of a warp through the main loop,
far from all edges, keeps each part of the multiprocessor busy. All warps do the same, so the part that takes longest
bounds the loop. The share of the peak is the clocks of the part that the kernel is meant to keep busy (tensor cores,
popcounts or memory) divided by the clocks of the slowest part. The parts are:

    issue     4 instructions of warps a clock, one for each quarter of a multiprocessor
    tensor    multiply-adds of bits, or of bytes at an eighth of the rate; csrc/cuda/heuristics.h names the sources
    POPC      16 lanes a clock
    ALU       64 lanes a clock of logic, shifts, additions, comparisons and moves
    FMA       64 lanes a clock of integer multiply-adds, which nvcc uses for moves and additions too
    shared    128 bytes a clock of shared memory and L1, or the 32 lanes of a shuffle
    L2        bytes that leave it for the multiprocessor; unknown if the heuristics have no figure
    memory    bytes from or to the chip's memory, at the bandwidth of the data sheet

The rates of POPC, ALU, FMA and shuffles come from the CUDA C++ programming guide, "Arithmetic Instructions". The model
ignores that 10.0 and 12.0 may be faster, for example by doubled integer units, and that a 7.5 may have only 64 bytes of
shared memory a clock. It does not see latencies, which may be too long for the warps to hide; bank conflicts, of which
tests/ptx finds none; the starts and ends of blocks; and clocks that fall under load. So a share is an upper bound as
far as these rates hold, and a low share shows where to look.

The table after it has what the end of a product moves: the bytes that a block reads and writes beside the factors, and
the bytes that pass through memory before the next product has its words. A product that writes numbers leaves it to
another kernel to read and pack them; one that writes bits has written the words.

Three tables come first, because they need no library. Two of them estimate products by wgmma_sm90a on an H200, from the
rates that were measured there with a prototype of that kernel (csrc/DESIGN.md, "What hardware said"): times, and the
clocks and bytes they come from. Such a kernel has one block on each multiprocessor, whose copies, products and stores
overlap, so the slowest of its parts bounds the product, and the last epilogue follows it. The tile and the clocks are
those by which csrc/cuda/warpgroup_tiles.h chooses.

The third one is about few rows of real x on compute capability 9.0: how long it takes until a product has its words, if
each block packs x for itself, if the blocks of a cluster pack it together, and if a launch packs it, which is the
arithmetic by which csrc/cuda/heuristics.h chooses; and how long packing and product then take in all.
"""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tabulate import tabulate

from . import machine_code
from .machine_code import Instruction, Kernel, Resources

LIBRARY = Path(__file__).parents[1] / "bitorch_qlinear" / "_ops_cuda.so"
WARP = 32


class Work(NamedTuple):
    """The work of a warp in one pass of the main loop, by the source; tests compare machine code with it."""

    kind: str  # the instruction that does the work
    count: int  # the number of these instructions
    peak: str  # the part that a perfect kernel would keep busy
    multiplies: int = 0  # multiply-adds of bits on tensor cores
    l2: int = 0  # bytes from L2
    memory: int = 0  # bytes from and to the chip's memory
    dynamic: int = 0  # bytes of dynamic shared memory of a block
    also: tuple[str, ...] = ("LDG", "LDGSTS")  # kinds whose instructions in the loop are all executed in a pass
    inner: bool = False  # whether the main loop lies in another one, of rounds
    whole: Mapping[str, int] = MappingProxyType({})  # the instructions of inner loops, see machine_code.one_pass
    rates: Mapping[str, int] = MappingProxyType({})  # rates of its own instructions instead of the chip's
    marks: tuple[str, ...] = ()  # kinds of which the main loop has one, unlike loops of other work


def _popc(_: Kernel) -> Work:
    tile, stage, warps = 64, 32, 8
    count = tile * tile * stage // (warps * WARP)
    return Work("POPC", count, "POPC", l2=2 * tile * stage * 4 // warps, whole={"POPC": count, "STS": 8})


def _skinny(kernel: Kernel) -> Work:
    rows, each, lines, *_ = kernel.sizes
    weights = each * lines * WARP * 16
    return Work("POPC", rows * each * (2 * lines + 1), "memory", l2=weights + rows * lines * 128, memory=weights)


def _skinny_mma(kernel: Kernel) -> Work:
    fragments, tiles, slices, *_ = kernel.sizes
    row, rows = slices * 64, 16 * fragments  # bytes, and rows of x
    multiplies = rows * 8 * tiles * 8 * row
    weights = 8 * tiles * row
    return Work("BMMA", multiplies // (16 * 8 * 256), "memory", multiplies, l2=weights + rows * row, memory=weights)


def _fused_skinny(kernel: Kernel) -> Work:
    (rows,), lines = kernel.sizes, 4
    weights = lines * WARP * 16
    return Work("POPC", rows * (2 * lines + 1), "memory", l2=weights, memory=weights, also=("LDG", "LDS"), inner=True)


def _fused_skinny_mma(_: Kernel) -> Work:
    row = 4 * 64  # bytes
    multiplies = 16 * 8 * 8 * row
    weights = 8 * row
    return Work("BMMA", 8, "memory", multiplies, l2=weights, memory=weights, also=("LDG", "LDS"), inner=True)


def _mma_sm80(kernel: Kernel) -> Work:
    rows, columns, side, _ = kernel.sizes
    stage = (rows + columns) * 64  # bytes
    multiplies = side * side * 512
    count = multiplies // (16 * 8 * 256)
    return Work("BMMA", count, "tensor", multiplies, l2=stage * side * side // (rows * columns), dynamic=4 * stage)


def _mma_int8_sm80(kernel: Kernel) -> Work:
    work = _mma_sm80(kernel)
    count = work.multiplies // (16 * 8 * 32)
    # The multiply-adds lie in two inner loops over the bits of a byte; each takes 8 times as long as one of bits.
    return work._replace(kind="IMMA", count=count, multiplies=8 * work.multiplies, whole={"IMMA": count // 2})


def _mma_sm75(_: Kernel) -> Work:
    multiplies = 32 * 32 * 512
    return Work("BMMA", multiplies // (8 * 8 * 128), "tensor", multiplies, l2=2 * 64 * 64 // 4)


def _wgmma(kernel: Kernel) -> Work:
    columns, stages, _ = kernel.sizes
    multiplies = 128 * columns * 1024 // 4  # a warp's quarter of a stage
    stage = (128 + columns) * 128  # bytes
    return Work(
        *("BGMMA", 8, "tensor", multiplies, stage // 4),
        dynamic=stages * stage + 9 * 1024,  # with margins and barriers, at most
        rates=MappingProxyType({"multiplies": WARPGROUP.multiplies, "l2": WARPGROUP.l2}),
        also=("WARPGROUP",),
        inner=True,
    )


def _pack(kernel: Kernel) -> Work:
    values = 16 // {"float64": 8, "float32": 4}.get(kernel.type, 2)  # of a lane's 16 bytes
    return Work("POPC", 4, "memory", memory=4 * (WARP * 16 + 4 * values), marks=("SHFL", "VOTE"))  # others align


def _pack_with_range(kernel: Kernel) -> Work:
    work = _pack(kernel)
    return work._replace(memory=2 * work.memory - 4 * WARP * 16, also=(*work.also, "STG"))


def _unpack(kernel: Kernel) -> Work:
    values = 16 // int(kernel.type[0])
    return Work("STG", 4 * (1 if kernel.flags[0] else values), "memory", memory=4 * (WARP * 16 + 4 * values))


def _pack_limited(kernel: Kernel) -> Work:
    size = {"float64": 8, "float32": 4}.get(kernel.type, 2)
    # A value, a limit and a word of flips are loaded for each bit. 7.5 votes once more, behind a branch.
    return Work("LDG", 24, "memory", memory=8 * (WARP * size + 4))  # limits come from a cache


def _align(_: Kernel) -> Work:
    return Work("STG", 8, "memory", memory=8 * 2 * 4 * WARP)


WORKS: dict[str, dict[str, Callable[[Kernel], Work]]] = {
    "gemm_popc": {"": _popc},
    "gemm_skinny": {"": _skinny},
    "gemm_skinny_mma_sm80": {"": _skinny_mma},
    "gemm_mma_sm80": {"": _mma_sm80},
    "gemm_mma_int8_sm80": {"": _mma_int8_sm80},
    "gemm_mma_sm75": {"": _mma_sm75},
    "gemm_fused_skinny": {"": _fused_skinny},
    "gemm_fused_skinny_mma_sm80": {"": _fused_skinny_mma},
    "gemm_fused_cluster_sm90": {"": _fused_skinny_mma},
    "gemm_wgmma_sm90a": {"": _wgmma},
    "pack": {"": _pack, ", in range": _pack_with_range},
    "pack_limited": {"": _pack_limited},
    "unpack": {"": _unpack},
    "align": {"": _align},
}


class Epilogue(NamedTuple):
    """What a block with a whole tile of outputs does at its end."""

    rows: int
    columns: int
    read: int  # bytes of set bits, and of scale and bias (float32) or of limits and flips
    written: int  # bytes of outputs
    sectors: int  # 32-byte sectors that its stores touch, each store of a warp counted for itself
    between: float  # bytes that are moved before the next product has its words


_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "bits": 1 / 8}


def epilogue(kernel: Kernel) -> Epilogue | None:
    """Return what a block of a product does at its end, or None for another kernel."""
    match kernel.source, kernel.sizes:
        case "gemm_popc" | "gemm_mma_sm75", ():
            rows, columns = 64, 64
        case "gemm_skinny", (rows, each, *_):
            columns = 32 if kernel.type == "bits" else 4 * each
        case "gemm_skinny_mma_sm80", (fragments, tiles, *_):
            rows, columns = 16 * fragments, 8 * tiles
        case "gemm_mma_sm80" | "gemm_mma_int8_sm80", (rows, columns, *_):
            pass
        case "gemm_fused_skinny", (rows,):  # in a round, if each warp has a unit of its own
            columns = 64
        case "gemm_fused_skinny_mma_sm80" | "gemm_fused_cluster_sm90", ():
            rows, columns = 16, 64
        case "gemm_wgmma_sm90a", (columns, *_):
            rows = 128
        case _:
            return None
    size = _BYTES[kernel.type]
    written = int(rows * columns * size)
    channels = {"int32": 0, "bits": 4 + 1 / 8, "float64": 16}.get(kernel.type, 8)
    counts = 4 * (rows + columns) if kernel.source in _COUNTED else 0
    # Bits are stored by words, and numbers side by side. The next product's words are packed from numbers.
    sectors = written // 4 if kernel.type == "bits" else -(-written // 32)
    between = written if kernel.type == "bits" else 2 * written + rows * columns / 8
    return Epilogue(rows, columns, int(columns * channels) + counts, written, sectors, between)


_COUNTED = ("gemm_mma_sm80", "gemm_mma_int8_sm80", "gemm_wgmma_sm90a")
"""The kernels that count a & b, and so read the set bits of each row (csrc/cuda/records.h)."""


def epilogue_table(kernels: Iterable[Kernel], names: Collection[str]) -> list[list[object]]:
    """Return a row for each of the products of these names."""
    found = []
    for kernel in kernels:
        if str(kernel) in names and (end := epilogue(kernel)):
            sizes = (end.read, end.written, end.sectors, end.between, end.between / (end.rows * end.columns))
            found.append([list(WORKS).index(kernel.source), str(kernel), f"{end.rows} x {end.columns}", *sizes])
    return [line[1:] for line in sorted(found)]


class Rates(NamedTuple):
    """The rates of a multiprocessor per clock; None if no source gives one."""

    memory: float  # bytes
    multiplies: int | None  # multiply-adds of bits
    l2: int | None  # bytes


def _memory(gigabytes: float, multiprocessors: int, gigahertz: float) -> float:
    return gigabytes / multiprocessors / gigahertz


# Multiplies and L2 are those of csrc/cuda/heuristics.h, which has none for 7.5 and from 10.0 on. There multiplies are 8
# times the int8 rate: of the T4's data sheet for 7.5; from 10.0 on, where bits are multiplied as bytes, of the sources
# that csrc/cuda/gemm_mma_int8_sm80.cu names.
RATES = {
    "sm_75": Rates(_memory(320, 40, 1.59), 8192, None),  # T4
    "sm_80": Rates(_memory(2039, 108, 1.41), 16384, 47),  # A100 with 80 GB
    "sm_86": Rates(_memory(936, 82, 1.70), 8192, 16),  # RTX 3090
    "sm_89": Rates(_memory(1008, 128, 2.52), 8192, 16),  # RTX 4090
    "sm_90a": Rates(_memory(4800, 132, 1.75), 8192, 24),  # H200
    "sm_100": Rates(_memory(8000, 148, 1.85), 16384, None),  # B200
    "sm_120": Rates(_memory(1792, 170, 2.41), 8192, None),  # RTX 5090
}

TENSOR = re.compile(r"[BIHDQO]G?MMA")
SLOW = re.compile(r"POPC|FLO|BREV|MUFU|F2F|F2I|I2F$|I2I")
FUSED = re.compile(r"IMAD|FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2")
SHARED = re.compile(r"LD|ST|SHFL|ATOM|RED|LDGSTS")
# Control instructions and those of the uniform datapath occupy an issue slot and none of the units of the table.
ELSEWHERE = re.compile(
    r"U[A-Z]|SYNCS|WARPGROUP|BRA|BAR|BSSY|BSYNC|B2R|BMOV|CALL|CS2R|DEPBAR|EXIT|LDGDEPBAR|NOP|R2UR|S2|WARPSYNC|LDC|YIELD"
)


def clocks_of(name: str) -> dict[str, float]:
    """Return the clocks for which an instruction of a warp occupies each unit."""
    wide = re.search(r"\.(64|128)(?=\.|$)", name)
    if ELSEWHERE.match(name) or TENSOR.match(name):
        return {}
    if SHARED.match(name):
        return {"shared": int(wide[1]) / 32 if wide else 1}
    part, lanes = ("POPC", 16) if SLOW.match(name) else ("FMA", 64) if FUSED.match(name) else ("ALU", 64)
    return {part: WARP / lanes}


PARTS = ["issue", "tensor", "POPC", "ALU", "FMA", "shared", "L2", "memory"]


def estimate(passed: Counter[str], work: Work, rates: Rates) -> dict[str, float]:
    """Return the clocks for which one pass of a warp through a loop keeps each part of a multiprocessor busy."""
    clocks = dict.fromkeys(PARTS, 0.0)
    rates = rates._replace(**work.rates)
    clocks["issue"] = passed.total() / 4
    for name, count in passed.items():
        for part, each in clocks_of(name).items():
            clocks[part] += count * each
    clocks["tensor"] = work.multiplies / rates.multiplies if rates.multiplies else 0
    clocks["L2"] = work.l2 / rates.l2 if rates.l2 else 0
    clocks["memory"] = work.memory / rates.memory
    return clocks


def main_pass(instructions: list[Instruction], work: Work) -> Counter[str] | None:
    """Return the instructions of one pass of the main loop, or None if the kernel is empty on this target.

    nvcc makes two loops of one that tests a condition which does not change in it; the one with more work is taken.
    """
    kinds = (work.kind, *work.also)
    found = machine_code.main_loops(instructions, work.kind, work.marks, work.inner)
    passes = [machine_code.one_pass(instructions, loop, kinds, work.whole) for loop in found]
    return max(passes, key=lambda passed: (machine_code.count(passed, *kinds), -passed.total()), default=None)


class Warpgroup(NamedTuple):
    """Figures of an H200 whose multiprocessors all multiply by wgmma, measured (csrc/DESIGN.md)."""

    multiprocessors: int = 132
    gigahertz: float = 1.665  # at 8192^3; the clock falls under this load
    multiplies: int = 32768  # multiply-adds of bits per clock and multiprocessor
    shared: int = 128  # bytes per clock and multiprocessor
    l2: int = 40  # the same from L2
    end: int = 28  # clocks of the last epilogue for each column of a tile
    memory: float = 4.8e12  # bytes a second, of the data sheet
    pack: float = 3.9e12  # bytes a second that pack_bits reads and writes


WARPGROUP = Warpgroup()
_TILE_ROWS, _STAGE_BITS, _STEP_BITS = 128, 1024, 256


class Bound(NamedTuple):
    """The work of the busiest multiprocessor in a product by wgmma_sm90a, and the bytes that the product moves."""

    columns: int  # of a tile
    rounds: int  # tiles of this multiprocessor
    tensor: float  # clocks that its tensor cores are busy
    shared: float  # clocks that its shared memory is busy
    l2: int  # clocks that its copies from L2 take
    end: int  # clocks of its last epilogue, which nothing hides
    shared_bytes: int  # of this multiprocessor
    l2_bytes: int  # from L2 to all multiprocessors
    outputs: int
    chip: Warpgroup

    def micros(self, clocks: float) -> float:
        """Return the microseconds that clocks take."""
        return clocks / self.chip.gigahertz / 1e3

    @property
    def clocks(self) -> float:
        """The clocks of the slowest part of the multiprocessor, and of the last epilogue."""
        return max(self.tensor, self.shared, self.l2) + self.end

    def output(self, size: float) -> float:
        """Return the microseconds in which memory takes outputs of so many bytes each."""
        return self.outputs * size / self.chip.memory * 1e6

    def slowest(self, size: float = 2) -> str:
        """Return the name of the part that takes longest, if an output has so many bytes."""
        parts = {"tensor": self.tensor, "shared": self.shared, "L2": self.l2, "epilogue": self.end}
        return "output" if self.output(size) > self.micros(self.clocks) else max(parts, key=parts.__getitem__)

    def time(self, size: float = 2) -> float:
        """Return the microseconds that the product takes at least, if an output has so many bytes."""
        return max(self.micros(self.clocks), self.output(size))


def warpgroup_bound(m: int, n: int, k: int, columns: int, chip: Warpgroup = WARPGROUP) -> Bound:
    """Return the bounds of m x k times k x n by tiles of 128 rows and so many columns.

    The clocks from L2 and of the last epilogue are those of warpgroup_clocks in csrc/cuda/warpgroup_tiles.h.
    """
    tiles = -(-m // _TILE_ROWS) * -(-n // columns)
    rounds = -(-tiles // chip.multiprocessors)
    stages, steps = -(-k // _STAGE_BITS), -(-k // _STEP_BITS)
    copied = (_TILE_ROWS + columns) * _STAGE_BITS // 8
    # Each instruction of 64 rows reads its rows of x and all columns.
    read = _TILE_ROWS // 64 * (64 + columns) * _STEP_BITS // 8
    shared_bytes = rounds * (stages * copied + steps * read)
    return Bound(
        columns,
        rounds,
        tensor=rounds * steps * _TILE_ROWS * columns * _STEP_BITS / chip.multiplies,
        shared=shared_bytes / chip.shared,
        l2=rounds * stages * (copied // chip.l2),
        end=chip.end * columns,
        shared_bytes=shared_bytes,
        l2_bytes=tiles * stages * copied,
        outputs=m * n,
        chip=chip,
    )


def best_bound(m: int, n: int, k: int) -> Bound:
    """Return the bounds by the tile that best_warpgroup_tile in csrc/cuda/warpgroup_tiles.h chooses."""
    narrow, wide = (warpgroup_bound(m, n, k, columns) for columns in (128, 192))
    return wide if wide.l2 + wide.end < narrow.l2 + narrow.end else narrow


PRODUCTS = {
    **{f"{size}³": (size, size, size) for size in (1024, 2048, 4096, 8192, 16384)},
    "ViT-B, 256 images, 768 → 2304": (256 * 197, 2304, 768),
    "ViT-B, 256 images, 768 → 768": (256 * 197, 768, 768),
    "ViT-B, 256 images, 768 → 3072": (256 * 197, 3072, 768),
    "ViT-B, 256 images, 3072 → 768": (256 * 197, 768, 3072),
    "BERT-base, 32 × 128 tokens, 768 → 768": (4096, 768, 768),
    "BERT-base, 32 × 128 tokens, 768 → 3072": (4096, 3072, 768),
    "BERT-base, 32 × 128 tokens, 3072 → 768": (4096, 768, 3072),
    "LLaMA-7B, 2048 tokens, 4096 → 4096": (2048, 4096, 4096),
    "LLaMA-7B, 2048 tokens, 4096 → 11008": (2048, 11008, 4096),
    "LLaMA-7B, 2048 tokens, 11008 → 4096": (2048, 4096, 11008),
}


PROTOTYPE = {"2048³": 5.14, "4096³": 19.7, "8192³": 105.0, "16384³": 814.0}
"""The microseconds that a prototype with these tiles took on an H200, with outputs in bf16 (csrc/DESIGN.md)."""


def product_table() -> list[list[object]]:
    """Return a row of times for each product, by the tile that would be chosen."""
    found: list[list[object]] = []
    for name, (m, n, k) in PRODUCTS.items():
        bound = best_bound(m, n, k)
        parts = map(bound.micros, (bound.tensor, bound.shared, bound.l2, bound.end))
        pack = m * (2 * k + k / 8) / WARPGROUP.pack * 1e6
        tops = 2 * m * n * k / bound.time() / 1e6
        limits = (bound.output(2), bound.slowest(), bound.time(), PROTOTYPE.get(name, ""), tops, bound.time(1 / 8))
        found.append([name, f"128 x {bound.columns}", bound.rounds, *parts, *limits, pack])
    return found


def work_table() -> list[list[object]]:
    """Return a row for each product with the clocks and bytes that the times of product_table come from."""
    found: list[list[object]] = []
    for name, (m, n, k) in PRODUCTS.items():
        bound = best_bound(m, n, k)
        clocks = (bound.tensor, bound.shared, bound.l2, bound.end)
        sizes = (bound.shared_bytes, bound.l2_bytes, (m + n) * k / 8, 2 * m * n, m * n / 8)
        found.append([name, *clocks, *(size / 1e6 for size in sizes)])
    return found


def _in_digits(lines: list[list[object]]) -> list[list[object]]:
    """Return the same rows with each number as text of at least three digits, without an exponent."""

    def in_digits(value: object) -> object:
        if not isinstance(value, int | float):
            return value
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return [[in_digits(value) for value in line] for line in lines]


class FewRows(NamedTuple):
    """The figures of csrc/cuda/heuristics.h about few rows of real x on 9.0; times are in microseconds."""

    launch: float = 1.6  # of packing by a launch of its own
    hidden: float = 0.8  # the part of it that the product's launch hides
    packed_bytes: float = 49e3  # of x that a block packs in a microsecond
    cluster: float = 0.3  # what a cluster costs beside packing
    blocks: int = 8  # of a cluster


FEW_ROWS = FewRows()

PRODUCT = {
    **{(1, 4096): 2.36, (1, 8192): 3.20},  # by skinny, which counts no bits
    **{(m, 4096): packed - 1.15 for m, packed in {2: 4.63, 4: 4.79, 8: 4.87, 16: 5.07}.items()},
    **{(m, 8192): packed - 1.15 for m, packed in {2: 5.72, 4: 5.79, 8: 6.07, 16: 6.64}.items()},
    (256, 1024): 4.5,
}
"""Microseconds of the product of m rows of k values and k weight rows alone, its launch included.

Measured on an H200 in a graph with the weights in L2 (`packed x` in benchmarks/results/gpu/gpu.md), before the fused
kernels existed: these are taken to multiply in the same time. From 2 rows on it is skinny_mma_sm80, less the 1.15 of a
launch that counted the bits of x (8 rows: 4.87 and 5.30 packed and not, of which packing took 1.6; 6.07, 6.83 and 1.9).
256 × 1024 was not measured. It lies between 16 rows of 1024 × 1024, 3.6, and 1024 rows, 5.4 (csrc/DESIGN.md).
"""

TARGETS = {**{(m, k): most for k, most in ((4096, 3.2), (8192, 5.3)) for m in (1, 2, 4, 8, 16)}, (256, 1024): 4.5}
"""The most microseconds that these should take with x in bfloat16, in a graph.

The last one stands for cuBLAS, which took 3.8 for 16 × 1024 → 1024 and 5.5 for 1024 rows on an H200.
"""


def few_rows_table() -> list[list[object]]:
    """Return a row for each x in bfloat16 that has place in a block, and for one of 256 rows."""
    found: list[list[object]] = []
    launch = FEW_ROWS.launch - FEW_ROWS.hidden
    sizes = [(m, k) for k in (1024, 4096, 8192, 11008, 16384) for m in (1, 2, 4, 8, 16) if m * k <= 131072]
    for m, k in [*sizes, (256, 1024)]:
        alone = 2 * m * k / FEW_ROWS.packed_bytes
        cluster = alone / FEW_ROWS.blocks + FEW_ROWS.cluster
        chosen = "block" if alone <= launch else "cluster" if cluster <= launch else "launch"
        line = [f"{m} × {k}", 2 * m * k / 1000, alone, cluster, launch, chosen]
        if (m, k) in PRODUCT:
            total = PRODUCT[m, k] + {"block": alone, "cluster": cluster, "launch": launch}[chosen]
            most = TARGETS[m, k]
            line += [PRODUCT[m, k], total, most, "met" if total <= most else f"missed by {total - most:.1f}"]
        found.append(line)
    return found


def shown(kernel: Kernel) -> bool:
    """Return whether the table shows a kernel: one of those that differ only in result type or rule for signs."""
    if kernel.source == "pack":
        return kernel.type == "bfloat16" and kernel.flags == (False,)
    return kernel.type in ("bfloat16", "bits", "2 bytes", "")


def row(target: str, name: str, work: Work, passed: Counter[str], takes: Resources, threads: int) -> list[object]:
    """Return a line of the table."""
    blocks = machine_code.resident_blocks(machine_code.CHIPS[target], takes, threads, work.dynamic)
    clocks = estimate(passed, work, RATES[target])
    slowest = max(clocks, key=clocks.__getitem__)
    return [
        *(name, target, takes.registers, takes.shared + work.dynamic, f"{blocks} x {threads}", passed.total()),
        *(f"{clocks[part]:.0f}" if clocks[part] else "" for part in PARTS),
        *(slowest, f"{clocks[work.peak] / clocks[slowest]:.0%} of {work.peak}"),
    ]


def table(library: Path, targets: list[str]) -> list[list[object]]:
    """Return the rows by kernel and target, without kernels that are empty on a target."""
    used, bounds = machine_code.resources(library), machine_code.launch_bounds(library)

    def rows_of(target: str) -> list[tuple[int, str, list[object]]]:
        found = []
        for kernel, instructions in machine_code.disassemble(library, target):
            for what, work_of in WORKS[kernel.source].items() if shown(kernel) else ():
                work, name = work_of(kernel), f"{kernel}{what}"
                if passed := main_pass(instructions, work):
                    line = row(target, name, work, passed, used[target][kernel], bounds[kernel].threads)
                    found.append((list(WORKS).index(kernel.source), name, line))
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [row for rows in pool.map(rows_of, targets) for row in rows]
    # Sorting is stable, so the targets of a kernel stay in order.
    return [line for *_, line in sorted(found, key=lambda row: row[:2])]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, default=LIBRARY, help="the compiled CUDA operators")
    parser.add_argument("--target", choices=list(RATES), action="append", help="one target, or several (all)")
    options = parser.parse_args(arguments)
    print_products()
    print_few_rows()
    try:
        print_kernels(options.library, options.target or list(RATES))
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None


def print_products() -> None:
    """Print the estimates of products by wgmma_sm90a."""
    headers = ["wgmma_sm90a on an H200", "tile", "rounds", "tensor µs", "shared", "L2", "epilogue", "bf16 out"]
    headers += ["bound by", "at least", "prototype", "TOPS", "bits out", "packing x"]
    numbers = ["right"] * 9
    aligned = ("left", *numbers[:7], "left", *numbers[:5])
    print(tabulate(_in_digits(product_table()), headers=headers, disable_numparse=True, colalign=aligned))
    print(
        "\nAn estimate from rates that a prototype had on an H200. The columns are microseconds: how long each part is "
        "busy, the\nlast epilogue, which nothing hides, and the outputs in bf16 on their way to memory; how long the "
        "product takes at least\nwith outputs in bf16, and how long the prototype took (each size had its own clock, "
        f"the estimate has {WARPGROUP.gigahertz} GHz);\nhow long it takes with bits, and how long the launch before it "
        "packs x from bf16. A launch and the first copies come on\ntop, 1 to 2 µs. The tile is the one that the "
        "heuristics choose.\n"
    )
    headers = ["the same products", "tensor clocks", "shared", "L2", "epilogue", "shared MB", "L2 MB", "operands MB"]
    headers += ["bf16 out MB", "bits out MB"]
    print(tabulate(_in_digits(work_table()), headers=headers, disable_numparse=True, colalign=("left", *numbers)))
    print(
        "\nClocks of the busiest multiprocessor, and the bytes through its shared memory; bytes from L2 to all "
        "multiprocessors,\nof x and weights as words, and of the outputs.\n"
    )


def print_few_rows() -> None:
    """Print the estimates of products with few rows."""
    headers = ["bf16 x on 9.0", "KB", "each block packs it, µs", "a cluster", "a launch", "chosen"]
    print(tabulate(few_rows_table(), headers=[*headers, "product", "in all", "target", ""], floatfmt=".2f"))
    print(
        "\nAn estimate of the time until a product has the words of few rows of x. What a block packs in the time of a "
        "launch\nis left to it, even if a cluster is estimated faster. The launch costs 0.8 µs more if the product "
        "does not start before\nits end. The product is by k × k weights in L2, as measured on an H200 before x was "
        "packed in the same launch.\nFor 256 × 1024, product and target (cuBLAS in bf16) lie between what 16 and 1024 "
        "rows took.\n"
    )


def print_kernels(library: Path, targets: list[str]) -> None:
    """Print what the machine code of a library tells.

    Raises:
        FileNotFoundError: There is no cuobjdump.
        SystemExit: The library does not exist or lacks PTX.
    """
    if not library.exists():
        raise SystemExit(f"{library} does not exist: the CUDA operators are not built.")
    if not machine_code.ptx_targets(library):
        raise SystemExit(f"{library} has no PTX, which tells the blocks' sizes: build for all targets.")
    built = machine_code.resources(library)
    headers = ["kernel", "target", "registers", "shared", "blocks", "instructions", *PARTS, "bound by", "share"]
    lines = table(library, [target for target in targets if target in built])
    print(tabulate(lines, headers=headers, disable_numparse=True))
    print(
        "\nAn estimate from machine code and data sheets: no hardware was used. Registers of a thread; bytes of shared "
        "memory of a\nblock; blocks of so many threads that share a multiprocessor; instructions of a warp's pass of "
        "the main loop, and\nthe clocks for which it keeps each part of a multiprocessor busy.\n"
    )
    headers = ["kernel", "tile", "read", "written", "sectors", "to the next words", "of an output"]
    ends = epilogue_table(machine_code.launch_bounds(library), {str(line[0]) for line in lines})
    print(tabulate(ends, headers=headers, floatfmt=".3g"))
    print(
        "\nBytes at the end of a block with a whole tile: what it reads beside the factors and what it writes, and the "
        "sectors of\n32 bytes that its stores touch; bytes that are moved before the next product has its words, in "
        "all and of an output."
    )


if __name__ == "__main__":
    main()
