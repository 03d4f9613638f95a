// PTX ISA, section "Data Movement and Conversion Instructions": mov, ld, st, cvta, isspacep, prefetch, createpolicy;
// and "Parallel Synchronization and Communication Instructions: atom, red".
#pragma once
#include "floating.h"

namespace ptx {

// mov copies uninitialised registers too, because the compiler moves values that nobody uses.
inline void mov(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* a = m.in(w, i.s[0]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) { d[l] = a[l]; });
    const u32 known = i.s[0] >= 0 ? w.initialised[i.s[0]] : kAll;
    w.initialised[i.d[0]] = (w.initialised[i.d[0]] & ~mask) | (known & mask);
}
// i.a is the number of bits of one element.
inline void mov_pack(Machine& m, Warp& w, const Instr& i, u32 mask) {
    u64* d = m.row(w, i.d[0]);
    u32 known = kAll;
    u64 packed[kLanes] = {};
    for (size_t k = 0; k < i.s.size(); ++k) {
        const u64* a = m.in(w, i.s[k]);
        if (i.s[k] >= 0) known &= w.initialised[i.s[k]];
        for_lanes(mask, [&](int l) { packed[l] |= (a[l] & mask_of(static_cast<int>(i.a))) << (i.a * k); });
    }
    for_lanes(mask, [&](int l) { d[l] = packed[l]; });
    w.initialised[i.d[0]] = (w.initialised[i.d[0]] & ~mask) | (known & mask);
}
inline void mov_unpack(Machine& m, Warp& w, const Instr& i, u32 mask) {
    u64 source[kLanes];
    std::copy_n(m.in(w, i.s[0]), kLanes, source);
    const u32 known = i.s[0] >= 0 ? w.initialised[i.s[0]] : kAll;
    for (size_t k = 0; k < i.d.size(); ++k) {
        if (i.d[k] == kNoRow) continue;
        u64* d = m.row(w, i.d[k]);
        for_lanes(mask, [&](int l) { d[l] = source[l] >> (i.a * k) & mask_of(static_cast<int>(i.a)); });
        w.initialised[i.d[k]] = (w.initialised[i.d[k]] & ~mask) | (known & mask);
    }
}
inline void decode_mov(Decoder& d) {
    const Type type = d.take_type();
    if (type == Type::b128) d.unsupported_type();
    d.expect(2);
    d.i.copies = true;
    if (d.is_vector(0)) {
        d.destinations(0), d.source(1, type);
        d.i.a = static_cast<u32>(8 * info(type).bytes / d.vector_size(0));
        d.i.run = mov_unpack;
    } else if (d.is_vector(1)) {
        d.destination(0), d.sources(1, type);
        d.i.a = static_cast<u32>(8 * info(type).bytes / d.vector_size(1));
        d.i.run = mov_pack;
    } else {
        d.destination(0), d.source(1, type);
        if (d.i.negated[0]) d.error("a negated operand");
        d.i.run = mov;
    }
}

