"""QLinear equals bitorch 0.4.1 and the formula in csrc/DESIGN.md: interface, values, paths, and all kinds of input."""

import contextlib
import copy
import io
import math
import subprocess
import sys

import bitorch.quantizations as bitorch_quantizations
import pytest
import torch
from bitorch.layers import QLinear as BitorchQLinear
from support.calls import Calls
from support.devices import take_kernels_away
from support.reference import signs
from torch import nn

from bitorch_qlinear import QLinear, quantization_names, quantizations, register_quantization

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIGN_LIKE = ["sign", "approxsign", "swishsign", "steheaviside"]
ALL = [*SIGN_LIKE, "progressive_sign", "identity", "inputdorefa", "weightdorefa"]
NAN, INF = math.nan, math.inf

both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def packs(name, training):
    return name in SIGN_LIKE or (name == "progressive_sign" and not training)


def expected(x, layer, strict_input=False, strict_weight=False):
    """Return the output according to the formula in csrc/DESIGN.md."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    with torch.no_grad():
        y = (signs(x, strict_input) @ signs(layer.weight, strict_weight).T).to(wide)
        return (y if layer.bias is None else y + layer.bias.to(wide)).to(x.dtype)


def layer_like(k=45, n=7, *, bias=True, training=True, dtype=None, **options):
    return QLinear(k, n, bias=bias, dtype=dtype, **options).train(training)


# ---- bitorch ----


@both_modes
@pytest.mark.parametrize("weight_quantization", ALL)
@pytest.mark.parametrize("input_quantization", ALL)
def test_equals_bitorch(input_quantization, weight_quantization, training):
    k, n = 45, 7
    x = torch.randn(2, 5, k) * 2
    x[0, 0, :8] = torch.tensor([0.0, -0.0, 0.7, -0.7, 1.0, -1.0, INF, -INF])
    if input_quantization == "identity":
        x = x.clamp(-100, 100)
    grad = torch.randn(2, 5, n)
    # bitorch replaces None by its configured 1.0, so an infinite threshold is its way to have none.
    for bias, threshold in (("none", 0.7), ("integer", None), ("real", 1.3)):
        options = {"input_quantization": input_quantization, "weight_quantization": weight_quantization}
        theirs = BitorchQLinear(
            k, n, bias=bias != "none", gradient_cancellation_threshold=threshold or INF, **options
        ).train(training)
        if bias == "integer":
            nn.init.constant_(theirs.bias, -3)
        layer = layer_like(k, n, bias=bias != "none", training=training, **options)
        layer.activation.gradient_cancellation_threshold = threshold
        layer.load_state_dict(theirs.state_dict())
        results = []
        for module in (theirs, layer):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            with contextlib.redirect_stdout(io.StringIO()):  # bitorch's steheaviside prints to stdout
                results.append((y.detach(), torch.autograd.grad(y, [leaf, *module.parameters()], grad)))
        (want, want_gradients), (y, gradients) = results
        if bias == "real" and packs(input_quantization, training) and packs(weight_quantization, training):
            torch.testing.assert_close(y, want, rtol=0, atol=k * 2.0**-23)
        else:
            assert torch.equal(y, want)
        for ours, wanted in zip(gradients, want_gradients, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-5, equal_nan=True)


@both_modes
@pytest.mark.parametrize(
    ("name", "options"),
    [("SwishSign", {"beta": 2.5}), ("InputDoReFa", {"bits": 3}), ("SteHeaviside", {}), ("ApproxSign", {})],
)
def test_bitorchs_own_objects(name, options, training):
    def build(layer, module):
        torch.manual_seed(1)
        quantization = getattr(module, name)(**options)
        return layer(40, 6, input_quantization=quantization, gradient_cancellation_threshold=1.5).train(training)

    reference, ours = build(BitorchQLinear, bitorch_quantizations), build(QLinear, quantizations)
    theirs = build(QLinear, bitorch_quantizations)
    assert type(theirs.input_quantization).__module__.startswith("bitorch.")
    x, results = torch.randn(4, 40), []
    for module in (reference, ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        with contextlib.redirect_stdout(io.StringIO()):
            y.sum().backward()
        results.append((y, leaf.grad, module.weight.grad))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)
    with Calls() as ours_calls:
        ours(x)
    with Calls() as theirs_calls:
        theirs(x)
    assert ours_calls.names == theirs_calls.names


# ---- construction ----


def test_is_a_linear_with_its_initialisation():
    torch.manual_seed(3)
    linear = nn.Linear(33, 5)
    torch.manual_seed(3)
    layer = QLinear(33, 5)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (33, 5)
    assert type(layer.weight) is type(layer.bias) is nn.Parameter
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((33, 5, False, "cpu", torch.float64), {}),
        ((33, 5), {"bias": False, "device": "cpu", "dtype": torch.float64}),
        ((), {"in_features": 33, "out_features": 5, "bias": False, "dtype": torch.float64}),
    ],
)
def test_arguments_of_linear(args, kwargs):
    layer = QLinear(*args, input_quantization="swishsign", gradient_cancellation_threshold=2.0, **kwargs)
    assert layer.weight.shape == (5, 33)
    assert layer.weight.dtype is torch.float64
    assert layer.bias is None
    assert type(layer.input_quantization) is quantizations.SwishSign
    assert type(layer.weight_quantization) is quantizations.Sign
    assert layer.gradient_cancellation_threshold == 2.0


@pytest.mark.parametrize("name", ALL)
def test_quantizations_by_name_module_and_none(name):
    module = quantizations.get_quantization(name)
    layer = QLinear(4, 2, input_quantization=name, weight_quantization=module)
    assert type(layer.input_quantization) is type(module)
    assert layer.weight_quantization is module
    default = QLinear(4, 2)
    assert type(default.input_quantization) is type(default.weight_quantization) is quantizations.Sign
    assert default.gradient_cancellation_threshold is None


def test_registered_quantization(monkeypatch):
    monkeypatch.setattr(quantizations.registry, "_classes", dict(quantizations.registry._classes))

    @register_quantization
    class Halves(quantizations.Quantization):
        name, bit_width = "halves", 1

        def quantize(self, x):
            return x.sign() / 2

    layer = QLinear(40, 3, bias=False, input_quantization="halves")
    x = torch.randn(4, 40)
    assert torch.equal(layer(x), (x.sign() / 2) @ signs(layer.weight).float().T)


def test_scheduled_quantizer_of_bitorch():
    container = bitorch_quantizations.ScheduledQuantizer(
        [bitorch_quantizations.Identity(), bitorch_quantizations.Sign()], steps=2
    )
    layer = QLinear(40, 3, input_quantization=container)
    x = torch.randn(4, 40)
    with Calls() as calls:
        y = layer(x)
    assert calls.names == []
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight.sign(), layer.bias))


@pytest.mark.parametrize("argument", ["input_quantization", "weight_quantization"])
def test_wrong_quantizations(argument):
    with pytest.raises(ValueError, match="got 'sing'") as error:
        QLinear(4, 2, **{argument: "sing"})
    assert all(name in str(error.value) for name in quantization_names())
    with pytest.raises(TypeError, match="expected a name"):
        QLinear(4, 2, **{argument: 3})


@pytest.mark.parametrize("threshold", [-1.0, -1e-30, NAN, -INF])
def test_wrong_thresholds(threshold):
    with pytest.raises(ValueError, match="gradient_cancellation_threshold: expected None or a number >= 0"):
        QLinear(4, 2, gradient_cancellation_threshold=threshold)


def test_from_linear_requires_a_linear():
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear, got Conv2d"):
        QLinear.from_linear(nn.Conv2d(1, 1, 1))


def test_from_linear_shares_the_parameters():
    for bias in (True, False):
        linear = nn.Linear(40, 3, bias=bias, dtype=torch.float64).eval()
        layer = QLinear.from_linear(linear, weight_quantization="approxsign", gradient_cancellation_threshold=1)
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        assert not layer.training
        assert type(layer.weight_quantization) is quantizations.ApproxSign
        assert layer.gradient_cancellation_threshold == 1
        x = torch.randn(2, 40, dtype=torch.float64)
        assert torch.equal(layer(x), expected(x, layer))
        with torch.no_grad():
            linear.weight.neg_()
        assert torch.equal(layer(x), expected(x, layer))


@pytest.mark.parametrize(
    ("options", "training", "path"),
    [
        ({}, True, "packed ("),
        ({"input_quantization": "steheaviside", "gradient_cancellation_threshold": 1.25}, False, "packed ("),
        ({"weight_quantization": "identity"}, False, "float"),
        ({"input_quantization": "progressive_sign"}, True, "float"),
        ({"input_quantization": "progressive_sign"}, False, "packed ("),
    ],
)
def test_repr(options, training, path):
    layer = layer_like(4, 2, training=training, **options)
    text = repr(layer)
    assert text.startswith("QLinear(in_features=4, out_features=2, bias=True, ")
    assert f"input_quantization={layer.input_quantization!r}, weight_quantization={layer.weight_quantization!r}" in text
    assert f"gradient_cancellation_threshold={options.get('gradient_cancellation_threshold')}" in text
    assert f"path={path}" in text
    assert "\n" not in text
    assert text in repr(nn.Sequential(layer))


# ---- state dicts ----


class Scaled(bitorch_quantizations.Quantization):
    """A quantization that has a parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(()))
        self.register_buffer("steps", torch.randint(100, ()))

    def forward(self, x):
        return x.sign() * self.alpha


