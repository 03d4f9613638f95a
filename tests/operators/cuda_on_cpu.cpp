// The CUDA operators on the CPU: csrc/torch/ops_cuda.cpp and csrc/cuda/dispatch.cpp, unchanged, with plain loops in
// place of the kernels and of CUDA's runtime. They are registered as the operators of a library "cuda_on_cpu", for
// tensors on the CPU. Each loop takes its arguments literally, as its kernel does: it masks nothing, uses the popcounts
// if its kernel does, and refuses memory that is not aligned to its elements, at which a GPU would stop.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// ---- what torch and CUDA would say of the device --------------------------------------------------------------------

namespace {

// The devices, and the code that each runs; 0 stands for a device that the library has no code for, and -1 for one
// where a kernel has failed before. All kernels except wgmma_sm90a run on the first one.
struct OneDevice {
    int capability, multiprocessors, code;
};
constexpr OneDevice kDevices[] = {{80, 108, 80}, {90, 132, 80}, {90, 132, 75},
                                  {90, 132, 90}, {80, 108, 0},  {80, 108, -1}};

int device_of_tensors, current_device;
cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

}  // namespace

namespace torch::stable::accelerator {
class FakeGuard {
  public:
    explicit FakeGuard(DeviceIndex index) : before_(std::exchange(current_device, index)) {}
    ~FakeGuard() { current_device = before_; }

  private:
    int before_;
};
}  // namespace torch::stable::accelerator

static AOTITorchError device_index_of(AtenTensorHandle, int32_t* index) { return *index = device_of_tensors, 0; }
static AOTITorchError current_stream_of(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}

// Fails if torch would copy elements that are not aligned, at which a GPU would stop, too.
static AOTITorchError call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version) {
    if (std::string(name) == "aten::clone") {
        const auto source = torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
        stack[0] = torch::stable::detail::from(source);
        if (reinterpret_cast<uintptr_t>(source.data_ptr()) % source.element_size()) return 1;
    }
    return torch_call_dispatcher(name, overload, stack, version);
}

#define DeviceGuard FakeGuard
#define torch_call_dispatcher call_dispatcher
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_get_device_index device_index_of
#define aoti_torch_get_current_cuda_stream current_stream_of
#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(name, library) STABLE_TORCH_LIBRARY_FRAGMENT(cuda_on_cpu, library)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, key, library) _STABLE_TORCH_LIBRARY_IMPL(cuda_on_cpu, CPU, library, C10_UID)

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" {
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMisalignedAddress ? "misaligned address" : "another error";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = std::size(kDevices), cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int index) {
    const OneDevice& device = kDevices[index];
    *value = which == cudaDevAttrComputeCapabilityMajor   ? device.capability / 10
             : which == cudaDevAttrComputeCapabilityMinor ? device.capability % 10
                                                          : device.multiprocessors;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, capture_mode);
    return cudaSuccess;
}
}

#include "../../csrc/cuda/dispatch.cpp"
// Products may start early on the first device, too.
#define launches_depend(gpu) ((gpu.capability == 80 && gpu.early) || (launches_depend)(gpu))
#include "../../csrc/cuda/wrong_form.cpp"
#include "../../csrc/torch/ops.cpp"
// Without CUDA, torch has no page-locked memory.
#define aoti_torch_empty_strided_pinned aoti_torch_empty_strided
#include "../../csrc/torch/ops_cuda.cpp"

// ---- the kernels ----------------------------------------------------------------------------------------------------

namespace {

std::string launches;  // the names of the kernels launched since Python last asked, separated by spaces
std::vector<const uint32_t*> aligned_words;  // what the last launch has aligned

}  // namespace

