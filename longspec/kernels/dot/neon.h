/* NEON with the dot product of Armv8.2 (SDOT). Sixteen outputs are four registers. */
enum { ROWS_AT_ONCE = 2, VALUE_ROWS = 4, CODE_ROWS = 4 };
enum { AHEAD = 1024 }; /* bytes: codes are asked for so early */

#include "planes.h"

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

INLINE int is_centred(int bits) { return bits >= 8; }

INLINE vq look_up(const int8_t table[16], vq places) {
    return (vq)vqtbl1q_s8(vld1q_s8(table), (uint8x16_t)places);
}

/* sums + words of codes, all below 128, times a word of a row. */
INLINE vi add_words(vi sums, vq codes, const int8_t *x, const int bits) {
    (void)bits;
    int32_t word;
    memcpy(&word, x, 4);
    return (vi)vdotq_s32((int32x4_t)sums, (int8x16_t)codes, vreinterpretq_s8_s32(vdupq_n_s32(word)));
}
