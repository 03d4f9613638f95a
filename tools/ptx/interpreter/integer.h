// PTX ISA, sections "Integer Arithmetic Instructions", "Extended-Precision Integer Arithmetic Instructions" and "Logic
// and Shift Instructions". Additions of floats share the names add, sub, mul, ...: floating.h.
#pragma once
#include "decoder.h"

namespace ptx {

// Arithmetic wraps, in the unsigned type, because PTX defines overflow.
#define PTX_WRAPPING(Name, expression)                              \
    struct Name {                                                   \
        template <class T>                                          \
        static T of(T sa, T sb) {                                   \
            using U = std::conditional_t<sizeof(T) == 8, u64, u32>; \
            const U a = static_cast<U>(sa), b = static_cast<U>(sb); \
            return static_cast<T>(expression);                      \
        }                                                           \
    };
PTX_WRAPPING(Add, a + b)
PTX_WRAPPING(Sub, a - b)
PTX_WRAPPING(MulLo, a* b)
PTX_WRAPPING(And, a& b)
PTX_WRAPPING(Or, a | b)
PTX_WRAPPING(Xor, a ^ b)
#undef PTX_WRAPPING

struct MulHi {
    template <class T>
    static T of(T a, T b) {
        return static_cast<T>(static_cast<Wide<T>>(static_cast<Wide<T>>(a) * b) >> (8 * sizeof(T)));
    }
};
struct MulWide {
    template <class T>
    static Wide<T> of(T a, T b) {
        return static_cast<Wide<T>>(static_cast<Wide<T>>(a) * b);
    }
};
struct Mul24Lo {  // the low 32 bits of the 48-bit product of 24-bit operands
    template <class T>
    static T of(T a, T b) {
        const s64 x = std::is_signed_v<T> ? s64(s32(u32(a) << 8) >> 8) : s64(u32(a) & 0xffffff);
        const s64 y = std::is_signed_v<T> ? s64(s32(u32(b) << 8) >> 8) : s64(u32(b) & 0xffffff);
        return static_cast<T>(x * y);
    }
};
// d = Product(a, b) + c
template <class Product>
struct Mad {
    template <class T, class C>
    static C of(T a, T b, C c) {
        return Add::of<C>(static_cast<C>(Product::template of<T>(a, b)), c);
    }
};
struct MadHiSat {
    template <class T>
    static T of(T a, T b, T c) {
        const s64 sum = s64{MulHi::of<T>(a, b)} + c;
        return static_cast<T>(std::clamp<s64>(sum, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
    }
};
struct AddSat {  // .sat exists for s32 only
    template <class T>
    static T of(T a, T b) {
        return static_cast<T>(std::clamp<s64>(s64{a} + b, INT32_MIN, INT32_MAX));
    }
};
struct SubSat {
    template <class T>
    static T of(T a, T b) {
        return static_cast<T>(std::clamp<s64>(s64{a} - b, INT32_MIN, INT32_MAX));
    }
};
struct Div {  // the ISA leaves a division by zero open; the hardware gives all ones
    template <class T>
    static T of(T a, T b) {
        if (b == 0) return static_cast<T>(-1);
        if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub::of<T>(0, a);
        return static_cast<T>(a / b);
    }
};
struct Rem {
    template <class T>
    static T of(T a, T b) {
        if (b == 0) return a;
        if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
        return static_cast<T>(a % b);
    }
};
struct Min {
    template <class T>
    static T of(T a, T b) {
        return std::min(a, b);
    }
};
struct Max {
    template <class T>
    static T of(T a, T b) {
        return std::max(a, b);
    }
};
struct Abs {
    template <class T>
    static T of(T a) {
        return a < 0 ? Sub::of<T>(0, a) : a;
    }
};
struct Neg {
    template <class T>
    static T of(T a) {
        return Sub::of<T>(0, a);
    }
};
struct Not {
    template <class T>
    static T of(T a) {
        return static_cast<T>(~a);
    }
};
struct NotPredicate {
    template <class T>
    static T of(T a) {
        return static_cast<T>(!a);
    }
};
struct Cnot {
    template <class T>
    static T of(T a) {
        return a == 0;
    }
};
struct Sad {  // c + |a - b|
    template <class T, class C>
    static T of(T a, T b, C c) {
        return Add::of<T>(c, a < b ? Sub::of<T>(b, a) : Sub::of<T>(a, b));
    }
};
struct Shl {  // amounts past the width are clamped to it
    template <class T>
    static T of(T a, u32 by) {
        return by >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<Unsigned<T>>(a) << by);
    }
};
struct Shr {
    template <class T>
    static T of(T a, u32 by) {
        constexpr u32 width = 8 * sizeof(T);
        if (by >= width) return a < 0 ? static_cast<T>(-1) : T{0};
        return static_cast<T>(a >> by);
    }
};
template <bool kLeft, bool kClamp>
struct Shf {  // the funnel shift of [b:a]
    template <class T>
    static T of(T a, T b, u32 c) {
        const u32 n = kClamp ? std::min<u32>(c, 32) : c & 31;
        const u64 both = u64{b} << 32 | a;
        return static_cast<T>(kLeft ? both << n >> 32 : both >> n);
    }
};
struct Popc {
    template <class T>
    static u32 of(T a) {
        return static_cast<u32>(std::popcount(a));
    }
};
struct Clz {
    template <class T>
    static u32 of(T a) {
        return static_cast<u32>(std::countl_zero(a));
    }
};
struct Brev {
    template <class T>
    static T of(T a) {
        T r = 0;
        for (size_t k = 0; k < 8 * sizeof(T); ++k) r |= (a >> k & 1) << (8 * sizeof(T) - 1 - k);
        return r;
    }
};
template <bool kShiftAmount>
struct Bfind {  // position of the most significant bit that differs from the sign; -1 if there is none
    template <class T>
    static u32 of(T a) {
        constexpr int width = 8 * sizeof(T);
        const Unsigned<T> bits = static_cast<Unsigned<T>>(a < 0 ? ~a : a);
        if (bits == 0) return kAll;
        const int at = width - 1 - std::countl_zero(bits);
        return static_cast<u32>(kShiftAmount ? width - 1 - at : at);
    }
};
struct Bfe {  // "bfe": field of c bits at bit b, with the sign of its top bit (clamped to the msb) for signed types
    template <class T>
    static T of(T a, u32 b, u32 c) {
        constexpr u32 msb = 8 * sizeof(T) - 1;
        const u32 pos = b & 0xff, len = c & 0xff;
        const u64 bits = static_cast<Unsigned<T>>(a);
        bool sign = false;
        if (std::is_signed_v<T> && len != 0) sign = bits >> std::min(pos + len - 1, msb) & 1;
        u64 d = 0;
        for (u32 k = 0; k <= msb; ++k) d |= u64{k < len && pos + k <= msb ? (bits >> (pos + k) & 1) != 0 : sign} << k;
        return static_cast<T>(d);
    }
};
template <class T>
void bfi(Machine& m, Warp& w, const Instr& i, u32 mask) {  // d = b with the low `len` bits of a at bit `pos`
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = m.in(w, i.s[2]), *n = m.in(w, i.s[3]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        const u32 pos = c[l] & 0xff, len = n[l] & 0xff;
        u64 f = b[l];
        for (u32 k = 0; k < len && pos + k < 8 * sizeof(T); ++k)
            f = (f & ~(u64{1} << (pos + k))) | ((a[l] >> k & 1) << (pos + k));
        d[l] = f;
    });
}
template <class T>
void lop3(Machine& m, Warp& w, const Instr& i, u32 mask) {  // i.a: the table, bit index = a:b:c
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = m.in(w, i.s[2]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        u64 r = 0;
        for (int k = 0; k < 8; ++k)
            if (i.a >> k & 1) r |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
        d[l] = r & 0xffffffffu;
    });
}
// prmt: each nibble of c selects one of the eight bytes {b, a}; bit 3 of the nibble replicates that byte's sign.
inline u32 permute(u32 a, u32 b, u32 c, int mode) {
    const u64 bytes = u64{b} << 32 | a;
    const auto byte = [&](u32 k) { return static_cast<u32>(bytes >> (8 * (k & 7)) & 0xff); };
    u32 d = 0;
    for (u32 k = 0; k < 4; ++k) {
        u32 v;
        switch (mode) {
            case 0: v = byte((c & 3) + k); break;            // f4e
            case 1: v = byte((c & 3) - k); break;            // b4e
            case 2: v = byte(c & 3); break;                  // rc8
            case 3: v = byte(std::max(c & 3, k)); break;     // ecl
            case 4: v = byte(std::min(c & 3, k)); break;     // ecr
            case 5: v = byte((c & 1) * 2 + (k & 1)); break;  // rc16
            default: {
                const u32 nibble = c >> (4 * k) & 15;
                v = byte(nibble);
                if (nibble & 8) v = v & 0x80 ? 0xff : 0;
            }
        }
        d |= v << (8 * k);
    }
    return d;
}
inline void prmt(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = m.in(w, i.s[2]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) { d[l] = permute(u32(a[l]), u32(b[l]), u32(c[l]), static_cast<int>(i.a)); });
}
template <bool kSignedA, bool kSignedB>
void dp4a(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = m.in(w, i.s[2]);
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        u32 sum = static_cast<u32>(c[l]);
        for (int k = 0; k < 4; ++k) {
            const u8 x = static_cast<u8>(a[l] >> (8 * k)), y = static_cast<u8>(b[l] >> (8 * k));
            sum += static_cast<u32>((kSignedA ? s8(x) : s32{x}) * (kSignedB ? s8(y) : s32{y}));
        }
        d[l] = sum;
    });
}
template <class T, bool kClamp>
struct Szext {  // sign- or zero-extension of the low b bits
    template <class U>
    static U of(U a, u32 b) {
        const u32 n = kClamp ? std::min<u32>(b, 32) : b & 31;
        if (n == 0) return 0;
        return static_cast<U>(std::is_signed_v<T> ? s64(u64(u32(a)) << (64 - n)) >> (64 - n)
                                                  : s64(u64(u32(a)) << (64 - n) >> (64 - n)));
    }
};

