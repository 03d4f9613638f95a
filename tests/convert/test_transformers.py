"""transformers models are made binary, trained, packed, saved and loaded again without a change of any bit."""

import inspect
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.reference import assert_equal
from torch import nn

import bitorch_qlinear
from bitorch_qlinear import PackedQLinear, QLinear, Quantization, binarize, pack, quantizations, unpack
from bitorch_qlinear.quantizations import registry

transformers = pytest.importorskip("transformers")
from bitorch_qlinear.transformers import (  # noqa: E402
    BitorchQLinearConfig,
    attach_quantizer,
)

IDS = torch.arange(3 * 7).reshape(3, 7) * 13 % 50
LABELS = torch.tensor([0, 1, 0])
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80, "vocab_size": 50}
CLASSIFIER = transformers.BertForSequenceClassification
CAUSAL = transformers.LlamaForCausalLM


def bert():
    return CLASSIFIER(transformers.BertConfig(**SMALL)).eval()


def llama(tied=True):
    return CAUSAL(transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied, num_key_value_heads=2)).eval()


def saved(model, path):
    model.save_pretrained(path)
    return path


def loaded(cls, path, **arguments):
    """Return the loaded model, whose loading must not have left out or added a tensor."""
    model, info = cls.from_pretrained(path, output_loading_info=True, **arguments)
    assert not any(info.values()), info
    return model


def kinds(model):
    return {name: type(layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, PackedQLinear))}


def binary_names(model):
    return {name for name, kind in kinds(model).items() if kind is not nn.Linear}


def outputs(model):
    with torch.no_grad():
        return model(IDS).logits


def train_step(model):
    """Train one step and return the loss; the weights of all binary layers must have changed."""
    model.train()
    model.config.use_cache = False
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    optimizer.zero_grad()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    y = model(IDS).logits
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).mean()
    loss.backward()
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    binary = {f"{name}.weight" for name, kind in kinds(model).items() if kind is QLinear}
    assert binary and binary <= changed
    model.eval()
    return loss.detach()


@pytest.fixture(params=[bert, llama])
def trained(request, tmp_path):
    """A binary model that was loaded from a folder of floats and trained."""
    path = saved(request.param(), tmp_path / "float")
    model = loaded(type(request.param()), path, quantization_config=BitorchQLinearConfig())
    train_step(model)
    return model


# ---- what becomes binary ----

