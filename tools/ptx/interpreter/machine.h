// The machine has programs of decoded instructions, warps, blocks, and the clocks that tell which access is ordered
// before which. PTX ISA, section "PTX Machine Model".
#pragma once
#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "values.h"

// Checks of rare cases are kept out of the path of ordinary accesses.
#define PTX_OUT_OF_LINE __attribute__((noinline))

namespace ptx {

struct Machine;
struct Warp;
struct Instr;

inline constexpr int kLanes = 32;
inline constexpr u32 kAll = ~0u;

// A fault stops a run. `lane` is -1 if the whole warp is meant.
struct Fault {
    std::string kind, message;
    int lane = -1;
};
[[noreturn]] inline void fault(int lane, const char* kind, std::string message) {
    throw Fault{kind, std::move(message), lane};
}
inline std::string hex(u64 v) {
    char text[24];
    snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
    return text;
}

// An operand as the parser passes it. A vector is a header, followed by its `count` elements.
struct Operand {
    s32 kind;    // OperandKind
    s32 reg;     // register of kRegister, kAddress (-1: none)
    s32 count;   // elements of kVector; 1 for a negated predicate
    s32 unused;  // keeps `value` aligned in every compiler's layout
    s64 value;   // immediate, offset, branch target, bits of a float literal
};
// kTensor is an address followed by its `count` coordinates: [map, {x, y}].
enum OperandKind { kRegister, kImmediate, kFloat32, kFloat64, kAddress, kVector, kLabel, kSink, kTargets, kTensor };

using Handler = void (*)(Machine&, Warp&, const Instr&, u32 mask);

enum class Flow : u8 {
    kNext,        // executes on the lanes at this pc, which then go on to the next instruction
    kBranch,      // sets the lanes' pc itself
    kCollective,  // .sync: executes once all lanes of its member mask are here
};

// kShared is the block's own shared memory, kCluster that of any block of its cluster.
enum class Space : u8 { kGeneric, kGlobal, kConst, kShared, kLocal, kParam, kCluster };

struct Instr {
    Handler run = nullptr;
    Flow flow = Flow::kNext;
    bool copies = false;  // may read uninitialised registers, and its result is as uninitialised as its source
    bool guard_negated = false;
    s32 guard = -1;   // predicate register
    s32 members = 0;  // kCollective: row of the member mask; with `aligned` the members are all 32 lanes
    bool aligned = false;
    std::vector<s32> d, s;    // rows: registers >= 0, constants < 0 (~index); s32 kNoRow for a sink
    std::vector<u8> negated;  // for each of s, whether it is a predicate operand with !
    u64 d_mask = ~u64{0};     // the bits that d[0]'s register has
    // Each family uses these as it needs: an offset, a space, a size, small numbers.
    s64 offset = 0, offset2 = 0, offset3 = 0;
    Space space = Space::kGeneric;
    u8 bytes = 0;  // size of one element of a memory access
    u8 vector = 1;
    bool is_signed = false, strong = false, acquire = false, release = false, read_only = false, ftz = false,
         sat = false;
    bool relu = false;
    Round round = Round::kNearest;
    Round integral = Round::kNearest;
    u32 a = 0, b = 0;  // free for the family
    std::vector<u32> targets;
};
inline constexpr s32 kNoRow = INT32_MIN;

// The counts of an instruction, in this order (machine.py names the columns).
struct Count {
    u64 warps = 0, threads = 0, wavefronts = 0, wavefronts_least = 0, sectors = 0, sectors_least = 0;
};

struct Program {
    std::vector<Instr> code;
    std::vector<std::array<u64, kLanes>> constants;
    std::vector<u8> bits;  // width of each register
    std::vector<std::pair<s32, std::string>> specials;
    std::unordered_map<u64, s32> constant_index;
    bool asynchronous = false;  // it has mbarriers, bulk copies or wgmma
    bool warpgroups = false;    // it has wgmma

