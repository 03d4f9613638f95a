// From popcounts to outputs: the last step of every kernel.
//
// With a, b in {-1, +1}^K as bits, the positions that differ contribute -1 and the others +1:
//     dot(a, b) = (K - popcount(a ^ b)) - popcount(a ^ b) = K - 2 popcount(a ^ b)
// which is exact in int32. Then, with T = double for a float64 output and float otherwise,
//     y = narrow(T(dot) * T(scale) + T(bias))
// where the product and the sum each round once (this library is compiled without contraction into
// fused multiply-adds) and narrow() rounds once more for the half types. An int32 output is dot itself.
//
// An output may instead be one bit, popcount(a ^ b) <= limit, or its opposite: what a sign makes of any function of dot
// that changes at most once. Such outputs are packed words along N, in the form in which the next product reads them.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "packed.h"

namespace bitorch_qlinear {

// The results y[m][n], contiguous. bias and scale hold n values of T, or are null.
//
// If limits is not null, it holds n values and y is words [m][words_for(n)]: bit n of a row is (popcount <= limits[n])
// XOR bit n of flips (null means that no bit is flipped), and bits past n are 0. dtype is then int32.
struct Output {
    void* data;
    DType dtype;
    int64_t n;
    int32_t k;
    const void* bias;
    const void* scale;
    const int32_t* limits = nullptr;
    const uint32_t* flips = nullptr;
};

namespace {

// The loop has no branches, so that the compiler vectorizes it for the including file's own target. (K - p) - p cannot
// overflow.
template <class T, bool Scale, bool Bias, class Out>
inline void write_floats(int32_t k, const T* __restrict scale, const T* __restrict bias,
                         const int32_t* __restrict popcounts, int64_t count, Out* __restrict out) {
    for (int64_t j = 0; j < count; ++j) {
        T value = static_cast<T>(k - popcounts[j] - popcounts[j]);
        if (Scale) value *= scale[j];
        if (Bias) value += bias[j];
        narrow(value, out + j);
    }
}

template <class T, class Out>
inline void write_floats(const Output& y, int64_t row, int64_t column, const int32_t* popcounts, int64_t count) {
    Out* out = static_cast<Out*>(y.data) + row * y.n + column;
    const T* scale = y.scale ? static_cast<const T*>(y.scale) + column : nullptr;
    const T* bias = y.bias ? static_cast<const T*>(y.bias) + column : nullptr;
    if (scale) {
        bias ? write_floats<T, true, true>(y.k, scale, bias, popcounts, count, out)
             : write_floats<T, true, false>(y.k, scale, bias, popcounts, count, out);
    } else {
        bias ? write_floats<T, false, true>(y.k, scale, bias, popcounts, count, out)
             : write_floats<T, false, false>(y.k, scale, bias, popcounts, count, out);
    }
}

// Writes one word of bits for each 32 popcounts. The column is a multiple of 32, and so is `count`, unless it reaches
// to the end of the row: then every word is written as a whole.
inline void write_bits(const Output& y, int64_t row, int64_t column, const int32_t* popcounts, int64_t count) {
    uint32_t* out = static_cast<uint32_t*>(y.data) + row * words_for(y.n) + column / kWordBits;
    const int32_t* limits = y.limits + column;
    for (int64_t word = 0; word < words_for(count); ++word, popcounts += kWordBits, limits += kWordBits) {
        const int64_t bits = count - word * kWordBits < kWordBits ? count - word * kWordBits : kWordBits;
        uint32_t value = y.flips ? y.flips[column / kWordBits + word] & word_mask(word, count) : 0;
        for (int64_t j = 0; j < bits; ++j) value ^= static_cast<uint32_t>(popcounts[j] <= limits[j]) << j;
        out[word] = value;
    }
}

// Writes y[row][column .. column + count) from `count` popcounts of a ^ b. If y is bits, write_bits says which columns.
inline void write_outputs(const Output& y, int64_t row, int64_t column, const int32_t* popcounts, int64_t count) {
    switch (y.dtype) {
        case DType::float64: return write_floats<double, double>(y, row, column, popcounts, count);
        case DType::float32: return write_floats<float, float>(y, row, column, popcounts, count);
        case DType::float16: return write_floats<float, Half>(y, row, column, popcounts, count);
        case DType::bfloat16: return write_floats<float, BFloat16>(y, row, column, popcounts, count);
        default: {
            if (y.limits) return write_bits(y, row, column, popcounts, count);
            int32_t* out = static_cast<int32_t*>(y.data) + row * y.n + column;
            for (int64_t j = 0; j < count; ++j) out[j] = y.k - popcounts[j] - popcounts[j];
        }
    }
}

}  // namespace
}  // namespace bitorch_qlinear
