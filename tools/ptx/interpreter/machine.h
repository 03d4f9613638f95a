// The machine: programs as decoded instructions, warps, blocks, and the clocks that say what is ordered before what.
// PTX ISA, section "PTX Machine Model".
#pragma once
#include <array>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "values.h"

namespace ptx {

struct Machine;
struct Warp;
struct Instr;

inline constexpr int kLanes = 32;
inline constexpr u32 kAll = ~0u;

// What stops a run. `lane` is -1 where the whole warp is meant.
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

// An operand as the parser hands it over. A vector is its header and then its `count` elements.
struct Operand {
    s32 kind;    // OperandKind
    s32 reg;     // register of kRegister, kAddress (-1: none)
    s32 count;   // elements of kVector; 1 for a negated predicate
    s32 unused;  // keeps `value` aligned in every compiler's layout
    s64 value;   // immediate, offset, branch target, bits of a float literal
};
enum OperandKind { kRegister, kImmediate, kFloat32, kFloat64, kAddress, kVector, kLabel, kSink, kTargets };

using Handler = void (*)(Machine&, Warp&, const Instr&, u32 mask);

enum class Flow : u8 {
    kNext,        // executes on the lanes at this pc, which then go on to the next instruction
    kBranch,      // sets the lanes' pc itself
    kCollective,  // .sync: executes once all lanes of its member mask are here
};

enum class Space : u8 { kGeneric, kGlobal, kConst, kShared, kLocal, kParam };

struct Instr {
    Handler run = nullptr;
    Flow flow = Flow::kNext;
    bool copies = false;  // uninitialised registers may be read: the result is as uninitialised as the source
    bool guard_negated = false;
    s32 guard = -1;   // predicate register
    s32 members = 0;  // kCollective: row of the member mask; with `aligned` all 32 lanes
    bool aligned = false;
    std::vector<s32> d, s;    // rows: registers >= 0, constants < 0 (~index); s32 kNoRow for a sink
    std::vector<u8> negated;  // of s: a predicate operand with !
    u64 d_mask = ~u64{0};     // width of d[0]'s register
    // What the families keep: an offset, a space, a size, small numbers.
    s64 offset = 0, offset2 = 0;
    Space space = Space::kGeneric;
    u8 bytes = 0;  // of one element of a memory access
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

// What is counted per instruction, in this order (machine.py names the columns).
struct Count {
    u64 warps = 0, threads = 0, wavefronts = 0, wavefronts_least = 0, sectors = 0, sectors_least = 0;
};

struct Program {
    std::vector<Instr> code;
    std::vector<std::array<u64, kLanes>> constants;
    std::vector<u8> bits;  // of each register
    std::vector<std::pair<s32, std::string>> specials;
    std::unordered_map<u64, s32> constant_index;

    s32 constant(u64 value) {
        auto [at, fresh] = constant_index.try_emplace(value, static_cast<s32>(constants.size()));
        if (fresh) constants.emplace_back().fill(value);
        return ~at->second;
    }
};

// ---- What is ordered before what ------------------------------------------------------------------------------------
// A warp's clock counts its synchronizing events. An access is stamped with its thread and its warp's clock; a thread is
// ordered after it when it knows of that clock. Knowledge between warps is kept a warp (`known`), within a warp a lane.
// Clocks go on from one block to the next, so that a new block knows everything of its slot's past at once.
using Clocks = std::vector<u32>;

struct Order {
    Clocks known;       // [warp]: clock of that warp up to which all is ordered before us
    u32 all_lanes = 0;  // clock up to which every lane knows of every other
    std::array<std::array<u32, kLanes>, kLanes> lane{};  // [i][j]: what lane i knows of lane j beyond all_lanes
    std::map<s32, Clocks> blocks;                        // other blocks, through atomics and fences on global memory

