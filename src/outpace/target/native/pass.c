/* A pass of few rows through a decoder on a CPU, in one call: every weight is read once, in the order it lies in.

   Compiled by `build.py` for the processor it runs on, once with HALF=0 (float32) and once with HALF=1 (bfloat16).
   Threads are those of PyTorch's OpenMP runtime: one parallel region a pass, with barriers between its steps.

   A row's bits do not depend on what stands beside it: each of its dot products runs along its depth in one vector
   accumulator that is added up in one way, whatever tile it stands in; attention sums over the entries a row sees in the
   order of their positions, and nothing else. So a row of a tree has the bits it has in plain decoding.

   In bfloat16 sums are float32 and so is the residual stream; what enters a product is rounded, and so are keys, values
   and what is handed out. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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
#define MOST_ROWS 512 /* of a pass, all requests together */
#if MATRIX
#define GROUP 16      /* weight rows a thread takes at a time: those of a tile register */
#else
#define GROUP 12      /* weight rows a thread takes at a time; a multiple of the tiles' 3, 4 and 6 */
#endif
#define MOST_GROUP 64 /* query heads that share a key head */
#define BLOCK 4       /* rows of a request that attend together */
#define KEYS 48       /* keys whose values stay in the first cache while all queries read them; a multiple of GROUP */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));

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

/* ---- what Python hands over (mirrored in `native/structs.py`) ------------------------------------------------------- */

struct part { /* a low-rank tail of the weight rows before `end` and behind the part in front; without one, rank 0 */
    const number *down, *up;
    int64_t end, rank;
    float scale;
};

struct product {
    const number *weight, *bias;
    int64_t width, depth;
    struct part parts[3];
};

struct layer {
    struct product qkv, out, gate_up, down;
    const number *norm_attention, *norm_mlp, *norm_attention_out, *norm_mlp_out, *norm_query, *norm_key;
    int64_t window; /* 0: none */
    int64_t kind;   /* which rotary angles */
};

struct model {
    int64_t hidden, inner, heads, key_heads, size;
    int64_t gelu, norm_all; /* norm_all: query and key norms go over all heads together */
    float eps, shift, scaling;
    const number *norm;
    struct product head;
};

struct run {
    int64_t threads, batch, main, rows, first, capacity; /* rows: per request, scouts included */
    int64_t layers, longest;                           /* longest: entries any row may see */
    const struct layer *const *layer;                  /* those that run, in their order */
    number *const *keys, *const *values;               /* of each of them: [slots, key heads, capacity, size] */
    const int64_t *lengths;                            /* [batch] committed entries */
    const int64_t *positions;                          /* [batch, rows] */
    const uint8_t *sees;                               /* [batch, rows, rows], or none: chains */
    const float *cos[2], *sin[2];                      /* by kind: [batch, rows, size / 2] */
    float *hidden;                                     /* [batch, rows, hidden]: embeddings, then the stream */
    number *const *before, *const *behind;             /* taps of each layer: [batch, rows, hidden] or none */
    number *pre_norm, *post_norm;
    number *logits;                                    /* [batch * (head_to - head_from), vocabulary] or none */
    int64_t head_from, head_to;                        /* rows of each request that need logits */
    int64_t ranks;                                     /* most of any tail: 0 without an adapter */
    char *space;
};

/* ---- buffers -------------------------------------------------------------------------------------------------------- */

struct buffers {
    input *normed, *attended, *inner, *last, *low, *packed;
    float *joined, *added, *scores;
};

#define WIDE 16 /* rows of x in a tile register of the matrix unit */
#define DEEP 32 /* numbers of depth in one */
#define PACKED_SIZE(rows, depth) (((rows) + WIDE - 1) / WIDE * WIDE * (depth))

/* Scores of a query, in whole vectors. */
static int64_t span_of(const struct run *run) { return (run->longest + LANES - 1) / LANES * LANES; }

/* Floats a thread needs while it attends: for each query its scores, the sum of values, and itself. */
static int64_t room_of(const struct model *m, const struct run *run) {
    return BLOCK * (m->heads / m->key_heads) * (span_of(run) + 2 * m->size);
}

static int64_t widest_of(const struct model *m) {
    int64_t widest = m->hidden > m->inner ? m->hidden : m->inner;
    return widest > m->heads * m->size ? widest : m->heads * m->size;
}

