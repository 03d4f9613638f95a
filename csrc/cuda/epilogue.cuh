// From popcounts to outputs, as csrc/epilogue.h derives it: y = narrow(T(k - 2 popcount) * T(scale) + T(bias)), each
// operation rounded once, where popcount is that of a ^ b. A kernel that counts a & b has
//     popcount(a ^ b) = popcount(a) + popcount(b) - 2 popcount(a & b).
// Everything is unsigned, modulo 2^32, so the sum may exceed 2^31 on its way; k - 2 popcount itself fits in an int32.
//
// An output may instead be a bit, (popcount <= limit) XOR flip, and the bits of 32 neighbouring columns are a word of
// y. One warp makes all comparisons of a word and its lanes exchange the results, so that each word is written once, by
// one thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels.h"
#include "warp.cuh"

namespace bitorch_qlinear::cuda {

__device__ __forceinline__ void narrow(int32_t value, int32_t* out) { *out = value; }
__device__ __forceinline__ void narrow(double value, double* out) { *out = value; }
__device__ __forceinline__ void narrow(float value, float* out) { *out = value; }
__device__ __forceinline__ void narrow(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// Narrows two neighbouring outputs. One instruction narrows a pair of floats to a half type.
template <class Sum, class Out>
__device__ __forceinline__ void narrow_pair(Sum first, Sum second, Out* out) {
    narrow(first, out);
    narrow(second, out + 1);
}
__device__ __forceinline__ void narrow_pair(float first, float second, __half* out) {
    const __half2 pair = __floats2half2_rn(first, second);
    out[0] = pair.x, out[1] = pair.y;
}
__device__ __forceinline__ void narrow_pair(float first, float second, __nv_bfloat16* out) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    out[0] = pair.x, out[1] = pair.y;
}

// Without the intrinsics nvcc would contract the two into one fused multiply-add, rounded once.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }

// One output type of the kernels, with its T. The kernels are templates of it, because a switch on the type at
// each output made nvcc 13.0 compile for more than ten minutes.
template <class OutT, class SumT>
struct As {
    using Out = OutT;
    using Sum = SumT;
};

// The output type Bit is not stored: outputs of that type are the bits of words.
struct Bit {};
using AsBits = As<Bit, int32_t>;
template <class As>
constexpr bool kBits = std::is_same_v<typename As::Out, Bit>;

// Returns the bits of channels[column], which must exist. Nothing waits for the load before the bits are converted.
__device__ __forceinline__ uint64_t channel_bits(const Channels& channels, int64_t column) {
    if (channels.dtype == DType::float64) return static_cast<const uint64_t*>(channels.data)[column];
    if (channels.dtype == DType::float32) return static_cast<const uint32_t*>(channels.data)[column];
    return static_cast<const uint16_t*>(channels.data)[column];
}

// Returns T(channels[column]) from its bits, or `absent` if there are no channels.
template <class Sum>
__device__ __forceinline__ Sum channel(const Channels& channels, uint64_t bits, Sum absent) {
    if (!channels.data) return absent;
    switch (channels.dtype) {
        case DType::float64: return static_cast<Sum>(__longlong_as_double(static_cast<long long>(bits)));
        case DType::float32: return static_cast<Sum>(__uint_as_float(static_cast<uint32_t>(bits)));
        case DType::float16: return static_cast<Sum>(__half2float(__ushort_as_half(static_cast<uint16_t>(bits))));
        default: return static_cast<Sum>(__bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(bits))));
    }
}

// Scale and bias of a block's columns, as T, in shared memory, converted once by one piece of code. (With the
// conversion at each use, the switch above made nvcc compile gemm_popc for 20 seconds instead of one.)
template <class As, int Width>
struct ChannelTile {
    using Sum = typename As::Sum;
    static constexpr bool kHasChannels = !std::is_same_v<Sum, int32_t>;
    Sum scale[Width], bias[Width];

    // Those of one column, in registers.
    struct Early {
        uint64_t scale, bias;
        bool exists;

