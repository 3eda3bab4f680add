/* A decoder's layers for a few rows on a CPU; attention is another library's.
 *
 *     project   norm, then queries, keys and values, turned to their positions
 *     finish    output and residual, norm, gate and up, activation, down and residual
 *     layers    both, and attention between them, for a run of layers
 *     linear    norm, if any, then one product: the head
 *
 * Weights are read where they lie, once for all rows: bf16 as a checkpoint has them, or codes (groups.h). Sums are fp32,
 * every result is rounded to bf16 where torch's operators round it. What a row sums up, and in which order, is the same
 * whatever rows stand beside it: a row's bits don't depend on its companions.
 *
 * Products in bf16 go by tiles (AMX): 16 outputs, whose weights are the left operand, by 16 rows, laid out once a product
 * as words of two, [words, 16 rows]. A processor without tiles has none of this, and takes torch.
 */
#include <stdint.h>

#if !defined(__AMX_BF16__) || !defined(__AMX_INT8__) || !defined(__AVX512BW__)
int missing(void) { return 1; }
#else
#include "tiles.h"

enum { BLOCK = 32, MOST_ROWS = 64 };
enum { BF16 = 0, CODES = 1 };
enum { SILU = 0, GELU_TANH = 1 };

typedef struct {
    const void *weight;          /* [size, width] bf16, or codes */
    const uint16_t *scale, *low; /* of codes, in fp16; low or null */
    const bf16 *bias;            /* [size] or null */
    int64_t size, width, kind, bits;
} Matrix;

typedef struct {
    Matrix qkv, output, gate_up, down;
    const bf16 *before_attention, *before_mlp; /* norms */
    const bf16 *query_norm, *key_norm;         /* of each head, or null */
    int64_t heads, key_heads, head_dim, activation;
    float eps;
} Layer;

static __m512 activated(__m512 x, int64_t kind) {
    __m512 u = x;
    if (kind == GELU_TANH) u = 1.59576912f * (x + 0.044715f * x * x * x); /* tanh is a sigmoid of twice its argument */
    return x / (1.0f + exponential(-u));
}

#include "quantized.h"

/* Part `part` of all rows x, as the tiles' right operand: the 16 words from 16 * place on, of 16 rows. Two threads never
 * write one line. */
static void lay(const Matrix *m, const bf16 *x, int64_t rows, int64_t part, void *laid) {
    const int64_t size = 2 * m->width, places = size / 64, first = part / places * ROWS, place = part % places;
    const char *from = (const char *)x + first * size + place * 64;
    float words[ROWS][ROWS] __attribute__((aligned(64)));
    float *to = (float *)((char *)laid + first * size) + place * ROWS * ROWS;
    if (rows - first == 1) {
        memcpy(words[0], from, 64);
        for (int word = 0; word < ROWS; word++) to[word * ROWS] = words[0][word];
        return;
    }
    for (int row = 0; row < ROWS; row++)
        if (first + row < rows) memcpy(words[row], from + row * size, 64);
    transpose(words);
    memcpy(to, words, sizeof words);
}

/* How many parts `lay` has. */
static int64_t parts(const Matrix *m, int64_t rows) { return (rows + ROWS - 1) / ROWS * 2 * m->width / 64; }

/* Sums [rows, 32] of the outputs from `out` on, in bf16. */
static void tile_product(const Matrix *m, int64_t out, const void *laid, int64_t rows, float (*sums)[BLOCK]) {
    const int64_t size = 2 * m->width, tile = ROWS * size; /* bytes of a row, of 16 */
    const char *upper = (const char *)m->weight + out * size, *lower = upper + tile;
    for (int64_t first = 0; first < rows; first += 2 * ROWS) {
        const char *left = (const char *)laid + first / ROWS * tile, *right = left + tile;
        float made[4][ROWS][ROWS] __attribute__((aligned(64)));
        const int both = first + ROWS < rows;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < size; k += 64) {
            _tile_loadd(4, left + ROWS * k, 64);
            _tile_loadd(5, upper + k, size);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, lower + k, size);
            _tile_dpbf16ps(1, 6, 4);
            if (both) {
                _tile_loadd(7, right + ROWS * k, 64);
                _tile_dpbf16ps(2, 5, 7);
                _tile_dpbf16ps(3, 6, 7);
            }
        }
        _tile_stored(0, made[0], 64);
        _tile_stored(1, made[1], 64);
        _tile_stored(2, made[2], 64);
        _tile_stored(3, made[3], 64);
        for (int64_t half = 0; half < 4; half++) {
            const int64_t start = first + half / 2 * ROWS, here = rows - start < ROWS ? rows - start : ROWS;
            if (here == 1)
                for (int i = 1; i < ROWS; i++) made[half][0][i] = made[half][i][0];
            else if (here > 1)
                transpose(made[half]);
            for (int64_t row = 0; row < here; row++) memcpy(sums[start + row] + half % 2 * ROWS, made[half][row], 4 * ROWS);
        }
    }
}

