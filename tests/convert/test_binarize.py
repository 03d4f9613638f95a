"""binarize() and explain_binarize() choose the right layers, keep what belongs to the model, and report the reasons."""

import copy
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from bitorch.layers import QLinear as BitorchQLinear
from support.reference import assert_equal
from torch import nn
from torch.nn.utils import parametrizations, prune

from bitorch_qlinear import (
    BinarizeReport,
    PackedQLinear,
    QLinear,
    Quantization,
    binarize,
    explain,
    explain_binarize,
    pack,
    quantizations,
)

either_place = pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "copy"])
X = torch.linspace(-1, 1, 6 * 12).reshape(6, 12).mul(1e3).sin()


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.fc2(self.fc1(self.norm(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


INNER = ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]


def binary_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, (QLinear, PackedQLinear))]


def by_hand(model, threshold=1.0):
    """Return a copy whose inner layers are replaced by from_linear()."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.fc1 = QLinear.from_linear(block.fc1, gradient_cancellation_threshold=threshold)
        block.fc2 = QLinear.from_linear(block.fc2, gradient_cancellation_threshold=threshold)
    return model


def reason_for(model, name, **options):
    """Return the reason that the report gives; binarize() must leave the layer's class as it is."""
    (layer,) = [layer for layer in explain_binarize(model, **options) if layer.name == name]
    assert not layer.replaced
    assert layer.options == {}
    kind = type(model.get_submodule(name))
    assert type(binarize(model, inplace=True, **options).get_submodule(name)) is kind
    return layer.reason


# ---- what is chosen ----


@either_place
def test_first_and_last_stay_real(inplace):
    model = Model()
    result = binarize(model, inplace=inplace)
    assert binary_names(result) == INNER
    assert type(result.stem) is type(result.head) is nn.Linear


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_first_and_last_on_request(first, last):
    names = [*["stem"] * (not first), *INNER, *["head"] * (not last)]
    assert binary_names(binarize(Model(), keep_first=first, keep_last=last)) == names


def test_first_and_last_are_those_of_the_model_not_of_the_choice():
    assert binary_names(binarize(Model(), filter_fn=lambda module, name: name.startswith("blocks."))) == INNER
    model = nn.Sequential(QLinear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8), pack(QLinear(8, 8)))
    assert binary_names(binarize(model)) == ["0", "1", "2", "3"]


def test_a_convolution_is_the_first_layer():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3)
    )
    assert binary_names(binarize(model)) == ["2", "4"]
    assert binary_names(binarize(nn.Sequential(*model, nn.ConvTranspose1d(3, 3, 1)))) == ["2", "4", "5"]


def test_filter_is_called_with_the_models_own_layers_and_names():
    model = Model()
    seen = {}
    assert binary_names(binarize(model, filter_fn=lambda module, name: bool(seen.setdefault(name, module)))) == INNER
    assert list(seen) == ["stem", *INNER, "head"]
    assert all(model.get_submodule(name) is module for name, module in seen.items())
    chosen = model.blocks[1].fc1
    assert binary_names(binarize(model, filter_fn=lambda module, name: module is chosen)) == ["blocks.1.fc1"]
    assert reason_for(model, "blocks.0.fc1", filter_fn=lambda *_: False) == "filter_fn leaves it out"


def test_rules_by_names():
    rules = {
        r"blocks\.1\..*": None,
        r".*\.fc1": {"input_quantization": "approxsign", "gradient_cancellation_threshold": None},
        r".*": {"weight_quantization": "steheaviside"},
    }
    model = binarize(Model(), rules=rules, input_quantization="swishsign")
    assert binary_names(model) == ["blocks.0.fc1", "blocks.0.fc2"]
    first, second = model.blocks[0].fc1, model.blocks[0].fc2
    assert type(first.input_quantization) is quantizations.ApproxSign
    assert type(first.weight_quantization) is quantizations.Sign
    assert first.gradient_cancellation_threshold is None
    assert type(second.input_quantization) is quantizations.SwishSign
    assert type(second.weight_quantization) is quantizations.SteHeaviside
    assert second.gradient_cancellation_threshold == 1.0
    assert reason_for(Model(), "blocks.1.fc2", rules=rules) == r"the rule 'blocks\\.1\\..*' leaves it out"


