// What a model needs besides attention; built by build.py, once for all shapes.

#include <algorithm>

#include "vectors.h"

// One token's vectors x (B, G, D) into slot `position` of a stream (B, G, S, D); strides of batch and KV head.
extern "C" void put(stored *stream, const float *x, const long *position, long B, long G, long size, long stream_batch,
                    long stream_head, long x_batch, long x_head) {
    for (long b = 0; b < B; b++)
        for (long g = 0; g < G; g++) {
            const float *p = x + b * x_batch + g * x_head;
            stored *to = stream + b * stream_batch + g * stream_head + *position * size;
            each(size, [&](auto v, long i) INLINED { store(to + i, load<decltype(v)>(p + i)); });
        }
}

// A matrix's rows, that far from each other.
template <class T> struct Rows {
    T *at;
    long step;

    T *operator[](long i) const { return at + i * step; }
};
typedef Rows<const float> In;
typedef Rows<float> Out;

// What will be read next, fetched in the order in which it lies in memory: other orders take half as long again.
struct Ahead {
    const float *at, *end;

    INLINED void fetch(long lines) {
        for (; lines > 0 && at < end; lines--, at += LINE) __builtin_prefetch(at, 0, 3);
    }
};

// Products of R rows of x with `last - first` rows of w, as many at a time as a vector has lanes; then of what rows of x
// remain. w is read from memory once, then from the caches. There are a vector's worth of columns and of rows of w
// at least; what is left of them is taken with some before it, and those count once.
// Its loops are a few percent slower if they begin in the middle of a cache line.
template <int R = NATIVE / 2>
__attribute__((aligned(64))) static void products(In x, In w, Out out, long rows, long first, long last, long K,
                                                  Ahead ahead, long passes = 0) {
    constexpr int C = NATIVE / R;
    if (!rows) return;
    if (!passes) passes = rows / R + __builtin_popcount(rows % R);
    const long whole = K / NATIVE * NATIVE, end = K - NATIVE, lines = (C + passes - 1) / passes;
    native lane;
    for (int i = 0; i < NATIVE; i++) lane[i] = i;
    for (; rows >= R; rows -= R, x.at = x[R], out.at = out[R])
        for (long next = first; next < last; next += C) {
            const long f = std::min(next, last - C);
            native a[NATIVE] = {};
            for (long k = 0; k < whole; k += NATIVE) {
                if (k % LINE == 0) ahead.fetch(lines);
                native y[C];
                UNROLL for (int c = 0; c < C; c++) y[c] = load<native>(w[f + c] + k);
                if (R > 1) UNROLL for (int c = 0; c < C; c++) y[c] = held(y[c]);
                UNROLL for (int r = 0; r < R; r++) {
                    native z = held(load<native>(x[r] + k));
                    UNROLL for (int c = 0; c < C; c++) a[r * C + c] += z * y[c];
                }
            }
            if (whole < K)
                UNROLL for (int c = 0; c < C; c++)
                    UNROLL for (int r = 0; r < R; r++) {
                        native left = load<native>(x[r] + end);
                        a[r * C + c] += (lane < (float)(whole - end) ? native{} : left) * load<native>(w[f + c] + end);
                    }
            native found = sums(a);
            UNROLL for (int i = 0; i < NATIVE; i++) out[i / C][f + i % C] = found[i];
        }
    if constexpr (R > 1)
        if (rows) products<R / 2>(x, w, out, rows, first, last, K, ahead, passes);
}

// The same with columns of w (K, F), for all of them.
template <int R = 8> static void column_products(In x, In w, Out out, long rows, long K, long F) {
    for (; rows >= R; rows -= R, x.at = x[R], out.at = out[R])
        for (long f = 0; f < F; f += NATIVE) {
            native a[R] = {};
            for (long k = 0; k < K; k++)
                UNROLL for (int r = 0; r < R; r++) a[r] += x[r][k] * load<native>(w[k] + f);
            UNROLL for (int r = 0; r < R; r++) store(out[r] + f, a[r]);
        }
    if constexpr (R > 1)
        if (rows) column_products<R / 2>(x, w, out, rows, K, F);
}

// Blocks of 16 columns, the last of up to 31: where block i ends.
static long end_of(long i, long F) { return i == F / 16 - 1 ? F : i * 16 + 16; }

// Block i of a matrix (F, K); nothing, where there is none.
static Ahead block(const float *w, long i, long K, long F) {
    return i < F / 16 ? Ahead{w + i * 16 * K, w + end_of(i, F) * K} : Ahead{};
}

// out (rows, F) = x (rows, K) w^T of w (F, K); K and F are 16 or more.
extern "C" void linear(const float *x, const float *w, float *out, long rows, long K, long F, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (K * F > 1 << 14)
    for (long i = 0; i < F / 16; i++)
        products({x, K}, {w, K}, {out, F}, rows, i * 16, end_of(i, F), K, block(w, i + 1, K, F));
}

