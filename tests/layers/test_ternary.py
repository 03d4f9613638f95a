"""Ternary weights: two signs for each weight, computed with bits in inference and in float otherwise."""

import copy
import math

import pytest
import torch
from support.devices import take_kernels_away
from support.reference import FLOATS, assert_equal, epilogue, signs
from torch import nn

from bitorch_qlinear import FusedSequential, PackedQLinear, QLinear, binarize, explain, pack, quantizations, unpack
from bitorch_qlinear.checkpoint import FORMAT, TERNARY_WEIGHT, WEIGHT_RULES

N, K = 37, 300
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
KINDS = {
    "plain": {"weight_quantization": "ternary"},
    "mean": {"weight_quantization": "ternary", "weight_scale": "mean"},
    "learned": {"weight_quantization": "ternary", "weight_scale": "learned"},
    "own": {"weight_quantization": quantizations.Ternary(scale=True)},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def ternary_layer(kind="plain", dtype=torch.float32, **options):
    torch.manual_seed(5)
    layer = QLinear(K, N, dtype=dtype, **copy.deepcopy(KINDS[kind]), **options).eval()
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1, :5] = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-7])
        layer.weight[2, 0], layer.weight[3, 1], layer.weight[4, 2] = math.nan, math.inf, -math.inf
    return layer


def inputs(*leading, dtype=torch.float32):
    x = torch.randn(*leading, K, dtype=torch.float64).to(dtype)
    x.view(-1)[:4] = torch.tensor([0.0, -0.0, math.nan, -math.inf])
    return x


def ternary(weight):
    """Return t and the mean magnitude of what is kept, by the formula, one row after another."""
    wide = weight.detach().to(torch.float64 if weight.dtype is torch.float64 else torch.float32)
    limits = 0.7 * quantizations.row_means(weight.detach())
    rows = [
        [(v > limit) - (v < -limit) for v in row.tolist()] for row, limit in zip(wide, limits.tolist(), strict=True)
    ]
    t = torch.tensor(rows, dtype=torch.float64)
    kept = [row[each != 0].double().abs() for row, each in zip(wide, t, strict=True)]
    return t, torch.stack([row.mean() if len(row) else torch.zeros((), dtype=torch.float64) for row in kept])


@every_dtype
def test_values(dtype):
    weight = ternary_layer(dtype=dtype).weight
    values = quantizations.get_quantization("ternary")(weight)
    t, alpha = ternary(weight)
    assert values.dtype is dtype
    assert_equal(values.detach().double(), t)
    assert {-1.0, 0.0, 1.0} == set(values.unique().tolist())
    assert not t[[0, 2, 3, 4]].any()  # zeros, NaN and both infinities
    scaled = quantizations.Ternary(scale=True)
    assert torch.allclose(scaled.weight_scale(weight).detach().double(), alpha, rtol=1e-5)
    assert_equal(scaled(weight).detach(), t.to(dtype) * scaled.weight_scale(weight).detach().to(dtype)[:, None])


@pytest.mark.parametrize("shape", [(0,), (5,), (3, 0), (0, 3), (2, 3, 4), ()])
@pytest.mark.parametrize("scale", [False, True])
def test_any_shape(shape, scale):
    x = torch.randn(shape)
    assert quantizations.Ternary(scale)(x).shape == shape


def test_gradients_pass_unchanged_and_through_the_scale():
    weight = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 9, dtype=torch.float64)
    (plain,) = torch.autograd.grad(quantizations.Ternary()(weight), weight, grad)
    assert torch.equal(plain, grad)
    (through,) = torch.autograd.grad(quantizations.Ternary(scale=True)(weight), weight, grad)
    t, alpha = ternary(weight)
    expected = alpha[:, None] * grad + t / t.abs().sum(1, keepdim=True) * (grad * t).sum(1, keepdim=True)
    assert torch.allclose(through, expected)


@every_kind
@every_dtype
@pytest.mark.parametrize("input_quantization", ["sign", "steheaviside"])
def test_all_ways_equal_the_reference(kind, dtype, input_quantization, tmp_path):
    layer, x = ternary_layer(kind, dtype, input_quantization=input_quantization), inputs(2, 5, dtype=dtype)
    if kind in ("mean", "learned"):
        with torch.no_grad():
            layer.weight[2:5] = 0.5  # a NaN or infinite mean times 0 would be NaN
            if kind == "learned":
                layer.scale.uniform_(0.1, 2)
    integers = (signs(x, input_quantization == "steheaviside").double() @ ternary(layer.weight)[0].T).long()
    expected = epilogue(integers, layer.bias.detach(), layer.channel_scale(), dtype)
    packed = pack(layer)
    assert type(packed) is PackedQLinear
    assert packed.weight.shape == (2 * N, 10)
    with torch.inference_mode():
        assert_equal(layer(x), expected, "eval")
        assert_equal(packed(x), expected, "packed")
        assert_equal(layer(x.expand(3, 2, 5, K)[:, :, ::2]), expected.expand(3, 2, 5, N)[:, :, ::2], "strided")
    assert_equal(layer.train()(x).detach(), expected, "train")
    assert_equal(packed(x.clone().requires_grad_()).detach(), expected, "packed, with a gradient")
    torch.save(packed.state_dict(), tmp_path / "layer.pt")
    options = {**copy.deepcopy(KINDS[kind]), "input_quantization": input_quantization}
    for device in ("cpu", "meta"):
        fresh = PackedQLinear(K, N, device=device, dtype=dtype, **options)
        fresh.load_state_dict(torch.load(tmp_path / "layer.pt"), assign=device == "meta")
        assert_equal(fresh(x), expected, "reloaded")
    from_float = PackedQLinear(K, N, dtype=dtype, **options)
    from_float.load_state_dict(layer.state_dict())
    assert_equal(from_float(x), expected, "from float weights")
    assert_equal(copy.deepcopy(packed)(x), expected, "copied")
    unpacked = unpack(packed)
    assert_equal(unpacked(x).detach(), expected, "unpacked")
    assert_equal(pack(unpacked)(x), expected, "packed again")


