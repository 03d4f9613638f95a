"""mbarriers, bulk copies, the asynchronous proxy and griddepcontrol, against hand-computed cases from the ISA."""

import numpy as np
import pytest

from ..machine import In, InOut, Out, PtxError, PtxFault
from .helpers import HEADER, Module, assert_fault, run
from .test_memory import STORE, words

SEEDS = range(6)
# One thread initializes the barrier `bar` of COUNT arrivals; %r20 is 1 KiB of shared memory, %p1 marks thread 0.
BARRIER = """
    .shared .align 8 .b8 bar[16]; .shared .align 128 .b8 s[1024];
    mov.u32 %r20, s; mov.u32 %r19, bar; setp.eq.u32 %p1, %tid, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r19], COUNT;
    bar.sync 0;
"""


def barrier(count: int) -> str:
    return BARRIER.replace("COUNT", str(count))


def wait(parity: int | str = 0, label: str = "WAIT", place: str = "[%r19]", name: str = "try_wait") -> str:
    """Return a loop until the phase of a parity has ended."""
    return f"{label}: mbarrier.{name}.parity.shared::cta.b64 %p2, {place}, {parity}; @!%p2 bra {label};"


ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r19];"
TEST = "mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r19], {}; selp.u32 %r1, 1, 0, %p2;"


# ---- Phases: PTX ISA, "mbarrier: Phase of the mbarrier object", "Tracking asynchronous operations", "test_wait" ------
def test_a_phase_ends_with_its_arrivals():
    """waitComplete of .parity says whether the phase of that parity has ended: the current one, or the one before."""
    for arrivals, ended in enumerate([0, 0, 1, 1, 2, 2, 3]):
        for parity in (0, 1):
            # In phase 0 the phase before has parity 1: "the immediately preceding phase" counts as ended.
            assert words(barrier(2) + ARRIVE * arrivals + TEST.format(parity), 1) == [int(ended % 2 != parity)]


def test_a_wait_two_phases_ahead_passes():
    """Only the parity is compared, so that a wait for phase 2 passes while phase 0 is not over, if phase 1 counts."""
    body = barrier(1) + "{}" + TEST.format(1)
    assert words(body.format(""), 1) == [1]
    assert words(body.format(ARRIVE), 1) == [0]
    assert words(body.format(ARRIVE * 2), 1) == [1]


def test_the_state_is_that_before_the_arrival():
    """arrive returns the state before; its pending count and its phase can be asked for."""
    ask = "mbarrier.arrive.shared::cta.b64 %rd1, [%r19]; mbarrier.pending_count.b64 %r1, %rd1;"
    for before, count in enumerate([3, 2, 1, 3, 2]):
        assert words(barrier(3) + ARRIVE * before + ask, 1) == [count]
    asked = (
        barrier(2) + "mbarrier.arrive.shared::cta.b64 %rd1, [%r19]; {}"
        "mbarrier.test_wait.shared::cta.b64 %p2, [%r19], %rd1; selp.u32 %r1, 1, 0, %p2;"
    )
    assert [words(asked.format(ARRIVE * n), 1) for n in (0, 1, 2)] == [[0], [1], [1]]
    assert_fault("mbarrier", "only the current phase and the one before", asked.format(ARRIVE * 3), threads=1)
    loop = asked.replace("test_wait", "try_wait").format(ARRIVE)
    assert words(loop, 1) == [1]


def test_transactions_count():
    """expect_tx adds, complete_tx subtracts; a phase ends when arrivals and transactions are both zero."""
    expect, complete = (f"mbarrier.{n}_tx.relaxed.cta.shared::cta.b64 [%r19], {{}};" for n in ("expect", "complete"))
    for body, ended in {
        ARRIVE: 1,
        expect.format(16) + ARRIVE: 0,
        ARRIVE.replace("arrive", "arrive.expect_tx").replace("];", "], 16;"): 0,
        expect.format(16) + ARRIVE + complete.format(8): 0,
        expect.format(16) + ARRIVE + complete.format(8) * 2: 1,
        complete.format(16) + expect.format(16) + ARRIVE: 1,
        complete.format(16): 0,
    }.items():
        assert words(barrier(1) + body + TEST.format(0), 1) == [ended], body
    most = (1 << 20) - 1  # "the valid range of tx-count is -(2^20 - 1) to 2^20 - 1"
    run(barrier(1) + expect.format(most), threads=1)
    assert_fault("mbarrier", "20 bits", barrier(1) + expect.format(most) + expect.format(1), threads=1)


def test_fewer_arrivals_from_now_on():
    """arrive_drop arrives and lowers the expected arrivals of the next phases."""
    drop = ARRIVE.replace("arrive", "arrive_drop")
    for more, ended in ((0, 1), (1, 0), (2, 1)):
        assert words(barrier(3) + ARRIVE * 2 + drop + ARRIVE * more + TEST.format(int(more > 0)), 1) == [ended]


def test_several_arrivals_at_once():
    many = "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r19], 3;"
    assert words(barrier(3) + many + TEST.format(0), 1) == [1]
    assert_fault("mbarrier", "3 arrivals at the mbarrier at byte 0 .*2 of 2 arrivals", barrier(2) + many, threads=1)


