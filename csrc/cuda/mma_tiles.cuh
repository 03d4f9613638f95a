// Binary product on tensor cores in tiles that pass through shared memory: everything except the instruction.
//
//                  weight rows = columns of y             a block's tile of y: kRows x kColumns, in squares of kSide,
//                 +--------+--------+--------+--------+   a warp each
//          x rows | warp 0 | warp 1 | warp 2 | warp 3 |
//                 +--------+--------+--------+--------+   256 columns: 8 warps of 64 x 64
//                 | warp 4 | warp 5 | warp 6 | warp 7 |   128: 4 of 64 x 64;  64: 4 of 32 x 32
//                 +--------+--------+--------+--------+
//
// A stage is 512 bits of k of all rows of the tile. Four stages lie in shared memory: while a warp multiplies one, from
// registers, it reads the next into them, and the copies of two more are on their way. A row of a stage is 16 words in
// 4 chunks of 16 bytes, and two rows fill the 32 banks:
//
//     bank     0-3      4-7      8-11     12-15    16-19    20-23    24-27    28-31
//     row 0    chunk 0  chunk 1  chunk 2  chunk 3  | row 1  ...
//     row 2    chunk 0  ...
//
// The bits of k may be summed in any order, so lane (g, q) takes chunk q of its fragment row in one 16-byte load, words
// 0 and 1 for one instruction and words 2 and 3 for another, without ldmatrix. Shared memory serves 16-byte loads 8
// lanes at a time, g = 2 i and 2 i + 1 with q = 0 ... 3: if their rows are 2 r and 2 r + 1, that is one full line of
// banks, without a swizzle. This holds for x, because lane g has row g, and for weight, because any row may feed a
// column of an instruction: every output is a column of its own. The columns of the instructions are permuted within 32
// so that a lane gets vectors of 16 bytes of y, and four lanes neighbouring ones: with 8 outputs a vector (bfloat16)
//
//     column c of instruction j = weight row 8 (c / 2) + 2 j + c % 2
//
// gives lane q, which has columns 2 q and 2 q + 1 of each instruction, the columns 8 q ... 8 q + 7 of the 32.
// The copies write whole lines as well: 4 lanes fill a row.
#pragma once

#include "async_copy.cuh"
#include "check_prepared.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "mma_square.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kStages = kTileStages, kStageBits = kTileStageBits;
constexpr int kChunkBits = 128;  // 16 bytes, the widest copy and load
constexpr int kChunks = kStageBits / kChunkBits;
static_assert(kChunks == 4, "a lane q = 0 ... 3 of each fragment row reads one chunk");

constexpr int kGroup = 32;  // columns of four instructions, which are shuffled

// A tile of y and the warps that compute it. Blocks is the number that share an SM, for which registers must suffice.
template <int Rows, int Columns, int Side, int Blocks>
struct Shape {
    static constexpr int kRows = Rows, kColumns = Columns, kSide = Side, kBlocks = Blocks;
    static constexpr int kThreads = kRows / kSide * (kColumns / kSide) * kWarp;
    static_assert(kSide % kGroup == 0, "a warp's columns are whole groups");
    struct Stage {
        uint4 x[Rows][kChunks], weight[Columns][kChunks];
    };
};

template <int Index>
using ShapeOf = Shape<kTileRows[Index], kTileColumns[Index], kTileSide[Index], kTileBlocks[Index]>;

// The epilogue's operands beside the products: set bits of the tile's rows of x and weight, and scale and bias.
template <class As, class Shape>
struct Margins {
    uint32_t x[Shape::kRows], weight[Shape::kColumns];
    ChannelTile<As, Shape::kColumns> channels;
};

// The margins use the stages' memory when the last stage has been read.
template <class As, class Shape>
union Shared {
    typename Shape::Stage stages[kStages];
    Margins<As, Shape> margins;
    // sm_86 and sm_89 have 99 KiB a block.
    static_assert(sizeof(Margins<As, Shape>) <= sizeof stages && sizeof stages <= 99 * 1024,
                  "shared memory of a block");
};

// A warp's square consists of fragments of 16 rows and of groups of columns.
template <class Shape>
constexpr int kFragments = Shape::kSide / 16;
template <class Shape>
constexpr int kGroups = Shape::kSide / kGroup;

