// Binary matrix product for many rows, by tables of rows (AVX2): the method of the four Russians (Arlazarov, Dinic,
// Kronrod and Faradzhev, 1970). Its slow twin is gemm_scalar.cpp.
//
// 64 rows of x share one vector, whose byte r of 32 holds a 4-bit count of row r and, above it, one of row r + 32. For
// five values of K these rows make a table of 32 vectors that five weight bits w index:
//
//     T[w][r] = popcount(x[r] ^ w)                                        at most 5
//
// so that one load is 64 x 5 = 320 multiply-adds. Three of them make a GROUP s (15 values; at most 15 in a count),
// which is summed as in gemm_avx2.cpp: A += s, B += s >> 4. 24 tables are a BLOCK, 120 values; they take 24 KiB and
// stay in L1 while the strip's outputs pass by. A and B of an output wait in memory for the second block and are then
// untangled into 16-bit sums.
//
// The weights are read in the interchange form, 15 bytes for each row and block. With prefetching that costs 8 % more
// than reading a copy in the order of use (K = 4096, Zen 4), and for 128 rows making the copy would cost as much.
//
// A block is 48 operations for the indices, 24 loads that add, 24 of A, B and the shift, 3 loads of weights, 2 stores
// and 5 for the loop: 106, so on a Zen 3 or 4, which starts 6 a cycle, 17.7 cycles for 7680 multiply-adds, 434 a cycle.
// Measured on Zen 4: 20.4 cycles (stores and loads whose addresses agree in 12 bits wait for each other), 23.1 with
// the untangling; loads alone would take 12.
#pragma once

// Included inside the AVX2 region, behind the intrinsics.
#include "byte_sums_avx2.h"
#include "kernel.h"

