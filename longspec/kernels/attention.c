/* Attention of a few rows over one part of a cache, on a CPU with tiles (AMX), in bf16.
 *
 * A key head and 512 columns are one task, so that two cores share three heads evenly. In a task the scores of 16 columns
 * by 16 rows are one tile, keys read where they lie; the rows are those of all query heads of the key head, so that keys
 * and values are read once for all of them. The weights of 32 columns, rounded to bf16, times their values are a tile
 * for each 16 dimensions. Coded blocks are decoded to bf16 first, 512 columns at a time, exactly as torch's operators do.
 *
 * Every task keeps its rows' maximum, sum and output in fp32; they are joined in the order of the columns. What a row
 * computes depends on the columns that it may read and on where the part begins, and not on rows or threads beside it.
 */
#include <stdint.h>

#if !defined(__AMX_BF16__) || !defined(__AVX512BW__) || !defined(__AVX512BF16__)
int missing(void) { return 1; }
#else
#include "tiles.h"

enum { CHUNK = 512, BLOCK = 64, MOST_DIM = 256 };
enum { AHEAD = 48 }; /* columns: asked for early, a layer at 7,000 columns takes 0.35 ms and not 0.45 */
enum { CODES_AHEAD = 64 };
enum { STRIDE = CHUNK + LANES }; /* of scores: rows that are a power of two apart would share cache sets */
enum { DENSE = 0, SYMMETRIC = 1, ASYMMETRIC = 2, DUAL = 3 };

typedef struct {
    const char *codes, *lower;       /* rows of bf16 or of codes; the lower plane of two */
    const uint16_t *step, *low;      /* scales in fp16 */
    int64_t head, lower_head;        /* bytes from a head to the next */
    int64_t step_head, low_head;     /* scales from a head to the next */
} Side;

typedef struct {
    Side keys, values;
    int64_t kind, bits, columns;
    const int64_t *first, *last; /* [q]: a row reads the columns first..last; null: all */
    const uint8_t *tail;         /* [q, tail_columns]: of the last columns, those that it may read; or null */
    int64_t tail_columns;
} Part;

typedef struct {
    const bf16 *queries; /* [q, key_heads * groups, dim], rows `query_row` apart */
    int64_t query_row, rows, key_heads, groups, dim;
    float scale, softcap; /* 0: no softcap */
} Reading;

/* Rows of one text that stand in the same place in every layer.
 *
 * Dense, a place is where [2, key_heads, capacity, dim] lies, keys and then values. Coded, it is nine: keys' codes, lower
 * codes, steps and lows, or 0, the same of values, and the capacity in blocks. */
typedef struct {
    const int64_t *places; /* of each layer */
    int64_t kind, bits, capacity, column, columns; /* of a head's rows, those from `column` on */
    const int64_t *first, *last;       /* as a part's */
    const uint8_t *tail;
    int64_t tail_columns;
} Run;

/* What one text has in a pass: rows of its own, which are put where its last run is, a dense one, and the runs they read. */
typedef struct {
    const Run *runs;
    int64_t count, at, rows, put; /* from row `at` of the pass on; into column `put` */
} Text;

int missing(void) { return refused(); }

static __m512 capped(__m512 x, float cap) {
    /* cap * tanh(x / cap), of the size's exponential so that nothing overflows */
    const __m512 e = exponential(_mm512_abs_ps(x) * (-2.0f / cap));
    const __m512 t = cap * ((1.0f - e) / (1.0f + e));
    return _mm512_mask_sub_ps(t, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), _mm512_setzero_ps(), t);
}

static float half(uint16_t x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x))); }
static float brief(float x) { return _mm512_cvtss_f32(rounded(_mm512_set1_ps(x))); }

