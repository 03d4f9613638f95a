"""The grids of the kernels that work row by row, as launch_rows of csrc/cuda/row_grid.cuh computes them."""

from .product import ceil_div


def row_grid(rows: int, segments: int, parts: bool = False) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return grid and block for rows of so many segments; with `parts` a row may get more than one block."""
    warps = next((w for w in (1, 2, 4) if w >= segments), 8)
    return (ceil_div(rows, 8 // warps), max(ceil_div(segments, warps), 1) if parts else 1), (32 * warps, 8 // warps)
