"""The launchers of csrc/cuda, compiled unchanged, launch what they should, and their mutants are caught.

Other tests launch kernels as they expect the launchers to. Here the launchers launch them, and must agree.
"""

import ctypes
import math

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import In, Module, Out, PtxFault, Report, Struct

from . import (
    test_ptx_mma_sm75 as mma_sm75,
)
from . import (
    test_ptx_mma_sm80 as mma_sm80,
)
from . import (
    test_ptx_skinny as skinny,
)
from . import (
    test_ptx_skinny_mma_sm80 as skinny_mma_sm80,
)
from .launcher import INVALID_CONFIGURATION, INVALID_VALUE, NAMES, SUCCESS, TARGET, Launch, Launcher, library
from .product import (
    DTYPES,
    FULL,
    OUT_TYPES,
    Call,
    aligned_words_for,
    ceil_div,
    kernel,
    layout,
    module,
    output_name,
    product_call,
    source,
)
from .rows import row_grid
from .test_ptx_align import SEGMENT as ALIGN_SEGMENT
from .test_ptx_align import Job, check_align, no_job
from .test_ptx_pack import check_pack, segment, vector
from .test_ptx_pack import kernel_name as pack_name
from .test_ptx_pack_limited import SEGMENT as LIMITED_SEGMENT
from .test_ptx_pack_limited import check_pack_limited
from .test_ptx_popc import check_popc
from .test_ptx_unpack import ALL as VALUES
from .test_ptx_unpack import SIZES, check_unpack

OUTPUTS = [*FLOATS, torch.int32, torch.bool]
HALF = torch.bfloat16
TILES = list(mma_sm80.THREADS)
"""The tiles, in the order of Tile in csrc/cuda/heuristics.h."""
# Each entry is a launcher and a tile, which only gemm_mma_sm80 uses. The fused kernels are in
# test_ptx_fused_launchers.py, and gemm_wgmma_sm90a is in test_ptx_wgmma_launcher.py.
LAUNCHERS = [(name, 0) for name in NAMES if name not in ("gemm_mma_sm80", "gemm_wgmma_sm90a") and "fused" not in name]
LAUNCHERS += [("gemm_mma_sm80", i) for i in range(3)]
GEMMS = [launcher for launcher in LAUNCHERS if launcher[0].startswith("gemm")]
MOST_BLOCKS, MOST_VALUES, MOST_ROWS = 2**31 - 1, 2**31 - 1, 16
"""The largest number of blocks in a grid, of values in a row, and of rows of x in the skinny kernels."""
MOST_FRAGMENT_ROWS = 64
"""The number of rows up to which gemm_skinny_mma_sm80 takes more than these, with other shapes of blocks."""
ADDRESS = 1 << 40
NO_KERNEL_IMAGE, OUT_OF_RESOURCES = 209, 701  # values of cudaError_t that a device returns
each_launcher = pytest.mark.parametrize("which", LAUNCHERS, ids=lambda which: f"{which[0]}-{which[1]}")
each_gemm = pytest.mark.parametrize("which", GEMMS, ids=lambda which: f"{which[0]}-{which[1]}")


# ---- Jobs whose memory nobody reads ----------------------------------------------------------------------------------
def pack_job(m: int, k: int, dtype: int = 1, **changes: object) -> Struct:
    """Return a job in which any field may be changed; the functions below do the same."""
    fields = {"x": ADDRESS, "dtype": dtype, "m": m, "k": k, "stride": k, "strict": False, "threshold": 0.0}
    fields |= {"words": ADDRESS, "word_stride": ceil_div(k, 32), "in_range": None, "popcounts": None}
    return Struct(layout("Pack"), *(fields | changes).values())


def limited_job(m: int, k: int, dtype: int = 1, **changes: object) -> Struct:
    fields = {"x": ADDRESS, "dtype": dtype, "m": m, "k": k, "stride": k, "strict": False}
    fields |= {"limits": ADDRESS, "flips": None, "words": ADDRESS}
    return Struct(layout("PackLimited"), *(fields | changes).values())


