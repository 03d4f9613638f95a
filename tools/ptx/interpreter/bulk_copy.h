// PTX ISA, section "Data Movement and Conversion Instructions: Bulk copy" and "Tensor copy": cp.async.bulk and
// cp.async.bulk.tensor in both directions, their groups, st.async; "cp.async.mbarrier.arrive"; and "Tensors".
//
// A load writes at its issue, as far as order is concerned: all earlier accesses must be ordered before. It lands at a
// random time; until then nobody may touch its destination or change its source. Its bytes are known to those who have
// seen the phase end to which it belongs. A store reads and writes until its thread has waited.
#pragma once
#include "mbarrier.h"

namespace ptx {

// ---- Landing --------------------------------------------------------------------------------------------------------
inline u32 agent_clock(Machine& m, Mbarrier& b) {
    const u32 clock = ++m.agents[b.agent - m.grid_agent() - 1];
    b.gathered.known.set(b.agent, clock);
    return clock;
}
// Records a write of whole words by an mbarrier's agent.
inline void stamp(Machine& m, const Mbarrier& b, u32 clock, u32 pc, u64 at, u64 bytes, u8 flags) {
    for (u64 k = at / 4; k < (at + bytes + 3) / 4; ++k) {
        Shadow& word = m.shared_shadow[k];
        delete[] word.bytes;
        word.bytes = nullptr;
        word.whole = Record{kThisBlock, clock, pc, static_cast<u16>(b.agent * kLanes), flags, 0, {}};
    }
}
inline void record_reads(Machine& m, Warp& w, int lane, const std::vector<u32>& chunks) {
    for (const u32 chunk : chunks) {
        --m.readers[chunk];
        check_race(m, w, lane, m.shared_shadow.data(), u64{16} * chunk, 16, false, false, "race on shared memory",
                   [&] { return shared_text(m, u64{16} * chunk); });
    }
}
inline void land(Machine& m, BulkCopy& copy) {
    if (copy.kind == BulkCopy::kStore) {
        for (const Piece& piece : copy.pieces) {
            std::copy_n(m.shared.begin() + piece.shared, piece.bytes, piece.buffer->data + piece.offset);
            if (piece.buffer->initialised) std::memset(piece.buffer->initialised + piece.offset, 1, piece.bytes);
        }
        copy.landed = true;
        return;
    }
    Mbarrier& b = m.mbarriers.at(copy.mbarrier);
    const u32 clock = agent_clock(m, b);
    if (copy.kind == BulkCopy::kArrive) {
        Warp& w = m.warps[static_cast<size_t>(copy.warp)];
        auto& copies = w.copies[copy.lane];
        for (size_t k = 0; k < copies.size();) {
            if (copies[k].number >= copy.copies_before) {
                ++k;
                continue;
            }
            land(m, copies[k]);
            stamp(m, b, clock, copies[k].pc, copies[k].shared, copies[k].bytes, kWritten);
            copies.erase(copies.begin() + static_cast<s64>(k));
            --m.pending_copies;
        }
        if (b.pending == 0) fault(-1, "mbarrier", "cp.async.mbarrier.arrive arrives at " + state_text(m, b));
        --b.pending;
    } else {
        if (copy.kind == BulkCopy::kWrite) {
            std::copy(copy.data.begin(), copy.data.end(), m.shared.begin() + copy.at);
        } else {
            std::fill_n(m.shared.begin() + copy.at, copy.bytes, u8{0});
            for (const Piece& piece : copy.pieces)
                std::copy_n(piece.buffer->data + piece.offset, piece.bytes, m.shared.begin() + piece.shared);
        }
        std::fill_n(m.shared_state.begin() + copy.at, copy.bytes, static_cast<u8>(kAllocated | kInitialised));
        stamp(m, b, clock, copy.pc, copy.at, copy.bytes, kWritten | kAsyncProxy);
        if (!copy.chunks.empty()) {  // Those who see the end of the phase may overwrite the source in shared memory.
            for (const u32 chunk : copy.chunks) --m.readers[chunk];
            for (const u32 chunk : copy.chunks)
                for_records(m.shared_shadow.data(), u64{16} * chunk, 16, [&](Record& r, u64) {
                    const u8 last = r.reads == 3 ? 2 : r.reads++;
                    r.read[last] = {kThisBlock, clock, 1, copy.pc << kWarpBits | b.agent};
                });
        }
        add_transactions(m, b, -1, -static_cast<s64>(copy.bytes));
    }
    end_phase_if_complete(m, b);
}
// Draws one of the copies under way and lets it land; returns false if there is none.
inline bool land_one(Machine& m) {
    std::vector<size_t> under_way;
    for (size_t k = 0; k < m.bulk.size(); ++k)
        if (!m.bulk[k].landed) under_way.push_back(k);
    if (under_way.empty()) return false;
    const size_t k = under_way[m.random.below(static_cast<u32>(under_way.size()))];
    land(m, m.bulk[k]);
    if (m.bulk[k].kind != BulkCopy::kStore) m.bulk.erase(m.bulk.begin() + static_cast<s64>(k));
    return true;
}

// ---- Issue ----------------------------------------------------------------------------------------------------------
inline Piece global_piece(Machine& m, int lane, u64 shared, u64 address, u64 bytes) {
    const u64 index = (address >> kBufferShift) - 1;
    if (index >= m.buffers.size() || address - kSharedWindow < 3 * kWindowSize)
        out_of_bounds(m, lane, Space::kGlobal, address, static_cast<u32>(bytes));
    Buffer& b = m.buffers[index];
    const u64 offset = address - b.base;
    if (offset >= b.size || offset + bytes > b.size || b.constant)
        out_of_bounds(m, lane, Space::kGlobal, address, static_cast<u32>(bytes));
    return {static_cast<u32>(shared), static_cast<u32>(bytes), &b, offset};
}
// Checks and records the asynchronous access to the global memory of a piece.
inline void touch_global(Machine& m, Warp& w, int lane, const Piece& piece, bool write) {
    Buffer& b = *piece.buffer;
    const auto where = [&] { return "byte " + std::to_string(piece.offset) + " of '" + b.name + "'"; };
    if (m.has_dependent && b.dependent) check_dependent(m, w, lane, b, piece.offset, write, false);
    check_stores(m, lane, b, piece.offset, piece.bytes, write);
    if (write && !b.writable) fault(lane, "read-only", where() + " is written, which is an input");
    if (!write && b.initialised)
        for (u64 k = piece.offset; k < piece.offset + piece.bytes; ++k)
            if (!b.initialised[k])
                fault(lane, "uninitialised memory",
                      "byte " + std::to_string(k) + " of '" + b.name + "' is read before anything wrote it");
    if (!b.shadow) return;
    for_records(b.shadow, piece.offset, piece.bytes,
                [&](Record& r, u64) { check_proxy(m, lane, r, write ? "written" : "read", where); });
    check_race(m, w, lane, b.shadow, piece.offset, piece.bytes, write, false, "race on global memory", where);
    if (write) for_records(b.shadow, piece.offset, piece.bytes, [&](Record& r, u64) { r.flags |= kAsyncProxy; });
}
// Checks the destination of a copy to shared memory and marks it as under way.
inline void claim_shared(Machine& m, Warp& w, int lane, u64 at, u64 bytes) {
    check_asynchronous(m, lane, at, bytes, true);
    for (u64 k = at; k < at + bytes; ++k) {
        if (m.shared_state[k] & kPending) {
            pending_copy(m, lane, k, 1, true);
            fault(lane, "asynchronous copy", shared_text(m, k) + " is written while a cp.async to it is under way");
        }
        m.shared_state[k] |= kPending;
    }
    const auto where = [&] { return shared_text(m, at); };
    for_records(m.shared_shadow.data(), at, bytes, [&](Record& r, u64 k) {
        if (r.flags & kWritten && !ordered(m, w, lane, r.block, r.thread / kLanes, 1u << r.thread % kLanes, r.clock))
            race(m, "race on shared memory", lane, "the write", r.block, r.thread, r.pc, shared_text(m, k));
        check_proxy(m, lane, r, "written", [&] { return shared_text(m, k); });
    });
    check_race(m, w, lane, m.shared_shadow.data(), at, bytes, true, false, "race on shared memory", where);
}
inline void claim_reads(Machine& m, BulkCopy& copy) {
    for (u32 chunk = copy.at / 16; chunk < (copy.at + copy.bytes) / 16; ++chunk) {
        copy.chunks.push_back(chunk);
        ++m.readers[chunk];
    }
}
inline void need_aligned(int lane, const char* what, u64 address, u64 to) {
    if (address % to)
        fault(lane, "misaligned", std::string(what) + " " + hex(address) + " is not aligned to " + std::to_string(to));
}
inline BulkCopy new_copy(const Warp& w, int lane, BulkCopy::Kind kind) {
    BulkCopy copy;
    copy.kind = kind, copy.warp = w.id, copy.lane = lane, copy.pc = w.now;
    return copy;
}
// The destination may be shared memory of another block; the mbarrier must lie in the same block.
inline void use_mbarrier(Machine& m, Warp& w, int lane, BulkCopy& copy, u32 at) {
    if (at / m.shared_stride != copy.at / m.shared_stride)
        fault(lane, "illegal", "the mbarrier and the destination of a copy lie in different blocks");
    copy.mbarrier = mbarrier_at(m, w, lane, at).at;
}

// Issues a load, with a multicast once for each destination block. `copy` has the run and its pieces.
inline void issue_load(Machine& m, Warp& w, int lane, const BulkCopy& copy, u32 barrier, u32 ranks) {
    for (const Piece& piece : copy.pieces) touch_global(m, w, lane, piece, false);
    for (u32 rank = 0; rank < m.cluster_blocks; ++rank) {
        if (ranks && !(ranks >> rank & 1)) continue;
        BulkCopy one = copy;
        u32 at = barrier;
        if (ranks) {
            const u32 base = rank * m.shared_stride;
            if (static_cast<int>(rank) != w.block) visit(m, w, lane, rank);
            for (Piece& piece : one.pieces) piece.shared = piece.shared % m.shared_stride + base;
            one.at = one.at % m.shared_stride + base, at = at % m.shared_stride + base;
        }
        use_mbarrier(m, w, lane, one, at);
        claim_shared(m, w, lane, one.at, one.bytes);
        m.bulk.push_back(std::move(one));
        if (!ranks) return;
    }
    if (ranks >> m.cluster_blocks)
        fault(lane, "illegal",
              "a multicast names block " + std::to_string(31 - std::countl_zero(ranks)) + " of a cluster of " +
                  std::to_string(m.cluster_blocks));
}

// What a lane's bulk copy moves.
struct BulkRange {
    u64 to, from, size;
};
// s begins with the destination, the source and the size.
inline BulkRange bulk_range(Machine& m, Warp& w, const Instr& i, int lane) {
    const BulkRange range{m.in(w, i.s[0])[lane] + static_cast<u64>(i.offset),
                          m.in(w, i.s[1])[lane] + static_cast<u64>(i.offset2), m.in(w, i.s[2])[lane]};
    need_aligned(lane, "a bulk copy's destination", range.to, 16);
    need_aligned(lane, "a bulk copy's source", range.from, 16);
    need_aligned(lane, "a bulk copy's size", range.size, 16);
    return range;
}

// s holds the destination, the source, the size, the mbarrier, and the mask of a multicast if i.b is set. i.a says that
// the source is shared memory.
inline void bulk_load(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for_lanes(mask, [&](int l) {
        const auto [to, from, size] = bulk_range(m, w, i, l);
        const u32 barrier = mbarrier_place(m, w, l, Space::kCluster, m.in(w, i.s[3])[l] + static_cast<u64>(i.offset3));
        if (!size) return;
        BulkCopy copy = new_copy(w, l, i.a ? BulkCopy::kWrite : BulkCopy::kLoad);
        copy.at = static_cast<u32>(shared_range(m, w, l, i.space, to, size));
        copy.bytes = static_cast<u32>(size);
        if (i.a) {
            BulkCopy source = copy;
            source.at = static_cast<u32>(shared_range(m, w, l, Space::kShared, from, size));
            check_async_read(m, w, l, source.at, size, true);
            copy.data.assign(m.shared.begin() + source.at, m.shared.begin() + source.at + static_cast<s64>(size));
            use_mbarrier(m, w, l, copy, barrier);
            claim_shared(m, w, l, copy.at, size);
            claim_reads(m, source);
            copy.chunks = source.chunks;
            m.bulk.push_back(std::move(copy));
            return;
        }
        copy.pieces = {global_piece(m, l, copy.at, from, size)};
        issue_load(m, w, l, copy, barrier, i.b ? static_cast<u32>(m.in(w, i.s[4])[l]) : 0);
    });
}
inline void issue_store(Machine& m, Warp& w, int lane, BulkCopy copy) {
    check_async_read(m, w, lane, copy.at, copy.bytes, true);
    for (const Piece& piece : copy.pieces) touch_global(m, w, lane, piece, true);
    claim_reads(m, copy);
    m.bulk.push_back(std::move(copy));
}
inline void bulk_store(Machine& m, Warp& w, const Instr& i,
                       u32 mask) {  // s holds the destination, the source, the size
    for_lanes(mask, [&](int l) {
        const auto [to, from, size] = bulk_range(m, w, i, l);
        if (!size) return;
        BulkCopy copy = new_copy(w, l, BulkCopy::kStore);
        copy.at = static_cast<u32>(shared_range(m, w, l, Space::kShared, from, size));
        copy.bytes = static_cast<u32>(size);
        copy.pieces = {global_piece(m, l, copy.at, to, size)};
        issue_store(m, w, l, std::move(copy));
    });
}
inline void bulk_commit(Machine& m, Warp& w, const Instr&, u32 mask) {
    for (BulkCopy& copy : m.bulk)
        if (copy.kind == BulkCopy::kStore && copy.warp == w.id && mask >> copy.lane & 1 && copy.group == kOpenGroup)
            copy.group = w.bulk_committed[copy.lane];
    for_lanes(mask, [&](int l) { ++w.bulk_committed[l]; });
}
// i.a is set for .read, which waits for the reads only; i.b is the number of groups that may stay under way.
inline void bulk_wait(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for (size_t k = 0; k < m.bulk.size();) {
        BulkCopy& copy = m.bulk[k++];
        if (copy.kind != BulkCopy::kStore || copy.warp != w.id || !(mask >> copy.lane & 1)) continue;
        if (copy.group == kOpenGroup || copy.group + i.b >= w.bulk_committed[copy.lane]) continue;
        if (!copy.landed) land(m, copy);
        if (!copy.read) record_reads(m, w, copy.lane, copy.chunks);
        copy.read = true;
        if (i.a) continue;
        for (const Piece& piece : copy.pieces) {
            check_race(m, w, copy.lane, piece.buffer->shadow, piece.offset, piece.bytes, true, false,
                       "race on global memory",
                       [&] { return "byte " + std::to_string(piece.offset) + " of '" + piece.buffer->name + "'"; });
            for_records(piece.buffer->shadow, piece.offset, piece.bytes,
                        [&](Record& r, u64) { r.flags |= kAsyncProxy; });
        }
        m.bulk.erase(m.bulk.begin() + static_cast<s64>(--k));
    }
}

// ---- Tensors --------------------------------------------------------------------------------------------------------
// A tensor map is 128 opaque bytes in a parameter, in constant or in global memory: a magic number and an index.
inline constexpr u64 kTensorMapMagic = 0x50414d524f534e54;  // "TNSORMAP"
inline const TensorMap& tensor_map(Machine& m, Warp& w, int lane, u64 address) {
    need_aligned(lane, "a tensor map's address", address, 64);
    u64 words[2];
    for (int k = 0; k < 2; ++k) {
        const Place p = access(m, w, lane, Space::kGeneric, address + 8 * static_cast<u64>(k), 8, {});
        std::memcpy(&words[k], p.data, 8);
    }
    if (words[0] != kTensorMapMagic || words[1] >= m.tensor_maps.size())
        fault(lane, "illegal", "there is no tensor map at " + hex(address));
    return m.tensor_maps[words[1]];
}
// Swizzles exchange the 16-byte chunks of a line, by the number of the 128-byte line that they lie in. `swizzle` is the
// width: 0, 32, 64 or 128 bytes.
inline u32 swizzled(u32 address, u32 swizzle) {
    const u32 mask = swizzle == 128 ? 7 : swizzle == 64 ? 3 : swizzle == 32 ? 1 : 0;
    return address ^ (address >> 7 & mask) << 4;
}
// Fills in the pieces of the box at `at` whose corner has these coordinates.
inline void box_pieces(Machine& m, int lane, BulkCopy& copy, const TensorMap& map, const s64* corner) {
    const u32 row_bytes = map.box[0] * map.element_bytes, base = copy.at / m.shared_stride * m.shared_stride;
    u32 rows = 1;
    for (u32 d = 1; d < map.rank; ++d) rows *= map.box[d];
    copy.bytes = rows * row_bytes;
    const s64 first = std::clamp<s64>(-corner[0], 0, map.box[0]);
    const s64 last = std::clamp<s64>(static_cast<s64>(map.size[0]) - corner[0], first, map.box[0]);
    for (u32 row = 0; row < rows; ++row) {
        u64 global = map.base;
        bool inside = first < last;
        for (u32 d = 1, rest = row; d < map.rank; rest /= map.box[d], ++d) {
            const s64 index = corner[d] + rest % map.box[d];
            inside = inside && index >= 0 && index < static_cast<s64>(map.size[d]);
            global += static_cast<u64>(index) * map.stride[d];
        }
        if (!inside) continue;
        const u32 end = static_cast<u32>(last) * map.element_bytes;
        for (u32 byte = static_cast<u32>(first) * map.element_bytes; byte < end;) {
            const u32 next = map.swizzle ? std::min(end, byte / 16 * 16 + 16) : end;
            const u32 to = copy.at - base + row * row_bytes + byte;
            const u64 from = global + static_cast<u64>(corner[0] * map.element_bytes + byte);
            copy.pieces.push_back(global_piece(m, lane, base + swizzled(to + kSharedStart, map.swizzle) - kSharedStart,
                                               from, next - byte));
            byte = next;
        }
    }
}
// s holds the destination, the map, the coordinates, the mbarrier, and the mask of a multicast if i.b is set. i.a is
// the number of dimensions. i.is_signed marks a store, for which s holds the source, the map and the coordinates.
inline void tensor_copy(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for_lanes(mask, [&](int l) {
        const u64 shared = m.in(w, i.s[0])[l] + static_cast<u64>(i.offset);
        const TensorMap& map = tensor_map(m, w, l, m.in(w, i.s[1])[l] + static_cast<u64>(i.offset2));
        if (map.rank != i.a)
            fault(l, "illegal",
                  "the tensor map has " + std::to_string(map.rank) + " dimensions, the instruction " +
                      std::to_string(i.a));
        s64 corner[5] = {};
        for (u32 d = 0; d < i.a; ++d) corner[d] = static_cast<s32>(m.in(w, i.s[2 + d])[l]);
        need_aligned(l, "a tensor copy's shared address", shared, 128);
        BulkCopy copy = new_copy(w, l, i.is_signed ? BulkCopy::kStore : BulkCopy::kLoad);
        u64 bytes = map.element_bytes;
        for (u32 d = 0; d < map.rank; ++d) bytes *= map.box[d];
        copy.at = static_cast<u32>(shared_range(m, w, l, i.space, shared, bytes));
        box_pieces(m, l, copy, map, corner);
        if (i.is_signed) return issue_store(m, w, l, std::move(copy));
        const u32 barrier =
            mbarrier_place(m, w, l, Space::kCluster, m.in(w, i.s[2 + i.a])[l] + static_cast<u64>(i.offset3));
        issue_load(m, w, l, copy, barrier, i.b ? static_cast<u32>(m.in(w, i.s[3 + i.a])[l]) : 0);
    });
}

// ---- st.async, cp.async.mbarrier.arrive -----------------------------------------------------------------------------
inline void st_async(Machine& m, Warp& w, const Instr& i, u32 mask) {  // s holds the address, the mbarrier, the values
    for_lanes(mask, [&](int l) {
        const u64 to = m.in(w, i.s[0])[l] + static_cast<u64>(i.offset), bytes = u64{i.bytes} * i.vector;
        need_aligned(l, "the address of st.async", to, bytes);
        BulkCopy copy = new_copy(w, l, BulkCopy::kWrite);
        copy.at = static_cast<u32>(shared_range(m, w, l, Space::kCluster, to, bytes));
        copy.bytes = static_cast<u32>(bytes);
        copy.data.resize(bytes);
        for (int e = 0; e < i.vector; ++e)
            std::memcpy(copy.data.data() + e * i.bytes, &m.in(w, i.s[static_cast<size_t>(2 + e)])[l], i.bytes);
        use_mbarrier(m, w, l, copy,
                     mbarrier_place(m, w, l, Space::kCluster, m.in(w, i.s[1])[l] + static_cast<u64>(i.offset3)));
        claim_shared(m, w, l, copy.at, bytes);
        m.bulk.push_back(std::move(copy));
    });
}
inline void arrive_after_copies(Machine& m, Warp& w, const Instr& i, u32 mask) {  // i.a is set for .noinc
    for_lanes(mask, [&](int l) {
        Mbarrier& b = mbarrier(m, w, l, i);
        if (!i.a) ++b.pending;
        BulkCopy copy = new_copy(w, l, BulkCopy::kArrive);
        copy.at = copy.mbarrier = b.at;
        copy.copies_before = w.copies_issued;
        m.bulk.push_back(std::move(copy));
    });
}

// ---- Decoding -------------------------------------------------------------------------------------------------------
inline s64 take_address(Decoder& d, int k) {
    d.address(k);
    return d.i.offset;
}
inline void take_levels(Decoder& d) { d.take_one({"L2::evict_first", "L2::evict_last", "L2::evict_normal"}); }

inline void decode_tensor(Decoder& d, bool prefetch) {
    const int rank = d.need_one({"1d", "2d", "3d", "4d", "5d"}) + 1;
    d.i.a = static_cast<u32>(rank);
    if (prefetch) {  // a hint
        d.take("L2"), d.take("global"), d.take("tile");
        d.take("L2::cache_hint");
        d.i.run = nothing;
        return;
    }
    const bool store = !d.mods.empty() && d.mods[0] == "global";
    const auto take_map = [&](int k) {
        const Operand& o = d.operand(k);
        if (o.kind != kTensor || o.count != rank)
            d.error("lacks a tensor map with " + std::to_string(rank) + " coordinates");
        d.i.s.push_back(o.reg >= 0 ? o.reg : d.program.constant(0)), d.i.negated.push_back(0);
        d.i.offset2 = o.value;
        for (int c = 0; c < rank; ++c) d.push_source((&o)[1 + c], Type::s32);
    };
    if (store) {
        d.take("global");
        if (!d.take("shared::cta")) d.error("lacks .shared::cta");
        if (!d.take("bulk_group")) d.error("lacks .bulk_group");
        d.take("tile");
        const bool hint = d.take("L2::cache_hint");
        d.expect(2 + hint);
        const s64 from = take_address(d, 1);
        take_map(0);
        d.i.offset = from;
        d.i.space = Space::kShared, d.i.is_signed = true;
    } else {
        const int space = d.need_one({"shared::cluster", "shared::cta"});
        if (!d.take("global")) d.error("lacks .global");
        d.take("tile");
        if (!d.take("mbarrier::complete_tx::bytes")) d.error("lacks .mbarrier::complete_tx::bytes");
        d.i.b = d.take("multicast::cluster");
        const bool hint = d.take("L2::cache_hint");
        d.expect(3 + static_cast<int>(d.i.b) + hint);
        const s64 to = take_address(d, 0);
        take_map(1);
        d.i.offset3 = take_address(d, 2);
        d.i.offset = to;
        if (d.i.b) d.source(3, Type::u16);
        d.i.space = space == 0 ? Space::kCluster : Space::kShared;
    }
    d.i.run = tensor_copy;
}
inline void decode_bulk(Decoder& d) {
    d.program.asynchronous = true;
    if (d.take("commit_group")) {
        d.expect(0);
        d.i.run = bulk_commit;
    } else if (d.take("wait_group")) {
        d.i.a = d.take("read");
        d.expect(1);
        d.i.b = static_cast<u32>(d.immediate(0));
        d.i.run = bulk_wait;
    } else if (d.take("prefetch")) {
        if (d.take("tensor")) return decode_tensor(d, true);
        d.take("L2"), d.take("global"), d.take("L2::cache_hint");
        d.i.run = nothing;
    } else if (d.take("tensor")) {
        decode_tensor(d, false);
    } else if (!d.mods.empty() && d.mods[0] == "global") {
        d.take("global");
        if (!d.take("shared::cta") || !d.take("bulk_group")) d.error("lacks .shared::cta or .bulk_group");
        const bool hint = d.take("L2::cache_hint");
        d.expect(3 + hint);
        const s64 to = take_address(d, 0);
        d.i.offset2 = take_address(d, 1);
        d.i.offset = to;
        d.source(2, Type::u32);
        d.i.run = bulk_store;
    } else {
        if (d.mods.size() < 2 || d.mods[0].compare(0, 6, "shared") != 0) d.error("its spaces are not known");
        d.i.space = d.mods[0] == "shared::cluster" ? Space::kCluster : Space::kShared;
        const std::string from = d.mods[1];
        if (from != "global" && (from != "shared::cta" || d.i.space != Space::kCluster))
            d.error("its spaces are not known");
        d.mods.erase(d.mods.begin(), d.mods.begin() + 2);
        d.i.a = from != "global";
        if (!d.take("mbarrier::complete_tx::bytes")) d.error("lacks .mbarrier::complete_tx::bytes");
        d.i.b = d.take("multicast::cluster");
        if (d.i.b && d.i.a) d.error("a multicast from shared memory");
        const bool hint = d.take("L2::cache_hint");
        d.expect(4 + static_cast<int>(d.i.b) + hint);
        const s64 to = take_address(d, 0);
        d.i.offset2 = take_address(d, 1);
        d.source(2, Type::u32);
        d.i.offset3 = take_address(d, 3);
        d.i.offset = to;
        if (d.i.b) d.source(4, Type::u16);
        d.i.run = bulk_load;
    }
    take_levels(d);
}
inline void decode_cp(Decoder& d) {
    if (!d.take("async")) d.error("only .async is known");
    if (d.take("bulk")) return decode_bulk(d);
    if (!d.take("mbarrier")) return decode_cp_async(d);
    d.program.asynchronous = true;
    if (!d.take("arrive")) d.error("lacks .arrive");
    d.i.a = d.take("noinc");
    d.i.space = take_mbarrier_space(d);
    if (d.take_type() != Type::b64) d.unsupported_type();
    d.expect(1);
    d.address(0);
    d.i.run = arrive_after_copies;
}
inline void decode_st_or_async(Decoder& d) {
    if (!d.take("async")) return decode_st(d);
    d.program.asynchronous = true;
    d.take("weak");
    if (!d.take("shared::cluster")) d.error("lacks .shared::cluster");
    if (!d.take("mbarrier::complete_tx::bytes")) d.error("lacks .mbarrier::complete_tx::bytes");
    access_shape(d, 1);
    if (d.i.bytes < 4) d.unsupported_type();
    d.expect(3);
    const s64 to = take_address(d, 0);
    d.i.offset3 = take_address(d, 2);
    d.i.offset = to;
    d.sources(1, d.i.bytes == 4 ? Type::b32 : Type::b64);
    d.i.run = st_async;
}

}  // namespace ptx
