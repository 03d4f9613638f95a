"""The PTX of csrc/cuda/gemm_mma_sm75.cu equals the reference, and its mutants are caught."""

import functools

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import In, Module, Report
from tools.ptx.mutate import assert_caught, remove_barriers, swap_fragments

from .product import (
    BIT_EDITS,
    DRAWN,
    EDGE_EDITS,
    Call,
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
    targets,
    whole_vectors,
)

TARGETS = targets("sm_75", "sm_89")
NAME = "gemm_mma_sm75.cu"
TILE, STAGE, THREADS = 64, 512, 128


def launch(module: Module, call: Call, seed: int = 0) -> Report:
    """Launch the kernel as the launcher does."""
    m, n, _, out = call.what
    columns = ceil_div(n, TILE)
    name = kernel(module, rf"multiply_tilesI\w*{output_name(out)}")
    arguments = [call.fields, columns, whole_vectors(n, out)]
    return module.launch(name, ceil_div(m, TILE) * columns, THREADS, arguments, seed=seed)


def check_mma(
    module: Module, m: int, n: int, k: int, out: torch.dtype = torch.int32, seed: int = 0, **more: torch.Tensor
) -> Report:
    """Check a product of random words."""
    call = product_call(m, n, k, out, seed=seed, aligned=True, header=prepared_header(n, k), **more)
    report = launch(module, call, seed)
    call.check(report)
    assert report.bank_conflicts == 0, report.conflicts_by_source()
    return report


