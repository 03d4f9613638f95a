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
// (a BLAS adds at least the values of one block of its K one after another). No sum is computed by subtracting what was
// added before, so infinities and NaN come out as in any other order, except that a finite sum may overflow in one
// order and not in another.
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
// Codes are made for blocks of this many columns; 16 passes are 480 bits, whole words of K.
constexpr int64_t kCodeColumns = kWordBits;
constexpr int64_t kCodePasses = 16;
// Returns how many rows are computed together: as many as fill a cache line.
static constexpr int64_t row_tile(DType dtype) { return dtype == DType::float64 ? 8 : 16; }

struct SignProduct {
    // x[i][j] lies at i * row_stride + j * value_stride, in values; one of the two is 1.
    const void* x;
    DType dtype;
    int64_t m, k, row_stride, value_stride;
    // The bits run along n, [k][words_for(n)], or if transposed along k, [n][words_for(k)]; row-major and contiguous.
    const uint32_t* words;
    bool transposed;
    int64_t n;
    void* y;  // [m][n], contiguous, of the same type as x
};

static inline int64_t count_passes(const SignProduct& product) { return ceil_div(product.k, kPassValues); }

// Makes the codes of 32 columns: bit j of codes[pass - passes.begin][i] is the sign of s[30 pass + j][column + i], 0
// past k and n. `column` is a multiple of 32, passes.begin of 16.
using BlockCodes = void (*)(const SignProduct&, Range passes, int64_t column, uint32_t* codes);

struct SignGemm {
    // From this many outputs and half as many values of K on, it is faster than unpacking the signs and calling the
    // BLAS.
    int64_t least_outputs;
    // Makes codes[pass][n], in BlockCodes' form, for all passes and these columns, which begin at a multiple of 32.
    void (*make_codes)(const SignProduct&, Range columns, uint32_t* codes);
    int64_t (*workspace_bytes)(const SignProduct&, int64_t columns);
    // Computes y[rows][columns], of at most row_tile rows; workspace is aligned to 64 bytes and private to the call.
    void (*multiply)(const SignProduct&, const uint32_t* codes, Range rows, Range columns, uint8_t* workspace);
    // Up to this many rows, at most row_tile, multiply_few is faster; it makes codes as it goes. 0 if it is null.
    int64_t (*most_few_rows)(DType);
    int64_t (*few_workspace_bytes)(const SignProduct&, int64_t rows, int64_t columns);
    // Computes y[rows][columns]; the columns begin at a multiple of 32. workspace as above.
    void (*multiply_few)(const SignProduct&, Range rows, Range columns, uint8_t* workspace);
};

extern const SignGemm kScalarSignGemm;
#if defined(__x86_64__)
extern const SignGemm kAvx2SignGemm;
extern const SignGemm kAvx512SignGemm;

// Adds a pass's entries, a cache line each, to the sums of `count` outputs; the first pass sets the sums.
using AddPass = void (*)(const uint8_t* tables, const uint32_t* codes, int64_t count, bool first, void* sums);

// AVX2's multiply with the given inner loop.
void multiply_by_tables(const SignProduct&, const uint32_t* codes, Range rows, Range columns, AddPass,
                        uint8_t* workspace);
#endif

// The namespace is anonymous, because a file compiled for another instruction set must keep its own copy.
namespace {

constexpr int64_t kEntryBytes = 64;
constexpr int64_t kTableBytes = kEntryBytes << kGroupBits;

// Returns bits [6 Group, 6 Group + 6) of a code as a table's byte offset, by a rotation and a mask.
template <int Group>
inline uint64_t entry_offset(uint32_t code) {
    constexpr int kRight = (kGroupBits * Group + 26) % 32;  // to bits 6..11
    const uint32_t rotated = kRight ? code >> kRight | code << (32 - kRight) % 32 : code;
    return rotated & (kTableBytes - kEntryBytes);
}

// If the words' rows hold K, a block of columns gets all of its codes before the next block; if they hold columns, all
// blocks get the codes of 16 passes. In both cases the words are read along their rows.
inline void make_codes_by_blocks(BlockCodes make_block_codes, const SignProduct& product, Range columns,
                                 uint32_t* codes) {
    const int64_t passes = count_passes(product), step = product.transposed ? passes : kCodePasses;
    for (int64_t begin = 0; begin < passes; begin += step) {
        for (int64_t column = columns.begin; column < columns.end; column += kCodeColumns) {
            const int64_t left = columns.end - column, count = left < kCodeColumns ? left : kCodeColumns;
            const int64_t end = passes - begin < step ? passes : begin + step;
            for (int64_t pass = begin; pass < end; pass += kPassesPerSpan) {
                const Range span{pass, end - pass < kPassesPerSpan ? end : pass + kPassesPerSpan};
                alignas(64) uint32_t block[kPassesPerSpan * kCodeColumns];
                make_block_codes(product, span, column, block);
                for (int64_t i = 0; i < size(span); ++i) {
                    memcpy(codes + (pass + i) * product.n + column, block + i * kCodeColumns,
                           static_cast<size_t>(count * kWordBytes));
                }
            }
        }
    }
}

}  // namespace
}  // namespace bitorch_qlinear
