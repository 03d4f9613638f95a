"""The operators, typed: ``torch.ops.bitorch_qlinear.*`` with defaults and documentation.

Packed words hold K values of ±1 in ``ceil(K / 32)`` words of 32 bits along the last dimension: bit ``i`` of word ``w``
is element ``32 * w + i``, 1 means +1, and bits past K are 0. They are uint32 bit patterns in an int32 tensor
(``words.view(torch.uint32)`` is free; the operators take both).

The sign rule is ``+1 unless v < 0`` (so ±0 and NaN are +1), or with ``strict=True`` ``+1 only where v > 0``.

All operators raise RuntimeError, before anything is written, where an argument has a wrong shape, dtype or device; the
message names the argument, what was expected and what came. They compute no gradients: that is
:class:`bitorch_qlinear.QLinear`'s part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _fake as _fake  # registers the results' shapes, for torch.compile and torch.export
from . import _flops as _flops  # registers the operations, for torch.utils.flop_counter
from . import _library
from . import _vmap as _vmap  # registers the batching rules, for torch.func.vmap

__all__ = [
    "binary_linear",
    "linear",
    "linear_train",
    "multiply_signs",
    "pack_bits",
    "prepare_weight",
    "sign_linear",
    "unpack_bits",
]

_ops = _library.operators


def pack_bits(x: Tensor, strict: bool = False) -> Tensor:
    """Pack the signs of x.

    Args:
        x: Shape ``(..., k)``, any strides, float64, float32, float16 or bfloat16.
        strict: The sign rule.

    Returns:
        Words, int32, shape ``(..., ceil(k / 32))``.
    """
    words: Tensor = _ops.pack_bits(x, strict)
    return words


def unpack_bits(words: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack words into ±1, or into the bits themselves.

    Args:
        words: Shape ``(..., ceil(k / 32))``, int32 or uint32, contiguous.
        k: Number of values.
        dtype: A float type, int32 or int8 for ±1; bool for the bits.

    Returns:
        Shape ``(..., k)``.
    """
    values: Tensor = _ops.unpack_bits(words, k, dtype)
    return values


def prepare_weight(weight_words: Tensor, k: int, *, layout: int | None = None) -> Tensor:
    """Lay packed weights out as the active kernel of their device wants to read them.

    The result belongs to this process: it is neither portable nor part of any checkpoint. It says which kernel, n, k
    and words it was made for; where an operator's are others, a CPU operator prepares its weights anew, and one of CUDA
    refuses the form.

    Args:
        weight_words: Shape ``(n, ceil(k / 32))``.
        k: Number of values in a row.
        layout: The layout that the caller counts on: where it is another, this is an error. A compiled graph has it as
            a constant, for graphs are cached on disk, and with another kernel the result has another size.

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
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``y = s(x) · s(W)ᵀ · scale + bias`` of two packed factors.

    The product is the exact integer ``k - 2 · popcount(x ^ w)``. With T = float64 for a float64 output and float32
    otherwise, ``y = cast(T(product) · T(scale) + T(bias))``, each operation rounded once.

    Args:
        x_words: Shape ``(..., ceil(k / 32))``.
        weight_words: Shape ``(n, ceil(k / 32))``.
        k: Number of values in a row, at most 2³¹ - 1.
        bias: Shape ``(n,)``, any float type.
        weight_prepared: :func:`prepare_weight` of the weights; without it they are prepared in every call, and also
            where it was made for another kernel or of other words.
        scale: A factor per output, shape ``(n,)``, any float type (XNOR-Net's α, https://arxiv.org/abs/1603.05279).
        out_dtype: A float type; or int32, without bias and scale, for the integer itself.

    Returns:
        Shape ``(..., n)`` in ``out_dtype``.
    """
    y: Tensor = _ops.binary_linear(
        x_words, weight_words, k, bias, weight_prepared=weight_prepared, scale=scale, out_dtype=out_dtype
    )
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
) -> Tensor:
    """:func:`binary_linear` of a float x, which is packed on the way.

    Args:
        x: Shape ``(..., k)``, any strides, any float type.
        weight_words: As in :func:`binary_linear`.
        k: As in :func:`binary_linear`.
        bias: As in :func:`binary_linear`.
        weight_prepared: As in :func:`binary_linear`.
        scale: As in :func:`binary_linear`.
        out_dtype: As in :func:`binary_linear`; by default that of x.
        strict: The sign rule for x.

    Returns:
        Shape ``(..., n)``.
    """
    y: Tensor = _ops.linear(
        x, weight_words, k, bias, weight_prepared=weight_prepared, scale=scale, out_dtype=out_dtype, strict=strict
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
    """:func:`linear` of float weights, which are packed on the way too, for this product alone.

    Args:
        x: As in :func:`linear`.
        weight: Shape ``(n, k)``, any strides, any float type.
        bias: As in :func:`binary_linear`.
        scale: As in :func:`binary_linear`.
        out_dtype: As in :func:`linear`.
        strict: The sign rule for x.
        strict_weight: The sign rule for the weights.

    Returns:
        Shape ``(..., n)``.
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
    """:func:`linear`, which also returns of x what backward needs: two bits an element.

    Args:
        x: As in :func:`linear`.
        weight_words: As in :func:`linear`.
        k: As in :func:`linear`.
        bias: As in :func:`linear`.
        weight_prepared: As in :func:`linear`.
        scale: As in :func:`linear`.
        out_dtype: As in :func:`linear`.
        strict: As in :func:`linear`.
        threshold: An element is in range where ``|x| <= threshold``, compared in x's dtype; NaN is not. None keeps no
            such bits.

    Returns:
        y of shape ``(..., n)``; the packed signs of x and its packed in-range bits, each ``(..., ceil(k / 32))`` (the
        latter of shape ``(0,)`` without a threshold).
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


def multiply_signs(reals: Tensor, sign_words: Tensor, k: int, transpose: bool = False) -> Tensor:
    """``reals · s`` of real values and packed signs ±1, or ``reals · sᵀ``; on the CPU only.

    Half types are summed in float32. The order of summation is fixed: no bit of the result depends on the kernel or the
    number of threads. The error is at most ``d · u · sum(|reals|)`` with ``d = 69 + ceil(summed / 1920)`` additions
    and u the rounding unit of the sum. Infinities and NaN come out as of a product in float.

    It is fast where there are many outputs: with the AVX2 kernel and in float32 it beats ``reals @ unpack_bits(...)``
    from 128 outputs and 64 values to sum on.

    Args:
        reals: Shape ``(..., n)``, or ``(..., k)`` where transposed; any float type. Rows or columns are read in place,
            other strides copied.
        sign_words: Shape ``(n, ceil(k / 32))``.
        k: Number of values in a row of the signs.
        transpose: Multiply by the transposed signs.

    Returns:
        Shape ``(..., k)``, or ``(..., n)`` where transposed, in the dtype of `reals`.
    """
    product: Tensor = _ops.multiply_signs(reals, sign_words, k, transpose)
    return product
