// The operators on the CPU: they check arguments, allocate results, and compute by product.h with torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <tuple>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/level_product.h"
#include "../cpu/product.h"
#include "chain.h"
#include "tensors.h"

// Counts the prepared forms that were not made of the words that came with them. The layers read it before and after a
// call, because a stale form that is kept costs a preparation in every call.
extern "C" {
__attribute__((visibility("default"))) std::atomic<uint64_t> bitorch_qlinear_stale_forms{0};
}

namespace bitorch_qlinear {
namespace {

// torch's threads, in the form that threads.h describes.
struct TorchThreads {
    static int64_t count() { return torch::stable::get_num_threads(); }
    template <class Function>
    static void for_each(int64_t count, int64_t grain, const Function& function) {
        torch::stable::parallel_for(0, count, grain, function);
    }
};
using Threads = OneAtATime<TorchThreads>;

// Results at least this large justify madvise().
constexpr int64_t kHugeBytes = int64_t{4} << 20;

const Device kCpu{aoti_torch_device_type_cpu(), -1};

// Fresh memory is mapped and zeroed page by page on first write. Pages of 2 MiB instead of 4 KiB make a weight gradient
// of 64 MiB 1.3 times as fast, product included (Zen 4). Only whole pages inside the result are advised.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kHugePage = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
#endif
}

Tensor empty_on_cpu(const std::vector<int64_t>& sizes, ScalarType type) {
    Tensor tensor = empty(sizes, type, kCpu);
    const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    if (bytes >= kHugeBytes) advise_huge_pages(tensor.data_ptr(), bytes);
    return tensor;
}

Channels channels_of(const std::optional<Tensor>& vector) {
    if (!vector) return {nullptr, DType::float32, 1};
    return {static_cast<const uint8_t*>(vector->data_ptr()), *dtype_of(vector->scalar_type()), vector->stride(0)};
}

Outputs outputs_of(const Tensor& y, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale) {
    return {y.data_ptr(), *dtype_of(y.scalar_type()), channels_of(bias), channels_of(scale)};
}

// The limits and flips of outputs that are bits, aligned; null without them.
struct TensorBits {
    std::optional<Tensor> limits, flips;  // keep the memory alive

