// Packs at most 16 rows of real x and multiplies them, in one launch, on tensor cores, m16n8k256 and.popc, for compute
// capability 8.0 to 9.0 (fused_mma.cuh). Twins: pack.cu and gemm_skinny_mma_sm80.cu.
//
// These are estimates, not measured. A block packs all of x for itself, 28 bytes a clock (gemm_fused_skinny.cu): the 32
// KB of 16 rows of 1024 values of bfloat16 take 0.7 us at 1.75 GHz, but the 128 KB of 4096 values take 2.7 us, more
// than the launch that is saved (heuristics.h has the bound). On 9.0 the blocks of a cluster can pack a part each
// (gemm_fused_cluster_sm90.cu), which lifts that bound.
//
// At n = k = 8192 a multiprocessor has 16384 words of weights. On an H100 or H200 the tensor cores take 64 of them in 4
// clocks, 1024 clocks in all. Shared memory takes 1500: it gives a warp 1 KB of x for every 512 bytes of weights. The
// adders take 1000, beside them. Memory takes 3200 (1.9 us), and L2 at 64 bytes a clock 1024.
#include "fused_mma.cuh"

namespace bitorch_qlinear::cuda {
namespace {

template <class As>
__global__ void __launch_bounds__(kFusedThreads, 1) multiply_fused(const FusedProduct job, const FusedPlan plan) {
#ifdef BITORCH_QLINEAR_MMA_SM80
    multiply_rows<As, 1>(job, plan);
#else
    write_no_results<As>(job.product, plan, kUnit * kFusedWarps / plan.parts);  // y is not left unwritten
#endif
}

template <class As>
cudaError_t launch(const FusedProduct& job, cudaStream_t stream) {
    int64_t blocks = 0;
    const FusedPlan plan = fused_plan(job, kUnit, kSlice, kMostUnits, &blocks);
    multiply_fused<As><<<static_cast<unsigned>(blocks), kFusedThreads, 0, stream>>>(job, plan);
    return cudaGetLastError();
}

}  // namespace

cudaError_t gemm_fused_skinny_mma_sm80(const FusedProduct& job, cudaStream_t stream) {
    if (job.product.m == 0 || job.product.n == 0) return cudaSuccess;
    if (!fits_fused(job, kSkinnyRows)) return cudaErrorInvalidValue;
    return with_output_type(job.product.y.dtype, [&](auto as) { return launch<decltype(as)>(job, stream); });
}

}  // namespace bitorch_qlinear::cuda