// Returns a lane's place. Neighbouring blocks, which run at the same time, take tiles of 8 tile rows by some tile
// columns instead of one tile row: the nearer to a square, the fewer rows of x and weight they bring into L2.
template <class Shape>
__device__ __forceinline__ Place place(int64_t row_tiles, int64_t column_tiles) {
    constexpr int64_t kTall = 8;
    const int64_t band = blockIdx.x / (kTall * column_tiles), index = blockIdx.x % (kTall * column_tiles);
    const int64_t height = row_tiles - band * kTall < kTall ? row_tiles - band * kTall : kTall;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t row = (band * kTall + index % height) * Shape::kRows, column = index / height * Shape::kColumns;
    return place_in_tile<Shape::kColumns, Shape::kSide>(row, column, warp, lane);
}

// Copies rows from `begin` on and chunks from `first` on; zeros for those that do not exist.
template <class Shape, int Rows>
__device__ __forceinline__ void fetch_rows(const Operand& operand, int64_t begin, int64_t rows, int64_t first,
                                           int64_t chunks, uint4 (&to)[Rows][kChunks]) {
    constexpr int kStep = Shape::kThreads / kChunks;
    static_assert(Rows % kStep == 0, "every thread copies as many chunks");
    const int row = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int height = rows - begin < Rows ? static_cast<int>(rows - begin) : Rows;
    const bool has_chunk = first + chunk < chunks;
    int64_t word = (begin + row) * operand.stride + (first + chunk) * kAlignedWords;
#pragma unroll
    for (int i = 0; i < Rows; i += kStep) {
        const bool exists = has_chunk && row + i < height;
        copy_16_bytes(&to[row + i][chunk], operand.words + (exists ? word : 0), exists);
        word += kStep * operand.stride;
    }
}

// Copies a stage: its part of x, that of weight, or both.
template <bool X, bool Weight, class Shape>
__device__ __forceinline__ void fetch_stage(const Product& product, const Place& at, int index,
                                            typename Shape::Stage& stage) {
    const int64_t chunks = (product.k + kChunkBits - 1) / kChunkBits, first = int64_t{index} * kChunks;
    if constexpr (X) fetch_rows<Shape>(product.x, at.row, product.m, first, chunks, stage.x);
    if constexpr (Weight) fetch_rows<Shape>(product.weight, at.column, product.n, first, chunks, stage.weight);
}

// Waits until all threads see the copies of all groups except the last `InFlight`, and what was read before may be
// overwritten.
template <int InFlight>
__device__ __forceinline__ void wait_for_stage() {
    wait_for_copies<InFlight>();
    __syncthreads();
}

// A lane's chunks of a warp's fragment rows in one stage.
template <class Shape, int Vector>
struct Fragments {
    uint4 x[kFragments<Shape>][2], weight[kGroups<Shape>][4];

    __device__ __forceinline__ void read_x(const typename Shape::Stage& stage, const Place& at, int fragment) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            x[fragment][half] = stage.x[at.warp_row + 16 * fragment + 8 * half + at.g][at.q];
        }
    }
    __device__ __forceinline__ void read_weight(const typename Shape::Stage& stage, const Place& at, int group) {
        const int column = at.warp_column + kGroup * group + at.g % 2;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            weight[group][j] = stage.weight[column + column_of<Vector>(j, at.g / 2)][at.q];
        }
    }
};

// The set bits of a & b for those of each 16 x 32 outputs of a warp that a lane holds, as c[4] of four instructions.
template <class Shape>
using Sums = int32_t[kFragments<Shape>][kGroups<Shape>][4][4];

// A struct `Instructions` tells whether the target has them, multiplies what is in `fragments`, and refills it from the
// next stage:
//
//     static constexpr bool kExists;
//     static void multiply_stage(Fragments<Shape, Vector>& fragments, const typename Shape::Stage& next,
//                                const Place& at, Sums<Shape>& sums);

// The number of stages whose weights are sent for before the kernel that makes x has ended (launch.cuh). A thread waits
// for its copies in the order in which it sent for them, so the first stage also waits for all of these weights. By the
// figures of heuristics.h for 9.0, x is there 1400 clocks later, in which L2 brings a multiprocessor 33 KB.
//   - Tensor cores need 2048 clocks for a stage of 128 x 256, and L2 1024, of which the weights' 16 KB are 683. If
//     those of one stage come early, the first multiply is as much earlier, and the other stages arrive in time. With
//     those of all four, 2731 clocks, it would be 648 later than with none. Two blocks of 128 x 128 have the same
//     figures.
//   - 64 x 64 is bound by L2, 341 clocks a stage beside 256 of tensor cores, so all bytes count that come early: the 16
//     KB of four stages are 683 clocks, those of one 171. A block that begins when x is there already loses 512 clocks.
// One stage costs nothing if a block begins when x is there, so other devices, where all do, have one for each tile.
template <class Shape>
constexpr int kEarlyStages = kMayStartEarly && Shape::kSide == 32 ? kStages : 1;