// Extended precision: add, sub and mad use the carry flag. i.a says that it comes in, i.b that it goes out; kProduct is
// 0 for no product, 1 for its low and 2 for its high half.
template <class T, bool kSubtract, int kProduct>
void carrying(Machine& m, Warp& w, const Instr& i, u32 mask) {
    const u64 *a = m.in(w, i.s[0]), *b = m.in(w, i.s[1]), *c = kProduct ? m.in(w, i.s[2]) : nullptr;
    u64* d = m.row(w, i.d[0]);
    for_lanes(mask, [&](int l) {
        T x = get<T>(a[l]), y = get<T>(b[l]);
        if (kProduct) {
            x = kProduct == 1 ? MulLo::of<T>(x, y) : MulHi::of<T>(x, y);
            y = get<T>(c[l]);
        }
        using U = Unsigned<T>;
        const u128 carry = i.a ? w.carry >> l & 1 : 0;
        const u128 sum = kSubtract ? u128{U(x)} - U(y) - carry : u128{U(x)} + U(y) + carry;
        d[l] = put(static_cast<U>(sum));
        if (i.b) w.carry = (w.carry & ~(1u << l)) | static_cast<u32>(sum >> (8 * sizeof(T)) & 1) << l;
    });
}

namespace integer {

template <class F>
void arithmetic(Decoder& d, Type type) {
    d.expect(3);
    d.destination(0), d.source(1, type), d.source(2, type);
    if (!with_integer(type, [&]<class T>() { d.i.run = binary<T, T, T, F>; })) d.unsupported_type();
}
template <bool kSubtract>
void decode_carry(Decoder& d, bool carry_in) {
    d.i.a = carry_in;
    d.i.b = d.take("cc");
    const Type type = d.take_type();
    d.expect(3);
    d.destination(0), d.source(1, type), d.source(2, type);
    with_integer(type, [&]<class T>() { d.i.run = carrying<T, kSubtract, 0>; });
}
inline void decode_mad_carry(Decoder& d, bool carry_in) {
    d.i.a = carry_in;
    d.i.b = d.take("cc");
    const bool hi = d.need_one({"lo", "hi"}) == 1;
    const Type type = d.take_type();
    d.expect(4);
    d.destination(0), d.source(1, type), d.source(2, type), d.source(3, type);
    with_integer(type, [&]<class T>() { d.i.run = hi ? carrying<T, false, 2> : carrying<T, false, 1>; });
}
template <class F>
void decode_unary(Decoder& d) {
    const Type type = d.take_type();
    d.expect(2);
    d.destination(0), d.source(1, type);
    if (!with_integer(type, [&]<class T>() { d.i.run = unary<T, T, F>; })) d.unsupported_type();
}
template <class F>
void decode_binary(Decoder& d) {
    arithmetic<F>(d, d.take_type());
}
// popc, clz and bfind have results of 32 bits for operands of any width.
template <class F>
void decode_count(Decoder& d) {
    const Type type = d.take_type();
    d.expect(2);
    d.destination(0), d.source(1, type);
    if (type == Type::b64) {
        d.i.run = unary<u32, u64, F>;
    } else if (type == Type::b32) {
        d.i.run = unary<u32, u32, F>;
    } else {
        d.unsupported_type();
    }
}
inline void decode_bfind(Decoder& d) {
    const bool amount = d.take("shiftamt");
    const Type type = d.take_type();
    d.expect(2);
    d.destination(0), d.source(1, type);
    with_integer(type, [&]<class T>() { d.i.run = amount ? unary<u32, T, Bfind<true>> : unary<u32, T, Bfind<false>>; });
}
inline void decode_brev(Decoder& d) {
    const Type type = d.take_type();
    d.destination(0), d.source(1, type);
    d.i.run = type == Type::b64 ? unary<u64, u64, Brev> : unary<u32, u32, Brev>;
}
// and, or, xor and not work on predicates as on words; a predicate is 0 or 1.
template <class F>
void decode_logic(Decoder& d) {
    const Type type = d.take_type();
    d.expect(3);
    d.destination(0), d.source(1, type), d.source(2, type);
    if (type == Type::pred) {
        if (d.i.negated[0] || d.i.negated[1]) d.error("a negated operand");
        d.i.run = binary<u8, u8, u8, F>;
    } else if (!with_integer(type, [&]<class T>() { d.i.run = binary<T, T, T, F>; })) {
        d.unsupported_type();
    }
}
inline void decode_not(Decoder& d) {
    const Type type = d.take_type();
    d.expect(2);
    d.destination(0), d.source(1, type);
    if (type == Type::pred) {
        d.i.run = unary<u8, u8, NotPredicate>;
    } else if (!with_integer(type, [&]<class T>() { d.i.run = unary<T, T, Not>; })) {
        d.unsupported_type();
    }
}
template <class F>
void decode_shift(Decoder& d) {
    const Type type = d.take_type();
    d.expect(3);
    d.destination(0), d.source(1, type), d.source(2, Type::u32);
    if (!with_integer(type, [&]<class T>() { d.i.run = binary<T, T, u32, F>; })) d.unsupported_type();
}
inline void decode_shf(Decoder& d) {
    const bool left = d.need_one({"r", "l"}) == 1, clamp = d.need_one({"wrap", "clamp"}) == 1;
    if (d.take_type() != Type::b32) d.unsupported_type();
    d.expect(4);
    d.destination(0), d.source(1, Type::u32), d.source(2, Type::u32), d.source(3, Type::u32);
    d.i.run =
        left ? (clamp ? ternary<u32, u32, u32, u32, Shf<true, true>> : ternary<u32, u32, u32, u32, Shf<true, false>>)
             : (clamp ? ternary<u32, u32, u32, u32, Shf<false, true>> : ternary<u32, u32, u32, u32, Shf<false, false>>);
}
inline void decode_lop3(Decoder& d) {
    if (d.take_type() != Type::b32) d.unsupported_type();
    d.expect(5);
    d.destination(0), d.source(1, Type::b32), d.source(2, Type::b32), d.source(3, Type::b32);
    d.i.a = static_cast<u32>(d.immediate(4));
    d.i.run = lop3<u32>;
}
inline void decode_prmt(Decoder& d) {
    if (d.take_type() != Type::b32) d.unsupported_type();
    const int mode = d.take_one({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
    d.i.a = mode < 0 ? 6 : static_cast<u32>(mode);
    d.expect(4);
    d.destination(0), d.source(1, Type::b32), d.source(2, Type::b32), d.source(3, Type::b32);
    d.i.run = prmt;
}
inline void decode_bfe(Decoder& d) {
    const Type type = d.take_type();
    d.expect(4);
    d.destination(0), d.source(1, type), d.source(2, Type::u32), d.source(3, Type::u32);
    with_integer(type, [&]<class T>() { d.i.run = ternary<T, T, u32, u32, Bfe>; });
}
inline void decode_bfi(Decoder& d) {
    const Type type = d.take_type();
    d.expect(5);
    d.destination(0), d.source(1, type), d.source(2, type), d.source(3, Type::u32), d.source(4, Type::u32);
    with_integer(type, [&]<class T>() { d.i.run = bfi<T>; });
}
inline void decode_dp4a(Decoder& d) {
    const bool a = is_signed(d.take_type()), b = is_signed(d.take_type());
    d.expect(4);
    d.destination(0), d.source(1, Type::b32), d.source(2, Type::b32), d.source(3, Type::b32);
    d.i.run = a ? (b ? dp4a<true, true> : dp4a<true, false>) : (b ? dp4a<false, true> : dp4a<false, false>);
}
inline void decode_sad(Decoder& d) {
    const Type type = d.take_type();
    d.expect(4);
    d.destination(0), d.source(1, type), d.source(2, type), d.source(3, type);
    with_integer(type, [&]<class T>() { d.i.run = ternary<T, T, T, T, Sad>; });
}
inline void decode_szext(Decoder& d) {
    const bool clamp = d.need_one({"wrap", "clamp"}) == 1;
    const bool is_s = is_signed(d.take_type());
    d.expect(3);
    d.destination(0), d.source(1, Type::b32), d.source(2, Type::u32);
    d.i.run = is_s ? (clamp ? binary<u32, u32, u32, Szext<s32, true>> : binary<u32, u32, u32, Szext<s32, false>>)
                   : (clamp ? binary<u32, u32, u32, Szext<u32, true>> : binary<u32, u32, u32, Szext<u32, false>>);
}
inline void decode_mul24(Decoder& d) {
    if (!d.take("lo")) d.error("only .lo is known");
    const Type type = d.take_type();
    d.expect(3);
    d.destination(0), d.source(1, type), d.source(2, type);
    d.i.run = is_signed(type) ? binary<s32, s32, s32, Mul24Lo> : binary<u32, u32, u32, Mul24Lo>;
}
// mul and mad of integers take a half (.lo, .hi) or the whole (.wide) of the product.
inline void decode_mul(Decoder& d, Type type) {
    const int part = d.need_one({"lo", "hi", "wide"});
    d.expect(3);
    d.destination(0), d.source(1, type), d.source(2, type);
    with_integer(type, [&]<class T>() {
        if (part == 0) d.i.run = binary<T, T, T, MulLo>;
        if (part == 1) d.i.run = binary<T, T, T, MulHi>;
        if constexpr (sizeof(T) == 2 || sizeof(T) == 4)
            if (part == 2) d.i.run = binary<Wide<T>, T, T, MulWide>;
    });
}
inline void decode_mad(Decoder& d, Type type) {
    const int part = d.need_one({"lo", "hi", "wide"});
    const bool sat = d.take("sat");
    d.expect(4);
    Type wide = type;
    if (part == 2) wide = info(type).bytes == 2 ? Type::u32 : Type::u64;
    d.destination(0), d.source(1, type), d.source(2, type), d.source(3, wide);
    with_integer(type, [&]<class T>() {
        if (part == 0) d.i.run = ternary<T, T, T, T, Mad<MulLo>>;
        if (part == 1) d.i.run = ternary<T, T, T, T, Mad<MulHi>>;
        if constexpr (sizeof(T) == 2 || sizeof(T) == 4)
            if (part == 2) d.i.run = ternary<Wide<T>, T, T, Wide<T>, Mad<MulWide>>;
    });
    if (sat) {
        if (part != 1 || type != Type::s32) d.error(".sat is for .hi.s32");
        d.i.run = ternary<s32, s32, s32, s32, MadHiSat>;
    }
}

}  // namespace integer
}  // namespace ptx
