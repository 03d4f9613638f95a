"""CUDA without a GPU: registration, shapes, and the layers on fake CUDA tensors, which hold no memory."""

import pytest
import torch
from calls import Calls
from torch._subclasses.fake_tensor import FakeTensorMode

import bitorch_qlinear
from bitorch_qlinear import PackedQLinear, QLinear, _library, functional, pack

OPERATORS = ["pack_bits", "unpack_bits", "prepare_weight", "binary_linear", "linear", "linear_train"]
K, N = 70, 10

needs_cuda_build = pytest.mark.skipif(not _library.has_cuda, reason=_library.no_cuda_reason)


@pytest.fixture
def fake():
    with FakeTensorMode() as mode:
        yield mode


def on_cuda(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("name", OPERATORS)
def test_registration(name):
    """Where CUDA operators are built and loaded, all of them are."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bitorch_qlinear::{name}", "CUDA") == _library.has_cuda


def test_info():
    info = bitorch_qlinear.info()
    if _library.has_cuda:
        assert info["cuda"] == _library.build_info["cuda_targets"] != ""
    else:
        assert info["cuda"] == _library.no_cuda_reason != ""
    assert len(info["cuda_devices"]) == (torch.cuda.device_count() if _library.has_cuda else 0)
    assert info["cuda_kernel"]


@pytest.mark.parametrize("k", [1, 70, 128, 256])
@pytest.mark.parametrize("n", [1, 3, 4, 5])
def test_results_of_operators(fake, n, k):
    width = -(-k // 32)
    x, words = on_cuda(2, 3, k, dtype=torch.float16), on_cuda(n, width, dtype=torch.int32)
    packed = functional.pack_bits(x)
    assert (packed.shape, packed.dtype, packed.device.type) == ((2, 3, width), torch.int32, "cuda")
    values = functional.unpack_bits(words, k, torch.bfloat16)
    assert (values.shape, values.dtype, values.device.type) == ((n, k), torch.bfloat16, "cuda")
    prepared = functional.prepare_weight(words, k)
    # Header, popcounts in whole 16 bytes, and words in whole 16 bytes where they are not so already.
    expected = 64 + (n + 3) // 4 * 16 + (0 if k % 128 == 0 else n * ((k + 127) // 128) * 16)
    assert (prepared.shape, prepared.dtype, prepared.device.type) == ((expected,), torch.uint8, "cuda")
    y = functional.binary_linear(packed, words, k, weight_prepared=prepared)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, n), torch.float32, "cuda")
    y = functional.linear(x, words, k)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, n), torch.float16, "cuda")
    y, x_words, in_range = functional.linear_train(x, words, k, threshold=1.0)
    assert [t.shape for t in (y, x_words, in_range)] == [(2, 3, n), (2, 3, width), (2, 3, width)]
    assert {t.device.type for t in (y, x_words, in_range)} == {"cuda"}


def test_arguments_on_two_devices(fake):
    words = on_cuda(N, 3, dtype=torch.int32)
    for name, arguments in {
        "x": {"x": torch.empty(2, K), "weight_words": words},
        "weight_words": {"x": on_cuda(2, K), "weight_words": torch.empty(N, 3, dtype=torch.int32)},
        "bias": {"x": on_cuda(2, K), "weight_words": words, "bias": torch.empty(N)},
    }.items():
        named = "weight_words" if name == "x" else name  # the first argument decides
        with pytest.raises(RuntimeError, match=f"{named}: expected a tensor on the same device"):
            functional.linear(k=K, **arguments)


@needs_cuda_build
@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_operators_refuse_tensors_of_the_cpu(name):
    words, x = torch.zeros(N, 3, dtype=torch.int32), torch.zeros(2, K)
    arguments = {
        "pack_bits": (x,),
        "unpack_bits": (words, K, torch.float32),
        "prepare_weight": (words, K),
        "binary_linear": (words, words, K),
        "linear": (x, words, K),
        "linear_train": (x, words, K),
    }[name]
    operator = getattr(torch.ops.bitorch_qlinear, name).default
    with pytest.raises(RuntimeError, match="expected a tensor on the CUDA device that other arguments are on"):
        operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


@needs_cuda_build
@pytest.mark.parametrize("training", [False, True])
def test_layer(fake, training):
    layer = QLinear(K, N, gradient_cancellation_threshold=1.0, device="cuda").train(training)
    x = on_cuda(4, K).requires_grad_()
    assert "path=packed (CUDA)" in repr(layer)
    with Calls() as calls:
        y = layer(x)
        # Not by y.backward(): the engine wants a device.
        gradients = y.grad_fn.apply(torch.ones_like(y), None, None)[:3]
    assert calls.names.count("linear_train") == 1 and calls.names.count("unpack_bits") == 3
    for tensor, shape in zip((y, *gradients), ((4, N), (4, K), (N, K), (N,)), strict=True):
        assert (tensor.shape, tensor.device.type) == (shape, "cuda")
    with torch.no_grad(), Calls() as calls:
        layer.eval()(x)
    assert calls.names[-1] == "linear"


@needs_cuda_build
def test_packed_layer(fake):
    model = torch.nn.Sequential(QLinear(K, N, device="cuda"), torch.nn.ReLU(), QLinear(N, 3, device="cuda"))
    packed, report = pack(model, report=True)
    assert [entry.packed for entry in report] == [True, True]
    assert isinstance(packed[0], PackedQLinear) and "path=packed (CUDA)" in repr(packed)
    with torch.no_grad(), Calls() as calls:
        y = packed(on_cuda(4, K, dtype=torch.bfloat16))
    assert calls.names.count("linear") == 2 and "pack_bits" not in calls.names
    assert (y.shape, y.dtype, y.device.type) == ((4, 3), torch.bfloat16, "cuda")


@needs_cuda_build
def test_moving(fake):
    layer = PackedQLinear(K, N)
    assert _library.active_kernel() in repr(layer)
    layer.to("cuda")
    assert layer.weight_prepared.device.type == "cuda" and layer.weight_prepared.numel() == 64 + 48 + N * 16
    layer.to("cpu")
    panel, unit, unit_bytes, _ = _library.prepared_layout()
    assert layer.weight_prepared.numel() == 64 + -(-N // panel) * -(-K // unit) * unit_bytes


@needs_cuda_build
@pytest.mark.parametrize("packed", [False, True])
def test_export(packed):
    with FakeTensorMode(), torch.no_grad():
        model = QLinear(K, N, device="cuda").eval()
        model = pack(model) if packed else model
        program = torch.export.export(model, (on_cuda(4, K),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.bitorch_qlinear.linear.default in operators
    assert torch.ops.bitorch_qlinear.prepare_weight.default in operators


@pytest.mark.skipif(_library.has_cuda, reason="there are CUDA operators")
def test_layer_without_kernels(fake):
    layer = QLinear(K, N, device="meta")  # a CPU torch cannot even pretend to initialise on CUDA
    layer.weight, layer.bias = (torch.nn.Parameter(on_cuda(*p.shape), False) for p in (layer.weight, layer.bias))
    assert f"path=float (no kernels for cuda: {_library.no_cuda_reason})" in repr(layer)
    with Calls() as calls:
        y = layer(on_cuda(4, K))
    assert calls.names == [] and (y.shape, y.device.type) == ((4, N), "cuda")
    with pytest.raises(RuntimeError, match=f"no CUDA kernels here: {_library.no_cuda_reason}"):
        _library.force_cuda_kernel("popc")
