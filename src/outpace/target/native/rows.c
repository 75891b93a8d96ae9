/* Few rows beside a pass, on a CPU: products with weights in eight bits, and networks that follow rows (drafters').

   Compiled once, with HALF=0: rows, sums, keys and values are float32. A network reads its rows, or a level of a growing
   tree, in one call (`outpace_rows`), and the best tokens behind rows come out of another (`outpace_best`); their
   definition is `drafters.growth`. Threads are those of PyTorch's OpenMP runtime. */

#include "arithmetic.h"

#define PIECE 2048 /* tokens of a vocabulary whose best a thread looks for at a time; a multiple of LANES */

/* ---- products with weights in eight bits, a scale per weight row ------------------------------------------------------ */

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
        int64_t groups = (weight->width + 3) / 4, each = share_of(groups, threads);
        SHARED(g, groups, each) four_bytes(weight, x, rows, 4 * g, out);
        meet();
    } else {
        int64_t groups = (weight->width + GROUP - 1) / GROUP, each = share_of(groups, threads);
        SHARED(g, groups, each) {
            int64_t from = g * GROUP, count = weight->width - from < GROUP ? weight->width - from : GROUP;
            group(x, weight->numbers + from * weight->depth, rows, weight->depth, count, out + from, weight->width, 1);
            if (weight->bias)
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = from; c < from + count; c++) out[r * weight->width + c] += weight->bias[c];
        }
        meet();
    }
}

void outpace_apply(const struct weight *weight, const float *x, float *out, int64_t rows, int64_t threads) {
    struct team team = {0};
#pragma omp parallel num_threads((int)threads)
    {
        join_team(&team);
        apply(weight, x, rows, out, threads);
    }
}

/* ---- a network that follows rows (mirrored in `native/structs.py`; see `drafters.device.plan.RowPlan`) ---------------- */

struct block {
    struct weight qkv, out, gate_up, down;
    const float *norm_attention, *norm_mlp; /* the first: none where what it reads has been normed */
};

struct net {
    int64_t hidden, inner, heads, key_heads, size, layers, taps;
    int64_t embedding_first, residual, feeds_normed; /* residual: of the first block, see `residuals` */
    float eps, scaling;
    const float *const *tap_norms;                   /* one a tap, or none */
    const float *fuse_norm, *norm_embedding, *norm_state, *norm;
    struct weight fuse, join, head;                  /* width 0: there is none */
    const struct block *blocks;
    const int64_t *offsets;                          /* draft id -> target id less draft id, or none */
};

enum residuals { JOINED, STATE, NORMED_STATE };

struct level {
    int64_t threads, batch, rows; /* rows: per request */
    int64_t chain;                /* rows follow each other from `at` on, each sees those before; else see `sees` */
    int64_t ahead, offset;        /* not a chain: rows stand at position at + ahead, at entry at + offset */
    int64_t scratch;              /* entries behind `at` that `sees` speaks of */
    int64_t capacity, longest;    /* longest: entries any row may see */
    const int64_t *at, *slots;    /* [batch]: rows kept, and where; slots: none for the first ones */
    const uint8_t *sees;          /* [batch, rows, scratch] */
    const float *cos, *sin;       /* [positions, size / 2] */
    float *const *keys, *const *values; /* of each layer: [slots, key heads, capacity, size] */
    const float *embedded;        /* [batch, rows, hidden] */
    const float *features;        /* [batch, rows, taps * hidden], of which states are made, or none */
    const float *states;          /* [batch, rows, hidden]: outputs of the level before */
    float *out;                   /* [batch, rows, hidden] */
    char *space;
};

struct choice {
    int64_t threads, rows, each, count, stride; /* each: rows of a request; count: tokens wanted of a row */
    const float *y;                     /* [rows, hidden]: outputs of the network */
    const float *heat;                  /* [requests]: temperatures, none: one for all */
    const float *race;                  /* noise added to a request's logits [vocabulary], `stride` apart, or none */
    float *values;                      /* [rows, count]: log probabilities */
    int64_t *ids;                       /* [rows, count]: target ids */
    char *space;
};

struct room {
    float *both, *state, *residual, *normed, *joined, *attended, *added, *gates, *inner, *wide, *scores;
};

static int64_t span_of(const struct level *v) { return (v->longest + LANES - 1) / LANES * LANES; }

/* Floats a thread needs while it attends: for each query its scores, the sum of values, and itself. */
static int64_t room_of(const struct net *n, const struct level *v) {
    return BLOCK * (n->heads / n->key_heads) * (span_of(v) + 2 * n->size);
}

