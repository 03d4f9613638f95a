"""The PTX of csrc/cuda/gemm_mma_sm80.cu equals the reference, and its mutants are caught."""

import functools
import re

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import In, Module, Report
from tools.ptx.mutate import assert_caught, loosen_waits, remove, remove_barriers, remove_waits, swap_fragments

from .product import (
    BIT_EDITS,
    DRAWN,
    EDGE_EDITS,
    FULL,
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
    whole_vectors,
)

TARGETS = targets("sm_80", "sm_90a")
NAME = "gemm_mma_sm80.cu"
# The rows and columns of each tile, and its threads.
THREADS = {(128, 256): 256, (128, 128): 128, (64, 64): 128}
SMALL, SQUARE, WIDE = (64, 64), (128, 128), (128, 256)
STAGE_BYTES, STAGES = 64, 4  # bytes of a row in a stage; stages in shared memory


def launch(module: Module, call, tile: tuple[int, int], seed: int = 0) -> Report:
    """Launch the kernel as the launcher does."""
    m, n, _, out = call.what
    rows, columns = tile
    name = kernel(module, rf"multiply_tilesI\w*{output_name(out)}\w*ShapeILi{rows}ELi{columns}E")
    grid = ceil_div(m, rows), ceil_div(n, columns)
    arguments = [call.fields, *grid, whole_vectors(n, out)]
    shared = STAGES * STAGE_BYTES * (rows + columns)
    return module.launch(name, grid[0] * grid[1], THREADS[tile], arguments, shared, seed=seed)


def check_mma(module: Module, m: int, n: int, k: int, out=torch.int32, tile=SMALL, seed: int = 0, **more) -> Report:
    """Check a product of random words."""
    more = {"header": prepared_header(n, k), **more}
    call = product_call(m, n, k, out, seed=seed, aligned=True, **more)
    report = launch(module, call, tile, seed)
    call.check(report)
    assert report.bank_conflicts == 0, report.conflicts_by_source()
    return report


def shapes(tile: tuple[int, int] = SMALL) -> list[tuple[int, int, int]]:
    """Return shapes at the edges of the tile, of 16-byte chunks, of stages and of the pipeline, and random shapes."""
    (rows, columns), stage, depth = tile, 512, STAGES * 512
    k = [0, 1, 31, 32, 33, 127, 128, 129]
    k += [edge + by for edge in (stage, 2 * stage, depth, depth + stage) for by in (-32, -1, 0, 1, 32)]
    k += [depth + 2 * stage, depth + 3 * stage + 33]
    drawn = np.random.default_rng(0).integers(1, (2 * rows + 12, 2 * columns + 12, 4000), (DRAWN, 3)).tolist()
    return [
        *((m, 66, 40) for m in (1, rows - 1, rows, rows + 1, 2 * rows + 3)),
        *((3, n, 40) for n in (1, 7, 8, 9, 31, 33, columns - 1, columns, columns + 1, 2 * columns + 3)),
        *((2, 65, k) for k in k),
        (9 * rows + 1, columns + 67, 7),  # more tile rows than neighbouring blocks share
        *map(tuple, drawn),
    ]


@pytest.mark.parametrize("tile", THREADS, ids=lambda tile: "m{}n{}".format(*tile))
@pytest.mark.parametrize("target", TARGETS)
def test_mma(target, tile):
    for seed, shape in seeded(shapes(tile)):
        check_mma(module(NAME, target), *shape, tile=tile, seed=seed)


@pytest.mark.parametrize("tile", THREADS, ids=lambda tile: "m{}n{}".format(*tile))
@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", TARGETS)
def test_mma_outputs(target, out, tile):
    """Rows of y are whole vectors or not, with all kinds of scale and bias."""
    for n in (80, 67):
        for more in channels_of(out, n)[0 if tile == SMALL else -1 :]:
            check_mma(module(NAME, target), 20, n, 333, out, tile, **more)


def shapes_of_bits(tile: tuple[int, int] = SMALL) -> list[tuple[int, int, int]]:
    """Return shapes at the edges of words and of the tile, and one of several stages; fewer of the large tiles."""
    (rows, columns), deep = tile, (18, 45, 3 * 512 + 1)
    few = [(rows, columns, 1), (rows + 1, columns + 6, 40), (rows - 1, columns - 1, 0), (3, columns + 65, 33)]
    return [*(bit_shapes(*tile) if FULL or tile == SMALL else few), deep]


@pytest.mark.parametrize("tile", THREADS, ids=lambda tile: "m{}n{}".format(*tile))
@pytest.mark.parametrize("target", TARGETS)
def test_mma_bits(target, tile):
    for seed, shape in seeded_bits(shapes_of_bits(tile)):
        check_mma(module(NAME, target), *shape, torch.bool, tile, seed, flipped=seed % 4 > 0)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
