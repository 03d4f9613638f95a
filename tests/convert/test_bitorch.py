"""bitorch's models compute the same after bitorch.convert and after pack, and keep what belongs to them."""

import copy
import gc
import importlib
import io
import pickle
import subprocess
import sys
import warnings
import weakref

import bitorch
import bitorch.layers
import bitorch.quantizations
import pytest
import torch
from bitorch import RuntimeMode
from bitorch.layers.config import config
from bitorch.layers.extensions import CustomImplementationMixin
from bitorch.layers.extensions.layer_container import LayerContainer
from bitorch.layers.qlinear import QLinearBase
from bitorch.layers.register import (
    QConv2dImplementation,
    QLinearImplementation,
    all_layer_registries,
    q_conv2d_registry,
    q_linear_registry,
)
from bitorch.models import DLRM, LeNet
from bitorch.quantizations import Quantization_Scheduler
from bitorch.quantizations.quantization_scheduler import MixLinearScheduling, ScheduledQuantizer, StepScheduling
from support.calls import Calls
from support.reference import assert_equal
from torch import nn
from torch.nn.utils import prune

import bitorch_qlinear.bitorch as plugin
from bitorch_qlinear import PackedQLinear, QLinear, binarize, explain, explain_binarize, pack, unpack

MODES = [RuntimeMode.CPU, RuntimeMode.GPU, RuntimeMode.INFERENCE_AUTO]
K, N = 70, 9
X = torch.linspace(-1, 1, 3 * K).reshape(3, K).mul(1e3).sin()

every_mode = pytest.mark.parametrize("mode", MODES, ids=str)
either_place = pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])


@pytest.fixture(autouse=True)
def _restore_bitorch():
    settings = dict(vars(config))
    registries = all_layer_registries()
    before = [(set(each.layer_implementations), set(each._instance_recipes)) for each in registries]
    plugin.register()
    yield
    bitorch.mode = RuntimeMode.DEFAULT
    for name in set(vars(config)) - set(settings):
        delattr(config, name)
    vars(config).update(settings)
    for registry, (implementations, recipes) in zip(registries, before, strict=True):
        registry.layer_implementations = implementations
        registry._instance_recipes = recipes


# ---- bitorch's own models ----


class Mlp(nn.Module):
    """The network that bitorch's example trains on MNIST: one binary layer between two real ones."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act1, self.bn1 = nn.Linear(784, 256), nn.PReLU(), nn.BatchNorm1d(256)
        self.fc2, self.act2, self.bn2 = bitorch.layers.QLinear(256, 128, bias=False), nn.PReLU(), nn.BatchNorm1d(128)
        self.fc3 = nn.Linear(128, 10)

    def forward(self, x):
        x = self.bn1(self.act1(self.fc1(x.flatten(1))))
        return self.fc3(self.bn2(self.act2(self.fc2(x)))).log_softmax(1)


def mlp():
    return Mlp(), (torch.randn(5, 1, 28, 28),)


def lenet():
    return LeNet([1, 1, 28, 28], 10), (torch.randn(3, 1, 28, 28),)


def dlrm():
    model = DLRM(13, [20, 30], bottom_mlp_layer_sizes=[64, 32], top_mlp_layer_sizes=[48, 1], binary_bottom_mlp=True)
    categories = torch.stack([torch.randint(20, (6,)), torch.randint(30, (6,))])
    return model, (torch.randn(6, 13), (categories, torch.arange(6).expand(2, 6)))


every_model = pytest.mark.parametrize("make", [mlp, lenet, dlrm], ids=lambda make: make.__name__)


def settled(make):
    """Return a model in eval mode whose batch norms have seen values, with its arguments and its output."""
    model, args = make()
    with torch.no_grad():
        model(*args)
        model.eval()
        return model, args, model(*args)


def assert_same(got, want, make):
    """Assert equality; bitorch's LeNet has a bias, which its product adds in another order."""
    if make is lenet:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    else:
        assert_equal(got, want)


