// Clusters of blocks, whose shared memory all of them can write to (PTX ISA, "barrier.cluster", "mapa"; compute
// capability 9.0 and later).
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define BITORCH_QLINEAR_CLUSTERS 1
#endif

namespace bitorch_qlinear::cuda {

#ifdef BITORCH_QLINEAR_CLUSTERS
// Returns the block's number in its cluster.
__device__ __forceinline__ int rank_in_cluster() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// Tells the cluster that the block has started. This orders no memory, so that it does not wait for loads.
__device__ __forceinline__ void arrive_at_start() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Tells the cluster that this thread has made its stores to the other blocks. All threads call it.
__device__ __forceinline__ void arrive_with_words() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// Waits until all threads of the cluster have arrived. Between two arrivals each thread must wait once.
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Returns the address at which a variable of shared memory lies in a block of the cluster, for store_in_cluster().
__device__ __forceinline__ uint32_t address_in_block(const void* shared, int rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(rank));
    return address;
}

// Stores four words in the shared memory of a block of the cluster.
__device__ __forceinline__ void store_in_cluster(uint32_t address, uint4 words) {
    asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words.x), "r"(words.y),
                 "r"(words.z), "r"(words.w)
                 : "memory");
}
#endif

}  // namespace bitorch_qlinear::cuda
