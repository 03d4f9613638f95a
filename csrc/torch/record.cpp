// Records the values of tensors and compares them later, so that what was computed from the tensors is used only as
// long as they hold the same values, however they were written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <vector>

#include "../subnormals.h"
#include "tensors.h"

namespace bitorch_qlinear {
namespace {

constexpr size_t kUnit = sizeof(int64_t);

size_t bytes_of(const Tensor& tensor) { return static_cast<size_t>(tensor.numel()) * tensor.element_size(); }

// Returns whether the values lie in one piece of the CPU's memory, and inside the storage, which can be resized.
bool is_readable(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cpu() || !tensor.is_contiguous()) return false;
    const size_t begin = static_cast<size_t>(tensor.storage_offset()) * tensor.element_size();
    return tensor.numel() == 0 || begin + bytes_of(tensor) <= static_cast<size_t>(storage_bytes(tensor));
}

// Calls visit(data, bytes) for each part of a record: for each tensor its dtype, its number of dimensions and its sizes
// as int64, and then its values, filled up to a multiple of 8 bytes. Stops at the first part for which it returns
// false, and at a tensor that cannot be read; returns whether it came to the end.
template <class Visit>
bool visit_parts(const std::vector<Tensor>& tensors, const Visit& visit) {
    static constexpr uint8_t kZeros[kUnit] = {};
    for (const Tensor& tensor : tensors) {
        const ScalarType type = is_readable(tensor) ? scalar_type(tensor) : ScalarType::Undefined;
        if (type == ScalarType::Undefined) return false;
        const int64_t form[] = {static_cast<int64_t>(type), tensor.dim()};
        const auto sizes = tensor.sizes();
        const size_t bytes = bytes_of(tensor);
        if (!visit(form, sizeof form) || !visit(sizes.data(), sizes.size() * kUnit)) return false;
        if (bytes && !visit(tensor.const_data_ptr(), bytes)) return false;
        if (bytes % kUnit && !visit(kZeros, kUnit - bytes % kUnit)) return false;
    }
    return true;
}

Tensor record_values(std::vector<Tensor> tensors) {
    size_t total = 0;
    const bool readable = visit_parts(tensors, [&](const void*, size_t bytes) {
        total += bytes;
        return true;
    });
    if (!readable) fail("tensors", "expected contiguous tensors on the CPU, got another one");
    Tensor record = empty({static_cast<int64_t>(total)}, ScalarType::Byte, {aoti_torch_device_type_cpu(), -1});
    uint8_t* out = static_cast<uint8_t*>(record.data_ptr());
    visit_parts(tensors, [&](const void* data, size_t bytes) {
        if (bytes) std::memcpy(out, data, bytes);
        out += bytes;
        return true;
    });
    return record;
}

// Returns also false in a thread that flushes subnormal numbers, where the same values give other results.
bool same_values(std::vector<Tensor> tensors, const Tensor& record) {
    if (!is_readable(record) || scalar_type(record) != ScalarType::Byte || record.dim() != 1) {
        fail("record", "expected a result of record_values (1-d, contiguous, uint8, on the CPU)");
    }
    if (flushes_subnormals()) return false;
    const uint8_t* in = static_cast<const uint8_t*>(record.const_data_ptr());
    size_t left = bytes_of(record);
    const bool same = visit_parts(tensors, [&](const void* data, size_t bytes) {
        if (left < bytes || (bytes && std::memcmp(in, data, bytes) != 0)) return false;
        in += bytes;
        left -= bytes;
        return true;
    });
    return same && left == 0;
}

}  // namespace
}  // namespace bitorch_qlinear

STABLE_TORCH_LIBRARY_IMPL(bitorch_qlinear, CompositeExplicitAutograd, library) {
    library.impl("record_values", TORCH_BOX(&bitorch_qlinear::record_values));
    library.impl("same_values", TORCH_BOX(&bitorch_qlinear::same_values));
}
