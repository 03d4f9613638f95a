// Binary matrix product by XOR and the popcount of bytes (CNT), for 64-bit Arm. Its slow twin is gemm_scalar.cpp.
//
// 16 bytes of a row of x are compared with 16 of a weight row, and the counts, at most 8 for each byte, are added in
// bytes:
//
//     bytes += CNT(x ^ w)                                                               128 multiply-adds
//
// Every 31 steps (3968 values) they are widened to 32 bits; each sum of a tile of 4 rows x 4 outputs is added up at the
// end, so the weights need no other form than the words. The tile's 16 sums of bytes, 4 vectors of weights and one of
// x fill 22 of the 32 registers.
//
// XOR, CNT and the addition go to any vector pipe, of which a Neoverse N1 has two and a V1 four (LLVM's scheduling
// models AArch64SchedNeoverseN1.td and V1.td, which cite Arm's optimization guides): 3 operations in 1.5 and 0.75
// cycles, at most 85 and 171 multiply-adds a cycle. A step's loop is 48 of them, 8 loads and 4 others (gcc 12, -O3),
// without a spill. Nothing was measured: no Arm processor was available, and the kernel has only run under an emulator.
#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstdint>

#include "gemm_unprepared.h"
#include "hash.h"
#include "kernel.h"
#include "pack_neon.h"
#include "pack_portable.h"

namespace bitorch_qlinear {
namespace {

constexpr int64_t kStepBits = 128;
constexpr int64_t kStepWords = kStepBits / kWordBits;
constexpr int64_t kStepsPerBlock = 31;
static_assert(8 * kStepsPerBlock <= 255, "a block's count must fit in a byte");

inline uint8x16_t load(const uint32_t* words) { return vreinterpretq_u8_u32(vld1q_u32(words)); }

// Loads the words of a row from `first` on, fewer than four whole ones; bits past k become 0.
inline uint8x16_t load_last(const uint32_t* row, int64_t first, int64_t k) {
    uint32_t words[kStepWords] = {};
    for (int64_t i = first; i < words_for(k); ++i) words[i - first] = row[i] & word_mask(i, k);
    return load(words);
}

inline uint8x16_t differing(uint8x16_t a, uint8x16_t b) { return vcntq_u8(veorq_u8(a, b)); }

struct Tile {
    static constexpr int kRows = 4, kColumns = 4;

    template <int Rows, int Columns>
    static void count(const uint32_t* x, const uint32_t* weight, int64_t k, int32_t* counts) {
        const int64_t words = words_for(k), whole = k / kStepBits * kStepWords;
        uint32x4_t sums[Rows][Columns] = {};
        const auto widen = [&](const uint8x16_t(&bytes)[Rows][Columns]) {
            for (int r = 0; r < Rows; ++r) {
                for (int c = 0; c < Columns; ++c) sums[r][c] = vpadalq_u16(sums[r][c], vpaddlq_u8(bytes[r][c]));
            }
        };
        const auto add = [&](uint8x16_t(&bytes)[Rows][Columns], const auto& load_words) {
            uint8x16_t w[Columns];
            for (int c = 0; c < Columns; ++c) w[c] = load_words(weight + c * words);
            for (int r = 0; r < Rows; ++r) {
                const uint8x16_t bits = load_words(x + r * words);
                for (int c = 0; c < Columns; ++c) bytes[r][c] = vaddq_u8(bytes[r][c], differing(bits, w[c]));
            }
        };
        for (int64_t begin = 0; begin < whole; begin += kStepsPerBlock * kStepWords) {
            const int64_t end =
                whole - begin < kStepsPerBlock * kStepWords ? whole : begin + kStepsPerBlock * kStepWords;
            uint8x16_t bytes[Rows][Columns] = {};
            for (int64_t i = begin; i < end; i += kStepWords) {
                add(bytes, [&](const uint32_t* row) { return load(row + i); });
            }
            widen(bytes);
        }
        if (k % kStepBits) {
            uint8x16_t bytes[Rows][Columns] = {};
            add(bytes, [&](const uint32_t* row) { return load_last(row, whole, k); });
            widen(bytes);
        }
        for (int r = 0; r < Rows; ++r) {
            for (int c = 0; c < Columns; ++c) counts[r * kStrip + c] = static_cast<int32_t>(vaddvq_u32(sums[r][c]));
        }
    }
};

}  // namespace

const Kernel kNeonKernel = {
    .name = "neon",
    .requires_features = "NEON (Advanced SIMD)",
    .runs_on = [](const CpuFeatures& features) { return features.neon; },
    .pack_row = {pack_row_by_words<double>, pack_row_by_words<float>, pack_row_by_words<Half>,
                 pack_row_by_words<BFloat16>},
    .pack_levels = {pack_levels_by_words<double>, pack_levels_by_words<float>, pack_levels_by_words<Half>,
                    pack_levels_by_words<BFloat16>},
    .pack_limited_rows = {pack_limited_rows_by_words<double>, pack_limited_rows_by_words<float>,
                          pack_limited_rows_by_words<Half>, pack_limited_rows_by_words<BFloat16>},
    .unpack_row = unpack_row_portable,
    .hash_words = hash_words,
    .layout = {.id = 0, .panel = 1, .unit = kWordBits, .unit_bytes = 0},
    .prepare = nullptr,
    .row_tile = 64,
    .column_tile = Tile::kColumns,
    .workspace_bytes = [](int64_t, int64_t) -> int64_t { return 0; },
    .gemm = gemm_by_words<Tile>,
    .sign_gemm = &kScalarSignGemm,
};

}  // namespace bitorch_qlinear
#endif
