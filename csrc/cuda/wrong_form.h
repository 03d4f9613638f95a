// Prepared forms that turned out to belong to another product. Kernels find out (check_prepared.cuh) and report it in
// memory of the host that they can write, which the next call reads: nothing waits for the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "prepared.h"

namespace bitorch_qlinear::cuda {

// Returns memory of the host that kernels of all devices can write at its address on the host, or throws.
using AllocateForDevices = void* (*)(size_t bytes);

// Returns where kernels on a device report a wrong form. The first call of the process allocates the memory, which may
// also happen while a stream is captured; it must never be freed, because a graph may write to it at any time.
WrongForm* wrong_form_of(int32_t device_index, AllocateForDevices allocate);

// Throws std::runtime_error if a kernel on the device has reported a wrong form since the last such error.
void report_wrong_form(int32_t device_index);

}  // namespace bitorch_qlinear::cuda