static int64_t lay_out(const struct model *m, const struct run *run, struct buffers *b) {
    int64_t rows = run->batch * run->rows, at = 0, joined = (m->heads + 2 * m->key_heads) * m->size;
#define PIECE(name, type, count)                          \
    b->name = (type *)(run->space + at);                  \
    at += ((int64_t)(count) * sizeof(type) + 63) / 64 * 64
    PIECE(normed, input, rows * m->hidden);
    PIECE(attended, input, rows * m->heads * m->size);
    PIECE(inner, input, rows * m->inner);
    PIECE(last, input, rows * m->hidden);
    PIECE(low, input, 3 * rows * run->ranks);
    PIECE(packed, input, MATRIX ? PACKED_SIZE(rows, widest_of(m)) : 0);
    PIECE(joined, float, rows * joined);
    PIECE(added, float, rows * m->hidden);
    PIECE(scores, float, run->threads * room_of(m, run));
#undef PIECE
    return at;
}

int64_t outpace_space(const struct model *m, const struct run *run) {
    struct buffers b;
    return lay_out(m, run, &b);
}

int64_t outpace_sizes(int64_t which) {
    const int64_t sizes[] = {sizeof(struct part), sizeof(struct product), sizeof(struct layer), sizeof(struct model),
                             sizeof(struct run), MOST_ROWS, MOST_GROUP};
    return sizes[which];
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

/* ---- the matrix unit: weight rows as they lie are one factor, rows of x packed in pairs the other --------------------- */

INLINE int takes_matrix(int64_t depth) { return MATRIX && depth % DEEP == 0; }

/* x [rows, depth] into blocks of WIDE rows, steps of DEEP, pairs: [block][step][pair][row][2]; missing rows are zero. */
static void pack(const input *x, int64_t rows, int64_t depth, input *packed) {
    if (!takes_matrix(depth)) return;
    int64_t steps = depth / DEEP, blocks = (rows + WIDE - 1) / WIDE;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * steps; i++) {
        int64_t block = i / steps, step = i % steps;
        for (int64_t r = 0; r < WIDE; r++) {
            int64_t row = block * WIDE + r;
            for (int64_t pair = 0; pair < DEEP / 2; pair++) {
                uint32_t both = 0;
                if (row < rows) memcpy(&both, x + row * depth + step * DEEP + 2 * pair, sizeof both);
                memcpy(packed + i * WIDE * DEEP + (pair * WIDE + r) * 2, &both, sizeof both);
            }
        }
    }
}

#if MATRIX
struct tiles { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } __attribute__((aligned(64)));

