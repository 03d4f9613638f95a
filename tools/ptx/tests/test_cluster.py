"""Clusters: places, distributed shared memory, barrier.cluster, remote mbarriers, and the end of a block."""

import numpy as np
import pytest

from ..machine import In, Out, PtxFault
from .helpers import HEADER, Module, assert_fault, run
from .test_mbarrier import EXPECT, barrier, wait
from .test_memory import words

SEEDS = range(6)
SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
# Each block writes 1000 rank + tid into its shared memory; %r10 is the rank, %r11 the number of blocks.
OWN = """
    .shared .align 128 .b8 s[1024]; mov.u32 %r20, s; mad.lo.u32 %r21, %tid, 4, %r20;
    mov.u32 %r10, %cluster_ctarank; mov.u32 %r11, %cluster_nctarank; mad.lo.u32 %r1, %r10, 1000, %tid;
    st.shared.u32 [%r21], %r1;
"""
# Reads the word of the next block's same thread into %r1.
NEXT = """
    add.u32 %r12, %r10, 1; rem.u32 %r12, %r12, %r11; mapa.shared::cluster.u32 %r13, %r21, %r12;
    ld.shared::cluster.u32 %r1, [%r13];
"""
# The output has a word for each thread of each block of the grid.
STORE_ALL = (
    "mov.u32 %r5, %ctaid.x; mov.u32 %r6, %ntid.x; mad.lo.u32 %r5, %r5, %r6, %tid; mad.wide.u32 %at, %r5, 4, %out;"
    "st.global.u32 [%at], %r1;"
)


def run_all(body: str, cluster: int, grid: int = 0, threads: int = 64, args: tuple = (), **options) -> np.ndarray:
    got = np.zeros((grid or cluster, threads), np.uint32)
    run(body + STORE_ALL, [Out(got), *args], threads, grid=grid or cluster, cluster=cluster, **options)
    return got


def cluster_fault(kinds: str | tuple[str, ...], message: str, body: str, cluster: int = 2, **options) -> None:
    for seed in SEEDS:
        with pytest.raises(PtxFault, match=message or None) as caught:
            run_all(body, cluster, seed=seed, **options)
        assert caught.value.kind in kinds, caught.value


