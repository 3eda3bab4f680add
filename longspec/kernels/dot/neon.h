/* NEON with the dot product of Armv8.2 (SDOT). Sixteen outputs are four registers. */
enum { ROWS_AT_ONCE = 2, VALUE_ROWS = 4, CODE_ROWS = 4 };

/* 32 columns of 16 rows x, `apart` values apart, as fp32 [32, 16]. */
INLINE void unpack_columns(const bf16 *x, int64_t apart, float (*panel)[WIDE]) {
    for (int k = 0; k < DEEP; k += 8)
        for (int i = 0; i < WIDE; i += 4) {
            const bf16 *from = x + i * apart + k;
            const uint32x4_t a = vld1q_u32((const void *)from), b = vld1q_u32((const void *)(from + apart));
            const uint32x4_t c = vld1q_u32((const void *)(from + 2 * apart)), d = vld1q_u32((const void *)(from + 3 * apart));
            const uint32x4_t ab0 = vtrn1q_u32(a, b), ab1 = vtrn2q_u32(a, b), cd0 = vtrn1q_u32(c, d), cd1 = vtrn2q_u32(c, d);
            const uint64x2_t e0 = vreinterpretq_u64_u32(ab0), e1 = vreinterpretq_u64_u32(ab1);
            const uint64x2_t f0 = vreinterpretq_u64_u32(cd0), f1 = vreinterpretq_u64_u32(cd1);
            const uint64x2_t words[4] = {vtrn1q_u64(e0, f0), vtrn1q_u64(e1, f1), vtrn2q_u64(e0, f0), vtrn2q_u64(e1, f1)};
            UNROLL for (int w = 0; w < 4; w++) {
                const vu bits = (vu)words[w];
                save(panel[k + 2 * w] + i, (vf)(bits << 16));
                save(panel[k + 2 * w + 1] + i, (vf)(bits & 0xffff0000));
            }
        }
}

/* Whether group_dot's codes are less their middle: 8 bits are multiplied as signed ones. */
INLINE int is_centred(int bits) { return bits == 8; }

/* sums [rows, 16]: a group's codes, 8 words of 4 columns by 16 outputs, times x [rows, 32], rows `apart` apart. */
INLINE void group_dot(const uint8_t *from, const int bits, const int8_t *x, int64_t apart, const int rows,
                      vi sums[CODE_ROWS][PIECES]) {
    int32x4_t made[CODE_ROWS][PIECES];
    int8x16_t row[CODE_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int p = 0; p < PIECES; p++) made[r][p] = vdupq_n_s32(0);
        UNROLL for (int i = 0; i < 2; i++) row[r][i] = vld1q_s8(x + r * apart + 16 * i);
    }
#define WORD(codes, j)                                                                                       \
    UNROLL for (int r = 0; r < rows; r++) made[r][p] = vdotq_laneq_s32(made[r][p], codes, row[r][(j) / 4], (j) % 4);
#define BYTES(j)                                                                                             \
    UNROLL for (int p = 0; p < PIECES; p++) {                                                                \
        const uint8x16_t packed = vld1q_u8(from + 64 * (j) + 16 * p);                                        \
        const uint8x16_t first = bits == 4 ? vandq_u8(packed, vdupq_n_u8(15)) : veorq_u8(packed, vdupq_n_u8(128)); \
        WORD(vreinterpretq_s8_u8(first), j)                                                                  \
        if (bits == 4) WORD(vreinterpretq_s8_u8(vshrq_n_u8(packed, 4)), ((j) + 4) % 8)                       \
    }
    BYTES(0)
    BYTES(1)
    BYTES(2)
    BYTES(3)
    if (bits == 8) {
        BYTES(4)
        BYTES(5)
        BYTES(6)
        BYTES(7)
    }
#undef BYTES
#undef WORD
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < PIECES; p++) sums[r][p] = (vi)made[r][p];
}
