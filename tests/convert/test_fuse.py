"""FusedSequential and pack(model, fuse=True): the output is that of nn.Sequential bit for bit, whatever has changed."""

import copy
import gc
import io
import itertools
import math
import re
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference import FLOATS, assert_equal
from torch import nn

import bitorch_qlinear.fused
from bitorch_qlinear import (
    ChannelShift,
    FusedSequential,
    PackedQLinear,
    QLinear,
    RPReLU,
    explain,
    kernels,
    pack,
    unpack,
)
from bitorch_qlinear._fold import InputLimits
from bitorch_qlinear.fused import Folded

K, N = 70, 37
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


def with_negative_slopes(module, share=0.1):
    """Among the slopes of a PReLU or an RPReLU, some are negative, so that the output falls and rises."""
    slope = module.weight if isinstance(module, nn.PReLU) else module.slope
    slope.data.uniform_(0, 0.5)
    slope.data[torch.rand_like(slope) < share] *= -3
    slope.data[:1] = -0.5
    if isinstance(module, RPReLU):
        module.shift_in.data.normal_(0, 3)
        module.shift_out.data.normal_(0, 1).sub_(1)
    return module


class Waves(nn.Module):
    """Changes its sign from each few values to the next."""

    computes_channels_alone = True

    def forward(self, x):
        return x.remainder(8.0) - 3.5


def randomized(module):
    for parameter in module.parameters():
        parameter.data.uniform_(0.1, 3)
    return module


def signs(n, k, rule="sign", **options):
    layer = QLinear(k, n, input_quantization=rule, **options)
    if layer.bias is not None:
        layer.bias.data.normal_(0, k**0.5)
    return layer


BETWEEN = {
    "nothing": lambda n: [],
    "batch-norm": lambda n: [norm(n)],
    "without-affine": lambda n: [norm(n, affine=False)],
    "batch-norm-hardtanh-dropout": lambda n: [norm(n), nn.Hardtanh(), nn.Dropout()],
    "dropout-batch-norm-hardtanh": lambda n: [nn.Dropout(), norm(n), nn.Hardtanh(inplace=True)],
    "nested": lambda n: [nn.Sequential(norm(n), nn.Sequential(nn.Hardtanh()))],
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
    "react": lambda n: [norm(n), randomized(RPReLU(n)), randomized(ChannelShift(n))],
    "prelu-of-negative-slopes": lambda n: [norm(n), with_negative_slopes(nn.PReLU(n)), norm(n, seed=3)],
    "react-of-negative-slopes": lambda n: [with_negative_slopes(RPReLU(n)), norm(n, seed=2)],
}
NO_STEPS = ("relu-batch-norm", "threshold-batch-norm")
USUAL = "batch-norm-hardtanh-dropout"


def chain(between, dtype=torch.float32, rule="sign", k=K, n=N, **options):
    """Three layers with modules between them."""
    layers = [signs(n, k, rule, **options), *between(n), signs(N, n, rule), *between(N), signs(5, N, rule)]
    return nn.Sequential(*layers).to(dtype).eval()


def usual(dtype=torch.float32, **options):
    return chain(BETWEEN[USUAL], dtype, **options)


def links(fused):
    """For each layer of the module's chains, whether it writes words now."""
    chains = fused._current_plan().chains
    folded = [outcome for each in chains for outcome in each._folded.values()]
    return [not isinstance(outcome, str) for each in folded for outcome in (*each.limits, "the last")]


def first_folded(fused):
    return next(iter(fused._current_plan().chains[0]._folded.values()))


@pytest.fixture
def runs(monkeypatch):
    """The number of calls that used limits."""
    counted = []
    run = Folded.run
    monkeypatch.setattr(Folded, "run", lambda *args: counted.append(1) or run(*args))
    return counted


def assert_same(model, dtype=torch.float32, k=K, rows=(1, 2, 3, 17, 64), want=None):
    """The fused model equals the packed one for rows of several numbers and strides; returns it."""
    packed, fused = pack(model), pack(model, fuse=True)
    if want is not None:
        assert links(fused) == want
    for count in rows:
        x = torch.randn(count, k, dtype=dtype)
        for each in (x, x.t().contiguous().t(), torch.randn(count, 2 * k, dtype=dtype)[:, ::2]):
            with torch.no_grad():
                assert_equal(fused(each), packed(each), (dtype, count))
    return fused


def every_product(layer):
    """Inputs for which the layer's first output has each value that it can have."""
    first = (layer.weight[:1].detach().float().sign() + 0.5).sign()
    k = layer.in_features
    return torch.where(torch.arange(k) < torch.arange(k + 1)[:, None], -first, first)


# ---- equality ----


@dtypes
@pytest.mark.parametrize("rule", ["sign", "steheaviside"])
@pytest.mark.parametrize("between", BETWEEN)
def test_equals_the_packed_model(between, rule, dtype, runs):
    fused = assert_same(chain(BETWEEN[between], dtype, rule), dtype)
    if between not in NO_STEPS:
        assert links(fused) == [True, True, False]
    assert len(runs) == 15


@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 7, 32, 33, 65])
def test_every_value_of_the_product(n, bias, dtype):
    """One column takes another way through batch_norm if it is not evaluated in the layout of a real call."""
    for seed in range(3):
        layer = signs(n, 40, bias=bias)
        model = nn.Sequential(layer, norm(n, seed), nn.Hardtanh(), signs(n, n, "steheaviside")).to(dtype).eval()
        packed, fused = pack(model), pack(model, fuse=True)
        assert links(fused) == [True, False]
        with torch.no_grad():
            for row in range(n):
                one = copy.deepcopy(layer)
                one.weight.data = one.weight.data[row:]
                x = every_product(one).to(dtype)
                assert_equal(fused(x), packed(x), (seed, row))
                assert_equal(fused(x[3:4]), packed(x[3:4]), (seed, row))


@given(
    k=st.integers(1, 9),
    n=st.integers(1, 5),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(FLOATS),
    rules=st.tuples(*[st.sampled_from(["sign", "steheaviside"])] * 2),
    names=st.lists(
        st.sampled_from(["norm", "tanh", "relu", "prelu", "leaky", "threshold", "react", "negative", "waves"]),
        max_size=4,
    ),
    special=st.sampled_from([None, 0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-30, 1e-42, -1.0, 1e30]),
)
def test_all_inputs_of_small_layers(k, n, seed, dtype, rules, names, special):
    """Every possible input, in whatever order the modules follow."""
    torch.manual_seed(seed)
    make = {
        "norm": lambda: norm(n, seed),
        "tanh": lambda: nn.Hardtanh(-1.0, 0.5),
        "relu": nn.ReLU,
        "prelu": lambda: slopes(n),
        "leaky": lambda: nn.LeakyReLU(-0.2),
        "threshold": lambda: nn.Threshold(1.0, -3.0),
        "react": lambda: randomized(RPReLU(n)),
        "negative": lambda: with_negative_slopes(RPReLU(n), 0.5),
        "waves": Waves,
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
    if links(fused) == [False, False]:
        assert re.search("more than once", explain(fused).layers[0].output)


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-45, -1.0, 0.0], ids=str)
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_strange_parameters_of_batch_norm(name, value, dtype):
    model = chain(lambda n: [norm(n), nn.Hardtanh()], dtype)
    getattr(model[1], name).data[::3] = value
    assert_same(model, dtype)