def test_what_the_isa_forbids():
    assert_fault("illegal", "between 1 and 2\\^20 - 1", barrier(0), threads=1)
    assert_fault("illegal", "between 1 and 2\\^20 - 1", barrier(1 << 20), threads=1)
    assert_fault("illegal", "a phase's parity is 2", barrier(1) + TEST.format(2), threads=1)
    assert_fault("misaligned", "aligned to 8", barrier(1) + ARRIVE.replace("[%r19]", "[%r19+4]"), threads=1)
    assert_fault("mbarrier", "has not been executed", barrier(1) + ARRIVE.replace("[%r19]", "[%r19+8]"), threads=1)
    assert_fault("mbarrier", "already", barrier(1) + "mbarrier.init.shared::cta.b64 [%r19], 1;", threads=1)
    for access in ("ld.shared.u32 %r1, [%r19];", "st.shared.u8 [%r19+7], %h1;"):
        body = barrier(1) + "mov.u16 %h1, 0;" + access
        assert_fault("mbarrier", "accessed as ordinary memory", body, threads=1)
    body = barrier(1) + "mbarrier.inval.shared::cta.b64 [%r19]; st.shared.u64 [%r19], 0;"
    run(body, threads=1)
    assert_fault("mbarrier", "has not been executed", body + ARRIVE, threads=1)
    # The barrier may be invalidated once all uses are ordered before.
    body = barrier(64) + ARRIVE + "{} @%p1 mbarrier.inval.shared::cta.b64 [%r19];"
    run(body.format("bar.sync 0;"), threads=64)
    for seed in SEEDS:
        with pytest.raises(PtxFault, match=r"is not ordered before|has not been executed"):
            run(body.format(""), threads=64, seed=seed)
    generic = "mov.u64 %rd1, bar; cvta.shared.u64 %rd1, %rd1; mbarrier.arrive.b64 _, [%rd1];" + TEST.format(0)
    assert words(barrier(1) + generic, 1) == [1]
    with pytest.raises(PtxError, match="noComplete"):
        run(barrier(1) + ARRIVE.replace("arrive", "arrive.noComplete"), threads=1)


@pytest.mark.parametrize(
    ("lane", "then", "right"),
    [(0, "", True), (1, "bar.warp.sync -1;", True), (1, "shfl.sync.idx.b32 %r4, %tid, 0, 31, -1;", False)],
)
def test_the_lane_that_has_waited_may_invalidate(lane, then, right):
    body = barrier(32) + "setp.ge.u32 %p3, %tid, 32; @%p3 " + ARRIVE + "@%p3 bra END; @!%p1 bra PAST;" + wait()
    body += f"PAST: {then} setp.eq.u32 %p5, %tid, {lane}; @%p5 mbarrier.inval.shared::cta.b64 [%r19]; END:"
    if right:
        for seed in SEEDS:
            run(body, threads=64, seed=seed)
    else:
        assert_fault("mbarrier", r"thread \(32,0,0\) or its warp is not ordered before", body, threads=64, seeds=SEEDS)


# ---- Order -----------------------------------------------------------------------------------------------------------
HAND_OVER = (
    "mad.lo.u32 %r21, %tid, 4, %r20; st.shared.u32 [%r21], %tid; {arrive} {wait} xor.b32 %r2, %tid, 32; "
    "mad.lo.u32 %r3, %r2, 4, %r20; ld.shared.u32 %r1, [%r3];"
)


def test_arrivals_release_and_waits_acquire():
    for seed in SEEDS:
        assert words(barrier(64) + HAND_OVER.format(arrive=ARRIVE, wait=wait()), 64, seed=seed) == [
            i ^ 32 for i in range(64)
        ]
        relaxed = ARRIVE.replace("arrive", "arrive.relaxed.cta")
        fenced = HAND_OVER.format(arrive="fence.acq_rel.cta;" + relaxed, wait=wait())
        assert words(barrier(64) + fenced, 64, seed=seed) == [i ^ 32 for i in range(64)]
        for arrive, waits in (
            (ARRIVE, ""),
            (ARRIVE, wait(1)),
            (relaxed, wait()),
            (ARRIVE, wait().replace("parity", "parity.relaxed.cta")),
        ):
            with pytest.raises(PtxFault, match=r"not ordered after|before anything wrote"):
                run(barrier(64) + HAND_OVER.format(arrive=arrive, wait=waits), threads=64, seed=seed)


def test_a_wait_is_a_loop():
    """try_wait may return false before the phase ends, so that a wait without a loop is caught."""
    once = "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r19], 0;"
    kinds = set()
    for seed in range(12):
        try:
            run(barrier(64) + HAND_OVER.format(arrive=ARRIVE, wait=once), threads=64, seed=seed)
        except PtxFault as fault:
            kinds.add(fault.kind)
    assert kinds <= {"race on shared memory", "uninitialised memory"} and kinds
    polled = HAND_OVER.format(arrive=ARRIVE, wait=wait(name="test_wait"))
    assert words(barrier(64) + polled, 64) == [i ^ 32 for i in range(64)]


def test_uses_are_ordered_after_the_initialization():
    body = barrier(64) + ARRIVE
    run(body, threads=64)
    for seed in SEEDS:
        with pytest.raises(PtxFault, match=r"not ordered after|has not been executed"):
            run(body.replace("bar.sync 0;", ""), threads=64, seed=seed)


def test_a_deadlock_names_the_barrier():
    body = barrier(33) + "setp.lt.u32 %p3, %tid, 32; @%p3 " + ARRIVE + "@%p3 bra END;" + wait() + "END:"
    fault = assert_fault("deadlock", "wait for the end of phase 0", body, threads=64)
    for part in ("warp 1, lanes 0xffffffff", "phase 0, 1 of 33 arrivals and 0 bytes pending", "try_wait.parity"):
        assert part in fault.message
    run(body.replace("33", "32"), threads=64)


# ---- Bulk copies: PTX ISA, "cp.async.bulk" ---------------------------------------------------------------------------
TWO = ".param .u64 out, .param .u64 x"
X = np.arange(1024, dtype=np.uint32)
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r19], {bytes};"
LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%rd1], {size}, [%r19];"
READ = "mad.lo.u32 %r21, %tid, 4, %r20; ld.shared.u32 %r1, [%r21];"


