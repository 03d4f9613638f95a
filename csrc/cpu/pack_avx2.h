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

template <bool Negative, class T>
inline uint32_t signs(const T* x) {
    const __m256i offset = _mm256_set1_epi16(Negative ? -1 : INT16_MAX),
                  infinity = _mm256_set1_epi16(static_cast<int16_t>(INT16_MIN | Pattern<T>::kInfinity));
    const auto inside = [&](const __m256i* from) {
        return _mm256_cmpgt_epi16(infinity, _mm256_add_epi16(_mm256_loadu_si256(from), offset));
    };
    const __m256i* halves = reinterpret_cast<const __m256i*>(x);
    // The permutation is that of join().
    const __m256i bytes = _mm256_packs_epi16(inside(halves), inside(halves + 1));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xD8)));
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

// Limits tests order(x[i]) >= order(limits[i]) (pack_portable.h) of 32 values. Signed patterns are in order if they are
// not negative, and in the opposite order if they are. So the bits behind the sign of a pattern and of its limit are
// both inverted if the limit is negative, and then the two are compared: if only one of them is negative, its sign
// decides. The bit of a NaN does not depend on its limit: NanTest finds out whether any of the values that it is given
// is a NaN, and nans() which.

template <class T>
struct Limits;
template <class T>
struct NanTest;

inline __m256i load_bits(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

template <>
struct Limits<float> {
    explicit Limits(const float* from) {
        for (int i = 0; i < 4; ++i) {
            const __m256i bits = load_bits(from + 8 * i);
            inverted[i] = _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1);
            limits[i] = _mm256_xor_si256(bits, inverted[i]);
        }
    }
    uint32_t reached_by(const float* x) const {
        __m256i below[4];
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            below[i] = _mm256_cmpgt_epi32(limits[i], _mm256_xor_si256(load_bits(x + 8 * i), inverted[i]));
        }
        return ~join(below);
    }
    __m256i inverted[4], limits[4];
};
template <>
struct NanTest<float> {
    NanTest() : unordered(_mm256_setzero_ps()) {}
    void add(const float* x) {
        const __m256 low = _mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _CMP_UNORD_Q);
        const __m256 high = _mm256_cmp_ps(_mm256_loadu_ps(x + 16), _mm256_loadu_ps(x + 24), _CMP_UNORD_Q);
        unordered = _mm256_or_ps(unordered, _mm256_or_ps(low, high));
    }
    bool found() const { return _mm256_movemask_ps(unordered) != 0; }
    __m256 unordered;
};
inline uint32_t nans(const float* x) {
    __m256i masks[4];
    for (int i = 0; i < 4; ++i) {
        const __m256 v = _mm256_loadu_ps(x + 8 * i);
        masks[i] = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    return join(masks);
}

template <>
struct Limits<double> {
    explicit Limits(const double* from) {
        for (int i = 0; i < 8; ++i) {
            const __m256i bits = load_bits(from + 4 * i);
            inverted[i] = _mm256_srli_epi64(_mm256_cmpgt_epi64(_mm256_setzero_si256(), bits), 1);
            limits[i] = _mm256_xor_si256(bits, inverted[i]);
        }
    }
    uint32_t reached_by(const double* x) const {
        uint32_t below = 0;
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 8; ++i) {
            const __m256i mask = _mm256_cmpgt_epi64(limits[i], _mm256_xor_si256(load_bits(x + 4 * i), inverted[i]));
            below |= static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(mask))) << (4 * i);
        }
        return ~below;
    }
    __m256i inverted[8], limits[8];
};
template <>
struct NanTest<double> {
    NanTest() : unordered(_mm256_setzero_pd()) {}
    void add(const double* x) {
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 32; i += 8) {
            const __m256d two = _mm256_cmp_pd(_mm256_loadu_pd(x + i), _mm256_loadu_pd(x + i + 4), _CMP_UNORD_Q);
            unordered = _mm256_or_pd(unordered, two);
        }
    }
    bool found() const { return _mm256_movemask_pd(unordered) != 0; }
    __m256d unordered;
};
inline uint32_t nans(const double* x) {
    uint32_t word = 0;
    for (int i = 0; i < 8; ++i) {
        const __m256d v = _mm256_loadu_pd(x + 4 * i);
        word |= static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(v, v, _CMP_UNORD_Q))) << (4 * i);
    }
    return word;
}

// Joins two vectors of 16 masks into a word. The permutation is that of join().
inline uint32_t join_16(__m256i low, __m256i high) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8)));
}

// This one is for the half types.
template <class T>
struct Limits {
    explicit Limits(const T* from) {
        for (int i = 0; i < 2; ++i) {
            const __m256i bits = load_bits(from + 16 * i);
            inverted[i] = _mm256_srli_epi16(_mm256_srai_epi16(bits, 15), 1);
            limits[i] = _mm256_xor_si256(bits, inverted[i]);
        }
    }
    uint32_t reached_by(const T* x) const {
        const auto below = [&](int i) {
            const __m256i bits = load_bits(x + 16 * i);
            return _mm256_cmpgt_epi16(limits[i], _mm256_xor_si256(bits, inverted[i]));
        };
        return ~join_16(below(0), below(1));
    }
    __m256i inverted[2], limits[2];
};
inline __m256i magnitudes_16(const void* x) { return _mm256_and_si256(load_bits(x), _mm256_set1_epi16(INT16_MAX)); }
template <class T>
struct NanTest {
    NanTest() : largest(_mm256_setzero_si256()) {}
    void add(const T* x) {
        largest = _mm256_max_epi16(largest, _mm256_max_epi16(magnitudes_16(x), magnitudes_16(x + 16)));
    }
    bool found() const {
        return _mm256_movemask_epi8(_mm256_cmpgt_epi16(largest, _mm256_set1_epi16(Pattern<T>::kInfinity))) != 0;
    }
    __m256i largest;
};
template <class T>
inline uint32_t nans(const T* x) {
    const __m256i infinity = _mm256_set1_epi16(Pattern<T>::kInfinity);
    return join_16(_mm256_cmpgt_epi16(magnitudes_16(x), infinity), _mm256_cmpgt_epi16(magnitudes_16(x + 16), infinity));
}

}  // namespace
}  // namespace bitorch_qlinear

#include "pack_whole_words.h"
