/* Loops that a team shares, many times over: every index once, and nobody goes on before all have come. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "team.c"

enum { MOST = 1000, TURNS = 300 };

typedef struct {
    int64_t counts[MOST], size, wrong;
} Loops;

static void run(void *args, Team *t, int64_t rank) {
    Loops *l = args;
    (void)rank;
    for (int turn = 0; turn < 4; turn++) {
        SHARED(t, i, l->size) l->counts[i] += 1;
        meet(t);
        SHARED(t, i, l->size) if (l->counts[i] != turn + 1) l->wrong = 1; /* by another thread than before, often */
        meet(t);
    }
}

static void *other(void *args) {
    Loops *l = args;
    for (int turn = 0; turn < TURNS; turn++) {
        memset(l, 0, sizeof *l);
        l->size = 1 + turn * 37 % MOST;
        int64_t has;
        Team *t = team(1 + turn % 5, &has);
        lead(t, has, run, l);
        for (int64_t i = 0; i < MOST; i++)
            if (l->counts[i] != 4 * (i < l->size)) l->wrong = 1;
        if (l->wrong) exit(1);
    }
    return 0;
}

int main(void) {
    pthread_t second;
    static Loops mine, theirs;
    pthread_create(&second, 0, other, &theirs); /* who doesn't get the team works alone */
    other(&mine);
    pthread_join(second, 0);
    const pid_t child = fork();
    if (!child) {
        other(&mine);
        _exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    return status;
}
