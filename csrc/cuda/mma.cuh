// The tensor cores' products of bits (PTX ISA, "Warp-level matrix instructions: mma").
//
// Fragments of m16n8k256, with g = lane / 4 and q = lane % 4, a register 32 consecutive bits of k:
//     a[0] row g,     bits 32 q ...        b[0] column g, bits 32 q ...        c[0], c[1] row g, columns 2 q, 2 q + 1
//     a[1] row g + 8, bits 32 q ...        b[1] column g, bits 128 + 32 q ...  c[2], c[3] row g + 8, the same columns
//     a[2] row g,     bits 128 + 32 q ...
//     a[3] row g + 8, bits 128 + 32 q ...
// Which bits of k an instruction takes does not matter as long as a and b agree: a sum has no order.
//
// m16n8k32 of bytes has the same fragments, with 4 bytes instead of 32 bits.
//
// nvcc 13.0 makes one BMMA of and.popc for sm_80 to sm_90a. For sm_100 and sm_120, which have no binary tensor cores,
// it would make eight IMMA on unpacked bytes, and unpack the bytes again for each: kernels of this instruction are left
// empty there, and gemm_mma_int8_sm80.cu does better.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
#define BITORCH_QLINEAR_MMA_SM80 1
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750 && __CUDA_ARCH__ < 900
#define BITORCH_QLINEAR_MMA_SM75 1
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define BITORCH_QLINEAR_MMA_INT8 1
#endif

namespace bitorch_qlinear::cuda {

#ifdef BITORCH_QLINEAR_MMA_SM80
// c += popcount(a & b) of 16 x 8 outputs over 256 bits.
__device__ __forceinline__ void mma_and_popc(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

#ifdef BITORCH_QLINEAR_MMA_SM75
// c += popcount(a ^ b) of 8 x 8 outputs over 128 bits: a is row g, b column g, bits 32 q ...; c row g, columns 2 q, 2 q
// + 1.
__device__ __forceinline__ void mma_xor_popc(int32_t (&c)[2], uint32_t a, uint32_t b) {
    asm volatile("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(c[0]), "+r"(c[1])
                 : "r"(a), "r"(b));
}
#endif

#ifdef BITORCH_QLINEAR_MMA_INT8
// c += the products of 16 x 8 outputs over 32 unsigned bytes.
__device__ __forceinline__ void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

}  // namespace bitorch_qlinear::cuda
