"""Arithmetic, bits, comparisons and conversions, against hand-computed cases and definitions in Python's integers."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from ..machine import Module, PtxError
from .helpers import HEADER, lanes

RNG = np.random.default_rng(4)
EDGES = [0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xDEADBEEF]


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def pairs(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of edge values, and random pairs."""
    edges = [*EDGES, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    values = np.array([v & ((1 << bits) - 1) for v in edges], np.uint64)
    a = np.repeat(values, len(values)), np.tile(values, len(values))
    random = [RNG.integers(0, 1 << bits, 300, dtype=np.uint64) for _ in range(2)]
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    return tuple(np.concatenate([np.array(x, np.uint64), r]).astype(dtype) for x, r in zip(a, random, strict=True))


def truncated_division(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


# Each instruction computes this from Python integers that are already read as signed or unsigned.
BINARY = {
    "add": lambda a, b, n: a + b,
    "sub": lambda a, b, n: a - b,
    "mul.lo": lambda a, b, n: a * b,
    "mul.hi": lambda a, b, n: a * b >> n,
    "div": lambda a, b, n: truncated_division(a, b),
    "rem": lambda a, b, n: a - b * truncated_division(a, b),
    "min": lambda a, b, n: min(a, b),
    "max": lambda a, b, n: max(a, b),
}


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("sign", "us")
@pytest.mark.parametrize("name", BINARY)
def test_integer_arithmetic(name, sign, bits):
    a, b = pairs(bits)
    if name in ("div", "rem"):
        a, b = a[b != 0], b[b != 0]
    read = (lambda v: signed(int(v), bits)) if sign == "s" else int
    want = [BINARY[name](read(x), read(y), bits) & ((1 << bits) - 1) for x, y in zip(a, b, strict=True)]
    for at in range(0, len(a), 512):
        part = slice(at, at + 512)
        got = lanes(f"{name}.{sign}{bits} %d, %a, %b;", a[part], b[part], out=a.dtype)
        assert got.tolist() == want[part]


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("sign", "us")
def test_wide_products(sign, bits):
    a, b = (x[:512] for x in pairs(bits))
    c = RNG.integers(0, 1 << 2 * bits, a.size, dtype=np.uint64).astype(f"u{bits // 4}")
    read = (lambda v: signed(int(v), bits)) if sign == "s" else int
    mask = (1 << 2 * bits) - 1
    products = [read(x) * read(y) for x, y in zip(a, b, strict=True)]
    assert lanes(f"mul.wide.{sign}{bits} %d, %a, %b;", a, b, out=c.dtype).tolist() == [p & mask for p in products]
    got = lanes(f"mad.wide.{sign}{bits} %d, %a, %b, %c;", a, b, c, out=c.dtype)
    assert got.tolist() == [p + int(z) & mask for p, z in zip(products, c, strict=True)]


def test_mad_sad_mul24():
    a, b, c = (np.array(v, np.uint32) for v in ([5, 0xFFFFFFFF, 1 << 31], [7, 0xFFFFFFFF, 4], [1, 2, 3]))
    assert lanes("mad.lo.u32 %d, %a, %b, %c;", a, b, c).tolist() == [36, 3, 3]
    assert lanes("mad.hi.u32 %d, %a, %b, %c;", a, b, c).tolist() == [1, 0, 5]  # (2^32-1)^2 >> 32 = 2^32 - 2
    assert lanes("mad.hi.s32 %d, %a, %b, %c;", a, b, c).tolist() == [1, 2, 1]  # -2^31 * 4 >> 32 = -2
    assert lanes("sad.u32 %d, %a, %b, %c;", a, b, c).tolist() == [3, 2, (1 << 31) - 4 + 3]
    assert lanes("mul24.lo.u32 %d, %a, %b;", a, b).tolist() == [35, (0xFFFFFF * 0xFFFFFF) & 0xFFFFFFFF, 0]
    assert lanes("add.sat.s32 %d, %a, %b;", a, b).tolist() == [12, 0xFFFFFFFE, 0x80000004]
    assert lanes("sub.sat.s32 %d, %a, %b;", b, a).tolist() == [2, 0, 0x7FFFFFFF]


def test_carries():
    """Carries make 128-bit sums and differences of 64-bit halves, and a 64 x 64 product from 32-bit parts."""
    a, b = (RNG.integers(0, 1 << 64, 40, dtype=np.uint64) for _ in range(2))
    a[:3], b[:3] = [2**64 - 1, 0, 2**63], [1, 1, 2**63]
    high = lanes("add.cc.u64 %rd1, %a, %b; addc.u64 %d, %a, %b;", a, b, out=np.uint64)
    assert high.tolist() == [(int(x) + int(y) + (int(x) + int(y) >> 64)) % 2**64 for x, y in zip(a, b, strict=True)]
    high = lanes("sub.cc.u64 %rd1, %a, %b; subc.u64 %d, %a, %b;", a, b, out=np.uint64)
    assert high.tolist() == [(int(x) - int(y) - (int(x) < int(y))) % 2**64 for x, y in zip(a, b, strict=True)]
    a32, b32 = a.astype(np.uint32), b.astype(np.uint32)
    body = "mad.lo.cc.u32 %r1, %a, %b, %a; madc.hi.u32 %d, %a, %b, 0;"
    want = [int(x) * int(y) + int(x) >> 32 for x, y in zip(a32, b32, strict=True)]
    assert lanes(body, a32, b32).tolist() == want


def test_absolute_values_and_negation():
    a = np.array([0, 1, -1, -(2**31), 2**31 - 1], np.int32)
    assert lanes("abs.s32 %d, %a;", a, out=np.int32).tolist() == [0, 1, 1, -(2**31), 2**31 - 1]
    assert lanes("neg.s32 %d, %a;", a, out=np.int32).tolist() == [0, -1, 1, -(2**31), -(2**31) + 1]


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic_and_shifts(bits):
    a, b = (x[:512] for x in pairs(bits))
    mask = (1 << bits) - 1
    ints = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert lanes(f"and.b{bits} %d, %a, %b;", a, b, out=a.dtype).tolist() == [x & y for x, y in ints]
    assert lanes(f"or.b{bits} %d, %a, %b;", a, b, out=a.dtype).tolist() == [x | y for x, y in ints]
    assert lanes(f"xor.b{bits} %d, %a, %b;", a, b, out=a.dtype).tolist() == [x ^ y for x, y in ints]
    assert lanes(f"not.b{bits} %d, %a;", a, out=a.dtype).tolist() == [x ^ mask for x, _ in ints]
    assert lanes(f"cnot.b{bits} %d, %a;", a, out=a.dtype).tolist() == [int(x == 0) for x, _ in ints]
    amount = (b % np.array(2 * bits, b.dtype)).astype(np.uint32)  # amounts past the width are clamped
    shifts = [(x, int(n)) for (x, _), n in zip(ints, amount, strict=True)]
    assert lanes(f"shl.b{bits} %d, %a, %b;", a, amount, out=a.dtype).tolist() == [x << n & mask for x, n in shifts]
    assert lanes(f"shr.u{bits} %d, %a, %b;", a, amount, out=a.dtype).tolist() == [x >> n for x, n in shifts]
    want = [signed(x, bits) >> n & mask for x, n in shifts]
    assert lanes(f"shr.s{bits} %d, %a, %b;", a, amount, out=a.dtype).tolist() == want


def test_funnel_shifts():
    a, b = (x[:512] for x in pairs(32))
    n = RNG.integers(0, 70, a.size).astype(np.uint32)
    for mode, amount in (("wrap", lambda v: v & 31), ("clamp", lambda v: min(v, 32))):
        both = [((int(y) << 32 | int(x)), amount(int(k))) for x, y, k in zip(a, b, n, strict=True)]
        left = lanes(f"shf.l.{mode}.b32 %d, %a, %b, %c;", a, b, n)
        assert left.tolist() == [(v << k >> 32) & 0xFFFFFFFF for v, k in both]
        right = lanes(f"shf.r.{mode}.b32 %d, %a, %b, %c;", a, b, n)
        assert right.tolist() == [(v >> k) & 0xFFFFFFFF for v, k in both]


def test_lop3_is_its_table():
    a, b = (x[:512] for x in pairs(32))
    c = a[::-1].copy()
    # The ISA defines immLut = F(0xF0, 0xCC, 0xAA).
    for function, f in {0xF0 & 0xCC & 0xAA: lambda x, y, z: x & y & z, 0x96: lambda x, y, z: x ^ y ^ z}.items():
        assert lanes(f"lop3.b32 %d, %a, %b, %c, {function};", a, b, c).tolist() == f(a, b, c).tolist()
    select = (0xF0 & 0xCC) | (~0xF0 & 0xAA)
    assert lanes(f"lop3.b32 %d, %a, %b, %c, {select};", a, b, c).tolist() == ((a & b) | (~a & c)).tolist()


def test_prmt():
    a, b = np.full(8, 0x83020100, np.uint32), np.full(8, 0x87060584, np.uint32)
    selectors = np.array([0x3210, 0x7654, 0x0123, 0x4567, 0xFFFF, 0x8888, 0xB040, 0xC0DE], np.uint32)
    want = [0x83020100, 0x87060584, 0x00010283, 0x84050687, 0xFFFFFFFF, 0x00000000, 0xFF008400, 0xFF000000]
    assert lanes("prmt.b32 %d, %a, %b, %c;", a, b, selectors).tolist() == want
    a, b = np.full(8, 0x03020100, np.uint32), np.full(8, 0x07060504, np.uint32)
    n = np.array([0, 1, 2, 3, 4, 0x3211, 0xFFFFFFFE, 7], np.uint32)  # the modes use only two bits of the selector
    modes = {
        "f4e": [0x03020100, 0x04030201, 0x05040302, 0x06050403],
        "b4e": [0x05060700, 0x06070001, 0x07000102, 0x00010203],
        "rc8": [0x00000000, 0x01010101, 0x02020202, 0x03030303],
        "ecl": [0x03020100, 0x03020101, 0x03020202, 0x03030303],
        "ecr": [0x00000000, 0x01010100, 0x02020100, 0x03020100],
        "rc16": [0x01000100, 0x03020302, 0x01000100, 0x03020302],
    }
    for mode, want in modes.items():
        assert lanes(f"prmt.b32.{mode} %d, %a, %b, %c;", a, b, n).tolist() == want * 2, mode


def test_bit_fields():
    a = np.array([0xDEADBEEF] * 6, np.uint32)
    start = np.array([0, 4, 28, 31, 40, 8], np.uint32)
    length = np.array([8, 12, 8, 1, 4, 0], np.uint32)
    assert lanes("bfe.u32 %d, %a, %b, %c;", a, start, length).tolist() == [0xEF, 0xBEE, 0xD, 1, 0, 0]
    want = [0xFFFFFFEF, 0xFFFFFBEE, 0xFFFFFFFD, 0xFFFFFFFF, 0xFFFFFFFF, 0]
    assert lanes("bfe.s32 %d, %a, %b, %c;", a, start, length).tolist() == want
    fields = np.array([0x5] * 4, np.uint32)
    assert lanes("bfi.b32 %d, %a, 0xFFFFFFFF, %b, 4;", fields, np.array([0, 4, 30, 33], np.uint32)).tolist() == [
        *(0xFFFFFFF5, 0xFFFFFF5F, 0x7FFFFFFF, 0xFFFFFFFF)
    ]
    assert lanes(
        "szext.wrap.s32 %d, %a, %b;", np.array([0x80, 0x7F], np.uint32), np.array([8, 8], np.uint32)
    ).tolist() == [*(0xFFFFFF80, 0x7F)]


def test_counting_bits():
    a = np.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x00F0, 0x7FFFFFFF], np.uint32)
    assert lanes("popc.b32 %d, %a;", a).tolist() == [0, 1, 1, 32, 4, 31]
    assert lanes("clz.b32 %d, %a;", a).tolist() == [32, 31, 0, 0, 24, 1]
    assert lanes("brev.b32 %d, %a;", a).tolist() == [0, 0x80000000, 1, 0xFFFFFFFF, 0x0F000000, 0xFFFFFFFE]
    none = 0xFFFFFFFF
    assert lanes("bfind.u32 %d, %a;", a).tolist() == [none, 0, 31, 31, 7, 30]
    assert lanes("bfind.s32 %d, %a;", a).tolist() == [none, 0, 30, none, 7, 30]
    assert lanes("bfind.shiftamt.u32 %d, %a;", a).tolist() == [none, 31, 0, 0, 24, 1]
    wide = np.array([0, 1 << 40, 2**64 - 1], np.uint64)
    assert lanes("popc.b64 %d, %a;", wide).tolist() == [0, 1, 64]
    assert lanes("clz.b64 %d, %a;", wide).tolist() == [64, 23, 0]
    assert lanes("brev.b64 %d, %a;", wide, out=np.uint64).tolist() == [0, 1 << 23, 2**64 - 1]


