/* Products of coded weights (formats.h) and coded rows.
 *
 * A row's group of 32 columns is int8 codes, at most 127 in size, with a scale of their own. The sum over a group, or over
 * each half of it where steps are for 16 columns, is an exact integer; groups are added up in fp32, in their order. So a
 * row's bits are the same whatever rows stand beside it, and by any instructions.
 *
 * A tile's codes are read once for CODE_ROWS rows or for 16.
 */
#ifndef QUANTIZED_H
#define QUANTIZED_H

#include "dot.h"

enum { BF16 = 0 }; /* as a format's number */
static inline int is_coded(int64_t format) { return format != BF16 && format != FORMAT_FP8; } /* its rows are, too */

typedef struct Matrix {
    const void *weight; /* [size, width] bf16, or tiles */
    const bf16 *bias;   /* [size] or null */
    int64_t size, width, format;
    int64_t own;               /* outputs of this format, a multiple of 16; what follows them is in `next` */
    const struct Matrix *next; /* of another format, or null */
} Matrix;

/* Rows in codes: what stands behind each other in a call's workspace. Sixteen rows' values of a group stand side by side,
 * so that the products find them at fixed distances. */
typedef struct {
    int8_t *codes; /* [rows, width] */
    float *scales; /* [rows / 16, groups, 16] */
    float *totals; /* likewise: sums of what the codes stand for, which the weights' lows multiply */
    int32_t *sums; /* [rows / 16, groups, 2, 16]: of the codes of each half */
} Coded;

static Coded coded_in(void *workspace, int64_t rows, int64_t width) {
    const int64_t padded = (rows + TILE - 1) / TILE * TILE, count = padded * (width / GROUP);
    Coded c;
    c.codes = (int8_t *)workspace;
    c.scales = (float *)(c.codes + padded * width);
    c.totals = c.scales + count;
    c.sums = (int32_t *)(c.totals + count);
    return c;
}

/* The rows from `row` on, and their groups from `group` on. */
static Coded from_group(const Coded *c, int64_t row, int64_t group, int64_t width) {
    const int64_t at = (row / TILE * (width / GROUP) + group) * TILE, within = row % TILE;
    return (Coded){c->codes + row * width + group * GROUP, c->scales + at + within, c->totals + at + within,
                   c->sums + 2 * at + within};
}

/* A group of a row: its codes, the sums of their halves, and the scale. Values without their signs have as whole numbers the
 * same order. */
INLINE void code_group(const bf16 *x, int8_t *codes, float *scale, int32_t sums[2]) {
    vf values[GROUP / LANES];
    vi most = {0};
    UNROLL for (int i = 0; i < GROUP / LANES; i++) {
        values[i] = load_bf16(x + i * LANES);
        const vi size = (vi)absolute(values[i]);
        most = (vi)choose(size > most, (vf)size, (vf)most);
    }
    const int32_t bits = largest_whole_of(most);
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    const float factor = largest > 0 ? 127.0f / largest : 0.0f, turn = 12582912.0f; /* rounds, as in `exponential` */
    const int32_t kept = bits < 0x7f800000 ? -1 : 0; /* with infinity in it, codes mean nothing and their sums might overflow */
    UNROLL for (int half = 0; half < 2; half++) {
        vi total = {0};
        UNROLL for (int i = half * 16 / LANES; i < (half + 1) * 16 / LANES; i++) {
            const vi whole = (vi)(values[i] * factor + turn) - (vi)all(turn);
            save_int8(codes + i * LANES, whole);
            total += whole & kept;
        }
        sums[half] = whole_sum_of(total);
    }
    *scale = largest / 127.0f;
}

/* Part `part` of rows x, whose width is a multiple of 32: a group of 16 rows. What stands side by side is written by one
 * thread: row by row two of them took each other's lines away, and 16 rows of the default model 1.5 ms and not 0.2. */
static void code_rows(const bf16 *x, int64_t rows, int64_t width, int64_t part, const Coded *to) {
    const int64_t groups = width / GROUP, first = part / groups * TILE, g = part % groups, at = part * TILE;
    const int64_t live = rows - first < TILE ? rows - first : TILE;
    for (int64_t row = 0; row < live; row++) {
        int32_t sums[2];
        const int64_t place = (first + row) * width + g * GROUP;
        code_group(x + place, to->codes + place, to->scales + at + row, sums);
        to->totals[at + row] = to->scales[at + row] * (float)(sums[0] + sums[1]);
        to->sums[2 * at + row] = sums[0], to->sums[2 * at + TILE + row] = sums[1];
    }
    if (live % 4 == 3) to->sums[2 * at + live] = to->sums[2 * at + TILE + live] = 0; /* three rows go as four */
}

