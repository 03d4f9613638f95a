// PTX ISA, sections "Floating Point Instructions", "Half Precision Floating Point Instructions", "Mixed Precision
// Floating Point Instructions", "Comparison and Selection Instructions" and "Data Movement: cvt".
// The approximate forms (.approx, .full) return the correctly rounded result: hardware may differ in the last bits.
#pragma once
#include <cfenv>

#include "integer.h"

namespace ptx {

// An exact f64 operation in another direction than the nearest.
template <class F>
double directed(Round mode, F&& f) {
    static constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    if (mode == Round::kNearest) return f();
    std::fesetround(kModes[static_cast<int>(mode)]);
    const volatile double result = f();
    std::fesetround(FE_TONEAREST);
    return result;
}
template <class T>
T canonical(T v) {
    if constexpr (std::is_same_v<T, float>)
        if (std::isnan(v)) return std::bit_cast<float>(0x7fffffffu);
    return v;
}
template <class T>
bool is_nan(T v) {
    return std::isnan(to_double(v));
}

struct FAdd {
    template <class T>
    static T of(T a, T b, const Instr& i) {
        if constexpr (std::is_same_v<T, double>) {
            return directed(i.round, [&] {
                const volatile double x = a;
                return x + b;
            });
        } else {
            if constexpr (std::is_same_v<T, float>)
                if (i.round == Round::kNearest) return canonical(a + b);
            return from_double<T>(add_to_odd(to_double(a), to_double(b)), i.round);
        }
    }
};
template <class T>
T negate(T a) {
    if constexpr (std::is_floating_point_v<T>) {
        return -a;
    } else {
        return {static_cast<u16>(a.bits ^ 0x8000)};
    }
}
struct FSub {
    template <class T>
    static T of(T a, T b, const Instr& i) {
        return FAdd::of<T>(a, negate(b), i);
    }
};
struct FMul {
    template <class T>
    static T of(T a, T b, const Instr& i) {
        if constexpr (std::is_same_v<T, double>) {
            return directed(i.round, [&] {
                const volatile double x = a;
                return x * b;
            });
        } else {
            return from_double<T>(to_double(a) * to_double(b), i.round);  // exact in double
        }
    }
};
struct FFma {
    template <class T>
    static T of(T a, T b, T c, const Instr& i) {
        if constexpr (std::is_same_v<T, double>) {
            return directed(i.round, [&] {
                const volatile double x = a;
                return std::fma(x, b, c);
            });
        } else {
            if constexpr (std::is_same_v<T, float>)
                if (i.round == Round::kNearest) return canonical(std::fma(a, b, c));
            return from_double<T>(add_to_odd(to_double(a) * to_double(b), to_double(c)), i.round);
        }
    }
};
// i.a: .NaN, where one NaN makes the result NaN; otherwise the other operand is the result. -0 < +0.
template <bool kMax>
struct FMinMax {
    template <class T>
    static T of(T a, T b, const Instr& i) {
        const double x = to_double(a), y = to_double(b);
        if (std::isnan(x) || std::isnan(y)) {
            if (i.a || (std::isnan(x) && std::isnan(y)))
                return from_double<T>(std::numeric_limits<double>::quiet_NaN());
            return std::isnan(x) ? b : a;
        }
        if (x == y) return std::signbit(x) == kMax ? b : a;
        return (x < y) == kMax ? b : a;
    }
};
struct FDiv {
    template <class T>
    static T of(T a, T b, const Instr& i) {
        if constexpr (std::is_same_v<T, double>) {
            return directed(i.round, [&] {
                const volatile double x = a;
                return x / b;
            });
        } else {
            const double x = to_double(a), y = to_double(b), q = x / y;
            if (!std::isfinite(q) || q == 0) return from_double<T>(q, i.round);
            const double rest = std::fma(-q, y, x);  // q to odd
            const bool odd = std::bit_cast<u64>(q) & 1;
            return from_double<T>(
                rest == 0 || odd ? q : std::nextafter(q, (rest > 0) == (y > 0) ? HUGE_VAL : -HUGE_VAL), i.round);
        }
    }
};
struct FRcp {
    template <class T>
    static T of(T a, const Instr& i) {
        return FDiv::of<T>(from_double<T>(1), a, i);
    }
};
struct FSqrt {
    template <class T>
    static T of(T a, const Instr& i) {
        if constexpr (std::is_same_v<T, double>) {
            return directed(i.round, [&] {
                const volatile double x = a;
                return std::sqrt(x);
            });
        } else {
            const double x = to_double(a), q = std::sqrt(x);
            if (!std::isfinite(q) || q == 0) return from_double<T>(q, i.round);
            const double rest = std::fma(-q, q, x);
            const bool odd = std::bit_cast<u64>(q) & 1;
            return from_double<T>(rest == 0 || odd ? q : std::nextafter(q, rest > 0 ? HUGE_VAL : 0), i.round);
        }
    }
};
#define PTX_FUNCTION(Name, expression)         \
    struct Name {                              \
        template <class T>                     \
        static T of(T a, const Instr&) {       \
            const double x = to_double(a);     \
            return from_double<T>(expression); \
        }                                      \
    };
PTX_FUNCTION(FRsqrt, 1 / std::sqrt(x))
PTX_FUNCTION(FEx2, std::exp2(x))
PTX_FUNCTION(FLg2, std::log2(x))
PTX_FUNCTION(FSin, std::sin(x))
PTX_FUNCTION(FCos, std::cos(x))
PTX_FUNCTION(FTanh, std::tanh(x))
#undef PTX_FUNCTION
// Sign operations act on the bits, NaN included.
struct FNeg {
    template <class T>
    static T of(T a, const Instr&) {
        return negate(a);
    }
};
struct FAbs {
    template <class T>
    static T of(T a, const Instr&) {
        if constexpr (std::is_floating_point_v<T>) {
            return std::fabs(a);
        } else {
            return {static_cast<u16>(a.bits & 0x7fff)};
        }
    }
};

template <class T>
T flushed(T v, const Instr& i) {
    return i.ftz ? flush(v) : v;
}
template <class T>
T finish(T v, const Instr& i) {
    v = flushed(v, i);
    if (i.sat) {
        const double x = to_double(v);
        v = from_double<T>(std::isnan(x) || x < 0 ? 0.0 : std::min(x, 1.0));
    }
    if (i.relu && !is_nan(v) && to_double(v) < 0) v = from_double<T>(0);
    return v;
}
template <class T, class F, int kOperands>
void floating(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* a = m.in(w, i.s[0]);
    const u64* b = kOperands > 1 ? m.in(w, i.s[1]) : a;
    const u64* c = kOperands > 2 ? m.in(w, i.s[2]) : a;
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        const T x = flushed(get<T>(a[l]), i);
        if constexpr (kOperands == 1) d[l] = put(finish(F::template of<T>(x, i), i));
        if constexpr (kOperands == 2) d[l] = put(finish(F::template of<T>(x, flushed(get<T>(b[l]), i), i), i));
        if constexpr (kOperands == 3)
            d[l] = put(finish(F::template of<T>(x, flushed(get<T>(b[l]), i), flushed(get<T>(c[l]), i), i), i));
    });
}
template <class T, class F, int kOperands>
void packed(Machine& m, Warp& w, const Instr& i, u32 mask) {  // .f16x2, .bf16x2: both halves alike
    const u64* a = m.in(w, i.s[0]);
    const u64* b = kOperands > 1 ? m.in(w, i.s[1]) : a;
    const u64* c = kOperands > 2 ? m.in(w, i.s[2]) : a;
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        u64 result = 0;
        for (int shift = 0; shift < 32; shift += 16) {
            const auto half = [&](const u64* row) { return flushed(get<T>(row[l] >> shift), i); };
            T r;
            if constexpr (kOperands == 1) r = F::template of<T>(half(a), i);
            if constexpr (kOperands == 2) r = F::template of<T>(half(a), half(b), i);
            if constexpr (kOperands == 3) r = F::template of<T>(half(a), half(b), half(c), i);
            result |= put(finish(r, i)) << shift;
        }
        d[l] = result;
    });
}