OPTIONS = [
    {},
    {"keep_first": False, "keep_last": False, "gradient_cancellation_threshold": 0.5},
    {"input_quantization": "approxsign", "weight_quantization": "steheaviside"},
    {"weight_quantization": "ternary", "weight_scale": "mean"},
    {"rules": {r".*layers?\.1\..*": None, r".*(query|q_proj)": {"input_quantization": "identity"}}},
    {"rules": [[r".*(dense|up_proj)", {"gradient_cancellation_threshold": None}], [".*", None]]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [bert, llama])
def test_the_model_is_what_binarize_makes(make, options, tmp_path):
    model = make()
    config = BitorchQLinearConfig(**options)
    before = config.to_dict()
    actual = loaded(type(model), saved(model, tmp_path), quantization_config=config)
    rules = options.get("rules")
    expected = binarize(model, **{**options, "rules": dict(rules) if rules is not None else None})
    assert kinds(actual) == kinds(expected) and QLinear in kinds(actual).values()
    assert repr(actual) == repr(expected)
    assert_equal(outputs(actual), outputs(expected))
    assert config.to_dict() == before, "the configuration of the caller was changed"


def test_every_option_of_binarize_is_an_option():
    known = set(inspect.signature(binarize).parameters) - {"model", "filter_fn", "inplace"}
    config = BitorchQLinearConfig()
    assert set(config.options()) == known
    assert config.options() == {name: inspect.signature(binarize).parameters[name].default for name in known}


def test_modules_to_not_convert_are_whole_components_of_names(tmp_path):
    path = saved(CLASSIFIER(transformers.BertConfig(**{**SMALL, "num_hidden_layers": 12})), tmp_path)
    names = ["pooler", "layer.1", "self.query"]
    config = BitorchQLinearConfig(modules_to_not_convert=names, rules={".*": {}})  # a rule does not choose them again
    model = loaded(CLASSIFIER, path, quantization_config=config)
    real = set(kinds(model)) - binary_names(model)
    assert "bert.pooler.dense" in real and "bert.encoder.layer.1.output.dense" in real
    assert "bert.encoder.layer.11.output.dense" not in real
    assert {name for name in real if "11" in name} == {"bert.encoder.layer.11.attention.self.query"}


def test_tied_weights_stay_real_with_the_reason(tmp_path, caplog):
    options = {"keep_last": False}
    tied = saved(llama(tied=True), tmp_path / "tied")
    with caplog.at_level(logging.INFO):
        model = loaded(CAUSAL, tied, quantization_config=BitorchQLinearConfig(**options))
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head stays as it is: its weight is also that of model.embed_tokens (Embedding)" in caplog.text
    free = saved(llama(tied=False), tmp_path / "free")
    assert type(loaded(CAUSAL, free, quantization_config=BitorchQLinearConfig(**options)).lm_head) is QLinear


def test_a_model_without_linear_layers_is_warned_about(tmp_path, caplog):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    path = saved(transformers.GPT2LMHeadModel(config), tmp_path)
    with caplog.at_level(logging.WARNING):
        transformers.GPT2LMHeadModel.from_pretrained(path, quantization_config=BitorchQLinearConfig())
    assert "binarized 0 of 1 nn.Linear" in caplog.text


def test_a_layer_that_reads_its_weights_dtype_can_be_left_out(tmp_path):
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    cls = transformers.T5ForConditionalGeneration
    path = saved(cls(config), tmp_path / "float")
    model = cls.from_pretrained(path, quantization_config=BitorchQLinearConfig())
    with pytest.raises(RuntimeError, match=r"as T5 does, needs a QLinear there"), torch.no_grad():
        pack(model)(input_ids=IDS, decoder_input_ids=IDS)
    options = BitorchQLinearConfig(modules_to_not_convert=["wo"])
    model = loaded(cls, path, quantization_config=options)
    again = loaded(cls, saved(pack(model), tmp_path / "packed"))
    with torch.no_grad():
        logits = [each(input_ids=IDS, decoder_input_ids=IDS).logits for each in (again, model)]
    assert_equal(*logits)


@pytest.mark.parametrize("in_the_folder", [True, False])
def test_a_dictionary_is_a_configuration(in_the_folder, tmp_path):
    path = saved(bert(), tmp_path)
    plain = {"quant_method": "bitorch_qlinear", "keep_last": False}
    if in_the_folder:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": plain}))
    model = loaded(CLASSIFIER, path, **({} if in_the_folder else {"quantization_config": plain}))
    assert type(model.classifier) is QLinear


# ---- training, saving, loading ----


def test_a_saved_binary_model_goes_on_training(trained, tmp_path):
    again = loaded(type(trained), saved(trained, tmp_path / "binary"))
    assert kinds(again) == kinds(trained)
    assert repr(again) == repr(trained)
    assert_equal(outputs(again), outputs(trained))
    torch.manual_seed(1)
    first = train_step(trained)
    torch.manual_seed(1)
    assert_equal(train_step(again), first)
    assert_equal(outputs(again), outputs(trained))


def test_the_trainer_accepts_a_binary_model_only(trained, tmp_path):
    validate = pytest.importorskip("transformers.trainer_utils").validate_quantization_for_training
    validate(trained)
    packed = loaded(type(trained), saved(pack(trained), tmp_path / "packed"))
    with pytest.raises(ValueError, match="purely quantized"):
        validate(packed)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_a_packed_folder_loads_the_same_bits(trained, shards, inplace, tmp_path):
    expected = outputs(trained)
    packed = pack(trained, inplace=inplace)
    assert inplace or QLinear in kinds(trained).values()
    packed.save_pretrained(tmp_path / "packed", **shards)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) == 1 or shards
    again = loaded(type(trained), tmp_path / "packed")
    assert kinds(again) == kinds(packed) and PackedQLinear in kinds(again).values()
    assert_equal(outputs(again), expected)
    state = packed.state_dict()
    assert state.keys() == again.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert_equal(tensor, state[name])
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])
    for layer in again.modules():
        if isinstance(layer, PackedQLinear):
            assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert again.get_input_embeddings().weight.requires_grad
    assert repr(again) == repr(packed)
    assert_equal(outputs(loaded(type(trained), saved(again, tmp_path / "again"))), expected)