@every_model
@every_mode
def test_bitorchs_models_compute_the_same_after_conversion(make, mode):
    model, args, want = settled(make)
    theirs = sum(isinstance(module, QLinearBase) for module in model.modules())
    bitorch.convert(model, mode)
    ours = [module for module in model.modules() if type(module) is plugin.QLinear]
    assert len(ours) == theirs > 0
    with torch.no_grad(), Calls() as calls:
        got = model(*args)
    assert calls.names.count("sign_linear") == theirs
    assert_same(got, want, make)


@every_model
@either_place
def test_bitorchs_models_compute_the_same_packed(make, inplace):
    model, args, want = settled(make)
    assert all(layer.packable and layer.kind == "bitorch QLinear" for layer in explain(model))
    packed = pack(model, inplace=inplace)
    assert all(layer.kind == "PackedQLinear" for layer in explain(packed))
    assert len(explain(packed)) == len(explain(pack(model)))
    with torch.no_grad():
        assert_same(packed(*args), want, make)


@every_model
def test_converted_models_pack(make):
    model, args, _ = settled(make)
    bitorch.convert(model, RuntimeMode.INFERENCE_AUTO)
    with torch.no_grad():
        want = model(*args)
        packed = pack(model)
        assert {layer.kind for layer in explain(model)} == {"QLinear"}
        assert {layer.kind for layer in explain(packed)} == {"PackedQLinear"}
        assert_equal(packed(*args), want)


@every_model
def test_converted_models_train_the_same(make):
    torch.manual_seed(3)
    model, args = make()
    theirs = copy.deepcopy(model.state_dict())
    gradients = []
    for convert in (False, True):
        model.load_state_dict(theirs)
        parameters = dict(model.named_parameters())
        if convert:
            bitorch.convert(model, RuntimeMode.CPU)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        model.zero_grad()
        model(*args).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5 * largest)


class Mixed(bitorch.models.Model):
    """A convolution and a linear layer, each of them reachable by two names."""

    def __init__(self):
        super().__init__([1, 1, 28, 28], 10)
        self.convolution = bitorch.layers.QConv2d(1, 8, 3, 1, 1)
        self.linear = bitorch.layers.QLinear(784, 64)
        parts = self.convolution, nn.Conv2d(8, 1, 3, 1, 1), nn.Flatten(), self.linear, nn.Linear(64, 10)
        self._model = nn.Sequential(*parts)


@every_mode
def test_models_with_convolutions_convert(mode):
    """What bitorch's own test of a converted model asks of an implementation, convolutions included."""
    model = Mixed()
    x = torch.rand(2, 1, 28, 28)
    want, convolution = model(x), model.convolution.layer_implementation
    assert model.convert(mode) is model
    assert type(model.linear.layer_implementation) is plugin.QLinear
    assert model.convolution.layer_implementation is convolution
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("number", [1, 2, 3])
@every_mode
def test_convolutions_are_bitorchs_own(number, mode):
    cls = getattr(bitorch.layers, f"QConv{number}d")
    theirs = cls(2, 4, 3, padding=1)
    with bitorch.change_mode(mode):
        made = cls(2, 4, 3, padding=1)
    assert type(made.layer_implementation) is getattr(plugin, f"QConv{number}d")
    made.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 2, *[6] * number)
    assert_equal(made(x), theirs(x))


# ---- one layer ----


def test_bias_is_added_exactly():
    layer = bitorch.layers.QLinear(K, N)
    want = layer(X)
    bitorch.convert(layer, RuntimeMode.CPU)
    assert type(layer.layer_implementation) is plugin.QLinear
    assert (layer(X) - want).abs().max() <= K * 2**-23
    assert_equal(layer(X), X.sign() @ layer.weight.detach().sign().T + layer.bias)


