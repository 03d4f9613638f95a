#include "cpu_features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace bitorch_qlinear {
namespace {

#if defined(__x86_64__)
// Returns the register states that the operating system saves (XCR0), without which the processor's features are
// useless.
uint64_t saved_states() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t{high} << 32 | low;
}

bool all_bits(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

CpuFeatures detect() {
    constexpr uint64_t kVectorStates = 0x6, kMaskStates = 0xE6;  // XMM + YMM; the same + k, ZMM, ZMM16-31
    constexpr uint32_t kPopcnt = 1u << 23, kFma = 1u << 12, kOsXsave = 1u << 27, kAvx = 1u << 28,
                       kF16c = 1u << 29;                                     // 1.ecx
    constexpr uint32_t kAvx2 = 1u << 5, kBmi2 = 1u << 8;                     // 7.ebx
    constexpr uint32_t kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // 7.ebx: F, DQ, BW, VL
    constexpr uint32_t kVpopcntdq = 1u << 14;                                // 7.ecx
    CpuFeatures features;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
    features.popcnt = all_bits(c, kPopcnt);
    if (!all_bits(c, kFma | kOsXsave | kAvx | kF16c)) return features;
    const uint64_t states = saved_states();
    if (!all_bits(states, kVectorStates) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
    features.avx2 = all_bits(b, kAvx2 | kBmi2);
    features.avx512 = features.avx2 && all_bits(states, kMaskStates) && all_bits(b, kAvx512) && all_bits(c, kVpopcntdq);
    return features;
}
#elif defined(__aarch64__)
CpuFeatures detect() {
    CpuFeatures features;
    features.neon = true;  // it belongs to the base architecture
    return features;
}
#else
CpuFeatures detect() { return {}; }
#endif

}  // namespace

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

const char* cpu_capability() {
    const CpuFeatures& features = cpu_features();
    if (features.avx512) return "AVX512";
    if (features.avx2) return "AVX2";
    return features.neon ? "NEON" : "DEFAULT";
}

}  // namespace bitorch_qlinear
