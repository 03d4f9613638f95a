// Real values by signs (AVX-512). Few rows are computed by sign_gemm_few.h with 16 sums of float, or 8 of double, in a
// vector. More rows use the tables of sign_gemm_avx2.cpp, whose entries are one vector here.
//
// Few rows: Intel has two ports for 512 bits, of which one alone permutes. 16 outputs by 30 values take 20 operations a
// row, 9 shifts for all the rows of a tile and 7 to make the codes, so at least 18 cycles for one row and 10 to 12 for
// each row more. Measured on a Xeon with AMX (family 6, model 167, about 3.8 GHz, one thread, 1024 x 1024): one row 5.9
// ns, each row more 3.4 ns; AVX2 9.0 and 6.7. It makes no difference there whether the groups are a loop or five copies
// (in which gcc 12 spills), and whether a tile is 2 rows by 2 vectors or 4 by 1. Many rows: 1.2 to 1.35 times as fast
// as AVX2's loop on the same processor. Zen 4 splits the loads; there the loop takes 7.9 cycles and AVX2's 7.5.
#if defined(__x86_64__)
#include <cstdint>
#include <cstring>

#include "intrinsics_avx512.h"
#include "target.h"

// Our own headers are compiled for AVX-512 here, too, and everything that they define has internal linkage.
BITORCH_QLINEAR_AVX512_BEGIN
#include "sign_gemm_few.h"

