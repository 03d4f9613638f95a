"""Compares the exact results of all kernels before any of them is timed."""

from __future__ import annotations

import contextlib

import torch

from bitorch_qlinear import functional as F
from bitorch_qlinear.kernels import forced

from ..measuring import Shape
from .contestants import kernels, random_rows


def check(shape: Shape, device: torch.device) -> str:
    """Compare the exact results of all kernels with each other, and name those that were compared.

    Raises:
        RuntimeError: Two results differ, so that their times would mean nothing.
    """
    m, k, n = shape.m, shape.k, shape.n
    x, w = random_rows(m, k, device), random_rows(n, k, device)
    words, x_words = F.pack_bits(w), F.pack_bits(x)
    result = F.binary_linear(x_words, words, k, weight_prepared=F.prepare_weight(words, k), out_dtype=torch.int32)
    others = {"packing inside": F.linear(x, words, k, out_dtype=torch.int32)}
    for kernel in kernels(device):
        with forced(kernel):
            others[kernel] = F.binary_linear(x_words, words, k, out_dtype=torch.int32)
    with contextlib.suppress(RuntimeError):  # It does not take all sizes and devices.
        signs = (F.unpack_bits(rows, k, torch.int8) for rows in (x_words, words))
        others["torch._int_mm"] = torch._int_mm(next(signs), next(signs).t())
    for name, other in others.items():
        if not torch.equal(result, other):
            at = (result != other).nonzero()[0].tolist()
            raise RuntimeError(f"{shape}: {name} and the chosen kernel differ, first at {at}")
    return ", ".join(others)
