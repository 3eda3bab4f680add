/* Vectors of fp32 by the extensions of GCC and Clang: operators are plain C, and compile to what the target has.
 *
 * A vector `vf` has LANES floats, as wide as the target's registers: 16 (AVX-512), 8 (AVX2) or 4 (NEON, SSE2). What is
 * summed over lanes is summed over 16 lanes on every target, in PIECES vectors that a last step adds up in one order, so
 * that a sum has the same bits everywhere. Nothing is contracted (-ffp-contract=off): a product and an addition round
 * twice, except in `fused`, which rounds once on every target.
 *
 * bf16 is rounded to nearest even, as torch's operators do it; denormals are kept.
 */
#ifndef SIMD_H
#define SIMD_H

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
enum { LANES = 16 };
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
enum { LANES = 8 };
#define VECTOR_BYTES 32
#else
enum { LANES = 4 };
#define VECTOR_BYTES 16
#endif
enum { WIDE = 16, PIECES = WIDE / LANES };

typedef uint16_t bf16;
typedef uint16_t fp16;
typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES)));
typedef float vf_at __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t vi_at __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint16_t vh_at __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint8_t vb_at __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1), may_alias));
typedef int8_t vc_at __attribute__((vector_size(VECTOR_BYTES / 4), aligned(1), may_alias));

INLINE vf all(float x) { return x - (vf){0}; }
INLINE vf load(const float *x) { return *(const vf_at *)x; }
INLINE void save(float *y, vf x) { *(vf_at *)y = x; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }

/* LANES signed or unsigned bytes as whole numbers. GCC 12 takes a conversion of vectors from and to bytes apart, lane by lane,
 * and one from 16 bits by halves. */
INLINE vi load_int8(const void *x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(x));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(x));
#else
    return __builtin_convertvector(*(const vc_at *)x, vi);
#endif
}
INLINE vu load_uint8(const void *x) { return (vu)load_int8(x) & 255; }

/* The lower bytes of LANES whole numbers. */
INLINE void save_int8(void *y, vi x) {
#if defined(__AVX512F__)
    _mm_storeu_si128(y, _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
    const __m256i low = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0c080400)); /* of each half, in each of its words */
    _mm_storel_epi64(y, _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(low, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4))));
#else
    *(vc_at *)y = __builtin_convertvector(x, vc_at);
#endif
}

/* a * b + c, rounded once: by an instruction, or by libm where the target has none. */
INLINE vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    UNROLL for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

/* The same where a * b is exact in fp32, as it is of two values in bf16: there rounding once or twice is the same. */
INLINE vf fused_exact(vf a, vf b, vf c) {
#if defined(__FMA__) || defined(__aarch64__)
    return fused(a, b, c);
#else
    return a * b + c;
#endif
}

/* Lanes of a where the mask (all bits or none of each lane) is set, else of b. */
INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }
INLINE vf smaller(vf a, vf b) { return choose(a < b, a, b); }
INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* bf16: LANES values as fp32, and back, rounded. */
INLINE vf load_bf16(const bf16 *x) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)x)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)x)), 16);
#else
    return (vf)(__builtin_convertvector(*(const vh_at *)x, vu) << 16);
#endif
}
INLINE vu bits_bf16(vf x) {
    const vu bits = (vu)x, even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const vu nan = (vu)(x != x); /* stays one, whatever its lower bits are */
    return (even & ~nan) | ((bits >> 16 | 0x40) & nan);
}
INLINE void save_bf16(bf16 *y, vf x) { *(vh_at *)y = __builtin_convertvector(bits_bf16(x), vh_at); }
INLINE vf rounded(vf x) { return (vf)(bits_bf16(x) << 16); }
INLINE float one_rounded(float x) { return rounded(all(x))[0]; }

/* The same of the first `count` values, of any count; the others are 0. */
INLINE vf load_some(const bf16 *x, int64_t count) {
    bf16 values[LANES] = {0};
    if (count >= LANES) return load_bf16(x);
    for (int64_t i = 0; i < count; i++) values[i] = x[i];
    return load_bf16(values);
}
INLINE void save_some(bf16 *y, vf x, int64_t count) {
    bf16 values[LANES];
    if (count >= LANES) {
        save_bf16(y, x);
        return;
    }
    save_bf16(values, x);
    for (int64_t i = 0; i < count; i++) y[i] = values[i];
}

/* LANES values in fp16, denormals and infinities too. */
INLINE vf load_fp16(const fp16 *x) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)x));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)x));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)));
#else
    const vu bits = __builtin_convertvector(*(const vh_at *)x, vu), plain = bits & 0x7fff;
    const vu value = (vu)((vf)(plain << 13) * 0x1p112f), special = (vu)((vi)plain >= 0x7c00);
    return (vf)((bits & 0x8000) << 16 | (value & ~special) | ((plain << 13 | 0x7f800000) & special));
#endif
}
INLINE float one_fp16(fp16 x) {
    fp16 values[LANES] = {x};
    return load_fp16(values)[0];
}

/* The sum of 16 lanes: halves, quarters, pairs. */
INLINE float sum_of(const vf x[PIECES]) {
    float lanes[WIDE];
    UNROLL for (int p = 0; p < PIECES; p++) save(lanes + p * LANES, x[p]);
    for (int half = WIDE / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}
/* The sum of all lanes, halves by halves. */
INLINE int32_t whole_sum_of(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#elif defined(__AVX2__)
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}
/* The largest of all lanes, which aren't negative. */
INLINE int32_t largest_whole_of(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#elif defined(__AVX2__)
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    const __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_srli_epi64(two, 32)));
#else
    const int32_t a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
#endif
}
INLINE float largest_of(vf x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* e^x as 2^n times a polynomial on [-ln2/2, ln2/2]: Taylor to the sixth power, relative error 2e-7; exactly 1 of 0. x is
 * taken as at least -87 and at most 88. */
INLINE vf exponential(vf x) {
    x = smaller(larger(x, all(-87.0f)), all(88.0f));
    const float turn = 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    const vf n = (x * 1.44269504f + turn) - turn;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = r * 1.38888889e-3f + 8.33333333e-3f;
    p = r * p + 4.16666667e-2f;
    p = r * p + 1.66666667e-1f;
    p = r * p + 0.5f;
    p = r * p + 1.0f;
    return (r * p + 1.0f) * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
}
INLINE float one_exponential(float x) { return exponential(all(x))[0]; }

/* y = root mean square norm of x, times the weight: [width] each, of any width. */
static inline void rms_norm(const bf16 *x, const float *weight, int64_t width, float eps, bf16 *y) {
    vf squares[PIECES] = {{0}};
    for (int64_t k = 0; k < width; k += WIDE)
        UNROLL for (int p = 0; p < PIECES; p++) {
            const vf part = load_some(x + k + p * LANES, width - k - p * LANES);
            squares[p] += part * part;
        }
    const float factor = 1.0f / __builtin_sqrtf(sum_of(squares) / (float)width + eps);
    int64_t k = 0;
    for (; k + LANES <= width; k += LANES) save_bf16(y + k, load_bf16(x + k) * factor * load(weight + k));
    for (; k < width; k++) {
        const vf one = load_some(x + k, 1) * factor * weight[k];
        save_some(y + k, one, 1);
    }
}

#endif
