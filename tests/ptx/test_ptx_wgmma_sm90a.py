"""The PTX of csrc/cuda/gemm_wgmma_sm90a.cu equals the reference, and its mutants are caught."""

import functools
import re

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import In, Module, Report, Struct, TensorMap
from tools.ptx.mutate import Mutant, assert_caught, remove, remove_barriers

from .product import (
    BIT_EDITS,
    DRAWN,
    FULL,
    Call,
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
    source_of_type,
)

TARGETS = ["sm_90a"]
NAME = "gemm_wgmma_sm90a.cu"
# The rows and columns of each tile, and the stages in shared memory, in the order of WarpgroupTile.
STAGES = {(128, 192): 5, (128, 128): 6}
WIDE, NARROW = STAGES
THREADS, LINE, STAGE = 384, 128, 1024  # LINE is the bytes of a row in a stage, STAGE its bits


def halves(out: torch.dtype) -> int:
    """Return 2 if even and odd rows of weight lie apart in a stage, otherwise 1."""
    return 2 if out.itemsize <= 2 else 1


def tile_of(out: torch.dtype, tile: tuple[int, int]) -> tuple[int, int]:
    return NARROW if out is torch.float64 else tile


def kernel_name(module: Module, out: torch.dtype, tile: tuple[int, int]) -> str:
    _, columns = tile_of(out, tile)
    sizes = f"ILi{columns}ELi{STAGES[tile_of(out, tile)]}ELi{halves(out)}E"
    return kernel(module, rf"multiply_tilesI\w*{output_name(out)}\w*Shape{sizes}")