def test_values_that_a_flush_to_zero_would_change(runs):
    """A thread that flushes subnormal numbers to zero computes the modules one after another."""
    model = nn.Sequential(randomized(ChannelShift(K)), *chain(lambda n: [norm(n)])).eval()
    model[2].weight.data.fill_(1e-38)
    model[2].bias.data.fill_(-1e-40)
    model[2].running_mean.fill_(0)
    model[0].shift.data.fill_(1e-40)
    fused, packed = pack(model, fuse=True), pack(model)
    x = inputs(K, torch.float32)
    with torch.no_grad():
        want = packed(x)
        assert_equal(fused(x), want)
        assert torch.set_flush_denormal(True)
        try:
            flushed = packed(x)
            for _ in range(3):
                assert_equal(fused(x), flushed)
        finally:
            torch.set_flush_denormal(False)
        assert not torch.equal(want, flushed)
        assert_equal(fused(x), want)
    assert len(runs) == 2


def test_an_infinite_or_missing_number_in_the_bias():
    model = usual()
    model[0].bias.data[::2] = torch.tensor(float("nan"))
    model[0].bias.data[1::4] = torch.tensor(-float("inf"))
    assert_same(model, want=[True, True, False])


@dtypes
@pytest.mark.parametrize("weight_scale", ["mean", "learned"])
def test_layers_with_a_scale(weight_scale, dtype):
    model = chain(BETWEEN[USUAL], dtype, weight_scale=weight_scale)
    model[4] = signs(N, N, weight_scale=weight_scale).to(dtype)
    model[8] = signs(5, N, weight_scale=weight_scale).to(dtype)
    fused = assert_same(model.eval(), dtype, want=[True, True, False])
    packed, x = pack(fused), torch.randn(20, K, dtype=dtype)
    with torch.no_grad():
        for each in (packed, fused):
            each[0].scale.neg_()
            each[8].scale.mul_(2)
        for _ in range(3):
            assert_equal(fused(x), packed(x))


def test_tables_of_several_parts(monkeypatch):
    model = chain(BETWEEN["batch-norm-prelu-per-channel"])
    limits = [first_folded(pack(model, fuse=True)).limits[0]]
    for size in (1, 2 * N, 5 * N, 71 * N):
        monkeypatch.setattr("bitorch_qlinear._fold._PART", size)
        limits.append(first_folded(pack(model, fuse=True)).limits[0])
    for each in limits[1:]:
        assert_equal(each.limits, limits[0].limits)
        assert_equal(each.flips, limits[0].flips)


def test_a_wide_layer():
    model = nn.Sequential(signs(65, 5000), norm(65), nn.Hardtanh(), signs(3, 65)).to(torch.bfloat16).eval()
    assert_same(model, torch.bfloat16, k=5000, rows=(1, 200), want=[True, False])


@pytest.mark.parametrize("name", kernels.available())
def test_each_kernel(name):
    with kernels.forced(name):
        assert_same(usual(), want=[True, True, False])


@pytest.mark.parametrize("k, n", [(1, 1), (32, 32), (33, 1), (5, 0)])
def test_small_sizes(k, n):
    assert_same(nn.Sequential(signs(n, k), nn.Hardtanh(), signs(2, n)).eval(), k=k)


def test_a_chain_that_is_folded_in_part():
    model = nn.Sequential(signs(N, K), norm(N), signs(N, N), Waves(), signs(9, N), norm(9), signs(4, 9)).eval()
    assert_same(model, want=[True, False, True, False])


def test_chains_among_other_modules(runs):
    model = nn.Sequential(nn.Linear(20, K), nn.Tanh(), usual(), nn.Tanh(), signs(8, 5), norm(8), signs(7, 8), norm(7))
    assert_same(model.eval(), k=20, want=[True, True, False, True, False])
    assert len(runs) == 30


# ---- signs that change more than once ----


def toggled(fused):
    return [each.toggles for each in first_folded(fused).limits if not isinstance(each, str)]


@dtypes
@given(
    seed=st.integers(0, 2**20),
    n=st.sampled_from([1, 5, 32, 37, 64]),
    rule=st.sampled_from(["sign", "steheaviside"]),
    share=st.sampled_from([0.0, 0.1, 0.2]),
    norms=st.booleans(),
)
@settings(max_examples=25)
def test_random_slopes_with_negative_ones(dtype, seed, n, rule, share, norms):
    """Every product of the first layer, and what the second and third make of them."""
    torch.manual_seed(seed)
    layers = [signs(n, K, rule), signs(n, n, rule), signs(3, n, rule)]
    between = [[*([norm(n, seed)] if norms else []), with_negative_slopes(RPReLU(n), share)] for _ in range(2)]
    model = nn.Sequential(layers[0], *between[0], layers[1], *between[1], layers[2]).to(dtype).eval()
    packed, fused = pack(model), pack(model, fuse=True)
    x = torch.cat([every_product(layers[0]), torch.randn(30, K)]).to(dtype)
    with torch.no_grad():
        assert_equal(fused(x), packed(x))
        assert_equal(fused(x[:1]), packed(x[:1]))


@pytest.mark.parametrize("name", kernels.available())
def test_toggles_of_each_kernel(name):
    with kernels.forced(name):
        model = chain(BETWEEN["react-of-negative-slopes"], n=64)
        fused = assert_same(model, want=[True, True, False])
    assert all(each.numel() for each in toggled(fused))


def test_toggles_after_input_limits():
    model = nn.Sequential(randomized(ChannelShift(K)), *chain(BETWEEN["react-of-negative-slopes"])).eval()
    assert any(each.numel() for each in toggled(assert_same(model)))


def test_toggles_of_several_parts(monkeypatch):
    model = chain(BETWEEN["react-of-negative-slopes"])
    want = first_folded(pack(model, fuse=True)).limits[0]
    assert want.toggles.numel()
    for size in (1, 2 * N, 5 * N, 71 * N):
        monkeypatch.setattr("bitorch_qlinear._fold._PART", size)
        limits = first_folded(pack(model, fuse=True)).limits[0]
        assert_equal(limits.limits, want.limits)
        assert_equal(limits.flips, want.flips)
        assert sorted(limits.toggles.t().tolist()) == sorted(want.toggles.t().tolist())


def test_words_that_change_beside_toggles():
    """A toggled channel's row of weights is read in each call."""
    packed = pack(chain(BETWEEN["react-of-negative-slopes"]))
    fused, x = pack(packed, fuse=True), torch.randn(30, K)
    assert toggled(fused)[0].numel()
    with torch.no_grad():
        before = fused(x)
        for model in (packed, fused):
            words(model)
            model[3].weight.bitwise_not_()
            model[3].weight[:, -1] &= (1 << N % 32) - 1
        want = packed(x)
        assert not torch.equal(before, want)
        for _ in range(3):
            assert_equal(fused(x), want)


def test_explain_counts_toggled_channels():
    module = RPReLU(N)
    module.slope.data[3:5] = -1.0
    module.shift_out.data.fill_(-4)
    text = explain(pack(of(module), fuse=True)).layers[0].output
    assert text == "words for the next layer through RPReLU (the signs of 2 of 37 channels change more than once)"


def test_the_number_of_toggles_is_limited():
    n = 64
    for channels, fuses in ((16, True), (17, False)):
        module = RPReLU(n)
        module.slope.data[:channels] = -1.0
        module.shift_out.data.fill_(-4)
        model = nn.Sequential(signs(n, K, bias=False), module, signs(3, n)).eval()
        fused = assert_same(model, want=[fuses, False])
        assert f"the signs of {channels} of 64 channels" in explain(fused).layers[0].output


