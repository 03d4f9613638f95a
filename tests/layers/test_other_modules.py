"""Inside modules and tools that do not know binary layers, the layers give the right values or a clear error."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from support.reference import assert_equal, linear_reference
from support.tensors import Wrapped
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import fusion, parametrizations, parametrize, prune

from bitorch_qlinear import PackedQLinear, QLinear, pack
from bitorch_qlinear.linear import Activation

K, N = 70, 9

LAYERS = {
    "training": lambda **options: QLinear(K, N, **options),
    "eval": lambda **options: QLinear(K, N, **options).eval(),
    "packed": lambda **options: pack(QLinear(K, N, **options)),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


# ---- nn.TransformerEncoderLayer, which has a fast path that reads the weights itself ----


def encoder_layer(which, **options):
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, **options)
    for name in which:
        setattr(layer, name, QLinear.from_linear(getattr(layer, name)))
    return layer


WITHOUT_GRADIENTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", WITHOUT_GRADIENTS.values(), ids=WITHOUT_GRADIENTS)
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}], ids=str)
@pytest.mark.parametrize("which", [("linear1",), ("linear2",), ("linear1", "linear2")], ids=str)
def test_an_encoder_layer_is_binary_in_inference(which, options, mode):
    layer = encoder_layer(which, **options)
    x, padding = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for arguments in ({}, {"src_key_padding_mask": padding}):
        expected = layer.train()(x, **arguments).detach()
        for each in (layer.eval(), pack(layer), copy.deepcopy(layer), pack(layer).float()):
            with mode():
                y = each(x, **arguments)
            kept = ~padding if arguments else ...
            torch.testing.assert_close(y[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_an_encoder_with_nested_tensors_is_binary_in_inference():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(encoder_layer(("linear1", "linear2")), 2)
    x, padding = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, src_key_padding_mask=padding).detach()
    for each in (model.eval(), pack(model)):
        with torch.no_grad():
            y = each(x, src_key_padding_mask=padding)
        torch.testing.assert_close(y[~padding], expected[~padding], rtol=1e-5, atol=1e-5)


def test_the_path_without_gradients_does_not_call_the_activation(monkeypatch):
    layer = QLinear(K, N).eval()
    calls = []
    monkeypatch.setattr(Activation, "forward", lambda self, x: calls.append(x))
    with torch.no_grad():
        layer(torch.randn(2, K))
    assert calls == []


# ---- modules that read a layer's weight ----


def test_a_module_that_casts_to_the_dtype_of_the_weight():
    """T5's feed-forward layer does this; with packed words as weights, x becomes int32 and must be refused."""

    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.wo = QLinear(K, N)

        def forward(self, x):
            if x.dtype != self.wo.weight.dtype and self.wo.weight.dtype != torch.int8:
                x = x.to(self.wo.weight.dtype)
            return self.wo(x)

    model, x = FeedForward().eval(), torch.randn(2, K)
    assert_equal(model(x), model.wo(x))
    packed = pack(model)
    for input_quantization in (None, "identity"):
        with pytest.raises((TypeError, RuntimeError), match="x: expected float"):
            packed(x)
        model.wo = QLinear(K, N, input_quantization=input_quantization).eval()
        packed = pack(model)


def test_a_module_that_multiplies_by_the_weight_itself():
    """Mamba does this with dt_proj; packed words must give an error and never a result."""
    for k, n in ((K, N), (2, 2), (1, 1)):
        packed, x = pack(QLinear(k, n)), torch.randn(k, 3)
        with pytest.raises(RuntimeError):
            packed.weight @ x
        with pytest.raises(RuntimeError):
            nn.functional.linear(x.T, packed.weight)


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_of_packed_layers_has_parameters(bias):
    model = pack(nn.Sequential(QLinear(8, 8, bias), nn.ReLU(), QLinear(8, 2, bias)))
    for dtype in (torch.float32, torch.bfloat16):
        parameter = next(model.to(dtype).parameters())
        assert (parameter.device.type, parameter.dtype) == ("cpu", dtype)
    assert next(model.to("meta").parameters()).is_meta
    with torch.device("meta"):
        assert next(PackedQLinear(8, 8, bias).parameters()).is_meta


