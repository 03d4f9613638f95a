"""pack(model, fuse=True): what it fuses equals the unfused model bit for bit, and what it leaves alone has a reason."""

import copy
import io
import itertools
import logging
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.reference import FLOATS, assert_equal
from torch import nn

from bitorch_qlinear import Folded, PackedQLinear, QLinear, explain, kernels, pack, unpack

K, N = 70, 37
before_any_trace = nn.Module.__call__
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def norm(n, seed=0, **options):
    """A BatchNorm1d of a trained model: weights of both signs, one of them 0, and a variance that is nearly 0."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.BatchNorm1d(n, **options)
    with torch.no_grad():
        module.running_mean.copy_(torch.randn(n, generator=generator) * n**0.5)
        module.running_var.copy_(torch.rand(n, generator=generator) * 2 * n + 0.1)
        module.running_var[-1] = 1e-12
        if module.affine:
            module.weight.copy_(torch.randn(n, generator=generator))
            module.bias.copy_(torch.randn(n, generator=generator))
            module.weight[0] = 0
    return module


def slopes(n):
    module = nn.PReLU(n)
    module.weight.data.uniform_(0, 0.5)
    return module


def signs(n, k, rule="sign", **options):
    layer = QLinear(k, n, input_quantization=rule, **options)
    if layer.bias is not None:
        layer.bias.data.normal_(0, k**0.5)
    return layer


BETWEEN = {
    "batch-norm": lambda n: [norm(n)],
    "without-affine": lambda n: [norm(n, affine=False)],
    "batch-norm-hardtanh-dropout": lambda n: [norm(n), nn.Hardtanh(), nn.Dropout()],
    "dropout-batch-norm-hardtanh": lambda n: [nn.Dropout(), norm(n), nn.Hardtanh(inplace=True)],
    "prelu": lambda n: [nn.PReLU()],
    "batch-norm-prelu-per-channel": lambda n: [norm(n), slopes(n)],
    "prelu-batch-norm": lambda n: [slopes(n), norm(n)],
    "relu-batch-norm": lambda n: [nn.ReLU(inplace=True), norm(n)],
    "relu6-batch-norm": lambda n: [nn.ReLU6(), norm(n)],
    "leaky-relu-batch-norm": lambda n: [nn.LeakyReLU(0.3), norm(n)],
    "threshold-batch-norm": lambda n: [nn.Threshold(1.5, 0.5), norm(n)],
    "two-batch-norms": lambda n: [norm(n), nn.Hardtanh(-0.5, 2), norm(n, seed=1)],
    "hardtanh": lambda n: [nn.Hardtanh(0.0, 2)],
    "identity": lambda n: [nn.Identity()],
    "alpha-dropout-hardtanh": lambda n: [nn.AlphaDropout(), nn.Hardtanh()],
}


def chain(between, dtype=torch.float32, rule="sign", k=K, n=N, **options):
    """Two layers with modules between, and a third one, so that the second one's output is used, too."""
    layers = [signs(n, k, rule, **options), *between(n), signs(N, n, rule), *between(N), signs(5, N, rule)]
    return nn.Sequential(*layers).to(dtype).eval()


def fused_layers(model):
    return [layer.is_fused for layer in model.modules() if isinstance(layer, PackedQLinear)]


def assert_same(model, dtype=torch.float32, k=K, rows=(1, 2, 3, 17, 64), want=None):
    """The fused model equals the packed one for rows of several numbers and strides; returns it."""
    packed, fused = pack(model), pack(model, fuse=True)
    if want is not None:
        assert fused_layers(fused) == want
    for count in rows:
        x = torch.randn(count, k, dtype=dtype)
        for each in (x, x.t().contiguous().t(), torch.randn(count, 2 * k, dtype=dtype)[:, ::2]):
            with torch.no_grad():
                assert_equal(fused(each), packed(each), (dtype, count))
    return fused


