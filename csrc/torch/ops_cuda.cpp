// The operators on CUDA: they check arguments, allocate from torch's allocator, choose the kernel and launch it in the
// current stream. Nothing here waits for the device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cuda/dispatch.h"
#include "../cuda/kernels.h"
#include "../cuda/prepared.h"
#include "../cuda/wrong_form.h"
#include "chain.h"
#include "cuda_stream.h"
#include "tensors.h"

namespace bitorch_qlinear::cuda {
namespace {

// Returns the first argument's device. torch dispatches to CUDA if any tensor is on it, so this one may be elsewhere.
Device device_of(const char* argument, const Tensor& tensor) {
    Device device{aoti_torch_device_type_cuda(), -1};
    int32_t type = 0;
    check_given(argument, tensor);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    if (type != device.type) fail(argument, "expected a tensor on the CUDA device that other arguments are on");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
    return device;
}

void check_launch(const char* kernel, cudaError_t error) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("bitorch_qlinear: CUDA kernel ") + kernel + ": " + cudaGetErrorString(error));
}

Tensor scratch(int64_t bytes, const Launch& launch) { return empty({bytes}, ScalarType::Byte, launch.device()); }

bool starts_on_16_bytes(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// ---- factors: words in the form that a kernel reads -----------------------------------------------------------------

// A factor, and what a launch must do before the product reads it.
struct Factor {
    Operand operand;
    bool from_form = false;  // whether the popcounts are those of a prepared form
    std::optional<Pack> pack = std::nullopt;
    Align align = kNoAlign;
    std::optional<Tensor> memory = std::nullopt;  // keeps alive what is made for this call
};

// Allocates the popcounts of m rows, followed by their aligned words if `aligned`.
Factor allocate_factor(int64_t m, int64_t k, bool aligned, const Launch& launch) {
    const int64_t count_bytes = prepared_popcount_bytes(m), stride = aligned_words_for(k);
    Factor factor{};
    factor.memory = scratch(count_bytes + (aligned ? m * stride * kWordBytes : 0), launch);
    uint8_t* data = static_cast<uint8_t*>(factor.memory->data_ptr());
    factor.operand = {reinterpret_cast<uint32_t*>(data + count_bytes), stride, reinterpret_cast<int32_t*>(data)};
    return factor;
}

// Makes a factor from words [m][words_for(k)] of the interchange form.
Factor factor_of_words(const uint32_t* words, int64_t m, int64_t k, const KernelRecord& kernel, const Launch& launch) {
    const bool realign = kernel.aligned && (prepared_holds_words(k) || !starts_on_16_bytes(words));
    const Operand as_it_is{words, words_for(k), nullptr};
    if (!realign && !kernel.popcounts) return {as_it_is};
    Factor factor = allocate_factor(m, k, realign, launch);
    uint32_t* aligned = realign ? const_cast<uint32_t*>(factor.operand.words) : nullptr;
    factor.align = {words, m, k, aligned, const_cast<int32_t*>(factor.operand.popcounts), nullptr};
    if (!realign) factor.operand = {words, words_for(k), factor.operand.popcounts};
    return factor;
}

// Makes a factor from values, which are packed directly in the kernel's form.
Factor factor_of_rows(const Rows& x, bool strict, const KernelRecord& kernel, const Launch& launch) {
    Factor factor = allocate_factor(x.m, x.k, true, launch);
    if (!kernel.aligned) factor.operand.stride = words_for(x.k);
    if (!kernel.popcounts) factor.operand.popcounts = nullptr;
    factor.pack = {x.data,
                   x.dtype,
                   x.m,
                   x.k,
                   x.stride,
                   strict,
                   0,
                   const_cast<uint32_t*>(factor.operand.words),
                   factor.operand.stride,
                   nullptr,
                   const_cast<int32_t*>(factor.operand.popcounts)};
    return factor;
}

// Launches what the factors of a product need, by one launch if it can do both. The last one packs x, if it is real.
void make(const Factor& x, const Factor& weight, const Launch& launch) {
    if (weight.pack) check_launch("pack", pack(*weight.pack, kNoAlign, launch.stream()));
    if (x.pack) check_launch("pack", pack(*x.pack, weight.align, launch.stream()));
    if (!x.pack) check_launch("align", align(x.align, weight.align, launch.stream()));
}

// ---- the right-hand side --------------------------------------------------------------------------------------------

// Returns the memory of a prepared form, after the checks that need no waiting for the device: the kernel that reads it
// checks its header.
const uint8_t* check_prepared(const Tensor& prepared, int64_t n, int64_t k) {
    constexpr const char* kName = "weight_prepared";
    if (prepared.numel() != prepared_bytes(n, k)) {
        fail(kName, "expected the ", prepared_bytes(n, k), " bytes of weights prepared on this device for n = ", n,
             " and k = ", k, ", got ", prepared.numel());
    }
    const uint8_t* data = static_cast<const uint8_t*>(prepared.data_ptr());
    if (!starts_on_16_bytes(data)) fail(kName, "expected memory that starts on 16 bytes");
    return data;
}

// Packed weights, checked.
struct Weights {
    Tensor tensor;  // keeps the words alive
    const uint32_t* words;
    const uint8_t* prepared;  // its header, or null
    int64_t n, k;
};

Weights read_weights(const WeightArguments& weight) {
    const int64_t n = weight.n, k = weight.k;
    Tensor tensor = aligned("weight_words", weight.words);
    const uint32_t* words = words_of(tensor);
    return {std::move(tensor), words, weight.prepared ? check_prepared(*weight.prepared, n, k) : nullptr, n, k};
}

// Returns whether the words themselves are in the aligned form.
bool words_fit(const Weights& weight) { return !prepared_holds_words(weight.k) && starts_on_16_bytes(weight.words); }

// Returns whether a launch must align the words for every kernel that reads the aligned form.
bool must_be_aligned(const Weights& weight) {
    return !words_fit(weight) && !(weight.prepared && prepared_holds_words(weight.k));
}

Factor factor_of_weights(const Weights& weight, const KernelRecord& kernel, const Launch& launch) {
    if (!weight.prepared || !kernel.aligned || must_be_aligned(weight)) {
        return factor_of_words(weight.words, weight.n, weight.k, kernel, launch);
    }
    const uint8_t* popcounts = weight.prepared + sizeof(PreparedHeader);
    const uint8_t* aligned = popcounts + prepared_popcount_bytes(weight.n);
    const uint32_t* words = words_fit(weight) ? weight.words : reinterpret_cast<const uint32_t*>(aligned);
    return {{words, aligned_words_for(weight.k), reinterpret_cast<const int32_t*>(popcounts)}, true};
}

// ---- the product ----------------------------------------------------------------------------------------------------

// Bias or scale as contiguous values, copied if they are strided or do not lie at multiples of their size.
class ContiguousChannels {
  public:
    ContiguousChannels(const char* argument, const std::optional<Tensor>& vector) {
        if (!vector || vector->numel() == 0) return;
        const bool contiguous = vector->stride(0) == 1 || vector->numel() == 1;
        values_ = contiguous ? aligned(argument, *vector) : contiguous_copy(argument, *vector);
    }
    Channels channels() const {
        if (!values_) return {nullptr, DType::float32};
        return {values_->data_ptr(), *dtype_of(values_->scalar_type())};
    }

  private:
    std::optional<Tensor> values_;
};

// Contiguous limits or flips, copied if they do not lie at multiples of their size.
class AlignedVector {
  public:
    AlignedVector(const char* argument, const std::optional<Tensor>& words) {
        if (words) words_ = aligned(argument, *words);
    }
    const void* data() const { return words_ ? words_->data_ptr() : nullptr; }
    Channels channels() const { return {data(), DType::int32}; }

  private:
    std::optional<Tensor> words_;
};

// Launches a product of words. With `starts_early` it may start before the launch in front of it has ended: a pack or
// align that makes x and perhaps counts the weights' set bits, but does not align their words (launch.cuh).
cudaError_t launch_product(const Choice& choice, const Product& product, bool starts_early, cudaStream_t stream) {
    switch (choice.kernel) {
        case GemmKernel::skinny: return gemm_skinny(product, stream, starts_early);
        case GemmKernel::skinny_mma_sm80: return gemm_skinny_mma_sm80(product, stream, starts_early);
        case GemmKernel::mma_sm75: return gemm_mma_sm75(product, stream);
        case GemmKernel::mma_int8_sm80: return gemm_mma_int8_sm80(product, stream, starts_early);
        case GemmKernel::mma_sm80: return gemm_mma_sm80(product, choice.tile, stream, starts_early);
        case GemmKernel::wgmma_sm90a: return gemm_wgmma_sm90a(product, choice.warpgroup_tile, stream, starts_early);
        default: return gemm_popc(product, stream);
    }
}

// Launches a product of real x.
cudaError_t launch_fused(const Choice& choice, const FusedProduct& job, cudaStream_t stream) {
    if (choice.kernel == GemmKernel::fused_cluster_sm90) return gemm_fused_cluster_sm90(job, stream);
    if (choice.kernel == GemmKernel::fused_skinny_mma_sm80) return gemm_fused_skinny_mma_sm80(job, stream);
    return gemm_fused_skinny(job, stream);
}

// How the outputs are made of the product: the result's sizes and dtype, and bias and scale of numbers or limits and
// flips of bits.
struct Outputs {
    std::vector<int64_t> sizes;
    ScalarType type;
    const std::optional<Tensor>& bias;
    const std::optional<Tensor>& scale;
    const BitArguments& bits = kNoBits;
};

// Real x, of which only the product is wanted.
struct RealX {
    const Rows& rows;
    bool strict;
};

// Computes y[m][n] from the factors that make_x(record) and make_weight(record) give in the chosen kernel's form, or
// from `real_x`, if it is not null and the kernel packs it. x is made last, so that nothing is launched between that
// and the product, which may start before it has ended (launch.cuh). `aligns` says whether a launch must align the
// weights, which can pack x as well.
template <class MakeX, class MakeWeight>
Tensor multiply(int64_t m, int64_t n, int64_t k, const Outputs& outputs, const Launch& launch, MakeX make_x,
                MakeWeight make_weight, const RealX* real_x = nullptr, bool aligns = false) {
    Tensor y = empty(outputs.sizes, outputs.type, launch.device());
    const int64_t value_bytes = real_x ? element_size(real_x->rows.dtype) : 0;
    const bool float64 = outputs.type == ScalarType::Double;
    const Choice choice = choose_kernel(launch.device().index, m, n, k, value_bytes, float64, aligns);
    const KernelRecord& kernel = record(choice.kernel);
    if (m == 0 || n == 0) {
        if (n == 0) make(make_x(kernel), {}, launch);  // x_words of linear_train are an output, too
        return y;
    }
    const Factor w = make_weight(kernel);
    const ContiguousChannels scale("scale", outputs.scale), bias("bias", outputs.bias);
    const AlignedVector limits("out_limits", outputs.bits.limits), flips("out_flips", outputs.bits.flips);
    const Output numbers{y.data_ptr(), *dtype_of(outputs.type), scale.channels(), bias.channels()};
    const Output bits{y.data_ptr(), DType::boolean, limits.channels(), flips.channels()};
    WrongForm* wrong_form = w.from_form ? wrong_form_of(launch.device().index, allocate_for_devices) : nullptr;
    Product product{{}, w.operand, m, n, k, outputs.bits.limits ? bits : numbers, wrong_form};
    const Gpu& gpu = gpu_of(launch.device().index);
    if (kernel.fused) {
        make({}, w, launch);
        const RealRows rows{real_x->rows.data, real_x->rows.dtype, real_x->rows.stride, real_x->strict};
        check_launch(kernel.name, launch_fused(choice, {product, rows, gpu.multiprocessors}, launch.stream()));
        return y;
    }
    const Factor x = make_x(kernel);
    make(x, w, launch);
    product.x = x.operand;
    // The launch directly before the product must make x. (Without values there may be none.) It may count the weights'
    // set bits, which every kernel reads after its end, but not align their words, which kernels read before.
    const bool makes_x = x.pack || x.align.m > 0, aligns_weights = w.align.aligned;
    const bool starts_early = makes_x && !aligns_weights && k > 0 && launches_depend(gpu);
    check_launch(kernel.name, launch_product(choice, product, starts_early, launch.stream()));
    return y;
}

// Computes y[m][n] from packed weights.
template <class MakeX>
Tensor multiply(int64_t m, const Weights& weights, const Outputs& outputs, const Launch& launch, MakeX make_x,
                const RealX* real_x = nullptr) {
    return multiply(
        m, weights.n, weights.k, outputs, launch, make_x,
        [&](const KernelRecord& kernel) { return factor_of_weights(weights, kernel, launch); }, real_x,
        must_be_aligned(weights));
}

// ---- operators ------------------------------------------------------------------------------------------------------

Tensor pack_bits(const Tensor& x, bool strict, const std::optional<Tensor>& limits,
                 const std::optional<Tensor>& flips) {
    const Device device = device_of("x", x);
    check_given("x", x);
    check_dimensions("x", x, 1, "(..., k)");
    const TensorRows rows = check_rows("x", x, x.size(x.dim() - 1), device);
    check_value_limits(limits, flips, x.scalar_type(), rows.k, device);
    Tensor words = empty(sizes_with_last(x, words_for(rows.k)), ScalarType::Int, device);
    const Launch launch(device);
    if (limits) {
        const AlignedVector by("limits", limits), flipped("flips", flips);
        check_launch("pack_limited",
                     pack_limited({rows.data, rows.dtype, rows.m, rows.k, rows.stride, strict, by.data(),
                                   static_cast<const uint32_t*>(flipped.data()), words_of(words)},
                                  launch.stream()));
        return words;
    }
    check_launch("pack", pack({rows.data, rows.dtype, rows.m, rows.k, rows.stride, strict, 0, words_of(words),
                               words_for(rows.k), nullptr, nullptr},
                              kNoAlign, launch.stream()));
    return words;
}

Tensor unpack_bits(const Tensor& words, int64_t k, ScalarType type) {
    const Device device = device_of("words", words);
    check_values(k);
    check_words("words", words, k, device);
    const DType dtype = check_unpacked(type);
    Tensor values = empty(sizes_with_last(words, k), type, device);
    const Launch launch(device);
    const Tensor from = aligned("words", words);
    check_launch("unpack", unpack({words_of(from), count_rows(words), k, values.data_ptr(), dtype}, launch.stream()));
    return values;
}

Tensor prepare_weight(const Tensor& words, int64_t k, std::optional<int64_t> layout) {
    const Device device = device_of("weight_words", words);
    check_values(k);
    check_weight_words(words, k, device);
    check_layout(layout, kPreparedLayout);
    const int64_t n = words.size(0);
    const Launch launch(device);
    const Tensor from = aligned("weight_words", words);
    Tensor prepared = scratch(prepared_bytes(n, k), launch);
    uint8_t* data = static_cast<uint8_t*>(prepared.data_ptr());
    uint8_t* popcounts = data + sizeof(PreparedHeader);
    uint8_t* to = prepared_holds_words(k) ? popcounts + prepared_popcount_bytes(n) : nullptr;
    check_launch("align", align({words_of(from), n, k, reinterpret_cast<uint32_t*>(to),
                                 reinterpret_cast<int32_t*>(popcounts), reinterpret_cast<PreparedHeader*>(data)},
                                kNoAlign, launch.stream()));
    return prepared;
}

Tensor binary_linear(const Tensor& x_words, const Tensor& weight_words, int64_t k, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& weight_prepared, const std::optional<Tensor>& scale,
                     std::optional<ScalarType> out_dtype, const std::optional<Tensor>& out_limits,
                     const std::optional<Tensor>& out_flips) {
    const Device device = device_of("x_words", x_words);
    check_values(k);
    check_words("x_words", x_words, k, device);
    const WeightArguments given = check_weight(weight_words, k, bias, weight_prepared, scale, out_dtype,
                                               ScalarType::Float, {out_limits, out_flips}, device);
    const int64_t m = count_rows(x_words);
    const Launch launch(device);
    const Weights weights = read_weights(given);
    const Tensor x = aligned("x_words", x_words);
    return multiply(m, weights, {sizes_with_last(x_words, given.out_size()), given.out_type, bias, scale, given.bits},
                    launch,
                    [&](const KernelRecord& kernel) { return factor_of_words(words_of(x), m, k, kernel, launch); });
}

Tensor linear(const Tensor& x, const Tensor& weight_words, int64_t k, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& weight_prepared, const std::optional<Tensor>& scale,
              std::optional<ScalarType> out_dtype, bool strict, const std::optional<Tensor>& out_limits,
              const std::optional<Tensor>& out_flips) {
    const Device device = device_of("x", x);
    const LinearArguments given =
        check_linear(x, weight_words, k, bias, weight_prepared, scale, out_dtype, {out_limits, out_flips}, device);
    const Launch launch(device);
    const Weights weights = read_weights(given.weight);
    const WeightArguments& weight = given.weight;
    const RealX real_x{given.x, strict};
    return multiply(
        given.x.m, weights, {sizes_with_last(x, weight.out_size()), weight.out_type, bias, scale, weight.bits}, launch,
        [&](const KernelRecord& kernel) { return factor_of_rows(given.x, strict, kernel, launch); }, &real_x);
}

Tensor sign_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& scale, std::optional<ScalarType> out_dtype, bool strict,
                   bool strict_weight) {
    const Device device = device_of("x", x);
    const SignLinearArguments given = check_sign_linear(x, weight, bias, scale, out_dtype, device);
    const int64_t m = given.x.m, n = given.weight.m, k = given.x.k;
    const Launch launch(device);
    const RealX real_x{given.x, strict};
    return multiply(
        m, n, k, {sizes_with_last(x, n), given.out_type, bias, scale}, launch,
        [&](const KernelRecord& kernel) { return factor_of_rows(given.x, strict, kernel, launch); },
        [&](const KernelRecord& kernel) { return factor_of_rows(given.weight, strict_weight, kernel, launch); },
        &real_x);
}

