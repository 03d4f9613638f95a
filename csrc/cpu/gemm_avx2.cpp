// Binary matrix product by product tables (AVX2). Its slow twin is gemm_scalar.cpp. Blocks of many rows are computed by
// gemm_tables_avx2.h instead.
//
// popcount(a ^ b) is summed over K by table lookups that keep the *output index* in the byte lane, so
// that no sum ever goes across lanes. A nibble (4 values of K) of two rows of x, p and q, selects a
// 16-byte table (256 of them, 4 KiB, resident in L1):
//
//     T[p, q][w] = popcount(p ^ w) | popcount(q ^ w) << 4                  w = 0 .. 15
//
// and one vpshufb of it by 32 bytes, each the weight nibble of one output, gives 32 outputs x 4 values
// x 2 rows = 256 multiply-adds. Three lookups make a GROUP s (12 values; at most 12 in a 4-bit field):
//
//     A += s         bytes, modulo 256:  row p + 16 row q
//     B += s >> 4    16-bit shift unmasked: row q in each byte, plus 16 x (row p of the odd byte) in
//                    the even byte
//
// A and B are untangled once a BLOCK of at most 240 values (a count of 240 fits in a byte) into 16-bit
// sums, and these into int32 once a SPAN of at most 65520 values.
//
// Ports of a Zen 3 or 4 core: 2 shuffles or shifts a cycle, 4 byte adds. A group for 32 outputs is 3
// shuffles + 1 shift (FP1/FP2) + 4 adds = 8 operations on 4 pipes = 2 cycles for 768 multiply-adds: at
// most 384 a cycle. The loop in L1 takes 10.2 cycles for 128 outputs instead of at least 8: 300 a cycle,
// 78 % (Zen 4, measured against a chain of additions; gcc 12).
//
// The prepared form: panels of 64 outputs; in a panel, for each 8 values of K one cache line with the
// weights' byte of each output. Even bytes hold outputs 0-15 and odd bytes 16-31 of each half, so that
// the 16-bit halves of a sum are consecutive outputs:
//
//     byte     0    1    2    3   ...   30   31  |  32   33  ...   63
//     output  +0  +16   +1  +17   ...  +15  +31  | +32  +48  ...  +63
//
// A UNIT is 3 such lines: 6 nibbles, two groups, 24 values. Weight bits past K are 0, and so are those
// of x, so padding never counts.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "target.h"

// Our own headers are compiled for AVX2 here, too, and everything that they define has internal linkage.
BITORCH_QLINEAR_AVX2_BEGIN
#include "byte_sums_avx2.h"
#include "gemm_tables_avx2.h"
#include "hash.h"
#include "kernel.h"
#include "pack_avx2.h"
#include "pack_portable.h"

namespace bitorch_qlinear {
namespace {

constexpr int64_t kPanel = 64;
constexpr int64_t kUnit = 24;
constexpr int64_t kUnitBytes = 3 * kPanel;
constexpr int64_t kUnitNibbles = 6;
constexpr int64_t kUnitsPerBlock = 10;   // 240 values: the largest count still fits in a byte
constexpr int64_t kUnitsPerSpan = 2730;  // 65520 values: the largest count still fits in 16 bits
static_assert(kUnit * kUnitsPerBlock <= 255, "a block's count must fit in a byte");
static_assert(kUnit * kUnitsPerSpan <= 65535, "a span's count must fit in 16 bits");

// Two panels at a time: four weight vectors share each table that is loaded, and their eight sums fill
// half of the register file.
constexpr int64_t kColumns = 2 * kPanel;
// The rows' 16-bit sums take 256 bytes a row: 128 rows are 32 KiB. Fewer rows read the packed weights
// more often, more rows fall out of L2 (512 x 4096 -> 4096 without tables of rows, Zen 4: 32 rows
// 812 GMAC/s, 64: 913, 128: 996, 256: 971).
constexpr int64_t kRows = 128;

struct Tables {
    alignas(4096) uint8_t pair[256 * 16];  // [p | q << 4][w]
    alignas(64) uint8_t single[16 * 16];   // [p][w]
};

constexpr uint8_t nibble_popcount(int v) { return (v & 1) + (v >> 1 & 1) + (v >> 2 & 1) + (v >> 3 & 1); }

constexpr Tables make_tables() {
    Tables tables{};
    for (int i = 0; i < 256; ++i) {
        for (int w = 0; w < 16; ++w) {
            tables.pair[16 * i + w] = nibble_popcount((i & 15) ^ w) | nibble_popcount((i >> 4) ^ w) << 4;
        }
    }
    for (int i = 0; i < 16; ++i) {
        for (int w = 0; w < 16; ++w) tables.single[16 * i + w] = nibble_popcount(i ^ w);
    }
    return tables;
}
constexpr Tables kTables = make_tables();

inline Vector load_table(const uint8_t* tables, const uint16_t* offset) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(tables + *offset)));
}
inline Vector look_up(Vector table, Vector nibbles) { return _mm256_shuffle_epi8(table, nibbles); }
inline Vector sum(Vector a, Vector b, Vector c) { return _mm256_add_epi8(_mm256_add_epi8(a, b), c); }
// The sums of a row pair and 128 outputs: [weight vector 0..3][row p, row q].
struct PairSums {
    Sums rows[4][2];
};