def load(size: int = 256, bytes: int | None = None, before: str = "", waits: str | None = None) -> str:
    """Return a kernel whose thread 0 loads `size` bytes of x, and whose threads then wait and read a word each."""
    issue = before + EXPECT.format(bytes=size if bytes is None else bytes) + LOAD.format(size=size)
    return (
        barrier(1)
        + "ld.param.u64 %rd1, [x]; @!%p1 bra WAIT0;"
        + issue
        + "WAIT0:"
        + (wait() if waits is None else waits)
        + READ
    )


def test_a_bulk_load():
    hint = LOAD.replace("bytes [", "bytes.L2::cache_hint [").replace("[%r19];", "[%r19], %rd1;")
    for body in (
        load(),
        load().replace("shared::cluster", "shared::cta"),
        load().replace(LOAD.format(size=256), hint.format(size=256)),
        load(waits=wait(name="test_wait")),
    ):
        for seed in SEEDS:
            got = np.zeros(64, np.uint32)
            run(body + STORE, [Out(got), In(X)], threads=64, params=TWO, seed=seed)
            assert (got == X[:64]).all()


def test_a_bulk_load_is_waited_for():
    for seed in SEEDS:
        for waits in ("", wait(1)):
            with pytest.raises(PtxFault) as caught:
                run(load(waits=waits), [Out(np.zeros(64, np.uint32)), X], threads=64, params=TWO, seed=seed)
            kinds = ("asynchronous copy", "race on shared memory", "uninitialised memory", "deadlock")
            assert caught.value.kind in kinds
        # Fewer bytes than come leave the phase open, or end it while the rest is under way; more leave it open.
        for bytes in (128, 384):
            with pytest.raises(PtxFault) as caught:
                run(load(bytes=bytes), [Out(np.zeros(64, np.uint32)), X], threads=64, params=TWO, seed=seed)
            assert caught.value.kind == "deadlock" and "bytes pending" in caught.value.message


def test_the_rules_of_bulk_copies():
    args = [Out(np.zeros(64, np.uint32)), In(X)]
    for size in (8, 24, 4):
        assert_fault("misaligned", "aligned to 16", load(size), args, threads=64, params=TWO)
    assert_fault("misaligned", "source", load().replace("[%rd1]", "[%rd1+8]"), args, threads=64, params=TWO)
    assert_fault("misaligned", "destination", load().replace("[%r20], [", "[%r20+4], ["), args, threads=64, params=TWO)
    assert_fault("out of bounds", "", load(2048), args, threads=64, params=TWO)
    assert_fault("out of bounds", "", load().replace("[%rd1]", "[%rd1+3968]"), args, threads=64, params=TWO)
    body = load().replace("[%r20], [", "[%r19], [")
    assert_fault("mbarrier", "belongs to an mbarrier", body.replace("256", "16"), args, threads=64, params=TWO)
    # The block's memory is in use until the copy has landed.
    early = load(waits="").replace(READ, "")
    kinds = set()
    for seed in range(12):
        try:
            run(early, args, threads=64, params=TWO, seed=seed)
        except PtxFault as fault:
            kinds.add(fault.kind)
    assert kinds == {"asynchronous copy"}


def test_a_stage_is_given_back():
    """A load into memory that others have read must be ordered after their reads, by a barrier of arrivals."""
    body = (
        barrier(1)
        + "mov.u32 %r18, %r19; add.u32 %r18, %r18, 8; @%p1 mbarrier.init.shared::cta.b64 [%r18], COUNT; bar.sync 0;"
        "ld.param.u64 %rd1, [x]; mov.u32 %r1, 0; mov.u32 %r5, 0; mov.u32 %r6, 0;"
        "LOOP: @!%p1 bra CONSUME; xor.b32 %r7, %r6, 1;"
        "{produce}"
        + EXPECT.format(bytes=256)
        + LOAD.format(size=256)
        + "CONSUME:"
        + wait("%r6", "FULL")
        + READ.replace("%r1,", "%r4,")
        + "add.u32 %r1, %r1, %r4; {early} mbarrier.arrive.shared::cta.b64 _, [%r18];"
        "add.u64 %rd1, %rd1, 256; xor.b32 %r6, %r6, 1; add.u32 %r5, %r5, 1; setp.lt.u32 %p4, %r5, 4; @%p4 bra LOOP;"
    )
    produce = wait("%r7", "EMPTY", "[%r18]")
    for seed in SEEDS:
        got = np.zeros(64, np.uint32)
        good = body.replace("COUNT", "64").format(produce=produce, early="") + STORE
        run(good, [Out(got), In(X)], threads=64, params=TWO, seed=seed)
        assert (got == X[:256].reshape(4, 64).sum(0)).all()
        for wrong in (
            body.replace("COUNT", "64").format(produce="", early=""),
            body.replace("COUNT", "32").format(produce=produce, early=""),
        ):
            with pytest.raises(PtxFault):
                run(wrong, [Out(got), In(X)], threads=64, params=TWO, seed=seed)


