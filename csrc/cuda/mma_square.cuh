// A warp's square of outputs in a block's tile, and how the columns of its instructions lie in it.
#pragma once

#include <cstdint>

#include "epilogue.cuh"
#include "warp.cuh"

namespace bitorch_qlinear::cuda {
namespace {

// The number of outputs that a lane stores at once; of bits, the number that it has of a word.
template <class As>
constexpr int kVector = 16 / static_cast<int>(sizeof(typename As::Out));
template <>
constexpr int kVector<AsBits> = kWordBits / 4;

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

// Transposes the bytes of four lanes q: returns byte q of each of them, in the order of the lanes.
__device__ __forceinline__ uint32_t transpose_bytes(uint32_t bytes, int q) {
    uint32_t other = __shfl_xor_sync(kAllLanes, bytes, 1);
    bytes = __byte_perm(bytes, other, q & 1 ? 0x3715 : 0x6240);
    other = __shfl_xor_sync(kAllLanes, bytes, 2);
    return __byte_perm(bytes, other, q & 2 ? 0x3276 : 0x5410);
}

// Writes the words of 32 rows, which begin at `row` of a block's tile, in the 32 columns that begin at its `column`.
// popcount(i, c) is that of row 8 i + g and column 8 q + c. Of four rows, each of the four lanes q has a byte; after
// the exchange each has the word of one row.
template <class Function, int Width>
__device__ __forceinline__ void write_words(const Product& product, const Place& at, int row, int column,
                                            const ChannelTile<AsBits, Width>& channels, Function popcount) {
    constexpr int kEach = kVector<AsBits>;
    uint32_t bytes = 0;
#pragma unroll
    for (int c = 0; c < kEach; ++c) {
        const int32_t limit = channels.limits[column + kEach * at.q + c];
#pragma unroll
        for (int i = 0; i < 4; ++i) bytes |= uint32_t{within(popcount(i, c), limit)} << (8 * i + c);
    }
    const uint32_t word = transpose_bytes(bytes, at.q) ^ channels.flips[column / kWordBits];
    write_word(product, at.row + row + 8 * at.q + at.g, at.column + column, word);
}

}  // namespace
}  // namespace bitorch_qlinear::cuda
