// Real values by signs: y[m][n] = sum over k of x[m][k] * s[k][n], with s = +-1 as packed bits.
//
// The sum has one fixed order, so that neither the instruction set nor the number of threads shows in a result. K is
// cut into PASSES of 30 values and these into five groups of 6, whose signed sum is made from two halves:
//
//     half   h = (+-x0 +- x1) +- x2
//     group  t = h(x0, x1, x2) + h(x3, x4, x5)
//     pass   p = (((t0 + t1) + t2) + t3) + t4
//     span   sum of up to 64 passes, in order
//     y      sum of the spans, in order
//
// each sum rounded once, in double for float64 and in float for the other types; values past K are +0 with the bit 0.
// A term goes through at most d = 2 + 1 + 4 + 63 + ceil(K / 1920) - 1 additions, so with u = 2^-24 (float64: 2^-53)
//
//     |error| <= d u / (1 - d u) * sum |x|                      and one more rounding for the half types
//
// (a BLAS adds one after another at least what one block of its K holds). No sum is made by taking away what was added
// before: infinities and NaN come out as in any other order, but that a finite sum may overflow in one and not in
// another.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../packed.h"
#include "range.h"

namespace bitorch_qlinear {

constexpr int kGroupBits = 6;
constexpr int kGroups = 5;
constexpr int64_t kPassValues = kGroupBits * kGroups;
constexpr int64_t kPassesPerSpan = 64;
// Rows that are computed together: as many as fill a cache line.
static constexpr int64_t row_tile(DType dtype) { return dtype == DType::float64 ? 8 : 16; }

struct SignProduct {
    // x[i][j] lies at i * row_stride + j * value_stride, in values; one of the two is 1.
    const void* x;
    DType dtype;
    int64_t m, k, row_stride, value_stride;
    // n is along the bits: [k][words_for(n)]; or where transposed, k is: [n][words_for(k)]. Both row-major, contiguous.
    const uint32_t* words;
    bool transposed;
    int64_t n;
    void* y;  // [m][n], contiguous, of the same type as x
};

static inline int64_t count_passes(const SignProduct& product) { return ceil_div(product.k, kPassValues); }

struct FloatByBits {
    // From this many outputs on, and half as many values of K, it is faster than unpacking the signs and the BLAS.
    int64_t least_outputs;
    // codes[pass][n]: bit i is the sign of s[30 pass + i][n], 0 past k.
    void (*make_codes)(const SignProduct&, Range passes, uint32_t* codes);
    int64_t (*workspace_bytes)(const SignProduct&, int64_t columns);
    // Computes y[rows][columns], of at most row_tile rows; workspace is aligned to 64 bytes and private to the call.
    void (*multiply)(const SignProduct&, const uint32_t* codes, Range rows, Range columns, uint8_t* workspace);
};

extern const FloatByBits kScalarFloatByBits;
#if defined(__x86_64__)
extern const FloatByBits kAvx2FloatByBits;
#endif

// Anonymous on purpose: a file compiled for another instruction set must keep its own copy.
namespace {

// The bits [begin, begin + 30) of a row of k bits, 0 past k.
inline uint32_t bits_at(const uint32_t* row, int64_t begin, int64_t k) {
    const int64_t word = begin / kWordBits, shift = begin % kWordBits, left = k - begin;
    uint64_t bits = row[word];
    if (shift > kWordBits - kPassValues && word + 1 < words_for(k)) bits |= uint64_t{row[word + 1]} << kWordBits;
    const int64_t valid = left < kPassValues ? left : kPassValues;
    return static_cast<uint32_t>(bits >> shift) & ((uint32_t{1} << valid) - 1);
}

inline void make_codes_transposed(const SignProduct& product, Range passes, uint32_t* codes) {
    constexpr int64_t kLine = 16;  // codes a cache line: rows are read, and lines written, in whole
    for (int64_t begin = 0; begin < product.n; begin += kLine) {
        const int64_t end = product.n - begin < kLine ? product.n : begin + kLine;
        for (int64_t pass = passes.begin; pass < passes.end; ++pass) {
            for (int64_t i = begin; i < end; ++i) {
                const uint32_t* row = product.words + i * words_for(product.k);
                codes[pass * product.n + i] = bits_at(row, pass * kPassValues, product.k);
            }
        }
    }
}

}  // namespace
}  // namespace bitorch_qlinear
