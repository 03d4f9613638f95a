"""Layers whose input inputdorefa rounds to levels: with packed weights in inference, in float otherwise."""

import copy
import io
import math

import pytest
import torch
from support.calls import Calls
from support.reference import FLOATS, assert_equal, levels_linear, signs
from torch import nn

from bitorch_qlinear import PackedQLinear, QLinear, explain, kernels, pack, quantizations, unpack
from bitorch_qlinear.checkpoint import INPUT_RULES, LEVEL_INPUTS

N, K = 70, 300


def level_layer(bits, dtype=torch.float32, **options):
    torch.manual_seed(bits)
    layer = QLinear(K, N, dtype=dtype, input_quantization=quantizations.InputDoReFa(bits), **options)
    return layer.requires_grad_(False).eval()


def values(*leading, dtype=torch.float32):
    return (torch.rand(*leading, K, dtype=torch.float64) * 1.4 - 0.2).to(dtype)


def operators_of(layer, x):
    with Calls() as calls:
        layer(x)
    return calls.names


def in_float(layer, x):
    """Return the output of the layer's float path, which training takes."""
    return copy.deepcopy(layer).train()(x)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight_quantization", ["sign", "steheaviside"])
def test_inference_equals_the_reference(bits, dtype, weight_quantization):
    layer, x = level_layer(bits, dtype, weight_quantization=weight_quantization), values(2, 5, dtype=dtype)
    layer.weight[0, :3] = torch.tensor([0.0, -0.0, math.nan])
    w_signs = signs(layer.weight, weight_quantization == "steheaviside")
    expected = levels_linear(x, w_signs, bits, layer.bias, None, dtype)
    packed = pack(layer)
    assert isinstance(packed, PackedQLinear)
    assert_equal(layer(x), expected, "QLinear")
    assert_equal(packed(x), expected, "PackedQLinear")
    assert_equal(packed.eval().requires_grad_(False)(x.requires_grad_()).detach(), expected, "with a gradient")
    assert_equal(unpack(packed).requires_grad_(False)(x.detach()), expected, "unpacked")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [1, 2])
def test_inference_agrees_with_the_float_path(bits, bias):
    layer, x = level_layer(bits, bias=bias), values(50)
    y, expected = layer(x), in_float(layer, x)
    if bits == 1 and not bias:
        assert torch.equal(y, expected)
    assert (y - expected).abs().max() <= K * 2**-23


@pytest.mark.parametrize("weight_scale", ["mean", "learned"])
@pytest.mark.parametrize("bits", [1, 2])
def test_a_scale_of_the_weights(bits, weight_scale):
    layer, x = level_layer(bits, weight_scale=weight_scale), values(9)
    if weight_scale == "learned":
        layer.scale.uniform_(0.1, 2)
    expected = levels_linear(x, signs(layer.weight), bits, layer.bias, layer.channel_scale(), x.dtype)
    assert_equal(layer(x), expected)
    assert_equal(pack(layer)(x), expected)
    assert (expected - in_float(layer, x)).abs().max() <= K * 2**-21


@pytest.mark.parametrize("bits", [1, 2])
def test_nan_makes_its_row_nan(bits):
    layer, x = level_layer(bits), values(4)
    x[1, 7] = math.nan
    for each in (layer, pack(layer)):
        assert (
            each(x).isnan().any(1).tolist() == in_float(layer, x).isnan().any(1).tolist() == [False, True] + 2 * [False]
        )


def test_the_operator_computes_inference_and_nothing_else():
    layer, x = level_layer(2), values(3)
    assert operators_of(layer, x) == ["pack_bits", "dorefa_linear"]
    assert operators_of(pack(layer), x) == ["dorefa_linear"]
    for other in (copy.deepcopy(layer).train(), copy.deepcopy(layer).requires_grad_(True), level_layer(3)):
        assert operators_of(other, x) == []
    hooked = copy.deepcopy(layer)
    hooked.input_quantization.register_forward_hook(lambda module, args, output: output)
    assert operators_of(hooked, x) == []
    assert operators_of(level_layer(2, weight_quantization=quantizations.WeightDoReFa(2)), x) == []


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize("bits", [1, 2])
def test_gradients_of_a_packed_layer_are_those_of_the_float_path(bits, threshold):
    layer = level_layer(bits, gradient_cancellation_threshold=threshold)
    packed, x = pack(layer), values(6)
    packed.bias.requires_grad_(True)
    layer.bias.requires_grad_(True)
    upstream = torch.randn(6, N)
    gradients = [
        torch.autograd.grad(each(x.requires_grad_()), (x, each.bias), upstream) for each in (packed, layer.train())
    ]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
    cancelled = (x.abs() > (threshold or math.inf)).detach()
    assert (gradients[0][0][cancelled] == 0).all() and (gradients[0][0][~cancelled] != 0).all()