static int64_t lay_out(const struct net *n, const struct level *v, struct room *b) {
    int64_t rows = v->batch * v->rows, at = 0;
    char *space = v->space;
    LAY(b->both, float, rows * 2 * n->hidden);
    LAY(b->state, float, rows * n->hidden);
    LAY(b->residual, float, rows * n->hidden);
    LAY(b->normed, float, rows * n->hidden);
    LAY(b->joined, float, rows * (n->heads + 2 * n->key_heads) * n->size);
    LAY(b->attended, float, rows * n->heads * n->size);
    LAY(b->added, float, rows * n->hidden);
    LAY(b->gates, float, rows * 2 * n->inner);
    LAY(b->inner, float, rows * n->inner);
    LAY(b->wide, float, v->features ? rows * n->taps * n->hidden : 0);
    LAY(b->scores, float, v->threads * room_of(n, v));
    return at;
}

int64_t outpace_rows_space(const struct net *n, const struct level *v) {
    struct room b;
    return lay_out(n, v, &b);
}

int64_t outpace_rows_sizes(int64_t which) {
    const int64_t sizes[] = {sizeof(struct weight), sizeof(struct block), sizeof(struct net), sizeof(struct level),
                             sizeof(struct choice), MOST_GROUP};
    return sizes[which];
}

/* to [count] = x / rms(x) * gamma, or x where there is no gamma. */
static void norm(const float *x, const float *gamma, int64_t count, float eps, float *to) {
    float inverse = gamma ? inverse_rms(x, count, eps) : 1.0f;
    for (int64_t i = 0; i < count; i++) to[i] = gamma ? x[i] * inverse * gamma[i] : x[i];
}

/* What the first block reads, and what it adds to: the states, from features or outputs, beside the embeddings. */
static void enter(const struct net *n, const struct level *v, const struct room *b) {
    int64_t rows = v->batch * v->rows, h = n->hidden, all = n->taps * h;
    const float *source = v->states;
    if (v->features) {
        source = v->features;
        if (n->tap_norms || n->fuse_norm) {
            source = b->wide;
            EACH(r, rows) {
                if (n->fuse_norm) norm(v->features + r * all, n->fuse_norm, all, n->eps, b->wide + r * all);
                for (int64_t t = 0; n->tap_norms && t < n->taps; t++)
                    norm(v->features + r * all + t * h, n->tap_norms[t], h, n->eps, b->wide + r * all + t * h);
            }
            meet();
        }
        if (n->fuse.width) {
            apply(&n->fuse, source, rows, b->state, v->threads);
            source = b->state;
        }
    }
    EACH(r, rows) {
        float *state = b->residual + r * h, *both = b->both + r * 2 * h;
        norm(source + r * h, !v->features && n->feeds_normed ? n->norm : NULL, h, n->eps, state);
        norm(v->embedded + r * h, n->norm_embedding, h, n->eps, both + (n->embedding_first ? 0 : h));
        norm(state, n->norm_state, h, n->eps, both + (n->embedding_first ? h : 0));
        if (n->residual == NORMED_STATE) memcpy(state, both + (n->embedding_first ? h : 0), h * sizeof(float));
    }
    meet();
    if (n->join.width) {
        apply(&n->join, b->both, rows, b->state, v->threads);
        if (n->residual == JOINED)
            EACH(i, rows * h) b->residual[i] = b->state[i];
    }
}

/* Rotate queries and keys; keys and values go to their entries. */
static void turn(const struct net *n, const struct level *v, const struct room *b, float *keys, float *values) {
    int64_t rows = v->batch * v->rows, size = n->size, half = size / 2, turned = n->heads + n->key_heads;
    EACH(r, rows) {
        int64_t request = r / v->rows, own = r % v->rows, slot = v->slots ? v->slots[request] : request;
        int64_t position = v->at[request] + (v->chain ? own : v->ahead), entry = v->at[request] + v->offset + own;
        const float *cos = v->cos + position * half, *sin = v->sin + position * half;
        float *row = b->joined + r * (turned + n->key_heads) * size;
        for (int64_t head = 0; head < turned; head++) rotate(row + head * size, half, cos, sin);
        for (int64_t head = 0; head < n->key_heads; head++) {
            int64_t to = ((slot * n->key_heads + head) * v->capacity + entry) * size;
            memcpy(keys + to, row + (n->heads + head) * size, size * sizeof(float));
            memcpy(values + to, row + (turned + head) * size, size * sizeof(float));
        }
    }
    meet();
}

