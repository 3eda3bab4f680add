/* Which columns of a coded segment each row of a pass is to read exactly: for each key head those of the largest weights, by
 * scores over the codes (SpeCache, 2503.16163).
 *
 * A column's weight is its share of the softmax over the row's columns, summed over the key head's query heads, which have no
 * common scale. It depends on the row and its columns alone. The scores stay, as the first half of attention over these codes.
 */
#ifndef CHOOSE_H
#define CHOOSE_H

#include "chunk.h"
#include "team.h"

enum { MOST_CHOSEN = 256 };

typedef struct {
    Reading r;
    Segment s;
    int64_t count, further; /* columns that are chosen, and those that come next; together at most MOST_CHOSEN */
    int64_t stride;         /* of the scores' rows: columns, a multiple of 64 */
    int32_t *chosen;        /* [q, key_heads, count]: rising; -1 behind the last where there are fewer */
    int32_t *next;          /* [q, key_heads, further]: the largest weight first; likewise */
    float *scores;          /* [key_heads, groups * q, stride]: queries times codes */
    char *workspace;
} Choice;

/* A candidate; the worse of two has the smaller weight, or stands behind. */
typedef struct {
    float weight;
    int32_t column;
} Found;

INLINE int worse(Found a, Found b) { return a.weight < b.weight || (a.weight == b.weight && a.column > b.column); }

/* Puts `one` into a heap whose first is the worst, from place `at` down. */
static void sink(Found *heap, int64_t size, int64_t at, Found one) {
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && worse(heap[child + 1], heap[child])) child++;
        if (!worse(heap[child], one)) break;
        heap[at] = heap[child];
    }
    heap[at] = one;
}

enum { BINS = 2048 };

/* A weight's place among BINS of rising weights: exponent and three bits of mantissa. */
INLINE int64_t bin_of(float weight) {
    uint32_t bits;
    memcpy(&bits, &weight, sizeof bits);
    return bits >> 20 & (BINS - 1);
}

/* The best columns of first..last by their weights, as a heap; gives their number. All above some bin are taken, and of that
 * bin the best: a heap of all took four times as long. */
static int64_t best_of(const float *weights, int64_t first, int64_t last, int64_t most, Found *heap) {
    uint32_t bins[BINS] = {0};
    int64_t bin = BINS - 1, size = 0, above = 0;
    for (int64_t j = first; j < last; j++) bins[bin_of(weights[j])]++;
    for (; bin > 0 && above + bins[bin] < most; bin--) above += bins[bin];
    Found *edge = heap + above;
    const int64_t wanted = most - above < bins[bin] ? most - above : bins[bin];
    int64_t found = 0;
    for (int64_t j = first; j < last; j++) {
        const int64_t at = bin_of(weights[j]);
        const Found one = {weights[j], (int32_t)j};
        if (at > bin) heap[size++] = one;
        if (at != bin) continue;
        if (found < wanted) {
            edge[found++] = one;
            for (int64_t i = wanted / 2 - 1; found == wanted && i >= 0; i--) sink(edge, wanted, i, edge[i]);
        } else if (worse(edge[0], one))
            sink(edge, wanted, 0, one);
    }
    size += found;
    for (int64_t i = size / 2 - 1; i >= 0; i--) sink(heap, size, i, heap[i]);
    return size;
}

