/* Plain C: what the other headers are tested against, and what runs on a processor that none of them knows. */
enum { ROWS_AT_ONCE = 1, VALUE_ROWS = 4, CODE_ROWS = 4 };

/* 32 columns of 16 rows x, `apart` values apart, as fp32 [32, 16]. */
static inline void unpack_columns(const bf16 *x, int64_t apart, float (*panel)[WIDE]) {
    for (int i = 0; i < WIDE; i++)
        for (int k = 0; k < DEEP; k++) {
            const uint32_t bits = (uint32_t)x[i * apart + k] << 16;
            memcpy(&panel[k][i], &bits, sizeof bits);
        }
}

/* Whether group_dot's codes are less their middle. */
INLINE int is_centred(int bits) { return (void)bits, 0; }

/* sums [rows, 16]: a group's codes, 8 words of 4 columns by 16 outputs, times x [rows, 32], rows `apart` apart. */
INLINE void group_dot(const uint8_t *from, const int bits, const int8_t *x, int64_t apart, const int rows,
                      vi sums[CODE_ROWS][PIECES]) {
    for (int r = 0; r < rows; r++) {
        int32_t made[WIDE] = {0};
        for (int j = 0; j < bits; j++)
            for (int i = 0; i < WIDE; i++)
                for (int k = 0; k < 4; k++) {
                    const int code = from[64 * j + 4 * i + k];
                    if (bits == 8)
                        made[i] += code * x[r * apart + 4 * j + k];
                    else
                        made[i] += (code & 15) * x[r * apart + 4 * j + k] + (code >> 4) * x[r * apart + 4 * (j + 4) + k];
                }
        memcpy(sums[r], made, sizeof made);
    }
}