@pytest.mark.parametrize("bits", [1, 2])
def test_func_transforms(bits):
    packed, x = pack(level_layer(bits)), values(3, 4)
    assert_equal(torch.func.vmap(packed, in_dims=1, out_dims=1)(x), packed(x))
    jacobian = torch.func.jacrev(packed)(x[0, 0])
    assert_equal(jacobian, packed._signs(torch.float32))


@pytest.mark.parametrize("bits", [1, 2])
def test_compile_and_export(bits):
    for layer in (level_layer(bits), pack(level_layer(bits))):
        x = values(5)
        torch._dynamo.reset()
        assert_equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
        assert_equal(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float_computation_has_the_kernels_values(bits, dtype, monkeypatch):
    """A device without kernels gives the same values: every sum is a whole number."""
    packed, x = pack(level_layer(bits, dtype, weight_scale="mean")), values(8, dtype=dtype)
    x[2, 3] = math.nan
    expected = packed(x)
    monkeypatch.setattr("bitorch_qlinear.packed.has_kernels", lambda tensor: False)
    packed.weight_prepared = None
    assert_equal(packed._in_float(x, packed.weight, packed.bias, packed.scale), expected)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(packed._in_float(x, packed.weight, packed.bias, packed.scale).sum(), x)
    assert gradient.shape == x.shape


def test_autocast():
    layer, x = level_layer(2), values(4)
    for each in (layer, pack(layer)):
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(each(x), levels_linear(x, signs(layer.weight), 2, layer.bias, None, torch.bfloat16))


def test_every_kernel_reads_the_same_checkpoint():
    layer, x = level_layer(2), values(5)
    packed = pack(layer)
    stored = io.BytesIO()
    torch.save(packed.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    assert (int(state["format"]), int(state["input_rule"])) == (2, LEVEL_INPUTS[2])
    for kernel in kernels.available():
        with kernels.forced(kernel):
            loaded = PackedQLinear(K, N, input_quantization=quantizations.InputDoReFa(2))
            loaded.load_state_dict(state)
            assert_equal(loaded(x), packed(x), kernel)


@pytest.mark.parametrize(
    "saved", ["sign", "identity", quantizations.InputDoReFa(1), quantizations.InputDoReFa(2)], ids=str
)
@pytest.mark.parametrize("loading", ["sign", quantizations.InputDoReFa(1), quantizations.InputDoReFa(2)], ids=str)
def test_checkpoints_of_another_rule_are_refused(saved, loading):
    state = PackedQLinear(K, N, input_quantization=saved).state_dict()
    layer = PackedQLinear(K, N, input_quantization=loading)
    if repr(saved) == repr(loading):
        layer.load_state_dict(state)
        return
    with pytest.raises(RuntimeError, match=r"format: expected (1, got 2|2, got 1): |input_rule: expected .*, got .*: "):
        layer.load_state_dict(state)


def test_the_rules_are_told_apart_in_words():
    assert [INPUT_RULES[LEVEL_INPUTS[bits]].partition(",")[0] for bits in (1, 2)] == ["0 or 1", "0"]
    assert "1/3" in INPUT_RULES[LEVEL_INPUTS[2]]


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_bitorchs_quantization_is_recognized(bits):
    reference = pytest.importorskip("bitorch.quantizations")
    expected = bits if bits < 3 else None
    assert quantizations.level_bits(quantizations.InputDoReFa(bits)) == expected
    assert quantizations.level_bits(reference.InputDoReFa(bits)) == expected
    schedules = pytest.importorskip("bitorch.quantizations.quantization_scheduler")
    schedule = schedules.StepScheduling([reference.Sign(), reference.InputDoReFa(bits)], 2)
    schedule.factor = 1
    assert quantizations.level_bits(schedule) == expected
    schedule.factor = 0.5
    assert quantizations.level_bits(schedule) is None

    class Own(quantizations.InputDoReFa):
        pass

    for other in (Own(bits), quantizations.Sign(), quantizations.WeightDoReFa(bits), nn.Identity()):
        assert quantizations.level_bits(other) is None


def test_explain_says_which_path():
    model = nn.Sequential(level_layer(1), level_layer(2), level_layer(3))
    paths, reasons = zip(*((layer.path, layer.reason) for layer in explain(model).layers), strict=True)
    assert [path.rpartition(", ")[2] for path in paths] == [
        "1-bit input (in inference; else float)",
        "2-bit input (in inference; else float)",
        "float",
    ]
    assert reasons[:2] == ("", "") and "inputdorefa of 1 or 2 bits, got InputDoReFa(bit_width=3)" in reasons[2]
    assert [layer.path for layer in explain(model.train()).layers] == ["float"] * 3
    packed = explain(pack(model)).layers
    assert [layer.path.rpartition(", ")[2] for layer in packed] == ["1-bit input", "2-bit input", "float"]
    assert "path=packed weights, 2-bit input" in repr(pack(model)[1])
