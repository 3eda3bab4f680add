/* Attention over codes of 2 bits in groups of 32: of keys 32 columns of a channel, of values 32 channels of a column.
 *
 * A group's step and low are a byte each: a step is a positive fp16's upper byte without its sign, 5 bits of exponent and 3
 * of mantissa, a low is a whole number of quarter steps. Nothing is decoded. For keys, a query times a group's steps is
 * coded in 8 bits, and multiplied with the columns' codes in whole numbers; the lows add a constant. For values, a weight
 * times its column's step is rounded to bf16, so that its product with a code is exact. Both go column by column in one
 * order, so that bits are the same by any instructions and with any rows beside.
 */
#ifndef GROUPED_H
#define GROUPED_H

#include "segment.h"

enum { MOST_GROUPS = MOST_DIM / GROUP };

INLINE vf steps_of(const uint8_t *from) { return (vf)(load_uint8(from) << 20) * 0x1p112f; }
INLINE vf lows_of(const uint8_t *from, vf step) { return to_float(load_int8(from)) * (step * 0.25f); }

/* A query for a group of columns: codes of it times the steps, what one of them is worth, and what the lows add. */
typedef struct {
    int8_t codes[MOST_DIM] __attribute__((aligned(64)));
    float worth, base;
} Turned;

static void turn_query(const bf16 *query, const uint8_t *steps, const uint8_t *lows, int64_t dim, Turned *to) {
    float turned[MOST_DIM];
    const float shift = 12582912.0f; /* rounds, as in `exponential` */
    vf most = all(0), base[PIECES] = {{0}};
    for (int64_t d = 0; d < dim; d += WIDE)
        UNROLL for (int p = 0; p < PIECES; p++) {
            const int64_t at = d + p * LANES;
            const vf q = load_bf16(query + at), step = steps_of(steps + at), x = q * step;
            base[p] += q * lows_of(lows + at, step);
            most = larger(most, absolute(x));
            save(turned + at, x);
        }
    const float largest = largest_of(most), factor = largest > 0 ? 127.0f / largest : 0.0f;
    for (int64_t d = 0; d < dim; d += LANES)
        save_int8(to->codes + d, (vi)(load(turned + d) * factor + shift) - (vi)all(shift));
    to->worth = largest / 127.0f, to->base = sum_of(base);
}

#if defined(__AVX512VNNI__)
/* The word k of sixteen columns for each k of four, columns of 16 bytes: a transposition, where gathering takes thrice as
 * long. */
