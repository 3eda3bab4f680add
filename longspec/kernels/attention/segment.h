/* KV segments: pieces of a text's keys and values, dense or coded, and their decoding to bf16.
 *
 * Dense, a head's rows are [columns, dim] in bf16. Coded, blocks of 64 columns: a column is dim codes of 2, 4 or 8 bits,
 * channel d in the bits d / size * bits of byte d % size, where size is the column's bytes. Keys have their scales per
 * block and channel, values per column. What codes stand for is rounded as torch's operators do it.
 */
#ifndef SEGMENT_H
#define SEGMENT_H

#include "dot.h"

enum { BLOCK = 64, MOST_DIM = 512, CODES_AHEAD = 64 };
enum { DENSE = 0, SYMMETRIC = 1, ASYMMETRIC = 2, DUAL = 3, GROUPED = 4 };

typedef struct {
    const char *codes, *lower;   /* rows of bf16 or of codes; the lower plane of two */
    const fp16 *step, *low;      /* scales; bytes in grouped.h */
    int64_t head, lower_head;    /* bytes from a head to the next */
    int64_t step_head, low_head; /* scales from a head to the next */
} Side;

/* Of its `columns` the last `staged` are rows of the pass' text that are not text yet. They are a tree where `parents`
 * says whom each continues (-1: the text): node j stands at the position behind its parent's. */
typedef struct {
    Side keys, values;
    int64_t kind, bits, columns, start; /* the text's position in column 0 */
    const int64_t *first, *last;        /* [q]: a row reads the columns first..last; null: all */
    const uint8_t *tail;                /* [q, staged]: of the last columns, those that it may read; or null */
    const int64_t *parents;             /* [staged], or null; the last q nodes are the rows that read */
    int64_t staged;
    const int32_t *chosen, *slots; /* [q, key_heads, most]: codes' columns that a row reads as exact rows (exact.h), rising but */
    const bf16 *exact;             /* for -1, which is none, and where in exact [.., 2, dim], keys and values; or null */
    int64_t most, stride;
    const float *scores; /* [key_heads, groups * q, stride]: the codes' scores, where they are known already; or null */
} Segment;

/* Columns in their positions' order: without a tree's. */
INLINE int64_t in_order(const Segment *s) { return s->columns - (s->parents ? s->staged : 0); }

/* LANES codes as what they stand for, before the last rounding: code times step, rounded, plus low. */
INLINE vf value(const uint8_t *codes, const uint8_t *lower, int64_t shift, const int kind, const int bits, vf step, vf low) {
    const uint32_t mask = (1u << bits) - 1;
    if (kind == SYMMETRIC) return to_float(load_int8(codes)) * step;
    vu code = load_uint8(codes);
    if (bits < 8) code = code >> (uint32_t)shift & mask;
    if (kind == DUAL)
        code = code << 4 | (load_uint8(lower) >> (uint32_t)shift & mask);
    return rounded(to_float((vi)code) * step) + low;
}

/* A head's columns of one side from `first` on, which begins a block. */
typedef struct {
    const uint8_t *codes, *lower;
    const fp16 *steps, *lows; /* per `every` columns, `wide` of them; lows or null */
    int64_t size;             /* bytes of a column */
} Columns;

INLINE Columns from_column(const Side *side, int64_t head, int64_t first, int64_t size, int64_t every, int64_t wide) {
    const int64_t scale = first / every * wide;
    return (Columns){
        (const uint8_t *)side->codes + head * side->head + first * size,
        side->lower ? (const uint8_t *)side->lower + head * side->lower_head + first * size : 0,
        side->step + head * side->step_head + scale, side->low ? side->low + head * side->low_head + scale : 0, size};
}

INLINE void ask_early(const Columns *c, int64_t column) {
    const int64_t later = (column + CODES_AHEAD) * c->size;
    __builtin_prefetch(c->codes + later);
    if (c->lower) __builtin_prefetch(c->lower + later);
}

/* On to a column's next LANES channels: where their codes begin, and in which bits of the bytes. */
INLINE void go_on(int64_t *place, int64_t *shift, int64_t size, int64_t bits) {
    *place += LANES;
    if (*place == size) *place = 0, *shift += bits;
}

/* LANES codes from channel d on, in the lowest bits, of a column that has no LANES of them in a row. */
INLINE const uint8_t *picked(const uint8_t *column, int64_t size, int64_t d, int64_t bits, uint8_t some[LANES]) {
    for (int64_t i = 0; i < LANES; i++) some[i] = (uint8_t)(column[(d + i) % size] >> (d + i) / size * bits);
    return some;
}

