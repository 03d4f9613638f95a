"""PackedQLinear: a QLinear reduced to its bits, for inference; and pack(), which puts them into a model."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import _library, functional
from ._function import apply, transforms_active
from .cache import Ready, is_captured
from .linear import Activation, QLinear, autocast_dtype, fused_linear, has_kernels, path_name
from .quantizations import BinaryRule, binary_rule, get_quantization, has_constant_rule

__all__ = ["PackEntry", "PackReport", "PackedQLinear", "pack"]

_logger = logging.getLogger(__name__)


def _words_for(k: int) -> int:
    return -(-k // 32)


def _pack_anywhere(weight: Tensor, strict: bool) -> Tensor:
    """Words on the weight's device, packed on the CPU where the device has no kernels."""
    device = weight.device if has_kernels(weight) else torch.device("cpu")
    return functional.pack_bits(weight.detach().to(device), strict).to(weight.device)


def _rule_of(argument: str, quantization: str | nn.Module | None) -> BinaryRule:
    module = get_quantization(quantization, argument)
    rule = binary_rule(module.eval() if isinstance(quantization, str) else module)
    if rule is None:
        raise ValueError(f"{argument}: expected a sign-like quantization, which packs into bits, got {module!r}")
    return rule


@torch.library.custom_op("bitorch_qlinear_python::refuse_gradient", mutates_args=())
def _refuse_gradient(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """The error of a backward. An operator, so that torch.compile puts it into the graph instead of meeting it."""
    raise RuntimeError("PackedQLinear computes no gradients: train the QLinear and pack it afterwards.")


@_refuse_gradient.register_fake
def _(grad: Tensor, shape: Sequence[int]) -> Tensor:
    return grad.new_empty(shape)


class _InferenceOnly(torch.autograd.Function):
    """Lets a forward that torch wants to differentiate pass, and says in backward why there is no gradient."""

    @staticmethod
    def forward(x: Tensor, layer: PackedQLinear) -> Tensor:
        return layer._product(x, torch.compiler.is_compiling())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _refuse_gradient(grad, ctx.shape), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, layer: PackedQLinear) -> tuple[Tensor, int]:
        return apply(_InferenceOnlyEager, x.movedim(in_dims[0], 0), layer), 0


