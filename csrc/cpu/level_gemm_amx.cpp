// Levels as bytes by packed weights, in the processor's tile registers (AMX). Its slow twin is the planes' product
// (level_product.h) with the kernel of gemm_scalar.cpp.
//
// This file writes levels as the bytes that byte_gemm_amx.cpp multiplies.
#include "target.h"

#if defined(BITORCH_QLINEAR_HAS_AMX)
#include <cstdint>

#include "intrinsics_avx512.h"

// Our own headers are compiled for AVX-512 here, too, and everything that they define has internal linkage.
BITORCH_QLINEAR_AMX_BEGIN
#include "byte_gemm_amx.h"
#include "cpu_features.h"
#include "levels.h"

namespace bitorch_qlinear {
namespace {

using Vector = __m512i;

int32_t write_row(const uint32_t* planes, int64_t stride, int64_t k, int bits, int64_t row, uint8_t* bytes) {
    const ByteOrder order;
    const int64_t words = words_for(k), steps = byte_row_bytes(k) / kStep;
    uint8_t* to = bytes + row / kTileRows * steps * kTileBytes + row % kTileRows * kStep;
    int64_t sum = 0;
    for (int64_t step = 0; step < steps; ++step, to += kTileBytes) {
        Vector levels = _mm512_setzero_si512();
        for (int p = 0; p < bits; ++p) {
            const uint32_t* from = planes + p * stride + 2 * step;
            const uint64_t plane = from[0] | (2 * step + 1 < words ? uint64_t{from[1]} << 32 : 0);
            const Vector value = p == 0 ? order.factors : _mm512_add_epi8(order.factors, order.factors);
            levels = _mm512_mask_add_epi8(levels, plane, levels, value);
            sum += int64_t{__builtin_popcountll(plane)} << p;
        }
        _mm512_storeu_si512(to, _mm512_permutexvar_epi8(order.places, levels));
    }
    return static_cast<int32_t>(sum);
}

int64_t workspace_bytes(int64_t, int64_t k) { return byte_workspace_bytes(k); }

}  // namespace
}  // namespace bitorch_qlinear
BITORCH_QLINEAR_TARGET_END

namespace bitorch_qlinear {

// This is outside the region, because it runs before it is known that the processor has the instructions.
static bool takes(int64_t m, int64_t, int64_t k, int bits) {
    // Unpacking the weights takes the same time for 1 row as for 16. Measured (64 to 4096 values, 256 to 4096 outputs),
    // it pays from 4 to 9 rows on with two bits, and from 7 to 25 rows on with one.
    const int64_t least_rows = bits == 1 ? 12 : 8;
    return m >= least_rows && k > 0 && k <= INT32_MAX / (8 * steps_of(bits)) && tiles_granted();
}

const LevelGemm kAmxLevelGemm = {
    .takes = takes,
    .row_tile = 256,
    .row_group = kTileRows,
    .column_tile = 64,
    .row_bytes = byte_row_bytes,
    .write_row = write_row,
    .workspace_bytes = workspace_bytes,
    .multiply = multiply_bytes,
};

}  // namespace bitorch_qlinear
#endif
