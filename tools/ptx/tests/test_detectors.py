"""Each detector reports a small kernel that is wrong, and is silent about the same kernel once it is right."""

import numpy as np
import pytest

from ..machine import In, InOut, Module, Out, PtxFault
from .helpers import HEADER, assert_fault, run

TWO = ".param .u64 out, .param .u64 x"
LOAD_X = "ld.param.u64 %rd1, [x]; mad.wide.u32 %rd2, %tid, 4, %rd1;"
AT = "mad.wide.u32 %at, %tid, 4, %out;"
SHARED = ".shared .align 16 .b8 s[512]; mov.u32 %r20, s; mad.lo.u32 %r21, %tid, 4, %r20;"


def out(count: int = 32) -> Out:
    return Out(np.zeros(count, np.uint32))


# ---- Bounds, alignment -----------------------------------------------------------------------------------------------
def test_global_bounds():
    x = np.arange(32, dtype=np.uint32)
    for body, message in {
        "ld.global.u32 %r1, [%rd2+4];": r"byte 128 of 'argument 1', which has 128",
        "ld.global.u32 %r1, [%rd1+-4];": r"byte -4 of 'argument 1'",
        "ld.global.v2.u32 {%r1, %r2}, [%rd1+128];": "byte 128",
        "st.global.u32 [%at+4], 1;": r"byte 128 of 'argument 0'",
        "mov.u64 %rd3, 0; ld.global.u32 %r1, [%rd3];": "lie in no allocation",
        "cvt.u32.u64 %r2, %rd1; cvt.u64.u32 %rd3, %r2; ld.global.u32 %r1, [%rd3];": "lie in no allocation",
        "ld.shared.u32 %r1, [%rd2];": "lie in no allocation",
        "ld.const.u32 %r1, [%rd2];": "lie in no allocation",
        "ld.u32 %r1, [%rd2+4];": "byte 128",
    }.items():
        assert_fault("out of bounds", message, LOAD_X + AT + body, [out(), In(x)], params=TWO)
    run(LOAD_X + AT + "ld.global.u32 %r1, [%rd2]; st.global.u32 [%at], %r1;", [out(), In(x)], params=TWO)


def test_bounds_of_other_spaces():
    two = ".shared .align 4 .b8 a[64]; .shared .align 4 .b8 b[64]; mov.u32 %r1, a; "
    assert_fault("out of bounds", "of shared memory", two + "st.shared.u32 [%r1+64], 0;")
    assert_fault("out of bounds", "", two + "mov.u32 %r2, b; st.shared.u32 [%r2+-4], 0;")
    assert_fault(
        "out of bounds",
        "",
        ".shared .align 4 .b8 a[64]; mov.u64 %rd1, a; cvta.shared.u64 %rd2, %rd1; st.u32 [%rd2+64], 0;",
    )
    local = ".local .align 4 .b8 l[8]; mov.u64 %rd1, l; "
    assert_fault("out of bounds", "at local address", local + "st.local.u32 [%rd1+8], 0;")
    run(local + "st.local.u32 [%rd1+4], 0; ld.local.u32 %r1, [%rd1+4];")
    assert_fault("out of bounds", "at param address", "ld.param.u32 %r1, [out+8];")
    dynamic = "mov.u32 %r1, d; mad.lo.u32 %r1, %tid, 4, %r1; st.shared.u32 [%r1], 0;"
    before = ".extern .shared .align 16 .b8 d[];\n"
    assert_fault("out of bounds", "of shared memory, which has 124", dynamic, before=before, shared_bytes=124)
    run(dynamic, before=before, shared_bytes=128)
    assert_fault(
        "read-only", "is an input", LOAD_X + "st.global.u32 [%rd2], 0;", [out(), np.zeros(32, np.uint32)], params=TWO
    )


def test_alignment():
    for body in (
        "ld.global.u32 %r1, [%rd1+2];",
        "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%rd1+8];",
        "ld.global.v2.u16 {%h1,%h2}, [%rd1+2];",
    ):
        assert_fault("misaligned", "are not aligned", LOAD_X + body, [out(), np.zeros(32, np.uint32)], params=TWO)
    body = LOAD_X + "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%rd1];"
    run(body, [out(), np.zeros(32, np.uint32)], params=TWO)
    assert_fault("misaligned", "", body, [out(), In(np.zeros(32, np.uint32), misalign=4)], params=TWO)
    assert_fault("misaligned", "", SHARED + "st.shared.u64 [%r21], %rd1;".replace("%rd1", "0"))


