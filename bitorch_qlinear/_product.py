"""The products that the layers compute, for inference and with gradients, and the dtype of their output.

Forward is exact, by XNOR and popcount. Backward is the straight-through estimator of Hubara et al.
(https://arxiv.org/abs/1602.02830): with ``y = s(x) · s(W)ᵀ + b`` and ``g = dL/dy``::

    dL/dx = input rule's gradient of g · s(W), and 0 if |x| > threshold
    dL/dW = weight rule's gradient of gᵀ · s(x)
    dL/db = g summed over the leading dimensions

With a scale α for each output channel, ``y = (s(x) · s(W)ᵀ) · α + b``, and ``g · α`` takes the place of g in dL/dx and
dL/dW; ``dL/dα = g · (s(x) · s(W)ᵀ)``, summed over the leading dimensions. The integer product is not saved, but
computed again from the bits. If α is the mean magnitude of the K weights of its channel, dL/dW also gets
``s(W) / K · dL/dα``: the chain rule through α. That is the gradient of the reference implementation
(https://github.com/jiecaoyu/XNOR-Net-PyTorch, ``BinOp.updateBinaryGradWeight``, derived in its ``notes``), which
corrects the paper's, without its constant factor K - 1. Its mask ``|W| <= 1`` is the limit of the weight's rule.

Backward needs the signs of x, and with a threshold also which elements are in range. Each takes one bit an element, and
they are saved beside the words of W instead of x. Only the rules whose derivative is a function of x (approxsign,
swishsign) save x as well.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _library, functional
from ._sign_gemm import beats_blas, differentiable_sign_gemm, multiply_signs, sign_gemm
from ._torch import any_autocast, apply, functorch_active, is_dtensor, operator_entry, transforms_active
from .quantizations import BinaryRule, cancel_gradient, quantize
from .quantizations.ternary import is_eager, kept_means, kept_quotients, ternary_blocks, ternary_limits

__all__ = [
    "autocast_dtype",
    "differentiable_linear",
    "has_kernels",
    "is_differentiated",
    "level_linear",
    "levels_in_float",
    "packed_linear",
    "real_linear",
    "scaled",
    "scaled_in_float",
    "sign_linear",
    "ternary_in_float",
    "ternary_linear",
    "ternary_scale",
    "ternary_words",
    "train_linear",
    "wants_gradient",
]

# Looked up once, because a name in a module of a module costs 20 ns in every call.
_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled

_sign_linear, _sign_linear_entry = _library.operators.sign_linear, operator_entry(_library.operators.sign_linear)
_dorefa_linear = _library.operators.dorefa_linear
_dorefa_linear_entry = operator_entry(_dorefa_linear)
_linear, _linear_entry = _library.operators.linear, operator_entry(_library.operators.linear)


def has_kernels(tensor: Tensor) -> bool:
    """Whether the operators can compute with this tensor (on meta: its shape); for others the layers use float.

    A DTensor has none even on a device with kernels, because the operators have no rules for sharding.
    """
    on_device = tensor.is_cpu or tensor.is_meta or (_library.has_cuda and tensor.is_cuda)
    return on_device and (type(tensor) is Tensor or type(tensor) is Parameter or not is_dtensor(tensor))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast gives the output of a linear layer; None means the dtype of x."""
    if any_autocast() and x.dtype is not torch.float64:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd may later ask for the gradient of one of these tensors."""
    if _grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a product of these tensors must be an autograd Function, for backward, torch.func or forward mode."""
    if wants_gradient(*tensors):
        return True
    if not transforms_active():
        return False
    # While torch.compile traces inside a transform, requires_grad does not tell which tensors need a gradient.
    return not _compiling() or (_grad_enabled() and functorch_active())