// Multiplies a tile, and calls `meanwhile` once the first copies are on their way. Stages past the last are zeros or an
// earlier stage; they are read into registers but not multiplied.
template <class Instructions, class Shape, int Vector, class Function>
__device__ __forceinline__ void multiply_tile(const Product& product, const Place& at,
                                              typename Shape::Stage (&stages)[kStages], Sums<Shape>& sums,
                                              Function meanwhile) {
    const int count = static_cast<int>((product.k + kStageBits - 1) / kStageBits);
    constexpr int kEarly = kEarlyStages<Shape>;
    if (count > 0) {
#pragma unroll
        for (int stage = 0; stage < kEarly; ++stage) {
            fetch_stage<false, true, Shape>(product, at, stage, stages[stage]);
        }
    }
    wait_for_kernel_before();
    if (count > 0) {
#pragma unroll
        for (int stage = 0; stage < kStages; ++stage) {
            fetch_stage<true, false, Shape>(product, at, stage, stages[stage]);
            if (stage >= kEarly) fetch_stage<false, true, Shape>(product, at, stage, stages[stage]);
            commit_copies();
        }
    }
    meanwhile();
    if (count == 0) return;
    Fragments<Shape, Vector> fragments;
    wait_for_stage<kStages - 1>();
#pragma unroll
    for (int i = 0; i < kFragments<Shape>; ++i) fragments.read_x(stages[0], at, i);
#pragma unroll
    for (int group = 0; group < kGroups<Shape>; ++group) fragments.read_weight(stages[0], at, group);
#pragma unroll 1
    for (int stage = 0; stage < count; ++stage) {
        wait_for_stage<kStages - 2>();  // for the next one; all warps have this one in registers
        if (stage + kStages < count) {
            fetch_stage<true, true, Shape>(product, at, stage + kStages, stages[stage % kStages]);
        }
        commit_copies();
        Instructions::multiply_stage(fragments, stages[(stage + 1) % kStages], at, sums);
    }
    wait_for_stage<0>();
}

// A thread's part of the margins, in registers. It is fetched before the tile is multiplied, so that nothing waits for
// memory after that, and stored to shared memory when the stages are no longer needed there.
template <class As, class Shape>
struct EarlyMargins {
    static constexpr int kCounts = (Shape::kRows + Shape::kColumns + Shape::kThreads - 1) / Shape::kThreads;
    static constexpr int kChannels = (Shape::kColumns + Shape::kThreads - 1) / Shape::kThreads;
    static_assert(Shape::kRows % kWarp == 0, "a warp counts for rows of x or for rows of weight");

    uint32_t counts[kCounts];
    typename ChannelTile<As, Shape::kColumns>::Early channels[kChannels];

    // Calls function(i, index) for a thread's places i among `Count` indices.
    template <int Count, class Function>
    static __device__ __forceinline__ void for_each(Function function) {
#pragma unroll
        for (int i = 0; i * Shape::kThreads < Count; ++i) {
            const int index = i * Shape::kThreads + static_cast<int>(threadIdx.x);
            if (Count % Shape::kThreads == 0 || index < Count) function(i, index);
        }
    }

    __device__ __forceinline__ void fetch(const Product& product, const Place& at) {
        for_each<Shape::kRows + Shape::kColumns>([&](int i, int index) {
            const bool of_x = index < Shape::kRows;
            const int64_t row = of_x ? at.row + index : at.column + index - Shape::kRows;
            const int32_t* popcounts = of_x ? product.x.popcounts : product.weight.popcounts;
            counts[i] = row < (of_x ? product.m : product.n) ? static_cast<uint32_t>(popcounts[row]) : 0;
        });
        for_each<Shape::kColumns>([&](int i, int index) { channels[i].fetch(product.y, product.n, at.column, index); });
    }

    // All threads of the block must call it, and reach a barrier before the margins are read.
    __device__ __forceinline__ void store(const Product& product, Margins<As, Shape>& margins) const {
        for_each<Shape::kRows + Shape::kColumns>([&](int i, int index) {
            (index < Shape::kRows ? margins.x[index] : margins.weight[index - Shape::kRows]) = counts[i];
        });
        for_each<Shape::kColumns>([&](int i, int index) { channels[i].store(product.y, index, margins.channels); });
    }
};

