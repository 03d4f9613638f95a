// The plain C functions by which Python asks the operators' library about the CPU kernels.
#include "../exports.h"

#include <cstdint>

#include "../cuda/prepared.h"
#include "../sources.h"
#include "dispatch.h"

namespace {

using namespace bitorch_qlinear;

// The number that `function` computes from the active kernel, or -1 if no kernel is active.
template <class Function>
int64_t ask_kernel(const Function& function) {
    try {
        return function(active_kernel());
    } catch (const std::exception&) {
        return -1;
    }
}

}  // namespace

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_version() { return BITORCH_QLINEAR_VERSION; }

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_sources() { return sources_digest(); }

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_kernels() { return hold(available_kernels); }

// Makes the named kernel the active one. "" selects the automatic choice, and null changes nothing but raises the error
// that a wrong environment variable causes. Returns "" or the error.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_force_kernel(const char* name) {
    return hold([&] {
        name ? force_kernel(name) : static_cast<void>(active_kernel());
        return "";
    });
}

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_kernel() {
    return hold([] { return active_kernel().name; });
}

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_kernel_reason() { return hold(active_kernel_reason); }

// Writes the active kernel's Layout: outputs per panel, values per unit, bytes per unit, id. Returns false if no kernel
// is active.
BITORCH_QLINEAR_EXPORT bool bitorch_qlinear_layout(int64_t* out) {
    const auto write = [&](const Kernel& kernel) -> int64_t {
        out[0] = kernel.layout.panel;
        out[1] = kernel.layout.unit;
        out[2] = kernel.layout.unit_bytes;
        out[3] = kernel.layout.id;
        return 0;
    };
    return ask_kernel(write) == 0;
}

// The size of a prepared form in bytes: on CUDA, or for the active CPU kernel (-1 if there is none). This library
// answers for CUDA too, because meta tensors on a CUDA device exist where no CUDA operators are loaded.
BITORCH_QLINEAR_EXPORT int64_t bitorch_qlinear_prepared_bytes(bool on_cuda, int64_t n, int64_t k) {
    if (on_cuda) return cuda::prepared_bytes(n, k);
    return ask_kernel([&](const Kernel& kernel) { return prepared_bytes(kernel.layout, n, k); });
}

// The layout number of the prepared form on CUDA.
BITORCH_QLINEAR_EXPORT int64_t bitorch_qlinear_cuda_layout() { return cuda::kPreparedLayout; }

// The active kernel's SignGemm::least_outputs, or -1 if no kernel is active.
BITORCH_QLINEAR_EXPORT int64_t bitorch_qlinear_least_sign_outputs() {
    return ask_kernel([](const Kernel& kernel) { return kernel.sign_gemm->least_outputs; });
}
