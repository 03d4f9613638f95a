"""progressive_sign: a clipped line that becomes the sign while the training goes on."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .base import BinaryQuantization, check_finite
from .rule import SIGN_RULE, BinaryRule, quantize

__all__ = ["ProgressiveSign", "progressive_sign_scale", "set_progressive_sign_scale"]

_shared_scale = 0.0


def progressive_sign_scale() -> float:
    """Return the scale that all ProgressiveSign modules with global scaling share; it is 0 until it is set."""
    return _shared_scale


def set_progressive_sign_scale(scale: float) -> None:
    """Set the shared scale.

    Args:
        scale: 0 at the start of a training, (nearly) 1 at its end.

    Raises:
        ValueError: The scale is not finite.
    """
    global _shared_scale
    _shared_scale = check_finite("scale", scale)


def _clipped_line(x: Tensor, temperature: float) -> Tensor:
    """Return x / (1 - temperature), clipped to [-1, 1]; the slope is at most 1e7, as in bitorch."""
    return nn.functional.hardtanh(x / max(1.0 - temperature, 1e-7))


class ProgressiveSign(BinaryQuantization):
    """A clipped line in training, which the scale makes steeper step by step; `Sign` in eval mode.

    The line is x / (1 - t), clipped to [-1, 1], at temperature t = transform(scale). The gradient passes unchanged in
    both modes.

    Attributes:
        global_scaling: Whether the scale is the shared one (`set_progressive_sign_scale`).
        scale: The module's own scale, used if `global_scaling` is False.
        custom_transform: Computes the temperature from the scale, or None for `default_transform`.
        alpha: Base of the default transform.
        beta: Factor of the scale in the default transform.
    """

    name = "progressive_sign"
    global_scaling: bool
    scale: float
    custom_transform: Callable[[float], float] | None
    alpha: float
    beta: float

    def __init__(
        self,
        use_global_scaling: bool = True,
        initial_scale: float | None = None,
        custom_transform: Callable[[float], float] | None = None,
        alpha: float | None = None,
        beta: float | None = None,
    ) -> None:
        """Set which scale is used and how it becomes a temperature.

        Args:
            use_global_scaling: Use the scale of `set_progressive_sign_scale` instead of the attribute `scale`.
            initial_scale: First value of `scale`. None and 0 mean the shared scale at this moment, as in bitorch.
            custom_transform: The temperature as a function of the scale, instead of 1 - alpha ** (-beta * scale).
            alpha: Base of the default transform, best between 2 and 10. None and 0 mean 4, as in bitorch.
            beta: Factor of the scale there, best between 2 and 10. None and 0 mean 10, as in bitorch.

        Raises:
            ValueError: An initial scale is given but would not be used, because the scale is the shared one; a number
                is not finite; or `alpha` is negative.
        """
        super().__init__()
        if use_global_scaling and initial_scale is not None:
            raise ValueError(f"initial_scale: expected None with use_global_scaling=True, got {initial_scale!r}")
        self.global_scaling = use_global_scaling
        self.scale = check_finite("initial_scale", initial_scale or progressive_sign_scale())
        self.custom_transform = custom_transform
        self.alpha = check_finite("alpha", alpha or 4)
        self.beta = check_finite("beta", beta or 10)
        if self.alpha < 0:
            raise ValueError(f"alpha: expected a positive number, got {alpha!r}")

    @property
    def current_scale(self) -> float:
        """The scale in use, which is the shared one or this module's own."""
        return progressive_sign_scale() if self.global_scaling else self.scale

    @staticmethod
    def default_transform(scale: float, alpha: float | None = None, beta: float | None = None) -> float:
        """Return the temperature 1 - alpha ** (-beta * scale); alpha None means 4, beta None means 10."""
        alpha = 4 if alpha is None else alpha
        beta = 10 if beta is None else beta
        temperature: float = 1 - alpha ** (-beta * scale)
        return temperature

    def transform(self, scale: float) -> float:
        """Return the temperature at this scale: at 0 the line has slope 1, at 1 it is the sign."""
        if self.custom_transform is not None:
            return self.custom_transform(scale)
        return self.default_transform(scale, self.alpha, self.beta)

    def rule(self) -> BinaryRule | None:
        """Return the rule of `Sign` in eval mode, and None in training, where the values are not ±1."""
        return None if self.training else SIGN_RULE

    def quantize(self, x: Tensor) -> Tensor:
        """Return values in [-1, 1] in training and ±1 in eval mode, in the shape and dtype of `x`."""
        if not self.training:
            return super().quantize(x)
        temperature = self.transform(self.current_scale)
        return quantize(x, partial(_clipped_line, temperature=temperature))

    def extra_repr(self) -> str:
        """Return the scale and the transform."""
        scale = "global" if self.global_scaling else self.scale
        transform = f"alpha={self.alpha}, beta={self.beta}" if self.custom_transform is None else "custom_transform"
        return f"scale={scale}, {transform}"
