/* What stands between the two products of a layer that isn't attention, for the rows of a pass on a CPU.
 *
 *     ingredients   gated delta net: convolution, SiLU and unit length of queries, keys and values, decays and strengths
 *     delta         what rows of one block write, and read of the state and of each other
 *     gated_norm    what was read, normed, times the SiLU of its gate
 *     fold          a block's rows and the state before them as the state after them
 *     short_conv    LFM2: the convolution times what opens it
 *     grouped       grouped linear attention: what rows of one group read of the state, of each other and of past values
 *
 * A row's sums depend on its path alone, and are taken in one order: its bits don't depend on the pass, its other rows, the
 * threads or the processor. Rows of products are bf16, all between is fp32, and the sums of log decays fp64: they reach
 * -1000 in a block.
 */
#include "mixers/convolution.h"
#include "mixers/delta_rule.h"
#include "mixers/gates.h"
#include "mixers/grouped.h"

/* What the rows of a pass bring to the gated delta rule. */
typedef struct {
    Convolution of;           /* of queries, keys and values, one after the other */
    const bf16 *alpha, *beta; /* [rows, heads], rows `alpha_row` and `beta_row` apart */
    const float *decay, *bias; /* [heads] */
    float *queries;           /* [rows, key_heads, key_dim] */
    float *k;                 /* [history, key_heads, key_dim]: of the pass' own rows */
    float *values;            /* [rows, heads, value_dim] */
    float *decays, *strengths; /* [rows, heads] */
    int64_t alpha_row, beta_row, heads, key_heads, key_dim, value_dim;
    float scale; /* of queries */
} Ingredients;

/* A head of queries or keys, of length one; the summand is that of the models' own code. */
static void unit(float *x, int64_t dim) {
    const float factor = 1.0f / __builtin_sqrtf(dot(x, x, dim) + 1e-6f);
    for (int64_t i = 0; i < dim; i += LANES) save(x + i, load(x + i) * factor);
}

/* Of a row one head: of queries, then of keys, then of values, with what decays it and how strongly it is written. */
static void bring(const Ingredients *g, int64_t row, int64_t i) {
    const Convolution *c = &g->of;
    const int64_t keys = g->key_heads, dim = i < 2 * keys ? g->key_dim : g->value_dim;
    const int64_t first = i < 2 * keys ? i * dim : 2 * keys * g->key_dim + (i - 2 * keys) * dim;
    const int64_t own = c->history - c->rows + row, head = i - 2 * keys;
    float *to = i < keys       ? g->queries + (row * keys + i) * dim
                : i < 2 * keys ? g->k + (own * keys + i - keys) * dim
                               : g->values + (row * g->heads + head) * dim;
    convolve(c, row, first, dim, to);
    for (int64_t at = 0; at < dim; at += LANES) save(to + at, silu(load(to + at)));
    if (i < 2 * keys) unit(to, dim);
    for (int64_t at = 0; i < keys && at < dim; at += LANES) save(to + at, load(to + at) * g->scale);
    if (head < 0) return;
    const float alpha = load_some(g->alpha + row * g->alpha_row + head, 1)[0];
    const float beta = load_some(g->beta + row * g->beta_row + head, 1)[0];
    g->decays[row * g->heads + head] = g->decay[head] * softplus(alpha + g->bias[head]);
    g->strengths[row * g->heads + head] = sigmoid(all(beta))[0];
}

static void ingredients_by(void *args, Team *t, int64_t rank) {
    const Ingredients *g = args;
    const int64_t each = 2 * g->key_heads + g->heads;
    (void)rank;
    SHARED(t, i, g->of.rows * each) bring(g, i / each, i % each);
    meet(t);
}

void ingredients(Ingredients *g, Team *t, int64_t threads) { lead(t, threads, ingredients_by, g); }

/* u, sums and what is read, of the new rows. */
void delta(Delta *d, Team *t, int64_t threads) { lead(t, threads, delta_by, d); }

void fold(Fold *f, Team *t, int64_t threads) { lead(t, threads, fold_by, f); }

/* y [rows, heads, dim] = norm(read) * silu(gate). */
typedef struct {
    const float *read, *weight; /* [rows, heads, dim], [dim] */
    const bf16 *gate;           /* [rows, heads * dim], rows `gate_row` apart */
    bf16 *y;
    int64_t gate_row, rows, heads, dim;
    float eps;
} Opened;

static void gated_norm_by(void *args, Team *t, int64_t rank) {
    const Opened *o = args;
    const int64_t dim = o->dim;
    (void)rank;
    SHARED(t, i, o->rows * o->heads) {
        const float *read = o->read + i * dim, factor = 1.0f / __builtin_sqrtf(dot(read, read, dim) / (float)dim + o->eps);
        const bf16 *gate = o->gate + i / o->heads * o->gate_row + i % o->heads * dim;
        for (int64_t at = 0; at < dim; at += LANES)
            save_bf16(o->y + i * dim + at, load(read + at) * factor * load(o->weight + at) * silu(load_bf16(gate + at)));
    }
    meet(t);
}

void gated_norm(Opened *o, Team *t, int64_t threads) { lead(t, threads, gated_norm_by, o); }

/* y [rows, channels] = opening * the convolution, rounded. */
typedef struct {
    Convolution of;
    const bf16 *opening; /* [rows, channels], rows `opening_row` apart */
    bf16 *y;
    int64_t opening_row;
} Short;

static void short_conv_by(void *args, Team *t, int64_t rank) {
    const Short *s = args;
    const int64_t channels = s->of.channels, each = (channels + MOST_DIM - 1) / MOST_DIM;
    float mixed[MOST_DIM] __attribute__((aligned(64)));
    (void)rank;
    SHARED(t, i, s->of.rows * each) {
        const int64_t row = i / each, first = i % each * MOST_DIM;
        const int64_t count = channels - first < MOST_DIM ? channels - first : MOST_DIM;
        const bf16 *opening = s->opening + row * s->opening_row + first;
        convolve(&s->of, row, first, count, mixed);
        for (int64_t at = 0; at < count; at += LANES)
            save_bf16(s->y + row * channels + first + at, load_bf16(opening + at) * rounded(load(mixed + at)));
    }
    meet(t);
}

void short_conv(Short *s, Team *t, int64_t threads) { lead(t, threads, short_conv_by, s); }

/* Queries and keys of length one; then, for the rows of one group, what they read. */
void grouped_units(Grouped *g, Team *t, int64_t threads) { lead(t, threads, unit_by, g); }
void grouped(Grouped *g, Team *t, int64_t threads) { lead(t, threads, grouped_by, g); }
