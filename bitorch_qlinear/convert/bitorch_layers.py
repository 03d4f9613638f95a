"""Recognizes bitorch's linear layer without importing bitorch, and makes a QLinear of it.

bitorch's classes are recognized by the names of their module and class, as its quantizations are in
``quantizations/recognition.py``.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .._torch import call_overrides, has_hooks, has_state_hooks, hook_names, own_attributes
from ..linear import QLinear, how_to_free

__all__ = ["held", "is_bitorch_layer", "qlinear_of", "reason_against_sharing", "threshold_of"]

_Layer = TypeVar("_Layer", bound=QLinear)

_LAYER = ("bitorch.layers.qlinear", "QLinearBase")
_ACTIVATION = ("bitorch.layers.qactivation", "QActivation")
# bitorch's Quantization_Scheduler adds "input_quantization", which no forward calls.
_MODULES = ("weight_quantization", "activation", "input_quantization")


def _name_of(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def held(module: nn.Module) -> nn.Module:
    """Return the module itself, or the layer inside a container of bitorch, which poses as an object of its class."""
    return module if module.__class__ is type(module) else next(module.modules())


def is_bitorch_layer(module: nn.Module) -> bool:
    """Whether the module is bitorch's own QLinear, which computes in float, or of a subclass."""
    return any(_name_of(cls) == _LAYER for cls in type(module).__mro__)


def threshold_of(value: float | None) -> float | None:
    """Return the threshold of a QLinear for that of a layer of bitorch, which cancels nothing if it is not positive."""
    return value if value is not None and value > 0 else None


def reason_against_sharing(layer: Any) -> str:
    """Return the reason why a layer of bitorch cannot become a QLinear that computes the same, or ""."""
    base: Any = next(cls for cls in type(layer).__mro__ if _name_of(cls) == _LAYER)
    overrides = call_overrides(layer) if type(layer).forward is base.forward else ["forward"]
    if overrides:
        return f"{type(layer).__name__} has a {overrides[0]} of its own"
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            return f"its {name} is computed from other tensors: {how_to_free(layer, name)}"
    if _name_of(type(layer.activation)) != _ACTIVATION or call_overrides(layer.activation):
        return f"its activation is a {type(layer.activation).__name__}, which may compute something else"
    for what, module in (("it", layer), ("its activation", layer.activation)):
        if has_hooks(module) or has_state_hooks(module):
            names = ", ".join(hook_names(module)) or "of backward or state_dict"
            return f"{what} has hooks ({names}), which would be lost"
    own = [
        *(name for name in layer._modules if name not in _MODULES),
        *layer._buffers,
        *(name for name in layer._parameters if name not in ("weight", "bias")),
    ]
    if own:
        return f"it holds tensors or modules of its own ({', '.join(own)}), which would be lost"
    return ""


def qlinear_of(layer: Any, cls: type[_Layer] = QLinear) -> _Layer:  # type: ignore[assignment]
    """Make a QLinear that computes what a layer of bitorch computes, and shares all its parts.

    The parameters and quantizations are the layer's own, so that optimizers and schedulers which hold them stay valid.
    The layer is not changed.

    Args:
        layer: A layer for which :func:`reason_against_sharing` has no reason.
        cls: The class of the result.
    """
    new = cls(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        device="meta",
        input_quantization=layer.activation.activation_function,
        weight_quantization=layer.weight_quantization,
    )
    new.activation.gradient_cancellation_threshold = threshold_of(layer.activation.gradient_cancellation_threshold)
    new.weight, new.bias = layer.weight, layer.bias
    # train() would also set the mode of the shared quantizations.
    new.training, new.activation.training = layer.training, layer.activation.training
    for name, value in own_attributes(layer).items():
        new.__dict__.setdefault(name, value)
    return new
