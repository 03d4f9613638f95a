"""CUDA without a GPU: registration, shapes, and the layers on fake CUDA tensors, which have no memory."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu.tiles import DEPTHS, TILES, shapes_of
from support.calls import Calls
from torch._subclasses.fake_tensor import FakeTensorMode

import bitorch_qlinear
from bitorch_qlinear import PackedQLinear, QLinear, _info, _kernels, _library, _product, functional, kernels, pack

OPERATORS = ["pack_bits", "unpack_bits", "prepare_weight", "binary_linear", "linear", "sign_linear", "linear_train"]
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
    """Either all CUDA operators are registered or none, as the library reports."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bitorch_qlinear::{name}", "CUDA") == _library.has_cuda


def test_info():
    info = bitorch_qlinear.info()
    if _library.has_cuda:
        assert info.cuda == _library.build_info["cuda_targets"] != ""
    else:
        assert info.cuda == _library.no_cuda_reason != ""
    assert len(info.cuda_devices) == (torch.cuda.device_count() if _library.has_cuda else 0)
    assert info.cuda_kernel


@needs_cuda_build
def test_info_says_what_a_device_would_choose(monkeypatch):
    made_up = SimpleNamespace(name="Made up", major=8, minor=6, multi_processor_count=82)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: made_up)
    monkeypatch.setattr(_kernels, "cuda_code", lambda index: 86)
    info = bitorch_qlinear.info()
    said, _ = info.cuda_devices
    assert len(re.findall("Made up, compute capability 8.6: popc", str(info))) == 2
    assert max(map(len, str(info).splitlines())) <= 100
    assert said.startswith("Made up, compute capability 8.6: popc, skinny, ")
    for choice in ("1 × 4096 → 4096 in bfloat16: fused_skinny: one", "16 × 4096 → 4096 in bfloat16: skinny_mma_sm80: "):
        assert f"; {choice}" in said
    assert re.search(r"; 4096 × 4096 → 4096 in bfloat16: mma_sm80 with tiles of \d+ x \d+: ", said)
    made_up.major, made_up.minor = 7, 0
    assert bitorch_qlinear.info().cuda_devices[0].endswith("7.0: no kernel, 7.5 or later is needed")


def test_info_says_that_a_device_has_no_code(monkeypatch):
    made_up = SimpleNamespace(name="Made up", major=8, minor=6, multi_processor_count=82)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: made_up)
    monkeypatch.setattr(_kernels, "available_cuda_kernels", lambda capability, code: ["popc"])
    monkeypatch.setattr(_kernels, "cuda_choice", lambda *arguments: "popc: it is the only one")
    for code, said in ((80, "popc; "), (0, "no kernel, because CUDA loads no code for it")):
        monkeypatch.setattr(_kernels, "cuda_code", lambda index, code=code: code)
        assert _info._cuda_device(0).startswith(f"Made up, compute capability 8.6: {said}")


