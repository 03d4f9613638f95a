// PTX ISA, sections "Control Flow Instructions", "Parallel Synchronization and Communication Instructions: bar,
// barrier, bar.warp.sync, membar, fence" and "Miscellaneous Instructions".
#pragma once
#include <span>

#include "transfer.h"

namespace ptx {

// A handler of Flow::kBranch is called with the lanes' pc already set to the next instruction.
inline void bra(Machine&, Warp& w, const Instr& i, u32 mask) {
    for_lanes(mask, [&](int l) { w.pc[l] = i.targets[0]; });
}
inline void brx(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* index = m.in(w, i.s[0]);
    for_lanes(mask, [&](int l) {
        if (index[l] >= i.targets.size())
            fault(l, "illegal", "brx.idx: index " + std::to_string(index[l]) + " is past the list of targets");
        w.pc[l] = i.targets[index[l]];
    });
}
inline void decode_bra(Decoder& d) {
    d.take("uni");
    if (d.operand(0).kind != kLabel) d.error("the target is not a label");
    d.i.targets = {static_cast<u32>(d.operand(0).value)};
    d.i.flow = Flow::kBranch;
    d.i.run = bra;
}
inline void decode_brx(Decoder& d) {
    if (!d.take("idx")) d.error("only .idx is known");
    d.take("uni");
    d.source(0, Type::u32);
    const Operand* list = d.operands + d.at[1];
    if (list->kind != kTargets) d.error("lacks a list of targets");
    for (int k = 0; k < list->count; ++k) d.i.targets.push_back(static_cast<u32>(list[1 + k].value));
    d.i.flow = Flow::kBranch;
    d.i.run = brx;
}

void complete_barriers(Machine& m, Warp& w);
void complete_cluster_barrier(Machine& m);
void leave(Machine& m, Warp& w);

inline void exit_lanes(Machine& m, Warp& w, const Instr&, u32 mask) {
    w.exited |= mask;
    w.at_members = 0;  // lanes that waited for these look again
    complete_barriers(m, w);
    if (m.cluster_blocks > 1) complete_cluster_barrier(m);
    if (!(w.lanes & ~w.exited) && (m.asynchronous || m.cluster_blocks > 1)) leave(m, w);
}
inline void decode_exit(Decoder& d) {
    d.take("uni");
    d.i.flow = Flow::kBranch;
    d.i.run = exit_lanes;
}
inline void trap(Machine&, Warp&, const Instr&, u32 mask) {
    fault(std::countr_zero(mask), "trap", "the kernel trapped");
}
inline void decode_trap(Decoder& d) { d.i.run = trap; }
inline void decode_nanosleep(Decoder& d) {
    d.take_type();
    d.source(0, Type::u32);
    d.i.run = nothing;
}

// ---- Barriers of the block ------------------------------------------------------------------------------------------
// A barrier counts warps. A warp has arrived once all its threads that have not exited are there.
inline void complete_barrier(Machine& m, Barrier& b, size_t first) {
    u32 threads = 0, warps_here = 0;
    bool all = true;
    const std::span<Warp> warps(m.warps.data() + first, m.block_warps);
    for (const Warp& w : warps) {
        const u32 here = b.waiting[w.id] | b.arrived[w.id], living = w.lanes & ~w.exited;
        const bool whole = (living & ~here) == 0;
        all = all && whole;
        if (here && whole) threads += kLanes, ++warps_here;
    }
    if (b.expected == 0 ? !all : threads < b.expected) return;
    if (b.expected && threads > b.expected) {
        fault(-1, "barrier", std::to_string(threads) + " threads came to a barrier of " + std::to_string(b.expected));
    }
    u32 count = 0, any = 0, every = 1;  // the results of barrier.red
    for (Warp& w : warps) {
        for_lanes(b.waiting[w.id], [&](int l) {
            const Instr& i = m.program->code[w.blocked_pc[l]];
            if (!i.b) return;
            const bool p = (m.in(w, i.s[i.s.size() - 1])[l] != 0) != (i.negated.back() != 0);
            count += p, any |= p, every &= p;
        });
    }
    for (Warp& w : warps) {
        const u32 lanes = b.waiting[w.id];
        if (!lanes) continue;
        for_lanes(lanes, [&](int l) {
            const Instr& i = m.program->code[w.blocked_pc[l]];
            if (!i.b) return;
            m.row(w, i.d[0])[l] = i.b == 1 ? count : i.b == 2 ? every : any;
            w.initialised[i.d[0]] |= 1u << l;
        });
        acquire(w, lanes, b.gathered);
        meet(w, lanes);
        w.at_barrier &= ~lanes;
    }
    b.open = false;
}
inline void complete_barriers(Machine& m, Warp& w) {
    for (Barrier& b : m.block_of(w).barriers)
        if (b.open) complete_barrier(m, b, static_cast<size_t>(w.first));
}
// i.a is true for arrive. i.b is 1 for popc, 2 for and, 3 for or. s[0] is the barrier, s[1] the count if targets[0] is
// set.
inline void bar(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const int first = std::countr_zero(mask);
    const u64 id = m.in(w, i.s[0])[first];
    const u64 count = i.targets[0] ? m.in(w, i.s[1])[first] : 0;
    for_lanes(mask, [&](int l) {
        if (m.in(w, i.s[0])[l] != id || (i.targets[0] && m.in(w, i.s[1])[l] != count))
            fault(l, "barrier", "threads of a warp name different barriers or counts");
    });
    std::array<Barrier, 16>& barriers = m.block_of(w).barriers;
    if (id >= barriers.size()) fault(first, "barrier", "barrier " + std::to_string(id) + " does not exist");
    if (count % kLanes)
        fault(first, "barrier", "the count " + std::to_string(count) + " is not a multiple of the warp's size");
    Barrier& b = barriers[id];
    if (!b.open) {
        b.open = true;
        b.waiting.assign(m.warps.size(), 0);
        b.arrived.assign(m.warps.size(), 0);
        b.gathered = {m.block, {}, {}};
        b.expected = static_cast<u32>(count);
        b.reduces = i.b != 0;
    } else if (b.expected != count) {
        fault(first, "barrier",
              "barrier " + std::to_string(id) + " is used with count " + std::to_string(count) +
                  " while others wait there with " + std::to_string(b.expected));
    }
    if (b.reduces != (i.b != 0)) fault(first, "barrier", "barrier.red is mixed with another form at one barrier");
    if (const u32 twice = (b.waiting[w.id] | b.arrived[w.id]) & mask)
        fault(std::countr_zero(twice), "barrier", "a thread arrives twice at barrier " + std::to_string(id));
    if (i.aligned) {
        for_lanes(b.waiting[w.id], [&](int l) {
            if (w.blocked_pc[l] != w.now)
                fault(first, "barrier",
                      "threads of one warp wait at two barrier instructions, here and at " + at_pc(w.blocked_pc[l]) +
                          ": .aligned asks for the same one");
        });
    }
    merge(b.gathered, publish(w, mask | w.exited));
    if (i.a) {
        b.arrived[w.id] |= mask;
    } else {
        b.waiting[w.id] |= mask;
        w.at_barrier |= mask;
        for_lanes(mask, [&](int l) {
            w.barrier[l] = static_cast<s32>(id);
            w.blocked_pc[l] = w.now;
        });
    }
    complete_barrier(m, b, static_cast<size_t>(w.first));
}
// bar.sync is barrier.sync.aligned; .cta is allowed in both.
inline void decode_barrier(Decoder& d, bool aligned) {
    d.take("cta");
    d.i.aligned = aligned || d.take("aligned");
    const int what = d.need_one({"sync", "arrive", "red"});
    d.i.a = what == 1;
    int k = 0;
    if (what == 2) {
        d.i.b = static_cast<u32>(d.need_one({"popc", "and", "or"}) + 1);
        d.take_type();
        d.destination(k++);
    }
    d.source(k++, Type::u32);
    const int predicate = what == 2;
    d.i.targets = {d.count() - k - predicate > 0};
    if (d.i.targets[0]) d.source(k++, Type::u32);
    if (d.i.a && !d.i.targets[0]) d.error("arrive lacks a thread count");
    if (predicate) d.source(k++, Type::pred);
    d.expect(k);
    d.i.flow = Flow::kBranch;
    d.i.run = bar;
}
inline void warp_sync(Machine&, Warp& w, const Instr&, u32 mask) { meet(w, mask); }
inline void decode_bar(Decoder& d) {
    if (!d.take("warp")) return decode_barrier(d, true);
    if (!d.take("sync")) d.error("lacks .sync");
    d.expect(1);
    d.source(0, Type::b32);
    d.i.members = d.i.s[0];
    d.i.flow = Flow::kCollective;
    d.i.run = warp_sync;
}

// ---- membar, fence --------------------------------------------------------------------------------------------------
// i.a says that the scope is the block. Earlier strong reads acquire here; later strong writes release what precedes.
inline void fence(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const auto take = [&](u32 lanes, const Published& p) {
        if (!i.a || p.block == m.block) acquire(w, lanes, p);
    };
    take(mask, w.seen.all);
    for_lanes(mask & w.seen.lanes, [&](int l) { take(1u << l, w.seen.own[static_cast<size_t>(l)]); });
    const Published published = publish(w, mask);
    merge(w.fenced, published);
    w.has_fenced = true;
    if (!i.a) {
        merge(w.fenced_gpu, published);
        w.has_fenced_gpu = true;
    }
}
// PTX ISA, section "fence.proxy": ordinary writes that are ordered before this become visible to the asynchronous
// proxy. i.a is 1 if it concerns shared memory, 2 for global memory, and 3 for both.
inline void fence_proxy(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const Knowledge known = knowledge(w, mask).known;
    for (u32 space = 0; space < 2; ++space) {
        if (!(i.a >> space & 1)) continue;
        Proxied& p = m.proxied[space];
        merge(p.warp, known.whole);
        p.warp.resize(std::max(p.warp.size(), m.warps.size()));
        p.thread.resize(m.warps.size() * kLanes);
        for (const auto& [warp, lanes] : known.lanes)
            for (size_t j = 0; j < kLanes && warp < m.warps.size(); ++j) {
                u32& clock = p.thread[warp * kLanes + j];
                clock = std::max(clock, lanes[j]);
            }
    }
    ++w.clock;
}
inline void decode_fence(Decoder& d) {
    d.expect(0);
    if (d.take("proxy")) {
        // Between aliases of an address there is nothing to do: each byte has one address here.
        if (d.need_one({"alias", "async"}) == 0) {
            d.i.run = nothing;
            return;
        }
        const int space = d.take_one({"shared::cta", "shared::cluster", "global"});
        d.i.a = space < 0 ? 3 : space == 2 ? 2 : 1;
        d.i.run = fence_proxy;
        return;
    }
    // fence.mbarrier_init.release.cluster acts as a fence, though it needs to publish only initializations.
    d.take("mbarrier_init");
    d.take_one({"sc", "acq_rel", "acquire", "release"});
    const int scope = d.take_one({"cta", "cluster", "gpu", "sys", "gl"});
    d.i.a = scope == 0 || scope == 1;
    d.i.run = fence;
}

}  // namespace ptx
