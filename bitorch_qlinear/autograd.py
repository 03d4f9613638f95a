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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _library, functional
from ._function import apply
from .quantizations import BinaryRule

__all__ = ["Rules", "binary_linear"]


@dataclass(frozen=True)
class Rules:
    """How both factors become ±1 and what gradient they hand back.

    Attributes:
        input: Rule of the input.
        weight: Rule of the weight.
    """

    input: BinaryRule
    weight: BinaryRule


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
        raise RuntimeError("bitorch_qlinear: QLinear is differentiable only once: signs have no second derivative.")


class BinaryLinear(torch.autograd.Function):
    """See the module; call it through :func:`binary_linear`."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        words: Tensor,
        prepared: Tensor | None,
        rules: Rules,
        limit: float | None,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, x_words, in_range_words = torch.ops.bitorch_qlinear.linear_train(
            x,
            words,
            weight.shape[1],
            bias,
            weight_prepared=prepared,
            out_dtype=out_dtype,
            strict=rules.input.strict,
            threshold=limit,
        )
        return y, x_words, in_range_words

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, words, _, ctx.rules, limit, _ = inputs
        _, x_words, in_range_words = output
        ctx.mark_non_differentiable(x_words, in_range_words)
        ctx.set_materialize_grads(False)
        ctx.k = weight.shape[1]
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        # Only to be known to a second derivative; not saved, for its values are not used.
        ctx.weight = None if torch.compiler.is_compiling() else weight
        ctx.save_for_backward(
            x_words,
            None if limit is None else in_range_words,
            words,
            None if ctx.rules.input.derivative is None else x,
            weight if ctx.rules.weight.changes_gradient else None,
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        saved = ctx.saved_tensors  # once: a checkpoint unpacks only once
        with torch.no_grad():
            gradients = _gradients(ctx, grad, *saved)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            *_, x, _ = saved
            witnesses = [tensor for tensor in (grad, ctx.weight, x) if tensor is not None]
            gradients = [None if g is None else _once_differentiable(g, witnesses) for g in gradients]
        return *gradients, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            # A batch of x alone is more rows.
            outputs = apply(BinaryLinearEager, args[0].movedim(in_dims[0], 0), *args[1:])
            return outputs, (0, 0, None if args[6] is None else 0)
        each = [
            apply(
                BinaryLinearEager,
                *(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)),
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0)


class BinaryLinearEager(BinaryLinear):
    """With words for forward mode, which torch.compile would take for a promise to support it."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "bitorch_qlinear: QLinear has no forward-mode derivative (jvp): signs have none; use backward."
        )


def _once_differentiable(gradient: Tensor, witnesses: list[Tensor]) -> Tensor:
    """The gradient, tied to all that it is computed from, so that a second backward arrives at the error.

    But for an x of which only bits are saved: the gradient is constant in it, almost everywhere. The fresh witness is
    for autograd where nothing else requires a gradient.
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


# Of the kernel's least_sign_outputs: how many outputs, and values to sum, it takes for tables to be faster.
_LEAST_OF_HALF_TYPES = {torch.bfloat16: (2, 1.5), torch.float16: (1 / 16, 1 / 8)}


def tables_win(reals: Tensor, outputs: int) -> bool:
    """Whether tables, which are made anew for each row of outputs, are faster than the BLAS.

    Measured on Zen 4, one thread, 1 to 4096 rows (bfloat16 16384). From 128 outputs and 64 values to sum on 1.1 to 2
    times as fast, below them up to 3 times slower. bfloat16's BLAS has instructions of its own (AVX512_BF16): from 256
    and 192 on 0.99 to 3 times, with 160 values down to 0.92. float16's has none: from 8 and 16 on 1.5 times and more.
    """
    least = _library.least_sign_outputs()
    least_outputs, least_values = _LEAST_OF_HALF_TYPES.get(reals.dtype, (1, 0.5))
    return outputs >= least_outputs * least and reals.shape[-1] >= least_values * least


def _times_unpacked(reals: Tensor, words: Tensor, k: int) -> Tensor:
    """``reals @ signs``, with the signs unpacked a block of columns at a time on the CPU.

    A block (4 MiB of float32) stays in cache and in the allocator's hands; all of a large weight would be mapped and
    zeroed by the system at every call, which takes longer than a small batch's product. CUDA's allocator does neither.
    """
    columns = max(1, (1 << 20) // max(1, words.shape[0]) // 32)  # words a block
    if not reals.is_cpu or columns >= words.shape[1] or torch.compiler.is_compiling():
        return reals @ functional.unpack_bits(words, k, reals.dtype)
    blocks, left = [], k
    for part in words.split(columns, dim=1):
        values = min(32 * columns, left)
        blocks.append(reals @ functional.unpack_bits(part.contiguous(), values, reals.dtype))
        left -= values
    return torch.cat(blocks, dim=-1)


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _keep(values: Tensor, words: Tensor, k: int) -> Tensor:
    """The values, in place where they can be, where the bit is 1, and 0 elsewhere, whatever stands there."""
    if not values.is_cpu:
        out_of_range = functional.unpack_bits(~words, k, torch.bool)
        if torch._C._are_functorch_transforms_active():  # the bits may have a dimension of vmap that the values lack
            return values.masked_fill(out_of_range, 0)
        return values.masked_fill_(out_of_range, 0)
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
            grad_x = grad_x * ctx.rules.input.derivative(x)
        if in_range_words is not None:
            grad_x = _keep(grad_x, in_range_words, ctx.k)
    if ctx.needs_input_grad[1]:
        row_words = x_words.reshape(rows.shape[0], x_words.shape[-1])
        grad_weight = times_signs(rows.t(), row_words, ctx.k).to(weight_dtype)
        if weight is not None:
            grad_weight = ctx.rules.weight.gradient(grad_weight, weight)
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0).to(bias_dtype)
    return [grad_x, grad_weight, grad_bias]


def binary_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    words: Tensor,
    prepared: Tensor | None,
    rules: Rules,
    threshold: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``s(x) · s(weight)ᵀ + bias``, differentiable once in x, weight and bias.

    Args:
        x: Shape ``(..., k)``.
        weight: Shape ``(n, k)``.
        bias: Shape ``(n,)`` or None.
        words: The packed signs of `weight`.
        prepared: Their prepared form, or None.
        rules: How signs and gradients are made.
        threshold: The gradient of x is 0 where not ``|x| <= threshold``; None and 0 cancel nothing.
        out_dtype: By default that of x.

    Returns:
        Shape ``(..., n)``.

    Raises:
        RuntimeError: As the operators do; and in a second backward.
    """
    limit = _in_range_limit(rules.input, threshold)
    function = BinaryLinear if torch.compiler.is_compiling() else BinaryLinearEager
    y: Tensor = apply(function, x, weight, bias, words, prepared, rules, limit, out_dtype)[0]
    return y
