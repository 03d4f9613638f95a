"""pack() and unpack(), which turn the binary layers of a model into bits and back."""

from __future__ import annotations

import copy
import logging
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from ..checkpoint import QUANTIZED_WEIGHT
from ..linear import QLinear
from ..packed import PackedQLinear, weight_rule_of
from .fuse import fuse as fuse_layers
from .report import GATHER, binary_layers, is_fsdp, reason_against

__all__ = ["pack", "unpack"]

_Model = TypeVar("_Model", bound=nn.Module)
_logger = logging.getLogger(__name__)


@overload
def pack(model: QLinear, *, inplace: bool = False, fuse: bool = False) -> nn.Module: ...
@overload
def pack(model: _Model, *, inplace: bool = False, fuse: bool = False) -> _Model: ...
def pack(model: nn.Module, *, inplace: bool = False, fuse: bool = False) -> nn.Module:
    """Replace each packable QLinear of a model by a PackedQLinear with the same output, for inference.

    :func:`bitorch_qlinear.explain` reports, before or after, which layers are packed and why others are not. The layers
    that are not packed are also logged as a warning. Weights that layers share are packed once and stay shared.

    With ``fuse=True`` a packed layer takes over the modules that follow it, up to the sign that the next packed layer
    takes. These modules may be ``BatchNorm1d``, ``Hardtanh``, ``ReLU``, ``ReLU6``, ``LeakyReLU``, ``PReLU``,
    ``Threshold``, ``Dropout``, ``AlphaDropout`` and ``Identity``, and their bits must be a step of the layer's integer
    product. The step is found by evaluating the modules themselves for each value of the product, in the dtype of the
    model, so on the CPU the output of the model stays the same bit for bit. The modules become identities. What cannot
    be fused stays, and ``explain`` tells why. A fused layer has no gradient and refuses
    another dtype than the one in which it was fused.

    torch.fx finds the modules in the model's forward, or else in the parts of the model whose forward it can trace.
    Other uses of the modules, such as by a method that forward does not call, are not seen.

    Args:
        model: Any module; it may be a QLinear itself.
        inplace: Replace the layers inside `model` and free their float weights. Otherwise the result is a copy, made
            without copying the float weights of the packed layers.
        fuse: Fuse the modules between packed layers into these. The model must be in eval mode.

    Returns:
        The model, or its copy.

    Raises:
        TypeError: `model` is no nn.Module.
        RuntimeError: The model is wrapped for distributed training, or cannot be copied.
    """
    _check_model(model)
    replacements: dict[int, nn.Module] = {}
    shared: dict[Any, Tensor] = {}
    reasons: dict[str, str] = {}
    for path, parent, layer in binary_layers(model):
        if not isinstance(layer, QLinear):
            continue
        reason = reason_against(layer, parent, path.rpartition(".")[2])
        if reason:
            reasons[path] = reason
            continue
        rule = weight_rule_of(layer.weight_quantization)
        key = id(layer.weight), id(layer.weight_quantization) if rule == QUANTIZED_WEIGHT else rule
        packed = PackedQLinear.from_float(layer, shared.get(key))
        shared[key] = packed.weight
        replacements[id(layer)] = packed
    result = _replace(model, replacements, inplace, reasons)
    for path, _, layer in binary_layers(result):
        if isinstance(layer, QLinear):
            reasons.setdefault(path, "the module that holds it does not let it be replaced")
    packed_layers = sum(isinstance(layer, PackedQLinear) for layer in result.modules())
    lines = [f"  {path or '(model)'} stays as it is: {reason}" for path, reason in reasons.items()]
    level = logging.INFO if packed_layers and not reasons else logging.WARNING
    _logger.log(level, "%s", "\n".join([f"packed {packed_layers} of {packed_layers + len(reasons)} QLinear", *lines]))
    if fuse:
        against = fuse_layers(result)
        paths = {id(layer): path or "(model)" for path, _, layer in binary_layers(result)}
        lines = [f"  {paths[key]} is not fused: {reason}" for key, reason in against.items() if reason]
        fused = len(against) - len(lines)
        _logger.info("%s", "\n".join([f"fused {fused} of {len(against)} PackedQLinear", *lines]))
    return result


@overload
def unpack(model: PackedQLinear, *, inplace: bool = False) -> nn.Module: ...
@overload
def unpack(model: _Model, *, inplace: bool = False) -> _Model: ...
def unpack(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace each PackedQLinear of a model by a QLinear with the same output, whose weights are ±1.

    Args:
        model: Any module; it may be a PackedQLinear itself.
        inplace: Replace the layers inside `model`. Otherwise the result is a copy.

    Returns:
        The model, or its copy.

    Raises:
        TypeError: `model` is no nn.Module.
        RuntimeError: The model is wrapped for distributed training, cannot be copied, or has fused layers.
    """
    _check_model(model)
    fused = [path or "(model)" for path, _, layer in binary_layers(model) if getattr(layer, "is_fused", False)]
    if fused:
        raise RuntimeError(
            f"model: expected one without fused layers, got {len(fused)} of them ({', '.join(fused):.80}): the modules "
            "that followed them are part of them and cannot be recovered; keep the model from before "
            "pack(model, fuse=True)"
        )
    replacements: dict[int, nn.Module] = {}
    shared: dict[int, nn.Parameter] = {}
    for _, _, layer in binary_layers(model):
        if isinstance(layer, PackedQLinear):
            unpacked = replacements[id(layer)] = layer.unpack()
            weight = unpacked.weight
            assert isinstance(weight, nn.Parameter)
            unpacked.weight = shared.setdefault(id(layer.weight), weight)
    return _replace(model, replacements, inplace, {})


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {model!r:.60}")
    name = type(model).__name__
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise RuntimeError(
            "model: expected the model itself, got one wrapped in DistributedDataParallel, or with such a module "
            "inside: pass model.module, or put the inner module in its wrapper's place"
        )
    if name == "FullyShardedDataParallel" or any(map(is_fsdp, model.modules())):
        raise RuntimeError(f"model: expected whole weights, got a model that FSDP shards: {GATHER}")


def _held(module: nn.Module) -> nn.Module:
    """Return the module itself, or the layer inside a container of bitorch, which poses as its container."""
    return next(module.modules())


def _replace(model: nn.Module, replacements: dict[int, nn.Module], inplace: bool, reasons: dict[str, str]) -> nn.Module:
    """Return the model, or a copy of it, in which the modules with these ids are replaced.

    Args:
        model: The model.
        replacements: The new module for the id of each module to be replaced.
        inplace: Replace in the model itself.
        reasons: Why some layers are not replaced, for the error of a model that cannot be copied.

    Raises:
        RuntimeError: The model cannot be copied.
    """
    places = [
        (parent, name, child, replacements[id(_held(child))])
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None and id(_held(child)) in replacements
    ]
    if inplace:
        for parent, name, _, replacement in places:
            parent.register_module(name, replacement)
        return replacements.get(id(_held(model)), model)
    # deepcopy takes a module that its memo already holds instead of copying the layer.
    memo: dict[int, Any] = {**replacements, **{id(child): replacement for _, _, child, replacement in places}}
    if id(_held(model)) in replacements:
        return replacements[id(_held(model))]
    try:
        copied: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        left = "".join(f"; {path or 'the model'} would stay as it is: {reason}" for path, reason in reasons.items())
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise RuntimeError(f"model: cannot be copied ({said}): inplace=True works on the model itself{left}") from error
    return copied
