// Copies words of the interchange form to the aligned one, counts the set bits of each row, and writes the prepared
// form's header.
//
// A lane takes a word and not 16 bytes, because rows of the interchange form start on any word. A warp has kAlignSteps
// loads of 128 bytes in flight, which is enough (an estimate, `python -m benchmarks gpu-model`): for each 128 bytes
// read and written a warp has 17 instructions, and an SM of an H200 issues about 50 in the time that its share of the
// memory takes.
#include <algorithm>
#include <iterator>

#include "align_rows.cuh"
#include "check_prepared.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "row_grid.cuh"

namespace bitorch_qlinear::cuda {
namespace {

// popcounts has `rows` elements, which are zeros from m on. Blocks from `blocks` on do the other job.
__global__ void __launch_bounds__(kRowThreads)
    align_rows(const Align job, int64_t rows, const PreparedHeader header, const Align other, int64_t blocks) {
    let_next_kernel_start();
    if (blockIdx.x >= blocks) return align_rows_of_block(other, blockIdx.x - blocks);
    const int64_t row = row_of_warp(), width = word_count(job.k);
    int32_t count = 0;
    if (row < job.m) {
        for (int64_t first = first_segment() * kAlignSegment; first < width; first += segment_step() * kAlignSegment) {
            count += align_segment(job, row, first);
        }
    }
    count = sum_over_row(count);
    if (threadIdx.x == 0 && row < rows) job.popcounts[row] = count;
    if (job.header && row == 0 && threadIdx.x == 0) *job.header = header;
}

}  // namespace

cudaError_t find_code(int* capability) {
    cudaFuncAttributes found{};
    const auto error = cudaFuncGetAttributes(&found, align_rows);
    if (error != cudaSuccess) return cudaGetLastError();  // which clears the error, before others see it
    *capability = found.ptxVersion;
    return cudaSuccess;
}

cudaError_t align(const Align& job, const Align& other, cudaStream_t stream) {
    const int64_t padded = prepared_popcount_bytes(job.m) / static_cast<int64_t>(sizeof(int32_t));
    const int64_t rows = job.header ? padded : job.m;
    const int64_t launched =
        job.header ? std::max(rows, int64_t{1}) : rows;  // a form without weights has a header, too
    const int64_t segments = ceil_div(words_for(job.k), kAlignSegment);
    PreparedHeader header = {{}, kPreparedLayout, 0, job.m, job.k, {}};
    std::copy(std::begin(kPreparedMagic), std::end(kPreparedMagic), header.magic);
    // A row has one block, as in pack.cu if it is counted. 65,536 values are one segment for each of its warps.
    return launch_rows(align_rows, launched, segments, false, align_blocks(other), stream, job, rows, header, other,
                       row_blocks(launched, segments));
}

}  // namespace bitorch_qlinear::cuda
