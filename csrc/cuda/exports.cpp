// The plain C functions by which Python asks the CUDA operators' library about its kernels.
#include "../exports.h"

#include <cstdint>
#include <exception>

#include "../sources.h"
#include "dispatch.h"

namespace {

using namespace bitorch_qlinear::cuda;
using bitorch_qlinear::hold;

Gpu gpu_with(int capability, int multiprocessors, int code) {
    return {capability, multiprocessors, code ? code : kNewest, starts_are_early()};
}

}  // namespace

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_version() { return BITORCH_QLINEAR_VERSION; }

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_sources() { return bitorch_qlinear::sources_digest(); }

// Returns the compute capability that the code of a device was compiled for (86 for 8.6), or 0 if CUDA does not tell.
BITORCH_QLINEAR_EXPORT int bitorch_qlinear_cuda_code(int device_index) {
    try {
        return gpu_of(device_index).code;
    } catch (const std::exception&) {
        return 0;
    }
}

// Returns the names of the kernels that run on a compute capability in code for another one, or for the same if it is
// 0.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_kernels(int capability, int code) {
    return hold([&] { return kernel_names(gpu_with(capability, 0, code)); });
}

// Returns the name of the kernel that is forced, or "".
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_kernel() { return hold(forced_kernel); }

// Returns "", or the error that a wrong environment variable causes.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_check_environment() {
    return hold([] {
        check_environment();
        return "";
    });
}

// Forces the named kernel; "" selects the automatic choice. Returns "" or the error.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_force_kernel(const char* name) {
    return hold([&] {
        force_kernel(name);
        return "";
    });
}

// Returns the name of the tile that is forced, or "".
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_tile() { return hold(forced_tile); }

// Does for the tile what bitorch_qlinear_cuda_force_kernel does for the kernel.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_force_tile(const char* name) {
    return hold([&] {
        force_tile(name);
        return "";
    });
}

// Returns which kernel computes a product on such a device and why, or the error. `code` is as above. The values of x
// have `value_bytes` each, or x is given as words if it is 0. `float64` tells whether the result is float64. No launch
// has to align the weights.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_choice(int capability, int code, int multiprocessors, int64_t m,
                                                               int64_t n, int64_t k, int64_t value_bytes,
                                                               bool float64) {
    const Gpu gpu = gpu_with(capability, multiprocessors, code);
    return hold([&] { return describe(choose_kernel(gpu, m, n, k, value_bytes, float64)); });
}