def maps(call: Call, tile: tuple[int, int]) -> Struct:
    """Return the tensor maps of x and of the even and odd rows of weight, as the launcher makes them."""
    m, n, k, out = call.what
    rows, columns = tile_of(out, tile)
    x, stride, _, weight = call.fields.values[:4]
    width, count = ceil_div(k, 128) * 4, halves(out)
    found = [TensorMap(x, (width, m), (4 * stride,), (32, rows), 4, LINE)]
    for half in range(count):
        first = half if half < n else 0
        size = width, ceil_div(n - first, count)
        found.append(
            TensorMap(weight.at(4 * first * stride), size, (4 * stride * count,), (32, columns // count), 4, LINE)
        )
    return Struct("128s128s128s", *found, *[bytes(128)] * (3 - len(found)))


def shared_bytes(out: torch.dtype, tile: tuple[int, int]) -> int:
    """Return the bytes of stages, margins and barriers, and 1024 to align them."""
    rows, columns = tile_of(out, tile)
    stages = STAGES[rows, columns]
    channels = columns * 4 + columns // 8 if out is torch.bool else columns * 2 * (8 if out is torch.float64 else 4)
    margins = ceil_div(channels + 4 * (columns + rows), 16) * 16
    end = stages * (rows + columns) * LINE + 2 * margins + 8 * (2 * stages + 2) + 1
    return ceil_div(end, 16) * 16 + 1024


def whole_vectors(n: int, out: torch.dtype) -> bool:
    return n * out.itemsize % (2 * halves(out) * out.itemsize) == 0


def launch(module: Module, call: Call, tile: tuple[int, int], blocks: int = 2, seed: int = 0) -> Report:
    """Launch the kernel as the launcher does on a device of so many multiprocessors."""
    m, n, _, out = call.what
    rows, columns = tile_of(out, tile)
    grid = ceil_div(m, rows), ceil_div(n, columns)
    arguments = [call.fields, maps(call, tile), *grid, whole_vectors(n, out)]
    name, blocks = kernel_name(module, out, tile), min(blocks, grid[0] * grid[1])
    shared = shared_bytes(out, tile) if module.ptx.target == "sm_90a" else 0  # other targets have no code for it
    return module.launch(name, blocks, THREADS, arguments, shared, seed=seed)


def check_wgmma(
    module: Module, m: int, n: int, k: int, out=torch.int32, tile=NARROW, seed: int = 0, blocks: int = 2, **more
) -> Report:
    """Check a product of random words."""
    more = {"header": prepared_header(n, k), **more}
    call = product_call(m, n, k, out, seed=seed, aligned=True, **more)
    report = launch(module, call, tile, blocks, seed)
    call.check(report)
    assert report.bank_conflicts == 0, report.conflicts_by_source()
    return report


def shapes(tile: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Return shapes at the edges of the tile, of 16-byte chunks, of stages and of the ring, and random shapes."""
    (rows, columns), stages = tile, STAGES[tile]
    found = [(rows + 1, columns + 1, k) for k in (1, 127, 129, STAGE - 1, STAGE, STAGE + 1)]
    found += [(9, columns + 3, whole * STAGE + k) for whole in (0, 1, stages) for k in (255, 257, 513, 768, 769)]
    found += [(m, columns - 1, 200) for m in (1, 8, 9, 64, 65, rows - 1, rows)]
    found += [(9, n, 200) for n in (1, 2, 3, 4, 7, 8, 15, 16, 17, 33, columns - 2, columns, 2 * columns + 4)]
    # The ring is filled, passed through once, and a tile begins at any of its places.
    found += [(20, 3 * columns, count * STAGE - 5) for count in (1, 2, stages - 1, stages, stages + 1)]
    found += [(3 * rows, 9, 2 * stages * STAGE + 1), (17 * rows, columns + 1, 100)]
    most = (3 * rows, 3 * columns, 3 * stages * STAGE) if FULL else (rows + 9, columns + 9, 3 * STAGE)
    drawn = np.random.default_rng(columns).integers(1, most, (DRAWN // 2, 3))
    return [*found, *map(tuple, drawn.tolist())]


@pytest.mark.parametrize("tile", STAGES, ids=lambda tile: "m{}n{}".format(*tile))
def test_shapes(tile):
    built = module(NAME, "sm_90a")
    for seed, (m, n, k) in seeded(shapes(tile)) if FULL else enumerate(shapes(tile)):
        out = (torch.bfloat16, torch.int32)[seed % 2]
        check_wgmma(built, m, n, k, out, tile, seed, blocks=1 + seed % 3)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
def test_outputs(out):
    """Rows of y are whole vectors or not, with all kinds of scale and bias."""
    built = module(NAME, "sm_90a")
    for index, n in enumerate((80, 67)):
        for more in channels_of(out, n) if FULL else channels_of(out, n)[index::2]:
            check_wgmma(built, 20, n, 333, out, (NARROW, WIDE)[index], **more)


@pytest.mark.parametrize("tile", STAGES, ids=lambda tile: "m{}n{}".format(*tile))
def test_steps_past_k_are_skipped(tile):
    """Both halves of a tile are multiplied, four warps at a time, for each 256 bits that hold values."""
    for k in (1, 256, 257, 700, 1000, 1024, 1025, 6 * 1024 + 513):
        report = check_wgmma(module(NAME, "sm_90a"), 20, 2 * tile[1], k, torch.bfloat16, tile)
        products = sum(count for name, count in report.instructions.items() if name.startswith("wgmma.mma_async"))
        assert products == 2 * 2 * 128 * ceil_div(k, 256)


@pytest.mark.parametrize("tile", STAGES, ids=lambda tile: "m{}n{}".format(*tile))
def test_bits(tile):
    rows, columns = tile
    few = [(rows, columns, 1), (rows + 1, columns + 6, 40), (3, columns + 65, 33), (70, 31, 1100), (2 * rows, 97, 2048)]
    few += [(70, 1, 40)]  # a map of the odd rows of weight cannot have no row, so it has the even one
    for seed, shape in enumerate(bit_shapes(*tile) if FULL else few):
        if shape[2]:  # the launcher leaves a product of no values to another kernel
            check_wgmma(module(NAME, "sm_90a"), *shape, torch.bool, tile, seed, flipped=seed % 4 > 0)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
def test_whole_sectors(out):
    """A warp reads or writes all of each 32 bytes of global memory that an instruction touches."""
    report = check_wgmma(module(NAME, "sm_90a"), 128, 128, 1024, out)
    assert report.sectors == report.sectors_needed, report.excess_sectors_by_source()


def test_what_lies_behind_a_row_is_ignored():
    """Words between a row's aligned words and the next row may hold anything."""
    m, n, k = 66, 71, 700
    for out in (torch.int32, torch.bfloat16):
        call = product_call(m, n, k, out, aligned=True)
        values = list(call.fields.values)
        for operand in (0, 3):
            words = values[operand].array
            values[operand] = In(np.concatenate([words, np.full((len(words), 8), -1, np.int32)], 1))
            values[operand + 1] += 8
        call.fields = type(call.fields)(call.fields.format, *values)
        launch(module(NAME, "sm_90a"), call, NARROW)
        call.check()


@pytest.mark.parametrize("tile", STAGES, ids=lambda tile: "m{}n{}".format(*tile))
def test_it_reports_weights_prepared_for_another_product(tile):
    check_wrong_forms(functools.partial(launch, module(NAME, "sm_90a"), tile=tile), 3, tile[1] + 6, 700)


@pytest.mark.parametrize("target", ["sm_80", "sm_120"])
def test_it_writes_no_result_where_the_instruction_is_not(target):
    """The heuristics choose another kernel for these targets; if this one ran, no output would look like a result."""
    call = product_call(130, 134, 700, torch.bfloat16, aligned=True)
    launch(module(NAME, target), call, NARROW)
    call.wrong_form[:] = [134, 700, 0, 0, 1]  # the kernel has no form to report
    call.check_no_result((0, 0))


# ---- Mutants ---------------------------------------------------------------------------------------------------------
@functools.cache
def small_source(dtype: str) -> str:
    """Return the kernel for the narrow tile and one type of outputs alone."""
    text, tiles = re.subn(r".*case WarpgroupTile::(?!m128n128)\w+: return launch.*\n", "", source_of_type(NAME, dtype))
    assert tiles == 1
    return text


def run_pipeline(module: Module, seed: int) -> None:
    """Check many tiles of one stage, and tiles in which the ring goes round twice.

    There, parities alone do not tell one consumer's stages from the other's.
    """
    rows, columns = NARROW
    check_wgmma(module, 4 * rows - 1, columns + 9, 100, torch.bfloat16, seed=seed, blocks=1)
    # The last stage is whole, and it has three steps.
    for k in (2 * STAGES[NARROW] * STAGE - 5, 2 * STAGES[NARROW] * STAGE + 600):
        check_wgmma(module, 2 * rows + 5, columns - 1, k, torch.bfloat16, seed=seed, blocks=1)


def run_small(module: Module, seed: int, out: torch.dtype = torch.bfloat16) -> None:
    rows, columns = NARROW
    bias = torch.randn(2 * columns, generator=torch.Generator().manual_seed(seed))
    channels = {} if out is torch.bool else {"bias": bias[: columns + 6], "scale": bias[columns - 6 :]}
    check_wgmma(module, rows + 70, columns + 6, 2 * STAGE + 300, out, seed=seed, blocks=1, **channels)
    # There is only a scale, and a row ends with a word.
    channels = {} if out is torch.bool else {"scale": bias[:64]}
    check_wgmma(module, 70, 64, 100, out, seed=seed, **channels)
    check_wgmma(module, 3, columns + 1, 1, out, seed=seed, blocks=3)


def replaced(text: str, pattern: str, new: str, count: int | None = None) -> list[str]:
    """Return the text with one match after the other replaced; `count` is the number of matches that must be found."""
    found = list(re.finditer(pattern, text))
    assert len(found) == count or (count is None and found), (pattern, len(found))
    return [text[: match.start()] + match.expand(new) + text[match.end() :] for match in found]


@functools.cache
def ptx() -> str:
    return compiled(small_source("bfloat16"), "sm_90a")


def mutants_of_ptx() -> list[Mutant]:
    """Return mutants of the pipeline: barriers, fences, waits and registers."""
    text = ptx()
    name = kernel(Module.from_ptx(text), "multiply_tiles")
    found = [
        *remove_barriers(text, name),
        *remove("barrier without its arrivals", text, name, r"mbarrier\.arrive\.shared.*"),
        # The third one, between the steps of a last stage, orders products of one shape, which PTX orders anyway.
        *remove("no fence", text, name, r"wgmma\.fence.*")[:2],
        *remove("no group", text, name, r"wgmma\.commit_group.*"),
        *remove("no wait", text, name, r"wgmma\.wait_group.*"),
        *remove("a box is missing", text, name, r"cp\.async\.bulk\.tensor.*"),
        *remove("the first barriers are not initialised", text, name, r"mbarrier\.init.*")[:2],
        *remove("registers are not released", text, name, r"setmaxnreg\.dec.*"),
    ]
    edits = [
        ("a wait is left out", r"@!ended bra AGAIN;", "", 4),
        ("a wait lets one more group be in flight", r"(wgmma\.wait_group\.sync\.aligned) 1", r"\1 2", 2),
        ("the last wait lets a group be in flight", r"(wgmma\.wait_group\.sync\.aligned) 0", r"\1 1", 1),
        ("consumers claim more than there is", r"(setmaxnreg\.inc\.sync\.aligned\.u32) 240", r"\1 248", 1),
        ("the producer releases too few", r"(setmaxnreg\.dec\.sync\.aligned\.u32) 24", r"\1 40", 1),
    ]
    for what, pattern, new, count in edits:
        changed = replaced(text, pattern, new, count)
        found += [Mutant(f"{what} ({index})", mutant) for index, mutant in enumerate(changed)]
    return found


def test_mutants_of_the_pipeline_are_caught():
    mutants = mutants_of_ptx()
    assert len(mutants) == 3 + 4 + 2 + 3 + 3 + 6 + 2 + 1 + 4 + 2 + 1 + 1 + 1
    assert_caught(ptx(), mutants, run_pipeline, seeds=range(2))


PIPELINE_EDITS = [
    # These change barriers and parities.
    ("init_barrier(shared.full[stage], 1)", "init_barrier(shared.full[stage], 2)"),
    ("init_barrier(shared.empty[stage], kWarps)", "init_barrier(shared.empty[stage], kWarps - 1)"),
    ("init_barrier(shared.empty[stage], kWarps)", "init_barrier(shared.empty[stage], kWarps + 1)"),
    ("init_barrier(turn, kWarps)", "init_barrier(turn, kWarps - 1)"),
    ("arrive_and_expect(full, Shape::kStageBytes)", "arrive_and_expect(full, Shape::kStageBytes - 128)"),
    ("arrive_and_expect(full, Shape::kStageBytes)", "arrive_and_expect(full, Shape::kStageBytes + 128)"),
    ("wait(shared.empty[ring.stage()], ring.parity() ^ 1)", "wait(shared.empty[ring.stage()], ring.parity())"),
    ("ring.parity());\n        fence_products();", "ring.parity() ^ 1);\n        fence_products();"),
    ("ring.parity());\n        // Each step", "ring.parity() ^ 1);\n        // Each step"),
    ("place == 2 * Shape::kStages - 1", "place == Shape::kStages - 1"),
    ("stages < Shape::kStages ? stages : Shape::kStages", "Shape::kStages"),
    ("stages < Shape::kStages ? stages : Shape::kStages", "stages"),
    ("if (tile == blockIdx.x) {", "{"),
    ("            ring.skip(early);\n", ""),
    ("turn_parity = which == 0", "turn_parity = 0"),
    ("turn_parity = which == 0", "turn_parity = 1"),
    ("        turn_parity ^= 1;\n", ""),
    ("ring.skip(which * stages);", ""),
    ("ring.skip(stages);", ""),
    ("shared.turn[other]", "shared.turn[which]"),
    ("    if (leads) arrive(next_turn);\n", ""),
    ("if (leads) arrive(next_turn);", "if (leads) arrive(my_turn);"),
    ("    wait(my_turn, turn_parity);\n", ""),
    ("% kSteps;\n    const int whole = stages - (rest != 0)", "% kSteps;\n    const int whole = stages"),
    ("stages - (rest != 0);", "stages - 1;"),
    ("step < rest", "step < rest - 1"),
    ("weight, 0, whole != 0", "weight, 0, true"),
    ("weight, 0, whole != 0", "weight, 0, false"),
    ("release_last(whole);", "release_last(0);"),
    ("stage() == 0 ? Shape::kStages : stage()) - 1", "stage() == 0 ? Shape::kStages - 1 : stage()) - 1"),
    ("/ kInstructionBits) % kSteps", "/ kInstructionBits - 1) % kSteps"),
    ("leads = thread % kWarp == 0", "leads = thread == 0"),
    ("arrive(shared.empty[ring.last()]);\n    };", "arrive(shared.empty[ring.stage()]);\n    };"),
    # These change which tile is computed.
    ("step = kConsumers * gridDim.x", "step = gridDim.x"),
    ("blockIdx.x + gridDim.x * which", "blockIdx.x"),
    # These change where factors lie and are read.
    ("kSwizzle128 = uint64_t{1} << 62", "kSwizzle128 = uint64_t{2} << 62"),
    ("kGroup = uint64_t{1024 / 16} << 32", "kGroup = uint64_t{512 / 16} << 32"),
    ("description + static_cast<uint64_t>(bytes / 16)", "description + static_cast<uint64_t>(bytes / 8)"),
    ("step * kInstructionBits / 8", "step * kInstructionBits / 16"),
    ("strip * kInstructionRows * kLineBytes + bytes", "strip * 32 * kLineBytes + bytes"),
    ("advance(weight, bytes)", "weight"),
    ("index != 0 || step != 0", "index != 0"),
    ("index != 0 || step != 0", "1"),
    ("past ? kAlignment - past : 0", "(past ? kAlignment - past : 0) + 512"),
    ("past ? kAlignment - past : 0", "past + 64"),
    ("copy_box(stage.x, maps.x, word, row, full)", "copy_box(stage.x, maps.x, word, column, full)"),
    ("maps.weight[half], word, column", "maps.weight[0], word, column"),
    ("stage.weight[half], maps", "stage.weight[1 - half], maps"),
    ("index * static_cast<int>(kLineWords)", "index * 16"),
    ("at.column / Shape::kHalves)", "at.column)"),
]
OUTPUT_EDITS = [
    # These change edges.
    ("existing(product.n - at.column, Shape::kColumns) - kOutputs * q", "Shape::kColumns - kOutputs * q"),
    ("existing(product.m - at.row, Shape::kRows) - top", "existing(product.m - at.row, Shape::kRows) - top + 1"),
    ("if (e < left) to[e]", "if (e <= left) to[e]"),
    ("if (left > 0) __stcs", "if (left >= 0) __stcs"),
    ("column < product.n ? product.weight", "column <= product.n ? product.weight"),
    ("row < product.m ? product.x", "row <= product.m ? product.x"),
    # These change which sums a lane's outputs are, and what is computed from them.
    ("e % Shape::kHalves * (", "(1 - e % Shape::kHalves) * ("),
    ("+ group) * 4 + e / Shape::kHalves", "+ group) * 4 + (1 - e / Shape::kHalves)"),
    ("margins.rows[top + strip * kInstructionRows + 8 * half]", "margins.rows[top + strip * kInstructionRows]"),
    ("thread / kWarp * 16 + thread % kWarp / 4;\n    const bool has_scale", "thread / 4;\n    const bool has_scale"),
    ("const int row = strip * kInstructionRows + 8 * half;", "const int row = strip * kInstructionRows + 4 * half;"),
    ("4 * static_cast<uint32_t>(sum)", "2 * static_cast<uint32_t>(sum)"),
    ("2 * static_cast<uint32_t>(row);", "static_cast<uint32_t>(row);"),
    ("product.k - 2 * int64_t{count}", "product.k - int64_t{count}"),
    ("            if (has_scale) {", "            if (has_bias) {"),
    ("            if (has_bias) {", "            if (!has_scale) {"),
    ("read(margins.channels.bias + column, summand)", "read(margins.channels.scale + column, summand)"),
    ("__floats2bfloat162_rn(first, second)", "__floats2bfloat162_rn(second, first)"),
    # This one reads margins that the next tile has.
    ("        sync_warpgroup(1 + which);  // all have read those of the tile before\n", ""),
]
OWN_BIT_EDITS = [
    ("kWordBits < width", "kWordBits <= width"),
    ("row_exists = mine < product.m", "row_exists = mine <= product.m"),
    ("<< (8 * row + c)", "<< (8 * row + (c ^ 4))"),
    ("group = 2 * word + c / kOutputs", "group = 2 * word + 1 - c / kOutputs"),
    ("sums[row / 2][", "sums[row % 2]["),
    ("row % 2 * 2])", "row / 2 * 2])"),
    ("row / 2 * kInstructionRows + row % 2 * 8", "row * 8"),
    ("q / 2 * kInstructionRows + q % 2 * 8", "q % 2 * kInstructionRows + q / 2 * 8"),
    ("count + ones - 2 * both", "count + ones - both"),
    ("low |= low >> 4", "low |= low >> 8"),
    ("__byte_perm(low, high, 0x6420)", "__byte_perm(low, high, 0x4620)"),
    ("margins.channels.flips[word]", "margins.channels.flips[0]"),
    ("0x3715 : 0x6240", "0x6240 : 0x3715"),
]


@pytest.mark.slow
def test_edits_of_the_pipeline_are_caught():
    text = small_source("bfloat16")
    give, take = "    if (leads) arrive(next_turn);\n", "    wait(my_turn, turn_parity);\n"
    assert text.count(give) == text.count(take) == 1
    early = Mutant("the turn is given on early", compiled(text.replace(give, "").replace(take, take + give), "sm_90a"))
    mutants = [*edited(text, PIPELINE_EDITS, "sm_90a", always=True), early]
    assert_caught(ptx(), mutants, run_pipeline, seeds=range(2))


def check_bands(module: Module, seed: int) -> None:
    """Check more tile rows than a band has, in several columns."""
    check_wgmma(module, 17 * NARROW[0] + 1, NARROW[1] + 2, 1, torch.bfloat16, seed=seed, blocks=3)


@pytest.mark.slow
def test_edits_of_bands_are_caught():
    edits = [
        ("left < kTall ? left : kTall", "kTall"),
        ("band * kTall + index % height", "index % height"),
        ("int64_t{index / height} *", "int64_t{index / kTall} *"),
    ]
    assert_caught(ptx(), edited(small_source("bfloat16"), edits, "sm_90a"), check_bands, seeds=range(1))


@pytest.mark.slow
def test_edits_of_outputs_are_caught():
    assert_caught(ptx(), edited(small_source("bfloat16"), OUTPUT_EDITS, "sm_90a"), run_small, seeds=range(2))


@pytest.mark.slow
def test_edits_of_bits_are_caught():
    text = small_source("boolean")
    run = functools.partial(run_small, out=torch.bool)
    edits = edited(text, [*BIT_EDITS, *OWN_BIT_EDITS], "sm_90a")
    assert_caught(compiled(text, "sm_90a"), edits, run, seeds=range(2))