class _InferenceOnlyEager(_InferenceOnly):
    """With words for forward mode, which torch.compile would take for a promise to support it."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError("PackedQLinear has no forward-mode derivative (jvp), nor any other.")


class _Prepared(NamedTuple):
    """A prepared form with the state of the words that it was made from: one object, so that threads see both."""

    weight: weakref.ref[Tensor]
    version: int
    address: int
    generation: int
    form: Tensor
    ready: Ready | None

    @staticmethod
    def make(weight: Tensor, k: int) -> _Prepared:
        # The state first: a write during the preparation makes it out of date, not wrong.
        state = weakref.ref(weight), weight._version, weight.data_ptr(), _library.generation
        return _Prepared(*state, functional.prepare_weight(weight, k), None)


class PackedQLinear(nn.Module):
    """``y = s(x) · Wᵀ + b`` with W kept as bits: what a trained :class:`QLinear` is at inference, bit for bit.

    ``state_dict`` holds ``weight`` (packed words), ``bias`` and ``k``: 1/32 of the float32 weights. In memory there is
    as much again for the form that the kernel reads, where it wants another one. Loading checks shapes, dtypes, k and
    the padding bits; a float ``state_dict`` (of a QLinear or ``nn.Linear``) loads by being packed.

    Attributes:
        in_features: K.
        out_features: N.
        weight: int32 words of shape ``(N, ceil(K / 32))``, see :mod:`bitorch_qlinear.functional`.
        bias: Shape ``(N,)`` or None.
        k: K as a 0-dim int64 tensor, for the checkpoint.
        weight_prepared: The form that the kernel reads, or None on a device without kernels. Not in the checkpoint;
            made anew when the words change, but inside a compiled model or a captured CUDA graph only by loading or
            :meth:`repack`.
    """

    weight: Tensor
    bias: Tensor | None
    k: Tensor
    weight_prepared: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_quantization: str | nn.Module | None = None,
        weight_quantization: str | nn.Module | None = None,
    ) -> None:
        """Create a layer whose weights are all -1 and whose bias is 0, to load a checkpoint into.

        Args:
            in_features: K.
            out_features: N.
            bias: Whether there is a bias.
            device: Where the buffers are.
            dtype: Of the bias.
            input_quantization: A sign-like quantization: its rule decides how x becomes bits.
            weight_quantization: Its rule decides how a float ``state_dict`` becomes bits.

        Raises:
            ValueError: A quantization that is not sign-like.
        """
        super().__init__()
        self._prepared: _Prepared | None = None
        self.in_features, self.out_features = in_features, out_features
        self.strict_input = _rule_of("input_quantization", input_quantization).strict
        self.strict_weight = _rule_of("weight_quantization", weight_quantization).strict
        with torch.inference_mode(False):  # else the words could not tell that they changed
            words = torch.zeros(out_features, _words_for(in_features), dtype=torch.int32, device=device)
            self.register_buffer("weight", words)
            self.register_buffer("bias", torch.zeros(out_features, device=device, dtype=dtype) if bias else None)
            self.register_buffer("k", torch.tensor(in_features, device=device))
            self.register_buffer("weight_prepared", None, persistent=False)
        self.repack()

    @classmethod
    def from_float(cls, layer: QLinear) -> PackedQLinear:
        """Pack a QLinear whose quantizations are sign-like.

        Raises:
            ValueError: A quantization is not sign-like (progressive_sign is not in training mode).
        """
        weight, bias = layer.weight, layer.bias
        packed = cls(
            layer.in_features,
            layer.out_features,
            bias is not None,
            device="meta",
            input_quantization=layer.input_quantization,
            weight_quantization=layer.weight_quantization,
        )
        with torch.inference_mode(False), torch.no_grad():
            packed.weight = _pack_anywhere(weight, packed.strict_weight)
            packed.bias = None if bias is None else bias.detach().clone()
            packed.k = torch.tensor(layer.in_features, device=weight.device)
        packed.repack()
        return packed.train(layer.training)

    def unpack(self) -> QLinear:
        """A QLinear with the same output, whose float weights are ±1."""
        layer = QLinear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device="meta",
            input_quantization="steheaviside" if self.strict_input else "sign",
        )
        dtype = torch.get_default_dtype() if self.bias is None else self.bias.dtype
        layer.weight = nn.Parameter(self._signs(dtype))
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.clone())  # type: ignore[assignment]
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: Shape ``(..., K)``, any strides, any float type.

        Returns:
            Shape ``(..., N)``; in the dtype of x, or autocast's.

        Raises:
            RuntimeError: In backward: this layer computes no gradients.
        """
        compiling = torch.compiler.is_compiling()
        if (x.requires_grad and torch.is_grad_enabled()) or (not compiling and transforms_active()):
            y: Tensor = apply(_InferenceOnly if compiling else _InferenceOnlyEager, x, self)
            return y
        return self._product(x, compiling)

    def _product(self, x: Tensor, compiling: bool = False) -> Tensor:
        buffers = self._buffers  # an nn.Module's attribute access costs half a microsecond
        weight, bias = buffers["weight"], buffers["bias"]
        assert weight is not None
        if not has_kernels(x):
            return self._float_product(x, bias)
        prepared = self._current_prepared(weight, compiling)
        return fused_linear(x, weight, self.in_features, bias, prepared, self.strict_input, compiling)

    def _float_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same values by torch's own operators, on any device: summed and rounded in the operators' T."""
        dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(BinaryRule(self.strict_input).signs(x.detach()).to(dtype), self._signs(dtype))
            y = y if bias is None else y + bias.to(dtype)
        return y.to(autocast_dtype(x) or x.dtype)

    def _signs(self, dtype: torch.dtype) -> Tensor:
        """The weights as ±1."""
        if has_kernels(self.weight):
            return functional.unpack_bits(self.weight, self.in_features, dtype)
        shifts = torch.arange(32, device=self.weight.device, dtype=torch.int32)
        bits = (self.weight.unsqueeze(-1) >> shifts) & 1
        return (2 * bits.reshape(self.out_features, -1)[:, : self.in_features] - 1).to(dtype)

    # ---- the prepared form ----

    def _current_prepared(self, weight: Tensor, compiling: bool) -> Tensor | None:
        if compiling:
            # An exported program runs elsewhere: it prepares the words for the kernel that it finds there.
            exporting = torch.compiler.is_exporting()
            return functional.prepare_weight(weight, self.in_features) if exporting else self.weight_prepared
        prepared = self._prepared
        if (
            prepared is None  # made on another device, or from inference tensors, whose changes cannot be noticed
            or prepared.weight() is not weight
            or prepared.address != weight.data_ptr()
            or prepared.generation != _library.generation
            or prepared.version != weight._version
            or prepared.form is not self._buffers["weight_prepared"]
        ):
            if is_captured(weight):
                return functional.prepare_weight(weight, self.in_features)  # in the graph, where nothing is done yet
            return self._prepare()
        if prepared.ready is not None:
            prepared.ready.wait(prepared.form)
        return prepared.form

    def repack(self) -> None:
        """Prepare the words anew: after writes that torch cannot notice, or beneath a compiled model."""
        self._prepare()

    def _prepare(self) -> Tensor | None:
        weight, prepared, form = self.weight, None, None
        with torch.inference_mode(False):
            if not has_kernels(weight):
                pass
            elif weight.is_meta or weight.is_inference() or type(weight) is not Tensor:
                form = functional.prepare_weight(weight, self.in_features)
            else:
                prepared = _Prepared.make(weight, self.in_features)
                if weight.is_cuda:
                    prepared = prepared._replace(form=self._in_place(prepared.form), ready=Ready(weight.device))
                form = prepared.form
        self.weight_prepared, self._prepared = form, prepared
        return form

    def _in_place(self, form: Tensor) -> Tensor:
        """The new form, in the memory of the present one where it fits: captured CUDA graphs read it there."""
        present = self.weight_prepared
        if present is None or present.shape != form.shape or present.device != form.device or present.is_inference():
            return form
        with torch.no_grad():
            return present.copy_(form)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedQLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.repack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the prepared form, which belongs to this process."""
        state = self.__dict__.copy()
        state["_buffers"] = {**self._buffers, "weight_prepared": None}
        state["_prepared"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and prepare the words for the kernel here."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.repack()

    # ---- loading ----

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
        key, k_key = f"{prefix}weight", f"{prefix}k"
        weight = state_dict.get(key)
        if not isinstance(weight, Tensor):
            pass  # missing, or not a tensor: reported by torch
        elif weight.is_floating_point():
            if weight.shape != (self.out_features, self.in_features):
                expected = (self.out_features, self.in_features)
                error_msgs.append(f"{key}: expected float weights of shape {expected}, got {tuple(weight.shape)}")
                return
            state_dict[key] = _pack_anywhere(weight, self.strict_weight)
            state_dict[k_key] = torch.tensor(self.in_features)
        else:
            problem = self._problem(key, weight) or self._problem_of_k(k_key, state_dict.get(k_key))
            if problem:
                error_msgs.append(problem)
                return
            state_dict[key] = weight.view(torch.int32).contiguous()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.repack()

    def _problem(self, key: str, words: Tensor) -> str | None:
        """What is wrong with packed words, or None."""
        if words.dtype not in (torch.int32, torch.uint32):
            return f"{key}: expected packed words of dtype int32 or uint32, or float weights, got {words.dtype}"
        if words.shape != self.weight.shape:
            return f"{key}: expected words of shape {tuple(self.weight.shape)}, got {tuple(words.shape)}"
        used = self.in_features % 32
        if used and words.device.type != "meta" and bool((words.view(torch.int32)[:, -1] & (-1 << used)).any()):
            return f"{key}: expected zero bits past k = {self.in_features} in the last word of each row, got others"
        return None

    def _problem_of_k(self, key: str, k: Any) -> str | None:
        if not isinstance(k, Tensor) or k.device.type == "meta":
            return None  # missing, or not a tensor: reported by torch
        if k.dim() != 0 or k.dtype is not torch.int64:
            return f"{key}: expected a 0-dim int64 tensor, got {k.dtype} with {k.dim()} dimensions"
        if int(k) != self.in_features:
            return f"{key}: expected k = {self.in_features}, got {int(k)}"
        return None

    def extra_repr(self) -> str:
        """Sizes, sign rule, and which path computes them."""
        rule = "v > 0" if self.strict_input else "not v < 0"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"rule={rule!r}, path={path_name(self.weight)}"
        )


