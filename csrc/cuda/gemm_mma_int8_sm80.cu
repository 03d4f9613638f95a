// Binary product on the tensor cores of integers, m16n8k32 u8, for compute capability 8.0 and later. It is meant for
// 10.0 and later, which have no tensor cores of bits. Twin: gemm_popc.cu. mma_tiles.cuh draws its way through shared
// memory.
//
// A bit becomes a byte of 0 or 1, and products of such bytes are those of AND: the sums are the set bits of a & b, in
// the same registers as in gemm_mma_sm80. A word makes 8 registers of 4 bytes, `word >> bit & 0x01010101`: which value
// of k is in which byte does not matter, because both factors have the same order. Memory and shared memory hold bits.
//
// The reason, in multiply-adds per clock and SM (estimates, not measured):
//
//     CUDA cores, gemm_popc          512    16 lanes of __popc (CUDA C++ programming guide, "Arithmetic Instructions")
//     CUDA cores, with full adders   780    as gemm_skinny.cu counts, if it did nothing else
//     int8, 12.0                    1024    838 TOPS of an RTX 5090 with 170 SMs at 2.41 GHz (its white paper)
//     int8, 10.0                    2048    at least, which is an A100's. a B200's 4500 TOPS are 8200, by tcgen05 only
//
// Other units unpack at the same time: from one bit of each byte they make 8 registers of two fragments of x and 8 of
// weights, by a shift and an AND each. These 32 instructions of a warp take 64 clocks of a quarter of an SM, and the 8
// m16n8k32 that use them 128 on 12.0: the tensor cores are the limit there, and from 2048 a clock on the unpacking is.
// With tiles of 64 x 64, L2 brings 4 bytes a clock and shared memory moves 12 (12.0).
#include "mma.cuh"
#include "mma_tiles.cuh"

namespace bitorch_qlinear::cuda {
namespace {

struct ByteProducts {
#ifdef BITORCH_QLINEAR_MMA_INT8
    static constexpr bool kExists = true;

    // Bits `bit`, 8 + bit, 16 + bit, 24 + bit.
    static __device__ __forceinline__ uint32_t bytes(uint32_t word, int bit) { return word >> bit & 0x01010101; }

    template <class Shape, int Vector>
    static __device__ __forceinline__ void multiply_stage(Fragments<Shape, Vector>& fragments,
                                                          const typename Shape::Stage& next, const Place& at,
                                                          Sums<Shape>& sums) {
        static_assert(kGroups<Shape> == 1, "a warp unpacks its weights once");
        const uint4(&b)[4] = fragments.weight[0];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll 4  // all 8 at once would spill
            for (int bit = 0; bit < 8; ++bit) {
                uint32_t columns[4][2];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    columns[j][0] = bytes(half ? b[j].z : b[j].x, bit);
                    columns[j][1] = bytes(half ? b[j].w : b[j].y, bit);
                }
#pragma unroll
                for (int i = 0; i < kFragments<Shape>; ++i) {
                    const uint4(&a)[2] = fragments.x[i];
                    const uint32_t rows[4] = {bytes(half ? a[0].z : a[0].x, bit), bytes(half ? a[1].z : a[1].x, bit),
                                              bytes(half ? a[0].w : a[0].y, bit), bytes(half ? a[1].w : a[1].y, bit)};
#pragma unroll
                    for (int j = 0; j < 4; ++j) mma_bytes(sums[i][0][j], rows, columns[j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kFragments<Shape>; ++i) fragments.read_x(next, at, i);
        fragments.read_weight(next, at, 0);
    }
#else
    static constexpr bool kExists = false;
#endif
};

}  // namespace

cudaError_t gemm_mma_int8_sm80(const Product& product, cudaStream_t stream, bool starts_early) {
    if (product.m == 0 || product.n == 0) return cudaSuccess;
    if (!are_aligned(product) || !have_popcounts(product)) return cudaErrorInvalidValue;
    return launch<ByteProducts, ShapeOf<static_cast<int>(kInt8Tile)>>(product, stream, starts_early);
}

}  // namespace bitorch_qlinear::cuda
