// Packing a row with AVX2: compare eight (four) values at a time and gather the masks.
// The twin that says what it computes is pack_row_portable in bits.h.
#pragma once

namespace bitorch_qlinear {
namespace {

// 8 consecutive values as two compare masks: bit i of the result belongs to x[i].
struct Float8 {
    __m256 v;
    template <bool Strict>
    uint32_t signs() const {
        const __m256 zero = _mm256_setzero_ps();
        return static_cast<uint32_t>(
            _mm256_movemask_ps(Strict ? _mm256_cmp_ps(v, zero, _CMP_GT_OQ) : _mm256_cmp_ps(v, zero, _CMP_NLT_UQ)));
    }
    uint32_t in_range(__m256 threshold) const {
        const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(magnitude, threshold, _CMP_LE_OQ)));
    }
    static __m256 broadcast(double threshold) { return _mm256_set1_ps(static_cast<float>(threshold)); }
};

struct Double8 {
    __m256d low, high;
    template <bool Strict>
    uint32_t signs() const {
        const __m256d zero = _mm256_setzero_pd();
        const auto mask = [&](__m256d v) {
            return static_cast<uint32_t>(
                _mm256_movemask_pd(Strict ? _mm256_cmp_pd(v, zero, _CMP_GT_OQ) : _mm256_cmp_pd(v, zero, _CMP_NLT_UQ)));
        };
        return mask(low) | mask(high) << 4;
    }
    uint32_t in_range(__m256d threshold) const {
        const auto mask = [&](__m256d v) {
            const __m256d magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), v);
            return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(magnitude, threshold, _CMP_LE_OQ)));
        };
        return mask(low) | mask(high) << 4;
    }
    static __m256d broadcast(double threshold) { return _mm256_set1_pd(threshold); }
};

inline Float8 load8(const float* x) { return {_mm256_loadu_ps(x)}; }
inline Double8 load8(const double* x) { return {_mm256_loadu_pd(x), _mm256_loadu_pd(x + 4)}; }
inline Float8 load8(const Half* x) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))}; }
inline Float8 load8(const BFloat16* x) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16))};
}

// Whole words by vectors; the last, partial one by the twin.
template <class T, bool Strict, bool InRange>
inline void pack_words(const T* x, int64_t k, double threshold, uint32_t* words, uint32_t* in_range) {
    const auto limit = decltype(load8(x))::broadcast(threshold);
    const int64_t whole = k / kWordBits;
    for (int64_t w = 0; w < whole; ++w) {
        uint32_t signs = 0, range = 0;
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            const auto values = load8(x + w * kWordBits + 8 * i);
            signs |= values.template signs<Strict>() << (8 * i);
            if (InRange) range |= values.in_range(limit) << (8 * i);
        }
        words[w] = signs;
        if (InRange) in_range[w] = range;
    }
    if (k % kWordBits) {
        pack_row_portable<T>(x + whole * kWordBits, k % kWordBits, Strict, threshold, words + whole,
                             InRange ? in_range + whole : nullptr);
    }
}

template <class T>
void pack_row_avx2(const void* row, int64_t k, bool strict, double threshold, uint32_t* words, uint32_t* in_range) {
    const T* x = static_cast<const T*>(row);
    if (in_range) {
        strict ? pack_words<T, true, true>(x, k, threshold, words, in_range)
               : pack_words<T, false, true>(x, k, threshold, words, in_range);
    } else {
        strict ? pack_words<T, true, false>(x, k, threshold, words, in_range)
               : pack_words<T, false, false>(x, k, threshold, words, in_range);
    }
}

}  // namespace
}  // namespace bitorch_qlinear