def test_state_dict_keys():
    assert list(QLinear(4, 2).state_dict()) == ["weight", "bias"]
    assert list(QLinear(4, 2, bias=False, input_quantization="swishsign").state_dict()) == ["weight"]
    assert [name for name, _ in QLinear(4, 2).named_parameters()] == ["weight", "bias"]
    options = {"input_quantization": Scaled(), "weight_quantization": Scaled()}
    assert set(QLinear(4, 2, **options).state_dict()) == set(BitorchQLinear(4, 2, **options).state_dict())


@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_load_both_ways(bias):
    def build():
        options = {"input_quantization": Scaled(), "weight_quantization": Scaled()}
        return (
            [QLinear(40, 3, bias=bias), nn.Linear(40, 3, bias=bias), BitorchQLinear(40, 3, bias=bias)],
            [QLinear(40, 3, bias=bias, **copy.deepcopy(options)), BitorchQLinear(40, 3, bias=bias, **options)],
        )

    for sources, targets in zip(build(), build(), strict=True):
        for source in sources:
            for target in targets:
                target.load_state_dict(source.state_dict())  # this is strict: no key may be missing or unexpected
                loaded = target.state_dict()
                assert all(torch.equal(value, loaded[key]) for key, value in source.state_dict().items())


# ---- the choice of a path ----


