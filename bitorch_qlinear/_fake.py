"""Shapes and dtypes of the operators' results without data, for torch.compile, torch.export and meta tensors.

The checks are those of the operators in csrc, in their order and with their messages, so that tracing refuses what a
run would refuse. Memory cannot be checked here: a storage may be too short, and of a prepared form only the dtype, the
dimensions and room for a header are known.

Sizes can be symbolic. A check that compares two sizes may make them equal for all runs of the graph. Every other check
refuses only sizes that are wrong for all values of their symbols, because a comparison in Python would add a guard: it
would bind a graph or an exported program to the batch that it was traced with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _kernels, functional
from ._torch import is_known

_FLOATS = {torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_WORDS = {torch.int32: "int32", torch.uint32: "uint32"}
_OTHERS = {torch.int64: "int64", torch.int16: "int16", torch.int8: "int8", torch.uint8: "uint8", torch.bool: "bool"}
_NAMES = {**_FLOATS, **_WORDS, **_OTHERS}
_UNPACKED = {*_FLOATS, torch.int32, torch.int8, torch.bool}
_MAX_VALUES = 2**31 - 1  # csrc/packed.h's kMaxValues
_HEADER_BYTES = 64  # csrc/packed.h's PreparedHeader


# ---- the tools of a check ------------------------------------------------------------------------------------------


def _fail(argument: str, message: str, error: type[RuntimeError] = RuntimeError) -> NoReturn:
    raise error(f"bitorch_qlinear: {argument}: {message}")


def _dtype_name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, "a dtype of another kind")


def _check_equal(argument: str, got: int, expected: int, message: Callable[[], str]) -> None:
    """Fail if the sizes differ; symbolic sizes that may differ become equal, and the graph then assumes it."""
    equal: bool | torch.SymBool = got == expected
    if isinstance(equal, bool):
        if not equal:
            _fail(argument, message())
    else:
        torch._check(equal, lambda: f"bitorch_qlinear: {argument}: {message()}")


def _is_strided(tensor: Tensor) -> bool:
    """Whether the tensor is known not to be contiguous."""
    if not all(is_known(size > 0) for size in tensor.shape):
        return False  # a tensor without elements is contiguous
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
    """Fail for None, which torch passes through even for a required tensor if there are several."""
    if tensor is None:
        _fail(argument, "expected a tensor, got None")


def _is_cuda(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.device.type == "cuda"


def _check_first(argument: str, first: Tensor, *others: Tensor | None) -> None:
    """Fail if only a later tensor is on CUDA: the first one decides where to compute, torch's dispatch looks at all."""
    if first is None or _is_cuda(first):
        return
    if any(_is_cuda(tensor) for tensor in others):
        _fail(argument, "expected a tensor on the CUDA device that other arguments are on")


def _check_count(argument: str, tensors: Sequence[Tensor], expected: int) -> None:
    if len(tensors) != expected:
        _fail(argument, f"expected {expected} tensors, got {len(tensors)}")


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


def _check_word_dtype(argument: str, words: Tensor) -> None:
    if words.dtype not in _WORDS:
        _fail(argument, f"expected packed words of dtype int32 or uint32, got {_dtype_name(words.dtype)}")


def _check_words(argument: str, words: Tensor, k: int, first: Tensor) -> None:
    _check_given(argument, words)
    _check_word_dtype(argument, words)
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


def _check_contiguous_vector(argument: str, vector: Tensor, length: int, first: Tensor) -> None:
    def message() -> str:
        return f"expected shape ({length}), got {vector.dim()} dimensions and {vector.numel()} elements"

    if vector.dim() != 1:
        _fail(argument, message())
    _check_equal(argument, vector.shape[0], length, message)
    if _is_strided(vector):
        _fail(argument, "expected a contiguous vector, got a strided one")
    _check_device(argument, vector, first)


def _check_bits(n: int, a: Any, first: Tensor) -> None:
    """Check the arguments of a product that writes bits."""
    for argument in ("bias", "scale"):
        if getattr(a, argument) is not None:
            _fail(argument, "expected None with out_limits, got a tensor")
    if a.out_dtype is not None:
        _fail("out_dtype", f"expected None with out_limits, got {_dtype_name(a.out_dtype)}")
    if a.out_limits.dtype is not torch.int32:
        _fail("out_limits", f"expected int32, got {_dtype_name(a.out_limits.dtype)}")
    _check_contiguous_vector("out_limits", a.out_limits, n, first)
    if a.out_flips is not None:
        _check_word_dtype("out_flips", a.out_flips)
        _check_contiguous_vector("out_flips", a.out_flips, _words_for(n), first)


def _check_value_limits(a: Any) -> None:
    """Check the limits and flips by which x is packed."""
    if a.limits is None:
        if a.flips is not None:
            _fail("flips", "expected None without limits, got a tensor")
        return
    k = a.x.shape[-1]
    if a.limits.dtype is not a.x.dtype:
        expected, got = _dtype_name(a.x.dtype), _dtype_name(a.limits.dtype)
        _fail("limits", f"expected {expected}, the dtype of x, got {got}")
    _check_contiguous_vector("limits", a.limits, k, a.x)
    if a.flips is not None:
        _check_word_dtype("flips", a.flips)
        _check_contiguous_vector("flips", a.flips, _words_for(k), a.x)


