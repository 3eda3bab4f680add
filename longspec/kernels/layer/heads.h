/* What a layer is; and its product's rows as heads: gates set apart, norms, rotations to their positions. */
#ifndef HEADS_H
#define HEADS_H

#include "mixers/gates.h"
#include "products.h"

enum { SILU = 0, GELU_TANH = 1, CLAMPED = 2 };
enum { ATTENTION = 1, MLP = 2 };

typedef struct {
    Matrix qkv, output, gate_up, down;
    const float *before_attention, *after_attention, *before_mlp, *after_mlp; /* norms [width], or null */
    const float *query_norm, *key_norm, *value_norm;                         /* or null */
    int64_t norms_all_heads; /* query_norm is over all heads at once, not over each */
    int64_t heads, key_heads, head_dim, activation;
    int64_t output_gate; /* each query head's product has a gate of attention's output behind it */
    float eps;
} Layer;

/* Halves (a, b) of a head become (a cos - b sin, b cos + a sin); cos and signed sin [dims]. */
static void rotated(bf16 *head, const bf16 *cos, const bf16 *sin, int64_t dims) {
    const int64_t half = dims / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t some = half - i;
        const vf a = load_some(head + i, some), b = load_some(head + half + i, some);
        const vf left = rounded(a * load_some(cos + i, some)), right = rounded(b * load_some(cos + half + i, some));
        save_some(head + i, left + b * load_some(sin + i, some), some);
        save_some(head + half + i, right + a * load_some(sin + half + i, some), some);
    }
}

/* Where rows stand: cos, sin [rows, dims], dims 0 where the layer has no positions. */
typedef struct {
    const bf16 *cos, *sin;
    int64_t dims;
} Rope;

/* A row [q0 g0 q1 g1 .. k v] becomes [q0 q1 .. k v g0 g1 ..]: attention reads queries that follow each other. */
static void set_gates_apart(const Layer *l, bf16 *row) {
    const int64_t dim = l->head_dim, wide = l->heads * dim, rest = l->qkv.size - 2 * wide;
    const size_t bytes = (size_t)dim * sizeof *row;
    bf16 *gates = (bf16 *)own_memory(wide * (int64_t)sizeof *row);
    for (int64_t head = 0; head < l->heads; head++) {
        memcpy(gates + head * dim, row + (2 * head + 1) * dim, bytes);
        memmove(row + head * dim, row + 2 * head * dim, bytes);
    }
    memmove(row + wide, row + 2 * wide, (size_t)rest * sizeof *row);
    memcpy(row + wide + rest, gates, (size_t)wide * sizeof *row);
}

/* Rows of a product, `apart` apart, as heads in their place: queries, keys, and values where these have a norm. */
static void turn_heads(Team *t, const Layer *l, int64_t rows, Rope rope, bf16 *qkv, int64_t apart) {
    const int64_t dim = l->head_dim, turned = l->heads + l->key_heads, heads = turned + (l->value_norm ? l->key_heads : 0);
    if (l->output_gate) {
        SHARED(t, row, rows) set_gates_apart(l, qkv + row * apart);
        meet(t);
    }
    if (l->norms_all_heads) {
        SHARED(t, i, 2 * rows) {
            bf16 *at = qkv + i / 2 * apart + i % 2 * l->heads * dim;
            rms_norm(at, i % 2 ? l->key_norm : l->query_norm, (i % 2 ? l->key_heads : l->heads) * dim, l->eps, at);
        }
        meet(t);
    }
    SHARED(t, i, rows * heads) {
        const int64_t row = i / heads, at = i % heads;
        bf16 *head = qkv + row * apart + at * dim;
        const float *weight = at < l->heads ? l->query_norm : at < turned ? l->key_norm : l->value_norm;
        if (weight && !l->norms_all_heads) rms_norm(head, weight, dim, l->eps, head);
        if (rope.dims && at < turned) rotated(head, rope.cos + row * rope.dims, rope.sin + row * rope.dims, rope.dims);
    }
    meet(t);
}

/* qkv [rows, q + 2 kv, and the gates] of hidden [rows, width], for at most 64 rows. */
static void project_rows(Team *t, const Layer *l, const bf16 *hidden, int64_t rows, Rope rope, bf16 *qkv, const Workspace *w) {
    multiplied(t, &l->qkv, pack(t, &l->qkv, hidden, l->before_attention, l->eps, rows, w), rows, 0, qkv);
    turn_heads(t, l, rows, rope, qkv, l->qkv.size);
}

/* What attention read [rows, heads * head_dim], times the sigmoids of the gates that stand last in the rows of qkv. */
static void gate_rows(Team *t, const Layer *l, const bf16 *qkv, int64_t rows, bf16 *read) {
    const int64_t dim = l->head_dim, wide = l->heads * dim;
    SHARED(t, i, rows * l->heads) {
        const int64_t row = i / l->heads, at = i % l->heads * dim;
        const bf16 *gates = qkv + (row + 1) * l->qkv.size - wide + at;
        bf16 *y = read + row * wide + at;
        for (int64_t d = 0; d < dim; d += LANES)
            save_some(y + d, load_some(y + d, dim - d) * rounded(sigmoid(load_some(gates + d, dim - d))), dim - d);
    }
    meet(t);
}

#endif
