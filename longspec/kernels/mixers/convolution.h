/* The causal convolution of each channel over the last inputs of a row's path: the oldest first, each product rounded before
 * it is added.
 *
 * A row's window names its inputs among those before the block and the history's: siblings of a tree stand between a row
 * and its parent. A chain has no windows, since its inputs follow each other.
 */
#ifndef CONVOLUTION_H
#define CONVOLUTION_H

#include "simd.h"

enum { MOST_INPUTS = 64 };

typedef struct {
    const bf16 *tail;      /* [inputs - 1, channels]: before the block */
    const bf16 *x;         /* [history, channels], of which the last `rows` are the pass' own */
    const int64_t *window; /* [rows, inputs] of tail and history, or null: a chain */
    const float *weight;   /* [inputs, channels] */
    const float *bias;     /* [channels], or null */
    int64_t rows, history, inputs, channels;
} Convolution;

/* Where a row's inputs stand, the oldest first. */
static void window_of(const Convolution *c, int64_t row, const bf16 *of[MOST_INPUTS]) {
    const int64_t before = c->inputs - 1;
    for (int64_t i = 0; i < c->inputs; i++) {
        const int64_t at = c->window ? c->window[row * c->inputs + i] : c->history - c->rows + row + i;
        of[i] = at < before ? c->tail + at * c->channels : c->x + (at - before) * c->channels;
    }
}

/* The row's channels first .. first + count, in y; they are whole vectors of 16. */
static void convolve(const Convolution *c, int64_t row, int64_t first, int64_t count, float *y) {
    const bf16 *of[MOST_INPUTS];
    window_of(c, row, of);
    for (int64_t at = first; at < first + count; at += LANES) {
        vf sum = load_bf16(of[0] + at) * load(c->weight + at);
        for (int64_t i = 1; i < c->inputs; i++) sum += load_bf16(of[i] + at) * load(c->weight + i * c->channels + at);
        save(y + at - first, c->bias ? sum + load(c->bias + at) : sum);
    }
}

#endif
