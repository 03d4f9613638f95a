"""The PTX of csrc/cuda/pack.cu equals the reference, and its mutants are caught."""

import math

import numpy as np
import pytest
import torch
from support.reference import FLOATS, assert_equal, in_range, pack, random_values, signs, unpack

from tools.ptx.machine import In, Module, Out, Report, Struct
from tools.ptx.mutate import assert_caught, remove_barriers

from .product import (
    DTYPES,
    TARGETS,
    aligned_words_for,
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
from .test_ptx_align import OTHERS, Job, blocks_of, no_job


def vector(dtype: torch.dtype) -> int:
    """Return how many values of a row a lane loads at once."""
    return 16 // dtype.itemsize


def segment(dtype: torch.dtype) -> int:
    """Return how many values of a row a warp packs."""
    return 4 * 32 * vector(dtype)


def kernel_name(module: Module, dtype: torch.dtype, strict: bool, vectors: bool) -> str:
    return kernel(module, rf"pack_rowsI{DTYPES[dtype][1]}Lb{strict:d}E\w*{'7Vectors' if vectors else '6Values'}I")


def check_pack(
    module: Module,
    dtype: torch.dtype,
    m: int,
    k: int,
    strict: bool = False,
    padding: int = 0,
    *,
    aligned: bool = False,
    threshold: float | None = 1.0,
    popcounts: bool = True,
    misalign: int = 0,
    seed: int = 0,
    beside: Job | None = None,
) -> Report:
    """Pack m rows of k values, k + padding apart, and check that all requested outputs and nothing else is written.

    A job of aligning may be done in the same launch.
    """
    generator = torch.Generator().manual_seed(1000 * k + seed)
    stride = k + padding
    x = random_values((m, stride), dtype, generator)
    memory = In(numpy(x).reshape(-1)[: (m - 1) * stride + k], misalign=misalign)  # a view may end with its last row
    word_stride = aligned_words_for(k) if aligned else ceil_div(k, 32)
    words, in_range_words = Out(np.zeros((m, word_stride), np.int32)), Out(np.zeros((m, ceil_div(k, 32)), np.int32))
    counts = Out(np.zeros(m, np.int32))
    outputs = [words, *([] if threshold is None else [in_range_words]), *([counts] if popcounts else [])]

    job = Struct(
        layout("Pack"),
        *(memory, DTYPES[dtype][0], m, k, stride, strict, threshold or 0.0, words, word_stride),
        *(None if threshold is None else in_range_words, counts if popcounts else None),
    )
    vectors = k % vector(dtype) == 0 and (stride % vector(dtype) == 0 or m == 1) and misalign % 16 == 0
    grid, block = row_grid(m, ceil_div(word_stride * 32, segment(dtype)), parts=not popcounts and not beside)
    arguments = [job, beside.fields if beside else no_job(), grid[0]]
    grid = (grid[0] + blocks_of(beside), grid[1])
    report = module.launch(kernel_name(module, dtype, strict, vectors), grid, block, arguments, seed=seed)

    what = (dtype, m, k, strict, padding, aligned, threshold, popcounts, misalign)
    assert not any(output.unwritten for output in outputs if output.array.nbytes), what
    expected = pack(signs(x[:, :k], strict) > 0)
    padded = torch.nn.functional.pad(expected, (0, word_stride - expected.shape[1]))
    assert_equal(torch.from_numpy(words.array), padded, what)
    if threshold is not None:
        assert_equal(torch.from_numpy(in_range_words.array), pack(in_range(x[:, :k], threshold)), what)
    if popcounts:
        assert_equal(torch.from_numpy(counts.array), unpack(expected, k).sum(1).to(torch.int32), what)
    if beside:
        beside.check((what, beside.m, beside.k))
    assert report.bank_conflicts == 0
    return report


def edges(dtype: torch.dtype) -> list[int]:
    """Return lengths around words, vectors, steps and segments of a row."""
    step, end = segment(dtype) // 4, segment(dtype)
    return [0, 1, 31, 32, 33, 64, *(step + d for d in (-1, 0, 1)), *(end + d for d in (-1, 0, 1)), 2 * end + 64]


@pytest.mark.parametrize("target", TARGETS)
def test_aligning_beside_packing(target):
    packing = module("pack.cu", target)
    for seed, (m, k, aligned) in enumerate(OTHERS):
        dtype, beside = FLOATS[seed % 4], Job(m, k, aligned, seed=seed)
        sizes = [(3, 64), (9, 200), (2, 3 * segment(dtype))][seed % 3]
        check_pack(packing, dtype, *sizes, seed % 2 == 0, seed % 3, popcounts=seed > 2, beside=beside, seed=seed)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_pack(target, dtype, strict):
    packing, lanes = module("pack.cu", target), vector(dtype)
    for seed, k in enumerate(edges(dtype)):
        more = {"aligned": seed % 2 == 1, "seed": seed}
        check_pack(packing, dtype, 3, k, strict, 1, **more)
        check_pack(packing, dtype, 2, k + -k % lanes, strict, lanes, **more)  # rows of whole vectors at 16 bytes
    for seed, (m, k) in seeded(drawn_rows(3 * segment(dtype))):
        check_pack(packing, dtype, m, k, strict, seed % 4, aligned=seed % 3 == 0, popcounts=seed % 5 > 0, seed=seed)
    for padding in (0, 1):
        check_pack(packing, dtype, 9, 64, strict, padding, seed=1)  # more than one block, and a row for each warp
        # Two or eight warps share a row; with ten segments two of them take a second turn.
        for segments in (2, 5, 10):
            check_pack(packing, dtype, 5 if segments == 2 else 1, segments * segment(dtype) - lanes, strict, padding)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_pack_what_is_asked_for(target, dtype):
    packing, lanes = module("pack.cu", target), vector(dtype)
    for seed, aligned in enumerate((False, True)):
        for padding in (0, lanes, 1):
            check_pack(packing, dtype, 3, 40, threshold=None, padding=padding, aligned=aligned, seed=seed)
            check_pack(packing, dtype, 3, 40, popcounts=False, padding=padding, aligned=aligned, seed=seed)
    check_pack(packing, dtype, 2, 9 * segment(dtype) + 33, popcounts=False)  # blocks that share a row
    check_pack(packing, dtype, 1, 17 * segment(dtype), popcounts=False, threshold=None)
    check_pack(packing, dtype, 1, 40, misalign=dtype.itemsize)
    check_pack(packing, dtype, 1, 40, padding=1)  # a single row is read in vectors for any stride


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_pack_thresholds(target, dtype):
    finfo = torch.finfo(dtype)
    for threshold in (0.0, -0.0, 0.5, finfo.max, finfo.smallest_normal, math.inf, -1.0, -math.inf, math.nan):
        for padding in (0, 1):
            check_pack(module("pack.cu", target), dtype, 2, 128, padding=padding, threshold=threshold)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_pack_touches_no_sector_in_vain(target, dtype):
    report = check_pack(module("pack.cu", target), dtype, 2, 2 * segment(dtype), popcounts=False)
    assert report.sectors == report.sectors_needed


def test_mutants_of_pack_are_caught():
    def run(module: Module, seed: int) -> None:
        for dtype in (torch.float32, torch.float16):
            lanes, end = vector(dtype), segment(dtype)
            for strict in (False, True):
                check_pack(module, dtype, 3, 37, strict, 3, aligned=True, seed=seed)
                check_pack(module, dtype, 2, 33, strict, seed=seed)
                check_pack(module, dtype, 9, 64 + lanes, strict, lanes, aligned=True, seed=seed)
            check_pack(module, dtype, 2, 9 * end + lanes, seed=seed)
            check_pack(module, dtype, 2, end + 1, seed=seed)
            check_pack(module, dtype, 2, 9 * end + 3, popcounts=False, threshold=0.5, seed=seed)
            check_pack(module, dtype, 1, 0, seed=seed)
            check_pack(module, dtype, 1, 64, threshold=-1.0, seed=seed)

    edits = [
        ("exists = first < left", "exists = first <= left"),
        ("i % 2 ? words[i / 2] : words[i / 2] << 16", "i % 2 ? words[i / 2] << 16 : words[i / 2]"),
        ("exists ? bits << (", "true ? bits << ("),
        ("kVector<T> * (lane_index() % kLanes<T>)", "kVector<T> * lane_index()"),
        ("distance < kLanes<T>", "distance < kLanes<T> / 2"),
        ("data[i] = i * kWarp + lane < left", "data[i] = i * kWarp + lane <= left"),
        ("const bool bit = i * kWarp + lane < left &&", "const bool bit ="),
        ("if (lane / kLanes<T> == i)", "if (lane % kLanes<T> == i)"),
        ("if (i * kVector<T> >= words) break;", "if (i * kVector<T> >= words - 1) break;"),
        ("leads && index < words", "leads && index <= words"),
        ("leads && index < words", "index < words"),
        ("leads && index * static_cast<int>(kWordBits) < values", "leads && index < words"),
        ("(v & ~kSignBit<T>) < limit", "(v & ~kSignBit<T>) <= limit"),
        ("(v & ~kSignBit<T>) < limit", "v < limit"),
        ("if (!(threshold >= 0)) return 0;", ""),
        ("row * job.stride", "row * job.k"),
        ("row * job.word_stride", "row * width"),
        ("(Negative ? kSignBit<T> : 0) + Pattern<T>::kUnit", "(Negative ? kSignBit<T> : 0)"),
        ("first += segment_step() * kWords", "first += 2 * segment_step() * kWords"),
        ("threadIdx.x == 0 && row < job.m", "threadIdx.x == 0"),
        ("if (row < job.m) {", "if (true) {"),
        ("sum += warp < warps ?", "sum += warp <= warps ?"),
        ("sum += warp < warps ?", "sum += warp + 1 < warps ?"),
        ("int64_t{blockIdx.y} * (blockDim.x / kWarp) +", ""),
        ("int64_t{blockIdx.x} * blockDim.y + threadIdx.y", "int64_t{blockIdx.x} + threadIdx.y"),
        ("distance < kWarp", "distance < kWarp / 2"),
    ]
    text = compiled(source("pack.cu"), "sm_80")
    parsed = Module.from_ptx(text)
    barriers = [m for v in (False, True) for m in remove_barriers(text, kernel_name(parsed, torch.float32, False, v))]
    assert len(barriers) == 2
    assert_caught(text, [*edited(source("pack.cu"), edits), *barriers], run, seeds=range(2))