/* The same of either kind, with the bias. */
static void product(const Matrix *m, int64_t out, void *laid, int64_t rows, float (*sums)[BLOCK]) {
    if (m->kind == CODES) {
        const Coded x = coded_in(laid, rows, m->width);
        for (int64_t i = 0; i < BLOCK; i += LANES) strip_product(m, (out + i) / LANES, &x, rows, sums[0] + i, BLOCK);
    } else
        tile_product(m, out, laid, rows, sums);
    if (m->bias)
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < BLOCK; i += LANES)
                _mm512_storeu_ps(sums[row] + i, _mm512_loadu_ps(sums[row] + i) + load(m->bias + out + i));
}

/* The working room of one call: what is laid out or coded, and rows of bf16. */
typedef struct {
    void *laid;
    bf16 *hidden, *wide;
} Room;

static int64_t widest(const Layer *l) {
    int64_t most = l->qkv.width;
    most = l->output.width > most ? l->output.width : most;
    return l->down.width > most ? l->down.width : most;
}

/* Bytes of room that a layer's calls, or with layer null a product of that width, need for so many rows. Tiles read on to
 * sixteen rows. */
int64_t layer_room(const Layer *l, int64_t width, int64_t rows) {
    const int64_t most = l && widest(l) > width ? widest(l) : width;
    return (rows + ROWS) * 8 * most;
}

static Room parted(char *room, int64_t most, int64_t rows) {
    Room r;
    r.laid = room;
    r.hidden = (bf16 *)(room + (rows + ROWS) * 4 * most);
    r.wide = r.hidden + (rows + ROWS) * most;
    return r;
}

int missing(void) { return refused(); }

/* Within a parallel region: x as matrix m's right operand. */
#define LAY(x)                                                                                                  \
    if (m->kind == CODES) {                                                                                     \
        configure_groups(rows);                                                                                     \
        const Coded all = coded_in(r.laid, rows, m->width);                                                     \
        _Pragma("omp for schedule(static)") for (int64_t part = 0; part < coded_parts(rows, m->width); part++)  \
            code(x, rows, m->width, m->bits, part, &all);                                                       \
    } else {                                                                                                    \
        configure();                                                                                            \
        _Pragma("omp for schedule(static)") for (int64_t part = 0; part < parts(m, rows); part++)               \
            lay(m, x, rows, part, r.laid);                                                                      \
    }

/* y [rows, size] = x [rows, width] weight^T + bias, of norm(x) unless norm is null. */
void linear(const Matrix *m, const bf16 *norm, float eps, const bf16 *x, int64_t rows, bf16 *y, char *room) {
    const Room r = parted(room, m->width, rows);
    const bf16 *given = norm ? r.hidden : x;
#pragma omp parallel
    {
        float sums[MOST_ROWS + ROWS][BLOCK];
        if (norm) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++)
                normed(x + row * m->width, norm, m->width, eps, r.hidden + row * m->width);
        }
        LAY(given)
#pragma omp for schedule(static)
        for (int64_t out = 0; out < m->size; out += BLOCK) {
            product(m, out, r.laid, rows, sums);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < BLOCK; i += LANES)
                    save(y + row * m->size + out + i, _mm512_loadu_ps(sums[row] + i));
        }
        _tile_release();
    }
}

/* Halves (a, b) of a head become (a cos - b sin, b cos + a sin); cos and signed sin [dims]. */
static void turned(bf16 *head, const bf16 *cos, const bf16 *sin, int64_t dims) {
    const int64_t half = dims / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const __mmask16 some = upto(half - i);
        const __m512 a = load_some(head + i, some), b = load_some(head + half + i, some);
        const __m512 left = rounded(a * load_some(cos + i, some)), right = rounded(b * load_some(cos + half + i, some));
        save_some(head + i, left + b * load_some(sin + i, some), some);
        save_some(head + half + i, right + a * load_some(sin + half + i, some), some);
    }
}

/* qkv [rows, q + 2 kv] of hidden [rows, width]; cos, sin [rows, dims], dims 0 where the layer has no positions. */
void project(const Layer *l, const bf16 *hidden, int64_t rows, const bf16 *cos, const bf16 *sin, int64_t dims, bf16 *qkv,
             char *room) {
    const Matrix *m = &l->qkv;
    const Room r = parted(room, widest(l), rows);
#pragma omp parallel
    {
        float sums[MOST_ROWS + ROWS][BLOCK];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++)
            normed(hidden + row * m->width, l->before_attention, m->width, l->eps, r.hidden + row * m->width);
        LAY(r.hidden)
#pragma omp for schedule(static)
        for (int64_t out = 0; out < m->size; out += BLOCK) {
            product(m, out, r.laid, rows, sums);
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < BLOCK; i += LANES)
                    save(qkv + row * m->size + out + i, _mm512_loadu_ps(sums[row] + i));
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * (l->heads + l->key_heads); i++) {
            const int64_t row = i / (l->heads + l->key_heads), at = i % (l->heads + l->key_heads);
            bf16 *head = qkv + row * m->size + at * l->head_dim;
            const bf16 *weight = at < l->heads ? l->query_norm : l->key_norm;
            if (weight) normed(head, weight, l->head_dim, l->eps, head);
            if (dims) turned(head, cos + row * dims, sin + row * dims, dims);
        }
        _tile_release();
    }
}

