// Binary product on the tensor cores of a warpgroup, wgmma and.popc, for compute capability 9.0. Twin: gemm_popc.cu.
//
//     warpgroup 0     producer: one thread copies boxes of x and weight to stages of a ring, as soon as they are empty
//     warpgroup 1, 2  consumers: each multiplies what is in the stages of its own tiles of y, and writes the tile
//
//     producer      tile 0 | tile 1 | tile 2 | tile 3 | ...
//     consumer 1             multiply 0 | write 0    | multiply 2 | write 2 ...
//     consumer 2                        | multiply 1 | write 1    | multiply 3 ...
//
// A multiprocessor holds one block, which computes every gridDim.x-th tile, so that the copies of a tile begin while
// the one before is multiplied. The two consumers take turns with the tensor cores: while one writes, the other
// multiplies.
//
// A stage is one line of 1024 bits of each row of the tile, as a tensor map lays it out (tensor_map.h): 128 rows of x,
// and 192 or 128 of weight. Each stage has two barriers. `full` ends a phase when the stage's bytes have arrived,
// `empty` when the four warps of a consumer have read them. The consumers find their way by parities, which tell a
// phase from the next one, but not from the one two later. So each gives the turn to the other by a third barrier:
// whoever has it knows that all stages before its own were full.
//
// Weights and x are read from the aligned form, and there is no form of their own for this kernel. Tile by tile it
// would be 1/32 of the float32 weights more for each layer, and a pass over x in each call (12.4 us for 8192 x 8192,
// measured), to save nothing: the boxes move the same bytes from L2, in whole lines of 128 bytes, and zeros for what
// does not exist.
//
// Columns. wgmma gives lane q of four the columns 8 j + 2 q and 8 j + 2 q + 1. Outputs of 4 bytes then fill a whole
// sector of 32 bytes in a store of four lanes, but those of 2 bytes half of one. Any row of weight may feed a column,
// so for these, and for bits, the even rows of the tile lie in the first half of a stage's lines and the odd ones in
// the second:
//
//     line i of half h = row 2 i + h of the tile
//
// Two maps, whose rows are two rows of weight apart, copy them so, and lane q has the outputs 16 j + 4 q ... + 3. No
// output passes through shared memory, which the tensor cores read at nearly its full rate.
//
// If the product starts early (launch.cuh), the producer copies the weights of the first stages before it waits for the
// kernel that makes x. Both consumers wait, too, before they read set bits and write y. Scale and bias could be loaded
// before that, but are loaded beside the set bits, which take as long to arrive (about 700 clocks), in the same code
// for every tile. The first stage of x, which is copied meanwhile, takes longer.
//
// The sums are exact for any k. A row's last stage is multiplied up to the step of 256 bits in which k ends; what lies
// past k in that step are zeros.
#include <algorithm>

#include "check_prepared.cuh"
#include "epilogue.cuh"
#include "launch.cuh"
#include "mma_square.cuh"
#include "tensor_map.h"
#include "warpgroup.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kConsumers = 2, kBlockThreads = kWarpgroup * (1 + kConsumers);
static_assert(kWarpgroupStageBits == kLineBits, "a stage is one line of each row");

// At its start each of 384 threads gets 168 of the 65,536 registers. The producer needs few, the consumers many.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 3 * 168, "registers of the block");

// Halves is 2 if even and odd rows of weight lie apart.
template <int Columns, int Stages, int Halves>
struct Shape {
    static constexpr int kRows = kWarpgroupRows, kColumns = Columns, kStages = Stages, kHalves = Halves;
    static constexpr int kOutputs = 2 * kHalves;  // neighbouring outputs of a lane
    static constexpr int kGroup = 4 * kOutputs;   // columns of four lanes
    static constexpr int kStageBytes = (kRows + kColumns) * static_cast<int>(kLineBytes);
    static_assert(kRows <= kMostBoxRows && kColumns / kHalves <= kMostBoxRows, "a box is one copy");
    static_assert(kColumns / kHalves % kGroup == 0, "whole groups, and halves that begin on 1024 bytes");

    struct Stage {
        uint8_t x[kRows][kLineBytes], weight[kHalves][kColumns / kHalves][kLineBytes];
    };
    static_assert(sizeof(Stage) == kStageBytes && kStageBytes % 1024 == 0, "swizzled lines repeat every 1024 bytes");
};