# ---- Uninitialised ---------------------------------------------------------------------------------------------------
def test_uninitialised_memory():
    assert_fault("uninitialised memory", "byte 0 of shared memory", SHARED + "ld.shared.u32 %r1, [%r21];", threads=1)
    assert_fault(
        "uninitialised memory",
        "byte 3 of local",
        ".local .align 4 .b8 l[4]; st.local.u16 [l], 0; st.local.u8 [l+2], 0; ld.local.u32 %r1, [l];",
    )
    assert_fault("uninitialised memory", "byte 0 of 'argument 0'", AT + "ld.global.u32 %r1, [%at];", threads=1)
    run(
        SHARED
        + "st.shared.u32 [%r21], 0; ld.shared.u32 %r1, [%r21];"
        + AT
        + "st.global.u32 [%at], 0; ld.global.u32 %r2, [%at];"
    )
    # A shared byte does not stay initialised from one block to the next.
    body = (
        SHARED
        + "mov.u32 %r2, %ctaid.x; setp.ne.u32 %p1, %r2, 0; @!%p1 st.shared.u32 [%r21], 0; ld.shared.u32 %r1, [%r21];"
    )
    run(body, grid=1)
    assert_fault("uninitialised memory", "", body, grid=2)


def test_buffers_remember_what_was_written():
    buffer = out()
    with pytest.raises(PtxFault, match="before anything wrote it"):
        run(AT + "ld.global.u32 %r1, [%at];", [buffer])
    run(AT + "setp.ne.u32 %p1, %tid, 7; @%p1 st.global.u32 [%at], 1;", [buffer])
    assert buffer.unwritten == 4
    run(AT + "setp.ne.u32 %p1, %tid, 7; @%p1 ld.global.u32 %r1, [%at];", [buffer])


def test_uninitialised_registers():
    assert_fault("uninitialised register", "never written", "add.u32 %r1, %r2, 1;")
    assert_fault("uninitialised register", "guard", "@%p1 add.u32 %r1, %tid, 1;")
    body = "setp.lt.u32 %p1, %tid, 5; @%p1 mov.u32 %r1, 0; add.u32 %r2, %r1, 1;"
    fault = assert_fault("uninitialised register", "", body)
    assert fault.thread == (5, 0, 0)
    # A move passes the state on; a selection does so only if it selects the register.
    run(
        "mov.u32 %r1, %r2; mov.b64 %rd1, {%r1, %r2}; setp.lt.u32 %p1, %tid, 99; selp.u32 %r3, %tid, %r1, %p1; "
        "add.u32 %r3, %r3, 1;"
    )
    assert_fault("uninitialised register", "", "mov.u32 %r1, %r2; add.u32 %r3, %r1, 1;")


# ---- Races on shared memory ------------------------------------------------------------------------------------------
NEIGHBOUR = (
    SHARED + "xor.b32 %r2, %tid, {x}; mad.lo.u32 %r3, %r2, 4, %r20; st.shared.u32 [%r21], %tid; "
    "{sync} ld.shared.u32 %r1, [%r3]; {then}"
)


def test_a_missing_barrier():
    for x in (1, 32):  # a lane of the same warp, and another warp
        for seed in range(3):
            with pytest.raises(PtxFault) as caught:
                run(NEIGHBOUR.format(x=x, sync="", then=""), threads=64, seed=seed)
            assert caught.value.kind in ("race on shared memory", "uninitialised memory")
        run(NEIGHBOUR.format(x=x, sync="bar.sync 0;", then=""), threads=64)
    # The words were written before, so no read of uninitialised memory hides the race.
    body = NEIGHBOUR.format(x=32, sync="bar.sync 0;", then="{} st.shared.u32 [%r21], 5;")
    assert_fault("race on shared memory", "the (write|read)", body.format(""), threads=64)
    run(body.format("bar.sync 0;"), threads=64)


def test_what_orders_the_lanes_of_a_warp():
    assert_fault("race on shared memory", "not ordered after", NEIGHBOUR.format(x=1, sync="", then=""))
    run(NEIGHBOUR.format(x=1, sync="bar.warp.sync -1;", then=""))
    # A warp's barrier does not order warps; a barrier of other lanes, a shuffle or a vote does not order these lanes.
    for seed in range(3):
        with pytest.raises(PtxFault, match=r"not ordered after|before anything wrote"):
            run(NEIGHBOUR.format(x=32, sync="bar.warp.sync -1;", then=""), threads=64, seed=seed)
    halves = "setp.lt.u32 %p1, %tid, 16; selp.b32 %r9, 0xFFFF, 0xFFFF0000, %p1; bar.warp.sync %r9;"
    run(NEIGHBOUR.format(x=1, sync=halves, then=""))
    assert_fault("race on shared memory", "not ordered after", NEIGHBOUR.format(x=16, sync=halves, then=""))
    for sync in (
        "shfl.sync.idx.b32 %r9, %tid, 0, 31, -1;",
        "setp.lt.u32 %p1, %tid, 1; vote.sync.any.pred %p2, %p1, -1;",
    ):
        assert_fault("race on shared memory", "not ordered after", NEIGHBOUR.format(x=1, sync=sync, then=""))
        run(NEIGHBOUR.format(x=1, sync=sync, then=""), collectives_order=True)


