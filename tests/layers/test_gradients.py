"""Gradients follow the formulas in csrc/DESIGN.md, need few saved bits, and work with torch's ways to compute them."""

import copy
import gc
import math
import weakref

import pytest
import torch
from support.reference import signs
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from bitorch_qlinear import QLinear

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIGN_LIKE = ["sign", "approxsign", "swishsign", "steheaviside"]
K, N = 45, 7

both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
paths = pytest.mark.parametrize("weight_quantization", ["sign", "identity"], ids=["packed", "float"])


def layer_like(*, training=True, **options):
    return QLinear(K, N, **{"gradient_cancellation_threshold": 0.9, **options}).train(training)


def integers(*shape, dtype=torch.float32):
    """Return random integers so small that their sums are exact in any order and dtype."""
    return torch.randint(-3, 4, shape).to(dtype)


# ---- the formulas, in float64 ----


def factor(v, name):
    """Return the quantization's derivative for backward at the values v (float64)."""
    if name == "approxsign":
        return torch.where(v.abs() <= 1, 2 - 2 * v.abs(), 0.0)
    if name == "swishsign":
        z = 5 * v
        return 5 * (2 - z * torch.tanh(z / 2)) / (1 + torch.cosh(z))
    if name == "steheaviside":
        return (v.abs() <= 1).double()
    return torch.ones_like(v)


def reference_gradients(x, weight, g, threshold, input_name, weight_name):
    mask = (x.abs() <= threshold).double() if threshold else 1.0  # compared in the dtype of x
    x, weight, g = x.double(), weight.double(), g.double()
    rows = g.reshape(-1, g.shape[-1])
    grad_x = (g @ signs(weight, weight_name == "steheaviside")) * factor(x, input_name) * mask
    grad_weight = rows.T @ signs(x, input_name == "steheaviside").reshape(-1, x.shape[-1]) * factor(weight, weight_name)
    return grad_x, grad_weight, rows.sum(0)


def gradients_of(layer, x, g):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(layer(leaf), [leaf, layer.weight, layer.bias], g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("weight_name", SIGN_LIKE)
@pytest.mark.parametrize("input_name", SIGN_LIKE)
def test_formulas(input_name, weight_name, threshold, dtype):
    layer = layer_like(
        dtype=dtype,
        input_quantization=input_name,
        weight_quantization=weight_name,
        gradient_cancellation_threshold=threshold,
    )
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, K, dtype=dtype)
    x[0, 0, :4] = torch.tensor([0.9, -0.9, 1.0, -1.0])
    g = integers(2, 3, N, dtype=dtype)
    want = reference_gradients(x, layer.weight.detach(), g, threshold, input_name, weight_name)
    plain = {"sign", "steheaviside"}
    for ours, wanted, name in zip(gradients_of(layer, x, g), want, (input_name, weight_name, "sign"), strict=True):
        assert ours.dtype is dtype
        if name in plain:  # these are sums of integers, which are exact in every dtype
            assert torch.equal(ours.double(), wanted)
        else:
            precision = 16 * torch.finfo(dtype).eps
            torch.testing.assert_close(ours.double(), wanted, rtol=precision, atol=30 * precision)


def test_masked_gradients_are_zero_even_if_the_incoming_one_is_infinite():
    layer = QLinear(3, 1, gradient_cancellation_threshold=1.0)
    x = torch.tensor([[0.5, 2.0, math.nan]], requires_grad=True)
    layer(x).backward(torch.tensor([[math.inf]]))
    assert x.grad.abs().tolist() == [[math.inf, 0.0, 0.0]]


def test_a_weight_of_many_blocks():
    layer = QLinear(1500, 1031, gradient_cancellation_threshold=0.9)
    x, g = torch.randn(3, 1500), integers(3, 1031)
    want = reference_gradients(x, layer.weight.detach(), g, 0.9, "sign", "sign")
    for ours, wanted in zip(gradients_of(layer, x, g), want, strict=True):
        assert torch.equal(ours.double(), wanted)


@both_modes
def test_gradient_in_a_network(training):
    """The layers are chained, the gradient is not contiguous, and two backwards accumulate."""
    first, second = layer_like(training=training), QLinear(N, N).train(training)
    x = torch.randn(4, K, requires_grad=True)
    g = integers(N, 4)
    for _ in range(2):
        hidden = first(x)
        hidden.retain_grad()
        second(hidden).t().backward(g)
    want_hidden = reference_gradients(hidden.detach(), second.weight.detach(), g.t(), None, "sign", "sign")
    torch.testing.assert_close(hidden.grad.double(), want_hidden[0])
    want = reference_gradients(x.detach(), first.weight.detach(), hidden.grad, 0.9, "sign", "sign")
    for ours, wanted in zip((x.grad, first.weight.grad, first.bias.grad), want, strict=True):
        torch.testing.assert_close(ours.double(), 2 * wanted)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_a_missing_gradient():
    layer = layer_like()
    NoGradient.apply(layer(torch.randn(3, K))).sum().backward()
    assert layer.weight.grad is None


