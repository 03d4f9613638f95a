// The prepared form of the weights: writing it, and finding out whether it was made of the words that come with it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fingerprint.h"
#include "kernel.h"
#include "threads.h"

namespace bitorch_qlinear {

// Returns memory for the panels, or null if the kernel reads the words themselves.
inline Scratch allocate_panels(const Kernel& kernel, int64_t n, int64_t k) {
    if (!kernel.prepare) return nullptr;
    Scratch panels = allocate(prepared_bytes(kernel.layout, n, k) - kPanelsOffset);
    if (!panels) fail_memory();
    return panels;
}

// Writes the panels; does nothing if the kernel reads the words themselves.
template <class Threads>
void write_panels(const Threads& threads, const Kernel& kernel, const uint32_t* words, int64_t n, int64_t k,
                  uint8_t* panels) {
    if (!kernel.prepare || k == 0) return;
    const int64_t grain = std::max<int64_t>(1, kSerialValues * 8 / (kernel.layout.panel * k));
    share(threads, ceil_div(n, kernel.layout.panel), grain,
          [&](int64_t begin, int64_t end) { kernel.prepare(words, n, k, {begin, end}, panels); });
}

// Writes the whole prepared form of the words.
template <class Threads>
void write_prepared(const Threads& threads, const Kernel& kernel, const uint32_t* words, int64_t n, int64_t k,
                    const Fingerprint& fingerprint, uint8_t* out) {
    PreparedHeader header{};
    std::copy(std::begin(kPreparedMagic), std::end(kPreparedMagic), header.magic);
    header.layout = kernel.layout.id;
    header.n = n;
    header.k = k;
    std::memcpy(out, &header, sizeof header);
    std::memcpy(out + sizeof header, &fingerprint, sizeof fingerprint);
    write_panels(threads, kernel, words, n, k, out + kPanelsOffset);
}

// Words [n][words_for(k)] of weights, and what a fingerprint compares of their tensor.
struct WordSource {
    const uint32_t* words;
    int64_t n, k;
    const void* address;  // of the tensor, of which `words` may be an aligned copy
};

// Returns whether a form with this fingerprint was made of these words, as far as m rows of x pay for (fingerprint.h).
// version_of() asks torch how often it has seen the tensor written, which takes longer than comparing few words.
template <class VersionOf>
bool was_made_of(const Fingerprint& fingerprint, const Kernel& kernel, const WordSource& source, int64_t m,
                 const VersionOf& version_of) {
    const int64_t count = source.n * words_for(source.k);
    int level = count <= kFewWords ? kAll : level_for(m, count);
    if (level < kAll && (source.address != fingerprint.address || fingerprint.version == kUnknownVersion ||
                         version_of() != fingerprint.version)) {
        level = kAll;
    }
    return hash_level(kernel, source.words, count, level) == fingerprint.levels[level];
}

// Returns the panels of a form of `bytes` bytes, which begins with a valid header, or null if the form was made of
// other words or for another kernel.
template <class VersionOf>
const uint8_t* find_panels(const uint8_t* form, int64_t bytes, const Kernel& kernel, const WordSource& source,
                           int64_t m, const VersionOf& version_of) {
    PreparedHeader header;
    std::memcpy(&header, form, sizeof header);
    if (header.layout != kernel.layout.id || header.n != source.n || header.k != source.k ||
        bytes != prepared_bytes(kernel.layout, source.n, source.k)) {
        return nullptr;
    }
    Fingerprint fingerprint;
    std::memcpy(&fingerprint, form + sizeof header, sizeof fingerprint);
    return was_made_of(fingerprint, kernel, source, m, version_of) ? form + kPanelsOffset : nullptr;
}

}  // namespace bitorch_qlinear
