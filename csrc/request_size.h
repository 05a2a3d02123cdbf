/* request_size.h - how long the requests are that a large transfer is split into: measured.
 *
 * Long requests cost less per byte; short ones keep more of a drive's channels busy and overlap
 * better with what is done to the bytes. What a device likes is found out while large transfers
 * run: two lengths take turns, each for a window of bytes, several times over. Where the shorter
 * one moves more, by the median, it is compared with the next shorter one; else the longer one
 * stays. Only time in which something was in flight counts, and a window begins anew whenever
 * anything but requests of its own moved. After many bytes it is tried again: a drive that fills
 * up, or has a new neighbour, changes. */
#ifndef DUALBLADE_REQUEST_SIZE_H
#define DUALBLADE_REQUEST_SIZE_H

#include <stdbool.h>
#include <stdint.h>

enum {
    DB_REQUEST_SIZES = 3,
    DB_REQUEST_MOST_BYTES = 4 << 20, /* a transfer of this much is large */
    DB_REQUEST_DEFAULT_BYTES = 1 << 20,
    DB_REQUEST_LEAST_BYTES = 256 << 10,
    DB_REQUEST_WINDOW_BYTES = 32 << 20,
    DB_REQUEST_TRIALS = 3, /* of each of the two sizes that take turns */
};
/* Moved at the size chosen before the sizes are tried again. */
#define DB_REQUEST_TRUST_BYTES (32ull << 30)

struct db_request_size {
    uint32_t now_bytes; /* the length of requests from now on */
    uint32_t tag;       /* of these requests: changes with the length, and is never 0 */
    bool is_fixed;
    uint32_t sizes[DB_REQUEST_SIZES]; /* the longest first */
    uint32_t shorter;     /* sizes[shorter] and the one before it take turns */
    uint32_t windows;     /* so many of theirs were measured */
    uint64_t moved_bytes; /* since the choice; while it is trusted */
    bool is_trusted;
    double rates[2][DB_REQUEST_TRIALS]; /* of the longer and the shorter, bytes per nanosecond */
    /* the window */
    uint64_t window_bytes;
    int64_t window_ns;
    int64_t busy_since_ns; /* 0: nothing large is in flight */
};

/* fixed_bytes: 0 to measure; sizes are multiples of chunk_bytes, a power of two. */
void db_request_size_open(struct db_request_size *size, uint32_t fixed_bytes,
                          uint32_t chunk_bytes);
/* A part of a large transfer is on its way: the time counts from here on, if it did not yet. */
void db_request_size_started(struct db_request_size *size, int64_t now_ns);
/* Bytes of large transfers have moved, by requests with the tag of now, and nothing else has.
 * is_idle: nothing is in flight any more. */
void db_request_size_moved(struct db_request_size *size, uint64_t bytes, int64_t now_ns,
                           bool is_idle);
/* Something else moved: this window says nothing. */
void db_request_size_disturbed(struct db_request_size *size, int64_t now_ns, bool is_idle);

static inline bool db_request_size_is_waiting(const struct db_request_size *size)
{
    return !size->is_fixed && size->busy_since_ns == 0;
}

#endif
