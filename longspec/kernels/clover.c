/* A trained head (Clover-2) around its layers: what they read, and the growth of one greedy draft from what they gave.
 *
 *     entered  norm(features) + each head's cosine of query and the token's keys, times the token's values
 *
 *     out      first norm(hidden)
 *     logits   head norm(out)
 *     state    + each head's cosine of query(state) and the token's keys, times the token's values
 *     out      join state, and what the token adds to it
 *
 * What a drafted token adds is known beforehand: its keys, values and half of the join stand in tables. The products are
 * those of layer.c, whose function is handed over. Which leaf is expanded, and when no more is, is as in grow.py: the
 * likeliest path first.
 */
#include "dot.h"
#include "team.h"

enum { MOST_BREADTH = 8 };

typedef void Linear(const void *matrix, const float *norm, float eps, const bf16 *x, int64_t rows, bf16 *y, float *sums,
                    char *workspace, Team *team, int64_t threads);

typedef struct {
    Linear *linear;
    Team *team;
    int64_t threads;
    const void *asks, *told;            /* matrices of the entry: its query, its key and value one below the other */
    const void *first, *query, *join, *head; /* of the cell; the join's half for the state */
    const float *feature_norm, *token_norm, *between, *norm; /* [width] */
    const bf16 *keys, *values, *joined; /* [size, width], of each draft token */
    int64_t width, heads, size; /* a head's channels are a multiple of 16, or all heads are one */
    float eps;
} Cell;

int missing(void) { return refused(); }

/* The `breadth` greatest logits, best first, and the probabilities of their tokens. */
static void best(const bf16 *logits, int64_t size, int64_t breadth, int64_t *tokens, float *chances) {
    float held[MOST_BREADTH];
    for (int64_t i = 0; i < breadth; i++) held[i] = -__builtin_inff(), tokens[i] = 0;
    for (int64_t start = 0; start < size; start += WIDE) {
        vf most = load_bf16(logits + start);
        float values[WIDE];
        UNROLL for (int p = 1; p < PIECES; p++) most = larger(most, load_bf16(logits + start + p * LANES));
        if (largest_of(most) <= held[breadth - 1]) continue;
        UNROLL for (int p = 0; p < PIECES; p++) save(values + p * LANES, load_bf16(logits + start + p * LANES));
        for (int i = 0; i < WIDE; i++) {
            if (values[i] <= held[breadth - 1]) continue;
            int64_t at = breadth - 1;
            for (; at > 0 && held[at - 1] < values[i]; at--) held[at] = held[at - 1], tokens[at] = tokens[at - 1];
            held[at] = values[i], tokens[at] = start + i;
        }
    }
    vf sums[PIECES] = {{0}};
    for (int64_t start = 0; start < size; start += WIDE)
        UNROLL for (int p = 0; p < PIECES; p++) sums[p] += exponential(load_bf16(logits + start + p * LANES) - held[0]);
    const float whole = sum_of(sums);
    for (int64_t i = 0; i < breadth; i++) chances[i] = one_exponential(held[i] - held[0]) / whole;
}

/* next [width] = state + cosines of query and keys, head by head, times values. */
static void attended(const Cell *c, const bf16 *state, const bf16 *query, const bf16 *keys, const bf16 *values, bf16 *next) {
    const int64_t dim = c->width / c->heads;
    for (int64_t head = 0; head < c->width; head += dim) {
        vf product[PIECES] = {{0}}, ours[PIECES] = {{0}}, theirs[PIECES] = {{0}};
        for (int64_t i = head; i < head + dim; i += WIDE)
            UNROLL for (int p = 0; p < PIECES; p++) {
                const vf q = load_bf16(query + i + p * LANES), k = load_bf16(keys + i + p * LANES);
                product[p] += q * k;
                ours[p] += q * q;
                theirs[p] += k * k;
            }
        const float lengths = __builtin_sqrtf(sum_of(ours)) * __builtin_sqrtf(sum_of(theirs));
        const float cosine = sum_of(product) / (lengths > 1e-12f ? lengths : 1e-12f);
        for (int64_t i = head; i < head + dim; i += LANES)
            save_bf16(next + i, load_bf16(state + i) + cosine * load_bf16(values + i));
    }
}

