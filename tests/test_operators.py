"""The operators as torch sees them: any input, fake tensors, opcheck, argument checks."""

import itertools
import math
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    FLOATS,
    assert_equal,
    epilogue,
    in_range,
    pack,
    pack_signs,
    product,
    random_values,
    random_words,
    signs,
    unpack_signs,
)
from shapes import PANEL, around
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import bitorch_qlinear
from bitorch_qlinear import _library
from bitorch_qlinear import functional as F

NAMESPACE = "bitorch_qlinear::"
OPERATORS = sorted(n[len(NAMESPACE) :] for n in torch._C._dispatch_get_all_op_names() if n.startswith(NAMESPACE))


def operator(name):
    return getattr(torch.ops.bitorch_qlinear, name).default


# ---- any input -----------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x,
    "offset": lambda x: torch.cat([x.new_full((3,), math.nan), x.reshape(-1)])[3:].view(x.shape),
    "rows apart": lambda x: torch.cat([x, x.new_full((*x.shape[:-1], 5), math.nan)], -1)[..., : x.shape[-1]],
    "every other value": lambda x: torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0],
    "columns first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "leading dims swapped": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2) if x.dim() > 2 else x,
    "leading dims apart": lambda x: torch.stack([x, torch.full_like(x, math.nan)], 1)[:, 0] if x.dim() > 1 else x,
    "rows expanded": lambda x: x[..., :1, :].expand(x.shape) if x.dim() > 1 and x.shape[-2] else x,
    "values expanded": lambda x: x[..., :1].expand(x.shape) if x.shape[-1] else x,
    "negated lazily": lambda x: torch._neg_view(-x),
}
VECTORS = {
    "contiguous": lambda v: v,
    "every other value": lambda v: torch.stack([v, torch.full_like(v, math.nan)], -1)[:, 0],
    "expanded": lambda v: v[:1].expand(v.shape) if len(v) else v,
}


@st.composite
def vectors(draw, n, generator):
    dtype = draw(st.sampled_from([None, *FLOATS]))
    if dtype is None:
        return None
    make = draw(st.sampled_from([random_values, lambda s, d, g: torch.randn(s, generator=g).to(d)]))
    return draw(st.sampled_from(list(VECTORS.values())))(make((n,), dtype, generator))


@st.composite
def problems(draw):
    """Arguments of the linear operators, valid ones."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    leading = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5]), max_size=3))
    if draw(st.booleans()):
        leading = [draw(st.sampled_from([1, 2, 3, 15, 16, 17, 33, 127, 128, 129, 130]))]
    n = draw(st.sampled_from([0, 1, 2, 3, 17, *around(PANEL, 2 * PANEL, 3 * PANEL)]))
    k = draw(st.one_of(st.integers(0, 200), st.sampled_from(around(240, 256, 480, 1024))))
    dtype = draw(st.sampled_from(FLOATS))
    x = draw(st.sampled_from(list(LAYOUTS.values())))(random_values((*leading, k), dtype, generator))
    words = random_words(n, k, generator, stray=draw(st.booleans()))
    bias, scale = draw(vectors(n, generator)), draw(vectors(n, generator))
    outs = [None, *FLOATS, *([torch.int32] if bias is None and scale is None else [])]
    return {
        "x": x,
        "weight_words": words.view(torch.uint32) if draw(st.booleans()) else words,
        "k": k,
        "bias": bias,
        "scale": scale,
        "out_dtype": draw(st.sampled_from(outs)),
        "strict": draw(st.booleans()),
        "weight_prepared": draw(st.booleans()),
        "threshold": draw(st.sampled_from([None, 0.0, 0.3, 1.0, math.inf])),
    }


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
    stub = types.ModuleType("bitorch_qlinear")  # in the place of __init__.py, whose order of imports must not matter
    stub.__path__ = [package]
    sys.modules["bitorch_qlinear"] = stub
"""


def in_a_fresh_process(code, first):
    """Runs the code where `first`, a module of ours, can be imported before all others."""
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