// ---- ld, st ---------------------------------------------------------------------------------------------------------
inline void count_access(Machine& m, Warp& w, const u64* address, u32 mask, u32 bytes, Space space) {
    Count& count = m.counts[w.now];
    if (space == Space::kGeneric)
        space = address[std::countr_zero(mask)] - kSharedWindow < kWindowSize ? Space::kShared : Space::kGlobal;
    if (space == Space::kShared || (space == Space::kCluster && m.cluster_blocks == 1)) {
        if (bytes < 4 || bytes == 4 || bytes == 8 || bytes == 16) count_banks(count, address, mask, bytes);
    } else if (space == Space::kGlobal) {
        count_sectors(count, address, mask, bytes);
    }
}
// The lanes of `mask` have read at these addresses (see sync_key). If they do not acquire now, a later fence may.
inline void acquire_at(Machine& m, Warp& w, u32 mask, const u64* keys, bool now) {
    if (m.released.empty()) return;
    while (mask) {
        const u64 key = keys[std::countr_zero(mask)];
        u32 same = 0;
        for_lanes(mask, [&](int l) { same |= u32{keys[l] == key} << l; });
        mask &= ~same;
        const auto found = m.released.find(key);
        if (found == m.released.end()) continue;
        if (now) {
            acquire(w, same, found->second);
        } else {
            w.seen.add(found->second, same, w.living());
        }
    }
}
inline void release_at(Machine& m, Warp& w, int lane, u64 key, bool now) {
    if (now) {
        merge(m.released[key], publish(w, 1u << lane));
    } else if (key - kSharedWindow < kWindowSize ? w.has_fenced : w.has_fenced_gpu) {
        merge(m.released[key], key - kSharedWindow < kWindowSize ? w.fenced : w.fenced_gpu);
    }
}
inline u64 sync_key(const Place& p, u64 address) {
    return p.space == Space::kShared ? kSharedWindow + kSharedStart + p.offset : address;
}
inline void ld(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* base = m.in(w, i.s[0]);
    const u32 bytes = u32{i.bytes} * i.vector;
    u64 address[kLanes];
    for_lanes(mask, [&](int l) { address[l] = base[l] + static_cast<u64>(i.offset); });
    const Access how{.write = false, .read = true, .strong = i.strong, .nc = i.read_only};
    const int shift = 64 - 8 * i.bytes;
    u64 keys[kLanes];
    for_lanes(mask, [&](int l) {
        const Place p = access(m, w, l, i.space, address[l], bytes, how);
        for (int e = 0; e < i.vector; ++e) {
            if (i.d[e] == kNoRow) continue;
            u64 v = 0;
            std::memcpy(&v, p.data + e * i.bytes, i.bytes);
            if (i.is_signed) v = static_cast<u64>(static_cast<s64>(v << shift) >> shift) & i.d_mask;
            m.row(w, i.d[e])[l] = v;
        }
        if (i.strong) keys[l] = sync_key(p, address[l]);
    });
    if (i.strong) acquire_at(m, w, mask, keys, i.acquire);
    count_access(m, w, address, mask, bytes, i.space);
}
inline void st(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* base = m.in(w, i.s[0]);
    const u32 bytes = u32{i.bytes} * i.vector;
    u64 address[kLanes];
    for_lanes(mask, [&](int l) { address[l] = base[l] + static_cast<u64>(i.offset); });
    for_lanes(mask, [&](int l) {
        const Place p = access(m, w, l, i.space, address[l], bytes, {.write = true, .read = false, .strong = i.strong});
        for (int e = 0; e < i.vector; ++e) std::memcpy(p.data + e * i.bytes, &m.in(w, i.s[1 + e])[l], i.bytes);
        if (i.strong) release_at(m, w, l, sync_key(p, address[l]), i.release);
    });
    count_access(m, w, address, mask, bytes, i.space);
}

inline Space take_space(Decoder& d) {
    if (d.take("shared::cluster")) return Space::kCluster;
    if (d.take("shared") || d.take("shared::cta")) return Space::kShared;
    if (d.take("global")) return Space::kGlobal;
    if (d.take("local")) return Space::kLocal;
    if (d.take("const")) return Space::kConst;
    if (d.take("param") || d.take("param::entry")) return Space::kParam;
    return Space::kGeneric;
}
// Takes hints, which change no value. .volatile is .relaxed.sys with more promises; for races it counts as an ordinary
// access, because it orders nothing.
inline bool take_hints(Decoder& d) {
    d.take_one({"ca", "cg", "cs", "lu", "cv", "wb", "wt"});
    d.take("volatile"), d.take("weak");
    d.take_one({"L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate"});
    d.take_one({"L2::evict_normal", "L2::evict_first", "L2::evict_last"});
    d.take_one({"L2::64B", "L2::128B", "L2::256B"});
    return d.take("L2::cache_hint");
}
inline void take_scope(Decoder& d) { d.take_one({"cta", "cluster", "gpu", "sys"}); }
inline int take_vector(Decoder& d) {
    static constexpr int kSizes[] = {2, 4, 8};
    const int index = d.take_one({"v2", "v4", "v8"});
    return index < 0 ? 1 : kSizes[index];
}
inline void access_shape(Decoder& d, int vector_operand) {
    d.i.vector = static_cast<u8>(take_vector(d));
    const Type type = d.take_type();
    if (type == Type::b128 || type == Type::pred) d.unsupported_type();
    d.i.bytes = static_cast<u8>(info(type).bytes);
    d.i.is_signed = is_signed(type);
    if (d.vector_size(vector_operand) != d.i.vector) d.error("the vector's size differs from the instruction's");
}
inline void decode_ld(Decoder& d) {
    d.i.space = take_space(d);
    d.i.read_only = d.take("nc");
    const bool hint = take_hints(d);
    d.i.acquire = d.take("acquire");
    d.i.strong = d.take("relaxed") || d.i.acquire;
    if (d.i.strong) take_scope(d);
    access_shape(d, 0);
    d.expect(hint ? 3 : 2);
    d.destinations(0), d.address(1);
    d.i.run = ld;
}
inline void decode_ldu(Decoder& d) {
    d.i.space = take_space(d);
    access_shape(d, 0);
    d.expect(2);
    d.destinations(0), d.address(1);
    d.i.run = ld;
}
inline void decode_st(Decoder& d) {
    d.i.space = take_space(d);
    const bool hint = take_hints(d);
    d.i.release = d.take("release");
    d.i.strong = d.take("relaxed") || d.i.release;
    if (d.i.strong) take_scope(d);
    access_shape(d, 1);
    d.expect(hint ? 3 : 2);
    d.address(0), d.sources(1, static_cast<Type>(static_cast<int>(Type::b8) + std::countr_zero(u32{d.i.bytes})));
    d.i.run = st;
}

