#include "cpu_features.h"

#include <cstdint>

#include "target.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(BITORCH_QLINEAR_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
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

#if defined(BITORCH_QLINEAR_HAS_AMX)
// Returns whether the first palette has eight tile registers of 16 rows of 64 bytes (leaf 1D).
bool has_usual_tiles() {
    uint32_t a, b, c, d;
    return __get_cpuid_count(0x1D, 1, &a, &b, &c, &d) && b >> 16 >= 8 && (b & 0xFFFF) == 64 && (c & 0xFFFF) == 16;
}
#endif

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
#if defined(BITORCH_QLINEAR_HAS_AMX)
    constexpr uint64_t kTileStates = 0x60000;       // the tile registers and their shapes
    constexpr uint32_t kVbmi = 1u << 1;             // 7.ecx
    constexpr uint32_t kAmx = 1u << 24 | 1u << 25;  // 7.edx: TILE, INT8
    features.amx = features.avx512 && all_bits(states, kTileStates) && all_bits(c, kVbmi) && all_bits(d, kAmx) &&
                   has_usual_tiles();
#endif
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

bool tiles_granted() {
#if defined(BITORCH_QLINEAR_HAS_AMX)
    // The kernel's headers of older systems lack these names.
    constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
    static const bool granted = syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
    return granted;
#else
    return false;
#endif
}

const char* cpu_capability() {
    const CpuFeatures& features = cpu_features();
    if (features.avx512) return "AVX512";
    if (features.avx2) return "AVX2";
    return features.neon ? "NEON" : "DEFAULT";
}

}  // namespace bitorch_qlinear
