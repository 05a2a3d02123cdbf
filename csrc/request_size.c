/* request_size.c - how long the requests are that a large transfer is split into: measured. */
#include "request_size.h"

#include <assert.h>
#include <stdlib.h>

/* A rate this close to another is as good: what differs by less is noise. */
static const double AS_GOOD = 0.97;

static void use(struct db_request_size *size, uint32_t now_bytes)
{
    size->now_bytes = now_bytes;
    if (++size->tag == 0)
        size->tag = 1;
}

/* The shorter of the two has the first turn. */
static void take_turns(struct db_request_size *size, uint32_t shorter)
{
    size->shorter = shorter;
    size->windows = 0;
    size->is_trusted = false;
    use(size, size->sizes[shorter]);
}

void db_request_size_open(struct db_request_size *size, uint32_t fixed_bytes,
                          uint32_t chunk_bytes)
{
    static const uint32_t wanted[DB_REQUEST_SIZES] = {
        DB_REQUEST_MOST_BYTES, DB_REQUEST_DEFAULT_BYTES, DB_REQUEST_LEAST_BYTES};
    *size = (struct db_request_size){.is_fixed = fixed_bytes > 0};
    for (int i = 0; i < DB_REQUEST_SIZES; i++)
        size->sizes[i] = wanted[i] > chunk_bytes ? wanted[i] : chunk_bytes;
    if (size->is_fixed)
        use(size, fixed_bytes);
    else
        take_turns(size, 1);
}

static int ascending(const void *a, const void *b)
{
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

static double median(double *rates)
{
    qsort(rates, DB_REQUEST_TRIALS, sizeof(*rates), ascending);
    return rates[DB_REQUEST_TRIALS / 2];
}

static void end_window(struct db_request_size *size)
{
    bool was_shorter = size->windows % 2 == 0;
    size->rates[was_shorter][size->windows / 2] =
        (double)size->window_bytes / (double)(size->window_ns > 0 ? size->window_ns : 1);
    size->windows++;
    if (size->windows < 2 * DB_REQUEST_TRIALS) {
        use(size, size->sizes[was_shorter ? size->shorter - 1 : size->shorter]);
        return;
    }
    bool is_shorter_better = median(size->rates[0]) < AS_GOOD * median(size->rates[1]);
    if (is_shorter_better && size->shorter + 1 < DB_REQUEST_SIZES) {
        take_turns(size, size->shorter + 1);
        return;
    }
    use(size, size->sizes[is_shorter_better ? size->shorter : size->shorter - 1]);
    size->is_trusted = true;
    size->moved_bytes = 0;
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
        if (size->moved_bytes >= DB_REQUEST_TRUST_BYTES)
            take_turns(size, 1);
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
