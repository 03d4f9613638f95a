"""Every CPU kernel equals the reference and the scalar kernel bit for bit."""

import functools
import itertools
import math
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import shapes
from support.reference import (
    BITS,
    FLOATS,
    assert_equal,
    epilogue,
    in_range,
    linear_reference,
    pack,
    pack_signs,
    product,
    random_values,
    random_words,
    signs,
    special_values,
    unpack_signs,
)

from bitorch_qlinear import _kernels, _library, kernels
from bitorch_qlinear import functional as F

KERNELS = kernels.available()
PANELS_OFFSET = 192  # the size in bytes of a prepared form's header and fingerprint, which the panels follow


def next_prime(n: int) -> int:
    """Return the next prime, which as a row stride cannot coincide with a correct one."""
    while n < 2 or any(n % d == 0 for d in range(2, math.isqrt(n) + 1)):
        n += 1
    return n


def kernel_products(products):
    return pytest.mark.parametrize(
        ("kernel", "m", "n", "k"),
        [
            pytest.param(kernel, *mnk, id="{}-m{}-n{}-k{}".format(kernel, *mnk))
            for kernel in KERNELS
            for mnk in products
        ],
        indirect=["kernel"],
    )


dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])


def test_constants_are_those_of_the_kernel(kernel):
    panel, unit = shapes.tile(kernel)
    panels = {"amx": (shapes.PANEL, 32), "avx512": (shapes.PANEL, 32), "avx2": (shapes.PANEL, shapes.UNIT)}
    assert (panel, unit) == panels.get(kernel, (1, 32))


@kernel_products(shapes.small_products() + shapes.row_table_products())
def test_product(kernel, on_scalar, m, n, k):
    generator = torch.Generator().manual_seed(1000 * k + 10 * n + m)
    buffer = torch.full((7 + m * next_prime(k + 1),), math.nan)
    x = buffer[7:].view(m, -1)[:, :k]
    x.copy_(random_values((m, k), torch.float32, generator))
    w = random_words(n, k, generator, stray=True)
    x_words = pack_signs(x)
    x_words[..., -1:] |= -(1 << k % 32) if k % 32 else 0  # sets the bits past k
    bias, scale = torch.randn(n, generator=generator), torch.randn(n, generator=generator)

    integers = product(signs(x), unpack_signs(w, k))
    expected = epilogue(integers, bias, scale, torch.float32)
    prepared = F.prepare_weight(w, k)
    count = F.binary_linear(x_words, w, k, out_dtype=torch.int32)
    assert_equal(count, integers.to(torch.int32), "binary_linear")
    assert_equal(F.linear(x, w, k, bias, scale=scale, weight_prepared=prepared), expected, "linear")
    assert_equal(F.binary_linear(x_words, w, k, bias, scale=scale, weight_prepared=prepared), expected, "prepared")
    assert torch.equal(count, on_scalar(F.binary_linear, x_words, w, k, out_dtype=torch.int32))


@kernel_products(shapes.spanning_products())
def test_product_of_several_spans(kernel, on_scalar, m, n, k):
    generator = torch.Generator().manual_seed(k)
    x, w = (random_words(rows, k, generator, stray=True) for rows in (m, n))
    count = F.binary_linear(x, w, k, out_dtype=torch.int32)
    assert_equal(count, product(unpack_signs(x, k), unpack_signs(w, k)).to(torch.int32))
    assert torch.equal(count, on_scalar(F.binary_linear, x, w, k, out_dtype=torch.int32))