# Warp 1 reads a stage, and arrives at the second barrier; thread 0 then loads the stage again.
GIVE_BACK = (
    barrier(1)
    + "mov.u32 %r18, %r19; add.u32 %r18, %r18, 8; @%p1 mbarrier.init.shared::cta.b64 [%r18], {count}; bar.sync 0;"
    "ld.param.u64 %rd1, [x]; setp.ge.u32 %p3, %tid, 32; @%p3 bra CONSUME; @!%p1 bra END;"
    + EXPECT.format(bytes=256)
    + LOAD.format(size=256)
    + wait(0, "EMPTY", "[%r18]")
    + EXPECT.format(bytes=256)
    + LOAD.format(size=256)
    + wait(1, "AGAIN")
    + "bra END; CONSUME:"
    + wait()
    + "sub.u32 %r2, %tid, 32; setp.eq.u32 %p4, %r2, 0; {read} {then} {arrive}; END:"
)
ARRIVE_EMPTY = "mbarrier.arrive.shared::cta.b64 _, [%r18]"
GIVE_BACK_READ = "mad.lo.u32 %r3, %r2, 4, %r20; ld.shared.u32 %r1, [%r3];"


@pytest.mark.parametrize(
    ("read", "then", "arrive", "right"),
    [
        ("", "bar.warp.sync -1;", "@%p4 " + ARRIVE_EMPTY, True),
        ("", "bar.sync 1, 32;", "@%p4 " + ARRIVE_EMPTY, True),
        ("", "", ARRIVE_EMPTY, True),  # each lane arrives for itself
        ("@%p4", "", "@%p4 " + ARRIVE_EMPTY, True),  # only the lane that arrives has read
        ("", "", "@%p4 " + ARRIVE_EMPTY, False),
        ("", "shfl.sync.idx.b32 %r4, %r2, 0, 31, -1;", "@%p4 " + ARRIVE_EMPTY, False),
        ("", "vote.sync.any.pred %p5, %p4, -1;", "@%p4 " + ARRIVE_EMPTY, False),
        ("", "", "@%p4 bar.warp.sync 1; @%p4 " + ARRIVE_EMPTY, False),
        ("", "fence.acq_rel.cta;", "@%p4 " + ARRIVE_EMPTY, False),
    ],
)
def test_an_arrival_orders_the_accesses_of_its_lane(read, then, arrive, right):
    """PTX ISA, "mbarrier.test_wait": a wait orders what the *participating threads* did before they arrived.

    The accesses of other lanes are ordered before the arrival by barriers of the warp or the block only.
    """
    count = 32 if arrive == ARRIVE_EMPTY else 1
    words = GIVE_BACK_READ.replace("ld.shared", read + " ld.shared")
    body = GIVE_BACK.format(count=count, read=words, then=then, arrive=arrive)
    args, options = [Out(np.zeros(64, np.uint32)), In(X)], {"threads": 64, "params": TWO}
    for seed in SEEDS:
        if right:
            run(body, args, seed=seed, **options)
            continue
        with pytest.raises(
            PtxFault, match=r"the write .* is not ordered after the access by thread \(33,0,0\)"
        ) as caught:
            run(body, args, seed=seed, **options)
        assert caught.value.kind == "race on shared memory"
    if "shfl" in then or "vote" in then:
        run(body, args, collectives_order=True, **options)


def test_the_reads_of_ldmatrix_are_those_of_all_lanes():
    matrix = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r20];"
    for then, right in (("bar.warp.sync -1;", True), ("", False)):
        body = GIVE_BACK.format(count=1, read=matrix, then=then, arrive="@%p4 " + ARRIVE_EMPTY)
        args = [Out(np.zeros(64, np.uint32)), In(X)]
        if right:
            run(body, args, threads=64, params=TWO)
        else:
            assert_fault("race on shared memory", "the write", body, args, threads=64, params=TWO)


def test_an_order_passes_through_other_threads():
    """Lane 0 of warp 1 arrives; thread 64 has waited for it, and arrives; thread 0 has waited for that, and writes."""
    body = (
        barrier(1) + "mov.u32 %r18, %r19; add.u32 %r18, %r18, 8; @%p1 mbarrier.init.shared::cta.b64 [%r18], 1;"
        "setp.lt.u32 %p5, %tid, 64; mad.lo.u32 %r21, %tid, 4, %r20; @%p5 st.shared.u32 [%r21], %tid; bar.sync 0;"
        "setp.eq.u32 %p3, %tid, 64; @%p3 bra MIDDLE; @%p1 bra LAST; setp.lt.u32 %p4, %tid, 32; @%p4 bra END;"
        "setp.gt.u32 %p4, %tid, 64; @%p4 bra END; ld.shared.u32 %r1, [%r21]; {sync} setp.eq.u32 %p4, %tid, 32;"
        "@%p4 "
        + ARRIVE
        + "bra END; MIDDLE:"
        + wait()
        + ARRIVE_EMPTY
        + "; bra END; LAST:"
        + wait(0, "EMPTY", "[%r18]")
        + "st.shared.u32 [%r20+{at}], 0; END:"
    )
    for sync, at, right in (
        ("", 128, True),
        ("", 132, False),
        ("bar.warp.sync -1;", 132, True),
        ("bar.warp.sync -1;", 252, True),
        ("setp.lt.u32 %p6, %tid, 34; @%p6 bar.warp.sync 3;", 132, True),
        ("setp.lt.u32 %p6, %tid, 34; @%p6 bar.warp.sync 3;", 136, False),
    ):
        text = body.format(sync=sync, at=at)
        if right:
            for seed in SEEDS:
                run(text, threads=96, seed=seed)
        else:
            assert_fault("race on shared memory", f"thread .{at // 4},0,0", text, threads=96, seeds=SEEDS)


