// Which kernel runs: the first in dispatch.cpp's list that this processor can run, or the one that is forced.
#pragma once

#include <string>

#include "kernel.h"

namespace bitorch_qlinear {

// Returns the kernel that runs, which is chosen at first use. Throws std::runtime_error if BITORCH_QLINEAR_CPU_KERNEL
// names one that is unknown or that this processor cannot run, or if its former name BITORCH_QLINEAR_CPU is set.
const Kernel& active_kernel();

// Explains why it is this one, in words.
std::string active_kernel_reason();

// Returns the names of the kernels that this processor can run, best first, separated by ", ".
std::string available_kernels();

// Makes `name` the active kernel of the whole process; "" returns to the automatic choice. Throws as active_kernel()
// does. Operators no longer use weights that were prepared for another kernel, and prepare the words in each call.
void force_kernel(const std::string& name);

}  // namespace bitorch_qlinear