def unpack_job(m: int, k: int, dtype: int = 1, **changes: object) -> Struct:
    fields = {"words": ADDRESS, "m": m, "k": k, "values": ADDRESS, "dtype": dtype}
    return Struct(layout("Unpack"), *(fields | changes).values())


def align_job(m: int, k: int, **changes: object) -> Struct:
    fields = {"words": ADDRESS, "m": m, "k": k, "aligned": ADDRESS, "popcounts": ADDRESS, "header": None}
    return Struct(layout("Align"), *(fields | changes).values())


def product_job(m: int, n: int, k: int, dtype: int = 4, **changes: object) -> Struct:
    stride = aligned_words_for(k)
    fields = {"x": ADDRESS, "x_stride": stride, "x_popcounts": ADDRESS}
    fields |= {"weight": ADDRESS, "weight_stride": stride, "weight_popcounts": ADDRESS}
    fields |= {"m": m, "n": n, "k": k, "y": ADDRESS, "dtype": dtype}
    fields |= {"scale": None, "scale_dtype": 0, "bias": None, "bias_dtype": 0, "wrong_form": None}
    assert set(changes) <= set(fields)
    return Struct(layout("Product"), *(fields | changes).values())


def job(launcher: Launcher, m: int, n: int, k: int, **changes: object) -> Struct:
    """Return a job of m rows of k values, and of n columns if it is a product."""
    if launcher.name.startswith("gemm"):
        return product_job(m, n, k, **changes)
    jobs = {"pack": pack_job, "pack_limited": limited_job, "unpack": unpack_job, "align": align_job}
    return jobs[launcher.name](m, k, **changes)


def launched(launcher: Launcher, job: Struct) -> Launch:
    """Return the one launch that the launcher must make."""
    error, launches = launcher(job)
    assert (error, len(launches)) == (SUCCESS, 1), (launcher.name, job)
    return launches[0]


def nothing(launcher: Launcher, job: Struct, error: int = SUCCESS, **more: int | Struct | None) -> None:
    """Assert that the launcher returns this error and launches nothing."""
    assert launcher(job, **more) == (error, []), (launcher.name, job)


# ---- Launches that are executed --------------------------------------------------------------------------------------
def check_product(launcher: Launcher, m: int, n: int, k: int, out: torch.dtype = torch.int32, **more) -> None:
    """Check a product of random words, launched as the kernel's own tests expect."""
    if launcher.name == "gemm_popc":
        check_popc(launcher, m, n, k, out, **more)
    elif launcher.name == "gemm_skinny":
        skinny.check_skinny(launcher, m, n, k, out, wide=m <= 2 and n >= 256 * 16, **more)
    elif launcher.name == "gemm_skinny_mma_sm80":
        tiles = 4 if n >= 256 * 32 else 2 if n >= 256 * 16 else 1
        skinny_mma_sm80.check_skinny(launcher, m, n, k, out, tiles, **more)
    elif launcher.name == "gemm_mma_sm75":
        mma_sm75.check_mma(launcher, m, n, k, out, **more)
    else:
        mma_sm80.check_mma(launcher, m, n, k, out, tile(launcher, m, n), **more)


def tile(launcher: Launcher, m: int, n: int, out: torch.dtype = torch.int32) -> tuple[int, int]:
    """Return the rows and columns of y that a block computes."""
    if launcher.name == "gemm_skinny_mma_sm80" and m > MOST_ROWS:
        return MOST_FRAGMENT_ROWS, 32
    if launcher.name.startswith("gemm_skinny") and out is torch.bool:
        return MOST_ROWS, 32
    if launcher.name == "gemm_skinny":
        return MOST_ROWS, 8 if m > 2 else 16 if n >= 256 * 16 else 4
    if launcher.name == "gemm_skinny_mma_sm80":
        return MOST_ROWS, 32 if n >= 256 * 32 else 16 if n >= 256 * 16 else 8
    return TILES[launcher.tile] if launcher.name == "gemm_mma_sm80" else (64, 64)


