#include "dispatch.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <variant>

#include "kernels.h"
#include "relaxed_capture.h"

namespace bitorch_qlinear::cuda {
namespace {

// Returns the value, or throws the sentence.
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

std::atomic<TileSize>& forced_tile_size() {
    static std::atomic<TileSize> size{[] {
        const char* name = std::getenv(kTileVariable);
        return value_of(find_tile(name ? name : ""));
    }()};
    return size;
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

// A device, whose code is asked for at its first product, because that makes CUDA occupy memory there.
struct KnownDevice {
    Gpu gpu;
    std::once_flag asked;
};

// The figures of all devices, which are asked for once.
std::deque<KnownDevice>& devices() {
    static std::deque<KnownDevice> all = [] {
        int count = 0;
        check(cudaGetDeviceCount(&count));
        std::deque<KnownDevice> found(count);
        for (int i = 0; i < count; ++i) {
            found[i].gpu.capability =
                10 * attribute(cudaDevAttrComputeCapabilityMajor, i) + attribute(cudaDevAttrComputeCapabilityMinor, i);
            found[i].gpu.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, i);
            found[i].gpu.early = starts_are_early();
        }
        return found;
    }();
    return all;
}

// Returns the compute capability that the code of a device was compiled for, or throws.
int code_of(int32_t device_index) {
    const RelaxedCapture relaxed;
    int current = 0, code = 0;
    check(cudaGetDevice(&current));
    if (current != device_index) check(cudaSetDevice(device_index));
    const auto error = find_code(&code);
    if (current != device_index) check(cudaSetDevice(current));
    if (error == cudaErrorNoKernelImageForDevice) {
        throw std::runtime_error("bitorch_qlinear: expected CUDA kernels that were built for " +
                                 in_words(devices().at(device_index).gpu.capability) + ": " +
                                 cudaGetErrorString(error));
    }
    if (error != cudaSuccess) {  // such as that of a kernel that failed before, which every call returns from then on
        throw std::runtime_error(std::string("bitorch_qlinear: the CUDA kernels cannot be loaded: ") +
                                 cudaGetErrorString(error));
    }
    return code;
}

}  // namespace

bool starts_are_early() {
    static const bool early = [] {
        const char* value = std::getenv(kEarlyVariable);
        return value_of(find_early(value ? value : ""));
    }();
    return early;
}

void check_environment() {
    forced();
    forced_tile_size();
    starts_are_early();
}

void check_supported(int32_t device_index) {
    const Gpu& gpu = devices().at(device_index).gpu;
    // The code is left out, because another thread may be asking for it now.
    value_of(decide(nullptr, {gpu.capability, gpu.multiprocessors}, 0, 0, 0));
}

const Gpu& gpu_of(int32_t device_index) {
    KnownDevice& device = devices().at(device_index);
    std::call_once(device.asked, [&] { device.gpu.code = code_of(device_index); });
    return device.gpu;
}

Choice choose_kernel(int32_t device_index, int64_t m, int64_t n, int64_t k, int64_t value_bytes, bool float64,
                     bool aligns) {
    return choose_kernel(gpu_of(device_index), m, n, k, value_bytes, float64, aligns);
}

void force_kernel(const std::string& name) { forced().store(value_of(find_kernel(name))); }

std::string forced_kernel() {
    const KernelRecord* kernel = forced().load();
    return kernel ? kernel->name : "";
}

void force_tile(const std::string& name) { forced_tile_size().store(value_of(find_tile(name))); }

std::string forced_tile() {
    const TileSize size = forced_tile_size().load();
    return size.rows ? tile_name(size) : "";
}

Choice choose_kernel(const Gpu& gpu, int64_t m, int64_t n, int64_t k, int64_t value_bytes, bool float64, bool aligns) {
    const TileSize size = forced_tile_size().load(std::memory_order_relaxed);
    const KernelRecord* kernel = forced().load(std::memory_order_relaxed);
    return with_tile(value_of(decide(kernel, gpu, m, n, k, value_bytes, float64, aligns)), size, float64);
}

}  // namespace bitorch_qlinear::cuda
