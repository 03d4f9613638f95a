"""multiply_signs: all kernels sum in the same order, with a bounded error, for any values, layout and thread count."""

import itertools
import math

import pytest
import torch
from support.calls import Calls
from support.reference import FLOATS, assert_equal, random_values, random_words, unpack_signs
from support.shapes import around
from torch.func import vmap

from bitorch_qlinear import QLinear, _kernels
from bitorch_qlinear import functional as F

# These constants repeat csrc/cpu/sign_gemm.h: values per group and per pass, passes per span, the passes and columns
# whose codes are made together, rows per tile; and csrc/cpu/product.h: the most columns per tile.
GROUP, PASS, PASSES_PER_SPAN, CODE_PASSES, CODE_COLUMNS, ROW_TILE, MOST_COLUMNS = 6, 30, 64, 16, 32, 16, 4096
# The last of these are more rows than any kernel computes one by one.
FEW_ROWS = range(1, 12)
SPAN = PASS * PASSES_PER_SPAN

# These kernels multiply reals by signs faster than a BLAS does.
BY_TABLES = {"amx", "avx512", "avx2"}
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])
transposes = pytest.mark.parametrize("transpose", [False, True], ids=["", "transposed"])


def factors(m, n, k, dtype, transpose, generator, make=None):
    """Return reals of shape (m, k), words whose signs are (k, n) or transposed (n, k), and the operator's k."""
    reals = (make or torch.randn)((m, k), generator=generator).to(dtype)
    words = random_words(n if transpose else k, k if transpose else n, generator, stray=True)
    return reals, words, k if transpose else n


def sign_matrix(words, k, transpose):
    signs = unpack_signs(words, k)
    return signs.T if transpose else signs


def integers(shape, generator):
    return torch.randint(-3, 4, shape, generator=generator)


LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "rows apart": lambda x: torch.cat([x, torch.full((len(x), 5), math.nan, dtype=x.dtype)], 1)[:, : x.shape[1]],
    "every other value": lambda x: torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0],
}


def sizes():
    """Return (m, n, k) around the sizes of every tile."""
    ks = [0, *around(1, 3, GROUP, 8, PASS, 32, 2 * PASS, 64)]
    shapes = {(3, 33, k) for k in ks} | {(ROW_TILE, 9, k) for k in ks}
    shapes |= {(m, n, 37) for m in around(1, 4, 8, ROW_TILE, 2 * ROW_TILE) for n in around(1, 8, 32, 64)}
    shapes |= {(m, n, 67) for m in FEW_ROWS for n in around(16, CODE_COLUMNS)}
    shapes |= {(m, 35, k) for m in (1, 2, 5) for k in around(PASS, 32, 256, CODE_PASSES * PASS, 512, SPAN, SPAN + 32)}
    return sorted(shapes | {(2, 3, k) for k in [*around(SPAN, 2 * SPAN), 3 * SPAN + PASS + 1]})


@transposes
@dtypes
def test_every_size(kernel, on_scalar, dtype, transpose):
    """The result equals the scalar kernel's bit for bit, and the exact product if the reals are small integers."""
    generator = torch.Generator().manual_seed(0)
    for i, (m, n, k) in enumerate(sizes()):
        layout = list(LAYOUTS.values())[i % len(LAYOUTS)]
        reals, words, row = factors(m, n, k, dtype, transpose, generator)
        y = F.multiply_signs(layout(reals), words, row, transpose)
        assert_equal(y, on_scalar(F.multiply_signs, reals, words, row, transpose), f"{m} {n} {k}")
        reals, words, row = factors(m, n, k, dtype, transpose, generator, integers)
        y = F.multiply_signs(layout(reals), words, row, transpose)
        exact = (reals.double() @ sign_matrix(words, row, transpose)).to(dtype)
        assert torch.equal(y, exact), f"{m} {n} {k}"


@dtypes
def test_layouts(kernel, dtype):
    generator = torch.Generator().manual_seed(1)
    reals, words, k = factors(19, 70, 71, dtype, False, generator)
    expected = F.multiply_signs(reals, words, k)
    for name, layout in LAYOUTS.items():
        assert_equal(F.multiply_signs(layout(reals), words, k), expected, name)
    assert_equal(F.multiply_signs(reals.view(1, 19, 1, 71), words, k), expected.view(1, 19, 1, k))
    assert_equal(F.multiply_signs(reals[3], words, k), expected[3])
    assert_equal(F.multiply_signs(reals[:1].expand(19, 71), words, k), expected[:1].expand(19, k))
    assert_equal(F.multiply_signs(torch._neg_view(-reals), words, k), expected)
    assert_equal(F.multiply_signs(reals, words.view(torch.uint32), k), expected)


def rounding_unit(dtype):
    return 2.0**-53 if dtype is torch.float64 else 2.0**-24


