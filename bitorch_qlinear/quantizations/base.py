"""The base classes of quantizations, and the one that changes nothing."""

import math
from typing import cast

from torch import Tensor, nn

from .rule import BinaryRule, quantize

__all__ = ["BinaryQuantization", "Identity", "Quantization", "check_finite"]


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
    """A quantization to ±1 that a `BinaryRule` describes."""

    bit_width = 1

    def rule(self) -> BinaryRule | None:
        """Return the rule that holds now, or None if the values are not ±1 now.

        An implementation is also called on bitorch's object of the same name, so it reads no attribute that is missing
        there.
        """
        raise NotImplementedError

    def quantize(self, x: Tensor) -> Tensor:
        """Return ±1 in the shape and dtype of `x`."""
        rule = cast(BinaryRule, self.rule())
        return quantize(x, rule.signs, rule)

    def extra_repr(self) -> str:
        """Return an empty text, because the bit width is always 1."""
        return ""


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