def test_dp4a():
    a, b = np.array([0x01020304, 0xFF80FF7F], np.uint32), np.array([0x01010101, 0x02FF0102], np.uint32)
    c = np.array([100, 0], np.uint32)
    assert lanes("dp4a.u32.u32 %d, %a, %b, %c;", a, b, c).tolist() == [110, 255 * 2 + 128 * 255 + 255 + 127 * 2]
    assert lanes("dp4a.s32.s32 %d, %a, %b, %c;", a, b, c, out=np.int32).tolist() == [110, -2 + 128 - 1 + 254]
    assert lanes("dp4a.s32.u32 %d, %a, %b, %c;", a, b, c, out=np.int32).tolist() == [110, -2 - 128 * 255 - 1 + 254]


# ---- Comparison, selection -------------------------------------------------------------------------------------------
COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
SELECT = "selp.u32 %d, 1, 0, %p1;"


@pytest.mark.parametrize("name", COMPARE)
def test_integer_comparisons(name):
    a, b = (x[:512] for x in pairs(32))
    for kind, x, y in (("u32", a, b), ("s32", a.view(np.int32), b.view(np.int32))):
        got = lanes(f"setp.{name}.{kind} %p1, %a, %b; {SELECT}", x, y)
        assert got.tolist() == COMPARE[name](x, y).astype(int).tolist()
        got = lanes(f"set.{name}.u32.{kind} %d, %a, %b;", x, y)
        assert got.tolist() == np.where(COMPARE[name](x, y), 0xFFFFFFFF, 0).tolist()
    unsigned = {"lt": "lo", "le": "ls", "gt": "hi", "ge": "hs"}.get(name)
    if unsigned:
        got = lanes(f"setp.{unsigned}.u32 %p1, %a, %b; {SELECT}", a, b)
        assert got.tolist() == COMPARE[name](a, b).astype(int).tolist()


