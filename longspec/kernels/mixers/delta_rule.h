/* The gated delta rule for the rows of one block: what each writes and reads, head by head.
 *
 * A row's sums are over the state's key channels in their order, then over the rows of its own path in the order of their
 * depth, each product rounded before it is added: its bits depend on its path alone, not on the pass, its other rows or
 * the processor. Rows stand behind their parents. The state of a head is read for four rows at once. A full block is folded
 * into a new state in the order of its rows, so that a text has one state whoever staged it.
 */
#ifndef DELTA_RULE_H
#define DELTA_RULE_H

#include "simd.h"
#include "team.h"

enum { MOST_DIM = 256, SPAN = 64, ROWS = 4 }; /* positions of a block; rows or channels that share a reading */

typedef struct {
    const float *state;     /* [heads, key_dim, value_dim] at the block's start */
    const float *k;         /* [history, key_heads, key_dim] */
    float *u;               /* [history, heads, value_dim]: of known rows read, of new rows written */
    double *sums;           /* [history, heads] of log decays since the block's start: likewise */
    const float *queries;   /* [pass, key_heads, key_dim] */
    const float *values;    /* [pass, heads, value_dim] */
    const float *decays;    /* [pass, heads] */
    const float *strengths; /* [pass, heads] */
    float *read;            /* [pass, heads, value_dim] */
    const int64_t *rows;    /* [known + count] of the history */
    const int64_t *parents; /* [known + count] within these, or -1 */
    const int64_t *fresh;   /* [count] of the pass */
    const int64_t *key_of;  /* [heads] */
    int64_t known, count, heads, key_heads, key_dim, value_dim;
} Delta;

INLINE float dot(const float *a, const float *b, int64_t n) {
    vf total[PIECES] = {{0}};
    for (int64_t i = 0; i < n; i += WIDE)
        UNROLL for (int p = 0; p < PIECES; p++) total[p] += load(a + i + p * LANES) * load(b + i + p * LANES);
    return sum_of(total);
}

