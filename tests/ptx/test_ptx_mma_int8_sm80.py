"""The PTX of csrc/cuda/gemm_mma_int8_sm80.cu equals the reference, and its mutants are caught.

The mutants here change how bits become bytes. Those of test_ptx_mma_sm80.py change csrc/cuda/mma_tiles.cuh, which both
kernels use.
"""

import functools

import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import Module
from tools.ptx.mutate import assert_caught, loosen_waits, remove_barriers, remove_waits, swap_fragments

from . import test_ptx_mma_sm80 as mma_sm80
from .product import (
    channels_of,
    check_wrong_forms,
    compiled,
    edited,
    kernel,
    module,
    seeded,
    seeded_bits,
    source_of_type,
    targets,
)

TARGETS = targets("sm_80")
NAME = "gemm_mma_int8_sm80.cu"
TILE = (64, 64)


@pytest.mark.parametrize("target", TARGETS)
def test_mma(target):
    for seed, shape in seeded(mma_sm80.shapes()):
        mma_sm80.check_mma(module(NAME, target), *shape, tile=TILE, seed=seed)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_mma_outputs(target, out):
    """Rows of y are whole vectors or not, with scale and bias."""
    for n in (80, 67):
        mma_sm80.check_mma(module(NAME, target), 20, n, 333, out, TILE, **channels_of(out, n)[-1])


@pytest.mark.parametrize("target", TARGETS)
def test_mma_bits(target):
    for seed, shape in seeded_bits(mma_sm80.shapes_of_bits()):
        mma_sm80.check_mma(module(NAME, target), *shape, torch.bool, TILE, seed, flipped=seed % 4 > 0)


def test_mma_moves_whole_sectors():
    """A warp reads or writes all of each 32 bytes of global memory that an instruction touches."""
    report = mma_sm80.check_mma(module(NAME, "sm_120"), 64, 64, 1024, torch.bfloat16, TILE)
    assert report.sectors == report.sectors_needed, report.excess_sectors_by_source()


def test_mma_reports_weights_prepared_for_another_product():
    check_wrong_forms(functools.partial(mma_sm80.launch, module(NAME, "sm_120"), tile=TILE), 3, 70, 700)


def test_mutants_of_mma_are_caught():
    edits = [
        ("return word >> bit & 0x01010101", "return word >> bit & 0x00010101"),
        ("return word >> bit & 0x01010101", "return word & 0x01010101 << bit"),
        ("return word >> bit & 0x01010101", "return word >> (bit & 3) & 0x01010101"),
        ("bit < 8", "bit < 7"),
        ("half < 2; ++half) {\n#pragma unroll 4", "half < 1; ++half) {\n#pragma unroll 4"),
        ("half ? b[j].z : b[j].x", "half ? b[j].x : b[j].z"),
        ("half ? b[j].w : b[j].y", "half ? b[j].w : b[j].x"),
        ("half ? a[0].z : a[0].x", "half ? a[1].z : a[0].x"),
        ("half ? a[1].w : a[1].y", "half ? a[0].w : a[1].y"),
        ("mma_bytes(sums[i][0][j], rows, columns[j])", "mma_bytes(sums[i][0][j], rows, columns[j ^ 1])"),
        ("fragments.read_weight(next, at, 0);", ""),
    ]
    text = compiled(source_of_type(NAME), "sm_120")
    name = kernel(Module.from_ptx(text), "multiply_tiles")
    waits = [*remove_waits(text, name), *loosen_waits(text, name)]
    at_ptx = [*remove_barriers(text, name), *waits, *swap_fragments(text, name)[5:13]]
    assert len(waits) == 2 * 3 and len(at_ptx) == 4 + 6 + 8
    last = {waits[i].name: "nothing reads or writes where the copies go" for i in (2, 5)}
    assert_caught(
        text,
        [*edited(source_of_type(NAME), edits, "sm_120"), *at_ptx],
        mma_sm80.run_small,
        seeds=range(2),
        equivalent=last,
    )