static void open_tiles(struct tiles *before) {
    struct tiles tiles = {.palette = 1};
    for (int i = 0; i < 6; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    _tile_storeconfig(before); /* PyTorch's own kernels may count on theirs */
    _tile_loadconfig(&tiles);
}

static void close_tiles(const struct tiles *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

/* Packed rows times GROUP weight rows into out [rows, GROUP], four blocks of rows for each reading of the weights. */
static void matrix_group(const input *packed, const number *w, int64_t rows, int64_t depth, float *out) {
    int64_t steps = depth / DEEP, blocks = (rows + WIDE - 1) / WIDE, size = WIDE * DEEP;
    float sums[4][GROUP * WIDE] __attribute__((aligned(64)));
    for (int64_t b = 0; b < blocks; b += 4) {
        const input *x = packed + b * steps * size;
        int64_t some = blocks - b < 4 ? blocks - b : 4;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < steps; step++) {
            _tile_loadd(4, w + step * DEEP, depth * sizeof(number));
            if (!b)
                for (int r = 0; r < GROUP; r++) __builtin_prefetch(w + (GROUP + r) * depth + step * DEEP, 0, 3);
            _tile_loadd(5, x + step * size, 64);
            _tile_dpbf16ps(0, 4, 5);
            if (some > 1) {
                _tile_loadd(5, x + (steps + step) * size, 64);
                _tile_dpbf16ps(1, 4, 5);
            }
            if (some > 2) {
                _tile_loadd(5, x + (2 * steps + step) * size, 64);
                _tile_dpbf16ps(2, 4, 5);
            }
            if (some > 3) {
                _tile_loadd(5, x + (3 * steps + step) * size, 64);
                _tile_dpbf16ps(3, 4, 5);
            }
        }
        _tile_stored(0, sums[0], 64);
        if (some > 1) _tile_stored(1, sums[1], 64);
        if (some > 2) _tile_stored(2, sums[2], 64);
        if (some > 3) _tile_stored(3, sums[3], 64);
        for (int64_t r = b * WIDE; r < rows && r < (b + 4) * WIDE; r++)
            for (int c = 0; c < GROUP; c++) out[r * GROUP + c] = sums[r / WIDE - b][c * WIDE + r % WIDE];
    }
}
#endif

/* x [rows, depth], and the same packed, times `count` weight rows into out [rows, GROUP]. */
static void weigh(const input *x, const input *packed, const number *w, int64_t rows, int64_t depth, int64_t count, float *out) {
#if MATRIX
    if (count == GROUP && takes_matrix(depth)) {
        matrix_group(packed, w, rows, depth, out);
        return;
    }
#endif
    (void)packed;
    group(x, w, rows, depth, count, out, GROUP, 1);
}

/* A request's rows from `main` on are scouts; number them through. -1: not one. */
INLINE int64_t scout_of(const struct run *run, int64_t row) {
    int64_t within = row % run->rows;
    return within < run->main ? -1 : row / run->rows * (run->rows - run->main) + within - run->main;
}

/* What the down projections make of the scouts: low [part][scout][rank]. */
static void lower(const struct run *run, const struct product *p, const input *x, input *low) {
    int64_t rows = run->batch * run->rows;
    if (!run->ranks) return;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 3 * run->ranks; i++) {
        const struct part *part = &p->parts[i / run->ranks];
        int64_t rank = i % run->ranks;
        if (rank >= part->rank) continue;
        for (int64_t row = 0; row < rows; row++) {
            int64_t scout = scout_of(run, row);
            float sum;
            if (scout < 0) continue;
            tile_1x1(x + row * p->depth, part->down + rank * p->depth, &sum, 1, p->depth, 0);
            low[(i / run->ranks * rows + scout) * run->ranks + rank] = input_of(sum);
        }
    }
}

/* Biases and tails of weight rows from .. from + count, added to out [rows, GROUP]. */
static void complete(const struct run *run, const struct product *p, const input *low, int64_t rows, int64_t from,
                     int64_t count, float *out) {
    if (p->bias)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < count; c++) out[r * GROUP + c] += wide(p->bias[from + c]);
    if (!run->ranks) return;
    for (int64_t c = 0; c < count; c++) {
        int64_t column = from + c, which = (column >= p->parts[0].end) + (column >= p->parts[1].end);
        const struct part *part = &p->parts[which];
        int64_t begin = which ? p->parts[which - 1].end : 0;
        if (!part->rank) continue;
        for (int64_t r = 0; r < rows; r++) {
            int64_t scout = scout_of(run, r);
            float sum;
            if (scout < 0) continue;
            tile_1x1(low + (which * rows + scout) * run->ranks, part->up + (column - begin) * part->rank, &sum, 1, part->rank, 0);
            out[r * GROUP + c] += part->scale * sum;
        }
    }
}

enum use { STORE, ADD, LOGITS };

/* x times the weight into `to` [rows, width]: stored, added, or handed out. */
static void multiply(const struct run *run, const struct product *p, const input *x, input *packed, const input *low,
                     int64_t rows, enum use use, void *to) {
    pack(x, rows, p->depth, packed);
    int64_t groups = (p->width + GROUP - 1) / GROUP, each = groups / (4 * run->threads) + 1;
#pragma omp for schedule(dynamic, each)
    for (int64_t g = 0; g < groups; g++) {
        float out[MOST_ROWS * GROUP];
        int64_t from = g * GROUP, count = p->width - from < GROUP ? p->width - from : GROUP;
        weigh(x, packed, p->weight + from * p->depth, rows, p->depth, count, out);
        if (use != LOGITS) complete(run, p, low, rows, from, count, out);
        else if (p->bias)
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < count; c++) out[r * GROUP + c] += wide(p->bias[from + c]);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < count; c++) {
                int64_t at = r * p->width + from + c;
                if (use == STORE) ((float *)to)[at] = out[r * GROUP + c];
                if (use == ADD) ((float *)to)[at] += out[r * GROUP + c];
                if (use == LOGITS) ((number *)to)[at] = narrow(out[r * GROUP + c]);
            }
    }
}

