// Binary matrix product by XOR and VPOPCNTD (AVX-512). Its slow twin is gemm_scalar.cpp.
//
// A 32-bit lane belongs to one output, so that no sum ever goes across lanes and the accumulators are the
// int32 popcounts that the epilogue takes, for any K. One word of x, broadcast, meets the same word of 16
// weight rows:
//
//     count += VPOPCNTD(broadcast(x[row][word]) ^ weights[word][16 outputs])         512 multiply-adds
//
// A tile of 4 rows x 64 outputs keeps 16 such vectors of counts; each weight vector that is loaded serves
// all its rows, each word of x all its outputs.
//
// Ports. Zen 4 takes 512 bits in two halves: a cycle has 2 XORs or additions, or 1 popcount (measured:
// 0.50, 0.50, 1.00 cycles), and all three share the four vector pipes, so 512 multiply-adds take at
// least (1 + 1 + 1) * 2 / 4 = 1.5 cycles: at most 341 a cycle. The loop alone in L1 reaches 334 (98 %).
//
// The prepared form: panels of 64 outputs; in a panel, for each word of K, that word of the 64 weight rows
// (256 bytes). Rows past N and bits past K are 0; the last word of x is masked, so padding never counts.
//
// Measured and rejected on Zen 4 (loops alone in L1, multiply-adds a cycle):
//   carry-save addition of two words before each popcount: 5 operations instead of 6, by ternary logic, 410
//     if they packed perfectly, but 298 with the two copies that VPTERNLOG's overwritten operand costs, and
//     250 with a fresh broadcast in place of each copy;
//   product tables as in gemm_avx2.cpp, 64 outputs x two rows, by VPERMB of 6 bits (378) or VPERMI2B of 7 bits
//     (400): this is without untangling the byte sums every 240 values, and a single row wastes half of it.
// Among 2, 4 and 6 rows a tile, 4 is the best; prefetching the weights for a single row costs 17 %.
#if defined(__x86_64__)
#include <cstdint>
#include <cstring>

#include "intrinsics_avx512.h"
#include "target.h"

// Our own headers are compiled for AVX-512 here, too, and everything that they define has internal linkage.
BITORCH_QLINEAR_AVX512_BEGIN
#include "hash.h"
#include "kernel.h"
#include "pack_avx512.h"
#include "pack_portable.h"

namespace bitorch_qlinear {
namespace {

using Vector = __m512i;

constexpr int kLanes = 16;
constexpr int kPanelVectors = 4;
constexpr int64_t kPanel = kLanes * kPanelVectors;
constexpr int64_t kUnitBytes = kPanel * kWordBytes;
constexpr int kRowGroup = 4;
constexpr int64_t kRows = 128;
// The words of K in a block of the weights: 128 KiB, which stay in L2 beside at most 256 KiB of 128 rows of x.
// A block is a part of one panel if K is large, and otherwise several panels, so that y is written in long rows
// (Zen 4: 512 x 256 -> 4096 takes 0.6 to 0.74 of the time that single panels take).
constexpr int64_t kBlockWords = 512;

inline Vector load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Vector v) { _mm512_storeu_si512(p, v); }

// A tile: up to 4 rows by 64 outputs by a part of K.
struct Tile {
    const uint32_t* x;  // rows `stride` words apart
    int64_t stride;
    const uint32_t* weights;  // [word][kPanel], of one panel
    int64_t words;
    uint32_t last;    // the mask of each row's last word
    bool first;       // if false, the counts continue those of the part before
    int32_t* counts;  // [row][kPanel]
};

// The place in y at which a tile's counts become outputs: y[row][column]. `inside` is the mask of the last vector's
// lanes.
struct Corner {
    const Output& y;
    int64_t row, column;
    __mmask16 inside;
};

// Writes float32 outputs directly from registers, in 0.75 (K = 64) to 0.95 (K = 1024) of the time that it takes through
// memory. The bits are those of write_outputs, because a factor of 1 and a term of -0.0 change nothing.
template <int Rows, int Vectors>
inline void write_floats(const Corner& corner, const Vector (&counts)[Rows][Vectors]) {
    const Output y = corner.y;  // a copy, which writes cannot change
    const Vector k = _mm512_set1_epi32(y.k);
    BITORCH_QLINEAR_UNROLL
    for (int v = 0; v < Vectors; ++v) {
        const int64_t column = corner.column + v * kLanes;
        const __mmask16 lanes = v + 1 < Vectors ? 0xFFFF : corner.inside;
        const auto read = [&](const void* vector, float absent) __attribute__((always_inline)) {
            return vector ? _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(vector) + column)
                          : _mm512_set1_ps(absent);
        };
        const __m512 scale = read(y.scale, 1.0f), bias = read(y.bias, -0.0f);
        float* out = static_cast<float*>(y.data) + corner.row * y.n + column;
        BITORCH_QLINEAR_UNROLL
        for (int r = 0; r < Rows; ++r, out += y.n) {
            const Vector dot = _mm512_sub_epi32(_mm512_sub_epi32(k, counts[r][v]), counts[r][v]);
            _mm512_mask_storeu_ps(out, lanes, _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale), bias));
        }
    }
}