    explicit TensorBits(const BitArguments& given) {
        if (given.limits) limits = aligned("out_limits", *given.limits);
        if (given.flips) flips = aligned("out_flips", *given.flips);
    }
    Bits bits() const {
        return {limits ? static_cast<const int32_t*>(limits->data_ptr()) : nullptr, flips ? words_of(*flips) : nullptr};
    }
};

Outputs outputs_of(const Tensor& y, const WeightArguments& weight, const TensorBits& bits) {
    Outputs outputs = outputs_of(y, weight.bias, weight.scale);
    outputs.bits = bits.bits();
    return outputs;
}

// ---- prepared weights ----------------------------------------------------------------------------

// Returns how often torch has seen the tensor written, or kUnknownVersion for inference tensors, which do not count.
int64_t version_of(const Tensor& tensor) {
    std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
    if (torch_call_dispatcher("aten::is_inference", "", stack.data(), TORCH_ABI_VERSION)) return kUnknownVersion;
    if (torch::stable::detail::to<bool>(stack[0])) return kUnknownVersion;
    stack[0] = torch::stable::detail::from(tensor);
    if (torch_call_dispatcher("aten::_version", "", stack.data(), TORCH_ABI_VERSION)) return kUnknownVersion;
    return torch::stable::detail::to<int64_t>(stack[0]);
}

// Returns the panels of a prepared form, or null if they are not to be used: the kernel reads the words themselves, or
// the form was made of other words or for another kernel. Refuses what prepare_weight did not make.
const uint8_t* panels_of(const Tensor& prepared, const Kernel& kernel, const Tensor& words, const WordSource& source,
                         int64_t m) {
    const uint8_t* form = static_cast<const uint8_t*>(prepared.data_ptr());
    if (std::memcmp(form, kPreparedMagic, sizeof kPreparedMagic) != 0) {
        fail("weight_prepared", "expected what prepare_weight makes, got a tensor without its header");
    }
    if (!kernel.prepare) return nullptr;
    const uint8_t* panels = find_panels(form, prepared.numel(), kernel, source, m, [&] { return version_of(words); });
    if (!panels) bitorch_qlinear_stale_forms.fetch_add(1, std::memory_order_relaxed);
    return panels;
}

// Packed weights for m rows of x.
struct TensorWeights : Weights {
    Tensor tensor;  // keeps the words alive
};

TensorWeights read_weights(const WeightArguments& weight, const Kernel& kernel, int64_t m) {
    Tensor tensor = aligned("weight_words", weight.words);
    const uint32_t* words = words_of(tensor);
    const WordSource source{words, weight.n, weight.k, weight.words.data_ptr()};
    const uint8_t* panels = weight.prepared ? panels_of(*weight.prepared, kernel, weight.words, source, m) : nullptr;
    return {{words, panels, weight.n, weight.k}, std::move(tensor)};
}

// ---- real values by signs ------------------------------------------------------------------------

void check_reals(const Tensor& reals, int64_t count) {
    check_given("reals", reals);
    const DType dtype = check_float("reals", scalar_type(reals));
    check_dimensions("reals", reals, 1, "(..., n)");
    const int64_t got = reals.size(reals.dim() - 1);
    if (got != count) fail("reals", "expected ", count, " values in the last dimension, as many as signs, got ", got);
    check_memory("reals", reals, kCpu, element_size(dtype));
}

// The real factor with row or value stride 1, as the kernel reads it; a copy if neither stride is 1.
struct Reals {
    Tensor tensor;  // keeps the memory alive
    int64_t row_stride, value_stride;
};

Reals read_reals(const Tensor& reals) {
    if (reals.dim() == 2 && reals.stride(0) == 1 && is_aligned(reals)) return {reals, 1, reals.stride(1)};
    const std::optional<int64_t> stride = row_stride(reals);
    return {stride ? reals : contiguous_copy("reals", reals), stride.value_or(reals.size(reals.dim() - 1)), 1};
}

// ---- operators -----------------------------------------------------------------------------------

Tensor pack_bits(const Tensor& x, bool strict, const std::optional<Tensor>& limits,
                 const std::optional<Tensor>& flips) {
    check_given("x", x);
    check_dimensions("x", x, 1, "(..., k)");
    const TensorRows rows = check_rows("x", x, x.size(x.dim() - 1), kCpu);
    check_value_limits(limits, flips, x.scalar_type(), rows.k, kCpu);
    Tensor words = empty_on_cpu(sizes_with_last(x, words_for(rows.k)), ScalarType::Int);
    if (!limits) {
        pack_rows(Threads(), active_kernel(), rows, strict, 0, words_of(words), nullptr);
        return words;
    }
    const Tensor values = aligned("limits", *limits);
    const std::optional<Tensor> flipped = flips ? std::optional(aligned("flips", *flips)) : std::nullopt;
    pack_rows(Threads(), active_kernel(), rows, strict, values.data_ptr(), flipped ? words_of(*flipped) : nullptr,
              words_of(words));
    return words;
}

Tensor unpack_bits(const Tensor& words, int64_t k, ScalarType type) {
    check_values(k);
    check_words("words", words, k, kCpu);
    const DType dtype = check_unpacked(type);
    Tensor values = empty_on_cpu(sizes_with_last(words, k), type);
    if (k == 0) return values;
    const Tensor from = aligned("words", words);
    unpack_rows(Threads(), active_kernel(), words_of(from), words.numel() / words_for(k), k,
                static_cast<uint8_t*>(values.data_ptr()), dtype);
    return values;
}

Tensor prepare_weight(const Tensor& words, int64_t k, std::optional<int64_t> layout) {
    check_values(k);
    check_weight_words(words, k, kCpu);
    const Kernel& kernel = active_kernel();
    check_layout(layout, kernel.layout.id);
    Tensor prepared = empty_on_cpu({prepared_bytes(kernel.layout, words.size(0), k)}, ScalarType::Byte);
    const Tensor data = aligned("weight_words", words);
    // The fingerprint is taken first: words that change meanwhile then do not match what is made of them.
    const Fingerprint fingerprint =
        kernel.prepare ? take_fingerprint(kernel, words_of(data), words.numel(), words.data_ptr(), version_of(words))
                       : Fingerprint{};
    write_prepared(Threads(), kernel, words_of(data), words.size(0), k, fingerprint,
                   static_cast<uint8_t*>(prepared.data_ptr()));
    return prepared;
}

Tensor binary_linear(const Tensor& x_words, const Tensor& weight_words, int64_t k, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& weight_prepared, const std::optional<Tensor>& scale,
                     std::optional<ScalarType> out_dtype, const std::optional<Tensor>& out_limits,
                     const std::optional<Tensor>& out_flips) {
    check_values(k);
    check_words("x_words", x_words, k, kCpu);
    const WeightArguments given = check_weight(weight_words, k, bias, weight_prepared, scale, out_dtype,
                                               ScalarType::Float, {out_limits, out_flips}, kCpu);
    const Kernel& kernel = active_kernel();
    const int64_t m = count_rows(x_words);
    const TensorWeights weights = read_weights(given, kernel, m);
    const Tensor rows = aligned("x_words", x_words);
    const TensorBits bits(given.bits);
    Tensor y = empty_on_cpu(sizes_with_last(x_words, given.out_size()), given.out_type);
    multiply_words(Threads(), kernel, words_of(rows), m, weights, outputs_of(y, given, bits));
    return y;
}

Tensor linear(const Tensor& x, const Tensor& weight_words, int64_t k, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& weight_prepared, const std::optional<Tensor>& scale,
              std::optional<ScalarType> out_dtype, bool strict, const std::optional<Tensor>& out_limits,
              const std::optional<Tensor>& out_flips) {
    const LinearArguments given =
        check_linear(x, weight_words, k, bias, weight_prepared, scale, out_dtype, {out_limits, out_flips}, kCpu);
    const Kernel& kernel = active_kernel();
    const TensorWeights weights = read_weights(given.weight, kernel, given.x.m);
    const TensorBits bits(given.weight.bits);
    Tensor y = empty_on_cpu(sizes_with_last(x, given.weight.out_size()), given.weight.out_type);
    multiply_rows(Threads(), kernel, given.x, strict, weights, outputs_of(y, given.weight, bits));
    return y;
}

Tensor sign_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& scale, std::optional<ScalarType> out_dtype, bool strict,
                   bool strict_weight) {
    const SignLinearArguments given = check_sign_linear(x, weight, bias, scale, out_dtype, kCpu);
    Tensor y = empty_on_cpu(sizes_with_last(x, given.weight.m), given.out_type);
    multiply_rows(Threads(), active_kernel(), given.x, strict, given.weight, strict_weight, outputs_of(y, bias, scale));
    return y;
}