# ---- Places: PTX ISA, "Special Registers" ----------------------------------------------------------------------------
def test_places():
    """Block (x, y, z) of the grid lies in cluster (x / cx, y / cy, z / cz), with x innermost in the rank."""
    names = [
        *(f"cluster{part}.{axis}" for part in ("id", "_ctaid", "_nctaid") for axis in "xyz"),
        *(f"nclusterid.{axis}" for axis in "xyz"),
        *("cluster_ctarank", "cluster_nctarank"),
    ]
    body = (
        "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mad.lo.u32 %r1, %r2, 4, %r1;"
        "mad.lo.u32 %r1, %r3, 24, %r1; mad.wide.u32 %at, %r1, 64, %out;"
    )
    body += "".join(f"mov.u32 %r4, %{name}; st.global.u32 [%at+{4 * k}], %r4;" for k, name in enumerate(names))
    got = np.zeros((2, 6, 4, 16), np.uint32)
    run(body, [Out(got)], 1, grid=(4, 6, 2), cluster=(2, 3, 1))
    for z, y, x in np.ndindex(2, 6, 4):
        want = [x // 2, y // 3, z, x % 2, y % 3, 0, 2, 3, 1, 2, 2, 2, x % 2 + 2 * (y % 3), 6]
        assert got[z, y, x, : len(names)].tolist() == want
    assert words("mov.u32 %r1, %cluster_nctarank; mov.u32 %r2, %cluster_ctarank; add.u32 %r1, %r1, %r2;", 1) == [1]
    explicit = "mov.pred %p1, %is_explicit_cluster; selp.u32 %r1, 1, 0, %p1;"
    assert words(explicit, 1) == [0] and words(explicit, 1, cluster=1) == [1]


def test_the_declared_size():
    text = f"{HEADER}.visible .entry k(.param .u64 out) .explicitcluster .reqnctapercluster 2, 1, 1\n{{ ret; }}"
    module = Module.from_ptx(text)
    out = Out(np.zeros(1))
    module.launch("k", 4, 32, [out])
    module.launch("k", 4, 32, [out], cluster=2)
    for grid, cluster, message in ((3, None, "cannot have clusters"), (4, 4, "is compiled for clusters of")):
        with pytest.raises(ValueError, match=message):
            module.launch("k", grid, 32, [out], cluster=cluster)
    with pytest.raises(ValueError, match="cannot have clusters"):
        run("", grid=32, cluster=32)


# ---- Distributed shared memory: PTX ISA, "mapa", "getctarank", "ld", "st", "atom" -----------------------------------
@pytest.mark.parametrize("size", [2, 3, 8])
def test_reading_another_block(size):
    for seed in SEEDS:
        got = run_all(OWN + SYNC + NEXT + SYNC, size, 2 * size, seed=seed)
        rank = np.arange(2 * size)[:, None] % size
        assert (got == (rank + 1) % size * 1000 + np.arange(64)).all()


def test_generic_addresses_of_another_block():
    generic = (
        "mov.u64 %rd1, s; cvta.shared.u64 %rd1, %rd1; mul.wide.u32 %rd2, %tid, 4; add.u64 %rd1, %rd1, %rd2;"
        "xor.b32 %r12, %r10, 1; mapa.u64 %rd3, %rd1, %r12; getctarank.u32 %r13, %rd3; getctarank.u32 %r14, %rd1;"
        "ld.u32 %r1, [%rd3]; mad.lo.u32 %r13, %r13, 10, %r14; mad.lo.u32 %r1, %r13, 10000, %r1;"
    )
    got = run_all(OWN + SYNC + generic + SYNC, 2)
    assert (got[0] == 100000 + 1000 + np.arange(64)).all() and (got[1] == 10000 + np.arange(64)).all()
    ranks = (
        "xor.b32 %r12, %r10, 1; mapa.shared::cluster.u32 %r13, %r21, %r12; getctarank.shared::cluster.u32 %r1, %r13;"
    )
    assert run_all(OWN + ranks, 2)[:, 0].tolist() == [1, 0]
    isspacep = "xor.b32 %r12, %r10, 1; mapa.u64 %rd3, %rd1, %r12; isspacep.shared::cluster %p2, %rd3; @!%p2 trap;"
    run_all(OWN + generic.split("xor")[0] + isspacep, 2)


def test_writing_and_adding_to_another_block():
    write = (
        "xor.b32 %r12, %r10, 1; mapa.shared::cluster.u32 %r13, %r21, %r12; st.shared::cluster.u32 [%r13], %r10;"
        "mapa.shared::cluster.u32 %r14, %r20, 0; atom.shared::cluster.add.u32 %r15, [%r14+512], 1;"
        "red.shared::cluster.add.u32 [%r14+512], 2;"
    )
    zero = "@%p3 st.shared.u32 [%r20+512], 0;"
    body = OWN + "setp.eq.u32 %p3, %tid, 0;" + zero + SYNC + write + SYNC + "ld.shared.u32 %r1, [%r21];"
    for seed in SEEDS:
        assert run_all(body, 2, seed=seed)[:, 0].tolist() == [1, 0]
        total = run_all(body + "ld.shared.u32 %r1, [%r20+512];", 2, seed=seed)
        assert (total[0] == 64 * 2 * 3).all() and (total[1] == 0).all()


def test_races_between_blocks():
    cluster_fault(("race on shared memory", "cluster"), "", OWN + NEXT + SYNC)
    own_only = OWN + SYNC + NEXT + "st.shared.u32 [%r21], 0;" + SYNC
    cluster_fault("race on shared memory", r"of block \(\d,0,0\)", own_only)
    run_all(OWN + SYNC + NEXT + SYNC + "st.shared.u32 [%r21], 0;", 2)
    # The barrier's weak halves order nothing unless a fence stands before.
    relaxed = SYNC.replace("arrive", "arrive.relaxed")
    cluster_fault(("race on shared memory", "cluster"), "", OWN + relaxed + NEXT + SYNC)
    run_all(OWN + "fence.acq_rel.cluster;" + relaxed + NEXT + SYNC, 2)
    # A barrier of the block does not order the cluster.
    cluster_fault(("race on shared memory", "cluster", "uninitialised memory"), "", OWN + "bar.sync 0;" + NEXT + SYNC)


def test_the_life_of_a_block():
    """A block must have started before others access its memory, and must not exit while they may."""
    cluster_fault("cluster", "which has exited|before anything ensures|is not ordered before", OWN + SYNC + NEXT)
    cluster_fault(
        ("cluster", "race on shared memory"),
        "before anything ensures that the block has started|not ordered|has exited",
        OWN.replace("st.shared.u32 [%r21], %r1;", "")
        + "xor.b32 %r12, %r10, 1; mapa.shared::cluster.u32 %r13, %r21, %r12; st.shared::cluster.u32 [%r13], 0;"
        + SYNC,
    )
    relaxed = SYNC.replace("arrive", "arrive.relaxed")
    write = "xor.b32 %r12, %r10, 1; mapa.shared::cluster.u32 %r13, %r20, %r12; st.shared::cluster.u32 [%r13+512], 7;"
    body = OWN + "setp.ne.u32 %p1, %tid, 0;" + relaxed + "@%p1 bra A;" + write
    body += "A:" + SYNC + "ld.shared.u32 %r1, [%r20+512];"
    for seed in SEEDS:
        assert (run_all(body, 2, seed=seed) == 7).all(), "a relaxed arrival says that the block has started"
    cluster_fault("cluster", "before anything ensures|has exited", body.replace(relaxed, ""))
    assert_fault(
        "illegal",
        "mapa: block 2 of a cluster of 2",
        "mapa.shared::cluster.u32 %r1, %r20, 2;".replace("%r20", "1024"),
        grid=2,
        cluster=2,
    )
    wrong_window = OWN + SYNC + NEXT.replace("ld.shared::cluster", "ld.shared") + SYNC
    cluster_fault("out of bounds", "belongs to another block", wrong_window)


def test_the_barrier():
    """Each thread arrives and waits in turn; threads that have exited are not waited for."""
    for seed in SEEDS:
        run_all("setp.lt.u32 %p1, %tid, 40; @%p1 exit; mov.u32 %r1, 0;" + SYNC.replace(".aligned", ""), 2, seed=seed)
    cluster_fault(
        "barrier", "without a wait between", "barrier.cluster.arrive; barrier.cluster.arrive; mov.u32 %r1, 0;"
    )
    cluster_fault("barrier", "without having arrived", "barrier.cluster.wait; mov.u32 %r1, 0;")
    uneven = "mov.u32 %r1, 0; mov.u32 %r10, %cluster_ctarank; setp.eq.u32 %p1, %r10, 0; @%p1 bra A;" + SYNC
    cluster_fault("deadlock", "wait at barrier.cluster", uneven + "bra B; A: bar.sync 0, 96; B:")
    between = OWN + "barrier.cluster.arrive.release; mov.u32 %r3, 1; barrier.cluster.wait.acquire;" + NEXT + SYNC
    run_all(between, 2)


def test_a_wait_orders_the_accesses_of_its_lane():
    """One lane of a warp waits at the cluster's barrier before the others do; they follow after a barrier with it."""
    first = "barrier.cluster.arrive; and.b32 %r5, %tid, 31; setp.eq.u32 %p1, %r5, 0; @%p1 barrier.cluster.wait;"
    rest = "@!%p1 barrier.cluster.wait;"
    shuffle = "shfl.sync.idx.b32 %r6, %tid, 0, 31, -1;"
    for seed in SEEDS:
        run_all(OWN + first + "bar.warp.sync -1;" + NEXT + rest + SYNC, 2, seed=seed)
        run_all(OWN + first + shuffle + rest + NEXT + SYNC, 2, seed=seed)
        run_all(OWN + first + shuffle + NEXT.replace("ld.shared", "@%p1 ld.shared") + rest + SYNC, 2, seed=seed)
    cluster_fault(("race on shared memory", "cluster"), "", OWN + first + shuffle + NEXT + rest + SYNC)
    # The barrier does not order what a lane did after its arrival.
    late = "barrier.cluster.arrive; st.shared.u32 [%r21], %r1; {} barrier.cluster.wait; xor.b32 %r13, %r21, 4;"
    late += "ld.shared.u32 %r1, [%r13];"
    cluster_fault("race on shared memory", "", OWN + late.format("") + SYNC)
    run_all(OWN + late.format("bar.warp.sync -1;") + SYNC, 2)
    parts = "and.b32 %r5, %tid, 31; setp.eq.u32 %p1, %r5, 0; {}@%p1 barrier.cluster.arrive; {}"
    parts += "@!%p1 barrier.cluster.arrive; barrier.cluster.wait; xor.b32 %r13, %r21, 4; ld.shared.u32 %r1, [%r13];"
    write = "@%p1 st.shared.u32 [%r21], %r1;"
    run_all(OWN + parts.format(write, "") + SYNC, 2)
    cluster_fault("race on shared memory", "", OWN + parts.format("", write) + SYNC)


# ---- Asynchronous operations between blocks --------------------------------------------------------------------------
PEER = "xor.b32 %r12, %r10, 1; mapa.shared::cluster.u32 %r16, %r19, %r12; mapa.shared::cluster.u32 %r17, %r20, %r12;"
RANK = "mov.u32 %r10, %cluster_ctarank;"


def test_arrivals_at_another_block():
    for seed in SEEDS:
        remote = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r16];"
        body = barrier(64) + RANK + PEER + SYNC + remote + wait() + "mov.u32 %r1, 5;" + SYNC
        assert (run_all(body, 2, seed=seed) == 5).all()
        init_relaxed = body.replace("bar.sync 0;", "fence.mbarrier_init.release.cluster;", 1).replace(
            "arrive.aligned", "arrive.relaxed.aligned", 1
        )
        assert (run_all(init_relaxed, 2, seed=seed) == 5).all()
    early = barrier(64) + RANK + PEER + remote + wait() + "mov.u32 %r1, 5;" + SYNC
    cluster_fault(("cluster", "mbarrier"), "before anything ensures|has not been executed", early)
    missing = body.replace("64;", "65;", 1)
    cluster_fault("deadlock", r"block \(\d,0,0\), warp 0, .* wait for the end of phase 0", missing)
    cluster_fault("cluster", "", body[: body.rindex(SYNC)].replace(wait(), ""))


