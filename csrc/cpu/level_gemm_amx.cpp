// Levels as bytes by packed weights, in the processor's tile registers (AMX). Its slow twin is the planes' product
// (level_product.h) with the kernel of gemm_scalar.cpp.
//
// A tile register holds 16 rows of 64 bytes. TDPBUSD multiplies a tile of levels, 16 rows of x by 64 values, by a tile
// of weights, 64 values by 16 outputs, and adds the products to a tile of 16 x 16 int32: 16,384 multiply-adds in 16
// cycles. Four such tiles of sums share two tiles of levels and two of weights, so that every tile that is loaded
// serves twice.
//
// The weights come in the form of gemm_avx512.cpp. A bit becomes a byte b of 0 or 1 instead of a weight w of -1 or 1,
// because that takes one operation less, and
//
//     sum q w = 2 sum q b - sum q
//
// A tile of weights has four values of each output side by side, which one VPMULTISHIFTQB takes from the words of 16
// outputs. The weights of 32 outputs are unpacked again for each 32 rows of x, a few steps of 64 values before they are
// multiplied: then the 32 rows of levels and these weights stay in L1, and other units of the processor than those that
// multiply do the unpacking and write the outputs.
//
// Measured on an Intel Xeon (family 6, model 167), one thread: the product of 64 rows by 1024 x 1024 weights takes 39
// us, of which the multiplying instructions alone would take 18. Tried and rejected there: unpacking 32 outputs once
// for all rows, 48 us, because their bytes leave L1 (72 us if outputs are not written in the meantime either); four
// tiles of rows by one of outputs, 49 us; prefetching the levels, 48 us; unpacking 1, 2, 4 or 6 steps ahead instead of
// 3, up to 1.15 times the time.
#include "target.h"

#if defined(BITORCH_QLINEAR_HAS_AMX)
#if !defined(__clang__)
// gcc 12 warns about its own intrinsics, which begin with an undefined vector.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Our own headers are compiled for AVX-512 here, too, and everything that they define has internal linkage.
BITORCH_QLINEAR_AMX_BEGIN
#include "cpu_features.h"
#include "level_epilogue.h"
#include "level_gemm.h"