@both_modes
@pytest.mark.parametrize("weight_quantization", ALL)
@pytest.mark.parametrize("input_quantization", ALL)
def test_which_combinations_are_packed(input_quantization, weight_quantization, training):
    layer = layer_like(
        training=training, input_quantization=input_quantization, weight_quantization=weight_quantization
    )
    packed = packs(input_quantization, training) and packs(weight_quantization, training)
    x = torch.randn(3, 45)
    x[0, :4] = 0.0  # the rules differ at 0
    layer.weight.data[:, 4:8] = 0.0
    with Calls() as training_calls:
        y = layer(x)
    with torch.no_grad(), Calls() as inference_calls:
        if input_quantization in ("identity", "inputdorefa"):  # inference sums in another order
            torch.testing.assert_close(layer(x), y)
        else:
            assert torch.equal(layer(x), y)
    assert ("path=packed (" in repr(layer)) == packed
    assert training_calls.names[-1:] == ["linear_train"] * packed
    if input_quantization == "identity" and not training and packs(weight_quantization, training):
        assert inference_calls.names in ([], ["pack_bits", "multiply_signs"])
        assert "path=packed weights, real input" in repr(layer)
    elif input_quantization == "inputdorefa" and not training and packs(weight_quantization, training):
        assert inference_calls.names == ["pack_bits", "dorefa_linear"]
        assert "path=packed weights, 1-bit input" in repr(layer)
    else:
        assert inference_calls.names == ["sign_linear"] * packed
    assert bool(training_calls.names) == packed
    if packed:
        strict = (input_quantization == "steheaviside", weight_quantization == "steheaviside")
        assert torch.equal(y, expected(x, layer, *strict))


def test_progressive_sign_changes_the_path_with_the_mode():
    layer = QLinear(45, 7, input_quantization="progressive_sign")
    x = torch.randn(3, 45)
    for training in (True, False, True, False):
        layer.train(training)
        with Calls() as calls:
            y = layer(x)
        assert bool(calls.names) == (not training)
        if not training:
            assert torch.equal(y, expected(x, layer))


