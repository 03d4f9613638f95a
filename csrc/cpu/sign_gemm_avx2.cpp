// Real values by signs by the method of four Russians, and few rows by sign_gemm_few.h (AVX2). Its slow twin is
// sign_gemm_scalar.cpp, and sign_gemm.h defines in which order both add.
//
// An ENTRY is one cache line, the same sum for 16 rows of x (8 of float64). For each group of 6 values of K a table
// holds all 64 signed sums, 4 KiB; the five tables of a pass, 20 KiB, stay in L1. An output's code has 30 bits, 6 for
// each table, and
//
//     sums[n] += ((((T0[code 0..5] + T1[code 6..11]) + T2[...]) + T3[...]) + T4[...])
//
// so that 480 multiply-adds are 12 loads of 32 bytes, 10 additions and 2 stores: 6 cycles at two loads a cycle, 80 a
// cycle (AVX2's fused multiply-adds: 16). Measured on Zen 4 at 3.68 GHz, one thread: 7.5 cycles, 64 a cycle; without
// reading and writing the sums 5.6. Besides the loads, the number of operations is the limit: gcc's own addressing
// (lea, mov + shr) took 8.2 cycles, offsets by rotation and operands with a displacement take 7.5. Measured and
// rejected, cycles for the same 30 bits: offsets read as 16 bits 8.8; 5 bits x 6 tables 10; 7 + 7 + 6 + 6 + 6 bits (28
// KiB) 8.6 if their sums stay in L1, else 9.2; AVX-512 with one load a line 7.9 (a Zen 4 splits it;
// sign_gemm_avx512.cpp has it for others).
//
// llvm-mca (znver3, which counts the load of the code too) has 7.1 cycles for the loop, its 28 operations 4.7.
//
// The sums of 4096 outputs, 256 KiB, stream through L2, once a pass. Fewer outputs at a time make the tables more
// often: 512 outputs 10 % slower than 4096, 1024 5 %.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "target.h"

// Our own headers are compiled for AVX2 here, too, and everything that they define has internal linkage.
BITORCH_QLINEAR_AVX2_BEGIN
#include "sign_gemm_few.h"

