"""The PTX of csrc/cuda/gemm_skinny.cu equals the reference, and its mutants are caught."""

import functools
import itertools
import re

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import In, Module, Report
from tools.ptx.mutate import assert_caught, remove_barriers

from .product import (
    BIT_EDITS,
    DRAWN,
    TARGETS,
    Call,
    aligned_words_for,
    bit_shapes,
    ceil_div,
    channels_of,
    check_wrong_forms,
    compiled,
    edited,
    kernel,
    module,
    output_name,
    prepared_header,
    product_call,
    seeded,
    seeded_bits,
    source_of_type,
)

NAME = "gemm_skinny.cu"
LINE = 32  # the words of a line
# A shape has a maximum of rows of x and the weight rows of a group. Its values are the lines that a lane loads at once
# and the maximum of warps.
SHAPES = {(1, 4): (1, 8), (1, 1): (4, 16), (2, 4): (1, 8), (2, 1): (4, 16), (4, 2): (2, 8), (8, 2): (2, 8)}
SHAPES[16, 2] = (2, 8)


def columns_of(each: int, out: torch.dtype) -> int:
    """Return the columns of a block: those of its groups, or the 32 of a word."""
    return 32 if out is torch.bool else 4 * each


def launch(module: Module, call: Call, wide: bool = False, seed: int = 0) -> Report:
    """Launch the kernel as the launcher does, but with the wide shapes also for few columns."""
    m, n, k, out = call.what
    rows = next(r for r in (1, 2, 4, 8, 16) if m <= r)
    each = 2 if rows > 2 else 4 if wide else 1
    lines, most_warps = SHAPES[rows, each]
    across = columns_of(each, out) // (4 * each)
    pattern = rf"{output_name(out)}\w*ShapeILi{rows}ELi{each}ELi{lines}ELi{most_warps}E"
    width = aligned_words_for(k)
    warps = across * min(max(ceil_div(width, lines * LINE), 1), most_warps // across)
    blocks = ceil_div(n, across * 4 * each)
    return module.launch(kernel(module, pattern), blocks, 32 * warps, [call.fields, width], seed=seed)


def spread(call: Call) -> Call:
    """Put arbitrary words between the aligned words of a row and the next row, with strides that differ."""
    values = list(call.fields.values)
    for operand, more in ((0, 8), (3, 24)):
        words = values[operand].array
        values[operand] = In(np.concatenate([words, np.full((len(words), more), -1, np.int32)], 1))
        values[operand + 1] += more
    call.fields = type(call.fields)(call.fields.format, *values)
    return call


def check_skinny(
    module: Module, m: int, n: int, k: int, out=torch.int32, wide: bool = False, seed: int = 0, **more
) -> Report:
    """Check a product of random words."""
    more = {"header": prepared_header(n, k), **more}
    call = spread(product_call(m, n, k, out, seed=seed, aligned=True, **more))
    report = launch(module, call, wide, seed)
    call.check(report)
    assert report.bank_conflicts == 0, report.conflicts_by_source()
    return report


def shapes() -> list[tuple[int, int, int, bool]]:
    """Return shapes at the edges of rows, a block's columns, a step and all warps' steps, and random shapes."""
    edges = [(1, 2, k, True) for k in (1, 31, 32, 127, 128)]
    for (rows, each), (lines, warps) in SHAPES.items():
        columns, step = 4 * each, 32 * LINE * lines
        k = [0, 33, 129, step - 32, step, step + 1, step + 32]
        k += [warps * step + by for by in (-32, 0, 1, step + 32)]
        m = itertools.cycle(range(rows, rows // 2, -1) if rows < 16 else (16, 15, 9))
        n = itertools.cycle((columns + 1, 1, columns, columns - 1, 2 * columns + 5))
        edges += [(next(m), next(n), k, each == 4) for k in k]
    generator = np.random.default_rng(0)
    drawn = np.stack([generator.integers(1, most, DRAWN) for most in (17, 40, 9000)], 1).tolist()
    return [*edges, *((*shape, i % 2 == 0) for i, shape in enumerate(drawn))]


@pytest.mark.parametrize("target", TARGETS)
def test_skinny(target):
    for seed, (m, n, k, wide) in seeded(shapes()):
        check_skinny(module(NAME, target), m, n, k, wide=wide, seed=seed)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_skinny_outputs(target, out):
    """The results are right for all kinds of scale and bias."""
    n = 19
    vectors = channels_of(out, n)
    for more in vectors:
        check_skinny(module(NAME, target), 3, n, 333, out, **more)
    for rows, each in SHAPES:
        check_skinny(module(NAME, target), rows, n, 333, out, each == 4, **vectors[-1])


def shapes_of_bits() -> list[tuple[int, int, int, bool]]:
    """Return shapes at the edges of words and of rows, of a step, and of the steps of all warps that share K."""
    edges = [(m, n, k, n % 2 == 0) for m, n, k in bit_shapes(16, 32) if m <= 16]
    for (rows, each), (lines, warps) in SHAPES.items():
        step, parts = 32 * LINE * lines, warps * 4 * each // 32
        n = itertools.cycle((33, 31, 64, 1))
        edges += [(rows, next(n), k, each == 4) for k in (0, step + 1, parts * step + 32)]
    return edges


@pytest.mark.parametrize("target", TARGETS)
def test_skinny_bits(target):
    for seed, (m, n, k, wide) in seeded_bits(shapes_of_bits()):
        check_skinny(module(NAME, target), m, n, k, torch.bool, wide, seed, flipped=seed % 4 > 0)


@pytest.mark.parametrize("rows, each", SHAPES)
def test_skinny_moves_whole_sectors(rows, each):
    """A warp reads or writes all of each 32 bytes that an instruction touches, if its columns allow it."""
    report = check_skinny(module(NAME, "sm_80"), rows, 64, 8192, wide=each == 4)
    # A warp that writes two rows of a block of four columns writes half of two sectors.
    halves = 64 // 4 if (rows, each) == (2, 1) else 0
    assert report.sectors - report.sectors_needed == halves, report.excess_sectors_by_source()


@pytest.mark.parametrize("target", TARGETS)
def test_skinny_reports_weights_prepared_for_another_product(target):
    check_wrong_forms(functools.partial(launch, module(NAME, target)), 3, 75, 700)


@functools.cache
def small_source(dtype: str = "float32") -> str:
    """Return the kernel for one type of outputs and a few shapes alone."""
    text, shapes = re.subn(r".*return launch<As, Shape<(8, 2|4, 2|2, 4).*\n", "", source_of_type(NAME, dtype))
    assert shapes == 3
    return text


def run_small(module: Module, seed: int) -> None:
    bias = torch.randn(21, generator=torch.Generator().manual_seed(seed))
    check = functools.partial(check_skinny, module, out=torch.float32, seed=seed)
    check(m=13, n=13, k=16384 + 2048 + 65, bias=bias[:13], scale=bias[:13].flip(0))
    check(m=1, n=19, k=8192 + 1024 + 65, wide=True, bias=bias[:19])
    check(m=2, n=5, k=4096 + 129)
    check(m=1, n=3, k=0, wide=True)


def test_mutants_of_skinny_are_caught():
    edits = [
        # These change edges.
        ("j < weight_rows", "j <= weight_rows"),
        ("i * kApart < x_rows", "i * kApart <= x_rows"),
        ("j < weight_rows && kLine * line + kWords * place < left", "j < weight_rows"),
        ("place < left;", "place <= left;"),
        ("while (left > 0)", "while (left > kStep)"),
        ("i < product.m * kColumns", "i <= product.m * kColumns"),
        ("v + place < kValues", "true"),
        # These change which words a lane reads.
        ("begin = index * kStep", "begin = index * kLine * 3"),
        ("x += warps * kStep", "x += kStep"),
        ("weight += warps * kStep", "weight += (warps - 1) * kStep"),
        ("row += product.weight.stride", "row += product.x.stride"),
        ("x_next = kApart", "x_next = 2 * kApart"),
        ("group * kGroupLanes + place", "(group ^ 1) * kGroupLanes + place"),
        ("i % kGroups, place)", "(i + 1) % kGroups, place)"),
        # These change what is computed from the popcounts.
        ("(a & b) | (left_over & (a | b))", "(a & b) | (left_over & a)"),
        ("left_over ^= a ^ b", "left_over = a ^ b"),
        ("2 * twos", "twos"),
        ("lane & Bit ? odd : even", "lane & Bit ? even : odd"),
        ("add_lanes<4>(counts, lane);", ""),
        ("kPitch + group) * kEach", "kPitch + (group ^ 2)) * kEach"),
        ("sums[i] = 0", "sums[i] = 1"),
        ("{sums[i]}", "{sums[i ^ 4]}"),
        ("channels.bias + j", "channels.bias + j + 1"),
    ]
    text = compiled(small_source(), "sm_80")
    mutants = edited(small_source(), edits)
    barriers = remove_barriers(text, kernel(Module.from_ptx(text), "ShapeILi16E"))
    assert len(barriers) == 2
    assert_caught(text, [*mutants, *barriers], run_small, seeds=range(2))


def test_mutants_of_bits_are_caught():
    def run(module: Module, seed: int) -> None:
        check = functools.partial(check_skinny, module, out=torch.bool, seed=seed)
        check(m=13, n=45, k=2 * 2048 + 65)
        check(m=1, n=70, k=4 * 1024 + 65, wide=True)
        check(m=2, n=33, k=8192 + 1)
        check(m=1, n=31, k=0, flipped=False)

    edits = [
        *BIT_EDITS,
        # These change the columns and the part of K of a warp.
        ("threadIdx.x / kWarp / Block::kAcross, warps", "threadIdx.x / kWarp, warps"),
        ("warps = blockDim.x / kWarp / Block::kAcross", "warps = blockDim.x / kWarp"),
        ("% Block::kAcross * Shape", "% 2 * Shape"),
        ("column += across, sums += across", "sums += across"),
        ("column += across, sums += across", "column += across"),
        # These change where sums are.
        ("row * kGroups * Block::kPitch + group", "row * kGroups * Block::kAcross + group"),
        ("sums[row * Block::kRow + j]", "sums[row * Block::kRow + (j ^ 1)]"),
        ("kPitch = kBits<As> ? kAcross + 1", "kPitch = kBits<As> ? kAcross"),  # it causes bank conflicts
        # These change which lane has which column.
        ("channels.limits[lane]", "channels.limits[lane ^ 1]"),
        ("if (lane == 0) write_word", "if (lane < 2) write_word"),
    ]
    cxx = small_source("boolean")
    assert_caught(compiled(cxx, "sm_80"), edited(cxx, edits), run, seeds=range(2))
