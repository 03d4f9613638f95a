"""Packs named linear layers of a checkpoint file, without the model: ``python -m bitorch_qlinear convert``."""

from __future__ import annotations

import os
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._inputs import FLOATS
from .._torch import is_plain
from ..checkpoint import recorded_scale
from ..linear import QLinear
from ..packed import PackedQLinear
from .report import _size, reason_against

__all__ = ["OPTIONS", "ConvertReport", "ConvertedLayer", "convert_file", "pack_entries"]

OPTIONS = ("input_quantization", "weight_quantization", "weight_scale")
"""The options of QLinear that change a packed layer's entries, each of which is an option of the command line."""
_TORCH, _SAFETENSORS = (".pt", ".pth", ".bin"), ".safetensors"
_MANY = 8


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer that was packed.

    Attributes:
        name: The layer's name.
        outputs: Rows of the weight.
        inputs: Columns of the weight.
        dtype: The weight's dtype before.
        before: Bytes of the layer's entries before.
        after: Bytes of the layer's entries after.
    """

    name: str
    outputs: int
    inputs: int
    dtype: torch.dtype
    before: int
    after: int


@dataclass(frozen=True)
class ConvertReport:
    """What was packed; ``str`` gives a table.

    Attributes:
        layers: The packed layers.
        kept: Number of the other entries.
        before: Bytes of all tensors before; memory that tensors share counts once.
        after: The same afterwards.
    """

    layers: tuple[ConvertedLayer, ...]
    kept: int
    before: int
    after: int

    def __str__(self) -> str:
        """Return a table with one line for each packed layer, and a line with the sums."""
        header = ("layer", "outputs × inputs", "dtype", "before", "after")
        rows = [
            (
                layer.name or "(model)",
                f"{layer.outputs} × {layer.inputs}",
                str(layer.dtype).removeprefix("torch."),
                _size(layer.before),
                _size(layer.after),
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        ]
        total = f"{len(self.layers)} layers packed, {self.kept} other entries kept; all tensors"
        return "\n".join([*lines, f"{total}: {_size(self.before)} before, {_size(self.after)} after"])


def convert_file(
    source: Path,
    target: Path,
    layers: Sequence[str],
    options: Mapping[str, Any],
    *,
    force: bool = False,
    dry_run: bool = False,
) -> ConvertReport:
    """Read a state dict, pack the named layers, and write the result.

    Everything is checked before anything is written, and the file appears under its name only when it is complete.

    Args:
        source: A file of ``torch.save`` or safetensors, which its extension tells.
        target: The same for the result.
        layers: Regular expressions, one of which matches the whole name of each layer to be packed.
        options: Options of QLinear, whose names are in ``OPTIONS``.
        force: Replace an existing file.
        dry_run: Write nothing.

    Raises:
        ValueError: The files or a layer are not as expected; the message says what was.
        OSError: A file cannot be read or written.
        ImportError: A file is of safetensors, which is not installed.
    """
    _check_target(target, force)
    state, metadata = _read(source)
    converted, report = pack_entries(state, layers, options)
    if target.suffix == _SAFETENSORS:
        _check_for_safetensors(converted)
    if not dry_run:
        _write(converted, metadata, target)
    return report


# ---- entries ----


def pack_entries(
    state: Mapping[str, Any], layers: Sequence[str], options: Mapping[str, Any]
) -> tuple[OrderedDict[str, Any], ConvertReport]:
    """Return the state dict with the entries of packed layers in the place of the named ones.

    Args:
        state: A state dict; it is not changed.
        layers: Regular expressions, one of which matches the whole name of each layer to be packed.
        options: Options of QLinear, whose names are in ``OPTIONS``.

    Raises:
        ValueError: A pattern matches no layer, or a layer cannot be packed.
    """
    names = _choose(state, layers)
    overlapping = _overlapping(state)
    weights = {_entry(name, "weight") for name in names}
    # These are all entries that a layer may have, whatever its sizes are.
    known = list(QLinear(1, 1, device="meta", **options).state_dict())
    scale = options.get("weight_scale")
    problems = [problem for name in names for problem in _problems(name, state, known, weights, overlapping, scale)]
    if problems:
        more = [f"and {len(problems) - _MANY} more"] if len(problems) > _MANY else []
        raise ValueError("\n".join([*problems[:_MANY], *more]))
    result: OrderedDict[str, Any] = OrderedDict()
    vars(result).update(getattr(state, "__dict__", {}))  # torch keeps the modules' versions there
    replaced: dict[str, dict[str, Any]] = {}
    done: list[ConvertedLayer] = []
    shared: dict[Any, Tensor] = {}
    for name in names:
        weight = state[_entry(name, "weight")]
        entries = {entry: state[key] for entry in known if (key := _entry(name, entry)) in state}
        memory = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype
        packed = _pack(name, entries, options, shared.get(memory))
        shared[memory] = packed.weight
        words = replaced[_entry(name, "weight")] = packed.state_dict(prefix=_entry(name, ""))
        outputs, inputs = weight.shape
        done.append(ConvertedLayer(name, outputs, inputs, weight.dtype, _bytes(entries), _bytes(words)))
    gone = {_entry(name, entry) for name in names for entry in known}
    kept = sum(key not in gone for key in state)
    for key, value in state.items():
        if key in replaced:
            result.update(replaced[key])
        elif key not in gone:
            result[key] = value
    return result, ConvertReport(tuple(done), kept, _bytes(state), _bytes(result))


def _entry(layer: str, entry: str) -> str:
    """Return the key of a layer's entry; the name of a layer that is the whole model is empty."""
    return f"{layer}.{entry}" if layer else entry


