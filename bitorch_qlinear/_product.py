"""The packed product as one differentiable function: forward by XNOR-popcount, backward straight through.

With ``y = s(x) · s(W)ᵀ + b`` and ``g = dL/dy`` (Hubara et al., https://arxiv.org/abs/1602.02830)::

    dL/dx = input rule's gradient of g · s(W), and 0 where |x| > threshold
    dL/dW = weight rule's gradient of gᵀ · s(x)
    dL/db = g summed over the leading dimensions

What backward needs of x is its signs, and with a threshold which elements are in range, a bit an element each: these
are saved beside the words of W, not x. Only rules whose derivative is a function of x (approxsign, swishsign) save x as
well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _kernels, _library, functional
from ._torch import (
    HAS_AMX,
    any_autocast,
    apply,
    functorch_active,
    is_dtensor,
    is_known,
    is_proxy,
    operator_entry,
    trace_as_leaf,
    transforms_active,
)
from .quantizations import BinaryRule, cancel_gradient

__all__ = [
    "apply_to_no_tensor",
    "apply_to_values",
    "autocast_dtype",
    "differentiable",
    "has_kernels",
    "is_differentiated",
    "packed_linear",
    "raise_of_dtype",
    "real_linear",
    "sign_linear",
    "tables_win",
    "times_signs",
    "wants_gradient",
]

# Looked up once: a name in a module of a module costs 20 ns at every call.
_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled

_sign_linear = torch.ops.bitorch_qlinear.sign_linear
_linear = torch.ops.bitorch_qlinear.linear
_multiply_signs = torch.ops.bitorch_qlinear.multiply_signs
_sign_linear_entry, _linear_entry = operator_entry(_sign_linear), operator_entry(_linear)
_multiply_signs_entry = operator_entry(_multiply_signs)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NEVER = 1 << 62  # what least_sign_outputs() says, or more, of a kernel that is never faster than the BLAS


def has_kernels(tensor: Tensor) -> bool:
    """Whether the operators have kernels (or, for meta, shapes) for this tensor; others compute in float.

    A DTensor's device has them, but the operators have no rules for sharding.
    """
    on_device = tensor.is_cpu or tensor.is_meta or (_library.has_cuda and tensor.is_cuda)
    return on_device and (type(tensor) is Tensor or not is_dtensor(tensor))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants of a linear layer's output, as of ``nn.Linear``'s; None for that of x."""
    if any_autocast() and x.dtype is not torch.float64:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def apply_to_nested(layer: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """A layer's outputs for the rows of a nested tensor, as a nested tensor of the same layout."""
    if x.layout is torch.jagged and x.values().shape[-1] == x.shape[-1]:
        return torch.nested.nested_tensor_from_jagged(layer(x.values()), x.offsets(), x.lengths())
    return torch.nested.as_nested_tensor([layer(part) for part in x.unbind()], layout=x.layout)


def apply_to_values(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer's outputs for the values of a nested, quantized or sparse tensor."""
    if x.is_nested:
        return apply_to_nested(layer, x)
    return layer(x.dequantize() if x.is_quantized else x.to_dense())


def apply_to_no_tensor(layer: Any, x: Any) -> Any:
    """What torch.fx gets in a tensor's place; for all else the TypeError that ``nn.Linear`` raises."""
    return trace_as_leaf(layer, x) if is_proxy(x) else torch.nn.functional.linear(x, layer.weight, layer.bias)


def raise_of_dtype(x: Tensor, error: RuntimeError) -> None:
    """Say what to do where an operator refused x for its dtype; where it did not, return.

    Raises:
        RuntimeError: x does not hold float values of 16 bits and more.
    """
    if x.dtype not in _FLOATS:
        remedy = "take its real part" if x.is_complex() else "call x.float()"
        got = str(x.dtype).removeprefix("torch.")
        raise RuntimeError(f"x: expected float64, float32, float16 or bfloat16, got {got}: {remedy} first.") from error


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward to one of these tensors may follow."""
    if _grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a product of these tensors must be an autograd Function: for backward, torch.func or forward mode."""
    if wants_gradient(*tensors):
        return True
    if not transforms_active():
        return False
    # Inside a transform torch.compile does not say what requires a gradient.
    return not _compiling() or (_grad_enabled() and functorch_active())


def sign_linear(x: Tensor, weight: Tensor, bias: Tensor | None, strict: bool, strict_weight: bool) -> Tensor:
    """``s(x) · s(weight)ᵀ + bias`` of real weights, which are packed in this call; for inference.

    Args:
        x: Shape ``(..., k)``, any strides.
        weight: Shape ``(n, k)``, any strides.
        bias: Shape ``(n,)`` or None.
        strict: +1 is where x > 0; else where not x < 0.
        strict_weight: The same of the weight.

    Returns:
        Shape ``(..., n)``, in autocast's dtype or that of x.
    """
    operator = _sign_linear if _compiling() else _sign_linear_entry
    out_dtype = autocast_dtype(x)
    # Each keyword that is passed costs 0.3 us, so defaults are omitted.
    if strict or strict_weight or out_dtype is not None:
        return operator(x, weight, bias, out_dtype=out_dtype, strict=strict, strict_weight=strict_weight)  # type: ignore[no-any-return]
    return operator(x, weight, bias)  # type: ignore[no-any-return]


def packed_linear(
    x: Tensor, words: Tensor, k: int, bias: Tensor | None, prepared: Tensor | None, strict: bool
) -> Tensor:
    """``s(x) · Wᵀ + bias`` of packed weights W; for inference.

    Args:
        x: Shape ``(..., k)``, any strides.
        words: int32, shape ``(n, ceil(k / 32))``.
        k: Number of values in a row.
        bias: Shape ``(n,)`` or None.
        prepared: The form of the words that the active kernel reads, or None.
        strict: +1 is where x > 0; else where not x < 0.

    Returns:
        Shape ``(..., n)``, in autocast's dtype or that of x.
    """
    operator = _linear if _compiling() else _linear_entry
    out_dtype = autocast_dtype(x)
    if strict or out_dtype is not None:
        return operator(x, words, k, bias, weight_prepared=prepared, out_dtype=out_dtype, strict=strict)  # type: ignore[no-any-return]
    if prepared is None:
        return operator(x, words, k, bias)  # type: ignore[no-any-return]
    return operator(x, words, k, bias, weight_prepared=prepared)  # type: ignore[no-any-return]


def real_linear(x: Tensor, words: Tensor, k: int, bias: Tensor | None, threshold: float | None = None) -> Tensor:
    """``x · Wᵀ + bias`` of real x and packed weights W.

    Args:
        x: Shape ``(..., k)``, any strides.
        words: int32, shape ``(n, ceil(k / 32))``.
        k: Number of values in a row.
        bias: Shape ``(n,)`` or None.
        threshold: The gradient of x is 0 where not ``|x| <= threshold``; None and 0 cancel nothing.

    Returns:
        Shape ``(..., n)``, in autocast's dtype or that of x; differentiable in x and bias.
    """
    if threshold:
        x = cancel_gradient(x, threshold)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    if not (x.is_cpu and tables_win(x, words.shape[0])):
        return torch.nn.functional.linear(x, functional.unpack_bits(words, k, x.dtype), bias)
    if is_differentiated(x, bias):
        y: Tensor = apply(SignedSums if _compiling() else SignedSumsEager, x, words, k, True)
        return y if bias is None else y + bias
    multiply = _multiply_signs if _compiling() else _multiply_signs_entry
    y = multiply(x, words, k, True)
    return y if bias is None else y.add_(bias)


class SignedSums(torch.autograd.Function):
    """``times_signs``, differentiable any number of times: the gradient is the product with the transposed signs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(reals: Tensor, words: Tensor, k: int, transpose: bool) -> Tensor:
        return times_signs(reals, words, k, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, words, ctx.k, ctx.transpose = inputs
        ctx.save_for_backward(words)
        ctx.save_for_forward(words)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (words,) = ctx.saved_tensors
        function = SignedSums if _compiling() else SignedSumsEager
        return apply(function, grad, words, ctx.k, not ctx.transpose), None, None, None


class SignedSumsEager(SignedSums):
    """Adds forward mode, in its own class: torch.compile takes the presence of jvp as support."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (words,) = ctx.saved_tensors
        return apply(SignedSumsEager, tangent, words, ctx.k, ctx.transpose)  # type: ignore[no-any-return]


def _in_range_limit(rule: BinaryRule, threshold: float | None) -> float | None:
    """Beyond which |x| the gradient of x is 0: the lower of threshold (None and 0: none) and the rule's own limit."""
    if not threshold:
        return rule.limit
    return threshold if rule.limit is None else min(threshold, rule.limit)


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient, whose own backward is an error in words."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *witnesses: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "bitorch_qlinear: a binary layer is differentiable only once: signs have no second derivative."
        )


class SignProduct(torch.autograd.Function):
    """See the module. The weight is None where only its words are there."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        words: Tensor,
        prepared: Tensor | None,
        k: int,
        rules: tuple[BinaryRule, BinaryRule],
        limit: float | None,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, x_words, in_range_words = torch.ops.bitorch_qlinear.linear_train(
            x,
            words,
            k,
            bias,
            weight_prepared=prepared,
            out_dtype=out_dtype,
            strict=rules[0].strict,
            threshold=limit,
        )
        return y, x_words, in_range_words

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, words, _, ctx.k, (ctx.input_rule, ctx.weight_rule), limit, _ = inputs
        _, x_words, in_range_words = output
        ctx.mark_non_differentiable(x_words, in_range_words)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias)]
        # It is referenced only so that a second derivative can find it. Its values are not needed, so it is not saved.
        ctx.weight = None if _compiling() else weight
        ctx.save_for_backward(
            x_words,
            None if limit is None else in_range_words,
            words,
            None if ctx.input_rule.derivative is None else x,
            weight if ctx.weight_rule.changes_gradient else None,
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        saved = ctx.saved_tensors  # once: a checkpoint unpacks only once
        with torch.no_grad():
            gradients = _gradients(ctx, grad, *saved)
        if _grad_enabled() and not _compiling():  # create_graph=True
            *_, x, _ = saved
            witnesses = [tensor for tensor in (grad, ctx.weight, x) if tensor is not None]
            gradients = [None if g is None else _once_differentiable(g, witnesses) for g in gradients]
        return *gradients, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        # torch looks inside the tuple of rules, and has a tuple of dimensions for it.
        in_dims = tuple(dim if isinstance(dim, int) else None for dim in in_dims)
        if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            # A batch of x alone is more rows.
            outputs = apply(SignProductEager, args[0].movedim(in_dims[0], 0), *args[1:])
            return outputs, (0, 0, None if args[7] is None else 0)
        each = [
            apply(
                SignProductEager,
                *(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)),
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0)


class SignProductEager(SignProduct):
    """Adds a clear error for forward mode, in its own class: torch.compile takes the presence of jvp as support."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "bitorch_qlinear: a binary layer has no forward-mode derivative (jvp): signs have none; use backward."
        )


