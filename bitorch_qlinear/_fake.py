"""Shapes and dtypes of the operators' results without data, for torch.compile, torch.export and meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WORDS = (torch.int32, torch.uint32)
_HEADER_BYTES = 64


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _words_for(k: int) -> int:
    return _ceil_div(k, 32)


def _check_float(name: str, dtype: torch.dtype) -> None:
    torch._check(dtype in _FLOATS, lambda: f"bitorch_qlinear: {name}: expected a float dtype, got {dtype}")


def _check_dimension(name: str, tensor: Tensor) -> None:
    torch._check(tensor.dim() >= 1, lambda: f"bitorch_qlinear: {name}: expected at least one dimension, got none")


def _check_last(name: str, tensor: Tensor, expected: int) -> None:
    _check_dimension(name, tensor)
    torch._check(
        tensor.shape[-1] == expected,
        lambda: f"bitorch_qlinear: {name}: expected {expected} in the last dimension, got {tensor.shape[-1]}",
    )


def _check_given(**tensors: Tensor | None) -> None:
    """Torch hands a None on where one of several tensors is required."""
    for name, tensor in tensors.items():
        torch._check(tensor is not None, lambda name=name: f"bitorch_qlinear: {name}: expected a tensor, got None")


def _check_device(first: Tensor, **others: Tensor | None) -> None:
    """One real argument among meta tensors would otherwise get a result that nobody computes."""
    for name, tensor in others.items():
        torch._check(
            tensor is None or tensor.device == first.device,
            lambda name=name: f"bitorch_qlinear: {name}: expected a tensor on the same device as the first argument",
        )


def _check_words(name: str, words: Tensor, k: int) -> None:
    torch._check(
        words.dtype in _WORDS, lambda: f"bitorch_qlinear: {name}: expected int32 or uint32 words, got {words.dtype}"
    )
    _check_last(name, words, _words_for(k))


def _check_weight(
    weight_words: Tensor, k: int, bias: Tensor | None, scale: Tensor | None, out_dtype: torch.dtype
) -> None:
    torch._check(weight_words.dim() == 2, lambda: "bitorch_qlinear: weight_words: expected two dimensions")
    _check_words("weight_words", weight_words, k)
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is not None:
            _check_float(name, vector.dtype)
            torch._check(vector.dim() == 1, lambda name=name: f"bitorch_qlinear: {name}: expected one dimension")
            _check_last(name, vector, weight_words.shape[0])
    if out_dtype is torch.int32:
        torch._check(
            bias is None and scale is None, lambda: "bitorch_qlinear: out_dtype: int32 takes neither bias nor scale"
        )
    else:
        _check_float("out_dtype", out_dtype)


@torch.library.register_fake("bitorch_qlinear::pack_bits")
def _(x: Tensor, strict: bool = False) -> Tensor:
    _check_float("x", x.dtype)
    _check_dimension("x", x)
    return x.new_empty((*x.shape[:-1], _words_for(x.shape[-1])), dtype=torch.int32)


@torch.library.register_fake("bitorch_qlinear::unpack_bits")
def _(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    _check_words("words", words, k)
    return words.new_empty((*words.shape[:-1], k), dtype=dtype)


@torch.library.register_fake("bitorch_qlinear::prepare_weight")
def _(weight_words: Tensor, k: int, *, layout: int | None = None) -> Tensor:
    _check_weight(weight_words, k, None, None, torch.int32)
    n = weight_words.shape[0]
    if weight_words.device.type == "cuda":  # csrc/cuda/prepared.cuh
        size = _HEADER_BYTES + 16 * _ceil_div(n, 4) + (16 * n * _ceil_div(k, 128) if k % 128 else 0)
    else:
        panel, unit, unit_bytes, _ = _library.prepared_layout()
        size = _HEADER_BYTES + _ceil_div(n, panel) * _ceil_div(k, unit) * unit_bytes
    return weight_words.new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake("bitorch_qlinear::binary_linear")
def _(
    x_words: Tensor,
    weight_words: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    weight_prepared: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    out_dtype = out_dtype or torch.float32
    _check_given(x_words=x_words, weight_words=weight_words)
    _check_device(x_words, weight_words=weight_words, bias=bias, weight_prepared=weight_prepared, scale=scale)
    _check_words("x_words", x_words, k)
    _check_weight(weight_words, k, bias, scale, out_dtype)
    return x_words.new_empty((*x_words.shape[:-1], weight_words.shape[0]), dtype=out_dtype)


@torch.library.register_fake("bitorch_qlinear::linear")
def _linear(
    x: Tensor,
    weight_words: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    weight_prepared: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    strict: bool = False,
) -> Tensor:
    _check_given(x=x, weight_words=weight_words)
    out_dtype = out_dtype or x.dtype
    _check_device(x, weight_words=weight_words, bias=bias, weight_prepared=weight_prepared, scale=scale)
    _check_float("x", x.dtype)
    _check_last("x", x, k)
    _check_weight(weight_words, k, bias, scale, out_dtype)
    return x.new_empty((*x.shape[:-1], weight_words.shape[0]), dtype=out_dtype)


@torch.library.register_fake("bitorch_qlinear::linear_train")
def _(
    x: Tensor,
    weight_words: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    weight_prepared: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    strict: bool = False,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _linear(
        x, weight_words, k, bias, weight_prepared=weight_prepared, scale=scale, out_dtype=out_dtype, strict=strict
    )
    shape = (*x.shape[:-1], _words_for(k))
    x_words = x.new_empty(shape, dtype=torch.int32)
    in_range_words = x.new_empty((0,) if threshold is None else shape, dtype=torch.int32)
    return y, x_words, in_range_words


@torch.library.register_fake("bitorch_qlinear::multiply_signs")
def _(reals: Tensor, sign_words: Tensor, k: int, transpose: bool = False) -> Tensor:
    _check_given(reals=reals, sign_words=sign_words)
    _check_device(reals, sign_words=sign_words)
    _check_float("reals", reals.dtype)
    torch._check(sign_words.dim() == 2, lambda: "bitorch_qlinear: sign_words: expected two dimensions")
    _check_words("sign_words", sign_words, k)
    n = sign_words.shape[0]
    _check_last("reals", reals, k if transpose else n)
    return reals.new_empty((*reals.shape[:-1], n if transpose else k))