/* Adds to `weights` a query head's softmax over the columns first..last of its scores; `own` is as long. */
static void add_weights(const Reading *r, const float *scores, int64_t first, int64_t last, float *own, float *weights) {
    const vf nothing = all(-__builtin_inff());
    const int64_t begin = first / WIDE * WIDE, end = (last + WIDE - 1) / WIDE * WIDE;
    vi lanes;
    for (int32_t i = 0; i < LANES; i++) lanes[i] = i;
    vf most = nothing, total[PIECES] = {{0}};
    for (int64_t j = begin; j < end; j += LANES) {
        const vi at = lanes + (int32_t)j;
        vf scaled = load(scores + j) * r->scale;
        if (r->softcap > 0) scaled = capped(scaled, r->softcap);
        scaled = choose((at >= (int32_t)first) & (at < (int32_t)last), scaled, nothing);
        most = larger(most, scaled);
        save(own + j, scaled);
    }
    const float largest = largest_of(most);
    for (int64_t j = begin; j < end; j += WIDE)
        UNROLL for (int p = 0; p < PIECES; p++) {
            const vf scaled = load(own + j + p * LANES);
            const vf weight = (vf)((vi)exponential(scaled - largest) & (scaled != nothing));
            total[p] += weight;
            save(own + j + p * LANES, weight);
        }
    const float share = 1.0f / sum_of(total);
    for (int64_t j = begin; j < end; j += LANES) save(weights + j, load(weights + j) + load(own + j) * share);
}

/* A row's columns at a key head. */
static void choose_row(const Choice *c, int64_t row, int64_t head, float *own) {
    const Reading *r = &c->r;
    const int64_t columns = c->s.columns, place = row * r->key_heads + head;
    const int64_t first = c->s.first ? c->s.first[row] : 0, end = c->s.first ? c->s.last[row] : columns;
    const int64_t last = end < columns ? end : columns;
    int32_t *chosen = c->chosen + place * c->count, *next = c->next + place * c->further;
    for (int64_t i = 0; i < c->count; i++) chosen[i] = -1;
    for (int64_t i = 0; i < c->further; i++) next[i] = -1;
    if (first >= last) return;
    Found heap[MOST_CHOSEN];
    float *weights = own + c->stride;
    memset(weights, 0, (size_t)c->stride * sizeof *weights);
    for (int64_t group = 0; group < r->groups; group++)
        add_weights(r, c->scores + ((head * r->groups + group) * r->rows + row) * c->stride, first, last, own, weights);
    int64_t size = best_of(weights, first, last, c->count + c->further, heap);
    for (; size > c->count; size--) {
        next[size - 1 - c->count] = heap[0].column;
        sink(heap, size - 1, 0, heap[size - 1]);
    }
    for (int64_t i = 0; i < size; i++) {
        int64_t at = i;
        for (; at > 0 && chosen[at - 1] > heap[i].column; at--) chosen[at] = chosen[at - 1];
        chosen[at] = heap[i].column;
    }
}

static int64_t own_choice(const Choice *c) {
    return (2 * c->stride * 4 + 63) / 64 * 64;
}

static void choose_by(void *args, Team *t, int64_t rank) {
    const Choice *c = args;
    const Reading *r = &c->r;
    char *own = c->workspace + (-(intptr_t)c->workspace & 63) + rank * own_choice(c);
    const int64_t tiles = tiles_of(r), all_rows = r->rows * r->groups, chunks = (c->s.columns + CHUNK - 1) / CHUNK;
    SHARED(t, i, r->key_heads * chunks) {
        const int64_t head = i / chunks, first = i % chunks * CHUNK;
        const int64_t count = c->s.columns - first < CHUNK ? c->s.columns - first : CHUNK;
        for (int64_t tile = 0; tile < tiles; tile++) {
            const bf16 *of[TILE];
            const int64_t live = tile_queries(r, head, tile, of);
            float *scores = c->scores + (head * all_rows + tile * TILE) * c->stride + first;
            score_grouped(&c->s, head, first, count, r->dim, of, live, scores, c->stride);
        }
    }
    meet(t);
    SHARED(t, i, r->rows * r->key_heads) choose_row(c, i / r->key_heads, i % r->key_heads, (float *)own);
    meet(t);
}

/* Bytes of workspace for so many threads. */
int64_t attention_choice_workspace(const Choice *c, int64_t threads) {
    return threads * own_choice(c) + 64;
}

void attention_choose(Choice *c, int64_t threads, Team *t) { lead(t, threads, choose_by, c); }

#endif