INLINE vec activated(vec gate, vec up, int64_t gelu) {
    vec inner = gelu ? (gate + gate * gate * gate * 0.044715f) * 1.5957691216057308f : gate;
    return gate / (exponential(-inner) + 1.0f) * up;
}

/* act(x @ gate.T) * (x @ up.T) into inner [rows, width / 2]. */
static void gate(const struct model *m, const struct run *run, const struct product *p, const input *x,
                 input *packed, const input *low, int64_t rows, input *inner) {
    pack(x, rows, p->depth, packed);
    int64_t width = p->width / 2, groups = (width + GROUP - 1) / GROUP, each = groups / (4 * run->threads) + 1;
#pragma omp for schedule(dynamic, each)
    for (int64_t g = 0; g < groups; g++) {
        float out[2][MOST_ROWS * GROUP + LANES];
        int64_t from = g * GROUP, count = width - from < GROUP ? width - from : GROUP;
        for (int half = 0; half < 2; half++) {
            weigh(x, packed, p->weight + (half * width + from) * p->depth, rows, p->depth, count, out[half]);
            complete(run, p, low, rows, half * width + from, count, out[half]);
        }
        for (int64_t i = 0; i < rows * GROUP; i += LANES)
            *(loose *)(out[0] + i) = activated(*(loose *)(out[0] + i), *(loose *)(out[1] + i), m->gelu);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < count; c++) inner[r * width + from + c] = input_of(out[0][r * GROUP + c]);
    }
}

/* ---- rows between products -------------------------------------------------------------------------------------------- */

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

INLINE float scaled(const struct model *m, float value, float inverse, number gamma) {
    return value * inverse * (wide(gamma) + m->shift);
}

static void hand_out(const float *from, int64_t count, number *to) {
    if (to)
        for (int64_t i = 0; i < count; i++) to[i] = narrow(from[i]);
}

/* Between two blocks: add the norm `behind` of what the last one made (if it has one), hand out the stream, and round
   what enters the next one: the norm `before` of the stream, or the stream. */
static void between(const struct model *m, const struct run *run, const struct buffers *b, const number *behind,
                    const number *before, number *tap, number *other, input *to) {
    int64_t rows = run->batch * run->rows, n = m->hidden;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *stream = run->hidden + r * n;
        if (behind) {
            const float *added = b->added + r * n;
            float inverse = inverse_rms(added, n, m->eps);
            for (int64_t i = 0; i < n; i++) stream[i] += scaled(m, added[i], inverse, behind[i]);
        }
        hand_out(stream, n, tap ? tap + r * n : NULL);
        hand_out(stream, n, other ? other + r * n : NULL);
        if (before) {
            float inverse = inverse_rms(stream, n, m->eps);
            for (int64_t i = 0; i < n; i++) to[r * n + i] = input_of(scaled(m, stream[i], inverse, before[i]));
        } else {
            for (int64_t i = 0; i < n; i++) to[r * n + i] = input_of(stream[i]);
        }
    }
}

/* Norms of queries and keys, rotation, and the cache: queries stay in `joined`, keys and values go behind `lengths`. */
static void turn(const struct model *m, const struct run *run, const struct layer *layer, const struct buffers *b,
                 number *keys, number *values) {
    int64_t rows = run->batch * run->rows, size = m->size, half = size / 2, turned = m->heads + m->key_heads;
    int64_t width = (turned + m->key_heads) * size;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *row = b->joined + r * width;
        const float *cos = run->cos[layer->kind] + r * half, *sin = run->sin[layer->kind] + r * half;
        int64_t request = r / run->rows, entry = run->lengths[request] + r % run->rows;
        if (layer->norm_query)
            for (int64_t h = 0; h < turned; h++) {
                int query = h < m->heads;
                const number *gamma = query ? layer->norm_query : layer->norm_key;
                float *x = row + h * size, *from = m->norm_all ? row + (query ? 0 : m->heads * size) : x;
                int64_t count = m->norm_all ? (query ? m->heads : m->key_heads) * size : size;
                if (m->norm_all && h != 0 && h != m->heads) continue;
                float inverse = inverse_rms(from, count, m->eps);
                for (int64_t i = 0; i < count; i++) from[i] = scaled(m, from[i], inverse, gamma[i]);
            }
        for (int64_t h = 0; h < turned; h++) {
            float *x = row + h * size;
            for (int64_t i = 0; i < half; i++) {
                float one = x[i], two = x[i + half];
                x[i] = one * cos[i] - two * sin[i];
                x[i + half] = two * cos[i] + one * sin[i];
            }
        }
        for (int64_t h = 0; h < m->key_heads; h++) {
            int64_t at = (((run->first + request) * m->key_heads + h) * run->capacity + entry) * size;
            hand_out(row + (m->heads + h) * size, size, keys + at);
            hand_out(row + (turned + h) * size, size, values + at);
        }
    }
}

