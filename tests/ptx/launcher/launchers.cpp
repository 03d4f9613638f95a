// Exports the launchers of csrc/cuda/kernels.h as plain C functions, which take a struct as bytes and return the error.
#include "kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace bitorch_qlinear::cuda;

namespace {

constexpr int kOtherSize = -1;  // this is no CUDA error; Python's layout of the struct is wrong

template <class Job, class Function>
int with(const void* job, uint64_t bytes, Function function) {
    return bytes == sizeof(Job) ? function(*static_cast<const Job*>(job)) : kOtherSize;
}

}  // namespace

// All have one signature, with a `tile` that gemm_mma_sm80 and gemm_wgmma_sm90a use, and `behind_pack`, which some products use.
#define LAUNCHER(name, Job, ...)                                                                                 \
    EXPORT int launch_##name(const void* bytes, uint64_t size, int tile, int behind_pack, cudaStream_t stream) { \
        static_cast<void>(tile), static_cast<void>(behind_pack);                                                 \
        return with<Job>(bytes, size, [&](const Job& job) { return name(__VA_ARGS__); });                        \
    }

// Two jobs of one launch.
template <class Job>
struct Both {
    Job job;
    Align other;
};

LAUNCHER(pack, Both<Pack>, job.job, job.other, stream)
LAUNCHER(pack_limited, PackLimited, job, stream)
LAUNCHER(unpack, Unpack, job, stream)
// What dispatch.cpp asks before it chooses a kernel.
EXPORT int launch_find_code(int* capability) { return find_code(capability); }

LAUNCHER(align, Both<Align>, job.job, job.other, stream)
LAUNCHER(gemm_popc, Product, job, stream)
LAUNCHER(gemm_skinny, Product, job, stream, behind_pack != 0)
LAUNCHER(gemm_skinny_mma_sm80, Product, job, stream, behind_pack != 0)
LAUNCHER(gemm_mma_sm75, Product, job, stream)
LAUNCHER(gemm_mma_sm80, Product, job, static_cast<Tile>(tile), stream, behind_pack != 0)
LAUNCHER(gemm_mma_int8_sm80, Product, job, stream, behind_pack != 0)
LAUNCHER(gemm_fused_skinny, FusedProduct, job, stream)
LAUNCHER(gemm_fused_skinny_mma_sm80, FusedProduct, job, stream)
LAUNCHER(gemm_fused_cluster_sm90, FusedProduct, job, stream)
LAUNCHER(gemm_wgmma_sm90a, Product, job, static_cast<WarpgroupTile>(tile), stream, behind_pack != 0)
