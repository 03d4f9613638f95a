// A warp's square of outputs in a block's tile, and how the columns of its instructions lie in it.
#pragma once

#include <cstdint>

#include "warp.cuh"

namespace bitorch_qlinear::cuda {
namespace {

// The number of outputs that a lane stores at once.
template <class As>
constexpr int kVector = 16 / static_cast<int>(sizeof(typename As::Out));

// The beginning of a block's tile and of a warp's square in it, and the lane's row g and column pair q in a fragment.
struct Place {
    int64_t row, column;
    int warp_row, warp_column, g, q;
};

// Returns a lane's place in the tile of `Columns` columns, consisting of squares of Side, that begins at (row, column).
template <int Columns, int Side>
__device__ __forceinline__ Place place_in_tile(int64_t row, int64_t column, int warp, int lane) {
    constexpr int kAcross = Columns / Side;
    return {row, column, warp / kAcross * Side, warp % kAcross * Side, lane / 4, lane % 4};
}

// Returns the column of the square, which is also its weight row, that feeds column 2 q of instruction j; the next one
// feeds column 2 q + 1. The columns of four instructions are permuted so that a lane holds vectors of neighbouring
// outputs.
template <int Vector>
__device__ __forceinline__ int column_of(int j, int q) {
    constexpr int kEach = Vector / 2;  // instructions that fill a vector
    return j / kEach * 4 * Vector + Vector * q + j % kEach * 2;
}

}  // namespace
}  // namespace bitorch_qlinear::cuda