def test_beta_may_change_at_any_time():
    layer = QLinear(45, 7, input_quantization="swishsign")
    x = torch.randn(3, 45)
    gradients = []
    for beta in (5.0, 0.5):
        layer.input_quantization.beta = beta
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        gradients.append(leaf.grad / layer.input_quantization.rule().derivative(x))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", ["activation", "activation.activation_function", "weight_quantization"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_quantizations_are_called(where, kind):
    layer = QLinear(45, 7)
    x = torch.randn(3, 45, requires_grad=True)
    want = layer(x)
    called = []
    register = getattr(layer.get_submodule(where), f"register_{kind}_hook")
    handle = register(lambda *_: called.append(True))
    assert "path=float" in repr(layer)
    y = layer(x)
    y.sum().backward()
    assert called
    torch.testing.assert_close(y, want, rtol=0, atol=45 * 2.0**-23)
    handle.remove()
    assert "path=packed" in repr(layer)
    assert torch.equal(layer(x), want)
    assert len(called) == 1


def test_a_hook_on_a_quantization_changes_the_values():
    layer = QLinear(45, 7, bias=False).eval()
    x = torch.randn(3, 45)
    want = layer(x)
    layer.weight_quantization.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(layer(x), 2 * want)


def test_hooks_on_the_layer():
    layer = QLinear(45, 7)
    x = torch.randn(3, 45, requires_grad=True)
    want = layer(x)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: (-args[0],))
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append((grad_in, grad_out)))
    with Calls() as calls:
        y = layer(x)
    assert "linear_train" in calls.names
    torch.testing.assert_close(y, 2 * (2 * layer.bias - want))
    y.sum().backward()
    ((grad_in, grad_out),) = seen
    assert torch.equal(grad_in[0], -x.grad)
    assert torch.equal(grad_out[0], torch.ones(3, 7))  # torch captures this after the forward hooks


def test_replaced_modules_take_effect():
    layer = QLinear(45, 7).eval()
    x = torch.zeros(2, 45)
    assert torch.equal(layer(x), expected(x, layer))
    layer.activation.activation_function = quantizations.SteHeaviside()
    assert torch.equal(layer(x), expected(x, layer, strict_input=True))
    layer.weight_quantization = quantizations.SteHeaviside()
    nn.init.zeros_(layer.weight)
    assert torch.equal(layer(x), expected(x, layer, True, True))
    layer.activation = nn.Identity()
    assert torch.equal(layer(x), layer.bias.expand(2, 7))


def test_subclasses_of_quantizations_are_computed_by_their_own_forward():
    class Doubled(quantizations.Sign):
        def quantize(self, x):
            return 2 * super().quantize(x)

    layer = QLinear(45, 7, bias=False, input_quantization=Doubled())
    x = torch.randn(3, 45)
    with Calls() as calls:
        assert torch.equal(layer(x), 2 * expected(x, layer))
    assert calls.names == []


@both_modes
def test_float_fallback_on_a_device_without_kernels(monkeypatch, training):
    options = {"input_quantization": "steheaviside", "gradient_cancellation_threshold": 0.5}
    layer = layer_like(training=training, **options)
    x = torch.randn(3, 45, requires_grad=True)
    x.data[0, :3] = torch.tensor([0.0, NAN, 0.5])
    results = []
    for kernels in (True, False):
        if not kernels:
            take_kernels_away(monkeypatch)
        with Calls() as calls:
            y = layer(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        assert bool(calls.names) == kernels
        results.append((y, *gradients))
    for packed, computed in zip(*results, strict=True):
        torch.testing.assert_close(packed, computed, rtol=1e-5, atol=1e-4)
    assert "path=float (no kernels for cpu)" in repr(layer)


def test_meta_device():
    layer = QLinear(45, 7, device="meta")
    assert layer(torch.empty(3, 2, 45, device="meta")).shape == (3, 2, 7)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(3, 45)
    assert torch.equal(layer(x), expected(x, layer))


# ---- inputs ----


@both_modes
@every_dtype
@pytest.mark.parametrize("shape", [(45,), (1, 45), (0, 45), (3, 0, 45), (2, 3, 4, 45), (1, 1, 1, 1, 45)], ids=str)
def test_leading_dimensions(shape, dtype, training):
    layer = layer_like(dtype=dtype, training=training, weight_quantization="steheaviside")
    x = torch.randn(shape, dtype=dtype)
    y = layer(x)
    assert y.dtype is dtype
    assert y.shape == nn.Linear(45, 7, dtype=dtype)(x).shape
    assert torch.equal(y, expected(x, layer, strict_weight=True))
    y.sum().backward()
    assert layer.weight.grad.dtype is layer.bias.grad.dtype is dtype


VIEWS = {
    "transposed": lambda x: x.transpose(0, 1),
    "every-other-row": lambda x: x[::2],
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "columns": lambda x: x.movedim(2, 0).contiguous().movedim(0, 2),
    "offset": lambda x: torch.cat([x, x], 2)[..., 3:48],
    "strided-elements": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "one-number": lambda x: x.flatten()[0].expand(2, 45),
    "flipped": lambda x: x.flip(2),
}


@both_modes
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view, training):
    layer = layer_like(training=training, gradient_cancellation_threshold=0.8)
    x = VIEWS[view](torch.randn(4, 3, 45))
    results = []
    for each in (x.detach(), x.clone(memory_format=torch.contiguous_format)):
        leaf = each.requires_grad_()
        y = layer(leaf)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, layer.weight])))
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][0], expected(x, layer))


