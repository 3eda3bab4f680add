/* AVX-512 (F and BW), with and without VNNI. Sixteen outputs are one register. */
enum { ROWS_AT_ONCE = 8, VALUE_ROWS = 4, CODE_ROWS = 8 };
enum { AHEAD = 3072 }; /* bytes: with AMX, 1 row of the default model takes 2.1 ms and not 2.5 with 1,024 */

/* Columns become rows, in four rounds of exchanging neighbours, pairs, quarters and halves. */
static inline void transpose(float m[TILE][TILE]) {
    __m512 a[TILE], b[TILE];
    UNROLL for (int i = 0; i < TILE; i++) a[i] = _mm512_loadu_ps(m[i]);
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
        _mm512_storeu_ps(m[j], _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88));
        _mm512_storeu_ps(m[8 + j], _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd));
    }
}

/* 32 columns of 16 rows x, `apart` values apart, as fp32 [32, 16]. */
static inline void unpack_columns(const bf16 *x, int64_t apart, float (*panel)[WIDE]) {
    float words[TILE][TILE] __attribute__((aligned(64)));
    for (int i = 0; i < TILE; i++) memcpy(words[i], x + i * apart, 64);
    transpose(words);
    for (int i = 0; i < TILE; i++) {
        const vu bits = (vu)load(words[i]);
        save(panel[2 * i], (vf)(bits << 16));
        save(panel[2 * i + 1], (vf)(bits & 0xffff0000));
    }
}

/* Whether group_dot's codes are less their middle: without VNNI, 8 bits are multiplied as signed ones. */
#ifdef __AVX512VNNI__
INLINE int is_centred(int bits) { return (void)bits, 0; }
#else
INLINE int is_centred(int bits) { return bits == 8; }
#endif

/* sums + a word of unsigned codes times a word of signed ones, for 16 outputs. */
INLINE __m512i add_words(__m512i sums, __m512i codes, const int8_t *x, const int bits) {
    int32_t word;
    memcpy(&word, x, 4);
    const __m512i four = _mm512_set1_epi32(word);
#ifdef __AVX512VNNI__
    return (void)bits, _mm512_dpbusd_epi32(sums, codes, four);
#else
    /* A pair's sum stays in 16 bits: 2 * 128 * 127 = 32,512 at most, when the sign is the row's. */
    const __mmask64 negative = bits == 8 ? _mm512_movepi8_mask(codes) : 0;
    const __m512i signs = _mm512_mask_sub_epi8(four, negative, _mm512_setzero_si512(), four);
    const __m512i pairs = _mm512_maddubs_epi16(bits == 8 ? _mm512_abs_epi8(codes) : codes, signs);
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#endif
}

/* The 8 words of a group: of 4 bits, words 0..3 are in the lower halves and 4..7 in the upper. */
INLINE void unpack_words(const uint8_t *from, const int bits, __m512i words[WORDS]) {
    const __m512i lower = _mm512_set1_epi8(15);
    UNROLL for (int j = 0; j < bits; j++) {
        const __m512i packed = _mm512_loadu_si512(from + 64 * j);
        _mm_prefetch((const char *)from + 64 * j + AHEAD, _MM_HINT_T0);
        words[j] = bits == 8 ? packed : _mm512_and_si512(packed, lower);
        if (bits == 4) words[j + 4] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), lower);
        if (bits == 8 && is_centred(8)) words[j] = _mm512_xor_si512(packed, _mm512_set1_epi8(-128));
    }
}

/* sums [rows, 16]: a group's codes, 8 words of 4 columns by 16 outputs, times x [rows, 32], rows `apart` apart. */
INLINE void group_dot(const uint8_t *from, const int bits, const int8_t *x, int64_t apart, const int rows,
                      vi sums[CODE_ROWS][PIECES]) {
    __m512i words[WORDS];
    unpack_words(from, bits, words);
    UNROLL for (int r = 0; r < rows; r++) {
        __m512i sum = _mm512_setzero_si512();
        UNROLL for (int j = 0; j < WORDS; j++) sum = add_words(sum, words[j], x + r * apart + 4 * j, bits);
        sums[r][0] = (vi)sum;
    }
}
