"""The PTX of csrc/cuda/align.cu equals the reference, and its mutants are caught."""

import numpy as np
import pytest
import torch
from support.reference import assert_equal, pack, unpack

from tools.ptx.machine import In, Module, Out, Report, Struct
from tools.ptx.mutate import assert_caught, remove_barriers

from .product import (
    TARGETS,
    aligned_words_for,
    ceil_div,
    compiled,
    drawn_rows,
    edited,
    kernel,
    layout,
    module,
    prepared_header,
    row_popcounts,
    seeded,
    source,
    usual,
)
from .rows import row_grid

SEGMENT = 8 * 32 * 32  # values of a row that a warp aligns


class Job:
    """A job that aligns m rows of random words, whose bits past k are random too, and the check of its result."""

    def __init__(
        self, m: int, k: int, aligned: bool = True, header: bool = False, misalign: int = 0, seed: int = 0
    ) -> None:
        self.words = np.random.default_rng(seed).integers(-(2**31), 2**31, (m, ceil_div(k, 32)), dtype=np.int32)
        self.m, self.k, self.aligned, self.header = m, k, aligned, header
        self.rows = ceil_div(m, 4) * 4 if header else m
        self.counts, self.head = Out(np.zeros(self.rows, np.int32)), Out(np.zeros(64, np.uint8))
        self.out = Out(np.zeros((m, aligned_words_for(k)), np.int32))
        outputs = (self.out if aligned else None, self.counts, self.head if header else None)
        self.outputs = [output for output in outputs if output is not None]
        self.fields = Struct(layout("Align"), In(self.words, misalign=misalign), m, k, *outputs)

    def check(self, what: object) -> None:
        assert not any(output.unwritten for output in self.outputs if output.array.nbytes), what
        if self.aligned:
            clean = pack(unpack(torch.from_numpy(self.words), self.k))
            padded = torch.nn.functional.pad(clean, (0, self.out.array.shape[1] - clean.shape[1]))
            assert_equal(torch.from_numpy(self.out.array), padded, what)
        expected = np.pad(row_popcounts(self.words, self.k), (0, self.rows - self.m))
        assert_equal(torch.from_numpy(self.counts.array), torch.from_numpy(expected), what)
        if self.header:
            assert_equal(torch.from_numpy(self.head.array), torch.from_numpy(prepared_header(self.m, self.k)), what)


def no_job() -> Struct:
    return Struct(layout("Align"), None, 0, 0, None, None, None)


def blocks_of(job: Job | None) -> int:
    """Return the blocks of a job beside another one: each of their eight warps has a row."""
    return ceil_div(job.m, 8) if job else 0


def check_align(
    module: Module,
    m: int,
    k: int,
    aligned: bool = True,
    header: bool = False,
    misalign: int = 0,
    seed: int = 0,
    other: Job | None = None,
) -> Report:
    """Align m rows of random words, and those of another job in the same launch, and check the results."""
    job = Job(m, k, aligned, header, misalign, seed)
    grid, block = row_grid(max(job.rows, int(header)), ceil_div(job.words.shape[1] * 32, SEGMENT))
    # The launcher passes the header by value, for any job.
    arguments = [job.fields, job.rows, prepared_header(m, k).tobytes(), other.fields if other else no_job(), grid[0]]
    grid = (grid[0] + blocks_of(other), grid[1])
    report = module.launch(kernel(module, "align_rows"), grid, block, arguments, seed=seed)
    what = (m, k, aligned, header, misalign, other and (other.m, other.k))
    job.check(what)
    if other:
        other.check(what)
    assert report.bank_conflicts == 0
    return report


