// IPOT between words and regions on a CPU: ragged, multi-threaded, forward and backward. See reference.py for the
// algorithm and its names. Plain C++17 with GCC's vector extensions and a C interface, so that it compiles in seconds
// wherever there is a compiler, without PyTorch's headers.
//
// Lanes of a vector are regions: sums over words need no reduction inside a vector. One example is one task; what a
// task writes depends on its own valid words and regions alone, so results are equal for any number of threads and any
// amount of padding.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#ifndef VECTOR_BYTES
#ifdef __AVX512F__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif
#endif

namespace {

template <typename T> struct Lanes;
template <> struct Lanes<float> {
    typedef float V __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Lanes<double> {
    typedef double V __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
};
template <typename T> using Vec = typename Lanes<T>::V;
template <typename T> constexpr int64_t width = VECTOR_BYTES / sizeof(T);

template <typename T> inline Vec<T> load(const T* from) {
    Vec<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <typename T> inline void store(T* to, Vec<T> v) { std::memcpy(to, &v, sizeof v); }
template <typename T> inline Vec<T> splat(T x) { return x - Vec<T>{}; }
template <typename T> inline Vec<T> larger(Vec<T> a, Vec<T> b) { return a > b ? a : b; }
template <typename T> inline T sum(Vec<T> v) {
    T parts[width<T>];
    store<T>(parts, v);
    for (int64_t step = width<T> / 2; step > 0; step /= 2)
        for (int64_t i = 0; i < step; ++i) parts[i] += parts[i + step];
    return parts[0];
}
template <typename T> inline T largest(Vec<T> v) {
    T best = v[0];
    for (int64_t i = 1; i < width<T>; ++i) best = std::max(best, v[i]);
    return best;
}

// exp of x <= 0; what is below the smallest normal number becomes 0. Relative error 2e-7 (Cephes' polynomial).
inline Vec<float> exponential(Vec<float> x) {
    using I = Lanes<float>::I;
    const Vec<float> lowest = splat<float>(-87.0f);
    const I faded = x < lowest;
    x = faded ? lowest : x;
    const Vec<float> magic = splat<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec<float> shifted = x * 1.44269504088896341f + magic;
    const Vec<float> whole = shifted - magic;
    Vec<float> r = x - whole * 0.693359375f;
    r = r - whole * -2.12194440e-4f;
    Vec<float> p = splat<float>(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    I bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;  // the low bits of `shifted` hold the integer
    Vec<float> scale;
    std::memcpy(&scale, &bits, sizeof scale);
    p = p * scale;
    return faded ? Vec<float>{} : p;
}
inline Vec<double> exponential(Vec<double> x) {
    for (int64_t i = 0; i < width<double>; ++i) x[i] = x[i] < -700 ? 0 : std::exp(x[i]);
    return x;
}

// out[i][j] = x_i . y_j for I rows of x and J rows of y, both [.., hidden].
template <typename T, int I, int J>
void dot_tile(const T* x, const T* y, int64_t hidden, T* out, int64_t stride) {
    Vec<T> acc[I][J] = {};
    int64_t h = 0;
    for (; h + width<T> <= hidden; h += width<T>) {
        Vec<T> b[J];
        for (int j = 0; j < J; ++j) b[j] = load(y + j * hidden + h);
        for (int i = 0; i < I; ++i) {
            const Vec<T> a = load(x + i * hidden + h);
            for (int j = 0; j < J; ++j) acc[i][j] += a * b[j];
        }
    }
    for (int i = 0; i < I; ++i)
        for (int j = 0; j < J; ++j) {
            T total = sum<T>(acc[i][j]);
            for (int64_t rest = h; rest < hidden; ++rest) total += x[i * hidden + rest] * y[j * hidden + rest];
            out[i * stride + j] = total;
        }
}

template <typename T, int I> void dot_row(const T* x, const T* y, int64_t n, int64_t hidden, T* out, int64_t stride) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) dot_tile<T, I, 4>(x, y + j * hidden, hidden, out + j, stride);
    for (; j < n; ++j) dot_tile<T, I, 1>(x, y + j * hidden, hidden, out + j, stride);
}

template <typename T>
void all_dots(const T* x, const T* y, int64_t m, int64_t n, int64_t hidden, T* out, int64_t stride) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) dot_row<T, 4>(x + i * hidden, y, n, hidden, out + i * stride, stride);
    for (; i < m; ++i) dot_row<T, 1>(x + i * hidden, y, n, hidden, out + i * stride, stride);
}