// The words of x are an output in the interchange form. If the kernel needs another form, it is made of them.
std::tuple<Tensor, Tensor, Tensor> linear_train(const Tensor& x, const Tensor& weight_words, int64_t k,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& weight_prepared,
                                                const std::optional<Tensor>& scale, std::optional<ScalarType> out_dtype,
                                                bool strict, std::optional<double> threshold) {
    const Device device = device_of("x", x);
    const LinearArguments given =
        check_linear(x, weight_words, k, bias, weight_prepared, scale, out_dtype, kNoBits, device);
    const TensorRows& rows = given.x;
    check_threshold(threshold);
    const std::vector<int64_t> word_sizes = sizes_with_last(x, words_for(k));
    Tensor x_words = empty(word_sizes, ScalarType::Int, device);
    Tensor in_range = empty(threshold ? word_sizes : std::vector<int64_t>{0}, ScalarType::Int, device);
    const Launch launch(device);
    const Weights weights = read_weights(given.weight);
    const auto packed = [&](int32_t* popcounts) -> Pack {
        const double bound = threshold ? round_to(*threshold, rows.dtype) : 0;
        uint32_t* range = threshold ? words_of(in_range) : nullptr;
        return {rows.data, rows.dtype,        rows.m,       k,     rows.stride, strict,
                bound,     words_of(x_words), words_for(k), range, popcounts};
    };
    Tensor y = multiply(rows.m, weights, {sizes_with_last(x, weights.n), given.weight.out_type, bias, scale}, launch,
                        [&](const KernelRecord& kernel) -> Factor {
                            if (kernel.aligned && prepared_holds_words(k)) {
                                check_launch("pack", pack(packed(nullptr), kNoAlign, launch.stream()));
                                return factor_of_words(words_of(x_words), rows.m, k, kernel, launch);
                            }
                            Factor factor = allocate_factor(rows.m, k, false, launch);
                            const int32_t* popcounts = kernel.popcounts ? factor.operand.popcounts : nullptr;
                            factor.pack = packed(const_cast<int32_t*>(popcounts));
                            factor.operand = {words_of(x_words), words_for(k), popcounts};
                            return factor;
                        });
    return {y, x_words, in_range};
}

