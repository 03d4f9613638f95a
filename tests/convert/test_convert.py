"""pack(), unpack() and explain(): which layers they replace, which they leave alone and why, and what they report."""

import copy
import gc
import logging
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from bitorch.layers.extensions.layer_container import LayerContainer
from support.calls import Calls
from support.reference import assert_equal
from support.tensors import Wrapped
from torch import nn
from torch.nn.utils import prune

from bitorch_qlinear import PackedQLinear, QLinear, explain, pack, quantizations, unpack

K, N = 70, 9
X = torch.linspace(-1, 1, 3 * K).reshape(3, K).mul(1e3).sin()

either_place = pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])


def layer_like(k=K, n=N, **options):
    layer = QLinear(k, n, **options).eval()
    layer.weight.data.flatten()[::7] = 0.0  # the sign rules differ at 0
    return layer


def network():
    """Return a network with binarized layers between real first and last ones."""
    inner = nn.Sequential(layer_like(33, N, bias=False))
    return nn.Sequential(nn.Linear(5, K), layer_like(K, 33), nn.BatchNorm1d(33), inner, nn.Linear(N, 2)).eval()


# ---- pack ----


def test_pack_returns_a_copy():
    model = network()
    x = torch.randn(4, 5)
    want = model(x)
    packed = pack(model)
    assert isinstance(model[1], QLinear)
    assert [type(packed[i]) for i in range(3)] == [nn.Linear, PackedQLinear, nn.BatchNorm1d]
    assert type(packed[3][0]) is PackedQLinear
    assert_equal(packed(x), want)
    with torch.no_grad():
        model[0].weight.neg_()
        model[1].bias.neg_()
    assert_equal(packed(x), want)


def test_pack_in_place():
    model = network()
    x = torch.randn(4, 5)
    want = model(x)
    assert pack(model, inplace=True) is model
    assert type(model[1]) is type(model[3][0]) is PackedQLinear
    assert_equal(model(x), want)


@pytest.mark.slow
def test_float_weights_are_freed():
    model = network()
    dead = [weakref.ref(model[1].weight), weakref.ref(model[3][0].weight)]
    pack(model, inplace=True)
    gc.collect()
    assert [ref() for ref in dead] == [None, None]
    assert not any(parameter.shape in ((33, K), (N, 33)) for parameter in model.parameters())


def test_a_copy_never_copies_the_float_weights(monkeypatch):
    model = network()
    copied = []
    original = nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda p, memo: copied.append(p.shape) or original(p, memo))
    packed = pack(model)
    assert (33, K) not in copied
    assert (N, 33) not in copied
    assert (K, 5) in copied
    assert packed[0].weight is not model[0].weight


@either_place
def test_a_layer_itself(inplace):
    layer = layer_like()
    packed = pack(layer, inplace=inplace)
    assert type(packed) is PackedQLinear
    assert_equal(packed(X), layer(X))
    unpacked = unpack(packed, inplace=inplace)
    assert type(unpacked) is QLinear
    assert_equal(unpacked(X), layer(X))


@either_place
def test_packed_layers_stay_as_they_are(inplace):
    model = pack(network())
    words = model[1].weight.clone()
    again = pack(model, inplace=inplace)
    assert type(again[1]) is PackedQLinear
    assert_equal(again[1].weight, words)


@either_place
def test_shared_layers_stay_shared(inplace):
    layer = layer_like(K, K)
    model = pack(nn.Sequential(layer, nn.ModuleDict({"again": layer}), layer), inplace=inplace)
    assert type(model[0]) is PackedQLinear
    assert model[0] is model[1]["again"] is model[2]
    assert len(explain(model)) == 1
    model = unpack(model, inplace=inplace)
    assert type(model[0]) is QLinear
    assert model[0] is model[1]["again"] is model[2]


