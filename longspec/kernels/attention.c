/* Attention of the rows of a pass over KV caches, on a CPU, in bf16.
 *
 *     texts_read      all texts of a pass at one layer: their keys and values are put, and read
 *     texts_attend    the same, by a team that is at work already
 *     attention_read  one text's rows over some segments, joined with what was read before
 *     attention_choose  which columns of codes one text's rows are to read exactly (choose.h)
 *
 * A key head and a chunk of 512 positions are one task (chunk.h), so that two cores share three heads evenly. Every task
 * keeps its rows' maximum, sum and output in fp32; they are joined in the order of the positions, coded segments first.
 * Rows go in passes of at most 64. What a row computes depends on its position and what it may read, and not on the rows
 * or threads beside it, nor on the buffers that its text lies in.
 */
#include "attention/choose.h"
#include "attention/plan.h"
#include "attention/rows.h"

/* Rows of one text that stand in the same place in every layer.
 *
 * Dense, a place is where [2, key_heads, capacity, dim] lies, keys and then values. Coded, it is nine: keys' codes, lower
 * codes, steps and lows, or 0, the same of values, and the capacity in blocks. */
typedef struct {
    const int64_t *places; /* of each layer */
    int64_t kind, bits, capacity, column, columns, start; /* of a head's rows, those from `column` on */
    const int64_t *first, *last; /* as a segment's */
    const uint8_t *tail;
    const int64_t *parents;
    int64_t staged;
} Run;

/* What one text has in a pass: rows of its own, which are put where its last run is, a dense one, and the runs they read. */
typedef struct {
    const Run *runs;
    int64_t count, at, rows, put; /* from row `at` of the pass on; into column `put` */
} Text;

int missing(void) { return refused(); }

/* A tile of joined results as attention's output [rows, key_heads * groups, dim]. */
static void write_tile(const Reading *r, int64_t head, int64_t tile, const float *from, bf16 *output) {
    const int64_t all_rows = r->rows * r->groups, end = all_rows < (tile + 1) * TILE ? all_rows : (tile + 1) * TILE;
    for (int64_t j = tile * TILE; j < end; j++) {
        float sum = from[TILE + j % TILE], factor = 1;
        if (r->sinks) {
            const float sink = r->sinks[head * r->groups + j / r->rows], own = from[j % TILE], most = own > sink ? own : sink;
            factor = one_exponential(own - most);
            sum = sum * factor + one_exponential(sink - most);
        }
        bf16 *out = output + ((j % r->rows * r->key_heads + head) * r->groups + j / r->rows) * r->dim;
        for (int64_t d = 0; d < r->dim; d += LANES) {
            const vf joined = load(from + 2 * TILE + j % TILE * r->dim + d);
            save_bf16(out + d, (r->sinks ? joined * factor : joined) / sum);
        }
    }
}

/* The tasks of all plans, in one line. */
static void run_tasks(Team *t, int64_t rank, const Plan *plans, int64_t count, char *own, int64_t own_size) {
    int64_t all_tasks = 0;
    for (int64_t i = 0; i < count; i++) all_tasks += plans[i].each * plans[i].rows.r.key_heads;
    SHARED(t, i, all_tasks) {
        const Plan *p = plans;
        int64_t at = i;
        while (at >= p->each * p->rows.r.key_heads) at -= p->each * p->rows.r.key_heads, p++;
        const Own mine = own_at(own + rank * own_size, p->rows.r.dim);
        const Task *task = p->tasks + at;
        if (task->chunk == EXACT)
            read_exact(task->rows, task->group->segments, task->head, &mine, task->result);
        else
            read_chunk(task->rows, task->group, task->head, task->chunk, &mine, task->result);
    }
    meet(t);
}

/* Joins a head's results of a tile, after `state` unless it is null; gives where they stand. */
static float *joined(const Plan *p, int64_t head, int64_t tile, float *state) {
    const Reading *r = &p->rows.r;
    const int64_t at = tile * tile_floats(r), left = r->rows * r->groups - tile * TILE;
    const Task *tasks = p->tasks + head * p->each;
    float *to = state ? state : tasks->result + at;
    for (int64_t i = state ? 0 : 1; i < p->each; i++) join(to, tasks[i].result + at, left < TILE ? left : TILE, r->dim);
    return to;
}

/* Bytes of workspace for reading these segments with so many threads, and of the state that is kept between calls. */
int64_t attention_workspace(const Reading *r, const Segment *segments, int64_t count, int64_t threads) {
    int64_t columns = 0, staged = 0;
    for (int64_t i = 0; i < count; i++) columns += segments[i].columns, staged += segments[i].staged;
    return threads * (own_bytes(r->dim, staged) + 64) + plan_bytes(r, r->rows, count, columns, staged);
}
int64_t attention_state(const Reading *all) {
    Reading r = *all;
    int64_t bytes = 0;
    for (int64_t at = 0; at < all->rows; at += MOST_ROWS) {
        r.rows = all->rows - at < MOST_ROWS ? all->rows - at : MOST_ROWS;
        bytes += 4 * r.key_heads * chunk_floats(&r);
    }
    return bytes;
}

