"""A PackedQLinear gives the QLinear's output bit for bit from 1/32 of its weights, and refuses damaged checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from bitorch.layers import QLinear as BitorchQLinear
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.calls import Calls
from support.devices import take_kernels_away
from support.round_trips import through_safetensors, through_torch_save
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jvp, stack_module_state, vmap

from bitorch_qlinear import PackedQLinear, QLinear, _kernels, _library, pack, quantizations
from bitorch_qlinear.checkpoint import NUMBERS

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIGN_LIKE = ["sign", "approxsign", "swishsign", "steheaviside", "progressive_sign"]
K, N = 70, 400  # this is enough words for a layer to keep their prepared form
X = torch.linspace(-1, 1, 3 * K).reshape(3, K).mul(1e3).sin()


def layer_like(k=K, n=N, **options):
    layer = QLinear(k, n, **options).eval()
    if layer.weight.numel():
        layer.weight.data.flatten()[::7] = 0.0  # the sign rules differ at 0
    return layer


def network():
    """Return a network with binarized layers between real first and last ones."""
    inner = nn.Sequential(layer_like(33, N, bias=False))
    return nn.Sequential(nn.Linear(5, K), layer_like(K, 33), nn.BatchNorm1d(33), inner, nn.Linear(N, 2)).eval()


# ---- the same output ----


@pytest.mark.parametrize("weight_quantization", SIGN_LIKE)
@pytest.mark.parametrize("input_quantization", SIGN_LIKE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_layer_it_was_made_from(input_quantization, weight_quantization, dtype):
    layer = layer_like(dtype=dtype, input_quantization=input_quantization, weight_quantization=weight_quantization)
    packed = PackedQLinear.from_float(layer)
    x = X.to(dtype, copy=True)
    x[0, :4] = torch.tensor([0.0, -0.0, torch.nan, torch.inf])
    for shape in ((3, K), (1, 3, 1, K), (0, K)):
        each = x.reshape(shape) if shape[0] else x[:0]
        assert torch.equal(packed(each), layer(each))
    assert torch.equal(packed(x[1]), layer(x[1]))
    assert packed(x).dtype is dtype


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("k", [0, 1, 31, 32, 33, 64, 129])
def test_shapes(k, n):
    for bias in (True, False):
        layer = layer_like(k, n, bias=bias)
        packed = PackedQLinear.from_float(layer)
        x = torch.randn(4, 2 * k)[:, ::2]  # a strided input
        assert torch.equal(packed(x), layer(x))
        assert packed.weight.shape == (n, -(-k // 32))
        other = PackedQLinear(k, n, bias=bias)
        other.load_state_dict(packed.state_dict())
        assert torch.equal(other(x), packed(x))


def test_constructor():
    packed = PackedQLinear(K, N, False, "cpu", torch.float64, input_quantization="steheaviside")
    assert packed.bias is None
    assert torch.equal(packed(X), -torch.where(X > 0, 1.0, -1.0).sum(1, keepdim=True).expand(3, N))
    assert PackedQLinear(K, N, dtype=torch.float64).bias.dtype is torch.float64
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    text = repr(packed)
    assert "in_features=70, out_features=400, bias=False, input='+1 if x > 0, else -1', " in text
    assert "gradient_cancellation_threshold=None, path=packed (" in text
    assert "input='+1 unless x < 0, else -1'" in repr(PackedQLinear(K, N))
    assert "input='real values as they are'" in repr(PackedQLinear(K, N, input_quantization="identity"))


@pytest.mark.parametrize(
    "quantization",
    [quantizations.InputDoReFa(3), nn.Tanh(), quantizations.ProgressiveSign().train()],
    ids=["dorefa", "tanh", "slope"],
)
def test_only_what_packs_into_bits_is_accepted(quantization):
    for make in (PackedQLinear, lambda *args, **options: PackedQLinear.from_float(QLinear(*args, **options))):
        with pytest.raises(
            ValueError, match="input_quantization: expected a sign-like quantization, identity, or inputdorefa"
        ):
            make(K, N, input_quantization=quantization)
    layer, packed = (
        QLinear(K, N, weight_quantization=quantization),
        PackedQLinear(K, N, weight_quantization=quantization),
    )
    with pytest.raises(ValueError, match=r"weight_quantization: expected one whose values are \+1 and -1"):
        PackedQLinear.from_float(layer)
    if not isinstance(quantization, quantizations.ProgressiveSign):  # it is a sign in every mode once it is packed
        with pytest.raises(
            RuntimeError, match=r"weight: weight_quantization: expected one whose values are \+1 and -1"
        ):
            packed.load_state_dict(layer.state_dict())
    PackedQLinear(K, N, input_quantization="progressive_sign", weight_quantization="progressive_sign")


def test_autocast():
    layer = layer_like()
    packed = PackedQLinear.from_float(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(X).dtype is torch.bfloat16
        assert torch.equal(packed(X), layer(X))


def test_unpack():
    for name in ("sign", "steheaviside"):
        layer = layer_like(input_quantization=name, dtype=torch.float64)
        packed = PackedQLinear.from_float(layer)
        unpacked = packed.unpack()
        assert type(unpacked) is QLinear
        assert unpacked.training == packed.training
        assert unpacked.weight.dtype is torch.float64
        assert unpacked.weight.requires_grad
        assert torch.equal(unpacked.weight, torch.where(layer.weight < 0, -1.0, 1.0).double())
        x = X.to(torch.float64, copy=True)
        x[0, 0] = 0
        assert torch.equal(unpacked(x), layer(x))
        assert torch.equal(PackedQLinear.from_float(unpacked).weight, packed.weight)
        unpacked(x).sum().backward()
    layer = layer_like(bias=False)
    unpacked = PackedQLinear.from_float(layer).train().unpack()
    assert unpacked.training
    assert unpacked.bias is None
    assert torch.equal(unpacked(X), layer(X))


# ---- gradients and transforms ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threshold", [None, 0.4])
@pytest.mark.parametrize("input_quantization", ["sign", "approxsign", "swishsign", "steheaviside", "identity"])
def test_gradients_are_those_of_the_frozen_layer(input_quantization, threshold, training):
    layer = layer_like(input_quantization=input_quantization, gradient_cancellation_threshold=threshold)
    layer.requires_grad_(False).train(training)
    packed = PackedQLinear.from_float(layer)
    g = torch.randint(-3, 4, (3, N)).float()
    gradients = []
    for each in (layer, packed):
        x = X.clone().requires_grad_()
        y = each(x)
        y.backward(g)
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0
    assert packed.bias.grad is None


def add_a_hook(packed):
    packed.input_quantization.register_forward_hook(lambda module, args, output: None)


def replace_the_input_quantization(packed):
    packed.activation.activation_function = quantizations.Sign()


@pytest.mark.parametrize("change", [add_a_hook, replace_the_input_quantization])
@pytest.mark.parametrize("weight_quantization", ["sign", "ternary"])
def test_the_signs_of_the_input_are_those_of_the_checkpoint(weight_quantization, change):
    packed = pack(layer_like(input_quantization="steheaviside", weight_quantization=weight_quantization))
    x = X.clone()
    x[:, ::2] = 0.0  # -1 in this rule, and +1 in the other
    y = packed(x)
    change(packed)
    assert torch.equal(packed(x), y)
    assert torch.equal(packed(x.requires_grad_()), y)


def test_gradient_of_the_bias():
    packed = PackedQLinear.from_float(layer_like())
    packed.bias.requires_grad_()
    packed(X).sum().backward()
    assert torch.equal(packed.bias.grad, torch.full((N,), 3.0))


def test_an_adapter_before_a_packed_layer_trains():
    packed = PackedQLinear.from_float(layer_like())
    model = nn.Sequential(nn.Linear(K, K), packed)
    y = model(X)
    assert torch.equal(y, packed(model[0](X).detach()))
    y.sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not model(X).requires_grad
    with torch.inference_mode():
        assert torch.equal(model(X), y)


def test_double_backward_is_an_error():
    packed = PackedQLinear.from_float(layer_like())
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(packed(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable only once"):
        gradient.sum().backward()


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_forward_mode_is_an_error(grad_enabled):
    packed = PackedQLinear.from_float(layer_like())
    with torch.set_grad_enabled(grad_enabled):
        with pytest.raises(NotImplementedError, match="jvp"):
            jvp(packed, (X,), (X,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            packed(forward_ad.make_dual(X, X))


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap(in_dim):
    layer = layer_like()
    packed = PackedQLinear.from_float(layer)
    x = torch.randn(4, 2, K)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert torch.equal(vmap(packed, in_dims=in_dim)(x.movedim(0, in_dim)), layer(x))
            assert torch.equal(vmap(vmap(packed))(x), layer(x))
    assert torch.equal(vmap(packed)(x.requires_grad_()), layer(x))


def test_functional_call_with_other_words():
    first, second = layer_like(), layer_like()
    packed = PackedQLinear.from_float(first)
    buffers = dict(PackedQLinear.from_float(second).state_dict())
    assert torch.equal(functional_call(packed, buffers, (X,)), second(X))
    assert torch.equal(packed(X), first(X))


def test_vmap_over_the_words_leaves_the_layer_as_it_was():
    layers = [PackedQLinear.from_float(layer_like()) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    with torch.no_grad():
        each = vmap(lambda p, b: functional_call(layers[0], (p, b), (X,)))(parameters, buffers)
        for y, layer in zip(each, layers, strict=True):
            assert torch.equal(y, layer(X))


def test_forward_mode_through_real_inputs():
    packed = PackedQLinear.from_float(layer_like(input_quantization="identity"))
    x, t = torch.randn(2, 3, K)
    _, tangent = jvp(packed, (x,), (t,))
    torch.testing.assert_close(tangent, packed(t) - packed.bias, atol=1e-4, rtol=1e-4)
    assert hessian(lambda x: packed(x).square().sum())(x[0]).shape == (K, K)


# ---- memory ----


def test_state_dict_is_a_thirty_second():
    packed = PackedQLinear.from_float(QLinear(1024, 256, bias=False))
    state = packed.state_dict()
    assert set(state) == {"weight", *NUMBERS}
    assert set(PackedQLinear.from_float(layer_like()).state_dict()) == {"weight", "bias", *NUMBERS}
    assert state["weight"].dtype is torch.int32
    assert (state["k"].shape, state["k"].dtype, state["k"].item()) == ((), torch.int64, 1024)
    floats = 4 * 1024 * 256
    assert state["weight"].nbytes == floats // 32
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < floats // 32 + 4096  # torch.save adds some


HEADER_BYTES = 192  # the size of a form's header and fingerprint, which the panels follow


def resident(packed):
    form = packed.weight_prepared
    return packed.weight.nbytes + (0 if form is None else form.nbytes)


@pytest.mark.parametrize(("k", "n"), [(96, 64), (1920, 128), (768, 3072)])
def test_memory_is_two_thirty_seconds(k, n):
    """The words and their form take 2/32 of the float weights if the sizes fill the kernel's tiles."""
    assert resident(PackedQLinear.from_float(QLinear(k, n))) <= 2 * (4 * k * n) // 32 + HEADER_BYTES