def check_pack_edges(pack: Launcher, dtype: torch.dtype) -> None:
    lanes, end = vector(dtype), segment(dtype)
    for strict in (False, True):
        check_pack(pack, dtype, 3, 3 * lanes, strict, lanes)
        check_pack(pack, dtype, 3, 3 * lanes, strict, 1)  # rows of other strides, lengths and starts
        check_pack(pack, dtype, 3, 3 * lanes + 1, strict, lanes - 1)
        check_pack(pack, dtype, 2, 3 * lanes, strict, misalign=dtype.itemsize)
    check_pack(pack, dtype, 1, 3 * lanes, padding=1)  # a single row has no stride
    check_pack(pack, dtype, 2, 0)
    for k in (end, end + 1, 2 * end + 1, 4 * end + 1):
        check_pack(pack, dtype, 3, k, threshold=None, aligned=True)
    check_pack(pack, dtype, 1, 8 * end + 1, popcounts=False)
    for k in (0, 8 * end + 1):
        check_pack(pack, dtype, 1, k, popcounts=False, beside=Job(9, 200))


def check_unpack_edges(unpack: Launcher, dtype: torch.dtype) -> None:
    lanes, end = vector(dtype), segment(dtype)
    for k in (1, 3 * lanes, 3 * lanes + 1, end, end + 1, 2 * end + lanes):
        check_unpack(unpack, dtype, 3, k)
    check_unpack(unpack, dtype, 1, 8 * end + 1)
    check_unpack(unpack, dtype, 3, 3 * lanes, misalign=dtype.itemsize)


def check_align_edges(align: Launcher) -> None:
    for m in (0, 1, 4, 5, 9):
        check_align(align, m, 200, header=True)
    for k in (0, 1, 128, ALIGN_SEGMENT, ALIGN_SEGMENT + 1, 2 * ALIGN_SEGMENT + 1, 5 * ALIGN_SEGMENT):
        check_align(align, 3, k, aligned=k != 1, header=k % 2 == 1)
    check_align(align, 9, 31, misalign=4)
    for m in (0, 3):
        check_align(align, m, 31, other=Job(9, 200))


def check_product_edges(launcher: Launcher) -> None:
    for m in (1, 2, 3, 4, 5, 8, 9, 16) if launcher.name.startswith("gemm_skinny") else ():
        check_product(launcher, m, 9, 65)
    for out in (torch.int32, torch.bool):
        rows, columns = tile(launcher, 16, 1, out)
        for m, n in ((rows, columns), (rows + (rows != MOST_ROWS), columns + 1)):
            for k in (0, 1, 129):
                check_product(launcher, m, n, k, out)
    bias = torch.randn(37, generator=torch.Generator().manual_seed(0))
    for out in FLOATS:
        check_product(launcher, 3, 37, 40, out, bias=bias, scale=bias.flip(0))
    if launcher.name.startswith("gemm_skinny"):
        # There are enough columns for wide blocks, or one too few; k fills all warps' steps, or one more.
        for n in (256 * 16 - 1, 256 * 16, 256 * 32 - 1, 256 * 32):
            for m in (1, 2):
                check_product(launcher, m, n, 33)
        for k in (32 * 8 * 32, 32 * 8 * 64 + 1, 32 * 16 * 128, 32 * 16 * 128 + 1):
            check_product(launcher, 1, 5, k)
        for m, k in ((1, 32 * 2 * 128), (1, 32 * 2 * 128 + 1), (3, 32 * 2 * 64 + 1), (16, 32 * 8 * 32 + 1)):
            check_product(launcher, m, 33, k, torch.bool)
        check_product(launcher, 1, 256 * 16, 32 * 4 * 32 + 1, torch.bool)
    if launcher.name == "gemm_skinny_mma_sm80":
        # k fills the steps of the fewest warps or of the most, or one more.
        for m, out, k in ((17, torch.int32, 4096), (32, torch.bool, 12289), (33, torch.bool, 4097), (64, HALF, 8192)):
            check_product(launcher, m, 5, k, out)
        check_product(launcher, 17, 4096 + 1, 33)  # more blocks than multiprocessors


