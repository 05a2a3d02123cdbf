/* window.h - a member's pages in the page cache as memory, to copy from.
 *
 * A read(2) copies page by page in the kernel, into the processor's cache, and its bytes are then
 * read again for their checksum. From memory both are one pass (copy.h). What must not happen is a
 * page fault that cannot be served, which is SIGBUS: so a range is only copied while its pages are
 * *pinned*, by vmsplice(2) into a pipe, which takes references of them. What is pinned can't be
 * reclaimed, and has been read without an error. */
#ifndef DUALBLADE_WINDOW_H
#define DUALBLADE_WINDOW_H

#include "mapping.h"

#include <stdatomic.h>

enum { DB_PIN_BYTES = 256 << 10 }; /* at most at once */

struct db_window {
    const uint8_t *start; /* NULL: there is none, and nothing can be pinned */
    uint64_t length;
    int fd;
    const struct db_lock *lock;
    _Atomic uint64_t *units; /* a bit for each run of pages that may be mapped */
    _Atomic uint64_t *fills; /* a bit for each unit that a thread is filling */
    size_t bits_length;      /* of both */
    _Atomic uint64_t mapped_bytes;
    atomic_bool has_failed; /* something could not be filled */
};

/* The whole of a file, through the descriptor that the lock is of; map_fd is another of the file,
 * through which nobody reads. It has no window where the kernel gives none or does not say what is
 * resident. */
void db_window_open(int fd, int map_fd, uint64_t length, const struct db_lock *lock,
                    struct db_window *out);
void db_window_close(struct db_window *window);
/* In the child after a fork, where the memory is not. */
void db_window_abandon(struct db_window *window);
/* Lets go of a range, whose pages the kernel would not drop while they are mapped. */
void db_window_drop(struct db_window *window, uint64_t offset, uint64_t length);

/* Whether there is anything to copy from at this moment. */
static inline bool db_window_is_open(const struct db_window *window)
{
    return window->start && !db_lock_is_shared(window->lock);
}

/* Reads what is not in the page cache of a range, and of what lies around it in the run that all of
 * is being read: in the largest pieces of memory that the kernel has, which it maps, copies from
 * and reclaims at the cost of a page each. */
enum db_fill {
    DB_FILL_NONE, /* the run is too short, or the kernel does not do it */
    DB_FILL_BUSY, /* another thread is at it */
    DB_FILL_DONE,
};
enum db_fill db_window_fill(struct db_window *window, uint64_t offset, uint64_t length,
                            uint64_t run_start, uint64_t run_end);

/* After a read has failed: whether it may be worth another try, since what failed may have been
 * around it. That is forgotten, and not filled again before it is dropped. */
bool db_window_forget_failed(struct db_window *window, uint64_t offset, uint64_t length);

/* Waits for what of a range is on its way into the page cache, without having more read; false if
 * some of it is not, or is not known to be. */
bool db_window_await(struct db_window *window, uint64_t offset, uint64_t length);

/* For one thread, one range at a time. */
struct db_pin {
    int ends[2], nowhere; /* a pipe's, and /dev/null */
    uint64_t held_bytes;
    struct db_window *window; /* what is pinned */
    uint64_t offset, length;
};

/* Never fails: without its pipe, or where it is not wanted, it pins nothing. */
void db_pin_open(struct db_pin *pin, bool is_wanted);
void db_pin_close(struct db_pin *pin);
/* Where the range can be read until db_pin_give(); NULL if not all of it is in the page cache, or
 * somebody has mapped parts of the file for himself: his pages would be counted twice. */
const void *db_pin_take(struct db_pin *pin, struct db_window *window, uint64_t offset,
                        uint64_t length);
void db_pin_give(struct db_pin *pin);

#endif
