"""The quantizations of DoReFa-Net to one or more bits (https://arxiv.org/abs/1606.06160)."""

from functools import partial

import torch
from torch import Tensor

from .base import Quantization
from .rule import quantize

__all__ = ["InputDoReFa", "WeightDoReFa"]


def _round_to_levels(unit: Tensor, bits: int) -> Tensor:
    """Round values in [0, 1] to the nearest of 2 ** bits evenly spaced levels."""
    steps = (1 << bits) - 1
    return torch.round(unit * steps) / steps


def _dorefa_input(x: Tensor, bits: int) -> Tensor:
    return _round_to_levels(x.clamp(0, 1), bits)


def _dorefa_weight(x: Tensor, bits: int) -> Tensor:
    if x.numel() == 0:  # max() of no values raises
        return x.clone()
    squashed = torch.tanh(x)
    return 2 * _round_to_levels(squashed / (2 * squashed.abs().max()) + 0.5, bits) - 1


class _DoReFa(Quantization):
    """The part that both quantizations of DoReFa-Net share: the number of bits."""

    bit_width = 1

    def __init__(self, bits: int | None = None) -> None:
        """Set the width of an output value.

        Args:
            bits: 1 to 63; None means 1.

        Raises:
            ValueError: `bits` is not such an integer.
        """
        super().__init__()
        # With 64 bits the largest level would not fit into the int64 that torch multiplies with.
        if bits is not None and not (isinstance(bits, int) and 1 <= bits <= 63):
            raise ValueError(f"bits: expected an integer from 1 to 63 or None, got {bits!r}")
        self.bit_width = bits or 1


class InputDoReFa(_DoReFa):
    """x clipped to [0, 1] and rounded to 2 ** bits evenly spaced levels; the gradient passes unchanged.

    Paper: DoReFa-Net, https://arxiv.org/abs/1606.06160.
    """

    name = "inputdorefa"

    def quantize(self, x: Tensor) -> Tensor:
        """Return values in [0, 1], in the shape and dtype of `x`."""
        return quantize(x, partial(_dorefa_input, bits=self.bit_width))


class WeightDoReFa(_DoReFa):
    """tanh(x) over its largest magnitude, rounded to 2 ** bits levels in [-1, 1]; the gradient passes unchanged.

    A tensor of zeros becomes NaN, as in bitorch. Paper: DoReFa-Net, https://arxiv.org/abs/1606.06160.
    """

    name = "weightdorefa"

    def quantize(self, x: Tensor) -> Tensor:
        """Return values in [-1, 1], in the shape and dtype of `x`."""
        return quantize(x, partial(_dorefa_weight, bits=self.bit_width))