    s32 constant(u64 value) {
        auto [at, fresh] = constant_index.try_emplace(value, static_cast<s32>(constants.size()));
        if (fresh) constants.emplace_back().fill(value);
        return ~at->second;
    }
};

// ---- The order of accesses ------------------------------------------------------------------------------------------
// A warp's clock counts its synchronizing events. An access is stamped with its thread and its warp's clock; a thread
// is ordered after the access if it knows of that clock. What all lanes of a warp know of other warps is kept once, and
// what some lanes have acquired alone is kept for each of them (`Known`). What the lanes know of each other is kept for
// each lane. Clocks go on from block to block, so that a new block knows everything of its slot's past at once.
using Clocks = std::vector<u32>;

inline void merge(Clocks& into, const Clocks& from) {
    into.resize(std::max(into.size(), from.size()));
    for (size_t w = 0; w < from.size(); ++w) into[w] = std::max(into[w], from[w]);
}

// Holds what is known of the warps of a cluster. A lane that releases alone knows its own accesses, but not those of
// the other lanes of its warp, so more may be known of some lanes of a warp than of all.
using LaneClocks = std::array<u32, kLanes>;
struct Knowledge {
    Clocks whole;                        // [warp]: the clock of that warp up to which all its lanes are known
    std::map<size_t, LaneClocks> lanes;  // [warp]: the clocks of its lanes, if some are later

    // Returns the lanes of a warp of which all accesses up to a clock are known.
    u32 lanes_at(size_t warp, u32 clock) const {
        if (warp < whole.size() && clock <= whole[warp]) return kAll;
        return lanes.empty() ? 0 : some_lanes_at(warp, clock);
    }
    PTX_OUT_OF_LINE u32 some_lanes_at(size_t warp, u32 clock) const {
        const auto found = lanes.find(warp);
        if (found == lanes.end()) return 0;
        u32 known = 0;
        for (size_t j = 0; j < kLanes; ++j) known |= u32{clock <= found->second[j]} << j;
        return known;
    }
    void set(size_t warp, u32 clock) {
        whole.resize(std::max(whole.size(), warp + 1));
        whole[warp] = clock;
        lanes.erase(warp);
    }
};
inline void merge(Knowledge& into, const Knowledge& from) {
    merge(into.whole, from.whole);
    for (const auto& [warp, clocks] : from.lanes) {
        LaneClocks& mine = into.lanes[warp];  // zeros if it is new
        for (size_t j = 0; j < kLanes; ++j) mine[j] = std::max(mine[j], clocks[j]);
    }
    for (auto at = into.lanes.begin(); at != into.lanes.end();) {
        into.whole.resize(std::max(into.whole.size(), at->first + 1));
        u32& whole = into.whole[at->first];
        whole = std::max(whole, *std::min_element(at->second.begin(), at->second.end()));
        const bool adds = whole < *std::max_element(at->second.begin(), at->second.end());
        at = adds ? std::next(at) : into.lanes.erase(at);
    }
}

// What threads know: lanes of a warp, those that have released at an address, or those that have arrived at a barrier.
struct Published {
    s32 block = -1;
    Knowledge known;                  // of the warps of `block`
    std::map<s32, Knowledge> blocks;  // of other blocks, from atomics and fences

    const Knowledge* of(s32 other) const {
        if (other == block) return &known;
        const auto found = blocks.find(other);
        return found == blocks.end() ? nullptr : &found->second;
    }
};
inline void merge(std::map<s32, Knowledge>& into, const std::map<s32, Knowledge>& from) {
    for (const auto& [block, known] : from) merge(into[block], known);
}
// Adds the knowledge of `from` to `into`; clocks of a block other than into's stay with that block.
inline void merge(Published& into, const Published& from) {
    if (into.block < 0) into.block = from.block;
    if (into.block == from.block) {
        merge(into.known, from.known);
    } else {
        merge(into.blocks[from.block], from.known);
    }
    merge(into.blocks, from.blocks);
    if (auto own = into.blocks.find(into.block); own != into.blocks.end()) merge(into.known, own->second);
}

// What the lanes of a warp know of others. An acquire by some of them does not tell the rest, until they meet.
struct Known {
    Published all;               // what each lane knows
    std::vector<Published> own;  // [lane]: what it knows beyond that; empty before the first such knowledge
    u32 lanes = 0;               // those that have entries in `own`