@pytest.mark.parametrize("kind", ["f16", "f32", "f64"])
def test_float_comparisons(kind):
    values = np.array([-np.inf, -1, -0.0, 0.0, 1, np.inf, np.nan], {"f16": "f2", "f32": "f4", "f64": "f8"}[kind])
    a, b = np.repeat(values, 7), np.tile(values, 7)
    unordered = np.isnan(a) | np.isnan(b)
    for name, compare in COMPARE.items():
        want = compare(a, b) & ~unordered
        got = lanes(f"setp.{name}.{kind} %p1, %a, %b; {SELECT}", a, b)
        assert got.tolist() == want.astype(int).tolist(), name
        got = lanes(f"setp.{name}u.{kind} %p1, %a, %b; {SELECT}", a, b)
        assert got.tolist() == (want | unordered).astype(int).tolist(), name
    assert lanes(f"setp.num.{kind} %p1, %a, %b; {SELECT}", a, b).tolist() == (~unordered).astype(int).tolist()
    assert lanes(f"setp.nan.{kind} %p1, %a, %b; {SELECT}", a, b).tolist() == unordered.astype(int).tolist()
    assert (lanes(f"set.gt.f32.{kind} %d, %a, %b;", a, b, out=np.float32) == np.where(a > b, 1.0, 0.0)).all()


