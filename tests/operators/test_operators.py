"""The operators on any valid input, and with torch's tools: vmap, opcheck, fake tensors, compile, export, flops."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.operators import OPERATORS, arguments, call_arguments, operator, problems, samples, strided, with_bits
from support.reference import (
    FLOATS,
    assert_equal,
    epilogue,
    in_range,
    pack,
    pack_signs,
    product,
    signs,
    unpack_signs,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import bitorch_qlinear
from bitorch_qlinear import functional as F


@given(problem=problems())
@settings(max_examples=250)
def test_linear_operators(kernel, problem):
    threshold, x, k, strict = (problem.pop(name) for name in ("threshold", "x", "k", "strict"))
    words = problem.pop("weight_words")
    problem["weight_prepared"] = F.prepare_weight(words, k) if problem["weight_prepared"] else None
    out = problem["out_dtype"] or x.dtype
    before = x.clone()
    integers = product(signs(x, strict), unpack_signs(words.view(torch.int32), k))
    expected = epilogue(integers, problem["bias"], problem["scale"], out)

    y, x_words, range_words = F.linear_train(x, words, k, **problem, strict=strict, threshold=threshold)
    assert_equal(F.linear(x, words, k, **problem, strict=strict), expected, "linear")
    assert_equal(y, expected, "linear_train")
    weight = torch.where(unpack_signs(words.view(torch.int32), k) > 0, 1.0, -0.0 if strict else -1.0)
    options = {name: problem[name] for name in ("bias", "scale", "out_dtype")}
    assert_equal(F.sign_linear(x, weight, **options, strict=strict, strict_weight=strict), expected, "sign_linear")
    assert_equal(x_words, pack_signs(x, strict), "x_words")
    assert_equal(F.pack_bits(x, strict), x_words, "pack_bits")
    none = torch.empty(0, dtype=torch.int32)
    assert_equal(range_words, none if threshold is None else pack(in_range(x, threshold)), "in_range_words")
    problem["out_dtype"] = out
    assert_equal(F.binary_linear(x_words, words, k, **problem), expected, "binary_linear")
    assert_equal(x, before, "the argument x")


@pytest.mark.parametrize("leading", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (1, 1, 1, 2)], ids=str)
@pytest.mark.parametrize(("n", "k"), [*itertools.product([0, 1, 65], repeat=2)])
def test_sizes_of_zero(kernel, leading, n, k):
    x, w = torch.randn(*leading, k), torch.randn(n, k)
    words, bias = F.pack_bits(w), torch.randn(n)
    assert_equal(words, pack_signs(w))
    assert_equal(F.unpack_bits(F.pack_bits(x), k), signs(x).float())
    expected = epilogue(product(signs(x), signs(w)), bias, None, torch.float32)
    for prepared in (None, F.prepare_weight(words, k)):
        assert_equal(F.linear(x, words, k, bias, weight_prepared=prepared), expected)
        assert_equal(F.binary_linear(pack_signs(x), words, k, bias, weight_prepared=prepared), expected)
        y, x_words, range_words = F.linear_train(x, words, k, bias, weight_prepared=prepared, threshold=1.0)
        assert_equal(y, expected)
        assert_equal(x_words, pack_signs(x))
        assert_equal(range_words, pack(in_range(x, 1.0)))


@pytest.mark.parametrize("leading", [(), (4,), (0,)], ids=str)
def test_vmap(leading):
    x = torch.randn(3, *leading, 2, 40)
    words = F.pack_bits(x)
    for dim in (0, len(leading) + 1):
        packed = torch.func.vmap(F.pack_bits, in_dims=dim)(x)
        assert_equal(packed, words.movedim(dim, 0))
        assert_equal(
            torch.func.vmap(lambda v: F.pack_bits(v, True), in_dims=dim)(-x), F.pack_bits(-x, True).movedim(dim, 0)
        )
        assert_equal(
            torch.func.vmap(lambda v: F.unpack_bits(v, 40), in_dims=dim)(words), signs(x).float().movedim(dim, 0)
        )
    weights = words.reshape(-1, 2, 2)
    prepared = torch.func.vmap(lambda v: F.prepare_weight(v, 40))(weights)
    expected = [F.prepare_weight(v, 40) for v in weights]
    assert len(prepared) == len(weights) and all(map(torch.equal, prepared, expected))


ONE_MODULE_ALONE = """
import importlib, sys, types
import torch
package, first = sys.argv[1:]
if first != "bitorch_qlinear":
    stub = types.ModuleType("bitorch_qlinear")  # replaces __init__.py, because its order of imports must not matter
    stub.__path__ = [package]
    sys.modules["bitorch_qlinear"] = stub