    // Tells the lanes in `mask`; `living` are those that have not exited.
    void add(const Published& p, u32 mask, u32 living) {
        if ((living & ~mask) == 0) {
            merge(all, p);
        } else {
            add_to_some(p, mask);
        }
    }
    PTX_OUT_OF_LINE void add_to_some(const Published& p, u32 mask) {
        own.resize(kLanes);
        for (lanes |= mask; mask; mask &= mask - 1) {
            Published& to = own[static_cast<size_t>(std::countr_zero(mask))];
            if (to.block < 0) to.block = all.block;
            merge(to, p);
        }
    }
    // Calls f with what each lane in `mask` knows beyond `all`.
    template <class F>
    void for_own(u32 mask, F&& f) const {
        for (mask &= lanes; mask; mask &= mask - 1) f(own[static_cast<size_t>(std::countr_zero(mask))]);
    }
    void forget_own(u32 mask) {
        for (u32 left = mask & lanes; left; left &= left - 1) own[static_cast<size_t>(std::countr_zero(left))] = {};
        lanes &= ~mask;
    }
    // Returns whether each of the lanes in `by` knows all accesses up to a clock by the lanes in `mask` of a warp. An
    // empty mask stands for a wgmma of the warp, which is known if one lane is.
    bool covers(u32 by, s32 block, size_t warp, u32 mask, u32 clock) const {
        const Knowledge* shared = all.of(block);
        const u32 known = shared ? shared->lanes_at(warp, clock) : 0;
        if (mask ? (mask & ~known) == 0 : known != 0) return true;
        return (by & ~lanes) == 0 && own_covers(by, block, warp, mask, clock, known);
    }
    PTX_OUT_OF_LINE bool own_covers(u32 by, s32 block, size_t warp, u32 mask, u32 clock, u32 shared) const {
        bool covered = true;
        for_own(by, [&](const Published& p) {
            const Knowledge* more = p.of(block);
            const u32 known = shared | (more ? more->lanes_at(warp, clock) : 0);
            covered = covered && (mask ? (mask & ~known) == 0 : known != 0);
        });
        return covered;
    }
};

struct Order {
    Known known;                            // of the other warps
    u32 all_lanes = 0;                      // the clock up to which every lane knows of every other
    std::array<LaneClocks, kLanes> lane{};  // [i][j]: what lane i knows of lane j beyond all_lanes
};

struct AsyncCopy {
    u64 group;   // kOpenGroup until committed
    u64 number;  // counts the copies of the warp
    u32 shared;  // place in Machine::shared
    u64 source;
    u32 bytes, source_bytes;
    u32 pc;
    std::array<u8, 16> data;
};
inline constexpr u64 kOpenGroup = ~u64{0};

// A wgmma whose group has not been waited for, as one warp executed it.
struct WarpgroupProduct {
    u64 group;  // kOpenGroup until committed
    u32 pc;
    std::vector<u32> chunks;     // the 16-byte pieces of shared memory that it reads, by their offset / 16
    std::vector<s32> registers;  // accumulators, and the fragments of A
};

// The reason for which a lane of Warp::at_wait is blocked.
enum class Wait : u8 { kMbarrier, kCluster, kRegisters };

struct Warp {
    int id = 0;
    u32 lanes = 0;  // the lanes that were launched
    u32 exited = 0;
    u32 at_barrier = 0;  // blocked at a barrier of the block
    u32 at_members = 0;  // blocked until the other members of a .sync instruction arrive
    u32 at_wait = 0;     // blocked for the reason in `reason`; `waits_for` is the place of the mbarrier
    std::array<Wait, kLanes> reason{};
    std::array<u32, kLanes> waits_for{};
    std::array<u64, kLanes> phase{};             // the phase of the mbarrier whose end the lane waits for
    std::array<u32, kLanes> cluster_arrivals{};  // at barrier.cluster
    std::array<u32, kLanes> cluster_waits{};
    int block = 0;       // the block's rank in the cluster
    int first = 0;       // the id of that block's first warp
    u32 start = 0;       // the first clock of this block
    u32 per_thread = 0;  // registers a thread, as setmaxnreg left them
    std::array<u32, kLanes> pc{};
    std::array<u32, kLanes> blocked_pc{};
    std::array<s32, kLanes> barrier{};
    u32 carry = 0;  // the condition code register CC.CF, one bit for each lane
    u32 now = 0;    // the pc that is being executed
    u32 clock = 0;
    Order order;
    // Later strong writes release `fenced` (after a fence of any scope) or `fenced_gpu` (after one of at least .gpu).
    Published fenced, fenced_gpu;
    bool has_fenced = false, has_fenced_gpu = false;
    Known seen;  // by earlier strong reads; a later fence by the same lanes acquires it
    std::vector<u64> registers;
    std::vector<u32> initialised;
    std::vector<u8> local, local_state;
    std::array<std::deque<AsyncCopy>, kLanes> copies;
    std::array<u64, kLanes> committed{};
    u64 copies_issued = 0;
    std::array<u64, kLanes> bulk_committed{};
    std::deque<WarpgroupProduct> products;
    u64 products_committed = 0, products_issued = 0;
    std::vector<u8> touched, shapes;  // [register]: see warpgroup.h
    std::vector<u16> flying;          // [register]: the wgmma in flight that name it

