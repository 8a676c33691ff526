// Attention on a CPU: of one new token over a static cache, of a prompt, and its gradients; built by build.py.
//
// Queries that share keys go through them together, a tile of N tokens at a time, with a running softmax (Milakov and
// Gimelshein 2018, arXiv 1805.02867). Of one new token they are those of a KV head, and few long sequences are each split
// among threads (Flash-Decoding, Dao et al. 2023); of a prompt they are successive ones of a head (FlashAttention-2, Dao
// 2023, arXiv 2307.08691). Memory sets the pace only if it is never waited for: while one tile is computed with, one to
// come is fetched, some lines at each step of the inner loops.
//
// Constants of a build: D key size, E value size and, of one token's attention, M, the queries of a KV head, and STORED,
// what keys and values are stored as. There is nothing between one token of a KV head and the next. One token's values are
// the keys' first columns where sizes differ.

#include <algorithm>
#include <atomic>
#include <vector>

#include "vectors.h"

#ifdef M
constexpr bool SHARED = D != E;
#else
constexpr int M = 2 * NATIVE;
constexpr bool SHARED = false;
#endif

constexpr int lanes(int native) { return D % native || E % native ? lanes(native / 2) : native; }
constexpr int divisor(int n, int most) { return n % most ? divisor(n, most - 1) : most; }

constexpr int NEXT = SHARED ? D : E;  // numbers from one token's values to the next
// Queries in a vector, if they fill it; a half vector where memory sets the pace anyway.
constexpr int QUERIES = M % NATIVE && !SHARED ? std::min(NATIVE, 8) : NATIVE;
constexpr bool MANY = M % QUERIES == 0;

// Keys and values of 16 bits are widened by each load, or once a tile for so many queries that each is loaded often.
typedef std::conditional_t<(M > 4), float, stored> item;
constexpr bool WIDENED = !std::is_same_v<item, stored>;

// Tokens in a tile: 16. Of one new token 32, where blocks are as long, for one query, which has little to do with each
// tile, and for many, whose outputs are loaded and stored with each.
constexpr int SHORT = 16, LONG = M == 1 || (MANY && M > QUERIES && !SHARED) ? 32 : SHORT;

// Where computing takes longer, 8 KiB ahead into the first cache, else 16 KiB into the second.
constexpr int INTO = MANY ? 3 : 2, LINES_AHEAD = MANY ? 128 : 256;

constexpr int ITEMS = 64 / sizeof(stored);  // keys' or values' numbers in a cache line

// Keys or values of a tile to come, fetched some lines at a time while another is computed with.
struct Lines {
    const stored *at;

    INLINED void fetch(int lines) {
        UNROLL for (int i = 0; i < lines; i++, at += ITEMS) __builtin_prefetch(at, 0, INTO);
    }
};

constexpr int shares(int lines, int steps) { return (lines + steps - 1) / steps; }

constexpr int L = lanes(NATIVE);
typedef Vector<L>::type vec;

// A tile's first tokens and, where they do not fill it, zeros behind them: nothing beyond them is read.
template <class X, class Y> INLINE const Y *tile_of(const X *x, long live, Y *room, long all) {
    if constexpr (WIDENED) each(live, [&](auto v, long i) INLINED { store(room + i, load<decltype(v)>(x + i)); });
    else if (live < all) std::copy(x, x + live, room);
    else return x;
    std::fill(room + live, room + all, Y{});
    return room;
}

// What queries have seen so far: a bound on their scores, the sum of the weights 2^(score - top) and the weighted sum of
// values, which fade when a score is above the bound. It is then put so far above that this is seldom.
constexpr float ABOVE = 8, LOG2_E = 1.44269504f;

// A vector of scores is that of MS queries with NS tokens. For many queries it lies along them, and nothing is summed
// across it; for few it is made of the sums of vectors that lie along a key.
constexpr int MS = MANY ? QUERIES : M % 4 == 0 && L >= 4 ? 4 : M % 2 == 0 && L >= 2 ? 2 : 1, NS = MANY ? 1 : L / MS;

