"""The private names of torch that this package uses, each with a fallback for a torch that lacks it.

No other file of the package uses one, as ``tests/build/test_private_names.py`` checks.
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
    "CALL_HOOKS",
    "HAS_AMX",
    "MODULE_CALLS",
    "any_autocast",
    "any_function_mode",
    "any_global_hook",
    "any_hooks",
    "apply",
    "call_overrides",
    "called_from",
    "does_more",
    "functorch_active",
    "has_hooks",
    "has_own_call",
    "has_state_hooks",
    "hook_names",
    "is_dtensor",
    "is_fsdp",
    "is_known",
    "is_plain",
    "is_proxy",
    "modes_active",
    "operator_entry",
    "own_attributes",
    "shares_data",
    "trace_as_leaf",
    "transforms_active",
]

# Tells whether autocast is on for any device. The fallback makes the caller ask about its own device.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _has_amx() -> bool:
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):
        return False


HAS_AMX: bool = _has_amx()
"""Whether the processor has Intel's matrix tiles, which its BLAS uses for bfloat16."""

functorch_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
any_function_mode: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 2)
"""Returns how many modes see torch's functions, also that of ``torch.set_default_device``."""

_is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: True)


def _is_default_device() -> bool:
    """Whether the only mode that sees functions is the one of ``torch.set_default_device`` or ``torch.device``."""
    try:
        mode = torch._C._get_function_stack_at(0)
    except AttributeError:
        return False
    return type(mode).__name__ == "DeviceContext" and type(mode).__module__ == "torch.utils._device"


def transforms_active() -> bool:
    """Whether torch.func or forward-mode differentiation is active; they need an autograd Function, not an operator."""
    return functorch_active() or getattr(forward_ad, "_current_level", 0) >= 0


def apply(function: type[Function], *args: Any) -> Any:
    """Return ``function.apply(*args)``, without a cost that only torch.func and torch.compile need.

    ``Function.apply`` binds its arguments by inspection (15 to 40 us). The C++ method that it calls does not.
    """
    if torch.compiler.is_compiling() or functorch_active() or not hasattr(super(Function, function), "apply"):
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def operator_entry(operator: Any) -> Callable[..., Any]:
    """Return the dispatcher's function that an operator's Python object calls after looking for TorchBind (0.4 us)."""
    entry: Callable[..., Any] = getattr(operator, "_op", operator)
    return entry


def has_hooks(module: nn.Module, allowed: Callable[..., Any] | None = None) -> bool:
    """Whether the module has hooks, which a computation that does not call the module would skip.

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


def has_own_call(module: nn.Module, allowed: Callable[..., Any] | None = None) -> bool:
    """Whether a call of the module does more than its class's forward: by hooks, or by a forward set on the object.

    Args:
        module: The module.
        allowed: A forward hook that does not count.
    """
    own = module.__dict__
    return "forward" in own or "_call_impl" in own or has_hooks(module, allowed)


CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The tables of a module's hooks that run in a call of it."""


def any_hooks(modules: list[nn.Module]) -> bool:
    """Whether one of these modules has hooks."""
    # One expression is twice as fast as has_hooks for each module.
    return any(
        [m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules]
    )


any_global_hook: Callable[[], Any] = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)
"""Whether hooks are registered for the calls of all modules."""


MODULE_CALLS = tuple(name for name in ("__call__", "_call_impl") if hasattr(nn.Module, name))
"""The functions of nn.Module that lead from a call of a module to its forward."""


def call_overrides(module: nn.Module, *methods: str) -> list[str]:
    """Return the names of what replaces the way from a call of the module to its class's forward.

    These are functions of `MODULE_CALLS` that its class overrides, and methods that are set on the object itself.

    Args:
        module: The module.
        methods: Names of further methods, which decide about the values, to be found on the object.
    """
    by_class = [name for name in MODULE_CALLS if getattr(type(module), name) is not getattr(nn.Module, name)]
    return by_class + [name for name in ("forward", *MODULE_CALLS[1:], *methods) if name in module.__dict__]