/* What a column's LANES codes from channel d on stand for; they are at `place` and `shift`. */
INLINE vf values_of(const Columns *c, int64_t column, int64_t d, int64_t place, int64_t shift, const int kind,
                    const int bits, vf step, vf low) {
    const uint8_t *codes = c->codes + column * c->size, *lower = c->lower ? c->lower + column * c->size : codes;
    uint8_t some[LANES], others[LANES];
    if (c->size % LANES == 0) return value(codes + place, lower + place, shift, kind, bits, step, low);
    codes = picked(codes, c->size, d, bits, some);
    return value(codes, picked(lower, c->size, d, bits, others), 0, kind, bits, step, low);
}

/* Keys of `count` columns as rows of bf16 [count, dim]. */
INLINE void decode_keys(const Segment *s, int64_t head, int64_t first, int64_t count, int64_t dim, bf16 *keys,
                        const int kind, const int bits) {
    const Columns c = from_column(&s->keys, head, first, dim * bits / 8, BLOCK, dim);
    float step[MOST_DIM], low[MOST_DIM];
    memset(low, 0, sizeof low);
    for (int64_t j = 0; j < count; j++) {
        ask_early(&c, j);
        for (int64_t d = 0; j % BLOCK == 0 && d < dim; d += LANES) {
            const int64_t at = j / BLOCK * dim + d;
            save(step + d, rounded(load_fp16(c.steps + at)));
            if (kind != SYMMETRIC) save(low + d, rounded(load_fp16(c.lows + at)));
        }
        int64_t place = 0, shift = 0;
        for (int64_t d = 0; d < dim; d += LANES) {
            const vf keys_of = values_of(&c, j, d, place, shift, kind, bits, load(step + d), load(low + d));
            save_bf16(keys + j * dim + d, keys_of);
            go_on(&place, &shift, c.size, bits);
        }
    }
}

/* Two columns' values, as `weigh` reads them. */
INLINE void save_pair(bf16 *values, int64_t j, int64_t dim, int64_t d, vu a, vu b) {
    if (INTERLEAVED) {
        const vi both = (vi)(a | b << 16);
        *(vi_at *)(values + j * dim + 2 * d) = both;
    } else {
        *(vh_at *)(values + j * dim + d) = __builtin_convertvector(a, vh_at);
        *(vh_at *)(values + (j + 1) * dim + d) = __builtin_convertvector(b, vh_at);
    }
}

/* Values of `count` columns, an even number. */
INLINE void decode_values(const Segment *s, int64_t head, int64_t first, int64_t count, int64_t dim, bf16 *values,
                          const int kind, const int bits) {
    const Columns c = from_column(&s->values, head, first, dim * bits / 8, 1, 1);
    for (int64_t j = 0; j < count; j += 2) {
        ask_early(&c, j);
        vf step[2], low[2] = {{0}, {0}};
        for (int64_t i = 0; i < 2; i++) {
            step[i] = all(one_rounded(one_fp16(c.steps[j + i])));
            if (kind != SYMMETRIC) low[i] = all(one_rounded(one_fp16(c.lows[j + i])));
        }
        int64_t place = 0, shift = 0;
        for (int64_t d = 0; d < dim; d += LANES) {
            vu both[2];
            UNROLL for (int64_t i = 0; i < 2; i++)
                both[i] = bits_bf16(values_of(&c, j + i, d, place, shift, kind, bits, step[i], low[i]));
            save_pair(values, j, dim, d, both[0], both[1]);
            go_on(&place, &shift, c.size, bits);
        }
    }
}

/* Keys and values of `count` columns from `first` on, whole blocks. */
static void decode(const Segment *s, int64_t head, int64_t first, int64_t count, int64_t dim, bf16 *keys, bf16 *values) {
#define BOTH(kind, bits)                                                            \
    {                                                                               \
        decode_keys(s, head, first, count, dim, keys, kind, bits);                  \
        decode_values(s, head, first, count, dim, values, kind, bits);              \
    }
    if (s->kind == SYMMETRIC)
        BOTH(SYMMETRIC, 8)
    else if (s->kind == DUAL)
        BOTH(DUAL, 4)
    else if (s->bits == 8)
        BOTH(ASYMMETRIC, 8)
    else if (s->bits == 4)
        BOTH(ASYMMETRIC, 4)
    else
        BOTH(ASYMMETRIC, 2)
#undef BOTH
}

/* Dense values [count, dim] as `weigh` reads them; up to `padded` columns the rest is zero. */
static void interleave(const bf16 *values, int64_t count, int64_t padded, int64_t dim, bf16 *to) {
    for (int64_t j = 0; j < padded; j += 2)
        for (int64_t d = 0; d < dim; d += LANES) {
            vu a = {0}, b = {0};
            if (j < count) a = __builtin_convertvector(*(const vh_at *)(values + j * dim + d), vu);
            if (j + 1 < count) b = __builtin_convertvector(*(const vh_at *)(values + (j + 1) * dim + d), vu);
            save_pair(to, j, dim, d, a, b);
        }
}

INLINE const bf16 *row_of(const Side *side, int64_t head, int64_t column, int64_t dim) {
    return (const bf16 *)(side->codes + head * side->head) + column * dim;
}

#endif