/* What a call of `attention_read` is for. */
typedef struct {
    const Reading *all;
    const Segment *segments;
    int64_t count, begin, threads, own_size;
    char *workspace;
    float *state;
    bf16 *output;
} Call;

static void read_by(void *args, Team *t, int64_t rank) {
    const Call *c = args;
    const Reading *all = c->all;
    const int64_t width = all->key_heads * all->groups * all->dim;
    float *state = c->state;
    Plan *p = (Plan *)(c->workspace + c->threads * c->own_size);
    begin_tiles(0, TILE);
    for (int64_t at = 0; at < all->rows; at += MOST_ROWS) {
        const int64_t rows = all->rows - at < MOST_ROWS ? all->rows - at : MOST_ROWS;
        Reading r = *all;
        r.rows = rows;
        const int64_t tiles = tiles_of(&r), size = tile_floats(&r);
        if (rank == 0) {
            Arena arena = {(char *)(p + 1)};
            plan(p, all, all->queries + at * all->query_row, all->rows, at, rows, c->segments, c->count, &arena);
            for (int64_t i = 0; c->begin && i < r.key_heads * tiles; i++) {
                memset(state + i * size, 0, (size_t)size * sizeof *state);
                for (int64_t row = 0; row < TILE; row++) state[i * size + row] = -__builtin_inff();
            }
        }
        meet(t);
        SHARED(t, head, r.key_heads) pack_queries(&p->rows, head);
        meet(t);
        run_tasks(t, rank, p, 1, c->workspace, c->own_size);
        SHARED(t, i, r.key_heads * tiles) {
            const float *to = joined(p, i / tiles, i % tiles, state + i * size);
            if (c->output) write_tile(&r, i / tiles, i % tiles, to, c->output + at * width);
        }
        meet(t);
        state += r.key_heads * tiles * size;
    }
    end_tiles();
}

/* Reads segments into the state, which is new with `begin`; with `output` the state is what is written there. */
void attention_read(const Reading *all, const Segment *segments, int64_t count, int64_t begin, char *workspace,
                    int64_t threads, float *state, bf16 *output, Team *t) {
    int64_t staged = 0;
    for (int64_t i = 0; i < count; i++) staged += segments[i].staged;
    Call call = {all, segments, count, begin, threads, own_bytes(all->dim, staged), workspace, state, output};
    call.own_size = (call.own_size + 63) / 64 * 64;
    lead(t, threads, read_by, &call);
}

/* A side of a coded run: four of its places. Scales stand per `every` columns, `wide` of them. */
static Side of_codes(const int64_t *at, int64_t capacity, int64_t column, int64_t size, int64_t every, int64_t wide) {
    const int64_t codes = column * size, scale = column / every * wide, head = capacity * BLOCK / every * wide;
    return (Side){
        .codes = (const char *)at[0] + codes, .head = capacity * BLOCK * size,
        .lower = at[1] ? (const char *)at[1] + codes : 0, .lower_head = capacity * BLOCK * size,
        .step = (const fp16 *)at[2] + scale, .step_head = head,
        .low = at[3] ? (const fp16 *)at[3] + scale : 0, .low_head = head};
}

static Segment of_run(const Reading *r, const Run *run, int64_t layer) {
    Segment s = {.kind = run->kind, .bits = run->bits, .columns = run->columns, .start = run->start, .first = run->first,
                 .last = run->last, .tail = run->tail, .parents = run->parents, .staged = run->staged};
    if (run->kind != DENSE) {
        const int64_t *at = run->places + 9 * layer, size = r->dim * (run->kind == DUAL ? 4 : run->bits) / 8;
        s.keys = of_codes(at, at[8], run->column, size, BLOCK, r->dim);
        s.values = of_codes(at + 4, at[8], run->column, size, 1, 1);
        return s;
    }
    const int64_t size = run->capacity * r->dim * (int64_t)sizeof(bf16);
    const char *keys = (const char *)run->places[layer] + run->column * r->dim * (int64_t)sizeof(bf16);
    s.keys = (Side){.codes = keys, .head = size};
    s.values = (Side){.codes = keys + r->key_heads * size, .head = size};
    return s;
}

/* A text's runs together. */
static void measure(const Text *text, int64_t *columns, int64_t *staged) {
    *columns = *staged = 0;
    for (int64_t i = 0; i < text->count; i++) *columns += text->runs[i].columns, *staged += text->runs[i].staged;
}

static int64_t widest_own(const Reading *all, const Text *texts, int64_t count) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t columns, staged;
        measure(texts + i, &columns, &staged);
        most = staged > most ? staged : most;
    }
    return (own_bytes(all->dim, most) + 63) / 64 * 64;
}

/* The plans of at most 64 rows of a pass, in its workspace. */
typedef struct {
    int64_t count, own_size;
    const Text *of[MOST_ROWS];
    Plan plans[MOST_ROWS];
} Plans;

/* Bytes of workspace for reading these texts with so many threads. */
int64_t texts_workspace(const Reading *all, const Text *texts, int64_t count, int64_t threads) {
    int64_t bytes = (int64_t)sizeof(Plans) + threads * widest_own(all, texts, count) + 4096;
    for (int64_t i = 0; i < count; i++) {
        int64_t columns, staged;
        measure(texts + i, &columns, &staged);
        bytes += plan_bytes(all, texts[i].rows, texts[i].count, columns, staged);
    }
    return bytes;
}