template <int N> struct Seen {
    typedef Vector<MS * NS>::type Scores;
    static constexpr int J = M / MS, NJ = N / NS, PAIR = std::min(2, NJ);
    static constexpr int KEY_LINES = shares(N * D, ITEMS), VALUE_LINES = SHARED ? 0 : shares(N * E, ITEMS);  // of a tile
    static constexpr int AHEAD = std::max(1, LINES_AHEAD / (KEY_LINES + VALUE_LINES)) * N;  // tokens from use to fetch

    alignas(64) float q[D * M], out[M * E] = {};
    // Of tiles that are not used in their places; two of keys where the last ones are still needed as values.
    alignas(64) item tile_keys[WIDENED && SHARED ? 2 : 1][N * D], tile_values[SHARED ? 1 : N * E];
    int turn = 0;
    Scores scores[NJ][J], weights[NJ][J], top[J], totals[J] = {};
    const item *values = nullptr;  // that the weights are for, which `out` is still without
    Lines pending;                 // what is to be fetched meanwhile

    // Of M queries that are `step` floats apart there are `live`; the others' places are filled with the last.
    INLINED Seen(const float *queries, long step, int live, float scale) {
        for (int m = 0; m < M; m++)
            for (int d = 0; d < D; d++) {
                q[MANY ? d * M + m : m * D + d] = queries[std::min(m, live - 1) * step + d] * scale;
            }
        std::fill(top, top + J, Scores{} - 3e38f);
    }

    static constexpr int lane(int m, int n) { return m % MS * NS + n % NS; }
    static constexpr int place(int m, int n) { return (n / NS * J + m / MS) * MS * NS + lane(m, n); }  // of a weight

    // Takes in N tokens, or the first `live`, of which query m sees only those from `hidden` + m to `sees` + m. Values are
    // added after the next tile's scores, so that neither waits for the end of what it needs; the last ones by `finish`.
    INLINED void tile(const stored *all_k, const stored *all_v, long live, Lines keys_ahead, Lines values_ahead,
                      long sees = N, long hidden = -M) {
        live = std::min<long>(live, N);
        const item *k = tile_of(all_k, live * D, tile_keys[turn], N * D);
        if (WIDENED && SHARED) turn ^= 1;
        if constexpr (MANY) along_queries(k, keys_ahead);
        else along_keys(k, keys_ahead);
        finish();
        values = SHARED ? k : tile_of(all_v, live * E, tile_values, N * E), pending = values_ahead;
        if (live < N || sees < N || hidden > 1 - M)
            for (int j = 0; j < J; j++) {
                Scores from, to;
                for (int m = 0; m < MS; m++)
                    for (int n = 0; n < NS; n++) {
                        from[lane(m, n)] = hidden + j * MS + m - n;
                        to[lane(m, n)] = std::min(live, sees + j * MS + m) - n;
                    }
                for (int n = 0; n < NJ; n++) {
                    scores[n][j] = from <= (float)(n * NS) ? scores[n][j] : Scores{} - INFINITY;
                    scores[n][j] = to > (float)(n * NS) ? scores[n][j] : Scores{} - INFINITY;
                }
            }
        UNROLL for (int j = 0; j < J; j++) {
            Scores most[PAIR], added[PAIR] = {};
            UNROLL for (int i = 0; i < PAIR; i++) most[i] = scores[i][j];
            SOME for (int n = 0; n < NJ; n += PAIR)
                UNROLL for (int i = 0; i < PAIR; i++) most[i] = larger(most[i], scores[n + i][j]);
            Scores highest = largest<1, NS>(larger(most[0], most[PAIR - 1]));
            if (largest<NS, MS * NS>(highest - top[j])[0] > 0) {
                highest = larger(highest + ABOVE, top[j]);
                Scores fade = exp2_of(top[j] - highest);
                top[j] = highest;
                totals[j] *= fade;
                for (int m = 0; m < MS; m++)
                    for (int e = 0; e < E; e++) out[(j * MS + m) * E + e] *= fade[m * NS];
            }
            SOME for (int n = 0; n < NJ; n += PAIR)
                UNROLL for (int i = 0; i < PAIR; i++) {
                    weights[n + i][j] = exp2_of(scores[n + i][j] - top[j]);
                    added[i] += weights[n + i][j];
                }
            UNROLL for (int i = 0; i < PAIR; i++) totals[j] += added[i];
        }
    }

    INLINED void finish() {
        if (values) add_values(pending);
    }

    // Scores of as many tokens at a time as registers hold. Here and below, pointers that move and factors loaded once
    // save instructions: of those a hyperthread beside this one leaves few for each multiplication.
    template <class K> APART void along_queries(const K *k, Lines ahead) {
        constexpr int T = divisor(N, std::clamp((REGISTERS < 32 ? 12 : 16) / J, 1, N));
        constexpr int STEP = divisor(D, std::max(4, ITEMS / T));
        for (int n = 0; n < N; n += T) {
            Scores a[T][J] = {};
            const K *some = k + n * D;
            for (const float *x = q; x != q + D * M; x += STEP * M, some += STEP) {
                ahead.fetch(shares(T * STEP, ITEMS));
                UNROLL for (int i = 0; i < STEP; i++) {
                    Scores y[J];
                    UNROLL for (int j = 0; j < J; j++) y[j] = held(load<Scores>(x + i * M + j * MS));
                    UNROLL for (int t = 0; t < T; t++) {
                        Scores key = held(some[t * D + i] - Scores{});
                        UNROLL for (int j = 0; j < J; j++) a[t][j] += key * y[j];
                    }
                }
            }
            UNROLL for (int t = 0; t < T; t++)
                UNROLL for (int j = 0; j < J; j++) scores[n + t][j] = a[t][j];
        }
    }

    INLINED void along_keys(const item *k, Lines ahead) {
        constexpr int STEPS = NJ * J * (MS > 1 ? D / L : NS);
        for (int n = 0; n < N; n += NS)
            for (int m = 0; m < M; m += MS) {
                vec a[L] = {};
                auto key = [&](int t, int d) INLINED { return load<vec>(k + (n + t) * D + d); };
                if constexpr (MS == 1)
                    UNROLL for (int t = 0; t < NS; t++) {
                        ahead.fetch(shares(KEY_LINES, STEPS));
                        UNROLL for (int d = 0; d < D; d += L) a[t] += load<vec>(q + m * D + d) * key(t, d);
                    }
                else
                    SOME for (int d = 0; d < D; d += L) {
                        ahead.fetch(shares(KEY_LINES, STEPS));
                        vec x[MS];
                        UNROLL for (int i = 0; i < MS; i++) x[i] = held(load<vec>(q + (m + i) * D + d));
                        UNROLL for (int t = 0; t < NS; t++) {
                            vec y = held(key(t, d));
                            UNROLL for (int i = 0; i < MS; i++) a[lane(i, t)] += x[i] * y;
                        }
                    }
                store((float *)&scores[n / NS][m / MS], sums(a));
            }
    }

    // Values times weights, some of the outputs (M, E) at a time in registers.
    APART void add_values(Lines ahead) {
        constexpr bool WIDE = REGISTERS < 32 && M % 4;  // of 16 registers 8 hold outputs, of 32 16
        constexpr int MV = MS == 2 ? 2 : divisor(M, WIDE ? 2 : 4), EV = divisor(E / L, REGISTERS < 32 && !WIDE ? 2 : 4);
        static_assert(MV % MS == 0 || MS % MV == 0);  // place(m + i, s + n) is place(m, s) + place(i, n)
        constexpr int STEP = std::max(4, NS), STEPS = N / STEP * (M / MV) * (E / L / EV);
        for (int e = 0; e < E; e += EV * L)
            for (int m = 0; m < M; m += MV) {
                vec a[MV][EV];
                float *o = out + m * E + e;
                UNROLL for (int i = 0; i < MV; i++)
                    UNROLL for (int j = 0; j < EV; j++) a[i][j] = load<vec>(o + i * E + j * L);
                const item *v = values + e;
                const float *w = (float *)weights + place(m, 0), *end = w + N * M;
                for (; w != end; w += STEP * M, v += STEP * NEXT) {
                    ahead.fetch(shares(VALUE_LINES, STEPS));
                    UNROLL for (int n = 0; n < STEP; n++) {
                        vec x[EV];
                        UNROLL for (int j = 0; j < EV; j++) x[j] = held(load<vec>(v + n * NEXT + j * L));
                        UNROLL for (int i = 0; i < MV; i++) {
                            vec y = held(w[place(i, n)] - vec{});
                            UNROLL for (int j = 0; j < EV; j++) a[i][j] += y * x[j];
                        }
                    }
                }
                UNROLL for (int i = 0; i < MV; i++)
                    UNROLL for (int j = 0; j < EV; j++) store(o + i * E + j * L, a[i][j]);
            }
    }

    // What makes the weighted sum a mean, and log2 of the sum of the weights; a sink is one more weight, of the value zero.
    float share_of(int m, const float *sink, float &weight) const {
        float total = 0, seen;
        for (int n = 0; n < NS; n++) total += totals[m / MS][lane(m, n)];
        seen = weight = top[m / MS][lane(m, 0)] + std::log2(total);
        if (sink) {
            const float theirs = *sink * LOG2_E, most = std::max(seen, theirs);
            weight = most + std::log2(std::exp2(seen - most) + std::exp2(theirs - most));
        }
        return std::exp2(seen - weight) / total;
    }
};

