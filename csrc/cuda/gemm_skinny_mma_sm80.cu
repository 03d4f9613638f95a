// Binary product of at most 64 rows of x on tensor cores, m16n8k256 and.popc, for compute capability 8.0 to 9.0: bound
// by reading the weights once, if there are few rows. Twin for up to 16: gemm_skinny.cu.
//
// All rows of x are one, two or four fragments of an instruction, and Tiles fragments of 8 weight rows are a block's
// columns of y. The bits of k may be summed in any order, so lane (g, q) loads 16 bytes of rows g and g + 8 of each
// fragment of x and of row g of each tile of weights directly into the registers of two instructions, without shared
// memory or ldmatrix:
//
//     word of a slice   4 q      4 q + 1   |  4 q + 2   4 q + 3
//     x row g           a[0]     a[2]      |  a[0]      a[2]
//     x row g + 8       a[1]     a[3]      |  a[1]      a[3]
//     weight row g      b[0]     b[1]      |  b[0]      b[1]
//                       first instruction  |  second
//
// A slice is what one such load takes of a row, 16 words; a warp loads Slices of them, side by side, before it uses
// any. The warps of a block divide K among them and add their popcounts in shared memory: integers, so their order does
// not matter. The epilogue's operands are loaded while the first weights are on their way.
//
// The kernel also counts the set bits of the rows of x and of its weight rows, from the registers that the instructions
// read, so that no launch has to count them before. By estimate an SM counts 16 words a clock (__popc), which for the 4
// KB of weights of a step and the 2 KB of x beside them are 96 clocks, while an H200's memory brings 4 KB in 220 (4.3
// TB/s) and its L2 in 170 or more. A launch for it took 1.5 to 3.6 us (measured on an H200).
//
// These are estimates, not measured. An H200 moves 4.3 TB/s with a latency of about 0.7 us: 3 MB must be in flight, 23
// KB an SM. At n = k = 8192 there are 256 blocks, two on most of its 132 SMs, of 8 warps with 4 KB of weights in flight
// each: all 8 MiB at once. Its 32768 products of 16 x 8 x 256 bits, one in 4 clocks an SM, keep the tensor cores busy
// for a quarter of the 2 us that the memory takes. Blocks do not share a K, because that would need memory which the
// interface does not provide, or a second launch of at least 1 us. It could only help if blocks are few and rows long.
// At n = 256, k = 65536 there are 32 blocks of 64 KB of weights and 128 KB of x, and an SM takes 64 bytes a clock from
// L2: 1.6 us, while all SMs together would need 0.5 us, and the second launch. If outputs are bits, they are 8 blocks
// of 256 KB of weights, because a block has the 32 columns of a word: 3.4 us, for which the same holds.
//
// More than 16 rows cost memory no more, because a lane uses the weights that it loads for all fragments. But each
// block brings all of x from L2 and counts its bits. With 64 rows, n = k = 4096 are 128 blocks of 16 KB of weights and
// 32 KB of x, 6 MB in all. The 64 blocks of mma_sm80's smallest tile bring 4 MB, but leave half of an H200 idle and
// have 32 of their 64 KB in flight, while a block of this kernel has all of its 48. Its tensor cores need 1024 clocks
// instead of 2048, and the counting of 96 rows needs 768 beside that. At its end 4 warps add 2048 sums each in shared
// memory, which takes about 512 clocks. mma_sm80 adds none, because its warps have outputs of their own. If there are
// many columns, the bytes decide: x is brought n / 32 times here and n / 64 times there, so at n = k = 8192 L2 (24
// bytes a clock) is busy for 8200 clocks instead of 5500. heuristics.h compares the two. Blocks that share a
// multiprocessor may find each other's words of x in its L1 cache, but no estimate counts on that. Blocks of 64 columns
// would bring as few bytes as mma_sm80, but for n = 4096 they would be 64 again; those of 16 would bring four times as
// much of x as of weights.
#include <algorithm>