@transposes
@dtypes
def test_error_bound(kernel, dtype, transpose):
    """With d additions and rounding unit u, the error is at most d u sum(|x|), and one more rounding for half types."""
    generator = torch.Generator().manual_seed(2)
    for k in (1, GROUP, PASS, 257, SPAN, 2 * SPAN + 7):
        reals, words, row = factors(2, 40, k, dtype, transpose, generator)
        exact = reals.double() @ sign_matrix(words, row, transpose)
        additions = 69 + math.ceil(k / SPAN)
        bound = additions * rounding_unit(dtype) * reals.double().abs().sum(1, keepdim=True)
        if dtype in (torch.float16, torch.bfloat16):
            bound = bound + exact.abs() * torch.finfo(dtype).eps
        error = (F.multiply_signs(reals, words, row, transpose).double() - exact).abs()
        assert (error <= bound).all(), f"k {k}: {(error / bound).max()} of the bound"


@pytest.mark.parametrize("k", [64, 512, 1000, SPAN, 4096, 11008, 50000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@transposes
def test_error_is_like_that_of_the_blas(dtype, k, transpose):
    """The error is at most twice that of torch's product of the same data."""
    generator = torch.Generator().manual_seed(3)
    reals, words, row = factors(64, 128, k, dtype, transpose, generator)
    signs = sign_matrix(words, row, transpose)
    # Each value is split into two parts whose sums are exact, which gives more precision than float64.
    high = (reals.double() * 2**20).round() / 2**20
    exact_high, low = high @ signs, (reals.double() - high) @ signs
    error, blas = (
        ((y.double() - exact_high) - low).abs()
        for y in (F.multiply_signs(reals, words, row, transpose), reals @ signs.to(dtype))
    )
    assert error.max() <= 2 * blas.max()
    assert error.square().mean() <= 4 * blas.square().mean()


@transposes
@dtypes
def test_nan_and_infinities(kernel, dtype, transpose):
    """As in a product of floats, NaN or opposite infinities give NaN, and infinities of one sign an infinity."""
    generator = torch.Generator().manual_seed(4)
    m, n, k = 60, 70, 97
    reals, words, row = factors(m, n, k, dtype, transpose, generator, integers)
    for i, values in enumerate(itertools.product([math.nan, math.inf, -math.inf, 1.0], repeat=2)):
        for j in range(3):
            at = torch.randperm(k, generator=generator)[:2]
            reals[3 * i + j, at] = torch.tensor(values, dtype=dtype)
    reals[48, 0], reals[49, k - 1] = math.inf, math.nan
    signs = sign_matrix(words, row, transpose)
    # This sums the products one by one, because a BLAS may treat infinities differently.
    expected = torch.stack([(x[:, None] * signs).sum(0) for x in reals.double()]).to(dtype)
    assert expected.isnan().any() and expected.isinf().any() and expected[50:].isfinite().all()
    y = F.multiply_signs(reals, words, row, transpose)
    assert torch.equal(y.nan_to_num(7.5, 1e4, -1e4), expected.nan_to_num(7.5, 1e4, -1e4))
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
    few = [F.multiply_signs(part, words, row, transpose) for part in reals.split(3)]
    assert_equal(torch.cat(few), y)


@dtypes
def test_any_bits(kernel, on_scalar, dtype):
    """Random bit patterns include the largest values, whose sums overflow, denormals and signalling NaN."""
    generator = torch.Generator().manual_seed(5)
    reals, words = random_values((200, 65), dtype, generator), random_words(65, 40, generator)
    y = F.multiply_signs(reals, words, 40)
    assert_equal(y, on_scalar(F.multiply_signs, reals, words, 40))
    for rows in (1, 2, 3, 7):
        few = [F.multiply_signs(part, words, 40) for part in reals.split(rows)]
        assert_equal(torch.cat(few), y, f"{rows} rows at a time")


@dtypes
def test_zeros_of_either_sign(kernel, on_scalar, dtype):
    """In a sum of zeros alone, the sign of the result depends on what was added, and in which order."""
    generator = torch.Generator().manual_seed(11)
    for m, k in itertools.product((1, 2, 5, ROW_TILE), (1, 2, PASS - 1, PASS, 2 * PASS + 4)):
        reals, words, _ = factors(m, 40, k, dtype, True, generator, torch.rand)
        reals = torch.where(reals < 0.2, -0.0, 0.0).to(dtype)
        y, expected = F.multiply_signs(reals, words, k, True), on_scalar(F.multiply_signs, reals, words, k, True)
        assert_equal(y, expected, f"{m} {k}")
        assert torch.equal(y.signbit(), expected.signbit()), f"{m} {k}"


@transposes
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 9001, 700), (33, 520, 400), (300, 1040, 61), (3, 2 * MOST_COLUMNS + 5, 200)]
)
def test_any_number_of_threads(kernel, threads, m, n, k, transpose):
    reals, words, row = factors(m, n, k, torch.float32, transpose, torch.Generator().manual_seed(6))
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(F.multiply_signs(reals, words, row, transpose))
    assert all(torch.equal(results[0], other) for other in results[1:])
    torch.testing.assert_close(
        results[0].double(), reals.double() @ sign_matrix(words, row, transpose), atol=1e-3, rtol=0
    )


