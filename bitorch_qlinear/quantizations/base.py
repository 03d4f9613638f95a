"""The base classes of quantizations, and the one that changes nothing."""

import math
from typing import cast

from torch import Tensor, nn

from .rule import BinaryRule, quantize

__all__ = ["BinaryQuantization", "Identity", "Quantization", "check_finite", "checked_scale", "has_scale"]


class Quantization(nn.Module):
    """Base class of quantizations: implement `quantize`, set `name`, and pass the class to `register_quantization`.

    Attributes:
        name: The name by which `get_quantization` finds the class.
        bit_width: Bits of information in one output value.
    """

    name: str
    bit_width: int

    def quantize(self, x: Tensor) -> Tensor:
        """Return the quantized values, in the shape and dtype of `x`.

        Raises:
            NotImplementedError: The subclass does not implement it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no quantize(x)")

    def forward(self, x: Tensor) -> Tensor:
        """Return `quantize(x)`."""
        return self.quantize(x)

    def extra_repr(self) -> str:
        """Return the text between the parentheses of `repr`."""
        return f"bit_width={self.bit_width}"


class BinaryQuantization(Quantization):
    """A quantization to signs, or to signs times a scale for each row, that layers compute with bits.

    Implement `rule`, and `weight_scale` if the values are not ±1 but ``sign(w) · scale(w)``. The values and the
    gradient follow from the two, so do not override `quantize` or `forward`: a subclass that does may compute something
    else, and is therefore computed in float.

    A quantization with a scale is for weights: the layer multiplies the product of signs by the scale of each output
    channel, and :func:`bitorch_qlinear.pack` stores the scale that it finds. As an input quantization it is computed in
    float.
    """

    bit_width = 1

    def rule(self) -> BinaryRule | None:
        """Return the rule that holds now; a class of your own returns one in every mode.

        An implementation in this package is also called on bitorch's object of the same name, so it reads no attribute
        that is missing there. None means that the values are not ±1 now.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rule()")

    def weight_scale(self, weight: Tensor) -> Tensor:
        """Return the scale of each row; a class that does not implement it has none.

        A layer calls this in every forward, in training with gradients, so that the weight gets a gradient through the
        scale as well. It is called on the real weight, and must give the same for the same weight: the packed layer
        keeps the result of one call.

        Args:
            weight: Shape ``(n, k)``.

        Returns:
            Shape ``(n,)``, any float type.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weight_scale(weight)")

    def quantize(self, x: Tensor) -> Tensor:
        """Return ±1, times the scale if there is one, in the shape and dtype of `x`."""
        rule = cast(BinaryRule, self.rule())
        signs = quantize(x, rule.signs, rule)
        return signs * checked_scale(self, x).to(x.dtype).unsqueeze(-1) if has_scale(self) else signs

    def extra_repr(self) -> str:
        """Return an empty text, because the bit width is always 1."""
        return ""


def has_scale(quantization: BinaryQuantization) -> bool:
    """Whether the quantization's values are signs times a scale."""
    return type(quantization).weight_scale is not BinaryQuantization.weight_scale


def checked_scale(quantization: BinaryQuantization, weight: Tensor) -> Tensor:
    """Return the quantization's scale of the weight.

    Raises:
        ValueError: It is no float tensor with one value for each row.
    """
    scale = quantization.weight_scale(weight)
    if not isinstance(scale, Tensor) or not scale.is_floating_point() or scale.shape != weight.shape[:-1]:
        got = f"{scale.dtype} {tuple(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
        where, shape = f"{type(quantization).__name__}.weight_scale", tuple(weight.shape[:-1])
        raise ValueError(f"{where}: expected floats of shape {shape}, got {got}")
    return scale


class Identity(Quantization):
    """No quantization: the output is x itself."""

    name = "identity"
    bit_width = 32

    def quantize(self, x: Tensor) -> Tensor:
        """Return `x` itself."""
        return x


def check_finite(name: str, value: float) -> float:
    """Return the value.

    Raises:
        ValueError: It is infinite or NaN; the message begins with `name`.
    """
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return value
