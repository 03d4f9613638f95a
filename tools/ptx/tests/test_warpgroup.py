"""wgmma and setmaxnreg, against the ISA's layouts of descriptors and fragments, which are written out here again."""

import numpy as np
import pytest

from ..machine import In, Out, PtxError, PtxFault
from .helpers import HEADER, Module, assert_fault, run

RNG = np.random.default_rng(5)
SEEDS = range(4)
PARAMS = ".param .u64 out, .param .u64 image"
WIDTHS = [8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256]
CODES = {0: 0, 128: 1, 64: 2, 32: 3}  # PTX ISA, "Matrix Descriptor Format": bits 63-62
IMAGE = 48 * 1024


def place(row: int, chunk: int, swizzle: int, leading: int, stride: int) -> int:
    """Return where a K-major matrix has 16-byte chunk `chunk` of a row: PTX ISA, "Shared Memory Matrix Layout".

    Eight rows are `swizzle` bytes apart, groups of eight rows `stride`. Without a swizzle a group's chunk is 128 bytes,
    and its next chunk `leading` bytes further. A swizzle exchanges the chunks of a row by the number of its 128 bytes.
    """
    group, r = divmod(row, 8)
    if swizzle == 0:
        return group * stride + chunk * leading + r * 16
    line = r * swizzle // 128
    return group * stride + r * swizzle + (chunk ^ line % (swizzle // 16)) * 16


def image_of(matrix: np.ndarray, image: np.ndarray, at: int, layout: tuple[int, int, int]) -> None:
    """Write a matrix of bits into the image of shared memory."""
    data = np.packbits(matrix, axis=1, bitorder="little").reshape(len(matrix), -1, 16)
    for row, chunks in enumerate(data):
        for chunk, value in enumerate(chunks):
            to = at + place(row, chunk, *layout)
            image[to : to + 16] = value


def descriptor(address: str, layout: tuple[int, int, int], step: int = 0, base: int = 0) -> str:
    swizzle, leading, stride = layout
    high = CODES[swizzle] << 62 | base << 49 | stride // 16 << 32 | leading // 16 << 16
    start = f"cvt.u64.u32 %rd5, {address}; shr.u64 %rd5, %rd5, 4;"
    return start + f"add.u64 %rd5, %rd5, {high + step // 16}; mov.u64 {{}}, %rd5;"


def registers(n: int, first: int = 0) -> str:
    return "{" + ",".join(f"%d{first + r}" for r in range(n // 2)) + "}"


FILL = """
    .reg .b32 %d<256>; .shared .align 1024 .b8 s[49152]; mov.u32 %r20, s; mul.lo.u32 %r2, %tid, 16;
    ld.param.u64 %rd1, [image];
    FILL: cvt.u64.u32 %rd2, %r2; add.u64 %rd2, %rd2, %rd1; ld.global.v4.u32 {%r3,%r4,%r5,%r6}, [%rd2];
    add.u32 %r7, %r20, %r2; st.shared.v4.u32 [%r7], {%r3,%r4,%r5,%r6}; add.u32 %r2, %r2, THREADS_TIMES_16;
    setp.lt.u32 %p1, %r2, 49152; @%p1 bra FILL;
    fence.proxy.async.shared::cta; bar.sync 0;
    setp.eq.u32 %p6, 0, 0; setp.eq.u32 %p7, 0, 1;
"""


def kernel(operations: str, n: int, threads: int = 128, fill: str = FILL) -> str:
    """Return a kernel that fills shared memory from an image, does the operations and stores %d0 ... by thread."""
    body = fill.replace("THREADS_TIMES_16", str(16 * threads)) + operations + "mad.wide.u32 %at, %tid, 4, %out;"
    return body + "".join(f"st.global.u32 [%at+{4 * threads * r}], %d{r};" for r in range(n // 2))


def result(d: np.ndarray) -> np.ndarray:
    """Return the matrix of the accumulators [register, thread]: PTX ISA, "Register fragments", figure of D."""
    got = np.zeros((64, 2 * len(d)), np.int64)
    for r in range(len(d)):
        for thread in range(128):
            warp, lane = divmod(thread, 32)
            row = 16 * warp + lane // 4 + (8 if r // 2 % 2 else 0)
            got[row, r // 4 * 8 + lane % 4 * 2 + r % 2] = d[r, thread]
    return got


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.int64) @ b.astype(np.int64).T


ASYNC = "wgmma.mma_async.sync.aligned.m64n{n}k256.s32.b1.b1.and.popc {d}, {a}, %rd7, {p};"
FENCE, COMMIT, WAIT = (
    f"wgmma.{x}.sync.aligned{y};" for x, y in (("fence", ""), ("commit_group", ""), ("wait_group", " 0"))
)
# (swizzle, leading, stride): with a swizzle the leading offset is not used.
LAYOUTS = [(128, 16, 1024), (64, 16, 512), (32, 16, 256), (0, 128, 256), (0, 2048, 128), (64, 0, 1024), (128, 16, 2048)]


def run_product(layout: tuple[int, int, int], n: int, step: int, k: int = 256) -> None:
    b_at = 20480
    image = RNG.integers(0, 256, IMAGE).astype(np.uint8)
    a, b = RNG.integers(0, 2, (64, k)), RNG.integers(0, 2, (n, k))
    image_of(a, image, 0, layout), image_of(b, image, b_at, layout)
    chunks = slice(8 * step, 8 * step + 256)
    body = (
        descriptor("%r20", layout, step).format("%rd6")
        + f"add.u32 %r21, %r20, {b_at};"
        + descriptor("%r21", layout, step).format("%rd7")
        + FENCE
        + ASYNC.format(n=n, d=registers(n), a="%rd6", p="%p7")
        + COMMIT
        + WAIT
    )
    d = np.zeros((n // 2, 128), np.int32)
    run(kernel(body, n), [Out(d), In(image)], threads=128, params=PARAMS)
    assert (result(d) == product(a[:, chunks], b[:, chunks])).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    n = 96 if layout[2] < 2048 else 64
    run_product(layout, n, 0, k=max(256, layout[0] * 8))


@pytest.mark.parametrize("n", WIDTHS)
def test_widths(n):
    run_product((32, 16, 256), n, 0)


@pytest.mark.parametrize("step", [0, 32, 64, 96])
def test_steps_within_a_swizzled_line(step):
    """The next 256 bits of K lie 32 bytes further: the start address moves, and the swizzle follows the address."""
    run_product((128, 16, 1024), 64, step, k=1024)


# (swizzle, stride, bytes after a multiple of 1024, base offset, whether the ISA allows it): PTX ISA, "Matrix Descriptor
# Format": 0 on a boundary of 1024, 512 or 256 bytes, by the swizzle, and otherwise (pattern start address >> 7) & 7.
BASE_OFFSETS = [
    (128, 1024, 0, 0, True),
    (128, 1024, 384, 3, True),
    (128, 1024, 384 + 32, 3, True),  # 32 bytes are a step along K within the rows
    (128, 1024, 896, 7, True),
    (128, 2048, 512, 4, True),
    (64, 512, 512, 0, True),
    (64, 512, 384, 3, True),
    (32, 256, 256, 0, True),
    (32, 256, 128, 1, True),
    (128, 1024, 512, 0, False),
    (128, 1024, 128, 0, False),
    (128, 1024, 384, 2, False),
    (128, 1024, 0, 4, False),
    (128, 1024 + 512, 0, 0, False),  # the second 8 rows
    (64, 512, 128, 0, False),
    (64, 512, 64, 0, False),  # the second row of a pattern
    (32, 256, 128, 0, False),
    (32, 256, 32, 0, False),
]


def product_at(at: int, layout: tuple[int, int, int], step: int, base: int) -> str:
    """Return a product of 64 rows of A at `at`, as its descriptor says, and 8 rows of B at 20480."""
    return kernel(
        f"add.u32 %r21, %r20, {at};"
        + descriptor("%r21", layout, step, base).format("%rd6")
        + "add.u32 %r21, %r20, 20480;"
        + descriptor("%r21", LAYOUT).format("%rd7")
        + FENCE
        + ASYNC.format(n=8, d=registers(8), a="%rd6", p="%p7")
        + COMMIT
        + WAIT,
        8,
    )


@pytest.mark.parametrize(("swizzle", "stride", "at", "base", "allowed"), BASE_OFFSETS)
def test_the_base_offset_says_where_the_pattern_begins(swizzle, stride, at, base, allowed):
    layout, step = (swizzle, 16, stride), at % 128 if swizzle == 128 else 0
    image = RNG.integers(0, 256, IMAGE).astype(np.uint8)
    a, b = RNG.integers(0, 2, (64, 8 * swizzle)), RNG.integers(0, 2, (8, 256))
    image_of(a, image, at - step, layout), image_of(b, image, 20480, LAYOUT)
    d = np.zeros((4, 128), np.int32)
    body, args = product_at(at - step, layout, step, base), [Out(d), In(image)]
    if allowed:
        run(body, args, threads=128, params=PARAMS)
        assert (result(d) == product(a[:, 8 * step : 8 * step + 256], b)).all()
    else:
        assert_fault("misaligned", "the swizzle's pattern starts", body, args, threads=128, params=PARAMS)


def test_a_box_that_begins_within_a_pattern_is_no_matrix():
    """A tensor map swizzles by the address, so no base offset describes a box 512 bytes after a multiple of 1024.

    CUDA Programming Guide, "Swizzle Pattern Pointer Offset Computation": chunk x of row y lies at (y + 4) % 8 ^ x.
    """
    a, b = RNG.integers(0, 2, (64, 1024)), RNG.integers(0, 2, (8, 256))
    image = np.zeros(IMAGE, np.uint8)
    image_of(b, image, 20480, LAYOUT)
    packed = np.packbits(a, axis=1, bitorder="little")
    for y, x in np.ndindex(64, 8):
        to = 512 + 128 * y + 16 * ((y + 4) % 8 ^ x)
        image[to : to + 16] = packed[y, 16 * x : 16 * x + 16]
    d = np.zeros((4, 128), np.int32)
    for base in range(8):
        body, args = product_at(512, (128, 16, 1024), 0, base), [Out(d), In(image)]
        if base == 4:
            run(body, args, threads=128, params=PARAMS)
            assert (result(d) != product(a[:, :256], b)).any()
        else:
            assert_fault("misaligned", "which is 512 bytes after", body, args, threads=128, params=PARAMS)


# ---- The rules, with n = 8 and the 32-byte swizzle -------------------------------------------------------------------
LAYOUT = (32, 16, 256)
A, B = RNG.integers(0, 2, (64, 256)), RNG.integers(0, 2, (8, 256))
SMALL = np.zeros(IMAGE, np.uint8)
image_of(A, SMALL, 0, LAYOUT), image_of(B, SMALL, 20480, LAYOUT)
DESCRIPTORS = (
    descriptor("%r20", LAYOUT).format("%rd6") + "add.u32 %r21, %r20, 20480;" + descriptor("%r21", LAYOUT).format("%rd7")
)
FIRST = ASYNC.format(n=8, d=registers(8), a="%rd6", p="%p7")
ADD = ASYNC.format(n=8, d=registers(8), a="%rd6", p="%p6")
OTHER = ASYNC.format(n=8, d=registers(8, 4), a="%rd6", p="%p7")


def small(operations: str, threads: int = 128, **options) -> np.ndarray:
    d = np.zeros((4, threads), np.int32)
    body = kernel(DESCRIPTORS + operations, 8, threads)
    run(body, [Out(d), In(SMALL)], threads=threads, params=PARAMS, **options)
    return d


def small_fault(kind: str, message: str, operations: str, threads: int = 128, fill: str = FILL):
    return assert_fault(
        kind,
        message,
        kernel(DESCRIPTORS + operations, 8, threads, fill),
        [Out(np.zeros((4, threads), np.int32)), In(SMALL)],
        threads=threads,
        params=PARAMS,
    )


def test_sums_accumulate():
    """With a false predicate D is not read, and with a true one it is added to; several wgmma may share D in flight."""
    assert (result(small(FENCE + FIRST + ADD + ADD + COMMIT + WAIT)) == 3 * product(A, B)).all()
    assert (result(small(FENCE + FIRST + COMMIT + ADD + COMMIT + WAIT)) == 2 * product(A, B)).all()
    start = "".join(f"mov.u32 %d{r}, 7;" for r in range(4))
    assert (result(small(start + FENCE + ADD + COMMIT + WAIT)) == product(A, B) + 7).all()
    assert (result(small(start + FENCE + FIRST + COMMIT + WAIT)) == product(A, B)).all()
    negated = FIRST.replace("%p7", "!%p6")
    assert (result(small(FENCE + negated + COMMIT + WAIT)) == product(A, B)).all()
    small_fault("uninitialised register", "", FENCE + ADD + COMMIT + WAIT)


def test_a_in_registers():
    """A thread holds of A what it holds for mma.m16n8k256: PTX ISA, "Register fragments", figure of A for .b1."""
    words = np.packbits(A, axis=1, bitorder="little").view(np.uint32)  # [row, 8]
    fragments = np.zeros((4, 128), np.uint32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for r in range(4):
            fragments[r, thread] = words[16 * warp + lane // 4 + 8 * (r % 2), lane % 4 + 4 * (r // 2)]
    loads = "ld.param.u64 %rd3, [a]; mad.wide.u32 %rd3, %tid, 4, %rd3;" + "".join(
        f"ld.global.u32 %r{10 + r}, [%rd3+{512 * r}];" for r in range(4)
    )
    product_ = FIRST.replace("%rd6,", "{%r10,%r11,%r12,%r13},")
    d = np.zeros((4, 128), np.int32)

    def check(operations: str) -> None:
        args = [Out(d), In(SMALL), In(fragments)]
        body = kernel(DESCRIPTORS + loads + operations, 8)
        run(body, args, threads=128, params=PARAMS + ", .param .u64 a")

    check(FENCE + product_ + COMMIT + WAIT)
    assert (result(d) == product(A, B)).all()
    for wrong, message in (
        (product_ + COMMIT + WAIT, "no wgmma.fence"),
        (FENCE + "mov.u32 %r10, 0;" + product_ + COMMIT + WAIT, "no wgmma.fence"),
        (FENCE + product_ + COMMIT + "mov.u32 %r10, 0;" + WAIT, "is named before its group was waited for"),
    ):
        with pytest.raises(PtxFault, match=message) as caught:
            check(wrong)
        assert caught.value.kind == "warpgroup"


def test_the_fence():
    """wgmma.fence must lie between another access to the registers and the wgmma, and before the first one."""
    for before in ("", FENCE + "mov.u32 %d3, 1;", FENCE + FIRST + COMMIT + WAIT + "mov.u32 %r1, %d0;"):
        small_fault("warpgroup", "no wgmma.fence", before + FIRST + COMMIT + WAIT)
    small(FENCE + FIRST + COMMIT + WAIT + "mov.u32 %r1, %d0;" + FENCE + FIRST + COMMIT + WAIT)
    small_fault("warpgroup", "of another shape", FENCE + FIRST + ASYNC.format(n=16, d=registers(16), a="%rd6", p="%p7"))


def test_the_wait():
    for wrong in (
        FENCE + FIRST + COMMIT,
        FENCE + FIRST + WAIT,
        FENCE + FIRST + COMMIT + WAIT.replace("0;", "1;"),
        FENCE + FIRST + COMMIT + "add.u32 %d1, %tid, 0;" + WAIT,
        FENCE + FIRST + COMMIT + "mov.u32 %r1, %d2;" + WAIT,
    ):
        fault = small_fault("warpgroup", "is named before its group was waited for", wrong)
        assert "wgmma.mma_async" in fault.message
    one_left = FENCE + FIRST + COMMIT + OTHER + COMMIT + WAIT.replace("0;", "1;") + "mov.u32 %r1, %d0;" + WAIT
    small(one_left)
    small_fault("warpgroup", "is named", one_left.replace("%r1, %d0", "%r1, %d4"))
    body = kernel(DESCRIPTORS + FENCE + OTHER + COMMIT + "exit;", 8)
    args = [Out(np.zeros((4, 128), np.int32)), In(SMALL)]
    assert_fault("warpgroup", "exits before it waits", body, args, threads=128, params=PARAMS)


def test_what_is_read_may_not_change():
    write = "st.shared.u32 [%r20+4], 0;"
    small_fault("warpgroup", "may still read it", FENCE + FIRST + COMMIT + "bar.sync 0; @%p6 " + write + WAIT)
    # After the wait it may, once a barrier has ordered the warps.
    after = FENCE + FIRST + COMMIT + WAIT + "SYNC setp.eq.u32 %p2, %tid, 0; @%p2 " + write
    small(after.replace("SYNC", "bar.sync 0;"))
    for seed in SEEDS:
        with pytest.raises(PtxFault) as caught:
            small(after.replace("SYNC", ""), seed=seed)
        assert caught.value.kind in ("race on shared memory", "warpgroup", "proxy")


def test_one_lane_gives_back_what_its_warp_has_multiplied():
    """PTX ISA, "wgmma.wait_group": each executing thread waits, so one lane may say that a wgmma has read its factors.

    It cannot say so of what other lanes have read by ordinary loads.
    """
    init = ".shared .align 8 .b8 bar[8]; mov.u32 %r19, bar; setp.eq.u32 %p2, %tid, 0; mov.u32 %r8, %laneid;"
    init += "setp.eq.u32 %p3, %r8, 0; @%p2 mbarrier.init.shared::cta.b64 [%r19], 4; bar.sync 0;"
    arrive = "@%p3 mbarrier.arrive.shared::cta.b64 _, [%r19];"
    then = "W: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r19], 0; @!%p4 bra W; @%p2 st.shared.u32 [%r20+4], 0;"
    read, sync, product_ = "ld.shared.u32 %r9, [%r20+4];", "bar.warp.sync -1;", FENCE + FIRST + COMMIT
    for seed in SEEDS:
        small(init + product_ + WAIT + arrive + then, seed=seed)
        small(init + product_ + WAIT + read + sync + arrive + then, seed=seed)
    race = "the write .* is not ordered after the access by thread"
    small_fault("race on shared memory", race, init + product_ + WAIT + read + arrive + then)
    small_fault("warpgroup", "may still read it", init + product_ + arrive + then + WAIT)
    # Lane 0 of warp 1 arrives before the warp has waited.
    early = init + product_ + "setp.eq.u32 %p5, %tid, 32; @%p5 mbarrier.arrive.shared::cta.b64 _, [%r19];" + WAIT
    late = "setp.ne.u32 %p5, %tid, 32; and.pred %p3, %p3, %p5;" + arrive + then
    for seed in SEEDS:
        with pytest.raises(PtxFault) as caught:
            small(early + late, seed=seed)
        assert caught.value.kind in ("race on shared memory", "warpgroup")


def test_every_lane_of_a_wgmma_must_know_what_it_reads():
    """All lanes execute it, so that a wait by one lane is not enough for a warp without a barrier of the warp."""
    init = ".shared .align 8 .b8 bar[8]; mov.u32 %r19, bar; setp.eq.u32 %p2, %tid, 0; mov.u32 %r8, %laneid;"
    init += "setp.lt.u32 %p3, %tid, 32; setp.eq.or.u32 %p3, %r8, 0, %p3;"
    init += "@%p2 mbarrier.init.shared::cta.b64 [%r19], 1; bar.sync 0;"
    write = "@!%p2 bra A; st.shared.u32 [%r20], 0; fence.proxy.async; mbarrier.arrive.shared::cta.b64 _, [%r19]; A:"
    wait = "bra B; W: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r19], 0; @!%p4 bra W; B:"

    def waiting(past: str, then: str) -> str:
        return init + write + past + wait + then + FENCE + FIRST + COMMIT + WAIT

    shuffle = "shfl.sync.idx.b32 %r9, %r8, 0, 31, -1;"
    for seed in SEEDS:
        small(waiting("@%p7 ", ""), seed=seed)
        small(waiting("@!%p3 ", "bar.warp.sync -1;"), seed=seed)
    race = "the asynchronous read .* is not ordered after the access by thread .0,0,0"
    small_fault("race on shared memory", race, waiting("@!%p3 ", shuffle))


def test_ordinary_writes_must_be_fenced():
    body = FENCE + FIRST + COMMIT + WAIT
    fault = small_fault(
        "proxy", "no fence.proxy.async follows", body, fill=FILL.replace("fence.proxy.async.shared::cta;", "")
    )
    assert "st.shared.v4" in fault.message
    # The fence covers what is ordered before it: after the barrier, one thread's is enough for the writes of all.
    late = FILL.replace("fence.proxy.async.shared::cta; bar.sync 0;", "bar.sync 0; {}bar.sync 1;")
    for fence in ("fence.proxy.async;", "setp.eq.u32 %p1, %tid, 64; @%p1 fence.proxy.async.shared::cta;"):
        run(
            kernel(DESCRIPTORS + body, 8, fill=late.replace("{}", fence)),
            [Out(np.zeros((4, 128), np.int32)), In(SMALL)],
            threads=128,
            params=PARAMS,
        )
    for seed in SEEDS:
        with pytest.raises(PtxFault) as caught:
            run(
                kernel(DESCRIPTORS + body, 8, fill=FILL.replace("bar.sync 0;", "")),
                [Out(np.zeros((4, 128), np.int32)), In(SMALL)],
                threads=128,
                params=PARAMS,
                seed=seed,
            )
        assert caught.value.kind in ("race on shared memory", "proxy", "warpgroup")


def test_memory_that_nothing_wrote_is_garbage():
    """Rows that were never written give sums that nobody may count on, but no fault: a tile's edge."""
    fill = FILL.replace("setp.lt.u32 %p1, %r2, 49152;", "setp.lt.u32 %p1, %r2, 21000;")
    d = np.zeros((4, 128), np.int32)
    body = kernel(DESCRIPTORS + FENCE + FIRST.replace("%rd7,", "%rd8,") + COMMIT + WAIT, 8, fill=fill)
    body = body.replace(FENCE, "add.u64 %rd8, %rd7, 16;" + FENCE, 1)
    run(body, [Out(d), In(SMALL)], threads=128, params=PARAMS)
    far = "add.u64 %rd7, %rd7, 3008;" + FENCE + FIRST + COMMIT + WAIT
    small_fault("out of bounds", "", far)


def test_a_warpgroup_works_together():
    """All four warps must execute the same wgmma, with the same descriptors."""
    one = "setp.lt.u32 %p2, %tid, 32; @%p2 bra B; EXTRA B: " + FENCE + FIRST + COMMIT + WAIT
    for seed in SEEDS:
        for extra in (FENCE + FIRST + COMMIT + WAIT, "add.u64 %rd6, %rd6, 16;"):
            with pytest.raises(PtxFault, match=r"different wgmma|another one of its") as caught:
                small(one.replace("EXTRA", extra), seed=seed)
            assert caught.value.kind == "warpgroup"
    lanes = "and.b32 %r2, %tid, 1; cvt.u64.u32 %rd8, %r2; add.u64 %rd6, %rd6, %rd8;"
    small_fault("warpgroup", "name different descriptors", lanes + FENCE + FIRST + COMMIT + WAIT)
    small_fault("warpgroup", "needs a warpgroup of four warps", FENCE + FIRST + COMMIT + WAIT, threads=96)
    part = "setp.lt.u32 %p2, %tid, 3; @%p2 exit;" + FENCE + FIRST + COMMIT + WAIT
    small_fault("warp synchronization", "needs all 32 threads", part)


def test_shapes_that_do_not_exist():
    registers_ = ".reg .b32 %d<256>; .reg .b64 %rd<9>; .reg .pred %p<9>;"
    for line, message in {
        ASYNC.format(n=40, d=registers(40), a="%rd6", p="%p1"): "its shape is not known",
        ASYNC.format(n=56, d=registers(56), a="%rd6", p="%p1"): "its shape is not known",
        ASYNC.format(n=64, d=registers(32), a="%rd6", p="%p1"): "a wrong number of registers",
        ASYNC.format(n=8, d=registers(8), a="%rd6", p="%p1").replace(".and", ".xor"): "only .s32.b1.b1.and.popc",
        "wgmma.fence.sync;": "lacks .sync.aligned",
        "setmaxnreg.dec.sync.aligned.u32 20;": "none of 24, 32",
        "setmaxnreg.inc.sync.aligned.u32 264;": "none of 24, 32",
    }.items():
        with pytest.raises(PtxError, match=message):
            Module.from_ptx(f"{HEADER}.entry k() {{ {registers_}\n{line}\nret; }}").kernel("k")
    row_col = FIRST.replace("k256.", "k256.row.col.")  # ptxas takes it too
    assert (result(small(FENCE + row_col + COMMIT + WAIT)) == product(A, B)).all()


# ---- setmaxnreg ------------------------------------------------------------------------------------------------------
def pool(producer: int, consumer: int, threads: int = 384) -> str:
    """Return a kernel whose first warpgroup gives registers away while the others claim more."""
    return f"""
    setp.lt.u32 %p1, %tid, 128; @!%p1 bra CONSUME;
    setmaxnreg.dec.sync.aligned.u32 {producer}; bra END;
    CONSUME: setmaxnreg.inc.sync.aligned.u32 {consumer}; END:
    """


def test_registers_change_hands():
    """A block of 384 threads starts with 168 registers each: 65536 / 384 in steps of 8; the pool is 504 a triple."""
    for seed in SEEDS:
        run(pool(24, 240), threads=384, seed=seed)
        run(pool(40, 232), threads=384, seed=seed)
        assert_fault("deadlock", "wait for registers", pool(32, 240), threads=384)
    assert_fault("registers", r"asks for 176 registers from 168 by .dec", pool(176, 240), threads=384)
    assert_fault("registers", r"asks for 160 registers from 168 by .inc", pool(24, 160), threads=384)
