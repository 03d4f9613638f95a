"""The PTX of csrc/cuda/gemm_fused_skinny.cu equals the reference, and its mutants are caught."""

import functools
import itertools

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import Module, Report
from tools.ptx.mutate import assert_caught, remove_barriers

from .fused import MOST_VALUES, WARPS, FusedCall, Shape, fused_call, plan
from .product import (
    BIT_EDITS,
    DRAWN,
    FULL,
    TARGETS,
    channels_of,
    check_wrong_forms,
    compiled,
    edited,
    kernel,
    module,
    output_name,
    prepared_header,
    seeded,
    seeded_bits,
    source_of_type,
)

NAME = "gemm_fused_skinny.cu"
SHAPE = Shape(unit=4, piece=32, most_units=16, most_rows=4)
STEP = 32 * 128  # the bits of K that a warp loads at once


def launch(module: Module, call: FusedCall, multiprocessors: int = 3, parts: int = 0, seed: int = 0) -> Report:
    """Launch the kernel as the launcher does, but with `parts` warps to a unit if that is not 0."""
    m, n, k, out, *_ = call.what
    rows = 4 if m > 2 else m
    divided = plan(SHAPE, n, k, multiprocessors, out, call.whole, parts)
    name = kernel(module, rf"{output_name(out)}ELi{rows}E")
    arguments = [call.with_multiprocessors(multiprocessors), divided.struct()]
    return module.launch(name, divided.blocks, 32 * WARPS, arguments, seed=seed)


def check_fused(
    module: Module, m: int, n: int, k: int, out=torch.int32, *, multiprocessors=3, parts=0, seed=0, **more
) -> Report:
    """Check a product of random values."""
    call = fused_call(m, n, k, out, header=prepared_header(n, k), weight_padding=8, seed=seed, **more)
    report = launch(module, call, multiprocessors, parts, seed)
    call.check()
    return report


def shapes() -> list[tuple[int, int, int, int, int]]:
    """Return m, n, k, parts and multiprocessors at the edges of rows, units, lines, steps and rounds."""
    edges = [(m, 9, 65, 0, 3) for m in (1, 2, 3, 4)] + [(2, 9, k, 0, 1) for k in (0, 1, 31, 32, 127, 128, 129)]
    m = itertools.cycle((1, 4, 2, 3))
    for parts in (1, 2, 4, 8, 16):
        columns = 4 * WARPS // parts
        for n in (1, columns - 1, columns, columns + 1, 2 * columns + 3, 5 * columns + 1):
            edges.append((next(m), n, 200, parts, 2))
        for k in (1024, 1056, parts * STEP - 32, parts * STEP, parts * STEP + 33):
            if k <= MOST_VALUES // 4:
                edges.append((next(m), 7, k, parts, 2))
    generator = np.random.default_rng(0)
    drawn = np.stack([generator.integers(1, most, DRAWN) for most in (5, 300, 5000)], 1).tolist()
    return [*edges, *((*shape, 0, i % 5 + 1) for i, shape in enumerate(drawn))]


@pytest.mark.parametrize("target", TARGETS)
def test_fused(target):
    few = list(enumerate(shapes()))[TARGETS.index(target) % 2 :: 2]  # the targets differ in little
    for seed, (m, n, k, parts, multiprocessors) in seeded(shapes()) if FULL else few:
        more = {"parts": parts, "multiprocessors": multiprocessors, "seed": seed}
        check_fused(module(NAME, target), m, n, k, dtype=FLOATS[seed % 4], strict=seed % 3 == 1, **more)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_fused_packs(target, dtype, strict):
    """Rows of any stride and alignment are packed by the rule; the random values have NaN, infinities and zeros."""
    check = functools.partial(check_fused, module(NAME, target), dtype=dtype, strict=strict)
    lanes = 16 // dtype.itemsize
    for seed, k in enumerate((0, 1, 7, 8, 9, 33, 128, 256, 1000, 1024)):
        check(3, 5, k, seed=seed)
        check(2, 5, k, padding=lanes, seed=seed)
        check(1, 5, k, padding=1, seed=seed)
        check(4, 5, k, padding=1, seed=seed)
        check(2, 5, k, misalign=dtype.itemsize, seed=seed)
    # A thread takes one byte of x, or one and a group of loads more, or a row that other threads take too.
    for m, k in ((1, 4096), (2, 4096), (1, 4 * 4096), (1, 4 * 4096 + 128), (4, 4096 + 128), (3, 4096 + 1), (4, 8192)):
        check(m, 5, k)


