/* The formats of coded weights, and how a matrix of each lies in memory.
 *
 * A weight is step * (code - middle), or step * code + low, of its group of 32 or 16 columns. Codes have 2 to 8 bits, or
 * are places in a table of 16 values. A group's step and low are
 *
 *     PLAIN     fp16 numbers
 *     EXPONENT  step 2^(e - 128), of a byte e
 *     ZERO_32   step an fp32 number; in place of the middle its own whole number, a zero point, at most 16
 *     ZERO_128  the same, for each 128 columns
 *     BY_32     whole numbers of 8 bits, times fp16 numbers that 256 columns share; low is subtracted
 *     BY_16     the same, for each 16 columns
 *
 * These are the formats of GGUF files, value for value, and under ZERO_32 and ZERO_128 those of GPTQ, AWQ and
 * compressed-tensors in 4 bits, whose steps may be bf16.
 *
 * A tile is 16 outputs: spans of 256 columns, the last of which may be shorter, in the order in which products read them.
 * (With all scales behind all codes, a core of a Zen 4 processor read 12 GB/s of a matrix 1,536 wide, and so it reads 25.)
 * In a span stand its groups' steps, then their lows or zero points, then what 256 columns share, then the codes, group by
 * group: 8 words, which are 4 columns by 16 outputs, in planes of 4, 2 or 1 bits. Words 0..3 are the lower halves of the
 * plane of 4 bits, and 4..7 the upper ones; of a plane of 2 bits, word j is in line j % 2; of one of 1 bit, it is bit j.
 * Codes begin at multiples of 64 bytes.
 */
#ifndef FORMATS_H
#define FORMATS_H

#include <stdint.h>

enum { PLAIN, EXPONENT, ZERO_32, ZERO_128, BY_32, BY_16 };
enum { IQ4 = 16, FP4 = 32 }; /* in place of bits: a table's */

/* number, name, bits, scales, whether there are lows */
#define FORMATS(X)            \
    X(1, Q4_0, 4, PLAIN, 0)   \
    X(2, Q4_1, 4, PLAIN, 1)   \
    X(3, Q5_0, 5, PLAIN, 0)   \
    X(4, Q5_1, 5, PLAIN, 1)   \
    X(5, Q8_0, 8, PLAIN, 0)   \
    X(6, Q2_K, 2, BY_16, 1)   \
    X(7, Q3_K, 3, BY_16, 0)   \
    X(8, Q4_K, 4, BY_32, 1)   \
    X(9, Q5_K, 5, BY_32, 1)   \
    X(10, Q6_K, 6, BY_16, 0)  \
    X(11, IQ4_NL, IQ4, PLAIN, 0) \
    X(12, IQ4_XS, IQ4, BY_32, 0) \
    X(13, MXFP4, FP4, EXPONENT, 0) \
    X(14, INT4_32, 4, ZERO_32, 0)  \
    X(15, INT4_128, 4, ZERO_128, 0)

#define NAMED(number, name, bits, scales, low) FORMAT_##name = number,
enum { FORMATS(NAMED) };
#undef NAMED

static const int8_t TABLES[2][16] = {
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113},
    {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}, /* doubled: a step is half of what the byte says */
};

enum { SHARED_BY = 256 }; /* columns */

/* FP8, which isn't codes: bytes of e4m3, and for each 128 columns of an output a scale in fp32 (float8.h). */
enum { FORMAT_FP8 = 16, SCALED_BY = 128 };
static inline int64_t float8_tile(int64_t width) { return 16 * width + (width + SCALED_BY - 1) / SCALED_BY * 64; }

/* Of a format's bits, lines of 64 bytes that a group's codes take, and the middle of unsigned codes. */
static inline int has_four(const int bits) { return bits >= 4 && bits != 8; } /* planes; a table's places are 4 bits */
static inline int has_two(const int bits) { return bits == 2 || bits == 3 || bits == 6; }
static inline int has_one(const int bits) { return bits == 3 || bits == 5; }
static inline int lines_of(const int bits) { return bits > 8 ? 4 : bits; }
static inline int middle_of(const int bits) { return bits >= 8 ? 128 : 1 << (bits - 1); }

static inline int has_zeros(const int scales) { return scales == ZERO_32 || scales == ZERO_128; }

/* Groups of 32 columns that share a step, and bytes of steps or lows for 16 outputs; zero points are bytes. */
static inline int groups_of(const int scales) { return scales == ZERO_128 ? 4 : 1; }
static inline int64_t scale_bytes(const int scales) {
    return has_zeros(scales) ? 64 : scales == PLAIN || scales == BY_16 ? 32 : 16;
}

enum { SPAN = SHARED_BY / 32 }; /* groups */

/* Where in a span of so many groups lows, what is shared and codes begin, and where it ends; its steps stand first. */
typedef struct {
    int64_t lows, shared, codes, end;
} Offsets;

static inline Offsets offsets_of(int64_t groups, const int bits, const int scales, const int has_low) {
    const int64_t steps = groups / groups_of(scales);
    Offsets o;
    o.lows = steps * scale_bytes(scales);
    o.shared = o.lows + (has_zeros(scales) ? steps * 16 : has_low * o.lows);
    o.codes = (o.shared + (scales >= BY_32 ? 32 * (1 + has_low) : 0) + 63) / 64 * 64;
    o.end = o.codes + groups * 64 * lines_of(bits);
    return o;
}

static inline int64_t coded_tile(int64_t width, const int bits, const int scales, const int has_low) {
    const int64_t groups = width / 32, last = groups % SPAN;
    return groups / SPAN * offsets_of(SPAN, bits, scales, has_low).end + (last ? offsets_of(last, bits, scales, has_low).end : 0);
}

#endif
