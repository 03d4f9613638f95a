// Packs a row with AVX2, 32 values at a time. Its twin, which defines what it computes, is pack_row_portable in
// pack_portable.h.
#pragma once

// Included inside the AVX2 region, behind the intrinsics.
#include "pack_portable.h"

namespace bitorch_qlinear {
namespace {

// signs() tests v < 0 (Negative) or v > 0 by the bit pattern (is_positive): behind the sign it lies between 1 and
// infinity, so pattern - 1 < infinity as unsigned integers. AVX2 compares signed ones, so the upper bit of both sides
// is inverted. 32 values give a word, whose bit i belongs to x[i].

// Joins 32 masks, 8 in each vector, into a word. They are packed into bytes for one movemask, which is half as fast as
// a comparison.
inline uint32_t join(const __m256i* masks) {
    // Packing keeps the 128-bit halves apart; the permutation puts their quarters in order.
    const __m256i bytes =
        _mm256_packs_epi16(_mm256_packs_epi32(masks[0], masks[1]), _mm256_packs_epi32(masks[2], masks[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(bytes, order)));
}

template <bool Negative>
inline uint32_t signs(const float* x) {
    const __m256i offset = _mm256_set1_epi32(Negative ? -1 : INT32_MAX),
                  infinity = _mm256_set1_epi32(INT32_MIN | 0x7F800000);
    __m256i inside[4];
    BITORCH_QLINEAR_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * i));
        inside[i] = _mm256_cmpgt_epi32(infinity, _mm256_add_epi32(bits, offset));
    }
    return join(inside);
}

template <bool Negative>
inline uint32_t signs(const double* x) {
    const __m256i offset = _mm256_set1_epi64x(Negative ? -1 : INT64_MAX);
    const __m256i infinity = _mm256_set1_epi64x(INT64_MIN | 0x7FF0000000000000);
    uint32_t word = 0;
    BITORCH_QLINEAR_UNROLL
    for (int i = 0; i < 8; ++i) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 4 * i));
        const __m256i inside = _mm256_cmpgt_epi64(infinity, _mm256_add_epi64(bits, offset));
        word |= static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(inside))) << (4 * i);
    }
    return word;
}

template <bool Negative, int Infinity>
inline uint32_t signs_16(const void* x) {
    const __m256i offset = _mm256_set1_epi16(Negative ? -1 : INT16_MAX),
                  infinity = _mm256_set1_epi16(static_cast<int16_t>(INT16_MIN | Infinity));
    const auto inside = [&](const __m256i* from) {
        return _mm256_cmpgt_epi16(infinity, _mm256_add_epi16(_mm256_loadu_si256(from), offset));
    };
    const __m256i* halves = static_cast<const __m256i*>(x);
    // The permutation is that of join().
    const __m256i bytes = _mm256_packs_epi16(inside(halves), inside(halves + 1));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8)));
}
template <bool Negative>
inline uint32_t signs(const Half* x) {
    return signs_16<Negative, 0x7C00>(x);
}
template <bool Negative>
inline uint32_t signs(const BFloat16* x) {
    return signs_16<Negative, 0x7F80>(x);
}

// in_range() tests |v| <= threshold of 32 values, and above() v > limit; NaN is neither in range nor above.

inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
inline __m256 load8(const Half* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
inline __m256 load8(const BFloat16* x) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

template <class T>
inline uint32_t in_range(const T* x, double threshold) {
    const __m256 limit = _mm256_set1_ps(static_cast<float>(threshold));
    __m256i inside[4];
    BITORCH_QLINEAR_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), load8(x + 8 * i));
        inside[i] = _mm256_castps_si256(_mm256_cmp_ps(magnitude, limit, _CMP_LE_OQ));
    }
    return join(inside);
}

inline uint32_t in_range(const double* x, double threshold) {
    const __m256d limit = _mm256_set1_pd(threshold);
    uint32_t word = 0;
    BITORCH_QLINEAR_UNROLL
    for (int i = 0; i < 8; ++i) {
        const __m256d magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), _mm256_loadu_pd(x + 4 * i));
        word |= static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(magnitude, limit, _CMP_LE_OQ))) << (4 * i);
    }
    return word;
}

template <class T>
inline uint32_t above(const T* x, double limit) {
    const __m256 bound = _mm256_set1_ps(static_cast<float>(limit));
    __m256i beyond[4];
    BITORCH_QLINEAR_UNROLL
    for (int i = 0; i < 4; ++i) beyond[i] = _mm256_castps_si256(_mm256_cmp_ps(load8(x + 8 * i), bound, _CMP_GT_OQ));
    return join(beyond);
}

inline uint32_t above(const double* x, double limit) {
    const __m256d bound = _mm256_set1_pd(limit);
    uint32_t word = 0;
    BITORCH_QLINEAR_UNROLL
    for (int i = 0; i < 8; ++i) {
        const __m256d beyond = _mm256_cmp_pd(_mm256_loadu_pd(x + 4 * i), bound, _CMP_GT_OQ);
        word |= static_cast<uint32_t>(_mm256_movemask_pd(beyond)) << (4 * i);
    }
    return word;
}

}  // namespace
}  // namespace bitorch_qlinear

#include "pack_whole_words.h"
