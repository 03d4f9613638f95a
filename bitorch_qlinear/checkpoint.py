"""The format of a packed layer's state dict, and the messages about one that does not have it.

The entries of a packed layer are

    weight       the words: int32 (or uint32), shape (n, ceil(k / 32)), bits past k zero
    bias         n floats, if the layer has a bias
    scale        n floats, if the weights have a scale for each output channel
    k            K, int64
    format       the version of this format, int64
    input_rule   how the input becomes bits, int64: an index into `INPUT_RULES`
    weight_rule  how float weights became bits, int64: an index into `WEIGHT_RULES`

All of them are tensors, so that torch.save, safetensors and distributed checkpoints can hold them. Checkpoints from
before the format had a version lack the last three entries; they load as well, except into layers of ternary weights,
which such a checkpoint cannot hold. A checkpoint with a scale, or of a layer that rounds its input to levels, has
format 2, because a reader of format 1 knows neither; one of ternary weights has format 3; all others have format 1. The
words of ternary weights have 2n rows: first those of the signs "+1 unless w < 0", and then those of the signs "+1 if w
> 0", and a weight is the mean of its two signs.

A state dict of float weights has no entry for a scale that is computed from them. The kind of the scale is recorded
beside the entries, in the metadata where torch keeps the versions of modules. ``torch.save`` writes the metadata, and
safetensors does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FORMAT",
    "INPUT_RULES",
    "LEVEL_INPUTS",
    "NUMBERS",
    "QUANTIZED_WEIGHT",
    "REAL_INPUT",
    "SIGN_INPUTS",
    "STRICT_INPUT",
    "TERNARY_WEIGHT",
    "WEIGHT_RULES",
    "format_of",
    "problem_of_lost_scale",
    "problem_of_packed",
    "problem_of_scale_in_float",
    "problem_of_words_in_float",
    "record_scale",
    "recorded_scale",
    "word_rows",
    "words_for",
]

FORMAT = 3
"""The newest format that this version of the package reads; it also reads all older ones."""
INPUT_RULES = (
    "+1 unless x < 0, else -1",
    "+1 if x > 0, else -1",
    "real values as they are",
    "0 or 1, whichever is nearer",
    "0, 1/3, 2/3 or 1, whichever is nearest",
)
STRICT_INPUT, REAL_INPUT = 1, 2
SIGN_INPUTS = (0, STRICT_INPUT)
LEVEL_INPUTS = {1: 3, 2: 4}
"""The indices of the rules that round x to levels, by the bits of a level."""
WEIGHT_RULES = (
    "+1 unless w < 0, else -1",
    "+1 if w > 0, else -1",
    "the signs of quantized weights",
    "ternary: -1, 0 or +1",
)
QUANTIZED_WEIGHT, TERNARY_WEIGHT = 2, 3
NUMBERS = ("k", "format", "input_rule", "weight_rule")
"""The entries that hold a single number."""


def format_of(scaled: bool, input_rule: int, weight_rule: int) -> int:
    """Return the format in which a layer with or without a scale, and with these rules, is saved."""
    if weight_rule == TERNARY_WEIGHT:
        return 3
    return 2 if scaled or input_rule in LEVEL_INPUTS.values() else 1


def word_rows(n: int, weight_rule: int) -> int:
    """Return the number of rows of words that the weights of n outputs take."""
    return 2 * n if weight_rule == TERNARY_WEIGHT else n


def words_for(k: int) -> int:
    """Return the number of words that k values take."""
    return -(-k // 32)


def problem_of_words_in_float(prefix: str, state_dict: Mapping[str, Any]) -> str | None:
    """Return the error message for a float layer that would load a packed layer's entries, or None if it would not."""
    weight = state_dict.get(f"{prefix}weight")
    if not isinstance(weight, Tensor) or weight.is_floating_point() or f"{prefix}k" not in state_dict:
        return None
    return (
        f"{prefix}weight: expected float weights, got the words of a packed layer: load them into a PackedQLinear, or "
        "into bitorch_qlinear.pack(model), and go back by bitorch_qlinear.unpack(model)"
    )