inline void nothing(Machine&, Warp&, const Instr&, u32) {}
inline void decode_prefetch(Decoder& d) {  // a hint without a value, whose address need not be valid
    take_space(d);
    d.take_one({"L1", "L2", "L2::evict_last", "L2::evict_normal", "tensormap"});
    d.i.run = nothing;
}
inline void policy(Machine& m, Warp& w, const Instr& i, u32 mask) {
    for_lanes(mask, [&](int l) { m.row(w, i.d[0])[l] = 0; });
}
inline void decode_createpolicy(Decoder& d) {  // makes an opaque word that only hints take
    d.mods.clear();
    d.destination(0);
    d.i.run = policy;
}

// ---- Address windows: cvta, isspacep --------------------------------------------------------------------------------
inline u64 window_of(Space space) {
    switch (space) {
        case Space::kShared:
        case Space::kCluster: return kSharedWindow;
        case Space::kLocal: return kLocalWindow;
        case Space::kParam: return kParamWindow;
        default: return 0;  // global and const addresses are generic ones
    }
}
inline void cvta(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* a = m.in(w, i.s[0]);
    u64* d = m.row(w, i.d[0]);
    const u64 window = window_of(i.space);
    for_lanes(mask, [&](int l) { d[l] = a[l] + (i.a ? u64{0} - window : window); });
}
inline void decode_cvta(Decoder& d) {
    d.i.a = d.take("to");
    d.i.space = take_space(d);
    if (d.i.space == Space::kGeneric) d.error("lacks a state space");
    if (info(d.take_type()).bytes != 8) d.error("addresses are of 64 bits here");
    d.expect(2);
    d.destination(0), d.source(1, Type::u64);
    d.i.run = cvta;
}
inline void isspacep(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* a = m.in(w, i.s[0]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        const u64 index = (a[l] >> kBufferShift) - 1;
        if (i.space == Space::kGlobal || i.space == Space::kConst) {
            d[l] = index < m.buffers.size() && (m.buffers[index].constant != 0) == (i.space == Space::kConst);
        } else {
            d[l] = a[l] - window_of(i.space) < kWindowSize;
        }
    });
}
inline void decode_isspacep(Decoder& d) {
    d.i.space = take_space(d);
    d.expect(2);
    d.destination(0), d.source(1, Type::u64);
    d.i.run = isspacep;
}