template <class As, class Shape>
__device__ __forceinline__ void write_tile(const Product& product, const Place& at, bool whole_vectors,
                                           const Sums<Shape>& sums, const Margins<As, Shape>& margins) {
    constexpr int kCount = kVector<As>;
#pragma unroll
    for (int half = 0; half < 2 * kFragments<Shape>; ++half) {
        const int row = at.warp_row + 8 * half + at.g;
        if (at.row + row >= product.m) continue;
#pragma unroll
        for (int first = 0; first < 8 * kGroups<Shape>; first += kCount) {
            const int32_t (&group)[4][4] = sums[half / 2][first / 8];
            const int j = first % 8 / 2, column = at.warp_column + first / 8 * kGroup + column_of<kCount>(j, at.q);
            uint32_t popcounts[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const auto both = static_cast<uint32_t>(group[j + i / 2][half % 2 * 2 + i % 2]);
                popcounts[i] = margins.x[row] + margins.weight[column + i] - 2 * both;
            }
            write_outputs<As, kCount>(product.y, product.n, product.k, at.row + row, at.column + column, whole_vectors,
                                      popcounts, margins.channels.scale + column, margins.channels.bias + column);
        }
    }
}

// Writes a tile of bits.
template <class Shape>
__device__ __forceinline__ void write_tile(const Product& product, const Place& at, const Sums<Shape>& sums,
                                           const Margins<AsBits, Shape>& margins) {
#pragma unroll
    for (int first = 0; first < kFragments<Shape>; first += 2) {
#pragma unroll
        for (int index = 0; index < kGroups<Shape>; ++index) {
            const int top = at.warp_row + 16 * first, left = at.warp_column + kGroup * index;
            write_words(product, at, top, left, margins.channels, [&](int i, int c) {
                const int32_t (&group)[4][4] = sums[first + i / 2][index];
                const auto both = static_cast<uint32_t>(group[c / 2][i % 2 * 2 + c % 2]);
                return margins.x[top + 8 * i + at.g] + margins.weight[left + 8 * at.q + c] - 2 * both;
            });
        }
    }
}

template <class As, class Shape, class Instructions>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    multiply_tiles(const Product product, int64_t row_tiles, int64_t column_tiles, bool whole_vectors) {
    if constexpr (Instructions::kExists) {
        extern __shared__ __align__(128) uint4 memory[];  // whole lines of banks
        auto& shared = *reinterpret_cast<Shared<As, Shape>*>(memory);
        const Place at = place<Shape>(row_tiles, column_tiles);
        __shared__ bool wrong_form;
        Sums<Shape> sums = {};
        EarlyMargins<As, Shape> margins;
        multiply_tile<Instructions, Shape, kVector<As>>(product, at, shared.stages, sums, [&] {
            margins.fetch(product, at);
            if (threadIdx.x == 0) wrong_form = has_wrong_form(product);
        });
        margins.store(product, shared.margins);
        __syncthreads();
        if (wrong_form) {
            write_no_result<As>(product, at.row, Shape::kRows, at.column, Shape::kColumns);
        } else if constexpr (kBits<As>) {
            write_tile<Shape>(product, at, sums, shared.margins);
        } else {
            write_tile<As, Shape>(product, at, whole_vectors, sums, shared.margins);
        }
    } else {
        const Place at = place<Shape>(row_tiles, column_tiles);  // instead of leaving y unwritten
        write_no_result<As>(product, at.row, Shape::kRows, at.column, Shape::kColumns);
    }
}

template <class Instructions, class Shape>
cudaError_t launch(const Product& product, cudaStream_t stream, bool starts_early) {
    const int64_t row_tiles = ceil_div(product.m, Shape::kRows), column_tiles = ceil_div(product.n, Shape::kColumns);
    if (row_tiles > INT32_MAX / column_tiles) return cudaErrorInvalidConfiguration;
    return with_output_type(product.y.dtype, [&](auto as) {
        using As = decltype(as);
        constexpr int kBytes = sizeof(Shared<As, Shape>);
        const auto kernel = multiply_tiles<As, Shape, Instructions>;
        if constexpr (kBytes > 48 * 1024) {
            if (const auto error = allow_shared_memory(kernel, kBytes); error != cudaSuccess) return error;
        }
        return launch_kernel(kernel, row_tiles * column_tiles, Shape::kThreads, kBytes, stream, starts_early, product,
                             row_tiles, column_tiles, rows_on_16_bytes(product.y, product.n));
    });
}

}  // namespace
}  // namespace bitorch_qlinear::cuda