#ifdef M

// Some of a KV head's tokens, from `first` on: one after the other in memory, or in blocks of `size` tokens that a table
// numbers, in which tiles end where blocks do.
struct Part {
    const stored *k, *v;
    const long *table;
    long size, k_block, v_block, first, tokens;

    INLINED const stored *key(long s) const { return at(k, k_block, first + s, D); }
    INLINED const stored *value(long s) const { return at(v, v_block, first + s, NEXT); }
    INLINED const stored *at(const stored *x, long block, long s, long row) const {
        return table ? x + table[s / size] * block + s % size * row : x + s * row;
    }
};

// Softmax attention of M queries over a part: weighted means of values (M, E), and log2 of the weights' sums (M). While
// the last tiles are computed with, the first ones of what `next` says is next are fetched.
template <int N, class F>
static void attend(const float *queries, float scale, const Part &part, const F &next, const float *sinks, float *out,
                   float *weight) {
    constexpr int AHEAD = Seen<N>::AHEAD;
    Seen<N> seen(queries, D, M, scale);
    long whole = (part.tokens + N - 1) / N * N;
    for (long s = 0; s < part.tokens; s += N) {
        Part to_come = s + AHEAD < whole ? part : next();
        long far = std::min(s + AHEAD < whole ? s + AHEAD : s + AHEAD - whole, to_come.tokens - 1);
        const stored *keys = to_come.key(far), *values = SHARED ? keys : to_come.value(far);
        seen.tile(part.key(s), SHARED ? nullptr : part.value(s), part.tokens - s, {keys}, {values});
    }
    seen.finish();
    for (int m = 0; m < M; m++) {
        const float share = seen.share_of(m, sinks ? sinks + m : nullptr, weight[m]);
        for (int e = 0; e < E; e++) out[m * E + e] = seen.out[m * E + e] * share;
    }
}

