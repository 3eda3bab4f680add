/* A decoder's layers for the rows of a pass on a CPU; attention is another library's.
 *
 *     project   norm, then queries, keys and values, rotated to their positions
 *     turn      of a product that was made before, its heads normed and rotated
 *     gate      attention's output times the sigmoids of its gates
 *     finish    output and residual, norm, gate and up, activation, down and residual
 *     layers    both, and attention between them, for a run of layers
 *     linear    norm, if any, then one product: the head
 *     norm      a norm alone: between two loops of a looped model
 *     experts   the MLPs of a mixture, each for its own rows
 *
 * Weights are read where they lie, once for up to 64 rows: bf16 as a checkpoint has them, or codes (quantized.h). Sums
 * are fp32, every result is rounded to bf16 where torch's operators round it. Rows go in chunks of 64 through all layers.
 * What a row sums up, and in which order, is the same whatever rows stand beside it: a row's bits don't depend on its
 * companions, on threads, or on the processor.
 *
 * Activations and weights are row-major; norms' weights are fp32. A function that takes the team is run by all its
 * threads, which share its loops; a call's work is led once (team.h).
 */
#include "layer/heads.h"

int missing(void) { return refused(); }

static vf activated(vf x, int64_t kind) {
    vf u = x;
    if (kind == GELU_TANH) u = 1.59576912f * (x + 0.044715f * x * x * x); /* tanh is a sigmoid of twice its argument */
    return x / (1.0f + exponential(-u));
}

/* activation(gate) * up of two products, each step rounded as torch's operators round it. */
static vf gated_product(vf gate, vf up, int64_t kind) {
    if (kind != CLAMPED) return rounded(activated(gate, kind)) * up;
    const vf most = all(7.0f); /* gpt-oss's limit, and the slope of its sigmoid */
    gate = choose(gate > most, most, gate);
    up = choose(up > most, most, choose(up < -most, -most, up));
    const vf open = 1.0f / (1.0f + exponential(-rounded(1.702f * gate)));
    return rounded(up + 1.0f) * rounded(gate * rounded(open));
}

static int64_t widest(const Layer *l) {
    int64_t most = l->qkv.width;
    most = l->output.width > most ? l->output.width : most;
    return l->down.width > most ? l->down.width : most;
}

/* Bytes of workspace that a layer's calls, or with layer null a product of that width, need. */
int64_t layer_workspace(const Layer *l, int64_t width) {
    const int64_t most = l && widest(l) > width ? widest(l) : width;
    return MOST_SUMS * 10 * most + 64;
}

/* What a call of `linear` is for. */
typedef struct {
    const Matrix *m;
    const float *norm;
    float eps;
    const bf16 *x;
    int64_t rows;
    bf16 *y;
    float *logits;
    Workspace w;
} Product;

static void linear_by(void *args, Team *t, int64_t rank) {
    const Product *p = args;
    const Matrix *m = p->m;
    float sums[MOST_SUMS][BLOCK] __attribute__((aligned(64)));
    (void)rank;
    for (int64_t at = 0; at < p->rows; at += MOST_ROWS) {
        const int64_t here = p->rows - at < MOST_ROWS ? p->rows - at : MOST_ROWS;
        void *packed = pack(t, m, p->x + at * m->width, p->norm, p->eps, here, &p->w);
        if (p->y) {
            multiplied(t, m, packed, here, 0, p->y + at * m->size);
            continue;
        }
        SHARED(t, block, m->size / BLOCK) {
            product(m, block * BLOCK, packed, here, sums);
            for (int64_t row = 0; row < here; row++)
                memcpy(p->logits + (at + row) * m->size + block * BLOCK, sums[row], sizeof sums[row]);
        }
        meet(t);
    }
    end_tiles();
}

/* y [rows, size] = x [rows, width] weight^T + bias, of norm(x) unless norm is null: in bf16, or as fp32 the sums. */
void linear(const Matrix *m, const float *norm, float eps, const bf16 *x, int64_t rows, bf16 *y, float *logits, char *workspace,
            Team *t, int64_t threads) {
    Product p = {m, norm, eps, x, rows, y, logits, parted(workspace, m->width)};
    lead(t, threads, linear_by, &p);
}

/* y [rows, width] = norm(x). */
void norm(const float *weight, float eps, const bf16 *x, int64_t rows, int64_t width, bf16 *y) {
    for (int64_t row = 0; row < rows; row++) rms_norm(x + row * width, weight, width, eps, y + row * width);
}

/* w->wide [rows, wide] = activation(gate) * up, of packed rows. */
static void gated(Team *t, const Matrix *m, int64_t wide, int64_t activation, const Workspace *w, void *packed, int64_t rows) {
    float sums[MOST_SUMS][BLOCK] __attribute__((aligned(64))), gates[MOST_SUMS][BLOCK] __attribute__((aligned(64)));
    SHARED(t, block, wide / BLOCK) {
        const int64_t out = block * BLOCK;
        product(m, out, packed, rows, gates);
        product(m, wide + out, packed, rows, sums);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < BLOCK; i += LANES) {
                const vf gate = rounded(load(gates[row] + i)), up = rounded(load(sums[row] + i));
                save_bf16(w->wide + row * wide + out + i, gated_product(gate, up, activation));
            }
    }
    meet(t);
}

