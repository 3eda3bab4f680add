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

static void products(int64_t size, int64_t width, int64_t bits, int has_low) {
    uint8_t *weight = calloc(1, (size_t)(size * width * 2 + 65536));
    fp16 *step = malloc((size_t)(size * width)), *low = malloc((size_t)(size * width));
    bf16 *bias = malloc((size_t)(2 * size)), *x = malloc((size_t)(130 * width * 2));
    float *norm = malloc((size_t)(4 * width)), *y = malloc((size_t)(130 * size * 4));
    for (int64_t i = 0; i < size * width; i++)
        if (bits == 16)
            ((bf16 *)weight)[i] = brief(number());
        else
            weight[i] = (uint8_t)drawn();
    for (int64_t i = 0; i < size * width / 32; i++) step[i] = drawn() % 0x3c00, low[i] = 0x8000 | drawn() % 0x3c00;
    for (int64_t i = 0; i < size; i++) bias[i] = brief(number());
    for (int64_t i = 0; i < 130 * width; i++) x[i] = brief(number() * (i % 7 ? 1 : 40));
    for (int64_t i = 0; i < width; i++) norm[i] = number();
    const Matrix m = {weight, step, has_low ? low : 0, bias, size, width, bits == 16 ? BF16 : CODES, bits};
    char *workspace = malloc((size_t)layer_workspace(0, width));
    for (int64_t rows = 1; rows <= 130; rows += rows < 20 ? 3 : 37) {
        linear(&m, rows % 2 ? norm : 0, 1e-5f, x, rows, 0, y, workspace);
        add(y, (size_t)(rows * size * 4));
    }
    free(weight), free(step), free(low), free(bias), free(x), free(norm), free(y), free(workspace);
}

int main(void) {
    const int64_t widths[] = {32, 96, 576, 640};
    for (int i = 0; i < 4; i++) {
        products(96, widths[i], 16, 0);
        for (int64_t bits = 4; bits <= 8; bits += 4)
            for (int low = 0; low < 2; low++) products(96, widths[i], bits, low);
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