# ---- weights of another shape ----


@pytest.mark.parametrize("n", [N, N - 2])
@pytest.mark.parametrize("k", [K - 20, K - 64, K + 5])
def test_the_shape_of_the_weight_determines_the_sizes(k, n):
    """Pruned and widened layers get weights of another shape, which determine the sizes, as in nn.Linear."""
    layer, x = QLinear(K, N), torch.randn(2, k)
    layer.weight, layer.bias = nn.Parameter(torch.randn(n, k)), nn.Parameter(torch.randn(n))
    expected = linear_reference(x, layer.weight.detach(), layer.bias.detach())
    for each in (layer.train(), layer.eval(), pack(layer), copy.deepcopy(pack(layer))):
        assert_equal(each(x).detach(), expected)
        with torch.no_grad():
            assert_equal(each(x), expected)
    with pytest.raises(RuntimeError):
        pack(layer)(torch.randn(2, K))


# ---- inputs of other kinds ----

ROWS = [torch.randn(3, K), torch.randn(2, K)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])
@each_layer
def test_nested(make, layout, gradients):
    layer = make()
    with torch.set_grad_enabled(gradients):
        y = layer(torch.nested.nested_tensor(ROWS, layout=layout))
        assert y.is_nested
        assert y.layout is layout
        for part, row in zip(y.unbind(), ROWS, strict=True):
            assert_equal(part.detach(), layer(row).detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("input_quantization", ["sign", "steheaviside", "identity"])
@pytest.mark.parametrize("to", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
@each_layer
def test_sparse(make, to, input_quantization):
    layer, x = make(input_quantization=input_quantization), torch.randn(4, K).relu()
    assert_equal(layer(getattr(x, to)()).detach(), layer(x).detach())


@pytest.mark.filterwarnings("ignore")
@each_layer
def test_quantized(make):
    layer, x = make(), torch.quantize_per_tensor(torch.randn(4, K), 0.1, 128, torch.quint8)
    assert_equal(layer(x).detach(), layer(x.dequantize()).detach())


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("input_quantization", ["sign", "steheaviside"])
@each_layer
def test_unsupported_dtypes_of_x_are_refused(make, input_quantization, dtype):
    layer, x = make(input_quantization=input_quantization), torch.ones(2, K).to(dtype)
    for context in (torch.no_grad, torch.enable_grad):
        with context(), pytest.raises((RuntimeError, TypeError), match="x: expected float") as error:
            layer(x)
        assert not isinstance(error.value, NotImplementedError)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
@each_layer
def test_the_error_about_a_dtype_names_a_remedy(make, dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(RuntimeError, match=rf"x: expected float64.*got {name}: (call x\.float|take its real part)"):
        make()(torch.zeros(2, K).to(dtype))


@pytest.mark.parametrize(
    "x", [np.zeros((2, K), np.float32), [[0.0] * K], None, 3.0, "x"], ids=lambda x: type(x).__name__
)
@each_layer
def test_other_objects_than_tensors_give_the_error_of_a_linear(make, x):
    with pytest.raises(TypeError) as expected:
        nn.Linear(K, N)(x)
    with pytest.raises(TypeError) as error:
        make()(x)
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_weight_of_another_class(training, gradients):
    layer = QLinear(K, N).train(training)
    layer.weight = nn.Parameter(Wrapped(layer.weight.detach()), requires_grad=False)
    refused = pytest.raises(TypeError, match=r"weight: expected a plain tensor, got Wrapped.*exclude QLinear layers")
    with torch.set_grad_enabled(gradients), refused:
        layer(torch.randn(2, K, requires_grad=gradients))


# ---- torch's tools ----


@each_layer
def test_symbolic_trace(make):
    model, x = nn.Sequential(make(), nn.ReLU()), torch.randn(2, K)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert_equal(traced(x).detach(), model(x).detach())


def test_symbolic_trace_of_a_layer_in_a_deeper_module():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([nn.Sequential(QLinear(K, K)), pack(QLinear(K, N))])

        def forward(self, x):
            return self.inner[1](self.inner[0](x) + x)

    model, x = Block(), torch.randn(2, K)
    traced = torch.fx.symbolic_trace(model)
    assert {node.target for node in traced.graph.nodes if node.op == "call_module"} == {"inner.0.0", "inner.1"}
    assert_equal(traced(x).detach(), model(x).detach())


@each_layer
def test_symbolic_trace_of_a_layer_alone_is_a_clear_error(make):
    with pytest.raises(TypeError, match=r"root: .*nn\.Sequential"):
        torch.fx.symbolic_trace(make())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    layer, x = pack(QLinear(300, 200)), torch.randn(3, 300)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    with torch.no_grad():
        traced = make_fx(lambda state, x: functional_call(layer, state, (x,)), tracing_mode=mode)(state, x)
        assert_equal(traced(state, x), layer(x))


def test_skip_init():
    layer = nn.utils.skip_init(QLinear, K, N, gradient_cancellation_threshold=1.0)
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    x = torch.randn(2, K)
    assert_equal(layer(x).detach(), linear_reference(x, layer.weight.detach(), layer.bias.detach()))
    packed = nn.utils.skip_init(PackedQLinear, K, N)
    packed.load_state_dict(pack(layer).state_dict())
    assert_equal(packed(x), layer(x).detach())


@pytest.mark.parametrize("make", [LAYERS["eval"], LAYERS["packed"]], ids=["eval", "packed"])
def test_a_batch_norm_cannot_be_fused(make):
    layer = make().eval()
    with pytest.raises(TypeError, match=r"fuse_linear_bn_eval cannot take a .*keep the batch norm"):
        fusion.fuse_linear_bn_eval(layer, nn.BatchNorm1d(N).eval())
    copy.deepcopy(layer)  # copying, by which torch begins the fusion, must work everywhere else


@pytest.mark.parametrize("swapping", [True, False])
@each_layer
def test_swap_module_params_on_conversion(make, swapping):
    layer, x = make(), torch.randn(2, K)
    want = layer(x).detach()
    torch.__future__.set_swap_module_params_on_conversion(swapping)
    try:
        layer.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
        assert_equal(layer(x).detach(), want)
        layer.to(torch.float64)
        assert layer(x.double()).dtype is torch.float64
        layer.to(torch.float32)
        assert_equal(layer(x).detach(), want)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


NORMED = {
    "weight-norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral-norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
    "old-weight-norm": (nn.utils.weight_norm, "remove_weight_norm"),
    "old-spectral-norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
    "pruned": (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), "prune.remove"),
    "pruned-bias": (lambda linear: prune.l1_unstructured(linear, "bias", 0.5), "prune.remove"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", NORMED)
def test_from_linear_says_what_to_remove(norm):
    wrap, remedy = NORMED[norm]
    linear = nn.Linear(16, 8)
    wrap(linear)
    what = "bias" if "bias" in norm else "weight"
    with pytest.raises(ValueError, match=f"linear: expected a {what} that is a parameter.*{remedy}") as error:
        QLinear.from_linear(linear)
    call = str(error.value).partition("call torch.nn.utils.")[2].partition(" first")[0]
    eval(call, {**vars(nn.utils), "parametrize": parametrize, "prune": prune, "linear": linear})
    x = torch.randn(2, 16)
    layer = QLinear.from_linear(linear)
    assert_equal(layer(x).detach(), linear_reference(x, linear.weight.detach(), linear.bias.detach()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", NORMED)
def test_a_qlinear_may_be_wrapped_in_the_same_ways(norm):
    layer = QLinear(16, 8)
    NORMED[norm][0](layer)
    x = torch.randn(2, 16)
    y = layer(x)
    assert_equal(y.detach(), linear_reference(x, layer.weight.detach(), layer.bias.detach()))
    y.sum().backward()


def test_from_linear_refuses_binary_layers():
    quantizations = pytest.importorskip("bitorch.layers.qlinear")
    for layer in (QLinear(K, N, input_quantization="steheaviside"), quantizations.QLinearBase(K, N)):
        with pytest.raises(TypeError, match="linear: expected a layer of real weights, got QLinear"):
            QLinear.from_linear(layer)
