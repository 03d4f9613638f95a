// Memory: bounds, alignment, initialised bytes, races, bank conflicts and sectors.
// PTX ISA, sections "State Spaces", "Generic Addressing" and "Memory Consistency Model".
#pragma once
#include <algorithm>

#include "machine.h"

namespace ptx {

// Addresses. A shared address is an offset from kSharedStart (nothing lies at 0, as on sm_90); the generic windows and
// the buffers are so far apart that a truncated or mixed-up address lies in none.
inline constexpr u32 kSharedStart = 1024, kLocalStart = 64, kParamStart = 64;
inline constexpr u64 kSharedWindow = u64{1} << 33, kLocalWindow = u64{2} << 33, kParamWindow = u64{3} << 33;
inline constexpr u64 kWindowSize = u64{1} << 32;
inline constexpr int kBufferShift = 36;

inline constexpr u8 kAllocated = 1, kInitialised = 2, kPending = 4;  // kPending: a cp.async writes here

// ---- Races ----------------------------------------------------------------------------------------------------------
// Of each byte the last write and up to three reads that nothing has ordered yet. A word's four bytes share the first
// record until an access touches fewer of them.
struct Read {
    s32 block;
    u32 clock, lanes, pc_warp;
    int warp() const { return pc_warp & 31; }
    u32 pc() const { return pc_warp >> 5; }
};
struct Record {
    s32 block;  // of the write
    u32 clock, pc;
    u16 thread;
    u8 flags, reads;
    Read read[3];
};
inline constexpr u8 kWritten = 1, kStrong = 2;
struct Shadow {
    Record whole;
    Record* bytes;  // four records once split
};

// Shared memory is one block's: its records say so instead of a number, and clocks tell them from an earlier block's.
inline constexpr s32 kThisBlock = -1;

inline bool ordered(const Machine& m, const Warp& w, int lane, s32 block, int warp, u32 lanes, u32 clock) {
    if (block != m.block && block != kThisBlock) {
        const auto other = w.order.blocks.find(block);
        return other != w.order.blocks.end() && clock <= other->second[warp];
    }
    if (warp != w.id) return clock <= w.order.known[warp];
    if (clock <= w.order.all_lanes) return true;
    // lane -1: the access is made by all lanes, each of which must know.
    for (int i = lane < 0 ? 0 : lane; i < (lane < 0 ? kLanes : lane + 1); ++i) {
        u32 others = lanes & ~(1u << i);
        for (; others; others &= others - 1)
            if (w.order.lane[i][std::countr_zero(others)] < clock) return false;
    }
    return true;
}

inline std::string thread_text(const Machine& m, s32 block, int thread);
inline std::string at_pc(u32 pc) { return "\x01" + std::to_string(pc) + "\x02"; }  // machine.py puts the lines in

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
                const int other = read.warp() * kLanes + std::countr_zero(others);
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
    const u32 lanes = lane < 0 ? kAll : 1u << lane;
    for (int i = 0; i < r.reads; ++i) {
        Read& read = r.read[i];
        if (read.block == block && read.warp() == w.id && read.clock == w.clock) {
            read.lanes |= lanes;
            return;
        }
    }
    // A read that is ordered before this one needs no record: who is ordered after this one is ordered after it too.
    int kept = 0;
    for (int i = 0; i < r.reads; ++i)
        if (!ordered(m, w, lane, r.read[i].block, r.read[i].warp(), r.read[i].lanes, r.read[i].clock))
            r.read[kept++] = r.read[i];
    if (kept == 3) {
        r.read[0] = r.read[1];
        r.read[1] = r.read[2];
        kept = 2;
    }
    r.read[kept] = {block, w.clock, lanes, w.now << 5 | static_cast<u32>(w.id)};
    r.reads = static_cast<u8>(kept + 1);
}

// `shadow` has one entry a 4-byte word, from `offset` 0 on.
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

inline std::string thread_text(const Machine& m, s32 block, int thread) {
    const u32 x = m.block_size[0], y = m.block_size[1];
    const u32 t = static_cast<u32>(thread), b = static_cast<u32>(block);
    std::string text =
        "thread (" + std::to_string(t % x) + "," + std::to_string(t / x % y) + "," + std::to_string(t / x / y) + ")";
    if (block != m.block && block != kThisBlock)
        text += " of block (" + std::to_string(b % m.grid[0]) + "," + std::to_string(b / m.grid[0] % m.grid[1]) + "," +
                std::to_string(b / m.grid[0] / m.grid[1]) + ")";
    return text;
}

// ---- Spaces ---------------------------------------------------------------------------------------------------------
struct Place {  // where an access lies once its address is resolved
    Space space;
    Buffer* buffer;
    u64 offset;  // in the buffer, or in the space's bytes
    u8* data;
    u8* state;  // kInitialised bits for shared, local, param; null in a buffer
};

inline const char* name_of(Space space) {
    static constexpr const char* kNames[] = {"generic", "global", "const", "shared", "local", "param"};
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
    } else if (space == Space::kShared) {
        message += ": byte " + std::to_string(static_cast<s64>(address) - kSharedStart) +
                   " of shared memory, which has " + std::to_string(m.total_shared);
    }
    fault(lane, "out of bounds", message);
}