// out_i = sum_j weight[i * step_i + j * step_j] y_j + own_i x_i, I rows of x and out at a time.
template <typename T, int I, int C>
inline void mix_chunk(const T* weight, int64_t step_i, int64_t step_j, const T* y, int64_t n, const T* x, const T* own,
                      T* out, int64_t hidden, int64_t h) {
    Vec<T> acc[I][C];
    for (int i = 0; i < I; ++i)
        for (int c = 0; c < C; ++c) acc[i][c] = load(x + i * hidden + h + c * width<T>) * own[i];
    for (int64_t j = 0; j < n; ++j) {
        Vec<T> b[C];
        for (int c = 0; c < C; ++c) b[c] = load(y + j * hidden + h + c * width<T>);
        for (int i = 0; i < I; ++i) {
            const T w = weight[i * step_i + j * step_j];
            for (int c = 0; c < C; ++c) acc[i][c] += b[c] * w;
        }
    }
    for (int i = 0; i < I; ++i)
        for (int c = 0; c < C; ++c) store<T>(out + i * hidden + h + c * width<T>, acc[i][c]);
}

template <typename T, int I>
void mix_rows(const T* weight, int64_t step_i, int64_t step_j, const T* y, int64_t n, const T* x, const T* own, T* out,
              int64_t hidden) {
    int64_t h = 0;
    for (; h + 4 * width<T> <= hidden; h += 4 * width<T>)
        mix_chunk<T, I, 4>(weight, step_i, step_j, y, n, x, own, out, hidden, h);
    for (; h + width<T> <= hidden; h += width<T>)
        mix_chunk<T, I, 1>(weight, step_i, step_j, y, n, x, own, out, hidden, h);
    for (; h < hidden; ++h)
        for (int i = 0; i < I; ++i) {
            T total = own[i] * x[i * hidden + h];
            for (int64_t j = 0; j < n; ++j) total += weight[i * step_i + j * step_j] * y[j * hidden + h];
            out[i * hidden + h] = total;
        }
}

template <typename T>
void mix(const T* weight, int64_t step_i, int64_t step_j, const T* y, int64_t n, const T* x, int64_t m, const T* own,
         T* out, int64_t hidden) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4)
        mix_rows<T, 4>(weight + i * step_i, step_i, step_j, y, n, x + i * hidden, own + i, out + i * hidden, hidden);
    for (; i < m; ++i)
        mix_rows<T, 1>(weight + i * step_i, step_i, step_j, y, n, x + i * hidden, own + i, out + i * hidden, hidden);
}

// What a thread works in; grows to its largest example and is used again.
template <typename T> class Scratch {
  public:
    T* take(int64_t count) {
        const int64_t begin = used_;
        used_ += (count + width<T> - 1) / width<T> * width<T>;
        return data_.data() + begin;
    }
    void reset(int64_t capacity) {
        if (static_cast<int64_t>(data_.size()) < capacity) data_.resize(capacity);
        used_ = 0;
    }

  private:
    std::vector<T> data_;
    int64_t used_ = 0;
};

// Word i's row of n regions begins at i * row, and row is a multiple of the vector's width.
template <typename T> struct Problem {
    int64_t m, n, row;
    int iterations, inner;
    const T* logits;  // (min over words - cost) / beta <= 0; very negative in lanes without a region
    T* plan;          // [m][row]
};

template <typename T> constexpr T nothing = static_cast<T>(-1e30);

