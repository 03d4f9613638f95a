"""The PTX of csrc/cuda/pack_limited.cu equals the reference, and its mutants are caught."""

import numpy as np
import pytest
import torch
from support.reference import BITS, FLOATS, assert_equal, pack_by_limits, random_values, random_words

from tools.ptx.machine import In, Module, Out, Report, Struct
from tools.ptx.mutate import assert_caught

from .product import (
    DTYPES,
    TARGETS,
    ceil_div,
    compiled,
    drawn_rows,
    edited,
    kernel,
    layout,
    module,
    numpy,
    seeded,
    source,
)
from .rows import row_grid

SEGMENT = 8 * 32
"""Values of a row that a warp packs."""


def limits_of(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return limits of the channels of x: a value of a row or a pattern next to it, or any value."""
    row = torch.randint(len(x), (x.shape[1],), generator=generator)
    patterns = x[row, torch.arange(x.shape[1])].contiguous().view(BITS[x.dtype])
    steps = torch.randint(-1, 2, patterns.shape, generator=generator).to(patterns.dtype)
    near = torch.rand(x.shape[1], generator=generator) < 0.8
    return torch.where(near, (patterns + steps).view(x.dtype), random_values((x.shape[1],), x.dtype, generator))


def check_pack_limited(
    module: Module,
    dtype: torch.dtype,
    m: int,
    k: int,
    strict: bool = False,
    padding: int = 0,
    *,
    flipped: bool = True,
    misalign: int = 0,
    seed: int = 0,
) -> Report:
    """Pack m rows of k values, k + padding apart, by random limits and flips, of which those past k are random too."""
    generator = torch.Generator().manual_seed(1000 * k + seed)
    stride, width = k + padding, ceil_div(k, 32)
    x = random_values((m, stride), dtype, generator)
    limits, flips = limits_of(x[:, :k], generator), random_words(1, k, generator, stray=True)[0] if flipped else None
    words = Out(np.zeros((m, width), np.int32))
    values = In(numpy(x).reshape(-1)[: (m - 1) * stride + k], misalign=misalign)  # a view may end with its last row
    fields = (values, DTYPES[dtype][0], m, k, stride, strict, In(numpy(limits), misalign=misalign))
    job = Struct(layout("PackLimited"), *fields, None if flips is None else In(flips.numpy()), words)
    grid, block = row_grid(m, ceil_div(32 * width, SEGMENT), parts=True)
    name = kernel(module, rf"pack_limited_rowsI{DTYPES[dtype][1]}E")
    report = module.launch(name, grid, block, [job], seed=seed)
    what = (dtype, m, k, strict, padding, flipped, misalign)
    assert words.unwritten == 0, what
    assert_equal(torch.from_numpy(words.array), pack_by_limits(x[:, :k], limits, flips, strict), what)
    assert report.bank_conflicts == 0
    return report


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_pack_limited(target, dtype):
    packing = module("pack_limited.cu", target)
    lengths = [1, 31, 32, 33, 64, *(SEGMENT + by for by in (-1, 0, 1)), 2 * SEGMENT + 37]
    for seed, k in enumerate(lengths):
        check_pack_limited(packing, dtype, 3, k, seed % 2 == 0, seed % 3, flipped=seed % 4 > 0, seed=seed)
    for seed, (m, k) in seeded(drawn_rows(2 * SEGMENT)):
        check_pack_limited(packing, dtype, m, k, seed % 2 == 0, seed % 3, flipped=seed % 4 > 0, seed=seed)
    check_pack_limited(packing, dtype, 17, 64)  # more than one block, and a row for each warp
    check_pack_limited(packing, dtype, 2, 9 * SEGMENT + 16)  # blocks that share a row
    check_pack_limited(packing, dtype, 3, 64, misalign=dtype.itemsize)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_special_values(dtype):
    """Each special value, and each pattern next to one, meets many limits."""
    for seed in range(4):
        check_pack_limited(module("pack_limited.cu", "sm_80"), dtype, 64, 512, seed % 2 == 0, seed=seed)


def test_mutants_of_pack_limited_are_caught():
    def run(module: Module, seed: int) -> None:
        for dtype in FLOATS:
            for m, k in ((3, 37), (9, 64), (2, 9 * SEGMENT + 1)):
                check_pack_limited(module, dtype, m, k, seed % 2 == 0, 1, seed=seed)
            check_pack_limited(module, dtype, 3, 70, flipped=False, seed=seed)

    edits = [
        ("pattern < 0 ? pattern ^ static_cast<Signed>(~Word{0} >> 1) : pattern", "pattern"),
        ("order(v) >= order", "order(v) > order"),
        ("is_nan ? !job.strict", "is_nan ? job.strict"),
        ("> Pattern<T>::kInfinity", ">= Pattern<T>::kInfinity"),
        ("reached != flipped", "reached"),
        ("job.flips && first + i < width && job", "job.flips && job"),
        ("job.flips && first", "first"),
        ("job.flips[first + i] >> lane", "job.flips[i] >> lane"),
        ("exists = i * kWarp < left", "exists = i * kWarp <= left"),
        ("kAllLanes, i * kWarp < left && ", "kAllLanes, "),
        ("if (lane == i) words", "if (lane == (i ^ 1)) words"),
        ("lane < kWords && first + lane < width", "lane < kWords"),
        ("row * job.stride", "row * job.k"),
        ("if (row >= job.m) return;", ""),
        ("first_segment() * kWords", "kWords"),
        ("first += segment_step() * kWords", "first += kWords"),
        ("kShift = 8 * (sizeof(Word) - sizeof(Bits))", "kShift = 0"),
    ]
    text = source("pack_limited.cu")
    assert_caught(compiled(text, "sm_80"), edited(text, edits), run, seeds=range(2))