def _check_prepared(prepared: Tensor | None, first: Tensor) -> None:
    """Check all of a prepared form but its size: the operator replaces a form that was made for another kernel."""
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


def _product_with_packed_weight(a: Any, x: Tensor, usual_dtype: torch.dtype) -> Tensor:
    """Check the arguments that all products with packed weights have beside x, and return their result's form."""
    _check_word_rows("weight_words", a.weight_words, a.k, x)
    n, out_dtype = a.weight_words.shape[0], a.out_dtype or usual_dtype
    if a.out_limits is not None:
        _check_bits(n, a, x)
        n, out_dtype = _words_for(n), torch.int32
    elif a.out_flips is not None:
        _fail("out_flips", "expected None without out_limits, got a tensor")
    else:
        _check_epilogue(n, a.bias, a.scale, out_dtype, x)
    _check_prepared(a.weight_prepared, x)
    return x.new_empty(_with_last(x.shape, n), dtype=out_dtype)


# ---- the operators -------------------------------------------------------------------------------------------------


def _with_last(shape: Sequence[int], last: int) -> tuple[int, ...]:
    return (*shape[:-1], last)


def _result_of(operator: Callable[..., Any]) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register the decorated function as the one that makes an operator's results without data.

    Args:
        operator: The function of :mod:`bitorch_qlinear.functional`. Its signature is the only one in Python: the
            decorated function gets one namespace with all arguments by name, defaults included.
    """
    signature = inspect.signature(operator)

    def register(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @torch.library.register_fake(f"bitorch_qlinear::{operator.__name__}")
        def fake(*args: Any, **kwargs: Any) -> Any:
            # A keyword of the function may be positional in the operator's schema.
            bound = signature.bind(**dict(zip(signature.parameters, args, strict=False)), **kwargs)
            bound.apply_defaults()
            return make(SimpleNamespace(**bound.arguments))

        return make

    return register


@_result_of(functional.pack_bits)
def _(a: Any) -> Tensor:
    _check_first("x", a.x, a.limits, a.flips)
    _check_given("x", a.x)
    _check_dimensions("x", a.x, "(..., k)")
    _check_rows("x", a.x, a.x.shape[-1], a.x)
    _check_value_limits(a)
    return a.x.new_empty(_with_last(a.x.shape, _words_for(a.x.shape[-1])), dtype=torch.int32)  # type: ignore[no-any-return]


@_result_of(functional.unpack_bits)
def _(a: Any) -> Tensor:
    _check_values(a.k)
    _check_words("words", a.words, a.k, a.words)
    if a.dtype not in _UNPACKED:
        _fail("dtype", f"expected a float type, int32, int8 or bool, got {_dtype_name(a.dtype)}")
    return a.words.new_empty(_with_last(a.words.shape, a.k), dtype=a.dtype)  # type: ignore[no-any-return]


def _prepared_bytes(device_type: str, n: int | torch.SymInt, k: int | torch.SymInt) -> int | torch.SymInt:
    """Return the size that C++ computes; C++ cannot take symbols, so for symbolic n or k it is a new symbol."""
    if isinstance(n, torch.SymInt) or isinstance(k, torch.SymInt):
        try:
            size: torch.SymInt = torch.library.get_ctx().new_dynamic_size(min=_HEADER_BYTES)
            return size
        except RuntimeError:  # torch.compile may need to know the size: the graph then belongs to these n and k
            pass
    return _kernels.prepared_bytes(device_type, int(n), int(k))


@_result_of(functional.prepare_weight)
def _(a: Any) -> Tensor:
    _check_values(a.k)
    _check_word_rows("weight_words", a.weight_words, a.k, a.weight_words)
    device_type = a.weight_words.device.type
    present = _kernels.CUDA_LAYOUT if device_type == "cuda" else _kernels.prepared_layout().number
    if a.layout is not None and a.layout != present:
        _fail("layout", f"expected {present}, that of the kernel that runs here, or None, got {a.layout}")
    size = _prepared_bytes(device_type, a.weight_words.shape[0], a.k)
    return a.weight_words.new_empty((size,), dtype=torch.uint8)  # type: ignore[no-any-return]


@_result_of(functional.binary_linear)
def _binary_linear(a: Any) -> Tensor:
    _check_first("x_words", a.x_words, a.weight_words, a.bias, a.weight_prepared, a.scale, a.out_limits, a.out_flips)
    _check_values(a.k)
    _check_words("x_words", a.x_words, a.k, a.x_words)
    return _product_with_packed_weight(a, a.x_words, torch.float32)


@_result_of(functional.linear)
def _linear(a: Any) -> Tensor:
    _check_first("x", a.x, a.weight_words, a.bias, a.weight_prepared, a.scale, a.out_limits, a.out_flips)
    _check_rows("x", a.x, a.k, a.x)
    return _product_with_packed_weight(a, a.x, a.x.dtype)


@_result_of(functional.linear_chain)
def _(a: Any) -> Tensor:
    layers = len(a.weights)
    if not layers:
        _fail("weights", "expected at least 1 tensor, got 0")
    _check_count("limits", a.limits, layers - 1)
    _check_count("flips", a.flips, layers - 1)
    if a.prepared is not None:
        _check_count("prepared", a.prepared, layers)
    if a.toggles is not None:
        _check_count("toggles", a.toggles, layers - 1)
    _check_given("x", a.x)
    y: Tensor = a.x
    k, is_words = a.k, a.x.dtype in _WORDS
    for i, words in enumerate(a.weights):
        form = a.prepared[i] if a.prepared is not None and a.prepared[i].numel() else None
        layer: dict[str, Any] = {"weight_words": words, "k": k, "weight_prepared": form, "strict": a.strict}
        if i + 1 < layers:
            layer.update(out_limits=a.limits[i], out_flips=a.flips[i], bias=None, scale=None, out_dtype=None)
        else:
            out_dtype = a.out_dtype or (torch.float32 if is_words else a.x.dtype)
            layer.update(out_limits=None, out_flips=None, bias=a.bias, scale=a.scale, out_dtype=out_dtype)
        from_words = is_words or i > 0
        y = (
            _binary_linear(SimpleNamespace(x_words=y, **layer))
            if from_words
            else _linear(SimpleNamespace(x=y, **layer))
        )
        if i + 1 < layers and a.toggles is not None and a.toggles[i].numel():
            _check_toggles(a.toggles[i], words)
        k = words.shape[0]
    return y


def _check_toggles(toggles: Tensor, first: Tensor) -> None:
    if _is_cuda(first):
        _fail("toggles", "expected none on CUDA, where no kernel negates bits of single channels")
    if toggles.dtype is not torch.int32 or toggles.dim() != 2 or toggles.shape[0] != 2 or _is_strided(toggles):
        _fail("toggles", "expected contiguous int32 tensors of shape (2, t)")
    _check_device("toggles", toggles, first)


@_result_of(functional.sign_linear)
def _(a: Any) -> Tensor:
    _check_first("x", a.x, a.weight, a.bias, a.scale)
    _check_given("weight", a.weight)
    if a.weight.dim() != 2:
        _fail("weight", f"expected shape (n, k), got {a.weight.dim()} dimensions")
    n, k = a.weight.shape
    _check_rows("x", a.x, k, a.x)
    _check_rows("weight", a.weight, k, a.x)
    out_dtype = a.out_dtype or a.x.dtype
    _check_epilogue(n, a.bias, a.scale, out_dtype, a.x)
    return a.x.new_empty(_with_last(a.x.shape, n), dtype=out_dtype)  # type: ignore[no-any-return]


@_result_of(functional.linear_train)
def _(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    y = _linear(SimpleNamespace(**vars(a), out_limits=None, out_flips=None))
    if a.threshold is not None and not a.threshold >= 0:
        _fail("threshold", f"expected a number >= 0 or None, got {a.threshold:g}")
    shape = _with_last(a.x.shape, _words_for(a.k))
    x_words = a.x.new_empty(shape, dtype=torch.int32)
    in_range_words = a.x.new_empty((0,) if a.threshold is None else shape, dtype=torch.int32)
    return y, x_words, in_range_words


@_result_of(functional.dorefa_linear)
def _(a: Any) -> Tensor:
    if any(_is_cuda(tensor) for tensor in (a.x, a.weight_words, a.bias, a.weight_prepared, a.scale)):
        _fail("x", "expected a tensor on the CPU, the only device of dorefa_linear", NotImplementedError)
    _check_rows("x", a.x, a.k, a.x)
    y = _product_with_packed_weight(SimpleNamespace(**vars(a), out_limits=None, out_flips=None), a.x, a.x.dtype)
    _check_float("out_dtype", y.dtype)
    if a.bits not in (1, 2):
        _fail("bits", f"expected 1 or 2, got {a.bits}")
    return y


@_result_of(functional.multiply_signs)
def _(a: Any) -> Tensor:
    if any(_is_cuda(tensor) for tensor in (a.reals, a.sign_words)):
        _fail("reals", "expected a tensor on the CPU, the only device of multiply_signs", NotImplementedError)
    _check_values(a.k)
    _check_word_rows("sign_words", a.sign_words, a.k, a.sign_words if a.reals is None else a.reals)
    n = a.sign_words.shape[0]
    summed, outputs = (a.k, n) if a.transpose else (n, a.k)
    _check_given("reals", a.reals)
    _check_float("reals", a.reals.dtype)
    _check_dimensions("reals", a.reals, "(..., n)")
    got = a.reals.shape[-1]
    _check_equal(
        "reals", got, summed, lambda: f"expected {summed} values in the last dimension, as many as signs, got {got}"
    )
    return a.reals.new_empty(_with_last(a.reals.shape, outputs))  # type: ignore[no-any-return]
