// The records of the CUDA kernels: names, devices and operands. Plain C++ without a CUDA header, which tests compile
// too.
#pragma once

#include <algorithm>
#include <cstdint>
#ifndef __CUDACC__
#include <string>
#include <string_view>
#include <variant>
#endif

#include "prepared.h"
#include "warpgroup_tiles.h"

namespace bitorch_qlinear::cuda {

// The most rows of x that a skinny kernel takes. skinny_mma_sm80 takes more, as several fragments of an instruction.
constexpr int64_t kSkinnyRows = 16, kFragmentRows = 64;

// The most rows that are counted on CUDA cores if another kernel exists for more (heuristics.h).
constexpr int64_t kCountedRows = 4;

// The most values of x, with rows rounded up to the aligned form's, that a block of a fused kernel has place for: 16
// KB of words.
constexpr int64_t kFusedValues = 131072;

// The blocks of a cluster of fused_cluster_sm90: as many as every whole GPU of 9.0 has room for.
constexpr int64_t kClusterBlocks = 8;

enum class GemmKernel : int {
    popc,
    skinny,
    skinny_mma_sm80,
    mma_sm75,
    mma_sm80,
    mma_int8_sm80,
    wgmma_sm90a,
    fused_skinny,
    fused_skinny_mma_sm80,
    fused_cluster_sm90
};
constexpr int kGemmKernels = 10;

// A kernel and the devices and operands that it takes. A compute capability is one number here: 86 is 8.6, 120 is 12.0.
struct KernelRecord {
    GemmKernel kernel;
    const char* name;     // for BITORCH_QLINEAR_CUDA_KERNEL; the launcher is gemm_<name>
    int lowest, highest;  // compute capabilities that it runs on
    bool aligned;         // reads the aligned form of the words (kernels.h)
    bool popcounts;       // reads the set bits of each row, because it counts a & b and does not count them itself
    int64_t most_rows;    // of x
    bool fused = false;   // takes real x, at most kFusedValues of them, and packs them itself
};
constexpr int kNewest = INT32_MAX;
constexpr int64_t kAnyRows = INT64_MAX;

// wgmma_sm90a has code for sm_90a alone, where the "a" means that no other device runs it, not even a later one. A
// build whose chosen targets lack it, or have plain 9.0 too (setup.py), has the kernel for no device. In all others,
// code for 9.0 is that of 9.0a.
#ifdef BITORCH_QLINEAR_WITHOUT_SM90A
constexpr int kHopper = 0;
#else
constexpr int kHopper = 90;
#endif

// mma_sm80 stops at 9.0: sm_90 still has the BMMA instruction, but for sm_100 and sm_120 nvcc emulates it by eight IMMA
// on unpacked bytes. mma_int8_sm80 unpacks in a better way; on devices with BMMA it has an eighth of mma_sm80's rate
// and exists for tests. mma_sm75 stops before 9.0, where xor is no longer a single instruction (mma.cuh).
// fused_cluster_sm90 is for 9.0 alone: earlier devices have no clusters, and later ones no tensor cores for bits.
constexpr KernelRecord kKernels[kGemmKernels] = {
    {GemmKernel::popc, "popc", 75, kNewest, false, false, kAnyRows},
    {GemmKernel::skinny, "skinny", 75, kNewest, true, false, kSkinnyRows},
    {GemmKernel::skinny_mma_sm80, "skinny_mma_sm80", 80, 90, true, false, kFragmentRows},
    {GemmKernel::mma_sm75, "mma_sm75", 75, 89, true, false, kAnyRows},
    {GemmKernel::mma_sm80, "mma_sm80", 80, 90, true, true, kAnyRows},
    {GemmKernel::mma_int8_sm80, "mma_int8_sm80", 80, kNewest, true, true, kAnyRows},
    {GemmKernel::wgmma_sm90a, "wgmma_sm90a", kHopper, kHopper, true, true, kMostWarpgroupRows},
    {GemmKernel::fused_skinny, "fused_skinny", 75, kNewest, true, false, kCountedRows, true},
    {GemmKernel::fused_skinny_mma_sm80, "fused_skinny_mma_sm80", 80, 90, true, false, kSkinnyRows, true},
    {GemmKernel::fused_cluster_sm90, "fused_cluster_sm90", 90, 90, true, false, kSkinnyRows, true},
};

static constexpr const KernelRecord& record(GemmKernel kernel) { return kKernels[static_cast<int>(kernel)]; }

static constexpr bool runs_on(const KernelRecord& kernel, int capability) {
    return kernel.lowest <= capability && capability <= kernel.highest;
}

// Returns whether any kernel runs on it.
static constexpr bool supported(int capability) { return runs_on(record(GemmKernel::popc), capability); }

// The properties of a device on which the choice of a kernel depends.
//   capability   what the device has: its rates, its memory and its instructions
//   code         the compute capability that the code was compiled for which the device runs. It is lower than the
//                device's if the code is that of another device of the family (8.0 on 8.7), or PTX, which the driver
//                compiles: kernels that need a later one were left empty in it. kNewest stands for code of the device.
//   early        whether products may start early if the device can (BITORCH_QLINEAR_CUDA_EARLY_START)
struct Gpu {
    int capability;
    int multiprocessors;
    int code = kNewest;
    bool early = true;
};

// Returns whether a kernel runs on the device in the code that the device runs. The code decides what a kernel was
// compiled to, and the device which instructions are more than emulated: 11.0 runs PTX of 8.0, whose products of bits
// the driver replaces by eight of bytes.
static constexpr bool runs_on(const KernelRecord& kernel, const Gpu& gpu) {
    return runs_on(kernel, gpu.capability) && runs_on(kernel, std::min(gpu.capability, gpu.code));
}

// Returns whether a product may be launched before the kernel that makes its x has ended (launch.cuh). Code for 9.0
// alone waits for that kernel. 10.0 and later have this too, but captures into graphs have been seen to fail on 12.0
// (sglang, pull request 18596).
static constexpr bool launches_depend(const Gpu& gpu) { return gpu.capability == 90 && gpu.code >= 90 && gpu.early; }

// Returns whether a block of a fused kernel has place for x.
static inline bool fits_fused(int64_t m, int64_t k) {
    return m <= kSkinnyRows && m * aligned_words_for(k) * kWordBits <= kFusedValues;
}

static inline bool legal(GemmKernel kernel, const Gpu& gpu, int64_t m, int64_t k = 0, int64_t value_bytes = 0) {
    const KernelRecord& found = record(kernel);
    return runs_on(found, gpu) && m <= found.most_rows && (!found.fused || (value_bytes > 0 && fits_fused(m, k)));
}

#ifndef __CUDACC__  // kernels do not need strings, which would cost nvcc two seconds for each file and target

constexpr char kKernelVariable[] = "BITORCH_QLINEAR_CUDA_KERNEL";

// A value, or a sentence that says why there is none.
template <class T>
using OrError = std::variant<T, std::string>;

// Returns the names of the kernels that run on a device, separated by ", ".
static inline std::string kernel_names(const Gpu& gpu) {
    std::string names;
    for (const KernelRecord& kernel : kKernels) {
        if (!runs_on(kernel, gpu)) continue;
        if (!names.empty()) names += ", ";
        names += kernel.name;
    }
    return names;
}

static inline std::string in_words(int capability) {
    return "compute capability " + std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// Does the same for a device, and names the code that it runs if that was compiled for an earlier one.
static inline std::string in_words(const Gpu& gpu) {
    const bool earlier = gpu.code < gpu.capability;
    return in_words(gpu.capability) + (earlier ? ", with code for " + in_words(gpu.code) + "," : "");
}

// Returns the record of that name, or null for "", which is the automatic choice.
static inline OrError<const KernelRecord*> find_kernel(std::string_view name) {
    if (name.empty()) return nullptr;
    std::string names;
    for (const KernelRecord& kernel : kKernels) {
        if (name == kernel.name) return &kernel;
        names += (names.empty() ? "" : ", ") + std::string(kernel.name);
    }
    return std::string(kKernelVariable) + ": expected one of " + names + ", got \"" + std::string(name) + "\"";
}

#endif

}  // namespace bitorch_qlinear::cuda
