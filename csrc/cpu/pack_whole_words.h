// The loop over a row in every instruction set's packing, which calls its signs(), in_range() and above() for 32 values.
#pragma once

// It is included after these two, inside the region of the instruction set.
#include "pack_portable.h"

namespace bitorch_qlinear {
namespace {

// How far ahead of the packed values memory is prefetched: a page, at whose end the processor's own prefetching stops.
// Packing 64 MiB that no cache holds takes 5.5 ms with it and 6.4 without (Intel Xeon with AVX-512; torch.sum 5.9), and
// as the first half of a product 6.1 and 8.8.
constexpr int64_t kPrefetchBytes = 4096, kLineBytes = 64;

// Packs whole words by vectors, and the last, partial one by the twin.
template <class T, bool Strict, bool InRange>
inline void pack_words(const T* x, int64_t k, double threshold, uint32_t* words, uint32_t* range_words) {
    const int64_t whole = k / kWordBits;
    for (int64_t w = 0; w < whole; ++w) {
        const T* from = x + w * kWordBits;
        for (int64_t at = 0; at < kWordBits * static_cast<int64_t>(sizeof(T)); at += kLineBytes) {
            __builtin_prefetch(reinterpret_cast<const uint8_t*>(from) + kPrefetchBytes + at);
        }
        words[w] = Strict ? signs<false>(from) : ~signs<true>(from);
        if (InRange) range_words[w] = in_range(from, threshold);
    }
    if (k % kWordBits) {
        pack_row_portable<T>(x + whole * kWordBits, k % kWordBits, Strict, threshold, words + whole,
                             InRange ? range_words + whole : nullptr);
    }
}

template <class T>
void pack_row_by_words(const void* row, int64_t k, bool strict, double threshold, uint32_t* words, uint32_t* in_range) {
    const T* x = static_cast<const T*>(row);
    if (in_range) {
        strict ? pack_words<T, true, true>(x, k, threshold, words, in_range)
               : pack_words<T, false, true>(x, k, threshold, words, in_range);
    } else {
        strict ? pack_words<T, true, false>(x, k, threshold, words, in_range)
               : pack_words<T, false, false>(x, k, threshold, words, in_range);
    }
}

// Packs levels like level_words_portable. Only NaN is not in the range up to infinity.
template <class T, int Bits>
inline bool pack_level_words(const T* x, int64_t k, uint32_t* planes, int64_t stride) {
    const int64_t whole = k / kWordBits;
    uint32_t numbers = ~uint32_t{0};
    for (int64_t w = 0; w < whole; ++w) {
        const T* from = x + w * kWordBits;
        const uint32_t first = above(from, level_limit<T>(Bits, 0));
        numbers &= in_range(from, kInfinity);
        if constexpr (Bits == 1) {
            planes[w] = first;
        } else {
            const uint32_t second = above(from, level_limit<T>(Bits, 1));
            planes[w] = (first & ~second) | above(from, level_limit<T>(Bits, 2));
            planes[stride + w] = second;
        }
    }
    bool nan = numbers != ~uint32_t{0};
    if (k % kWordBits) {
        const LevelWords words = level_words_portable(x + whole * kWordBits, k % kWordBits, Bits);
        planes[whole] = words.low;
        if constexpr (Bits == 2) planes[stride + whole] = words.high;
        nan |= words.nan;
    }
    return nan;
}

template <class T>
bool pack_levels_by_words(const void* row, int64_t k, int bits, uint32_t* planes, int64_t stride) {
    const T* x = static_cast<const T*>(row);
    return bits == 1 ? pack_level_words<T, 1>(x, k, planes, stride) : pack_level_words<T, 2>(x, k, planes, stride);
}

}  // namespace
}  // namespace bitorch_qlinear