/* 16 codes as what they stand for, before the last rounding: code times step, rounded, plus low. */
INLINE __m512 value(const uint8_t *codes, const uint8_t *lower, int64_t shift, const int kind, const int bits, __m512 step,
                    __m512 low) {
    const __m128i by = _mm_cvtsi64_si128(shift), mask = _mm_set1_epi8((char)((1 << bits) - 1));
    const __m128i part = _mm_loadu_si128((const void *)codes);
    if (kind == SYMMETRIC) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(part)) * step;
    __m512i code = _mm512_cvtepu8_epi32(bits == 8 ? part : _mm_and_si128(_mm_srl_epi16(part, by), mask));
    if (kind == DUAL) {
        const __m128i more = _mm_and_si128(_mm_srl_epi16(_mm_loadu_si128((const void *)lower), by), mask);
        code = _mm512_or_si512(_mm512_slli_epi32(code, 4), _mm512_cvtepu8_epi32(more));
    }
    return rounded(_mm512_cvtepi32_ps(code) * step) + low;
}

/* A head's columns of one side from `first` on, which begins a block. */
typedef struct {
    const uint8_t *codes, *lower;
    const uint16_t *steps, *lows; /* per `every` columns, `wide` of them; lows or null */
    int64_t size;                 /* bytes of a column */
} Columns;

INLINE Columns from_column(const Side *side, int64_t head, int64_t first, int64_t size, int64_t every, int64_t wide) {
    const int64_t scale = first / every * wide;
    return (Columns){
        (const uint8_t *)side->codes + head * side->head + first * size,
        side->lower ? (const uint8_t *)side->lower + head * side->lower_head + first * size : 0,
        side->step + head * side->step_head + scale, side->low ? side->low + head * side->low_head + scale : 0, size};
}

INLINE void ask_early(const Columns *c, int64_t column) {
    const int64_t later = (column + CODES_AHEAD) * c->size;
    _mm_prefetch((const char *)c->codes + later, _MM_HINT_T0);
    if (c->lower) _mm_prefetch((const char *)c->lower + later, _MM_HINT_T0);
}

/* On to a column's next 16 channels: where their codes begin, and in which bits of the bytes. */
INLINE void go_on(int64_t *place, int64_t *shift, int64_t size, int64_t bits) {
    *place += LANES;
    if (*place == size) *place = 0, *shift += bits;
}

/* Keys of `count` columns, whole blocks, as rows of bf16 [count, dim]; they have their scales per block and channel. */
INLINE void decode_keys(const Part *p, int64_t head, int64_t first, int64_t count, int64_t dim, bf16 *keys, const int kind,
                        const int bits) {
    const Columns c = from_column(&p->keys, head, first, dim * bits / 8, BLOCK, dim);
    float step[MOST_DIM], low[MOST_DIM];
    memset(low, 0, sizeof low);
    for (int64_t j = 0; j < count; j++) {
        ask_early(&c, j);
        for (int64_t d = 0; j % BLOCK == 0 && d < dim; d += LANES) {
            const int64_t at = j / BLOCK * dim + d;
            _mm512_storeu_ps(step + d, rounded(halves(c.steps + at)));
            if (kind != SYMMETRIC) _mm512_storeu_ps(low + d, rounded(halves(c.lows + at)));
        }
        int64_t place = 0, shift = 0;
        for (int64_t d = 0; d < dim; d += 2 * LANES) {
            __m512 both[2];
            for (int64_t i = 0; i < 2; i++) {
                const int64_t at = j * c.size + place, channel = d + i * LANES;
                both[i] = value(c.codes + at, c.lower + at, shift, kind, bits, _mm512_loadu_ps(step + channel),
                                _mm512_loadu_ps(low + channel));
                go_on(&place, &shift, c.size, bits);
            }
            _mm512_storeu_si512(keys + j * dim + d, (__m512i)_mm512_cvtne2ps_pbh(both[1], both[0]));
        }
    }
}

