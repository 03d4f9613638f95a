"""The operators, typed: ``torch.ops.bitorch_qlinear.*`` with defaults and documentation.

Packed words hold K values of ±1 in ``ceil(K / 32)`` words of 32 bits along the last dimension: bit ``i`` of word ``w``
is element ``32 * w + i``, 1 means +1, and bits past K are 0. They are uint32 bit patterns in an int32 tensor
(``words.view(torch.uint32)`` is free; the operators take both).

The sign of v is +1 unless v < 0 (so ±0 and NaN become +1); with ``strict=True`` it is +1 only if v > 0.

All operators raise RuntimeError, before anything is written, if an argument has a wrong shape, dtype or device; the
message names the argument, what was expected and what was given. They have no gradients;
:class:`bitorch_qlinear.QLinear` has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import operators as _ops
from ._torch import operator_entry

__all__ = [
    "binary_linear",
    "dorefa_linear",
    "linear",
    "linear_chain",
    "linear_train",
    "multiply_signs",
    "pack_bits",
    "prepare_weight",
    "sign_linear",
    "unpack_bits",
]

_compiling = torch.compiler.is_compiling
_binary_linear_entry = operator_entry(_ops.binary_linear)
_linear_entry = operator_entry(_ops.linear)


def _product_options(
    weight_prepared: Tensor | None,
    scale: Tensor | None,
    out_dtype: torch.dtype | None,
    out_limits: Tensor | None,
    out_flips: Tensor | None,
) -> dict[str, Any]:
    """Return the keywords that are not None, because each one that is passed costs 0.3 us."""
    options: dict[str, Any] = {}
    if weight_prepared is not None:
        options["weight_prepared"] = weight_prepared
    if scale is not None:
        options["scale"] = scale
    if out_dtype is not None:
        options["out_dtype"] = out_dtype
    if out_limits is not None:
        options["out_limits"] = out_limits
    if out_flips is not None:
        options["out_flips"] = out_flips
    return options


def pack_bits(x: Tensor, strict: bool = False, *, limits: Tensor | None = None, flips: Tensor | None = None) -> Tensor:
    """Pack the signs of x, or of what x becomes by a function of each channel that changes its sign at most once.

    With `limits`, bit j of a row is 1 if ``v >= limits[j]``, or if not, where bit j of `flips` is set. So a shift, a
    BatchNorm or a Hardtanh before the sign needs no pass over x. Values are compared by their IEEE 754 bit patterns,
    in the order -∞, negative numbers, -0, +0, positive numbers, +∞: denormals keep their place even if torch flushes
    them, and a limit of +0 is above -0. A NaN of either sign in x gives the bit 1, or 0 with `strict`, whatever its
    limit and flip are.

    Args:
        x: Shape ``(..., k)``, any strides, float64, float32, float16 or bfloat16.
        strict: +1 only if v > 0, instead of +1 unless v < 0. With `limits` it only decides the bit of a NaN.
        limits: The smallest value of each channel for which the bit is 1, shape ``(k,)``, the dtype of x, contiguous.
            Every bit pattern is a legal limit: one of +NaN is above all numbers and never reached, one of -NaN is
            below them and always reached.
        flips: Packed words, shape ``(ceil(k / 32),)``, contiguous, in which 1 inverts the bit of a channel; bits past k
            are ignored. It needs limits.

    Returns:
        Packed words, int32, shape ``(..., ceil(k / 32))``.
    """
    words: Tensor = _ops.pack_bits(x, strict) if limits is flips is None else _ops.pack_bits(x, strict, limits, flips)
    return words


def unpack_bits(words: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack words into ±1, or into the bits themselves.

    Args:
        words: Shape ``(..., ceil(k / 32))``, int32 or uint32, contiguous.
        k: Number of values.
        dtype: A float type, int32 or int8 gives ±1; bool gives the bits.

    Returns:
        Shape ``(..., k)``.
    """
    values: Tensor = _ops.unpack_bits(words, k, dtype)
    return values


def prepare_weight(weight_words: Tensor, k: int, *, layout: int | None = None) -> Tensor:
    """Rearrange packed weights into the order in which the active kernel of their device reads them.

    The result belongs to this process: it is not portable and never part of a checkpoint. It records the kernel, n, k
    and words that it was made for. If one of them differs, a CPU operator prepares the weights again in that call, and
    a CUDA operator raises.

    Args:
        weight_words: Shape ``(n, ceil(k / 32))``.
        k: Number of values in a row.
        layout: The layout number that the caller expects; if the active kernel reads another layout, this raises. A
            compiled graph stores the number, because graphs are cached on disk and the size of the result depends on
            the kernel.

    Returns:
        An opaque uint8 vector, on the same device.
    """
    prepared: Tensor = _ops.prepare_weight(weight_words, k, layout=layout)
    return prepared


