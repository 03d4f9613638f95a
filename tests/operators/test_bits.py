"""Products that write bits, which are words for the next product: each bit is (popcount <= limit) XOR flip."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operators import (
    LAYOUTS,
    WITHOUT_MEMORY,
    WRITES_BITS,
    arguments,
    call_arguments,
    operator,
    refusal,
    strided,
    with_bits,
    without_memory,
)
from support.reference import (
    FLOATS,
    assert_equal,
    bits,
    pack,
    pack_signs,
    product,
    random_values,
    random_words,
    signs,
    unpack,
    unpack_signs,
)
from support.shapes import PANEL, SPAN, around, row_table_products, small_products, spanning_products
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from bitorch_qlinear import functional as F

LIMITS = torch.iinfo(torch.int32)


def random_limits(n, k, generator):
    """Return limits near the counts that random words have, and sometimes any limit at all."""
    near = torch.randint(k // 2 - 3, k // 2 + 4, (n,), generator=generator)
    anywhere = torch.tensor([LIMITS.min, -1, 0, k - 1, k, k + 1, LIMITS.max])
    chosen = anywhere[torch.randint(len(anywhere), (n,), generator=generator)]
    return torch.where(torch.rand(n, generator=generator) < 0.7, near, chosen).clamp(LIMITS.min, LIMITS.max).int()


def random_problem(m, n, k, seed=0):
    """Return words of x and of the weights, limits and flips, with stray bits past each end."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = random_words(m, k, generator, stray=True), random_words(n, k, generator, stray=True)
    flips = random_words(1, n, generator, stray=True)[0]
    return x, weight, random_limits(n, k, generator), flips


def expected_bits(x, weight, k, limits, flips=None):
    return bits(product(unpack_signs(x, k), unpack_signs(weight, k)), k, limits, flips)


def check_all_forms(m, n, k):
    x, weight, limits, flips = random_problem(m, n, k, seed=m + n + k)
    options = {"out_limits": limits, "out_flips": flips}
    expected = expected_bits(x, weight, k, limits, flips)
    what = (m, n, k)
    assert_equal(F.binary_linear(x, weight, k, **options), expected, what)
    assert_equal(F.binary_linear(x, weight, k, weight_prepared=F.prepare_weight(weight, k), **options), expected, what)
    expected = expected_bits(x, weight, k, limits)
    assert_equal(F.linear(unpack_signs(x, k).float(), weight, k, out_limits=limits), expected, what)


@given(data=st.data())
@settings(max_examples=150)
def test_bits_are_the_packed_comparisons(kernel, data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    leading = draw(st.one_of(st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3), st.just([129]), st.just([5])))
    n = draw(st.sampled_from(around(0, 1, 16, 32, 48, PANEL, 96, 2 * PANEL, 3 * PANEL)))
    k = draw(st.one_of(st.integers(0, 200), st.sampled_from(around(240, 256, 480, 1024))))
    x = random_values((*leading, k), draw(st.sampled_from(FLOATS)), generator)
    x = draw(st.sampled_from(list(LAYOUTS.values())))(x)
    strict = draw(st.booleans())
    weight, limits = random_words(n, k, generator, stray=True), random_limits(n, k, generator)
    flips = random_words(1, n, generator, stray=True)[0] if draw(st.booleans()) else None
    given_flips = flips.view(torch.uint32) if flips is not None and draw(st.booleans()) else flips
    prepared = F.prepare_weight(weight, k) if draw(st.booleans()) else None
    expected = bits(product(signs(x, strict), unpack_signs(weight, k)), k, limits, flips)
    options = {"weight_prepared": prepared, "out_limits": limits, "out_flips": given_flips}
    assert_equal(F.linear(x, weight, k, strict=strict, **options), expected, "linear")
    assert_equal(F.binary_linear(pack_signs(x, strict), weight, k, **options), expected, "binary_linear")


@pytest.mark.parametrize(("m", "n", "k"), small_products())
def test_small_products(kernel, m, n, k):
    check_all_forms(m, n, k)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "k"), [*spanning_products(), *row_table_products()])
def test_large_products(kernel, m, n, k):
    check_all_forms(m, n, k)