/* Values of `count` columns, two of them interleaved, as the second product takes them; they have their scales per column. */
INLINE void decode_values(const Part *p, int64_t head, int64_t first, int64_t count, int64_t dim, bf16 *pairs,
                          const int kind, const int bits) {
    const Columns c = from_column(&p->values, head, first, dim * bits / 8, 1, 1);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 all = _mm512_cvtepi32_ps(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __m128i mask = _mm_set1_epi8((char)((1 << bits) - 1));
    for (int64_t j = 0; j < count; j += 2) {
        ask_early(&c, j);
        __m512 step[2], low[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < 2; i++) {
            step[i] = _mm512_set1_ps(brief(half(c.steps[j + i])));
            if (kind != SYMMETRIC) low[i] = _mm512_set1_ps(brief(half(c.lows[j + i])));
        }
        /* What the codes of both columns can be, where they are at most 16 values: looked up. */
        const __m512i known = (__m512i)_mm512_cvtne2ps_pbh(rounded(all * step[1]) + low[1], rounded(all * step[0]) + low[0]);
        int64_t place = 0, shift = 0;
        for (int64_t d = 0; d < dim; d += LANES) {
            const uint8_t *codes = c.codes + j * c.size + place, *lower = c.lower + j * c.size + place;
            __m512i pair;
            if (kind == ASYMMETRIC && bits <= 4) {
                __m128i code[2];
                for (int64_t i = 0; i < 2; i++) {
                    const __m128i part = _mm_loadu_si128((const void *)(codes + i * c.size));
                    code[i] = _mm_and_si128(_mm_srl_epi16(part, _mm_cvtsi64_si128(shift)), mask);
                }
                code[1] = _mm_or_si128(code[1], _mm_set1_epi8(16));
                const __m128i near = _mm_unpacklo_epi8(code[0], code[1]), far = _mm_unpackhi_epi8(code[0], code[1]);
                pair = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm256_set_m128i(far, near)), known);
            } else {
                __m512 both[2];
                for (int64_t i = 0; i < 2; i++)
                    both[i] = value(codes + i * c.size, lower + i * c.size, shift, kind, bits, step[i], low[i]);
                pair = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(both[1], both[0]));
            }
            _mm512_storeu_si512(pairs + (j / 2 * dim + d) * 2, pair);
            go_on(&place, &shift, c.size, bits);
        }
    }
}

static void decode(const Part *p, int64_t head, int64_t first, int64_t count, int64_t dim, bf16 *keys, bf16 *pairs) {
#define BOTH(kind, bits)                                                            \
    {                                                                               \
        decode_keys(p, head, first, count, dim, keys, kind, bits);                  \
        decode_values(p, head, first, count, dim, pairs, kind, bits);               \
    }
    if (p->kind == SYMMETRIC)
        BOTH(SYMMETRIC, 8)
    else if (p->kind == DUAL)
        BOTH(DUAL, 4)
    else if (p->bits == 8)
        BOTH(ASYMMETRIC, 8)
    else if (p->bits == 4)
        BOTH(ASYMMETRIC, 4)
    else
        BOTH(ASYMMETRIC, 2)
#undef BOTH
}

/* Bytes of a thread's own room: a chunk's keys, laid out values, scores and weights. */
static int64_t own_room(int64_t dim) { return CHUNK * dim * 4 + STRIDE * ROWS * 6 + 4096; }

static int64_t tall(const Reading *r) { return (r->rows * r->groups + ROWS - 1) / ROWS; }

/* A task's result: for each of its rows maximum, sum, and output [dim]. */
static int64_t task_floats(const Reading *r) { return tall(r) * ROWS * (2 + r->dim); }

/* Bytes of room for reading so many columns with so many threads, and for the state that is kept between parts. */
int64_t attention_room(const Reading *r, int64_t columns, int64_t threads) {
    const int64_t tasks = (columns + CHUNK - 1) / CHUNK * r->key_heads;
    return threads * own_room(r->dim) + 4 * tasks * task_floats(r) + tall(r) * r->key_heads * r->dim * 2 * ROWS + 4096;
}
int64_t attention_state(const Reading *r) { return 4 * r->key_heads * task_floats(r); }

/* Queries of one key head as the tiles' right operand: words of two dimensions [dim / 2, 16 rows], tile by tile. Row
 * g * rows + i is query head g of row i. */
static void lay_queries(const Reading *r, int64_t head, bf16 *laid) {
    const int64_t rows = r->rows * r->groups;
    float words[ROWS][ROWS] __attribute__((aligned(64)));
    for (int64_t t = 0; t < tall(r); t++)
        for (int64_t d = 0; d < r->dim; d += 2 * LANES) {
            memset(words, 0, sizeof words);
            for (int64_t j = 0; j < ROWS && t * ROWS + j < rows; j++) {
                const int64_t row = (t * ROWS + j) % r->rows, group = (t * ROWS + j) / r->rows;
                memcpy(words[j], r->queries + row * r->query_row + (head * r->groups + group) * r->dim + d, 64);
            }
            transpose(words);
            memcpy(laid + (t * r->dim + d) * ROWS, words, sizeof words);
        }
}

