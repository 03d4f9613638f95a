// The rate of the tensor cores' instruction for bits alone, from registers and without a wait: no kernel of ours that
// is made of it can be faster. benchmarks/gpu.py compiles and loads it.
#include <cuda_runtime.h>

#include <cstdint>

constexpr int kThreads = 256, kBlocks = 4;  // of a multiprocessor
constexpr int kChains = 4;                  // of a warp: products that wait for none but their own last one
constexpr int kRounds = 8192;

__global__ void multiply(int32_t* out) {
    uint32_t a[4], b[2];  // random bits, which take more power than others
    for (int i = 0; i < 6; ++i) (i < 4 ? a[i] : b[i - 4]) = (blockIdx.x + threadIdx.x * 6 + i + 1) * 0x9e3779b9u;
    int32_t sums[kChains][4] = {};
#pragma unroll 4
    for (int round = 0; round < kRounds; ++round) {
#pragma unroll
        for (auto& c : sums) {
            asm volatile(
                "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
                "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
    }
    int32_t total = 0;
    for (const auto& c : sums) total += c[0] + c[1] + c[2] + c[3];
    out[blockIdx.x * blockDim.x + threadIdx.x] = total;  // so that nothing is left out
}

// Operations a second, two a multiply-add; 0 where CUDA reports an error. `out` has an int32 for each thread.
extern "C" double bmma_rate(int multiprocessors, int32_t* out) {
    const int blocks = kBlocks * multiprocessors;
    cudaEvent_t start, end;
    cudaEventCreate(&start);
    cudaEventCreate(&end);
    multiply<<<blocks, kThreads>>>(out);  // the clock rises
    cudaEventRecord(start);
    multiply<<<blocks, kThreads>>>(out);
    cudaEventRecord(end);
    float milliseconds = 0;
    cudaEventSynchronize(end);
    cudaEventElapsedTime(&milliseconds, start, end);
    const double operations = 2. * 16 * 8 * 256 * kChains * kRounds * (kThreads / 32) * blocks;
    return cudaGetLastError() == cudaSuccess ? operations / (milliseconds / 1e3) : 0;
}