namespace bitorch_qlinear {
namespace {

constexpr int64_t kPanelValues = 32;  // of a pass: 30, in whole blocks of 8 or 4

// Vectors of float and of double with the same names.
template <class Sum>
struct Lanes;

template <>
struct Lanes<float> {
    using Vector = __m256;
    static constexpr int kCount = 8;
    static Vector load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
    static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
    static Vector negate(Vector a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
    // asm is used because gcc 12 computes an address that is used twice beforehand. gcc does not see that this reads
    // the tables, so add_pass has a memory clobber before its lookups.
    template <int Displacement>
    static Vector look_up(const uint8_t* tables, uint64_t offset) {
        Vector v;
        asm volatile("vmovaps %c3(%1,%2), %0" : "=x"(v) : "r"(tables), "r"(offset), "i"(Displacement));
        return v;
    }
    template <int Displacement>
    static void accumulate(Vector& v, const uint8_t* tables, uint64_t offset) {
        asm volatile("vaddps %c3(%1,%2), %0, %0" : "+x"(v) : "r"(tables), "r"(offset), "i"(Displacement));
    }
    static void transpose(Vector* v) {
        Vector pairs[8], quads[8];
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            pairs[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
        }
        BITORCH_QLINEAR_UNROLL
        for (int half = 0; half < 8; half += 4) {
            BITORCH_QLINEAR_UNROLL
            for (int i = 0; i < 2; ++i) {
                quads[half + 2 * i] = _mm256_shuffle_ps(pairs[half + i], pairs[half + i + 2], 0x44);
                quads[half + 2 * i + 1] = _mm256_shuffle_ps(pairs[half + i], pairs[half + i + 2], 0xEE);
            }
        }
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
            v[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
        }
    }
};

template <>
struct Lanes<double> {
    using Vector = __m256d;
    static constexpr int kCount = 4;
    static Vector load(const double* p) { return _mm256_loadu_pd(p); }
    static void store(double* p, Vector v) { _mm256_storeu_pd(p, v); }
    static Vector add(Vector a, Vector b) { return _mm256_add_pd(a, b); }
    static Vector subtract(Vector a, Vector b) { return _mm256_sub_pd(a, b); }
    static Vector negate(Vector a) { return _mm256_xor_pd(a, _mm256_set1_pd(-0.0)); }
    template <int Displacement>
    static Vector look_up(const uint8_t* tables, uint64_t offset) {
        Vector v;
        asm volatile("vmovapd %c3(%1,%2), %0" : "=x"(v) : "r"(tables), "r"(offset), "i"(Displacement));
        return v;
    }
    template <int Displacement>
    static void accumulate(Vector& v, const uint8_t* tables, uint64_t offset) {
        asm volatile("vaddpd %c3(%1,%2), %0, %0" : "+x"(v) : "r"(tables), "r"(offset), "i"(Displacement));
    }
    static void transpose(Vector* v) {
        const Vector low0 = _mm256_unpacklo_pd(v[0], v[1]), high0 = _mm256_unpackhi_pd(v[0], v[1]);
        const Vector low1 = _mm256_unpacklo_pd(v[2], v[3]), high1 = _mm256_unpackhi_pd(v[2], v[3]);
        v[0] = _mm256_permute2f128_pd(low0, low1, 0x20);
        v[1] = _mm256_permute2f128_pd(high0, high1, 0x20);
        v[2] = _mm256_permute2f128_pd(low0, low1, 0x31);
        v[3] = _mm256_permute2f128_pd(high0, high1, 0x31);
    }
};

// ---- a pass ---------------------------------------------------------------------------------------

template <class T, class Sum>
inline void gather_block(const SignProduct& product, Range rows, Range values, Sum* panel, int64_t width) {
    for (int64_t j = values.begin; j < values.end; ++j) {
        for (int64_t i = rows.begin; i < rows.end; ++i) {
            panel[(j - values.begin) * width + i - rows.begin] =
                widen(static_cast<const T*>(product.x)[i * product.row_stride + j * product.value_stride]);
        }
    }
}

// Fills panel[32][16 or 8] with the rows' values from `begin` on, and 0 past the rows' end and past k.
template <class T, class Sum>
void load_panel(const SignProduct& product, Range rows, int64_t begin, Sum* panel) {
    constexpr int kCount = Lanes<Sum>::kCount;
    for (int64_t j = begin; j < begin + kPanelValues; j += kCount) {
        for (int64_t i = rows.begin; i < rows.begin + 2 * kCount; i += kCount) {
            Sum* to = panel + (j - begin) * 2 * kCount + i - rows.begin;
            if (i + kCount <= rows.end && j + kCount <= product.k) {
                const T* from = static_cast<const T*>(product.x) + i * product.row_stride + j * product.value_stride;
                const int64_t stride = product.row_stride == 1 ? product.value_stride : product.row_stride;
                typename Lanes<Sum>::Vector v[kCount];
                BITORCH_QLINEAR_UNROLL
                for (int r = 0; r < kCount; ++r) v[r] = load_wide(from + r * stride);
                if (product.row_stride != 1) Lanes<Sum>::transpose(v);
                BITORCH_QLINEAR_UNROLL
                for (int r = 0; r < kCount; ++r) Lanes<Sum>::store(to + 2 * kCount * r, v[r]);
                continue;
            }
            for (int r = 0; r < kCount; ++r) Lanes<Sum>::store(to + 2 * kCount * r, typename Lanes<Sum>::Vector{});
            gather_block<T>(product, {i, i + kCount < rows.end ? i + kCount : rows.end},
                            {j, j + kCount < product.k ? j + kCount : product.k}, to, 2 * kCount);
        }
    }
}

// Makes the eight signed sums of three entries; bit i of the index is the sign of the i-th.
template <class Sum>
inline void half_sums(const Sum* x, typename Lanes<Sum>::Vector* sums) {
    using L = Lanes<Sum>;
    sums[1] = L::load(x);
    sums[0] = L::negate(sums[1]);
    BITORCH_QLINEAR_UNROLL
    for (int bit = 1; bit < 3; ++bit) {
        const typename L::Vector value = L::load(x + bit * 2 * L::kCount);
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 1 << bit; ++i) {
            sums[i + (1 << bit)] = L::add(sums[i], value);
            sums[i] = L::subtract(sums[i], value);
        }
    }
}

template <class Sum>
void make_tables(const Sum* panel, Sum* tables) {
    using L = Lanes<Sum>;
    constexpr int kWidth = 2 * L::kCount;
    for (int group = 0; group < kGroups; ++group, panel += kGroupBits * kWidth, tables += kWidth << kGroupBits) {
        for (int lane = 0; lane < kWidth; lane += L::kCount) {
            typename L::Vector low[8], high[8];
            half_sums(panel + lane, low);
            half_sums(panel + 3 * kWidth + lane, high);
            for (int h = 0; h < 8; ++h) {
                BITORCH_QLINEAR_UNROLL
                for (int l = 0; l < 8; ++l) {
                    L::store(tables + (8 * h + l) * kWidth + lane, L::add(low[l], high[h]));
                }
            }
        }
    }
}

template <class Sum, int Half>
inline typename Lanes<Sum>::Vector sum_entries(const uint8_t* tables, const uint64_t* offsets) {
    using L = Lanes<Sum>;
    typename L::Vector v = L::template look_up<Half>(tables, offsets[0]);
    L::template accumulate<Half + 1 * kTableBytes>(v, tables, offsets[1]);
    L::template accumulate<Half + 2 * kTableBytes>(v, tables, offsets[2]);
    L::template accumulate<Half + 3 * kTableBytes>(v, tables, offsets[3]);
    L::template accumulate<Half + 4 * kTableBytes>(v, tables, offsets[4]);
    return v;
}

template <class Sum, bool First>
void add_pass(const uint8_t* bytes, const uint32_t* codes, int64_t count, Sum* sums) {
    using L = Lanes<Sum>;
    asm volatile("" : : : "memory");  // the tables must be written before the lookups, which gcc does not see
    for (int64_t i = 0; i < count; ++i, sums += 2 * L::kCount) {
        const uint32_t code = codes[i];
        const uint64_t offsets[kGroups] = {entry_offset<0>(code), entry_offset<1>(code), entry_offset<2>(code),
                                           entry_offset<3>(code), entry_offset<4>(code)};
        const typename L::Vector low = sum_entries<Sum, 0>(bytes, offsets);
        L::store(sums, First ? low : L::add(L::load(sums), low));
        const typename L::Vector high = sum_entries<Sum, 32>(bytes, offsets);
        L::store(sums + L::kCount, First ? high : L::add(L::load(sums + L::kCount), high));
    }
}

template <class Sum>
void add_pass(const uint8_t* tables, const uint32_t* codes, int64_t count, bool first, void* sums) {
    first ? add_pass<Sum, true>(tables, codes, count, static_cast<Sum*>(sums))
          : add_pass<Sum, false>(tables, codes, count, static_cast<Sum*>(sums));
}

// ---- a tile ---------------------------------------------------------------------------------------

template <class Sum>
struct Workspace {
    Sum* tables;
    Sum* panel;
    Sum* sums;    // [columns][16 or 8], of one span
    Sum* totals;  // the same for all spans before it; the sums themselves if there is only one span

