// Block sums: shuffles within a warp, one shared word a warp between them; one partial sum a block.
#include <cstdint>

extern "C" __global__ void block_sum(const int32_t* __restrict__ x, int32_t* __restrict__ partial, int n) {
    __shared__ int32_t warp_sums[32];
    int sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (lane == 0) warp_sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        sum = lane < warps ? warp_sums[lane] : 0;
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (lane == 0) partial[blockIdx.x] = sum;
    }
}

// The whole sum in one launch: the block that finishes last adds up the partial sums (CUDA samples, threadFenceReduction).
extern "C" __global__ void grid_sum(const int32_t* __restrict__ x, int32_t* partial, unsigned* finished, int32_t* sum,
                                    int n) {
    __shared__ int32_t values[128];
    __shared__ bool last;
    int mine = 0;
    for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) mine += x[i];
    values[threadIdx.x] = mine;
    __syncthreads();
    for (int half = 64; half > 0; half /= 2) {
        if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = values[0];
        __threadfence();
        last = atomicAdd(finished, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        int all = 0;
        for (int b = 0; b < gridDim.x; ++b) all += partial[b];
        *sum = all;
    }
}
