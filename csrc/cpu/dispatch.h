// Which kernel runs: the first of a visible list that this processor can run, or the one asked for.
#pragma once

#include <string>

#include "kernel.h"

namespace bitorch_qlinear {

// The kernel that runs, chosen at first use. Throws std::runtime_error if BITORCH_QLINEAR_CPU_KERNEL names one that is
// unknown or that this processor cannot run, or if its former name BITORCH_QLINEAR_CPU is set.
const Kernel& active_kernel();

// Why it is this one, in words.
std::string active_kernel_reason();

// The names of the kernels that this processor can run, best first, separated by ", ".
std::string available_kernels();

// Makes `name` the active kernel for the whole process ("" : back to the automatic choice).
// Throws as active_kernel() does. Weights prepared for another kernel are refused from then on.
void force_kernel(const std::string& name);

}  // namespace bitorch_qlinear