def test_fused_takes_the_longest_rows():
    for m, k in ((1, MOST_VALUES), (1, MOST_VALUES - 5), (4, MOST_VALUES // 4), (3, MOST_VALUES // 3 // 128 * 128)):
        check_fused(module(NAME, "sm_80"), m, 3, k, dtype=torch.bfloat16)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_fused_outputs(target, out):
    """The results are right for all kinds of scale and bias, and in each round."""
    n = 43
    vectors = channels_of(out, n)
    for more in vectors:
        check_fused(module(NAME, target), 3, n, 333, out, multiprocessors=1, **more)
    for m in (1, 2, 4):
        check_fused(module(NAME, target), m, n, 333, out, multiprocessors=1, parts=16, **vectors[-1])


def shapes_of_bits() -> list[tuple[int, int, int]]:
    n = (1, 31, 32, 33, 63, 64, 65, 96, 128, 129, 300)
    return [*((m, n, 40) for m, n in zip(itertools.cycle((1, 2, 3, 4)), n)), *((3, 45, k) for k in (0, 1, STEP + 1))]


@pytest.mark.parametrize("target", TARGETS)
def test_fused_bits(target):
    for seed, (m, n, k) in seeded_bits(shapes_of_bits()):
        more = {"multiprocessors": seed % 3 + 1, "seed": seed, "flipped": seed % 4 > 0, "parts": (0, 1, 2)[seed % 3]}
        check_fused(module(NAME, target), m, n, k, torch.bool, **more)


@pytest.mark.parametrize("target", TARGETS)
def test_fused_has_no_bank_conflicts(target):
    """Where the columns of a round fill a warp, as they do in products of many columns, nothing waits for a bank."""
    for m, parts in ((1, 1), (2, 2), (4, 1), (4, 2), (1, 16)):
        report = check_fused(module(NAME, target), m, 200, 4096, parts=parts, dtype=torch.bfloat16)
        assert report.bank_conflicts == 0, report.conflicts_by_source()


def test_fused_moves_whole_sectors():
    """A warp reads all of each 32 bytes of global memory that an instruction touches, and x once a block."""
    report = check_fused(module(NAME, "sm_80"), 4, 256, 4096, parts=2, multiprocessors=8, dtype=torch.bfloat16)
    assert report.sectors == report.sectors_needed, report.excess_sectors_by_source()
    loads = sum(
        int(threads)
        for opcode, (_, threads, *_) in zip(report.opcodes, report.counts, strict=True)
        if opcode.startswith("ld.global.v4")
    )
    assert loads == 8 * 4 * 4096 * 2 // 16


@pytest.mark.parametrize("target", TARGETS)
def test_fused_reports_weights_prepared_for_another_product(target):
    run = functools.partial(launch, module(NAME, target), multiprocessors=1)
    check_wrong_forms(run, 3, 70, 700, fused_call)


def run_small(module: Module, seed: int) -> None:
    bias = torch.randn(43, generator=torch.Generator().manual_seed(seed))
    check = functools.partial(check_fused, module, out=torch.float32, seed=seed)
    check(3, 27, 2 * STEP + 1057, parts=2, multiprocessors=1, bias=bias[:27], scale=bias[:27].flip(0))
    check(4, 37, 1152, parts=8, multiprocessors=2, dtype=torch.bfloat16, bias=bias[:37])
    check(4, 37, 1408, parts=16, multiprocessors=2, dtype=torch.float64, padding=2, strict=True)
    check(4, 140, 40, parts=1, multiprocessors=1, strict=True)
    check(3, 5, 130, dtype=torch.float16, padding=1, strict=True)
    check(3, 9, 256, dtype=torch.float16, strict=True)
    check(4, 3, 0)


def test_mutants_of_fused_are_caught():
    edits = [
        # These change edges.
        ("column < n && word + kLine * line + place < end", "word + kLine * line + place < end"),
        ("word + kLine * line + place < end)", "word + kLine * line + place <= end)"),
        ("if (word + kLine * line >= end) break;", "if (word + kLine * line >= end - kLine) break;"),
        ("at < end ? *from : uint4{}", "*from"),
        ("word < end; word += kStep", "word < end - kStep; word += kStep"),
        ("min(begin + plan.chunk, plan.width)", "begin + plan.chunk"),
        ("min(i, m - 1) * plan.pitch", "i * plan.pitch"),
        ("i < m * columns", "i < m * columns - 1"),
        ("if (row < Rows) atomicAdd", "atomicAdd"),
        # These change which words a lane reads, and which sums it adds to.
        ("first_column(round + 1) : column", "first_column(round + 2) : column"),
        ("last ? begin : word + kStep", "last ? begin + kLine : word + kStep"),
        ("last ? begin : word + kStep", "last ? begin : word"),
        ("unit * kUnit + group", "unit * kUnit + group % 2"),
        ("part = thread / kWarp % plan.parts", "part = thread / kWarp / units"),
        ("row = lane % kGroupLanes", "row = lane / kGroupLanes"),
        ("channels[round % 2]", "channels[0]"),
        ("sums[round % 2]", "sums[0]"),
        ("*sum = 0;", ""),
        ("sums[0][i] = 0", "sums[0][i] = 1"),
        ("tile.bias + j", "tile.bias + j + 1"),
        # These change how x is packed.
        ("i * kFusedThreads < left) eights", "i * kFusedThreads <= left) eights"),
        ("if (i * kFusedThreads < left) {", "if (i * kFusedThreads < left - 1) {"),
        ("(words[i] ^ flip) &", "words[i] &"),
        ("(behind + kBehind) &", "(behind + kBehind + 1) &"),
        ("& ~(behind + kFromInfinity)", ""),
        ("(negative >> 2)", "(negative >> 1)"),
        ("negative >> 9 | negative >> 24", "negative >> 9 | negative >> 23"),
        ("max(min(values - 8 * byte, 8), 0)", "8"),
        ("i < left ? values[i] : 0", "i <= left ? values[i] : 0"),
        ("bits & ~(~0u << exist[i])", "bits"),
        ("negative ^ ~flip", "negative ^ flip"),
        ("byte -= row_bytes, from += x_wraps, to += place_wraps", "byte -= row_bytes, to += place_wraps"),
        ("byte -= row_bytes, from += x_wraps, to += place_wraps", "byte -= row_bytes, from += x_wraps"),
        ("byte >= row_bytes)", "byte > row_bytes)"),
        ("x_wraps = job.x.stride - 8 * row_bytes", "x_wraps = job.product.k - 8 * row_bytes"),
        ("(flip & 0x80000000u)} << 32", "flip} << 32"),
        ("words[i] ^ (flip & 0x80000000u)", "words[i]"),
    ]
    cxx = source_of_type(NAME)
    text = compiled(cxx, "sm_80")
    name = kernel(Module.from_ptx(text), "Li4E")
    barriers = remove_barriers(text, name)
    assert len(barriers) == 2
    assert_caught(text, [*edited(cxx, edits), *barriers], run_small, seeds=range(2))


def test_mutants_of_bits_are_caught():
    def run(module: Module, seed: int) -> None:
        check = functools.partial(check_fused, module, out=torch.bool, seed=seed)
        check(3, 45, 1057, multiprocessors=1)
        check(4, 130, 33, parts=1)
        check(1, 31, 0, flipped=False)

    edits = [
        *BIT_EDITS,
        ("column + word * kWarp, ones", "column, ones"),
        ("channels.flips[word]", "channels.flips[0]"),
        ("channels.limits[j]", "channels.limits[j % kWarp]"),
        ("row < product.m && column < product.n", "row < product.m"),
        ("row, column, j, *sum, tile", "row, column, j, *sum + 1, tile"),
    ]
    cxx = source_of_type(NAME, "boolean")
    assert_caught(compiled(cxx, "sm_80"), edited(cxx, edits), run, seeds=range(2))
