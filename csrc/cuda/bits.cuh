// Values and their bits in a thread.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../packed.h"

namespace bitorch_qlinear::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The unsigned integer of a floating type's size, and the pattern of its infinity.
template <class T>
struct Pattern;
template <>
struct Pattern<double> {
    using Bits = uint64_t;
    static constexpr Bits kInfinity = 0x7FF0000000000000u;
};
template <>
struct Pattern<float> {
    using Bits = uint32_t;
    static constexpr Bits kInfinity = 0x7F800000u;
};
template <>
struct Pattern<__half> {
    using Bits = uint16_t;
    static constexpr Bits kInfinity = 0x7C00u;
};
template <>
struct Pattern<__nv_bfloat16> {
    using Bits = uint16_t;
    static constexpr Bits kInfinity = 0x7F80u;
};

// v > 0, or v < 0 where Negative, by the pattern: 1 to infinity behind the sign. As on the CPU
// (cpu/bits.h), so that no mode for denormals matters.
template <class T, bool Negative>
__device__ __forceinline__ bool has_sign(typename Pattern<T>::Bits bits) {
    using Bits = typename Pattern<T>::Bits;
    constexpr Bits sign = Negative ? static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1)) : Bits{0};
    return static_cast<Bits>((bits ^ sign) - 1) < Pattern<T>::kInfinity;
}

__device__ __forceinline__ double widen(uint64_t bits, double*) {
    return __longlong_as_double(static_cast<long long>(bits));
}
__device__ __forceinline__ float widen(uint32_t bits, float*) { return __uint_as_float(bits); }
__device__ __forceinline__ float widen(uint16_t bits, __half*) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ float widen(uint16_t bits, __nv_bfloat16*) { return __uint_as_float(uint32_t{bits} << 16); }

}  // namespace bitorch_qlinear::cuda