class PackEntry(NamedTuple):
    """What became of one QLinear.

    Attributes:
        name: Its path in the model ("" for the model itself).
        packed: Whether it was packed.
        reason: Why not; "" if it was.
        float_bytes: Bytes of its float weights.
        packed_bytes: Bytes of the packed words, which a checkpoint holds; 0 if it was not packed.
        resident_bytes: Bytes of words and prepared form, in memory; 0 if it was not packed.
    """

    name: str
    packed: bool
    reason: str
    float_bytes: int
    packed_bytes: int
    resident_bytes: int


class PackReport(list[PackEntry]):
    """One entry for each QLinear of a model; ``str`` makes a text of it."""

    def __str__(self) -> str:
        """One line a layer and a sum."""
        packed = [entry for entry in self if entry.packed]
        lines = [
            f"  {entry.name or '(model)'}: "
            + (
                f"packed, {entry.float_bytes} -> {entry.packed_bytes} bytes ({entry.resident_bytes} in memory)"
                if entry.packed
                else f"not packed: {entry.reason}"
            )
            for entry in self
        ]
        before, after = sum(e.float_bytes for e in packed), sum(e.packed_bytes for e in packed)
        return "\n".join([f"packed {len(packed)} of {len(self)} QLinear, {before} -> {after} bytes of weights", *lines])