// Without a threshold every element is in range, and no bits are kept: in_range_words is empty.
std::tuple<Tensor, Tensor, Tensor> linear_train(const Tensor& x, const Tensor& weight_words, int64_t k,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& weight_prepared,
                                                const std::optional<Tensor>& scale, std::optional<ScalarType> out_dtype,
                                                bool strict, std::optional<double> threshold) {
    const LinearArguments given =
        check_linear(x, weight_words, k, bias, weight_prepared, scale, out_dtype, kNoBits, kCpu);
    const TensorRows& rows = given.x;
    const Kernel& kernel = active_kernel();
    const TensorWeights weights = read_weights(given.weight, kernel, rows.m);
    check_threshold(threshold);
    const std::vector<int64_t> word_sizes = sizes_with_last(x, words_for(k));
    Tensor x_words = empty_on_cpu(word_sizes, ScalarType::Int);
    Tensor in_range = empty_on_cpu(threshold ? word_sizes : std::vector<int64_t>{0}, ScalarType::Int);
    pack_rows(Threads(), kernel, rows, strict, threshold ? round_to(*threshold, rows.dtype) : 0, words_of(x_words),
              threshold ? words_of(in_range) : nullptr);
    Tensor y = empty_on_cpu(sizes_with_last(x, weights.n), given.weight.out_type);
    multiply_words(Threads(), kernel, words_of(x_words), rows.m, weights, outputs_of(y, bias, scale));
    return {y, x_words, in_range};
}

Tensor dorefa_linear(const Tensor& x, const Tensor& weight_words, int64_t k, const std::optional<Tensor>& bias,
                     int64_t bits, const std::optional<Tensor>& weight_prepared, const std::optional<Tensor>& scale,
                     std::optional<ScalarType> out_dtype) {
    const LinearArguments given =
        check_linear(x, weight_words, k, bias, weight_prepared, scale, out_dtype, kNoBits, kCpu);
    check_float("out_dtype", given.weight.out_type);  // NaN in x has no integer sum
    if (bits < 1 || bits > kMostLevelBits) fail("bits", "expected 1 or 2, got ", bits);
    const Kernel& kernel = active_kernel();
    const TensorWeights weights = read_weights(given.weight, kernel, given.x.m);
    Tensor y = empty_on_cpu(sizes_with_last(x, weights.n), given.weight.out_type);
    multiply_levels(Threads(), kernel, given.x, static_cast<int>(bits), weights, outputs_of(y, bias, scale));
    return y;
}

Tensor multiply_signs(const Tensor& reals, const Tensor& sign_words, int64_t k, bool transpose) {
    check_values(k);
    check_word_rows("sign_words", sign_words, k, kCpu);
    const int64_t summed = transpose ? k : sign_words.size(0), outputs = transpose ? sign_words.size(0) : k;
    check_reals(reals, summed);
    Tensor y = empty_on_cpu(sizes_with_last(reals, outputs), reals.scalar_type());
    const int64_t m = count_rows(reals);
    if (m == 0 || outputs == 0) return y;
    const Reals x = read_reals(reals);
    const Tensor words = aligned("sign_words", sign_words);
    multiply_by_signs(Threads(), *active_kernel().sign_gemm,
                      {x.tensor.data_ptr(), *dtype_of(reals.scalar_type()), m, summed, x.row_stride, x.value_stride,
                       words_of(words), transpose, outputs, y.data_ptr()});
    return y;
}