    u32 living() const { return lanes & ~exited; }
    u32 runnable() const { return living() & ~at_barrier & ~at_members & ~at_wait; }
    // Returns whether a lane, or each one that lives if `lane` is negative, knows the accesses up to a clock by the
    // lanes in `mask` of another warp.
    PTX_OUT_OF_LINE bool knows(int lane, s32 cluster, size_t warp, u32 mask, u32 clock) const {
        return order.known.covers(lane < 0 ? living() : 1u << lane, cluster, warp, mask, clock);
    }
    // Returns whether a lane, or any one if `lane` is negative, knows an access up to a clock by some lane of a warp.
    bool reaches(int lane, size_t warp, u32 clock) const {
        const Known& known = order.known;
        bool reached = known.all.known.lanes_at(warp, clock) != 0;
        known.for_own(lane < 0 ? kAll : 1u << lane,
                      [&](const Published& p) { reached = reached || p.known.lanes_at(warp, clock) != 0; });
        return reached;
    }
    int thread(int lane) const { return id * kLanes + lane; }                     // within the cluster
    int thread_of_block(int lane) const { return (id - first) * kLanes + lane; }  // within the block
};

struct Barrier {
    std::vector<u32> waiting;  // [warp]: lanes that wait
    std::vector<u32> arrived;  // [warp]: lanes that arrived by bar.arrive and do not wait
    Published gathered;
    u32 expected = 0;  // the number of threads; 0 for all of the block
    bool open = false, reduces = false;
};

struct Random {
    u64 state;
    u32 operator()() {  // splitmix64
        u64 z = state += 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return static_cast<u32>((z ^ z >> 31) >> 16);
    }
    u32 below(u32 n) { return static_cast<u32>(u64{(*this)()} * n >> 32); }
};

struct Shadow;

struct Buffer {
    u64 base, size;
    u8* data;
    u8* initialised;  // one byte for each byte of the buffer; null if all are initialised
    u32 writable, constant;
    u32 dependent, unused;  // the kernel before may still write it until griddepcontrol.wait
    const char* name;
    Shadow* shadow;  // one entry for each 4-byte word; null for a buffer that is never written
};

struct Region {  // a variable in shared, local or parameter space
    u32 offset, size;
};

// PTX ISA, section "mbarrier". The asynchronous writes that a barrier's phases publish are stamped with a warp that
// does not exist, `agent`: a thread is ordered after them if it knows that agent's clock, which a wait acquires.
struct Mbarrier {
    u32 at;  // place in Machine::shared
    u32 agent, pc;
    u32 expected, pending;
    s64 transactions = 0;  // bytes that the current phase still expects
    u64 phase = 0;
    Published gathered;   // what the arrivals of the current phase release
    Published completed;  // what the phases before released
    Clocks users;         // [warp]: its clock at its last use
};

// A copy between global and shared memory is a run of bytes of shared memory with pieces of it that lie in global
// memory; what no piece covers is filled with zeros (a load) or left out (a store). It is under way until it lands or,
// a store, until its thread has waited for it.
struct Piece {
    u32 shared, bytes;  // place in Machine::shared
    Buffer* buffer;
    u64 offset;
};
struct BulkCopy {
    // kWrite brings bytes that it holds itself; kArrive is an arrival that cp.async triggers.
    enum Kind { kLoad, kStore, kWrite, kArrive } kind = kLoad;
    int warp = 0, lane = 0;
    u32 pc = 0;
    u32 at = 0, bytes = 0;   // the run of Machine::shared
    u32 mbarrier = 0;        // its place in Machine::shared; not of kStore
    u64 group = kOpenGroup;  // kStore: kOpenGroup until committed
    u64 copies_before = 0;   // kArrive: it waits for those cp.async of its thread that have lower numbers
    std::vector<Piece> pieces;
    std::vector<u8> data;     // kWrite
    std::vector<u32> chunks;  // the 16-byte pieces of shared memory that it reads, by place / 16
    bool landed = false, read = false;
};

// A tensor map, as machine.py passes it; dimension 0 is the innermost one.
struct TensorMap {
    u64 base;
    u32 rank, element_bytes, swizzle, unused;
    u64 size[5], stride[5];
    u32 box[5], unused2;
};

// A block of the cluster that runs.
struct Block {
    u32 ctaid[3];
    std::array<Barrier, 16> barriers;
    s64 free_registers = 0;
    bool exited = false;
    std::vector<std::pair<u32, u32>> visitors;  // [warp]: clock and pc of its last access from another block, or 0
    struct Step {                               // a wgmma, as the first warp of its warpgroup executed it
        u32 pc;
        u64 a, b;
        bool adds;
    };
    std::vector<std::vector<Step>> steps;  // [warpgroup]
};

struct ClusterBarrier {
    u32 completed = 0;
    Published gathered, released;
};

// Ordinary writes up to these clocks are visible to the asynchronous proxy, by warp and by thread.
struct Proxied {
    Clocks warp, thread;
};

struct Machine {
    const Program* program = nullptr;
    bool asynchronous = false, warpgroups = false;  // as in the program
    u32 grid[3], block_size[3];
    u32 cluster[3] = {1, 1, 1}, cluster_blocks = 1;
    s32 block = 0;  // linear index of the cluster that runs; a block is a cluster of one, unless the launch says more
    Random random{0};
    std::vector<Warp> warps;  // those of all blocks of the cluster, block by block
    std::vector<Block> blocks;
    size_t block_warps = 0;                // warps of one block
    std::vector<u8> shared, shared_state;  // that of all blocks of the cluster; state: kAllocated | kInitialised | ...
    u32 shared_stride = 0;                 // bytes from the shared memory of one block to the next
    std::vector<Region> shared_regions;
    u32 dynamic_shared = 0, total_shared = 0;
    std::vector<Shadow> shared_shadow;
    std::vector<u8> param, param_state, local_state;
    std::vector<Buffer> buffers;
    std::unordered_map<u64, Published> released;  // by generic address
    u64 pending_copies = 0;
    // The asynchronous machine: mbarriers by place, bulk copies under way, the asynchronous readers of each 16 bytes of
    // shared memory, and the clocks of agents, which follow those of the warps and of the grid before (grid_agent).
    std::map<u32, Mbarrier> mbarriers;
    std::deque<BulkCopy> bulk;
    std::vector<u16> readers;
    std::vector<u32> agents;
    u32 agents_used = 0;
    ClusterBarrier cluster_barrier;
    std::array<Proxied, 2> proxied;  // of shared memory, of global memory
    std::vector<TensorMap> tensor_maps;
    u32 registers_at_entry = 0;
    bool yields = false;  // an instruction sets it to end the warp's turn
    bool polls = false;   // a wait has failed without blocking, so copies must land although some warp can go on
    bool has_dependent = false, explicit_cluster = false;
    bool collectives_order = false;
    std::vector<Count> counts;
    u64 executed = 0, limit = 0;

