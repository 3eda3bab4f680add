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

/* Of so many rows: keys and queries times the state, [value_dim] each, `wide` vectors of columns at a time. */
INLINE void by_rows(const float *state, const float *const k[ROWS], const float *const q[ROWS], int64_t key_dim, int64_t value_dim,
                    const int rows, const int wide, float written[ROWS][MOST_DIM], float asked[ROWS][MOST_DIM]) {
    for (int64_t at = 0; at < value_dim; at += wide * LANES) {
        vf keys[ROWS][ROWS] = {{{0}}}, queries[ROWS][ROWS] = {{{0}}};
        for (int64_t i = 0; i < key_dim; i++)
            UNROLL for (int w = 0; w < wide; w++) {
                const vf s = load(state + i * value_dim + at + w * LANES);
                UNROLL for (int r = 0; r < rows; r++) {
                    keys[r][w] += s * k[r][i];
                    queries[r][w] += s * q[r][i];
                }
            }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int w = 0; w < wide; w++) {
                save(written[r] + at + w * LANES, keys[r][w]);
                save(asked[r] + at + w * LANES, queries[r][w]);
            }
    }
}

/* Four rows share a reading of the state. One alone has four sums under way by its columns, as one would wait for itself. */
static void by_state(const float *state, const float *const k[ROWS], const float *const q[ROWS], int64_t key_dim,
                     int64_t value_dim, int64_t rows, float written[ROWS][MOST_DIM], float asked[ROWS][MOST_DIM]) {
    if (rows == 1 && value_dim % (ROWS * LANES) == 0)
        by_rows(state, k, q, key_dim, value_dim, 1, ROWS, written, asked);
    else
        by_rows(state, k, q, key_dim, value_dim, ROWS, 1, written, asked);
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
            by_state(state, k, q, d->key_dim, d->value_dim, here, written, asked);
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

enum { SOME = 64 }; /* columns of a state that are folded at once: what 64 rows wrote there stays in the first cache */

/* Some columns of a head: what the rows add, in their order and eight at a time, so that fewer roundings add up; and what was
 * there, faded. Rows are copied first, since they stand a power of two apart and share cache sets. */
static void fold_some(const Fold *f, int64_t head, int64_t first) {
    const int64_t dim = f->key_dim, wide = f->value_dim, key_head = f->key_of[head];
    const int64_t count = wide - first < SOME ? wide - first : SOME;
    const double last = f->decay[(SPAN - 1) * f->heads + head];
    const float faded = one_exponential((float)last);
    float u[SPAN][SOME] __attribute__((aligned(64))), weights[SPAN][WIDE] __attribute__((aligned(64))), left[SPAN];
    for (int64_t j = 0; j < SPAN; j++) {
        left[j] = one_exponential((float)(last - f->decay[j * f->heads + head]));
        memcpy(u[j], f->u + (j * f->heads + head) * wide + first, (size_t)count * sizeof *f->u);
    }
    for (int64_t key = 0; key < dim; key++) {
        const int64_t r = key % WIDE, place = (head * dim + key) * wide + first;
        for (int64_t j = 0; r == 0 && j < SPAN; j++)
            UNROLL for (int p = 0; p < PIECES; p++) {
                const float *k = f->k + (j * f->key_heads + key_head) * dim + key + p * LANES;
                save(weights[j] + p * LANES, load(k) * left[j]);
            }
        if (r % ROWS) continue;
        for (int64_t at = 0; at < count; at += LANES) {
            vf sums[ROWS] = {{0}};
            for (int64_t some = 0; some < SPAN; some += 8) {
                vf part[ROWS] = {{0}};
                for (int64_t j = some; j < some + 8; j++) {
                    const vf value = load(u[j] + at);
                    UNROLL for (int i = 0; i < ROWS; i++) part[i] += value * weights[j][r + i];
                }
                UNROLL for (int i = 0; i < ROWS; i++) sums[i] += part[i];
            }
            UNROLL for (int i = 0; i < ROWS; i++)
                save(f->folded + place + i * wide + at, sums[i] + load(f->state + place + i * wide + at) * faded);
        }
    }
}

static void fold_by(void *args, Team *t, int64_t rank) {
    const Fold *f = args;
    const int64_t each = (f->value_dim + SOME - 1) / SOME;
    (void)rank;
    SHARED(t, i, f->heads * each) fold_some(f, i / each, i % each * SOME);
    meet(t);
}

#endif