@pytest.mark.parametrize("first", ["bitorch_qlinear", "bitorch_qlinear._vmap"])
def test_vmap_does_not_depend_on_the_order_of_imports(first):
    in_a_fresh_process(VMAP, first)


# ---- samples of every operator ---------------------------------------------------------------------


def arguments(m=(3,), n=5, k=40, dtype=torch.float32, transpose=False):
    """A valid value of every argument that an operator of ours has."""
    x, weight_words = torch.randn(*m, k).to(dtype), pack_signs(torch.randn(n, k))
    return {
        "x": x,
        "strict": False,
        "weight": torch.randn(n, k).to(dtype),
        "strict_weight": True,
        "words": pack_signs(x),
        "x_words": pack_signs(x),
        "weight_words": weight_words,
        "k": k,
        "dtype": torch.float16,
        "bias": torch.randn(n),
        "scale": torch.randn(n),
        "weight_prepared": F.prepare_weight(weight_words, k),
        "out_dtype": torch.float64,
        "threshold": 0.5,
        "layout": _library.prepared_layout().number,
        "reals": torch.randn(*m, k if transpose else n).to(dtype),
        "sign_words": weight_words,
        "transpose": transpose,
    }


def call_arguments(name, values, required_only=False):
    """(args, kwargs) of one operator."""
    schema = operator(name)._schema.arguments
    args = [values[a.name] for a in schema if not a.kwarg_only and not (required_only and a.has_default_value())]
    return args, {a.name: values[a.name] for a in schema if a.kwarg_only and not required_only}


def samples(name):
    """Full and minimal calls; an operator with an argument that has no sample fails here."""
    wide = arguments((2, 3), 7, 33, torch.float64, transpose=True) | {
        "strict": True,
        "out_dtype": None,
        "threshold": None,
    }
    return [
        call_arguments(name, arguments()),
        call_arguments(name, arguments(), required_only=True),
        call_arguments(name, wide | {"bias": None, "out_dtype": torch.bfloat16}),
    ]


