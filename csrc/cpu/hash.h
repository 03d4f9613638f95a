// A hash of words, by which a prepared form knows what it was made of (fingerprint.h). Every kernel's file has its own
// copy, which the compiler vectorizes for that file's instruction set; all give the same number.
#pragma once

#include <cstdint>

namespace bitorch_qlinear {
namespace {

// A bijection that spreads every bit over the whole number (the finalizer of MurmurHash3).
inline uint64_t mix(uint64_t v) {
    v = (v ^ v >> 33) * 0xFF51AFD7ED558CCDu;
    v = (v ^ v >> 33) * 0xC4CEB9FE1A85EC53u;
    return v ^ v >> 33;
}

// Multilinear: 16 sums modulo 2^64 of words times odd keys that depend on their places. A single word that differs
// always changes the result; several cancel each other with a probability of about 2^-64.
inline uint64_t hash_words(const uint32_t* words, int64_t count) {
    constexpr int64_t kLanes = 16;
    uint64_t sums[kLanes] = {};
    uint32_t key = 0x9E3779B1u;
    int64_t begin = 0;
    for (; begin + kLanes <= count; begin += kLanes, key += 0x85EBCA6Eu) {
        for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += uint64_t{words[begin + lane]} * key;
    }
    for (int64_t lane = 0; begin + lane < count; ++lane) sums[lane] += uint64_t{words[begin + lane]} * key;
    uint64_t hash = static_cast<uint64_t>(count);
    for (int64_t lane = 0; lane < kLanes; ++lane) hash = mix(hash ^ sums[lane]);
    return hash;
}

}  // namespace
}  // namespace bitorch_qlinear
