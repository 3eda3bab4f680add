/* Plain C: what the other headers are tested against, and what runs on a processor that none of them knows. */
enum { ROWS_AT_ONCE = 1, VALUE_ROWS = 4, CODE_ROWS = 4 };
enum { AHEAD = 1024 }; /* bytes: codes are asked for so early */

#include "planes.h"

/* 32 columns of 16 rows x, `apart` values apart, as fp32 [32, 16]. */
static inline void unpack_columns(const bf16 *x, int64_t apart, float (*panel)[WIDE]) {
    for (int i = 0; i < WIDE; i++)
        for (int k = 0; k < DEEP; k++) {
            const uint32_t bits = (uint32_t)x[i * apart + k] << 16;
            memcpy(&panel[k][i], &bits, sizeof bits);
        }
}

INLINE int is_centred(int bits) { return (void)bits, 0; }

INLINE vq look_up(const int8_t table[16], vq places) {
    vq found;
    for (int i = 0; i < VECTOR_BYTES; i++) found[i] = (uint8_t)table[places[i]];
    return found;
}

/* Exact sums [halves, rows, 16] of a group's codes times x [rows, 32], rows `apart` apart. In loops: unrolled, GCC 12 works
 * on it for minutes. */
#define OWN_GROUP_DOT
static __attribute__((unused)) void group_dot(const uint8_t *from, const int bits, const int halves, const int8_t *x, int64_t apart, const int rows,
                      vi sums[2][CODE_ROWS][PIECES]) {
    int32_t made[2][CODE_ROWS][WIDE] = {{{0}}};
    for (int j = 0; j < WORDS; j++)
        for (int p = 0; p < PIECES; p++) {
            const vq codes = word_of(from, bits, j, p);
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < VECTOR_BYTES; i++)
                    made[halves == 2 && j >= WORDS / 2][r][p * LANES + i / 4] += codes[i] * x[r * apart + 4 * j + i % 4];
        }
    memcpy(sums, made, sizeof made);
}
