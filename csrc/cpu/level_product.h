// Products of levels (levels.h) by packed weights, from the kernels' products of signs.
//
// A level q has bits b, each of which is (s + 1) / 2 for a sign s of +-1. So with a row of weights w, whose sum is t,
//
//     sum q w = sum over p of 2^p sum b_p w = (sum over p of 2^p dot(s_p, w) + steps t) / 2
//
// exactly: a row of x becomes as many rows of signs as levels have bits, and t is the product of w by a row of +1.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "level_epilogue.h"
#include "levels.h"
#include "product.h"

namespace bitorch_qlinear {

// A tile has at most so many columns. Its int32 products of 128 rows of signs then take 256 KiB, which stay in L2.
constexpr int64_t kMostLevelColumns = 512;
// Up to this K the sums above fit into an int32.
constexpr int64_t kMostNarrowValues = INT32_MAX / 16;

// The sums of levels by weights of one row of a tile's outputs, from the products of each plane of signs and the sums
// of weights. If levels have one bit, `high` is null.
template <class Integer, int Bits>
struct PlaneSums {
    const int32_t *low, *high, *weights;

    Integer operator()(int64_t j) const {
        Integer sum = Integer{low[j]} + Integer{steps_of(Bits)} * weights[j];
        if constexpr (Bits == 2) sum += Integer{2} * high[j];
        return sum >> 1;
    }
};

template <class Integer>
void write_from_planes(const LevelOutputs& outputs, bool nan, const int32_t* low, const int32_t* high,
                       const int32_t* weights) {
    high ? write_levels(outputs, nan, PlaneSums<Integer, 2>{low, high, weights})
         : write_levels(outputs, nan, PlaneSums<Integer, 1>{low, high, weights});
}

// The planes of all rows of x, in blocks of `height` rows; a block holds the rows of the first plane and then those of
// the second. Each row also has a flag, which says whether it holds a NaN.
struct LevelPlanes {
    Scratch memory, flags;
    int64_t height, width;
    int bits;

    // Returns the planes of the rows from `begin` on, a multiple of height, of which there are `count` in each plane.
    uint32_t* at(int64_t begin) const { return reinterpret_cast<uint32_t*>(memory.get()) + begin * bits * width; }
    bool nan(int64_t row) const { return flags.get()[row]; }
};

template <class Threads>
LevelPlanes pack_levels(const Threads& threads, const Kernel& kernel, const Rows& x, int bits, int64_t height) {
    const int64_t width = words_for(x.k);
    LevelPlanes planes{allocate(x.m, bits * width * kWordBytes), allocate(x.m), height, width, bits};
    if (!planes.memory || !planes.flags) fail_memory();
    const PackLevels pack = kernel.pack_levels[static_cast<int>(x.dtype)];
    const int64_t grain = std::max<int64_t>(1, kSerialValues / std::max<int64_t>(1, x.k));
    share(threads, x.m, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i / height * height, count = std::min(height, x.m - first);
            uint32_t* to = planes.at(first) + (i - first) * width;
            planes.flags.get()[i] = x.k > 0 && pack(x.row(i), x.k, bits, to, count * width);
        }
    });
    return planes;
}

// All tiles of a product of levels read these.
struct LevelProduct {
    const Kernel& kernel;
    const LevelPlanes& planes;
    const uint32_t* weights;
    const uint8_t* panels;
    const int32_t* sums;
    Output y;
};

inline Product product_of_signs(const uint32_t* x, int64_t m, const uint32_t* weights, const uint8_t* panels, int64_t n,
                                int64_t k, int32_t* y) {
    return {x, weights, panels, m, n, k, {y, DType::int32, n, static_cast<int32_t>(k), nullptr, nullptr}};
}

// Computes y[rows][columns]. The rows are those of one block of planes, and the columns begin at a whole panel, so that
// the products of signs are those of a part of the weights; `products` has room for them.
inline void multiply_level_tile(const LevelProduct& product, Range rows, Range columns, int32_t* products,
                                uint8_t* workspace) {
    const Layout& layout = product.kernel.layout;
    const LevelPlanes& planes = product.planes;
    const int64_t count = size(rows), width = size(columns), k = product.y.k;
    const int64_t panel_bytes = ceil_div(k, layout.unit) * layout.unit_bytes;
    const uint8_t* panels = product.panels ? product.panels + columns.begin / layout.panel * panel_bytes : nullptr;
    const Product signs = product_of_signs(planes.at(rows.begin), count * planes.bits,
                                           product.weights + columns.begin * planes.width, panels, width, k, products);
    product.kernel.gemm(signs, {0, signs.m}, {0, signs.n}, workspace);
    for (int64_t i = 0; i < count; ++i) {
        const int32_t* low = products + i * width;
        const int32_t* high = planes.bits == 2 ? low + count * width : nullptr;
        const LevelOutputs outputs{product.y, rows.begin + i, columns.begin, width, planes.bits};
        const auto write = k > kMostNarrowValues ? write_from_planes<int64_t> : write_from_planes<int32_t>;
        write(outputs, planes.nan(rows.begin + i), low, high, product.sums + columns.begin);
    }
}