def sign_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, strict: bool, strict_weight: bool, scale: Tensor | None = None
) -> Tensor:
    """Compute ``(s(x) · s(weight)ᵀ) · scale + bias`` from real weights, which are packed in this call; for inference.

    Args:
        x: Shape ``(..., k)``, any strides.
        weight: Shape ``(n, k)``, any strides.
        bias: Shape ``(n,)`` or None.
        strict: The sign of x is +1 only if x > 0, instead of +1 unless x < 0.
        strict_weight: The same for the weight.
        scale: Shape ``(n,)`` or None.

    Returns:
        Shape ``(..., n)``, in autocast's dtype or that of x.
    """
    operator = _sign_linear if _compiling() else _sign_linear_entry
    out_dtype = autocast_dtype(x)
    # Each keyword that is passed costs 0.3 us, so defaults are omitted.
    if strict or strict_weight or out_dtype is not None or scale is not None:
        return operator(  # type: ignore[no-any-return]
            x, weight, bias, scale=scale, out_dtype=out_dtype, strict=strict, strict_weight=strict_weight
        )
    return operator(x, weight, bias)  # type: ignore[no-any-return]


def packed_linear(
    x: Tensor,
    words: Tensor,
    k: int,
    bias: Tensor | None,
    prepared: Tensor | None,
    strict: bool,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute ``(s(x) · Wᵀ) · scale + bias`` from packed weights W; for inference.

    Args:
        x: Shape ``(..., k)``, any strides.
        words: int32, shape ``(n, ceil(k / 32))``.
        k: Number of values in a row.
        bias: Shape ``(n,)`` or None.
        prepared: The prepared form of the words, or None.
        strict: The sign of x is +1 only if x > 0, instead of +1 unless x < 0.
        scale: Shape ``(n,)`` or None.

    Returns:
        Shape ``(..., n)``, in autocast's dtype or that of x.
    """
    operator = _linear if _compiling() else _linear_entry
    out_dtype = autocast_dtype(x)
    if strict or out_dtype is not None or scale is not None:
        return operator(  # type: ignore[no-any-return]
            x, words, k, bias, weight_prepared=prepared, scale=scale, out_dtype=out_dtype, strict=strict
        )
    if prepared is None:
        return operator(x, words, k, bias)  # type: ignore[no-any-return]
    return operator(x, words, k, bias, weight_prepared=prepared)  # type: ignore[no-any-return]


def real_linear(
    x: Tensor,
    words: Tensor,
    k: int,
    bias: Tensor | None,
    threshold: float | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute ``(x · Wᵀ) · scale + bias`` from real x and packed weights W; differentiable in x, bias and scale.

    Args:
        x: Shape ``(..., k)``, any strides.
        words: int32, shape ``(n, ceil(k / 32))``.
        k: Number of values in a row.
        bias: Shape ``(n,)`` or None.
        threshold: The gradient of x is 0 unless ``|x| <= threshold``; None and 0 cancel nothing.
        scale: Shape ``(n,)`` or None.

    Returns:
        Shape ``(..., n)``, in autocast's dtype or that of x.
    """
    if threshold:
        x = cancel_gradient(x, threshold)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    if scale is not None:
        return scaled(real_linear(x, words, k, None), scale, bias)
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    if not (x.is_cpu and beats_blas(x, words.shape[0])):
        return torch.nn.functional.linear(x, functional.unpack_bits(words, k, x.dtype), bias)
    if is_differentiated(x, bias):
        y = differentiable_sign_gemm(x, words, k, True)
        return y if bias is None else y + bias
    y = multiply_signs(x, words, k, True)
    return y if bias is None else y.add_(bias)


def ternary_words(weight: Tensor, with_means: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the words of ternary weights t, two signs for each: +1 unless t < 0, and +1 only if t > 0.

    Args:
        weight: Real weights, shape ``(n, k)``, any strides, on any device; without kernels there, the CPU packs them.
        with_means: Whether the paper's scales are computed as well.

    Returns:
        The words: int32, shape ``(2n, ceil(k / 32))``, first the first signs of all rows, and then the second ones.
        The limits Δ, shape ``(n, 1)``: the words of a row whose limit is not finite have no meaning.
        The scales that :func:`.quantizations.kept_means` returns, or None.
    """
    weight = weight.detach()
    if not is_eager(weight):
        limits = ternary_limits(weight)
        planes = [(weight >= -limits).to(weight.dtype), (weight > limits).to(weight.dtype)]
        if not has_kernels(weight):
            planes = [plane.cpu() for plane in planes]
        words = torch.cat([functional.pack_bits(plane, True) for plane in planes]).to(weight.device)
        return words, limits, kept_means(weight) if with_means else None
    n, k = weight.shape
    float_type = torch.promote_types(weight.dtype, torch.float32)
    signs, kept = (weight.new_empty(n, (k + 31) // 32, dtype=torch.int32) for _ in range(2))
    limits, means = weight.new_empty(n, 1, dtype=float_type), weight.new_empty(n, dtype=float_type)
    memory = None
    start = 0
    for block, block_limits, magnitudes in ternary_blocks(weight):
        rows = slice(start, start + len(block))
        start += len(block)
        limits[rows] = block_limits
        signs[rows] = functional.pack_bits(block)
        if not with_means:
            kept[rows] = functional.pack_bits(torch.gt(magnitudes, block_limits, out=magnitudes), True)
            continue
        memory = torch.empty_like(magnitudes) if memory is None else memory
        ones = torch.gt(magnitudes, block_limits, out=memory[: len(block)])
        kept[rows] = functional.pack_bits(ones, True)
        means[rows] = kept_quotients(magnitudes.mul_(ones), ones)
    valid = functional.pack_bits(weight.new_zeros(1, k))  # ones, and zeros past k
    words = kept.new_empty(2 * n, kept.shape[1])
    above = torch.bitwise_and(signs, kept, out=words[n:])
    torch.bitwise_xor(above, kept.bitwise_xor_(valid), out=words[:n])
    return words, limits, means if with_means else None


def ternary_scale(limits: Tensor, scale: Tensor | None) -> Tensor:
    """Return the scale, or 1, of each output, and NaN for those whose limit is not finite.

    With this scale the output shows weights that are not finite, and no values are read back, which would wait for a
    CUDA device and could not be compiled.

    Args:
        limits: The limits Δ, shape ``(n, 1)``.
        scale: Shape ``(n,)`` or None.
    """
    ones = (limits - limits).squeeze(1) + 1
    return ones if scale is None else scale * ones


# float32 holds all whole numbers up to this one.
_MOST_IN_FLOAT32 = 1 << 24


def _exact_dtype(dtype: torch.dtype, k: int) -> torch.dtype:
    """Return the dtype in which products of k signs are exact: this one, or float64 if float32 does not hold them."""
    return dtype if k <= _MOST_IN_FLOAT32 else torch.float64


def _check_vectors(n: int, scale: Tensor | None, bias: Tensor | None) -> None:
    """Check that scale and bias have one value for each output, because torch would broadcast others.

    Raises:
        RuntimeError: One of them has another shape.
    """
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None and vector.shape != (n,):
            raise RuntimeError(f"{name}: expected shape ({n},), got {tuple(vector.shape)}")


def ternary_linear(
    x: Tensor,
    words: Tensor,
    k: int,
    bias: Tensor | None,
    prepared: Tensor | None,
    rule: BinaryRule,
    scale: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Compute ``(s(x) · tᵀ) · scale + bias`` from packed ternary weights t; differentiable once in x, bias and scale.

    A weight is the mean of its two signs, so the product is the mean of two products of signs. Both have the parity of
    k, so it is an integer, and exact.

    Args:
        x: Shape ``(..., k)``, any strides.
        words: The words of :func:`ternary_words`, shape ``(2n, ceil(k / 32))``.
        k: Number of values in a row.
        bias: Shape ``(n,)`` or None.
        prepared: The prepared form of the words, or None.
        rule: The signs of x and its gradient.
        scale: Shape ``(n,)`` or None.
        threshold: The gradient of x is 0 unless ``|x| <= threshold``; None and 0 cancel nothing.

    Returns:
        Shape ``(..., n)``, in autocast's dtype or that of x.

    Raises:
        RuntimeError: An argument is wrong, or, later, a second backward.
        NotImplementedError: torch.compile traces it inside of a transform of torch.func.
    """
    n = words.shape[0] // 2
    _check_vectors(n, scale, bias)
    out_dtype = autocast_dtype(x) or x.dtype
    dtype = _sum_dtype(out_dtype)
    exact = _exact_dtype(dtype, k)
    differentiated = is_differentiated(x, bias, scale)
    if differentiated:
        rules = rule, BinaryRule()
        products = differentiable_linear(x, None, None, words, prepared, k, rules, threshold, out_dtype=exact)
    else:
        operator = _linear if _compiling() else _linear_entry
        products = operator(x, words, k, None, weight_prepared=prepared, out_dtype=exact, strict=rule.strict)
    # One pass computes a + (b - a) / 2. It is exact, because b - a is even and at most 2k.
    y = torch.lerp(products[..., :n], products[..., n:], 0.5).to(dtype)
    if differentiated or _compiling():
        return _scaled_sum(y, scale, bias).to(out_dtype)
    # In place, because fresh memory for each result takes a tenth of the time of the product at 512 × 4096².
    if scale is not None:
        y.mul_(scale.to(dtype))
    if bias is not None:
        y.add_(bias.to(dtype))
    return y.to(out_dtype)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype T in which the operators multiply by the scale and add the bias, for an output of this dtype."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def scaled(product: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``product · scale + bias`` in the product's dtype, computed as the operators do it."""
    return _scaled_sum(product.to(_sum_dtype(product.dtype)), scale, bias).to(product.dtype)


def _scaled_sum(product: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``product · scale + bias`` in the product's dtype, in which each operation is rounded."""
    y = product if scale is None else product * scale.to(product.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of x; torch has no autocast for meta."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def scaled_in_float(
    x_signs: Tensor, weight_signs: Tensor, scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Compute ``(x_signs · weight_signsᵀ) · scale + bias`` by torch's own operators, with the values of the kernels.

    Args:
        x_signs: ±1, shape ``(..., k)``.
        weight_signs: ±1, shape ``(n, k)``.
        scale: Shape ``(n,)`` or None.
        bias: Shape ``(n,)`` or None.
        out_dtype: The dtype of the output.

    Returns:
        Shape ``(..., n)``.
    """
    dtype = _sum_dtype(out_dtype)
    with _without_autocast(x_signs):
        exact = _exact_dtype(dtype, x_signs.shape[-1])
        y = torch.nn.functional.linear(x_signs.to(exact), weight_signs.to(exact)).to(dtype)
        return _scaled_sum(y, scale, bias).to(out_dtype)


def _whole_numbers(x_signs: Tensor, values: Tensor) -> Tensor:
    """Return ``x_signs · valuesᵀ``; the addition turns -0, the product of -1 and 0 if k is 1, into 0."""
    return torch.nn.functional.linear(x_signs, values) + 0.0


class TernaryProduct(torch.autograd.Function):
    """Computes ``(x · tᵀ) · scale``, and passes the gradient of ``scale · t`` unchanged to t."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        return _whole_numbers(x, values).to(scale.dtype) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, values, scale = ctx.saved_tensors
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * scale).to(values.dtype) @ values
        if ctx.needs_input_grad[1]:
            rows = math.prod(grad.shape[:-1])  # torch cannot infer -1 if n is 0
            grad_values = grad.reshape(rows, grad.shape[-1]).t().to(x.dtype) @ x.reshape(rows, x.shape[-1])
        return grad_x, grad_values, None


def ternary_in_float(
    x_signs: Tensor,
    values: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    scale_is_mean: bool = False,
) -> Tensor:
    """Compute what :func:`ternary_linear` does by torch's own operators, with the same values.

    Args:
        x_signs: ±1, shape ``(..., k)``.
        values: -1, 0 or +1, shape ``(n, k)``.
        scale: Shape ``(n,)`` or None.
        bias: Shape ``(n,)`` or None.
        out_dtype: The dtype of the output.
        scale_is_mean: The scale was computed from the weights. Then the gradient of ``scale · values`` passes unchanged
            to `values`, and the scale has none.

    Returns:
        Shape ``(..., n)``.

    Raises:
        RuntimeError: The scale or the bias has another shape.
    """
    _check_vectors(values.shape[0], scale, bias)
    dtype = _sum_dtype(out_dtype)
    exact = _exact_dtype(dtype, x_signs.shape[-1])
    with _without_autocast(x_signs):
        x_signs, values = x_signs.to(exact), values.to(exact)
        if scale is not None and scale_is_mean:
            y: Tensor = apply(TernaryProduct, x_signs, values, scale.to(dtype))
            return _scaled_sum(y, None, bias).to(out_dtype)
        return _scaled_sum(_whole_numbers(x_signs, values).to(dtype), scale, bias).to(out_dtype)


def level_linear(
    x: Tensor,
    words: Tensor,
    k: int,
    bias: Tensor | None,
    prepared: Tensor | None,
    bits: int,
    scale: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """Compute ``(q(x) · Wᵀ) · scale + bias``, where q rounds x to levels; differentiable in x, bias and scale.

    The gradient passes the rounding unchanged, as through the quantization.

    Args:
        x: Shape ``(..., k)``, any strides, on the CPU.
        words: The packed signs W, shape ``(n, ceil(k / 32))``.
        k: Number of values in a row.
        bias: Shape ``(n,)`` or None.
        prepared: The prepared form of the words, or None.
        bits: The bits of a level, 1 or 2.
        scale: Shape ``(n,)`` or None.
        threshold: The gradient of x is 0 unless ``|x| <= threshold``; None and 0 cancel nothing.

    Returns:
        Shape ``(..., n)``, in autocast's dtype or that of x.

    Raises:
        NotImplementedError: torch.compile traces it inside of a transform of torch.func.
    """
    out_dtype = autocast_dtype(x)
    if not is_differentiated(x, bias, scale):
        operator = _dorefa_linear if _compiling() else _dorefa_linear_entry
        return operator(  # type: ignore[no-any-return]
            x, words, k, bias, bits=bits, weight_prepared=prepared, scale=scale, out_dtype=out_dtype
        )
    _check_not_transformed_while_compiling()
    out_dtype = out_dtype or x.dtype
    function = LevelProduct if _compiling() else LevelProductEager
    y = apply(function, cancel_gradient(x, threshold), words, prepared, k, bits, _sum_dtype(out_dtype))
    return _scaled_sum(y, scale, bias).to(out_dtype)


def levels_in_float(
    x: Tensor,
    weight_signs: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    threshold: float | None,
) -> Tensor:
    """Compute what :func:`level_linear` does by torch's own operators, with the values of the kernel.

    Args:
        x: Shape ``(..., k)``.
        weight_signs: ±1, shape ``(n, k)``.
        scale: Shape ``(n,)`` or None.
        bias: Shape ``(n,)`` or None.
        bits: The bits of a level.
        threshold: The gradient of x is 0 unless ``|x| <= threshold``; None and 0 cancel nothing.

    Returns:
        Shape ``(..., n)``, in autocast's dtype or that of x.
    """
    steps, out_dtype = (1 << bits) - 1, autocast_dtype(x) or x.dtype
    dtype = _sum_dtype(out_dtype)
    levels = quantize(cancel_gradient(x, threshold) * steps, partial(_round_within, steps=steps))
    with _without_autocast(x):
        y = torch.nn.functional.linear(levels.to(dtype), weight_signs.to(dtype))
        y = y if bits == 1 else y * torch.tensor(1 / steps, dtype=dtype, device=y.device)
        return _scaled_sum(y, scale, bias).to(out_dtype)


def _round_within(x: Tensor, steps: int) -> Tensor:
    return torch.round(x.clamp(0, steps))


def _in_range_limit(rule: BinaryRule, threshold: float | None) -> float | None:
    """Return the |x| beyond which the gradient of x is 0: the lower of threshold (0 is none) and the rule's limit."""
    if not threshold:
        return rule.limit
    return threshold if rule.limit is None else min(threshold, rule.limit)


class _OnceDifferentiable(torch.autograd.Function):
    """Returns a gradient unchanged, and raises if that gradient is differentiated itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "bitorch_qlinear: a binary layer is differentiable only once: signs have no second derivative."
        )


class BinaryProduct(torch.autograd.Function):
    """Computes ``(s(x) · s(W)ᵀ) · scale + b``, with the gradients that the module's docstring lists.

    The weight is None if only its words exist, and then has no gradient. If `scale_is_mean`, the scale was computed
    from the weight, whose gradient then includes the part through the scale. The outputs after y are the packed signs
    of x and its packed in-range bits, which backward reads.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        words: Tensor,
        prepared: Tensor | None,
        k: int,
        rules: tuple[BinaryRule, BinaryRule],
        limit: float | None,
        out_dtype: torch.dtype | None,
        scale_is_mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, x_words, in_range_words = _library.operators.linear_train(
            x,
            words,
            k,
            bias,
            weight_prepared=prepared,
            scale=scale,
            out_dtype=out_dtype,
            strict=rules[0].strict,
            threshold=limit,
        )
        return y, x_words, in_range_words

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, scale, words, _, ctx.k, (ctx.input_rule, ctx.weight_rule), limit, _, ctx.scale_is_mean = inputs
        _, x_words, in_range_words = output
        ctx.mark_non_differentiable(x_words, in_range_words)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias, scale)]
        # The weight is referenced only so that a second derivative can find it. Its values are not needed, so it is not
        # saved.
        ctx.weight = None if _compiling() else weight
        ctx.save_for_backward(
            x_words,
            None if limit is None else in_range_words,
            words,
            None if ctx.input_rule.derivative is None else x,
            weight if ctx.weight_rule.changes_gradient else None,
            scale,
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        saved = ctx.saved_tensors  # read once, because activation checkpointing unpacks only once
        with torch.no_grad():
            gradients = _gradients(ctx, grad, *saved)
        if _grad_enabled() and not _compiling():  # create_graph=True
            *_, x, _, scale = saved
            inputs = [tensor for tensor in (grad, ctx.weight, x, scale) if tensor is not None]
            gradients = [None if g is None else _once_differentiable(g, inputs) for g in gradients]
        return *gradients, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        # torch looks into the tuple of rules and gives it a tuple of dimensions.
        in_dims = tuple(dim if isinstance(dim, int) else None for dim in in_dims)
        if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            # A batch of only x is the same as more rows.
            outputs = apply(BinaryProductEager, args[0].movedim(in_dims[0], 0), *args[1:])
            return outputs, (0, 0, None if args[8] is None else 0)
        each = [
            apply(
                BinaryProductEager,
                *(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)),
            )
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0)


class BinaryProductEager(BinaryProduct):
    """Adds a clear error for forward mode, in a class of its own, because torch.compile refuses a jvp."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "bitorch_qlinear: a binary layer has no forward-mode derivative (jvp): signs have none; use backward."
        )


class LevelProduct(torch.autograd.Function):
    """Computes ``q(x) · Wᵀ`` from x, which q rounds to levels, and packed W; the gradient passes the rounding."""

    @staticmethod
    def forward(x: Tensor, words: Tensor, prepared: Tensor | None, k: int, bits: int, out_dtype: torch.dtype) -> Tensor:
        y: Tensor = _library.operators.dorefa_linear(
            x, words, k, bits=bits, weight_prepared=prepared, out_dtype=out_dtype
        )
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, words, _, ctx.k, _, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(words)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (words,) = ctx.saved_tensors
        return differentiable_sign_gemm(grad, words, ctx.k, False).to(ctx.dtype), None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if all(dim is None for dim in in_dims[1:]):  # a batch of only x is the same as more rows
            return apply(LevelProductEager, args[0].movedim(in_dims[0], 0), *args[1:]), 0
        each = [
            apply(
                LevelProductEager,
                *(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)),
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(each), 0


class LevelProductEager(LevelProduct):
    """Adds a clear error for forward mode, in a class of its own, because torch.compile refuses a jvp."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "bitorch_qlinear: a binary layer has no forward-mode derivative (jvp): rounding has none; use backward."
        )


def _once_differentiable(gradient: Tensor, inputs: list[Tensor]) -> Tensor:
    """Return the gradient tied to the tensors that it was computed from, so that a second backward raises.

    An x that was saved only as bits is not among these, because the gradient does not depend on it. `fresh` makes
    autograd track the result even if none of them requires a gradient.
    """
    fresh = torch.zeros((), dtype=gradient.dtype, device=gradient.device, requires_grad=True)
    marked: Tensor = apply(_OnceDifferentiable, gradient, *inputs, fresh)
    return marked


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _apply_mask(values: Tensor, words: Tensor, k: int) -> Tensor:
    """Zero every value whose bit is 0, even NaN and infinity; in place on CUDA."""
    if _compiling() or transforms_active():
        # This is not in place, because inside vmap the bits may have a dimension that the values lack.
        return values.masked_fill(functional.unpack_bits(~words, k, torch.bool), 0)
    if not values.is_cpu:
        return values.masked_fill_(functional.unpack_bits(~words, k, torch.bool), 0)
    # torch.where on the CPU branches for each element, and random bits mispredict half of the branches: 8 times slower
    # (Zen 4). Unpacked from the inverted words, a bit 1 is -1 and a bit 0 is +1. Halved and rounded down, these are
    # masks: -1 keeps a value, and 0 makes it zero.
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
    scale: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of x, weight, bias and scale in their dtypes, or None for those autograd does not need."""
    x_dtype, weight_dtype, bias_dtype, scale_dtype = ctx.dtypes
    count = math.prod(grad.shape[:-1])  # torch cannot infer -1 if n is 0
    rows = grad.reshape(count, grad.shape[-1])
    row_words = x_words.reshape(count, x_words.shape[-1])
    grad_x = grad_weight = grad_bias = grad_scale = None
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0).to(bias_dtype)
    if scale is not None:
        dtype = _sum_dtype(grad.dtype)
        if ctx.needs_input_grad[3] or (ctx.scale_is_mean and ctx.needs_input_grad[1]):
            if transforms_active():  # this operator cannot have a batching rule, because it takes tensors by keyword
                product = sign_gemm(functional.unpack_bits(row_words, ctx.k, dtype), words, ctx.k, True)
            else:
                product = functional.binary_linear(row_words, words, ctx.k, out_dtype=dtype)
            grad_scale = (product * rows).sum(0)
        grad = (grad.to(dtype) * scale.to(dtype)).to(grad.dtype)
        rows = grad.reshape(rows.shape)
    if ctx.needs_input_grad[0]:
        grad_x = sign_gemm(grad, words, ctx.k).to(x_dtype)
        if x is not None:
            grad_x = grad_x * ctx.input_rule.derivative(x)
        if in_range_words is not None:
            grad_x = _apply_mask(grad_x, in_range_words, ctx.k)
    if ctx.needs_input_grad[1]:
        grad_weight = sign_gemm(rows.t(), row_words, ctx.k).to(weight_dtype)
        if weight is not None:
            grad_weight = ctx.weight_rule.gradient(grad_weight, weight)
        if grad_scale is not None and ctx.scale_is_mean:
            grad_weight = _add_signs(grad_weight, words, ctx.k, grad_scale / max(ctx.k, 1))
    if grad_scale is not None:
        grad_scale = grad_scale.to(scale_dtype) if ctx.needs_input_grad[3] else None
    return [grad_x, grad_weight, grad_bias, grad_scale]


# Unpacked signs of so many weights stay in cache until they are added.
_BLOCK = 1 << 17


def _add_signs(values: Tensor, words: Tensor, k: int, factors: Tensor) -> Tensor:
    """Return ``values + signs · factors``, with a factor for each row; eagerly on the CPU in place.

    Args:
        values: Shape ``(n, k)``.
        words: The packed signs, shape ``(n, ceil(k / 32))``.
        k: Number of values in a row.
        factors: Shape ``(n,)``.
    """
    factors = factors.to(values.dtype).unsqueeze(-1)
    if _compiling() or transforms_active() or not values.is_cpu:
        return values + functional.unpack_bits(words, k, values.dtype) * factors
    rows = max(1, _BLOCK // max(k, 1))
    for block, part, each in zip(values.split(rows), words.split(rows), factors.split(rows), strict=True):
        block.addcmul_(functional.unpack_bits(part, k, values.dtype), each)
    return values


def train_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rules: tuple[BinaryRule, BinaryRule],
    threshold: float | None,
    scale: Tensor | None = None,
    scale_is_mean: bool = False,
) -> Tensor:
    """Compute ``(s(x) · s(weight)ᵀ) · scale + bias``, differentiable once in x, weight, bias and scale.

    The weight has shape ``(n, k)``, and its signs are packed in this call. The other arguments, the result and the
    errors are those of :func:`differentiable_linear`.
    """
    words = _library.operators.pack_bits(weight.detach(), rules[1].strict)
    k = weight.shape[1]
    return differentiable_linear(x, weight, bias, words, None, k, rules, threshold, scale, scale_is_mean)


def _check_not_transformed_while_compiling() -> None:
    if _compiling() and functorch_active():
        # Dynamo would differentiate the Function's forward here and ignore its backward: zeros (torch 2.13).
        raise NotImplementedError(
            "bitorch_qlinear: torch.compile cannot differentiate a binary layer inside of torch.func's transforms: "
            "compile the layer and transform it outside, or compute without gradients (torch.no_grad)."
        )


def differentiable_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    words: Tensor,
    prepared: Tensor | None,
    k: int,
    rules: tuple[BinaryRule, BinaryRule],
    threshold: float | None,
    scale: Tensor | None = None,
    scale_is_mean: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``(s(x) · s(weight)ᵀ) · scale + bias`` from the words of the weight; differentiable once.

    Args:
        x: Shape ``(..., k)``, any strides.
        weight: Receives a gradient; shape ``(n, k)``, or None if only its words exist.
        bias: Shape ``(n,)`` or None.
        words: The packed signs of the weight, shape ``(n, ceil(k / 32))``.
        prepared: The prepared form of the words, or None.
        k: Number of values in a row.
        rules: The signs and gradients of x and of the weight.
        threshold: The gradient of x is 0 unless ``|x| <= threshold``; None and 0 cancel nothing.
        scale: Shape ``(n,)`` or None; receives a gradient.
        scale_is_mean: The scale is ``row_means(weight)``, so the weight's gradient includes the part through it.
        out_dtype: A float type; None means autocast's dtype or that of x.

    Returns:
        Shape ``(..., n)``, in `out_dtype`.

    Raises:
        RuntimeError: An argument is wrong (see :mod:`bitorch_qlinear.functional`), or, later, a second backward.
        NotImplementedError: torch.compile traces it inside of a transform of torch.func.
    """
    _check_not_transformed_while_compiling()
    limit = _in_range_limit(rules[0], threshold)
    function = BinaryProduct if _compiling() else BinaryProductEager
    out_dtype = out_dtype or autocast_dtype(x)
    y: Tensor = apply(function, x, weight, bias, scale, words, prepared, k, rules, limit, out_dtype, scale_is_mean)[0]
    return y
