// Binary product of at most 16 rows of x on CUDA cores, for every architecture: XOR and popcount, bound by reading the
// weights once. Twin: gemm_popc.cu.
//
// A warp reads whole lines of 128 bytes, 16 bytes a lane: 8 lanes, a group, read one line of one weight row, and the 4
// groups of a warp 4 rows at once.
//
//     lane            0 ... 7          8 ... 15           16 ... 23           24 ... 31
//     weight rows     0 ... Each-1     Each ... 2Each-1   2Each ... 3Each-1   3Each ... 4Each-1   of the block
//     words           4 (lane % 8) ... 4 (lane % 8) + 3 of a line
//     x               the same words of a row, by all groups; from 3 rows on by a group a row, and shuffled
//
// A lane has 4 loads of weights in flight: Each rows by Lines lines. The warps of a block divide K among them and add
// their popcounts in shared memory: integers, so their order does not matter. The epilogue's operands are loaded while
// the first weights are on their way.
//
// These are estimates, not measured. An H200 moves 4.3 TB/s with a latency of about 0.7 us: 3 MB must be in flight, 23
// KB on each of its 132 SMs. A warp has 2 KB in flight; for one row and n = k = 8192 there are 512 blocks of 8 warps, 4
// on an SM: all of the weights at once. Blocks do not share a K, because that would need memory which the interface
// does not provide, or a second launch of at least 1 us. It could only help if blocks are few and rows long. At n =
// 256, k = 65536 there are 64 blocks of 32 KB of weights, and an SM takes 64 bytes a clock from L2: 0.3 us, less than
// the 0.5 us in which the chip's memory gives these 2 MiB. (From 3 rows on they are 32 of 64 KB: 0.5 us. The counting
// of 16 rows takes longer.) If outputs are bits, they are 8 of 256 KB, because a block has the 32 columns of a word:
// they take 2.3 us. Sums in memory and a second launch, which packs them, would take about as long.
#include <algorithm>
#include <type_traits>

#include "check_prepared.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "load.cuh"
#include "popcount.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kWords = 4;       // of a load, the widest: 16 bytes
constexpr int kGroupLanes = 8;  // whose loads make up a line
constexpr int kGroups = kWarp / kGroupLanes;
constexpr int kLine = kGroupLanes * kWords;

// The shape of a block: rows of x, rows of weights for each group, and lines of them that a lane loads at once; the
// most warps; and how many blocks share an SM, for which registers must suffice. Without that number ptxas spills a few
// of them.
template <int Rows, int Each, int Lines, int Warps, int Blocks>
struct Shape {
    static constexpr int kRows = Rows, kEach = Each, kLines = Lines, kWarps = Warps, kBlocks = Blocks;
    static constexpr int kThreads = kWarp * Warps;
    static constexpr int kColumns = kGroups * Each, kStep = Lines * kLine;
};

// The columns of a block. If outputs are bits, they are the 32 of a word: each part of K has kAcross warps side by
// side, with the columns of a Shape each. The rows of sums are kRow words apart: with those of one Shape between them,
// the sums to which a warp adds at the same time lie in different banks.
template <class As, class Shape>
struct Block {
    static constexpr int kAcross = kBits<As> ? kWarp / Shape::kColumns : 1, kPitch = kBits<As> ? kAcross + 1 : 1;
    static constexpr int kColumns = kAcross * Shape::kColumns, kRow = kPitch * Shape::kColumns;
};

constexpr int kManyBlocks = 256;  // two per SM of the largest chips; from here on a block may have more columns

// Returns another lane's words, from the same place of each group's line.
__device__ __forceinline__ uint4 from_group(const uint4& words, int group, int place) {
    const int lane = group * kGroupLanes + place;
    return {__shfl_sync(kAllLanes, words.x, lane), __shfl_sync(kAllLanes, words.y, lane),
            __shfl_sync(kAllLanes, words.z, lane), __shfl_sync(kAllLanes, words.w, lane)};
}

