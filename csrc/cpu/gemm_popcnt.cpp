// Binary matrix product by XOR and the POPCNT instruction, 64 bits at a time: for x86-64 without AVX2. Its slow twin is
// gemm_scalar.cpp.
//
// 64 multiply-adds are a move, an XOR, a POPCNT and an addition; a processor that starts four instructions a cycle, of
// which one POPCNT, does at most 64 a cycle. Zen 4 starts six, of which four may be POPCNT: the 20 instructions of a
// tile's step, 256 multiply-adds, allow 77 a cycle, and the loop in L1 reaches 61 (79 %; gcc 12). In the instruction
// set that gcc and clang assume, x86-64 of 2003, POPCNT is a function call.
#if defined(__x86_64__)
#include <cstdint>
#include <cstring>

#include "target.h"

// Our own headers are compiled for POPCNT here, too, and everything that they define has internal linkage.
BITORCH_QLINEAR_POPCNT_BEGIN
#include "gemm_unprepared.h"
#include "hash.h"
#include "kernel.h"
#include "pack_portable.h"

namespace bitorch_qlinear {
namespace {

// Loads two words of a row from word `first` on; load_last sets the bits past k to 0.
inline uint64_t load(const uint32_t* row, int64_t first) {
    uint64_t bits;
    std::memcpy(&bits, row + first, sizeof bits);
    return bits;
}
inline uint64_t load_last(const uint32_t* row, int64_t first, int64_t k) {
    uint64_t bits = row[first] & word_mask(first, k);
    if (first + 1 < words_for(k)) bits |= uint64_t{row[first + 1] & word_mask(first + 1, k)} << kWordBits;
    return bits;
}

struct Tile {
    static constexpr int kRows = 2, kColumns = 2;

    template <int Rows, int Columns>
    static void count(const uint32_t* x, const uint32_t* weight, int64_t k, int32_t* counts) {
        const int64_t words = words_for(k), whole = k / 64 * 2;
        int64_t sums[Rows][Columns] = {};
        const auto add = [&](const auto& load_bits) __attribute__((always_inline)) {
            for (int c = 0; c < Columns; ++c) {
                const uint64_t w = load_bits(weight + c * words);
                for (int r = 0; r < Rows; ++r) sums[r][c] += __builtin_popcountll(load_bits(x + r * words) ^ w);
            }
        };
        for (int64_t i = 0; i < whole; i += 2) add([&](const uint32_t* row) { return load(row, i); });
        if (k % 64) add([&](const uint32_t* row) { return load_last(row, whole, k); });
        for (int r = 0; r < Rows; ++r) {
            for (int c = 0; c < Columns; ++c) counts[r * kStrip + c] = static_cast<int32_t>(sums[r][c]);
        }
    }
};

}  // namespace
}  // namespace bitorch_qlinear
BITORCH_QLINEAR_TARGET_END

namespace bitorch_qlinear {

// This is outside the region, because it runs before it is known that the processor has POPCNT.
static bool runs_on(const CpuFeatures& features) { return features.popcnt; }

const Kernel kPopcntKernel = {
    .name = "popcnt",
    .requires_features = "POPCNT",
    .runs_on = runs_on,
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
    .row_tile = 64,
    .column_tile = Tile::kColumns,
    .workspace_bytes = [](int64_t, int64_t) -> int64_t { return 0; },
    .gemm = gemm_by_words<Tile>,
    .sign_gemm = &kScalarSignGemm,
};

}  // namespace bitorch_qlinear
#endif
