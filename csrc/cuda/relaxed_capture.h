// Calls of CUDA that are no work of a stream, while a stream may be captured.
#pragma once

#include <cuda_runtime_api.h>

namespace bitorch_qlinear::cuda {

// While it lives, this thread may make any call of CUDA although a stream is captured, in this thread or another one:
// it may allocate memory of the host, or load the kernels' code. In the other modes such a call could end the capture.
class RelaxedCapture {
  public:
    RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    RelaxedCapture(const RelaxedCapture&) = delete;

  private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace bitorch_qlinear::cuda
