/* Attention of some rows over a chunk: the positions 512 * n .. 512 * (n + 1) of a text.
 *
 * Where chunks and the tiles of 32 columns within them begin depends on the position alone, and so what a row meets, and in
 * which order: the maximum, the sum and the output of each of its chunks, whatever the runs of its cache, the row's
 * companions or the threads. What a row doesn't read has the weight 0, which changes no sum. Of a tree each row's
 * ancestors are put at their positions: scores are moved there, and for every chain of rows the values are gathered.
 *
 * A tile is 16 rows: row i of head g is at g * rows + i, so that keys and values are read once for all heads of a group.
 */
#ifndef CHUNK_H
#define CHUNK_H

#include "grouped.h"

enum { CHUNK = 512, STRIDE = CHUNK + 16, MOST_ROWS = 64 }; /* rows a power of two apart would share cache sets */

typedef struct {
    const bf16 *queries; /* [q, key_heads * groups, dim], rows `query_row` apart */
    int64_t query_row, rows, key_heads, groups, dim;
    float scale, softcap; /* 0: no softcap */
    const float *sinks;   /* of each query head, a score that takes weight and has no value; or null */
} Reading;

/* A tree's nodes: where they stand, and of each row in hand the last node of the chain whose values it reads. */
typedef struct {
    const int64_t *parents;
    int64_t *depths, *chain;  /* [nodes], [rows] */
    int64_t nodes, own, text; /* the node of the text's first row in the pass; the position of depth 0 */
} Tree;

/* Segments that follow each other: dense ones, or a coded one. */
typedef struct {
    const Segment *segments;
    int64_t count, low, high; /* positions that some row reads */
    const Tree *tree;         /* of the last segment, or null */
} Group;

/* At most 64 rows of a text, from its row `at` on: by that their limits are found. */
typedef struct {
    Reading r;
    int64_t at, all_rows;
    void *packed; /* queries, [key_heads, tiles, packed_bytes] */
} Rows;

static int64_t tiles_of(const Reading *r) { return (r->rows * r->groups + TILE - 1) / TILE; }

/* Where the queries of a key head's tile stand; gives their number. */
static int64_t tile_queries(const Reading *r, int64_t head, int64_t tile, const bf16 *of[TILE]) {
    const int64_t all_rows = r->rows * r->groups, live = all_rows - tile * TILE < TILE ? all_rows - tile * TILE : TILE;
    for (int64_t i = 0; i < live; i++) {
        const int64_t row = (tile * TILE + i) % r->rows, group = (tile * TILE + i) / r->rows;
        of[i] = r->queries + row * r->query_row + (head * r->groups + group) * r->dim;
    }
    return live;
}

/* Queries of one key head as the first product's packed rows. */
static void pack_queries(const Rows *rows, int64_t head) {
    const Reading *r = &rows->r;
    for (int64_t tile = 0; tile < tiles_of(r); tile++) {
        const bf16 *of[TILE];
        const int64_t live = tile_queries(r, head, tile, of);
        char *to = (char *)rows->packed + (head * tiles_of(r) + tile) * packed_bytes(r->dim);
        for (int64_t d = 0; d < r->dim; d += DEEP) pack_columns(of, live, r->dim, d, to);
    }
}

/* A chunk's result: for each tile the rows' maxima and sums, and outputs [16, dim]. */
static int64_t tile_floats(const Reading *r) { return TILE * (2 + r->dim); }
static int64_t chunk_floats(const Reading *r) { return tiles_of(r) * tile_floats(r); }

/* A thread's workspace for one chunk. */
typedef struct {
    bf16 *keys, *values, *chain; /* decoded or gathered; a tree's chain's values */
    bf16 *pairs, *chain_pairs;   /* values interleaved */
    float *scores;       /* [16, STRIDE] */
    float *staged;       /* [16, nodes] */
    weight_t *weights;   /* [chunk / 32, 16, 32] */
} Own;

/* Bytes of it, for a tree of so many nodes. */
static int64_t own_bytes(int64_t dim, int64_t nodes) {
    return CHUNK * dim * 10 + TILE * 4 * (STRIDE + nodes + TILE + CHUNK) + 512;
}

static Own own_at(char *at, int64_t dim) {
    Own own;
    own.keys = (bf16 *)(at + (-(intptr_t)at & 63));
    own.values = own.keys + CHUNK * dim;
    own.chain = own.values + CHUNK * dim;
    own.pairs = own.chain + CHUNK * dim;
    own.chain_pairs = own.pairs + CHUNK * dim;
    own.scores = (float *)(own.chain_pairs + CHUNK * dim);
    own.weights = (weight_t *)(own.scores + TILE * STRIDE);
    own.staged = (float *)(own.weights + TILE * CHUNK);
    return own;
}

