// The sum of an array, by clusters of four blocks: the blocks' sums meet in the first block's shared memory. The kernel
// may start before the one that writes x has ended.
#include <cooperative_groups.h>

extern "C" __global__ void __cluster_dims__(4, 1, 1) cluster_sum(const int* x, int* total, int n) {
    __shared__ int sums[128], of_cluster[4];
    const auto cluster = cooperative_groups::this_cluster();
    const unsigned rank = cluster.block_rank();
    cudaGridDependencySynchronize();
    int sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int step = 64; step > 0; step /= 2) {
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
        __syncthreads();
    }
    cluster.barrier_arrive();
    cluster.barrier_wait();
    if (threadIdx.x == 0) cluster.map_shared_rank(of_cluster, 0)[rank] = sums[0];
    cluster.sync();
    if (rank == 0 && threadIdx.x == 0) atomicAdd(total, of_cluster[0] + of_cluster[1] + of_cluster[2] + of_cluster[3]);
}
