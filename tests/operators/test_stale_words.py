"""However a layer's weights are written, its next call uses them: eager, compiled or exported, and with any kernel.

A PackedQLinear keeps its words and the prepared form that a kernel reads. In every call, the operator checks whether
the form belongs to the words (csrc/cpu/fingerprint.h). It compares all words if they are few, if torch counted a write
to them, or if they are in another tensor; otherwise a share of them that grows with the rows of x. Therefore only one
kind of change can go unnoticed: one that torch does not count (through ``.data``, NumPy, DLPack or a collective), to
fewer than 513 consecutive cache lines of very many words, before a call with fewer than 512 rows.

A QLinear keeps no packed weights, so nothing can be out of date.
"""

from __future__ import annotations

import copy
import datetime
import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.reference import assert_equal, epilogue, product, signs, unpack_signs
from torch import nn
from torch.func import functional_call

from bitorch_qlinear import PackedQLinear, QLinear, kernels, pack

# These are k and n. A layer keeps no form of the first one's 27 words, a call compares all of the second one's 1600
# words, and a share of the third one's 6048.
TINY, FEW, MANY = (70, 9), (1000, 50), (2000, 96)
sizes = pytest.mark.parametrize("size", [TINY, FEW, MANY], ids=["tiny", "few", "many"])


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def packed_layer(size, **options):
    k, n = size
    return pack(QLinear(k, n, **options))


def expected(words, bias, x):
    """Return the layer's output, computed from the words without any kernel."""
    k = x.shape[-1]
    return epilogue(product(signs(x), unpack_signs(words, k)), bias, None, x.dtype)


def assert_right(call, words, bias, x):
    with torch.no_grad():
        assert_equal(call(x), expected(words, bias, x))


# ---- ways of writing all words; each returns the layer that has them ----


def assign(layer, words):
    layer.weight = words.clone()


def register_again(layer, words):
    layer.register_buffer("weight", words.clone())


def copy_(layer, words):
    layer.weight.copy_(words)


def xor_(layer, words):
    layer.weight.bitwise_xor_(layer.weight ^ words)


def index(layer, words):
    layer.weight[:] = words


def row_by_row(layer, words):
    for i, row in enumerate(words):
        layer.weight[i].copy_(row)


def set_(layer, words):
    layer.weight.set_(words.clone())


def assign_data(layer, words):
    layer.weight.data = words.clone()


def copy_to_data(layer, words):
    layer.weight.data.copy_(words)


def through_numpy(layer, words):
    layer.weight.numpy()[...] = words.numpy()


def through_dlpack(layer, words):
    torch.from_dlpack(layer.weight.__dlpack__()).copy_(words)


def through_detach(layer, words):
    layer.weight.detach().copy_(words)


def through_a_view(layer, words):
    layer.weight.view(torch.uint8).copy_(words.view(torch.uint8))


def through_the_state_dict(layer, words):
    layer.state_dict()["weight"].copy_(words)


def through_shared_memory(layer, words):
    layer.share_memory()
    layer.weight.data.copy_(words)


def through_the_storage(layer, words):
    layer.weight.untyped_storage().copy_(words.clone().untyped_storage())


def swap(layer, words):
    torch.utils.swap_tensors(layer.weight, words.clone())


def under_inference_mode(layer, words):
    with torch.inference_mode():
        layer.weight.copy_(words)


IN_PLACE = [assign, copy_, xor_, index, row_by_row, set_, assign_data, copy_to_data, through_numpy, through_dlpack]
IN_PLACE += [through_detach, through_a_view, through_the_storage]
WAYS = [*IN_PLACE, register_again, through_the_state_dict, through_shared_memory, swap, under_inference_mode]


def loaded(assign):
    def load(layer, words):
        layer.load_state_dict({**layer.state_dict(), "weight": words.clone()}, assign=assign)

    load.__name__ = "loaded_and_assigned" if assign else "loaded"
    return load


