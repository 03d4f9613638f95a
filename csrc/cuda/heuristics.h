// Which kernel computes a product, and with which tile. Host functions of the device's figures and the product's sizes
// alone: no CUDA header, no state, so that tests/test_heuristics.py asks them about devices that are not there.
//
//     rows of x      7.5         8.0 to 9.0         later, known or not
//     up to 4        skinny      skinny             skinny
//     5 to 16        skinny      skinny_mma_sm80    skinny
//     more           mma_sm75    mma_sm80           mma_int8_sm80
//
// popc, which runs everywhere, is what the others are tested against. n and k have no part in that; tiny products, which
// cost a launch by any kernel, are no case of their own. The tile of mma_sm80 is the one of least estimated time. What
// holds for all sizes:
//   - the kernel is legal, and with growing m none comes back that was left;
//   - for the tile, m and n count as numbers of 64 rows and columns, k as a number of stages, all rounded up;
//   - with growing k no tile comes back that was left; the least estimate never falls with growing m, n or k;
//   - it is 128 x 256 where such tiles leave nothing idle (m and n are their multiples, their number one of the
//     multiprocessors'; whole multiples of such sizes are such sizes too), and wherever m and n are 4096 or more and
//     there are 40 such tiles or more for each multiprocessor.
//
// Every rate and time here is an estimate, from data sheets, the CUDA C++ programming guide ("Arithmetic Instructions")
// and the machine code that nvcc emits: nothing was measured.
#pragma once

#include <algorithm>
#include <cstdint>
#ifndef __CUDACC__
#include <string>
#include <string_view>
#include <variant>
#endif

#include "../packed.h"