// The sums of the wide tile leave no registers for float64.
template <class As, WarpgroupTile tile>
constexpr int kTileOf =
    static_cast<int>(has_results(tile, std::is_same_v<typename As::Sum, double>) ? tile : WarpgroupTile::m128n128);

template <class As, WarpgroupTile tile>
using ShapeOf = Shape<kWarpgroupColumns[kTileOf<As, tile>], kWarpgroupStages[kTileOf<As, tile>],
                      sizeof(typename As::Out) <= 2 ? 2 : 1>;

// The epilogue's operands beside the products, of one consumer's tile.
template <class As, class Shape>
struct alignas(16) Margins {
    ChannelTile<As, Shape::kColumns> channels;
    int32_t columns[Shape::kColumns];  // of bits the set bits b of a column, of numbers k - 2 b
    int32_t rows[Shape::kRows];        // set bits of the rows of x
};

template <class As, class Shape>
struct Shared {
    typename Shape::Stage stages[Shape::kStages];
    Margins<As, Shape> margins[kConsumers];
    uint64_t full[Shape::kStages], empty[Shape::kStages], turn[kConsumers];
    bool wrong_form;
};

// Dynamic shared memory may begin at any multiple of 16 bytes, but swizzled lines need one of 1024.
constexpr int kAlignment = 1024;
template <class As, class Shape>
constexpr int kSharedBytes = sizeof(Shared<As, Shape>) + kAlignment;

struct Maps {
    CUtensorMap x, weight[2];  // of all rows of weight, or of the even and the odd ones
};

constexpr unsigned kTall = 16;  // tile rows of a band

// The first row and column of a tile. Blocks that run at the same time take bands of 16 tile rows, down each column:
// the nearer they are to a square, the fewer rows of x and weight they bring into L2.
struct Corner {
    int64_t row, column;
};

template <class Shape>
__device__ __forceinline__ Corner corner(unsigned tile, unsigned row_tiles, unsigned column_tiles) {
    const unsigned band = tile / (kTall * column_tiles), index = tile % (kTall * column_tiles);
    const unsigned left = row_tiles - band * kTall, height = left < kTall ? left : kTall;
    return {int64_t{band * kTall + index % height} * Shape::kRows, int64_t{index / height} * Shape::kColumns};
}

// Writes tiles for which there is no result. All threads of the block call it.
template <class As, class Shape>
__device__ __forceinline__ void write_no_tiles(const Product& product, unsigned row_tiles, unsigned column_tiles) {
    wait_for_kernel_before();
    for (unsigned tile = blockIdx.x; tile < row_tiles * column_tiles; tile += gridDim.x) {
        const Corner at = corner<Shape>(tile, row_tiles, column_tiles);
        write_no_result<As>(product, at.row, Shape::kRows, at.column, Shape::kColumns);
    }
}

#ifdef BITORCH_QLINEAR_WGMMA_SM90A

constexpr int kWarps = kWarpgroup / kWarp;
constexpr int kSteps = kWarpgroupStageBits / kInstructionBits;  // along k in a stage
constexpr int kStrips = kWarpgroupRows / kInstructionRows;      // instructions below each other in a tile

// A place in the ring of stages. Even and odd rounds have places of their own, so that a place tells the parity to wait
// for.
template <class Shape>
struct Ring {
    int place = 0;  // one number, because the consumers have no register to spare

    __device__ __forceinline__ uint32_t parity() const { return place >= Shape::kStages; }
    __device__ __forceinline__ int stage() const { return place - (place >= Shape::kStages ? Shape::kStages : 0); }
    // The stage of the place before.
    __device__ __forceinline__ int last() const { return (stage() == 0 ? Shape::kStages : stage()) - 1; }
    __device__ __forceinline__ void next() { place = place == 2 * Shape::kStages - 1 ? 0 : place + 1; }
    __device__ __forceinline__ void skip(int count) { place = (place + count) % (2 * Shape::kStages); }
};