INLINE void words_of_16(const uint8_t *codes, __m512i words[4]) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i four[4], two[4];
    UNROLL for (int i = 0; i < 4; i++) four[i] = _mm512_loadu_si512(codes + 64 * i);
    UNROLL for (int i = 0; i < 4; i += 2) {
        two[i] = _mm512_unpacklo_epi32(four[i], four[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(four[i], four[i + 1]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        words[2 * i] = _mm512_permutexvar_epi32(order, _mm512_unpacklo_epi64(two[i], two[i + 2]));
        words[2 * i + 1] = _mm512_permutexvar_epi32(order, _mm512_unpackhi_epi64(two[i], two[i + 2]));
    }
}
#endif

/* Sixteen columns' codes, as they are multiplied: four channels of each column side by side, [dim / 4, 16, 4]. */
static void spread(const uint8_t *codes, int64_t size, uint8_t *to) {
#if defined(__AVX512VNNI__)
    const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32((int)size));
    __m512i words[4];
    if (size == 16) words_of_16(codes, words);
    for (int64_t k = 0; k < size; k += 4) {
        const __m512i four = size == 16 ? words[k / 4] : _mm512_i32gather_epi32(places, codes + k, 1);
        for (int64_t shift = 0; shift < 4; shift++) {
            const __m512i moved = _mm512_srli_epi32(four, 2 * (unsigned)shift);
            _mm512_store_si512(to + (shift * size + k) * TILE, _mm512_and_si512(moved, _mm512_set1_epi8(3)));
        }
    }
#else
    for (int64_t k = 0; k < size; k += 4)
        for (int64_t shift = 0; shift < 4; shift++)
            for (int64_t j = 0; j < TILE; j++)
                for (int64_t i = 0; i < 4; i++)
                    to[(shift * size + k) * TILE + 4 * j + i] = codes[j * size + k + i] >> 2 * shift & 3;
#endif
}

/* A query's scores of sixteen columns. */
static void score_spread(const uint8_t *codes, const Turned *query, int64_t dim, float *scores) {
#if defined(__AVX512VNNI__)
    __m512i sums = _mm512_setzero_si512(), others = sums;
    for (int64_t d = 0; d < dim; d += 8) {
        int32_t words[2];
        memcpy(words, query->codes + d, 8);
        sums = _mm512_dpbusd_epi32(sums, _mm512_load_si512(codes + d * TILE), _mm512_set1_epi32(words[0]));
        others = _mm512_dpbusd_epi32(others, _mm512_load_si512(codes + (d + 4) * TILE), _mm512_set1_epi32(words[1]));
    }
    save(scores, all(query->base) + to_float((vi)_mm512_add_epi32(sums, others)) * query->worth);
#else
    int32_t sums[TILE] = {0};
    for (int64_t d = 0; d < dim; d += 4)
        for (int64_t j = 0; j < TILE; j++) {
            const uint8_t *four = codes + d * TILE + 4 * j;
            const int8_t *x = query->codes + d;
            sums[j] += (four[0] * x[0] + four[1] * x[1]) + (four[2] * x[2] + four[3] * x[3]);
        }
    for (int64_t j = 0; j < TILE; j++) scores[j] = query->base + (float)sums[j] * query->worth;
#endif
}

/* Scores [live, columns] of queries times the keys of `count` columns from `first` on, whole blocks. */
static void score_grouped(const Segment *s, int64_t head, int64_t first, int64_t count, int64_t dim, const bf16 *const of[TILE],
                          int64_t live, float *scores, int64_t stride) {
    const int64_t size = dim / 4;
    const uint8_t *codes = (const uint8_t *)s->keys.codes + head * s->keys.head + first * size;
    const uint8_t *steps = (const uint8_t *)s->keys.step + head * s->keys.step_head + first / GROUP * dim;
    const uint8_t *lows = (const uint8_t *)s->keys.low + head * s->keys.low_head + first / GROUP * dim;
    uint8_t both[2][TILE * MOST_DIM] __attribute__((aligned(64)));
    for (int64_t j = 0; j < count; j += GROUP, steps += dim, lows += dim) {
        for (int64_t half = 0; half < 2; half++) spread(codes + (j + half * TILE) * size, size, both[half]);
        for (int64_t i = 0; i < live; i++) {
            Turned query;
            turn_query(of[i], steps, lows, dim, &query);
            for (int64_t half = 0; half < 2; half++) score_spread(both[half], &query, dim, scores + i * stride + j + half * TILE);
        }
    }
}

/* Steps and lows of the values of `count` columns as fp32 [groups, count], steps and then lows. */
static void value_scales(const Segment *s, int64_t head, int64_t first, int64_t count, int64_t dim, float *to) {
    const int64_t groups = dim / GROUP;
    const uint8_t *steps = (const uint8_t *)s->values.step + head * s->values.step_head + first * groups;
    const int8_t *lows = (const int8_t *)s->values.low + head * s->values.low_head + first * groups;
    for (int64_t j = 0; j < count; j++)
        for (int64_t g = 0; g < groups; g++) {
            const uint32_t bits = (uint32_t)steps[j * groups + g] << 20;
            float step;
            memcpy(&step, &bits, sizeof step);
            step *= 0x1p112f;
            to[g * count + j] = step, to[(groups + g) * count + j] = (float)lows[j * groups + g] * (step * 0.25f);
        }
}

/* LANES codes of a column from channel d on, which are at `place` and `shift`. */
INLINE vf codes_at(const uint8_t *column, int64_t size, int64_t d, int64_t place, int64_t shift) {
    uint8_t some[LANES];
    if (size % LANES == 0) return to_float((vi)(load_uint8(column + place) >> (uint32_t)shift & 3));
    return to_float((vi)load_uint8(picked(column, size, d, 2, some)));
}

/* Adds to `rows` rows of out [.., dim] at channel d what their scaled weights [rows, count] make of LANES channels. */
INLINE void weigh_codes(const uint8_t *codes, int64_t count, int64_t size, int64_t d, const float *scaled, int64_t apart,
                        const int rows, const float *base, int64_t dim, float *out) {
    vf sums[4];
    UNROLL for (int r = 0; r < rows; r++) sums[r] = all(0);
    const int64_t place = d % size, shift = d / size * 2;
    for (int64_t j = 0; j < count; j++) {
        const vf code = codes_at(codes + j * size, size, d, place, shift);
        UNROLL for (int r = 0; r < rows; r++) sums[r] = fused_exact(all(scaled[r * apart + j]), code, sums[r]);
    }
    UNROLL for (int r = 0; r < rows; r++) save(out + r * dim + d, load(out + r * dim + d) + (sums[r] + base[r]));
}

/* Adds to out [16, dim] the values of `count` columns, whole blocks, by weights as `soften` gives them. `own` is for
 * (2 dim / 32 + 4) * count numbers. */
static void weigh_grouped(const Segment *s, int64_t head, int64_t first, int64_t count, int64_t dim, const weight_t *weights,
                          int64_t live, float *own, float *out) {
    const int64_t size = dim / 4, groups = dim / GROUP;
    const uint8_t *codes = (const uint8_t *)s->values.codes + head * s->values.head + first * size;
    float *scaled = own + 2 * groups * count, base[4];
    value_scales(s, head, first, count, dim, own);
    for (int64_t row = 0; row < live; row += 4) {
        const int64_t some = live - row < 4 ? live - row : 4;
        for (int64_t g = 0; g < groups; g++) {
            const float *steps = own + g * count, *lows = own + (groups + g) * count;
            for (int64_t r = 0; r < some; r++) {
                vf sums[PIECES] = {{0}};
                for (int64_t j = 0; j < count; j += WIDE)
                    UNROLL for (int p = 0; p < PIECES; p++) {
                        const int64_t at = j + p * LANES;
                        const weight_t *from = weights + at / DEEP * TILE * DEEP + (row + r) * DEEP + at % DEEP;
                        const vf weight = INTERLEAVED ? load_bf16((const void *)from) : load((const void *)from);
                        save(scaled + r * count + at, rounded(weight * load(steps + at)));
                        sums[p] += weight * load(lows + at);
                    }
                base[r] = sum_of(sums);
            }
            for (int64_t d = g * GROUP; d < (g + 1) * GROUP; d += LANES) switch (some) {
                    case 1: weigh_codes(codes, count, size, d, scaled, count, 1, base, dim, out + row * dim); break;
                    case 2: weigh_codes(codes, count, size, d, scaled, count, 2, base, dim, out + row * dim); break;
                    case 3: weigh_codes(codes, count, size, d, scaled, count, 3, base, dim, out + row * dim); break;
                    default: weigh_codes(codes, count, size, d, scaled, count, 4, base, dim, out + row * dim);
                }
        }
    }
}

#endif
