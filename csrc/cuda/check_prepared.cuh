// The kernels' check of the prepared form that they are given (prepared.h).
#pragma once

#include "kernels.h"
#include "prepared.h"
#ifdef __CUDACC__
#include "epilogue.cuh"
#endif

namespace bitorch_qlinear::cuda {

// The header's first 8 bytes as one number, because device code cannot read an array of constants as a constant.
static constexpr uint64_t magic_number() {
    uint64_t number = 0;
    for (int i = 0; i < 8; ++i) number |= uint64_t{static_cast<uint8_t>(kPreparedMagic[i])} << (8 * i);
    return number;
}
constexpr uint64_t kMagicNumber = magic_number();

#ifdef __CUDACC__
// Returns whether the weights come from a form that was prepared for another product, and reports it to the host. One
// thread of each block calls it.
__device__ __forceinline__ bool has_wrong_form(const Product& product) {
    if (!product.wrong_form) return false;
    const auto* header = reinterpret_cast<const PreparedHeader*>(product.weight.popcounts) - 1;
    // The fields lie in one sector, so the first load brings all of them into the L1 cache.
    const bool is_form =
        *reinterpret_cast<const uint64_t*>(header->magic) == kMagicNumber && header->layout == kPreparedLayout;
    if (is_form && header->n == product.n && header->k == product.k) return false;
    if (blockIdx.x == 0) {
        // Two kernels that report at the same time may mix their numbers, which only an error message shows.
        volatile WrongForm* report = product.wrong_form;
        report->n = product.n, report->k = product.k;
        report->form_n = is_form ? header->n : -1, report->form_k = is_form ? header->k : -1;
        __threadfence_system();
        report->seen = 1;
    }
    return true;
}

// Fills y[row ... row + rows)[column ... column + columns), as far as it exists, with what no product gives: NaN, the
// lowest int32, or, if outputs are bits, 0. All threads of the block call it. `column` is a multiple of 32 for bits.
template <class As>
__device__ __forceinline__ void write_no_result(const Product& product, int64_t row, int rows, int64_t column,
                                                int columns) {
    using Sum = typename As::Sum;
    constexpr int kEach = kBits<As> ? static_cast<int>(kWordBits) : 1;
    columns = (columns + kEach - 1) / kEach;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += static_cast<int>(blockDim.x)) {
        const int64_t m = row + i / columns, n = column + i % columns * kEach;
        if (m >= product.m || n >= product.n) continue;
        if constexpr (kBits<As>) {
            write_word(product, m, n, 0);
        } else if constexpr (std::is_same_v<Sum, int32_t>) {
            static_cast<int32_t*>(product.y.data)[m * product.n + n] = INT32_MIN;
        } else {
            narrow(static_cast<Sum>(__int_as_float(0x7FFFFFFF)),
                   static_cast<typename As::Out*>(product.y.data) + m * product.n + n);
        }
    }
}
#endif

}  // namespace bitorch_qlinear::cuda
