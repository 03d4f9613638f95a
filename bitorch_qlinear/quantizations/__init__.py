"""The quantizations of QLinear: what a real tensor becomes before the product, and what gradient passes back.

Values and gradients are those of bitorch 0.4.1, in every floating dtype, and the dtype is kept. One autograd
Function serves them all. What the packed path must know of a sign-like quantization is its `BinaryRule`; the float
path here is computed from the same rule, so that each derivative is written once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from .._torch import apply, has_hooks

__all__ = [
    "ApproxSign",
    "BinaryRule",
    "Identity",
    "InputDoReFa",
    "ProgressiveSign",
    "Quantization",
    "Sign",
    "SteHeaviside",
    "SwishSign",
    "WeightDoReFa",
    "binary_rule",
    "cancel_gradient",
    "get_quantization",
    "progressive_sign_scale",
    "quantization_names",
    "register_quantization",
    "set_progressive_sign_scale",
]

_Class = TypeVar("_Class", bound=type[nn.Module])


# ---------------------------------------------------------------------------------------------------------------------
# Rules and gradients


@dataclass(frozen=True)
class BinaryRule:
    """How a sign-like quantization turns values v into ±1, and which part of the gradient it hands back.

    Attributes:
        strict: True: +1 exactly where v > 0, so that 0 and NaN become -1.
            False: -1 exactly where v < 0, so that 0 and NaN become +1.
        limit: the gradient is 0 except where |v| <= limit, compared in v's dtype; NaN is out of range. None: no limit.
        derivative: elementwise function of v by which the gradient is multiplied. None: it passes unchanged.
    """

    strict: bool = False
    limit: float | None = None
    derivative: Callable[[Tensor], Tensor] | None = None

    @property
    def changes_gradient(self) -> bool:
        """Whether `gradient` returns anything but the gradient itself, and so needs v."""
        return self.limit is not None or self.derivative is not None

    def signs(self, v: Tensor) -> Tensor:
        """±1 in the shape and the floating dtype of `v`."""
        # torch.sign is -1, 0 or 1, and 0 for NaN: a half decides what 0 becomes. In two arithmetic passes, for a
        # torch.where on random signs is 15 times slower on a CPU (its branch is mispredicted every other time).
        return v.sign().add_(-0.5 if self.strict else 0.5).sign_()

    def gradient(self, grad: Tensor, v: Tensor) -> Tensor:
        """The gradient for `v`, given the gradient `grad` (same shape) for its signs."""
        if self.derivative is not None:
            grad = grad * self.derivative(v)
        if self.limit is not None:
            # where, not a product with the mask: 0 * inf would let a NaN through
            grad = torch.where(v.abs() <= self.limit, grad, 0)
        return grad


_SIGN = BinaryRule()


class _Quantize(Function):
    """`values(x)` forward, `rule.gradient` backward: a derivative chosen apart from the values.

    With a rule that does not change the gradient this is the straight-through estimator of arXiv:1308.3432, and x is
    not saved.
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


def _quantize(x: Tensor, values: Callable[[Tensor], Tensor], rule: BinaryRule = _SIGN) -> Tensor:
    """`values(x)` with the gradient of `rule`, which passes it unchanged unless another is given."""
    return cast(Tensor, apply(_Quantize, x, values, rule))


def cancel_gradient(x: Tensor, threshold: float | None) -> Tensor:
    """Returns x, with a gradient that is 0 where |x| <= threshold does not hold.

    The comparison is made in x's dtype, the threshold rounded to it; NaN is out of range. A cancelled gradient is
    exactly 0, whatever came in.

    Args:
        x: any shape, any floating dtype.
        threshold: None or 0 cancels nothing and returns `x`.

    Raises:
        ValueError: the threshold is negative or NaN.
    """
    if not threshold:
        return x
    if not threshold > 0:
        raise ValueError(f"threshold: expected None or a number of at least 0, got {threshold!r}")
    return _quantize(x, _same, BinaryRule(limit=threshold))


def _same(x: Tensor) -> Tensor:
    # autograd wants an output of its own
    return x.view_as(x)


# ---------------------------------------------------------------------------------------------------------------------
# Sign-like quantizations


class Quantization(nn.Module):
    """Base class of quantizations: implement `quantize`, set `name`, and `register_quantization` makes it known.

    Attributes:
        name: what `get_quantization` finds it by.
        bit_width: bits of information in one output value.
    """

    name: str
    bit_width: int

    def quantize(self, x: Tensor) -> Tensor:
        """The quantized values: shape and dtype of `x`."""
        raise NotImplementedError(f"{type(self).__name__} has no quantize(x)")

    def forward(self, x: Tensor) -> Tensor:
        """`quantize(x)`."""
        return self.quantize(x)

    def extra_repr(self) -> str:
        """What stands between the parentheses of `repr`."""
        return f"bit_width={self.bit_width}"