def every_product(layer):
    """Inputs for which the layer's first output has each value that it can have."""
    first = layer.weight[:1]
    if isinstance(layer, PackedQLinear):
        first = layer._signs(torch.float32)[:1]
    first = (first.detach().float().sign() + 0.5).sign()
    k = layer.in_features
    return torch.where(torch.arange(k) < torch.arange(k + 1)[:, None], -first, first)


# ---- equality ----


@dtypes
@pytest.mark.parametrize("rule", ["sign", "steheaviside"])
@pytest.mark.parametrize("between", BETWEEN)
def test_equals_the_packed_model(between, rule, dtype):
    model = chain(BETWEEN[between], dtype, rule)
    fused = assert_same(model, dtype)
    steps = between not in ("relu-batch-norm", "threshold-batch-norm")
    assert fused_layers(fused)[:2] == [True, True] or not steps
    assert not any(isinstance(module, nn.BatchNorm1d) for module in fused) or not steps


@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 65])
def test_every_value_of_the_product(n, bias, dtype):
    """One column takes another way through batch_norm if it is not evaluated in the layout of a real call."""
    for seed in range(5):
        layer = signs(n, 40, bias=bias)
        model = nn.Sequential(layer, norm(n, seed), nn.Hardtanh(), signs(n, n, "steheaviside")).to(dtype).eval()
        packed, fused = pack(model), pack(model, fuse=True)
        assert fused_layers(fused) == [True, False]
        with torch.no_grad():
            for row in range(n):
                one = copy.deepcopy(layer)
                one.weight.data = one.weight.data[row:]
                x = every_product(one).to(dtype)
                assert_equal(fused(x), packed(x), (seed, row))
                assert_equal(fused(x[3:4]), packed(x[3:4]), (seed, row))


def bits_after(layer, modules, x):
    y = layer(x)
    for module in modules:
        y = module(y)
    return y


@given(
    k=st.integers(1, 9),
    n=st.integers(1, 5),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(FLOATS),
    rules=st.tuples(*[st.sampled_from(["sign", "steheaviside"])] * 2),
    names=st.lists(st.sampled_from(["norm", "tanh", "relu", "prelu", "leaky", "threshold", "dropout"]), max_size=4),
    special=st.sampled_from([None, 0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-30, -1.0, 1e30]),
)
def test_all_inputs_of_small_layers(k, n, seed, dtype, rules, names, special):
    """Every possible input: the bits of a fused layer are those of the modules, in whatever order they follow."""
    torch.manual_seed(seed)
    make = {
        "norm": lambda: norm(n, seed),
        "tanh": lambda: nn.Hardtanh(-1.0, 0.5),
        "relu": nn.ReLU,
        "prelu": lambda: slopes(n),
        "leaky": lambda: nn.LeakyReLU(-0.2),
        "threshold": lambda: nn.Threshold(1.0, -3.0),
        "dropout": nn.Dropout,
    }
    between = [make[name]() for name in names]
    if special is not None:
        for module in between:
            for tensor in itertools.islice(module.state_dict().values(), 4):
                if seed % 3 != 1 or tensor is not getattr(module, "running_mean", None):
                    tensor[0] = special
    model = nn.Sequential(signs(n, k, rules[0]), *between, signs(3, n, rules[1])).to(dtype).eval()
    packed, fused = pack(model), pack(model, fuse=True)
    numbers = torch.arange(2**k)[:, None] >> torch.arange(k) & 1
    x = (2 * numbers - 1).to(dtype)
    with torch.no_grad():
        assert_equal(fused(x), packed(x))
        assert_equal(fused(x[:1]), packed(x[:1]))
        if fused[0].is_fused:
            y, want = fused[0](x), bits_after(packed[0], packed[1:-1], x)
            positive = want > 0 if rules[1] == "steheaviside" else ~(want < 0)
            assert bool((y.abs() >= 1).all())
            assert_equal(y > 0, positive)
        elif between:
            assert "more than once" in explain(fused).layers[0].fusion


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-45, -1.0, 0.0], ids=str)
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_strange_parameters_of_batch_norm(name, value, dtype):
    model = chain(lambda n: [norm(n), nn.Hardtanh()], dtype)
    getattr(model[1], name).data[::3] = value
    assert_same(model, dtype)