# Warp 1 writes a word for each lane of warp 0 and arrives. The lanes of warp 0 below {most} wait, and those between
# {first} and {last} read their words.
ACQUIRE = (
    barrier(32) + "mad.lo.u32 %r21, %tid, 4, %r20; setp.lt.u32 %p3, %tid, 32; @%p3 st.shared.u32 [%r21], 0; bar.sync 1;"
    "@%p3 bra READER; add.u32 %r21, %r21, -128; st.shared.u32 [%r21], %tid;"
    + ARRIVE
    + "bra END; READER: {before} setp.ge.u32 %p4, %tid, {most}; @%p4 bra PAST;"
    + wait()
    + "PAST: {then} setp.ge.u32 %p4, %tid, {first}; setp.lt.and.u32 %p4, %tid, {last}, %p4;"
    "@%p4 ld.shared.u32 %r1, [%r21]; END:"
)
SHUFFLE = "shfl.sync.idx.b32 %r4, %tid, 0, 31, -1;"


def few(lanes: int) -> str:
    """Return a barrier of the warp's first lanes."""
    return f"setp.lt.u32 %p5, %tid, {lanes}; @%p5 bar.warp.sync {(1 << lanes) - 1};"


@pytest.mark.parametrize(
    ("most", "then", "readers", "right"),
    [
        (32, "", (0, 32), True),
        (1, "", (0, 1), True),  # the lane that has waited
        (1, SHUFFLE, (0, 1), True),
        (1, "bar.warp.sync -1;", (0, 32), True),
        (1, "bar.sync 2, 32;", (0, 32), True),
        (4, "bar.warp.sync -1;", (0, 32), True),
        (1, few(2), (0, 2), True),
        (1, few(2) + few(9), (2, 9), True),
        (1, few(2) + few(9) + "bar.warp.sync -1;", (0, 32), True),
        (1, "", (1, 2), False),
        (1, SHUFFLE, (0, 32), False),
        (1, SHUFFLE, (31, 32), False),
        (31, SHUFFLE, (31, 32), False),
        (1, "setp.eq.u32 %p5, %tid, 0; vote.sync.any.pred %p6, %p5, -1;", (1, 2), False),
        (1, "redux.sync.add.u32 %r4, %tid, -1;", (1, 2), False),
        (1, SHUFFLE + "fence.acq_rel.cta;", (1, 2), False),
        (1, few(2) + SHUFFLE, (2, 3), False),
        (1, "setp.eq.u32 %p5, %tid, 0; @%p5 bar.warp.sync 1;" + SHUFFLE, (1, 2), False),
    ],
)
def test_a_wait_orders_the_accesses_of_its_lane(most, then, readers, right):
    """PTX ISA, "mbarrier.test_wait": what others did before they arrived is visible to the *executing thread*.

    Other lanes of its warp see it after a barrier with that lane. CUDA's guide says that a shuffle is none.
    """
    body = ACQUIRE.format(before="", most=most, then=then, first=readers[0], last=readers[1])
    if right:
        for seed in SEEDS:
            run(body, threads=64, seed=seed)
    else:
        assert_fault("race on shared memory", "not ordered after", body, threads=64, seeds=SEEDS)
    if "sync" in then and not right:
        run(body, threads=64, collectives_order=True)


def test_lanes_that_wait_at_two_barriers():
    """Threads 32 and 33 write a word and arrive, each at its barrier; even and odd lanes wait at one of these each."""
    body = (
        barrier(1)
        + "mov.u32 %r18, %r19; add.u32 %r18, %r18, 8; @%p1 mbarrier.init.shared::cta.b64 [%r18], 1;"
        + "@%p1 st.shared.v4.u32 [%r20], {{%tid, %tid, %tid, %tid}}; bar.sync 1;"
        + "and.b32 %r5, %tid, 1; mad.lo.u32 %r18, %r5, 8, %r19; mad.lo.u32 %r21, %r5, 4, %r20;"
        + "setp.lt.u32 %p3, %tid, 32; @%p3 bra READER; setp.lt.u32 %p3, %tid, 34; @!%p3 bra END;"
        + "setp.ge.u32 %p4, %tid, {first}; @%p4 st.shared.u32 [%r21], 7;"
        + ARRIVE_EMPTY
        + "; bra END; READER:"
        # Both phases have ended before a lane waits.
        + wait(0, "FIRST").replace("parity", "parity.relaxed.cta")
        + wait(0, "SECOND", "[%r19+8]").replace("parity", "parity.relaxed.cta")
        + wait(0, "WAIT", "[%r18]")
        + "{read} END:"
    )
    other = "xor.b32 %r21, %r21, 4; ld.shared.u32 %r1, [%r21];"
    matrix = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r20];"
    for read, right in (
        ("ld.shared.u32 %r1, [%r21];", True),
        (other, False),
        ("bar.warp.sync -1;" + other, True),
        (matrix, False),
        ("bar.warp.sync -1;" + matrix, True),
    ):
        for first in (32, 33):  # thread 33 alone writes for odd lanes, among them the last one
            text = body.format(read=read, first=first)
            if right:
                for seed in SEEDS:
                    run(text, threads=64, seed=seed)
            else:
                assert_fault("race on shared memory", "the read .* is not ordered", text, threads=64, seeds=SEEDS)


def test_lanes_that_leave_a_wait_in_turn():
    """Lane l tests the barrier l times first, and each lane that has seen the phase end is ordered after it."""
    count = "mov.u32 %r5, %tid; TURN: setp.eq.u32 %p5, %r5, 0; @%p5 bra NOW; {} sub.u32 %r5, %r5, 1; bra TURN; NOW:"
    test = "mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r19], 0;"
    for before in (count.format(test), count.format(""), "and.b32 %r5, %tid, 1; setp.eq.u32 %p5, %r5, 0; @%p5 " + test):
        body = ACQUIRE.format(before=before, most=32, then="", first=0, last=32)
        for seed in SEEDS:
            run(body, threads=64, seed=seed)


