"""What lies between two packed layers, folded into a limit on the first one's counts.

The product of a packed layer has K + 1 possible values, ``K - 2 · popcount``. If the modules up to the next layer's
sign compute each channel alone, each channel has a table of K + 1 bits. The modules themselves compute that table here.
If the bits of a channel change at most once, they are ``popcount <= limit`` or its negation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import functional
from ._inputs import FLOATS
from .checkpoint import STRICT_INPUT
from .packed import PackedQLinear

__all__ = ["Limits", "counts_channels_first", "fold_modules", "reason_against_between"]

# The values of these modules do not depend on where an element lies in its tensor. torch computes tanh and similar
# functions by vectors except in the last elements of a tensor, and the two code paths may differ in the last bit.
_EXACT = (
    nn.Identity,
    nn.Dropout,
    nn.AlphaDropout,
    nn.Hardtanh,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.Threshold,
    nn.BatchNorm1d,
)
# A table is computed in parts of about this many values.
_PART = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The bits that a product writes: ``popcount <= limits[n]``, negated if bit n of `flips` is 1.

    Attributes:
        limits: int32, shape ``(N,)``.
        flips: Packed words, shape ``(ceil(N / 32),)``.
    """

    limits: Tensor
    flips: Tensor


def reason_against_between(module: nn.Module, n: int) -> str:
    """Return the reason why a module cannot be folded, whatever its values are, or "" if it may be.

    Args:
        module: The module between two packed layers.
        n: The number of channels.
    """
    name = type(module).__name__
    if type(module) not in _EXACT and not getattr(type(module), "computes_channels_alone", False):
        return f"{name} follows, which is not one of the modules that can be folded"
    if isinstance(module, nn.BatchNorm1d) and module.num_features != n:
        return f"{name} follows, for {module.num_features} channels instead of {n}"
    if isinstance(module, nn.PReLU) and module.weight.numel() not in (1, n):
        return f"{name} follows, with {module.weight.numel()} slopes for {n} channels"
    return ""


def counts_channels_first(module: nn.Module) -> bool:
    """Whether the channels of the module are dimension 1, which is the last one only of a matrix."""
    return isinstance(module, nn.BatchNorm1d) or (isinstance(module, nn.PReLU) and module.weight.numel() > 1)


def fold_modules(
    layer: PackedQLinear, between: Iterable[nn.Module], reader: PackedQLinear, dtype: torch.dtype
) -> Limits | str:
    """Return the limits that replace modules between two packed layers, or the reason why none do.

    The limits hold for the present values of the modules and of the first layer's bias and scale.

    Args:
        layer: The first packed layer.
        between: The modules, in their order.
        reader: The packed layer that takes the signs.
        dtype: The dtype that the first layer's output has.
    """
    if dtype not in FLOATS:
        return f"its dtype is {dtype}"
    between = tuple(between)
    if reason := _reason_now(between):
        return reason
    k, n, strict = layer.in_features, layer.out_features, reader._input_rule == STRICT_INPUT
    changes = torch.zeros(n, dtype=torch.int32)
    place = torch.full((n,), k + 1, dtype=torch.int32)  # the popcount from which on the bit is another
    first = previous = torch.empty(0)
    rows = max(1, _PART // max(n, k, 1))
    for start in range(0, k + 1, rows):
        counts = torch.arange(start, min(start + rows, k + 1), dtype=torch.int32)
        try:
            y = _outputs(layer, counts, dtype)
            for module in between:
                y = module(y)
                if bool(_is_subnormal(y).any()):
                    return f"{type(module).__name__} gives values so small that torch may flush them to 0"
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            return f"what follows cannot be computed in {dtype} ({type(error).__name__}: {said:.80})"
        if y.shape != (counts.numel(), n) or y.dtype != dtype:
            return "what follows changes the shape or the dtype"
        bits = functional.unpack_bits(functional.pack_bits(y, strict), n, torch.bool)
        if start == 0:
            first = previous = bits[:1]
        changed = torch.cat([previous, bits[:-1]]) != bits
        changes += changed.sum(0, dtype=torch.int32)
        place = torch.where(changed.any(0), counts[changed.int().argmax(0)], place)
        previous = bits[-1:]
    several = int((changes > 1).sum())
    if several:
        names = ", ".join(type(module).__name__ for module in between)
        return f"the signs of {several} of {n} channels change more than once: {names}"
    flips = functional.pack_bits(torch.where(first[0], -1.0, 1.0))
    return Limits((place - 1).contiguous(), flips)


def _reason_now(between: tuple[nn.Module, ...]) -> str:
    """Return the reason against modules that their mode or their buffers give, or ""."""
    for module in between:
        name = type(module).__name__
        if module.training:
            return f"{name} follows, in training mode: call eval() first"
        if isinstance(module, nn.BatchNorm1d) and module.running_mean is None:
            return f"{name} follows, without running statistics"
    return ""


def _outputs(layer: PackedQLinear, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the layer's output for each popcount: shape ``(counts, N)``, computed by the layer's own operator.

    Args:
        layer: The layer.
        counts: Popcounts, shape ``(counts,)``.
        dtype: The dtype of the output.
    """
    k, n = layer.in_features, layer.out_features
    # Against words of 0, the popcount of a row is its number of ones.
    rows = functional.pack_bits(torch.where(torch.arange(k) < counts[:, None], 1.0, -1.0))
    zeros = torch.zeros(n, rows.shape[-1], dtype=torch.int32)
    return functional.binary_linear(rows, zeros, k, layer.bias, out_dtype=dtype)


def _is_subnormal(y: Tensor) -> Tensor:
    """Whether values are so small that ``torch.set_flush_denormal`` decides their sign."""
    # torch computes float16 and bfloat16 in float32.
    smallest = torch.finfo(torch.float64 if y.dtype is torch.float64 else torch.float32).smallest_normal
    return (y != 0) & (y.abs() < smallest)
