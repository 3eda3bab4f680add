/* The process's team (team.h): its threads, which are started when they are first wanted, and end with the process. */
#include <pthread.h>
#include <signal.h>

#include "team.h"

enum { MOST_THREADS = 64 };

static Team team_of_all;
static uint32_t started = 1; /* the leader counts */
static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;

static void *follow(void *rank) {
    Team *t = &team_of_all;
    uint32_t seen = 0;
    sigset_t all_signals; /* are the process's other threads' */
    sigfillset(&all_signals);
    pthread_sigmask(SIG_SETMASK, &all_signals, 0);
    for (;;) {
        wait_for(t, &t->job, seen);
        seen = atomic_load(&t->job);
        if ((uintptr_t)rank >= (seen & 255)) continue;
        t->work(t->args, t, (int64_t)(uintptr_t)rank);
        meet(t);
    }
    return 0;
}

/* A child has one thread, whatever its parent had. */
static void begin_again(void) {
    team_of_all = (Team){0}, started = 1;
    starting = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER; /* another of the parent's threads may have held it */
}

/* The team, of at least so many threads if the system gives them; and how many it has. */
Team *team(int64_t threads, int64_t *has) {
    pthread_mutex_lock(&starting);
    static int watched;
    if (!watched) watched = !pthread_atfork(0, 0, begin_again);
    for (; started < threads && started < MOST_THREADS; started++) {
        pthread_t made;
        pthread_attr_t detached;
        pthread_attr_init(&detached);
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        const int refused = pthread_create(&made, &detached, follow, (void *)(uintptr_t)started);
        pthread_attr_destroy(&detached);
        if (refused) break;
    }
    *has = started < threads ? started : threads;
    pthread_mutex_unlock(&starting);
    return &team_of_all;
}
