"""QLinear: a linear layer with binarized input and weight, for training and inference."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _kernels, _library, functional, quantizations
from ._inputs import FLOATS, apply_to_no_tensor, apply_to_values, has_other_layout, raise_of_dtype
from ._product import (
    autocast_dtype,
    has_kernels,
    is_differentiated,
    level_linear,
    real_linear,
    scaled_in_float,
    sign_linear,
    ternary_in_float,
    ternary_linear,
    ternary_scale,
    ternary_words,
    train_linear,
    wants_gradient,
)
from ._sign_gemm import beats_blas
from ._torch import call_overrides, called_from, has_hooks, has_own_call, hook_names, is_dtensor, is_fsdp, is_plain
from .checkpoint import (
    problem_of_lost_scale,
    problem_of_scale_in_float,
    problem_of_words_in_float,
    record_scale,
)
from .quantizations import (
    BinaryRule,
    Ternary,
    binary_rule,
    cancel_gradient,
    get_quantization,
    guard,
    is_identity,
    is_ternary,
    kept_means,
    level_bits,
    mean_magnitude,
    mean_scale,
    own_scale,
    quantize,
    scaled_rule,
)
from .quantizations.ternary import all_finite, is_eager, scale_values

__all__ = ["QLinear"]

WeightScale = Literal["mean", "learned"]

# Looked up once, because a name in a module of a module costs 20 ns in every call.
_compiling = torch.compiler.is_compiling

# Packing the weights takes most of the time of a call with at most this many rows and at least this many weights. With
# more rows the product takes most of it, and with fewer weights the call itself.
_FEW_ROWS = 32
_MANY_WEIGHTS = 1 << 17

_warned_of_packing = False


def _warn_of_packing(rows: int) -> None:
    """Warn, once in a process, that a model whose weights no longer change is faster when it is packed."""
    global _warned_of_packing
    if _warned_of_packing or not 0 < rows <= _FEW_ROWS:
        return
    _warned_of_packing = True
    warnings.warn(
        "bitorch_qlinear: a QLinear packs its weights in every call, which takes most of the time of a call with "
        f"{rows} row{'s' * (rows != 1)}: for inference, bitorch_qlinear.pack(model) packs them once.",
        # The caller of the module is behind this function, _consider_warning, forward, and two functions of nn.Module.
        stacklevel=6,
    )


def path_name(weight: Tensor) -> str:
    """Return what computes a binary product with this weight on its device, in words, for a layer's repr."""
    if is_dtensor(weight):
        return "float (sharded weights; packed once FSDP2 has gathered them)"
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


def check_weight_scale(weight_scale: WeightScale | None, quantization: nn.Module) -> WeightScale | None:
    """Return the kind of scale.

    Args:
        weight_scale: The argument of a layer.
        quantization: The layer's weight quantization.

    Raises:
        ValueError: There is no such scale, or the quantization has a scale of its own.
    """
    if weight_scale is not None and weight_scale not in get_args(WeightScale):
        raise ValueError(f"weight_scale: expected None, 'mean' or 'learned', got {weight_scale!r}")
    if weight_scale is not None and scaled_rule(quantization) is not None:
        raise ValueError(
            f"weight_scale: expected None, because {type(quantization).__name__} has a scale of its own; "
            f"got {weight_scale!r}"
        )
    return weight_scale


def how_to_free(linear: nn.Linear, name: str) -> str:
    """Return the step that makes a computed weight or bias a parameter of its own again, in words."""
    if nn.utils.parametrize.is_parametrized(linear, name):
        return f"call torch.nn.utils.parametrize.remove_parametrizations(linear, {name!r}) first"
    if f"{name}_orig" in linear._parameters and f"{name}_mask" in linear._buffers:
        return f"call torch.nn.utils.prune.remove(linear, {name!r}) first"
    for norm, parameter in (("weight_norm", f"{name}_g"), ("spectral_norm", f"{name}_orig")):
        if parameter in linear._parameters:
            return f"call torch.nn.utils.remove_{norm}(linear, {name!r}) first"
    return f"got {type(getattr(linear, name, None)).__name__}"


