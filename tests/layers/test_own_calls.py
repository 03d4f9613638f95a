"""A layer computes what its modules compute when they are called, also if one object has a call of its own.

Hooks, a forward or another method that is set on an object instead of its class, and classes with a ``__call__`` of
their own are what the packed path would skip. Such a layer computes in float. It is packed only if that gives the same
outputs.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from bitorch_qlinear import PackedQLinear, QLinear, explain, pack, quantizations, unpack

K, N = 64, 40
X = torch.randn(5, K, generator=torch.Generator().manual_seed(0))
X[:, ::3] = 0


def other_signs(x):
    return torch.where(x > 0.5, 1.0, -1.0).to(x.dtype)


def strict_rule():
    return quantizations.BinaryRule(strict=True)


class Mine(quantizations.BinaryQuantization):
    def rule(self):
        return quantizations.BinaryRule()


class Scaled(Mine):
    def weight_scale(self, weight):
        return weight.abs().amax(1).exp2().ceil()


def called(layer, x):
    """Return what the layer's modules compute when they are called."""
    return F.linear(layer.activation(x), layer.weight_quantization(layer.weight), layer.bias)


def setter(name, value):
    return lambda module: setattr(module, name, value)


CHANGES = {
    "forward": setter("forward", other_signs),
    "_call_impl": setter("_call_impl", other_signs),
    "quantize": setter("quantize", other_signs),
    "rule": setter("rule", strict_rule),
    "forward hook": lambda module: module.register_forward_hook(lambda module, args, output: other_signs(args[0])),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda module, args: (args[0] - 0.5,)),
}
INPUTS = ["sign", "approxsign", "swishsign", "steheaviside", "progressive_sign", "identity", "inputdorefa", Mine]
WEIGHTS = ["sign", "steheaviside", "progressive_sign", "ternary", "weightdorefa", Mine, Scaled]


def changed_layer(place, quantization, change):
    made = quantization if isinstance(quantization, str) else quantization()
    torch.manual_seed(1)
    layer = QLinear(K, N, **{place: made}).eval()
    with torch.no_grad():
        layer.weight[:, ::2] = 0
        layer.bias.round_()
    CHANGES[change](getattr(layer, place))
    return layer


def check_call_and_pack(layer, expected):
    with torch.no_grad():
        assert torch.equal(layer(X), expected)
        assert torch.equal(layer(X.clone().requires_grad_()), expected)
        packed = pack(nn.Sequential(layer))
        assert torch.equal(packed(X), expected)
    (report,) = explain(nn.Sequential(layer))
    assert report.packable == (type(packed[0]) is PackedQLinear) and bool(report.reason) != report.packable
    return type(packed[0]) is PackedQLinear


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("quantization", INPUTS)
def test_input_quantizations(quantization, change):
    layer = changed_layer("input_quantization", quantization, change)
    assert not check_call_and_pack(layer, called(layer, X).detach())
    for make in (
        PackedQLinear.from_float,
        lambda layer: PackedQLinear(K, N, input_quantization=layer.input_quantization),
    ):
        with pytest.raises(ValueError, match=r"input_quantization: .* with (a \w+ of its own|hooks)$"):
            make(layer)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("quantization", WEIGHTS)
def test_weight_quantizations(quantization, change):
    layer = changed_layer("weight_quantization", quantization, change)
    check_call_and_pack(layer, called(layer, X).detach())
    if "hook" not in change:
        packed = PackedQLinear(K, N, weight_quantization=layer.weight_quantization)
        try:
            packed.load_state_dict(layer.state_dict())
        except RuntimeError as error:
            assert "expected one whose values are +1 and -1" in str(error)
        else:
            assert torch.equal(packed(X), called(layer, X))


@pytest.mark.parametrize("name", ["forward", "_call_impl"])
def test_activations(name):
    for quantization in ("sign", "identity", "inputdorefa"):
        layer = QLinear(K, N, input_quantization=quantization).eval()
        setattr(layer.activation, name, other_signs)
        assert not check_call_and_pack(layer, called(layer, X).detach())