@every_dtype
@pytest.mark.parametrize(("name", "strict"), [("sign", False), ("steheaviside", True)])
def test_special_values(name, strict, dtype):
    tiny = torch.finfo(dtype).smallest_normal / 4  # a denormal
    values = [0.0, -0.0, NAN, -NAN, INF, -INF, tiny, -tiny, torch.finfo(dtype).max, -torch.finfo(dtype).max]
    x = torch.tensor(values, dtype=dtype)
    x[3] = x[3].copysign(torch.tensor(-1.0, dtype=dtype))
    layer = QLinear(1, 1, bias=False, dtype=dtype, input_quantization=name, weight_quantization=name).eval()
    zero = -1 if strict else 1
    want = torch.tensor([zero] * 4 + [1, -1] * 3, dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    layer.weight = nn.Parameter(one)
    assert torch.equal(layer(x.unsqueeze(1)).squeeze(1), want)
    layer = QLinear(1, 10, bias=False, dtype=dtype, input_quantization=name, weight_quantization=name).eval()
    layer.weight = nn.Parameter(x.unsqueeze(1))
    assert torch.equal(layer(one).squeeze(0), want)


@both_modes
@every_dtype
def test_bias_carries_nan_and_infinities(dtype, training):
    layer = layer_like(5, 3, dtype=dtype, training=training)
    layer.bias.data = torch.tensor([NAN, INF, -INF], dtype=dtype)
    y = layer(torch.randn(2, 5, dtype=dtype))
    assert torch.equal(y.nan_to_num(7.0), layer.bias.detach().expand(2, 3).nan_to_num(7.0))


def test_float16_overflows_to_infinity():
    layer = QLinear(70_000, 1, bias=False, dtype=torch.float16).eval()
    nn.init.ones_(layer.weight)
    x = torch.ones(1, 70_000, dtype=torch.float16)
    assert layer(x).item() == INF
    assert layer(-x).item() == -INF


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@both_modes
@pytest.mark.parametrize(("k", "n"), [(0, 3), (3, 0), (0, 0)])
def test_layers_without_features(k, n, training):
    layer = layer_like(k, n, training=training)
    nn.init.constant_(layer.bias, 2.0)
    x = torch.randn(4, k, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, (x @ layer.weight.T + layer.bias))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.shape == layer.weight.shape


@both_modes
@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.randn(3, 44), "44"),
        (torch.randn(()), "dimension"),
        (torch.ones(3, 45, dtype=torch.int64), "float"),
        (torch.ones(3, 45, dtype=torch.complex64), "float"),
    ],
    ids=["width", "scalar", "int64", "complex"],
)
def test_wrong_inputs(x, what, training):
    with pytest.raises(RuntimeError, match=f"x: expected.*{what}"):
        layer_like(training=training)(x)


# ---- threshold ----


def gradient_is_kept(layer, x):
    """Return a mask of the elements of x whose gradient is not 0."""
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(torch.ones(*x.shape[:-1], layer.out_features, dtype=x.dtype))
    return leaf.grad != 0