/* A span of a tile: where its groups' codes, steps, lows and shared factors are. */
typedef struct {
    const uint8_t *codes;
    const char *steps, *lows, *shared;
} Span;

/* The span of a tile that begins with group `first`. */
INLINE Span span_of(const Matrix *m, int64_t tile, int64_t first, const int bits, const int scales, const int has_low) {
    const int64_t left = m->width / GROUP - first;
    const Offsets o = offsets_of(left < SPAN ? left : SPAN, bits, scales, has_low);
    const char *at = (const char *)m->weight + tile * coded_tile(m->width, bits, scales, has_low) +
                     first / SPAN * offsets_of(SPAN, bits, scales, has_low).end;
    return (Span){(const uint8_t *)at + o.codes, at, at + o.lows, at + o.shared};
}

/* Scales stand before their codes, and are asked for with them. */
INLINE void prefetch_scales(const Span *s) {
    for (const char *at = s->steps; at < (const char *)s->codes; at += 64) __builtin_prefetch(at + AHEAD);
}

/* 2^(e - 128) of bytes e, denormal below 2. */
INLINE vf powers_of(const uint8_t *from) {
    const vu e = load_uint8(from);
    return choose((vi)(e < 2), (vf)((e + 1) << 21), (vf)((e - 1) << 23));
}

/* Steps of half of a span's group, or its lows, for the outputs of piece p. A product of fp16 and 8 bits is exact. */
INLINE vf scales_of(const Span *s, int64_t g, const int half, const int p, const int scales, const int is_low) {
    const char *from = (is_low ? s->lows : s->steps) + g / groups_of(scales) * scale_bytes(scales);
    if (has_zeros(scales)) return load((const float *)from + p * LANES);
    if (scales == PLAIN) return load_fp16((const fp16 *)from + p * LANES);
    if (scales == EXPONENT) return powers_of((const uint8_t *)from + p * LANES);
    const vf factor = load_fp16((const fp16 *)s->shared + 16 * is_low + p * LANES);
    const vi whole = load_int8(from + 16 * half + p * LANES);
    return is_low ? to_float(whole) * -factor : to_float(whole) * factor;
}

/* What the codes of a span's group stand above, of the outputs of piece p: their middle or their zero points, where products aren't
 * centred and there is no low. */
INLINE vi middles_of(const Span *s, int64_t g, const int p, const int bits, const int scales) {
    if (!has_zeros(scales)) return (vi){0} + middle_of(bits);
    return (vi)load_uint8(s->lows + g / groups_of(scales) * TILE + p * LANES);
}

/* What a group gives to a row's outputs: the codes' sums of its halves (or of all of it, in the first), without the middle.
 * All instructions come here, and so to the same bits. */
INLINE vf add_group(vf sum, const vi dots[2], const vf steps[2], const vf lows[2], const int halves, const int has_low,
                    float scale, float total, const int32_t *sums) {
    if (halves == 1) {
        sum = fused(to_float(dots[0]) * scale, steps[0], sum);
        return has_low ? fused(lows[0], all(total), sum) : sum;
    }
    vf part = fused(to_float(dots[1]), steps[1], to_float(dots[0]) * steps[0]);
    if (has_low) part = fused(lows[1], all((float)sums[TILE]), fused(lows[0], all((float)sums[0]), part));
    return fused(part, all(scale), sum);
}

