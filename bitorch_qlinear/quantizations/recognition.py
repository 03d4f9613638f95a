"""Recognizes the quantizations that the packed path can compute: this package's own and bitorch's.

bitorch's objects are recognized by the names of their module and class, without importing bitorch; a subclass of one
may compute something else, so it is not recognized. A class of the user's own is recognized if `BinaryQuantization`
computes its values from its rule and its scale.
"""

from collections.abc import Callable
from typing import Any, TypeGuard, cast

from torch import Tensor, nn

from .._torch import CALL_HOOKS, call_overrides, has_hooks
from .base import BinaryQuantization, Identity, Quantization, checked_scale, has_scale
from .dorefa import InputDoReFa
from .progressive_sign import ProgressiveSign
from .rule import BinaryRule
from .scale import row_means
from .sign_family import ApproxSign, Sign, SteHeaviside, SwishSign
from .ternary import Ternary, kept_means

__all__ = [
    "additions",
    "binary_rule",
    "depends_on_mode",
    "guard",
    "is_identity",
    "is_ternary",
    "level_bits",
    "mean_scale",
    "own_scale",
    "scaled_rule",
]

_BITORCH_NAMES: dict[type[nn.Module], tuple[str, str]] = {
    cls: (f"bitorch.quantizations.{module}", cls.__qualname__)
    for cls, module in (
        (Sign, "sign"),
        (ApproxSign, "approx_sign"),
        (SwishSign, "swish_sign"),
        (SteHeaviside, "ste_heaviside"),
        (ProgressiveSign, "progressive_sign"),
        (Identity, "identity"),
        (InputDoReFa, "dorefa"),
    )
}
_RULE_BY_CLASS: dict[type[nn.Module], Callable[[Any], BinaryRule | None]] = {
    cls: cls.rule for cls in (Sign, ApproxSign, SwishSign, SteHeaviside, ProgressiveSign)
}
_RULE_BY_NAME = {_BITORCH_NAMES[cls]: rule for cls, rule in _RULE_BY_CLASS.items()}

_SCHEDULES = "bitorch.quantizations.quantization_scheduler"


def _last_of_schedule(schedule: Any) -> nn.Module | None:
    """Return the last quantization of one of bitorch's schedules if the schedule is finished, else None.

    A finished schedule computes exactly its last quantization; at a factor of 1 both kinds do.
    """
    if schedule.factor != 1 or not schedule.quantizations:
        return None
    last: nn.Module = schedule.quantizations[-1]
    return last


def _rule_of_schedule(schedule: Any) -> BinaryRule | None:
    last = _last_of_schedule(schedule)
    return None if last is None else binary_rule(last)


for _name in ("MixLinearScheduling", "StepScheduling"):
    _RULE_BY_NAME[_SCHEDULES, _name] = _rule_of_schedule


# Methods that decide about the values. The packed path reads those of the class, so it does not take an object on which
# one of them is set; a call of the object does.
_METHODS = ("quantize", "rule", "weight_scale")


def _is_changed(quantization: nn.Module) -> bool:
    """Whether this very object computes something else than its class, by hooks or by methods that are set on it."""
    own = quantization.__dict__
    try:
        # The names of _METHODS and has_own_call's, in one expression: layers ask this twice in every call, and another
        # function would cost 50 ns.
        return bool(
            "quantize" in own
            or "rule" in own
            or "weight_scale" in own
            or "forward" in own
            or "_call_impl" in own
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        )
    except KeyError:
        return True


def additions(quantization: nn.Module) -> str:
    """Return in words what this very object has beside its class, which the packed path would skip; "" if nothing."""
    parts = [f"a {name} of its own" for name in call_overrides(quantization, *_METHODS)]
    if has_hooks(quantization):
        parts.append("hooks")
    return f" with {' and '.join(parts)}" if parts else ""


def guard(quantization: nn.Module) -> None:
    """Let torch.compile compile again if one of these methods is set on the object later, or if it gets hooks.

    It notices that only for attributes that the traced code reads, and not for a test whether ``__dict__`` has them. It
    notices hooks, as those of all modules, only if ``torch._dynamo.config.skip_nnmodule_hook_guards`` is False.
    """
    for name in ("forward", "_call_impl", *_METHODS):
        getattr(quantization, name, None)
    for table in CALL_HOOKS:
        list(getattr(quantization, table, ()))


