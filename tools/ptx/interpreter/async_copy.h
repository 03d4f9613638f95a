// PTX ISA, section "Data Movement and Conversion Instructions: Non-bulk copy": cp.async, cp.async.commit_group,
// cp.async.wait_group, cp.async.wait_all. A copy lands as late as it may, when its thread waits for it. Until then
// nobody may touch its destination or change its source; afterwards other threads may, once a barrier has ordered them.
#pragma once
#include "collective.h"

namespace ptx {

// s holds the destination, the source, and the source's size if i.b is 1, or the predicate that makes it 0 if i.b is 2.
inline void cp_async(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64 *to = m.in(w, i.s[0]), *from = m.in(w, i.s[1]), *size = i.b ? m.in(w, i.s[2]) : nullptr;
    u64 shared[kLanes] = {}, global[kLanes] = {};
    u32 reading = 0;
    for_lanes(mask, [&](int l) {
        shared[l] = to[l] + static_cast<u64>(i.offset);
        global[l] = from[l] + static_cast<u64>(i.offset2);
        if (shared[l] - kSharedWindow < kWindowSize)
            fault(l, "out of bounds", "cp.async has a generic address as its destination");
        AsyncCopy copy{kOpenGroup, 0, 0, global[l], i.bytes, i.bytes, w.now, {}};
        if (i.b == 1) copy.source_bytes = static_cast<u32>(size[l]);
        if (i.b == 2 && (size[l] != 0) != (i.negated[2] != 0)) copy.source_bytes = 0;
        if (copy.source_bytes > copy.bytes)
            fault(l, "illegal",
                  "cp.async: the source's size " + std::to_string(copy.source_bytes) + " exceeds the copy's");
        if (copy.source_bytes) {
            reading |= 1u << l;
            if (global[l] % i.bytes)
                fault(l, "misaligned", "cp.async of " + std::to_string(i.bytes) + " bytes from " + hex(global[l]));
            if (copy.source_bytes == copy.bytes) {
                std::memcpy(copy.data.data(), access(m, w, l, Space::kGlobal, global[l], i.bytes, {}).data, i.bytes);
            } else {
                for (u32 k = 0; k < copy.source_bytes; ++k)
                    copy.data[k] = *access(m, w, l, Space::kGlobal, global[l] + k, 1, {}).data;
            }
        }
        const Place p =
            access(m, w, l, Space::kShared, shared[l], i.bytes, {.write = true, .read = false, .async = true});
        for (u32 k = 0; k < i.bytes; ++k) p.state[k] |= kPending;
        copy.shared = static_cast<u32>(p.offset);
        copy.number = w.copies_issued++;
        w.copies[l].push_back(copy);
        ++m.pending_copies;
    });
    Count& count = m.counts[w.now];
    count_banks(count, shared, mask, i.bytes);
    if (reading) count_sectors(count, global, reading, i.bytes);
}
inline void commit(Machine&, Warp& w, const Instr&, u32 mask) {
    for_lanes(mask, [&](int l) {
        for (AsyncCopy& copy : w.copies[l])
            if (copy.group == kOpenGroup) copy.group = w.committed[l];
        ++w.committed[l];
    });
}
inline void land(Machine& m, const AsyncCopy& copy) {
    std::copy_n(copy.data.begin(), copy.bytes, m.shared.begin() + copy.shared);
    for (u32 b = 0; b < copy.bytes; ++b) m.shared_state[copy.shared + b] = kAllocated | kInitialised;
}
// i.a says whether copies that are in no group yet are waited for; i.b is the number of groups that may stay pending.
inline void wait(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for_lanes(mask, [&](int l) {
        auto& copies = w.copies[l];
        for (size_t k = 0; k < copies.size();) {
            const AsyncCopy& copy = copies[k];
            if (copy.group == kOpenGroup ? !i.a : copy.group + i.b >= w.committed[l]) {
                ++k;
                continue;
            }
            const u32 offset = copy.shared;
            land(m, copy);
            // The copy counts as a write that this thread makes now: others see it after the next barrier.
            check_race(m, w, l, m.shared_shadow.data(), offset, copy.bytes, true, false, "race on shared memory",
                       [&] { return shared_text(m, offset); });
            copies.erase(copies.begin() + static_cast<s64>(k));
            --m.pending_copies;
        }
    });
}
inline void decode_cp_async(Decoder& d) {
    if (d.take("commit_group")) {
        d.expect(0);
        d.i.run = commit;
    } else if (d.take("wait_all")) {
        d.expect(0);
        d.i.a = 1;
        d.i.run = wait;
    } else if (d.take("wait_group")) {
        d.expect(1);
        d.i.b = static_cast<u32>(d.immediate(0));
        d.i.run = wait;
    } else {
        const bool cg = d.need_one({"ca", "cg"}) == 1;
        if (!d.take("shared") && !d.take("shared::cta")) d.error("lacks .shared");
        if (!d.take("global")) d.error("lacks .global");
        d.take_one({"L2::64B", "L2::128B", "L2::256B"});
        const int hint = d.take("L2::cache_hint");
        d.address(1);
        d.i.offset2 = d.i.offset;
        d.i.s.clear(), d.i.negated.clear();
        d.address(0);
        const s64 offset = d.i.offset;
        d.address(1);
        d.i.offset2 = d.i.offset, d.i.offset = offset;
        const s64 bytes = d.immediate(2);
        if (cg ? bytes != 16 : bytes != 4 && bytes != 8 && bytes != 16) d.error("a size that does not exist");
        d.i.bytes = static_cast<u8>(bytes);
        if (d.count() - hint > 3) {
            const Operand& o = d.operand(3);
            d.i.b = o.kind == kRegister && d.program.bits[o.reg] == 1 ? 2 : 1;
            d.source(3, d.i.b == 2 ? Type::pred : Type::u32);
        }
        d.expect(3 + (d.i.b != 0) + hint);
        d.i.run = cp_async;
    }
}

}  // namespace ptx