def problem_of_scale_in_float(prefix: str, state_dict: Mapping[str, Any], has_scale: bool, learned: bool) -> str | None:
    """Return the error message for a float layer whose state dict has a scale that it lacks, or the reverse, or None.

    This is an error even with ``strict=False``, because the layer would compute other values than the one that was
    saved.

    Args:
        prefix: Prefix of the entries' names.
        state_dict: The checkpoint.
        has_scale: Whether the layer has an entry of this name.
        learned: Whether that is a learned scale of the weights.
    """
    key = f"{prefix}scale"
    if key in state_dict and not has_scale:
        return (
            f"{key}: expected no learned scale, got a checkpoint that has one: load it into a layer with "
            "weight_scale='learned'"
        )
    if learned and key not in state_dict and f"{prefix}weight" in state_dict:
        return (
            f"{key}: expected the learned scale of each output, got a checkpoint without it: load it into a layer of "
            "the kind that saved it, and make that one a layer with weight_scale='learned' by QLinear.from_linear or "
            "bitorch_qlinear.binarize"
        )
    return None


def record_scale(prefix: str, state_dict: Mapping[str, Any], kind: str) -> None:
    """Write the kind of a layer's scale into the metadata of a state dict, if it has some for the layer."""
    metadata = _metadata(prefix, state_dict)
    if metadata is not None:
        metadata["weight_scale"] = kind


def recorded_scale(prefix: str, state_dict: Mapping[str, Any]) -> str | None:
    """Return the kind of a layer's scale that the metadata of a state dict tells, or None."""
    return (_metadata(prefix, state_dict) or {}).get("weight_scale")


def _metadata(prefix: str, state_dict: Mapping[str, Any]) -> dict[str, Any] | None:
    found: dict[str, Any] | None = (getattr(state_dict, "_metadata", None) or {}).get(prefix.removesuffix("."))
    return found


def problem_of_lost_scale(
    prefix: str, state_dict: Mapping[str, Any], metadata: Mapping[str, Any], scaled: bool
) -> str | None:
    """Return the error message for a layer that would load float weights without the scale computed from them, or None.

    Args:
        prefix: Prefix of the entries' names.
        state_dict: The checkpoint.
        metadata: What torch keeps of the layer beside its entries.
        scaled: Whether the layer has a scale.
    """
    weight = state_dict.get(f"{prefix}weight")
    if scaled or metadata.get("weight_scale") != "mean" or not isinstance(weight, Tensor):
        return None
    if not weight.is_floating_point():
        return None
    return (
        f"{prefix}weight: expected weights that have no scale, got those of a layer with weight_scale='mean': load "
        "them into such a layer, or load dict(state_dict) to leave out the scale"
    )


def problem_of_packed(
    prefix: str,
    state_dict: Mapping[str, Any],
    n: int,
    k: int,
    input_rule: int,
    weight_rule: int,
    scaled: bool = False,
    computes_scale: bool = False,
) -> str | None:
    """Return the first problem of a packed layer's entries as an error message, or None.

    Args:
        prefix: Prefix of the entries' names.
        state_dict: The checkpoint. Missing entries are no problem here, because torch reports them.
        n: Outputs of the layer that loads the checkpoint.
        k: Inputs of the layer.
        input_rule: The layer's index into `INPUT_RULES`.
        weight_rule: The layer's index into `WEIGHT_RULES`.
        scaled: Whether the layer has a scale.
        computes_scale: Whether the layer computes its scale from float weights instead of loading it.
    """
    expected = {
        "k": k,
        "format": format_of(scaled, input_rule, weight_rule),
        "input_rule": input_rule,
        "weight_rule": weight_rule,
    }
    numbers = {name: state_dict[f"{prefix}{name}"] for name in NUMBERS if f"{prefix}{name}" in state_dict}
    problems = [_problem_of_number(f"{prefix}{name}", number, expected[name]) for name, number in numbers.items()]
    for name in ("weight", "bias", "scale"):
        key = f"{prefix}{name}"
        tensor = state_dict.get(key)
        if isinstance(tensor, Tensor) and name == "weight":
            problems.insert(0, _problem_of_words(key, tensor, n, k, weight_rule))
        elif isinstance(tensor, Tensor):
            problems.insert(0, _problem_of_vector(key, tensor, n))
    problems.insert(0, _problem_of_presence(prefix, state_dict, scaled, computes_scale))
    if weight_rule == TERNARY_WEIGHT:
        problems.append(_problem_of_unmarked_words(prefix, state_dict))
    # A newer format explains all other differences.
    problems.insert(0, _problem_of_newer_format(f"{prefix}format", numbers.get("format")))
    return next(filter(None, problems), None)


def _problem_of_layout(key: str, tensor: Tensor) -> str | None:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"{key}: expected a dense tensor, got layout {tensor.layout}"
    return None


