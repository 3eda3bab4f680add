/* What the kernels share: bf16 as floats and back, an exponential, a norm, and the tiles (AMX) of 16 rows by 64 bytes.
 *
 * Rounding is to nearest even, as torch's operators do it.
 */
#include <immintrin.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define INLINE static inline __attribute__((always_inline))

enum { ROWS = 16, LANES = 16 };

typedef uint16_t bf16;

/* 16 values, or those of a mask. */
static inline __m512 widened(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline __m512 rounded(__m512 x) { return widened(narrow(x)); }
static inline __m512 load(const bf16 *x) { return widened(_mm256_loadu_si256((const void *)x)); }
static inline __m512 load_some(const bf16 *x, __mmask16 some) { return widened(_mm256_maskz_loadu_epi16(some, x)); }
static inline void save(bf16 *y, __m512 x) { _mm256_storeu_si256((void *)y, narrow(x)); }
static inline void save_some(bf16 *y, __m512 x, __mmask16 some) { _mm256_mask_storeu_epi16(y, some, narrow(x)); }

/* 16 values in fp16. */
INLINE __m512 halves(const uint16_t *x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)x)); }

/* The first so many lanes. */
static inline __mmask16 upto(int64_t lanes) {
    return lanes <= 0 ? 0 : lanes >= LANES ? (__mmask16)-1 : (__mmask16)((1 << lanes) - 1);
}

/* e^x as 2^n times a polynomial on [-ln2/2, ln2/2]: Taylor to the sixth power, relative error 2e-7. */
static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
    const __m512 n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    __m512 p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = r * p + 4.16666667e-2f;
    p = r * p + 1.66666667e-1f;
    p = r * p + 0.5f;
    p = r * p + 1.0f;
    return _mm512_scalef_ps(r * p + 1.0f, n);
}

/* Root mean square norm of a row, of any width. */
static inline void normed(const bf16 *x, const bf16 *weight, int64_t width, float eps, bf16 *y) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t k = 0; k < width; k += LANES) {
        const __m512 part = load_some(x + k, upto(width - k));
        squares += part * part;
    }
    const float factor = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / (float)width + eps);
    for (int64_t k = 0; k < width; k += LANES) {
        const __mmask16 some = upto(width - k);
        save_some(y + k, load_some(x + k, some) * factor * load_some(weight + k, some), some);
    }
}

/* 0 where the system gives leave to use tiles. */
static inline int refused(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Tiles;

/* For the calling thread. GCC's intrinsic says that it reads eight bytes: the others' stores might go as dead. */
static inline void take_tiles(const Tiles *tiles) {
    __asm__ volatile("" : : "r"(tiles) : "memory");
    _tile_loadconfig(tiles);
}

/* All eight tiles whole. */
static inline void configure(void) {
    Tiles tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.bytes[i] = 64;
        tiles.rows[i] = ROWS;
    }
    take_tiles(&tiles);
}

/* Columns become rows, in four rounds of exchanging neighbours, pairs, quarters and halves. */
static inline void transpose(float m[ROWS][ROWS]) {
    __m512 a[ROWS], b[ROWS];
    for (int i = 0; i < ROWS; i++) a[i] = _mm512_load_ps(m[i]);
    for (int i = 0; i < ROWS; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < ROWS; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + 2 + j]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int i = 0; i < ROWS; i += 8)
        for (int j = 0; j < 4; j++) {
            b[i + j] = _mm512_shuffle_f32x4(a[i + j], a[i + 4 + j], 0x88);
            b[i + 4 + j] = _mm512_shuffle_f32x4(a[i + j], a[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        _mm512_store_ps(m[j], _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88));
        _mm512_store_ps(m[8 + j], _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd));
    }
}
