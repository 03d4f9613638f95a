// y[m][n] = popcount(x[m] & w[n]) over rows of bits, by the asynchronous machine of sm_90a: tensor maps bring blocks of
// 1024 bits into a ring of stages, mbarriers say when a stage is full and when it is empty, and wgmma multiplies.
// A block has four warps that multiply, for 64 rows and 32 columns, and one whose first lane loads.
#include <cstdint>

struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

constexpr int kStages = 2, kRows = 64, kColumns = 32, kLine = 128;
constexpr int kBytes = (kRows + kColumns) * kLine;

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ void wait(uint32_t barrier, int parity) {
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.b32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    }
}
__device__ void load(uint32_t to, const TensorMap* map, int k, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(map), "r"(k), "r"(row), "r"(barrier)
        : "memory");
}

// Rows of 128 bytes with the 128-byte swizzle; groups of eight rows are 1024 bytes apart.
__device__ uint64_t descriptor(uint32_t address) {
    return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 | (address & 0x3FFFF) >> 4;
}
__device__ void multiply(int32_t (&d)[16], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k256.s32.b1.b1.and.popc {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15}, %16, %17, p;\n}"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]),
          "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15])
        : "l"(a), "l"(b), "r"(add));
}

extern "C" __global__ void __launch_bounds__(160)
    pipeline(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, int32_t* y, int m, int n,
             int blocks) {
    __shared__ alignas(1024) uint8_t stages[kStages][kBytes];
    __shared__ alignas(8) uint64_t full[kStages], empty[kStages];
    const int row = blockIdx.y * kRows, column = blockIdx.x * kColumns;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            init(shared_address(&full[stage]), 1);
            init(shared_address(&empty[stage]), 4);
        }
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (threadIdx.x > 128) return;
        for (int block = 0; block < blocks; ++block) {
            const int stage = block % kStages, round = block / kStages;
            const uint32_t to = shared_address(stages[stage]), barrier = shared_address(&full[stage]);
            wait(shared_address(&empty[stage]), (round & 1) ^ 1);
            expect(barrier, kBytes);
            load(to, &x, block * kLine, row, barrier);
            load(to + kRows * kLine, &w, block * kLine, column, barrier);
        }
        return;
    }
    int32_t d[16];
    for (int block = 0; block < blocks; ++block) {
        const int stage = block % kStages, round = block / kStages;
        const uint32_t at = shared_address(stages[stage]);
        wait(shared_address(&full[stage]), round & 1);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < kLine; k += 32)
            multiply(d, descriptor(at + k), descriptor(at + kRows * kLine + k), block != 0 || k != 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (block != 0) {
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (threadIdx.x % 32 == 0) arrive(shared_address(&empty[(block - 1) % kStages]));
        }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(d[i])::"memory");
    for (int i = 0; i < 16; ++i) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int r = row + 16 * warp + lane / 4 + 8 * (i / 2 % 2), c = column + i / 4 * 8 + 2 * (lane % 4) + i % 2;
        if (r < m && c < n) y[static_cast<int64_t>(r) * n + c] = d[i];
    }
}