static vf capped(vf x, float cap) {
    /* cap * tanh(x / cap), of the size's exponential so that nothing overflows */
    const vf e = exponential(absolute(x) * (-2.0f / cap)), t = cap * ((1.0f - e) / (1.0f + e));
    return choose(x < 0, -t, t);
}

/* What of a chunk stands in the text's order: from `begin`, `linear` positions; with a tree's, `count`. */
typedef struct {
    int64_t begin, linear, count, padded;
    const bf16 *keys, *values, *readable; /* [linear, dim]; values as `weigh` reads them */
} Span;

/* Keys and values [linear, dim] of dense segments, copied where no single one has them all; values before interleaving. */
static void gather(const Group *g, int64_t head, int64_t dim, Span *span, const Own *own) {
    const int64_t end = span->begin + span->linear;
    for (int64_t i = 0; i < g->count; i++) {
        const Segment *s = g->segments + i;
        if (s->start > span->begin || s->start + in_order(s) < end) continue;
        span->keys = row_of(&s->keys, head, span->begin - s->start, dim);
        span->values = row_of(&s->values, head, span->begin - s->start, dim);
        return;
    }
    memset(own->keys, 0, (size_t)(span->linear * dim) * sizeof(bf16));
    memset(own->values, 0, (size_t)(span->linear * dim) * sizeof(bf16));
    for (int64_t i = 0; i < g->count; i++) {
        const Segment *s = g->segments + i;
        const int64_t from = s->start > span->begin ? s->start : span->begin;
        const int64_t to = s->start + in_order(s) < end ? s->start + in_order(s) : end;
        if (from >= to) continue;
        const size_t bytes = (size_t)((to - from) * dim) * sizeof(bf16);
        memcpy(own->keys + (from - span->begin) * dim, row_of(&s->keys, head, from - s->start, dim), bytes);
        memcpy(own->values + (from - span->begin) * dim, row_of(&s->values, head, from - s->start, dim), bytes);
    }
    span->keys = own->keys, span->values = own->values;
}

static Span span_of(const Group *g, int64_t head, int64_t chunk, int64_t dim, const Own *own) {
    const Segment *only = g->segments;
    const int64_t base = chunk * CHUNK, low = g->low / BLOCK * BLOCK, high = g->high;
    Span span = {.begin = low > base ? low : base};
    span.count = (high < base + CHUNK ? high : base + CHUNK) - span.begin;
    if (only->kind != DENSE) {
        if (span.begin < only->start) span.count -= only->start - span.begin, span.begin = only->start;
        span.count = (span.count + BLOCK - 1) / BLOCK * BLOCK;
    }
    span.padded = (span.count + DEEP - 1) / DEEP * DEEP;
    span.linear = g->tree && g->tree->text - span.begin < span.count ? g->tree->text - span.begin : span.count;
    if (span.linear < 0) span.linear = 0;
    if (only->kind != DENSE) {
        if (only->kind != GROUPED) /* which are read as they are */
            decode(only, head, span.begin - only->start, span.count, dim, own->keys, INTERLEAVED ? own->pairs : own->values);
        span.keys = own->keys, span.readable = INTERLEAVED ? own->pairs : own->values;
    } else if (span.linear) {
        gather(g, head, dim, &span, own);
        span.readable = INTERLEAVED ? own->pairs : span.values;
        if (INTERLEAVED) interleave(span.values, span.linear, (span.linear + DEEP - 1) / DEEP * DEEP, dim, own->pairs);
    }
    return span;
}

/* scores [live, columns]: packed queries times keys [count, dim], behind which nothing is read. */
static void score(const bf16 *keys, int64_t count, int64_t dim, const void *packed, int64_t live, float *scores, int64_t stride) {
    bf16 last[TILE * MOST_DIM] __attribute__((aligned(64)));
    for (int64_t j = 0; j < count; j += TILE) {
        const bf16 *from = keys + j * dim;
        if (j + TILE > count) {
            memset(last, 0, sizeof last);
            memcpy(last, from, (size_t)((count - j) * dim) * sizeof *from);
            from = last;
        }
        product_bf16(from, dim, dim, packed, live, scores + j, stride);
    }
}

