// Values and their bits in a thread, and the rows of a matrix in a grid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "../packed.h"

namespace bitorch_qlinear::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }

// words_for of csrc/packed.h.
__device__ __forceinline__ int64_t words_of(int64_t k) { return (k + kWordBits - 1) / kWordBits; }

// The valid bits of a word with whose first bit `left` values are left, of 0 and fewer none (word_mask of packed.h).
__device__ __forceinline__ uint32_t valid_bits(int left) {
    if (left >= kWordBits) return ~uint32_t{0};
    return left <= 0 ? 0 : ~(~uint32_t{0} << left);
}

// A floating type's pattern as it is stored (Bits), and moved up to fill a Word of 32 or 64 bits, the sign on top, so
// that one piece of code tests all types: the word of infinity, and the distance of neighbouring patterns.
// All tests are of integers, as on the CPU (cpu/pack_portable.h), so that no mode for denormals matters.
template <class T>
struct Pattern;
template <>
struct Pattern<double> {
    using Bits = uint64_t;
    using Word = uint64_t;
    static constexpr Word kInfinity = 0x7FF0000000000000u, kUnit = 1;
};
template <>
struct Pattern<float> {
    using Bits = uint32_t;
    using Word = uint32_t;
    static constexpr Word kInfinity = 0x7F800000u, kUnit = 1;
};
template <>
struct Pattern<__half> {
    using Bits = uint16_t;
    using Word = uint32_t;
    static constexpr Word kInfinity = 0x7C000000u, kUnit = 0x10000u;
};
template <>
struct Pattern<__nv_bfloat16> {
    using Bits = uint16_t;
    using Word = uint32_t;
    static constexpr Word kInfinity = 0x7F800000u, kUnit = 0x10000u;
};

template <class T>
constexpr typename Pattern<T>::Word kSignBit = ~(~typename Pattern<T>::Word{0} >> 1);

// v > 0, or v < 0 where Negative: a unit to infinity behind the sign.
template <class T, bool Negative>
__device__ __forceinline__ bool has_sign(typename Pattern<T>::Word word) {
    return word - ((Negative ? kSignBit<T> : 0) + Pattern<T>::kUnit) < Pattern<T>::kInfinity;
}

__device__ __forceinline__ uint64_t word_of(double value, double*) {
    return static_cast<uint64_t>(__double_as_longlong(value));
}
__device__ __forceinline__ uint32_t word_of(double value, float*) { return __float_as_uint(static_cast<float>(value)); }
__device__ __forceinline__ uint32_t word_of(double value, __half*) {
    return uint32_t{__half_as_ushort(__float2half_rn(static_cast<float>(value)))} << 16;
}
__device__ __forceinline__ uint32_t word_of(double value, __nv_bfloat16*) {
    return __float_as_uint(static_cast<float>(value));  // the lower half is 0
}

// What the words of all |v| <= threshold, and of no NaN, are below. The threshold is a value of T.
template <class T>
__device__ __forceinline__ typename Pattern<T>::Word range_limit(double threshold) {
    if (!(threshold >= 0)) return 0;
    return (word_of(threshold, static_cast<T*>(nullptr)) & ~kSignBit<T>)+Pattern<T>::kUnit;
}

// Kernels over rows: a warp takes one segment of a row after the other. A block is two-dimensional, threads of a row
// by rows, blockDim.x / kWarp warps to a row; the grid is row blocks by parts of a row.
constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;

__device__ __forceinline__ int64_t row_of_warp() { return int64_t{blockIdx.x} * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t first_segment() {
    return int64_t{blockIdx.y} * (blockDim.x / kWarp) + threadIdx.x / kWarp;
}
__device__ __forceinline__ int64_t segment_step() { return int64_t{gridDim.y} * (blockDim.x / kWarp); }

// For thread 0 of a row, the sum of `count` over the row's threads. All threads of the block call it, once.
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

// Launches such a kernel. A row gets as many warps of a block as it has segments, up to a power of two, so that short
// rows share a block; with `parts`, a longer row gets further blocks, so that one long row fills the device too.
template <class... Parameters>
cudaError_t launch_rows(void (*kernel)(Parameters...), int64_t rows, int64_t segments, bool parts, cudaStream_t stream,
                        Parameters... arguments) {
    constexpr int64_t kMostParts = 65535;  // gridDim.y; the kernel's loop takes what is left
    int64_t warps = 1;
    while (warps < kRowWarps && warps < segments) warps *= 2;
    const int64_t blocks = ceil_div(rows, kRowWarps / warps);
    const int64_t shares = parts ? std::clamp(ceil_div(segments, warps), int64_t{1}, kMostParts) : 1;
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shares));
    const dim3 block(static_cast<unsigned>(kWarp * warps), static_cast<unsigned>(kRowWarps / warps));
    kernel<<<grid, block, 0, stream>>>(arguments...);
    return cudaGetLastError();
}

}  // namespace bitorch_qlinear::cuda
