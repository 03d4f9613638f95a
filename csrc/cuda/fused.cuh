// The parts that the kernels which pack x themselves have in common: packing rows of real x into shared memory, and the
// division of the weights among blocks and warps.
//
// A block packs all rows of x once and then multiplies, in rounds, columns of y. In a round each group of Parts warps
// has one unit, the columns that a warp's load takes side by side, and the warps of a group divide K among them:
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

#include <algorithm>

#include "check_prepared.cuh"
#include "epilogue.cuh"
#include "load.cuh"
#include "sign_tests.cuh"

namespace bitorch_qlinear::cuda {

constexpr int kFusedWarps = 16, kFusedThreads = kWarp * kFusedWarps;

// The words from a packed row of x to the next in shared memory, 16 more than a multiple of 32. Two rows of 16 words,
// which a quarter of a warp reads at once, then lie in different banks.
__host__ __device__ constexpr int fused_pitch(int width) { return (width + 15) / 32 * 32 + 16; }

// The words of x that a block has place for: those of kFusedValues, and less than 32 between one row and the next.
constexpr int kFusedWords = static_cast<int>(kFusedValues / kWordBits + 32 * kSkinnyRows);

// ---- packing --------------------------------------------------------------------------------------------------------

// Eight values, which make a byte of a packed row.
template <class T>
struct Eight {
    static constexpr int kLoads = 8 * sizeof(T) / 16, kOfLoad = 16 / sizeof(T);
    uint4 data[kLoads];

    // Loads the values that exist, of `left`, 16 bytes at a time; `left` is a multiple of kOfLoad. These loads may not
    // take the path of load.cuh, because the kernel before may write x.
    __device__ __forceinline__ void load_vectors(const T* from, int64_t left) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            data[i] = i * kOfLoad < left ? *reinterpret_cast<const uint4*>(from + i * kOfLoad) : uint4{};
        }
    }

    // Does the same one by one, for rows of any length and alignment.
    __device__ __forceinline__ void load_values(const T* from, int64_t left) {
        const auto* values = reinterpret_cast<const typename Pattern<T>::Bits*>(from);
        constexpr int kPer32 = sizeof(T) < 4 ? 2 : 1, kHalves = sizeof(T) == 8 ? 2 : 1;
        uint32_t words[4 * kLoads];
#pragma unroll
        for (int i = 0; i < 8 / kPer32; ++i) {
            if constexpr (kHalves == 2) {
                const uint64_t value = i < left ? values[i] : 0;
                words[2 * i] = static_cast<uint32_t>(value), words[2 * i + 1] = static_cast<uint32_t>(value >> 32);
            } else if constexpr (kPer32 == 2) {
                const uint32_t low = 2 * i < left ? values[2 * i] : 0, high = 2 * i + 1 < left ? values[2 * i + 1] : 0;
                words[i] = low | high << 16;
            } else {
                words[i] = i < left ? values[i] : 0;
            }
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) data[i] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
    }

    // Returns the byte of v > 0 if `strict`, and of not v < 0 otherwise.
    __device__ __forceinline__ uint32_t byte(bool strict) const {
        // With the sign inverted where the rule asks for positive values, both rules ask for negative ones.
        const uint32_t flip = strict ? ~uint32_t{0} : 0;
        uint32_t negative = 0;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const uint32_t words[4] = {data[i].x, data[i].y, data[i].z, data[i].w};
            if constexpr (sizeof(T) == 2) {
                // Two values are tested at once: in each half the sign bit tells, after an addition that does not reach
                // the other half, whether the bits behind the sign are at least 1, and whether they exceed infinity.
                constexpr uint32_t kBehind = 0x7FFF7FFFu, kBoth = 0x00010001u;
                constexpr uint32_t kToNan = 0x7FFFu - (Pattern<T>::kInfinity >> 16);
                uint32_t bits = 0;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const uint32_t behind = words[j] & kBehind;
                    const uint32_t found = (words[j] ^ flip) & (behind + kBehind) & ~(behind + kToNan * kBoth);
                    bits |= (found & 0x80008000u) >> (15 - 2 * j);
                }
                negative |= bits | bits >> 15;  // values 0, 2, ... at bits 0, 2, ..., and 1, 3, ... at 17, 19, ...
            } else {
                using Word = typename Pattern<T>::Word;
#pragma unroll
                for (int j = 0; j < kOfLoad; ++j) {
                    Word word;
                    if constexpr (sizeof(T) == 8) {
                        word = words[2 * j] | uint64_t{words[2 * j + 1]} << 32;
                    } else {
                        word = words[j];
                    }
                    const bool found = has_sign<T, true>(word ^ (strict ? kSignBit<T> : 0));
                    negative |= static_cast<uint32_t>(found) << (i * kOfLoad + j);
                }
            }
        }
        return negative ^ ~flip;
    }
};

