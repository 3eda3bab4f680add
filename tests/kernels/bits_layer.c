/* What the products, norms, rotations and exponentials of layer.c give for fixed numbers, as a hash of their bits. */
#include <stdio.h>
#include <stdlib.h>

#include "layer.c"

static uint64_t state = 88172645463325252ull, hash = 1469598103934665603ull;

static uint32_t drawn(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32);
}
static float number(void) { return ((float)(drawn() % 20001) - 10000.0f) / 10000.0f; }
static bf16 brief(float x) {
    bf16 value[LANES];
    save_bf16(value, all(x));
    return value[0];
}
static void add(const void *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) hash = (hash ^ ((const uint8_t *)bytes)[i]) * 1099511628211ull;
}

/* 16 outputs of a format: random codes, and scales that are numbers. */
static void draw_tile(uint8_t *tile, int64_t width, int bits, int scales, int has_low) {
    for (int64_t first = 0; first < width; first += SHARED_BY) {
        const Offsets o = offsets_of((width - first < SHARED_BY ? width - first : SHARED_BY) / GROUP, bits, scales, has_low);
        for (int64_t i = 0; i < o.end; i++) tile[i] = (uint8_t)drawn();
        for (int64_t i = scales == PLAIN ? 0 : o.shared; i + 1 < o.codes; i += 2) {
            const fp16 value = (fp16)(drawn() & 0x8000) | drawn() % 0x3c00;
            memcpy(tile + i, &value, 2);
        }
        for (int64_t i = 0; has_zeros(scales) && i < o.lows; i += 4) {
            const float value = number() / 100;
            memcpy(tile + i, &value, 4);
        }
        for (int64_t i = o.lows; has_zeros(scales) && i < o.shared; i++) tile[i] %= 17;
        for (int64_t i = 0; scales == EXPONENT && i < o.lows; i++) tile[i] = 100 + drawn() % 40;
        tile += o.end;
    }
}

/* 16 outputs of FP8: any bytes, and scales that are numbers. */
static void draw_float8(uint8_t *tile, int64_t width) {
    for (int64_t k = 0; k < width; k += SCALED_BY) {
        const int64_t count = width - k < SCALED_BY ? width - k : SCALED_BY;
        for (int64_t i = 0; i < TILE * count; i++) *tile++ = (uint8_t)drawn();
        for (int i = 0; i < TILE; i++, tile += 4) {
            const float value = number() / 100;
            memcpy(tile, &value, 4);
        }
    }
}

static void products(int64_t size, int64_t width, int64_t format, int bits, int scales, int has_low) {
    const int64_t codes = coded_tile(width, bits, scales, has_low);
    const int64_t bytes = format == BF16 ? 32 * width : format == FORMAT_FP8 ? float8_tile(width) : codes;
    uint8_t *weight = calloc(1, (size_t)(size / TILE * bytes + 65536));
    bf16 *bias = malloc((size_t)(2 * size)), *x = malloc((size_t)(130 * width * 2));
    float *norm = malloc((size_t)(4 * width)), *y = malloc((size_t)(130 * size * 4));
    for (int64_t i = 0; format == BF16 && i < size * width; i++) ((bf16 *)weight)[i] = brief(number());
    for (int64_t i = 0; format == FORMAT_FP8 && i < size / TILE; i++) draw_float8(weight + i * bytes, width);
    for (int64_t i = 0; is_coded(format) && i < size / TILE; i++) draw_tile(weight + i * bytes, width, bits, scales, has_low);
    for (int64_t i = 0; i < size; i++) bias[i] = brief(number());
    for (int64_t i = 0; i < 130 * width; i++) x[i] = brief(number() * (i % 7 ? 1 : 40));
    for (int64_t i = 0; i < width; i++) norm[i] = number();
    const int64_t first = size / 3 / TILE * TILE; /* in two pieces, of one format */
    const Matrix rest = {weight + first / TILE * bytes, bias, size, width, format, size - first, 0};
    const Matrix m = {weight, bias, size, width, format, format == BF16 ? size : first, &rest};
    char *workspace = malloc((size_t)layer_workspace(0, width));
    for (int64_t rows = 1; rows <= 130; rows += rows < 20 ? 3 : 37) {
        linear(&m, rows % 2 ? norm : 0, 1e-5f, x, rows, 0, y, workspace, 0, 1);
        add(y, (size_t)(rows * size * 4));
    }
    free(weight), free(bias), free(x), free(norm), free(y), free(workspace);
}

int main(void) {
    const int64_t widths[] = {32, 96, 256, 576, 768};
    for (int i = 0; i < 5; i++) {
        products(96, widths[i], BF16, 0, 0, 0);
        products(96, widths[i], FORMAT_FP8, 0, 0, 0);
#define PRODUCTS(number, name, bits, scales, low) \
    if ((scales < BY_32 || widths[i] % SHARED_BY == 0) && widths[i] % (32 * groups_of(scales)) == 0) products(96, widths[i], number, bits, scales, low);
        FORMATS(PRODUCTS)
    }
    for (int i = 0; i < 1024; i += LANES) {
        float x[LANES];
        for (int j = 0; j < LANES; j++) x[j] = number() * 90;
        save(x, activated(load(x), GELU_TANH) + exponential(load(x)));
        add(x, sizeof x);
    }
    bf16 head[256], cos[128], sin[128];
    for (int i = 0; i < 256; i++) head[i] = brief(number());
    for (int i = 0; i < 128; i++) cos[i] = brief(number()), sin[i] = brief(number());
    for (int64_t dims = 4; dims <= 128; dims += 20) rotated(head, cos, sin, dims);
    add(head, sizeof head);
    printf("%016llx\n", (unsigned long long)hash);
    return 0;
}