def test_lanes_that_have_exited_are_not_waited_for():
    leave = "setp.ge.u32 %p5, %tid, 20; @%p5 exit;"
    for most, then, right in (
        (32, "", True),
        (1, few(20), True),
        (1, "bar.sync 2, 32;", True),
        (1, "bar.warp.sync -1;", True),
        (1, "shfl.sync.idx.b32 %r4, %tid, 0, 31, 0xFFFFF;", False),
    ):
        body = ACQUIRE.format(before=leave, most=most, then=then, first=0, last=32)
        if right:
            for seed in SEEDS:
                run(body, threads=64, seed=seed)
        else:
            assert_fault("race on shared memory", "not ordered after", body, threads=64, seeds=SEEDS)
    # A lane that has waited and exits takes what it knows along.
    gone = "setp.eq.u32 %p5, %tid, 0; @%p5 exit; bar.warp.sync -2;"
    body = ACQUIRE.format(before="", most=1, then=gone, first=0, last=32)
    assert_fault("race on shared memory", "not ordered after", body, threads=64, seeds=SEEDS)


@pytest.mark.parametrize("listener", [1, 64])  # a lane of the same warp, and another warp
def test_an_arrival_tells_what_its_lane_knows(listener):
    """Lane 0 has waited for thread 32; a lane of its warp arrives at a second barrier, where another thread waits."""
    body = (
        barrier(32) + "mov.u32 %r18, %r19; add.u32 %r18, %r18, 8; @%p1 mbarrier.init.shared::cta.b64 [%r18], 1;"
        "@%p1 st.shared.u32 [%r20], 0; bar.sync 1; setp.ge.u32 %p3, %tid, 64; @%p3 bra LISTEN;"
        "setp.ge.u32 %p3, %tid, 32; @%p3 bra WRITE; @!%p1 bra PAST;"
        + wait()
        + "PAST: {then} setp.eq.u32 %p5, %tid, {by}; @%p5 "
        + ARRIVE_EMPTY
        + "; LISTEN: setp.ne.u32 %p5, %tid, {listener}; @%p5 bra END;"
        + wait(0, "EMPTY", "[%r18]")
        + "ld.shared.u32 %r1, [%r20]; bra END; WRITE: setp.eq.u32 %p5, %tid, 32; @%p5 st.shared.u32 [%r20], %tid;"
        + ARRIVE
        + "END:"
    )
    for by, then, right in ((0, "", True), (1, "bar.warp.sync -1;", True), (1, few(2), True), (1, SHUFFLE, False)):
        text = body.format(by=by, then=then, listener=listener)
        if right:
            for seed in SEEDS:
                run(text, threads=96, seed=seed)
        else:
            message = r"the read .* is not ordered after the access by thread \(32,0,0\)"
            assert_fault("race on shared memory", message, text, threads=96, seeds=SEEDS)


def test_what_a_lane_knows_adds_to_what_its_warp_knows():
    """Threads 32 and 33 read a word. All lanes of warp 0 wait for one of them, and lane 0 alone for the other."""
    body = (
        barrier(1) + "mov.u32 %r18, %r19; add.u32 %r18, %r18, 8; @%p1 mbarrier.init.shared::cta.b64 [%r18], 1;"
        "@%p1 st.shared.u32 [%r20], 0; bar.sync 1; setp.lt.u32 %p3, %tid, 32; @%p3 bra WRITE;"
        "setp.lt.u32 %p3, %tid, 34; @%p3 ld.shared.u32 %r1, [%r20]; setp.eq.u32 %p3, %tid, {first}; @%p3 "
        + ARRIVE
        + "setp.eq.u32 %p4, %tid, {second}; @%p4 "
        + ARRIVE_EMPTY
        + "; bra END; WRITE:"
        + wait()
        + "@!%p1 bra PAST;"
        + wait(0, "EMPTY", "[%r18]")
        + "PAST: {then} setp.eq.u32 %p5, %tid, {lane}; @%p5 st.shared.u32 [%r20], 1; END:"
    )
    for first in (32, 33):
        for lane, then, right in ((0, "", True), (1, few(2), True), (1, SHUFFLE, False)):
            text = body.format(lane=lane, then=then, first=first, second=65 - first)
            if right:
                for seed in SEEDS:
                    run(text, threads=64, seed=seed)
            else:
                message = r"the write .* is not ordered after the access by thread \(3[23],0,0\)"
                assert_fault("race on shared memory", message, text, threads=64, seeds=SEEDS)


def test_the_bytes_of_a_copy_are_known_to_the_lanes_that_waited():
    """Thread 0 alone waits for a bulk copy."""
    options = {"threads": 32, "params": TWO}
    for then, matrix, right in (
        *((then, matrix, True) for then in ("bar.warp.sync -1;", "bar.sync 1;") for matrix in (False, True)),
        *((then, matrix, False) for then in ("", SHUFFLE) for matrix in (False, True)),
    ):
        body = load(128, waits="@!%p1 bra PAST;" + wait() + "PAST:" + then)
        if matrix:
            body = body.replace(READ, "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r20];")
        for seed in SEEDS:
            if right:
                run(body, [Out(np.zeros(32, np.uint32)), In(X)], seed=seed, **options)
                continue
            with pytest.raises(PtxFault) as caught:
                run(body, [Out(np.zeros(32, np.uint32)), In(X)], seed=seed, **options)
            kinds = {"race on shared memory"} | (set() if then else {"asynchronous copy", "uninitialised memory"})
            assert caught.value.kind in kinds
    only_lane_0 = load(128, waits="@!%p1 bra END;" + wait()).replace("ld.shared", "@%p1 ld.shared") + "END:"
    run(only_lane_0, [Out(np.zeros(32, np.uint32)), In(X)], **options)