def modes_active() -> bool:
    """Whether a mode sees, and may change, what torch's functions or operators compute.

    The mode of ``torch.set_default_device`` does not count: it changes only where new tensors are made.
    """
    if _dispatch_modes():
        return True
    functions = any_function_mode()
    return bool(functions) and (functions > 1 or not _is_default_device())


def does_more() -> bool:
    """Whether torch does more in an eager call now than to compute an output.

    It may cast for autocast, transform, show a mode what is computed, call hooks of all modules, or trace. The mode of
    ``torch.set_default_device`` does not count: it changes only where new tensors are made.
    """
    # One expression, because each function in Python costs 0.1 us, and 2 us if its code is in no cache.
    return bool(
        any_autocast()
        or functorch_active()
        or getattr(forward_ad, "_current_level", 0) >= 0
        or _dispatch_modes()
        or ((functions := any_function_mode()) and (functions > 1 or not _is_default_device()))
        or any_global_hook()
        or _is_tracing()
    )


def has_state_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks on ``state_dict`` or ``load_state_dict``."""
    tables = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    return any(getattr(module, table, None) for table in tables)


def hook_names(module: nn.Module) -> list[str]:
    """Return the names of the module's forward pre-hooks and forward hooks."""
    tables = (getattr(module, name, {}) for name in ("_forward_pre_hooks", "_forward_hooks"))
    return [getattr(hook, "__qualname__", type(hook).__name__) for table in tables for hook in table.values()]


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """Return what is kept on the module as attributes, except a compiled call, which a copy of a module loses too."""
    return {name: value for name, value in module.__dict__.items() if name != "_compiled_call_impl"}


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 shards the module, which gives it a class of its own with the same forward."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor; the module that defines DTensor is not imported, which would take half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


_PLAIN = {"Tensor", "Parameter", "Buffer", "FakeTensor", "FunctionalTensor"}


def is_plain(tensor: Tensor) -> bool:
    """Whether it is one of torch's own strided tensors, or represents one while torch traces."""
    cls = type(tensor)
    known = cls is Tensor or (cls.__name__ in _PLAIN and cls.__module__.split(".")[0] == "torch")
    return known and tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for all sizes of a traced program; it adds no guard."""
    if not torch.compiler.is_compiling():
        return bool(condition)
    try:
        from torch.fx.experimental.symbolic_shapes import statically_known_true
    except ImportError:
        return bool(condition)
    return bool(statically_known_true(condition))


def shares_data(tensor: Tensor, other: Tensor) -> bool:
    """Whether ``tensor.data = other`` is possible; between a real device and meta, for example, it is not."""
    compatible = getattr(torch, "_has_compatible_shallow_copy_type", lambda *_: False)
    return bool(compatible(tensor, other))


def is_proxy(value: object) -> bool:
    """Whether this is a Proxy, with which torch.fx traces instead of a tensor."""
    fx = sys.modules.get("torch.fx")
    return fx is not None and isinstance(value, fx.Proxy)


def trace_as_leaf(module: nn.Module, x: Any) -> Any:
    """Record a call of the module in torch.fx's graph, as torch.fx does for torch's own layers.

    Args:
        module: The layer.
        x: Its input, a Proxy.

    Raises:
        TypeError: The module is the root of the trace.
    """
    path = x.tracer.path_of_module(module)
    if not path:
        raise TypeError(
            f"root: torch.fx cannot trace a {type(module).__name__} alone: trace a module that holds it, such as "
            "nn.Sequential(layer)."
        )
    return x.tracer.create_proxy("call_module", path, (x,), {})


def called_from(module: str, depth: int = 6) -> bool:
    """Whether a function of this module, or of one below it, is among the nearest callers of the caller.

    Args:
        module: The beginning of the module's name.
        depth: Number of callers that are looked at.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(depth):
        if frame is None:
            return False
        if str(frame.f_globals.get("__name__")).startswith(module):
            return True
        frame = frame.f_back
    return False
