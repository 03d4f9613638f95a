// Binary product on tensor cores, m16n8k256 and.popc, for compute capability 8.0 to 9.0. Twin: gemm_popc.cu.
// mma_tiles.cuh draws its way through shared memory.
//
// These are estimates, not measured. By data sheets, an A100 makes 16384 multiply-adds of bits per clock and SM and an
// H100 about 8192 with this instruction, which is 32768 of them: one instruction in 2 or 4 clocks. From shared memory,
// which moves 128 bytes in a clock, and from L2 a tile needs
//
//     tile        reads and writes an instruction     a clock, A100 (H100)     from L2 a clock and SM, A100 (H100)
//     128 x 256   128 + 48 bytes                      88 (44) bytes            24 (12) bytes
//     128 x 128   128 + 64                            96 (48)                  32 (16)
//     64 x 64     256 + 128                           192 (96)                 64 (32)
//
// so the two large tiles are bound by the tensor cores, the small one on an A100 by shared memory at 2/3 of their rate.
#include "mma.cuh"
#include "mma_tiles.cuh"

namespace bitorch_qlinear::cuda {
namespace {

struct BitProducts {
#ifdef BITORCH_QLINEAR_MMA_SM80
    static constexpr bool kExists = true;

    // Each fragment is read again after its last use: long before its first use in the next stage, and without the
    // registers that a second set of fragments would take.
    template <class Shape, int Vector>
    static __device__ __forceinline__ void multiply_stage(Fragments<Shape, Vector>& fragments,
                                                          const typename Shape::Stage& next, const Place& at,
                                                          Sums<Shape>& sums) {
#pragma unroll
        for (int group = 0; group < kGroups<Shape>; ++group) {
#pragma unroll
            for (int i = 0; i < kFragments<Shape>; ++i) {
                const uint4(&a)[2] = fragments.x[i];
                const uint4(&b)[4] = fragments.weight[group];
                // Consecutive instructions have sums of their own, so that none waits for the one before.
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    mma_and_popc(sums[i][group][j], {a[0].x, a[1].x, a[0].y, a[1].y}, {b[j].x, b[j].y});
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    mma_and_popc(sums[i][group][j], {a[0].z, a[1].z, a[0].w, a[1].w}, {b[j].z, b[j].w});
                }
                if (group == kGroups<Shape> - 1) fragments.read_x(next, at, i);
            }
            fragments.read_weight(next, at, group);
        }
    }
#else
    static constexpr bool kExists = false;
#endif
};

template <Tile tile>
cudaError_t launch(const Product& product, cudaStream_t stream, bool starts_early) {
    return launch<BitProducts, ShapeOf<static_cast<int>(tile)>>(product, stream, starts_early);
}

}  // namespace

cudaError_t gemm_mma_sm80(const Product& product, Tile tile, cudaStream_t stream, bool starts_early) {
    if (product.m == 0 || product.n == 0) return cudaSuccess;
    if (!are_aligned(product) || !have_popcounts(product)) return cudaErrorInvalidValue;
    switch (tile) {
        case Tile::m128n256: return launch<Tile::m128n256>(product, stream, starts_early);
        case Tile::m128n128: return launch<Tile::m128n128>(product, stream, starts_early);
        case Tile::m64n64: return launch<Tile::m64n64>(product, stream, starts_early);
    }
    return cudaErrorInvalidValue;
}

}  // namespace bitorch_qlinear::cuda
