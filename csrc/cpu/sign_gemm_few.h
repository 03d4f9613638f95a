// Real values by signs for few rows of x, by tables of half sums: the algorithm, for any instruction set with
// permutations.
//
// The tables of sign_gemm_avx2.cpp serve a cache line of rows, and few rows leave most of it empty. Here a vector
// holds the sums of one row for several outputs. A half sum has three signs, so its eight values are a vector, and one
// permutation by the lanes' lowest three bits looks them up for all the outputs:
//
//     t = permute(table of (x0, x1, x2), codes) + permute(table of (x3, x4, x5), codes >> 3)          codes >>= 6
//
// which with t's own addition is six operations for 6 values, of which the two shifts serve all the rows. Spans are the
// outer loop: their 64 passes are 1920 bits, whole words of a row, their tables stay in L1 (20 KiB a row of float32)
// and their sums in registers. Codes are made for 32 outputs and one span, 8 KiB, and are never all in memory.
//
// A struct `Lookup` describes the instruction set:
//
//     Sum                               float or double
//     Vector, Codes, Table              sums of kCount outputs, their codes, and the eight values of a half sum
//     kTile                             a tile of sums: so many vectors, of 4, 2 or 1 rows; a power of two
//     zero()                            a vector of -0, which changes nothing that is added to it
//     load(codes), shift(codes)         codes, and the same three bits further
//     load_table(sums), look_up(codes, table), add(a, b)
//     load_sums(sums), store_sums(sums, v)
//     make_tables(values, tables)       both tables of a group of 6 values, of which 16 may be read
#pragma once

#include <cstdint>
#include <cstring>

// It is included inside the region of the instruction set, which has at least AVX2.
#include "sign_gemm.h"

