"""A packed layer's checkpoint records its format and rules; one that does not fit is refused before it is used."""

import io

import pytest
import torch
from support.reference import assert_equal
from support.round_trips import through_safetensors, through_torch_save
from torch import nn

from bitorch_qlinear import PackedQLinear, QLinear, pack, unpack
from bitorch_qlinear.checkpoint import FORMAT, NUMBERS

K, N = 70, 9
X = torch.linspace(-1, 1, 3 * K).reshape(3, K).mul(1e3).sin().relu()  # half are 0, where rules differ
RULES = ("format", "input_rule", "weight_rule")

both_ways = pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])


def layer_like(**options):
    layer = QLinear(K, N, **options).eval()
    layer.weight.data.flatten()[::7] = 0.0
    return layer


def through_distributed_checkpoint(state, path):
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    checkpoint.save(state, checkpoint_id=path)
    loaded = {key: torch.zeros_like(value) for key, value in state.items()}
    checkpoint.load(loaded, checkpoint_id=path)
    return loaded


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@both_ways
@pytest.mark.parametrize("options", [{}, {"input_quantization": "steheaviside"}, {"input_quantization": "identity"}])
@pytest.mark.parametrize("through", [through_torch_save, through_safetensors, through_distributed_checkpoint])
def test_round_trip(through, options, assign, tmp_path):
    packed = pack(layer_like(weight_quantization="steheaviside", **options))
    state = through(packed.state_dict(), tmp_path / "model")
    assert {name: (value.dtype, value.shape) for name, value in state.items()} == {
        name: (value.dtype, value.shape) for name, value in packed.state_dict().items()
    }
    other = PackedQLinear(K, N, weight_quantization="steheaviside", **options)
    assert str(other.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert_equal(other(X), packed(X))


def test_the_numbers_in_a_checkpoint():
    strict = {"input_quantization": "steheaviside", "weight_quantization": "steheaviside"}
    real = {"input_quantization": "identity", "weight_quantization": "weightdorefa"}
    for options, rules in (({}, (0, 0)), (strict, (1, 1)), (real, (2, 2))):
        state = pack(layer_like(**options)).state_dict()
        assert {name: int(state[name]) for name in NUMBERS} == {
            "k": K,
            "format": 1,
            "input_rule": rules[0],
            "weight_rule": rules[1],
        }


@both_ways
@pytest.mark.parametrize("argument", ["input_quantization", "weight_quantization"])
def test_another_rule_is_refused(argument, assign):
    key = argument.replace("quantization", "rule")
    packed = pack(layer_like(**{argument: "steheaviside"}))
    for other in (PackedQLinear(K, N), PackedQLinear(K, N, **{argument: "approxsign"})):
        before = other(X)
        with pytest.raises(RuntimeError, match=rf"{key}: expected \+1 unless . < 0.*got \+1 if . > 0"):
            other.load_state_dict(packed.state_dict(), assign=assign)
        assert_equal(other(X), before)
    with pytest.raises(RuntimeError, match=f"layer.{key}: expected"):
        nn.ModuleDict({"layer": PackedQLinear(K, N)}).load_state_dict(
            nn.ModuleDict({"layer": packed}).state_dict(), assign=assign, strict=False
        )


@both_ways
@pytest.mark.parametrize("number", [FORMAT + 1, 2**40, 0, -1])
def test_another_format_is_refused(number, assign):
    state = pack(layer_like()).state_dict()
    state["format"] = torch.tensor(number)
    layer = PackedQLinear(K, N)
    with pytest.raises(RuntimeError, match=f"format: expected a checkpoint of format 1 to {FORMAT}, got {number}"):
        layer.load_state_dict(state, assign=assign)
    assert_equal(layer.weight, torch.zeros_like(layer.weight))


@both_ways
@pytest.mark.parametrize("wrong", [torch.tensor([1]), torch.tensor(1.0), torch.tensor(1, dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_of_another_type_are_refused(key, wrong, assign):
    state = pack(layer_like()).state_dict()
    state[key] = wrong
    with pytest.raises(RuntimeError, match=f"{key}: expected a 0-dim int64 tensor, got"):
        PackedQLinear(K, N).load_state_dict(state, assign=assign)


@both_ways
@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_without_a_format_loads(assign, strict):
    packed = pack(layer_like())
    state = {name: value for name, value in packed.state_dict().items() if name not in RULES}
    assert set(state) == {"weight", "bias", "k"}
    other = PackedQLinear(K, N)
    assert str(other.load_state_dict(state, assign=assign, strict=strict)) == "<All keys matched successfully>"
    assert_equal(other(X), packed(X))
    with torch.device("meta"):
        skeleton = PackedQLinear(K, N)
    skeleton.load_state_dict(state, assign=True)
    assert set(skeleton.state_dict()) == set(packed.state_dict())
    assert not any(value.is_meta for value in skeleton.state_dict().values())
    PackedQLinear(K, N).load_state_dict(skeleton.state_dict())


@pytest.mark.parametrize("state", ["float", "without a format"])
def test_a_layer_of_skip_init_saves_what_it_has_loaded(state):
    layer = nn.utils.skip_init(PackedQLinear, K, N)
    old = {name: value for name, value in pack(layer_like()).state_dict().items() if name not in RULES}
    layer.load_state_dict(QLinear(K, N).state_dict() if state == "float" else old)
    PackedQLinear(K, N).load_state_dict(layer.state_dict())


def test_progressive_sign_weights_load_in_training_mode():
    layer = PackedQLinear(K, N, weight_quantization="progressive_sign").train()
    trained = layer_like(weight_quantization="progressive_sign")
    for state in (trained.state_dict(), pack(trained).state_dict()):
        layer.load_state_dict(state)
        assert_equal(layer(X), trained(X).detach())


DAMAGE = {
    "bias-uint32": ("bias", lambda b: b.to(torch.uint32)),
    "bias-complex": ("bias", lambda b: b.to(torch.complex64)),
    "bias-int64": ("bias", lambda b: b.to(torch.int64)),
    "bias-sparse": ("bias", lambda b: b.to_sparse()),
    "bias-quantized": ("bias", lambda b: torch.quantize_per_tensor(b, 0.1, 0, torch.quint8)),
    "bias-of-another-size": ("bias", lambda b: b[:-1]),
    "bias-of-two-dimensions": ("bias", lambda b: b[None]),
    "words-sparse": ("weight", lambda w: w.to_sparse()),
    "words-complex": ("weight", lambda w: w.to(torch.complex64)),
    "words-int64": ("weight", lambda w: w.long()),
    "words-of-another-size": ("weight", lambda w: w[:, :-1]),
    "float-of-another-size": ("weight", lambda w: torch.randn(N, K + 1)),
}


@both_ways
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_the_layer_changes(damage, assign):
    key, wrong = DAMAGE[damage]
    layer, state = pack(layer_like()), pack(layer_like()).state_dict()
    state[key] = wrong(state[key])
    before, tensors = layer(X), list(map(id, layer.state_dict(keep_vars=True).values()))
    with pytest.raises(RuntimeError, match=f"{key}: expected") as error:
        layer.load_state_dict(state, assign=assign)
    assert not isinstance(error.value, NotImplementedError)
    assert_equal(layer(X), before)
    assert list(map(id, layer.state_dict(keep_vars=True).values())) == tensors


@both_ways
@pytest.mark.parametrize("prefix", ["", "0."])
def test_packed_words_are_not_loaded_into_a_float_layer(prefix, assign):
    packed, layer = pack(layer_like()), layer_like()
    wrap = (lambda module: nn.Sequential(module)) if prefix else (lambda module: module)
    before = layer(X)
    with pytest.raises(
        RuntimeError, match=f"{prefix}weight: expected float weights, got the words of a packed"
    ) as error:
        wrap(layer).load_state_dict(wrap(packed).state_dict(), assign=assign, strict=not assign)
    assert all(remedy in str(error.value) for remedy in ("PackedQLinear", "pack(model)", "unpack(model)"))
    assert_equal(layer(X), before)
    wrap(layer).load_state_dict(wrap(unpack(packed)).state_dict(), assign=assign)
    assert_equal(layer(X), packed(X))


def test_a_state_dict_holds_only_plain_tensors():
    file = io.BytesIO()
    torch.save(nn.Sequential(pack(layer_like())).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(type(value) is torch.Tensor for value in state.values())