def check_unaligned_output(launcher: Launcher) -> None:
    """Vectors are stored only if all rows of y start on 16 bytes."""
    for out in OUTPUTS:
        for misalign in (0, 4 if out is torch.bool else out.itemsize, 16):
            call = product_call(3, 16, 70, out, aligned=True)
            call.output.misalign = misalign
            launch = launched(launcher, call.fields)
            launch.run()
            call.check()
            if launcher.name.startswith("gemm_mma"):
                assert launch.arguments[-1] == bytes([misalign % 16 == 0])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_pack(dtype):
    pack = Launcher("pack")
    check_pack_edges(pack, dtype)
    assert pack.launched == {name for name in pack.ptx.kernels if f"pack_rowsI{DTYPES[dtype][1]}" in name}
    assert len(pack.launched) == 4


def test_pack_limited():
    pack = Launcher("pack_limited")
    for dtype in FLOATS:
        for k in (1, LIMITED_SEGMENT, LIMITED_SEGMENT + 1, 9 * LIMITED_SEGMENT):
            check_pack_limited(pack, dtype, 3, k)
    assert pack.launched == set(pack.ptx.kernels)


@pytest.mark.parametrize("dtype", VALUES, ids=lambda dtype: str(dtype)[6:])
def test_unpack(dtype):
    unpack = Launcher("unpack")
    check_unpack_edges(unpack, dtype)
    assert unpack.launched == {name for name in unpack.ptx.kernels if f"rowsI{SIZES[dtype.itemsize][0]}Lb" in name}
    assert len(unpack.launched) == 2


def test_align():
    check_align_edges(Launcher("align"))


@pytest.mark.parametrize(("target", "expected"), [(75, (SUCCESS, 75)), (90, (SUCCESS, 90)), (0, (NO_KERNEL_IMAGE, -1))])
def test_the_target_of_the_code(target, expected):
    """The dispatch is told for which target the kernels were compiled, or the error, after which none is left."""
    runtime, capability = library(), ctypes.c_int(-1)
    runtime.runtime_code(target)
    try:
        assert (runtime.launch_find_code(ctypes.byref(capability)), capability.value) == expected
        assert runtime.cudaGetLastError() == SUCCESS
    finally:
        runtime.runtime_code(90)


@each_gemm
def test_gemm(which):
    launcher = Launcher(*which)
    check_product_edges(launcher)
    check_unaligned_output(launcher)


def test_popc_takes_words_on_any_address():
    call = product_call(3, 66, 70)
    for value in call.fields.values:
        if isinstance(value, In):
            value.misalign = 4
    launched(Launcher("gemm_popc"), call.fields).run()
    call.check()


class TwoParts:
    """A module whose rows get at most two blocks, which take turns as 65535 do in rows too long for a test's memory."""

    def __init__(self, module: Module) -> None:
        self.module, self.ptx = module, module.ptx

    def launch(self, kernel: str, grid: tuple[int, int], *rest: object, **more: int) -> Report:
        assert grid[1] > 2
        return self.module.launch(kernel, (grid[0], 2), *rest, **more)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_rows_of_more_parts_than_a_grid_has(dtype):
    k = 5 * 8 * segment(dtype) + 3
    check_pack(TwoParts(module("pack.cu", TARGET)), dtype, 2, k, popcounts=False)
    check_unpack(TwoParts(module("unpack.cu", TARGET)), dtype, 2, k)


# ---- Launches that are not executed ----------------------------------------------------------------------------------
def check_nothing_to_do(launcher: Launcher) -> None:
    """Without an output there is no launch and no error; a tensor without elements has no memory."""
    gemm = launcher.name.startswith("gemm")
    null = {"x": None, "weight": None, "y": None, "x_popcounts": None, "weight_popcounts": None} if gemm else {}
    for k in (0, 1, 128, 70000):
        nothing(launcher, job(launcher, 0, 5, k, **null))
        if gemm:
            nothing(launcher, job(launcher, 5, 0, k, **null))
            nothing(launcher, job(launcher, 0, 0, k, **null))
    if launcher.name == "pack":
        nothing(launcher, pack_job(0, 70, popcounts=ADDRESS))
        nothing(launcher, pack_job(5, 0, x=None, words=None, in_range=ADDRESS))
    if launcher.name == "pack_limited":
        nothing(launcher, limited_job(5, 0, x=None, limits=None, words=None))
    if launcher.name == "unpack":
        nothing(launcher, unpack_job(5, 0, words=None, values=None))