# ---- modules before the first layer ----


BEFORE = {
    "batch-norm": lambda k: [norm(k)],
    "batch-norm-hardtanh-dropout": lambda k: [norm(k), nn.Hardtanh(), nn.Dropout()],
    "hardtanh-batch-norm": lambda k: [nn.Hardtanh(-2, 3), norm(k)],
    "shift": lambda k: [randomized(ChannelShift(k))],
    "react": lambda k: [randomized(RPReLU(k)), norm(k)],
    "prelu": lambda k: [slopes(k), norm(k, seed=1)],
    "relu": lambda k: [nn.ReLU(), norm(k)],
    "leaky": lambda k: [nn.Identity(), nn.LeakyReLU(0.1), randomized(ChannelShift(k))],
}


def inputs(k, dtype, folded=None):
    """Values of every kind, among them those next to the limits."""
    x = (torch.randn(64, k) * 3).to(dtype)
    kinds = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1e30, -1e30]
    x[: len(kinds)] = torch.tensor(kinds).to(dtype)[:, None]
    if folded is not None:
        limits = folded.input_limits.limits.clone()
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        for row, step in enumerate((-2, -1, 0, 1, 2), start=len(kinds)):
            x[row] = (limits.view(integers) + step).view(dtype)
    return x


@dtypes
@pytest.mark.parametrize("rule", ["sign", "steheaviside"])
@pytest.mark.parametrize("before", BEFORE)
def test_modules_before_a_layer_become_limits(before, rule, dtype, runs):
    for after in ([], [norm(N), signs(5, N, rule)]):
        model = nn.Sequential(*BEFORE[before](K), signs(N, K, rule), *after).to(dtype).eval()
        for module in model:
            if isinstance(module, nn.BatchNorm1d):
                module.weight.data[module.weight.data == 0] = 1e-3
        packed, fused = pack(model), pack(model, fuse=True)
        folded = first_folded(fused)
        assert isinstance(folded.input_limits, InputLimits), folded.input_limits
        x = inputs(K, dtype, folded)
        with torch.no_grad():
            for each in (x, x[:1], x[5:6], x.t().contiguous().t(), torch.cat([x, x], 1)[:, :K]):
                assert_equal(fused(each), packed(each))
    assert len(runs) == 10
    names = ", ".join(type(module).__name__ for module in BEFORE[before](K))
    assert explain(fused).layers[0].input == f"limits through {names}"
    assert explain(packed).layers[0].input == f"with pack(model, fuse=True): limits through {names}"


class Square(nn.Module):
    computes_channels_alone = True

    def forward(self, x):
        return x * x - 1


NO_INPUT_LIMITS = {
    "negative-slope": (lambda k: [nn.LeakyReLU(-0.5)], "LeakyReLU precedes, with a negative or infinite slope"),
    "negative-slopes": (lambda k: [nn.PReLU(init=-1.0)], "PReLU precedes, with a negative or infinite slope"),
    "in-place": (lambda k: [nn.Hardtanh(inplace=True)], "Hardtanh precedes, which writes its input"),
    "channel-of-weight-0": (lambda k: [norm(k).eval()], "infinite inputs"),
    "training": (lambda k: [norm(k).train()], "in training mode"),
}


@pytest.mark.parametrize("case", NO_INPUT_LIMITS)
def test_modules_that_do_not_become_limits(case):
    make, reason = NO_INPUT_LIMITS[case]
    before = make(K)
    if case == "channel-of-weight-0":
        before[0].bias.data[0] = -1.0
    model = nn.Sequential(*before, signs(N, K).eval(), norm(N).eval(), signs(5, N).eval())
    model.training = False
    packed, fused = pack(model), pack(model, fuse=True)
    assert reason in explain(fused).layers[0].input
    assert explain(fused).layers[0].output.startswith("words")
    if case != "training":
        with torch.no_grad():
            for _ in range(3):
                x = inputs(K, torch.float32)
                assert_equal(fused(x.clone()), packed(x.clone()))


def test_modules_before_that_keep_no_order_are_called():
    model = nn.Sequential(Square(), signs(N, K), norm(N), signs(5, N)).eval()
    packed, fused, x = pack(model), pack(model, fuse=True), inputs(K, torch.float32)
    with torch.no_grad():
        assert_equal(fused(x), packed(x))
    assert [layer.input for layer in explain(fused)] == [
        "Square precedes, which is not one of the modules that can be folded",
        "",
    ]


def collapsed(k):
    """Large inputs overflow float16, and a slope of 0 makes NaN of them; those nearer to 0 are numbers."""
    module, react = nn.BatchNorm1d(k), RPReLU(k)
    module.running_var.fill_(0)
    module.running_mean.fill_(-5)
    module.weight.data.fill_(3)
    react.slope.data.fill_(0)
    react.shift_out.data.fill_(-0.1)
    return [module, react]


def infinite_slope(k):
    react = RPReLU(k)
    react.slope.data.fill_(math.inf)
    react.shift_in.data.fill_(1)
    react.shift_out.data.fill_(-5)
    return [react]


@pytest.mark.parametrize("make, reason", [(collapsed, "gives NaN for finite"), (infinite_slope, "infinite values")])
def test_nan_of_finite_inputs(make, reason):
    model = nn.Sequential(*make(K), signs(N, K)).half().eval()
    packed, fused = pack(model), pack(model, fuse=True)
    x = torch.cat([torch.randn(400, K) * 300, torch.full((1, K), -1.0)]).half()
    with torch.no_grad():
        for _ in range(3):
            assert_equal(fused(x), packed(x))
    assert reason in explain(fused).layers[0].input


@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    names=st.lists(
        st.sampled_from(["norm", "tanh", "relu", "prelu", "leaky", "react", "shift"]), min_size=1, max_size=4
    ),
    extreme=st.sampled_from([1.0, 1e-30, 1e4, 1e35, 0.0]),
)
@settings(max_examples=60)
def test_all_half_values_before_a_layer(seed, dtype, names, extreme):
    """Each of the 65,536 values of a half type, for modules with parameters of extreme sizes."""
    torch.manual_seed(seed)
    make = {
        "norm": lambda: norm(2, seed),
        "tanh": lambda: nn.Hardtanh(-1.0, 0.5),
        "relu": nn.ReLU,
        "prelu": lambda: nn.PReLU(2, init=0.0),
        "leaky": lambda: nn.LeakyReLU(0.0),
        "react": lambda: randomized(RPReLU(2)),
        "shift": lambda: randomized(ChannelShift(2)),
    }
    before = [make[name]() for name in names]
    for module in before:
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(torch.tensor([1.0, extreme]).to(tensor.dtype).sqrt())
    model = nn.Sequential(*before, signs(3, 2)).to(dtype).eval()
    packed, fused = pack(model), pack(model, fuse=True)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None].repeat(1, 2)
    with torch.no_grad():
        assert_equal(fused(x), packed(x))


def test_the_input_is_not_written():
    model = nn.Sequential(nn.Hardtanh(inplace=True), signs(N, K), norm(N), signs(5, N)).eval()
    packed, fused, x = pack(model), pack(model, fuse=True), torch.randn(9, K) * 3
    for each in (packed, fused):
        y = x.clone()
        with torch.no_grad():
            each(y)
        assert_equal(y, x.clamp(-1, 1))


