// Reading the operators' arguments and making their results, on every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../rows.h"
#include "check.h"

namespace bitorch_qlinear {

// Returns a contiguous tensor of uninitialized memory.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Device& device) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    bool overflows = false;
    for (size_t d = sizes.size(); d-- > 0;) {
        strides[d] = stride;
        overflows |= __builtin_mul_overflow(stride, std::max<int64_t>(sizes[d], 1), &stride);
    }
    AtenTensorHandle handle = nullptr;
    if (overflows || aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                              torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                              device.type, std::max(device.index, 0), &handle)) {
        std::string shape;
        for (const int64_t size : sizes) shape += std::to_string(size) + ", ";
        fail("result", "cannot allocate shape (", shape, ") of ", dtype_name(type));
    }
    return Tensor(handle);
}

// Returns whether each element lies at a multiple of its size, as kernels require; torch.frombuffer can make other
// tensors.
inline bool is_aligned(const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % tensor.element_size() == 0;
}

// Returns the common row stride if x can be read without a copy, else nullopt.
inline std::optional<int64_t> row_stride(const Tensor& x) {
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    const int64_t last = x.dim() - 1;
    if (!is_aligned(x)) return std::nullopt;
    if (sizes[last] > 1 && strides[last] != 1) return std::nullopt;
    int64_t stride = sizes[last], expected = -1;
    for (int64_t d = last - 1; d >= 0; --d) {
        if (sizes[d] == 1) continue;
        if (expected < 0) {
            stride = strides[d];
        } else if (strides[d] != expected) {
            return std::nullopt;
        }
        if (__builtin_mul_overflow(strides[d], sizes[d], &expected)) return std::nullopt;  // the tensor has no elements
    }
    return stride;
}

// Returns a copy with the same sizes and strides, whose elements lie at multiples of their size. Bytes are copied and
// not elements, because a GPU that reads an element at another address stops for good.
inline Tensor aligned_copy(const char* argument, const Tensor& x) {
    const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()),
        strides(x.strides().begin(), x.strides().end());
    int64_t bytes = static_cast<int64_t>(x.element_size());
    for (size_t d = 0; d < sizes.size(); ++d) {
        bytes += (sizes[d] - 1) * strides[d] * static_cast<int64_t>(x.element_size());
    }
    int32_t dtype = 0;
    Device device{};
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device.index));
    AtenTensorHandle handle = nullptr;
    const auto failed = [&] { fail(argument, "cannot allocate a copy of it whose elements are aligned"); };
    if (aoti_torch_empty_strided(x.dim(), sizes.data(), strides.data(), dtype, device.type, device.index, &handle)) {
        failed();
    }
    Tensor copy(handle);
    const auto bytes_of = [&](const Tensor& tensor) {
        const int64_t stride = 1;
        AtenTensorHandle view = nullptr;
        if (aoti_torch_create_tensor_from_blob(tensor.data_ptr(), 1, &bytes, &stride, 0, aoti_torch_dtype_uint8(),
                                               device.type, device.index, &view)) {
            failed();
        }
        return Tensor(view);
    };
    const Tensor to = bytes_of(copy), from = bytes_of(x);
    std::array<StableIValue, 3> stack{torch::stable::detail::from(to), torch::stable::detail::from(from),
                                      torch::stable::detail::from(false)};
    if (torch_call_dispatcher("aten::copy_", "", stack.data(), TORCH_ABI_VERSION)) failed();
    torch::stable::detail::to<Tensor>(stack[0]);  // takes the reference that the call returns
    return copy;
}

inline Tensor aligned(const char* argument, const Tensor& tensor) {
    return is_aligned(tensor) || tensor.numel() == 0 ? tensor : aligned_copy(argument, tensor);
}

// Copies x by the dispatcher, because the error of torch::stable's contiguous() prints a backtrace (torch 2.14) and
// names a file of the build.
inline Tensor contiguous_copy(const char* argument, const Tensor& x) {
    using torch::headeronly::MemoryFormat;
    const Tensor source = aligned(argument, x);
    if (source.data_ptr() != x.data_ptr() && source.is_contiguous()) return source;
    std::array<StableIValue, 2> stack{torch::stable::detail::from(source),
                                      torch::stable::detail::from(std::optional(MemoryFormat::Contiguous))};
    if (torch_call_dispatcher("aten::clone", "", stack.data(), TORCH_ABI_VERSION)) {
        fail(argument, "cannot allocate a contiguous copy of it");
    }
    return torch::stable::detail::to<Tensor>(stack[0]);
}

