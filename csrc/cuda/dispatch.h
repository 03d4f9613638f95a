// The kernel of each product: what heuristics.h says for the device that is there, or what was forced.
#pragma once

#include <cstdint>
#include <string>

#include "heuristics.h"

namespace bitorch_qlinear::cuda {

// Throws where the device is too old for any kernel.
void check_supported(int32_t device_index);

// Throws where the device is too old, or lacks the kernel that is forced.
Choice choose_kernel(int32_t device_index, int64_t m, int64_t n, int64_t k);

// Makes the named kernel the one of all products that it takes; "" for the automatic choice. Throws if there is none of
// that name. Until the first call it is what BITORCH_QLINEAR_CUDA_KERNEL says.
void force_kernel(const std::string& name);

}  // namespace bitorch_qlinear::cuda