def test_memory_of_odd_sizes():
    """The prepared form rounds up to the kernel's tiles."""
    panel, unit, unit_bytes, _ = _kernels.prepared_layout()
    assert resident(PackedQLinear.from_float(QLinear(1, 1))) == 4  # so few words are prepared in each call
    for k, n in ((K, N), (1000, 1000), (4096, 4096)):
        packed = PackedQLinear.from_float(QLinear(k, n))
        assert packed.weight.nbytes == 4 * n * -(-k // 32)
        assert packed.weight_prepared.nbytes == HEADER_BYTES + -(-n // panel) * -(-k // unit) * unit_bytes
    assert resident(packed) / (4 * 4096 * 4096) < 2.01 / 32


# ---- checkpoints ----


@pytest.mark.parametrize("through", [through_torch_save, through_safetensors])
@pytest.mark.parametrize("assign", [True, False])
def test_round_trip(through, assign, tmp_path):
    model = pack(network())
    state = through(model.state_dict(), tmp_path / "model")
    other = pack(network())
    x = torch.randn(4, 5)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(x), model(x))
    assert {key: value.dtype for key, value in other.state_dict().items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("convert", [lambda w: w.view(torch.uint32), lambda w: w.t().contiguous().t()])
def test_words_in_other_forms(convert, assign):
    packed, other = PackedQLinear.from_float(layer_like()), PackedQLinear(K, N)
    state = packed.state_dict()
    state["weight"] = convert(state["weight"])
    other.load_state_dict(state, assign=assign)
    assert other.weight.dtype is torch.int32
    assert torch.equal(other(X), packed(X))


def stray_bit(bit):
    def damage(state):
        state["weight"] = state["weight"].clone()
        state["weight"][4, -1] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)

    return damage


def replace(key, value):
    def damage(state):
        state[key] = value(state[key])

    return damage


DAMAGE = {
    "row-missing": ("weight", replace("weight", lambda w: w[:-1])),
    "word-missing": ("weight", replace("weight", lambda w: w[:, :-1])),
    "one-dimension": ("weight", replace("weight", lambda w: w.flatten())),
    "int64": ("weight", replace("weight", lambda w: w.long())),
    "uint8": ("weight", replace("weight", lambda w: w.view(torch.uint8))),
    "bool": ("weight", replace("weight", lambda w: w.bool())),
    "float-words": ("weight", replace("weight", lambda w: w.float())),
    "float-of-another-size": ("weight", replace("weight", lambda w: torch.randn(N, K + 1))),
    "stray-bit-6": ("weight", stray_bit(6)),  # K = 70 uses six bits of the last word
    "stray-bit-31": ("weight", stray_bit(31)),
    "k-of-another-size": ("k", replace("k", lambda k: torch.tensor(69))),
    "k-int32": ("k", replace("k", lambda k: k.int())),
    "k-float": ("k", replace("k", lambda k: k.float())),
    "k-vector": ("k", replace("k", lambda k: k.reshape(1))),
    "bias-of-another-size": ("bias", replace("bias", lambda b: b[:-1])),
    "weight-missing": ("weight", lambda state: state.pop("weight")),
    "bias-missing": ("bias", lambda state: state.pop("bias")),
    "k-missing": ("k", lambda state: state.pop("k")),
    "unknown-key": ("zero_point", lambda state: state.update(zero_point=torch.ones(()))),
    "weight-no-tensor": ("weight", replace("weight", lambda w: w.numpy())),
    "k-no-tensor": ("k", replace("k", int)),
}
# torch finds these faults itself, after the layer's own checks.
TORCH_FINDS = ["bias-of-another-size", "weight-missing", "bias-missing", "k-missing", "unknown-key"]
TORCH_FINDS += ["weight-no-tensor", "k-no-tensor"]


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints(damage, assign):
    key, apply = DAMAGE[damage]
    model = nn.ModuleDict({"hidden": PackedQLinear.from_float(layer_like())})
    before = model["hidden"](X)
    state = dict(pack(nn.ModuleDict({"hidden": layer_like()})).state_dict())
    inner = {name.removeprefix("hidden."): value for name, value in state.items()}
    apply(inner)
    state = {f"hidden.{name}": value for name, value in inner.items()}
    kept = dict(state)
    with Calls() as calls, pytest.raises(RuntimeError, match=f"hidden.{key}"):
        model.load_state_dict(state, assign=assign)
    assert all(state[name] is value for name, value in kept.items())  # the caller's dictionary is not changed
    if damage in TORCH_FINDS:
        assert set(calls.names) <= {"prepare_weight"}
    else:
        assert calls.names == []
        assert torch.equal(model["hidden"](X), before)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 64])
