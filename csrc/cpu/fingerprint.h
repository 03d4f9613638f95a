// How an operator finds out in every call whether the prepared form that it receives was made of the words that
// it receives.
//
// The form holds hashes of the words at several LEVELS: of each 513th, 257th, 129th ... 5th and 3rd cache line (odd
// distances, so that the lines do not fall on each other in the caches), and at the last level of all words. A call
// compares one level:
//
//     all words, if they are few, or if the product is so large that reading them is at most 2 % of its time
//     all words, if the tensor is not the one that the form was made of, or if torch has counted a write to it since
//     otherwise a share of them that grows with the rows of x, and so with the time of the product
//
// So a change is overlooked only if torch does not count it (a write through `.data`, NumPy, DLPack or a collective),
// if the weights are many and the rows few, and if it leaves the share as it is.
#pragma once

#include <cstdint>

#include "kernel.h"

namespace bitorch_qlinear {

constexpr int kAll = 9;  // the last level
constexpr int kLevels = kAll + 1;
// Up to this many words are compared as a whole, which takes less time than asking torch about the tensor.
constexpr int64_t kFewWords = 2048;

// The hashes of the words and their origin, which follow the header of a prepared form.
struct Fingerprint {
    uint64_t levels[kLevels];
    const void* address;  // where the words were
    int64_t version;      // how often torch had seen them written; kUnknownVersion if it does not count
    char padding[32];
};
static_assert(sizeof(PreparedHeader) + sizeof(Fingerprint) == kPanelsOffset, "what lies before the panels");
constexpr int64_t kUnknownVersion = -1;

// Level i hashes each line whose number is a multiple of this.
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

// Returns the level for m rows of x: about m of 513 lines, and at least 64 lines, of `count` words. Four times as many
// took 12 % of the time of 1 and of 16 rows by 4096 x 4096 weights that no cache held (Intel Xeon with AVX-512).
inline int level_for(int64_t m, int64_t count) {
    constexpr int64_t kFewestLines = 64;
    const int64_t lines = ceil_div(count, kLineWords);
    int level = 0;
    while (level < kAll && ((int64_t{2} << level) <= m || lines < kFewestLines * period_of(level))) ++level;
    return level;
}

}  // namespace bitorch_qlinear
