"""csrc/cuda/gemm_skinny_mma_sm80.cu, executed as PTX against the reference; and its mutants."""

import functools
import itertools

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
    aligned_words_for,
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

TARGETS = targets("sm_80", "sm_90a")
NAME = "gemm_skinny_mma_sm80.cu"
SLICE = 16  # words
# Shapes by the tiles of 8 columns: slices that a lane loads at once, and the most warps.
SHAPES = {1: (4, 16), 2: (2, 8), 4: (2, 8)}


def launch(module: Module, call: Call, tiles: int = 1, seed: int = 0) -> Report:
    """As the launcher does it, which takes more tiles for many columns; they are tested at few of them too."""
    _, n, k, out = call.what
    slices, most_warps = SHAPES[tiles]
    pattern = rf"AsI{DTYPES[out][1]}{total_letter(out)}E\w*ShapeILi{tiles}ELi{slices}ELi{most_warps}E"
    width = aligned_words_for(k)
    warps = min(max(ceil_div(width, slices * SLICE), 1), most_warps)
    return module.launch(kernel(module, pattern), ceil_div(n, 8 * tiles), 32 * warps, [call.fields, width], seed=seed)


def spread(call: Call) -> Call:
    """Words between a row's aligned words and the next row, which may hold anything; strides that differ."""
    values = list(call.fields.values)
    for operand, more in ((0, 8), (3, 24)):
        words = values[operand].array
        values[operand] = In(np.concatenate([words, np.full((len(words), more), -1, np.int32)], 1))
        values[operand + 1] += more
    call.fields = type(call.fields)(call.fields.format, *values)
    return call


def check_skinny(
    module: Module, m: int, n: int, k: int, out=torch.int32, tiles: int = 1, seed: int = 0, **more
) -> Report:
    """A product of random words."""
    call = spread(product_call(m, n, k, out, seed=seed, aligned=True, header=prepared_header(n, k), **more))
    report = launch(module, call, tiles, seed)
    call.check()
    assert report.bank_conflicts == 0, report.conflicts_by_source()
    return report


def shapes() -> list[tuple[int, int, int, int]]:
    """Edges of rows, of a block's columns, of a slice, a step and all warps' steps, in words; random ones."""
    edges = [(m, 9, 65, 1) for m in (1, 2, 3, 7, 8, 9, 15, 16)] + [(16, 9, k, 1) for k in (1, 31, 32, 127, 128)]
    for tiles, (slices, warps) in SHAPES.items():
        columns, piece, step = 8 * tiles, 32 * SLICE, 32 * SLICE * slices
        k = [0, 33, 129, *(edge + by for edge in (piece, step) for by in (-32, 0, 1, 32))]
        k += [warps * step + by for by in (-32, 0, 1, step + 32)]
        m = itertools.cycle((16, 1, 9, 8, 15, 7))
        n = itertools.cycle((columns + 1, 1, columns, columns - 1, 2 * columns + 5))
        edges += [(next(m), next(n), k, tiles) for k in k]
    generator = np.random.default_rng(0)
    drawn = np.stack([generator.integers(1, most, DRAWN) for most in (17, 80, 9000)], 1).tolist()
    return [*edges, *((*shape, (1, 2, 4)[i % 3]) for i, shape in enumerate(drawn))]


@pytest.mark.parametrize("target", TARGETS)
def test_skinny(target):
    for seed, (m, n, k, tiles) in seeded(shapes()):
        check_skinny(module(NAME, target), m, n, k, tiles=tiles, seed=seed)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_skinny_outputs(target, out):
    """All that scale and bias may be."""
    n = 43
    vectors = channels_of(out, n)
    for more in vectors:
        check_skinny(module(NAME, target), 11, n, 333, out, **more)
    for tiles in SHAPES:
        check_skinny(module(NAME, target), 16, n, 333, out, tiles, **vectors[-1])


@pytest.mark.parametrize("tiles", SHAPES)
def test_skinny_moves_whole_sectors(tiles):
    """Of each 32 bytes of global memory that a warp touches at once it reads or writes all."""
    report = check_skinny(module(NAME, "sm_80"), 16, 64, 8192, tiles=tiles)
    assert report.sectors == report.sectors_needed, report.excess_sectors_by_source()


