// The operators on the CPU: check, allocate, share tiles among torch's threads, call the kernel.
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
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/product.h"
#include "../cuda/prepared.h"
#include "../epilogue.h"
#include "../sources.h"
#include "tensors.h"

#define BITORCH_QLINEAR_EXPORT extern "C" __attribute__((visibility("default")))

// How many forms were found that were not made of the words that came with them. The layers read it before and after a
// call: a form that is never made anew costs its preparation in every call.
extern "C" {
__attribute__((visibility("default"))) std::atomic<uint64_t> bitorch_qlinear_stale_forms{0};
}

namespace bitorch_qlinear {
namespace {

// As product.h wants them.
struct TorchThreads {
    static int64_t count() { return torch::stable::get_num_threads(); }
    template <class Function>
    static void for_each(int64_t count, int64_t grain, const Function& function) {
        torch::stable::parallel_for(0, count, grain, function);
    }
};
using Threads = OneAtATime<TorchThreads>;

// Results from here on are worth the system call.
constexpr int64_t kHugeBytes = int64_t{4} << 20;

const Device kCpu{aoti_torch_device_type_cpu(), -1};

// The system maps and clears fresh memory a page at a time while it is written first: of 4 KiB, unless told otherwise.
// A weight gradient of 64 MiB is there 1.3 times sooner in pages of 2 MiB, its product included (Zen 4). Only whole
// pages of the result: no memory is added to it.
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

void pack_rows(const Rows& x, bool strict, double threshold, uint32_t* words, uint32_t* in_range) {
    if (x.k == 0) return;  // however many rows
    const PackRow pack_row = active_kernel().pack_row[static_cast<int>(x.dtype)];
    const int64_t width = words_for(x.k);
    const int64_t grain = std::max<int64_t>(1, kSerialValues / x.k);
    share(Threads(), x.m, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            pack_row(x.row(i), x.k, strict, threshold, words + i * width, in_range ? in_range + i * width : nullptr);
        }
    });
}

// bias or scale as n contiguous values of T, converted where they are not.
class Vector {
  public:
    Vector(const std::optional<Tensor>& vector, DType type) {
        if (!vector) return;
        const DType from = *dtype_of(vector->scalar_type());
        const int64_t n = vector->size(0), stride = vector->stride(0);
        const uint8_t* data = static_cast<const uint8_t*>(vector->data_ptr());
        if (n == 0 || (from == type && stride == 1 && is_aligned(*vector))) {
            values_ = data;
            return;
        }
        converted_ = allocate(n, element_size(type));
        if (!converted_) fail_memory();
        for (int64_t i = 0; i < n; ++i) {
            const uint8_t* value = data + i * stride * element_size(from);
            if (type == DType::float64) {
                reinterpret_cast<double*>(converted_.get())[i] = read(value, from);
            } else {
                reinterpret_cast<float*>(converted_.get())[i] = static_cast<float>(read(value, from));
            }
        }
        values_ = converted_.get();
    }
    const void* get() const { return values_; }

  private:
    // Exact: double holds every value of the other types.
    static double read(const void* value, DType dtype) {
        switch (dtype) {
            case DType::float64: return read<double>(value);
            case DType::float32: return read<float>(value);
            case DType::float16: return read<Half>(value);
            default: return read<BFloat16>(value);
        }
    }
    // From any address.
    template <class T>
    static double read(const void* from) {
        T value;
        std::memcpy(&value, from, sizeof value);
        return widen(value);
    }

    const void* values_ = nullptr;
    Scratch converted_;
};

// ---- prepared weights ----------------------------------------------------------------------------

// How often torch has seen the tensor written; kUnknownVersion for inference tensors, which have no such number.
int64_t version_of(const Tensor& tensor) {
    std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
    if (torch_call_dispatcher("aten::is_inference", "", stack.data(), TORCH_ABI_VERSION)) return kUnknownVersion;
    if (torch::stable::detail::to<bool>(stack[0])) return kUnknownVersion;
    stack[0] = torch::stable::detail::from(tensor);
    if (torch_call_dispatcher("aten::_version", "", stack.data(), TORCH_ABI_VERSION)) return kUnknownVersion;
    return torch::stable::detail::to<int64_t>(stack[0]);
}

