/* Arithmetic that compiled passes and compiled row networks share: vectors, products of few rows, softmax.

   Each file that includes it is compiled by `build.py` for the processor it runs on, with HALF=0 (float32) or HALF=1
   (bfloat16). A row's bits do not depend on what stands beside it: each of its dot products runs along its depth in one
   vector accumulator that is added up in one way, whatever tile it stands in. */

#ifndef OUTPACE_ARITHMETIC
#define OUTPACE_ARITHMETIC

#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#ifndef MATRIX
#define MATRIX 0      /* whether products take the processor's matrix unit (AMX): HALF only */
#endif
#if MATRIX
#define GROUP 16      /* weight rows a thread takes at a time: those of a tile register */
#else
#define GROUP 12      /* weight rows a thread takes at a time; a multiple of the tiles' 3, 4 and 6 */
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));

/* ---- threads: those of an OpenMP region, which wait for each other here ---------------------------------------------- */

/* OpenMP's own barriers spin for a millisecond before they let go of the processor. Where another program takes one of the
   processors, two of our threads end up on the other, and a pass of 400 barriers waits for the scheduler at each of
   them. Here a thread spins as long as its neighbours usually take, and sleeps then. */

#define SPINS 2000 /* looks at the barrier before a thread sleeps: some fifty microseconds */

struct team {
    atomic_int count, arrived, turn, asleep;
    _Atomic int64_t next; /* iterations taken of the loop under way */
};

static _Thread_local struct { struct team *team; int64_t me; } here;

extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

/* Every thread of a region comes in before anything else. */
INLINE void join_team(struct team *team) {
    atomic_store_explicit(&team->count, omp_get_num_threads(), memory_order_relaxed);
    here.team = team;
    here.me = omp_get_thread_num();
}

/* All threads are here, and what they wrote can be read. */
static void meet(void) {
    struct team *t = here.team;
    int count = atomic_load_explicit(&t->count, memory_order_relaxed), turn = atomic_load(&t->turn);
    if (count == 1 || atomic_fetch_add(&t->arrived, 1) + 1 == count) {
        atomic_store(&t->arrived, 0);
        atomic_store(&t->next, 0);
        atomic_store(&t->turn, turn + 1);
        if (atomic_load(&t->asleep)) syscall(SYS_futex, &t->turn, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&t->turn, memory_order_acquire) != turn) return;
#if defined(__x86_64__)
        _mm_pause();
#endif
    }
    atomic_fetch_add(&t->asleep, 1);
    while (atomic_load(&t->turn) == turn) syscall(SYS_futex, &t->turn, FUTEX_WAIT_PRIVATE, turn, NULL, NULL, 0);
    atomic_fetch_sub(&t->asleep, 1);
}

