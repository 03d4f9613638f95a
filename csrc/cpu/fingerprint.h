// How an operator, which gets words and their prepared form, finds out in every call whether the one was made of the
// other.
//
// The form holds hashes of the words at several LEVELS: of each 513th, 257th, 129th ... 5th and 3rd cache line (odd
// distances, so that the lines do not fall on each other in the caches), and at the last level of all words. A call
// compares one level:
//
//     all words, where they are few or where the product is so large that reading them is 2 % of it at most
//     all words, where the tensor is not the one that the form was made of, or where torch counted a write to it since
//     else a share of them that grows with the rows of x, and so with the work that the product is anyway
//
// So a change is overlooked only if torch does not count it (a write through `.data`, NumPy, DLPack or a collective),
// if the weights are many and the rows few, and if it leaves the share as it is.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace bitorch_qlinear {

constexpr int kAll = 9;  // the last level
constexpr int kLevels = kAll + 1;
// Up to so many words are compared whole, in less time than asking torch about the tensor takes.
constexpr int64_t kFewWords = 2048;

// Behind the header of a prepared form.
struct Fingerprint {
    uint64_t levels[kLevels];
    const void* address;  // of the words
    int64_t version;      // how often torch had seen them written; kUnknownVersion if it does not count
    char padding[32];
};
static_assert(sizeof(PreparedHeader) + sizeof(Fingerprint) == kPanelsOffset, "what lies before the panels");
constexpr int64_t kUnknownVersion = -1;

// Level i is of each line whose number is a multiple of this.
inline int64_t period_of(int level) { return level == kAll ? 1 : (int64_t{1} << (kAll - level)) + 1; }

inline uint64_t hash_level(const Kernel& kernel, const uint32_t* words, int64_t count, int level) {
    return kernel.hash_words(words, count, period_of(level));
}

inline Fingerprint take_fingerprint(const Kernel& kernel, const uint32_t* words, int64_t count, const void* address,
                                    int64_t version) {
    Fingerprint fingerprint{};
    for (int level = count <= kFewWords ? kAll : 0; level <= kAll; ++level) {
        fingerprint.levels[level] = hash_level(kernel, words, count, level);
    }
    fingerprint.address = address;
    fingerprint.version = version;
    return fingerprint;
}

// The level that m rows of x pay for: m of 513 lines, and never less than 64 lines of `count` words. Four times as many
// took 12 % of the time of 1 and of 16 rows by 4096 x 4096 weights that no cache held (Intel Xeon with AVX-512).
inline int level_for(int64_t m, int64_t count) {
    constexpr int64_t kFewestLines = 64;
    const int64_t lines = ceil_div(count, kLineWords);
    int level = 0;
    while (level < kAll && ((int64_t{2} << level) <= m || lines < kFewestLines * period_of(level))) ++level;
    return level;
}

}  // namespace bitorch_qlinear
