#include "dispatch.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <utility>
#include <variant>
#include <vector>

#include "../sources.h"

namespace bitorch_qlinear::cuda {
namespace {

// The value, or the sentence as an exception.
template <class T>
T value_of(OrError<T> result) {
    if (const std::string* sentence = std::get_if<std::string>(&result)) {
        throw std::runtime_error("bitorch_qlinear: " + *sentence);
    }
    return std::get<T>(std::move(result));
}

std::atomic<const KernelRecord*>& forced() {
    static std::atomic<const KernelRecord*> kernel{[] {
        const char* name = std::getenv(kKernelVariable);
        return value_of(find_kernel(name ? name : ""));
    }()};
    return kernel;
}

void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("bitorch_qlinear: the CUDA devices do not tell what they are: ") +
                             cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device));
    return value;
}

// Of all devices, asked once.
const std::vector<Device>& devices() {
    static const std::vector<Device> all = [] {
        int count = 0;
        check(cudaGetDeviceCount(&count));
        std::vector<Device> found;
        for (int i = 0; i < count; ++i) {
            found.push_back(
                {10 * attribute(cudaDevAttrComputeCapabilityMajor, i) + attribute(cudaDevAttrComputeCapabilityMinor, i),
                 attribute(cudaDevAttrMultiProcessorCount, i)});
        }
        return found;
    }();
    return all;
}

}  // namespace

void check_supported(int32_t device_index) { value_of(decide(nullptr, devices().at(device_index), 0, 0, 0)); }

Choice choose_kernel(int32_t device_index, int64_t m, int64_t n, int64_t k) {
    return value_of(decide(forced().load(std::memory_order_relaxed), devices().at(device_index), m, n, k));
}

void force_kernel(const std::string& name) { forced().store(value_of(find_kernel(name))); }

}  // namespace bitorch_qlinear::cuda

// ---- what Python asks about the kernels, as plain C ------------------------------------------------------------------

#define BITORCH_QLINEAR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace bitorch_qlinear::cuda;

// A string that lives until the same thread's next call; what an exception said, for none must leave C.
template <class Function>
const char* hold(Function function) {
    static thread_local std::string held;
    try {
        held = function();
    } catch (const std::exception& error) {
        held = error.what();
    }
    return held.c_str();
}

}  // namespace

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_version() { return BITORCH_QLINEAR_VERSION; }

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_sources() { return bitorch_qlinear::sources_digest(); }

// Names of the kernels that a compute capability (86 for 8.6) can run.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_kernels(int capability) {
    return hold([&] { return kernel_names(capability); });
}

// The forced one; "" for none.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_kernel() {
    return hold([]() -> std::string {
        const KernelRecord* kernel = forced().load();
        return kernel ? kernel->name : "";
    });
}

// "": the automatic choice; null: leaves it as it is. "" or what is wrong.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_force_kernel(const char* name) {
    return hold([&]() -> std::string {
        name ? force_kernel(name) : static_cast<void>(forced().load());
        return "";
    });
}

// What computes a product on such a device, and why; or what is wrong.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_cuda_choice(int capability, int multiprocessors, int64_t m,
                                                               int64_t n, int64_t k) {
    return hold([&] { return describe(value_of(decide(forced().load(), {capability, multiprocessors}, m, n, k))); });
}