def test_setp_combined_and_both_destinations():
    a, b, c = (np.array(v, np.uint32) for v in ([0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]))
    for name, f in {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}.items():
        for bang in ("", "!"):
            other = c != 0 if not bang else c == 0
            body = f"setp.ne.u32 %p0, %c, 0; setp.gt.{name}.u32 %p1|%p2, %a, %b, {bang}%p0;"
            body += "selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; or.b32 %d, %r1, %r2;"
            want = f(a > b, other) + 2 * f(~(a > b), other).astype(int)
            assert lanes(body, a, b, c).tolist() == want.tolist(), (name, bang)


def test_predicates_and_selection():
    a = np.arange(8, dtype=np.uint32)
    body = """
    setp.lt.u32 %p1, %a, 4; setp.ge.u32 %p2, %a, 2; and.pred %p3, %p1, %p2; not.pred %p4, %p3; xor.pred %p5, %p4, %p1;
    selp.b32 %d, %a, 99, %p5;
    """
    want = [x if (not (2 <= x < 4)) != (x < 4) else 99 for x in range(8)]
    assert lanes(body, a).tolist() == want
    c = np.array([-1.0, -0.0, 0.0, 2.0], np.float32)
    assert lanes("slct.u32.f32 %d, 7, 8, %a;", c).tolist() == [8, 7, 7, 7]
    assert lanes("slct.u32.s32 %d, 7, 8, %a;", np.array([-5, 0, 5], np.int32)).tolist() == [8, 7, 7]


# ---- Floats ----------------------------------------------------------------------------------------------------------
def floats(dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    special = [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 65504, 1e-7, 3.14159, 6e-8, -2.5]
    with np.errstate(over="ignore"):
        values = np.array(special).astype(dtype)
        random = (RNG.standard_normal((3, 300)) * 2.0 ** RNG.integers(-12, 12, (3, 300))).astype(dtype)
    a, b = np.repeat(values, values.size), np.tile(values, values.size)
    return tuple(np.concatenate([x, r]) for x, r in zip((a, b, b[::-1]), random, strict=True))


def same(got: np.ndarray, want: np.ndarray) -> None:
    """Assert equal values, zeros of equal sign, and NaN at the same places."""
    nan = np.isnan(want)
    assert (np.isnan(got) == nan).all()
    bits = f"u{want.itemsize}"
    assert (got.view(bits)[~nan] == want.view(bits)[~nan]).all()


@pytest.mark.parametrize("kind", ["f16", "f32", "f64"])
def test_float_arithmetic(kind):
    dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]
    a, b, c = floats(dtype)
    with np.errstate(all="ignore"):
        same(lanes(f"add.rn.{kind} %d, %a, %b;", a, b, out=dtype), a + b)
        same(lanes(f"sub.rn.{kind} %d, %a, %b;", a, b, out=dtype), a - b)
        same(lanes(f"mul.rn.{kind} %d, %a, %b;", a, b, out=dtype), a * b)
        same(lanes(f"neg.{kind} %d, %a;", a, out=dtype), -a)
        same(lanes(f"abs.{kind} %d, %a;", a, out=dtype), np.abs(a))
        if kind != "f16":
            same(lanes(f"div.rn.{kind} %d, %a, %b;", a, b, out=dtype), a / b)
            same(lanes(f"sqrt.rn.{kind} %d, %a;", a, out=dtype), np.sqrt(a))
            same(lanes(f"rcp.rn.{kind} %d, %a;", a, out=dtype), 1 / a)
        same(
            lanes(f"min.{kind} %d, %a, %b;", a, b, out=dtype),
            np.where(
                (a == 0) & (b == 0), np.copysign(a, np.minimum(np.copysign(1, a), np.copysign(1, b))), np.fmin(a, b)
            ).astype(dtype),
        )
        if kind != "f64":
            # In a wider type the product is exact. Rounding the sum twice matters only near ties, which do not occur.
            wide = np.longdouble
            exact = a.astype(wide) * b.astype(wide) + c.astype(wide)
            same(lanes(f"fma.rn.{kind} %d, %a, %b, %c;", a, b, c, out=dtype), exact.astype(dtype))