/* Keys and values of the rows in hand to where their text's last run is, at a key head. */
static void put(const Rows *rows, const Text *text, int64_t layer, int64_t head) {
    const Reading *r = &rows->r;
    const Run *own = text->runs + text->count - 1;
    const int64_t dim = r->dim, size = own->capacity * dim, wide = r->key_heads * r->groups * dim;
    bf16 *keys = (bf16 *)own->places[layer] + head * size + (text->put + rows->at) * dim;
    for (int64_t row = 0; row < r->rows; row++) {
        const bf16 *from = r->queries + row * r->query_row + wide + head * dim;
        memcpy(keys + row * dim, from, (size_t)dim * sizeof *from);
        memcpy(keys + r->key_heads * size + row * dim, from + r->key_heads * dim, (size_t)dim * sizeof *from);
    }
}

static Plans *plans_in(char *workspace) { return (Plans *)(workspace + (-(intptr_t)workspace & 63)); }

/* What each thread works in, behind the plans, and behind that what plans and results take. */
static char *own_in(char *workspace) { return (char *)(plans_in(workspace) + 1); }

/* Plans for the pass' rows from..to, at most 64, of all texts at one layer. */
static void plan_texts(const Reading *all, const Text *texts, int64_t count, int64_t layer, int64_t from, int64_t to,
                       char *workspace, int64_t threads) {
    Plans *plans = plans_in(workspace);
    plans->count = 0, plans->own_size = widest_own(all, texts, count);
    Arena arena = {own_in(workspace) + threads * plans->own_size};
    for (int64_t i = 0; i < count; i++) {
        const Text *text = texts + i;
        const int64_t first = text->at > from ? text->at : from;
        const int64_t last = text->at + text->rows < to ? text->at + text->rows : to;
        if (first >= last) continue;
        Segment *segments = take(&arena, text->count * (int64_t)sizeof(Segment));
        for (int64_t run = 0; run < text->count; run++) segments[run] = of_run(all, text->runs + run, layer);
        plan(plans->plans + plans->count, all, all->queries + first * all->query_row, text->rows, first - text->at, last - first,
             segments, text->count, &arena);
        plans->of[plans->count++] = text;
    }
}

/* As they were planned: keys and values are put, and read. */
static void read_texts(const Reading *all, int64_t layer, char *workspace, bf16 *output, Team *t, int64_t rank) {
    const int64_t heads = all->key_heads;
    const Plans *plans = plans_in(workspace);
    begin_tiles(0, TILE);
    SHARED(t, i, plans->count * heads) {
        pack_queries(&plans->plans[i / heads].rows, i % heads);
        put(&plans->plans[i / heads].rows, plans->of[i / heads], layer, i % heads);
    }
    meet(t);
    run_tasks(t, rank, plans->plans, plans->count, own_in(workspace), plans->own_size);
    end_tiles();
    SHARED(t, i, plans->count * heads) {
        const Plan *p = plans->plans + i / heads;
        bf16 *out = output + (plans->of[i / heads]->at + p->rows.at) * heads * all->groups * all->dim;
        for (int64_t tile = 0; tile < tiles_of(&p->rows.r); tile++)
            write_tile(&p->rows.r, i % heads, tile, joined(p, i % heads, tile, 0), out);
    }
    meet(t);
}

/* The pass' rows from..to, at most 64, of all texts at one layer: without an output they are planned, by one thread; then
 * their keys and values are put, and read, by the team. `all` has the pass' queries; keys and values stand behind them in
 * each row, as in a product's result. */
void texts_attend(const Reading *all, const Text *texts, int64_t count, int64_t layer, int64_t from, int64_t to,
                  char *workspace, bf16 *output, Team *t, int64_t rank) {
    if (output)
        read_texts(all, layer, workspace, output, t, rank);
    else
        plan_texts(all, texts, count, layer, from, to, workspace, t->threads);
}

/* What a call of `texts_read` is for. */
typedef struct {
    const Reading *all;
    const Text *texts;
    int64_t count, layer, from, to;
    char *workspace;
    bf16 *output;
} Pass;

static void texts_by(void *args, Team *t, int64_t rank) {
    const Pass *p = args;
    for (int64_t at = p->from; at < p->to; at += MOST_ROWS) {
        const int64_t end = p->to - at < MOST_ROWS ? p->to : at + MOST_ROWS;
        if (rank == 0) plan_texts(p->all, p->texts, p->count, p->layer, at, end, p->workspace, t->threads);
        meet(t);
        read_texts(p->all, p->layer, p->workspace, p->output, t, rank);
    }
}

void texts_read(const Reading *all, const Text *texts, int64_t count, int64_t layer, int64_t from, int64_t to,
                char *workspace, int64_t threads, bf16 *output, Team *t) {
    Pass pass = {all, texts, count, layer, from, to, workspace, output};
    lead(t, threads, texts_by, &pass);
}