namespace bitorch_qlinear {
namespace {

using Vector = __m512i;

constexpr int64_t kTileRows = 16, kTileBytes = 1024;
constexpr int64_t kStep = 64;     // values of a row of a tile
constexpr int64_t kPanel = 64;    // outputs of a panel of the prepared form
constexpr int64_t kColumns = 32;  // outputs of two tiles
constexpr int64_t kRowPair = 32;  // rows of two tiles
constexpr int64_t kAhead = 3;     // how many steps the weights are unpacked before they are multiplied
constexpr int64_t kSlots = 4;     // steps of unpacked weights that are kept
constexpr int64_t kMostRows = 256;
constexpr int64_t kLineBytes = kColumns * sizeof(int32_t);  // of the sums of a row

int64_t steps_for(int64_t k) { return ceil_div(k, kStep); }

// ---- tile registers -------------------------------------------------------------------------------

// gcc's intrinsics for loading do not tell the compiler which memory they read. This keeps stores on their side of it.
inline void keep_order() { asm volatile("" ::: "memory"); }
inline void keep_order_of(const void* memory) { asm volatile("" ::"r"(memory) : "memory"); }

// The shapes of the tile registers, which belong to a thread. Other libraries use them, too, so they are set in each
// call, and are released at its end: the processor then need not save them.
struct TileRegisters {
    TileRegisters() {
        struct {
            uint8_t palette = 1, reserved[15] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        static_assert(sizeof shapes == 64);
        keep_order_of(&shapes);
        _tile_loadconfig(&shapes);
    }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

// ---- levels ---------------------------------------------------------------------------------------

// Levels have the form of tiles: for each 16 rows and 64 values, 16 rows of 64 bytes. Bytes past k are 0.
int64_t row_bytes(int64_t k) { return steps_for(k) * kStep; }

int32_t write_row(const uint32_t* planes, int64_t stride, int64_t k, int bits, int64_t row, uint8_t* bytes) {
    const int64_t words = words_for(k), steps = steps_for(k);
    uint8_t* to = bytes + row / kTileRows * steps * kTileBytes + row % kTileRows * kStep;
    int64_t sum = 0;
    for (int64_t step = 0; step < steps; ++step, to += kTileBytes) {
        Vector levels = _mm512_setzero_si512();
        for (int p = 0; p < bits; ++p) {
            const uint32_t* from = planes + p * stride + 2 * step;
            const uint64_t plane = from[0] | (2 * step + 1 < words ? uint64_t{from[1]} << 32 : 0);
            const Vector value = _mm512_set1_epi8(static_cast<char>(1 << p));
            levels = _mm512_or_si512(levels, _mm512_maskz_mov_epi8(plane, value));
            sum += int64_t{__builtin_popcountll(plane)} << p;
        }
        _mm512_storeu_si512(to, levels);
    }
    return static_cast<int32_t>(sum);
}

// ---- weights --------------------------------------------------------------------------------------

// Unpacks the words of 32 outputs to bytes 0 and 1.
class Unpacker {
  public:
    Unpacker() {
        alignas(64) uint8_t shifts[64];
        for (int j = 0; j < 64; ++j) shifts[j] = static_cast<uint8_t>(j / 4 % 2 * 32 + j % 4);
        for (int row = 0; row < 8; ++row) {
            controls_[row] = _mm512_add_epi8(_mm512_load_si512(shifts), _mm512_set1_epi8(static_cast<char>(4 * row)));
        }
    }

    // Writes a step of both tiles from one or two words of each output. If it is one, the other half keeps its bytes,
    // which are multiplied by levels of 0.
    void unpack(const uint32_t* words, bool two, uint8_t* to) const {
        unpack_word(words, to);
        if (two) unpack_word(words + kPanel, to + kTileBytes / 2);
    }

  private:
    // Writes half a step. Row r of a tile has the bits 4 r to 4 r + 3 of the words of 16 outputs.
    void unpack_word(const uint32_t* words, uint8_t* to) const {
        const Vector one = _mm512_set1_epi8(1);
        BITORCH_QLINEAR_UNROLL
        for (int tile = 0; tile < 2; ++tile) {
            const Vector word = _mm512_loadu_si512(words + tile * 16);
            BITORCH_QLINEAR_UNROLL
            for (int row = 0; row < 8; ++row) {
                const Vector bits = _mm512_multishift_epi64_epi8(controls_[row], word);
                _mm512_store_si512(to + tile * kTileBytes + row * kStep, _mm512_and_si512(bits, one));
            }
        }
    }

    // Which bit of the 64 bits of two words comes first in each byte.
    Vector controls_[8];
};

// ---- outputs --------------------------------------------------------------------------------------

// Factors of 1 and terms of -0.0, which change nothing, for outputs without scale or bias.
struct Neutral {
    Neutral() {
        for (int64_t i = 0; i < kColumns; ++i) {
            ones[i] = 1.0f;
            zeros[i] = -0.0f;
        }
    }
    alignas(64) float ones[kColumns], zeros[kColumns];
};

// The sums of a tile of up to 32 rows by 32 outputs, which become outputs a few rows at a time while the next tile is
// multiplied.
struct Sums {
    const LevelBytes& x;
    const Output& y;
    const Neutral& neutral;
    const int32_t* values;  // [32][32]
    int64_t row, column, rows, columns;

    // Writes the rows [begin, end), as far as they exist.
    void write(int64_t begin, int64_t end) const {
        const bool direct = y.dtype == DType::float32 && columns == kColumns;
        for (int64_t i = begin; i < (end < rows ? end : rows); ++i) {
            const bool nan = x.nans[row + i];
            direct && !nan ? write_floats(i) : write_any(i, nan);
        }
    }

  private:
    __attribute__((noinline)) void write_any(int64_t i, bool nan) const {
        const int32_t* const line = values + i * kColumns;
        const int32_t total = x.sums[row + i];
        write_levels({y, row + i, column, columns, x.bits}, nan, [=](int64_t j) { return 2 * line[j] - total; });
    }

    // Writes 32 float32 outputs with the bits of write_levels.
    void write_floats(int64_t i) const {
        const __m512 step = _mm512_set1_ps(1.0f / static_cast<float>(steps_of(x.bits)));
        const Vector total = _mm512_set1_epi32(x.sums[row + i]);
        const float* scale = y.scale ? static_cast<const float*>(y.scale) + column : neutral.ones;
        const float* bias = y.bias ? static_cast<const float*>(y.bias) + column : neutral.zeros;
        float* out = static_cast<float*>(y.data) + (row + i) * y.n + column;
        BITORCH_QLINEAR_UNROLL
        for (int v = 0; v < kColumns; v += 16) {
            const Vector sum = _mm512_load_si512(values + i * kColumns + v);
            const Vector levels = _mm512_sub_epi32(_mm512_add_epi32(sum, sum), total);
            const __m512 value =
                _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(levels), step), _mm512_loadu_ps(scale + v));
            _mm512_storeu_ps(out + v, _mm512_add_ps(value, _mm512_loadu_ps(bias + v)));
        }
    }
};

// ---- product --------------------------------------------------------------------------------------

// Multiplies 16 or 32 rows of levels by 32 outputs, whose words for each word of K lie kPanel words apart, and
// meanwhile writes the outputs of the tile before.
template <bool Two>
inline void multiply_tiles(const Unpacker& given, const uint8_t* levels, int64_t group_bytes, const uint32_t* panel,
                           int64_t words, uint8_t* weights, int32_t* sums, const Sums& before) {
    const Unpacker unpacker = given;  // a copy, which stays in registers
    const int64_t steps = ceil_div(words, 2);
    const auto unpack = [&](int64_t step) __attribute__((always_inline)) {
        if (step < steps) {
            unpacker.unpack(panel + 2 * step * kPanel, 2 * step + 1 < words, weights + step % kSlots * 2 * kTileBytes);
        }
    };
    const int64_t rows_per_step = ceil_div(kRowPair, steps);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < kAhead; ++step) unpack(step);
    for (int64_t step = 0; step < steps; ++step, levels += kTileBytes) {
        unpack(step + kAhead);
        keep_order();
        const uint8_t* slot = weights + step % kSlots * 2 * kTileBytes;
        _tile_loadd(4, levels, kStep);
        _tile_loadd(6, slot, kStep);
        _tile_loadd(7, slot + kTileBytes, kStep);
        keep_order();
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if (Two) {
            _tile_loadd(5, levels + group_bytes, kStep);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
        before.write(step * rows_per_step, (step + 1) * rows_per_step);
    }
    _tile_stored(0, sums, kLineBytes);
    _tile_stored(1, sums + 16, kLineBytes);
    if (Two) {
        _tile_stored(2, sums + kTileRows * kColumns, kLineBytes);
        _tile_stored(3, sums + kTileRows * kColumns + 16, kLineBytes);
    }
}

constexpr int64_t kWeightBytes = kSlots * 2 * kTileBytes;

int64_t workspace_bytes(int64_t, int64_t) { return kWeightBytes + 2 * kRowPair * kLineBytes; }

void multiply(const LevelBytes& x, const uint8_t* panels, const Output& y, Range rows, Range columns,
              uint8_t* workspace) {
    const TileRegisters registers;
    const Unpacker unpacker;
    const int64_t words = words_for(y.k), group_bytes = steps_for(y.k) * kTileBytes;
    int32_t* values = reinterpret_cast<int32_t*>(workspace + kWeightBytes);
    int32_t* others = values + kRowPair * kColumns;
    const Neutral neutral;
    Sums before{x, y, neutral, nullptr, 0, 0, 0, 0};
    for (int64_t row = rows.begin; row < rows.end; row += kRowPair) {
        const int64_t count = rows.end - row < kRowPair ? rows.end - row : kRowPair;
        const uint8_t* levels = x.bytes + row / kTileRows * group_bytes;
        for (int64_t column = columns.begin; column < columns.end; column += kColumns) {
            const int64_t width = columns.end - column < kColumns ? columns.end - column : kColumns;
            const uint32_t* const panel =
                reinterpret_cast<const uint32_t*>(panels) + column / kPanel * words * kPanel + column % kPanel;
            (count > kTileRows ? multiply_tiles<true> : multiply_tiles<false>)(unpacker, levels, group_bytes, panel,
                                                                               words, workspace, values, before);
            before.values = values;
            before.row = row;
            before.column = column;
            before.rows = count;
            before.columns = width;
            int32_t* const free = others;
            others = values;
            values = free;
        }
    }
    before.write(0, kRowPair);
}

}  // namespace
}  // namespace bitorch_qlinear
BITORCH_QLINEAR_TARGET_END

namespace bitorch_qlinear {

// This is outside the region, because it runs before it is known that the processor has the instructions.
static bool takes(int64_t m, int64_t, int64_t k, int bits) {
    // Unpacking the weights takes the same time for 1 row as for 16. Measured (64 to 4096 values, 256 to 4096 outputs),
    // it pays from 4 to 9 rows on with two bits, and from 7 to 25 rows on with one.
    const int64_t least_rows = bits == 1 ? 12 : 8;
    return m >= least_rows && k > 0 && k <= INT32_MAX / (2 * steps_of(bits)) && tiles_granted();
}

const LevelGemm kAmxLevelGemm = {
    .takes = takes,
    .row_tile = kMostRows,
    .row_group = kTileRows,
    .column_tile = kPanel,
    .row_bytes = row_bytes,
    .write_row = write_row,
    .workspace_bytes = workspace_bytes,
    .multiply = multiply,
};

}  // namespace bitorch_qlinear
#endif
