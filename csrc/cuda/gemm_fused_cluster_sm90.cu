// Packs at most 16 rows of real x and multiplies them, in one launch, on tensor cores, for compute capability 9.0: the
// blocks of a cluster pack x together (fused_mma.cuh). Twins: pack.cu and gemm_skinny_mma_sm80.cu.
//
// Each of 8 blocks packs an eighth of k of all rows, in pieces of 16 bytes of words, and stores it in the shared
// memory of all 8. Two barriers of the cluster order this. Before the first one ends, a block may not have started,
// and its shared memory may belong to another one. When the second one ends, x is complete in all blocks, and no block
// touches the memory of another one any more. So a block that finds a wrong prepared form may write what no product
// gives and exit, while the others are still at work.
//
// These are estimates, not measured. At 28 bytes a clock (gemm_fused_skinny.cu) an eighth of 16 rows of 4096 values of
// bfloat16, 16 KB, takes 0.33 us at 1.75 GHz, where a block alone takes 2.7 for all of it. Words and barrier need two
// ways to another multiprocessor, of about 200 clocks each: 0.25 us. Blocks of a cluster share a group of 16 or 18
// multiprocessors, so 128 of 132 work, which costs 0.05 us of a product of 2. heuristics.h has the bound that follows.
// Clusters of 4 blocks would pack for 0.67 us and cost more than the 0.8 of the launch that they save. L2 gives x to 16
// clusters, 2 MB in all, while a launch that packs x reads 128 KB once. The second arrival waits until the stores have
// been made, and perhaps for the first weights too. Stores that count bytes at an mbarrier (st.async) would need no
// such wait; they were not tried.
//
// Tensor cores multiply up to 4 rows too, because their loop takes the same time for any number of rows and weights
// from memory take twice as long (gemm_fused_skinny.cu, gemm_fused_skinny_mma_sm80.cu).
//
// If y has few columns, the blocks of a cluster could divide k and add their sums. That is not done. A row of x has at
// most 4096 words, and 256 if there are 16 rows. With 8 columns, the fewest, each of a block's 16 warps has 256 of
// them, four passes of its loop, or 16, a single load. There is little left to divide.
#include <atomic>

#include "fused_mma.cuh"
#include "relaxed_capture.h"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kBlocks = static_cast<int>(kClusterBlocks);

template <class As>
__global__ void __launch_bounds__(kFusedThreads, 1) multiply_in_cluster(const FusedProduct job, const FusedPlan plan) {
#if defined(BITORCH_QLINEAR_CLUSTERS) && defined(BITORCH_QLINEAR_MMA_SM80)
    multiply_rows<As, kBlocks>(job, plan);
#else
    write_no_results<As>(job.product, plan, kUnit * kFusedWarps / plan.parts);  // y is not left unwritten
#endif
}

// Returns how many clusters of a kernel the current device runs at once, or 0 if it runs none: a part of a GPU may be
// too small (CUDA C++ programming guide, "Thread Block Clusters"). CUDA is asked once for each of the first devices.
int clusters_at_once(const cudaLaunchConfig_t& configuration, const void* kernel) {
    constexpr int kRemembered = 32, kUnknown = 0, kNone = -1;
    static std::atomic<int> remembered[kRemembered];
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) device = kRemembered;
    const int known = device < kRemembered ? remembered[device].load(std::memory_order_relaxed) : kUnknown;
    if (known != kUnknown) return known == kNone ? 0 : known;
    const RelaxedCapture relaxed;  // the question may load the kernel's code
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration) != cudaSuccess) {
        static_cast<void>(cudaGetLastError());  // clears this error, before others see it
        return 0;                               // which is not remembered, because the next call may succeed
    }
    if (device < kRemembered) remembered[device].store(clusters > 0 ? clusters : kNone, std::memory_order_relaxed);
    return clusters;
}

template <class As>
cudaError_t launch(const FusedProduct& job, cudaStream_t stream) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kBlocks, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(kBlocks), configuration.blockDim = dim3(kFusedThreads);
    configuration.stream = stream, configuration.attrs = &attribute, configuration.numAttrs = 1;
    // A block of any kernel of this file takes more than half of a multiprocessor's registers, so all have the same
    // number.
    const auto kernel = multiply_in_cluster<As>;
    const int clusters = clusters_at_once(configuration, reinterpret_cast<const void*>(kernel));
    if (clusters == 0) return gemm_fused_skinny_mma_sm80(job, stream);
    FusedProduct of_clusters = job;
    of_clusters.multiprocessors = std::min(job.multiprocessors, clusters * kBlocks);
    int64_t blocks = 0;
    const FusedPlan plan = fused_plan(of_clusters, kUnit, kSlice, kMostUnits, &blocks, kClusterBlocks);
    configuration.gridDim = dim3(static_cast<unsigned>(blocks));
    static_cast<void>(cudaLaunchKernelEx(&configuration, kernel, job, plan));
    return cudaGetLastError();  // which also clears the error, before others see it
}

}  // namespace

cudaError_t gemm_fused_cluster_sm90(const FusedProduct& job, cudaStream_t stream) {
    if (job.product.m == 0 || job.product.n == 0) return cudaSuccess;
    if (!fits_fused(job, kSkinnyRows)) return cudaErrorInvalidValue;
    return with_output_type(job.product.y.dtype, [&](auto as) { return launch<decltype(as)>(job, stream); });
}

}  // namespace bitorch_qlinear::cuda
