/* Products of coded weights and coded rows, in groups of 32 columns.
 *
 * A weight is step * code + low, with step and low of its output and group: codes are 0..15 or 0..255, and where there
 * is no low, they are symmetric about 8 or 128. A row's group is int8 codes with a scale of their own. The sum over a
 * group is an exact integer; groups are added up in fp32, in their order. So a row's bits are the same by either way:
 *
 *     few rows     one word of four codes against 16 outputs (VNNI)
 *     more rows    16 rows against 16 outputs by tiles (AMX): a pass of the default model with 8 rows takes 5.5 ms, by
 *                  words 5.1; with 10 rows 6.2 and 6.5
 *
 * Weights lie in strips of 16 outputs. A strip has its groups behind each other: 8 words of four columns by 16 outputs;
 * of 4 bits, words 0..3 in the lower halves and words 4..7 in the upper. They are read once for 8 or 16 rows.
 */
enum { GROUP = 32, WORDS = 8, FEW = 8, BY_TILES = 9, RUN = 9, SLOTS = 4, AT_ONCE = 4 };
enum { AHEAD = 3072 }; /* bytes: 1 row of the default model takes 2.1 ms and not 2.5 with 1,024 */

/* Rows in codes: what stands behind each other in a call's room. Sixteen rows' values of a group stand side by side, so
 * that the products find them at fixed distances. */
typedef struct {
    int8_t *codes;  /* [rows, width] */
    float *scales;  /* [rows / 16, groups, 16] */
    float *totals;  /* likewise: sums of what the codes stand for, which the weights' lows multiply */
    int32_t *first; /* likewise: minus the middle times the codes' sum, where codes are symmetric */
} Coded;

static Coded coded_in(char *room, int64_t rows, int64_t width) {
    const int64_t count = (rows + ROWS - 1) / ROWS * ROWS * (width / GROUP);
    Coded c;
    c.codes = (int8_t *)room;
    c.scales = (float *)(room + rows * width);
    c.totals = c.scales + count;
    c.first = (int32_t *)(c.totals + count);
    return c;
}

static Coded from_row(const Coded *c, int64_t row, int64_t width) {
    const int64_t at = row / ROWS * ROWS * (width / GROUP) + row % ROWS;
    return (Coded){c->codes + row * width, c->scales + at, c->totals + at, c->first + at};
}

/* The greatest of 32 values without their signs. As numbers of 16 bits they have the same order. */
INLINE float greatest(__m512i values) {
    const __m512i plain = _mm512_and_si512(values, _mm512_set1_epi16(0x7fff));
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(plain), _mm512_extracti64x4_epi64(plain, 1));
    const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((0xffff ^ _mm_extract_epi16(least, 0)) << 16)));
}

/* Part `part` of rows x, whose width is a multiple of 32: a group of 16 rows. What stands side by side is written by one
 * thread: row by row two of them took each other's lines away, and 16 rows of the default model 1.5 ms and not 0.2. */
static void code(const bf16 *x, int64_t rows, int64_t width, int64_t bits, int64_t part, const Coded *all) {
    const int64_t groups = width / GROUP, first = part / groups * ROWS, g = part % groups, at = part * ROWS;
    const int64_t here = rows - first < ROWS ? rows - first : ROWS;
    float largest[ROWS] __attribute__((aligned(64))) = {0}, factors[ROWS] __attribute__((aligned(64)));
    int32_t sums[ROWS] __attribute__((aligned(64))) = {0};
    x += first * width + g * GROUP;
    for (int64_t row = 0; row < here; row++) largest[row] = greatest(_mm512_loadu_si512(x + row * width));
    const __m512 most = _mm512_load_ps(largest), scales = most / 127.0f;
    _mm512_store_ps(factors, _mm512_maskz_div_ps(_mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ),
                                                 _mm512_set1_ps(127.0f), most));
    for (int64_t row = 0; row < here; row++) {
        const __m512 factor = _mm512_set1_ps(factors[row]);
        const bf16 *from = x + row * width;
        const __m128i a = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(load(from) * factor));
        const __m128i b = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(load(from + LANES) * factor));
        int8_t *to = all->codes + (first + row) * width + g * GROUP;
        _mm_storeu_si128((void *)to, a);
        _mm_storeu_si128((void *)(to + LANES), b);
        const __m128i ones = _mm_set1_epi8(1), half = _mm_dpbusd_epi32(_mm_setzero_si128(), ones, a);
        const __m128i fours = _mm_dpbusd_epi32(half, ones, b);
        const __m128i twos = _mm_add_epi32(fours, _mm_shuffle_epi32(fours, 0x4e));
        sums[row] = _mm_cvtsi128_si32(_mm_add_epi32(twos, _mm_shuffle_epi32(twos, 0xb1)));
    }
    const __m512i sum = _mm512_load_si512(sums);
    _mm512_storeu_ps(all->scales + at, scales);
    _mm512_storeu_ps(all->totals + at, scales * _mm512_cvtepi32_ps(sum));
    _mm512_storeu_si512(all->first + at, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-(1 << (bits - 1)))));
}

