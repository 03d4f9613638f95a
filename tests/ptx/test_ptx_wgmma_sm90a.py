"""The PTX of csrc/cuda/gemm_wgmma_sm90a.cu equals the reference, and its mutants are caught."""

import functools
import re

import numpy as np
import pytest
import torch
from support.reference import FLOATS

from tools.ptx.machine import In, Module, PtxFault, Report, Struct, TensorMap
from tools.ptx.mutate import assert_caught, remove, remove_barriers

from .product import (
    BIT_EDITS,
    DRAWN,
    FULL,
    Call,
    bit_shapes,
    ceil_div,
    channels_of,
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
        found.append(TensorMap(weight.at(4 * first * stride), size, (4 * stride * count,), (32, columns // count), 4, LINE))
    return Struct("128s128s128s", *found, *[bytes(128)] * (3 - len(found)))


def shared_bytes(out: torch.dtype, tile: tuple[int, int]) -> int:
    """Return the bytes of stages, margins and barriers, and 1024 to align them."""
    rows, columns = tile_of(out, tile)
    stages = STAGES[rows, columns]
    channels = columns * 4 + columns // 8 if out is torch.bool else columns * 2 * (8 if out is torch.float64 else 4)
    margins = ceil_div(channels + 4 * (columns + rows), 16) * 16
    end = stages * (rows + columns) * LINE + 2 * margins + 8 * (2 * stages + 2)
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
    return module.launch(name, blocks, THREADS, arguments, shared_bytes(out, tile), seed=seed)


def check_wgmma(
    module: Module, m: int, n: int, k: int, out=torch.int32, tile=NARROW, seed: int = 0, blocks: int = 2, **more
) -> Report:
    """Check a product of random words."""
    call = product_call(m, n, k, out, seed=seed, aligned=True, header=prepared_header(n, k), **more)
    report = launch(module, call, tile, blocks, seed)
    call.check(report)
    assert report.bank_conflicts == 0, report.conflicts_by_source()
    return report


def shapes(tile: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Return shapes at the edges of the tile, of 16-byte chunks, of stages and of the ring, and random shapes."""
    (rows, columns), stages = tile, STAGES[tile]
    found = [(rows + 1, columns + 1, k) for k in (1, 127, 129, STAGE - 1, STAGE, STAGE + 1)]
    found += [(m, columns - 1, 200) for m in (1, 7, 8, 9, 63, 64, 65, rows - 1, rows, 2 * rows + 3)]
    found += [(rows - 1, n, 200) for n in (1, 2, 3, 4, 7, 8, 15, 16, 17, 33, columns - 2, columns, 2 * columns + 4)]
    # The ring is filled, passed through once, and a tile begins at any of its places.
    found += [(2 * rows, 2 * columns, count * STAGE - 5) for count in (1, 2, stages - 1, stages, stages + 1)]
    found += [(3 * rows, columns, 2 * stages * STAGE + 1), (17 * rows, 2 * columns, 100), (33 * rows - 5, 9, 1)]
    drawn = np.random.default_rng(columns).integers(1, (3 * rows, 3 * columns, 3 * stages * STAGE), (DRAWN, 3))
    return [*found, *map(tuple, drawn.tolist())]


@pytest.mark.parametrize("tile", STAGES, ids=lambda tile: "m{}n{}".format(*tile))
def test_shapes(tile):
    built = module(NAME, "sm_90a")
    for seed, (m, n, k) in seeded(shapes(tile)) if FULL else enumerate(shapes(tile)):
        out = (torch.bfloat16, torch.int32)[seed % 2]
        check_wgmma(built, m, n, k, out, tile, seed, blocks=1 + seed % 3)