// out (B, H, F) = x (B, H, K) w of each head's own w: (K, F), or with `transposed` (F, K); K and F are multiples of 16,
// steps those of x's sequences and heads, and of w's heads and rows.
extern "C" void head_linear(const float *x, const float *w, float *out, long B, long H, long K, long F, long x_batch,
                            long x_head, long w_head, long w_row, long transposed, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (H * K * F > 1 << 14)
    for (long h = 0; h < H; h++) {
        In rows = {x + h * x_head, x_batch}, weights = {w + h * w_head, w_row};
        Out to = {out + h * F, H * F};
        const float *next = weights.at + w_head;
        if (transposed) products(rows, weights, to, B, 0, F, K, h + 1 < H ? Ahead{next, next + F * w_row} : Ahead{});
        else column_products(rows, weights, to, B, K, F);
    }
}

// out = silu(gate) * up.
static void gated(const float *gate, const float *up, float *out, long n) {
    long i = 0;
    for (; i <= n - NATIVE; i += NATIVE) {
        native a = load<native>(gate + i), b = load<native>(up + i);
        native e = exp2_of((a < 0 ? a : -a) * 1.44269504f);
        store(out + i, a * (a < 0 ? e : e * 0 + 1) / (1 + e) * b);
    }
    for (; i < n; i++) out[i] = gate[i] * (up[i] / (1 + std::exp(-gate[i])));
}

// The same of rows (rows, 2 F) that hold gate and up; out (rows, F).
extern "C" void swiglu(const float *x, float *out, long rows, long F, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * F > 1 << 14)
    for (long i = 0; i < rows; i++) gated(x + i * 2 * F, x + i * 2 * F + F, out + i * F, F);
}

// Cross-entropy (rows) of logits (rows, V), which become its gradients: softmax, less 1 at the target. How many targets
// there are no logits for.
extern "C" long cross_entropy(float *logits, const long *target, float *nats, long rows, long V, long threads) {
    long missing = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : missing) if (rows * V > 1 << 14)
    for (long i = 0; i < rows; i++) {
        if (target[i] < 0 || target[i] >= V) {
            missing++;
            continue;
        }
        float *x = logits + i * V, top = -INFINITY;
        const float wanted = x[target[i]];
#pragma omp simd reduction(max : top)
        for (long v = 0; v < V; v++) top = std::max(top, x[v]);
        native totals = {};
        long v = 0;
        for (; v <= V - NATIVE; v += NATIVE) {
            native share = exp2_of((load<native>(x + v) - top) * 1.44269504f);
            store(x + v, share);
            totals += share;
        }
        float total = sum(totals);
        for (; v < V; v++) total += x[v] = std::exp(x[v] - top);
        nats[i] = std::log(total) + (top - wanted);
        for (long v = 0; v < V; v++) x[v] *= 1 / total;
        x[target[i]] -= 1;
    }
    return missing;
}

// The tokens (rows) at these places, from 0 to 1, of the cumulative distribution of softmax(logits / temperature), which
// are (rows, V); at temperature 0 the likeliest tokens, of equal ones the first.
extern "C" void draw(const float *logits, const float *place, long *token, long rows, long V, float temperature) {
    for (long i = 0; i < rows; i++, logits += V) {
        float top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (long v = 0; v < V; v++) top = std::max(top, logits[v]);
        if (temperature == 0) {
            token[i] = std::find(logits, logits + V - 1, top) - logits;
            continue;
        }
        auto share = [&](auto x, long v) INLINED {
            auto power = (load<decltype(x)>(logits + v) - top) * (1.44269504f / temperature);
            return power < -126 ? x : exp2_of(power);  // x is 0
        };
        double total = 0, below = 0;
        each(V, [&](auto x, long v) INLINED { total += sum(share(x, v)); });
        const double wanted = total * place[i];
        long found = -1;
        each(V, [&](auto x, long v) INLINED {
            auto shares = share(x, v);
            const double after = below + sum(shares);
            if (found < 0 && after > wanted)
                for (long j = 0; j < width<decltype(x)> && found < 0; j++)
                    if (shares[j] > 0 && (below += shares[j]) > wanted) found = v + j;
            below = after;
        });
        if (found < 0)  // rounding has put the place beyond all of them
            for (found = V - 1; found > 0 && share(Vector<1>::type{}, found)[0] == 0;) found--;
        token[i] = found;
    }
}

// x (B, H, T, D), with strides of batch, head and token, with each pair of dimensions i and i + D/2 turned; out is
// contiguous. The tables are rows of D/2, with strides of batch and token.
extern "C" void rotate(const float *x, const float *cosine, const float *sine, float *out, long B, long H, long T,
                       long half, long x_batch, long x_head, long x_token, long table_batch, long table_token,
                       long threads) {
#pragma omp parallel for num_threads(threads) if (B * H * T * half > 1 << 14)
    for (long i = 0; i < B * H; i++) {
        const long b = i / H, h = i % H;
        for (long t = 0; t < T; t++) {
            const float *p = x + b * x_batch + h * x_head + t * x_token;
            const float *c = cosine + b * table_batch + t * table_token, *s = sine + b * table_batch + t * table_token;
            float *o = out + (i * T + t) * 2 * half;
#pragma omp simd
            for (long d = 0; d < half; d++) {
                o[d] = p[d] * c[d] - p[d + half] * s[d];
                o[d + half] = p[d + half] * c[d] + p[d] * s[d];
            }
        }
    }
}