class _Binary(Quantization):
    """A quantization to ±1 that a `BinaryRule` describes."""

    bit_width = 1

    def rule(self) -> BinaryRule | None:
        """The rule that holds now. Reads no attribute that bitorch's class of the same name lacks."""
        raise NotImplementedError

    def quantize(self, x: Tensor) -> Tensor:
        """±1 in shape and dtype of `x`."""
        rule = cast(BinaryRule, self.rule())
        return _quantize(x, rule.signs, rule)

    def extra_repr(self) -> str:
        """Nothing: the bit width is 1."""
        return ""


class Sign(_Binary):
    """-1 where x < 0, else +1 (zeros and NaN included); the gradient passes unchanged (arXiv:1602.02830)."""

    name = "sign"

    def rule(self) -> BinaryRule:
        """The signs, and the gradient as it comes."""
        return _SIGN


def _approx_sign_derivative(v: Tensor) -> Tensor:
    """2 - 2|v| where |v| <= 1, else 0. As in bitorch NaN where v is NaN or 2|v| overflows."""
    magnitude = v.abs()
    return (2 - 2 * magnitude) * (magnitude <= 1)


_APPROX_SIGN = BinaryRule(derivative=_approx_sign_derivative)


class ApproxSign(_Binary):
    """The values of `Sign`; the gradient is that of a piecewise quadratic, 2 - 2|x| in [-1, 1] and 0 elsewhere.

    Paper: Bi-Real Net, arXiv:1808.00278.
    """

    name = "approxsign"

    def rule(self) -> BinaryRule:
        """The signs, and the gradient times 2 - 2|v|."""
        return _APPROX_SIGN


def _swish_sign_derivative(v: Tensor, beta: float) -> Tensor:
    """β (2 - βv tanh(βv / 2)) / (1 + cosh(βv)); as in bitorch NaN where βv is NaN or infinite."""
    scaled = beta * v
    return beta * (2 - scaled * torch.tanh(scaled / 2)) / (1 + torch.cosh(scaled))


class SwishSign(_Binary):
    """The values of `Sign`; the gradient is the derivative of SignSwish, whose steepness is beta.

    Paper: BNN+, arXiv:1812.11800.

    Attributes:
        beta: the steepness; it may be changed at any time.
    """

    name = "swishsign"
    beta: float

    def __init__(self, beta: float | None = None) -> None:
        """Sets the steepness.

        Args:
            beta: None or 0, as in bitorch, means 5.

        Raises:
            ValueError: `beta` is not finite.
        """
        super().__init__()
        self.beta = _finite("beta", beta or 5.0)

    def rule(self) -> BinaryRule:
        """The signs, and the gradient times the derivative at the present beta."""
        return BinaryRule(derivative=partial(_swish_sign_derivative, beta=self.beta))

    def extra_repr(self) -> str:
        """The steepness."""
        return f"beta={self.beta}"


_STE_HEAVISIDE = BinaryRule(strict=True, limit=1.0)


class SteHeaviside(_Binary):
    """+1 where x > 0, else -1 (zeros and NaN included); the gradient passes where |x| <= 1."""

    name = "steheaviside"

    def rule(self) -> BinaryRule:
        """The strict signs, and the gradient where |v| <= 1."""
        return _STE_HEAVISIDE


# ---------------------------------------------------------------------------------------------------------------------
# Progressive sign

_progressive_sign_scale = 0.0


def progressive_sign_scale() -> float:
    """The scale that all ProgressiveSign modules with global scaling share; 0 until it is set."""
    return _progressive_sign_scale


def set_progressive_sign_scale(scale: float) -> None:
    """Sets the shared scale: 0 at the start of a training, (nearly) 1 at its end.

    Raises:
        ValueError: the scale is not finite.
    """
    global _progressive_sign_scale
    _progressive_sign_scale = _finite("scale", scale)


def _clipped_slope(x: Tensor, temperature: float) -> Tensor:
    """The line x / (1 - temperature), clipped to [-1, 1]; its slope ends at 1e7, as in bitorch."""
    return nn.functional.hardtanh(x / max(1.0 - temperature, 1e-7))