def test_expanded_gradient_of_sum():
    layer = layer_like()
    x = torch.randn(3, K, requires_grad=True)
    layer(x).sum().backward()
    want = reference_gradients(x.detach(), layer.weight.detach(), torch.ones(3, N), 0.9, "sign", "sign")
    assert torch.equal(x.grad.double(), want[0])


# ---- saved tensors ----


def saved_by(layer, x):
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    return y, saved


@both_modes
@pytest.mark.parametrize(
    ("name", "threshold", "per_row"),
    [("sign", None, 1), ("sign", 0.5, 2), ("steheaviside", None, 2), ("steheaviside", 0.5, 2)],
)
def test_bits_are_saved_not_floats(name, threshold, per_row, training):
    rows, words = 64, 2  # 45 values take two words
    layer = layer_like(input_quantization=name, gradient_cancellation_threshold=threshold, training=training)
    y, saved = saved_by(layer, torch.randn(rows, K, requires_grad=True))
    assert all(tensor.dtype is torch.int32 for tensor in saved)
    assert sorted(tensor.numel() for tensor in saved) == sorted([N * words] + [rows * words] * per_row)
    assert [tensor.dtype for tensor in y.grad_fn.saved_tensors if tensor is not None] == [torch.int32] * len(saved)


@pytest.mark.parametrize("name", ["approxsign", "swishsign"])
def test_derivatives_of_x_save_x(name):
    x = torch.randn(64, K, requires_grad=True)
    _, saved = saved_by(layer_like(input_quantization=name), x)
    floats = [tensor for tensor in saved if tensor.is_floating_point()]
    assert len(floats) == 1
    assert floats[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize(("name", "saves"), [("sign", 0), ("steheaviside", 1), ("approxsign", 1), ("swishsign", 1)])
def test_weight_is_saved_only_if_its_gradient_needs_it(name, saves):
    layer = layer_like(weight_quantization=name)
    _, saved = saved_by(layer, torch.randn(64, K))
    assert sum(tensor.data_ptr() == layer.weight.data_ptr() for tensor in saved) == saves


def test_the_input_is_free_after_forward():
    layer = layer_like()
    x = torch.randn(3, K)
    dead = weakref.ref(x)
    y = layer(x)
    del x
    gc.collect()
    assert dead() is None
    y.sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_backward_uses_the_weights_of_forward():
    """Forward saves packed signs, which are a copy, so a change of the weight before backward makes no difference."""
    layer = layer_like().eval()
    x = torch.randn(3, K, requires_grad=True)
    want = reference_gradients(x.detach(), layer.weight.detach().clone(), torch.ones(3, N), 0.9, "sign", "sign")
    y = layer(x)
    with torch.no_grad():
        layer.weight.neg_()
    y.sum().backward()
    assert torch.equal(x.grad.double(), want[0])


# ---- tensors that require a gradient ----


@both_modes
@pytest.mark.parametrize("subset", range(8))
def test_every_subset_of_frozen_parameters(subset, training):
    layer = layer_like(training=training)
    x = torch.randn(3, K)
    g = integers(3, N)
    want = gradients_of(layer, x, g)
    leaves = [x, layer.weight, layer.bias]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(subset >> i & 1))
    y = layer(x)
    assert y.requires_grad == (subset > 0)
    if subset:
        y.backward(g)
    for i, leaf in enumerate(leaves):
        if subset >> i & 1:
            assert torch.equal(leaf.grad, want[i])
        else:
            assert leaf.grad is None


@both_modes
@paths
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(context, weight_quantization, training):
    layer = layer_like(weight_quantization=weight_quantization, training=training)
    x = torch.randn(3, K, requires_grad=True)
    want = layer(x)
    with context():
        y = layer(x)
        assert torch.equal(y, want)
        assert not y.requires_grad
        assert y.is_inference() == (context is torch.inference_mode)
    # A call outside of the context must still support backward.
    y = layer(x)
    assert torch.equal(y, want)
    y.sum().backward()
    assert x.grad is not None


@both_modes
def test_non_leaf_weights(training):
    layer = layer_like(training=training)
    x, g = torch.randn(3, K), integers(3, N)
    want = gradients_of(layer, x, g)[1]
    source = layer.weight.detach().clone().requires_grad_()
    y = functional_call(layer, {"weight": source * 2}, (x,))
    y.backward(g)
    assert torch.equal(source.grad, 2 * want)
    assert layer.weight.grad is None