def _once_differentiable(gradient: Tensor, witnesses: list[Tensor]) -> Tensor:
    """Tie the gradient to its inputs so that a second backward raises.

    An x that was saved only as bits is left out: the gradient does not depend on it. `fresh` makes autograd track the
    result when no input requires a gradient.
    """
    fresh = torch.zeros((), dtype=gradient.dtype, device=gradient.device, requires_grad=True)
    marked: Tensor = apply(_OnceDifferentiable, gradient, *witnesses, fresh)
    return marked


def times_signs(reals: Tensor, words: Tensor, k: int, transpose: bool = False) -> Tensor:
    """``reals @ signs``, or ``reals @ signs.T``: by tables on the CPU where that is faster, else by the BLAS.

    Args:
        reals: Shape ``(..., n)``, or ``(..., k)`` where transposed.
        words: The packed signs, shape ``(n, ceil(k / 32))``.
        k: Number of signs in a row.
        transpose: Multiply by the transposed signs.
    """
    if reals.is_cpu and tables_win(reals, words.shape[0] if transpose else k):
        return functional.multiply_signs(reals, words, k, transpose)
    if transpose:
        return reals @ functional.unpack_bits(words, k, reals.dtype).t()
    return _times_unpacked(reals, words, k)


# Up to so many rows tables win whatever the other sizes are: the BLAS would read signs that are unpacked for few sums.
_FEW_ROWS = {torch.float16: 64}
# Crossover between tables and BLAS for more rows, as multiples of least_sign_outputs(): outputs, values to sum.
_LEAST_OF_HALF_TYPES = {torch.bfloat16: (2, 1.5), torch.float16: (1 / 16, 1 / 8)}