// q (B, G, M, D) and out (B, G, M, E), without gaps within a sequence; strides in numbers, of batch and KV head. S tokens
// are held, or as many as there are up to `position`, one for all or with `position_step` 1 one for each sequence. With a
// table (B, blocks) they lie in blocks of `size` tokens, and strides of the batch are those of blocks. `sinks`, if there
// are any, are logits (G, M) beside those of the keys.
extern "C" void split_kv(const float *q, const stored *k, const stored *v, float *out, long q_batch, long k_batch,
                         long k_head, long v_batch, long v_head, long B, long G, long S, const long *position,
                         long position_step, const long *table, long blocks, long size, const float *sinks, float scale,
                         long threads) {
    const long room = S, heads = B * G;
    auto held = [&](long b) { return position ? std::min(room, position[b * position_step] + 1) : room; };
    if (position) S = 0;
    for (long b = 0; position && b < B; b++) S = std::max(S, held(b));
    long splits = std::max(1L, std::min((8 * threads + heads - 1) / heads, S / 256));
    const long tile = table && size % LONG ? SHORT : LONG;
    long per_split = ((S + splits - 1) / splits + tile - 1) / tile * tile;
    splits = (S + per_split - 1) / per_split;
    long count = heads * splits;
    auto part = [&](long i) {
        long b = i / splits / G, g = i / splits % G, first = i % splits * per_split;
        return Part{k + (table ? 0 : b * k_batch) + g * k_head,
                    v + (table ? 0 : b * v_batch) + g * v_head,
                    table ? table + b * blocks : nullptr,
                    size,
                    k_batch,
                    v_batch,
                    first,
                    std::min(per_split, held(b) - first)};
    };
    std::vector<float> means(splits > 1 ? count * M * E : 0), weights(count * M);
    std::atomic<long> taken(0);
#pragma omp parallel num_threads(threads)
    for (long i; (i = taken++) < count;) {
        const Part now = part(i);
        if (now.tokens <= 0) {  // of a sequence shorter than others
            std::fill_n(&weights[i * M], M, -INFINITY);
            continue;
        }
        auto next = [&] {
            long n = taken;
            Part to_come = part(n < count ? n : i);
            return to_come.tokens > 0 ? to_come : now;
        };
        long h = i / splits;
        auto attention = tile == LONG ? attend<LONG, decltype(next)> : attend<SHORT, decltype(next)>;
        const float *some = sinks && i % splits == 0 ? sinks + h % G * M : nullptr;  // once for all splits
        attention(q + h / G * q_batch + h % G * M * D, scale * LOG2_E, now, next, some,
                  splits > 1 ? &means[i * M * E] : out + i * M * E, &weights[i * M]);
    }
    if (splits == 1) return;
    for (long h = 0; h < heads; h++)
        for (int m = 0; m < M; m++) {
            float *o = out + (h * M + m) * E, top = -INFINITY, total = 0;
            const float *weight = &weights[h * splits * M + m], *mean = &means[(h * splits * M + m) * E];
            for (long s = 0; s < splits; s++) top = std::max(top, weight[s * M]);
            std::fill(o, o + E, 0.0f);
            for (long s = 0; s < splits; s++) {
                float share = std::exp2(weight[s * M] - top);
                total += share;
                for (int e = 0; e < E; e++) o[e] += share * mean[s * M * E + e];
            }
            for (int e = 0; e < E; e++) o[e] /= total;
        }
}