// Adds to sums[row][column] the popcounts of a warp's share of K, and calls `meanwhile` once the first loads are on
// their way. Rows that do not exist are zeros: their outputs are not written.
template <class Block, class Shape, class Function>
__device__ __forceinline__ void count_differences(const Product& product, int width, int64_t column, uint32_t* sums,
                                                  Function meanwhile) {
    constexpr int kRows = Shape::kRows, kEach = Shape::kEach, kLines = Shape::kLines, kStep = Shape::kStep;
    // Many rows of x are divided among the groups and shuffled; few are loaded by each group.
    constexpr bool kDivided = kRows >= kGroups;
    constexpr int kApart = kDivided ? kGroups : 1, kLoads = kRows / kApart;
    const int index = threadIdx.x / kWarp / Block::kAcross, warps = blockDim.x / kWarp / Block::kAcross;
    const int lane = threadIdx.x % kWarp, group = lane / kGroupLanes, place = lane % kGroupLanes;
    const int across = threadIdx.x / kWarp % Block::kAcross * Shape::kColumns;
    column += across, sums += across;
    const int first_row = kDivided ? group : 0;
    const int begin = index * kStep + kWords * place;
    const uint32_t* x = product.x.words + first_row * product.x.stride + begin;
    const uint32_t* weight = product.weight.words + (column + group * kEach) * product.weight.stride + begin;
    // The rows that exist. Blocks that write bits count them in 32 bits, because ptxas would spill two registers
    // on 12.0.
    using Count = std::conditional_t<Block::kAcross == 1, int64_t, int>;
    const int64_t columns = product.n - column;
    const bool all_columns = Block::kAcross > 1 && columns > Shape::kColumns;
    const Count x_rows = static_cast<Count>(product.m) - first_row;
    const Count weight_rows = static_cast<Count>(all_columns ? Shape::kColumns : columns) - group * kEach;
    const int64_t x_next = kApart * product.x.stride;
    // A step's words are loaded at the end of the step before it: within one, ptxas puts each load next to its use, and
    // they are in flight one after the other.
    uint4 w[kLines][kEach], a[kLines][kLoads];
    const auto fetch_weights = [&](int left) {
        const uint32_t* row = weight;
#pragma unroll
        for (int j = 0; j < kEach; ++j, row += product.weight.stride) {
#pragma unroll
            for (int line = 0; line < kLines; ++line) {
                w[line][j] = load_once(row + kLine * line, j < weight_rows && kLine * line + kWords * place < left);
            }
        }
    };
    const auto fetch_x = [&](int left) {
        const uint32_t* row = x;
#pragma unroll
        for (int i = 0; i < kLoads; ++i, row += x_next) {
#pragma unroll
            for (int line = 0; line < kLines; ++line) {
                const bool exists = i * kApart < x_rows && kLine * line + kWords * place < left;
                a[line][i] = load(row + kLine * line, exists);
            }
        }
    };
    uint32_t counts[kRows * kEach] = {};
    int left = width - index * kStep;
    fetch_weights(left);
    // ptxas would spill registers on 12.0 if blocks that write bits did this before they load x.
    if constexpr (Block::kAcross == 1) meanwhile();
    wait_for_kernel_before();
    fetch_x(left);
    if constexpr (Block::kAcross > 1) meanwhile();
    while (left > 0) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            uint4 b[kLines];
#pragma unroll
            for (int line = 0; line < kLines; ++line) {
                b[line] = kDivided ? from_group(a[line][i / kGroups], i % kGroups, place) : a[line][i % kLoads];
            }
#pragma unroll
            for (int j = 0; j < kEach; ++j) {
                BitCounter counter;
#pragma unroll
                for (int line = 0; line < kLines; ++line) counter.add_difference(b[line], w[line][j]);
                counts[i * kEach + j] += counter.total();
            }
        }
        left -= warps * kStep, x += warps * kStep, weight += warps * kStep;
        fetch_weights(left);
        fetch_x(left);
    }
    constexpr int kValues = kRows * kEach;
    add_lanes<1>(counts, lane);
    add_lanes<2>(counts, lane);
    add_lanes<4>(counts, lane);
    // 32 lanes add to 32 consecutive words, in another order: no bank conflicts.
#pragma unroll
    for (int v = 0; v < kValues; v += kGroupLanes) {
        const int row = (v + place) / kEach, j = (v + place) % kEach;
        if (v + place < kValues)
            atomicAdd(&sums[(row * kGroups * Block::kPitch + group) * kEach + j], counts[v / kGroupLanes]);
    }
}

