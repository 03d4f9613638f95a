// Binary product on tensor cores, m8n8k128 xor.popc, for compute capability 7.5 to 8.9. Twin: gemm_popc.cu; its larger
// sibling's mma_tiles.cuh draws a stage and explains why the lanes read shared memory in this order.
//
// A block computes a tile of 64 x 64 outputs, each of its four warps a square of 32 x 32: 4 x 4 instructions for each
// 128 bits of k. Turing cannot copy to shared memory without registers: while a stage of 512 bits is multiplied, the
// next passes through them into the other of two buffers. Chunks that do not exist are zeros in both operands, and rows
// that do not exist belong to outputs that are not written.
//
// By estimate, not measured, an instruction is 8192 multiply-adds, and a warp reads 4 KiB for its 64 of a stage, 64
// bytes each; the block writes 32 more. At 8192 multiply-adds of bits a clock and SM (8 times a T4's int8 rate in its
// data sheet) that is 96 bytes of shared memory a clock.
#include "check_prepared.cuh"
#include "epilogue.cuh"
#include "mma.cuh"
#include "mma_square.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kThreads = 128;

#ifdef BITORCH_QLINEAR_MMA_SM75

constexpr int kSide = 32;                            // the side of a warp's square
constexpr int kFragments = 4;                        // along it, of 8 rows or columns
constexpr int kChunkBits = 128;                      // 16 bytes, the widest load
constexpr int kChunks = 4;                           // of a row in a stage: one for each lane q
constexpr int kCopies = kTile * kChunks / kThreads;  // chunks of each operand that a thread copies

struct Stage {
    uint4 x[kTile][kChunks], weight[kTile][kChunks];
};

// The part of a stage that a thread is copying.
struct Copies {
    uint4 x[kCopies], weight[kCopies];
};

__device__ __forceinline__ Place place(int64_t column_tiles) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    return place_in_tile<kTile, kSide>(blockIdx.x / column_tiles * kTile, blockIdx.x % column_tiles * kTile, warp,
                                       lane);
}

__device__ __forceinline__ void load_rows(const Operand& operand, int64_t begin, int64_t rows, int64_t first,
                                          int64_t chunks, uint4 (&to)[kCopies]) {
    const int64_t chunk = first + threadIdx.x % kChunks;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
        const int64_t row = begin + (i * kThreads + threadIdx.x) / kChunks;
        to[i] = row < rows && chunk < chunks
                    ? *reinterpret_cast<const uint4*>(operand.words + row * operand.stride + chunk * kAlignedWords)
                    : uint4{};
    }
}

__device__ __forceinline__ void load_stage(const Product& product, const Place& at, int stage, Copies& copies) {
    const int64_t chunks = (product.k + kChunkBits - 1) / kChunkBits, first = int64_t{stage} * kChunks;
    load_rows(product.x, at.row, product.m, first, chunks, copies.x);
    load_rows(product.weight, at.column, product.n, first, chunks, copies.weight);
}

__device__ __forceinline__ void store_stage(const Copies& copies, Stage& stage) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
        const int index = i * kThreads + static_cast<int>(threadIdx.x), row = index / kChunks, chunk = index % kChunks;
        stage.x[row][chunk] = copies.x[i];
        stage.weight[row][chunk] = copies.weight[i];
    }
}

// The set bits of a ^ b for those of a warp's outputs that a lane holds, as c[2] of 4 x 4 instructions.
using Sums = int32_t[kFragments][kFragments][2];

template <int Vector>
__device__ __forceinline__ void multiply_stage(const Stage& stage, const Place& at, Sums& sums) {
    uint4 x[kFragments], weight[kFragments];
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
        x[i] = stage.x[at.warp_row + 8 * i + at.g][at.q];
        weight[i] = stage.weight[at.warp_column + column_of<Vector>(i, at.g / 2) + at.g % 2][at.q];
    }
    // The bits of k may be summed in any order: each of a lane's four words belongs to an instruction of its own.
    const auto multiply = [&](uint32_t uint4::* word) {
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
#pragma unroll
            for (int j = 0; j < kFragments; ++j) mma_xor_popc(sums[i][j], x[i].*word, weight[j].*word);
        }
    };
    multiply(&uint4::x);
    multiply(&uint4::y);
    multiply(&uint4::z);
    multiply(&uint4::w);
}

