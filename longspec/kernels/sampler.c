/* Rows of logits: whether one can choose among them, their greatest few, and the token that a row's noise chooses (sampler.py has
 * the same in torch).
 *
 * A block of columns is looked through only where its greatest is above the least that is held: of 49,152 columns some
 * eighty blocks, for eight. So a row costs hardly more than reading it.
 */
#include "team.h"
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 128, MOST = 128, LOOKED = 64, SUMS = 16 };

/* Bits of a bf16 or fp32 value as an integer that is greater where the value is; and the value. */
static inline int16_t key16(uint16_t x) { return (int16_t)(x ^ (uint16_t)(((int16_t)x >> 15) & 0x7fff)); }
static inline int32_t key32(uint32_t x) { return (int32_t)(x ^ (uint32_t)(((int32_t)x >> 31) & 0x7fffffff)); }

static inline float value32(uint32_t x) {
    float value;
    memcpy(&value, &x, sizeof value);
    return value;
}

static inline float value16(uint16_t x) { return value32((uint32_t)x << 16); }

/* SplitMix64 of a row's key, with the token as its counter. */
static inline uint64_t mixed(uint64_t key, uint64_t token) {
    uint64_t state = key + (token + 1) * 0x9E3779B97F4A7C15u;
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9u;
    state = (state ^ state >> 27) * 0x94D049BB133111EBu;
    return state ^ state >> 31;
}

/* In (0, 1): the largest of the 2^53 values rounds to 1, of which the noise would be infinite. */
static inline double uniform(uint64_t state) {
    const double value = ((double)(int64_t)(state >> 11) + 0.5) * 0x1p-53;
    return value < 1 ? value : 1 - 0x1p-53;
}

static inline double gumbel(uint64_t key, uint64_t token) { return -log(-log(uniform(mixed(key, token)))); }

/* No less than the noise of this state: -log(-log u) <= -log(1 - u), and 1 - u has this exponent. */
static inline float bound(uint64_t state) {
    const double rest = 1.0 - uniform(state);
    int64_t bits;
    memcpy(&bits, &rest, sizeof bits);
    return (float)(1023 - (bits >> 52)) * 0.693148f;
}

/* e^x for x <= 0, to 2e-7 of it, and no less than e^-87. Without a call or a branch: loops of it become vectors. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float turn = 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    const float whole = (x * 1.44269504f + turn) - turn;
    const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    return sum * value32((uint32_t)((int32_t)whole + 127) << 23);
}

#define BEST(name, type, number, key, least)                                                                           \
    void name(const type *logits, int64_t rows, int64_t size, int64_t count, int64_t *best) {                          \
        for (int64_t row = 0; row < rows; row++, logits += size, best += count) {                                      \
            number held[MOST];                                                                                         \
            int64_t filled = 0;                                                                                        \
            for (int64_t start = 0; start < size; start += BLOCK) {                                                    \
                const int64_t end = start + BLOCK < size ? start + BLOCK : size;                                       \
                number most = least;                                                                                   \
                for (int64_t i = start; i < end; i++) most = key(logits[i]) > most ? key(logits[i]) : most;            \
                if (filled == count && most <= held[count - 1]) continue;                                              \
                for (int64_t i = start; i < end; i++) {                                                                \
                    const number one = key(logits[i]);                                                                 \
                    if (filled == count && one <= held[count - 1]) continue;                                           \
                    int64_t at = filled < count ? filled++ : count - 1;                                                \
                    for (; at > 0 && held[at - 1] < one; at--) held[at] = held[at - 1], best[at] = best[at - 1];       \
                    held[at] = one, best[at] = i;                                                                      \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

BEST(best16, uint16_t, int16_t, key16, INT16_MIN)
BEST(best32, uint32_t, int32_t, key32, INT32_MIN)

/* Whether one can choose among a row's logits: none is NaN, or infinite other than below. */
#define SOUND(name, type, infinity)                                                               \
    void name(const type *logits, int64_t rows, int64_t size, int64_t *sound) {                   \
        for (int64_t row = 0; row < rows; row++, logits += size) {                                \
            type wrong = 0;                                                                       \
            for (int64_t i = 0; i < size; i++)                                                    \
                wrong |= (type)(logits[i] << 1) > (type)(infinity << 1) || logits[i] == infinity; \
            sound[row] = !wrong;                                                                  \
        }                                                                                         \
    }

SOUND(sound16, uint16_t, 0x7f80)
SOUND(sound32, uint32_t, 0x7f800000u)

/* Of `count` scores in falling order, how many top-p and min-p keep; `whole`: the sum of e^(score - scores[0]). */
static int64_t nucleus(const float *scores, int64_t count, float whole, float top_p, float min_p) {
    float before = 0;
    int64_t kept = 0;
    for (; kept < count; kept++) {
        const float weight = exponential(scores[kept] - scores[0]);
        if (kept && ((top_p < 1 && before >= top_p * whole) || weight < min_p)) break;
        before += weight;
    }
    return kept;
}

