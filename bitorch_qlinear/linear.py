"""QLinear: a linear layer with binarized input and weight, for training and inference."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _kernels, _library, functional, quantizations
from ._product import (
    apply_to_no_tensor,
    apply_to_values,
    differentiable,
    has_kernels,
    is_differentiated,
    raise_of_dtype,
    real_linear,
    sign_linear,
    tables_win,
    wants_gradient,
)
from ._torch import called_from, has_hooks, is_dtensor, is_plain
from .checkpoint import problem_of_words_in_float
from .quantizations import BinaryRule, binary_rule, cancel_gradient, get_quantization, is_identity

__all__ = ["QLinear"]

# Looked up once: a name in a module of a module costs 20 ns at every call.
_compiling = torch.compiler.is_compiling

# In a call with at most so many rows and at least so many weights, packing the weights takes most of the time: with
# more rows the product does, with fewer weights the call itself.
_FEW_ROWS = 32
_MANY_WEIGHTS = 1 << 17

_warned_of_packing = False


def _warn_of_packing(rows: int) -> None:
    """Say once a process that a model whose weights no longer change is faster when it is packed."""
    global _warned_of_packing
    if _warned_of_packing or not 0 < rows <= _FEW_ROWS:
        return
    _warned_of_packing = True
    warnings.warn(
        "bitorch_qlinear: a QLinear packs its weights in every call, which takes most of the time of a call with "
        f"{rows} row{'s' * (rows != 1)}: for inference, bitorch_qlinear.pack(model) packs them once.",
        stacklevel=6,  # the caller of the module: two frames are this file's, and forward and two of nn.Module follow
    )


def path_name(weight: Tensor) -> str:
    """What computes a binary product on this tensor's device, for a layer's repr."""
    if is_dtensor(weight):
        return "float (sharded weights; packed where FSDP2 has gathered them)"
    if weight.is_cuda:
        return "packed (CUDA)" if has_kernels(weight) else f"float (no kernels for cuda: {_library.no_cuda_reason})"
    if not has_kernels(weight):
        return f"float (no kernels for {weight.device.type})"
    return f"packed ({_kernels.active_kernel()})"


def _check_threshold(threshold: float | None) -> float | None:
    if threshold is not None and not isinstance(threshold, (int, float)):
        raise TypeError(f"gradient_cancellation_threshold: expected None or a number, got {threshold!r}")
    if threshold is not None and (math.isnan(threshold) or threshold < 0):
        raise ValueError(f"gradient_cancellation_threshold: expected None or a number >= 0, got {threshold}")
    return threshold


def _how_to_free(linear: nn.Linear, name: str) -> str:
    """What makes a computed weight or bias a parameter of its own again, in words."""
    if nn.utils.parametrize.is_parametrized(linear, name):
        return f"call torch.nn.utils.parametrize.remove_parametrizations(linear, {name!r}) first"
    if f"{name}_orig" in linear._parameters and f"{name}_mask" in linear._buffers:
        return f"call torch.nn.utils.prune.remove(linear, {name!r}) first"
    for norm, parameter in (("weight_norm", f"{name}_g"), ("spectral_norm", f"{name}_orig")):
        if parameter in linear._parameters:
            return f"call torch.nn.utils.remove_{norm}(linear, {name!r}) first"
    return f"got {type(getattr(linear, name, None)).__name__}"


def do_nothing(module: nn.Module, args: Any, output: Any) -> None:
    """A hook on the activation.

    ``nn.TransformerEncoderLayer`` has a fast path for inference that reads its linear layers' weights itself, and never
    calls the layers. It leaves that path where any module inside has a forward hook. The activation itself is called in
    the float path alone, so that the hook costs a packed call nothing.
    """


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
        self.register_forward_hook(do_nothing)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x in float."""
        quantized: Tensor = self.activation_function(cancel_gradient(x, self.gradient_cancellation_threshold))
        return quantized


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

    The layer keeps nothing: every forward packs the weights that it finds. :func:`bitorch_qlinear.pack` makes layers
    that hold packed weights, for fast inference.

    Attributes:
        in_features: K.
        out_features: N.
        weight: Shape ``(N, K)``, real-valued.
        bias: Shape ``(N,)`` or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_quantization: str | nn.Module | None = None,
        gradient_cancellation_threshold: float | None = None,
        weight_quantization: str | nn.Module | None = None,
    ) -> None:
        """Create the layer with ``nn.Linear``'s initialisation.

        Args:
            in_features: K.
            out_features: N.
            bias: Whether there is a bias.
            device: Where the parameters are.
            dtype: Of the parameters.
            input_quantization: A name (see :func:`bitorch_qlinear.quantization_names`), a module, or None for sign.
            gradient_cancellation_threshold: Inputs with a larger magnitude get no gradient. 1.0 is what trains well,
                and what bitorch 0.4.1's code applies. None or 0 cancels nothing, as bitorch documents it: the gradient
                then flows through inputs whose sign no step will change, which costs accuracy (53 % against 71 % on a
                task of 54 features and 7 classes, with Adam at 1e-3).
            weight_quantization: As `input_quantization`.

        Raises:
            ValueError: An unknown name, or a negative or NaN threshold.
            TypeError: A quantization that is neither name nor module.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight_quantization = get_quantization(weight_quantization, "weight_quantization")
        self.activation = Activation(
            get_quantization(input_quantization, "input_quantization"), gradient_cancellation_threshold
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        input_quantization: str | nn.Module | None = None,
        gradient_cancellation_threshold: float | None = None,
        weight_quantization: str | nn.Module | None = None,
    ) -> QLinear:
        """A QLinear that shares the parameters of an ``nn.Linear``.

        Args:
            linear: The layer; its weight and bias become those of the result (the same Parameters).
            input_quantization: As for the constructor.
            gradient_cancellation_threshold: As for the constructor.
            weight_quantization: As for the constructor.

        Raises:
            TypeError: `linear` is no nn.Linear, or is binary already.
            ValueError: Its weight or bias is no parameter of its own, but computed of others.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        if isinstance(linear, QLinear) or hasattr(linear, "weight_quantization"):
            raise TypeError(
                f"linear: expected a layer of real weights, got {type(linear).__name__}, which is binary already: "
                "build a QLinear with its quantizations and threshold, and load its state_dict"
            )
        for name in ("weight", "bias"):
            if name not in linear._parameters:
                raise ValueError(f"linear: expected a {name} that is a parameter; {_how_to_free(linear, name)}")
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device="meta",
            input_quantization=input_quantization,
            gradient_cancellation_threshold=gradient_cancellation_threshold,
            weight_quantization=weight_quantization,
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
            x: Shape ``(..., K)``, any strides. Of a nested or sparse tensor it is the values that count.

        Returns:
            Shape ``(..., N)``.

        Raises:
            TypeError: x is no tensor, or the weight is of a class that the operators do not know.
            RuntimeError: A wrong shape or dtype of x; double backward; forward-mode differentiation
                (NotImplementedError).
        """
        if not isinstance(x, Tensor):
            return apply_to_no_tensor(self, x)  # type: ignore[unreachable]
        # nn.Module.__getattr__ costs 0.5 us; parametrized tensors are not in the dictionary.
        parameters: dict[str, Any] = self._parameters
        weight: Any = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias: Any = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        rules = self._rules()
        if rules is None or not has_kernels(x) or not has_kernels(weight):
            return self._in_float(x, weight, bias, rules)
        if not (self.training or _compiling() or _warned_of_packing) and weight.numel() >= _MANY_WEIGHTS:
            self._consider_warning(x, weight, bias)
        try:
            if not is_differentiated(x, weight, bias):
                return sign_linear(x, weight, bias, rules[0].strict, rules[1].strict)
            words = functional.pack_bits(weight.detach(), rules[1].strict)
            threshold = self.activation.gradient_cancellation_threshold
            return differentiable(x, weight, bias, words, None, weight.shape[1], rules, threshold)
        except NotImplementedError:
            if _compiling() or (is_plain(x) and is_plain(weight)):
                raise
            return self._in_float(x, weight, bias, rules)
        except RuntimeError as error:
            raise_of_dtype(x, error)
            raise

    def _rules(self) -> tuple[BinaryRule, BinaryRule] | None:
        """The rules of input and weight, or None where the packed path does not compute them."""
        modules: dict[str, Any] = self._modules
        activation = modules["activation"]
        if type(activation) is not Activation or has_hooks(activation, do_nothing):
            return None
        parts: dict[str, Any] = activation._modules
        input_rule = binary_rule(parts["activation_function"])
        weight_rule = binary_rule(modules["weight_quantization"])
        return None if input_rule is None or weight_rule is None else (input_rule, weight_rule)

    def _consider_warning(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if is_plain(x) and x.dim() > 0 and x.shape[-1] and not wants_gradient(x, weight, bias):
            _warn_of_packing(x.numel() // x.shape[-1])

    # ---- what is not the packed product ----

    def _in_float(self, x: Tensor, weight: Tensor, bias: Tensor | None, rules: object) -> Tensor:
        """The same values by torch's own operators, for tensors and quantizations without kernels."""
        if x.is_nested or x.is_quantized or x.layout is not torch.strided:
            return apply_to_values(self, x)
        if rules is None and self._multiplies_signs(x, weight, bias):
            return self._multiply_signs(x, weight, bias)
        try:
            return F.linear(self.activation(x), self.weight_quantization(weight), bias)
        except NotImplementedError as error:
            if is_plain(weight):
                raise
            raise TypeError(
                f"weight: expected a plain tensor, got {type(weight).__name__}, of which torch has no signs: leave "
                "QLinear layers out of what replaced it, such as torchao's quantize_ (by its filter_fn)."
            ) from error

    def _multiplies_signs(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether inference leaves x real and takes packed sign weights, on the CPU, where that is faster."""
        activation = self.activation
        return (
            not self.training
            and not _compiling()
            and x.is_cpu
            and x.dim() > 0
            and x.shape[-1] == weight.shape[1]
            and tables_win(x, weight.shape[0])
            and type(activation) is Activation
            and not has_hooks(activation, do_nothing)
            and is_identity(activation.activation_function)
            and binary_rule(self.weight_quantization) is not None
            and all(t.dtype is x.dtype and t.is_cpu and is_plain(t) for t in (x, weight, bias) if t is not None)
            and not is_differentiated(x, weight, bias)
        )

    def _multiply_signs(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rule = binary_rule(self.weight_quantization)
        assert rule is not None
        words = functional.pack_bits(weight.detach(), rule.strict)
        return real_linear(x, words, weight.shape[1], bias)

    # ---- state ----

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What ``copy.deepcopy`` and pickle ask for.

        Raises:
            TypeError: The copy is for ``fuse_linear_bn_eval``, which scales weights whose signs alone would count.
        """
        if called_from("torch.nn.utils.fusion"):
            raise TypeError(
                "linear: fuse_linear_bn_eval cannot take a QLinear, because of scaled weights the signs alone count: "
                "keep the batch norm."
            )
        return super().__reduce_ex__(protocol)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Set a parameter.

        Raises:
            TypeError: It is one that torch's tensor-parallel styles made.
        """
        if param is not None and is_dtensor(param) and called_from("torch.distributed.tensor.parallel"):
            raise TypeError(
                "module: torch's tensor-parallel styles cannot take a QLinear, whose product has no rules for sharded "
                "weights: leave it out of the plan."
            )
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        problem = problem_of_words_in_float(prefix, state_dict)
        if problem:
            args[-1].append(problem)  # error_msgs
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Sizes, quantizations, threshold, and which path computes them."""
        return (
            f"{super().extra_repr()}, input_quantization={self.input_quantization!r}, "
            f"weight_quantization={self.weight_quantization!r}, "
            f"gradient_cancellation_threshold={self.gradient_cancellation_threshold}, path={self.path}"
        )

    def __repr__(self) -> str:
        """One line: the quantizations are part of the layer, not layers below it."""
        return f"{type(self).__name__}({self.extra_repr()})"

    @property
    def path(self) -> str:
        """What computes the layer's output, in words."""
        if self._rules() is not None:
            return path_name(self.weight)
        real = type(self.activation) is Activation and is_identity(self.activation.activation_function)
        if real and not self.training and binary_rule(self.weight_quantization) and self.weight.is_cpu:
            return "packed weights, real input (in inference, where that is faster; else float)"
        return "float"


def safe_globals() -> list[Any]:
    """What ``torch.load(weights_only=True)`` may build of a pickled layer: the layer, its activation, quantizations."""
    classes = [getattr(quantizations, name) for name in quantizations.__all__]
    return [
        QLinear,
        Activation,
        do_nothing,
        *(each for each in classes if isinstance(each, type) and issubclass(each, nn.Module)),
    ]