def test_an_infinite_or_missing_number_in_the_bias():
    model = chain(BETWEEN["batch-norm-hardtanh-dropout"])
    model[0].bias.data[::2] = torch.tensor(float("nan"))
    model[0].bias.data[1::4] = torch.tensor(-float("inf"))
    assert_same(model, want=[True, True, False])


def test_tables_of_several_parts(monkeypatch):
    model = chain(BETWEEN["batch-norm-prelu-per-channel"])
    whole = pack(model, fuse=True)
    for size in (1, 2 * N, 5 * N, 71 * N):
        monkeypatch.setattr("bitorch_qlinear.convert.fuse._PART", size)
        parts = pack(model, fuse=True)
        assert_equal(parts[0].offset, whole[0].offset)
        assert_equal(parts[0].scale, whole[0].scale)


def test_a_wide_layer():
    model = nn.Sequential(signs(65, 5000), norm(65), nn.Hardtanh(), signs(3, 65)).to(torch.bfloat16).eval()
    assert_same(model, torch.bfloat16, k=5000, rows=(1, 200), want=[True, False])


@pytest.mark.parametrize("name", kernels.available())
def test_each_kernel(name):
    with kernels.forced(name):
        assert_same(chain(BETWEEN["batch-norm-hardtanh-dropout"]), want=[True, True, False])


@pytest.mark.parametrize("k, n", [(1, 1), (32, 32), (33, 1), (5, 0)])
def test_small_sizes(k, n):
    model = nn.Sequential(signs(n, k), nn.Hardtanh(), signs(2, n)).eval()
    assert_same(model, k=k, want=[True, False])


# ---- what is a chain ----


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = signs(N, K), signs(N, N), signs(N, N)
        self.norm_a, self.norm_b, self.norm_c = norm(N), norm(N, 1), norm(N, 2)

    def forward(self, x):
        x = self.norm_a(self.a(x))
        x = x + self.norm_b(self.b(x))
        return x + self.norm_c(self.c(x))


class Branches(nn.Module):
    """The bits of one layer are read by two, with one rule or with two."""

    def __init__(self, rule):
        super().__init__()
        self.a, self.norm, self.b, self.c = signs(N, K), norm(N), signs(9, N), signs(9, N, rule)

    def forward(self, x):
        x = self.norm(self.a(x))
        return self.b(x) + self.c(x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = signs(N, K), norm(N), signs(9, N)

    def forward(self, x):
        return self.b(F.relu(self.norm(self.a(x))))


class Untraceable(nn.Module):
    """The chain lies in a part that can be traced, and the whole depends on values."""

    def __init__(self):
        super().__init__()
        self.body = chain(BETWEEN["batch-norm-hardtanh-dropout"])

    def forward(self, x):
        return self.body(x) if x.sum() > -1e9 else x


class Optional(nn.Module):
    """An argument decides what lies between."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = signs(N, K), norm(N), signs(9, N)

    def forward(self, x, shift=None):
        x = self.a(x)
        x = x + shift if shift is not None else self.norm(x)
        return self.b(x)


class OptionalByDefault(Optional):
    """The default of an argument decides that something else lies between than with a value."""

    def forward(self, x, shift=None):
        x = self.a(x)
        x = x - 1 if shift is None else self.norm(x)
        return self.b(x)


class UsedInParts(nn.Module):
    """Two parts, which are traced apart, call one module; only one of them has a chain with it."""

    def __init__(self):
        super().__init__()
        shared = norm(N)
        self.one = nn.Sequential(signs(N, K), shared, signs(9, N))
        self.other = nn.Sequential(signs(N, K), nn.Tanh(), shared)

    def forward(self, x):
        return self.one(x).sum() + self.other(x) if x.sum() > -1e9 else x


class Reads(nn.Module):
    """The forward reads a tensor of the module that would be replaced."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = signs(N, K), norm(N), signs(9, N)

    def forward(self, x):
        return self.b(self.norm(self.a(x))) * self.norm.weight.sum()


class ReadsFromOutside(nn.Module):
    """The chain is in a module with a hook, which is traced by itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(signs(N, K), norm(N), signs(9, N))
        self.inner.register_forward_hook(lambda *args: None)

    def forward(self, x):
        return self.inner(x) * self.inner[1].running_var.sum()


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = signs(N, N), norm(N), signs(N, N)

    def forward(self, x):
        x = self.norm(self.a(x[:, :N]))
        return self.b(self.norm(self.a(x)))


class Keeps(nn.Module):
    """The forward keeps a result, and has a constant."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = signs(N, K), norm(N), signs(9, N)
        self.kept = None

    def forward(self, x):
        self.kept = self.b(self.norm(self.a(x)))
        return self.kept + torch.tensor(1.0)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Functional(), chain(BETWEEN["prelu"], k=9)])
        self.first = self.blocks[1][0]  # a second name

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def hooked(index, register="register_forward_hook"):
    model = chain(BETWEEN["batch-norm-hardtanh-dropout"])
    getattr(model[index], register)(lambda *args: None)
    return model


