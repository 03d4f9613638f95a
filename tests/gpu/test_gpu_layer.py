"""QLinear, PackedQLinear and pack() compute the same on the GPU as on the CPU, however torch calls them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from bitorch_qlinear import PackedQLinear, QLinear, explain, info, pack
from bitorch_qlinear import functional as F

from .device import CUDA, KERNELS, assert_same, captured, every_kernel, no_synchronization, several_devices

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIGN_LIKE = ["sign", "approxsign", "swishsign", "steheaviside"]
K, N = 200, 40  # sums of 40 integers up to 3 are exact in every dtype

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_like(training=True, *, k=K, n=N, **options):
    """Return a layer on the CPU with zeros in its weights, for which the rules differ."""
    layer = QLinear(k, n, **{"gradient_cancellation_threshold": 0.9, **options}).train(training)
    with torch.no_grad():
        layer.weight[0, : min(k, 5)] = 0.0
    return layer


def on_gpu(layer):
    return copy.deepcopy(layer).to(CUDA)


def input_like(*leading, dtype=torch.float32, k=K):
    x = torch.randn(*leading, k).to(dtype)
    x[..., : min(k, 4)] = torch.tensor([0.0, -0.0, float("nan"), -float("inf")], dtype=dtype)[: min(k, 4)]
    return x


def gradient_like(y):
    return torch.randint(-1, 2, y.shape).to(y.dtype)


def output_and_gradients(layer, x, g=None):
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    g = gradient_like(y) if g is None else g
    return y.detach(), torch.autograd.grad(y, [leaf, *layer.parameters()], g.to(y.device))


def assert_as_on_the_cpu(layer, x, exact=True):
    """Compare output and gradients with the CPU's; the incoming gradients are integers, whose sums are exact."""
    y, gradients = output_and_gradients(layer, x)
    g = gradient_like(y)
    y, gradients = output_and_gradients(layer, x, g)
    gpu_y, gpu_gradients = output_and_gradients(on_gpu(layer), x.to(CUDA), g)
    assert_same(gpu_y, y, "y")
    for name, gpu, want in zip("xWb", gpu_gradients, gradients, strict=False):
        if exact:
            # Adding 0.0 turns -0.0 into 0.0: for one row cuBLAS gives 0.0 if the CPU gives -0.0 (seen on an H200).
            assert_same(gpu + 0.0, want + 0.0, f"gradient of {name}")
        else:  # the GPU's exponential function is another one
            # Half types round the factors and the product, with values up to some tens.
            half = {"rtol": 1e-2, "atol": 5e-2} if want.dtype.itemsize == 2 else {}
            torch.testing.assert_close(gpu.cpu(), want, equal_nan=True, **half)


# ---- values and gradients --------------------------------------------------------------------------


@every_dtype
@both_modes
@pytest.mark.parametrize("weight_quantization", SIGN_LIKE)
@pytest.mark.parametrize("input_quantization", SIGN_LIKE)
def test_forward_and_gradients(input_quantization, weight_quantization, training, dtype):
    names = {"input_quantization": input_quantization, "weight_quantization": weight_quantization}
    layer = layer_like(training, dtype=dtype, **names)
    assert "path=packed (CUDA)" in repr(on_gpu(layer))
    assert_as_on_the_cpu(layer, input_like(2, 9, dtype=dtype), exact="swishsign" not in names.values())


@every_dtype
@both_modes
@pytest.mark.parametrize("scale", [None, "mean", "learned"])
def test_ternary_weights(scale, training, dtype):
    layer, x = layer_like(training, dtype=dtype, weight_quantization="ternary", weight_scale=scale), input_like(2, 9)
    with torch.no_grad():
        # Sums of whole numbers are exact, so the limits and the means do not depend on the order of addition.
        layer.weight.copy_(torch.randint(-4, 5, layer.weight.shape))
        x = x.to(dtype)
        y = layer(x)
        for each in (on_gpu(layer), pack(on_gpu(layer)), pack(layer).to(CUDA)):
            assert_same(each(x.to(CUDA)), y)
        layer.weight[7, 3] = float("nan")
        assert on_gpu(layer)(x.to(CUDA))[..., 7].isnan().all()
        assert type(pack(on_gpu(layer))) is QLinear


@every_kernel
@pytest.mark.parametrize("threshold", [None, 0.0, 0.5])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (1, 513, 40), (16, 128, 33), (40, 129, 39), (0, 40, 5)])
def test_every_kernel_trains(cuda_kernel, rows, k, n, threshold):
    layer = layer_like(k=k, n=n, gradient_cancellation_threshold=threshold)
    assert_as_on_the_cpu(layer, input_like(rows, k=k))


