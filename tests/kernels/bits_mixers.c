/* What mixers.c gives for fixed numbers, as a hash of its bits: chains and trees, a block's state, gates and convolutions. */
#include <stdio.h>
#include <stdlib.h>

#include "mixers.c"

enum { KEY_HEADS = 2, HEADS = 4, KEY_DIM = 32, VALUE_DIM = 48, INPUTS = 4, ALL = 70, WIDTH = 272 };
enum { CHANNELS = 2 * KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM };

static uint64_t state = 88172645463325252ull, hash = 1469598103934665603ull;

static uint32_t drawn(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32);
}
static float number(void) { return ((float)(drawn() % 20001) - 10000.0f) / 10000.0f; }
static void floats(float *to, int64_t count, float size) {
    for (int64_t i = 0; i < count; i++) to[i] = number() * size;
}
static void briefs(bf16 *to, int64_t count, float size) {
    for (int64_t i = 0; i < count; i++) {
        bf16 value[LANES];
        save_bf16(value, all(number() * size));
        to[i] = value[0];
    }
}
static void add(const void *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) hash = (hash ^ ((const uint8_t *)bytes)[i]) * 1099511628211ull;
}

static bf16 tail[(INPUTS - 1) * CHANNELS], x[ALL * CHANNELS], alpha[ALL * 50], gate[ALL * HEADS * VALUE_DIM], y[ALL * CHANNELS];
static float weight[INPUTS * CHANNELS], bias[CHANNELS], decay[HEADS], queries[ALL * HEADS * KEY_DIM];
static float k[ALL * KEY_HEADS * KEY_DIM], u[ALL * HEADS * VALUE_DIM], values[ALL * HEADS * VALUE_DIM], found[ALL * HEADS * VALUE_DIM];
static float decays[ALL * HEADS], strengths[ALL * HEADS], before[HEADS * KEY_DIM * VALUE_DIM], after[HEADS * KEY_DIM * VALUE_DIM];
static double sums[ALL * HEADS];
static const int64_t key_of[HEADS] = {0, 1, 0, 1};

static int64_t window[ALL * INPUTS], places[ALL], parents[ALL], fresh[ALL];

/* A history of `known` positions and `count` new ones, of a chain or of a tree, into the four above. */
static void lay_out(int64_t known, int64_t count, int is_tree) {
    for (int64_t i = 0; i < known + count; i++) {
        places[i] = i;
        parents[i] = is_tree && i >= known ? (int64_t)(drawn() % (uint32_t)(i + 1)) - 1 : i - 1;
    }
    for (int64_t row = 0; row < count; row++) {
        int64_t at = known + row;
        fresh[row] = row;
        for (int64_t i = INPUTS - 1, left = INPUTS - 1; i >= 0; i--) {
            window[row * INPUTS + i] = at >= 0 ? INPUTS - 1 + at : --left;
            at = at >= 0 ? parents[at] : -1;
        }
    }
}

/* Rows `known` .. `known + count` of a history, of a chain or of a tree. */
static void rows(int64_t known, int64_t count, int is_tree) {
    lay_out(known, count, is_tree);
    const Convolution of = {tail, x, is_tree ? window : 0, weight, 0, count, known + count, INPUTS, CHANNELS};
    Ingredients brought = {of, alpha, alpha + HEADS, decay, bias, queries, k, values, decays, strengths,
                           50, 50, HEADS, KEY_HEADS, KEY_DIM, VALUE_DIM, 0.17677669f};
    ingredients(&brought, 0, 1);
    Delta d = {before, k, u, sums, queries, values, decays, strengths, found, places, parents, fresh, key_of,
               known, count, HEADS, KEY_HEADS, KEY_DIM, VALUE_DIM};
    delta(&d, 0, 1);
    Opened opened = {found, bias, gate, y, HEADS * VALUE_DIM, count, HEADS, VALUE_DIM, 1e-6f};
    gated_norm(&opened, 0, 1);
    add(k, sizeof k), add(u, sizeof u), add(sums, sizeof sums);
    add(y, (size_t)(count * HEADS * VALUE_DIM) * sizeof *y);
}

/* The same of grouped linear attention, whose heads of keys are a half of its heads. */
static void group(int64_t known, int64_t count, int is_tree) {
    enum { DIM = 32, OWN = KEY_HEADS * DIM, ROW = (HEADS + 2 * KEY_HEADS) * DIM };
    lay_out(known, count, is_tree);
    const Convolution of = {tail, x + 64, is_tree ? window : 0, weight, 0, count, known + count, INPUTS, OWN};
    Grouped g = {of, x, queries, k, u, before, y, places, parents, fresh, ROW, known, count, HEADS, KEY_HEADS, DIM};
    grouped_units(&g, 0, 1);
    grouped(&g, 0, 1);
    add(k, sizeof k), add(y, (size_t)(count * HEADS * DIM) * sizeof *y);
}

int main(void) {
    floats(weight, INPUTS * CHANNELS, 0.6f), floats(bias, CHANNELS, 1), floats(before, HEADS * KEY_DIM * VALUE_DIM, 0.3f);
    for (int64_t head = 0; head < HEADS; head++) decay[head] = -0.01f - 0.2f * (float)head;
    briefs(tail, sizeof tail / 2, 1), briefs(x, sizeof x / 2, 1), briefs(alpha, sizeof alpha / 2, 9);
    briefs(gate, sizeof gate / 2, 3);
    rows(0, 7, 0);
    rows(7, 1, 0);
    rows(8, 30, 1);
    rows(3, 61, 0);
    Fold f = {before, k, u, sums, after, key_of, HEADS, KEY_HEADS, KEY_DIM, VALUE_DIM};
    fold(&f, 0, 1);
    add(after, sizeof after);
    for (int64_t count = 1; count <= 9; count += 4) {
        const Convolution of = {tail, x, 0, weight, count > 1 ? bias : 0, count, ALL, 3, WIDTH};
        Short conv = {of, gate, y, WIDTH};
        short_conv(&conv, 0, 1);
        add(y, (size_t)(count * WIDTH) * sizeof *y);
    }
    group(0, 9, 0);
    group(9, 20, 1);
    group(29, 35, 0);
    printf("%016llx\n", (unsigned long long)hash);
    return 0;
}