def test_fma_rounds_once():
    eps = np.float32(2.0**-23)
    a, c = np.array([1 + eps], np.float32), np.array([-1], np.float32)
    assert lanes("fma.rn.f32 %d, %a, %a, %b;", a, c, out=np.float32)[0] == np.float32(2 * float(eps) + float(eps) ** 2)
    # In half, 2^-24 * (1 + 2^-10) + 1 is just above a tie.
    a, b, c = (np.array([v], np.float16) for v in (1 + 2**-10, 2**-11, 1))
    assert lanes("fma.rn.f16 %d, %a, %b, %c;", a, b, c, out=np.float16)[0] == np.float16(1 + 2**-10)


def test_rounding_directions():
    one, tiny = np.array([1, -1], np.float32), np.array([2.0**-40, -(2.0**-40)], np.float32)
    up, down = np.nextafter(np.float32(1), np.float32(2)), np.nextafter(np.float32(-1), np.float32(-2))
    assert lanes("add.rz.f32 %d, %a, %b;", one, tiny, out=np.float32).tolist() == [1, -1]
    assert lanes("add.rp.f32 %d, %a, %b;", one, tiny, out=np.float32).tolist() == [up, -1]
    assert lanes("add.rm.f32 %d, %a, %b;", one, tiny, out=np.float32).tolist() == [1, down]
    assert lanes("add.rn.f32 %d, %a, %b;", one, tiny, out=np.float32).tolist() == [1, -1]
    third = np.array([3], np.float32)
    below = np.float32(0.33333331)
    assert lanes("rcp.rz.f32 %d, %a;", third, out=np.float32).tolist() == [below]
    assert lanes("rcp.rp.f32 %d, %a;", third, out=np.float32).tolist() == [np.nextafter(below, np.float32(1))]
    tenth = np.array([0.1], np.float64)
    assert lanes("add.rp.f64 %d, %a, %a;", np.array([1.0]), out=np.float64).tolist() == [2.0]
    assert lanes("mul.rz.f64 %d, %a, %b;", tenth, tenth, out=np.float64)[0] == 0.010000000000000002 - 2**-59


def test_flush_and_saturation():
    a = np.array([1e-40, -1e-40, 1.5, -2.0, np.nan], np.float32)
    got = lanes("add.ftz.f32 %d, %a, 0f00000000;", a, out=np.float32)
    assert got[:2].tolist() == [0, 0] and got[2:4].tolist() == [1.5, -2]
    assert lanes("add.f32 %d, %a, 0f00000000;", a, out=np.float32)[0] == a[0]
    assert lanes("add.sat.f32 %d, %a, 0f00000000;", a, out=np.float32)[2:].tolist() == [1, 0, 0]


def test_min_max_of_nan():
    a, b = np.array([np.nan, 1, np.nan, -0.0], np.float32), np.array([1, np.nan, np.nan, 0.0], np.float32)
    low = lanes("min.f32 %d, %a, %b;", a, b, out=np.float32)
    assert low[:2].tolist() == [1, 1] and np.isnan(low[2]) and np.signbit(low[3])
    assert not np.signbit(lanes("max.f32 %d, %a, %b;", a, b, out=np.float32)[3])
    assert np.isnan(lanes("max.NaN.f32 %d, %a, %b;", a, b, out=np.float32)[:3]).all()
    assert lanes("add.f32 %d, %a, %b;", a, b).tolist()[:3] == [0x7FFFFFFF] * 3  # canonical NaN