def test_every_padding_bit_is_checked(k):
    packed = PackedQLinear.from_float(layer_like(k, 2))
    for bit in range(32):
        state = packed.state_dict()
        state["weight"] = state["weight"].clone()
        state["weight"][1, -1] |= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
        if k % 32 == 0 or bit < k % 32:
            packed.load_state_dict(state)
        else:
            with pytest.raises(RuntimeError, match=f"weight: expected zero bits past k = {k}"):
                packed.load_state_dict(state)


@pytest.mark.parametrize("keep", [0, 0.01, 0.5, 0.95])
def test_truncated_files(keep, tmp_path):
    state = pack(network()).state_dict()
    for suffix, save, load in (
        ("pt", torch.save, lambda path: torch.load(path, weights_only=True)),
        ("safetensors", save_file, load_file),
    ):
        path = tmp_path / f"model.{suffix}"
        save(state, path)
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError, SafetensorError)):
            load(path)


def test_not_strict():
    packed, other = PackedQLinear.from_float(layer_like()), PackedQLinear(K, N)
    state = packed.state_dict()
    del state["bias"], state["k"]
    result = other.load_state_dict(state | {"zero_point": torch.ones(())}, strict=False)
    assert set(result.missing_keys) == {"bias", "k"}
    assert result.unexpected_keys == ["zero_point"]
    assert torch.equal(other(X) + packed.bias, packed(X))
    assert set(other.load_state_dict({}, strict=False).missing_keys) == {"weight", "bias", "k"}
    with pytest.raises(RuntimeError, match="weight: expected"):
        other.load_state_dict({"weight": state["weight"].long()}, strict=False)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["sign", "steheaviside"])