def tables_win(reals: Tensor, outputs: int) -> bool:
    """Whether sums by tables, which are made anew for each row, are faster than unpacking the signs and the BLAS.

    Sizes that a traced program leaves open count as large: the choice must not depend on them.

    Measured with one thread. Up to 32 rows (float16 64) tables were faster for all sizes of 64 to 4096 (Intel Xeon with
    AVX-512). With more, on Zen 4: from 128 outputs and 64 values to sum on 1.1 to 2 times as fast, below them up to 3
    times slower; bfloat16's BLAS has instructions of its own (AVX512_BF16): from 256 and 192 on 0.99 to 3 times, but
    with AMX the BLAS is 2 to 4 times as fast; float16's has none: from 8 and 16 on 1.5 times and more.
    """
    least = _kernels.least_sign_outputs()
    if least >= _NEVER:
        return False
    if is_known(reals.numel() <= _FEW_ROWS.get(reals.dtype, 32) * reals.shape[-1]):
        return True
    if reals.dtype is torch.bfloat16 and HAS_AMX:
        return False
    least_outputs, least_values = _LEAST_OF_HALF_TYPES.get(reals.dtype, (1, 0.5))
    return not is_known(outputs < least_outputs * least) and not is_known(reals.shape[-1] < least_values * least)