@pytest.mark.parametrize("scale", [None, "mean", "learned"])
@pytest.mark.parametrize("make", [bert, llama])
def test_ternary_weights(make, scale, tmp_path):
    config = BitorchQLinearConfig(weight_quantization="ternary", weight_scale=scale)
    model = type(make()).from_pretrained(saved(make(), tmp_path / "float"), quantization_config=config)
    train_step(model)
    again = loaded(type(model), saved(model, tmp_path / "binary"))
    assert_equal(outputs(again), outputs(model))
    packed = loaded(type(model), saved(pack(model), tmp_path / "packed"))
    assert "ternary weights" in repr(packed)
    assert_equal(outputs(packed), outputs(model))


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_dtype_casts_floats_and_never_words(trained, dtype, argument, tmp_path):
    packed = pack(trained)
    again = loaded(type(trained), saved(packed, tmp_path / "packed"), **{argument: dtype})
    for name, tensor in packed.state_dict().items():
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert_equal(again.state_dict()[name], expected)
    assert again.dtype is dtype
    if dtype is torch.float64:  # models compute rotary embeddings in another dtype than .to(dtype) leaves them in
        assert outputs(again).dtype is torch.float64


def test_a_body_and_a_whole_model_have_the_same_binary_layers(tmp_path):
    path = saved(bert(), tmp_path / "float")
    whole = loaded(CLASSIFIER, path, quantization_config=BitorchQLinearConfig())
    assert "bert.pooler.dense" in binary_names(whole)
    body = transformers.BertModel.from_pretrained(saved(pack(whole), tmp_path / "whole"))
    assert {f"bert.{name}" for name in binary_names(body)} == binary_names(whole)
    with torch.no_grad():
        assert_equal(body(IDS).pooler_output, whole.bert(IDS).pooler_output)
    back = CLASSIFIER.from_pretrained(saved(body, tmp_path / "body"))
    assert binary_names(back) == binary_names(whole)
    with torch.no_grad():
        assert_equal(back.bert(IDS).pooler_output, whole.bert(IDS).pooler_output)


def test_rules_keep_their_order_in_the_folder(tmp_path):
    rules = {r".*query": None, r".*": {"input_quantization": "approxsign"}, r".*key": None}
    path = saved(bert(), tmp_path / "float")
    config = BitorchQLinearConfig(rules=rules)
    model = loaded(CLASSIFIER, path, quantization_config=config)
    assert repr(loaded(CLASSIFIER, saved(model, tmp_path / "binary"))) == repr(model)
    held = json.loads((tmp_path / "binary" / "config.json").read_text())["quantization_config"]
    assert list(map(tuple, held["rules"])) == list(rules.items())
    again = BitorchQLinearConfig(**held)
    assert list(again.options()["rules"].items()) == list(rules.items())
    assert json.loads(again.to_json_string()) == held


def test_an_infinite_threshold_is_kept(tmp_path):
    config = BitorchQLinearConfig(gradient_cancellation_threshold=math.inf)
    model = loaded(CLASSIFIER, saved(bert(), tmp_path / "float"), quantization_config=config)
    again = loaded(CLASSIFIER, saved(model, tmp_path / "binary"))
    assert again.bert.pooler.dense.gradient_cancellation_threshold == math.inf


def test_what_is_saved_is_what_the_model_is_then(trained, tmp_path):
    path = saved(pack(trained), tmp_path / "packed")
    opened = unpack(loaded(type(trained), path))
    again = loaded(type(trained), saved(opened, tmp_path / "unpacked"))
    assert kinds(again) == kinds(trained)
    assert_equal(outputs(again), outputs(trained))


def test_a_model_that_was_made_binary_by_hand(tmp_path):
    model = binarize(bert(), input_quantization="approxsign")
    assert attach_quantizer(model) is model
    assert_equal(outputs(loaded(CLASSIFIER, saved(model, tmp_path / "binary"))), outputs(model))
    packed = pack(model)
    assert_equal(outputs(loaded(CLASSIFIER, saved(packed, tmp_path / "packed"))), outputs(model))
    late = attach_quantizer(pack(binarize(bert())))
    assert_equal(outputs(loaded(CLASSIFIER, saved(late, tmp_path / "late"))), outputs(late))