#include "check_prepared.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "load.cuh"
#include "mma.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kWords = 4;  // of a load, the widest: 16 bytes
constexpr int kSlice = 4 * kWords;
constexpr int kSide = 8;  // columns of an instruction, and half of its rows

// The shape of a block: fragments of rows of x, tiles of columns, slices that a lane loads at once, the most warps, and
// how many blocks share an SM, for which registers must suffice.
template <int Fragments, int Tiles, int Slices, int Warps, int Blocks>
struct Shape {
    static constexpr int kFragments = Fragments, kTiles = Tiles, kSlices = Slices, kWarps = Warps, kBlocks = Blocks;
    static constexpr int kThreads = kWarp * Warps;
    static constexpr int kHalves = 2 * kFragments, kRows = kHalves * kSide;
    static constexpr int kColumns = kTiles * kSide, kStep = kSlices * kSlice;
    static_assert(kRows <= kFragmentRows, "rows that the launcher takes");
};

constexpr int kManyBlocks = 256;  // two per SM of the largest chips; from here on a block may have more columns
static_assert(kSkinnyRows == 2 * kSide, "few rows of x are those of one instruction");

// Blocks of more rows have at least this many warps, because many outputs take long to write. Some may have no part of
// K.
constexpr int kFewestWarps = 4;

// The popcounts of a block's outputs in the order of the instructions' registers: [fragment][tile][register][lane], so
// that a register of all lanes is 32 consecutive words. Outputs are read by rows, 32 lanes 8 / Tiles rows of 8 Tiles
// columns: of each tile and of registers 0 and 1 (even and odd columns) 32 / Tiles / 2 words in a row, which the
// padding puts side by side.
template <int Fragments, int Tiles>
struct Sums {
    static constexpr int kRegister = kWarp + kWarp / 2, kTile = 4 * kRegister + kWarp / 2 / Tiles;
    static constexpr int kFragment = Tiles * kTile, kSize = Fragments * kFragment;
    uint32_t words[kSize];

    __device__ __forceinline__ uint32_t& of_register(int fragment, int tile, int number, int lane) {
        return words[fragment * kFragment + tile * kTile + number * kRegister + lane];
    }
    __device__ __forceinline__ uint32_t& of_output(int row, int column) {
        const int fragment = Fragments == 1 ? 0 : row / (2 * kSide), half = row / kSide - 2 * fragment;
        return of_register(fragment, column / kSide, half * 2 + column % 2, row % kSide * 4 + column % kSide / 2);
    }
};

// The set bits of the rows of x and of the block's weight rows.
template <int Rows, int Columns>
struct RowBits {
    uint32_t x[Rows], weight[Columns];
};