/* Sums of a tile's 16 outputs for `rows` rows, at most CODE_ROWS. */
INLINE void by_words(const Matrix *m, int64_t tile, const Coded *x, const int rows, const int bits, const int scales,
                     const int has_low, float *sums, int64_t stride) {
    const int halves = scales == BY_16 ? 2 : 1;
    vf made[CODE_ROWS][PIECES];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < PIECES; p++) made[r][p] = all(0);
    for (int64_t first = 0; first < m->width / GROUP; first += SPAN) {
        const int64_t left = m->width / GROUP - first, count = left < SPAN ? left : SPAN;
        const Span s = span_of(m, tile, first, bits, scales, has_low);
        prefetch_scales(&s);
        for (int64_t i = 0; i < count; i++) {
            vi dots[2][CODE_ROWS][PIECES];
            const int64_t g = first + i;
            group_dot(s.codes + i * 64 * lines_of(bits), bits, halves, x->codes + g * GROUP, m->width, rows, dots);
            UNROLL for (int p = 0; p < PIECES; p++) {
                vf steps[2], lows[2];
                const vi middles = middles_of(&s, i, p, bits, scales);
                UNROLL for (int h = 0; h < halves; h++) {
                    steps[h] = scales_of(&s, i, h, p, scales, 0);
                    lows[h] = has_low ? scales_of(&s, i, h, p, scales, 1) : steps[h];
                }
                UNROLL for (int r = 0; r < rows; r++) {
                    const int64_t at = g * TILE + r;
                    const int32_t *both = x->sums + 2 * g * TILE + r;
                    vi centred[2];
                    UNROLL for (int h = 0; h < halves; h++) {
                        const int32_t of_row = halves == 1 ? both[0] + both[TILE] : both[h * TILE];
                        centred[h] = dots[h][r][p];
                        if (!has_low && !is_centred(bits)) centred[h] -= of_row * middles;
                    }
                    made[r][p] = add_group(made[r][p], centred, steps, lows, halves, has_low, x->scales[at], x->totals[at], both);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < PIECES; p++) save(sums + r * stride + p * LANES, made[r][p]);
}

#ifdef ISA_AMX
#include "dot/amx_codes.h"
#else
INLINE void by_tiles(const Matrix *m, int64_t tile, const Coded *x, int64_t rows, const int bits, const int scales,
                     const int has_low, float *sums, int64_t stride) {
    (void)m, (void)tile, (void)x, (void)rows, (void)bits, (void)scales, (void)has_low, (void)sums, (void)stride;
}
#endif

/* A function for each number of rows, which branches by the format. */
#define ONE(number, name, bits, scales, low) \
    case number: WAY(m, tile, x, ROWS, bits, scales, low, to, stride); break;
#define WORDS(count)                                                                                           \
    static void words_##count(const Matrix *m, int64_t tile, const Coded *x, float *to, int64_t stride) {     \
        switch (m->format) { FORMATS(ONE) }                                                                    \
    }
#define WAY by_words
#define ROWS 1
WORDS(1)
#undef ROWS
#define ROWS 2
WORDS(2)
#undef ROWS
#define ROWS 4
WORDS(4)
#undef ROWS
#define ROWS CODE_ROWS
WORDS(8)
#undef ROWS
#undef WAY
#define WAY by_tiles
#define ROWS rows
static void tiles_of_rows(const Matrix *m, int64_t tile, const Coded *x, int64_t rows, float *to, int64_t stride) {
    switch (m->format) { FORMATS(ONE) }
}
#undef ROWS
#undef WAY
#undef WORDS
#undef ONE

/* Sums [rows, 16] of an output tile, in rows of `stride`; with room for 16 rows more than there are, in x and in sums. */
static void product_codes(const Matrix *m, int64_t tile, const Coded *coded, int64_t rows, float *sums, int64_t stride) {
    for (; tile >= m->own / TILE; m = m->next) tile -= m->own / TILE;
    const int64_t few = HAS_TILES && rows % TILE >= BY_TILES ? 0 : rows % TILE, many = HAS_TILES ? rows - few : 0;
    if (many) tiles_of_rows(m, tile, coded, many, sums, stride);
    for (int64_t row = many; row < rows;) {
        const Coded x = from_group(coded, row, 0, m->width);
        float *to = sums + row * stride;
        const int64_t left = (rows < row / TILE * TILE + TILE ? rows : row / TILE * TILE + TILE) - row;
        if (CODE_ROWS == 8 && left >= 7)
            words_8(m, tile, &x, to, stride), row += 8;
        else if (left >= 3)
            words_4(m, tile, &x, to, stride), row += 4;
        else if (left == 2)
            words_2(m, tile, &x, to, stride), row += 2;
        else
            words_1(m, tile, &x, to, stride), row += 1;
    }
}

#endif