/* The logarithm of a row's sum of e^(logit / temperature). */
#define MASS(name, type, value, best)                                                                        \
    void name(const type *logits, int64_t rows, int64_t size, float temperature, float *mass) {              \
        for (int64_t row = 0; row < rows; row++, logits += size) {                                           \
            int64_t first, i = 0;                                                                            \
            best(logits, 1, size, 1, &first);                                                                \
            const float most = value(logits[first]) / temperature;                                           \
            float sums[SUMS] = {0}, whole = 0;                                                               \
            for (; i + SUMS <= size; i += SUMS)                                                              \
                for (int64_t k = 0; k < SUMS; k++) sums[k] += exponential(value(logits[i + k]) / temperature - most); \
            for (; i < size; i++) sums[0] += exponential(value(logits[i]) / temperature - most);             \
            for (int64_t k = 0; k < SUMS; k++) whole += sums[k];                                             \
            mass[row] = most + logf(whole);                                                                  \
        }                                                                                                    \
    }

MASS(mass16, uint16_t, value16, best16)
MASS(mass32, uint32_t, value32, best32)

/* What a call is for. */
typedef struct {
    const void *logits;
    int64_t rows, size;
    float temperature;
    int64_t top_k;
    float top_p, min_p;
    const int64_t *keys;
    int64_t *chosen;
} Choice;

/* chosen [rows]: what each row's key chooses of its logits / temperature [rows, size] by top-k, top-p and min-p; -1
 * where they may keep more than the best LOOKED, or top-k is above MOST.
 *
 * Without any of them all tokens are in play: only those are looked at closely whose noise can be great enough, which
 * its exponent tells (of 49,152 some twenty).
 */
#define CHOOSE(name, type, value, best)                                                                                \
    static void name##_row(const Choice *c, int64_t row) {                                                             \
        const int64_t looked = c->top_k ? c->top_k : LOOKED, count = looked < c->size ? looked : c->size;                \
        const type *own = (const type *)c->logits + row * c->size;                                                     \
        int64_t tokens[MOST], kept = 1;                                                                                \
        float scores[MOST];                                                                                            \
        const uint64_t key = (uint64_t)c->keys[row];                                                                   \
        const int filtered = c->top_k || c->top_p < 1 || c->min_p > 0;                                                 \
        c->chosen[row] = -1;                                                                                           \
        if (count > MOST) return;                                                                                      \
        best(own, 1, c->size, filtered ? count : 1, tokens);                                                           \
        for (int64_t i = 0; i < (filtered ? count : 1); i++) scores[i] = value(own[tokens[i]]) / c->temperature;       \
        if (filtered) {                                                                                                \
            float sums[SUMS] = {0}, whole = 0;                                                                         \
            if (c->top_p < 1 && !c->top_k) {                                                                           \
                int64_t i = 0;                                                                                         \
                for (; i + SUMS <= c->size; i += SUMS)                                                                 \
                    for (int64_t k = 0; k < SUMS; k++)                                                                 \
                        sums[k] += exponential(value(own[i + k]) / c->temperature - scores[0]);                        \
                for (; i < c->size; i++) sums[0] += exponential(value(own[i]) / c->temperature - scores[0]);           \
            } else {                                                                                                   \
                for (int64_t i = 0; i < count; i++) sums[0] += exponential(scores[i] - scores[0]);                     \
            }                                                                                                          \
            for (int64_t k = 0; k < SUMS; k++) whole += sums[k];                                                       \
            kept = nucleus(scores, count, whole, c->top_p, c->min_p);                                                  \
            if (kept == count && !c->top_k && count < c->size) return;                                                 \
        }                                                                                                              \
        double most = -INFINITY;                                                                                       \
        for (int64_t i = 0; i < kept; i++) {                                                                           \
            const double one = scores[i] + gumbel(key, (uint64_t)tokens[i]);                                           \
            if (one > most) most = one, c->chosen[row] = tokens[i];                                                    \
        }                                                                                                              \
        for (int64_t start = 0; start < c->size && !filtered; start += BLOCK) {                                        \
            const int64_t end = start + BLOCK < c->size ? start + BLOCK : c->size;                                     \
            const float near = (float)(most - 1e-6 * fabs(most)); /* rounding, of scores too */                        \
            int close = 0;                                                                                             \
            for (int64_t i = start; i < end; i++)                                                                      \
                close |= value(own[i]) / c->temperature + bound(mixed(key, (uint64_t)i)) >= near;                      \
            for (int64_t i = start; i < end && close; i++) {                                                           \
                const float score = value(own[i]) / c->temperature;                                                    \
                if (score + bound(mixed(key, (uint64_t)i)) < near) continue;                                           \
                const double one = score + gumbel(key, (uint64_t)i);                                                   \
                if (one > most) most = one, c->chosen[row] = i;                                                        \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
    static void name##_by(void *args, Team *t, int64_t rank) {                                                         \
        (void)rank;                                                                                                    \
        SHARED(t, row, ((const Choice *)args)->rows) name##_row(args, row);                                            \
        meet(t);                                                                                                       \
    }                                                                                                                  \
    void name(const type *logits, int64_t rows, int64_t size, float temperature, int64_t top_k, float top_p, float min_p, \
              const int64_t *keys, int64_t *chosen, Team *t, int64_t threads) {                                        \
        Choice choice = {logits, rows, size, temperature, top_k, top_p, min_p, keys, chosen};                          \
        lead(t, rows > 1 ? threads : 1, name##_by, &choice);                                                           \
    }

CHOOSE(choose16, uint16_t, value16, best16)
CHOOSE(choose32, uint32_t, value32, best32)
