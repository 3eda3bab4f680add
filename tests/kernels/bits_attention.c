/* What attention.c gives for fixed numbers, as a hash of its bits: dense and coded segments, chains and trees. */
#include <stdio.h>
#include <stdlib.h>

#include "attention.c"

enum { HEADS = 2, GROUPS = 3, DIM = 64, COLUMNS = 640, NODES = 20 };

static uint64_t state = 88172645463325252ull, hash = 1469598103934665603ull;

static uint32_t drawn(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32);
}
static void numbers(bf16 *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        bf16 value[LANES];
        save_bf16(value, all(((float)(drawn() % 20001) - 10000.0f) / 5000.0f));
        to[i] = value[0];
    }
}
static void add(const void *bytes, size_t count) {
    for (size_t i = 0; i < count; i++) hash = (hash ^ ((const uint8_t *)bytes)[i]) * 1099511628211ull;
}

static bf16 queries[130 * HEADS * GROUPS * DIM], keys[HEADS * COLUMNS * DIM], values[HEADS * COLUMNS * DIM];
static bf16 output[130 * HEADS * GROUPS * DIM];
static uint8_t codes[4][HEADS * COLUMNS * DIM];
static fp16 scales[4][HEADS * COLUMNS * DIM];

static void run(const Segment *segments, int64_t count, int64_t rows, float softcap) {
    const Reading r = {queries, HEADS * GROUPS * DIM, rows, HEADS, GROUPS, DIM, 0.125f, softcap, 0};
    char *workspace = malloc((size_t)attention_workspace(&r, segments, count, 1));
    float *kept = malloc((size_t)attention_state(&r));
    attention_read(&r, segments, count, 1, workspace, 1, kept, output, 0);
    add(output, (size_t)(rows * HEADS * GROUPS * DIM) * sizeof *output);
    free(workspace), free(kept);
}

static Segment dense(int64_t first, int64_t columns, int64_t start) {
    const Side sides[2] = {{.codes = (const char *)(keys + first * DIM), .head = COLUMNS * DIM * 2},
                           {.codes = (const char *)(values + first * DIM), .head = COLUMNS * DIM * 2}};
    return (Segment){.keys = sides[0], .values = sides[1], .kind = DENSE, .bits = 16, .columns = columns, .start = start};
}

static Side coded(int side, int64_t size, int64_t each, int kind) {
    return (Side){.codes = (const char *)codes[side], .lower = kind == DUAL ? (const char *)codes[side + 2] : 0,
                  .step = scales[side], .low = kind == SYMMETRIC ? 0 : scales[side + 2], .head = COLUMNS * size,
                  .lower_head = COLUMNS * size, .step_head = each, .low_head = each};
}

int main(void) {
    numbers(queries, sizeof queries / 2), numbers(keys, sizeof keys / 2), numbers(values, sizeof values / 2);
    for (int side = 0; side < 4; side++)
        for (int64_t i = 0; i < HEADS * COLUMNS * DIM; i++)
            codes[side][i] = (uint8_t)drawn(), scales[side][i] = drawn() % 0x2800 | (drawn() & 0x8000);
    int64_t first[130], last[130], parents[NODES];
    for (int64_t rows = 1; rows <= 130; rows += rows < 8 ? 2 : 41) {
        for (int64_t i = 0; i < rows; i++) first[i] = drawn() % 500, last[i] = 510 + i;
        Segment chain = dense(0, 640, 0);
        chain.first = first, chain.last = last;
        run(&chain, 1, rows, rows % 2 ? 5.0f : 0.0f);
        const Segment two[2] = {dense(0, 77, 0), dense(200, 300, 77)};
        run(two, 2, rows, 0);
    }
    for (int64_t i = 0; i < NODES; i++) parents[i] = (int64_t)(drawn() % (uint32_t)(i + 1)) - 1;
    for (int64_t rows = 1; rows <= NODES; rows += 6) {
        for (int64_t i = 0; i < rows; i++) first[i] = 0, last[i] = 525;
        Segment tree = dense(0, 525, 0);
        tree.first = first, tree.last = last, tree.parents = parents, tree.staged = NODES;
        run(&tree, 1, rows, 0);
    }
    const int kinds[][2] = {{SYMMETRIC, 8}, {ASYMMETRIC, 8}, {ASYMMETRIC, 4}, {ASYMMETRIC, 2}, {DUAL, 4}};
    for (int i = 0; i < 5; i++) {
        const int64_t size = DIM * kinds[i][1] / 8;
        Segment s = {.keys = coded(0, size, COLUMNS / BLOCK * DIM, kinds[i][0]), .values = coded(1, size, COLUMNS, kinds[i][0]),
                     .kind = kinds[i][0], .bits = kinds[i][1], .columns = COLUMNS};
        for (int64_t rows = 1; rows <= 40; rows += 13) run(&s, 1, rows, 0);
    }
    printf("%016llx\n", (unsigned long long)hash);
    return 0;
}
