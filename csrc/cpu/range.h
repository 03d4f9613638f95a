#pragma once

#include <cstdint>

namespace bitorch_qlinear {

struct Range {
    int64_t begin, end;
};
static inline int64_t size(Range range) { return range.end - range.begin; }

}  // namespace bitorch_qlinear
