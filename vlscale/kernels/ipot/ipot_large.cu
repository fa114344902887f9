// IPOT on NVIDIA GPUs from sm_70 on: the forward pass of examples beyond a tile. See reference.py for the algorithm and its names.
// Defined by the caller: MOST_WORDS and MOST_REGIONS of an example.
//
// One block per example, products tile by tile, and always the log form: it needs one matrix, which lies in the plan's own
// memory (and mostly in the second-level cache), and two vectors, which lie in shared memory.

// log of the sum of exp(offset[k] + step * row[k * stride]) over k = begin, begin + by, ..., below count.
__device__ __forceinline__ float log_sum(const float* row, int64 stride, const float* offset, float step, int begin,
                                         int by, int count, bool lanes) {
    float best = -INFINITE;
    for (int k = begin; k < count; k += by) best = fmaxf(best, offset[k] + step * row[k * stride]);
    if (lanes) best = over_lanes<Max>(best);
    float total = 0.0f;
    for (int k = begin; k < count; k += by) total += expf(offset[k] + step * row[k * stride] - best);
    if (lanes) total = over_lanes<Add>(total);
    return best + logf(total);
}

// Cosines of all words and regions into matrix [tall][wide], and what is kept of norms. The rows and columns that a thread
// writes are those that it goes through next, so no barrier is needed in between.
__device__ __forceinline__ void all_cosines(const scalar* x, const scalar* y, int m, int n, int hidden, float floor,
                                            float* matrix, int wide, float* inverse_word, float* inverse_region) {
    __shared__ __align__(16) float staged[(TM + TN) * PITCH];
    __shared__ float inverse[TM + TN], free[TM + TN];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i0 = 0; i0 < m || i0 == 0; i0 += TM)
        for (int j0 = 0; j0 < n || j0 == 0; j0 += TN) {
            float cosine[ROWS][COLUMNS];
            cosines(x + static_cast<int64>(i0) * hidden, y + static_cast<int64>(j0) * hidden, m - i0, n - j0, hidden,
                    floor, staged, inverse, free, cosine);
            for (int place = threadIdx.x; place < TM + TN; place += THREADS) {
                if (place < TM && i0 + place < m) inverse_word[i0 + place] = inverse[place];
                if (place >= TM && j0 + place - TM < n) inverse_region[j0 + place - TM] = inverse[place];
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const int j = j0 + warp + WARPS * r, i = i0 + lane + 32 * c;
                    if (j < n && i < m) matrix[static_cast<int64>(j) * wide + i] = cosine[r][c];
                }
        }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    ipot_forward(const scalar* words, const scalar* regions, const int64* cu_words, const int64* cu_regions, int hidden,
                 float beta, int iterations, int inner, float floor, int wide, int tall, float* plan, float* distance,
                 Kept kept) {
    __shared__ float ahead[MOST_WORDS], word[MOST_WORDS], sigma[MOST_WORDS], region[MOST_REGIONS], least[MOST_REGIONS];
    __shared__ float totals[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64 first_word = cu_words[blockIdx.x], first_region = cu_regions[blockIdx.x];
    const int m = static_cast<int>(min(cu_words[blockIdx.x + 1] - first_word, static_cast<int64>(wide)));
    const int n = static_cast<int>(min(cu_regions[blockIdx.x + 1] - first_region, static_cast<int64>(tall)));
    float* matrix = plan + static_cast<int64>(blockIdx.x) * tall * wide;
    float *inverse_x = kept.inverse_word + first_word, *inverse_y = kept.inverse_region + first_region;
    float *share_x = kept.share_word + first_word, *share_y = kept.share_region + first_region;
    for (int64 place = threadIdx.x; place < static_cast<int64>(tall) * wide; place += THREADS) matrix[place] = 0.0f;
    for (int i = threadIdx.x; i < m; i += THREADS) share_x[i] = 0.0f;
    for (int j = threadIdx.x; j < n; j += THREADS) share_y[j] = 0.0f;
    if (threadIdx.x == 0) distance[blockIdx.x] = 0.0f;
    all_cosines(words + first_word * hidden, regions + first_region * hidden, m, n, hidden, floor, matrix, wide,
                inverse_x, inverse_y);
    if (m <= 0 || n <= 0) return;
    const float log_m = logf(static_cast<float>(m)), log_n = logf(static_cast<float>(n));
    for (int j = warp; j < n; j += WARPS) {
        float* row = matrix + static_cast<int64>(j) * wide;
        float best = -INFINITE;
        for (int i = lane; i < m; i += 32) best = fmaxf(best, row[i]);
        best = over_lanes<Max>(best);
        for (int i = lane; i < m; i += 32) row[i] = (row[i] - best) / beta;
        if (lane == 0) least[j] = best;
    }
    for (int i = threadIdx.x; i < m; i += THREADS) {
        word[i] = 0.0f;
        sigma[i] = -log_m;
    }
    for (int t = 1; t <= iterations; ++t) {
        const float step = static_cast<float>(t);
        for (int i = threadIdx.x; i < m; i += THREADS) ahead[i] = word[i] + sigma[i];
        __syncthreads();
        for (int k = 0; k < inner; ++k) {
            for (int j = warp; j < n; j += WARPS) {
                const float sum = log_sum(matrix + static_cast<int64>(j) * wide, 1, ahead, step, lane, 32, m, true);
                if (lane == 0) region[j] = -log_n - sum;
            }
            __syncthreads();
            for (int i = threadIdx.x; i < m; i += THREADS)
                ahead[i] = -log_m - log_sum(matrix + i, wide, region, step, 0, 1, n, false);
            __syncthreads();
        }
        for (int i = threadIdx.x; i < m; i += THREADS) {
            sigma[i] = ahead[i] - word[i];
            word[i] = ahead[i];
        }
    }
    // Potentials grow with the iterations, and their rounding with them: sigma restores the words' marginal, which is exact.
    const float last = static_cast<float>(iterations), unclamped = 1.0f / floor;
    for (int i = threadIdx.x; i < m; i += THREADS) {
        float mass = 0.0f, share = 0.0f;
        for (int j = 0; j < n; ++j) {
            const float logit = matrix[static_cast<int64>(j) * wide + i], part = expf(region[j] + word[i] + last * logit);
            mass += part;
            share += part * (least[j] + beta * logit);
        }
        sigma[i] = 1.0f / (static_cast<float>(m) * mass);
        share_x[i] = inverse_x[i] < unclamped ? share * sigma[i] : 0.0f;
    }
    __syncthreads();
    float total = 0.0f;
    for (int j = warp; j < n; j += WARPS) {
        float* row = matrix + static_cast<int64>(j) * wide;
        float share = 0.0f;
        for (int i = lane; i < m; i += 32) {
            const float cosine = least[j] + beta * row[i], part = expf(region[j] + word[i] + last * row[i]) * sigma[i];
            share += part * cosine;
            total += part * (1.0f - cosine);
            row[i] = part;
        }
        share = over_lanes<Add>(share);
        if (lane == 0) share_y[j] = inverse_y[j] < unclamped ? share : 0.0f;
    }
    total = over_lanes<Add>(total);
    if (lane == 0) totals[warp] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (int w = 0; w < WARPS; ++w) sum += totals[w];
        distance[blockIdx.x] = sum;
    }
}
