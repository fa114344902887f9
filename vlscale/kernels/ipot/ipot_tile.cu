// IPOT on NVIDIA GPUs from sm_70 on: an example that fits into one tile. See reference.py for the algorithm and its names.
//
// Cost, iterations and distance in one launch, one block per example, everything in registers. LOG (defined by the caller)
// is 1 for the log form, for small beta, and 0 for the plan form. The sum over an example's regions goes through shared
// memory with one barrier.

// Combine each of a warp's ROWS values over its lanes. Instead of five exchanges per row, lanes share the rows out: each
// exchange halves how many rows a lane is in charge of. Returns the total of row `lane / (32 / ROWS)`.
template <class Op> __device__ __forceinline__ float rows_over_lanes(float (&x)[ROWS], int lane) {
    int distance = 16;
#pragma unroll
    for (int left = ROWS; left > 1; left /= 2, distance /= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (int r = 0; r < ROWS / 2; ++r) {
            if (r < left / 2) {
                const float kept = upper ? x[r + left / 2] : x[r];
                const float given = upper ? x[r] : x[r + left / 2];
                x[r] = Op::of(kept, __shfl_xor_sync(EVERY, given, distance));
            }
        }
    }
    for (; distance > 0; distance /= 2) x[0] = Op::of(x[0], __shfl_xor_sync(EVERY, x[0], distance));
    return x[0];
}

// The inverse of sharing out: every lane gets the value of each row.
__device__ __forceinline__ void to_all_lanes(float value, float (&x)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x[r] = __shfl_sync(EVERY, value, r * (32 / ROWS));
}

// Sum this thread's columns over all regions; `memory` is [2][WARPS][TM], its halves used in turn, so that one barrier is
// enough.
__device__ __forceinline__ void columns_over_warps(float (&x)[COLUMNS], float* memory, int& turn) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* here = memory + turn * WARPS * TM;
    turn ^= 1;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) here[warp * TM + lane + 32 * c] = x[c];
    __syncthreads();
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total += here[w * TM + lane + 32 * c];
        x[c] = total;
    }
}

#if LOG == 0
// value: logits going in, the plan coming out.
__device__ __forceinline__ void solve(float (&value)[ROWS][COLUMNS], int m, int n, int iterations, int inner,
                                      float* memory, int& turn) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float words = static_cast<float>(m), regions = static_cast<float>(n);
    float kernel[ROWS][COLUMNS], delta[ROWS], sigma[COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            kernel[r][c] = expf(value[r][c]);  // 0 where there is no word or no region
            value[r][c] = 1.0f;
        }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) sigma[c] = lane + 32 * c < m ? 1.0f / words : 0.0f;
    for (int t = 0; t < iterations; ++t) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) value[r][c] *= kernel[r][c];
        for (int k = 0; k < inner; ++k) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                delta[r] = 0.0f;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) delta[r] += value[r][c] * sigma[c];
            }
            const float total = rows_over_lanes<Add>(delta, lane);
            const int row = warp + WARPS * (lane / (32 / ROWS));
            to_all_lanes(row < n ? 1.0f / (regions * total) : 0.0f, delta);
            float column[COLUMNS];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                column[c] = 0.0f;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) column[c] += value[r][c] * delta[r];
            }
            columns_over_warps(column, memory, turn);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) sigma[c] = lane + 32 * c < m ? 1.0f / (words * column[c]) : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) value[r][c] *= delta[r] * sigma[c];
    }
}
#else
// log of the sum of exp of this thread's columns over all regions, given its own largest and its sum relative to that.
__device__ __forceinline__ float column_log_sum(float* memory, int place) {
    float best = -INFINITE;
    for (int w = 0; w < WARPS; ++w) best = fmaxf(best, memory[w * TM + place]);
    float total = 0.0f;
    for (int w = 0; w < WARPS; ++w) {
        const float top = memory[w * TM + place];
        if (top > -INFINITE) total += memory[(WARPS + w) * TM + place] * expf(top - best);
    }
    return best + logf(total);
}

