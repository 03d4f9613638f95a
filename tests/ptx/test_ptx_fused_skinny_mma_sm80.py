"""The PTX of csrc/cuda/gemm_fused_skinny_mma_sm80.cu equals the reference, and its mutants are caught.

How it packs x is tested for gemm_fused_skinny.cu too, with which it shares that code (csrc/cuda/fused.cuh).
"""

import functools
import itertools

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import Module, Report
from tools.ptx.mutate import assert_caught, remove_barriers, swap_fragments

from .fused import MOST_VALUES, WARPS, FusedCall, Shape, check_no_result, fused_call, plan
from .product import (
    BIT_EDITS,
    DRAWN,
    FULL,
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
    targets,
)

TARGETS = targets("sm_80", "sm_90a")
NAME = "gemm_fused_skinny_mma_sm80.cu"
SHAPE = Shape(unit=8, piece=16, most_units=8, most_rows=16)
STEP = 32 * 64  # the bits of K that a warp loads at once


def launch(module: Module, call: FusedCall, multiprocessors: int = 3, parts: int = 0, seed: int = 0) -> Report:
    """Launch the kernel as the launcher does, but with `parts` warps to a unit if that is not 0."""
    _, n, k, out, *_ = call.what
    divided = plan(SHAPE, n, k, multiprocessors, out, call.whole, parts)
    arguments = [call.with_multiprocessors(multiprocessors), divided.struct()]
    return module.launch(kernel(module, output_name(out)), divided.blocks, 32 * WARPS, arguments, seed=seed)


def check_fused(
    module: Module, m: int, n: int, k: int, out=torch.int32, *, multiprocessors=3, parts=0, seed=0, **more
) -> Report:
    """Check a product of random values."""
    call = fused_call(m, n, k, out, header=prepared_header(n, k), weight_padding=8, seed=seed, **more)
    report = launch(module, call, multiprocessors, parts, seed)
    call.check()
    if k % 512 == 0:  # the lanes of the last slice that have no words would have filled its wavefronts
        assert report.bank_conflicts == 0, report.conflicts_by_source()
    return report


