/* Products of a pass' rows with a whole matrix, of bf16, FP8 or codes, which a team shares.
 *
 * Rows are packed or coded once, then each thread multiplies them with some blocks of 32 outputs. What a row sums up, and
 * in which order, is the same whatever rows stand beside it.
 */
#ifndef PRODUCTS_H
#define PRODUCTS_H

#include <stdlib.h>

#include "float8.h"
#include "team.h"

enum { BLOCK = 32, MOST_ROWS = 64, MOST_SUMS = MOST_ROWS + TILE, FEW = 4 };

/* A call's workspace, for 64 rows: packed or coded rows, and rows of bf16. */
typedef struct {
    void *packed;
    bf16 *hidden, *wide, *beside;
} Workspace;

static Workspace parted(char *at, int64_t most) {
    Workspace w;
    w.packed = at + (-(intptr_t)at & 63);
    w.hidden = (bf16 *)((char *)w.packed + MOST_SUMS * 4 * most);
    w.wide = w.hidden + MOST_SUMS * most;
    w.beside = w.wide + MOST_SUMS * most;
    return w;
}

/* The calling thread's own memory: at least so many bytes, for as long as it lives. */
static char *own_memory(int64_t bytes) {
    static __thread char *held;
    static __thread int64_t size;
    if (size < bytes) {
        free(held);
        held = malloc((size_t)(bytes + 64)), size = bytes;
        if (!held) abort();
    }
    return held + (-(intptr_t)held & 63);
}

/* Part `part` of rows x as matrix m's product reads them, and how many parts there are. */
static void pack_part(const Matrix *m, const bf16 *x, int64_t rows, int64_t part, void *packed) {
    const int64_t width = m->width, places = width / DEEP;
    if (is_coded(m->format)) {
        const Coded to = coded_in(packed, rows, width);
        code_rows(x, rows, width, part, &to);
        return;
    }
    const int64_t first = part / places * TILE, live = rows - first < TILE ? rows - first : TILE;
    if (m->format == FORMAT_FP8) {
        pack_float8(x, rows, width, first, part % places * DEEP, packed);
        return;
    }
    const bf16 *of[TILE];
    for (int64_t i = 0; i < live; i++) of[i] = x + (first + i) * width;
    pack_columns(of, live, width, part % places * DEEP, (char *)packed + first / TILE * packed_bytes(width));
}
static int64_t pack_parts(const Matrix *m, int64_t rows) { return (rows + TILE - 1) / TILE * (m->width / DEEP); }

/* Rows x, normed unless the norm is null, as matrix m's product reads them. Few rows every thread packs for itself, which
 * takes less time than waiting for each other. */
static void *pack(Team *t, const Matrix *m, const bf16 *x, const float *norm, float eps, int64_t rows, const Workspace *w) {
    const int64_t width = m->width, parts = pack_parts(m, rows);
    begin_tiles(is_coded(m->format), rows);
    if (rows <= FEW) {
        bf16 *normed = (bf16 *)own_memory((2 * FEW + 5 * TILE) * width);
        void *packed = normed + FEW * width;
        for (int64_t row = 0; norm && row < rows; row++) rms_norm(x + row * width, norm, width, eps, normed + row * width);
        for (int64_t part = 0; part < parts; part++) pack_part(m, norm ? normed : x, rows, part, packed);
        return packed;
    }
    if (norm) {
        SHARED(t, row, rows) rms_norm(x + row * width, norm, width, eps, w->hidden + row * width);
        meet(t);
    }
    SHARED(t, part, parts) pack_part(m, norm ? w->hidden : x, rows, part, w->packed);
    meet(t);
    return w->packed;
}

/* Sums [rows, 32] of the outputs from `out` on, with the bias. */
static void product(const Matrix *m, int64_t out, void *packed, int64_t rows, float (*sums)[BLOCK]) {
    if (is_coded(m->format)) {
        const Coded x = coded_in(packed, rows, m->width);
        for (int64_t i = 0; i < BLOCK; i += TILE) product_codes(m, (out + i) / TILE, &x, rows, sums[0] + i, BLOCK);
    } else if (m->format == FORMAT_FP8)
        for (int64_t i = 0; i < BLOCK; i += TILE) product_float8(m, (out + i) / TILE, packed, rows, sums[0] + i, BLOCK);
    else
        product_pair((const bf16 *)m->weight + out * m->width, m->width, m->width, packed, rows, sums[0], BLOCK);
    if (m->bias)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < BLOCK; i += LANES) save(sums[row] + i, load(sums[row] + i) + load_bf16(m->bias + out + i));
}

/* y [rows, size] = packed rows times m, in bf16; with `add` [rows, size] plus these. */
static void multiplied(Team *t, const Matrix *m, void *packed, int64_t rows, const bf16 *add, bf16 *y) {
    float sums[MOST_SUMS][BLOCK] __attribute__((aligned(64)));
    SHARED(t, block, m->size / BLOCK) {
        const int64_t out = block * BLOCK;
        product(m, out, packed, rows, sums);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < BLOCK; i += LANES) {
                const int64_t at = row * m->size + out + i;
                const vf sum = load(sums[row] + i);
                save_bf16(y + at, add ? load_bf16(add + at) + rounded(sum) : sum);
            }
    }
    meet(t);
}

/* hidden [rows, size] = before + packed rows times m, through the norm unless it is null. */
static void residual(Team *t, const Matrix *m, const float *norm, float eps, const Workspace *w, void *packed, int64_t rows,
                     const bf16 *before, bf16 *hidden) {
    multiplied(t, m, packed, rows, norm ? 0 : before, norm ? w->beside : hidden);
    if (!norm) return;
    SHARED(t, row, rows) {
        bf16 *y = w->beside + row * m->size;
        rms_norm(y, norm, m->size, eps, y);
        for (int64_t i = 0; i < m->size; i += LANES)
            save_bf16(hidden + row * m->size + i, load_bf16(before + row * m->size + i) + load_bf16(y + i));
    }
    meet(t);
}

#endif