namespace bitorch_qlinear {
namespace {
namespace gemm_tables {

constexpr int64_t kRows = 64;
constexpr int kIndexBits = 5;
constexpr int kTables = 24;
constexpr int kGroupTables = 3;
constexpr int64_t kEntries = 1 << kIndexBits;
constexpr int64_t kTableBytes = kEntries * sizeof(Vector);
constexpr int64_t kBlock = kTables * kIndexBits;
constexpr int64_t kBlockBytes = kBlock / 8;
static_assert(kGroupTables * kIndexBits <= 15, "a group's count must fit in 4 bits");
static_assert(2 * kBlock <= 255, "the count of two blocks must fit in a byte");
// The outputs whose sums, 192 bytes each, stay in L2. With fewer, the tables would be made more often.
constexpr int64_t kStrip = 1024;
// The outputs whose counts go to the epilogue together, 16 rows at a time: 8 KiB.
constexpr int64_t kFinished = 128;
// How many outputs ahead the weights are prefetched; 3 to 6 are equally fast.
constexpr int64_t kAhead = 4;
// From these bounds on this method is 1.02 to 1.16 times as fast (one thread, Zen 4). With fewer rows a vector is not
// full enough, with fewer outputs or values the tables and the counts cost more than they save, and with more values
// each weight row lies in pages of its own.
constexpr int64_t kFewestRows = 58, kFewestOutputs = 512, kFewestValues = 768, kMostValues = 16384;
static_assert(kMostValues <= 65535, "a count must fit in 16 bits");

// A and B of one output, which wait for the second block; and its sums of rows 0-31 and 32-63.
struct Bytes {
    Vector a, b;
};
struct RowSums {
    Sums halves[2];
};

// Multiplies one block of `outputs` weight rows, `stride` bytes apart, by 64 rows of x. The first of two blocks (or the
// only one) begins at 0 instead of the waiting sums; the second (or the only one) adds to the sums, or sets them if
// `first`.
template <bool FirstOfTwo, bool Flush>
__attribute__((noinline)) void add_block(const uint8_t* tables, const uint8_t* weights, int64_t stride, int64_t outputs,
                                         Bytes* waiting, RowSums* sums, bool first) {
    for (; outputs; --outputs, weights += stride, ++waiting, ++sums) {
        __builtin_prefetch(weights + kAhead * stride);
        uint64_t bits[3];  // 40 bits each, in the last from bit 24 on: nothing past the block's 15 bytes is read
        std::memcpy(&bits[0], weights, 8);
        std::memcpy(&bits[1], weights + 5, 8);
        std::memcpy(&bits[2], weights + 7, 8);
        Vector a = FirstOfTwo ? _mm256_setzero_si256() : waiting->a, b = FirstOfTwo ? a : waiting->b;
        Vector s = _mm256_setzero_si256();
        BITORCH_QLINEAR_UNROLL
        for (int word = 0; word < 3; ++word) {
            BITORCH_QLINEAR_UNROLL
            for (int i = 0; i < 8; ++i) {
                const int table = 8 * word + i, shift = kIndexBits * i + (word == 2 ? 24 : 0);
                // This is the index times 32, the size of an entry. gcc 12 needs two instructions for a shift and one
                // for this.
                const uint64_t offset = std::rotr(bits[word], shift - 5) & (kEntries - 1) << 5;
                const Vector entry =
                    _mm256_load_si256(reinterpret_cast<const Vector*>(tables + table * kTableBytes + offset));
                s = table % kGroupTables ? _mm256_add_epi8(s, entry) : entry;
                if (table % kGroupTables == kGroupTables - 1) {
                    accumulate(a, s);
                    accumulate(b, _mm256_srli_epi16(s, 4));
                }
            }
        }
        if (Flush) {
            flush_pair(a, b, &sums->halves[0], &sums->halves[1], first);
        } else {
            *waiting = {a, b};
        }
    }
}

// Makes the tables of a block from its planes [120][32 bytes], each of which holds a row's bit in a 4-bit count. Values
// from `valid` on have planes of 0 and add nothing, for any weight bits.
__attribute__((noinline)) void make_tables(const Vector* planes, int64_t valid, Vector* tables) {
    for (int64_t value = 0; value < kBlock; tables += kEntries) {
        const Vector* ones = planes + value;
        tables[0] = _mm256_add_epi8(
            _mm256_add_epi8(_mm256_add_epi8(ones[0], ones[1]), _mm256_add_epi8(ones[2], ones[3])), ones[4]);
        BITORCH_QLINEAR_UNROLL
        for (int bit = 0; bit < kIndexBits; ++bit, ++value) {
            // A weight bit of 1 counts the row's zero instead of its one.
            const Vector more = value < valid
                                    ? _mm256_sub_epi8(_mm256_set1_epi8(0x11), _mm256_add_epi8(ones[bit], ones[bit]))
                                    : _mm256_setzero_si256();
            for (int entry = 0; entry < 1 << bit; ++entry)
                tables[entry + (1 << bit)] = _mm256_add_epi8(tables[entry], more);
        }
    }
}

// Makes the planes of up to 64 packed rows, for all blocks of k and up to 127 values more: 0 past k and past the rows.
__attribute__((noinline)) void make_planes(const uint32_t* x, int64_t rows, int64_t k, Vector* planes) {
    for (int64_t begin = 0; begin < ceil_div(k, kBlock) * kBlockBytes; begin += 16) {
        Vector low[16], high[16];
        load_byte_columns(x, 0, rows, begin, k, low);
        load_byte_columns(x, kRows / 2, rows, begin, k, high);
        for (int i = 0; i < 16; ++i) {
            const Vector nibbles[2] = {
                _mm256_or_si256(low_nibbles(low[i]), _mm256_slli_epi16(low_nibbles(high[i]), 4)),
                _mm256_or_si256(high_nibbles(low[i]), _mm256_slli_epi16(high_nibbles(high[i]), 4))};
            BITORCH_QLINEAR_UNROLL
            for (int bit = 0; bit < 8; ++bit, ++planes) {
                *planes = _mm256_and_si256(_mm256_srli_epi16(nibbles[bit / 4], bit % 4), _mm256_set1_epi8(0x11));
            }
        }
    }
}

// Transposes 8 x 8 values of 16 bits in each 128-bit half in place: v[i] becomes column i.
inline void transpose_16_bits(Vector* v) {
    for (int round = 0; round < 3; ++round) {
        Vector next[8];
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = _mm256_unpacklo_epi16(v[i], v[i + 4]);
            next[2 * i + 1] = _mm256_unpackhi_epi16(v[i], v[i + 4]);
        }
        for (int i = 0; i < 8; ++i) v[i] = next[i];
    }
}

// Turns the sums of 8 outputs into the int32 counts of 16 rows, counts[row][kFinished]. The rows are the even (0) or
// odd (1) bytes of a half of the 64.
inline void count_rows(const RowSums* sums, int half, int odd, int32_t* counts) {
    Vector v[8];
    BITORCH_QLINEAR_UNROLL
    for (int i = 0; i < 8; ++i) {
        Vector halves[2];
        even_and_odd(sums[i].halves[half], halves);
        v[i] = halves[odd];
    }
    transpose_16_bits(v);
    BITORCH_QLINEAR_UNROLL
    for (int i = 0; i < 8; ++i) {
        store(counts + i * kFinished, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(v[i])));
        store(counts + (i + 8) * kFinished, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v[i], 1)));
    }
}