template <typename T> void plan_form(const Problem<T>& p, Scratch<T>& scratch) {
    using V = Vec<T>;
    constexpr int64_t W = width<T>;
    const T smallest = 1000 * std::numeric_limits<T>::min();  // below: subnormal numbers soon, and those are slow
    const int64_t size = p.m * p.row;
    T* kernel = scratch.take(size);
    T* delta = scratch.take(p.row);
    T* sigma = scratch.take(p.m);
    T* column = scratch.take(p.m * W);
    T* real = scratch.take(p.row);  // n in a region's lane, infinity elsewhere: 1 / (real * x) is 0 there
    for (int64_t k = 0; k < size; k += W) {
        store<T>(kernel + k, exponential(load(p.logits + k)));
        store<T>(p.plan + k, splat<T>(1));
    }
    for (int64_t j = 0; j < p.row; ++j) real[j] = static_cast<T>(p.n);
    std::fill(delta, delta + p.row, static_cast<T>(1));
    std::fill(sigma, sigma + p.m, 1 / static_cast<T>(p.m));
    const T words = static_cast<T>(p.m);
    for (int t = 0; t < p.iterations; ++t) {
        for (int r = 0; r < p.inner; ++r) {
            std::fill(column, column + p.m * W, static_cast<T>(0));
            for (int64_t v = 0; v < p.row; v += W) {
                V total = {};
                if (r == 0) {  // the plan of the last iteration is diag(delta) q diag(sigma), which was not yet written
                    const V before = load(delta + v);
                    for (int64_t i = 0; i < p.m; ++i) {
                        T* place = p.plan + i * p.row + v;
                        const T scale = t == 0 ? static_cast<T>(1) : sigma[i];
                        V q = (load(place) * before * scale) * load(kernel + i * p.row + v);  // in this order: else underflow
                        q = q > smallest ? q : V{};
                        store<T>(place, q);
                        total += q * sigma[i];
                    }
                } else {
                    for (int64_t i = 0; i < p.m; ++i) total += load(p.plan + i * p.row + v) * sigma[i];
                }
                V inverse = splat<T>(1) / (total * load(real + v));
                inverse = total > 0 ? inverse : V{};  // lanes without a region
                store<T>(delta + v, inverse);
                for (int64_t i = 0; i < p.m; ++i) {
                    T* place = column + i * W;
                    store<T>(place, load(place) + load(p.plan + i * p.row + v) * inverse);
                }
            }
            for (int64_t i = 0; i < p.m; ++i) sigma[i] = 1 / (words * sum<T>(load(column + i * W)));
        }
    }
    for (int64_t i = 0; i < p.m; ++i)
        for (int64_t v = 0; v < p.row; v += W) {
            T* place = p.plan + i * p.row + v;
            store<T>(place, load(place) * load(delta + v) * sigma[i]);
        }
}

