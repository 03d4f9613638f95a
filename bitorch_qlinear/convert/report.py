"""A report of what computes each binary layer of a model and whether it can be packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from .._torch import has_hooks, is_dtensor, is_plain
from ..checkpoint import word_rows, words_for
from ..fused import Fusion, fusions
from ..linear import QLinear, check_weight_scale, reason_of_call
from ..packed import PackedQLinear, check_rules, input_rule_of, pack_weight, weight_rule_of
from ..quantizations import binary_rule
from .bitorch_layers import is_bitorch_layer, qlinear_of, reason_against_sharing

__all__ = ["LayerReport", "Report", "binary_layers", "explain", "reason_against", "tensor_id"]


@dataclass(frozen=True)
class LayerReport:
    """The report on one binary layer.

    Attributes:
        name: The layer's path in the model ("" for the model itself).
        kind: "PackedQLinear", "bitorch QLinear", or the name of the layer's class: "QLinear" or that of a subclass.
        path: What computes the layer's product, in words.
        packable: Whether :func:`bitorch_qlinear.pack` replaces the layer.
        reason: Why it is not replaced; "" if it is, or if it is already packed.
        float_bytes: Bytes of the float weights; for a packed layer, of the float32 weights that it replaces.
        packed_bytes: Bytes of the packed words, which a checkpoint holds; 0 if the layer cannot be packed. The scale is
            not counted, as the bias is not.
        resident_bytes: Bytes that the weights take in memory now.
        input: "limits through" the modules before a packed layer that a :class:`FusedSequential` replaces by limits on
            their input, or the reason why it computes them; "" if there are none.
        output: "words for the next layer" through the modules up to its sign, in a :class:`FusedSequential`, or the
            reason why a packed layer writes floats; "" for layers that are not packed.
    """

    name: str
    kind: str
    path: str
    packable: bool
    reason: str
    float_bytes: int
    packed_bytes: int
    resident_bytes: int
    input: str = ""
    output: str = ""


@dataclass(frozen=True)
class Report:
    """The report on all binary layers of a model; ``str`` gives a table.

    Attributes:
        layers: The layers in the order of ``model.named_modules()``.
        resident_bytes: Bytes that all their weights take in memory now; weights that layers share count once.
    """

    layers: tuple[LayerReport, ...]
    resident_bytes: int

    def __iter__(self) -> Iterator[LayerReport]:
        """Iterate over the layers."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    def __str__(self) -> str:
        """Return a table with one line for each layer, and a line with the sums."""
        if not self.layers:
            return "no QLinear or PackedQLinear in this model"
        header = ("layer", "kind", "computed by", "float", "packed", "in memory", "pack()", "input", "output")
        rows = [
            (
                layer.name or "(model)",
                layer.kind,
                layer.path,
                _size(layer.float_bytes),
                _size(layer.packed_bytes) if layer.packed_bytes else "-",
                _size(layer.resident_bytes),
                "packs it" if layer.packable else layer.reason or "is packed",
                layer.input or "-",
                layer.output or "-",
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        packed = sum(layer.kind == "PackedQLinear" for layer in self.layers)
        left = sum(layer.packable for layer in self.layers)
        total = (
            f"{len(self.layers)} binary layers: {packed} packed, {left} that pack() would pack; "
            f"{_size(self.resident_bytes)} of weights"
        )
        return "\n".join([*lines, total])


def _size(count: int) -> str:
    """Return a number of bytes as text, in units of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _packed_bytes(layer: nn.Linear) -> int:
    """Return the bytes of the words of a QLinear, of this package or of bitorch, that can be packed."""
    quantization = (layer if isinstance(layer, QLinear) else qlinear_of(layer)).weight_quantization
    return 4 * word_rows(layer.weight.shape[0], weight_rule_of(quantization)) * words_for(layer.weight.shape[1])


GATHER = (
    "gather the weights (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load "
    "them into a model that is not sharded, and pack that"
)


def reason_against(layer: nn.Module, parent: nn.Module | None = None, name: str = "") -> str:
    """Return the reason why a QLinear cannot be packed, or "" if it can.

    Args:
        layer: The layer, of this package or of bitorch.
        parent: A module that holds the layer, or None.
        name: The layer's name in the parent.
    """
    if isinstance(parent, nn.MultiheadAttention) and name == "out_proj":
        return "nn.MultiheadAttention reads out_proj.weight itself and never calls the layer"
    if is_bitorch_layer(layer):
        reason = reason_against_sharing(layer)
        if reason:
            return reason
        layer = qlinear_of(layer)
    assert isinstance(layer, QLinear)
    if is_dtensor(layer.weight):
        return f"its weight is sharded: {GATHER}"
    if not is_plain(layer.weight):
        return f"its weight is a {type(layer.weight).__name__}, whose signs cannot be packed"
    if reason := reason_of_call(layer):
        return reason
    for what, module in (
        ("input quantization", layer.input_quantization),
        ("weight quantization", layer.weight_quantization),
    ):
        if has_hooks(module):
            return f"its {what} has hooks"
    try:
        check_rules(input_rule_of(layer.input_quantization), weight_rule_of(layer.weight_quantization))
        if binary_rule(layer.weight_quantization) is None:
            pack_weight(layer.weight, layer.weight_quantization)
        check_weight_scale(layer.weight_scale, layer.weight_quantization)
        layer.channel_scale()
    except ValueError as error:
        return str(error)
    return ""


def tensor_id(layer: nn.Module, name: str) -> int:
    """Return a number that layers have in common if they share the tensor of this name.

    A computed tensor, as by a parametrization, is a new one at each access, and the next one may get its id. It has the
    id of the layer.
    """
    is_kept = any(name in table for table in (layer._parameters, layer._buffers, layer.__dict__))
    return id(getattr(layer, name) if is_kept else layer)


def binary_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module | None, nn.Module]]:
    """Yield the path, a parent and the layer for each QLinear, of this package or bitorch's, and each PackedQLinear."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, (QLinear, PackedQLinear)) or is_bitorch_layer(module):
            yield path, modules.get(path.rpartition(".")[0]) if path else None, module


def explain(model: nn.Module) -> Report:
    """Report for each binary layer what computes it, whether ``pack`` would replace it or why not, and its size.

    For a packed layer it also reports whether its output becomes words for the next layer, and modules before it become
    limits. To find that out, the modules around packed layers of an ``nn.Sequential`` are evaluated.

    Args:
        model: Any module, packed or not.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {model!r:.60}")
    found = list(binary_layers(model))
    tensors: dict[int, int] = {}
    for _, _, layer in found:
        for name, tensor in (("weight", layer.weight), ("weight_prepared", getattr(layer, "weight_prepared", None))):
            if isinstance(tensor, Tensor):
                tensors[tensor_id(layer, name)] = _bytes(tensor)
    fused = fusions(model)
    return Report(tuple(_explain_layer(*each, fused) for each in found), sum(tensors.values()))


def _explain_layer(path: str, parent: nn.Module | None, layer: nn.Module, found: dict[int, Fusion]) -> LayerReport:
    if isinstance(layer, PackedQLinear):
        words = layer.weight
        float_bytes = 4 * layer.in_features * layer.out_features
        resident = _bytes(words, layer.weight_prepared)
        fusion = found.get(id(layer), Fusion("", "no nn.Sequential calls it"))
        sizes = float_bytes, _bytes(words), resident
        return LayerReport(path, "PackedQLinear", layer.path, False, "", *sizes, fusion.input, fusion.output)
    reason = reason_against(layer, parent, path.rpartition(".")[2])
    assert isinstance(layer, nn.Linear)
    float_bytes = _bytes(layer.weight)
    packed = 0 if reason else _packed_bytes(layer)
    kind = type(layer).__name__ if isinstance(layer, QLinear) else "bitorch QLinear"
    computed = layer.path if isinstance(layer, QLinear) else "float (by bitorch)"
    if "never calls" in reason:
        computed = "float (its parent reads the weight)"
    return LayerReport(path, kind, computed, not reason, reason, float_bytes, packed, float_bytes)