// Packs rows of x into words[row][pitch], zeros behind the row's values up to `width` words. All threads of the block
// must call it, and reach a barrier before the first use.
template <class T, bool Vectors>
__device__ __forceinline__ void pack_typed(const FusedProduct& job, int width, int pitch, uint32_t* words) {
    constexpr int kItems = Vectors ? 4 / Eight<T>::kLoads : 1;  // 4 loads of 16 bytes in flight
    const int row_bytes = width * static_cast<int>(kWordBytes), rows = static_cast<int>(job.product.m);
    if (row_bytes == 0) return;
    const int rows_on = kFusedThreads / row_bytes, bytes_on = kFusedThreads % row_bytes;
    auto* bytes = reinterpret_cast<uint8_t*>(words);
    int row = static_cast<int>(threadIdx.x) / row_bytes, byte = static_cast<int>(threadIdx.x) % row_bytes;
    while (row < rows) {
        Eight<T> eights[kItems];
        int place[kItems], left[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const bool exists = row < rows;
            const int64_t values = job.product.k - int64_t{8} * byte;
            left[i] = exists ? static_cast<int>(max(min(values, int64_t{8}), int64_t{0})) : 0;
            place[i] = exists ? row * pitch * static_cast<int>(kWordBytes) + byte : -1;
            const T* from = static_cast<const T*>(job.x.data) + row * job.x.stride + int64_t{8} * byte;
            Vectors ? eights[i].load_vectors(from, left[i]) : eights[i].load_values(from, left[i]);
            row += rows_on, byte += bytes_on;
            if (byte >= row_bytes) byte -= row_bytes, ++row;
        }
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            if (place[i] >= 0) bytes[place[i]] = static_cast<uint8_t>(eights[i].byte(job.x.strict) & ~(~0u << left[i]));
        }
    }
}

template <bool Vectors>
__device__ __forceinline__ void pack_rows(const FusedProduct& job, int width, int pitch, uint32_t* words) {
    switch (job.x.dtype) {
        case DType::float64: pack_typed<double, Vectors>(job, width, pitch, words); break;
        case DType::float32: pack_typed<float, Vectors>(job, width, pitch, words); break;
        case DType::float16: pack_typed<__half, Vectors>(job, width, pitch, words); break;
        default: pack_typed<__nv_bfloat16, Vectors>(job, width, pitch, words);
    }
}

// ---- the division of the work ---------------------------------------------------------------------------------------

// How the weights are divided; the host computes it (fused_plan).
struct FusedPlan {
    int width, pitch;     // words of an aligned row, and from row to row of x in shared memory
    int parts, chunk;     // warps that share a unit, and the words of K that each has
    int rounds;           // of the blocks that have most
    bool vectors;         // whether x can be loaded 16 bytes at a time
};

// Returns the plan and the number of blocks. The columns of y are ceil(n / unit) units; `piece` is the fewest words of K
// that a warp loads. A block has at most `most` units in a round and, if outputs are bits, whole words.
static inline FusedPlan fused_plan(const FusedProduct& job, int unit, int piece, int most, int64_t* blocks) {
    const Product& product = job.product;
    const int64_t value = element_size(job.x.dtype), per_load = 16 / value;
    FusedPlan plan{};
    plan.width = static_cast<int>(aligned_words_for(product.k)), plan.pitch = fused_pitch(plan.width);
    plan.vectors = reinterpret_cast<uintptr_t>(job.x.data) % 16 == 0 && product.k % per_load == 0 &&
                   (job.x.stride % per_load == 0 || product.m == 1);
    const bool bits = product.y.dtype == DType::boolean;
    int64_t least = INT64_MAX;
    for (int parts = kFusedWarps / most; parts <= kFusedWarps; parts *= 2) {
        const int units = kFusedWarps / parts;
        if (bits && unit * units < static_cast<int>(kWordBits)) break;
        const int64_t groups = ceil_div(product.n, int64_t{unit} * units);
        const int64_t launched = std::min<int64_t>(groups, std::max(job.multiprocessors, 1));
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

// Writes the bits of 32 columns, column + j ... of one row, from the popcount that each lane of a warp has for its j.
template <int Width>
__device__ __forceinline__ void write_word_of_warp(const Product& product, int64_t row, int64_t column, int j,
                                                   uint32_t popcount, const ChannelTile<AsBits, Width>& channels) {
    const int word = j / kWarp;
    const uint32_t ones = __ballot_sync(kAllLanes, within(popcount, channels.limits[j]));
    if (lane_index() == 0) write_word(product, row, column + word * kWarp, ones ^ channels.flips[word]);
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