@pytest.mark.parametrize("arguments, named", [((K, N, False), {}), ((K, N), {"bias": False}), ((K, N), {})])
def test_positional_bias(arguments, named):
    """A recipe loses a positional bias, which bitorch looks for at another place."""
    layer = bitorch.layers.QLinear(*arguments, **named)
    biased = layer.bias is not None
    want = layer(X)
    bitorch.convert(layer, RuntimeMode.CPU)
    assert (layer.bias is not None) is biased is (not named and len(arguments) == 2)
    torch.testing.assert_close(layer(X), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_the_layer_has_become_counts(dtype):
    """The recipe knows how the layer was made, not what has happened since."""
    layer = bitorch.layers.QLinear(K, N, device="meta")
    layer.to_empty(device="cpu").to(dtype)
    layer.weight = nn.Parameter(torch.randn(N, K, dtype=dtype), requires_grad=False)
    layer.bias = None
    layer.note = "kept"
    layer.eval()
    want = layer(X.to(dtype))
    bitorch.convert(layer, RuntimeMode.CPU)
    assert_equal(layer(X.to(dtype)), want)
    inner = layer.layer_implementation
    assert (inner.note, inner.training, inner.activation.training) == ("kept", False, False)
    assert not inner.weight.requires_grad and inner.weight.dtype is dtype


@pytest.mark.parametrize(
    "given, configured, expected",
    [
        (None, 1.0, 1.0),
        (0, 1.0, 1.0),
        (0.5, 1.0, 0.5),
        (-1.0, 1.0, None),
        (None, 0.25, 0.25),
        (None, 0, None),
        (None, -1.0, None),
        (float("inf"), 1.0, float("inf")),
    ],
)
@pytest.mark.parametrize("how", ["convert", "make", "pack"])
def test_threshold(given, configured, expected, how):
    """None means the configuration's, and a negative threshold is bitorch's way to have none."""
    config.gradient_cancellation_threshold = configured
    with bitorch.change_mode(RuntimeMode.CPU if how == "make" else RuntimeMode.DEFAULT):
        layer = bitorch.layers.QLinear(K, N, gradient_cancellation_threshold=given)
    config.gradient_cancellation_threshold = 0.125  # a later value does not count
    layer = bitorch.convert(layer, RuntimeMode.CPU) if how == "convert" else pack(layer) if how == "pack" else layer
    assert layer.gradient_cancellation_threshold == expected
    x = torch.tensor([[0.2, 0.4, 0.9, 1.5, -3.0] * 14], requires_grad=True)
    layer(x).sum().backward()
    assert_equal(x.grad != 0, (x.abs() <= (expected or float("inf"))) & (layer_gradient(layer) != 0))


def layer_gradient(layer):
    """Return the gradient of the sum of the outputs, without a threshold."""
    weight = layer.unpack().weight if isinstance(layer, PackedQLinear) else layer.weight
    return weight.detach().sign().sum(0)


def test_configured_quantizations():
    config.input_quantization, config.weight_quantization = "steheaviside", "approxsign"
    with bitorch.change_mode(RuntimeMode.CPU):
        layer = bitorch.layers.QLinear(K, N)
        named = bitorch.layers.QLinear(
            K, N, input_quantization="swishsign", weight_quantization=QLinear(1, 1).activation
        )
    assert type(layer.input_quantization) is bitorch.quantizations.SteHeaviside
    assert type(layer.weight_quantization) is bitorch.quantizations.ApproxSign
    assert type(named.input_quantization) is bitorch.quantizations.SwishSign
    assert type(layer.layer_implementation) is plugin.QLinear
    with bitorch.change_mode(RuntimeMode.CPU), pytest.raises(ValueError, match="sing"):
        bitorch.layers.QLinear(K, N, input_quantization="sing")


@pytest.mark.parametrize("name", ["sign", "approxsign", "swishsign", "steheaviside", "identity", "inputdorefa"])
def test_quantizations_stay_the_same_objects(name):
    layer = bitorch.layers.QLinear(K, N, input_quantization=name, bias=False)
    quantizations = layer.input_quantization, layer.weight_quantization
    want = layer(X)
    bitorch.convert(layer, RuntimeMode.CPU)
    assert (layer.input_quantization, layer.weight_quantization) == quantizations
    torch.testing.assert_close(layer(X), want)


def test_conversion_of_a_converted_layer():
    layer = bitorch.layers.QLinear(K, N)
    bitorch.convert(layer, RuntimeMode.CPU)
    inner = layer.layer_implementation
    bitorch.convert(layer, RuntimeMode.GPU)
    assert layer.layer_implementation is inner


def test_checkpoints_go_both_ways():
    theirs, args, want = settled(mlp)
    saved = io.BytesIO()
    torch.save(theirs.state_dict(), saved)
    saved.seek(0)
    with bitorch.change_mode(RuntimeMode.CPU):
        ours = Mlp().eval()
    packed = pack(Mlp().eval())
    for model in (ours, packed):
        model.load_state_dict(torch.load(copy.deepcopy(saved)))
        assert_equal(model(*args), want)
    back = Mlp().eval()
    back.load_state_dict(ours.state_dict())
    assert_equal(back(*args), want)


# ---- layers that cannot be converted, or packed ----


class OwnForward(QLinearBase):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnActivation(bitorch.layers.QActivation):
    pass


def with_a_hook(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)


def with_a_hook_on_the_activation(layer):
    layer.activation.register_forward_pre_hook(lambda module, args: (args[0] - 1,))


def with_a_state_hook(layer):
    layer.register_state_dict_pre_hook(lambda module, prefix, keep: None)


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def with_an_adapter(layer):
    layer.adapter = nn.Linear(2, 2)


def with_a_buffer(layer):
    layer.register_buffer("seen", torch.zeros(1))


def with_a_patched_forward(layer):
    layer.forward = lambda x: x


def with_another_activation(layer):
    layer.activation = OwnActivation()


UNFIT = {
    with_a_hook: "it has hooks (with_a_hook",
    with_a_hook_on_the_activation: "its activation has hooks",
    with_a_state_hook: "it has hooks (of backward or state_dict)",
    with_an_adapter: "of its own (adapter)",
    with_a_buffer: "of its own (seen)",
    with_a_patched_forward: "has a forward of its own",
    with_another_activation: "its activation is a OwnActivation",
    pruned: "its weight is computed from other tensors: call torch.nn.utils.prune.remove",
}


@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_reasons(change):
    with bitorch.pause_wrapping():
        plain = bitorch.layers.QLinear(K, N)
    wrapped = bitorch.layers.QLinear(K, N)
    for layer in (plain, wrapped.layer_implementation):
        change(layer)
    (report,) = explain(nn.Sequential(plain))
    assert UNFIT[change] in report.reason and not report.packable and report.path == "float (by bitorch)"
    before = wrapped.layer_implementation
    with pytest.raises(RuntimeError, match="unavailable because") as error:
        bitorch.convert(wrapped, RuntimeMode.CPU)
    assert UNFIT[change] in str(error.value)
    assert wrapped.layer_implementation is before
    model = nn.Sequential(plain)
    assert pack(model, inplace=True)[0] is plain


def test_own_forward():
    (report,) = explain(nn.Sequential(OwnForward(K, N)))
    assert report.reason == "OwnForward has a forward of its own"


def test_other_implementations_are_not_converted():
    @QLinearImplementation(RuntimeMode.CPU)
    class Other(CustomImplementationMixin, nn.Linear):
        @classmethod
        def can_clone(cls, recipe):
            return False, "never"

    assert plugin.QLinear.can_clone(LayerContainer(Other, K, N).recipe) == (
        False,
        "expected bitorch's own QLinear, got Other",
    )


# ---- pack and binarize through containers ----


def containers(model):
    """Return all containers that a model's modules hold."""
    return [child for module in model.modules() for child in module._modules.values() if type(child) is LayerContainer]


@pytest.mark.parametrize("convert", [True, False], ids=["converted", "unconverted"])
def test_copies_have_no_containers(convert):
    model = nn.Sequential(Mixed(), bitorch.layers.QLinear(10, 6, input_quantization="inputdorefa")).eval()
    if convert:
        bitorch.convert(model, RuntimeMode.CPU)
    with pytest.raises(KeyError):
        copy.deepcopy(model)
    packed = pack(model)
    assert len(containers(model)) == 5
    assert containers(packed) == []
    x = torch.rand(2, 1, 28, 28)
    want = packed(x)
    torch.testing.assert_close(want, model(x))
    assert_equal(copy.deepcopy(packed)(x), want)
    if not convert:
        assert_equal(pickle.loads(pickle.dumps(packed))(x), want)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    assert_equal(packed(x), want)


def test_copies_keep_what_is_shared():
    convolution = bitorch.layers.QConv2d(3, 3, 1)
    model = nn.Sequential(convolution, nn.Sequential(bitorch.layers.QConv2d(3, 3, 1), convolution))
    model[1][0].weight = convolution.weight
    model[1][0].twin = nn.ModuleList([convolution])
    copied = pack(model)
    assert copied[0] is copied[1][1] is copied[1][0].twin[0]
    assert copied[0].weight is copied[1][0].weight is not convolution.weight
    assert containers(copied) == []


def test_copies_of_containers_in_containers():
    inner = bitorch.layers.QConv2d(3, 3, 1)
    model = nn.Sequential(LayerContainer(nn.Sequential, inner, nn.ReLU()), nn.ReLU())
    copied = pack(model)
    assert containers(copied) == []
    x = torch.randn(1, 3, 2, 2)
    assert_equal(copied(x), model(x))


def test_modules_with_another_list_of_modules_are_no_containers():
    class Partial(nn.Sequential):
        def modules(self):
            return iter(self._modules.values())

    model = nn.Sequential(Partial(nn.Hardtanh(), nn.ReLU()), QLinear(K, K))
    copied = pack(model)
    assert type(copied[0]) is Partial
    assert_equal(copied(X), model(X))


@either_place
def test_layers_that_cannot_be_replaced(inplace, caplog):
    class Stubborn(nn.Sequential):
        def register_module(self, name, module):
            if name not in self._modules:
                super().register_module(name, module)

        def __deepcopy__(self, memo):
            return Stubborn(*self)

    with bitorch.pause_wrapping():
        model = Stubborn(bitorch.layers.QLinear(K, N))
    result = pack(model, inplace=inplace)
    assert [layer.kind for layer in explain(result)] == ["bitorch QLinear"]
    assert "0 stays as it is: the module that holds it does not let it be replaced" in caplog.text


@either_place
def test_containers_as_the_model(inplace):
    layer = bitorch.layers.QLinear(K, N, bias=False, input_quantization=bitorch.quantizations.InputDoReFa(3))
    result = pack(layer, inplace=inplace)
    assert_equal(result(X), layer(X))
    assert type(result) is (LayerContainer if inplace else type(layer.layer_implementation))
    packable = bitorch.layers.QLinear(K, N, bias=False)
    want = packable(X)
    packed = pack(packable, inplace=inplace)
    assert type(packed) is PackedQLinear
    assert_equal(packed(X), want)


def test_pack_in_place_frees_the_weights():
    """bitorch keeps every container that it has made."""
    model = nn.Sequential(bitorch.layers.QLinear(K, N), nn.Identity())
    bitorch.convert(model, RuntimeMode.CPU)
    alone = bitorch.layers.QLinear(K, N)
    weights = [weakref.ref(model[0].weight), weakref.ref(alone.weight)]
    pack(model, inplace=True)
    pack(alone, inplace=True)
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


@every_mode
def test_packed_models_stay_packed(mode):
    model = nn.Sequential(Mixed()).eval()
    pack(model, inplace=True)
    x = torch.rand(2, 1, 28, 28)
    want = model(x)
    bitorch.convert(model, mode)
    assert [layer.kind for layer in explain(model)] == ["PackedQLinear"]
    assert_equal(model(x), want)


def test_unpack_gives_our_layer():
    model, args, want = settled(mlp)
    restored = unpack(pack(model))
    assert type(restored.fc2) is QLinear
    assert_equal(restored(*args), want)


@either_place
def test_binarize_through_containers(inplace):
    parts = bitorch.layers.QConv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), bitorch.layers.QLinear(8, 8)
    model = nn.Sequential(*parts, nn.Linear(8, 2))
    report = {layer.name: layer for layer in explain_binarize(model)}
    assert report["2"].replaced and report["3"].binary and "last layer" in report["4"].reason
    result = binarize(model, inplace=inplace)
    assert (result is model) is inplace
    assert type(result[2]) is QLinear
    assert len(containers(result)) == (2 if inplace else 0)
    assert result.eval()(torch.randn(2, 1, 4, 4)).shape == (2, 2)


