// A GPU's block on a CPU, one after the other: enough of CUDA to run the project's device sources where there is no GPU.
//
// Every thread of a block is a fiber. At a barrier or an exchange between lanes a fiber lets the next one run; lanes of a
// warp pass the same exchanges, so one round later all of them have written what they give. Reading another lane's value
// uses two slots in turn, because some lanes are already one exchange ahead.
//
// A warp runs until all its lanes wait at a barrier, so warps are as far apart as barriers let them be, and a block can be
// run in both orders, first warp and lane first or last: a value read before it is written, or after it is overwritten,
// for want of a barrier then differs between the orders.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __shared__ __attribute__((section("shared"))) static
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))

extern char __start_shared[] __attribute__((weak)), __stop_shared[] __attribute__((weak));  // from the linker

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
    bool waiting = false;
    unsigned barrier = 0;  // the one that it waits at
    unsigned exchanges = 0;
};
static ucontext_t scheduler;
static std::vector<Fiber> fibers;
static unsigned current, arrived, generation;
static bool reversed;
static uint32_t slots[2][1024];
static const std::function<void()>* body;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }
static void enter() {
    (*body)();
    fibers[current].finished = true;
    yield();
}

// Runs one warp, counted from either end, as far as it gets; false if it was at its end or at a barrier already.
inline bool run_warp(unsigned threads, unsigned which) {
    const unsigned warp = reversed ? (threads + 31) / 32 - 1 - which : which;
    const unsigned lanes = std::min(32u, threads - 32 * warp);
    bool moved = false;
    for (bool running = true; running;) {
        running = false;
        for (unsigned l = 0; l < lanes; ++l) {
            current = 32 * warp + (reversed ? lanes - 1 - l : l);
            const Fiber& fiber = fibers[current];
            if (fiber.finished || (fiber.waiting && fiber.barrier == generation)) continue;
            swapcontext(&scheduler, &fibers[current].context);
            running = true;
        }
        moved |= running;
    }
    return moved;
}

inline void run_block(unsigned threads, const std::function<void()>& kernel) {
    body = &kernel;
    std::memset(__start_shared, 0xff, __stop_shared - __start_shared);  // NaN: what a block has not written it cannot use
    arrived = generation = 0;
    fibers.resize(threads);
    for (auto& fiber : fibers) {
        fiber.finished = fiber.waiting = false;
        fiber.exchanges = 0;
        fiber.stack.resize(256 << 10);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (unsigned w = 0; w < (threads + 31) / 32; ++w) moved |= run_warp(threads, w);
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
    auto& fiber = emulated::fibers[emulated::current];
    fiber.barrier = emulated::generation;
    if (++emulated::arrived == emulated::fibers.size()) {
        emulated::arrived = 0;
        ++emulated::generation;
    }
    fiber.waiting = true;
    while (emulated::generation == fiber.barrier) emulated::yield();
    fiber.waiting = false;
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

// A kernel's arguments, given as cuLaunchKernel takes them: one pointer to each.
template <class... P> constexpr int parameters(void (*)(P...)) { return sizeof...(P); }
template <class... P, size_t... I>
inline void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(arguments[I])...);
}

// Every block of a grid, in turn.
template <class... P>
inline void run_grid(void (*kernel)(P...), Index grid, unsigned threads, bool reversed, void** arguments) {
    emulated::reversed = reversed;
    const std::function<void()> body = [=] { call(kernel, arguments, std::index_sequence_for<P...>{}); };
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                emulated::run_block(threads, body);
            }
}
