/* Coded products of 9 and more rows by tiles of 16 rows, 16 outputs and one group; included by quantized.h. */
enum { RUN = 9, SLOTS = 4, AT_ONCE = 4 };

/* Sums of an output tile for `rows` rows, 16 at a time; of those behind the last one anything may be summed up.
 *
 * A run of groups is unpacked, then multiplied, then added up: what was just written is slow to load as a tile, and behind
 * an instruction on tiles the processor has half its throughput of fp32 for some 85 ns (Sapphire Rapids, measured), so that
 * taking turns group by group is a quarter slower. Four products are under way, and a sum is stored four groups later. */
INLINE void by_tiles(const Matrix *m, int64_t tile, const Coded *all_rows, int64_t rows, const int bits, const int has_low,
                     float *sums, int64_t stride) {
    const int64_t groups = m->width / GROUP;
    const uint8_t *codes = (const uint8_t *)m->weight + tile * groups * 64 * bits;
    const fp16 *steps = m->scale + tile * groups * WIDE, *lows = m->low + tile * groups * WIDE;
    int32_t made[RUN][TILE][WIDE] __attribute__((aligned(64)));
    __m512i words[RUN][WORDS];
    for (int64_t start = 0; start < groups; start += RUN) {
        const int64_t count = groups - start < RUN ? groups - start : RUN;
        const uint8_t *from = bits == 8 ? codes + start * 512 : (const uint8_t *)words;
        if (bits == 4)
            for (int64_t g = 0; g < count; g++) unpack_words(codes + (start + g) * 256, 4, words[g]);
        else
            for (int64_t i = 0; i < count * 512; i += 64) _mm_prefetch((const char *)from + i + AHEAD, _MM_HINT_T0);
        for (int64_t first = 0; first < rows; first += TILE) {
            const Coded x = from_row(all_rows, first, m->width);
#define MULTIPLY(g, slot, of_rows, of_codes)                                             \
    {                                                                                    \
        if ((g) >= SLOTS && (g) < count + SLOTS) _tile_stored(slot, made[(g) - SLOTS], 64); \
        if ((g) < count) {                                                               \
            _tile_zero(slot);                                                            \
            _tile_loadd(of_rows, x.codes + (start + (g)) * GROUP, m->width);             \
            _tile_loadd(of_codes, from + (g) * 512, 64);                                 \
            _tile_dpbsud(slot, of_rows, of_codes);                                       \
        }                                                                                \
    }
            for (int64_t g = 0; g < count + SLOTS; g += SLOTS) {
                MULTIPLY(g, 0, 4, 6)
                MULTIPLY(g + 1, 1, 5, 7)
                MULTIPLY(g + 2, 2, 4, 6)
                MULTIPLY(g + 3, 3, 5, 7)
            }
#undef MULTIPLY
            const int64_t here = rows - first < TILE ? rows - first : TILE;
            for (int64_t row = 0; row < here; row += AT_ONCE) {
                float *to = sums + (first + row) * stride;
                vf total[AT_ONCE];
                for (int r = 0; r < AT_ONCE; r++) total[r] = start ? load(to + r * stride) : all(0);
                for (int64_t g = 0; g < count; g++) {
                    const vf step = load_fp16(steps + (start + g) * WIDE);
                    const vf low = has_low ? load_fp16(lows + (start + g) * WIDE) : step;
                    UNROLL for (int r = 0; r < AT_ONCE; r++) {
                        const int64_t at = (start + g) * TILE + row + r;
                        const vi sum = *(const vi_at *)made[g][row + r] + (has_low ? 0 : x.first[at]);
                        total[r] = add_group(total[r], sum, step, low, has_low, x.scales[at], x.totals[at]);
                    }
                }
                for (int r = 0; r < AT_ONCE; r++) save(to + r * stride, total[r]);
            }
        }
    }
}
