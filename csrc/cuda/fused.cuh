// The parts that the kernels which pack x themselves have in common: packing rows of real x into shared memory, and the
// division of the weights among blocks and warps.
//
// A block packs all rows of x once, alone or with the other blocks of its cluster, and then multiplies, in rounds,
// columns of y. In a round each group of Parts warps has one unit, the columns that a warp's load takes side by side,
// and the warps of a group divide K among them:
//
//     warp            0 ... Parts-1     Parts ... 2Parts-1    ...
//     unit            first             first + 1             ...
//     words of K      [0, chunk) [chunk, 2 chunk) ...         the same
//
// The warps add their sums in shared memory: integers, so their order does not matter. Sums and channels have two
// places, of which a round takes one, and whoever has written an output clears its sum. So a round needs one barrier:
// a thread that passes it knows that all threads have written the outputs of the round before, whose place the next
// round takes.
#pragma once

#include "check_prepared.cuh"
#include "epilogue.cuh"
#include "fused_plan.h"
#include "load.cuh"
#include "sign_tests.cuh"

namespace bitorch_qlinear::cuda {

constexpr int kFusedThreads = kWarp * kFusedWarps;

// The words of x that a block has place for: those of kFusedValues, and less than 32 between one row and the next.
constexpr int kFusedWords = static_cast<int>(kFusedValues / kWordBits + 32 * kSkinnyRows);

// ---- packing --------------------------------------------------------------------------------------------------------

// Eight values, which make a byte of a packed row. Loads of x may stay in the L1 cache, unlike those of load_once(),
// because several loads of a thread take parts of one sector if values have 4 or 8 bytes.
template <class T>
struct Eight {
    static constexpr int kLoads = 8 * sizeof(T) / 16, kOfLoad = 16 / sizeof(T);
    uint32_t words[4 * kLoads];

    __device__ __forceinline__ void load(const T* from) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const uint4 w = *reinterpret_cast<const uint4*>(from + i * kOfLoad);
            words[4 * i] = w.x, words[4 * i + 1] = w.y, words[4 * i + 2] = w.z, words[4 * i + 3] = w.w;
        }
    }

    // Loads the values that exist, of `left`, one by one: for rows of any length and alignment.
    __device__ __forceinline__ void load_some(const T* from, int left) {
        const auto* values = reinterpret_cast<const typename Pattern<T>::Bits*>(from);
        for (uint32_t& word : words) word = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const typename Pattern<T>::Word value = i < left ? values[i] : 0;
            if constexpr (sizeof(T) == 8) {
                words[2 * i] = static_cast<uint32_t>(value), words[2 * i + 1] = static_cast<uint32_t>(value >> 32);
            } else {
                words[i * sizeof(T) / 4] |= value << (i * sizeof(T) % 4 * 8);
            }
        }
    }

    // Returns the byte of v > 0 if `flip` is all ones, and of not v < 0 if it is 0. Bits from 8 on may be anything.
    __device__ __forceinline__ uint32_t byte(uint32_t flip) const {
        // With the sign inverted if the rule asks for positive values, both rules ask for negative ones.
        uint32_t negative = 0;
        if constexpr (sizeof(T) == 2) {
            // Two values are tested at once. In each half the sign bit tells, after an addition that does not reach the
            // other half, whether the bits behind the sign are at least 1, and whether they exceed infinity.
            constexpr uint32_t kBehind = 0x7FFF7FFFu, kSigns = 0x80008000u;
            constexpr uint32_t kFromInfinity = (0x7FFFu - (Pattern<T>::kInfinity >> 16)) * 0x00010001u;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t behind = words[i] & kBehind;
                const uint32_t found = (words[i] ^ flip) & (behind + kBehind) & ~(behind + kFromInfinity);
                negative = (negative >> 2) | (found & kSigns);
            }
            // Values 0, 2, 4, 6 are bits 9, 11, 13, 15 now, and 1, 3, 5, 7 are bits 25, 27, 29, 31.
            negative = negative >> 9 | negative >> 24;
        } else {
            using Word = typename Pattern<T>::Word;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                Word word;
                if constexpr (sizeof(T) == 8) {
                    word = words[2 * i] | uint64_t{words[2 * i + 1] ^ (flip & 0x80000000u)} << 32;
                } else {
                    word = words[i] ^ (flip & 0x80000000u);
                }
                negative |= static_cast<uint32_t>(has_sign<T, true>(word)) << i;
            }
        }
        return negative ^ ~flip;
    }
};