def shapes() -> list[tuple[int, int, int, int, int]]:
    """Return m, n, k, parts and multiprocessors at the edges of rows, units, slices, steps and rounds."""
    edges = [(m, 9, 65, 0, 3) for m in (1, 2, 7, 8, 9, 15, 16)] + [(16, 9, k, 0, 1) for k in (0, 1, 31, 32, 127, 128)]
    m = itertools.cycle((16, 1, 9, 8, 15, 7))
    for parts in (2, 4, 8, 16):
        columns = 8 * WARPS // parts
        for n in (1, columns - 1, columns, columns + 1, 2 * columns + 3, 5 * columns + 1):
            edges.append((next(m), n, 200, parts, 2))
        for k in (512, 513, parts * STEP - 32, parts * STEP, parts * STEP + 33):
            edges.append((min(next(m), MOST_VALUES // (k + 127)), 9, k, parts, 2))
    generator = np.random.default_rng(0)
    drawn = np.stack([generator.integers(1, most, DRAWN) for most in (17, 300, 4000)], 1).tolist()
    return [*edges, *((*shape, 0, i % 5 + 1) for i, shape in enumerate(drawn))]


@pytest.mark.parametrize("target", TARGETS)
def test_fused(target):
    few = list(enumerate(shapes()))[TARGETS.index(target) % 2 :: 2]  # the targets differ in little
    for seed, (m, n, k, parts, multiprocessors) in seeded(shapes()) if FULL else few:
        more = {"parts": parts, "multiprocessors": multiprocessors, "seed": seed}
        check_fused(module(NAME, target), m, n, k, dtype=FLOATS[seed % 4], strict=seed % 3 == 1, **more)


def test_fused_takes_the_longest_rows():
    for m, k in ((1, MOST_VALUES), (2, MOST_VALUES // 2 - 5), (16, MOST_VALUES // 16), (13, 640)):
        check_fused(module(NAME, "sm_80"), m, 3, k, dtype=torch.bfloat16)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_fused_outputs(target, out):
    """The results are right for all kinds of scale and bias, and in each round."""
    n = 43
    vectors = channels_of(out, n)
    for more in vectors:
        check_fused(module(NAME, target), 11, n, 333, out, multiprocessors=1, **more)
    for parts in (2, 16):
        check_fused(module(NAME, target), 16, n, 333, out, multiprocessors=1, parts=parts, **vectors[-1])


def shapes_of_bits() -> list[tuple[int, int, int]]:
    n = (1, 31, 32, 33, 63, 64, 65, 96, 128, 129, 300)
    rows = itertools.cycle((1, 16, 7, 9))
    return [*((next(rows), n, 40) for n in n), *((16, 45, k) for k in (0, 1, STEP + 1))]


@pytest.mark.parametrize("target", TARGETS)
def test_fused_bits(target):
    for seed, (m, n, k) in seeded_bits(shapes_of_bits()):
        more = {"multiprocessors": seed % 3 + 1, "seed": seed, "flipped": seed % 4 > 0, "parts": (0, 2, 4)[seed % 3]}
        check_fused(module(NAME, target), m, n, k, torch.bool, **more)


def test_fused_moves_whole_sectors():
    report = check_fused(module(NAME, "sm_80"), 16, 256, 4096, parts=4, multiprocessors=8, dtype=torch.bfloat16)
    assert report.sectors == report.sectors_needed, report.excess_sectors_by_source()


@pytest.mark.parametrize("target", TARGETS)
def test_fused_reports_weights_prepared_for_another_product(target):
    run = functools.partial(launch, module(NAME, target), multiprocessors=1)
    check_wrong_forms(run, 3, 70, 700, fused_call)


@pytest.mark.parametrize("target", ["sm_75", "sm_120"])
def test_kernels_write_no_result_where_the_instruction_is_not(target):
    """The heuristics choose another kernel for these targets; if this one ran, no output would look like a result."""
    check_no_result(functools.partial(launch, module(NAME, target), multiprocessors=1))


def run_small(module: Module, seed: int) -> None:
    bias = torch.randn(43, generator=torch.Generator().manual_seed(seed))
    check = functools.partial(check_fused, module, out=torch.float32, seed=seed)
    check(13, 27, 2 * STEP + 1057, parts=2, multiprocessors=1, bias=bias[:27], scale=bias[:27].flip(0))
    check(16, 37, 1152, parts=8, multiprocessors=2, dtype=torch.bfloat16, bias=bias[:37])
    check(16, 27, 1024, parts=8, multiprocessors=1)
    check(13, 40, 1024, parts=2)
    check(5, 37, 1152, parts=16, multiprocessors=2, dtype=torch.float64, padding=2, strict=True)
    check(9, 70, 130, parts=4, multiprocessors=1, dtype=torch.float16, padding=1, strict=True)
    check(4, 3, 0)


def test_mutants_of_fused_are_caught():
    edits = [
        # These change edges.
        ("column < n && word + kSlice * slice + place < end", "word + kSlice * slice + place < end"),
        ("word + kSlice * slice + place < end)", "word + kSlice * slice + place <= end)"),
        ("if (at >= end) break;", "if (at >= end - kSlice) break;"),
        ("at + place < end;", "true;"),
        ("word < end; word += kStep", "word < end - kStep; word += kStep"),
        ("min(begin + plan.chunk, plan.width)", "begin + plan.chunk"),
        ("min(g, m - 1) * plan.pitch", "g * plan.pitch"),
        ("min(g + kUnit, m - 1) * plan.pitch", "(g + kUnit) * plan.pitch"),
        ("two_halves = m > kUnit", "two_halves = m > kUnit + 1"),
        ("i < m * columns", "i < m * columns - 1"),
        ("if (warp < m) {", "if (warp < m - 1) {"),
        ("i < width; i += kWarp", "i < width - 1; i += kWarp"),
        # These change which words a lane reads, and which sums it adds to.
        ("first_column(round + 1) : column", "first_column(round + 2) : column"),
        ("last ? begin : word + kStep", "last ? begin + kSlice : word + kStep"),
        ("last ? begin : word + kStep", "last ? begin : word"),
        ("unit * kUnit + g", "unit * kUnit + (g ^ 1)"),
        ("part = warp % plan.parts", "part = warp / units"),
        ("{top.x, bottom.x, top.y, bottom.y}", "{top.x, top.y, bottom.x, bottom.y}"),
        ("{top.z, bottom.z, top.w, bottom.w}", "{top.z, bottom.z, top.y, bottom.w}"),
        ("{b.z, b.w}", "{b.w, b.z}"),
        ("counter.add_difference(b, uint4{})", "counter.add_difference(b, top)"),
        ("weight_bits, 2);", "weight_bits, 4);"),
        ("4 * (2 * q + i % 2)", "4 * (2 * q + i / 2)"),
        ("bits - 2 * static_cast<uint32_t>(counts[i])", "bits - static_cast<uint32_t>(counts[i])"),
        ("x_bits[row] + *sum", "x_bits[0] + *sum"),
        ("channels[round % 2]", "channels[0]"),
        ("of_round = sums[round % 2]", "of_round = sums[0]"),
        ("*sum = 0;", ""),
        ("sums[0].words[i] = 0", "sums[0].words[i] = 1"),
        ("row / kUnit * 2 + column % 2", "column % 2 * 2 + row / kUnit"),
        ("tile.bias + j", "tile.bias + j + 1"),
        # These cause bank conflicts.
        ("kRegister = kWarp + kWarp / 2", "kRegister = kWarp"),
        ("(units == 2 ? 2 * kWords : kWords)", "(units == 2 ? 2 * kWords : 0)"),
    ]
    cxx = source_of_type(NAME)
    text = compiled(cxx, "sm_80")
    name = kernel(Module.from_ptx(text), "multiply_fused")
    barriers, fragments = remove_barriers(text, name), swap_fragments(text, name)[:13]  # registers of one instruction
    assert (len(barriers), len(fragments)) == (2, 13)
    assert_caught(text, [*edited(cxx, edits), *barriers, *fragments], run_small, seeds=range(2))


def test_mutants_of_bits_are_caught():
    def run(module: Module, seed: int) -> None:
        check = functools.partial(check_fused, module, out=torch.bool, seed=seed)
        check(13, 45, 1057, multiprocessors=1)
        check(16, 130, 33, parts=2)
        check(1, 31, 0, flipped=False)

    edits = [
        *BIT_EDITS,
        ("column + word * kWarp, ones", "column, ones"),
        ("channels.flips[word]", "channels.flips[0]"),
        ("row, column, j, different, tile", "row, column, j, different + 1, tile"),
    ]
    cxx = source_of_type(NAME, "boolean")
    assert_caught(compiled(cxx, "sm_80"), edited(cxx, edits), run, seeds=range(2))
