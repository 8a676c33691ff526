// Attention of one new token over a static cache on a CPU, each cached byte read once; built by cpu_kernel.py.
//
// The queries of a KV head go through the cache together, a tile of N tokens at a time, with a running softmax
// (Milakov and Gimelshein 2018, arXiv 1805.02867); of few long sequences each is split among threads (Flash-Decoding,
// Dao et al. 2023). Memory sets the pace only if it is never waited for: while one tile is computed with, the next but
// one is fetched, some lines at each step of the inner loops.
//
// Constants of a build: M queries a KV head, D key size, E value size; a multiple of four each but M.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
constexpr int NATIVE = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int NATIVE = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int NATIVE = 4, REGISTERS = 32;
#else
constexpr int NATIVE = 4, REGISTERS = 16;
#endif

constexpr int lanes(int native) { return D % native || E % native ? lanes(native / 2) : native; }
constexpr int divisor(int n, int most) { return n % most ? divisor(n, most - 1) : most; }

constexpr int L = lanes(NATIVE);                 // numbers in a vector
constexpr int N = 64;                            // tokens in a tile
constexpr int AHEAD = 2 * N;                     // tokens between what is fetched and what is computed with
constexpr int DS = divisor(D / L, 4) * L;        // columns of a tile of keys transposed at a time, to stay in the first cache
constexpr int MS = divisor(M, REGISTERS / 4);    // queries x 2 vectors of tokens: the scores kept in registers
constexpr int MV = divisor(M, REGISTERS / 8);    // queries x EV vectors of values: the outputs kept in registers
constexpr int EV = divisor(E / L, 4);
constexpr int LINE = 16;                         // floats in a cache line
constexpr bool SHARED = D != E;                  // the values are the first columns of the keys

// About the cycles that a tile takes: turning L x L keys, a step of the scores' loop, one of the values', all of them;
// and the lines to be fetched in some of them.
constexpr int TURN = 4 * L + 11, SCORE = MS, VALUE = std::max(1, MV * EV / 2);
constexpr int CYCLES = N * D / (L * L) * TURN + M * N * (D + E) / (2 * L);
constexpr int lines(int cycles) { return (cycles * N * (SHARED ? D : D + E) / LINE + CYCLES - 1) / CYCLES; }

typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t veci __attribute__((vector_size(4 * L)));
typedef float loose __attribute__((vector_size(4 * L), aligned(4)));
using Lanes = std::make_integer_sequence<int, L>;
#define UNROLL _Pragma("GCC unroll 32")
#define INLINED __attribute__((always_inline))
#define INLINE static inline INLINED

INLINE vec load(const float *x) { return *(const loose *)x; }
INLINE void store(float *x, vec a) { *(loose *)x = a; }
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }

// The lines of a tile to come, its keys' and then its values', fetched some at a time while another is computed with.
struct Ahead {
    const float *at, *end, *values, *values_end;

    INLINED void fetch(int lines) {
        UNROLL for (int i = 0; i < lines; i++) {
            __builtin_prefetch(at, 0, 2);
            at += LINE;
            if (at >= end) at = values, end = values_end;
        }
    }
};

template <int... I> INLINE vec pick(vec a, vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, veci{I...});
#endif
}

// Lane i of the result is lane i ^ W.
template <int W, int... I> INLINE vec cross(vec a, std::integer_sequence<int, I...>) {
    return pick(a, a, std::integer_sequence<int, (I ^ W)...>());
}

template <int W = L / 2> INLINE float sum(vec a) {
    a += cross<W>(a, Lanes());
    if constexpr (W > 1) return sum<W / 2>(a);
    else return a[0];
}

template <int W = L / 2> INLINE float maximum(vec a) {
    a = larger(a, cross<W>(a, Lanes()));
    if constexpr (W > 1) return maximum<W / 2>(a);
    else return a[0];
}

// Of two rows of a matrix: columns whose bit W is OF, the other row's in the places whose bit W is set.
template <int W, int OF, int... I> INLINE vec zip(vec a, vec b, std::integer_sequence<int, I...>) {
    return pick(a, b, std::integer_sequence<int, (I & ~W) + OF + (I & W ? L : 0)...>());
}

// Transposes L vectors, bit by bit of the row and column numbers.
template <int W = 1> INLINE void transpose(vec *rows) {
    UNROLL for (int i = 0; i < L; i++) if (!(i & W)) {
        vec a = rows[i], b = rows[i + W];
        rows[i] = zip<W, 0>(a, b, Lanes());
        rows[i + W] = zip<W, W>(a, b, Lanes());
    }
    if constexpr (2 * W < L) transpose<2 * W>(rows);
}

