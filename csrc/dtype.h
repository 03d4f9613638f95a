// Element types as the torch-free kernels see them, and how the two half types become float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace bitorch_qlinear {

// The four floating types come first, because they index the record's table of packing functions.
enum class DType : int { float64, float32, float16, bfloat16, int32, int8, boolean };
constexpr int kFloatTypes = 4;

static constexpr int64_t element_size(DType dtype) {
    switch (dtype) {
        case DType::float64: return 8;
        case DType::float32:
        case DType::int32: return 4;
        case DType::float16:
        case DType::bfloat16: return 2;
        default: return 1;
    }
}

// The half types hold their bit patterns. They are distinct types so that overloads can tell them apart.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// The namespace is anonymous, because a file compiled for another instruction set must keep its own copy.
namespace {

inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint64_t double_bits(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline double bits_double(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline double widen(double value) { return value; }
inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return bits_float(uint32_t{value.bits} << 16); }

// Widens IEEE 754 binary16 to binary32: 5 exponent bits with bias 15 become 8 with bias 127. The magnitude is shifted
// into place, and 112 is added to its exponent. A subnormal is converted as an integer and scaled by 2^-24 instead,
// because a processor that flushes subnormal floats would lose it.
inline float widen(Half value) {
    const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
    const uint32_t magnitude = value.bits & 0x7FFFu;
    if (magnitude >= 0x7C00u) return bits_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    const float absolute = magnitude < 0x400u ? static_cast<float>(magnitude) * 0x1p-24f
                                              : bits_float((magnitude << 13) + (uint32_t{112} << 23));
    return bits_float(sign | float_bits(absolute));
}

inline void narrow(double value, double* out) { *out = value; }
inline void narrow(float value, float* out) { *out = value; }

// Rounds binary32 to bfloat16, to nearest, ties to even; every NaN becomes the quiet 0x7FC0.
inline void narrow(float value, BFloat16* out) {
    const uint32_t bits = float_bits(value);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    out->bits = nan ? uint16_t{0x7FC0} : static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Rounds binary32 to binary16, to nearest, ties to even; what rounds beyond 65504 becomes infinity.
inline void narrow(float value, Half* out) {
    const uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
        half = 0x7E00u;
    } else if (magnitude >= 0x47800000u) {  // 65536 and above
        half = 0x7C00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 aligns the subnormal's last bit
        half = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
    } else {  // rebias, then round at bit 13; a carry into the exponent is the right answer
        half = (magnitude - (uint32_t{112} << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace bitorch_qlinear
