// The kernels that pack at most 16 rows of real x and multiply them on tensor cores: m16n8k256 and.popc. In
// gemm_fused_skinny_mma_sm80.cu each block packs x for itself, and in gemm_fused_cluster_sm90.cu the blocks of a
// cluster pack it together. The set bits of x and of the weights are counted inside.
//
// All rows of x are one fragment of an instruction, and 8 weight rows another. The bits of k may be summed in any
// order, so lane (g, q) takes 16 bytes of row g of the weights from global memory, and of rows g and g + 8 of x from
// shared memory, as the registers of two instructions, without ldmatrix:
//
//     word of a slice   4 q      4 q + 1   |  4 q + 2   4 q + 3
//     x row g           a[0]     a[2]      |  a[0]      a[2]
//     x row g + 8       a[1]     a[3]      |  a[1]      a[3]
//     weight row g      b[0]     b[1]      |  b[0]      b[1]
//                       first instruction  |  second
//
// A slice is what one such load takes of a row, 16 words. A warp has kSlices loads of weights in flight, and the first
// of them leave before x is read. fused.cuh says how columns and K are divided among warps and blocks.
#pragma once

#include "cluster.cuh"
#include "fused.cuh"
#include "mma.cuh"
#include "popcount.cuh"

namespace bitorch_qlinear::cuda {

constexpr int kWords = 4;  // of a load, the widest: 16 bytes
constexpr int kUnit = 8;   // columns of an instruction, and half of its rows
constexpr int kSlice = 4 * kWords, kMostUnits = 8;
static_assert(kSkinnyRows == 2 * kUnit, "the rows of x are those of one instruction");
static_assert(kSkinnyRows == kFusedWarps, "each warp counts the bits of a row of x");

#ifdef BITORCH_QLINEAR_MMA_SM80
constexpr int kSlices = 4, kStep = kSlices * kSlice, kMostColumns = kUnit * kMostUnits;

// The sums of a round's outputs, as they lie in the instructions' registers: [unit][register][lane], so that a register
// of all lanes is 32 consecutive words. Outputs are read by rows, 32 lanes 4 / units rows of 8 units columns (at least
// one row, and at most 32 columns): of each unit and of registers 0 and 1 (even and odd columns) some words in a row,
// which the padding puts side by side.
struct Sums {
    static constexpr int kRegister = kWarp + kWarp / 2, kOfUnit = 4 * kRegister;
    uint32_t words[kMostUnits * (kOfUnit + 2 * kWords)];

