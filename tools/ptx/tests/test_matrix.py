"""ldmatrix, stmatrix and mma.sync against the ISA's tables, written out here once more."""

import numpy as np
import pytest

from ..machine import In, Out
from .helpers import assert_fault, run

RNG = np.random.default_rng(1)


def matrix_kernel(instruction: str, sizes: tuple[int, int, int]) -> str:
    """Loads the fragments a, b, c of each lane (register r of lane l at word 32 r + l), multiplies, stores d."""
    na, nb, nc = sizes
    body = "ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; ld.param.u64 %rd3, [c];"
    for k in (1, 2, 3):
        body += f"mad.wide.u32 %rd{k}, %tid, 4, %rd{k};"
    body += "".join(f"ld.global.u32 %r{r}, [%rd1+{128 * r}];" for r in range(na))
    body += "".join(f"ld.global.u32 %r{8 + r}, [%rd2+{128 * r}];" for r in range(nb))
    body += "".join(f"ld.global.u32 %r{16 + r}, [%rd3+{128 * r}];" for r in range(nc))
    groups = ["{" + ",".join(f"%r{at + r}" for r in range(n)) + "}" for at, n in ((24, nc), (0, na), (8, nb), (16, nc))]
    body += f"{instruction} {', '.join(groups)}; mad.wide.u32 %at, %tid, 4, %out;"
    return body + "".join(f"st.global.u32 [%at+{128 * r}], %r{24 + r};" for r in range(nc))


# The ISA's fragments for .b1: bit i (counted over all registers of the lane) lies at (row, column).
def a_m8n8k128(lane, i):
    return lane >> 2, (lane % 4) * 32 + i


def b_m8n8k128(lane, i):
    return (lane % 4) * 32 + i, lane >> 2


def c_m8n8k128(lane, i):
    return lane >> 2, (lane % 4) * 2 + i


def a_m16n8k128(lane, i):
    return lane >> 2 if i < 32 else (lane >> 2) + 8, (lane % 4) * 32 + (i & 0x1F)


def c_m16n8(lane, i):
    return lane >> 2 if i < 2 else (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)


def a_m16n8k256(lane, i):
    row = lane >> 2 if i < 32 or 64 <= i < 96 else (lane >> 2) + 8
    return row, (lane % 4) * 32 + (i & 0x1F) if i < 64 else (lane % 4) * 32 + (i & 0x1F) + 128


def b_m16n8k256(lane, i):
    return (lane % 4) * 32 + (i & 0x1F) if i < 32 else (lane % 4) * 32 + (i & 0x1F) + 128, lane >> 2


B1_SHAPES = {
    "m8n8k128": (8, 128, a_m8n8k128, b_m8n8k128, c_m8n8k128, (1, 1, 2)),
    "m16n8k128": (16, 128, a_m16n8k128, b_m8n8k128, c_m16n8, (2, 1, 4)),
    "m16n8k256": (16, 256, a_m16n8k256, b_m16n8k256, c_m16n8, (4, 2, 4)),
}