    // These are whole blocks of 16 columns, because write_rows reads past the last column.
    static int64_t sums_bytes(int64_t columns) { return ceil_div(columns, 16) * 16 * kEntryBytes; }
    static int64_t bytes(int64_t columns, int64_t passes) {
        return kGroups * kTableBytes + kPanelValues * kEntryBytes +
               (passes > kPassesPerSpan ? 2 : 1) * sums_bytes(columns);
    }
    Workspace(uint8_t* base, int64_t columns, int64_t passes)
        : tables(reinterpret_cast<Sum*>(base)),
          panel(reinterpret_cast<Sum*>(base + kGroups * kTableBytes)),
          sums(reinterpret_cast<Sum*>(base + kGroups * kTableBytes + kPanelValues * kEntryBytes)),
          totals(passes > kPassesPerSpan ? sums + sums_bytes(columns) / static_cast<int64_t>(sizeof(Sum)) : sums) {}
};

template <class Sum>
void add_span(const Sum* sums, int64_t count, bool first, Sum* totals) {
    if (sums == totals) return;
    using L = Lanes<Sum>;
    for (int64_t i = 0; i < count; i += L::kCount) {
        const typename L::Vector v = L::load(sums + i);
        L::store(totals + i, first ? v : L::add(L::load(totals + i), v));
    }
}

// Stores two vectors of a row of y.
template <class T, class Sum>
inline void write_values(const Sum* from, int64_t count, T* to) {
    constexpr int kCount = Lanes<Sum>::kCount;
    if (count >= 2 * kCount) {
        store_narrow(to, Lanes<Sum>::load(from));
        store_narrow(to + kCount, Lanes<Sum>::load(from + kCount));
    } else {
        for (int64_t i = 0; i < count; ++i) narrow(from[i], to + i);
    }
}

// Writes a cache line of each row at a time, through a buffer. Rows are often a power of two apart, and lines that are
// written in halves would be evicted from L1 in between.
template <class T, class Sum>
void write_rows(const SignProduct& product, Range rows, Range columns, const Sum* totals) {
    constexpr int kCount = Lanes<Sum>::kCount, kWidth = 2 * kCount;
    for (int64_t column = columns.begin; column < columns.end; column += kWidth, totals += kWidth * kWidth) {
        alignas(64) Sum block[kWidth * kWidth];
        for (int row = 0; row < kWidth; row += kCount) {
            for (int half = 0; half < kWidth; half += kCount) {
                typename Lanes<Sum>::Vector v[kCount];
                BITORCH_QLINEAR_UNROLL
                for (int i = 0; i < kCount; ++i) v[i] = Lanes<Sum>::load(totals + (half + i) * kWidth + row);
                Lanes<Sum>::transpose(v);
                BITORCH_QLINEAR_UNROLL
                for (int i = 0; i < kCount; ++i) Lanes<Sum>::store(block + (row + i) * kWidth + half, v[i]);
            }
        }
        T* y = static_cast<T*>(product.y) + rows.begin * product.n + column;
        for (int64_t row = 0; row < size(rows); ++row) {
            write_values(block + row * kWidth, columns.end - column, y + row * product.n);
        }
    }
}

template <class T>
void multiply(const SignProduct& product, const uint32_t* codes, Range rows, Range columns, AddPass add_pass,
              uint8_t* memory) {
    using Sum = decltype(widen(T{}));
    const int64_t passes = count_passes(product);
    const Workspace<Sum> work(memory, size(columns), passes);
    const int64_t values = size(columns) * kEntryBytes / static_cast<int64_t>(sizeof(Sum));
    if (passes == 0) std::memset(work.totals, 0, static_cast<size_t>(size(columns) * kEntryBytes));
    for (int64_t pass = 0; pass < passes; ++pass) {
        load_panel<T>(product, rows, pass * kPassValues, work.panel);
        make_tables(work.panel, work.tables);
        const uint32_t* pass_codes = codes + pass * product.n + columns.begin;
        add_pass(reinterpret_cast<const uint8_t*>(work.tables), pass_codes, size(columns), pass % kPassesPerSpan == 0,
                 work.sums);
        if ((pass + 1) % kPassesPerSpan == 0 || pass + 1 == passes) {
            add_span(work.sums, values, pass < kPassesPerSpan, work.totals);
        }
    }
    write_rows<T>(product, rows, columns, work.totals);
}

void multiply_any(const SignProduct& product, const uint32_t* codes, Range rows, Range columns, uint8_t* workspace) {
    multiply_by_tables(product, codes, rows, columns,
                       product.dtype == DType::float64 ? add_pass<double> : add_pass<float>, workspace);
}

int64_t workspace_bytes(const SignProduct& product, int64_t columns) {
    return Workspace<float>::bytes(columns, count_passes(product));
}

// ---- codes ----------------------------------------------------------------------------------------

// Transposes 32 x 32 bits in place: bit c of word r becomes bit r of word c.
inline void transpose_bits(uint32_t* words) {
    // Byte b of each of 8 rows, in row order, goes to the 64-bit element b.
    const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                                             13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i interleave = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256d rows[4];
    BITORCH_QLINEAR_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8 * i));
        rows[i] = _mm256_castsi256_pd(_mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(eight, by_byte), interleave));
    }
    Lanes<double>::transpose(rows);
    BITORCH_QLINEAR_UNROLL
    for (int byte = 0; byte < 4; ++byte) {
        __m256i v = _mm256_castpd_si256(rows[byte]);
        BITORCH_QLINEAR_UNROLL
        for (int bit = 7; bit >= 0; --bit) {
            words[8 * byte + bit] = static_cast<uint32_t>(_mm256_movemask_epi8(v));
            v = _mm256_add_epi8(v, v);
        }
    }
}