inline Place resolve(Machine& m, Warp& w, int lane, Space space, u64 address, u32 bytes) {
    const u64 asked = address;
    const Space asked_space = space;
    if (space == Space::kGeneric) {
        if (address - kSharedWindow < kWindowSize) {
            space = Space::kShared;
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
    const u32 start = space == Space::kShared ? kSharedStart : space == Space::kLocal ? kLocalStart : kParamStart;
    const u64 offset = address - start;
    std::vector<u8>& data = space == Space::kShared ? m.shared : space == Space::kLocal ? w.local : m.param;
    std::vector<u8>& state = space == Space::kShared  ? m.shared_state
                             : space == Space::kLocal ? w.local_state
                                                      : m.param_state;
    const u64 lanes = space == Space::kLocal ? kLanes : 1;
    const u64 size = data.size() / lanes, base = space == Space::kLocal ? size * lane : 0;
    if (offset >= size || offset + bytes > size) out_of_bounds(m, lane, asked_space, asked, bytes);
    for (u32 i = 0; i < bytes; ++i)
        if (!(state[base + offset + i] & kAllocated)) out_of_bounds(m, lane, asked_space, asked, bytes);
    return {space, nullptr, base + offset, data.data() + base + offset, state.data() + base + offset};
}

inline std::string where_text(const Place& p, u64 at) {
    if (p.buffer) return "byte " + std::to_string(at) + " of '" + p.buffer->name + "'";
    return std::string("byte ") + std::to_string(at) + " of " + name_of(p.space) + " memory";
}

struct Access {
    bool write = false, read = true, strong = false, nc = false, whole_warp = false, async = false;
};

// All checks of one access: not written to, not initialised, in flight, racing. It then holds the place's bytes.
inline Place access(Machine& m, Warp& w, int lane, Space space, u64 address, u32 bytes, Access how) {
    Place p = resolve(m, w, lane, space, address, bytes);
    const int by = how.whole_warp ? -1 : lane;
    if (p.buffer) {
        Buffer& b = *p.buffer;
        if (how.write && !b.writable)
            fault(lane, "read-only", where_text(p, p.offset) + " is written, which is an input");
        if (how.read && b.initialised) {
            for (u32 i = 0; i < bytes; ++i)
                if (!b.initialised[p.offset + i])
                    fault(lane, "uninitialised memory",
                          where_text(p, p.offset + i) + " is read before anything wrote it");
        }
        if (b.shadow) {
            if (how.nc) {
                for (u32 i = 0; i < bytes; ++i) {
                    const Shadow& word = b.shadow[(p.offset + i) / 4];
                    const Record& r = word.bytes ? word.bytes[(p.offset + i) % 4] : word.whole;
                    if (r.flags & kWritten)
                        fault(lane, "read-only",
                              where_text(p, p.offset + i) + " is read by ld.global.nc after this kernel wrote it");
                }
            }
            check_race(m, w, by, b.shadow, p.offset, bytes, how.write, how.strong, "race on global memory",
                       [&] { return where_text(p, p.offset); });
            if (how.write && m.pending_copies) {
                for (const Warp& other : m.warps)
                    for (int j = 0; j < kLanes; ++j)
                        for (const AsyncCopy& copy : other.copies[j])
                            if (copy.source_bytes && address < copy.source + copy.source_bytes &&
                                copy.source < address + bytes)
                                fault(lane, "asynchronous copy",
                                      where_text(p, p.offset) + " is written while the cp.async at " + at_pc(copy.pc) +
                                          " of " + thread_text(m, m.block, other.thread(j)) + " may still read it");
            }
        }
        if (how.write && b.initialised) std::memset(b.initialised + p.offset, 1, bytes);
        return p;
    }
    if (how.write && p.space == Space::kParam) fault(lane, "read-only", "a kernel parameter is written");
    u8 together = 0xff, any = 0;
    for (u32 i = 0; i < bytes; ++i) {
        together &= p.state[i];
        any |= p.state[i];
    }
    if (any & kPending) {
        for (const Warp& other : m.warps)
            for (int j = 0; j < kLanes; ++j)
                for (const AsyncCopy& copy : other.copies[j]) {
                    const u32 from = copy.shared - kSharedStart;
                    if (p.offset < from + copy.bytes && from < p.offset + bytes)
                        fault(lane, "asynchronous copy",
                              where_text(p, p.offset) + (how.write ? " is written" : " is read") +
                                  " while the cp.async at " + at_pc(copy.pc) + " of " +
                                  thread_text(m, m.block, other.thread(j)) + " has not been waited for");
                }
    }
    if (how.read && !(together & kInitialised)) {
        u32 i = 0;
        while (p.state[i] & kInitialised) ++i;
        fault(lane, "uninitialised memory", where_text(p, p.offset + i) + " is read before anything wrote it");
    }
    if (p.space == Space::kShared) {
        check_race(m, w, by, m.shared_shadow.data(), p.offset, bytes, how.write, how.strong, "race on shared memory",
                   [&] { return where_text(p, p.offset); });
    }
    if (how.write && !how.async)
        for (u32 i = 0; i < bytes; ++i) p.state[i] |= kInitialised;
    return p;
}

// ---- Counting -------------------------------------------------------------------------------------------------------
// Shared memory: 32 banks of 4 bytes. Lanes are served together as long as they ask for 128 bytes: all of them at up to
// 4 bytes a lane, half warps at 8, quarter warps at 16. A wavefront serves one word a bank; equal words are shared.
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

// Global memory: 32-byte sectors touched, and the fewest that could hold the bytes asked for.
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
