// A matrix of real values as an operator's kernels read it, on any device.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace bitorch_qlinear {

// m rows of k contiguous values; the rows begin `stride` values apart.
struct Rows {
    const uint8_t* data;
    DType dtype;
    int64_t m, k, stride;

    const void* row(int64_t i) const { return data + i * stride * element_size(dtype); }
};

}  // namespace bitorch_qlinear
