// Lanes of a warp, and the words and bits of a row that exist.
#pragma once

#include <cstdint>

#include "../packed.h"

namespace bitorch_qlinear::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }

// Returns the number of words of a row, as words_for of packed.h does on the host.
__device__ __forceinline__ int64_t word_count(int64_t k) { return (k + kWordBits - 1) / kWordBits; }

// Returns the mask of the valid bits of a word that begins `left` values before the row's end (none if left <= 0).
__device__ __forceinline__ uint32_t valid_bits(int left) {
    if (left >= kWordBits) return ~uint32_t{0};
    return left <= 0 ? 0 : ~(~uint32_t{0} << left);
}

}  // namespace bitorch_qlinear::cuda