def test_mma_moves_whole_sectors(out):
    """A warp reads or writes all of each 32 bytes of global memory that an instruction touches."""
    report = check_mma(module(NAME, "sm_80"), 64, 64, 1024, out)
    assert report.sectors == report.sectors_needed, report.excess_sectors_by_source()


def test_mma_ignores_what_lies_behind_a_row():
    """Words between a row's aligned words and the next row may hold anything."""
    m, n, k = 66, 70, 700
    call = product_call(m, n, k, aligned=True)
    values = list(call.fields.values)
    for operand in (0, 3):
        words = values[operand].array
        values[operand] = In(np.concatenate([words, np.full((len(words), 8), -1, np.int32)], 1))
        values[operand + 1] += 8
    call.fields = type(call.fields)(call.fields.format, *values)
    launch(module(NAME, "sm_80"), call, SMALL)
    call.check()


@pytest.mark.parametrize("tile", THREADS, ids=lambda tile: "m{}n{}".format(*tile))
@pytest.mark.parametrize("target", TARGETS)
def test_mma_reports_weights_prepared_for_another_product(target, tile):
    check_wrong_forms(functools.partial(launch, module(NAME, target), tile=tile), 3, tile[1] + 6, 700)


@pytest.mark.parametrize("target", ["sm_75", "sm_120"])
def test_kernels_write_no_result_where_the_instruction_is_not(target):
    """The heuristics choose another kernel for these targets; if this one ran, no output would look like a result."""
    call = product_call(67, 70, 700, torch.bfloat16, aligned=True)
    launch(module(NAME, target), call, SMALL)
    call.wrong_form[:] = [70, 700, 0, 0, 1]  # the kernel has no form to report
    call.check_no_result((0, 0))


@functools.cache
def small_source(tile: str, dtype: str = "float32") -> str:
    """Return the kernel for one tile and one type of outputs alone."""
    text, tiles = re.subn(rf".*case Tile::(?!{tile})\w+: return launch.*\n", "", source_of_type(NAME, dtype))
    assert tiles == 2
    return text


def test_mutants_of_the_report_are_caught():
    """This is the code of check_prepared.cuh, which all kernels have in common."""
    edits = [
        ("product.weight.popcounts) - 1;", "product.weight.popcounts) - 2;"),
        (" == kMagicNumber &&", " == kMagicNumber ||"),
        ("header->layout == kPreparedLayout;", "true;"),
        ("is_form && header->n == product.n", "header->n == product.n"),
        ("header->n == product.n && header->k", "header->k"),
        ("header->n == product.n && header->k == product.k", "header->n == product.n"),
        ("if (blockIdx.x == 0) {", "if (blockIdx.x == 4) {"),
        ("is_form ? header->n : -1, report", "header->n, report"),
        ("report->seen = 1;", "report->seen = 0;"),
        ("wrong_form = has_wrong_form(product);", "wrong_form = has_wrong_form(product) && false;"),
        ("i < rows * columns;", "i < rows * columns - 1;"),
        ("row + i / columns, n", "row + i / columns + 1, n"),
        ("m >= product.m || n >= product.n", "m > product.m || n >= product.n"),
        ("m >= product.m || n >= product.n", "m >= product.m"),
        ("__int_as_float(0x7FFFFFFF)", "__int_as_float(0x7F800000)"),
    ]

    def run(module: Module, seed: int) -> None:
        right = prepared_header(70, 700)
        wrong = [(prepared_header(*form), form) for form in ((70, 701), (69, 700))]
        for byte in (0, 8):
            wrong.append((right.copy(), (-1, -1)))
            wrong[-1][0][byte] ^= 1
        for header, form in wrong:
            call = product_call(67, 70, 700, torch.float32, aligned=True, header=header)
            launch(module, call, SMALL, seed)
            call.check_no_result(form)
        check_mma(module, 67, 70, 700, torch.float32, seed=seed)

    text = small_source("m64n64")
    assert_caught(compiled(text, "sm_80"), edited(text, edits), run, seeds=range(1))


def run_small(module: Module, seed: int, tile: tuple[int, int] = SMALL) -> None:
    rows, columns = tile
    bias = torch.randn(columns + 6, generator=torch.Generator().manual_seed(seed))
    check = functools.partial(check_mma, module, out=torch.float32, tile=tile, seed=seed)
    check(rows + 2, columns + 6, 6 * 512 + 130, bias=bias, scale=bias.flip(0))
    check(9 * rows + 1, columns + 1, 33)
    check(2, 1, 0, bias=bias[:1])
    check(3, 8, 4 * 512)