@pytest.mark.parametrize("op", ["xor", "and"])
@pytest.mark.parametrize("shape", B1_SHAPES)
def test_mma_b1(shape, op):
    rows, depth, a_at, b_at, c_at, sizes = B1_SHAPES[shape]
    a, b = RNG.integers(0, 2, (rows, depth)), RNG.integers(0, 2, (depth, 8))
    c = RNG.integers(-1000, 1000, (rows, 8))
    fragments = [np.zeros((n, 32), np.uint32) for n in sizes]
    for lane in range(32):
        for matrix, at, fragment in ((a, a_at, fragments[0]), (b, b_at, fragments[1])):
            for i in range(32 * len(fragment)):
                fragment[i // 32, lane] |= np.uint32(int(matrix[at(lane, i)]) << (i % 32))
        for i in range(sizes[2]):
            fragments[2][i, lane] = np.uint32(int(c[c_at(lane, i)]) & 0xFFFFFFFF)
    want = c.copy()
    for i in range(rows):
        for j in range(8):
            want[i, j] += int((a[i] ^ b[:, j]).sum() if op == "xor" else (a[i] & b[:, j]).sum())
    d = np.zeros((sizes[2], 32), np.int32)
    instruction = f"mma.sync.aligned.{shape}.row.col.s32.b1.b1.s32.{op}.popc"
    run(
        *(matrix_kernel(instruction, sizes), [Out(d), *map(In, fragments)]),
        params=".param .u64 out, .param .u64 a, .param .u64 b, .param .u64 c",
    )
    got = np.zeros_like(want)
    for lane in range(32):
        for i in range(sizes[2]):
            got[c_at(lane, i)] = d[i, lane]
    assert (got == want).all()


@pytest.mark.parametrize("depth", [16, 32])
@pytest.mark.parametrize("signs", [("s8", "s8"), ("u8", "s8"), ("u8", "u8")])
def test_mma_of_bytes(signs, depth):
    """m16n8k16, m16n8k32: an 8-bit element i of a lane lies in register i / 4."""
    types = [np.int8 if s == "s8" else np.uint8 for s in signs]
    a = RNG.integers(np.iinfo(types[0]).min, np.iinfo(types[0]).max + 1, (16, depth)).astype(types[0])
    b = RNG.integers(np.iinfo(types[1]).min, np.iinfo(types[1]).max + 1, (depth, 8)).astype(types[1])
    registers = (depth // 8, depth // 16, 4)
    fa, fb = np.zeros((registers[0], 32, 4), types[0]), np.zeros((registers[1], 32, 4), types[1])
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4 * registers[0]):
            row = group if i < 4 or 8 <= i < 12 else group + 8
            fa[i // 4, lane, i % 4] = a[row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)]
        for i in range(4 * registers[1]):
            fb[i // 4, lane, i % 4] = b[thread * 4 + (i & 3) + (16 if i >= 4 else 0), group]
    d = np.zeros((4, 32), np.int32)
    instruction = f"mma.sync.aligned.m16n8k{depth}.row.col.s32.{signs[0]}.{signs[1]}.s32"
    args = [Out(d), In(fa.view(np.uint32)), In(fb.view(np.uint32)), In(np.full((4, 32), 5, np.uint32))]
    params = ".param .u64 out, .param .u64 a, .param .u64 b, .param .u64 c"
    run(matrix_kernel(instruction, registers), args, params=params)
    want = a.astype(int) @ b.astype(int) + 5
    for lane in range(32):
        for i in range(4):
            assert d[i, lane] == want[c_m16n8(lane, i)]


def fill(size: int) -> str:
    """Half word h of shared memory holds h."""
    return f"""
    .shared .align 128 .b8 s[{size}];
    mov.u32 %r20, s; mul.lo.u32 %r2, %tid, 2;
    FILL: mul.lo.u32 %r4, %r2, 1; add.u32 %r3, %r2, 1; shl.b32 %r3, %r3, 16; or.b32 %r3, %r3, %r4;
    mad.lo.u32 %r5, %r2, 2, %r20; st.shared.u32 [%r5], %r3; add.u32 %r2, %r2, 64;
    setp.lt.u32 %p1, %r2, {size // 2}; @%p1 bra FILL;
    bar.warp.sync -1;
    """


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    """Thread l of the warp gets row l / 4, columns 2 (l % 4) and the next; with .trans those of the transpose."""
    place = RNG.permutation(64)[: 8 * count]  # 16-byte rows anywhere in 1024 bytes
    addresses = np.zeros(32, np.uint32)
    addresses[: 8 * count] = place * 16
    names = [f"%r{10 + k}" for k in range(count)]
    body = f"""{fill(1024)}
    ld.param.u64 %rd1, [where]; mad.wide.u32 %rd1, %tid, 4, %rd1; ld.global.u32 %r6, [%rd1]; add.u32 %r6, %r6, %r20;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if trans else ""}.shared.b16 {{{",".join(names)}}}, [%r6];
    mad.wide.u32 %at, %tid, 4, %out;"""
    body += "".join(f"st.global.u32 [%at+{128 * k}], {name};" for k, name in enumerate(names))
    out = np.zeros((count, 32), np.uint32)
    report = run(body, [Out(out), In(addresses)], params=".param .u64 out, .param .u64 where")
    for j in range(count):
        matrix = np.array([[place[8 * j + row] * 8 + column for column in range(8)] for row in range(8)])
        if trans:
            matrix = matrix.T
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            assert out[j, lane] == matrix[row, column] | matrix[row, column + 1] << 16
    assert report.instructions[f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16"] == 32


def test_stmatrix_is_the_inverse():
    body = """
    .shared .align 128 .b8 s[256];
    mov.u32 %r20, s; and.b32 %r2, %tid, 15; mad.lo.u32 %r6, %r2, 16, %r20; mul.lo.u32 %r10, %tid, 3;
    mul.lo.u32 %r11, %tid, 5;
    stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r6], {%r10, %r11}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r12, %r13}, [%r6];
    setp.ne.u32 %p1, %r10, %r12; @%p1 trap; setp.ne.u32 %p1, %r11, %r13; @%p1 trap;
    """
    run(body)


def test_matrix_instructions_need_the_whole_warp():
    body = fill(1024) + "setp.lt.u32 %p1, %tid, 3; @%p1 exit; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r20];"
    assert_fault("warp synchronization", "needs all 32 threads", body)
    body = fill(1024) + "setp.lt.u32 %p1, %tid, 3; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r20];"
    assert_fault("warp synchronization", "needs all 32 threads", body)


def test_ldmatrix_reads_what_other_lanes_wrote():
    """Each lane's own row, without bar.warp.sync: a race, as lanes get pieces of all rows."""
    body = """
    .shared .align 128 .b8 s[512];
    mov.u32 %r20, s; mad.lo.u32 %r6, %tid, 16, %r20; st.shared.v4.u32 [%r6], {%tid, %tid, %tid, %tid}; SYNC
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r6];
    """
    assert_fault("race on shared memory", "not ordered after", body.replace("SYNC", ""))
    run(body.replace("SYNC", "bar.warp.sync -1;"))


def test_conflicts_of_ldmatrix():
    """Rows 128 bytes apart share their banks: eight wavefronts a matrix; rows 16 or 144 bytes apart: one."""
    for stride, extra in ((16, 0), (128, 7), (144, 0), (64, 3)):
        body = (
            fill(2048)
            + f"""
        and.b32 %r2, %tid, 7; mad.lo.u32 %r6, %r2, {stride}, %r20;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r10}}, [%r6];"""
        )
        assert run(body).bank_conflicts == extra, stride