def loaded_while_swapping(layer, words):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.load_state_dict({**layer.state_dict(), "weight": words.clone()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def emptied_and_loaded(layer, words):
    state = {**layer.state_dict(), "weight": words.clone()}
    layer.to_empty(device="cpu").load_state_dict(state)


WAYS += [loaded(True), loaded(False), loaded_while_swapping, emptied_and_loaded]
each_way = pytest.mark.parametrize("write", WAYS, ids=lambda write: write.__name__)


def change(layer, write, size):
    """Write another layer's words into this one and return them."""
    words = packed_layer(size).weight
    with torch.no_grad():
        write(layer, words)
    return words


# ---- a packed layer ----


@sizes
@each_way
def test_eager(kernel, write, size):
    layer, few, many = packed_layer(size), torch.randn(1, size[0]), torch.randn(130, size[0])
    assert_right(layer, layer.weight, layer.bias, few)
    for x in (few, many, few):
        words = change(layer, write, size)
        for _ in range(2):  # the first call makes a new form, the second may use it
            assert_right(layer, words, layer.bias, x)


@pytest.mark.parametrize("called_before", [True, False], ids=["called", "compiled-only"])
@sizes
@each_way
def test_compiled(write, size, called_before):
    layer, x = packed_layer(size), torch.randn(3, size[0])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    if called_before:
        assert_right(compiled, layer.weight, layer.bias, x)
    for _ in range(2):
        words = change(layer, write, size)
        assert_right(compiled, words, layer.bias, x)


def test_compiled_for_each_kernel(kernel):
    layer, x = packed_layer(MANY), torch.randn(3, MANY[0])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for write in (assign, copy_, copy_to_data):
        words = change(layer, write, MANY)
        assert_right(compiled, words, layer.bias, x)


@sizes
@pytest.mark.parametrize("write", IN_PLACE, ids=lambda write: write.__name__)
def test_exported(kernel, write, size):
    layer, x = packed_layer(size), torch.randn(3, size[0])
    program = torch.export.export(layer, (x,)).module()
    assert_right(program, layer.weight, layer.bias, x)
    words = change(program, write, size)
    assert_right(program, words, layer.bias, x)
    words = change(layer, write, size)
    assert_right(torch.export.export(layer, (x,)).module(), words, layer.bias, x)


@sizes
@each_way
def test_with_gradients(write, size):
    layer, x = packed_layer(size), torch.randn(3, size[0], requires_grad=True)
    layer(x).sum().backward()
    words = change(layer, write, size)
    x.grad = None
    y = layer(x)
    y.sum().backward()
    assert_equal(y.detach(), expected(words, layer.bias, x.detach()))
    torch.testing.assert_close(x.grad, unpack_signs(words, size[0]).float().sum(0).expand(3, -1), rtol=0, atol=1e-3)


@sizes
@each_way
def test_with_real_input(write, size):
    layer, x = packed_layer(size, input_quantization="identity"), torch.randn(3, size[0])
    words = change(layer, write, size)
    with torch.no_grad():
        want = (x.double() @ unpack_signs(words, size[0]).T + layer.bias).float()
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-3)


@sizes
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_have_words_of_their_own(duplicate, size):
    layer, x = packed_layer(size), torch.randn(3, size[0])
    other = duplicate(layer)
    before = layer.weight.clone()
    words = change(other, copy_to_data, size)
    assert_right(layer, before, layer.bias, x)
    assert_right(other, words, layer.bias, x)
    third = change(layer, copy_to_data, size)
    assert_right(layer, third, layer.bias, x)
    assert_right(other, words, layer.bias, x)


@sizes
def test_words_that_other_layers_share(size):
    first, second = packed_layer(size), packed_layer(size)
    second.weight = first.weight
    x = torch.randn(3, size[0])
    for write in (copy_, copy_to_data, through_numpy):
        words = change(first, write, size)
        assert_right(first, words, first.bias, x)
        assert_right(second, words, second.bias, x)


FIRST = {
    "call": lambda layer: layer,
    "move": lambda layer: layer.to("cpu"),
    "compile": lambda layer: torch.compile(layer, backend="aot_eager"),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("bias", [True, False])
@sizes
def test_built_on_meta_and_assigned(size, bias, first):
    """Loaders that do not know the layer set each tensor as an attribute and then move the model."""
    k, n = size
    source, x = packed_layer(size, bias=bias), torch.randn(3, k)
    with torch.device("meta"):
        layer = PackedQLinear(k, n, bias)
    names = {name for name, _ in layer.named_parameters()}
    for name, value in source.state_dict().items():
        setattr(layer, name, nn.Parameter(value.clone(), requires_grad=False) if name in names else value.clone())
    assert_right(first(layer), source.weight, source.bias, x)
    assert_right(layer.to("cpu"), source.weight, source.bias, x)
    assert not any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


@sizes
def test_functional_call(size):
    layer, other, x = packed_layer(size), packed_layer(size), torch.randn(3, size[0])
    own = layer.weight.clone()
    for _ in range(2):
        with torch.no_grad():
            assert_equal(functional_call(layer, dict(other.state_dict()), (x,)), expected(other.weight, other.bias, x))
        assert_right(layer, own, layer.bias, x)


@sizes
def test_a_kernel_that_is_forced_after_the_words_changed(size):
    layer, x = packed_layer(size), torch.randn(3, size[0])
    for name in [*kernels.available(), *reversed(kernels.available())]:
        words = change(layer, copy_to_data, size)
        with kernels.forced(name):
            assert_right(layer, words, layer.bias, x)
        assert_right(layer, words, layer.bias, x)


def one_word_changed(layer, at):
    words = layer.weight.clone()
    words.view(-1)[at] ^= 1 << 5
    return words


@pytest.mark.parametrize("rows", [1, 16, 512])
def test_one_word_that_torch_saw_written(kernel, rows):
    layer, x = packed_layer(MANY), torch.randn(rows, MANY[0])
    for at in (0, 15, 16, 17, 2063, 2064, 4000, layer.weight.numel() - 1):
        assert_right(layer, layer.weight, layer.bias, x)
        words = one_word_changed(layer, at)
        layer.weight.view(-1)[at] = words.view(-1)[at]
        assert_right(layer, words, layer.bias, x)


@pytest.mark.parametrize("size", [TINY, FEW, (1024, 64)], ids=str)  # 2048 words are few
@pytest.mark.parametrize("rows", [1, 16])
def test_one_of_few_words_that_torch_did_not_see_written(kernel, rows, size):
    layer, x = packed_layer(size), torch.randn(rows, size[0])
    for at in (0, layer.weight.numel() // 2, layer.weight.numel() - 3):
        assert_right(layer, layer.weight, layer.bias, x)
        words = one_word_changed(layer, at)
        layer.weight.data.view(-1)[at] = words.view(-1)[at]
        assert_right(layer, words, layer.bias, x)


def test_one_of_many_words_that_torch_did_not_see_written(kernel):
    layer, x = packed_layer(MANY), torch.randn(512, MANY[0])
    for at in (0, 17, 2063, 4000, layer.weight.numel() - 1):
        assert_right(layer, layer.weight, layer.bias, x)
        words = one_word_changed(layer, at)
        layer.weight.data.view(-1)[at] = words.view(-1)[at]
        assert_right(layer, words, layer.bias, x)


def test_many_consecutive_words_that_torch_did_not_see_written(kernel):
    """A change to enough consecutive words, such as a shard of a fused weight, is noticed even by a call of one row."""
    layer, x = packed_layer(MANY), torch.randn(1, MANY[0])
    run = 65 * 16
    for begin in (0, 16, 1000, layer.weight.numel() - run):
        assert_right(layer, layer.weight, layer.bias, x)
        words = layer.weight.clone()
        words.view(-1)[begin : begin + run] ^= 1
        layer.weight.data.view(-1)[begin : begin + run] ^= 1
        assert_right(layer, words, layer.bias, x)


def test_an_unnoticed_change_gives_the_old_or_the_new_product(kernel):
    """If torch does not count a write to one of many words, a call of few rows may use the old or the new words."""
    layer, x = packed_layer(MANY), torch.randn(1, MANY[0])
    assert_right(layer, layer.weight, layer.bias, x)
    before, words = layer.weight.clone(), one_word_changed(layer, 4000)
    layer.weight.data.view(-1)[4000] = words.view(-1)[4000]
    with torch.no_grad():
        y = layer(x)
    assert any(torch.equal(y, expected(each, layer.bias, x)) for each in (before, words))
    layer.prepare()
    assert_right(layer, words, layer.bias, x)


def test_rows_of_words_that_change_places():
    """The differences have opposite signs and equal distances, which a hash with evenly spaced keys does not notice."""
    layer = packed_layer((512, 512))
    with torch.no_grad():
        layer.weight[4], layer.weight[2] = layer.weight[2].clone(), layer.weight[2]
        layer.weight[6], layer.weight[4] = layer.weight[0].clone(), layer.weight[2].clone()
        x = torch.randn(512, 512)
        layer(x)
        order = torch.arange(512)
        order[[0, 2, 4, 6]] = torch.tensor([2, 0, 6, 4])
        layer.weight.copy_(layer.weight[order])
        want = packed_layer((512, 512))
        want.weight, want.bias.data = layer.weight.clone(), layer.bias.data
        assert_equal(layer(x), want(x))


# ---- a QLinear ----


def weights_from_a_vector(layer, weight):
    flat = torch.cat([weight.flatten(), layer.bias.detach()])
    nn.utils.vector_to_parameters(flat, layer.parameters())


def target_network_update(layer, weight):
    for mine, theirs in zip(layer.parameters(), (weight, layer.bias.detach().clone()), strict=True):
        mine.data.mul_(0.0).add_(theirs.data)


def optimizer_step(layer, weight):
    layer.weight.grad = layer.weight.detach() - weight
    torch.optim.SGD([layer.weight], lr=1.0).step()


def new_parameter(layer, weight):
    layer.weight = nn.Parameter(weight.clone())


FLOAT_WAYS = [copy_, index, set_, assign_data, copy_to_data, through_detach, through_the_state_dict, swap]
FLOAT_WAYS += [weights_from_a_vector, target_network_update, optimizer_step, new_parameter]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@sizes
@pytest.mark.parametrize("write", FLOAT_WAYS, ids=lambda write: write.__name__)
def test_a_qlinear_sees_every_write(write, size, training):
    k, n = size
    layer, x = QLinear(k, n).train(training), torch.randn(3, k)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        weight = torch.randn(n, k)
        with torch.no_grad():
            if write is swap:
                weight = nn.Parameter(weight)
                torch.utils.swap_tensors(layer.weight, nn.Parameter(weight.detach().clone()))
            else:
                write(layer, weight)
            want = epilogue(product(signs(x), signs(weight.detach())), layer.bias.detach(), None, x.dtype)
            assert_equal(layer(x), want)
            assert_equal(compiled(x), want)
        assert_equal(layer(x).detach(), want)


# ---- several processes ----


def start(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/processes",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),  # so that the test fails instead of waiting
    )
    torch.manual_seed(rank)


def finish():
    dist.barrier()
    dist.destroy_process_group()


def broadcast_words(rank, folder):
    start(rank, folder)
    for size in (FEW, MANY):
        layer, x = packed_layer(size), torch.randn(4, size[0])
        compiled = torch.compile(layer, backend="aot_eager")
        for _ in range(2):
            if rank == 0:
                layer.load_state_dict(packed_layer(size).state_dict())
            assert_right(compiled, layer.weight, layer.bias, x)
            for value in layer.state_dict().values():
                dist.broadcast(value, 0)
            words = [torch.empty_like(layer.weight) for _ in range(2)]
            dist.all_gather(words, layer.weight)
            assert torch.equal(*words)
            assert_right(compiled, words[0], layer.bias, x)
            assert_right(layer, words[0], layer.bias, x)
    finish()


def train_a_head(rank, folder, names):
    """DDP broadcasts the buffers of rank 0, and each process prepares the words for its own kernel."""
    start(rank, folder)
    with kernels.forced(names[rank]):
        layer = packed_layer(FEW)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = nn.Sequential(layer), nn.Linear(FEW[1], 2)

            def forward(self, x):
                hidden = self.body(x)
                return self.head(hidden), hidden

        model, x = nn.parallel.DistributedDataParallel(Model()), torch.randn(4, FEW[0])
        for _ in range(2):
            y, hidden = model(x)
            y.sum().backward()
            assert_equal(hidden.detach(), expected(layer.weight, layer.bias, x))
        del model  # its reducer belongs to the process group, which ends next
    finish()


def in_two_processes(function, folder, *args):
    """Run the function in two processes. The test fails if one of them does, or if they do not end in time."""
    context = mp.spawn(function, (os.fspath(folder), *args), nprocs=2, join=False)
    end = time.monotonic() + 180
    while not context.join(5):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail("a process did not end")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_broadcast(tmp_path):
    in_two_processes(broadcast_words, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
@pytest.mark.parametrize("second", [kernels.available()[0], kernels.available()[-1]])
def test_data_parallel_over_a_packed_body(tmp_path, second):
    in_two_processes(train_a_head, tmp_path, (kernels.available()[0], second))