// 2^x of x <= 0: a polynomial for the fraction, |r| <= 1/2 (minimax, 2e-7), and the whole part into the exponent.
INLINE vec exp2_of(vec x) {
    x = larger(x, vec{} - 126);
    veci whole = __builtin_convertvector(x - 0.5f, veci);
    vec r = x - __builtin_convertvector(whole, vec);
    vec y = r * 1.327647174e-3f + 9.675541540e-3f;
    y = y * r + 5.550713276e-2f;
    y = y * r + 2.402211972e-1f;
    y = y * r + 6.931469671e-1f;
    y = y * r + 1.000000072f;
    return (vec)((veci)y + (whole << 23));
}

// What M queries have seen so far: largest score, sum of the weights 2^(score - top) by lane, weighted sum of values.
struct Running {
    float top[M];
    vec sums[M] = {};
    float *out;
};

// scores[m][n] of a tile's `live` tokens; what follows them is undefined.
INLINE void score(const float *q, const float *k, long stride, int live, Ahead &ahead, float (*scores)[N]) {
    if constexpr (M == 1) {
        for (int n = 0; n < live; n++) {
            vec a = {};
            ahead.fetch(D / LINE);
            UNROLL for (int d = 0; d < D; d += L) a += load(k + n * stride + d) * load(q + d);
            scores[0][n] = sum(a);
        }
        return;
    }
    alignas(64) float turned[DS][N];
    for (int d = 0; d < D; d += DS) {
        for (int n = 0; n < live; n += L)
            for (int c = 0; c < DS; c += L) {
                vec rows[L];
                ahead.fetch(lines(TURN));
                UNROLL for (int i = 0; i < L; i++) rows[i] = load(k + std::min(n + i, live - 1) * stride + d + c);
                transpose(rows);
                UNROLL for (int i = 0; i < L; i++) *(vec *)&turned[c + i][n] = rows[i];
            }
        for (int m = 0; m < M; m += MS)
            for (int n = 0; n < live; n += 2 * L) {
                vec a[MS][2] = {};
                if (d) UNROLL for (int i = 0; i < MS; i++)
                    UNROLL for (int j = 0; j < 2; j++) a[i][j] = *(vec *)&scores[m + i][n + j * L];
                for (int c = 0; c < DS; c++) {
                    ahead.fetch(lines(SCORE));
                    UNROLL for (int i = 0; i < MS; i++)
                        UNROLL for (int j = 0; j < 2; j++)
                            a[i][j] += q[(m + i) * D + d + c] * *(vec *)&turned[c][n + j * L];
                }
                UNROLL for (int i = 0; i < MS; i++)
                    UNROLL for (int j = 0; j < 2; j++) *(vec *)&scores[m + i][n + j * L] = a[i][j];
            }
    }
}

// Scores into weights; what was summed before fades where a larger score has come.
INLINE void weigh(float (*scores)[N], int live, Running &seen) {
    for (int m = 0; m < M; m++) {
        std::fill(scores[m] + live, scores[m] + N, -INFINITY);
        vec *x = (vec *)scores[m], most = x[0];
        UNROLL for (int j = 1; j < N / L; j++) most = larger(most, x[j]);
        float top = maximum(most);
        if (top > seen.top[m]) {
            float fade = std::exp2(seen.top[m] - top);
            seen.top[m] = top;
            seen.sums[m] *= fade;
            for (int e = 0; e < E; e++) seen.out[m * E + e] *= fade;
        }
        UNROLL for (int j = 0; j < N / L; j++) seen.sums[m] += x[j] = exp2_of(x[j] - seen.top[m]);
    }
}

INLINE void add_values(float (*weights)[N], const float *v, long stride, int live, Ahead &ahead, float *out) {
    for (int e = 0; e < E; e += EV * L)
        for (int m = 0; m < M; m += MV) {
            vec a[MV][EV];
            UNROLL for (int i = 0; i < MV; i++)
                UNROLL for (int j = 0; j < EV; j++) a[i][j] = load(out + (m + i) * E + e + j * L);
            for (int n = 0; n < live; n++) {
                ahead.fetch(M == 1 ? E / LINE : lines(VALUE));
                UNROLL for (int i = 0; i < MV; i++)
                    UNROLL for (int j = 0; j < EV; j++)
                        a[i][j] += weights[m + i][n] * load(v + n * stride + e + j * L);
            }
            UNROLL for (int i = 0; i < MV; i++)
                UNROLL for (int j = 0; j < EV; j++) store(out + (m + i) * E + e + j * L, a[i][j]);
        }
}

