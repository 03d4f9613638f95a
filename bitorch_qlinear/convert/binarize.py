"""binarize(), which makes the linear layers of a model binary for training, and a report of what it would do."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from .._inputs import FLOATS
from .._torch import has_hooks, has_state_hooks, hook_names, is_dtensor, is_plain, own_attributes
from ..linear import QLinear, WeightScale, how_to_free
from ..packed import PackedQLinear
from .replacement import check_model, copy_model, replace

__all__ = ["BinarizeReport", "LayerChoice", "binarize", "explain_binarize"]

_Model = TypeVar("_Model", bound=nn.Module)
_Filter = Callable[[nn.Module, str], bool]
_Rules = Mapping[str, Mapping[str, Any] | None]
_logger = logging.getLogger(__name__)

_OPTIONS = ("input_quantization", "weight_quantization", "gradient_cancellation_threshold", "weight_scale")
_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_BEFORE_SHARDING = "binarize the model first, and shard the result"


@dataclass(frozen=True)
class LayerChoice:
    """What ``binarize`` does with one linear layer.

    Attributes:
        name: The layer's path in the model ("" for the model itself); of a shared layer the first one.
        kind: The name of the layer's class.
        weights: Number of the layer's weights.
        replaced: Whether :func:`bitorch_qlinear.binarize` replaces the layer.
        binary: Whether the layer is binary already.
        reason: Why the layer is not replaced; "" if it is, or if it is binary already.
        options: The quantizations, the threshold and the scale that the layer gets; empty if it is not replaced.
    """

    name: str
    kind: str
    weights: int
    replaced: bool
    binary: bool
    reason: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class BinarizeReport:
    """The report on all linear layers of a model, binary ones among them; ``str`` gives a table.

    Attributes:
        layers: The layers in the order of ``model.named_modules()``.
    """

    layers: tuple[LayerChoice, ...]

    def __iter__(self) -> Iterator[LayerChoice]:
        """Iterate over the layers."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    def __str__(self) -> str:
        """Return a table with one line for each layer, and a line with the sums."""
        if not self.layers:
            return "no nn.Linear in this model"
        header = ("layer", "kind", "weights", "binarize()")
        rows = [(layer.name or "(model)", layer.kind, f"{layer.weights:,}", _outcome(layer)) for layer in self.layers]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        replaced = sum(layer.replaced for layer in self.layers)
        binary = sum(layer.binary for layer in self.layers)
        weights = sum(layer.weights for layer in self.layers)
        then = sum(layer.weights for layer in self.layers if layer.replaced or layer.binary)
        share = f"; {100 * then / weights:.3g} % of their weights would be binary" if weights else ""
        total = f"{len(self.layers)} linear layers: {binary} binary, {replaced} that binarize() would replace{share}"
        return "\n".join([*lines, total])


def _outcome(layer: LayerChoice) -> str:
    """Return what happens to a layer, in words."""
    if layer.binary:
        return "is binary"
    if not layer.replaced:
        return layer.reason
    parts = [layer.options[name] for name in _OPTIONS[:2]]
    names = [part if isinstance(part, str) else "sign" if part is None else type(part).__name__ for part in parts]
    scale = layer.options[_OPTIONS[3]]
    scaled = "" if scale is None else f" with a {scale} scale"
    return f"replaces it: {names[0]} input, {names[1]} weights{scaled}, threshold {layer.options[_OPTIONS[2]]}"