namespace floating_point {

template <class F, int kOperands>
void decode(Decoder& d, Type type) {
    d.i.round = d.rounding();
    d.take("approx"), d.take("full");
    d.i.ftz = d.take("ftz");
    d.i.sat = d.take("sat");
    d.i.relu = d.take("relu");
    d.expect(kOperands + 1);
    d.destination(0);
    for (int k = 1; k <= kOperands; ++k) d.source(k, type);
    if (type == Type::f16x2) {
        d.i.run = packed<f16, F, kOperands>;
    } else if (type == Type::bf16x2) {
        d.i.run = packed<bf16, F, kOperands>;
    } else if (!with_float(type, [&]<class T>() { d.i.run = floating<T, F, kOperands>; })) {
        d.unsupported_type();
    }
}
inline bool is_floating(Type type) { return is_float_type(type) || type == Type::f16x2 || type == Type::bf16x2; }

inline void decode_add(Decoder& d) {
    if (d.take("cc")) return d.mods.push_back("cc"), integer::decode_carry<false>(d, false);
    const Type type = d.take_type();
    if (is_floating(type)) return decode<FAdd, 2>(d, type);
    if (!d.take("sat")) return integer::arithmetic<Add>(d, type);
    integer::arithmetic<Add>(d, type);
    d.i.run = type == Type::s32 ? binary<s32, s32, s32, AddSat> : nullptr;
}
inline void decode_sub(Decoder& d) {
    if (d.take("cc")) return d.mods.push_back("cc"), integer::decode_carry<true>(d, false);
    const Type type = d.take_type();
    if (is_floating(type)) return decode<FSub, 2>(d, type);
    if (!d.take("sat")) return integer::arithmetic<Sub>(d, type);
    integer::arithmetic<Sub>(d, type);
    d.i.run = type == Type::s32 ? binary<s32, s32, s32, SubSat> : nullptr;
}
inline void decode_addc(Decoder& d) { integer::decode_carry<false>(d, true); }
inline void decode_subc(Decoder& d) { integer::decode_carry<true>(d, true); }
inline void decode_mul(Decoder& d) {
    const Type type = d.take_type();
    if (is_floating(type)) return decode<FMul, 2>(d, type);
    integer::decode_mul(d, type);
}
inline void decode_mad(Decoder& d) {
    if (d.take("cc")) return d.mods.push_back("cc"), integer::decode_mad_carry(d, false);
    const Type type = d.take_type();
    if (is_floating(type)) return decode<FFma, 3>(d, type);
    integer::decode_mad(d, type);
}
inline void decode_madc(Decoder& d) { integer::decode_mad_carry(d, true); }
inline void decode_fma(Decoder& d) { decode<FFma, 3>(d, d.take_type()); }
template <bool kMax>
void decode_min_max(Decoder& d) {
    d.i.a = d.take("NaN");
    const Type type = d.take_type();
    if (is_floating(type)) return decode<FMinMax<kMax>, 2>(d, type);
    if (d.i.a) d.error(".NaN is for floats");
    integer::arithmetic<std::conditional_t<kMax, Max, Min>>(d, type);
}
inline void decode_div(Decoder& d) {
    const Type type = d.take_type();
    if (is_floating(type)) return decode<FDiv, 2>(d, type);
    integer::arithmetic<Div>(d, type);
}
inline void decode_abs(Decoder& d) {
    const Type type = d.take_type();
    if (is_floating(type)) return decode<FAbs, 1>(d, type);
    d.mods.push_back(info(type).name);
    integer::decode_unary<Abs>(d);
}
inline void decode_neg(Decoder& d) {
    const Type type = d.take_type();
    if (is_floating(type)) return decode<FNeg, 1>(d, type);
    d.mods.push_back(info(type).name);
    integer::decode_unary<Neg>(d);
}
template <class F>
void decode_function(Decoder& d) {
    decode<F, 1>(d, d.take_type());
}
inline bool is_class(int what, double x) {
    switch (what) {
        case 0: return std::isfinite(x);
        case 1: return std::isinf(x);
        default: return std::isnan(x);
    }
}
template <class T>
void testp(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64* a = m.in(w, i.s[0]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        const T x = get<T>(a[l]);
        const int kind = std::fpclassify(x);
        switch (i.a) {
            case 3: d[l] = kind != FP_NAN; break;
            case 4: d[l] = kind == FP_NORMAL; break;
            case 5: d[l] = kind == FP_SUBNORMAL; break;
            default: d[l] = is_class(static_cast<int>(i.a), x);
        }
    });
}
inline void decode_testp(Decoder& d) {
    d.i.a = static_cast<u32>(d.need_one({"finite", "infinite", "notanumber", "number", "normal", "subnormal"}));
    const Type type = d.take_type();
    d.expect(2);
    d.destination(0), d.source(1, type);
    d.i.run = type == Type::f64 ? testp<double> : testp<float>;
}
template <class T>
void copysign(Machine& m, Warp& w, const Instr& i, u32 mask) {  // the sign of a on the magnitude of b
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) { d[l] = put(std::copysign(get<T>(b[l]), get<T>(a[l]))); });
}
inline void decode_copysign(Decoder& d) {
    const Type type = d.take_type();
    d.expect(3);
    d.destination(0), d.source(1, type), d.source(2, type);
    d.i.run = type == Type::f64 ? copysign<double> : copysign<float>;
}

}  // namespace floating_point