class ProgressiveSign(_Binary):
    """In training a clipped line that the scale makes steeper step by step; in eval mode `Sign`.

    The line is x / (1 - t), clipped to [-1, 1], at temperature t = transform(scale). The gradient passes unchanged in
    both modes.
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
        """Sets where the scale comes from and how it becomes a temperature.

        Args:
            use_global_scaling: take the scale from `set_progressive_sign_scale`; else from the attribute `scale`.
            initial_scale: first value of `scale`; None or 0, as in bitorch, means the shared scale at this moment.
            custom_transform: the temperature as a function of the scale, instead of 1 - alpha ** (-beta * scale).
            alpha: base of the default transform, best between 2 and 10; None or 0, as in bitorch, means 4.
            beta: its factor of the scale, best between 2 and 10; None or 0, as in bitorch, means 10.

        Raises:
            ValueError: an initial scale is given that the shared one would hide, a number is not finite, or `alpha`
                is negative.
        """
        super().__init__()
        if use_global_scaling and initial_scale is not None:
            raise ValueError(f"initial_scale: expected None with use_global_scaling=True, got {initial_scale!r}")
        self.global_scaling = use_global_scaling
        self.scale = _finite("initial_scale", initial_scale or progressive_sign_scale())
        self.custom_transform = custom_transform
        self.alpha = _finite("alpha", alpha or 4)
        self.beta = _finite("beta", beta or 10)
        if self.alpha < 0:
            raise ValueError(f"alpha: expected a positive number, got {alpha!r}")

    @property
    def current_scale(self) -> float:
        """The shared scale or this module's own."""
        return progressive_sign_scale() if self.global_scaling else self.scale

    @staticmethod
    def default_transform(scale: float, alpha: float | None = None, beta: float | None = None) -> float:
        """The temperature 1 - alpha ** (-beta * scale); alpha is 4 and beta 10 where None."""
        alpha = 4 if alpha is None else alpha
        beta = 10 if beta is None else beta
        temperature: float = 1 - alpha ** (-beta * scale)
        return temperature

    def transform(self, scale: float) -> float:
        """The temperature at this scale: 0 is a line of slope 1, 1 the sign."""
        if self.custom_transform is not None:
            return self.custom_transform(scale)
        return self.default_transform(scale, self.alpha, self.beta)

    def rule(self) -> BinaryRule | None:
        """That of `Sign` in eval mode; None in training, where the values are not ±1."""
        return None if self.training else _SIGN

    def quantize(self, x: Tensor) -> Tensor:
        """Values in [-1, 1] in training, ±1 in eval mode; shape and dtype of `x`."""
        if not self.training:
            return super().quantize(x)
        temperature = self.transform(self.current_scale)
        return _quantize(x, partial(_clipped_slope, temperature=temperature))

    def extra_repr(self) -> str:
        """Where the scale comes from, and the transform."""
        scale = "global" if self.global_scaling else self.scale
        transform = f"alpha={self.alpha}, beta={self.beta}" if self.custom_transform is None else "custom_transform"
        return f"scale={scale}, {transform}"


# ---------------------------------------------------------------------------------------------------------------------
# More than one bit


class Identity(Quantization):
    """x itself: no quantization."""

    name = "identity"
    bit_width = 32

    def quantize(self, x: Tensor) -> Tensor:
        """`x`."""
        return x


def _round_to_levels(unit: Tensor, bits: int) -> Tensor:
    """Values in [0, 1], rounded to the nearest of 2 ** bits evenly spaced ones."""
    steps = (1 << bits) - 1
    return torch.round(unit * steps) / steps


def _dorefa_input(x: Tensor, bits: int) -> Tensor:
    return _round_to_levels(x.clamp(0, 1), bits)


def _dorefa_weight(x: Tensor, bits: int) -> Tensor:
    if x.numel() == 0:  # which has no largest value
        return x.clone()
    squashed = torch.tanh(x)
    return 2 * _round_to_levels(squashed / (2 * squashed.abs().max()) + 0.5, bits) - 1


class _DoReFa(Quantization):
    """What the two quantizations of DoReFa-Net share (arXiv:1606.06160): the gradient passes unchanged."""

    bit_width = 1

    def __init__(self, bits: int | None = None) -> None:
        """Sets the width.

        Args:
            bits: of an output value, 1 to 63; None means 1.

        Raises:
            ValueError: `bits` is not such an integer.
        """
        super().__init__()
        # at 64 bits the largest level no longer fits the int64 that torch multiplies with
        if bits is not None and not (isinstance(bits, int) and 1 <= bits <= 63):
            raise ValueError(f"bits: expected an integer from 1 to 63 or None, got {bits!r}")
        self.bit_width = bits or 1


class InputDoReFa(_DoReFa):
    """x clipped to [0, 1] and rounded to 2 ** bits evenly spaced levels; the gradient passes unchanged.

    Paper: DoReFa-Net, arXiv:1606.06160.
    """

    name = "inputdorefa"

    def quantize(self, x: Tensor) -> Tensor:
        """Values in [0, 1]; shape and dtype of `x`."""
        return _quantize(x, partial(_dorefa_input, bits=self.bit_width))


