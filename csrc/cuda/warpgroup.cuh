// The warpgroup's tensor cores and what feeds them (compute capability 9.0, target sm_90a alone): barriers in shared
// memory, copies of boxes by a tensor map, and products of bits whose factors lie in shared memory. Most functions
// are one instruction of the PTX ISA (mbarrier, cp.async.bulk.tensor, wgmma, setmaxnreg); wait() is a loop.
//
// A warpgroup is four warps, which multiply together. m64nNk256 adds to 64 x N sums over 256 bits of k. Warp w of the
// warpgroup has rows 16 w to 16 w + 15, and its lane (g, q), with g = lane / 4 and q = lane % 4, has
//
//     d[4 j], d[4 j + 1]          row 16 w + g,     columns 8 j + 2 q and 8 j + 2 q + 1
//     d[4 j + 2], d[4 j + 3]      row 16 w + g + 8, the same columns
//
// Both factors lie in shared memory as a tensor map of lines (tensor_map.h) puts them: a row is 128 bytes, whose chunk
// c of 16 bytes lies at chunk c ^ row % 8. 256 bits are two chunks, so the next 256 bits of k begin 32 bytes on.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "warp.cuh"

// Only the "a" of sm_90a allows these instructions. Kernels that use them are left empty on all other targets.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BITORCH_QLINEAR_WGMMA_SM90A 1
#endif

namespace bitorch_qlinear::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kInstructionRows = 64, kInstructionBits = 256;

#ifdef BITORCH_QLINEAR_WGMMA_SM90A

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers in shared memory --------------------------------------------------------------------------------------

// A phase of a barrier ends when as many arrivals and bytes have come as it expects. A waiting thread knows the phase
// by its parity alone: it must not fall two phases behind.

__device__ __forceinline__ void init_barrier(uint64_t& barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(uint64_t& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and lets the phase expect so many bytes of copies as well.
__device__ __forceinline__ void arrive_and_expect(uint64_t& barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity has ended. On a new barrier, the phase of parity 1 counts as ended.
__device__ __forceinline__ void wait(uint64_t& barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra AGAIN;\n}" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
}

// ---- copies by a tensor map -----------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box of lines that begins at a word and row of the map's matrix. Its bytes arrive at the barrier.
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap& map, int word, int row, uint64_t& barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(shared)),
        "l"(&map), "r"(word), "r"(row), "r"(shared_address(&barrier))
        : "memory");
}

// ---- products of bits -----------------------------------------------------------------------------------------------

// Returns the descriptor of rows of 128 bytes, swizzled, of which the first begins on 1024 bytes: groups of 8 rows are
// 1024 bytes apart. (PTX ISA, "Matrix Descriptor Format"; the leading dimension is not used, and CuTe writes a 1.)
__device__ __forceinline__ uint64_t describe(const void* rows) {
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kGroup = uint64_t{1024 / 16} << 32,
                       kLeading = uint64_t{1} << 16;
    return kSwizzle128 | kGroup | kLeading | (shared_address(rows) & 0x3FFFF) >> 4;
}

// Returns the descriptor of the same rows, so many bytes further on.
__device__ __forceinline__ uint64_t advance(uint64_t description, int bytes) {
    return description + static_cast<uint64_t>(bytes / 16);
}

// Orders registers and shared memory before the products that follow.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all groups except the last `InFlight` are done: their factors have been read, and their sums are there.
template <int InFlight>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(InFlight) : "memory");
}

// Keeps the compiler from moving a use of the sums in front of the wait before it.
template <int Count>
__device__ __forceinline__ void hold(int32_t (&d)[Count]) {
#pragma unroll
    for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// clang-format off
#define BITORCH_QLINEAR_LIST_64                                                        \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BITORCH_QLINEAR_LIST_96                                                        \
    BITORCH_QLINEAR_LIST_64 ", "                                                       \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define BITORCH_QLINEAR_SUMS_64                                                                             \
    "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),         \
    "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),   \
    "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), \
    "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), \
    "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]), "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), \
    "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]), "+r"(d[46]), "+r"(d[47]), \
    "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]), "+r"(d[55]), \
    "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
#define BITORCH_QLINEAR_SUMS_96                                                                             \
    BITORCH_QLINEAR_SUMS_64,                                                                                \
    "+r"(d[64]), "+r"(d[65]), "+r"(d[66]), "+r"(d[67]), "+r"(d[68]), "+r"(d[69]), "+r"(d[70]), "+r"(d[71]), \
    "+r"(d[72]), "+r"(d[73]), "+r"(d[74]), "+r"(d[75]), "+r"(d[76]), "+r"(d[77]), "+r"(d[78]), "+r"(d[79]), \
    "+r"(d[80]), "+r"(d[81]), "+r"(d[82]), "+r"(d[83]), "+r"(d[84]), "+r"(d[85]), "+r"(d[86]), "+r"(d[87]), \
    "+r"(d[88]), "+r"(d[89]), "+r"(d[90]), "+r"(d[91]), "+r"(d[92]), "+r"(d[93]), "+r"(d[94]), "+r"(d[95])
// clang-format on

// d (+)= popcount(a & b) of 64 x 128 or 64 x 192 outputs over 256 bits. If `accumulate` is 0, d is not read. The whole
// warpgroup calls it.
__device__ __forceinline__ void multiply_bits(int32_t (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k256.s32.b1.b1.and.popc {" BITORCH_QLINEAR_LIST_64 "}, %64, %65, p;\n}"
        : BITORCH_QLINEAR_SUMS_64
        : "l"(a), "l"(b), "r"(accumulate));
}
__device__ __forceinline__ void multiply_bits(int32_t (&d)[96], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k256.s32.b1.b1.and.popc {" BITORCH_QLINEAR_LIST_96 "}, %96, %97, p;\n}"
        : BITORCH_QLINEAR_SUMS_96
        : "l"(a), "l"(b), "r"(accumulate));
}

#undef BITORCH_QLINEAR_LIST_64
#undef BITORCH_QLINEAR_LIST_96
#undef BITORCH_QLINEAR_SUMS_64
#undef BITORCH_QLINEAR_SUMS_96

// ---- registers and barriers of a warpgroup --------------------------------------------------------------------------

// Gives registers of each of the warpgroup's threads back to the block's pool, down to so many.
template <int Registers>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Takes registers from the pool, as soon as it has them, up to so many for each thread.
template <int Registers>
__device__ __forceinline__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Waits for the other threads of the warpgroup; `barrier` is a number from 1 on, which no other warpgroup uses.
__device__ __forceinline__ void sync_warpgroup(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kWarpgroup) : "memory");
}

#endif

}  // namespace bitorch_qlinear::cuda
