// The portable packing and unpacking of a row, which every instruction set's version must equal.
#pragma once

#include <cstdint>
#include <limits>

#include "../dtype.h"
#include "../packed.h"
#include "levels.h"
#include "limits.h"

namespace bitorch_qlinear {
namespace {

// Returns |v| for every type that widen() returns; NaN stays NaN.
inline double absolute(double v) { return v < 0 ? -v : v; }
inline float absolute(float v) { return v < 0 ? -v : v; }

// Tests v > 0 and v < 0 by the bit pattern. A comparison of floats takes denormals for zero in threads that flush them,
// and results would depend on the thread.
inline bool is_positive(float v) { return float_bits(v) - 1 < 0x7F800000u; }
inline bool is_negative(float v) { return is_positive(bits_float(float_bits(v) ^ 0x80000000u)); }
inline bool is_positive(double v) { return double_bits(v) - 1 < 0x7FF0000000000000u; }
inline bool is_negative(double v) { return is_positive(bits_double(double_bits(v) ^ 0x8000000000000000u)); }

// Returns the bits of values [begin, end) of a row, with the first at bit 0; end - begin <= 32.
template <class T>
inline uint32_t sign_bits(const T* x, int64_t begin, int64_t end, bool strict) {
    uint32_t word = 0;
    for (int64_t i = begin; i < end; ++i) {
        const auto v = widen(x[i]);
        word |= static_cast<uint32_t>(strict ? is_positive(v) : !is_negative(v)) << (i - begin);
    }
    return word;
}

template <class T>
inline uint32_t in_range_bits(const T* x, int64_t begin, int64_t end, decltype(widen(T{})) threshold) {
    uint32_t word = 0;
    for (int64_t i = begin; i < end; ++i) {
        word |= static_cast<uint32_t>(absolute(widen(x[i])) <= threshold) << (i - begin);
    }
    return word;
}

template <class T>
void pack_row_portable(const void* row, int64_t k, bool strict, double threshold, uint32_t* words, uint32_t* in_range) {
    using Wide = decltype(widen(T{}));
    const T* x = static_cast<const T*>(row);
    for (int64_t w = 0; w < words_for(k); ++w) {
        const int64_t begin = w * kWordBits, end = k - begin < kWordBits ? k : begin + kWordBits;
        words[w] = sign_bits(x, begin, end, strict);
        if (in_range) in_range[w] = in_range_bits(x, begin, end, static_cast<Wide>(threshold));
    }
}

// Returns the words of up to 32 values' levels, and whether one of the values is NaN.
template <class T>
inline LevelWords level_words_portable(const T* x, int64_t count, int bits) {
    LevelWords words{0, 0, false};
    for (int64_t i = 0; i < count; ++i) {
        const auto v = widen(x[i]);
        uint32_t level = 0;
        for (int j = 0; j < steps_of(bits); ++j) level += v > level_limit<T>(bits, j);
        words.low |= (level & 1) << i;
        words.high |= level >> 1 << i;
        words.nan |= v != v;
    }
    return words;
}

template <class T>
bool pack_levels_portable(const void* row, int64_t k, int bits, uint32_t* planes, int64_t stride) {
    const T* x = static_cast<const T*>(row);
    bool nan = false;
    for (int64_t w = 0; w < words_for(k); ++w) {
        const int64_t begin = w * kWordBits, end = k - begin < kWordBits ? k : begin + kWordBits;
        const LevelWords words = level_words_portable(x + begin, end - begin, bits);
        planes[w] = words.low;
        if (bits == 2) planes[stride + w] = words.high;
        nan |= words.nan;
    }
    return nan;
}

// A float type's bit pattern as a signed integer, and the pattern of infinity: greater magnitudes are NaN.
template <class T>
struct Pattern;
template <>
struct Pattern<double> {
    using Int = int64_t;
    static constexpr Int kInfinity = 0x7FF0000000000000;
};
template <>
struct Pattern<float> {
    using Int = int32_t;
    static constexpr Int kInfinity = 0x7F800000;
};
template <>
struct Pattern<Half> {
    using Int = int16_t;
    static constexpr Int kInfinity = 0x7C00;
};
template <>
struct Pattern<BFloat16> {
    using Int = int16_t;
    static constexpr Int kInfinity = 0x7F80;
};

template <class T>
inline typename Pattern<T>::Int pattern_of(const T& value) {
    typename Pattern<T>::Int pattern;
    memcpy(&pattern, &value, sizeof pattern);
    return pattern;
}

// Returns the integer of a pattern that has its place in the order of patterns: behind the sign, a negative value's
// bits count downwards.
template <class Int>
inline Int order(Int pattern) {
    return static_cast<Int>(pattern < 0 ? pattern ^ std::numeric_limits<Int>::max() : pattern);
}

template <class T>
inline bool is_nan(T value) {
    return (pattern_of(value) & std::numeric_limits<typename Pattern<T>::Int>::max()) > Pattern<T>::kInfinity;
}

// Returns the bits of at most 32 values by their limits, with the first at bit 0.
template <class T>
inline uint32_t limit_bits(const T* x, const T* limits, int64_t count, uint32_t flips, bool strict) {
    uint32_t word = 0;
    for (int64_t i = 0; i < count; ++i) {
        const bool reached = order(pattern_of(x[i])) >= order(pattern_of(limits[i]));
        const bool bit = is_nan(x[i]) ? !strict : reached != static_cast<bool>(flips >> i & 1);
        word |= static_cast<uint32_t>(bit) << i;
    }
    return word;
}

template <class T>
void pack_limited_rows_portable(const LimitedRows& job) {
    const T* limits = static_cast<const T*>(job.limits);
    const int64_t width = words_for(job.k);
    for (int64_t row = 0; row < job.rows; ++row) {
        const T* x = static_cast<const T*>(job.x) + row * job.stride;
        for (int64_t w = 0; w < width; ++w) {
            const int64_t begin = w * kWordBits, count = job.k - begin < kWordBits ? job.k - begin : kWordBits;
            job.words[row * width + w] =
                limit_bits(x + begin, limits + begin, count, job.flips ? job.flips[w] : 0, job.strict);
        }
    }
}

// Writes `zero` for bit 0 and `one` for bit 1, both given as the output's bit patterns.
template <class T>
inline void unpack_patterns(const uint32_t* words, int64_t k, void* data, T zero, T one) {
    T* out = static_cast<T*>(data);
    for (int64_t begin = 0; begin < k; begin += kWordBits) {
        const uint32_t word = words[begin / kWordBits];
        const int64_t size = k - begin < kWordBits ? k - begin : kWordBits;
        for (int64_t i = 0; i < size; ++i) out[begin + i] = (word >> i & 1) ? one : zero;
    }
}

inline void unpack_row_portable(const uint32_t* words, int64_t k, void* out, DType dtype) {
    switch (dtype) {
        case DType::float64: return unpack_patterns<uint64_t>(words, k, out, 0xBFF0000000000000u, 0x3FF0000000000000u);
        case DType::float32: return unpack_patterns<uint32_t>(words, k, out, 0xBF800000u, 0x3F800000u);
        case DType::float16: return unpack_patterns<uint16_t>(words, k, out, 0xBC00u, 0x3C00u);
        case DType::bfloat16: return unpack_patterns<uint16_t>(words, k, out, 0xBF80u, 0x3F80u);
        case DType::int32: return unpack_patterns<uint32_t>(words, k, out, 0xFFFFFFFFu, 1u);
        case DType::int8: return unpack_patterns<uint8_t>(words, k, out, 0xFFu, 1u);
        case DType::boolean: return unpack_patterns<uint8_t>(words, k, out, 0u, 1u);
    }
}

}  // namespace
}  // namespace bitorch_qlinear
