"""How a sign-like quantization turns values into signs and which part of the gradient it passes back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import Function

from .._torch import apply

__all__ = ["SIGN_RULE", "BinaryRule", "cancel_gradient", "quantize"]


@dataclass(frozen=True)
class BinaryRule:
    """How a sign-like quantization turns values v into ±1, and which part of the gradient it passes back.

    Attributes:
        strict: True gives +1 exactly if v > 0, so that 0 and NaN become -1. False gives -1 exactly if v < 0, so that 0
            and NaN become +1.
        limit: The gradient is 0 unless ``|v| <= limit``, compared in v's dtype; NaN is out of range. None is no limit.
        derivative: An elementwise function of v that the gradient is multiplied by. None passes it unchanged.
    """

    strict: bool = False
    limit: float | None = None
    derivative: Callable[[Tensor], Tensor] | None = None

    @property
    def changes_gradient(self) -> bool:
        """Whether `gradient` can return anything but the gradient itself, and therefore needs v."""
        return self.limit is not None or self.derivative is not None

    def signs(self, v: Tensor) -> Tensor:
        """Return ±1 in the shape and the floating dtype of `v`."""
        # torch.sign returns -1, 0 or 1, and 0 for NaN; adding a half decides what 0 becomes. Two arithmetic passes are
        # 15 times faster on a CPU than torch.where on random signs, whose branch is mispredicted every other time.
        return v.sign().add_(-0.5 if self.strict else 0.5).sign_()

    def gradient(self, grad: Tensor, v: Tensor) -> Tensor:
        """Return the gradient for `v`, given the gradient `grad` (same shape) for its signs."""
        if self.derivative is not None:
            grad = grad * self.derivative(v)
        if self.limit is not None:
            # A product with the mask would turn an infinite gradient out of range into NaN.
            grad = torch.where(v.abs() <= self.limit, grad, 0)
        return grad


SIGN_RULE = BinaryRule()
"""The rule of `Sign`: +1 unless v < 0, and the gradient passes unchanged."""


class Quantize(Function):
    """Computes `values(x)` forward and `rule.gradient` backward: the derivative is chosen apart from the values.

    With a rule that does not change the gradient this is the straight-through estimator of
    https://arxiv.org/abs/1308.3432, and x is not saved.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Callable[[Tensor], Tensor], rule: BinaryRule) -> Tensor:
        return values(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.rule = inputs
        ctx.save_for_backward(x if ctx.rule.changes_gradient else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.rule.gradient(grad, x), None, None


def quantize(x: Tensor, values: Callable[[Tensor], Tensor], rule: BinaryRule = SIGN_RULE) -> Tensor:
    """Return `values(x)`, with the gradient of `rule`; the default rule passes the gradient unchanged."""
    return cast(Tensor, apply(Quantize, x, values, rule))


def cancel_gradient(x: Tensor, threshold: float | None) -> Tensor:
    """Return x, with a gradient that is 0 unless ``|x| <= threshold``.

    The comparison is made in x's dtype, with the threshold rounded to it; NaN is out of range. A cancelled gradient is
    exactly 0, even if the incoming one is infinite or NaN.

    Args:
        x: Any shape, any floating dtype.
        threshold: None and 0 cancel nothing and return `x` itself.

    Raises:
        ValueError: The threshold is negative or NaN.
    """
    if not threshold:
        return x
    if not threshold > 0:
        raise ValueError(f"threshold: expected None or a number of at least 0, got {threshold!r}")
    return quantize(x, _view, BinaryRule(limit=threshold))


def _view(x: Tensor) -> Tensor:
    # An autograd Function must not return its input itself.
    return x.view_as(x)