/* Values [count, dim] of two columns each, interleaved: the right operand of the second product. Missing ones are zero. */
static void interleave(const bf16 *values, int64_t count, int64_t padded, int64_t dim, bf16 *pairs) {
    for (int64_t j = 0; j < padded; j += 2) {
        for (int64_t d = 0; d < 2 * dim; d += 2 * LANES)
            _mm_prefetch((const char *)(values + (j + AHEAD) * dim + d), _MM_HINT_T0);
        for (int64_t d = 0; d < dim; d += LANES) {
            __m512i pair = _mm512_setzero_si512();
            if (j < count) pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(values + j * dim + d)));
            if (j + 1 < count) {
                const __m256i next = _mm256_loadu_si256((const void *)(values + (j + 1) * dim + d));
                pair = _mm512_or_si512(pair, _mm512_slli_epi32(_mm512_cvtepu16_epi32(next), 16));
            }
            _mm512_storeu_si512(pairs + (j / 2 * dim + d) * 2, pair);
        }
    }
}

/* One key head and the columns from `start` on, at most 512. */
static void task(const Reading *r, const Part *p, int64_t head, int64_t start, const bf16 *queries, char *room, float *result) {
    const int64_t count = p->columns - start < CHUNK ? p->columns - start : CHUNK, dim = r->dim;
    const int64_t padded = (count + 2 * ROWS - 1) / (2 * ROWS) * (2 * ROWS), rows = r->rows * r->groups;
    bf16 *own_keys = (bf16 *)room, *pairs = own_keys + CHUNK * dim;
    float(*scores)[STRIDE] = (void *)(pairs + CHUNK * dim);
    bf16 *weights = (bf16 *)(scores + ROWS);
    const bf16 *keys = own_keys;
    if (p->kind == DENSE) {
        keys = (const bf16 *)(p->keys.codes + head * p->keys.head) + start * dim;
        interleave((const bf16 *)(p->values.codes + head * p->values.head) + start * dim, count, padded, dim, pairs);
    } else
        decode(p, head, start, count, dim, own_keys, pairs);
    bf16 last_keys[ROWS * MOST_DIM] __attribute__((aligned(64)));
    const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
    for (int64_t t = 0; t < tall(r); t++) {
        const bf16 *laid = queries + t * dim * ROWS;
        const int64_t live = rows - t * ROWS < ROWS ? rows - t * ROWS : ROWS;
        float made[ROWS][ROWS] __attribute__((aligned(64)));
        for (int64_t j = 0; j < count; j += ROWS) {
            const bf16 *from = keys + j * dim;
            if (j + ROWS > count) { /* what stands behind the part isn't ours to read */
                memset(last_keys, 0, sizeof last_keys);
                memcpy(last_keys, from, (size_t)((count - j) * dim) * sizeof *from);
                from = last_keys;
            }
            if (p->kind == DENSE) /* asked for early: a layer at 7,000 columns then takes 0.32 ms and not 0.40 */
                for (int64_t d = 0; d < dim; d += LANES * 2)
                    for (int row = 0; row < ROWS; row++)
                        _mm_prefetch((const char *)(keys + (j + AHEAD + row) * dim + d), _MM_HINT_T0);
            _tile_zero(0);
            for (int64_t d = 0; d < dim; d += 2 * LANES) {
                _tile_loadd(4, from + d, 2 * dim);
                _tile_loadd(5, laid + d * ROWS, 64);
                _tile_dpbf16ps(0, 4, 5);
            }
            _tile_stored(0, made, 64);
            transpose(made);
            for (int64_t i = 0; i < live; i++) _mm512_storeu_ps(scores[i] + j, _mm512_load_ps(made[i]));
        }
        float *to = result + t * ROWS * (2 + dim);
        for (int64_t i = 0; i < live; i++) {
            const int64_t row = (t * ROWS + i) % r->rows;
            const int64_t first = p->first ? p->first[row] - start : 0, last = p->first ? p->last[row] - start : count;
            const int64_t tail = p->tail ? p->columns - p->tail_columns - start : count; /* from here on by the mask */
            __m512 most = nothing, sum = _mm512_setzero_ps();
            for (int64_t j = 0; j < count; j += LANES) {
                __m512 score = _mm512_loadu_ps(scores[i] + j) * r->scale;
                if (r->softcap > 0) score = capped(score, r->softcap);
                const int64_t end = last < count ? last : count;
                __mmask16 reads = upto(end - j) & (__mmask16)~upto(first - j);
                for (int64_t lane = 0; j + LANES > tail && lane < LANES; lane++)
                    if (j + lane >= tail && j + lane < count && !p->tail[row * p->tail_columns + j + lane - tail])
                        reads &= (__mmask16)~(1 << lane);
                score = _mm512_mask_mov_ps(nothing, reads, score);
                most = _mm512_max_ps(most, score);
                _mm512_storeu_ps(scores[i] + j, score);
            }
            const float largest = _mm512_reduce_max_ps(most);
            for (int64_t j = 0; j < padded; j += 2 * LANES) {
                __m512 weight[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                for (int64_t k = 0; k < 2 && j + k * LANES < count; k++) {
                    const __m512 score = _mm512_loadu_ps(scores[i] + j + k * LANES);
                    const __mmask16 reads = _mm512_cmp_ps_mask(score, nothing, _CMP_NEQ_OQ);
                    weight[k] = _mm512_maskz_mov_ps(reads, exponential(score - largest));
                    sum += weight[k];
                }
                _mm512_storeu_si512(weights + j * ROWS + i * 2 * LANES, (__m512i)_mm512_cvtne2ps_pbh(weight[1], weight[0]));
            }
            to[i] = largest;
            to[ROWS + i] = _mm512_reduce_add_ps(sum);
        }
        to += 2 * ROWS;
        for (int64_t d = 0; d < dim; d += 2 * LANES) { /* dim is a multiple of 32 */
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t j = 0; j < padded; j += 2 * ROWS) {
                _tile_loadd(4, weights + j * ROWS, 64);
                _tile_loadd(5, pairs + j * dim + d * 2, 4 * dim);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(6, pairs + j * dim + d * 2 + 2 * LANES, 4 * dim);
                _tile_dpbf16ps(1, 4, 6);
            }
            _tile_stored(0, to + d, 4 * dim);
            _tile_stored(1, to + d + LANES, 4 * dim);
        }
    }
}