@pytest.mark.parametrize("k", [1, 70, 128, 256])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 33])
def test_results_of_operators(fake, n, k):
    width = -(-k // 32)
    x, words = on_cuda(2, 3, k, dtype=torch.float16), on_cuda(n, width, dtype=torch.int32)
    packed = functional.pack_bits(x)
    assert (packed.shape, packed.dtype, packed.device.type) == ((2, 3, width), torch.int32, "cuda")
    values = functional.unpack_bits(words, k, torch.bfloat16)
    assert (values.shape, values.dtype, values.device.type) == ((n, k), torch.bfloat16, "cuda")
    prepared = functional.prepare_weight(words, k)
    # A form has a header, popcounts padded to 16 bytes, and, unless k % 128 == 0, a copy of the words with padded rows.
    expected = 64 + (n + 3) // 4 * 16 + (0 if k % 128 == 0 else n * ((k + 127) // 128) * 16)
    assert (prepared.shape, prepared.dtype, prepared.device.type) == ((expected,), torch.uint8, "cuda")
    y = functional.binary_linear(packed, words, k, weight_prepared=prepared)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, n), torch.float32, "cuda")
    y = functional.linear(x, words, k)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, n), torch.float16, "cuda")
    limits, flips = on_cuda(n, dtype=torch.int32), on_cuda(-(-n // 32), dtype=torch.int32)
    for y in (
        functional.binary_linear(packed, words, k, weight_prepared=prepared, out_limits=limits),
        functional.linear(x, words, k, out_limits=limits, out_flips=flips),
    ):
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, -(-n // 32)), torch.int32, "cuda")
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
        device = "CUDA device that other arguments are on" if name == "x" else "same device as the first argument"
        with pytest.raises(RuntimeError, match=f"bitorch_qlinear: {name}: expected a tensor on the {device}$"):
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
        "sign_linear": (x, x),
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
        # y.backward() would need a real device.
        gradients = y.grad_fn.apply(torch.ones_like(y), None, None)[:3]
    assert calls.names.count("linear_train") == 1 and calls.names.count("unpack_bits") == 3
    for tensor, shape in zip((y, *gradients), ((4, N), (4, K), (N, K), (N,)), strict=True):
        assert (tensor.shape, tensor.device.type) == (shape, "cuda")
    with torch.no_grad(), Calls() as calls:
        layer.eval()(x)
    assert calls.names == ["sign_linear"]


@needs_cuda_build
def test_packed_layer(fake):
    model = torch.nn.Sequential(QLinear(K, N, device="cuda"), torch.nn.ReLU(), QLinear(N, 3, device="cuda"))
    packed = pack(model)
    assert isinstance(packed[0], PackedQLinear) and "path=packed (CUDA)" in repr(packed)
    with torch.no_grad(), Calls() as calls:
        y = packed(on_cuda(4, K, dtype=torch.bfloat16))
    assert calls.names.count("linear") == 2 and "pack_bits" not in calls.names
    assert (y.shape, y.dtype, y.device.type) == ((4, 3), torch.bfloat16, "cuda")


@needs_cuda_build
def test_packed_layer_keeps_no_form(fake):
    """CUDA kernels read the words themselves, and whatever else they need is computed during the call."""
    layer = PackedQLinear(K, N, device="cuda")
    assert layer.prepare() is None and layer.weight_prepared is None
    layer(on_cuda(4, K))
    assert layer.weight_prepared is None


@needs_cuda_build
@pytest.mark.parametrize("packed", [False, True])
def test_export(packed):
    with FakeTensorMode(), torch.no_grad():
        model = QLinear(K, N, device="cuda").eval()
        model = pack(model) if packed else model
        program = torch.export.export(model, (on_cuda(4, K),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    operators = [node.target for node in program.graph.nodes if node.op == "call_function"]
    operator = torch.ops.bitorch_qlinear.linear if packed else torch.ops.bitorch_qlinear.sign_linear
    assert operators == [operator.default]


@pytest.mark.skipif(_library.has_cuda, reason="there are CUDA operators")
def test_layer_without_kernels(fake):
    layer = QLinear(K, N, device="meta")  # a CPU-only torch cannot initialise parameters on CUDA, not even fake ones
    layer.weight, layer.bias = (torch.nn.Parameter(on_cuda(*p.shape), False) for p in (layer.weight, layer.bias))
    assert f"path=float (no kernels for cuda: {_library.no_cuda_reason})" in repr(layer)
    with Calls() as calls:
        y = layer(on_cuda(4, K))
    assert calls.names == [] and (y.shape, y.device.type) == ((4, N), "cuda")
    with pytest.raises(RuntimeError, match=re.escape(f"no CUDA kernels here: {_library.no_cuda_reason}")):
        _kernels.force_cuda_kernel("popc")
    message = rf"got 'popc', a CUDA kernel; there are no CUDA operators here: {re.escape(_library.no_cuda_reason)}$"
    with pytest.raises(ValueError, match=message), kernels.forced("popc"):
        pass


# ---- the library's answers without a device --------------------------------------------------------

DEVICES = {(8, 0): 108, (8, 6): 82, (8, 9): 128, (9, 0): 132}  # the number of multiprocessors by compute capability


def import_with(kernel, tile="", early=""):
    """Import the package in a new process with BITORCH_QLINEAR_CUDA_KERNEL, ..._TILE and ..._EARLY_START set."""
    code = "import bitorch_qlinear as b; print(b._kernels.forced_cuda_tile()); print(b.info().cuda_kernel)"
    environment = {**os.environ, "BITORCH_QLINEAR_CUDA_KERNEL": kernel, "BITORCH_QLINEAR_CUDA_TILE": tile}
    environment["BITORCH_QLINEAR_CUDA_EARLY_START"] = early
    root = Path(bitorch_qlinear.__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)


@needs_cuda_build
@pytest.mark.parametrize("kernel", ["popc", "skinny", "mma_sm80", ""])
def test_kernel_by_environment(kernel):
    result = import_with(kernel)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == (kernel or "chosen by each product's sizes")


@needs_cuda_build
def test_forced_restores_the_previous_kernel():
    before = _kernels.forced_cuda_kernel(), kernels.active()
    with kernels.forced("skinny"):
        with kernels.forced("scalar"), pytest.raises(ZeroDivisionError), kernels.forced("mma_sm80"):
            assert (bitorch_qlinear.info().cuda_kernel, kernels.active()) == ("mma_sm80", "scalar")
            raise ZeroDivisionError
        assert (_kernels.forced_cuda_kernel(), kernels.active()) == ("skinny", before[1])
        with pytest.raises(ValueError, match=r"CUDA kernel \(popc, .*, got 'popcorn'$"), kernels.forced("popcorn"):
            pass
        assert _kernels.forced_cuda_kernel() == "skinny"
    assert (_kernels.forced_cuda_kernel(), kernels.active()) == before


@needs_cuda_build
@pytest.mark.parametrize("name", ["nope", "POPC", "popc "])
def test_unknown_kernel_is_an_error_at_import(name):
    result = import_with(name)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "BITORCH_QLINEAR_CUDA_KERNEL: expected one of popc, skinny, " in last and last.endswith(f'got "{name}"')


@needs_cuda_build
def test_tile_by_environment():
    result = import_with("", "128x128")
    assert result.stdout.splitlines()[0] == "128x128"
    result = import_with("", "128")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.endswith('BITORCH_QLINEAR_CUDA_TILE: expected one of 128x256, 128x192, 128x128, 64x64, got "128"')


@needs_cuda_build
def test_early_starts_by_environment():
    assert import_with("", early="0").returncode == 0
    last = import_with("", early="no").stderr.strip().splitlines()[-1]
    assert last.endswith('BITORCH_QLINEAR_CUDA_EARLY_START: expected 0 or 1, got "no"')


@needs_cuda_build
def test_forced_tile():
    with pytest.raises(RuntimeError, match="BITORCH_QLINEAR_CUDA_TILE: expected one of"):
        _kernels.force_cuda_tile("32x32")
    _kernels.force_cuda_tile("128x128")
    try:
        assert _kernels.cuda_choice((9, 0), 132, 65, 5, 5).startswith("mma_sm80 with tiles of 128 x 128: the tile is")
    finally:
        _kernels.force_cuda_tile(None)


@needs_cuda_build
@pytest.mark.parametrize(
    ("capability", "rows", "kernel"),
    [
        ((7, 5), 1, "skinny"),
        ((7, 5), 64, "mma_sm75"),
        *(((8, minor), rows, "skinny_mma_sm80") for minor in (0, 6, 9) for rows in (16, 17)),
        ((8, 0), 65, "mma_sm80"),
        ((9, 0), 4, "skinny"),
        ((9, 0), 255, "mma_sm80"),
        ((9, 0), 4096, "wgmma_sm90a"),
        ((10, 0), 4, "skinny"),
        ((10, 0), 64, "mma_int8_sm80"),
        ((12, 0), 17, "mma_int8_sm80"),
    ],
)
def test_choice_for_devices_that_are_absent(capability, rows, kernel):
    choice = _kernels.cuda_choice(capability, 100, rows, 4096, 4096)
    assert re.match(rf"{kernel}( with tiles of \d+ x \d+)?: \w", choice)
    assert kernel in _kernels.available_cuda_kernels(capability)


@needs_cuda_build
def test_no_choice_for_a_device_that_is_too_old():
    assert _kernels.available_cuda_kernels((7, 0)) == []
    choice = _kernels.cuda_choice((7, 0), 80, 1, 4096, 4096)
    assert choice == "bitorch_qlinear: compute capability 7.0 is not supported: the CUDA kernels need 7.5 or later"


@needs_cuda_build
@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_has_small_products_at_its_edges(capability, tile):
    """Every tile has products on all sides of its edges that are small enough for tests/gpu to compare with the CPU."""

    def choice(m, n, k):
        return _kernels.cuda_choice(capability, DEVICES[capability], m, n, k)

    with kernels.forced("mma_sm80"):
        shapes = shapes_of(tile, choice, DEVICES[capability], DEPTHS)
    rows, columns = TILES[tile]
    assert {k for *_, k in shapes} == set(DEPTHS)
    for k in DEPTHS:
        assert {m - rows for m, _, depth in shapes if depth == k} >= {-1, 0, 1}
        assert {(n + 1) % columns for _, n, depth in shapes if depth == k} == {0, 1, 2}
    assert max(m * n for m, n, _ in shapes) < 10e6


@needs_cuda_build
def test_the_library_imports_nothing_that_waits_or_allocates():
    library = Path(_library.__file__).with_name("_ops_cuda.so")
    command = ["nm", "-D", "--undefined-only", str(library)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    symbols = {line.split()[-1].split("@")[0] for line in output.splitlines()}
    assert "cudaGetLastError" in symbols, "nm's output was not understood"
    wanting = [symbol for symbol in symbols if re.search("Synchronize|^cuda(Memcpy|Memset|Malloc|Free|Host)", symbol)]
    assert not wanting


# ---- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_out_of_range_become_zero(monkeypatch, dtype):
    """The code path for CUDA, run on CPU tensors, zeroes masked values, even NaN, and leaves all others as they are."""
    values = torch.randn(5, K).to(dtype)
    values[:, ::7], values[:, 1::7], values[:, 2::7] = float("nan"), float("inf"), -0.0
    kept = torch.rand(5, K) < 0.5
    words = functional.pack_bits(torch.where(kept, 1.0, -1.0))
    wanted = torch.where(kept, values, torch.zeros((), dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    batched = torch.func.vmap(_product._apply_mask, in_dims=(None, 0, None))(values[0], words, K)
    assert torch.equal(bits(batched[0]), bits(wanted[0])) and batched.shape == values.shape
    assert torch.equal(bits(_product._apply_mask(values, words, K)), bits(wanted))


def bits(values):
    """Return the bits of the values, because a comparison of floats cannot tell NaN and -0.0 apart from others."""
    return values.contiguous().view(torch.uint8)