def test_st_async():
    """The bytes of st.async count for the barrier of the block that they go to."""
    send = (
        "mad.lo.u32 %r17, %tid, 8, %r17; st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%r17], "
        "{{%r10, %tid}}, [%r16];"
    )
    body = barrier(1) + RANK + PEER + "@!%p1 bra A;" + EXPECT.format(bytes=512) + "A:" + SYNC + send + "{}"
    body += "mad.lo.u32 %r2, %tid, 8, %r20; ld.shared.v2.u32 {{%r3, %r4}}, [%r2]; mad.lo.u32 %r1, %r3, 100, %r4;" + SYNC
    for seed in SEEDS:
        got = run_all(body.format(wait()), 2, seed=seed)
        assert (got == np.array([[100], [0]]) + np.arange(64)).all()
    cluster_fault(("asynchronous copy", "race on shared memory", "uninitialised memory"), "", body.format(""))


def test_copies_between_blocks():
    """cp.async.bulk goes from shared memory to that of another block; its source may change once it has landed."""
    fill = "mad.lo.u32 %r21, %tid, 4, %r20; mad.lo.u32 %r1, %r10, 1000, %tid; st.shared.u32 [%r21], %r1; {fence}"
    copy = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r17+512], [%r20], 256, [%r16];"
    body = barrier(1) + RANK + PEER + fill + "@!%p1 bra A;" + EXPECT.format(bytes=256) + "A:" + SYNC + "@%p1 " + copy
    body += wait() + "ld.shared.u32 %r1, [%r21+512];" + SYNC
    for seed in SEEDS:
        got = run_all(body.format(fence="fence.proxy.async;"), 2, seed=seed)
        assert (got == np.array([[1000], [0]]) + np.arange(64)).all()
    cluster_fault("proxy", "is read asynchronously", body.format(fence=""))
    changed = body.format(fence="fence.proxy.async;").replace(wait(), "bar.sync 0; st.shared.u32 [%r21], 0;" + wait())
    cluster_fault(("asynchronous copy", "race on shared memory"), "", changed)