/* ---- attention -------------------------------------------------------------------------------------------------------- */

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

INLINE int visible(const struct run *run, int64_t request, int64_t row, int64_t other, int64_t window) {
    const int64_t *positions = run->positions + request * run->rows;
    if (run->sees ? !run->sees[(request * run->rows + row) * run->rows + other] : other > row) return 0;
    return !window || positions[row] - positions[other] < window;
}

/* Rows `from` .. `to` of a request, the queries of one key head; scores: room for all of them and for their sums. */
static void attend_block(const struct model *m, const struct run *run, const struct layer *layer,
                         const struct buffers *b, const number *keys, const number *values, int64_t request,
                         int64_t head, int64_t from, int64_t to, float *scores) {
    int64_t groups = m->heads / m->key_heads, size = m->size, span = span_of(run), length = run->lengths[request];
    int64_t width = (m->heads + 2 * m->key_heads) * size, queries = (to - from) * groups;
    int64_t chained = run->sees ? 0 : from; /* rows of the block that all of these see, as they see committed entries */
    int64_t known = length + chained, lowest = known;
    int64_t starts[BLOCK], counts[BLOCK];
    float *sums = scores + queries * span;
    input *asked = (input *)(sums + queries * size);
    keys += ((run->first + request) * m->key_heads + head) * run->capacity * size;
    values += ((run->first + request) * m->key_heads + head) * run->capacity * size;
    for (int64_t i = 0; i < to - from; i++) {
        int64_t row = request * run->rows + from + i, start = run->positions[row] - layer->window + 1;
        starts[i] = layer->window && start > 0 ? (start < known ? start : known) : 0;
        lowest = starts[i] < lowest ? starts[i] : lowest;
        for (int64_t q = 0; q < groups * size; q++)
            asked[i * groups * size + q] = input_of(b->joined[row * width + head * groups * size + q]);
    }
    /* Scores of known entries stand at their distance from the first one a row sees. */
    for (int64_t j = lowest; j < known; j += GROUP) {
        float out[BLOCK * MOST_GROUP * GROUP];
        int64_t count = known - j < GROUP ? known - j : GROUP;
        group(asked, keys + j * size, queries, size, count, out, GROUP, 0);
        for (int64_t q = 0; q < queries; q++) {
            int64_t start = starts[q / groups];
            for (int64_t c = start > j ? start - j : 0; c < count; c++)
                scores[q * span + j + c - start] = out[q * GROUP + c] * m->scaling;
        }
    }
    for (int64_t i = 0; i < to - from; i++) {
        counts[i] = known - starts[i];
        for (int64_t other = chained; other < run->rows; other++) {
            if (!visible(run, request, from + i, other, layer->window)) continue;
            for (int64_t q = i * groups; q < (i + 1) * groups; q++) {
                float *score = scores + q * span + counts[i];
                tile_1x1(asked + q * size, keys + (length + other) * size, score, 1, size, 0);
                *score *= m->scaling;
            }
            counts[i]++;
        }
    }
    float inverse[BLOCK * MOST_GROUP];
    memset(sums, 0, queries * size * sizeof(float));
    for (int64_t q = 0; q < queries; q++) inverse[q] = soften(scores + q * span, counts[q / groups]);
    int64_t each = layer->window ? groups : queries; /* queries whose entries begin at one place */
    for (int64_t j = lowest; j < known; j += KEYS)
        for (int64_t q = 0; q < queries; q += each) {
            int64_t start = starts[q / groups], begin = start > j ? start : j, end = j + KEYS < known ? j + KEYS : known;
            if (begin < end)
                gather(scores + q * span + begin - start, span, values + begin * size, end - begin, size, sums + q * size, each);
        }
    for (int64_t i = 0; i < to - from; i++) {
        int64_t at = known - starts[i], first = i * groups;
        for (int64_t other = chained; other < run->rows; other++)
            if (visible(run, request, from + i, other, layer->window))
                gather(scores + first * span + at++, span, values + (length + other) * size, 1, size, sums + first * size, groups);
        int64_t row = request * run->rows + from + i;
        for (int64_t q = 0; q < groups; q++)
            for (int64_t d = 0; d < size; d++)
                b->attended[(row * m->heads + head * groups + q) * size + d] =
                    input_of(sums[(i * groups + q) * size + d] * inverse[i * groups + q]);
    }
}