def test_an_arrival_at_a_barrier_covers_what_its_lane_did_before():
    """Lanes of warp 0 arrive in two parts, or some have exited; no barrier orders what they write after an arrival."""
    write, arrive = "st.shared.u32 [%r21], %tid;", "barrier.arrive 1, 64;"
    parts = (
        SHARED
        + "setp.lt.u32 %p1, %tid, 32; setp.lt.u32 %p2, %tid, 16; @!%p1 bra SYNC; @!%p2 bra REST; {first} bra END;"
        "REST: {rest} bra END; SYNC: barrier.sync 1, 64; sub.u32 %r21, %r21, 128; ld.shared.u32 %r1, [%r21]; END:"
    )
    for seed in range(3):
        run(parts.format(first=write + arrive, rest=write + arrive), threads=64, seed=seed)
        # Lanes that have exited count as arrived.
        run(parts.format(first=write + "exit;", rest=write + arrive), threads=64, seed=seed)
    late = parts.format(first=arrive + write, rest=write + arrive)
    for seed in range(3):
        with pytest.raises(PtxFault, match=r"not ordered after|before anything wrote"):
            run(late, threads=64, seed=seed)


def test_two_lanes_store_to_one_place():
    assert_fault("race on shared memory", "the write", SHARED + "st.shared.u32 [%r20], 1;")
    run(SHARED + "st.shared.u32 [%r20], 1;", threads=1)
    # Neighbouring bytes of a word are separate places.
    run(
        SHARED + "cvt.u16.u32 %h1, %tid; add.u32 %r2, %r20, %tid; st.shared.u8 [%r2], %h1; ld.shared.u8 %h2, [%r2];",
        threads=96,
    )
    # A word overlaps one of its bytes.
    body = (
        SHARED + "setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.u32 [%r20], 1; setp.eq.u32 %p2, %tid, {}; "
        "@%p2 st.shared.u8 [%r20+3], 1;"
    )
    assert_fault("race on shared memory", "", body.format(40), threads=64)
    run(body.format(0), threads=64)


def test_atomics_do_not_race_with_atomics():
    body = (
        SHARED + "setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.u32 [%r20], 0; {} red.shared.add.u32 [%r20], 1; "
        "{} @%p1 ld.shared.u32 %r1, [%r20];"
    )
    run(body.format("bar.sync 0;", "bar.sync 0;"), threads=64)
    for syncs in (("bar.sync 0;", ""), ("", "bar.sync 0;")):
        for seed in range(3):
            with pytest.raises(PtxFault, match=r"not ordered after|before anything wrote"):
                run(body.format(*syncs), threads=64, seed=seed)


def test_a_flag_in_shared_memory():
    """Release and acquire order the accesses around them; relaxed accesses do not, and neither does a plain flag."""
    body = (
        ".shared .align 4 .b8 d[8]; mov.u32 %r20, d; setp.eq.u32 %p1, %tid, 0; "
        "@%p1 st.relaxed.cta.shared.u32 [%r20+4], 0; bar.sync 0;"
        "setp.eq.u32 %p2, %tid, 32; @%p1 st.shared.u32 [%r20], 9; {before} @%p1 st.{st}.shared.u32 [%r20+4], 1; "
        "@!%p2 bra END;"
        "SPIN: ld.{ld}.shared.u32 %r2, [%r20+4]; setp.eq.u32 %p3, %r2, 0; @%p3 bra SPIN; "
        "{after} ld.shared.u32 %r1, [%r20]; END:"
    )
    good = [("release.cta", "acquire.cta", "", ""), ("relaxed.cta", "relaxed.cta", "membar.cta;", "membar.cta;")]
    for st, ld, before, after in good:
        for seed in range(4):
            run(body.format(st=st, ld=ld, before=before, after=after), threads=64, seed=seed)
    bad = [
        ("relaxed.cta", "acquire.cta", "", ""),
        ("release.cta", "relaxed.cta", "", ""),
        ("volatile", "volatile", "", ""),
    ]
    for st, ld, before, after in bad:
        assert_fault("race on shared memory", "", body.format(st=st, ld=ld, before=before, after=after), threads=64)


