"""PackedQLinear: a QLinear reduced to its bits, for inference."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _library, functional
from ._inputs import apply_to_no_tensor, apply_to_values, has_other_layout, raise_of_dtype
from ._product import (
    autocast_dtype,
    differentiable_linear,
    has_kernels,
    is_differentiated,
    level_linear,
    levels_in_float,
    packed_linear,
    real_linear,
    scaled,
    scaled_in_float,
    ternary_in_float,
    ternary_linear,
    ternary_words,
)
from ._torch import call_overrides, called_from, functorch_active, has_hooks, is_plain, shares_data
from .checkpoint import (
    INPUT_RULES,
    LEVEL_INPUTS,
    QUANTIZED_WEIGHT,
    REAL_INPUT,
    SIGN_INPUTS,
    STRICT_INPUT,
    TERNARY_WEIGHT,
    format_of,
    problem_of_lost_scale,
    problem_of_packed,
    word_rows,
    words_for,
)
from .linear import Activation, QLinear, WeightScale, check_weight_scale, path_name, reason_of_call
from .quantizations import (
    BinaryRule,
    Sign,
    Ternary,
    additions,
    binary_rule,
    cancel_gradient,
    depends_on_mode,
    get_quantization,
    is_identity,
    is_ternary,
    level_bits,
    mean_scale,
    own_scale,
    quantize,
    scaled_rule,
)
from .quantizations.ternary import all_finite

__all__ = ["PackedQLinear"]

# Looked up once, because a name in a module of a module costs 20 ns in every call.
_compiling = torch.compiler.is_compiling

_SIGN = BinaryRule()
# An operator prepares this many words in the time that it takes to pass it their form (0.3 us) and to compare the two.
FEW_WORDS = 1024


def described(quantization: nn.Module) -> str:
    """Return the quantization's repr, and in words the mode and the additions that decide about its values."""
    return f"{quantization!r}{' in training mode' if quantization.training else ''}{additions(quantization)}"


def input_rule_of(quantization: nn.Module) -> int:
    """Return the index in `checkpoint.INPUT_RULES` of the rule by which a packed layer treats its input.

    Raises:
        ValueError: The quantization is neither sign-like nor the identity nor inputdorefa of 1 or 2 bits.
    """
    if is_identity(quantization):
        return REAL_INPUT
    bits = level_bits(quantization)
    if bits is not None:
        return LEVEL_INPUTS[bits]
    rule = binary_rule(quantization)
    if rule is None:
        raise ValueError(
            "input_quantization: expected a sign-like quantization, identity, or inputdorefa of 1 or 2 bits, got "
            f"{described(quantization)}"
        )
    return int(rule.strict)


def weight_rule_of(quantization: nn.Module) -> int:
    """Return the index in `checkpoint.WEIGHT_RULES` of the rule by which float weights become a packed layer's bits."""
    if is_ternary(quantization):
        return TERNARY_WEIGHT
    rule = binary_rule(quantization) or scaled_rule(quantization)
    return QUANTIZED_WEIGHT if rule is None else int(rule.strict)


def check_rules(input_rule: int, weight_rule: int) -> None:
    """Check that a packed layer can have these rules.

    Raises:
        ValueError: The weights are ternary and the input is not signs.
    """
    if weight_rule == TERNARY_WEIGHT and input_rule not in SIGN_INPUTS:
        raise ValueError(
            "input_quantization: expected a sign-like quantization with ternary weights, got one that gives "
            f"{INPUT_RULES[input_rule]}"
        )


