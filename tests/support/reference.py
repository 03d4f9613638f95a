"""The operators' results, computed in an obviously right way: in float64, one bit at a time, with torch and NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def signs(x: Tensor, strict: bool = False) -> Tensor:
    """Return in float64 -1 if v < 0, else +1 (also of NaN and both zeros); if strict, +1 if v > 0, else -1."""
    v = x.to(torch.float64)
    positive = v > 0 if strict else ~(v < 0)
    return torch.where(positive, 1.0, -1.0).to(torch.float64)


def in_range(x: Tensor, threshold: float) -> Tensor:
    """Return the mask |x| <= threshold as torch computes it in the dtype of x; NaN is out of range."""
    return x.abs() <= threshold


def pack(bits: Tensor) -> Tensor:
    """Pack bools into int32 words: bit i of word w is element 32 w + i, and bits past the last element are 0."""
    k = bits.shape[-1]
    padded = np.zeros((*bits.shape[:-1], -(-k // 32), 32), np.uint32)
    for i in range(32):
        padded[..., : len(range(i, k, 32)), i] = bits.numpy()[..., i::32]
    words = np.zeros(padded.shape[:-1], np.uint32)
    for i in range(32):
        words |= padded[..., i] << np.uint32(i)
    return torch.from_numpy(words.view(np.int32))


def unpack(words: Tensor, k: int) -> Tensor:
    """Return the first k bits of each row as bools."""
    source = words.numpy().view(np.uint32)
    bits = np.zeros((*source.shape[:-1], k), bool)
    for i in range(min(k, 32)):
        bits[..., i::32] = (source[..., : len(range(i, k, 32))] >> np.uint32(i)) & np.uint32(1)
    return torch.from_numpy(bits)


def pack_signs(x: Tensor, strict: bool = False) -> Tensor:
    return pack(signs(x, strict) > 0)


def unpack_signs(words: Tensor, k: int) -> Tensor:
    """Return the first k signs of each row, +1 or -1, in float64."""
    return unpack(words, k).to(torch.float64) * 2 - 1


def product(x_signs: Tensor, w_signs: Tensor) -> Tensor:
    """Return the exact integers x · wᵀ as int64; float64 represents every integer up to 2⁵³."""
    rows = x_signs.reshape(x_signs.shape[:-1].numel(), x_signs.shape[-1])
    return (rows @ w_signs.T).to(torch.int64).reshape(*x_signs.shape[:-1], w_signs.shape[0])


def epilogue(integers: Tensor, bias: Tensor | None, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Return cast(T(integer) · T(scale) + T(bias)), with each operation rounded separately, by torch."""
    if out_dtype is torch.int32:
        return integers.to(torch.int32)
    t = torch.float64 if out_dtype is torch.float64 else torch.float32
    y = integers.to(t)
    if scale is not None:
        y = y * scale.to(t)
    if bias is not None:
        y = y + bias.to(t)
    return y.to(out_dtype)


def bits(integers: Tensor, k: int, limits: Tensor, flips: Tensor | None = None) -> Tensor:
    """Return the words of (popcount <= limit) XOR flip, where an integer of the product is k - 2 popcount."""
    ones = (k - integers) // 2 <= limits
    return pack(ones if flips is None else ones ^ unpack(flips.view(torch.int32), len(limits)))


def levels(x: Tensor, bits: int) -> Tensor:
    """Return the levels 0 to 2 ** bits - 1 that DoReFa-Net's input quantization gives x, in float64; NaN stays."""
    return torch.round(x.clamp(0, 1) * (2**bits - 1)).to(torch.float64)