// Makes the codes if the words' rows hold K. 15 words of 8 rows, transposed, become the codes of 16 passes, 30 bits
// each: pass p begins with the highest 2 p bits of word p - 1, and the lowest 30 - 2 p of word p follow.
void make_codes_of_rows(const SignProduct& product, Range passes, int64_t column, uint32_t* codes) {
    constexpr int64_t kWords = kCodePasses * kPassValues / kWordBits;
    const int64_t width = words_for(product.k);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i valid = _mm256_set1_epi32((1 << kPassValues) - 1);
    for (int64_t pass = passes.begin; pass < passes.end; pass += kCodePasses) {
        const int64_t word = pass * kPassValues / kWordBits, left = width - word < kWords ? width - word : kWords;
        const int64_t count = passes.end - pass < kCodePasses ? passes.end - pass : kCodePasses;
        const __m256i last = _mm256_set1_epi32(static_cast<int>(left));
        for (int64_t i = 0; i < kCodeColumns; i += 8) {
            // This holds words -1 to 15.
            alignas(32) uint32_t words[17][8];
            _mm256_store_si256(reinterpret_cast<__m256i*>(words[0]), _mm256_setzero_si256());
            BITORCH_QLINEAR_UNROLL
            for (int half = 0; half < 2; ++half) {
                const __m256i mask = _mm256_cmpgt_epi32(last, _mm256_add_epi32(lane, _mm256_set1_epi32(8 * half)));
                __m256 rows[8];
                BITORCH_QLINEAR_UNROLL
                for (int r = 0; r < 8; ++r) {
                    const uint32_t* row = product.words + (column + i + r) * width + word + 8 * half;
                    rows[r] = column + i + r < product.n && 8 * half < left
                                  ? _mm256_castsi256_ps(_mm256_maskload_epi32(reinterpret_cast<const int*>(row), mask))
                                  : _mm256_setzero_ps();
                }
                Lanes<float>::transpose(rows);
                BITORCH_QLINEAR_UNROLL
                for (int r = 0; r < 8; ++r) {
                    _mm256_store_ps(reinterpret_cast<float*>(words[1 + 8 * half + r]), rows[r]);
                }
            }
            __m256i up = _mm256_setzero_si256(), down = _mm256_set1_epi32(kWordBits);
            for (int64_t p = 0; p < count; ++p) {
                const __m256i below = _mm256_load_si256(reinterpret_cast<const __m256i*>(words[p]));
                const __m256i above = _mm256_load_si256(reinterpret_cast<const __m256i*>(words[p + 1]));
                const __m256i bits = _mm256_or_si256(_mm256_srlv_epi32(below, down), _mm256_sllv_epi32(above, up));
                _mm256_store_si256(reinterpret_cast<__m256i*>(codes + p * kCodeColumns + i),
                                   _mm256_and_si256(bits, valid));
                up = _mm256_add_epi32(up, _mm256_set1_epi32(2));
                down = _mm256_sub_epi32(down, _mm256_set1_epi32(2));
            }
        }
        codes += count * kCodeColumns;
    }
    clear_past_k(product, passes, codes - kCodeColumns);
}