def hooked_part():
    inner = nn.Sequential(signs(N, K), norm(N))
    inner.register_forward_hook(lambda *args: None)
    return nn.Sequential(inner, nn.Hardtanh(), signs(4, N)).eval()


def with_forward():
    model = chain(BETWEEN["batch-norm"])
    model[1].forward = lambda x: -F.batch_norm(x, model[1].running_mean, model[1].running_var)
    return model


class Own(nn.BatchNorm1d):
    def forward(self, x):
        return 1 - super().forward(x)


NOT_FUSED = {
    "residual": (Residual, "its output is read 2 times|function add follows|returns its output"),
    "two-rules": (lambda: Branches("steheaviside"), "the next layers have different sign rules"),
    "function": (Functional, "the function relu follows; only modules can be fused"),
    "an-argument-decides": (Optional, "the function add follows"),
    "a-default-decides": (OptionalByDefault, "the function sub follows"),
    "used-in-parts": (UsedInParts, "is used in several places"),
    "read-by-forward": (Reads, "a forward reads tensors of BatchNorm1d itself"),
    "read-by-another-forward": (ReadsFromOutside, "a forward reads tensors of BatchNorm1d itself"),
    "called-twice": (Shared, "QLinear is called 2 times"),
    "one-module-in-two-places": (
        lambda: (lambda m: nn.Sequential(signs(N, K), m, signs(N, N), m, signs(9, N)))(norm(N)),
        "BatchNorm1d is called 2 times",
    ),
    "hook-between": (lambda: hooked(1), "BatchNorm1d follows, with hooks"),
    "pre-hook-between": (lambda: hooked(2, "register_forward_pre_hook"), "Hardtanh follows, with hooks"),
    "hook-around": (hooked_part, "returns its output"),
    "training": (lambda: chain(BETWEEN["batch-norm"]).train(), "training mode"),
    "batch-norm-in-training": (
        lambda: (lambda m: (m[1].train(), m)[1])(nn.Sequential(signs(N, K), norm(N), signs(9, N)).eval()),
        "BatchNorm1d follows, in training mode",
    ),
    "without-statistics": (
        lambda: nn.Sequential(signs(N, K), nn.BatchNorm1d(N, track_running_stats=False), signs(9, N)).eval(),
        "without running statistics",
    ),
    "forward-of-its-own": (with_forward, "BatchNorm1d follows, with a forward of its own"),
    "a-subclass": (lambda: nn.Sequential(signs(N, K), Own(N), signs(9, N)).eval(), "Own follows, which is not one"),
    "tanh": (lambda: nn.Sequential(signs(N, K), nn.Tanh(), signs(9, N)).eval(), "Tanh follows, which is not one"),
    "layer-norm": (lambda: nn.Sequential(signs(N, K), nn.LayerNorm(N), signs(9, N)).eval(), "LayerNorm follows"),
    "nothing": (lambda: nn.Sequential(signs(N, K), signs(9, N)).eval(), "nothing lies between"),
    "real-input-follows": (
        lambda: nn.Sequential(signs(N, K), norm(N), QLinear(N, 9, input_quantization="identity")).eval(),
        "the next layer reads real values",
    ),
    "real-input": (
        lambda: nn.Sequential(QLinear(K, N, input_quantization="identity"), norm(N), signs(9, N)).eval(),
        "its input is real",
    ),
    "no-step": (
        lambda: nn.Sequential(signs(N, K), nn.Threshold(0.0, 50.0), norm(N), signs(9, N)).eval(),
        r"the signs of \d+ of 37 channels change more than once: Threshold, BatchNorm1d",
    ),
    "no-binary-layer": (
        lambda: nn.Sequential(signs(N, K), norm(N), nn.Linear(N, 9), signs(9, 9)).eval(),
        "Linear follows, which is not one",
    ),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_what_is_not_fused_and_why(case, caplog):
    make, reason = NOT_FUSED[case]
    model = make()
    if "training" not in case:
        model.eval()
    packed = pack(model)
    with caplog.at_level(logging.INFO, "bitorch_qlinear"):
        fused = pack(model, fuse=True)
    assert not any(fused_layers(fused)[:1])
    assert not any(isinstance(module, Folded) for module in itertools.islice(fused.modules(), 3))
    x = torch.randn(6, K)
    if case != "training":
        with torch.no_grad():
            assert_equal(fused(x), packed(x))
    said = explain(fused).layers[0].fusion
    assert re.search(reason, said), said
    assert said.removeprefix("not fused: ") in caplog.text


@pytest.mark.parametrize("index, reason", [(0, "it has hooks"), (4, "the next layer has hooks")])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_packed_layers(index, reason, register):
    packed = pack(chain(BETWEEN["batch-norm-hardtanh-dropout"]))
    getattr(packed[index], register)(lambda module, args, *output: -output[0] if output else (-args[0],))
    assert reason in explain(packed).layers[0].fusion
    fused, x = pack(packed, fuse=True), torch.randn(5, K)
    assert not fused[0].is_fused
    with torch.no_grad():
        assert_equal(fused(x), packed(x))


@pytest.mark.parametrize("index", [0, 1, 4])
def test_a_layer_that_is_not_packed(index):
    model = chain(BETWEEN["prelu"])
    model[2 * (index // 2)].register_forward_hook(lambda module, args, output: -output)
    packed, fused = pack(model), pack(model, fuse=True)
    x = torch.randn(5, K)
    with torch.no_grad():
        assert_equal(fused(x), packed(x))
    if index == 4:
        assert "the next layer is not packed" in [layer.fusion for layer in explain(fused)][1]


def test_branches_with_one_rule():
    assert_same(Branches("sign").eval(), want=[True, False, False])


def test_a_model_that_cannot_be_traced_is_fused_in_parts():
    model = Untraceable().eval()
    assert_same(model, want=[True, True, False])
    inner = nn.Sequential(nn.Flatten(), Untraceable(), nn.BatchNorm1d(5), signs(5, 5), norm(5), signs(5, 5)).eval()
    assert_same(inner, want=[True, True, False, True, False])


def test_what_forward_keeps_is_kept_as_it_was():
    model = Keeps().eval()
    x = torch.randn(3, K)
    with torch.no_grad():
        want = model(x)
        kept = model.kept
        explain(pack(model))
        fused = pack(model, fuse=True, inplace=True)
        assert fused.kept is kept
        assert not [name for name in fused.__dict__ if "constant" in name]
        assert fused_layers(fused) == [True, False]
        assert_equal(fused(x), want)


class RunsMeanwhile(Functional):
    """While forward is traced, `meanwhile` runs."""

    def meanwhile(self):
        pass

    def forward(self, x):
        self.meanwhile()
        return super().forward(x)


def test_other_threads_may_compute_while_a_model_is_traced():
    model = pack(RunsMeanwhile().eval())
    x, results = torch.randn(3, K), []
    want = model(x).detach()

    def compute():
        assert nn.Module.__call__ is not before_any_trace
        with torch.no_grad():
            results.append(Functional.forward(model, x) * model.norm.weight.isfinite().all())

    def run():
        model.meanwhile = lambda: None
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()

    model.meanwhile = run
    assert "relu" in explain(model).layers[0].fusion
    assert_equal(results[0], want)


def test_two_threads_trace_one_after_the_other():
    first, second = pack(RunsMeanwhile().eval()), pack(RunsMeanwhile().eval())
    is_traced, is_done = threading.Event(), threading.Event()

    def wait():
        is_traced.set()
        is_done.wait(10)

    second.meanwhile = wait
    thread = threading.Thread(target=explain, args=(second,))

    def start():
        thread.start()
        is_traced.wait(0.3)  # this is in vain, because the other trace begins after this one

    first.meanwhile = start
    explain(first)
    is_done.set()
    thread.join()
    assert is_traced.is_set()
    assert nn.Module.__call__ is before_any_trace


def test_nested_modules_and_second_names():
    model = Blocks().eval()
    fused = assert_same(model, want=[False, False, True, True, False])
    assert fused.first is fused.blocks[1][0]
    assert type(fused.blocks[1][1]) is Folded


def test_tied_words():
    model = chain(BETWEEN["batch-norm"], k=N)
    model[2].weight = model[0].weight
    fused = assert_same(model, k=N, want=[True, True, False])
    assert fused[0].weight is fused[2].weight


def test_hooks_on_the_model_itself_do_not_matter():
    model = chain(BETWEEN["batch-norm"])
    model.register_forward_hook(lambda module, args, output: output + 1)
    assert_same(model, want=[True, True, False])


# ---- the fused model ----


def example(dtype=torch.float32):
    model = chain(BETWEEN["batch-norm-hardtanh-dropout"], dtype)
    return model, pack(model), pack(model, fuse=True)


def test_pack_makes_a_copy_unless_told_otherwise():
    model, packed, _ = example()
    x = torch.randn(4, K)
    assert isinstance(model[1], nn.BatchNorm1d)
    with torch.no_grad():
        want = packed(x)
        again = pack(packed, fuse=True)
        assert fused_layers(again) == [True, True, False]
        assert fused_layers(packed) == [False] * 3
        assert pack(packed, fuse=True, inplace=True) is packed
        assert fused_layers(packed) == [True, True, False]
        state = copy.deepcopy(packed.state_dict())
        pack(packed, fuse=True, inplace=True)
        assert all(map(torch.equal, state.values(), packed.state_dict().values()))
        assert_equal(packed(x), want)


def test_what_it_says():
    _, packed, fused = example()
    assert "fused with BatchNorm1d, Hardtanh, Dropout" in repr(fused[0])
    assert repr(fused[1]).startswith("Folded(BatchNorm1d(37")
    last = "not fused: the forward of Sequential returns its output"
    for model, verb in ((packed, "would fuse"), (fused, "is fused with")):
        said = [layer.fusion for layer in explain(model)]
        assert said == [f"{verb} BatchNorm1d, Hardtanh, Dropout"] * 2 + [last]
    assert "is fused with" in str(explain(fused))
    assert [layer.fusion for layer in explain(example()[0])] == [""] * 3


def test_logged(caplog):
    with caplog.at_level(logging.INFO, "bitorch_qlinear"):
        pack(chain(BETWEEN["prelu"]), fuse=True)
    assert caplog.records[-1].levelno == logging.INFO
    assert caplog.records[-1].getMessage().startswith("fused 2 of 3 PackedQLinear\n  4 is not fused: ")


def test_unpack_refuses():
    _, _, fused = example()
    with pytest.raises(RuntimeError, match=r"model: expected one without fused layers, got 2 of them \(0, 4\)"):
        unpack(fused)
    with pytest.raises(RuntimeError, match="layer: expected one that is not fused"):
        fused[0].unpack()
    assert type(fused[8].unpack()) is QLinear


def test_another_dtype_is_refused():
    _, _, fused = example()
    x = torch.randn(3, K)
    for other in (torch.float64, torch.bfloat16, torch.int32):
        with pytest.raises(RuntimeError, match=rf"x: expected torch.float32, in which .* fused, got {other}"):
            fused(x.to(other))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="got autocast"):
        fused(x)
    assert fused.half()[0].offset.dtype is torch.float32
    with pytest.raises(RuntimeError, match=r"expected torch.float32, in which"):
        fused(x.half())


def test_numbers_survive_a_change_of_dtype():
    fused = example()[2]
    x = torch.randn(3, K)
    back = copy.deepcopy(fused).to(torch.bfloat16).float()
    with torch.no_grad():
        assert_equal(back[:8](x).sign(), fused[:8](x).sign())
    for change in (nn.Module.double, nn.Module.bfloat16, lambda m: m.type(torch.float64)):
        assert_equal(change(copy.deepcopy(fused))[0].offset, fused[0].offset)


def test_more_than_two_dimensions():
    per_channel = pack(nn.Sequential(signs(N, K), norm(N), signs(9, N)).eval(), fuse=True)
    with pytest.raises(RuntimeError, match=r"x: expected 2 dimensions, got 3: BatchNorm1d\(37"):
        per_channel(torch.randn(2, N, K))
    per_channel = pack(nn.Sequential(signs(N, K), slopes(N), signs(9, N)).eval(), fuse=True)
    with pytest.raises(RuntimeError, match=r"x: expected 2 dimensions, got 3: PReLU\(num_parameters=37"):
        per_channel(torch.randn(2, N, K))
    model = nn.Sequential(signs(N, K), nn.PReLU(), nn.Hardtanh(), signs(9, N)).eval()
    for shape in ((K,), (2, 3, K), (0, K)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert_equal(pack(model, fuse=True)(x), pack(model)(x))


def test_backward_is_an_error():
    _, packed, fused = example()
    x = torch.randn(3, K, requires_grad=True)
    y = fused(x)
    assert_equal(y.detach(), packed(x).detach())
    with pytest.raises(RuntimeError, match="x: a fused PackedQLinear has no gradient"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="x: a fused PackedQLinear has no gradient"):
        torch.func.grad(lambda x: fused(x).sum())(x)


def test_vmap():
    _, packed, fused = example()
    x = torch.randn(3, 4, K)
    with torch.no_grad():
        assert_equal(torch.func.vmap(fused)(x), torch.stack([packed(each) for each in x]))


def test_compile_and_export():
    _, packed, fused = example()
    x = torch.randn(5, K)
    with torch.no_grad():
        want = packed(x)
        assert_equal(torch.compile(fused, fullgraph=True)(x), want)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},))
        assert_equal(program.module()(x), want)
        assert_equal(program.module()(x[:3]), packed(x[:3]))


