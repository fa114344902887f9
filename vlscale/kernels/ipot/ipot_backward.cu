// IPOT on NVIDIA GPUs from sm_70 on: the backward pass, of examples of any size. See reference.py for the algorithm and its names.
//
// The gradient is spelled out in function.py. Defined by the caller: WIDTH, columns of a block, one per thread.

#define BATCH 8  // rows that a thread computes at a time

// One side's gradient: out_i = own_i x_i - sum_j g T_ij / (|x_i| |y_j|) y_j, for this thread's column.
__device__ __forceinline__ void backward_side(const scalar* x, const scalar* y, int m, int n, int hidden, int column,
                                              const float* plan, int64 step_i, int64 step_j, float gradient,
                                              const float* inverse_x, const float* inverse_y, const float* share_x,
                                              scalar* out) {
    __shared__ float weight[BATCH][WIDTH];
    for (int begin = 0; begin < m; begin += BATCH) {
        float total[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) total[i] = 0.0f;
        for (int first = 0; first < n; first += WIDTH) {
            __syncthreads();
            const int j = first + static_cast<int>(threadIdx.x);
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
                weight[i][threadIdx.x] =
                    begin + i < m && j < n
                        ? gradient * plan[(begin + i) * step_i + j * step_j] * inverse_x[begin + i] * inverse_y[j]
                        : 0.0f;
            __syncthreads();
            if (column < hidden)
                for (int k = 0; k < WIDTH && first + k < n; ++k) {
                    const float value = widen(y[static_cast<int64>(first + k) * hidden + column]);
#pragma unroll
                    for (int i = 0; i < BATCH; ++i) total[i] += weight[i][k] * value;
                }
        }
        if (column < hidden)
#pragma unroll
            for (int i = 0; i < BATCH; ++i)
                if (begin + i < m) {
                    const int64 place = static_cast<int64>(begin + i) * hidden + column;
                    const float own = gradient * share_x[begin + i] * inverse_x[begin + i] * inverse_x[begin + i];
                    out[place] = narrow(own * widen(x[place]) - total[i]);
                }
    }
}

// Rows that the forward pass did not look at, because the caller's bound was below the example's length: they have no
// gradient, and nobody else writes them.
__device__ __forceinline__ void nothing(scalar* out, int64 begin, int64 end, int hidden, int column) {
    if (column < hidden)
        for (int64 i = begin; i < end; ++i) out[i * hidden + column] = narrow(0.0f);
}

// Grid (B, columns / WIDTH, 2): z = 0 are the words, z = 1 the regions.
extern "C" __global__ void __launch_bounds__(WIDTH)
    ipot_backward(const scalar* words, const scalar* regions, const int64* cu_words, const int64* cu_regions, int hidden,
                  int wide, int tall, const float* plan, const float* gradient, Kept kept, scalar* grad_words,
                  scalar* grad_regions) {
    const int64 first_word = cu_words[blockIdx.x], first_region = cu_regions[blockIdx.x];
    const int64 all_words = cu_words[blockIdx.x + 1] - first_word;
    const int64 all_regions = cu_regions[blockIdx.x + 1] - first_region;
    const int m = static_cast<int>(min(all_words, static_cast<int64>(wide)));
    const int n = static_cast<int>(min(all_regions, static_cast<int64>(tall)));
    const int column = static_cast<int>(blockIdx.y) * WIDTH + static_cast<int>(threadIdx.x);
    const scalar *x = words + first_word * hidden, *y = regions + first_region * hidden;
    const float* own = plan + static_cast<int64>(blockIdx.x) * tall * wide;
    const float *inverse_x = kept.inverse_word + first_word, *inverse_y = kept.inverse_region + first_region;
    if (blockIdx.z == 0) {
        scalar* out = grad_words + first_word * hidden;
        backward_side(x, y, m, n, hidden, column, own, 1, wide, gradient[blockIdx.x], inverse_x, inverse_y,
                      kept.share_word + first_word, out);
        nothing(out, m, all_words, hidden, column);
    } else {
        scalar* out = grad_regions + first_region * hidden;
        backward_side(y, x, n, m, hidden, column, own, wide, 1, gradient[blockIdx.x], inverse_y, inverse_x,
                      kept.share_region + first_region, out);
        nothing(out, n, all_regions, hidden, column);
    }
}
