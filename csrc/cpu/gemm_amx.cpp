// Binary matrix product in the processor's tile registers (AMX), for products that are large enough; all others are
// left to gemm_avx512.cpp, whose form of the weights this reads. Its slow twin is gemm_scalar.cpp.
//
// The signs of x are unpacked to bytes, a block of rows at a time, and multiplied like levels (byte_gemm_amx.cpp). Sums
// are 8 times those of the values at most, so with at most 2^15 values they fit into an int32.
//
// Measured on an Intel Xeon (family 6, model 167), one thread, times as shares of gemm_avx512.cpp's:
//
//   outputs  rows      1024 x 1024  4096 x 768  4096 x 4096   (outputs by values)
//   float32  28        0.72         0.69        0.76
//            64        0.61         0.82        0.69
//            128, 512  0.63, 0.65   0.68, 0.82  0.68, 0.73
//   bits     28        0.76                     0.79
//            64        0.56                     0.64
//            200, 512  0.62, 0.53               0.70, 0.61
//
// Smaller products would be slower. Near the bounds below, the times of 90 products, of all types of outputs, are at
// most 1.05 times those of gemm_avx512.cpp; without the bounds, float32 outputs of 512 values and products by 256
// outputs would take up to 1.3 times as long, and products of fewer than 25 rows up to 1.9 times.
#include "target.h"

#if defined(BITORCH_QLINEAR_HAS_AMX)
#include <algorithm>
#include <cstdint>

#include "intrinsics_avx512.h"

// Our own headers are compiled for AVX-512 here, too, and everything that they define has internal linkage.
BITORCH_QLINEAR_AMX_BEGIN
#include "byte_gemm_amx.h"
#include "cpu_features.h"
#include "kernel.h"

