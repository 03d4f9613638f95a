// How an operator, which gets words and their prepared form, finds out in every call whether the one was made of the
// other.
//
// The form holds hashes of the words at several LEVELS. The last level is of all words; level i < kAll is of the first
// 2^i cache lines of every 129 (an odd number, so that the lines do not fall on each other in the caches). A call
// compares one level:
//
//     all words, where they are few or where the product is so large that reading them is 2 % of it
//     all words, where the tensor is not the one that the form was made of, or where torch counted a write to it since
//     else a share of them that grows with the rows of x, and so with the work that the product is anyway
//
// So a change is overlooked only if torch does not count it (a write through `.data`, NumPy, DLPack or a collective),
// if the weights are many and the rows few, and if it leaves the share as it is.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace bitorch_qlinear {

constexpr int64_t kPeriodLines = 129;
constexpr int kAll = 7;  // the last level
constexpr int kLevels = kAll + 1;
// Up to so many words are compared whole, in less time than asking torch about the tensor takes.
constexpr int64_t kFewWords = 2048;

// Behind the header of a prepared form.
struct Fingerprint {
    uint64_t levels[kLevels];
    const void* address;  // of the words
    int64_t version;      // how often torch had seen them written; kUnknownVersion if it does not count
    char padding[48];
};
static_assert(sizeof(PreparedHeader) + sizeof(Fingerprint) == kPanelsOffset, "what lies before the panels");
constexpr int64_t kUnknownVersion = -1;

// Level i is of the first 2^i lines of each period, and the last level of all words.
inline uint64_t hash_level(const Kernel& kernel, const uint32_t* words, int64_t count, int level) {
    const int64_t lines = level == kAll ? kPeriodLines : int64_t{1} << level;
    return kernel.hash_words(words, count, lines, kPeriodLines);
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

// The level that m rows of x pay for: 2^level of 129 lines for at least as many rows.
inline int level_for(int64_t m) {
    int level = 0;
    while (level < kAll && (int64_t{2} << level) <= m) ++level;
    return level;
}

}  // namespace bitorch_qlinear
