"""csrc/cuda/gemm_mma_sm75.cu, executed as PTX against the reference; and its mutants."""

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import In, Module, PtxFault, Report
from tools.ptx.mutate import assert_caught, remove_barriers, swap_fragments

from .product import (
    DRAWN,
    DTYPES,
    Call,
    ceil_div,
    channels_of,
    compiled,
    edited,
    float32_source,
    kernel,
    module,
    prepared_header,
    product_call,
    seeded,
    targets,
    total_letter,
)

TARGETS = targets("sm_75", "sm_89")
NAME = "gemm_mma_sm75.cu"
TILE, STAGE, THREADS = 64, 512, 128


def launch(module: Module, call: Call, seed: int = 0) -> Report:
    """As the launcher does it."""
    m, n, _, out = call.what
    columns = ceil_div(n, TILE)
    name = kernel(module, rf"multiply_tilesI\w*AsI{DTYPES[out][1]}{total_letter(out)}E")
    arguments = [call.fields, columns, n * out.itemsize % 16 == 0]
    return module.launch(name, ceil_div(m, TILE) * columns, THREADS, arguments, seed=seed)


def check_mma(
    module: Module, m: int, n: int, k: int, out: torch.dtype = torch.int32, seed: int = 0, **more: torch.Tensor
) -> Report:
    """A product of random words."""
    call = product_call(m, n, k, out, seed=seed, aligned=True, header=prepared_header(n, k), **more)
    report = launch(module, call, seed)
    call.check()
    assert report.bank_conflicts == 0, report.conflicts_by_source()
    return report


def shapes() -> list[tuple[int, int, int]]:
    """Edges of the tile, of 16-byte chunks and of stages, and random shapes."""
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
    """Rows of y that are whole vectors, and that are not; with scale and bias."""
    for n in (80, 67):
        for more in channels_of(out, n):
            check_mma(module(NAME, target), 20, n, 333, out, **more)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
def test_mma_moves_whole_sectors(out):
    """Of each 32 bytes of global memory that a warp touches at once it reads or writes all."""
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
def test_mma_traps_on_weights_prepared_for_another_product(target):
    m, n, k = 3, 70, 700
    launch(module(NAME, target), product_call(m, n, k, aligned=True))
    for header in (prepared_header(n, k + 1), prepared_header(n - 1, k), prepared_header(n, k)[::-1].copy()):
        with pytest.raises(PtxFault, match="trap"):
            launch(module(NAME, target), product_call(m, n, k, aligned=True, header=header))


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
    text = compiled(float32_source(NAME), "sm_80")
    name = kernel(Module.from_ptx(text), "multiply_tiles")
    at_ptx = [*remove_barriers(text, name), *swap_fragments(text, name)[:1]]
    assert len(at_ptx) == 2 + 1
    assert_caught(text, [*edited(float32_source(NAME), edits), *at_ptx], run_small, seeds=range(2))