template <typename T> void log_form(const Problem<T>& p, Scratch<T>& scratch) {
    using V = Vec<T>;
    constexpr int64_t W = width<T>;
    T* word = scratch.take(p.m);    // potentials of the words
    T* sigma = scratch.take(p.m);   // log of what is carried over
    T* ahead = scratch.take(p.m);
    T* region = scratch.take(p.row);
    const T log_m = std::log(static_cast<T>(p.m)), log_n = std::log(static_cast<T>(p.n));
    std::fill(word, word + p.m, static_cast<T>(0));
    std::fill(sigma, sigma + p.m, -log_m);
    for (int t = 1; t <= p.iterations; ++t) {
        const T step = static_cast<T>(t);
        for (int64_t i = 0; i < p.m; ++i) ahead[i] = word[i] + sigma[i];
        for (int r = 0; r < p.inner; ++r) {
            for (int64_t v = 0; v < p.row; v += W) {
                V best = splat<T>(-std::numeric_limits<T>::infinity());
                for (int64_t i = 0; i < p.m; ++i) best = larger<T>(best, load(p.logits + i * p.row + v) * step + ahead[i]);
                V total = {};
                for (int64_t i = 0; i < p.m; ++i)
                    total += exponential(load(p.logits + i * p.row + v) * step + ahead[i] - best);
                for (int64_t l = 0; l < W; ++l) region[v + l] = -log_n - (best[l] + std::log(total[l]));
            }
            for (int64_t j = p.n; j < p.row; ++j) region[j] = 0;
            for (int64_t i = 0; i < p.m; ++i) {
                const T* row = p.logits + i * p.row;
                V best = splat<T>(-std::numeric_limits<T>::infinity());
                for (int64_t v = 0; v < p.row; v += W) best = larger<T>(best, load(row + v) * step + load(region + v));
                const T top = largest<T>(best);
                V total = {};
                for (int64_t v = 0; v < p.row; v += W) total += exponential(load(row + v) * step + load(region + v) - top);
                ahead[i] = -log_m - (top + std::log(sum<T>(total)));
            }
        }
        for (int64_t i = 0; i < p.m; ++i) {
            sigma[i] = ahead[i] - word[i];
            word[i] = ahead[i];
        }
    }
    const T step = static_cast<T>(p.iterations);
    for (int64_t i = 0; i < p.m; ++i) {
        T* out = p.plan + i * p.row;
        V mass = {};
        for (int64_t v = 0; v < p.row; v += W) {
            const V exponent = load(p.logits + i * p.row + v) * step + load(region + v) + word[i];
            // The word's marginal is exact, so no entry of the plan is above 1/m: the exponent is not above 0.
            const V found = exponential(exponent < 0 ? exponent : V{});
            store<T>(out + v, found);
            mass += found;
        }
        // Potentials grow with the iterations, and their rounding with them: restore the marginal.
        const T scale = 1 / (static_cast<T>(p.m) * sum<T>(mass));
        for (int64_t v = 0; v < p.row; v += W) store<T>(out + v, load(out + v) * scale);
    }
}

template <typename T> int64_t scratch_size(int64_t m, int64_t n) {
    const int64_t row = n + width<T>;
    return 5 * (m + 1) * row + 3 * row + 8 * (m + width<T>) + m * width<T> + 16 * width<T>;
}

template <typename T> void inverse_norms(const T* x, int64_t count, int64_t hidden, T floor, T* inverse, T* clamped) {
    for (int64_t i = 0; i < count; ++i) {
        T square;
        dot_tile<T, 1, 1>(x + i * hidden, x + i * hidden, hidden, &square, 1);
        const T norm = std::sqrt(square);
        clamped[i] = norm < floor ? static_cast<T>(1) : static_cast<T>(0);
        inverse[i] = 1 / std::max(norm, floor);
    }
}

// Cost [m][row] -> logits [m][row], shifted so that each region's least is 0; returns max - min of the cost.
template <typename T> T make_logits(const T* cost, int64_t m, int64_t n, int64_t row, T beta, T* logits) {
    T low = std::numeric_limits<T>::infinity(), high = -low;
    for (int64_t j = 0; j < n; ++j) {
        T least = cost[j];
        for (int64_t i = 0; i < m; ++i) {
            least = std::min(least, cost[i * row + j]);
            high = std::max(high, cost[i * row + j]);
        }
        low = std::min(low, least);
        for (int64_t i = 0; i < m; ++i) logits[i * row + j] = (least - cost[i * row + j]) / beta;
    }
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = n; j < row; ++j) logits[i * row + j] = nothing<T>;
    return high - low;
}

template <typename T> void solve(const T* cost, int64_t m, int64_t n, int64_t row, T beta, int iterations, int inner,
                                 T* plan, Scratch<T>& scratch) {
    T* logits = scratch.take(m * row);
    const T range = make_logits(cost, m, n, row, beta, logits);
    const Problem<T> problem{m, n, row, iterations, inner, logits, plan};
    // The plan form cuts what is below 1e-35 (1e-305), e^-80 (e^-700): so far below a word's largest entry nothing counts.
    const T limit = std::is_same<T, double>::value ? 600 : 60;  // PLAN_FORM_LIMITS of numerics.py
    if (range / beta + std::log(static_cast<T>(m) * static_cast<T>(n)) < limit)
        plan_form(problem, scratch);
    else
        log_form(problem, scratch);
}

template <typename T> int64_t padded_row(int64_t n) { return (n + width<T> - 1) / width<T> * width<T>; }