def test_approximate_functions():
    a = np.array([0.25, 1, 2, 9], np.float32)
    for name, f in {
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "ex2": np.exp2,
        "lg2": np.log2,
        "sin": np.sin,
        "cos": np.cos,
        "tanh": np.tanh,
    }.items():
        got = lanes(f"{name}.approx.f32 %d, %a;", a, out=np.float32)
        assert np.allclose(got, f(a.astype(np.float64)), rtol=1e-6)
    assert lanes("div.full.f32 %d, %a, %b;", a, a, out=np.float32).tolist() == [1] * 4
    assert lanes("div.approx.ftz.f32 %d, %a, %b;", a, a, out=np.float32).tolist() == [1] * 4


def test_classes_signs_and_relu():
    a = np.array([0.0, 1.5, 1e-40, np.inf, np.nan, -2], np.float32)
    for name, want in {
        "finite": [1, 1, 1, 0, 0, 1],
        "infinite": [0, 0, 0, 1, 0, 0],
        "number": [1, 1, 1, 1, 0, 1],
        "notanumber": [0, 0, 0, 0, 1, 0],
        "normal": [0, 1, 0, 0, 0, 1],
        "subnormal": [0, 0, 1, 0, 0, 0],
    }.items():
        assert lanes(f"testp.{name}.f32 %p1, %a; {SELECT}", a).tolist() == want, name
    assert lanes("copysign.f32 %d, %a, 0f40000000;", a[[0, 1, 5]], out=np.float32).tolist() == [2, 2, -2]
    half = np.array([-1.5, 2], np.float16)
    assert lanes("fma.rn.relu.f16 %d, %a, %b, %a;", half, half * 0, out=np.float16).tolist() == [0, 2]
    wide = np.array([2.0**-60, 1], np.float64)
    assert lanes("fma.rn.f64 %d, %a, %a, %b;", wide, -wide * wide, out=np.float64).tolist() == [0, 0]


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even by the bits of float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def test_bf16():
    x = np.concatenate([floats(np.float32)[0], np.array([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40], np.float32)])
    assert lanes("cvt.rn.bf16.f32 %d, %a;", x, out=np.uint16).tolist() == to_bf16(x).tolist()
    a, b = to_bf16(x), to_bf16(x[::-1].copy())
    with np.errstate(all="ignore"):
        for name, want in {"add": from_bf16(a) + from_bf16(b), "mul": from_bf16(a) * from_bf16(b)}.items():
            assert lanes(f"{name}.rn.bf16 %d, %a, %b;", a, b, out=np.uint16).tolist() == to_bf16(want).tolist()
    same(lanes("cvt.f32.bf16 %d, %a;", a, out=np.float32), from_bf16(a))
    got = lanes("setp.lt.bf16 %p1, %a, %b; " + SELECT, a, b)
    assert got.tolist() == (from_bf16(a) < from_bf16(b)).astype(int).tolist()


def test_packed_halves():
    a, b, _ = floats(np.float16)
    a, b = a[: a.size // 2 * 2], b[: b.size // 2 * 2]
    pa, pb = a.view(np.uint32), b.view(np.uint32)
    with np.errstate(all="ignore"):
        same(lanes("add.f16x2 %d, %a, %b;", pa, pb).view(np.float16), a + b)
        same(lanes("mul.rn.f16x2 %d, %a, %b;", pa, pb).view(np.float16), a * b)
        same(lanes("neg.f16x2 %d, %a;", pa).view(np.float16), -a)
        want = np.where(a < b, 0xFFFF, 0).astype(np.uint16).view(np.uint32)
        assert lanes("set.lt.u32.f16x2 %d, %a, %b;", pa, pb).tolist() == want.tolist()
        body = "setp.lt.f16x2 %p1|%p2, %a, %b; selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; or.b32 %d, %r1, %r2;"
        assert lanes(body, pa, pb).tolist() == ((a < b)[::2] + 2 * (a < b)[1::2].astype(int)).tolist()
    x = np.array([1.0, -2.5], np.float32)
    packed = np.array([*x.astype(np.float16)]).view(np.uint32)[0]
    assert lanes("cvt.rn.f16x2.f32 %d, %b, %a;", x[:1], x[1:])[0] == packed  # d = {high: first, low: second}
    assert lanes("cvt.rn.bf16x2.f32 %d, %b, %a;", x[:1], x[1:])[0] == to_bf16(x).view(np.uint32)[0]


# ---- cvt -------------------------------------------------------------------------------------------------------------
def test_integer_conversions():
    a = np.array([0, 1, 0x7F, 0x80, 0xFF, 0x8000, 0xFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)
    ints = [int(v) for v in a]
    assert lanes("cvt.s64.s32 %d, %a;", a, out=np.int64).tolist() == [signed(v, 32) for v in ints]
    assert lanes("cvt.u64.u32 %d, %a;", a, out=np.uint64).tolist() == ints
    assert lanes("cvt.s32.s8 %d, %a;", a, out=np.int32).tolist() == [signed(v, 8) for v in ints]
    assert lanes("cvt.u32.u8 %d, %a;", a).tolist() == [v & 0xFF for v in ints]
    assert lanes("cvt.u32.s16 %d, %a;", a).tolist() == [signed(v, 16) & 0xFFFFFFFF for v in ints]
    assert lanes("cvt.u16.u32 %d, %a;", a, out=np.uint16).tolist() == [v & 0xFFFF for v in ints]
    assert lanes("cvt.sat.s8.s32 %d, %a;", a, out=np.int32).tolist() == [
        max(-128, min(127, signed(v, 32))) for v in ints
    ]
    assert lanes("cvt.sat.u8.s32 %d, %a;", a).tolist() == [max(0, min(255, signed(v, 32))) for v in ints]


def test_floats_to_integers():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e20, -1e20, np.nan, 2.9999, np.inf], np.float32)
    top, bottom = 2**31 - 1, -(2**31)
    want = {
        "rni": [0, 2, 2, 0, -2, top, bottom, 0, 3, top],
        "rzi": [0, 1, 2, 0, -1, top, bottom, 0, 2, top],
        "rmi": [0, 1, 2, -1, -2, top, bottom, 0, 2, top],
        "rpi": [1, 2, 3, 0, -1, top, bottom, 0, 3, top],
    }
    for mode, values in want.items():
        assert lanes(f"cvt.{mode}.s32.f32 %d, %a;", x, out=np.int32).tolist() == values, mode
    assert lanes("cvt.rzi.u32.f32 %d, %a;", x).tolist() == [0, 1, 2, 0, 0, 2**32 - 1, 0, 0, 2, 2**32 - 1]
    got = lanes("cvt.rzi.s64.f32 %d, %a;", x, out=np.int64).tolist()
    assert got == [0, 1, 2, 0, -1, 2**63 - 1, -(2**63), -(2**63), 2, 2**63 - 1]
    assert lanes("cvt.rni.f32.f32 %d, %a;", x[:5], out=np.float32).tolist() == [0, 2, 2, -0.0, -2]


