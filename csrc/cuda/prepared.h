// The prepared form of the weights on CUDA, one for all kernels, and its size. This is plain C++, because a build
// without CUDA needs the size, too.
//
//     header | popcounts[n], padded with zeros to 16 bytes | aligned words[n], only if k is not a multiple of 128
//
// For other k the kernels read the interchange form's words, and a layer holds 1/32 of its float32 weights.
#pragma once

#include <cstdint>

#include "../packed.h"

namespace bitorch_qlinear::cuda {

// The layout's number. The CPU kernels' layouts (cpu/kernel.h) have numbers from 0 on.
constexpr uint32_t kPreparedLayout = 64;

// A row of the aligned form (kernels.h) holds a multiple of this many words.
constexpr int64_t kAlignedWords = 4;

static inline int64_t aligned_words_for(int64_t k) { return ceil_div(words_for(k), kAlignedWords) * kAlignedWords; }

static inline int64_t prepared_popcount_bytes(int64_t n) { return ceil_div(n, 4) * 16; }

static inline bool prepared_holds_words(int64_t k) { return k % (kAlignedWords * kWordBits) != 0; }

static inline int64_t prepared_bytes(int64_t n, int64_t k) {
    return static_cast<int64_t>(sizeof(PreparedHeader)) + prepared_popcount_bytes(n) +
           (prepared_holds_words(k) ? n * aligned_words_for(k) * kWordBytes : 0);
}

// What a kernel writes about a prepared form that was made for another product than its own, in memory that the host
// reads at its next call (wrong_form.h).
struct WrongForm {
    int64_t n, k;            // of the product
    int64_t form_n, form_k;  // of the form; -1 if it has no header of this layout
    uint32_t seen;           // whether the fields above hold a report; written last
    uint32_t padding;
};

}  // namespace bitorch_qlinear::cuda
