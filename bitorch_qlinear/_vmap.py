"""Batching rules for torch.func.vmap of the operators that no autograd Function batches.

A rule gets each operator argument with the dimension of its batch, or None. torch leaves out arguments that equal the
schema's default, so a rule passes on the remaining ones as they come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._library import operators


@torch.library.register_vmap("bitorch_qlinear::pack_bits")
def _(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, strict: bool = False, *limits_and_flips: Tensor | None
) -> tuple[Tensor, int]:
    if all(dim is None for dim in in_dims[2:]):  # a batch of only x is the same as more rows
        return operators.pack_bits(x.movedim(in_dims[0] or 0, 0), strict, *limits_and_flips), 0

    def examples(vector: Tensor | None, dim: int | None) -> Sequence[Tensor | None]:
        if vector is None or dim is None:
            return [vector] * info.batch_size
        return list(vector.movedim(dim, 0).contiguous())

    rows = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if not len(rows):
        return operators.pack_bits(rows, strict), 0
    vectors = [examples(vector, dim) for vector, dim in zip(limits_and_flips, in_dims[2:], strict=True)]
    words = [operators.pack_bits(each, strict, *given) for each, *given in zip(rows, *vectors, strict=True)]
    return torch.stack(words), 0


@torch.library.register_vmap("bitorch_qlinear::unpack_bits")
def _(info: Any, in_dims: tuple[int, None, None], words: Tensor, *k_and_dtype: Any) -> tuple[Tensor, int]:
    return operators.unpack_bits(words.movedim(in_dims[0], 0).contiguous(), *k_and_dtype), 0


@torch.library.register_vmap("bitorch_qlinear::prepare_weight")
def _(info: Any, in_dims: tuple[int, None], weight_words: Tensor, k: int, **layout: int) -> tuple[Tensor, int]:
    each = weight_words.movedim(in_dims[0], 0).contiguous()
    prepared = [operators.prepare_weight(words, k, **layout) for words in each]
    if not prepared:  # an empty batch still needs the size of a form
        one = operators.prepare_weight(each.new_zeros(each.shape[1:]), k, **layout)
        return one.new_empty((0, *one.shape)), 0
    return torch.stack(prepared), 0


@torch.library.register_vmap("bitorch_qlinear::multiply_signs")
def _(
    info: Any, in_dims: tuple[int | None, ...], reals: Tensor, sign_words: Tensor, *k_and_transpose: Any
) -> tuple[Tensor, int]:
    if in_dims[1] is None:  # a batch of only the reals is the same as more rows
        return operators.multiply_signs(reals.movedim(in_dims[0] or 0, 0), sign_words, *k_and_transpose), 0
    each = sign_words.movedim(in_dims[1], 0).contiguous()
    every = reals.expand(len(each), *reals.shape) if in_dims[0] is None else reals.movedim(in_dims[0], 0)
    if not len(each):
        return operators.multiply_signs(every, each.new_zeros(each.shape[1:]), *k_and_transpose), 0
    products = [operators.multiply_signs(x, words, *k_and_transpose) for x, words in zip(every, each, strict=True)]
    return torch.stack(products), 0
