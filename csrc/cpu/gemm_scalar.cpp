// The portable kernel, which is the slow twin of all others: XOR and popcount over the interchange form, one 32-bit
// word at a time, as packed.h and epilogue.h define it.
#include "hash.h"
#include "kernel.h"
#include "pack_portable.h"

namespace bitorch_qlinear {
namespace {

int32_t differing_bits(const uint32_t* a, const uint32_t* b, int64_t k) {
    int32_t count = 0;
    for (int64_t w = 0; w < words_for(k); ++w) count += __builtin_popcount((a[w] ^ b[w]) & word_mask(w, k));
    return count;
}

void gemm(const Product& product, Range rows, Range columns, uint8_t*) {
    const int64_t words = words_for(product.k);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        // 32 outputs at a time, because they may become the bits of one word.
        for (int64_t j = columns.begin; j < columns.end; j += kWordBits) {
            const int64_t width = columns.end - j < kWordBits ? columns.end - j : kWordBits;
            int32_t counts[kWordBits];
            for (int64_t c = 0; c < width; ++c) {
                counts[c] = differing_bits(product.x + i * words, product.weight + (j + c) * words, product.k);
            }
            write_outputs(product.y, i, j, counts, width);
        }
    }
}

}  // namespace

const Kernel kScalarKernel = {
    .name = "scalar",
    .requires_features = "nothing",
    .runs_on = [](const CpuFeatures&) { return true; },
    .pack_row = {pack_row_portable<double>, pack_row_portable<float>, pack_row_portable<Half>,
                 pack_row_portable<BFloat16>},
    .pack_levels = {pack_levels_portable<double>, pack_levels_portable<float>, pack_levels_portable<Half>,
                    pack_levels_portable<BFloat16>},
    .pack_limited_rows = {pack_limited_rows_portable<double>, pack_limited_rows_portable<float>,
                          pack_limited_rows_portable<Half>, pack_limited_rows_portable<BFloat16>},
    .unpack_row = unpack_row_portable,
    .hash_words = hash_words,
    .layout = {.id = 0, .panel = 1, .unit = kWordBits, .unit_bytes = 0},
    .prepare = nullptr,
    .row_tile = 16,
    .column_tile = 1,
    .workspace_bytes = [](int64_t, int64_t) -> int64_t { return 0; },
    .gemm = gemm,
    .sign_gemm = &kScalarSignGemm,
};

}  // namespace bitorch_qlinear
