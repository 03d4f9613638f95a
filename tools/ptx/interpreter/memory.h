// Accesses to memory are checked for bounds, alignment, initialised bytes and races; bank conflicts and sectors are
// counted.
// PTX ISA, sections "State Spaces", "Generic Addressing" and "Memory Consistency Model".
#pragma once
#include "machine.h"

namespace ptx {

// A shared address is an offset from kSharedStart (nothing lies at 0, as on sm_90). The generic windows and the buffers
// are so far apart that a truncated or mixed-up address lies in none.
inline constexpr u32 kSharedStart = 1024, kLocalStart = 64, kParamStart = 64;
inline constexpr u64 kSharedWindow = u64{1} << 33, kLocalWindow = u64{2} << 33, kParamWindow = u64{3} << 33;
inline constexpr u64 kWindowSize = u64{1} << 32;
inline constexpr int kBufferShift = 36;
// An address in the shared memory of a given block of the cluster has the block's rank + 1 above these bits.
inline constexpr int kRankShift = 24;

// kPending: an asynchronous copy writes here. kBarrier: the byte belongs to an mbarrier.
inline constexpr u8 kAllocated = 1, kInitialised = 2, kPending = 4, kBarrier = 8;

// ---- Races ----------------------------------------------------------------------------------------------------------
// A record holds the last write of a byte and up to three reads that nothing has ordered yet. A word's four bytes share
// the first record until an access touches fewer of them.
inline constexpr int kWarpBits = 11;  // warps and agents of a cluster
struct Read {
    s32 block;
    u32 clock, lanes, pc_warp;  // `lanes` is 0 for a wgmma
    int warp() const { return pc_warp & ((1 << kWarpBits) - 1); }
    u32 pc() const { return pc_warp >> kWarpBits; }
};
struct Record {
    s32 block;  // the block, clock, pc and thread are those of the write
    u32 clock, pc;
    u16 thread;
    u8 flags, reads;
    Read read[3];
};
inline constexpr u8 kWritten = 1, kStrong = 2, kAsyncProxy = 4;
struct Shadow {
    Record whole;
    Record* bytes;  // four records once split
};

// Shared memory belongs to one cluster: its records hold this instead of a number, and clocks tell them from those of
// earlier blocks.
inline constexpr s32 kThisBlock = -1;

// These stand for a lane. An access by kAllLanes is one by each lane of the warp. kTogether marks the reads of a wgmma,
// which the lanes make together: each of them has waited for its end.
inline constexpr int kAllLanes = -1, kTogether = -2;

inline bool ordered(const Machine& m, const Warp& w, int lane, s32 block, int warp, u32 lanes, u32 clock) {
    const size_t from = static_cast<size_t>(warp);
    if (block != m.block && block != kThisBlock) return w.knows(lane, block, from, lanes, clock);
    if (warp != w.id) {
        const Known& known = w.order.known;
        if (from < known.all.known.whole.size() && clock <= known.all.known.whole[from]) return true;
        if (known.all.known.lanes.empty() && !known.lanes) return false;
        return w.knows(lane, m.block, from, lanes, clock);
    }
    if (clock <= w.order.all_lanes) return true;
    // If all lanes make the access, each must know.
    for (int i = lane < 0 ? 0 : lane; i < (lane < 0 ? kLanes : lane + 1); ++i) {
        u32 others = lanes & ~(1u << i);
        for (; others; others &= others - 1)
            if (w.order.lane[i][std::countr_zero(others)] < clock) return false;
    }
    return true;
}

// `thread` counts the threads of a cluster, whose blocks have whole warps; agents of mbarriers follow.
inline std::string thread_text(const Machine& m, s32 block, int thread);
inline std::string at_pc(u32 pc) { return "\x01" + std::to_string(pc) + "\x02"; }  // machine.py replaces it by a line

[[noreturn]] inline void race(const Machine& m, const char* kind, int lane, const char* what, s32 block, int thread,
                              u32 pc, const std::string& where) {
    fault(lane, kind,
          std::string(what) + " of " + where + " is not ordered after the access by " + thread_text(m, block, thread) +
              " at " + at_pc(pc));
}

template <class Where>
void record_access(const Machine& m, const Warp& w, int lane, s32 block, Record& r, bool write, bool strong,
                   const char* kind, const Where& where) {
    if (r.flags & kWritten && !(strong && r.flags & kStrong) &&
        !ordered(m, w, lane, r.block, r.thread / kLanes, 1u << r.thread % kLanes, r.clock)) {
        race(m, kind, lane, write ? "the write" : "the read", r.block, r.thread, r.pc, where());
    }
    if (write) {
        for (int i = 0; i < r.reads; ++i) {
            const Read& read = r.read[i];
            if (!ordered(m, w, lane, read.block, read.warp(), read.lanes, read.clock)) {
                u32 others = read.lanes;
                if (read.warp() == w.id && lane >= 0) others &= ~(1u << lane);
                const int other = read.warp() * kLanes + (others ? std::countr_zero(others) : 0);
                race(m, kind, lane, "the write", read.block, other, read.pc(), where());
            }
        }
        r.reads = 0;
        r.block = block;
        r.clock = w.clock;
        r.pc = w.now;
        r.thread = static_cast<u16>(w.thread(std::max(lane, 0)));
        r.flags = static_cast<u8>(kWritten | (strong ? kStrong : 0));
        return;
    }
    if (strong) return;
    const u32 lanes = lane >= 0 ? 1u << lane : lane == kTogether ? 0 : kAll;
    for (int i = 0; i < r.reads; ++i) {
        Read& read = r.read[i];
        if (read.block == block && read.warp() == w.id && read.clock == w.clock) {
            read.lanes |= lanes;
            return;
        }
    }
    // A read that is ordered before this one needs no record: an access after this one is ordered after that one too.
    int kept = 0;
    for (int i = 0; i < r.reads; ++i)
        if (!ordered(m, w, lane, r.read[i].block, r.read[i].warp(), r.read[i].lanes, r.read[i].clock))
            r.read[kept++] = r.read[i];
    if (kept == 3) {
        r.read[0] = r.read[1];
        r.read[1] = r.read[2];
        kept = 2;
    }
    r.read[kept] = {block, w.clock, lanes, w.now << kWarpBits | static_cast<u32>(w.id)};
    r.reads = static_cast<u8>(kept + 1);
}

// `shadow` has one entry for each 4-byte word, from `offset` 0 on.
template <class Where>
void check_race(const Machine& m, const Warp& w, int lane, Shadow* shadow, u64 offset, u32 bytes, bool write,
                bool strong, const char* kind, const Where& where) {
    const s32 block = shadow == m.shared_shadow.data() ? kThisBlock : m.block;
    while (bytes) {
        Shadow& word = shadow[offset / 4];
        const u32 first = offset % 4, count = std::min<u32>(4 - first, bytes);
        if (!word.bytes && count == 4) {
            record_access(m, w, lane, block, word.whole, write, strong, kind, where);
        } else {
            if (!word.bytes) {
                word.bytes = new Record[4];
                std::fill_n(word.bytes, 4, word.whole);
            }
            for (u32 i = first; i < first + count; ++i)
                record_access(m, w, lane, block, word.bytes[i], write, strong, kind, where);
            if (write && count == 4) {
                word.whole = word.bytes[0];
                delete[] word.bytes;
                word.bytes = nullptr;
            }
        }
        offset += count;
        bytes -= count;
    }
}

// Returns the place in the grid of the block `rank` of a cluster.
inline std::array<u32, 3> block_index(const Machine& m, s32 cluster, u32 rank) {
    std::array<u32, 3> at{};
    u32 c = static_cast<u32>(cluster);
    for (int k = 0; k < 3; ++k) {
        const u32 clusters = m.grid[k] / m.cluster[k];
        at[static_cast<size_t>(k)] = c % clusters * m.cluster[k] + rank % m.cluster[k];
        c /= clusters, rank /= m.cluster[k];
    }
    return at;
}
inline std::string block_text(const std::array<u32, 3>& at) {
    return "block (" + std::to_string(at[0]) + "," + std::to_string(at[1]) + "," + std::to_string(at[2]) + ")";
}
inline std::string thread_text(const Machine& m, s32 block, int thread) {
    const u32 padded = static_cast<u32>(m.block_warps) * kLanes;
    const u32 rank = static_cast<u32>(thread) / padded;
    if (rank >= m.cluster_blocks) return "an asynchronous copy";
    const u32 x = m.block_size[0], y = m.block_size[1];
    const u32 t = static_cast<u32>(thread) % padded;
    std::string text =
        "thread (" + std::to_string(t % x) + "," + std::to_string(t / x % y) + "," + std::to_string(t / x / y) + ")";
    if (block == kThisBlock) block = m.block;
    if (block != m.block || m.cluster_blocks > 1) text += " of " + block_text(block_index(m, block, rank));
    return text;
}

// ---- Spaces ---------------------------------------------------------------------------------------------------------
struct Place {  // the place of an access whose address is resolved
    Space space;
    Buffer* buffer;
    u64 offset;  // offset in the buffer, or in the bytes of the space
    u8* data;
    u8* state;  // kInitialised bits of shared, local or param memory; null for a buffer
};

inline const char* name_of(Space space) {
    static constexpr const char* kNames[] = {"generic", "global", "const", "shared", "local", "param", "cluster"};
    return kNames[static_cast<int>(space)];
}

[[noreturn]] inline void out_of_bounds(const Machine& m, int lane, Space space, u64 address, u32 bytes) {
    std::string message =
        std::to_string(bytes) + " bytes at " + name_of(space) + " address " + hex(address) + " lie in no allocation";
    if (space == Space::kGlobal || space == Space::kGeneric || space == Space::kConst) {
        const u64 index = (address >> kBufferShift) - 1;
        if (index < m.buffers.size()) {
            const Buffer& b = m.buffers[index];
            const s64 offset = static_cast<s64>(address - b.base);
            message += ": byte " + std::to_string(offset) + " of '" + b.name + "', which has " + std::to_string(b.size);
        }
    } else if (space == Space::kShared || space == Space::kCluster) {
        message += ": byte " + std::to_string(static_cast<s64>(address & ((1u << kRankShift) - 1)) - kSharedStart) +
                   " of shared memory, which has " + std::to_string(m.total_shared);
        if (space == Space::kShared && address >> kRankShift)
            message += "; the address belongs to another block of the cluster";
    }
    fault(lane, "out of bounds", message);
}

// Checks an access to another block's shared memory: the block must have started, and must not exit before.
PTX_OUT_OF_LINE inline void visit(Machine& m, Warp& w, int lane, u32 rank) {
    Block& block = m.blocks[rank];
    const std::string name = block_text({block.ctaid[0], block.ctaid[1], block.ctaid[2]});
    if (block.exited) fault(lane, "cluster", "the shared memory of " + name + " is accessed, which has exited");
    // Whoever has passed a barrier of the cluster knows that all its blocks arrived there, even if they did so relaxed.
    bool started = lane >= 0 && w.cluster_waits[static_cast<size_t>(lane)] > 0;
    for (size_t k = rank * m.block_warps; k < (rank + 1) * m.block_warps; ++k)
        started = started || w.reaches(lane, k, m.warps[k].start);
    if (!started)
        fault(lane, "cluster",
              "the shared memory of " + name + " is accessed before anything ensures that the block has started");
    block.visitors.resize(m.warps.size());
    block.visitors[static_cast<size_t>(w.id)] = {w.clock, w.now};
}

// Returns the place in Machine::shared of `bytes` bytes at a shared address; `space` is kShared or kCluster.
inline u64 shared_range(Machine& m, Warp& w, int lane, Space space, u64 address, u64 bytes) {
    u64 rank = static_cast<u64>(w.block), at = address;
    if (at >> kRankShift) [[unlikely]] {
        const u64 other = (at >> kRankShift) - 1;
        at &= (1u << kRankShift) - 1;
        if (other >= m.cluster_blocks || address >> 32 || (space == Space::kShared && other != rank))
            out_of_bounds(m, lane, space, address, static_cast<u32>(bytes));
        if (other != rank) visit(m, w, lane, static_cast<u32>(other));
        rank = other;
    }
    const u64 offset = at - kSharedStart;
    if (offset >= m.shared_stride || offset + bytes > m.shared_stride)
        out_of_bounds(m, lane, space, address, static_cast<u32>(bytes));
    const u64 base = rank * m.shared_stride + offset;
    const u8* state = m.shared_state.data() + base;
    u8 allocated = kAllocated;
    for (u64 i = 0; i < bytes; ++i) allocated &= state[i];
    if (!allocated) out_of_bounds(m, lane, space, address, static_cast<u32>(bytes));
    return base;
}

inline Place resolve(Machine& m, Warp& w, int lane, Space space, u64 address, u32 bytes) {
    const u64 asked = address;
    const Space asked_space = space;
    if (space == Space::kGeneric) {
        if (address - kSharedWindow < kWindowSize) {
            space = Space::kCluster;
            address -= kSharedWindow;
        } else if (address - kLocalWindow < kWindowSize) {
            space = Space::kLocal;
            address -= kLocalWindow;
        } else if (address - kParamWindow < kWindowSize) {
            space = Space::kParam;
            address -= kParamWindow;
        } else {
            space = Space::kGlobal;
        }
    }
    if (address % bytes != 0) {
        fault(lane, "misaligned",
              std::to_string(bytes) + " bytes at " + name_of(asked_space) + " address " + hex(asked) +
                  " are not aligned to " + std::to_string(bytes));
    }
    if (space == Space::kGlobal || space == Space::kConst) {
        const u64 index = (address >> kBufferShift) - 1;
        if (index >= m.buffers.size()) out_of_bounds(m, lane, asked_space, asked, bytes);
        Buffer& b = m.buffers[index];
        const u64 offset = address - b.base;
        const bool in_space = asked_space == Space::kGeneric || (space == Space::kConst) == (b.constant != 0);
        if (offset >= b.size || offset + bytes > b.size || !in_space) out_of_bounds(m, lane, asked_space, asked, bytes);
        return {space, &b, offset, b.data + offset, nullptr};
    }
    if (space == Space::kShared || space == Space::kCluster) {
        const u64 at = shared_range(m, w, lane, space, address, bytes);
        return {Space::kShared, nullptr, at, m.shared.data() + at, m.shared_state.data() + at};
    }
    const u32 start = space == Space::kLocal ? kLocalStart : kParamStart;
    const u64 offset = address - start;
    std::vector<u8>& data = space == Space::kLocal ? w.local : m.param;
    std::vector<u8>& state = space == Space::kLocal ? w.local_state : m.param_state;
    const u64 lanes = space == Space::kLocal ? kLanes : 1;
    const u64 size = data.size() / lanes, base = space == Space::kLocal ? size * lane : 0;
    if (offset >= size || offset + bytes > size) out_of_bounds(m, lane, asked_space, asked, bytes);
    for (u32 i = 0; i < bytes; ++i)
        if (!(state[base + offset + i] & kAllocated)) out_of_bounds(m, lane, asked_space, asked, bytes);
    return {space, nullptr, base + offset, data.data() + base + offset, state.data() + base + offset};
}

inline std::string shared_text(const Machine& m, u64 at) {
    std::string text = "byte " + std::to_string(at % m.shared_stride) + " of shared memory";
    if (m.cluster_blocks > 1) {
        const Block& block = m.blocks[at / m.shared_stride];
        text += " of " + block_text({block.ctaid[0], block.ctaid[1], block.ctaid[2]});
    }
    return text;
}
inline std::string where_text(const Machine& m, const Place& p, u64 at) {
    if (p.buffer) return "byte " + std::to_string(at) + " of '" + p.buffer->name + "'";
    if (p.space == Space::kShared) return shared_text(m, at);
    return std::string("byte ") + std::to_string(at) + " of " + name_of(p.space) + " memory";
}

// ---- The asynchronous proxy: PTX ISA, sections "Proxies" and "Async proxy" -----------------------------------------
// Memory that the kernel before may still use may be touched only after griddepcontrol.wait.
PTX_OUT_OF_LINE inline void check_dependent(const Machine& m, const Warp& w, int lane, const Buffer& b, u64 offset,
                                            bool write, bool read_only) {
    const std::string where = "byte " + std::to_string(offset) + " of '" + b.name + "'";
    if (!w.knows(lane, m.block, m.grid_agent(), 0, 1))
        fault(lane, "dependent launch",
              where + (write ? " is written" : " is read") +
                  " before griddepcontrol.wait, while the kernel before may still use it");
    if (read_only)
        fault(lane, "dependent launch",
              where + " is read by ld.global.nc, though the kernel before may write it while this one runs");
}
// An access to global memory must leave the destinations of bulk stores alone, and a write their sources too.
PTX_OUT_OF_LINE inline void check_stores(const Machine& m, int lane, const Buffer& b, u64 offset, u64 bytes,
                                         bool write) {
    for (const BulkCopy& copy : m.bulk) {
        if (copy.kind != BulkCopy::kStore && !write) continue;
        for (const Piece& piece : copy.pieces) {
            if (piece.buffer != &b || offset >= piece.offset + piece.bytes || piece.offset >= offset + bytes) continue;
            const bool store = copy.kind == BulkCopy::kStore;
            fault(lane, "asynchronous copy",
                  "byte " + std::to_string(offset) + " of '" + b.name + "' is " + (write ? "written" : "read") +
                      " while the copy at " + at_pc(copy.pc) + " of " +
                      thread_text(m, m.block, copy.warp * kLanes + copy.lane) +
                      (store ? " has not been waited for" : " may still read it"));
        }
    }
}
// An access to shared memory must not touch an mbarrier, and a write must not touch what is read asynchronously.
[[noreturn]] inline void read_in_flight(const Machine& m, int lane, u32 chunk) {
    const std::string where = "byte " + std::to_string(16 * chunk % m.shared_stride) + " of shared memory is written";
    for (const BulkCopy& copy : m.bulk)
        for (const u32 c : copy.chunks)
            if (c == chunk && !copy.read)
                fault(lane, "asynchronous copy",
                      where + " while the copy at " + at_pc(copy.pc) + " of " +
                          thread_text(m, m.block, copy.warp * kLanes + copy.lane) + " may still read it");
    for (const Warp& w : m.warps)
        for (const WarpgroupProduct& product : w.products)
            for (const u32 c : product.chunks)
                if (c == chunk)
                    fault(lane, "warpgroup",
                          where + " while the wgmma at " + at_pc(product.pc) + " of " +
                              thread_text(m, m.block, w.thread(0)) + " and its warp may still read it");
    throw std::logic_error("an asynchronous reader is missing");
}
PTX_OUT_OF_LINE inline void check_asynchronous(const Machine& m, int lane, u64 at, u64 bytes, bool write) {
    for (u64 k = at; k < at + bytes; ++k)
        if (m.shared_state[k] & kBarrier)
            fault(lane, "mbarrier", shared_text(m, k) + " belongs to an mbarrier, and is accessed as ordinary memory");
    if (!write) return;
    for (u64 chunk = at / 16; chunk <= (at + bytes - 1) / 16; ++chunk)
        if (m.readers[chunk]) read_in_flight(m, lane, static_cast<u32>(chunk));
}
// Reports the bulk copy that writes to these bytes, if there is one.
PTX_OUT_OF_LINE inline void pending_copy(const Machine& m, int lane, u64 at, u64 bytes, bool write) {
    for (const BulkCopy& copy : m.bulk) {
        if (copy.kind == BulkCopy::kStore || copy.kind == BulkCopy::kArrive) continue;
        if (at < u64{copy.at} + copy.bytes && copy.at < at + bytes)
            fault(lane, "asynchronous copy",
                  shared_text(m, at) + (write ? " is written" : " is read") + " while the copy at " + at_pc(copy.pc) +
                      " of " + thread_text(m, m.block, copy.warp * kLanes + copy.lane) + " is under way");
    }
}
// Ordinary writes must pass fence.proxy.async before an asynchronous access.
template <class Where>
void check_proxy(const Machine& m, int lane, const Record& r, const char* what, const Where& where) {
    if (!(r.flags & kWritten) || r.flags & kAsyncProxy || (r.block != m.block && r.block != kThisBlock)) return;
    const size_t warp = r.thread / kLanes;
    const Proxied& p = m.proxied[r.block == kThisBlock ? 0 : 1];
    if (warp < p.warp.size() && r.clock <= p.warp[warp]) return;
    if (r.thread < p.thread.size() && r.clock <= p.thread[r.thread]) return;
    fault(lane, "proxy",
          where() + " is " + what + " asynchronously, but no fence.proxy.async follows its ordinary write by " +
              thread_text(m, r.block, r.thread) + " at " + at_pc(r.pc));
}
template <class F>
void for_records(Shadow* shadow, u64 at, u64 bytes, F&& f) {
    for (u64 k = at; k < at + bytes;) {
        Shadow& word = shadow[k / 4];
        if (!word.bytes) {
            f(word.whole, k);
            k = (k / 4 + 1) * 4;
        } else {
            f(word.bytes[k % 4], k);
            ++k;
        }
    }
}
// Checks an asynchronous read of shared memory by lane `lane` (-1: all lanes of the warp).
inline void check_async_read(Machine& m, Warp& w, int lane, u64 at, u64 bytes, bool initialised) {
    for (u64 k = at; k < at + bytes; ++k) {
        const u8 state = m.shared_state[k];
        if (state & kPending) {
            pending_copy(m, lane, k, 1, false);
            fault(lane, "asynchronous copy", shared_text(m, k) + " is read while a cp.async to it is under way");
        }
        if (state & kBarrier)
            fault(lane, "mbarrier", shared_text(m, k) + " belongs to an mbarrier, and is read by a copy or a wgmma");
        if (initialised && !(state & kInitialised))
            fault(lane, "uninitialised memory", shared_text(m, k) + " is read before anything wrote it");
    }
    for_records(m.shared_shadow.data(), at, bytes, [&](Record& r, u64 k) {
        if (r.flags & kWritten && !ordered(m, w, lane, r.block, r.thread / kLanes, 1u << r.thread % kLanes, r.clock))
            race(m, "race on shared memory", lane, "the asynchronous read", r.block, r.thread, r.pc, shared_text(m, k));
        if (r.flags & kWritten) check_proxy(m, lane, r, "read", [&] { return shared_text(m, k); });
    });
}

struct Access {
    bool write = false, read = true, strong = false, nc = false, whole_warp = false, async = false;
};

// Checks one access: whether it may write, and whether its bytes are initialised, in flight or racing. Returns the
// place.
inline Place access(Machine& m, Warp& w, int lane, Space space, u64 address, u32 bytes, Access how) {
    Place p = resolve(m, w, lane, space, address, bytes);
    const int by = how.whole_warp ? kAllLanes : lane;
    if (p.buffer) {
        Buffer& b = *p.buffer;
        if (m.has_dependent && b.dependent) check_dependent(m, w, lane, b, p.offset, how.write, how.nc);
        if (m.asynchronous) [[unlikely]]
            check_stores(m, lane, b, p.offset, bytes, how.write);
        if (how.write && !b.writable)
            fault(lane, "read-only", where_text(m, p, p.offset) + " is written, which is an input");
        if (how.read && b.initialised) {
            for (u32 i = 0; i < bytes; ++i)
                if (!b.initialised[p.offset + i])
                    fault(lane, "uninitialised memory",
                          where_text(m, p, p.offset + i) + " is read before anything wrote it");
        }
        if (b.shadow) {
            if (how.nc) {
                for (u32 i = 0; i < bytes; ++i) {
                    const Shadow& word = b.shadow[(p.offset + i) / 4];
                    const Record& r = word.bytes ? word.bytes[(p.offset + i) % 4] : word.whole;
                    if (r.flags & kWritten)
                        fault(lane, "read-only",
                              where_text(m, p, p.offset + i) + " is read by ld.global.nc after this kernel wrote it");
                }
            }
            check_race(m, w, by, b.shadow, p.offset, bytes, how.write, how.strong, "race on global memory",
                       [&] { return where_text(m, p, p.offset); });
            if (how.write && m.pending_copies) {
                for (const Warp& other : m.warps)
                    for (int j = 0; j < kLanes; ++j)
                        for (const AsyncCopy& copy : other.copies[j])
                            if (copy.source_bytes && address < copy.source + copy.source_bytes &&
                                copy.source < address + bytes)
                                fault(lane, "asynchronous copy",
                                      where_text(m, p, p.offset) + " is written while the cp.async at " +
                                          at_pc(copy.pc) + " of " + thread_text(m, m.block, other.thread(j)) +
                                          " may still read it");
            }
        }
        if (how.write && b.initialised) std::memset(b.initialised + p.offset, 1, bytes);
        return p;
    }
    if (how.write && p.space == Space::kParam) fault(lane, "read-only", "a kernel parameter is written");
    if (m.asynchronous && p.space == Space::kShared) check_asynchronous(m, lane, p.offset, bytes, how.write);
    u8 together = 0xff, any = 0;
    for (u32 i = 0; i < bytes; ++i) {
        together &= p.state[i];
        any |= p.state[i];
    }
    if (any & kPending) {
        pending_copy(m, lane, p.offset, bytes, how.write);
        for (const Warp& other : m.warps)
            for (int j = 0; j < kLanes; ++j)
                for (const AsyncCopy& copy : other.copies[j]) {
                    const u32 from = copy.shared;
                    if (p.offset < from + copy.bytes && from < p.offset + bytes)
                        fault(lane, "asynchronous copy",
                              where_text(m, p, p.offset) + (how.write ? " is written" : " is read") +
                                  " while the cp.async at " + at_pc(copy.pc) + " of " +
                                  thread_text(m, m.block, other.thread(j)) + " has not been waited for");
                }
    }
    if (how.read && !(together & kInitialised)) {
        u32 i = 0;
        while (p.state[i] & kInitialised) ++i;
        fault(lane, "uninitialised memory", where_text(m, p, p.offset + i) + " is read before anything wrote it");
    }
    if (p.space == Space::kShared) {
        check_race(m, w, by, m.shared_shadow.data(), p.offset, bytes, how.write, how.strong, "race on shared memory",
                   [&] { return where_text(m, p, p.offset); });
    }
    if (how.write && !how.async)
        for (u32 i = 0; i < bytes; ++i) p.state[i] |= kInitialised;
    return p;
}

// ---- Counting -------------------------------------------------------------------------------------------------------
// Shared memory has 32 banks of 4 bytes. Lanes that ask for 128 bytes in all are served together: all lanes at up to 4
// bytes a lane, half warps at 8, quarter warps at 16. A wavefront serves one word of each bank, to all that ask for it.
inline void count_banks(Count& count, const u64* address, u32 mask, u32 bytes) {
    const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    const u32 words = std::max<u32>(bytes / 4, 1);
    for (int first = 0; first < kLanes; first += together) {
        u64 held[32][32];
        u8 number[32] = {};
        u32 most = 0;
        for (int lane = first; lane < first + together; ++lane) {
            if (!(mask >> lane & 1)) continue;
            for (u32 i = 0; i < words; ++i) {
                const u64 word = address[lane] / 4 + i;
                const u32 bank = word % 32;
                u32 k = 0;
                while (k < number[bank] && held[bank][k] != word) ++k;
                if (k < number[bank]) continue;
                held[bank][number[bank]++] = word;
                most = std::max<u32>(most, number[bank]);
            }
        }
        count.wavefronts += most;
        count.wavefronts_least += most > 0;
    }
}

// Counts the 32-byte sectors of global memory that were touched, and the fewest that could hold the bytes asked for.
inline void count_sectors(Count& count, const u64* address, u32 mask, u32 bytes) {
    u64 sorted[kLanes];
    int n = 0;
    for_lanes(mask, [&](int lane) { sorted[n++] = address[lane]; });
    if (!std::is_sorted(sorted, sorted + n)) std::sort(sorted, sorted + n);
    u64 sectors = 0, needed = 0, end = 0, last = ~u64{0};
    for (int i = 0; i < n; ++i) {
        const u64 from = std::max(sorted[i], end), to = sorted[i] + bytes;
        if (to > from) needed += to - from;
        end = std::max(end, to);
        for (u64 sector = sorted[i] / 32; sector <= (to - 1) / 32; ++sector) {
            if (last == ~u64{0} || sector > last) {
                ++sectors;
                last = sector;
            }
        }
    }
    count.sectors += sectors;
    count.sectors_least += (needed + 31) / 32;
}

}  // namespace ptx
