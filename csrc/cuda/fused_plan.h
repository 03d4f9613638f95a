// How the fused kernels divide the weights among blocks and warps; host code without CUDA's device side. fused.cuh
// draws it.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace bitorch_qlinear::cuda {

constexpr int kFusedWarps = 16;  // of a block

struct FusedPlan {
    int width, pitch;  // words of an aligned row, and from row to row of x in shared memory
    int parts, chunk;  // warps that share a unit, and the words of K that each has
    int rounds;        // of the blocks that have most
    bool whole;        // whether rows of x are whole words and start on 16 bytes
};

// Returns the words from a packed row of x to the next in shared memory, 16 more than a multiple of 32. Two rows of 16
// words, which a quarter of a warp reads at once, then lie in different banks.
static constexpr int fused_pitch(int width) { return (width + 15) / 32 * 32 + 16; }

// Returns the plan and the number of blocks, which is a multiple of `cluster`. The columns of y are ceil(n / unit)
// units; `piece` is the fewest words of K that a warp loads. A block has at most `most` units in a round and, if
// outputs are bits, whole words.
static inline FusedPlan fused_plan(const FusedProduct& job, int unit, int piece, int most, int64_t* blocks,
                                   int64_t cluster = 1) {
    const Product& product = job.product;
    const int64_t row_bytes = job.x.stride * element_size(job.x.dtype);
    FusedPlan plan{};
    plan.width = static_cast<int>(aligned_words_for(product.k)), plan.pitch = fused_pitch(plan.width);
    plan.whole = reinterpret_cast<uintptr_t>(job.x.data) % 16 == 0 && product.k % (kWordBits * kAlignedWords) == 0 &&
                 (row_bytes % 16 == 0 || product.m == 1);
    const bool bits = product.y.dtype == DType::boolean;
    int64_t least = INT64_MAX;
    for (int parts = kFusedWarps / most; parts <= kFusedWarps; parts *= 2) {
        const int units = kFusedWarps / parts;
        if (bits && unit * units < static_cast<int>(kWordBits)) break;
        const int64_t groups = ceil_div(product.n, int64_t{unit} * units);
        const int64_t clusters = std::max(job.multiprocessors / cluster, int64_t{1});
        const int64_t launched = std::min(ceil_div(groups, cluster), clusters) * cluster;
        const int64_t rounds = ceil_div(groups, launched);
        const int64_t chunk = ceil_div(ceil_div(std::max(plan.width, 1), parts), piece) * piece;
        // A round's barrier and outputs take about as long as a warp takes for 32 words.
        const int64_t cost = rounds * (chunk + 32);
        if (cost >= least) continue;
        least = cost, *blocks = launched;
        plan.parts = parts, plan.chunk = static_cast<int>(chunk), plan.rounds = static_cast<int>(rounds);
    }
    return plan;
}

// Returns whether a fused kernel takes the operands and sizes.
static inline bool fits_fused(const FusedProduct& job, int64_t most_rows) {
    const Product& product = job.product;
    const int64_t width = aligned_words_for(product.k);
    switch (job.x.dtype) {
        case DType::float64:
        case DType::float32:
        case DType::float16:
        case DType::bfloat16: break;
        default: return false;
    }
    return product.m <= most_rows && fits_fused(product.m, product.k) && product.n <= INT32_MAX &&
           reinterpret_cast<uintptr_t>(product.weight.words) % 16 == 0 && product.weight.stride % kAlignedWords == 0 &&
           product.weight.stride >= width;
}

}  // namespace bitorch_qlinear::cuda