def test_operators_are_those_of_the_design():
    products = {"binary_linear", "linear", "sign_linear", "linear_train", "multiply_signs"}
    design = {"pack_bits", "unpack_bits", "prepare_weight", *products}
    assert design <= set(OPERATORS)
    assert {name for name in dir(torch.ops.bitorch_qlinear) if name in OPERATORS} == set(OPERATORS)
    assert all(callable(getattr(F, name)) for name in design)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "prepare_weight":  # whose result holds the address of the words: no two results are equal
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
    args, kwargs = call_arguments(name, values)
    real = operator(name)(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake_args, fake_kwargs = mapped(mode.from_tensor, args, kwargs)
        assert_same_form(real, operator(name)(*fake_args, **fake_kwargs), "fake")
    meta_args, meta_kwargs = mapped(lambda t: t.to("meta"), args, kwargs)
    meta = operator(name)(*meta_args, **meta_kwargs)
    assert_same_form(real, meta, "meta")
    assert all(t.is_meta for t in ([meta] if isinstance(meta, torch.Tensor) else meta))


# ---- argument checks -------------------------------------------------------------------------------


def resized(tensor):
    """Its storage given back beneath it."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def shortened(tensor):
    """One byte of its storage missing."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return tensor


def strided(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def with_bytes(at, values):
    def damage(prepared):
        prepared = prepared.clone()
        prepared[at : at + len(values)] = torch.tensor(list(values), dtype=torch.uint8)
        return prepared

    return damage


MEMORY = {"storage gone": resized, "storage too short": shortened}
WORDS = MEMORY | {
    "no dimensions": lambda w: w.reshape(-1)[0],
    "a word more": lambda w: torch.cat([w, w[:, :1]], -1),
    "a word less": lambda w: w[:, :-1].contiguous(),
    "strided": strided,
    "transposed": lambda w: w.T.contiguous().T,
    "float32": lambda w: w.float(),
    "int64": lambda w: w.long(),
    "uint8": lambda w: w.view(torch.uint8),
    "bool": lambda w: w.bool(),
}
VECTOR = MEMORY | {
    "no dimensions": lambda v: v[0],
    "two dimensions": lambda v: v[None],
    "one more": lambda v: torch.cat([v, v[:1]]),
    "one less": lambda v: v[:-1],
    "none": lambda v: v[:0],
    "int32": lambda v: v.int(),
    "bool": lambda v: v.bool(),
    "complex": lambda v: v.to(torch.complex64),
}
FLOAT_ROWS = MEMORY | {
    "no dimensions": lambda x: x[0, 0],
    "one more": lambda x: torch.cat([x, x[:, :1]], -1),
    "one less": lambda x: x[:, :-1],
    "int32": lambda x: x.int(),
    "uint8": lambda x: x.to(torch.uint8),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
}
NO_HEADER = {
    "zeros": torch.zeros_like,
    "first byte of the magic": with_bytes(0, b"B"),
    "last byte of the magic": with_bytes(7, b"Q"),
}
OF_ANOTHER = {
    "a byte less": lambda p: p[:-1],
    "a byte more": lambda p: torch.cat([p, p[:1]]),
    "layout": with_bytes(8, b"\x09"),
    "layout's last byte": with_bytes(11, b"\x80"),
    "n one more": with_bytes(16, b"\x06"),
    "n huge": with_bytes(23, b"\x7f"),
    "k one more": with_bytes(24, b"\x29"),
    "k negative": with_bytes(31, b"\xff"),
}
MATRIX_WORDS = WORDS | {"one dimension": lambda w: w[0], "three dimensions": lambda w: w[None]}
BROKEN = {
    "x": FLOAT_ROWS,
    "weight": FLOAT_ROWS | {"one dimension": lambda w: w[0], "three dimensions": lambda w: w[None]},
    "reals": FLOAT_ROWS,
    "words": WORDS,
    "x_words": WORDS,
    "weight_words": MATRIX_WORDS,
    "sign_words": MATRIX_WORDS,
    "bias": VECTOR,
    "scale": VECTOR,
    "k": {str(k): lambda _, k=k: k for k in (-1, -(2**63), 0, 8, 32, 65, 2**31, 2**32 + 40, 2**63 - 1)},
    "dtype": {str(d)[6:]: lambda _, d=d: d for d in (torch.int64, torch.uint8, torch.complex64, torch.uint32)},
    "out_dtype": {str(d)[6:]: lambda _, d=d: d for d in (torch.int64, torch.bool, torch.complex64, torch.int8)}
    | {"int32 with bias and scale": lambda _: torch.int32},
    "layout": {str(number): lambda _, number=number: number for number in (-1, 9, 65, 2**32, 2**63 - 1)},
    "threshold": {str(t): lambda _, t=t: t for t in (-1.0, -math.inf, math.nan, -5e-324)},
    "weight_prepared": MEMORY
    | {
        "no dimensions": lambda p: p[0],
        "two dimensions": lambda p: p[None],
        "int8": lambda p: p.view(torch.int8),
        "float32": lambda p: p.float(),
        "strided": strided,
        "empty": lambda p: p[:0],
        "three bytes": lambda p: p[:3],
        "half a header": lambda p: p[:32],
    }
    | NO_HEADER,
}
SINGLE = ("pack_bits", "unpack_bits", "prepare_weight")
CPU_ONLY = ("multiply_signs",)
LINEAR = sorted(set(OPERATORS) - {*SINGLE, *CPU_ONLY})
PREPARED = sorted(set(LINEAR) - {"sign_linear"})
TENSORS = ("x", "weight", "words", "x_words", "weight_words", "bias", "scale", "weight_prepared", "reals", "sign_words")


def breakages():
    for name in OPERATORS:
        for argument in operator(name)._schema.arguments:
            if argument.name in ("strict", "strict_weight", "transpose"):  # any bool is right
                continue
            for what in BROKEN[argument.name]:
                if name == "pack_bits" and what in ("one more", "one less"):  # its k is that of x
                    continue
                yield pytest.param(name, argument.name, what, id=f"{name}-{argument.name}-{what}")


INVISIBLE = (*MEMORY, *NO_HEADER)
"""What is wrong with memory, or with what stands in it: tensors without memory do not show it. All else they show."""


def assert_refused(name, values, *expected_names):
    args, kwargs = call_arguments(name, values)
    with pytest.raises(RuntimeError) as caught:
        operator(name)(*args, **kwargs)
    message = str(caught.value)
    assert re.match(
        f"bitorch_qlinear: ({'|'.join(expected_names)}): expected |bitorch_qlinear: .*storage|"
        "bitorch_qlinear: out_dtype: int32",
        message,
    ), message
    assert any(re.search(rf"\b{expected}\b", message) for expected in expected_names), message
    assert not re.search(r"/\w|\.cpp|\.cc\b|\.h\b|\.py\b", message), message
    return message


def named_for(name, argument):
    """The arguments of which an error may speak: a wrong k is as well a wrong size of what it is the size of."""
    if argument == "k":
        return ("k", "x", "words", "x_words", "weight_words", "sign_words")
    return ("weight", "x") if (name, argument) == ("sign_linear", "weight") else (argument,)


@pytest.mark.parametrize(("name", "argument", "what"), list(breakages()))
def test_wrong_arguments_are_refused(kernel, name, argument, what):
    values = arguments()
    values[argument] = BROKEN[argument][what](values[argument])
    assert_refused(name, values, *named_for(name, argument))


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("what", OF_ANOTHER)
def test_forms_of_another_are_prepared_anew(kernel, name, what):
    values = arguments()
    args, kwargs = call_arguments(name, values | {"weight_prepared": None})
    expected = operator(name)(*args, **kwargs)
    args, kwargs = call_arguments(name, values | {"weight_prepared": OF_ANOTHER[what](values["weight_prepared"])})
    result = operator(name)(*args, **kwargs)
    results, wanted = ([r] if isinstance(r, torch.Tensor) else r for r in (result, expected))
    for r, w in zip(results, wanted, strict=True):
        assert_equal(r, w)


def without_memory(way):
    """(mode, function): a mode to be in, and what makes a tensor of the same form there."""
    mode = FakeTensorMode()
    if way == "fake cpu":
        return mode, mode.from_tensor
    device = way.removeprefix("fake ")

    def made(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    return nullcontext() if way == "meta" else mode, made


def refusal(name, values):
    args, kwargs = call_arguments(name, values)
    with pytest.raises(RuntimeError) as caught:
        operator(name)(*args, **kwargs)
    return str(caught.value)


def needs_cpu(name, way):
    return way == "fake cuda" and name in CPU_ONLY


WITHOUT_MEMORY = ["meta", "fake cpu", "fake cuda"]


@pytest.mark.parametrize("way", WITHOUT_MEMORY)
@pytest.mark.parametrize(("name", "argument", "what"), [p for p in breakages() if p.values[2] not in INVISIBLE])
def test_tensors_without_memory_are_refused_alike(name, argument, what, way):
    """So that what is wrong is found, and named, while a model is traced."""
    values = arguments()
    values[argument] = BROKEN[argument][what](values[argument])
    expected = refusal(name, values)
    if needs_cpu(name, way):
        expected = "bitorch_qlinear: reals: expected a tensor on the CPU, where alone multiply_signs computes"
    if argument == "layout" and way == "fake cuda":
        expected = expected.replace(
            f"expected {_library.prepared_layout().number},", f"expected {_library.CUDA_LAYOUT},"
        )
    elif way == "fake cuda":
        values["layout"] = _library.CUDA_LAYOUT
    mode, made = without_memory(way)
    with mode:
        values = {n: made(v) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        assert refusal(name, values) == expected


@pytest.mark.parametrize("way", ["cpu", *WITHOUT_MEMORY])
def test_layout_of_another_device_is_refused(way):
    there, elsewhere = _library.prepared_layout().number, _library.CUDA_LAYOUT
    if way == "fake cuda":
        there, elsewhere = elsewhere, there
    mode, made = without_memory(way) if way != "cpu" else (nullcontext(), lambda tensor: tensor)
    words = arguments()["weight_words"]
    with mode:
        F.prepare_weight(made(words), 40, layout=there)
        with pytest.raises(RuntimeError, match=f"layout: expected {there}, .*, got {elsewhere}$"):
            F.prepare_weight(made(words), 40, layout=elsewhere)


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - set(SINGLE)))
@pytest.mark.parametrize("argument", TENSORS)
def test_tensors_on_different_devices_are_refused(name, argument):
    values = arguments()
    names = [a.name for a in operator(name)._schema.arguments]
    if argument in names:
        values[argument] = values[argument].to("meta")
        assert_refused(name, values, *([argument] if argument != names[0] else TENSORS))


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - set(SINGLE)))
@pytest.mark.parametrize("way", ["cpu", *WITHOUT_MEMORY])
def test_none_for_a_tensor_is_refused(name, way):
    if needs_cpu(name, way):
        pytest.skip("computes on the CPU only")
    mode, made = without_memory(way) if way != "cpu" else (nullcontext(), lambda tensor: tensor)
    values = arguments()
    with mode:
        values = {n: made(v) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        for argument in operator(name)._schema.arguments:
            if str(argument.type) == "Tensor":
                said = refusal(name, values | {argument.name: None})
                assert said == f"bitorch_qlinear: {argument.name}: expected a tensor, got None"


@pytest.mark.parametrize("name", LINEAR)
def test_int32_is_the_product_alone(name):
    values = arguments() | {"out_dtype": torch.int32}
    for vector in ("bias", "scale"):
        assert_refused(name, values | {"bias": None, "scale": None} | {vector: torch.ones(5)}, "out_dtype")
    args, kwargs = call_arguments(name, values | {"bias": None, "scale": None})
    y = operator(name)(*args, **kwargs)
    weight = signs(values["weight"], True) if name == "sign_linear" else unpack_signs(values["weight_words"], 40)
    expected = product(signs(values["x"]), weight)
    assert_equal(y if isinstance(y, torch.Tensor) else y[0], expected.to(torch.int32))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_of_another_layout_are_refused():
    """Sparse and mkldnn tensors have no kernels: an error of torch's, never a number."""
    x, words = torch.randn(3, 40), arguments()["weight_words"]
    for wrong in (x.to_sparse(), x.to_sparse_csr(), x.to_mkldnn()):
        with pytest.raises(RuntimeError):
            F.pack_bits(wrong)
        with pytest.raises(RuntimeError):
            F.linear(wrong, words, 40)
    with pytest.raises(RuntimeError):
        F.linear(x, words, 40, torch.ones(5).to_sparse())


def test_layout_that_is_here(kernel):
    words, layout = arguments()["weight_words"], _library.prepared_layout().number
    assert_equal(F.prepare_weight(words, 40, layout=layout), F.prepare_weight(words, 40))


@pytest.mark.parametrize(("made_for", "used_by"), [*itertools.permutations(_library.available_kernels(), 2)])
def test_weights_prepared_for_another_kernel_are_prepared_anew(made_for, used_by):
    try:
        _library.force_kernel(made_for)
        values = arguments()
        _library.force_kernel(used_by)
        expected = product(signs(values["x"]), unpack_signs(values["weight_words"], 40))
        values |= {"bias": None, "scale": None, "out_dtype": torch.int32}
        for name in PREPARED:
            args, kwargs = call_arguments(name, values)
            y = operator(name)(*args, **kwargs)
            assert_equal(y if isinstance(y, torch.Tensor) else y[0], expected.to(torch.int32))
    finally:
        _library.force_kernel(None)


def test_unknown_kernel_is_refused_and_changes_nothing():
    before = _library.active_kernel()
    with pytest.raises(RuntimeError, match=r"expected one of .*scalar.*got \"avx1024\""):
        _library.force_kernel("avx1024")
    assert _library.active_kernel() == before


HUGE_WORDS = torch.empty(2**62, 0, dtype=torch.int32)
ONE = pack_signs(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda: F.pack_bits(torch.zeros(1).expand(2**31)), "k"),
        (lambda: F.pack_bits(torch.zeros(1, 1).expand(2**62, 1)), "result"),
        (lambda: F.pack_bits(torch.zeros(1, 1).expand(2**45, 3)), "x"),
        (lambda: F.linear(torch.zeros(1, 1).expand(2**62, 1), ONE, 1), "out of memory"),
        (lambda: F.linear_train(torch.zeros(1, 1).expand(2**62, 1), ONE, 1), "result"),
        (lambda: F.linear(torch.zeros(1, 0), HUGE_WORDS, 0), "result"),
        (lambda: F.binary_linear(HUGE_WORDS, HUGE_WORDS, 0), "result"),
        (lambda: F.multiply_signs(torch.zeros(1, 1).expand(2**62, 1), ONE, 1), "result"),
        (lambda: F.multiply_signs(torch.zeros(1, 0), HUGE_WORDS, 0, True), "result"),
    ],
)
def test_sizes_beyond_memory_are_refused(kernel, function, name):
    """Shapes that take no memory themselves, but whose results would: no wrapped-around size, no crash."""
    with pytest.raises(RuntimeError, match=f"bitorch_qlinear: {name}") as caught:
        function()
    assert not re.search(r"/\w|\.cpp|\.h\b", str(caught.value))