/* What the layers read [rows, width], of features and of the embeddings of the tokens behind them; beside [4 *
 * rows, width] and the workspace are for it to work in. */
void cell_enter(const Cell *c, const bf16 *features, const bf16 *tokens, int64_t rows, bf16 *beside, char *workspace,
                bf16 *entered) {
    bf16 *query = beside + rows * c->width, *both = query + rows * c->width;
    for (int64_t row = 0; row < rows; row++)
        rms_norm(features + row * c->width, c->feature_norm, c->width, c->eps, beside + row * c->width);
    c->linear(c->asks, 0, 0, beside, rows, query, 0, workspace, c->team, c->threads);
    c->linear(c->told, c->token_norm, c->eps, tokens, rows, both, 0, workspace, c->team, c->threads);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * c->width;
        attended(c, beside + at, query + at, both + 2 * at, both + 2 * at + c->width, entered + at);
    }
}

/* Nodes of a tree, at most (limit + 1) * breadth, as places in the draft vocabulary, with their parents, -1 the text, and
 * the chances of their paths; gives how many. hidden [width] is what the layers gave; states and outs are room, [limit + 1,
 * width] each; scratch [size], at least width. Nodes of depth `deepest` are not expanded, nor those with a chance below
 * `floor`. */
int64_t cell_grow(const Cell *c, const bf16 *hidden, int64_t limit, int64_t deepest, int64_t breadth, float floor,
                  bf16 *states, bf16 *outs, bf16 *scratch, char *workspace, int64_t *tokens, int64_t *parents, float *chances, int64_t *depths,
                  int64_t *rows) {
    int64_t count = 0, at = -1;
    rms_norm(hidden, c->between, c->width, c->eps, states);
    c->linear(c->first, 0, 0, states, 1, outs, 0, workspace, c->team, c->threads);
    for (int64_t row = 0;; row++) { /* of the node `at`, which is expanded */
        c->linear(c->head, c->norm, c->eps, outs + row * c->width, 1, scratch, 0, workspace, c->team, c->threads);
        best(scratch, c->size, breadth, tokens + count, chances + count);
        if (at >= 0) rows[at] = row;
        for (int64_t i = count; i < count + breadth; i++) {
            chances[i] *= at < 0 ? 1.0f : chances[at];
            parents[i] = at;
            depths[i] = at < 0 ? 1 : depths[at] + 1;
            rows[i] = -1;
        }
        count += breadth;
        int64_t next = -1, better = 0;
        for (int64_t i = 0; i < count; i++)
            if (rows[i] < 0 && depths[i] < deepest && (next < 0 || chances[i] > chances[next])) next = i;
        if (next < 0 || chances[next] < floor || row == limit) return count;
        for (int64_t i = 0; i < count; i++) better += chances[i] >= chances[next];
        if (better > limit) return count; /* what it brings would not be among the best */
        const int64_t before = parents[next] < 0 ? 0 : rows[parents[next]];
        bf16 *state = states + (row + 1) * c->width, *out = outs + (row + 1) * c->width;
        const int64_t token = tokens[next] * c->width;
        c->linear(c->query, 0, 0, states + before * c->width, 1, scratch, 0, workspace, c->team, c->threads);
        attended(c, states + before * c->width, scratch, c->keys + token, c->values + token, state);
        c->linear(c->join, 0, 0, state, 1, out, 0, workspace, c->team, c->threads);
        for (int64_t i = 0; i < c->width; i += LANES) save_bf16(out + i, load_bf16(out + i) + load_bf16(c->joined + token + i));
        at = next;
    }
}
