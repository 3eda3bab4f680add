/* Products in bf16 by fused multiplications, without tiles: weights are unpacked to fp32 once for all rows.
 *
 * Packed rows are fp32 [16, width]. A panel is 16 outputs of some columns in fp32, [column, 16]; of the target's header
 * come `unpack_columns`, which makes 32 columns of it, or `transposed` (TRANSPOSED), which makes these in registers, and how
 * many rows fit its registers: ROWS_AT_ONCE and, for attention's values, VALUE_ROWS, both powers of two.
 */
enum { PANEL = 256, HAS_TILES = 0, BY_TILES = 0 };

typedef float weight_t; /* of attention, rounded to bf16 */
enum { INTERLEAVED = 0 };

INLINE void begin_tiles(int64_t kind, int64_t rows) { (void)kind, (void)rows; }
INLINE void end_tiles(void) {}
INLINE int refused(void) { return 0; }

static inline int64_t packed_bytes(int64_t width) { return TILE * width * (int64_t)sizeof(float); }

/* Columns k .. k + 32 of the rows x, of which the first `live` are there. */
static inline void pack_columns(const bf16 *const x[TILE], int64_t live, int64_t width, int64_t k, void *packed) {
    for (int64_t row = 0; row < live; row++)
        for (int64_t i = k; i < k + DEEP; i += LANES) save((float *)packed + row * width + i, load_bf16(x[row] + i));
}

INLINE void multiply(const float (*panel)[WIDE], const float *x, int64_t width, int64_t count, const int rows, int begin,
                     float *sums, int64_t stride) {
    vf total[ROWS_AT_ONCE][PIECES];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < PIECES; p++) total[r][p] = begin ? all(0) : load(sums + r * stride + p * LANES);
    for (int64_t k = 0; k < count; k += DEEP) {
        vf even[ROWS_AT_ONCE][PIECES] = {{{0}}}, odd[ROWS_AT_ONCE][PIECES] = {{{0}}};
        for (int64_t i = k; i < k + DEEP; i += 2) {
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int p = 0; p < PIECES; p++)
                    even[r][p] = fused_exact(all(x[r * width + i]), load(panel[i] + p * LANES), even[r][p]);
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int p = 0; p < PIECES; p++)
                    odd[r][p] = fused_exact(all(x[r * width + i + 1]), load(panel[i + 1] + p * LANES), odd[r][p]);
        }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int p = 0; p < PIECES; p++) total[r][p] += even[r][p] + odd[r][p];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < PIECES; p++) save(sums + r * stride + p * LANES, total[r][p]);
}

#ifdef TRANSPOSED
INLINE vf even_of(vu words) { return (vf)(words << 16); }
INLINE vf odd_of(vu words) { return (vf)(words & 0xffff0000); }

/* 32 columns of 16 rows x, `apart` values apart, as fp32 [32, 16]. */
INLINE void unpack_columns(const bf16 *x, int64_t apart, float (*panel)[WIDE]) {
    for (int at = 0; at < WIDE; at += LANES)
        for (int k = 0; k < DEEP; k += 2 * LANES) {
            vu words[LANES];
            transposed(x + at * apart + k, apart, words);
            UNROLL for (int i = 0; i < LANES; i++) {
                save(panel[k + 2 * i] + at, even_of(words[i]));
                save(panel[k + 2 * i + 1] + at, odd_of(words[i]));
            }
        }
}

/* Sums of LANES outputs for one row x, without a panel: what the processor then does between reads of memory is less. */
INLINE void multiply_alone(const bf16 *weight, int64_t apart, int64_t width, const float *x, float *sums) {
    vf total = all(0);
    for (int64_t k = 0; ASKS_IN_ORDER && k < LANES * width; k += DEEP) __builtin_prefetch(weight + k);
    for (int64_t k = 0; k < width; k += DEEP) {
        vf even = all(0), odd = all(0);
        const bf16 *soon = weight + LANES * apart + (ASKS_IN_ORDER ? LANES * k : k);
        UNROLL for (int i = 0; i < LANES; i++) __builtin_prefetch(soon + i * (ASKS_IN_ORDER ? DEEP : apart));
        for (int half = 0; half < DEEP; half += 2 * LANES) {
            vu words[LANES];
            transposed(weight + k + half, apart, words);
            UNROLL for (int i = 0; i < LANES; i++) {
                even = fused_exact(all(x[k + half + 2 * i]), even_of(words[i]), even);
                odd = fused_exact(all(x[k + half + 2 * i + 1]), odd_of(words[i]), odd);
            }
        }
        total += even + odd;
    }
    save(sums, total);
}
#endif