// Runs task(example, scratch) for all examples on `threads` threads. Returns 0, or 1 if memory ran out.
template <typename T, typename Task> int each(int64_t examples, int threads, int64_t scratch, Task task) {
    std::atomic<int64_t> next{0};
    std::atomic<int> failed{0};
    auto work = [&] {
        try {
            Scratch<T> own;
            for (int64_t b; (b = next.fetch_add(1)) < examples;) {
                own.reset(scratch);
                task(b, own);
            }
        } catch (const std::bad_alloc&) {
            failed = 1;
        }
    };
    const int count = static_cast<int>(std::min<int64_t>(threads, examples));
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < count; ++i) others.emplace_back(work);
    } catch (const std::exception&) {  // no further threads to be had: those that started do it
    }
    work();
    for (auto& thread : others) thread.join();
    return failed;
}

// What the forward pass keeps for the backward pass, all per packed word or region.
template <typename T> struct Kept {
    T *inverse_word, *inverse_region;  // 1 / norm
    T *share_word, *share_region;      // sum of plan * cosine, 0 where the norm was clamped
};

template <typename T>
int forward(const T* words, const T* regions, const int64_t* cu_words, const int64_t* cu_regions, int64_t examples,
            int64_t hidden, T beta, int iterations, int inner, T floor, int threads, int64_t wide, int64_t tall, T* plan,
            T* distance, Kept<T> kept) {
    const int64_t capacity = scratch_size<T>(wide, tall);
    return each<T>(examples, threads, capacity, [&](int64_t b, Scratch<T>& scratch) {
        const int64_t first_word = cu_words[b], first_region = cu_regions[b];
        const int64_t m = cu_words[b + 1] - first_word, n = cu_regions[b + 1] - first_region;
        T* out = plan + b * tall * wide;
        std::fill(out, out + tall * wide, static_cast<T>(0));
        distance[b] = 0;
        const T *x = words + first_word * hidden, *y = regions + first_region * hidden;
        T *clamped_x = scratch.take(m), *clamped_y = scratch.take(n);
        T *inverse_x = kept.inverse_word + first_word, *inverse_y = kept.inverse_region + first_region;
        T *share_x = kept.share_word + first_word, *share_y = kept.share_region + first_region;
        inverse_norms(x, m, hidden, floor, inverse_x, clamped_x);
        inverse_norms(y, n, hidden, floor, inverse_y, clamped_y);
        std::fill(share_x, share_x + m, static_cast<T>(0));
        std::fill(share_y, share_y + n, static_cast<T>(0));
        if (m == 0 || n == 0) return;
        const int64_t row = padded_row<T>(n);
        T *cost = scratch.take(m * row), *found = scratch.take(m * row);
        all_dots(x, y, m, n, hidden, cost, row);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) cost[i * row + j] = 1 - cost[i * row + j] * inverse_x[i] * inverse_y[j];
        solve(cost, m, n, row, beta, iterations, inner, found, scratch);
        double total = 0;
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) {
                const T share = found[i * row + j], part = share * (1 - cost[i * row + j]);
                total += static_cast<double>(share) * cost[i * row + j];
                share_x[i] += part;
                share_y[j] += part;
                out[j * wide + i] = share;
            }
        distance[b] = static_cast<T>(total);
        for (int64_t i = 0; i < m; ++i) share_x[i] *= 1 - clamped_x[i];
        for (int64_t j = 0; j < n; ++j) share_y[j] *= 1 - clamped_y[j];
    });
}

