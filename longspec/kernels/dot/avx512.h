/* AVX-512 (F and BW), with and without VNNI. Sixteen outputs are one register. */
enum { ROWS_AT_ONCE = 8, VALUE_ROWS = 4, CODE_ROWS = 8 };
enum { ASKS_IN_ORDER = 1 }; /* outputs of a row alone: all their weights at once, then the next ones' in memory's order */
enum { AHEAD = 3072 }; /* bytes: with AMX, 1 row of the default model takes 2.1 ms and not 2.5 with 1,024 */

#include "planes.h"

/* 32 columns of 16 rows x, `apart` values apart, as 16 words of two columns, each of 16 rows: columns become rows in four
 * rounds of exchanging neighbours, pairs, quarters and halves. */
#define TRANSPOSED
INLINE void transposed(const bf16 *x, int64_t apart, vu words[LANES]) {
    __m512 a[TILE], b[TILE];
    UNROLL for (int i = 0; i < TILE; i++) a[i] = _mm512_loadu_ps(x + i * apart);
    UNROLL for (int i = 0; i < TILE; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < TILE; i += 4)
        UNROLL for (int j = 0; j < 2; j++) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + 2 + j]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    UNROLL for (int i = 0; i < TILE; i += 8)
        UNROLL for (int j = 0; j < 4; j++) {
            b[i + j] = _mm512_shuffle_f32x4(a[i + j], a[i + 4 + j], 0x88);
            b[i + 4 + j] = _mm512_shuffle_f32x4(a[i + j], a[i + 4 + j], 0xdd);
        }
    UNROLL for (int j = 0; j < 8; j++) {
        words[j] = (vu)_mm512_shuffle_f32x4(b[j], b[8 + j], 0x88);
        words[8 + j] = (vu)_mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd);
    }
}

/* Without VNNI, 8 bits are multiplied as signed ones. */
#ifdef __AVX512VNNI__
INLINE int is_centred(int bits) { return (void)bits, 0; }
#else
INLINE int is_centred(int bits) { return bits >= 8; }
#endif

INLINE vq look_up(const int8_t table[16], vq places) {
    const __m512i all_four = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)table));
    return (vq)_mm512_shuffle_epi8(all_four, (__m512i)places);
}

/* sums + a word of codes times a word of a row, for 16 outputs. */
INLINE vi add_words(vi sums, vq codes, const int8_t *x, const int bits) {
    int32_t word;
    memcpy(&word, x, 4);
    const __m512i four = _mm512_set1_epi32(word), unsigned_codes = (__m512i)codes;
#ifdef __AVX512VNNI__
    return (void)bits, (vi)_mm512_dpbusd_epi32((__m512i)sums, unsigned_codes, four);
#else
    /* A pair's sum stays in 16 bits: 2 * 128 * 127 = 32,512 at most, when the sign is the row's. */
    const __mmask64 negative = bits >= 8 ? _mm512_movepi8_mask(unsigned_codes) : 0;
    const __m512i signs = _mm512_mask_sub_epi8(four, negative, _mm512_setzero_si512(), four);
    const __m512i pairs = _mm512_maddubs_epi16(bits >= 8 ? _mm512_abs_epi8(unsigned_codes) : unsigned_codes, signs);
    return (vi)_mm512_add_epi32((__m512i)sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}