class Twice(QLinear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OtherCall(quantizations.Sign):
    def __call__(self, x):
        return other_signs(x)


class OtherCallImpl(quantizations.Sign):
    def _call_impl(self, x):
        return other_signs(x)


@pytest.mark.parametrize("cls", [OtherCall, OtherCallImpl])
def test_calls_of_a_class(cls):
    layer = QLinear(K, N, input_quantization=cls()).eval()
    assert not check_call_and_pack(layer, called(layer, X).detach())
    layer = QLinear(K, N, weight_quantization=cls()).eval()
    assert check_call_and_pack(layer, called(layer, X).detach())


@pytest.mark.parametrize("name", ["forward", "_call_impl", "__call__", "hook", "activation", "activation's forward"])
def test_calls_of_the_layer(name):
    layer = (Twice if name == "__call__" else QLinear)(K, N).eval()
    if name == "hook":
        layer.register_forward_hook(lambda module, args, output: 2 * output)
    elif name == "activation":
        layer.activation = nn.Sequential(layer.activation, nn.Identity())
        layer.activation.activation_function = layer.activation.gradient_cancellation_threshold = None
    elif name == "activation's forward":
        layer.activation.forward = other_signs
    elif name != "__call__":
        setattr(layer, name, lambda x: 2 * x[:, :N])
    with torch.no_grad():
        assert torch.equal(pack(nn.Sequential(layer))(X), layer(X))
    with pytest.raises(ValueError, match="layer: expected one whose call computes what QLinear computes"):
        PackedQLinear.from_float(layer)


@pytest.mark.parametrize("place", ["input_quantization", "weight_quantization", "activation"])
@pytest.mark.parametrize("change", ["forward", "_call_impl", "quantize", "rule"])
@pytest.mark.parametrize("quantization", ["sign", Mine], ids=["sign", "own"])
def test_compiled_graphs_notice_what_is_set_later(quantization, change, place):
    made = (quantization if isinstance(quantization, str) else quantization() for _ in range(2))
    layer = QLinear(K, N, input_quantization=next(made), weight_quantization=next(made)).eval()
    if not hasattr(getattr(layer, place), change):
        return
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(X)
        CHANGES[change](getattr(layer, place))
        assert torch.equal(compiled(X), called(layer, X))


@pytest.mark.parametrize("place", ["input_quantization", "weight_quantization", "activation"])
@pytest.mark.parametrize("change", [change for change in CHANGES if "hook" in change])
def test_compiled_graphs_notice_hooks_if_torch_is_told_to(change, place):
    layer = QLinear(K, N).eval()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False), torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        compiled(X)
        CHANGES[change](getattr(layer, place))
        assert torch.equal(compiled(X), called(layer, X))


def test_exported_programs_compute_what_is_set():
    layer = changed_layer("input_quantization", "sign", "forward")
    program = torch.export.export(layer, (X,)).module()
    assert torch.equal(program(X), called(layer, X))


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


def test_computed_weights_are_not_taken_for_shared_ones():
    """pack() packs weights that layers share once, and each computed weight for itself."""
    layers = [QLinear(K, K) for _ in range(8)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Negative())
    model = nn.Sequential(*layers).eval()
    packed = pack(model)
    for layer, each in zip(layers, packed, strict=True):
        assert torch.equal(each(X), layer(X))
    assert explain(model).resident_bytes == 8 * K * K * 4


@pytest.mark.parametrize("kept_as", ["parameter", "buffer", "attribute"])
def test_weights_that_layers_share_are_packed_once(kept_as):
    layers = [QLinear(K, K) for _ in range(3)]
    weight = torch.randn(K, K)
    parameter = nn.Parameter(weight)
    for layer in layers:
        del layer.weight
        if kept_as == "buffer":
            layer.register_buffer("weight", weight)
        else:
            layer.weight = parameter if kept_as == "parameter" else weight
    model = nn.Sequential(*layers).eval()
    packed = pack(model)
    assert torch.equal(packed(X), model(X))
    assert packed[0].weight is packed[1].weight is packed[2].weight
    assert explain(packed).resident_bytes == K * K // 8


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations(name):
    layer = getattr(parametrizations, name)(QLinear(K, N, weight_scale="mean")).eval()
    with torch.no_grad():
        assert torch.equal(pack(nn.Sequential(layer))(X), layer(X))


# ---- packed layers ----


def test_a_packed_layer_does_not_call_its_quantization(monkeypatch):
    """The words that it was packed with decide, on a device with kernels and on one without."""
    packed = pack(QLinear(K, N, input_quantization="steheaviside"))
    expected = packed(X)
    packed.input_quantization.forward = other_signs
    packed.activation.register_forward_hook(lambda module, args, output: -output)
    assert torch.equal(packed(X), expected)
    monkeypatch.setattr("bitorch_qlinear.packed.has_kernels", lambda tensor: False)
    assert torch.equal(packed(X), expected)


@pytest.mark.parametrize(
    "change", ["hook", "forward", "quantization's hook", "other quantization", "activation", "class"]
)
def test_unpacking_refuses_what_it_would_change(change):
    packed = PackedQLinear(K, N, input_quantization="steheaviside")
    if change == "hook":
        packed.register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "forward":
        packed.forward = other_signs
    elif change == "quantization's hook":
        packed.input_quantization.register_forward_hook(lambda module, args, output: -output)
    elif change == "other quantization":
        packed.activation.activation_function = quantizations.Sign()
    elif change == "activation":
        packed.activation = nn.Tanh()
    else:
        packed.__class__ = type("Other", (PackedQLinear,), {"forward": lambda self, x: other_signs(x)})
    argument = "activation" if change == "activation" else "input_quantization" if "quantization" in change else "layer"
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        unpack(nn.Sequential(packed))


@pytest.mark.parametrize("change", ["forward", "quantize", "hook", "exchanged"])
@pytest.mark.parametrize("quantization", ["sign", "steheaviside", Scaled], ids=["sign", "steheaviside", "scaled"])
def test_unpacking_leaves_out_a_changed_weight_quantization(quantization, change):
    layer = QLinear(K, N, weight_quantization=quantization if isinstance(quantization, str) else quantization())
    packed = PackedQLinear.from_float(layer)
    if change == "exchanged":
        packed.weight_quantization = Negative()
    elif change == "hook":
        packed.weight_quantization.register_forward_hook(lambda module, args, output: -output)
    else:
        setattr(packed.weight_quantization, change, lambda weight: -weight)
    assert torch.equal(unpack(nn.Sequential(packed))(X), packed(X))
