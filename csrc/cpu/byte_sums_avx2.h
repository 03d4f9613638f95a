// Sums of bytes that hold two 4-bit counts, the transposition of bytes, and outputs that are bits: shared by
// gemm_avx2.cpp and gemm_tables_avx2.h.
#pragma once

// Included inside the AVX2 region, behind the intrinsics.
#include "kernel.h"
#include "pack_portable.h"

namespace bitorch_qlinear {
namespace {

using Vector = __m256i;

inline Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const Vector*>(p)); }
inline void store(void* p, Vector v) { _mm256_storeu_si256(static_cast<Vector*>(p), v); }
inline Vector low_nibbles(Vector v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Vector high_nibbles(Vector v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }

// gcc 12 turns a = a + b on loop-carried registers into moves and spills; tying the register to the
// sum avoids them (8 % of the whole call).
inline void accumulate(Vector& a, Vector b) { asm("vpaddb %1, %0, %0" : "+x"(a) : "x"(b)); }

// 16-bit sums of 32 bytes. `whole` sums bytes as even + 256 odd modulo 2^16, and `odd` sums the odd bytes alone.
// even_and_odd() computes even = whole - 256 odd modulo 2^16 at the end, which saves a mask in each block.
struct Sums {
    Vector whole, odd;
};

inline void add_bytes(Sums* sums, Vector bytes, bool first) {
    const Vector odd = _mm256_srli_epi16(bytes, 8);
    sums->whole = first ? bytes : _mm256_add_epi16(sums->whole, bytes);
    sums->odd = first ? odd : _mm256_add_epi16(sums->odd, odd);
}

// Adds the byte counts of rows p and q, which are computed from A and B of one block, to their 16-bit sums.
inline void flush_pair(Vector a, Vector b, Sums* p, Sums* q, bool first) {
    // B's low nibbles are q mod 16 in every byte, so A - 16 (q mod 16) is p mod 256 exactly.
    const Vector high = _mm256_set1_epi8(static_cast<char>(0xF0));
    const Vector row_p = _mm256_sub_epi8(a, _mm256_and_si256(_mm256_slli_epi16(b, 4), high));
    // p's odd byte has left 16 (p mod 16) in B's even byte.
    const Vector leak = _mm256_and_si256(_mm256_srli_epi16(row_p, 4), _mm256_set1_epi16(0xF0));
    add_bytes(p, row_p, first);
    add_bytes(q, _mm256_sub_epi8(b, leak), first);
}

// Transposes 16 x 16 bytes in place: v[i] becomes column i. Each round interleaves registers 8 apart, which
// rotates the eight index bits (row, column) by one; after four rounds they have changed places.
inline void transpose(__m128i* v) {
    for (int round = 0; round < 4; ++round) {
        __m128i next[16];
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 8; ++i) {
            next[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]);
            next[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);
        }
        for (int i = 0; i < 16; ++i) v[i] = next[i];
    }
}

// Loads 16 bytes of packed row `row` of n from byte `begin` on; bits past n and past k become 0.
inline __m128i load_row_bytes(const uint32_t* words, int64_t row, int64_t n, int64_t begin, int64_t k) {
    if (row >= n) return _mm_setzero_si128();
    const uint32_t* from = words + row * words_for(k);
    const int64_t word = begin / kWordBytes, left = k - 8 * begin;
    if (left >= 128) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + word));
    alignas(16) uint32_t tail[4] = {};
    for (int64_t i = 0; kWordBits * i < left; ++i) tail[i] = from[word + i] & word_mask(word + i, k);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(tail));
}

// Transposes bytes [begin, begin + 16) of 32 packed rows: columns[i] holds byte begin + i of the rows row, row + 16,
// row + 1, row + 17 ... row + 31, so that the 16-bit halves of a sum are consecutive rows.
inline void load_byte_columns(const uint32_t* words, int64_t row, int64_t n, int64_t begin, int64_t k,
                              Vector* columns) {
    __m128i even[16], odd[16];
    for (int i = 0; i < 16; ++i) {
        even[i] = load_row_bytes(words, row + i, n, begin, k);
        odd[i] = load_row_bytes(words, row + 16 + i, n, begin, k);
    }
    transpose(even);
    transpose(odd);
    for (int i = 0; i < 16; ++i) {
        columns[i] = _mm256_set_m128i(_mm_unpackhi_epi8(even[i], odd[i]), _mm_unpacklo_epi8(even[i], odd[i]));
    }
}

// Turns 16-bit sums into the counts of the even bytes and of the odd ones.
inline void even_and_odd(const Sums& sums, Vector counts[2]) {
    counts[0] = _mm256_sub_epi16(sums.whole, _mm256_slli_epi16(sums.odd, 8));
    counts[1] = sums.odd;
}

// Writes y[row][column .. column + width) from counts in memory, as write_outputs does.
inline void write_row(const Output& y, int64_t row, int64_t column, const int32_t* counts, int64_t width) {
    if (!y.limits) return write_outputs(y, row, column, counts, width);
    const int32_t* limits = y.limits + column;
    uint32_t* out = static_cast<uint32_t*>(y.data) + row * words_for(y.n) + column / kWordBits;
    int64_t i = 0;
    for (; i + kWordBits <= width; i += kWordBits) {
        uint32_t more = 0;  // the outputs whose counts exceed their limits
        BITORCH_QLINEAR_UNROLL
        for (int j = 0; j < 32; j += 8) {
            const Vector exceeds = _mm256_cmpgt_epi32(load(counts + i + j), load(limits + i + j));
            more |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(exceeds))) << j;
        }
        *out++ = ~more ^ (y.flips ? y.flips[(column + i) / kWordBits] : 0);
    }
    if (i < width) write_bits(y, row, column + i, counts + i, width - i);
}

inline int64_t align64(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

}  // namespace
}  // namespace bitorch_qlinear
