// Real values by signs, one value at a time: the twin of the other instruction sets' versions, which defines what they
// compute and in which order they add.
#include "sign_gemm.h"

namespace bitorch_qlinear {
namespace {

// Returns the bits [begin, begin + 30) of a row of k bits, 0 past k.
inline uint32_t bits_at(const uint32_t* row, int64_t begin, int64_t k) {
    const int64_t word = begin / kWordBits, shift = begin % kWordBits, left = k - begin;
    uint64_t bits = row[word];
    if (shift > kWordBits - kPassValues && word + 1 < words_for(k)) bits |= uint64_t{row[word + 1]} << kWordBits;
    const int64_t valid = left < kPassValues ? left : kPassValues;
    return static_cast<uint32_t>(bits >> shift) & ((uint32_t{1} << valid) - 1);
}

void make_block_codes(const SignProduct& product, Range passes, int64_t column, uint32_t* codes) {
    for (int64_t pass = passes.begin; pass < passes.end; ++pass, codes += kCodeColumns) {
        const int64_t begin = pass * kPassValues;
        const int64_t end = product.k - begin < kPassValues ? product.k : begin + kPassValues;
        for (int64_t i = 0; i < kCodeColumns; ++i) {
            codes[i] = 0;
            if (column + i >= product.n) continue;
            if (product.transposed) {
                codes[i] = bits_at(product.words + (column + i) * words_for(product.k), begin, product.k);
                continue;
            }
            for (int64_t k = begin; k < end; ++k) {
                const uint32_t word = product.words[k * words_for(product.n) + column / kWordBits];
                codes[i] |= (word >> i & 1) << (k - begin);
            }
        }
    }
}

void make_codes(const SignProduct& product, Range columns, uint32_t* codes) {
    make_codes_by_blocks(make_block_codes, product, columns, codes);
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

const SignGemm kScalarSignGemm = {
    .least_outputs = INT64_MAX,  // never faster than the BLAS
    .make_codes = make_codes,
    .workspace_bytes = [](const SignProduct&, int64_t) -> int64_t { return 0; },
    .multiply = multiply_any,
    .most_few_rows = [](DType) -> int64_t { return 0; },
    .few_workspace_bytes = nullptr,
    .multiply_few = nullptr,
};

}  // namespace bitorch_qlinear
