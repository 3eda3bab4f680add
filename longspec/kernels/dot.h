/* Products of weights and rows, by the instructions of the processor that this is compiled for.
 *
 * One header is taken, and each has the same:
 *
 *     begin_tiles, end_tiles  what a thread does before its products and after them (AMX; elsewhere nothing)
 *     pack_columns            32 columns of up to 16 rows x, as the products read them; packed_bytes is a tile's size
 *     product_bf16            sums of 16 outputs for packed rows; product_pair of 32
 *     weigh                   weights of columns times their values: attention's second product
 *     group_dot               exact integer sums of 16 outputs over a group of 32 codes, or over its halves
 *     HAS_TILES, BY_TILES     whether codes go by tiles, and from how many of 16 rows on
 *
 * The order of bf16's sums is that of TDPBF16PS (Intel's manual): 32 columns at a time; in these the even and the odd
 * columns each have a sum of their own, added to column by column; then both sums are added, and that to what was before.
 * So the bits are the same everywhere, but for denormals, which AMX flushes to zero.
 */
#ifndef DOT_H
#define DOT_H

#include "formats.h"
#include "simd.h"

enum { TILE = 16, DEEP = 32, GROUP = 32, WORDS = 8 };

#if defined(ISA_AMX)
#include "dot/amx.h"
#elif defined(__AVX512BW__)
#include "dot/avx512.h"
#include "dot/fma.h"
#elif defined(__AVX2__)
#include "dot/avx2.h"
#include "dot/fma.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "dot/neon.h"
#include "dot/fma.h"
#else
#include "dot/scalar.h"
#include "dot/fma.h"
#endif

#ifndef OWN_GROUP_DOT
/* Exact sums [halves, rows, 16] of a group's codes times x [rows, 32], rows `apart` apart. */
INLINE void group_dot(const uint8_t *from, const int bits, const int halves, const int8_t *x, int64_t apart, const int rows,
                      vi sums[2][CODE_ROWS][PIECES]) {
    UNROLL for (int h = 0; h < halves; h++)
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int p = 0; p < PIECES; p++) sums[h][r][p] = (vi){0};
    UNROLL for (int j = 0; j < lines_of(bits); j++) __builtin_prefetch(from + 64 * j + AHEAD);
    UNROLL for (int j = 0; j < WORDS; j++) { /* the rows' sums side by side: each waits for the one before it, 5 cycles */
        const int half = halves == 2 && j >= WORDS / 2;
        UNROLL for (int p = 0; p < PIECES; p++) {
            const vq codes = word_of(from, bits, j, p);
            UNROLL for (int r = 0; r < rows; r++) sums[half][r][p] = add_words(sums[half][r][p], codes, x + r * apart + 4 * j, bits);
        }
    }
}
#endif

#endif