def test_huge_sizes_without_elements(kernel):
    bias = torch.zeros(1).expand(2**62)
    assert F.linear(torch.empty(0, 0), HUGE_WORDS, 0, bias, scale=bias).shape == (0, 2**62)
    assert F.unpack_bits(HUGE_WORDS, 0).shape == (2**62, 0)
    assert F.binary_linear(HUGE_WORDS, torch.empty(0, 0, dtype=torch.int32), 0).shape == (2**62, 0)
    rows = torch.empty(2**50, 0)
    assert F.pack_bits(rows).shape == (2**50, 0)
    assert F.multiply_signs(torch.zeros(1).expand(1, 2**62), HUGE_WORDS, 0).shape == (1, 0)
    no_words = torch.empty(0, 0, dtype=torch.int32)
    assert F.multiply_signs(rows, no_words, 0).shape == (2**50, 0)
    assert F.linear(rows, no_words, 0).shape == (2**50, 0)
    assert F.linear_train(rows, no_words, 0, threshold=1.0)[1].shape == (2**50, 0)
    prepared = F.prepare_weight(HUGE_WORDS, 0)
    assert F.binary_linear(HUGE_WORDS[:0], HUGE_WORDS, 0, weight_prepared=prepared).shape == (0, 2**62)


# ---- symbolic sizes --------------------------------------------------------------------------------


