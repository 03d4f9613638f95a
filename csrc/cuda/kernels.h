// The CUDA kernels' launchers: raw pointers, sizes and a stream; no torch. Each returns the launch's
// error, allocates nothing and does not synchronize.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../epilogue.h"

namespace bitorch_qlinear::cuda {

// Rows of x to packed words; the twin that says what it computes is pack_row_portable (cpu/bits.h).
struct Pack {
    const void* x;  // m rows of k contiguous values, `stride` values apart
    DType dtype;
    int64_t m, k, stride;
    bool strict;
    double threshold;    // representable in dtype
    uint32_t* words;     // [m][words_for(k)]
    uint32_t* in_range;  // the same, or null
    int32_t* popcounts;  // [m], zero before the launch, or null: the set bits of each row of words
};
cudaError_t pack(const Pack&, cudaStream_t);

// One product. y as in Output (epilogue.h): bias and scale hold n values of T, or are null.
struct Product {
    const uint32_t* x;       // [m][words_for(k)]
    const uint32_t* weight;  // [n][words_for(k)]
    int64_t m, n, k;
    Output y;
};
cudaError_t gemm_popc(const Product&, cudaStream_t);

}  // namespace bitorch_qlinear::cuda
