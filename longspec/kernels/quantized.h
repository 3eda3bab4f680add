/* Products of coded weights and coded rows, in groups of 32 columns.
 *
 * A weight is step * code + low, with step and low of its output and group: codes are 0..15 or 0..255, and where there
 * is no low, they are symmetric about 8 or 128. A row's group is int8 codes, at most 127 in size, with a scale of their
 * own. The sum over a group is an exact integer; groups are added up in fp32, in their order. So a row's bits are the same
 * whatever rows stand beside it, and by any instructions.
 *
 * Weights lie in output tiles of 16. A tile has its groups behind each other: 8 words of four columns by 16 outputs; of 4
 * bits, words 0..3 in the lower halves and words 4..7 in the upper. They are read once for CODE_ROWS rows or for 16.
 */
#ifndef QUANTIZED_H
#define QUANTIZED_H

#include "dot.h"

enum { BF16 = 0, CODES = 1 };

typedef struct {
    const void *weight;      /* [size, width] bf16, or codes */
    const fp16 *scale, *low; /* of codes [size / 16, width / 32, 16]; low or null */
    const bf16 *bias;        /* [size] or null */
    int64_t size, width, kind, bits;
} Matrix;

/* Rows in codes: what stands behind each other in a call's workspace. Sixteen rows' values of a group stand side by side,
 * so that the products find them at fixed distances. */
typedef struct {
    int8_t *codes;  /* [rows, width] */
    float *scales;  /* [rows / 16, groups, 16] */
    float *totals;  /* likewise: sums of what the codes stand for, which the weights' lows multiply */
    int32_t *first; /* likewise: minus the middle times the codes' sum, where codes are symmetric */
} Coded;

static Coded coded_in(void *workspace, int64_t rows, int64_t width) {
    const int64_t padded = (rows + TILE - 1) / TILE * TILE, count = padded * (width / GROUP);
    Coded c;
    c.codes = (int8_t *)workspace;
    c.scales = (float *)(c.codes + padded * width);
    c.totals = c.scales + count;
    c.first = (int32_t *)(c.totals + count);
    return c;
}

static Coded from_row(const Coded *c, int64_t row, int64_t width) {
    const int64_t at = row / TILE * TILE * (width / GROUP) + row % TILE;
    return (Coded){c->codes + row * width, c->scales + at, c->totals + at, c->first + at};
}

/* A group of a row: its codes, the sum of these, and the scale. Of 32 values the greatest without their signs has as
 * numbers of 16 bits the same order. */
INLINE void code_group(const bf16 *x, int8_t *codes, float *scale, int32_t *sum) {
    uint16_t most = 0;
    for (int i = 0; i < GROUP; i++) most = (x[i] & 0x7fff) > most ? x[i] & 0x7fff : most;
    const uint32_t bits = (uint32_t)most << 16;
    float largest;
    memcpy(&largest, &bits, sizeof largest);
    const float factor = largest > 0 ? 127.0f / largest : 0.0f, turn = 12582912.0f; /* rounds, as in `exponential` */
    vi total = {0};
    UNROLL for (int i = 0; i < GROUP; i += LANES) {
        const vi whole = (vi)(load_bf16(x + i) * factor + turn) - (vi)all(turn);
        *(vc_at *)(codes + i) = __builtin_convertvector(whole, vc_at);
        total += whole;
    }
    *sum = 0;
    UNROLL for (int i = 0; i < LANES; i++) *sum += total[i];
    *scale = largest / 127.0f;
}

/* Part `part` of rows x, whose width is a multiple of 32: a group of 16 rows. What stands side by side is written by one
 * thread: row by row two of them took each other's lines away, and 16 rows of the default model 1.5 ms and not 0.2. */
static void code_rows(const bf16 *x, int64_t rows, int64_t width, int64_t bits, int64_t part, const Coded *to) {
    const int64_t groups = width / GROUP, first = part / groups * TILE, g = part % groups, at = part * TILE;
    const int64_t live = rows - first < TILE ? rows - first : TILE;
    for (int64_t row = 0; row < live; row++) {
        int32_t sum;
        const int64_t place = (first + row) * width + g * GROUP;
        code_group(x + place, to->codes + place, to->scales + at + row, &sum);
        to->totals[at + row] = to->scales[at + row] * (float)sum;
        to->first[at + row] = -sum * (1 << (bits - 1));
    }
}

