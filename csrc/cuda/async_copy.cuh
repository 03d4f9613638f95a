// Copies from global to shared memory that use no register and that their thread does not wait for (PTX ISA, "Non-bulk
// copy": cp.async; compute capability 8.0 and later).
//
// A thread's copies since its last commit_copies() form a group, which may be empty; groups end in order. Until a
// barrier, copied bytes are visible only to their own thread.
#pragma once

#include <cstdint>

namespace bitorch_qlinear::cuda {

// Copies 16 bytes without L1, or writes 16 bytes of zeros if the source does not exist; `from` is then not read. L2
// prefetches the whole 128-byte line, for a row's next copy.
__device__ __forceinline__ void copy_16_bytes(void* shared, const void* from, bool exists) {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from)), "r"(exists ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all of this thread's groups except the last `InFlight` have been copied.
template <int InFlight>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(InFlight) : "memory");
}

}  // namespace bitorch_qlinear::cuda