@pytest.mark.parametrize("k", shapes.around(*shapes.ACCUMULATOR_BOUNDS))
def test_accumulators_at_their_bounds(kernel, k):
    """Random bits give about half of the largest count; equal and opposite rows give 0 and the largest."""
    patterns = random_words(1, k, torch.Generator().manual_seed(k)), torch.full((1, -(-k // 32)), -1, dtype=torch.int32)
    for pattern in patterns:
        for m in (1, 2, 3):  # the kernel takes rows in pairs, and a single one differently
            for n in (1, shapes.PANEL + 2) if k < shapes.SPAN // 2 else (shapes.PANEL + 2,):
                # Neighbouring counts are opposite extremes, so that a carry from one into the next is noticed.
                for x_flips, w_flips in (([0], [0]), ([0], [1]), ([0, 1], [0]), ([1, 0], [0, 0, 1])):
                    x_flip = torch.tensor([x_flips[i % len(x_flips)] for i in range(m)])
                    w_flip = torch.tensor([w_flips[i % len(w_flips)] for i in range(n)])
                    x, w = (torch.where(flip[:, None] > 0, ~pattern, pattern) for flip in (x_flip, w_flip))
                    expected = torch.where(x_flip[:, None] == w_flip, k, -k).to(torch.int32)
                    got = F.binary_linear(x, w, k, out_dtype=torch.int32)
                    assert_equal(got, expected, f"m {m}, n {n}, x {x_flips}, w {w_flips}")


@pytest.mark.parametrize("k", shapes.around(shapes.FEWEST_VALUES, 8 * shapes.TABLE_BLOCK, shapes.MOST_VALUES))
def test_row_tables_at_their_bounds(kernel, k):
    """All rows and outputs are equal or opposite, so every count is 0 or the largest, next to counts of both kinds."""
    generator = torch.Generator().manual_seed(k)
    pattern = random_words(1, k, generator)
    x_flip, w_flip = (
        torch.randint(0, 2, (rows,), generator=generator) for rows in (shapes.TABLE_ROWS, shapes.FEWEST_OUTPUTS)
    )
    x, w = (torch.where(flip[:, None] > 0, ~pattern, pattern) for flip in (x_flip, w_flip))
    expected = torch.where(x_flip[:, None] == w_flip, k, -k).to(torch.int32)
    assert_equal(F.binary_linear(x, w, k, out_dtype=torch.int32), expected)


# ---- packing -------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("strict", [False, True])
def test_pack_every_length(kernel, dtype, strict):
    """Lengths have all remainders modulo a word and a vector; each row starts, unaligned, at the previous one's end."""
    generator = torch.Generator().manual_seed(1)
    for k in range(0, 2 * 64 + 2):
        x = random_values((3, k), dtype, generator)
        words = F.pack_bits(x, strict)
        assert_equal(words, pack_signs(x, strict), f"k {k}")
        if k % 32:
            assert not (words.view(torch.uint32).to(torch.int64) >> k % 32)[:, -1].any(), "padding bits"


@dtypes
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "threshold", [None, 0.0, 1.0, 0.1, 6e-8, 1e-45, 0.3333333333333333, 65519.0, 1e5, 1e300, math.inf]
)
def test_pack_every_value(kernel, dtype, strict, threshold):
    """All bit patterns of the half types, or random ones of the others, and then special values in every lane."""
    generator = torch.Generator().manual_seed(2)
    bits = BITS[dtype]
    if bits is torch.int16:
        x = torch.arange(-(2**15), 2**15, dtype=bits).view(dtype)
    else:
        x = random_values((2**14,), dtype, generator)
    near = torch.tensor(threshold or 1.0, dtype=torch.float64).to(dtype).view(bits)
    edge = (near + torch.arange(-1, 2, dtype=bits)).view(dtype)  # the threshold and its two neighbours
    x = torch.cat([x, *([special_values(dtype), edge, -edge] * 33)])
    w = random_words(1, len(x), generator)
    y, words, range_words = F.linear_train(x, w, len(x), strict=strict, threshold=threshold)
    assert_equal(words, pack_signs(x, strict))
    assert_equal(F.pack_bits(x, strict), words)
    assert_equal(y, epilogue(product(signs(x, strict), unpack_signs(w, len(x))), None, None, dtype))
    if threshold is None:
        assert_equal(range_words, torch.empty(0, dtype=torch.int32))
    else:
        assert_equal(range_words, pack(in_range(x, threshold)))


@dtypes
@pytest.mark.parametrize("strict", [False, True])
def test_denormals_keep_their_sign_when_torch_flushes_them(kernel, dtype, strict):
    # Each thread has its own setting, so if it mattered, bits would depend on the thread that packs a row.
    tiny = torch.finfo(dtype).smallest_normal / 2
    x = torch.tensor([-tiny, tiny, -0.0, 0.0] * 17, dtype=dtype)
    expected = F.pack_bits(x, strict)
    assert_equal(F.unpack_bits(expected, 4 * 17), torch.tensor([-1.0, 1, *((-1, -1) if strict else (1, 1))] * 17))
    assert torch.set_flush_denormal(True)
    try:
        words = F.pack_bits(x, strict)
    finally:
        torch.set_flush_denormal(False)
    assert_equal(words, expected)


@pytest.mark.parametrize("out", [*FLOATS, torch.int32, torch.int8, torch.bool], ids=lambda dtype: str(dtype)[6:])
def test_unpack_every_length(kernel, out):
    generator = torch.Generator().manual_seed(3)
    for k in range(0, 2 * 64 + 2):
        words = random_words(3, k, generator, stray=True)
        values = F.unpack_bits(words, k, out)
        expected = unpack_signs(words, k)
        assert_equal(values, expected > 0 if out is torch.bool else expected.to(out), f"k {k}")
        assert_equal(F.unpack_bits(words.view(torch.uint32), k, out), values, f"uint32, k {k}")
        if out in FLOATS:
            assert_equal(F.pack_bits(values), pack(expected > 0), f"round trip, k {k}")


# ---- conversion of the integers to outputs -------------------------------------------------------


@functools.cache
def rows_with_products(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return products around powers of two, and the rows of words whose products with a row of ones they are."""
    wanted = {s * (2**e + d) for e in (8, 11, 12, 15, 16) for d in range(-49, 50, 2) for s in (1, -1)}
    wanted = torch.tensor([*sorted(wanted), 65519, 65521, -65519, -65521, k, -k])
    return wanted, pack(torch.arange(k) >= (k - wanted[:, None]) // 2)


@pytest.mark.slow
@pytest.mark.parametrize("out", [*FLOATS, torch.int32], ids=lambda dtype: str(dtype)[6:])
def test_large_products_are_rounded_as_torch_does(kernel, out):
    """The products lie where a half type's precision changes, and include ties and values that overflow float16."""
    k = 65601
    wanted, words = rows_with_products(k)
    y = F.binary_linear(torch.full((1, words.shape[1]), -1, dtype=torch.int32), words, k, out_dtype=out)
    assert_equal(y[0], wanted.to(out))
    assert y.isinf().any() == (out is torch.float16)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("vector", FLOATS, ids=lambda dtype: str(dtype)[6:])
@dtypes
def test_bias_and_scale_of_every_value(kernel, dtype, vector, m):
    """Each operation rounds separately (no fused multiply-add), also if values are NaN, infinite or subnormal."""
    n, k = 4099, 27
    generator = torch.Generator().manual_seed(4)
    x, w = random_values((m, k), torch.float32, generator), random_words(n, k, generator)
    normal, wild = torch.randn(n, dtype=torch.float64, generator=generator), random_values((n,), vector, generator)
    # These magnitudes cover the range of the output types, from subnormal results to overflow.
    spread = (normal * 10.0 ** (torch.rand(n, dtype=torch.float64, generator=generator) * 60 - 30)).to(vector)
    normal = normal.to(vector)
    integers = product(signs(x), unpack_signs(w, k))
    for bias, scale in ((normal, normal), (wild, None), (None, wild), (spread, spread), (None, spread), (wild, wild)):
        y = F.linear(x, w, k, bias, scale=scale, out_dtype=dtype)
        assert_equal(y, epilogue(integers, bias, scale, dtype))


@pytest.mark.parametrize("out", FLOATS, ids=lambda dtype: str(dtype)[6:])
def test_cast_of_every_pattern(kernel, out):
    """With k = 0, y is cast(0 + bias), which must equal torch's cast for float32 patterns from the whole range."""
    steps = torch.arange(0, 2**32, 65537 // 2, dtype=torch.int64)
    patterns = torch.cat([steps, *(p + torch.arange(-3, 4) for p in range(0, 2**32, 1 << 20))]) - 2**31
    bias = patterns.clamp(-(2**31), 2**31 - 1).to(torch.int32).view(torch.float32)
    empty = torch.empty(1, 0, dtype=torch.int32)
    y = F.binary_linear(empty, empty.expand(len(bias), 0), 0, bias, out_dtype=out)
    assert_equal(y[0], (bias + 0.0).to(out))


# ---- threads, memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(131, 400, 500), (1, 9001, 2049), (300, 65, 1111), (515, 7, 11003)])
def test_any_number_of_threads(kernel, threads, m, n, k):
    assert m * n * k > shapes.SERIAL_PRODUCTS and n * k > shapes.SERIAL_VALUES
    generator = torch.Generator().manual_seed(5)
    x, w = torch.randn(m, k, generator=generator), random_words(n, k, generator)
    bias = torch.randn(n, generator=generator)
    expected = epilogue(product(signs(x), unpack_signs(w, k)), bias, None, torch.float32)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        prepared = F.prepare_weight(w, k)
        y, x_words, range_words = F.linear_train(x, w, k, bias, weight_prepared=prepared, threshold=1.0)
        assert_equal(y, expected, f"{count} threads")
        assert_equal(F.linear(x, w, k, bias), expected, f"{count} threads, not prepared")
        results.append((prepared, y, x_words, range_words, F.unpack_bits(w, k)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_callers_in_several_threads(kernel, threads):
    """Only one caller at a time gets torch's threads, and the others compute alone; all results are equal."""
    m, n, k, callers = 131, 400, 500, 4
    assert m * n * k > shapes.SERIAL_PRODUCTS
    generator = torch.Generator().manual_seed(6)
    x, w, reals = torch.randn(m, k, generator=generator), random_words(n, k, generator), torch.randn(m, n)
    torch.set_num_threads(2)
    expected = F.linear(x, w, k), F.multiply_signs(reals, w, k), F.unpack_bits(w, k)
    all_there = threading.Barrier(callers)

    def call(_: int) -> list[tuple[torch.Tensor, ...]]:
        all_there.wait()
        return [(F.linear(x, w, k), F.multiply_signs(reals, w, k), F.unpack_bits(w, k)) for _ in range(3)]

    with ThreadPoolExecutor(callers) as pool:
        for results in itertools.chain.from_iterable(pool.map(call, range(callers))):
            assert all(map(torch.equal, results, expected))


@dtypes
def test_memory_of_any_alignment(kernel, dtype):
    """Every pointer lies one byte after an aligned address, as can happen with torch.frombuffer and slices of bytes."""

    def misaligned(tensor):
        raw = tensor.contiguous().view(torch.uint8).reshape(-1)
        buffer = bytearray(b"\xff") + bytes(raw.tolist()) + b"\xff"
        return torch.frombuffer(buffer, dtype=tensor.dtype, offset=1, count=tensor.numel()).view(tensor.shape)

    generator = torch.Generator().manual_seed(6)
    for m, n, k in ((1, 70, 300), (5, 130, 67)):
        x, w = random_values((m, k), dtype, generator), random_words(n, k, generator)
        bias, scale = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
        expected = epilogue(product(signs(x), unpack_signs(w, k)), bias, scale, dtype)
        odd = {name: misaligned(t) for name, t in (("x", x), ("w", w), ("bias", bias), ("scale", scale))}
        assert odd["x"].data_ptr() % 2 == 1
        prepared = misaligned(F.prepare_weight(odd["w"], k))
        panels = slice(PANELS_OFFSET, None)  # the fingerprint before the panels holds the address of the words
        assert_equal(prepared[panels], F.prepare_weight(w, k)[panels])
        for given in (prepared, None):
            assert_equal(
                F.linear(odd["x"], odd["w"], k, odd["bias"], scale=odd["scale"], weight_prepared=given), expected
            )
        words = misaligned(F.pack_bits(odd["x"]))
        assert_equal(F.binary_linear(words, odd["w"], k, odd["bias"], scale=odd["scale"], out_dtype=dtype), expected)
        assert_equal(F.unpack_bits(words, k, dtype), signs(x).to(dtype))


def test_real_weights(kernel):
    """Pack float weights and multiply float inputs by them with both sign rules, as a layer does."""
    x, w, bias = torch.randn(4, 6, 100), torch.randn(33, 100), torch.randn(33)
    x[0], w[:, 7] = 0.0, 0.0
    for strict_x in (False, True):
        for strict_w in (False, True):
            y = F.linear(x, F.pack_bits(w, strict_w), 100, bias, strict=strict_x)
            assert_equal(y, linear_reference(x, w, bias, strict_x=strict_x, strict_w=strict_w))


# ---- the choice ----------------------------------------------------------------------------------


def test_kernels_are_those_of_the_library():
    assert kernels.available() == _kernels.available_kernels() and kernels.available()[-1] == "scalar"
    assert kernels.active() == _kernels.active_kernel() == kernels.available()[0]


@pytest.mark.parametrize("inner", [*KERNELS, None])
def test_forced_restores_the_previous_kernel(kernel, inner):
    """On exit, the previous kernel is active again, which here is a forced one."""
    with kernels.forced(inner):
        assert kernels.active() == (inner or kernel)
        with pytest.raises(ZeroDivisionError), kernels.forced("scalar"):
            assert kernels.active() == "scalar"
            raise ZeroDivisionError
        assert kernels.active() == (inner or kernel)
    assert kernels.active() == kernel


@pytest.mark.slow
def test_forced_restores_the_kernel_of_the_environment():
    code = (
        "from bitorch_qlinear import kernels\n"
        "with kernels.forced(kernels.available()[0]): print(kernels.active())\n"
        "print(kernels.active())\n"
    )
    environment = {**os.environ, "BITORCH_QLINEAR_CPU_KERNEL": "scalar"}
    root = Path(kernels.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert result.stdout.split() == [KERNELS[0], "scalar"], result.stderr


@pytest.mark.parametrize("name", ["avx1024", "SCALAR", "scalar ", "", 7])
def test_an_unknown_kernel_is_refused_and_changes_nothing(kernel, name):
    entered = False
    choices = re.escape(f"expected a CPU kernel that this processor can run ({', '.join(KERNELS)})")
    with pytest.raises(ValueError, match=rf"^name: {choices}.* got {re.escape(repr(name))}$"), kernels.forced(name):
        entered = True
    assert not entered and kernels.active() == kernel


@pytest.mark.parametrize("name", _kernels.CUDA_KERNELS)
def test_a_cuda_kernel_is_refused_without_cuda_operators(monkeypatch, name):
    monkeypatch.setattr(_library, "has_cuda", False)
    monkeypatch.setattr(_library, "no_cuda_reason", "this torch was made of wood")
    message = rf"got '{name}', a CUDA kernel; there are no CUDA operators here: this torch was made of wood$"
    with pytest.raises(ValueError, match=message), kernels.forced(name):
        pass


def test_forced_passes_cuda_kernels_to_the_cuda_library(monkeypatch):
    """The name of a CUDA kernel reaches the CUDA library, which is a substitute here, and not the CPU's choice."""
    state = ["mma_sm75"]
    monkeypatch.setattr(_library, "has_cuda", True)
    monkeypatch.setattr(_kernels, "forced_cuda_kernel", lambda: state[-1])
    monkeypatch.setattr(_kernels, "force_cuda_kernel", lambda name: state.append(name))
    before = kernels.active()
    with kernels.forced("popc"), kernels.forced("scalar"), pytest.raises(ZeroDivisionError), kernels.forced("skinny"):
        assert (state[-1], kernels.active()) == ("skinny", "scalar")
        raise ZeroDivisionError
    assert state == ["mma_sm75", "popc", "skinny", "popc", "mma_sm75"]
    assert kernels.active() == before