namespace bitorch_qlinear {
namespace {

// ---- codes ----------------------------------------------------------------------------------------

// Transposes 16 x 16 lanes: lane j of row i becomes lane i of row j.
inline void transpose(__m512i* rows) {
    __m512i quads[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i low0 = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        const __m512i high0 = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        const __m512i low1 = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
        const __m512i high1 = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
        quads[i] = _mm512_unpacklo_epi64(low0, low1);
        quads[i + 1] = _mm512_unpackhi_epi64(low0, low1);
        quads[i + 2] = _mm512_unpacklo_epi64(high0, high1);
        quads[i + 3] = _mm512_unpackhi_epi64(high0, high1);
    }
    for (int w = 0; w < 4; ++w) {
        const __m512i even0 = _mm512_shuffle_i32x4(quads[w], quads[w + 4], 0x88);
        const __m512i odd0 = _mm512_shuffle_i32x4(quads[w], quads[w + 4], 0xDD);
        const __m512i even1 = _mm512_shuffle_i32x4(quads[w + 8], quads[w + 12], 0x88);
        const __m512i odd1 = _mm512_shuffle_i32x4(quads[w + 8], quads[w + 12], 0xDD);
        rows[w] = _mm512_shuffle_i32x4(even0, even1, 0x88);
        rows[w + 4] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
        rows[w + 8] = _mm512_shuffle_i32x4(even0, even1, 0xDD);
        rows[w + 12] = _mm512_shuffle_i32x4(odd0, odd1, 0xDD);
    }
}

// Transposes rows of which only the first 8 lanes are used, with half the work.
inline void transpose_halves(__m512i* rows) {
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_inserti32x8(rows[i], _mm512_castsi512_si256(rows[i + 4]), 1);
        rows[i + 4] = _mm512_inserti32x8(rows[i + 8], _mm512_castsi512_si256(rows[i + 12]), 1);
    }
    __m512i quads[8];
    for (int i = 0; i < 8; i += 4) {
        const __m512i low0 = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        const __m512i high0 = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        const __m512i low1 = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
        const __m512i high1 = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
        quads[i] = _mm512_unpacklo_epi64(low0, low1);
        quads[i + 1] = _mm512_unpackhi_epi64(low0, low1);
        quads[i + 2] = _mm512_unpacklo_epi64(high0, high1);
        quads[i + 3] = _mm512_unpackhi_epi64(high0, high1);
    }
    for (int w = 0; w < 4; ++w) {
        rows[w] = _mm512_shuffle_i32x4(quads[w], quads[w + 4], 0x88);
        rows[w + 4] = _mm512_shuffle_i32x4(quads[w], quads[w + 4], 0xDD);
    }
    for (int w = 8; w < 16; ++w) rows[w] = _mm512_setzero_si512();
}

// Makes codes as sign_gemm_avx2.cpp does, for 16 rows at a time.
void make_codes_of_rows(const SignProduct& product, Range passes, int64_t column, uint32_t* codes) {
    constexpr int64_t kWords = kCodePasses * kPassValues / kWordBits;
    const int64_t width = words_for(product.k);
    const __m512i valid = _mm512_set1_epi32((1 << kPassValues) - 1), two = _mm512_set1_epi32(2);
    for (int64_t pass = passes.begin; pass < passes.end; pass += kCodePasses) {
        const int64_t word = pass * kPassValues / kWordBits, left = width - word < kWords ? width - word : kWords;
        const int64_t count = passes.end - pass < kCodePasses ? passes.end - pass : kCodePasses;
        const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
        for (int64_t i = 0; i < kCodeColumns; i += 16) {
            __m512i rows[16];
            const uint32_t* from = product.words + (column + i) * width + word;
            const int64_t rows_left = product.n - column - i;
            if (rows_left >= 16) {
                for (int r = 0; r < 16; ++r) rows[r] = _mm512_maskz_loadu_epi32(mask, from + r * width);
            } else {
                for (int r = 0; r < 16; ++r) {
                    rows[r] = r < rows_left ? _mm512_maskz_loadu_epi32(mask, from + r * width) : _mm512_setzero_si512();
                }
            }
            left > 8 ? transpose(rows) : transpose_halves(rows);
            __m512i below = _mm512_setzero_si512(), up = below, down = _mm512_set1_epi32(kWordBits);
            for (int64_t p = 0; p < count; ++p) {
                const __m512i above = rows[p];
                const __m512i bits = _mm512_or_si512(_mm512_srlv_epi32(below, down), _mm512_sllv_epi32(above, up));
                _mm512_store_si512(codes + p * kCodeColumns + i, _mm512_and_si512(bits, valid));
                up = _mm512_add_epi32(up, two);
                down = _mm512_sub_epi32(down, two);
                below = above;
            }
        }
        codes += count * kCodeColumns;
    }
    clear_past_k(product, passes, codes - kCodeColumns);
}

// Makes the codes if the words' rows hold columns: a row's word is the mask of the codes that get its bit.
void make_codes_of_columns(const SignProduct& product, Range passes, int64_t column, uint32_t* codes) {
    const int64_t width = words_for(product.n), left = product.n - column;
    const uint32_t valid = left < kWordBits ? (uint32_t{1} << left) - 1 : ~uint32_t{0};
    for (int64_t pass = passes.begin; pass < passes.end; ++pass, codes += kCodeColumns) {
        const uint32_t* words = product.words + pass * kPassValues * width + column / kWordBits;
        const int64_t values = product.k - pass * kPassValues, count = values < kPassValues ? values : kPassValues;
        __m512i low = _mm512_setzero_si512(), high = low, bit = _mm512_set1_epi32(1);
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t word = words[i * width] & valid;
            low = _mm512_mask_or_epi32(low, static_cast<__mmask16>(word), low, bit);
            high = _mm512_mask_or_epi32(high, static_cast<__mmask16>(word >> 16), high, bit);
            bit = _mm512_add_epi32(bit, bit);
        }
        _mm512_store_si512(codes, low);
        _mm512_store_si512(codes + 16, high);
    }
}

void make_block_codes(const SignProduct& product, Range passes, int64_t column, uint32_t* codes) {
    product.transposed ? make_codes_of_rows(product, passes, column, codes)
                       : make_codes_of_columns(product, passes, column, codes);
}

