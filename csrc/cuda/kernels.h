// The CUDA kernels' launchers, which take raw pointers, sizes and a stream, and know no torch. Each returns the
// launch's error, allocates nothing, does not synchronize, and may be captured in a graph.
//
// Words come in two forms, both row-major:
//   interchange  words_for(k) words a row; bits past k may be anything, and kernels mask them
//   aligned      aligned_words_for(k) words a row, every bit past k zero, the first row on 16 bytes: rows can be read
//                16 bytes at a time, and what a kernel reads past k adds nothing to a popcount of AND or XOR
// If k is a multiple of 128 and the tensor starts on 16 bytes, the interchange form is the aligned one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../dtype.h"
#include "../packed.h"
#include "heuristics.h"
#include "prepared.h"

namespace bitorch_qlinear::cuda {

// Packs rows of x into words; its twin, which defines what it computes, is pack_row_portable (cpu/pack_portable.h).
struct Pack {
    const void* x;  // m rows of k contiguous values, `stride` values apart
    DType dtype;
    int64_t m, k, stride;
    bool strict;
    double threshold;  // representable in dtype
    uint32_t* words;   // [m][word_stride], word_stride >= words_for(k); every bit past k becomes zero
    int64_t word_stride;
    uint32_t* in_range;  // [m][words_for(k)], or null
    int32_t* popcounts;  // [m] set bits of each row of words, or null
};

// Packs rows of x by a limit for each value; csrc/cpu/limits.h says what it computes.
struct PackLimited {
    const void* x;  // m rows of k contiguous values, `stride` values apart
    DType dtype;
    int64_t m, k, stride;
    bool strict;
    const void* limits;     // [k] of the same type
    const uint32_t* flips;  // [words_for(k)], or null
    uint32_t* words;        // [m][words_for(k)]; every bit past k becomes zero
};
cudaError_t pack_limited(const PackLimited&, cudaStream_t);

// Unpacks words of the interchange form to values: +-1 of a float type, int32 or int8; for boolean the bits themselves.
struct Unpack {
    const uint32_t* words;  // [m][words_for(k)]
    int64_t m, k;
    void* values;  // [m][k]
    DType dtype;
};
cudaError_t unpack(const Unpack&, cudaStream_t);

// Copies words of the interchange form to the aligned one, and counts the set bits of each row without those past k.
struct Align {
    const uint32_t* words;  // [m][words_for(k)]
    int64_t m, k;
    uint32_t* aligned;       // [m][aligned_words_for(k)], or null: only count
    int32_t* popcounts;      // [m]
    PreparedHeader* header;  // where to write that these are m prepared weights of k values, or null
};

// Both launch once, also for the second job, which must have no header; one of no rows is none. So a product of
// words that have not been counted needs one launch before it, not two.
constexpr Align kNoAlign{};
cudaError_t pack(const Pack&, const Align& beside, cudaStream_t);
cudaError_t align(const Align&, const Align& other, cudaStream_t);

// Finds the compute capability that the kernels were compiled for in the code which the current device runs, such as 80
// for 8.0. All kernels are compiled for the same targets. It loads code, but launches nothing.
cudaError_t find_code(int* capability);

// One factor of a product.
struct Operand {
    const uint32_t* words;
    int64_t stride;            // words from row to row
    const int32_t* popcounts;  // set bits of each row, or null; read by the kernels whose record says so
};

// n values of a float type, contiguous, or null.
struct Channels {
    const void* data;
    DType dtype;
};

// y[m][n], contiguous; epilogue.cuh defines each output. With dtype boolean the outputs are bits: y is words
// [m][words_for(n)], `scale` has n limits (int32), and `bias` has words_for(n) words of flips or is null. They share
// fields because nvcc 13.0 takes a Product of 16 more bytes no longer apart into registers, but reads its fields from
// parameter memory wherever a kernel uses them.
struct Output {
    void* data;
    DType dtype;
    Channels scale, bias;
};

// y = x . weight^T. If the weights or their popcounts are taken from a prepared form, `wrong_form` is where kernels
// report a form of another product, and weight.popcounts must be the form's, because its header lies before them;
// otherwise it is null. The host cannot read the header without waiting for the device, so every kernel that uses the
// form compares its n, k and layout, and writes no result if they are wrong (check_prepared.cuh).
struct Product {
    Operand x, weight;
    int64_t m, n, k;
    Output y;
    WrongForm* wrong_form;
};

// Rows of real x, which a fused kernel packs itself.
struct RealRows {
    const void* data;  // m rows of k contiguous values, `stride` values apart
    DType dtype;
    int64_t stride;
    bool strict;
};

// A product of real x. `product` has all but x: its x and the popcounts of its weights are not read. A block of a fused
// kernel needs all of x packed, which takes time, so there should be no more blocks than multiprocessors.
struct FusedProduct {
    Product product;
    RealRows x;
    int multiprocessors;
};

// Returns whether both operands are in the aligned form, as far as addresses and strides tell.
static inline bool are_aligned(const Product& product) {
    const auto is_aligned = [&](const Operand& operand) {
        return reinterpret_cast<uintptr_t>(operand.words) % 16 == 0 && operand.stride % kAlignedWords == 0 &&
               operand.stride >= aligned_words_for(product.k);
    };
    return is_aligned(product.x) && is_aligned(product.weight);
}

static inline bool have_popcounts(const Product& product) { return product.x.popcounts && product.weight.popcounts; }

// Operands in the interchange form (or the aligned one, which is a case of it), any m, n, k and compute capability.
cudaError_t gemm_popc(const Product&, cudaStream_t);

// The other kernels read the aligned form, and return cudaErrorInvalidValue for operands or sizes that they do not
// take.
//
// With `starts_early` a product may start while the kernel before it in the stream still runs, which must be a pack or
// an align that makes x and may count the weights' set bits, but not align their words (launch.cuh; compute capability
// 9.0).
cudaError_t gemm_skinny(const Product&, cudaStream_t, bool starts_early = false);  // any capability; without popcounts
cudaError_t gemm_skinny_mma_sm80(const Product&, cudaStream_t, bool starts_early = false);  // 8.0 to 9.0; the same
cudaError_t gemm_mma_sm80(const Product&, Tile, cudaStream_t, bool starts_early = false);   // capability 8.0 to 9.0
cudaError_t gemm_mma_int8_sm80(const Product&, cudaStream_t, bool starts_early = false);    // capability 8.0 and later
cudaError_t gemm_wgmma_sm90a(const Product&, WarpgroupTile, cudaStream_t, bool starts_early = false);  // capability 9.0
cudaError_t gemm_mma_sm75(const Product&, cudaStream_t);  // capability 7.5 to 8.9; without popcounts

// The fused kernels pack x in the launch of the product; the one of clusters leaves it to fused_skinny_mma_sm80 if the
// device has no room for a cluster. They return cudaErrorInvalidValue for weights that are not in the aligned form and
// for sizes that they do not take (fits_fused in records.h).
cudaError_t gemm_fused_skinny(const FusedProduct&, cudaStream_t);           // any compute capability; up to 4 rows
cudaError_t gemm_fused_skinny_mma_sm80(const FusedProduct&, cudaStream_t);  // compute capability 8.0 to 9.0
cudaError_t gemm_fused_cluster_sm90(const FusedProduct&, cudaStream_t);     // compute capability 9.0

}  // namespace bitorch_qlinear::cuda