extern int omp_get_thread_num(void);

static void attend(const struct model *m, const struct run *run, const struct layer *layer, const struct buffers *b,
                   const number *keys, const number *values) {
    int64_t blocks = (run->rows + BLOCK - 1) / BLOCK;
    int64_t room = room_of(m, run);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < run->batch * m->key_heads * blocks; i++) {
        int64_t from = i % blocks * BLOCK, to = from + BLOCK < run->rows ? from + BLOCK : run->rows;
        int64_t head = i / blocks % m->key_heads, request = i / blocks / m->key_heads;
        attend_block(m, run, layer, b, keys, values, request, head, from, to, b->scores + omp_get_thread_num() * room);
    }
}

/* ---- the pass --------------------------------------------------------------------------------------------------------- */

static void run_layer(const struct model *m, const struct run *run, const struct buffers *b, int64_t i) {
    const struct layer *layer = run->layer[i];
    int64_t rows = run->batch * run->rows;
    number *behind_last = i ? run->behind[i - 1] : NULL;
    between(m, run, b, i ? run->layer[i - 1]->norm_mlp_out : NULL, layer->norm_attention, behind_last, run->before[i], b->normed);
    lower(run, &layer->qkv, b->normed, b->low);
    multiply(run, &layer->qkv, b->normed, b->packed, b->low, rows, STORE, b->joined);
    turn(m, run, layer, b, run->keys[i], run->values[i]);
    attend(m, run, layer, b, run->keys[i], run->values[i]);
    lower(run, &layer->out, b->attended, b->low);
    if (layer->norm_attention_out) multiply(run, &layer->out, b->attended, b->packed, b->low, rows, STORE, b->added);
    else multiply(run, &layer->out, b->attended, b->packed, b->low, rows, ADD, run->hidden);
    between(m, run, b, layer->norm_attention_out, layer->norm_mlp, NULL, NULL, b->normed);
    lower(run, &layer->gate_up, b->normed, b->low);
    gate(m, run, &layer->gate_up, b->normed, b->packed, b->low, rows, b->inner);
    lower(run, &layer->down, b->inner, b->low);
    if (layer->norm_mlp_out) multiply(run, &layer->down, b->inner, b->packed, b->low, rows, STORE, b->added);
    else multiply(run, &layer->down, b->inner, b->packed, b->low, rows, ADD, run->hidden);
}

static void finish(const struct model *m, const struct run *run, const struct buffers *b) {
    int64_t n = m->hidden, wanted = run->head_to - run->head_from;
    const struct layer *last = run->layer[run->layers - 1];
    between(m, run, b, last->norm_mlp_out, m->norm, run->behind[run->layers - 1], run->pre_norm, b->normed);
    if (run->post_norm)
#pragma omp for schedule(static)
        for (int64_t i = 0; i < run->batch * run->rows * n; i++) run->post_norm[i] = narrow(value_of(b->normed[i]));
    if (!run->logits) return;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < run->batch * wanted; i++)
        memcpy(b->last + i * n, b->normed + (i / wanted * run->rows + run->head_from + i % wanted) * n, n * sizeof(input));
    multiply(run, &m->head, b->last, b->packed, NULL, run->batch * wanted, LOGITS, run->logits);
}