// Computes the product by planes of signs.
template <class Threads>
void multiply_level_planes(const Threads& threads, const Kernel& kernel, const Rows& x, int bits,
                           const Weights& weights, const Output& y) {
    const int64_t m = x.m, n = weights.n, k = weights.k;
    const Scratch ones = allocate(words_for(k), kWordBytes), sums = allocate(n, sizeof(int32_t));
    if (!ones || !sums) fail_memory();
    uint32_t* const one_words = reinterpret_cast<uint32_t*>(ones.get());
    int32_t* const sum_of = reinterpret_cast<int32_t*>(sums.get());
    std::fill_n(one_words, words_for(k), ~uint32_t{0});
    multiply(threads, kernel, product_of_signs(one_words, 1, weights.words, weights.panels, n, k, sum_of));

    const int64_t row_tiles = ceil_div(m, kernel.row_tile / bits), height = ceil_div(m, row_tiles);
    const LevelPlanes planes = pack_levels(threads, kernel, x, bits, height);
    const bool serial = static_cast<double>(m) * n * k * bits < kSerialProducts;
    const int64_t workers = serial ? 1 : threads.count(), wanted = workers / std::gcd(row_tiles, workers);
    const int64_t most = std::min(ceil_div(n, wanted), kMostLevelColumns);
    const int64_t columns = ceil_div(most, kernel.column_tile) * kernel.column_tile;
    const int64_t workspace_bytes = ceil_div(kernel.workspace_bytes(height * bits, k), 64) * 64;
    const int64_t tile_bytes = workspace_bytes + height * bits * columns * static_cast<int64_t>(sizeof(int32_t));
    const LevelProduct product{kernel, planes, weights.words, weights.panels, sum_of, y};
    for_each_tile(threads, workers == 1, {m, n, height, columns}, tile_bytes,
                  [&](Range tile_rows, Range tile_columns, uint8_t* workspace) {
                      int32_t* const products = reinterpret_cast<int32_t*>(workspace + workspace_bytes);
                      multiply_level_tile(product, tile_rows, tile_columns, products, workspace);
                  });
}

// Computes the product by levels as bytes, which the kernel must be able to multiply.
template <class Threads>
void multiply_level_bytes(const Threads& threads, const Kernel& kernel, const Rows& x, int bits, const Weights& weights,
                          const Output& y) {
    const LevelGemm& gemm = *kernel.level_gemm;
    const int64_t m = x.m, n = weights.n, k = weights.k, width = words_for(k), group = gemm.row_group;
    const int64_t padded = ceil_div(m, group) * group;
    const Scratch planes = allocate(padded, bits * width * kWordBytes), bytes = allocate(padded, gemm.row_bytes(k)),
                  sums = allocate(m, sizeof(int32_t)), nans = allocate(m);
    if (!planes || !bytes || !sums || !nans) fail_memory();
    const PackLevels pack = kernel.pack_levels[static_cast<int>(x.dtype)];
    const int64_t grain = std::max<int64_t>(1, kSerialValues / std::max<int64_t>(1, k));
    int32_t* const sum_of = reinterpret_cast<int32_t*>(sums.get());
    share(threads, padded, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            uint32_t* const to = reinterpret_cast<uint32_t*>(planes.get()) + i * bits * width;
            if (i >= m) {  // rows that fill the last group
                std::fill_n(to, bits * width, 0);
                gemm.write_row(to, width, k, bits, i, bytes.get());
                continue;
            }
            nans.get()[i] = k > 0 && pack(x.row(i), k, bits, to, width);
            sum_of[i] = gemm.write_row(to, width, k, bits, i, bytes.get());
        }
    });

    const int64_t row_tiles = ceil_div(m, gemm.row_tile), height = ceil_div(ceil_div(m, row_tiles), group) * group;
    const bool serial = static_cast<double>(m) * n * k < kSerialProducts;
    const int64_t workers = serial ? 1 : threads.count(), wanted = workers / std::gcd(row_tiles, workers);
    const int64_t columns = ceil_div(ceil_div(n, wanted), gemm.column_tile) * gemm.column_tile;
    const LevelBytes levels{bytes.get(), sum_of, nans.get(), bits};
    for_each_tile(threads, workers == 1, {m, n, height, columns}, gemm.workspace_bytes(height, k),
                  [&](Range tile_rows, Range tile_columns, uint8_t* workspace) {
                      gemm.multiply(levels, weights.panels, y, tile_rows, tile_columns, workspace);
                  });
}

// Computes the product of real values' levels by packed weights, whose panels it writes if they are missing.
template <class Threads>
void multiply_levels(const Threads& threads, const Kernel& kernel, const Rows& x, int bits, const Weights& given,
                     const Outputs& outputs) {
    const int64_t m = x.m, n = given.n, k = given.k;
    if (m == 0 || n == 0) return;
    const Scratch own_panels = given.panels ? nullptr : allocate_panels(kernel, n, k);
    if (own_panels) write_panels(threads, kernel, given.words, n, k, own_panels.get());
    const Weights weights{given.words, given.panels ? given.panels : own_panels.get(), n, k};
    const DType type = outputs.dtype == DType::float64 ? DType::float64 : DType::float32;
    const ConvertedChannels bias(outputs.bias, n, type), scale(outputs.scale, n, type);
    const Output y{outputs.data, outputs.dtype, n, static_cast<int32_t>(k), bias.get(), scale.get()};
    const bool as_bytes = kernel.level_gemm && kernel.level_gemm->takes(m, n, k, bits);
    (as_bytes ? multiply_level_bytes<Threads> : multiply_level_planes<Threads>)(threads, kernel, x, bits, weights, y);
}

}  // namespace bitorch_qlinear
