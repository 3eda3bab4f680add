/* Words of a group's codes from its planes (formats.h), in vector extensions: 4 columns of the outputs of a piece.
 *
 * Of the target's header come `look_up`, the table's value of each byte, and `is_centred`: whether its products want
 * codes less their middle, as signed bytes.
 */
typedef uint8_t vq __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t vw __attribute__((vector_size(VECTOR_BYTES)));
typedef uint8_t vq_at __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));

INLINE vq look_up(const int8_t table[16], vq places);
INLINE int is_centred(int bits);

/* The bits `mask` of each byte, after a shift to the left, or to the right. */
INLINE vq shifted(vq x, const int left, const int mask) {
    const vw wide = left >= 0 ? (vw)x << (left & 15) : (vw)x >> (-left & 15);
    return (vq)wide & (vq)((vq){0} + (uint8_t)mask);
}

INLINE vq word_of(const uint8_t *group, const int bits, const int j, const int p) {
    const uint8_t *from = group + p * VECTOR_BYTES;
    if (bits == 8) {
        const vq codes = *(const vq_at *)(from + 64 * j);
        return is_centred(8) ? codes ^ 128 : codes;
    }
    const int after_four = has_four(bits) ? 256 : 0, after_two = after_four + (has_two(bits) ? 128 : 0);
    vq codes = {0};
    if (has_four(bits)) codes = shifted(*(const vq_at *)(from + 64 * (j % 4)), j < 4 ? 0 : -4, 15);
    if (bits > 8) {
        codes = look_up(TABLES[bits == FP4], codes);
        return is_centred(bits) ? codes : codes ^ 128;
    }
    if (has_two(bits)) {
        const int to = has_four(bits) ? 4 : 0;
        codes |= shifted(*(const vq_at *)(from + after_four + 64 * (j % 2)), to - j / 2 * 2, 3 << to);
    }
    if (has_one(bits)) codes |= shifted(*(const vq_at *)(from + after_two), bits - 1 - j, 1 << (bits - 1));
    return codes;
}