@dtypes
def test_memory_of_any_alignment(kernel, dtype):
    generator = torch.Generator().manual_seed(7)
    reals, words, row = factors(17, 40, 67, dtype, False, generator)
    buffer = bytearray(b"\xff") + bytes(reals.view(torch.uint8).reshape(-1).tolist())
    odd = torch.frombuffer(buffer, dtype=dtype, offset=1, count=reals.numel()).view(reals.shape)
    assert odd.data_ptr() % 2 == 1
    assert_equal(F.multiply_signs(odd, words, row), F.multiply_signs(reals, words, row))


def test_vmap():
    reals, words = torch.randn(3, 4, 40), random_words(15, 40, torch.Generator().manual_seed(8)).view(3, 5, 2)
    expected = torch.stack([F.multiply_signs(r, w, 40, True) for r, w in zip(reals, words, strict=True)])
    assert_equal(vmap(lambda r, w: F.multiply_signs(r, w, 40, True))(reals, words), expected)
    swapped = reals.movedim(0, 2), words.movedim(0, 1)
    assert_equal(vmap(lambda r, w: F.multiply_signs(r, w, 40, True), in_dims=(2, 1))(*swapped), expected)
    expected = torch.stack([F.multiply_signs(reals[0].t().contiguous(), w[:4], 40) for w in words])
    assert_equal(
        vmap(lambda w: F.multiply_signs(reals[0].t().contiguous(), w, 40))(words[:, :4].contiguous()), expected
    )
    expected = torch.stack([F.multiply_signs(r, words[1], 40, True) for r in reals])
    assert_equal(vmap(lambda r: F.multiply_signs(r, words[1], 40, True))(reals), expected)


def test_backward_uses_multiply_signs_if_it_is_faster(kernel):
    """Both gradients use multiply_signs if k is large enough, that of the weight only if the batch is large enough."""
    by_tables = kernel in BY_TABLES
    for k, batch, count in ((40, 100, 0), (300, 100, 2), (300, 4, 1)):
        layer = QLinear(k, 80)
        with Calls() as calls:
            layer(torch.randn(batch, k, requires_grad=True)).sum().backward()
        assert calls.names.count("multiply_signs") == count * by_tables
        assert calls.names.count("unpack_bits") == 2 - count * by_tables
    assert (_kernels.least_sign_outputs() > 2**62) == (not by_tables)


def identity_layer(k=200, n=300, **options):
    layer = QLinear(k, n, input_quantization="identity", **options).eval()
    layer.requires_grad_(False)
    return layer, torch.randn(3, 5, k, dtype=layer.weight.dtype)


def operators_of(layer, x):
    with Calls() as calls:
        y = layer(x)
    return y, [name for name in calls.names if name not in ("pack_bits", "prepare_weight")]


@pytest.mark.parametrize("bias", [False, True])
@dtypes
def test_identity_input_times_sign_weights(kernel, dtype, bias):
    layer, x = identity_layer(dtype=dtype, bias=bias)
    for write in (lambda w: w, torch.Tensor.neg_):
        write(layer.weight)
        y, names = operators_of(layer, x)
        assert names == (["multiply_signs"] if kernel in BY_TABLES else [])
        expected = x.double() @ torch.where(layer.weight < 0, -1.0, 1.0).double().t()
        expected = expected + layer.bias.double() if bias else expected
        precision = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), expected, rtol=precision, atol=precision * 60)


def test_identity_input_is_computed_in_float_if_it_must_be():
    layer, x = identity_layer()
    assert operators_of(layer, x)[1] == ["multiply_signs"] * (_kernels.active_kernel() in BY_TABLES)
    assert operators_of(layer, x.clone().requires_grad_())[1] == []
    assert operators_of(layer.train(), x)[1] == []
    layer.eval().weight.requires_grad_()
    assert operators_of(layer, x)[1] == []
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            y, names = operators_of(layer, x)
        assert names == ["multiply_signs"] * (_kernels.active_kernel() in BY_TABLES) and y.dtype is torch.bfloat16
        with pytest.raises(RuntimeError):
            layer(x.double())
        assert vmap(layer)(x).shape == (3, 5, 300)
        handle = layer.input_quantization.register_forward_hook(lambda *_: torch.zeros(3, 5, 200))
        assert torch.equal(layer(x), layer.bias.expand(3, 5, 300))
        handle.remove()
        assert operators_of(identity_layer(weight_quantization="weightdorefa")[0], x)[1] == []