def _problem_of_words(key: str, words: Tensor, n: int, k: int, weight_rule: int) -> str | None:
    if problem := _problem_of_layout(key, words):
        return problem
    if words.is_floating_point():
        if words.shape != (n, k):
            return f"{key}: expected float weights of shape {(n, k)}, got {tuple(words.shape)}"
        return None
    if words.dtype not in (torch.int32, torch.uint32):
        return f"{key}: expected packed words of dtype int32 or uint32, or float weights, got {words.dtype}"
    shape = word_rows(n, weight_rule), words_for(k)
    if words.shape != shape:
        twice = words.shape == (word_rows(n, TERNARY_WEIGHT), words_for(k)) or weight_rule == TERNARY_WEIGHT
        why = ": ternary weights have two rows of words for each output, and others one" if twice else ""
        return f"{key}: expected words of shape {shape}, got {tuple(words.shape)}{why}"
    used = k % 32
    if used and not words.is_meta and bool((words.view(torch.int32)[:, -1] & (-1 << used)).any()):
        return f"{key}: expected zero bits past k = {k} in the last word of each row, got others"
    return None


def _problem_of_presence(prefix: str, state_dict: Mapping[str, Any], scaled: bool, computes_scale: bool) -> str | None:
    """Return the error message about a scale that should be in a checkpoint and is not, or the reverse, or None."""
    key, weight = f"{prefix}scale", state_dict.get(f"{prefix}weight")
    of_float = isinstance(weight, Tensor) and weight.is_floating_point()
    if key not in state_dict:
        if scaled and isinstance(weight, Tensor) and not (of_float and computes_scale):
            return f"{key}: expected the scale of each output, got a checkpoint without it: its weights have no scale"
    elif not scaled:
        return f"{key}: expected no scale, got a checkpoint with one: load it into a layer that has a weight_scale"
    elif of_float and computes_scale:
        return (
            f"{key}: expected float weights from which the scale is computed, got a learned scale: load it into a "
            "layer with weight_scale='learned'"
        )
    return None


def _problem_of_unmarked_words(prefix: str, state_dict: Mapping[str, Any]) -> str | None:
    """Return the error message about words that nothing says to be those of ternary weights, or None.

    They may be those of a layer with twice the outputs, whose weights are signs.
    """
    key, weight = f"{prefix}weight_rule", state_dict.get(f"{prefix}weight")
    if key in state_dict or not isinstance(weight, Tensor) or weight.is_floating_point():
        return None
    return (
        f"{key}: expected the entry that says that the weights are ternary, got words without it: every version that "
        "saves ternary weights writes it"
    )


def _problem_of_vector(key: str, vector: Tensor, n: int) -> str | None:
    if problem := _problem_of_layout(key, vector):
        return problem
    if vector.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"{key}: expected float64, float32, float16 or bfloat16, got {vector.dtype}"
    if vector.shape != (n,):
        return f"{key}: expected shape {(n,)}, got {tuple(vector.shape)}"
    return None


def _problem_of_newer_format(key: str, number: Any) -> str | None:
    readable = isinstance(number, Tensor) and not number.is_meta and number.dim() == 0 and number.dtype is torch.int64
    if not readable or (got := int(number)) <= FORMAT:
        return None
    return f"{key}: expected a checkpoint of format 1 to {FORMAT}, got {got}: a newer bitorch_qlinear wrote it"


def _problem_of_number(key: str, number: Any, expected: int) -> str | None:
    if not isinstance(number, Tensor) or number.is_meta:
        return None
    if number.dim() != 0 or number.dtype is not torch.int64:
        return f"{key}: expected a 0-dim int64 tensor, got {number.dtype} with {number.dim()} dimensions"
    got, name = int(number), key.rpartition(".")[2]
    if name == "format":
        if got < 1:
            return f"{key}: expected a checkpoint of format 1 to {FORMAT}, got {got}"
        if got != expected:
            return (
                f"{key}: expected {expected}, got {got}: layers of ternary weights have format 3, others with a scale, "
                "or with an input that is rounded to levels, have format 2, and all others have format 1"
            )
    elif name == "k":
        if got != expected:
            return f"{key}: expected k = {expected}, got {got}: the checkpoint is of a layer of another size"
    elif got != expected:
        rules = {"input_rule": INPUT_RULES, "weight_rule": WEIGHT_RULES}.get(name)
        said = [rules[i] if rules and 0 <= i < len(rules) else str(i) for i in (expected, got)]
        return f"{key}: expected {said[0]}, got {said[1]}: the checkpoint was made for another quantization"
    return None
