/* What the rows of a pass read, as tasks: the chunks of each key head, whose results are then joined in one order. */
#ifndef PLAN_H
#define PLAN_H

#include "exact.h"

enum { EXACT = -1 }; /* as a chunk: what of its codes the rows read as exact rows */

/* One key head of some rows, and a chunk of a group. */
typedef struct {
    const Rows *rows;
    const Group *group;
    int64_t head, chunk;
    float *result;
} Task;

/* What a pass of at most 64 rows of each text reads. */
typedef struct {
    Rows rows;
    Group *groups;
    Tree tree;
    Task *tasks; /* [key_heads, each] */
    int64_t count, each;
} Plan;

/* The workspace, from which pieces are taken. */
typedef struct {
    char *next;
} Arena;

static void *take(Arena *arena, int64_t bytes) {
    char *at = arena->next + (-(intptr_t)arena->next & 63);
    arena->next = at + bytes;
    return at;
}

/* The positions low..high that the rows in hand read of a segment; with a tree, of its nodes too. */
static void reach(const Segment *s, const Tree *tree, const Rows *rows, int64_t *low, int64_t *high) {
    for (int64_t row = rows->at; row < rows->at + rows->r.rows; row++) {
        int64_t first = 0, last = in_order(s);
        if (s->first) first = s->first[row], last = s->last[row] < last ? s->last[row] : last;
        if (tree) last = tree->text - s->start + tree->depths[tree->own + row] + 1;
        if (first >= last) continue;
        if (s->start + first < *low) *low = s->start + first;
        if (s->start + last > *high) *high = s->start + last;
    }
}

/* All nodes' depths; and for each of the rows in hand a chain that it lies on, of the latest rows first. */
static void plant(Tree *tree, const Segment *s, const Rows *rows) {
    const int64_t *parents = s->parents, first = s->staged - rows->all_rows + rows->at;
    tree->parents = parents, tree->nodes = s->staged, tree->own = s->staged - rows->all_rows;
    tree->text = s->start + in_order(s);
    for (int64_t j = 0; j < s->staged; j++) tree->depths[j] = parents[j] < 0 ? 0 : tree->depths[parents[j]] + 1;
    for (int64_t i = 0; i < rows->r.rows; i++) tree->chain[i] = -1;
    for (int64_t i = rows->r.rows - 1; i >= 0; i--)
        for (int64_t node = first + i; tree->chain[i] < 0 || node != first + i; node = parents[node]) {
            if (node < first || tree->chain[node - first] >= 0) break;
            tree->chain[node - first] = first + i;
        }
}

/* Bytes that planning takes, and the results, for at most 64 of the rows. */
static int64_t plan_bytes(const Reading *all, int64_t rows, int64_t segments, int64_t columns, int64_t staged) {
    Reading r = *all;
    r.rows = rows < MOST_ROWS ? rows : MOST_ROWS;
    const int64_t chunks = columns / CHUNK + 3 * segments, tasks = chunks * r.key_heads;
    const int64_t pieces = segments * (int64_t)(sizeof(Segment) + sizeof(Group)) + (int64_t)sizeof(Plan);
    return pieces + tasks * (4 * chunk_floats(&r) + (int64_t)sizeof(Task)) + (staged + MOST_ROWS) * 8 +
           tiles_of(&r) * r.key_heads * packed_bytes(r.dim) + 64 * 16;
}

/* What rows at..at + rows of a text's `all_rows` read of these segments, the first query at `queries`. */
static void plan(Plan *p, const Reading *all, const bf16 *queries, int64_t all_rows, int64_t at, int64_t rows,
                 const Segment *segments, int64_t count, Arena *arena) {
    p->rows = (Rows){*all, at, all_rows, 0};
    p->rows.r.queries = queries, p->rows.r.rows = rows;
    p->rows.packed = take(arena, tiles_of(&p->rows.r) * all->key_heads * packed_bytes(all->dim));
    p->groups = take(arena, count * (int64_t)sizeof(Group));
    p->count = p->each = 0;
    for (int64_t i = 0; i < count; i++) {
        const Segment *s = segments + i;
        const int follows = i && s->kind == DENSE && s[-1].kind == DENSE && !s[-1].parents;
        if (!follows || s[-1].start + s[-1].columns != s->start) p->groups[p->count++] = (Group){s, 0, INT64_MAX, INT64_MIN, 0};
        Group *g = p->groups + p->count - 1;
        if (s->parents) {
            p->tree.depths = take(arena, s->staged * 8);
            p->tree.chain = take(arena, rows * 8);
            plant(&p->tree, s, &p->rows);
            g->tree = &p->tree;
        }
        g->count++;
        reach(s, g->tree, &p->rows, &g->low, &g->high);
    }
    for (int64_t i = 0; i < p->count; i++)
        if (p->groups[i].low < p->groups[i].high)
            p->each += (p->groups[i].high - 1) / CHUNK - p->groups[i].low / CHUNK + 1 + !!p->groups[i].segments->chosen;
    p->tasks = take(arena, all->key_heads * p->each * (int64_t)sizeof(Task));
    Task *task = p->tasks;
    for (int64_t head = 0; head < all->key_heads; head++)
        for (int64_t i = 0; i < p->count; i++) {
            const Group *g = p->groups + i;
            for (int64_t chunk = g->low / CHUNK; g->low < g->high && chunk <= (g->high - 1) / CHUNK; chunk++)
                *task++ = (Task){&p->rows, g, head, chunk, take(arena, 4 * chunk_floats(&p->rows.r))};
            if (g->low < g->high && g->segments->chosen)
                *task++ = (Task){&p->rows, g, head, EXACT, take(arena, 4 * chunk_floats(&p->rows.r))};
        }
}

#endif