class WeightDoReFa(_DoReFa):
    """tanh(x) over its largest magnitude, rounded to 2 ** bits levels in [-1, 1]; the gradient passes unchanged.

    As in bitorch, a tensor of zeros becomes NaN. Paper: DoReFa-Net, arXiv:1606.06160.
    """

    name = "weightdorefa"

    def quantize(self, x: Tensor) -> Tensor:
        """Values in [-1, 1]; shape and dtype of `x`."""
        return _quantize(x, partial(_dorefa_weight, bits=self.bit_width))


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Recognition and names

# bitorch's own objects are known by their module's and their class's name, without importing bitorch. A subclass may
# compute something else: it is not found.
_RULE_BY_NAME: dict[tuple[str, str], Callable[[Any], BinaryRule | None]] = {
    (f"bitorch.quantizations.{module}", cls.__qualname__): cls.rule
    for cls, module in (
        (Sign, "sign"),
        (ApproxSign, "approx_sign"),
        (SwishSign, "swish_sign"),
        (SteHeaviside, "ste_heaviside"),
        (ProgressiveSign, "progressive_sign"),
    )
}
_RULE_BY_CLASS: dict[type[nn.Module], Callable[[Any], BinaryRule | None]] = {
    cls: cls.rule for cls in (Sign, ApproxSign, SwishSign, SteHeaviside, ProgressiveSign)
}
_IDENTITIES = {(module, "Identity") for module in (__name__, "bitorch.quantizations.identity")}


def binary_rule(quantization: nn.Module) -> BinaryRule | None:
    """The rule by which the packed path can compute this quantization, or None where it cannot.

    It is called on every forward of a layer, and so kept to one dictionary lookup.

    Args:
        quantization: any module.

    Returns:
        The rule if this is exactly one of sign, approxsign, swishsign, steheaviside, or progressive_sign in eval mode,
        of this package or of bitorch, without hooks (which the packed path would skip). None for all others,
        subclasses included.
    """
    cls = type(quantization)
    rule = _RULE_BY_CLASS.get(cls) or _RULE_BY_NAME.get((cls.__module__, cls.__qualname__))
    return None if rule is None or has_hooks(quantization) else rule(quantization)


def is_identity(quantization: nn.Module) -> bool:
    """Whether this is exactly the quantization that leaves x as it is, of this package or of bitorch, without hooks."""
    cls = type(quantization)
    return (cls.__module__, cls.__qualname__) in _IDENTITIES and not has_hooks(quantization)


def depends_on_mode(quantization: nn.Module) -> bool:
    """Whether this is a sign in eval mode alone, of this package or of bitorch."""
    cls = type(quantization)
    return cls is ProgressiveSign or (cls.__module__, cls.__qualname__) == (
        "bitorch.quantizations.progressive_sign",
        "ProgressiveSign",
    )


_classes: dict[str, type[nn.Module]] = {}


def register_quantization(cls: _Class, *, replace: bool = False) -> _Class:
    """Makes a quantization known by its `name`; usable as a decorator.

    Args:
        cls: a subclass of nn.Module whose constructor needs no argument, with the class attribute `name`.
        replace: let it take over a name that another class has.

    Returns:
        `cls`.

    Raises:
        TypeError: `cls` is not a subclass of nn.Module.
        ValueError: its name is missing, empty or not a str, or taken.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls: expected a subclass of torch.nn.Module, got {cls!r}")
    name = getattr(cls, "name", None)
    if not (isinstance(name, str) and name):
        raise ValueError(f"{cls.__qualname__}.name: expected a non-empty str, got {name!r}")
    if not replace and _classes.get(name, cls) is not cls:
        raise ValueError(f"{cls.__qualname__}.name: expected a name not taken, or replace=True; got {name!r}")
    _classes[name] = cls
    return cls


def quantization_names() -> list[str]:
    """The names that `get_quantization` knows, sorted."""
    return sorted(_classes)


def get_quantization(quantization: str | nn.Module | None, argument: str = "quantization") -> nn.Module:
    """The module meant by a name, a module or None.

    Args:
        quantization: a name gives a new instance of that class, a module itself, None a new `Sign`.
        argument: what the errors call it.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a module nor None.
    """
    if quantization is None:
        return Sign()
    if isinstance(quantization, nn.Module):
        return quantization
    if not isinstance(quantization, str):
        raise TypeError(f"{argument}: expected a name, a torch.nn.Module or None, got {quantization!r}")
    if quantization not in _classes:
        raise ValueError(f"{argument}: expected one of {', '.join(quantization_names())}, got {quantization!r}")
    return _classes[quantization]()


for _cls in (Sign, ApproxSign, SwishSign, SteHeaviside, ProgressiveSign, Identity, InputDoReFa, WeightDoReFa):
    register_quantization(_cls)