/* The same of codes in groups, whose scores may be known for all rows of the text. */
static void score_codes(const Rows *rows, const Segment *s, const Span *span, int64_t head, int64_t tile, int64_t live, float *scores) {
    const int64_t first = head * rows->r.groups * rows->all_rows + tile * TILE;
    if (!s->scores) {
        const bf16 *of[TILE];
        tile_queries(&rows->r, head, tile, of);
        score_grouped(s, head, span->begin - s->start, span->linear, rows->r.dim, of, live, scores, STRIDE);
        return;
    }
    for (int64_t i = 0; i < live; i++)
        memcpy(scores + i * STRIDE, s->scores + (first + i) * s->stride + span->begin - s->start, (size_t)span->linear * 4);
}

static void hide(float *scores, int64_t from, int64_t to) {
    for (int64_t j = from; j < to; j++) scores[j] = -__builtin_inff();
}

/* Hides what row `row` of the text reads as exact rows. */
static void hide_exact(const Segment *s, const Span *span, int64_t place, float *scores) {
    for (int64_t i = place * s->most; i < (place + 1) * s->most; i++) {
        const int64_t at = s->start + s->chosen[i] - span->begin;
        if (s->chosen[i] >= 0 && at >= 0 && at < span->count) scores[at] = -__builtin_inff();
    }
}

/* The scores of a tree's ancestors to their positions. */
static void place_ancestors(const Tree *tree, const Span *span, int64_t node, const float *staged, float *scores) {
    for (; node >= 0; node = tree->parents[node]) {
        const int64_t at = tree->text + tree->depths[node] - span->begin;
        if (at >= span->linear && at >= 0 && at < span->count) scores[at] = staged[node];
    }
}

/* Hides what row `row` of the text doesn't read. */
static void limit(const Group *g, const Span *span, int64_t row, float *scores) {
    int64_t seen = 0; /* up to here all is decided */
    for (int64_t i = 0; i < g->count; i++) {
        const Segment *s = g->segments + i;
        int64_t first = s->start - span->begin, last = first + in_order(s);
        const int is_tree = g->tree && i == g->count - 1;
        if (s->first) {
            const int64_t end = s->last[row] < in_order(s) ? s->last[row] : in_order(s);
            if (s->first[row] >= s->last[row]) continue;
            last = first + end, first += s->first[row];
        }
        if (is_tree) last = g->tree->text + g->tree->depths[g->tree->own + row] + 1 - span->begin;
        first = first > seen ? first : seen;
        last = last < span->count ? last : span->count;
        if (first >= last) continue;
        hide(scores, seen, first);
        const int64_t tail = s->tail && !s->parents ? s->start + s->columns - s->staged - span->begin : last;
        for (int64_t j = tail > first ? tail : first; j < last; j++)
            if (!s->tail[row * s->staged + j - tail]) scores[j] = -__builtin_inff();
        seen = last;
    }
    hide(scores, seen, span->padded);
}

/* Scores of a row become weights, rounded to bf16: [padded / 32, 32], tiles apart; gives the maximum and the sum. */
static void soften(const Reading *r, float *scores, int64_t padded, weight_t *weights, float *largest, float *sum) {
    const vf nothing = all(-__builtin_inff());
    vf most = nothing, total[PIECES] = {{0}};
    for (int64_t j = 0; j < padded; j += LANES) {
        const vf raw = load(scores + j);
        vf scaled = raw * r->scale;
        if (r->softcap > 0) scaled = capped(scaled, r->softcap);
        scaled = choose(raw == nothing, nothing, scaled);
        most = larger(most, scaled);
        save(scores + j, scaled);
    }
    *largest = largest_of(most);
    for (int64_t j = 0; j < padded; j += WIDE)
        UNROLL for (int p = 0; p < PIECES; p++) {
            const int64_t at = j + p * LANES;
            const vf scaled = load(scores + at);
            const vf weight = (vf)((vi)exponential(scaled - *largest) & (scaled != nothing));
            total[p] += weight;
            save_weights(weights + at / DEEP * TILE * DEEP + at % DEEP, weight);
        }
    *sum = sum_of(total);
}