def test_reports_and_packing_do_not_change_the_model():
    """The modes of bitorch's quantizations may differ from their layer's."""
    layer = bitorch.layers.QLinear(K, N, input_quantization="progressive_sign")
    layer.input_quantization.eval()
    modes = {name: module.training for name, module in layer.named_modules()}
    parameters = list(layer.parameters())
    pack(layer)
    assert {name: module.training for name, module in layer.named_modules()} == modes
    assert all(mine is theirs for mine, theirs in zip(layer.parameters(), parameters, strict=True))


def test_tied_layers_stay_tied():
    first, second = bitorch.layers.QLinear(K, K), bitorch.layers.QLinear(K, K)
    second.weight = first.weight
    packed = pack(nn.Sequential(first, second))
    assert packed[0].weight is packed[1].weight


# ---- registration ----


def another_implementation(modes, decorator=QLinearImplementation, base=QLinearBase):
    """Register an implementation as another package would."""

    class Other(CustomImplementationMixin, base):
        @classmethod
        def can_clone(cls, recipe):
            return True, ""

        @classmethod
        def create_clone_from(cls, recipe, device=None):
            return cls(*recipe.args, **recipe.kwargs)

    return decorator(modes)(Other)


def implementations(mode, registry=q_linear_registry):
    """Return the classes of which bitorch takes any for a mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {each.class_ for each in registry.layer_implementations if each.supports_mode(mode)}


def test_a_second_implementation_is_reported():
    other = another_implementation(RuntimeMode.CPU)
    layer = bitorch.layers.QLinear(K, N)
    with pytest.warns(RuntimeWarning, match=r"any of its 2 implementations .* the mode cpu, .*Other supports it"):
        bitorch.convert(layer, RuntimeMode.CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bitorch.convert(layer, RuntimeMode.DEFAULT)
        bitorch.convert(bitorch.layers.QLinear(K, N), RuntimeMode.GPU)
        plugin.register(exclusive=True)
        bitorch.convert(layer, RuntimeMode.CPU)
    assert type(layer.layer_implementation) is plugin.QLinear
    assert other not in implementations(RuntimeMode.CPU)


def test_exclusive_takes_only_these_modes():
    other = another_implementation(RuntimeMode.CPU.value + RuntimeMode.DEFAULT.value)
    assert other in implementations(RuntimeMode.CPU) and plugin.QLinear in implementations(RuntimeMode.CPU)
    plugin.register(exclusive=True)
    assert implementations(RuntimeMode.CPU) == {plugin.QLinear}
    assert other in implementations(RuntimeMode.DEFAULT)
    assert plugin.QLinear not in implementations(RuntimeMode.DEFAULT) | implementations(RuntimeMode.RAW)
    plugin.register()
    assert implementations(RuntimeMode.CPU) == {plugin.QLinear}


def test_convolutions_of_other_packages_are_taken():
    other = another_implementation(RuntimeMode.CPU, QConv2dImplementation, bitorch.layers.QConv2dBase)
    for exclusive in (False, True):
        plugin.register(exclusive=exclusive)
        assert implementations(RuntimeMode.CPU, q_conv2d_registry) == {other}
        assert implementations(RuntimeMode.GPU, q_conv2d_registry) == {plugin.QConv2d}


def test_registering_again_changes_nothing():
    registries = all_layer_registries()
    before = [set(each.layer_implementations) for each in registries]
    plugin.register()
    importlib.import_module("bitorch_qlinear.bitorch")
    assert [set(each.layer_implementations) for each in registries] == before
    for registry in registries:
        registry.unregister_custom_implementations()
    with pytest.raises(RuntimeError, match="No implementations"):
        bitorch.convert(bitorch.layers.QLinear(K, N), RuntimeMode.CPU)
    plugin.register()
    assert [set(each.layer_implementations) for each in registries] == before


RELOADED = """
import importlib, warnings
import bitorch, bitorch.layers, bitorch_qlinear.bitorch as plugin
from bitorch.layers.register import all_layer_registries
layer = bitorch.layers.QLinear(8, 8)
bitorch.convert(layer, bitorch.RuntimeMode.CPU)
counts = [len(registry.layer_implementations) for registry in all_layer_registries()]
importlib.reload(plugin)
assert [len(registry.layer_implementations) for registry in all_layer_registries()] == counts == [2] * 4
warnings.simplefilter("error")
bitorch.convert(layer, bitorch.RuntimeMode.GPU)
layer = bitorch.layers.QLinear(8, 8)
bitorch.convert(layer, bitorch.RuntimeMode.CPU)
assert type(layer.layer_implementation) is plugin.QLinear
"""

WITHOUT = """
import sys
import bitorch_qlinear
assert not [name for name in sys.modules if name.split(".")[0] == "bitorch"]
sys.modules["bitorch"] = None
try:
    import bitorch_qlinear.bitorch
