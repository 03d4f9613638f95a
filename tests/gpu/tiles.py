"""Products that get each tile of mma_sm80, found by asking the heuristics, which need no GPU for that."""

from __future__ import annotations

import itertools
from collections.abc import Callable

TILES = {"128 x 256": (128, 256), "128 x 128": (128, 128), "64 x 64": (64, 64)}
# Around words, the stages of 512 values, and the four stages that are on their way at once.
DEPTHS = [1, 33, 480, 511, 512, 513, 544, 2016, 2047, 2048, 2049, 2080, 2560 + 97]


def shapes_of(
    tile: str, choice: Callable[[int, int, int], str], multiprocessors: int, depths: list[int]
) -> list[tuple[int, int, int]]:
    """(m, n, k) one less, as much and one more than whole tiles, each the narrowest that gets the tile.

    Args:
        tile: One of TILES.
        choice: What computes m x n x k, in the library's words.
        multiprocessors: Of the device that is asked about.
        depths: Some of DEPTHS.
    """
    rows, columns = TILES[tile]
    found = []
    for m, beside, k in itertools.product((rows - 1, rows, rows + 1, 2 * rows + 13), (-1, 0, 1), depths):
        widths = (columns * tiles + beside for tiles in range(1, 2 * multiprocessors + 1))
        n = next((n for n in widths if f" tiles of {tile}:" in choice(m, n, k)), None)
        if n is not None:
            found.append((m, n, k))
    return found
