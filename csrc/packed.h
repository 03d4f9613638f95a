// The packed form: K values of +-1 in ceil(K/32) words of 32 bits along the last dimension.
//
// Bit i of word w is element 32 w + i, least significant bit first; 1 means +1. Bits past K are 0 in
// what this library writes, and every kernel masks the last word of what it reads, so stray bits
// never count. Words are uint32 bit patterns that torch holds as int32 (or uint32).
#pragma once

#include <cstdint>

namespace bitorch_qlinear {

constexpr int64_t kWordBits = 32;
constexpr int64_t kWordBytes = 4;
constexpr int64_t kLineWords = 16;  // in a cache line
// K and every partial sum K - 2 popcount fit in an int32.
constexpr int64_t kMaxValues = INT32_MAX;

static inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

static inline int64_t words_for(int64_t k) { return ceil_div(k, kWordBits); }

// Returns the mask of the valid bits of word `index` of a row of k values.
static inline uint32_t word_mask(int64_t index, int64_t k) {
    const int64_t valid = k - kWordBits * index;
    if (valid >= kWordBits) return ~uint32_t{0};
    return valid <= 0 ? 0 : (uint32_t{1} << valid) - 1;
}

// The beginning of the prepared form of the weights.
struct PreparedHeader {
    char magic[8];
    uint32_t layout;
    uint32_t reserved;
    int64_t n;
    int64_t k;
    char padding[32];
};
constexpr char kPreparedMagic[8] = {'b', 'i', 't', 'o', 'r', 'c', 'h', 'q'};
static_assert(sizeof(PreparedHeader) == 64, "the prepared form's header is one cache line");

}  // namespace bitorch_qlinear
