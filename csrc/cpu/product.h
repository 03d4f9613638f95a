// How work is shared among threads: products in equal tiles, each with a workspace of its own. It is told which threads,
// torch's or others, so that a race detector can watch the sharing without torch:
//
//     threads.count()                     how many work at the same time
//     threads.for_each(count, grain, f)   f(begin, end) for parts of [0, count) of at least `grain`; f does not throw
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "fingerprint.h"
#include "kernel.h"
#include "scratch.h"

namespace bitorch_qlinear {

// Below this many multiply-adds (about 20 us), or values to pack or unpack, waking threads costs more
// than they save.
constexpr int64_t kSerialProducts = int64_t{1} << 24;
constexpr int64_t kSerialSignProducts = int64_t{1} << 22;
constexpr int64_t kSerialValues = int64_t{1} << 16;

// Threads that one call of the process at a time has the use of; callers in other threads meanwhile do all of their
// work themselves. A pool of OpenMP has a team for each of its callers, together more threads than there are processors.
// An object belongs to one call, and gives the threads back at its end.
template <class Threads>
class OneAtATime {
  public:
    explicit OneAtATime(const Threads& threads = {}) : threads_(threads) {}
    OneAtATime(const OneAtATime&) = delete;
    OneAtATime& operator=(const OneAtATime&) = delete;
    ~OneAtATime() {
        if (taken_) busy_.clear(std::memory_order_release);
    }

    int64_t count() const { return take() ? threads_.count() : 1; }
    template <class Function>
    void for_each(int64_t count, int64_t grain, const Function& function) const {
        take() ? threads_.for_each(count, grain, function) : function(int64_t{0}, count);
    }

  private:
    bool take() const { return taken_ = taken_ || !busy_.test_and_set(std::memory_order_acquire); }

    static inline std::atomic_flag busy_;
    Threads threads_;
    mutable bool taken_ = false;  // not before work is to be shared: most calls are too small
};

template <class Threads, class Function>
void share(const Threads& threads, int64_t count, int64_t grain, const Function& function) {
    count > grain ? threads.for_each(count, grain, function) : function(int64_t{0}, count);
}

// y[m][n] in tiles of at most so many rows and columns.
struct Tiles {
    int64_t m, n, rows, columns;
};

// compute(rows, columns, workspace) for each tile; in this thread where `serial`.
template <class Threads, class Compute>
void for_each_tile(const Threads& threads, bool serial, const Tiles& tiles, int64_t workspace_bytes,
                   const Compute& compute) {
    const int64_t column_tiles = ceil_div(tiles.n, tiles.columns);
    const int64_t count = ceil_div(tiles.m, tiles.rows) * column_tiles;
    std::atomic<bool> out_of_memory{false};
    const auto work = [&](int64_t begin, int64_t end) {
        const Scratch workspace = allocate(workspace_bytes);
        if (!workspace) {
            out_of_memory = true;
            return;
        }
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t row = tile / column_tiles * tiles.rows, column = tile % column_tiles * tiles.columns;
            compute(Range{row, std::min(row + tiles.rows, tiles.m)},
                    Range{column, std::min(column + tiles.columns, tiles.n)}, workspace.get());
        }
    };
    share(threads, count, serial ? count : 1, work);
    if (out_of_memory) fail_memory();
}

// The panels of a prepared form; none where the kernel reads the words themselves.
template <class Threads>
void write_panels(const Threads& threads, const Kernel& kernel, const uint32_t* words, int64_t n, int64_t k,
                  uint8_t* panels) {
    if (!kernel.prepare || k == 0) return;
    const int64_t grain = std::max<int64_t>(1, kSerialValues * 8 / (kernel.layout.panel * k));
    share(threads, ceil_div(n, kernel.layout.panel), grain,
          [&](int64_t begin, int64_t end) { kernel.prepare(words, n, k, {begin, end}, panels); });
}

// The whole prepared form of these words.
template <class Threads>
void write_prepared(const Threads& threads, const Kernel& kernel, const uint32_t* words, int64_t n, int64_t k,
                    const Fingerprint& fingerprint, uint8_t* out) {
    PreparedHeader header{};
    std::copy(std::begin(kPreparedMagic), std::end(kPreparedMagic), header.magic);
    header.layout = kernel.layout.id;
    header.n = n;
    header.k = k;
    std::memcpy(out, &header, sizeof header);
    std::memcpy(out + sizeof header, &fingerprint, sizeof fingerprint);
    write_panels(threads, kernel, words, n, k, out + kPanelsOffset);
}

// Words and panels of real weights in one pass over them: a panel is made while its words are still in cache.
// pack_row(i) writes the words of row i.
template <class Threads, class PackRow>
void pack_panels(const Threads& threads, const Kernel& kernel, int64_t n, int64_t k, const PackRow& pack_row,
                 const uint32_t* words, uint8_t* panels) {
    if (k == 0) return;
    const int64_t height = kernel.layout.panel, grain = std::max<int64_t>(1, kSerialValues / (height * k));
    share(threads, ceil_div(n, height), grain, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
            for (int64_t row = panel * height; row < std::min(n, (panel + 1) * height); ++row) pack_row(row);
            if (kernel.prepare) kernel.prepare(words, n, k, {panel, panel + 1}, panels);
        }
    });
}

// As many tiles as a multiple of the threads. Every element is an integer sum, so the result does not depend on the
// split.
template <class Threads>
void multiply(const Threads& threads, const Kernel& kernel, const Product& product) {
    const bool serial = static_cast<double>(product.m) * product.n * product.k < kSerialProducts;
    const int64_t workers = serial ? 1 : threads.count();
    int64_t row_tiles = ceil_div(product.m, kernel.row_tile);
    const int64_t rows = std::min(ceil_div(ceil_div(product.m, row_tiles), 2) * 2, product.m);
    row_tiles = ceil_div(product.m, rows);
    const int64_t wanted = workers / std::gcd(row_tiles, workers);
    const int64_t columns = ceil_div(ceil_div(product.n, wanted), kernel.column_tile) * kernel.column_tile;
    for_each_tile(threads, workers == 1, {product.m, product.n, rows, columns}, kernel.workspace_bytes(rows, product.k),
                  [&](Range tile_rows, Range tile_columns, uint8_t* workspace) {
                      kernel.gemm(product, tile_rows, tile_columns, workspace);
                  });
}

// The sums of a tile, 64 bytes a column, stay in L2; fewer columns make the tables more often.
constexpr int64_t kMostColumns = 4096, kFewestColumns = 512;

// Tiles of row_tile rows by equal shares of the columns: one share, unless there are fewer rows than threads. Few rows,
// and few that are left over, are another function's.
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