/* sums [rows, 16], rows `stride` apart: packed rows times the 16 rows of `weight`, which are `apart` values apart. */
static inline void product_bf16(const bf16 *weight, int64_t apart, int64_t width, const void *packed, int64_t rows, float *sums,
                         int64_t stride) {
    float panel[PANEL][WIDE] __attribute__((aligned(64)));
#ifdef TRANSPOSED
    if (rows == 1) {
        for (int64_t i = 0; i < WIDE; i += LANES) multiply_alone(weight + i * apart, apart, width, packed, sums + i);
        return;
    }
#endif
    for (int64_t start = 0; start < width; start += PANEL) {
        const int64_t count = width - start < PANEL ? width - start : PANEL;
        for (int64_t k = 0; k < count; k += DEEP) {
            const int64_t next = start + PANEL + k; /* the next panel's columns, or the next outputs' */
            const bf16 *soon = weight + (next < width ? next : next - width + TILE * apart);
            UNROLL for (int i = 0; i < TILE; i++) __builtin_prefetch(soon + i * apart);
            unpack_columns(weight + start + k, apart, panel + k);
        }
        const float *x = (const float *)packed + start;
        int64_t row = 0;
        for (; row + ROWS_AT_ONCE <= rows; row += ROWS_AT_ONCE)
            multiply(panel, x + row * width, width, count, ROWS_AT_ONCE, !start, sums + row * stride, stride);
#define REST(n)                                                                                              \
    if (ROWS_AT_ONCE > n && (rows - row) & n) {                                                              \
        multiply(panel, x + row * width, width, count, n < ROWS_AT_ONCE ? n : 1, !start, sums + row * stride, stride); \
        row += n;                                                                                            \
    }
        REST(4)
        REST(2)
        REST(1)
#undef REST
    }
}

/* The same of 32 outputs. */
static inline void product_pair(const bf16 *weight, int64_t apart, int64_t width, const void *packed, int64_t rows, float *sums,
                         int64_t stride) {
    product_bf16(weight, apart, width, packed, rows, sums, stride);
    product_bf16(weight + TILE * apart, apart, width, packed, rows, sums + TILE, stride);
}

/* Of `rows` rows, 32 columns at most and `wide` vectors of values: the even columns first, then the odd ones. */
INLINE void weigh_wide(const float (*weights)[DEEP], const bf16 *values, int64_t apart, int64_t count, int64_t dim,
                       const int rows, const int wide, float *out) {
    vf made[2][VALUE_ROWS][2];
    UNROLL for (int odd = 0; odd < 2; odd++) {
        vf sum[VALUE_ROWS][2] = {{{0}}};
        for (int64_t j = odd; j < count; j += 2) {
            vf value[2];
            UNROLL for (int i = 0; i < wide; i++) value[i] = load_bf16(values + j * apart + i * LANES);
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int i = 0; i < wide; i++) sum[r][i] = fused_exact(all(weights[r][j]), value[i], sum[r][i]);
        }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int i = 0; i < wide; i++) made[odd][r][i] = sum[r][i];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < wide; i++) {
            float *to = out + r * dim + i * LANES;
            save(to, load(to) + (made[0][r][i] + made[1][r][i]));
        }
}

INLINE void weigh_rows(const float (*weights)[DEEP], const bf16 *values, int64_t apart, int64_t count, int64_t dim,
                       const int rows, float *out) {
    int64_t d = 0;
    for (; d + 2 * LANES <= dim; d += 2 * LANES) weigh_wide(weights, values + d, apart, count, dim, rows, 2, out + d);
    for (; d < dim; d += LANES) weigh_wide(weights, values + d, apart, count, dim, rows, 1, out + d);
}

/* Adds to out [16, dim]: weights [count / 32, 16, 32] times values [count, dim], for the first `live` rows. */
static inline void weigh(const weight_t *weights, const bf16 *values, int64_t count, int64_t dim, int64_t live, float *out) {
    for (int64_t j = 0; j < count; j += DEEP) {
        const float(*of)[DEEP] = (const void *)(weights + j * TILE);
        const int64_t columns = count - j < DEEP ? count - j : DEEP;
        const bf16 *from = values + j * dim;
        int64_t row = 0;
        for (; row + VALUE_ROWS <= live; row += VALUE_ROWS)
            weigh_rows(of + row, from, dim, columns, dim, VALUE_ROWS, out + row * dim);
        switch (live - row) {
            case 1: weigh_rows(of + row, from, dim, columns, dim, 1, out + row * dim); break;
            case 2: weigh_rows(of + row, from, dim, columns, dim, 2, out + row * dim); break;
            case 3: weigh_rows(of + row, from, dim, columns, dim, 3, out + row * dim); break;
            default: break;
        }
    }
}

/* The same for the rows of a mask alone. */
static inline void weigh_some(const weight_t *weights, const bf16 *values, int64_t count, int64_t dim, uint32_t rows,
                              float *out) {
    for (; rows; rows &= rows - 1) {
        const int row = __builtin_ctz(rows);
        weigh(weights + row * DEEP, values, count, dim, 1, out + row * dim);
    }
}

INLINE void save_weights(weight_t *to, vf weights) { save(to, rounded(weights)); }