@pytest.mark.parametrize("target", TARGETS)
def test_align(target):
    aligning = module("align.cu", target)
    edges = [0, 1, 31, 32, 33, 96, 97, 127, 128, 129, 1023, 1025, *(SEGMENT + d for d in (-1, 0, 1)), 2 * SEGMENT + 37]
    for seed, k in enumerate(edges):
        for m in (1, 3, 4, 5):
            check_align(aligning, m, k, aligned=(m + seed) % 4 != 0, header=(m + seed) % 3 != 0, seed=seed)
    for seed, m in enumerate((7, 8, 9, 33)):  # each warp of a block has a row
        check_align(aligning, m, 200, header=seed % 2 == 0, seed=seed)
    for seed, (m, k) in seeded(drawn_rows(2 * SEGMENT)):
        check_align(aligning, m, k, aligned=seed % 4 != 0, header=seed % 3 != 0, seed=seed)
    check_align(aligning, 2, 3 * SEGMENT)  # four warps share a row
    check_align(aligning, 1, 19 * SEGMENT + 5, header=True)  # eight warps share a row, and some take three turns
    check_align(aligning, 3, 333, misalign=4)
    for k in (0, 200):
        check_align(aligning, 0, k, header=True)


OTHERS = [
    (1, 33, True),
    (8, 128, False),
    (9, 0, True),
    (17, 200, True),
    (3, SEGMENT + 65, True),
    (5, 2 * SEGMENT, False),
]
"""Rows, values and whether the words are copied, of jobs beside others."""


@pytest.mark.parametrize("target", TARGETS)
def test_two_jobs_in_one_launch(target):
    aligning = module("align.cu", target)
    for seed, (m, k, aligned) in enumerate(OTHERS):
        for sizes in ((0, 0), (3, 64), (9, 200), (2, 3 * SEGMENT)):
            check_align(aligning, *sizes, aligned=seed % 2 == 0, seed=seed, other=Job(m, k, aligned, seed=seed + 1))


@pytest.mark.parametrize("target", TARGETS)
def test_align_touches_no_sector_in_vain(target):
    report = check_align(module("align.cu", target), 2, SEGMENT)
    wide = [c for c in report.counts if c[1] > 32]  # the instructions of all lanes, without those of the popcounts
    assert sum(c[4] for c in wide) == sum(c[5] for c in wide) > 0


def test_mutants_of_align_are_caught():
    def run(module: Module, seed: int) -> None:
        for m, k in ((3, 37), (9, 129), (2, 2 * SEGMENT + 70), (1, 64), (1, 9 * SEGMENT), (0, 5 * SEGMENT)):
            check_align(module, m, k, header=True, seed=seed)
        check_align(module, 3, 33, aligned=False, seed=seed)
        check_align(module, 3, 2 * SEGMENT + 33, seed=seed, other=Job(17, 2 * SEGMENT + 70, seed=seed))

    text = compiled(source("align.cu"), "sm_80")
    edits = [
        ("from[index] & valid_bits(left)", "from[index]"),
        ("left > 0 ?", "left >= 0 ?"),
        ("job.aligned && index < aligned", "index < aligned"),
        ("job.aligned && index < aligned", "job.aligned && index <= aligned"),
        ("job.words + row * width", "job.words + row * aligned_width"),
        ("job.aligned + row * aligned_width", "job.aligned + row * width"),
        ("(width + kAlignedWords - 1) / kAlignedWords * kAlignedWords", "width"),
        ("first += segment_step() * kAlignSegment", "first += kAlignSegment"),
        ("first_segment() * kAlignSegment", "kAlignSegment"),
        ("if (row < job.m) {", "if (row <= job.m) {"),
        ("if (row >= job.m) return;", "if (row > job.m) return;"),
        ("first += kAlignSegment) count", "first += 2 * kAlignSegment) count"),
        ("block * kRowWarps + warp", "block * kRowWarps + warp / 2"),
        ("threadIdx.y * blockDim.x + threadIdx.x", "threadIdx.x"),
        ("blockIdx.x - blocks)", "blockIdx.x)"),
        ("threadIdx.x == 0 && row < rows", "threadIdx.x == 0 && row <= rows"),
        ("threadIdx.x == 0 && row < rows", "threadIdx.x == 0 && row < job.m"),
        ("job.header && row == 0", "job.header && row == 1"),
        ("count = sum_over_row(count);", ""),
        ("~(~uint32_t{0} << left)", "~(~uint32_t{1} << left)"),
    ]
    mutants = [*edited(source("align.cu"), edits), *remove_barriers(text, kernel(Module.from_ptx(text), "align_rows"))]
    assert len(mutants) == len(usual(edits)) + 1
    assert_caught(text, mutants, run, seeds=range(2))