def pack_weight(weight: Tensor, quantization: nn.Module) -> Tensor:
    """Return the words of the quantized weights, on the weights' device; without kernels there, the CPU packs them.

    Raises:
        ValueError: The quantization gives other values than ±1, and declares no scale; or it is ternary, and gives NaN.
    """
    with torch.inference_mode(False), torch.no_grad():
        values, strict = weight.detach(), False
        if is_ternary(quantization):
            words, limits, _ = ternary_words(values)
            if not limits.is_meta and not all_finite(limits):
                row = int(limits.isfinite().logical_not().flatten().nonzero()[0])
                raise ValueError(
                    "weight: expected finite values whose magnitudes have a finite sum, because others become NaN if "
                    f"they are made ternary; row {row} has such values"
                )
            return words
        rule = binary_rule(quantization) or scaled_rule(quantization)
        if rule is not None:
            strict = rule.strict
        else:
            values = quantization(values)
            if not values.is_meta and not bool((values.abs() == 1).all()):
                raise ValueError(
                    "weight_quantization: expected one whose values are +1 and -1, got "
                    f"{described(quantization)}, which gives others"
                )
        device = values.device if has_kernels(values) else torch.device("cpu")
        return functional.pack_bits(values.to(device), strict).to(weight.device)


class PackedQLinear(nn.Module):
    """``y = s(x) · Wᵀ + b`` with W kept as bits, for inference: what a trained :class:`QLinear` computes.

    If the weights have a scale α for each output channel, ``y = (s(x) · Wᵀ) · α + b``. The scale stays in float32 or
    float64 when the layer's dtype changes (``half()``, ``to(torch.bfloat16)``), so that a layer made from weights of a
    half type keeps the exact scale.

    ``state_dict`` holds ``weight`` (packed words), ``bias``, ``scale``, ``k`` and the meaning of the words (see
    :mod:`bitorch_qlinear.checkpoint`); it takes 1/32 of the bytes of float32 weights. In memory the layer takes as much
    again if the CPU kernel reads a prepared form. Loading checks all entries; a float ``state_dict`` (of a QLinear or
    ``nn.Linear``) is packed while it loads.

    ``input_quantization`` gives the gradient, but the layer does not call it: the values of x are those that
    ``input_rule`` names, even if the quantization is exchanged or gets hooks or methods of its own later.

    The words may be written in any way, at any time, because the operator compares them with their form in every call.

    With an ``identity`` input quantization x stays real: ``y = x · Wᵀ + b``. With ``inputdorefa`` of 1 or 2 bits x is
    rounded to levels from 0 to 1 (:func:`bitorch_qlinear.functional.dorefa_linear`). With a sign-like one, W may be
    ternary (:class:`.quantizations.Ternary`): its words are two signs for each weight, 2/32 of the bytes of float32.

    Gradients flow to x and to the bias, as through the QLinear with frozen weights.

    Attributes:
        in_features: The number of inputs, K.
        out_features: The number of outputs, N.
        weight: int32 words of shape ``(N, ceil(K / 32))``, see :mod:`bitorch_qlinear.functional`; with ternary weights
            of shape ``(2N, ceil(K / 32))``, see :mod:`bitorch_qlinear.checkpoint`.
        bias: Shape ``(N,)`` or None; a frozen Parameter.
        scale: Shape ``(N,)`` or None; a buffer of float32 or float64.
        weight_scale: None, "mean" or "learned": how a float ``state_dict`` gives the scale.
        k: K as a 0-dim int64 tensor, for the checkpoint, as are ``format``, ``input_rule`` and ``weight_rule``.
        weight_prepared: The prepared form of the words for the active CPU kernel, or None. It is not in the checkpoint.
    """

    weight: Tensor
    bias: nn.Parameter | None
    k: Tensor
    format: Tensor
    input_rule: Tensor
    weight_rule: Tensor
    weight_prepared: Tensor | None
    scale: Tensor | None
    weight_scale: WeightScale | None = None
    _level_bits: int | None = None

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
        """Create a layer whose weights are all -1, whose bias is 0 and whose scale is 1, to load a checkpoint into.

        Args:
            in_features: The number of inputs, K.
            out_features: The number of outputs, N.
            bias: Whether the layer has a bias.
            device: Device of the tensors.
            dtype: Dtype of the bias.
            input_quantization: A sign-like quantization, whose rule decides how x becomes bits, identity, or
                inputdorefa of 1 or 2 bits.
            gradient_cancellation_threshold: Inputs with a larger magnitude get no gradient; None and 0 cancel nothing.
            weight_quantization: Decides how a float ``state_dict`` becomes bits.
            weight_scale: None, or a scale of each output channel: of a float ``state_dict``, "mean" computes it from
                the weights, and "learned" expects it as ``scale``. A weight quantization may have a scale of its own.

        Raises:
            ValueError: The input quantization is none of these, or not sign-like with ternary weights, a name or a
                kind of scale is unknown, the threshold is negative or NaN, or a scale is given although the weight
                quantization has one of its own.
            TypeError: A quantization is neither a name nor a module, or the threshold is no number.
        """
        super().__init__()
        self.weight_prepared = None
        self.in_features, self.out_features = in_features, out_features
        quantization = get_quantization(input_quantization, "input_quantization")
        self.weight_quantization = get_quantization(weight_quantization, "weight_quantization")
        if isinstance(input_quantization, str):
            quantization.eval()
        if isinstance(weight_quantization, str):
            self.weight_quantization.eval()
        self._input_rule = input_rule_of(quantization)
        self._level_bits = level_bits(quantization)
        # A packed layer is always in inference, so its progressive_sign is Sign in both modes.
        if depends_on_mode(quantization):
            quantization = Sign()
        if depends_on_mode(self.weight_quantization):
            self.weight_quantization = Sign()
        self._weight_rule = weight_rule_of(self.weight_quantization)
        check_rules(self._input_rule, self._weight_rule)
        self.weight_scale = check_weight_scale(weight_scale, self.weight_quantization)
        scaled = weight_scale is not None or scaled_rule(self.weight_quantization) is not None
        self.activation = Activation(quantization, gradient_cancellation_threshold)
        with torch.inference_mode(False):
            rows = word_rows(out_features, self._weight_rule)
            words = torch.zeros(rows, words_for(in_features), dtype=torch.int32, device=device)
            self.register_buffer("weight", words)
            self._make_parameters(
                torch.zeros(out_features, device=device, dtype=dtype) if bias else None, device, dtype
            )
            scale_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
            scale = torch.ones(out_features, device=device, dtype=scale_dtype) if scaled else None
            self.register_buffer("scale", scale)
            for name, number in self._numbers().items():
                self.register_buffer(name, torch.tensor(number, device=device))
        self.prepare()

    def _numbers(self) -> dict[str, int]:
        """Return the numbers that tell in a checkpoint what the words mean."""
        return {
            "k": self.in_features,
            "format": format_of(self._buffers.get("scale") is not None, self._input_rule, self._weight_rule),
            "input_rule": self._input_rule,
            "weight_rule": self._weight_rule,
        }

    def _make_parameters(self, bias: Tensor | None, device: Any, dtype: torch.dtype | None) -> None:
        """Register the bias; without one an empty parameter, which tells other code the layer's device and dtype."""
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        if bias is None:
            empty = torch.empty(0, device=device, dtype=dtype)
            self.register_parameter("empty", nn.Parameter(empty, requires_grad=False))

    @classmethod
    def from_float(cls, layer: QLinear, words: Tensor | None = None) -> PackedQLinear:
        """Pack a QLinear whose quantizations a packed layer can have.

        Args:
            layer: The layer to pack.
            words: Its packed weights if it shares them with another layer; None packs them.

        Raises:
            ValueError: A quantization is of another kind, as progressive_sign is in training mode, the weights are
                ternary and not finite, or a call of the layer does more than QLinear's, as with hooks.
        """
        if reason := reason_of_call(layer):
            raise ValueError(f"layer: expected one whose call computes what QLinear computes, got another: {reason}")
        weight, bias = layer.weight, layer.bias
        n, k = weight.shape
        packed = cls(
            k,
            n,
            bias is not None,
            device="meta",
            dtype=weight.dtype,
            input_quantization=copy.deepcopy(layer.input_quantization),
            gradient_cancellation_threshold=layer.gradient_cancellation_threshold,
            weight_quantization=copy.deepcopy(layer.weight_quantization),
            weight_scale=layer.weight_scale,
        )
        packed.weight = pack_weight(weight, layer.weight_quantization) if words is None else words
        packed.scale = layer.channel_scale()
        with torch.inference_mode(False), torch.no_grad():
            copied = None if bias is None else bias.detach().clone()
            packed._make_parameters(copied, weight.device, weight.dtype)
        packed.prepare()
        return packed.train(layer.training)

    def unpack(self) -> QLinear:
        """Make a QLinear with the same output, whose float weights are ±1, in the dtype of the bias.

        Its weight quantization is sign if the packed weights came from one that is not sign-like, such as weightdorefa,
        or that has a scale of its own, and if the quantization is no longer sign-like, because of hooks for example.
        Ternary weights stay ternary. A scale becomes a learned one.

        Raises:
            ValueError: The output would not be the same: a call of the layer does more than PackedQLinear's, as with
                hooks, its activation was replaced, or its input quantization no longer has the values by which the
                layer was packed.
        """
        overrides = call_overrides(self) if type(self).forward is PackedQLinear.forward else ["forward"]
        if overrides or has_hooks(self):
            has = f"a {overrides[0]} of its own" if overrides else "hooks"
            raise ValueError(f"layer: expected one whose call computes what PackedQLinear computes, got one with {has}")
        if type(self.activation) is not Activation:
            raise ValueError(f"activation: expected the layer's own, got a {type(self.activation).__name__}")
        if input_rule_of(self.input_quantization) != self._input_rule:
            raise ValueError(
                f"input_quantization: expected one that gives {INPUT_RULES[self._input_rule]}, as the layer computes "
                f"it, got {self.input_quantization!r}"
            )
        scale = self._buffers.get("scale")
        quantization: nn.Module | None = None
        if self._weight_rule == TERNARY_WEIGHT:
            quantization = Ternary()
        elif self._weight_rule != QUANTIZED_WEIGHT:
            present = self.weight_quantization
            if binary_rule(present) is not None or depends_on_mode(present):  # which leave ±1 as they are
                quantization = copy.deepcopy(present)
        layer = QLinear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device="meta",
            input_quantization=copy.deepcopy(self.activation.activation_function),
            gradient_cancellation_threshold=self.activation.gradient_cancellation_threshold,
            weight_quantization=quantization,
            weight_scale=None if scale is None else "learned",
        )
        layer.weight = nn.Parameter(self._signs(next(self.parameters()).dtype))
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())  # type: ignore[assignment]
        if scale is not None:
            layer.scale = nn.Parameter(scale.detach().clone())
        return layer.train(self.training)

    # ---- the product ----

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output.

        Args:
            x: Shape ``(..., K)``, any strides, any float type. A nested, quantized or sparse tensor is replaced by its
                values.

        Returns:
            Shape ``(..., N)``; in the dtype of x, or autocast's.

        Raises:
            TypeError: x is no tensor.
            RuntimeError: x has a wrong shape or dtype. A second backward raises it too.
            NotImplementedError: Forward-mode differentiation.
        """
        words: Any = self._buffers["weight"]  # nn.Module.__getattr__ costs 0.5 us
        if (type(x) is not Tensor and type(x) is not nn.Parameter) or not x.is_cpu or not words.is_cpu or _compiling():
            return self._elsewhere(x, words)
        form = self.weight_prepared
        if form is None and words.numel() > FEW_WORDS and self._input_rule != REAL_INPUT:
            form = self.prepare()
        if form is None:
            return self._compute(x, words, None)
        stale = _library.stale_forms
        before = stale.value
        y = self._compute(x, words, form)
        if stale.value != before:
            self.prepare()  # the form was made from other words; the next call gets the form of these
        return y

    def _elsewhere(self, x: Tensor, words: Tensor) -> Tensor:
        """Compute the output if x or the words are not ordinary tensors on the CPU, and while compiling."""
        if not isinstance(x, Tensor):
            return apply_to_no_tensor(self, x)  # type: ignore[unreachable]
        # An exported program may run where another kernel reads another form, and a fake tensor must not be combined
        # with a real form.
        usable = _compiling() and words.is_cpu and x.is_cpu and not torch.compiler.is_exporting()
        return self._compute(x, words, self.weight_prepared if usable else None)

    def _compute(self, x: Tensor, words: Tensor, form: Tensor | None) -> Tensor:
        bias, scale = self._parameters["bias"], self._buffers.get("scale")
        activation: Any = self._modules["activation"]
        bits = self._level_bits
        if form is None and not (has_kernels(x) and has_kernels(words)):
            return self._in_float(x, words, bias, scale)
        if bits is not None and (x.is_cuda or words.is_cuda):
            return self._in_float(x, words, bias, scale)
        try:
            if self._input_rule == REAL_INPUT:
                return real_linear(x, words, self.in_features, bias, activation.gradient_cancellation_threshold, scale)
            if bits is not None:
                threshold = activation.gradient_cancellation_threshold
                return level_linear(x, words, self.in_features, bias, form, bits, scale, threshold)
            if self._weight_rule == TERNARY_WEIGHT:
                self._check_rows(words)
                rule, threshold = self._sign_rule(), activation.gradient_cancellation_threshold
                return ternary_linear(x, words, self.in_features, bias, form, rule, scale, threshold)
            if not is_differentiated(x, bias, scale):
                return packed_linear(x, words, self.in_features, bias, form, self._input_rule == STRICT_INPUT, scale)
            rules = self._sign_rule(), _SIGN
            threshold = activation.gradient_cancellation_threshold
            return differentiable_linear(x, None, bias, words, form, self.in_features, rules, threshold, scale)
        except NotImplementedError:
            if _compiling() or (is_plain(x) and is_plain(words)):
                raise
            return self._in_float(x, words, bias, scale)
        except RuntimeError as error:
            if x.dtype is torch.int32:
                raise RuntimeError(
                    "x: expected float values, got int32, the dtype of the layer's packed weights: a module that casts "
                    "its values to weight.dtype, as T5 does, needs a QLinear there; otherwise call x.float()."
                ) from error
            raise_of_dtype(x, error)
            raise

    def _sign_rule(self) -> BinaryRule:
        """Return the rule of the input's signs that the checkpoint names, with the gradient of the activation.

        The activation may have been replaced or got hooks since the layer was made, which the packed path skips.
        """
        strict = self._input_rule == STRICT_INPUT
        rule = binary_rule(self.activation.activation_function)
        return rule if rule is not None and rule.strict == strict else BinaryRule(strict)

    def _in_float(self, x: Tensor, words: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
        """Compute the same values by torch's own operators, on any device."""
        if has_other_layout(x):
            return apply_to_values(self, x)
        dtype = autocast_dtype(x) or x.dtype
        if self._level_bits is not None:
            threshold = self.activation.gradient_cancellation_threshold
            return levels_in_float(x, self._signs(torch.float32), scale, bias, self._level_bits, threshold)
        if self._input_rule != REAL_INPUT:
            signs = self._signs(torch.float64 if x.dtype is torch.float64 else torch.float32)
            in_float = ternary_in_float if self._weight_rule == TERNARY_WEIGHT else scaled_in_float
            rule = self._sign_rule()
            cancelled = cancel_gradient(x, self.activation.gradient_cancellation_threshold)
            return in_float(quantize(cancelled, rule.signs, rule), signs, scale, bias, dtype)
        if scale is not None:
            return scaled(F.linear(x, self._signs(x.dtype)), scale, bias)
        return F.linear(x, self._signs(x.dtype), None if bias is None else bias.to(x.dtype)).to(dtype)

    def _signs(self, dtype: torch.dtype) -> Tensor:
        """Return the weights as ±1, or as -1, 0 or +1 if they are ternary."""
        if has_kernels(self.weight):
            signs = functional.unpack_bits(self.weight, self.in_features, dtype)
        else:
            shifts = torch.arange(32, device=self.weight.device, dtype=torch.int32)
            bits = (self.weight.unsqueeze(-1) >> shifts) & 1
            signs = (2 * bits.flatten(1)[:, : self.in_features] - 1).to(dtype)
        if self._weight_rule != TERNARY_WEIGHT:
            return signs
        self._check_rows(self.weight)
        return torch.lerp(signs[: self.out_features], signs[self.out_features :], 0.5)

    def _check_rows(self, words: Tensor) -> None:
        """Check that words of ternary weights have two rows for each output, because half of others have no meaning.

        Raises:
            RuntimeError: They have not.
        """
        rows = word_rows(self.out_features, TERNARY_WEIGHT)
        if words.shape[0] != rows:
            shape = rows, words_for(self.in_features)
            raise RuntimeError(
                f"weight: expected words of shape {shape}, two rows for each output, got {tuple(words.shape)}"
            )

    # ---- the prepared form ----

    def prepare(self) -> Tensor | None:
        """Make the prepared form of the words for the active CPU kernel.

        Results never depend on this, because an operator does not use a form that was made from other words. An eager
        call that finds such a form makes a new one. A compiled model cannot, so after its words were written a call of
        this makes it fast again.

        Returns:
            The form, or None if the words are few or not on a CPU, or the layer's input is real.
        """
        if functorch_active():
            return None  # torch.func may have lent the layer the words of a whole batch of layers
        self._complete()
        words, form = self.weight, None
        wanted = type(words) is Tensor and words.is_cpu and words.numel() > FEW_WORDS
        if wanted and self._input_rule != REAL_INPUT and not words.is_floating_point():
            with torch.inference_mode(False), torch.no_grad():
                form = functional.prepare_weight(words, self.in_features)
        self.weight_prepared = form
        return form

    def _apply(self, fn: Any, recurse: bool = True) -> PackedQLinear:
        self.weight_prepared = None
        self._complete()  # a tensor on meta cannot be moved
        words, scale = self.weight, self._buffers.get("scale")

        def convert(tensor: Tensor) -> Tensor:
            """Move a tensor; words and numbers keep their dtype, and the scale is not rounded to a half type."""
            converted: Tensor = fn(tensor)
            if converted.dtype is tensor.dtype:
                return converted
            if tensor is scale:
                return tensor.to(converted.device, torch.promote_types(converted.dtype, torch.float32))
            return converted if tensor.is_floating_point() else tensor.to(converted.device)

        super()._apply(convert, recurse)  # type: ignore[no-untyped-call]
        if self.weight is not words and shares_data(words, self.weight):
            words.data = self.weight  # torch moves parameters like this, so that layers keep sharing their words
            self.weight = words
        self.prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the prepared form, which belongs to this process.

        Raises:
            TypeError: The copy is for ``fuse_linear_bn_eval``, which scales weights.
        """
        if called_from("torch.nn.utils.fusion"):
            raise TypeError(
                "linear: fuse_linear_bn_eval cannot take a PackedQLinear, because it scales the weights, of which the "
                "layer has only the signs: keep the batch norm."
            )
        return {**self.__dict__, "weight_prepared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state and prepare the words for this process's kernel."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._buffers.setdefault("scale", None)  # older pickles lack it
        self.prepare()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; words that are given as a Parameter stay a buffer.

        Raises:
            TypeError: Float weights would replace the packed words.
        """
        if name == "weight" and isinstance(value, nn.Parameter):
            if value.is_floating_point():
                raise TypeError(
                    "weight: expected packed words (int32), got float values: load them with load_state_dict, which "
                    "packs them, or make a new layer with bitorch_qlinear.pack."
                )
            value = value.data
        super().__setattr__(name, value)

    # ---- checkpoints ----

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # to_empty and skip_init give the numbers uninitialized memory, so they are written here.
        with torch.inference_mode(False), torch.no_grad():
            for name, number in self._numbers().items():
                if getattr(self, name).is_inference():
                    setattr(self, name, torch.tensor(number, device=self.weight.device))
                getattr(self, name).fill_(number)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}empty", None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problem = problem_of_packed(
            prefix,
            state_dict,
            self.out_features,
            self.in_features,
            self._input_rule,
            self._weight_rule,
            scaled=self._buffers.get("scale") is not None,
            computes_scale=self.weight_scale != "learned",
        )
        scaled = self.weight_scale is not None
        problem = problem or problem_of_lost_scale(prefix, state_dict, local_metadata, scaled)
        if problem:
            error_msgs.append(problem)
            return
        key = f"{prefix}weight"
        weight = state_dict.get(key)
        may_miss = {f"{prefix}{name}" for name in ("empty", "format", "input_rule", "weight_rule")}
        if isinstance(weight, Tensor) and weight.is_floating_point():
            try:
                quantization = self._loaded_quantization(state_dict, prefix, local_metadata)
            except RuntimeError as error:
                error_msgs.append(f"{prefix}weight_quantization: {error}")
                return
            try:
                state_dict[key] = pack_weight(weight, quantization)
                scale = self._scale_of(weight, quantization)
                if scale is not None:
                    state_dict[f"{prefix}scale"] = scale
            except ValueError as error:
                error_msgs.append(f"{key}: {error}")
                return
            may_miss.add(f"{prefix}k")
        elif isinstance(weight, Tensor):
            state_dict[key] = weight.view(torch.int32).contiguous()
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(name for name in missing if name not in may_miss)
        self.prepare()

    def _loaded_quantization(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
    ) -> nn.Module:
        """Return the weight quantization with the parameters and buffers that a checkpoint holds for it.

        torch loads them into the layer's own quantization only after the layer, whose weights depend on them.

        Raises:
            RuntimeError: They do not fit the quantization.
        """
        start = f"{prefix}weight_quantization."
        entries = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        if not entries:
            return self.weight_quantization
        quantization = copy.deepcopy(self.weight_quantization)
        assign = local_metadata.get("assign_to_params_buffers", False)
        quantization.load_state_dict(entries, strict=False, assign=assign)
        return quantization

    def _scale_of(self, weight: Tensor, quantization: nn.Module) -> Tensor | None:
        """Return the scale that the layer computes from float weights and their quantization, or None."""
        with torch.inference_mode(False), torch.no_grad():
            if self.weight_scale == "mean":
                return mean_scale(quantization, weight)
            return own_scale(quantization, weight.detach())

    def _complete(self) -> None:
        """Replace the entries that a loader which assigned the words left on meta, as its checkpoint lacks them."""
        device = self.weight.device
        if device.type == "meta":
            return
        for name, number in self._numbers().items():
            if getattr(self, name).is_meta:
                setattr(self, name, torch.tensor(number, device=device))
        empty = self._parameters.get("empty")
        if empty is not None and empty.is_meta:
            self._make_parameters(None, device, empty.dtype)

    @property
    def input_quantization(self) -> nn.Module:
        """The quantization of the input."""
        return self.activation.activation_function

    @property
    def gradient_cancellation_threshold(self) -> float | None:
        """The magnitude beyond which inputs get no gradient, or None."""
        return self.activation.gradient_cancellation_threshold

    @property
    def path(self) -> str:
        """What computes the layer's output, in words; for float computation with the reason."""
        if self._input_rule == REAL_INPUT:
            return "packed weights, real input"
        if self._level_bits is None:
            name = path_name(self.weight)
            return f"{name}, ternary weights" if self._weight_rule == TERNARY_WEIGHT else name
        if not self.weight.is_cpu:
            return f"float (no kernels for a {self._level_bits}-bit input on {self.weight.device.type})"
        return f"packed weights, {self._level_bits}-bit input"

    def extra_repr(self) -> str:
        """Return sizes, sign rule, threshold, and the path that computes them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"input={INPUT_RULES[self._input_rule]!r}, "
            f"gradient_cancellation_threshold={self.gradient_cancellation_threshold}, "
            f"{'' if self._buffers.get('scale') is None else 'scale=True, '}path={self.path}"
        )

    def __repr__(self) -> str:
        """Return one line, because the quantizations are part of the layer and not layers inside it."""
        return f"{type(self).__name__}({self.extra_repr()})"
