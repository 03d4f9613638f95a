// The kernels' check of the prepared form that they are given (prepared.h).
#pragma once

#include "kernels.h"
#include "prepared.h"

namespace bitorch_qlinear::cuda {

// The header's first 8 bytes as one number, because device code cannot read an array of constants as a constant.
static constexpr uint64_t magic_number() {
    uint64_t number = 0;
    for (int i = 0; i < 8; ++i) number |= uint64_t{static_cast<uint8_t>(kPreparedMagic[i])} << (8 * i);
    return number;
}
constexpr uint64_t kMagicNumber = magic_number();

#ifdef __CUDACC__
// Stops the kernel with an error if the weights were prepared for another product. One thread of a block calls it.
__device__ __forceinline__ void check_prepared(const PreparedHeader* header, int64_t n, int64_t k) {
    if (!header) return;
    const bool made_here = *reinterpret_cast<const uint64_t*>(header->magic) == kMagicNumber &&
                           header->layout == kPreparedLayout && header->n == n && header->k == k;
    if (!made_here) __trap();
}
#endif

}  // namespace bitorch_qlinear::cuda
