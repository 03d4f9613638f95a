"""Cases with more elements than an int32 can count, which are refused or computed in little memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from support.reference import assert_equal, random_words
from torch import Tensor

from bitorch_qlinear import _kernels
from bitorch_qlinear import functional as F

from .arguments import HEADER_BYTES, KERNELS, PANELS_OFFSET
from .memory import lazy_zeros

FAR = 2**31
HALF = torch.float16

LAST_LEVEL = HEADER_BYTES + 9 * 8  # the fingerprint's last level holds the hash of all words


def no_words(n: int) -> Tensor:
    """Return n rows of no values, which take no memory."""
    return torch.empty(n, 0, dtype=torch.int32)


def ones(n: int, k: int) -> Tensor:
    return torch.full((n, -(-k // 32)), -1, dtype=torch.int32)


def assert_refused(call: Callable[[], object], name: str) -> None:
    try:
        call()
    except RuntimeError as error:
        assert str(error).startswith(f"bitorch_qlinear: {name}"), error
    else:
        raise AssertionError(f"accepted, although an error that begins with {name} was expected")


def two_rows_far_apart(dtype: torch.dtype = HALF) -> Tensor:
    """Return the rows [-1, 1, 1, ...] and [1, -1, 1, ...], which lie 2^31 values apart."""
    x = lazy_zeros(FAR + 64, dtype).as_strided((2, 64), (FAR, 1))
    x[:] = 1
    x[0, 0] = x[1, 1] = -1
    return x


def check_rows_far_apart() -> None:
    x, w = two_rows_far_apart(), random_words(5, 64, torch.Generator().manual_seed(0))
    assert_equal(F.linear(x, w, 64), F.linear(x.clone(), w, 64))
    assert_equal(F.pack_bits(x), torch.tensor([[-2, -1], [-3, -1]], dtype=torch.int32))
    assert_equal(F.pack_bits(x, limits=torch.zeros(64, dtype=HALF)), F.pack_bits(x))


def check_reals_far_apart() -> None:
    words = random_words(64, 40, torch.Generator().manual_seed(0))
    rows = two_rows_far_apart()
    columns = two_rows_far_apart().T  # values 2^31 apart
    assert_equal(F.multiply_signs(rows, words, 40), F.multiply_signs(rows.clone(), words, 40))
    assert_equal(F.multiply_signs(columns, words[:2], 40), F.multiply_signs(columns.contiguous(), words[:2], 40))


def check_bias_far_apart() -> None:
    bias = lazy_zeros(FAR + 1, HALF)[::FAR]
    bias[:] = torch.tensor([0.5, 0.25])
    for scale in (None, bias):
        y = F.linear(torch.ones(1, 7), ones(2, 7), 7, bias, scale=scale)
        assert_equal(y, bias.float()[None] + 7 * (1 if scale is None else bias.float()))


def check_rows_expanded_to_more_than_an_int32_counts() -> None:
    m, k = 2**15 + 1, 2**16
    y = F.linear(torch.ones(1, k, dtype=HALF).expand(m, k), ones(1, k), k, out_dtype=torch.float32)
    assert_equal(y, torch.full((m, 1), float(k)))


def check_reals_expanded_to_more_than_an_int32_counts() -> None:
    m, k = 2**15 + 1, 2**16
    y = F.multiply_signs(torch.ones(1, k).expand(m, k), ones(1, k), k, transpose=True)
    assert_equal(y, torch.full((m, 1), float(k)))


def check_most_values_in_a_row() -> None:
    k = 2**31 - 1
    words = F.pack_bits(lazy_zeros(k, HALF))
    assert words.shape == (2**26,) and (words[:-1] == -1).all() and words[-1] == k


def check_most_values_in_a_product() -> None:
    k = 2**31 - 1
    words = lazy_zeros(2**26, torch.int32)[None]
    _kernels.force_kernel("scalar")  # the other kernels would prepare 64 rows of weights instead of this one
    assert F.binary_linear(words, words, k, out_dtype=torch.int32).item() == k
    assert F.binary_linear(words, words, k).item() == 2.0**31


def keys_from(first: int, count: int) -> list[int]:
    """Return ``count`` keys of hash.h from number ``first`` on; jumps ahead in its linear congruential generator."""
    factor, term, mask = 6364136223846793005, 1442695040888963407, 2**64 - 1
    state, a, c = 0x9E3779B97F4A7C15, factor, term
    for bit in range(first.bit_length()):
        if first >> bit & 1:
            state = (a * state + c) & mask
        a, c = a * a & mask, (a * c + c) & mask
    keys = []
    for _ in range(count):
        state = (factor * state + term) & mask
        keys.append(state >> 32 | 1)
    return keys


def hash_of(words: torch.Tensor, last: int) -> torch.Tensor:
    """Return the hash (csrc/cpu/hash.h) of words of which all but the ``last`` ones are 0."""
    count, mask = words.numel(), 2**64 - 1
    hashed, factor = count, 0xFF51AFD7ED558CCD
    lines = words.reshape(-1)[-last:].view(-1, 16).tolist()
    first = count // 16 - len(lines)
    keys = keys_from(first, len(lines))
    for lane in range(16):
        total = sum((line[lane] % 2**32) * key for line, key in zip(lines, keys, strict=True)) & mask
        hashed += (total ^ total >> 32) * factor
        factor += 0xC4CEB9FE1A85EC52
    hashed &= mask
    return torch.tensor(list((hashed ^ hashed >> 29).to_bytes(8, "little")), dtype=torch.uint8)


def check_prepared_weights_beyond_an_int32() -> None:
    """Only the weights of the last panel, which begins more than 2^31 bytes after the first, are +1."""
    n, k = 2**21 + 64, 8192
    words = lazy_zeros(n * k // 32, torch.int32).view(n, -1)
    words[-64:] = -1
    for kernel in KERNELS:
        _kernels.force_kernel(kernel)
        panel, unit, unit_bytes, _ = _kernels.prepared_layout()
        prepared = lazy_zeros(PANELS_OFFSET + n // panel * -(-k // unit) * unit_bytes, torch.uint8)
        last = F.prepare_weight(words[-64:], k)
        prepared[:HEADER_BYTES] = last[:HEADER_BYTES]
        prepared[16:24] = torch.tensor([n]).view(torch.uint8)
        prepared[LAST_LEVEL : LAST_LEVEL + 8] = hash_of(words, 64 * k // 32)
        prepared[len(prepared) - len(last) + PANELS_OFFSET :] = last[PANELS_OFFSET:]
        y = F.binary_linear(ones(1, k), words, k, weight_prepared=prepared, out_dtype=torch.int32)
        assert (y[0, :-64] == -k).all() and (y[0, -64:] == k).all(), kernel
        if unit_bytes:  # changed panels must change the result, which proves that the kernel reads them
            prepared[len(prepared) - len(last) + PANELS_OFFSET :] ^= 255
            y = F.binary_linear(ones(1, k), words, k, weight_prepared=prepared, out_dtype=torch.int32)
            assert (y[0, -64:] != k).any(), kernel


def check_no_outputs_of_many_rows() -> None:
    rows = torch.ones(1, 64).expand(2**40, 64)
    assert F.linear(rows, ones(0, 64), 64).shape == (2**40, 0)
    assert F.multiply_signs(rows, ones(0, 64), 64, True).shape == (2**40, 0)


def check_no_values_of_many_rows() -> None:
    assert F.pack_bits(torch.empty(2**62, 0)).shape == (2**62, 0)
    assert F.unpack_bits(no_words(2**62), 0, torch.int8).shape == (2**62, 0)
    assert F.linear_train(torch.empty(2**62, 0), no_words(0), 0, threshold=1.0)[2].shape == (2**62, 0)


def check_many_outputs_of_no_rows() -> None:
    n, vector = 2**62, torch.zeros(1).expand(2**62)
    y = F.linear(
        torch.empty(0, 0), no_words(n), 0, vector, scale=vector, weight_prepared=F.prepare_weight(no_words(n), 0)
    )
    assert y.shape == (0, n)


def check_strides_of_dimensions_of_size_one() -> None:
    w = random_words(3, 64, torch.Generator().manual_seed(0))
    x = torch.randn(64)
    assert_equal(F.linear(x.as_strided((1, 1, 64), (2**62, 2**63 - 1, 1)), w, 64), F.linear(x, w, 64)[None, None])
    assert F.pack_bits(x.as_strided((5, 3, 0), (2**62, 2**62, 2**62))).shape == (5, 3, 0)
    assert F.linear(x.as_strided((0, 5, 64), (2**62, 2**62, 2**62)), w, 64).shape == (0, 5, 3)
    one = x[:1].as_strided((1,), (2**62,))
    assert_equal(F.linear(x, w[:1], 64, one, scale=one), F.linear(x, w[:1], 64) * x[:1] + x[:1])
    column = x[:3].as_strided((3, 1), (1, 2**62))
    assert_equal(F.multiply_signs(column, w[:1], 64), F.multiply_signs(column.contiguous(), w[:1], 64))


def check_meta_tensors() -> None:
    x, w = torch.empty(2**33, 64, device="meta"), torch.empty(2**20, 2, dtype=torch.int32, device="meta")
    assert F.linear(x, w, 64).shape == (2**33, 2**20)
    assert F.linear_train(x, w, 64)[1].shape == (2**33, 2)


def check_k_beyond_an_int32() -> None:
    x = torch.zeros(1, dtype=HALF).expand(2**31)
    for k in (2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)):
        assert_refused(lambda k=k: F.linear(x, no_words(1), k), "k: expected 0 to 2147483647")
        assert_refused(lambda k=k: F.prepare_weight(no_words(1), k), "k: expected 0 to 2147483647")
        assert_refused(lambda k=k: F.unpack_bits(no_words(1), k), "k: expected 0 to 2147483647")
    assert_refused(lambda: F.pack_bits(x), "k: expected 0 to 2147483647")


def check_copies_beyond_memory() -> None:
    assert_refused(lambda: F.pack_bits(torch.zeros(1, 1).expand(2**45, 3)), "x: cannot allocate")
    assert_refused(
        lambda: F.multiply_signs(torch.zeros(1, 1).expand(2**45, 3), ones(3, 3), 3), "result: cannot allocate"
    )


def check_results_beyond_memory() -> None:
    rows = torch.zeros(1, 1).expand(2**62, 1)
    for call in (
        lambda: F.pack_bits(rows),
        lambda: F.linear(rows, ones(1, 1), 1),
        lambda: F.linear_train(rows, ones(1, 1), 1),
        lambda: F.multiply_signs(rows, ones(1, 1), 1),
        lambda: F.binary_linear(no_words(1), no_words(2**50), 0),
    ):
        assert_refused(call, "result: cannot allocate")


def check_strides_of_results_beyond_an_int64() -> None:
    """Strides beyond an int64 cannot be stepped through, so torch refuses them too, even of empty tensors."""
    many = torch.empty(0, 2**40, 0)
    assert_refused(lambda: F.linear(many, no_words(2**40), 0), "result: cannot allocate")
    assert_refused(lambda: F.binary_linear(no_words(2**62), no_words(2**62), 0), "result: cannot allocate")
    assert_refused(lambda: F.multiply_signs(many, no_words(2**40), 0, True), "result: cannot allocate")


def check_words_that_are_expanded() -> None:
    words = ones(1, 64).expand(2**40, 2)
    assert_refused(lambda: F.unpack_bits(words, 64), "words: expected contiguous")
    assert_refused(lambda: F.prepare_weight(words, 64), "weight_words: expected contiguous")
    assert_refused(lambda: F.binary_linear(words, ones(1, 64), 64), "x_words: expected contiguous")
    assert_refused(lambda: F.multiply_signs(torch.ones(1, 64), words, 64, True), "sign_words: expected contiguous")


def check_vectors_of_another_length() -> None:
    for vector in (torch.zeros(1).expand(2**32 + 1), torch.zeros(1, 1).expand(2**31, 2**31)):
        assert_refused(lambda v=vector: F.linear(torch.ones(1, 64), ones(1, 64), 64, v), "bias: expected shape (1)")
        assert_refused(
            lambda v=vector: F.linear(torch.ones(1, 64), ones(1, 64), 64, scale=v), "scale: expected shape (1)"
        )


def check_prepared_weights_of_another_length() -> None:
    """A form is not used if its header announces other sizes than the words have, or if the form is longer."""
    words = no_words(2**62)
    prepared = F.prepare_weight(words, 0)
    y = F.binary_linear(no_words(1), no_words(1), 0, weight_prepared=prepared)
    assert (y == 0).all() and y.shape == (1, 1)
    longer = lazy_zeros(2**33, torch.uint8)
    longer[: len(prepared)] = prepared
    assert F.binary_linear(no_words(0), words, 0, weight_prepared=longer).shape == (0, 2**62)


CHECKS = {name: function for name, function in list(globals().items()) if name.startswith("check_")}
