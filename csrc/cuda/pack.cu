// Packs rows of floats into words, and in the same pass makes the in-range bits and the rows' popcounts.
//
// A warp packs a segment of a row: kSteps steps of 512 bytes, all loaded before the first is used, because memory is
// the limit. In a step a lane holds 16 bytes, that is V values, and the warp makes V words, each in 32 / V lanes:
//
//     Vectors  one load; the lane's values are neighbours, and make V bits of its word, which shuffles join
//     Values   V loads, each of 32 neighbours by the 32 lanes, whose ballot is a word: rows of any length and alignment
//
// By estimate, not measured (`python -m benchmarks gpu-model`), an SM of an H200 gets the bytes of a segment of
// bfloat16 Vectors from memory in 105 clocks. Its 205 instructions take the units of logic, which start two of a warp
// in a clock, 72 clocks, so memory is the limit. With in-range bits they take 144 clocks and memory 111, so these units
// are, at 77 % of the memory's rate.
#include "align_rows.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "row_grid.cuh"
#include "sign_tests.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kSteps = 4;

// Values that a lane holds in a step, which is also how many words the warp makes; and the lanes of a word.
template <class T>
constexpr int kVector = 16 / sizeof(T);
template <class T>
constexpr int kLanes = kWarp / kVector<T>;

// One step. `left` values exist from `from` on (none if it is not positive); the bits of others are 0.
template <class T>
struct Vectors {
    uint4 data;
    bool exists;

    __device__ __forceinline__ void load(const T* from, int left) {
        const int first = lane_index() * kVector<T>;
        exists = first < left;  // all of them or none
        data = exists ? *reinterpret_cast<const uint4*>(from + first) : uint4{};
    }

    // Returns value i in the word's upper bits. For 16-bit types the lower half may hold a neighbour's bits, which the
    // tests ignore.
    __device__ __forceinline__ typename Pattern<T>::Word value(int i) const {
        const uint32_t words[4] = {data.x, data.y, data.z, data.w};
        if constexpr (sizeof(T) == 8) return words[2 * i] | uint64_t{words[2 * i + 1]} << 32;
        if constexpr (sizeof(T) == 4) return words[i];
        if constexpr (sizeof(T) == 2) return i % 2 ? words[i / 2] : words[i / 2] << 16;
    }

    template <class Test>
    __device__ __forceinline__ uint32_t word(int, Test test) const {
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) bits |= static_cast<uint32_t>(test(value(i))) << i;
        uint32_t word = exists ? bits << (kVector<T> * (lane_index() % kLanes<T>)) : 0;
#pragma unroll
        for (int distance = 1; distance < kLanes<T>; distance *= 2) word |= __shfl_xor_sync(kAllLanes, word, distance);
        return word;
    }
};

template <class T>
struct Values {
    typename Pattern<T>::Bits data[kVector<T>];

    __device__ __forceinline__ void load(const T* from, int left) {
        const int lane = lane_index();
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
            const auto* value = reinterpret_cast<const typename Pattern<T>::Bits*>(from) + i * kWarp + lane;
            data[i] = i * kWarp + lane < left ? *value : 0;
        }
    }

    template <class Test>
    __device__ __forceinline__ uint32_t word(int left, Test test) const {
        using Word = typename Pattern<T>::Word;
        const int lane = lane_index();
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
            const bool bit = i * kWarp + lane < left && test(Word{data[i]} << (8 * (sizeof(Word) - sizeof data[i])));
            const uint32_t ballot = __ballot_sync(kAllLanes, bit);
            if (lane / kLanes<T> == i) word = ballot;
        }
        return word;
    }
};