// The inner loop: multiplies one row pair by one block of 32 Vectors outputs, from planar weights [nibble][128 bytes].
template <int Vectors>
__attribute__((noinline)) void pair_planar(const uint8_t* planar, const uint16_t* x, int64_t units, PairSums* sums,
                                           bool first) {
    Vector a[Vectors], b[Vectors];
    BITORCH_QLINEAR_UNROLL
    for (int v = 0; v < Vectors; ++v) a[v] = b[v] = _mm256_setzero_si256();
    for (int64_t groups = 2 * units; groups; --groups, planar += 3 * kColumns, x += 3) {
        const Vector t0 = load_table(kTables.pair, x), t1 = load_table(kTables.pair, x + 1),
                     t2 = load_table(kTables.pair, x + 2);
        BITORCH_QLINEAR_UNROLL
        for (int v = 0; v < Vectors; ++v) {
            const uint8_t* w = planar + 32 * v;
            const Vector s =
                sum(look_up(t0, load(w)), look_up(t1, load(w + kColumns)), look_up(t2, load(w + 2 * kColumns)));
            accumulate(a[v], s);
            accumulate(b[v], _mm256_srli_epi16(s, 4));
        }
    }
    BITORCH_QLINEAR_UNROLL
    for (int v = 0; v < Vectors; ++v) flush_pair(a[v], b[v], &sums->rows[v][0], &sums->rows[v][1], first);
}

// Multiplies one row pair by one block of 64 outputs, from the prepared form; Spread also writes the planar nibbles
// for the row pairs that follow.
template <bool Spread>
__attribute__((noinline)) void pair_panel(const uint8_t* panel, uint8_t* planar, const uint16_t* x, int64_t units,
                                          Sums (*sums)[2], bool first) {
    Vector a[2], b[2];
    BITORCH_QLINEAR_UNROLL
    for (int v = 0; v < 2; ++v) a[v] = b[v] = _mm256_setzero_si256();
    for (; units; --units, panel += kUnitBytes, planar += kUnitNibbles * kColumns, x += kUnitNibbles) {
        BITORCH_QLINEAR_UNROLL
        for (int v = 0; v < 2; ++v) {
            Vector w[kUnitNibbles];
            BITORCH_QLINEAR_UNROLL
            for (int line = 0; line < 3; ++line) {
                const Vector bytes = load(panel + kPanel * line + 32 * v);
                w[2 * line] = low_nibbles(bytes);
                w[2 * line + 1] = high_nibbles(bytes);
            }
            if (Spread) {
                BITORCH_QLINEAR_UNROLL
                for (int i = 0; i < kUnitNibbles; ++i) store(planar + kColumns * i + 32 * v, w[i]);
            }
            BITORCH_QLINEAR_UNROLL
            for (int i = 0; i < kUnitNibbles; i += 3) {
                const Vector s = sum(look_up(load_table(kTables.pair, x + i), w[i]),
                                     look_up(load_table(kTables.pair, x + i + 1), w[i + 1]),
                                     look_up(load_table(kTables.pair, x + i + 2), w[i + 2]));
                accumulate(a[v], s);
                accumulate(b[v], _mm256_srli_epi16(s, 4));
            }
        }
    }
    BITORCH_QLINEAR_UNROLL
    for (int v = 0; v < 2; ++v) flush_pair(a[v], b[v], &sums[v][0], &sums[v][1], first);
}