template <int Vector>
__device__ __forceinline__ void multiply_tile(const Product& product, const Place& at, Stage (&stages)[2], Sums& sums) {
    constexpr int kStageBits = kChunks * kChunkBits;
    const int count = static_cast<int>((product.k + kStageBits - 1) / kStageBits);
    Copies copies;
    load_stage(product, at, 0, copies);
    store_stage(copies, stages[0]);
#pragma unroll 1
    for (int stage = 0; stage < count; ++stage) {
        __syncthreads();  // this stage has been written, and the other buffer has been read
        load_stage(product, at, stage + 1, copies);
        multiply_stage<Vector>(stages[stage % 2], at, sums);
        store_stage(copies, stages[(stage + 1) % 2]);
    }
}

template <class As>
__device__ __forceinline__ void write_tile(const Product& product, const Place& at, bool whole_vectors,
                                           const Sums& sums, const ChannelTile<As, kTile>& channels) {
    constexpr int kCount = kVector<As>;
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
        const int64_t row = at.row + at.warp_row + 8 * i + at.g;
        if (row >= product.m) continue;
#pragma unroll
        for (int j = 0; j < kFragments; j += kCount / 2) {
            const int column = at.warp_column + column_of<kCount>(j, at.q);
            uint32_t popcounts[kCount];
#pragma unroll
            for (int c = 0; c < kCount; ++c) popcounts[c] = static_cast<uint32_t>(sums[i][j + c / 2][c % 2]);
            write_outputs<As, kCount>(product.y, product.n, product.k, row, at.column + column, whole_vectors,
                                      popcounts, channels.scale + column, channels.bias + column);
        }
    }
}

// Writes a tile of bits.
__device__ __forceinline__ void write_tile(const Product& product, const Place& at, const Sums& sums,
                                           const ChannelTile<AsBits, kTile>& channels) {
    static_assert(kSide == kWarp, "a warp's square is 32 words");
    write_words(product, at, at.warp_row, at.warp_column, channels,
                [&](int i, int c) { return static_cast<uint32_t>(sums[i][c / 2][c % 2]); });
}

#endif

// Three blocks share an SM, as many as fit in the shared memory of sm_75.
template <class As>
__global__ void __launch_bounds__(kThreads, 3)
    multiply_tiles(const Product product, int64_t column_tiles, bool whole_vectors) {
#ifdef BITORCH_QLINEAR_MMA_SM75
    __shared__ __align__(128) Stage stages[2];  // whole lines of banks
    __shared__ ChannelTile<As, kTile> channels;
    __shared__ bool wrong_form;
    const Place at = place(column_tiles);
    Sums sums = {};
    if (threadIdx.x == 0) wrong_form = has_wrong_form(product);
    channels.load(product.y, product.n, at.column);
    multiply_tile<kVector<As>>(product, at, stages, sums);
    __syncthreads();  // with k = 0 there was no barrier yet
    if (wrong_form) {
        write_no_result<As>(product, at.row, kTile, at.column, kTile);
    } else if constexpr (kBits<As>) {
        write_tile(product, at, sums, channels);
    } else {
        write_tile<As>(product, at, whole_vectors, sums, channels);
    }
#else
    // y is not left unwritten
    write_no_result<As>(product, blockIdx.x / column_tiles * kTile, kTile, blockIdx.x % column_tiles * kTile, kTile);
#endif
}

}  // namespace

cudaError_t gemm_mma_sm75(const Product& product, cudaStream_t stream) {
    if (product.m == 0 || product.n == 0) return cudaSuccess;
    if (!are_aligned(product)) return cudaErrorInvalidValue;
    const int64_t row_tiles = ceil_div(product.m, kTile), column_tiles = ceil_div(product.n, kTile);
    if (row_tiles > INT32_MAX / column_tiles) return cudaErrorInvalidConfiguration;
    return with_output_type(product.y.dtype, [&](auto as) {
        multiply_tiles<decltype(as)><<<static_cast<unsigned>(row_tiles * column_tiles), kThreads, 0, stream>>>(
            product, column_tiles, rows_on_16_bytes(product.y, product.n));
        return cudaGetLastError();
    });
}

}  // namespace bitorch_qlinear::cuda
