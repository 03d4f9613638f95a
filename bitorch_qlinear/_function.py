"""How autograd Functions are called."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

__all__ = ["apply", "transforms_active"]


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``, without the cost that only torch.func and torch.compile need.

    ``Function.apply`` binds its arguments by inspection (15 to 40 us); the C++ method beneath it takes them as they
    are.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def transforms_active() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which must see a Function, not an operator."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
