"""Ternary weights: two signs for each weight, computed with bits in inference and in float otherwise."""

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.calls import Calls
from support.devices import take_kernels_away
from support.gradients import results
from support.reference import FLOATS, assert_equal, epilogue, pack_signs, signs
from support.round_trips import through_safetensors, through_torch_save
from torch import nn
from torch.func import functional_call, grad, vmap

from bitorch_qlinear import (
    FusedSequential,
    PackedQLinear,
    QLinear,
    _product,
    binarize,
    checkpoint,
    explain,
    pack,
    quantizations,
    unpack,
)
from bitorch_qlinear.checkpoint import FORMAT, TERNARY_WEIGHT, WEIGHT_RULES
from bitorch_qlinear.quantizations import Ternary, kept_means, row_means
from bitorch_qlinear.quantizations import scale as scale_module

N, K = 37, 300
KINDS = {"plain": {}, "mean": {"weight_scale": "mean"}, "learned": {"weight_scale": "learned"}}
BROKEN = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
every_kind = pytest.mark.parametrize("kind", KINDS)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
with_and_without_kernels = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "float"])


def options_of(kind):
    return {"weight_quantization": "ternary", **KINDS[kind]}


def ternary_layer(kind="plain", k=K, n=N, training=False, **options):
    layer = QLinear(k, n, **options_of(kind), **options).train(training)
    with torch.no_grad():
        if n > 4 and k > 5:
            layer.weight[0] = 0
            layer.weight[1, :5] = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-7])
            layer.weight[2] = 0.5  # nothing becomes 0
            layer.weight[3] = torch.tensor([7.0, -7.0, 13.0, -13.0]).repeat(k // 4 + 1)[:k]
        if kind == "learned":
            layer.scale.mul_(torch.randn(n).to(layer.scale.dtype))  # so that the scale is not the weights' mean
    return layer


def inputs(*leading, k=K, dtype=torch.float32):
    x = torch.randn(*leading, k, dtype=torch.float64).to(dtype)
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, math.nan, -math.inf])
    return x


def ternary(weight):
    """Return t and the mean magnitude of what is kept in float64, by the paper's formula, one weight after another."""
    limits = 0.7 * row_means(weight.detach())
    wide = weight.detach().to(limits.dtype)
    rows = [
        [(v > limit) - (v < -limit) for v in row.tolist()] for row, limit in zip(wide, limits.tolist(), strict=True)
    ]
    t = torch.tensor(rows, dtype=torch.float64).reshape(weight.shape)
    kept = [row[each != 0].double().abs() for row, each in zip(wide, t, strict=True)]
    means = [float(row.mean()) if len(row) else 0.0 for row in kept]
    return t, torch.tensor(means, dtype=torch.float64)


def reference(layer, x, dtype=None, strict=False):
    """Return the layer's output from exact integers."""
    integers = (signs(x, strict) @ ternary(layer.weight)[0].T).long()
    bias = None if layer.bias is None else layer.bias.detach()
    return epilogue(integers, bias, layer.channel_scale(), dtype or x.dtype)


def operators_of(function, *args):
    with Calls() as calls:
        function(*args)
    return set(calls.names)


# ---- the quantization ----