void outpace_pass(const struct model *m, const struct run *run) {
    struct buffers b;
    lay_out(m, run, &b);
#pragma omp parallel num_threads((int)run->threads)
    {
#if MATRIX
        struct tiles before;
        open_tiles(&before);
#endif
        for (int64_t i = 0; i < run->layers; i++) run_layer(m, run, &b, i);
        finish(m, run, &b);
#if MATRIX
        close_tiles(&before);
#endif
    }
}

/* ---- a product alone: x [rows, depth] and out [rows, width] in the weight's dtype ------------------------------------ */

int outpace_product(const number *x, const number *weight, const number *bias, number *out, int64_t rows,
                    int64_t width, int64_t depth, int64_t threads) {
    struct run run = {.threads = threads};
    struct product product = {.weight = weight, .bias = bias, .width = width, .depth = depth};
#if HALF && !PAIRS
    input *inputs = malloc(rows * depth * sizeof(input));
    if (!inputs) return 1;
    for (int64_t i = 0; i < rows * depth; i++) inputs[i] = wide(x[i]);
#else
    const input *inputs = x;
#endif
#if MATRIX
    input *packed = aligned_alloc(64, PACKED_SIZE(rows, depth) * sizeof(input));
    if (!packed) return 1;
#else
    input *packed = NULL;
#endif
#pragma omp parallel num_threads((int)threads)
    {
#if MATRIX
        struct tiles before;
        open_tiles(&before);
#endif
        multiply(&run, &product, inputs, packed, NULL, rows, LOGITS, out);
#if MATRIX
        close_tiles(&before);
#endif
    }
#if HALF && !PAIRS
    free(inputs);
#endif
#if MATRIX
    free(packed);
#endif
    return 0;
}

/* ---- products with weights in eight bits, a scale per weight row: x and out float32 -------------------------------- */

#if !HALF
INLINE vec from_bytes(const int8_t *from) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    vec some;
    for (int i = 0; i < LANES; i++) some[i] = (float)from[i];
    return some;
#endif
}

/* R rows times C weight rows, before their scales. */
#define BYTES(R, C)                                                                                                    \
    INLINE void bytes_##R##x##C(const float *x, const int8_t *w, float *out, int64_t stride, int64_t depth) {          \
        vec sums[R][C];                                                                                                \
        int64_t k = 0;                                                                                                 \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int c = 0; c < C; c++) sums[r][c] = (vec){0};                                                         \
        for (; k + LANES <= depth; k += LANES) {                                                                       \
            vec some[C];                                                                                               \
            for (int c = 0; c < C; c++) some[c] = from_bytes(w + c * depth + k);                                       \
            if (R == 1 || k % 64 == 0)                                                                                 \
                for (int c = 0; c < C; c++) __builtin_prefetch(w + (AHEAD + c) * depth + k, 0, 3);                     \
            for (int r = 0; r < R; r++) {                                                                              \
                vec row = *(const loose *)(x + r * depth + k);                                                         \
                for (int c = 0; c < C; c++) sums[r][c] = FUSED(row, some[c], sums[r][c]);                              \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int c = 0; c < C; c++) {                                                                              \
                float sum = total(sums[r][c]);                                                                         \
                for (int64_t j = k; j < depth; j++) sum = FUSED_ONE(x[r * depth + j], (float)w[c * depth + j], sum);   \
                out[r * stride + c] = sum;                                                                             \
            }                                                                                                          \
    }

#define AHEAD 8 /* weight rows from here, those to fetch next */
BYTES(1, 1)
BYTES(1, 4)
BYTES(2, 4)
BYTES(4, 2)

struct weight { /* in eight bits with scales, or as numbers */
    const int8_t *bytes;
    const float *scales, *numbers, *bias;
    int64_t width, depth;
};

