"""Registers binary layers with Hugging Face transformers: ``import bitorch_qlinear.transformers``.

After the import, ``from_pretrained(folder, quantization_config=BitorchQLinearConfig())`` returns a model whose chosen
linear layers are QLinear. ``save_pretrained`` writes into ``config.json`` which layers are binary or packed, and
``from_pretrained`` builds the same layers again. The package itself never imports transformers.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

try:
    from transformers import PreTrainedModel
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(f"bitorch_qlinear.transformers: expected transformers 5.22 or newer ({error})") from error
if not hasattr(HfQuantizer, "get_new_dtype"):
    raise ImportError("bitorch_qlinear.transformers: expected transformers 5.22 or newer, got an older one")

from bitorch_qlinear.convert import binarize, explain_binarize
from bitorch_qlinear.convert.replacement import replace
from bitorch_qlinear.convert.report import binary_layers
from bitorch_qlinear.linear import QLinear
from bitorch_qlinear.packed import PackedQLinear
from bitorch_qlinear.quantizations import get_quantization, quantization_names

__all__ = ["QUANT_METHOD", "BitorchQLinearConfig", "BitorchQLinearQuantizer", "attach_quantizer"]

QUANT_METHOD = "bitorch_qlinear"
"""The name under which ``config.json`` records this quantization."""

_Model = TypeVar("_Model", bound=nn.Module)
_logger = logging.getLogger(__name__)

# A new option of binarize() or of the layers is an option here as soon as their signatures have it.
_OPTIONS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(binarize).parameters.items()
    if name not in ("model", "filter_fn", "inplace")
}
_LAYER_OPTIONS = [
    name
    for name, parameter in inspect.signature(QLinear.from_linear).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
]


@register_quantization_config(QUANT_METHOD)
class BitorchQLinearConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which linear layers of a transformers model become binary, and how.

    The fields are the arguments of :func:`bitorch_qlinear.binarize`, except that `modules_to_not_convert` replaces
    `filter_fn`, and that `rules` becomes a list of pairs, because ``config.json`` holds neither functions nor the order
    of a mapping. ``save_pretrained`` adds `binary_layers` and `packed_layers`. Once they exist, they alone decide which
    layers are built, so that another class of model with the same body loads the same binary layers.

    Attributes:
        modules_to_not_convert: Names of modules that stay real, or None.
        binary_layers: The options in which each binary layer differs from the fields above, by the layer's name; None
            before the first load.
        packed_layers: The names of those binary layers that are packed.
    """

    quant_method: str
    modules_to_not_convert: list[str] | None
    binary_layers: dict[str, dict[str, Any]] | None
    packed_layers: list[str]

    def __init__(
        self,
        *,
        modules_to_not_convert: Sequence[str] | None = None,
        binary_layers: Mapping[str, Mapping[str, Any]] | None = None,
        packed_layers: Sequence[str] = (),
        quant_method: str = QUANT_METHOD,
        **options: Any,
    ) -> None:
        """Check and keep the fields.

        Args:
            modules_to_not_convert: Each entry is one or more whole components of a module's name: ``"pooler"`` leaves
                out all linear layers in any module called pooler, ``"layer.1"`` those in layer 1, but not in layer 11.
            binary_layers: Written by ``save_pretrained``.
            packed_layers: Written by ``save_pretrained``.
            quant_method: Always ``"bitorch_qlinear"``.
            options: The other arguments of :func:`bitorch_qlinear.binarize`, with the same defaults. A quantization is
                given by its name; `rules` may be a mapping or a list of pairs.

        Raises:
            TypeError: An option is unknown, has a wrong type, or cannot be written into ``config.json``.
            ValueError: An option has a wrong value.
        """
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method: expected {QUANT_METHOD!r}, got {quant_method!r}")
        if "filter_fn" in options:
            raise TypeError(
                "filter_fn: expected modules_to_not_convert or rules instead: config.json cannot hold a function"
            )
        for name in options:
            if name not in _OPTIONS:
                raise TypeError(f"{name}: expected one of {', '.join(['modules_to_not_convert', *_OPTIONS])}")
        self.quant_method = quant_method
        self.modules_to_not_convert = _check_names(modules_to_not_convert)
        for name, default in _OPTIONS.items():
            value = options.get(name, default)
            setattr(self, name, _check_json(name, _pairs(value) if name == "rules" else value))
        self.binary_layers = None
        if binary_layers is not None:
            self.binary_layers = {name: dict(own) for name, own in binary_layers.items()}
        self.packed_layers = list(packed_layers)
        # A pattern that matches no layer is an error, so only the layers can tell whether the rules are right.
        explain_binarize(nn.Identity(), **{**self.options(), "rules": None})

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``binarize``, without those that `modules_to_not_convert` adds."""
        options = {name: getattr(self, name) for name in _OPTIONS}
        if options["rules"] is not None:
            options["rules"] = {pattern: own for pattern, own in options["rules"]}
        return options


def _pairs(rules: Any) -> Any:
    """Return rules as a list of pairs: ``config.json`` sorts the keys of a mapping, and the first rule counts.

    Raises:
        TypeError: They are neither a mapping nor a sequence of pairs.
    """
    if rules is None:
        return None
    if isinstance(rules, Mapping):
        rules = list(rules.items())
    if not (
        isinstance(rules, (list, tuple)) and all(isinstance(rule, (list, tuple)) and len(rule) == 2 for rule in rules)
    ):
        raise TypeError(
            f"rules: expected a mapping of patterns to options or None, or a list of pairs; got {rules!r:.60}"
        )
    return [[pattern, own if own is None else dict(own)] for pattern, own in rules]


def _check_json(name: str, value: Any) -> Any:
    """Return a value that JSON can hold.

    Raises:
        TypeError: It cannot.
    """
    try:
        json.dumps(value)
    except TypeError as error:
        raise TypeError(
            f"{name}: expected what config.json can hold, such as the name of a quantization (register_quantization "
            f"gives your own class one), got {value!r:.60}"
        ) from error
    return copy.deepcopy(value)


def _check_names(names: Sequence[str] | None) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"modules_to_not_convert: expected a list of names or None, got {names!r:.60}")
    return list(names)


@register_quantizer(QUANT_METHOD)
class BitorchQLinearQuantizer(HfQuantizer):  # type: ignore[misc]
    """What ``from_pretrained`` and ``save_pretrained`` call to build, check and record the binary layers."""

    requires_calibration = False
    quantization_config: BitorchQLinearConfig

    def __init__(self, quantization_config: BitorchQLinearConfig, **kwargs: Any) -> None:
        """Keep the configuration.

        Args:
            quantization_config: The configuration; it is not changed.
            kwargs: Passed to transformers' class.

        Raises:
            ValueError: It describes packed layers, but the folder holds float weights.
        """
        super().__init__(quantization_config, **kwargs)
        if quantization_config.packed_layers and not self.pre_quantized:
            raise ValueError(
                "quantization_config.packed_layers: expected none, because the folder is not of a packed model: load "
                "it without packed_layers, and call bitorch_qlinear.pack(model)"
            )

    @property
    def is_trainable(self) -> bool:
        """Whether the layers that are not packed can be trained, which they always can."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether transformers' Trainer may train all weights, which is so unless some layers are packed."""
        return not self.quantization_config.packed_layers

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works, which it always does."""
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype in which a tensor of the checkpoint is loaded, or None to keep its own.

        Floats are never cast to the words' dtype, so that the layer's own check sees what the checkpoint holds.
        """
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new if new is not None and new.is_floating_point else None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Replace layers of a model whose tensors are all on the meta device."""
        layers = self.quantization_config.binary_layers
        if layers is None:
            self._choose(model)
        else:
            self._rebuild(model, layers)
        return model

    def _choose(self, model: Any) -> None:
        """Binarize the model as the configuration says."""
        options = self.quantization_config.options()
        left = _rules_against(model, self.quantization_config.modules_to_not_convert or [])
        options["rules"] = {**left, **(options["rules"] or {})} or None
        # transformers ties these weights only after loading, and binarize() must see which ones are shared.
        for target, source in getattr(model, "all_tied_weights_keys", {}).items():
            path, _, attribute = target.rpartition(".")
            setattr(model.get_submodule(path), attribute, model.get_parameter(source))
        binarize(model, inplace=True, **options)

    def _rebuild(self, model: Any, layers: dict[str, dict[str, Any]]) -> None:
        """Make exactly those layers binary that the configuration records.

        Args:
            model: The model.
            layers: The options in which each layer differs from the configuration's, by its name.

        Raises:
            ValueError: The model has none of these layers, or one of them is no ``nn.Linear``.
        """
        config = self.quantization_config
        shared = {name: value for name, value in config.options().items() if name in _LAYER_OPTIONS}
        modules, packed = dict(model.named_modules()), set(config.packed_layers)
        replacements: dict[int, nn.Module] = {}
        absent: list[str] = []
        words: set[str] = set()
        for name, own in layers.items():
            path = next((path for path in _paths(name, model.base_model_prefix) if path in modules), None)
            if path is None:
                absent.append(name)
                continue
            layer = modules[path]
            if type(layer) is not nn.Linear:
                raise ValueError(f"binary_layers[{name!r}]: expected an nn.Linear, got a {type(layer).__name__}")
            options = {**shared, **own}
            if name in packed:
                bias, dtype = layer.bias is not None, layer.weight.dtype
                made: nn.Module = PackedQLinear(
                    layer.in_features, layer.out_features, bias, device=layer.weight.device, dtype=dtype, **options
                )
                words.add(f"{path}.weight")
            else:
                made = QLinear.from_linear(layer, **options)
            replacements[id(layer)] = made
        if absent and not replacements:
            raise ValueError(
                f"binary_layers: expected layers of a {type(model).__name__}, got {absent[0]!r} and other names "
                "that it does not have: load the class that was saved, or one with the same body"
            )
        if absent:
            _logger.info("%s has no %s, which the saved model had", type(model).__name__, ", ".join(absent))
        replace(model, replacements, True, {})
        # transformers ties parameters only. Words that were shared are in the checkpoint once for each layer.
        ties = getattr(model, "all_tied_weights_keys", {})
        for target in [target for target, source in ties.items() if words & {target, source}]:
            del ties[target]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check and prepare what transformers has put into the packed layers, and record the layers.

        Raises:
            RuntimeError: An entry of a packed layer is missing, or does not fit the layer.
        """
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, (QLinear, PackedQLinear)):
                continue
            read = _initialize(name, layer)
            if isinstance(layer, QLinear):
                continue
            try:
                layer.load_state_dict(read, assign=True)
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from error
            for parameter in layer.parameters(recurse=False):
                parameter.requires_grad_(False)  # transformers has made trainable Parameters of what it has read
        self.record(model)
        return model

    def record(self, model: Any) -> None:
        """Write into the model's configuration which of its layers are binary and packed now, and their options.

        Raises:
            ValueError: A layer is of a subclass, or has a quantization that a name alone does not describe.
        """
        config = copy.deepcopy(self.quantization_config)
        shared = {name: value for name, value in config.options().items() if name in _LAYER_OPTIONS}
        like = _options_of("quantization_config", QLinear(1, 1, device="meta", **shared))
        config.binary_layers, config.packed_layers = {}, []
        for name, _, layer in binary_layers(model):
            if type(layer) not in (QLinear, PackedQLinear):
                raise ValueError(f"{name}: expected a QLinear or a PackedQLinear, got a {type(layer).__name__}")
            options = _options_of(name, layer)
            config.binary_layers[name] = {
                option: options[option] for option in options if options[option] != like[option]
            }
            if isinstance(layer, PackedQLinear):
                config.packed_layers.append(name)
        self.quantization_config = model.config.quantization_config = config

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Record the layers, which ``save_pretrained`` asks for before it writes ``config.json``.

        Returns:
            None for the model's own state dict, or the state dict if layers share words, with a copy for each, because
            safetensors cannot hold shared memory. No metadata.
        """
        self.record(model)
        words = [layer.weight for layer in model.modules() if isinstance(layer, PackedQLinear)]
        if len({tensor.data_ptr() for tensor in words}) == len(words):
            return None, {}
        state: dict[str, Tensor] = model.state_dict()
        for name in model.config.quantization_config.packed_layers:
            state[f"{name}.weight"] = state[f"{name}.weight"].clone()
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        raise NotImplementedError(
            "dequantize: a binary layer has no float form with the same output; bitorch_qlinear.unpack(model) makes "
            "QLinear layers of packed ones"
        )


def attach_quantizer(model: _Model) -> _Model:
    """Let ``save_pretrained`` record the binary layers of a model that was loaded without a BitorchQLinearConfig.

    A model that was made binary by :func:`bitorch_qlinear.binarize` or by hand needs it. It may be called before or
    after :func:`bitorch_qlinear.pack`, because ``save_pretrained`` records the layers that it finds.

    Args:
        model: A transformers model with QLinear or PackedQLinear layers.

    Returns:
        The model itself.

    Raises:
        TypeError: It is no transformers model.
        ValueError: It has no binary layer, a binary layer cannot be described in ``config.json``, or another method has
            quantized the model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    present = getattr(model, "hf_quantizer", None)
    if present is not None and not isinstance(present, BitorchQLinearQuantizer):
        raise ValueError(f"model: expected one that no other method has quantized, got a {type(present).__name__}")
    if not any(True for _ in binary_layers(model)):
        raise ValueError("model: expected QLinear or PackedQLinear layers, found none: call binarize(model) first")
    quantizer = present or BitorchQLinearQuantizer(BitorchQLinearConfig())
    quantizer.record(model)
    model.hf_quantizer = quantizer
    return model