def test_multicast():
    """One copy lands in each block of the mask, at the same place, and counts for the barrier there."""
    x = np.arange(64, dtype=np.uint32)
    load = (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r20], [%rd1], 256, "
        "[%r19], %h1;"
    )
    body = (
        barrier(1)
        + RANK
        + "ld.param.u64 %rd1, [x]; @!%p1 bra A;"
        + EXPECT.format(bytes=256)
        + "A:"
        + SYNC
        + "mov.u16 %h1, MASK; setp.eq.u32 %p3, %r10, 0; @!%p1 bra B; @!%p3 bra B;"
        + load
        + "B:"
        + wait()
        + "mad.lo.u32 %r21, %tid, 4, %r20; ld.shared.u32 %r1, [%r21];"
        + SYNC
    )
    options = {"params": ".param .u64 out, .param .u64 x", "args": (In(x),)}
    for seed in SEEDS:
        got = run_all(body.replace("MASK", "7"), 3, seed=seed, **options)
        assert (got == x).all()
    cluster_fault("deadlock", "256 bytes pending", body.replace("MASK", "5"), 3, **options)
    cluster_fault("illegal", "block 3 of a cluster of 3", body.replace("MASK", "15"), 3, **options)


def test_a_mutant_of_a_reduction():
    """Sums over a cluster by distributed shared memory, without one of its barriers."""
    body = OWN + "{a}mov.u32 %r1, 0; mov.u32 %r12, 0; LOOP: mapa.shared::cluster.u32 %r13, %r21, %r12;"
    body += "ld.shared::cluster.u32 %r2, [%r13]; add.u32 %r1, %r1, %r2; add.u32 %r12, %r12, 1;"
    body += "setp.lt.u32 %p1, %r12, %r11; @%p1 bra LOOP; {b}"
    assert (run_all(body.format(a=SYNC, b=SYNC), 4, 8) == 6000 + 4 * np.arange(64)).all()
    for a, b in ((SYNC, ""), ("", SYNC)):
        cluster_fault(("cluster", "race on shared memory", "uninitialised memory"), "", body.format(a=a, b=b), 4)
