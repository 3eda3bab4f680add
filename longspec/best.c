/* The greatest few of rows of logits, greatest first; of equal ones the first.
 *
 * A block of columns is looked through only where its greatest is above the least that is held: of 49,152 columns some
 * eighty blocks, for eight. So a row costs hardly more than reading it.
 */
#include <stdint.h>

enum { BLOCK = 128, MOST = 64 };

/* Bits of a bf16 or fp32 value as an integer that is greater where the value is. */
static inline int16_t key16(uint16_t x) { return (int16_t)(x ^ (uint16_t)(((int16_t)x >> 15) & 0x7fff)); }
static inline int32_t key32(uint32_t x) { return (int32_t)(x ^ (uint32_t)(((int32_t)x >> 31) & 0x7fffffff)); }

#define BEST(name, type, number, key, least)                                                          \
    void name(const type *logits, int64_t rows, int64_t size, int64_t count, int64_t *best) {         \
        for (int64_t row = 0; row < rows; row++, logits += size, best += count) {                     \
            number held[MOST];                                                                        \
            int64_t filled = 0;                                                                       \
            for (int64_t start = 0; start < size; start += BLOCK) {                                   \
                const int64_t end = start + BLOCK < size ? start + BLOCK : size;                      \
                number most = least;                                                                  \
                for (int64_t i = start; i < end; i++) most = key(logits[i]) > most ? key(logits[i]) : most; \
                if (filled == count && most <= held[count - 1]) continue;                             \
                for (int64_t i = start; i < end; i++) {                                               \
                    const number one = key(logits[i]);                                                \
                    if (filled == count && one <= held[count - 1]) continue;                          \
                    int64_t at = filled < count ? filled++ : count - 1;                               \
                    for (; at > 0 && held[at - 1] < one; at--) held[at] = held[at - 1], best[at] = best[at - 1]; \
                    held[at] = one, best[at] = i;                                                     \
                }                                                                                     \
            }                                                                                         \
        }                                                                                             \
    }

BEST(best16, uint16_t, int16_t, key16, INT16_MIN)
BEST(best32, uint32_t, int32_t, key32, INT32_MIN)
