"""A scale for each output channel: values, gradients, packing and checkpoints of XNOR-Net's α and of learned scales."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.calls import Calls
from support.devices import take_kernels_away
from support.gradients import results
from support.reference import assert_equal, linear_reference, signs
from support.round_trips import through_safetensors, through_torch_save
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, vmap

from bitorch_qlinear import (
    BinaryQuantization,
    PackedQLinear,
    QLinear,
    binarize,
    explain,
    explain_binarize,
    pack,
    quantizations,
    unpack,
)
from bitorch_qlinear.quantizations import BinaryRule, mean_magnitude, row_means

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
K, N = 70, 400  # this is enough words for a packed layer to keep their prepared form

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class MedianSign(BinaryQuantization):
    """Signs times the median magnitude of each row, with a mask of its own."""

    name = "median-sign"

    def rule(self):
        return BinaryRule(strict=True, limit=0.1)

    def weight_scale(self, weight):
        return weight.abs().median(-1).values


KINDS = {
    "mean": {"weight_scale": "mean"},
    "learned": {"weight_scale": "learned"},
    "own": {"weight_quantization": MedianSign()},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def layer_like(kind, k=K, n=N, training=False, **options):
    layer = QLinear(k, n, **{**copy.deepcopy(KINDS[kind]), **options}).train(training)
    layer.weight.data.flatten()[::7] = 0.0  # the sign rules differ at 0
    if kind == "learned":
        layer.scale.data.mul_(torch.randn(n).to(layer.scale.dtype))  # so that the scale is not the weights' mean
    return layer


def inputs(*shape, dtype=torch.float32):
    x = torch.randn(*shape, dtype=torch.float64).to(dtype)
    x.flatten()[:3] = torch.tensor([0.0, -0.0, torch.nan])
    return x


def is_strict(layer):
    return isinstance(layer.weight_quantization, MedianSign)


def expected(layer, x, out_dtype=None):
    bias = None if layer.bias is None else layer.bias.detach()
    weight = layer.weight.detach()
    return linear_reference(x, weight, bias, layer.channel_scale(), out_dtype, strict_w=is_strict(layer))


# ---- the scale ----


@every_dtype
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 45), (300, 1000), (3, 70_001), (1, 300_000), (2, 0), (0, 5)], ids=str)
def test_mean_magnitude(n, k, dtype):
    weight = torch.randn(n, k, dtype=dtype)
    means = mean_magnitude(weight)
    assert means.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    want = weight.double().abs().sum(1) / max(k, 1)
    torch.testing.assert_close(means.double(), want, rtol=4 * torch.finfo(means.dtype).eps, atol=0)


def test_mean_magnitude_depends_on_the_values_alone(threads):
    for n, k in ((1, 300_000), (3, 70_001), (257, 1031), (5, 4)):
        weight = torch.randn(n, k)
        torch.set_num_threads(1)
        want = row_means(weight)
        for count in (2, 5):
            torch.set_num_threads(count)
            assert_equal(row_means(weight), want)
        assert_equal(row_means(weight.t().contiguous().t()), want)
        assert_equal(row_means(weight.repeat_interleave(2, 1)[:, ::2]), want)
        for i in range(min(n, 4)):  # a row does not depend on the other ones
            assert_equal(row_means(weight[i : i + 1]), want[i : i + 1])


def test_kinds_that_do_not_exist_or_exclude_each_other():
    for make in (QLinear, PackedQLinear):
        with pytest.raises(ValueError, match="weight_scale: expected None, 'mean' or 'learned', got 'median'"):
            make(K, N, weight_scale="median")
        with pytest.raises(ValueError, match="weight_scale: expected None, because MedianSign has a scale of its own"):
            make(K, N, weight_quantization=MedianSign(), weight_scale="mean")


@every_dtype
def test_a_learned_scale_begins_as_the_mean(dtype):
    layer = QLinear(K, N, dtype=dtype, weight_scale="learned")
    assert dict(layer.named_parameters()).keys() == {"weight", "bias", "scale"}
    assert_equal(layer.scale.detach(), row_means(layer.weight).to(dtype))
    before = layer.scale.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.scale, before)
    assert_equal(layer.scale.detach(), row_means(layer.weight).to(dtype))
    linear = nn.Linear(K, N, dtype=dtype)
    assert_equal(QLinear.from_linear(linear, weight_scale="learned").scale.detach(), row_means(linear.weight).to(dtype))
    made = nn.utils.skip_init(QLinear, K, N, weight_scale="learned", dtype=dtype)
    made.reset_parameters()
    assert_equal(made.scale.detach(), row_means(made.weight).to(dtype))


def test_without_a_scale_nothing_changes():
    layer = QLinear(K, N)
    assert dict(layer.named_parameters()).keys() == {"weight", "bias"}
    assert layer.channel_scale() is None
    assert "scale" not in repr(layer)
    assert "scale" not in repr(pack(layer))
    assert "scale" not in pack(layer).state_dict()
    assert "weight_scale='mean'" in repr(QLinear(K, N, weight_scale="mean"))


# ---- values ----


@every_kind
@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("input_quantization", ["sign", "steheaviside"])
def test_all_ways_give_the_same_bits(kind, dtype, bias, input_quantization, monkeypatch):
    layer = layer_like(kind, dtype=dtype, bias=bias, input_quantization=input_quantization)
    x = inputs(3, K, dtype=dtype)
    strict = input_quantization == "steheaviside"
    want = linear_reference(
        x,
        layer.weight.detach(),
        layer.bias.detach() if bias else None,
        layer.channel_scale(),
        strict_x=strict,
        strict_w=is_strict(layer),
    )

    def check():
        packed = pack(layer)
        for training in (True, False):
            layer.train(training)
            assert_equal(layer(x).detach(), want)
            with torch.no_grad():
                assert_equal(layer(x), want)
        assert_equal(packed(x), want)
        assert_equal(packed(x.clone().requires_grad_()).detach(), want)
        assert_equal(pack(layer)(x), want)
        assert_equal(unpack(packed)(x).detach(), want)

    with Calls() as calls:
        check()
    assert {"linear_train", "sign_linear", "linear"} <= set(calls.names)
    take_kernels_away(monkeypatch)
    with Calls() as calls:
        check()
    assert not {"linear_train", "sign_linear", "linear"} & set(calls.names)


@every_kind
@both_modes
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "float"])
def test_autocast(kind, training, amp, kernels, monkeypatch):
    layer, x = layer_like(kind, training=training), inputs(3, K)
    packed = pack(layer)
    if not kernels:
        take_kernels_away(monkeypatch)
    with torch.autocast("cpu", dtype=amp):
        for each in (layer, packed):
            assert_equal(each(x).detach(), expected(layer, x, amp))
            with torch.no_grad():
                assert_equal(each(x), expected(layer, x, amp))
        layer(x).sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in layer.parameters())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("kind", "k", "n"),
    # The quantization that is called own takes a median, and no values have none.
    [(kind, k, n) for kind in KINDS for k, n in [(1, 1), (45, 7), (0, 3), (3, 0)] if kind != "own" or k],
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_shapes(kind, k, n, shape):
    layer = layer_like(kind, k, n, training=True)
    x = torch.randn(*shape, k, requires_grad=True)
    y = layer(x)
    assert_equal(y.detach(), expected(layer, x.detach()))
    y.sum().backward()
    assert all(t.grad.shape == t.shape for t in (x, *layer.parameters()))
    assert_equal(pack(layer)(x.detach()), y.detach())


@pytest.mark.parametrize("kind", ["mean", "learned"])
@pytest.mark.parametrize("input_quantization", ["identity", "inputdorefa"])
@pytest.mark.parametrize("weight_quantization", ["sign", "steheaviside", "weightdorefa", "identity"])
@both_modes
def test_other_quantizations_are_scaled_in_float(kind, input_quantization, weight_quantization, training):
    options = {"input_quantization": input_quantization, "weight_quantization": weight_quantization}
    layer = layer_like(kind, training=training, dtype=torch.float64, **options)
    x = torch.randn(65, K, dtype=torch.float64, requires_grad=True)
    weight, scale = layer.weight, layer.channel_scale()
    quantized = layer.weight_quantization(weight) * scale[:, None]
    want = F.linear(layer.input_quantization(x), quantized, layer.bias)
    torch.testing.assert_close(layer(x), want)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
        if input_quantization == "identity" and weight_quantization != "identity":
            packed = pack(layer)
            assert isinstance(packed, PackedQLinear)
            torch.testing.assert_close(packed(x), want)


@every_dtype
def test_real_inputs_with_packed_weights(dtype):
    layer = layer_like("own", dtype=dtype, input_quantization="identity")
    x = torch.randn(3, K, dtype=dtype)
    packed = pack(layer)
    with torch.no_grad(), Calls() as calls:
        y = layer(x)
    assert calls.names in (["pack_bits", "multiply_signs"], [])
    assert_equal(packed(x), y)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    want = (x.double() @ signs(layer.weight.detach(), True).T) * layer.channel_scale() + layer.bias.detach()
    torch.testing.assert_close(
        y.double(), want.double(), rtol=4 * torch.finfo(dtype).eps, atol=1e-2 if dtype != wide else 1e-4
    )


# ---- gradients ----


class Straight(torch.autograd.Function):
    """The sign, with an unchanged gradient."""

    @staticmethod
    def forward(ctx, v):
        return signs(v).to(v.dtype)

    @staticmethod
    def backward(ctx, g):
        return g


def plain(x, weight, bias, scale, threshold):
    """Return the output of an ordinary float layer with the weights scale · sign(w)."""
    x = torch.where(x.abs() <= threshold, x, x.detach())
    return F.linear(Straight.apply(x), Straight.apply(weight) * scale[:, None], bias)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "float"])
@both_modes
@every_dtype
@pytest.mark.parametrize("kind", ["mean", "learned"])
def test_gradients_are_those_of_a_float_layer(kind, dtype, training, kernels, monkeypatch):
    layer = QLinear(45, 7, dtype=dtype, gradient_cancellation_threshold=0.9, **KINDS[kind]).train(training)
    x, g = torch.randn(2, 3, 45, dtype=dtype, requires_grad=True), torch.randn(2, 3, 7).to(dtype)
    leaves = [x, *layer.parameters()]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    named = dict(zip(["x", *dict(layer.named_parameters())], wide, strict=True))
    scale = named["scale"] if kind == "learned" else named["weight"].abs().mean(1)
    want = torch.autograd.grad(plain(named["x"], named["weight"], named["bias"], scale, 0.9), wide, g.double())
    if not kernels:
        take_kernels_away(monkeypatch)
    for ours, wanted, leaf in zip(torch.autograd.grad(layer(x), leaves, g), want, leaves, strict=True):
        assert ours.dtype is leaf.dtype
        precision = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.double(), wanted, rtol=precision, atol=50 * precision)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "float"])
def test_the_gradient_of_xnor_net(kernels, monkeypatch):
    """It is that of XNOR-Net-PyTorch's updateBinaryGradWeight without the factor K - 1; the mask is steheaviside's."""
    layer = QLinear(45, 7, dtype=torch.float64, weight_scale="mean", weight_quantization="steheaviside")
    nn.init.normal_(layer.weight)
    x, g = torch.randn(3, 45, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    weight = layer.weight.detach()
    of_binary = g.T @ signs(x)
    alpha = weight.abs().mean(1, keepdim=True)
    through_alpha = (of_binary * signs(weight)).mean(1, keepdim=True)
    want = alpha * of_binary * (weight.abs() <= 1) + signs(weight) * through_alpha
    if not kernels:
        take_kernels_away(monkeypatch)
    (ours,) = torch.autograd.grad(layer(x), layer.weight, g)
    torch.testing.assert_close(ours, want)
    assert (weight.abs() > 1).any()


@pytest.mark.parametrize("name", ["sign", "steheaviside"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "float"])
def test_the_sign_of_a_weight_of_zero(name, kernels, monkeypatch):
    layer = QLinear(3, 1, bias=False, weight_scale="mean", weight_quantization=name)
    layer.weight.data = torch.tensor([[0.0, 3.0, 3.0]])
    if not kernels:
        take_kernels_away(monkeypatch)
    y = layer(torch.ones(1, 3))
    y.backward()
    zero = 1.0 if name == "sign" else -1.0
    assert y.item() == 2 * (zero + 2)
    through_alpha = torch.tensor(zero + 2) / 3  # dL/dα = s(x) · s(W), divided by K
    beyond = 2.0 if name == "sign" else 0.0  # 3.0 is beyond the limit of steheaviside
    want = torch.stack([2 + zero * through_alpha, beyond + through_alpha, beyond + through_alpha])
    torch.testing.assert_close(layer.weight.grad, want[None])


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "float"])
def test_gradients_of_a_quantization_with_a_scale_of_its_own(kernels, monkeypatch):
    layer = layer_like("own", 45, 7, training=True, dtype=torch.float64)
    x, g = torch.randn(3, 45, dtype=torch.float64, requires_grad=True), torch.randn(3, 7, dtype=torch.float64)
    leaves = [x, layer.weight, layer.bias]
    want = torch.autograd.grad(
        F.linear(Straight.apply(x), layer.weight_quantization(layer.weight), layer.bias), leaves, g
    )
    if not kernels:
        take_kernels_away(monkeypatch)
    for ours, wanted in zip(torch.autograd.grad(layer(x), leaves, g), want, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_a_large_weight_gets_the_same_gradient_as_a_small_one():
    """The part through α is added in blocks, of which this weight has several."""
    layer = QLinear(1500, 1031, bias=False, weight_scale="mean")
    x, g = torch.randn(3, 1500), torch.randn(3, 1031)
    (ours,) = torch.autograd.grad(layer(x), layer.weight, g)
    for rows in (slice(0, 40), slice(500, 540), slice(1000, 1031)):
        part = QLinear(1500, 40, bias=False, weight_scale="mean")
        part.weight = nn.Parameter(layer.weight.detach()[rows].clone())
        (want,) = torch.autograd.grad(part(x), part.weight, g[:, rows])
        torch.testing.assert_close(ours[rows], want)


@every_kind
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "scale"])
def test_frozen_tensors(kind, frozen):
    layer, x = layer_like(kind, 45, 7, training=True), torch.randn(3, 45, requires_grad=True)
    leaves = {"x": x, **dict(layer.named_parameters())}
    g = torch.randn(3, 7)
    want = dict(zip(leaves, torch.autograd.grad(layer(x), list(leaves.values()), g), strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    layer(x).backward(g)
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert_equal(leaf.grad, want[name])


@every_kind
def test_saved_tensors(kind):
    layer, saved = layer_like(kind, training=True), []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(64, K, requires_grad=True))
    floats = [tensor for tensor in saved if tensor.is_floating_point() and tensor.dim() > 1]
    if kind != "own":  # its limit needs the weight, and so does the derivative of its scale
        assert floats == []
    assert all(tensor.data_ptr() == layer.weight.data_ptr() or tensor.shape[-1] != K for tensor in floats)


@every_kind
@both_modes
def test_second_derivatives_and_forward_mode_are_errors(kind, training):
    layer, x = layer_like(kind, 45, 7, training=training), torch.randn(3, 45, requires_grad=True)
    for target in (x, *layer.parameters()):
        (first,) = torch.autograd.grad(layer(x).square().sum(), target, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable only once"):
            first.sum().backward()
    if kind == "learned":  # the gradients of a linear loss depend on the scale
        for target in (x, layer.weight):
            (first,) = torch.autograd.grad(layer(x).sum(), target, create_graph=True)
            with pytest.raises(RuntimeError, match="differentiable only once"):
                torch.autograd.grad(first.sum(), layer.scale)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        layer(forward_ad.make_dual(x.detach(), x.detach()))


@every_kind
@both_modes
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "float"])
def test_transforms(kind, training, kernels, monkeypatch):
    layers = [layer_like(kind, 45, 7, training=training) for _ in range(3)]
    if not kernels:
        take_kernels_away(monkeypatch)
    x, g = torch.randn(4, 45), torch.randn(4, 7)

    def gradients(layer, x, g):
        return dict(zip(names, torch.autograd.grad(layer(x), list(layer.parameters()), g), strict=True))

    names = [name for name, _ in layers[0].named_parameters()]
    parameters = {name: value.detach() for name, value in layers[0].named_parameters()}

    def loss(parameters, x, g):
        return (functional_call(layers[0], parameters, (x,)) * g).sum()

    of_all, each = grad(loss)(parameters, x, g), vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, g)
    for name in names:
        torch.testing.assert_close(of_all[name], gradients(layers[0], x, g)[name])
        for i in range(4):
            torch.testing.assert_close(each[name][i], gradients(layers[0], x[i], g[i])[name])
    stacked = {name: torch.stack([layer.get_parameter(name).detach() for layer in layers]) for name in names}
    ensemble = vmap(lambda p: functional_call(layers[0], p, (x,)))(stacked)
    of_ensemble = vmap(grad(loss), in_dims=(0, None, None))(stacked, x, g)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(ensemble[i], layer(x), rtol=0, atol=1e-5)
        for name in names:
            torch.testing.assert_close(of_ensemble[name][i], gradients(layer, x, g)[name])
    torch.testing.assert_close(vmap(layers[0])(x), layers[0](x))


def test_gradients_of_a_packed_layer():
    for kind in KINDS:
        layer = layer_like(kind, gradient_cancellation_threshold=0.4)
        packed, g = pack(layer), torch.randn(3, N)
        gradients = []
        for each in (layer, packed):
            x = inputs(3, K).nan_to_num().requires_grad_()
            torch.manual_seed(1)
            leaf = torch.randn(3, K, requires_grad=True)
            each(leaf).backward(g)
            gradients.append(leaf.grad)
            assert x.grad is None
        torch.testing.assert_close(*gradients)
        packed.scale.requires_grad_()
        packed(X := torch.randn(3, K)).backward(g)
        want = (g * (packed(X).detach() - packed.bias) / packed.scale.detach()).sum(0)
        torch.testing.assert_close(packed.scale.grad, want, rtol=1e-4, atol=1e-3)


# ---- torch.compile and torch.export ----


@pytest.mark.usefixtures("fresh_compiler")
@every_kind
@both_modes
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(kind, training, backend):
    layer = layer_like(kind, 70, 9, training=training, gradient_cancellation_threshold=0.9)
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 5):
        x, g = torch.randn(rows, 70), torch.randn(rows, 9)
        ours, want = results(compiled, layer, x, g), results(layer, layer, x, g)
        assert_equal(ours[0], want[0])
        for each, wanted in zip(ours[1:], want[1:], strict=True):
            torch.testing.assert_close(each, wanted)
        with torch.no_grad():
            assert_equal(compiled(x), want[0])


@pytest.mark.usefixtures("fresh_compiler")
@every_kind
def test_compiled_and_packed(kind):
    packed, x = pack(layer_like(kind, 70, 9)), torch.randn(3, 70)
    with torch.no_grad():
        assert_equal(torch.compile(packed, fullgraph=True)(x), packed(x))


@every_kind
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("make", [lambda layer: layer, pack], ids=["QLinear", "PackedQLinear"])
def test_export(kind, strict, make):
    layer = make(layer_like(kind, 70, 9)).requires_grad_(False)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(layer, (torch.randn(4, 70),), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file)):
        for rows in (1, 4, 33):
            x = torch.randn(rows, 70)
            assert_equal(each.module()(x), layer(x))


# ---- quantizations of the user's own ----


def test_values_of_a_quantization_with_a_scale():
    quantization, weight = MedianSign(), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    values = quantization(weight)
    assert_equal(values.detach(), signs(weight.detach(), True) * weight.detach().abs().median(1, keepdim=True).values)
    values.sum().backward()
    assert quantizations.binary_rule(quantization) is None


class Halved(MedianSign):
    def quantize(self, x):
        return super().quantize(x) / 2


class Late(MedianSign):
    def forward(self, x):
        return super().forward(x) / 2


def hooked():
    quantization = MedianSign()
    quantization.register_forward_hook(lambda module, args, output: output / 2)
    return quantization


def patched():
    quantization = MedianSign()
    quantization.forward = lambda x: MedianSign.quantize(quantization, x) / 2
    return quantization


@both_modes
@pytest.mark.parametrize("make", [Halved, Late, hooked, patched])
def test_what_computes_something_else_is_computed_in_float(make, training):
    layer, x = layer_like("own", weight_quantization=make(), training=training), torch.randn(3, K)
    with Calls() as calls:
        y = layer(x)
    assert calls.names == []
    want = F.linear(signs(x).float(), layer.weight_quantization(layer.weight), layer.bias)
    assert_equal(y.detach(), want.detach())
    assert not explain(layer).layers[0].packable
    assert "path=float" in repr(layer)


def test_a_quantization_with_a_scale_is_no_input_quantization():
    layer, x = QLinear(K, N, input_quantization=MedianSign()), torch.randn(3, K)
    with Calls() as calls:
        y = layer(x)
    assert calls.names == []
    torch.testing.assert_close(y, F.linear(MedianSign()(x), signs(layer.weight.detach()).float(), layer.bias))
    assert "input_quantization: expected a sign-like quantization" in explain(layer).layers[0].reason


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda w: w.abs().mean(1, keepdim=True), r"torch.float32 \(400, 1\)"),
        (lambda w: w.abs().mean(), r"torch.float32 \(\)"),
        (lambda w: (w > 0).sum(1), r"torch.int64 \(400,\)"),
        (lambda w: 1.0, "float"),
    ],
)
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "float"])
def test_a_wrong_scale_is_refused(wrong, got, kernels, monkeypatch):
    class Wrong(MedianSign):
        def weight_scale(self, weight):
            return wrong(weight)

    layer, message = QLinear(K, N, weight_quantization=Wrong()), rf"Wrong.weight_scale: expected floats of .*got {got}"
    if not kernels:
        take_kernels_away(monkeypatch)
    for call in (layer, lambda x: PackedQLinear.from_float(layer), lambda x: layer.weight_quantization(layer.weight)):
        with pytest.raises(ValueError, match=message):
            call(torch.randn(3, K))


def test_two_scales_at_once_are_computed_in_float():
    layer, x = layer_like("mean", training=True), torch.randn(3, K)
    layer.weight_quantization = MedianSign()
    with Calls() as calls:
        y = layer(x)
    assert calls.names == []
    weight = layer.weight_quantization(layer.weight) * row_means(layer.weight)[:, None]
    torch.testing.assert_close(y, F.linear(signs(x).float(), weight, layer.bias))
    assert "has a scale of its own" in explain(layer).layers[0].reason
    assert type(pack(layer)) is QLinear


class Derived(quantizations.SwishSign):
    pass


class Clipped(BinaryQuantization):
    name = "clipped"

    def rule(self):
        return BinaryRule(limit=0.5)


@pytest.mark.parametrize("cls", [Derived, Clipped])
def test_a_rule_of_the_users_own_is_packed_on_both_sides(cls):
    layer, x = QLinear(K, N, input_quantization=cls(), weight_quantization=cls()), torch.randn(3, K)
    with Calls() as calls:
        y = layer(x)
    assert "linear_train" in calls.names
    assert_equal(y.detach(), linear_reference(x, layer.weight.detach(), layer.bias.detach()))
    assert_equal(pack(layer)(x), y.detach())


# ---- packed layers and their checkpoints ----


def packed_options(kind):
    return copy.deepcopy(KINDS[kind])


@every_kind
@every_dtype
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
@pytest.mark.parametrize("through", [through_torch_save, through_safetensors])
def test_round_trip(kind, dtype, assign, through, tmp_path):
    packed, x = pack(layer_like(kind, dtype=dtype)), inputs(3, K, dtype=dtype)
    state = through(packed.state_dict(), tmp_path / "model")
    assert state["format"].item() == 2
    assert state["scale"].dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    with torch.device("meta" if assign else "cpu"):
        other = PackedQLinear(K, N, dtype=dtype, **packed_options(kind))
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert_equal(other(x), packed(x))
    assert {name: (value.dtype, value.shape) for name, value in other.state_dict().items()} == {
        name: (value.dtype, value.shape) for name, value in state.items()
    }


@every_kind
@every_dtype
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_float_state_dicts_are_packed(kind, dtype, assign):
    layer, x = layer_like(kind, dtype=dtype), inputs(3, K, dtype=dtype)
    other = PackedQLinear(K, N, dtype=dtype, **packed_options(kind))
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert_equal(other(x), layer(x).detach())


class Stretched(BinaryQuantization):
    """Signs times a multiple of the mean magnitude of each row; the factor is a parameter."""

    name = "stretched"

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def rule(self):
        return BinaryRule()

    def weight_scale(self, weight):
        return row_means(weight) * self.factor


class Shifted(quantizations.Quantization):
    """+1 unless the weight is below a parameter, else -1."""

    name, bit_width = "shifted", 1

    def __init__(self, limit=0.0):
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(limit))

    def quantize(self, x):
        return torch.where(x < self.limit, -1.0, 1.0)


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
@pytest.mark.parametrize("prefix", ["", "0."])
@pytest.mark.parametrize("make", [Stretched, Shifted])
def test_float_state_dicts_are_packed_by_the_quantization_that_they_hold(make, prefix, assign):
    layer, x = QLinear(K, N, weight_quantization=make(0.05)).eval(), torch.randn(3, K)
    other = PackedQLinear(K, N, weight_quantization=make())
    state = {prefix + name: value for name, value in layer.state_dict().items()}
    (nn.Sequential(other) if prefix else other).load_state_dict(state, assign=assign)
    assert_equal(other(x).detach(), pack(layer)(x).detach())


@pytest.mark.parametrize("make", [Stretched, Shifted])
def test_a_quantization_that_does_not_fit_is_refused_before_the_layer_changes(make):
    layer, other = QLinear(K, N, weight_quantization=make(0.05)), PackedQLinear(K, N, weight_quantization=make())
    name = next(name for name in layer.state_dict() if "weight_quantization" in name)
    with pytest.raises(RuntimeError, match=rf"size mismatch for {name}"):
        other.load_state_dict(layer.state_dict() | {name: torch.ones(2)})
    assert not other.weight.any()


def unchanged(layer, x, state, match, assign=False, strict=True):
    """Assert that the layer refuses the state dict and stays as it was."""
    before, tensors = (
        layer(x).detach(),
        {name: (id(t), t.clone()) for name, t in layer.state_dict(keep_vars=True).items()},
    )
    for prefix in ("", "0."):
        each = nn.Sequential(layer) if prefix else layer
        named = {prefix + name: value for name, value in state.items()}
        with pytest.raises(RuntimeError, match=prefix + match):
            each.load_state_dict(named, assign=assign, strict=strict)
    assert_equal(layer(x).detach(), before)
    for name, tensor in layer.state_dict(keep_vars=True).items():
        assert id(tensor) == tensors[name][0]
        assert_equal(tensor.detach(), tensors[name][1].detach())


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
def test_packed_checkpoints_of_another_kind_are_refused(assign, strict):
    x = torch.randn(3, K)
    scaled, unscaled = pack(layer_like("mean")).state_dict(), pack(QLinear(K, N)).state_dict()
    kinds = {"assign": assign, "strict": strict}
    unchanged(PackedQLinear(K, N), x, scaled, "scale: expected no scale, got a checkpoint with one", **kinds)
    for kind in ("mean", "learned"):
        layer = PackedQLinear(K, N, weight_scale=kind)
        unchanged(layer, x, unscaled, "scale: expected the scale of each output, got a checkpoint without", **kinds)
        unchanged(layer, x, scaled | {"format": torch.tensor(1)}, "format: expected 2, got 1", **kinds)
        unchanged(
            layer, x, scaled | {"format": torch.tensor(4)}, "format: expected a checkpoint of format 1 to 3", **kinds
        )
        unchanged(layer, x, scaled | {"scale": torch.ones(N + 1)}, "scale: expected shape", **kinds)
        unchanged(layer, x, scaled | {"scale": torch.ones(N, dtype=torch.int32)}, "scale: expected float64", **kinds)
    unchanged(PackedQLinear(K, N), x, unscaled | {"format": torch.tensor(2)}, "format: expected 1, got 2", **kinds)


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
def test_float_checkpoints_of_another_kind_are_refused(assign, strict):
    x, kinds = torch.randn(3, K), {"assign": assign, "strict": strict}
    learned, mean = layer_like("learned").state_dict(), layer_like("mean").state_dict()
    for layer in (QLinear(K, N), QLinear(K, N, weight_scale="mean")):
        unchanged(layer, x, learned, "scale: expected no learned scale", **kinds)
    unchanged(PackedQLinear(K, N), x, learned, "scale: expected no scale", **kinds)
    unchanged(PackedQLinear(K, N, weight_scale="mean"), x, learned, "scale: expected float weights from which", **kinds)
    unchanged(PackedQLinear(K, N, weight_scale="learned"), x, mean, "scale: expected the scale of each", **kinds)
    layer = QLinear(K, N, weight_scale="learned")
    unchanged(layer, x, mean, "scale: expected the learned scale of each output", **kinds)
    assert layer.load_state_dict({}, strict=False).missing_keys == ["weight", "bias", "scale"]
    layer.load_state_dict(learned, assign=assign)


@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize("cls", [QLinear, PackedQLinear])
def test_a_state_dict_remembers_that_its_layer_computed_the_scale(cls, strict, assign, tmp_path):
    kinds = {"assign": assign, "strict": strict}
    model, x = nn.Sequential(layer_like("mean")).eval(), torch.randn(3, K)
    state = through_torch_save(model.state_dict(), tmp_path / "model.pt")
    assert list(state) == ["0.weight", "0.bias"]
    with pytest.raises(
        RuntimeError, match=r"0\.weight: expected weights that have no scale, got those of a layer with"
    ):
        nn.Sequential(cls(K, N)).load_state_dict(state, **kinds)
    other = nn.Sequential(cls(K, N, weight_scale="mean")).eval()
    other.load_state_dict(state, **kinds)
    assert_equal(other(x).detach(), model(x).detach())
    nn.Sequential(cls(K, N)).load_state_dict(dict(state), **kinds)  # which drops what torch keeps beside the entries
    nn.Sequential(cls(K, N, weight_scale="mean")).load_state_dict(nn.Sequential(QLinear(K, N)).state_dict(), **kinds)
    nn.Sequential(nn.Linear(K, N)).load_state_dict(state, **kinds)


def test_a_subclass_may_have_a_scale_of_its_own():
    class Other(QLinear):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return super().forward(x) * self.scale

    layer, other = Other(K, N), Other(K, N)
    other.load_state_dict(layer.state_dict())
    assert other.load_state_dict(QLinear(K, N).state_dict(), strict=False).missing_keys == ["scale"]
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, K)
    assert_equal(other(x).detach(), layer(x).detach())


@every_kind
def test_copies_and_conversions(kind):
    layer = layer_like(kind)
    packed, x = pack(layer), torch.randn(3, K)
    want = packed(x)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert_equal(other(x), want)
        assert repr(other) == repr(packed)
    assert "scale=True" in repr(packed)
    scale = packed.scale.clone()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float32):
        packed.to(dtype)
        assert packed.bias.dtype is dtype
        assert packed.scale.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert torch.equal(packed.scale, scale)
        reference = linear_reference(x.to(dtype), layer.weight.detach(), packed.bias, scale, strict_w=is_strict(layer))
        assert_equal(packed(x.to(dtype)), reference)
    assert "scale" in dict(packed.named_buffers())
    assert packed.to("meta").scale.is_meta


@every_kind
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_a_half_layer_keeps_its_exact_scale(kind, dtype):
    layer, x = layer_like(kind, dtype=dtype), torch.randn(3, K).to(dtype)
    packed = pack(layer)
    want = layer(x).detach()
    assert packed.scale.dtype is torch.float32
    for convert in (lambda m: m, lambda m: m.to(dtype), lambda m: pack(unpack(m)), lambda m: m.float().to(dtype)):
        packed = convert(packed)
        assert_equal(packed(x), want)


def test_old_pickles_have_no_scale():
    layer, packed, x = QLinear(K, N).eval(), pack(QLinear(K, N)), torch.randn(3, K)
    for each in (layer, packed):
        want = each(x).detach()
        each.__dict__.pop("weight_scale")
        each.__dict__.pop("_level_bits", None)
        each._buffers.pop("scale", None)
        other = copy.deepcopy(each)
        assert_equal(other(x).detach(), want)
        assert "scale" not in repr(other)
    packed.state_dict()
    last = pack(QLinear(N, 8))
    last._buffers.pop("scale")
    chain = copy.deepcopy(nn.Sequential(packed, nn.BatchNorm1d(N).eval(), last))
    assert_equal(pack(chain, fuse=True)(x), chain(x))


@every_kind
def test_pack_and_explain(kind):
    model = nn.Sequential(layer_like(kind, K, K), nn.BatchNorm1d(K), layer_like(kind, K, K)).eval()
    model[2].weight = model[0].weight
    x = torch.randn(5, K)
    want = model(x).detach()
    assert [layer.packable for layer in explain(model)] == [True, True]
    packed = pack(model)
    assert packed[0].weight is packed[2].weight
    assert_equal(packed(x), want)
    assert_equal(unpack(packed)(x).detach(), want)
    assert_equal(pack(unpack(packed))(x), want)
    assert unpack(packed)[0].weight_scale == "learned"


def test_unpack_trains():
    unpacked = unpack(pack(layer_like("mean")))
    unpacked(torch.randn(3, K)).sum().backward()
    assert unpacked.scale.grad.abs().sum() > 0
    assert unpacked.weight.grad.abs().sum() > 0


# ---- binarize ----


@pytest.mark.parametrize("weight_scale", ["mean", "learned"])
@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])
def test_binarize(weight_scale, inplace):
    model = nn.Sequential(nn.Linear(5, K), nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, 2))
    weight = model[1].weight.detach().clone()
    report = explain_binarize(model, weight_scale=weight_scale, rules={"2": {"weight_scale": None}})
    assert f"replaces it: sign input, sign weights with a {weight_scale} scale, threshold 1.0" in str(report)
    assert report.layers[1].options["weight_scale"] == weight_scale
    result = binarize(model, weight_scale=weight_scale, rules={"2": {"weight_scale": None}}, inplace=inplace)
    assert (result is model) == inplace
    assert (result[1].weight_scale, result[2].weight_scale) == (weight_scale, None)
    assert_equal(result[1].channel_scale(), row_means(weight))
    assert ("1.scale" in result.state_dict()) == (weight_scale == "learned")
    result(torch.randn(4, 5)).sum().backward()
    with pytest.raises(ValueError, match=r"rules\['2'\]: weight_scale: expected None, 'mean' or 'learned'"):
        binarize(model, rules={"2": {"weight_scale": 1}})