def check_errors(launcher: Launcher) -> None:
    """Each error of kernels.h and the launchers is returned and nothing is launched; without it the job is launched."""

    def refused(m: int = 3, k: int = 200, **changes: object) -> None:
        nothing(launcher, job(launcher, m, 70, k, **changes), INVALID_VALUE)

    launched(launcher, job(launcher, 3, 70, 200))
    wrong = {"pack": [-1, 4, 5, 6, 7], "unpack": [-1, 7, 8], "gemm": [-1, 5, 7, 8], "align": []}
    for dtype in wrong[launcher.name.split("_")[0]]:
        refused(dtype=dtype)
    if not launcher.name.startswith("gemm") or launcher.name == "gemm_popc":
        return
    for operand in ("x", "weight"):
        for offset in (1, 2, 4, 8, 12):
            refused(**{operand: ADDRESS + offset})
        for more in (1, 2, 3, 5):
            refused(**{f"{operand}_stride": aligned_words_for(200) + more})
        if launcher.name in ("gemm_mma_sm80", "gemm_mma_int8_sm80"):
            refused(**{f"{operand}_popcounts": None})
        else:
            launched(launcher, job(launcher, 3, 70, 200, **{f"{operand}_popcounts": None}))
        refused(**{f"{operand}_stride": aligned_words_for(200) - 4})
    if launcher.name.startswith("gemm_skinny"):
        refused(m=17 if launcher.name == "gemm_skinny" else MOST_FRAGMENT_ROWS + 1)
        refused(k=MOST_VALUES + 1)
        launched(launcher, job(launcher, 16, 70, MOST_VALUES))
    if launcher.name == "gemm_mma_sm80":
        for tile in (-1, 3):
            nothing(launcher, job(launcher, 3, 70, 200), INVALID_VALUE, tile=tile)


def check_largest(launcher: Launcher) -> None:
    """The largest grids are launched, and those that are too large by one block are not."""
    for out in (torch.int32, torch.bool) if launcher.name.startswith("gemm") else ():
        rows, columns = tile(launcher, 5, 2**40, out)
        dtype = OUT_TYPES[out][0]
        sizes = [(5, MOST_BLOCKS * columns)]
        if launcher.name == "gemm_skinny_mma_sm80":
            for m in (17, MOST_FRAGMENT_ROWS):
                assert launched(launcher, product_job(m, MOST_BLOCKS * 32, 128, dtype)).grid == (MOST_BLOCKS, 1, 1)
            nothing(launcher, product_job(17, MOST_BLOCKS * 32 + 1, 128, dtype), INVALID_CONFIGURATION)
        if rows != MOST_ROWS:
            sizes += [(MOST_BLOCKS * rows, 7), (2**15 * rows, (2**16 - 1) * columns), (rows, columns * MOST_BLOCKS)]
            nothing(launcher, product_job(2**15 * rows, 2**16 * columns, 128, dtype), INVALID_CONFIGURATION)
            nothing(launcher, product_job(MOST_BLOCKS * rows + 1, 7, 128, dtype), INVALID_CONFIGURATION)
        nothing(launcher, product_job(5, MOST_BLOCKS * columns + 1, 128, dtype), INVALID_CONFIGURATION)
        for m, n in sizes:
            grid = launched(launcher, product_job(m, n, 128, dtype)).grid
            assert grid == (ceil_div(m, rows) * ceil_div(n, columns), 1, 1)
    if launcher.name.startswith("gemm"):
        return
    for k, rows in ((1, 8), (2**20, 1)):  # rows is the number of rows in a block
        assert launched(launcher, job(launcher, MOST_BLOCKS * rows, 0, k)).grid[0] == MOST_BLOCKS
        nothing(launcher, job(launcher, MOST_BLOCKS * rows + 1, 0, k), INVALID_CONFIGURATION)


def check_errors_of_the_runtime(launcher: Launcher) -> None:
    """A launch that fails is an error; so is a failed query before it, after which nothing is launched."""
    for error in (NO_KERNEL_IMAGE, OUT_OF_RESOURCES):
        nothing(launcher, job(launcher, 3, 70, 200), error, errors=(error, SUCCESS))
        launched(launcher, job(launcher, 3, 70, 200))
    if launcher.name == "gemm_mma_sm80" and TILES[launcher.tile] != mma_sm80.SMALL:
        nothing(launcher, product_job(3, 70, 200), INVALID_VALUE, errors=(SUCCESS, INVALID_VALUE))


