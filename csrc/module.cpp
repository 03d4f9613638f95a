// bitorch_qlinear._C reports what was built and what the processor supports, and compares modules
// with what they were. It has no torch header and no operator.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/cpu_features.h"
#include "module_state.h"
#include "sources.h"

namespace {

namespace py = pybind11;

py::dict build_info() {
    py::dict info;
    info["version"] = BITORCH_QLINEAR_VERSION;
    info["sources"] = bitorch_qlinear::sources_digest();
    info["torch"] = BITORCH_QLINEAR_TORCH_VERSION;
    info["cuda_targets"] = BITORCH_QLINEAR_CUDA_TARGETS;
    info["cuda_reason"] = BITORCH_QLINEAR_CUDA_REASON;
    info["cuda_version"] = BITORCH_QLINEAR_CUDA_VERSION;
#if defined(__clang__)
    info["compiler"] = "clang " __clang_version__;
#else
    info["compiler"] = "gcc " __VERSION__;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Build and processor information of bitorch_qlinear, and a comparison of modules.";
    module.def("build_info", &build_info,
               "Version, digest of the sources, compiler, torch built against, CUDA targets.");
    module.def("cpu_capability", &bitorch_qlinear::cpu_capability,
               "What processor and operating system support: AVX512, AVX2, NEON or DEFAULT.");
    bitorch_qlinear::define_module_state(module);
}