/* x [rows, depth] times four weight rows from `from` on (or what is left of them) into out [rows, width]. */
static void four_bytes(const struct weight *weight, const float *x, int64_t rows, int64_t from, float *out) {
    int64_t width = weight->width, depth = weight->depth, count = width - from < 4 ? width - from : 4, r = 0;
    const int8_t *w = weight->bytes + from * depth;
    float *to = out + from;
    if (count < 4)
        for (; r < rows; r++)
            for (int64_t c = 0; c < count; c++) bytes_1x1(x + r * depth, w + c * depth, to + r * width + c, width, depth);
    for (; r + 4 <= rows; r += 4)
        for (int c = 0; c < 4; c += 2) bytes_4x2(x + r * depth, w + c * depth, to + r * width + c, width, depth);
    for (; r + 2 <= rows; r += 2) bytes_2x4(x + r * depth, w, to + r * width, width, depth);
    for (; r < rows; r++) bytes_1x4(x + r * depth, w, to + r * width, width, depth);
    for (r = 0; r < rows; r++)
        for (int64_t c = 0; c < count; c++)
            to[r * width + c] = FUSED_ONE(to[r * width + c], weight->scales[from + c], weight->bias ? weight->bias[from + c] : 0.0f);
}

/* x [rows, depth] into out [rows, width], by all threads of a region. */
static void apply(const struct weight *weight, const float *x, int64_t rows, float *out, int64_t threads) {
    if (weight->bytes) {
        int64_t groups = (weight->width + 3) / 4, each = groups / (4 * threads) + 1;
#pragma omp for schedule(dynamic, each)
        for (int64_t g = 0; g < groups; g++) four_bytes(weight, x, rows, 4 * g, out);
    } else {
        struct run run = {.threads = threads};
        struct product product = {
            .weight = weight->numbers, .bias = weight->bias, .width = weight->width, .depth = weight->depth};
        multiply(&run, &product, x, NULL, NULL, rows, LOGITS, out);
    }
}

void outpace_apply(const struct weight *weight, const float *x, float *out, int64_t rows, int64_t threads) {
#pragma omp parallel num_threads((int)threads)
    apply(weight, x, rows, out, threads);
}

/* ---- a drafter's block, float32: what stands before attention, and what stands behind it ---------------------------- */

/* Queries, keys and values of x, the first two rotated. weights: three. cos, sin: [rows, size], both halves alike. */
void outpace_heads(const struct weight *weights, const float *x, const float *cos, const float *sin, float *queries,
                   float *keys, float *values, int64_t rows, int64_t size, int64_t threads) {
    float *to[] = {queries, keys, values};
#pragma omp parallel num_threads((int)threads)
    {
        for (int i = 0; i < 3; i++) apply(weights + i, x, rows, to[i], threads);
        for (int i = 0; i < 2; i++) {
            int64_t width = weights[i].width, half = size / 2;
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r++)
                for (float *head = to[i] + r * width; head < to[i] + (r + 1) * width; head += size)
                    for (int64_t j = 0; j < half; j++) {
                        float one = head[j], two = head[j + half], c = cos[r * size + j], s = sin[r * size + j];
                        head[j] = one * c - two * s;
                        head[j + half] = two * c + one * s;
                    }
        }
    }
}

/* residual + out(attended), and the gated part behind the norm added. weights: out, gate, up, down. space: room for
   rows * (2 * hidden + 2 * inner). */
void outpace_finish(const struct weight *weights, const float *residual, const float *attended, const float *gamma,
                    float eps, float *out, float *space, int64_t rows, int64_t threads) {
    int64_t hidden = weights[0].width, inner = weights[1].width;
    float *added = space, *normed = added + rows * hidden, *gates = normed + rows * hidden, *ups = gates + rows * inner;
#pragma omp parallel num_threads((int)threads)
    {
        apply(weights, attended, rows, added, threads);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            float *row = out + r * hidden;
            for (int64_t i = 0; i < hidden; i++) row[i] = residual[r * hidden + i] + added[r * hidden + i];
            float inverse = inverse_rms(row, hidden, eps);
            for (int64_t i = 0; i < hidden; i++) normed[r * hidden + i] = row[i] * inverse * gamma[i];
        }
        apply(weights + 1, normed, rows, gates, threads);
        apply(weights + 2, normed, rows, ups, threads);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            int64_t i = 0;
            float *gate = gates + r * inner, *up = ups + r * inner;
            for (; i + LANES <= inner; i += LANES) *(loose *)(gate + i) = activated(*(loose *)(gate + i), *(loose *)(up + i), 0);
            for (; i < inner; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
        }
        apply(weights + 3, gates, rows, added, threads);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * hidden; i++) out[i] += added[i];
    }
}
#endif