def do_nothing(module: nn.Module, args: Any, output: Any) -> None:
    """Serve as the forward hook on every activation, which keeps ``nn.TransformerEncoderLayer`` off its fast path.

    That path, for inference, reads the weights of its linear layers itself and never calls the layers; a forward hook
    on any module inside disables it. Only the float path calls the activation, so the hook costs a packed call nothing.
    """


class Activation(nn.Module):
    """Gradient cancellation followed by the input's quantization; named as in bitorch, so that state dicts agree.

    Attributes:
        activation_function: The quantization.
        gradient_cancellation_threshold: The gradient is 0 unless ``|x| <= threshold``; None and 0 cancel nothing.
    """

    def __init__(self, activation_function: nn.Module, threshold: float | None) -> None:
        """Keep the quantization and the threshold.

        Raises:
            TypeError: The threshold is no number.
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


def is_plain_activation(activation: nn.Module) -> bool:
    """Whether a call of a layer's activation cancels gradients and calls the quantization, and does nothing else."""
    return type(activation) is Activation and not has_own_call(activation, do_nothing)


class QLinear(nn.Linear):
    """``y = q(x) · q(W)ᵀ + b`` with quantized input and weight: bitorch's ``QLinear`` with packed kernels.

    If both quantizations are sign-like (sign, approxsign, swishsign, steheaviside; progressive_sign in eval mode) and
    the device has kernels, the product is computed exactly by XNOR and popcount on packed bits. All other cases compute
    in float, with the same interface; ``repr`` says which path is taken. (In inference on the CPU the weights are also
    packed if they are sign-like and the input is ``identity``. This is several times faster than ``F.linear``, and adds
    the floats in another order. With a sign-like input, ``ternary`` weights are computed with bits in inference, and
    exactly in both modes.)

    With two sign-like factors, or a sign-like input and ternary weights, let T be float64 for a float64 output and
    float32 otherwise. Then ``y = cast(T(integer product) + T(bias))``. The output's dtype is that of x, or autocast's.

    ``weight_scale`` multiplies the quantized weights of each output channel by a factor α, as XNOR-Net
    (https://arxiv.org/abs/1603.05279) does: ``y = cast(T(integer product) · T(α) + T(bias))``. With "mean", α is the
    mean of ``|w|`` over the channel's weights, computed in float64 for float64 weights and in float32 for all others,
    in training and in eval mode; with ternary weights it is the mean over those that do not become 0. With "learned", α
    is a parameter, ``scale``, which begins as that mean.

    Gradients are those of the straight-through estimator (https://arxiv.org/abs/1602.02830), times the derivative of
    the quantization if it has one, and zero for inputs with ``|x| > gradient_cancellation_threshold``. With a scale,
    G for dL/d(α · s(W)) and ``dL/dα = Σ_k G · s(W)``, they are ``dL/dW = α · G + s(W) / K · dL/dα`` for "mean" and
    ``dL/dW = α · G`` for "learned", where the weight quantization's derivative or limit applies to ``α · G`` alone.
    This is the chain rule as the reference implementation applies it (github.com/jiecaoyu/XNOR-Net-PyTorch,
    ``updateBinaryGradWeight``), without its constant factor K - 1. Its mask ``|w| <= 1`` is that of a
    ``"steheaviside"`` weight quantization. Ternary weights have the gradients of their own paper
    (:class:`.quantizations.Ternary`).

    The layer caches nothing: every forward packs the present weights. :func:`bitorch_qlinear.pack` makes layers that
    hold packed weights, for fast inference.

    Attributes:
        in_features: The number of inputs, K.
        out_features: The number of outputs, N.
        weight: Shape ``(N, K)``, real-valued.
        bias: Shape ``(N,)`` or None.
        scale: Shape ``(N,)``; only with a learned scale.
        weight_scale: None, "mean" or "learned".
    """

    weight_scale: WeightScale | None = None
    scale: Tensor

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
        weight_scale: WeightScale | None = None,
    ) -> None:
        """Create the layer with ``nn.Linear``'s initialisation.

        Args:
            in_features: The number of inputs, K.
            out_features: The number of outputs, N.
            bias: Whether the layer has a bias.
            device: Device of the parameters.
            dtype: Dtype of the parameters.
            input_quantization: A name (see :func:`bitorch_qlinear.quantization_names`), a module, or None for sign.
            gradient_cancellation_threshold: Inputs with a larger magnitude get no gradient. 1.0 trains well, and is the
                value that bitorch 0.4.1's code applies. None and 0 cancel nothing, as bitorch documents it: the
                gradient then flows through inputs whose sign no step will change, which costs accuracy (64.7 %
                against 83.7 % on generated data of 54 features and 7 classes, with Adam at 1e-3: docs/training.md).
            weight_quantization: A name, a module, or None for sign.
            weight_scale: The factor of each output channel's quantized weights: None for none, "mean" for the mean
                magnitude of the channel's weights (if they are ternary, of those that do not become 0), or "learned"
                for a parameter.

        Raises:
            ValueError: A name or a kind of scale is unknown, the threshold is negative or NaN, or a scale is given
                although the weight quantization has one of its own.
            TypeError: A quantization is neither a name nor a module, or the threshold is no number.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight_quantization = get_quantization(weight_quantization, "weight_quantization")
        self.activation = Activation(
            get_quantization(input_quantization, "input_quantization"), gradient_cancellation_threshold
        )
        self.weight_scale = check_weight_scale(weight_scale, self.weight_quantization)
        if weight_scale == "learned":
            self.scale = nn.Parameter(mean_scale(self.weight_quantization, self.weight).to(self.weight.dtype))

    def reset_parameters(self) -> None:
        """Initialise the weight and the bias as ``nn.Linear`` does, and a learned scale by the weight's magnitudes."""
        super().reset_parameters()
        if self.weight_scale == "learned":
            with torch.no_grad():
                self.scale.copy_(mean_scale(self.weight_quantization, self.weight))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        input_quantization: str | nn.Module | None = None,
        gradient_cancellation_threshold: float | None = None,
        weight_quantization: str | nn.Module | None = None,
        weight_scale: WeightScale | None = None,
    ) -> QLinear:
        """Make a QLinear that shares the parameters of an ``nn.Linear``.

        The quantizations, the threshold and the scale are those of the constructor. A learned scale is a new parameter,
        which begins as the mean magnitudes of the layer's weight.

        Args:
            linear: The layer. Its weight and bias, the same Parameters, become those of the result.

        Raises:
            TypeError: `linear` is no nn.Linear, or it is already binary.
            ValueError: Its weight or bias is not a parameter but computed from others.
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
                raise ValueError(f"linear: expected a {name} that is a parameter; {how_to_free(linear, name)}")
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device="meta",
            input_quantization=input_quantization,
            gradient_cancellation_threshold=gradient_cancellation_threshold,
            weight_quantization=weight_quantization,
            weight_scale=weight_scale,
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        if weight_scale == "learned":
            layer.scale = nn.Parameter(mean_scale(layer.weight_quantization, linear.weight).to(linear.weight.dtype))
        return layer.train(linear.training)

    @property
    def input_quantization(self) -> nn.Module:
        """The quantization of the input."""
        return self.activation.activation_function

    @property
    def gradient_cancellation_threshold(self) -> float | None:
        """The magnitude beyond which inputs get no gradient, or None."""
        return self.activation.gradient_cancellation_threshold

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output.

        Args:
            x: Shape ``(..., K)``, any strides. A nested, quantized or sparse tensor is replaced by its values.

        Returns:
            Shape ``(..., N)``.

        Raises:
            TypeError: x is no tensor, or the weight has a class that the operators do not know.
            RuntimeError: x has a wrong shape or dtype. A second backward raises it too.
            NotImplementedError: Forward-mode differentiation.
        """
        if not isinstance(x, Tensor):
            return apply_to_no_tensor(self, x)  # type: ignore[unreachable]
        # nn.Module.__getattr__ costs 0.5 us. A parametrized tensor is not in the dictionary.
        parameters: dict[str, Any] = self._parameters
        weight: Any = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias: Any = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        compiling = _compiling()
        rules = self._rules(compiling)
        if rules is None or not has_kernels(x) or not has_kernels(weight):
            return self._in_float(x, weight, bias, rules)
        if not (self.training or compiling or _warned_of_packing) and weight.numel() >= _MANY_WEIGHTS:
            self._consider_warning(x, weight, bias)
        try:
            scale = self._scale(weight)
            if not is_differentiated(x, weight, bias, scale):
                return sign_linear(x, weight, bias, rules[0].strict, rules[1].strict, scale)
            threshold = self.activation.gradient_cancellation_threshold
            return train_linear(x, weight, bias, rules, threshold, scale, self.weight_scale == "mean")
        except NotImplementedError:
            if compiling or (is_plain(x) and is_plain(weight)):
                raise
            return self._in_float(x, weight, bias, rules)
        except RuntimeError as error:
            raise_of_dtype(x, error)
            raise

    def _rules(self, compiling: bool = False) -> tuple[BinaryRule, BinaryRule] | None:
        """Return the rules of input and weight, or None if the packed path cannot compute both of them.

        Args:
            compiling: Whether torch traces the call, so that the graph must depend on what the answer depends on.
        """
        modules: dict[str, Any] = self._modules
        activation = modules["activation"]
        if not is_plain_activation(activation):
            return None
        parts: dict[str, Any] = activation._modules
        if compiling:
            for module in (activation, parts["activation_function"], modules["weight_quantization"]):
                guard(module)
        input_rule = binary_rule(parts["activation_function"])
        # Most weights need only binary_rule, which costs less than a call of _weight_rule.
        weight_rule = binary_rule(modules["weight_quantization"]) or self._weight_rule()
        return None if input_rule is None or weight_rule is None else (input_rule, weight_rule)

    def _weight_rule(self) -> BinaryRule | None:
        """Return the rule of the weights' signs, or None if they are not signs, times a scale or not."""
        quantization: Any = self._modules["weight_quantization"]
        rule = binary_rule(quantization)
        return scaled_rule(quantization) if rule is None and self.weight_scale is None else rule

    def _scale(self, weight: Tensor) -> Tensor | None:
        """Return the scale of the signs, or None; with `weight_scale` "mean" it has no gradient."""
        if self.weight_scale is None:
            return own_scale(self._modules["weight_quantization"], weight)  # type: ignore[arg-type]
        if self.weight_scale == "mean":
            return mean_scale(self._modules["weight_quantization"], weight)  # type: ignore[arg-type]
        parameters: dict[str, Any] = self._parameters
        return parameters["scale"] if "scale" in parameters else self.scale  # noqa: SIM401

    def channel_scale(self) -> Tensor | None:
        """Return the present scale of each output channel, shape ``(N,)``, in float32 or float64; None without one."""
        with torch.inference_mode(False), torch.no_grad():
            scale = self._scale(self.weight.detach())
            return (
                None if scale is None else scale.detach().to(torch.promote_types(scale.dtype, torch.float32), copy=True)
            )

    def _consider_warning(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if is_plain(x) and x.dim() > 0 and x.shape[-1] and not wants_gradient(x, weight, bias):
            _warn_of_packing(x.numel() // x.shape[-1])

    # ---- the float path ----

    def _in_float(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rules: tuple[BinaryRule, BinaryRule] | None
    ) -> Tensor:
        """Compute the same product by torch's own operators, for tensors and quantizations without kernels."""
        if has_other_layout(x):
            return apply_to_values(self, x)
        if rules is None and self._takes_sign_gemm(x, weight, bias):
            return self._sign_gemm(x, weight, bias)
        if rules is None and (bits := self._level_bits()) is not None and self._takes_levels(x, weight, bias):
            return self._levels(x, weight, bias, bits)
        try:
            if rules is None and is_ternary(self.weight_quantization) and (rule := self._input_sign_rule()) is not None:
                return self._ternary(x, weight, bias, rule)
            if rules is not None and (self.weight_scale or scaled_rule(self.weight_quantization)):
                return self._signs_in_float(x, weight, bias, rules[1])
            quantized = self.weight_quantization(weight)
            if self.weight_scale == "mean" and isinstance(self.weight_quantization, Ternary):
                quantized = scale_values(quantized, kept_means(weight))
            elif self.weight_scale is not None:
                rule = self._weight_rule()
                strict = rule is not None and rule.strict
                scale = mean_magnitude(weight, strict) if self.weight_scale == "mean" else self.scale
                quantized = quantized * scale.to(quantized.dtype).unsqueeze(-1)
            return F.linear(self.activation(x), quantized, bias)
        except NotImplementedError as error:
            if is_plain(weight):
                raise
            raise TypeError(
                f"weight: expected a plain tensor, got {type(weight).__name__}, whose signs torch cannot take: exclude "
                "QLinear layers from whatever replaced the weight, such as torchao's quantize_ (by its filter_fn)."
            ) from error

    def _signs_in_float(self, x: Tensor, weight: Tensor, bias: Tensor | None, rule: BinaryRule) -> Tensor:
        """Compute the output of a layer with two sign-like factors and a scale: the values of the kernels."""
        scale = mean_magnitude(weight, rule.strict) if self.weight_scale == "mean" else self._scale(weight)
        signs = quantize(weight, rule.signs, rule)
        return scaled_in_float(self.activation(x), signs, scale, bias, autocast_dtype(x) or x.dtype)

    def _takes_sign_gemm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether x stays real, the weights are signs, and packing them makes this inference on the CPU faster."""
        activation = self.activation
        return (
            not self.training
            and not _compiling()
            and x.is_cpu
            and x.dim() > 0
            and x.shape[-1] == weight.shape[1]
            and beats_blas(x, weight.shape[0])
            and is_plain_activation(activation)
            and is_identity(activation.activation_function)
            and self._weight_rule() is not None
            and all(t.dtype is x.dtype and t.is_cpu and is_plain(t) for t in (x, weight, bias) if t is not None)
            and not is_differentiated(x, weight, bias)
        )

    def _sign_gemm(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the output from real x and packed weights."""
        rule = self._weight_rule()
        assert rule is not None
        words = functional.pack_bits(weight.detach(), rule.strict)
        return real_linear(x, words, weight.shape[1], bias, scale=self._scale(weight))

    def _level_bits(self) -> int | None:
        """Return the bits of the levels to which the packed path can round x in inference, or None."""
        activation = self.activation
        if self.training or not is_plain_activation(activation):
            return None
        return None if self._weight_rule() is None else level_bits(activation.activation_function)

    def _takes_levels(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the operator for levels takes these tensors, and no gradient is needed."""
        return (
            not x.is_cuda
            and not weight.is_cuda
            and all(
                t.dtype in FLOATS and has_kernels(t) and (_compiling() or is_plain(t))
                for t in (x, weight, bias)
                if t is not None
            )
            and x.dim() > 0
            and x.shape[-1] == weight.shape[1]
            and not is_differentiated(x, weight, bias, self._scale(weight))
        )

    def _levels(self, x: Tensor, weight: Tensor, bias: Tensor | None, bits: int) -> Tensor:
        """Compute the output from x that is rounded to levels and packed weights."""
        if not (_compiling() or _warned_of_packing) and weight.numel() >= _MANY_WEIGHTS:
            self._consider_warning(x, weight, bias)
        rule = self._weight_rule()
        assert rule is not None
        words = functional.pack_bits(weight, rule.strict)
        return level_linear(x, words, weight.shape[1], bias, None, bits, self._scale(weight))

    def _input_sign_rule(self) -> BinaryRule | None:
        """Return the rule of the input's signs, or None if it has another quantization or hooks."""
        activation = self.activation
        return binary_rule(activation.activation_function) if is_plain_activation(activation) else None

    def _ternary(self, x: Tensor, weight: Tensor, bias: Tensor | None, rule: BinaryRule) -> Tensor:
        """Compute the output from the signs of x and ternary weights: by bits if no gradient is needed."""
        if x.dtype not in FLOATS:
            raise_of_dtype(x)
        if not x.dim() or x.shape[-1] != weight.shape[1]:
            raise RuntimeError(f"x: expected shape (..., {weight.shape[1]}), got {tuple(x.shape)}")
        mean = self.weight_scale == "mean"
        scale = None if mean else self._scale(weight)
        if self._takes_ternary(x, weight, bias, scale):
            if not (_compiling() or _warned_of_packing) and weight.numel() >= _MANY_WEIGHTS:
                self._consider_warning(x, weight, bias)
            words, limits, means = ternary_words(weight, mean)
            scale = means if mean else scale
            if not is_eager(limits):
                scale = ternary_scale(limits, scale)
            if not is_eager(limits) or all_finite(limits):
                return ternary_linear(x, words, weight.shape[1], bias, None, rule, scale)
        values = self.weight_quantization(weight)
        dtype = autocast_dtype(x) or x.dtype
        scale = kept_means(weight) if mean else scale
        return ternary_in_float(self.activation(x), values, scale, bias, dtype, mean)

    def _takes_ternary(self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> bool:
        """Whether the kernels take these tensors, and no gradient is needed."""
        return all(
            has_kernels(t) and (_compiling() or is_plain(t)) for t in (x, weight, bias) if t is not None
        ) and not is_differentiated(x, weight, bias, scale)

    # ---- state ----

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what ``copy.deepcopy`` and pickle need.

        Raises:
            TypeError: The copy is for ``fuse_linear_bn_eval``, which scales the weights; only their signs are used.
        """
        if called_from("torch.nn.utils.fusion"):
            raise TypeError(
                "linear: fuse_linear_bn_eval cannot take a QLinear, because it scales the weights, of which only the "
                "signs are used: keep the batch norm."
            )
        return super().__reduce_ex__(protocol)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as nn.Module does.

        Raises:
            TypeError: torch's tensor-parallel styles have sharded it.
        """
        if param is not None and is_dtensor(param) and called_from("torch.distributed.tensor.parallel"):
            raise TypeError(
                "module: torch's tensor-parallel styles cannot take a QLinear, whose product has no rules for sharded "
                "weights: leave it out of the plan."
            )
        super().register_parameter(name, param)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_scale is not None:
            record_scale(prefix, destination, self.weight_scale)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A subclass may have a parameter or buffer of this name for something else.
        has_scale = "scale" in self._parameters or "scale" in self._buffers
        learned = has_scale and self.weight_scale == "learned"
        problem = problem_of_words_in_float(prefix, state_dict)
        problem = problem or problem_of_scale_in_float(prefix, state_dict, has_scale, learned)
        problem = problem or problem_of_lost_scale(prefix, state_dict, args[0], self.weight_scale is not None)
        if problem:
            args[-1].append(problem)  # error_msgs
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return sizes, quantizations, threshold, and the path that computes them."""
        return (
            f"{super().extra_repr()}, input_quantization={self.input_quantization!r}, "
            f"weight_quantization={self.weight_quantization!r}, "
            f"gradient_cancellation_threshold={self.gradient_cancellation_threshold}, "
            f"{'' if self.weight_scale is None else f'weight_scale={self.weight_scale!r}, '}path={self.path}"
        )

    def __repr__(self) -> str:
        """Return one line, because the quantizations are part of the layer and not layers inside it."""
        return f"{type(self).__name__}({self.extra_repr()})"

    @property
    def path(self) -> str:
        """What computes the layer's output, in words; for float computation with the reason."""
        if self._rules() is not None:
            return path_name(self.weight)
        real = is_plain_activation(self.activation) and is_identity(self.activation.activation_function)
        if real and not self.training and self._weight_rule() and self.weight.is_cpu:
            return "packed weights, real input (in inference, if that is faster; else float)"
        if is_ternary(self.weight_quantization) and self._input_sign_rule() and has_kernels(self.weight):
            return "packed, ternary weights (in inference; else float)"
        bits = self._level_bits()
        if bits is not None and self.weight.is_cpu:
            return f"packed weights, {bits}-bit input (in inference; else float)"
        return "float"


def reason_of_call(layer: QLinear) -> str:
    """Return what a call of the layer does that a packed layer would not do, or "" if nothing.

    The quantizations are not looked at.
    """
    overrides = call_overrides(layer)
    if type(layer).forward is not QLinear.forward and not is_fsdp(layer):
        overrides = ["forward"]
    if overrides:
        return f"{type(layer).__name__} has a {overrides[0]} of its own"
    if has_hooks(layer):
        return f"it has hooks ({', '.join(hook_names(layer)) or 'of backward'}), which packing would lose"
    activation = layer.activation
    if type(activation) is not Activation:
        return f"its activation is a {type(activation).__name__}, which may compute something else"
    if overrides := call_overrides(activation):
        return f"its activation has a {overrides[0]} of its own"
    return "its activation has hooks" if has_hooks(activation, do_nothing) else ""


def safe_globals() -> list[Any]:
    """Return what ``torch.load(weights_only=True)`` may build: QLinear, its activation and the quantizations."""
    classes = [getattr(quantizations, name) for name in quantizations.__all__]
    return [
        QLinear,
        Activation,
        do_nothing,
        *(each for each in classes if isinstance(each, type) and issubclass(each, nn.Module)),
    ]