/* Of up to four rows: keys and queries times the state, [value_dim] each. */
static void by_state(const float *state, const float *const k[ROWS], const float *const q[ROWS], int64_t key_dim,
                     int64_t value_dim, float written[ROWS][MOST_DIM], float asked[ROWS][MOST_DIM]) {
    for (int64_t at = 0; at < value_dim; at += LANES) {
        vf keys[ROWS] = {{0}}, queries[ROWS] = {{0}};
        for (int64_t i = 0; i < key_dim; i++) {
            const vf s = load(state + i * value_dim + at);
            UNROLL for (int r = 0; r < ROWS; r++) {
                keys[r] += s * k[r][i];
                queries[r] += s * q[r][i];
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            save(written[r] + at, keys[r]);
            save(asked[r] + at, queries[r]);
        }
    }
}

/* One row: adds what its path holds to what the state says, writes u and its decay, and reads. */
static void row_of(const Delta *d, int64_t head, int64_t i, float *written, float *asked) {
    const int64_t dim = d->key_dim, wide = d->value_dim, key_head = d->key_of[head], at = d->known + i;
    const int64_t own = d->rows[at], pass = d->fresh[i];
    const float *k = d->k + (own * d->key_heads + key_head) * dim, *q = d->queries + (pass * d->key_heads + key_head) * dim;
    const float *v = d->values + (pass * d->heads + head) * wide, strength = d->strengths[pass * d->heads + head];
    float *u = d->u + (own * d->heads + head) * wide, *read = d->read + (pass * d->heads + head) * wide;
    int64_t path[SPAN], depth = 0;
    for (int64_t up = d->parents[at]; up >= 0 && depth < SPAN; up = d->parents[up]) path[depth++] = d->rows[up];
    const double before = depth ? d->sums[path[0] * d->heads + head] : 0;
    const double sum = d->sums[own * d->heads + head] = before + d->decays[pass * d->heads + head];
    const float faded = one_exponential((float)sum);
    for (int64_t c = 0; c < wide; c += LANES) {
        save(written + c, load(written + c) * faded);
        save(asked + c, load(asked + c) * faded);
    }
    while (depth--) {
        const int64_t j = path[depth];
        const float *key = d->k + (j * d->key_heads + key_head) * dim, *value = d->u + (j * d->heads + head) * wide;
        const float gap = one_exponential((float)(sum - d->sums[j * d->heads + head]));
        const float by_key = dot(k, key, dim) * gap, by_query = dot(q, key, dim) * gap;
        for (int64_t c = 0; c < wide; c += LANES) {
            save(written + c, load(written + c) + load(value + c) * by_key);
            save(asked + c, load(asked + c) + load(value + c) * by_query);
        }
    }
    const float by_own = dot(q, k, dim);
    for (int64_t c = 0; c < wide; c += LANES) {
        const vf new = (load(v + c) - load(written + c)) * strength;
        save(u + c, new);
        save(read + c, load(asked + c) + new * by_own);
    }
}

static void delta_by(void *args, Team *t, int64_t rank) {
    const Delta *d = args;
    float written[ROWS][MOST_DIM] __attribute__((aligned(64))), asked[ROWS][MOST_DIM] __attribute__((aligned(64)));
    (void)rank;
    SHARED(t, head, d->heads) {
        const float *state = d->state + head * d->key_dim * d->value_dim, *k[ROWS], *q[ROWS];
        const int64_t key_head = d->key_of[head];
        for (int64_t first = 0; first < d->count; first += ROWS) {
            const int64_t here = d->count - first < ROWS ? d->count - first : ROWS;
            for (int64_t r = 0; r < ROWS; r++) {
                const int64_t i = first + (r < here ? r : 0);
                k[r] = d->k + (d->rows[d->known + i] * d->key_heads + key_head) * d->key_dim;
                q[r] = d->queries + (d->fresh[i] * d->key_heads + key_head) * d->key_dim;
            }
            by_state(state, k, q, d->key_dim, d->value_dim, written, asked);
            for (int64_t r = 0; r < here; r++) row_of(d, head, first + r, written[r], asked[r]);
        }
    }
    meet(t);
}

/* A block of 64 rows and the state before it, which become the state after it. */
typedef struct {
    const float *state;   /* [heads, key_dim, value_dim] */
    const float *k;       /* [64, key_heads, key_dim] */
    const float *u;       /* [64, heads, value_dim] */
    const double *decay;  /* [64, heads]: sums of log decays since the block's start */
    float *folded;        /* [heads, key_dim, value_dim] */
    const int64_t *key_of; /* [heads] */
    int64_t heads, key_heads, key_dim, value_dim;
} Fold;

/* Some of a head's key channels: what the rows add, in their order and eight at a time, so that fewer roundings add up; and
 * what was there, faded. */
static void fold_some(const Fold *f, int64_t head, int64_t first) {
    const int64_t dim = f->key_dim, wide = f->value_dim, key_head = f->key_of[head];
    const double last = f->decay[(SPAN - 1) * f->heads + head];
    const float faded = one_exponential((float)last);
    float weights[ROWS][SPAN], left[SPAN];
    for (int64_t j = 0; j < SPAN; j++) left[j] = (float)(last - f->decay[j * f->heads + head]);
    for (int64_t j = 0; j < SPAN; j += LANES) save(left + j, exponential(load(left + j)));
    for (int64_t j = 0; j < SPAN; j++)
        for (int64_t r = 0; r < ROWS; r++) weights[r][j] = f->k[(j * f->key_heads + key_head) * dim + first + r] * left[j];
    const int64_t place = (head * dim + first) * wide;
    for (int64_t at = 0; at < wide; at += LANES) {
        vf sums[ROWS] = {{0}};
        for (int64_t some = 0; some < SPAN; some += 8) {
            vf part[ROWS] = {{0}};
            for (int64_t j = some; j < some + 8; j++) {
                const vf value = load(f->u + (j * f->heads + head) * wide + at);
                UNROLL for (int r = 0; r < ROWS; r++) part[r] += value * weights[r][j];
            }
            UNROLL for (int r = 0; r < ROWS; r++) sums[r] += part[r];
        }
        UNROLL for (int r = 0; r < ROWS; r++) sums[r] += load(f->state + place + r * wide + at) * faded;
        UNROLL for (int r = 0; r < ROWS; r++) save(f->folded + place + r * wide + at, sums[r]);
    }
}

static void fold_by(void *args, Team *t, int64_t rank) {
    const Fold *f = args;
    const int64_t each = f->key_dim / ROWS;
    (void)rank;
    SHARED(t, i, f->heads * each) fold_some(f, i / each, i % each * ROWS);
    meet(t);
}

#endif