def shapes() -> list[tuple[int, int, int]]:
    """Return shapes at the edges of the tile, of 16-byte chunks and of stages, and random shapes."""
    k = [0, 1, 31, 32, 33, 127, 128, 129]
    k += [edge + by for edge in (STAGE, 2 * STAGE, 3 * STAGE) for by in (-32, -1, 0, 1, 32)]
    drawn = np.random.default_rng(0).integers(1, (140, 140, 3000), (DRAWN, 3)).tolist()
    return [
        *((m, 66, 40) for m in (1, 63, 64, 65, 131)),
        *((3, n, 40) for n in (1, 7, 8, 9, 31, 33, 63, 64, 65, 131)),
        *((2, 65, k) for k in k),
        *map(tuple, drawn),
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_mma(target):
    for seed, shape in seeded(shapes()):
        check_mma(module(NAME, target), *shape, seed=seed)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_mma_outputs(target, out):
    """Rows of y are whole vectors or not, with scale and bias."""
    for n in (80, 67):
        for more in channels_of(out, n):
            check_mma(module(NAME, target), 20, n, 333, out, **more)


@pytest.mark.parametrize("target", TARGETS)
def test_mma_bits(target):
    for seed, shape in seeded_bits([*bit_shapes(TILE, TILE), (18, 45, 3 * STAGE + 1)]):
        check_mma(module(NAME, target), *shape, torch.bool, seed, flipped=seed % 4 > 0)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
def test_mma_moves_whole_sectors(out):
    """A warp reads or writes all of each 32 bytes of global memory that an instruction touches."""
    report = check_mma(module(NAME, "sm_75"), 64, 64, 1024, out)
    assert report.sectors == report.sectors_needed, report.excess_sectors_by_source()


def test_mma_ignores_what_lies_behind_a_row():
    """Words between a row's aligned words and the next row may hold anything."""
    call = product_call(66, 70, 700, aligned=True)
    values = list(call.fields.values)
    for operand in (0, 3):
        words = values[operand].array
        values[operand] = In(np.concatenate([words, np.full((len(words), 8), operand - 1, np.int32)], 1))
        values[operand + 1] += 8
    call.fields = type(call.fields)(call.fields.format, *values)
    launch(module(NAME, "sm_75"), call)
    call.check()


@pytest.mark.parametrize("target", TARGETS)
def test_mma_reports_weights_prepared_for_another_product(target):
    check_wrong_forms(functools.partial(launch, module(NAME, target)), 3, 70, 700)


@pytest.mark.parametrize("target", ["sm_90a", "sm_120"])
def test_kernels_write_no_result_where_the_instruction_is_not(target):
    """The heuristics choose another kernel for these targets; if this one ran, no output would look like a result."""
    call = product_call(67, 70, 700, torch.bfloat16, aligned=True)
    launch(module(NAME, target), call)
    call.wrong_form[:] = [70, 700, 0, 0, 1]  # the kernel has no form to report
    call.check_no_result((0, 0))


def run_small(module: Module, seed: int) -> None:
    bias = torch.randn(70, generator=torch.Generator().manual_seed(seed))
    check_mma(module, 66, 70, 2 * STAGE + 130, torch.float32, bias=bias, scale=bias.flip(0), seed=seed)
    check_mma(module, 2, 65, 0, torch.float32, bias=bias[:65], seed=seed)
    check_mma(module, 3, 8, 2 * STAGE, torch.float32, seed=seed)


def test_mutants_of_mma_are_caught():
    edits = [
        ("row < rows && chunk", "row <= rows && chunk"),
        ("chunk < chunks", "chunk <= chunks"),
        ("row >= product.m", "row > product.m"),
        ("stage < count; ++stage", "stage + 1 < count; ++stage"),
        ("at, stage + 1, copies", "at, stage + 2, copies"),
        ("stages[stage % 2], at, sums", "stages[(stage + 1) % 2], at, sums"),
        ("copies, stages[(stage + 1) % 2]", "copies, stages[stage % 2]"),
        ("stage.x[row][chunk] =", "stage.x[row][chunk ^ 1] ="),
        ("8 * i + at.g][at.q]", "8 * i + (at.g ^ 1)][at.q]"),
        ("at.g / 2) + at.g % 2][at.q]", "at.g / 2) + at.g % 2][at.q ^ 2]"),
        ("x[i].*word, weight[j].*word", "x[i].*word, weight[i].*word"),
        ("x[i].*word, weight[j].*word", "x[i].x, weight[j].*word"),
        ("sums[i][j + c / 2][c % 2]", "sums[i][j][c % 2]"),
        ("channels.bias + column", "channels.bias + column + 1"),
    ]
    text = compiled(source_of_type(NAME), "sm_80")
    name = kernel(Module.from_ptx(text), "multiply_tiles")
    at_ptx = [*remove_barriers(text, name), *swap_fragments(text, name)[:1]]
    assert len(at_ptx) == 2 + 1
    assert_caught(text, [*edited(source_of_type(NAME), edits), *at_ptx], run_small, seeds=range(2))


def test_mutants_of_bits_are_caught():
    def run(module: Module, seed: int) -> None:
        check_mma(module, 66, 97, STAGE + 130, torch.bool, seed=seed)
        check_mma(module, 31, 33, 0, torch.bool, seed=seed, flipped=False)
        check_mma(module, 40, 31, 65, torch.bool, seed=seed)

    edits = [
        *BIT_EDITS,
        *EDGE_EDITS,
        # These change which rows and columns a lane has.
        ("(8 * i + c)", "(8 * i + 7 - c)"),
        ("column + kEach * at.q + c]", "column + kEach * at.q + (c ^ 1)]"),
        ("row + 8 * at.q + at.g, at", "row + 4 * at.g + at.q, at"),
        ("channels.flips[column / kWordBits]", "channels.flips[0]"),
        # These change the exchange of bytes.
        ("0x3715 : 0x6240", "0x6240 : 0x3715"),
        ("0x3276 : 0x5410", "0x3276 : 0x5432"),
        ("__shfl_xor_sync(kAllLanes, bytes, 2)", "__shfl_xor_sync(kAllLanes, bytes, 4)"),
        # These change which sums are counted.
        ("sums[i][c / 2][c % 2]", "sums[i][c % 4][c / 4]"),
        ("sums[i][c / 2][c % 2]", "sums[i ^ 1][c / 2][c % 2]"),
    ]
    cxx = source_of_type(NAME, "boolean")
    assert_caught(compiled(cxx, "sm_80"), edited(cxx, edits), run, seeds=range(2))
