"""Tests of state spaces, widths, generic addresses, parameters, atomics and the directives of nvcc."""

import numpy as np
import pytest

from ..machine import In, InOut, Module, Out, PtxError, Struct
from ..parser import parse
from .helpers import HEADER, lanes, module, run

STORE = "mad.wide.u32 %at, %tid, 4, %out; st.global.u32 [%at], %r1;"


def words(body: str, threads: int = 32, **kwargs) -> list[int]:
    """Return the value that the statements leave in %r1, for each thread."""
    out = np.zeros(threads * kwargs.get("grid", 1), np.uint32)
    args = [Out(out), *kwargs.pop("args", [])]
    run(body + STORE, args, threads, **kwargs)
    return out.tolist()


@pytest.mark.parametrize(("kind", "bits"), [("u8", 8), ("s8", 8), ("u16", 16), ("s16", 16), ("u32", 32), ("s32", 32)])
def test_loads_extend(kind, bits):
    """A register may be wider than the loaded value; zeros or signs fill it."""
    x = np.array([0x80FF80FF, 0x7F010203], np.uint32).view(f"u{bits // 8}")
    body = f"""
    ld.param.u64 %rd1, [x]; mad.wide.u32 %rd1, %tid, {bits // 8}, %rd1; ld.global.{kind} %rd2, [%rd1];
    mad.wide.u32 %at, %tid, 8, %out; st.global.u64 [%at], %rd2;"""
    out = np.zeros(x.size, np.uint64)
    run(body, [Out(out), In(x)], x.size, params=".param .u64 out, .param .u64 x")
    want = x.view(f"i{bits // 8}").astype(np.int64).view(np.uint64) if kind[0] == "s" else x
    assert out.tolist() == want.tolist()


@pytest.mark.parametrize("space", ["shared", "local", "global"])
@pytest.mark.parametrize(
    ("vector", "kind"), [(1, "u8"), (1, "u64"), (2, "u32"), (4, "u32"), (4, "u16"), (2, "u64"), (8, "u32")]
)
def test_vectors_in_every_space(space, vector, kind):
    """Element e of a stored vector lies e elements further; loads of single elements find it."""
    size = int(kind[1:]) // 8
    registers = {"u8": "h", "u16": "h", "u32": "r", "u64": "rd"}[kind]
    own = "" if space == "global" else f".{space} .align 32 .b8 memory[{32 * vector * size}];"
    names = [f"%{registers}{k + 3}" for k in range(vector)]
    fill = "".join(
        f"cvt.u{max(8 * size, 16)}.u32 {name}, %r0;" if size != 4 else f"mov.u32 {name}, %r0;" for name in names
    )
    step = "add.u32 %r0, %r0, 1;"
    fill = step.join(f + ";" for f in fill.split(";") if f)
    group = "{" + ", ".join(names) + "}" if vector > 1 else names[0]
    shape = f".v{vector}" if vector > 1 else ""
    base = "mov.u64 %rd1, memory;" if own else "ld.param.u64 %rd1, [scratch];"
    body = f"""
    {own}
    {base} mul.lo.u32 %r2, %tid, {vector * size}; cvt.u64.u32 %rd2, %r2; add.u64 %rd1, %rd1, %rd2;
    mul.lo.u32 %r0, %tid, {vector}; {fill}
    st.{space}{shape}.{kind} [%rd1], {group};
    mov.u32 %r1, 0;
    """
    for k in range(vector):
        body += f"ld.{space}.{kind} %rd9, [%rd1+{k * size}]; cvt.u32.u64 %r9, %rd9; mad.lo.u32 %r1, %r1, 3, %r9;"
    scratch = Out(np.zeros(32 * vector * size, np.uint8))
    got = words(body, params=".param .u64 out, .param .u64 scratch", args=[scratch])
    want = []
    for t in range(32):
        value = 0
        for e in range(vector):
            value = value * 3 + (t * vector + e)
        want.append(value)
    assert got == want


