// Which kernel computes a product, and with which tile. The functions depend only on the device's figures and the
// product's sizes, without a CUDA header or state, so that test_heuristics.py can ask about devices that the machine
// does not have.
//
//     rows of x      7.5         8.0 to 8.9         9.0                later, known or not
//     up to 4        skinny      skinny             skinny             skinny
//     5 to 16        skinny      skinny_mma_sm80    skinny_mma_sm80    skinny
//     17 to 64       mma_sm75    skinny_mma_sm80 or mma_sm80 (fragments_win)      mma_int8_sm80
//     more           mma_sm75    mma_sm80           mma_sm80           mma_int8_sm80
//     256 or more    mma_sm75    mma_sm80           wgmma_sm90a        mma_int8_sm80
//
// If x is real, no launch has to align the weights, and a block packs all of x in less time than the launch takes that
// is saved (fused_is_faster):
//
//     1              fused_skinny    fused_skinny             fused_skinny             fused_skinny
//     2 to 4         fused_skinny    fused_skinny_mma_sm80    fused_skinny_mma_sm80    fused_skinny
//     5 to 16        as above        fused_skinny_mma_sm80    fused_skinny_mma_sm80    as above
//
// On 9.0, fused_cluster_sm90 takes what is too much for a block and not too much for a cluster (cluster_is_faster).
//
// A device that runs code for an earlier one (records.h) has the kernels that both have, and takes its figures from
// itself. For code of 7.5 on 9.0 and later, popc is what remains for more than 16 rows: mma_sm75 would be emulated.
//
// popc runs everywhere, and the others are tested against it. If x is given as words, the kernel does not depend on n
// and k, because a tiny product costs a launch by any kernel; except that 17 to 64 rows have two kernels, and that
// mma_sm80 keeps products of few tiles (warpgroup_tiles.h). The tile of mma_sm80 is the one of least estimated time.
// For all sizes:
//   - the kernel is legal, and as m grows, a kernel that was abandoned is never chosen again (for x as words);
//   - the tile depends on m and n in units of 64 and on k in stages, all rounded up;
//   - as k grows, a tile that was abandoned is never chosen again; the least estimate never falls as m, n or k grows;
//   - the tile is 128 x 256 if such tiles leave nothing idle (m and n are their multiples, and their number is a
//     multiple of the number of multiprocessors), and whenever m and n are at least 4096 and there are at least 40 such
//     tiles for each multiprocessor.
//
// Every rate and time here that is not called measured is an estimate, from data sheets, the CUDA C++ programming guide
// ("Arithmetic Instructions") and the machine code that nvcc emits.
#pragma once

#include <algorithm>
#include <cstdint>
#ifndef __CUDACC__
#include <string>
#include <string_view>
#include <type_traits>
#endif

#include "../packed.h"
#include "records.h"
#include "warpgroup_tiles.h"

