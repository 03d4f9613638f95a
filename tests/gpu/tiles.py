"""Products for which mma_sm80 uses each of its tiles, found by asking the heuristics, which needs no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

TILES = {"128 x 256": (128, 256), "128 x 128": (128, 128), "64 x 64": (64, 64)}
# These lie around whole words, stages of 512 values, and the four stages that are loaded at the same time.
DEPTHS = [1, 33, 480, 511, 512, 513, 544, 2016, 2047, 2048, 2049, 2080, 2560 + 97]


def shapes_of(
    tile: str, choice: Callable[[int, int, int], str], multiprocessors: int, depths: list[int]
) -> list[tuple[int, int, int]]:
    """Return (m, n, k) around whole tiles, each with the smallest n for which the heuristics choose the tile.

    Args:
        tile: A key of TILES.
        choice: Returns the library's description of how it computes m x n x k.
        multiprocessors: The number of multiprocessors of the device that ``choice`` answers for.
        depths: The values of k.
    """
    rows, columns = TILES[tile]
    found = []
    for m, beside, k in itertools.product((rows - 1, rows, rows + 1, 2 * rows + 13), (-1, 0, 1), depths):
        widths = (columns * tiles + beside for tiles in range(1, 2 * multiprocessors + 1))
        n = next((n for n in widths if f" tiles of {tile}:" in choice(m, n, k)), None)
        if n is not None:
            found.append((m, n, k))
    return found
