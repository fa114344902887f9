// A GPU's block on a CPU, one after the other: enough of CUDA to run the project's device sources where there is no GPU.
//
// Every thread of a block is a fiber. At a barrier or an exchange between lanes a fiber lets the next one run; lanes of a
// warp pass the same exchanges, so one round later all of them have written what they give. Reading another lane's value
// uses two slots in turn, because some lanes are already one exchange ahead.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Index {
    unsigned x, y, z;
};
struct float4 {
    float x, y, z, w;
};

namespace emulated {
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool finished = false;
    unsigned exchanges = 0;
};
static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static unsigned current, arrived, generation;
static uint32_t slots[2][1024];
static const std::function<void()>* body;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }
static void enter() {
    (*body)();
    fibers[current].finished = true;
    yield();
}

inline void run_block(unsigned threads, const std::function<void()>& kernel) {
    body = &kernel;
    arrived = generation = 0;
    fibers.resize(threads);
    for (auto& fiber : fibers) {
        fiber.finished = false;
        fiber.exchanges = 0;
        fiber.stack.resize(256 << 10);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (unsigned left = threads; left > 0;) {
        left = 0;
        for (current = 0; current < threads; ++current)
            if (!fibers[current].finished) {
                swapcontext(&scheduler, &fibers[current].context);
                left += !fibers[current].finished;
            }
    }
    if (arrived != 0) {
        std::fprintf(stderr, "emulated CUDA: %u threads wait at a barrier that the others never reach\n", arrived);
        std::abort();
    }
}

template <typename T> inline T exchange(T value, unsigned lane) {
    static_assert(sizeof(T) == 4, "32-bit values");
    const unsigned me = current, turn = fibers[me].exchanges++ & 1;
    std::memcpy(&slots[turn][me], &value, 4);
    yield();
    T found;
    std::memcpy(&found, &slots[turn][me / 32 * 32 + lane % 32], 4);
    return found;
}
}  // namespace emulated

struct ThreadIndex {
    struct X {
        operator unsigned() const { return emulated::current; }
    } x;
};
static const ThreadIndex threadIdx{};
static Index blockIdx{};

inline void __syncthreads() {
    const unsigned mine = emulated::generation;
    if (++emulated::arrived == emulated::fibers.size()) {
        emulated::arrived = 0;
        ++emulated::generation;
    }
    while (emulated::generation == mine) emulated::yield();
}
template <typename T> inline T __shfl_xor_sync(unsigned, T value, int distance) {
    return emulated::exchange(value, (emulated::current % 32) ^ distance);
}
template <typename T> inline T __shfl_sync(unsigned, T value, int lane) { return emulated::exchange(value, lane); }
inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline int __float_as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float half_to_float(unsigned short bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return x;
}
inline unsigned short float_to_half(float x) {
    const _Float16 half = static_cast<_Float16>(x);
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
using std::min;

// run_grid(blocks, threads, call): every block of a grid, in turn.
inline void run_grid(Index grid, unsigned threads, const std::function<void()>& kernel) {
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                emulated::run_block(threads, kernel);
            }
}
