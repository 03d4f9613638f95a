// Transpose by 32 x 32 tiles, 32 x 8 threads; PAD columns of padding decide whether the column reads share a bank.
#include <cstdint>

template <int PAD>
__device__ __forceinline__ void transpose(const float* __restrict__ x, float* __restrict__ y, int rows, int columns) {
    __shared__ float tile[32][32 + PAD];
    const int column = blockIdx.x * 32 + threadIdx.x, row = blockIdx.y * 32 + threadIdx.y;
    for (int i = 0; i < 32; i += 8)
        if (row + i < rows && column < columns)
            tile[threadIdx.y + i][threadIdx.x] = x[static_cast<int64_t>(row + i) * columns + column];
    __syncthreads();
    const int out_column = blockIdx.y * 32 + threadIdx.x, out_row = blockIdx.x * 32 + threadIdx.y;
    for (int i = 0; i < 32; i += 8)
        if (out_row + i < columns && out_column < rows)
            y[static_cast<int64_t>(out_row + i) * rows + out_column] = tile[threadIdx.x][threadIdx.y + i];
}

extern "C" __global__ void transpose_padded(const float* x, float* y, int rows, int columns) {
    transpose<1>(x, y, rows, columns);
}

extern "C" __global__ void transpose_plain(const float* x, float* y, int rows, int columns) {
    transpose<0>(x, y, rows, columns);
}

// Each thread walks down a column of its own: reads are coalesced, writes are not.
extern "C" __global__ void transpose_naive(const float* x, float* y, int rows, int columns) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    for (int64_t row = 0; row < rows; ++row) y[column * static_cast<int64_t>(rows) + row] = x[row * columns + column];
}
