"""pack() and unpack(), which turn the binary layers of a model into bits and back."""

from __future__ import annotations

import logging
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from ..checkpoint import QUANTIZED_WEIGHT
from ..fused import fuse_sequentials
from ..linear import QLinear
from ..packed import PackedQLinear, weight_rule_of
from .bitorch_layers import is_bitorch_layer, qlinear_of
from .replacement import check_model, replace
from .report import binary_layers, reason_against, tensor_id

__all__ = ["pack", "unpack"]

_Model = TypeVar("_Model", bound=nn.Module)
_logger = logging.getLogger(__name__)


@overload
def pack(model: QLinear, *, inplace: bool = False, fuse: bool = False) -> nn.Module: ...
@overload
def pack(model: _Model, *, inplace: bool = False, fuse: bool = False) -> _Model: ...
def pack(model: nn.Module, *, inplace: bool = False, fuse: bool = False) -> nn.Module:
    """Replace each packable QLinear of a model by a PackedQLinear with the same output, for inference.

    bitorch's own QLinear layers are packed, too, also inside bitorch's containers. A packed layer takes the place of
    its container, and so does every other layer in a copy, because a container cannot be copied.

    :func:`bitorch_qlinear.explain` reports, before or after, which layers are packed and why others are not. The layers
    that are not packed are also logged as a warning. Weights that layers share are packed once and stay shared.

    With ``fuse=True``, each ``nn.Sequential`` that holds packed layers in a row becomes a :class:`FusedSequential`, in
    which they hand each other words instead of floats. The output stays the same, and so do the modules inside,
    their names and the ``state_dict``. Only the order of calls in an ``nn.Sequential`` is known without running the
    model, so layers that a forward of your own calls are not fused: put those that follow each other into an
    ``nn.Sequential``.

    Args:
        model: Any module; it may be a QLinear itself.
        inplace: Replace the layers inside `model` and free their float weights. Otherwise the result is a copy, made
            without copying the float weights of the packed layers.
        fuse: Let packed layers of an ``nn.Sequential`` hand each other words.

    Returns:
        The model, or its copy.

    Raises:
        TypeError: `model` is no nn.Module.
        RuntimeError: The model is wrapped for distributed training, or cannot be copied.
    """
    check_model(model)
    replacements: dict[int, nn.Module] = {}
    shared: dict[Any, Tensor] = {}
    reasons: dict[str, str] = {}
    for path, parent, layer in binary_layers(model):
        if isinstance(layer, PackedQLinear):
            continue
        reason = reason_against(layer, parent, path.rpartition(".")[2])
        if reason:
            reasons[path] = reason
            continue
        source = qlinear_of(layer) if is_bitorch_layer(layer) else layer
        assert isinstance(source, QLinear)
        rule = weight_rule_of(source.weight_quantization)
        key = tensor_id(source, "weight"), id(source.weight_quantization) if rule == QUANTIZED_WEIGHT else rule
        packed = PackedQLinear.from_float(source, shared.get(key))
        shared[key] = packed.weight
        replacements[id(layer)] = packed
    result = replace(model, replacements, inplace, reasons)
    for path, _, layer in binary_layers(result):
        if not isinstance(layer, PackedQLinear):
            reasons.setdefault(path, "the module that holds it does not let it be replaced")
    packed_layers = sum(isinstance(layer, PackedQLinear) for layer in result.modules())
    lines = [f"  {path or '(model)'} stays as it is: {reason}" for path, reason in reasons.items()]
    level = logging.INFO if packed_layers and not reasons else logging.WARNING
    _logger.log(level, "%s", "\n".join([f"packed {packed_layers} of {packed_layers + len(reasons)} QLinear", *lines]))
    if fuse:
        fuse_sequentials(result)
    return result


@overload
def unpack(model: PackedQLinear, *, inplace: bool = False) -> nn.Module: ...
@overload
def unpack(model: _Model, *, inplace: bool = False) -> _Model: ...
def unpack(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace each PackedQLinear of a model by a QLinear with the same output, whose weights are ±1 or, if ternary, 0.

    Args:
        model: Any module; it may be a PackedQLinear itself.
        inplace: Replace the layers inside `model`. Otherwise the result is a copy.

    Returns:
        The model, or its copy.

    Raises:
        TypeError: `model` is no nn.Module.
        RuntimeError: The model is wrapped for distributed training, or cannot be copied.
        ValueError: A layer's output would not be the same: see `PackedQLinear.unpack`.
    """
    check_model(model)
    replacements: dict[int, nn.Module] = {}
    shared: dict[int, nn.Parameter] = {}
    for _, _, layer in binary_layers(model):
        if isinstance(layer, PackedQLinear):
            unpacked = replacements[id(layer)] = layer.unpack()
            weight = unpacked.weight
            assert isinstance(weight, nn.Parameter)
            unpacked.weight = shared.setdefault(id(layer.weight), weight)
    return replace(model, replacements, inplace, {})