def test_a_rule_matches_the_whole_name():
    assert binary_names(binarize(Model(), rules={r"blocks\.\d\.fc2": None})) == ["blocks.0.fc1", "blocks.1.fc1"]
    with pytest.raises(ValueError, match=r"rules\['blocks'\]: expected a pattern that matches the whole name"):
        binarize(Model(), rules={"blocks": None})


def test_a_first_layer_with_real_input():
    rules = {"stem": {"input_quantization": "identity"}}
    model = binarize(Model(), keep_first=False, rules=rules)
    assert type(model.stem.input_quantization) is quantizations.Identity
    assert type(binarize(Model(), rules=rules).stem) is nn.Linear


# ---- roots, shared layers, repetition ----


@either_place
def test_a_layer_itself(inplace):
    layer = nn.Linear(12, 8).eval()
    result = binarize(layer, inplace=inplace)
    assert type(result) is QLinear
    assert not result.training
    assert (result.weight is layer.weight) is inplace
    assert_equal(result(X), QLinear.from_linear(layer)(X))
    assert binarize(result, inplace=True) is result
    assert reason_for(nn.Linear(12, 8), "", filter_fn=lambda *_: False) == "filter_fn leaves it out"


@either_place
def test_a_shared_layer_becomes_one(inplace):
    layer = nn.Linear(12, 12)
    model = nn.Sequential(layer, nn.ModuleDict({"again": layer}), layer)
    result = binarize(model, keep_first=False, keep_last=False, inplace=inplace)
    assert type(result[0]) is QLinear
    assert result[0] is result[1]["again"] is result[2]
    assert len(explain_binarize(model)) == 1


def test_a_shared_layer_has_all_its_names():
    layer = nn.Linear(12, 12)
    model = nn.ModuleDict({"start": nn.Linear(12, 12), "a": layer, "b": layer, "end": nn.Linear(12, 12)})
    assert binary_names(binarize(model)) == ["a"]
    assert binary_names(binarize(model, rules={"b": None})) == []
    assert binary_names(binarize(model, filter_fn=lambda module, name: name != "b")) == []


@either_place
@pytest.mark.parametrize("packed", [False, True])
def test_a_second_call_changes_nothing(packed, inplace):
    model = binarize(Model())
    model = pack(model.eval()) if packed else model
    layers = dict(model.named_modules())
    again = binarize(model, inplace=inplace)
    assert binary_names(again) == INNER
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    assert (again.blocks[0].fc1 is layers["blocks.0.fc1"]) is inplace


def test_layers_inside_a_quantization_are_not_layers_of_the_model():
    class Learned(Quantization):
        name, bit_width = "learned", 1

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(12, 12)

        def quantize(self, x):
            return self.inner(x).sign()

    model = nn.Sequential(nn.Linear(12, 12), QLinear(12, 12, input_quantization=Learned()), nn.Linear(12, 12))
    assert type(binarize(model)[1].input_quantization.inner) is nn.Linear
    assert [layer.name for layer in explain_binarize(model)] == ["0", "1", "2"]


# ---- what the new layers keep ----


@either_place
def test_names_parameters_and_checkpoints(inplace):
    model = Model()
    model.blocks[0].fc1.weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = binarize(model, inplace=inplace)
    after = dict(result.named_parameters())
    assert list(after) == list(parameters)
    assert list(result.state_dict()) == list(state)
    for name, parameter in after.items():
        assert (parameter is parameters[name]) is inplace
        assert parameter.requires_grad is parameters[name].requires_grad
        assert_equal(parameter.detach(), state[name])
    result.load_state_dict(state)
    Model().load_state_dict(result.state_dict())


def test_a_copy_shares_nothing():
    model = Model()
    want = model(X).detach()
    result = binarize(model)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.neg_()
    result.eval()
    assert model.training
    assert binary_names(model) == []
    assert_equal(model(X).detach(), want)


def test_an_optimizer_goes_on_in_place():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    binarize(model, inplace=True)
    before = model.blocks[0].fc1.weight.detach().clone()
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].fc1.weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_mode_dtype_and_device(dtype):
    model = Model().to(dtype)
    model.blocks[0].eval()
    result = binarize(model)
    assert [each.training for each in result.modules() if type(each) is QLinear] == [False, False, True, True]
    assert {parameter.dtype for parameter in result.parameters()} == {dtype}
    assert {parameter.device.type for parameter in binarize(Model().to("meta")).parameters()} == {"meta"}


