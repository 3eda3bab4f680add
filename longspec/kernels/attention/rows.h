/* Rows that stand apart, put behind each other: from memory, or from a file. */
#ifndef ROWS_H
#define ROWS_H

#include <stdint.h>
#include <string.h>
#include <unistd.h>

void rows_copy(const int64_t *at, int64_t count, int64_t bytes, char *to) {
    for (int64_t i = 0; i < count; i++) {
        if (i + 4 < count) __builtin_prefetch((const char *)(intptr_t)at[i + 4]);
        memcpy(to + i * bytes, (const char *)(intptr_t)at[i], (size_t)bytes);
    }
}

/* From these bytes of a file; rows that stand behind each other by one call. Gives the number of rows before one that
 * can't be read. */
int64_t rows_read(int32_t file, const int64_t *at, int64_t count, int64_t bytes, char *to) {
    for (int64_t i = 0, end; i < count; i = end) {
        for (end = i + 1; end < count && at[end] == at[end - 1] + bytes; end++) continue;
        if (pread(file, to + i * bytes, (size_t)((end - i) * bytes), at[i]) != (end - i) * bytes) return i;
    }
    return count;
}

#endif
