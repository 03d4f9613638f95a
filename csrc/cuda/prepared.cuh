// The prepared form of the weights on CUDA, one for all kernels:
//
//     header | popcounts[n], padded with zeros to 16 bytes | aligned words[n], only where k is no multiple of 128
//
// (elsewhere the kernels read the interchange form's words, and a layer holds 1/32 of its float32 weights).
#pragma once

#include "kernels.h"

namespace bitorch_qlinear::cuda {

// Among the layouts of cpu/kernel.h's records, which count from 0.
constexpr uint32_t kPreparedLayout = 64;

static inline int64_t prepared_popcount_bytes(int64_t n) { return ceil_div(n, 4) * 16; }

static inline bool prepared_holds_words(int64_t k) { return k % (kAlignedWords * kWordBits) != 0; }

static inline int64_t prepared_bytes(int64_t n, int64_t k) {
    return static_cast<int64_t>(sizeof(PreparedHeader)) + prepared_popcount_bytes(n) +
           (prepared_holds_words(k) ? n * aligned_words_for(k) * kWordBytes : 0);
}

#ifdef __CUDACC__
// Stops the kernel with an error if the weights were prepared for another product. One thread of a block asks.
__device__ __forceinline__ void check_prepared(const PreparedHeader* header, int64_t n, int64_t k) {
    if (!header) return;
    bool made_here = header->layout == kPreparedLayout && header->n == n && header->k == k;
#pragma unroll
    for (int i = 0; i < 8; ++i) made_here &= header->magic[i] == kPreparedMagic[i];
    if (!made_here) __trap();
}
#endif

}  // namespace bitorch_qlinear::cuda
