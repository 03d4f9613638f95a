// Packs at most 4 rows of real x and multiplies them, in one launch, for every architecture: XOR and popcount on CUDA
// cores. Twins: pack.cu and gemm_skinny.cu.
//
// As in gemm_skinny.cu, a warp reads whole lines of 128 bytes: 8 lanes, a group, read one line of a weight row, and the
// 4 groups of a warp a line of 4 rows. A lane has kLines loads of weights in flight, of one row, and the first of them
// leave before x is read. fused.cuh says how the rows and K are divided among warps and blocks.
//
// What one launch saves is measured, on an H200 in a CUDA graph with warm caches (benchmarks/results/gpu/gpu.md):
// packing one row of bfloat16 by a launch of its own takes 1.6 us of 3.95 at n = k = 4096, and 1.9 of 5.1 at 8192. All
// else here is an estimate. A block packs all of x for itself, so x is read from L2 by each of 132 blocks, one to a
// multiprocessor: at k = 8192, 16 KB for one row and 64 KB for 4, where the weights are 64 KB. L1 takes 64 bytes a
// clock from L2, but packing takes 45 instructions of a warp for 512 bytes of bfloat16, of which 37 take the units of
// logic: 18 clocks, 28 bytes a clock. That is 0.3 us for 16 KB and 1.3 us for 64 KB at 1.75 GHz, and part of it passes
// while the weights are on their way. heuristics.h has the bound from which two launches are faster.
//
// A block has 32 KB of weights in flight, 4 MB on 132 multiprocessors, where 3 MB keep an H200's memory busy. The loop
// over K takes 35 clocks of the units of logic for 2 KB of weights and one row, 56 for 2 rows and 94 for 4, and an
// H200's memory takes 99 for them (tools/gpu_model.py). At n = k = 8192 that is 1100, 1800 and 3000 clocks of a
// multiprocessor; with weights in L2, which brings 2 KB in 32 clocks or more, gemm_fused_skinny_mma_sm80.cu, whose
// loop takes 48 for any number of rows, is faster from 2 rows on.
#include "fused.cuh"
#include "popcount.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kWords = 4;       // of a load, the widest: 16 bytes
constexpr int kGroupLanes = 8;  // whose loads make up a line
constexpr int kUnit = kWarp / kGroupLanes;
constexpr int kLine = kGroupLanes * kWords, kLines = 4, kStep = kLines * kLine;
constexpr int kMostColumns = kUnit * kFusedWarps;

// The words from a row of sums to the next. Where a warp's outputs are of one row, the sums to which a warp adds at the
// same time then lie in different banks.
__device__ __forceinline__ int pitch_of_sums(int columns) { return columns + (columns >= kWarp ? kUnit : 0); }

