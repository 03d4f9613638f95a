// Measures what bounds the kernels, each part alone: the tensor cores' instructions for bits, from registers (mma.sync)
// and from shared memory (wgmma), and how fast multiprocessors get bytes from L2. No kernel can be faster.
// benchmarks/gpu/rates.py compiles and loads this file.
//
// Each function launches its kernel twice, first to raise the clock and to fill L2, and times the second launch. It
// returns CUDA's error as text, or an empty text.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/mma.cuh"
#include "cuda/tensor_map.h"
#include "cuda/warpgroup.cuh"

// Multiply-adds or bytes: of all multiprocessors in a second, and of one in a clock.
struct Rate {
    double a_second, a_clock;
};

namespace bitorch_qlinear::cuda {
namespace {

// Where a kernel stores its sums, so that the compiler keeps its products, and the clocks of each block.
struct Results {
    int32_t* sums;  // one for each thread
    int64_t* clocks;
};

// Random bits take more power than regular ones, and the clock falls with the power.
__device__ __forceinline__ uint32_t random_word(uint32_t i) {
    i = (i ^ i >> 16) * 0x7feb352du;
    i = (i ^ i >> 15) * 0x846ca68bu;
    return i ^ i >> 16;
}

__global__ void fill(uint32_t* words, int64_t count) {
    const int64_t threads = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += threads) {
        words[i] = random_word(static_cast<uint32_t>(i));
    }
}

// All threads of the block call it.
__device__ __forceinline__ void store_results(const Results& results, int32_t sum, int64_t start) {
    __syncthreads();  // the clocks are those of the block's last warp
    results.sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    if (threadIdx.x == 0) results.clocks[blockIdx.x] = clock64() - start;
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

constexpr int kWarpThreads = 256;  // of a block
constexpr int kWarpBlocks = 4;     // of a multiprocessor
constexpr int kChains = 4;         // independent chains of a warp: a product waits only for the last one of its chain

__global__ void multiply_by_warps(int rounds, Results results) {
#ifdef BITORCH_QLINEAR_MMA_SM80
    uint32_t a[4], b[2];
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    for (int i = 0; i < 6; ++i) (i < 4 ? a[i] : b[i - 4]) = random_word(thread * 6 + i);
    int32_t sums[kChains][4] = {};
    const int64_t start = clock64();
#pragma unroll 4
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (auto& c : sums) mma_and_popc(c, a, b);
    }
    int32_t sum = 0;
    for (const auto& c : sums) sum += c[0] + c[1] + c[2] + c[3];
    store_results(results, sum, start);
#endif
}

constexpr int kRows = 128;

// A warpgroup multiplies 128 rows by so many columns, as gemm_wgmma_sm90a does with a stage, again and again.
template <int Columns>
__global__ void __launch_bounds__(4 * kWarp) multiply_by_warpgroups(int rounds, Results results) {
#ifdef BITORCH_QLINEAR_WGMMA_SM90A
    __shared__ __align__(1024) uint32_t x[kRows][kLineWords], weight[Columns][kLineWords];
    for (int i = threadIdx.x; i < (kRows + Columns) * kLineWords; i += kWarpgroup) {
        const int row = i / kLineWords, word = i % kLineWords;
        (row < kRows ? x[row] : weight[row - kRows])[word] = random_word(i);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the instructions must find these words
    __syncthreads();
    int32_t sums[kRows / kInstructionRows][Columns / 2];
    const uint64_t of_x = describe(x), of_weight = describe(weight);
    const int64_t start = clock64();
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        fence_products();
#pragma unroll
        for (int step = 0; step < kLineBits / kInstructionBits; ++step) {
#pragma unroll
            for (int strip = 0; strip < kRows / kInstructionRows; ++strip) {
                const int bytes = step * kInstructionBits / 8;
                multiply_bits(sums[strip], advance(of_x, strip * kInstructionRows * kLineBytes + bytes),
                              advance(of_weight, bytes), round != 0 || step != 0);
            }
        }
        commit_products();
        wait_for_products<1>();
    }
    wait_for_products<0>();
    int32_t sum = 0;
#pragma unroll
    for (auto& of_strip : sums) {
        hold(of_strip);
        for (const int32_t c : of_strip) sum += c;
    }
    store_results(results, sum, start);
#endif
}

// ---- L2 -------------------------------------------------------------------------------------------------------------

// Groups of `sharers` blocks read the same part of a matrix, piece by piece and again and again. A piece is a box of
// 128 lines, as the producer of gemm_wgmma_sm90a copies it for x, or as many bytes side by side.
constexpr int kPieceBytes = kRows * static_cast<int>(kLineBytes);

struct Part {
    int first, count;  // pieces
};

__device__ __forceinline__ Part part_of_block(int pieces, int sharers) {
    const int groups = (gridDim.x + sharers - 1) / sharers, count = pieces / groups;
    return {static_cast<int>(blockIdx.x) / sharers * count, count};
}

constexpr int kLinesOfRow = 8;  // 8192 values
constexpr int kStages = 12;     // pieces of a block in flight
// Dynamic shared memory may begin at any multiple of 16 bytes, but swizzled lines need one of 1024.
constexpr int kAlignment = 1024;

__global__ void __launch_bounds__(kWarp)
    copy_boxes(const __grid_constant__ CUtensorMap map, int pieces, int sharers, int copies, Results results) {
#ifdef BITORCH_QLINEAR_WGMMA_SM90A
    extern __shared__ uint8_t memory[];
    uint8_t* const stages = memory + (kAlignment - shared_address(memory) % kAlignment) % kAlignment;
    __shared__ uint64_t full[kStages];
    const int64_t start = clock64();
    if (threadIdx.x == 0) {
        for (auto& barrier : full) init_barrier(barrier, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        const Part part = part_of_block(pieces, sharers);
        for (int i = 0; i < copies + kStages; ++i) {
            uint64_t& barrier = full[i % kStages];
            if (i >= kStages) wait(barrier, (i / kStages - 1) % 2);
            if (i >= copies) continue;
            const int piece = part.first + i % part.count;
            arrive_and_expect(barrier, kPieceBytes);
            copy_box(stages + i % kStages * kPieceBytes, map, piece % kLinesOfRow * static_cast<int>(kLineWords),
                     piece / kLinesOfRow * kRows, barrier);
        }
    }
    store_results(results, 0, start);
#endif
}

constexpr int kLoadThreads = kPieceBytes / 16, kInFlight = 4;

// `pieces` are those of the matrix, as above, and `copies` is a multiple of kInFlight.
__global__ void __launch_bounds__(kLoadThreads)
    load_pieces(const uint4* matrix, int pieces, int sharers, int copies, Results results) {
    const Part part = part_of_block(pieces, sharers);
    uint32_t sum = 0;
    const int64_t start = clock64();
    for (int i = 0; i < copies; i += kInFlight) {
        uint4 words[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const int64_t piece = part.first + (i + j) % part.count;
            words[j] = __ldcg(matrix + piece * kLoadThreads + threadIdx.x);  // from L2 alone
        }
#pragma unroll
        for (const uint4& w : words) sum += w.x ^ w.y ^ w.z ^ w.w;
    }
    store_results(results, static_cast<int32_t>(sum), start);
}

// ---- the host -------------------------------------------------------------------------------------------------------

// Memory of the device, or null.
class Memory {
  public:
    explicit Memory(size_t bytes) {
        if (cudaMalloc(&address_, bytes) != cudaSuccess) address_ = nullptr;
    }
    ~Memory() { cudaFree(address_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    template <class T>
    T* as() const {
        return static_cast<T*>(address_);
    }

  private:
    void* address_ = nullptr;
};

const char* text_of(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

cudaError_t find_multiprocessors(int* count) {
    int device = 0;
    const auto error = cudaGetDevice(&device);
    return error == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device) : error;
}

// Measures a launch of so many blocks on each multiprocessor, of which each does so much work.
template <class Launch>
cudaError_t measure(int multiprocessors, int blocks, int threads, double work, Launch launch, Rate* rate) {
    const int all = multiprocessors * blocks;
    const Memory sums(sizeof(int32_t) * all * threads), clocks(sizeof(int64_t) * all);
    if (!sums.as<void>() || !clocks.as<void>()) return cudaGetLastError();
    cudaEvent_t start, end;
    if (const auto error = cudaEventCreate(&start); error != cudaSuccess) return error;
    if (const auto error = cudaEventCreate(&end); error != cudaSuccess) return error;
    const Results results{sums.as<int32_t>(), clocks.as<int64_t>()};
    launch(all, results);
    cudaEventRecord(start);
    launch(all, results);
    cudaEventRecord(end);
    float milliseconds = 0;
    std::vector<int64_t> of_blocks(all);
    auto error = cudaDeviceSynchronize();
    if (error == cudaSuccess) error = cudaGetLastError();  // a launch that was refused
    if (error == cudaSuccess) error = cudaEventElapsedTime(&milliseconds, start, end);
    if (error == cudaSuccess) {
        error = cudaMemcpy(of_blocks.data(), results.clocks, sizeof(int64_t) * all, cudaMemcpyDeviceToHost);
    }
    cudaEventDestroy(start);
    cudaEventDestroy(end);
    if (error != cudaSuccess) return error;
    const auto slowest = static_cast<double>(*std::max_element(of_blocks.begin(), of_blocks.end()));
    *rate = {work * all / (milliseconds / 1e3), work * blocks / slowest};
    return cudaSuccess;
}

template <int Columns>
cudaError_t measure_warpgroups(int multiprocessors, Rate* rate) {
    constexpr int kRounds = 2048;
    const double work = double{kRounds} * kRows * Columns * kLineBits;
    const auto launch = [](int blocks, const Results& results) {
        multiply_by_warpgroups<Columns><<<blocks, 4 * kWarp>>>(kRounds, results);
    };
    return measure(multiprocessors, 1, 4 * kWarp, work, launch, rate);
}

cudaError_t measure_l2(int multiprocessors, int64_t bytes, int sharers, bool boxes, Rate* rate) {
    constexpr int kCopies = 4096, kSharedBytes = kStages * kPieceBytes + kAlignment;
    const int64_t row_words = kLinesOfRow * kLineWords, rows = bytes / (row_words * kWordBytes);
    const int pieces = static_cast<int>(bytes / kPieceBytes), together = sharers ? sharers : multiprocessors;
    if (pieces < multiprocessors) return cudaErrorInvalidValue;
    const Memory matrix(bytes);
    if (!matrix.as<void>()) return cudaGetLastError();
    fill<<<multiprocessors, 1024>>>(matrix.as<uint32_t>(), bytes / kWordBytes);
    const double work = double{kCopies} * kPieceBytes;
    if (!boxes) {
        const auto launch = [&](int blocks, const Results& results) {
            load_pieces<<<blocks, kLoadThreads>>>(matrix.as<const uint4>(), pieces, together, kCopies, results);
        };
        return measure(multiprocessors, 1, kLoadThreads, work, launch, rate);
    }
    CUtensorMap map{};
    auto error = encode({matrix.as<const uint32_t>(), rows, row_words, row_words}, kRows, &map);
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(copy_boxes, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    }
    if (error != cudaSuccess) return error;
    const auto launch = [&](int blocks, const Results& results) {
        copy_boxes<<<blocks, kWarp, kSharedBytes>>>(map, pieces, together, kCopies, results);
    };
    return measure(multiprocessors, 1, kWarp, work, launch, rate);
}

}  // namespace
}  // namespace bitorch_qlinear::cuda

using namespace bitorch_qlinear::cuda;

// Multiply-adds of bits by mma.sync.
extern "C" const char* measure_warps(Rate* rate) {
    constexpr int kRounds = 8192;
    int multiprocessors = 0;
    if (const auto error = find_multiprocessors(&multiprocessors); error != cudaSuccess) return text_of(error);
    const double work = double{kRounds} * kChains * (kWarpThreads / kWarp) * 16 * 8 * 256;
    const auto launch = [](int blocks, const Results& results) {
        multiply_by_warps<<<blocks, kWarpThreads>>>(kRounds, results);
    };
    return text_of(measure(multiprocessors, kWarpBlocks, kWarpThreads, work, launch, rate));
}

// Multiply-adds of bits by wgmma with 192 or 128 columns.
extern "C" const char* measure_warpgroups(int columns, Rate* rate) {
    int multiprocessors = 0;
    if (const auto error = find_multiprocessors(&multiprocessors); error != cudaSuccess) return text_of(error);
    return text_of(columns == 192 ? measure_warpgroups<192>(multiprocessors, rate)
                                  : measure_warpgroups<128>(multiprocessors, rate));
}

// Bytes from L2, of a matrix of so many bytes, each part of which is read by so many multiprocessors, or by all if
// `sharers` is 0: in boxes of a tensor map, or by loads.
extern "C" const char* measure_l2(int64_t bytes, int sharers, bool boxes, Rate* rate) {
    int multiprocessors = 0;
    if (const auto error = find_multiprocessors(&multiprocessors); error != cudaSuccess) return text_of(error);
    return text_of(measure_l2(multiprocessors, bytes, sharers, boxes, rate));
}