def _choose(state: Mapping[str, Any], layers: Sequence[str]) -> list[str]:
    """Return the names of the layers that the patterns match, in the order of the state dict."""
    names = [key.removesuffix("weight").removesuffix(".") for key in state if f".{key}".endswith(".weight")]
    chosen: set[str] = set()
    for layer in layers:
        try:
            matching = [name for name in names if re.fullmatch(layer, name)]
        except re.error as error:
            raise ValueError(f"--layers {layer!r}: expected a regular expression; {error}") from error
        if not matching:
            raise ValueError(
                f"--layers {layer!r}: expected a pattern that matches the whole name of a layer, and this one matches "
                f"none; the names with a weight are {_some(names) or 'missing in this file'}"
            )
        chosen.update(matching)
    return [name for name in names if name in chosen]


def _some(names: Iterable[str]) -> str:
    """Return the first names as a text."""
    listed = list(names)
    return ", ".join([*(name or '""' for name in listed[:_MANY]), *(["..."] if len(listed) > _MANY else [])])


def _problems(
    name: str,
    state: Mapping[str, Any],
    known: list[str],
    weights: set[str],
    overlapping: Mapping[str, list[str]],
    weight_scale: str | None,
) -> list[str]:
    """Return why a layer cannot be packed, as sentences.

    Args:
        name: The layer's name.
        state: The state dict.
        known: The entries that a QLinear with the same options may have.
        weights: The names of the weights of all layers that are packed.
        overlapping: The entries whose memory an entry shares.
        weight_scale: The scale of each layer's weights.
    """
    prefix, key = _entry(name, ""), _entry(name, "weight")
    weight, bias = state[key], state.get(f"{prefix}bias")
    if not isinstance(weight, Tensor) or not is_plain(weight):
        return [f"{key}: expected a dense tensor, got a {type(weight).__name__}"]
    if f"{prefix}k" in state and not weight.is_floating_point():
        return [f"{key}: expected float weights, got the words of a layer that is packed already"]
    if weight.dtype not in FLOATS:
        return [f"{key}: expected float64, float32, float16 or bfloat16, got {weight.dtype}"]
    if weight.dim() != 2:
        return [f"{key}: expected the 2-D weight of a linear layer, got shape {tuple(weight.shape)}"]
    if bias is not None and not (isinstance(bias, Tensor) and is_plain(bias) and bias.dtype in FLOATS):
        return [f"{prefix}bias: expected a dense tensor of floats, got {getattr(bias, 'dtype', type(bias).__name__)}"]
    if bias is not None and bias.shape != weight.shape[:1]:
        return [f"{prefix}bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}"]
    if recorded_scale(prefix, state) == "mean" and weight_scale != "mean":
        return [f"{key}: expected weights without weight_scale='mean', got such weights: give --weight-scale mean"]
    own = [other for other in state if other.startswith(prefix) and other.removeprefix(prefix) not in known]
    if own:
        hint = ": a learned scale needs --weight-scale learned" if f"{prefix}scale" in own else ""
        return [
            f"{key}: expected the weight of a linear layer, which has no entry except its bias, got {_some(own)} too"
            f"{hint}"
        ]
    parent = name.removesuffix("out_proj")
    if parent != name and {f"{parent}in_proj_weight", f"{parent}q_proj_weight"} & state.keys():
        return [f"{key}: expected the weight of a layer that is called; nn.MultiheadAttention reads this one itself"]
    tied = [other for other in overlapping.get(key, ()) if other not in weights]
    if tied:
        return [
            f"{key}: expected a weight of its own, got one that shares its memory with {_some(tied)}, which stays real"
        ]
    return []


