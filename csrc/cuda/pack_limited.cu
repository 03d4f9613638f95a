// Packs rows of floats by a limit for each of their values, as csrc/cpu/limits.h defines it; its twin is
// pack_limited_rows_portable (cpu/pack_portable.h).
//
// A warp packs a segment of a row, kWords words, whose values and limits are all loaded before the first is used. A
// lane has a value of each word, neighbouring values are in neighbouring lanes, and a ballot is the word. So rows and
// limits may begin at any value. The limits, which all rows share, come from a cache.
#include <type_traits>

#include "kernels.h"
#include "row_grid.cuh"
#include "sign_tests.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kWords = 8;

// Returns the place of a value's word (sign_tests.cuh) in the order of patterns, as a signed integer: the bits behind
// the sign of a negative value count downwards.
template <class Word>
__device__ __forceinline__ std::make_signed_t<Word> order(Word word) {
    using Signed = std::make_signed_t<Word>;
    const auto pattern = static_cast<Signed>(word);
    return pattern < 0 ? pattern ^ static_cast<Signed>(~Word{0} >> 1) : pattern;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) pack_limited_rows(const PackLimited job) {
    using Bits = typename Pattern<T>::Bits;
    using Word = typename Pattern<T>::Word;
    constexpr int kShift = 8 * (sizeof(Word) - sizeof(Bits));
    const int64_t row = row_of_warp(), width = word_count(job.k);
    if (row >= job.m) return;
    const int lane = lane_index();
    for (int64_t first = first_segment() * kWords; first < width; first += segment_step() * kWords) {
        const int64_t begin = first * kWordBits + lane;
        const int left = static_cast<int>(min(job.k - begin, int64_t{kWords} * kWordBits));
        const Bits* values = static_cast<const Bits*>(job.x) + row * job.stride + begin;
        const Bits* limits = static_cast<const Bits*>(job.limits) + begin;
        Bits value[kWords], limit[kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const bool exists = i * kWarp < left;
            value[i] = exists ? values[i * kWarp] : 0;
            limit[i] = exists ? limits[i * kWarp] : 0;
        }
        uint32_t words = 0;  // word i in lane i
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const Word v = Word{value[i]} << kShift;
            const bool reached = order(v) >= order(static_cast<Word>(Word{limit[i]} << kShift));
            const bool flipped = job.flips && first + i < width && job.flips[first + i] >> lane & 1;
            const bool is_nan = (v & ~kSignBit<T>) > Pattern<T>::kInfinity;
            const uint32_t word =
                __ballot_sync(kAllLanes, i * kWarp < left && (is_nan ? !job.strict : reached != flipped));
            if (lane == i) words = word;
        }
        if (lane < kWords && first + lane < width) job.words[row * width + first + lane] = words;
    }
}

template <class T>
cudaError_t launch(const PackLimited& job, cudaStream_t stream) {
    const int64_t segments = ceil_div(words_for(job.k), kWords);
    return launch_rows(pack_limited_rows<T>, job.m, segments, true, 0, stream, job);
}

}  // namespace

cudaError_t pack_limited(const PackLimited& job, cudaStream_t stream) {
    if (job.k == 0) return cudaSuccess;
    switch (job.dtype) {
        case DType::float64: return launch<double>(job, stream);
        case DType::float32: return launch<float>(job, stream);
        case DType::float16: return launch<__half>(job, stream);
        case DType::bfloat16: return launch<__nv_bfloat16>(job, stream);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace bitorch_qlinear::cuda