// Writes bits directly from registers: a comparison gives those of 16 outputs. Two masks of 16 bits are joined as
// masks, because gcc 12 may spill one that becomes a 32-bit integer as two bytes and read back four.
template <int Rows, int Vectors>
inline void write_bits(const Corner& corner, const Vector (&counts)[Rows][Vectors]) {
    const Output y = corner.y;  // a copy, which writes cannot change
    const int64_t width = words_for(y.n);
    BITORCH_QLINEAR_UNROLL
    for (int v = 0; v < Vectors; v += 2) {
        const int64_t column = corner.column + v * kLanes, word = column / kWordBits;
        const bool two = v + 1 < Vectors;
        const auto read = [&](int at) __attribute__((always_inline)) {
            const __mmask16 lanes = at + 1 < Vectors ? 0xFFFF : corner.inside;
            return _mm512_maskz_loadu_epi32(lanes, y.limits + corner.column + at * kLanes);
        };
        const Vector low = read(v), high = two ? read(v + 1) : low;
        const uint32_t flips = y.flips ? y.flips[word] : 0, valid = word_mask(word, y.n);
        uint32_t* out = static_cast<uint32_t*>(y.data) + corner.row * width + word;
        BITORCH_QLINEAR_UNROLL
        for (int r = 0; r < Rows; ++r) {
            const __mmask16 lower = _mm512_cmple_epi32_mask(counts[r][v], low);
            const __mmask16 upper = two ? _mm512_cmple_epi32_mask(counts[r][v + two], high) : 0;
            out[r * width] = (_mm512_kunpackw(upper, lower) ^ flips) & valid;
        }
    }
}

// Multiplies Rows rows by 16 Vectors outputs, into tile.counts, or into y if there is a corner.
template <int Rows, int Vectors>
__attribute__((noinline)) void multiply_tile(const Tile& tile, const Corner* corner) {
    const uint32_t *x = tile.x, *weights = tile.weights;
    const int64_t stride = tile.stride, words = tile.words;
    int32_t* counts = tile.counts;
    Vector sums[Rows][Vectors];
    BITORCH_QLINEAR_UNROLL
    for (int r = 0; r < Rows; ++r) {
        BITORCH_QLINEAR_UNROLL
        for (int v = 0; v < Vectors; ++v) {
            sums[r][v] = tile.first ? _mm512_setzero_si512() : load(counts + r * kPanel + v * kLanes);
        }
    }
    const auto add_word = [&](const auto& word_of) __attribute__((always_inline)) {
        Vector w[Vectors];
        BITORCH_QLINEAR_UNROLL
        for (int v = 0; v < Vectors; ++v) w[v] = load(weights + v * kLanes);
        BITORCH_QLINEAR_UNROLL
        for (int r = 0; r < Rows; ++r) {
            const Vector word = _mm512_set1_epi32(static_cast<int>(word_of(r)));
            BITORCH_QLINEAR_UNROLL
            for (int v = 0; v < Vectors; ++v) {
                sums[r][v] = _mm512_add_epi32(sums[r][v], _mm512_popcnt_epi32(_mm512_xor_si512(word, w[v])));
            }
        }
        weights += kPanel;
    };
    for (int64_t i = 0; i < words - 1; ++i) add_word([&](int r) { return x[r * stride + i]; });
    if (words > 0) add_word([&](int r) { return x[r * stride + words - 1] & tile.last; });
    if (corner) return corner->y.limits ? write_bits(*corner, sums) : write_floats(*corner, sums);
    BITORCH_QLINEAR_UNROLL
    for (int r = 0; r < Rows; ++r) {
        BITORCH_QLINEAR_UNROLL
        for (int v = 0; v < Vectors; ++v) store(counts + r * kPanel + v * kLanes, sums[r][v]);
    }
}