def size(generator: np.random.Generator, most: int) -> int:
    """Return a random size from 1 on, small or large, and often a neighbour of a power of two."""
    value = int(2 ** generator.uniform(0, math.log2(most)))
    if generator.random() < 0.5:
        value = 2 ** (value.bit_length() - 1) * int(generator.integers(1, 4)) + int(generator.integers(-1, 2))
    return min(max(value, 1), most)


def check_rows_of_any_size(launcher: Launcher, generator: np.random.Generator) -> None:
    """Check a launch of pack, unpack or align, or the error of too many blocks."""
    m, k = size(generator, 2**36), size(generator, MOST_VALUES)
    address = ADDRESS + 16 * int(generator.integers(2))
    kind = int(generator.integers(4))  # the kind of arguments
    rows, more = m, []
    if launcher.name == "pack":
        dtype, lanes = FLOATS[kind], vector(FLOATS[kind])
        address += dtype.itemsize * int(generator.integers(2))
        stride = k + int(generator.integers(3)) * lanes // 2
        strict, popcounts = (bool(generator.random() < 0.5) for _ in range(2))
        vectors = address % 16 == 0 and k % lanes == 0 and (stride % lanes == 0 or m == 1)
        name, parts = pack_name(launcher, dtype, strict, vectors), not popcounts
        word_stride = aligned_words_for(k) if generator.random() < 0.5 else ceil_div(k, 32)
        segments = ceil_div(32 * word_stride, segment(dtype))
        fields = {"x": address, "stride": stride, "strict": strict, "word_stride": word_stride}
        asked = pack_job(m, k, kind, **fields, popcounts=ADDRESS if popcounts else None)
    elif launcher.name == "pack_limited":
        name, parts = kernel(launcher, rf"pack_limited_rowsI{DTYPES[FLOATS[kind]][1]}E"), True
        segments = ceil_div(32 * ceil_div(k, 32), LIMITED_SEGMENT)
        asked = limited_job(m, k, DTYPES[FLOATS[kind]][0])
    elif launcher.name == "unpack":
        dtype = list(VALUES)[int(generator.integers(len(VALUES)))]
        address += dtype.itemsize * int(generator.integers(2))
        whole = address % 16 == 0 and k % vector(dtype) == 0
        name, parts = kernel(launcher, rf"unpack_rowsI{SIZES[dtype.itemsize][0]}Lb{whole:d}E"), True
        segments = ceil_div(32 * ceil_div(k, 32), segment(dtype))
        asked, more = unpack_job(m, k, VALUES[dtype], values=address), [None]
    else:
        header = ADDRESS if kind % 2 else None
        name, parts, rows = kernel(launcher, "align_rows"), False, m + (-m % 4 if header else 0)
        segments = ceil_div(32 * ceil_div(k, 32), ALIGN_SEGMENT)
        asked, more = align_job(m, k, aligned=None if kind < 2 else ADDRESS, header=header), [rows, None]
    other, beside = None, 0
    if launcher.name in ("pack", "align") and generator.random() < 0.5:
        beside = size(generator, 2**35)
        other = align_job(beside, size(generator, MOST_VALUES))
        parts = False
    (blocks, shares), block = row_grid(rows, segments, parts)
    more += [other or no_job(), blocks] if launcher.name in ("pack", "align") else []
    blocks += ceil_div(beside, 8)
    if blocks > MOST_BLOCKS:
        nothing(launcher, asked, INVALID_CONFIGURATION, other=other)
    else:
        launcher.launch(name, (blocks, min(shares, 65535)), block, [asked, *more])


