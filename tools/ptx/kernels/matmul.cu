// C = A B for float32, 32 x 32 tiles, 16 x 16 threads with 2 x 2 outputs each; the next pair of tiles is copied
// (cp.async) while this one is multiplied. K is a multiple of 32, so that rows of A are 16-byte aligned; M is any, N a
// multiple of 4.
#include <cstdint>

namespace {

constexpr int kTile = 32;

__device__ __forceinline__ void copy_async16(float* shared, const float* global, bool valid) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    // Zero bytes of the source are read where the copy is not valid; the rest of the 16 is filled with zeros.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256)
    matmul(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c, int m, int n, int k) {
    __shared__ __align__(16) float tile_a[2][kTile][kTile];
    __shared__ __align__(16) float tile_b[2][kTile][kTile];
    const int thread = threadIdx.y * 16 + threadIdx.x;
    const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;

    auto fetch = [&](int stage, int k0) {
        const int row = thread / 8, column = thread % 8 * 4;  // 256 threads x 16 bytes are one tile
        const bool in_a = row0 + row < m, in_b = column0 + column < n;
        copy_async16(&tile_a[stage][row][column], in_a ? a + int64_t(row0 + row) * k + k0 + column : a, in_a);
        copy_async16(&tile_b[stage][row][column], in_b ? b + int64_t(k0 + row) * n + column0 + column : b, in_b);
        commit();
    };

    float sum[2][2] = {};
    fetch(0, 0);
    const int steps = k / kTile;
    for (int step = 0; step < steps; ++step) {
        const int stage = step % 2;
        if (step + 1 < steps) {
            fetch(1 - stage, (step + 1) * kTile);
            wait<1>();
        } else {
            wait<0>();
        }
        __syncthreads();
        for (int i = 0; i < kTile; ++i)
            for (int r = 0; r < 2; ++r)
                for (int s = 0; s < 2; ++s)
                    sum[r][s] += tile_a[stage][threadIdx.y + 16 * r][i] * tile_b[stage][i][threadIdx.x + 16 * s];
        __syncthreads();
    }
    for (int r = 0; r < 2; ++r)
        for (int s = 0; s < 2; ++s) {
            const int row = row0 + threadIdx.y + 16 * r, column = column0 + threadIdx.x + 16 * s;
            if (row < m && column < n) c[int64_t(row) * n + column] = sum[r][s];
        }
}
