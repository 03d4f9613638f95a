// Tests of the operators' argument checks, and of the parsing of prepared weights, in memory that ends with the tensor,
// so that a sanitizer notices accesses beyond it. The operators' file is included because its functions are internal.
#include "../../csrc/torch/ops_cpu.cpp"

#include <memory>

#include "check.h"

namespace bitorch_qlinear {
namespace {

using test::expect, test::expect_refused;

using Sizes = std::vector<int64_t>;

// A tensor and its memory, which has exactly the size that the tensor needs, so that sanitizers see accesses outside.
struct Owned {
    std::unique_ptr<uint8_t[]> memory;
    Tensor tensor;
};

Owned own(const Sizes& sizes, const Sizes& strides, ScalarType type, int64_t item_size, int64_t misalignment = 0) {
    int64_t last = 0;
    bool empty = false;
    for (size_t d = 0; d < sizes.size(); ++d) {
        empty |= sizes[d] == 0;
        if (!empty) last += (sizes[d] - 1) * strides[d];
    }
    const int64_t bytes = empty ? 0 : (last + 1) * item_size;
    auto memory = std::make_unique<uint8_t[]>(static_cast<size_t>(bytes + misalignment));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        memory.get() + misalignment, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), kCpu.type, 0, &handle));
    return {std::move(memory), Tensor(handle)};
}

Owned own(const Sizes& sizes, ScalarType type, int64_t item_size, int64_t misalignment = 0) {
    Sizes strides(sizes.size());
    int64_t stride = 1;
    for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
    return own(sizes, strides, type, item_size, misalignment);
}

Owned floats(const Sizes& sizes, const Sizes& strides) { return own(sizes, strides, ScalarType::Float, 4); }
Owned words(const Sizes& sizes) { return own(sizes, ScalarType::Int, 4); }

// ---- packed.h --------------------------------------------------------------------------------------

void check_words_and_masks() {
    expect(words_for(0) == 0 && words_for(1) == 1 && words_for(32) == 1 && words_for(33) == 2, "words_for");
    expect(words_for(kMaxValues) == int64_t{1} << 26, "words_for the most values");
    expect(ceil_div(INT64_MAX, 1) == INT64_MAX && ceil_div(INT64_MAX, 2) == int64_t{1} << 62, "ceil_div");
    for (const int64_t k : {int64_t{0}, int64_t{1}, int64_t{31}, int64_t{32}, int64_t{33}, int64_t{64}, kMaxValues}) {
        for (const int64_t word : {int64_t{0}, int64_t{1}, int64_t{2}, words_for(k) - 1, words_for(k)}) {
            if (word < 0) continue;
            uint32_t expected = 0;
            for (int64_t i = 0; i < kWordBits; ++i) expected |= uint32_t{kWordBits * word + i < k} << i;
            expect(word_mask(word, k) == expected, "word_mask");
        }
    }
}

// ---- check.h ---------------------------------------------------------------------------------------

void check_numbers() {
    check_values(0);
    check_values(kMaxValues);
    for (const int64_t k : {int64_t{-1}, INT64_MIN, kMaxValues + 1, INT64_MAX}) {
        expect_refused("bitorch_qlinear: k: expected 0 to 2147483647", [&] { check_values(k); });
    }
    check_threshold(std::nullopt);
    check_threshold(-0.0);
    check_threshold(std::numeric_limits<double>::infinity());
    for (const double threshold : {-5e-324, -1.0, std::nan("")}) {
        expect_refused("bitorch_qlinear: threshold: expected", [&] { check_threshold(threshold); });
    }
    check_layout(std::nullopt, 2);
    check_layout(2, 2);
    expect_refused("bitorch_qlinear: layout: expected 2", [] { check_layout(3, 2); });
    for (const double threshold : {0.0, 1.0, 65519.0, 1e300, std::numeric_limits<double>::infinity()}) {
        expect(round_to(threshold, DType::float64) == threshold, "a threshold in float64");
        for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
            const double rounded = round_to(threshold, dtype);
            expect(round_to(rounded, dtype) == rounded, "a threshold rounded twice");
        }
    }
}