// Computes the words that linear or binary_linear writes with limits, and negates bits of some channels: for each
// column (channel, limit) of toggles, the bit of each row whose count is at most the limit. A channel's counts are
// computed again from its row of the weights, because they take K / 32 words, and the kernels write bits by one limit
// for each output.
Tensor toggled_linear(const Tensor& x, bool is_real, bool strict, const Tensor& weight_words, int64_t k,
                      const std::optional<Tensor>& weight_prepared, const Tensor& limits, const Tensor& flips,
                      const Tensor& toggles) {
    const std::optional<Tensor> none;
    const Tensor words = is_real ? pack_bits(x, strict, none, none) : x;
    Tensor y = binary_linear(words, weight_words, k, none, weight_prepared, none, std::nullopt, limits, flips);
    const int64_t n = weight_words.size(0), y_words = words_for(n), row_words = words_for(k);
    if (scalar_type(toggles) != ScalarType::Int || toggles.dim() != 2 || toggles.size(0) != 2 ||
        !toggles.is_contiguous()) {
        fail("toggles", "expected contiguous int32 tensors of shape (2, t)");
    }
    check_memory("toggles", toggles, kCpu, sizeof(int32_t));
    const int64_t count = toggles.size(1);
    const Tensor steps = aligned("toggles", toggles);
    const Tensor from = aligned("weight_words", weight_words);
    Tensor rows = empty_on_cpu({count, row_words}, ScalarType::Int);
    Tensor row_limits = empty_on_cpu({count}, ScalarType::Int),
           no_flips = empty_on_cpu({words_for(count)}, ScalarType::Int);
    // The channels are copied before they are checked, because they are indices, and another thread may write them.
    const auto* given = static_cast<const int32_t*>(steps.data_ptr());
    const std::vector<int32_t> copied(given, given + count);
    const int32_t* channels = copied.data();
    for (int64_t j = 0; j < count; ++j) {
        if (channels[j] < 0 || channels[j] >= n)
            fail("toggles", "expected channels from 0 to ", n - 1, ", got ", channels[j]);
        std::copy_n(words_of(from) + channels[j] * row_words, row_words, words_of(rows) + j * row_words);
    }
    std::copy_n(given + count, count, static_cast<int32_t*>(row_limits.data_ptr()));
    std::fill_n(words_of(no_flips), words_for(count), 0);
    const Tensor bits = binary_linear(words, rows, k, none, none, none, std::nullopt, row_limits, no_flips);
    const uint32_t* bit_row = words_of(bits);
    uint32_t* row = words_of(y);
    for (const uint32_t* end = row + y.numel(); row < end; row += y_words, bit_row += words_for(count)) {
        for (int64_t j = 0; j < count; ++j) {
            row[channels[j] / 32] ^= (bit_row[j / 32] >> j % 32 & 1u) << channels[j] % 32;
        }
    }
    return y;
}

Tensor linear_chain(const Tensor& x, std::vector<Tensor> weights, int64_t k, std::vector<Tensor> limits,
                    std::vector<Tensor> flips, const std::optional<Tensor>& bias,
                    std::optional<std::vector<Tensor>> prepared, const std::optional<Tensor>& scale,
                    std::optional<ScalarType> out_dtype, bool strict, std::optional<std::vector<Tensor>> toggles) {
    return multiply_in_turn(linear, binary_linear, toggled_linear, x, weights, k, limits, flips, bias, prepared, scale,
                            out_dtype, strict, toggles);
}

}  // namespace
}  // namespace bitorch_qlinear

STABLE_TORCH_LIBRARY_IMPL(bitorch_qlinear, CPU, library) {
    library.impl("pack_bits", TORCH_BOX(&bitorch_qlinear::pack_bits));
    library.impl("unpack_bits", TORCH_BOX(&bitorch_qlinear::unpack_bits));
    library.impl("prepare_weight", TORCH_BOX(&bitorch_qlinear::prepare_weight));
    library.impl("binary_linear", TORCH_BOX(&bitorch_qlinear::binary_linear));
    library.impl("linear", TORCH_BOX(&bitorch_qlinear::linear));
    library.impl("sign_linear", TORCH_BOX(&bitorch_qlinear::sign_linear));
    library.impl("linear_chain", TORCH_BOX(&bitorch_qlinear::linear_chain));
    library.impl("linear_train", TORCH_BOX(&bitorch_qlinear::linear_train));
    library.impl("dorefa_linear", TORCH_BOX(&bitorch_qlinear::dorefa_linear));
    library.impl("multiply_signs", TORCH_BOX(&bitorch_qlinear::multiply_signs));
}
