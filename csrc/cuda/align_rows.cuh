// Words of the interchange form on their way to the aligned one, counted; a warp takes them segment by segment.
#pragma once

#include "kernels.h"
#include "row_grid.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kAlignSteps = 8;
constexpr int kAlignSegment = kAlignSteps * kWarp;
static_assert(kAlignSegment % kAlignedWords == 0, "a row's padding words belong to its last segment");

// Copies words [first, first + kAlignSegment) of a row, as far as they exist, and returns their set bits, distributed
// over the lanes.
__device__ __forceinline__ int32_t align_segment(const Align& job, int64_t row, int64_t first) {
    const int64_t width = word_count(job.k),
                  aligned_width = (width + kAlignedWords - 1) / kAlignedWords * kAlignedWords;
    const int values = static_cast<int>(min(job.k - first * kWordBits, int64_t{kAlignSegment} * kWordBits));
    const int aligned = static_cast<int>(min(aligned_width - first, int64_t{kAlignSegment}));
    const uint32_t* from = job.words + row * width + first;
    uint32_t* to = job.aligned + row * aligned_width + first;
    uint32_t words[kAlignSteps];
#pragma unroll
    for (int step = 0; step < kAlignSteps; ++step) {
        const int index = step * kWarp + lane_index(), left = values - index * static_cast<int>(kWordBits);
        words[step] = left > 0 ? from[index] & valid_bits(left) : 0;
    }
    int32_t count = 0;
#pragma unroll
    for (int step = 0; step < kAlignSteps; ++step) {
        const int index = step * kWarp + lane_index();
        if (job.aligned && index < aligned) to[index] = words[step];
        count += __popc(words[step]);
    }
    return count;
}

// Does all of a row by one warp. Blocks that a launch has for this beside its own work call it: `block` is the number
// of such a block, which takes a row for each of its warps.
__device__ __forceinline__ void align_rows_of_block(const Align& job, int64_t block) {
    const int warp = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) / kWarp;
    const int64_t row = block * kRowWarps + warp, width = word_count(job.k);
    if (row >= job.m) return;
    int32_t count = 0;
    for (int64_t first = 0; first < width; first += kAlignSegment) count += align_segment(job, row, first);
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) count += __shfl_xor_sync(kAllLanes, count, distance);
    if (lane_index() == 0) job.popcounts[row] = count;
}

static inline int64_t align_blocks(const Align& job) { return ceil_div(job.m, kRowWarps); }

}  // namespace
}  // namespace bitorch_qlinear::cuda