/* Rows from .. to of a request, the queries of one key head. */
static void attend_rows(const struct net *n, const struct level *v, const struct room *b, const float *keys,
                        const float *values, int64_t request, int64_t head, int64_t from, int64_t to, float *scores) {
    int64_t groups = n->heads / n->key_heads, size = n->size, span = span_of(v), kept = v->at[request];
    int64_t width = (n->heads + 2 * n->key_heads) * size, queries = (to - from) * groups;
    int64_t known = kept + (v->chain ? to : v->scratch), slot = v->slots ? v->slots[request] : request;
    float *sums = scores + queries * span, *query = sums + queries * size, inverse[BLOCK * MOST_GROUP];
    keys += (slot * n->key_heads + head) * v->capacity * size;
    values += (slot * n->key_heads + head) * v->capacity * size;
    for (int64_t i = 0; i < to - from; i++)
        memcpy(query + i * groups * size, b->joined + (request * v->rows + from + i) * width + head * groups * size,
               groups * size * sizeof(float));
    for (int64_t j = 0; j < known; j += GROUP) {
        float out[BLOCK * MOST_GROUP * GROUP];
        int64_t count = known - j < GROUP ? known - j : GROUP;
        group(query, keys + j * size, queries, size, count, out, GROUP, 0);
        for (int64_t q = 0; q < queries; q++)
            for (int64_t c = 0; c < count; c++) scores[q * span + j + c] = out[q * GROUP + c] * n->scaling;
    }
    for (int64_t i = 0; i < to - from; i++)
        for (int64_t other = 0; other < known - kept; other++) {
            int64_t row = from + i;
            if (v->chain ? other <= row : v->sees[(request * v->rows + row) * v->scratch + other]) continue;
            for (int64_t q = i * groups; q < (i + 1) * groups; q++) scores[q * span + kept + other] = -INFINITY;
        }
    for (int64_t q = 0; q < queries; q++) inverse[q] = soften(scores + q * span, known);
    memset(sums, 0, queries * size * sizeof(float));
    for (int64_t j = 0; j < known; j += KEYS)
        gather(scores + j, span, values + j * size, known - j < KEYS ? known - j : KEYS, size, sums, queries);
    for (int64_t i = 0; i < to - from; i++) {
        float *out = b->attended + ((request * v->rows + from + i) * n->heads + head * groups) * size;
        for (int64_t j = 0; j < groups * size; j++) out[j] = sums[i * groups * size + j] * inverse[i * groups + j / size];
    }
}

static void attend(const struct net *n, const struct level *v, const struct room *b, const float *keys, const float *values) {
    int64_t blocks = (v->rows + BLOCK - 1) / BLOCK, room = room_of(n, v);
    SHARED(i, v->batch * n->key_heads * blocks, 1) {
        int64_t from = i % blocks * BLOCK, to = from + BLOCK < v->rows ? from + BLOCK : v->rows;
        int64_t head = i / blocks % n->key_heads, request = i / blocks / n->key_heads;
        attend_rows(n, v, b, keys, values, request, head, from, to, b->scores + here.me * room);
    }
    meet();
}

