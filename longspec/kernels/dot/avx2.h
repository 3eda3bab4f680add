/* AVX2, with and without AVX-VNNI. Sixteen outputs are two registers. */
enum { ROWS_AT_ONCE = 2, VALUE_ROWS = 4, CODE_ROWS = 4 };
enum { ASKS_IN_ORDER = 0 }; /* outputs of a row alone: the next ones' weights, column by column */
enum { AHEAD = 2048 }; /* bytes: codes are asked for so early */

#include "planes.h"

/* 16 columns of 8 rows x, `apart` values apart, as 8 words of two columns, each of 8 rows. */
#define TRANSPOSED
INLINE void transposed(const bf16 *x, int64_t apart, vu words[LANES]) {
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
        words[i] = (vu)_mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        words[i + 4] = (vu)_mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
    }
}

INLINE vq look_up(const int8_t table[16], vq places) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table));
    return (vq)_mm256_shuffle_epi8(twice, (__m256i)places);
}

INLINE __m256i four_codes(const int8_t *x) {
    int32_t word;
    memcpy(&word, x, 4);
    return _mm256_set1_epi32(word);
}

#ifdef __AVXVNNI__
INLINE int is_centred(int bits) { return (void)bits, 0; }

/* sums + words of codes times a word of a row, for 8 outputs. */
INLINE vi add_words(vi sums, vq codes, const int8_t *x, const int bits) {
    return (void)bits, (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, four_codes(x));
}
#else
/* 8 bits are multiplied as signed ones: a pair stays in 16 bits, 2 * 128 * 127 = 32,512 at most, when the sign is the
 * row's. */
INLINE int is_centred(int bits) { return bits >= 8; }

/* Words that may be added up in 16 bits: 2 * 127 * (2^bits - 1) each at most, 30,480 with eight of 4 bits. */
INLINE int words_in_16(const int bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1; }

/* Stays in its register: GCC would add up a group's words as a tree, and spill them. */
#define IN_ORDER(x) __asm__("" : "+x"(x))

/* Exact sums [halves, rows, 16] of a group's codes times x [rows, 32], rows `apart` apart. */
#define OWN_GROUP_DOT
INLINE void group_dot(const uint8_t *from, const int bits, const int halves, const int8_t *x, int64_t apart, const int rows,
                      vi sums[2][CODE_ROWS][PIECES]) {
    const __m256i ones = _mm256_set1_epi16(1);
    const int run = words_in_16(bits) < WORDS / halves ? words_in_16(bits) : WORDS / halves;
    __m256i made[CODE_ROWS][PIECES];
    UNROLL for (int j = 0; j < lines_of(bits); j++) _mm_prefetch((const char *)from + 64 * j + AHEAD, _MM_HINT_T0);
    UNROLL for (int j = 0; j < WORDS; j++) {
        const int half = halves == 2 && j >= WORDS / 2;
        __m256i codes[PIECES], sizes[PIECES];
        UNROLL for (int p = 0; p < PIECES; p++) {
            codes[p] = (__m256i)word_of(from, bits, j, p);
            sizes[p] = bits >= 8 ? _mm256_abs_epi8(codes[p]) : codes[p];
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const __m256i word = four_codes(x + r * apart + 4 * j);
            UNROLL for (int p = 0; p < PIECES; p++) {
                const __m256i pairs = _mm256_maddubs_epi16(sizes[p], bits >= 8 ? _mm256_sign_epi8(word, codes[p]) : word);
                made[r][p] = j % run ? _mm256_add_epi16(made[r][p], pairs) : pairs;
                if (run > 1) IN_ORDER(made[r][p]);
                if ((j + 1) % run) continue;
                const vi four = (vi)_mm256_madd_epi16(made[r][p], ones);
                sums[half][r][p] = j % (WORDS / halves) + 1 == run ? four : sums[half][r][p] + four;
                if (run == 1) __asm__("" : "+x"(sums[half][r][p]));
            }
        }
    }
}
#endif