/* How many parts `code` has. */
static int64_t coded_parts(int64_t rows, int64_t width) { return (rows + ROWS - 1) / ROWS * (width / GROUP); }

/* The 8 words of a group. */
INLINE void unpack(const uint8_t *from, const int bits, __m512i words[WORDS]) {
    const __m512i lower = _mm512_set1_epi8(15);
    for (int j = 0; j < WORDS * bits / 8; j++) {
        const __m512i packed = _mm512_loadu_si512(from + 64 * j);
        _mm_prefetch((const char *)from + 64 * j + AHEAD, _MM_HINT_T0);
        words[j] = bits == 8 ? packed : _mm512_and_si512(packed, lower);
        if (bits == 4) words[j + 4] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), lower);
    }
}

/* What a group adds to 16 outputs of a row. Both ways come here, and so to the same bits. */
INLINE __m512 added(__m512 sum, __m512i codes, __m512 step, __m512 low, const int has_low, const Coded *x, int64_t at) {
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes) * _mm512_set1_ps(x->scales[at]), step, sum);
    return has_low ? _mm512_fmadd_ps(_mm512_set1_ps(x->totals[at]), low, sum) : sum;
}

/* Sums of a strip's 16 outputs for `rows` rows, at most 8. */
INLINE void by_words(const Matrix *m, int64_t strip, const Coded *x, const int rows, const int bits, const int has_low,
                     float *sums, int64_t stride) {
    const int64_t groups = m->width / GROUP;
    const uint8_t *codes = (const uint8_t *)m->weight + strip * groups * 64 * bits;
    const uint16_t *steps = m->scale + strip * groups * LANES, *lows = m->low + strip * groups * LANES;
    __m512 made[FEW];
    for (int r = 0; r < rows; r++) made[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m512i words[WORDS];
        unpack(codes + g * 64 * bits, bits, words);
        const __m512 step = halves(steps + g * LANES), low = has_low ? halves(lows + g * LANES) : step;
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const int64_t at = g * ROWS + r;
            __m512i sum = _mm512_set1_epi32(has_low ? 0 : x->first[at]);
#pragma GCC unroll 8
            for (int j = 0; j < WORDS; j++) {
                int32_t word;
                memcpy(&word, x->codes + r * m->width + g * GROUP + 4 * j, 4);
                sum = _mm512_dpbusd_epi32(sum, words[j], _mm512_set1_epi32(word));
            }
            made[r] = added(made[r], sum, step, low, has_low, x, at);
        }
    }
    for (int r = 0; r < rows; r++) _mm512_storeu_ps(sums + r * stride, made[r]);
}

/* The tiles of a thread: rows in 4 and 5, codes in 6 and 7, sums in 0 to 3. Fewer than 16 rows are not computed as 16. */
static void configure_groups(int64_t rows) {
    Tiles tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.bytes[i] = i == 4 || i == 5 ? GROUP : 64;
        tiles.rows[i] = i >= 6 ? WORDS : rows < ROWS ? rows : ROWS;
    }
    take_tiles(&tiles);
}

/* The same for 16 rows at a time; of those behind the last one anything may be summed up.
 *
 * A run of groups is unpacked, then multiplied, then added up: what was just written is slow to load as a tile, and behind
 * an instruction on tiles the processor has half its throughput of fp32 for some 85 ns (Sapphire Rapids, measured), so that
 * taking turns group by group is a quarter slower. Four products are under way, and a sum is stored four groups later. */