Tensor toggled_linear(const Tensor&, bool, bool, const Tensor&, int64_t, const std::optional<Tensor>&, const Tensor&,
                      const Tensor&, const Tensor&) {
    fail("toggles", "expected none on CUDA, where no kernel negates bits of single channels");
}

Tensor linear_chain(const Tensor& x, std::vector<Tensor> weights, int64_t k, std::vector<Tensor> limits,
                    std::vector<Tensor> flips, const std::optional<Tensor>& bias,
                    std::optional<std::vector<Tensor>> prepared, const std::optional<Tensor>& scale,
                    std::optional<ScalarType> out_dtype, bool strict, std::optional<std::vector<Tensor>> toggles) {
    return multiply_in_turn(linear, binary_linear, toggled_linear, x, weights, k, limits, flips, bias, prepared, scale,
                            out_dtype, strict, toggles);
}

}  // namespace
}  // namespace bitorch_qlinear::cuda

STABLE_TORCH_LIBRARY_IMPL(bitorch_qlinear, CUDA, library) {
    library.impl("pack_bits", TORCH_BOX(&bitorch_qlinear::cuda::pack_bits));
    library.impl("unpack_bits", TORCH_BOX(&bitorch_qlinear::cuda::unpack_bits));
    library.impl("prepare_weight", TORCH_BOX(&bitorch_qlinear::cuda::prepare_weight));
    library.impl("binary_linear", TORCH_BOX(&bitorch_qlinear::cuda::binary_linear));
    library.impl("linear", TORCH_BOX(&bitorch_qlinear::cuda::linear));
    library.impl("sign_linear", TORCH_BOX(&bitorch_qlinear::cuda::sign_linear));
    library.impl("linear_chain", TORCH_BOX(&bitorch_qlinear::cuda::linear_chain));
    library.impl("linear_train", TORCH_BOX(&bitorch_qlinear::cuda::linear_train));
}
