"""Compares the exact results of all kernels before any of them is timed."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from bitorch_qlinear import functional as F
from bitorch_qlinear._kernels import forced_tile
from bitorch_qlinear.kernels import forced

from ..measuring import Shape
from .contestants import kernels, random_rows, tiles

SAMPLE = 64  # NumPy computes so many rows and columns of a result.


def check(shape: Shape, device: torch.device) -> str:
    """Compare the exact results of all kernels and tiles with each other, and name those that were compared.

    NumPy computes a random sample of the rows and columns.

    Raises:
        RuntimeError: Two results differ, so that their times would mean nothing.
    """
    m, k, n = shape.m, shape.k, shape.n
    x, w = random_rows(m, k, device), random_rows(n, k, device)
    words, x_words = F.pack_bits(w), F.pack_bits(x)
    result = F.binary_linear(x_words, words, k, weight_prepared=F.prepare_weight(words, k), out_dtype=torch.int32)
    check_sample(shape, x, w, result)
    others = {"packing inside": F.linear(x, words, k, out_dtype=torch.int32)}
    for kernel in kernels(device):
        for tile in [None, *tiles(kernel, m)]:
            with forced(kernel), forced_tile(tile):
                others[", ".join(filter(None, (kernel, tile)))] = (
                    F.linear(x, words, k, out_dtype=torch.int32)
                    if kernel.startswith("fused")  # they pack x
                    else F.binary_linear(x_words, words, k, out_dtype=torch.int32)
                )
    with contextlib.suppress(RuntimeError):  # It does not take all sizes and devices.
        signs = (F.unpack_bits(rows, k, torch.int8) for rows in (x_words, words))
        others["torch._int_mm"] = torch._int_mm(next(signs), next(signs).t())
    for name, other in others.items():
        if not torch.equal(result, other):
            at = (result != other).nonzero()[0].tolist()
            raise RuntimeError(f"{shape}: {name} and the chosen kernel differ, first at {at}")
    return ", ".join(["NumPy", *others])


def check_sample(shape: Shape, x: Tensor, w: Tensor, result: Tensor) -> None:
    """Compare a random sample of a result with NumPy's.

    Raises:
        RuntimeError: They differ.
    """
    rows, columns = (torch.randperm(size, device=x.device)[:SAMPLE] for size in result.shape)
    # A product of float64 is exact here, and unlike one of integers it is a BLAS's.
    signs = [np.where(part.double().cpu().numpy() < 0, -1.0, 1.0) for part in (x[rows], w[columns])]
    sample = result[rows][:, columns].cpu().numpy()
    if wrong := np.argwhere(sample != signs[0] @ signs[1].T).tolist():
        at = [int(rows[wrong[0][0]]), int(columns[wrong[0][1]])]
        raise RuntimeError(f"{shape}: NumPy and the chosen kernel differ, at {at} among others")
