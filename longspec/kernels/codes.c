/* Coded matrices: from a GGUF file's blocks, or from values, into the layout of formats.h; and back to values.
 *
 *     tile_bytes  bytes of 16 outputs
 *     row_bytes   bytes of a row of blocks
 *     pack        rows of a file's blocks
 *     quantize    rows of fp32, bf16 or fp16 values, to Q8_0 or Q4_0
 *     values      rows as fp32
 *
 * Nothing is checked: the caller gives whole rows, of widths that the format divides.
 */
#include <math.h>
#include <stdlib.h>

#include "blocks.h"
#include "team.h"

/* Bits, scales and lows of a format, by its number. */
typedef struct {
    int bits, scales, has_low;
} Kind;

static Kind kind_of(int64_t format) {
    switch (format) {
#define KIND(number, name, bits, scales, low) \
    case number: return (Kind){bits, scales, low};
        FORMATS(KIND)
#undef KIND
        default: return (Kind){0, 0, 0};
    }
}

int64_t tile_bytes(int64_t format, int64_t width) {
    const Kind k = kind_of(format);
    return format == FORMAT_FP8 ? float8_tile(width) : coded_tile(width, k.bits, k.scales, k.has_low);
}

/* Of the span of a tile of such a width that has column `column`. */
static Offsets offsets(Kind k, int64_t width, int64_t column) {
    const int64_t left = width - column / SHARED_BY * SHARED_BY;
    return offsets_of((left < SHARED_BY ? left : SHARED_BY) / 32, k.bits, k.scales, k.has_low);
}

/* Where in a tile that span begins. */
static int64_t span_at(Kind k, int64_t column) {
    return column / SHARED_BY * offsets_of(SPAN, k.bits, k.scales, k.has_low).end;
}

/* Bytes of a row of a file's blocks. */
int64_t row_bytes(int64_t format, int64_t width) {
    if (format == FORMAT_FP8) return width + (width + SCALED_BY - 1) / SCALED_BY * 4;
    const Size block = block_size(format);
    return width / block.columns * block.bytes;
}

/* A group's codes of 16 outputs into its planes. */
static void put_codes(const Block *blocks, int group, int bits, uint8_t *to) {
    const int four = has_four(bits), two = has_two(bits), one = has_one(bits);
    uint8_t words[8][64], *pairs = to + (four ? 256 : 0), *singles = pairs + (two ? 128 : 0);
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < 8; j++) memcpy(words[j] + 4 * i, blocks[i].codes + 32 * group + 4 * j, 4);
    if (bits == 8) memcpy(to, words, sizeof words);
    for (int j = 0; four && j < 4; j++)
        for (int i = 0; i < 64; i++) to[64 * j + i] = (uint8_t)((words[j][i] & 15) | words[j + 4][i] << 4);
    for (int j = 0; two && j < 8; j++)
        for (int i = 0; i < 64; i++) pairs[64 * (j % 2) + i] |= (uint8_t)((words[j][i] >> (four ? 4 : 0) & 3) << (j / 2 * 2));
    for (int j = 0; one && j < 8; j++)
        for (int i = 0; i < 64; i++) singles[i] |= (uint8_t)((words[j][i] >> (bits - 1) & 1) << j);
}

/* What 16 outputs' blocks say of up to 256 columns, into their span. */
static void put_blocks(const Block *blocks, Kind k, Offsets o, char *span) {
    for (int g = 0; g < (o.end - o.codes) / (64 * lines_of(k.bits)); g++) {
        const int64_t place = g / groups_of(k.scales), size = scale_bytes(k.scales);
        char *steps = span + place * size, *lows = span + o.lows + place * (has_zeros(k.scales) ? 16 : size);
        put_codes(blocks, g, k.bits, (uint8_t *)span + o.codes + g * 64 * lines_of(k.bits));
        for (int i = 0; i < TILE && k.scales == PLAIN; i++) {
            memcpy(steps + 2 * i, blocks[i].plain_steps + g, 2);
            if (k.has_low) memcpy(lows + 2 * i, blocks[i].plain_lows + g, 2);
        }
        for (int i = 0; i < TILE && k.scales == EXPONENT; i++) steps[i] = (char)blocks[i].exponents[g];
        for (int i = 0; i < TILE && has_zeros(k.scales); i++) {
            memcpy(steps + 4 * i, blocks[i].whole_steps + g, 4);
            lows[i] = (char)blocks[i].zeros[g];
        }
        for (int half = 0; half < (k.scales == BY_16 ? 2 : k.scales == BY_32); half++)
            for (int i = 0; i < TILE; i++) {
                steps[16 * half + i] = (char)blocks[i].steps[2 * g + half];
                if (k.has_low) lows[16 * half + i] = (char)blocks[i].lows[2 * g + half];
            }
    }
    if (k.scales < BY_32) return;
    for (int i = 0; i < TILE; i++)
        for (int n = 0; n <= k.has_low; n++) memcpy(span + o.shared + 32 * n + 2 * i, blocks[i].shared + n, 2);
}

