"""The PTX of csrc/cuda/gemm_fused_cluster_sm90.cu equals the reference, and its mutants are caught.

Its blocks pack x together. All else is the code of gemm_fused_skinny_mma_sm80.cu (csrc/cuda/fused_mma.cuh), whose tests
have its edges and mutants.
"""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import Module, Report
from tools.ptx.mutate import Mutant, assert_caught, edit, remove, remove_barriers

from .fused import MOST_VALUES, WARPS, FusedCall, check_no_result, fused_call, plan
from .product import (
    channels_of,
    check_wrong_forms,
    compiled,
    edited,
    kernel,
    module,
    output_name,
    prepared_header,
    source_of_type,
    targets,
)
from .test_ptx_fused_skinny_mma_sm80 import SHAPE as SHAPE_OF_A_BLOCK

TARGETS = targets("sm_90a", "sm_90a")
NAME = "gemm_fused_cluster_sm90.cu"
CLUSTER = 8
SHAPE = dataclasses.replace(SHAPE_OF_A_BLOCK, cluster=CLUSTER)


def launch(module: Module, call: FusedCall, multiprocessors: int = 17, parts: int = 0, seed: int = 0) -> Report:
    """Launch the kernel as the launcher does, but with `parts` warps to a unit if that is not 0."""
    _, n, k, out, *_ = call.what
    divided = plan(SHAPE, n, k, multiprocessors, out, call.whole, parts)
    arguments = [call.with_multiprocessors(multiprocessors), divided.struct()]
    name = kernel(module, output_name(out))
    return module.launch(name, divided.blocks, 32 * WARPS, arguments, seed=seed, cluster=CLUSTER)


def check_fused(
    module: Module, m: int, n: int, k: int, out=torch.int32, *, multiprocessors=17, parts=0, seed=0, **more
) -> Report:
    """Check a product of random values."""
    call = fused_call(m, n, k, out, header=prepared_header(n, k), weight_padding=8, seed=seed, **more)
    report = launch(module, call, multiprocessors, parts, seed)
    call.check()
    if k % 4096 == 0:  # each block packs whole lines of 16 words
        assert report.bank_conflicts == 0, report.conflicts_by_source()
    return report


def shapes() -> list[tuple[int, int, int, int]]:
    """Return m, n, k and multiprocessors: all rows, and edges of a block's part of k and of rounds."""
    generator = np.random.default_rng(0)
    drawn = ((m, *map(int, generator.integers(1, (100, 3000))), 8 + m) for m in range(1, 17))
    # Of 8 blocks the last ones have no words, the last one has fewer than the others, or all have the same.
    edges = [(16, 9, k, 8) for k in (0, 1, 127, 129, 512, 1024, 1025, 8 * 1024)]
    rounds = [(3, 1, 200, 0), (3, 1025, 200, 8), (3, 1025, 200, 31), (3, 129, 200, 31)]
    return [*drawn, *edges, *rounds]


@pytest.mark.parametrize("target", TARGETS)
def test_fused(target):
    for seed, (m, n, k, multiprocessors) in enumerate(shapes()):
        more = {"dtype": FLOATS[seed % 4], "strict": seed % 3 == 1, "padding": seed % 2, "seed": seed}
        check_fused(module(NAME, target), m, n, k, multiprocessors=multiprocessors, **more)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_whole_rows(dtype):
    """Rows of whole words that start on 16 bytes are packed by wide loads."""
    for m, k in ((16, 4096), (5, 3968), (1, 128)):
        check_fused(module(NAME, "sm_90a"), m, 40, k, dtype=dtype, strict=m == 5)


def test_the_longest_rows():
    for m, k in ((1, MOST_VALUES), (8, 16384), (11, 11008), (16, 8192), (16, 8191)):
        check_fused(module(NAME, "sm_90a"), m, 3, k, dtype=torch.bfloat16)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
def test_outputs(out):
    for more in channels_of(out, 43)[-1:]:
        check_fused(module(NAME, "sm_90a"), 11, 43, 333, out, multiprocessors=8, **more)
        check_fused(module(NAME, "sm_90a"), 16, 43, 333, out, multiprocessors=8, parts=16, **more)


