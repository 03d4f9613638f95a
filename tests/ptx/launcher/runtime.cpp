// Implements the part of the CUDA runtime that nvcc's host code calls, for a machine without a GPU: a launch is passed
// to a Python function, and nothing runs.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <unordered_map>
#include <utility>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Kernel {
    const char* name;
    int most_dynamic = 0;  // the limit of dynamic shared memory that was set; 0 means that of any kernel
};

struct Configuration {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
};

using OnLaunch = void (*)(const char* name, const dim3* grid, const dim3* block, uint64_t shared_bytes,
                          uint64_t most_dynamic, cudaStream_t stream, void** arguments, int starts_early, int cluster);

// Returns the kernels by their address on the host. The map is constructed at its first use, because static
// constructors of other files fill it.
std::unordered_map<const void*, Kernel>& kernels() {
    static std::unordered_map<const void*, Kernel> all;
    return all;
}

Configuration configuration;
OnLaunch on_launch;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
int multiprocessors = 132, code = 90, current_device = 0, clusters_at_once = INT32_MAX / 8;
cudaError_t last_error, error_of_launch, error_of_attribute;

cudaError_t remember(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

}  // namespace

// ---- called by Python -----------------------------------------------------------------------------------------------

EXPORT void runtime_on_launch(OnLaunch function) { on_launch = function; }

// Sets the errors that every launch and every cudaFuncSetAttribute return from now on, and clears the last error.
EXPORT void runtime_errors(int launch, int attribute) {
    error_of_launch = static_cast<cudaError_t>(launch), error_of_attribute = static_cast<cudaError_t>(attribute);
    last_error = cudaSuccess;
}

EXPORT void runtime_multiprocessors(int count) { multiprocessors = count; }

// Sets the current device and how many clusters it runs at once; a negative number of clusters is an error.
EXPORT void runtime_device(int device, int clusters) { current_device = device, clusters_at_once = clusters; }

EXPORT void runtime_code(int capability) { code = capability; }

// ---- called by launchers --------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

// Does as if it loaded the kernel's code, which could end a capture unless the mode is relaxed.
EXPORT cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    if (capture_mode != cudaStreamCaptureModeRelaxed) return remember(cudaErrorStreamCaptureUnsupported);
    if (error_of_attribute != cudaSuccess) return remember(error_of_attribute);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return remember(cudaErrorNotSupported);
    kernels().at(function).most_dynamic = value;
    return cudaSuccess;
}

// Returns the target of a kernel's PTX, or fails if Python said that it is 0.
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
    static_cast<void>(kernels().at(function));
    *attributes = {};
    attributes->ptxVersion = code;
    return code ? cudaSuccess : remember(cudaErrorNoKernelImageForDevice);
}

EXPORT cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (attribute != cudaDevAttrMultiProcessorCount) return remember(cudaErrorNotSupported);
    *value = multiprocessors;
    return cudaSuccess;
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, capture_mode);
    return cudaSuccess;
}

// Does as if it loaded the kernel's code, which ends a capture unless the mode is relaxed. The question must describe a
// launch that is possible.
EXPORT cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* configuration) {
    const cudaLaunchAttribute* attribute = configuration->attrs;
    if (configuration->numAttrs != 1 || attribute->id != cudaLaunchAttributeClusterDimension || clusters_at_once < 0) {
        return remember(cudaErrorInvalidValue);
    }
    const unsigned blocks = attribute->val.clusterDim.x, threads = configuration->blockDim.x;
    if (blocks == 0 || configuration->gridDim.x % blocks != 0) return remember(cudaErrorInvalidClusterSize);
    if (threads < 32 || threads > 1024) return remember(cudaErrorInvalidConfiguration);
    if (capture_mode != cudaStreamCaptureModeRelaxed) return remember(cudaErrorStreamCaptureUnsupported);
    *clusters = clusters_at_once;
    return cudaSuccess;
}

// Writes the figures of a tensor map as they are, in place of the driver's encoding.
static CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    const bool expected = type == CU_TENSOR_MAP_DATA_TYPE_UINT32 && rank == 2 && steps[0] == 1 && steps[1] == 1 &&
                          interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
                          fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
    if (!expected) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t figures[] = {reinterpret_cast<uint64_t>(address), sizes[0], sizes[1], strides[0], box[0], box[1]};
    std::memset(map, 0, sizeof *map);
    std::memcpy(map, figures, sizeof figures);
    return CUDA_SUCCESS;
}

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                                    unsigned long long, cudaDriverEntryPointQueryResult* result) {
    const bool known = !std::strcmp(symbol, "cuTensorMapEncodeTiled") && version == 12000;
    *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
    *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// ---- called by kernel<<<...>>>(...) ---------------------------------------------------------------------------------

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
    configuration = {grid, block, shared_bytes, stream};
    return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
    *grid = configuration.grid, *block = configuration.block, *shared_bytes = configuration.shared_bytes;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = reinterpret_cast<cudaKernel_t>(&kernels().at(function));
    return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                                      cudaStream_t stream) {
    if (error_of_launch != cudaSuccess) return remember(error_of_launch);
    const auto& kernel = *reinterpret_cast<const Kernel*>(handle);
    on_launch(kernel.name, &grid, &block, shared_bytes, kernel.most_dynamic, stream, arguments, 0, 0);
    return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function,
                                       void** arguments) {
    if (error_of_launch != cudaSuccess) return remember(error_of_launch);
    int starts_early = 0, cluster = 0;
    for (unsigned i = 0; i < configuration->numAttrs; ++i) {
        const cudaLaunchAttribute& attribute = configuration->attrs[i];
        if (attribute.id == cudaLaunchAttributeClusterDimension) {
            const auto& sides = attribute.val.clusterDim;
            if (sides.y != 1 || sides.z != 1) return remember(cudaErrorNotSupported);
            cluster = static_cast<int>(sides.x);
            continue;
        }
        if (attribute.id != cudaLaunchAttributeProgrammaticStreamSerialization) return remember(cudaErrorNotSupported);
        starts_early = attribute.val.programmaticStreamSerializationAllowed;
    }
    const Kernel& kernel = kernels().at(function);
    on_launch(kernel.name, &configuration->gridDim, &configuration->blockDim, configuration->dynamicSmemBytes,
              kernel.most_dynamic, configuration->stream, arguments, starts_early, cluster);
    return cudaSuccess;
}

// ---- called to register a file's kernels ----------------------------------------------------------------------------

EXPORT void** __cudaRegisterFatBinary(void*) {
    static void* none;
    return &none;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT char __cudaInitModule(void**) { return 1; }

EXPORT void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*,
                                   dim3*, int*) {
    kernels()[function] = {name};
}