@pytest.mark.parametrize("shape", [(2, 3, K), (K,), (0, K), (1, K), (2, 1, K)])
def test_shapes_of_inputs_with_limits(shape):
    model = nn.Sequential(randomized(ChannelShift(K)), nn.Hardtanh(), signs(N, K)).eval()
    packed, fused, x = pack(model), pack(model, fuse=True), torch.randn(shape)
    with torch.no_grad():
        assert_equal(fused(x), packed(x))


def test_a_single_channel_before():
    model = nn.Sequential(norm(1), signs(N, 1)).eval()
    packed, fused, x = pack(model), pack(model, fuse=True), torch.randn(50, 1)
    with torch.no_grad():
        assert_equal(fused(x), packed(x))


@given(
    k=st.integers(2, 9),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(FLOATS),
    names=st.lists(
        st.sampled_from(["norm", "tanh", "relu", "prelu", "leaky", "react", "shift"]), min_size=1, max_size=4
    ),
    special=st.sampled_from([None, 0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-30, 1e-42, -1.0, 1e30]),
)
def test_all_kinds_of_inputs(k, seed, dtype, names, special):
    torch.manual_seed(seed)
    make = {
        "norm": lambda: norm(k, seed),
        "tanh": lambda: nn.Hardtanh(-1.0, 0.5),
        "relu": nn.ReLU,
        "prelu": lambda: slopes(k),
        "leaky": lambda: nn.LeakyReLU(0.2),
        "react": lambda: randomized(RPReLU(k)),
        "shift": lambda: randomized(ChannelShift(k)),
    }
    before = [make[name]() for name in names]
    if special is not None:
        for module in before:
            for tensor in itertools.islice(module.state_dict().values(), 4):
                tensor[0] = special
    model = nn.Sequential(*before, signs(3, k)).to(dtype).eval()
    packed, fused = pack(model), pack(model, fuse=True)
    folded = first_folded(fused)
    x = inputs(k, dtype, folded if isinstance(folded.input_limits, InputLimits) else None)
    with torch.no_grad():
        assert_equal(fused(x), packed(x))
        assert_equal(fused(x[:1]), packed(x[:1]))


# ---- shapes and dtypes ----


@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (0, K), (2, 0, K), (1, K)])
@pytest.mark.parametrize("between", ["hardtanh", "prelu", "react"])
def test_any_number_of_dimensions(between, shape):
    make = BETWEEN[between] if between != "react" else lambda n: BETWEEN["react"](n)[1:]
    packed, fused = pack(chain(make)), pack(chain(make), fuse=True)
    fused.load_state_dict(packed.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        for _ in range(3):
            assert_equal(fused(x), packed(x))


@pytest.mark.parametrize("between", [lambda n: [norm(n)], lambda n: [slopes(n)]])
@pytest.mark.parametrize("shape", [(2, N, K), (K,), (2, 3, K)])
def test_channels_of_another_dimension(between, shape):
    """Batch norm and a PReLU for each channel count channels along dimension 1, or refuse."""
    model = nn.Sequential(signs(N, K), *between(N), signs(9, N)).eval()
    packed, fused, x = pack(model), pack(model, fuse=True), torch.randn(shape)
    with torch.no_grad():
        try:
            want = packed(x)
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error), match=re.escape(str(error))):
                fused(x)
        else:
            assert_equal(fused(x), want)


@pytest.mark.parametrize("x", [torch.zeros(2, K + 1), torch.zeros(2, K, dtype=torch.int64), None, torch.zeros(())])
def test_errors_are_those_of_the_unfused_model(x):
    model = usual()
    packed, fused = pack(model), pack(model, fuse=True)
    with pytest.raises(Exception) as want:
        packed(x)
    for _ in range(3):
        with pytest.raises(type(want.value), match=re.escape(str(want.value))), torch.no_grad():
            fused(x)


@dtypes
def test_another_dtype_than_that_of_the_model(dtype):
    """Batch norm of mixed dtypes is its own error or result."""
    for between in (BETWEEN["hardtanh"], BETWEEN[USUAL]):
        model = chain(between)
        packed, fused, x = pack(model), pack(model, fuse=True), torch.randn(5, K, dtype=dtype)
        with torch.no_grad():
            for _ in range(3):
                try:
                    want = packed(x)
                except RuntimeError as error:
                    with pytest.raises(RuntimeError, match=re.escape(str(error))):
                        fused(x)
                else:
                    assert_equal(fused(x), want)


# ---- what changes after fusing ----


class Reversed(nn.BatchNorm1d):
    def forward(self, x):
        return -super().forward(x)


def set_class(model):
    model[1].__class__ = Reversed


def set_forward(model):
    model[1].forward = lambda x: -x


def set_forward_of_a_layer(model):
    model[4].forward = lambda x: -PackedQLinear.forward(model[4], x)


def parametrize(model):
    class Negative(nn.Module):
        def forward(self, weight):
            return -weight

    nn.utils.parametrize.register_parametrization(model[1], "weight", Negative())


def load(model):
    other = pack(chain(lambda n: [norm(n, seed=5), nn.Hardtanh(), nn.Dropout()]))
    model.load_state_dict(other.state_dict())


def swap_values(model):
    model[1].weight, model[1].bias = model[1].bias, model[1].weight


def train_a_step(model):
    generator = torch.Generator().manual_seed(7)
    model.train()
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.BatchNorm1d):
                module(torch.randn(9, module.num_features, generator=generator) * 5)
    model.eval()


def hook(index, register, function):
    return lambda model: getattr(model[index], register)(function)


def words(model):
    model[0].weight.bitwise_not_()
    model[0].weight[:, -1] &= (1 << K % 32) - 1


def set_forward_for_another_attribute(model):
    """The number of attributes stays."""
    del model[1].__dict__["_is_full_backward_hook"]
    model[1].forward = torch.neg


CHANGES = {
    "nothing": lambda model: None,
    "data": lambda model: model[1].weight.data.neg_(),
    "in-place": lambda model: model[1].bias.data.add_(3),
    "new-data": lambda model: setattr(model[1].weight, "data", -model[1].weight.data),
    "numpy": lambda model: model[1].running_mean.numpy().__imul__(-1),
    "negative-view": lambda model: setattr(model[1].weight, "data", torch._neg_view(model[1].weight.data)),
    "same-values-elsewhere": lambda model: setattr(model[1].weight, "data", model[1].weight.data.clone()),
    "same-attribute": lambda model: setattr(model[1], "eps", float(repr(model[1].eps))),
    "other-order": lambda model: setattr(model[1], "eps", model[1].__dict__.pop("eps")),
    "new-parameter": lambda model: setattr(model[1], "weight", nn.Parameter(-model[1].weight.detach())),
    "no-parameter": lambda model: setattr(model[1], "weight", None),
    "strided-parameter": lambda model: setattr(model[1].weight, "data", torch.randn(N, 2)[:, 0] * 0 - 1),
    "buffer": lambda model: model[1].running_var.mul_(100),
    "second-norm": lambda model: model[5].running_mean.add_(4),
    "swap": swap_values,
    "load": load,
    "eps": lambda model: setattr(model[1], "eps", 1000.0),
    "min-val": lambda model: setattr(model[2], "min_val", 0.5),
    "inplace": lambda model: setattr(model[2], "inplace", True),
    "dropout-p": lambda model: setattr(model[3], "p", 0.9),
    "hook": hook(1, "register_forward_hook", lambda module, args, output: -output),
    "pre-hook": hook(2, "register_forward_pre_hook", lambda module, args: (-args[0],)),
    "hook-of-a-layer": hook(4, "register_forward_hook", lambda module, args, output: -output),
    "pre-hook-of-a-layer": hook(4, "register_forward_pre_hook", lambda module, args: (-args[0],)),
    "pre-hook-of-the-first": hook(0, "register_forward_pre_hook", lambda module, args: (-args[0],)),
    "hook-of-the-last": hook(8, "register_forward_hook", lambda module, args, output: -output),
    "class": set_class,
    "forward": set_forward,
    "forward-of-a-layer": set_forward_of_a_layer,
    "forward-for-another-attribute": set_forward_for_another_attribute,
    "parametrize": parametrize,
    "layer-bias": lambda model: model[0].bias.data.add_(20),
    "layer-without-bias": lambda model: setattr(model[0], "bias", None),
    "new-layer-bias": lambda model: setattr(model[4], "bias", nn.Parameter(torch.ones(N) * 9, requires_grad=False)),
    "words": words,
    "another-module": lambda model: model.__setitem__(2, nn.Threshold(1.0, -3.0)),
    "another-layer": lambda model: model.__setitem__(4, pack(signs(N, N, "steheaviside"))),
    "real-layer": lambda model: model.__setitem__(4, nn.Linear(N, N)),
    "append": lambda model: model.append(nn.Linear(5, 5)),
    "insert": lambda model: model.insert(4, nn.Threshold(1.0, -3.0)),
    "delete": lambda model: model.__delitem__(2),
    "delete-the-last": lambda model: model.__delitem__(8),
    "train-a-step": train_a_step,
    "float16": lambda model: model.half(),
    "double": lambda model: model.double(),
    "float64-and-back": lambda model: model.double().float(),
}