def test_gradients_are_those_of_the_float_computation():
    layer = on_gpu(layer_like())
    x, g = input_like(9).to(CUDA), torch.randint(-3, 4, (9, N), device=CUDA).float()
    _, (grad_x, grad_weight, grad_bias) = output_and_gradients(layer, x, g)
    signs = [torch.where(v < 0, -1.0, 1.0).double() for v in (x, layer.weight)]
    assert_same(grad_x, torch.where(x.abs() <= 0.9, g.double() @ signs[1], 0.0).float())
    assert_same(grad_weight, (g.double().t() @ signs[0]).float())
    assert_same(grad_bias, g.sum(0))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions(leading, bias):
    for training in (True, False):
        assert_as_on_the_cpu(layer_like(training, bias=bias), input_like(*leading))


def test_progressive_sign_and_other_quantizations():
    x = input_like(3).nan_to_num(0, 1, -1)
    for name in ("progressive_sign", "inputdorefa"):
        layer = layer_like(False, input_quantization=name)
        torch.testing.assert_close(on_gpu(layer)(x.to(CUDA)).cpu(), layer(x))


def test_a_layer_uses_changed_weights():
    """Each of these changes of the weights takes effect in the next call."""
    layer = layer_like(False)
    gpu, x = on_gpu(layer), input_like(5)
    changes = [
        lambda m: m.weight.neg_(),
        lambda m: m.weight.copy_(torch.linspace(-1, 1, K).expand(N, K)),
        lambda m: m.load_state_dict({name: -value for name, value in m.state_dict().items()}),
        lambda m: m.train().eval(),
        lambda m: m.double(),
        lambda m: m.float(),
    ]
    for change in changes:
        with torch.no_grad():
            change(layer), change(gpu)
            for _ in range(2):
                want = x.to(layer.weight.dtype)
                assert_same(gpu(want.to(CUDA)), layer(want))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=lambda make: make.__name__)
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_is_noticed(make, fused):
    layer = on_gpu(layer_like(False))
    x = input_like(5).to(CUDA)
    optimizer = make(layer.parameters(), lr=10.0, fused=fused)
    before = layer(x)
    before.sum().backward()
    optimizer.step()
    after = layer(x).detach()
    assert not torch.equal(after, before)
    assert_same(after, copy.deepcopy(layer).cpu()(x.cpu()).detach())


def test_training_learns():
    """Trained on a teacher's outputs, the loss falls, and the packed layer equals the trained one."""
    torch.manual_seed(0)
    x = torch.randn(512, 64, device=CUDA)
    target = QLinear(64, 8, bias=False).to(CUDA)(x).detach()
    model = nn.Sequential(QLinear(64, 8, gradient_cancellation_threshold=None)).to(CUDA)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert_same(pack(model)(x), model.eval()(x))


# ---- autocast --------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, training):
    layer = layer_like(training)
    x = input_like(9)
    words = F.pack_bits(layer.weight)
    want = F.linear(x, words, K, layer.bias.detach(), out_dtype=dtype)
    for model in (on_gpu(layer), pack(on_gpu(layer).eval())):
        with torch.autocast("cuda", dtype=dtype):
            assert_same(model(x.to(CUDA)).detach(), want)
            half = model(x.to(CUDA).to(dtype))
        assert half.dtype is dtype
        with torch.autocast("cuda", dtype=dtype):
            assert model(x.to(CUDA).double()).dtype is torch.float64
    leaf, g = x.to(CUDA).requires_grad_(), torch.randint(-1, 2, (9, N), device=CUDA)
    gpu = on_gpu(layer)
    with torch.autocast("cuda", dtype=dtype):
        y = gpu(leaf)
    gradients = torch.autograd.grad(y, [leaf, gpu.weight, gpu.bias], g.to(dtype))
    _, wanted = output_and_gradients(layer, x, g.cpu().float())
    for gradient, want in zip(gradients, wanted, strict=True):
        assert_same(gradient, want)


# ---- compile and graphs ----------------------------------------------------------------------------


