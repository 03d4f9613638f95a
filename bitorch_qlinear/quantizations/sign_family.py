"""The quantizations whose values are always signs; they differ in their gradients and in the sign of 0."""

from functools import partial

import torch
from torch import Tensor

from .base import BinaryQuantization, check_finite
from .rule import SIGN_RULE, BinaryRule

__all__ = ["ApproxSign", "Sign", "SteHeaviside", "SwishSign"]


class Sign(BinaryQuantization):
    """-1 if x < 0, else +1 (zeros and NaN included); the gradient passes unchanged.

    Paper: Binarized neural networks, https://arxiv.org/abs/1602.02830.
    """

    name = "sign"

    def rule(self) -> BinaryRule:
        """Return the rule of the signs, whose gradient is unchanged."""
        return SIGN_RULE


def _approx_sign_derivative(v: Tensor) -> Tensor:
    """Return 2 - 2|v| if |v| <= 1, else 0; as in bitorch it is NaN if v is NaN or 2|v| overflows."""
    magnitude = v.abs()
    return (2 - 2 * magnitude) * (magnitude <= 1)


_APPROX_SIGN = BinaryRule(derivative=_approx_sign_derivative)


class ApproxSign(BinaryQuantization):
    """The values of `Sign`; the gradient is that of a piecewise quadratic, 2 - 2|x| in [-1, 1] and 0 elsewhere.

    Paper: Bi-Real Net, https://arxiv.org/abs/1808.00278.
    """

    name = "approxsign"

    def rule(self) -> BinaryRule:
        """Return the rule of the signs, with the gradient times 2 - 2|v| in [-1, 1]."""
        return _APPROX_SIGN


def _swish_sign_derivative(v: Tensor, beta: float) -> Tensor:
    """Return β (2 - βv tanh(βv / 2)) / (1 + cosh(βv)); as in bitorch it is NaN if βv is NaN or infinite."""
    scaled = beta * v
    return beta * (2 - scaled * torch.tanh(scaled / 2)) / (1 + torch.cosh(scaled))


class SwishSign(BinaryQuantization):
    """The values of `Sign`; the gradient is the derivative of SignSwish, whose steepness is beta.

    Paper: BNN+, https://arxiv.org/abs/1812.11800.

    Attributes:
        beta: The steepness; it may be changed at any time.
    """

    name = "swishsign"
    beta: float

    def __init__(self, beta: float | None = None) -> None:
        """Set the steepness.

        Args:
            beta: The steepness; None and 0 mean 5, as in bitorch.

        Raises:
            ValueError: `beta` is not finite.
        """
        super().__init__()
        self.beta = check_finite("beta", beta or 5.0)

    def rule(self) -> BinaryRule:
        """Return the rule of the signs, with the gradient times the derivative at the present beta."""
        return BinaryRule(derivative=partial(_swish_sign_derivative, beta=self.beta))

    def extra_repr(self) -> str:
        """Return the steepness."""
        return f"beta={self.beta}"


_STE_HEAVISIDE = BinaryRule(strict=True, limit=1.0)


class SteHeaviside(BinaryQuantization):
    """+1 if x > 0, else -1 (zeros and NaN included); the gradient passes if ``|x| <= 1`` and is 0 otherwise."""

    name = "steheaviside"

    def rule(self) -> BinaryRule:
        """Return the rule of the strict signs, whose gradient passes if |v| <= 1."""
        return _STE_HEAVISIDE
