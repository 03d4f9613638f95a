// Packs a row with NEON, 32 values at a time. Its twin, which defines what it computes, is pack_row_portable in
// pack_portable.h.
#pragma once

// Included behind arm_neon.h.
#include "pack_portable.h"

namespace bitorch_qlinear {
namespace {

// Narrows the masks of 16 values to a byte each: it keeps every other part of two vectors until the masks are bytes.
inline uint8x16_t narrow(const uint16x8_t* masks) {
    return vuzp1q_u8(vreinterpretq_u8_u16(masks[0]), vreinterpretq_u8_u16(masks[1]));
}
inline uint8x16_t narrow(const uint32x4_t* masks) {
    uint16x8_t halves[2];
    for (int i = 0; i < 2; ++i) {
        halves[i] = vuzp1q_u16(vreinterpretq_u16_u32(masks[2 * i]), vreinterpretq_u16_u32(masks[2 * i + 1]));
    }
    return narrow(halves);
}
inline uint8x16_t narrow(const uint64x2_t* masks) {
    uint32x4_t halves[4];
    for (int i = 0; i < 4; ++i) {
        halves[i] = vuzp1q_u32(vreinterpretq_u32_u64(masks[2 * i]), vreinterpretq_u32_u64(masks[2 * i + 1]));
    }
    return narrow(halves);
}

// Joins 32 masks of a byte into a word: each byte keeps one bit, and eight neighbours are added up.
inline uint32_t join(uint8x16_t low, uint8x16_t high) {
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t sums = vpaddq_u8(vandq_u8(low, bit), vandq_u8(high, bit));
    sums = vpaddq_u8(sums, sums);
    sums = vpaddq_u8(sums, sums);
    return vgetq_lane_u32(vreinterpretq_u32_u8(sums), 0);
}

// Makes the word of 32 values by a test that turns the first values at an address into a vector of masks.
template <class T, class Test>
inline uint32_t word_of(const T* x, const Test& test) {
    using Masks = decltype(test(x));
    constexpr int kCount = sizeof(Masks) / sizeof(test(x)[0]), kVectors = 16 / kCount;
    Masks masks[2][kVectors];
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < kVectors; ++i) masks[half][i] = test(x + 16 * half + kCount * i);
    }
    return join(narrow(masks[0]), narrow(masks[1]));
}

// signs() tests v < 0 (Negative) or v > 0 by the bit pattern (is_positive), which behind the sign lies between 1 and
// infinity. Everything is unsigned, because gcc's vsubq_s64 is a subtraction of C++, whose overflow is undefined.

template <bool Negative>
inline uint64x2_t sign_masks(const double* x) {
    const uint64x2_t bits = vld1q_u64(reinterpret_cast<const uint64_t*>(x));
    return vcltq_u64(vsubq_u64(bits, vdupq_n_u64((Negative ? uint64_t{1} << 63 : 0) + 1)),
                     vdupq_n_u64(0x7FF0000000000000));
}
template <bool Negative>
inline uint32x4_t sign_masks(const float* x) {
    const uint32x4_t bits = vld1q_u32(reinterpret_cast<const uint32_t*>(x));
    return vcltq_u32(vsubq_u32(bits, vdupq_n_u32((Negative ? 0x80000000 : 0) + 1)), vdupq_n_u32(0x7F800000));
}
template <bool Negative, uint16_t Infinity>
inline uint16x8_t sign_masks_16(const void* x) {
    const uint16x8_t bits = vld1q_u16(static_cast<const uint16_t*>(x));
    return vcltq_u16(vsubq_u16(bits, vdupq_n_u16((Negative ? 0x8000 : 0) + 1)), vdupq_n_u16(Infinity));
}
template <bool Negative>
inline uint16x8_t sign_masks(const Half* x) {
    return sign_masks_16<Negative, 0x7C00>(x);
}
template <bool Negative>
inline uint16x8_t sign_masks(const BFloat16* x) {
    return sign_masks_16<Negative, 0x7F80>(x);
}

template <bool Negative, class T>
inline uint32_t signs(const T* x) {
    return word_of(x, [](const T* from) { return sign_masks<Negative>(from); });
}

// in_range() tests |v| <= threshold of 32 values, and above() v > limit; NaN is neither in range nor above.

inline float32x4_t load4(const float* x) { return vld1q_f32(x); }
inline float32x4_t load4(const Half* x) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(x))));
}
inline float32x4_t load4(const BFloat16* x) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(x)), 16));
}

template <class T>
inline uint32_t in_range(const T* x, double threshold) {
    const float32x4_t limit = vdupq_n_f32(static_cast<float>(threshold));
    return word_of(x, [&](const T* from) { return vcleq_f32(vabsq_f32(load4(from)), limit); });
}
inline uint32_t in_range(const double* x, double threshold) {
    const float64x2_t limit = vdupq_n_f64(threshold);
    return word_of(x, [&](const double* from) { return vcleq_f64(vabsq_f64(vld1q_f64(from)), limit); });
}

template <class T>
inline uint32_t above(const T* x, double limit) {
    const float32x4_t bound = vdupq_n_f32(static_cast<float>(limit));
    return word_of(x, [&](const T* from) { return vcgtq_f32(load4(from), bound); });
}
inline uint32_t above(const double* x, double limit) {
    const float64x2_t bound = vdupq_n_f64(limit);
    return word_of(x, [&](const double* from) { return vcgtq_f64(vld1q_f64(from), bound); });
}

}  // namespace
}  // namespace bitorch_qlinear

#include "pack_whole_words.h"