# ---- unsupported derivatives ----


@both_modes
@pytest.mark.parametrize("input_quantization", SIGN_LIKE)
def test_double_backward(input_quantization, training):
    layer = layer_like(input_quantization=input_quantization, training=training)
    x = torch.randn(3, K, requires_grad=True)
    for target in (x, layer.weight, layer.bias):
        (first,) = torch.autograd.grad(layer(x).square().sum(), target, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable only once"):
            first.sum().backward()


def test_create_graph_without_a_second_derivative_works():
    layer = layer_like()
    x = torch.randn(3, K, requires_grad=True)
    g = integers(3, N)
    want = gradients_of(layer, x.detach(), g)
    assert all(map(torch.equal, torch.autograd.grad(layer(x), [x, *layer.parameters()], g, create_graph=True), want))


@both_modes
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_forward_mode(grad_enabled, training):
    layer = layer_like(training=training)
    x, weight = torch.randn(3, K), layer.weight.detach().clone()
    with torch.set_grad_enabled(grad_enabled):
        with pytest.raises(NotImplementedError, match="jvp"):
            jvp(layer, (x,), (x,))
        with pytest.raises(NotImplementedError, match="jvp"):
            jvp(lambda w: functional_call(layer, {"weight": w}, (x,)), (weight,), (weight,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            layer(forward_ad.make_dual(x, x))


# ---- torch.func ----


@both_modes
@paths
def test_func_grad(weight_quantization, training):
    layer = layer_like(weight_quantization=weight_quantization, training=training)
    x, g = torch.randn(3, K), integers(3, N)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(x, parameters):
        return (functional_call(layer, parameters, (x,)) * g).sum()

    want = gradients_of(layer, x, g)
    grad_x, grad_parameters = grad(loss, argnums=(0, 1))(x, parameters)
    for ours, wanted in zip((grad_x, *grad_parameters.values()), want, strict=True):
        torch.testing.assert_close(ours, wanted)
    y, pull = vjp(layer, x)
    assert torch.equal(y, layer(x))
    torch.testing.assert_close(pull(g)[0], want[0])


@both_modes
@paths
@pytest.mark.parametrize(("in_dim", "threshold"), [(0, 0.9), (1, None), (-1, 0.9)])
def test_vmap_of_x(in_dim, threshold, weight_quantization, training):
    options = {"weight_quantization": weight_quantization, "gradient_cancellation_threshold": threshold}
    layer = layer_like(training=training, **options)
    x = torch.randn(5, 2, K)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            y = vmap(layer, in_dims=in_dim)(x.movedim(0, in_dim))
            torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(vmap(vmap(layer))(x), layer(x))
    x.requires_grad_()
    vmap(layer, in_dims=in_dim)(x.movedim(0, in_dim)).sum().backward()
    torch.testing.assert_close(x.grad, gradients_of(layer, x.detach(), torch.ones(5, 2, N))[0])


@both_modes
@paths
@pytest.mark.parametrize("batched", [("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("x_dim", [0, None])
def test_vmap_of_parameters(x_dim, batched, weight_quantization, training):
    layers = [layer_like(weight_quantization=weight_quantization, training=training) for _ in range(4)]
    parameters = {
        name: torch.stack([getattr(layer, name).detach() for layer in layers])
        if name in batched
        else getattr(layers[0], name).detach()
        for name in ("weight", "bias")
    }
    in_dims = {name: 0 if name in batched else None for name in parameters}
    x = torch.randn(4, 3, K) if x_dim == 0 else torch.randn(3, K)
    y = vmap(lambda p, x: functional_call(layers[0], p, (x,)), in_dims=(in_dims, x_dim))(parameters, x)
    assert y.shape == (4, 3, N)
    for i in range(4):
        one = {name: value if in_dims[name] is None else value[i] for name, value in parameters.items()}
        want = functional_call(layers[0], one, (x if x_dim is None else x[i],))
        torch.testing.assert_close(y[i], want, **({} if weight_quantization == "identity" else {"rtol": 0, "atol": 0}))


@both_modes
@paths
@pytest.mark.parametrize("input_quantization", ["sign", "steheaviside", "swishsign"])
def test_gradients_per_sample(input_quantization, weight_quantization, training):
    layer = layer_like(
        weight_quantization=weight_quantization, input_quantization=input_quantization, training=training
    )
    x, g = torch.randn(4, K), integers(4, N)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(parameters, x, g):
        return (functional_call(layer, parameters, (x,)) * g).sum()

    grad_parameters, grad_x = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0, 0))(parameters, x, g)
    for i in range(4):
        want = gradients_of(layer, x[i], g[i])
        for ours, wanted in zip(
            (grad_x[i], grad_parameters["weight"][i], grad_parameters["bias"][i]), want, strict=True
        ):
            torch.testing.assert_close(ours, wanted)


def test_gradients_of_an_ensemble():
    layers = [layer_like() for _ in range(3)]
    weights = torch.stack([layer.weight.detach() for layer in layers])
    x, g = torch.randn(2, K), integers(2, N)
    per_weight = vmap(grad(lambda w: (functional_call(layers[0], {"weight": w}, (x,)) * g).sum()))(weights)
    for layer, ours in zip(layers, per_weight, strict=True):
        assert torch.equal(ours, gradients_of(layer, x, g)[1])


# ---- checkpoint and autocast ----


@both_modes
@paths
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant, weight_quantization, training):
    model = nn.Sequential(
        layer_like(training=training, weight_quantization=weight_quantization), nn.Tanh(), QLinear(N, 3)
    )
    other = copy.deepcopy(model)
    x = torch.randn(4, K)
    results = []
    for network, forward in ((model, model), (other, lambda x: checkpoint(other, x, use_reentrant=use_reentrant))):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, *[p.grad for p in network.parameters()]))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


@both_modes
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_autocast(dtype, amp, training):
    layer = layer_like(training=training, dtype=dtype)
    # A cast to amp would round these values to 0 and across the threshold.
    tiny, near = torch.tensor(-1e-44), torch.tensor(0.9).nextafter(torch.tensor(1.0))
    x = torch.randn(3, K).to(dtype)
    x[0, 0], x[0, 1] = tiny.to(dtype), near.to(dtype)
    linear = nn.Linear(K, N, dtype=dtype)
    g = integers(3, N)
    with torch.autocast("cpu", dtype=amp):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        with torch.no_grad():
            inferred = layer(x)
        assert y.dtype is inferred.dtype is linear(x).dtype
        assert torch.equal(y, inferred)
    wide = torch.float64 if y.dtype is torch.float64 else torch.float32
    product = signs(x) @ signs(layer.weight.detach()).T
    assert torch.equal(y, (product.to(wide) + layer.bias.to(wide)).to(y.dtype))
    gradients = torch.autograd.grad(y, [leaf, layer.weight, layer.bias], g.to(y.dtype))
    assert all(gradient.dtype is dtype for gradient in gradients)
    want = reference_gradients(x, layer.weight.detach(), g, 0.9, "sign", "sign")
    for ours, wanted in zip(gradients, want, strict=True):
        assert torch.equal(ours.double(), wanted)


def test_autocast_that_is_off_or_of_another_device():
    layer = layer_like()
    x = torch.randn(3, K)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert layer(x).dtype is torch.float32
    torch.set_autocast_enabled("cuda", True)
    try:
        assert layer(x).dtype is torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("transform", [grad, jacrev], ids=["grad", "jacrev"])
@pytest.mark.parametrize("outer_of", ["x", "weight"])
def test_second_derivatives_of_torch_func_are_an_error(transform, outer_of):
    layer = layer_like()
    x, weight = torch.randn(3, K), layer.weight.detach().clone()

    def loss(x, weight):
        return functional_call(layer, {"weight": weight}, (x,)).pow(2).sum()

    first, second = (0, 1) if outer_of == "weight" else (0, 0)
    with pytest.raises(RuntimeError, match="differentiable only once"):
        transform(lambda *both: transform(loss, first)(*both).sum(), second)(x, weight)


def test_every_way_to_a_second_derivative_is_an_error():
    layer = layer_like()
    x = torch.randn(3, K, requires_grad=True)

    def gradient(y):
        return torch.autograd.grad(y, x, create_graph=True)[0]

    for ask in (
        lambda: torch.autograd.functional.hessian(lambda z: layer(z).pow(2).sum(), x),
        lambda: torch.autograd.grad(gradient(layer(x).pow(2).sum()).pow(2).sum(), x),
        lambda: torch.autograd.grad(gradient(layer(x).sum()).sum(), layer.weight),
    ):
        with pytest.raises(RuntimeError, match="differentiable only once"):
            ask()


def test_create_graph_through_a_checkpoint():
    layer = layer_like(input_quantization="approxsign")
    x, g = torch.randn(3, K, requires_grad=True), integers(3, N)
    want = torch.autograd.grad(layer(x), [x, *layer.parameters()], g)
    y = checkpoint(layer, x, use_reentrant=False)
    got = torch.autograd.grad(y, [x, *layer.parameters()], g, create_graph=True)
    assert all(map(torch.equal, got, want))
