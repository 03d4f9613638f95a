// bitorch_qlinear._C: what the build was and what the processor offers, and the comparison that tells
// whether weights were written behind torch's back. No torch header, no operator.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "cpu/cpu_features.h"
#include "sources.h"

namespace {

namespace py = pybind11;

constexpr int64_t kSamples = 64;
constexpr int64_t kSampleBytes = 8;

// Copies `kSamples` chunks from places spread by the golden ratio: however wide a row is, they fall on all its columns
// alike, which places at equal distances would not. The first and the last are among them.
void take_sample(const char* data, int64_t bytes, char* sample) {
    for (int64_t i = 0; i < kSamples; ++i) {
        const double fraction = static_cast<double>((static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u) >> 11) * 0x1p-53;
        const int64_t last = bytes - kSampleBytes;
        const int64_t at = i + 1 == kSamples ? last : static_cast<int64_t>(fraction * static_cast<double>(last));
        std::memcpy(sample + i * kSampleBytes, data + at, kSampleBytes);
    }
}

py::bytes sample(uintptr_t address, int64_t bytes) {
    const char* data = reinterpret_cast<const char*>(address);
    if (bytes <= kSamples * kSampleBytes) return py::bytes(data, static_cast<size_t>(bytes < 0 ? 0 : bytes));
    char taken[kSamples * kSampleBytes];
    take_sample(data, bytes, taken);
    return py::bytes(taken, sizeof taken);
}

bool sample_matches(uintptr_t address, int64_t bytes, const py::bytes& expected) {
    char* before = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(expected.ptr(), &before, &size) != 0) throw py::error_already_set();
    const char* data = reinterpret_cast<const char*>(address);
    if (bytes <= kSamples * kSampleBytes)
        return size == bytes && std::memcmp(before, data, static_cast<size_t>(size)) == 0;
    if (size != kSamples * kSampleBytes) return false;
    char now[kSamples * kSampleBytes];
    take_sample(data, bytes, now);
    return std::memcmp(before, now, sizeof now) == 0;
}

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
    module.doc() = "Build and processor information of bitorch_qlinear.";
    module.def("build_info", &build_info,
               "Version, digest of the sources, compiler, torch built against, CUDA targets.");
    module.def("cpu_capability", &bitorch_qlinear::cpu_capability,
               "What processor and operating system offer: AVX512, AVX2, NEON or DEFAULT.");
    module.def("sample", &sample, py::arg("address"), py::arg("bytes"),
               "Raw values spread evenly over `bytes` bytes at `address`.");
    module.def("sample_matches", &sample_matches, py::arg("address"), py::arg("bytes"), py::arg("expected"),
               "Whether sample(address, bytes) would return `expected`.");
}