namespace bitorch_qlinear {
namespace {

constexpr int64_t kHalfSums = int64_t{1} << kGroupBits / 2;
constexpr int64_t kPassSums = 2 * kGroups * kHalfSums;
constexpr int64_t kSpanValues = kPassValues * kPassesPerSpan;
constexpr int64_t kValuesRead = 16;  // how many values make_tables may read

// The bits past k in a row's words count as 0 in the last pass.
inline void clear_past_k(const SignProduct& product, Range passes, uint32_t* last_codes) {
    const int64_t valid = product.k - (passes.end - 1) * kPassValues;
    if (valid >= kPassValues) return;
    for (int64_t i = 0; i < kCodeColumns; ++i) last_codes[i] &= (uint32_t{1} << valid) - 1;
}

// Loads or stores a vector's worth of values of x or y.
inline __m256 load_wide(const float* x) { return _mm256_loadu_ps(x); }
inline __m256d load_wide(const double* x) { return _mm256_loadu_pd(x); }
inline __m256 load_wide(const Half* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
inline __m256 load_wide(const BFloat16* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store_narrow(float* y, __m256 v) { _mm256_storeu_ps(y, v); }
inline void store_narrow(double* y, __m256d v) { _mm256_storeu_pd(y, v); }
inline void store_narrow(Half* y, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Rounds as narrow() does: to nearest, ties to even, every NaN to 0x7FC0.
inline void store_narrow(BFloat16* y, __m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i halves = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    const __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm_packus_epi32(low, high));
}

inline int64_t whole_blocks(int64_t columns) { return ceil_div(columns, kCodeColumns) * kCodeColumns; }

template <class Sum>
struct FewWorkspace {
    Sum* values;      // of one row and span, zeros behind
    uint32_t* codes;  // [passes][32]
    Sum* tables;      // [rows][passes][10][8]
    Sum* totals;      // [rows][columns]

    static constexpr int64_t kValues = kSpanValues + kValuesRead;
    static constexpr int64_t kCodes = kPassesPerSpan * kCodeColumns;

    static int64_t row_tables(int64_t passes) {
        return (passes < kPassesPerSpan ? passes : kPassesPerSpan) * kPassSums;
    }
    static int64_t bytes(int64_t rows, int64_t columns, int64_t passes) {
        return (kValues + rows * (row_tables(passes) + whole_blocks(columns))) * static_cast<int64_t>(sizeof(Sum)) +
               kCodes * kWordBytes;
    }
    FewWorkspace(uint8_t* base, int64_t rows, int64_t passes)
        : values(reinterpret_cast<Sum*>(base)),
          codes(reinterpret_cast<uint32_t*>(values + kValues)),
          tables(reinterpret_cast<Sum*>(codes + kCodes)),
          totals(tables + rows * row_tables(passes)) {}
};

template <class T, class Sum>
void load_values(const SignProduct& product, int64_t row, Range values, Sum* to) {
    constexpr int64_t kCount = 32 / static_cast<int64_t>(sizeof(Sum));
    const T* x = static_cast<const T*>(product.x) + row * product.row_stride + values.begin * product.value_stride;
    int64_t i = 0;
    if (product.value_stride == 1) {
        for (; i + kCount <= size(values); i += kCount) store_narrow(to + i, load_wide(x + i));
    }
    for (; i < size(values); ++i) to[i] = widen(x[i * product.value_stride]);
}

template <class L>
void make_row_tables(const typename L::Sum* values, int64_t passes, typename L::Sum* tables) {
    for (int64_t group = 0; group < passes * kGroups; ++group) {
        L::make_tables(values + group * kGroupBits, tables + group * 2 * kHalfSums);
    }
}

// Adds a span's passes to the totals of 32 columns, for `Rows` rows that lie row_tables and row_totals apart.
template <class L, int Rows>
__attribute__((noinline)) void add_few(const uint32_t* codes, int64_t passes, const typename L::Sum* tables,
                                       int64_t row_tables, bool first, typename L::Sum* totals, int64_t row_totals) {
    using Vector = typename L::Vector;
    constexpr int64_t kFit = kCodeColumns / L::kCount, kVectors = L::kTile / Rows < kFit ? L::kTile / Rows : kFit;
    for (int64_t column = 0; column < kCodeColumns; column += kVectors * L::kCount) {
        Vector spans[Rows][kVectors];
        BITORCH_QLINEAR_UNROLL
        for (int row = 0; row < Rows; ++row) {
            BITORCH_QLINEAR_UNROLL
            for (int v = 0; v < kVectors; ++v) spans[row][v] = L::zero();
        }
        for (int64_t pass = 0; pass < passes; ++pass) {
            typename L::Codes low_bits[kVectors], high_bits[kVectors];
            Vector sums[Rows][kVectors];
            BITORCH_QLINEAR_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                low_bits[v] = L::load(codes + pass * kCodeColumns + column + v * L::kCount);
            }
            const typename L::Sum* table = tables + pass * kPassSums;
            BITORCH_QLINEAR_UNROLL
            for (int group = 0; group < kGroups; ++group, table += 2 * kHalfSums) {
                BITORCH_QLINEAR_UNROLL
                for (int v = 0; v < kVectors; ++v) high_bits[v] = L::shift(low_bits[v]);
                BITORCH_QLINEAR_UNROLL
                for (int row = 0; row < Rows; ++row) {
                    const typename L::Table low = L::load_table(table + row * row_tables);
                    const typename L::Table high = L::load_table(table + row * row_tables + kHalfSums);
                    BITORCH_QLINEAR_UNROLL
                    for (int v = 0; v < kVectors; ++v) {
                        const Vector sum = L::add(L::look_up(low_bits[v], low), L::look_up(high_bits[v], high));
                        sums[row][v] = group ? L::add(sums[row][v], sum) : sum;
                    }
                }
                BITORCH_QLINEAR_UNROLL
                for (int v = 0; v < kVectors; ++v) low_bits[v] = L::shift(high_bits[v]);
            }
            BITORCH_QLINEAR_UNROLL
            for (int row = 0; row < Rows; ++row) {
                BITORCH_QLINEAR_UNROLL
                for (int v = 0; v < kVectors; ++v) spans[row][v] = L::add(spans[row][v], sums[row][v]);
            }
        }
        BITORCH_QLINEAR_UNROLL
        for (int row = 0; row < Rows; ++row) {
            BITORCH_QLINEAR_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                typename L::Sum* to = totals + row * row_totals + column + v * L::kCount;
                L::store_sums(to, first ? spans[row][v] : L::add(L::load_sums(to), spans[row][v]));
            }
        }
    }
}

// Does the same for any number of rows, four, two or one at a time.
template <class L, int Most = L::kTile>
void add_few_rows(int64_t rows, const uint32_t* codes, int64_t passes, const typename L::Sum* tables,
                  int64_t row_tables, bool first, typename L::Sum* totals, int64_t row_totals) {
    while (rows >= Most) {
        add_few<L, Most>(codes, passes, tables, row_tables, first, totals, row_totals);
        rows -= Most;
        tables += Most * row_tables;
        totals += Most * row_totals;
    }
    if constexpr (Most > 1) {
        add_few_rows<L, Most / 2>(rows, codes, passes, tables, row_tables, first, totals, row_totals);
    }
}

template <class L, class T>
void multiply_few(const SignProduct& product, BlockCodes make_codes, Range rows, Range columns, uint8_t* memory) {
    using Sum = typename L::Sum;
    const int64_t passes = count_passes(product), width = whole_blocks(size(columns));
    const FewWorkspace<Sum> work(memory, size(rows), passes);
    const int64_t row_tables = work.row_tables(passes);
    if (passes == 0) std::memset(work.totals, 0, static_cast<size_t>(size(rows) * width) * sizeof(Sum));
    for (int64_t pass = 0; pass < passes; pass += kPassesPerSpan) {
        const Range span{pass, passes - pass < kPassesPerSpan ? passes : pass + kPassesPerSpan};
        const int64_t begin = pass * kPassValues, left = product.k - begin;
        const Range values{begin, left < kSpanValues ? product.k : begin + kSpanValues};
        // The last pass is filled up with zeros, and what make_tables reads beyond it is at least initialized.
        const int64_t read = size(span) * kPassValues + kValuesRead;
        std::memset(work.values + size(values), 0, static_cast<size_t>(read - size(values)) * sizeof(Sum));
        for (int64_t row = 0; row < size(rows); ++row) {
            load_values<T>(product, rows.begin + row, values, work.values);
            make_row_tables<L>(work.values, size(span), work.tables + row * row_tables);
        }
        for (int64_t column = 0; column < width; column += kCodeColumns) {
            make_codes(product, span, columns.begin + column, work.codes);
            add_few_rows<L>(size(rows), work.codes, size(span), work.tables, row_tables, pass == 0,
                            work.totals + column, width);
        }
    }
    constexpr int64_t kCount = 32 / static_cast<int64_t>(sizeof(Sum));
    for (int64_t row = 0; row < size(rows); ++row) {
        const Sum* totals = work.totals + row * width;
        T* y = static_cast<T*>(product.y) + (rows.begin + row) * product.n + columns.begin;
        int64_t i = 0;
        for (; i + kCount <= size(columns); i += kCount) store_narrow(y + i, load_wide(totals + i));
        for (; i < size(columns); ++i) narrow(totals[i], y + i);
    }
}

template <class Float, class Double>
void multiply_few_any(const SignProduct& product, BlockCodes make_codes, Range rows, Range columns, uint8_t* memory) {
    switch (product.dtype) {
        case DType::float64: return multiply_few<Double, double>(product, make_codes, rows, columns, memory);
        case DType::float32: return multiply_few<Float, float>(product, make_codes, rows, columns, memory);
        case DType::float16: return multiply_few<Float, Half>(product, make_codes, rows, columns, memory);
        default: return multiply_few<Float, BFloat16>(product, make_codes, rows, columns, memory);
    }
}

inline int64_t few_workspace_bytes(const SignProduct& product, int64_t rows, int64_t columns) {
    const int64_t passes = count_passes(product);
    return product.dtype == DType::float64 ? FewWorkspace<double>::bytes(rows, columns, passes)
                                           : FewWorkspace<float>::bytes(rows, columns, passes);
}

}  // namespace
}  // namespace bitorch_qlinear