// Writes y[rows][columns] from the sums of these rows (up to 64) and columns.
void finish(const Output& y, Range rows, Range columns, const RowSums* sums, int32_t* counts) {
    for (int64_t column = columns.begin; column < columns.end; column += kFinished, sums += kFinished) {
        const int64_t width = std::min(columns.end - column, kFinished);
        for (int64_t row = rows.begin; row < rows.end; row += 16) {
            const int sixteenth = static_cast<int>((row - rows.begin) / 16);
            for (int64_t i = 0; i < width; i += 8) count_rows(sums + i, sixteenth / 2, sixteenth % 2, counts + i);
            for (int64_t i = row; i < std::min(row + 16, rows.end); ++i) {
                write_row(y, i, column, counts + (i - row) * kFinished, width);
            }
        }
    }
}

int64_t planes_for(int64_t k) { return ceil_div(ceil_div(k, kBlock) * kBlockBytes, 16) * 128; }

// A call's private memory and its parts.
constexpr int64_t kTablesBytes = kTables * kTableBytes;
constexpr int64_t kWaitingBytes = kStrip * static_cast<int64_t>(sizeof(Bytes));
constexpr int64_t kSumsBytes = kStrip * static_cast<int64_t>(sizeof(RowSums));
constexpr int64_t kCountsBytes = 16 * kFinished * static_cast<int64_t>(sizeof(int32_t));

int64_t workspace_bytes(int64_t k) {
    return kTablesBytes + kWaitingBytes + kSumsBytes + kCountsBytes +
           planes_for(k) * static_cast<int64_t>(sizeof(Vector));
}

struct Workspace {
    Vector* tables;   // [24][32]
    Bytes* waiting;   // [strip]
    RowSums* sums;    // [strip]
    int32_t* counts;  // [16][kFinished]
    Vector* planes;   // [planes_for(k)]

    explicit Workspace(uint8_t* memory)
        : tables(reinterpret_cast<Vector*>(memory)),
          waiting(reinterpret_cast<Bytes*>(memory += kTablesBytes)),
          sums(reinterpret_cast<RowSums*>(memory += kWaitingBytes)),
          counts(reinterpret_cast<int32_t*>(memory += kSumsBytes)),
          planes(reinterpret_cast<Vector*>(memory += kCountsBytes)) {}
};

// Returns for how many of the rows this method is faster; gemm_avx2.cpp's own loops compute the others.
int64_t rows_worth(int64_t rows, int64_t columns, int64_t k) {
    if (columns < kFewestOutputs || k < kFewestValues || k > kMostValues) return 0;
    const int64_t rest = rows % kRows;
    return rest < kFewestRows ? rows - rest : rows;
}

// Multiplies up to 64 rows, whose planes are made, by a strip of outputs, into sums.
void multiply_strip(const Product& product, Range columns, const Workspace& work) {
    const int64_t stride = words_for(product.k) * kWordBytes, blocks = ceil_div(product.k, kBlock);
    for (int64_t block = 0; block < blocks; ++block) {
        make_tables(work.planes + block * kBlock, product.k - block * kBlock, work.tables);
        const auto add = block % 2            ? add_block<false, true>
                         : block + 1 < blocks ? add_block<true, false>
                                              : add_block<true, true>;
        const auto* tables = reinterpret_cast<const uint8_t*>(work.tables);
        const auto* weights =
            reinterpret_cast<const uint8_t*>(product.weight) + columns.begin * stride + block * kBlockBytes;
        // A last block may end past its row. In the last row that would be past the weights, so it is read from a copy.
        const int64_t left = stride - block * kBlockBytes;
        const bool copied = left < kBlockBytes && columns.end == product.n;
        const int64_t outputs = size(columns) - copied;
        add(tables, weights, stride, outputs, work.waiting, work.sums, block < 2);
        if (copied) {
            uint8_t copy[kBlockBytes] = {};
            std::memcpy(copy, weights + outputs * stride, left);
            add(tables, copy, 0, 1, work.waiting + outputs, work.sums + outputs, block < 2);
        }
    }
}

void multiply(const Product& product, Range rows, Range columns, uint8_t* memory) {
    const Workspace work(memory);
    for (int64_t row = rows.begin; row < rows.end; row += kRows) {
        const Range part{row, std::min(row + kRows, rows.end)};
        make_planes(product.x + row * words_for(product.k), size(part), product.k, work.planes);
        for (int64_t column = columns.begin; column < columns.end; column += kStrip) {
            const Range strip{column, std::min(column + kStrip, columns.end)};
            multiply_strip(product, strip, work);
            finish(product.y, part, strip, work.sums, work.counts);
        }
    }
}

}  // namespace gemm_tables
}  // namespace
}  // namespace bitorch_qlinear
