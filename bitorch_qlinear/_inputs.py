"""Inputs that are not plain float tensors, treated alike by both layers, after the kernels have turned them away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._torch import is_proxy, trace_as_leaf

__all__ = ["FLOATS", "apply_to_no_tensor", "apply_to_values", "has_other_layout", "raise_of_dtype"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that the operators take as real values."""


def has_other_layout(x: Tensor) -> bool:
    """Whether x is a nested, quantized or sparse tensor, whose values a layer takes out first."""
    return x.is_nested or x.is_quantized or x.layout is not torch.strided


def apply_to_values(layer: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """Return a layer's outputs for the values of a nested, quantized or sparse tensor.

    Args:
        layer: Computes the output of a strided tensor.
        x: The tensor. The output of a nested tensor is nested and has the same layout; others become dense.
    """
    if not x.is_nested:
        return layer(x.dequantize() if x.is_quantized else x.to_dense())
    if x.layout is torch.jagged and x.values().shape[-1] == x.shape[-1]:
        return torch.nested.nested_tensor_from_jagged(layer(x.values()), x.offsets(), x.lengths())
    return torch.nested.as_nested_tensor([layer(part) for part in x.unbind()], layout=x.layout)


def apply_to_no_tensor(layer: Any, x: Any) -> Any:
    """Record the layer's call for torch.fx, which traces with a Proxy instead of a tensor.

    Raises:
        TypeError: x is neither a tensor nor a Proxy; the error is that of ``nn.Linear``.
    """
    return trace_as_leaf(layer, x) if is_proxy(x) else torch.nn.functional.linear(x, layer.weight, layer.bias)


def raise_of_dtype(x: Tensor, error: RuntimeError | None = None) -> None:
    """Raise an error with a remedy if x has a dtype that the operators refuse; otherwise return.

    Args:
        x: The layer's input.
        error: The operator's error if it was called, which becomes the cause.

    Raises:
        RuntimeError: x does not hold float values of at least 16 bits.
    """
    if x.dtype not in FLOATS:
        remedy = "take its real part" if x.is_complex() else "call x.float()"
        got = str(x.dtype).removeprefix("torch.")
        raise RuntimeError(f"x: expected float64, float32, float16 or bfloat16, got {got}: {remedy} first.") from error
