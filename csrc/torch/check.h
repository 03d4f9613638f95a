// Argument checks, whose messages say which argument was wrong, what was expected and what was given. They run before
// anything is allocated or written, and arguments that pass them cannot make a kernel read or write out of bounds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../dtype.h"
#include "../packed.h"

namespace bitorch_qlinear {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Streams are not used, because their locale crashes if a compiler links its own libstdc++ statically beside torch's.
inline std::string in_words(const char* part) { return part; }
inline std::string in_words(const std::string& part) { return part; }
template <class Number>
std::string in_words(Number number) {
    if constexpr (std::is_integral_v<Number>) return std::to_string(number);
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", static_cast<double>(number));
    return digits;
}

template <class... Parts>
[[noreturn]] void fail(const char* argument, const Parts&... parts) {
    std::string message = std::string("bitorch_qlinear: ") + argument + ": ";
    ((message += in_words(parts)), ...);
    throw std::runtime_error(message);
}

// Returns Undefined if the stable ABI has no name for the dtype; its own error would name a file instead of the
// argument.
inline ScalarType scalar_type(const Tensor& tensor) {
    try {
        return tensor.scalar_type();
    } catch (const std::exception&) {
        return ScalarType::Undefined;
    }
}

inline const char* dtype_name(ScalarType type) {
    switch (type) {
        case ScalarType::Double: return "float64";
        case ScalarType::Float: return "float32";
        case ScalarType::Half: return "float16";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Int: return "int32";
        case ScalarType::UInt32: return "uint32";
        case ScalarType::Long: return "int64";
        case ScalarType::Short: return "int16";
        case ScalarType::Char: return "int8";
        case ScalarType::Byte: return "uint8";
        case ScalarType::Bool: return "bool";
        default: return "a dtype of another kind";
    }
}

inline std::optional<DType> dtype_of(ScalarType type) {
    switch (type) {
        case ScalarType::Double: return DType::float64;
        case ScalarType::Float: return DType::float32;
        case ScalarType::Half: return DType::float16;
        case ScalarType::BFloat16: return DType::bfloat16;
        case ScalarType::Int: return DType::int32;
        case ScalarType::Char: return DType::int8;
        case ScalarType::Bool: return DType::boolean;
        default: return std::nullopt;
    }
}

inline bool is_float(DType dtype) { return static_cast<int>(dtype) < kFloatTypes; }

inline DType check_float(const char* argument, ScalarType type) {
    const std::optional<DType> dtype = dtype_of(type);
    if (!dtype || !is_float(*dtype)) {
        fail(argument, "expected float64, float32, float16 or bfloat16, got ", dtype_name(type));
    }
    return *dtype;
}

// torch passes None through, as an undefined tensor, even for a required tensor.
inline void check_given(const char* argument, const Tensor& tensor) {
    if (!tensor.defined()) fail(argument, "expected a tensor, got None");
}

// The device on which an operator computes. The index is -1 on the CPU.
struct Device {
    int32_t type;
    int32_t index;
};

inline bool is_on(const Tensor& tensor, const Device& device) {
    int32_t type = 0, index = device.index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    if (type != device.type) return false;
    if (index >= 0) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
    return index == device.index;
}

inline int64_t storage_bytes(const Tensor& tensor) {
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
    return bytes;
}

// Returns whether the tensor is inside its own storage, which can be resized beneath it.
inline bool is_inside_storage(const Tensor& tensor, int64_t item_size) {
    if (tensor.numel() == 0) return true;  // its strides may then be of any size
    int64_t last = tensor.storage_offset();
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    return last < storage_bytes(tensor) / item_size;
}

// Checks that the tensor is on the operator's device and inside its own storage.
inline void check_memory(const char* argument, const Tensor& tensor, const Device& device, int64_t item_size) {
    if (!is_on(tensor, device)) fail(argument, "expected a tensor on the same device as the first argument");
    if (!is_inside_storage(tensor, item_size)) {
        fail(argument, "its storage holds ", storage_bytes(tensor), " bytes, which is less than its shape needs");
    }
}

inline void check_values(int64_t k) {
    if (k < 0 || k > kMaxValues) fail("k", "expected 0 to ", kMaxValues, ", got ", k);
}

inline void check_dimensions(const char* argument, const Tensor& tensor, int64_t least, const char* shape) {
    if (tensor.dim() < least) fail(argument, "expected shape ", shape, ", got ", tensor.dim(), " dimensions");
}

inline void check_word_type(const char* argument, const Tensor& words) {
    const ScalarType type = scalar_type(words);
    if (type != ScalarType::Int && type != ScalarType::UInt32) {
        fail(argument, "expected packed words of dtype int32 or uint32, got ", dtype_name(type));
    }
}

// Checks packed words [..., words_for(k)].
inline void check_words(const char* argument, const Tensor& words, int64_t k, const Device& device) {
    check_given(argument, words);
    check_word_type(argument, words);
    check_dimensions(argument, words, 1, "(..., ceil(k / 32))");
    const int64_t got = words.size(words.dim() - 1);
    if (got != words_for(k)) {
        fail(argument, "expected ", words_for(k), " words in the last dimension for k = ", k, ", got ", got);
    }
    if (!words.is_contiguous()) fail(argument, "expected contiguous words, got a strided tensor");
    check_memory(argument, words, device, kWordBytes);
}

// Checks a matrix of packed words [n, words_for(k)].
inline void check_word_rows(const char* argument, const Tensor& words, int64_t k, const Device& device) {
    check_given(argument, words);
    if (words.dim() != 2) fail(argument, "expected shape (n, ceil(k / 32)), got ", words.dim(), " dimensions");
    check_words(argument, words, k, device);
}

inline void check_weight_words(const Tensor& words, int64_t k, const Device& device) {
    check_word_rows("weight_words", words, k, device);
}

// Checks bias or scale: n floats, if given.
inline void check_vector(const char* argument, const std::optional<Tensor>& vector, int64_t n, const Device& device) {
    if (!vector) return;
    const DType dtype = check_float(argument, scalar_type(*vector));
    if (vector->dim() != 1 || vector->size(0) != n) {
        fail(argument, "expected shape (", n, "), got ", vector->dim(), " dimensions and ", vector->numel(),
             " elements");
    }
    check_memory(argument, *vector, device, element_size(dtype));
}

// Checks `length` contiguous elements, whose dtype is already checked.
inline void check_contiguous_vector(const char* argument, const Tensor& vector, int64_t length, const Device& device,
                                    int64_t element_bytes = kWordBytes) {
    if (vector.dim() != 1 || vector.size(0) != length) {
        fail(argument, "expected shape (", length, "), got ", vector.dim(), " dimensions and ", vector.numel(),
             " elements");
    }
    if (!vector.is_contiguous()) fail(argument, "expected a contiguous vector, got a strided one");
    check_memory(argument, vector, device, element_bytes);
}

// Checks the limits of n outputs that are bits, and which of those bits are flipped, if given.
inline void check_limits(const Tensor& limits, const std::optional<Tensor>& flips, int64_t n, const Device& device) {
    const ScalarType type = scalar_type(limits);
    if (type != ScalarType::Int) fail("out_limits", "expected int32, got ", dtype_name(type));
    check_contiguous_vector("out_limits", limits, n, device);
    if (!flips) return;
    check_word_type("out_flips", *flips);
    check_contiguous_vector("out_flips", *flips, words_for(n), device);
}

// Checks the limits by which k values of a type are packed, and which of the bits are flipped, if given.
inline void check_value_limits(const std::optional<Tensor>& limits, const std::optional<Tensor>& flips,
                               ScalarType values, int64_t k, const Device& device) {
    if (!limits) {
        if (flips) fail("flips", "expected None without limits, got a tensor");
        return;
    }
    const ScalarType type = scalar_type(*limits);
    if (type != values) fail("limits", "expected ", dtype_name(values), ", the dtype of x, got ", dtype_name(type));
    check_contiguous_vector("limits", *limits, k, device, element_size(*dtype_of(values)));
    if (!flips) return;
    check_word_type("flips", *flips);
    check_contiguous_vector("flips", *flips, words_for(k), device);
}

}  // namespace bitorch_qlinear