def test_a_compiled_layer_trains():
    layer = on_gpu(layer_like())
    x, g = input_like(9).to(CUDA), torch.randint(-3, 4, (9, N), device=CUDA).float()
    compiled = torch.compile(layer, fullgraph=True)
    y, gradients = output_and_gradients(layer, x, g)
    compiled_y, compiled_gradients = output_and_gradients(compiled, x, g)
    assert_same(compiled_y, y)
    for got, want in zip(compiled_gradients, gradients, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("packed", [False, True], ids=["QLinear", "PackedQLinear"])
def test_reduce_overhead(packed):
    """Inductor captures CUDA graphs of a model with other layers; the weights change between replays."""
    model = nn.Sequential(layer_like(False), nn.Hardtanh(), layer_like(False, k=N)).to(CUDA)
    if packed:
        model = pack(model)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for i in range(5):
            x = input_like(9).to(CUDA)
            assert_same(compiled(x).clone(), model(x), i)
        for layer in (model[0], model[2]):
            layer.weight.neg_()
            layer.bias.add_(1)
            if packed:
                layer.weight.copy_(F.pack_bits(torch.randn(layer.out_features, layer.in_features, device=CUDA)))
        for i in range(3):
            assert_same(compiled(x).clone(), model(x), ("changed", i))


@every_kernel
@both_modes
def test_a_graph_of_a_layer_sees_its_weights(cuda_kernel, training):
    layer = on_gpu(layer_like(training))
    x = input_like(9).to(CUDA)
    with torch.no_grad():
        graph, y = captured(lambda: layer(x))
        for _ in range(3):
            x.normal_()
            layer.weight.normal_()
            layer.bias.normal_()
            graph.replay()
            assert_same(y, layer(x))


@every_kernel
def test_a_graph_of_a_packed_layer_sees_new_words(cuda_kernel):
    packed = PackedQLinear.from_float(on_gpu(layer_like(False)))
    x = input_like(9).to(CUDA)
    graph, y = captured(lambda: packed(x))
    for seed in range(3):
        torch.manual_seed(seed)
        other = layer_like(False)
        x.copy_(input_like(9))
        packed.load_state_dict((other if seed % 2 else PackedQLinear.from_float(other)).state_dict())
        graph.replay()
        assert_same(y, other(x.cpu()).detach())
    with torch.no_grad():
        packed.weight.copy_(F.pack_bits(-other.weight))
    graph.replay()
    assert_same(y, packed(x))


def test_a_graph_of_a_training_step():
    layer = on_gpu(layer_like())
    x, g = input_like(9).to(CUDA).requires_grad_(), torch.ones(9, N, device=CUDA)

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], g)

    graph, results = captured(step)
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            layer.weight.normal_()
            g.copy_(torch.randint(-3, 4, g.shape))
        graph.replay()
        replayed = [result.detach().clone() for result in results]
        for got, want in zip(replayed, step(), strict=True):
            assert_same(got, want.detach())


# ---- streams and devices ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2000, 2048])
def test_words_of_one_stream_used_in_another(k):
    """A layer keeps nothing that was made in one stream and that another would have to wait for."""
    layer = layer_like(False, k=k, n=512)
    gpu, packed = on_gpu(layer), PackedQLinear.from_float(on_gpu(layer))
    x = input_like(9, k=k).to(CUDA)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.no_grad():
        for _ in range(3):
            layer.weight.neg_()
            gpu.weight.copy_(layer.weight)
            packed.weight.copy_(F.pack_bits(layer.weight))
            want = layer(x.cpu())
            torch.cuda.synchronize()
            for each in (gpu, packed):
                with torch.cuda.stream(first):
                    torch.cuda._sleep(50_000_000)
                    each(x)
                with torch.cuda.stream(second):
                    y = each(x)
                second.synchronize()
                assert_same(y, want)
    torch.cuda.synchronize()


@pytest.mark.parametrize("k", [2000, 2048])
def test_words_are_used_however_they_are_written(k):
    packed, x = PackedQLinear.from_float(on_gpu(layer_like(False, k=k))), input_like(9, k=k).to(CUDA)
    for write in (
        lambda words: packed.weight.copy_(words),
        lambda words: packed.weight.data.copy_(words),
        lambda words: setattr(packed, "weight", words.clone()),
        lambda words: setattr(packed.weight, "data", words.clone()),
    ):
        packed(x)
        other = layer_like(False, k=k)
        write(F.pack_bits(other.weight).to(CUDA))
        packed.bias.copy_(other.bias.detach())
        assert_same(packed(x), other(x.cpu()).detach())


def test_no_forward_waits_for_the_device():
    layer = on_gpu(layer_like())
    packed, x, g = pack(on_gpu(layer_like(False))), input_like(9).to(CUDA), torch.ones(9, N, device=CUDA)
    output_and_gradients(layer, x, g), packed(x)
    with no_synchronization():
        output_and_gradients(layer, x, g)
        packed(x)
        layer.eval()
        with torch.no_grad():
            layer(x), layer(x)


@several_devices
def test_another_device_than_the_current_one():
    other = torch.device("cuda", 1)
    layer = layer_like()
    x = input_like(9)
    y, g = layer(x).detach(), torch.randint(-3, 4, (9, N)).float()
    _, wanted = output_and_gradients(layer, x, g)
    with torch.cuda.device(0):
        gpu = copy.deepcopy(layer).to(other)
        result, gradients = output_and_gradients(gpu, x.to(other), g.to(other))
        assert torch.cuda.current_device() == 0
        for got, want in zip((result, *gradients), (y, *wanted), strict=True):
            assert got.device == other
            assert_same(got, want)
        packed = pack(gpu.eval())
        for _ in range(2):
            assert_same(packed(x.to(other)), y)
            assert_same(gpu(x.to(other)).detach(), y)
        gpu.to(CUDA), packed.to(CUDA)
        assert_same(packed(x.to(CUDA)), y)
        assert_same(gpu(x.to(CUDA)).detach(), y)