        // Loads those of column first + i.
        __device__ __forceinline__ void fetch(const Output& y, int64_t n, int64_t first, int i) {
            if constexpr (kHasChannels) {
                exists = first + i < n;
                scale = exists && y.scale.data ? channel_bits(y.scale, first + i) : 0;
                bias = exists && y.bias.data ? channel_bits(y.bias, first + i) : 0;
            }
        }
        __device__ __forceinline__ void store(const Output& y, int i, ChannelTile& tile) const {
            if constexpr (kHasChannels) {
                // x * 1 is x and x + (-0) is x, to the bit, so a missing scale or bias needs no case of its own.
                tile.scale[i] = exists ? channel<Sum>(y.scale, scale, Sum{1}) : Sum{1};
                tile.bias[i] = exists ? channel<Sum>(y.bias, bias, -Sum{0}) : -Sum{0};
            }
        }
    };

    // All of these threads must call it, and reach a barrier before the first use.
    __device__ __forceinline__ void load(const Output& y, int64_t n, int64_t first,
                                         int thread = static_cast<int>(threadIdx.x),
                                         int threads = static_cast<int>(blockDim.x)) {
        if constexpr (kHasChannels) {
#pragma unroll 1
            for (int i = thread; i < Width; i += threads) {
                Early channels;
                channels.fetch(y, n, first, i);
                channels.store(y, i, *this);
            }
        }
    }
};

// Limits and flips of a block's columns, which begin at a multiple of 32, in shared memory.
template <int Width>
struct ChannelTile<AsBits, Width> {
    static_assert(Width % kWordBits == 0, "a block writes whole words");
    int32_t limits[Width];
    uint32_t flips[Width / kWordBits];

    // Nothing is within the limit of a column that does not exist, so its bit is 0. Its popcount may be less than 0 in
    // a kernel that multiplies another column's weights in its place, but does not add their set bits.
    static __device__ __forceinline__ int32_t limit_of(const Output& y, int64_t n, int64_t column) {
        const auto* all_limits = static_cast<const int32_t*>(y.scale.data);
        return column < n ? all_limits[column] : INT32_MIN;
    }

    // Returns word i of the flips of the columns from `first` on.
    static __device__ __forceinline__ uint32_t flips_of(const Output& y, int64_t n, int64_t first, int i) {
        const auto* all_flips = static_cast<const uint32_t*>(y.bias.data);
        const int64_t left = n - first - kWordBits * i;
        const uint32_t exist = valid_bits(left < kWordBits ? static_cast<int>(left) : kWordBits);
        return all_flips && exist ? all_flips[first / kWordBits + i] & exist : 0;
    }

    // The limit of one column and, for the first columns, the flips of one word, in registers.
    struct Early {
        int32_t limit;
        uint32_t flips;

        // Loads the limit of column first + i, and word i of the block's flips.
        __device__ __forceinline__ void fetch(const Output& y, int64_t n, int64_t first, int i) {
            limit = limit_of(y, n, first + i);
            flips = i < Width / static_cast<int>(kWordBits) ? flips_of(y, n, first, i) : 0;
        }
        __device__ __forceinline__ void store(const Output&, int i, ChannelTile& tile) const {
            tile.limits[i] = limit;
            if (i < Width / static_cast<int>(kWordBits)) tile.flips[i] = flips;
        }
    };

    // All of these threads must call it, and reach a barrier before the first use. It does not go through Early, which
    // takes more registers.
    __device__ __forceinline__ void load(const Output& y, int64_t n, int64_t first,
                                         int thread = static_cast<int>(threadIdx.x),
                                         int threads = static_cast<int>(blockDim.x)) {
        for (int i = thread; i < Width; i += threads) limits[i] = limit_of(y, n, first + i);
        if (thread < Width / kWordBits) flips[thread] = flips_of(y, n, first, thread);
    }
};

// Returns an output before it is narrowed, from the popcount of a ^ b.
template <class Sum>
__device__ __forceinline__ Sum output(int64_t k, uint32_t popcount, Sum scale, Sum bias) {
    const int32_t dot = static_cast<int32_t>(static_cast<uint32_t>(k) - 2 * popcount);
    if constexpr (std::is_same_v<Sum, int32_t>) {
        return dot;
    } else {
        return add(multiply(static_cast<Sum>(dot), scale), bias);
    }
}

