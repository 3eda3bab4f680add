/* Coded products of 9 and more rows by tiles of 16 rows, 16 outputs and one group; included by quantized.h. */
enum { RUN = SPAN, SLOTS = 4, AT_ONCE = 8 };

/* What all rows share of a run of groups: codes as signed bytes about their middle or zero point (those with lows as they are),
 * each group a tile, or two where halves have their own steps, each of them 0 where the other isn't. */
typedef struct {
    vq codes[2 * RUN][WORDS];
    vf steps[2 * RUN], lows[2 * RUN];
} Unpacked;

INLINE void unpack_run(const Span *s, int64_t count, const int bits, const int scales, const int has_low, Unpacked *to) {
    const int halves = scales == BY_16 ? 2 : 1;
    prefetch_scales(s);
    for (int64_t g = 0; g < count; g++) {
        const uint8_t *from = s->codes + g * 64 * lines_of(bits);
        const vq middle = (vq)(middles_of(s, g, 0, bits, scales) * 0x01010101);
        UNROLL for (int j = 0; j < lines_of(bits); j++) __builtin_prefetch(from + 64 * j + AHEAD);
        UNROLL for (int j = 0; j < WORDS; j++) {
            const vq word = word_of(from, bits, j, 0) - (has_low ? (vq){0} : middle);
            UNROLL for (int h = 0; h < halves; h++)
                to->codes[halves * g + h][j] = halves == 1 || j / (WORDS / 2) == h ? word : (vq){0};
        }
        UNROLL for (int h = 0; h < halves; h++) {
            to->steps[halves * g + h] = scales_of(s, g, h, 0, scales, 0);
            if (has_low) to->lows[halves * g + h] = scales_of(s, g, h, 0, scales, 1);
        }
    }
}

/* A run's products of 16 rows x, whose first column is the run's. Four are under way, and each is stored four later. */
INLINE void multiply_run(const Unpacked *run, int64_t products, const int halves, const int8_t *x, int64_t apart,
                         int32_t made[][TILE][WIDE]) {
#define MULTIPLY(n, slot, of_rows, of_codes)                                                  \
    {                                                                                         \
        if ((n) >= SLOTS && (n) < products + SLOTS) _tile_stored(slot, made[(n) - SLOTS], 64); \
        if ((n) < products) {                                                                 \
            _tile_zero(slot);                                                                 \
            _tile_loadd(of_rows, x + (n) / halves * GROUP, apart);                            \
            _tile_loadd(of_codes, run->codes[n], 64);                                         \
            _tile_dpbssd(slot, of_rows, of_codes);                                            \
        }                                                                                     \
    }
    for (int64_t n = 0; n < products + SLOTS; n += SLOTS) {
        MULTIPLY(n, 0, 4, 6)
        MULTIPLY(n + 1, 1, 5, 7)
        MULTIPLY(n + 2, 2, 4, 6)
        MULTIPLY(n + 3, 3, 5, 7)
    }
#undef MULTIPLY
}

/* Adds a run's products of AT_ONCE rows, of which x is the first, to their sums, or begins these. */
INLINE void add_run(const Unpacked *run, int64_t count, const int halves, const int has_low, const int begins, const Coded *x,
                    const int32_t (*made)[TILE][WIDE], float *sums, int64_t stride) {
    vf total[AT_ONCE];
    UNROLL for (int r = 0; r < AT_ONCE; r++) total[r] = begins ? all(0) : load(sums + r * stride);
    for (int64_t g = 0; g < count; g++)
        UNROLL for (int r = 0; r < AT_ONCE; r++) {
            vi dots[2];
            UNROLL for (int h = 0; h < halves; h++) dots[h] = *(const vi_at *)made[halves * g + h][r];
            total[r] = add_group(total[r], dots, run->steps + halves * g, run->lows + halves * g, halves, has_low,
                                 x->scales[g * TILE + r], x->totals[g * TILE + r], x->sums + 2 * g * TILE + r);
        }
    UNROLL for (int r = 0; r < AT_ONCE; r++) save(sums + r * stride, total[r]);
}

/* Sums of an output tile for `rows` rows, 16 at a time; of those behind the last one anything may be summed up.
 *
 * A run of groups is unpacked, then multiplied, then added up: what was just written is slow to load as a tile, and behind
 * an instruction on tiles the processor has half its throughput of fp32 for some 85 ns (Sapphire Rapids, measured), so that
 * taking turns group by group is a quarter slower. Runs of 16 groups are slower too: their products don't stay in L1. */
INLINE void by_tiles(const Matrix *m, int64_t tile, const Coded *all_rows, int64_t rows, const int bits, const int scales,
                     const int has_low, float *sums, int64_t stride) {
    const int halves = scales == BY_16 ? 2 : 1;
    const int64_t groups = m->width / GROUP;
    int32_t made[2 * RUN][TILE][WIDE] __attribute__((aligned(64)));
    Unpacked run;
    for (int64_t start = 0; start < groups; start += RUN) {
        const int64_t count = groups - start < RUN ? groups - start : RUN;
        const Span s = span_of(m, tile, start, bits, scales, has_low);
        unpack_run(&s, count, bits, scales, has_low, &run);
        for (int64_t first = 0; first < rows; first += TILE) {
            const Coded x = from_group(all_rows, first, start, m->width);
            multiply_run(&run, count * halves, halves, x.codes, m->width, made);
            for (int64_t row = 0; row < TILE && first + row < rows; row += AT_ONCE) {
                const Coded some = {0, x.scales + row, x.totals + row, x.sums + row};
                add_run(&run, count, halves, has_low, !start, &some, (const void *)made[0][row], sums + (first + row) * stride,
                        stride);
            }
        }
    }
}
