"""The PTX of csrc/cuda/gemm_skinny_mma_sm80.cu equals the reference, and its mutants are caught."""

import functools
import itertools

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import In, Module, Report
from tools.ptx.mutate import assert_caught, remove_barriers, swap_fragments

from .product import (
    BIT_EDITS,
    DRAWN,
    FULL,
    SEEDS,
    Call,
    aligned_words_for,
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
)

TARGETS = targets("sm_80", "sm_90a")
NAME = "gemm_skinny_mma_sm80.cu"
SLICE = 16  # the words of a slice
# A shape of up to 16 rows has a number of tiles of 8 columns. Its values are the slices that a lane loads at once and
# the maximum of warps.
SHAPES = {1: (4, 16), 2: (2, 8), 4: (2, 8)}
# A shape of more rows has a number of fragments of 16 rows, and 4 tiles. Its values are the same. It has at least 4
# warps, and no more if there are many columns.
FRAGMENTS = {2: (2, 12), 4: (2, 8)}
FEWEST_WARPS, MANY_COLUMNS = 4, 4096


def launch(module: Module, call: Call, tiles: int = 1, seed: int = 0) -> Report:
    """Launch the kernel as the launcher does, but with more tiles also for few columns; bits need the most of them."""
    m, n, k, out = call.what
    fragments = 1 if m <= 16 else 2 if m <= 32 else 4
    tiles = 4 if out is torch.bool or m > 16 else tiles
    slices, most_warps = SHAPES[tiles] if m <= 16 else FRAGMENTS[fragments]
    pattern = rf"{output_name(out)}\w*ShapeILi{fragments}ELi{tiles}ELi{slices}ELi{most_warps}E"
    width, fewest_warps = aligned_words_for(k), 1 if m <= 16 else FEWEST_WARPS
    if m > 16 and n > MANY_COLUMNS:
        most_warps = FEWEST_WARPS
    warps = min(max(ceil_div(width, slices * SLICE), fewest_warps), most_warps)
    return module.launch(kernel(module, pattern), ceil_div(n, 8 * tiles), 32 * warps, [call.fields, width], seed=seed)


def spread(call: Call) -> Call:
    """Put arbitrary words between the rows' aligned words, with strides that differ, and take x's popcounts away."""
    values = list(call.fields.values)
    values[2] = None
    for operand, more in ((0, 8), (3, 24)):
        words = values[operand].array
        values[operand] = In(np.concatenate([words, np.full((len(words), more), operand - 1, np.int32)], 1))
        values[operand + 1] += more
    call.fields = type(call.fields)(call.fields.format, *values)
    return call


def check_skinny(
    module: Module, m: int, n: int, k: int, out=torch.int32, tiles: int = 1, seed: int = 0, **more
) -> Report:
    """Check a product of random words."""
    more = {"header": prepared_header(n, k), **more}
    call = spread(product_call(m, n, k, out, seed=seed, aligned=True, **more))
    report = launch(module, call, tiles, seed)
    call.check(report)
    assert report.bank_conflicts == 0, report.conflicts_by_source()
    return report


def shapes() -> list[tuple[int, int, int, int]]:
    """Return shapes at the edges of rows, a block's columns, a slice, a step and all warps' steps, and random ones."""
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


