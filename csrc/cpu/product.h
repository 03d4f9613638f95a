// The products, from checked pointers and sizes down to the kernel's calls: packing, panels of weights that came
// without a prepared form, and the tiles that threads compute.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "../rows.h"
#include "kernel.h"
#include "prepared.h"
#include "scratch.h"
#include "threads.h"

namespace bitorch_qlinear {

// Products of fewer multiply-adds than this take about 20 us, and waking threads costs more than they save.
constexpr int64_t kSerialProducts = int64_t{1} << 24;
constexpr int64_t kSerialSignProducts = int64_t{1} << 22;

// ---- packing -----------------------------------------------------------------------------------------

// Packs rows into words [m][words_for(k)], and their gradient mask into in_range if it is not null (PackRow).
template <class Threads>
void pack_rows(const Threads& threads, const Kernel& kernel, const Rows& x, bool strict, double threshold,
               uint32_t* words, uint32_t* in_range) {
    if (x.k == 0) return;  // m may then be any number
    const PackRow pack_row = kernel.pack_row[static_cast<int>(x.dtype)];
    const int64_t width = words_for(x.k);
    const int64_t grain = std::max<int64_t>(1, kSerialValues / x.k);
    share(threads, x.m, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            pack_row(x.row(i), x.k, strict, threshold, words + i * width, in_range ? in_range + i * width : nullptr);
        }
    });
}

// Packs rows by a limit for each value into words [m][words_for(k)] (LimitedRows).
template <class Threads>
void pack_rows(const Threads& threads, const Kernel& kernel, const Rows& x, bool strict, const void* limits,
               const uint32_t* flips, uint32_t* words) {
    if (x.k == 0) return;  // m may then be any number
    const PackLimitedRows pack_limited_rows = kernel.pack_limited_rows[static_cast<int>(x.dtype)];
    const int64_t width = words_for(x.k), grain = std::max<int64_t>(1, kSerialValues / x.k);
    share(threads, x.m, grain, [&](int64_t begin, int64_t end) {
        pack_limited_rows({x.row(begin), end - begin, x.k, x.stride, strict, limits, flips, words + begin * width});
    });
}

// Unpacks words [m][words_for(k)] into values [m][k]; k is not 0.
template <class Threads>
void unpack_rows(const Threads& threads, const Kernel& kernel, const uint32_t* words, int64_t m, int64_t k,
                 uint8_t* values, DType dtype) {
    const int64_t width = words_for(k), grain = std::max<int64_t>(1, kSerialValues / k);
    share(threads, m, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            kernel.unpack_row(words + i * width, k, values + i * k * element_size(dtype), dtype);
        }
    });
}

// Packs real weights and writes their panels in one pass: a panel is made while its words are still in cache.
template <class Threads>
void pack_panels(const Threads& threads, const Kernel& kernel, const Rows& weight, bool strict, uint32_t* words,
                 uint8_t* panels) {
    const int64_t n = weight.m, k = weight.k, width = words_for(k);
    if (k == 0) return;
    const PackRow pack_row = kernel.pack_row[static_cast<int>(weight.dtype)];
    const int64_t height = kernel.layout.panel, grain = std::max<int64_t>(1, kSerialValues / (height * k));
    share(threads, ceil_div(n, height), grain, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
            for (int64_t row = panel * height; row < std::min(n, (panel + 1) * height); ++row) {
                pack_row(weight.row(row), k, strict, 0, words + row * width, nullptr);
            }
            if (kernel.prepare) kernel.prepare(words, n, k, {panel, panel + 1}, panels);
        }
    });
}