# ---- names and options ----


def _paths(name: str, prefix: str) -> list[str]:
    """Return what a layer may be called in this model, whose body may have been inside another one, or the reverse."""
    return [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]


def _rules_against(model: nn.Module, names: Sequence[str]) -> dict[str, None]:
    """Return a rule for each name that leaves out the layers whose path contains it.

    Raises:
        ValueError: A name is in no linear layer's path.
    """
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    rules = {name: rf"(.*\.)?{re.escape(name)}(\..*)?" for name in names}
    for name, rule in rules.items():
        if not any(re.fullmatch(rule, path) for path in layers):
            raise ValueError(
                f"modules_to_not_convert: expected names of linear layers, or of modules that hold some, got {name!r}; "
                f"the linear layers are {', '.join(layers):.300}"
            )
    return dict.fromkeys(rules.values())


def _initialize(name: str, layer: nn.Module) -> dict[str, Tensor]:
    """Give the tensors of a layer that the folder does not hold their first values, and return those that it holds.

    transformers marks the tensors that it has read. It initializes the others if they are the weight or the bias of an
    ``nn.Linear``, and leaves all the rest, such as parameters of a quantization, with arbitrary values.

    Args:
        name: The layer's name, for errors.
        layer: A QLinear, or a PackedQLinear, whose own entries are not touched.
    """
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    read = {key: tensor for key, tensor in tensors.items() if getattr(tensor, "_is_hf_initialized", False)}
    absent = tensors.keys() - read.keys() - {"weight", "bias"}
    if isinstance(layer, PackedQLinear):
        absent = {key for key in absent if "." in key}
    if absent:
        options = _options_of(name, layer)
        if isinstance(layer, QLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight, linear.bias = layer.weight, layer.bias
            fresh: nn.Module = QLinear.from_linear(linear, **options)
        else:
            fresh = PackedQLinear(1, 1, **options)  # the tensors of quantizations do not depend on the layer's sizes
        first = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
        with torch.no_grad():
            for key in absent:
                tensors[key].copy_(first[key])
    return read


def _options_of(name: str, layer: nn.Module) -> dict[str, Any]:
    """Return the options of a binary layer as JSON can hold them."""
    values = {option: getattr(layer, option) for option in _LAYER_OPTIONS}
    return {
        option: _name_of(f"{name}.{option}", value) if isinstance(value, nn.Module) else value
        for option, value in values.items()
    }


def _name_of(where: str, quantization: nn.Module) -> str:
    """Return the name that makes the same quantization again.

    Raises:
        ValueError: There is none.
    """
    cls = type(quantization)
    name = getattr(cls, "name", None)
    if isinstance(name, str) and name in quantization_names():
        made = get_quantization(name)
        if type(made) is cls and _settings(made) == _settings(quantization):
            return name
    raise ValueError(
        f"{where}: expected a registered quantization with default settings, which config.json can name, got "
        f"{quantization!r:.60}: give a class of its own to it, and register that by register_quantization"
    )


def _settings(quantization: nn.Module) -> object:
    """Return the settings of a quantization in a form that can be compared."""
    if type(quantization).__module__ == "bitorch_qlinear.quantizations":
        return repr(quantization)  # which names all settings that count, and no scale that is not used
    return {key: repr(value) for key, value in vars(quantization).items() if key[0] != "_" and key != "training"}
