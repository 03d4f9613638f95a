// The product of signs in tile registers (gemm_amx.cpp), which gemm_avx512.cpp puts into the record `amx`.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "target.h"

namespace bitorch_qlinear {

#if defined(BITORCH_QLINEAR_HAS_AMX)
// These replace Kernel::workspace_bytes and Kernel::gemm of kAvx512Kernel.
int64_t amx_workspace_bytes(int64_t rows, int64_t k);
void amx_gemm(const Product& product, Range rows, Range columns, uint8_t* workspace);
#endif

}  // namespace bitorch_qlinear
