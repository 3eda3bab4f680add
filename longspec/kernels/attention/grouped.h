/* Codes of 2 bits in groups of 32: of keys 32 columns of a channel, of values 32 channels of a column.
 *
 * A group's step and low are a byte each. A step is a positive fp16's upper byte without its sign: 5 bits of exponent and 3
 * of mantissa. A low is a whole number of quarter steps. Code times step is exact, so that what a code stands for is
 * rounded when low is added, as torch's operators round it.
 */
#ifndef GROUPED_H
#define GROUPED_H

#include "segment.h"

INLINE vf steps_of(const uint8_t *from) { return (vf)(load_uint8(from) << 20) * 0x1p112f; }
INLINE vf lows_of(const uint8_t *from, vf step) { return rounded(to_float(load_int8(from)) * (step * 0.25f)); }

INLINE float one_step(uint8_t from) {
    const uint32_t bits = (uint32_t)from << 20;
    float step;
    memcpy(&step, &bits, sizeof step);
    return step * 0x1p112f;
}

/* LANES codes of a column from channel d on, which are at `place` and `shift`. */
INLINE vf codes_at(const uint8_t *column, int64_t size, int64_t d, int64_t place, int64_t shift) {
    uint8_t some[LANES];
    if (size % LANES == 0) return to_float((vi)(load_uint8(column + place) >> (uint32_t)shift & 3));
    return to_float((vi)load_uint8(picked(column, size, d, 2, some)));
}

/* Keys of `count` columns from `first` on, whole blocks, as rows of bf16 [count, dim]. */
static void decode_grouped_keys(const Segment *s, int64_t head, int64_t first, int64_t count, int64_t dim, bf16 *keys) {
    const int64_t size = dim / 4, scale = first / GROUP * dim;
    const uint8_t *codes = (const uint8_t *)s->keys.codes + head * s->keys.head + first * size;
    const uint8_t *steps = (const uint8_t *)s->keys.step + head * s->keys.step_head + scale;
    const uint8_t *lows = (const uint8_t *)s->keys.low + head * s->keys.low_head + scale;
    float step[MOST_DIM], low[MOST_DIM];
    for (int64_t j = 0; j < count; j++) {
        const uint8_t *column = codes + j * size;
        __builtin_prefetch(column + CODES_AHEAD * size);
        for (int64_t d = 0; j % GROUP == 0 && d < dim; d += LANES) {
            const vf of = steps_of(steps + j / GROUP * dim + d);
            save(step + d, of), save(low + d, lows_of(lows + j / GROUP * dim + d, of));
        }
        int64_t place = 0, shift = 0;
        for (int64_t d = 0; d < dim; d += LANES) {
            save_bf16(keys + j * dim + d, codes_at(column, size, d, place, shift) * load(step + d) + load(low + d));
            go_on(&place, &shift, size, 2);
        }
    }
}

/* Their values, as `weigh` reads them. */
static void decode_grouped_values(const Segment *s, int64_t head, int64_t first, int64_t count, int64_t dim, bf16 *values) {
    const int64_t size = dim / 4, groups = dim / GROUP;
    const uint8_t *codes = (const uint8_t *)s->values.codes + head * s->values.head + first * size;
    const uint8_t *steps = (const uint8_t *)s->values.step + head * s->values.step_head + first * groups;
    const int8_t *lows = (const int8_t *)s->values.low + head * s->values.low_head + first * groups;
    for (int64_t j = 0; j < count; j += 2) {
        int64_t place = 0, shift = 0;
        vf step[2], low[2];
        __builtin_prefetch(codes + (j + CODES_AHEAD) * size);
        for (int64_t d = 0; d < dim; d += LANES) {
            vu both[2];
            for (int64_t i = 0; i < 2; i++) {
                const int64_t at = (j + i) * groups + d / GROUP;
                if (d % GROUP == 0) {
                    const float of = one_step(steps[at]);
                    step[i] = all(of), low[i] = all(one_rounded((float)lows[at] * (of * 0.25f)));
                }
                both[i] = bits_bf16(codes_at(codes + (j + i) * size, size, d, place, shift) * step[i] + low[i]);
            }
            save_pair(values, j, dim, d, both[0], both[1]);
            go_on(&place, &shift, size, 2);
        }
    }
}

#endif