@pytest.mark.parametrize("n", [1, 33, 300, 1025])
def test_threads_do_not_write_each_others_words(kernel, threads, n):
    """The columns are shared among threads, with few rows, in parts that are not multiples of the kernel's tile."""
    k = 2**24 // n + 1  # enough for several threads
    x, weight, limits, flips = random_problem(2, n, k)
    expected = expected_bits(x, weight, k, limits, flips)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        assert_equal(F.binary_linear(x, weight, k, out_limits=limits, out_flips=flips), expected, count)


@pytest.mark.parametrize(("n", "k"), [*itertools.product([0, 1, 31, 65], [0, 1, 65])])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (1, 2, 1)], ids=str)
def test_sizes_of_zero(kernel, leading, n, k):
    x, (_, weight, limits, flips) = torch.randn(*leading, k), random_problem(1, n, k)
    expected = bits(product(signs(x), unpack_signs(weight, k)), k, limits, flips)
    assert_equal(F.linear(x, weight, k, out_limits=limits, out_flips=flips), expected)
    assert_equal(F.binary_linear(pack_signs(x), weight, k, out_limits=limits, out_flips=flips), expected)


@pytest.mark.parametrize("k", [5, SPAN])
@pytest.mark.parametrize("n", [30, PANEL, 2 * PANEL])
def test_every_limit_is_legal(kernel, n, k):
    """The limits are those around the least and largest counts, and around the ends of 16 and 32 bits."""
    ends = [LIMITS.min, LIMITS.min + 1, -(2**16), *range(-2, 7), *range(k - 2, k + 2)]
    ends += [*range(2**15 - 2, 2**15 + 2), *range(2**16 - 4, 2**16 + 2), LIMITS.max - 1, LIMITS.max]
    limits = torch.tensor(ends, dtype=torch.int32)[torch.arange(n) % len(ends)]
    counts = torch.tensor([0, 1, 2, k - 1, k])  # the bits in which each row differs from the weights
    x = pack(torch.arange(k) >= counts[:, None])
    weight = pack(torch.ones(n, k, dtype=torch.bool))
    ones = counts[:, None] <= limits
    assert_equal(F.binary_linear(x, weight, k, out_limits=limits), pack(ones))
    all_flipped = torch.full((-(-n // 32),), -1, dtype=torch.int32)
    assert_equal(F.binary_linear(x, weight, k, out_limits=limits, out_flips=all_flipped), pack(~ones))
    assert_equal(F.binary_linear(x[-1:], weight, k, out_limits=limits), pack(ones[-1:]), "one row")


def test_two_layers_in_words_equal_two_layers_in_numbers(kernel):
    """With scale ±1 and bias, the sign of a product's float output is the bit: scale < 0 reverses the comparison."""
    k, n = 77, 45
    x, weight = torch.randn(6, k), pack_signs(torch.randn(n, k))
    scale, bias = torch.where(torch.rand(n) < 0.5, -1.0, 1.0), torch.randint(-9, 10, (n,)).float()
    # With scale 1, k - 2 popcount + bias >= 0 is popcount <= (k + bias) / 2, and with -1 popcount > (k - bias - 1) / 2.
    limits = torch.where(scale > 0, (k + bias) / 2, (k - bias - 1) / 2).floor().int()
    words = F.linear(x, weight, k, out_limits=limits, out_flips=pack(scale < 0))
    assert_equal(words, F.pack_bits(F.linear(x, weight, k, bias, scale=scale)))
    last = pack_signs(torch.randn(3, n))
    assert_equal(F.binary_linear(words, last, n), F.linear(F.linear(x, weight, k, bias, scale=scale), last, n))


def test_unaligned_limits_and_flips(kernel):
    x, weight, limits, flips = random_problem(3, 70, 40)

    def misaligned(vector):
        raw = torch.frombuffer(bytearray(b"\0" + vector.numpy().tobytes()), dtype=torch.uint8)
        return torch.frombuffer(raw.numpy(), dtype=torch.int32, offset=1)

    assert misaligned(limits).data_ptr() % 4
    y = F.binary_linear(x, weight, 40, out_limits=misaligned(limits), out_flips=misaligned(flips))
    assert_equal(y, expected_bits(x, weight, 40, limits, flips))


# ---- refusals --------------------------------------------------------------------------------------

WAYS = ["cpu", *WITHOUT_MEMORY]
EXCLUDED = {"bias": torch.ones(5), "scale": torch.ones(5), "out_dtype": torch.float32}


def refusal_of(way, name, values):
    """Return what the operator says about arguments of this form with tensors that have memory, or have none."""
    mode, made = (nullcontext(), lambda tensor: tensor) if way == "cpu" else without_memory(way)
    with mode:
        return refusal(name, {n: made(v) if isinstance(v, torch.Tensor) else v for n, v in values.items()})


@pytest.mark.parametrize("name", WRITES_BITS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("argument", EXCLUDED)
def test_numbers_and_bits_exclude_each_other(name, way, argument):
    values = with_bits(arguments()) | {argument: EXCLUDED[argument]}
    given = "float32" if argument == "out_dtype" else "a tensor"
    for flips in (values["out_flips"], None):
        said = refusal_of(way, name, values | {"out_flips": flips})
        assert said == f"bitorch_qlinear: {argument}: expected None with out_limits, got {given}"


@pytest.mark.parametrize("name", WRITES_BITS)
@pytest.mark.parametrize("way", WAYS)
def test_int32_as_the_type_of_numbers_excludes_limits_too(name, way):
    said = refusal_of(way, name, with_bits(arguments()) | {"out_dtype": torch.int32})
    assert said == "bitorch_qlinear: out_dtype: expected None with out_limits, got int32"


@pytest.mark.parametrize("name", WRITES_BITS)
@pytest.mark.parametrize("way", WAYS)
def test_flips_need_limits(name, way):
    said = refusal_of(way, name, with_bits(arguments()) | {"out_limits": None})
    assert said == "bitorch_qlinear: out_flips: expected None without out_limits, got a tensor"


@pytest.mark.parametrize("name", WRITES_BITS)
@pytest.mark.parametrize("argument", ["out_limits", "out_flips"])
@pytest.mark.parametrize("way", WAYS)
def test_strided_vectors_are_refused(name, argument, way):
    values = with_bits(arguments(n=70), n=70)
    said = refusal_of(way, name, values | {argument: strided(values[argument])})
    assert said == f"bitorch_qlinear: {argument}: expected a contiguous vector, got a strided one"


# ---- torch's tools ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap():
    k, n = 40, 70
    _, weight, limits, flips = random_problem(1, n, k)
    x, generator = torch.randn(3, 2, k), torch.Generator().manual_seed(1)
    each = torch.func.vmap(lambda v: F.linear(v, weight, k, out_limits=limits, out_flips=flips))(x)
    assert_equal(each, F.linear(x, weight, k, out_limits=limits, out_flips=flips))
    each = torch.func.vmap(lambda v: F.binary_linear(v, weight, k, out_limits=limits))(pack_signs(x))
    assert_equal(each, F.linear(x, weight, k, out_limits=limits))
    many = torch.stack([random_limits(n, k, generator) for _ in range(3)])
    masks = random_words(3, n, generator)
    each = torch.func.vmap(lambda v, a, b: F.linear(v, weight, k, out_limits=a, out_flips=b))(x, many, masks)
    one_by_one = [F.linear(v, weight, k, out_limits=a, out_flips=b) for v, a, b in zip(x, many, masks, strict=True)]
    assert_equal(each, torch.stack(one_by_one))


def chain():
    """Return a function that computes two layers in words."""
    _, weight, limits, flips = random_problem(1, 100, 70)
    last, last_limits = pack_signs(torch.randn(9, 100)), limits[:9].contiguous()

    def compute(x):
        words = F.linear(x, weight, 70, out_limits=limits, out_flips=flips)
        return F.binary_linear(words, last, 100, out_limits=last_limits)

    return compute


def test_one_compiled_graph_serves_every_batch():
    torch._dynamo.reset()
    function, counter = chain(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 3, 17, 129):
        x = torch.randn(rows, 70)
        assert_equal(compiled(x), function(x))
    assert counter.frame_count == 1


def test_operations_equal_those_of_the_product_in_numbers():
    values = with_bits(arguments())
    for name in WRITES_BITS:
        args, kwargs = call_arguments(name, values)
        with FlopCounterMode(display=False) as counter:
            operator(name)(*args, **kwargs)
        assert counter.get_total_flops() == 2 * 3 * 5 * 40


def test_the_bits_that_are_not_used_are_zero(kernel):
    """Not only in fresh memory: the allocator gives back memory that was written before."""
    x, weight, limits, flips = random_problem(5, 65, 40)
    for _ in range(3):
        del_me = torch.full((5, 3), -1, dtype=torch.int32)
        del del_me
        y = F.binary_linear(x, weight, 40, out_limits=limits, out_flips=flips)
        assert not unpack(y, 96)[:, 65:].any()