    void join(const Order& other) {
        join(other.known);
        for (const auto& [block, clocks] : other.blocks) {
            Clocks& mine = blocks[block];
            mine.resize(clocks.size());
            for (size_t w = 0; w < clocks.size(); ++w) mine[w] = std::max(mine[w], clocks[w]);
        }
    }
    void join(const Clocks& other) {
        known.resize(std::max(known.size(), other.size()));
        for (size_t w = 0; w < other.size(); ++w) known[w] = std::max(known[w], other[w]);
    }
};

// What a release leaves at an address for those who acquire there, or a barrier gathers.
struct Published {
    s32 block = -1;
    Clocks known;
    std::map<s32, Clocks> blocks;
};

struct AsyncCopy {
    u64 group;  // kOpenGroup until committed
    u32 shared;
    u64 source;
    u32 bytes, source_bytes;
    u32 pc;
    std::array<u8, 16> data;
};
inline constexpr u64 kOpenGroup = ~u64{0};

struct Warp {
    int id = 0;
    u32 lanes = 0;  // that were launched
    u32 exited = 0;
    u32 at_barrier = 0;  // blocked at a barrier of the block
    u32 at_members = 0;  // blocked until the other members of a .sync instruction come
    std::array<u32, kLanes> pc{};
    std::array<u32, kLanes> blocked_pc{};
    std::array<s32, kLanes> barrier{};
    u32 carry = 0;  // the condition code register CC.CF, a bit a lane
    u32 now = 0;    // pc in execution
    u32 clock = 0;
    Order order;
    // What later strong writes release (by a fence of any scope; by one of at least .gpu), and what earlier strong reads
    // have seen, which a later fence acquires.
    Published fenced, fenced_gpu, acquired;
    bool has_fenced = false, has_fenced_gpu = false, has_acquired = false;
    std::vector<u64> registers;
    std::vector<u32> initialised;
    std::vector<u8> local, local_state;
    std::array<std::deque<AsyncCopy>, kLanes> copies;
    std::array<u64, kLanes> committed{};

    u32 runnable() const { return lanes & ~exited & ~at_barrier & ~at_members; }
    int thread(int lane) const { return id * kLanes + lane; }
};

struct Barrier {
    std::vector<u32> waiting;  // [warp]: lanes
    std::vector<u32> arrived;  // [warp]: lanes that came by bar.arrive, not waiting
    Published gathered;
    u32 expected = 0;  // threads, 0: all of the block
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
    u8* initialised;  // a byte each, or null: all of it is
    u32 writable, constant;
    const char* name;
    Shadow* shadow;  // of 4-byte words; null where nothing is ever written
};

struct Region {  // a variable in shared, local or parameter space
    u32 offset, size;
};

struct Machine {
    const Program* program = nullptr;
    u32 grid[3], block_size[3];
    u32 ctaid[3];
    s32 block = 0;  // linear index
    Random random{0};
    std::vector<Warp> warps;
    std::array<Barrier, 16> barriers;
    std::vector<u8> shared, shared_state;  // state: kAllocated | kInitialised | kPending
    std::vector<Region> shared_regions;
    u32 dynamic_shared = 0, total_shared = 0;
    std::vector<Shadow> shared_shadow;
    std::vector<u8> param, param_state, local_state;
    std::vector<Buffer> buffers;
    std::unordered_map<u64, Published> released;  // by address (shared ones in their generic window)
    u64 pending_copies = 0;
    bool collectives_order = false;
    std::vector<Count> counts;
    u64 executed = 0, limit = 0;

    u64* row(Warp& w, s32 r) const { return w.registers.data() + static_cast<size_t>(r) * kLanes; }
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
inline Published publish(Machine& m, Warp& w) {
    Published p{m.block, w.order.known, w.order.blocks};
    p.known[w.id] = w.clock;
    ++w.clock;
    return p;
}
inline void merge(std::map<s32, Clocks>& into, const std::map<s32, Clocks>& from) {
    for (const auto& [block, clocks] : from) {
        Clocks& mine = into[block];
        mine.resize(std::max(mine.size(), clocks.size()));
        for (size_t w = 0; w < clocks.size(); ++w) mine[w] = std::max(mine[w], clocks[w]);
    }
}
inline void merge(Clocks& into, const Clocks& from) {
    into.resize(std::max(into.size(), from.size()));
    for (size_t w = 0; w < from.size(); ++w) into[w] = std::max(into[w], from[w]);
}
// Adds what `from` says to `into`; clocks of another block than into's stay that block's.
inline void merge(Published& into, const Published& from) {
    if (into.block < 0) into.block = from.block;
    if (into.block == from.block) {
        merge(into.known, from.known);
    } else {
        merge(into.blocks, {{from.block, from.known}});
    }
    merge(into.blocks, from.blocks);
    if (auto own = into.blocks.find(into.block); own != into.blocks.end()) merge(into.known, own->second);
}
inline void acquire(Machine& m, Warp& w, const Published& p) {
    if (p.block == m.block) {
        merge(w.order.known, p.known);
    } else {
        merge(w.order.blocks, {{p.block, p.known}});
    }
    merge(w.order.blocks, p.blocks);
    if (auto own = w.order.blocks.find(m.block); own != w.order.blocks.end()) merge(w.order.known, own->second);
}
// The lanes of `mask` have met: each knows what any of them knew and did.
inline void meet(Warp& w, u32 mask) {
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
