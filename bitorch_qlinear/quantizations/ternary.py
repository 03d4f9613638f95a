"""Ternary weights: -1, 0 or +1 (https://arxiv.org/abs/1605.04711)."""

import math

import torch
from torch import Tensor

from .base import Quantization
from .rule import quantize
from .scale import mean_magnitude, row_means

__all__ = ["Ternary"]

# The paper's factor: nearly the best one both for uniform and for normally distributed weights.
_FACTOR = 0.7


def _limits(rows: Tensor) -> Tensor:
    """Return the magnitude that a value of each row must exceed not to become 0, shape ``(n, 1)``."""
    return (_FACTOR * row_means(rows)).unsqueeze(1)


def _ternarize(x: Tensor) -> Tensor:
    length = x.shape[-1] if x.dim() else 1
    rows = x.reshape(math.prod(x.shape[:-1]), length)  # torch cannot infer -1 if the length is 0
    limits = _limits(rows)
    # A comparison with NaN is false. torch compares values of a half type with the float32 limits in float32. A
    # comparison in place gives 0 and 1 as floats, in a sixth of the time that a bool result and its conversion take.
    return rows.clone().gt_(limits).sub_(rows.clone().lt_(-limits)).reshape(x.shape)


class Ternary(Quantization):
    """sign(w) if ``|w| > Δ``, else 0, with Δ = 0.7 · mean ``|w|`` of each output channel; times a scale, if asked.

    The gradient passes unchanged to all weights, also to those that become 0. With a scale α the values are α · t,
    where t is -1, 0 or +1. If G is the gradient of α · t, the gradient of w is ``α · G + t / c · dL/dα``, where c is
    the number of weights of the channel that do not become 0 and ``dL/dα = Σ G · t``. So α is differentiated as
    QLinear's other scales are, and Δ is a constant.

    The paper (Ternary Weight Networks, https://arxiv.org/abs/1605.04711) has one Δ and one α for a layer, and passes G
    itself to w. Here each output channel has a Δ and an α of its own, like QLinear's other scales: a layer multiplies
    each output by a factor anyway, and the values are at least as close to the weights.

    Δ is computed in float64 for float64 weights and in float32 for all others. A row whose Δ is infinite or NaN becomes
    zeros, as a row of zeros does: such a row has an infinite weight or NaN, or the sum of its magnitudes overflows.

    Attributes:
        scale: Whether the values are multiplied by α, the mean magnitude of the row's weights that are not 0.
    """

    name = "ternary"
    bit_width = 2
    scale: bool

    def __init__(self, scale: bool = False) -> None:
        """Choose between -1, 0, +1 and -α, 0, +α.

        Args:
            scale: Multiply the values of each row by α. A layer's own ``weight_scale`` must then be None.
        """
        super().__init__()
        self.scale = scale

    def ternarize(self, x: Tensor) -> Tensor:
        """Return -1, 0 and +1 in the shape and dtype of `x`; the gradient passes unchanged."""
        return quantize(x, _ternarize)

    def weight_scale(self, weight: Tensor) -> Tensor:
        """Return α; it is differentiable.

        Args:
            weight: Shape ``(n, k)``.

        Returns:
            Shape ``(n,)``; float64 for float64 weights and float32 for all others. It is 0 for rows that become zeros.
        """
        values = weight.detach()
        kept = values.abs() > _limits(values)
        means = mean_magnitude(torch.where(kept, weight, 0))
        return means * (weight.shape[-1] / kept.sum(1).clamp(min=1).to(means.dtype))

    def quantize(self, x: Tensor) -> Tensor:
        """Return the values, in the shape and dtype of `x`; each slice along the last dimension is a row."""
        values = self.ternarize(x)
        if not self.scale:
            return values
        scale = self.weight_scale(x.reshape(math.prod(x.shape[:-1]), x.shape[-1])).reshape(x.shape[:-1])
        return values * scale.to(x.dtype).unsqueeze(-1)

    def extra_repr(self) -> str:
        """Return whether the values are scaled."""
        return f"scale={self.scale}"