@pytest.mark.parametrize(
    ("release", "acquire"),
    [
        ("{}st.release.cta.shared.u32 [%r20+252], 1;", "ld.acquire.cta.shared.u32 %r2, [%r20+252];"),
        (
            "{}membar.cta; {}st.relaxed.cta.shared.u32 [%r20+252], 1;",
            "ld.relaxed.cta.shared.u32 %r2, [%r20+252]; membar.cta;",
        ),
        ("{}atom.release.cta.shared.add.u32 %r3, [%r20+252], 1;", "ld.acquire.cta.shared.u32 %r2, [%r20+252];"),
    ],
)
def test_a_release_orders_the_accesses_of_its_lane(release, acquire):
    """Lane 0 releases what it knows: what other lanes of its warp wrote only if the warp has synchronized."""
    body = (
        SHARED + "setp.eq.u32 %p1, %tid, 0; setp.lt.u32 %p2, %tid, 32; @%p1 st.relaxed.cta.shared.u32 [%r20+252], 0;"
        "bar.sync 0; @!%p2 bra SPIN; st.shared.u32 [%r21], %tid; {sync}"
        + release.replace("{}", "@%p1 ")
        + "bra END; SPIN:"
        + acquire
        + "setp.eq.u32 %p3, %r2, 0; @%p3 bra SPIN; ld.shared.u32 %r1, [%r20+{at}]; END:"
    )
    two = "setp.lt.u32 %p4, %tid, 2; @%p4 bar.warp.sync 3;"
    for sync, at in (("", 0), ("bar.warp.sync -1;", 4), (two, 4)):
        for seed in range(4):
            run(body.format(sync=sync, at=at), threads=64, seed=seed)
    for sync, at in (("", 4), (two, 8)):
        text = body.format(sync=sync, at=at)
        assert_fault("race on shared memory", f"thread .{at // 4},0,0", text, threads=64)


# Thread 0 writes, sets a flag by a release and arrives at an mbarrier. Warp 1 waits there, so that it comes later, but
# both are relaxed, so that this orders nothing.
FLAG = (
    SHARED + ".shared .align 8 .b8 bar[8]; mov.u32 %r19, bar; setp.eq.u32 %p1, %tid, 0; setp.lt.u32 %p3, %tid, 32;"
    "@%p1 mbarrier.init.shared::cta.b64 [%r19], 1; @%p1 st.relaxed.cta.shared.u32 [%r20+4], 0;"
    "@%p1 st.relaxed.cta.shared.u32 [%r20+8], 0; bar.sync 0;"
    "@!%p3 bra LATER; @%p1 st.shared.u32 [%r20], 9; @%p1 st.release.cta.shared.u32 [%r20+4], 1;"
    "@%p1 mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%r19]; bra END;"
    "LATER: mbarrier.try_wait.parity.relaxed.cta.shared::cta.b64 %p3, [%r19], 0; @!%p3 bra LATER;"
    "mov.u32 %r5, %laneid; setp.eq.u32 %p1, %r5, 0; {acquire} {then} setp.eq.u32 %p4, %r5, {lane};"
    "@%p4 ld.shared.u32 %r1, [%r20]; END:"
)
SHUFFLE = "shfl.sync.idx.b32 %r4, %r5, 0, 31, -1;"
SEE = "{}ld.relaxed.cta.shared.u32 %r2, [%r20+4];"


@pytest.mark.parametrize(
    "acquire",
    [
        "@%p1 ld.acquire.cta.shared.u32 %r2, [%r20+4];",
        "@%p1 atom.acquire.cta.shared.add.u32 %r2, [%r20+4], 0;",
        SEE.format("@%p1 ") + "@%p1 membar.cta;",
        SEE.format("@%p1 ") + "membar.cta;",
        SEE.format("") + "@%p1 membar.cta;",
    ],
)
def test_an_acquire_orders_the_accesses_of_its_lane(acquire):
    """Lane 0 sees the flag: other lanes of its warp are ordered after the write if they have synchronized with it."""
    two = "setp.lt.u32 %p5, %r5, 2; @%p5 bar.warp.sync 3;"
    again = SHUFFLE + "setp.eq.u32 %p5, %r5, 1; @%p5 ld.acquire.cta.shared.u32 %r2, [%r20+4];"
    vote = "vote.sync.any.pred %p6, %p1, -1;"
    for then, lane in (
        *(("", 0), (SHUFFLE, 0), ("bar.warp.sync -1;", 31), ("bar.sync 1, 32;", 31), (two, 1), (again, 1)),
        (two + "setp.lt.u32 %p5, %r5, 4; @%p5 bar.warp.sync 15;", 2),
    ):
        for seed in range(3):
            run(FLAG.format(acquire=acquire, then=then, lane=lane), threads=64, seed=seed)
    for then, lane in (("", 1), (SHUFFLE, 1), (vote, 31), (two + SHUFFLE, 2), (again, 2)):
        text = FLAG.format(acquire=acquire, then=then, lane=lane)
        assert_fault("race on shared memory", r"the read .* not ordered after .* \(0,0,0\)", text, threads=64)
        if then:
            run(text, threads=64, collectives_order=True)