void check_words_tensors() {
    const auto refuse = [](const Owned& w, int64_t k, const char* why) {
        expect_refused(std::string("bitorch_qlinear: words: ") + why, [&] { check_words("words", w.tensor, k, kCpu); });
    };
    check_words("words", words({2, 3, 2}).tensor, 33, kCpu);
    check_words("words", own({0, 5, 0}, {INT64_MAX, INT64_MAX, INT64_MAX}, ScalarType::Int, 4).tensor, 0, kCpu);
    refuse(own({2, 2}, ScalarType::Float, 4), 33, "expected packed words of dtype int32 or uint32, got float32");
    refuse(own({2, 2}, ScalarType::ComplexDouble, 16), 33, "expected packed words of dtype int32 or uint32");
    refuse(words({}), 0, "expected shape (..., ceil(k / 32)), got 0 dimensions");
    refuse(words({2, 2}), 65, "expected 3 words");
    refuse(words({2, 2}), 32, "expected 1 words");
    refuse(own({2, 2}, {1, 2}, ScalarType::Int, 4), 33, "expected contiguous words");
    refuse(own({2, 2}, {0, 1}, ScalarType::Int, 4), 33, "expected contiguous words");
    expect_refused("bitorch_qlinear: weight_words: expected shape (n, ceil(k / 32)), got 3 dimensions",
                   [] { check_weight_words(words({1, 2, 2}).tensor, 33, kCpu); });
}

void check_vectors() {
    const auto check = [](const Owned& vector) { check_vector("bias", vector.tensor, 3, kCpu); };
    check_vector("bias", std::nullopt, 3, kCpu);
    check(floats({3}, {0}));
    check(floats({3}, {7}));
    expect_refused("bitorch_qlinear: bias: expected shape (3)", [&] { check(floats({4}, {1})); });
    expect_refused("bitorch_qlinear: bias: expected shape (3)", [&] { check(floats({3, 1}, {1, 1})); });
    expect_refused("bitorch_qlinear: bias: expected shape (3)", [&] { check(floats({}, {})); });
    expect_refused("bitorch_qlinear: bias: expected float64", [&] { check(words({3})); });
}

// ---- tensors.h -------------------------------------------------------------------------------------

void check_row_strides() {
    expect(row_stride(floats({2, 3, 5}, {15, 5, 1}).tensor) == 5, "contiguous");
    expect(row_stride(floats({2, 3, 5}, {24, 8, 1}).tensor) == 8, "rows apart");
    expect(row_stride(floats({2, 3, 5}, {0, 0, 1}).tensor) == 0, "rows expanded");
    expect(row_stride(floats({4, 5}, {1, 1}).tensor) == 1, "rows that overlap");
    expect(row_stride(floats({1, 3, 5}, {INT64_MAX, 5, 1}).tensor) == 5, "a stride along a dimension of size 1");
    expect(!row_stride(floats({2, 3, 5}, {5, 10, 1}).tensor), "leading dimensions swapped");
    expect(!row_stride(floats({2, 3, 5}, {16, 5, 1}).tensor), "leading dimensions apart");
    expect(!row_stride(floats({3, 5}, {1, 3}).tensor), "columns");
    expect(!row_stride(floats({3, 5}, {5, 0}).tensor), "values expanded");
    expect(!row_stride(own({3, 5}, ScalarType::Float, 4, 2).tensor), "misaligned");
}

void check_results() {
    const Tensor result = empty({2, 0, 3}, ScalarType::Float, kCpu);
    expect(result.is_contiguous() && result.numel() == 0, "empty");
    const int64_t half = int64_t{1} << 32;
    for (const Sizes& sizes : {Sizes{half, half}, {0, half, half}, {half, half, 0}, {INT64_MAX}, {INT64_MAX, 3}}) {
        expect_refused("bitorch_qlinear: result: cannot allocate shape",
                       [&] { empty(sizes, ScalarType::Double, kCpu); });
    }
}

// Misaligned rows are packed like aligned ones.
void check_copies() {
    const Owned plain = own({3, 70}, ScalarType::Half, 2), odd = own({3, 70}, ScalarType::Half, 2, 1);
    for (size_t i = 0; i < 3 * 70 * 2; ++i) plain.memory[i] = odd.memory[i + 1] = static_cast<uint8_t>(i * 37);
    const Tensor expected = pack_bits(plain.tensor, false, {}, {}), packed = pack_bits(odd.tensor, false, {}, {});
    expect(!std::memcmp(expected.data_ptr(), packed.data_ptr(), 3 * 3 * kWordBytes), "misaligned rows");
    const Owned limits = own({70}, ScalarType::Half, 2), odd_limits = own({70}, ScalarType::Half, 2, 1);
    for (size_t i = 0; i < 70 * 2; ++i) limits.memory[i] = odd_limits.memory[i + 1] = static_cast<uint8_t>(i * 29);
    const Tensor by_limits = pack_bits(plain.tensor, true, limits.tensor, {});
    expect(!std::memcmp(by_limits.data_ptr(), pack_bits(odd.tensor, true, odd_limits.tensor, {}).data_ptr(),
                        3 * 3 * kWordBytes),
           "misaligned limits");
}

