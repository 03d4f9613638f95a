"""Packing by a limit for each channel: a bit is (v >= limit) XOR flip in the order of bit patterns, or a NaN's bit."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operators import LAYOUTS, WITHOUT_MEMORY, arguments, refusal, with_bits, without_memory
from support.reference import (
    BITS,
    FLOATS,
    assert_equal,
    order,
    pack,
    pack_by_limits,
    pack_signs,
    random_values,
    random_words,
    special_values,
    unpack,
)
from support.shapes import SERIAL_VALUES
from torch._dynamo.testing import CompileCounterWithBackend

from bitorch_qlinear import functional as F

dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
strictness = pytest.mark.parametrize("strict", [False, True])


def neighbours(values, generator):
    """Return the values or patterns next to them, in either direction, which may wrap around to the other sign."""
    patterns = values.contiguous().view(BITS[values.dtype])
    steps = torch.randint(-1, 2, patterns.shape, generator=generator).to(patterns.dtype)
    return (patterns + steps).view(values.dtype)


def random_limits(x, generator):
    """Return limits of the channels of x: for two of three the value of a row or one next to it, else any."""
    k, rows = x.shape[-1], x.reshape(-1, x.shape[-1]) if x.numel() else x.new_zeros(1, x.shape[-1])
    chosen = rows[torch.randint(len(rows), (k,), generator=generator), torch.arange(k)]
    near = torch.rand(k, generator=generator) < 2 / 3
    return torch.where(near, neighbours(chosen, generator), random_values((k,), x.dtype, generator))


@given(data=st.data())
@settings(max_examples=200)
def test_bits_are_the_packed_comparisons(kernel, data):
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    leading = draw(st.one_of(st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3), st.just([9]), st.just([4])))
    k = draw(st.one_of(st.integers(0, 200), st.sampled_from([1023, 1024, 1025])))
    x = random_values((*leading, k), draw(st.sampled_from(FLOATS)), generator)
    if draw(st.booleans()):  # rows without NaN take another path
        x = torch.where(x.isnan(), x.new_tensor(-0.0), x)
    x = draw(st.sampled_from(list(LAYOUTS.values())))(x)
    strict, limits = draw(st.booleans()), random_limits(x, generator)
    flips = random_words(1, k, generator, stray=True)[0] if draw(st.booleans()) else None
    given_flips = flips.view(torch.uint32) if flips is not None and draw(st.booleans()) else flips
    before = x.clone(), limits.clone()
    expected = pack_by_limits(x.resolve_neg(), limits, flips, strict)
    assert_equal(F.pack_bits(x, strict, limits=limits, flips=given_flips), expected)
    assert_equal(x, before[0], "the argument x")
    assert_equal(limits, before[1], "the argument limits")


@dtypes
@strictness
@pytest.mark.parametrize("flipped", [False, True])
def test_every_special_value_by_every_special_limit(kernel, dtype, strict, flipped):
    """Values and limits are ±0, ±1, ±inf, denormals, NaNs of both signs and their neighbours, in every lane."""
    special = special_values(dtype)
    patterns = special.view(BITS[dtype])
    special = torch.cat([(patterns + step).view(dtype) for step in (-1, 0, 1)])
    rows = special[:, None].expand(-1, len(special) * 33).contiguous()
    limits = special.repeat(33)
    flips = torch.full((-(-len(limits) // 32),), -1, dtype=torch.int32) if flipped else None
    got = F.pack_bits(rows, strict, limits=limits, flips=flips)
    assert_equal(got, pack_by_limits(rows, limits, flips, strict))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@strictness
def test_every_pattern_of_the_half_types(kernel, dtype, strict):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for limits in (
        neighbours(x, torch.Generator().manual_seed(1)),
        x.flip(0),
        torch.zeros_like(x),
        -torch.zeros_like(x),
    ):
        assert_equal(F.pack_bits(x, strict, limits=limits.contiguous()), pack_by_limits(x, limits, None, strict))


@dtypes
def test_the_meaning_in_plain_comparisons(kernel, dtype):
    """Without NaN and zeros the bit is torch's own v >= limit, so the reference is not only a formula of patterns."""
    x, limits = torch.randn(7, 333).to(dtype) + 3, torch.randn(333).to(dtype) + 3
    assert_equal(F.pack_bits(x, limits=limits), pack(x >= limits))
    flips = pack_signs(torch.randn(333))
    assert_equal(F.pack_bits(x, limits=limits, flips=flips), pack((x >= limits) ^ unpack(flips, 333)))
    zeros = torch.tensor([-0.0, 0.0], dtype=dtype)
    assert unpack(F.pack_bits(zeros[:, None], limits=zeros[1:]), 1).tolist() == [[False], [True]]
    assert unpack(F.pack_bits(zeros[:, None], limits=zeros[:1]), 1).tolist() == [[True], [True]]


