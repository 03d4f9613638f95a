"""The calls of the kernels that pack x themselves, and how csrc/cuda/fused.cuh divides their work."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from support.reference import pack, random_values, signs

from tools.ptx.machine import In, InOut, Struct

from .product import (
    DTYPES,
    OUT_TYPES,
    Call,
    Out,
    aligned_words_for,
    ceil_div,
    layout,
    numpy,
    outputs_of,
    product,
    unpack,
)

WARPS = 16
MOST_VALUES = 131072
"""The values of x that a block packs at most, with rows rounded up to whole 16 bytes of words."""


@dataclass(frozen=True)
class Shape:
    """The constants of a fused kernel.

    These are its columns of a unit, the words of a piece, the most units and rows, and the blocks of a cluster.
    """

    unit: int
    piece: int
    most_units: int
    most_rows: int
    cluster: int = 1


@dataclass(frozen=True)
class Plan:
    """The fields of FusedPlan, and the number of blocks."""

    width: int
    pitch: int
    parts: int
    chunk: int
    rounds: int
    whole: bool
    blocks: int

    def struct(self) -> Struct:
        return Struct(layout("FusedPlan"), self.width, self.pitch, self.parts, self.chunk, self.rounds, self.whole)


def fits(m: int, k: int) -> bool:
    return m <= 16 and m * aligned_words_for(k) * 32 <= MOST_VALUES


def plan(shape: Shape, n: int, k: int, multiprocessors: int, out: torch.dtype, whole: bool, parts: int = 0) -> Plan:
    """Return what fused_plan computes; `parts` takes the place of the number of warps that share a unit."""
    width = aligned_words_for(k)
    plans = []
    for each in (1, 2, 4, 8, 16):
        columns = shape.unit * WARPS // each
        if each < WARPS // shape.most_units or (out is torch.bool and columns < 32) or (parts and each != parts):
            continue
        groups = ceil_div(n, columns)
        blocks = min(ceil_div(groups, shape.cluster), max(multiprocessors // shape.cluster, 1)) * shape.cluster
        rounds, chunk = ceil_div(groups, blocks), ceil_div(ceil_div(max(width, 1), each), shape.piece) * shape.piece
        plans.append((rounds * (chunk + 32), each, chunk, rounds, blocks))
    _, parts, chunk, rounds, blocks = min(plans)
    return Plan(width, (width + 15) // 32 * 32 + 16, parts, chunk, rounds, whole, blocks)


@dataclass
class FusedCall(Call):
    whole: bool = False
    rows: tuple[object, ...] = ()

    def with_multiprocessors(self, count: int) -> Struct:
        """Return the FusedProduct of this call for a device with so many multiprocessors."""
        return Struct(layout("FusedProduct"), *self.fields.values, *self.rows, count)


def fused_call(
    m: int,
    n: int,
    k: int,
    out: torch.dtype = torch.int32,
    dtype: torch.dtype = torch.float32,
    strict: bool = False,
    *,
    padding: int = 0,
    misalign: int = 0,
    weight_padding: int = 0,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    header: np.ndarray | None = None,
    flipped: bool = True,
    seed: int = 0,
) -> FusedCall:
    """Return random values of x, rows of k + padding, random weights in the aligned form, and their product.

    Between the rows of the weights lie `weight_padding` arbitrary words. Kernels check `header`, which is that of the
    prepared form that the weights are said to come from. Outputs that are bits have random limits and, if `flipped`,
    random flips.
    """
    generator = np.random.default_rng(seed)
    x = random_values((m, k + padding), dtype, torch.Generator().manual_seed(1000 * k + seed))
    values = In(numpy(x).reshape(-1)[: (m - 1) * (k + padding) + k], "x", misalign)  # a view may end with its last row
    words = generator.integers(-(2**31), 2**31, (n, ceil_div(k, 32)), dtype=np.int32)
    weight = unpack(torch.from_numpy(words), k)
    aligned = np.pad(pack(weight).numpy(), ((0, 0), (0, aligned_words_for(k) - words.shape[1])))
    aligned = np.concatenate([aligned, np.full((n, weight_padding), -1, np.int32)], 1)
    dots = product(signs(x[:, :k], strict), 2.0 * weight.double() - 1)
    expected, y, channels = outputs_of(dots, k, out, bias, scale, generator, flipped)
    output = Out(y, "y")
    operands = [None, 0, None, In(aligned, "weight"), aligned.shape[1], None]
    wrong_form, memory = np.zeros(5, np.int64), None
    if header is not None:  # popcounts of the weights would lie behind it
        operands[5] = In(header).at(len(header))
        memory = InOut(wrong_form)
    fields = Struct(layout("Product"), *operands, m, n, k, output, OUT_TYPES[out][0], *channels, memory)
    stride = k + padding
    whole = misalign % 16 == 0 and k % 128 == 0 and (stride * dtype.itemsize % 16 == 0 or m == 1)
    rows = values, DTYPES[dtype][0], stride, strict
    what = (m, n, k, out, dtype, strict, padding, misalign)
    return FusedCall(fields, output, y, out, expected, what, wrong_form, whole, rows)


def check_no_result(launch: Callable[[FusedCall], object]) -> None:
    """Check that a kernel which runs without its instructions writes to all outputs what no product gives."""
    for out in (torch.bfloat16, torch.int32, torch.bool):
        call = fused_call(3, 300, 700, out)
        launch(call)
        call.wrong_form[:] = [300, 700, 0, 0, 1]  # the kernel has no form to report
        call.check_no_result((0, 0))