def test_the_lane_that_waits_may_load_again():
    """Thread 0 waits until warp 1 has read a stage. Another lane may load it only after a barrier with thread 0."""
    body = GIVE_BACK.format(count=32, read=GIVE_BACK_READ, then="", arrive=ARRIVE_EMPTY)
    body = body.replace("@!%p1 bra END;", "setp.eq.u32 %p6, %tid, LANE; @!%p1 bra PAST;", 1)
    second = wait(0, "EMPTY", "[%r18]") + "PAST: THEN @!%p6 bra END;"
    body = body.replace(wait(0, "EMPTY", "[%r18]"), second)
    args, options = [Out(np.zeros(64, np.uint32)), In(X)], {"threads": 64, "params": TWO}
    for lane, then, right in (
        (0, "", True),
        (0, SHUFFLE, True),
        (1, "bar.warp.sync -1;", True),
        (1, SHUFFLE, False),
        (0, "elect.sync %r4|%p6, -1;", True),
    ):
        text = body.replace("LANE", str(lane)).replace("THEN", then)
        for seed in SEEDS:
            if right:
                run(text, args, seed=seed, **options)
        if not right:
            assert_fault("race on shared memory", "the write .* is not ordered", text, args, seeds=SEEDS, **options)


def test_a_proxy_fence_covers_what_its_lane_knows():
    """Lane 0 has waited for warp 1's ordinary writes, and stores them by a bulk copy, after a proxy fence of a lane."""
    copy = "setp.eq.u32 %p5, %tid, {by};" + SHUFFLE + "{sync} @%p5 fence.proxy.async.shared::cta; bar.warp.sync -1;"
    copy += "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%out], [%r20], 128; @%p1 cp.async.bulk.commit_group;"
    copy += "cp.async.bulk.wait_group 0;"
    # The readers' own writes, which come before, are fenced by each of them.
    start = ACQUIRE.replace("bar.sync 1;", "fence.proxy.async; bar.sync 1;", 1)
    for by, sync, right in ((0, "", True), (1, "bar.warp.sync -1;", True), (1, "", False)):
        body = start.format(before="", most=1, then=copy.format(by=by, sync=sync), first=0, last=0)
        if right:
            for seed in SEEDS:
                run(body, [Out(np.zeros(32, np.uint32))], threads=64, seed=seed)
        else:
            args = [Out(np.zeros(32, np.uint32))]
            assert_fault("proxy", "no fence.proxy.async follows", body, args, threads=64, seeds=SEEDS)


STORE_BULK = "cp.async.bulk.global.shared::cta.bulk_group [%out], [%r20], 256; cp.async.bulk.commit_group;"
BULK_STORE = (
    ".shared .align 128 .b8 s[1024]; mov.u32 %r20, s; mad.lo.u32 %r21, %tid, 4, %r20; setp.eq.u32 %p1, %tid, 0;"
    "st.shared.u32 [%r21], %tid; {fence} bar.sync 0; @!%p1 bra END;" + STORE_BULK + "{wait} END: {after}"
)


def test_a_bulk_store():
    parts = {"fence": "fence.proxy.async.shared::cta;", "wait": "cp.async.bulk.wait_group.read 0;", "after": ""}
    for seed in SEEDS:
        got = np.zeros(64, np.uint32)
        report = run(BULK_STORE.format(**parts), [Out(got)], threads=64, seed=seed)
        assert (got == np.arange(64)).all() and report.instructions["cp.async.bulk.commit_group"] == 1
        other_fence = parts | {"fence": "bar.sync 1; fence.proxy.async;"}
        run(BULK_STORE.format(**other_fence), [Out(got)], threads=64, seed=seed)
    for change, kind in (
        ({"fence": ""}, "proxy"),
        ({"fence": "@%p1 fence.proxy.async;"}, "proxy"),
        ({"fence": "fence.proxy.async.global;"}, "proxy"),
        ({"wait": ""}, "asynchronous copy"),
        ({"wait": "cp.async.bulk.wait_group.read 1;"}, "asynchronous copy"),
        ({"wait": "", "after": "bar.sync 0; st.shared.u32 [%r21], 0;"}, "asynchronous copy"),
        ({"after": "ld.global.u32 %r1, [%out];"}, "asynchronous copy"),
    ):
        for seed in SEEDS:
            with pytest.raises(PtxFault) as caught:
                run(BULK_STORE.format(**parts | change), [Out(np.zeros(64, np.uint32))], threads=64, seed=seed)
            assert caught.value.kind in (kind, "race on global memory", "uninitialised memory"), change
    full = parts | {"wait": "cp.async.bulk.wait_group 0; ld.global.u32 %r1, [%out];"}
    run(BULK_STORE.format(**full), [Out(np.zeros(64, np.uint32))], threads=64)
    # After the wait another thread may overwrite the source, once a barrier has ordered it.
    again = parts | {"after": "bar.sync 0; st.shared.u32 [%r21], 0;"}
    run(BULK_STORE.format(**again), [Out(np.zeros(64, np.uint32))], threads=64)
    for seed in SEEDS:
        with pytest.raises(PtxFault) as caught:
            body = BULK_STORE.format(**again | {"after": "st.shared.u32 [%r21], 0;"})
            run(body, [Out(np.zeros(64, np.uint32))], threads=64, seed=seed)
        assert caught.value.kind in ("asynchronous copy", "race on shared memory")


def test_a_load_over_ordinary_writes_needs_the_fence():
    write = "mad.lo.u32 %r21, %tid, 4, %r20; st.shared.u32 [%r21], %tid; {} bar.sync 0;"
    body = load().replace("@!%p1 bra WAIT0;", write + "@!%p1 bra WAIT0;")
    args = [Out(np.zeros(64, np.uint32)), In(X)]
    run(body.format("fence.proxy.async;"), args, threads=64, params=TWO)
    assert_fault("proxy", "is written asynchronously, but no fence", body.format(""), args, threads=64, params=TWO)


