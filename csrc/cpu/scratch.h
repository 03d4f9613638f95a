// Scratch memory, aligned to a cache line.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "../packed.h"

namespace bitorch_qlinear {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<uint8_t, Free>;

// Returns null on failure, because pool threads must not throw. It checks for overflow, because an expanded x can ask
// for more bytes than an int64 holds.
inline Scratch allocate(int64_t count, int64_t item_bytes = 1) {
    int64_t bytes;
    if (__builtin_mul_overflow(count, item_bytes, &bytes) || bytes > INT64_MAX / 2) return nullptr;
    return Scratch(static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(ceil_div(bytes, 64) * 64 + 64))));
}

[[noreturn]] inline void fail_memory() { throw std::runtime_error("bitorch_qlinear: out of memory for scratch space"); }

}  // namespace bitorch_qlinear
