// PTX ISA, section "Parallel Synchronization and Communication Instructions": vote, activemask, shfl, match, redux,
// elect. A .sync instruction executes once all members of its mask that have not exited are at it (interpreter.cpp).
// None of these orders memory (CUDA C++ Programming Guide, "Warp Shuffle Functions": they "do not imply a memory
// barrier"), bar.warp.sync does; Machine::collectives_order makes them do so.
#pragma once
#include "control.h"

namespace ptx {

inline void vote(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* p = m.in(w, i.s[0]);
    u32 ballot = 0;
    for_lanes(mask, [&](int l) { ballot |= u32{(p[l] != 0) != (i.negated[0] != 0)} << l; });
    u64 result;
    switch (i.a) {
        case 0: result = ballot == mask; break;
        case 1: result = ballot != 0; break;
        case 2: result = ballot == mask || ballot == 0; break;
        default: result = ballot;
    }
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) { d[l] = result; });
}
inline void collective(Decoder& d, int member_operand) {
    if (!d.take("sync")) d.error("only .sync is known");
    d.expect(member_operand + 1);
    d.source(member_operand, Type::b32);
    d.i.members = d.i.s.back();
    d.i.flow = Flow::kCollective;
}
inline void decode_vote(Decoder& d) {
    d.i.a = static_cast<u32>(d.need_one({"all", "any", "uni", "ballot"}));
    d.take_type();
    d.destination(0), d.source(1, Type::pred);
    collective(d, 2);
    d.i.run = vote;
}
inline void activemask(Machine& m, Warp& w, const Instr& i, u32 mask) {
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) { d[l] = mask; });
}
inline void decode_activemask(Decoder& d) {
    d.take_type();
    d.expect(1);
    d.destination(0);
    d.i.run = activemask;
}

// Lane j's value, or the own one where j lies outside the segment that c describes. i.a: up, down, bfly, idx.
inline void shfl(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for (const s32 row : i.s) need(w, row, mask);
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = m.in(w, i.s[2]);
    u64 value[kLanes], inside[kLanes];
    u32 known = 0;
    for_lanes(mask, [&](int l) {
        const int by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
        const int most = (l & segment) | (clamp & ~segment), least = l & segment;
        int j;
        switch (i.a) {
            case 0:
                j = l - by;
                inside[l] = j >= most;
                break;
            case 1:
                j = l + by;
                inside[l] = j <= most;
                break;
            case 2:
                j = l ^ by;
                inside[l] = j <= most;
                break;
            default: j = least | (by & ~segment); inside[l] = j <= most;
        }
        if (!inside[l]) j = l;
        value[l] = a[j];
        if (mask >> j & 1) known |= 1u << l;  // a lane that takes no part gives an undefined value
    });
    for (size_t k = 0; k < i.d.size(); ++k) {
        if (i.d[k] == kNoRow) continue;
        u64* d = m.row(w, i.d[k]);
        for_lanes(mask, [&](int l) { d[l] = k ? inside[l] : value[l]; });
        w.initialised[i.d[k]] = (w.initialised[i.d[k]] & ~mask) | (k ? mask : known & mask);
    }
}
inline void decode_shfl(Decoder& d) {
    d.i.a = static_cast<u32>(d.need_one({"up", "down", "bfly", "idx"}));
    if (d.take_type() != Type::b32) d.unsupported_type();
    d.destinations(0), d.source(1, Type::b32), d.source(2, Type::b32), d.source(3, Type::b32);
    collective(d, 4);
    d.i.copies = true;
    d.i.run = shfl;
}

inline void match(Machine& m, Warp& w, const Instr& i, u32 mask) {  // i.a: all
    const u64* a = m.in(w, i.s[0]);
    u64 same[kLanes];
    for_lanes(mask, [&](int l) {
        u32 equal = 0;
        for_lanes(mask, [&](int j) { equal |= u32{a[j] == a[l]} << j; });
        same[l] = i.a && equal != mask ? 0 : equal;
    });
    for (size_t k = 0; k < i.d.size(); ++k) {
        if (i.d[k] == kNoRow) continue;
        u64* d = m.row(w, i.d[k]);
        for_lanes(mask, [&](int l) { d[l] = k ? same[l] != 0 : same[l]; });
    }
}
inline void decode_match(Decoder& d) {
    d.i.a = d.need_one({"any", "all"}) == 1;
    const Type type = d.take_type();
    d.destinations(0), d.source(1, type);
    collective(d, 2);
    d.i.run = match;
}

template <class T, class F>
void redux(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* a = m.in(w, i.s[0]);
    T total = get<T>(a[std::countr_zero(mask)]);
    for_lanes(mask & (mask - 1), [&](int l) { total = F::template of<T>(total, get<T>(a[l])); });
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) { d[l] = put(total); });
}
inline void decode_redux(Decoder& d) {
    const int op = d.need_one({"add", "min", "max", "and", "or", "xor"});
    const Type type = d.take_type();
    if (info(type).bytes != 4 || is_float_type(type)) d.unsupported_type();
    d.destination(0), d.source(1, type);
    collective(d, 2);
    with_integer(type, [&]<class T>() {
        switch (op) {
            case 0: d.i.run = redux<T, Add>; break;
            case 1: d.i.run = redux<T, Min>; break;
            case 2: d.i.run = redux<T, Max>; break;
            case 3: d.i.run = redux<T, And>; break;
            case 4: d.i.run = redux<T, Or>; break;
            default: d.i.run = redux<T, Xor>;
        }
    });
}
inline void elect(Machine& m, Warp& w, const Instr& i, u32 mask) {  // the leader: here the lowest lane
    const int leader = std::countr_zero(mask);
    for (size_t k = 0; k < i.d.size(); ++k) {
        if (i.d[k] == kNoRow) continue;
        u64* d = m.row(w, i.d[k]);
        for_lanes(mask, [&](int l) { d[l] = k ? u64{l == leader} : static_cast<u64>(leader); });
    }
}
inline void decode_elect(Decoder& d) {
    d.destinations(0);
    collective(d, 1);
    d.i.run = elect;
}

}  // namespace ptx