// Multiplies a single row by one span of Panels * 64 outputs, with byte sums that are flushed every block. For 32
// outputs by 8 values the loop masks twice, shifts, looks up twice and adds twice: 7 operations on 4 pipes, so at most
// 146 multiply-adds a cycle; it reaches 131 in L1 (90 %, Zen 4).
template <int Panels>
__attribute__((noinline)) void single_row(const uint8_t* panels, int64_t panel_bytes, const uint16_t* x, int64_t units,
                                          Sums (*sums)[2]) {
    constexpr int kVectors = 2 * Panels;
    for (bool first = true; units > 0; units -= kUnitsPerBlock, first = false) {
        Vector a[kVectors];
        BITORCH_QLINEAR_UNROLL
        for (int v = 0; v < kVectors; ++v) a[v] = _mm256_setzero_si256();
        for (int64_t u = units < kUnitsPerBlock ? units : kUnitsPerBlock; u; --u) {
            BITORCH_QLINEAR_UNROLL
            for (int line = 0; line < 3; ++line, panels += kPanel, x += 2) {
                const Vector t0 = load_table(kTables.single, x), t1 = load_table(kTables.single, x + 1);
                BITORCH_QLINEAR_UNROLL
                for (int v = 0; v < kVectors; ++v) {
                    const Vector bytes = load(panels + v / 2 * panel_bytes + v % 2 * 32);
                    accumulate(a[v], look_up(t0, low_nibbles(bytes)));
                    accumulate(a[v], look_up(t1, high_nibbles(bytes)));
                }
            }
        }
        BITORCH_QLINEAR_UNROLL
        for (int v = 0; v < kVectors; ++v) add_bytes(&sums[v][0], a[v], first);
    }
}

// Calls take(i, int32 counts) with the 16-bit sums of one row, for each 8 of the 32 `vectors` outputs from i on.
template <class Take>
inline void widen_sums(const Sums (*sums)[2], int row, int vectors, const Take& take) {
    for (int v = 0; v < vectors; ++v) {
        Vector halves[2];
        even_and_odd(sums[v][row], halves);
        const __m128i quarters[4] = {_mm256_castsi256_si128(halves[0]), _mm256_extracti128_si256(halves[0], 1),
                                     _mm256_castsi256_si128(halves[1]), _mm256_extracti128_si256(halves[1], 1)};
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 4; ++i) take(32 * v + 8 * i, _mm256_cvtepu16_epi32(quarters[i]));
    }
}

// A scale and a bias that change no value, not even the sign of a zero.
struct Neutral {
    float scale[kColumns], bias[kColumns];
};
constexpr Neutral make_neutral() {
    Neutral neutral{};
    for (float& factor : neutral.scale) factor = 1.0f;
    for (float& term : neutral.bias) term = -0.0f;
    return neutral;
}
constexpr Neutral kNeutral = make_neutral();

// Writes 32 `vectors` float32 outputs directly from the sums of their only span, with the same bits as write_outputs.
inline void write_floats(const Output& y, int64_t row, int64_t column, const Sums (*sums)[2], int sums_row,
                         int vectors) {
    const Vector k = _mm256_set1_epi32(y.k);
    const float* scale = y.scale ? static_cast<const float*>(y.scale) + column : kNeutral.scale;
    const float* bias = y.bias ? static_cast<const float*>(y.bias) + column : kNeutral.bias;
    float* out = static_cast<float*>(y.data) + row * y.n + column;
    widen_sums(sums, sums_row, vectors, [=](int i, Vector counts) __attribute__((always_inline)) {
        const __m256 dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_sub_epi32(k, counts), counts));
        const __m256 scaled = _mm256_mul_ps(dot, _mm256_loadu_ps(scale + i));
        _mm256_storeu_ps(out + i, _mm256_add_ps(scaled, _mm256_loadu_ps(bias + i)));
    });
}