// ---- Comparison and selection ---------------------------------------------------------------------------------------
// How a stands to b, as a bit; a comparison is the set of bits that make it true.
inline constexpr u32 kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8;
inline constexpr struct {
    const char* name;
    u32 accepts;
} kComparisons[] = {
    {"eq", kEqual},
    {"ne", kLess | kGreater},
    {"lt", kLess},
    {"le", kLess | kEqual},
    {"gt", kGreater},
    {"ge", kGreater | kEqual},
    // of unsigned integers
    {"lo", kLess},
    {"ls", kLess | kEqual},
    {"hi", kGreater},
    {"hs", kGreater | kEqual},
    // of floats, true where one is NaN
    {"equ", kEqual | kUnordered},
    {"neu", kLess | kGreater | kUnordered},
    {"ltu", kLess | kUnordered},
    {"leu", kLess | kEqual | kUnordered},
    {"gtu", kGreater | kUnordered},
    {"geu", kGreater | kEqual | kUnordered},
    {"num", kLess | kEqual | kGreater},
    {"nan", kUnordered},
};

template <class T>
u32 relation(u64 a, u64 b, bool ftz) {
    if constexpr (is_float<T>) {
        T x = get<T>(a), y = get<T>(b);
        if (ftz) x = flush(x), y = flush(y);
        const double p = to_double(x), q = to_double(y);
        return p < q ? kLess : p == q ? kEqual : p > q ? kGreater : kUnordered;
    } else {
        const T x = get<T>(a), y = get<T>(b);
        return x < y ? kLess : x == y ? kEqual : kGreater;
    }
}
// Combination of a comparison with predicate c. i.b: 0 none, 1 and, 2 or, 3 xor.
inline bool combine(u32 how, bool value, bool c) {
    switch (how) {
        case 1: return value && c;
        case 2: return value || c;
        case 3: return value != c;
        default: return value;
    }
}
template <class T>
void setp(Machine& m, Warp& w, const Instr& i, u32 mask) {  // d[0] = (a cmp b) op c, d[1] = !(a cmp b) op c
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = i.b ? m.in(w, i.s[2]) : nullptr;
    u64* p = i.d[0] == kNoRow ? nullptr : m.row(w, i.d[0]);
    u64* q = i.d.size() < 2 || i.d[1] == kNoRow ? nullptr : m.row(w, i.d[1]);
    for_lanes(mask, [&](int l) {
        const bool value = relation<T>(a[l], b[l], i.ftz) & i.a;
        const bool other = c && (c[l] != 0) != (i.negated[2] != 0);
        if (p) p[l] = combine(i.b, value, other);
        if (q) q[l] = combine(i.b, !value, other);
    });
}
template <class T>
void setp_packed(Machine& m, Warp& w, const Instr& i, u32 mask) {  // p of the low halves, q of the high ones
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = i.b ? m.in(w, i.s[2]) : nullptr;
    for (size_t k = 0; k < i.d.size(); ++k) {
        if (i.d[k] == kNoRow) continue;
        u64* d = m.row(w, i.d[k]);
        for_lanes(mask, [&](int l) {
            const bool value = relation<T>(a[l] >> (16 * k), b[l] >> (16 * k), i.ftz) & i.a;
            d[l] = combine(i.b, value, c && (c[l] != 0) != (i.negated[2] != 0));
        });
    }
}
// i.offset: what true is in the destination's type.
template <class T>
void set(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = i.b ? m.in(w, i.s[2]) : nullptr;
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        const bool value = relation<T>(a[l], b[l], i.ftz) & i.a;
        d[l] = combine(i.b, value, c && (c[l] != 0) != (i.negated[2] != 0)) ? static_cast<u64>(i.offset) : 0;
    });
}
template <class T>
void set_packed(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = i.b ? m.in(w, i.s[2]) : nullptr;
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        u64 result = 0;
        for (int shift = 0; shift < 32; shift += 16) {
            const bool value = relation<T>(a[l] >> shift, b[l] >> shift, i.ftz) & i.a;
            if (combine(i.b, value, c && (c[l] != 0) != (i.negated[2] != 0)))
                result |= static_cast<u64>(i.offset) << shift;
        }
        d[l] = result;
    });
}
// selp, slct: only what is selected has to be initialised.
inline void select_rows(Machine& m, Warp& w, const Instr& i, u32 first, u32 second) {
    u64* d = m.row(w, i.d[0]);
    for (int k = 0; k < 2; ++k) {
        const u32 mask = k ? second : first;
        const u64* a = m.in(w, i.s[k]);
        for_lanes(mask, [&](int l) { d[l] = a[l]; });
        const u32 known = i.s[k] >= 0 ? w.initialised[i.s[k]] : kAll;
        w.initialised[i.d[0]] = (w.initialised[i.d[0]] & ~mask) | (known & mask);
    }
}
inline void need(const Warp& w, s32 row, u32 mask) {
    if (row < 0) return;
    if (const u32 missing = mask & ~w.initialised[row])
        fault(std::countr_zero(missing), "uninitialised register", "a source register was never written");
}
inline void selp(Machine& m, Warp& w, const Instr& i, u32 mask) {
    need(w, i.s[2], mask);
    const u64* p = m.in(w, i.s[2]);
    u32 yes = 0;
    for_lanes(mask, [&](int l) { yes |= u32{(p[l] != 0) != (i.negated[2] != 0)} << l; });
    select_rows(m, w, i, yes, mask & ~yes);
}
template <class T>
void slct(Machine& m, Warp& w, const Instr& i, u32 mask) {  // c >= 0 ? a : b
    need(w, i.s[2], mask);
    const u64* c = m.in(w, i.s[2]);
    u32 yes = 0;
    for_lanes(mask, [&](int l) { yes |= u32{get<T>(c[l]) >= 0} << l; });
    select_rows(m, w, i, yes, mask & ~yes);
}