@dtypes
@strictness
@pytest.mark.parametrize("limit", [float("nan"), -float("nan"), 0.0, float("inf"), -float("inf")])
def test_the_bit_of_a_nan_is_that_of_strict(kernel, dtype, strict, limit):
    pattern = torch.tensor(float("nan"), dtype=dtype).view(BITS[dtype])
    sign = torch.iinfo(pattern.dtype).min
    nan = torch.stack([pattern & ~sign, pattern | sign]).view(dtype)
    assert order(nan).sign().tolist() == [1, -1]
    x = nan.repeat(40).expand(5, -1).contiguous()
    limits = torch.full((80,), limit, dtype=dtype)
    for flips in (None, torch.zeros(3, dtype=torch.int32), torch.full((3,), -1, dtype=torch.int32)):
        bits = unpack(F.pack_bits(x, strict, limits=limits, flips=flips), 96)
        assert bits[:, :80].all() if not strict else not bits.any()
        assert not bits[:, 80:].any(), "bits past k"


@dtypes
def test_strict_decides_nothing_but_the_bit_of_a_nan(kernel, dtype):
    generator = torch.Generator().manual_seed(2)
    x = random_values((6, 100), dtype, generator)
    x = torch.where(x.isnan(), x.new_tensor(0.0), x)
    limits = random_limits(x, generator)
    assert_equal(F.pack_bits(x, True, limits=limits), F.pack_bits(x, False, limits=limits))


@dtypes
@strictness
def test_denormals_keep_their_place_when_torch_flushes_them(kernel, dtype, strict):
    generator = torch.Generator().manual_seed(3)
    smallest = torch.finfo(dtype).smallest_normal
    x = (torch.randn(9, 200, dtype=torch.float64, generator=generator) * smallest).to(dtype)
    limits = random_limits(x, generator)
    expected = pack_by_limits(x, limits, None, strict)
    assert torch.set_flush_denormal(True)
    try:
        words = F.pack_bits(x, strict, limits=limits)
    finally:
        torch.set_flush_denormal(False)
    assert_equal(words, expected)


def test_limits_of_zero_give_the_signs(kernel):
    """v >= +0 is v > 0 or +0, and v >= -0 is not v < 0; a limit at the smallest denormal is v > 0."""
    generator = torch.Generator().manual_seed(4)
    for dtype in FLOATS:
        x = random_values((5, 333), dtype, generator)
        above = torch.ones(333, dtype=BITS[dtype]).view(dtype)
        assert_equal(F.pack_bits(x, limits=-torch.zeros(333, dtype=dtype)), F.pack_bits(x))
        assert_equal(F.pack_bits(x, True, limits=above), F.pack_bits(x, True))


