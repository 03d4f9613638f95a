// Unpacks words of the interchange form to values: unpack_row_portable (cpu/pack_portable.h) defines what it computes.
//
// The types differ only in size and in the patterns of bit 0 and bit 1, so the kernels are given only these. As in
// pack.cu a warp takes a segment of a row, kSteps steps of 512 bytes; in a step it reads V words, each by 32 / V lanes,
// and a lane writes 16 bytes, that is V values:
//
//     rows on 16 bytes   one store of V neighbours
//     other rows         V stores, each of a word's 32 values by the 32 lanes
//
// The limit is writing, 1 to 8 bytes for a bit. By estimate, not measured, a warp has 42 to 56 instructions (of PTX)
// for 512 bytes, and an SM of an H200 issues about 100 in the time that its share of the memory takes. For other rows
// there are 46 to 116, and 211 for one-byte values, which reach half of the memory's rate.
#include <type_traits>

#include "kernels.h"
#include "row_grid.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kSteps = 4;

// Values that a lane holds in a step, which is also how many words the warp reads; and the lanes of a word.
template <class Value>
constexpr int kVector = 16 / sizeof(Value);
template <class Value>
constexpr int kLanes = kWarp / kVector<Value>;

// Unsigned values of one size, as many as a register holds: value i is zero ^ bit i * difference.
template <class Value>
struct Patterns {
    using Register = std::conditional_t<sizeof(Value) == 8, uint64_t, uint32_t>;
    static constexpr int kSize = 8 * sizeof(Value), kCount = sizeof(Register) / sizeof(Value);

    Register zero, difference;

    // A bit for each value of the register, `distance` apart.
    __host__ __device__ static constexpr Register each(int distance) {
        Register bits = 0;
        for (int i = 0; i < kCount; ++i) bits |= Register{1} << (i * distance);
        return bits;
    }

    Patterns(Value bit0, Value bit1) : zero(bit0 * each(kSize)), difference(bit0 ^ bit1) {}

    // The product puts bit i at i + j (kSize - 1) for every j, all of them different, and i kSize is j = i.
    __device__ __forceinline__ Register values(uint32_t bits) const {
        constexpr Register kFactor = each(kSize - 1), kMask = each(kSize);
        const Register spread = Register{bits & ((1u << kCount) - 1)} * kFactor & kMask;
        return zero ^ spread * difference;
    }
};

// Stores 16 bytes, made from the lowest bits. asm is used because nvcc 13.0 splits some of these stores into two.
template <class Value>
__device__ __forceinline__ void store(Value* out, uint32_t bits, const Patterns<Value>& patterns) {
    constexpr int kCount = Patterns<Value>::kCount;
    if constexpr (sizeof(Value) == 8) {
        __stwb(reinterpret_cast<ulonglong2*>(out), {patterns.values(bits), patterns.values(bits >> 1)});
    } else {
        __stwb(reinterpret_cast<uint4*>(out),
               {patterns.values(bits), patterns.values(bits >> kCount), patterns.values(bits >> 2 * kCount),
                patterns.values(bits >> 3 * kCount)});
    }
}

// Writes a lane's part of a step, of whose values `left` exist, from the word of its group of lanes.
template <class Value, bool Whole>
__device__ __forceinline__ void write_step(uint32_t word, int left, const Patterns<Value>& patterns, Value* out) {
    const int lane = lane_index();
    if constexpr (Whole) {
        word >>= kVector<Value> * (lane % kLanes<Value>);
        if (lane * kVector<Value> < left) store(out + lane * kVector<Value>, word, patterns);
    } else {
#pragma unroll
        for (int i = 0; i < kVector<Value>; ++i) {
            const uint32_t shared = __shfl_sync(kAllLanes, word, i * kLanes<Value>);
            const int column = i * kWarp + lane;
            if (column < left) out[column] = static_cast<Value>(patterns.values(shared >> lane & 1));
        }
    }
}

template <class Value, bool Whole>
__global__ void __launch_bounds__(kRowThreads) unpack_rows(const Unpack job, const Patterns<Value> patterns) {
    constexpr int kWords = kSteps * kVector<Value>, kStep = kVector<Value> * kWarp;
    const int64_t row = row_of_warp(), width = word_count(job.k);
    if (row >= job.m) return;
    for (int64_t first = first_segment() * kWords; first < width; first += segment_step() * kWords) {
        const int values = static_cast<int>(min(job.k - first * kWordBits, int64_t{kWords} * kWordBits));
        const uint32_t* from = job.words + row * width + first;
        Value* out = static_cast<Value*>(job.values) + row * job.k + first * kWordBits;
        uint32_t words[kSteps];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int index = step * kVector<Value> + lane_index() / kLanes<Value>;
            words[step] = index * kWarp < values ? from[index] : 0;
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            if (step * kStep >= values) break;  // the whole warp
            write_step<Value, Whole>(words[step], values - step * kStep, patterns, out + step * kStep);
        }
    }
}

template <class Value>
cudaError_t launch(const Unpack& job, Value bit0, Value bit1, cudaStream_t stream) {
    const bool whole = reinterpret_cast<uintptr_t>(job.values) % 16 == 0 && job.k % kVector<Value> == 0;
    const int64_t segments = ceil_div(words_for(job.k), kSteps * kVector<Value>);
    return launch_rows(whole ? unpack_rows<Value, true> : unpack_rows<Value, false>, job.m, segments, true, 0, stream,
                       job, Patterns<Value>(bit0, bit1));
}

}  // namespace

cudaError_t unpack(const Unpack& job, cudaStream_t stream) {
    if (job.k == 0) return cudaSuccess;
    switch (job.dtype) {
        case DType::float64: return launch<uint64_t>(job, 0xBFF0000000000000u, 0x3FF0000000000000u, stream);
        case DType::float32: return launch<uint32_t>(job, 0xBF800000u, 0x3F800000u, stream);
        case DType::float16: return launch<uint16_t>(job, 0xBC00u, 0x3C00u, stream);
        case DType::bfloat16: return launch<uint16_t>(job, 0xBF80u, 0x3F80u, stream);
        case DType::int32: return launch<uint32_t>(job, 0xFFFFFFFFu, 1u, stream);
        case DType::int8: return launch<uint8_t>(job, 0xFFu, 1u, stream);
        case DType::boolean: return launch<uint8_t>(job, 0u, 1u, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace bitorch_qlinear::cuda
