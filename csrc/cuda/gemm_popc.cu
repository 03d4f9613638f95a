// Binary product on CUDA cores, for every architecture and shape: XOR and __popc over tiles in shared memory. It is the
// GPU twin of the other kernels. By estimate they are faster for the products for which they are chosen (heuristics.h),
// so this one is kept simple: outputs are stored one by one. Its own twin is cpu/gemm_scalar.cpp.
//
// A block of 256 threads computes a tile of 64 x 64 outputs, a thread 4 x 4 of them: rows ty + 16 i and columns tx + 16
// j. Each stage of kStage words is stored transposed, [word][row], so that the 16 columns that half a warp reads are
// consecutive banks and its row is a broadcast; a row of kTile + 1 words also keeps the transposing stores apart.
//
// __popc runs at 16 lanes a clock and SM (compute capability 8.x and 9.0, CUDA C++ programming guide,
// "Arithmetic Instructions"): 32 multiply-adds each, so at most 512 per clock and SM (an estimate, not measured).
#include "epilogue.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kStage = 32;
constexpr int kThreads = 256;
constexpr int kSide = 16;             // threads along a tile's edge
constexpr int kEach = kTile / kSide;  // outputs of a thread along it

using Stage = uint32_t[kStage][kTile + 1];

// Loads words [first, first + kStage) of the rows from `begin` on; 0 for rows and words that do not exist and for bits
// past k.
__device__ __forceinline__ void load_stage(const Operand& operand, int64_t begin, int64_t rows, int64_t first,
                                           int64_t k, Stage& stage) {
    const int64_t width = word_count(k);
#pragma unroll 4  // 8 in flight at once would spill at two blocks an SM
    for (int i = 0; i < kTile * kStage / kThreads; ++i) {
        const int index = i * kThreads + static_cast<int>(threadIdx.x), row = index / kStage, word = index % kStage;
        uint32_t value = 0;
        if (begin + row < rows && first + word < width) {
            value = operand.words[(begin + row) * operand.stride + first + word];
            if (first + word == width - 1 && k % 32) value &= (uint32_t{1} << (k % 32)) - 1;
        }
        stage[word][row] = value;
    }
}

// Writes the rows `row` + kSide i of a tile of bits. A warp has two rows, and of each 32 columns a thread has two, 16
// apart: one ballot has the first 16 columns of both rows, another the last 16.
__device__ __forceinline__ void write_words(const Product& product, int64_t row, int64_t column, int tx,
                                            const uint32_t (&popcounts)[kEach][kEach],
                                            const ChannelTile<AsBits, kTile>& channels) {
    static_assert(2 * kSide == kWarp && kSide == kWordBits / 2, "a warp has two rows of half words");
    const bool second_row = lane_index() >= kSide;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int word = 0; word < kTile / kWarp; ++word) {
            uint32_t halves[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int j = 2 * word + half;
                const bool one = within(popcounts[i][j], channels.limits[kSide * j + tx]);
                halves[half] = __ballot_sync(kAllLanes, one);
            }
            const uint32_t ones = __byte_perm(halves[0], halves[1], second_row ? 0x7632 : 0x5410);
            if (tx == word) {
                write_word(product, row + kSide * i, column + kWordBits * word, ones ^ channels.flips[word]);
            }
        }
    }
}

template <class As>
__global__ void __launch_bounds__(kThreads, 2) multiply_tiles(const Product product, int64_t column_tiles) {
    __shared__ Stage x, weight;
    __shared__ ChannelTile<As, kTile> channels;
    const int64_t row = blockIdx.x / column_tiles * kTile, column = blockIdx.x % column_tiles * kTile;
    const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
    const int64_t width = word_count(product.k);
    uint32_t popcounts[kEach][kEach] = {};
    channels.load(product.y, product.n, column);
    __syncthreads();
    for (int64_t first = 0; first < width; first += kStage) {
        load_stage(product.x, row, product.m, first, product.k, x);
        load_stage(product.weight, column, product.n, first, product.k, weight);
        __syncthreads();
#pragma unroll 4
        for (int word = 0; word < kStage; ++word) {
            uint32_t a[kEach], b[kEach];
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                a[i] = x[word][ty + kSide * i];
                b[i] = weight[word][tx + kSide * i];
            }
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
#pragma unroll
                for (int j = 0; j < kEach; ++j) popcounts[i][j] += __popc(a[i] ^ b[j]);
            }
        }
        __syncthreads();
    }
    if constexpr (kBits<As>) {
        write_words(product, row + ty, column, tx, popcounts, channels);
    } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
            for (int j = 0; j < kEach; ++j) {
                const int64_t m = row + ty + kSide * i;
                const int n = tx + kSide * j;
                if (m >= product.m) continue;
                write_outputs<As, 1>(product.y, product.n, product.k, m, column + n, false, {popcounts[i][j]},
                                     channels.scale + n, channels.bias + n);
            }
        }
    }
}

}  // namespace

cudaError_t gemm_popc(const Product& product, cudaStream_t stream) {
    if (product.m == 0 || product.n == 0) return cudaSuccess;
    const int64_t column_tiles = ceil_div(product.n, kTile), tiles = ceil_div(product.m, kTile) * column_tiles;
    if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
    return with_output_type(product.y.dtype, [&](auto as) {
        multiply_tiles<decltype(as)><<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(product, column_tiles);
        return cudaGetLastError();
    });
}

}  // namespace bitorch_qlinear::cuda