template <class As, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) multiply_skinny(const Product product, int width) {
    using Block = Block<As, Shape>;
    constexpr int kColumns = Block::kColumns, kOutputs = Shape::kRows * Block::kRow;
    __shared__ uint32_t sums[kOutputs];
    __shared__ ChannelTile<As, kColumns> channels;
    __shared__ bool wrong_form;
    const int64_t column = int64_t{blockIdx.x} * kColumns;
    const int thread = threadIdx.x, threads = blockDim.x;
    for (int i = thread; i < kOutputs; i += threads) sums[i] = 0;
    __syncthreads();
    count_differences<Block, Shape>(product, width, column, sums, [&] {
        if (!kBits<As> && thread == 0) wrong_form = has_wrong_form(product);
        channels.load(product.y, product.n, column);
    });
    // If outputs are bits, ptxas would spill registers on 12.0 for this while weights are on their way.
    if (kBits<As> && thread == 0) wrong_form = has_wrong_form(product);
    __syncthreads();
    if (wrong_form) return write_no_result<As>(product, 0, static_cast<int>(product.m), column, kColumns);
    // Each thread writes one output, next to its neighbours': as few sectors as possible, also if rows of y do not
    // start on 16 bytes.
    for (int i = thread; i < product.m * kColumns; i += threads) {
        const int row = i / kColumns, j = i % kColumns;
        if constexpr (kBits<As>) {
            write_row_of_warp(product, row, column, sums[row * Block::kRow + j], channels);
        } else {
            write_outputs<As, 1>(product.y, product.n, product.k, row, column + j, false, {sums[i]}, channels.scale + j,
                                 channels.bias + j);
        }
    }
}

template <class As, class Shape>
cudaError_t launch(const Product& product, cudaStream_t stream, bool starts_early) {
    using Block = Block<As, Shape>;
    const int64_t blocks = ceil_div(product.n, Block::kColumns), width = aligned_words_for(product.k);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const int64_t parts = std::clamp<int64_t>(ceil_div(width, Shape::kStep), 1, Shape::kWarps / Block::kAcross);
    const int64_t warps = parts * Block::kAcross;
    return launch_kernel(multiply_skinny<As, Shape>, blocks, static_cast<int>(kWarp * warps), 0, stream, starts_early,
                         product, static_cast<int>(width));
}

// Launches the shape for the least power of two that holds the rows of x. One or two rows have two shapes: with many
// columns, blocks load x less often; if that leaves too few blocks, few columns and more of K in a block keep the loads
// in flight.
template <class As>
cudaError_t launch_rows(const Product& product, cudaStream_t stream, bool starts_early) {
    const bool wide = product.n >= kManyBlocks * kGroups * 4;
    if (product.m > 8) return launch<As, Shape<16, 2, 2, 8, 2>>(product, stream, starts_early);
    if (product.m > 4) return launch<As, Shape<8, 2, 2, 8, 2>>(product, stream, starts_early);
    if (product.m > 2) return launch<As, Shape<4, 2, 2, 8, 3>>(product, stream, starts_early);
    if (product.m > 1 && wide) return launch<As, Shape<2, 4, 1, 8, 3>>(product, stream, starts_early);
    if (product.m > 1) return launch<As, Shape<2, 1, 4, 16, 1>>(product, stream, starts_early);
    if (wide) return launch<As, Shape<1, 4, 1, 8, 4>>(product, stream, starts_early);
    return launch<As, Shape<1, 1, 4, 16, 1>>(product, stream, starts_early);
}

}  // namespace

cudaError_t gemm_skinny(const Product& product, cudaStream_t stream, bool starts_early) {
    if (product.m == 0 || product.n == 0) return cudaSuccess;
    if (product.m > kSkinnyRows || product.k > kMaxValues || !are_aligned(product)) return cudaErrorInvalidValue;
    return with_output_type(product.y.dtype,
                            [&](auto as) { return launch_rows<decltype(as)>(product, stream, starts_early); });
}

}  // namespace bitorch_qlinear::cuda
