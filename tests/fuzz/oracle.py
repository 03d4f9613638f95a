"""An oracle of the operators' contract: it names the arguments at fault, or computes the result in plain torch."""

from __future__ import annotations

import re
from typing import Any

import torch
from support.reference import (
    FLOATS,
    assert_equal,
    bits,
    epilogue,
    in_range,
    levels_linear,
    pack,
    pack_by_limits,
    pack_signs,
    product,
    signs,
    unpack_signs,
)
from torch import Tensor

from bitorch_qlinear import _kernels, kernels

from .arguments import HEADER_BYTES, MAGIC, PANELS_OFFSET, WORDS, Case, schema
from .memory import is_inside

MOST_VALUES = 2**31 - 1
MOST_BYTES = 2**28  # the results of a case may not take more, so that any machine can run it
UNPACKED = (*FLOATS, torch.int32, torch.int8, torch.bool)
# torch itself refuses None for an operator's only tensor, tensors that are not strided, and dtypes that its stable ABI
# does not have. These errors name no argument.
UNNAMED = "no tensor arguments to this function|Could not run 'bitorch_qlinear::"
UNKNOWN_DTYPE = "Not yet supported ScalarType"


def words_for(k: int) -> int:
    return -(-k // 32)


# ---- the arguments at fault ------------------------------------------------------------------------


def is_type(argument: torch.Argument, value: Any) -> bool:
    """Return whether torch accepts the Python value for an argument of this type."""
    kind = str(argument.type)
    if value is None and (kind.startswith("Optional") or "bool" in kind):
        return True
    if "Tensor" in kind:
        return isinstance(value, Tensor) and value.layout is torch.strided
    if argument.name in ("dtype", "out_dtype"):
        return isinstance(value, torch.dtype)
    if "bool" in kind:
        return hasattr(type(value), "__bool__")
    if "int" in kind:
        return isinstance(value, int) and -(2**63) <= value < 2**63
    return isinstance(value, (int, float))


def is_words(words: Tensor, k: int) -> bool:
    form = words.dtype in WORDS and words.dim() >= 1 and words.shape[-1] == words_for(k)
    return form and words.is_contiguous() and is_inside(words)


def is_rows(x: Tensor, k: int) -> bool:
    return x.dtype in FLOATS and x.dim() >= 1 and x.shape[-1] == k and is_inside(x)


def is_vector(vector: Tensor | None, n: int) -> bool:
    return vector is None or (vector.dtype in FLOATS and vector.shape == (n,) and is_inside(vector))


def find_bit_faults(v: dict[str, Any], n: int) -> set[str]:
    """Return the arguments at fault in a product that writes bits."""
    limits, flips = v["out_limits"], v["out_flips"]
    wrong = {name for name in ("bias", "scale", "out_dtype") if v[name] is not None}
    if not (limits.dtype is torch.int32 and limits.shape == (n,) and limits.is_contiguous() and is_inside(limits)):
        wrong.add("out_limits")
    if flips is not None and not (is_words(flips, n) and flips.dim() == 1):
        wrong.add("out_flips")
    return wrong


def find_limit_faults(x: Tensor, limits: Tensor | None, flips: Tensor | None) -> set[str]:
    """Return which of the limits and flips, by which x is packed, are at fault."""
    if limits is None:
        return set() if flips is None else {"flips"}
    k = x.shape[-1]
    # torch makes a tensor of stride 0 of a tensor of zeros without memory.
    contiguous = limits.is_contiguous() and not (limits._is_zerotensor() and k > 1)
    form = limits.dtype is x.dtype and limits.shape == (k,) and contiguous and is_inside(limits)
    wrong = set() if form else {"limits"}
    return wrong if flips is None or (is_words(flips, k) and flips.dim() == 1) else wrong | {"flips"}


def is_prepared(prepared: Tensor | None) -> bool:
    """Return whether the operators accept the form; whether they use it depends on the words."""
    if prepared is None:
        return True
    form = prepared.dtype is torch.uint8 and prepared.dim() == 1 and prepared.is_contiguous() and is_inside(prepared)
    return form and len(prepared) >= HEADER_BYTES and bytes(plain(prepared)[:8].tolist()) == MAGIC


def is_forged(prepared: Tensor, genuine: Tensor) -> bool:
    """Return whether the form has the genuine form's header, size and a hash of the words, but other panels."""

    def announces(form: Tensor) -> tuple[Tensor, ...]:
        return form[8:12], form[16:32]

    given = plain(prepared)
    if len(given) != len(genuine) or not all(map(torch.equal, announces(given), announces(genuine))):
        return False
    if torch.equal(given[PANELS_OFFSET:], genuine[PANELS_OFFSET:]):
        return False
    hashes, right = (form[HEADER_BYTES : HEADER_BYTES + 80].clone().view(torch.int64) for form in (given, genuine))
    return bool((hashes == right)[right != 0].any())


def find_faults(case: Case) -> set[str]:
    """Return the arguments that the operator must refuse; its error must name one of them."""
    v = case.values
    wrong = {a.name for a in schema(case.operator) if not is_type(a, v[a.name])}
    # torch passes None on as an undefined tensor and a number as a dtype, so the error may be about any argument.
    if any(v[name] is None or (name in ("dtype", "out_dtype") and isinstance(v[name], int)) for name in wrong):
        return set(v)
    if wrong:
        return wrong
    tensors = {name for name, value in v.items() if isinstance(value, Tensor)}
    if any(v[name].is_meta for name in tensors):  # the fake implementations check the other arguments too
        return tensors | ({"k", "dtype", "out_dtype", "threshold", "bits", "layout"} & set(v))
    k = v.get("k", 0)
    if not 0 <= k <= MOST_VALUES:
        return {"k"} | tensors
    wrong |= {
        name for name in ("words", "x_words", "weight_words", "sign_words") if name in v and not is_words(v[name], k)
    }
    wrong |= {name for name in ("weight_words", "sign_words") if name in v and v[name].dim() != 2}
    if "x" in v and not is_rows(v["x"], k if "k" in v else v["x"].shape[-1] if v["x"].dim() else 0):
        wrong.add("x")
    elif "limits" in v:
        wrong |= find_limit_faults(v["x"], v["limits"], v["flips"])
    if "dtype" in v and v["dtype"] not in UNPACKED:
        wrong.add("dtype")
    if v.get("layout") not in (None, _kernels.prepared_layout().number):
        wrong.add("layout")
    if v.get("threshold") is not None and not v["threshold"] >= 0:
        wrong.add("threshold")
    if v.get("out_dtype") not in (None, *FLOATS, torch.int32):
        wrong.add("out_dtype")
    if "bits" in v and v["bits"] not in (1, 2):
        wrong.add("bits")
    if "bits" in v and v["out_dtype"] is torch.int32:
        wrong.add("out_dtype")
    if v.get("out_dtype") is torch.int32 and not (v["bias"] is None and v["scale"] is None):
        wrong.add("out_dtype")
    if "weight" in v:  # sign_linear, which has no words
        if v["weight"].dim() != 2 or not is_rows(v["weight"], v["weight"].shape[-1]):
            wrong.add("weight")
            if v["weight"].dim() == 2 and v["x"].dim() and v["x"].shape[-1] != v["weight"].shape[1]:
                wrong.add("x")  # its size is compared before the weight's memory
        else:
            n = v["weight"].shape[0]
            wrong |= {name for name in ("bias", "scale") if not is_vector(v[name], n)}
            if "x" not in wrong and v["x"].shape[-1] != v["weight"].shape[1]:
                wrong |= {"x", "weight"}
    elif "weight_words" not in wrong and "bias" in v:
        n = v["weight_words"].shape[0]
        if v.get("out_limits") is not None:
            wrong |= find_bit_faults(v, n)
        else:
            wrong |= {name for name in ("bias", "scale") if not is_vector(v[name], n)}
            wrong |= set() if v.get("out_flips") is None else {"out_flips"}
        wrong |= set() if is_prepared(v["weight_prepared"]) else {"weight_prepared"}
    if "sign_words" not in wrong and "reals" in v:
        wrong |= set() if is_rows(v["reals"], k if v["transpose"] else v["sign_words"].shape[0]) else {"reals"}
    return wrong


# ---- the results -----------------------------------------------------------------------------------


def plain(tensor: Tensor | None) -> Tensor | None:
    """Return a contiguous copy of the tensor, with uint32 viewed as int32."""
    if tensor is None:
        return None
    copy = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor._is_zerotensor() else tensor.resolve_neg().clone()
    copy = copy.contiguous()
    return copy.view(torch.int32) if copy.dtype is torch.uint32 else copy


def check_prepared(case: Case, prepared: Tensor) -> None:
    """Check the form's header and size. Its panels are checked through the products that use them."""
    n, k = case.values["weight_words"].shape[0], case.values["k"]
    panel, unit, unit_bytes, number = _kernels.prepared_layout()
    header = bytes(prepared[:HEADER_BYTES].tolist())
    numbers = [int.from_bytes(header[at : at + size], "little", signed=True) for at, size in ((8, 4), (16, 8), (24, 8))]
    assert header[:8] == MAGIC and numbers == [number, n, k], "not the header of these words"
    assert len(prepared) == PANELS_OFFSET + -(-n // panel) * -(-k // unit) * unit_bytes, "not the form's size"


def check_product(case: Case, y: Tensor, x_signs: Tensor, default: torch.dtype) -> None:
    v, out = case.values, case.values["out_dtype"] or default
    if "weight" in v:
        w_signs = signs(plain(v["weight"]), bool(v["strict_weight"]))
    else:
        words = plain(v["weight_words"])
        w_signs = unpack_signs(words, v["k"])
    integers = product(x_signs, w_signs)
    if v.get("out_limits") is not None:
        expected = bits(integers, v["k"], plain(v["out_limits"]), plain(v["out_flips"]))
    else:
        expected = epilogue(integers, plain(v["bias"]), plain(v["scale"]), out)
    if v.get("weight_prepared") is not None:
        genuine = torch.ops.bitorch_qlinear.prepare_weight(words, v["k"])
        if is_forged(v["weight_prepared"], genuine):
            assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
            return
    assert_equal(y, expected, "y")


def check_level_product(case: Case, y: Tensor) -> None:
    v, words = case.values, plain(case.values["weight_words"])
    x, out = plain(v["x"]), v["out_dtype"] or v["x"].dtype
    if v.get("weight_prepared") is not None:
        genuine = torch.ops.bitorch_qlinear.prepare_weight(words, v["k"])
        if is_forged(v["weight_prepared"], genuine):
            assert (y.shape, y.dtype) == ((*x.shape[:-1], len(words)), out)
            return
    assert_equal(y, levels_linear(x, unpack_signs(words, v["k"]), v["bits"], plain(v["bias"]), plain(v["scale"]), out))


def check_sign_product(case: Case, y: Tensor) -> None:
    """Check that y equals the scalar kernel's result bit for bit and, unless it may overflow, is nearly exact."""
    v = case.values
    reals, words = plain(v["reals"]), plain(v["sign_words"])
    with kernels.forced("scalar"):
        twin = torch.ops.bitorch_qlinear.multiply_signs(reals, words, v["k"], bool(v["transpose"]))
    assert_equal(y, twin, "y")
    matrix = unpack_signs(words, v["k"])
    matrix = matrix.T if v["transpose"] else matrix
    rows = reals.double().reshape(reals.shape[:-1].numel(), reals.shape[-1])
    exact, largest = rows @ matrix, rows.abs().sum(1, keepdim=True)
    additions, info = 69 + len(matrix) // 1920 + 1, torch.finfo(y.dtype)
    unit = 2.0**-53 if y.dtype is torch.float64 else 2.0**-24
    # The product in float64 is itself rounded, and the half types round once more.
    bound = (additions * unit + len(matrix) * 2.0**-53) * largest + exact.abs() * info.eps + info.tiny
    error = (y.reshape(exact.shape).double() - exact).abs()
    assert ((error <= bound) | ~(largest < info.max / 2)).all(), "too far from the exact product"


def check_result(case: Case, results: tuple[Tensor, ...]) -> None:
    v = case.values
    assert all(r.is_contiguous() for r in results), "a result is not contiguous"
    if case.operator == "unpack_bits":
        values = unpack_signs(plain(v["words"]), v["k"])
        assert_equal(results[0], values > 0 if v["dtype"] is torch.bool else values.to(v["dtype"]))
    elif case.operator == "prepare_weight":
        check_prepared(case, results[0])
    elif case.operator == "binary_linear":
        check_product(case, results[0], unpack_signs(plain(v["x_words"]), v["k"]), torch.float32)
    elif case.operator == "dorefa_linear":
        check_level_product(case, results[0])
    elif case.operator == "multiply_signs":
        check_sign_product(case, results[0])
    else:
        x, strict = plain(v["x"]), bool(v["strict"])
        if case.operator == "pack_bits" and v["limits"] is not None:
            assert_equal(results[0], pack_by_limits(x, plain(v["limits"]), plain(v["flips"]), strict), "words")
        elif case.operator == "pack_bits":
            assert_equal(results[0], pack_signs(x, strict), "words")
        else:
            check_product(case, results[0], signs(x, strict), x.dtype)
        if case.operator == "linear_train":
            none = torch.empty(0, dtype=torch.int32)
            ranges = none if v["threshold"] is None else pack(in_range(x, float(v["threshold"])))
            assert_equal(results[1], pack_signs(x, strict), "x_words")
            assert_equal(results[2], ranges, "in_range_words")


def without_values(case: Case) -> bool:
    """Return whether all tensors are meta tensors: fake implementations accept them, but torch may refuse them."""
    tensors = [value for value in case.values.values() if isinstance(value, Tensor)]
    return bool(tensors) and all(tensor.is_meta for tensor in tensors)


def check(case: Case) -> bool:
    """Call the operator and check its outcome.

    Returns:
        Whether the operator had to compute a result rather than refuse the arguments.

    Raises:
        AssertionError: If the outcome is wrong.
    """
    wrong = find_faults(case)
    arguments = schema(case.operator)
    args = [case.values[a.name] for a in arguments if not a.kwarg_only]
    kwargs = {a.name: case.values[a.name] for a in arguments if a.kwarg_only}
    try:
        results = getattr(torch.ops.bitorch_qlinear, case.operator)(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        message = str(error)
        if without_values(case):
            return False
        assert wrong, f"refused valid arguments: {message}"
        named = any(re.search(rf"\b{name}\b", message) for name in wrong)
        asked = case.values.get("dtype", case.values.get("out_dtype"))
        unnamed = UNNAMED if asked in (None, *UNPACKED) else f"{UNNAMED}|{UNKNOWN_DTYPE}"
        assert named or re.search(unnamed, message), f"names none of {sorted(wrong)}: {message}"
        ours = message.startswith("bitorch_qlinear: ")
        assert not ours or not re.search(r"/\w|\.cpp|\.cc\b|\.h\b|\.py\b", message), f"names a file: {message}"
        return False
    results = results if isinstance(results, tuple) else (results,)
    if without_values(case):
        assert all(r.is_meta for r in results), "meta tensors gave a result with values"
        return False
    assert not wrong, f"accepted although {sorted(wrong)} are wrong"
    assert sum(r.nbytes for r in results) <= MOST_BYTES, "results too large for a case"
    check_result(case, results)
    return True
