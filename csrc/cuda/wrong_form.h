// Prepared forms that turned out to belong to another product. Kernels find out (check_prepared.cuh) and report it in
// memory of the host that they can write, which the next call reads: nothing waits for the device.
#pragma once

#include <cstdint>

#include "prepared.h"

namespace bitorch_qlinear::cuda {

// Returns where kernels on a device report a wrong form. The first call of the process allocates the memory, which may
// also happen while a stream is captured; it is never freed, because a graph may write to it at any time. Throws
// std::runtime_error if there is no memory.
WrongForm* wrong_form_of(int32_t device_index);

// Throws std::runtime_error if a kernel on the device has reported a wrong form since the last such error.
void report_wrong_form(int32_t device_index);

}  // namespace bitorch_qlinear::cuda
