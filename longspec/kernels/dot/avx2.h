/* AVX2, with and without AVX-VNNI. Sixteen outputs are two registers. */
enum { ROWS_AT_ONCE = 2, VALUE_ROWS = 4, CODE_ROWS = 4 };
enum { AHEAD = 2048 }; /* bytes: codes are asked for so early */

/* 16 columns of 8 rows x, `apart` values apart, as 8 words of two columns, each of 8 rows. */
INLINE void transposed(const bf16 *x, int64_t apart, __m256i words[8]) {
    __m256 a[8], b[8];
    UNROLL for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps((const void *)(x + i * apart));
    UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        words[i] = _mm256_castps_si256(_mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        words[i + 4] = _mm256_castps_si256(_mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

INLINE vf even_of(__m256i words) { return (vf)_mm256_slli_epi32(words, 16); }
INLINE vf odd_of(__m256i words) { return (vf)_mm256_and_si256(words, _mm256_set1_epi32(-65536)); }

/* 32 columns of 16 rows x, `apart` values apart, as fp32 [32, 16]. */
INLINE void unpack_columns(const bf16 *x, int64_t apart, float (*panel)[WIDE]) {
    for (int half = 0; half < WIDE; half += LANES)
        for (int k = 0; k < DEEP; k += 16) {
            __m256i words[8];
            transposed(x + half * apart + k, apart, words);
            UNROLL for (int i = 0; i < 8; i++) {
                save(panel[k + 2 * i] + half, even_of(words[i]));
                save(panel[k + 2 * i + 1] + half, odd_of(words[i]));
            }
        }
}

/* Sums of 8 outputs for one row x, without a panel: what the processor then does between reads of memory is less. */
#define ALONE
INLINE void multiply_alone(const bf16 *weight, int64_t apart, int64_t width, const float *x, float *sums) {
    vf total = all(0);
    for (int64_t k = 0; k < width; k += DEEP) {
        vf even = all(0), odd = all(0);
        UNROLL for (int i = 0; i < LANES; i++) __builtin_prefetch(weight + i * apart + k + LANES * apart);
        for (int half = 0; half < DEEP; half += 16) {
            __m256i words[8];
            transposed(weight + k + half, apart, words);
            UNROLL for (int i = 0; i < 8; i++) {
                even = fused(all(x[k + half + 2 * i]), even_of(words[i]), even);
                odd = fused(all(x[k + half + 2 * i + 1]), odd_of(words[i]), odd);
            }
        }
        total += even + odd;
    }
    save(sums, total);
}

/* Whether group_dot's codes are less their middle, 8 or 128: without VNNI, 8 bits are multiplied as signed ones. */
#ifdef __AVXVNNI__
INLINE int is_centred(int bits) { return (void)bits, 0; }
#else
INLINE int is_centred(int bits) { return bits == 8; }
#endif

INLINE __m256i four_codes(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm256_set1_epi32(word);
}

/* Stays in its register: GCC would add up a group's words as a tree, and spill them. */
#define IN_ORDER(x) __asm__("" : "+x"(x))

/* sums + a word of unsigned codes times a word of signed ones, for 8 outputs. */
INLINE __m256i add_words(__m256i sums, __m256i codes, __m256i magnitudes, __m256i x, const int bits) {
#ifdef __AVXVNNI__
    return (void)magnitudes, (void)bits, _mm256_dpbusd_avx_epi32(sums, codes, x);
#else
    /* Of 4 bits all eight words of a group add up to 8 * 2 * 15 * 127 = 30,480 at most: they stay in 16 bits. Of 8 bits
     * a pair does, when the sign is the row's: 2 * 128 * 127 = 32,512. */
    if (bits == 4) return _mm256_add_epi16(sums, _mm256_maddubs_epi16(codes, x));
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, codes));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

/* sums [rows, 16]: a group's codes, 8 words of 4 columns by 16 outputs, times x [rows, 32], rows `apart` apart. */
INLINE void group_dot(const uint8_t *from, const int bits, const int8_t *x, int64_t apart, const int rows,
                      vi sums[CODE_ROWS][PIECES]) {
    const __m256i lower = _mm256_set1_epi8(15);
    __m256i made[CODE_ROWS][PIECES];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < PIECES; p++) made[r][p] = _mm256_setzero_si256();
    UNROLL for (int j = 0; j < bits; j++) {
        __m256i codes[PIECES], more[PIECES];
        UNROLL for (int p = 0; p < PIECES; p++) {
            const __m256i packed = _mm256_loadu_si256((const void *)(from + 64 * j + 32 * p));
            if (bits == 4) {
                codes[p] = _mm256_and_si256(packed, lower);
                more[p] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), lower);
            } else {
                codes[p] = is_centred(8) ? _mm256_xor_si256(packed, _mm256_set1_epi8(-128)) : packed;
                more[p] = _mm256_abs_epi8(codes[p]);
            }
        }
        _mm_prefetch((const char *)from + 64 * j + AHEAD, _MM_HINT_T0);
        UNROLL for (int r = 0; r < rows; r++) {
            const __m256i word = four_codes(x + r * apart + 4 * j);
            UNROLL for (int p = 0; p < PIECES; p++) {
                made[r][p] = add_words(made[r][p], codes[p], more[p], word, bits);
                IN_ORDER(made[r][p]);
            }
            if (bits == 4) {
                const __m256i next = four_codes(x + r * apart + 4 * (j + 4));
                UNROLL for (int p = 0; p < PIECES; p++) {
                    made[r][p] = add_words(made[r][p], more[p], more[p], next, bits);
                    IN_ORDER(made[r][p]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < PIECES; p++) {
#ifndef __AVXVNNI__
            if (bits == 4) made[r][p] = _mm256_madd_epi16(made[r][p], _mm256_set1_epi16(1));
#endif
            sums[r][p] = (vi)made[r][p];
        }
}