namespace comparison {

inline void take_comparison(Decoder& d) {
    for (const auto& one : kComparisons) {
        if (d.take(one.name)) {
            d.i.a = one.accepts;
            d.i.b = static_cast<u32>(d.take_one({"and", "or", "xor"}) + 1);
            d.i.ftz = d.take("ftz");
            return;
        }
    }
    d.error("lacks a comparison");
}
inline void sources(Decoder& d, Type type) {
    d.expect(d.i.b ? 4 : 3);
    d.source(1, type), d.source(2, type);
    if (d.i.b) d.source(3, Type::pred);
}
inline void decode_setp(Decoder& d) {
    take_comparison(d);
    const Type type = d.take_type();
    d.destinations(0);
    sources(d, type);
    if (type == Type::f16x2) {
        d.i.run = setp_packed<f16>;
    } else if (type == Type::bf16x2) {
        d.i.run = setp_packed<bf16>;
    } else if (!with_integer(type, [&]<class T>() { d.i.run = setp<T>; })) {
        if (!with_float(type, [&]<class T>() { d.i.run = setp<T>; })) d.unsupported_type();
    }
}
inline void decode_set(Decoder& d) {
    take_comparison(d);
    const Type to = d.take_type(), from = d.take_type();
    d.destination(0);
    sources(d, from);
    switch (to) {
        case Type::f32: d.i.offset = 0x3f800000; break;
        case Type::f16:
        case Type::f16x2: d.i.offset = 0x3c00; break;
        case Type::bf16:
        case Type::bf16x2: d.i.offset = 0x3f80; break;
        case Type::u32:
        case Type::s32: d.i.offset = from == Type::f16x2 || from == Type::bf16x2 ? 0xffff : 0xffffffff; break;
        case Type::u16:
        case Type::s16: d.i.offset = 0xffff; break;
        default: d.unsupported_type();
    }
    if (from == Type::f16x2) {
        d.i.run = set_packed<f16>;
    } else if (from == Type::bf16x2) {
        d.i.run = set_packed<bf16>;
    } else if (!with_integer(from, [&]<class T>() { d.i.run = set<T>; })) {
        with_float(from, [&]<class T>() { d.i.run = set<T>; });
    }
}
inline void decode_selp(Decoder& d) {
    const Type type = d.take_type();
    d.expect(4);
    d.destination(0), d.source(1, type), d.source(2, type), d.source(3, Type::pred);
    d.i.copies = true;
    d.i.run = selp;
}
inline void decode_slct(Decoder& d) {
    d.i.ftz = d.take("ftz");
    const Type type = d.take_type(), by = d.take_type();
    d.expect(4);
    d.destination(0), d.source(1, type), d.source(2, type), d.source(3, by);
    d.i.copies = true;
    d.i.run = by == Type::f32 ? slct<float> : slct<s32>;
}

}  // namespace comparison

