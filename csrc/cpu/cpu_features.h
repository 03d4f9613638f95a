// The instruction sets that both the processor and the operating system support.
#pragma once

namespace bitorch_qlinear {

struct CpuFeatures {
    bool popcnt = false;
    bool avx2 = false;    // with FMA, F16C and BMI2, which every AVX2 processor of Intel and AMD has
    bool avx512 = false;  // F, BW, DQ, VL and VPOPCNTDQ, beside all of avx2
    bool neon = false;    // Advanced SIMD of 64-bit Arm
};

const CpuFeatures& cpu_features();

// "AVX512", "AVX2", "NEON" or "DEFAULT": the highest of the above.
const char* cpu_capability();

}  // namespace bitorch_qlinear
