// How large the prepared form of the weights is on CUDA (check_prepared.cuh): plain C++, which a build without CUDA reads too.
#pragma once

#include <cstdint>

#include "../packed.h"

namespace bitorch_qlinear::cuda {

// Among the layouts of cpu/kernel.h's records, which count from 0.
constexpr uint32_t kPreparedLayout = 64;

// A row of the aligned form (kernels.h) holds a multiple of so many words.
constexpr int64_t kAlignedWords = 4;

static inline int64_t aligned_words_for(int64_t k) { return ceil_div(words_for(k), kAlignedWords) * kAlignedWords; }

static inline int64_t prepared_popcount_bytes(int64_t n) { return ceil_div(n, 4) * 16; }

static inline bool prepared_holds_words(int64_t k) { return k % (kAlignedWords * kWordBits) != 0; }

static inline int64_t prepared_bytes(int64_t n, int64_t k) {
    return static_cast<int64_t>(sizeof(PreparedHeader)) + prepared_popcount_bytes(n) +
           (prepared_holds_words(k) ? n * aligned_words_for(k) * kWordBytes : 0);
}

}  // namespace bitorch_qlinear::cuda
