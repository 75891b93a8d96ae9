/* A pass of few rows through a decoder on a CPU, in one call: every weight is read once, in the order it lies in.

   Compiled by `build.py` for the processor it runs on, once with HALF=0 (float32) and once with HALF=1 (bfloat16).
   Threads are those of PyTorch's OpenMP runtime: one parallel region a pass, in which they meet between its steps.

   A row's bits do not depend on what stands beside it: each of its dot products runs along its depth in one vector
   accumulator that is added up in one way, whatever tile it stands in; attention sums over the entries a row sees in the
   order of their positions, and nothing else. So a row of a tree has the bits it has in plain decoding.

   In bfloat16 sums are float32 and so is the residual stream; what enters a product is rounded, and so are keys, values
   and what is handed out. */

#include "arithmetic.h"

#define MOST_ROWS 512 /* of a pass, all requests together */

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
    char *space = run->space;
    LAY(b->normed, input, rows * m->hidden);
    LAY(b->attended, input, rows * m->heads * m->size);
    LAY(b->inner, input, rows * m->inner);
    LAY(b->last, input, rows * m->hidden);
    LAY(b->low, input, 3 * rows * run->ranks);
    LAY(b->packed, input, MATRIX ? PACKED_SIZE(rows, widest_of(m)) : 0);
    LAY(b->joined, float, rows * joined);
    LAY(b->added, float, rows * m->hidden);
    LAY(b->scores, float, run->threads * room_of(m, run));
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

/* ---- the matrix unit: weight rows as they lie are one factor, rows of x packed in pairs the other --------------------- */

INLINE int takes_matrix(int64_t depth) { return MATRIX && depth % DEEP == 0; }

/* x [rows, depth] into blocks of WIDE rows, steps of DEEP, pairs: [block][step][pair][row][2]; missing rows are zero. */
static void pack(const input *x, int64_t rows, int64_t depth, input *packed) {
    if (!takes_matrix(depth)) return;
    int64_t steps = depth / DEEP, blocks = (rows + WIDE - 1) / WIDE;
    EACH(i, blocks * steps) {
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
    meet();
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
    EACH(i, 3 * run->ranks) {
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
    meet();
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
    int64_t groups = (p->width + GROUP - 1) / GROUP, each = share_of(groups, run->threads);
    SHARED(g, groups, each) {
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
    meet();
}

/* act(x @ gate.T) * (x @ up.T) into inner [rows, width / 2]. */
static void gate(const struct model *m, const struct run *run, const struct product *p, const input *x,
                 input *packed, const input *low, int64_t rows, input *inner) {
    pack(x, rows, p->depth, packed);
    int64_t width = p->width / 2, groups = (width + GROUP - 1) / GROUP, each = share_of(groups, run->threads);
    SHARED(g, groups, each) {
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
    meet();
}

/* ---- rows between products -------------------------------------------------------------------------------------------- */

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
    EACH(r, rows) {
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
    meet();
}

/* Norms of queries and keys, rotation, and the cache: queries stay in `joined`, keys and values go behind `lengths`. */
static void turn(const struct model *m, const struct run *run, const struct layer *layer, const struct buffers *b,
                 number *keys, number *values) {
    int64_t rows = run->batch * run->rows, size = m->size, half = size / 2, turned = m->heads + m->key_heads;
    int64_t width = (turned + m->key_heads) * size;
    EACH(r, rows) {
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
        for (int64_t h = 0; h < turned; h++) rotate(row + h * size, half, cos, sin);
        for (int64_t h = 0; h < m->key_heads; h++) {
            int64_t at = (((run->first + request) * m->key_heads + h) * run->capacity + entry) * size;
            hand_out(row + (m->heads + h) * size, size, keys + at);
            hand_out(row + (turned + h) * size, size, values + at);
        }
    }
    meet();
}

/* ---- attention of a pass ---------------------------------------------------------------------------------------------- */

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

static void attend(const struct model *m, const struct run *run, const struct layer *layer, const struct buffers *b,
                   const number *keys, const number *values) {
    int64_t blocks = (run->rows + BLOCK - 1) / BLOCK;
    int64_t room = room_of(m, run);
    SHARED(i, run->batch * m->key_heads * blocks, 1) {
        int64_t from = i % blocks * BLOCK, to = from + BLOCK < run->rows ? from + BLOCK : run->rows;
        int64_t head = i / blocks % m->key_heads, request = i / blocks / m->key_heads;
        attend_block(m, run, layer, b, keys, values, request, head, from, to, b->scores + here.me * room);
    }
    meet();
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
        EACH(i, run->batch * run->rows * n) run->post_norm[i] = narrow(value_of(b->normed[i]));
    if (!run->logits) return;
    EACH(i, run->batch * wanted)
        memcpy(b->last + i * n, b->normed + (i / wanted * run->rows + run->head_from + i % wanted) * n, n * sizeof(input));
    meet();
    multiply(run, &m->head, b->last, b->packed, NULL, run->batch * wanted, LOGITS, run->logits);
}

void outpace_pass(const struct model *m, const struct run *run) {
    struct buffers b;
    struct team team = {0};
    lay_out(m, run, &b);
#pragma omp parallel num_threads((int)run->threads)
    {
        join_team(&team);
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
    struct team team = {0};
#pragma omp parallel num_threads((int)threads)
    {
        join_team(&team);
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
