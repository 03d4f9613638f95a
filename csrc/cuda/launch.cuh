// Products that are launched while the kernel that makes their x still runs (programmatic dependent launch, CUDA C++
// programming guide; compute capability 9.0). That kernel is pack, or align if x is packed already and has to be
// aligned or counted. Blocks of the product may start as soon as every block of that kernel has started. They load
// words of the weights first, and wait for that kernel before they read x or the set bits of a row, or write y.
//
// A product may do so only directly behind pack or align, called "the maker" here, which itself is launched as usual.
// This is why it is safe:
//   - The maker makes x, and beside it at most the weights' set bits. A launch that also aligns the weights, and so
//     makes their words, is followed by a product as usual.
//   - Every kernel before the maker has ended, and its writes are visible, before the first block of the maker starts,
//     and so before a block of the product starts. Among them are those that wrote the weights, their prepared form,
//     scale, bias, limits, flips and an x that is given as words, such as an optimizer's step or a launch that packs
//     the weights.
//   - x's words, and the set bits of x and of the weights, which the maker may write, are loaded after
//     wait_for_kernel_before(), which returns when all of the maker has ended, and not by ld.global.nc, which may give
//     what was there before. A form's header lies before its set bits and is read early, but a maker counts only
//     weights without a form.
//   - The product writes y after that wait, too, even if it writes only that there is no result. So the allocator may
//     give y memory that the maker reads. The product may report a wrong prepared form earlier, which no kernel reads.
//   - Every block waits. So the product ends after the maker, and the kernel behind it, which is launched as usual,
//     starts after both. It may write to x, to the words, or to the weights.
// Another thread of the program may launch a kernel into the same stream between the maker and the product. If that
// kernel writes the weights, the call sees old or new words, as it would with usual launches, and perhaps some of both.
//
// The wait is an instruction of 9.0 and later, and only code for 9.0 has it, because on other devices products are
// never launched in this way. A library that was built for older targets alone (TORCH_CUDA_ARCH_LIST="8.0+PTX") runs on
// 9.0 by PTX that the driver compiles, and its kernels do not wait. So launches_depend() in records.h decides by the
// target of the code that the device runs.
//
// A captured graph keeps the same order: the edge from the maker to the product is a programmatic one.
#pragma once

#include <cuda_runtime.h>

#include "relaxed_capture.h"

namespace bitorch_qlinear::cuda {

// Whether this is code that may run before the kernel in front of it has ended.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr bool kMayStartEarly = true;
#else
constexpr bool kMayStartEarly = false;
#endif

// Lets the kernel behind this one start, if it was launched in that way. A kernel that was not waits for the end. This
// concerns kernels of other libraries, too, that are launched so behind pack_bits: they must wait before they touch
// what it reads or writes, as they must behind every kernel that does this.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before has ended and its writes are visible, if this one was launched before that. Each thread
// that reads what it wrote must call it, or pass a barrier behind a thread that has.
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows a kernel so many bytes of dynamic shared memory on the current device, which are more than the 48 KiB that it
// may always have. Asking at every launch costs less than remembering which devices were asked. The first time may load
// the kernel's code.
template <class... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), int bytes) {
    const RelaxedCapture relaxed;
    static_cast<void>(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    return cudaGetLastError();  // which also clears the error, before others see it
}

// Launches a kernel. With `starts_early` it may start before the kernel in front of it in the stream has ended; then
// each of its blocks must call wait_for_kernel_before(), in code that waits (launches_depend in records.h).
template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                          cudaStream_t stream, bool starts_early, Parameters... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(static_cast<unsigned>(blocks));
    configuration.blockDim = dim3(static_cast<unsigned>(threads));
    configuration.dynamicSmemBytes = shared_bytes, configuration.stream = stream;
    configuration.attrs = &attribute, configuration.numAttrs = starts_early ? 1 : 0;
    static_cast<void>(cudaLaunchKernelEx(&configuration, kernel, arguments...));
    return cudaGetLastError();  // which also clears the error, before others see it
}

}  // namespace bitorch_qlinear::cuda