def of_words(k=70, n=9):
    """Calls of every operator on packed rows of a batch: each begins and ends with a tensor."""
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
    function, counter = of_words()[name], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 3, 17, 129):
        x_words = pack_signs(torch.randn(rows, 70))
        assert_equal(compiled(x_words), function(x_words))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", OPERATORS)
def test_exported_programs_serve_every_batch(name):
    module = Module(of_words()[name])
    shapes = ({0: torch.export.Dim("batch", min=0)},)
    program = torch.export.export(module, (pack_signs(torch.randn(4, 70)),), dynamic_shapes=shapes)
    for rows in (0, 1, 2, 129):
        x_words = pack_signs(torch.randn(rows, 70))
        assert_equal(program.module()(x_words), module(x_words))


def test_strided_words_of_a_dynamic_batch_are_refused_while_tracing():
    torch._dynamo.reset()
    compiled = torch.compile(of_words()["binary_linear"], fullgraph=True, dynamic=True, backend="aot_eager")
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
def test_operations_are_counted_as_of_the_float_layer(leading, with_bias):
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


@pytest.mark.parametrize("counter_first", ["", "import torch.utils.flop_counter"], ids=["after", "before"])
def test_the_counter_may_be_imported_before_or_after_us(counter_first):
    """We do not import it ourselves: it imports triton, which takes longer than all of ours."""
    in_a_fresh_process(COUNTED.format(counter_first=counter_first), "bitorch_qlinear._flops")
