#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace bitorch_qlinear {
namespace {

// Best first. A new kernel is one record in its own file and one line here.
const Kernel* const kKernels[] = {
#if defined(__x86_64__)
#if defined(BITORCH_QLINEAR_HAS_AMX)
    &kAmxKernel,
#endif
    &kAvx512Kernel, &kAvx2Kernel, &kPopcntKernel,
#elif defined(__aarch64__)
    &kNeonKernel,
#endif
    &kScalarKernel,
};

constexpr char kVariable[] = "BITORCH_QLINEAR_CPU_KERNEL";
constexpr char kFormerVariable[] = "BITORCH_QLINEAR_CPU";

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

// An empty name selects the automatic choice.
const Kernel* choose(const std::string& name) { return name.empty() ? best_kernel() : find_kernel(name); }

// Returns the value of an environment variable, or "" if it is not set.
std::string environment(const char* variable) {
    const char* value = std::getenv(variable);
    return value ? value : "";
}

std::atomic<const Kernel*>& chosen() {
    static std::atomic<const Kernel*> kernel{[] {
        // Ignoring the former name would silently run another kernel than the one that was asked for.
        if (const std::string name = environment(kFormerVariable); !name.empty()) {
            throw std::runtime_error(std::string(kFormerVariable) + " is called " + kVariable +
                                     " now: unset it, and set " + kVariable + "=" + name + " if you want that kernel");
        }
        return choose(environment(kVariable));
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
