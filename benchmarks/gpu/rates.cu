// Measures the rate of the tensor cores' instruction for bits alone, from registers and without a wait. No kernel that
// uses this instruction can be faster. benchmarks/gpu/machine.py compiles and loads this file.
#include <cuda_runtime.h>

#include <cstdint>

constexpr int kThreads = 256;  // threads of a block
constexpr int kBlocks = 4;     // blocks of a multiprocessor
constexpr int kChains = 4;     // independent chains of a warp: a product waits only for the last one of its chain
constexpr int kRounds = 8192;

__global__ void multiply(int32_t* out) {
    uint32_t a[4], b[2];  // Random bits take more power than regular ones.
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
    out[blockIdx.x * blockDim.x + threadIdx.x] =
        total;  // Without a use of the sums the compiler would drop the products.
}

// Returns operations a second, with two to a multiply-add, or 0 if CUDA reports an error. `out` has an int32 for each
// thread.
extern "C" double bmma_rate(int multiprocessors, int32_t* out) {
    const int blocks = kBlocks * multiprocessors;
    cudaEvent_t start, end;
    cudaEventCreate(&start);
    cudaEventCreate(&end);
    multiply<<<blocks, kThreads>>>(out);  // This one raises the clock.
    cudaEventRecord(start);
    multiply<<<blocks, kThreads>>>(out);
    cudaEventRecord(end);
    float milliseconds = 0;
    cudaEventSynchronize(end);
    cudaEventElapsedTime(&milliseconds, start, end);
    const double operations = 2. * 16 * 8 * 256 * kChains * kRounds * (kThreads / 32) * blocks;
    return cudaGetLastError() == cudaSuccess ? operations / (milliseconds / 1e3) : 0;
}
