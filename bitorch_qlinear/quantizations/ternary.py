"""Ternary weights: -1, 0 or +1 (Ternary Weight Networks, Li and Liu 2016, https://arxiv.org/abs/1605.04711)."""

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from .._torch import apply, functorch_active, modes_active
from .base import Quantization
from .rule import quantize
from .scale import for_each_row, magnitude_blocks, row_means, row_sums

__all__ = [
    "Ternary",
    "all_finite",
    "is_eager",
    "kept_means",
    "kept_quotients",
    "scale_values",
    "ternary_blocks",
    "ternary_limits",
]

# Looked up once, because a name in a module of a module costs 20 ns in every call.
_compiling = torch.compiler.is_compiling
_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

# The paper's factor: nearly the best one both for uniformly and for normally distributed weights.
_FACTOR = 0.7


def is_eager(tensor: Tensor) -> bool:
    """Whether this is an ordinary CPU tensor that nothing traces or transforms, so that its values can be asked for."""
    ordinary = tensor.is_cpu and (type(tensor) is Tensor or type(tensor) is nn.Parameter)
    return ordinary and not (_compiling() or _tracing() or functorch_active() or modes_active())


def ternary_limits(rows: Tensor) -> Tensor:
    """Return Δ, the magnitude that a value must exceed to be kept, of each row.

    Args:
        rows: Shape ``(n, k)``.

    Returns:
        Shape ``(n, 1)``; float64 for float64 rows and float32 for all others.
    """
    return (_FACTOR * row_means(rows)).unsqueeze(1)


def ternary_blocks(weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield blocks of the rows of an eager tensor, with the limits and the magnitudes of each.

    So the weights are read from memory once, although they are needed twice. The limits are those of
    :func:`ternary_limits`, and the magnitudes are those of :func:`~.scale.magnitude_blocks`.
    """
    for block, magnitudes in magnitude_blocks(weight):
        yield block, (_FACTOR * (row_sums(magnitudes) / max(weight.shape[1], 1))).unsqueeze(1), magnitudes


def all_finite(limits: Tensor) -> bool:
    """Whether all limits are finite, so that no row becomes NaN."""
    return bool(limits.isfinite().all())


def _ternarize(x: Tensor) -> Tensor:
    length = x.shape[-1] if x.dim() else 1
    rows = x.reshape(math.prod(x.shape[:-1]), length)  # torch cannot infer -1 if the length is 0
    if not is_eager(rows):
        limits = ternary_limits(rows)
        values = (rows > limits).to(rows.dtype) - (rows < -limits).to(rows.dtype)
        return (values + (limits - limits).to(rows.dtype)).reshape(x.shape)
    values, start = torch.empty_like(rows, memory_format=torch.contiguous_format), 0
    for block, limits, magnitudes in ternary_blocks(rows):
        # Comparisons that write 0 and 1 as floats take a sixth of the time of bool results and their conversion.
        result = torch.gt(block, limits, out=values[start : start + len(block)])
        result.sub_(torch.lt(block, -limits, out=magnitudes))
        if not all_finite(limits):
            result.add_(limits - limits)  # NaN for the rows whose limit is not finite
        start += len(block)
    return values.reshape(x.shape)


def kept_quotients(magnitudes: Tensor, kept: Tensor) -> Tensor:
    """Return for each row the sum of its magnitudes, those that become 0 left out, divided by how many are kept."""
    return row_sums(magnitudes) / row_sums(kept).clamp(min=1)


def _kept_means(weight: Tensor) -> Tensor:
    if is_eager(weight):
        means = [weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))]
        memory = None
        for block, limits, magnitudes in ternary_blocks(weight):
            memory = torch.empty_like(magnitudes) if memory is None else memory
            kept = torch.gt(magnitudes, limits, out=memory[: len(block)])
            means.append(kept_quotients(magnitudes.mul_(kept), kept))
        return torch.cat(means)
    limits = ternary_limits(weight)
    magnitudes = weight.to(limits.dtype).abs()
    kept = (magnitudes > limits).to(limits.dtype)
    return kept_quotients(magnitudes * kept, kept)


_kept_means_of = for_each_row("kept_means", _kept_means)


def kept_means(weight: Tensor) -> Tensor:
    """Return the paper's scale α of each row: the mean magnitude of the values that do not become 0.

    It has no gradient, because the paper passes that of the scaled values unchanged to the weights.

    Args:
        weight: Shape ``(n, k)``.

    Returns:
        Shape ``(n,)``; float64 for float64 weights and float32 for all others. It is 0 for a row that keeps no value.
    """
    return _kept_means_of(weight)


class ScaledValues(Function):
    """Multiplies each row by a factor, and passes the gradient unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, scale: Tensor) -> Tensor:
        return values * scale.to(values.dtype).unsqueeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def scale_values(values: Tensor, scale: Tensor) -> Tensor:
    """Return ``values · scale``, with a factor for each row; the gradient of the product passes unchanged to `values`.

    Args:
        values: Shape ``(n, k)``.
        scale: Shape ``(n,)``.
    """
    return cast(Tensor, apply(ScaledValues, values, scale))


class Ternary(Quantization):
    """The ternary weights of Ternary Weight Networks: sign(w) if ``|w| > Δ``, and else 0, with Δ = 0.7 · mean ``|w|``.

    Δ is computed for each output channel, as published code for PyTorch does it (the paper has one for a layer): in
    float64 for float64 weights, and in float32 for all others. The gradient passes unchanged to all weights, also to
    those that become 0, and Δ is a constant.

    With ``weight_scale="mean"`` a layer multiplies the values of each channel by the paper's scale α, the mean
    magnitude of the weights that do not become 0. The gradient of the weights is then that of α · t, where t is -1, 0
    or +1, as in the paper. With ``weight_scale="learned"`` the scale is a parameter that begins as this α, and the
    weights get α times that gradient.

    A channel becomes NaN if one of its weights is infinite or NaN, or if the sum of its magnitudes is infinite. So the
    outputs show it, and such a layer is not packed.
    """

    name = "ternary"
    bit_width = 2

    def quantize(self, x: Tensor) -> Tensor:
        """Return the values, in the shape and dtype of `x`; each slice along the last dimension is a channel."""
        return quantize(x, _ternarize)

    def extra_repr(self) -> str:
        """Return an empty text, because there are no options."""
        return ""
