/* clock.h - the time that timeouts are counted in. */
#ifndef DUALBLADE_CLOCK_H
#define DUALBLADE_CLOCK_H

#include <stdint.h>
#include <time.h>

/* Nanoseconds of CLOCK_MONOTONIC. */
static inline int64_t db_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* timeout_ns from now as a time of CLOCK_MONOTONIC; never overflows. */
static inline int64_t db_deadline_ns(int64_t timeout_ns)
{
    int64_t now = db_now_ns();
    return timeout_ns < INT64_MAX - now ? now + timeout_ns : INT64_MAX;
}

#endif