// Packs rows into memory of its own.
class PackedRows {
  public:
    template <class Threads>
    PackedRows(const Threads& threads, const Kernel& kernel, const Rows& rows, bool strict) {
        if (static_cast<double>(rows.m) * words_for(rows.k) > kFew) {
            memory_ = allocate(rows.m, words_for(rows.k) * kWordBytes);
            if (!memory_) fail_memory();
            words_ = reinterpret_cast<uint32_t*>(memory_.get());
        }
        pack_rows(threads, kernel, rows, strict, 0, words_, nullptr);
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

// ---- bits by bits ------------------------------------------------------------------------------------

// Computes a product in a number of tiles that is a multiple of the number of threads. Every element is an integer sum,
// so the result does not depend on the split.
template <class Threads>
void multiply(const Threads& threads, const Kernel& kernel, const Product& product) {
    // Tiles of bits begin at whole words, because no two threads may write one word.
    const int64_t column_tile = product.y.limits ? std::lcm(kernel.column_tile, kWordBits) : kernel.column_tile;
    const bool serial = static_cast<double>(product.m) * product.n * product.k < kSerialProducts;
    const int64_t workers = serial ? 1 : threads.count();
    int64_t row_tiles = ceil_div(product.m, kernel.row_tile);
    const int64_t rows = std::min(ceil_div(ceil_div(product.m, row_tiles), 2) * 2, product.m);
    row_tiles = ceil_div(product.m, rows);
    const int64_t wanted = workers / std::gcd(row_tiles, workers);
    const int64_t columns = ceil_div(ceil_div(product.n, wanted), column_tile) * column_tile;
    for_each_tile(threads, workers == 1, {product.m, product.n, rows, columns}, kernel.workspace_bytes(rows, product.k),
                  [&](Range tile_rows, Range tile_columns, uint8_t* workspace) {
                      kernel.gemm(product, tile_rows, tile_columns, workspace);
                  });
}

// n values of a float type, `stride` values apart, at any address; or none, if data is null.
struct Channels {
    const uint8_t* data;
    DType dtype;
    int64_t stride;
};

// Bias or scale as n contiguous values of `type`, float64 or float32: converted if they are stored in another way.
class ConvertedChannels {
  public:
    ConvertedChannels(const Channels& channels, int64_t n, DType type) : values_(channels.data) {
        const int64_t item_bytes = element_size(channels.dtype);
        const bool is_aligned = reinterpret_cast<uintptr_t>(channels.data) % static_cast<uintptr_t>(item_bytes) == 0;
        if (!channels.data || n == 0 || (channels.dtype == type && channels.stride == 1 && is_aligned)) return;
        converted_ = allocate(n, element_size(type));
        if (!converted_) fail_memory();
        for (int64_t i = 0; i < n; ++i) {
            const uint8_t* value = channels.data + i * channels.stride * item_bytes;
            if (type == DType::float64) {
                reinterpret_cast<double*>(converted_.get())[i] = read(value, channels.dtype);
            } else {
                reinterpret_cast<float*>(converted_.get())[i] = static_cast<float>(read(value, channels.dtype));
            }
        }
        values_ = converted_.get();
    }
    const void* get() const { return values_; }

  private:
    // double holds every value of the other types exactly.
    static double read(const void* value, DType dtype) {
        switch (dtype) {
            case DType::float64: return read<double>(value);
            case DType::float32: return read<float>(value);
            case DType::float16: return read<Half>(value);
            default: return read<BFloat16>(value);
        }
    }
    // The value may lie at any address.
    template <class T>
    static double read(const void* from) {
        T value;
        std::memcpy(&value, from, sizeof value);
        return widen(value);
    }

    const void* values_;
    Scratch converted_;
};

// Packed weights [n][words_for(k)]. `panels` is null if they have no prepared form, or the kernel needs none.
struct Weights {
    const uint32_t* words;
    const uint8_t* panels;
    int64_t n, k;
};

// The limits and flips of outputs that are bits (epilogue.h), or null.
struct Bits {
    const int32_t* limits = nullptr;
    const uint32_t* flips = nullptr;
};

// y[m][n], contiguous, with its bias and scale; or words [m][words_for(n)], if there are limits.
struct Outputs {
    void* data;
    DType dtype;
    Channels bias, scale;
    Bits bits = {};
};

// Computes the product of words [m][words_for(k)] by packed weights, whose panels it writes if they are missing.
template <class Threads>
void multiply_words(const Threads& threads, const Kernel& kernel, const uint32_t* x, int64_t m, const Weights& weights,
                    const Outputs& y) {
    const int64_t n = weights.n, k = weights.k;
    if (m == 0 || n == 0) return;
    const Scratch own_panels = weights.panels ? nullptr : allocate_panels(kernel, n, k);
    if (own_panels) write_panels(threads, kernel, weights.words, n, k, own_panels.get());
    const DType sum = y.dtype == DType::float64 ? DType::float64 : DType::float32;
    const ConvertedChannels bias(y.bias, n, sum), scale(y.scale, n, sum);
    multiply(threads, kernel,
             {x,
              weights.words,
              weights.panels ? weights.panels : own_panels.get(),
              m,
              n,
              k,
              {y.data, y.dtype, n, static_cast<int32_t>(k), bias.get(), scale.get(), y.bits.limits, y.bits.flips}});
}

// Computes the product of real values' signs by packed weights.
template <class Threads>
void multiply_rows(const Threads& threads, const Kernel& kernel, const Rows& x, bool strict, const Weights& weights,
                   const Outputs& y) {
    if (x.m == 0 || weights.n == 0) return;
    multiply_words(threads, kernel, PackedRows(threads, kernel, x, strict).words(), x.m, weights, y);
}

// Computes the product of real values' signs by the signs of real weights, which are packed for this product alone.
template <class Threads>
void multiply_rows(const Threads& threads, const Kernel& kernel, const Rows& x, bool strict, const Rows& weight,
                   bool strict_weight, const Outputs& y) {
    if (x.m == 0 || weight.m == 0) return;
    const Scratch memory = allocate(weight.m, words_for(weight.k) * kWordBytes);
    const Scratch panels = allocate_panels(kernel, weight.m, weight.k);
    if (!memory) fail_memory();
    uint32_t* words = reinterpret_cast<uint32_t*>(memory.get());
    pack_panels(threads, kernel, weight, strict_weight, words, panels.get());
    multiply_rows(threads, kernel, x, strict, Weights{words, panels.get(), weight.m, weight.k}, y);
}

// ---- real values by signs ----------------------------------------------------------------------------

// A tile has at most kMostColumns, so that its sums, 64 bytes a column, stay in L2. Tiles of fewer columns than
// kFewestColumns would make the same tables too often.
constexpr int64_t kMostColumns = 4096, kFewestColumns = 512;

// Computes a product of real values by signs in tiles of row_tile rows by equal shares of the columns: one share,
// unless there are fewer rows than threads. Few rows, also those that whole tiles leave over, are computed by
// multiply_few.
template <class Threads>
void multiply_by_signs(const Threads& threads, const SignGemm& kernel, const SignProduct& product) {
    const bool serial = static_cast<double>(product.m) * product.n * product.k < kSerialSignProducts;
    const int64_t workers = serial ? 1 : threads.count(), rows = row_tile(product.dtype);
    const int64_t rest = product.m % rows, few = rest <= kernel.most_few_rows(product.dtype) ? rest : 0;
    const auto tiles_of = [&](int64_t m) {
        const int64_t row_tiles = ceil_div(m, rows);
        const int64_t wanted = std::min(workers / std::gcd(row_tiles, workers), ceil_div(product.n, kFewestColumns));
        const int64_t shares =
            std::max({int64_t{1}, ceil_div(product.n, kMostColumns), row_tiles < 4 * workers ? wanted : 1});
        return Tiles{m, product.n, rows, ceil_div(ceil_div(product.n, shares), kCodeColumns) * kCodeColumns};
    };
    const int64_t many = product.m - few;
    if (many > 0) {
        const Scratch memory = allocate(count_passes(product) * product.n, kWordBytes);
        if (!memory) fail_memory();
        uint32_t* codes = reinterpret_cast<uint32_t*>(memory.get());
        const int64_t blocks = ceil_div(product.n, kCodeColumns);
        share(threads, blocks, workers == 1 ? blocks : 1, [&](int64_t begin, int64_t end) {
            kernel.make_codes(product, {begin * kCodeColumns, std::min(end * kCodeColumns, product.n)}, codes);
        });
        const Tiles tiles = tiles_of(many);
        for_each_tile(threads, workers == 1, tiles, kernel.workspace_bytes(product, std::min(tiles.columns, product.n)),
                      [&](Range tile_rows, Range tile_columns, uint8_t* workspace) {
                          kernel.multiply(product, codes, tile_rows, tile_columns, workspace);
                      });
    }
    if (few > 0) {
        const Tiles tiles = tiles_of(few);
        for_each_tile(threads, workers == 1, tiles,
                      kernel.few_workspace_bytes(product, few, std::min(tiles.columns, product.n)),
                      [&](Range, Range tile_columns, uint8_t* workspace) {
                          kernel.multiply_few(product, {many, product.m}, tile_columns, workspace);
                      });
    }
}

}  // namespace bitorch_qlinear