def test_float_state_dicts_are_packed(rule, dtype, assign):
    for make in (QLinear, nn.Linear, BitorchQLinear):
        source = make(K, N, dtype=dtype)
        source.weight.data.flatten()[::7] = 0.0
        layer = QLinear(K, N, dtype=dtype, weight_quantization=rule).eval()
        layer.load_state_dict(source.state_dict())
        state = source.state_dict()
        packed = PackedQLinear(K, N, dtype=dtype, weight_quantization=rule)
        packed.load_state_dict(state, assign=assign)
        assert torch.equal(packed(X), layer(X))
        assert state["weight"].is_floating_point()  # the caller's dictionary is not changed
        assert packed.weight.dtype is torch.int32


def test_float_state_dict_of_a_network():
    model = network()
    packed = pack(network())
    packed.load_state_dict(model.state_dict())
    x = torch.randn(4, 5)
    assert torch.equal(packed(x), model(x))


# ---- changes of the words ----


def test_words_are_prepared_once():
    packed = PackedQLinear.from_float(layer_like())
    with Calls() as calls:
        packed(X)
        packed(X)
    assert calls.names == ["linear", "linear"]


def test_made_under_inference_mode():
    layer = layer_like()
    with torch.inference_mode():
        packed, empty = PackedQLinear.from_float(layer), PackedQLinear(K, N)
        empty.load_state_dict(packed.state_dict())
    for each in (packed, empty):
        assert not each.weight.is_inference()
        assert torch.equal(each(X), layer(X))
        each.weight.bitwise_not_()
        each.weight[:, -1] &= (1 << K % 32) - 1
        torch.testing.assert_close(each(X), 2 * layer.bias - layer(X), rtol=0, atol=K * 2.0**-23)