@every_dtype
def test_values(dtype):
    weight = ternary_layer(dtype=dtype).weight
    values = quantizations.get_quantization("ternary")(weight)
    t, alpha = ternary(weight)
    assert_equal(values.detach(), t.to(dtype))
    assert set(values.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert kept_means(weight).dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(kept_means(weight).double(), alpha, rtol=1e-6, atol=0)
    assert kept_means(weight)[0] == 0
    with Calls():  # under a mode the values are computed in another way
        assert_equal(Ternary()(weight).detach(), values.detach())


def test_the_limit_and_the_scale_are_those_of_the_paper():
    """They are summed here without any error of rounding, so weights at the limit are left out."""
    weight = torch.randn(20, 333, dtype=torch.float64)
    values, scale = Ternary()(weight), kept_means(weight)
    for row, t, alpha in zip(weight.tolist(), values.tolist(), scale.tolist(), strict=True):
        limit = 0.7 * math.fsum(map(abs, row)) / len(row)
        assert t == [math.copysign(1, w) if abs(w) > limit else 0 for w in row]
        kept = [abs(w) for w in row if abs(w) > limit]
        assert math.isclose(alpha, math.fsum(kept) / len(kept), rel_tol=1e-14)


def test_published_code_gives_the_same():
    """This is how implementations for PyTorch compute Δ, t and α for each filter."""
    weight = torch.randn(9, 64, dtype=torch.float64)
    limit = 0.7 * weight.abs().sum(1) / 64
    pieces = []
    for row, each in zip(weight, limit, strict=True):
        kept = (row.abs() > each).double()
        alpha = (row.abs() @ kept) / kept.sum()
        pieces.append(alpha * ((row > each).double() - (row < -each).double()))
    torch.testing.assert_close(Ternary()(weight) * kept_means(weight)[:, None], torch.stack(pieces))


@every_dtype
def test_a_weight_at_the_limit_becomes_0(dtype):
    weight = torch.tensor([[7.0, 13.0], [-7.0, 13.0], [7.0, -13.0], [-7.0, -13.0]], dtype=dtype)
    assert Ternary()(weight).tolist() == [[0, 1], [0, 1], [0, -1], [0, -1]]
    above = torch.nextafter(weight, 2 * weight)
    above[:, 1] = weight[:, 1]
    limits = 0.7 * row_means(above)
    kept = above[:, 0].abs() > limits
    assert Ternary()(above)[:, 0].abs().tolist() == kept.tolist()
    assert_equal(pack(ternary_of(weight)).unpack().weight.detach(), Ternary()(weight))


def ternary_of(weight, **options):
    layer = QLinear(weight.shape[1], weight.shape[0], dtype=weight.dtype, weight_quantization="ternary", **options)
    layer.weight = nn.Parameter(weight.clone())
    return layer.eval()


@pytest.mark.parametrize("flush", [True, False])
def test_subnormal_weights(flush):
    tiny = torch.tensor([[1e-45, 1e-40, -1e-40, 0.0], [1.5e-38, 1.2e-38, -1.3e-38, 1.4e-38]])
    layer, x = ternary_of(tiny), torch.eye(4)
    try:
        torch.set_flush_denormal(flush)
        values = Ternary()(tiny)
        with torch.inference_mode():
            y, packed = layer(x), pack(layer)
            assert_equal(packed(x), y)
        assert_equal(unpack(packed).weight.detach(), values)
        assert_equal(layer.train()(x).detach(), y)
    finally:
        torch.set_flush_denormal(False)
    if not flush:
        assert values.tolist() == [[0, 1, -1, 0], [1, 1, -1, 1]]


@pytest.mark.parametrize("shape", [(0,), (5,), (3, 0), (0, 3), (2, 3, 4), ()])
def test_any_shape(shape):
    x = torch.randn(shape)
    assert Ternary()(x).shape == shape
    with Calls():
        assert Ternary()(x).shape == shape


def test_gradients_pass_unchanged():
    weight, g = torch.randn(4, 9, dtype=torch.float64, requires_grad=True), torch.randn(4, 9, dtype=torch.float64)
    (ours,) = torch.autograd.grad(Ternary()(weight), weight, g)
    assert torch.equal(ours, g)


@every_dtype
@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)
def test_a_row_that_is_not_finite_becomes_nan(dtype, value):
    weight = torch.randn(300, 500).to(dtype)
    weight[5, 7] = value
    values = Ternary()(weight)
    with Calls():
        assert_equal(Ternary()(weight), values)
    assert values[5].isnan().all()
    assert not values[:5].isnan().any() and not values[6:].isnan().any()
    huge = torch.full((2, 4), 3e38)
    huge[1] = 1
    assert Ternary()(huge).tolist()[1] == [1, 1, 1, 1]
    assert Ternary()(huge)[0].isnan().all()


# ---- values of layers ----


@every_kind
@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("input_quantization", ["sign", "steheaviside"])
def test_all_ways_give_the_same_bits(kind, dtype, bias, input_quantization, monkeypatch):
    layer = ternary_layer(kind, dtype=dtype, bias=bias, input_quantization=input_quantization)
    x = inputs(2, 5, dtype=dtype)
    want = reference(layer, x, strict=input_quantization == "steheaviside")

    def check():
        packed = pack(layer)
        assert type(packed) is PackedQLinear
        for training in (True, False):
            layer.train(training)
            assert_equal(layer(x).detach(), want)
            with torch.no_grad():
                assert_equal(layer(x), want)
        with torch.inference_mode():
            assert_equal(layer(x), want, "inference")
            assert_equal(packed(x), want, "packed, inference")
            assert_equal(packed(x.expand(3, 2, 5, K)[:, :, ::2]), want.expand(3, 2, 5, N)[:, :, ::2], "strided")
        assert_equal(packed(x), want, "packed")
        assert_equal(packed(x.clone().requires_grad_()).detach(), want, "packed, with a gradient")
        assert_equal(packed(x[0, 0]), want[0, 0], "a vector")
        unpacked = unpack(packed)
        assert set(unpacked.weight.unique().tolist()) == {-1, 0, 1}
        assert_equal(unpacked(x).detach(), want, "unpacked")
        assert_equal(pack(unpacked)(x), want, "packed again")
        for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert_equal(copied(x), want, "copied")

    def call_all():
        with torch.no_grad():
            layer.eval()(x)
        pack(layer)(x)

    check()
    assert {"linear", "pack_bits"} <= operators_of(call_all)
    take_kernels_away(monkeypatch)
    check()
    assert not {"linear", "linear_train", "sign_linear"} & operators_of(call_all)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_the_product_is_exact(data):
    n, k, m = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 140)), data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(FLOATS))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    weight = torch.from_numpy(random.integers(-3, 4, (n, k)).astype(np.float64)).to(dtype)
    x = torch.from_numpy(random.integers(-1, 2, (m, k)).astype(np.float64)).to(dtype)
    layer = ternary_of(weight, bias=False)
    # Whole numbers of this size have exact sums, and a limit of 0.7 times a mean is a comparison of integers. (The
    # factor itself is not exact, so ties are left to the layer.)
    total = weight.abs().sum(1, keepdim=True, dtype=torch.float64)
    tie = weight.abs().double() * 10 * k == 7 * total
    t = torch.where(weight.abs().double() * 10 * k > 7 * total, weight.double().sign(), 0)
    t = torch.where(tie, Ternary()(weight).double(), t)
    want = (signs(x) @ t.T).long()
    packed = pack(layer)
    assert_equal(packed.weight, torch.cat([pack_signs(t), pack_signs(t, True)]))
    with torch.no_grad():
        for y in (layer(x), packed(x), packed.double()(x.double())):
            assert_equal(y.long(), epilogue(want, None, None, y.dtype).long())
    assert_equal(layer.train()(x).detach().long(), epilogue(want, None, None, dtype).long())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@every_kind