/* Where output `out` of the matrix stands in a file whose `heads` heads have rows in pairs (0, d/2, 1, d/2 + 1, ...), as
 * llama.cpp rotates them, and not in halves; heads 0: where it is. */
static int64_t source_of(int64_t out, int64_t size, int64_t heads) {
    if (!heads) return out;
    const int64_t dim = size / heads, at = out % dim;
    return out - at + (at < dim / 2 ? 2 * at : 2 * (at - dim / 2) + 1);
}

/* What a call of `pack` or `quantize` is for, tile by tile; of `values`, row by row. Of values to quantize, bytes is the
 * size of one. */
typedef struct {
    int64_t format, size, width, heads, bytes, is_fp16;
    const void *from;
    const int64_t *chosen;
    char *to;
} Job;

static float one_of(const void *rows, int64_t at, int64_t bytes, int is_fp16) {
    if (bytes == 4) return ((const float *)rows)[at];
    if (is_fp16) return one_fp16(((const fp16 *)rows)[at]);
    const uint32_t bits = (uint32_t)((const bf16 *)rows)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* fp16, rounded to nearest even; infinities for what is too large. */
static fp16 to_fp16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    float size = fabsf(x);
    if (!(size < 65520.0f)) return (fp16)(sign | 0x7c00);
    if (size < 0x1p-14f) return (fp16)(sign | (uint32_t)rintf(size * 0x1p24f));
    memcpy(&bits, &size, sizeof bits);
    bits += 0xfff + (bits >> 13 & 1);
    return (fp16)(sign | ((bits - 0x38000000) >> 13));
}