#ifdef BITORCH_QLINEAR_MMA_SM80
// Adds to sums and bits the popcounts of x & weight, of x and of weight in a warp's share of K, and calls `meanwhile`
// once the first loads are on their way. Rows that do not exist are zeros: their outputs are not written.
template <class Shape, class Function>
__device__ __forceinline__ void count_common(const Product& product, int width, int64_t column,
                                             Sums<Shape::kFragments, Shape::kTiles>& sums,
                                             RowBits<Shape::kRows, Shape::kColumns>& bits, Function meanwhile) {
    constexpr int kFragments = Shape::kFragments, kHalves = Shape::kHalves;
    constexpr int kTiles = Shape::kTiles, kSlices = Shape::kSlices, kStep = Shape::kStep;
    const int index = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int lane = threadIdx.x % kWarp, g = lane / 4, place = lane % 4 * kWords;
    const int64_t x_stride = product.x.stride, weight_stride = product.weight.stride;
    const uint32_t* x = product.x.words + g * x_stride + index * kStep + place;
    const uint32_t* weight = product.weight.words + (column + g) * weight_stride + index * kStep + place;
    const int64_t rows = product.m - g, columns = product.n - column - g;
    // A step's words are loaded at the end of the step before it: within one, ptxas puts each load next to its use, and
    // they are in flight one after the other.
    uint4 a[kSlices][kHalves], b[kSlices][kTiles];
    const auto fetch_weights = [&](int left) {
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            const int word = slice * kSlice;
            const bool inside = word + place < left;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                b[slice][tile] =
                    load_once(weight + tile * kSide * weight_stride + word, inside && tile * kSide < columns);
            }
        }
    };
    const auto fetch_x = [&](int left) {
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            const int word = slice * kSlice;
            const bool inside = word + place < left;
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
                a[slice][half] = load(x + half * kSide * x_stride + word, inside && half * kSide < rows);
            }
        }
    };
    int32_t counts[kFragments][kTiles][4] = {};
    uint32_t x_bits[kHalves] = {}, weight_bits[kTiles] = {};
    const auto count_bits = [](const uint4& words) {
        return static_cast<uint32_t>(__popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w));
    };
    int left = width - index * kStep;
    fetch_weights(left);
    meanwhile();
    wait_for_kernel_before();
    fetch_x(left);
    while (left > 0) {
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
            for (int i = 0; i < kFragments; ++i) {
                const auto &top = a[slice][2 * i], &bottom = a[slice][2 * i + 1];
                x_bits[2 * i] += count_bits(top), x_bits[2 * i + 1] += count_bits(bottom);
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    const auto& w = b[slice][tile];
                    if (i == 0) weight_bits[tile] += count_bits(w);
                    mma_and_popc(counts[i][tile], {top.x, bottom.x, top.y, bottom.y}, {w.x, w.y});
                    mma_and_popc(counts[i][tile], {top.z, bottom.z, top.w, bottom.w}, {w.z, w.w});
                }
            }
        }
        left -= warps * kStep, x += warps * kStep, weight += warps * kStep;
        fetch_weights(left);
        fetch_x(left);
    }
    if (kFragments > 1 && index * kStep >= width) return;  // a warp without a part of K
#pragma unroll
    for (int fragment = 0; fragment < kFragments; ++fragment) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const auto count = static_cast<uint32_t>(counts[fragment][tile][i]);
                atomicAdd(&sums.of_register(fragment, tile, i, lane), count);
            }
        }
    }
    // The four lanes of a row have a part of it each.
    const auto add_row = [&](uint32_t count, uint32_t& to) {
        count += __shfl_xor_sync(kAllLanes, count, 1);
        count += __shfl_xor_sync(kAllLanes, count, 2);
        if (place == 0) atomicAdd(&to, count);
    };
#pragma unroll
    for (int half = 0; half < kHalves; ++half) add_row(x_bits[half], bits.x[half * kSide + g]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) add_row(weight_bits[tile], bits.weight[tile * kSide + g]);
}
#endif

