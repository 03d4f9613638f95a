// Inclusive prefix sums of one block's 256 floats: Hillis and Steele, two buffers in dynamic shared memory.
#include <cstdint>

extern "C" __global__ void inclusive_scan(const float* __restrict__ x, float* __restrict__ y, int n) {
    extern __shared__ float buffers[];
    const int t = threadIdx.x, width = blockDim.x;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * width + t;
    int from = 0;
    buffers[t] = at < n ? x[at] : 0.0f;
    __syncthreads();
    for (int offset = 1; offset < width; offset *= 2) {
        const float* in = buffers + from * width;
        float* out = buffers + (1 - from) * width;
        out[t] = t >= offset ? in[t] + in[t - offset] : in[t];
        from = 1 - from;
        __syncthreads();
    }
    if (at < n) y[at] = buffers[from * width + t];
}
