/* Blocks of GGUF's formats, decoded to codes, steps and lows as they stand there (the gguf package has the reference); and
 * of the formats with zero points, whose blocks are longspec's own: an fp32 step, the zero point, and codes in pairs. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include "formats.h"
#include "simd.h"

enum { COLUMNS = 256, TILE = 16 };

/* Some columns of one output: what a block of a file says. A step is for 16 columns; with PLAIN and EXPONENT two in a
 * row are the same. */
typedef struct {
    uint8_t codes[COLUMNS], steps[16], lows[16], exponents[8], zeros[8];
    float whole_steps[8];
    fp16 plain_steps[8], plain_lows[8], shared[2];
} Block;

/* Bytes and columns of a block in the file. */
typedef struct {
    int64_t bytes, columns;
} Size;

static Size block_size(int64_t format) {
    switch (format) {
        case FORMAT_Q4_0: return (Size){18, 32};
        case FORMAT_Q4_1: return (Size){20, 32};
        case FORMAT_Q5_0: return (Size){22, 32};
        case FORMAT_Q5_1: return (Size){24, 32};
        case FORMAT_Q8_0: return (Size){34, 32};
        case FORMAT_Q2_K: return (Size){84, 256};
        case FORMAT_Q3_K: return (Size){110, 256};
        case FORMAT_Q4_K: return (Size){144, 256};
        case FORMAT_Q5_K: return (Size){176, 256};
        case FORMAT_Q6_K: return (Size){210, 256};
        case FORMAT_IQ4_NL: return (Size){18, 32};
        case FORMAT_IQ4_XS: return (Size){136, 256};
        case FORMAT_INT4_32: return (Size){21, 32};
        case FORMAT_INT4_128: return (Size){69, 128};
        default: return (Size){17, 32};
    }
}

