"""What lies between two packed layers, folded into a limit on the first one's counts, or before one, on its inputs.

The product of a packed layer has K + 1 possible values, ``K - 2 · popcount``. If the modules up to the next layer's
sign compute each channel alone, each channel has a table of K + 1 bits. The modules themselves compute that table here.
If the bits of a channel change at most once, they are ``popcount <= limit`` or its negation. Further changes, such as
those of a PReLU with a negative slope, are toggles: each negates the bit from another popcount on.

Before a packed layer, modules that keep or reverse the order of each channel's values make of all floats a step, too.
Its place is found by bisection over the floats' bit patterns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from ._inputs import FLOATS
from .checkpoint import STRICT_INPUT
from .packed import PackedQLinear
from .shifts import ChannelShift, RPReLU

__all__ = [
    "FORWARDS",
    "InputLimits",
    "Limits",
    "counts_channels_first",
    "fold_inputs",
    "fold_modules",
    "reason_against_before",
    "reason_against_between",
]

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
_SAME_IN_TRAINING = {*_EXACT, ChannelShift, RPReLU} - {nn.Dropout, nn.AlphaDropout, nn.BatchNorm1d}
# With factors of one sign for each channel, these modules keep the order of a channel's values or reverse it, because
# rounding keeps the order.
_MONOTONE = (*(cls for cls in _EXACT if cls is not nn.Threshold), ChannelShift, RPReLU)
FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {cls: cls.forward for cls in (*_EXACT, *_MONOTONE, PackedQLinear)}
"""The forwards of the classes of which more is known than what the modules compute."""
# A layer has at most one toggle for each so many channels, because each costs as much as a further output, but a small
# layer may have a few. With this share, fused layers of 256 and 1024 channels took 1/1.3 to 1/2.4 of the unfused time.
_CHANNELS_PER_TOGGLE, _FEW_TOGGLES = 4, 8
# A table is computed in parts of about this many values.
_PART = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The bits that a product writes: ``popcount <= limits[n]``, negated if bit n of `flips` is 1.

    Attributes:
        limits: int32, shape ``(N,)``.
        flips: Packed words, shape ``(ceil(N / 32),)``.
        toggles: int32, shape ``(2, t)``, channels and limits: the bit of such a channel is negated once more if
            ``popcount <= limit``.
    """

    limits: Tensor
    flips: Tensor
    toggles: Tensor


def _promises_channels_alone(module: nn.Module) -> bool:
    """Whether the class that defines the module's forward promises that it computes each channel alone."""
    for cls in type(module).__mro__:
        if "forward" in vars(cls):
            return bool(vars(cls).get("computes_channels_alone", False))
    return False


def reason_against_between(module: nn.Module, n: int) -> str:
    """Return the reason why a module cannot be folded, whatever its values are, or "" if it may be.

    Args:
        module: The module between two packed layers.
        n: The number of channels.
    """
    name = type(module).__name__
    if type(module) not in _EXACT and not _promises_channels_alone(module):
        return f"{name} follows, which is not one of the modules that can be folded"
    return f"{name} follows, for another number of channels than {n}" if _has_other_channels(module, n) else ""