except ImportError as error:
    assert "bitorch_qlinear.bitorch: expected bitorch 0.4 or later to be installed" in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.parametrize("program", [RELOADED, WITHOUT], ids=["reloaded", "without-bitorch"])
def test_imports(program):
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "version, fits", [("0.3.9", False), ("0.4.0", True), ("0.4", True), ("0.10.1", True), ("1", True)]
)
def test_versions(version, fits):
    if fits:
        plugin._check_version(version)
    else:
        with pytest.raises(ImportError, match=r"expected bitorch 0\.4 or later, got 0\.3\.9"):
            plugin._check_version(version)


# ---- schedules ----


def scheduled(steps, quantizations, procedure):
    """Return a model whose quantizations are scheduled, the scheduler, and bitorch's model after the schedule."""
    model = nn.Sequential(bitorch.layers.QLinear(K, N, bias=False), nn.BatchNorm1d(N)).eval()
    scheduler = Quantization_Scheduler(model, steps, quantizations, procedure, schedule_all_quantizations=True)
    return model, scheduler


@pytest.mark.parametrize("procedure", ["mix_linear", "step"])
@pytest.mark.parametrize("convert", [True, False], ids=["converted", "unconverted"])
def test_a_finished_schedule_is_its_last_quantization(procedure, convert):
    model, scheduler = scheduled(3, [bitorch.quantizations.Identity(), bitorch.quantizations.Sign()], procedure)
    if convert:
        bitorch.convert(model, RuntimeMode.CPU)
    assert type(model[0].activation.activation_function) is not bitorch.quantizations.Sign
    for _ in range(3):
        assert not explain(model).layers[0].packable
        scheduler.step()
    assert explain(model).layers[0].packable
    scheduler.step()
    want = model(X)
    packed = pack(model)
    assert type(packed[0]) is PackedQLinear
    assert_equal(packed(X), want)
    if convert:
        with Calls() as calls:
            model(X)
        assert calls.names