// Copies the boxes of stage `index` of a tile to an empty stage of the ring: those of weight, that of x, or all of
// them. Those of weight come first.
template <bool Weight, bool X, class As, class Shape>
__device__ __forceinline__ void copy_boxes(const Maps& maps, int row, int column, int index, int to,
                                           Shared<As, Shape>& shared) {
    auto& stage = shared.stages[to];
    auto& full = shared.full[to];
    const int word = index * static_cast<int>(kLineWords);
    if constexpr (Weight) {
        arrive_and_expect(full, Shape::kStageBytes);
#pragma unroll
        for (int half = 0; half < Shape::kHalves; ++half) {
            copy_box(stage.weight[half], maps.weight[half], word, column, full);
        }
    }
    if constexpr (X) copy_box(stage.x, maps.x, word, row, full);
}

template <class As, class Shape>
__device__ __forceinline__ void produce(const Maps& maps, unsigned row_tiles, unsigned column_tiles, int stages,
                                        Shared<As, Shape>& shared) {
    Ring<Shape> ring;
    for (unsigned tile = blockIdx.x; tile < row_tiles * column_tiles; tile += gridDim.x) {
        const Corner at = corner<Shape>(tile, row_tiles, column_tiles);
        const int row = static_cast<int>(at.row), column = static_cast<int>(at.column / Shape::kHalves);
        int index = 0;
        if (tile == blockIdx.x) {
            // All stages are empty. They get their weights before x exists.
            const int early = stages < Shape::kStages ? stages : Shape::kStages;
#pragma unroll 1
            for (int i = 0; i < early; ++i) copy_boxes<true, false>(maps, row, column, i, i, shared);
            wait_for_kernel_before();
#pragma unroll 1
            for (; index < early; ++index) copy_boxes<false, true>(maps, row, column, index, index, shared);
            ring.skip(early);
        }
#pragma unroll 1
        for (; index < stages; ++index, ring.next()) {
            wait(shared.empty[ring.stage()], ring.parity() ^ 1);
            copy_boxes<true, true>(maps, row, column, index, ring.stage(), shared);
        }
    }
}

template <class As, class Shape>
__device__ __forceinline__ void load_margins(const Product& product, const Corner& at, int thread,
                                             Margins<As, Shape>& margins) {
    margins.channels.load(product.y, product.n, at.column, thread, kWarpgroup);
    for (int i = thread; i < Shape::kColumns; i += kWarpgroup) {
        const int64_t column = at.column + i;
        const int32_t count = column < product.n ? product.weight.popcounts[column] : 0;
        margins.columns[i] = kBits<As> ? count : static_cast<int32_t>(product.k - 2 * int64_t{count});
    }
    for (int i = thread; i < Shape::kRows; i += kWarpgroup) {
        const int64_t row = at.row + i;
        margins.rows[i] = row < product.m ? product.x.popcounts[row] : 0;
    }
}

template <class Shape>
using Sums = int32_t[kStrips][Shape::kColumns / 2];

// Returns which of a lane's sums of a strip is its output e in a group of columns, in the lane's first row; the sum two
// further on is that of its second row, 8 rows below.
template <class Shape>
__device__ __forceinline__ constexpr int sum_of(int group, int e) {
    return (e % Shape::kHalves * (Shape::kColumns / Shape::kHalves / 8) + group) * 4 + e / Shape::kHalves;
}

// Multiplies a tile, in the consumer's turn.
template <class As, class Shape>
__device__ __forceinline__ void multiply_tile(const Product& product, int stages, bool leads, uint64_t& my_turn,
                                              uint64_t& next_turn, uint32_t turn_parity, Ring<Shape>& ring,
                                              Shared<As, Shape>& shared, Sums<Shape>& sums) {
    // Multiplies 256 bits of a stage.
    const auto multiply_step = [&](uint64_t x, uint64_t weight, int step, bool accumulate) {
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
            const int bytes = step * kInstructionBits / 8;
            multiply_bits(sums[strip], advance(x, strip * kInstructionRows * kLineBytes + bytes),
                          advance(weight, bytes), accumulate);
        }
    };
    // Gives the stage before back to the producer, once its products are done. Those of one later group may be in
    // flight.
    const auto release_last = [&](int index) {
        if (index == 0) return;
        wait_for_products<1>();
        if (leads) arrive(shared.empty[ring.last()]);
    };
    wait(my_turn, turn_parity);
    const int rest = static_cast<int>((product.k + kInstructionBits - 1) / kInstructionBits) % kSteps;
    const int whole = stages - (rest != 0);
