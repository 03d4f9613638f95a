#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace bitorch_qlinear {
namespace {

// Best first. To add a kernel: one record in its own file, one line here.
const Kernel* const kKernels[] = {
#if defined(__x86_64__)
    &kAvx512Kernel,
    &kAvx2Kernel,
    &kPopcntKernel,
#elif defined(__aarch64__)
    &kNeonKernel,
#endif
    &kScalarKernel,
};

constexpr char kVariable[] = "BITORCH_QLINEAR_CPU";

const Kernel* best_kernel() {
    for (const Kernel* kernel : kKernels) {
        if (kernel->runs_on(cpu_features())) return kernel;
    }
    return &kScalarKernel;
}

const Kernel* find_kernel(const std::string& name) {
    for (const Kernel* kernel : kKernels) {
        if (kernel->name == name && kernel->runs_on(cpu_features())) return kernel;
    }
    throw std::runtime_error(std::string(kVariable) + ": expected one of the kernels that this processor can run (" +
                             available_kernels() + "), got \"" + name + "\"");
}

// Empty: the automatic choice.
const Kernel* choose(const std::string& name) { return name.empty() ? best_kernel() : find_kernel(name); }

std::atomic<const Kernel*>& chosen() {
    static std::atomic<const Kernel*> kernel{[] {
        const char* name = std::getenv(kVariable);
        return choose(name ? name : "");
    }()};
    return kernel;
}

}  // namespace

const Kernel& active_kernel() { return *chosen().load(std::memory_order_relaxed); }

std::string active_kernel_reason() {
    const Kernel& kernel = active_kernel();
    if (&kernel != best_kernel()) return std::string("forced, by ") + kVariable + " or by the program";
    return std::string("the first of the list whose needs this processor meets: ") + kernel.requires_features;
}

std::string available_kernels() {
    std::string names;
    for (const Kernel* kernel : kKernels) {
        if (!kernel->runs_on(cpu_features())) continue;
        if (!names.empty()) names += ", ";
        names += kernel->name;
    }
    return names;
}

void force_kernel(const std::string& name) {
    const Kernel* kernel = choose(name);  // throws before anything changes
    chosen().store(kernel);
}

}  // namespace bitorch_qlinear