def test_generic_addresses():
    body = """
    .shared .align 4 .b8 s[128];
    .local .align 4 .b8 l[8];
    mov.u64 %rd1, s; mad.wide.u32 %rd1, %tid, 4, %rd1; cvta.shared.u64 %rd2, %rd1;
    mov.u64 %rd3, l; cvta.local.u64 %rd4, %rd3;
    cvta.to.global.u64 %rd5, %out; cvta.global.u64 %rd5, %rd5;
    st.u32 [%rd2], %tid; ld.shared.u32 %r2, [%rd1];
    add.u32 %r2, %r2, 100; st.u32 [%rd4+4], %r2; ld.local.u32 %r1, [%rd3+4];
    cvta.to.shared.u64 %rd6, %rd2; setp.eq.u64 %p1, %rd6, %rd1; @!%p1 trap;
    isspacep.shared %p2, %rd2; isspacep.local %p3, %rd4; isspacep.global %p4, %rd5; isspacep.global %p5, %rd2;
    @!%p2 trap; @!%p3 trap; @!%p4 trap; @%p5 trap;
    """
    assert words(body) == [100 + t for t in range(32)]


def test_two_shared_variables_and_a_dynamic_one():
    before = ".extern .shared .align 16 .b8 dynamic[];\n.shared .align 4 .b8 fixed[128];\n"
    body = """
    mov.u32 %r2, fixed; mad.lo.u32 %r2, %tid, 4, %r2; mov.u32 %r3, dynamic; mad.lo.u32 %r3, %tid, 4, %r3;
    st.shared.u32 [%r2], 1; st.shared.u32 [%r3], %tid;
    ld.shared.u32 %r4, [%r2]; ld.shared.u32 %r5, [%r3]; add.u32 %r1, %r4, %r5;
    """
    assert words(body, before=before, shared_bytes=128) == [t + 1 for t in range(32)]
    with pytest.raises(ValueError, match="more than sm_90a has"):
        words(body, before=before, shared_bytes=228 * 1024)


def test_constants_and_module_variables():
    before = """.const .align 4 .u32 table[3] = {5, 6, 0x7};
.global .align 4 .b8 bytes[8] = {1, 2, 3, 4};
.global .f32 x = 0f40000000;
.visible .global .align 4 .u32 counter;
"""
    body = """
    mov.u64 %rd1, table; ld.const.u32 %r2, [%rd1+8]; ld.const.u32 %r3, [table];
    ld.global.u32 %r4, [bytes]; ld.global.f32 %f1, [x]; cvt.rzi.u32.f32 %r5, %f1;
    atom.global.add.u32 %r6, [counter], 1;
    add.u32 %r1, %r2, %r3; add.u32 %r1, %r1, %r4; add.u32 %r1, %r1, %r5;
    """
    m = module(body + STORE, before=before)
    out = np.zeros(32, np.uint32)
    for _ in range(2):  # the module's variables outlive a launch
        m.launch("k", 1, 32, [Out(out)])
    assert out.tolist() == [12 + 0x04030201 + 2] * 32
    assert m.variables["counter"].array.view(np.uint32)[0] == 64


def test_parameters():
    params = ".param .u64 out, .param .u32 a, .param .s16 b, .param .f32 c, .param .align 8 .b8 s[24], .param .f64 d"
    body = """
    ld.param.u32 %r2, [a]; ld.param.s16 %r3, [b]; ld.param.f32 %f1, [c]; cvt.rzi.s32.f32 %r4, %f1;
    ld.param.u64 %rd1, [s]; ld.global.u32 %r5, [%rd1]; ld.param.v2.u32 {%r6, %r7}, [s+16]; ld.param.f64 %fd1, [d];
    cvt.rzi.s32.f64 %r8, %fd1; mov.u64 %rd3, s; ld.param.u32 %r9, [%rd3+8];
    add.u32 %r1, %r2, %r3; add.u32 %r1, %r1, %r4; add.u32 %r1, %r1, %r5; add.u32 %r1, %r1, %r6; add.u32 %r1, %r1, %r7;
    add.u32 %r1, %r1, %r8; add.u32 %r1, %r1, %r9;
    """
    x = np.array([1000], np.uint32)
    args = [100000, -7, 3.5, Struct("<QQII", In(x), 10, 20, 30), 5.0]
    assert words(body, params=params, args=args) == [100000 - 7 + 3 + 1000 + 10 + 20 + 30 + 5] * 32
    with pytest.raises(OverflowError):
        words(body, params=params, args=[100000, 70000, *args[2:]])
    with pytest.raises(TypeError, match="not a float"):
        words(body, params=params, args=[1.5, *args[1:]])
    with pytest.raises(ValueError, match="parameter 4 has 24 bytes"):
        words(body, params=params, args=[*args[:3], b"123", 5.0])


