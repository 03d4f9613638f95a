"""Arguments of every operator: valid ones of every form, wrong ones, and a check that the wrong ones are refused."""

import math
import re
from contextlib import nullcontext

import pytest
import torch
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from bitorch_qlinear import _kernels
from bitorch_qlinear import functional as F

from .reference import FLOATS, pack_signs, random_values, random_words
from .shapes import PANEL, around

NAMESPACE = "bitorch_qlinear::"
# tests/operators/test_chain.py and test_records.py test these, which take lists of tensors.
LISTS = {"linear_chain", "record_values", "same_values"}
OPERATORS = sorted(
    {n[len(NAMESPACE) :] for n in torch._C._dispatch_get_all_op_names() if n.startswith(NAMESPACE)} - LISTS
)


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
    """Draw valid arguments of the linear operators."""
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


# ---- one valid value of every argument ------------------------------------------------------------


def arguments(m=(3,), n=5, k=40, dtype=torch.float32, transpose=False):
    """Return a valid value for every argument name that any of our operators has."""
    x, weight_words = torch.randn(*m, k).to(dtype), pack_signs(torch.randn(n, k))
    return {
        "x": x,
        "strict": False,
        "limits": None,
        "flips": None,
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
        "out_limits": None,
        "out_flips": None,
        "threshold": 0.5,
        "bits": 2,
        "layout": _kernels.prepared_layout().number,
        "reals": torch.randn(*m, k if transpose else n).to(dtype),
        "sign_words": weight_words,
        "transpose": transpose,
    }


def with_bits(values, n=5, k=40):
    """Return the arguments of a product that writes bits, which exclude some others, and of packing by limits."""
    bits = {"out_limits": torch.randint(-2, k + 2, (n,), dtype=torch.int32), "out_flips": pack_signs(torch.randn(n))}
    bits |= {"limits": torch.randn(k).to(values["x"].dtype), "flips": pack_signs(torch.randn(k))}
    return values | {"bias": None, "scale": None, "out_dtype": None} | bits


def call_arguments(name, values, required_only=False):
    """Return the args and kwargs with which to call the operator of this name."""
    schema = operator(name)._schema.arguments
    args = [values[a.name] for a in schema if not a.kwarg_only and not (required_only and a.has_default_value())]
    return args, {a.name: values[a.name] for a in schema if a.kwarg_only and not required_only}


def samples(name):
    """Return full and minimal calls of the operator. An argument for which there is no sample is a KeyError."""
    wide = arguments((2, 3), 7, 33, torch.float64, transpose=True) | {
        "strict": True,
        "out_dtype": None,
        "threshold": None,
    }
    return [
        call_arguments(name, arguments()),
        call_arguments(name, arguments(), required_only=True),
        call_arguments(name, wide | {"bias": None, "out_dtype": torch.bfloat16}),
        call_arguments(name, with_bits(wide, 7, 33)),
        call_arguments(name, with_bits(wide, 7, 33) | {"out_flips": None, "flips": None, "weight_prepared": None}),
    ]


# ---- arguments to be refused -----------------------------------------------------------------------


