"""QLinear: a linear layer with binarized input and weight, for training and inference."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _library, functional
from ._function import transforms_active
from .autograd import Rules, binary_linear, tables_win
from .cache import PackedWeight, WeightCache
from .quantizations import (
    binary_rule,
    cancel_gradient,
    get_quantization,
    has_constant_rule,
    hook_tables,
    is_identity,
)

__all__ = ["QLinear"]

# Looked up once: a name in a module of a module costs 20 ns at every call.
_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_any_autocast = torch._C._is_any_autocast_enabled

_linear: Callable[..., Tensor] = torch.ops.bitorch_qlinear.linear
# The dispatcher's own entry beneath the Python object, which adds 0.4 us to look for TorchBind arguments.
_linear_entry: Callable[..., Tensor] = getattr(_linear, "_op", _linear)


def has_kernels(tensor: Tensor) -> bool:
    """Whether the operators have kernels (or, for meta, shapes) for this tensor; others compute in float.

    A DTensor's device has them, but the operators have no rules for sharding. It is known by name, for importing its
    module takes half a second.
    """
    on_device = tensor.is_cpu or tensor.is_meta or (_library.has_cuda and tensor.is_cuda)
    return on_device and (type(tensor) is Tensor or type(tensor).__name__ != "DTensor")


def path_name(weight: Tensor) -> str:
    """For a layer's repr: what computes a packed product on this tensor's device."""
    if weight.is_cuda:
        return "packed (CUDA)" if has_kernels(weight) else f"float (no kernels for cuda: {_library.no_cuda_reason})"
    if not has_kernels(weight):
        return f"float (no kernels for {weight.device.type})"
    return f"packed ({_library.active_kernel()})"


def _check_threshold(threshold: float | None) -> float | None:
    if threshold is not None and not isinstance(threshold, (int, float)):
        raise TypeError(f"gradient_cancellation_threshold: expected None or a number, got {threshold!r}")
    if threshold is not None and (math.isnan(threshold) or threshold < 0):
        raise ValueError(f"gradient_cancellation_threshold: expected None or a number >= 0, got {threshold}")
    return threshold


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants of a linear layer's output, as of ``nn.Linear``'s; None for that of x."""
    if _any_autocast() and x.dtype is not torch.float64:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def fused_linear(
    x: Tensor,
    words: Tensor,
    k: int,
    bias: Tensor | None,
    prepared: Tensor | None,
    strict: bool,
    compiling: bool,
) -> Tensor:
    """``functional.linear`` in autocast's dtype. An argument that is left out costs nothing, one given 0.3 us."""
    operator = _linear if compiling else _linear_entry
    out_dtype = autocast_dtype(x) if _any_autocast() else None  # which asks again: without autocast a Python call less
    if strict or out_dtype is not None:
        return operator(x, words, k, bias, weight_prepared=prepared, out_dtype=out_dtype, strict=strict)
    return operator(x, words, k, bias, weight_prepared=prepared)


_warned_of_packing = False


@torch.compiler.assume_constant_result
def _warn_packing_per_call() -> None:
    global _warned_of_packing
    if _warned_of_packing:
        return
    _warned_of_packing = True
    warnings.warn(
        "bitorch_qlinear: a compiled QLinear in eval mode packs its weights in every call; use "
        "bitorch_qlinear.pack(model) before torch.compile (or inductor's freezing) to pack them once.",
        stacklevel=1,
    )


