/* Grouped linear attention for the rows of one group of 64 positions, head by head.
 *
 *     o = S^T q + sum_j relu(q k_j)^2 v_j + sum_i w_i v_-i
 *
 * S sums k v^T over the whole groups before; j are the row's own path in its group, in the order of its depth, and itself; the
 * last sum is a convolution over the values of the row's path, one weight for all channels of a head. Queries and keys have
 * length one. Each product is rounded before it is added: a row's bits depend on its path alone.
 */
#ifndef GROUPED_H
#define GROUPED_H

#include "convolution.h"
#include "delta_rule.h"

typedef struct {
    Convolution of;    /* of values, [history, key_heads * dim]; its weights are [inputs, heads] */
    const bf16 *rows;  /* [pass, queries, keys, ..] which are rotated, rows `apart` apart */
    float *queries;    /* [pass, heads, dim] */
    float *k;          /* [history, key_heads, dim]: of the pass' own rows written */
    const float *u;    /* [history, key_heads, dim]: values */
    const float *state; /* [key_heads, dim, dim] at the group's start */
    bf16 *y;           /* [pass, heads * dim] */
    const int64_t *places, *parents, *fresh; /* as of the gated delta rule */
    int64_t apart, known, count, heads, key_heads, dim;
} Grouped;

/* Queries and keys of the pass' rows, of length one. */
static void unit_by(void *args, Team *t, int64_t rank) {
    const Grouped *g = args;
    const int64_t each = g->heads + g->key_heads, earlier = g->of.history - g->of.rows;
    (void)rank;
    SHARED(t, i, g->of.rows * each) {
        const int64_t row = i / each, head = i % each, own = earlier + row;
        const bf16 *x = g->rows + row * g->apart + head * g->dim;
        float *to = head < g->heads ? g->queries + (row * g->heads + head) * g->dim
                                    : g->k + (own * g->key_heads + head - g->heads) * g->dim;
        for (int64_t at = 0; at < g->dim; at += LANES) save(to + at, load_bf16(x + at));
        const float length = __builtin_sqrtf(dot(to, to, g->dim)), factor = 1.0f / (length > 1e-12f ? length : 1e-12f);
        for (int64_t at = 0; at < g->dim; at += LANES) save(to + at, load(to + at) * factor);
    }
    meet(t);
}

/* Adds what a row's path in its group and its convolution say to what the state does, and writes the output. */
static void grouped_row(const Grouped *g, int64_t head, int64_t i, float *read) {
    const int64_t dim = g->dim, key_head = head / (g->heads / g->key_heads), at = g->known + i, pass = g->fresh[i];
    const float *q = g->queries + (pass * g->heads + head) * dim;
    const Convolution *c = &g->of;
    const bf16 *inputs[MOST_INPUTS];
    int64_t path[SPAN], depth = 0;
    for (int64_t up = at; up >= 0 && depth < SPAN; up = g->parents[up]) path[depth++] = g->places[up];
    while (depth--) {
        const int64_t place = (path[depth] * g->key_heads + key_head) * dim;
        const float score = dot(q, g->k + place, dim), weight = score > 0 ? score * score : 0;
        for (int64_t d = 0; d < dim; d += LANES) save(read + d, load(read + d) + load(g->u + place + d) * weight);
    }
    window_of(c, pass, inputs);
    for (int64_t d = 0; d < dim; d += LANES) {
        vf sum = load_bf16(inputs[0] + key_head * dim + d) * c->weight[head];
        for (int64_t j = 1; j < c->inputs; j++) sum += load_bf16(inputs[j] + key_head * dim + d) * c->weight[j * g->heads + head];
        save_bf16(g->y + (pass * g->heads + head) * dim + d, load(read + d) + sum);
    }
}

static void grouped_by(void *args, Team *t, int64_t rank) {
    const Grouped *g = args;
    const int64_t dim = g->dim, each = (g->count + ROWS - 1) / ROWS;
    float read[ROWS][MOST_DIM] __attribute__((aligned(64)));
    (void)rank;
    SHARED(t, i, g->heads * each) {
        const int64_t head = i / each, first = i % each * ROWS, here = g->count - first < ROWS ? g->count - first : ROWS;
        const float *state = g->state + head / (g->heads / g->key_heads) * dim * dim, *q[ROWS];
        for (int64_t r = 0; r < ROWS; r++) q[r] = g->queries + (g->fresh[first + (r < here ? r : 0)] * g->heads + head) * dim;
        for (int64_t at = 0; at < dim; at += LANES) {
            vf sums[ROWS] = {{0}};
            for (int64_t d = 0; d < dim; d++) {
                const vf s = load(state + d * dim + at);
                UNROLL for (int r = 0; r < ROWS; r++) sums[r] += s * q[r][d];
            }
            UNROLL for (int r = 0; r < ROWS; r++) save(read[r] + at, sums[r]);
        }
        for (int64_t r = 0; r < here; r++) grouped_row(g, head, first + r, read[r]);
    }
    meet(t);
}

#endif