@pytest.mark.parametrize("tile", THREADS, ids=lambda tile: "m{}n{}".format(*tile))
def test_mutants_of_mma_are_caught(tile):
    edits = [
        # These change edges.
        ("row + i < height", "row + i <= height"),
        ("first + chunk < chunks", "first + chunk <= chunks"),
        ("of_x ? product.m : product.n) ?", "of_x ? product.m : product.n) + 1 ?"),
        ("margins.weight[index - Shape::kRows]) = counts", "margins.weight[(index ^ 1) - Shape::kRows]) = counts"),
        ("exists = first + i < n", "exists = first + i <= n"),
        ("at.row + row >= product.m", "at.row + row > product.m"),
        ("kStageBits - 1) / kStageBits", "kStageBits - 1) / kStageBits - 1"),
        ("row_tiles - band * kTall < kTall", "false"),
        ("word += kStep * operand.stride", "word += (kStep + 1) * operand.stride"),
        # These change the stages.
        ("stage < count; ++stage", "stage + 1 < count; ++stage"),
        ("if (stage + kStages < count)", "if (stage + kStages + 1 < count)"),
        ("stages[(stage + 1) % kStages], at, sums", "stages[stage % kStages], at, sums"),
        # These change which row and chunk a lane reads, and which outputs it holds.
        ("16 * fragment + 8 * half + at.g][at.q]", "16 * fragment + 8 * half + at.g][at.q ^ 1]"),
        ("column_of<Vector>(j, at.g / 2)][at.q]", "column_of<Vector>(j, at.g / 2)][at.q ^ 2]"),
        ("kGroup * group + at.g % 2", "kGroup * group + (at.g + 1) % 2"),
        ("{a[0].x, a[1].x, a[0].y, a[1].y}", "{a[0].x, a[0].y, a[1].x, a[1].y}"),
        ("{b[j].z, b[j].w}", "{b[j].x, b[j].w}"),
        ("[half % 2 * 2 + i % 2]", "[i % 2 * 2 + half % 2]"),
        ("group[j + i / 2]", "group[j]"),
        # These change what is computed from the sums.
        ("margins.x[row] + margins.weight[column + i]", "margins.x[row] + margins.weight[column]"),
        ("[column + i] - 2 * both", "[column + i] - both"),
        ("channels.bias + column", "channels.bias + column + 1"),
    ]
    cxx = small_source("m{}n{}".format(*tile))
    text = compiled(cxx, "sm_80")
    name = kernel(Module.from_ptx(text), "multiply_tiles")
    waits = [*remove_waits(text, name), *loosen_waits(text, name)]
    at_ptx = [
        *remove_barriers(text, name),
        *waits,
        *remove("commit removed", text, name, r"cp\.async\.commit_group"),
        *swap_fragments(text, name)[5:13],  # registers of one instruction: its sums, a and b
    ]
    assert len(waits) == 2 * 3 and len(at_ptx) == 4 + 6 + 5 + 8
    # The last wait is for stages in flight that an early end no longer needs; they lie behind the margins.
    last = {waits[i].name: "nothing reads or writes where the copies go" for i in (2, 5)}
    run = functools.partial(run_small, tile=tile)
    assert_caught(text, [*edited(cxx, edits), *at_ptx], run, seeds=range(2), equivalent=last)


@pytest.mark.parametrize("tile", THREADS if FULL else [SQUARE], ids=lambda tile: "m{}n{}".format(*tile))
def test_mutants_of_bits_are_caught(tile):
    rows, columns = tile

    def run(module: Module, seed: int) -> None:
        check = functools.partial(check_mma, module, out=torch.bool, tile=tile, seed=seed)
        check(rows + 2, columns + 33, 512 + 130)
        check(rows - 1, 31, 0, flipped=False)
        check(40, columns - 1, 65)

    edits = [
        *BIT_EDITS,
        *EDGE_EDITS,
        # These change which rows and columns a lane has.
        ("(8 * i + c)", "(8 * i + 7 - c)"),
        ("column + kEach * at.q + c]", "column + kEach * at.q + (c ^ 1)]"),
        ("row + 8 * at.q + at.g, at", "row + 4 * at.g + at.q, at"),
        ("channels.flips[column / kWordBits]", "channels.flips[0]"),
        # These change the exchange of bytes.
        ("0x3715 : 0x6240", "0x6240 : 0x3715"),
        ("0x3276 : 0x5410", "0x3276 : 0x5432"),
        ("__shfl_xor_sync(kAllLanes, bytes, 2)", "__shfl_xor_sync(kAllLanes, bytes, 4)"),
        # These change which sums are counted.
        ("[i % 2 * 2 + c % 2]", "[c % 2 * 2 + i % 2]"),
        ("group[c / 2]", "group[c / 2 ^ 1]"),
        ("sums[first + i / 2][index]", "sums[first + (i / 2 ^ 1)][index]"),
        ("margins.x[top + 8 * i + at.g]", "margins.x[top + at.g]"),
        ("margins.weight[left + 8 * at.q + c]", "margins.weight[left + 8 * at.q]"),
        ("at.q + c] - 2 * both", "at.q + c] - both"),
    ]
    cxx = small_source("m{}n{}".format(*tile), "boolean")
    assert_caught(compiled(cxx, "sm_80"), edited(cxx, edits), run, seeds=range(2))