def test_a_lane_acquires_what_it_has_read():
    fences = "@%p1 membar.cta; @!%p1 membar.cta;"
    for acquire, lane, right in (
        *((SEE.format("") + fence, lane, True) for fence in ("membar.cta;", fences) for lane in (0, 1)),
        (SEE.format("@%p1 ") + SHUFFLE + "membar.cta;", 1, False),
        (SEE.format("@%p1 ") + SHUFFLE + "@!%p1 membar.cta;", 0, False),
        (SEE.format("") + SHUFFLE + "@%p1 membar.cta;", 1, False),
        ("ld.acquire.cta.shared.u32 %r2, [%r20+4];", 1, True),
        ("atom.acquire.cta.shared.add.u32 %r2, [%r20+4], 0;", 1, True),
        # Lane 0 reads the flag, and the others another one.
        ("selp.u32 %r6, 4, 8, %p1; add.u32 %r6, %r6, %r20; ld.acquire.cta.shared.u32 %r2, [%r6];", 0, True),
        ("selp.u32 %r6, 4, 8, %p1; add.u32 %r6, %r6, %r20; ld.acquire.cta.shared.u32 %r2, [%r6];", 1, False),
    ):
        text = FLAG.format(acquire=acquire, then="", lane=lane)
        for seed in range(3):
            if right:
                run(text, threads=64, seed=seed)
        if not right:
            assert_fault("race on shared memory", "the read .* not ordered after", text, threads=64)


def test_the_last_block_reads_what_the_others_wrote():
    """One thread's fence and atomic publish what its block wrote, if the block's threads have synchronized."""
    body = (
        "mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r2, 32, %tid; mad.wide.u32 %at, %r3, 4, %out;"
        "setp.eq.u32 %p1, %tid, 0; st.global.u32 [%at], %r3; {sync} @!%p1 bra END; fence.acq_rel.gpu;"
        "ld.param.u64 %rd1, [x]; atom.relaxed.gpu.global.add.u32 %r4, [%rd1], 1; fence.acq_rel.gpu;"
        "setp.ne.u32 %p2, %r4, 2; @%p2 bra END; ld.global.u32 %r5, [%out]; ld.global.u32 %r5, [%out+{at}]; END: {then}"
    )

    def last_block(sync: str, at: int, seed: int, then: str = "") -> None:
        arguments = [out(96), InOut(np.zeros(1, np.uint32))]
        run(body.format(sync=sync, at=at, then=then), arguments, params=TWO, grid=3, seed=seed)

    for seed in range(6):
        last_block("bar.warp.sync -1;", 4, seed)
        last_block("", 128, seed)
        for at in (4, 132):
            with pytest.raises(PtxFault, match=r"thread \(1,0,0\)") as caught:
                last_block("", at, seed)
            assert caught.value.kind == "race on global memory"
        # The other lanes learn from lane 0 that the block is the last one.
        ask = "shfl.sync.idx.b32 %r4, %r4, 0, 31, -1; setp.eq.u32 %p2, %r4, 2; {}"
        ask += "@%p2 ld.global.u32 %r5, [%out]; @%p2 ld.global.u32 %r5, [%out+128];"
        last_block("mov.u32 %r4, 0; bar.warp.sync -1;", 4, seed, ask.format("bar.warp.sync -1;"))
        with pytest.raises(PtxFault, match=r"the read of byte (0|128) of"):
            last_block("mov.u32 %r4, 0; bar.warp.sync -1;", 4, seed, ask.format(""))


