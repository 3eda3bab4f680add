/* AMX's tiles in plain C, for the kernels' AMX forms on a processor that has AVX-512 and no AMX: included before them.
 *
 * A product in bf16 adds up in the order of Intel's manual (dot.h); denormals are kept here, and zero there.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps

static __thread struct {
    uint8_t rows, data[16][64];
    uint16_t bytes;
} tile_file[8];

static void _tile_loadconfig(const void *from) {
    for (int i = 0; i < 8; i++) {
        memcpy(&tile_file[i].bytes, (const char *)from + 16 + 2 * i, 2);
        tile_file[i].rows = ((const uint8_t *)from)[48 + i];
        memset(tile_file[i].data, 0, sizeof tile_file[i].data);
    }
}
static void _tile_release(void) {
    for (int i = 0; i < 8; i++) tile_file[i].rows = 0;
}
static void _tile_zero(int t) { memset(tile_file[t].data, 0, sizeof tile_file[t].data); }
static void _tile_loadd(int t, const void *from, int64_t stride) {
    _tile_zero(t);
    for (int i = 0; i < tile_file[t].rows; i++) memcpy(tile_file[t].data[i], (const char *)from + i * stride, tile_file[t].bytes);
}
static void _tile_stored(int t, void *to, int64_t stride) {
    for (int i = 0; i < tile_file[t].rows; i++) memcpy((char *)to + i * stride, tile_file[t].data[i], tile_file[t].bytes);
}
static void _tile_dpbssd(int to, int a, int b) {
    for (int m = 0; m < tile_file[to].rows; m++)
        for (int n = 0; n < tile_file[to].bytes / 4; n++) {
            int32_t sum;
            memcpy(&sum, tile_file[to].data[m] + 4 * n, 4);
            for (int k = 0; k < tile_file[a].bytes / 4; k++)
                for (int i = 0; i < 4; i++)
                    sum += (int8_t)tile_file[a].data[m][4 * k + i] * (int8_t)tile_file[b].data[k][4 * n + i];
            memcpy(tile_file[to].data[m] + 4 * n, &sum, 4);
        }
}
static float tile_bf16(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static void _tile_dpbf16ps(int to, int a, int b) {
    for (int m = 0; m < tile_file[to].rows; m++)
        for (int n = 0; n < tile_file[to].bytes / 4; n++) {
            float sum, parts[2] = {0, 0};
            memcpy(&sum, tile_file[to].data[m] + 4 * n, 4);
            for (int k = 0; k < tile_file[a].bytes / 4; k++)
                for (int i = 0; i < 2; i++)
                    parts[i] += tile_bf16(tile_file[a].data[m] + 4 * k + 2 * i) * tile_bf16(tile_file[b].data[k] + 4 * n + 2 * i);
            sum += parts[0] + parts[1];
            memcpy(tile_file[to].data[m] + 4 * n, &sum, 4);
        }
}