// x (rows, width) in groups of `per_group` rows that are `step` from each other; out is contiguous. Without a weight it
// is 1.
extern "C" void rms_norm(const float *x, const float *weight, float *out, long rows, long width, long per_group,
                         long group_step, long step, float eps, long threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > 1 << 14)
    for (long i = 0; i < rows; i++) {
        const float *p = x + i / per_group * group_step + i % per_group * step;
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (long j = 0; j < width; j++) square += p[j] * p[j];
        float scale = 1 / std::sqrt(square / width + eps);
        float *o = out + i * width;
        for (long j = 0; j < width; j++) o[j] = p[j] * scale;
        if (weight)
#pragma omp simd
            for (long j = 0; j < width; j++) o[j] *= weight[j];
    }
}

// out (B, H, a_size + b_size): a (B, H, a_size) and b (B, H, b_size) side by side; strides of batch and head.
extern "C" void join(const float *a, const float *b, float *out, long B, long H, long a_size, long b_size, long a_batch,
                     long a_head, long b_batch, long b_head) {
    for (long i = 0; i < B; i++)
        for (long h = 0; h < H; h++) {
            const float *x = a + i * a_batch + h * a_head, *y = b + i * b_batch + h * b_head;
            out = std::copy(y, y + b_size, std::copy(x, x + a_size, out));
        }
}

// out (count, width): rows of a table (rows, width) by their numbers; how many of those there are no rows for.
extern "C" long take(const float *table, const long *index, float *out, long count, long rows, long width) {
    long missing = 0;
    for (long i = 0; i < count; i++, out += width)
        if (index[i] < 0 || index[i] >= rows) missing++;
        else std::copy(table + index[i] * width, table + (index[i] + 1) * width, out);
    return missing;
}

extern "C" void rope(const long *position, const float *frequencies, float *cosine, float *sine, long half) {
    for (long i = 0; i < half; i++) {
        float angle = *position * frequencies[i];
        cosine[i] = std::cos(angle), sine[i] = std::sin(angle);
    }
}

extern "C" void add(const float *x, const float *y, float *out, long n) {
#pragma omp simd
    for (long i = 0; i < n; i++) out[i] = x[i] + y[i];
}

// One token of gated retention: the state (B, H, D, D) fades by `decay` (B, H) and takes in k^T v, out is q times it;
// q, k, v (B, H, D) have no gaps within a sequence, out has none. A token's own q k is summed in double precision, as in
// ops.self_score.
extern "C" void retention(const float *q, const float *k, const float *v, const float *decay, stored *state, float *out,
                          long B, long H, long size, long q_batch, long k_batch, long v_batch, long threads) {
#pragma omp parallel for num_threads(threads) if (B * H * size * size > 1 << 14)
    for (long i = 0; i < B * H; i++) {
        const long b = i / H, h = i % H * size;
        const float *qi = q + b * q_batch + h, *ki = k + b * k_batch + h, *vi = v + b * v_batch + h, fade = decay[i];
        stored *s = state + i * size * size;
        float *o = out + i * size;
        double own = 0;
        for (long d = 0; d < size; d++) own += (double)(qi[d] * ki[d]);
        for (long e = 0; e < size; e++) o[e] = (float)own * vi[e];
        for (long d = 0; d < size; d++, s += size)
            each(size, [&](auto x, long e) INLINED {
                typedef decltype(x) T;
                T faded = fade * load<T>(s + e);
                store(o + e, load<T>(o + e) + qi[d] * faded);
                store(s + e, faded + ki[d] * load<T>(vi + e));
            });
    }
}

// Reads n floats, a multiple of 2 * 65536, in two places at a time and fetched ahead: what the memory can give.
extern "C" float read_all(const float *x, long n, long threads) {
    float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(dynamic)
    for (long i = 0; i < n / 2; i += 65536) {
        native a[2][LINE / NATIVE] = {};
        for (const float *y = x + i, *z = y + n / 2, *end = y + 65536; y < end; y += LINE, z += LINE) {
            __builtin_prefetch(y + 1024, 0, 2);
            __builtin_prefetch(z + 1024, 0, 2);
            UNROLL for (int j = 0; j < LINE / NATIVE; j++)
                a[0][j] += load<native>(y + j * NATIVE), a[1][j] += load<native>(z + j * NATIVE);
        }
        UNROLL for (int j = 0; j < LINE / NATIVE; j++) total += sum(a[0][j] + a[1][j]);
    }
    return total;
}
