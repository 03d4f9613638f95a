// Tensor maps, by which one thread copies a box of a matrix in global memory to shared memory (CUDA driver API, "Tensor
// Map Object Management"). The driver writes a map on the host, and the kernel gets it as a parameter.
//
// The driver's function is looked up while the program runs, because linking the driver's library would make the
// import fail on machines without a driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "../packed.h"

namespace bitorch_qlinear::cuda {

// A row of a box: one line of 128 bytes, whose chunks of 16 bytes lie exchanged by the row's number modulo 8.
constexpr int64_t kLineBytes = 128, kLineWords = kLineBytes / kWordBytes, kLineBits = kLineBytes * 8;
// A box has at most as many rows, and coordinates are 32-bit integers.
constexpr int64_t kMostBoxRows = 256, kMostMapRows = INT32_MAX;

// A matrix of words in global memory: the first row on 16 bytes, rows a multiple of 16 bytes apart.
struct WordMatrix {
    const uint32_t* words;
    int64_t rows, width, stride;  // all at least 1; width and stride in words
};

using EncodeFunction = decltype(&cuTensorMapEncodeTiled);

// Returns the driver's function, or null. It is remembered once it has been found.
static inline EncodeFunction encode_function() {
    static std::atomic<EncodeFunction> known{nullptr};
    if (const EncodeFunction function = known.load(std::memory_order_relaxed)) return function;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();  // clears the error, before others see it
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
    known.store(reinterpret_cast<EncodeFunction>(found), std::memory_order_relaxed);
    return known.load(std::memory_order_relaxed);
}

// Makes the map of boxes of `box_rows` lines. Zeros are copied for the rows and words of a box that do not exist.
static inline cudaError_t encode(const WordMatrix& matrix, uint32_t box_rows, CUtensorMap* map) {
    const EncodeFunction function = encode_function();
    if (!function) return cudaErrorNotSupported;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.width), static_cast<cuuint64_t>(matrix.rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.stride * kWordBytes)};
    const cuuint32_t box[] = {kLineWords, box_rows}, steps[] = {1, 1};
    const auto result = function(map, CU_TENSOR_MAP_DATA_TYPE_UINT32, 2, const_cast<uint32_t*>(matrix.words), sizes,
                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace bitorch_qlinear::cuda