// Whether a form with this fingerprint was made of these words, as far as m rows of x pay for (fingerprint.h).
bool was_made_of(const Fingerprint& fingerprint, const Kernel& kernel, const Tensor& words, const uint32_t* data,
                 int64_t m) {
    const int64_t count = words.numel();
    int level = count <= kFewWords ? kAll : level_for(m, count);
    if (level < kAll && (words.data_ptr() != fingerprint.address || fingerprint.version == kUnknownVersion ||
                         version_of(words) != fingerprint.version)) {
        level = kAll;
    }
    return hash_level(kernel, data, count, level) == fingerprint.levels[level];
}

// The panels of a prepared form, or null where they are not to be used: the kernel reads the words themselves, or the
// form was made of other words or for another kernel. Refuses what prepare_weight did not make.
const uint8_t* check_prepared(const Tensor& prepared, const Kernel& kernel, const Tensor& words, const uint32_t* data,
                              int64_t m, int64_t k) {
    constexpr const char* kName = "weight_prepared";
    if (scalar_type(prepared) != ScalarType::Byte || prepared.dim() != 1 || !prepared.is_contiguous()) {
        fail(kName, "expected the contiguous uint8 vector that prepare_weight makes, got ",
             dtype_name(scalar_type(prepared)), " with ", prepared.dim(), " dimensions");
    }
    check_memory(kName, prepared, kCpu, 1);
    const int64_t header_bytes = sizeof(PreparedHeader), n = words.size(0);
    if (prepared.numel() < header_bytes)
        fail(kName, "expected at least ", header_bytes, " bytes, got ", prepared.numel());
    const uint8_t* form = static_cast<const uint8_t*>(prepared.data_ptr());
    PreparedHeader header;
    std::memcpy(&header, form, sizeof header);
    if (!std::equal(std::begin(kPreparedMagic), std::end(kPreparedMagic), header.magic)) {
        fail(kName, "expected what prepare_weight makes, got a tensor without its header");
    }
    if (!kernel.prepare) return nullptr;
    Fingerprint fingerprint;
    if (header.layout == kernel.layout.id && header.n == n && header.k == k &&
        prepared.numel() == prepared_bytes(kernel.layout, n, k)) {
        std::memcpy(&fingerprint, form + header_bytes, sizeof fingerprint);
        if (was_made_of(fingerprint, kernel, words, data, m)) return form + kPanelsOffset;
    }
    bitorch_qlinear_stale_forms.fetch_add(1, std::memory_order_relaxed);
    return nullptr;
}

// ---- the product ---------------------------------------------------------------------------------

// The right-hand side of every linear operator, checked.
struct Weight {
    const Kernel& kernel;
    Tensor words;
    const uint8_t* panels;  // null: not prepared
    int64_t n, k;
    const std::optional<Tensor>& bias;
    const std::optional<Tensor>& scale;
    ScalarType out_type;
};

Weight check_weight(const Tensor& words, int64_t m, int64_t k, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& prepared, const std::optional<Tensor>& scale, ScalarType out_type) {
    check_weight_arguments(words, k, bias, scale, out_type, kCpu);
    const Kernel& kernel = active_kernel();
    Tensor data = aligned("weight_words", words);
    const uint8_t* panels = prepared ? check_prepared(*prepared, kernel, words, words_of(data), m, k) : nullptr;
    return {kernel, std::move(data), panels, words.size(0), k, bias, scale, out_type};
}

// y of x's words and the weights' words and panels.
Tensor multiply_panels(const uint32_t* x_words, int64_t m, const Weight& weight, const uint32_t* words,
                       const uint8_t* panels, Tensor y) {
    const DType dtype = *dtype_of(weight.out_type), sum = dtype == DType::float64 ? DType::float64 : DType::float32;
    const Vector bias(weight.bias, sum), scale(weight.scale, sum);
    multiply(Threads(), weight.kernel,
             {x_words,
              words,
              panels,
              m,
              weight.n,
              weight.k,
              {y.data_ptr(), dtype, weight.n, static_cast<int32_t>(weight.k), bias.get(), scale.get()}});
    return y;
}