class TwoTied(transformers.PreTrainedModel):
    config_class = transformers.BertConfig
    _tied_weights_keys = {"second.weight": "first.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        self.post_init()

    def forward(self, x):
        return self.second(self.first(x))


def test_linear_layers_that_share_a_weight(tmp_path):
    path = saved(TwoTied(transformers.BertConfig(**SMALL)), tmp_path / "float")
    config = BitorchQLinearConfig(keep_first=False, keep_last=False)
    model = loaded(TwoTied, path, quantization_config=config)
    assert kinds(model) == {"first": QLinear, "second": QLinear} and model.first.weight is model.second.weight
    again = loaded(TwoTied, saved(model, tmp_path / "binary"))
    assert again.first.weight is again.second.weight
    packed = pack(model)
    assert packed.first.weight is packed.second.weight
    x = torch.linspace(-1, 1, 2 * SMALL["hidden_size"]).reshape(2, -1)
    again = loaded(TwoTied, saved(packed, tmp_path / "packed"))
    assert kinds(again) == {"first": PackedQLinear, "second": PackedQLinear}
    assert_equal(again(x), model(x))


# ---- quantizations in the configuration ----


def test_a_registered_quantization_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))

    @bitorch_qlinear.register_quantization
    class Halved(Quantization):
        name, bit_width = "halved", 32

        def quantize(self, x):
            return x / 2

    config = BitorchQLinearConfig(input_quantization="halved")
    model = loaded(CLASSIFIER, saved(bert(), tmp_path / "float"), quantization_config=config)
    path = saved(model, tmp_path / "binary")
    assert_equal(outputs(loaded(CLASSIFIER, path)), outputs(model))
    del registry._classes["halved"]
    with pytest.raises(ValueError, match=r"input_quantization: expected one of .*, got 'halved'"):
        CLASSIFIER.from_pretrained(path)


class Scaled(Quantization):
    """A quantization with a parameter and a buffer that no float folder holds."""

    name, bit_width = "scaled", 32

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.75))
        self.register_buffer("offset", torch.tensor(0.25), persistent=False)

    def quantize(self, x):
        return x * self.factor + self.offset


def test_tensors_of_a_quantization_have_their_first_values(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_classes", {**registry._classes, "scaled": Scaled})
    path = saved(bert(), tmp_path / "float")
    config = BitorchQLinearConfig(input_quantization="scaled")
    model = CLASSIFIER.from_pretrained(path, quantization_config=config)
    assert_equal(outputs(model), outputs(binarize(CLASSIFIER.from_pretrained(path), input_quantization="scaled")))
    model.bert.pooler.dense.input_quantization.factor.data.fill_(0.5)
    again = loaded(CLASSIFIER, saved(model, tmp_path / "binary"))
    assert again.bert.pooler.dense.input_quantization.factor == 0.5
    assert_equal(outputs(again), outputs(model))


class Shifted(Quantization):
    """A weight quantization to ±1 with a parameter and a buffer that is not saved."""

    name, bit_width = "shifted", 1

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.01))
        self.register_buffer("one", torch.tensor(1.0), persistent=False)

    def quantize(self, x):
        return torch.where(x < self.shift, -self.one, self.one)