#pragma unroll 1
    for (int index = 0; index < whole; ++index) {
        const auto& stage = shared.stages[ring.stage()];
        const uint64_t x = describe(stage.x), weight = describe(stage.weight);
        wait(shared.full[ring.stage()], ring.parity());
        fence_products();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) multiply_step(x, weight, step, index != 0 || step != 0);
        commit_products();
        release_last(index);
        ring.next();
    }
    if (rest != 0) {
        const auto& stage = shared.stages[ring.stage()];
        const uint64_t x = describe(stage.x), weight = describe(stage.weight);
        wait(shared.full[ring.stage()], ring.parity());
        // Each step is a group. A group that ended behind the loop would cost one more instruction of the tensor cores.
        fence_products();
        multiply_step(x, weight, 0, whole != 0);
        commit_products();
        release_last(whole);
#pragma unroll 1
        for (int step = 1; step < rest; ++step) {
            fence_products();  // PTX needs none between such products, but ptxas would insert it and say so
            multiply_step(x, weight, step, true);
            commit_products();
        }
        ring.next();
    }
    // Products of the last stage are in flight, while the other consumer begins.
    if (leads) arrive(next_turn);
    wait_for_products<0>();
    if (leads) arrive(shared.empty[ring.last()]);
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) hold(sums[strip]);
}

// Returns how many of a tile's rows or columns exist, of which `left` and more are left.
__device__ __forceinline__ int existing(int64_t left, int size) { return left < size ? static_cast<int>(left) : size; }

// Stores a lane's outputs, of which `left` exist: all or none if they are vectors.
template <bool Vectors, class Out, int Count>
__device__ __forceinline__ void store(Out* to, const Out (&values)[Count], int left) {
    if constexpr (Vectors) {
        typename Bytes<sizeof values>::Type vector;
        memcpy(&vector, values, sizeof values);
        if (left > 0) __stcs(reinterpret_cast<decltype(vector)*>(to), vector);
    } else {
#pragma unroll
        for (int e = 0; e < Count; ++e) {
            if (e < left) to[e] = values[e];
        }
    }
}

// Reads neighbouring values from shared memory by one load.
template <class T, int Count>
__device__ __forceinline__ void read(const T* from, T (&to)[Count]) {
    const auto vector = *reinterpret_cast<const typename Bytes<sizeof to>::Type*>(from);
    memcpy(to, &vector, sizeof to);
}

// Writes a tile of numbers. Scale and bias take turns in the sums' own registers, because there are no others.
template <class As, class Shape, bool Vectors>
__device__ __forceinline__ void write_numbers(const Product& product, const Corner& at, int thread, Sums<Shape>& sums,
                                              const Margins<As, Shape>& margins) {
    using Out = typename As::Out;
    using Sum = typename As::Sum;
    constexpr int kOutputs = Shape::kOutputs, kGroup = Shape::kGroup;
    const int q = thread % 4, top = thread / kWarp * 16 + thread % kWarp / 4;
    const bool has_scale = product.y.scale.data, has_bias = product.y.bias.data;
    const int left = existing(product.n - at.column, Shape::kColumns) - kOutputs * q,
              height = existing(product.m - at.row, Shape::kRows) - top;
    Out* const out = static_cast<Out*>(product.y.data) + (at.row + top) * product.n + at.column + kOutputs * q;
    int32_t ones[kStrips][2];
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            ones[strip][half] = margins.rows[top + strip * kInstructionRows + 8 * half];
    }
