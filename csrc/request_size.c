/* request_size.c - how long the requests are that a large transfer is split into: measured. */
#include "request_size.h"

#include <assert.h>
#include <stdlib.h>

/* A rate this close to the best is as good: what differs by less is noise. */
static const double AS_GOOD = 0.97;

static void use(struct db_request_size *size, uint32_t now_bytes)
{
    size->now_bytes = now_bytes;
    if (++size->tag == 0)
        size->tag = 1;
}

void db_request_size_open(struct db_request_size *size, uint32_t fixed_bytes,
                          uint32_t chunk_bytes)
{
    static const uint32_t wanted[DB_REQUEST_SIZES] = {
        DB_REQUEST_LEAST_BYTES, DB_REQUEST_DEFAULT_BYTES, DB_REQUEST_MOST_BYTES};
    *size = (struct db_request_size){.is_fixed = fixed_bytes > 0};
    for (int i = 0; i < DB_REQUEST_SIZES; i++)
        size->sizes[i] = wanted[i] > chunk_bytes ? wanted[i] : chunk_bytes;
    size->chosen_bytes = size->is_fixed ? fixed_bytes : size->sizes[1];
    use(size, size->chosen_bytes);
}

static int ascending(const void *a, const void *b)
{
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

static void choose(struct db_request_size *size)
{
    double medians[DB_REQUEST_SIZES], best = 0;
    for (int i = 0; i < DB_REQUEST_SIZES; i++) {
        qsort(size->rates[i], DB_REQUEST_TRIALS, sizeof(double), ascending);
        medians[i] = size->rates[i][DB_REQUEST_TRIALS / 2];
        best = medians[i] > best ? medians[i] : best;
    }
    for (int i = 0; i < DB_REQUEST_SIZES; i++)
        if (medians[i] >= AS_GOOD * best)
            size->chosen_bytes = size->sizes[i]; /* the longest of them comes last */
    size->is_trusted = true;
    size->moved_bytes = 0;
    size->windows = 0;
}

/* Even windows go at the size in use, odd ones to the sizes in turn, so that a drive that changes
 * meanwhile is unfair to none. */
static void end_window(struct db_request_size *size)
{
    uint32_t trial = size->windows / 2;
    if (size->windows % 2 == 1)
        size->rates[trial % DB_REQUEST_SIZES][trial / DB_REQUEST_SIZES] =
            (double)size->window_bytes / (double)(size->window_ns > 0 ? size->window_ns : 1);
    size->windows++;
    if (size->windows == 2 * DB_REQUEST_SIZES * DB_REQUEST_TRIALS)
        choose(size);
    use(size, size->windows % 2 == 1 ? size->sizes[trial % DB_REQUEST_SIZES]
                                     : size->chosen_bytes);
}

static void begin_window(struct db_request_size *size, int64_t now_ns, bool is_idle)
{
    size->window_bytes = 0;
    size->window_ns = 0;
    size->busy_since_ns = is_idle ? 0 : now_ns;
}

void db_request_size_started(struct db_request_size *size, int64_t now_ns)
{
    if (db_request_size_is_waiting(size))
        size->busy_since_ns = now_ns;
}

void db_request_size_disturbed(struct db_request_size *size, int64_t now_ns, bool is_idle)
{
    if (size->busy_since_ns > 0)
        begin_window(size, now_ns, is_idle);
}

void db_request_size_moved(struct db_request_size *size, uint64_t bytes, int64_t now_ns,
                           bool is_idle)
{
    if (size->is_fixed)
        return;
    assert(size->busy_since_ns > 0);
    if (size->is_trusted) {
        size->moved_bytes += bytes;
        size->is_trusted = size->moved_bytes < DB_REQUEST_TRUST_BYTES;
        begin_window(size, now_ns, is_idle);
        return;
    }
    size->window_bytes += bytes;
    size->window_ns += now_ns - size->busy_since_ns;
    size->busy_since_ns = is_idle ? 0 : now_ns;
    if (size->window_bytes >= DB_REQUEST_WINDOW_BYTES) {
        end_window(size);
        begin_window(size, now_ns, is_idle);
    }
}