#else

// Causal attention of the last T of S tokens to themselves and the `window` - 1 before them, M queries of a head at a time:
// q (B, H, T, D), strides of batch, head and token, k (B, G, S, D) and v (B, G, S, E), strides of batch and head; out
// (B, T, H, E) and weight (B, H, T), log2 of the sum of a query's weights, are contiguous. `sinks` (H) as above.
extern "C" void causal(const float *q, const float *k, const float *v, float *out, float *weight, long q_batch,
                       long q_head, long q_token, long k_batch, long k_head, long v_batch, long v_head, long B, long H,
                       long G, long T, long S, long window, const float *sinks, float scale, long threads) {
    constexpr int N = SHORT, AHEAD = Seen<N>::AHEAD;
    const long blocks = (T + M - 1) / M;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long i = 0; i < B * H * blocks; i++) {
        const long b = i / blocks / H, h = i / blocks % H, t = (blocks - 1 - i % blocks) * M, first = S - T + t;
        const int rows = std::min<long>(M, T - t);
        const long tokens = first + rows, start = std::max(0L, first + 1 - window) / N * N;
        const float *keys = k + b * k_batch + h / (H / G) * k_head, *values = v + b * v_batch + h / (H / G) * v_head;
        Seen<N> seen(q + b * q_batch + h * q_head + t * q_token, q_token, rows, scale * LOG2_E);
        for (long s = start; s < tokens; s += N) {
            const long far = s + AHEAD < tokens ? s + AHEAD : start;
            const Lines ahead = {keys + far * D}, values_ahead = {values + far * E};
            const long sees = first + 1 - s, hidden = sees - window;
            seen.tile(keys + s * D, values + s * E, tokens - s, ahead, values_ahead, sees, hidden);
        }
        seen.finish();
        for (int m = 0; m < rows; m++) {
            float *o = out + ((b * T + t + m) * H + h) * E, &sum = weight[(b * H + h) * T + t + m];
            const float share = seen.share_of(m, sinks ? sinks + h : nullptr, sum);
            for (int e = 0; e < E; e++) o[e] = seen.out[m * E + e] * share;
        }
    }
}