/* hidden [rows, width] after the layer, of before it and its attention [rows, heads * head_dim], for at most 64 rows. Null
 * attention: the layer's is left out; mlp 0: its MLP is. */
static void finish_rows(Team *t, const Layer *l, const bf16 *attention, const bf16 *before, int64_t rows, int64_t mlp, bf16 *hidden,
                        const Workspace *w) {
    if (attention) {
        void *packed = pack(t, &l->output, attention, 0, 0, rows, w);
        residual(t, &l->output, l->after_attention, l->eps, w, packed, rows, before, hidden);
    }
    if (!mlp) return;
    gated(t, &l->gate_up, l->down.width, l->activation, w, pack(t, &l->gate_up, hidden, l->before_mlp, l->eps, rows, w), rows);
    residual(t, &l->down, l->after_mlp, l->eps, w, pack(t, &l->down, w->wide, 0, 0, rows, w), rows, hidden, hidden);
}

typedef struct {
    Matrix gate_up, down;
} Expert;

/* What a call of `experts` is for. */
typedef struct {
    const Expert *all;
    const int64_t *counts; /* rows of each */
    int64_t count, activation;
    const bf16 *x;
    bf16 *y;
    Workspace w;
} Mixture;

static void experts_by(void *args, Team *t, int64_t rank) {
    const Mixture *p = args;
    const bf16 *x = p->x;
    bf16 *y = p->y;
    (void)rank;
    for (int64_t i = 0; i < p->count; i++) {
        const Matrix *in = &p->all[i].gate_up, *out = &p->all[i].down;
        for (int64_t at = 0; at < p->counts[i]; at += MOST_ROWS) {
            const int64_t here = p->counts[i] - at < MOST_ROWS ? p->counts[i] - at : MOST_ROWS;
            gated(t, in, out->width, p->activation, &p->w, pack(t, in, x, 0, 0, here, &p->w), here);
            multiplied(t, out, pack(t, out, p->w.wide, 0, 0, here, &p->w), here, 0, y);
            x += here * in->width;
            y += here * out->size;
        }
    }
    end_tiles();
}

/* y [rows, width] of x [rows, width], sorted by expert: the first counts[0] rows go through the first one. */
void experts(const Expert *all, const int64_t *counts, int64_t count, int64_t activation, const bf16 *x, bf16 *y, char *workspace,
             Team *t, int64_t threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t wider = all[i].down.width > all[i].gate_up.width ? all[i].down.width : all[i].gate_up.width;
        most = wider > most ? wider : most;
    }
    Mixture p = {all, counts, count, activation, x, y, parted(workspace, most)};
    lead(t, threads, experts_by, &p);
}

/* The rows from `at` on. */
static Rope from_position(Rope rope, int64_t at) {
    return rope.dims ? (Rope){rope.cos + at * rope.dims, rope.sin + at * rope.dims, rope.dims} : rope;
}

/* What a call of `project`, `turn`, `gate` or `finish` is for. */
typedef struct {
    const Layer *l;
    const bf16 *attention, *before;
    int64_t rows, mlp;
    Rope rope;
    bf16 *to;
    Workspace w;
    int64_t apart; /* of `turn`: values from a row to the next */
} Part;

static void project_by(void *args, Team *t, int64_t rank) {
    const Part *p = args;
    const Matrix *m = &p->l->qkv;
    (void)rank;
    for (int64_t at = 0; at < p->rows; at += MOST_ROWS) {
        const int64_t here = p->rows - at < MOST_ROWS ? p->rows - at : MOST_ROWS;
        project_rows(t, p->l, p->before + at * m->width, here, from_position(p->rope, at), p->to + at * m->size, &p->w);
    }
    end_tiles();
}

/* project_rows, for any number of rows. */
void project(const Layer *l, const bf16 *hidden, int64_t rows, const bf16 *cos, const bf16 *sin, int64_t dims, bf16 *qkv,
             char *workspace, Team *t, int64_t threads) {
    Part p = {l, 0, hidden, rows, 0, {cos, sin, dims}, qkv, parted(workspace, widest(l)), 0};
    lead(t, threads, project_by, &p);
}

static void turn_by(void *args, Team *t, int64_t rank) {
    const Part *p = args;
    (void)rank;
    turn_heads(t, p->l, p->rows, p->rope, p->to, p->apart);
}