def test_integers_to_floats():
    a = np.array([0, 1, 2**24 + 1, 2**24 + 3, 2**31 - 1, -(2**31), -1], np.int32)
    assert (lanes("cvt.rn.f32.s32 %d, %a;", a, out=np.float32) == a.astype(np.float32)).all()
    assert lanes("cvt.rz.f32.s32 %d, %a;", a, out=np.float32).tolist()[2:5] == [2**24, 2**24 + 2, 2**31 - 128]
    assert lanes("cvt.rp.f32.s32 %d, %a;", a, out=np.float32).tolist()[2:5] == [2**24 + 2, 2**24 + 4, 2**31]
    b = RNG.integers(0, 2**64, 200, dtype=np.uint64)
    assert (lanes("cvt.rn.f32.u64 %d, %a;", b, out=np.float32) == b.astype(np.float32)).all()
    assert (lanes("cvt.rn.f64.u64 %d, %a;", b, out=np.float64) == b.astype(np.float64)).all()
    tie = np.array([2**63 + 2**39, 2**63 + 2**39 + 1], np.uint64)  # a tie in float32, and just above it
    assert lanes("cvt.rn.f32.u64 %d, %a;", tie, out=np.float32).tolist() == [2.0**63, 2.0**63 + 2.0**40]
    assert (lanes("cvt.rn.f16.s32 %d, %a;", a[:2], out=np.float16) == [0, 1]).all()


def test_floats_to_floats():
    x = floats(np.float32)[0]
    x = np.concatenate([x, np.array([1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, 2**-25, 2**-25 * 1.001], np.float32)])
    with np.errstate(over="ignore"):
        same(lanes("cvt.rn.f16.f32 %d, %a;", x, out=np.float16), x.astype(np.float16))
        half = x.astype(np.float16)
    same(lanes("cvt.f32.f16 %d, %a;", half, out=np.float32), half.astype(np.float32))
    same(lanes("cvt.f64.f32 %d, %a;", x, out=np.float64), x.astype(np.float64))
    wide = RNG.standard_normal(100)
    same(lanes("cvt.rn.f32.f64 %d, %a;", wide, out=np.float32), wide.astype(np.float32))
    toward_zero = lanes("cvt.rz.f32.f64 %d, %a;", wide, out=np.float32).astype(np.float64)
    assert (np.abs(toward_zero) <= np.abs(wide)).all() and (np.abs(toward_zero - wide) < np.abs(wide) * 2**-22).all()
    assert lanes("cvt.rz.f16.f32 %d, %a;", np.array([65519, 1e9], np.float32), out=np.float16).tolist() == [
        65504,
        65504,
    ]
    assert lanes("cvt.sat.f32.f32 %d, %a;", np.array([-1, 0.5, 2], np.float32), out=np.float32).tolist() == [0, 0.5, 1]