# ---- moving, saving, copying -----------------------------------------------------------------------


def test_there_and_back():
    layer, x = layer_like(False), input_like(9)
    want = layer(x).detach()
    packed = PackedQLinear.from_float(layer)
    for model in (layer, packed):
        for device in (CUDA, "cpu", CUDA):
            model.to(device)
            assert torch.equal(model(x.to(device)).detach().cpu(), want)
    assert packed.weight.device == CUDA
    assert packed.weight_prepared is None  # CUDA keeps no form, and the CPU's is dropped


@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
def test_state_dicts_go_everywhere(source, target, packed):
    saved = layer_like(False).to(source)
    x = input_like(9)
    want = saved(x.to(source)).detach().cpu()
    file = io.BytesIO()
    torch.save((pack(saved) if packed else saved).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for loaded in (PackedQLinear(K, N, device=target), *([] if packed else [QLinear(K, N, device=target).eval()])):
        loaded.load_state_dict(state)
        assert torch.equal(loaded(x.to(target)).detach().cpu(), want)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("packed", [False, True], ids=["QLinear", "PackedQLinear"])
def test_copies(duplicate, packed):
    model = on_gpu(layer_like(False))
    model = pack(model) if packed else model
    x = input_like(9).to(CUDA)
    want = model(x).detach()
    other = duplicate(model)
    assert_same(other(x).detach(), want)
    with torch.no_grad():
        other.weight.zero_()
    assert_same(model(x).detach(), want)


def test_pack_and_unpack():
    model = nn.Sequential(layer_like(False), nn.Hardtanh(), layer_like(False, k=N, input_quantization="steheaviside"))
    x = input_like(9)
    gpu = on_gpu(model)
    assert all(layer.packable for layer in explain(gpu))
    packed = pack(gpu)
    assert [layer.kind for layer in explain(packed)] == ["PackedQLinear"] * 2
    assert all("path=packed (CUDA)" in repr(layer) for layer in (packed[0], packed[2]))
    assert_same(packed(x.to(CUDA)), model(x).detach())
    assert_same(packed[0].unpack()(x.to(CUDA)).detach(), packed[0](x.to(CUDA)))
    frozen = gpu.requires_grad_(False)
    gradients = [
        torch.autograd.grad(each(leaf).sum(), leaf)[0]
        for each in (packed, frozen)
        for leaf in [x.to(CUDA).requires_grad_()]
    ]
    assert_same(*gradients)


def test_info_names_the_device():
    devices = info().cuda_devices
    assert len(devices) == torch.cuda.device_count()
    assert torch.cuda.get_device_name(CUDA) in devices[0]
    assert all(kernel in devices[0] for kernel in KERNELS)


# ---- memory ----------------------------------------------------------------------------------------


def bytes_kept(layer, x):
    """Return the bytes that forward keeps for backward, without its output; the input counts if it is saved."""
    leaf = x.clone().requires_grad_()
    layer(leaf)  # allocates the libraries' workspaces
    before = torch.cuda.memory_allocated()
    y = layer(leaf)
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    # A saved input counts, because a model would otherwise free it.
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        layer(leaf)
    return kept + (leaf.nbytes if leaf.data_ptr() in saved else 0)


def test_a_training_step_keeps_bits():
    rows, k, n = 8192, 1024, 64
    x = torch.randn(rows, k, device=CUDA, dtype=torch.bfloat16)
    options = {"device": CUDA, "dtype": torch.bfloat16}
    theirs = bytes_kept(nn.Linear(k, n, **options), x)
    ours = bytes_kept(QLinear(k, n, gradient_cancellation_threshold=1.0, **options), x)
    assert theirs >= x.nbytes
    constant = n * k // 8 + 4096  # for the weights' words and the allocator's rounding
    assert ours <= theirs / 7 + constant


@pytest.mark.parametrize("k", [1024, 1000])
def test_a_packed_layer_is_small(k):
    n = 4096
    layer = QLinear(k, n, bias=False).eval().to(CUDA)
    before = torch.cuda.memory_allocated()
    packed = PackedQLinear.from_float(layer)
    growth = torch.cuda.memory_allocated() - before
    words = n * -(-k // 32) * 4
    assert packed.weight.nbytes == words
    assert packed.weight_prepared is None
    assert growth <= words + 4096