@every_kind
@pytest.mark.parametrize("threshold", [None, 1.0])
def test_gradients_of_a_packed_layer(kind, threshold):
    layer = ternary_layer(kind, gradient_cancellation_threshold=threshold)
    with torch.no_grad():
        layer.weight[2:5] = 0.5
    x, grad = inputs(6), torch.randn(6, N)
    expected, actual = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(expected).backward(grad)
    pack(layer)(actual).backward(grad)
    assert torch.allclose(actual.grad, expected.grad, atol=1e-4)
    if threshold:
        assert not actual.grad[~(x.abs() <= threshold)].any()


def test_gradients_of_training():
    layer, x, grad = ternary_layer("own", torch.float64).train(), inputs(6, dtype=torch.float64), torch.randn(6, N)
    with torch.no_grad():
        layer.weight[:5] = torch.randn(5, K)
    layer(x).backward(grad.double())
    t, alpha = ternary(layer.weight)
    outer = grad.double().T @ signs(x).double()
    expected = alpha[:, None] * outer + t / t.abs().sum(1, keepdim=True) * (outer * t).sum(1, keepdim=True)
    assert torch.allclose(layer.weight.grad, expected)


@every_dtype
def test_without_kernels(dtype, monkeypatch):
    layer, x = ternary_layer(dtype=dtype), inputs(7, dtype=dtype)
    packed = pack(layer)
    with torch.inference_mode():
        expected = packed(x)
    packed.weight_prepared = None
    take_kernels_away(monkeypatch)
    with torch.inference_mode():
        assert_equal(packed(x), expected)
        assert_equal(layer(x), expected)


def test_autocast():
    layer, x = ternary_layer(), inputs(7)
    packed = pack(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
        assert y.dtype is torch.bfloat16
        assert_equal(layer(x).detach(), y)
        assert_equal(layer.train()(x).detach(), y)


def test_compiled():
    layer, x = ternary_layer("own"), inputs(7)
    packed = pack(layer)
    with torch.inference_mode():
        expected = layer(x)
    with torch.no_grad():
        assert_equal(torch.compile(layer, fullgraph=True)(x), expected)
        assert_equal(torch.compile(packed, fullgraph=True)(x), expected)


@pytest.mark.parametrize("input_quantization", ["identity", "inputdorefa"])
def test_other_inputs_are_refused(input_quantization):
    layer = ternary_layer(input_quantization=input_quantization, bias=False)
    assert "expected a sign-like quantization with ternary weights" in explain(layer).layers[0].reason
    assert type(pack(layer)) is QLinear
    with pytest.raises(ValueError, match="expected a sign-like quantization with ternary weights"):
        PackedQLinear(K, N, input_quantization=input_quantization, weight_quantization="ternary")
    x = torch.rand(3, K)
    y = layer(x)  # in float, as before
    assert torch.equal(y, nn.functional.linear(layer.activation(x), layer.weight_quantization(layer.weight)))


def test_two_scales_are_refused():
    for cls in (QLinear, PackedQLinear):
        with pytest.raises(ValueError, match="Ternary has a scale of its own"):
            cls(K, N, weight_quantization=quantizations.Ternary(scale=True), weight_scale="mean")


def test_checkpoints_of_other_weights_are_refused():
    packed, plain = pack(ternary_layer()), pack(QLinear(K, N))
    state = packed.state_dict()
    assert FORMAT == state["format"] == 3
    assert WEIGHT_RULES[TERNARY_WEIGHT] == WEIGHT_RULES[state["weight_rule"]]
    with pytest.raises(RuntimeError, match="expected words of shape"):
        packed.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="expected words of shape"):
        plain.load_state_dict(state)
    state["weight"] = state["weight"][:N]
    with pytest.raises(RuntimeError, match="format: expected 1, got 3"):
        plain.load_state_dict(state)
    state["format"] = torch.tensor(1)
    with pytest.raises(RuntimeError, match="weight_rule: .* got ternary"):
        plain.load_state_dict(state)


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


def test_layers_that_share_a_weight_share_words():
    first, second = ternary_layer("plain"), ternary_layer("own")
    second.weight = first.weight
    packed = pack(nn.ModuleList([first, second, QLinear.from_linear(first_linear(first))]))
    assert packed[0].weight is packed[1].weight
    assert packed[2].weight.shape == (N, 10)


def first_linear(layer):
    linear = nn.Linear(K, N)
    linear.weight = layer.weight
    return linear


def test_binarize_passes_it_on():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    middle = binarize(model, weight_quantization="ternary")[1]
    assert isinstance(middle.weight_quantization, quantizations.Ternary)


@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (1, 1), (3, 32), (300, 700)])
def test_sizes(n, k):
    layer, x = QLinear(k, n, weight_quantization="ternary").eval(), torch.randn(4, k)
    expected = layer.train()(x).detach()
    with torch.inference_mode():
        assert_equal(layer.eval()(x), expected)
        assert_equal(pack(layer)(x), expected)