def _times_unpacked(reals: Tensor, words: Tensor, k: int) -> Tensor:
    """``reals @ signs``, with the signs unpacked a block of columns at a time on the CPU.

    A block (4 MiB of float32) stays in cache and in the allocator's hands; all of a large weight would be mapped and
    zeroed by the system at every call, which takes longer than a small batch's product. CUDA's allocator does neither.
    """
    if _compiling() or not reals.is_cpu:
        return reals @ functional.unpack_bits(words, k, reals.dtype)
    columns = max(1, (1 << 20) // max(1, words.shape[0]) // 32)  # words a block
    if columns >= words.shape[1]:
        return reals @ functional.unpack_bits(words, k, reals.dtype)
    blocks, left = [], k
    for part in words.split(columns, dim=1):
        values = min(32 * columns, left)
        blocks.append(reals @ functional.unpack_bits(part.contiguous(), values, reals.dtype))
        left -= values
    return torch.cat(blocks, dim=-1)


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _keep(values: Tensor, words: Tensor, k: int) -> Tensor:
    """Zero every value whose bit is 0, even NaN and infinity; in place on CUDA."""
    if _compiling() or transforms_active():
        # Inside vmap the bits may have a dimension that the values lack, so this is not in place.
        return values.masked_fill(functional.unpack_bits(~words, k, torch.bool), 0)
    if not values.is_cpu:
        return values.masked_fill_(functional.unpack_bits(~words, k, torch.bool), 0)
    # torch.where on the CPU takes a branch an element, of which random bits mispredict half: 8 times slower (Zen 4).
    # As int8, bit 0 is -1 and bit 1 is +1; halved, and rounded down, -1 and 0: masks.
    integers = _INTEGERS[values.element_size()]
    masks = functional.unpack_bits(~words, k, torch.int8) >> 1
    return (values.view(integers) & masks.to(integers)).view(values.dtype)


def _gradients(
    ctx: Any,
    grad: Tensor,
    x_words: Tensor,
    in_range_words: Tensor | None,
    words: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
) -> list[Tensor | None]:
    """Those of x, weight and bias, in their dtypes, from what was saved; None where not needed."""
    x_dtype, weight_dtype, bias_dtype = ctx.dtypes
    rows = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1])  # -1 cannot be found where n is 0
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = times_signs(grad, words, ctx.k).to(x_dtype)
        if x is not None:
            grad_x = grad_x * ctx.input_rule.derivative(x)
        if in_range_words is not None:
            grad_x = _keep(grad_x, in_range_words, ctx.k)
    if ctx.needs_input_grad[1]:
        row_words = x_words.reshape(rows.shape[0], x_words.shape[-1])
        grad_weight = times_signs(rows.t(), row_words, ctx.k).to(weight_dtype)
        if weight is not None:
            grad_weight = ctx.weight_rule.gradient(grad_weight, weight)
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0).to(bias_dtype)
    return [grad_x, grad_weight, grad_bias]


def differentiable(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    words: Tensor,
    prepared: Tensor | None,
    k: int,
    rules: tuple[BinaryRule, BinaryRule],
    threshold: float | None,
) -> Tensor:
    """``s(x) · s(weight)ᵀ + bias``, differentiable once in x, weight and bias.

    Args:
        x: Shape ``(..., k)``, any strides.
        weight: Shape ``(n, k)``, or None where only its words are there.
        bias: Shape ``(n,)`` or None.
        words: The packed signs of the weight.
        prepared: Their prepared form, or None.
        k: Number of values in a row.
        rules: How signs and gradients are made, of x and of the weight.
        threshold: The gradient of x is 0 where not ``|x| <= threshold``; None and 0 cancel nothing.

    Returns:
        Shape ``(..., n)``, in autocast's dtype or that of x.

    Raises:
        RuntimeError: As the operators do; and in a second backward.
    """
    if _compiling() and functorch_active():
        # Dynamo differentiates the forward of an autograd Function there, and ignores its backward: zeros (torch 2.13).
        raise NotImplementedError(
            "bitorch_qlinear: torch.compile cannot differentiate a binary layer inside of torch.func's transforms: "
            "compile the layer and transform it outside, or compute without gradients (torch.no_grad)."
        )
    limit = _in_range_limit(rules[0], threshold)
    function = SignProduct if _compiling() else SignProductEager
    y: Tensor = apply(function, x, weight, bias, words, prepared, k, rules, limit, autocast_dtype(x))[0]
    return y