def levels_linear(
    x: Tensor, w_signs: Tensor, bits: int, bias: Tensor | None, scale: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """Return cast(T(sum of levels · w) · T(1 / steps) · T(scale) + T(bias)), each operation rounded separately."""
    t = torch.float64 if out_dtype is torch.float64 else torch.float32
    y = levels(x, bits).reshape(x.shape[:-1].numel(), x.shape[-1]) @ w_signs.T
    y = y.reshape(*x.shape[:-1], len(w_signs)).to(t) + 0.0  # an integer is never -0
    if bits > 1:
        y = y * torch.tensor(1 / (2**bits - 1), dtype=t)
    if scale is not None:
        y = y * scale.to(t)
    if bias is not None:
        y = y + bias.to(t)
    return y.to(out_dtype)


def order(x: Tensor) -> Tensor:
    """Return integers that are ordered as IEEE 754 orders bit patterns: -NaN, -inf, ..., -0, +0, ..., +inf, +NaN."""
    patterns = x.contiguous().view(BITS[x.dtype])
    return torch.where(patterns < 0, patterns ^ torch.iinfo(patterns.dtype).max, patterns)


def pack_by_limits(x: Tensor, limits: Tensor, flips: Tensor | None = None, strict: bool = False) -> Tensor:
    """Return the words of (v >= limit) XOR flip by the order of bit patterns; the bit of a NaN v is `not strict`."""
    ones = order(x) >= order(limits)
    ones = ones if flips is None else ones ^ unpack(flips.view(torch.int32), len(limits))
    return pack(torch.where(x.isnan(), not strict, ones))


def linear_reference(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    strict_x: bool = False,
    strict_w: bool = False,
) -> Tensor:
    """Return the output of the binary linear layer, from float x of shape (..., k) and float w of shape (n, k)."""
    return epilogue(product(signs(x, strict_x), signs(w, strict_w)), bias, scale, out_dtype or x.dtype)


def same(actual: Tensor, expected: Tensor) -> Tensor:
    """Compare elementwise, bit by bit, so that +0 and -0 differ; but every NaN equals every other."""
    if not expected.is_floating_point():
        return actual == expected
    bits = BITS[expected.dtype]
    actual, expected = actual.resolve_neg(), expected.resolve_neg()
    return (actual.contiguous().view(bits) == expected.contiguous().view(bits)) | (actual.isnan() & expected.isnan())


def assert_equal(actual: Tensor, expected: Tensor, what: object = "") -> None:
    """Assert equal dtype, shape and bits; the error reports the first mismatch with its index and both values."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    wrong = ~same(actual, expected)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: "
            f"got {actual[at].item()!r}, expected {expected[at].item()!r}"
        )


def special_values(dtype: torch.dtype) -> Tensor:
    """Return ±0, ±inf, ±1 and its neighbours, the extreme denormals and normals, quiet and signalling NaN."""
    info = torch.finfo(dtype)
    bits = BITS[dtype]
    sign = torch.iinfo(bits).min
    infinity = int(torch.tensor(float("inf"), dtype=dtype).view(bits))
    smallest_normal = int(torch.tensor(info.tiny, dtype=dtype).view(bits))
    patterns = [0, 1, smallest_normal - 1, smallest_normal, infinity - 1, infinity, infinity + 1, -sign - 1]
    one = int(torch.tensor(1.0, dtype=dtype).view(bits))
    quiet = int(torch.tensor(float("nan"), dtype=dtype).view(bits)) & (-sign - 1)
    patterns += [one, one - 1, one + 1, quiet]
    return torch.tensor([p for q in patterns for p in (q, q + sign)], dtype=bits).view(dtype)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return one third random bit patterns, one third normally distributed and one third special values."""
    bits = BITS[dtype]
    info = torch.iinfo(bits)
    patterns = torch.randint(info.min, info.max, shape, dtype=bits, generator=generator).view(dtype)
    normal = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
    special = special_values(dtype)
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    kind = torch.randint(3, shape, generator=generator)
    return torch.where(kind == 0, patterns, torch.where(kind == 1, normal, chosen))


def random_words(rows: int, k: int, generator: torch.Generator, stray: bool = False) -> Tensor:
    """Return packed words of random bits; if `stray`, the bits past k are random too, else 0."""
    words = torch.randint(-(2**31), 2**31, (rows, -(-k // 32)), dtype=torch.int64, generator=generator)
    words = words.to(torch.int32)
    if not stray and k % 32:
        words[:, -1] &= (1 << k % 32) - 1
    return words