template <typename T>
int backward(const T* words, const T* regions, const int64_t* cu_words, const int64_t* cu_regions, int64_t examples,
             int64_t hidden, int threads, int64_t wide, int64_t tall, const T* plan, const T* gradient, Kept<const T> kept,
             T* grad_words, T* grad_regions) {
    return each<T>(examples, threads, scratch_size<T>(wide, tall), [&](int64_t b, Scratch<T>& scratch) {
        const int64_t first_word = cu_words[b], first_region = cu_regions[b];
        const int64_t m = cu_words[b + 1] - first_word, n = cu_regions[b + 1] - first_region;
        const T *inverse_x = kept.inverse_word + first_word, *inverse_y = kept.inverse_region + first_region;
        const T *x = words + first_word * hidden, *y = regions + first_region * hidden;
        T *weight = scratch.take(m * n), *own_x = scratch.take(m), *own_y = scratch.take(n);
        const T g = gradient[b];
        for (int64_t i = 0; i < m; ++i) own_x[i] = g * kept.share_word[first_word + i] * inverse_x[i] * inverse_x[i];
        for (int64_t j = 0; j < n; ++j) own_y[j] = g * kept.share_region[first_region + j] * inverse_y[j] * inverse_y[j];
        const T* found = plan + b * tall * wide;
        for (int64_t j = 0; j < n; ++j)
            for (int64_t i = 0; i < m; ++i) weight[i * n + j] = -g * found[j * wide + i] * inverse_x[i] * inverse_y[j];
        mix(weight, n, int64_t{1}, y, n, x, m, own_x, grad_words + first_word * hidden, hidden);
        mix(weight, int64_t{1}, n, x, m, y, n, own_y, grad_regions + first_region * hidden, hidden);
    });
}

template <typename T>
int plans(const T* cost, const int64_t* word_lengths, const int64_t* region_counts, int64_t examples, int64_t wide,
          int64_t tall, T beta, int iterations, int inner, int threads, T* plan) {
    return each<T>(examples, threads, scratch_size<T>(wide, tall), [&](int64_t b, Scratch<T>& scratch) {
        const int64_t m = word_lengths[b], n = region_counts[b], row = padded_row<T>(n);
        T* out = plan + b * tall * wide;
        std::fill(out, out + tall * wide, static_cast<T>(0));
        if (m == 0 || n == 0) return;
        T *own = scratch.take(m * row), *found = scratch.take(m * row);
        for (int64_t i = 0; i < m; ++i) std::copy_n(cost + (b * wide + i) * tall, n, own + i * row);
        solve(own, m, n, row, beta, iterations, inner, found, scratch);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) out[j * wide + i] = found[i * row + j];
    });
}

}  // namespace

#define INTERFACE(T, NAME)                                                                                             \
    extern "C" int vlscale_ipot_forward_##NAME(                                                                        \
        const T* words, const T* regions, const int64_t* cu_words, const int64_t* cu_regions, int64_t examples,        \
        int64_t hidden, double beta, int iterations, int inner, double floor, int threads, int64_t wide, int64_t tall, \
        T* plan, T* distance, T* inverse_word, T* inverse_region, T* share_word, T* share_region) {                    \
        return forward<T>(words, regions, cu_words, cu_regions, examples, hidden, static_cast<T>(beta), iterations,    \
                          inner, static_cast<T>(floor), threads, wide, tall, plan, distance,                           \
                          Kept<T>{inverse_word, inverse_region, share_word, share_region});                            \
    }                                                                                                                  \
    extern "C" int vlscale_ipot_backward_##NAME(                                                                       \
        const T* words, const T* regions, const int64_t* cu_words, const int64_t* cu_regions, int64_t examples,        \
        int64_t hidden, int threads, int64_t wide, int64_t tall, const T* plan, const T* gradient,                     \
        const T* inverse_word, const T* inverse_region, const T* share_word, const T* share_region, T* grad_words,     \
        T* grad_regions) {                                                                                             \
        return backward<T>(words, regions, cu_words, cu_regions, examples, hidden, threads, wide, tall, plan,          \
                           gradient, Kept<const T>{inverse_word, inverse_region, share_word, share_region},            \
                           grad_words, grad_regions);                                                                  \
    }                                                                                                                  \
    extern "C" int vlscale_ipot_plans_##NAME(const T* cost, const int64_t* word_lengths, const int64_t* region_counts, \
                                             int64_t examples, int64_t wide, int64_t tall, double beta,                \
                                             int iterations, int inner, int threads, T* plan) {                        \
        return plans<T>(cost, word_lengths, region_counts, examples, wide, tall, static_cast<T>(beta), iterations,     \
                        inner, threads, plan);                                                                         \
    }

INTERFACE(float, float)
INTERFACE(double, double)
