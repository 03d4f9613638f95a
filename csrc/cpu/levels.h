// Levels: real values clipped to [0, 1] and rounded to the nearest of `steps` + 1 evenly spaced numbers, as the input
// quantization of DoReFa-Net does (https://arxiv.org/abs/1606.06160). A level is a number from 0 to steps.
//
// torch computes round(clamp(v, 0, 1) * steps), where the product is rounded to v's type and then a half is rounded to
// the even number. All of this is monotonic in v, so a level is the number of limits that lie below v: the limits are
// the largest values of the type with a lower level. NaN has no level; torch passes it on.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace bitorch_qlinear {

constexpr int kMostLevelBits = 2;

static constexpr int steps_of(int bits) { return (1 << bits) - 1; }

namespace {

constexpr double kInfinity = __builtin_inf();

template <class T>
struct LevelLimits;
template <>
struct LevelLimits<double> {
    static constexpr double two_bits[] = {0x1.5555555555556p-3, 0x1.fffffffffffffp-2, 0x1.aaaaaaaaaaaabp-1};
};
template <>
struct LevelLimits<float> {
    static constexpr double two_bits[] = {0x1.555556p-3, 0x1.fffffep-2, 0x1.aaaaacp-1};
};
template <>
struct LevelLimits<Half> {
    static constexpr double two_bits[] = {0x1.558p-3, 0x1.ffcp-2, 0x1.aacp-1};
};
template <>
struct LevelLimits<BFloat16> {
    static constexpr double two_bits[] = {0x1.56p-3, 0x1.fep-2, 0x1.acp-1};
};

// Returns the largest value of type T whose level is at most `level`.
template <class T>
constexpr double level_limit(int bits, int level) {
    return bits == 1 ? 0.5 : LevelLimits<T>::two_bits[level];
}

// The two planes of 32 values' levels; `high` is 0 if levels have one bit.
struct LevelWords {
    uint32_t low, high;
    bool nan;
};

}  // namespace
}  // namespace bitorch_qlinear