using MultiplyTile = decltype(&multiply_tile<1, 1>);
template <int Rows>
constexpr MultiplyTile kTiles[kPanelVectors] = {multiply_tile<Rows, 1>, multiply_tile<Rows, 2>, multiply_tile<Rows, 3>,
                                                multiply_tile<Rows, 4>};

MultiplyTile tile_of(int64_t rows, int64_t vectors) {
    switch (rows) {
        case 1: return kTiles<1>[vectors - 1];
        case 2: return kTiles<2>[vectors - 1];
        case 3: return kTiles<3>[vectors - 1];
        default: return kTiles<4>[vectors - 1];
    }
}

// Multiplies up to 4 rows by up to a panel of columns over the words `part` of K, and writes y after the last of them.
inline void multiply_part(const Product& product, Range rows, Range columns, Range part, int32_t* counts) {
    const int64_t words = words_for(product.k), vectors = ceil_div(size(columns), kLanes);
    const bool last = part.end == words, direct = product.y.dtype == DType::float32 || product.y.limits;
    const Tile tile{
        .x = product.x + rows.begin * words + part.begin,
        .stride = words,
        .weights = reinterpret_cast<const uint32_t*>(product.panels) + columns.begin * words + part.begin * kPanel,
        .words = size(part),
        .last = word_mask(part.end - 1, product.k),
        .first = part.begin == 0,
        .counts = counts};
    const int64_t inside = size(columns) - (vectors - 1) * kLanes;
    const Corner corner{product.y, rows.begin, columns.begin, static_cast<__mmask16>((1u << inside) - 1)};
    tile_of(size(rows), vectors)(tile, last && direct ? &corner : nullptr);
    if (!last || direct) return;
    for (int64_t row = rows.begin; row < rows.end; ++row, counts += kPanel) {
        write_outputs(product.y, row, columns.begin, counts, size(columns));
    }
}

int64_t blocks_for(int64_t k) { return k > 0 ? ceil_div(words_for(k), kBlockWords) : 1; }

int64_t columns_for(int64_t k) { return k > 0 ? ceil_div(kBlockWords, words_for(k)) * kPanel : kPanel; }

// The counts of all rows if K takes several blocks, else of one group of rows.
int64_t workspace_bytes(int64_t rows, int64_t k) {
    return (blocks_for(k) > 1 ? rows : kRowGroup) * kPanel * static_cast<int64_t>(sizeof(int32_t));
}

void gemm(const Product& product, Range rows, Range columns, uint8_t* memory) {
    const int64_t words = words_for(product.k), blocks = blocks_for(product.k), block_columns = columns_for(product.k);
    int32_t* workspace = reinterpret_cast<int32_t*>(memory);
    // Three loops go over blocks that stay in L2; the tiles inside them keep their counts in registers.
    for (int64_t begin = columns.begin; begin < columns.end; begin += block_columns) {
        const int64_t end = columns.end - begin < block_columns ? columns.end : begin + block_columns;
        for (int64_t block = 0; block < blocks; ++block) {
            const Range part{words * block / blocks, words * (block + 1) / blocks};
            for (int64_t row = rows.begin; row < rows.end; row += kRowGroup) {
                const Range group{row, rows.end - row < kRowGroup ? rows.end : row + kRowGroup};
                int32_t* counts = workspace + (blocks > 1 ? (row - rows.begin) * kPanel : 0);
                for (int64_t column = begin; column < end; column += kPanel) {
                    const int64_t panel_end = end - column < kPanel ? end : column + kPanel;
                    multiply_part(product, group, {column, panel_end}, part, counts);
                }
            }
        }
    }
}

