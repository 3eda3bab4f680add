/* Columns of a coded segment that each row reads as exact rows: hidden among the codes, and read as a part of their own.
 *
 * A row of the pass has its own columns, those that its query chose for the key head, and reads them in their order. So its
 * bits don't depend on what others chose, nor on where the exact rows lie.
 */
#ifndef EXACT_H
#define EXACT_H

#include "chunk.h"

/* One key head's exact rows of each row of the pass, as its result. */
static void read_exact(const Rows *rows, const Segment *s, int64_t head, const Own *own, float *result) {
    const Reading *r = &rows->r;
    const int64_t dim = r->dim, groups = r->groups;
    char *packed = (char *)own->chain;
    float *out = (float *)own->chain_pairs;
    memset(result, 0, (size_t)chunk_floats(r) * sizeof *result);
    for (int64_t row = 0; row < r->rows; row++) {
        const int64_t first = ((rows->at + row) * r->key_heads + head) * s->most;
        int64_t count = 0;
        for (int64_t i = first; i < first + s->most; i++) {
            if (s->chosen[i] < 0) continue;
            const bf16 *from = s->exact + s->slots[i] * 2 * dim;
            memcpy(own->keys + count * dim, from, (size_t)dim * sizeof *from);
            memcpy(own->values + count++ * dim, from + dim, (size_t)dim * sizeof *from);
        }
        const int64_t padded = (count + DEEP - 1) / DEEP * DEEP;
        if (INTERLEAVED) interleave(own->values, count, padded, dim, own->pairs);
        for (int64_t group = 0; group < groups; group += TILE) {
            const int64_t live = groups - group < TILE ? groups - group : TILE;
            const bf16 *of[TILE];
            for (int64_t i = 0; i < live; i++) of[i] = r->queries + row * r->query_row + (head * groups + group + i) * dim;
            for (int64_t d = 0; d < dim; d += DEEP) pack_columns(of, live, dim, d, packed);
            score(own->keys, count, dim, packed, live, own->scores, STRIDE);
            memset(own->weights, 0, (size_t)(padded * TILE) * sizeof *own->weights);
            memset(out, 0, (size_t)(TILE * dim) * sizeof *out);
            for (int64_t i = 0; i < live; i++) {
                const int64_t at = (group + i) * r->rows + row;
                float *to = result + at / TILE * tile_floats(r) + at % TILE, *scores = own->scores + i * STRIDE;
                hide(scores, count, padded);
                soften(r, scores, padded, own->weights + i * DEEP, to, to + TILE);
            }
            weigh(own->weights, INTERLEAVED ? own->pairs : own->values, INTERLEAVED ? padded : count, dim, live, out);
            for (int64_t i = 0; i < live; i++) {
                const int64_t at = (group + i) * r->rows + row;
                float *to = result + at / TILE * tile_floats(r) + 2 * TILE + at % TILE * dim;
                memcpy(to, out + i * dim, (size_t)dim * sizeof *out);
            }
        }
    }
}

#endif