def binarize(
    model: _Model,
    *,
    input_quantization: str | nn.Module | None = None,
    weight_quantization: str | nn.Module | None = None,
    gradient_cancellation_threshold: float | None = 1.0,
    weight_scale: WeightScale | None = None,
    filter_fn: _Filter | None = None,
    rules: _Rules | None = None,
    keep_first: bool = True,
    keep_last: bool = True,
    inplace: bool = False,
) -> _Model:
    """Replace the ``nn.Linear`` layers of a model by QLinear, for training; :func:`pack` turns them into bits later.

    The binary model computes something else than the float one, so it has to be trained, or trained again. Its modules
    and parameters keep their names, so the keys of ``state_dict`` stay; devices, dtypes, ``requires_grad`` and training
    mode stay, too. A layer that occurs several times becomes one QLinear. A layer that is binary already is kept, so a
    second call with the same arguments changes nothing.

    Some layers cannot be replaced, because they would lose a part or their weight is read as real numbers: subclasses
    of ``nn.Linear``, layers with hooks, parametrizations, or tensors or modules of their own, the ``out_proj`` of
    ``nn.MultiheadAttention`` (the attention reads its weight itself), and layers whose weight is also that of a module
    that stays real, such as an ``nn.Embedding``. Other code that reads a layer's weight instead of calling the layer
    cannot be detected: leave such a layer out by a rule. Layers are exchanged where modules register them. A forward
    that calls a layer through a plain list, dictionary or closure goes on calling the float layer.

    :func:`explain_binarize` reports which layers would be replaced, and why others would not. The layers that stay
    real are also logged; the message is a warning if one of them was chosen but cannot be replaced, or if the result
    has no binary layer.

    Args:
        model: Any module. If it is an ``nn.Linear`` itself, it is replaced although it is the first and last layer.
        input_quantization: A name (see :func:`quantization_names`), a module, of which each layer gets a copy on its
            device, or None for sign.
        weight_quantization: The same for the weights.
        gradient_cancellation_threshold: Inputs with a larger magnitude get no gradient. The default is 1.0, because
            it trains well; QLinear's default is None, because that is bitorch's.
        weight_scale: The factor of each output channel's signs: None for none, "mean" for the mean magnitude of the
            channel's weights (XNOR-Net; if they are ternary, of those that do not become 0), or "learned" for a new
            parameter ``scale``, which begins as that mean. An optimizer that was made before must be given the new
            parameters.
        filter_fn: Called with each real ``nn.Linear`` and its name; returns whether the layer may be replaced. A shared
            layer has several names, for all of which it must return True.
        rules: Maps regular expressions to options. A layer whose whole name matches an expression gets these options
            (any of the four above) instead, or stays real if they are None. The first expression that matches counts.
            A rule does not choose layers that `filter_fn`, `keep_first` or `keep_last` leave real.
        keep_first: Leave the first layer real, because a sign keeps little of the model's input. It is the first linear
            layer or convolution in the order of ``model.named_modules()``. If it is a convolution, it is real anyway.
        keep_last: Leave the last layer real, because a binary layer's outputs are large whole numbers, which make poor
            logits. It is the last linear layer or convolution in the same order.
        inplace: Replace the layers inside `model`. The new layers take over the parameters, so that an optimizer which
            holds them stays valid. The default, as :func:`pack` has it, makes a copy that shares nothing with `model`,
            because the float model is often needed as a baseline or a teacher.

    Returns:
        The model, or its copy.

    Raises:
        TypeError: `model` is no nn.Module, `filter_fn` cannot be called, or an option has a wrong type.
        ValueError: A quantization's name or a kind of scale is unknown, the threshold is negative or NaN, the weight
            quantization has a scale of its own and another one is given, or a rule is no regular expression, has an
            unknown option, or matches no linear layer.
        RuntimeError: The model is wrapped for distributed training, or cannot be copied.
    """
    check_model(model, _BEFORE_SHARDING)
    defaults = {
        "input_quantization": input_quantization,
        "weight_quantization": weight_quantization,
        "gradient_cancellation_threshold": gradient_cancellation_threshold,
        "weight_scale": weight_scale,
    }
    decisions = _decide(model, defaults, filter_fn, rules, keep_first, keep_last)
    reasons = {decision.name: decision.reason for decision in decisions if decision.reason}
    result: nn.Module = model if inplace else copy_model(model, {}, reasons)
    # The filter has seen the model's own layers. Those of the copy are found by their names.
    layers = dict(result.named_modules())
    made: dict[str, QLinear] = {}
    for decision in decisions:
        layer = layers.get(decision.name)
        if decision.replaced and type(layer) is nn.Linear:
            made[decision.name] = _binary(layer, decision.options)
    result = replace(result, {id(layers[name]): layer for name, layer in made.items()}, True, reasons)
    present = set(map(id, result.modules()))
    for decision in decisions:
        if decision.replaced and id(made.get(decision.name)) not in present:
            reasons[decision.name] = "the module that holds it does not let it be replaced"
    _log(decisions, reasons)
    return result  # type: ignore[return-value]


def explain_binarize(
    model: nn.Module,
    *,
    input_quantization: str | nn.Module | None = None,
    weight_quantization: str | nn.Module | None = None,
    gradient_cancellation_threshold: float | None = 1.0,
    weight_scale: WeightScale | None = None,
    filter_fn: _Filter | None = None,
    rules: _Rules | None = None,
    keep_first: bool = True,
    keep_last: bool = True,
) -> BinarizeReport:
    """Report for each linear layer whether ``binarize`` with the same arguments would replace it, or why not.

    Args:
        model: Any module; it is not changed.
        input_quantization: As in :func:`binarize`, like all that follow.
        weight_quantization: The quantization of the weights.
        gradient_cancellation_threshold: The magnitude beyond which inputs get no gradient.
        weight_scale: The factor of each output channel's signs.
        filter_fn: Says which layers may be replaced.
        rules: Options, or None, for layers by their names.
        keep_first: Leave the first layer real.
        keep_last: Leave the last layer real.

    Raises:
        TypeError: As :func:`binarize`.
        ValueError: As :func:`binarize`.
        RuntimeError: The model is wrapped for distributed training.
    """
    check_model(model, _BEFORE_SHARDING)
    defaults = {
        "input_quantization": input_quantization,
        "weight_quantization": weight_quantization,
        "gradient_cancellation_threshold": gradient_cancellation_threshold,
        "weight_scale": weight_scale,
    }
    decisions = _decide(model, defaults, filter_fn, rules, keep_first, keep_last)
    return BinarizeReport(tuple(decision.choice() for decision in decisions))


