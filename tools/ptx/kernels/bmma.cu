// Binary tile products: counts[m][n] = sum over k of popc(a[m][k] & b[n][k]); one warp a block, one 16 x 8 tile.
// Rows of a and b hold `words` 32-bit words, a multiple of 8.
#include <cstdint>

namespace {

__device__ __forceinline__ void mma_and(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void store(int32_t* counts, const int (&d)[4], int m, int n) {
    const int lane = threadIdx.x, row = blockIdx.y * 16 + lane / 4, column = blockIdx.x * 8 + lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
        const int r = row + i / 2 * 8, c = column + i % 2;
        if (r < m && c < n) counts[int64_t(r) * n + c] = d[i];
    }
}

}  // namespace

// Fragments straight from global memory.
extern "C" __global__ void bmma_direct(const uint32_t* __restrict__ a, const uint32_t* __restrict__ b,
                                       int32_t* __restrict__ counts, int m, int n, int words) {
    const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
    const int row = blockIdx.y * 16 + group, column = blockIdx.x * 8 + group;
    int d[4] = {};
#pragma unroll 1
    for (int w = 0; w < words; w += 8) {
        uint32_t fa[4], fb[2];
        for (int i = 0; i < 4; ++i) {
            const int r = row + i % 2 * 8;
            fa[i] = r < m ? a[int64_t(r) * words + w + i / 2 * 4 + in_group] : 0;
        }
        for (int i = 0; i < 2; ++i) fb[i] = column < n ? b[int64_t(column) * words + w + i * 4 + in_group] : 0;
        mma_and(d, fa, fb);
    }
    store(counts, d, m, n);
}

// Four steps of k at a time through shared memory: rows of 128 bytes whose 16-byte chunks are swizzled by the row, so
// that the eight rows of an 8 x 16-byte matrix of ldmatrix lie in different banks. words is a multiple of 32.
extern "C" __global__ void bmma_ldmatrix(const uint32_t* __restrict__ a, const uint32_t* __restrict__ b,
                                         int32_t* __restrict__ counts, int m, int n, int words) {
    __shared__ __align__(128) uint4 tile_a[16 * 8], tile_b[8 * 8];
    const int lane = threadIdx.x;
    int d[4] = {};
#pragma unroll 1
    for (int w = 0; w < words; w += 32) {
        __syncwarp();
        for (int j = 0; j < 4; ++j) {
            const int i = 32 * j + lane;
            const int r = blockIdx.y * 16 + i / 8;
            uint4 v = {};
            if (r < m) v = *reinterpret_cast<const uint4*>(a + int64_t(r) * words + w + i % 8 * 4);
            tile_a[i / 8 * 8 + (i % 8 ^ i / 8 % 8)] = v;
        }
        for (int j = 0; j < 2; ++j) {
            const int i = 32 * j + lane;
            const int r = blockIdx.x * 8 + i / 8;
            uint4 v = {};
            if (r < n) v = *reinterpret_cast<const uint4*>(b + int64_t(r) * words + w + i % 8 * 4);
            tile_b[i / 8 * 8 + (i % 8 ^ i / 8 % 8)] = v;
        }
        __syncwarp();
        for (int step = 0; step < 4; ++step) {
            uint32_t fa[4], fb[2];
            // Matrices 0..3 of a: rows 0-7 and 8-15 of the first 128 bits, then of the second.
            const int ra = lane % 16, ca = 2 * step + lane / 16;
            const uint32_t pa = static_cast<uint32_t>(__cvta_generic_to_shared(&tile_a[ra * 8 + (ca ^ ra % 8)]));
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(fa[0]), "=r"(fa[1]), "=r"(fa[2]), "=r"(fa[3])
                         : "r"(pa)
                         : "memory");
            const int rb = lane % 8, cb = 2 * step + lane / 8 % 2;
            const uint32_t pb = static_cast<uint32_t>(__cvta_generic_to_shared(&tile_b[rb * 8 + (cb ^ rb)]));
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                         : "=r"(fb[0]), "=r"(fb[1])
                         : "r"(pb)
                         : "memory");
            mma_and(d, fa, fb);
        }
    }
    store(counts, d, m, n);
}