/* Two results over other columns as one, in a's place; of the first `live` rows. */
static void join(float *a, const float *b, int64_t live, int64_t dim) {
    const __m512 none = _mm512_set1_ps(-__builtin_inff());
    for (int64_t i = 0; i < live; i++) {
        if (b[i] == -__builtin_inff()) continue;
        const float most = a[i] > b[i] ? a[i] : b[i];
        const __m512 both = _mm512_mask_mov_ps(_mm512_set1_ps(b[i]), 1, _mm512_set1_ps(a[i]));
        const __m512 weight = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(both, none, _CMP_NEQ_OQ), exponential(both - most));
        const float ours = _mm512_cvtss_f32(weight), theirs = _mm512_cvtss_f32(_mm512_permute_ps(weight, 1));
        a[i] = most;
        a[ROWS + i] = a[ROWS + i] * ours + b[ROWS + i] * theirs;
        for (int64_t d = 0; d < dim; d += LANES) {
            float *to = a + 2 * ROWS + i * dim + d;
            __m512 old = _mm512_loadu_ps(to);
            if (ours == 0) old = _mm512_setzero_ps(); /* it may be anything */
            _mm512_storeu_ps(to, old * ours + _mm512_loadu_ps(b + 2 * ROWS + i * dim + d) * theirs);
        }
    }
}

/* A tile of joined results as attention's output [rows, key_heads * groups, dim]. */
static void written(const Reading *r, int64_t head, int64_t tile, const float *from, bf16 *output) {
    const int64_t all = r->rows * r->groups, end = all < (tile + 1) * ROWS ? all : (tile + 1) * ROWS;
    for (int64_t j = tile * ROWS; j < end; j++) {
        const float sum = from[ROWS + j % ROWS];
        bf16 *out = output + ((j % r->rows * r->key_heads + head) * r->groups + j / r->rows) * r->dim;
        for (int64_t d = 0; d < r->dim; d += LANES)
            _mm256_storeu_si256((void *)(out + d), narrow(_mm512_loadu_ps(from + 2 * ROWS + j % ROWS * r->dim + d) / sum));
    }
}