void make_codes_of_columns(const SignProduct& product, Range passes, int64_t column, uint32_t* codes) {
    const int64_t width = words_for(product.n), left = product.n - column;
    for (int64_t pass = passes.begin; pass < passes.end; ++pass, codes += kCodeColumns) {
        const uint32_t* words = product.words + pass * kPassValues * width + column / kWordBits;
        const int64_t values = product.k - pass * kPassValues;
        BITORCH_QLINEAR_UNROLL
        for (int64_t i = 0; i < kCodeColumns; ++i) codes[i] = i < kPassValues && i < values ? words[i * width] : 0;
        transpose_bits(codes);
        for (int64_t i = left; i < kCodeColumns; ++i) codes[i] = 0;
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
    using Vector = __m256;
    using Codes = __m256i;
    using Table = __m256;
    static constexpr int kCount = 8, kTile = 2;
    static Vector zero() { return _mm256_set1_ps(-0.0f); }
    static Codes load(const uint32_t* codes) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(codes)); }
    static Codes shift(Codes codes) { return _mm256_srli_epi32(codes, 3); }
    static Table load_table(const float* sums) { return _mm256_load_ps(sums); }
    static Vector look_up(Codes codes, Table table) { return _mm256_permutevar8x32_ps(table, codes); }
    static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    static Vector load_sums(const float* sums) { return _mm256_load_ps(sums); }
    static void store_sums(float* sums, Vector v) { _mm256_store_ps(sums, v); }
    static void make_tables(const float* values, float* tables) {
        BITORCH_QLINEAR_UNROLL
        for (int half = 0; half < 2; ++half) {
            // The sign of value b in the sum i is bit b of i.
            const float n = -0.0f, p = 0.0f;
            const __m256 a =
                _mm256_xor_ps(_mm256_broadcast_ss(values + 3 * half), _mm256_setr_ps(n, p, n, p, n, p, n, p));
            const __m256 b =
                _mm256_xor_ps(_mm256_broadcast_ss(values + 3 * half + 1), _mm256_setr_ps(n, n, p, p, n, n, p, p));
            const __m256 c =
                _mm256_xor_ps(_mm256_broadcast_ss(values + 3 * half + 2), _mm256_setr_ps(n, n, n, n, p, p, p, p));
            _mm256_store_ps(tables + 8 * half, _mm256_add_ps(_mm256_add_ps(a, b), c));
        }
    }
};