def test_attributes_of_the_user_stay():
    original = Model()
    model = copy.deepcopy(original)
    model.blocks[0].fc1.SCALED = 3
    model.blocks[0].fc1.compile()
    result = binarize(model, inplace=True)
    assert result.blocks[0].fc1.SCALED == 3
    assert_equal(result(X).detach(), by_hand(original)(X).detach())  # the compiled call of the float layer is gone


@either_place
def test_equal_to_a_model_replaced_by_hand(inplace):
    model = Model()
    hand = by_hand(model)
    result = binarize(model, inplace=inplace)
    for step in range(3):
        want, got = hand(X), result(X)
        assert_equal(got.detach(), want.detach(), step)
        for each, y in ((hand, want), (result, got)):
            each.zero_grad()
            y.square().sum().backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter -= 0.01 * parameter.grad
    for (name, got), want in zip(result.named_parameters(), hand.parameters(), strict=True):
        assert_equal(got.detach(), want.detach(), name)
        assert_equal(got.grad, want.grad, name)
    assert_equal(result.eval()(X).detach(), hand.eval()(X).detach())


@pytest.mark.parametrize("threshold", [None, 0.25, 1.0])
def test_threshold(threshold):
    given = {} if threshold == 1.0 else {"gradient_cancellation_threshold": threshold}
    model = Model()
    got, want = binarize(model, **given), by_hand(model, threshold)
    for each in (got, want):
        each(X).square().sum().backward()
    assert got.blocks[0].fc1.gradient_cancellation_threshold == threshold
    assert_equal(got.stem.weight.grad, want.stem.weight.grad)


def test_each_layer_has_a_quantization_of_its_own():
    class Scaled(Quantization):
        name, bit_width = "scaled", 1

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def quantize(self, x):
            return x.sign() * self.scale

    given = Scaled()
    model = binarize(Model(), input_quantization=given, weight_quantization="sign")
    found = [model.get_submodule(name).input_quantization for name in INNER]
    assert len({id(each) for each in (given, *found)}) == 5
    model(X).sum().backward()
    assert given.scale.grad is None
    assert all(each.scale.grad is not None for each in found)
    at_meta = binarize(Model().to("meta"), input_quantization=given)
    assert at_meta.blocks[0].fc1.input_quantization.scale.is_meta


# ---- what cannot be replaced ----


def with_layer(layer):
    return nn.Sequential(nn.Linear(12, 12), layer, nn.Linear(12, 12))


class Own(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


def changed(change):
    layer = nn.Linear(12, 12)
    change(layer)
    return layer


def forward_on_the_instance(layer):
    layer.forward = lambda x: x


def complex_weight(layer):
    layer.weight = nn.Parameter(torch.zeros(12, 12, dtype=torch.complex64))


class Tagged(torch.Tensor):
    pass


def weight_of_a_class(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tagged))


