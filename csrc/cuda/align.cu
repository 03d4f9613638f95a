// Copies words of the interchange form to the aligned one, counts the set bits of each row, and writes the prepared
// form's header.
//
// A lane takes a word and not 16 bytes, because rows of the interchange form start on any word. A warp has kSteps loads
// of 128 bytes in flight, which is enough (an estimate, `python -m tools.gpu_model`): for each 128 bytes read and
// written a warp has 17 instructions, and an SM of an H200 issues about 50 in the time that its share of the memory
// takes.
#include <algorithm>
#include <iterator>

#include "check_prepared.cuh"
#include "kernels.h"
#include "row_grid.cuh"

namespace bitorch_qlinear::cuda {
namespace {

constexpr int kSteps = 8;
constexpr int kSegment = kSteps * kWarp;
static_assert(kSegment % kAlignedWords == 0, "a row's padding words belong to its last segment");

// Copies words [first, first + kSegment) of a row, as far as they exist, and returns their set bits, distributed over
// the lanes.
__device__ __forceinline__ int32_t align_segment(const Align& job, int64_t row, int64_t first) {
    const int64_t width = word_count(job.k),
                  aligned_width = (width + kAlignedWords - 1) / kAlignedWords * kAlignedWords;
    const int values = static_cast<int>(min(job.k - first * kWordBits, int64_t{kSegment} * kWordBits));
    const int aligned = static_cast<int>(min(aligned_width - first, int64_t{kSegment}));
    const uint32_t* from = job.words + row * width + first;
    uint32_t* to = job.aligned + row * aligned_width + first;
    uint32_t words[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const int index = step * kWarp + lane_index(), left = values - index * static_cast<int>(kWordBits);
        words[step] = left > 0 ? from[index] & valid_bits(left) : 0;
    }
    int32_t count = 0;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const int index = step * kWarp + lane_index();
        if (job.aligned && index < aligned) to[index] = words[step];
        count += __popc(words[step]);
    }
    return count;
}

// popcounts has `rows` elements, which are zeros from m on.
__global__ void __launch_bounds__(kRowThreads) align_rows(const Align job, int64_t rows, const PreparedHeader header) {
    const int64_t row = row_of_warp(), width = word_count(job.k);
    int32_t count = 0;
    if (row < job.m) {
        for (int64_t first = first_segment() * kSegment; first < width; first += segment_step() * kSegment) {
            count += align_segment(job, row, first);
        }
    }
    count = sum_over_row(count);
    if (threadIdx.x == 0 && row < rows) job.popcounts[row] = count;
    if (job.header && row == 0 && threadIdx.x == 0) *job.header = header;
}

}  // namespace

cudaError_t align(const Align& job, cudaStream_t stream) {
    const int64_t padded = prepared_popcount_bytes(job.m) / static_cast<int64_t>(sizeof(int32_t));
    const int64_t rows = job.header ? padded : job.m;
    const int64_t launched =
        job.header ? std::max(rows, int64_t{1}) : rows;  // a form without weights has a header, too
    PreparedHeader header = {{}, kPreparedLayout, 0, job.m, job.k, {}};
    std::copy(std::begin(kPreparedMagic), std::end(kPreparedMagic), header.magic);
    return launch_rows(align_rows, launched, ceil_div(words_for(job.k), kSegment), false, stream, job, rows, header);
}

}  // namespace bitorch_qlinear::cuda