/* turn_heads, for rows of a product that was made before. */
void turn(const Layer *l, bf16 *qkv, int64_t rows, int64_t apart, const bf16 *cos, const bf16 *sin, int64_t dims, Team *t,
          int64_t threads) {
    Part p = {.l = l, .rows = rows, .rope = {cos, sin, dims}, .to = qkv, .apart = apart};
    lead(t, threads, turn_by, &p);
}

static void gate_by(void *args, Team *t, int64_t rank) {
    const Part *p = args;
    (void)rank;
    gate_rows(t, p->l, p->before, p->rows, p->to);
}

/* gate_rows, for any number of rows. */
void gate(const Layer *l, const bf16 *qkv, int64_t rows, bf16 *read, Team *t, int64_t threads) {
    Part p = {.l = l, .before = qkv, .rows = rows, .to = read};
    lead(t, threads, gate_by, &p);
}

static void finish_by(void *args, Team *t, int64_t rank) {
    const Part *p = args;
    const int64_t width = p->l->output.size;
    (void)rank;
    for (int64_t at = 0; at < p->rows; at += MOST_ROWS) {
        const int64_t here = p->rows - at < MOST_ROWS ? p->rows - at : MOST_ROWS;
        const bf16 *attended = p->attention ? p->attention + at * p->l->output.width : 0;
        finish_rows(t, p->l, attended, p->before + at * width, here, p->mlp, p->to + at * width, &p->w);
    }
    end_tiles();
}

/* finish_rows, for any number of rows. */
void finish(const Layer *l, const bf16 *attention, const bf16 *before, int64_t rows, int64_t mlp, bf16 *hidden,
            char *workspace, Team *t, int64_t threads) {
    Part p = {l, attention, before, rows, mlp, {0, 0, 0}, hidden, parted(workspace, widest(l)), 0};
    if (!attention && hidden != before) memcpy(hidden, before, (size_t)(rows * l->output.size) * sizeof *hidden);
    lead(t, threads, finish_by, &p);
}

/* Attention of the pass' rows from..to at a layer, at most 64; its queries, keys and values stand in qkv, its output in
 * `output`. With `output` null it is only planned, by one thread, while the others multiply. */
typedef void Attend(const void *reading, const void *texts, int64_t count, int64_t layer, int64_t from, int64_t to,
                    char *workspace, bf16 *output, Team *t, int64_t rank);

typedef struct {
    const void *texts; /* as the layers of one window read them */
    char *workspace;
} Read;

/* What the layers of a pass have in common. */
typedef struct {
    const Layer *const *layers;
    const int64_t *rope_of, *place_of; /* of each layer; no positions: -1; its place among the cache's layers */
    const int64_t *read_of;           /* of each of the cache's layers */
    const uint8_t *parts;             /* of each layer: ATTENTION and MLP, or what isn't left out */
    const Rope *ropes;
    const Read *reads;
    Attend *attend;
    const void *reading; /* with its queries in `qkv` */
    int64_t count, threads;
    Team *team;
} Pass;

/* What a call of `layers` is for. */
typedef struct {
    const Pass *p;
    int64_t first, last, rows;
    bf16 *hidden, *qkv, *read;
    char *workspace;
} Run;

static void layers_by(void *args, Team *t, int64_t rank) {
    const Run *run = args;
    const Pass *p = run->p;
    for (int64_t at = 0; at < run->rows; at += MOST_ROWS)
        for (int64_t i = run->first; i < run->last; i++) {
            const Layer *l = p->layers[i];
            const Workspace w = parted(run->workspace, widest(l));
            const int64_t here = run->rows - at < MOST_ROWS ? run->rows - at : MOST_ROWS;
            bf16 *x = run->hidden + at * l->output.size, *read = run->read + at * l->output.width;
            if (p->parts[i] & ATTENTION) {
                const Rope rope = p->rope_of[i] < 0 ? (Rope){0, 0, 0} : from_position(p->ropes[p->rope_of[i]], at);
                const int64_t place = p->place_of[i];
                const Read *r = p->reads + p->read_of[place];
                bf16 *qkv = run->qkv + at * l->qkv.size;
                if (rank == 0) p->attend(p->reading, r->texts, p->count, place, at, at + here, r->workspace, 0, t, rank);
                project_rows(t, l, x, here, rope, qkv, &w);
                p->attend(p->reading, r->texts, p->count, place, at, at + here, r->workspace, run->read, t, rank);
                if (l->output_gate) gate_rows(t, l, qkv, here, read);
            }
            finish_rows(t, l, p->parts[i] & ATTENTION ? read : 0, x, here, p->parts[i] & MLP, x, &w);
        }
    end_tiles();
}

/* hidden [rows, width] after the layers first..last, in its own place; qkv and read hold one layer's rows. */
void layers(const Pass *p, int64_t first, int64_t last, bf16 *hidden, int64_t rows, bf16 *qkv, bf16 *read, char *workspace) {
    Run run = {p, first, last, rows, hidden, qkv, read, workspace};
    lead(p->team, p->threads, layers_by, &run);
}
