// IPOT on NVIDIA GPUs from sm_70 on: types and products that its kernels share. See reference.py for the algorithm and its names.
//
// Device source only, without any include, so that NVRTC compiles it where no toolkit is installed; cuda_backend.py puts this
// file in front of the others. Defined by the caller:
//   TYPE   of words and regions: 0 float32, 1 float16, 2 bfloat16
//   TM, TN words and regions that a block's tile holds; multiples of 32 and of WARPS
//   WARPS  of a block of the forward pass
//
// In a tile, a warp has the regions w, w + WARPS, ... and a lane the words l, l + 32, ...: sums over words stay inside a warp.
// Barriers are the fewest that are needed: test_ipot_cuda.py runs warps in two orders and sees each one's absence.
// Nothing is summed in an order that depends on padding. Products are float32 fused multiply-adds: Volta's matrix units
// would need headers of a toolkit, and TensorFloat-32 would round the cost.

#define THREADS (32 * WARPS)
#define ROWS (TN / WARPS)
#define COLUMNS (TM / 32)
#define CHUNK 32
#define PITCH (CHUNK + 4)  // an odd number of float4: lanes that read one column of 32 rows meet no bank twice
#define EVERY 0xffffffffu
#define INFINITE __int_as_float(0x7f800000)

typedef long long int64;

#ifndef EMULATED
__device__ __forceinline__ float half_to_float(unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ __forceinline__ unsigned short float_to_half(float x) {
    unsigned short y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#endif

#if TYPE == 0
typedef float scalar;
__device__ __forceinline__ float widen(scalar x) { return x; }
__device__ __forceinline__ scalar narrow(float x) { return x; }
#elif TYPE == 1
typedef unsigned short scalar;
__device__ __forceinline__ float widen(scalar x) { return half_to_float(x); }
__device__ __forceinline__ scalar narrow(float x) { return float_to_half(x); }
#else
typedef unsigned short scalar;
__device__ __forceinline__ float widen(scalar x) { return __int_as_float(static_cast<int>(x) << 16); }
__device__ __forceinline__ scalar narrow(float x) {
    const unsigned bits = static_cast<unsigned>(__float_as_int(x));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<scalar>((bits >> 16) | 0x40);  // NaN stays NaN
    return static_cast<scalar>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);                  // to nearest, ties to even
}
#endif

// What the forward pass keeps of each packed word or region; see function.py.
struct Kept {
    float *inverse_word, *inverse_region, *share_word, *share_region;
};

struct Add {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct Max {
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

template <class Op> __device__ __forceinline__ float over_lanes(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = Op::of(x, __shfl_xor_sync(EVERY, x, distance));
    return x;
}

// Rows of one side into shared memory, zeros where there is no row or no column.
__device__ __forceinline__ void stage(const scalar* rows, int count, int tile, int hidden, int begin, float* to) {
    for (int place = threadIdx.x; place < tile * CHUNK; place += THREADS) {
        const int row = place / CHUNK, h = begin + place % CHUNK;
        to[row * PITCH + place % CHUNK] =
            row < count && h < hidden ? widen(rows[static_cast<int64>(row) * hidden + h]) : 0.0f;
    }
}

// Cosines of this thread's words and regions; inverse norms of all into `inverse` [TM + TN], and into `free` 1,
// or 0 where the norm was below the floor. `staged` is [TM + TN][PITCH], aligned to 16 bytes, and free to be written when
// this returns; `inverse` and `free` may be read by all.
__device__ __forceinline__ void cosines(const scalar* x, const scalar* y, int m, int n, int hidden, float floor,
                                        float* staged, float* inverse, float* free,
                                        float (&cosine)[ROWS][COLUMNS]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float square = 0.0f;  // of row threadIdx.x of both sides together
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) cosine[r][c] = 0.0f;
    for (int begin = 0; begin < hidden; begin += CHUNK) {
        stage(x, m, TM, hidden, begin, staged);
        stage(y, n, TN, hidden, begin, staged + TM * PITCH);
        __syncthreads();
#pragma unroll 2
        for (int h = 0; h < CHUNK; h += 4) {
            float4 a[COLUMNS];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                a[c] = *reinterpret_cast<const float4*>(staged + (lane + 32 * c) * PITCH + h);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const float4 b = *reinterpret_cast<const float4*>(staged + (TM + warp + WARPS * r) * PITCH + h);
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
                    cosine[r][c] += a[c].x * b.x + a[c].y * b.y + a[c].z * b.z + a[c].w * b.w;
            }
        }
        if (threadIdx.x < TM + TN)
            for (int h = 0; h < CHUNK; ++h) {
                const float value = staged[threadIdx.x * PITCH + h];
                square += value * value;
            }
        __syncthreads();
    }
    if (threadIdx.x < TM + TN) {
        const float norm = sqrtf(square);
        inverse[threadIdx.x] = 1.0f / fmaxf(norm, floor);
        free[threadIdx.x] = norm < floor ? 0.0f : 1.0f;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) cosine[r][c] *= inverse[TM + warp + WARPS * r] * inverse[lane + 32 * c];
}