def test_every_half_round_trips():
    bits = np.arange(65536, dtype=np.uint16)
    for at in range(0, 65536, 1024):
        part = bits[at : at + 1024]
        half = part.view(np.float16)
        got = lanes("cvt.f32.f16 %d, %a;", half, out=np.float32)
        same(got, half.astype(np.float32))
        back = lanes("cvt.rn.f16.f32 %d, %a;", got, out=np.uint16)
        assert (back == part)[~np.isnan(half)].all()


# ---- mov, literals, special registers --------------------------------------------------------------------------------
def test_packing():
    a = np.array([0x11223344], np.uint32)
    body = "mov.b32 {%h1, %h2}, %a; mov.b32 %d, {%h2, %h1};"
    assert lanes(body, a).tolist() == [0x33441122]
    body = "mov.b64 %rd1, {%a, %r1}; mov.b64 {%r2, %d}, %rd1;"
    assert lanes("mov.u32 %r1, 7;" + body, a).tolist() == [7]
    assert lanes("mov.b64 %rd1, {%a, %a}; mov.b64 {_, %d}, %rd1;", a).tolist() == a.tolist()


def test_literals():
    assert lanes("mov.f32 %d, 0f3FC00000;", threads=1, out=np.float32).tolist() == [1.5]
    assert lanes("mov.f64 %d, 0d3FF8000000000000;", threads=1, out=np.float64).tolist() == [1.5]
    assert lanes("mov.f32 %d, 2.5;", threads=1, out=np.float32).tolist() == [2.5]
    assert lanes("mov.u32 %d, 0xFFU;", threads=1).tolist() == [255]
    assert lanes("mov.u32 %d, -1;", threads=1).tolist() == [2**32 - 1]
    assert lanes("mov.u32 %d, 017;", threads=1).tolist() == [15]
    assert lanes("mov.u32 %d, WARP_SZ;", threads=1).tolist() == [32]
    assert lanes("mov.b32 %d, 0f3F800000;", threads=1).tolist() == [struct.unpack("<I", struct.pack("<f", 1))[0]]


def test_special_registers():
    index = np.arange(70)
    assert lanes("mov.u32 %d, %laneid;", threads=70).tolist() == (index % 32).tolist()
    assert lanes("mov.u32 %d, %warpid;", threads=70).tolist() == (index // 32).tolist()
    assert lanes("mov.u32 %d, %ntid.x;", threads=70).tolist() == [70] * 70
    assert lanes("mov.u32 %d, %lanemask_lt;", threads=70).tolist() == [(1 << i % 32) - 1 for i in index]
    assert lanes("mov.u32 %d, %lanemask_ge;", threads=70).tolist() == [2**32 - (1 << i % 32) for i in index]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate.u32 %r1, %r2;", "'frobnicate.u32': the instruction is not known"),
        ("add.banana.u32 %r1, %r2, %r3;", "the modifier '.banana' is not known here"),
        ("ld.global.L3::u32 %r1, [%rd1];", "the modifier '.L3::u32' is not known|lacks a type"),
        ("mov.u32 %r1, %frob;", "the special register %frob is not known"),
        ("add.u32 %r1, %r2;", "has 2 operands, not 3"),
        ("bar.arrive 1;", "arrive lacks a thread count"),
        ("bra NOWHERE;", "'NOWHERE' is not declared"),
        ("call foo;", "functions that are not inlined"),
        (
            "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%fd1,%fd2},{%fd3},{%fd4},{%fd1,%fd2};",
            "shape is not known",
        ),
        ("tcgen05.fence.sync.aligned;", "the instruction is not known"),
        ("setp.lt.b128 %p1, %r1, %r2;", "not known for this type"),
    ],
)
def test_what_is_not_known_is_an_error(line, message):
    registers = ".reg .b32 %r<9>; .reg .b64 %rd<3>; .reg .f64 %fd<9>; .reg .pred %p<3>;"
    text = f"{HEADER}.entry k() {{ {registers}\n{line}\nret; }}"
    with pytest.raises(PtxError, match=message):
        Module.from_ptx(text).kernel("k")


def test_every_instruction_has_a_test():
    """Each opcode in the interpreter's table of families occurs in a test or a textbook kernel."""
    tests, package = Path(__file__).parent, Path(__file__).parents[1]
    table = re.search(r"kFamilies\[\] = \{(.*?)\n\};", (package / "interpreter.cpp").read_text(), re.DOTALL)
    families = re.findall(r'\{"(\w+)",', table[1])
    text = "\n".join(f.read_text() for f in (*tests.glob("test_*.py"), *(package / "kernels").glob("*.ptx")))
    assert len(families) > 70
    assert [f for f in families if not re.search(rf"(?<![\w.]){f}[.; ]", text) and f'"{f}' not in text] == []
