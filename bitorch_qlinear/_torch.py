"""The private names of torch that this package uses, each with what serves where a torch lacks it.

No other file of the package has any; ``tests/build/test_private_names.py`` looks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import Function

__all__ = [
    "HAS_AMX",
    "any_autocast",
    "apply",
    "called_from",
    "functorch_active",
    "has_hooks",
    "hook_names",
    "is_dtensor",
    "is_known",
    "is_plain",
    "is_proxy",
    "operator_entry",
    "shares_data",
    "trace_as_leaf",
    "transforms_active",
]

# Whether autocast is on for any device. Without it the caller asks about its own device.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _has_amx() -> bool:
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):
        return False


HAS_AMX: bool = _has_amx()
"""Whether the processor has Intel's tiles, by which its BLAS multiplies bfloat16."""

functorch_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def transforms_active() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which must see a Function, not an operator."""
    return functorch_active() or getattr(forward_ad, "_current_level", 0) >= 0


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``, without the cost that only torch.func and torch.compile need.

    ``Function.apply`` binds its arguments by inspection (15 to 40 us); the C++ method beneath it takes them as they
    are.
    """
    if torch.compiler.is_compiling() or functorch_active() or not hasattr(super(Function, function), "apply"):
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def operator_entry(operator: Any) -> Callable[..., Any]:
    """The dispatcher's own entry beneath an operator's Python object, which adds 0.4 us to look for TorchBind."""
    entry: Callable[..., Any] = getattr(operator, "_op", operator)
    return entry


def has_hooks(module: nn.Module, allowed: Callable[..., Any] | None = None) -> bool:
    """Whether the module has hooks, which a computation past its `forward` would skip.

    Args:
        module: The module.
        allowed: A forward hook that does not count.
    """
    try:
        if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
        forward = module._forward_hooks
    except AttributeError:
        return True
    if forward:
        for hook in forward.values():
            if hook is not allowed:
                return True
    return False


def hook_names(module: nn.Module) -> list[str]:
    """What the module's hooks are called, those of forward and before it."""
    tables = (getattr(module, name, {}) for name in ("_forward_pre_hooks", "_forward_hooks"))
    return [getattr(hook, "__qualname__", type(hook).__name__) for table in tables for hook in table.values()]


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor, without importing its module, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


_PLAIN = {"Tensor", "Parameter", "Buffer", "FakeTensor", "FunctionalTensor"}


def is_plain(tensor: Tensor) -> bool:
    """Whether it is one of torch's own strided tensors, or stands for one while torch traces."""
    cls = type(tensor)
    known = cls is Tensor or (cls.__name__ in _PLAIN and cls.__module__.split(".")[0] == "torch")
    return known and tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for all sizes that a traced program is made for. Adds no guard."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    try:
        from torch.fx.experimental.symbolic_shapes import statically_known_true
    except ImportError:
        return bool(condition)
    return bool(statically_known_true(condition))


def shares_data(tensor: Tensor, other: Tensor) -> bool:
    """Whether ``tensor.data = other`` is possible: it is not from a real device to meta, for example."""
    compatible = getattr(torch, "_has_compatible_shallow_copy_type", lambda *_: False)
    return bool(compatible(tensor, other))


def is_proxy(value: object) -> bool:
    """Whether torch.fx traces with this in a tensor's place."""
    fx = sys.modules.get("torch.fx")
    return fx is not None and isinstance(value, fx.Proxy)


def trace_as_leaf(module: nn.Module, x: Any) -> Any:
    """A call of the module in torch.fx's graph, as of torch's own layers; x is a Proxy."""
    path = x.tracer.path_of_module(module)
    if not path:
        raise TypeError(
            f"root: torch.fx cannot trace a {type(module).__name__} alone: trace a module that holds it, such as "
            "nn.Sequential(layer)."
        )
    return x.tracer.create_proxy("call_module", path, (x,), {})


def called_from(module: str, depth: int = 6) -> bool:
    """Whether a function of this module of torch's is among the nearest callers of the caller."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(depth):
        if frame is None:
            return False
        if str(frame.f_globals.get("__name__")).startswith(module):
            return True
        frame = frame.f_back
    return False