namespace bitorch_qlinear {
namespace {

using Vector = __m512i;

// The fewest rows, outputs, values and multiply-adds from which this is faster than gemm_avx512.cpp. Outputs that are
// neither bits nor float32 need more, because a function writes them, 32 at a time.
constexpr int64_t kLeastRows = 25, kLeastColumns = 512;
struct Least {
    int64_t values, products;
};
constexpr Least kLeastOfBits{512, 1 << 24}, kLeastOfFloats{768, 1 << 24}, kLeastOfOthers{1024, 1 << 25};
// Wider rows of numbers need more values, because memory takes them no faster.
constexpr int64_t kWideRow = 4096, kLeastValuesOfWide = 1536;
constexpr int64_t kMostValues = int64_t{1} << 15;  // of which 32 rows are 1 MiB, half of L2

// Returns how many of the last rows gemm_avx512.cpp multiplies faster: up to 20 of a block of 32, because they would
// unpack all weights for themselves, and otherwise up to 8 of 16.
int64_t rest_of(int64_t rows, int64_t block) {
    const bool alone = block == 2 * kTileRows;
    const int64_t rest = rows % (alone ? block : kTileRows);
    return rest <= (alone ? 20 : 8) ? rest : 0;
}

// Writes the bytes and the sums of rows of signs. Rows that fill the last group keep the bytes that they have, because
// no output depends on them.
void write_signs(const Product& product, Range rows, uint8_t* bytes, int32_t* sums) {
    const ByteOrder order;
    const Vector plus = order.factors, minus = _mm512_sub_epi8(_mm512_setzero_si512(), plus);
    const int64_t k = product.k, words = words_for(k), steps = byte_row_bytes(k) / kStep, count = size(rows);
    for (int64_t group = 0; group < count; group += kTileRows, bytes += steps * kTileBytes, sums += kTileRows) {
        const int64_t height = std::min(count - group, kTileRows);
        const uint32_t* const x = product.x + (rows.begin + group) * words;
        int32_t ones[kTileRows] = {};
        for (int64_t step = 0; step < steps; ++step) {
            const bool two = 2 * step + 1 < words;
            const uint64_t valid = word_mask(2 * step, k) | uint64_t{word_mask(2 * step + 1, k)} << 32;
            uint8_t* const tile = bytes + step * kTileBytes;
            for (int64_t i = 0; i < height; ++i) {
                const uint32_t* const from = x + i * words + 2 * step;
                const uint64_t bits = (from[0] | (two ? uint64_t{from[1]} << 32 : 0)) & valid;
                ones[i] += static_cast<int32_t>(__builtin_popcountll(bits));
                const Vector signs = _mm512_mask_mov_epi8(_mm512_maskz_mov_epi8(valid, minus), bits, plus);
                _mm512_store_si512(tile + i * kStep, _mm512_permutexvar_epi8(order.places, signs));
            }
        }
        for (int64_t i = 0; i < height; ++i) sums[i] = 2 * ones[i] - static_cast<int32_t>(k);
    }
}

// Returns y from row `row` on.
Output rows_from(const Output& y, int64_t row) {
    const int64_t row_bytes = y.limits ? words_for(y.n) * kWordBytes : y.n * element_size(y.dtype);
    Output rest = y;
    rest.data = static_cast<uint8_t*>(y.data) + row * row_bytes;
    return rest;
}

void multiply(const Product& product, Range rows, Range columns, uint8_t* workspace) {
    const int64_t block = byte_block_rows(product.k, product.y.limits);
    uint8_t* const bytes = workspace + byte_workspace_bytes(product.k);
    int32_t* const sums = reinterpret_cast<int32_t*>(bytes + block * byte_row_bytes(product.k));
    for (int64_t begin = rows.begin; begin < rows.end; begin += block) {
        const int64_t end = std::min(begin + block, rows.end);
        write_signs(product, {begin, end}, bytes, sums);
        multiply_bytes({.bytes = bytes, .sums = sums, .nans = nullptr, .bits = 1}, product.panels,
                       rows_from(product.y, begin), {0, end - begin}, columns, workspace);
    }
}

int64_t tile_workspace_bytes(int64_t k) {
    const int64_t rows = byte_block_rows(k, true);  // no fewer than for numbers
    return byte_workspace_bytes(k) + rows * (byte_row_bytes(k) + int64_t{sizeof(int32_t)});
}

}  // namespace
}  // namespace bitorch_qlinear
BITORCH_QLINEAR_TARGET_END

namespace bitorch_qlinear {

// These need no tile registers, which the process may not have been granted.
static bool has_size(int64_t rows, int64_t k) {
    return rows >= kLeastRows && k >= kLeastOfBits.values && k <= kMostValues;
}

bool amx_is_faster(const Output& y, int64_t rows, int64_t columns, int64_t k) {
    const Least& least = y.limits ? kLeastOfBits : y.dtype == DType::float32 ? kLeastOfFloats : kLeastOfOthers;
    const bool wide = !y.limits && y.n > kWideRow;
    return has_size(rows, k) && columns >= kLeastColumns && k >= (wide ? kLeastValuesOfWide : least.values) &&
           columns >= ceil_div(least.products, rows * k);
}

int64_t amx_workspace_bytes(int64_t rows, int64_t k) {
    const int64_t bytes = kAvx512Kernel.workspace_bytes(rows, k);
    return has_size(rows, k) ? std::max(bytes, tile_workspace_bytes(k)) : bytes;
}

void amx_gemm(const Product& product, Range rows, Range columns, uint8_t* workspace) {
    int64_t middle = rows.begin;
    if (amx_is_faster(product.y, size(rows), size(columns), product.k) && tiles_granted()) {
        middle = rows.end - rest_of(size(rows), byte_block_rows(product.k, product.y.limits));
        multiply(product, {rows.begin, middle}, columns, workspace);
    }
    if (middle < rows.end) kAvx512Kernel.gemm(product, {middle, rows.end}, columns, workspace);
}

}  // namespace bitorch_qlinear
#endif
