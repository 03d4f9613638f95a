// Rows that are packed by a limit for each of their values, as every instruction set's packing gets them.
#pragma once

#include <cstdint>

namespace bitorch_qlinear {

// Packs `rows` rows of k contiguous values, which begin `stride` values apart, into words [rows][words_for(k)].
//
//     bit j = (order(v) >= order(limits[j])) XOR bit j of flips; of a NaN: !strict
//
// order() is that of IEEE 754's bit patterns: negative NaN, -infinity, negative numbers, -0, +0, positive numbers,
// +infinity, positive NaN. limits holds k values of the rows' type, which may have any pattern. flips holds
// words_for(k) words, or is null if no bit is flipped. Bits past k are 0 in `words` and ignored in flips.
struct LimitedRows {
    const void* x;
    int64_t rows, k, stride;
    bool strict;
    const void* limits;
    const uint32_t* flips;
    uint32_t* words;
};

}  // namespace bitorch_qlinear
