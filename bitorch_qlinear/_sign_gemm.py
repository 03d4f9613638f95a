"""Products of real values and packed signs: by sums from tables on the CPU if that is faster, else by the BLAS.

They are the two products of a backward, and the forward of a layer with real input. Only the operator itself has
another name, ``multiply_signs``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _kernels, functional
from ._torch import HAS_AMX, apply, is_known, operator_entry

__all__ = ["beats_blas", "differentiable_sign_gemm", "multiply_signs", "sign_gemm"]

# Looked up once, because a name in a module of a module costs 20 ns in every call.
_compiling = torch.compiler.is_compiling

_operator = torch.ops.bitorch_qlinear.multiply_signs
_operator_entry = operator_entry(_operator)

# A kernel without sums from tables reports at least this from least_sign_outputs().
_NEVER = 1 << 62
# Up to this many rows tables win for all other sizes, because the BLAS would unpack all signs for only a few sums.
_FEW_ROWS = {torch.float16: 64}
# Crossover between tables and BLAS for more rows, as multiples of least_sign_outputs(): (outputs, summed values).
_LEAST_OF_HALF_TYPES = {torch.bfloat16: (2, 1.5), torch.float16: (1 / 16, 1 / 8)}


def beats_blas(reals: Tensor, outputs: int) -> bool:
    """Whether sums from tables, which are built for each row, are faster than unpacking the signs and the BLAS.

    Sizes that a traced program leaves open count as large, because the choice must not depend on them.

    Measured with one thread. Up to 32 rows (float16: 64) tables were faster for all sizes from 64 to 4096 (Intel Xeon
    with AVX-512). With more rows, on Zen 4: from 128 outputs and 64 summed values on they were 1.1 to 2 times as fast,
    and below up to 3 times slower. The BLAS has instructions of its own for bfloat16 (AVX512_BF16): from 256 and 192 on
    tables were 0.99 to 3 times as fast, but with AMX the BLAS is 2 to 4 times as fast. It has none for float16: from 8
    and 16 on tables were at least 1.5 times as fast.
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


def multiply_signs(reals: Tensor, words: Tensor, k: int, transpose: bool) -> Tensor:
    """Return what the operator of this name computes, by the shortest way to it; for inference."""
    operator = _operator if _compiling() else _operator_entry
    return operator(reals, words, k, transpose)  # type: ignore[no-any-return]


def sign_gemm(reals: Tensor, words: Tensor, k: int, transpose: bool = False) -> Tensor:
    """Return ``reals @ signs``, or ``reals @ signs.T``, by the faster way; without gradients.

    Args:
        reals: Shape ``(..., n)``, or ``(..., k)`` if `transpose`.
        words: The packed signs, shape ``(n, ceil(k / 32))``.
        k: Number of signs in a row.
        transpose: Multiply by the transposed signs.
    """
    if reals.is_cpu and beats_blas(reals, words.shape[0] if transpose else k):
        return functional.multiply_signs(reals, words, k, transpose)
    if transpose:
        return reals @ functional.unpack_bits(words, k, reals.dtype).t()
    return _multiply_unpacked(reals, words, k)


def _multiply_unpacked(reals: Tensor, words: Tensor, k: int) -> Tensor:
    """Return ``reals @ signs``; on the CPU the signs are unpacked a block of columns at a time.

    A block (4 MiB of float32) stays in cache, and the allocator keeps its memory. The system would map and zero the
    memory for all signs of a large weight in every call, which takes longer than a small batch's product. CUDA's
    allocator does neither.
    """
    if _compiling() or not reals.is_cpu:
        return reals @ functional.unpack_bits(words, k, reals.dtype)
    columns = max(1, (1 << 20) // max(1, words.shape[0]) // 32)  # words in a row of a block
    if columns >= words.shape[1]:
        return reals @ functional.unpack_bits(words, k, reals.dtype)
    blocks, left = [], k
    for part in words.split(columns, dim=1):
        values = min(32 * columns, left)
        blocks.append(reals @ functional.unpack_bits(part.contiguous(), values, reals.dtype))
        left -= values
    return torch.cat(blocks, dim=-1)


def differentiable_sign_gemm(reals: Tensor, words: Tensor, k: int, transpose: bool) -> Tensor:
    """Return what :func:`sign_gemm` computes, differentiable any number of times; eagerly also in forward mode."""
    function = SignGemm if _compiling() else SignGemmEager
    return apply(function, reals, words, k, transpose)  # type: ignore[no-any-return]


class SignGemm(torch.autograd.Function):
    """:func:`sign_gemm`, whose gradient is the product with the transposed signs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(reals: Tensor, words: Tensor, k: int, transpose: bool) -> Tensor:
        return sign_gemm(reals, words, k, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, words, ctx.k, ctx.transpose = inputs
        ctx.save_for_backward(words)
        ctx.save_for_forward(words)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (words,) = ctx.saved_tensors
        return differentiable_sign_gemm(grad, words, ctx.k, not ctx.transpose), None, None, None


class SignGemmEager(SignGemm):
    """Adds forward mode, in a class of its own, because torch.compile does not support a Function that has jvp."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (words,) = ctx.saved_tensors
        return differentiable_sign_gemm(tangent, words, ctx.k, ctx.transpose)
