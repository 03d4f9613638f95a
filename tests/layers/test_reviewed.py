"""What a review of the layers found: each test names what went wrong."""

import pytest
import torch
from support.reference import assert_equal
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bitorch_qlinear import PackedQLinear, QLinear, pack

N, K = 200, 300


def packed_layer(**options):
    return pack(QLinear(K, N, **options).eval())


def test_rows_of_words_that_change_places():
    """Differences of opposite signs at equal distances: keys in an arithmetic sequence did not see them."""
    layer = pack(QLinear(512, 512).eval())
    with torch.no_grad():
        layer.weight[4], layer.weight[2] = layer.weight[2].clone(), layer.weight[2]
        layer.weight[6], layer.weight[4] = layer.weight[0].clone(), layer.weight[2].clone()
        x = torch.randn(512, 512)
        layer(x)
        order = torch.arange(512)
        order[[0, 2, 4, 6]] = torch.tensor([2, 0, 6, 4])
        layer.weight.copy_(layer.weight[order])
        want = pack(QLinear(512, 512).eval())
        want.weight, want.bias.data = layer.weight.clone(), layer.bias.data
        assert_equal(layer(x), want(x))


def test_a_vmap_over_the_words_leaves_the_layer_as_it_was():
    layers = [packed_layer() for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(2, K)
    with torch.no_grad():
        each = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
        for y, layer in zip(each, layers, strict=True):
            assert_equal(y, layer(x))


@pytest.mark.parametrize("state", ["float", "without a format"])
def test_skip_init_saves_what_the_layer_is(state):
    layer = nn.utils.skip_init(PackedQLinear, K, N)
    old = {name: value for name, value in packed_layer().state_dict().items() if name in ("weight", "bias", "k")}
    layer.load_state_dict(QLinear(K, N).state_dict() if state == "float" else old)
    PackedQLinear(K, N).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    layer, x = packed_layer(), torch.randn(3, K)
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    with torch.no_grad():
        traced = make_fx(lambda state, x: functional_call(layer, state, (x,)), tracing_mode=mode)(state, x)
        assert_equal(traced(state, x), layer(x))


def test_forward_mode_through_real_inputs():
    layer, x, t = packed_layer(input_quantization="identity"), torch.randn(3, K), torch.randn(3, K)
    _, tangent = torch.func.jvp(layer, (x,), (t,))
    torch.testing.assert_close(tangent, layer(t) - layer.bias, atol=1e-4, rtol=1e-4)
    assert torch.func.hessian(lambda x: layer(x).square().sum())(x[0]).shape == (K, K)


@pytest.mark.parametrize("layer", [QLinear(8, 4), pack(QLinear(8, 4))], ids=["QLinear", "PackedQLinear"])
def test_symbolic_trace_of_a_layer_alone_is_a_sentence(layer):
    with pytest.raises(TypeError, match=r"root: .*nn\.Sequential"):
        torch.fx.symbolic_trace(layer)


def test_progressive_sign_weights_load_in_training_mode():
    layer = PackedQLinear(K, N, weight_quantization="progressive_sign").train()
    trained = QLinear(K, N, weight_quantization="progressive_sign").eval()
    x = torch.randn(2, K)
    for state in (trained.state_dict(), pack(trained).state_dict()):
        layer.load_state_dict(state)
        assert_equal(layer(x), trained(x))


def test_a_change_of_dtype_leaves_the_words():
    layer, x = packed_layer(), torch.randn(2, K)
    want = layer(x)
    assert_equal(layer.type(torch.float64)(x), want)
    assert layer.weight.dtype is torch.int32
    assert layer.bias.dtype is torch.float64


def test_an_input_that_is_a_parameter_gets_a_form_too():
    layer, x = packed_layer(), nn.Parameter(torch.randn(2, K))
    with torch.no_grad():
        layer.weight.zero_()
        layer(x)
        form = layer.weight_prepared
        layer(x)
    assert form is not None
    assert layer.weight_prepared is form


def test_words_as_a_parameter_stay_a_buffer():
    layer, words = packed_layer(), torch.zeros(N, 10, dtype=torch.int32)
    layer.weight = nn.Parameter(words, requires_grad=False)
    assert "weight" in dict(layer.named_buffers())
    with pytest.raises(TypeError, match="weight: expected packed words"):
        layer.weight = nn.Parameter(torch.randn(N, K))
    assert_equal(layer.weight, words)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("make", [QLinear, lambda *sizes: pack(QLinear(*sizes))], ids=["QLinear", "PackedQLinear"])
def test_other_inputs_are_a_sentence_with_a_remedy(make, dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(RuntimeError, match=rf"x: expected float64.*got {name}: (call x\.float|take its real part)"):
        make(8, 4)(torch.zeros(2, 8).to(dtype))
