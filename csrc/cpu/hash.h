// A hash of words, which tells what a prepared form was made of (fingerprint.h). Every kernel's file has its own
// copy, which the compiler vectorizes for that file's instruction set; all give the same number.
#pragma once

#include <cstdint>

#include "../packed.h"

namespace bitorch_qlinear {
namespace {

// Hashes the words of every `period`th cache line among `count` words. The hash is multilinear: 16 sums modulo 2^64 of
// words times odd keys, one key for each line, from a pseudorandom sequence. A single word that differs always changes
// its sum, and several cancel each other with a probability of about 2^-32. (With keys in an arithmetic sequence,
// swapped rows could cancel.)
inline uint64_t hash_words(const uint32_t* words, int64_t count, int64_t period) {
    uint64_t sums[kLineWords] = {};
    uint64_t state = 0x9E3779B97F4A7C15u;  // the state of a linear congruential generator (Knuth's MMIX)
    const auto next_key = [&] {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state >> 32) | 1u;
    };
    int64_t i = 0;
    const auto add_lines = [&](int64_t distance) __attribute__((always_inline)) {
        for (; i + kLineWords <= count; i += distance) {
            const uint32_t key = next_key();
            // gcc 12 would first unroll the loop, and then not vectorize it: 6.7 ns a line instead of 2.0 (AVX-512).
#pragma GCC unroll 1
            for (int64_t lane = 0; lane < kLineWords; ++lane) sums[lane] += uint64_t{words[i + lane]} * key;
        }
    };
    // A constant distance halves the time for all words.
    period == 1 ? add_lines(kLineWords) : add_lines(period * kLineWords);
    const uint32_t key = next_key();
    for (int64_t lane = 0; i + lane < count; ++lane) sums[lane] += uint64_t{words[i + lane]} * key;
    uint64_t hash = static_cast<uint64_t>(count), factor = 0xFF51AFD7ED558CCDu;
    for (int64_t lane = 0; lane < kLineWords; ++lane, factor += 0xC4CEB9FE1A85EC52u) {
        hash += (sums[lane] ^ sums[lane] >> 32) * factor;
    }
    return hash ^ hash >> 29;
}

}  // namespace
}  // namespace bitorch_qlinear