def _log(decisions: list[_Decision], reasons: dict[str, str]) -> None:
    """Log which layers stay real and why: as a warning if one was meant to be binary, or if no layer is binary."""
    real = [decision for decision in decisions if not decision.binary]
    left = [decision for decision in real if decision.name in reasons]
    unwanted = any(decision.meant for decision in left) or len(left) == len(decisions)
    lines = [f"  {decision.name or '(model)'} stays as it is: {reasons[decision.name]}" for decision in left]
    level = logging.WARNING if unwanted else logging.INFO
    _logger.log(level, "%s", "\n".join([f"binarized {len(real) - len(left)} of {len(real)} nn.Linear", *lines]))


# ---- which layers ----


@dataclass
class _Decision:
    """What is done with one linear layer.

    Attributes:
        layer: The layer.
        names: All its paths in the model.
        options: The arguments of ``from_linear``.
        meant: Whether the caller's choice, defaults included, makes it binary. It is if there is no reason against it.
        reason: Why it stays real.
    """

    layer: nn.Linear | PackedQLinear
    names: list[str]
    options: Mapping[str, Any]
    meant: bool
    reason: str

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def binary(self) -> bool:
        return _is_binary(self.layer)

    @property
    def replaced(self) -> bool:
        return self.meant and not self.reason

    def choice(self) -> LayerChoice:
        """Return the layer's line of the report."""
        return LayerChoice(
            name=self.name,
            kind=type(self.layer).__name__,
            weights=self.layer.in_features * self.layer.out_features,
            replaced=self.replaced,
            binary=self.binary,
            reason=self.reason,
            options=dict(self.options) if self.replaced else {},
        )


def _is_binary(module: nn.Module) -> bool:
    """Whether the module is a binary layer: of this package, or one of bitorch that is not converted."""
    return isinstance(module, (QLinear, PackedQLinear)) or (
        isinstance(module, nn.Linear) and hasattr(module, "weight_quantization")
    )