/* hidden [rows, width] after the layer, from before it, and its attention [rows, heads * head_dim]. Null attention: the
 * layer's is left out; mlp 0: its MLP is. */
void finish(const Layer *l, const bf16 *attention, const bf16 *before, int64_t rows, int64_t mlp, bf16 *hidden, char *room) {
    const Room r = parted(room, widest(l), rows);
    const int64_t width = l->output.size, wide = l->down.width;
    if (!attention && hidden != before) memcpy(hidden, before, (size_t)(rows * width) * sizeof *hidden);
#pragma omp parallel
    {
        float sums[MOST_ROWS + ROWS][BLOCK], gates[MOST_ROWS + ROWS][BLOCK];
        const Matrix *m = &l->output;
        if (attention) {
            LAY(attention)
#pragma omp for schedule(static)
            for (int64_t out = 0; out < width; out += BLOCK) {
                product(m, out, r.laid, rows, sums);
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t i = 0; i < BLOCK; i += LANES) {
                        const int64_t at = row * width + out + i;
                        save(hidden + at, load(before + at) + rounded(_mm512_loadu_ps(sums[row] + i)));
                    }
            }
        }
        if (mlp) {
            m = &l->gate_up;
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; row++)
                normed(hidden + row * width, l->before_mlp, width, l->eps, r.hidden + row * width);
            LAY(r.hidden)
#pragma omp for schedule(static)
            for (int64_t out = 0; out < wide; out += BLOCK) {
                product(m, out, r.laid, rows, gates);
                product(m, wide + out, r.laid, rows, sums);
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t i = 0; i < BLOCK; i += LANES) {
                        const __m512 gate = activated(rounded(_mm512_loadu_ps(gates[row] + i)), l->activation);
                        save(r.wide + row * wide + out + i, rounded(gate) * rounded(_mm512_loadu_ps(sums[row] + i)));
                    }
            }
            m = &l->down;
            LAY(r.wide)
#pragma omp for schedule(static)
            for (int64_t out = 0; out < width; out += BLOCK) {
                product(m, out, r.laid, rows, sums);
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t i = 0; i < BLOCK; i += LANES) {
                        const int64_t at = row * width + out + i;
                        save(hidden + at, load(hidden + at) + rounded(_mm512_loadu_ps(sums[row] + i)));
                    }
            }
        }
        _tile_release();
    }
}

typedef void Attend(const void *reading, const void *texts, int64_t count, int64_t layer, char *room, int64_t threads,
                    bf16 *output);

typedef struct {
    const bf16 *cos, *sin; /* [rows, dims] */
    int64_t dims;
} Turn;

typedef struct {
    const void *texts; /* as the layers of one window read them */
    char *room;
} Read;

/* What the layers of a pass have in common. */
typedef struct {
    const Layer *const *layers;
    const int64_t *turn_of, *read_of; /* of each layer; no positions: -1 */
    const uint8_t *parts;             /* of each layer: ATTENTION and MLP, or what isn't left out */
    const Turn *turns;
    const Read *reads;
    Attend *attend;
    const void *reading; /* with its queries in `qkv` */
    int64_t count, threads;
} Pass;

enum { ATTENTION = 1, MLP = 2 };

/* hidden [rows, width] after the layers first..last, in its own place; qkv and read are room for one layer's. */
void layers(const Pass *p, int64_t first, int64_t last, bf16 *hidden, int64_t rows, bf16 *qkv, bf16 *read, char *room) {
    for (int64_t i = first; i < last; i++) {
        const Layer *layer = p->layers[i];
        const int attends = p->parts[i] & ATTENTION;
        if (attends) {
            const Turn turn = p->turn_of[i] < 0 ? (Turn){0, 0, 0} : p->turns[p->turn_of[i]];
            const Read *r = p->reads + p->read_of[i];
            project(layer, hidden, rows, turn.cos, turn.sin, turn.dims, qkv, room);
            p->attend(p->reading, r->texts, p->count, i, r->room, p->threads, read);
        }
        finish(layer, attends ? read : 0, hidden, rows, p->parts[i] & MLP, hidden, room);
    }
}
#endif