void make_codes(const SignProduct& product, Range columns, uint32_t* codes) {
    make_codes_by_blocks(make_block_codes, product, columns, codes);
}

// ---- few rows -------------------------------------------------------------------------------------

struct FloatLookup {
    using Sum = float;
    using Vector = __m512;
    using Codes = __m512i;
    using Table = __m512;
    static constexpr int kCount = 16, kTile = 4;
    static Vector zero() { return _mm512_set1_ps(-0.0f); }
    static Codes load(const uint32_t* codes) { return _mm512_load_si512(codes); }
    static Codes shift(Codes codes) { return _mm512_srli_epi32(codes, 3); }
    // The vector holds the table twice, because four bits choose among its 16 lanes.
    static Table load_table(const float* sums) { return _mm512_broadcast_f32x8(_mm256_load_ps(sums)); }
    static Vector look_up(Codes codes, Table table) { return _mm512_permutexvar_ps(codes, table); }
    static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    static Vector load_sums(const float* sums) { return _mm512_load_ps(sums); }
    static void store_sums(float* sums, Vector v) { _mm512_store_ps(sums, v); }
    static void make_tables(const float* values, float* tables) {
        // The sign of value b in the sum i of either half is bit b of i.
        const float n = -0.0f, p = 0.0f;
        const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3, 3, 3),
                      one = _mm512_set1_epi32(1);
        const __m512 x = _mm512_loadu_ps(values);
        const __m512 a = _mm512_xor_ps(_mm512_permutexvar_ps(half, x),
                                       _mm512_setr_ps(n, p, n, p, n, p, n, p, n, p, n, p, n, p, n, p));
        const __m512 b = _mm512_xor_ps(_mm512_permutexvar_ps(_mm512_add_epi32(half, one), x),
                                       _mm512_setr_ps(n, n, p, p, n, n, p, p, n, n, p, p, n, n, p, p));
        const __m512 c = _mm512_xor_ps(_mm512_permutexvar_ps(_mm512_add_epi32(half, _mm512_add_epi32(one, one)), x),
                                       _mm512_setr_ps(n, n, n, n, p, p, p, p, n, n, n, n, p, p, p, p));
        _mm512_store_ps(tables, _mm512_add_ps(_mm512_add_ps(a, b), c));
    }
};

struct DoubleLookup {
    using Sum = double;
    using Vector = __m512d;
    using Codes = __m512i;
    using Table = __m512d;
    static constexpr int kCount = 8, kTile = 4;
    static Vector zero() { return _mm512_set1_pd(-0.0); }
    static Codes load(const uint32_t* codes) {
        return _mm512_cvtepu32_epi64(_mm256_load_si256(reinterpret_cast<const __m256i*>(codes)));
    }
    static Codes shift(Codes codes) { return _mm512_srli_epi64(codes, 3); }
    static Table load_table(const double* sums) { return _mm512_load_pd(sums); }
    static Vector look_up(Codes codes, Table table) { return _mm512_permutexvar_pd(codes, table); }
    static Vector add(Vector a, Vector b) { return _mm512_add_pd(a, b); }
    static Vector load_sums(const double* sums) { return _mm512_load_pd(sums); }
    static void store_sums(double* sums, Vector v) { _mm512_store_pd(sums, v); }
    static void make_tables(const double* values, double* tables) {
        const double n = -0.0, p = 0.0;
        BITORCH_QLINEAR_UNROLL
        for (int half = 0; half < 2; ++half, values += 3) {
            const __m512d a = _mm512_xor_pd(_mm512_set1_pd(values[0]), _mm512_setr_pd(n, p, n, p, n, p, n, p));
            const __m512d b = _mm512_xor_pd(_mm512_set1_pd(values[1]), _mm512_setr_pd(n, n, p, p, n, n, p, p));
            const __m512d c = _mm512_xor_pd(_mm512_set1_pd(values[2]), _mm512_setr_pd(n, n, n, n, p, p, p, p));
            _mm512_store_pd(tables + 8 * half, _mm512_add_pd(_mm512_add_pd(a, b), c));
        }
    }
};