// Packs words [first, first + width) of the rows of x into words[row][pitch], zeros behind the row's values. `first` is
// a multiple of 4. All threads of the block must call it, and reach a barrier before the first use. With Whole, rows
// are whole words and start on 16 bytes.
template <class T, bool Whole>
__device__ __forceinline__ void pack_typed(const FusedProduct& job, int first, int width, int pitch, uint32_t* words) {
    constexpr int kItems = Whole ? 4 / Eight<T>::kLoads : 1;  // 4 loads of 16 bytes are in flight
    constexpr int kBytes = static_cast<int>(kWordBytes);
    const int row_bytes = width * kBytes, rows = static_cast<int>(job.product.m);
    if (row_bytes == 0) return;
    const uint32_t flip = job.x.strict ? ~uint32_t{0} : 0;
    // A thread takes every 512th byte of the rows without their padding. From one to the next it moves by some rows and
    // some bytes, and by a row more and a row's bytes less if it would leave the row.
    const int rows_on = kFusedThreads / row_bytes, bytes_on = kFusedThreads % row_bytes;
    const int64_t x_on = rows_on * job.x.stride + 8 * bytes_on, x_wraps = job.x.stride - 8 * row_bytes;
    const int place_on = rows_on * pitch * kBytes + bytes_on, place_wraps = (pitch - width) * kBytes;
    int left = rows * row_bytes - static_cast<int>(threadIdx.x);
    int row = static_cast<int>(threadIdx.x) / row_bytes, byte = static_cast<int>(threadIdx.x) % row_bytes;
    const T* from = static_cast<const T*>(job.x.data) + row * job.x.stride + 8 * kBytes * first + 8 * byte;
    auto* to = reinterpret_cast<uint8_t*>(words + first) + row * pitch * kBytes + byte;
    const int values = static_cast<int>(job.product.k) - 8 * kBytes * first;
#pragma unroll 1
    for (; left > 0; left -= kItems * kFusedThreads) {
        Eight<T> eights[kItems];
        uint8_t* places[kItems];
        int exist[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            if (Whole) {
                if (i * kFusedThreads < left) eights[i].load(from);
            } else {
                exist[i] = max(min(values - 8 * byte, 8), 0);
                eights[i].load_some(from, exist[i]);
            }
            places[i] = to;
            byte += bytes_on, from += x_on, to += place_on;
            if (byte >= row_bytes) byte -= row_bytes, from += x_wraps, to += place_wraps;
        }
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            if (i * kFusedThreads < left) {
                const uint32_t bits = eights[i].byte(flip);
                *places[i] = static_cast<uint8_t>(Whole ? bits : bits & ~(~0u << exist[i]));
            }
        }
    }
}

template <bool Whole>
__device__ __forceinline__ void pack_rows(const FusedProduct& job, int first, int width, int pitch, uint32_t* words) {
    switch (job.x.dtype) {
        case DType::float64: pack_typed<double, Whole>(job, first, width, pitch, words); break;
        case DType::float32: pack_typed<float, Whole>(job, first, width, pitch, words); break;
        case DType::float16: pack_typed<__half, Whole>(job, first, width, pitch, words); break;
        default: pack_typed<__nv_bfloat16, Whole>(job, first, width, pitch, words);
    }
}

// Packs words [first, first + width) of all rows of x, as pack_typed() does.
__device__ __forceinline__ void pack_words(const FusedProduct& job, const FusedPlan& plan, int first, int width,
                                           uint32_t* words) {
    if (plan.whole) {
        pack_rows<true>(job, first, width, plan.pitch, words);
    } else {
        pack_rows<false>(job, first, width, plan.pitch, words);
    }
}

// Packs all rows of x.
__device__ __forceinline__ void pack_x(const FusedProduct& job, const FusedPlan& plan, uint32_t* words) {
    pack_words(job, plan, 0, plan.width, words);
}

// ---- rounds ---------------------------------------------------------------------------------------------------------

// Returns the first of the columns that the block computes in a round.
__device__ __forceinline__ int64_t column_of_round(int64_t round, int columns) {
    return (round * gridDim.x + blockIdx.x) * columns;
}

// Writes to all outputs of the block what no product gives.
template <class As>
__device__ __forceinline__ void write_no_results(const Product& product, const FusedPlan& plan, int columns) {
    for (int round = 0; round < plan.rounds; ++round) {
        write_no_result<As>(product, 0, static_cast<int>(product.m), column_of_round(round, columns), columns);
    }
}

// ---- outputs that are bits ------------------------------------------------------------------------------------------

// Writes the bits of 32 columns, column + j ... of one row, from the popcount that each lane of a warp has for its j.
template <int Width>
__device__ __forceinline__ void write_word_of_warp(const Product& product, int64_t row, int64_t column, int j,
                                                   uint32_t popcount, const ChannelTile<AsBits, Width>& channels) {
    const int word = j / kWarp;
    const uint32_t ones = __ballot_sync(kAllLanes, within(popcount, channels.limits[j]));
    if (lane_index() == 0) write_word(product, row, column + word * kWarp, ones ^ channels.flips[word]);
}

}  // namespace bitorch_qlinear::cuda
