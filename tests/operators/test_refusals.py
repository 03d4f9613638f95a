"""The operators refuse wrong arguments, name them in the error, and say the same about tensors without memory."""

import itertools
import re
from contextlib import nullcontext

import pytest
import torch
from support.operators import (
    BROKEN,
    CPU_ONLY,
    FOREIGN_FORMS,
    INVISIBLE,
    LINEAR,
    OPERATORS,
    PREPARED,
    SINGLE,
    TENSORS,
    WITHOUT_MEMORY,
    arguments,
    arguments_with,
    assert_refused,
    breakages,
    call_arguments,
    named_for,
    operator,
    refusal,
    without_memory,
)
from support.reference import (
    assert_equal,
    pack_signs,
    product,
    signs,
    unpack_signs,
)

from bitorch_qlinear import _kernels
from bitorch_qlinear import functional as F


@pytest.mark.parametrize(("name", "argument", "what"), list(breakages()))
def test_wrong_arguments_are_refused(kernel, name, argument, what):
    values = arguments_with(argument)
    values[argument] = BROKEN[argument][what](values[argument])
    assert_refused(name, values, *named_for(name, argument))


@pytest.mark.parametrize("name", PREPARED)
@pytest.mark.parametrize("what", FOREIGN_FORMS)
def test_foreign_forms_are_not_used(kernel, name, what):
    values = arguments()
    args, kwargs = call_arguments(name, values | {"weight_prepared": None})
    expected = operator(name)(*args, **kwargs)
    args, kwargs = call_arguments(name, values | {"weight_prepared": FOREIGN_FORMS[what](values["weight_prepared"])})
    result = operator(name)(*args, **kwargs)
    results, wanted = ([r] if isinstance(r, torch.Tensor) else r for r in (result, expected))
    for r, w in zip(results, wanted, strict=True):
        assert_equal(r, w)


def needs_cpu(name, way):
    return way == "fake cuda" and name in CPU_ONLY


@pytest.mark.parametrize("way", WITHOUT_MEMORY)
@pytest.mark.parametrize(("name", "argument", "what"), [p for p in breakages() if p.values[2] not in INVISIBLE])
def test_tensors_without_memory_are_refused_alike(name, argument, what, way):
    """The errors must be the same for meta and fake tensors, so that a wrong argument is found while tracing."""
    values = arguments_with(argument)
    values[argument] = BROKEN[argument][what](values[argument])
    expected = refusal(name, values)
    if needs_cpu(name, way):
        expected = f"bitorch_qlinear: {CPU_ONLY[name]}: expected a tensor on the CPU, the only device of {name}"
    if argument == "layout" and way == "fake cuda":
        expected = expected.replace(
            f"expected {_kernels.prepared_layout().number},", f"expected {_kernels.CUDA_LAYOUT},"
        )
    elif way == "fake cuda":
        values["layout"] = _kernels.CUDA_LAYOUT
    mode, made = without_memory(way)
    with mode:
        values = {n: made(v) if isinstance(v, torch.Tensor) else v for n, v in values.items()}
        assert refusal(name, values) == expected


@pytest.mark.parametrize("way", ["cpu", *WITHOUT_MEMORY])
def test_layout_of_another_device_is_refused(way):
    there, elsewhere = _kernels.prepared_layout().number, _kernels.CUDA_LAYOUT
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
    values = arguments_with(argument)
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
    """Sparse and mkldnn tensors have no kernels, so torch must raise an error instead of returning a result."""
    x, words = torch.randn(3, 40), arguments()["weight_words"]
    for wrong in (x.to_sparse(), x.to_sparse_csr(), x.to_mkldnn()):
        with pytest.raises(RuntimeError):
            F.pack_bits(wrong)
        with pytest.raises(RuntimeError):
            F.linear(wrong, words, 40)
    with pytest.raises(RuntimeError):
        F.linear(x, words, 40, torch.ones(5).to_sparse())


def test_the_active_layout_is_accepted(kernel):
    words, layout = arguments()["weight_words"], _kernels.prepared_layout().number
    assert_equal(F.prepare_weight(words, 40, layout=layout), F.prepare_weight(words, 40))


@pytest.mark.parametrize(("made_for", "used_by"), [*itertools.permutations(_kernels.available_kernels(), 2)])
def test_weights_prepared_for_another_kernel_are_prepared_again(made_for, used_by):
    try:
        _kernels.force_kernel(made_for)
        values = arguments()
        _kernels.force_kernel(used_by)
        expected = product(signs(values["x"]), unpack_signs(values["weight_words"], 40))
        values |= {"bias": None, "scale": None, "out_dtype": torch.int32}
        for name in PREPARED:
            args, kwargs = call_arguments(name, values)
            y = operator(name)(*args, **kwargs)
            assert_equal(y if isinstance(y, torch.Tensor) else y[0], expected.to(torch.int32))
    finally:
        _kernels.force_kernel(None)


def test_unknown_kernel_is_refused_and_changes_nothing():
    before = _kernels.active_kernel()
    with pytest.raises(RuntimeError, match=r"expected one of .*scalar.*got \"avx1024\""):
        _kernels.force_kernel("avx1024")
    assert _kernels.active_kernel() == before


HUGE_WORDS = torch.empty(2**62, 0, dtype=torch.int32)
ONE = pack_signs(torch.ones(1, 1))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda: F.pack_bits(torch.zeros(1).expand(2**31)), "k"),
        (lambda: F.pack_bits(torch.zeros(1, 1).expand(2**62, 1)), "result"),
        (lambda: F.pack_bits(torch.zeros(1, 1).expand(2**45, 3)), "x"),
        (lambda: F.linear(torch.zeros(1, 1).expand(2**62, 1), ONE, 1), "result"),
        (lambda: F.linear_train(torch.zeros(1, 1).expand(2**62, 1), ONE, 1), "result"),
        (lambda: F.linear(torch.zeros(1, 0), HUGE_WORDS, 0), "result"),
        (lambda: F.binary_linear(HUGE_WORDS, HUGE_WORDS, 0), "result"),
        (lambda: F.multiply_signs(torch.zeros(1, 1).expand(2**62, 1), ONE, 1), "result"),
        (lambda: F.multiply_signs(torch.zeros(1, 0), HUGE_WORDS, 0, True), "result"),
    ],
)
def test_sizes_beyond_memory_are_refused(kernel, function, name):
    """Arguments that take no memory but whose results would: sizes must not wrap around, and nothing may crash."""
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