def test_compile_and_export_behind_a_layer_with_gradients():
    model = nn.Sequential(nn.Linear(20, K), *chain(BETWEEN["prelu"])).eval()
    packed, fused, x = pack(model), pack(model, fuse=True), torch.randn(4, 20)
    want = packed(x).detach()
    for strict in (True, False):
        assert_equal(torch.export.export(fused, (x,), strict=strict).module()(x).detach(), want)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_equal(compiled(x), want)
    with pytest.raises(RuntimeError, match="x: a fused PackedQLinear has no gradient"):
        compiled(x).sum().backward()


def test_fused_words_may_be_written():
    _, packed, fused = example()
    x = torch.randn(5, K)
    with torch.no_grad():
        for model in (packed, fused):
            model[0].weight.bitwise_not_()
            model[0].weight[:, -1] &= (1 << K % 32) - 1
        assert_equal(fused(x), packed(x))


def test_without_kernels(monkeypatch):
    fused = example()[2]
    x = torch.randn(5, K)
    monkeypatch.setattr("bitorch_qlinear.packed.has_kernels", lambda tensor: False)
    with torch.no_grad():
        want = fused[:4](x)
        monkeypatch.undo()
        assert_equal(fused[:4](x), want)


# ---- checkpoints ----


def test_the_whole_model_through_a_file():
    _, packed, fused = example()
    x = torch.randn(5, K)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Sequential]):
        loaded = torch.load(file, weights_only=True)
    with torch.no_grad():
        assert_equal(loaded(x), packed(x))
        assert_equal(copy.deepcopy(fused)(x), packed(x))
    assert repr(loaded) == repr(fused)