ATOMICS = {
    "add.u32": (5, lambda old, v: old + v),
    "min.s32": (2**31 + 5, lambda old, v: min(old, v, key=lambda u: u - 2**32 if u >= 2**31 else u)),
    "max.u32": (20, max),
    "and.b32": (0xFFFF, lambda old, v: old & v),
    "or.b32": (0, lambda old, v: old | v),
    "xor.b32": (0, lambda old, v: old ^ v),
}


@pytest.mark.parametrize("space", ["shared", "global", "generic"])
@pytest.mark.parametrize("op", ATOMICS)
def test_atomics(op, space):
    start, f = ATOMICS[op]
    want = start
    for t in range(64):
        want = f(want, t + 3) & 0xFFFFFFFF
    x = np.array([start], np.uint32)
    infix = "" if space == "generic" else f".{space}"
    body = """
    .shared .align 4 .u32 s;
    ld.param.u64 %rd1, [x]; add.u32 %r2, %tid, 3; setp.eq.u32 %p1, %tid, 0;
    """
    if space == "shared":
        body += (
            f"mov.u64 %rd2, s; @%p1 ld.global.u32 %r3, [%rd1]; @%p1 st.shared.u32 [%rd2], %r3; bar.sync 0; "
            f"atom.shared.{op} %r1, [%rd2], %r2;"
        )
        body += "bar.sync 0; @%p1 ld.shared.u32 %r3, [%rd2]; @%p1 st.global.u32 [%rd1], %r3;"
    else:
        body += (
            f"atom{infix}.{op} %r1, [%rd1], %r2; red{infix}.{op} [%rd1], {0 if 'and' not in op else -1};"
            if op != "min.s32" and op != "max.u32"
            else f"atom{infix}.{op} %r1, [%rd1], %r2;"
        )
    for seed in range(3):
        x[:] = start
        words(body, 64, args=[InOut(x)], params=".param .u64 out, .param .u64 x", seed=seed)
        assert x[0] == want


def test_compare_and_swap_exchange_and_counters():
    body = """
    ld.param.u64 %rd1, [x];
    atom.global.cas.b32 %r1, [%rd1], 7, 9; atom.global.exch.b32 %r1, [%rd1+4], %tid;
    atom.global.inc.u32 %r1, [%rd1+8], 4; atom.global.add.f32 %f1, [%rd1+12], 0f3F800000;
    atom.global.add.u64 %rd2, [%rd1+16], 4294967297; atom.global.dec.u32 %r1, [%rd1+8], 3;
    """
    x = np.array([7, 50, 0, 0, 0, 0], np.uint32)
    got = words(body, 1, args=[InOut(x)], params=".param .u64 out, .param .u64 x")
    assert x.tolist() == [9, 0, 0, 0x3F800000, 1, 1] and got == [1]


def test_cache_hints_are_parsed():
    lines = [
        "ld.global.nc.L1::no_allocate.L2::128B.u32",
        "ld.global.ca.u32",
        "ld.volatile.global.u32",
        "ld.relaxed.gpu.global.u32",
    ]
    lines += [
        "ld.global.L1::evict_last.u32",
        "ld.acquire.sys.global.u32",
        "ld.global.cs.u32",
        "ld.weak.global.u32",
        "ldu.global.u32",
    ]
    x = np.arange(32, dtype=np.uint32)
    for line in lines:
        body = (
            "ld.param.u64 %rd1, [x]; mad.wide.u32 %rd1, %tid, 4, %rd1; prefetch.global.L2 [%rd1]; "
            f"prefetch.tensormap [%rd1]; {line} %r1, [%rd1];"
        )
        assert words(body, args=[x], params=".param .u64 out, .param .u64 x") == x.tolist(), line
    body = """ld.param.u64 %rd1, [x]; createpolicy.fractional.L2::evict_first.b64 %rd5, 0f3F800000;
    mad.wide.u32 %rd1, %tid, 4, %rd1; ld.global.nc.L2::cache_hint.u32 %r1, [%rd1], %rd5;"""
    assert words(body, args=[x], params=".param .u64 out, .param .u64 x") == x.tolist()