static fp16 half_at(const uint8_t *from) {
    fp16 value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* 32 codes of 4 bits: the lower halves are the first 16 columns. */
static void halves(const uint8_t *from, uint8_t *codes) {
    for (int i = 0; i < 16; i++) codes[i] = from[i] & 15, codes[i + 16] = from[i] >> 4;
}

/* Groups of 32 columns in blocks of their own. */
static void decode_32(int64_t format, const uint8_t *from, int group, Block *to) {
    uint8_t *codes = to->codes + 32 * group;
    if (format == FORMAT_MXFP4) {
        to->exponents[group] = from[0];
        halves(from + 1, codes);
        return;
    }
    to->plain_steps[group] = half_at(from), from += 2;
    if (format == FORMAT_Q4_1 || format == FORMAT_Q5_1) to->plain_lows[group] = half_at(from), from += 2;
    if (format == FORMAT_Q8_0) {
        for (int i = 0; i < 32; i++) codes[i] = from[i] ^ 128; /* signed bytes plus 128 */
        return;
    }
    uint32_t high = 0;
    if (format == FORMAT_Q5_0 || format == FORMAT_Q5_1) memcpy(&high, from, 4), from += 4;
    halves(from, codes);
    for (int i = 0; i < 32; i++) codes[i] |= (high >> i & 1) << 4;
}

/* The steps and lows of 8 groups, 6 bits each, as Q4_K and Q5_K pack them. */
static void six_bits(const uint8_t *q, Block *to) {
    for (int j = 0; j < 8; j++) {
        const uint8_t step = j < 4 ? q[j] & 63 : (q[j + 4] & 15) | q[j - 4] >> 6 << 4;
        const uint8_t low = j < 4 ? q[j + 4] & 63 : q[j + 4] >> 4 | q[j] >> 6 << 4;
        to->steps[2 * j] = to->steps[2 * j + 1] = step;
        to->lows[2 * j] = to->lows[2 * j + 1] = low;
    }
}

static void decode_q2(const uint8_t *from, Block *to) {
    for (int i = 0; i < 16; i++) to->steps[i] = from[i] & 15, to->lows[i] = from[i] >> 4;
    for (int group = 0; group < 8; group++)
        for (int i = 0; i < 32; i++) to->codes[32 * group + i] = from[16 + group / 4 * 32 + i] >> (group % 4 * 2) & 3;
    to->shared[0] = half_at(from + 80), to->shared[1] = half_at(from + 82);
}

static void decode_q3(const uint8_t *from, Block *to) {
    const uint8_t *high = from, *low = from + 32, *steps = from + 96;
    for (int group = 0; group < 8; group++)
        for (int i = 0; i < 32; i++)
            to->codes[32 * group + i] = (low[group / 4 * 32 + i] >> (group % 4 * 2) & 3) | (high[i] >> group & 1) << 2;
    for (int i = 0; i < 16; i++) {
        const uint8_t few = i < 8 ? steps[i] & 15 : steps[i - 8] >> 4;
        to->steps[i] = (uint8_t)((few | (steps[8 + i % 4] >> (i / 4 * 2) & 3) << 4) - 32);
    }
    to->shared[0] = half_at(from + 108);
}

static void decode_q4(const uint8_t *from, int has_fifth, Block *to) {
    const uint8_t *high = from + 16, *low = from + (has_fifth ? 48 : 16);
    to->shared[0] = half_at(from), to->shared[1] = half_at(from + 2);
    six_bits(from + 4, to);
    for (int pair = 0; pair < 4; pair++)
        for (int i = 0; i < 32; i++) {
            const uint8_t both = low[32 * pair + i];
            to->codes[64 * pair + i] = both & 15, to->codes[64 * pair + 32 + i] = both >> 4;
        }
    for (int group = 0; has_fifth && group < 8; group++)
        for (int i = 0; i < 32; i++) to->codes[32 * group + i] |= (high[i] >> group & 1) << 4;
}

static void decode_q6(const uint8_t *from, Block *to) {
    const uint8_t *low = from, *high = from + 128;
    for (int group = 0; group < 8; group++) {
        const uint8_t *four = low + group / 4 * 64 + group % 2 * 32, *two = high + group / 4 * 32;
        for (int i = 0; i < 32; i++)
            to->codes[32 * group + i] = (four[i] >> (group / 2 % 2 * 4) & 15) | (two[i] >> (group % 4 * 2) & 3) << 4;
    }
    memcpy(to->steps, from + 192, 16);
    to->shared[0] = half_at(from + 208);
}

static void decode_iq4(const uint8_t *from, Block *to) {
    const uint8_t *steps = from + 4;
    const uint16_t high = half_at(from + 2);
    to->shared[0] = half_at(from);
    for (int j = 0; j < 8; j++) {
        const int step = (steps[j / 2] >> (j % 2 * 4) & 15) | (high >> 2 * j & 3) << 4;
        to->steps[2 * j] = to->steps[2 * j + 1] = (uint8_t)(step - 32);
        halves(from + 8 + 16 * j, to->codes + 32 * j);
    }
}

/* A group of a block with a zero point; `part` is its place among the block's groups. */
static void decode_zero(const uint8_t *from, int part, int group, Block *to) {
    memcpy(to->whole_steps + group, from, 4);
    to->zeros[group] = from[4];
    for (int i = 0; i < 16; i++) {
        const uint8_t both = from[5 + 16 * part + i];
        to->codes[32 * group + 2 * i] = both & 15, to->codes[32 * group + 2 * i + 1] = both >> 4;
    }
}

/* The columns from `column` on, at most 256. */
static void decode(int64_t format, const uint8_t *row, int64_t column, int64_t width, Block *to) {
    const Size size = block_size(format);
    const uint8_t *from = row + column / size.columns * size.bytes;
    switch (format) {
        case FORMAT_Q2_K: decode_q2(from, to); break;
        case FORMAT_Q3_K: decode_q3(from, to); break;
        case FORMAT_Q4_K: decode_q4(from, 0, to); break;
        case FORMAT_Q5_K: decode_q4(from, 1, to); break;
        case FORMAT_Q6_K: decode_q6(from, to); break;
        case FORMAT_IQ4_XS: decode_iq4(from, to); break;
        case FORMAT_INT4_32:
        case FORMAT_INT4_128:
            for (int group = 0; group < 8 && column + 32 * group < width; group++) {
                const int in_block = (int)size.columns / 32;
                decode_zero(from + group / in_block * size.bytes, group % in_block, group, to);
            }
            break;
        default:
            for (int group = 0; group < 8 && column + 32 * group < width; group++)
                decode_32(format, from + group * size.bytes, group, to);
    }
}

#endif