def test_inference_words_are_prepared_per_call():
    first, second = layer_like(bias=False), layer_like(bias=False)
    packed, other = PackedQLinear.from_float(first), PackedQLinear.from_float(second)
    with torch.inference_mode():
        packed.weight = packed.weight.clone()
        assert packed.weight.is_inference()
        assert torch.equal(packed(X), first(X))
        packed.weight.copy_(other.weight)
        assert torch.equal(packed(X), second(X))


def reload(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), reload])
def test_copies(duplicate):
    layer = layer_like()
    packed = PackedQLinear.from_float(layer)
    other = duplicate(packed)
    packed.weight.zero_()
    assert torch.equal(other(X), layer(X))
    assert repr(other) == repr(packed)
    assert "weight_prepared" not in other.state_dict()


def test_pickle_leaves_the_prepared_form_out():
    packed = PackedQLinear.from_float(QLinear(1024, 512, bias=False))
    assert len(pickle.dumps(packed)) < packed.weight.nbytes + 8192


def test_conversions():
    layer = layer_like()
    packed = PackedQLinear.from_float(layer)
    for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32):
        packed.to(dtype)
        layer.to(dtype)
        assert packed.weight.dtype is torch.int32
        assert packed.k.dtype is torch.int64
        assert packed.weight_prepared.dtype is torch.uint8
        assert packed.bias.dtype is dtype
        assert torch.equal(packed(X.to(dtype)), layer(X.to(dtype)))
    assert packed.half().bias.dtype is torch.float16
    packed.share_memory()
    assert torch.equal(packed(X.half()), layer.half()(X.half()))


def test_a_change_of_dtype_leaves_the_words():
    packed = PackedQLinear.from_float(layer_like())
    want = packed(X)
    assert torch.equal(packed.type(torch.float64)(X), want)
    assert packed.weight.dtype is torch.int32
    assert packed.bias.dtype is torch.float64


def test_a_form_is_kept_if_the_input_is_a_parameter():
    packed, x = PackedQLinear.from_float(layer_like()), nn.Parameter(X.clone())
    with torch.no_grad():
        packed.weight.zero_()
        packed(x)
        form = packed.weight_prepared
        packed(x)
    assert form is not None
    assert packed.weight_prepared is form