// Packs words [first, first + kSteps * kVector) of a row, as far as they exist, and returns their set bits, distributed
// over the lanes.
template <class T, bool Strict, class Step>
__device__ __forceinline__ int32_t pack_segment(const Pack& job, int64_t row, int64_t first,
                                                typename Pattern<T>::Word limit) {
    using Word = typename Pattern<T>::Word;
    constexpr int kWords = kSteps * kVector<T>, kStep = kVector<T> * kWordBits;
    const int64_t width = word_count(job.k);
    const int values = static_cast<int>(min(job.k - first * kWordBits, int64_t{kWords} * kWordBits));
    const int words = static_cast<int>(min(job.word_stride - first, int64_t{kWords}));
    const T* from = static_cast<const T*>(job.x) + row * job.stride + first * kWordBits;
    Step steps[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) steps[i].load(from + i * kStep, values - i * kStep);
    const int lane = lane_index(), mine = lane / kLanes<T>;
    const bool leads = lane % kLanes<T> == 0;
    int32_t count = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        const int left = values - i * kStep, index = i * kVector<T> + mine;
        if (i * kVector<T> >= words) break;                     // the whole warp
        const uint32_t word = steps[i].word(left, [](Word v) {  //
            return Strict ? has_sign<T, false>(v) : !has_sign<T, true>(v);
        });
        if (leads && index < words) {
            job.words[row * job.word_stride + first + index] = word;
            count += __popc(word);
        }
        if (job.in_range) {
            const uint32_t range = steps[i].word(left, [limit](Word v) { return (v & ~kSignBit<T>) < limit; });
            if (leads && index * static_cast<int>(kWordBits) < values)
                job.in_range[row * width + first + index] = range;
        }
    }
    return count;
}

// Blocks from `blocks` on align words beside. Two blocks fit on an SM in any case; without the 2, nvcc 13.0 spills in
// three kernels for sm_120.
template <class T, bool Strict, class Step>
__global__ void __launch_bounds__(kRowThreads, 2) pack_rows(const Pack job, const Align beside, int64_t blocks) {
    let_next_kernel_start();
    if (blockIdx.x >= blocks) return align_rows_of_block(beside, blockIdx.x - blocks);
    constexpr int kWords = kSteps * kVector<T>;
    const int64_t row = row_of_warp();
    const auto limit = job.in_range ? range_limit<T>(job.threshold) : 0;
    int32_t count = 0;
    if (row < job.m) {
        for (int64_t first = first_segment() * kWords; first < job.word_stride; first += segment_step() * kWords) {
            count += pack_segment<T, Strict, Step>(job, row, first, limit);
        }
    }
    if (job.popcounts) {
        count = sum_over_row(count);
        if (threadIdx.x == 0 && row < job.m) job.popcounts[row] = count;
    }
}

template <class T>
cudaError_t launch(const Pack& job, const Align& beside, cudaStream_t stream) {
    const bool vectors = reinterpret_cast<uintptr_t>(job.x) % 16 == 0 && job.k % kVector<T> == 0 &&
                         (job.stride % kVector<T> == 0 || job.m == 1);
    const auto kernel = job.strict ? (vectors ? pack_rows<T, true, Vectors<T>> : pack_rows<T, true, Values<T>>)
                                   : (vectors ? pack_rows<T, false, Vectors<T>> : pack_rows<T, false, Values<T>>);
    const int64_t segments = ceil_div(job.word_stride, kSteps * kVector<T>);
    if (segments == 0 && !job.popcounts && beside.m == 0) return cudaSuccess;
    // A row that is counted has one block: several would add their counts in memory that a launch before has to clear.
    // Kernels that need counts have 17 rows or more, and nearly always more than 64.
    return launch_rows(kernel, job.m, segments, !job.popcounts && beside.m == 0, align_blocks(beside), stream, job,
                       beside, row_blocks(job.m, segments));
}

}  // namespace

cudaError_t pack(const Pack& job, const Align& beside, cudaStream_t stream) {
    switch (job.dtype) {
        case DType::float64: return launch<double>(job, beside, stream);
        case DType::float32: return launch<float>(job, beside, stream);
        case DType::float16: return launch<__half>(job, beside, stream);
        case DType::bfloat16: return launch<__nv_bfloat16>(job, beside, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace bitorch_qlinear::cuda