int64_t workspace_bytes(const SignProduct& product, int64_t columns) {
    return kAvx2SignGemm.workspace_bytes(product, columns);
}

// ---- many rows ------------------------------------------------------------------------------------

template <int Group>
inline const uint8_t* entry(const uint8_t* tables, uint32_t code) {
    return tables + Group * kTableBytes + entry_offset<Group>(code);
}

template <bool First>
void add_floats(const uint8_t* tables, const uint32_t* codes, int64_t count, float* sums) {
    for (int64_t i = 0; i < count; ++i, sums += 16) {
        const uint32_t code = codes[i];
        __m512 v = _mm512_load_ps(entry<0>(tables, code));
        v = _mm512_add_ps(v, _mm512_load_ps(entry<1>(tables, code)));
        v = _mm512_add_ps(v, _mm512_load_ps(entry<2>(tables, code)));
        v = _mm512_add_ps(v, _mm512_load_ps(entry<3>(tables, code)));
        v = _mm512_add_ps(v, _mm512_load_ps(entry<4>(tables, code)));
        _mm512_store_ps(sums, First ? v : _mm512_add_ps(_mm512_load_ps(sums), v));
    }
}

template <bool First>
void add_doubles(const uint8_t* tables, const uint32_t* codes, int64_t count, double* sums) {
    for (int64_t i = 0; i < count; ++i, sums += 8) {
        const uint32_t code = codes[i];
        __m512d v = _mm512_load_pd(entry<0>(tables, code));
        v = _mm512_add_pd(v, _mm512_load_pd(entry<1>(tables, code)));
        v = _mm512_add_pd(v, _mm512_load_pd(entry<2>(tables, code)));
        v = _mm512_add_pd(v, _mm512_load_pd(entry<3>(tables, code)));
        v = _mm512_add_pd(v, _mm512_load_pd(entry<4>(tables, code)));
        _mm512_store_pd(sums, First ? v : _mm512_add_pd(_mm512_load_pd(sums), v));
    }
}

void add_float_pass(const uint8_t* tables, const uint32_t* codes, int64_t count, bool first, void* sums) {
    first ? add_floats<true>(tables, codes, count, static_cast<float*>(sums))
          : add_floats<false>(tables, codes, count, static_cast<float*>(sums));
}

void add_double_pass(const uint8_t* tables, const uint32_t* codes, int64_t count, bool first, void* sums) {
    first ? add_doubles<true>(tables, codes, count, static_cast<double*>(sums))
          : add_doubles<false>(tables, codes, count, static_cast<double*>(sums));
}

void multiply(const SignProduct& product, const uint32_t* codes, Range rows, Range columns, uint8_t* workspace) {
    multiply_by_tables(product, codes, rows, columns,
                       product.dtype == DType::float64 ? add_double_pass : add_float_pass, workspace);
}

// Returns up to how many rows sign_gemm_few.h takes less time than a whole tile of tables.
int64_t most_few_rows(DType dtype) { return dtype == DType::float64 ? 4 : 10; }

void multiply_few_rows(const SignProduct& product, Range rows, Range columns, uint8_t* workspace) {
    multiply_few_any<FloatLookup, DoubleLookup>(product, make_block_codes, rows, columns, workspace);
}

}  // namespace
}  // namespace bitorch_qlinear
BITORCH_QLINEAR_TARGET_END

namespace bitorch_qlinear {

const SignGemm kAvx512SignGemm = {
    .least_outputs = 128,
    .make_codes = make_codes,
    .workspace_bytes = workspace_bytes,
    .multiply = multiply,
    .most_few_rows = most_few_rows,
    .few_workspace_bytes = few_workspace_bytes,
    .multiply_few = multiply_few_rows,
};

}  // namespace bitorch_qlinear
#endif