@every_dtype
@pytest.mark.parametrize("name", ["sign", "steheaviside"])
@pytest.mark.parametrize("threshold", [0.1, 0.7, 1.0, 1.3, 1000.06, INF, 1e-30])
def test_threshold_is_compared_in_the_dtype_of_x(threshold, name, dtype):
    at = torch.tensor(threshold, dtype=dtype)
    beside = [at, at.nextafter(at.new_tensor(INF)), at.nextafter(at.new_tensor(-INF))] if dtype in DTYPES[:2] else [at]
    if dtype not in DTYPES[:2] and threshold < 60000 and at > 0:
        beside += [at * (1 + 2 * torch.finfo(dtype).eps), at * (1 - torch.finfo(dtype).eps)]
    values = torch.stack([*beside, at.new_tensor(0.0), at.new_tensor(1.0), at.new_tensor(INF), at.new_tensor(NAN)])
    x = torch.cat([values, -values]).unsqueeze(0)
    # With a single output, g · s(W) is never 0, so a zero gradient comes from the mask.
    layer = QLinear(x.shape[1], 1, dtype=dtype, input_quantization=name, gradient_cancellation_threshold=threshold)
    mask = x.abs() <= threshold  # torch rounds the scalar to the dtype of x
    if name == "steheaviside":
        mask &= x.abs() <= 1
    assert torch.equal(gradient_is_kept(layer, x), mask)
    assert bool(mask[0, 0]) == (name == "sign" or threshold <= 1)  # a value equal to the threshold is in range


@pytest.mark.parametrize("threshold", [None, 0, 0.0])
def test_no_threshold_cancels_nothing(threshold):
    x = torch.tensor([[0.0, 5.0, -1e30, INF, NAN]])
    layer = QLinear(5, 1, gradient_cancellation_threshold=threshold)
    assert gradient_is_kept(layer, x).all()
    layer = QLinear(5, 1, input_quantization="steheaviside", gradient_cancellation_threshold=threshold)
    assert gradient_is_kept(layer, x).tolist() == [[True, False, False, False, False]]


def test_threshold_may_change_at_any_time():
    x = torch.tensor([[0.5, 1.5]])
    layer = QLinear(2, 1)
    for threshold, kept in ((None, [True, True]), (1.0, [True, False]), (0.1, [False, False])):
        layer.activation.gradient_cancellation_threshold = threshold
        assert gradient_is_kept(layer, x).tolist() == [kept]


# ---- the warning ----

WARNED = """
import warnings, torch
from torch import nn
from bitorch_qlinear import QLinear, pack

def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    ours = [w for w in caught if "bitorch_qlinear" in str(w.message)]
    assert all(w.filename == __file__ for w in ours), [w.filename for w in ours]
    return [str(w.message) for w in ours]

large, small = QLinear(1024, 1024).eval(), QLinear(64, 64).eval()
row, rows = torch.randn(1, 1024), torch.randn(512, 1024)
no_grad = torch.no_grad()
quiet = {
    "training": lambda: no_grad(QLinear(1024, 1024))(row),
    "gradients of weights": lambda: large(row),
    "gradient of x": lambda: QLinear(1024, 1024).requires_grad_(False).eval()(row.clone().requires_grad_()),
    "many rows": lambda: no_grad(large)(rows),
    "many rows of more dimensions": lambda: no_grad(large)(rows.reshape(2, 256, 1024)),
    "no rows": lambda: no_grad(small)(torch.randn(0, 64)),
    "few weights": lambda: no_grad(small)(torch.randn(1, 64)),
    "packed": lambda: no_grad(pack(large))(row),
    "compiled": lambda: no_grad(torch.compile(large, backend="eager", fullgraph=True))(row),
    "exported": lambda: torch.export.export(QLinear(1024, 1024).requires_grad_(False).eval(), (row,)),
}
for name, call in quiet.items():
    assert said(call) == [], (name, said(call))
def calls():
    with torch.no_grad():
        for _ in range(3):
            large(row)

(message,) = said(calls)
assert "bitorch_qlinear.pack(model)" in message and message.count(". ") == 0, message
assert said(lambda: no_grad(QLinear(2048, 2048).eval())(torch.randn(2, 2048))) == []
"""


@pytest.mark.slow
def test_a_call_that_mostly_packs_warns_once_per_process(tmp_path):
    (tmp_path / "program.py").write_text(WARNED)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