// ---- atom, red ------------------------------------------------------------------------------------------------------
struct Exchange {
    template <class T>
    static T of(T, T b) {
        return b;
    }
};
struct Increment {  // (old >= b) ? 0 : old + 1
    template <class T>
    static T of(T a, T b) {
        return a >= b ? T{0} : static_cast<T>(a + 1);
    }
};
struct Decrement {  // (old == 0 || old > b) ? b : old - 1
    template <class T>
    static T of(T a, T b) {
        return a == 0 || a > b ? b : static_cast<T>(a - 1);
    }
};
struct AtomicFloatAdd {
    template <class T>
    static T of(T a, T b) {
        static const Instr nearest{};
        return FAdd::of<T>(a, b, nearest);
    }
};
template <class H>
struct AtomicPackedAdd {
    template <class T>
    static T of(T a, T b) {
        const u64 low = put(AtomicFloatAdd::of<H>(get<H>(a), get<H>(b)));
        return static_cast<T>(put(AtomicFloatAdd::of<H>(get<H>(a >> 16), get<H>(b >> 16))) << 16 | low);
    }
};
// The lanes act one after another, beginning with a random one, because no order is promised. i.a says that this is
// red, which has no result.
template <class T, class Update>
void atomically(Machine& m, Warp& w, const Instr& i, u32 mask, Update&& update) {
    const u64* base = m.in(w, i.s[0]);
    u64 address[kLanes];
    for_lanes(mask, [&](int l) { address[l] = base[l] + static_cast<u64>(i.offset); });
    u64* d = i.a || i.d[0] == kNoRow ? nullptr : m.row(w, i.d[0]);
    u64 old[kLanes];
    const u32 first = m.random.below(kLanes);
    for (u32 k = 0; k < kLanes; ++k) {
        const int l = static_cast<int>((first + k) % kLanes);
        if (!(mask >> l & 1)) continue;
        const Place p = access(m, w, l, i.space, address[l], sizeof(T), {.write = true, .read = true, .strong = true});
        u64 keys[kLanes];
        const u64 key = keys[l] = sync_key(p, address[l]);
        acquire_at(m, w, 1u << l, keys, i.acquire);
        T value;
        std::memcpy(&value, p.data, sizeof(T));
        old[l] = put(value);
        value = update(l, value);
        std::memcpy(p.data, &value, sizeof(T));
        release_at(m, w, l, key, i.release);
    }
    if (d) for_lanes(mask, [&](int l) { d[l] = old[l]; });
    count_access(m, w, address, mask, sizeof(T), i.space);
}
template <class T, class F>
void atom(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* b = m.in(w, i.s[1]);
    atomically<T>(m, w, i, mask, [&](int l, T old) { return F::template of<T>(old, get<T>(b[l])); });
}
template <class T>
void atom_cas(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64 *b = m.in(w, i.s[1]), *c = m.in(w, i.s[2]);
    atomically<T>(m, w, i, mask, [&](int l, T old) { return old == get<T>(b[l]) ? get<T>(c[l]) : old; });
}
template <bool kRed>
void decode_atom(Decoder& d) {
    d.i.a = kRed;
    d.i.space = take_space(d);
    const int order = d.take_one({"relaxed", "acquire", "release", "acq_rel"});
    d.i.acquire = order == 1 || order == 3;
    d.i.release = order == 2 || order == 3;
    take_scope(d);
    const bool hint = d.take("L2::cache_hint");
    d.take("noftz");
    const int op = d.need_one({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
    const Type type = d.take_type();
    const int first = kRed ? 0 : 1;
    if (!kRed) d.destination(0);
    d.expect(first + (op == 7 ? 3 : 2) + hint);
    d.address(first), d.source(first + 1, type);
    if (op == 7) d.source(first + 2, type);
    if (type == Type::f32 && op == 0) {
        d.i.run = atom<float, AtomicFloatAdd>;
    } else if (type == Type::f64 && op == 0) {
        d.i.run = atom<double, AtomicFloatAdd>;
    } else if (type == Type::f16 && op == 0) {
        d.i.run = atom<f16, AtomicFloatAdd>;
    } else if (type == Type::bf16 && op == 0) {
        d.i.run = atom<bf16, AtomicFloatAdd>;
    } else if (type == Type::f16x2 && op == 0) {
        d.i.run = atom<u32, AtomicPackedAdd<f16>>;
    } else if (type == Type::bf16x2 && op == 0) {
        d.i.run = atom<u32, AtomicPackedAdd<bf16>>;
    } else if (type == Type::b16 && op == 7) {
        d.i.run = atom_cas<u16>;
    } else if (info(type).bytes == 4 || info(type).bytes == 8) {
        with_integer(type, [&]<class T>() {
            switch (op) {
                case 0: d.i.run = atom<T, Add>; break;
                case 1: d.i.run = atom<T, Min>; break;
                case 2: d.i.run = atom<T, Max>; break;
                case 3: d.i.run = atom<T, And>; break;
                case 4: d.i.run = atom<T, Or>; break;
                case 5: d.i.run = atom<T, Xor>; break;
                case 6: d.i.run = atom<T, Exchange>; break;
                case 7: d.i.run = atom_cas<T>; break;
                case 8:
                    if (std::is_same_v<T, u32>) d.i.run = atom<T, Increment>;
                    break;
                default:
                    if (std::is_same_v<T, u32>) d.i.run = atom<T, Decrement>;
                    break;
            }
        });
    }
}

}  // namespace ptx
