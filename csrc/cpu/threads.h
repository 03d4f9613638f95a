// How work is shared among threads. A `Threads` object provides them, torch's or others, so that a race detector can
// watch the sharing without torch:
//
//     threads.count()                     how many work at the same time
//     threads.for_each(count, grain, f)   calls f(begin, end) for parts of [0, count) of at least `grain`; f does not
//                                         throw
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "range.h"
#include "scratch.h"

namespace bitorch_qlinear {

// Packing or unpacking fewer values than this takes about 20 us, and waking threads costs more than they save.
constexpr int64_t kSerialValues = int64_t{1} << 16;

// Gives the threads to one call of the process at a time; calls from other threads meanwhile do all of their work
// themselves. OpenMP's pool has a team for each of its callers, and the teams together have more threads than there are
// processors. An object belongs to one call, and its destructor gives the threads back.
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
    // The first call that needs threads takes them, not the constructor: most operators' calls are too small to share.
    bool take() const { return taken_ = taken_ || !busy_.test_and_set(std::memory_order_acquire); }

    static inline std::atomic_flag busy_;
    Threads threads_;
    mutable bool taken_ = false;
};

template <class Threads, class Function>
void share(const Threads& threads, int64_t count, int64_t grain, const Function& function) {
    count > grain ? threads.for_each(count, grain, function) : function(int64_t{0}, count);
}

// y[m][n] in tiles of at most `rows` by `columns`.
struct Tiles {
    int64_t m, n, rows, columns;
};

// Calls compute(rows, columns, workspace) for each tile, in the calling thread if `serial`. Each thread has a workspace
// of its own.
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

}  // namespace bitorch_qlinear
