// The product of levels (levels.h) by packed weights on processors that multiply bytes.
#pragma once

#include <cstdint>

#include "../epilogue.h"
#include "range.h"
#include "target.h"

namespace bitorch_qlinear {

// The levels of all rows of x as bytes, in the form that LevelGemm::write_row gives them. Signs have this form, too, as
// levels of one bit (gemm_amx.cpp).
struct LevelBytes {
    const uint8_t* bytes;
    const int32_t* sums;  // the sum of each row's levels
    const uint8_t* nans;  // whether each row of x holds a NaN; null if none does
    int bits;
};

struct LevelGemm {
    // Returns whether this product is faster than that of planes (level_product.h), whether its sums fit into an int32,
    // and whether this process may use the instructions.
    bool (*takes)(int64_t m, int64_t n, int64_t k, int bits);
    // K is not 0. multiply takes tiles of at most row_tile rows that begin at a multiple of row_group, and whose
    // columns begin at a multiple of column_tile. Memory for the bytes has whole groups of rows.
    int64_t row_tile, row_group, column_tile;
    int64_t (*row_bytes)(int64_t k);
    // Writes the levels of row `row` to its place in `bytes`, from planes as Kernel::pack_levels makes them, and
    // returns their sum.
    int32_t (*write_row)(const uint32_t* planes, int64_t stride, int64_t k, int bits, int64_t row, uint8_t* bytes);
    int64_t (*workspace_bytes)(int64_t rows, int64_t k);
    // Computes y[rows][columns] from the panels of the weights in the form of the kernel whose record has this;
    // workspace is aligned to 64 bytes and private to the call.
    void (*multiply)(const LevelBytes&, const uint8_t* panels, const Output& y, Range rows, Range columns,
                     uint8_t* workspace);
};

#if defined(BITORCH_QLINEAR_HAS_AMX)
extern const LevelGemm kAmxLevelGemm;
#endif

}  // namespace bitorch_qlinear
