/* check.h - what the C tests share: checks that stop at the first failure, and seeded numbers.
 *
 * Checks are made in release builds too, and may be made from any thread. */
#ifndef DUALBLADE_CHECK_H
#define DUALBLADE_CHECK_H

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static _Atomic unsigned long checks_made;

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        atomic_fetch_add_explicit(&checks_made, 1, memory_order_relaxed);                      \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);            \
            exit(1);                                                                           \
        }                                                                                      \
    } while (0)

/* Of integers; both values are printed. */
#define CHECK_EQUAL(actual, expected)                                                          \
    do {                                                                                       \
        long long actual_ = (long long)(actual), expected_ = (long long)(expected);            \
        atomic_fetch_add_explicit(&checks_made, 1, memory_order_relaxed);                      \
        if (actual_ != expected_) {                                                            \
            fprintf(stderr, "%s:%d: failed: %s is %lld (0x%llx), not %lld (0x%llx)\n",         \
                    __FILE__, __LINE__, #actual, actual_, (unsigned long long)actual_,         \
                    expected_, (unsigned long long)expected_);                                 \
            exit(1);                                                                           \
        }                                                                                      \
    } while (0)

static inline int check_report(const char *test)
{
    printf("%s: %lu checks passed\n", test, atomic_load(&checks_made));
    return 0;
}

/* A new seed each run, or that of the environment's SEED. Printed at once: an assert may follow. */
static inline uint64_t check_seed(const char *test)
{
    const char *given = getenv("SEED");
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t seed = given != NULL ? strtoull(given, NULL, 0)
                                  : (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    printf("%s: SEED=%llu\n", test, (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

/* splitmix64: any seed will do, 0 too. */
static inline uint64_t check_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* In [0, limit). */
static inline uint64_t check_random_below(uint64_t *state, uint64_t limit)
{
    return check_random(state) % limit;
}

#endif