def test_skinny_does_not_read_rows_that_do_not_exist():
    """Half the rows of x are half the loads of x."""
    loads = [
        sum(int(threads) for opcode, (_, threads, *_) in zip(r.opcodes, r.counts, strict=True) if "nc.v4" in opcode)
        for r in (check_skinny(module(NAME, "sm_80"), m, 8, 8192) for m in (8, 16))
    ]
    assert 2 * loads[0] == loads[1] == 16 * 8192 // 128


@pytest.mark.parametrize("target", TARGETS)
def test_skinny_traps_on_weights_prepared_for_another_product(target):
    right, m, n, k = prepared_header(9, 700), 3, 9, 700
    wrong = [prepared_header(n, k + 1), prepared_header(n - 1, k)]
    for byte in (0, 7, 8):  # of the magic number, and of the layout
        wrong.append(right.copy())
        wrong[-1][byte] ^= 1
    for header in wrong:
        with pytest.raises(PtxFault) as stopped:
            launch(module(NAME, target), product_call(m, n, k, aligned=True, header=header))
        assert stopped.value.kind == "trap"
    launch(module(NAME, target), product_call(m, n, k, aligned=True))


@pytest.mark.parametrize("target", ["sm_75", "sm_120"])
def test_kernels_trap_where_the_instruction_is_not(target):
    """The heuristics choose another kernel there."""
    for found in module(NAME, target).ptx.kernels.values():
        assert "trap" in [i.opcode for i in found.instructions]
        assert not [i.opcode for i in found.instructions if i.opcode.startswith(("st", "mma"))]


def run_small(module: Module, seed: int) -> None:
    bias = torch.randn(43, generator=torch.Generator().manual_seed(seed))
    check = functools.partial(check_skinny, module, out=torch.float32, seed=seed)
    check(m=13, n=27, k=8 * 1024 + 1024 + 65, tiles=2, bias=bias[:27], scale=bias[:27].flip(0))
    check(m=5, n=11, k=2048 + 129, tiles=1, bias=bias[:11])
    check(m=16, n=37, k=700, tiles=4)
    check(m=4, n=3, k=0)


def test_mutants_of_skinny_are_caught():
    edits = [
        # Edges.
        ("tile * kSide < columns", "tile * kSide <= columns"),
        ("half * kSide < rows", "half * kSide <= rows"),
        ("word + place < left", "word + place <= left"),
        ("while (left > 0)", "while (left > kStep)"),
        ("i < product.m * kColumns", "i <= product.m * kColumns"),
        ("column + thread < product.n", "column + thread <= product.n"),
        ("thread < product.m)", "thread <= product.m)"),
        ("thread < kColumns)", "thread < kColumns - 1)"),
        # Which words a lane reads.
        ("weight += warps * kStep", "weight += (warps - 1) * kStep"),
        ("x += warps * kStep", "x += kStep"),
        ("tile * kSide * weight_stride", "tile * kSide * x_stride"),
        ("half * kSide * x_stride", "half * 7 * x_stride"),
        ("lane % 4 * kWords", "lane % 2 * kWords"),
        ("{top.x, bottom.x, top.y, bottom.y}", "{top.x, top.y, bottom.x, bottom.y}"),
        ("{top.z, bottom.z, top.w, bottom.w}", "{top.z, bottom.z, top.y, bottom.w}"),
        ("{w.z, w.w}", "{w.w, w.z}"),
        # What becomes of the popcounts.
        ("row / kSide * 2 + column % 2", "column % 2 * 2 + row / kSide"),
        ("row % kSide * 4 + column % kSide / 2", "column % kSide * 4 + row % kSide / 2"),
        ("sums.words[i] = 0", "sums.words[i] = 1"),
        ("x_bits[row] + weight_bits[j]", "x_bits[row] + weight_bits[j ^ 1]"),
        ("- 2 * sums", "- sums"),
        ("channels.bias + j", "channels.bias + j + 1"),
        # Bank conflicts.
        ("kRegister = kWarp + kWarp / 2", "kRegister = kWarp"),
        ("+ kWarp / 2 / Tiles", ""),
    ]
    text = compiled(float32_source(NAME), "sm_80")
    mutants = edited(float32_source(NAME), edits)
    name = kernel(Module.from_ptx(text), "ShapeILi2E")
    barriers, fragments = remove_barriers(text, name), swap_fragments(text, name)[:13]  # of one instruction
    assert (len(barriers), len(fragments)) == (2, 13)
    assert_caught(text, [*mutants, *barriers, *fragments], run_small, seeds=range(2))