@pytest.mark.parametrize("assign", [True, False])
def test_state_dict(assign, tmp_path):
    from safetensors.torch import load_file, save_file

    _, packed, fused = example()
    state = fused.state_dict()
    assert [name for name in state if name.startswith("0.")] == [
        f"0.{name}" for name in ("weight", "k", "format", "input_rule", "weight_rule", "scale", "offset", "fused")
    ]
    assert (int(state["0.format"]), int(state["8.format"])) == (2, 1)
    save_file(state, tmp_path / "model")
    torch.manual_seed(3)
    other = pack(chain(BETWEEN["batch-norm-hardtanh-dropout"]), fuse=True)
    loaded = load_file(tmp_path / "model")
    assert str(other.load_state_dict(loaded, assign=assign)) == "<All keys matched successfully>"
    x = torch.randn(5, K)
    with torch.no_grad():
        assert_equal(other(x), packed(x))


def damaged(key, change):
    _, _, fused = example()
    state = fused.state_dict()
    state[key] = change(state[key])
    return fused, state


def test_checkpoints_that_do_not_fit():
    _, packed, fused = example()
    with pytest.raises(RuntimeError, match="fused: expected the checkpoint of a layer that is not fused"):
        packed[0].load_state_dict(fused[0].state_dict())
    with pytest.raises(RuntimeError, match="weight: expected the checkpoint of a fused layer"):
        fused[0].load_state_dict(packed[0].state_dict())
    with pytest.raises(RuntimeError, match="weight: expected the checkpoint of a fused layer"):
        fused[0].load_state_dict(example()[0][0].state_dict())
    with pytest.raises(RuntimeError, match=r"fused: expected a layer that was fused in torch\.float32, got"):
        fused.load_state_dict(example(torch.bfloat16)[2].state_dict())


