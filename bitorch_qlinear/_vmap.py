"""torch.func.vmap of the operators that handle one tensor; the products are batched by their autograd Functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library


@torch.library.register_vmap("bitorch_qlinear::pack_bits")
def _(info: Any, in_dims: tuple[int, ...], x: Tensor, strict: bool = False) -> tuple[Tensor, int]:
    # torch leaves out arguments that equal the schema's default.
    return _library.operators.pack_bits(x.movedim(in_dims[0], 0), strict), 0


@torch.library.register_vmap("bitorch_qlinear::unpack_bits")
def _(info: Any, in_dims: tuple[int, None, None], words: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    return _library.operators.unpack_bits(words.movedim(in_dims[0], 0).contiguous(), k, dtype), 0


@torch.library.register_vmap("bitorch_qlinear::prepare_weight")
def _(info: Any, in_dims: tuple[int, None], weight_words: Tensor, k: int, **layout: int) -> tuple[Tensor, int]:
    each = weight_words.movedim(in_dims[0], 0).contiguous()
    prepared = [_library.operators.prepare_weight(words, k, **layout) for words in each]
    if not prepared:  # of the right length all the same
        one = _library.operators.prepare_weight(each.new_zeros(each.shape[1:]), k, **layout)
        return one.new_empty((0, *one.shape)), 0
    return torch.stack(prepared), 0


@torch.library.register_vmap("bitorch_qlinear::multiply_signs")
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    reals: Tensor,
    sign_words: Tensor,
    k: int,
    transpose: bool = False,
) -> tuple[Tensor, int]:
    multiply = _library.operators.multiply_signs
    if in_dims[1] is None:  # a batch of reals alone is more rows
        return multiply(reals.movedim(in_dims[0] or 0, 0), sign_words, k, transpose), 0
    each = sign_words.movedim(in_dims[1], 0).contiguous()
    every = reals.expand(len(each), *reals.shape) if in_dims[0] is None else reals.movedim(in_dims[0], 0)
    if not len(each):
        return _library.operators.multiply_signs(every, each.new_zeros(each.shape[1:]), k, transpose), 0
    return torch.stack([multiply(x, words, k, transpose) for x, words in zip(every, each, strict=True)]), 0