@either_place
def test_tied_weights_are_packed_once_and_stay_tied(inplace):
    layers = [layer_like(K, K), layer_like(K, K), layer_like(K, K, weight_quantization="steheaviside")]
    layers[1].weight = layers[2].weight = layers[0].weight
    model = nn.Sequential(*layers)
    want = model(X)
    with Calls() as calls:
        packed = pack(model, inplace=inplace)
    assert calls.names.count("pack_bits") == 2  # once for each rule

    def check(each):
        assert each[0].weight is each[1].weight is not each[2].weight
        assert_equal(each(X.to(each[0].bias.dtype)), want.to(each[0].bias.dtype))

    check(packed)
    check(copy.deepcopy(packed))
    check(packed.to(torch.float32))
    unpacked = unpack(packed)
    assert unpacked[0].weight is unpacked[1].weight is not unpacked[2].weight
    assert_equal(unpacked(X), want)
    packed.to(torch.float64).to(torch.float32)
    check(packed)
    state = copy.deepcopy(packed.state_dict())
    packed.to_empty(device="cpu").load_state_dict(state)
    check(packed)
    assert packed.to("meta")[1].weight.is_meta


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training):
    packed = pack(nn.Sequential(QLinear(K, N)).train(training))
    assert packed[0].training == training
    assert unpack(packed)[0].training == training


def test_parametrized_layers():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(layer_like()))
    want = model(X)
    for inplace in (False, True):
        assert_equal(pack(model, inplace=inplace)(X), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(K, N), (512, 256)], ids=str)
