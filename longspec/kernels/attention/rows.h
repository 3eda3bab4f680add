/* Single rows of keys and values: from memory or a file to their places, and those that a pass reads from those that are
 * held. */
#ifndef ROWS_H
#define ROWS_H

#include <stdint.h>
#include <string.h>
#include <unistd.h>

void rows_copy(const int64_t *at, int64_t count, int64_t bytes, char *to, const int64_t *places) {
    for (int64_t i = 0; i < count; i++) {
        if (i + 4 < count) __builtin_prefetch((const char *)(intptr_t)at[i + 4]);
        memcpy(to + places[i] * bytes, (const char *)(intptr_t)at[i], (size_t)bytes);
    }
}

/* From these bytes of a file. Gives the number of rows before one that can't be read. */
int64_t rows_read(int32_t file, const int64_t *at, int64_t count, int64_t bytes, char *to, const int64_t *places) {
    for (int64_t i = 0, end; i < count; i = end) { /* those that stand behind each other, there and here, by one call */
        for (end = i + 1; end < count && at[end] == at[end - 1] + bytes && places[end] == places[end - 1] + 1; end++) continue;
        if (pread(file, to + places[i] * bytes, (size_t)((end - i) * bytes), at[i]) != (end - i) * bytes) return i;
    }
    return count;
}

/* The rows of a layer that a pass reads, and those that come next in its choice, by names: key head << 32 | position. */
typedef struct {
    const int32_t *chosen, *next;         /* [q, heads, count] and [q, heads, further] columns, -1 for none */
    int64_t rows, heads, count, further, room; /* room: of a position's next columns, those that are taken */
    int64_t columns, first, near, bytes;  /* the position of column 0; from `near` on rows are in a buffer, and nowhere else */
    const int64_t *held;                  /* names of rows that are there, rising; and of each its state, 0 if it isn't yet */
    const uint8_t *held_state;
    const char *held_rows, *keys, *values; /* of the buffer, [heads, .., dim], `head` bytes from a head to the next */
    int64_t held_count, head;
    int64_t *names;                       /* what is found: rising names, their states, rows, and how many chose them */
    uint8_t *state;
    char *to;
    int32_t *slots, *counts, *missing;    /* [q, heads, count]: the place of each chosen one; places to be read */
    uint64_t *marks;                      /* [2, columns / 64], and ranks as many */
    int32_t *ranks;
    /* Numbers: of names, of places to be read, of the store's rows that are chosen, of those of them that a thread had fetched
     * (state 2), of the buffer's rows. */
    int64_t found, missed, asked, ahead, close;
} Gathering;

/* A key head's names from *place on, in their order. */
static void gather_head(Gathering *g, int64_t head, const uint64_t *wanted, const uint64_t *all, int64_t *place) {
    const int64_t half = g->bytes / 2;
    for (int64_t word = 0; word < (g->columns + 63) / 64; word++) {
        g->ranks[word] = (int32_t)g->found;
        for (uint64_t bits = all[word]; bits; bits &= bits - 1, g->found++) {
            const int64_t bit = __builtin_ctzll(bits), position = g->first + 64 * word + bit, name = head << 32 | position;
            const int is_wanted = wanted[word] >> bit & 1;
            char *to = g->to + g->found * g->bytes;
            g->names[g->found] = name, g->counts[g->found] = 0, g->state[g->found] = 0;
            if (position >= g->near) {
                memcpy(to, g->keys + head * g->head + (position - g->near) * half, (size_t)half);
                memcpy(to + half, g->values + head * g->head + (position - g->near) * half, (size_t)half);
                g->close++;
                continue;
            }
            while (*place < g->held_count && g->held[*place] < name) ++*place;
            const int state = *place < g->held_count && g->held[*place] == name ? g->held_state[*place] : 0;
            if (state)
                memcpy(to, g->held_rows + *place * g->bytes, (size_t)g->bytes);
            else if (is_wanted)
                g->missing[g->missed++] = (int32_t)g->found;
            g->state[g->found] = state || is_wanted;
            g->asked += is_wanted, g->ahead += is_wanted && state == 2;
        }
    }
}

void rows_gather(Gathering *g) {
    const int64_t words = (g->columns + 63) / 64;
    uint64_t *wanted = g->marks, *all = g->marks + words;
    int64_t place = 0;
    g->found = g->missed = g->asked = g->ahead = g->close = 0;
    for (int64_t head = 0; head < g->heads; head++) {
        memset(wanted, 0, (size_t)words * 8);
        for (int64_t row = 0; row < g->rows; row++)
            for (int64_t i = 0; i < g->count; i++) {
                const int32_t column = g->chosen[(row * g->heads + head) * g->count + i];
                if (column >= 0) wanted[column / 64] |= 1ull << column % 64;
            }
        memcpy(all, wanted, (size_t)words * 8);
        for (int64_t row = 0; row < g->rows; row++)
            for (int64_t i = 0; i < g->room; i++) {
                const int32_t column = g->next[(row * g->heads + head) * g->further + i];
                if (column >= 0 && g->first + column < g->near) all[column / 64] |= 1ull << column % 64;
            }
        gather_head(g, head, wanted, all, &place);
        for (int64_t row = 0; row < g->rows; row++)
            for (int64_t i = 0; i < g->count; i++) {
                const int64_t at = (row * g->heads + head) * g->count + i, column = g->chosen[at];
                g->slots[at] = 0;
                if (column < 0) continue;
                const uint64_t below = all[column / 64] & ((1ull << column % 64) - 1);
                g->slots[at] = g->ranks[column / 64] + __builtin_popcountll(below);
                g->counts[g->slots[at]]++;
            }
    }
}

#endif