/* A loop over i < n of which every thread runs one stretch; the loop's end is no meeting. */
#define EACH(i, n)                                                                                                     \
    for (int64_t i##_n = (n), i##_team = atomic_load_explicit(&here.team->count, memory_order_relaxed),                \
                 i = i##_n * here.me / i##_team, i##_end = i##_n * (here.me + 1) / i##_team; i < i##_end; i++)

/* The same in pieces of `some` iterations, taken by whoever is free. Threads meet between two such loops. */
#define SHARED(i, n, some)                                                                                             \
    for (int64_t i##_n = (n), i##_some = (some), i##_at; (i##_at = atomic_fetch_add(&here.team->next, i##_some)) < i##_n;) \
        for (int64_t i = i##_at; i < i##_at + i##_some && i < i##_n; i++)

/* Iterations of a loop that a thread takes at a time: a quarter of its part, and no more than keep the others waiting. */
INLINE int64_t share_of(int64_t n, int64_t threads) {
    int64_t some = n / (4 * threads) + 1;
    return some < 64 ? some : 64;
}

/* The next of several buffers in one space of bytes; needs `space`, and `at`, what is taken of it. */
#define LAY(to, type, count) to = (type *)(space + at), at += ((int64_t)(count) * sizeof(type) + 63) / 64 * 64

/* ---- numbers: what weights, keys and values are stored in; inputs: what enters a product ------------------------- */

#if HALF
typedef uint16_t number;
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE float wide(number n) {
    union { uint32_t bits; float value; } both = {(uint32_t)n << 16};
    return both.value;
}

INLINE number narrow(float value) {
    union { float value; uint32_t bits; } both = {value};
    uint32_t rounded = (both.bits + 0x7fff + ((both.bits >> 16) & 1)) >> 16;
    return (number)((both.bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

INLINE vec lanes(const number *from) {
    return (vec)(__builtin_convertvector(*(const halves *)from, uvec) << 16);
}
#else
typedef float number;
INLINE float wide(number n) { return n; }
INLINE number narrow(float value) { return value; }
INLINE vec lanes(const number *from) { return *(const loose *)from; }
#endif

#if HALF && defined(__AVX512BF16__)
#define PAIRS 1 /* the processor multiplies pairs of bfloat16 numbers */
#define STEP 32
typedef number input;
INLINE float value_of(input x) { return wide(x); }
INLINE input input_of(float value) { return narrow(value); }
#else
#define PAIRS 0
#define STEP LANES
typedef float input;
INLINE float value_of(input x) { return x; }
INLINE input input_of(float value) { return wide(narrow(value)); }
#endif

/* a * b + c in one rounding where the processor can; the compiler fuses nothing by itself (-ffp-contract=off), for it
   would do so here and not there. */
#if defined(__AVX512F__)
#define FUSED(a, b, c) ((vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define FUSED_ONE(a, b, c) __builtin_fmaf(a, b, c)
#elif defined(__AVX__) && defined(__FMA__)
#define FUSED(a, b, c) ((vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FUSED_ONE(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FUSED(a, b, c) ((a) * (b) + (c))
#define FUSED_ONE(a, b, c) ((a) * (b) + (c))
#endif

INLINE vec all(float value) { return (vec){0} + value; }

/* The sum of all lanes, always in the same order: halves onto each other until four are left, then neighbours. */
#if defined(__AVX__)
INLINE __m128 four_lanes(vec v) {
#if LANES == 16
    __m256 a = _mm512_castps512_ps256((__m512)v);
    a = _mm256_add_ps(a, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#else
    __m256 a = (__m256)v;
#endif
    return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
}

INLINE float total(vec v) {
    __m128 b = four_lanes(v);
    b = _mm_hadd_ps(b, b);
    return _mm_cvtss_f32(_mm_hadd_ps(b, b));
}

/* The sums of four vectors at once. */
INLINE void totals(vec a, vec b, vec c, vec d, float *out) {
    __m128 one = _mm_hadd_ps(four_lanes(a), four_lanes(b)), two = _mm_hadd_ps(four_lanes(c), four_lanes(d));
    _mm_storeu_ps(out, _mm_hadd_ps(one, two));
}
#else
INLINE float total(vec v) {
    for (int n = LANES / 2; n > 2; n /= 2)
        for (int i = 0; i < n; i++) v[i] += v[i + n];
    return (v[0] + v[1]) + (v[2] + v[3]);
}

INLINE void totals(vec a, vec b, vec c, vec d, float *out) {
    out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
}
#endif

INLINE vec exponential(vec x) {
    ivec none = x < -87.0f;
    ivec large = x > 88.0f;
    x = (vec)(((ivec)x & ~large) | ((ivec)all(88.0f) & large));
    vec whole = FUSED(x, all(1.44269504f), all(12582912.0f)) - 12582912.0f;
    vec rest = FUSED(whole, all(-0.693359375f), x);
    rest = FUSED(whole, all(2.12194440e-4f), rest);
    vec sum = FUSED(rest, all(1.9875691500e-4f), all(1.3981999507e-3f));
    sum = FUSED(sum, rest, all(8.3334519073e-3f));
    sum = FUSED(sum, rest, all(4.1665795894e-2f));
    sum = FUSED(sum, rest, all(1.6666665459e-1f));
    sum = FUSED(sum, rest, all(5.0000001201e-1f));
    sum = FUSED(sum, rest * rest, rest + 1.0f);
    ivec power = (__builtin_convertvector(whole, ivec) + 127) << 23;
    return (vec)((ivec)(sum * (vec)power) & ~none);
}

/* ---- products --------------------------------------------------------------------------------------------------------- */

/* R rows times C weight rows into out [.., stride]; ahead: how far from here the weights to fetch next lie, or 0. */
#if PAIRS
#define SUMS __m512
#define ZERO _mm512_setzero_ps()
#define TAKE_W(p) ((__m512bh)_mm512_loadu_si512(p))
#define TAKE_X(p) ((__m512bh)_mm512_loadu_si512(p))
#define JOIN(sum, x, w) _mm512_dpbf16_ps(sum, x, w)
#define PACKED __m512bh
#else
#define SUMS vec
#define ZERO ((vec){0})
#define TAKE_W(p) lanes(p)
#define TAKE_X(p) (*(const loose *)(p))
#define JOIN(sum, x, w) FUSED(x, w, sum)
#define PACKED vec
#endif

#define TILE(R, C)                                                                                                     \
    INLINE void tile_##R##x##C(const input *x, const number *w, float *out, int64_t stride, int64_t depth, int64_t ahead) { \
        SUMS sums[R][C];                                                                                               \
        int64_t k = 0;                                                                                                 \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int c = 0; c < C; c++) sums[r][c] = ZERO;                                                             \
        for (; k + STEP <= depth; k += STEP) {                                                                         \
            PACKED some[C];                                                                                            \
            for (int c = 0; c < C; c++) some[c] = TAKE_W(w + c * depth + k);                                           \
            if (ahead)                                                                                                 \
                for (int c = 0; c < C; c++) __builtin_prefetch(w + ahead + c * depth + k, 0, 3);                       \
            for (int r = 0; r < R; r++) {                                                                              \
                PACKED row = TAKE_X(x + r * depth + k);                                                                \
                for (int c = 0; c < C; c++) sums[r][c] = JOIN(sums[r][c], row, some[c]);                               \
            }                                                                                                          \
        }                                                                                                              \
        float found[R * C];                                                                                            \
        int i = 0;                                                                                                     \
        for (; i + 4 <= R * C; i += 4)                                                                                 \
            totals((vec)sums[i / C][i % C], (vec)sums[(i + 1) / C][(i + 1) % C], (vec)sums[(i + 2) / C][(i + 2) % C],  \
                   (vec)sums[(i + 3) / C][(i + 3) % C], found + i);                                                    \
        for (; i < R * C; i++) found[i] = total((vec)sums[i / C][i % C]);                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int c = 0; c < C; c++) {                                                                              \
                float sum = found[r * C + c];                                                                          \
                for (int64_t j = k; j < depth; j++)                                                                    \
                    sum = FUSED_ONE(value_of(x[r * depth + j]), wide(w[c * depth + j]), sum);                          \
                out[r * stride + c] = sum;                                                                             \
            }                                                                                                          \
    }

TILE(1, 1)
TILE(1, 4)
TILE(2, 4)
TILE(3, 4)
#if MATRIX
#define ACROSS 4
TILE(4, 4)
#define TILE_4 tile_4x4
#elif LANES == 16
#define ACROSS 6
TILE(4, 6)
#define TILE_4 tile_4x6
#else
#define ACROSS 3
TILE(4, 3)
#define TILE_4 tile_4x3
#endif

/* x [rows, depth] times `count` weight rows into out [rows, stride]. */
static void group(const input *x, const number *w, int64_t rows, int64_t depth, int64_t count, float *out,
                  int64_t stride, int fetch) {
    if (count < GROUP) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < count; c++) tile_1x1(x + r * depth, w + c * depth, out + r * stride + c, stride, depth, 0);
        return;
    }
    int64_t r = 0, ahead = fetch ? GROUP * depth : 0;
    for (; r + 4 <= rows; r += 4, ahead = 0)
        for (int c = 0; c < GROUP; c += ACROSS) TILE_4(x + r * depth, w + c * depth, out + r * stride + c, stride, depth, ahead);
    for (int c = 0; r < rows && c < GROUP; c += 4) {
        const input *at = x + r * depth;
        float *to = out + r * stride + c;
        if (rows - r == 3) tile_3x4(at, w + c * depth, to, stride, depth, ahead);
        if (rows - r == 2) tile_2x4(at, w + c * depth, to, stride, depth, ahead);
        if (rows - r == 1) tile_1x4(at, w + c * depth, to, stride, depth, ahead);
    }
}

/* ---- norms, activations ----------------------------------------------------------------------------------------------- */

/* 1 / rms of x [count]. */
static float inverse_rms(const float *x, int64_t count, float eps) {
    vec squares = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec some = *(const loose *)(x + i);
        squares = FUSED(some, some, squares);
    }
    float sum = total(squares);
    for (; i < count; i++) sum = FUSED_ONE(x[i], x[i], sum);
    return 1.0f / sqrtf(sum / (float)count + eps);
}

INLINE vec activated(vec gate, vec up, int64_t gelu) {
    vec inner = gelu ? (gate + gate * gate * gate * 0.044715f) * 1.5957691216057308f : gate;
    return gate / (exponential(-inner) + 1.0f) * up;
}

/* ---- attention -------------------------------------------------------------------------------------------------------- */

#define MOST_GROUP 64 /* query heads that share a key head */
#define BLOCK 4       /* rows of a request that attend together */
#define KEYS 48       /* keys whose values stay in the first cache while all queries read them; a multiple of GROUP */

/* Rotate a head of a query or key by the angles of its position. */
INLINE void rotate(float *x, int64_t half, const float *cos, const float *sin) {
    for (int64_t i = 0; i < half; i++) {
        float one = x[i], two = x[i + half];
        x[i] = one * cos[i] - two * sin[i];
        x[i + half] = two * cos[i] + one * sin[i];
    }
}

#if LANES == 16
#define TOGETHER 4 /* queries that read a value together */
#else
#define TOGETHER 3
#endif

/* out [Q, size] += the sum over `count` entries of weight times value, entry after entry; weights [Q, span]. */
#define VALUES(Q, V)                                                                                                   \
    INLINE void values_##Q##x##V(const float *weights, int64_t span, const number *values, int64_t count, int64_t size, float *out) { \
        vec sums[Q][V];                                                                                                \
        for (int q = 0; q < Q; q++)                                                                                    \
            for (int v = 0; v < V; v++) sums[q][v] = *(loose *)(out + q * size + v * LANES);                           \
        for (int64_t j = 0; j < count; j++)                                                                            \
            for (int v = 0; v < V; v++) {                                                                              \
                vec value = lanes(values + j * size + v * LANES);                                                      \
                for (int q = 0; q < Q; q++) sums[q][v] = FUSED(value, all(weights[q * span + j]), sums[q][v]);         \
            }                                                                                                          \
        for (int q = 0; q < Q; q++)                                                                                    \
            for (int v = 0; v < V; v++) *(loose *)(out + q * size + v * LANES) = sums[q][v];                           \
    }