@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (0, 0), (1, 1), (3, 32), (5, 33), (1, 200), (70, 300)])
@pytest.mark.parametrize("leading", [(), (0,), (4,), (2, 0, 3), (2, 3)], ids=str)
def test_sizes(kind, n, k, leading):
    layer = ternary_layer(kind, k, n)
    x = torch.randn(*leading, k)
    want = reference(layer, x)
    with torch.no_grad():
        assert_equal(layer(x), want)
        assert_equal(pack(layer)(x), want)
    assert_equal(layer(x).detach(), want)
    assert_equal(pack(layer)(x.requires_grad_()).detach(), want)
    layer(x).sum().backward()
    assert all(t.grad.shape == t.shape for t in (x, *layer.parameters()))


@with_and_without_kernels
@both_modes
def test_a_product_of_0_has_no_sign(kernels, training, monkeypatch):
    layer, x = ternary_layer(k=1, n=3, training=training, bias=False), -torch.ones(5, 1)
    layer.weight.data.zero_()
    if not kernels:
        take_kernels_away(monkeypatch)
    for each in (layer, pack(layer), torch.compile(layer, backend="aot_eager")):
        assert not each(x).detach().signbit().any()
        with torch.no_grad():
            assert not each(x).signbit().any()


@every_kind
@both_modes
@with_and_without_kernels
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(kind, training, kernels, amp, monkeypatch):
    layer, x = ternary_layer(kind, training=training), inputs(7)
    packed, want = pack(layer), reference(layer, x, amp)
    if not kernels:
        take_kernels_away(monkeypatch)
    with torch.autocast("cpu", amp):
        for each in (layer, packed):
            assert_equal(each(x).detach(), want)
            with torch.no_grad():
                assert_equal(each(x), want)
        layer(x).nan_to_num().sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in layer.parameters())


@every_kind
@pytest.mark.parametrize(("x_dtype", "dtype"), list(itertools.permutations(FLOATS, 2)), ids=str)
def test_mixed_dtypes(kind, x_dtype, dtype):
    layer, x = ternary_layer(kind, dtype=dtype), inputs(7, dtype=x_dtype)
    want = reference(layer, x)
    assert_equal(pack(layer)(x), want)
    assert_equal(layer(x).detach(), want)
    assert_equal(layer.train()(x).detach(), want)
    with torch.no_grad():
        assert_equal(layer.eval()(x), want)


@pytest.mark.parametrize("strides", ["transposed", "every second", "expanded"])
def test_weights_of_any_strides(strides):
    layer, x = ternary_layer("mean"), inputs(3)
    if strides == "transposed":
        weight = torch.randn(K, N).t()
    elif strides == "every second":
        weight = torch.randn(N, 2 * K)[:, ::2]
    else:
        weight = torch.randn(N, 1).expand(N, K)
    layer.weight = nn.Parameter(weight)
    want = reference(layer, x)
    for each in (layer, pack(layer), layer.train()):
        assert_equal(each(x).detach(), want)
        with torch.no_grad():
            assert_equal(each(x), want)


@pytest.mark.parametrize(("n", "k"), [(130, 4096), (3, 140_001)], ids=str)  # the second has one row in a block
def test_the_number_of_threads_does_not_matter(n, k):
    layer, x = ternary_layer("mean", k, n), torch.randn(70, k)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                results.append((pack(layer).weight, layer(x), kept_means(layer.weight), layer.train()(x)))
                layer.eval()
    finally:
        torch.set_num_threads(before)
    for each in results[1:]:
        for actual, expected in zip(each, results[0], strict=True):
            assert_equal(actual.detach(), expected.detach())
    with Calls():  # not in blocks
        assert_equal(pack(layer).weight, results[0][0])


