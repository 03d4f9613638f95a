"""Shapes that reach every path of every CPU kernel, derived from the kernels' tile sizes."""

from __future__ import annotations

import random

from bitorch_qlinear import _kernels

# These constants repeat csrc/cpu/gemm_avx2.cpp: values per group, unit, block (counts in bytes) and span (counts in 16
# bits), rows per tile, and outputs per panel.
GROUP, UNIT, BLOCK, SPAN = 12, 24, 240, 65520
ROW_TILE = 128
PANEL = 64
# These repeat csrc/cpu/gemm_tables_avx2.h: rows per table; the fewest rows, outputs and values, and the most values,
# for which tables are used; values per block; outputs per strip, and outputs that are finished together.
TABLE_ROWS, FEWEST_ROWS, FEWEST_OUTPUTS, FEWEST_VALUES, MOST_VALUES = 64, 58, 512, 768, 16384
TABLE_BLOCK, STRIP, FINISHED = 120, 1024, 128
# The kernel of csrc/cpu/gemm_avx512.cpp has the same panel and row tile, units of one word, and this many values of k
# per cache block.
CACHE_BLOCK = 16384
# These repeat csrc/cpu/gemm_amx.cpp and byte_gemm_amx.cpp: rows and outputs of a tile, the fewest rows of a product,
# the most rows at its end that are left to AVX-512 (of 16 and of 32), the fewest outputs, the values of a part, and the
# most values.
TILE_SIDE, TILE_FEWEST_ROWS, TILE_RESTS, TILE_FEWEST_OUTPUTS, TILE_PART = 16, 25, (8, 20), 512, 1024
TILE_MOST_VALUES = 32768
# Below so many multiply-adds (csrc/cpu/product.h), or so many values to pack (csrc/cpu/threads.h), one thread works.
SERIAL_PRODUCTS = 1 << 24
SERIAL_VALUES = 1 << 16

# The bounds that the kernels have, and the largest counts of 8 and 16 bits: a bound that is too high exceeds those.
ACCUMULATOR_BOUNDS = [GROUP, UNIT, BLOCK, 255, 2 * BLOCK, SPAN, 65535, 2 * SPAN, 2 * 65535, 3 * SPAN]


def around(*bounds: int) -> list[int]:
    """Return each bound and its two neighbours, sorted, without duplicates and negative numbers."""
    return sorted({max(0, bound + d) for bound in bounds for d in (-1, 0, 1)})


def tile(kernel: str) -> tuple[int, int]:
    """Return the outputs per panel and the values per unit of the kernel, which must be the active one."""
    assert _kernels.active_kernel() == kernel
    panel, unit, *_ = _kernels.prepared_layout()
    return panel, unit


def small_products() -> list[tuple[int, int, int]]:
    """Return (m, n, k) with every k up to 129, and m and n on both sides of the edges of tiles."""
    sides = [(1, 1), (1, PANEL + 1), (2, 3), (3, 2 * PANEL + 1), (5, PANEL)]
    shapes = {(*sides[k % len(sides)], k) for k in range(2 * 64 + 2)}
    shapes |= {(*side, k) for side in sides for k in around(GROUP, UNIT, 2 * UNIT, 64, BLOCK, 256, 2 * BLOCK)}
    # These reach every part of two panels, up to three pairs of rows, and both sides of the row tile.
    shapes |= {(m, n, 37) for n in around(1, 16, 32, 48, PANEL, 96, 2 * PANEL, 3 * PANEL, 257) for m in (1, 2, 3, 4, 7)}
    shapes |= {(m, n, 61) for m in around(4, 6, 16, ROW_TILE // 2, ROW_TILE, 2 * ROW_TILE) for n in (1, 17, 131)}
    shapes |= {(m, n, k) for m in (13, 33) for n in (17, 67) for k in (257, 1009)}
    return sorted(shapes)


def spanning_products() -> list[tuple[int, int, int]]:
    """Return (m, n, k) with k around one and several spans of 16-bit sums, and around blocks of the cache."""
    ks = [*around(SPAN, 2 * SPAN), SPAN + UNIT, 3 * SPAN + BLOCK + 1]
    products = [(m, n, k) for k in ks for m, n in ((1, 2), (2, PANEL + 1), (3, 3))]
    return products + [(m, n, k) for k in around(CACHE_BLOCK, 2 * CACHE_BLOCK) for m, n in ((1, 2), (9, PANEL + 17))]


def row_table_products() -> list[tuple[int, int, int]]:
    """Return (m, n, k) around the limits of the AVX2 kernel's tables of rows, and around their blocks and strips."""
    ms = around(FEWEST_ROWS, TABLE_ROWS, TABLE_ROWS + FEWEST_ROWS, ROW_TILE)
    ns = around(FEWEST_OUTPUTS, FEWEST_OUTPUTS + FINISHED, STRIP, STRIP + FINISHED)
    ks = around(FEWEST_VALUES, 7 * TABLE_BLOCK, 8 * TABLE_BLOCK, 7 * 128, 800, 8 * TABLE_BLOCK + 32)
    chosen = random.Random(0)
    products = {(m, chosen.choice(ns), chosen.choice(ks)) for m in ms for _ in range(4)}
    return sorted(products) + [(TABLE_ROWS, FEWEST_OUTPUTS, k) for k in around(MOST_VALUES)]


def tile_products() -> list[tuple[int, int, int]]:
    """Return (m, n, k) around the fewest for which the AMX kernel uses tile registers, and around its tiles."""
    pair = 2 * TILE_SIDE
    ms = [*around(TILE_FEWEST_ROWS, pair, *(pair + rest for rest in TILE_RESTS), 2 * pair, ROW_TILE), 2 * ROW_TILE + 57]
    ns = [3 * TILE_FEWEST_OUTPUTS + extra for extra in (0, 1, 15, 16, 17, 31, 32, 33, 63)]
    ks = around(FEWEST_VALUES, TILE_PART, TILE_PART + 32, TILE_PART + 64, 2 * TILE_PART)
    chosen = random.Random(0)
    products = {(m, chosen.choice(ns), chosen.choice(ks)) for m in ms for _ in range(2)}
    products |= {(48, chosen.choice(ns), k) for k in ks} | {(48, n, chosen.choice(ks)) for n in ns}
    products |= {(TILE_FEWEST_ROWS, TILE_FEWEST_OUTPUTS, k) for k in around(TILE_MOST_VALUES)}
    return sorted(products)