// Softmax attention of M queries over some tokens: weighted means of values (M, E), and log2 of the weights' sums (M).
static void attend(const float *q, const float *k, const float *v, long k_stride, long v_stride, long tokens,
                   float *out, float *weight) {
    alignas(64) float scores[M][N];
    Running seen;
    seen.out = out;
    std::fill(seen.top, seen.top + M, -INFINITY);
    std::fill(out, out + M * E, 0.0f);
    for (long s = 0; s < tokens; s += N, k += N * k_stride, v += N * v_stride) {
        long far = s + AHEAD < tokens ? AHEAD : 0;  // at the end what is here already is fetched, at no cost
        const float *keys = k + far * k_stride, *values = SHARED ? keys : v + far * v_stride;
        Ahead ahead = {keys, keys + N * D, values, values + N * E};
        auto tile = [&](int live) INLINED {
            score(q, k, k_stride, live, ahead, scores);
            weigh(scores, live, seen);
            add_values(scores, v, v_stride, live, ahead, out);
        };
        if (tokens - s >= N) tile(N);  // a constant: the common case is unrolled
        else tile(tokens - s);
    }
    for (int m = 0; m < M; m++) {
        float total = sum(seen.sums[m]);
        weight[m] = seen.top[m] + std::log2(total);
        for (int e = 0; e < E; e++) out[m * E + e] /= total;
    }
}

// q (B, G, M, D) and out (B, G, M, E) are contiguous; strides in floats, of batch, KV head and token.
extern "C" void split_kv(const float *q, const float *k, const float *v, float *out, const long *k_strides,
                         const long *v_strides, long B, long G, long S, float scale, int threads) {
    long heads = B * G;
    long splits = std::max(1L, std::min((4 * threads + heads - 1) / heads, S / 256));
    long per_split = ((S + splits - 1) / splits + N - 1) / N * N;
    splits = (S + per_split - 1) / per_split;
    std::vector<float> parts(splits > 1 ? heads * splits * M * E : 0), weights(heads * splits * M);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long i = 0; i < heads * splits; i++) {
        long b = i / splits / G, g = i / splits % G, first = i % splits * per_split;
        float scaled[M * D];
        for (int x = 0; x < M * D; x++) scaled[x] = q[i / splits * M * D + x] * (scale * 1.44269504f);
        attend(scaled, k + b * k_strides[0] + g * k_strides[1] + first * k_strides[2],
               v + b * v_strides[0] + g * v_strides[1] + first * v_strides[2], k_strides[2], v_strides[2],
               std::min(per_split, S - first), splits > 1 ? &parts[i * M * E] : out + i * M * E, &weights[i * M]);
    }
    if (splits == 1) return;
    for (long h = 0; h < heads; h++)
        for (int m = 0; m < M; m++) {
            float *o = out + (h * M + m) * E, top = -INFINITY, total = 0;
            const float *weight = &weights[h * splits * M + m], *part = &parts[(h * splits * M + m) * E];
            for (long s = 0; s < splits; s++) top = std::max(top, weight[s * M]);
            std::fill(o, o + E, 0.0f);
            for (long s = 0; s < splits; s++) {
                float share = std::exp2(weight[s * M] - top);
                total += share;
                for (int e = 0; e < E; e++) o[e] += share * part[s * M * E + e];
            }
            for (int e = 0; e < E; e++) o[e] /= total;
        }
}

extern "C" void rms_norm(const float *x, const float *weight, float *out, long rows, long width, float eps,
                         int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > 1 << 14)
    for (long i = 0; i < rows * width; i += width) {
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (long j = 0; j < width; j++) square += x[i + j] * x[i + j];
        float scale = 1 / std::sqrt(square / width + eps);
#pragma omp simd
        for (long j = 0; j < width; j++) out[i + j] = x[i + j] * scale * weight[j];
    }
}

// Reads n floats, a multiple of 2 * 65536, in two places at a time and fetched ahead: what the memory can give.
extern "C" float read_all(const float *x, long n, int threads) {
    float total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(dynamic)
    for (long i = 0; i < n / 2; i += 65536) {
        vec a[2][LINE / L] = {};
        for (const float *y = x + i, *z = y + n / 2, *end = y + 65536; y < end; y += LINE, z += LINE) {
            __builtin_prefetch(y + 1024, 0, 2);
            __builtin_prefetch(z + 1024, 0, 2);
            UNROLL for (int j = 0; j < LINE / L; j++) a[0][j] += load(y + j * L), a[1][j] += load(z + j * L);
        }
        UNROLL for (int j = 0; j < LINE / L; j++) total += sum(a[0][j] + a[1][j]);
    }
    return total;
}