// Room for the panels; null where the kernel has none.
Scratch allocate_panels(const Kernel& kernel, int64_t n, int64_t k) {
    if (!kernel.prepare) return nullptr;
    Scratch panels = allocate(prepared_bytes(kernel.layout, n, k) - kPanelsOffset);
    if (!panels) fail_memory();
    return panels;
}

Tensor multiply_words(const uint32_t* x_words, int64_t m, const Weight& weight, const std::vector<int64_t>& sizes) {
    Tensor y = empty_on_cpu(sizes, weight.out_type);
    if (m == 0 || weight.n == 0) return y;
    if (weight.panels) return multiply_panels(x_words, m, weight, words_of(weight.words), weight.panels, std::move(y));
    const Scratch panels = allocate_panels(weight.kernel, weight.n, weight.k);
    write_panels(Threads(), weight.kernel, words_of(weight.words), weight.n, weight.k, panels.get());
    return multiply_panels(x_words, m, weight, words_of(weight.words), panels.get(), std::move(y));
}

// The words of x: in `few` where they fit, else in memory of their own.
class PackedRows {
  public:
    PackedRows(const Rows& rows, bool strict) {
        if (static_cast<double>(rows.m) * words_for(rows.k) > kFew) {
            memory_ = allocate(rows.m, words_for(rows.k) * kWordBytes);
            if (!memory_) fail_memory();
            words_ = reinterpret_cast<uint32_t*>(memory_.get());
        }
        pack_rows(rows, strict, 0, words_, nullptr);
    }
    PackedRows(const PackedRows&) = delete;
    PackedRows& operator=(const PackedRows&) = delete;
    const uint32_t* words() const { return words_; }

  private:
    static constexpr int64_t kFew = 256;  // a row or two need no allocation
    alignas(64) uint32_t few_[kFew];
    Scratch memory_;
    uint32_t* words_ = few_;
};

// ---- real values by signs ------------------------------------------------------------------------

void check_reals(const Tensor& reals, int64_t count) {
    check_given("reals", reals);
    const DType dtype = check_float("reals", scalar_type(reals));
    check_dimensions("reals", reals, 1, "(..., n)");
    const int64_t got = reals.size(reals.dim() - 1);
    if (got != count) fail("reals", "expected ", count, " values in the last dimension, as many as signs, got ", got);
    check_memory("reals", reals, kCpu, element_size(dtype));
}

// The real factor as the kernel reads it: with row or value stride 1, copied where neither is.
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

Tensor pack_bits(const Tensor& x, bool strict) {
    check_dimensions("x", x, 1, "(..., k)");
    const Rows rows = check_rows("x", x, x.size(x.dim() - 1), kCpu);
    Tensor words = empty_on_cpu(sizes_with_last(x, words_for(rows.k)), ScalarType::Int);
    pack_rows(rows, strict, 0, words_of(words), nullptr);
    return words;
}

Tensor unpack_bits(const Tensor& words, int64_t k, ScalarType type) {
    check_values(k);
    check_words("words", words, k, kCpu);
    const std::optional<DType> dtype = dtype_of(type);
    if (!dtype) fail("dtype", "expected a float type, int32, int8 or bool, got ", dtype_name(type));
    Tensor values = empty_on_cpu(sizes_with_last(words, k), type);
    if (k == 0) return values;
    const int64_t width = words_for(k), m = words.numel() / width;
    const UnpackRow unpack_row = active_kernel().unpack_row;
    const Tensor from_words = aligned("words", words);
    const uint32_t* from = words_of(from_words);
    uint8_t* to = static_cast<uint8_t*>(values.data_ptr());
    const int64_t grain = std::max<int64_t>(1, kSerialValues / k);
    share(Threads(), m, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            unpack_row(from + i * width, k, to + i * k * element_size(*dtype), *dtype);
        }
    });
    return values;
}