// Turns the limits of `columns` outputs, a multiple of 32, into 16 bits: the least counts that exceed them. A count of
// a span is at most 65520, so a limit from 65534 on is no other than 65534.
inline void narrow_limits(const int32_t* limits, int64_t columns, uint16_t* least) {
    const auto narrow = [&](const int32_t* from) __attribute__((always_inline)) {
        const Vector never = _mm256_set1_epi32(-1), always = _mm256_set1_epi32(65534);
        return _mm256_sub_epi32(_mm256_min_epi32(_mm256_max_epi32(load(from), never), always), never);
    };
    for (int64_t i = 0; i < columns; i += 16) {
        // The pack instructions keep 128-bit lanes apart, and the permutation puts them in order.
        const Vector packed = _mm256_packus_epi32(narrow(limits + i), narrow(limits + i + 8));
        store(least + i, _mm256_permute4x64_epi64(packed, 0xD8));
    }
}

// Writes 32 `vectors` bits directly from the sums of their only span.
inline void write_bits(const Output& y, int64_t row, int64_t column, const uint16_t* least, const Sums (*sums)[2],
                       int sums_row, int vectors) {
    const int64_t first = column / kWordBits;
    uint32_t* out = static_cast<uint32_t*>(y.data) + row * words_for(y.n) + first;
    for (int v = 0; v < vectors; ++v, least += kWordBits) {
        Vector halves[2], exceeds[2];
        even_and_odd(sums[v][sums_row], halves);
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 2; ++i) {
            const Vector left = _mm256_subs_epu16(load(least + 16 * i), halves[i]);  // 0 if the limit is exceeded
            exceeds[i] = _mm256_cmpeq_epi16(left, _mm256_setzero_si256());
        }
        const Vector bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(exceeds[0], exceeds[1]), 0xD8);
        out[v] = ~static_cast<uint32_t>(_mm256_movemask_epi8(bytes)) ^ (y.flips ? y.flips[first + v] : 0);
    }
}

// Loads 32 bytes (256 values) of a packed row from byte `begin` on; bits past k become 0.
inline Vector load_bits(const uint32_t* row, int64_t begin, int64_t k) {
    const int64_t left = k - 8 * begin;
    const uint32_t* from = row + begin / kWordBytes;
    if (left >= 256) return load(from);
    // The load is masked, because a load from a copy made word by word would wait for the last of the writes.
    const Vector before = _mm256_setr_epi32(0, 32, 64, 96, 128, 160, 192, 224), zero = _mm256_setzero_si256();
    const Vector values = _mm256_max_epi32(_mm256_sub_epi32(_mm256_set1_epi32(static_cast<int>(left)), before), zero);
    const Vector past = _mm256_sllv_epi32(_mm256_set1_epi32(-1), values);  // 0 where all 32 count
    const Vector words = _mm256_maskload_epi32(reinterpret_cast<const int*>(from), _mm256_cmpgt_epi32(values, zero));
    return _mm256_andnot_si256(past, words);
}

inline int64_t units_for(int64_t k) { return ceil_div(k, kUnit); }
// The number of table offsets of a row or row pair: one for each nibble, in whole vectors of 64.
inline int64_t offsets_for(int64_t k) { return ceil_div(units_for(k) * kUnitNibbles, 64) * 64; }

// Makes the table offsets 16 (p | q << 4) of two packed rows, one for each nibble, in order of K. If q is null, its
// values are 0.
void make_offsets(const uint32_t* p, const uint32_t* q, int64_t k, uint16_t* offsets) {
    for (int64_t begin = 0; 2 * begin < offsets_for(k); begin += 32, offsets += 64) {
        const Vector bits_p = load_bits(p, begin, k);
        const Vector bits_q = q ? load_bits(q, begin, k) : _mm256_setzero_si256();
        const Vector even = _mm256_or_si256(low_nibbles(bits_p), _mm256_slli_epi16(low_nibbles(bits_q), 4));
        const Vector odd = _mm256_or_si256(high_nibbles(bits_p), _mm256_andnot_si256(_mm256_set1_epi8(15), bits_q));
        // The nibbles are in order, except that unpack keeps 128-bit lanes apart.
        const Vector low = _mm256_unpacklo_epi8(even, odd), high = _mm256_unpackhi_epi8(even, odd);
        const __m128i quarters[4] = {_mm256_castsi256_si128(low), _mm256_castsi256_si128(high),
                                     _mm256_extracti128_si256(low, 1), _mm256_extracti128_si256(high, 1)};
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 4; ++i) {
            store(offsets + 16 * i, _mm256_slli_epi16(_mm256_cvtepu8_epi16(quarters[i]), 4));
        }
    }
}

