// Where an operator launches: on its tensors' device, in the stream that torch has current there.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "../cuda/dispatch.h"

namespace bitorch_qlinear::cuda {

// torch's current stream of a device. (torch::stable::Stream hands out no handle before torch 2.13.)
inline cudaStream_t current_stream(int32_t device_index) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    return static_cast<cudaStream_t>(stream);
}

// While it lives, launches go to this device. Throws where no kernel runs there.
class Launch {
  public:
    explicit Launch(int32_t device_index)
        : guard_(checked(device_index)), device_index_(device_index), stream_(current_stream(device_index)) {}

    int32_t device_index() const { return device_index_; }
    cudaStream_t stream() const { return stream_; }

  private:
    static int32_t checked(int32_t device_index) {
        check_supported(device_index);
        return device_index;
    }

    torch::stable::accelerator::DeviceGuard guard_;
    int32_t device_index_;
    cudaStream_t stream_;
};

}  // namespace bitorch_qlinear::cuda
