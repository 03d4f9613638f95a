// Popcounts on CUDA cores: full adders for a stream of words, and sums over the lanes of a group.
#pragma once

#include <cstdint>

#include "warp.cuh"

namespace bitorch_qlinear::cuda {

// Counts the set bits of a stream of words. From two words and the remainder a full adder makes a new remainder and a
// word whose bits count twice (H. Warren, Hacker's Delight, "Counting 1-bits in an array"). An SM does 16 lanes of
// __popc a clock, but 64 of the logic (CUDA C++ programming guide, "Arithmetic Instructions"): for 8 words 5 __popc, 16
// logic operations and 5 adds take 21 / 64 clocks of a lane, while 8 __popc alone take 8 / 16.
struct BitCounter {
    uint32_t left_over = 0, twos = 0;

    __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
        const uint32_t carry = (a & b) | (left_over & (a | b));
        left_over ^= a ^ b;
        return __popc(carry);
    }
    __device__ __forceinline__ void add_difference(const uint4& a, const uint4& b) {
        twos += add(a.x ^ b.x, a.y ^ b.y) + add(a.z ^ b.z, a.w ^ b.w);
    }
    __device__ __forceinline__ uint32_t total() const { return 2 * twos + __popc(left_over); }
};

// Adds up the sums of the 8 lanes of a group, by Bit = 1, 2, 4: each time a lane exchanges half of its sums for those
// of the lane whose number differs by Bit. Lane l is left with sums l, l + 8, ... in places 0, 1, ...; of fewer than 8,
// all lanes of equal l % Count with the same one.
template <int Bit, int Count>
__device__ __forceinline__ void add_lanes(uint32_t (&sums)[Count], int lane) {
    if constexpr (Count / Bit < 2) {
        sums[0] += __shfl_xor_sync(kAllLanes, sums[0], Bit);
    } else {
#pragma unroll
        for (int i = 0; i < Count / Bit / 2; ++i) {
            const uint32_t even = sums[2 * i], odd = sums[2 * i + 1];
            sums[i] = (lane & Bit ? odd : even) + __shfl_xor_sync(kAllLanes, lane & Bit ? even : odd, Bit);
        }
    }
}

}  // namespace bitorch_qlinear::cuda