LEFT = {
    "subclass": (lambda: Own(12, 12), "it is a Own, which may compute something else than nn.Linear"),
    "lazy": (lambda: nn.LazyLinear(12), "its sizes are not known before the first call"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(12, 12)),
        "its weight is computed from other tensors: call torch.nn.utils.parametrize.remove_parametrizations",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(12, 12), "weight", 0.5),
        "its weight is computed from other tensors: call torch.nn.utils.prune.remove",
    ),
    "hook": (
        lambda: changed(lambda layer: layer.register_forward_hook(print)),
        "it has hooks (print), which it would lose",
    ),
    "pre-hook": (lambda: changed(lambda layer: layer.register_forward_pre_hook(print)), "it has hooks (print)"),
    "backward-hook": (lambda: changed(lambda layer: layer.register_full_backward_hook(print)), "it has hooks (of back"),
    "state-hook": (
        lambda: changed(lambda layer: layer.register_state_dict_post_hook(lambda *_: None)),
        "it has hooks (of",
    ),
    "load-hook": (
        lambda: changed(lambda layer: layer.register_load_state_dict_pre_hook(print)),
        "it has hooks (of backward or state_dict)",
    ),
    "forward": (lambda: changed(forward_on_the_instance), "it has a forward of its own"),
    "buffer": (
        lambda: changed(lambda layer: layer.register_buffer("mask", torch.ones(3))),
        "it holds tensors or modules of its own (mask)",
    ),
    "child": (
        lambda: changed(lambda layer: layer.add_module("lora", nn.Identity())),
        "it holds tensors or modules of its own (lora)",
    ),
    "parameter": (
        lambda: changed(lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(3)))),
        "it holds tensors or modules of its own (scale)",
    ),
    "class": (lambda: changed(weight_of_a_class), "its weight is a Tagged, whose signs cannot be trained"),
    "complex": (lambda: changed(complex_weight), "its weight is torch.complex64: expected float64"),
    "float8": (
        lambda: nn.Linear(12, 12).to(torch.float8_e4m3fn),
        "its weight is torch.float8_e4m3fn: expected float64",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_replaced(case, caplog):
    make, said = LEFT[case]
    model = with_layer(make()).append(nn.Linear(12, 12))
    with caplog.at_level(logging.INFO, "bitorch_qlinear"):
        reason = reason_for(model, "1")
    assert type(model[2]) is QLinear
    assert reason.startswith(said)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"  1 stays as it is: {reason}" in record.getMessage()


def test_what_can_be_replaced_among_them():
    model = with_layer(prune.l1_unstructured(nn.Linear(12, 12), "weight", 0.5))
    prune.remove(model[1], "weight")
    assert type(binarize(model)[1]) is QLinear
    lazy = with_layer(nn.LazyLinear(12))
    lazy(X)
    assert type(binarize(lazy)[1]) is QLinear


def test_layers_of_bitorch_are_binary_already():
    model = with_layer(BitorchQLinear(12, 12))
    result = binarize(model, inplace=True)
    assert result[1] is model[1]
    assert explain_binarize(model).layers[1].binary


def test_attention_keeps_its_projection():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16)
    hand = copy.deepcopy(model)
    for name in ("layers.0.linear1", "layers.0.linear2", "layers.1.linear1"):
        parent, _, child = name.rpartition(".")
        layer = QLinear.from_linear(hand.get_submodule(name), gradient_cancellation_threshold=1.0)
        setattr(hand.get_submodule(parent), child, layer)
    result = binarize(model)
    assert binary_names(result) == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1"]
    with torch.no_grad():
        assert_equal(result(x), hand(x))
        assert_equal(pack(result)(x), hand(x))
    reason = reason_for(model, "layers.1.self_attn.out_proj")
    assert reason == "nn.MultiheadAttention reads out_proj.weight itself and never calls the layer"


def test_a_plain_projection_of_an_attention():
    attention = nn.MultiheadAttention(16, 4)
    attention.out_proj = nn.Linear(16, 16)
    assert "reads out_proj.weight" in reason_for(with_layer(attention), "1.out_proj")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.inner = nn.Linear(12, 12)
        self.decoder = nn.Linear(12, 30, bias=False)
        self.decoder.weight = self.embedding.weight
        self.other = nn.Linear(12, 30, bias=False)
        self.other.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(self.inner(self.embedding(x))) + self.other(self.inner(self.embedding(x)))


@either_place
def test_weights_tied_to_an_embedding(inplace):
    model = Tied()
    result = binarize(model, keep_first=False, keep_last=False, inplace=inplace)
    assert binary_names(result) == ["inner"]
    assert result.decoder.weight is result.embedding.weight is result.other.weight
    reason = reason_for(model, "decoder", keep_last=False)
    assert reason == "its weight is also that of embedding (Embedding), which reads it as real numbers"