def _reason_against(layer: QLinear) -> str:
    """Why a QLinear cannot be packed, or ""."""
    if type(layer).forward is not QLinear.forward or "forward" in layer.__dict__:
        return f"{type(layer).__name__} has a forward of its own"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks"
    if type(layer.activation) is not Activation:
        return "its activation was replaced"
    for name, quantization in (("input", layer.input_quantization), ("weight", layer.weight_quantization)):
        if binary_rule(quantization) is None:
            # Only of one that packs in eval mode, so that nobody tries it in vain with another.
            mode = " in training mode" if quantization.training and not has_constant_rule(quantization) else ""
            return f"its {name} quantization, {quantization!r}{mode}, is not sign-like"
    return "" if layer._packed_rules() is not None else "its activation has hooks"


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@overload
def pack(model: nn.Module, *, inplace: bool = False, report: Literal[False] = False) -> nn.Module: ...
@overload
def pack(model: nn.Module, *, inplace: bool = False, report: Literal[True]) -> tuple[nn.Module, PackReport]: ...
def pack(model: nn.Module, *, inplace: bool = False, report: bool = False) -> nn.Module | tuple[nn.Module, PackReport]:
    """Replace each packable QLinear of a model by a PackedQLinear with the same output, for inference.

    Args:
        model: Any module, also a QLinear itself.
        inplace: Replace inside `model` and free its float weights; otherwise a copy is returned, in which the packed
            layers' float weights are never copied.
        report: Return a :class:`PackReport` too, of what was packed and what was not and why; otherwise it is logged,
            as a warning where a QLinear stays as it is or there is none.

    Returns:
        The model, or the model and the report.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {model!r:.60}")
    entries = PackReport()
    replacements: dict[int, Any] = {}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, QLinear)]
    for name, layer in tqdm(layers, desc="packing", unit="layer", delay=1.0, leave=False):
        reason, float_bytes = _reason_against(layer), _bytes(layer.weight)
        if reason:
            entries.append(PackEntry(name, False, reason, float_bytes, 0, 0))
            continue
        packed = replacements[id(layer)] = PackedQLinear.from_float(layer)
        resident = _bytes(packed.weight, packed.weight_prepared)
        entries.append(PackEntry(name, True, "", float_bytes, _bytes(packed.weight), resident))
    if inplace:
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                parent._modules[name] = replacements.get(id(child), child)
        model = replacements.get(id(model), model)
    else:
        # deepcopy takes what its memo already holds for a copy of the layer.
        model = copy.deepcopy(model, replacements)
    if report:
        return model, entries
    _logger.log(logging.INFO if entries and all(entry.packed for entry in entries) else logging.WARNING, "%s", entries)
    return model
