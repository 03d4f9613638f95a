// Real values by signs, one value at a time: the twin of the other instruction sets' versions, which says what they
// compute and in which order they add.
#include "float_by_bits.h"

namespace bitorch_qlinear {
namespace {

void make_codes(const SignProduct& product, Range passes, uint32_t* codes) {
    if (product.transposed) return make_codes_transposed(product, passes, codes);
    for (int64_t pass = passes.begin; pass < passes.end; ++pass) {
        const int64_t begin = pass * kPassValues;
        const int64_t end = product.k - begin < kPassValues ? product.k : begin + kPassValues;
        for (int64_t column = 0; column < product.n; ++column) {
            uint32_t code = 0;
            for (int64_t k = begin; k < end; ++k) {
                const uint32_t word = product.words[k * words_for(product.n) + column / kWordBits];
                code |= (word >> column % kWordBits & 1) << (k - begin);
            }
            codes[pass * product.n + column] = code;
        }
    }
}

template <class Sum>
Sum signed_value(Sum value, uint32_t positive) {
    return positive & 1 ? value : -value;
}

template <class Sum>
Sum half_sum(const Sum* x, uint32_t bits) {
    return (signed_value(x[0], bits) + signed_value(x[1], bits >> 1)) + signed_value(x[2], bits >> 2);
}

template <class Sum>
Sum pass_sum(const Sum* x, uint32_t code) {
    Sum sum = 0;
    for (int group = 0; group < kGroups; ++group, x += kGroupBits, code >>= kGroupBits) {
        const Sum value = half_sum(x, code) + half_sum(x + 3, code >> 3);
        sum = group ? sum + value : value;
    }
    return sum;
}

template <class T>
void multiply(const SignProduct& product, const uint32_t* codes, Range rows, Range columns) {
    using Sum = decltype(widen(T{}));
    const int64_t passes = count_passes(product);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        const T* x = static_cast<const T*>(product.x) + row * product.row_stride;
        T* y = static_cast<T*>(product.y) + row * product.n;
        for (int64_t column = columns.begin; column < columns.end; ++column) {
            Sum total = 0, span = 0;
            for (int64_t pass = 0; pass < passes; ++pass) {
                Sum values[kPassValues] = {};
                for (int64_t i = 0; i < kPassValues && pass * kPassValues + i < product.k; ++i) {
                    values[i] = widen(x[(pass * kPassValues + i) * product.value_stride]);
                }
                const Sum sum = pass_sum(values, codes[pass * product.n + column]);
                span = pass % kPassesPerSpan ? span + sum : sum;
                if ((pass + 1) % kPassesPerSpan && pass + 1 < passes) continue;
                total = pass < kPassesPerSpan ? span : total + span;
            }
            narrow(total, y + column);
        }
    }
}

void multiply_any(const SignProduct& product, const uint32_t* codes, Range rows, Range columns, uint8_t*) {
    switch (product.dtype) {
        case DType::float64: return multiply<double>(product, codes, rows, columns);
        case DType::float32: return multiply<float>(product, codes, rows, columns);
        case DType::float16: return multiply<Half>(product, codes, rows, columns);
        default: return multiply<BFloat16>(product, codes, rows, columns);
    }
}

}  // namespace

const FloatByBits kScalarFloatByBits = {
    .least_outputs = INT64_MAX,  // never faster than the BLAS
    .make_codes = make_codes,
    .workspace_bytes = [](const SignProduct&, int64_t) -> int64_t { return 0; },
    .multiply = multiply_any,
};

}  // namespace bitorch_qlinear