// The offsets of the parts of a tile's private memory, in bytes, each a multiple of 64.
struct WorkspaceLayout {
    int64_t sums, planar, counts, end;
};

WorkspaceLayout workspace_layout(int64_t rows, int64_t k) {
    const int64_t pairs = ceil_div(rows, 2), count_rows = units_for(k) > kUnitsPerSpan ? rows : 1;
    WorkspaceLayout at;
    at.sums = align64(pairs * offsets_for(k) * 2);
    at.planar = at.sums + pairs * static_cast<int64_t>(sizeof(PairSums));
    at.counts = at.planar + kUnitsPerBlock * kUnitNibbles * kColumns;
    at.end = at.counts + count_rows * kColumns * 4;
    return at;
}

struct Workspace {
    uint16_t* offsets;  // [row pairs][offsets_for(k)]
    PairSums* sums;     // [row pairs]
    uint8_t* planar;    // one block's weights, [nibble][128 outputs]; 7.5 KiB
    int32_t* counts;    // [rows][128] if K takes several spans, else one row that is reused

    Workspace(uint8_t* base, const WorkspaceLayout& at)
        : offsets(reinterpret_cast<uint16_t*>(base)),
          sums(reinterpret_cast<PairSums*>(base + at.sums)),
          planar(base + at.planar),
          counts(reinterpret_cast<int32_t*>(base + at.counts)) {}
};

// Multiplies all rows of a tile by one span of up to two panels, into 16-bit sums.
void multiply_span(const uint8_t* panels, int64_t panel_bytes, int count, const Workspace& work, int64_t rows,
                   int64_t offset_stride, Range units) {
    if (size(units) == 0) {
        for (int64_t pair = 0; pair < ceil_div(rows, 2); ++pair) work.sums[pair] = PairSums{};
        return;
    }
    if (rows == 1) {
        const uint8_t* from = panels + units.begin * kUnitBytes;
        const uint16_t* x = work.offsets + units.begin * kUnitNibbles;
        count == 2 ? single_row<2>(from, panel_bytes, x, size(units), work.sums->rows)
                   : single_row<1>(from, panel_bytes, x, size(units), work.sums->rows);
        return;
    }
    const int64_t pairs = ceil_div(rows, 2), blocks = ceil_div(size(units), kUnitsPerBlock);
    int64_t begin = units.begin;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t end = units.begin + size(units) * (block + 1) / blocks;
        for (int half = 0; half < count; ++half) {
            const uint8_t* panel = panels + half * panel_bytes + begin * kUnitBytes;
            const uint16_t* x = work.offsets + begin * kUnitNibbles;
            Sums(*sums)[2] = work.sums->rows + 2 * half;
            pairs > 1 ? pair_panel<true>(panel, work.planar + kPanel * half, x, end - begin, sums, block == 0)
                      : pair_panel<false>(panel, work.planar, x, end - begin, sums, block == 0);
        }
        for (int64_t pair = 1; pair < pairs; ++pair) {
            const uint16_t* x = work.offsets + pair * offset_stride + begin * kUnitNibbles;
            count == 2 ? pair_planar<4>(work.planar, x, end - begin, work.sums + pair, block == 0)
                       : pair_planar<2>(work.planar, x, end - begin, work.sums + pair, block == 0);
        }
        begin = end;
    }
}