// c (R, C) is, or with ADDS becomes larger by, a b of a (R, K) and b (K, C). b and c have no gaps, of a element (r, k) is
// r * ROW + k * COLUMN from the first.
template <int R, int C, int K, int ROW, int COLUMN, bool ADDS, class T>
INLINE void product(const float *a, const float *b, float *c) {
    constexpr int W = width<T>, RS = divisor(R, 4), CS = divisor(C / W, REGISTERS < 32 ? 2 : 4);
    for (int x = 0; x < C; x += CS * W)
        for (int r = 0; r < R; r += RS) {
            T found[RS][CS] = {};
            if (ADDS)
                UNROLL for (int i = 0; i < RS; i++)
                    UNROLL for (int j = 0; j < CS; j++) found[i][j] = load<T>(c + (r + i) * C + x + j * W);
            SOME for (int k = 0; k < K; k++) {
                T y[CS];
                UNROLL for (int j = 0; j < CS; j++) y[j] = held(load<T>(b + k * C + x + j * W));
                UNROLL for (int i = 0; i < RS; i++)
                    UNROLL for (int j = 0; j < CS; j++) found[i][j] += a[(r + i) * ROW + k * COLUMN] * y[j];
            }
            UNROLL for (int i = 0; i < RS; i++)
                UNROLL for (int j = 0; j < CS; j++) store(c + (r + i) * C + x + j * W, found[i][j]);
        }
}

