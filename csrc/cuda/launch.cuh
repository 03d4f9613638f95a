// Products that are launched while the kernel that makes their x still runs (programmatic dependent launch, CUDA C++
// programming guide; compute capability 9.0). That kernel is pack, or align if x is packed already and its set bits are
// counted. Blocks of the product start as soon as every block of that kernel has started, load the weights and all else
// that is not x, and wait for it only then.
//
// A product may do so only directly behind pack or align, called "the maker" here, which itself is launched as usual.
// This is why it is safe:
//   - The maker makes nothing but x: a launch that also counts or aligns the weights is followed by a product as usual.
//   - What ran before the maker has ended, and its writes are visible, before the first block of the maker starts. So
//     whatever wrote the weights, their prepared form, scale, bias, limits or flips, such as an optimizer's step or a
//     launch that aligns the weights, has ended before a block of the product starts and loads them. So has whatever
//     wrote words of x that are an input, though the product loads these behind the wait, too.
//   - x's set bits and words, which the maker writes, are loaded after wait_for_kernel_before(), which returns when all
//     of the maker has ended, and not through the path of load_once(), which may keep what it found before.
//   - The product writes y, which depends on x, after that wait too. Memory that the allocator gave to y may have
//     belonged to a tensor that the maker or a kernel before it reads. The product may write a report of a wrong
//     prepared form earlier, which no kernel reads.
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
// A captured graph keeps the same order, as an edge of its own kind.
#pragma once

#include <cuda_runtime.h>

namespace bitorch_qlinear::cuda {

// Lets the kernel behind this one start, if it was launched in that way. A kernel that was not waits for the end.
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

// Launches a kernel; with `behind_pack`, before the kernel in front of it in the stream has ended. Such a kernel must
// call wait_for_kernel_before(), in code that waits (launches_depend in records.h).
template <class... Parameters>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                          cudaStream_t stream, bool behind_pack, Parameters... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(static_cast<unsigned>(blocks));
    configuration.blockDim = dim3(static_cast<unsigned>(threads));
    configuration.dynamicSmemBytes = shared_bytes, configuration.stream = stream;
    configuration.attrs = &attribute, configuration.numAttrs = behind_pack ? 1 : 0;
    static_cast<void>(cudaLaunchKernelEx(&configuration, kernel, arguments...));
    return cudaGetLastError();  // which also clears the error, before others see it
}

}  // namespace bitorch_qlinear::cuda
