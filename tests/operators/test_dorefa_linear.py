"""dorefa_linear: products of rounded inputs by packed weights, against torch's own rounding and exact sums."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operators import LAYOUTS, vectors
from support.reference import (
    BITS,
    FLOATS,
    assert_equal,
    levels,
    levels_linear,
    random_values,
    random_words,
    special_values,
    unpack_signs,
)
from support.shapes import PANEL, ROW_TILE, around

from bitorch_qlinear import functional as F
from bitorch_qlinear import quantizations

ONE = torch.ones(1, 1, dtype=torch.int32)


def values_near_levels(shape, dtype, generator):
    """Return values of which most lie between -0.2 and 1.2, some of them halfway between two levels."""
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    halves = torch.randint(0, 7, shape, generator=generator) / 6
    return torch.where(torch.rand(shape, generator=generator) < 0.8, x, halves).to(dtype)


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    leading = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5]), max_size=3))
    if draw(st.booleans()):
        leading = [draw(st.sampled_from([1, 2, 3, *around(8, 12, 16, 32, 48, ROW_TILE // 2, ROW_TILE)]))]
    n = draw(st.sampled_from([0, 1, 2, 3, 17, *around(32, PANEL, 3 * PANEL, 8 * PANEL)]))
    k = draw(st.one_of(st.integers(0, 200), st.sampled_from(around(64, 128, 240, 256, 480, 1024))))
    dtype = draw(st.sampled_from(FLOATS))
    make = draw(st.sampled_from([values_near_levels, values_near_levels, random_values]))
    return {
        "x": draw(st.sampled_from(list(LAYOUTS.values())))(make((*leading, k), dtype, generator)),
        "words": random_words(n, k, generator, stray=draw(st.booleans())),
        "k": k,
        "bias": draw(vectors(n, generator)),
        "scale": draw(vectors(n, generator)),
        "out_dtype": draw(st.sampled_from([None, *FLOATS])),
        "bits": draw(st.sampled_from([1, 2])),
        "prepare": draw(st.booleans()),
    }


@given(problem=problems())
@settings(max_examples=250)
def test_equals_the_reference(kernel, problem):
    x, words, k, bias = (problem[name] for name in ("x", "words", "k", "bias"))
    options = {name: problem[name] for name in ("scale", "out_dtype", "bits")}
    prepared = F.prepare_weight(words, k) if problem["prepare"] else None
    before = x.clone()
    y = F.dorefa_linear(x, words, k, bias, weight_prepared=prepared, **options)
    out = options["out_dtype"] or x.dtype
    assert_equal(y, levels_linear(x, unpack_signs(words, k), options["bits"], bias, options["scale"], out))
    assert_equal(x, before, "the argument x")


def level_of_each(x, bits):
    """Return the level of each value of a vector, from products with a single weight of +1."""
    step = torch.tensor(1 / (2**bits - 1), dtype=torch.float64)
    return torch.round(F.dorefa_linear(x[:, None], ONE, 1, bits=bits, out_dtype=torch.float64)[:, 0] / step)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_levels_are_those_of_torch(kernel, dtype, bits):
    """Compare all values of the half types, and of the others those around each limit and special ones."""
    integers = BITS[dtype]
    if dtype.itemsize == 2:
        x = torch.arange(-(2**15), 2**15).to(integers).view(dtype)
    else:
        steps = 2**bits - 1
        limits = torch.tensor([(level + 0.5) / steps for level in range(steps)], dtype=dtype).view(integers)
        x = (limits[:, None] + torch.arange(-200, 200, dtype=integers)).reshape(-1).view(dtype)
        x = torch.cat([x, special_values(dtype), -x])
    assert_equal(level_of_each(x, bits), levels(x, bits) + 0.0)
    # Rows of 32 values and more take a kernel's vectors, and a single one its twin for the last word.
    wide = x[: len(x) // 64 * 64].view(-1, 64)
    wide = wide[~wide.isnan().any(1)]
    places = F.pack_bits(2 * torch.eye(64) - 1)  # row i of the weights is +1 at i alone
    y = F.dorefa_linear(wide, places, 64, bits=bits, out_dtype=torch.float64)
    assert_equal(y, levels_linear(wide, unpack_signs(places, 64), bits, None, None, torch.float64))


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_the_float_layer_where_its_sum_is_exact(kernel, dtype, bits):
    """With one bit every float sum is exact; with two bits a level is rounded, and sums agree within a bound."""
    k, n = 300, 70
    x, weight = values_near_levels((40, k), dtype, torch.Generator().manual_seed(bits)), torch.randn(n, k)
    words = F.pack_bits(weight)
    y = F.dorefa_linear(x, words, k, bits=bits)
    expected = torch.nn.functional.linear(
        quantizations.InputDoReFa(bits)(x).double(), F.unpack_bits(words, k, torch.float64)
    )
    if bits == 1:
        assert_equal(y, expected.to(dtype) + 0.0)
    else:
        assert ((y.double() - expected).abs() <= k * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("at", [0, 31, 32, 39])
@pytest.mark.parametrize("bits", [1, 2])
def test_a_row_with_nan_is_nan_and_the_others_are_not(kernel, bits, at):
    x, words = torch.rand(5, 40), F.pack_bits(torch.randn(7, 40))
    clean = F.dorefa_linear(x, words, 40, bits=bits)
    x[3, at] = -math.nan
    y = F.dorefa_linear(x, words, 40, torch.randn(7), bits=bits, scale=torch.zeros(7))
    assert y[3].isnan().all() and not y[[0, 1, 2, 4]].isnan().any()
    assert_equal(F.dorefa_linear(x, words, 40, bits=bits)[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


@pytest.mark.parametrize("bits", [1, 2])
def test_denormals_and_threads_do_not_change_results(bits):
    x, words = torch.rand(150, 700) * 1.4 - 0.2, F.pack_bits(torch.randn(600, 700))
    expected = F.dorefa_linear(x, words, 700, bits=bits)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.set_flush_denormal(True)
            assert_equal(F.dorefa_linear(x, words, 700, bits=bits), expected)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def test_int32_is_refused_because_nan_has_no_integer():
    with pytest.raises(RuntimeError, match="out_dtype: expected float64, float32, float16 or bfloat16, got int32"):
        F.dorefa_linear(torch.rand(2, 40), F.pack_bits(torch.randn(3, 40)), 40, out_dtype=torch.int32)