@pytest.mark.parametrize("m", [1, 3, 4, 5, 1001])
def test_any_number_of_threads(kernel, threads, m):
    generator = torch.Generator().manual_seed(m)
    k = max(300, SERIAL_VALUES // m + 77)
    x = random_values((m, k), torch.float32, generator)
    limits, flips = random_limits(x, generator), random_words(1, k, generator)[0]
    expected = pack_by_limits(x, limits, flips)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        assert_equal(F.pack_bits(x, limits=limits, flips=flips), expected, count)


def test_unaligned_limits_and_flips(kernel):
    generator = torch.Generator().manual_seed(5)

    def misaligned(vector):
        raw = bytearray(b"\0" + vector.numpy().tobytes())
        return torch.frombuffer(raw, dtype=vector.dtype, offset=1)

    for dtype in (torch.float64, torch.float32, torch.float16):
        x = random_values((5, 70), dtype, generator)
        limits, flips = random_limits(x, generator), random_words(1, 70, generator)[0]
        assert misaligned(limits).data_ptr() % 2
        words = F.pack_bits(x, limits=misaligned(limits), flips=misaligned(flips))
        assert_equal(words, pack_by_limits(x, limits, flips))


# ---- refusals --------------------------------------------------------------------------------------

WAYS = ["cpu", *WITHOUT_MEMORY]


def refusal_of(way, values):
    """Return what pack_bits says about arguments of this form with tensors that have memory, or have none."""
    mode, made = (nullcontext(), lambda tensor: tensor) if way == "cpu" else without_memory(way)
    with mode:
        return refusal("pack_bits", {n: made(v) if isinstance(v, torch.Tensor) else v for n, v in values.items()})


@pytest.mark.parametrize("way", WAYS)
def test_flips_need_limits(way):
    said = refusal_of(way, with_bits(arguments()) | {"limits": None})
    assert said == "bitorch_qlinear: flips: expected None without limits, got a tensor"


@pytest.mark.parametrize("way", WAYS)
def test_limits_have_the_dtype_of_x(way):
    values = with_bits(arguments())
    said = refusal_of(way, values | {"limits": values["limits"].double()})
    assert said == "bitorch_qlinear: limits: expected float32, the dtype of x, got float64"
    said = refusal_of(way, values | {"x": values["x"].half()})
    assert said == "bitorch_qlinear: limits: expected float16, the dtype of x, got float32"


@pytest.mark.parametrize("way", WAYS)
def test_none_for_x_is_refused(way):
    said = refusal_of(way, with_bits(arguments()) | {"x": None})
    assert said == "bitorch_qlinear: x: expected a tensor, got None"


@pytest.mark.parametrize("argument", ["x", "limits", "flips"])
def test_tensors_on_different_devices_are_refused(argument):
    values = with_bits(arguments())
    said = refusal("pack_bits", values | {argument: values[argument].to("meta")})
    named = argument if argument != "x" else "limits"
    assert said == f"bitorch_qlinear: {named}: expected a tensor on the same device as the first argument"


# ---- torch's tools ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batched", [(0, None, None), (1, None, None), (0, 0, 0), (None, 0, None), (0, None, 1), (2, 1, 0)]
)
@pytest.mark.parametrize("batch", [3, 0])
def test_vmap(batched, batch):
    k, generator = 70, torch.Generator().manual_seed(6)
    shapes = (2, 4, k), (k,), (3,)
    tensors = [
        random_values(shapes[0], torch.float32, generator),
        random_values(shapes[1], torch.float32, generator),
        random_words(1, k, generator)[0],
    ]
    tensors = [
        t if dim is None else torch.stack([t, t.flip(0), t.clone()], dim)
        for t, dim in zip(tensors, batched, strict=True)
    ]
    if not batch:
        tensors = [t if dim is None else t.narrow(dim, 0, 0) for t, dim in zip(tensors, batched, strict=True)]

    def function(x, limits, flips):
        return F.pack_bits(x, True, limits=limits, flips=flips)

    got = torch.func.vmap(function, in_dims=batched)(*tensors)
    examples = [
        [t if dim is None else t.select(dim, i).contiguous() for t, dim in zip(tensors, batched, strict=True)]
        for i in range(batch)
    ]
    if examples:
        assert_equal(got, torch.stack([function(*each) for each in examples]))
    assert got.shape == (batch, 2, 4, 3)
    got = torch.func.vmap(lambda x, limits: F.pack_bits(x, limits=limits), in_dims=batched[:2])(*tensors[:2])
    assert got.shape == (batch, 2, 4, 3)


def test_one_compiled_graph_serves_every_batch():
    torch._dynamo.reset()
    limits, flips = torch.randn(70), pack_signs(torch.randn(70))
    counter = CompileCounterWithBackend("aot_eager")

    def function(x):
        return F.pack_bits(x, limits=limits, flips=flips)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 3, 17, 129):
        x = torch.randn(rows, 70)
        assert_equal(compiled(x), function(x))
    assert counter.frame_count == 1
