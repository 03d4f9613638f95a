// From sums of levels by weights to outputs. If a level has `bits` bits and L is the sum, then
//     y = narrow(T(L) * T(1 / steps) * T(scale) + T(bias))
// where each operation rounds once, and T and narrow() are those of epilogue.h. A row of x with NaN gives NaN.
#pragma once

#include <cstdint>
#include <limits>

#include "../epilogue.h"
#include "levels.h"

namespace bitorch_qlinear {
namespace {

// `count` outputs of a row from y[row][column] on.
struct LevelOutputs {
    const Output& y;
    int64_t row, column, count;
    int bits;
};

// With one bit the step is 1, and multiplying by it changes nothing.
template <class T, bool Scale, bool Bias, class Sum, class Out>
inline void write_levels(const Sum& sum_of, int64_t count, T step, const T* __restrict scale, const T* __restrict bias,
                         Out* __restrict out) {
    for (int64_t j = 0; j < count; ++j) {
        T value = static_cast<T>(sum_of(j)) * step;
        if (Scale) value *= scale[j];
        if (Bias) value += bias[j];
        narrow(value, out + j);
    }
}

template <class T, class Out, class Sum>
inline void write_levels(const LevelOutputs& outputs, bool nan, const Sum& sum_of) {
    const Output& y = outputs.y;
    const int64_t count = outputs.count;
    Out* out = static_cast<Out*>(y.data) + outputs.row * y.n + outputs.column;
    if (nan) {
        for (int64_t j = 0; j < count; ++j) narrow(std::numeric_limits<T>::quiet_NaN(), out + j);
        return;
    }
    const T* scale = y.scale ? static_cast<const T*>(y.scale) + outputs.column : nullptr;
    const T* bias = y.bias ? static_cast<const T*>(y.bias) + outputs.column : nullptr;
    const T step = T{1} / static_cast<T>(steps_of(outputs.bits));
    if (scale) {
        bias ? write_levels<T, true, true>(sum_of, count, step, scale, bias, out)
             : write_levels<T, true, false>(sum_of, count, step, scale, bias, out);
    } else {
        bias ? write_levels<T, false, true>(sum_of, count, step, scale, bias, out)
             : write_levels<T, false, false>(sum_of, count, step, scale, bias, out);
    }
}

// Writes outputs whose sums are sum_of(0), sum_of(1) ...
template <class Sum>
inline void write_levels(const LevelOutputs& outputs, bool nan, const Sum& sum_of) {
    switch (outputs.y.dtype) {
        case DType::float64: return write_levels<double, double>(outputs, nan, sum_of);
        case DType::float16: return write_levels<float, Half>(outputs, nan, sum_of);
        case DType::bfloat16: return write_levels<float, BFloat16>(outputs, nan, sum_of);
        default: return write_levels<float, float>(outputs, nan, sum_of);
    }
}

}  // namespace
}  // namespace bitorch_qlinear