/* Symmetric: the error is at most 1/254 of the group's greatest size. */
static void quantize_8(const float *x, Block *to, int group) {
    float most = 0;
    for (int i = 0; i < 32; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    const fp16 step = to_fp16(most / 127 > 0x1p-24f ? most / 127 : 0x1p-24f);
    const float inverse = 1.0f / one_fp16(step);
    to->plain_steps[group] = step;
    for (int i = 0; i < 32; i++) {
        const float code = rintf(x[i] * inverse);
        to->codes[32 * group + i] = (uint8_t)((code < -127 ? -127 : code > 127 ? 127 : code) + 128);
    }
}

/* Codes of 4 bits for a step, in `codes`; gives the sums of code * x and code^2. */
static void try_4(const float *x, float step, uint8_t *codes, float *product, float *square) {
    const float inverse = 1.0f / step;
    *product = *square = 0;
    for (int i = 0; i < 32; i++) {
        float code = rintf(x[i] * inverse);
        code = code < -8 ? -8 : code > 7 ? 7 : code;
        codes[i] = (uint8_t)(code + 8);
        *product += code * x[i];
        *square += code * code;
    }
}

/* The step with the least squared error of 21 that put the greatest value near code -8, each refined to the least squares
 * of its codes: the error is sum x^2 - product^2 / square. */
static void quantize_4(const float *x, Block *to, int group) {
    float most = 0, best = -1;
    uint8_t codes[32];
    for (int i = 0; i < 32; i++) most = fabsf(x[i]) > fabsf(most) ? x[i] : most;
    to->plain_steps[group] = 0;
    memset(to->codes + 32 * group, 8, 32);
    if (!(fabsf(most) > 0)) return;
    for (int n = -10; n <= 10; n++) {
        float product, square;
        try_4(x, most / (-8.0f + 0.1f * (float)n), codes, &product, &square);
        if (!(square > 0) || product * product / square <= best) continue;
        best = product * product / square;
        to->plain_steps[group] = to_fp16(product / square);
        memcpy(to->codes + 32 * group, codes, 32);
    }
}

/* What output `out` says of up to 256 columns from `column` on: quantized, or as a file's blocks have it. */
static void fill(const Job *job, int64_t out, int64_t column, Block *to) {
    if (!job->bytes) {
        const int64_t row = source_of(out, job->size, job->heads) * row_bytes(job->format, job->width);
        decode(job->format, (const uint8_t *)job->from + row, column, job->width, to);
        return;
    }
    for (int group = 0; group < 8 && column + 32 * group < job->width; group++) {
        float x[32];
        const int64_t from = out * job->width + column + 32 * group;
        for (int c = 0; c < 32; c++) x[c] = one_of(job->from, from + c, job->bytes, (int)job->is_fp16);
        if (job->format == FORMAT_Q4_0) quantize_4(x, to, group);
        else quantize_8(x, to, group);
    }
}

/* Tiles of FP8 (float8.h), of rows that are their bytes and then their scales. */
static void float8_by(void *args, Team *t, int64_t rank) {
    const Job *job = args;
    const int64_t width = job->width, bytes = row_bytes(FORMAT_FP8, width);
    (void)rank;
    SHARED(t, tile, job->size / TILE) {
        char *at = job->to + tile * float8_tile(width);
        for (int64_t k = 0; k < width; k += SCALED_BY) {
            const int64_t count = width - k < SCALED_BY ? width - k : SCALED_BY;
            for (int64_t i = 0; i < TILE; i++) {
                const char *row = (const char *)job->from + (tile * TILE + i) * bytes;
                memcpy(at + i * count, row + k, (size_t)count);
                memcpy(at + TILE * count + 4 * i, row + width + k / SCALED_BY * 4, 4);
            }
            at += TILE * count + TILE * 4;
        }
    }
    meet(t);
}

static void tiles_by(void *args, Team *t, int64_t rank) {
    const Job *job = args;
    const Kind k = kind_of(job->format);
    const int64_t bytes = tile_bytes(job->format, job->width);
    (void)rank;
    SHARED(t, tile, job->size / TILE) {
        Block blocks[TILE];
        char *at = job->to + tile * bytes;
        memset(at, 0, (size_t)bytes);
        for (int64_t column = 0; column < job->width; column += COLUMNS) {
            for (int i = 0; i < TILE; i++) fill(job, tile * TILE + i, column, blocks + i);
            put_blocks(blocks, k, offsets(k, job->width, column), at + span_at(k, column));
        }
    }
    meet(t);
}

/* to: size / 16 tiles, of rows of blocks. */
void pack(int64_t format, const uint8_t *rows, int64_t size, int64_t width, int64_t heads, char *to, Team *t, int64_t threads) {
    Job job = {.format = format, .size = size, .width = width, .heads = heads, .from = rows, .to = to};
    lead(t, threads, format == FORMAT_FP8 ? float8_by : tiles_by, &job);
}

/* to: size / 16 tiles of Q8_0 or Q4_0, of rows of `bytes` bytes a value. */
void quantize(int64_t format, const void *rows, int64_t bytes, int64_t is_fp16, int64_t size, int64_t width, char *to, Team *t,
              int64_t threads) {
    Job job = {.format = format, .size = size, .width = width, .bytes = bytes, .is_fp16 = is_fp16, .from = rows, .to = to};
    lead(t, threads, tiles_by, &job);
}

static int code_at(const uint8_t *group, int bits, int i, int c) {
    const int j = c / 4, at = 4 * i + c % 4;
    const int four = has_four(bits), two = has_two(bits), one = has_one(bits);
    const uint8_t *pairs = group + (four ? 256 : 0), *singles = pairs + (two ? 128 : 0);
    if (bits == 8) return group[64 * j + at];
    int code = four ? group[64 * (j % 4) + at] >> (j / 4 * 4) & 15 : 0;
    if (two) code |= (pairs[64 * (j % 2) + at] >> (j / 2 * 2) & 3) << (four ? 4 : 0);
    if (one) code |= (singles[at] >> j & 1) << (bits - 1);
    return code;
}

/* 2^(e - 128), denormal below 2. */
static float power_of(uint8_t e) {
    const uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The step, or the low, of half `half` of a span's group for output i of the tile. */
static float scale_at(const char *span, const Offsets *o, Kind k, int64_t g, int half, int i, int is_low) {
    const char *at = span + is_low * o->lows + g / groups_of(k.scales) * scale_bytes(k.scales);
    if (has_zeros(k.scales)) return ((const float *)at)[i];
    if (k.scales == PLAIN) return one_fp16(half_at((const uint8_t *)at + 2 * i));
    if (k.scales == EXPONENT) return power_of((uint8_t)at[i]);
    const char *shared = span + o->shared + 32 * is_low;
    const int8_t whole = (int8_t)at[(k.scales == BY_16 ? 16 * half : 0) + i];
    return one_fp16(half_at((const uint8_t *)shared + 2 * i)) * (float)whole * (is_low ? -1.0f : 1.0f);
}

/* A byte of e4m3; codes for no number are 480. */
static float float8_value(uint8_t byte) {
    const int size = byte & 127;
    const uint32_t bits = ((uint32_t)size << 20) + (120u << 23);
    float value;
    memcpy(&value, &bits, sizeof value);
    if (size < 8) value = (float)size * 0x1p-9f; /* below 2^-6 the exponent is 0 */
    return byte & 128 ? -value : value;
}

static void float8_values_by(void *args, Team *t, int64_t rank) {
    const Job *job = args;
    const int64_t width = job->width;
    (void)rank;
    SHARED(t, n, job->size) {
        const char *at = (const char *)job->from + job->chosen[n] / TILE * float8_tile(width);
        const int64_t i = job->chosen[n] % TILE;
        for (int64_t k = 0; k < width; k += SCALED_BY) {
            const int64_t count = width - k < SCALED_BY ? width - k : SCALED_BY;
            float scale;
            memcpy(&scale, at + TILE * count + 4 * i, 4);
            for (int64_t c = 0; c < count; c++)
                ((float *)job->to)[n * width + k + c] = float8_value((uint8_t)at[i * count + c]) * scale;
            at += TILE * count + TILE * 4;
        }
    }
    meet(t);
}

static void values_by(void *args, Team *t, int64_t rank) {
    const Job *job = args;
    const Kind k = kind_of(job->format);
    const int64_t bytes = tile_bytes(job->format, job->width);
    (void)rank;
    SHARED(t, n, job->size) {
        const char *tile = (const char *)job->from + job->chosen[n] / TILE * bytes;
        const int i = (int)(job->chosen[n] % TILE);
        for (int64_t c = 0; c < job->width; c += 16) {
            const Offsets o = offsets(k, job->width, c);
            const char *span = tile + span_at(k, c);
            const int64_t g = c % SHARED_BY / 32;
            const int half = (int)(c % 32 / 16);
            const uint8_t *codes = (const uint8_t *)span + o.codes + g * 64 * lines_of(k.bits);
            const float step = scale_at(span, &o, k, g, half, i, 0), low = k.has_low ? scale_at(span, &o, k, g, half, i, 1) : 0;
            for (int at = 0; at < 16; at++) {
                int code = code_at(codes, k.bits, i, 16 * half + at);
                if (k.bits > 8) code = TABLES[k.bits == FP4][code];
                else if (has_zeros(k.scales)) code -= (uint8_t)span[o.lows + g / groups_of(k.scales) * 16 + i];
                else if (!k.has_low) code -= middle_of(k.bits);
                const float value = (float)code * step;
                ((float *)job->to)[n * job->width + c + at] = k.has_low ? value + low : value;
            }
        }
    }
    meet(t);
}

/* The rows `chosen` of a matrix of tiles [size, width] as fp32 [count, width]; -1. Or the first index in `chosen` that
 * isn't a row's, and nothing. */
int64_t values(int64_t format, const char *tiles, int64_t size, int64_t width, const int64_t *chosen, int64_t count,
               float *to, Team *t, int64_t threads) {
    for (int64_t n = 0; n < count; n++)
        if (chosen[n] < 0 || chosen[n] >= size) return n;
    Job job = {.format = format, .size = count, .width = width, .from = tiles, .chosen = chosen, .to = (char *)to};
    lead(t, count > 64 ? threads : 1, format == FORMAT_FP8 ? float8_values_by : values_by, &job);
    return -1;
}