// Doubles are looked up as their low and their high words, which have separate tables. The two are unpacked to the sums
// of outputs 0, 1, 4, 5 and 2, 3, 6, 7.
struct DoubleLookup {
    struct Pair {
        __m256d first, second;
    };
    struct Words {
        __m256 low, high;
    };
    using Sum = double;
    using Vector = Pair;
    using Codes = __m256i;
    using Table = Words;
    static constexpr int kCount = 8, kTile = 2;
    static Vector zero() { return {_mm256_set1_pd(-0.0), _mm256_set1_pd(-0.0)}; }
    static Codes load(const uint32_t* codes) { return FloatLookup::load(codes); }
    static Codes shift(Codes codes) { return FloatLookup::shift(codes); }
    static Table load_table(const double* sums) {
        const float* words = reinterpret_cast<const float*>(sums);
        return {_mm256_load_ps(words), _mm256_load_ps(words + 8)};
    }
    static Vector look_up(Codes codes, Table table) {
        const __m256 low = FloatLookup::look_up(codes, table.low), high = FloatLookup::look_up(codes, table.high);
        return {_mm256_castps_pd(_mm256_unpacklo_ps(low, high)), _mm256_castps_pd(_mm256_unpackhi_ps(low, high))};
    }
    static Vector add(Vector a, Vector b) {
        return {_mm256_add_pd(a.first, b.first), _mm256_add_pd(a.second, b.second)};
    }
    static Vector load_sums(const double* sums) {
        const __m256d a = _mm256_load_pd(sums), b = _mm256_load_pd(sums + 4);
        return {_mm256_permute2f128_pd(a, b, 0x20), _mm256_permute2f128_pd(a, b, 0x31)};
    }
    static void store_sums(double* sums, Vector v) {
        _mm256_store_pd(sums, _mm256_permute2f128_pd(v.first, v.second, 0x20));
        _mm256_store_pd(sums + 4, _mm256_permute2f128_pd(v.first, v.second, 0x31));
    }
    static void make_tables(const double* values, double* tables) {
        BITORCH_QLINEAR_UNROLL
        for (int half = 0; half < 2; ++half) {
            const double n = -0.0, p = 0.0;
            const __m256d third = _mm256_broadcast_sd(values + 3 * half + 2);
            const __m256d a = _mm256_xor_pd(_mm256_broadcast_sd(values + 3 * half), _mm256_setr_pd(n, p, n, p));
            const __m256d b = _mm256_xor_pd(_mm256_broadcast_sd(values + 3 * half + 1), _mm256_setr_pd(n, n, p, p));
            const __m256d pairs = _mm256_add_pd(a, b);
            // The words of the sums 0, 1, 4, 5 and 2, 3, 6, 7 are put in the order of the doubles.
            const __m256 low = _mm256_castpd_ps(_mm256_add_pd(pairs, _mm256_xor_pd(third, _mm256_set1_pd(n))));
            const __m256 high = _mm256_castpd_ps(_mm256_add_pd(pairs, third));
            const __m256d lows = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0x88));
            const __m256d highs = _mm256_castps_pd(_mm256_shuffle_ps(low, high, 0xDD));
            _mm256_store_pd(tables + 8 * half, _mm256_permute4x64_pd(lows, 0xD8));
            _mm256_store_pd(tables + 8 * half + 4, _mm256_permute4x64_pd(highs, 0xD8));
        }
    }
};

