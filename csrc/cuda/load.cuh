// Loads of 16 bytes under a predicate.
#pragma once

#include <cstdint>

namespace bitorch_qlinear::cuda {

// Loads four words of a row, or zeros if they do not exist. The load has a predicate instead of a branch and is not
// moved. The words may have been written since the kernel began (launch.cuh).
__device__ __forceinline__ uint4 load(const uint32_t* words, bool exist) {
    uint4 w;
    asm volatile(
        "{\n.reg .pred exist;\n"
        "setp.ne.b32 exist, %5, 0;\n"
        "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
        "@exist ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
        : "=&r"(w.x), "=&r"(w.y), "=&r"(w.z), "=&r"(w.w)
        : "l"(words), "r"(static_cast<int>(exist)));
    return w;
}

// Does the same without allocating in the L1 cache, for words that no other block reads. `.nc` is left out, because
// ptxas moves loads that have it past the wait for the kernel before (launch.cuh).
__device__ __forceinline__ uint4 load_once(const uint32_t* words, bool exist) {
    uint4 w;
    asm volatile(
        "{\n.reg .pred exist;\n"
        "setp.ne.b32 exist, %5, 0;\n"
        "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
        "@exist ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
        : "=&r"(w.x), "=&r"(w.y), "=&r"(w.z), "=&r"(w.w)
        : "l"(words), "r"(static_cast<int>(exist)));
    return w;
}

}  // namespace bitorch_qlinear::cuda