// Transposes 16 x 16 words in place: v[i] becomes column i. Each round interleaves registers 8 apart, which rotates
// the eight index bits (row, column) by one; after four rounds they have changed places.
inline void transpose(Vector* v) {
    const Vector low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const Vector high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int round = 0; round < 4; ++round) {
        Vector next[16];
        BITORCH_QLINEAR_UNROLL
        for (int i = 0; i < 8; ++i) {
            next[2 * i] = _mm512_permutex2var_epi32(v[i], low, v[i + 8]);
            next[2 * i + 1] = _mm512_permutex2var_epi32(v[i], high, v[i + 8]);
        }
        for (int i = 0; i < 16; ++i) v[i] = next[i];
    }
}

void prepare(const uint32_t* words, int64_t n, int64_t k, Range panels, uint8_t* out) {
    const int64_t width = words_for(k);
    for (int64_t row = panels.begin * kPanel; row < panels.end * kPanel; row += kLanes) {
        uint8_t* to = out + (row / kPanel * width * kPanel + row % kPanel) * kWordBytes;
        for (int64_t begin = 0; begin < width; begin += kLanes) {
            const int64_t count = width - begin < kLanes ? width - begin : kLanes;
            const __mmask16 inside = static_cast<__mmask16>((1u << count) - 1);
            alignas(64) uint32_t valid[kLanes];
            for (int i = 0; i < kLanes; ++i) valid[i] = word_mask(begin + i, k);
            Vector v[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                v[i] = row + i < n
                           ? _mm512_and_si512(_mm512_maskz_loadu_epi32(inside, words + (row + i) * width + begin),
                                              load(valid))
                           : _mm512_setzero_si512();
            }
            transpose(v);
            for (int64_t i = 0; i < count; ++i) store(to + (begin + i) * kUnitBytes, v[i]);
        }
    }
}

}  // namespace
}  // namespace bitorch_qlinear
BITORCH_QLINEAR_TARGET_END

namespace bitorch_qlinear {

// This is outside the region, because it runs before it is known that the processor has AVX-512.
static constexpr Kernel record(const char* name, const char* features, bool (*runs_on)(const CpuFeatures&),
                               const LevelGemm* level_gemm) {
    return {
        .name = name,
        .requires_features = features,
        .runs_on = runs_on,
        .pack_row = {pack_row_by_words<double>, pack_row_by_words<float>, pack_row_by_words<Half>,
                     pack_row_by_words<BFloat16>},
        .pack_levels = {pack_levels_by_words<double>, pack_levels_by_words<float>, pack_levels_by_words<Half>,
                        pack_levels_by_words<BFloat16>},
        .pack_limited_rows = {pack_limited_rows_by_words<double>, pack_limited_rows_by_words<float>,
                              pack_limited_rows_by_words<Half>, pack_limited_rows_by_words<BFloat16>},
        .unpack_row = unpack_row_portable,
        .hash_words = hash_words,
        .layout = {.id = 4, .panel = kPanel, .unit = kWordBits, .unit_bytes = kUnitBytes},
        .prepare = prepare,
        .row_tile = kRows,
        .column_tile = kPanel,
        .workspace_bytes = workspace_bytes,
        .gemm = gemm,
        // AVX2's way is used: with 512-bit loads 30 bits take 7.9 cycles instead of 7.5 (Zen 4, which splits them).
        .sign_gemm = &kAvx512SignGemm,
        .level_gemm = level_gemm,
    };
}

constinit const Kernel kAvx512Kernel = record(
    "avx512", "AVX-512 F, BW, DQ, VL and VPOPCNTDQ, AVX2, FMA, F16C and BMI2",
    [](const CpuFeatures& features) { return features.avx512; }, nullptr);

#if defined(BITORCH_QLINEAR_HAS_AMX)
// It has the form of the weights in common with the kernel above, and all but its products.
constinit const Kernel kAmxKernel = [] {
    Kernel kernel = record(
        "amx", "AMX-TILE, AMX-INT8 and AVX512_VBMI, and all that avx512 needs",
        [](const CpuFeatures& features) { return features.amx; }, &kAmxLevelGemm);
    kernel.workspace_bytes = amx_workspace_bytes;
    kernel.gemm = amx_gemm;
    return kernel;
}();
#endif

}  // namespace bitorch_qlinear
#endif