Tensor prepare_weight(const Tensor& words, int64_t k, std::optional<int64_t> layout) {
    check_values(k);
    check_weight_words(words, k, kCpu);
    const Kernel& kernel = active_kernel();
    check_layout(layout, kernel.layout.id);
    Tensor prepared = empty_on_cpu({prepared_bytes(kernel.layout, words.size(0), k)}, ScalarType::Byte);
    const Tensor data = aligned("weight_words", words);
    // The fingerprint first: words that change meanwhile then do not match what is made of them.
    const Fingerprint fingerprint =
        kernel.prepare ? take_fingerprint(kernel, words_of(data), words.numel(), words.data_ptr(), version_of(words))
                       : Fingerprint{};
    write_prepared(Threads(), kernel, words_of(data), words.size(0), k, fingerprint,
                   static_cast<uint8_t*>(prepared.data_ptr()));
    return prepared;
}

Tensor binary_linear(const Tensor& x_words, const Tensor& weight_words, int64_t k, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& weight_prepared, const std::optional<Tensor>& scale,
                     std::optional<ScalarType> out_dtype) {
    check_values(k);
    check_words("x_words", x_words, k, kCpu);
    const Weight weight = check_weight(weight_words, count_rows(x_words), k, bias, weight_prepared, scale,
                                       out_dtype.value_or(ScalarType::Float));
    const Tensor rows = aligned("x_words", x_words);
    return multiply_words(words_of(rows), count_rows(x_words), weight, sizes_with_last(x_words, weight.n));
}

Tensor linear(const Tensor& x, const Tensor& weight_words, int64_t k, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& weight_prepared, const std::optional<Tensor>& scale,
              std::optional<ScalarType> out_dtype, bool strict) {
    const Rows rows = check_rows("x", x, k, kCpu);
    const Weight weight =
        check_weight(weight_words, rows.m, k, bias, weight_prepared, scale, out_dtype.value_or(x.scalar_type()));
    const std::vector<int64_t> sizes = sizes_with_last(x, weight.n);
    if (weight.n == 0) return empty_on_cpu(sizes, weight.out_type);  // however many rows
    return multiply_words(PackedRows(rows, strict).words(), rows.m, weight, sizes);
}

// Both factors are real: the weights are packed for this product alone.
Tensor sign_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& scale, std::optional<ScalarType> out_dtype, bool strict,
                   bool strict_weight) {
    check_weight_matrix(weight);
    const int64_t n = weight.size(0), k = weight.size(1);
    const Rows rows = check_rows("x", x, k, kCpu), weight_rows = check_rows("weight", weight, k, kCpu);
    const ScalarType out_type = out_dtype.value_or(x.scalar_type());
    check_epilogue(n, bias, scale, out_type, kCpu);
    Tensor y = empty_on_cpu(sizes_with_last(x, n), out_type);
    if (rows.m == 0 || n == 0) return y;
    const Kernel& kernel = active_kernel();
    const Scratch memory = allocate(n, words_for(k) * kWordBytes), panels = allocate_panels(kernel, n, k);
    if (!memory) fail_memory();
    uint32_t* words = reinterpret_cast<uint32_t*>(memory.get());
    const PackRow pack_row = kernel.pack_row[static_cast<int>(weight_rows.dtype)];
    pack_panels(
        Threads(), kernel, n, k,
        [&](int64_t i) { pack_row(weight_rows.row(i), k, strict_weight, 0, words + i * words_for(k), nullptr); }, words,
        panels.get());
    const Weight packed{kernel, weight, panels.get(), n, k, bias, scale, out_type};
    return multiply_panels(PackedRows(rows, strict).words(), rows.m, packed, words, panels.get(), std::move(y));
}

// Without a threshold every element is in range, and no bits are kept: in_range_words is empty.
std::tuple<Tensor, Tensor, Tensor> linear_train(const Tensor& x, const Tensor& weight_words, int64_t k,
                                                const std::optional<Tensor>& bias,
                                                const std::optional<Tensor>& weight_prepared,
                                                const std::optional<Tensor>& scale, std::optional<ScalarType> out_dtype,
                                                bool strict, std::optional<double> threshold) {
    const Rows rows = check_rows("x", x, k, kCpu);
    const Weight weight =
        check_weight(weight_words, rows.m, k, bias, weight_prepared, scale, out_dtype.value_or(x.scalar_type()));
    check_threshold(threshold);
    const std::vector<int64_t> word_sizes = sizes_with_last(x, words_for(k));
    Tensor x_words = empty_on_cpu(word_sizes, ScalarType::Int);
    Tensor in_range = empty_on_cpu(threshold ? word_sizes : std::vector<int64_t>{0}, ScalarType::Int);
    pack_rows(rows, strict, threshold ? round_to(*threshold, rows.dtype) : 0, words_of(x_words),
              threshold ? words_of(in_range) : nullptr);
    Tensor y = multiply_words(words_of(x_words), rows.m, weight, sizes_with_last(x, weight.n));
    return {y, x_words, in_range};
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

}  // namespace
}  // namespace bitorch_qlinear

