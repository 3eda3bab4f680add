/* Coded products of 9 and more rows by tiles of 16 rows, 16 outputs and one group; included by quantized.h. */
enum { RUN = 9, SLOTS = 4, AT_ONCE = 4 };

/* A group's codes as a tile wants them; with two halves as two tiles, each 0 where the other isn't. */
INLINE void unpack_group(const uint8_t *from, const int bits, const int halves, vq (*to)[WORDS]) {
    UNROLL for (int j = 0; j < lines_of(bits); j++) _mm_prefetch((const char *)from + 64 * j + AHEAD, _MM_HINT_T0);
    UNROLL for (int j = 0; j < WORDS; j++) {
        const vq word = word_of(from, bits, j, 0);
        UNROLL for (int h = 0; h < halves; h++) to[h][j] = halves == 1 || j / (WORDS / 2) == h ? word : (vq){0};
    }
}

/* Codes of the products of `count` groups from `start` on, each as a tile; those of 8 bits lie in memory as one. */
INLINE void codes_of(const Matrix *m, int64_t tile, int64_t start, int64_t count, const int bits, const int scales,
                     const int has_low, vq (*words)[WORDS], const uint8_t **to) {
    const int halves = scales == BY_16 ? 2 : 1;
    for (int64_t g = start; g < start + count; g++) {
        const Span s = span_of(m, tile, g / SPAN * SPAN, bits, scales, has_low);
        const uint8_t *codes = s.codes + g % SPAN * 64 * lines_of(bits);
        if (g % SPAN == 0) prefetch_scales(&s);
        if (bits != 8) unpack_group(codes, bits, halves, words);
        for (int j = 0; bits == 8 && j < WORDS; j++) _mm_prefetch((const char *)codes + 64 * j + AHEAD, _MM_HINT_T0);
        for (int h = 0; h < halves; h++, words++) *to++ = bits == 8 ? codes : (const uint8_t *)words;
    }
}

/* Sums of an output tile for `rows` rows, 16 at a time; of those behind the last one anything may be summed up.
 *
 * A run of groups is unpacked, then multiplied, then added up: what was just written is slow to load as a tile, and behind
 * an instruction on tiles the processor has half its throughput of fp32 for some 85 ns (Sapphire Rapids, measured), so that
 * taking turns group by group is a quarter slower. Four products are under way, and a sum is stored four later. */
INLINE void by_tiles(const Matrix *m, int64_t tile, const Coded *all_rows, int64_t rows, const int bits, const int scales,
                     const int has_low, float *sums, int64_t stride) {
    const int halves = scales == BY_16 ? 2 : 1;
    const int64_t groups = m->width / GROUP;
    int32_t made[2 * RUN][TILE][WIDE] __attribute__((aligned(64)));
    vq words[2 * RUN][WORDS];
    for (int64_t start = 0; start < groups; start += RUN) {
        const int64_t count = groups - start < RUN ? groups - start : RUN, products = count * halves;
        const uint8_t *from[2 * RUN]; /* of each product, its codes as a tile */
        codes_of(m, tile, start, count, bits, scales, has_low, words, from);
        for (int64_t first = 0; first < rows; first += TILE) {
            const Coded x = from_row(all_rows, first, m->width);
#define MULTIPLY(n, slot, of_rows, of_codes)                                                  \
    {                                                                                         \
        if ((n) >= SLOTS && (n) < products + SLOTS) _tile_stored(slot, made[(n) - SLOTS], 64); \
        if ((n) < products) {                                                                 \
            _tile_zero(slot);                                                                 \
            _tile_loadd(of_rows, x.codes + (start + (n) / halves) * GROUP, m->width);         \
            _tile_loadd(of_codes, from[n], 64);                                               \
            _tile_dpbsud(slot, of_rows, of_codes);                                            \
        }                                                                                     \
    }
            for (int64_t n = 0; n < products + SLOTS; n += SLOTS) {
                MULTIPLY(n, 0, 4, 6)
                MULTIPLY(n + 1, 1, 5, 7)
                MULTIPLY(n + 2, 2, 4, 6)
                MULTIPLY(n + 3, 3, 5, 7)
            }
#undef MULTIPLY
            const int64_t here = rows - first < TILE ? rows - first : TILE;
            for (int64_t row = 0; row < here; row += AT_ONCE) {
                float *to = sums + (first + row) * stride;
                vf total[AT_ONCE];
                for (int r = 0; r < AT_ONCE; r++) total[r] = start ? load(to + r * stride) : all(0);
                for (int64_t g = 0; g < count; g++) {
                    vf steps[2], lows[2];
                    const Span s = span_of(m, tile, (start + g) / SPAN * SPAN, bits, scales, has_low);
                    const int64_t i = (start + g) % SPAN;
                    const vi middles = has_low ? (vi){0} : middles_of(&s, i, 0, bits, scales);
                    UNROLL for (int h = 0; h < halves; h++) steps[h] = scales_of(&s, i, h, 0, scales, 0);
                    UNROLL for (int h = 0; h < halves; h++) lows[h] = scales_of(&s, i, h, 0, scales, has_low);
                    UNROLL for (int r = 0; r < AT_ONCE; r++) {
                        const int64_t at = (start + g) * TILE + row + r;
                        const int32_t *both = x.sums + 2 * (start + g) * TILE + row + r;
                        vi dots[2];
                        UNROLL for (int h = 0; h < halves; h++) {
                            const int32_t of_row = halves == 1 ? both[0] + both[TILE] : both[h * TILE];
                            dots[h] = *(const vi_at *)made[g * halves + h][row + r] - of_row * middles;
                        }
                        total[r] = add_group(total[r], dots, steps, lows, halves, has_low, x.scales[at], x.totals[at], both);
                    }
                }
                for (int r = 0; r < AT_ONCE; r++) save(to + r * stride, total[r]);
            }
        }
    }
}