/* Reads one part into the state, which is new with `begin`; with `output` the state is what is written there. */
void attention_read(const Reading *r, const Part *p, int64_t begin, char *room, int64_t threads, float *state, bf16 *output) {
    const int64_t chunks = (p->columns + CHUNK - 1) / CHUNK, tasks = chunks * r->key_heads, size = task_floats(r);
    const int64_t tiles = tall(r), one = ROWS * (2 + r->dim);
    bf16 *queries = (bf16 *)(room + threads * own_room(r->dim));
    float *results = (float *)(queries + tiles * r->key_heads * r->dim * ROWS);
    for (int64_t head = 0; head < r->key_heads; head++) lay_queries(r, head, queries + head * tiles * r->dim * ROWS);
#pragma omp parallel num_threads((int)threads)
    {
        int64_t thread = 0;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        thread = omp_get_thread_num();
#endif
        configure();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tasks; i++)
            task(r, p, i / chunks, i % chunks * CHUNK, queries + i / chunks * tiles * r->dim * ROWS,
                 room + thread * own_room(r->dim), results + i * size);
        _tile_release();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < r->key_heads * tiles; i++) {
            const int64_t head = i / tiles, tile = i % tiles, rows = r->rows * r->groups;
            const int64_t live = rows - tile * ROWS < ROWS ? rows - tile * ROWS : ROWS;
            float *to = state + head * size + tile * one;
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const float *from = results + (head * chunks + chunk) * size + tile * one;
                if (begin && chunk == 0)
                    memcpy(to, from, (size_t)one * sizeof *to);
                else
                    join(to, from, live, r->dim);
            }
            if (output) written(r, head, tile, to, output);
        }
    }
}

/* One key head of one text, and some columns of one of its runs. */
typedef struct {
    int64_t text, head, start;
    Part part;
    float *result;
} Task;

static Reading of_text(const Reading *all, const Text *text) {
    Reading r = *all;
    r.queries = all->queries + text->at * all->query_row;
    r.rows = text->rows;
    return r;
}

/* A side of a coded run: four of its places. Scales stand per `every` columns, `wide` of them. */
static Side of_codes(const int64_t *at, int64_t capacity, int64_t column, int64_t size, int64_t every, int64_t wide) {
    const int64_t codes = column * size, scale = column / every * wide, head = capacity * BLOCK / every * wide;
    return (Side){
        .codes = (const char *)at[0] + codes, .head = capacity * BLOCK * size,
        .lower = at[1] ? (const char *)at[1] + codes : 0, .lower_head = capacity * BLOCK * size,
        .step = (const uint16_t *)at[2] + scale, .step_head = head,
        .low = at[3] ? (const uint16_t *)at[3] + scale : 0, .low_head = head};
}

static Part of_run(const Reading *r, const Run *run, int64_t layer) {
    if (run->kind != DENSE) {
        const int64_t *at = run->places + 9 * layer, size = r->dim * (run->kind == DUAL ? 4 : run->bits) / 8;
        return (Part){of_codes(at, at[8], run->column, size, BLOCK, r->dim), of_codes(at + 4, at[8], run->column, size, 1, 1),
                      run->kind, run->bits, run->columns, run->first, run->last, run->tail, run->tail_columns};
    }
    const int64_t size = run->capacity * r->dim * (int64_t)sizeof(bf16);
    const char *keys = (const char *)run->places[layer] + run->column * r->dim * (int64_t)sizeof(bf16);
    const Side sides[2] = {{.codes = keys, .head = size}, {.codes = keys + r->key_heads * size, .head = size}};
    return (Part){sides[0], sides[1], DENSE, 16, run->columns, run->first, run->last, run->tail, run->tail_columns};
}

static int64_t tasks_of(const Reading *r, const Text *text) {
    int64_t tasks = 0;
    for (int64_t i = 0; i < text->count; i++) tasks += (text->runs[i].columns + CHUNK - 1) / CHUNK * r->key_heads;
    return tasks;
}

