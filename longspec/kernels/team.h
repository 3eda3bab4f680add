/* A team of threads that share loops: each takes the next few indices, and waits for the others behind a loop.
 *
 * Who waits spins for some microseconds and then sleeps, and a loop's indices go to whoever is there: a thread whose core
 * was taken away by another process holds up the others by what it has in hand, and by no more. (Beside two
 * other processes on two cores, OpenMP's two threads wrote 27 tokens a second of the default model, these 48, and one 52.)
 *
 * A team is one process's, made by `team` of team.c, and handed to the other libraries. While one thread leads it, another
 * that asks for it works alone.
 */
#ifndef TEAM_H
#define TEAM_H

#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#if defined(__linux__)
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef _Atomic uint32_t Word;

typedef struct Team {
    _Atomic int64_t next;                    /* index of the loop that is under way */
    Word arrived, phase;                     /* of the meeting */
    Word job;                                /* number, and in its lower 8 bits the threads that it is for */
    Word sleeping, led;
    uint32_t threads;                        /* of the job, the leader among them */
    void (*work)(void *args, struct Team *, int64_t rank); /* of each of them; the leader's rank is 0 */
    void *args;
} Team;

enum { SPINS = 1000 }; /* some 50 microseconds (Ice Lake, 140 cycles each) */

static inline void breathe(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Until the word isn't `seen` any more. */
static inline void wait_for(Team *t, Word *word, uint32_t seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != seen) return;
        breathe();
    }
    while (atomic_load(word) == seen) {
#if defined(__linux__)
        atomic_fetch_add(&t->sleeping, 1);
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, 0, 0, 0);
        atomic_fetch_sub(&t->sleeping, 1);
#else
        (void)t;
        const struct timespec moment = {0, 50000};
        nanosleep(&moment, 0);
#endif
    }
}

/* Another value of a word, for all that wait for it. */
static inline void change(Team *t, Word *word, uint32_t value) {
    atomic_store(word, value);
#if defined(__linux__)
    if (atomic_load(&t->sleeping)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
#endif
}

/* Behind a shared loop: until all have come. */
static inline void meet(Team *t) {
    if (t->threads == 1) {
        atomic_store_explicit(&t->next, 0, memory_order_relaxed);
        return;
    }
    const uint32_t phase = atomic_load(&t->phase), all = t->threads; /* of this job: it may end once the last has come */
    if (atomic_fetch_add(&t->arrived, 1) + 1 < all) {
        wait_for(t, &t->phase, phase);
        return;
    }
    atomic_store(&t->arrived, 0);
    atomic_store(&t->next, 0);
    change(t, &t->phase, phase + 1);
}

static inline int64_t taken(Team *t, int64_t count) {
    if (t->threads > 1) return atomic_fetch_add_explicit(&t->next, count, memory_order_relaxed);
    const int64_t at = atomic_load_explicit(&t->next, memory_order_relaxed);
    atomic_store_explicit(&t->next, at + count, memory_order_relaxed);
    return at;
}

/* Indices at once: a sixteenth of a thread's share. */
static inline int64_t share_of(const Team *t, int64_t count) {
    const int64_t share = count / (16 * (int64_t)t->threads);
    return share > 1 ? share : 1;
}

/* A loop over 0 .. count that the team's threads share; `meet` stands behind it. */
#define SHARED(t, i, count)                                                                             \
    for (int64_t i##_count = (count), i##_share = share_of(t, i##_count), i##_at;                       \
         (i##_at = taken(t, i##_share)) < i##_count;)                                                   \
        for (int64_t i = i##_at; i < i##_at + i##_share && i < i##_count; i++)

/* The work by so many threads of the team, the calling one among them; by it alone where another leads them. */
static inline void lead(Team *t, int64_t threads, void (*work)(void *, Team *, int64_t), void *args) {
    uint32_t nobody = 0;
    if (threads < 2 || !t || !atomic_compare_exchange_strong(&t->led, &nobody, 1)) {
        Team alone = {.threads = 1};
        work(args, &alone, 0);
        return;
    }
    t->threads = (uint32_t)threads, t->work = work, t->args = args;
    atomic_store(&t->next, 0);
    change(t, &t->job, ((atomic_load(&t->job) >> 8) + 1) << 8 | (uint32_t)threads);
    work(args, t, 0);
    meet(t);
    atomic_store(&t->led, 0);
}

#endif
