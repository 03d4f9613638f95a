"""Registers QLinear with bitorch, so that ``bitorch.convert`` makes its linear layers compute with bits.

Importing this module calls :func:`register`. It needs bitorch 0.4 or later, which this package does not depend on::

    import bitorch_qlinear.bitorch

    bitorch.convert(model, bitorch.RuntimeMode.CPU)

The modes are ``CPU``, ``GPU`` and ``INFERENCE_AUTO``. In these modes ``bitorch.layers.QLinear(...)`` makes this
package's layer, too. Convolutions stay the same. They are registered because bitorch cannot convert a model if one of
its layers has no implementation for the mode.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import warnings
from typing import Any

import torch
from torch import nn

from . import linear
from .convert.bitorch_layers import is_bitorch_layer, qlinear_of, reason_against_sharing, threshold_of
from .packed import PackedQLinear

try:
    from bitorch import RuntimeMode
    from bitorch.layers import QConv1dBase, QConv2dBase, QConv3dBase
    from bitorch.layers.config import config
    from bitorch.layers.extensions import CustomImplementationMixin, LayerImplementation
    from bitorch.layers.register import q_conv1d_registry, q_conv2d_registry, q_conv3d_registry, q_linear_registry
except ImportError as error:
    raise ImportError(f"bitorch_qlinear.bitorch: expected bitorch 0.4 or later to be installed; {error}") from error

__all__ = ["QConv1d", "QConv2d", "QConv3d", "QLinear", "register"]

_MODES = (RuntimeMode.CPU, RuntimeMode.GPU, RuntimeMode.INFERENCE_AUTO)


def _check_version(version: str) -> None:
    numbers = [int(number) for number in re.findall(r"\d+", version)[:2]]
    if numbers < [0, 4]:
        raise ImportError(f"bitorch_qlinear.bitorch: expected bitorch 0.4 or later, got {version}")


with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # bitorch may be a folder that is not installed
    _check_version(importlib.metadata.version("bitorch"))


class QLinear(CustomImplementationMixin, linear.QLinear):
    """A :class:`bitorch_qlinear.QLinear` whose constructor's arguments mean what they mean in bitorch."""

    def __init__(
        self,
        *args: Any,
        input_quantization: str | nn.Module | None = None,
        gradient_cancellation_threshold: float | None = None,
        weight_quantization: str | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Create the layer.

        Args:
            args: As for ``nn.Linear``.
            input_quantization: A name that bitorch knows, a module, or None for the one that bitorch's configuration
                names.
            gradient_cancellation_threshold: Inputs with a larger magnitude get no gradient. None and 0 mean the value
                of bitorch's configuration, and a negative number cancels nothing.
            weight_quantization: The same for the weights.
            kwargs: As for ``nn.Linear``.
        """
        super().__init__(
            *args,
            input_quantization=_quantization(input_quantization or config.input_quantization),
            gradient_cancellation_threshold=threshold_of(
                gradient_cancellation_threshold or config.gradient_cancellation_threshold
            ),
            weight_quantization=_quantization(weight_quantization or config.weight_quantization),
            **kwargs,
        )

    @classmethod
    def can_clone(cls, recipe: Any) -> tuple[bool, str]:
        """Tell bitorch whether :meth:`create_clone_from` can take a layer, and if not, why."""
        layer = recipe.layer.layer_implementation
        if isinstance(layer, (linear.QLinear, PackedQLinear)):
            return True, ""
        if not is_bitorch_layer(layer):
            return False, f"expected bitorch's own QLinear, got {type(layer).__name__}"
        reason = reason_against_sharing(layer)
        return not reason, reason

    @classmethod
    def create_clone_from(cls, recipe: Any, device: torch.device | None = None) -> nn.Module:
        """Return a layer that shares the parameters and quantizations of bitorch's layer. bitorch moves it to `device`.

        This does not read the recipe's arguments, because bitorch does not find a positional ``bias`` among them, and
        because the layer may have changed since it was made.
        """
        layer: nn.Module = recipe.layer.layer_implementation
        return qlinear_of(layer, cls) if is_bitorch_layer(layer) else layer


def _quantization(quantization: str | nn.Module) -> nn.Module:
    """Return a module itself, or the quantization that bitorch knows by a name."""
    if isinstance(quantization, nn.Module):
        return quantization
    found: nn.Module = config.get_quantization_function(quantization)
    return found


class _PassThrough(CustomImplementationMixin):
    """A layer of bitorch that stays the same in the other modes."""

    @classmethod
    def can_clone(cls, recipe: Any) -> tuple[bool, str]:
        """Tell bitorch that any layer can be taken."""
        return True, ""

    @classmethod
    def create_clone_from(cls, recipe: Any, device: torch.device | None = None) -> nn.Module:
        """Return the layer itself."""
        layer: nn.Module = recipe.layer.layer_implementation
        return layer


class QConv1d(_PassThrough, QConv1dBase):
    """bitorch's own QConv1d."""


class QConv2d(_PassThrough, QConv2dBase):
    """bitorch's own QConv2d."""


class QConv3d(_PassThrough, QConv3dBase):
    """bitorch's own QConv3d."""


class _Implementation(LayerImplementation):
    """Registers a class for the modes, and notices other packages' implementations of the same layer.

    It looks for them whenever bitorch asks for an implementation, because they may be registered later.
    """

    def supports_mode(self, mode: Any) -> bool:
        """Whether bitorch may take the class in a mode. It may take a convolution only if no other class supports it.

        bitorch takes the first implementation that it finds in a set, so any of them.
        """
        if mode == RuntimeMode.RAW or not super().supports_mode(mode):
            return False
        others = [other for other in _others(self) if other.supports_mode(mode)]
        if others and issubclass(self.class_, _PassThrough):
            return False
        if others:
            names = " and ".join(f"{other.class_.__module__}.{other.class_.__qualname__}" for other in others)
            warnings.warn(
                f"bitorch takes any of its {len(others) + 1} implementations of QLinear for the mode {mode}, because "
                f"{names} supports it, too: bitorch_qlinear.bitorch.register(exclusive=True) leaves only this "
                "package's",
                RuntimeWarning,
                stacklevel=2,
            )
        return True


def _others(implementation: Any) -> list[Any]:
    """Return the implementations of the same layer by other packages."""
    return [other for other in implementation.registry.layer_implementations if other.class_.__module__ != __name__]


def _implement(registry: Any, cls: type[nn.Module]) -> Any:
    implementation = _Implementation(registry, sum(mode.value for mode in _MODES))
    implementation(cls)
    return implementation


_implementations = [
    _implement(q_linear_registry, QLinear),
    _implement(q_conv1d_registry, QConv1d),
    _implement(q_conv2d_registry, QConv2d),
    _implement(q_conv3d_registry, QConv3d),
]


def register(*, exclusive: bool = False) -> None:
    """Register this module's layers with bitorch. Importing the module does this; a second time changes nothing.

    A call is needed after bitorch has forgotten its implementations (``unregister_custom_implementations``), and for
    `exclusive`.

    Args:
        exclusive: Take the modes CPU, GPU and INFERENCE_AUTO from the implementations of QLinear that other packages,
            such as bitorch-engine, have registered until now. Otherwise bitorch takes any of them for a layer, and a
            warning says so. Convolutions are left to the other packages in either case.
    """
    for implementation in _implementations:
        registered = implementation.registry.layer_implementations
        # Another import of this module, as importlib.reload makes one, has left implementations of the same layers.
        registered -= {other for other in registered if other.class_.__module__ == __name__}
        registered.add(implementation)
    if exclusive:
        for other in _others(_implementations[0]):
            left = [
                mode for mode in RuntimeMode if mode not in (*_MODES, RuntimeMode.RAW) and other.supports_mode(mode)
            ]
            other._supported_modes = sum(mode.value for mode in left)
            if not left:  # for bitorch, no mode is RAW, which every implementation supports
                q_linear_registry.layer_implementations.discard(other)


register()