def test_weights_that_share_memory_with_a_module_that_stays_real():
    """Another Parameter, or a buffer, of the same memory is tied as well."""
    model = nn.Sequential(nn.Embedding(12, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Module(), nn.Linear(12, 12))
    model[1].weight = nn.Parameter(model[0].weight.data)
    model[3].register_buffer("table", model[2].weight.data)
    assert "also that of 0 (Embedding)" in reason_for(model, "1", keep_first=False)
    assert "also that of 3 (Module)" in reason_for(model, "2", keep_first=False)
    assert binary_names(binarize(model, keep_first=False, keep_last=False)) == ["4"]


def test_weights_tied_to_a_real_layer():
    layers = [nn.Linear(12, 12) for _ in range(4)]
    layers[3].weight = layers[1].weight
    model = nn.Sequential(*layers)
    assert binary_names(binarize(model)) == ["2"]
    assert "also that of 3 (Linear)" in reason_for(model, "1")
    both = binarize(model, keep_last=False)
    assert binary_names(both) == ["1", "2", "3"]
    assert both[1].weight is both[3].weight
    model[3] = QLinear.from_linear(model[3])
    assert binary_names(binarize(model)) == ["1", "2", "3"]


def test_a_weight_that_the_parent_registers():
    model = Model()
    model.register_parameter("read", model.blocks[0].fc1.weight)
    assert "also that of the model (Model)" in reason_for(model, "blocks.0.fc1")


def test_a_model_for_distributed_training_is_unwrapped_first(tmp_path):
    code = f"""
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from bitorch_qlinear import QLinear, binarize, explain_binarize
dist.init_process_group("gloo", init_method="file://{tmp_path}/processes", rank=0, world_size=1)
layers = lambda: nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
sharded = layers()
fully_shard(sharded)
for model in (DistributedDataParallel(layers()), sharded):
    for convert in (binarize, lambda model: binarize(model, inplace=True), explain_binarize):
        try:
            convert(model)
        except RuntimeError as error:
            print(error)
assert type(binarize(DistributedDataParallel(layers()).module)[1]) is QLinear
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrapped in DistributedDataParallel, or with such a module inside: pass model.module") == 3
    assert done.stdout.count("that FSDP shards: binarize the model first, and shard the result") == 3


def test_a_model_that_cannot_be_copied():
    model = Model()
    model.lock = threading.Lock()
    with pytest.raises(RuntimeError, match=r"model: cannot be copied .*inplace=True works on the model itself"):
        binarize(model)
    assert binary_names(model) == []
    assert binary_names(binarize(model, inplace=True)) == INNER


# ---- wrong arguments ----

WRONG = {
    "model": (TypeError, r"model: expected an nn\.Module, got 3", lambda: binarize(3)),
    "class": (TypeError, r"model: expected an nn\.Module, got ", lambda: explain_binarize(Model)),
    "filter": (TypeError, "filter_fn: expected a function", lambda: binarize(Model(), filter_fn="fc1")),
    "input": (ValueError, "input_quantization: expected one of", lambda: binarize(Model(), input_quantization="sing")),
    "report": (
        ValueError,
        "input_quantization: expected one of",
        lambda: explain_binarize(Model(), input_quantization="sing"),
    ),
    "weight": (TypeError, "weight_quantization: expected a name", lambda: binarize(Model(), weight_quantization=1)),
    "threshold": (
        ValueError,
        "gradient_cancellation_threshold: expected None or a number >= 0",
        lambda: binarize(Model(), gradient_cancellation_threshold=-1.0),
    ),
    "rules": (TypeError, "rules: expected a mapping of patterns", lambda: binarize(Model(), rules=["fc1"])),
    "pattern": (
        ValueError,
        r"rules\['\('\]: expected a regular expression",
        lambda: binarize(Model(), rules={"(": {}}),
    ),
    "options": (
        TypeError,
        r"rules\['.\*'\]: expected a str with a map",
        lambda: binarize(Model(), rules={".*": "sign"}),
    ),
    "unknown": (
        ValueError,
        r"rules\['.\*'\]: expected options among .*; got 'threshold'",
        lambda: binarize(Model(), rules={".*": {"threshold": 1.0}}),
    ),
    "value": (
        ValueError,
        r"rules\['.\*'\]: input_quantization: expected one of",
        lambda: binarize(Model(), rules={".*": {"input_quantization": "sing"}}),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    error, said, call = WRONG[case]
    with pytest.raises(error, match=said):
        call()


def test_nothing_is_replaced_before_an_error():
    model = Model()
    with pytest.raises(ValueError, match="matches none"):
        binarize(model, rules={"nothing": None}, inplace=True)
    with pytest.raises(ZeroDivisionError):
        binarize(model, filter_fn=lambda module, name: 1 / (name != "head"), inplace=True)
    assert binary_names(model) == []


# ---- reports ----


def test_log(caplog):
    with caplog.at_level(logging.INFO, "bitorch_qlinear"):
        model = binarize(Model())
        binarize(model)
        binarize(nn.Sequential(nn.Linear(3, 2)))
    first = "  stem stays as it is: it is the first layer (keep_first=False replaces it)"
    last = "  head stays as it is: it is the last layer (keep_last=False replaces it)"
    only = "  0 stays as it is: it is the first layer (keep_first=False replaces it)"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "\n".join(["binarized 4 of 6 nn.Linear", first, last])),
        ("INFO", "\n".join(["binarized 0 of 2 nn.Linear", first, last])),
        ("WARNING", "\n".join(["binarized 0 of 1 nn.Linear", only])),
    ]


def test_a_module_that_does_not_let_its_layer_go(caplog):
    class Stubborn(nn.Sequential):
        def register_module(self, name, module):
            if not isinstance(module, QLinear):
                super().register_module(name, module)

    model = with_layer(Stubborn(nn.Linear(12, 12)))
    assert binary_names(binarize(model)) == []
    assert "1.0 stays as it is: the module that holds it does not let it be replaced" in caplog.text


def test_a_module_that_copies_its_layer_as_another(caplog):
    class Changing(nn.Sequential):
        def __deepcopy__(self, memo):
            return Changing(Own(12, 12))

    model = with_layer(Changing(nn.Linear(12, 12)))
    result = binarize(model)
    assert type(result[1][0]) is Own
    assert "1.0 stays as it is: the module that holds it does not let it be replaced" in caplog.text
    assert binary_names(binarize(model, inplace=True)) == ["1.0"]


def test_report_before_and_after():
    model = Model()
    report = explain_binarize(model, rules={"blocks.0.fc2": None})
    assert isinstance(report, BinarizeReport)
    assert binary_names(model) == []
    assert [layer.name for layer in report] == ["stem", *INNER, "head"]
    assert [layer.replaced for layer in report] == [False, True, False, True, True, False]
    assert [layer.weights for layer in report] == [12 * 16, 512, 512, 512, 512, 5 * 16]
    assert report.layers[1].options == {
        "input_quantization": None,
        "weight_quantization": None,
        "gradient_cancellation_threshold": 1.0,
        "weight_scale": None,
    }
    lines = str(report).splitlines()
    assert len(lines) == len(report) + 2
    assert lines[2].endswith("replaces it: sign input, sign weights, threshold 1.0")
    assert lines[3].endswith("the rule 'blocks.0.fc2' leaves it out")
    assert (
        lines[-1]
        == "6 linear layers: 0 binary, 3 that binarize() would replace; 66.2 % of their weights would be binary"
    )
    after = explain_binarize(binarize(model))
    assert [layer.binary for layer in after] == [False, True, True, True, True, False]
    assert not any(layer.replaced for layer in after)
    lines = str(after).splitlines()
    assert "is binary" in lines[2]
    assert lines[-1].startswith("6 linear layers: 4 binary, 0 that binarize() would replace; 88.3 % of their weights")
    assert [layer.name for layer in explain(binarize(model))] == INNER
    assert str(explain_binarize(nn.ReLU())) == "no nn.Linear in this model"


# ---- what comes after ----


def test_pack_after_training():
    model = binarize(Model())
    model(X).sum().backward()
    packed = pack(model.eval())
    assert [type(packed.get_submodule(name)) for name in INNER] == [PackedQLinear] * 4
    assert_equal(packed(X), model(X))


def test_compile():
    model = binarize(Model()).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(X).detach(), model(X).detach())


def test_a_float_model_learns_digits_as_a_binary_one():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = (torch.from_numpy(each) for each in datasets.load_digits(return_X_y=True))
    images, labels = images.float() / 8 - 1, labels.long()
    layers = [nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.Linear(128, 10)]
    float_model = nn.Sequential(*layers)
    model = binarize(float_model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        for part in torch.randperm(1200).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    packed = pack(model.eval())
    accuracy = (packed(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()
    changed_signs = (model[2].weight < 0) != (float_model[2].weight < 0)
    assert binary_names(packed) == ["2"]
    assert changed_signs.float().mean() > 0.05
    assert accuracy > 0.5  # chance is 0.1
