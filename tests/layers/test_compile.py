"""torch.compile and torch.export make one graph, do not recompile, and give the same numbers."""

import io
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo
from support.gradients import results
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from bitorch_qlinear import PackedQLinear, QLinear, _kernels, pack
from bitorch_qlinear.checkpoint import NUMBERS

K, N = 70, 9


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_like(training=True, **options):
    return QLinear(K, N, **{"gradient_cancellation_threshold": 0.9, **options}).train(training)


# ---- compile ----


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_and_backward(training, dynamic):
    layer = layer_like(training)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        x, g = torch.randn(2, rows, K), torch.randint(-3, 4, (2, rows, N)).float()
        for ours, want in zip(results(compiled, layer, x, g), results(layer, layer, x, g), strict=True):
            assert torch.equal(ours, want)


@pytest.mark.parametrize(
    ("input_quantization", "weight_quantization"),
    [("swishsign", "approxsign"), ("steheaviside", "steheaviside"), ("inputdorefa", "weightdorefa")],
)
def test_other_quantizations(input_quantization, weight_quantization):
    layer = layer_like(input_quantization=input_quantization, weight_quantization=weight_quantization)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, g = torch.randn(3, K), torch.randint(-3, 4, (3, N)).float()
    for ours, want in zip(results(compiled, layer, x, g), results(layer, layer, x, g), strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("make", [layer_like, lambda: layer_like(False), lambda: pack(layer_like(False))])
def test_no_recompilation_per_batch_size(make):
    layer, counter = make(), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for rows in (2, 3, 17, 64, 5):
            x = torch.randn(rows, K)
            assert torch.equal(compiled(x), layer(x))  # an eager call in between must not cause a recompilation either
    assert counter.frame_count == 1


def test_no_recompilation_per_batch_size_in_backward():
    layer, counter = layer_like(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows in (2, 3, 17):
        compiled(torch.randn(rows, K, requires_grad=True)).sum().backward()
        counts.append(counter.frame_count)
    assert counts == [2, 2, 2]  # one for forward, one for backward


def test_a_changed_weight_is_used_without_recompilation():
    layer, counter = layer_like(False), CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(3, K)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x), layer(x))
            layer.weight.neg_()
            assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_trains():
    layer = layer_like(weight_quantization="steheaviside")
    compiled = torch.compile(layer, fullgraph=True)
    x, g = torch.randn(3, K), torch.randint(-3, 4, (3, N)).float()
    for ours, want in zip(results(compiled, layer, x, g), results(layer, layer, x, g), strict=True):
        assert torch.equal(ours, want)