INLINE void by_tiles(const Matrix *m, int64_t strip, const Coded *all, int64_t rows, const int bits, const int has_low,
                     float *sums, int64_t stride) {
    const int64_t groups = m->width / GROUP;
    const uint8_t *codes = (const uint8_t *)m->weight + strip * groups * 64 * bits;
    const uint16_t *steps = m->scale + strip * groups * LANES, *lows = m->low + strip * groups * LANES;
    int32_t made[RUN][ROWS][LANES] __attribute__((aligned(64)));
    __m512i words[RUN][WORDS];
    for (int64_t start = 0; start < groups; start += RUN) {
        const int64_t count = groups - start < RUN ? groups - start : RUN;
        const uint8_t *from = bits == 8 ? codes + start * 512 : (const uint8_t *)words;
        if (bits == 4)
            for (int64_t g = 0; g < count; g++) unpack(codes + (start + g) * 256, 4, words[g]);
        else
            for (int64_t i = 0; i < count * 512; i += 64) _mm_prefetch((const char *)from + i + AHEAD, _MM_HINT_T0);
        for (int64_t first = 0; first < rows; first += ROWS) {
            const Coded x = from_row(all, first, m->width);
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
            const int64_t here = rows - first < ROWS ? rows - first : ROWS;
            for (int64_t row = 0; row < here; row += AT_ONCE) {
                float *to = sums + (first + row) * stride;
                __m512 total[AT_ONCE];
                for (int r = 0; r < AT_ONCE; r++)
                    total[r] = start ? _mm512_loadu_ps(to + r * stride) : _mm512_setzero_ps();
                for (int64_t g = 0; g < count; g++) {
                    const __m512 step = halves(steps + (start + g) * LANES);
                    const __m512 low = has_low ? halves(lows + (start + g) * LANES) : step;
#pragma GCC unroll 4
                    for (int r = 0; r < AT_ONCE; r++) {
                        const int64_t at = (start + g) * ROWS + row + r;
                        __m512i sum = _mm512_load_si512(made[g][row + r]);
                        if (!has_low) sum = _mm512_add_epi32(sum, _mm512_set1_epi32(x.first[at]));
                        total[r] = added(total[r], sum, step, low, has_low, &x, at);
                    }
                }
                for (int r = 0; r < AT_ONCE; r++) _mm512_storeu_ps(to + r * stride, total[r]);
            }
        }
    }
}

/* Sums [rows, 16] of a strip, in rows of `stride`; room for 16 rows more than there are, in x and in sums. */
static void strip_product(const Matrix *m, int64_t strip, const Coded *all, int64_t rows, float *sums, int64_t stride) {
#define BY_KIND(way, x, count, to)                                        \
    {                                                                     \
        if (m->bits == 4 && m->low)                                       \
            way(m, strip, x, count, 4, 1, to, stride);                    \
        else if (m->bits == 4)                                            \
            way(m, strip, x, count, 4, 0, to, stride);                    \
        else if (m->low)                                                  \
            way(m, strip, x, count, 8, 1, to, stride);                    \
        else                                                              \
            way(m, strip, x, count, 8, 0, to, stride);                    \
    }
    const int64_t few = rows % ROWS < BY_TILES ? rows % ROWS : 0, many = rows - few;
    if (many) BY_KIND(by_tiles, all, many, sums)
    for (int64_t row = many; row < rows; row += FEW) {
        const Coded x = from_row(all, row, m->width);
        float *to = sums + row * stride;
        switch (rows - row) {
            case 1: BY_KIND(by_words, &x, 1, to) break;
            case 2: BY_KIND(by_words, &x, 2, to) break;
            case 3: BY_KIND(by_words, &x, 3, to) break;
            case 4: BY_KIND(by_words, &x, 4, to) break;
            case 5: BY_KIND(by_words, &x, 5, to) break;
            case 6: BY_KIND(by_words, &x, 6, to) break;
            case 7: BY_KIND(by_words, &x, 7, to) break;
            default: BY_KIND(by_words, &x, 8, to)
        }
    }
#undef BY_KIND
}