class Activation(nn.Module):
    """The input's quantization behind the gradient cancellation; named as in bitorch, so that state dicts agree.

    Attributes:
        activation_function: The quantization.
        gradient_cancellation_threshold: The threshold, or None.
    """

    def __init__(self, activation_function: nn.Module, threshold: float | None) -> None:
        """Join the two.

        Args:
            activation_function: The quantization.
            threshold: The gradient is zero where not ``|x| <= threshold``; None or 0 cancels nothing.

        Raises:
            ValueError: The threshold is negative or NaN.
        """
        super().__init__()
        self.activation_function = activation_function
        self.gradient_cancellation_threshold = _check_threshold(threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x in float."""
        quantized: Tensor = self.activation_function(cancel_gradient(x, self.gradient_cancellation_threshold))
        return quantized


class _Plan(NamedTuple):
    """The rules found for a layer's modules, and what they were found from."""

    activation: nn.Module
    input_quantization: nn.Module
    weight_quantization: nn.Module
    hooks: list[Mapping[int, Any]]
    rules: Rules


class QLinear(nn.Linear):
    """``y = q(x) · q(W)ᵀ + b`` with quantized input and weight, bitorch's ``QLinear`` with packed kernels.

    Where both quantizations are sign-like (sign, approxsign, swishsign, steheaviside; progressive_sign in eval mode)
    and the device has kernels, the product is computed exactly by XNOR-popcount over packed bits; everything else
    computes in float with the same interface. ``repr`` says which. (In inference on the CPU an ``identity`` input meets
    sign-like weights packed too: a sum of floats, in another order than ``F.linear``'s, several times faster.)

    With two sign-like factors and T = float64 for a float64 output and float32 otherwise,
    ``y = cast(T(integer product) + T(bias))``. The output's dtype is that of x, or autocast's.

    Gradients are the straight-through estimator's (https://arxiv.org/abs/1602.02830), with the derivative of the
    quantization where it has one, and zero for inputs with ``|x| > gradient_cancellation_threshold``.

    In eval mode the packed weights are cached until the weight changes. Writes through ``.data`` or a NumPy view are
    noticed where they change most of the matrix; after others call :meth:`repack`.

    Attributes:
        in_features: K.
        out_features: N.
        weight: Shape ``(N, K)``, real-valued.
        bias: Shape ``(N,)`` or None.
    """

    def __init__(
        self,
        *args: Any,
        input_quantization: str | nn.Module | None = None,
        gradient_cancellation_threshold: float | None = None,
        weight_quantization: str | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Create the layer with ``nn.Linear``'s initialisation.

        Args:
            *args: Positional arguments of ``nn.Linear``: in_features, out_features, bias, device, dtype.
            input_quantization: A name (see :func:`bitorch_qlinear.quantization_names`), a module, or None for sign.
            gradient_cancellation_threshold: None or 0 cancels nothing. (bitorch 0.4.1 documents the same, but takes
                its configuration's 1.0 for both.)
            weight_quantization: As `input_quantization`.
            **kwargs: Keyword arguments of ``nn.Linear``.

        Raises:
            ValueError: An unknown name, or a negative or NaN threshold.
            TypeError: A quantization that is neither name nor module.
        """
        super().__init__(*args, **kwargs)
        self.weight_quantization = get_quantization(weight_quantization, "weight_quantization")
        self.activation = Activation(
            get_quantization(input_quantization, "input_quantization"), gradient_cancellation_threshold
        )
        self._cache = WeightCache()
        self._plan: _Plan | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, **quantization: Any) -> QLinear:
        """A QLinear that shares the parameters of an ``nn.Linear``.

        Args:
            linear: The layer; its weight and bias become those of the result (the same Parameters).
            **quantization: ``input_quantization``, ``weight_quantization``, ``gradient_cancellation_threshold``.

        Raises:
            TypeError: `linear` is no nn.Linear.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta", **quantization
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    @property
    def input_quantization(self) -> nn.Module:
        """The quantization of the input."""
        return self.activation.activation_function

    @property
    def gradient_cancellation_threshold(self) -> float | None:
        """The threshold of the gradient cancellation, or None."""
        return self.activation.gradient_cancellation_threshold

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: Shape ``(..., K)``, any strides.

        Returns:
            Shape ``(..., N)``.

        Raises:
            RuntimeError: A wrong shape or dtype of x; double backward; forward-mode differentiation
                (NotImplementedError).
        """
        compiling = _compiling()
        rules = self._packed_rules(compiling)
        if rules is None or not has_kernels(x):
            if rules is None and not self.training and not compiling and self._multiplies_signs(x):
                return self._multiply_signs(x)
            return F.linear(self.activation(x), self.weight_quantization(self.weight), self.bias)
        # By way of the dictionary, where all but parametrized ones are: nn.Module's attribute access costs 0.5 us.
        parameters = self._parameters
        weight: Any = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias: Any = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        if self.training or compiling:
            words, prepared = self._pack_anew(weight, rules.weight.strict, compiling)
        else:
            words, prepared = self._cache.get(weight, rules.weight.strict)
        wanted = _grad_enabled() and wants_gradient(x, weight, bias)
        if wanted or (not compiling and transforms_active()):
            threshold = self.activation.gradient_cancellation_threshold
            return binary_linear(x, weight, bias, words, prepared, rules, threshold, autocast_dtype(x))
        return fused_linear(x, words, self.in_features, bias, prepared, rules.input.strict, compiling)

    def _multiplies_signs(self, x: Tensor) -> bool:
        """Whether inference leaves x real and takes packed sign weights, on the CPU, where that is faster."""
        weight, bias = self.weight, self.bias
        activation = self.activation
        return (
            x.is_cpu
            and x.dim() > 0
            and x.shape[-1] == self.in_features
            and tables_win(x, self.out_features)
            and type(activation) is Activation
            and not any(hook_tables(activation))
            and is_identity(activation.activation_function)
            and binary_rule(self.weight_quantization) is not None
            and all(t.dtype is x.dtype and t.is_cpu and has_kernels(t) for t in (x, weight, bias) if t is not None)
            and autocast_dtype(x) is None
            and not (torch.is_grad_enabled() and wants_gradient(x, weight, bias))
            and not transforms_active()
        )

    def _multiply_signs(self, x: Tensor) -> Tensor:
        rule = binary_rule(self.weight_quantization)
        assert rule is not None
        words = self._cache.get(self.weight, rule.strict).words
        y = functional.multiply_signs(x, words, self.in_features, transpose=True)
        return y if self.bias is None else y.add_(self.bias)

    def _packed_rules(self, compiling: bool = False) -> Rules | None:
        """The rules of input and weight, or None where the packed path does not compute them."""
        modules: dict[str, Any] = self._modules
        activation, weight_quantization = modules["activation"], modules["weight_quantization"]
        # A compiled graph that looked at the plan would be compiled anew once an eager call has made one.
        plan = None if compiling else self._plan
        if plan is not None:
            activation_then, input_then, weight_then, hooks, rules = plan  # at once, for less than by name
            if (
                activation is activation_then
                and activation._modules["activation_function"] is input_then
                and weight_quantization is weight_then
                and not any(hooks)
            ):
                return rules
        if type(activation) is not Activation or any(hook_tables(activation)):
            return None
        input_quantization = activation.activation_function
        input_rule, weight_rule = binary_rule(input_quantization), binary_rule(weight_quantization)
        if input_rule is None or weight_rule is None:
            return None
        rules = Rules(input_rule, weight_rule)
        # Remembered only where nothing but hooks can change a rule.
        constant = has_constant_rule(input_quantization) and has_constant_rule(weight_quantization)
        if constant and not compiling:
            watched = (activation, input_quantization, weight_quantization)
            hooks = [table for module in watched for table in hook_tables(module)]
            self._plan = _Plan(activation, input_quantization, weight_quantization, hooks, rules)
        return rules

    def _pack_anew(self, weight: Tensor, strict: bool, compiling: bool) -> PackedWeight:
        """The packed weights in training, and in a compiled graph, which packs them at every call."""
        words = functional.pack_bits(weight.detach(), strict)
        if self.training:
            return PackedWeight(words, None)
        _warn_packing_per_call()
        # The product would prepare them too, but out of sight of inductor's freezing, which computes both once.
        layout = None  # an exported program runs elsewhere, with the kernel that it finds there
        if not torch.compiler.is_exporting():
            layout = _library.CUDA_LAYOUT if words.is_cuda else _library.cpu_layout
        return PackedWeight(words, functional.prepare_weight(words, self.in_features, layout=layout))

    def repack(self) -> None:
        """Forget the packed weights, so that the next forward packs them: after writes that torch cannot notice."""
        self._cache.clear()

    def train(self, mode: bool = True) -> QLinear:
        """Set the mode, and forget the packed weights."""
        self._cache.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> QLinear:
        self._cache.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is found again at the next forward."""
        return {**self.__dict__, "_plan": None}

    def extra_repr(self) -> str:
        """Sizes, quantizations, threshold, and which path computes them."""
        return (
            f"{super().extra_repr()}, input_quantization={self.input_quantization!r}, "
            f"weight_quantization={self.weight_quantization!r}, "
            f"gradient_cancellation_threshold={self.gradient_cancellation_threshold}, path={self._path()}"
        )

    def __repr__(self) -> str:
        """One line: the quantizations are part of the layer, not layers below it."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def _path(self) -> str:
        return "float" if self._packed_rules() is None else path_name(self.weight)


def wants_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a backward may follow, where gradients are enabled."""
    return x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