def check_product_of_any_size(launcher: Launcher, generator: np.random.Generator) -> None:
    """Check a launch as the kernel's own tests expect it, or the error of too many blocks."""
    few = launcher.name.startswith("gemm_skinny")
    most_rows = MOST_FRAGMENT_ROWS if launcher.name == "gemm_skinny_mma_sm80" else MOST_ROWS if few else 2**36
    m, n, k = (size(generator, most) for most in (most_rows, 2**36, MOST_VALUES))
    if few and generator.random() < 0.25:
        n = 256 * int(generator.integers(1, 3)) * 16 + int(generator.integers(-1, 2))  # where blocks become wide
    out = OUTPUTS[int(generator.integers(len(OUTPUTS)))]
    fields = product_job(
        m, n, k, OUT_TYPES[out][0], weight_stride=aligned_words_for(k) + 4 * int(generator.integers(9))
    )
    call = Call(fields, Out(np.zeros(0)), np.zeros(0), out, torch.empty(0), (m, n, k, out), None)
    rows, columns = tile(launcher, m, n, out)
    if ceil_div(m, rows) * ceil_div(n, columns) > MOST_BLOCKS:
        nothing(launcher, fields, INVALID_CONFIGURATION)
    elif launcher.name == "gemm_popc":
        name = kernel(launcher, rf"multiply_tilesI\w*{output_name(out)}")
        launcher.launch(name, ceil_div(m, 64) * ceil_div(n, 64), 256, [fields, ceil_div(n, 64)])
    elif launcher.name == "gemm_skinny":
        skinny.launch(launcher, call, wide=m <= 2 and n >= 256 * 16)
    elif launcher.name == "gemm_skinny_mma_sm80":
        skinny_mma_sm80.launch(launcher, call, columns // 8)
    elif launcher.name == "gemm_mma_sm75":
        mma_sm75.launch(launcher, call)
    else:
        mma_sm80.launch(launcher, call, (rows, columns))


def check_any_size(launcher: Launcher, count: int) -> None:
    """For random sizes, each launch is legal (Launch.check) and covers all rows and columns once."""
    generator = np.random.default_rng(LAUNCHERS.index((launcher.name, launcher.tile)))
    check = check_product_of_any_size if launcher.name.startswith("gemm") else check_rows_of_any_size
    launcher.execute = False
    for _ in range(count):
        check(launcher, generator)
    launcher.execute = True


@each_launcher
def test_nothing_to_do(which):
    check_nothing_to_do(Launcher(*which))


@each_launcher
def test_errors(which):
    check_errors(Launcher(*which))
    check_errors_of_the_runtime(Launcher(*which))


@each_launcher
def test_largest_grids(which):
    check_largest(Launcher(*which))


@each_launcher
def test_any_size(which):
    launcher = Launcher(*which)
    check_any_size(launcher, 1000)
    shape = "ShapeILi{}ELi{}E".format(*TILES[launcher.tile]) if launcher.name == "gemm_mma_sm80" else ""
    assert launcher.launched == {name for name in launcher.ptx.kernels if shape in name}


# ---- Mutants ---------------------------------------------------------------------------------------------------------
def run(launcher: Launcher) -> None:
    for check in (check_nothing_to_do, check_errors, check_errors_of_the_runtime, check_largest):
        check(launcher)
    check_any_size(launcher, 200)
    if launcher.name == "pack":
        check_pack_edges(launcher, torch.float32)
    elif launcher.name == "unpack":
        check_unpack_edges(launcher, torch.float16)
    elif launcher.name == "align":
        check_align_edges(launcher)
    else:
        check_unaligned_output(launcher)


MUTANTS = [
    ("pack", "reinterpret_cast<uintptr_t>(job.x) % 16 == 0 && ", ""),
    ("pack", "(job.stride % kVector<T> == 0 || job.m == 1)", "true"),
    ("pack", "segments == 0 && !job.popcounts", "segments == 0"),
    ("pack", "!job.popcounts && beside.m == 0)", "!job.popcounts)"),
    ("pack", "align_blocks(beside), stream", "0, stream"),
    ("align", "align_blocks(other), stream", "0, stream"),
    ("pack", "segments, !job.popcounts && beside.m == 0, align", "segments, true, align"),
    ("unpack", "reinterpret_cast<uintptr_t>(job.values) % 16 == 0 && ", ""),
    ("unpack", "if (job.k == 0) return cudaSuccess;", ""),
    ("pack_limited", "if (job.k == 0) return cudaSuccess;", ""),
    ("pack_limited", "job.m, segments, true", "job.m, segments, false"),
    ("unpack", "kMostParts = 65535", "kMostParts = 65536"),
    ("align", "std::max(rows, int64_t{1})", "rows"),
    ("align", "if (blocks > INT32_MAX)", "if (blocks > UINT32_MAX)"),
    ("align", "warps < kRowWarps && warps < segments", "warps < kRowWarps && warps <= segments"),
    ("gemm_popc", "tiles > INT32_MAX", "tiles > UINT32_MAX"),
    ("gemm_skinny", "product.m > kSkinnyRows || ", ""),
    ("gemm_skinny", "if (product.m > 8)", "if (product.m >= 8)"),
    (
        "gemm_skinny",
        "reinterpret_cast<uintptr_t>(operand.words) % 16",
        "reinterpret_cast<uintptr_t>(operand.words) % 8",
    ),
    ("gemm_skinny_mma_sm80", "|| !are_aligned(product)", ""),
    ("gemm_skinny_mma_sm80", "product.n >= kManyBlocks * 4 * kSide", "product.n > kManyBlocks * 4 * kSide"),
    ("gemm_skinny_mma_sm80", "product.n > kManyBlocks / 2 * ", "product.n >= kManyBlocks / 2 * "),
    ("gemm_skinny_mma_sm80", "many ? kFewestWarps : Shape::kWarps", "Shape::kWarps"),
    ("gemm_skinny_mma_sm80", "product.m > 2 * kSkinnyRows", "product.m >= 2 * kSkinnyRows"),
    ("gemm_skinny_mma_sm80", "kFewestWarps, many", "1, many"),
    ("gemm_skinny_mma_sm80", "product.m > kFragmentRows ||", "product.m >= kFragmentRows ||"),
    ("gemm_skinny", "1, Shape::kWarps / Block::kAcross)", "1, Shape::kWarps)"),
    ("gemm_skinny", "warps = parts * Block::kAcross", "warps = parts"),
    ("gemm_skinny", "ceil_div(product.n, Block::kColumns)", "ceil_div(product.n, Shape::kColumns)"),
    ("gemm_popc", "        case DType::boolean: return function(AsBits{});\n", ""),
    ("gemm_mma_sm75", "rows_on_16_bytes(product.y, product.n)", "true"),
    ("gemm_skinny", "operand.stride >= aligned_words_for(product.k)", "true"),
    ("gemm_mma_sm80", "kBytes > 48 * 1024", "kBytes > 96 * 1024"),
    (
        "gemm_mma_sm80",
        "if (const auto error = allow_shared_memory(kernel, kBytes); error != cudaSuccess) return error;",
        "static_cast<void>(allow_shared_memory(kernel, kBytes));",
    ),
    (
        "gemm_mma_sm80",
        "static_cast<void>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));\n"
        "    return cudaGetLastError();",
        "return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);",
    ),
    ("gemm_mma_sm80", "    const RelaxedCapture relaxed;\n", ""),
    ("gemm_mma_sm80", "row_tiles > INT32_MAX / column_tiles", "row_tiles * column_tiles > UINT32_MAX"),
    ("gemm_mma_int8_sm80", "|| !have_popcounts(product)", ""),
    ("gemm_mma_int8_sm80", "!are_aligned(product) || ", ""),
    ("gemm_mma_int8_sm80", "if (product.m == 0 || product.n == 0) return cudaSuccess;", ""),
]


# Each mutant is compiled, which takes seconds, so only `make ptx-full` has more than one of each launcher.
USUAL_MUTANTS = MUTANTS if FULL else {mutant[0]: mutant for mutant in MUTANTS}.values()


@pytest.mark.parametrize("name, old, new", USUAL_MUTANTS)
def test_mutants_of_launchers_are_caught(name, old, new):
    text = source(f"{name}.cu")
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
    with pytest.raises((AssertionError, PtxFault)):
        run(Launcher(name, text=text.replace(old, new)))


def test_all_mutants_change_the_sources():
    """Most of them are compiled in `make ptx-full` alone, so a text that is gone would be noticed late."""
    assert [(name, old) for name, old, _ in MUTANTS if source(f"{name}.cu").count(old) != 1] == []