def shapes_of_fragments() -> list[tuple[int, int, int]]:
    """Return the same of more than 16 rows."""
    edges = [(m, 9, 65) for m in (17, 24, 25, 31, 32, 33, 40, 41, 48, 49, 56, 57, 63, 64)]
    edges += [(64, 31, 1), (17, 1, 128), (64, 32, 0), (18, 33, 33)]
    for fragments, (slices, warps) in FRAGMENTS.items():
        step = 32 * SLICE * slices
        rows = itertools.cycle((16 * fragments, 16 * fragments - 15))
        k = [step - 32, step, step + 1, 4 * step, 4 * step + 32, warps * step, warps * step + step + 32]
        edges += [(next(rows), 9, k) for k in k]
    generator = np.random.default_rng(1)
    drawn = np.stack([generator.integers(least, most, DRAWN // 2) for least, most in ((17, 65), (1, 80), (1, 9000))], 1)
    return [*edges, *map(tuple, drawn.tolist())]


@pytest.mark.parametrize("target", TARGETS)
def test_fragments(target):
    for seed, (m, n, k) in enumerate((SEEDS if FULL else 1) * shapes_of_fragments()):
        check_skinny(module(NAME, target), m, n, k, seed=seed)


@pytest.mark.parametrize("target", TARGETS)
def test_skinny(target):
    for seed, (m, n, k, tiles) in seeded(shapes()):
        check_skinny(module(NAME, target), m, n, k, tiles=tiles, seed=seed)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_skinny_outputs(target, out):
    """The results are right for all kinds of scale and bias."""
    n = 43
    vectors = channels_of(out, n)
    for more in vectors:
        check_skinny(module(NAME, target), 11, n, 333, out, **more)
    for tiles in SHAPES:
        check_skinny(module(NAME, target), 16, n, 333, out, tiles, **vectors[-1])
    for m, more in itertools.product((29, 61), vectors[-2:]):
        check_skinny(module(NAME, target), m, n, 333, out, **more)


def shapes_of_bits() -> list[tuple[int, int, int]]:
    """Return shapes at the edges of words and of rows, of a step, and of the steps of all warps."""
    slices, warps = SHAPES[4]
    step = 32 * SLICE * slices
    edges = [(m, n, k) for m, n, k in bit_shapes(16, 32) if m <= 16]
    edges += [(16, 45, k) for k in (0, 33, step, step + 1, warps * step, warps * step + 32)]
    return [*edges, *((m, n, k) for m, n in ((17, 32), (32, 33), (33, 95), (64, 31)) for k in (0, 33, 5 * step + 1))]


@pytest.mark.parametrize("target", TARGETS)
def test_skinny_bits(target):
    for seed, (m, n, k) in seeded_bits(shapes_of_bits()):
        check_skinny(module(NAME, target), m, n, k, torch.bool, seed=seed, flipped=seed % 4 > 0)


@pytest.mark.parametrize(("m", "tiles"), [*((16, tiles) for tiles in SHAPES), (32, 4), (64, 4)])
def test_skinny_moves_whole_sectors(m, tiles):
    """A warp reads or writes all of each 32 bytes of global memory that an instruction touches."""
    report = check_skinny(module(NAME, "sm_80"), m, 64, 8192, tiles=tiles)
    assert report.sectors == report.sectors_needed, report.excess_sectors_by_source()


def test_skinny_does_not_read_rows_that_do_not_exist():
    """For half the rows of x, x is loaded half as often, and a warp without a part of K loads nothing."""
    loads = [
        sum(
            int(threads)
            for opcode, (_, threads, *_) in zip(r.opcodes, r.counts, strict=True)
            if opcode.startswith("ld.global.v4")
        )
        for r in (check_skinny(module(NAME, "sm_80"), m, 8, 2048) for m in (8, 16, 24, 32, 48, 64))
    ]
    assert loads == [m * 2048 // 128 for m in (8, 16, 24, 32, 48, 64)]


@pytest.mark.parametrize("target", TARGETS)
def test_skinny_reports_weights_prepared_for_another_product(target):
    for m in (3, 20, 50):
        check_wrong_forms(functools.partial(launch, module(NAME, target)), m, 75, 700)


@pytest.mark.parametrize("target", ["sm_75", "sm_120"])
def test_kernels_write_no_result_where_the_instruction_is_not(target):
    """The heuristics choose another kernel for these targets; if this one ran, no output would look like a result."""
    for m, out in itertools.product((3, 20, 50), (torch.bfloat16, torch.int32, torch.bool)):
        call = product_call(m, 75, 700, out, aligned=True)
        launch(module(NAME, target), call)
        call.wrong_form[:] = [75, 700, 0, 0, 1]  # the kernel has no form to report
        call.check_no_result((0, 0))


def run_small(module: Module, seed: int) -> None:
    bias = torch.randn(43, generator=torch.Generator().manual_seed(seed))
    check = functools.partial(check_skinny, module, out=torch.float32, seed=seed)
    check(m=13, n=27, k=8 * 1024 + 1024 + 65, tiles=2, bias=bias[:27], scale=bias[:27].flip(0))
    check(m=5, n=11, k=2048 + 129, tiles=1, bias=bias[:11])
    check(m=16, n=37, k=700, tiles=4)
    check(m=4, n=3, k=0)


def run_fragments(module: Module, seed: int) -> None:
    """Check shapes of which each warp has one step and one has two, some have none, and rows lack of each fragment."""
    bias = torch.randn(43, generator=torch.Generator().manual_seed(seed))
    check = functools.partial(check_skinny, module, out=torch.float32, seed=seed)
    check(m=57, n=37, k=8 * 1024 + 65, bias=bias[:37], scale=bias[:37].flip(0))
    check(m=23, n=32, k=1024 + 65)
    check(m=40, n=9, k=0)


# What follows the bound of a load of weights and of x.
WEIGHTS, X = (f";\n#pragma unroll\n            for (int {index} = 0" for index in ("tile", "half"))


def test_mutants_of_skinny_are_caught():
    edits = [
        # These change edges.
        ("tile * kSide < columns", "tile * kSide <= columns"),
        ("half * kSide < rows", "half * kSide <= rows"),
        (f"word + place < left{WEIGHTS}", f"word + place <= left{WEIGHTS}"),
        (f"word + place < left{X}", f"word + place <= left{X}"),
        ("while (left > 0)", "while (left > kStep)"),
        ("i < product.m * kColumns", "i <= product.m * kColumns"),
        ("thread < kColumns)", "thread < kColumns - 1)"),
        ("thread < kRows)", "thread < kRows - 8)"),
        # These change which words a lane reads.
        ("weight += warps * kStep", "weight += (warps - 1) * kStep"),
        ("x += warps * kStep", "x += kStep"),
        ("tile * kSide * weight_stride", "tile * kSide * x_stride"),
        ("half * kSide * x_stride", "half * 7 * x_stride"),
        ("lane % 4 * kWords", "lane % 2 * kWords"),
        ("{top.x, bottom.x, top.y, bottom.y}", "{top.x, top.y, bottom.x, bottom.y}"),
        ("{top.z, bottom.z, top.w, bottom.w}", "{top.z, bottom.z, top.y, bottom.w}"),
        ("{w.z, w.w}", "{w.w, w.z}"),
        # These change what is computed from the popcounts.
        ("half * 2 + column % 2", "column % 2 * 2 + half"),
        ("row % kSide * 4 + column % kSide / 2", "column % kSide * 4 + row % kSide / 2"),
        ("sums.words[i] = 0", "sums.words[i] = 1"),
        ("bits.x[row] + bits.weight[j]", "bits.x[row] + bits.weight[j ^ 1]"),
        ("x_bits[2 * i + 1] += count_bits(bottom)", "x_bits[2 * i + 1] += count_bits(top)"),
        ("weight_bits[tile] += count_bits(w)", "weight_bits[tile] = count_bits(w)"),
        ("__popc(words.z) + __popc(words.w)", "__popc(words.z)"),
        ("count += __shfl_xor_sync(kAllLanes, count, 2);", ""),
        ("if (place == 0) atomicAdd", "atomicAdd"),
        ("bits.x[half * kSide + g]", "bits.x[half * kSide + (g ^ 1)]"),
        ("bits.weight[tile * kSide + g]", "bits.weight[g]"),
        ("- 2 * sums", "- sums"),
        ("channels.bias + j", "channels.bias + j + 1"),
        # This one causes bank conflicts.
        ("kRegister = kWarp + kWarp / 2", "kRegister = kWarp"),
        ("+ kWarp / 2 / Tiles", ""),
    ]
    text = compiled(source_of_type(NAME), "sm_80")
    mutants = edited(source_of_type(NAME), edits)
    name = kernel(Module.from_ptx(text), "ShapeILi1ELi2E")
    barriers, fragments = remove_barriers(text, name), swap_fragments(text, name)[:13]  # registers of one instruction
    assert (len(barriers), len(fragments)) == (2, 13)
    assert_caught(text, [*mutants, *barriers, *fragments], run_small, seeds=range(2))


def test_mutants_of_fragments_are_caught():
    edits = [
        ("index * kStep >= width", "index * kStep + kStep >= width"),
        ("bottom = a[slice][2 * i + 1]", "bottom = a[slice][2 * i]"),
        ("if (i == 0) weight_bits", "weight_bits"),
        ("top = a[slice][2 * i]", "top = a[slice][2 * (i / 2)]"),
        ("Fragments == 1 ? 0 : row / (2 * kSide)", "0"),
        ("half = row / kSide - 2 * fragment", "half = row / kSide"),
        ("words[fragment * kFragment + ", "words["),
        ("x_bits[2 * i] += count_bits(top)", "x_bits[2 * (i / 2)] += count_bits(top)"),
        ("kRows = kHalves * kSide", "kRows = 2 * kSide"),
        ("kFragment = Tiles * kTile", "kFragment = kTile"),
        ("half < kHalves; ++half) add_row", "half < 2; ++half) add_row"),
    ]
    cxx = source_of_type(NAME)
    text = compiled(cxx, "sm_80")
    barriers = remove_barriers(text, kernel(Module.from_ptx(text), "ShapeILi4ELi4E"))
    assert len(barriers) == 2
    assert_caught(text, [*edited(cxx, edits), *barriers], run_fragments, seeds=range(2))


def test_mutants_of_bits_are_caught():
    def run(module: Module, seed: int) -> None:
        check = functools.partial(check_skinny, module, out=torch.bool, seed=seed)
        check(m=13, n=45, k=8 * 1024 + 65)
        check(m=16, n=70, k=33)
        check(m=1, n=31, k=0, flipped=False)

    edits = [
        *BIT_EDITS,
        ("bits.x[row] + bits.weight[j]", "bits.x[row] + bits.weight[j ^ 1]"),
        ("product, row, column, different, channels", "product, row, column, different + 1, channels"),
        ("channels.limits[lane]", "channels.limits[lane ^ 1]"),
        ("if (lane == 0) write_word", "if (lane < 2) write_word"),
    ]
    cxx = source_of_type(NAME, "boolean")
    assert_caught(compiled(cxx, "sm_80"), edited(cxx, edits), run, seeds=range(2))