// Returns up to how many rows sign_gemm_few.h takes less time than a whole tile of tables.
int64_t most_few_rows(DType dtype) { return dtype == DType::float64 ? 2 : 6; }

void multiply_few_rows(const SignProduct& product, Range rows, Range columns, uint8_t* workspace) {
    multiply_few_any<FloatLookup, DoubleLookup>(product, make_block_codes, rows, columns, workspace);
}

}  // namespace

void multiply_by_tables(const SignProduct& product, const uint32_t* codes, Range rows, Range columns, AddPass add_pass,
                        uint8_t* workspace) {
    switch (product.dtype) {
        case DType::float64: return multiply<double>(product, codes, rows, columns, add_pass, workspace);
        case DType::float32: return multiply<float>(product, codes, rows, columns, add_pass, workspace);
        case DType::float16: return multiply<Half>(product, codes, rows, columns, add_pass, workspace);
        default: return multiply<BFloat16>(product, codes, rows, columns, add_pass, workspace);
    }
}

}  // namespace bitorch_qlinear
BITORCH_QLINEAR_TARGET_END

namespace bitorch_qlinear {

const SignGemm kAvx2SignGemm = {
    .least_outputs = 128,
    .make_codes = make_codes,
    .workspace_bytes = workspace_bytes,
    .multiply = multiply_any,
    .most_few_rows = most_few_rows,
    .few_workspace_bytes = few_workspace_bytes,
    .multiply_few = multiply_few_rows,
};

}  // namespace bitorch_qlinear
#endif