def _pack(name: str, entries: dict[str, Tensor], options: Mapping[str, Any], words: Tensor | None) -> PackedQLinear:
    """Return the packed layer that ``pack`` makes of a QLinear with these entries in eval mode.

    Args:
        name: The layer's name, for errors.
        entries: The layer's entries.
        options: Options of QLinear.
        words: Its packed weights if it shares them with another layer; None packs them.

    Raises:
        ValueError: The layer lacks an entry, or cannot be packed.
    """
    outputs, inputs = entries["weight"].shape
    layer = QLinear(inputs, outputs, "bias" in entries, device="meta", **options).eval()
    try:
        layer.load_state_dict(entries, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from error
    reason = reason_against(layer)
    if reason:
        raise ValueError(f"{name}: cannot be packed: {reason}")
    return PackedQLinear.from_float(layer, words)


# ---- memory ----


def _range(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's values and the one behind its last."""
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _overlapping(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return for each entry that shares memory with others the names of these."""
    ranges: defaultdict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and is_plain(tensor) and tensor.numel():
            ranges[tensor.untyped_storage().data_ptr()].append((*_range(tensor), key))
    return {
        key: others
        for entries in ranges.values()
        for begin, end, key in entries
        if (others := [other for b, e, other in entries if other != key and b < end and begin < e])
    }


def _bytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of all tensors; those of tensors with the same memory count once."""
    tensors = [tensor for tensor in state.values() if isinstance(tensor, Tensor)]
    sizes = {
        (_range(tensor) if is_plain(tensor) and tensor.numel() else id(tensor)): tensor.numel() * tensor.element_size()
        for tensor in tensors
    }
    return sum(sizes.values())


# ---- files ----


def _check_target(target: Path, force: bool) -> None:
    _check_extension(target)
    if target.is_dir():
        raise ValueError(f"{target}: expected a file, got a folder")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: expected a folder {target.parent} that exists")
    if os.path.lexists(target) and not force:
        raise ValueError(f"{target}: expected a name that is free, got an existing file, which --force replaces")


def _check_extension(path: Path) -> None:
    known = (*_TORCH, _SAFETENSORS)
    if path.suffix not in known:
        raise ValueError(f"{path}: expected the extension {', '.join(known)}, got {path.suffix or 'none'}")


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Return the state dict in a file, and the metadata of a safetensors file."""
    _check_extension(path)
    if path.suffix == _SAFETENSORS:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a safetensors file; {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what torch raises depends on the bytes of the file
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: expected a state dict that torch.load(weights_only=True) can read; {said}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path}: expected a state dict, got a {type(state).__name__}")
    if not any(isinstance(value, Tensor) for value in state.values()):
        nested = [key for key, value in state.items() if isinstance(value, Mapping)]
        more = f" but the dictionaries {_some(nested)}: save the state dict among them alone" if nested else ""
        raise ValueError(f"{path}: expected a state dict, got one without tensors{more}")
    return state, {}


def _check_for_safetensors(state: OrderedDict[str, Any]) -> None:
    """Check that safetensors can hold the entries, and give shared words a copy for each layer.

    Raises:
        ValueError: An entry is no tensor, or entries share memory.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{key}: expected a tensor, because safetensors holds no {type(value).__name__}: write a .pt"
            )
    overlapping = _overlapping(state)
    for key in overlapping:
        if state[key].dtype is torch.int32 and f"{key.removesuffix('weight')}k" in state:
            state[key] = state[key].clone()
        else:
            raise ValueError(
                f"{key}: expected memory of its own, because safetensors holds no shared tensors, got that of "
                f"{_some(overlapping[key])}: write a .pt, or remove all but one of them"
            )


def _write(state: Mapping[str, Any], metadata: Mapping[str, str], target: Path) -> None:
    """Write a file beside the target, which then takes its place at once."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        if target.suffix == _SAFETENSORS:
            from safetensors.torch import save_file

            contiguous = {key: tensor.contiguous() for key, tensor in state.items()}
            save_file(contiguous, beside, {**metadata, "format": "pt"})
        else:
            torch.save(state, beside)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
