// PTX ISA, sections "mapa", "getctarank" and "barrier.cluster"; and what a block must have done when it exits.
// The warps of a cluster's blocks run together, and their accesses are ordered as those of one block.
#pragma once
#include "bulk_copy.h"

namespace ptx {

// Returns the rank of the block in whose shared memory an address lies; i.a says that addresses are generic.
inline u32 rank_of(const Warp& w, u64 address) {
    const u32 rank = static_cast<u32>(address) >> kRankShift;
    return rank ? rank - 1 : static_cast<u32>(w.block);
}
inline void need_shared(int lane, const Instr& i, u64 address) {
    if (i.a ? address - kSharedWindow >= kWindowSize : address >> 32 != 0)
        fault(lane, "illegal", hex(address) + " is not an address of shared memory");
}
inline void mapa(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for_lanes(mask, [&](int l) {
        const u64 address = m.in(w, i.s[0])[l] + static_cast<u64>(i.offset), rank = m.in(w, i.s[1])[l];
        need_shared(l, i, address);
        if (rank >= m.cluster_blocks)
            fault(l, "illegal",
                  "mapa: block " + std::to_string(rank) + " of a cluster of " + std::to_string(m.cluster_blocks));
        const u64 low = address & ((u64{1} << kRankShift) - 1);
        m.row(w, i.d[0])[l] = low + ((rank + 1) << kRankShift) + (i.a ? kSharedWindow : 0);
    });
}
inline void getctarank(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for_lanes(mask, [&](int l) {
        const u64 address = m.in(w, i.s[0])[l] + static_cast<u64>(i.offset);
        need_shared(l, i, address);
        m.row(w, i.d[0])[l] = rank_of(w, address);
    });
}
template <bool kMap>
void decode_of_cluster(Decoder& d) {
    d.i.a = !d.take("shared::cluster");
    const Type type = d.take_type();
    d.expect(kMap ? 3 : 2);
    d.destination(0);
    if (d.operand(1).kind == kAddress) {
        d.address(1);
    } else {
        d.source(1, type);
    }
    if (kMap) d.source(2, Type::u32);
    d.i.run = kMap ? mapa : getctarank;
}

// ---- barrier.cluster ------------------------------------------------------------------------------------------------
// Each thread arrives, and waits, once for each completion of the barrier. It completes when all threads of the cluster
// that have not exited have arrived.
inline void complete_cluster_barrier(Machine& m) {
    ClusterBarrier& b = m.cluster_barrier;
    bool living = false;
    for (const Warp& w : m.warps) {
        bool missing = false;
        for_lanes(w.lanes & ~w.exited, [&](int l) {
            living = true;
            missing = missing || w.cluster_arrivals[l] == b.completed;
        });
        if (missing) return;
    }
    if (!living) return;
    ++b.completed;
    merge(b.released, b.gathered);
    b.gathered = {m.block, {}, {}};
    for (Warp& w : m.warps) {
        u32 goes = 0;
        for_lanes(w.at_wait, [&](int l) { goes |= u32{w.reason[l] == Wait::kCluster} << l; });
        if (!goes) continue;
        w.at_wait &= ~goes;
        acquire(w, goes, b.released);
    }
}
// i.a is set for wait; i.release says whether an arrival releases.
inline void cluster_barrier(Machine& m, Warp& w, const Instr& i, u32 mask) {
    ClusterBarrier& b = m.cluster_barrier;
    if (!i.a) {
        for_lanes(mask, [&](int l) {
            if (w.cluster_arrivals[l] != w.cluster_waits[l])
                fault(l, "barrier", "a thread arrives twice at barrier.cluster without a wait between");
            ++w.cluster_arrivals[l];
        });
        if (i.release) {
            merge(b.gathered, publish(w, mask | w.exited));
        } else if (w.has_fenced) {
            merge(b.gathered, w.fenced);
        }
        complete_cluster_barrier(m);
        return;
    }
    u32 passes = 0;
    for_lanes(mask, [&](int l) {
        if (w.cluster_arrivals[l] == w.cluster_waits[l])
            fault(l, "barrier", "a thread waits at barrier.cluster without having arrived");
        ++w.cluster_waits[l];
        if (w.cluster_waits[l] <= b.completed) {
            passes |= 1u << l;
        } else {
            block_lane(w, l, Wait::kCluster);
        }
    });
    if (passes) acquire(w, passes, b.released);
}
inline void decode_cluster_barrier(Decoder& d) {
    d.i.a = d.need_one({"arrive", "wait"}) == 1;
    d.i.release = !d.i.a && d.take_one({"release", "relaxed"}) != 1;
    if (d.i.a) d.take("acquire");
    d.take("aligned");
    d.expect(0);
    d.i.flow = Flow::kBranch;
    d.i.run = cluster_barrier;
}
inline void decode_barrier_of(Decoder& d) {
    if (d.take("cluster")) return decode_cluster_barrier(d);
    decode_barrier(d, false);
}

// ---- Exit -----------------------------------------------------------------------------------------------------------
// All lanes of a warp have exited. Nothing that it started may be under way; and once all warps of its block have,
// nobody may use the block's shared memory.
inline void leave(Machine& m, Warp& w) {
    if (!w.products.empty())
        fault(-1, "warpgroup", "the warp exits before it waits for the wgmma at " + at_pc(w.products.front().pc));
    Block& block = m.block_of(w);
    const std::span<Warp> warps(m.warps.data() + w.first, m.block_warps);
    for (const Warp& other : warps)
        if (other.lanes & ~other.exited) return;
    block.exited = true;
    for (size_t k = 0; k < block.steps.size(); ++k)
        for (size_t j = 4 * k; j < std::min(4 * k + 4, warps.size()); ++j)
            if (warps[j].products_issued != block.steps[k].size())
                fault(-1, "warpgroup",
                      "warp " + std::to_string(j) + " executed " + std::to_string(warps[j].products_issued) +
                          " wgmma, and another one of its "
                          "warpgroup " +
                          std::to_string(block.steps[k].size()));
    const u32 rank = static_cast<u32>(w.block);
    for (BulkCopy& copy : m.bulk) {
        const bool here = copy.at / m.shared_stride == rank;
        if (copy.kind == BulkCopy::kStore
                ? here && !copy.read
                : here || (!copy.chunks.empty() && copy.chunks[0] * 16 / m.shared_stride == rank))
            fault(-1, "asynchronous copy",
                  "the block exits while the copy at " + at_pc(copy.pc) + " of " +
                      thread_text(m, m.block, copy.warp * kLanes + copy.lane) + " still uses its shared memory");
    }
    for (size_t k = 0; k < block.visitors.size(); ++k) {
        const auto [clock, pc] = block.visitors[k];
        if (!clock) continue;
        bool known = false;
        for (const Warp& other : warps) known = known || other.reaches(-1, k, clock);
        if (!known)
            fault(-1, "cluster",
                  "the block exits, but the access to its shared memory by " +
                      thread_text(m, m.block, static_cast<int>(k) * kLanes) + " or its warp at " + at_pc(pc) +
                      " is not ordered before");
    }
}

}  // namespace ptx