def _modules_with_names(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Return the modules of a model with all their names, without what binary layers hold, in the model's order."""
    inner = {id(part) for module in model.modules() if _is_binary(module) for part in list(module.modules())[1:]}
    names: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in inner:
            names.setdefault(id(module), (module, []))[1].append(name)
    return list(names.values())


def _decide(
    model: nn.Module,
    defaults: Mapping[str, Any],
    filter_fn: _Filter | None,
    rules: _Rules | None,
    keep_first: bool,
    keep_last: bool,
) -> list[_Decision]:
    """Decide what is done with each linear layer; the arguments are those of ``binarize``."""
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a function of a module and its name, or None; got {filter_fn!r:.60}")
    _check_options(defaults)
    compiled = _check_rules(rules, defaults)
    modules = _modules_with_names(model)
    kept = _ends(model, [module for module, _ in modules], keep_first, keep_last)
    projections = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    matched: set[str] = set()
    decisions = []
    for layer, names in modules:
        if not isinstance(layer, (nn.Linear, PackedQLinear)):
            continue
        matching = [rule for rule in compiled if any(map(rule[0].fullmatch, names))]
        matched.update(pattern.pattern for pattern, _ in matching)
        pattern, options = matching[0] if matching else (None, {})
        decision = _Decision(layer, names, {**defaults, **(options or {})}, False, "")
        decisions.append(decision)
        if decision.binary:
            continue
        assert isinstance(layer, nn.Linear)
        if filter_fn is not None and not all(filter_fn(layer, name) for name in names):
            decision.reason = "filter_fn leaves it out"
        elif pattern is not None and options is None:
            decision.reason = f"the rule {pattern.pattern!r} leaves it out"
        elif id(layer) in kept:
            decision.reason = kept[id(layer)]
        else:
            decision.meant = True
            decision.reason = _reason_against(layer, id(layer) in projections)
    for pattern, _ in compiled:
        if pattern.pattern not in matched:
            raise ValueError(
                f"rules[{pattern.pattern!r}]: expected a pattern that matches the whole name of a linear layer, and "
                "this one matches none"
            )
    _leave_tied(modules, decisions)
    return decisions


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise the error that a QLinear with these options would raise."""
    QLinear(1, 1, device="meta", **options)


def _check_rules(
    rules: _Rules | None, defaults: Mapping[str, Any]
) -> list[tuple[re.Pattern[str], Mapping[str, Any] | None]]:
    """Return the rules with compiled patterns.

    Raises:
        TypeError: The rules are no mapping of patterns to mappings, or an option has a wrong type.
        ValueError: A pattern is no regular expression, an option is unknown, or its value is wrong.
    """
    if rules is None:
        return []
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules: expected a mapping of patterns to options or None, got {type(rules).__name__}")
    compiled = []
    for pattern, options in rules.items():
        where = f"rules[{pattern!r}]"
        if not isinstance(pattern, str) or not (options is None or isinstance(options, Mapping)):
            raise TypeError(f"{where}: expected a str with a mapping of options or None, got {options!r:.60}")
        unknown = [name for name in options or () if name not in _OPTIONS]
        if unknown:
            raise ValueError(f"{where}: expected options among {', '.join(_OPTIONS)}; got {unknown[0]!r}")
        try:
            compiled.append((re.compile(pattern), options))
            _check_options({**defaults, **(options or {})})
        except re.error as error:
            raise ValueError(f"{where}: expected a regular expression; {error}") from error
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
    return compiled


def _ends(model: nn.Module, modules: list[nn.Module], keep_first: bool, keep_last: bool) -> dict[int, str]:
    """Return why the first and the last layer stay real, by their ids."""
    layers = [module for module in modules if isinstance(module, (nn.Linear, PackedQLinear, *_CONVOLUTIONS))]
    kept: dict[int, str] = {}
    if layers and layers[0] is not model:
        if keep_last:
            kept[id(layers[-1])] = "it is the last layer (keep_last=False replaces it)"
        if keep_first:
            kept[id(layers[0])] = "it is the first layer (keep_first=False replaces it)"
    return kept


def _reason_against(layer: nn.Linear, is_projection: bool) -> str:
    """Return the reason why a layer cannot be replaced, or "" if it can.

    Args:
        layer: The layer.
        is_projection: Whether it is the ``out_proj`` of an ``nn.MultiheadAttention``.
    """
    if is_projection:
        return "nn.MultiheadAttention reads out_proj.weight itself and never calls the layer"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "its sizes are not known before the first call: call the model once, and binarize it then"
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            return f"its {name} is computed from other tensors: {how_to_free(layer, name)}"
    if type(layer) is not nn.Linear:
        return f"it is a {type(layer).__name__}, which may compute something else than nn.Linear"
    if "forward" in layer.__dict__:
        return "it has a forward of its own"
    if has_hooks(layer) or has_state_hooks(layer):
        return f"it has hooks ({', '.join(hook_names(layer)) or 'of backward or state_dict'}), which it would lose"
    own = [*layer._modules, *layer._buffers, *(name for name in layer._parameters if name not in ("weight", "bias"))]
    if own:
        return f"it holds tensors or modules of its own ({', '.join(own)}), which it would lose"
    weight = layer.weight
    if is_dtensor(weight):
        return f"its weight is sharded: {_BEFORE_SHARDING}"
    if not is_plain(weight):
        return f"its weight is a {type(weight).__name__}, whose signs cannot be trained"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}: expected float64, float32, float16 or bfloat16"
    return ""


def _memory_of(tensor: Tensor) -> tuple[str, int]:
    """Return what two tensors have in common if they begin at the same address, or else what identifies this one."""
    address = tensor.data_ptr() if is_plain(tensor) else 0  # 0 on meta and of no elements
    return ("address", address) if address else ("tensor", id(tensor))


def _leave_tied(modules: list[tuple[nn.Module, list[str]]], decisions: list[_Decision]) -> None:
    """Leave a layer real whose weight is also that of a module that stays real, which reads numbers and not signs."""
    replaced = {id(decision.layer) for decision in decisions if decision.replaced}
    readers: dict[tuple[str, int], str] = {}
    for module, names in modules:
        if id(module) not in replaced and not _is_binary(module):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    readers.setdefault(_memory_of(tensor), f"{names[0] or 'the model'} ({type(module).__name__})")
    for decision in decisions:
        reader = readers.get(_memory_of(decision.layer.weight)) if decision.replaced else None
        if reader is not None:
            decision.reason = f"its weight is also that of {reader}, which reads it as real numbers"


# ---- the new layers ----


def _binary(layer: nn.Linear, options: Mapping[str, Any]) -> QLinear:
    """Return a QLinear with the parameters of an nn.Linear, and with what a user keeps on it as attributes."""
    own = dict(options)
    for name in _OPTIONS[:2]:
        if isinstance(own[name], nn.Module):
            own[name] = copy.deepcopy(own[name]).to(layer.weight.device)
    made = QLinear.from_linear(layer, **own)
    for name, value in own_attributes(layer).items():
        made.__dict__.setdefault(name, value)
    return made
