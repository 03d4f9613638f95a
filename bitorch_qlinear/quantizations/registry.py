"""The quantizations by name."""

from typing import TypeVar

from torch import nn

from .base import Identity
from .dorefa import InputDoReFa, WeightDoReFa
from .progressive_sign import ProgressiveSign
from .sign_family import ApproxSign, Sign, SteHeaviside, SwishSign
from .ternary import Ternary

__all__ = ["get_quantization", "quantization_names", "register_quantization"]

_Class = TypeVar("_Class", bound=type[nn.Module])

_classes: dict[str, type[nn.Module]] = {}


def register_quantization(cls: _Class, *, replace: bool = False) -> _Class:
    """Make a quantization known by its `name`; usable as a decorator.

    Args:
        cls: A subclass of nn.Module whose constructor needs no argument, with the class attribute `name`.
        replace: Allow a name that another class has; the name then means `cls`.

    Returns:
        `cls`.

    Raises:
        TypeError: `cls` is not a subclass of nn.Module.
        ValueError: Its name is missing, empty, not a str, or taken.
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
    """Return the names that `get_quantization` knows, sorted."""
    return sorted(_classes)


def get_quantization(quantization: str | nn.Module | None, argument: str = "quantization") -> nn.Module:
    """Return the module that a name, a module or None means.

    Args:
        quantization: A name gives a new instance of the registered class, a module is returned itself, and None gives
            a new `Sign`.
        argument: How error messages call the quantization.

    Raises:
        ValueError: The name is unknown.
        TypeError: The argument is neither a name nor a module nor None.
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


for _cls in (Sign, ApproxSign, SwishSign, SteHeaviside, ProgressiveSign, Identity, InputDoReFa, WeightDoReFa, Ternary):
    register_quantization(_cls)
