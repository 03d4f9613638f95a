// Which kernel computes a product on a device: the choice of heuristics.h, or the kernel that is forced.
#pragma once

#include <cstdint>
#include <string>

#include "heuristics.h"

namespace bitorch_qlinear::cuda {

// Throws std::runtime_error if the device is too old for any kernel.
void check_supported(int32_t device_index);

// Throws std::runtime_error if the device is too old, has no code, or lacks the kernel that is forced.
Choice choose_kernel(int32_t device_index, int64_t m, int64_t n, int64_t k, int64_t value_bytes, bool float64,
                     bool aligns);
Choice choose_kernel(const Gpu& gpu, int64_t m, int64_t n, int64_t k, int64_t value_bytes, bool float64,
                     bool aligns = false);

// Returns the properties of a device. The first call for a device loads code there; it may happen while a stream is
// captured. Throws std::runtime_error if the library has no code for the device.
const Gpu& gpu_of(int32_t device_index);

// Throws std::runtime_error if an environment variable has a value that it cannot have. BITORCH_QLINEAR_CUDA_KERNEL and
// BITORCH_QLINEAR_CUDA_TILE decide until the functions below are called, and BITORCH_QLINEAR_CUDA_EARLY_START=0 makes
// every product start as usual, after the launch before it has ended.
void check_environment();

// Returns false if BITORCH_QLINEAR_CUDA_EARLY_START is 0.
bool starts_are_early();

// Makes the named kernel compute all products that it takes; "" selects the automatic choice. Throws std::runtime_error
// if there is no kernel of that name. Until the first call, BITORCH_QLINEAR_CUDA_KERNEL decides.
void force_kernel(const std::string& name);

// The name of the kernel that is forced, or "". Throws if BITORCH_QLINEAR_CUDA_KERNEL names no kernel.
std::string forced_kernel();

// Does the same for the tile of mma_sm80 and wgmma_sm90a, such as "128x256"; kernels that lack it ignore it. Until the
// first call, BITORCH_QLINEAR_CUDA_TILE decides.
void force_tile(const std::string& name);
std::string forced_tile();

}  // namespace bitorch_qlinear::cuda