#pragma unroll
    for (int group = 0; group < Shape::kColumns / kGroup; ++group) {
        const int column = group * kGroup + kOutputs * q;
        asm volatile("" ::: "memory");  // there are no registers for the margins of two groups
        // Calls change(sum, set bits of the row, e) for each of the lane's outputs in the group.
        const auto each = [&](auto change) {
#pragma unroll
            for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int e = 0; e < kOutputs; ++e) {
                        change(sums[strip][sum_of<Shape>(group, e) + 2 * half], ones[strip][half], e);
                    }
                }
            }
        };
        int32_t origin[kOutputs];
        read(margins.columns + column, origin);
        each([&](int32_t& sum, int32_t row, int e) {
            // k - 2 (a + b - 2 both), modulo 2^32 on its way
            const uint32_t dot =
                4 * static_cast<uint32_t>(sum) + static_cast<uint32_t>(origin[e]) - 2 * static_cast<uint32_t>(row);
            sum = static_cast<int32_t>(dot);
            if constexpr (std::is_same_v<Sum, float>) sum = __float_as_int(static_cast<float>(sum));
        });
        if constexpr (std::is_same_v<Sum, float>) {
            if (has_scale) {
                float factor[kOutputs];
                read(margins.channels.scale + column, factor);
                each([&](int32_t& v, int32_t, int e) { v = __float_as_int(multiply(__int_as_float(v), factor[e])); });
            }
            if (has_bias) {
                float summand[kOutputs];
                read(margins.channels.bias + column, summand);
                each([&](int32_t& v, int32_t, int e) { v = __float_as_int(add(__int_as_float(v), summand[e])); });
            }
        }
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = strip * kInstructionRows + 8 * half;
                Out values[kOutputs];
#pragma unroll
                for (int e = 0; e < kOutputs; e += 2) {
                    const int32_t first = sums[strip][sum_of<Shape>(group, e) + 2 * half],
                                  second = sums[strip][sum_of<Shape>(group, e + 1) + 2 * half];
                    if constexpr (std::is_same_v<Sum, float>) {
                        narrow_pair(__int_as_float(first), __int_as_float(second), values + e);
                    } else if constexpr (std::is_same_v<Sum, double>) {
                        const auto finish = [&](int32_t dot, int i) {
                            return add(multiply(static_cast<double>(dot), margins.channels.scale[column + i]),
                                       margins.channels.bias[column + i]);
                        };
                        values[e] = finish(first, e), values[e + 1] = finish(second, e + 1);
                    } else {
                        values[e] = first, values[e + 1] = second;
                    }
                }
                const int exist = row < height ? left - group * kGroup : 0;
                store<Vectors>(out + row * product.n + group * kGroup, values, exist);
            }
        }
    }
}

template <class As, class Shape>
__device__ __forceinline__ void write_tile(const Product& product, const Corner& at, int thread, bool whole_vectors,
                                           Sums<Shape>& sums, const Margins<As, Shape>& margins) {
    if (whole_vectors) {
        write_numbers<As, Shape, true>(product, at, thread, sums, margins);
    } else {
        write_numbers<As, Shape, false>(product, at, thread, sums, margins);
    }
}

// Writes a tile of bits: the lane has 4 neighbouring bits of each row in each group of 16 columns, so a byte of two
// groups is two quarters of a word. Four lanes exchange the bytes of four rows, after which each has the word of one
// row.
template <class Shape>
__device__ __forceinline__ void write_tile(const Product& product, const Corner& at, int thread, bool,
                                           Sums<Shape>& sums, const Margins<AsBits, Shape>& margins) {
    constexpr int kOutputs = Shape::kOutputs, kGroup = Shape::kGroup;
    static_assert(2 * kGroup == kWordBits && 2 * kStrips == 4, "a byte of each of a lane's four rows");
    const int q = thread % 4, top = thread / kWarp * 16 + thread % kWarp / 4;
    const int64_t mine = at.row + top + q / 2 * kInstructionRows + q % 2 * 8;  // the row whose words the lane stores
    const bool row_exists = mine < product.m;
    const int width = existing(product.n - at.column, Shape::kColumns);
    uint32_t* const out = static_cast<uint32_t*>(product.y.data) + mine * word_count(product.n) + at.column / kWordBits;
#pragma unroll
    for (int word = 0; word < Shape::kColumns / kWordBits; ++word) {
        uint32_t bytes = 0;
#pragma unroll
        for (int c = 0; c < 2 * kOutputs; ++c) {
            const int group = 2 * word + c / kOutputs, e = c % kOutputs, column = group * kGroup + kOutputs * q + e;
            const auto count = static_cast<uint32_t>(margins.columns[column]);
            const int32_t limit = margins.channels.limits[column];
#pragma unroll
            for (int row = 0; row < 4; ++row) {
                const auto both = static_cast<uint32_t>(sums[row / 2][sum_of<Shape>(group, e) + row % 2 * 2]);
                const auto ones = static_cast<uint32_t>(margins.rows[top + row / 2 * kInstructionRows + row % 2 * 8]);
                bytes |= uint32_t{within(count + ones - 2 * both, limit)} << (8 * row + c);
            }
        }
        bytes = transpose_bytes(bytes, q);
        // The low halves of the four bytes are the word's first 16 bits, the high halves its last ones.
        uint32_t low = bytes & 0x0F0F0F0F, high = bytes >> 4 & 0x0F0F0F0F;
        low |= low >> 4, high |= high >> 4;
        if (row_exists && word * kWordBits < width) {
            out[word] = __byte_perm(low, high, 0x6420) ^ margins.channels.flips[word];
        }
    }
}