def test_words_assigned_as_a_parameter_stay_a_buffer():
    packed, words = PackedQLinear.from_float(layer_like()), torch.zeros(N, 3, dtype=torch.int32)
    packed.weight = nn.Parameter(words, requires_grad=False)
    assert "weight" in dict(packed.named_buffers())
    with pytest.raises(TypeError, match="weight: expected packed words"):
        packed.weight = nn.Parameter(torch.randn(N, K))
    assert torch.equal(packed.weight, words)


@pytest.mark.parametrize("assign", [True, False])
def test_meta_device(assign):
    layer = layer_like()
    state = PackedQLinear.from_float(layer).state_dict()
    packed = PackedQLinear(K, N, device="meta")
    assert packed(X.to("meta")).shape == (3, N)
    if not assign:
        packed = packed.to_empty(device="cpu")
    packed.load_state_dict(state, assign=assign)
    assert packed.weight_prepared.is_cpu
    assert torch.equal(packed(X), layer(X))
    with torch.device("meta"):
        skeleton = pack(nn.Sequential(QLinear(K, N)))
    assert skeleton[0].weight.is_meta
    skeleton[0].load_state_dict(state, assign=True)
    assert torch.equal(skeleton(X), layer(X))


def test_switching_kernels():
    layer = layer_like()
    packed = PackedQLinear.from_float(layer)
    want = packed(X)
    try:
        for kernel in [*_kernels.available_kernels(), "scalar", None]:
            _kernels.force_kernel(kernel)
            assert torch.equal(packed(X), want)
            assert torch.equal(PackedQLinear.from_float(layer)(X), want)
            assert f"path=packed ({_kernels.active_kernel()})" in repr(packed)
    finally:
        _kernels.force_kernel(None)
    assert torch.equal(packed(X), want)


# ---- a device without kernels ----


@pytest.mark.parametrize("name", ["sign", "steheaviside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fallback_without_kernels(name, dtype, monkeypatch):
    layer = layer_like(input_quantization=name, weight_quantization=name, dtype=dtype)
    nn.init.constant_(layer.bias, 3)
    x = X.to(dtype, copy=True)
    x[0, :3] = torch.tensor([0.0, -0.0, torch.nan])
    want, state = layer(x), PackedQLinear.from_float(layer).state_dict()
    take_kernels_away(monkeypatch)
    packed = PackedQLinear.from_float(layer)
    assert "path=float (no kernels for cpu)" in repr(packed)
    other = PackedQLinear(K, N, input_quantization=name, weight_quantization=name, dtype=dtype)
    other.load_state_dict(state)
    for each in (packed, other, copy.deepcopy(packed)):
        with Calls() as calls:
            y = each(x)
        assert not {"linear", "linear_train"} & set(calls.names)
        assert torch.equal(y, want)
    assert torch.equal(packed.weight, state["weight"])
    unpacked = packed.unpack()
    assert torch.equal(PackedQLinear.from_float(unpacked).weight, state["weight"])
    x.requires_grad_()
    packed(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_prepared_form_of_other_words_is_not_used():
    # Two threads that prepare different words at the same time can leave a form of the wrong ones.
    packed, other = PackedQLinear.from_float(layer_like()), PackedQLinear.from_float(layer_like())
    want = packed(X)
    packed.weight_prepared = other.weight_prepared
    assert torch.equal(packed(X), want)
    assert torch.equal(packed(X), want)
    before = _library.stale_forms.value
    assert torch.equal(packed(X), want)
    assert _library.stale_forms.value == before  # the layer has a form of the right words again


@pytest.mark.parametrize("x_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_mixed_dtypes_without_kernels(monkeypatch, x_dtype):
    packed = PackedQLinear.from_float(layer_like())
    x = X.to(x_dtype)
    want = packed(x)
    take_kernels_away(monkeypatch)
    assert torch.equal(packed(x), want)


def test_inference_tensors_without_kernels(monkeypatch):
    packed = PackedQLinear.from_float(layer_like())
    want = packed(X)
    take_kernels_away(monkeypatch)
    with torch.inference_mode():
        packed.weight = packed.weight.clone()
    assert torch.equal(packed(X), want)


@pytest.mark.parametrize("model", [3, QLinear])
def test_pack_requires_a_module(model):
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got "):
        pack(model)