@pytest.mark.parametrize("cls", [MixLinearScheduling, StepScheduling, ScheduledQuantizer])
@pytest.mark.parametrize("last", ["sign", "steheaviside", "approxsign", "progressive_sign", "inputdorefa", "identity"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("steps", range(4))
def test_schedules_compute_the_same_at_every_step(cls, last, steps, training):
    """Also at every step before the last, and in the class that bitorch schedules others by, which computes nothing."""
    build = bitorch.quantizations.quantization_from_name
    schedule = cls([build("identity")(), build("swishsign")(), build(last)()], 3)
    schedule.quantizations[-1].train(training)
    for _ in range(steps):
        schedule.step()
    layers = []
    with bitorch.pause_wrapping():
        layers.append(bitorch.layers.QLinear(K, N, bias=False, input_quantization=schedule))
    layers.append(QLinear(K, N, bias=False, input_quantization=schedule, gradient_cancellation_threshold=1.0))
    layers[1].load_state_dict(layers[0].state_dict())
    x = (X * 1.5).requires_grad_()
    results = []
    for layer in layers:
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, layer.weight])))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    known = not (last == "progressive_sign" and training)
    packable = steps == 3 and known and cls is not ScheduledQuantizer
    assert explain(layers[0]).layers[0].packable == explain(layers[1]).layers[0].packable == packable
    if packable:
        torch.testing.assert_close(pack(layers[0])(x), results[0][0], rtol=1e-4, atol=1e-3)


def test_a_finished_schedule_with_hooks_is_computed_by_calling_it():
    schedule = StepScheduling([bitorch.quantizations.Sign()], 1)
    schedule.step()
    layer = QLinear(K, N, bias=False, input_quantization=schedule)
    with Calls() as calls:
        layer(X)
    assert calls.names
    schedule.register_forward_hook(lambda module, args, output: 3 * output)
    torch.testing.assert_close(layer(X), 3 * X.sign() @ layer.weight.sign().T)
