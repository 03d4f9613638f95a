"""What pack(), unpack() and binarize() share: checks of a model, and the exchange of modules inside it or a copy."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .._torch import is_fsdp
from .bitorch_layers import held
from .report import GATHER

__all__ = ["check_model", "copy_model", "replace"]


def check_model(model: nn.Module, instead: str = GATHER) -> None:
    """Check that a model can be converted.

    Args:
        model: The model.
        instead: What to do with a model that FSDP shards, for the error.

    Raises:
        TypeError: It is no nn.Module.
        RuntimeError: It is wrapped for distributed training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {model!r:.60}")
    name = type(model).__name__
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise RuntimeError(
            "model: expected the model itself, got one wrapped in DistributedDataParallel, or with such a module "
            "inside: pass model.module, or put the inner module in its wrapper's place"
        )
    if name == "FullyShardedDataParallel" or any(map(is_fsdp, model.modules())):
        raise RuntimeError(f"model: expected whole weights, got a model that FSDP shards: {instead}")


def replace(model: nn.Module, replacements: dict[int, nn.Module], inplace: bool, reasons: dict[str, str]) -> nn.Module:
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
        (parent, name, child, replacements[id(held(child))])
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None and id(held(child)) in replacements
    ]
    if inplace:
        for parent, name, child, replacement in places:
            parent.register_module(name, replacement)
            _keep_in_container(child, replacement)
        if id(held(model)) in replacements:
            replacement = replacements[id(held(model))]
            _keep_in_container(model, replacement)
            return replacement
        return model
    # deepcopy takes a module that its memo already holds instead of copying the layer.
    memo: dict[int, Any] = {**replacements, **{id(child): replacement for _, _, child, replacement in places}}
    if id(held(model)) in replacements:
        return replacements[id(held(model))]
    return copy_model(model, memo, reasons)


def _keep_in_container(child: Any, replacement: nn.Module) -> None:
    """Put the replacement into a container of bitorch, too. bitorch keeps all containers, and so the layers in them."""
    if hasattr(type(child), "replace_layer_implementation"):
        child.replace_layer_implementation(replacement)


def copy_model(model: nn.Module, memo: dict[int, Any], reasons: dict[str, str]) -> nn.Module:
    """Return a deep copy of a model.

    bitorch's containers cannot be copied. In the copy, the layers themselves have their places.

    Args:
        model: The model.
        memo: deepcopy's memo: what takes the place of the object with this id in the copy.
        reasons: Why some layers are not replaced, for the error.

    Raises:
        RuntimeError: The model cannot be copied.
    """
    try:
        # A container may be inside another one. The inner one comes later among the modules and must be copied first.
        for module in reversed(list(model.modules())):
            for child in module._modules.values():
                if child is not None and held(child) is not child and id(child) not in memo:
                    memo[id(child)] = copy.deepcopy(held(child), memo)
        copied: nn.Module = copy.deepcopy(held(model), memo)
    except Exception as error:
        left = "".join(f"; {path or 'the model'} would stay as it is: {reason}" for path, reason in reasons.items())
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise RuntimeError(f"model: cannot be copied ({said}): inplace=True works on the model itself{left}") from error
    return copied