def binary_linear(
    x_words: Tensor,
    weight_words: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    weight_prepared: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_limits: Tensor | None = None,
    out_flips: Tensor | None = None,
) -> Tensor:
    """Compute ``y = s(x) · s(W)ᵀ · scale + bias`` from two packed factors, or the bits that a sign makes of it.

    The product is the exact integer ``k - 2 · popcount(x ^ w)``. With T = float64 for a float64 output and float32
    otherwise, ``y = cast(T(product) · T(scale) + T(bias))``, each operation rounded once.

    With `out_limits` the result is packed words instead of numbers: bit j of a row is 1 if ``popcount(x ^ w[j]) <=
    out_limits[j]``, or the opposite if bit j of `out_flips` is 1. Every function of the product that changes its sign
    at most once, such as a BatchNorm, has signs of this form. The next product takes the words as its `x_words`.

    Args:
        x_words: Shape ``(..., ceil(k / 32))``.
        weight_words: Shape ``(n, ceil(k / 32))``.
        k: Number of values in a row, at most 2³¹ - 1.
        bias: Shape ``(n,)``, any float type.
        weight_prepared: The result of :func:`prepare_weight` for these weights. Without it, or if it was made for
            another kernel or from other words, a CPU operator prepares the weights in this call.
        scale: A factor for each output, shape ``(n,)``, any float type (XNOR-Net's α,
            https://arxiv.org/abs/1603.05279).
        out_dtype: A float type; or int32, without bias and scale, for the integer product itself. None means float32.
        out_limits: The largest number of differing bits for which an output bit is 1, shape ``(n,)``, int32,
            contiguous. Every int32 is a legal limit: a negative one is never reached, one of k or more always. It
            excludes bias, scale and out_dtype.
        out_flips: Packed words, shape ``(ceil(n / 32),)``, contiguous, in which 1 inverts an output bit; bits past n
            are ignored. It needs out_limits.

    Returns:
        Shape ``(..., n)`` in ``out_dtype``; with `out_limits`, packed words, int32, shape ``(..., ceil(n / 32))``.
    """
    options = _product_options(weight_prepared, scale, out_dtype, out_limits, out_flips)
    operator = _ops.binary_linear if _compiling() else _binary_linear_entry
    y: Tensor = operator(x_words, weight_words, k, bias, **options)
    return y


def linear(
    x: Tensor,
    weight_words: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    weight_prepared: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    strict: bool = False,
    out_limits: Tensor | None = None,
    out_flips: Tensor | None = None,
) -> Tensor:
    """Compute :func:`binary_linear` of a float x, which is packed in this call.

    The arguments that are not listed here are those of :func:`binary_linear`.

    Args:
        x: Shape ``(..., k)``, any strides, any float type.
        out_dtype: As in :func:`binary_linear`, but None means the dtype of x.
        strict: The sign of x is +1 only if x > 0, instead of +1 unless x < 0.

    Returns:
        Shape ``(..., n)`` in ``out_dtype``; with `out_limits`, packed words, int32, shape ``(..., ceil(n / 32))``.
    """
    options = _product_options(weight_prepared, scale, out_dtype, out_limits, out_flips)
    if strict:
        options["strict"] = True
    operator = _ops.linear if _compiling() else _linear_entry
    y: Tensor = operator(x, weight_words, k, bias, **options)
    return y


def linear_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    k: int,
    limits: Sequence[Tensor],
    flips: Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    prepared: Sequence[Tensor] | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    strict: bool = False,
    toggles: Sequence[Tensor] | None = None,
) -> Tensor:
    """Multiply by the weights of several layers in turn; each layer except the last writes bits for the next one.

    It equals :func:`linear` for the first layer, followed by :func:`binary_linear` for the others.

    Args:
        x: Shape ``(..., k)``, any strides, a float type; or its packed words, shape ``(..., ceil(k / 32))``, for which
            the first product, too, is that of :func:`binary_linear`.
        weights: For each layer its packed weights; the next layer's k is this one's n.
        k: Number of values in a row of x.
        limits: For each layer except the last, as in :func:`binary_linear`.
        flips: For each layer except the last, as in :func:`binary_linear`.
        bias: Of the last layer, shape ``(n,)`` or None.
        prepared: The prepared form of each layer's words, or an empty tensor; or None.
        scale: Of the last layer, shape ``(n,)`` or None.
        out_dtype: The dtype of the result; None takes that of x, or float32 for words.
        strict: +1 only if v > 0, instead of +1 unless v < 0; for real values of x.
        toggles: For each layer except the last int32 of shape ``(2, t)``, channels and limits: after the flips, a bit
            of such a channel is negated if its popcount is at most the limit. A channel may occur several times. Only
            on the CPU.

    Returns:
        Shape ``(..., n)`` of the last layer.
    """
    y: Tensor = _ops.linear_chain(
        x,
        list(weights),
        k,
        list(limits),
        list(flips),
        bias,
        prepared=None if prepared is None else list(prepared),
        scale=scale,
        out_dtype=out_dtype,
        strict=strict,
        toggles=None if toggles is None else list(toggles),
    )
    return y


