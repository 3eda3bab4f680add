/* Products of FP8 weights (e4m3) and rows in bf16.
 *
 * A tile is 16 outputs: of each 128 columns first their bytes, output by output, then 16 scales in fp32. The 128 columns are
 * widened to bf16, which holds every e4m3 value, and multiplied as bf16 is; each such sum is multiplied by its scale and
 * added to those before it. So no weight is rounded, and the bits are the same by any instructions.
 */
#ifndef FLOAT8_H
#define FLOAT8_H

#include "quantized.h"

/* Where the rows' columns from `column` on are packed: 128 by 128, each as a matrix of its own. */
static void *packed_at(void *packed, int64_t rows, int64_t column) {
    return (char *)packed + (rows + TILE - 1) / TILE * packed_bytes(column / SCALED_BY * SCALED_BY);
}

static void pack_float8(const bf16 *x, int64_t rows, int64_t width, int64_t first, int64_t column, void *packed) {
    const int64_t start = column / SCALED_BY * SCALED_BY, count = width - start < SCALED_BY ? width - start : SCALED_BY;
    const int64_t live = rows - first < TILE ? rows - first : TILE;
    const bf16 *of[TILE];
    for (int64_t i = 0; i < live; i++) of[i] = x + (first + i) * width + start;
    pack_columns(of, live, count, column - start, (char *)packed_at(packed, rows, column) + first / TILE * packed_bytes(count));
}

/* LANES bytes as bf16, exactly; codes for no number as 480. */
INLINE void widened(const uint8_t *from, bf16 *to) {
    const vu bytes = load_uint8(from), size = bytes & 0x7f;
    const vf small = to_float((vi)size) * 0x1p-9f; /* below 2^-6 the exponent is 0 */
    const vf value = choose((vi)(size < 8), small, (vf)((size << 20) + (120u << 23)));
    *(vh_at *)to = __builtin_convertvector(((vu)value | (bytes & 0x80) << 24) >> 16, vh_at);
}

/* Sums [rows, 16] of an output tile, in rows of `stride`. */
static void product_float8(const Matrix *m, int64_t tile, void *packed, int64_t rows, float *sums, int64_t stride) {
    enum { MOST = 80 };
    bf16 wide[TILE][SCALED_BY] __attribute__((aligned(64)));
    float part[MOST][TILE] __attribute__((aligned(64)));
    for (; tile >= m->own / TILE; m = m->next) tile -= m->own / TILE;
    const uint8_t *from = (const uint8_t *)m->weight + tile * float8_tile(m->width);
    for (int64_t k = 0; k < m->width; k += SCALED_BY) {
        const int64_t count = m->width - k < SCALED_BY ? m->width - k : SCALED_BY;
        for (int64_t i = 0; i < TILE; i++) {
            for (int64_t at = 0; at < count; at += 64) __builtin_prefetch(from + i * count + at + 4096);
            for (int64_t at = 0; at < count; at += LANES) widened(from + i * count + at, wide[i] + at);
        }
        product_bf16(wide[0], SCALED_BY, count, packed_at(packed, rows, k), rows, part[0], TILE);
        const float *scales = (const float *)(from + TILE * count);
        for (int64_t row = 0; row < rows; row++)
            UNROLL for (int p = 0; p < TILE; p += LANES) {
                const vf scaled = load(part[row] + p) * load(scales + p);
                save(sums + row * stride + p, k ? load(sums + row * stride + p) + scaled : scaled);
            }
        from += TILE * count + TILE * (int64_t)sizeof(float);
    }
}

#endif
