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

// Limits tests order(x[i]) >= order(limits[i]) (pack_portable.h) of 32 values. Signed patterns are in order if they are
// not negative, and in the opposite order if they are. So the bits behind the sign of a pattern and of its limit are
// both inverted if the limit is negative, and then the two are compared: if only one of them is negative, its sign
// decides. The bit of a NaN does not depend on its limit: NanTest finds out whether any of the values that it is given
// is a NaN, and nans() which.

inline int64x2_t load_patterns(const double* x) { return vld1q_s64(reinterpret_cast<const int64_t*>(x)); }
inline int32x4_t load_patterns(const float* x) { return vld1q_s32(reinterpret_cast<const int32_t*>(x)); }
inline int16x8_t load_patterns(const Half* x) { return vld1q_s16(reinterpret_cast<const int16_t*>(x)); }
inline int16x8_t load_patterns(const BFloat16* x) { return vld1q_s16(reinterpret_cast<const int16_t*>(x)); }

// Returns the bits behind the sign, set if the sign is.
inline int64x2_t behind_sign(int64x2_t bits) {
    return vreinterpretq_s64_u64(vshrq_n_u64(vreinterpretq_u64_s64(vshrq_n_s64(bits, 63)), 1));
}
inline int32x4_t behind_sign(int32x4_t bits) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(vshrq_n_s32(bits, 31)), 1));
}
inline int16x8_t behind_sign(int16x8_t bits) {
    return vreinterpretq_s16_u16(vshrq_n_u16(vreinterpretq_u16_s16(vshrq_n_s16(bits, 15)), 1));
}

inline uint64x2_t is_at_least(int64x2_t a, int64x2_t b) { return vcgeq_s64(a, b); }
inline uint32x4_t is_at_least(int32x4_t a, int32x4_t b) { return vcgeq_s32(a, b); }
inline uint16x8_t is_at_least(int16x8_t a, int16x8_t b) { return vcgeq_s16(a, b); }

inline uint64x2_t nan_masks(const double* x) {
    const uint64x2_t bits = vld1q_u64(reinterpret_cast<const uint64_t*>(x));
    return vcgtq_u64(vandq_u64(bits, vdupq_n_u64(INT64_MAX)), vdupq_n_u64(Pattern<double>::kInfinity));
}
inline uint32x4_t nan_masks(const float* x) {
    const uint32x4_t bits = vld1q_u32(reinterpret_cast<const uint32_t*>(x));
    return vcgtq_u32(vandq_u32(bits, vdupq_n_u32(INT32_MAX)), vdupq_n_u32(Pattern<float>::kInfinity));
}
template <class T>
inline uint16x8_t nan_masks(const T* x) {
    const uint16x8_t bits = vld1q_u16(reinterpret_cast<const uint16_t*>(x));
    return vcgtq_u16(vandq_u16(bits, vdupq_n_u16(INT16_MAX)), vdupq_n_u16(Pattern<T>::kInfinity));
}

template <class T>
struct Limits {
    using Patterns = decltype(load_patterns(static_cast<const T*>(nullptr)));
    static constexpr int kCount = 16 / sizeof(T), kVectors = kWordBits / kCount;

    explicit Limits(const T* from) {
        for (int i = 0; i < kVectors; ++i) {
            const Patterns bits = load_patterns(from + kCount * i);
            inverted[i] = behind_sign(bits);
            limits[i] = bits ^ inverted[i];
        }
    }
    uint32_t reached_by(const T* x) const {
        return word_of(x, [&](const T* from) {
            const int64_t i = (from - x) / kCount;
            return is_at_least(load_patterns(from) ^ inverted[i], limits[i]);
        });
    }
    Patterns inverted[kVectors], limits[kVectors];
};

template <class T>
inline uint32_t nans(const T* x) {
    return word_of(x, [](const T* from) { return nan_masks(from); });
}
template <class T>
struct NanTest {
    void add(const T* x) {
        for (int i = 0; i < kWordBits; i += static_cast<int>(16 / sizeof(T))) masks |= nan_masks(x + i);
    }
    bool found() const { return vmaxvq_u32(reinterpret_cast<uint32x4_t>(masks)) != 0; }
    decltype(nan_masks(static_cast<const T*>(nullptr))) masks{};
};

}  // namespace
}  // namespace bitorch_qlinear

#include "pack_whole_words.h"
