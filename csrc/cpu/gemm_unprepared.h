// The loops of the kernels that read the words themselves and so need no prepared form: tiles of a few rows by a few
// outputs, whose words are compared along K.
#pragma once

#include "kernel.h"

namespace bitorch_qlinear {
namespace {

// The outputs whose counts go to the epilogue together.
constexpr int64_t kStrip = 64;

// Tile::count<Rows, Columns>(x, weight, k, counts) sets counts[row][kStrip] to the bits of k in which the rows of x and
// weight differ; rows of either are words_for(k) apart. This calls the largest that fits.
template <class Tile, int Rows, int Columns>
void count_tile(int64_t rows, int64_t columns, const uint32_t* x, const uint32_t* weight, int64_t k, int32_t* counts) {
    if constexpr (Rows > 1) {
        if (rows < Rows) return count_tile<Tile, Rows - 1, Columns>(rows, columns, x, weight, k, counts);
    }
    if constexpr (Columns > 1) {
        if (columns < Columns) return count_tile<Tile, Rows, Columns - 1>(rows, columns, x, weight, k, counts);
    }
    Tile::template count<Rows, Columns>(x, weight, k, counts);
}

template <class Tile>
void gemm_by_words(const Product& product, Range rows, Range columns, uint8_t*) {
    const int64_t words = words_for(product.k);
    int32_t counts[Tile::kRows * kStrip];
    // A strip's weights stay in cache while all rows are multiplied by them.
    for (int64_t strip = columns.begin; strip < columns.end; strip += kStrip) {
        const int64_t width = columns.end - strip < kStrip ? columns.end - strip : kStrip;
        for (int64_t row = rows.begin; row < rows.end; row += Tile::kRows) {
            const int64_t group = rows.end - row < Tile::kRows ? rows.end - row : Tile::kRows;
            for (int64_t i = 0; i < width; i += Tile::kColumns) {
                count_tile<Tile, Tile::kRows, Tile::kColumns>(group, width - i, product.x + row * words,
                                                              product.weight + (strip + i) * words, product.k,
                                                              counts + i);
            }
            for (int64_t r = 0; r < group; ++r) write_outputs(product.y, row + r, strip, counts + r * kStrip, width);
        }
    }
}

}  // namespace
}  // namespace bitorch_qlinear