STABLE_TORCH_LIBRARY_IMPL(bitorch_qlinear, CPU, library) {
    library.impl("pack_bits", TORCH_BOX(&bitorch_qlinear::pack_bits));
    library.impl("unpack_bits", TORCH_BOX(&bitorch_qlinear::unpack_bits));
    library.impl("prepare_weight", TORCH_BOX(&bitorch_qlinear::prepare_weight));
    library.impl("binary_linear", TORCH_BOX(&bitorch_qlinear::binary_linear));
    library.impl("linear", TORCH_BOX(&bitorch_qlinear::linear));
    library.impl("sign_linear", TORCH_BOX(&bitorch_qlinear::sign_linear));
    library.impl("linear_train", TORCH_BOX(&bitorch_qlinear::linear_train));
    library.impl("multiply_signs", TORCH_BOX(&bitorch_qlinear::multiply_signs));
}

// ---- what Python asks about the kernels, as plain C -----------------------------------------------

namespace {

// A string that lives until the same thread's next call; "" after an exception, which must not leave C.
template <class Function>
const char* hold(Function function) {
    static thread_local std::string held;
    try {
        held = function();
    } catch (const std::exception&) {
        held.clear();
    }
    return held.c_str();
}

}  // namespace

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_version() { return BITORCH_QLINEAR_VERSION; }

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_sources() { return bitorch_qlinear::sources_digest(); }

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_kernels() { return hold(bitorch_qlinear::available_kernels); }

// Makes the named kernel the active one ("": the automatic choice; null: leaves it as it is). "" or what is wrong.
BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_force_kernel(const char* name) {
    return hold([&]() -> std::string {
        try {
            name ? bitorch_qlinear::force_kernel(name) : static_cast<void>(bitorch_qlinear::active_kernel());
        } catch (const std::exception& error) {
            return error.what();
        }
        return "";
    });
}

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_kernel() {
    return hold([] { return bitorch_qlinear::active_kernel().name; });
}

BITORCH_QLINEAR_EXPORT const char* bitorch_qlinear_kernel_reason() {
    return hold(bitorch_qlinear::active_kernel_reason);
}

// The prepared form: outputs a panel, values a unit, bytes a unit; and its layout's number. False if no kernel is active.
BITORCH_QLINEAR_EXPORT bool bitorch_qlinear_layout(int64_t* out) {
    try {
        const bitorch_qlinear::Layout& layout = bitorch_qlinear::active_kernel().layout;
        out[0] = layout.panel;
        out[1] = layout.unit;
        out[2] = layout.unit_bytes;
        out[3] = layout.id;
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

// Bytes of the prepared form, on CUDA or on the CPU, whose kernel decides. Both answers come from here, because tensors
// without memory can be on a CUDA device where no CUDA operators are loaded. -1 if no kernel is active.
BITORCH_QLINEAR_EXPORT int64_t bitorch_qlinear_prepared_bytes(bool on_cuda, int64_t n, int64_t k) {
    if (on_cuda) return bitorch_qlinear::cuda::prepared_bytes(n, k);
    try {
        return bitorch_qlinear::prepared_bytes(bitorch_qlinear::active_kernel().layout, n, k);
    } catch (const std::exception&) {
        return -1;
    }
}

// The number of the prepared form on CUDA.
BITORCH_QLINEAR_EXPORT int64_t bitorch_qlinear_cuda_layout() { return bitorch_qlinear::cuda::kPreparedLayout; }

// SignGemm::least_outputs. -1 if no kernel is active.
BITORCH_QLINEAR_EXPORT int64_t bitorch_qlinear_least_sign_outputs() {
    try {
        return bitorch_qlinear::active_kernel().sign_gemm->least_outputs;
    } catch (const std::exception&) {
        return -1;
    }
}
