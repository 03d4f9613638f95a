// torch.set_flush_denormal changes how a thread computes.
#pragma once

#include <limits>

namespace bitorch_qlinear {

// Returns whether this thread takes subnormal numbers for zero, which changes signs.
inline bool flushes_subnormals() {
    const volatile float smallest = std::numeric_limits<float>::denorm_min();
    return smallest * 1.0f == 0.0f;
}

}  // namespace bitorch_qlinear