"""


def in_a_fresh_process(code, first):
    """Run the code in a new process, in which it can import the module `first` before the package's other modules."""
    package = str(Path(bitorch_qlinear.__file__).parent)
    command = [sys.executable, "-c", ONE_MODULE_ALONE + code, package, first]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(package).parent)
    assert result.returncode == 0, result.stderr


VMAP = """
importlib.import_module(first)
vmap, ops = torch.func.vmap, torch.ops.bitorch_qlinear
x = torch.randn(3, 4, 40)
words = ops.pack_bits(x)
reals = torch.randn(3, 2, 40)
each = lambda function, *tensors: torch.stack([function(*t) for t in zip(*tensors)])
for function, *tensors in (
    (ops.pack_bits, x),
    (lambda w: ops.unpack_bits(w, 40, torch.float32), words),
    (lambda w: ops.prepare_weight(w, 40), words),
    (lambda r, w: ops.multiply_signs(r, w, 40, True), reals, words),
):
    assert torch.equal(vmap(function)(*tensors), each(function, *tensors))
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["bitorch_qlinear", "bitorch_qlinear._vmap"])
def test_vmap_does_not_depend_on_the_order_of_imports(first):
    in_a_fresh_process(VMAP, first)


def test_all_operators_of_the_contract_exist():
    products = {"binary_linear", "linear", "sign_linear", "linear_train", "dorefa_linear", "multiply_signs"}
    design = {"pack_bits", "unpack_bits", "prepare_weight", *products}
    assert design <= set(OPERATORS)
    assert {name for name in dir(torch.ops.bitorch_qlinear) if name in OPERATORS} == set(OPERATORS)
    assert all(callable(getattr(F, name)) for name in design)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "prepare_weight":  # its result contains the address of the words, so no two results are equal
        checks.append("test_aot_dispatch_dynamic")
    for args, kwargs in samples(name):
        torch.library.opcheck(operator(name), args, kwargs, test_utils=checks)


def assert_same_form(real, fake, what):
    real, fake = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (real, fake))
    assert len(real) == len(fake)
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), what


def mapped(function, args, kwargs):
    both = [function(v) if isinstance(v, torch.Tensor) else v for v in (*args, *kwargs.values())]
    return both[: len(args)], dict(zip(kwargs, both[len(args) :], strict=True))


@pytest.mark.parametrize("name", OPERATORS)
@given(data=st.data())
@settings(max_examples=40)
def test_fake_and_meta_results_have_the_real_form(kernel, name, data):
    size = st.sampled_from([0, 1, 2, 3, 31, 32, 33, 64, 65, 100])
    leading = data.draw(st.lists(st.integers(0, 3), max_size=3))
    dtype, transpose = data.draw(st.sampled_from(FLOATS)), data.draw(st.booleans())
    values = arguments(tuple(leading), data.draw(size), data.draw(size), dtype, transpose)
    values["out_dtype"] = data.draw(st.sampled_from([None, *FLOATS]))
    values["threshold"] = data.draw(st.sampled_from([None, 1.0]))
    values["dtype"] = data.draw(st.sampled_from([*FLOATS, torch.bool, torch.int8]))
    if data.draw(st.booleans()):
        values = with_bits(values, len(values["weight_words"]), values["k"])
    args, kwargs = call_arguments(name, values)
    real = operator(name)(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake_args, fake_kwargs = mapped(mode.from_tensor, args, kwargs)
        assert_same_form(real, operator(name)(*fake_args, **fake_kwargs), "fake")
    meta_args, meta_kwargs = mapped(lambda t: t.to("meta"), args, kwargs)
    meta = operator(name)(*meta_args, **meta_kwargs)
    assert_same_form(real, meta, "meta")
    assert all(t.is_meta for t in ([meta] if isinstance(meta, torch.Tensor) else meta))


# ---- symbolic sizes --------------------------------------------------------------------------------


def functions_of_words(k=70, n=9):
    """Return a function for each operator that calls it and maps the packed rows of a batch to one tensor."""
    weight, bias = torch.randn(n, k), torch.randn(n)
    words = pack_signs(weight)
    prepared = F.prepare_weight(words, k)
    return {
        "unpack_bits": lambda x_words: F.unpack_bits(x_words, k),
        "binary_linear": lambda x_words: F.binary_linear(x_words, words, k, bias, weight_prepared=prepared),
        "pack_bits": lambda x_words: F.pack_bits(F.unpack_bits(x_words, k)),
        "linear": lambda x_words: F.linear(F.unpack_bits(x_words, k), words, k, bias, scale=bias),
        "sign_linear": lambda x_words: F.sign_linear(F.unpack_bits(x_words, k), weight, bias, scale=bias),
        "linear_train": lambda x_words: F.linear_train(F.unpack_bits(x_words, k), words, k, threshold=0.5)[0],
        "dorefa_linear": lambda x_words: F.dorefa_linear(F.unpack_bits(x_words, k), words, k, bits=2),
        "multiply_signs": lambda x_words: F.multiply_signs(F.unpack_bits(x_words, k), words, k, True),
        "prepare_weight": lambda x_words: F.prepare_weight(x_words, k) + 0,
    }


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x_words):
        return self.function(x_words)


@pytest.mark.parametrize("name", OPERATORS)
def test_one_graph_serves_every_batch(name):
    torch._dynamo.reset()
    function, counter = functions_of_words()[name], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 3, 17, 129):
        x_words = pack_signs(torch.randn(rows, 70))
        assert_equal(compiled(x_words), function(x_words))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", OPERATORS)
def test_exported_programs_serve_every_batch(name):
    module = Module(functions_of_words()[name])
    shapes = ({0: torch.export.Dim("batch", min=0)},)
    program = torch.export.export(module, (pack_signs(torch.randn(4, 70)),), dynamic_shapes=shapes)
    for rows in (0, 1, 2, 129):
        x_words = pack_signs(torch.randn(rows, 70))
        assert_equal(program.module()(x_words), module(x_words))


def test_strided_words_of_a_dynamic_batch_are_refused_while_tracing():
    torch._dynamo.reset()
    compiled = torch.compile(functions_of_words()["binary_linear"], fullgraph=True, dynamic=True, backend="aot_eager")
    wrong = strided(pack_signs(torch.randn(5, 70)))
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="x_words: expected contiguous words"):
        compiled(wrong)


# ---- operations ------------------------------------------------------------------------------------


def flops(function, *tensors):
    with FlopCounterMode(display=False) as counter:
        function(*tensors)
    return counter.get_total_flops()


@pytest.mark.parametrize("leading", [(3,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_flops_equal_those_of_the_float_layer(leading, with_bias):
    n, k = 9, 70
    x, weight, bias = torch.randn(*leading, k), torch.randn(n, k), torch.randn(n) if with_bias else None
    words, x_words = pack_signs(weight), pack_signs(x)
    prepared = F.prepare_weight(words, k)
    expected = flops(torch.nn.functional.linear, x, weight, bias)
    assert expected == 2 * math.prod(leading) * n * k
    assert flops(lambda: F.linear(x, words, k, bias, weight_prepared=prepared)) == expected
    assert flops(lambda: F.linear_train(x, words, k, bias, threshold=1.0)) == expected
    assert flops(lambda: F.binary_linear(x_words, words, k, bias)) == expected
    assert flops(lambda: F.sign_linear(x, weight, bias)) == expected
    assert flops(lambda: F.dorefa_linear(x, words, k, bias, bits=2)) == expected
    assert flops(lambda: F.multiply_signs(x, words, k, True)) == expected
    assert flops(lambda: F.multiply_signs(x[..., :n].contiguous(), words, k)) == expected
    assert flops(F.pack_bits, x) == flops(F.unpack_bits, words, k) == flops(F.prepare_weight, words, k) == 0


COUNTED = """
before = set(sys.modules)
{counter_first}
importlib.import_module(first)
assert {counter_first!r} or not any("triton" in name or "flop_counter" in name for name in set(sys.modules) - before)
from torch.utils.flop_counter import FlopCounterMode
ops = torch.ops.bitorch_qlinear
with FlopCounterMode(display=False) as counter:
    ops.linear(torch.randn(3, 40), ops.pack_bits(torch.randn(5, 40)), 40)
assert counter.get_total_flops() == 2 * 3 * 40 * 5
"""


@pytest.mark.slow
@pytest.mark.parametrize("counter_first", ["", "import torch.utils.flop_counter"], ids=["after", "before"])
def test_the_flop_counter_may_be_imported_before_or_after_the_package(counter_first):
    """The package does not import torch's counter itself, because that imports triton, which takes long."""
    in_a_fresh_process(COUNTED.format(counter_first=counter_first), "bitorch_qlinear._flops")
