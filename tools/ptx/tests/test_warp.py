"""Divergence, and what the lanes of a warp and the warps of a block do together."""

import numpy as np
import pytest

from ..machine import Out, PtxFault
from .helpers import assert_fault, run
from .test_memory import STORE, words

SEEDS = range(4)


# ---- Divergence ------------------------------------------------------------------------------------------------------
def test_lanes_part_and_meet():
    """Both sides of a branch run with their lanes only, what follows with all of them."""
    body = """
    setp.lt.u32 %p1, %tid, 10;
    @%p1 bra THEN;
    mov.u32 %r1, 1;
    activemask.b32 %r2;
    bra END;
    THEN: mov.u32 %r1, 2;
    activemask.b32 %r2;
    END: activemask.b32 %r3;
    xor.b32 %r1, %r2, %r3;
    """
    assert words(body) == [0xFFFFFFFF ^ 0x3FF] * 10 + [0x3FF] * 22


def test_loops_of_different_length():
    body = """
    mov.u32 %r1, 0; mov.u32 %r2, 0;
    LOOP: setp.ge.u32 %p1, %r2, %tid; @%p1 bra END;
    add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1; bra LOOP;
    END: activemask.b32 %r3; setp.ne.u32 %p2, %r3, 0xFFFFFFFF; @%p2 trap;
    """
    assert words(body) == [t * (t - 1) // 2 for t in range(32)]


def test_early_exit_and_guards():
    out = np.zeros(32, np.uint32)
    buffer = Out(out)
    report = run("setp.ge.u32 %p1, %tid, 5; @%p1 exit; mov.u32 %r1, 9; @!%p1 add.u32 %r1, %r1, %tid;" + STORE, [buffer])
    assert out[:5].tolist() == [9, 10, 11, 12, 13] and buffer.unwritten == 27 * 4
    assert report.instructions["st.global.u32"] == 5 and report.instructions["setp.ge.u32"] == 32


# ---- vote, match, redux, shfl ----------------------------------------------------------------------------------------
def test_votes():
    for bound, everyone, anyone in ((0, 0, 0), (3, 0, 1), (32, 1, 1)):
        body = f"setp.lt.u32 %p1, %tid, {bound}; vote.sync.{{}} %p2, %p1, -1; selp.u32 %r1, 1, 0, %p2;"
        assert words(body.format("all.pred")) == [everyone] * 32
        assert words(body.format("any.pred")) == [anyone] * 32
        assert words(body.format("uni.pred")) == [int(everyone == anyone)] * 32
        assert words(body.format("all.pred").replace(" %p1, -1", " !%p1, -1")) == [int(not anyone)] * 32
        ballot = f"setp.lt.u32 %p1, %tid, {bound}; vote.sync.ballot.b32 %r1, %p1, -1;"
        assert words(ballot) == [(1 << bound) - 1] * 32


def reference_shuffle(mode: str, b: int, c: int) -> list[int]:
    """The pseudocode of the ISA's section on shfl.sync, lane values 100 + lane."""
    result = []
    segment, clamp = c >> 8 & 31, c & 31
    for lane in range(32):
        most, least = (lane & segment) | (clamp & ~segment & 31), lane & segment
        if mode == "up":
            j, inside = lane - b, lane - b >= most
        elif mode == "down":
            j, inside = lane + b, lane + b <= most
        elif mode == "bfly":
            j, inside = lane ^ b, lane ^ b <= most
        else:
            j = least | (b & ~segment & 31)
            inside = j <= most
        result.append((100 + (j if inside else lane)) * 2 + inside)
    return result


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    for width in (32, 16, 4):
        # As the CUDA headers form c: the segment from the width, and the clamp 0 for up and 31 for the others.
        c = (32 - width) << 8 | (0 if mode == "up" else 31)
        for b in (0, 1, 3, 16):
            body = f"""
            add.u32 %r2, %tid, 100; shfl.sync.{mode}.b32 %r1|%p1, %r2, {b}, {c}, -1;
            selp.u32 %r3, 1, 0, %p1; mad.lo.u32 %r1, %r1, 2, %r3;"""
            assert words(body) == reference_shuffle(mode, b, c), (width, b)
    assert words("shfl.sync.down.b32 %r1, %tid, 1, 31, -1;") == [*range(1, 32), 31]
    assert words("shfl.sync.up.b32 %r1, %tid, 1, 0, -1;") == [0, *range(31)]


def test_match_and_redux():
    body = "and.b32 %r2, %tid, 3; match.any.sync.b32 %r1, %r2, -1;"
    assert words(body) == [0x11111111 << t % 4 for t in range(32)]
    body = "match.all.sync.b32 %r1|%p1, %r2, -1; @!%p1 mov.u32 %r1, 7;"
    assert words("mov.u32 %r2, 5;" + body) == [0xFFFFFFFF] * 32
    assert words("mov.u32 %r2, %tid;" + body) == [7] * 32
    values = [(t * 37 + 11) % 101 for t in range(32)]
    make = "mad.lo.u32 %r2, %tid, 37, 11; rem.u32 %r2, %r2, 101;"
    assert words(make + "redux.sync.add.u32 %r1, %r2, -1;") == [sum(values)] * 32
    assert words(make + "redux.sync.max.s32 %r1, %r2, -1;") == [max(values)] * 32
    assert words(make + "redux.sync.xor.b32 %r1, %r2, -1;") == [int(np.bitwise_xor.reduce(values))] * 32
    assert words("elect.sync %r1|%p1, -1; @%p1 add.u32 %r1, %r1, 50;") == [50] + [0] * 31


def test_a_part_of_the_warp_works_together():
    """Halves with their own member mask; the other half is elsewhere."""
    body = """
    setp.lt.u32 %p1, %tid, 16; @%p1 bra LOW;
    redux.sync.add.u32 %r1, %tid, 0xFFFF0000; bra END;
    LOW: redux.sync.max.u32 %r1, %tid, 0x0000FFFF;
    END:
    """
    assert words(body) == [15] * 16 + [sum(range(16, 32))] * 16
    body = "setp.lt.u32 %p1, %tid, 16; selp.b32 %r2, 0xFFFF, 0xFFFF0000, %p1; redux.sync.min.u32 %r1, %tid, %r2;"
    assert words(body) == [0] * 16 + [16] * 16


def test_members_wait_for_each_other():
    """Lanes that come early wait; they are not taken for the whole."""
    body = """
    setp.lt.u32 %p1, %tid, 16; @!%p1 bra MEET;
    mov.u32 %r2, 0;
    LOOP: add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, %tid; @%p2 bra LOOP;
    bra MEET;
    MEET: vote.sync.ballot.b32 %r1, %p1, -1;
    """
    assert words(body) == [0xFFFF] * 32


def test_wrong_members():
    assert_fault("warp synchronization", "not in the member mask", "redux.sync.add.u32 %r1, %tid, 0xFF;")
    body = (
        "setp.lt.u32 %p1, %tid, 8; @%p1 bra A; redux.sync.add.u32 %r1, %tid, -1; bra B; "
        "A: redux.sync.add.u32 %r1, %tid, -1; B:"
    )
    assert_fault("deadlock", "wait for other lanes", body)
    body = "setp.lt.u32 %p1, %tid, 8; @%p1 exit; shfl.sync.idx.b32 %r1, %tid, 0, 31, -1;" + STORE
    assert_fault("uninitialised register", "never written", body)


# ---- Barriers --------------------------------------------------------------------------------------------------------
def test_barriers_and_their_reductions():
    body = """
    setp.lt.u32 %p1, %tid, 40; bar.red.popc.u32 %r1, 0, %p1; barrier.cta.red.or.aligned.pred %p2, 0, %p1;
    bar.red.and.pred %p3, 0, %p1; selp.u32 %r2, 100, 0, %p2; selp.u32 %r3, 1000, 0, %p3; add.u32 %r1, %r1, %r2;
    add.u32 %r1, %r1, %r3;
    """
    for seed in SEEDS:
        assert words(body, 96, seed=seed) == [140] * 96


def test_named_barriers_hand_over():
    """Warp 0 produces and does not wait (arrive), warp 1 consumes (sync); warp 2 takes no part."""
    body = """
    .shared .align 4 .b8 s[128];
    mov.u32 %r1, 0; mov.u64 %rd1, s; and.b32 %r2, %tid, 31; mad.wide.u32 %rd1, %r2, 4, %rd1;
    setp.ge.u32 %p1, %tid, 64; @%p1 bra END;
    setp.ge.u32 %p1, %tid, 32; @%p1 bra CONSUME;
    st.shared.u32 [%rd1], %tid; bar.arrive 3, 64; bra END;
    CONSUME: bar.sync 3, 64; ld.shared.u32 %r1, [%rd1];
    END:
    """
    for seed in SEEDS:
        assert words(body, 96, seed=seed) == [0] * 32 + [*range(32)] + [0] * 32
    assert_fault("deadlock", "wait at barrier 3", body.replace("bar.arrive 3", "bar.arrive 2"), threads=96)
    wrong = body.replace("bar.arrive 3, 64", "bar.arrive 3, 96")
    assert_fault("barrier", "is used with count", wrong, threads=96)
    assert_fault("barrier", "not a multiple of the warp's size", "bar.sync 1, 40;")
    assert_fault("barrier", "barrier 16 does not exist", "bar.sync 16;")
    mixed = "setp.lt.u32 %p1, %tid, 32; @%p1 bra A; bar.sync 0; bra B; A: bar.red.popc.u32 %r1, 0, %p1; B:"
    assert_fault("barrier", "is mixed with another form", mixed, threads=64)


def test_a_barrier_that_not_all_reach():
    fault = assert_fault(
        "deadlock", "wait at barrier", "setp.lt.u32 %p1, %tid, 32; @%p1 bra A; bar.sync 0; A: bar.sync 1;", threads=64
    )
    assert "bar.sync" in str(fault)
    # Exited threads are not waited for; the lanes of one warp at two barriers never were meant to be.
    run("setp.lt.u32 %p1, %tid, 40; @%p1 exit; bar.sync 0;", threads=64)
    body = "setp.lt.u32 %p1, %tid, 8; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:"
    assert_fault("barrier", "two barrier instructions", body)
    run(body.replace("bar.sync", "barrier.sync"))


def test_an_endless_loop_ends():
    with pytest.raises(PtxFault, match="a loop without end") as caught:
        run("LOOP: bra LOOP;", limit=1000)
    assert caught.value.kind == "limit"
    assert_fault("trap", "trapped", "nanosleep.u32 20; trap;")