@pytest.mark.parametrize("weight_quantization", ["sign", "steheaviside", "weightdorefa"])
def test_real_input_stays_real(weight_quantization, size, dtype):
    k, n = size
    layer = layer_like(k, n, input_quantization="identity", weight_quantization=weight_quantization, dtype=dtype)
    packed = pack(layer)
    assert type(packed) is PackedQLinear
    assert "real input" in packed.path
    assert packed.weight.nbytes == 4 * n * -(-k // 32)
    for rows in (1, 4, 65):
        x = torch.randn(rows, k, dtype=dtype)
        with torch.no_grad():
            if weight_quantization == "weightdorefa":  # the QLinear computes this in float
                assert packed(x).isfinite().all()
                error = (packed(x).double() - layer(x).double()).abs().max()
                assert error <= 40 * torch.finfo(dtype).eps * k**0.5
            else:
                assert_equal(packed(x), layer(x))
    assert_equal(pack(unpack(packed)).weight, packed.weight)


@pytest.mark.parametrize("input_quantization", ["sign", "steheaviside"])
def test_weights_of_one_bit_are_packed_as_they_are_quantized(input_quantization):
    """One-bit weightdorefa gives +1 and -1 as sign does, except for the weight 0, of which it makes the other one."""
    layer = layer_like(input_quantization=input_quantization, weight_quantization="weightdorefa", bias=False)
    values = layer.weight_quantization(layer.weight).detach()
    assert values.abs().unique().tolist() == [1.0]
    packed = pack(layer)
    assert type(packed) is PackedQLinear
    assert_equal(packed(X), layer(X).detach())
    assert_equal(unpack(packed).weight.detach(), values)
    fresh = PackedQLinear(K, N, False, input_quantization=input_quantization, weight_quantization="weightdorefa")
    fresh.load_state_dict(layer.state_dict())
    assert_equal(fresh.weight, packed.weight)


# ---- layers that are left unpacked ----


class Own(QLinear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(register, where=""):
    layer = layer_like()
    getattr(layer.get_submodule(where), register)(lambda *args: None)
    return layer


def activation_replaced():
    layer = layer_like()
    layer.activation = nn.Tanh()
    return layer


def forward_on_the_instance():
    layer = layer_like()
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


REASONS = {
    "input-dorefa": (
        lambda: layer_like(input_quantization=quantizations.InputDoReFa(3)),
        ["input_quantization: expected a sign-like quantization, identity, or inputdorefa of 1 or 2 bits, got InputD"],
    ),
    "weight-identity": (
        lambda: layer_like(weight_quantization="identity"),
        ["weight_quantization: expected one whose values are +1 and -1, got Identity(bit_width=32)"],
    ),
    "weight-dorefa-of-two-bits": (
        lambda: layer_like(weight_quantization=quantizations.WeightDoReFa(bits=2)),
        ["weight_quantization: expected one whose values are +1 and -1, got WeightDoReFa(bit_width=2)"],
    ),
    "training": (
        lambda: layer_like(input_quantization="progressive_sign").train(),
        ["input_quantization: expected a sign-like", "got ProgressiveSign", "in training mode"],
    ),
    "hooked": (lambda: hooked("register_forward_hook"), ["it has hooks"]),
    "hooked-before": (lambda: hooked("register_forward_pre_hook"), ["it has hooks"]),
    "input-hooked": (
        lambda: hooked("register_forward_hook", "activation.activation_function"),
        ["its input quantization has hooks"],
    ),
    "weight-hooked": (
        lambda: hooked("register_forward_hook", "weight_quantization"),
        ["its weight quantization has hooks"],
    ),
    "activation-hooked": (lambda: hooked("register_forward_hook", "activation"), ["its activation has hooks"]),
    "activation-replaced": (activation_replaced, ["its activation is a Tanh, which may compute something else"]),
    "subclass": (lambda: Own(K, N), ["Own has a forward of its own"]),
    "forward-on-the-instance": (forward_on_the_instance, ["QLinear has a forward of its own"]),
}


@pytest.mark.parametrize("case", REASONS)
@either_place
def test_layers_that_are_not_packed_and_the_reasons(case, inplace, caplog):
    make, said = REASONS[case]
    model = nn.Sequential(make(), nn.ReLU(), layer_like(N, 4))
    report = explain(model)
    want, kind = model(X), type(model[0])
    with caplog.at_level(logging.INFO, "bitorch_qlinear"):
        packed = pack(model, inplace=inplace)
    assert type(packed[0]) is kind
    assert type(packed[2]) is PackedQLinear
    assert_equal(packed(X), want)
    first, second = report
    assert (first.name, first.packable, first.packed_bytes) == ("0", False, 0)
    assert all(text in first.reason for text in said), first.reason
    assert (second.name, second.packable, second.reason) == ("2", True, "")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"packed 1 of 2 QLinear\n  0 stays as it is: {first.reason}"


def test_weights_of_an_unknown_class_are_a_reason():
    layer = QLinear(K, N)
    layer.weight = nn.Parameter(Wrapped(layer.weight.detach()), requires_grad=False)
    model = nn.Sequential(layer, QLinear(N, 3))
    first, second = explain(model)
    assert "its weight is a Wrapped" in first.reason
    assert (first.packable, second.packable) == (False, True)
    assert type(pack(model, inplace=True)[1]) is PackedQLinear
    with pytest.raises(TypeError, match="weight: expected a plain tensor, got Wrapped"):
        layer(X)


def test_out_proj_of_an_attention_is_never_called(caplog):
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    attention.out_proj = QLinear.from_linear(attention.out_proj)
    model, x = nn.ModuleDict({"attention": attention, "layer": layer_like()}), torch.randn(2, 5, 64)
    want = attention(x, x, x)[0]
    layers = {layer.name: layer for layer in explain(model)}
    assert not layers["attention.out_proj"].packable
    assert layers["attention.out_proj"].path.startswith("float")
    assert "never calls" in layers["attention.out_proj"].reason
    packed = pack(model)
    assert type(packed["layer"]) is PackedQLinear
    assert type(packed["attention"].out_proj) is QLinear
    assert_equal(packed["attention"](x, x, x)[0], want)
    assert "attention.out_proj stays as it is: nn.MultiheadAttention reads" in caplog.text


def test_no_warning_if_all_layers_are_packed(caplog):
    with caplog.at_level(logging.INFO, "bitorch_qlinear"):
        pack(network())
        pack(nn.Sequential(nn.Linear(3, 2)))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "packed 2 of 2 QLinear"),
        ("WARNING", "packed 0 of 0 QLinear"),
    ]


# ---- models that hold their layers in other ways ----


@either_place
def test_containers_of_bitorch(inplace, caplog):
    """A container claims to be an instance of the class of its layer; the packed layer replaces the container."""
    model = nn.Sequential(LayerContainer(QLinear, K, N), nn.ReLU()).eval()
    want = model(X)
    with caplog.at_level("INFO"):
        packed = pack(model, inplace=inplace)
    assert_equal(packed(X), want)
    assert type(packed._modules["0"]) is PackedQLinear
    assert (packed is model) is inplace
    assert "packed 1 of 1 QLinear" in caplog.text


@either_place
def test_a_container_of_bitorch_itself(inplace):
    container = LayerContainer(QLinear, K, N).eval()
    packed = pack(container, inplace=inplace)
    assert type(packed) is PackedQLinear
    assert_equal(packed(X), container(X))


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = layer_like()

    def forward(self, x):
        return self.layer(x)


def with_a_lock():
    model = Holder()
    model.lock = threading.Lock()
    return model