// Returns the number of rows, which is the product of the leading dimensions.
inline int64_t count_rows(const Tensor& tensor) {
    int64_t m = 1;
    for (int64_t d = 0; d + 1 < tensor.dim(); ++d) m *= tensor.size(d);
    return m;
}

// The rows of a tensor, or of a contiguous copy of it.
struct TensorRows : Rows {
    Tensor tensor;  // keeps the memory alive
};

inline TensorRows check_rows(const char* argument, const Tensor& x, int64_t k, const Device& device) {
    check_values(k);
    check_given(argument, x);
    const DType dtype = check_float(argument, scalar_type(x));
    check_dimensions(argument, x, 1, "(..., k)");
    if (x.size(x.dim() - 1) != k)
        fail(argument, "expected k = ", k, " values in the last dimension, got ", x.size(x.dim() - 1));
    check_memory(argument, x, device, element_size(dtype));
    const int64_t m = count_rows(x);
    std::optional<int64_t> stride = m == 0 || k == 0 ? k : row_stride(x);
    Tensor rows = stride ? x : contiguous_copy(argument, x);
    const uint8_t* data = static_cast<const uint8_t*>(rows.data_ptr());
    return {{data, dtype, m, k, stride.value_or(k)}, std::move(rows)};
}

// Returns the sizes of a tensor of at least one dimension, with another last size.
inline std::vector<int64_t> sizes_with_last(const Tensor& tensor, int64_t last) {
    std::vector<int64_t> result;
    result.reserve(static_cast<size_t>(tensor.dim()));
    for (int64_t d = 0; d + 1 < tensor.dim(); ++d) result.push_back(tensor.size(d));
    result.push_back(last);
    return result;
}

inline uint32_t* words_of(const Tensor& words) { return static_cast<uint32_t*>(words.data_ptr()); }

// The limits and flips of outputs that are bits (epilogue.h), as they were given.
struct BitArguments {
    const std::optional<Tensor>& limits;
    const std::optional<Tensor>& flips;
};

// What an operator passes that only writes numbers.
inline const std::optional<Tensor> kNoTensor;
inline const BitArguments kNoBits{kNoTensor, kNoTensor};

// Checks what every product takes beside its factors: n values of bias and scale, and the type of the outputs.
inline void check_epilogue(int64_t n, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                           ScalarType out_type, const Device& device) {
    check_vector("bias", bias, n, device);
    check_vector("scale", scale, n, device);
    if (out_type != ScalarType::Int) {
        check_float("out_dtype", out_type);
    } else if (bias || scale) {
        fail("out_dtype", "int32 is the product itself, and takes neither bias nor scale");
    }
}

// Checks what a product takes whose n outputs may be bits, and returns the type of its result.
inline ScalarType check_epilogue(int64_t n, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                                 std::optional<ScalarType> out_type, ScalarType usual_type, const BitArguments& bits,
                                 const Device& device) {
    if (!bits.limits) {
        if (bits.flips) fail("out_flips", "expected None without out_limits, got a tensor");
        check_epilogue(n, bias, scale, out_type.value_or(usual_type), device);
        return out_type.value_or(usual_type);
    }
    if (bias) fail("bias", "expected None with out_limits, got a tensor");
    if (scale) fail("scale", "expected None with out_limits, got a tensor");
    if (out_type) fail("out_dtype", "expected None with out_limits, got ", dtype_name(*out_type));
    check_limits(*bits.limits, bits.flips, n, device);
    return ScalarType::Int;
}

// Checks a prepared form as far as every device can without reading its memory.
inline void check_prepared_vector(const char* argument, const Tensor& prepared, const Device& device) {
    if (scalar_type(prepared) != ScalarType::Byte || prepared.dim() != 1 || !prepared.is_contiguous()) {
        fail(argument, "expected the contiguous uint8 vector that prepare_weight makes, got ",
             dtype_name(scalar_type(prepared)), " with ", prepared.dim(), " dimensions");
    }
    check_memory(argument, prepared, device, 1);
    const int64_t header_bytes = sizeof(PreparedHeader);
    if (prepared.numel() < header_bytes) {
        fail(argument, "expected at least ", header_bytes, " bytes, got ", prepared.numel());
    }
}

