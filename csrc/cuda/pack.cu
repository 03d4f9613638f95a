// Packs rows of floats into words, and in the same pass the in-range bits and the rows' popcounts.
//
// A lane loads 16 bytes, that is V values and V bits of a word; the 32 / V lanes of a word join their
// bits by shuffles (log2 of that many). A warp takes kSteps such loads of one row, all in flight before
// the first is used: memory is what binds (per 512 bytes a warp has about 25 instructions, where an SM
// of an H200 issues 100 in the time that its share of the memory takes to deliver them: an estimate).
// Rows that do not start on 16 bytes are loaded value by value, as is the end of a row.
#include <type_traits>

#include "bits.cuh"
#include "kernels.h"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 4;

template <class T>
constexpr int kVector = 16 / sizeof(T);
// Values of a row that a warp packs.
template <class T>
constexpr int64_t kSegment = int64_t{kSteps} * kWarp * kVector<T>;

template <class T>
struct alignas(16) Vector {
    typename Pattern<T>::Bits values[kVector<T>];
};

// V values from `column` on; those at k and past it do not exist, and get a pattern without any bit.
template <class T, bool Aligned>
__device__ __forceinline__ Vector<T> load(const T* row, int64_t column, int64_t k) {
    using Bits = typename Pattern<T>::Bits;
    if (Aligned && column + kVector<T> <= k) return *reinterpret_cast<const Vector<T>*>(row + column);
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
        vector.values[i] = column + i < k ? reinterpret_cast<const Bits*>(row)[column + i] : Bits{0};
    }
    return vector;
}

// The word that this lane's group of lanes shares, from each lane's V bits.
template <class T>
__device__ __forceinline__ uint32_t join(uint32_t bits) {
    constexpr int kLanes = 32 / kVector<T>;
    uint32_t word = bits << (kVector<T> * (threadIdx.x % kLanes));
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) word |= __shfl_xor_sync(kAllLanes, word, distance);
    return word;
}

template <class T, bool Strict, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    pack_rows(const T* x, int64_t m, int64_t k, int64_t stride, int64_t segments, double threshold,
              uint32_t* __restrict__ words, uint32_t* __restrict__ in_range, int32_t* __restrict__ popcounts) {
    constexpr int kLanes = 32 / kVector<T>;
    const int lane = threadIdx.x % kWarp;
    const int64_t item = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
    if (item >= m * segments) return;  // whole warps
    const int64_t row = item / segments, first = item % segments * kSegment<T> + int64_t{lane} * kVector<T>;
    const int64_t width = (k + 31) / 32;

    Vector<T> loaded[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        loaded[step] = load<T, Aligned>(x + row * stride, first + int64_t{step} * kWarp * kVector<T>, k);
    }
    int32_t count = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const int64_t column = first + int64_t{step} * kWarp * kVector<T>;
        uint32_t signs = 0, range = 0;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) {
            const auto bits = loaded[step].values[i];
            const bool exists = column + i < k;
            const bool set = Strict ? has_sign<T, false>(bits) : !has_sign<T, true>(bits);
            signs |= static_cast<uint32_t>(set && exists) << i;
            if (in_range) {
                const auto value = widen(bits, static_cast<T*>(nullptr));
                const auto limit = static_cast<std::remove_const_t<decltype(value)>>(threshold);
                range |= static_cast<uint32_t>((value < 0 ? -value : value) <= limit && exists) << i;
            }
        }
        const uint32_t word = join<T>(signs);
        const int64_t index = row * width + column / 32;
        const bool writes = lane % kLanes == 0 && column < k;
        if (writes) words[index] = word;
        if (writes) count += __popc(word);
        if (in_range) {
            const uint32_t range_word = join<T>(range);
            if (writes) in_range[index] = range_word;
        }
    }
    if (popcounts) {
#pragma unroll
        for (int distance = 1; distance < kWarp; distance *= 2) count += __shfl_xor_sync(kAllLanes, count, distance);
        if (lane == 0) atomicAdd(popcounts + row, count);  // integers: the order does not matter
    }
}

template <class T>
cudaError_t launch(const Pack& job, cudaStream_t stream) {
    const int64_t segments = ceil_div(job.k, kSegment<T>);
    const int64_t blocks = ceil_div(job.m * segments, kThreads / kWarp);
    const T* x = static_cast<const T*>(job.x);
    const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && job.stride * sizeof(T) % 16 == 0;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const auto kernel = job.strict ? (aligned ? pack_rows<T, true, true> : pack_rows<T, true, false>)
                                   : (aligned ? pack_rows<T, false, true> : pack_rows<T, false, false>);
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(x, job.m, job.k, job.stride, segments, job.threshold,
                                                                   job.words, job.in_range, job.popcounts);
    return cudaGetLastError();
}

}  // namespace

cudaError_t pack(const Pack& job, cudaStream_t stream) {
    if (job.m == 0 || job.k == 0) return cudaSuccess;
    switch (job.dtype) {
        case DType::float64: return launch<double>(job, stream);
        case DType::float32: return launch<float>(job, stream);
        case DType::float16: return launch<__half>(job, stream);
        case DType::bfloat16: return launch<__nv_bfloat16>(job, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace bitorch_qlinear::cuda