static void run_block(const struct net *n, const struct level *v, const struct room *b, int64_t layer, const float *source,
                      float *out) {
    const struct block *block = n->blocks + layer;
    int64_t rows = v->batch * v->rows, h = n->hidden, inner = n->inner;
    if (block->norm_attention) {
        EACH(r, rows) norm(source + r * h, block->norm_attention, h, n->eps, b->normed + r * h);
        meet();
        source = b->normed;
    }
    apply(&block->qkv, source, rows, b->joined, v->threads);
    turn(n, v, b, v->keys[layer], v->values[layer]);
    attend(n, v, b, v->keys[layer], v->values[layer]);
    apply(&block->out, b->attended, rows, b->added, v->threads);
    EACH(r, rows) {
        float *row = b->residual + r * h;
        for (int64_t i = 0; i < h; i++) row[i] += b->added[r * h + i];
        norm(row, block->norm_mlp, h, n->eps, b->normed + r * h);
    }
    meet();
    apply(&block->gate_up, b->normed, rows, b->gates, v->threads);
    EACH(r, rows) {
        const float *gate = b->gates + r * 2 * inner, *up = gate + inner;
        float *to = b->inner + r * inner;
        int64_t i = 0;
        for (; i + LANES <= inner; i += LANES)
            *(loose *)(to + i) = activated(*(const loose *)(gate + i), *(const loose *)(up + i), 0);
        for (; i < inner; i++) to[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
    meet();
    apply(&block->down, b->inner, rows, b->added, v->threads);
    EACH(i, rows * h) out[i] = b->residual[i] += b->added[i];
    meet();
}

/* Read rows: their keys and values into the cache, the network's outputs into `out`. */
void outpace_rows(const struct net *n, const struct level *v) {
    struct room b;
    lay_out(n, v, &b);
    struct team team = {0};
#pragma omp parallel num_threads((int)v->threads)
    {
        join_team(&team);
        enter(n, v, &b);
        for (int64_t i = 0; i < n->layers; i++) run_block(n, v, &b, i, i ? v->out : n->join.width ? b.state : b.both, v->out);
    }
}

/* ---- the best tokens behind rows (see `drafters.growth.children`) ------------------------------------------------------- */

struct found {
    float *normed, *logits, *peaks, *sums, *best;
    int32_t *at;
};

static int64_t pieces_of(const struct net *n) { return (n->head.width + PIECE - 1) / PIECE; }

static int64_t lay_choice(const struct net *n, const struct choice *c, struct found *f) {
    int64_t pieces = c->rows * pieces_of(n), at = 0;
    char *space = c->space;
    LAY(f->normed, float, c->rows * n->hidden);
    LAY(f->logits, float, c->rows * n->head.width);
    LAY(f->peaks, float, pieces);
    LAY(f->sums, float, pieces);
    LAY(f->best, float, pieces * c->count);
    LAY(f->at, int32_t, pieces * c->count);
    return at;
}

int64_t outpace_best_space(const struct net *n, const struct choice *c) {
    struct found f;
    return lay_choice(n, c, &f);
}

/* The largest of x [count], and where it stands first. */
static float largest(const float *x, int64_t count, int32_t *where) {
    vec most = all(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec some = *(const loose *)(x + i);
        ivec above = some > most;
        most = (vec)(((ivec)some & above) | ((ivec)most & ~above));
    }
    float best = -INFINITY;
    for (int l = 0; l < LANES; l++) best = most[l] > best ? most[l] : best;
    for (; i < count; i++) best = x[i] > best ? x[i] : best;
    int32_t at = 0;
    while (at < count - 1 && x[at] != best) at++;
    *where = at;
    return best;
}

/* Of a piece of a row's vocabulary: the largest score, the sum of exp(score - largest), and the best tokens. */
static void look_through(const struct net *n, const struct choice *c, const struct found *f, int64_t row, int64_t piece) {
    int64_t from = piece * PIECE, width = n->head.width, count = width - from < PIECE ? width - from : PIECE;
    int64_t request = row / c->each, spot = row * pieces_of(n) + piece, i = 0;
    float *x = f->logits + row * width + from, heat = c->heat && c->heat[request] > 0 ? 1.0f / c->heat[request] : 1.0f;
    const float *race = c->race ? c->race + request * c->stride + from : NULL;
    vec sum = {0};
    for (int64_t j = 0; j < count; j++) x[j] = x[j] * heat + (race ? race[j] : 0.0f);
    f->peaks[spot] = f->best[spot * c->count] = largest(x, count, f->at + spot * c->count);
    for (; i + LANES <= count; i += LANES) sum += exponential(*(const loose *)(x + i) - f->peaks[spot]);
    f->sums[spot] = total(sum);
    for (; i < count; i++) f->sums[spot] += expf(x[i] - f->peaks[spot]);
    for (int64_t k = 0; k < c->count; k++) {
        int32_t *at = f->at + spot * c->count + k;
        if (k) f->best[spot * c->count + k] = largest(x, count, at);
        x[*at] = -INFINITY;
        *at += (int32_t)from;
    }
}

/* The best of a row's pieces, best first. */
static void settle(const struct net *n, const struct choice *c, const struct found *f, int64_t row) {
    int64_t pieces = pieces_of(n), first = row * pieces, choices = pieces * c->count;
    float peak = -INFINITY, mass = 0.0f, *best = f->best + first * c->count;
    for (int64_t p = first; p < first + pieces; p++) peak = f->peaks[p] > peak ? f->peaks[p] : peak;
    for (int64_t p = first; p < first + pieces; p++) mass += f->sums[p] * expf(f->peaks[p] - peak);
    for (int64_t k = 0; k < c->count; k++) {
        int32_t where;
        float value = largest(best, choices, &where) - peak - logf(mass);
        int64_t id = f->at[first * c->count + where];
        c->values[row * c->count + k] = value < 0 ? value : 0.0f;
        c->ids[row * c->count + k] = n->offsets ? id + n->offsets[id] : id;
        best[where] = -INFINITY;
    }
}

void outpace_best(const struct net *n, const struct choice *c) {
    struct found f;
    int64_t pieces = pieces_of(n);
    lay_choice(n, c, &f);
    struct team team = {0};
#pragma omp parallel num_threads((int)c->threads)
    {
        join_team(&team);
        EACH(r, c->rows) norm(c->y + r * n->hidden, n->norm, n->hidden, n->eps, f.normed + r * n->hidden);
        meet();
        apply(&n->head, f.normed, c->rows, f.logits, c->threads);
        EACH(i, c->rows * pieces) look_through(n, c, &f, i / pieces, i % pieces);
        meet();
        EACH(r, c->rows) settle(n, c, &f, r);
        meet();
    }
}
