/* AMX: tiles of 16 rows by 64 bytes. Codes of few rows go as with AVX-512, of more by tiles (amx_codes.h).
 *
 * Weights are a product's left operand, read where they lie. Packed rows are its right one: words of two columns,
 * [width / 2, 16 rows], tile by tile.
 */
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

enum { HAS_TILES = 1, BY_TILES = 9 }; /* a pass of the default model with 8 rows takes 5.5 ms, by words 5.1; with 10 rows 6.2 and 6.5 */

typedef bf16 weight_t; /* of attention */
enum { INTERLEAVED = 1 }; /* its values: two columns each, [count / 2, dim, 2] */

/* 0 where the system gives leave to use tiles. */
static inline int refused(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Tiles;

/* All eight tiles whole; for codes rows in 4 and 5, codes in 6 and 7, sums in 0 to 3: fewer than 16 rows are not computed
 * as 16. */
static inline void begin_tiles(int64_t kind, int64_t rows) {
    Tiles tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.bytes[i] = kind && (i == 4 || i == 5) ? GROUP : 64;
        tiles.rows[i] = !kind ? TILE : i >= 6 ? WORDS : rows < TILE ? rows : TILE;
    }
    /* GCC's intrinsic says that it reads eight bytes: without this the other stores go as dead. */
    __asm__ volatile("" : : "r"(&tiles) : "memory");
    _tile_loadconfig(&tiles);
}
INLINE void end_tiles(void) { _tile_release(); }

static inline void transpose(float m[TILE][TILE]) {
    vu words[LANES];
    transposed((const bf16 *)m, DEEP, words);
    memcpy(m, words, sizeof words);
}

static inline int64_t packed_bytes(int64_t width) { return TILE * width * (int64_t)sizeof(bf16); }

/* Columns k .. k + 32 of the rows x, of which the first `live` are there. */
static inline void pack_columns(const bf16 *const x[TILE], int64_t live, int64_t width, int64_t k, void *packed) {
    float words[TILE][TILE] __attribute__((aligned(64)));
    float *to = (float *)packed + k / 2 * TILE;
    (void)width;
    if (live == 1) {
        memcpy(words[0], x[0] + k, 64);
        for (int word = 0; word < TILE; word++) to[word * TILE] = words[0][word];
        return;
    }
    for (int row = 0; row < TILE; row++)
        if (row < live)
            memcpy(words[row], x[row] + k, 64);
        else
            memset(words[row], 0, 64);
    transpose(words);
    memcpy(to, words, sizeof words);
}

/* A tile [16 outputs, 16 rows] as sums of its first `live` rows. */
INLINE void save_sums(float tile[TILE][TILE], int64_t live, float *sums, int64_t stride) {
    if (live == 1)
        for (int i = 1; i < TILE; i++) tile[0][i] = tile[i][0];
    else
        transpose(tile);
    for (int64_t row = 0; row < live; row++) memcpy(sums + row * stride, tile[row], 4 * TILE);
}

/* sums [rows, 16], rows `stride` apart: packed rows times the 16 rows of `weight`, which are `apart` values apart. */
static inline void product_bf16(const bf16 *weight, int64_t apart, int64_t width, const void *packed, int64_t rows, float *sums,
                         int64_t stride) {
    for (int64_t first = 0; first < rows; first += TILE) {
        const char *x = (const char *)packed + first / TILE * packed_bytes(width);
        float made[TILE][TILE] __attribute__((aligned(64)));
        _tile_zero(0);
        for (int64_t k = 0; k < width; k += DEEP) {
            _tile_loadd(4, weight + k, 2 * apart);
            _tile_loadd(5, x + 2 * TILE * k, 64);
            _tile_dpbf16ps(0, 4, 5);
        }
        _tile_stored(0, made, 64);
        save_sums(made, rows - first < TILE ? rows - first : TILE, sums + first * stride, stride);
    }
}

/* The same of 32 outputs, for two tiles of rows at a time. */
static inline void product_pair(const bf16 *weight, int64_t apart, int64_t width, const void *packed, int64_t rows, float *sums,
                         int64_t stride) {
    const bf16 *lower = weight + TILE * apart;
    for (int64_t first = 0; first < rows; first += 2 * TILE) {
        const char *left = (const char *)packed + first / TILE * packed_bytes(width), *right = left + packed_bytes(width);
        const int both = first + TILE < rows;
        float made[4][TILE][TILE] __attribute__((aligned(64)));
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < width; k += DEEP) {
            _tile_loadd(4, left + 2 * TILE * k, 64);
            _tile_loadd(5, weight + k, 2 * apart);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, lower + k, 2 * apart);
            _tile_dpbf16ps(1, 6, 4);
            if (both) {
                _tile_loadd(7, right + 2 * TILE * k, 64);
                _tile_dpbf16ps(2, 5, 7);
                _tile_dpbf16ps(3, 6, 7);
            }
        }
        _tile_stored(0, made[0], 64);
        _tile_stored(1, made[1], 64);
        _tile_stored(2, made[2], 64);
        _tile_stored(3, made[3], 64);
        for (int64_t i = 0; i < 4; i++) {
            const int64_t start = first + i / 2 * TILE, live = rows - start < TILE ? rows - start : TILE;
            if (live > 0) save_sums(made[i], live, sums + start * stride + i % 2 * TILE, stride);
        }
    }
}

/* Adds to out [16, dim]: weights [count / 32, 16, 32] times interleaved values; count and dim are multiples of 32. */
static inline void weigh(const weight_t *weights, const bf16 *values, int64_t count, int64_t dim, int64_t live, float *out) {
    (void)live;
    for (int64_t d = 0; d < dim; d += 2 * TILE) {
        _tile_loadd(0, out + d, 4 * dim);
        _tile_loadd(1, out + d + TILE, 4 * dim);
        for (int64_t j = 0; j < count; j += DEEP) {
            _tile_loadd(4, weights + j * TILE, 64);
            _tile_loadd(5, values + j * dim + 2 * d, 4 * dim);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, values + j * dim + 2 * d + 2 * TILE, 4 * dim);
            _tile_dpbf16ps(1, 4, 6);
        }
        _tile_stored(0, out + d, 4 * dim);
        _tile_stored(1, out + d + TILE, 4 * dim);
    }
}

/* The same for the rows of a mask alone. */
static inline void weigh_some(const weight_t *weights, const bf16 *values, int64_t count, int64_t dim, uint32_t rows,
                              float *out) {
    for (int64_t j = 0; j < count; j += DEEP) { /* the others' weights are 0, which changes none of their bits */
        weight_t masked[TILE][DEEP] __attribute__((aligned(64)));
        for (int i = 0; i < TILE; i++)
            if (rows >> i & 1)
                memcpy(masked[i], weights + j * TILE + i * DEEP, sizeof masked[i]);
            else
                memset(masked[i], 0, sizeof masked[i]);
        weigh(masked[0], values + j * dim, DEEP, dim, TILE, out);
    }
}

INLINE void save_weights(weight_t *to, vf weights) { save_bf16(to, weights); }