    u64* row(Warp& w, s32 r) const { return w.registers.data() + static_cast<size_t>(r) * kLanes; }
    Block& block_of(const Warp& w) { return blocks[static_cast<size_t>(w.block)]; }
    const Block& block_of(const Warp& w) const { return blocks[static_cast<size_t>(w.block)]; }
    size_t grid_agent() const { return warps.size(); }  // known to those who are ordered after griddepcontrol.wait
    const u64* in(const Warp& w, s32 r) const {
        return r >= 0 ? w.registers.data() + static_cast<size_t>(r) * kLanes : program->constants[~r].data();
    }
};

template <class F>
inline void for_lanes(u32 mask, F&& f) {
    if (mask == kAll) {
        for (int lane = 0; lane < kLanes; ++lane) f(lane);
    } else {
        for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
    }
}

// ---- Synchronizing events -------------------------------------------------------------------------------------------
// Returns what the lanes of `mask` know and did.
inline Published knowledge(const Warp& w, u32 mask) {
    Published p = w.order.known.all;
    w.order.known.for_own(mask, [&](const Published& own) { merge(p, own); });
    const size_t id = static_cast<size_t>(w.id);
    if ((w.lanes & ~mask) == 0) {
        p.known.set(id, w.clock);
        return p;
    }
    p.known.set(id, w.order.all_lanes);
    LaneClocks& lanes = p.known.lanes[id];
    lanes.fill(w.order.all_lanes);
    for (size_t j = 0; j < kLanes; ++j) {
        for_lanes(mask, [&](int l) { lanes[j] = std::max(lanes[j], w.order.lane[l][j]); });
        if ((mask | ~w.lanes) >> j & 1) lanes[j] = w.clock;
    }
    return p;
}
inline Published publish(Warp& w, u32 mask) {
    Published p = knowledge(w, mask);
    ++w.clock;
    return p;
}
// Tells the lanes of `mask` what others published, among them perhaps other lanes of the warp.
inline void acquire(Warp& w, u32 mask, const Published& p) {
    if (p.block < 0) return;
    w.order.known.add(p, mask, w.living());
    const Knowledge* here = p.of(w.order.known.all.block);
    if (!here) return;
    const size_t id = static_cast<size_t>(w.id);
    if (id < here->whole.size() && here->whole[id] > w.order.all_lanes) {
        if ((w.living() & ~mask) == 0) {
            w.order.all_lanes = here->whole[id];
        } else {
            for_lanes(mask, [&](int l) {
                for (u32& clock : w.order.lane[l]) clock = std::max(clock, here->whole[id]);
            });
        }
    }
    if (const auto found = here->lanes.find(id); found != here->lanes.end())
        for_lanes(mask, [&](int l) {
            for (size_t j = 0; j < kLanes; ++j) w.order.lane[l][j] = std::max(w.order.lane[l][j], found->second[j]);
        });
}
// The lanes of `mask` have met: afterwards each knows everything that any of them knew and did.
inline void meet(Warp& w, u32 mask) {
    if (w.order.known.lanes & mask) {
        Published together;
        w.order.known.for_own(mask, [&](const Published& p) { merge(together, p); });
        w.order.known.forget_own(mask);
        w.order.known.add(together, mask, w.living());
    }
    if ((w.lanes & ~mask) == 0) {
        w.order.all_lanes = w.clock;
    } else {
        std::array<u32, kLanes> best{};
        for_lanes(mask, [&](int i) {
            for (int j = 0; j < kLanes; ++j) best[j] = std::max(best[j], w.order.lane[i][j]);
        });
        for_lanes(mask, [&](int j) { best[j] = w.clock; });
        for_lanes(mask, [&](int i) { w.order.lane[i] = best; });
    }
    ++w.clock;
}

}  // namespace ptx