// The arguments that every operator with packed weights has beside x, checked. They refer to the operator's arguments.
struct WeightArguments {
    const Tensor& words;
    int64_t n, k;
    const std::optional<Tensor>& bias;
    const std::optional<Tensor>& prepared;
    const std::optional<Tensor>& scale;
    BitArguments bits;
    ScalarType out_type;

    // Returns the last size of the result.
    int64_t out_size() const { return bits.limits ? words_for(n) : n; }
};

inline WeightArguments check_weight(const Tensor& words, int64_t k, const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& prepared, const std::optional<Tensor>& scale,
                                    std::optional<ScalarType> out_dtype, ScalarType usual_type,
                                    const BitArguments& bits, const Device& device) {
    check_values(k);
    check_weight_words(words, k, device);
    const int64_t n = words.size(0);
    const ScalarType out_type = check_epilogue(n, bias, scale, out_dtype, usual_type, bits, device);
    if (prepared) check_prepared_vector("weight_prepared", *prepared, device);
    return {words, n, k, bias, prepared, scale, bits, out_type};
}

// The arguments of a product of real rows by packed weights, checked.
struct LinearArguments {
    TensorRows x;
    WeightArguments weight;
};

inline LinearArguments check_linear(const Tensor& x, const Tensor& weight_words, int64_t k,
                                    const std::optional<Tensor>& bias, const std::optional<Tensor>& weight_prepared,
                                    const std::optional<Tensor>& scale, std::optional<ScalarType> out_dtype,
                                    const BitArguments& bits, const Device& device) {
    TensorRows rows = check_rows("x", x, k, device);
    return {std::move(rows),
            check_weight(weight_words, k, bias, weight_prepared, scale, out_dtype, x.scalar_type(), bits, device)};
}

// The arguments of a product of real rows by real weights, checked.
struct SignLinearArguments {
    TensorRows x, weight;
    ScalarType out_type;
};

inline SignLinearArguments check_sign_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& scale, std::optional<ScalarType> out_dtype,
                                             const Device& device) {
    check_given("weight", weight);
    if (weight.dim() != 2) fail("weight", "expected shape (n, k), got ", weight.dim(), " dimensions");
    const int64_t n = weight.size(0), k = weight.size(1);
    TensorRows rows = check_rows("x", x, k, device), weight_rows = check_rows("weight", weight, k, device);
    const ScalarType out_type = out_dtype.value_or(x.scalar_type());
    check_epilogue(n, bias, scale, out_type, device);
    return {std::move(rows), std::move(weight_rows), out_type};
}

// Checks the dtype of unpacked values.
inline DType check_unpacked(ScalarType type) {
    const std::optional<DType> dtype = dtype_of(type);
    if (!dtype) fail("dtype", "expected a float type, int32, int8 or bool, got ", dtype_name(type));
    return *dtype;
}

// Checks the layout that a caller of prepare_weight expects, if it expects one.
inline void check_layout(const std::optional<int64_t>& layout, int64_t present) {
    if (layout && *layout != present) {
        fail("layout", "expected ", present, ", that of the kernel that runs here, or None, got ", *layout);
    }
}

inline void check_threshold(const std::optional<double>& threshold) {
    if (threshold && !(*threshold >= 0)) fail("threshold", "expected a number >= 0 or None, got ", *threshold);
}

// Rounds the threshold to x's dtype, so that the comparison is exact in the kernel's wider type.
inline double round_to(double threshold, DType dtype) {
    switch (dtype) {
        case DType::float64: return threshold;
        case DType::float32: return static_cast<float>(threshold);
        case DType::float16: {
            Half half;
            narrow(static_cast<float>(threshold), &half);
            return widen(half);
        }
        default: {
            BFloat16 value;
            narrow(static_cast<float>(threshold), &value);
            return widen(value);
        }
    }
}

}  // namespace bitorch_qlinear