template <class As, class Shape>
__device__ __forceinline__ void consume(const Product& product, unsigned row_tiles, unsigned column_tiles,
                                        bool whole_vectors, int stages, Shared<As, Shape>& shared) {
    // The compiler cannot know that a warp's lanes agree on it, unless they take it from one lane. What depends on it
    // then needs no registers of lanes: the loop has half as many instructions, none of which moves descriptors.
    const int which = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0) - 1, other = 1 - which;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const bool leads = thread % kWarp == 0;
    auto& margins = shared.margins[which];
    Ring<Shape> ring;
    ring.skip(which * stages);
    uint32_t turn_parity = which == 0;  // nobody gives the first consumer its first turn
    const unsigned step = kConsumers * gridDim.x;
    wait_for_kernel_before();  // it makes set bits; the producer waits for it before it copies x's words
    for (unsigned tile = blockIdx.x + gridDim.x * which; tile < row_tiles * column_tiles; tile += step) {
        const Corner at = corner<Shape>(tile, row_tiles, column_tiles);
        // The margins arrive while the other consumer multiplies.
        sync_warpgroup(1 + which);  // all have read those of the tile before
        load_margins<As, Shape>(product, at, thread, margins);
        sync_warpgroup(1 + which);
        Sums<Shape> sums;
        multiply_tile<As, Shape>(product, stages, leads, shared.turn[which], shared.turn[other], turn_parity, ring,
                                 shared, sums);
        turn_parity ^= 1;
        ring.skip(stages);  // the other's tile
        if constexpr (kBits<As>) {
            write_tile<Shape>(product, at, thread, whole_vectors, sums, margins);
        } else {
            write_tile<As, Shape>(product, at, thread, whole_vectors, sums, margins);
        }
    }
}

template <class As, class Shape>
__device__ __forceinline__ void run(const Product& product, const Maps& maps, unsigned row_tiles, unsigned column_tiles,
                                    bool whole_vectors) {
    extern __shared__ __align__(16) uint8_t memory[];
    const uint32_t past = shared_address(memory) % kAlignment;
    auto& shared = *reinterpret_cast<Shared<As, Shape>*>(memory + (past ? kAlignment - past : 0));
    const int stages = static_cast<int>((product.k + kWarpgroupStageBits - 1) / kWarpgroupStageBits);
    if (threadIdx.x == 0) {
        prefetch(maps.x), prefetch(maps.weight[0]), prefetch(maps.weight[Shape::kHalves - 1]);
#pragma unroll
        for (int stage = 0; stage < Shape::kStages; ++stage) {
            init_barrier(shared.full[stage], 1);
            init_barrier(shared.empty[stage], kWarps);
        }
#pragma unroll
        for (auto& turn : shared.turn) init_barrier(turn, kWarps);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // copies must find the barriers initialised
        shared.wrong_form = has_wrong_form(product);
    }
    __syncthreads();
    if (shared.wrong_form) return write_no_tiles<As, Shape>(product, row_tiles, column_tiles);
    if (threadIdx.x < kWarpgroup) {
        release_registers<kProducerRegisters>();
        if (threadIdx.x == 0) produce<As, Shape>(maps, row_tiles, column_tiles, stages, shared);
    } else {
        claim_registers<kConsumerRegisters>();
        consume<As, Shape>(product, row_tiles, column_tiles, whole_vectors, stages, shared);
    }
}

#endif