// Its gradients (FlashAttention-2, algorithm 2): of q (B, T, H, D), and each query head's own of k (B, S, H, D) and of v
// (B, S, H, E); out and that of out have strides of batch, head and token.
extern "C" void causal_backward(const float *grad, const float *q, const float *k, const float *v, const float *out,
                                const float *weight, float *q_grad, float *k_grad, float *v_grad, long grad_batch,
                                long grad_head, long grad_token, long q_batch, long q_head, long q_token, long k_batch,
                                long k_head, long v_batch, long v_head, long out_batch, long out_head, long out_token,
                                long B, long H, long G, long T, long S, long window, float scale, long threads) {
    constexpr int N = SHORT;
    const long padded = (S + N - 1) / N * N;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums(padded * (D + E));
        float *k_sums = sums.data(), *v_sums = k_sums + padded * D;
        alignas(64) float few_keys[N * D], few_values[N * E];
        alignas(64) float queries[M * D], columns[D * M], means[M * E], mean_columns[E * M], sum[M * D];
        alignas(64) float p[N * M], change[N * M];
        alignas(64) native top[2], drift[2];
        auto rows_of = [&](const float *x, long step, int size, int rows, float factor, float *in_rows, float *in_columns,
                           float column_factor) {
            for (int m = 0; m < M; m++)
                for (int d = 0; d < size; d++) {
                    float y = m < rows ? x[m * step + d] * factor : 0;
                    in_rows[m * size + d] = y, in_columns[d * M + m] = y * column_factor;
                }
        };
#pragma omp for schedule(dynamic)
        for (long i = 0; i < B * H; i++) {
            const long b = i / H, h = i % H, g = h / (H / G);
            const float *keys = k + b * k_batch + g * k_head, *values = v + b * v_batch + g * v_head;
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (long t = 0; t < T; t += M) {
                const int rows = std::min<long>(M, T - t);
                const long first = S - T + t, tokens = first + rows, start = std::max(0L, first + 1 - window) / N * N;
                const float *mean = grad + b * grad_batch + h * grad_head + t * grad_token;
                rows_of(q + b * q_batch + h * q_head + t * q_token, q_token, D, rows, scale, queries, columns, LOG2_E);
                rows_of(mean, grad_token, E, rows, 1, means, mean_columns, 1);
                for (int m = 0; m < M; m++) {
                    const float *o = out + b * out_batch + h * out_head + (t + m) * out_token;
                    float along = 0;
                    if (m < rows)
                        for (int e = 0; e < E; e++) along += means[m * E + e] * o[e];
                    ((float *)drift)[m] = along, ((float *)top)[m] = m < rows ? weight[i * T + t + m] : 0;
                }
                std::fill(sum, sum + M * D, 0.0f);
                for (long s = start; s < tokens; s += N) {
                    const bool whole = s + N <= S;
                    const float *some = whole ? keys + s * D : tile_of(keys + s * D, (S - s) * D, few_keys, N * D);
                    const float *theirs = whole ? values + s * E : tile_of(values + s * E, (S - s) * E, few_values, N * E);
                    product<N, M, D, D, 1, false, native>(some, columns, p);
                    product<N, M, E, E, 1, false, native>(theirs, mean_columns, change);
                    const bool all = s + N - 1 <= first && s > first + M - 1 - window;
                    UNROLL for (int j = 0; j < 2; j++) {
                        native at;
                        for (int l = 0; l < NATIVE; l++) at[l] = first - s + j * NATIVE + l;
                        for (int n = 0; n < N; n++) {
                            float *x = p + n * M + j * NATIVE, *y = change + n * M + j * NATIVE;
                            native share = exp2_of(load<native>(x) - top[j]);
                            native moves = share * (load<native>(y) - drift[j]);
                            if (!all) {
                                auto seen = (at >= (float)n) & (at - (float)window < (float)n);
                                share = seen ? share : native{}, moves = seen ? moves : native{};
                            }
                            store(x, share), store(y, moves);
                        }
                    }
                    product<N, E, M, M, 1, true, vec>(p, means, v_sums + s * E);
                    product<N, D, M, M, 1, true, vec>(change, queries, k_sums + s * D);
                    product<M, D, N, 1, M, true, vec>(change, some, sum);
                }
                for (int m = 0; m < rows; m++)
                    for (int d = 0; d < D; d++) q_grad[((b * T + t + m) * H + h) * D + d] = sum[m * D + d] * scale;
            }
            for (long s = 0; s < S; s++) {
                std::copy_n(k_sums + s * D, D, k_grad + ((b * S + s) * H + h) * D);
                std::copy_n(v_sums + s * E, E, v_grad + ((b * S + s) * H + h) * E);
            }
        }
    }
}

#endif
