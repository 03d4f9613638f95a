// The instruction sets that both the processor and the operating system support.
#pragma once

namespace bitorch_qlinear {

struct CpuFeatures {
    bool popcnt = false;
    bool avx2 = false;    // with FMA, F16C and BMI2, which every AVX2 processor of Intel and AMD has
    bool avx512 = false;  // F, BW, DQ, VL and VPOPCNTDQ, beside all of avx2
    // AMX-TILE and AMX-INT8 with tile registers of 16 rows of 64 bytes, and AVX512_VBMI, beside all of avx512. A
    // process must also ask for the registers (tiles_granted).
    bool amx = false;
    bool neon = false;  // Advanced SIMD of 64-bit Arm
};

const CpuFeatures& cpu_features();

// Returns whether this process may use tile registers, for which the first call asks the operating system. They make
// the frames of signals larger, so it is called only if they are to be used. The processor must have them.
bool tiles_granted();

// "AVX512", "AVX2", "NEON" or "DEFAULT": the highest of the above.
const char* cpu_capability();

}  // namespace bitorch_qlinear
