// Products that follow each other, each of which writes the bits that the next one reads.
#pragma once

#include <optional>
#include <vector>

#include "tensors.h"

namespace bitorch_qlinear {

// Calls linear for the first weights, unless x holds words, and binary_linear for all others; both are a device's
// operators. Calls toggled_linear for layers with toggles.
template <class Linear, class BinaryLinear, class ToggledLinear>
Tensor multiply_in_turn(const Linear& linear, const BinaryLinear& binary_linear, const ToggledLinear& toggled_linear,
                        const Tensor& x, const std::vector<Tensor>& weights, int64_t k,
                        const std::vector<Tensor>& limits, const std::vector<Tensor>& flips,
                        const std::optional<Tensor>& bias, const std::optional<std::vector<Tensor>>& prepared,
                        const std::optional<Tensor>& scale, std::optional<ScalarType> out_dtype, bool strict,
                        const std::optional<std::vector<Tensor>>& toggles) {
    const size_t layers = weights.size();
    const auto check_count = [](const char* argument, size_t got, size_t expected) {
        if (got != expected) fail(argument, "expected ", expected, " tensors, got ", got);
    };
    if (layers == 0) fail("weights", "expected at least 1 tensor, got 0");
    check_count("limits", limits.size(), layers - 1);
    check_count("flips", flips.size(), layers - 1);
    if (prepared) check_count("prepared", prepared->size(), layers);
    if (toggles) check_count("toggles", toggles->size(), layers - 1);
    check_given("x", x);
    const bool is_words = scalar_type(x) == ScalarType::Int || scalar_type(x) == ScalarType::UInt32;
    const ScalarType last_type = out_dtype.value_or(is_words ? ScalarType::Float : scalar_type(x));
    Tensor y = x;
    for (size_t i = 0; i < layers; ++i) {
        const bool is_last = i + 1 == layers;
        std::optional<Tensor> form, limit, flip;
        if (prepared && (*prepared)[i].numel() > 0) form = (*prepared)[i];
        if (!is_last) {
            limit = limits[i];
            flip = flips[i];
        }
        const bool is_real = i == 0 && !is_words;
        if (!is_last && toggles && (*toggles)[i].numel() > 0) {
            y = toggled_linear(y, is_real, strict, weights[i], k, form, limits[i], flips[i], (*toggles)[i]);
            k = weights[i].size(0);
            continue;
        }
        const std::optional<Tensor> none;
        const std::optional<Tensor>&bias_here = is_last ? bias : none, &scale_here = is_last ? scale : none;
        const std::optional<ScalarType> type = is_last ? std::optional(last_type) : std::nullopt;
        y = is_real ? linear(y, weights[i], k, bias_here, form, scale_here, type, strict, limit, flip)
                    : binary_linear(y, weights[i], k, bias_here, form, scale_here, type, limit, flip);
        k = weights[i].size(0);
    }
    return y;
}

}  // namespace bitorch_qlinear