def test_tensors_of_a_packed_layers_quantization(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_classes", {**registry._classes, "shifted": Shifted})
    model = attach_quantizer(binarize(bert(), weight_quantization="shifted"))
    model.bert.pooler.dense.weight_quantization.shift.data.fill_(-0.01)
    packed = pack(model)
    again = loaded(CLASSIFIER, saved(packed, tmp_path / "packed"))
    assert_equal(outputs(again), outputs(model))
    quantization = again.bert.pooler.dense.weight_quantization
    assert quantization.one == 1 and quantization.shift == packed.bert.pooler.dense.weight_quantization.shift


def test_a_quantization_with_settings_is_refused_when_saved(tmp_path):
    model = binarize(bert(), input_quantization=quantizations.SwishSign(beta=3.0))
    with pytest.raises(ValueError, match=r"input_quantization: expected a registered quantization .*beta=3.0"):
        attach_quantizer(model)
    model = attach_quantizer(binarize(bert(), input_quantization=quantizations.SwishSign(beta=5.0)))
    model.bert.pooler.dense.activation.activation_function.beta = 4.0
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.input_quantization: expected a registered"):
        model.save_pretrained(tmp_path / "binary")
    assert not (tmp_path / "binary" / "config.json").exists()


def test_the_shared_scale_of_progressive_sign_is_no_setting_of_a_layer(tmp_path):
    config = BitorchQLinearConfig(input_quantization="progressive_sign")
    model = loaded(CLASSIFIER, saved(bert(), tmp_path / "float"), quantization_config=config)
    scale = quantizations.progressive_sign_scale()
    try:
        quantizations.set_progressive_sign_scale(0.5)
        again = loaded(CLASSIFIER, saved(model, tmp_path / "binary"))
    finally:
        quantizations.set_progressive_sign_scale(scale)
    assert repr(again) == repr(model)
    packed = pack(model)
    assert repr(loaded(CLASSIFIER, saved(packed, tmp_path / "packed"))) == repr(packed)


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"filter_fn": lambda *_: True}, TypeError, "filter_fn: expected modules_to_not_convert or rules instead"),
        ({"keep": 1}, TypeError, "keep: expected one of modules_to_not_convert, input_quantization"),
        ({"input_quantization": nn.Identity()}, TypeError, r"input_quantization: expected what config.json can hold"),
        ({"rules": {".*": {"weight_quantization": nn.Identity()}}}, TypeError, "rules: expected what config.json"),
        ({"rules": ".*"}, TypeError, "rules: expected a mapping of patterns"),
        ({"input_quantization": "sing"}, ValueError, "input_quantization: expected one of .*, got 'sing'"),
        ({"gradient_cancellation_threshold": -1.0}, ValueError, "gradient_cancellation_threshold: "),
        ({"modules_to_not_convert": "pooler"}, TypeError, "modules_to_not_convert: expected a list of names"),
        ({"quant_method": "gptq"}, ValueError, "quant_method: expected 'bitorch_qlinear', got 'gptq'"),
    ],
)
def test_a_wrong_configuration_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        BitorchQLinearConfig(**options)


def test_names_and_rules_that_match_nothing_are_refused(tmp_path):
    path = saved(bert(), tmp_path)
    with pytest.raises(ValueError, match=r"modules_to_not_convert: .* got 'poole'; the linear layers are bert\."):
        CLASSIFIER.from_pretrained(path, quantization_config=BitorchQLinearConfig(modules_to_not_convert=["poole"]))
    with pytest.raises(ValueError, match=r"rules\['no'\]: expected a pattern that matches"):
        CLASSIFIER.from_pretrained(path, quantization_config=BitorchQLinearConfig(rules={"no": None}))


def test_packed_layers_of_a_float_folder_are_refused(trained, tmp_path):
    packed = pack(trained)
    saved(packed, tmp_path / "packed")
    config = packed.config.quantization_config
    assert config.packed_layers
    with pytest.raises(ValueError, match=r"packed_layers: expected none, .* call bitorch_qlinear\.pack"):
        type(trained).from_pretrained(tmp_path / "float", quantization_config=config)


def test_another_kind_of_model_is_refused(tmp_path):
    path = saved(attach_quantizer(binarize(bert())), tmp_path)
    with pytest.raises(ValueError, match=r"binary_layers: expected layers of a LlamaForCausalLM, got 'bert\."):
        CAUSAL.from_pretrained(path, config=config_like(llama(), path))


def config_like(model, path):
    config = model.config
    config.quantization_config = json.loads((path / "config.json").read_text())["quantization_config"]
    return config


def missing(state, layer):
    del state[f"{layer}.weight"]