@with_and_without_kernels
def test_a_k_that_float32_does_not_hold_is_summed_in_float64(kernels, monkeypatch):
    layer, x = ternary_layer(), inputs(7)
    monkeypatch.setattr(_product, "_MOST_IN_FLOAT32", K - 1)
    want, dtypes = reference(layer, x), []
    if kernels:
        entry = _product._linear_entry
        monkeypatch.setattr(_product, "_linear_entry", lambda *a, **o: dtypes.append(o["out_dtype"]) or entry(*a, **o))
    else:
        take_kernels_away(monkeypatch)
        linear = F.linear
        monkeypatch.setattr(F, "linear", lambda x, *a: dtypes.append(x.dtype) or linear(x, *a))
    with torch.no_grad():
        assert_equal(layer(x), want)
        assert_equal(pack(layer)(x), want)
    assert dtypes == [torch.float64] * 2


@pytest.mark.slow
def test_the_greatest_k():
    """2²⁴ is the last K whose products float32 holds; beyond it they are rounded once, and float64 is exact."""
    for k in (2**24, 2**24 + 5):
        layer = QLinear(k, 1, bias=False, dtype=torch.bfloat16, device="meta", weight_quantization="ternary")
        layer = layer.to_empty(device="cpu").eval()
        layer.weight.data.fill_(1)
        layer.weight.data[0, :2] = 0
        x = torch.ones(1, k, dtype=torch.float16)
        packed = pack(layer)
        for integer in (k - 2, k - 4, k - 6):
            want = torch.tensor([[integer]])
            with torch.no_grad():
                assert_equal(packed(x.float()), want.float())
                assert_equal(layer(x.float()), want.float())
            x[0, 2 + (k - 2 - integer) // 2] = -1


# ---- weights that are not finite ----


@every_kind
@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)
@with_and_without_kernels
def test_outputs_show_weights_that_are_not_finite(kind, value, kernels, monkeypatch):
    layer, x = ternary_layer(kind, bias=kind != "mean"), torch.randn(5, K)
    layer.weight.data[9, 3] = value
    others = torch.arange(N) != 9
    want = reference(layer, x)[:, others]
    if not kernels:
        take_kernels_away(monkeypatch)
    for training in (True, False):
        layer.train(training)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                eager, under_a_mode = layer(x).detach(), None
                with Calls():
                    under_a_mode = layer(x).detach()
            for y in (eager, under_a_mode):
                assert y[:, 9].isnan().all()
                assert_equal(y[:, others], want)


@every_kind
def test_weights_that_are_not_finite_are_not_packed(kind):
    layer = ternary_layer(kind)
    good = copy.deepcopy(layer.state_dict())
    layer.weight.data[9, 3] = math.nan
    message = "weight: expected finite values whose magnitudes have a finite sum, .* row 9"
    assert "row 9" in explain(layer).layers[0].reason
    model = nn.Sequential(layer)
    assert type(pack(model)[0]) is QLinear
    with pytest.raises(ValueError, match=message):
        PackedQLinear.from_float(layer)
    packed = PackedQLinear(K, N, **options_of(kind))
    packed.load_state_dict(good)
    x = inputs(3)
    before = packed(x)
    for each, prefix in ((packed, ""), (nn.Sequential(packed), r"0\.")):
        state = {prefix.replace("\\", "") + name: value for name, value in layer.state_dict().items()}
        with pytest.raises(RuntimeError, match=f"{prefix}weight: {message}"):
            each.load_state_dict(state)
    assert_equal(packed(x), before)


# ---- gradients ----


class Straight(torch.autograd.Function):
    """Some values, with an unchanged gradient."""

    @staticmethod
    def forward(ctx, v, values):
        return values.clone()

    @staticmethod
    def backward(ctx, g):
        return g, None


def plain(kind, x, weight, bias, scale, threshold):
    """Return the output of an ordinary float layer whose weights are quantized as the paper and QLinear document it."""
    t, alpha = ternary(weight)
    x = torch.where(x.abs() <= threshold, x, x.detach())
    if kind == "mean":
        quantized = Straight.apply(weight, t * alpha[:, None])
    else:
        quantized = Straight.apply(weight, t)
        quantized = quantized if scale is None else quantized * scale[:, None]
    return F.linear(Straight.apply(x, signs(x.detach())), quantized, bias)


@every_kind
@both_modes
@every_dtype
@with_and_without_kernels
def test_gradients_are_those_of_a_float_layer(kind, training, dtype, kernels, monkeypatch):
    layer = ternary_layer(kind, 45, 7, training, dtype=dtype, gradient_cancellation_threshold=0.9)
    x, g = torch.randn(2, 3, 45).to(dtype).requires_grad_(), torch.randn(2, 3, 7).to(dtype)
    leaves = {"x": x, **dict(layer.named_parameters())}
    # Ternary values are taken from the weight in its own dtype.
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    t = Ternary()(layer.weight.detach())
    assert torch.equal(Ternary()(wide["weight"].detach()).to(dtype), t)
    y = plain(kind, wide["x"], wide["weight"], wide["bias"], wide.get("scale"), torch.tensor(0.9, dtype=dtype).double())
    want = torch.autograd.grad(y, list(wide.values()), g.double())
    if not kernels:
        take_kernels_away(monkeypatch)
    precision = 8 * torch.finfo(dtype).eps
    for ours, wanted, leaf in zip(
        torch.autograd.grad(layer(x), leaves.values(), g), want, leaves.values(), strict=True
    ):
        assert ours.dtype is leaf.dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=precision, atol=50 * precision)
    packed = pack(layer)
    (ours,) = torch.autograd.grad(packed(x), x, g)
    torch.testing.assert_close(ours.double(), want[0], rtol=precision, atol=50 * precision)
    assert not ours[x.abs() > 0.9].any()
    if kind == "learned":
        packed.scale.requires_grad_()
        (ours,) = torch.autograd.grad(packed(x), packed.scale, g)
        torch.testing.assert_close(ours.double(), want[-1 if list(leaves)[-1] == "scale" else 3], rtol=1e-2, atol=0.1)


