// Grids of the kernels that go through a matrix row by row: pack, pack_limited, unpack and align.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../packed.h"
#include "warp.cuh"

namespace bitorch_qlinear::cuda {

// A warp takes one segment of a row after the other. A block is two-dimensional, threads of a row by rows, with
// blockDim.x / kWarp warps per row; the grid is blocks of rows by parts of a row.
constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;

__device__ __forceinline__ int64_t row_of_warp() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t first_segment() {
    return int64_t{blockIdx.y} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
}
__device__ __forceinline__ int64_t segment_step() { return int64_t{gridDim.y} * (blockDim.x / kWarp); }

// Returns to thread 0 of a row the sum of `count` over the row's threads. All threads of the block must call it, once.
__device__ __forceinline__ int32_t sum_over_row(int32_t count) {
    __shared__ int32_t counts[kRowWarps];
    const unsigned warps = blockDim.x / kWarp, first = threadIdx.y * warps;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) count += __shfl_xor_sync(kAllLanes, count, distance);
    if (lane_index() == 0) counts[first + threadIdx.x / kWarp] = count;
    __syncthreads();
    int32_t sum = 0;
    if (threadIdx.x == 0) {
#pragma unroll
        for (unsigned warp = 0; warp < kRowWarps; ++warp) sum += warp < warps ? counts[first + warp] : 0;
    }
    return sum;
}

// Returns the warps of a row of a launch: as many as it has segments, up to a block's, rounded up to a power of two, so
// that short rows share a block.
static inline int64_t row_warps(int64_t segments) {
    int64_t warps = 1;
    while (warps < kRowWarps && warps < segments) warps *= 2;
    return warps;
}

static inline int64_t row_blocks(int64_t rows, int64_t segments) {
    return ceil_div(rows, kRowWarps / row_warps(segments));
}

// Launches a kernel over rows. With `parts`, a row longer than a block gets further blocks, so that one long row fills
// the device too; without, `more` blocks follow those of the rows.
template <class... Parameters>
cudaError_t launch_rows(void (*kernel)(Parameters...), int64_t rows, int64_t segments, bool parts, int64_t more,
                        cudaStream_t stream, Parameters... arguments) {
    constexpr int64_t kMostParts = 65535;  // the limit of gridDim.y; the kernel's loop does the rest
    const int64_t warps = row_warps(segments), blocks = row_blocks(rows, segments) + more;
    const int64_t shares = parts ? std::clamp(ceil_div(segments, warps), int64_t{1}, kMostParts) : 1;
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shares));
    const dim3 block(static_cast<unsigned>(kWarp * warps), static_cast<unsigned>(kRowWarps / warps));
    kernel<<<grid, block, 0, stream>>>(arguments...);
    return cudaGetLastError();
}

}  // namespace bitorch_qlinear::cuda