/* Adds to out [16, dim] what the rows of a chain read behind `begin`, a multiple of 32 in the span. */
static void weigh_chain(const Group *g, const Span *span, int64_t node, int64_t head, int64_t dim, int64_t begin,
                        uint32_t rows, const Own *own, float *out) {
    const Tree *tree = g->tree;
    const Segment *s = g->segments + g->count - 1;
    int64_t count = tree->text + tree->depths[node] + 1 - span->begin;
    count = (count < span->count ? count : span->count) - begin;
    if (count <= 0) return;
    const int64_t padded = (count + DEEP - 1) / DEEP * DEEP;
    memset(own->chain + count * dim, 0, (size_t)((padded - count) * dim) * sizeof(bf16));
    if (span->linear > begin)
        memcpy(own->chain, span->values + begin * dim, (size_t)((span->linear - begin) * dim) * sizeof(bf16));
    for (; node >= 0; node = tree->parents[node]) {
        const int64_t at = tree->text + tree->depths[node] - span->begin - begin;
        if (at >= 0 && at < count)
            memcpy(own->chain + at * dim, row_of(&s->values, head, in_order(s) + node, dim), (size_t)dim * sizeof(bf16));
    }
    if (INTERLEAVED) interleave(own->chain, count, padded, dim, own->chain_pairs);
    weigh_some(own->weights + begin * TILE, INTERLEAVED ? own->chain_pairs : own->chain, padded, dim, rows, out);
}

/* One key head's chunk, as its result. */
static void read_chunk(const Rows *rows, const Group *g, int64_t head, int64_t chunk, const Own *own, float *result) {
    const Reading *r = &rows->r;
    const int64_t dim = r->dim, tiles = tiles_of(r), all_rows = r->rows * r->groups;
    const Span span = span_of(g, head, chunk, dim, own);
    const int64_t nodes = g->tree ? g->tree->own + rows->at + r->rows : 0, staged = nodes + TILE;
    const int64_t common = g->tree ? span.linear / DEEP * DEEP : span.linear; /* all rows read the same here */
    for (int64_t tile = 0; tile < tiles; tile++, result += tile_floats(r)) {
        const char *packed = (const char *)rows->packed + (head * tiles + tile) * packed_bytes(dim);
        const int64_t live = all_rows - tile * TILE < TILE ? all_rows - tile * TILE : TILE;
        float *out = result + 2 * TILE;
        memset(result, 0, (size_t)tile_floats(r) * sizeof *result);
        memset(own->weights, 0, (size_t)(span.padded * TILE) * sizeof *own->weights);
        const int is_grouped = g->segments->kind == GROUPED;
        if (is_grouped)
            score_codes(rows, g->segments, &span, head, tile, live, own->scores);
        else
            score(span.keys, span.linear, dim, packed, live, own->scores, STRIDE);
        if (g->tree) {
            const Segment *s = g->segments + g->count - 1;
            score(row_of(&s->keys, head, in_order(s), dim), nodes, dim, packed, live, own->staged, staged);
        }
        uint32_t left = 0;
        for (int64_t i = 0; i < live; i++) {
            const int64_t row = rows->at + (tile * TILE + i) % r->rows;
            float *scores = own->scores + i * STRIDE;
            if (g->tree) place_ancestors(g->tree, &span, g->tree->own + row, own->staged + i * staged, scores);
            limit(g, &span, row, scores);
            if (g->segments->chosen) hide_exact(g->segments, &span, row * r->key_heads + head, scores);
            soften(r, scores, span.padded, own->weights + i * DEEP, result + i, result + TILE + i);
            left |= 1u << i;
        }
        if (is_grouped)
            weigh_grouped(g->segments, head, span.begin - g->segments->start, span.count, dim, own->weights, live, (float *)own->keys, out);
        else if (common)
            weigh(own->weights, span.readable, INTERLEAVED ? (common + DEEP - 1) / DEEP * DEEP : common, dim, live, out);
        while (g->tree && left) {
            const int64_t leaf = g->tree->chain[(tile * TILE + __builtin_ctz(left)) % r->rows];
            uint32_t of_chain = 0;
            for (int64_t i = 0; i < live; i++)
                if (g->tree->chain[(tile * TILE + i) % r->rows] == leaf) of_chain |= 1u << i;
            weigh_chain(g, &span, leaf, head, dim, common, of_chain, own, out);
            left &= ~of_chain;
        }
    }
}

/* Two results of a tile over other positions as one, in a's place; of the first `live` rows. */
static void join(float *a, const float *b, int64_t live, int64_t dim) {
    const float nothing = -__builtin_inff();
    for (int64_t i = 0; i < live; i++) {
        if (b[i] == nothing) continue;
        const float most = a[i] > b[i] ? a[i] : b[i];
        const float ours = a[i] == nothing ? 0 : one_exponential(a[i] - most), theirs = one_exponential(b[i] - most);
        a[i] = most;
        a[TILE + i] = a[TILE + i] * ours + b[TILE + i] * theirs;
        for (int64_t d = i * dim; d < (i + 1) * dim; d += LANES) {
            float *to = a + 2 * TILE + d;
            save(to, load(to) * ours + load(b + 2 * TILE + d) * theirs);
        }
    }
}

#endif