__device__ __forceinline__ void solve(float (&value)[ROWS][COLUMNS], int m, int n, int iterations, int inner,
                                      float* memory, int& turn) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float log_m = logf(static_cast<float>(m)), log_n = logf(static_cast<float>(n));
    float word[COLUMNS], sigma[COLUMNS], ahead[COLUMNS], region[ROWS], top[ROWS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        word[c] = lane + 32 * c < m ? 0.0f : -INFINITE;
        sigma[c] = -log_m;
    }
    const int row = warp + WARPS * (lane / (32 / ROWS));
    for (int t = 1; t <= iterations; ++t) {
        const float step = static_cast<float>(t);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) ahead[c] = word[c] + sigma[c];
        for (int k = 0; k < inner; ++k) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                region[r] = -INFINITE;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) region[r] = fmaxf(region[r], ahead[c] + step * value[r][c]);
            }
            const float best = rows_over_lanes<Max>(region, lane);
            to_all_lanes(best > -INFINITE ? best : 0.0f, top);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                region[r] = 0.0f;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) region[r] += expf(ahead[c] + step * value[r][c] - top[r]);
            }
            const float total = rows_over_lanes<Add>(region, lane);
            to_all_lanes(row < n ? -log_n - (best + logf(total)) : -INFINITE, region);
            float* here = memory + turn * 2 * WARPS * TM;
            turn ^= 1;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                float highest = -INFINITE, sum = 0.0f;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) highest = fmaxf(highest, region[r] + step * value[r][c]);
                if (highest > -INFINITE) {
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) sum += expf(region[r] + step * value[r][c] - highest);
                }
                here[warp * TM + lane + 32 * c] = highest;
                here[(WARPS + warp) * TM + lane + 32 * c] = sum;
            }
            __syncthreads();
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                ahead[c] = lane + 32 * c < m ? -log_m - column_log_sum(here, lane + 32 * c) : -INFINITE;
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            sigma[c] = lane + 32 * c < m ? ahead[c] - word[c] : 0.0f;
            word[c] = ahead[c];
        }
    }
    float mass[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        mass[c] = 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            value[r][c] = expf(region[r] + word[c] + static_cast<float>(iterations) * value[r][c]);
            mass[c] += value[r][c];
        }
    }
    __syncthreads();  // its memory is divided otherwise than that of the iterations
    columns_over_warps(mass, memory, turn);
    // Potentials grow with the iterations, and their rounding with them: restore the words' marginal, which is exact.
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            value[r][c] = lane + 32 * c < m ? value[r][c] / (static_cast<float>(m) * mass[c]) : 0.0f;
}
#endif

// Distances, plans and what the backward pass needs, from the plan and the cosines of this thread.
__device__ __forceinline__ void finish(const float (&plan)[ROWS][COLUMNS], const float (&cosine)[ROWS][COLUMNS], int m,
                                       int n, const float* free, float* memory, int turn, float* distance,
                                       float* share_word, float* share_region) {
    __shared__ float totals[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float total = 0.0f, column[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) column[c] = 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float share = 0.0f;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            if (warp + WARPS * r < n && lane + 32 * c < m) {
                share += plan[r][c] * cosine[r][c];
                column[c] += plan[r][c] * cosine[r][c];
                total += plan[r][c] * (1.0f - cosine[r][c]);
            }
        }
        share = over_lanes<Add>(share);
        if (lane == 0 && warp + WARPS * r < n) share_region[warp + WARPS * r] = share * free[TM + warp + WARPS * r];
    }
    total = over_lanes<Add>(total);
    if (lane == 0) totals[warp] = total;
    columns_over_warps(column, memory, turn);
    if (warp == 0) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            if (lane + 32 * c < m) share_word[lane + 32 * c] = column[c] * free[lane + 32 * c];
        if (lane == 0) {
            float sum = 0.0f;
            for (int w = 0; w < WARPS; ++w) sum += totals[w];
            *distance = sum;
        }
    }
}

// One block per example. plan is [B, tall, wide], tall <= TN and wide <= TM.
extern "C" __global__ void __launch_bounds__(THREADS)
    ipot_forward(const scalar* words, const scalar* regions, const int64* cu_words, const int64* cu_regions, int hidden,
                 float beta, int iterations, int inner, float floor, int wide, int tall, float* plan, float* distance,
                 Kept kept) {
    // What the products are staged in is used again by the iterations: 4 * WARPS * TM is never more.
    __shared__ __align__(16) float memory[(TM + TN) * PITCH];
    __shared__ float inverse[TM + TN], free[TM + TN];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64 first_word = cu_words[blockIdx.x], first_region = cu_regions[blockIdx.x];
    const int m = static_cast<int>(min(cu_words[blockIdx.x + 1] - first_word, static_cast<int64>(wide)));
    const int n = static_cast<int>(min(cu_regions[blockIdx.x + 1] - first_region, static_cast<int64>(tall)));
    float cosine[ROWS][COLUMNS], value[ROWS][COLUMNS];
    cosines(words + first_word * hidden, regions + first_region * hidden, m, n, hidden, floor, memory, inverse,
            free, cosine);
    for (int place = threadIdx.x; place < TM + TN; place += THREADS) {
        if (place < m) {
            kept.inverse_word[first_word + place] = inverse[place];
            kept.share_word[first_word + place] = 0.0f;
        } else if (place >= TM && place - TM < n) {
            kept.inverse_region[first_region + place - TM] = inverse[place];
            kept.share_region[first_region + place - TM] = 0.0f;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        // A constant per region does not change the plan, and its least puts a 1 into every row of the kernel.
        float best = -INFINITE;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            if (lane + 32 * c < m) best = fmaxf(best, cosine[r][c]);
        best = over_lanes<Max>(best);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            value[r][c] = warp + WARPS * r < n && lane + 32 * c < m ? (cosine[r][c] - best) / beta : -INFINITE;
    }
    int turn = 0;
    if (m > 0 && n > 0) {
        solve(value, m, n, iterations, inner, memory, turn);
        finish(value, cosine, m, n, free, memory, turn, distance + blockIdx.x, kept.share_word + first_word,
               kept.share_region + first_region);
    } else if (threadIdx.x == 0) {
        distance[blockIdx.x] = 0.0f;
    }
    float* out = plan + static_cast<int64>(blockIdx.x) * tall * wide;
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const int j = warp + WARPS * r, i = lane + 32 * c;
            if (j < tall && i < wide) out[static_cast<int64>(j) * wide + i] = j < n && i < m ? value[r][c] : 0.0f;
        }
}
