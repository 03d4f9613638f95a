"""csrc/cuda/align.cu, executed as PTX against the reference; and its mutants."""

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
)
from .rows import row_grid

SEGMENT = 8 * 32 * 32  # values of a row that a warp aligns


def check_align(
    module: Module,
    m: int,
    k: int,
    aligned: bool = True,
    header: bool = False,
    misalign: int = 0,
    seed: int = 0,
) -> Report:
    """Align m rows of random words, whose bits past k are random too."""
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, (m, ceil_div(k, 32)), dtype=np.int32)
    rows = ceil_div(m, 4) * 4 if header else m
    counts, head = Out(np.zeros(rows, np.int32)), Out(np.zeros(64, np.uint8))
    out = Out(np.zeros((m, aligned_words_for(k)), np.int32))
    outputs = [counts, *([out] if aligned else []), *([head] if header else [])]
    job = Struct(
        layout("Align"), In(words, misalign=misalign), m, k, out if aligned else None, counts, head if header else None
    )
    grid, block = row_grid(max(rows, int(header)), ceil_div(words.shape[1] * 32, SEGMENT))
    # The launcher gives the header by value, for any job.
    arguments = [job, rows, prepared_header(m, k).tobytes()]
    report = module.launch(kernel(module, "align_rows"), grid, block, arguments, seed=seed)
    what = (m, k, aligned, header, misalign)
    assert not any(output.unwritten for output in outputs if output.array.nbytes), what
    if aligned:
        clean = pack(unpack(torch.from_numpy(words), k))
        padded = torch.nn.functional.pad(clean, (0, out.array.shape[1] - clean.shape[1]))
        assert_equal(torch.from_numpy(out.array), padded, what)
    expected = np.pad(row_popcounts(words, k), (0, rows - m))
    assert_equal(torch.from_numpy(counts.array), torch.from_numpy(expected), what)
    if header:
        assert_equal(torch.from_numpy(head.array), torch.from_numpy(prepared_header(m, k)), what)
    assert report.bank_conflicts == 0
    return report


@pytest.mark.parametrize("target", TARGETS)
def test_align(target):
    aligning = module("align.cu", target)
    edges = [0, 1, 31, 32, 33, 96, 97, 127, 128, 129, 1023, 1025, *(SEGMENT + d for d in (-1, 0, 1)), 2 * SEGMENT + 37]
    for seed, k in enumerate(edges):
        for m in (1, 3, 4, 5):
            check_align(aligning, m, k, aligned=(m + seed) % 4 != 0, header=(m + seed) % 3 != 0, seed=seed)
    for seed, m in enumerate((7, 8, 9, 33)):  # blocks of a row a warp
        check_align(aligning, m, 200, header=seed % 2 == 0, seed=seed)
    for seed, (m, k) in seeded(drawn_rows(2 * SEGMENT)):
        check_align(aligning, m, k, aligned=seed % 4 != 0, header=seed % 3 != 0, seed=seed)
    check_align(aligning, 2, 3 * SEGMENT)  # four warps to a row
    check_align(aligning, 1, 19 * SEGMENT + 5, header=True)  # and eight, some of which take three turns
    check_align(aligning, 3, 333, misalign=4)
    for k in (0, 200):
        check_align(aligning, 0, k, header=True)


@pytest.mark.parametrize("target", TARGETS)
def test_align_touches_no_sector_in_vain(target):
    report = check_align(module("align.cu", target), 2, SEGMENT)
    wide = [c for c in report.counts if c[1] > 32]  # what all lanes do: not the popcounts
    assert sum(c[4] for c in wide) == sum(c[5] for c in wide) > 0


def test_mutants_of_align_are_caught():
    def run(module: Module, seed: int) -> None:
        for m, k in ((3, 37), (9, 129), (2, 2 * SEGMENT + 70), (1, 64), (1, 9 * SEGMENT), (0, 5 * SEGMENT)):
            check_align(module, m, k, header=True, seed=seed)
        check_align(module, 3, 33, aligned=False, seed=seed)

    text = compiled(source("align.cu"), "sm_80")
    edits = [
        ("from[index] & valid_bits(left)", "from[index]"),
        ("left > 0 ?", "left >= 0 ?"),
        ("job.aligned && index < aligned", "index < aligned"),
        ("job.aligned && index < aligned", "job.aligned && index <= aligned"),
        ("job.words + row * width", "job.words + row * aligned_width"),
        ("job.aligned + row * aligned_width", "job.aligned + row * width"),
        ("(width + kAlignedWords - 1) / kAlignedWords * kAlignedWords", "width"),
        ("first += segment_step() * kSegment", "first += kSegment"),
        ("first_segment() * kSegment", "kSegment"),
        ("if (row < job.m) {", "if (row <= job.m) {"),
        ("threadIdx.x == 0 && row < rows", "threadIdx.x == 0 && row <= rows"),
        ("threadIdx.x == 0 && row < rows", "threadIdx.x == 0 && row < job.m"),
        ("job.header && row == 0", "job.header && row == 1"),
        ("count = sum_over_row(count);", ""),
        ("~(~uint32_t{0} << left)", "~(~uint32_t{1} << left)"),
    ]
    mutants = [*edited(source("align.cu"), edits), *remove_barriers(text, kernel(Module.from_ptx(text), "align_rows"))]
    assert len(mutants) == len(edits) + 1
    assert_caught(text, mutants, run, seeds=range(2))