/* What a group adds to a row's outputs. All instructions come here, and so to the same bits. */
INLINE vf add_group(vf sum, vi codes, vf step, vf low, const int has_low, float scale, float total) {
    sum += to_float(codes) * scale * step;
    return has_low ? sum + low * total : sum;
}

/* Sums of an output tile's 16 outputs for `rows` rows, at most CODE_ROWS. */
INLINE void by_words(const Matrix *m, int64_t tile, const Coded *x, const int rows, const int bits, const int has_low,
                     float *sums, int64_t stride) {
    const int64_t groups = m->width / GROUP;
    const uint8_t *codes = (const uint8_t *)m->weight + tile * groups * 64 * bits;
    const fp16 *steps = m->scale + tile * groups * WIDE, *lows = m->low + tile * groups * WIDE;
    vf made[CODE_ROWS][PIECES];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < PIECES; p++) made[r][p] = all(0);
    for (int64_t g = 0; g < groups; g++) {
        vi dots[CODE_ROWS][PIECES];
        group_dot(codes + g * 64 * bits, bits, x->codes + g * GROUP, m->width, rows, dots);
        UNROLL for (int p = 0; p < PIECES; p++) {
            const vf step = load_fp16(steps + g * WIDE + p * LANES);
            const vf low = has_low ? load_fp16(lows + g * WIDE + p * LANES) : step;
            UNROLL for (int r = 0; r < rows; r++) {
                const int64_t at = g * TILE + r;
                vi dot = dots[r][p];
                if (is_centred(bits) && has_low) dot -= x->first[at];
                if (!is_centred(bits) && !has_low) dot += x->first[at];
                made[r][p] = add_group(made[r][p], dot, step, low, has_low, x->scales[at], x->totals[at]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < PIECES; p++) save(sums + r * stride + p * LANES, made[r][p]);
}

#ifdef ISA_AMX
#include "dot/amx_codes.h"
#else
#define by_tiles(m, tile, x, rows, bits, has_low, sums, stride) (void)(x)
#endif

#define BY_KIND(way, x, count, to)                                        \
    {                                                                     \
        if (m->bits == 4 && m->low)                                       \
            way(m, tile, x, count, 4, 1, to, stride);                     \
        else if (m->bits == 4)                                            \
            way(m, tile, x, count, 4, 0, to, stride);                     \
        else if (m->low)                                                  \
            way(m, tile, x, count, 8, 1, to, stride);                     \
        else                                                              \
            way(m, tile, x, count, 8, 0, to, stride);                     \
    }

static void words_1(const Matrix *m, int64_t tile, const Coded *x, float *to, int64_t stride) BY_KIND(by_words, x, 1, to)
static void words_2(const Matrix *m, int64_t tile, const Coded *x, float *to, int64_t stride) BY_KIND(by_words, x, 2, to)
static void words_3(const Matrix *m, int64_t tile, const Coded *x, float *to, int64_t stride) BY_KIND(by_words, x, 3, to)
static void words_4(const Matrix *m, int64_t tile, const Coded *x, float *to, int64_t stride) BY_KIND(by_words, x, 4, to)
static void words_8(const Matrix *m, int64_t tile, const Coded *x, float *to, int64_t stride)
    BY_KIND(by_words, x, CODE_ROWS, to)

/* Sums [rows, 16] of an output tile, in rows of `stride`; with room for 16 rows more than there are, in x and in sums. */
static void product_codes(const Matrix *m, int64_t tile, const Coded *coded, int64_t rows, float *sums, int64_t stride) {
    const int64_t few = HAS_TILES && rows % TILE >= BY_TILES ? 0 : rows % TILE, many = HAS_TILES ? rows - few : 0;
    if (many) BY_KIND(by_tiles, coded, many, sums)
    for (int64_t row = many; row < rows;) {
        const Coded x = from_row(coded, row, m->width);
        float *to = sums + row * stride;
        const int64_t left = (rows < row / TILE * TILE + TILE ? rows : row / TILE * TILE + TILE) - row;
        if (CODE_ROWS == 8 && left >= 8)
            words_8(m, tile, &x, to, stride), row += 8;
        else if (left >= 4)
            words_4(m, tile, &x, to, stride), row += 4;
        else if (left == 3)
            words_3(m, tile, &x, to, stride), row += 3;
        else if (left == 2)
            words_2(m, tile, &x, to, stride), row += 2;
        else
            words_1(m, tile, &x, to, stride), row += 1;
    }
}
#undef BY_KIND

#endif