def resized(tensor):
    """Return a copy whose storage has been freed although the tensor's sizes remain."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def shortened(tensor):
    """Return a copy whose storage is one byte too short."""
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
FOREIGN_FORMS = {
    "a byte less": lambda p: p[:-1],
    "a byte more": lambda p: torch.cat([p, p[:1]]),
    "layout": with_bytes(8, b"\x09"),
    "layout's last byte": with_bytes(11, b"\x80"),
    "n one more": with_bytes(16, b"\x06"),
    "n huge": with_bytes(23, b"\x7f"),
    "k one more": with_bytes(24, b"\x29"),
    "k negative": with_bytes(31, b"\xff"),
}
BITS = MEMORY | {
    "no dimensions": lambda v: v[0],
    "two dimensions": lambda v: v[None],
    "one more": lambda v: torch.cat([v, v[:1]]),
    "none": lambda v: v[:0],
    "int64": lambda v: v.long(),
    "float32": lambda v: v.float(),
    "bool": lambda v: v.bool(),
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
    "out_limits": BITS | {"one less": lambda v: v[:-1], "uint32": lambda v: v.view(torch.uint32), "strided": strided},
    "out_flips": BITS,
    "limits": VECTOR | {"float64": lambda v: v.double(), "float16": lambda v: v.half(), "strided": strided},
    "flips": BITS | {"uint8": lambda w: w.view(torch.uint8), "strided": strided},
    "k": {str(k): lambda _, k=k: k for k in (-1, -(2**63), 0, 8, 32, 65, 2**31, 2**32 + 40, 2**63 - 1)},
    "dtype": {str(d)[6:]: lambda _, d=d: d for d in (torch.int64, torch.uint8, torch.complex64, torch.uint32)},
    "out_dtype": {str(d)[6:]: lambda _, d=d: d for d in (torch.int64, torch.bool, torch.complex64, torch.int8)}
    | {"int32 with bias and scale": lambda _: torch.int32},
    "layout": {str(number): lambda _, number=number: number for number in (-1, 9, 65, 2**32, 2**63 - 1)},
    "bits": {str(bits): lambda _, bits=bits: bits for bits in (0, 3, -1, 2**32 + 1, 2**63 - 1)},
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
CPU_ONLY = {"dorefa_linear": "x", "multiply_signs": "reals"}
"""The operators that CUDA lacks, with the argument that their errors name."""
LINEAR = sorted(set(OPERATORS) - {*SINGLE, *CPU_ONLY})
PREPARED = sorted(set(LINEAR) - {"sign_linear"})
WRITES_BITS = ("binary_linear", "linear")
BIT_TENSORS = ("out_limits", "out_flips", "limits", "flips")
NUMBER_TENSORS = ("bias", "scale")
OTHER_TENSORS = ("x", "weight", "words", "x_words", "weight_words", "weight_prepared", "reals", "sign_words")
TENSORS = (*OTHER_TENSORS, *NUMBER_TENSORS, *BIT_TENSORS)


def arguments_with(argument):
    """Return valid arguments with a value for this one, which some of the others may exclude."""
    return with_bits(arguments()) if argument in BIT_TENSORS else arguments()


def breakages():
    for name in OPERATORS:
        for argument in operator(name)._schema.arguments:
            if argument.name in ("strict", "strict_weight", "transpose"):  # no bool is wrong
                continue
            for what in BROKEN[argument.name]:
                if (name, argument.name) == ("pack_bits", "x") and what in (
                    "one more",
                    "one less",
                ):  # it takes k from x
                    continue
                yield pytest.param(name, argument.name, what, id=f"{name}-{argument.name}-{what}")


INVISIBLE = (*MEMORY, *NO_HEADER)
"""The faults that meta and fake tensors cannot show, because they concern memory or its contents."""


def without_memory(way):
    """Return a context manager and a function that, inside it, makes a tensor of a given one's form without memory."""
    mode = FakeTensorMode()
    if way == "fake cpu":
        return mode, mode.from_tensor
    device = way.removeprefix("fake ")

    def made(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    return nullcontext() if way == "meta" else mode, made


WITHOUT_MEMORY = ["meta", "fake cpu", "fake cuda"]


def refusal(name, values):
    """Return what the operator says when it refuses these arguments."""
    args, kwargs = call_arguments(name, values)
    with pytest.raises(RuntimeError) as caught:
        operator(name)(*args, **kwargs)
    return str(caught.value)


def assert_refused(name, values, *expected_names):
    message = refusal(name, values)
    assert re.match(
        f"bitorch_qlinear: ({'|'.join(expected_names)}): expected |bitorch_qlinear: .*storage|"
        "bitorch_qlinear: out_dtype: int32",
        message,
    ), message
    assert any(re.search(rf"\b{expected}\b", message) for expected in expected_names), message
    assert not re.search(r"/\w|\.cpp|\.cc\b|\.h\b|\.py\b", message), message
    return message


def named_for(name, argument):
    """The arguments that the error may name: if k is wrong, so is the size of each tensor that k determines."""
    if argument == "k":
        return ("k", "x", "words", "x_words", "weight_words", "sign_words")
    return ("weight", "x") if (name, argument) == ("sign_linear", "weight") else (argument,)
