// The product of signs in tile registers (gemm_amx.cpp), as the record in gemm_avx512.cpp takes it.
#pragma once

#include <cstdint>

#include "kernel.h"
#include "target.h"

namespace bitorch_qlinear {

#if defined(BITORCH_QLINEAR_HAS_AMX)
constexpr int64_t kAmxRowTile = 1024;
// As in the record Kernel. Both use those of kAvx512Kernel if it is faster, and if the system refuses tile registers.
int64_t amx_workspace_bytes(int64_t rows, int64_t k);
void amx_gemm(const Product& product, Range rows, Range columns, uint8_t* workspace);
#endif

}  // namespace bitorch_qlinear