def _is_exactly(quantization: nn.Module, ours: type[nn.Module]) -> bool:
    """Whether the quantization is of this class or of bitorch's of the same name, unchanged, and of no subclass.

    A finished schedule of bitorch counts as its last quantization.
    """
    if _is_changed(quantization):
        return False
    cls = type(quantization)
    name = cls.__module__, cls.__qualname__
    if _RULE_BY_NAME.get(name) is _rule_of_schedule:
        last = _last_of_schedule(quantization)
        return last is not None and _is_exactly(last, ours)
    return cls is ours or name == _BITORCH_NAMES[ours]


def _follows_its_rule(quantization: nn.Module) -> TypeGuard[BinaryQuantization]:
    """Whether the base class computes the values from `rule` and `weight_scale`, because nothing is overridden."""
    if not isinstance(quantization, BinaryQuantization):
        return False
    cls = type(quantization)
    return (
        cls.quantize is BinaryQuantization.quantize
        and cls.forward is Quantization.forward
        and not call_overrides(quantization)
        and not _is_changed(quantization)
    )


def binary_rule(quantization: nn.Module) -> BinaryRule | None:
    """Return the rule by which the packed path can compute this quantization to ±1, or None if it cannot.

    A layer calls this twice in every forward, so one dictionary lookup decides about the quantizations of this package.

    Args:
        quantization: Any module.

    Returns:
        The rule if this is exactly one of sign, approxsign, swishsign, steheaviside, or progressive_sign in eval mode,
        of this package or of bitorch, a finished schedule of bitorch whose last quantization is one of them, or a
        `BinaryQuantization` of the user's own that has no scale; and if it has no hooks and no methods set on the
        object (which the packed path would skip). None for all others, such as subclasses that override `quantize`.
    """
    cls = type(quantization)
    rule = _RULE_BY_CLASS.get(cls) or _RULE_BY_NAME.get((cls.__module__, cls.__qualname__))
    if rule is not None:
        return None if _is_changed(quantization) else rule(quantization)
    if not _follows_its_rule(quantization) or has_scale(quantization):
        return None
    return quantization.rule()


def scaled_rule(quantization: nn.Module) -> BinaryRule | None:
    """Return the rule of a quantization whose values are ±1 times a scale for each row, or None if it is another.

    Args:
        quantization: Any module.

    Returns:
        The rule of a `BinaryQuantization` of the user's own with a `weight_scale` and without hooks.
    """
    if type(quantization) in _RULE_BY_CLASS or not _follows_its_rule(quantization):
        return None
    return quantization.rule() if has_scale(quantization) else None


def is_ternary(quantization: nn.Module) -> TypeGuard[Ternary]:
    """Whether this is exactly `Ternary`, without hooks or methods of its own, which the packed path would skip."""
    return type(quantization) is Ternary and not _is_changed(quantization)


def mean_scale(quantization: nn.Module, weight: Tensor) -> Tensor:
    """Return the scale of each row that a layer computes with ``weight_scale="mean"``, without a gradient.

    Args:
        quantization: The layer's weight quantization.
        weight: Shape ``(n, k)``.

    Returns:
        Shape ``(n,)``: the mean magnitude of the row, or with ternary weights of those that do not become 0.
    """
    return kept_means(weight) if isinstance(quantization, Ternary) else row_means(weight)


def own_scale(quantization: nn.Module, weight: Tensor) -> Tensor | None:
    """Return the scale of a quantization that has a `scaled_rule`, and None for all others.

    Raises:
        ValueError: The scale is no float tensor with one value for each row of the weight.
    """
    if scaled_rule(quantization) is None:
        return None
    return checked_scale(cast(BinaryQuantization, quantization), weight)


def is_identity(quantization: nn.Module) -> bool:
    """Whether this is exactly the quantization that changes nothing, of this package or of bitorch, without hooks."""
    return _is_exactly(quantization, Identity)


def level_bits(quantization: nn.Module) -> int | None:
    """Return the bits of a level if this rounds x to levels that the packed path can compute, or None.

    Returns:
        1 or 2 for exactly inputdorefa with so many bits, of this package or of bitorch, or for a finished schedule of
        bitorch that ends with it; without hooks.
    """
    if not _is_exactly(quantization, InputDoReFa):
        return None
    name = type(quantization).__module__, type(quantization).__qualname__
    if _RULE_BY_NAME.get(name) is _rule_of_schedule:
        return level_bits(_last_of_schedule(quantization))  # type: ignore[arg-type]
    bits = quantization.bit_width
    return bits if bits == 1 or bits == 2 else None  # type: ignore[return-value]


def depends_on_mode(quantization: nn.Module) -> bool:
    """Whether this is a sign only in eval mode: progressive_sign, of this package or of bitorch."""
    return _is_exactly(quantization, ProgressiveSign)