def random_program(rng: np.random.Generator, kinds: list[str]) -> tuple[str, bool]:
    """Return accesses by single threads of three warps with synchronizations, and whether two of the accesses race.

    Each thread has a vector clock: an access is ordered after an earlier one if its thread knows the other's clock. In
    a hand-over some threads arrive at an mbarrier, and some lanes of a warp wait for them, each for itself.
    """
    threads, size = 96, 16
    body = f".shared .align 16 .b8 s[{size}]; mov.u32 %r20, s; mov.u32 %r1, 0; mov.u16 %h1, 0;"
    body += f"setp.lt.u32 %p1, %tid, {size}; add.u32 %r2, %r20, %tid; @%p1 st.shared.u8 [%r2], %h1; INIT bar.sync 0;"
    knows = np.zeros((threads, threads), int)
    clock = np.ones(threads, int)
    accesses: list[tuple[int, int, range, bool]] = []
    expected: list[int] = []  # the arrivals at each mbarrier
    racing = False
    for _ in range(rng.integers(3, 14)):
        kind = rng.choice(kinds)
        if kind in ("read", "write"):
            thread, width = int(rng.integers(threads)) // 8 * 8 % 96, int(rng.choice([1, 2, 4]))
            place = range(at := int(rng.integers(0, 2 * width, 1)[0]) // width * width, at + width)
            operation = f"{'ld' if kind == 'read' else 'st'}.shared.u{8 * width}"
            register = "%r3" if width == 4 else "%h3"
            operands = f"{register}, [%r20+{at}]" if kind == "read" else f"[%r20+{at}], {register.replace('3', '1')}"
            body += f"setp.eq.u32 %p1, %tid, {thread}; @%p1 {operation} {operands};"
            for other, when, bytes_, write in accesses:
                conflict = (write or kind == "write") and set(bytes_) & set(place) and other != thread
                racing = racing or bool(conflict and knows[thread, other] < when)
            accesses.append((thread, clock[thread], place, kind == "write"))
            continue
        if kind == "hand over":
            number, first, count = len(expected), int(rng.integers(12)) * 8, int(rng.choice([1, 8, 9, 32]))
            first = first if count < 32 else first // 32 * 32
            sources = np.arange(first, min(first + count, threads))
            most = int(rng.choice([1, 8, 32]))
            waiting = np.arange(most) + max(most, 8) * int(rng.integers(96 // max(most, 8)))
            expected.append(len(sources))
            body += (
                f"sub.u32 %r5, %tid, {first}; setp.lt.u32 %p1, %r5, {len(sources)};"
                f"@%p1 mbarrier.arrive.shared::cta.b64 _, [%r19+{8 * number}];"
                f"sub.u32 %r5, %tid, {waiting[0]}; setp.ge.u32 %p1, %r5, {most}; @%p1 bra PAST{number};"
                f"WAIT{number}: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r19+{8 * number}], 0;"
                f"@!%p2 bra WAIT{number}; PAST{number}:"
            )
            message = knows[sources].max(0)
            message[sources] = clock[sources]
            clock[sources] += 1
            knows[waiting] = np.maximum(knows[waiting], message)
            continue
        if kind == "barrier":
            body += "bar.sync 0;"
            groups = [range(threads)]
        elif kind == "warp":
            body += "bar.warp.sync -1;"
            groups = [range(w, w + 32) for w in range(0, threads, 32)]
        else:
            body += "mov.u32 %r4, %laneid; setp.lt.u32 %p2, %r4, 16; @%p2 bar.warp.sync 0xFFFF;"
            groups = [range(w, w + 16) for w in range(0, threads, 32)]
        for group in groups:
            members = list(group)
            met = knows[members].max(0)
            met[members] = clock[members]
            knows[members] = met
            clock[members] += 1
    init = f".shared .align 8 .b8 bars[{8 * len(expected) + 8}]; mov.u32 %r19, bars; setp.eq.u32 %p1, %tid, 0;"
    init += "".join(f"@%p1 mbarrier.init.shared::cta.b64 [%r19+{8 * k}], {n};" for k, n in enumerate(expected))
    return body.replace("INIT", init if expected else ""), racing


@pytest.mark.parametrize("synchronizations", [["barrier", "warp", "half"], ["hand over"] * 4 + ["warp", "half"]])
def test_races_are_found_exactly(synchronizations):
    """Every race that some order of the accesses allows is reported under each schedule, and nothing else is."""
    rng = np.random.default_rng(2)
    seen = [0, 0]
    accesses = ["read", "write"] * 2 * (len(synchronizations) // 3)
    for _ in range(300):
        body, racing = random_program(rng, [*accesses, *synchronizations])
        seen[racing] += 1
        for seed in range(3):
            if racing:
                with pytest.raises(PtxFault) as caught:
                    run(body, threads=96, seed=seed)
                assert caught.value.kind == "race on shared memory"
            else:
                run(body, threads=96, seed=seed)
    assert min(seen) > 50, seen


# ---- Races on global memory ------------------------------------------------------------------------------------------
def test_global_races():
    at = "mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r2, 32, %tid; mad.wide.u32 %at, %r3, 4, %out;"
    run(at + "st.global.u32 [%at], %r3;", grid=3)
    assert_fault("race on global memory", r"of block \(\d,0,0\)", AT + "st.global.u32 [%at], 1;", [out()], grid=2)
    run(AT + "red.global.add.u32 [%at], 1;", [InOut(np.zeros(32, np.uint32))], grid=2)
    # Within a block a barrier orders global memory too; between blocks only the launch does.
    swap = (
        AT + "st.global.u32 [%at], %tid; {} xor.b32 %r2, %tid, 63; mad.wide.u32 %rd2, %r2, 4, %out; "
        "ld.global.u32 %r1, [%rd2];"
    )
    run(swap.format("bar.sync 0;"), [out(64)], threads=64)
    for seed in range(3):
        with pytest.raises(PtxFault, match=r"not ordered after|before anything wrote"):
            run(swap.format(""), [out(64)], threads=64, seed=seed)
    body = (
        AT
        + "mov.u32 %r4, %ctaid.x; setp.eq.u32 %p1, %r4, 1; @%p1 ld.global.u32 %r1, [%at]; @!%p1 st.global.u32 [%at], 3;"
    )
    assert_fault("race on global memory", "", body, [InOut(np.zeros(32, np.uint32))], grid=2)


def test_the_read_only_path():
    body = AT + "st.global.u32 [%at], 1; ld.global.nc.u32 %r1, [%at];"
    assert_fault("read-only", "after this kernel wrote it", body)
    run(body.replace(".nc", ""))


# ---- Asynchronous copies ---------------------------------------------------------------------------------------------
X = np.arange(256, dtype=np.uint32)
COPY = (
    SHARED
    + LOAD_X
    + "cp.async.ca.shared.global [%r21], [%rd2], 4; cp.async.commit_group; {} ld.shared.u32 %r1, [{}];"
    + AT
    + "st.global.u32 [%at], %r1;"
)


def test_a_copy_is_waited_for():
    for wait in ("cp.async.wait_group 0;", "cp.async.wait_all;"):
        result = out()
        run(COPY.format(wait, "%r21"), [result, X], params=TWO)
        assert (result.array == X[:32]).all()
    for wait in ("", "cp.async.wait_group 1;", "bar.sync 0;"):
        fault = assert_fault(
            "asynchronous copy", "has not been waited for", COPY.format(wait, "%r21"), [out(), X], params=TWO
        )
        assert "cp.async.ca" in fault.message
    open_group = COPY.format("cp.async.wait_group 0;", "%r21").replace("cp.async.commit_group;", "")
    assert_fault("asynchronous copy", "", open_group, [out(), X], params=TWO)
    run(open_group.replace("wait_group 0", "wait_all"), [out(), X], params=TWO)


def test_others_see_a_copy_after_a_barrier():
    other = "xor.b32 %r2, %tid, 32; mad.lo.u32 %r3, %r2, 4, %r20;"
    good = COPY.format("cp.async.wait_all; bar.sync 0;" + other, "%r3")
    result = out(64)
    run(good, [result, X], threads=64, params=TWO)
    assert (result.array == X[np.arange(64) ^ 32]).all()
    for wait in ("cp.async.wait_all;", "bar.sync 0; cp.async.wait_all;"):
        for seed in range(4):
            with pytest.raises(PtxFault) as caught:
                run(COPY.format(wait + other, "%r3"), [out(64), X], threads=64, params=TWO, seed=seed)
            assert caught.value.kind in ("race on shared memory", "asynchronous copy", "uninitialised memory")


def test_the_groups_are_counted():
    body = (
        SHARED
        + LOAD_X
        + """
    cp.async.ca.shared.global [%r21], [%rd2], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r21+128], [%rd2+128], 4; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.u32 %r1, [%r21+OFFSET];"""
    )
    run(body.replace("OFFSET", "0"), [out(), X], params=TWO)
    assert_fault("asynchronous copy", "", body.replace("OFFSET", "128"), [out(), X], params=TWO)


def test_a_buffer_overwritten():
    copy = "cp.async.ca.shared.global [%r21], [%rd2], 4;"
    # A store overwrites it while the copy is in flight.
    assert_fault(
        "asynchronous copy",
        "is written while",
        SHARED + LOAD_X + copy + "st.shared.u32 [%r21], 0;",
        [out(), X],
        params=TWO,
    )
    assert_fault("asynchronous copy", "is written while", SHARED + LOAD_X + copy + copy, [out(), X], params=TWO)
    # A copy overwrites it while others may still read.
    body = (
        SHARED + LOAD_X + "st.shared.u32 [%r21], 0; bar.sync 0; xor.b32 %r2, %tid, 32; mad.lo.u32 %r3, %r2, 4, %r20; "
        "ld.shared.u32 %r4, [%r3]; {} " + copy
    )
    for seed in range(4):
        with pytest.raises(PtxFault) as caught:
            run(body.format(""), [out(64), X], threads=64, params=TWO, seed=seed)
        assert caught.value.kind in ("race on shared memory", "asynchronous copy")
    run(body.format("bar.sync 0;"), [out(64), X], threads=64, params=TWO)


def test_a_source_changed_in_flight():
    body = SHARED + LOAD_X + "cp.async.ca.shared.global [%r21], [%rd2], 4; {} st.global.u32 [%rd2], 0; {}"
    run(body.format("cp.async.wait_all;", ""), [out(), InOut(X.copy())], params=TWO)
    assert_fault(
        "asynchronous copy",
        "may still read it",
        body.format("", "cp.async.wait_all;"),
        [out(), InOut(X.copy())],
        params=TWO,
    )


@pytest.mark.parametrize("size", [4, 8, 16])
def test_sizes_and_filling_with_zeros(size):
    """src-size bytes come from the source, and zeros fill the rest; with ignore-src they fill everything."""
    data = np.arange(1, 513, dtype=np.uint8)
    for source_size in {0, 1, size - 1, size}:
        body = f"""
        .shared .align 16 .b8 s[512]; mov.u32 %r20, s; mad.lo.u32 %r21, %tid, {size}, %r20;
        ld.param.u64 %rd1, [x]; mad.wide.u32 %rd2, %tid, {size}, %rd1;
        mov.u32 %r2, {source_size}; setp.ge.u32 %p2, %tid, 99;
        cp.async.{"cg" if size == 16 else "ca"}.shared.global.L2::128B [%r21], [%rd2], {size}, %r2;
        cp.async.wait_all; mad.wide.u32 %at, %tid, {size}, %out;
        """
        body += "".join(f"ld.shared.u8 %h1, [%r21+{k}]; st.global.u8 [%at+{k}], %h1;" for k in range(size))
        got = np.zeros((32, size), np.uint8)
        run(body, [Out(got), data], params=TWO)
        want = data[: 32 * size].reshape(32, size).copy()
        want[:, source_size:] = 0
        assert (got == want).all()
        run(body.replace(f"{size}, %r2;", f"{size}, %p2;"), [Out(got), data], params=TWO)
        assert (got == data[: 32 * size].reshape(32, size)).all()
    assert_fault(
        "illegal",
        "exceeds the copy's",
        body.replace(f"mov.u32 %r2, {source_size}", "mov.u32 %r2, 17"),
        [Out(got), data],
        params=TWO,
    )


def test_a_copy_of_nothing_reads_nothing():
    body = (
        SHARED + LOAD_X + "mov.u64 %rd2, {}; cp.async.ca.shared.global [%r21], [%rd2], 4, 0; cp.async.wait_all; "
        "ld.shared.u32 %r1, [%r21];"
    )
    run(body.format("0"), [out(), X], params=TWO)
    assert_fault("out of bounds", "", body.format("0").replace("4, 0", "4, 4"), [out(), X], params=TWO)


# ---- Counting --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("stride", "extra"), [(0, 0), (1, 0), (2, 1), (3, 0), (4, 3), (32, 31), (33, 0)])
def test_bank_conflicts(stride, extra):
    body = (
        f".shared .align 16 .b8 s[{4 * 33 * 32 + 4}]; mov.u32 %r20, s; mul.lo.u32 %r2, %tid, {4 * stride}; "
        f"add.u32 %r21, %r20, %r2;"
    )
    body += "atom.shared.exch.b32 %r1, [%r21], 0;" if stride == 0 else "st.shared.u32 [%r21], 1;"
    if stride == 0:
        body = (
            SHARED
            + "setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.u32 [%r20], 0; bar.warp.sync -1; ld.shared.u32 %r1, [%r20];"
        )
    assert run(body).bank_conflicts == extra


def test_bank_conflicts_of_wide_accesses():
    """Half warps are served at 64 bits, quarter warps at 128 bits; accesses side by side have no conflicts."""
    wide = ".shared .align 16 .b8 s[4096]; mov.u32 %r20, s; mad.lo.u32 %r21, %tid, {stride}, %r20; st.shared.{what};"
    two, four = "v2.u32 [%r21], {%tid, %tid}", "v4.u32 [%r21], {%tid, %tid, %tid, %tid}"
    report = run(wide.format(stride=8, what=two))
    assert report.bank_conflicts == 0 and report._sum("wavefronts") == 2
    assert run(wide.format(stride=16, what=two)).bank_conflicts == 2
    report = run(wide.format(stride=16, what=four))
    assert report.bank_conflicts == 0 and report._sum("wavefronts") == 4
    assert run(wide.format(stride=128, what=four)).bank_conflicts == 4 * 7
    assert run(wide.format(stride=32, what=four)).bank_conflicts == 4


@pytest.mark.parametrize(
    ("stride", "offset", "touched", "needed"), [(4, 0, 4, 4), (4, 4, 5, 4), (8, 0, 8, 4), (32, 0, 32, 4), (0, 0, 1, 1)]
)
def test_sectors(stride, offset, touched, needed):
    body = f"ld.param.u64 %rd1, [x]; mad.wide.u32 %rd2, %tid, {stride}, %rd1; ld.global.u32 %r1, [%rd2+{offset}];"
    report = run(body, [out(), np.zeros(300, np.uint32)], params=TWO)
    assert (report.sectors, report.sectors_needed) == (touched, needed)
    assert "sectors touched" in str(report)


# ---- Places ----------------------------------------------------------------------------------------------------------
def test_a_fault_names_block_thread_and_lines():
    text = f"""{HEADER}.visible .entry bad(.param .u64 out)
{{
    .reg .b64 %rd<4>; .reg .b32 %r<4>; .reg .pred %p<2>;
    .loc 1 12 5
    ld.param.u64 %rd1, [out]; mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %tid.y;
    mad.lo.u32 %r1, %r3, 5, %r1;
    setp.ne.u32 %p1, %r1, 9; @%p1 ret; setp.ne.u32 %p1, %r2, 1; @%p1 ret;
    .loc 2 34 5, function_name $L__info_string0, inlined_at 1 13 9
    st.global.u32 [%rd1+64], %r1;
    ret;
}}
.file 1 "/a/kernel.cu"
.file 2 "/a/helper.cuh"
"""
    with pytest.raises(PtxFault) as caught:
        Module.from_ptx(text).launch("bad", (1, 2), (5, 2), [Out(np.zeros(16, np.uint32))])
    fault = caught.value
    assert (fault.block, fault.thread, fault.line) == ((0, 1, 0), (4, 1, 0), 12)
    assert fault.source == "helper.cuh:34, inlined at kernel.cu:13"
    for part in (
        "block (0, 1, 0)",
        "thread (4, 1, 0)",
        "PTX line 12",
        "st.global.u32 [%rd1+64], %r1;",
        "helper.cuh:34",
    ):
        assert part in str(fault)