@every_kind
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "scale"])
def test_frozen_tensors(kind, frozen):
    layer, x, g = ternary_layer(kind, 45, 7, True), torch.randn(3, 45, requires_grad=True), torch.randn(3, 7)
    leaves = {"x": x, **dict(layer.named_parameters())}
    want = dict(zip(leaves, torch.autograd.grad(layer(x), list(leaves.values()), g), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    layer(x).backward(g)
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert_equal(leaf.grad, want[name])


def test_a_learned_scale_begins_as_the_mean_of_what_is_kept():
    linear = nn.Linear(K, N)
    for layer in (
        QLinear(K, N, **options_of("learned")),
        QLinear.from_linear(linear, **options_of("learned")),
        binarize(nn.Sequential(nn.Linear(K, K), nn.Linear(K, N), nn.Linear(N, N)), **options_of("learned"))[1],
    ):
        assert_equal(layer.scale.detach(), kept_means(layer.weight))
        assert (layer.scale > row_means(layer.weight)).all()
    layer = QLinear(K, N, **options_of("learned"))
    layer.reset_parameters()
    assert_equal(layer.scale.detach(), kept_means(layer.weight))


def test_it_learns():
    torch.manual_seed(0)
    x = torch.randn(128, 16).sign()
    y = (x[:, :3].sum(1, keepdim=True) > 0).float()
    model = nn.Sequential(
        QLinear(16, 64, **options_of("mean")), nn.BatchNorm1d(64), QLinear(64, 1, **options_of("mean"))
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(x), y)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        assert ((model(x) > 0) == (y > 0)).float().mean() > 0.9
        assert_equal(pack(model)(x), model(x))


# ---- transforms, torch.compile and torch.export ----


@every_kind
@both_modes
@with_and_without_kernels
def test_transforms(kind, training, kernels, monkeypatch):
    layers = [ternary_layer(kind, 45, 7, training) for _ in range(3)]
    if not kernels:
        take_kernels_away(monkeypatch)
    x, g = torch.randn(4, 45), torch.randn(4, 7)
    names = [name for name, _ in layers[0].named_parameters()]
    parameters = {name: value.detach() for name, value in layers[0].named_parameters()}

    def gradients(layer, x, g):
        return dict(zip(names, torch.autograd.grad(layer(x), list(layer.parameters()), g), strict=True))

    def loss(parameters, x, g):
        return (functional_call(layers[0], parameters, (x,)) * g).sum()

    of_all, each = grad(loss)(parameters, x, g), vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, g)
    for name in names:
        torch.testing.assert_close(of_all[name], gradients(layers[0], x, g)[name])
        for i in range(4):
            torch.testing.assert_close(each[name][i], gradients(layers[0], x[i], g[i])[name])
    stacked = {name: torch.stack([layer.get_parameter(name).detach() for layer in layers]) for name in names}
    ensemble = vmap(lambda p: functional_call(layers[0], p, (x,)))(stacked)
    for i, layer in enumerate(layers):
        assert_equal(ensemble[i].detach(), layer(x).detach())
    packed = pack(layers[0])
    for one in (layers[0], packed):
        assert_equal(vmap(one)(x).detach(), one(x).detach())
        assert_equal(vmap(one, in_dims=1)(x.t()).detach(), one(x).detach())
    per_row = vmap(grad(lambda row, g: (packed(row) * g).sum()))(x, g)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(per_row, torch.autograd.grad(packed(leaf), leaf, g)[0])


def test_an_ensemble_of_packed_layers():
    layers, x = [pack(ternary_layer("learned", 45, 7)) for _ in range(3)], torch.randn(4, 45)
    stacked = {name: torch.stack([layer.get_buffer(name) for layer in layers]) for name in ("weight", "scale")}
    ensemble = vmap(lambda buffers: functional_call(layers[0], buffers, (x,)))(stacked)
    for i, layer in enumerate(layers):
        want = layer(x) - layer.bias + layers[0].bias
        torch.testing.assert_close(ensemble[i], want)


@pytest.mark.usefixtures("fresh_compiler")
@every_kind
@both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(kind, training, dtype, backend):
    layer = ternary_layer(kind, 70, 9, training, gradient_cancellation_threshold=0.9, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 5):
        x, g = torch.randn(rows, 70).to(dtype), torch.randn(rows, 9).to(dtype)
        ours, want = results(compiled, layer, x, g), results(layer, layer, x, g)
        assert_equal(ours[0], want[0])
        for each, wanted in zip(ours[1:], want[1:], strict=True):
            torch.testing.assert_close(each, wanted)
        with torch.no_grad():
            assert_equal(compiled(x), want[0])
    layer.weight.data[6, 1] = math.nan
    with torch.no_grad():
        y = compiled(x)
    assert y[:, 6].isnan().all()
    assert_equal(y[:, :6], want[0][:, :6])


@pytest.mark.usefixtures("fresh_compiler")
@every_kind
@pytest.mark.parametrize("k", [1, 70])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_and_packed(kind, k, backend):
    packed, x = pack(ternary_layer(kind, k, 9)), torch.randn(3, k)
    with torch.no_grad():
        assert_equal(torch.compile(packed, fullgraph=True, backend=backend)(x), packed(x))


@every_kind
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("make", [lambda layer: layer, pack], ids=["QLinear", "PackedQLinear"])
def test_export(kind, strict, make):
    layer = make(ternary_layer(kind, 70, 9)).requires_grad_(False)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(layer, (torch.randn(4, 70),), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file)):
        for rows in (1, 4, 33):
            x = torch.randn(rows, 70)
            assert_equal(each.module()(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_kind
@both_modes
def test_a_traced_layer_asks_for_the_values_of_each_call(kind, training):
    layer, x = ternary_layer(kind, 70, 9, training).requires_grad_(False), torch.randn(3, 70)
    traced = torch.jit.trace(layer, x, check_trace=False)
    layer.weight.copy_(torch.randn(9, 70))
    assert_equal(traced(x), reference(layer, x))
    layer.weight[6, 1] = math.nan
    assert traced(x)[:, 6].isnan().all()


# ---- other quantizations ----


@every_kind
@both_modes
@pytest.mark.parametrize("input_quantization", ["identity", "inputdorefa"])
def test_other_inputs_are_computed_in_float(kind, training, input_quantization):
    layer = ternary_layer(kind, 45, 7, training, input_quantization=input_quantization, dtype=torch.float64)
    x, g = torch.rand(3, 45, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    t, alpha = ternary(layer.weight)
    scale = {"plain": torch.ones(7), "mean": alpha, "learned": layer.scale.detach() if kind == "learned" else None}[
        kind
    ]
    want = F.linear(layer.activation(x), t * scale.double()[:, None], layer.bias)
    torch.testing.assert_close(layer(x), want)
    assert operators_of(layer, x) <= {"pack_bits"}
    (ours,) = torch.autograd.grad(layer(x), layer.weight, g)
    factor = scale[:, None] if kind == "learned" else 1
    torch.testing.assert_close(ours, factor * (g.t() @ layer.activation(x)))
    message = "expected a sign-like quantization with ternary weights"
    assert message in explain(layer).layers[0].reason
    assert type(pack(layer)) is QLinear
    with pytest.raises(ValueError, match=message):
        PackedQLinear(K, N, input_quantization=input_quantization, **options_of(kind))


class Wide(Ternary):
    """A class of the user's own, which may compute anything."""

    name = "wide"

    def quantize(self, x):
        return super().quantize(x) * 2


def hooked():
    quantization = Ternary()
    quantization.register_forward_hook(lambda module, args, output: output * 2)
    return quantization


class Opaque(torch.Tensor):
    """A tensor that no operator takes, like those of other libraries for quantization."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Opaque(args[0])
        raise NotImplementedError(function)


@every_kind
@both_modes
def test_weights_of_an_unknown_class_are_errors(kind, training):
    layer = ternary_layer(kind, 45, 7, training)
    layer.weight = nn.Parameter(Opaque(layer.weight), requires_grad=False)
    with pytest.raises(TypeError, match="weight: expected a plain tensor, got Opaque"):
        layer(torch.randn(3, 45))


def overridden(name):
    quantization = Ternary()
    computed = getattr(quantization, name)
    setattr(quantization, name, lambda x: computed(x) * 2)
    return quantization


@every_kind
@pytest.mark.parametrize("make", [Wide, hooked, lambda: overridden("forward"), lambda: overridden("quantize")])
def test_what_computes_something_else_is_computed_in_float(kind, make):
    layer, x = ternary_layer(kind, 45, 7), torch.randn(3, 45)
    want = layer.bias + 2 * (layer(x) - layer.bias)
    layer.weight_quantization = make()
    assert not operators_of(layer, x)
    torch.testing.assert_close(layer(x), want)
    assert not explain(layer).layers[0].packable
    assert "path=float" in repr(layer)


@both_modes
def test_progressive_sign_inputs(training):
    layer = QLinear(K, N, input_quantization="progressive_sign", weight_quantization="ternary").train(training)
    x = torch.randn(3, K)
    want = F.linear(layer.activation(x), ternary(layer.weight)[0].float(), layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
        if not training:
            assert_equal(pack(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, K - 1), r"x: expected shape \(\.\.\., 300\), got \(2, 299\)"),
        (torch.tensor(1.0), r"x: expected shape \(\.\.\., 300\), got \(\)"),
        (torch.zeros(2, K, dtype=torch.int32), "x: expected float64, float32, float16 or bfloat16, got int32"),
        (torch.zeros(2, K, dtype=torch.complex64), "x: expected float64, .* got complex64: take its real part"),
    ],
)
@both_modes
def test_wrong_inputs_are_errors(x, message, training):
    layer = ternary_layer(training=training)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError, match=message):
            layer(x)
    with pytest.raises(RuntimeError, match="x: expected"):
        pack(layer)(x)


@both_modes
@with_and_without_kernels
@pytest.mark.parametrize("make", [lambda layer: layer, pack], ids=["QLinear", "PackedQLinear"])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (8,)], ids=str)
@pytest.mark.parametrize("name", ["scale", "bias"])
def test_a_scale_and_a_bias_are_not_broadcast(name, shape, make, kernels, training, monkeypatch):
    layer, x = make(ternary_layer("learned", 45, 7, training)), torch.randn(3, 45)
    if not kernels:
        take_kernels_away(monkeypatch)
    is_buffer = type(layer) is PackedQLinear and name == "scale"
    setattr(layer, name, torch.ones(shape) if is_buffer else nn.Parameter(torch.ones(shape), requires_grad=False))
    for each in (x, x.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match=rf"{name}: expected shape \(7,\), got "):
            layer(each)


@with_and_without_kernels
def test_words_of_another_number_of_outputs_are_errors(kernels, monkeypatch):
    if not kernels:
        take_kernels_away(monkeypatch)
    packed = pack(ternary_layer(k=45, n=8, bias=False))
    packed.weight = packed.weight[:8]
    with pytest.raises(RuntimeError, match=r"weight: expected words of shape \(16, 2\), two rows for each output, got"):
        packed(torch.randn(3, 45))


def test_nested_and_sparse_inputs():
    layer, x = ternary_layer(), torch.randn(5, K)
    packed = pack(layer)
    for each in (layer, packed):
        assert_equal(each(x.to_sparse()).detach(), each(x).detach())
        nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
        assert_equal(each(nested).values().detach(), each(x).detach())


# ---- packed layers and their checkpoints ----


@every_kind
@every_dtype
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
@pytest.mark.parametrize("through", [through_torch_save, through_safetensors])
def test_round_trip(kind, dtype, assign, through, tmp_path):
    layer, x = ternary_layer(kind, dtype=dtype), inputs(3, dtype=dtype)
    packed = pack(layer)
    state = through(packed.state_dict(), tmp_path / "model")
    assert int(state["format"]) == FORMAT == 3
    assert WEIGHT_RULES[state["weight_rule"]] == WEIGHT_RULES[TERNARY_WEIGHT]
    assert state["weight"].shape == (2 * N, 10)
    with torch.device("meta" if assign else "cpu"):
        other = PackedQLinear(K, N, dtype=dtype, **options_of(kind))
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert_equal(other(x), packed(x))
    floats = through(layer.state_dict(), tmp_path / "floats")
    other = PackedQLinear(K, N, dtype=dtype, **options_of(kind))
    other.load_state_dict(floats, assign=assign)
    assert_equal(other(x), reference(layer, x))
    fresh = QLinear(K, N, dtype=dtype, **options_of(kind)).eval()
    fresh.load_state_dict(floats, assign=assign)
    assert_equal(fresh(x).detach(), reference(layer, x))


def test_whole_modules_are_loaded(tmp_path):
    for kind in KINDS:
        layer, x = ternary_layer(kind), inputs(3)
        for each in (layer, pack(layer)):
            torch.save(each, tmp_path / "model.pt")
            loaded = torch.load(tmp_path / "model.pt", weights_only=True)
            assert_equal(loaded(x).detach(), reference(layer, x))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_moved_and_cast_layers(kind, dtype):
    layer, x = ternary_layer(kind), inputs(3)
    packed = pack(layer)
    integers = (signs(x) @ ternary(layer.weight)[0].T).long()
    cast = copy.deepcopy(packed).to(dtype)
    assert cast.weight.dtype is torch.int32
    assert_equal(cast(x.to(dtype)), epilogue(integers, layer.bias.detach().to(dtype), layer.channel_scale(), dtype))
    assert packed.to("meta")(torch.empty(3, K, device="meta")).shape == (3, N)
    assert layer.to("meta")(torch.empty(3, K, device="meta")).shape == (3, N)


@every_kind
def test_the_default_device_does_not_matter(kind):
    layer, x = ternary_layer(kind), inputs(3)
    results = []
    with torch.device("meta"):
        packed = pack(layer)
        for each in (layer, packed):
            for training in (True, False):
                each.train(training)
                for enabled in (True, False):
                    with torch.set_grad_enabled(enabled):
                        results.append(each(x).detach())
    for y in results:
        assert_equal(y, reference(layer, x))


def test_words_that_are_written_later_are_used():
    first, second = ternary_layer("mean", 1024, 64), ternary_layer("mean", 1024, 64)
    x, packed, other = torch.randn(3, 1024), pack(first), pack(second)
    assert packed.weight_prepared is not None
    assert_equal(packed(x), reference(first, x))
    packed.weight.copy_(other.weight)
    for each in (packed, copy.deepcopy(packed)):
        each.scale, each.bias = other.scale, other.bias
        for _ in range(2):
            assert_equal(each(x), reference(second, x))
    packed.load_state_dict(first.state_dict())
    assert_equal(packed(x), reference(first, x))
    with torch.no_grad():
        first.weight.neg_()
        assert_equal(first(x), reference(first, x))


def test_checkpoints_of_other_weights_are_refused():
    packed, plain = pack(ternary_layer()), pack(QLinear(K, N))
    state = packed.state_dict()
    why = r"expected words of shape \({}, 10\), got \({}, 10\): ternary weights have two rows of words"
    with pytest.raises(RuntimeError, match=why.format(74, 37)):
        packed.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=why.format(37, 74)):
        plain.load_state_dict(state)
    state["weight"] = state["weight"][:N]
    with pytest.raises(RuntimeError, match="format: expected 1, got 3"):
        plain.load_state_dict(state)
    state["format"] = torch.tensor(1)
    with pytest.raises(RuntimeError, match=r"weight_rule: .* got ternary"):
        plain.load_state_dict(state)
    twice = pack(QLinear(K, 2 * N, bias=False)).state_dict()
    with pytest.raises(RuntimeError, match="format: expected 3, got 1"):
        pack(ternary_layer(bias=False)).load_state_dict(twice)


def test_a_reader_that_does_not_know_the_format_says_so(monkeypatch):
    state = pack(ternary_layer()).state_dict()
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    for layer in (PackedQLinear(K, N), PackedQLinear(K, N, weight_scale="mean")):
        with pytest.raises(
            RuntimeError, match="format: expected a checkpoint of format 1 to 2, got 3: a newer bitorch"
        ):
            layer.load_state_dict(state | ({"scale": torch.ones(N)} if layer.weight_scale else {}))


@every_kind
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_words_that_nothing_says_to_be_ternary_are_refused(kind, strict, assign):
    """The signs of twice the outputs have the same shape, and older checkpoints do not say what their words are."""
    packed, x = pack(ternary_layer(kind, bias=False)), inputs(3)
    y, state = packed(x), packed.state_dict()
    state["weight"] = pack(QLinear(K, 2 * N, bias=False)).weight
    for name in ("format", "input_rule", "weight_rule"):
        del state[name]
    with pytest.raises(RuntimeError, match="weight_rule: expected the entry that says that the weights are ternary"):
        packed.load_state_dict(state, strict=strict, assign=assign)
    assert_equal(packed(x), y)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_fused_chains_leave_it_out(place):
    torch.manual_seed(0)
    names = ["ternary" if i == place else "sign" for i in range(3)]
    layers = [QLinear(64, 64, weight_quantization=name) for name in names]
    model = nn.Sequential(nn.BatchNorm1d(64), layers[0], nn.BatchNorm1d(64), layers[1], nn.Hardtanh(), layers[2]).eval()
    fused, x = pack(model, fuse=True), torch.randn(9, 64)
    assert isinstance(fused, FusedSequential)
    with torch.inference_mode():
        for _ in range(3):
            assert_equal(fused(x), pack(model)(x))
    assert "ternary" in " ".join(layer.input + layer.output for layer in explain(fused))


def test_reports():
    layer = ternary_layer()
    packed = pack(layer)
    assert "ternary weights" in layer.path
    assert "ternary weights" in repr(packed)
    assert explain(layer).layers[0].packed_bytes == explain(packed).layers[0].packed_bytes == 4 * 2 * N * 10
    assert explain(layer).layers[0].packable


def test_layers_that_share_a_weight_share_words():
    first, second = ternary_layer("plain"), ternary_layer("mean")
    linear = nn.Linear(K, N)
    second.weight = linear.weight = first.weight
    packed = pack(nn.ModuleList([first, second, QLinear.from_linear(linear)]))
    assert packed[0].weight is packed[1].weight
    assert packed[2].weight.shape == (N, 10)
    unpacked = unpack(packed)
    assert unpacked[0].weight is unpacked[1].weight
    assert unpacked[2].weight is not unpacked[0].weight
    x = inputs(3)
    for each, source in zip(unpacked, (first, second), strict=False):
        assert_equal(each(x).detach(), reference(source, x))


def test_parametrized_weights():
    layer, x = ternary_layer("mean"), inputs(3)
    layer.weight.data[0] = 1  # weight_norm makes NaN of a row of zeros
    nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data.mul_(2)
    want = reference(layer, x)
    with torch.no_grad():
        assert_equal(layer(x), want)
    assert_equal(layer.train()(x).detach(), want)


def test_blocks_do_not_matter(monkeypatch):
    layer = ternary_layer("mean")
    words, values = pack(layer).weight, Ternary()(layer.weight)
    means = kept_means(layer.weight)
    monkeypatch.setattr(scale_module, "_BLOCK", 2 * K)
    assert_equal(pack(layer).weight, words)
    assert_equal(kept_means(layer.weight), means)
    assert_equal(Ternary()(layer.weight).detach(), values.detach())
