// From popcounts to outputs, as epilogue.h derives it: y = narrow(T(k - 2 popcount) * T(scale) + T(bias)),
// each operation rounded once.
#pragma once

#include <type_traits>

#include "bits.cuh"
#include "kernels.h"

namespace bitorch_qlinear::cuda {

__device__ __forceinline__ void narrow(double value, double* out) { *out = value; }
__device__ __forceinline__ void narrow(float value, float* out) { *out = value; }
__device__ __forceinline__ void narrow(float value, __half* out) { *out = __float2half_rn(value); }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* out) { *out = __float2bfloat16_rn(value); }

// Without the intrinsics nvcc would contract the two into one fused multiply-add, rounded once.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }

// One output type of the kernels, with its T. The kernels are templates of it: a switch on the type at
// each output made nvcc 13.0 compile for more than ten minutes.
template <class OutT, class SumT>
struct As {
    using Out = OutT;
    using Sum = SumT;
};

template <class As>
__device__ __forceinline__ void write_output(const Output& y, int64_t row, int64_t column, int32_t popcount) {
    using Sum = typename As::Sum;
    const int32_t dot = y.k - popcount - popcount;
    auto* out = static_cast<typename As::Out*>(y.data) + row * y.n + column;
    if constexpr (std::is_same_v<Sum, int32_t>) {
        *out = dot;
    } else {
        Sum value = static_cast<Sum>(dot);
        if (y.scale) value = multiply(value, static_cast<const Sum*>(y.scale)[column]);
        if (y.bias) value = add(value, static_cast<const Sum*>(y.bias)[column]);
        narrow(value, out);
    }
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
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace bitorch_qlinear::cuda