void multiply_by_pair_tables(const Product& product, Range rows, Range columns, uint8_t* memory) {
    const int64_t words = words_for(product.k), units = units_for(product.k), stride = offsets_for(product.k);
    const Workspace work(memory, workspace_layout(size(rows), product.k));
    for (int64_t row = rows.begin; row < rows.end; row += 2) {
        const uint32_t* p = product.x + row * words;
        make_offsets(p, row + 1 < rows.end ? p + words : nullptr, product.k,
                     work.offsets + (row - rows.begin) / 2 * stride);
    }
    const int64_t panel_bytes = units * kUnitBytes;
    const int64_t spans = units > kUnitsPerSpan ? ceil_div(units, kUnitsPerSpan) : 1;
    for (int64_t column = columns.begin; column < columns.end; column += kColumns) {
        const int64_t width = columns.end - column < kColumns ? columns.end - column : kColumns;
        const int count = width > kPanel ? 2 : 1;
        const bool straight =
            spans == 1 && (product.y.dtype == DType::float32 || product.y.limits) && width == count * kPanel;
        alignas(32) uint16_t least[kColumns];
        if (straight && product.y.limits) narrow_limits(product.y.limits + column, width, least);
        const uint8_t* panels = product.panels + column / kPanel * panel_bytes;
        for (int64_t span = 0; span < spans; ++span) {
            const Range part{units * span / spans, units * (span + 1) / spans};
            multiply_span(panels, panel_bytes, count, work, size(rows), stride, part);
            for (int64_t row = 0; row < size(rows); ++row) {
                const Sums(*sums)[2] = work.sums[row / 2].rows;
                if (straight) {
                    const int vectors = 2 * count;
                    product.y.limits ? write_bits(product.y, rows.begin + row, column, least, sums, row % 2, vectors)
                                     : write_floats(product.y, rows.begin + row, column, sums, row % 2, vectors);
                    continue;
                }
                int32_t* counts = work.counts + (spans > 1 ? row * kColumns : 0);
                widen_sums(sums, row % 2, 2 * count, [=](int i, Vector values) __attribute__((always_inline)) {
                    store(counts + i, span == 0 ? values : _mm256_add_epi32(values, load(counts + i)));
                });
                if (span + 1 == spans) write_row(product.y, rows.begin + row, column, counts, width);
            }
        }
    }
}

void prepare(const uint32_t* words, int64_t n, int64_t k, Range panels, uint8_t* out) {
    const int64_t lines = 3 * units_for(k);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        uint8_t* to = out + panel * lines * kPanel;
        for (int64_t begin = 0; begin < lines; begin += 16) {
            for (int half = 0; half < 2; ++half) {
                Vector columns[16];
                load_byte_columns(words, panel * kPanel + 32 * half, n, begin, k, columns);
                for (int64_t i = 0; i < 16 && begin + i < lines; ++i) {
                    store(to + (begin + i) * kPanel + 32 * half, columns[i]);
                }
            }
        }
    }
}

int64_t workspace_bytes(int64_t rows, int64_t k) {
    return std::max(workspace_layout(rows, k).end, gemm_tables::workspace_bytes(k));
}

void gemm(const Product& product, Range rows, Range columns, uint8_t* memory) {
    const int64_t taken = gemm_tables::rows_worth(size(rows), size(columns), product.k);
    if (taken) gemm_tables::multiply(product, {rows.begin, rows.begin + taken}, columns, memory);
    rows.begin += taken;
    if (size(rows)) multiply_by_pair_tables(product, rows, columns, memory);
}

}  // namespace
}  // namespace bitorch_qlinear
BITORCH_QLINEAR_TARGET_END

namespace bitorch_qlinear {

// This is outside the region, because it runs before it is known that the processor has AVX2.
static bool runs_on(const CpuFeatures& features) { return features.avx2; }

const Kernel kAvx2Kernel = {
    .name = "avx2",
    .requires_features = "AVX2, FMA, F16C and BMI2",
    .runs_on = runs_on,
    .pack_row = {pack_row_by_words<double>, pack_row_by_words<float>, pack_row_by_words<Half>,
                 pack_row_by_words<BFloat16>},
    .pack_levels = {pack_levels_by_words<double>, pack_levels_by_words<float>, pack_levels_by_words<Half>,
                    pack_levels_by_words<BFloat16>},
    .pack_limited_rows = {pack_limited_rows_by_words<double>, pack_limited_rows_by_words<float>,
                          pack_limited_rows_by_words<Half>, pack_limited_rows_by_words<BFloat16>},
    .unpack_row = unpack_row_portable,
    .hash_words = hash_words,
    .layout = {.id = 3, .panel = kPanel, .unit = kUnit, .unit_bytes = kUnitBytes},
    .prepare = prepare,
    .row_tile = kRows,
    .column_tile = kColumns,
    .workspace_bytes = workspace_bytes,
    .gemm = gemm,
    .sign_gemm = &kAvx2SignGemm,
};

}  // namespace bitorch_qlinear
#endif
