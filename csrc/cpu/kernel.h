// The kernel record holds everything that belongs to one instruction set in one struct, so that the prepared weights
// can never be in another kernel's form than that of the kernel that reads them.
#pragma once

#include <cstdint>

#include "../epilogue.h"
#include "../packed.h"
#include "cpu_features.h"
#include "level_gemm.h"
#include "limits.h"
#include "range.h"
#include "sign_gemm.h"
#include "target.h"

namespace bitorch_qlinear {

// Packs one row of k values, contiguous, into words_for(k) words; bits past k are 0.
//   bit = !(v < 0), or v > 0 where `strict`.
// If in_range is not null, its bit is |v| <= threshold (so NaN is out of range); the threshold is
// representable in the row's type.
using PackRow = void (*)(const void* x, int64_t k, bool strict, double threshold, uint32_t* words, uint32_t* in_range);

// Packs the levels of one row of k values, contiguous, into as many rows of words_for(k) words as levels have bits:
// planes[p * stride ..] holds bit p of each level (levels.h), and bits past k are 0. Returns whether the row holds a
// NaN, whose level is 0.
using PackLevels = bool (*)(const void* x, int64_t k, int bits, uint32_t* planes, int64_t stride);
// Packs rows by a limit for each value (limits.h).
using PackLimitedRows = void (*)(const LimitedRows&);

// Unpacks k values from words_for(k) words: +-1 for numbers, and the bit itself for bool.
using UnpackRow = void (*)(const uint32_t* words, int64_t k, void* out, DType dtype);

// The prepared form of the weights: the header (packed.h), the words' fingerprint (fingerprint.h), then for each panel
// of outputs and each unit of K `unit_bytes` bytes. unit_bytes is 0 for a kernel that reads the words themselves.
struct Layout {
    uint32_t id;
    int64_t panel;
    int64_t unit;
    int64_t unit_bytes;
};

constexpr int64_t kPanelsOffset = 3 * 64;

static inline int64_t prepared_bytes(const Layout& layout, int64_t n, int64_t k) {
    return kPanelsOffset + ceil_div(n, layout.panel) * ceil_div(k, layout.unit) * layout.unit_bytes;
}

// One product: x[m][words] (+-1) by weight[n][words], both row-major and contiguous; y as in Output.
// `panels` is what follows the header and the fingerprint of the prepared form.
struct Product {
    const uint32_t* x;
    const uint32_t* weight;
    const uint8_t* panels;
    int64_t m, n, k;
    Output y;
};

struct Kernel {
    const char* name;
    const char* requires_features;
    bool (*runs_on)(const CpuFeatures&);
    PackRow pack_row[kFloatTypes];
    PackLevels pack_levels[kFloatTypes];
    PackLimitedRows pack_limited_rows[kFloatTypes];
    UnpackRow unpack_row;
    // hash.h's function, compiled for this instruction set.
    uint64_t (*hash_words)(const uint32_t* words, int64_t count, int64_t period);
    Layout layout;
    // Writes the panels [begin, end) of the prepared form from row-major words; null if unit_bytes is 0.
    void (*prepare)(const uint32_t* words, int64_t n, int64_t k, Range panels, uint8_t* out);
    // gemm takes tiles of at most row_tile rows whose columns begin at a multiple of column_tile; and of 32, if the
    // outputs are bits.
    int64_t row_tile, column_tile;
    int64_t (*workspace_bytes)(int64_t rows, int64_t k);
    // Computes y[rows][columns]; workspace is aligned to 64 bytes and private to the call.
    void (*gemm)(const Product&, Range rows, Range columns, uint8_t* workspace);
    // The product of real values by signs.
    const SignGemm* sign_gemm;
    // The product of levels as bytes, or null. It reads this record's form of the weights.
    const LevelGemm* level_gemm = nullptr;
};

extern const Kernel kScalarKernel;
#if defined(__x86_64__)
#if defined(BITORCH_QLINEAR_HAS_AMX)
extern const Kernel kAmxKernel;
// kAmxKernel has these instead of kAvx512Kernel's (gemm_amx.cpp).
int64_t amx_workspace_bytes(int64_t rows, int64_t k);
void amx_gemm(const Product& product, Range rows, Range columns, uint8_t* workspace);
// Returns whether amx_gemm uses tile registers for such a part of y if the process may.
bool amx_is_faster(const Output& y, int64_t rows, int64_t columns, int64_t k);
#endif
extern const Kernel kAvx512Kernel;
extern const Kernel kAvx2Kernel;
extern const Kernel kPopcntKernel;
#elif defined(__aarch64__)
extern const Kernel kNeonKernel;
#endif

}  // namespace bitorch_qlinear
