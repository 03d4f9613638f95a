"""XNOR-Net's scale: the mean magnitude of each output channel's weights (https://arxiv.org/abs/1603.05279)."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import Function

from .._torch import apply, functorch_active
from .rule import BinaryRule

__all__ = ["for_each_row", "magnitude_blocks", "mean_magnitude", "row_means", "row_sums"]

# Looked up once, because a name in a module of a module costs 20 ns in every call.
_compiling = torch.compiler.is_compiling

# A block of so many magnitudes stays in cache until they are summed. At 4096² this takes a fifth of the time of
# torch.linalg.vector_norm (one thread of an Intel Xeon).
_BLOCK = 1 << 17


def magnitude_blocks(weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of the rows of a CPU tensor, each with its magnitudes in float64 or float32.

    The magnitudes are in memory that the next block overwrites, and may be changed.
    """
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    n, k = weight.shape
    rows = min(max(1, _BLOCK // max(k, 1)), n)
    # The memory of the magnitudes is reused, except by vmap, which cannot write the values of a batch into it.
    memory = None if functorch_active() else weight.new_empty(rows, k, dtype=dtype)
    for start in range(0, n, max(rows, 1)):
        block = weight[start : start + rows]
        if memory is None:
            yield block, block.to(dtype).abs().contiguous()
        elif block.dtype is dtype:
            yield block, torch.abs(block, out=memory[: len(block)])
        else:
            yield block, memory[: len(block)].copy_(block).abs_()


def row_sums(rows: Tensor) -> Tensor:
    """Return the sum of each row, which does not depend on the number of threads."""
    if len(rows) == 1:
        # torch divides a single sum among its threads.
        return rows.expand(2, rows.shape[1]).sum(1)[:1]
    return rows.sum(1)


def _row_means(weight: Tensor) -> Tensor:
    dtype = torch.float64 if weight.dtype is torch.float64 else torch.float32
    k = weight.shape[1]
    if not weight.is_cpu or type(weight) not in (Tensor, nn.Parameter):
        means: Tensor = torch.linalg.vector_norm(weight, 1, dim=1, dtype=dtype) / max(k, 1)
        return means
    sums = [weight.new_empty(0, dtype=dtype)]
    sums += [row_sums(magnitudes) for _, magnitudes in magnitude_blocks(weight)]
    return torch.cat(sums) / max(k, 1)


def for_each_row(name: str, compute: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function of weights that computes a number for each row, without a gradient.

    torch.compile calls it as an operator, because inductor would add in another order than eager mode.

    Args:
        name: The operator's name.
        compute: Takes shape ``(n, k)``, and returns shape ``(n,)``, in float64 for float64 and else in float32.
    """
    operator = torch.library.custom_op(f"bitorch_qlinear_internal::{name}", compute, mutates_args=())

    @operator.register_fake
    def _(weight: Tensor) -> Tensor:
        return weight.new_empty(weight.shape[0], dtype=torch.promote_types(weight.dtype, torch.float32))

    def call(weight: Tensor) -> Tensor:
        weight = weight.detach()
        return operator(weight) if _compiling() else compute(weight)

    return call


_row_means_of = for_each_row("row_means", _row_means)


def row_means(weight: Tensor) -> Tensor:
    """Return what :func:`mean_magnitude` returns, without a gradient.

    The result depends on the values and the device alone, not on strides, on the number of threads or on torch.compile.
    """
    return _row_means_of(weight)


class MeanMagnitude(Function):
    """Computes `row_means`; the derivative of |w| is the sign by which the layer binarizes w."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, strict: bool) -> Tensor:
        return row_means(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, ctx.strict = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        each = (grad / max(weight.shape[1], 1)).to(weight.dtype)
        return BinaryRule(ctx.strict).signs(weight) * each.unsqueeze(1), None


def mean_magnitude(weight: Tensor, strict: bool = False) -> Tensor:
    """Return the mean of ``|w|`` over each row, XNOR-Net's α; it is differentiable.

    Args:
        weight: Shape ``(n, k)``.
        strict: The derivative of ``|w|`` is +1 only if w > 0, instead of +1 unless w < 0; otherwise it is -1.

    Returns:
        Shape ``(n,)``; float64 for float64 weights and float32 for all others, the dtype of the sum. It is 0 if k is 0.
    """
    return cast(Tensor, apply(MeanMagnitude, weight, strict))