template <class As, class Shape>
__global__ void __launch_bounds__(kBlockThreads, 1)
    multiply_tiles(const Product product, const __grid_constant__ Maps maps, unsigned row_tiles, unsigned column_tiles,
                   bool whole_vectors) {
#ifdef BITORCH_QLINEAR_WGMMA_SM90A
    run<As, Shape>(product, maps, row_tiles, column_tiles, whole_vectors);
#else
    write_no_tiles<As, Shape>(product, row_tiles, column_tiles);  // instead of leaving y unwritten
#endif
}

// Makes the maps of x and of weight. If there are no odd rows, the even ones take their place and feed columns that do
// not exist.
template <class Shape>
cudaError_t make_maps(const Product& product, Maps* maps) {
    const int64_t width = aligned_words_for(product.k);
    const WordMatrix x = {product.x.words, product.m, width, product.x.stride};
    if (const auto error = encode(x, Shape::kRows, &maps->x); error != cudaSuccess) return error;
    for (int64_t half = 0; half < Shape::kHalves; ++half) {
        const int64_t first = half < product.n ? half : 0, stride = product.weight.stride;
        const WordMatrix weight = {product.weight.words + first * stride, ceil_div(product.n - first, Shape::kHalves),
                                   width, Shape::kHalves * stride};
        const auto error = encode(weight, Shape::kColumns / Shape::kHalves, &maps->weight[half]);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

// Returns whether every lane's outputs, which are so many, can be stored as a vector.
static inline bool rows_on_vectors(const Output& y, int64_t n, int64_t outputs) {
    const int64_t size = element_size(y.dtype), bytes = outputs * size;
    return reinterpret_cast<uintptr_t>(y.data) % bytes == 0 && n * size % bytes == 0;
}

template <class As, class Shape>
cudaError_t launch(const Product& product, cudaStream_t stream, bool starts_early) {
    int device = 0, multiprocessors = 0;
    auto error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    constexpr int kBytes = kSharedBytes<As, Shape>;
    static_assert(kBytes <= 227 * 1024, "shared memory of a block");
    void (*const kernel)(Product, Maps, unsigned, unsigned, bool) = multiply_tiles<As, Shape>;
    if (error != cudaSuccess) return cudaGetLastError();  // which clears the error, before others see it
    error = allow_shared_memory(kernel, kBytes);
    if (error != cudaSuccess) return error;
    Maps maps{};
    error = make_maps<Shape>(product, &maps);
    if (error != cudaSuccess) return error;
    const int64_t row_tiles = ceil_div(product.m, Shape::kRows), column_tiles = ceil_div(product.n, Shape::kColumns);
    if (row_tiles > INT32_MAX / column_tiles) return cudaErrorInvalidConfiguration;
    const int64_t blocks = std::min(row_tiles * column_tiles, int64_t{multiprocessors});
    return launch_kernel(kernel, blocks, kBlockThreads, kBytes, stream, starts_early, product, maps,
                         static_cast<unsigned>(row_tiles), static_cast<unsigned>(column_tiles),
                         rows_on_vectors(product.y, product.n, Shape::kOutputs));
}

template <WarpgroupTile tile>
cudaError_t launch(const Product& product, cudaStream_t stream, bool starts_early) {
    return with_output_type(product.y.dtype, [&](auto as) {
        using As = decltype(as);
        return launch<As, ShapeOf<As, tile>>(product, stream, starts_early);
    });
}

}  // namespace

cudaError_t gemm_wgmma_sm90a(const Product& product, WarpgroupTile tile, cudaStream_t stream, bool starts_early) {
    if (product.m == 0 || product.n == 0) return cudaSuccess;
    if (!are_aligned(product) || !have_popcounts(product)) return cudaErrorInvalidValue;
    if (product.k == 0) return gemm_popc(product, stream);  // a map cannot be empty
    if (product.m > kMostMapRows || product.n > kMostMapRows) return cudaErrorInvalidValue;
    switch (tile) {
        case WarpgroupTile::m128n192: return launch<WarpgroupTile::m128n192>(product, stream, starts_early);
        case WarpgroupTile::m128n128: return launch<WarpgroupTile::m128n128>(product, stream, starts_early);
    }
    return cudaErrorInvalidValue;
}

}  // namespace bitorch_qlinear::cuda