def test_inductor_infers():
    packed = pack(nn.Sequential(layer_like(False), nn.ReLU()))
    compiled = torch.compile(packed, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (3, 8):
            x = torch.randn(rows, K)
            assert torch.equal(compiled(x), packed(x))


def test_autocast_in_the_graph():
    layer = layer_like()
    x = torch.randn(3, K)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = layer(x)
    assert want.dtype is torch.bfloat16
    assert torch.equal(run(x), want)


# ---- a compiled PackedQLinear ----


def test_compiled_packed_layer_sees_new_words():
    packed, counter = PackedQLinear.from_float(layer_like(False)), CompileCounter()
    compiled = torch.compile(packed, fullgraph=True, backend=counter)
    x = torch.randn(3, K)
    for _ in range(3):
        other = layer_like(False)
        with torch.no_grad():
            packed.load_state_dict(PackedQLinear.from_float(other).state_dict())
            assert torch.equal(compiled(x), other(x))
            packed.load_state_dict(layer_like(False).state_dict())
            assert torch.equal(compiled(x), packed(x))
            packed.weight.copy_(PackedQLinear.from_float(other).weight)
            packed.bias.copy_(other.bias)
            assert torch.equal(compiled(x), other(x))
    assert counter.frame_count == 1


# ---- export ----


def exported_operators(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def save_and_load(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


OPS = torch.ops.bitorch_qlinear


@pytest.mark.parametrize(
    ("make", "operator", "state"),
    [
        (lambda: layer_like(False), OPS.sign_linear.default, {"weight", "bias"}),
        (lambda: PackedQLinear.from_float(layer_like(False)), OPS.linear.default, {"weight", "bias", *NUMBERS}),
    ],
    ids=["QLinear", "PackedQLinear"],
)
def test_export(make, operator, state):
    layer = make().requires_grad_(False)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(layer, (torch.randn(4, K),), dynamic_shapes=({0: batch},))
    ours = [target for target in exported_operators(program) if "bitorch_qlinear" in str(target)]
    assert ours == [operator]
    assert {str(target).split(".")[0] for target in exported_operators(program)} <= {"bitorch_qlinear", "aten"}
    assert all(node.op != "higher_order" and "autograd" not in str(node.target) for node in program.graph.nodes)
    loaded = save_and_load(program)
    assert set(program.state_dict) == state
    for rows in (1, 4, 33):
        x = torch.randn(rows, K)
        assert torch.equal(program.module()(x), layer(x))
        assert torch.equal(loaded.module()(x), layer(x))


def test_an_exported_program_holds_words_and_no_prepared_form():
    layer = pack(nn.Sequential(QLinear(1024, 256, bias=False)).eval())
    program = torch.export.export(layer, (torch.randn(2, 1024),))
    file = io.BytesIO()
    torch.export.save(program, file)
    floats = 4 * 1024 * 256
    assert sum(tensor.nbytes for tensor in program.state_dict.values()) == floats // 32 + 8 * len(NUMBERS)
    assert file.tell() < floats // 16
    assert not program.constants


def test_export_of_a_network_that_requires_gradients():
    model = nn.Sequential(nn.Linear(4, K), layer_like(False), nn.Linear(N, 2))
    x = torch.randn(3, 4)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backward_of_a_compiled_packed_layer(backend):
    model = nn.Sequential(nn.Linear(8, K), PackedQLinear.from_float(layer_like(training=False)))
    compiled, x = torch.compile(model, fullgraph=True, backend=backend), torch.randn(3, 8)
    g = torch.randint(-3, 4, (3, N)).float()
    gradients = []
    for each in (model, compiled):
        model.zero_grad()
        y = each(x)
        y.backward(g)
        gradients.append(model[0].weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize(
    "make", [lambda: layer_like(False), lambda: pack(layer_like(False))], ids=["QLinear", "Packed"]
)
def test_a_compiled_call_is_one_operator(make):
    layer, x = make(), torch.randn(3, K)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
        with torch.profiler.profile() as profile:
            compiled(x)
    ours = [event for event in profile.key_averages() if event.key.startswith("bitorch_qlinear::")]
    assert [event.count for event in ours] == [1]


COMPILED = """
import torch
from bitorch_qlinear import QLinear
layer, x = QLinear(70, 10).eval(), torch.randn(3, 70)
with torch.no_grad():
    assert torch.equal(torch.compile(layer)(x), layer(x))
"""


@pytest.mark.slow
def test_graphs_cached_on_disk_belong_to_one_kernel(tmp_path):
    """Each process finds the graphs that a process with another kernel, and so another prepared form, has cached."""
    for kernel in reversed(_kernels.available_kernels()):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "BITORCH_QLINEAR_CPU_KERNEL": kernel}
        subprocess.run([sys.executable, "-c", COMPILED], env=environment, check=True, timeout=300)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize(("k", "n"), [(37, 9), (256, 256)])
def test_export_of_a_layer_that_requires_gradients_serves_any_batch(k, n, strict, training):
    """Strict export also traces the backward, whose choice between tables and BLAS must not depend on the batch."""
    layer = QLinear(k, n).train(training)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(layer, (torch.randn(5, k),), dynamic_shapes=shapes, strict=strict)
    for rows in (1, 64, 70):
        x = torch.randn(rows, k)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_no_recompilation_if_the_backward_would_choose_another_way():
    layer, counter = QLinear(256, 256), CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 20, 63, 64, 100, 2000):
        compiled(torch.randn(rows, 256)).sum().backward()
    assert counter.frame_count == 1
