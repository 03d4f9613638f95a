// The device and the stream that an operator launches its kernels on.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "../cuda/dispatch.h"
#include "../cuda/wrong_form.h"
#include "check.h"

namespace bitorch_qlinear::cuda {

// Returns torch's current stream of a device. (torch::stable::Stream gives no handle before torch 2.13.)
inline cudaStream_t current_stream(int32_t device_index) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    return static_cast<cudaStream_t>(stream);
}

// Returns page-locked memory of torch's allocator, which is never freed. Kernels of all devices can write it at its
// address on the host (CUDA C++ programming guide, "Unified Virtual Address Space").
inline void* allocate_for_devices(size_t bytes) {
    const int64_t size = static_cast<int64_t>(bytes), stride = 1;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided_pinned(1, &size, &stride, aoti_torch_dtype_uint8(),
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    return (new Tensor(handle))->data_ptr();
}

// The device on which an operator launches its kernels, and torch's current stream there. While the object lives, the
// device is the current one. The constructor throws if no kernel runs on the device, or if a kernel has reported a
// wrong prepared form there, which an earlier call could not know.
class Launch {
  public:
    explicit Launch(const Device& device)
        : guard_(checked(device.index)), device_(device), stream_(current_stream(device.index)) {}

    const Device& device() const { return device_; }
    cudaStream_t stream() const { return stream_; }

  private:
    static int32_t checked(int32_t device_index) {
        check_supported(device_index);
        report_wrong_form(device_index);
        return device_index;
    }

    torch::stable::accelerator::DeviceGuard guard_;
    Device device_;
    cudaStream_t stream_;
};

}  // namespace bitorch_qlinear::cuda
