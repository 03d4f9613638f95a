// Values in registers: types of the PTX ISA (section "Types", Fundamental and Packed) and their exact arithmetic.
// A register is 64 bits wide here; a value lies in its low bits, the rest is zero.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u128 = unsigned __int128;
using s128 = __int128;

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

enum class Round { kNearest, kZero, kDown, kUp };

// Rounds x to a format of `digits` significant bits whose smallest normal number is 2^min_exponent; beyond `largest`
// the result is infinity, or `largest` where the direction says so. Exact: x is a double, and so is the result.
inline double round_to(double x, int digits, int min_exponent, double largest, Round mode) {
    if (x == 0 || !std::isfinite(x)) return x;
    const int exponent = std::max(std::ilogb(x), min_exponent);
    const double unit = std::ldexp(1.0, exponent - digits + 1);
    const double scaled = std::fabs(x) / unit;  // a power of two: exact
    double whole = std::floor(scaled);
    const double rest = scaled - whole;
    const bool negative = std::signbit(x);
    bool up = false;
    switch (mode) {
        case Round::kNearest: up = rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2) == 1); break;
        case Round::kZero: break;
        case Round::kDown: up = negative && rest > 0; break;
        case Round::kUp: up = !negative && rest > 0; break;
    }
    double result = (whole + (up ? 1 : 0)) * unit;
    if (result > largest) {
        const bool clamp =
            mode == Round::kZero || (mode == Round::kDown && !negative) || (mode == Round::kUp && negative);
        result = clamp ? largest : std::numeric_limits<double>::infinity();
    }
    return negative ? -result : result;
}

// a + b in double, rounded to odd: a later rounding to 50 bits or fewer is then as of the exact sum.
inline double add_to_odd(double a, double b) {
    const double sum = a + b;
    if (!std::isfinite(sum)) return sum;
    const double b_part = sum - a;
    const double error = (a - (sum - b_part)) + (b - b_part);
    if (error == 0 || (std::bit_cast<u64>(sum) & 1)) return sum;
    return std::nextafter(sum, error > 0 ? HUGE_VAL : -HUGE_VAL);
}

inline constexpr double kLargestF16 = 65504;
inline const double kLargestBf16 = std::ldexp(255.0, 120);
inline const double kLargestF32 = std::numeric_limits<float>::max();

inline double decode_f16(f16 v) {
    const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
    double x;
    if (exponent == 31) {
        x = fraction ? std::numeric_limits<double>::quiet_NaN() : HUGE_VAL;
    } else {
        x = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    }
    return v.bits >> 15 ? -x : x;
}
inline double to_double(f16 v) {
    static const std::vector<float> values = [] {
        std::vector<float> all(65536);
        for (u32 bits = 0; bits < 65536; ++bits) all[bits] = static_cast<float>(decode_f16({static_cast<u16>(bits)}));
        return all;
    }();
    return values[v.bits];
}
inline double to_double(bf16 v) { return std::bit_cast<float>(u32{v.bits} << 16); }
inline double to_double(float v) { return v; }
inline double to_double(double v) { return v; }

// One rounding of a double (itself exact, or rounded to odd) to T. NaN becomes the ISA's canonical NaN.
template <class T>
T from_double(double x, Round mode = Round::kNearest);
template <>
inline f16 from_double<f16>(double x, Round mode) {
    if (std::isnan(x)) return {0x7fff};
    x = round_to(x, 11, -14, kLargestF16, mode);
    const u16 sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (std::isinf(x)) return {static_cast<u16>(sign | 0x7c00)};
    if (x < std::ldexp(1.0, -14)) return {static_cast<u16>(sign | static_cast<u16>(std::ldexp(x, 24)))};
    const int exponent = std::ilogb(x);
    return {static_cast<u16>(sign | ((exponent + 15) << 10) | (static_cast<u16>(std::ldexp(x, 10 - exponent)) & 1023))};
}
template <>
inline bf16 from_double<bf16>(double x, Round mode) {
    if (std::isnan(x)) return {0x7fff};
    const float f = static_cast<float>(round_to(x, 8, -126, kLargestBf16, mode));
    return {static_cast<u16>(std::bit_cast<u32>(f) >> 16)};
}
template <>
inline float from_double<float>(double x, Round mode) {
    if (std::isnan(x)) return std::bit_cast<float>(0x7fffffffu);
    return static_cast<float>(round_to(x, 24, -126, kLargestF32, mode));
}
template <>
inline double from_double<double>(double x, Round) {
    return x;
}

template <class T>
inline constexpr bool is_float = std::is_floating_point_v<T> || std::is_same_v<T, f16> || std::is_same_v<T, bf16>;

// Subnormal numbers of f32 become zero of the same sign (.ftz); other types have no .ftz that changes f32 rules.
template <class T>
T flush(T v) {
    if constexpr (std::is_same_v<T, float>) {
        if (std::fpclassify(v) == FP_SUBNORMAL) return std::copysign(0.0f, v);
    } else if constexpr (std::is_same_v<T, f16>) {
        if ((v.bits & 0x7c00) == 0) return {static_cast<u16>(v.bits & 0x8000)};
    }
    return v;
}

template <class T>
T get(u64 word) {
    T v;
    std::memcpy(&v, &word, sizeof(T));
    return v;
}
template <class T>
u64 put(T v) {
    u64 word = 0;
    std::memcpy(&word, &v, sizeof(T));
    return word;
}

inline u64 mask_of(int bits) { return bits >= 64 ? ~u64{0} : (u64{1} << bits) - 1; }

enum class Type {
    kNone,
    u8,
    u16,
    u32,
    u64,
    s8,
    s16,
    s32,
    s64,
    b8,
    b16,
    b32,
    b64,
    b128,
    f16,
    f16x2,
    bf16,
    bf16x2,
    f32,
    f64,
    pred
};

struct TypeInfo {
    const char* name;
    Type type;
    int bytes;
};
inline constexpr TypeInfo kTypes[] = {
    {"u8", Type::u8, 1},         {"u16", Type::u16, 2}, {"u32", Type::u32, 4},   {"u64", Type::u64, 8},
    {"s8", Type::s8, 1},         {"s16", Type::s16, 2}, {"s32", Type::s32, 4},   {"s64", Type::s64, 8},
    {"b8", Type::b8, 1},         {"b16", Type::b16, 2}, {"b32", Type::b32, 4},   {"b64", Type::b64, 8},
    {"b128", Type::b128, 16},    {"f16", Type::f16, 2}, {"bf16", Type::bf16, 2}, {"f16x2", Type::f16x2, 4},
    {"bf16x2", Type::bf16x2, 4}, {"f32", Type::f32, 4}, {"f64", Type::f64, 8},   {"pred", Type::pred, 1},
};
inline Type type_named(const std::string& name) {
    for (const auto& t : kTypes)
        if (name == t.name) return t.type;
    return Type::kNone;
}
inline const TypeInfo& info(Type type) {
    for (const auto& t : kTypes)
        if (type == t.type) return t;
    throw std::runtime_error("no type");
}
inline bool is_signed(Type t) { return t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64; }
inline bool is_float_type(Type t) { return t == Type::f16 || t == Type::bf16 || t == Type::f32 || t == Type::f64; }

}  // namespace ptx
