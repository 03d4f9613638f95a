#include "target.h"

#if defined(BITORCH_QLINEAR_HAS_AMX)
#if !defined(__clang__)
// gcc 12 warns about its own intrinsics, which begin with an undefined vector.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

// Our own headers are compiled for AVX-512 here, too, and everything that they define has internal linkage.
BITORCH_QLINEAR_AMX_BEGIN
#include "byte_gemm_amx.h"
#include "cpu_features.h"
#include "gemm_amx.h"

namespace bitorch_qlinear {
namespace {

using Vector = __m512i;

#ifndef XB
#define XB 1024
#endif
constexpr int64_t kRows = 32;
constexpr int64_t kMostBytes = XB << 10;

// The rows of x whose bytes are held at a time.
int64_t block_rows(int64_t rows, int64_t k) {
    const int64_t most = std::max(kRows, kMostBytes / (byte_row_bytes(k)) / kRows * kRows);
    const int64_t blocks = ceil_div(rows, most);
    return ceil_div(ceil_div(rows, blocks), kRows) * kRows;
}

// Writes rows of x. A byte is 1 for a bit 1, -1 for a bit 0 and 0 past K; rows past the last one are 0.
void write_signs(const Product& product, Range rows, uint8_t* all, int32_t* sums) {
    const int64_t words = words_for(product.k), steps = byte_row_bytes(product.k) / kStep, count = size(rows);
    const ByteOrder order;
    const Vector plus = order.factors, minus = _mm512_sub_epi8(_mm512_setzero_si512(), plus);
    const uint64_t last = ~uint64_t{0} >> (steps * kStep - product.k);
    for (int64_t group = 0; group * kTileRows < count; ++group) {
        uint8_t* to = all + group * steps * kTileBytes;
        int32_t ones[kTileRows] = {};
        const int64_t inside = std::min(count - group * kTileRows, kTileRows);
        const uint32_t* from = product.x + (rows.begin + group * kTileRows) * words;
        for (int64_t step = 0; step < steps; ++step, from += 2, to += kTileBytes) {
            const uint64_t valid = step + 1 < steps ? ~uint64_t{0} : last;
            for (int64_t i = 0; i < inside; ++i) {
                const uint32_t* const at = from + i * words;
                const uint64_t bits = (at[0] | (2 * step + 1 < words ? uint64_t{at[1]} << 32 : 0)) & valid;
                ones[i] += static_cast<int32_t>(__builtin_popcountll(bits));
                const Vector bytes = _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(valid, minus), bits, plus);
                _mm512_store_si512(to + i * kStep, _mm512_permutexvar_epi8(order.places, bytes));
            }
            for (int64_t i = inside; i < kTileRows; ++i) _mm512_store_si512(to + i * kStep, _mm512_setzero_si512());
        }
        for (int64_t i = 0; i < inside; ++i) sums[group * kTileRows + i] = 2 * ones[i] - static_cast<int32_t>(product.k);
    }
}

int64_t tile_bytes(int64_t rows, int64_t k) {
    return byte_workspace_bytes(block_rows(rows, k)) + block_rows(rows, k) * (byte_row_bytes(k) + int64_t{sizeof(int32_t)});
}

void multiply(const Product& product, Range rows, Range columns, uint8_t* workspace) {
    const int64_t k = product.k, block = block_rows(size(rows), k);
    uint8_t* const bytes = workspace + byte_workspace_bytes(block);
    int32_t* const sums = reinterpret_cast<int32_t*>(bytes + block * byte_row_bytes(k));
    const int64_t row_bytes = product.y.limits ? words_for(product.n) * kWordBytes : product.n * element_size(product.y.dtype);
    for (int64_t begin = rows.begin; begin < rows.end; begin += block) {
        const int64_t end = std::min(begin + block, rows.end);
        write_signs(product, {begin, end}, bytes, sums);
        Output y = product.y;
        y.data = static_cast<uint8_t*>(y.data) + begin * row_bytes;
        multiply_bytes({bytes, sums, nullptr, 1}, product.panels, y, {0, end - begin}, columns, workspace);
    }
}

bool may_use_tiles(int64_t rows, int64_t k) { return rows >= 1 && k > 0 && k <= 1 << 20; }

}  // namespace
}  // namespace bitorch_qlinear
BITORCH_QLINEAR_TARGET_END

namespace bitorch_qlinear {

// This is outside the region, because it runs before it is known that the processor has the instructions.
int64_t amx_workspace_bytes(int64_t rows, int64_t k) {
    const int64_t few = kAvx512Kernel.workspace_bytes(rows, k);
    return may_use_tiles(rows, k) ? std::max(few, tile_bytes(rows, k)) : few;
}

void amx_gemm(const Product& product, Range rows, Range columns, uint8_t* workspace) {
    if (may_use_tiles(size(rows), product.k) && tiles_granted()) return multiply(product, rows, columns, workspace);
    for (int64_t begin = rows.begin; begin < rows.end; begin += kAvx512Kernel.row_tile) {
        const int64_t end = std::min(begin + kAvx512Kernel.row_tile, rows.end);
        kAvx512Kernel.gemm(product, {begin, end}, columns, workspace);
    }
}

}  // namespace bitorch_qlinear
#endif