template <class As, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) multiply_skinny(const Product product, int width) {
#ifdef BITORCH_QLINEAR_MMA_SM80
    constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;
    using Sums = Sums<Shape::kFragments, Shape::kTiles>;
    __shared__ Sums sums;
    __shared__ ChannelTile<As, kColumns> channels;
    __shared__ RowBits<kRows, kColumns> bits;
    __shared__ bool wrong_form;
    static_assert(kColumns <= kWarp && kRows <= kWarp * (Shape::kFragments == 1 ? 1 : kFewestWarps),
                  "the fewest warps of a block clear the bits");
    const int64_t column = int64_t{blockIdx.x} * kColumns;
    const int thread = threadIdx.x, threads = blockDim.x;
    for (int i = thread; i < Sums::kSize; i += threads) sums.words[i] = 0;
    if (thread < kRows) bits.x[thread] = 0;
    if (thread < kColumns) bits.weight[thread] = 0;
    __syncthreads();
    count_common<Shape>(product, width, column, sums, bits, [&] {
        if (thread == 0) wrong_form = has_wrong_form(product);
        channels.load(product.y, product.n, column);
    });
    __syncthreads();
    if (wrong_form) return write_no_result<As>(product, 0, static_cast<int>(product.m), column, kColumns);
    // Each thread writes one output, next to its neighbours': as few sectors as possible, also if rows of y do not
    // start on 16 bytes.
    for (int i = thread; i < product.m * kColumns; i += threads) {
        const int row = i / kColumns, j = i % kColumns;
        // popcount(a ^ b) = popcount(a) + popcount(b) - 2 popcount(a & b)
        const uint32_t different = bits.x[row] + bits.weight[j] - 2 * sums.of_output(row, j);
        if constexpr (kBits<As>) {
            write_row_of_warp(product, row, column, different, channels);
        } else {
            write_outputs<As, 1>(product.y, product.n, product.k, row, column + j, false, {different},
                                 channels.scale + j, channels.bias + j);
        }
    }
#else
    // y is not left unwritten
    const int64_t column = int64_t{blockIdx.x} * Shape::kColumns;
    write_no_result<As>(product, 0, static_cast<int>(product.m), column, Shape::kColumns);
#endif
}

template <class As, class Shape>
cudaError_t launch(const Product& product, cudaStream_t stream, bool starts_early, int fewest_warps = 1,
                   int most_warps = Shape::kWarps) {
    const int64_t blocks = ceil_div(product.n, Shape::kColumns), width = aligned_words_for(product.k);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const int64_t warps = std::clamp<int64_t>(ceil_div(width, Shape::kStep), fewest_warps, most_warps);
    return launch_kernel(multiply_skinny<As, Shape>, blocks, static_cast<int>(kWarp * warps), 0, stream, starts_early,
                         product, static_cast<int>(width));
}

// Launches a product of more rows than an instruction has. If there are more blocks than multiprocessors, several share
// one. Then each has few warps, because their loads suffice, and because each warp adds to all sums of the block.
template <class As, class Shape>
cudaError_t launch_fragments(const Product& product, cudaStream_t stream, bool starts_early) {
    const bool many = product.n > kManyBlocks / 2 * Shape::kColumns;
    return launch<As, Shape>(product, stream, starts_early, kFewestWarps, many ? kFewestWarps : Shape::kWarps);
}

// Blocks with many columns load x less often; if that leaves too few blocks, more of K in a block keeps the loads in
// flight. Blocks that write bits have the 32 columns of a word.
template <class As>
cudaError_t launch_tiles(const Product& product, cudaStream_t stream, bool starts_early) {
    if (product.m > 2 * kSkinnyRows) return launch_fragments<As, Shape<4, 4, 2, 8, 1>>(product, stream, starts_early);
    if (product.m > kSkinnyRows) return launch_fragments<As, Shape<2, 4, 2, 12, 1>>(product, stream, starts_early);
    if (kBits<As> || product.n >= kManyBlocks * 4 * kSide)
        return launch<As, Shape<1, 4, 2, 8, 2>>(product, stream, starts_early);
    if constexpr (!kBits<As>) {
        if (product.n >= kManyBlocks * 2 * kSide)
            return launch<As, Shape<1, 2, 2, 8, 3>>(product, stream, starts_early);
        return launch<As, Shape<1, 1, 4, 16, 1>>(product, stream, starts_early);
    }
}

}  // namespace

cudaError_t gemm_skinny_mma_sm80(const Product& product, cudaStream_t stream, bool starts_early) {
    if (product.m == 0 || product.n == 0) return cudaSuccess;
    if (product.m > kFragmentRows || product.k > kMaxValues || !are_aligned(product)) return cudaErrorInvalidValue;
    return with_output_type(product.y.dtype,
                            [&](auto as) { return launch_tiles<decltype(as)>(product, stream, starts_early); });
}

}  // namespace bitorch_qlinear::cuda
