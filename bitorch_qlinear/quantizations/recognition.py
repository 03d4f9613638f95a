"""Recognizes the quantizations that the packed path can compute: this package's own and bitorch's.

bitorch's objects are recognized by the names of their module and class, without importing bitorch. A subclass may
compute something else, so it is not recognized.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from .._torch import has_hooks
from .base import Identity
from .progressive_sign import ProgressiveSign
from .rule import BinaryRule
from .sign_family import ApproxSign, Sign, SteHeaviside, SwishSign

__all__ = ["binary_rule", "depends_on_mode", "is_identity"]

_BITORCH_NAMES: dict[type[nn.Module], tuple[str, str]] = {
    cls: (f"bitorch.quantizations.{module}", cls.__qualname__)
    for cls, module in (
        (Sign, "sign"),
        (ApproxSign, "approx_sign"),
        (SwishSign, "swish_sign"),
        (SteHeaviside, "ste_heaviside"),
        (ProgressiveSign, "progressive_sign"),
        (Identity, "identity"),
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


def _is_exactly(quantization: nn.Module, ours: type[nn.Module]) -> bool:
    """Whether the quantization is of this class or of bitorch's of the same name, and of no subclass.

    A finished schedule of bitorch counts as its last quantization.
    """
    cls = type(quantization)
    name = cls.__module__, cls.__qualname__
    if _RULE_BY_NAME.get(name) is _rule_of_schedule:
        last = _last_of_schedule(quantization)
        return last is not None and _is_exactly(last, ours)
    return cls is ours or name == _BITORCH_NAMES[ours]


def binary_rule(quantization: nn.Module) -> BinaryRule | None:
    """Return the rule by which the packed path can compute this quantization, or None if it cannot.

    A layer calls this twice in every forward, so one dictionary lookup decides.

    Args:
        quantization: Any module.

    Returns:
        The rule if this is exactly one of sign, approxsign, swishsign, steheaviside, or progressive_sign in eval mode,
        of this package or of bitorch, or a finished schedule of bitorch whose last quantization is one of them; without
        hooks (which the packed path would skip). None for all others, subclasses included.
    """
    cls = type(quantization)
    rule = _RULE_BY_CLASS.get(cls) or _RULE_BY_NAME.get((cls.__module__, cls.__qualname__))
    return None if rule is None or has_hooks(quantization) else rule(quantization)


def is_identity(quantization: nn.Module) -> bool:
    """Whether this is exactly the quantization that changes nothing, of this package or of bitorch, without hooks."""
    return _is_exactly(quantization, Identity) and not has_hooks(quantization)


def depends_on_mode(quantization: nn.Module) -> bool:
    """Whether this is a sign only in eval mode: progressive_sign, of this package or of bitorch."""
    return _is_exactly(quantization, ProgressiveSign)