    __device__ __forceinline__ uint32_t& of_register(int units, int unit, int number, int lane) {
        return words[unit * (kOfUnit + (units == 2 ? 2 * kWords : kWords)) + number * kRegister + lane];
    }
    __device__ __forceinline__ uint32_t& of_output(int units, int row, int column) {
        return of_register(units, column / kUnit, row / kUnit * 2 + column % 2, row % kUnit * 4 + column % kUnit / 2);
    }
};

// Returns the set bits of a packed row of x to all lanes of a warp.
__device__ __forceinline__ uint32_t count_row(const uint32_t* words, int width) {
    uint32_t count = 0;
#pragma unroll 4
    for (int i = lane_index(); i < width; i += kWarp) count += __popc(words[i]);
    return __reduce_add_sync(kAllLanes, count);
}

// Packs all rows of x: each block of the cluster packs a part of k and stores it in all blocks. Returns when x is
// complete. From then on no block touches the memory of another one, so a block may exit at any time.
template <int Blocks>
__device__ __forceinline__ void pack_x_in_cluster(const FusedProduct& job, const FusedPlan& plan, uint32_t* words) {
#ifdef BITORCH_QLINEAR_CLUSTERS
    static_assert(kFusedWarps % Blocks == 0, "each warp stores the words in one block");
    arrive_at_start();
    const int rank = rank_in_cluster(), part = (plan.width / kWords + Blocks - 1) / Blocks * kWords;
    const int first = min(rank * part, plan.width), width = min(part, plan.width - first), vectors = width / kWords;
    pack_words(job, plan, first, width, words);
    __syncthreads();
    wait_for_cluster();  // until then a block may not have started, whose memory may belong to another one
    const int warp = static_cast<int>(threadIdx.x) / kWarp, peer = warp % Blocks;
    if (peer != rank) {
        const uint32_t there = address_in_block(words, peer);
        const int count = static_cast<int>(job.product.m) * vectors;
#pragma unroll 1
        for (int i = warp / Blocks * kWarp + lane_index(); i < count; i += kFusedThreads / Blocks) {
            const int at = i / vectors * plan.pitch + first + i % vectors * kWords;
            const uint4 four = *reinterpret_cast<const uint4*>(words + at);
            store_in_cluster(there + at * static_cast<int>(kWordBytes), four);
        }
    }
    arrive_with_words();
    wait_for_cluster();
#endif
}

// The body of the kernels: computes what the block has to do, as one of so many blocks of a cluster.
template <class As, int Blocks>
__device__ __forceinline__ void multiply_rows(const FusedProduct& job, const FusedPlan& plan) {
    __shared__ __align__(16) uint32_t x[kFusedWords];
    __shared__ Sums sums[2];
    __shared__ uint32_t x_bits[kSkinnyRows];
    __shared__ ChannelTile<As, kMostColumns> channels[2];
    __shared__ bool wrong_form;
    const Product& product = job.product;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = lane_index();
    const int g = lane / 4, q = lane % 4, place = q * kWords;
    const int units = kFusedWarps / plan.parts, columns = kUnit * units, shift = __ffs(columns) - 1;
    const int part = warp % plan.parts, unit = warp / plan.parts;
    const int begin = part * plan.chunk, end = min(begin + plan.chunk, plan.width);
    const int n = static_cast<int>(product.n), m = static_cast<int>(product.m);
    uint4 w[kSlices];
    const auto fetch = [&](int64_t column, int word) {
        const uint32_t* row = product.weight.words + column * product.weight.stride + word + place;
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            w[slice] = load_once(row + kSlice * slice, column < n && word + kSlice * slice + place < end);
        }
    };
    const auto first_column = [&](int64_t round) { return column_of_round(round, columns); };
    const int own = unit * kUnit + g;
    fetch(first_column(0) + own, begin);
    if (thread == 0) wrong_form = has_wrong_form(product);
    for (int i = thread; i < static_cast<int>(sizeof sums / sizeof(uint32_t)); i += kFusedThreads) sums[0].words[i] = 0;
    if constexpr (Blocks == 1) {
        pack_x(job, plan, x);
        __syncthreads();
    } else {
        pack_x_in_cluster<Blocks>(job, plan, x);
    }
    if (wrong_form) return write_no_results<As>(product, plan, columns);
    if (warp < m) {
        const uint32_t bits = count_row(x + warp * plan.pitch, plan.width);
        if (lane == 0) x_bits[warp] = bits;
    }
    // A row that does not exist is the last one once more, or zeros if it belongs to a half without rows; its outputs
    // are not written.
    const uint32_t* top_row = x + min(g, m - 1) * plan.pitch + place;
    const uint32_t* bottom_row = x + min(g + kUnit, m - 1) * plan.pitch + place;
    const bool two_halves = m > kUnit;
#pragma unroll 1
    for (int round = 0; round < plan.rounds; ++round) {
        const int64_t column = first_column(round);
        Sums& of_round = sums[round % 2];
        ChannelTile<As, kMostColumns>& tile = channels[round % 2];
        int32_t counts[4] = {};
        uint32_t weight_bits = 0;
#pragma unroll 1
        for (int word = begin; word < end; word += kStep) {
            BitCounter counter;
#pragma unroll
            for (int slice = 0; slice < kSlices; ++slice) {
                const int at = word + kSlice * slice;
                if (at >= end) break;  // the whole warp
                const bool inside = at + place < end;
                const uint4 top = inside ? *reinterpret_cast<const uint4*>(top_row + at) : uint4{};
                const uint4 bottom = inside && two_halves ? *reinterpret_cast<const uint4*>(bottom_row + at) : uint4{};
                const uint4& b = w[slice];
                mma_and_popc(counts, {top.x, bottom.x, top.y, bottom.y}, {b.x, b.y});
                mma_and_popc(counts, {top.z, bottom.z, top.w, bottom.w}, {b.z, b.w});
                counter.add_difference(b, uint4{});
            }
            weight_bits += counter.total();
            const bool last = word + kStep >= end;  // the next words are those of the next round, which may have none
            fetch((last ? first_column(round + 1) : column) + own, last ? begin : word + kStep);
        }
        tile.load(product.y, product.n, column);
        // popcount(a ^ b) = popcount(a) + popcount(b) - 2 popcount(a & b). The four lanes of a weight row add up its
        // bits; a lane has the sums of columns 2 q and 2 q + 1.
        weight_bits += __shfl_xor_sync(kAllLanes, weight_bits, 1);
        weight_bits += __shfl_xor_sync(kAllLanes, weight_bits, 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t bits = __shfl_sync(kAllLanes, weight_bits, 4 * (2 * q + i % 2));
            atomicAdd(&of_round.of_register(units, unit, i, lane), bits - 2 * static_cast<uint32_t>(counts[i]));
        }
        __syncthreads();
        for (int i = thread; i < m * columns; i += kFusedThreads) {
            const int row = i >> shift, j = i & (columns - 1);
            uint32_t* sum = &of_round.of_output(units, row, j);
            const uint32_t different = x_bits[row] + *sum;
            if constexpr (kBits<As>) {
                write_word_of_warp(product, row, column, j, different, tile);
            } else {
                write_outputs<As, 1>(product.y, product.n, product.k, row, column + j, false, {different},
                                     tile.scale + j, tile.bias + j);
            }
            *sum = 0;
        }
    }
}
#endif

}  // namespace bitorch_qlinear::cuda