template <class As, int Rows>
__global__ void __launch_bounds__(kFusedThreads, 1) multiply_fused(const FusedProduct job, const FusedPlan plan) {
    __shared__ __align__(16) uint32_t x[kFusedWords];
    __shared__ uint32_t sums[2][Rows * (kMostColumns + kUnit)];
    __shared__ ChannelTile<As, kMostColumns> channels[2];
    __shared__ bool wrong_form;
    const Product& product = job.product;
    const int thread = static_cast<int>(threadIdx.x), lane = lane_index();
    const int group = lane / kGroupLanes, place = lane % kGroupLanes * kWords;
    const int units = kFusedWarps / plan.parts, columns = kUnit * units, shift = __ffs(columns) - 1;
    const int part = thread / kWarp % plan.parts, unit = thread / kWarp / plan.parts;
    const int begin = part * plan.chunk, end = min(begin + plan.chunk, plan.width);
    const int n = static_cast<int>(product.n), m = static_cast<int>(product.m);
    const int sums_pitch = pitch_of_sums(columns);
    uint4 w[kLines];
    const auto fetch = [&](int64_t column, int word) {
        const uint32_t* row = product.weight.words + column * product.weight.stride + word + place;
#pragma unroll
        for (int line = 0; line < kLines; ++line) {
            w[line] = load_once(row + kLine * line, column < n && word + kLine * line + place < end);
        }
    };
    const auto first_column = [&](int64_t round) { return column_of_round(round, columns); };
    const int own = unit * kUnit + group;
    fetch(first_column(0) + own, begin);
    if (thread == 0) wrong_form = has_wrong_form(product);
    for (int i = thread; i < 2 * Rows * (kMostColumns + kUnit); i += kFusedThreads) sums[0][i] = 0;
    pack_x(job, plan, x);
    __syncthreads();
    if (wrong_form) return write_no_results<As>(product, plan, columns);
#pragma unroll 1
    for (int round = 0; round < plan.rounds; ++round) {
        const int64_t column = first_column(round);
        uint32_t* of_round = sums[round % 2];
        ChannelTile<As, kMostColumns>& tile = channels[round % 2];
        uint32_t counts[Rows] = {};
#pragma unroll 1
        for (int word = begin; word < end; word += kStep) {
            BitCounter counters[Rows];
#pragma unroll
            for (int line = 0; line < kLines; ++line) {
                const int at = word + kLine * line + place;
                if (word + kLine * line >= end) break;  // the whole warp
#pragma unroll
                for (int i = 0; i < Rows; ++i) {
                    // A row that does not exist is the last one once more, and its outputs are not written.
                    const auto* from = reinterpret_cast<const uint4*>(x + min(i, m - 1) * plan.pitch + at);
                    counters[i].add_difference(at < end ? *from : uint4{}, w[line]);
                }
            }
#pragma unroll
            for (int i = 0; i < Rows; ++i) counts[i] += counters[i].total();
            const bool last = word + kStep >= end;  // the next words are those of the next round, which may have none
            fetch((last ? first_column(round + 1) : column) + own, last ? begin : word + kStep);
        }
        tile.load(product.y, product.n, column);
        add_lanes<1>(counts, lane);
        add_lanes<2>(counts, lane);
        add_lanes<4>(counts, lane);
        const int row = lane % kGroupLanes;
        if (row < Rows) atomicAdd(&of_round[row * sums_pitch + own], counts[0]);
        __syncthreads();
        for (int i = thread; i < m * columns; i += kFusedThreads) {
            const int row = i >> shift, j = i & (columns - 1);
            uint32_t* sum = &of_round[row * sums_pitch + j];
            if constexpr (kBits<As>) {
                write_word_of_warp(product, row, column, j, *sum, tile);
            } else {
                write_outputs<As, 1>(product.y, product.n, product.k, row, column + j, false, {*sum}, tile.scale + j,
                                     tile.bias + j);
            }
            *sum = 0;
        }
    }
}

template <class As, int Rows>
cudaError_t launch(const FusedProduct& job, cudaStream_t stream) {
    int64_t blocks = 0;
    const FusedPlan plan = fused_plan(job, kUnit, kLine, kFusedWarps, &blocks);
    multiply_fused<As, Rows><<<static_cast<unsigned>(blocks), kFusedThreads, 0, stream>>>(job, plan);
    return cudaGetLastError();
}

template <class As>
cudaError_t launch_rows(const FusedProduct& job, cudaStream_t stream) {
    if (job.product.m > 2) return launch<As, 4>(job, stream);
    if (job.product.m > 1) return launch<As, 2>(job, stream);
    return launch<As, 1>(job, stream);
}

}  // namespace

cudaError_t gemm_fused_skinny(const FusedProduct& job, cudaStream_t stream) {
    if (job.product.m == 0 || job.product.n == 0) return cudaSuccess;
    if (!fits_fused(job, kCountedRows)) return cudaErrorInvalidValue;
    return with_output_type(job.product.y.dtype, [&](auto as) { return launch_rows<decltype(as)>(job, stream); });
}

}  // namespace bitorch_qlinear::cuda
