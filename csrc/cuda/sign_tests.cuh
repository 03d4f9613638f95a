// Tests of floating values by their bit patterns.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace bitorch_qlinear::cuda {

// A floating type's pattern as it is stored (Bits), and moved up to fill a Word of 32 or 64 bits, the sign on top, so
// that one piece of code tests all types: the word of infinity, and the distance of neighbouring patterns.
// All tests are of integers, as on the CPU (cpu/pack_portable.h), so that no mode for denormals matters.
template <class T>
struct Pattern;
template <>
struct Pattern<double> {
    using Bits = uint64_t;
    using Word = uint64_t;
    static constexpr Word kInfinity = 0x7FF0000000000000u, kUnit = 1;
};
template <>
struct Pattern<float> {
    using Bits = uint32_t;
    using Word = uint32_t;
    static constexpr Word kInfinity = 0x7F800000u, kUnit = 1;
};
template <>
struct Pattern<__half> {
    using Bits = uint16_t;
    using Word = uint32_t;
    static constexpr Word kInfinity = 0x7C000000u, kUnit = 0x10000u;
};
template <>
struct Pattern<__nv_bfloat16> {
    using Bits = uint16_t;
    using Word = uint32_t;
    static constexpr Word kInfinity = 0x7F800000u, kUnit = 0x10000u;
};

template <class T>
constexpr typename Pattern<T>::Word kSignBit = ~(~typename Pattern<T>::Word{0} >> 1);

// Returns v > 0, or v < 0 if Negative: the pattern behind the sign is then at least a unit and at most infinity.
template <class T, bool Negative>
__device__ __forceinline__ bool has_sign(typename Pattern<T>::Word word) {
    return word - ((Negative ? kSignBit<T> : 0) + Pattern<T>::kUnit) < Pattern<T>::kInfinity;
}

__device__ __forceinline__ uint64_t word_of(double value, double*) {
    return static_cast<uint64_t>(__double_as_longlong(value));
}
__device__ __forceinline__ uint32_t word_of(double value, float*) { return __float_as_uint(static_cast<float>(value)); }
__device__ __forceinline__ uint32_t word_of(double value, __half*) {
    return uint32_t{__half_as_ushort(__float2half_rn(static_cast<float>(value)))} << 16;
}
__device__ __forceinline__ uint32_t word_of(double value, __nv_bfloat16*) {
    return __float_as_uint(static_cast<float>(value));  // the lower half is 0
}

// Returns the exclusive upper bound of the words with |v| <= threshold; NaN lies above it. The threshold is a value of
// T.
template <class T>
__device__ __forceinline__ typename Pattern<T>::Word range_limit(double threshold) {
    if (!(threshold >= 0)) return 0;
    return (word_of(threshold, static_cast<T*>(nullptr)) & ~kSignBit<T>)+Pattern<T>::kUnit;
}

}  // namespace bitorch_qlinear::cuda