def sign_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    strict: bool = False,
    strict_weight: bool = False,
) -> Tensor:
    """Compute :func:`linear` of float weights, which are packed in this call, too.

    The arguments that are not listed here are those of :func:`linear`.

    Args:
        weight: Shape ``(n, k)``, any strides, any float type.
        strict_weight: The sign of a weight is +1 only if w > 0, instead of +1 unless w < 0.

    Returns:
        Shape ``(..., n)`` in ``out_dtype``.
    """
    y: Tensor = _ops.sign_linear(
        x, weight, bias, scale=scale, out_dtype=out_dtype, strict=strict, strict_weight=strict_weight
    )
    return y


def linear_train(
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
    """Compute :func:`linear`, and return also the two bits of each element of x that backward needs.

    The arguments that are not listed here are those of :func:`linear`.

    Args:
        threshold: An element is in range if ``|x| <= threshold``, compared in x's dtype; NaN is out of range. None
            computes no in-range bits.

    Returns:
        y of shape ``(..., n)``, the packed signs of x, and its packed in-range bits. Both kinds of bits have shape
        ``(..., ceil(k / 32))``; without a threshold the in-range bits have shape ``(0,)``.
    """
    y, x_words, in_range_words = _ops.linear_train(
        x,
        weight_words,
        k,
        bias,
        weight_prepared=weight_prepared,
        scale=scale,
        out_dtype=out_dtype,
        strict=strict,
        threshold=threshold,
    )
    return y, x_words, in_range_words


def dorefa_linear(
    x: Tensor,
    weight_words: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    bits: int = 1,
    weight_prepared: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``y = q(x) · s(W)ᵀ · scale + bias``, where q rounds to 2 or 4 levels from 0 to 1; on the CPU only.

    q is the input quantization of DoReFa-Net (https://arxiv.org/abs/1606.06160): with ``steps = 2 ** bits - 1`` it is
    ``L / steps`` and the level L is ``round(clamp(x, 0, 1) * steps)``, computed as torch does in x's dtype: the product
    is rounded to the dtype, and then a half to the even number.

    The sum of ``L · s(W)`` is an exact integer. With T = float64 for a float64 output and float32 otherwise,
    ``y = cast(T(integer) · T(1 / steps) · T(scale) + T(bias))``, each operation rounded once. A row of x that holds NaN
    gives a row of NaN.

    The arguments that are not listed here are those of :func:`linear`.

    Args:
        bits: The bits of a level, 1 or 2.
        out_dtype: A float type; None means the dtype of x.

    Returns:
        Shape ``(..., n)`` in ``out_dtype``.
    """
    y: Tensor = _ops.dorefa_linear(
        x, weight_words, k, bias, bits=bits, weight_prepared=weight_prepared, scale=scale, out_dtype=out_dtype
    )
    return y


def multiply_signs(reals: Tensor, sign_words: Tensor, k: int, transpose: bool = False) -> Tensor:
    """Compute ``reals · s`` from real values and packed signs ±1, or ``reals · sᵀ``; on the CPU only.

    Half types are summed in float32. The order of summation is fixed: no bit of the result depends on the kernel or the
    number of threads. The error is at most ``d · u · sum(|reals|)`` with ``d = 69 + ceil(summed / 1920)`` additions
    and u the rounding unit of the sum. Infinities and NaN spread as in a float product.

    It is fast if there are many outputs: with the AVX2 kernel and in float32 it beats ``reals @ unpack_bits(...)`` if
    there are at least 128 outputs of at least 64 summed values each.

    Args:
        reals: Shape ``(..., n)``, or ``(..., k)`` if `transpose`; any float type. If its rows or its columns are
            contiguous it is read in place, otherwise it is copied.
        sign_words: Shape ``(n, ceil(k / 32))``.
        k: Number of values in a row of the signs.
        transpose: Multiply by the transposed signs.

    Returns:
        Shape ``(..., k)``, or ``(..., n)`` if `transpose`, in the dtype of `reals`.
    """
    product: Tensor = _ops.multiply_signs(reals, sign_words, k, transpose)
    return product
