"""csrc/cuda/unpack.cu, executed as PTX against the reference; and its mutants."""

import numpy as np
import pytest
import torch
from support.reference import FLOATS, assert_equal, unpack, unpack_signs

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

ALL = {**{dtype: index for dtype, (index, _) in DTYPES.items()}, torch.int8: 5, torch.bool: 6}
# By size: how the unsigned integer is called in a mangled name, and its letter for struct.
SIZES = {8: ("m", "Q"), 4: ("j", "I"), 2: ("t", "I"), 1: ("h", "I")}


def vector(dtype: torch.dtype) -> int:
    """Values of a row that a lane stores at once."""
    return 16 // dtype.itemsize


def segment(dtype: torch.dtype) -> int:
    """Values of a row that a warp unpacks."""
    return 4 * 32 * vector(dtype)


def patterns(dtype: torch.dtype) -> Struct:
    """A struct Patterns: the values of zeros that fill a register, and how one differs from the value of a one."""
    bits = torch.tensor([False, True]) if dtype is torch.bool else torch.tensor([-1, 1]).to(dtype)
    zero, one = (int(bit) for bit in numpy(bits).view(f"u{dtype.itemsize}"))
    count = max(4 // dtype.itemsize, 1)
    letter = SIZES[dtype.itemsize][1]
    return Struct(2 * letter, sum(zero << 8 * dtype.itemsize * i for i in range(count)), zero ^ one)


def check_unpack(module: Module, dtype: torch.dtype, m: int, k: int, misalign: int = 0, seed: int = 0) -> Report:
    """Unpack m rows of k values from words whose bits past k are random."""
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (m, ceil_div(k, 32)), dtype=np.int32)
    values = np.zeros((m, k), numpy(torch.zeros(1, dtype=dtype)).dtype)
    output = Out(values, misalign=misalign)
    whole = k % vector(dtype) == 0 and misalign % 16 == 0
    name = kernel(module, rf"unpack_rowsI{SIZES[dtype.itemsize][0]}Lb{whole:d}E")
    job = Struct(layout("Unpack"), In(words), m, k, output, ALL[dtype])
    grid, block = row_grid(m, ceil_div(words.shape[1] * 32, segment(dtype)), parts=True)
    report = module.launch(name, grid, block, [job, patterns(dtype)], seed=seed)
    what = (dtype, m, k, misalign)
    assert output.unwritten == 0, what
    from_words = torch.from_numpy(words)
    expected = unpack(from_words, k) if dtype is torch.bool else unpack_signs(from_words, k).to(dtype)
    actual = torch.from_numpy(values)
    assert_equal(actual.view(dtype) if dtype in FLOATS else actual, expected, what)
    assert report.bank_conflicts == 0
    return report


@pytest.mark.parametrize("dtype", ALL, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_unpack(target, dtype):
    unpacking, step, end = module("unpack.cu", target), segment(dtype) // 4, segment(dtype)
    lengths = [1, 31, 32, 33, 64, 80, *(at + d for at in (step, end) for d in (-1, 0, 1, 16)), 2 * end + 37]
    for seed, k in enumerate(lengths):
        check_unpack(unpacking, dtype, 3, k, seed=seed)
    for seed, (m, k) in seeded(drawn_rows(2 * end)):
        check_unpack(unpacking, dtype, m, k, seed=seed)
    for k in (64, 65):
        check_unpack(unpacking, dtype, 17, k)  # more than one block, a row a warp
    check_unpack(unpacking, dtype, 1, 3 * end)
    check_unpack(unpacking, dtype, 2, 9 * end + 16)  # blocks that share a row
    check_unpack(unpacking, dtype, 3, 64, misalign=dtype.itemsize)


@pytest.mark.parametrize("dtype", ALL, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_unpack_touches_no_sector_in_vain(target, dtype):
    report = check_unpack(module("unpack.cu", target), dtype, 2, 2 * segment(dtype))
    stores = [c for o, c in zip(report.opcodes, report.counts, strict=True) if o.startswith("st.global")]
    assert sum(c[4] for c in stores) == sum(c[5] for c in stores) > 0


def test_mutants_of_unpack_are_caught():
    def run(module: Module, seed: int) -> None:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8):
            for m, k in ((3, 37), (3, 80), (1, 2 * segment(dtype)), (2, 9 * segment(dtype) + 1)):
                check_unpack(module, dtype, m, k, seed=seed)
        check_unpack(module, torch.int8, 3, 64, misalign=1, seed=seed)

    edits = [
        ("kFactor = each(kSize - 1)", "kFactor = each(kSize)"),
        ("* kFactor & kMask", "* kFactor"),
        ("bits & ((1u << kCount) - 1)", "bits"),
        ("word >>= kVector<Value> * (lane % kLanes<Value>);", ""),
        ("patterns.values(bits >> 2 * kCount)", "patterns.values(bits >> 3 * kCount)"),
        ("patterns.values(bits >> 1)", "patterns.values(bits)"),
        ("lane * kVector<Value> < left", "lane * kVector<Value> <= left"),
        ("__shfl_sync(kAllLanes, word, i * kLanes<Value>)", "__shfl_sync(kAllLanes, word, i)"),
        ("if (column < left)", "if (column <= left)"),
        ("patterns.values(shared >> lane & 1)", "patterns.values(shared >> (lane ^ 1) & 1)"),
        ("if (row >= job.m) return;", ""),
        ("first += segment_step() * kWords", "first += kWords"),
        ("first_segment() * kWords", "kWords"),
        ("job.words + row * width", "job.words + row * (job.k / kWordBits)"),
        ("+ row * job.k", "+ row * width * kWordBits"),
        ("words[step] = index * kWarp < values", "words[step] = index * kWarp <= values"),
        ("if (step * kStep >= values) break;", "if (step * kStep >= values - kWarp) break;"),
    ]
    assert_caught(compiled(source("unpack.cu"), "sm_80"), edited(source("unpack.cu"), edits), run, seeds=range(2))