namespace bitorch_qlinear::cuda {

// ---- kernels --------------------------------------------------------------------------------------------------------

// Rows of x that a skinny kernel takes at most.
constexpr int64_t kSkinnyRows = 16;

enum class GemmKernel : int { popc, skinny, skinny_mma_sm80, mma_sm75, mma_sm80, mma_int8_sm80 };
constexpr int kGemmKernels = 6;

// A compute capability is one number here: 86 is 8.6, 120 is 12.0.
struct KernelRecord {
    GemmKernel kernel;
    const char* name;     // for BITORCH_QLINEAR_CUDA_KERNEL; the launcher is gemm_<name>
    int lowest, highest;  // compute capabilities that it runs on
    bool aligned;         // reads the aligned form of the words (kernels.h)
    bool popcounts;       // counts a & b, and so reads the set bits of each row
    int64_t most_rows;    // of x
};
constexpr int kNewest = INT32_MAX;
constexpr int64_t kAnyRows = INT64_MAX;

// mma_sm80: sm_90 has its BMMA still, sm_100 and sm_120 make eight IMMA on unpacked bytes of it. mma_int8_sm80 makes
// them in a better way; where there is BMMA it has an eighth of its rate, and is there to be tested. mma_sm75: on sm_90 an
// xor is no single instruction any more, and the kernel is left empty (mma.cuh).
constexpr KernelRecord kKernels[kGemmKernels] = {
    {GemmKernel::popc, "popc", 75, kNewest, false, false, kAnyRows},
    {GemmKernel::skinny, "skinny", 75, kNewest, true, false, kSkinnyRows},
    {GemmKernel::skinny_mma_sm80, "skinny_mma_sm80", 80, 90, true, true, kSkinnyRows},
    {GemmKernel::mma_sm75, "mma_sm75", 75, 89, true, false, kAnyRows},
    {GemmKernel::mma_sm80, "mma_sm80", 80, 90, true, true, kAnyRows},
    {GemmKernel::mma_int8_sm80, "mma_int8_sm80", 80, kNewest, true, true, kAnyRows},
};

static constexpr const KernelRecord& record(GemmKernel kernel) { return kKernels[static_cast<int>(kernel)]; }

static constexpr bool runs_on(const KernelRecord& kernel, int capability) {
    return kernel.lowest <= capability && capability <= kernel.highest;
}

// Whether any kernel runs there.
static constexpr bool supported(int capability) { return runs_on(record(GemmKernel::popc), capability); }

struct Gpu {
    int capability;
    int multiprocessors;
};

static constexpr bool legal(GemmKernel kernel, const Gpu& gpu, int64_t m) {
    return runs_on(record(kernel), gpu.capability) && m <= record(kernel).most_rows;
}

// ---- tiles of mma_sm80 ----------------------------------------------------------------------------------------------

// A block's part of y in gemm_mma_sm80, widest first.
enum class Tile : int { m128n256, m128n128, m64n64 };
constexpr int kTiles = 3;
constexpr int64_t kTileRows[kTiles] = {128, 128, 64}, kTileColumns[kTiles] = {256, 128, 64};

// The side of a warp's square, the blocks whose registers fit a multiprocessor, the bits of k of a stage, and the
// stages in shared memory. The kernel takes them from here.
constexpr int64_t kTileSide[kTiles] = {64, 64, 32}, kTileBlocks[kTiles] = {1, 2, 4};
constexpr int64_t kTileStageBits = 512, kTileStages = 4;

// That of gemm_mma_int8_sm80, whose instructions take so long that no tile is too small for the memory.
constexpr Tile kInt8Tile = Tile::m64n64;

// A multiprocessor with binary tensor cores; bytes and multiply-adds of bits are a clock's.
//   multiplies    8 times those of int8 in the data sheets of the A100, RTX 3090 and RTX 4090. An H100 makes of this
//                 instruction half an A100's, as its users report. 8.7 is taken for an 8.0.
//   l2_bytes      A100: 5120 among 108 (its white paper). The others, for which NVIDIA gives no figure: 5.5 TB/s among
//                 132 at 1.75 GHz, and from 2.2 (RTX 3090) to 5 TB/s (RTX 4090)
//   shared_bytes  what blocks may have in all (programming guide, "Technical Specifications per Compute Capability")
struct Multiprocessor {
    int64_t multiplies, l2_bytes, shared_bytes;
};

static constexpr Multiprocessor multiprocessor(int capability) {
    switch (capability) {
        case 80:
        case 87: return {16384, 47, 164 * 1024};
        case 90: return {8192, 24, 228 * 1024};
        default: return {8192, 16, 100 * 1024};
    }
}
constexpr int64_t kSharedBytesAClock = 128;
constexpr int64_t kReservedBytes = 1024;  // of shared memory, by the system, for each block

// From a block's start to its first multiply, and from its last to its end: the latencies of its first copies, of
// scale, bias and popcounts, and of its stores, about 700 clocks each. Blocks of one multiprocessor wait together.
constexpr double kClocksAround = 2000;

// A narrower tile must be estimated 1/16 faster than the next wider one: the estimate is no finer, and it moves more
// bytes. Without this, products that differ by one tile would change it all the time, for half a tile of many.
constexpr double kDoubt[kTiles] = {1, 17. / 16, 17. / 16 * 17 / 16};

constexpr const char* kTileReasons[kTiles] = {
    "tensor cores, by the tile that moves the fewest bytes",
    "tensor cores, by a narrower tile: the widest would leave multiprocessors idle, or more of it outside of y",
    "tensor cores, by the smallest tile: wider ones would leave multiprocessors idle, or more of them outside of y",
};

// Clocks for a stage of a tile: those of the slowest of tensor cores, L2 and shared memory, whose work overlaps. The
// three tiles, widest first, take 1024, 512, 192 on 8.0; 2048, 1024, 341 on 9.0; and 2048, 1024, 512 on 8.6 and 8.9,
// where the tensor cores alone would take 1/4 of the second for the third.
static constexpr double stage_clocks(Tile tile, const Multiprocessor& chip) {
    const int64_t i = static_cast<int64_t>(tile), outputs = kTileRows[i] * kTileColumns[i];
    const int64_t copied = (kTileRows[i] + kTileColumns[i]) * kTileStageBits / 8;
    const int64_t read = outputs * 2 / kTileSide[i] * kTileStageBits / 8;  // each warp its rows and its columns
    const auto clocks = [](int64_t work, int64_t rate) {
        return static_cast<double>(work) / static_cast<double>(rate);
    };
    return std::max({clocks(outputs * kTileStageBits, chip.multiplies), clocks(copied, chip.l2_bytes),
                     clocks(copied + read, kSharedBytesAClock)});
}

// Blocks that share a multiprocessor: of the widest tile 1, of the next 2 or (8.6, 8.9) 1, of the last 4 or 3.
static constexpr int64_t resident_blocks(Tile tile, const Multiprocessor& chip) {
    const int64_t i = static_cast<int64_t>(tile);
    const int64_t bytes = kTileStages * (kTileRows[i] + kTileColumns[i]) * kTileStageBits / 8 + kReservedBytes;
    return std::min(kTileBlocks[i], chip.shared_bytes / bytes);
}

// Estimated clocks of a product. Blocks that share a multiprocessor share its tensor cores and its part of L2 too, so
// it is the tiles of the busiest one that count; only the time around is one for all that it holds at once.
// As doubles: with k = 2^31 and m n = 2^40 the clocks pass an int64.
static inline double estimated_clocks(Tile tile, const Gpu& gpu, int64_t m, int64_t n, int64_t k) {
    const int64_t i = static_cast<int64_t>(tile);
    const Multiprocessor chip = multiprocessor(gpu.capability);
    const int64_t tiles = ceil_div(m, kTileRows[i]) * ceil_div(n, kTileColumns[i]);
    const int64_t of_one = ceil_div(tiles, std::max(gpu.multiprocessors, 1));
    const double rounds = static_cast<double>(ceil_div(of_one, resident_blocks(tile, chip)));
    const double stages = static_cast<double>(ceil_div(k, kTileStageBits));
    const double clocks = rounds * kClocksAround + static_cast<double>(of_one) * stages * stage_clocks(tile, chip);
    return clocks * kDoubt[i];
}

static inline Tile best_tile(const Gpu& gpu, int64_t m, int64_t n, int64_t k) {
    const auto faster = [&](Tile a, Tile b) {
        return estimated_clocks(a, gpu, m, n, k) < estimated_clocks(b, gpu, m, n, k);
    };
    return std::min({Tile::m128n256, Tile::m128n128, Tile::m64n64}, faster);
}

// ---- the choice -----------------------------------------------------------------------------------------------------

struct Choice {
    GemmKernel kernel;
    Tile tile;  // of mma_sm80; the other kernels have one of their own
    const char* reason;
};

// Rows that gemm_skinny counts while the weights are on their way from memory, on every chip that has another kernel
// for them. Its adders (gemm_skinny.cu) take about 10 / 64 clocks of a lane for 4 words: a multiprocessor counts 26
// words a clock, each for one of 1, 2, 4, 8 or 16 rows, there or not. Memory brings it 4.7 words on an H200 (4.3 TB/s
// among 132 at 1.75 GHz), 3 on an A100: 4 rows are 19 and 12, 8 rows 37 and 24. At 8192 x 8192, 16 rows would be 5.6 us
// of counting where memory needs 2.
//
// A tensor core's instruction takes 64 words by 16 rows in 4 clocks (H100; 2 on an A100): 16 words a clock whatever the
// rows. But it wants the set bits of each row, and for up to 4 rows three quarters of it are for nothing.
constexpr int64_t kCountedRows = 4;

// Where there are no such tensor cores, gemm_skinny is the best for all the rows that it takes. 7.5: a T4's memory
// brings 1.3 words a clock, 16 rows are 20. From 10.0 on: a B200's brings 7.3, so that 4 rows hardly keep up, and an RTX
// 5090's 1.1; but gemm_mma_int8_sm80 multiplies 64 rows, there or not: 1 clock for a word of weights (2 on a 12.0), where
// 16 rows of gemm_skinny take 0.6.
static inline Choice choose(const Gpu& gpu, int64_t m, int64_t n, int64_t k) {
    const auto takes = [&](GemmKernel kernel) { return legal(kernel, gpu, m); };
    const auto choice = [](GemmKernel kernel, const char* reason) { return Choice{kernel, Tile::m64n64, reason}; };
    if (m <= kCountedRows) {
        return choice(GemmKernel::skinny, "up to 4 rows are counted on CUDA cores while memory brings the weights");
    }
    if (takes(GemmKernel::skinny_mma_sm80)) {
        return choice(GemmKernel::skinny_mma_sm80, "tensor cores count up to 16 rows while memory brings the weights");
    }
    if (takes(GemmKernel::skinny)) {
        return choice(GemmKernel::skinny, "up to 16 rows, which a tile of more would leave mostly empty");
    }
    if (takes(GemmKernel::mma_sm80)) {
        const Tile tile = best_tile(gpu, m, n, k);
        return {GemmKernel::mma_sm80, tile, kTileReasons[static_cast<int>(tile)]};
    }
    if (takes(GemmKernel::mma_sm75)) return choice(GemmKernel::mma_sm75, "the tensor cores of compute capability 7.5");
    return choice(GemmKernel::mma_int8_sm80, "tensor cores of bytes: there are none of bits after 9.0");
}

// ---- the override ---------------------------------------------------------------------------------------------------

#ifndef __CUDACC__  // kernels need none of it, and strings would cost nvcc two seconds for each file and target

constexpr char kKernelVariable[] = "BITORCH_QLINEAR_CUDA_KERNEL";

// What was asked for, or in a sentence why there is none.
template <class T>
using OrError = std::variant<T, std::string>;

// "kernel, kernel": those that a compute capability has; "" where it has none.
static inline std::string kernel_names(int capability) {
    std::string names;
    for (const KernelRecord& kernel : kKernels) {
        if (!runs_on(kernel, capability)) continue;
        if (!names.empty()) names += ", ";
        names += kernel.name;
    }
    return names;
}

static inline std::string in_words(int capability) {
    return "compute capability " + std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// What the environment or a program forces; null, which is the automatic choice, for "".
static inline OrError<const KernelRecord*> find_kernel(std::string_view name) {
    if (name.empty()) return nullptr;
    std::string names;
    for (const KernelRecord& kernel : kKernels) {
        if (name == kernel.name) return &kernel;
        names += (names.empty() ? "" : ", ") + std::string(kernel.name);
    }
    return std::string(kKernelVariable) + ": expected one of " + names + ", got \"" + std::string(name) + "\"";
}

// The choice for a product where `forced`, or null, is the kernel of find_kernel. A device that lacks it is an error. A
// product of more rows than it takes is none, for a model has layers of many batch sizes: it gets the automatic choice.
static inline OrError<Choice> decide(const KernelRecord* forced, const Gpu& gpu, int64_t m, int64_t n, int64_t k) {
    if (!supported(gpu.capability)) {
        return in_words(gpu.capability) + " is not supported: the CUDA kernels need 7.5 or later";
    }
    if (!forced) return choose(gpu, m, n, k);
    if (!runs_on(*forced, gpu.capability)) {
        return std::string(kKernelVariable) + ": expected one of the kernels that " + in_words(gpu.capability) +
               " has (" + kernel_names(gpu.capability) + "), got \"" + forced->name + "\"";
    }
    if (!legal(forced->kernel, gpu, m)) {
        Choice choice = choose(gpu, m, n, k);
        choice.reason = "the automatic choice: the kernel that is forced takes at most 16 rows";
        return choice;
    }
    return Choice{forced->kernel, best_tile(gpu, m, n, k), "forced, by BITORCH_QLINEAR_CUDA_KERNEL or by the program"};
}

// In words.
static inline std::string describe(const Choice& choice) {
    std::string text = record(choice.kernel).name;
    if (choice.kernel == GemmKernel::mma_sm80) {
        const int i = static_cast<int>(choice.tile);
        text += " with tiles of " + std::to_string(kTileRows[i]) + " x " + std::to_string(kTileColumns[i]);
    }
    return text + ": " + choice.reason;
}

#endif

}  // namespace bitorch_qlinear::cuda
