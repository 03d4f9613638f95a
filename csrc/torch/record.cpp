// Records the values of tensors and compares them later, so that what was computed from the tensors is used only as
// long as they hold the same values, however they were written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "tensors.h"

namespace bitorch_qlinear {
namespace {

// A record holds for each tensor its dtype, its number of dimensions and its sizes as int64, and then its values,
// filled up to a multiple of 8 bytes.
using Header = std::vector<int64_t>;

constexpr size_t kHeaderUnit = sizeof(int64_t);

// Returns whether the values lie in one piece of the CPU's memory.
bool is_readable(const Tensor& tensor) {
    return tensor.defined() && tensor.is_cpu() && tensor.is_contiguous() &&
           is_inside_storage(tensor, static_cast<int64_t>(tensor.element_size()));
}

std::optional<Header> header_of(const Tensor& tensor) {
    const ScalarType type = is_readable(tensor) ? scalar_type(tensor) : ScalarType::Undefined;
    if (type == ScalarType::Undefined) return std::nullopt;
    Header header{static_cast<int64_t>(type), tensor.dim()};
    for (const int64_t size : tensor.sizes()) header.push_back(size);
    return header;
}

size_t bytes_of(const Tensor& tensor) { return static_cast<size_t>(tensor.numel()) * tensor.element_size(); }

size_t padded(size_t bytes) { return (bytes + kHeaderUnit - 1) / kHeaderUnit * kHeaderUnit; }

// Calls visit(header, tensor, bytes) for each tensor as long as it returns true; returns whether all did.
template <class Visit>
bool visit_all(const std::vector<Tensor>& tensors, const Visit& visit) {
    for (const Tensor& tensor : tensors) {
        const std::optional<Header> header = header_of(tensor);
        if (!header || !visit(*header, tensor, bytes_of(tensor))) return false;
    }
    return true;
}

Tensor record_values(std::vector<Tensor> tensors) {
    size_t total = 0;
    const bool readable = visit_all(tensors, [&](const Header& header, const Tensor&, size_t bytes) {
        total += header.size() * kHeaderUnit + padded(bytes);
        return true;
    });
    if (!readable) fail("tensors", "expected contiguous tensors on the CPU, got another one");
    Tensor record = empty({static_cast<int64_t>(total)}, ScalarType::Byte, {aoti_torch_device_type_cpu(), -1});
    uint8_t* out = static_cast<uint8_t*>(record.data_ptr());
    visit_all(tensors, [&](const Header& header, const Tensor& tensor, size_t bytes) {
        std::memcpy(out, header.data(), header.size() * kHeaderUnit);
        out += header.size() * kHeaderUnit;
        std::memset(out + bytes, 0, padded(bytes) - bytes);
        if (bytes) std::memcpy(out, tensor.const_data_ptr(), bytes);
        out += padded(bytes);
        return true;
    });
    return record;
}

// Returns whether this thread takes subnormal numbers for zero (torch.set_flush_denormal), which changes signs.
bool flushes_subnormals() {
    const volatile float smallest = std::numeric_limits<float>::denorm_min();
    return smallest * 1.0f == 0.0f;
}

// Returns also false in a thread that flushes subnormal numbers, where the same values give other results.
bool same_values(std::vector<Tensor> tensors, const Tensor& record) {
    if (!is_readable(record) || scalar_type(record) != ScalarType::Byte || record.dim() != 1) {
        fail("record", "expected a result of record_values (1-d, contiguous, uint8, on the CPU)");
    }
    if (flushes_subnormals()) return false;
    const uint8_t* in = static_cast<const uint8_t*>(record.const_data_ptr());
    size_t left = bytes_of(record);
    const auto continues_with = [&](const void* data, size_t bytes) {
        if (left < bytes || (bytes && std::memcmp(in, data, bytes) != 0)) return false;
        in += bytes;
        left -= bytes;
        return true;
    };
    const bool same = visit_all(tensors, [&](const Header& header, const Tensor& tensor, size_t bytes) {
        static constexpr uint8_t kZeros[kHeaderUnit] = {};
        return continues_with(header.data(), header.size() * kHeaderUnit) &&
               continues_with(bytes ? tensor.const_data_ptr() : nullptr, bytes) &&
               continues_with(kZeros, padded(bytes) - bytes);
    });
    return same && left == 0;
}

}  // namespace
}  // namespace bitorch_qlinear

STABLE_TORCH_LIBRARY_IMPL(bitorch_qlinear, CompositeExplicitAutograd, library) {
    library.impl("record_values", TORCH_BOX(&bitorch_qlinear::record_values));
    library.impl("same_values", TORCH_BOX(&bitorch_qlinear::same_values));
}