# These changes leave the output as it is.
WITHOUT_EFFECT = ("nothing", "delete", "inplace", "dropout-p", "float16", "double", "float64-and-back")
WITHOUT_EFFECT += ("same-values-elsewhere", "same-attribute", "other-order")


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name, exchange, monkeypatch):
    """Also by a torch without DLPack's interface in C, where Python compares everything."""
    if not exchange:
        monkeypatch.setattr(bitorch_qlinear.fused, "_EXCHANGE", None)
    torch.manual_seed(1)
    packed = pack(usual())
    fused = pack(packed, fuse=True)
    x = torch.randn(40, K)
    with torch.no_grad():
        before = packed(x)
        for _ in range(3):
            assert_equal(fused(x), before)
        for model in (packed, fused):
            torch.manual_seed(2)
            CHANGES[name](model)
            x = x.to(next(model.parameters()).dtype)
        want = packed(x)
        for _ in range(4):
            assert_equal(fused(x), want)
    if name not in WITHOUT_EFFECT:
        assert before.shape != want.shape or not torch.equal(before, want)


@pytest.mark.skipif(bitorch_qlinear.fused._EXCHANGE is None, reason="this torch has no __dlpack_c_exchange_api__")
@pytest.mark.parametrize("name", ["nothing", "same-values-elsewhere", "same-attribute"])
def test_values_that_are_the_same_are_compared_in_cpp(name, monkeypatch, runs):
    """One call may compare in Python, after a tensor has moved."""
    fused, x = pack(usual(), fuse=True), torch.randn(3, K)
    with torch.no_grad():
        fused(x)
        CHANGES[name](fused)
        fused(x)
        for cls, method in ((bitorch_qlinear.fused.Snapshot, "_is_same"), (bitorch_qlinear.fused.Plan, "_fits")):
            monkeypatch.setattr(cls, method, lambda self: pytest.fail("was compared in Python"))
        fused(x)
    assert len(runs) == 3


def test_a_model_is_collected_as_garbage():
    fused = pack(usual(), fuse=True)
    fused[1].parent = [fused]
    fused[0].parent = [fused]
    with torch.no_grad():
        fused(torch.randn(3, K))
    alive = weakref.ref(fused)
    del fused
    gc.collect()
    assert alive() is None


NESTED = {
    "hook": lambda part: part.register_forward_hook(lambda module, args, output: -output),
    "pre-hook": lambda part: part.register_forward_pre_hook(lambda module, args: (-args[0],)),
    "append": lambda part: part.append(nn.Threshold(1.0, -3.0)),
    "forward": lambda part: setattr(part, "forward", lambda x: -nn.Sequential.forward(part, x)),
    "exchange": lambda part: part.__setitem__(1, nn.Threshold(1.0, -3.0)),
}


@pytest.mark.parametrize("name", NESTED)
def test_changes_of_a_nested_sequential_are_seen(name):
    packed = pack(nn.Sequential(nn.Sequential(signs(N, K), norm(N)), nn.Sequential(signs(9, N), norm(9)), signs(4, 9)))
    packed.eval()
    fused, x = pack(packed, fuse=True), torch.randn(20, K)
    assert links(fused) == [True, True, False]
    with torch.no_grad():
        for model in (packed, fused):
            NESTED[name](model[0])
        want = packed(x)
        for _ in range(4):
            assert_equal(fused(x), want)


def test_hooks_for_all_modules():
    packed = pack(usual())
    fused, x = pack(packed, fuse=True), torch.randn(20, K)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: -output if isinstance(module, nn.BatchNorm1d) else None
    )
    try:
        with torch.no_grad():
            assert_equal(fused(x), packed(x))
    finally:
        handle.remove()


def test_hooks_for_all_modules_see_nested_ones():
    model = usual()
    packed = pack(nn.Sequential(*model[:1], nn.Sequential(*model[1:4]), *model[4:]).eval())
    fused, x = pack(packed, fuse=True), torch.randn(20, K)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: -output if isinstance(module, nn.Sequential) else None
    )
    try:
        with torch.no_grad():
            assert_equal(fused(x), packed(x))
    finally:
        handle.remove()