def test_floats_in_a_packed_folder_are_packed_and_not_cast_to_words(tmp_path):
    config = BitorchQLinearConfig(keep_first=False, keep_last=False)
    shape = transformers.BertConfig(**{**SMALL, "hidden_size": 1, "num_attention_heads": 1})  # one weight is one word
    model = loaded(TwoTied, saved(TwoTied(shape), tmp_path / "float"), quantization_config=config)
    path = saved(pack(model), tmp_path / "packed")
    state = load_file(path / "model.safetensors")
    state["first.weight"], state["second.weight"] = torch.tensor([[0.5]]), torch.tensor([[-0.5]])
    save_file(state, path / "model.safetensors", {"format": "pt"})
    again = TwoTied.from_pretrained(path)
    assert again.first.weight.tolist() == [[1]] and again.second.weight.tolist() == [[0]]


def newer(state, layer):
    state[f"{layer}.format"] += 8


def other_rule(state, layer):
    state[f"{layer}.input_rule"] += 1


def bits_past_k(state, layer):
    state[f"{layer}.weight"][0, -1] |= 1 << 31


def without_bias(state, layer):
    del state[f"{layer}.bias"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "Missing key.*weight"),
        (newer, "format: expected a checkpoint of format 1"),
        (other_rule, "input_rule: expected"),
        (bits_past_k, "weight: expected zero bits past k = 48"),
        (without_bias, "Missing key.*bias"),
    ],
)
def test_a_damaged_packed_folder_is_refused(damage, message, tmp_path):
    path = saved(attach_quantizer(pack(binarize(bert()))), tmp_path)
    state = load_file(path / "model.safetensors")
    damage(state, "bert.pooler.dense")
    save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=rf"bert\.pooler\.dense: (?s:.*){message}"):
        CLASSIFIER.from_pretrained(path)


def test_words_of_another_size_are_refused_although_sizes_may_mismatch(tmp_path):
    path = saved(attach_quantizer(pack(binarize(bert()))), tmp_path)
    state = load_file(path / "model.safetensors")
    state["bert.pooler.dense.weight"] = state["bert.pooler.dense.weight"][:, :1].contiguous()
    save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        RuntimeError, match=r"bert\.pooler\.dense: (?s:.*)(Missing key.*weight|expected words of shape)"
    ):
        CLASSIFIER.from_pretrained(path, ignore_mismatched_sizes=True)


def test_models_that_attach_quantizer_refuses():
    with pytest.raises(TypeError, match=r"model: expected a transformers\.PreTrainedModel, got Sequential"):
        attach_quantizer(nn.Sequential(QLinear(3, 3)))
    with pytest.raises(ValueError, match="expected QLinear or PackedQLinear layers, found none"):
        attach_quantizer(bert())
    model = binarize(bert())
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="expected one that no other method has quantized, got a object"):
        attach_quantizer(model)

    class Own(QLinear):
        pass

    model = binarize(bert())
    model.bert.pooler.dense = Own(48, 48)
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense: expected a QLinear or a PackedQLinear, got a Own"):
        attach_quantizer(model)


def test_dequantize_names_unpack(trained):
    with pytest.raises(NotImplementedError, match="unpack"):
        trained.dequantize()


# ---- processes ----


def run(program, *arguments):
    root = str(Path(bitorch_qlinear.__file__).parents[1])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def test_the_package_does_not_import_transformers():
    result = run("import sys, bitorch_qlinear; print('transformers' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


LOAD = "import sys, transformers; transformers.BertForSequenceClassification.from_pretrained(sys.argv[{}]);"


@pytest.mark.slow
def test_without_the_import_a_packed_folder_is_an_error_and_a_binary_one_a_warning(tmp_path):
    model = attach_quantizer(binarize(bert()))
    binary, packed = saved(model, tmp_path / "binary"), saved(pack(model), tmp_path / "packed")
    result = run(LOAD.format(1) + "print('floats');" + LOAD.format(2), binary, packed)
    assert result.stdout == "floats\n" and result.returncode != 0
    assert "Unknown quantization type, got bitorch_qlinear" in result.stderr and "mismatch" in result.stderr
    result = run("import bitorch_qlinear.transformers;" + LOAD.format(1) + LOAD.format(2), binary, packed)
    assert result.returncode == 0 and "Unknown" not in result.stderr, result.stderr


def test_transformers_that_is_missing_or_too_old_is_named():
    result = run("import sys; sys.modules['transformers'] = None; import bitorch_qlinear.transformers")
    assert "ImportError: bitorch_qlinear.transformers: expected transformers 5.22 or newer" in result.stderr