def test_scopes_of_inline_assembly():
    """Registers and labels that are declared in braces belong to these braces."""
    body = """
    mov.u32 %r1, 0;
    { .reg .pred p; .reg .b32 t; setp.lt.u32 p, %tid, 4; mov.u32 t, 5; @p bra DONE; add.u32 %r1, %r1, t; DONE: }
    { .reg .pred p; .reg .b32 t; setp.lt.u32 p, %tid, 8; mov.u32 t, 7; @p bra DONE; add.u32 %r1, %r1, t; DONE: }
    """
    assert words(body) == [0] * 4 + [5] * 4 + [12] * 24


def test_grids_and_blocks_of_three_dimensions():
    body = """
    mov.u32 %r2, %tid.y; mov.u32 %r3, %tid.z; mov.u32 %r4, %ctaid.x; mov.u32 %r5, %ctaid.y; mov.u32 %r6, %ctaid.z;
    mov.u32 %r7, %nctaid.x; mov.u32 %r8, %nctaid.y; mov.u32 %r9, %ntid.y;
    mad.lo.u32 %r10, %r3, %r9, %r2; mad.lo.u32 %r10, %r10, 4, %tid;
    mad.lo.u32 %r11, %r6, %r8, %r5; mad.lo.u32 %r11, %r11, %r7, %r4;
    mad.lo.u32 %r10, %r11, 24, %r10; mul.wide.u32 %at, %r10, 4; add.u64 %at, %at, %out; st.global.u32 [%at], %r10;
    """
    out = np.zeros(2 * 3 * 2 * 24, np.uint32)
    module(body).launch("k", (2, 3, 2), (4, 3, 2), [Out(out)])
    assert (out == np.arange(out.size)).all()


def test_directives():
    text = f"""{HEADER}
/* a comment
   of two lines */
.extern .func (.param .b32 r) vprintf(.param .b64 a, .param .b64 b);
.visible .entry k(.param .u64 .ptr .global .align 16 out) .maxntid 256, 1, 1 .minnctapersm 2
{{
    .pragma "nounroll";
    .loc 1 7 3
    ret;
}}
.file 1 "/somewhere/kernel.cu"
.section .debug_str {{ $L__info: .b8 1,2,3 }}
"""
    ptx = parse(text)
    assert ptx.target == "sm_90a" and ptx.files[1] == "/somewhere/kernel.cu"
    assert ptx.kernels["k"].instructions[0].source == ((1, 7),)
    with pytest.raises(PtxError, match=r"\.func g: functions that are not inlined"):
        parse(HEADER + ".func g() { ret; }")
    with pytest.raises(PtxError, match=r"line 4: the directive '.banana' is not known"):
        parse(HEADER + ".banana 3;")
    with pytest.raises(PtxError, match="there is no kernel 'x'"):
        Module.from_ptx(text).launch("x", 1, 1, [])


def test_jump_tables():
    body = """
    min.u32 %r2, %tid, 3;
    TABLE: .branchtargets A, B, C, D;
    brx.idx %r2, TABLE;
    A: mov.u32 %r1, 10; bra E;
    B: mov.u32 %r1, 11; bra E;
    C: mov.u32 %r1, 12; bra E;
    D: mov.u32 %r1, 13;
    E:
    """
    assert words(body) == [10, 11, 12] + [13] * 29


def test_misaligned_start_of_a_buffer():
    x = np.arange(33, dtype=np.uint16)
    body = "mad.wide.u32 %at, %tid, 2, %in; ld.global.u16 %h1, [%at]; cvt.u32.u16 %r1, %h1;"
    body = ".reg .b64 %in; ld.param.u64 %in, [x];" + body
    assert words(body, args=[In(x, misalign=2)], params=".param .u64 out, .param .u64 x") == list(range(32))
    assert lanes("mov.u32 %d, %a;", x[:4].astype(np.uint32)).tolist() == [0, 1, 2, 3]