@pytest.mark.skipif(bitorch_qlinear.fused._EXCHANGE is None, reason="this torch has no __dlpack_c_exchange_api__")
def test_a_mode_is_called_once_to_compare():
    """Each method of a tensor takes 2 us under the mode of torch.device."""

    class Counting(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    fused = pack(usual(), fuse=True)
    with torch.no_grad():
        fused(torch.randn(3, K))
    (snapshot,) = [chain.folded(torch.float32).snapshot for chain in fused._current_plan().chains]
    with Counting() as mode:
        assert snapshot.holds()
    assert mode.calls == 1


def test_training_mode_has_batch_statistics():
    packed = pack(usual()).train()
    fused, x = pack(packed, fuse=True), torch.randn(20, K)
    packed[3].p = packed[7].p = fused[3].p = fused[7].p = 0.0
    for _ in range(3):
        assert_equal(fused(x), packed(x))
        assert_equal(fused[1].running_mean, packed[1].running_mean)
    with torch.no_grad():
        for model in (packed, fused):
            model.eval()
        for _ in range(3):
            assert_equal(fused(x), packed(x))
    assert links(fused) == [True, True, False]


def test_values_that_change_in_each_call_are_not_folded(runs):
    fused, x = pack(usual(), fuse=True), torch.randn(5, K)
    packed = pack(fused)
    with torch.no_grad():
        for step in range(4):
            for model in (fused, packed):
                model[1].bias.fill_(step)
            assert_equal(fused(x), packed(x))
    assert not runs


def test_values_that_change_while_they_are_folded(monkeypatch):
    fused, x = pack(usual(), fuse=True), torch.randn(50, K)
    fold = bitorch_qlinear.fused.fold_modules
    packed = pack(fused)

    def fold_and_change(*args):
        folded = fold(*args)
        fused[1].bias.data.add_(2)
        return folded

    with torch.no_grad():
        fused[1].bias.add_(1)
        monkeypatch.setattr(bitorch_qlinear.fused, "fold_modules", fold_and_change)
        for _ in range(3):
            fused(x)
        monkeypatch.undo()
        packed[1].bias.copy_(fused[1].bias)
        for _ in range(3):
            assert_equal(fused(x), packed(x))


def test_many_threads_and_changes():
    fused, x = pack(usual(), fuse=True), torch.randn(8, K)
    wanted = []
    with torch.no_grad():
        for step in range(2):
            fused[1].bias.fill_(step)
            wanted.append(pack(fused)(x))
    wrong = []

    def call():
        with torch.no_grad():
            for _ in range(50):
                y = fused(x)
                if not any(torch.equal(y, want) for want in wanted):
                    wrong.append(y)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Adds(nn.Module):
    """Reads what it finds."""

    computes_channels_alone = True
    factor = 1.0

    def __init__(self, number=1.0):
        super().__init__()
        self.number = number
        self.register_buffer("num_batches_tracked", torch.zeros(1))

    def forward(self, x):
        sign = math.copysign(1.0, self.number) if type(self.number) is float else 3.0
        x = x * sign + self.number + self.num_batches_tracked
        for name, buffer in self.named_buffers():
            x = x - buffer if name == "shift" else x
        return x + getattr(self, "_plan", 0)


def patched(model):
    model[1].__class__ = type("Patched", (Adds,), {"forward": lambda self, x: -Adds.forward(self, x)})


ADDED = {
    "minus-zero": (0.0, lambda model: setattr(model[1], "number", -0.0)),
    "true": (1.0, lambda model: setattr(model[1], "number", True)),
    "buffer": (1.0, lambda model: model[1].register_buffer("shift", torch.tensor(-30.0))),
    "tracked": (1.0, lambda model: model[1].num_batches_tracked.fill_(40)),
    "private": (1.0, lambda model: setattr(model[1], "_plan", 50.0)),
    "class": (1.0, patched),
}


@pytest.mark.parametrize("name", ADDED)
def test_changes_of_a_module_of_the_users_own_are_seen(name):
    number, change = ADDED[name]
    packed = pack(nn.Sequential(signs(N, K), Adds(number), signs(9, N)).eval())
    fused, x = pack(packed, fuse=True), torch.randn(20, K)
    with torch.no_grad():
        before = packed(x)
        assert_equal(fused(x), before)
        assert links(fused) == [True, False]
        for model in (packed, fused):
            change(model)
        want = packed(x)
        assert not torch.equal(want, before)
        for _ in range(4):
            assert_equal(fused(x), want)


@pytest.mark.parametrize("cls", [nn.Hardtanh, PackedQLinear])
def test_a_replaced_forward_of_a_class_is_seen(cls, monkeypatch):
    packed = pack(usual())
    fused, x = pack(packed, fuse=True), torch.randn(20, K)
    forward = cls.forward
    with torch.no_grad():
        assert_equal(fused(x), packed(x))
        monkeypatch.setattr(cls, "forward", lambda self, x: -forward(self, x))
        for _ in range(3):
            assert_equal(fused(x), packed(x))


def test_a_subclass_does_not_inherit_the_promise():
    class Centred(ChannelShift):
        def forward(self, x):
            return super().forward(x) - x.mean(-1, keepdim=True) * 3

    model = nn.Sequential(signs(N, K), Centred(N), signs(9, N)).eval()
    assert type(pack(model, fuse=True)) is nn.Sequential
    assert "Centred follows" in explain(pack(model)).layers[0].output


def test_a_shift_of_another_shape():
    packed = pack(nn.Sequential(signs(8, 4), ChannelShift(8), signs(8, 8)).eval())
    packed[1].shift = nn.Parameter(torch.randn(5, 8) * 4)
    fused, x = pack(packed, fuse=True), torch.randn(5, 4)
    with torch.no_grad():
        for _ in range(3):
            assert_equal(fused(x), packed(x))
        with pytest.raises(RuntimeError, match="must match"):
            fused(x[:3])


def test_layers_of_other_widths_raise_as_unfused():
    for change in (lambda model: None, lambda model: setattr(model[2], "in_features", 21)):
        model = nn.Sequential(signs(20, K), norm(20), signs(8, 24 if change.__code__.co_consts == (None,) else 20))
        fused = pack(model.eval(), fuse=True)
        change(fused)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="x: expected k"), torch.no_grad():
                fused(torch.randn(3, K))


def test_storage_that_is_gone():
    fused, x = pack(usual(), fuse=True), torch.randn(3, K)
    with torch.no_grad():
        fused(x)
        fused[0].bias.untyped_storage().resize_(0)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="bias: its storage holds 0 bytes"):
                fused(x)


@pytest.mark.parametrize("order", [[0, 0], [0, 1, 0], [0, 1, 0, 1, 2], [0, 0, 2]])
def test_one_layer_in_several_places(order):
    modules = [signs(K, K), norm(K), signs(K, K)]
    assert_same(nn.Sequential(*[modules[i] for i in order]).eval())


def test_limits_are_not_computed_while_torch_does_more():
    packed, x = pack(usual()), torch.randn(20, K)
    packed[1].bias.data.normal_()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: -output if isinstance(module, nn.BatchNorm1d) else None
    )
    fused = pack(packed, fuse=True)
    handle.remove()
    with torch.no_grad():
        for _ in range(3):
            assert_equal(fused(x), packed(x))
    with torch.device("meta"):
        again = pack(packed, fuse=True)
    assert links(again) == [True, True, False]


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def with_autocast(x):
    torch.set_autocast_enabled("cpu", True)
    return x


@pytest.mark.parametrize("function", [with_autocast, lambda x: x.to_sparse(), lambda x: x.as_subclass(Scaled)])
def test_what_a_module_before_does(function):
    packed = pack(nn.Sequential(Calls(function), *chain(BETWEEN["hardtanh"])).eval())
    fused, x = pack(packed, fuse=True), torch.randn(20, K)
    results = []
    with torch.no_grad():
        for model in (packed, fused, fused, fused):
            with torch.autocast("cpu", enabled=False):
                results.append(model(x))
            torch.set_autocast_enabled("cpu", False)
    for result in results[1:]:
        assert type(result) is type(results[0])
        assert_equal(result.as_subclass(torch.Tensor), results[0].as_subclass(torch.Tensor))


def test_a_module_that_exchanges_its_neighbours():
    fused = pack(nn.Sequential(nn.Identity(), *usual()).eval(), fuse=True)
    fused[0] = Calls(lambda x: fused.__setitem__(3, nn.Threshold(1.0, -3.0)) or x)
    with pytest.raises(RuntimeError, match="Calls: exchanged modules of the FusedSequential"), torch.no_grad():
        fused(torch.randn(3, K))


def test_a_hook_that_exchanges_a_later_module():
    fused = pack(usual(), fuse=True)
    fused[2].register_forward_hook(lambda module, args, output: fused.__setitem__(3, nn.Threshold(1.0, -3.0)))
    with pytest.raises(RuntimeError, match="Hardtanh: exchanged modules of the FusedSequential"), torch.no_grad():
        fused(torch.randn(3, K))


