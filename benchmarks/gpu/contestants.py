"""The ways to compute a product on a GPU: what torch and other libraries have, and ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional
from torch import Tensor

from bitorch_qlinear import PackedQLinear, _kernels
from bitorch_qlinear import functional as F

from ..measuring import Shape
from .timing import Call

BF16, FP16 = "nn.Linear bf16", "nn.Linear fp16"
FP8, INT8 = "torch._scaled_mm fp8", "torch._int_mm int8, int32 out"
BITORCH = "bitorch QLinear bf16"
PACKED, PACKED_INT, PACKING = "packed x", "packed x, int32 out", "bf16 x, packed inside"
LAYER = "PackedQLinear, bf16 x"

TILES = {"mma_sm80": ["128x256", "128x128", "64x64"], "wgmma_sm90a": ["128x192", "128x128"]}
"""The tiles of the kernels that have several."""
TILED_ROWS = 256
"""From so many rows on, the tiles are compared: wgmma_sm90a may be chosen."""


class Contestant(NamedTuple):
    """One way to compute a product.

    Attributes:
        name: What the tables call it.
        make: Makes new operands and returns the call that computes with them.
        bytes: The least that a call moves: it reads the operands once and writes the result once.
        weight_bytes: The part of these bytes that are weights.
        kernel: The CUDA kernel that must compute, or None for the automatic choice.
        tile: The tile that this kernel must have, or None for the automatic choice.
    """

    name: str
    make: Callable[[], Call]
    bytes: int
    weight_bytes: int
    kernel: str | None = None
    tile: str | None = None


def random_rows(rows: int, k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, k, device=device, dtype=dtype)


def peers(shape: Shape, device: torch.device) -> list[Contestant]:
    """Return the contestants from torch and other libraries."""
    m, k, n = shape.m, shape.k, shape.n

    def linear(dtype: torch.dtype) -> Call:
        x, w = random_rows(m, k, device, dtype), random_rows(n, k, device, dtype)
        return lambda: torch.nn.functional.linear(x, w)

    def scaled() -> Call:
        x, w = (random_rows(rows, k, device).to(torch.float8_e4m3fn) for rows in (m, n))
        one = torch.ones((), device=device)
        options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, **options)

    def integer() -> Call:
        x, w = (random_rows(rows, k, device).sign().to(torch.int8) for rows in (m, n))
        return lambda: torch._int_mm(x, w.t())

    def bitorch() -> Call:
        from bitorch.layers import QLinear as BitorchQLinear

        layer = BitorchQLinear(k, n, bias=False).to(device, torch.bfloat16).eval()
        x = random_rows(m, k, device)
        return torch.no_grad()(lambda: layer(x))

    def moved(operand_bytes: int, result_bytes: int) -> int:
        return (m + n) * k * operand_bytes + m * n * result_bytes

    return [
        Contestant(BF16, lambda: linear(torch.bfloat16), moved(2, 2), 2 * n * k),
        Contestant(FP16, lambda: linear(torch.float16), moved(2, 2), 2 * n * k),
        Contestant(FP8, scaled, moved(1, 2), n * k),
        Contestant(INT8, integer, moved(1, 4), n * k),
        Contestant(BITORCH, bitorch, moved(2, 2), 2 * n * k),
    ]


def ours(shape: Shape, device: torch.device) -> list[Contestant]:
    """Return our contestants: packing inside and outside of the call, and each kernel and tile that takes the shape."""
    m, k, n = shape.m, shape.k, shape.n
    row_bytes = 4 * math.ceil(k / 32)

    def weights() -> tuple[Tensor, Tensor]:
        words = F.pack_bits(random_rows(n, k, device))
        return words, F.prepare_weight(words, k)

    def packed(out: torch.dtype) -> Call:
        x, (words, prepared) = F.pack_bits(random_rows(m, k, device)), weights()
        return lambda: F.binary_linear(x, words, k, weight_prepared=prepared, out_dtype=out)

    def packing() -> Call:
        x, (words, prepared) = random_rows(m, k, device), weights()
        return lambda: F.linear(x, words, k, weight_prepared=prepared)

    def layer() -> Call:
        x, binary = random_rows(m, k, device), PackedQLinear(k, n, bias=False, device=device, dtype=torch.bfloat16)
        binary.weight.copy_(F.pack_bits(random_rows(n, k, device)))

        def call() -> Tensor:
            with torch.inference_mode():
                return binary(x)

        return call

    def bf16_out() -> Call:
        return packed(torch.bfloat16)

    weight_bytes, words_moved = n * row_bytes, (m + n) * row_bytes
    made = [
        Contestant(PACKED, bf16_out, words_moved + 2 * m * n, weight_bytes),
        Contestant(PACKED_INT, lambda: packed(torch.int32), words_moved + 4 * m * n, weight_bytes),
        Contestant(PACKING, packing, 2 * m * k + weight_bytes + 2 * m * n, weight_bytes),
        Contestant(LAYER, layer, 2 * m * k + weight_bytes + 2 * m * n, weight_bytes),
    ]
    for kernel in kernels(device):
        if kernel.startswith("fused"):  # The fused kernels pack x; one takes at most 4 rows and the others 16.
            if m <= (4 if kernel == "fused_skinny" else 16):
                moved = 2 * m * k + weight_bytes + 2 * m * n
                made.append(Contestant(f"{PACKING}, {kernel}", packing, moved, weight_bytes, kernel))
        # The skinny kernels take at most 16 rows or 64.
        elif m <= (64 if kernel == "skinny_mma_sm80" else 16) or not kernel.startswith("skinny"):
            for tile in [None, *tiles(kernel, m)]:
                name = ", ".join(filter(None, (PACKED, kernel, tile)))
                made.append(Contestant(name, bf16_out, words_moved + 2 * m * n, weight_bytes, kernel, tile))
    return made


def tiles(kernel: str, m: int) -> list[str]:
    """Return the tiles of a kernel that are compared for m rows; the list is empty if it has one or if rows are few."""
    return TILES.get(kernel, []) if m >= TILED_ROWS else []


def kernels(device: torch.device) -> list[str]:
    """List the CUDA kernels that a device can run; for the CPU there are none."""
    if device.type != "cuda":
        return []
    return _kernels.device_cuda_kernels(device)