// An integer vector of this many bytes, which is stored at once. (nvcc 13.0 splits stores of a struct of outputs.)
template <int Size>
struct Bytes;
template <>
struct Bytes<2> {
    using Type = unsigned short;
};
template <>
struct Bytes<4> {
    using Type = unsigned int;
};
template <>
struct Bytes<8> {
    using Type = uint2;
};
template <>
struct Bytes<16> {
    using Type = uint4;
};

// Writes y[row][column .. column + Count), as far as it exists, from popcounts of a ^ b; `scale` and `bias` are those
// of its columns, in a ChannelTile. Stores are 16 bytes wide if `whole_vectors`, which requires rows that start on 16
// bytes.
template <class As, int Count>
__device__ __forceinline__ void write_outputs(const Output& y, int64_t n, int64_t k, int64_t row, int64_t column,
                                              bool whole_vectors, const uint32_t (&popcounts)[Count],
                                              const typename As::Sum* scale, const typename As::Sum* bias) {
    using Out = typename As::Out;
    constexpr int kVector = Count * sizeof(Out) < 16 ? Count : 16 / static_cast<int>(sizeof(Out));
    static_assert(Count % kVector == 0 && (kVector & (kVector - 1)) == 0, "columns must fill whole vectors");
    using Vector = typename Bytes<kVector * sizeof(Out)>::Type;
    Out* out = static_cast<Out*>(y.data) + row * n + column;
#pragma unroll
    for (int first = 0; first < Count; first += kVector) {
        Out values[kVector];
#pragma unroll
        for (int j = 0; j < kVector; j += 2) {
            const auto value = [&](int i) { return output(k, popcounts[i], scale[i], bias[i]); };
            if constexpr (kVector == 1) {
                narrow(value(first), values);
            } else {
                narrow_pair(value(first + j), value(first + j + 1), values + j);
            }
        }
        if (whole_vectors && column + first + kVector <= n) {
            Vector vector;
            memcpy(&vector, values, sizeof vector);
            __stwb(reinterpret_cast<Vector*>(out + first), vector);
        } else {
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                if (column + first + j < n) out[first + j] = values[j];
            }
        }
    }
}

// Returns an output that is a bit, before it is flipped, from the popcount of a ^ b.
__device__ __forceinline__ bool within(uint32_t popcount, int32_t limit) {
    return static_cast<int32_t>(popcount) <= limit;
}

// Writes the bits of y[row][column ... column + 31], where column is a multiple of 32, if that word exists.
__device__ __forceinline__ void write_word(const Product& product, int64_t row, int64_t column, uint32_t word) {
    if (row < product.m && column < product.n) {
        static_cast<uint32_t*>(product.y.data)[row * word_count(product.n) + column / kWordBits] = word;
    }
}

// Writes the same from the popcount that each lane of a warp has for its column of them.
__device__ __forceinline__ void write_row_of_warp(const Product& product, int64_t row, int64_t column,
                                                  uint32_t popcount, const ChannelTile<AsBits, kWarp>& channels) {
    const int lane = lane_index();
    const uint32_t ones = __ballot_sync(kAllLanes, within(popcount, channels.limits[lane]));
    if (lane == 0) write_word(product, row, column, ones ^ channels.flips[0]);
}

// Returns whether every row of y starts on 16 bytes. Kernels that write bits, which are not stored as vectors, ignore
// it.
static inline bool rows_on_16_bytes(const Output& y, int64_t n) {
    return reinterpret_cast<uintptr_t>(y.data) % 16 == 0 && n * element_size(y.dtype) % 16 == 0;
}

// Calls function(As<...>) for the output's type.
template <class Function>
cudaError_t with_output_type(DType dtype, Function function) {
    switch (dtype) {
        case DType::float64: return function(As<double, double>{});
        case DType::float32: return function(As<float, float>{});
        case DType::float16: return function(As<__half, float>{});
        case DType::bfloat16: return function(As<__nv_bfloat16, float>{});
        case DType::int32: return function(As<int32_t, int32_t>{});
        case DType::boolean: return function(AsBits{});
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace bitorch_qlinear::cuda