def test_a_replaced_call_of_all_modules(monkeypatch):
    packed = pack(usual())
    fused, x = pack(packed, fuse=True), torch.randn(20, K)
    call = nn.Module._call_impl

    def negated(self, *args):
        y = call(self, *args)
        return -y if isinstance(self, nn.BatchNorm1d) else y

    monkeypatch.setattr(nn.Module, "_call_impl", negated)
    with torch.no_grad():
        for _ in range(3):
            assert_equal(fused(x), packed(x))


def test_explain_says_if_no_limits_can_be_computed_now():
    fused = FusedSequential(*pack(usual()))
    with torch.autocast("cpu", torch.bfloat16):
        assert "no limits can be computed now" in explain(fused).layers[0].output
    assert explain(fused).layers[0].output.startswith("words")


@pytest.mark.parametrize("x", [torch.randn(4, K).to_sparse(), torch.randn(4, K).to_sparse_csr()])
def test_other_layouts(x):
    packed = pack(usual())
    fused = pack(packed, fuse=True)
    with torch.no_grad():
        assert_equal(fused(x), packed(x))


def test_alternating_values_are_folded_ever_less(monkeypatch):
    folds = []
    fold = bitorch_qlinear.fused.fold_modules
    monkeypatch.setattr(bitorch_qlinear.fused, "fold_modules", lambda *args: folds.append(1) or fold(*args))
    fused, x = pack(usual(), fuse=True), torch.randn(4, K)
    packed = pack(fused)
    folds.clear()
    with torch.no_grad():
        for step in range(60):
            for model in (fused, packed):
                model[1].bias.fill_(step // 3 % 2)
            assert_equal(fused(x), packed(x))
    assert len(folds) <= 2 * 8
    with torch.no_grad():
        for _ in range(20):
            fused(x)
        folds.clear()
        fused(x)
    assert not folds


def test_two_dtypes_have_limits_each(runs):
    packed = pack(chain(BETWEEN["hardtanh"]))
    fused = pack(packed, fuse=True)
    with torch.no_grad():
        for step in range(12):
            x = torch.randn(4, K, dtype=FLOATS[step % 4])
            assert_equal(fused(x), packed(x))
        runs.clear()
        for dtype in FLOATS:
            fused(torch.randn(4, K, dtype=dtype))
    assert len(runs) == 4


def test_no_limits_are_computed_for_calls_with_gradients(monkeypatch):
    fused, x = FusedSequential(*pack(usual())), torch.randn(4, K)
    monkeypatch.setattr(bitorch_qlinear.fused, "fold_modules", lambda *args: pytest.fail("was computed"))
    for _ in range(4):
        fused(x)


def test_a_child_that_is_none():
    fused = pack(usual(), fuse=True)
    fused._modules["2"] = None
    with pytest.raises(TypeError):
        fused(torch.randn(3, K))


# ---- gradients and what else torch does with a call ----


def test_gradients_are_those_of_the_unfused_model(runs):
    packed = pack(usual())
    fused = pack(packed, fuse=True)
    for model in (packed, fused):
        x = torch.linspace(-1, 1, 4 * K).reshape(4, K).requires_grad_()
        model(x).sum().backward()
        model.x_grad = x.grad
    assert_equal(fused.x_grad, packed.x_grad)
    for name, parameter in packed.named_parameters():
        assert (parameter.grad is None) == (fused.get_parameter(name).grad is None)
        if parameter.grad is not None:
            assert_equal(fused.get_parameter(name).grad, parameter.grad)
    assert not runs
    for model in (packed, fused):
        model.requires_grad_(False)
    x = torch.randn(4, K)
    assert_equal(fused(x), packed(x))
    assert runs


def test_inference_mode_and_inference_tensors(runs):
    with torch.inference_mode():
        model = usual()
        packed, fused, x = pack(model), pack(model, fuse=True), torch.randn(4, K)
        for _ in range(3):
            assert_equal(fused(x), packed(x))
    assert len(runs) == 3


def test_autocast():
    packed = pack(chain(BETWEEN["hardtanh"]))
    fused, x = pack(packed, fuse=True), torch.randn(4, K)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = fused(x)
        assert_equal(y, packed(x))
    assert y.dtype is torch.bfloat16


def test_transforms():
    packed = pack(usual())
    fused, x = pack(packed, fuse=True), torch.randn(3, 4, K)
    with torch.no_grad():
        assert_equal(torch.func.vmap(fused)(x), torch.stack([packed(each) for each in x]))
    grad = torch.func.grad(lambda x: fused(x).sum())(x[0])
    assert_equal(grad, torch.func.grad(lambda x: packed(x).sum())(x[0]))


def test_compile_export_and_traces(runs):
    packed = pack(usual()).requires_grad_(False)
    fused, x = pack(packed, fuse=True), torch.randn(5, K)
    want = packed(x)
    torch._dynamo.reset()
    assert_equal(torch.compile(fused, fullgraph=True, backend="eager")(x), want)
    assert_equal(torch.export.export(fused, (x,)).module()(x), want)
    assert_equal(torch.jit.trace(fused, (x,), check_trace=False)(x), want)
    assert_equal(torch.fx.symbolic_trace(fused)(x), want)
    assert not runs


def test_modes_that_see_functions_or_operators(runs):
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    class Negative(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            return -y if function is F.hardtanh else y

    packed = pack(usual())
    fused, x = pack(packed, fuse=True), torch.randn(5, K)
    with torch.no_grad():
        with Negative():
            assert_equal(fused(x), packed(x))
        with FlopCounterMode(display=False) as counted:
            fused(x)
        with FlopCounterMode(display=False) as wanted:
            packed(x)
        assert counted.get_total_flops() == wanted.get_total_flops() > 0
        assert not runs
        with torch.device("cpu"):
            assert_equal(fused(x), packed(x))
        assert runs


class Scaled(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs)
        return y * 0 - 1 if function is F.batch_norm else y


def test_tensor_subclasses():
    packed = pack(usual())
    fused = pack(packed, fuse=True)
    x = torch.randn(5, K).as_subclass(Scaled)
    with torch.no_grad():
        assert_equal(fused(x), packed(x))
        for model in (packed, fused):
            model[1].running_mean = model[1].running_mean.as_subclass(Scaled)
        x = torch.randn(5, K)
        for _ in range(3):
            assert_equal(fused(x), packed(x))


# ---- what is a chain, and what explain says ----


def of(*modules):
    return nn.Sequential(signs(N, K), *modules, signs(9, N)).eval()


def training(model):
    model[1].train()
    return model


def hooked(model, index):
    model[index].register_forward_hook(lambda *args: None)
    return model


def two_places():
    shared = norm(N)
    return nn.Sequential(signs(N, K), shared, signs(N, N), shared, signs(9, N)).eval()


class Own(nn.BatchNorm1d):
    def forward(self, x):
        return 1 - super().forward(x)


class Opaque(ChannelShift):
    def __init__(self, channels):
        super().__init__(channels)
        self.table = [1.0, 2.0]


NOT_FUSED = {
    "training": (lambda: training(of(norm(N))), "BatchNorm1d is in training mode"),
    "without-statistics": (
        lambda: of(nn.BatchNorm1d(N, track_running_stats=False)),
        "BatchNorm1d has no running statistics",
    ),
    "a-subclass": (lambda: of(Own(N)), "Own follows, which is not one"),
    "tanh": (lambda: of(nn.Tanh()), "Tanh follows, which is not one"),
    "layer-norm": (lambda: of(nn.LayerNorm(N)), "LayerNorm follows"),
    "opaque": (lambda: of(Opaque(N)), "attributes of its own"),
    "hook": (lambda: hooked(of(norm(N)), 1), "a module of the chain has hooks"),
    "hook-of-the-reader": (lambda: hooked(of(norm(N)), 2), "no packed layer follows|QLinear follows"),
    "real-input-follows": (
        lambda: nn.Sequential(signs(N, K), norm(N), QLinear(N, 9, input_quantization="identity")).eval(),
        "the next layer does not read signs",
    ),
    "real-input": (
        lambda: nn.Sequential(QLinear(K, N, input_quantization="identity"), norm(N), signs(9, N)).eval(),
        "its input is not signs",
    ),
    "levels-follow": (
        lambda: nn.Sequential(signs(N, K), norm(N), QLinear(N, 9, input_quantization="inputdorefa")).eval(),
        "the next layer does not read signs|QLinear follows",
    ),
    "no-step": (
        lambda: of(Waves(), nn.Hardtanh()),
        r"the signs of 37 of 37 channels change more than once, \d+ times in all: Waves, Hardtanh",
    ),
    "nothing-follows": (lambda: nn.Sequential(signs(N, K), norm(N)).eval(), "no packed layer follows"),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_what_is_not_fused_and_why(case):
    make, reason = NOT_FUSED[case]
    model = make()
    packed, fused = pack(model), pack(model, fuse=True)
    x = torch.randn(6, K)
    if case != "training":
        with torch.no_grad():
            for _ in range(3):
                assert_equal(fused(x), packed(x))
    assert not any(links(fused)) if isinstance(fused, FusedSequential) else True
    for model in (packed, fused):
        assert re.search(reason, explain(model).layers[0].output), explain(model).layers[0].output


def test_one_module_in_two_places():
    assert_same(two_places(), want=[True, True, False])


def test_tied_words():
    model = chain(BETWEEN["batch-norm"], k=N)
    model[2].weight = model[0].weight
    fused = assert_same(model, k=N, want=[True, True, False])
    assert fused[0].weight is fused[2].weight


class Handmade(nn.Module):
    """Forwards that once gave wrong numbers, because a trace of them had been taken for what they do."""

    def __init__(self):
        super().__init__()
        self.body = usual()
        self.parts = [self.body[0], self.body[1]]
        self.kept = None

    def forward(self, x, shift=None):
        h = self.parts[1](self.parts[0](x))
        if shift is not None:
            h = h + shift
        self.kept = self.body[:2](x)
        for module in self.body[2:]:
            h = module(h)
        if torch.is_grad_enabled() and isinstance(h, torch.Tensor):
            h = h + 1
        return h + self.body(x) * self.body[1].weight.sum()


def test_a_forward_that_uses_the_modules_in_other_ways():
    packed = pack(Handmade().eval())
    fused, x = pack(packed, fuse=True), torch.randn(5, K)
    assert type(fused.body) is FusedSequential
    for arguments in ((x,), (x, 3.0)):
        assert_equal(fused(*arguments).detach(), packed(*arguments).detach())
        with torch.no_grad():
            assert_equal(fused(*arguments), packed(*arguments))
        assert_equal(fused.kept.detach(), packed.kept.detach())


def test_layers_outside_of_a_sequential():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = signs(N, K), norm(N), signs(9, N)

        def forward(self, x):
            return self.b(self.norm(self.a(x)))

    fused = pack(Model().eval(), fuse=True)
    assert [layer.output for layer in explain(fused)] == ["no nn.Sequential calls it"] * 2


def test_what_it_says():
    packed = pack(usual())
    fused = pack(packed, fuse=True)
    words = "words for the next layer through BatchNorm1d, Hardtanh, Dropout"
    last = "no packed layer follows in its nn.Sequential"
    assert [layer.output for layer in explain(fused)] == [words, words, last]
    would = f"with pack(model, fuse=True): {words}"
    assert [layer.output for layer in explain(packed)] == [would, would, last]
    assert words in str(explain(fused))
    assert [layer.output for layer in explain(usual())] == [""] * 3


def test_what_an_outer_sequential_fuses_is_reported():
    model = nn.Sequential(nn.Sequential(signs(N, K), norm(N)), nn.Sequential(signs(9, N), norm(9), signs(4, 9))).eval()
    fused = pack(model, fuse=True)
    outputs = [layer.output for layer in explain(fused)]
    assert [output.startswith("words") for output in outputs] == [True, True, False]


# ---- the fused model ----


def test_the_class_is_all_that_changes():
    model = usual()
    model.register_forward_hook(lambda module, args, output: output + 1)
    packed = pack(model)
    children, state, hooks = list(packed), list(packed.state_dict()), packed._forward_hooks
    assert pack(packed, fuse=True, inplace=True) is packed
    assert type(packed) is FusedSequential
    assert list(packed) == children
    assert list(packed.state_dict()) == state
    assert packed._forward_hooks is hooks
    assert type(packed[:3]) is FusedSequential
    assert_same(model, want=[True, True, False])


def test_pack_makes_a_copy_unless_told_otherwise():
    packed = pack(usual())
    fused = pack(packed, fuse=True)
    assert type(packed) is nn.Sequential
    assert type(fused) is FusedSequential
    assert type(pack(packed)) is nn.Sequential
    assert type(pack(fused)) is FusedSequential


def test_made_by_hand(runs):
    """In training too, where it is an nn.Sequential."""
    model = FusedSequential(*usual())
    x = torch.randn(4, K)
    model.train()
    model(x).sum().backward()
    assert model[0].weight.grad is not None
    packed = pack(model.eval())
    plain = nn.Sequential(*packed)
    with torch.no_grad():
        for _ in range(3):
            assert_equal(packed(x), plain(x))
    assert len(runs) == 2
    assert type(packed.fuse(torch.float64)) is FusedSequential
    assert type(unpack(packed)[0]) is QLinear


def test_through_a_file():
    model = usual()
    packed, fused, x = pack(model), pack(model, fuse=True), torch.randn(5, K)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    between = [nn.BatchNorm1d, nn.Hardtanh, nn.Dropout]
    with torch.serialization.safe_globals(between):
        loaded = torch.load(file, weights_only=True)
    with torch.no_grad():
        for each in (loaded, copy.deepcopy(fused)):
            for _ in range(3):
                assert_equal(each(x), packed(x))
            assert links(each) == [True, True, False]
    assert repr(loaded) == repr(fused)


@pytest.mark.parametrize("assign", [True, False])
def test_state_dict(assign):
    packed, x = pack(usual()), torch.randn(5, K)
    other = pack(chain(lambda n: [norm(n, seed=9), nn.Hardtanh(), nn.Dropout()]), fuse=True)
    assert str(other.load_state_dict(packed.state_dict(), assign=assign)) == "<All keys matched successfully>"
    with torch.no_grad():
        for _ in range(3):
            assert_equal(other(x), packed(x))


# ---- the modules with shifts ----


@pytest.mark.parametrize("shape", [(4, N), (N,), (2, 3, N), (0, N)])
def test_shifts(shape):
    x = torch.randn(shape)
    shift, react = randomized(ChannelShift(N)), randomized(RPReLU(N))
    assert_equal(shift(x).detach(), x + shift.shift.detach())
    inner = x + react.shift_in.detach()
    want = torch.where(inner > 0, inner, inner * react.slope.detach()) + react.shift_out.detach()
    assert_equal(react(x).detach(), want)
    assert (repr(shift), repr(react)) == (f"ChannelShift({N})", f"RPReLU({N})")
    assert torch.autograd.gradcheck(react.double(), (torch.randn(3, N, dtype=torch.float64, requires_grad=True),))