namespace bitorch_qlinear::cuda {

// ---- tiles of mma_sm80 ----------------------------------------------------------------------------------------------

// The part of y that a block of gemm_mma_sm80 computes, widest first.
enum class Tile : int { m128n256, m128n128, m64n64 };
constexpr int kTiles = 3;
constexpr int64_t kTileRows[kTiles] = {128, 128, 64}, kTileColumns[kTiles] = {256, 128, 64};

// The side of a warp's square, the blocks whose registers fit a multiprocessor, the bits of k of a stage, and the
// stages in shared memory. The kernel takes them from here.
constexpr int64_t kTileSide[kTiles] = {64, 64, 32}, kTileBlocks[kTiles] = {1, 2, 4};
constexpr int64_t kTileStageBits = 512, kTileStages = 4;

// The tile of gemm_mma_int8_sm80, whose instructions take so long that memory keeps up with the smallest tile.
constexpr Tile kInt8Tile = Tile::m64n64;

// A multiprocessor with binary tensor cores, by its rates per clock.
//   multiplies    multiply-adds of bits: 8 times those of int8 in the data sheets of the A100, RTX 3090 and RTX 4090.
//                 An H100 reaches half an A100's rate with this instruction, as its users report. (An H200 reaches
//                 19,600 if it does nothing else, but the kernel 7,200 at 8192 x 8192 x 8192.) 8.7 is taken to be an
//                 8.0.
//   l2_bytes      bytes from L2: an A100 has 5120 for 108 multiprocessors (its white paper). NVIDIA gives no figure for
//                 the others: an H100 is taken to have 5.5 TB/s for 132 at 1.75 GHz, an RTX 3090 2.2 TB/s and an RTX
//                 4090 5
//   shared_bytes  shared memory of all its blocks (programming guide, "Technical Specifications per Compute
//                 Capability")
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
constexpr int64_t kReservedBytes = 1024;  // shared memory that the system takes for each block

// The clocks from a block's start to its first multiply and from its last to its end: the latencies of its first
// copies, of scale, bias and popcounts, and of its stores, about 700 clocks each.
//
// Blocks on one multiprocessor are taken to wait together, as they do at their start. Later they drift apart, and one
// multiplies while another waits: the estimate for 128 x 128 may be too high, by up to 2000 clocks of every 18,000 at
// k = 4096. With that, 4096 x 4096 outputs on an H200 would get 128 x 128 instead of 128 x 256. The assumption stays,
// because all that was measured on an H200 was measured with the tiles that it chooses, and because blocks alone on a
// multiprocessor were slower than estimated, too: 512 x 4096 x 4096 took 11.6 us, some 2.5 of them for
// counting bits before it, in 128 blocks of 128 x 128, which are estimated at 6. BITORCH_QLINEAR_CUDA_TILE forces a
// tile, to measure the others.
constexpr double kClocksAround = 2000;

// A narrower tile must be estimated 1/16 faster than the next wider one, because the estimate is no finer than that and
// a narrower tile moves more bytes. Otherwise the choice would alternate between products that differ by one tile.
constexpr double kDoubt[kTiles] = {1, 17. / 16, 17. / 16 * 17 / 16};

constexpr const char* kTileReasons[kTiles] = {
    "tensor cores, by the tile that moves the fewest bytes",
    "tensor cores, by a narrower tile: the widest would leave multiprocessors idle, or more of it outside of y",
    "tensor cores, by the smallest tile: wider ones would leave multiprocessors idle, or more of them outside of y",
};

// Returns the clocks that work takes at a rate of so much a clock.
static constexpr double clocks_for(int64_t work, int64_t rate) {
    return static_cast<double>(work) / static_cast<double>(rate);
}

// Returns the clocks for a stage of a tile: those of the slowest of tensor cores, L2 and shared memory, whose work
// overlaps. The three tiles, widest first, take 1024, 512, 192 on 8.0; 2048, 1024, 341 on 9.0; and 2048, 1024, 512 on
// 8.6 and 8.9, where the tensor cores alone would need 256 for the third. L2 brings only rows of x that exist; `rows`
// is their number.
static constexpr double stage_clocks(Tile tile, const Multiprocessor& chip, int64_t rows = kAnyRows) {
    const int64_t i = static_cast<int64_t>(tile), outputs = kTileRows[i] * kTileColumns[i];
    const int64_t brought = (std::min(rows, kTileRows[i]) + kTileColumns[i]) * kTileStageBits / 8;
    const int64_t copied = (kTileRows[i] + kTileColumns[i]) * kTileStageBits / 8;
    const int64_t read = outputs * 2 / kTileSide[i] * kTileStageBits / 8;  // each warp its rows and its columns
    return std::max({clocks_for(outputs * kTileStageBits, chip.multiplies), clocks_for(brought, chip.l2_bytes),
                     clocks_for(copied + read, kSharedBytesAClock)});
}

// Returns how many blocks share a multiprocessor: 1 of the widest tile, 2 (on 8.6 and 8.9: 1) of the next, 4 (3) of the
// last.
static constexpr int64_t resident_blocks(Tile tile, const Multiprocessor& chip) {
    const int64_t i = static_cast<int64_t>(tile);
    const int64_t bytes = kTileStages * (kTileRows[i] + kTileColumns[i]) * kTileStageBits / 8 + kReservedBytes;
    return std::min(kTileBlocks[i], chip.shared_bytes / bytes);
}

// Estimates the clocks of a product. Blocks that share a multiprocessor also share its tensor cores and its part of L2,
// so the number of tiles of the busiest multiprocessor counts; only kClocksAround passes once for all that it holds at
// a time. The result is a double, because with k = 2^31 and m n = 2^40 the clocks exceed an int64. `rows` is that of
// stage_clocks: m for one row of tiles, and by default all of a tile's, so that the choice of a tile depends on m in
// units of 64.
static inline double estimated_clocks(Tile tile, const Gpu& gpu, int64_t m, int64_t n, int64_t k,
                                      int64_t rows = kAnyRows) {
    const int64_t i = static_cast<int64_t>(tile);
    const Multiprocessor chip = multiprocessor(gpu.capability);
    const int64_t tiles = ceil_div(m, kTileRows[i]) * ceil_div(n, kTileColumns[i]);
    const int64_t of_one = ceil_div(tiles, std::max(gpu.multiprocessors, 1));
    const double rounds = static_cast<double>(ceil_div(of_one, resident_blocks(tile, chip)));
    const double stages = static_cast<double>(ceil_div(k, kTileStageBits));
    const double clocks =
        rounds * kClocksAround + static_cast<double>(of_one) * stages * stage_clocks(tile, chip, rows);
    return clocks * kDoubt[i];
}

static inline Tile best_tile(const Gpu& gpu, int64_t m, int64_t n, int64_t k) {
    const auto faster = [&](Tile a, Tile b) {
        return estimated_clocks(a, gpu, m, n, k) < estimated_clocks(b, gpu, m, n, k);
    };
    return std::min({Tile::m128n256, Tile::m128n128, Tile::m64n64}, faster);
}

// ---- 17 to 64 rows --------------------------------------------------------------------------------------------------

// A block of skinny_mma_sm80 multiplies all rows of x by this many columns, so 4096 columns are 128 blocks, and 64 of
// mma_sm80's smallest tile. But each block brings all of x from L2, m k / 8 bytes: with 64 rows twice as much as its
// weights, so that both are 1.5 times what the tiles of mma_sm80 bring. skinny_mma_sm80 is for few columns, where that
// costs less than multiprocessors that are idle, and for words of x that a launch would have to count for mma_sm80.
constexpr int64_t kFragmentColumns = 32;

// How much less time skinny_mma_sm80 takes than the difference of the estimates says, because it has twice the bytes in
// flight. On an H200, 16 rows by both kernels, which read popcounts then, took 5.07 us and 6.60 at 4096 x 4096,
// and 6.64 and 8.76 at 8192 x 8192. The estimates, without the adding of sums, differ by 0.4 us and by nothing. That
// leaves 1.1 to 2.1 us, and the lesser is taken to hold for more rows.
constexpr double kClocksLess = 2000;

// The launch that counts the set bits of x, by the time of pack's (kMicrosOfPack) at 1.75 GHz, and what a product hides
// of it if it starts early (kMicrosHidden).
constexpr double kClocksOfCount = 2800, kClocksHidden = 1400;

// Estimates the clocks of a product of 17 to 64 rows by skinny_mma_sm80, as estimated_clocks does, but without a doubt.
// Beside tensor cores and L2, the counting of set bits bounds a stage: 16 words a clock, of the rows of x and of the
// columns. At its end each of at least 4 warps adds its sums to those in shared memory, which are then read: 32 sums
// are added in 2 clocks and read in one.
static inline double estimated_fragment_clocks(const Gpu& gpu, int64_t m, int64_t n, int64_t k) {
    const Multiprocessor chip = multiprocessor(gpu.capability);
    const int64_t rows = m <= kFragmentRows / 2 ? kFragmentRows / 2 : kFragmentRows;
    const int64_t residents = rows == kFragmentRows ? 2 : 3;  // blocks of 4 warps whose registers fit a multiprocessor
    const int64_t of_one = ceil_div(ceil_div(n, kFragmentColumns), std::max(gpu.multiprocessors, 1));
    const double stage = std::max({clocks_for(rows * kFragmentColumns * kTileStageBits, chip.multiplies),
                                   clocks_for((m + kFragmentColumns) * kTileStageBits / 8, chip.l2_bytes),
                                   clocks_for((rows + kFragmentColumns) * kTileStageBits / kWordBits, 16)});
    const double of_block = static_cast<double>(ceil_div(k, kTileStageBits)) * stage +
                            clocks_for(rows * kFragmentColumns * (2 * 4 + 1), 32);
    return static_cast<double>(ceil_div(of_one, residents)) * kClocksAround + static_cast<double>(of_one) * of_block;
}

// Estimates the clocks of the same product by mma_sm80, whose tiles bring only rows of x that exist: without that, 17
// rows would be estimated to bring as many bytes as 64.
static inline double estimated_tile_clocks(const Gpu& gpu, int64_t m, int64_t n, int64_t k) {
    const Tile tile = best_tile(gpu, m, n, k);
    return estimated_clocks(tile, gpu, m, n, k, m) / kDoubt[static_cast<int>(tile)];
}

// Returns whether skinny_mma_sm80 is estimated to be faster than mma_sm80. `words` says that x is given as words, whose
// set bits a launch would count for mma_sm80, unless a launch has to align them anyway. (In linear_train the launch
// that packs x would count them for nothing. It is not distinguished.)
static inline bool fragments_win(const Gpu& gpu, int64_t m, int64_t n, int64_t k, bool words) {
    const double count = kClocksOfCount - (launches_depend(gpu) ? kClocksHidden : 0);
    const double counted = words && !prepared_holds_words(k) ? count : 0;
    const double tiles = estimated_tile_clocks(gpu, m, n, k);
    return estimated_fragment_clocks(gpu, m, n, k) < tiles + kClocksLess + counted;
}

// ---- the choice -----------------------------------------------------------------------------------------------------

struct Choice {
    GemmKernel kernel;
    Tile tile;  // for mma_sm80; the other kernels except wgmma_sm90a have fixed tiles
    const char* reason;
    WarpgroupTile warpgroup_tile = WarpgroupTile::m128n128;  // for wgmma_sm90a
};

// gemm_skinny counts up to kCountedRows rows while the weights arrive from memory, on every chip that has another
// kernel for them. Its adders (gemm_skinny.cu) take about 10 / 64 clocks of a lane for 4 words, so a multiprocessor
// counts 26 words per clock, each for one of 1, 2, 4, 8 or 16 rows (a smaller number is rounded up to one of these).
// Memory brings it 4.7 words per clock on an H200 (4.3 TB/s for 132 at 1.75 GHz) and 3 on an A100, which for 4 rows are
// 19 and 12 words to count, for 8 rows 37 and 24. At 8192 x 8192, 16 rows would take 5.6 us to count, while memory
// needs 2.
//
// A tensor core's instruction takes 64 words by 16 rows in 4 clocks (H100; 2 on an A100): 16 words per clock for any
// number of rows. But it needs the set bits of each row, and with up to 4 rows three quarters of its work are wasted.

// What a launch of its own for packing x costs, and how long a block takes to pack x instead.
//   kMicrosOfPack       measured on an H200 in a CUDA graph: 1.6 us for one row of 4096 values, 1.9 for one of 8192
//   kMicrosHidden       the part of it that the product's launch hides if it depends on pack's (launch.cuh)
//   kPackedBytesAMicro  of x, from the instructions of gemm_fused_skinny.cu: 28 bytes a clock at 1.75 GHz
constexpr double kMicrosOfPack = 1.6, kMicrosHidden = 0.8, kPackedBytesAMicro = 49e3;

// If a launch has to align the weights, a fused kernel saves none. That launch packs x as well, in blocks beside those
// that align, and an H200's memory brings x to it at 4.3e6 bytes a microsecond. So each byte of x costs a block's own
// packing 88 times as much, and a cluster's 11 times, and no x is small enough. The kernel behind the launch starts as
// usual in both ways, because it reads the aligned words first.

// Returns whether a fused kernel is faster than a launch that packs x and one that multiplies: up to 39 KB of x on 9.0,
// and 78 KB on others. (For 2 to 4 rows at 8192 x 8192 the product on tensor cores is also faster than gemm_skinny's,
// by about 1 us, measured without the counting of bits. The bound leaves that out.)
static inline bool fused_is_faster(const Gpu& gpu, int64_t m, int64_t k, int64_t value_bytes) {
    const double saved = kMicrosOfPack - (launches_depend(gpu) ? kMicrosHidden : 0);
    return static_cast<double>(m * k * value_bytes) <= saved * kPackedBytesAMicro;
}

// The time that a cluster costs beside packing: words and a barrier go from one multiprocessor to others, and 4 of 132
// multiprocessors are in no cluster (gemm_fused_cluster_sm90.cu).
constexpr double kMicrosOfCluster = 0.3;

// Returns whether fused_cluster_sm90, whose blocks pack an eighth of x each, is faster than two launches: up to 196 KB
// of x. By the same figures it is faster than a block alone from 17 KB on, by up to 0.4 us, but nobody has measured
// what a launch of clusters costs; so blocks alone keep what they pack in time.
static inline bool cluster_is_faster(const Gpu& gpu, int64_t m, int64_t k, int64_t value_bytes) {
    const double saved = kMicrosOfPack - kMicrosHidden - kMicrosOfCluster;
    return gpu.multiprocessors >= kClusterBlocks &&
           static_cast<double>(m * k * value_bytes) <= saved * kPackedBytesAMicro * kClusterBlocks;
}

// Returns the automatic choice for real x with values of so many bytes, or 0 if x is given as words, or if its words
// are a result too; `float64` tells whether y is float64, and `aligns` whether a launch has to align the weights: if k
// is no multiple of 128, those without a form, and otherwise those whose words do not start on 16 bytes. Without binary
// tensor cores gemm_skinny is best for all the rows that it takes. On 7.5, a T4's memory brings 1.3 words per clock,
// which for 16 rows are 20 to count. From 10.0 on, a B200's memory brings 7.3, so that 4 rows hardly keep up, and an
// RTX 5090's 1.1; but gemm_mma_int8_sm80 always multiplies 64 rows, in 1 clock for a word of weights (2 on 12.0), while
// 16 rows of gemm_skinny take 0.6.
static inline Choice choose(const Gpu& gpu, int64_t m, int64_t n, int64_t k, int64_t value_bytes = 0,
                            bool float64 = false, bool aligns = false) {
    const auto takes = [&](GemmKernel kernel) { return legal(kernel, gpu, m, k, value_bytes); };
    const auto choice = [](GemmKernel kernel, const char* reason) { return Choice{kernel, Tile::m64n64, reason}; };
    const bool on_tensor_cores = m > 1 && takes(GemmKernel::fused_skinny_mma_sm80);
    if (!aligns && (on_tensor_cores || takes(GemmKernel::fused_skinny)) && fused_is_faster(gpu, m, k, value_bytes)) {
        if (on_tensor_cores) {
            return choice(GemmKernel::fused_skinny_mma_sm80, "one launch that packs x and multiplies on tensor cores");
        }
        return choice(GemmKernel::fused_skinny, "one launch that packs x and multiplies on CUDA cores");
    }
    if (!aligns && takes(GemmKernel::fused_cluster_sm90) && cluster_is_faster(gpu, m, k, value_bytes)) {
        return choice(GemmKernel::fused_cluster_sm90, "one launch, in which the blocks of a cluster pack x together");
    }
    if (m <= kCountedRows) {
        return choice(GemmKernel::skinny, "up to 4 rows are counted on CUDA cores while memory brings the weights");
    }
    if (m <= kSkinnyRows && takes(GemmKernel::skinny_mma_sm80)) {
        return choice(GemmKernel::skinny_mma_sm80, "tensor cores count up to 16 rows while memory brings the weights");
    }
    if (takes(GemmKernel::skinny)) {
        return choice(GemmKernel::skinny, "up to 16 rows, which a tile of more would leave mostly empty");
    }
    if (takes(GemmKernel::skinny_mma_sm80) && fragments_win(gpu, m, n, k, value_bytes == 0)) {
        return choice(GemmKernel::skinny_mma_sm80, "tensor cores by narrow blocks, which count set bits themselves");
    }
    if (takes(GemmKernel::wgmma_sm90a) && warpgroups_win(gpu.multiprocessors, m, n, k)) {
        return {GemmKernel::wgmma_sm90a, best_tile(gpu, m, n, k),
                "tensor cores of warpgroups, from 256 rows on if there are many tiles or long rows",
                best_warpgroup_tile(gpu.multiprocessors, m, n, k, float64)};
    }
    if (takes(GemmKernel::mma_sm80)) {
        const Tile tile = best_tile(gpu, m, n, k);
        return {GemmKernel::mma_sm80, tile, kTileReasons[static_cast<int>(tile)]};
    }
    if (takes(GemmKernel::mma_sm75)) return choice(GemmKernel::mma_sm75, "the tensor cores of compute capability 7.5");
    if (takes(GemmKernel::mma_int8_sm80)) {
        return choice(GemmKernel::mma_int8_sm80, "tensor cores of bytes: there are none of bits after 9.0");
    }
    return choice(GemmKernel::popc, "CUDA cores: the code was compiled for a compute capability before the device's");
}

// ---- the override ---------------------------------------------------------------------------------------------------

#ifndef __CUDACC__  // kernels do not need strings, which would cost nvcc two seconds for each file and target

// Returns the choice for a product; `forced` is find_kernel's record, or null. A device that lacks the forced kernel is
// an error. A product that the kernel does not take gets the automatic choice, because the layers of a model multiply
// different numbers of rows.
static inline OrError<Choice> decide(const KernelRecord* forced, const Gpu& gpu, int64_t m, int64_t n, int64_t k,
                                     int64_t value_bytes = 0, bool float64 = false, bool aligns = false) {
    if (!supported(gpu.capability)) {
        return in_words(gpu.capability) + " is not supported: the CUDA kernels need 7.5 or later";
    }
    if (!forced) return choose(gpu, m, n, k, value_bytes, float64, aligns);
    if (!runs_on(*forced, gpu)) {
        return std::string(kKernelVariable) + ": expected one of the kernels that " + in_words(gpu) + " has (" +
               kernel_names(gpu) + "), got \"" + forced->name + "\"";
    }
    const bool too_wide = forced->kernel == GemmKernel::wgmma_sm90a && n > kMostWarpgroupRows;  // rows of the weights
    if (too_wide || !legal(forced->kernel, gpu, m, k, value_bytes)) {
        Choice choice = choose(gpu, m, n, k, value_bytes, float64, aligns);
        choice.reason = forced->fused ? "the automatic choice: the kernel that is forced takes few values of real x"
                        : forced->most_rows == kSkinnyRows
                            ? "the automatic choice: the kernel that is forced takes at most 16 rows"
                        : forced->most_rows == kFragmentRows
                            ? "the automatic choice: the kernel that is forced takes at most 64 rows"
                            : "the automatic choice: the kernel that is forced takes at most 2147483647 rows";
        return choice;
    }
    return Choice{forced->kernel, best_tile(gpu, m, n, k), "forced, by BITORCH_QLINEAR_CUDA_KERNEL or by the program",
                  best_warpgroup_tile(gpu.multiprocessors, m, n, k, float64)};
}

constexpr char kTileVariable[] = "BITORCH_QLINEAR_CUDA_TILE";

// The rows and columns of a tile; 0 rows stand for no tile.
struct TileSize {
    int16_t rows, columns;
};

// The tiles of mma_sm80 and of wgmma_sm90a; 128 x 128 is one of both.
constexpr TileSize kTileSizes[] = {{128, 256}, {128, 192}, {128, 128}, {64, 64}};

static inline std::string tile_name(const TileSize& size) {
    return std::to_string(size.rows) + "x" + std::to_string(size.columns);
}

// Returns the size that has the name, such as "128x256", or none for "", which is the automatic choice.
static inline OrError<TileSize> find_tile(std::string_view name) {
    if (name.empty()) return TileSize{};
    std::string names;
    for (const TileSize& size : kTileSizes) {
        if (name == tile_name(size)) return size;
        names += (names.empty() ? "" : ", ") + tile_name(size);
    }
    return std::string(kTileVariable) + ": expected one of " + names + ", got \"" + std::string(name) + "\"";
}

constexpr char kEarlyVariable[] = "BITORCH_QLINEAR_CUDA_EARLY_START";

// Returns whether products may start early: not if the value is "0".
static inline OrError<bool> find_early(std::string_view value) {
    if (value.empty() || value == "1") return true;
    if (value == "0") return false;
    return std::string(kEarlyVariable) + ": expected 0 or 1, got \"" + std::string(value) + "\"";
}

// Returns the choice with the forced tile, if there is one and the kernel has it for such results.
static inline Choice with_tile(Choice choice, const TileSize& forced, bool float64 = false) {
    bool found = false;
    const auto take = [&](int64_t rows, int64_t columns, auto& tile, int index) {
        if (rows != forced.rows || columns != forced.columns) return;
        tile = static_cast<std::decay_t<decltype(tile)>>(index), found = true;
    };
    if (choice.kernel == GemmKernel::mma_sm80) {
        for (int i = 0; i < kTiles; ++i) take(kTileRows[i], kTileColumns[i], choice.tile, i);
    } else if (choice.kernel == GemmKernel::wgmma_sm90a) {
        for (int i = 0; i < kWarpgroupTiles; ++i) {
            if (!has_results(static_cast<WarpgroupTile>(i), float64)) continue;
            take(kWarpgroupRows, kWarpgroupColumns[i], choice.warpgroup_tile, i);
        }
    }
    if (found) choice.reason = "the tile is forced, by BITORCH_QLINEAR_CUDA_TILE or by the program";
    return choice;
}

// Describes the choice in words.
static inline std::string describe(const Choice& choice) {
    std::string text = record(choice.kernel).name;
    if (choice.kernel == GemmKernel::mma_sm80) {
        const int i = static_cast<int>(choice.tile);
        text += " with tiles of " + std::to_string(kTileRows[i]) + " x " + std::to_string(kTileColumns[i]);
    }
    if (choice.kernel == GemmKernel::wgmma_sm90a) {
        const int64_t columns = kWarpgroupColumns[static_cast<int>(choice.warpgroup_tile)];
        text += " with tiles of " + std::to_string(kWarpgroupRows) + " x " + std::to_string(columns);
    }
    return text + ": " + choice.reason;
}

#endif

}  // namespace bitorch_qlinear::cuda