def test_bits():
    rows = itertools.cycle((1, 16, 7, 9))
    for seed, (n, k) in enumerate(itertools.product((1, 31, 33, 300), (40, 1057))):
        check_fused(module(NAME, "sm_90a"), next(rows), n, k, torch.bool, flipped=seed % 4 > 0, seed=seed)


def test_whole_sectors():
    report = check_fused(module(NAME, "sm_90a"), 16, 256, 4096, multiprocessors=8, dtype=torch.bfloat16)
    assert report.sectors == report.sectors_needed, report.excess_sectors_by_source()


def test_weights_prepared_for_another_product():
    """All blocks of the cluster come to its barriers, and none writes a result."""
    run = functools.partial(launch, module(NAME, "sm_90a"), multiprocessors=8)
    check_wrong_forms(run, 3, 70, 700, fused_call)


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_120"])
def test_kernels_write_no_result_where_clusters_or_the_instruction_are_not(target):
    """The heuristics choose another kernel for these targets; if this one ran, no output would look like a result."""
    check_no_result(functools.partial(launch, module(NAME, target)))


def run_small(module: Module, seed: int) -> None:
    check = functools.partial(check_fused, module, multiprocessors=8, seed=seed)
    check(16, 9, 8192, dtype=torch.bfloat16)
    check(5, 9, 4096)
    check(16, 9, 512, dtype=torch.bfloat16)
    check(3, 300, 1057, dtype=torch.float64)
    check(2, 9, 0)


def test_mutants_are_caught():
    """The other edits of the code that both kernels share are those of the other kernel's tests."""
    edits = [
        # These change which words a block packs, and where they go.
        ("plan.width / kWords + Blocks - 1", "plan.width / kWords"),
        ("min(part, plan.width - first)", "part"),
        ("pack_words(job, plan, first, width, words);", "pack_words(job, plan, 0, width, words);"),
        ("8 * kBytes * first + 8 * byte", "8 * byte"),
        ("reinterpret_cast<uint8_t*>(words + first)", "reinterpret_cast<uint8_t*>(words)"),
        ("(job.product.k) - 8 * kBytes * first", "(job.product.k)"),
        ("peer = warp % Blocks", "peer = warp % Blocks ^ 1"),
        ("if (peer != rank)", "if (peer > rank)"),
        ("address_in_block(words, peer)", "address_in_block(words, rank)"),
        ("address_in_block(words, peer)", "address_in_block(words, peer) + (1 << 16)"),
        ("warp / Blocks * kWarp + lane_index(); i < count", "lane_index(); i < count"),
        ("i += kFusedThreads / Blocks", "i += kFusedThreads"),
        ("static_cast<int>(job.product.m) * vectors", "static_cast<int>(job.product.m - 1) * vectors"),
        ("i / vectors * plan.pitch + first", "i / vectors * plan.pitch"),
        ("i % vectors * kWords;", "i % vectors;"),
        # These take barriers of the cluster away.
        ("    arrive_with_words();\n    wait_for_cluster();\n", "    __syncthreads();\n"),
        ("    arrive_with_words();\n    wait_for_cluster();\n", "    arrive_with_words();\n    __syncthreads();\n"),
        ("    arrive_with_words();\n", '    if (rank == 3) asm volatile("exit;");\n    arrive_with_words();\n'),
    ]
    equivalent = {"warp % Blocks ^ 1": "the warps of a block exchange the blocks to which they store"}
    cxx = source_of_type(NAME, "int32")
    text = compiled(cxx, "sm_90a")
    name = kernel(Module.from_ptx(text), "multiply_in_cluster")
    start = "    arrive_at_start();\n", "    wait_for_cluster();  // until"
    assert all(cxx.count(line) == 1 for line in start)
    unordered = cxx.replace(start[0], "").replace(start[1], "    //")
    mutants = edited(cxx, edits, "sm_90a")
    mutants += [*remove_barriers(text, name), *remove("removed", text, name, r"barrier\.cluster\..*")]
    mutants += edit("relaxed", text, name, r"barrier\.cluster\.arrive\.release.*", "release", "relaxed")
    mutants += [Mutant("blocks that may not have started", compiled(unordered, "sm_90a"))]
    assert_caught(text, mutants, run_small, seeds=range(2), equivalent=equivalent)