def test_a_source_may_not_change_in_flight():
    body = load(waits="").replace("WAIT0:", "st.global.u32 [%rd1], 0; WAIT0:" + wait())
    x = InOut(X.copy())
    kinds = set()
    for seed in range(12):
        try:
            run(body, [Out(np.zeros(64, np.uint32)), x], threads=64, params=TWO, seed=seed)
        except PtxFault as fault:
            kinds.add(fault.kind)
    assert kinds == {"asynchronous copy"}


# ---- cp.async.mbarrier.arrive ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "count"), [("arrive.noinc", 64), ("arrive", 1)])
def test_copies_arrive(kind, count):
    """.noinc takes one of the expected arrivals; without it, the arrival is counted when it is asked for."""
    copy = (
        "mad.lo.u32 %r21, %tid, 4, %r20; mad.wide.u32 %rd2, %tid, 4, %rd1; cp.async.ca.shared.global [%r21], [%rd2], 4;"
    )
    arrive = f"cp.async.mbarrier.{kind}.shared::cta.b64 [%r19];" + ("bar.sync 0; @%p1 " + ARRIVE if count == 1 else "")
    body = (
        barrier(count)
        + "ld.param.u64 %rd1, [x];"
        + copy
        + arrive
        + "{}"
        + "xor.b32 %r2, %tid, 32; mad.lo.u32 %r3, %r2, 4, %r20; ld.shared.u32 %r1, [%r3];"
        + STORE
    )
    for seed in SEEDS:
        got = np.zeros(64, np.uint32)
        run(body.format(wait()), [Out(got), In(X)], threads=64, params=TWO, seed=seed)
        assert (got == X[:64].reshape(2, 32)[::-1].reshape(-1)).all()
        with pytest.raises(PtxFault) as caught:
            run(body.format(""), [Out(got), In(X)], threads=64, params=TWO, seed=seed)
        assert caught.value.kind in ("asynchronous copy", "race on shared memory", "uninitialised memory")


# ---- griddepcontrol --------------------------------------------------------------------------------------------------
DEPENDENT = "ld.param.u64 %rd1, [x]; mad.wide.u32 %rd2, %tid, 4, %rd1; {before} ld.global.u32 %r1, [%rd2];"


def test_memory_of_the_kernel_before():
    x = In(X)
    for seed in SEEDS:
        got = np.zeros(64, np.uint32)
        body = DEPENDENT.format(before="griddepcontrol.launch_dependents; griddepcontrol.wait;") + STORE
        run(body, [Out(got), x], threads=64, params=TWO, seed=seed, dependent=[x])
        assert (got == X[:64]).all()
        # One thread may wait, and a barrier lets the others follow.
        one = "setp.eq.u32 %p1, %tid, 0; @!%p1 bra A; griddepcontrol.wait; A: {}"
        run(DEPENDENT.format(before=one.format("bar.sync 0;")), [Out(got), x], 64, params=TWO, dependent=[x], seed=seed)
        for before in ("", one.format("")):
            with pytest.raises(PtxFault, match=r"before griddepcontrol.wait") as caught:
                run(DEPENDENT.format(before=before), [Out(got), x], 64, params=TWO, dependent=[x], seed=seed, grid=2)
            assert caught.value.kind == "dependent launch"
    # The other lanes of its warp follow after a barrier of the warp, and not after a shuffle.
    one = "setp.eq.u32 %p1, %tid, 0; @!%p1 bra A; griddepcontrol.wait; A: {}"
    run(DEPENDENT.format(before=one.format("bar.warp.sync -1;")), [Out(got), x], 32, params=TWO, dependent=[x])
    alone = DEPENDENT.format(before=one.format(SHUFFLE))
    assert_fault("dependent launch", "before griddepcontrol.wait", alone, [Out(got), x], 32, params=TWO, dependent=[x])
    run(alone.replace("ld.global", "@%p1 ld.global"), [Out(got), x], 32, params=TWO, dependent=[x])
    nc = DEPENDENT.format(before="griddepcontrol.wait;").replace("ld.global", "ld.global.nc")
    assert_fault("dependent launch", "ld.global.nc", nc, [Out(got), x], 64, params=TWO, dependent=[x])
    run(nc, [Out(got), x], 64, params=TWO)
    y = Out(got)
    assert_fault("dependent launch", "is written", STORE.replace("%r1;", "%tid;"), [y], 64, dependent=[y])
    assert_fault("dependent launch", "is read", load(), [Out(got), x], 64, params=TWO, dependent=[x])
    with pytest.raises(ValueError, match="no argument of the launch"):
        run(nc, [Out(got), x], 64, params=TWO, dependent=[In(X)])


def test_forms_that_do_not_exist():
    registers = ".reg .b32 %r<9>; .reg .b64 %rd<3>; .reg .pred %p<3>;"
    for line, message in {
        "mbarrier.arrive.shared::cluster.b64 %rd1, [%r1];": "returns no state",
        "mbarrier.try_wait.parity.shared::cluster.b64 %p1, [%r1], 0;": "its own block",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1];": "lacks the number of bytes",
        "cp.async.bulk.shared::cta.shared::cta.mbarrier::complete_tx::bytes [%r1], [%r2], 16, [%r3];": "spaces",
        "griddepcontrol.banana;": "lacks one of",
        "fence.proxy.tensormap::generic.release.gpu;": "lacks one of",
    }.items():
        with pytest.raises(PtxError, match=message):
            Module.from_ptx(f"{HEADER}.entry k() {{ {registers}\n{line}\nret; }}").kernel("k")