def _has_other_channels(module: nn.Module, n: int) -> bool:
    """Whether torch's or this package's module has parameters for another number of channels."""
    if isinstance(module, nn.BatchNorm1d):
        return module.num_features != n
    if isinstance(module, nn.PReLU):
        return module.weight.numel() not in (1, n)
    if isinstance(module, (ChannelShift, RPReLU)):
        return any(parameter.shape != (n,) for parameter in module.parameters())
    return False


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
    if reader.in_features != layer.out_features:
        return f"the next layer has {reader.in_features} inputs instead of {layer.out_features}"
    for module in between:
        if reason := reason_against_between(module, layer.out_features):
            return reason
    k, n, strict = layer.in_features, layer.out_features, reader._input_rule == STRICT_INPUT
    changes = torch.zeros(n, dtype=torch.int32)
    place = torch.full((n,), k + 1, dtype=torch.int32)  # the popcount from which on the bit is another
    first = previous = torch.empty(0)
    most = max(n // _CHANNELS_PER_TOGGLE, _FEW_TOGGLES)
    toggles = [torch.empty(2, 0, dtype=torch.int32)]
    rows = max(1, _PART // max(n, k, 1))
    for start in range(0, k + 1, rows):
        counts = torch.arange(start, min(start + rows, k + 1), dtype=torch.int32)
        try:
            y = _outputs(layer, counts, dtype)
            for module in between:
                y = module(y)
        except Exception as error:
            return f"what follows cannot be computed in {dtype} ({_summary(error)})"
        if y.shape != (counts.numel(), n) or y.dtype != dtype:
            return "what follows changes the shape or the dtype"
        bits = functional.unpack_bits(functional.pack_bits(y, strict), n, torch.bool)
        if start == 0:
            first = previous = bits[:1]
        changed = torch.cat([previous, bits[:-1]]) != bits
        is_new = changed.any(0) & (changes == 0)
        nth = changed.int().argmax(0)
        place = torch.where(is_new, counts[nth], place)
        changes += changed.sum(0, dtype=torch.int32)
        if int((changes - 1).clamp(min=0).sum()) <= most:
            changed[nth[is_new], is_new.nonzero()[:, 0]] = False
            again, channels = changed.nonzero(as_tuple=True)
            toggles.append(torch.stack([channels.int(), counts[again] - 1]))
        previous = bits[-1:]
    extra = (changes - 1).clamp(min=0)
    if int(extra.sum()) > most:
        names = ", ".join(type(module).__name__ for module in between)
        several = f"the signs of {int((extra > 0).sum())} of {n} channels change more than once"
        return f"{several}, {int(extra.sum())} times in all: {names}"
    # From a toggle's popcount on the bit is another. The toggle negates it up to there, and the flip everywhere.
    flips = functional.pack_bits(torch.where(first[0] ^ (extra % 2 == 1), -1.0, 1.0))
    return Limits((place - 1).contiguous(), flips, torch.cat(toggles, 1))


def _summary(error: Exception) -> str:
    """Return the class of an error and the beginning of its message."""
    said = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {said:.80}"


def _reason_now(between: tuple[nn.Module, ...]) -> str:
    """Return the reason against modules that their mode or their buffers give, or ""."""
    for module in between:
        name = type(module).__name__
        if module.training and type(module) not in _SAME_IN_TRAINING:
            return f"{name} is in training mode: call eval() first"
        if isinstance(module, nn.BatchNorm1d) and module.running_mean is None:
            return f"{name} has no running statistics"
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
    return functional.binary_linear(rows, zeros, k, layer.bias, scale=layer._buffers["scale"], out_dtype=dtype)


# ---- limits on inputs ----

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class InputLimits:
    """The bits of real inputs: ``x >= limits[k]`` in the order of bit patterns, negated if bit k of `flips` is 1.

    Attributes:
        limits: The dtype of x, shape ``(K,)``.
        flips: Packed words, shape ``(ceil(K / 32),)``.
    """

    limits: Tensor
    flips: Tensor


def reason_against_before(module: nn.Module, k: int) -> str:
    """Return the reason why a module before a packed layer cannot be folded, whatever its values are, or "".

    Args:
        module: The module.
        k: The number of channels.
    """
    name = type(module).__name__
    if type(module) not in _MONOTONE:
        return f"{name} precedes, which is not one of the modules that can be folded"
    return f"{name} precedes, for another number of channels than {k}" if _has_other_channels(module, k) else ""


def fold_inputs(before: Iterable[nn.Module], layer: PackedQLinear, dtype: torch.dtype) -> InputLimits | str:
    """Return the limits that replace modules before a packed layer, or the reason why none do.

    The limits hold for contiguous inputs and the present values of the modules.

    Args:
        before: The modules, in their order.
        layer: The packed layer, which takes the signs.
        dtype: The dtype of the inputs.
    """
    before, k, strict = tuple(before), layer.in_features, layer._input_rule == STRICT_INPUT
    if dtype not in FLOATS:
        return f"its dtype is {dtype}"
    if k < 2:
        return "it has a single input, for which batch norm takes another code path"
    if reason := _reason_now(before) or _reason_of_order(before):
        return reason
    for module in before:
        if reason := reason_against_before(module, k):
            return reason

    def output_of(x: Tensor) -> Tensor:
        """Return what the layer gets."""
        y = x.clone()
        for module in before:
            y = module(y)
        if y.shape != x.shape or y.dtype != dtype:
            raise RuntimeError("the shape or the dtype changes")
        return y

    try:
        return _bisect(output_of, k, dtype, strict)
    except Exception as error:
        return f"what precedes cannot be computed in {dtype} ({_summary(error)})"


def _reason_of_order(before: tuple[nn.Module, ...]) -> str:
    """Return the reason why modules may neither keep nor reverse the order of a channel's values, or ""."""
    for module in before:
        name = type(module).__name__
        if getattr(module, "inplace", False):
            return f"{name} precedes, which writes its input"
        if not all(bool(tensor.isfinite().all()) for tensor in (*module.parameters(), *module.buffers())):
            return f"{name} precedes, with infinite values or NaN"
        slopes: float | Tensor = 0.0
        if isinstance(module, nn.LeakyReLU):
            slopes = module.negative_slope
        elif isinstance(module, (nn.PReLU, RPReLU)):
            slopes = module.weight if isinstance(module, nn.PReLU) else module.slope
        slopes = torch.as_tensor(slopes)
        if not bool((slopes.isfinite() & (slopes >= 0)).all()):
            return f"{name} precedes, with a negative or infinite slope"
    return ""


def _bisect(output_of: Callable[[Tensor], Tensor], k: int, dtype: torch.dtype, strict: bool) -> InputLimits | str:
    """Find the value from which on each channel's bit is another.

    Args:
        output_of: Returns what the layer gets, for inputs of shape ``(rows, k)``.
        k: The number of channels.
        dtype: The dtype of the inputs.
        strict: Whether the layer has the strict rule, by which the bit of NaN is 0.
    """

    def bits_of(x: Tensor) -> Tensor:
        return functional.unpack_bits(functional.pack_bits(output_of(x), strict), k, torch.bool)

    integers = _INTEGERS[dtype.itemsize]
    infinity = int(torch.tensor(math.inf, dtype=dtype).view(integers))
    # Numbers in the order of the floats: 0 for +0, -1 for -0, and the others on both sides of them.
    low = torch.full((k,), -infinity - 1, dtype=integers)
    high = torch.full((k,), infinity, dtype=integers)
    # Between modules of finite parameters NaN comes only from an infinite value. If a finite input overflows on the
    # way, one of the two largest does, too.
    if bool(output_of(_float_at(torch.stack([low + 1, high - 1]), dtype)).isnan().any()):
        return "what precedes gives NaN for finite inputs"
    first, last = bits_of(_float_at(torch.stack([low, high]), dtype))
    while bool((high - 1 > low).any()):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        # Two rows are computed, because batch norm takes another code path for some tensors of one row.
        is_same = bits_of(_float_at(torch.stack([middle, middle]), dtype))[0] == first
        low, high = torch.where(is_same, middle, low), torch.where(is_same, high, middle)
    limits = torch.where(first == last, _nan_at(dtype), high)

    around = [limits + step for step in (-1, 0, 1)] + [torch.full_like(limits, value) for value in (-1, 0)]
    far = [torch.full_like(limits, value) for value in (-infinity - 1, -infinity, infinity - 1, infinity)]
    points = torch.stack([*around, *far]).clamp(-infinity - 1, infinity)
    if not torch.equal(bits_of(_float_at(points, dtype)), (points >= limits) ^ first):
        return "what precedes gives infinite inputs other signs than large ones"
    nans = torch.full((2, k), math.nan, dtype=dtype)
    if bool((bits_of(nans) == strict).any()):
        return "what precedes does not keep NaN"
    return InputLimits(_float_at(limits, dtype), functional.pack_bits(torch.where(first, 1.0, -1.0)))


def _float_at(order: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the floats at these places of the order of all floats."""
    integers = torch.iinfo(order.dtype)
    return (order ^ ((order >> (integers.bits - 1)) & integers.max)).view(dtype)


def _nan_at(dtype: torch.dtype) -> Tensor:
    """Return a place in the order of all floats above infinity: that of a NaN."""
    return torch.tensor(math.nan, dtype=dtype).abs().view(_INTEGERS[dtype.itemsize])