// ---- headers of prepared weights -------------------------------------------------------------------

// A form with any bit of its header or fingerprint flipped, or with a wrong length, is refused if its magic is wrong or
// it is too short; otherwise the product is right, whether or not the form is used.
void check_headers() {
    constexpr int64_t n = 70, k = 100;
    const Owned w = words({n, words_for(k)}), x = words({2, words_for(k)});
    const Tensor made = prepare_weight(w.tensor, k, std::nullopt);
    const int64_t bytes = made.numel();
    const auto multiply_with = [&](const Owned& prepared) {
        return binary_linear(x.tensor, w.tensor, k, std::nullopt, prepared.tensor, std::nullopt, ScalarType::Int,
                             std::nullopt, std::nullopt);
    };
    const auto expect_right = [&](const Owned& prepared, const char* what) {
        const Tensor y = multiply_with(prepared);
        for (int64_t i = 0; i < 2 * n; ++i) expect(static_cast<int32_t*>(y.data_ptr())[i] == k, what);
    };
    const auto copy = [&](int64_t length) {
        Owned prepared = own({length}, ScalarType::Byte, 1);
        std::memcpy(prepared.memory.get(), made.data_ptr(), static_cast<size_t>(std::min(length, bytes)));
        return prepared;
    };
    for (size_t bit = 0; bit < 8 * kPanelsOffset; ++bit) {
        const Owned prepared = copy(bytes);
        prepared.memory[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
        if (bit / 8 < sizeof kPreparedMagic) {
            expect_refused("bitorch_qlinear: weight_prepared: expected", [&] { multiply_with(prepared); });
        } else {
            expect_right(prepared, "a form with another header or fingerprint");
        }
    }
    for (const int64_t length : {int64_t{0}, int64_t{1}, int64_t{63}}) {
        expect_refused("bitorch_qlinear: weight_prepared: expected", [&] { multiply_with(copy(length)); });
    }
    for (const int64_t length : {int64_t{64}, int64_t{65}, kPanelsOffset - 1, bytes - 1, bytes + 1, 2 * bytes}) {
        expect_right(copy(length), "a form of another length");
    }
    // A form with other panels gives wrong numbers, but nothing outside of it may be read.
    const Owned forged = copy(bytes);
    std::memset(forged.memory.get() + kPanelsOffset, 0xFF, static_cast<size_t>(bytes - kPanelsOffset));
    expect(multiply_with(forged).numel() == 2 * n, "a forged payload");
}

// A product uses words that have changed since their form was made: all of them, or one bit in one of them.
void check_stale_forms() {
    for (const int64_t n : {int64_t{3}, int64_t{300}}) {
        const int64_t k = 1000, m = 512, count = n * words_for(k);  // with so many rows, all words are compared
        const Owned w = words({n, words_for(k)}), x = words({m, words_for(k)});
        const Tensor made = prepare_weight(w.tensor, k, std::nullopt);
        for (const int64_t changed : {int64_t{0}, int64_t{1}, count - 1, count}) {
            uint32_t* data = reinterpret_cast<uint32_t*>(w.memory.get());
            std::memset(data, 0, static_cast<size_t>(count) * 4);
            for (int64_t i = 0; i < count; ++i) data[i] ^= changed == count || i == changed ? 1u : 0u;
            const auto multiply_with = [&](const std::optional<Tensor>& prepared) {
                return binary_linear(x.tensor, w.tensor, k, std::nullopt, prepared, std::nullopt, ScalarType::Int,
                                     std::nullopt, std::nullopt);
            };
            const Tensor with = multiply_with(made), without = multiply_with(std::nullopt);
            expect(!std::memcmp(with.data_ptr(), without.data_ptr(), static_cast<size_t>(m * n) * 4),
                   "words that changed after their form was made");
        }
    }
}

}  // namespace
}  // namespace bitorch_qlinear

int main() {
    using namespace bitorch_qlinear;
    check_words_and_masks();
    check_numbers();
    check_words_tensors();
    check_vectors();
    check_row_strides();
    check_results();
    std::string names = available_kernels();
    for (size_t end; !names.empty(); names.erase(0, end == std::string::npos ? end : end + 2)) {
        end = names.find(", ");
        force_kernel(names.substr(0, end));
        check_copies();
        check_headers();
        check_stale_forms();
    }
    std::puts("checks: all passed");
}