/* Bytes of room for reading these texts with so many threads. */
int64_t texts_room(const Reading *all, const Text *texts, int64_t count, int64_t threads) {
    int64_t bytes = threads * own_room(all->dim) + 4096;
    for (int64_t i = 0; i < count; i++) {
        const Reading r = of_text(all, texts + i);
        bytes += tasks_of(&r, texts + i) * (4 * task_floats(&r) + (int64_t)sizeof(Task));
        bytes += tall(&r) * r.key_heads * r.dim * 2 * ROWS + 2 * (int64_t)sizeof(int64_t);
    }
    return bytes;
}

/* All texts of a pass at one layer: their keys and values are put, and read. `all` has the pass' queries; keys and
 * values stand behind them in each row, as in a product's result. */
void texts_read(const Reading *all, const Text *texts, int64_t count, int64_t layer, char *room, int64_t threads,
                bf16 *output) {
    const int64_t heads = all->key_heads, dim = all->dim, wide = heads * all->groups * dim;
    char *next = room + threads * own_room(dim);
    bf16 **laid = (bf16 **)next;
    int64_t *firsts = (int64_t *)(laid + count), made = 0;
    Task *tasks = (Task *)(firsts + count);
    next = (char *)tasks;
    for (int64_t i = 0; i < count; i++) next += tasks_of(all, texts + i) * (int64_t)sizeof(Task);
    next += -(intptr_t)next & 63;
    for (int64_t i = 0; i < count; i++) {
        const Reading r = of_text(all, texts + i);
        laid[i] = (bf16 *)next;
        next += tall(&r) * heads * dim * 2 * ROWS;
    }
    for (int64_t i = 0; i < count; i++) {
        const Reading r = of_text(all, texts + i);
        firsts[i] = made;
        for (int64_t head = 0; head < heads; head++)
            for (int64_t run = 0; run < texts[i].count; run++) {
                const Part part = of_run(&r, texts[i].runs + run, layer);
                for (int64_t start = 0; start < part.columns; start += CHUNK, made++) {
                    tasks[made] = (Task){i, head, start, part, (float *)next};
                    next += 4 * task_floats(&r);
                }
            }
    }
#pragma omp parallel num_threads((int)threads)
    {
        int64_t thread = 0;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        thread = omp_get_thread_num();
#endif
        configure();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * heads; i++) {
            const Text *text = texts + i / heads;
            const Reading r = of_text(all, text);
            const Run *own = text->runs + text->count - 1;
            const int64_t head = i % heads, size = own->capacity * dim;
            lay_queries(&r, head, laid[i / heads] + head * tall(&r) * dim * ROWS);
            bf16 *keys = (bf16 *)own->places[layer] + head * size + text->put * dim;
            for (int64_t row = 0; row < r.rows; row++) {
                const bf16 *from = r.queries + row * r.query_row + wide + head * dim;
                memcpy(keys + row * dim, from, (size_t)dim * sizeof *from);
                memcpy(keys + heads * size + row * dim, from + heads * dim, (size_t)dim * sizeof *from);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < made; i++) {
            const Task *t = tasks + i;
            const Reading r = of_text(all, texts + t->text);
            const bf16 *queries = laid[t->text] + t->head * tall(&r) * dim * ROWS;
            task(&r, &t->part, t->head, t->start, queries, room + thread * own_room(dim), t->result);
        }
        _tile_release();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * heads; i++) {
            const Text *text = texts + i / heads;
            const Reading r = of_text(all, text);
            const int64_t head = i % heads, each = tasks_of(all, text) / heads;
            const Task *own = tasks + firsts[i / heads] + head * each;
            for (int64_t tile = 0; tile < tall(&r); tile++) {
                const int64_t live = r.rows * r.groups - tile * ROWS, at = tile * ROWS * (2 + dim);
                for (int64_t chunk = 1; chunk < each; chunk++)
                    join(own->result + at, own[chunk].result + at, live < ROWS ? live : ROWS, dim);
                written(&r, head, tile, own->result + at, output + text->at * wide);
            }
        }
    }
}
#endif
