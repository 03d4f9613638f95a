// The product of rows of bytes by packed weights in the processor's tile registers (AMX), which levels and signs share.
// A file includes this inside its region for AMX (target.h).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "level_gemm.h"
#include "target.h"

namespace bitorch_qlinear {

constexpr int64_t kTileRows = 16, kTileBytes = 1024;
constexpr int64_t kStep = 64;  // values of a row of a tile

// Returns how many rows multiply_bytes takes at a time. Each block unpacks all weights again.
int64_t byte_block_rows(int64_t k, bool bits);
int64_t byte_workspace_bytes(int64_t k);

// Computes y[rows][columns], where x.bytes has the form of tiles and the order of ByteOrder. rows.begin is a multiple
// of kTileRows, columns.begin of the panels' 64, k is not 0, and 8 k times the largest value fits into an int32. If y
// is bits or int32, x must hold signs. x.nans is null if no row holds a NaN. The panels have the form of
// gemm_avx512.cpp.
void multiply_bytes(const LevelBytes& x, const uint8_t* panels, const Output& y, Range rows, Range columns,
                    uint8_t* workspace);

namespace {

// Rows of values have the form of tiles: for each 16 rows and 64 values, 16 rows of 64 bytes. Bytes past k are 0.
inline int64_t byte_row_bytes(int64_t k) { return ceil_div(k, kStep) * kStep; }

// The order of the 64 bytes of a row of a tile, and what each is multiplied by. It follows from the way in which the
// weights are unpacked: bit 8 j + r of a word becomes byte j of row r of half a tile, as 0 or 2^(r % 4). So value
// 8 j + r of 32 values of x is byte 4 r + j, times 2^(3 - r % 4), and every product is 8 times that of the values.
struct ByteOrder {
    ByteOrder() {
        alignas(64) uint8_t from[64], factor[64];
        for (int i = 0; i < 64; ++i) {
            from[i] = static_cast<uint8_t>(i / 32 * 32 + i % 4 * 8 + i % 32 / 4);
            factor[i] = static_cast<uint8_t>(8 >> i % 4);
        }
        places = _mm512_load_si512(from);
        factors = _mm512_load_si512(factor);
    }
    __m512i places;   // which value each byte is (VPERMB)
    __m512i factors;  // of the values, before they are permuted
};

}  // namespace
}  // namespace bitorch_qlinear