VALUES(1, 1)
VALUES(1, 4)
#if LANES == 16
VALUES(4, 1)
VALUES(4, 4)
#define VALUES_1 values_4x1
#define VALUES_4 values_4x4
#else
VALUES(3, 1)
VALUES(3, 4)
#define VALUES_1 values_3x1
#define VALUES_4 values_3x4
#endif

static void gather(const float *weights, int64_t span, const number *values, int64_t count, int64_t size, float *out,
                   int64_t queries) {
    int64_t q = 0;
    for (; q + TOGETHER <= queries; q += TOGETHER) {
        int64_t d = 0;
        for (; d + 4 * LANES <= size; d += 4 * LANES) VALUES_4(weights + q * span, span, values + d, count, size, out + q * size + d);
        for (; d + LANES <= size; d += LANES) VALUES_1(weights + q * span, span, values + d, count, size, out + q * size + d);
    }
    for (; q < queries; q++) {
        int64_t d = 0;
        for (; d + 4 * LANES <= size; d += 4 * LANES) values_1x4(weights + q * span, span, values + d, count, size, out + q * size + d);
        for (; d + LANES <= size; d += LANES) values_1x1(weights + q * span, span, values + d, count, size, out + q * size + d);
    }
    for (int64_t d = size / LANES * LANES; d < size; d++)
        for (q = 0; q < queries; q++)
            for (int64_t j = 0; j < count; j++)
                out[q * size + d] = FUSED_ONE(weights[q * span + j], wide(values[j * size + d]), out[q * size + d]);
}

/* scores [count] become weights; returns one over their sum. */
static float soften(float *scores, int64_t count) {
    float most = -INFINITY;
    vec sum = {0};
    for (int64_t i = 0; i < count; i++) most = scores[i] > most ? scores[i] : most;
    for (int64_t i = count; i < (count + LANES - 1) / LANES * LANES; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < count; i += LANES) {
        vec some = exponential(*(loose *)(scores + i) - most);
        *(loose *)(scores + i) = some;
        sum += some;
    }
    return 1.0f / total(sum);
}

#endif