// ---- cvt ------------------------------------------------------------------------------------------------------------
inline s64 extend(u64 value, Type type) {  // the value of an integer type, as a 64-bit pattern
    const int shift = 64 - 8 * info(type).bytes;
    return is_signed(type) ? static_cast<s64>(value << shift) >> shift : static_cast<s64>(value << shift >> shift);
}
inline double float_value(u64 word, Type type, bool ftz) {
    switch (type) {
        case Type::f16: return to_double(get<f16>(word));
        case Type::bf16: return to_double(get<bf16>(word));
        case Type::f32: return ftz ? flush(get<float>(word)) : get<float>(word);
        default: return get<double>(word);
    }
}
inline u64 float_bits(double x, Type type, Round round, bool ftz) {
    switch (type) {
        case Type::f16: return put(from_double<f16>(x, round));
        case Type::bf16: return put(from_double<bf16>(x, round));
        case Type::f32: {
            const float f = from_double<float>(x, round);
            return put(ftz ? flush(f) : f);
        }
        default: return put(x);
    }
}
inline double to_integral(double x, Round round) {
    switch (round) {
        case Round::kNearest: return std::nearbyint(x);
        case Round::kZero: return std::trunc(x);
        case Round::kDown: return std::floor(x);
        default: return std::ceil(x);
    }
}
// An integer as a double, to odd: bits below the 53 that a double holds become a sticky bit.
inline double integer_value(u64 pattern, bool is_s, Type to, Round round) {
    const bool negative = is_s && static_cast<s64>(pattern) < 0;
    u64 magnitude = negative ? 0 - pattern : pattern;
    if (to == Type::f64)
        return directed(round, [&] {
            const volatile u64 v = magnitude;
            return negative ? -static_cast<double>(v) : static_cast<double>(v);
        });
    if (magnitude >> 50) magnitude = (magnitude & ~u64{0x3fff}) | (magnitude & 0x3fff ? 0x4000 : 0);
    return negative ? -static_cast<double>(magnitude) : static_cast<double>(magnitude);
}
inline void cvt_integer(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const Type to = static_cast<Type>(i.a), from = static_cast<Type>(i.b);
    const u64* a = m.in(w, i.s[0]);
    u64* d = m.row(w, i.d[0]);
    if (!i.sat) {
        const int down = 64 - 8 * info(from).bytes, up = 64 - 8 * info(to).bytes;
        const bool from_s = is_signed(from), to_s = is_signed(to);
        for_lanes(mask, [&](int l) {
            u64 v = a[l] << down;
            v = (from_s ? static_cast<u64>(static_cast<s64>(v) >> down) : v >> down) << up;
            d[l] = (to_s ? static_cast<u64>(static_cast<s64>(v) >> up) : v >> up) & i.d_mask;
        });
        return;
    }
    const int bits = 8 * info(to).bytes;
    const s128 least = is_signed(to) ? -(s128{1} << (bits - 1)) : s128{0};
    const s128 most = (s128{1} << (is_signed(to) ? bits - 1 : bits)) - 1;
    for_lanes(mask, [&](int l) {
        const s64 pattern = extend(a[l], from);
        const s128 v = is_signed(from) ? s128{pattern} : s128{static_cast<u64>(pattern)};
        d[l] = static_cast<u64>(std::clamp(v, least, most)) & i.d_mask;
    });
}
inline void cvt_to_float(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const Type to = static_cast<Type>(i.a), from = static_cast<Type>(i.b);
    const u64* a = m.in(w, i.s[0]);
    u64* d = m.row(w, i.d[0]);
    const bool is_f = is_float_type(from);
    for_lanes(mask, [&](int l) {
        double x;
        if (is_f) {
            x = float_value(a[l], from, i.ftz);
            if (i.is_signed) x = to_integral(x, i.integral);
        } else {
            x = integer_value(static_cast<u64>(extend(a[l], from)), is_signed(from), to, i.round);
        }
        if (i.sat) x = std::isnan(x) || x < 0 ? 0.0 : std::min(x, 1.0);
        if (i.relu && x < 0) x = 0;
        d[l] = float_bits(x, to, i.round, i.ftz);
    });
}
inline void cvt_to_integer(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const Type to = static_cast<Type>(i.a), from = static_cast<Type>(i.b);
    const u64* a = m.in(w, i.s[0]);
    u64* d = m.row(w, i.d[0]);
    const int bits = 8 * info(to).bytes;
    const double least = is_signed(to) ? -std::ldexp(1.0, bits - 1) : 0.0;
    const double beyond = std::ldexp(1.0, is_signed(to) ? bits - 1 : bits);
    const u64 most = mask_of(is_signed(to) ? bits - 1 : bits);
    for_lanes(mask, [&](int l) {
        const double x = to_integral(float_value(a[l], from, i.ftz), i.integral);
        s64 value;
        if (std::isnan(x)) {  // 0, or the top bit where a 64-bit type takes part
            value = from == Type::f64 || bits == 64 ? static_cast<s64>(u64{1} << (bits - 1)) : 0;
            value = extend(static_cast<u64>(value), to);
        } else if (x >= beyond) {
            value = static_cast<s64>(most);
        } else if (x <= least) {
            value = static_cast<s64>(least);
        } else {
            value = is_signed(to) ? static_cast<s64>(x) : static_cast<s64>(static_cast<u64>(x));
        }
        d[l] = static_cast<u64>(value) & i.d_mask;
    });
}
inline void cvt_pack(Machine& m, Warp& w, const Instr& i, u32 mask) {  // d = {a in the high half, b in the low one}
    const Type half = static_cast<Type>(i.a);
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        double x = float_value(a[l], Type::f32, i.ftz), y = float_value(b[l], Type::f32, i.ftz);
        if (i.relu) x = x < 0 ? 0 : x, y = y < 0 ? 0 : y;
        d[l] = float_bits(x, half, i.round, false) << 16 | float_bits(y, half, i.round, false);
    });
}
inline void decode_cvt(Decoder& d) {
    int integral = -1;
    integral = d.take_one({"rni", "rzi", "rmi", "rpi"});
    if (integral >= 0) d.i.integral = static_cast<Round>(integral);
    d.i.round = d.rounding();
    d.i.ftz = d.take("ftz"), d.i.sat = d.take("sat"), d.i.relu = d.take("relu");
    const Type to = d.take_type(), from = d.take_type();
    d.destination(0);
    if (to == Type::f16x2 || to == Type::bf16x2) {
        if (from != Type::f32) d.unsupported_type();
        d.expect(3);
        d.source(1, from), d.source(2, from);
        d.i.a = static_cast<u32>(to == Type::f16x2 ? Type::f16 : Type::bf16);
        d.i.run = cvt_pack;
        return;
    }
    d.expect(2);
    d.source(1, from);
    d.i.a = static_cast<u32>(to), d.i.b = static_cast<u32>(from);
    const bool to_f = is_float_type(to), from_f = is_float_type(from);
    const auto whole = [](Type t) {
        return info(t).bytes <= 8 && t != Type::pred && t != Type::f16x2 && t != Type::bf16x2;
    };
    if (!whole(to) || !whole(from)) d.unsupported_type();
    if (to_f) {
        d.i.is_signed = from_f && integral >= 0;  // rounds to a whole number
        d.i.run = cvt_to_float;
    } else if (from_f) {
        if (integral < 0) d.error("lacks a rounding to integer");
        d.i.run = cvt_to_integer;
    } else {
        d.i.run = cvt_integer;
    }
}

}  // namespace ptx