def with_an_activation():
    model = Holder()
    model.layer.requires_grad_()
    model.last = model(X)
    return model


def pruned():
    layer = layer_like()
    prune.l1_unstructured(layer, "weight", 0.5)
    layer(X)
    return nn.Sequential(layer)


UNCOPIED = {
    "a-lock": with_a_lock,
    "an-activation-that-was-kept": with_an_activation,
    "a-pruned-layer": pruned,
}


@pytest.mark.parametrize("case", UNCOPIED)
def test_models_that_cannot_be_copied(case):
    model = UNCOPIED[case]()
    with pytest.raises(
        RuntimeError, match=r"model: cannot be copied .*inplace=True works on the model itself"
    ) as error:
        pack(model)
    if case == "a-pruned-layer":  # the error also says that the layer would stay unpacked because of its hook
        assert "0 would stay as it is: it has hooks" in str(error.value)
    else:
        want = model(X).detach()
        assert type(pack(model, inplace=True).layer) is PackedQLinear
        assert_equal(model(X), want)


@pytest.mark.slow
def test_a_model_for_distributed_training_is_unwrapped_first(tmp_path):
    code = f"""
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from bitorch_qlinear import QLinear, pack
dist.init_process_group("gloo", init_method="file://{tmp_path}/processes", rank=0, world_size=1)
model, x = DistributedDataParallel(nn.Sequential(QLinear(40, 64), QLinear(64, 5))), torch.randn(4, 40)
want = model(x)
for convert in (pack, lambda model: pack(model, inplace=True)):
    try:
        convert(model)
    except RuntimeError as error:
        print(error)
packed = pack(model.module)
assert torch.equal(packed(x), want) and len(list(packed.parameters())) == 2
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrapped in DistributedDataParallel, or with such a module inside: pass model.module") == 2


# ---- unpack ----


@either_place
def test_unpack(inplace):
    model, x = network(), torch.randn(4, 5)
    want = model(x)
    unpacked = unpack(pack(model), inplace=inplace)
    assert type(unpacked[1]) is type(unpacked[3][0]) is QLinear
    assert_equal(unpacked[1].weight.detach(), torch.where(model[1].weight < 0, -1.0, 1.0))
    assert_equal(unpacked(x), want)
    unpacked(x).sum().backward()
    assert unpacked[1].weight.grad is not None


@pytest.mark.parametrize("convert", [pack, unpack, explain])
@pytest.mark.parametrize("model", [3, QLinear, None])
def test_other_objects_than_modules_are_refused(convert, model):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got "):
        convert(model)


# ---- explain ----


def test_explain_before_and_after():
    model = network()
    before, after = explain(model), explain(pack(model))
    assert [layer.name for layer in before] == [layer.name for layer in after] == ["1", "3.0"]
    assert [layer.kind for layer in before] == ["QLinear"] * 2
    assert [layer.kind for layer in after] == ["PackedQLinear"] * 2
    assert all(layer.packable and not layer.reason for layer in before)
    assert not any(layer.packable for layer in after)
    assert [layer.float_bytes for layer in before] == [layer.float_bytes for layer in after] == [4 * 33 * K, 4 * N * 33]
    assert [layer.packed_bytes for layer in before] == [layer.packed_bytes for layer in after] == [33 * 12, N * 8]
    assert [layer.resident_bytes for layer in before] == [4 * 33 * K, 4 * N * 33]
    assert all(layer.resident_bytes >= layer.packed_bytes for layer in after)
    assert all(layer.path.startswith("packed (") for layer in (*before, *after))
    lines = str(before).splitlines()
    assert len(lines) == 4
    assert "packs it" in lines[1]
    assert "is packed" in str(after).splitlines()[1]
    assert "0 packed, 2 that pack() would pack" in lines[-1]
    assert str(explain(nn.Linear(3, 2))) == "no QLinear or PackedQLinear in this model"


def test_a_packed_model_says_its_device_and_dtype():
    for bias in (True, False):
        model = pack(nn.Sequential(QLinear(8, 8, bias=bias), nn.ReLU(), QLinear(8, 2, bias=bias))).to(torch.float64)
        first = next(model.parameters())
        assert (first.device.type, first.dtype) == ("cpu", torch.float64)
        assert not any(parameter.requires_grad for parameter in model.parameters())
