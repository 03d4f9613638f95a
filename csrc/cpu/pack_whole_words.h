// The loops over rows in every instruction set's packing, which call its functions for 32 values: signs(), in_range()
// and above(), or Limits, NanTest and nans().
#pragma once

// It is included after them, inside the region of the instruction set.
#include "pack_portable.h"
#include "target.h"

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

// How many rows are compared with limits that are in registers. For 64 rows of 1024 float32 in L2 the time is 2.6 times
// that of plain packing with one row, 1.9 with two and 1.6 with four or eight (AVX-512); eight are slower from memory.
constexpr int kRowsTogether = 4;

// Packs words [begin, end) of so many rows by their limits, and prefetches so many bytes ahead. NaNs are rare, so the
// words are made as if there were none, and are mended if there are.
template <class T, int Rows>
inline void pack_limited_words(const LimitedRows& job, int64_t row, int64_t begin, int64_t end, int64_t ahead) {
    const int64_t width = words_for(job.k);
    const T* x = static_cast<const T*>(job.x) + row * job.stride + begin * kWordBits;
    uint32_t* words = job.words + row * width + begin;
    for (int64_t w = begin; w < end; ++w, x += kWordBits, ++words) {
        const Limits<T> limits(static_cast<const T*>(job.limits) + w * kWordBits);
        const uint32_t flips = job.flips ? job.flips[w] : 0;
        NanTest<T> nan_test;
        BITORCH_QLINEAR_UNROLL
        for (int r = 0; r < Rows; ++r) {
            const T* from = x + r * job.stride;
            for (int64_t at = 0; at < kWordBits * static_cast<int64_t>(sizeof(T)); at += kLineBytes) {
                __builtin_prefetch(reinterpret_cast<const uint8_t*>(from) + ahead + at);
            }
            nan_test.add(from);
            words[r * width] = limits.reached_by(from) ^ flips;
        }
        if (__builtin_expect(nan_test.found(), false)) {
            for (int r = 0; r < Rows; ++r) {
                const uint32_t found = nans(x + r * job.stride);
                words[r * width] = job.strict ? words[r * width] & ~found : words[r * width] | found;
            }
        }
    }
}

// Packs the whole words of so many rows. What lies ahead of a row's end is the beginning of the next row, which is
// packed at the same time. What is packed next begins behind all rows, so that is prefetched there.
template <class T, int Rows>
inline void pack_limited_rows_together(const LimitedRows& job, int64_t row) {
    constexpr int64_t kAhead = kPrefetchBytes / (kWordBits * static_cast<int64_t>(sizeof(T)));
    const int64_t whole = job.k / kWordBits, near = whole > kAhead ? whole - kAhead : 0;
    const int64_t skipped = (Rows - 1) * job.stride * static_cast<int64_t>(sizeof(T));
    pack_limited_words<T, Rows>(job, row, 0, near, kPrefetchBytes);
    pack_limited_words<T, Rows>(job, row, near, whole, kPrefetchBytes + skipped);
}

// Packs whole words by vectors, and each row's last, partial one by the twin.
template <class T>
void pack_limited_rows_by_words(const LimitedRows& job) {
    int64_t row = 0;
    for (; row + kRowsTogether <= job.rows; row += kRowsTogether) {
        pack_limited_rows_together<T, kRowsTogether>(job, row);
    }
    for (; row < job.rows; ++row) pack_limited_rows_together<T, 1>(job, row);
    const int64_t left = job.k % kWordBits, width = words_for(job.k), last = width - 1, begin = last * kWordBits;
    if (left == 0) return;
    const uint32_t flips = job.flips ? job.flips[last] : 0;
    for (row = 0; row < job.rows; ++row) {
        job.words[row * width + last] = limit_bits(static_cast<const T*>(job.x) + row * job.stride + begin,
                                                   static_cast<const T*>(job.limits) + begin, left, flips, job.strict);
    }
}

}  // namespace
}  // namespace bitorch_qlinear
