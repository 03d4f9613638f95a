// The tiles of wgmma_sm90a, and which products it takes. Plain C++ without a CUDA header, as heuristics.h, which asks
// it.
//
// The times here were measured on an H200 (132 multiprocessors) with mma_sm80 and with a throw-away prototype, whose
// times are taken to be this kernel's, because this kernel has not run on a GPU. csrc/DESIGN.md has the tables.
#pragma once

#include <cstdint>

#include "../packed.h"

namespace bitorch_qlinear::cuda {

// The part of y that a consumer of gemm_wgmma_sm90a computes at a time, widest first.
enum class WarpgroupTile : int { m128n192, m128n128 };
constexpr int kWarpgroupTiles = 2;
constexpr int64_t kWarpgroupRows = 128, kWarpgroupColumns[kWarpgroupTiles] = {192, 128};

// The bits of k of a stage, one swizzled line of each row, and the stages that fit in shared memory.
constexpr int64_t kWarpgroupStageBits = 1024, kWarpgroupStages[kWarpgroupTiles] = {5, 6};

// The bytes per clock that L2 gives each multiprocessor while all of them multiply. Both tiles had this rate at 8192^3
// (at 1665 MHz); the tensor cores alone would need 512 and 768 clocks for a stage, and it takes 819 and 1024.
constexpr int64_t kWarpgroupL2Bytes = 40;

// The clocks that the end of a product takes for each column of a tile, because nothing hides the last epilogue. The
// measured times of 4096^3 give it: there the narrower tile moves more bytes and was still 1 % faster.
constexpr int64_t kWarpgroupClocksAColumn = 28;

// Estimates the clocks of a product: rounds of tiles, and the last epilogue. In doubles, because no integer holds all
// of them.
static inline double warpgroup_clocks(WarpgroupTile tile, int64_t multiprocessors, int64_t m, int64_t n, int64_t k) {
    const int64_t columns = kWarpgroupColumns[static_cast<int>(tile)];
    const int64_t tiles = ceil_div(m, kWarpgroupRows) * ceil_div(n, columns);
    const int64_t stage = (kWarpgroupRows + columns) * kWarpgroupStageBits / 8 / kWarpgroupL2Bytes;
    return static_cast<double>(ceil_div(tiles, multiprocessors)) *
               static_cast<double>(ceil_div(k, kWarpgroupStageBits) * stage) +
           static_cast<double>(kWarpgroupClocksAColumn * columns);
}

// Returns whether a tile can make such results: the sums of the wide one leave no registers for float64.
static constexpr bool has_results(WarpgroupTile tile, bool float64) {
    return !float64 || tile == WarpgroupTile::m128n128;
}

// Returns the tile of least estimated time. It is 128 x 128 for 2048^3, 4096^3 and 512 x 4096 -> 4096, and 128 x 192
// for 8192^3 and 2048 x 8192 -> 8192, as measured.
static inline WarpgroupTile best_warpgroup_tile(int64_t multiprocessors, int64_t m, int64_t n, int64_t k,
                                                bool float64) {
    if (!has_results(WarpgroupTile::m128n192, float64)) return WarpgroupTile::m128n128;
    const double wide = warpgroup_clocks(WarpgroupTile::m128n192, multiprocessors, m, n, k);
    return wide < warpgroup_clocks(WarpgroupTile::m128n128, multiprocessors, m, n, k) ? WarpgroupTile::m128n192
                                                                                      : WarpgroupTile::m128n128;
}

// A tensor map's coordinates are 32-bit integers.
constexpr int64_t kMostWarpgroupRows = INT32_MAX;

// From so many rows on, at least two tiles lie below each other.
constexpr int64_t kFewestWarpgroupRows = 256;

// From so many values on, a tile alone is faster than the blocks of mma_sm80 that compute it. A block of 64 x 64 takes
// 1020 clocks for 1024 bits of k (512 x 65536 -> 256 takes it 35.9 us), a tile of 128 x 128 at most 819. After 8 stages
// that outweighs the microsecond that its longer beginning and end take.
constexpr int64_t kLongRow = 8 * kWarpgroupStageBits;

// Returns whether wgmma_sm90a is estimated to be faster than mma_sm80. By wgmma the tensor cores make a tile of
// 128 x 128 in the time in which mma_sm80 makes one of 64 x 64: as long as the multiprocessors hold all of these at
// once, four for a tile, both take one round. Of the other products, those of 256 rows or more are faster: the
// prototype took 5.9 us for 512 x 4096 -> 4096 and 20 us for 4096^3, and mma_sm80 takes 11.6 and 49.
static inline bool warpgroups_win(int64_t multiprocessors, int64_t m, int64_t n, int64_t k) {
    if (m < kFewestWarpgroupRows || m > kMostWarpgroupRows || n > kMostWarpgroupRows) return false;
    const int64_t tiles = ceil_div(m, kWarpgroupRows) * ceil_div(n, kWarpgroupColumns[1]);
    return k >= kLongRow || (k > 0 && 4 * tiles > multiprocessors);
}

}  // namespace bitorch_qlinear::cuda