DAMAGE = {
    "format": (lambda t: t + 1, "format: expected a checkpoint of format 1 to 2, got 3: a newer bitorch_qlinear"),
    "fused": (lambda t: t.int(), "fused: expected a 0-dim int64 tensor"),
    "scale": (lambda t: t * 2, "scale: expected values ±1"),
    "offset": (lambda t: t + 1, "offset: expected whole numbers that the product cannot cancel"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_numbers(name):
    change, said = DAMAGE[name]
    fused, state = damaged(f"0.{name}", change)
    before = fused[0].offset.clone()
    with pytest.raises(RuntimeError, match=said):
        fused.load_state_dict(state)
    assert_equal(fused[0].offset, before)


@pytest.mark.parametrize("name", ["scale", "offset"])
@pytest.mark.parametrize("change", [torch.Tensor.bfloat16, lambda t: t[:-1], lambda t: t * float("nan")])
def test_numbers_of_another_kind(name, change):
    fused, state = damaged(f"0.{name}", change)
    with pytest.raises(RuntimeError, match=f"{name}: expected"):
        fused.load_state_dict(state)


def test_a_checkpoint_that_lacks_a_number():
    _, _, fused = example()
    state = fused.state_dict()
    del state["0.offset"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.offset"'):
        fused.load_state_dict(state)
