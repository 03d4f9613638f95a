"""Shapes and dtypes of the operators' results without data, for torch.compile, torch.export and meta tensors.

The checks are those of csrc/torch/check.h and csrc/torch/tensors.h, in their order and with their messages: what an operator
refuses when it runs is refused while it is traced. Not visible here are memory and what stands in it: a storage that is
too short, and of a prepared form all but its dtype, its dimensions and that it has room for a header.

Sizes can be symbolic. A check that compares two sizes holds for all that the graph will be run with, and so may narrow
them to each other; every other check refuses only what is wrong whatever the symbols stand for, for a comparison of
Python's would be a guard, and bind a graph or an exported program to the batch that it was traced with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from . import _library
from ._torch import is_known

_FLOATS = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_WORDS = {torch.int32: "int32", torch.uint32: "uint32"}
_OTHERS = {torch.int64: "int64", torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8", torch.bool: "bool"}
_NAMES = {**_FLOATS, **_WORDS, **_OTHERS}
_UNPACKED = {*_FLOATS, torch.int32, torch.int8, torch.bool}
_MAX_VALUES = 2**31 - 1  # csrc/packed.h's kMaxValues
_HEADER_BYTES = 64  # csrc/packed.h's PreparedHeader


# ---- how a check fails, and what it may ask ------------------------------------------------------------------------


def _fail(argument: str, message: str, error: type[RuntimeError] = RuntimeError) -> NoReturn:
    raise error(f"bitorch_qlinear: {argument}: {message}")


def _dtype_name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, "a dtype of another kind")


def _check_equal(argument: str, got: int, expected: int, message: Callable[[], str]) -> None:
    """Symbols that are not equal yet become so: the graph then belongs to sizes of which it is true."""
    equal: bool | torch.SymBool = got == expected
    if isinstance(equal, bool):
        if not equal:
            _fail(argument, message())
    else:
        torch._check(equal, lambda: f"bitorch_qlinear: {argument}: {message()}")


def _is_strided(tensor: Tensor) -> bool:
    """Whether it is known not to be contiguous."""
    if not all(is_known(size > 0) for size in tensor.shape):
        return False  # without elements it is contiguous
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if is_known(size == 1):
            continue
        if is_known(size != 1) and is_known(stride != expected):
            return True
        expected = expected * size
    return False


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _words_for(k: int) -> int:
    return _ceil_div(k, 32)


# ---- the checks ----------------------------------------------------------------------------------------------------


def _check_given(argument: str, tensor: Tensor | None) -> None:
    """Torch passes None through even where one of several tensors is required."""
    if tensor is None:
        _fail(argument, "expected a tensor, got None")


def _check_first(argument: str, first: Tensor, *others: Tensor | None) -> None:
    """The first tensor says where to compute; torch calls the CUDA operator where any tensor is on CUDA."""
    if first is None or first.device.type == "cuda":
        return
    if any(tensor is not None and tensor.device.type == "cuda" for tensor in others):
        _fail(argument, "expected a tensor on the CUDA device that other arguments are on")


def _check_device(argument: str, tensor: Tensor, first: Tensor) -> None:
    if tensor.device != first.device:
        _fail(argument, "expected a tensor on the same device as the first argument")


def _check_values(k: int) -> None:
    if is_known(k < 0) or is_known(k > _MAX_VALUES):
        _fail("k", f"expected 0 to {_MAX_VALUES}, got {k}")


def _check_float(argument: str, dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        _fail(argument, f"expected float64, float32, float16 or bfloat16, got {_dtype_name(dtype)}")


def _check_dimensions(argument: str, tensor: Tensor, shape: str) -> None:
    if tensor.dim() < 1:
        _fail(argument, f"expected shape {shape}, got {tensor.dim()} dimensions")


def _check_words(argument: str, words: Tensor, k: int, first: Tensor) -> None:
    _check_given(argument, words)
    if words.dtype not in _WORDS:
        _fail(argument, f"expected packed words of dtype int32 or uint32, got {_dtype_name(words.dtype)}")
    _check_dimensions(argument, words, "(..., ceil(k / 32))")
    got, expected = words.shape[-1], _words_for(k)
    _check_equal(
        argument, got, expected, lambda: f"expected {expected} words in the last dimension for k = {k}, got {got}"
    )
    if _is_strided(words):
        _fail(argument, "expected contiguous words, got a strided tensor")
    _check_device(argument, words, first)


def _check_word_rows(argument: str, words: Tensor, k: int, first: Tensor) -> None:
    _check_given(argument, words)
    if words.dim() != 2:
        _fail(argument, f"expected shape (n, ceil(k / 32)), got {words.dim()} dimensions")
    _check_words(argument, words, k, first)


def _check_rows(argument: str, x: Tensor, k: int, first: Tensor) -> None:
    _check_values(k)
    _check_given(argument, x)
    _check_float(argument, x.dtype)
    _check_dimensions(argument, x, "(..., k)")
    got = x.shape[-1]
    _check_equal(argument, got, k, lambda: f"expected k = {k} values in the last dimension, got {got}")
    _check_device(argument, x, first)


def _check_vector(argument: str, vector: Tensor | None, n: int, first: Tensor) -> None:
    if vector is None:
        return
    _check_float(argument, vector.dtype)

    def message() -> str:
        return f"expected shape ({n}), got {vector.dim()} dimensions and {vector.numel()} elements"

    if vector.dim() != 1:
        _fail(argument, message())
    _check_equal(argument, vector.shape[0], n, message)
    _check_device(argument, vector, first)


def _check_epilogue(n: int, bias: Tensor | None, scale: Tensor | None, out_dtype: torch.dtype, first: Tensor) -> None:
    _check_vector("bias", bias, n, first)
    _check_vector("scale", scale, n, first)
    if out_dtype is not torch.int32:
        _check_float("out_dtype", out_dtype)
    elif bias is not None or scale is not None:
        _fail("out_dtype", "int32 is the product itself, and takes neither bias nor scale")


def _check_prepared(prepared: Tensor | None, first: Tensor) -> None:
    """A form for another kernel is prepared anew by the operator, so that its size says little."""
    if prepared is None:
        return
    if prepared.dtype is not torch.uint8 or prepared.dim() != 1 or _is_strided(prepared):
        _fail(
            "weight_prepared",
            "expected the contiguous uint8 vector that prepare_weight makes, got "
            f"{_dtype_name(prepared.dtype)} with {prepared.dim()} dimensions",
        )
    _check_device("weight_prepared", prepared, first)
    if is_known(prepared.shape[0] < _HEADER_BYTES):
        _fail("weight_prepared", f"expected at least {_HEADER_BYTES} bytes, got {prepared.shape[0]}")


def _check_weight(
    words: Tensor,
    k: int,
    bias: Tensor | None,
    prepared: Tensor | None,
    scale: Tensor | None,
    out_dtype: torch.dtype,
    first: Tensor,
) -> None:
    """Of the operators that multiply by packed weights, all that they have in common."""
    _check_word_rows("weight_words", words, k, first)
    _check_epilogue(words.shape[0], bias, scale, out_dtype, first)
    _check_prepared(prepared, first)


# ---- the operators -------------------------------------------------------------------------------------------------


def _with_last(shape: Sequence[int], last: int) -> tuple[int, ...]:
    return (*shape[:-1], last)


@torch.library.register_fake("bitorch_qlinear::pack_bits")
def _(x: Tensor, strict: bool = False) -> Tensor:
    _check_dimensions("x", x, "(..., k)")
    _check_rows("x", x, x.shape[-1], x)
    return x.new_empty(_with_last(x.shape, _words_for(x.shape[-1])), dtype=torch.int32)


@torch.library.register_fake("bitorch_qlinear::unpack_bits")
def _(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    _check_values(k)
    _check_words("words", words, k, words)
    if dtype not in _UNPACKED:
        _fail("dtype", f"expected a float type, int32, int8 or bool, got {_dtype_name(dtype)}")
    return words.new_empty(_with_last(words.shape, k), dtype=dtype)


def _prepared_bytes(device_type: str, n: int | torch.SymInt, k: int | torch.SymInt) -> int | torch.SymInt:
    """As C++ has it. What symbols stand for is not told to C++: the size is then one more symbol."""
    if isinstance(n, torch.SymInt) or isinstance(k, torch.SymInt):
        try:
            size: torch.SymInt = torch.library.get_ctx().new_dynamic_size(min=_HEADER_BYTES)
            return size
        except RuntimeError:  # where torch.compile must know the size: the graph then belongs to these n and k
            pass
    return _library.prepared_bytes(device_type, int(n), int(k))


@torch.library.register_fake("bitorch_qlinear::prepare_weight")
def _(weight_words: Tensor, k: int, *, layout: int | None = None) -> Tensor:
    _check_values(k)
    _check_word_rows("weight_words", weight_words, k, weight_words)
    device_type = weight_words.device.type
    present = _library.CUDA_LAYOUT if device_type == "cuda" else _library.prepared_layout().number
    if layout is not None and layout != present:
        _fail("layout", f"expected {present}, that of the kernel that runs here, or None, got {layout}")
    return weight_words.new_empty((_prepared_bytes(device_type, weight_words.shape[0], k),), dtype=torch.uint8)


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
    _check_first("x_words", x_words, weight_words, bias, weight_prepared, scale)
    _check_values(k)
    _check_words("x_words", x_words, k, x_words)
    _check_weight(weight_words, k, bias, weight_prepared, scale, out_dtype, x_words)
    return x_words.new_empty(_with_last(x_words.shape, weight_words.shape[0]), dtype=out_dtype)


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
    _check_first("x", x, weight_words, bias, weight_prepared, scale)
    _check_rows("x", x, k, x)
    out_dtype = out_dtype or x.dtype
    _check_weight(weight_words, k, bias, weight_prepared, scale, out_dtype, x)
    return x.new_empty(_with_last(x.shape, weight_words.shape[0]), dtype=out_dtype)


@torch.library.register_fake("bitorch_qlinear::sign_linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    strict: bool = False,
    strict_weight: bool = False,
) -> Tensor:
    _check_first("x", x, weight, bias, scale)
    _check_given("weight", weight)
    if weight.dim() != 2:
        _fail("weight", f"expected shape (n, k), got {weight.dim()} dimensions")
    n, k = weight.shape
    _check_rows("x", x, k, x)
    _check_rows("weight", weight, k, x)
    out_dtype = out_dtype or x.dtype
    _check_epilogue(n, bias, scale, out_dtype, x)
    return x.new_empty(_with_last(x.shape, n), dtype=out_dtype)


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
    if threshold is not None and not threshold >= 0:
        _fail("threshold", f"expected a number >= 0 or None, got {threshold:g}")
    shape = _with_last(x.shape, _words_for(k))
    x_words = x.new_empty(shape, dtype=torch.int32)
    in_range_words = x.new_empty((0,) if threshold is None else shape, dtype=torch.int32)
    return y, x_words, in_range_words


@torch.library.register_fake("bitorch_qlinear::multiply_signs")
def _(reals: Tensor, sign_words: Tensor, k: int, transpose: bool = False) -> Tensor:
    if any(tensor is not None and tensor.device.type == "cuda" for tensor in (reals, sign_words)):
        _fail("reals", "expected a tensor on the CPU, where alone multiply_signs computes", NotImplementedError)
    _check_values(k)
    _check_word_rows("sign_words", sign_words, k, sign_words if reals is None else reals)
    n = sign_words.shape[0]
    summed, outputs = (k, n) if transpose else (n, k)
    _check_given("reals", reals)
    _check_float("reals", reals.dtype)
    _check_dimensions("reals", reals, "(..., n)")
    got = reals.shape[-1]
    _check_equal(
        "reals", got, summed, lambda: f"expected {summed} values in the last dimension, as many as signs, got {got}"
    )
    return reals.new_empty(_with_last(reals.shape, outputs))