namespace bitorch_qlinear::cuda {
namespace {

struct Misaligned {};

// Returns the pointer as one to T, of which `least` bytes are read at once.
template <class T>
T* at(const void* pointer, uintptr_t least = sizeof(T)) {
    if (reinterpret_cast<uintptr_t>(pointer) % least) throw Misaligned{};
    return static_cast<T*>(const_cast<void*>(pointer));
}

template <class Function>
cudaError_t launched(const char* name, Function function) {
    launches += (launches.empty() ? "" : " ") + std::string(name);
    aligned_words.clear();
    try {
        function();
    } catch (const Misaligned&) {
        return cudaErrorMisalignedAddress;
    }
    return cudaSuccess;
}

double value_of(const void* values, DType dtype, int64_t i) {
    switch (dtype) {
        case DType::float64: return at<double>(values)[i];
        case DType::float32: return at<float>(values)[i];
        case DType::float16: return widen(at<Half>(values, 2)[i]);
        default: return widen(at<BFloat16>(values, 2)[i]);
    }
}

// Writes a number that the dtype has, or narrows a float to it.
void store(void* values, DType dtype, int64_t i, double value) {
    switch (dtype) {
        case DType::float64: at<double>(values)[i] = value; break;
        case DType::float32: at<float>(values)[i] = static_cast<float>(value); break;
        case DType::float16: narrow(static_cast<float>(value), at<Half>(values, 2) + i); break;
        case DType::bfloat16: narrow(static_cast<float>(value), at<BFloat16>(values, 2) + i); break;
        case DType::int32: at<int32_t>(values)[i] = static_cast<int32_t>(value); break;
        case DType::int8: at<int8_t>(values)[i] = static_cast<int8_t>(value); break;
        case DType::boolean: at<bool>(values)[i] = value > 0; break;
    }
}

bool bit(const uint32_t* words, int64_t i) { return words[i / kWordBits] >> i % kWordBits & 1; }

template <class T>
void write_number(const Output& y, int64_t i, int64_t j, int64_t dot) {
    T value = static_cast<T>(dot);
    if (y.scale.data) value *= static_cast<T>(value_of(y.scale.data, y.scale.dtype, j));
    if (y.bias.data) value += static_cast<T>(value_of(y.bias.data, y.bias.dtype, j));
    store(y.data, y.dtype, i, value);
}

// Computes what a kernel does: one that masks the last word (popc), counts a ^ b, or counts a & b.
void multiply(const Product& product, bool masks, bool popcounts) {
    const auto [x, weight, m, n, k, y, wrong_form] = product;
    const int64_t width = masks ? words_for(k) : aligned_words_for(k);
    bool wrong = false;
    if (wrong_form) {
        const PreparedHeader* header = at<PreparedHeader>(weight.popcounts) - 1;
        wrong = header->n != n || header->k != k;
        if (wrong) *wrong_form = {n, k, header->n, header->k, 1, 0};
    }
    const uint32_t *a = at<uint32_t>(x.words, masks ? 4 : 16), *b = at<uint32_t>(weight.words, masks ? 4 : 16);
    for (int64_t row = 0; row < m; ++row) {
        for (int64_t column = 0; column < n; ++column) {
            int64_t count = 0;
            for (int64_t word = 0; word < width; ++word) {
                const uint32_t left = a[row * x.stride + word], right = b[column * weight.stride + word];
                count += popcounts ? std::popcount(left & right)
                                   : std::popcount((left ^ right) & (masks ? word_mask(word, k) : ~0u));
            }
            if (popcounts) {
                const int64_t bits = at<int32_t>(x.popcounts)[row] + at<int32_t>(weight.popcounts)[column];
                count = bits - 2 * count;
            }
            const int64_t i = row * n + column;
            if (y.dtype == DType::boolean) {
                uint32_t* word = at<uint32_t>(y.data) + row * words_for(n) + column / kWordBits;
                if (column % kWordBits == 0) *word = 0;
                bool one = count <= at<int32_t>(y.scale.data)[column];
                one ^= y.bias.data && bit(at<uint32_t>(y.bias.data), column);
                *word |= uint32_t{one && !wrong} << column % kWordBits;
            } else if (y.dtype == DType::int32) {
                at<int32_t>(y.data)[i] = wrong ? INT32_MIN : static_cast<int32_t>(k - 2 * count);
            } else if (wrong) {
                store(y.data, y.dtype, i, NAN);
            } else if (y.dtype == DType::float64) {
                write_number<double>(y, i, column, k - 2 * count);
            } else {
                write_number<float>(y, i, column, k - 2 * count);
            }
        }
    }
}

// A product that starts early must be the launch after a pack, align or count, which must not align its weights. Its
// name then has a star.
cudaError_t product(GemmKernel kernel, const Product& job, bool starts_early = false) {
    const KernelRecord& known = record(kernel);
    const std::string before = launches.substr(launches.rfind(' ') + 1);
    const bool makes_x = before.starts_with("pack") || before.starts_with("align") || before.starts_with("count");
    const bool aligned = std::ranges::count(aligned_words, job.weight.words) > 0;
    if (starts_early && (!makes_x || aligned)) return cudaErrorNotSupported;
    const std::string name = known.name + std::string(starts_early ? "*" : "");
    return launched(name.c_str(), [&] { multiply(job, !known.aligned, known.popcounts); });
}

}  // namespace

// Loading code ends a capture, unless the mode is relaxed.
cudaError_t find_code(int* capability) {
    if (capture_mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
    *capability = kDevices[current_device].code;
    return *capability > 0 ? cudaSuccess : *capability ? cudaErrorLaunchFailure : cudaErrorNoKernelImageForDevice;
}

static void align_words(const Align& job);

// Returns what an align does, if it does anything.
static std::string name_of(const Align& job) { return !job.m && !job.header ? "" : job.aligned ? "align" : "count"; }

static std::string both(const std::string& first, const std::string& second) {
    return first + (first.empty() || second.empty() ? "" : "+") + second;
}

cudaError_t pack(const Pack& job, const Align& beside, cudaStream_t) {
    return launched(both("pack", name_of(beside)).c_str(), [&] {
        align_words(beside);
        for (int64_t row = 0; row < job.m; ++row) {
            uint32_t* words = at<uint32_t>(job.words) + row * job.word_stride;
            std::fill_n(words, job.word_stride, 0);
            uint32_t* in_range = job.in_range ? at<uint32_t>(job.in_range) + row * words_for(job.k) : nullptr;
            if (in_range) std::fill_n(in_range, words_for(job.k), 0);
            int32_t count = 0;
            for (int64_t i = 0; i < job.k; ++i) {
                const double value = value_of(job.x, job.dtype, row * job.stride + i);
                const bool one = job.strict ? value > 0 : !(value < 0);
                words[i / kWordBits] |= uint32_t{one} << i % kWordBits;
                if (in_range) in_range[i / kWordBits] |= uint32_t{std::fabs(value) <= job.threshold} << i % kWordBits;
                count += one;
            }
            if (job.popcounts) at<int32_t>(job.popcounts)[row] = count;
        }
    });
}

// Returns the place of a value in the order of csrc/cpu/limits.h, and whether it is NaN.
static std::pair<int64_t, bool> place_of(const void* values, DType dtype, int64_t i) {
    const int64_t size = element_size(dtype);
    int64_t pattern = 0;
    std::memcpy(&pattern, at<uint8_t>(values, size) + i * size, size);
    pattern <<= 64 - 8 * size;
    const double value = value_of(values, dtype, i);
    return {pattern < 0 ? pattern ^ INT64_MAX : pattern, value != value};
}

cudaError_t pack_limited(const PackLimited& job, cudaStream_t) {
    return launched("pack_limited", [&] {
        std::fill_n(at<uint32_t>(job.words), job.m * words_for(job.k), 0);
        for (int64_t i = 0; i < job.m * job.k; ++i) {
            const int64_t row = i / job.k, column = i % job.k;
            const auto [place, is_nan] = place_of(job.x, job.dtype, row * job.stride + column);
            bool one = place >= place_of(job.limits, job.dtype, column).first;
            one ^= job.flips && bit(at<uint32_t>(job.flips), column);
            if (is_nan) one = !job.strict;
            job.words[row * words_for(job.k) + column / kWordBits] |= uint32_t{one} << column % kWordBits;
        }
    });
}

cudaError_t unpack(const Unpack& job, cudaStream_t) {
    return launched("unpack", [&] {
        for (int64_t i = 0; i < job.m * job.k; ++i) {
            const bool one = bit(at<uint32_t>(job.words) + i / job.k * words_for(job.k), i % job.k);
            store(job.values, job.dtype, i, one ? 1 : -1);
        }
    });
}

static void align_words(const Align& job) {
    if (job.aligned) aligned_words.push_back(job.aligned);
    const int64_t padded = job.header ? prepared_popcount_bytes(job.m) / 4 : job.m;
    for (int64_t row = 0; row < padded; ++row) {
        int32_t count = 0;
        for (int64_t word = 0; row < job.m && word < aligned_words_for(job.k); ++word) {
            const bool exists = word < words_for(job.k);
            const uint32_t bits = exists ? at<uint32_t>(job.words)[row * words_for(job.k) + word] : 0;
            const uint32_t valid = exists ? bits & word_mask(word, job.k) : 0;
            if (job.aligned) at<uint32_t>(job.aligned, 16)[row * aligned_words_for(job.k) + word] = valid;
            count += std::popcount(valid);
        }
        at<int32_t>(job.popcounts)[row] = count;
    }
    if (!job.header) return;
    PreparedHeader header{{}, kPreparedLayout, 0, job.m, job.k, {}};
    std::copy(std::begin(kPreparedMagic), std::end(kPreparedMagic), header.magic);
    *at<PreparedHeader>(job.header) = header;
}

cudaError_t align(const Align& job, const Align& other, cudaStream_t) {
    const std::string name = both(name_of(job), name_of(other));
    if (name.empty()) return cudaSuccess;
    return launched(name.c_str(), [&] {
        align_words(job);
        align_words(other);
    });
}

cudaError_t gemm_popc(const Product& job, cudaStream_t) { return product(GemmKernel::popc, job); }
cudaError_t gemm_mma_sm75(const Product& job, cudaStream_t) { return product(GemmKernel::mma_sm75, job); }
cudaError_t gemm_skinny(const Product& job, cudaStream_t, bool starts_early) {
    return product(GemmKernel::skinny, job, starts_early);
}
cudaError_t gemm_skinny_mma_sm80(const Product& job, cudaStream_t, bool starts_early) {
    return product(GemmKernel::skinny_mma_sm80, job, starts_early);
}
cudaError_t gemm_mma_sm80(const Product& job, Tile, cudaStream_t, bool starts_early) {
    return product(GemmKernel::mma_sm80, job, starts_early);
}
cudaError_t gemm_mma_int8_sm80(const Product& job, cudaStream_t, bool starts_early) {
    return product(GemmKernel::mma_int8_sm80, job, starts_early);
}
cudaError_t gemm_wgmma_sm90a(const Product& job, WarpgroupTile, cudaStream_t, bool starts_early) {
    return product(GemmKernel::wgmma_sm90a, job, starts_early);
}

static cudaError_t fused(GemmKernel kernel, const FusedProduct& job) {
    return launched(record(kernel).name, [&] {
        const auto [m, n, k] = std::tuple(job.product.m, job.product.n, job.product.k);
        const int64_t stride = aligned_words_for(k);
        std::vector<uint32_t> words(m * stride);
        for (int64_t i = 0; i < m * k; ++i) {
            const double value = value_of(job.x.data, job.x.dtype, i / k * job.x.stride + i % k);
            const bool one = job.x.strict ? value > 0 : !(value < 0);
            words[i / k * stride + i % k / kWordBits] |= uint32_t{one} << i % k % kWordBits;
        }
        Product product = job.product;
        product.x = {words.data(), stride, nullptr};
        multiply(product, false, false);
    });
}

cudaError_t gemm_fused_skinny(const FusedProduct& job, cudaStream_t) { return fused(GemmKernel::fused_skinny, job); }
cudaError_t gemm_fused_skinny_mma_sm80(const FusedProduct& job, cudaStream_t) {
    return fused(GemmKernel::fused_skinny_mma_sm80, job);
}
cudaError_t gemm_fused_cluster_sm90(const FusedProduct& job, cudaStream_t) {
    return fused(GemmKernel::fused_cluster_sm90, job);
}

}  // namespace bitorch_qlinear::cuda

// ---- for Python -----------------------------------------------------------------------------------------------------

// Returns the names of the kernels launched since the last call.
EXPORT const char* cuda_on_cpu_launches() {
    static std::string last;
    last = std::exchange(launches, "");
    return last.c_str();
}

EXPORT void cuda_on_cpu_force(const char* kernel) { bitorch_qlinear::cuda::force_kernel(kernel); }

// Moves all tensors to a device.
EXPORT void cuda_on_cpu_device(int index) { device_of_tensors = index; }

// Returns the code of a device, asked for while another one is the current device, or -1 if that changes.
EXPORT int cuda_on_cpu_code(int index) {
    const int before = current_device, code = bitorch_qlinear::cuda::code_of(index);
    return current_device == before ? code : -1;
}
