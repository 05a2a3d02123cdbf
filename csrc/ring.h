/* ring.h - an io_uring as both engines on one use it: made, submitted to, waited on.
 *
 * The kernel completes a request in the thread that submitted it, when that is in user space, makes
 * a system call, or sleeps where a signal would wake it. Only an uninterruptible call (a read from
 * a network filesystem that hangs) holds up whoever waits for what its thread has submitted. */
#ifndef DUALBLADE_RING_H
#define DUALBLADE_RING_H

#ifndef DUALBLADE_NO_URING

#include <assert.h>
#include <liburing.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct db_ring {
    struct io_uring ring;
    _Atomic int64_t in_kernel; /* entries that the kernel has taken and not completed */
    bool has_kernel_thread;    /* it takes entries from the ring as they appear: SQPOLL */
    bool must_poll; /* nothing completes unless we look: IOPOLL without such a thread */
    bool has_files;  /* the files are registered, in their order */
    bool has_memory; /* there is a table for registered memory */
};

struct db_ring_config {
    uint32_t entries; /* that can be submitted at once */
    unsigned flags;   /* IORING_SETUP_..., beside those of sqpoll and iopoll */
    bool sqpoll, iopoll;
    const unsigned char *opcodes; /* that are needed, with a 0 behind them */
    const int *fds;               /* to be registered */
    uint32_t fd_count;
};

/* EPERM, ENOSYS: forbidden here; ENOMEM: RLIMIT_MEMLOCK; EINVAL, EOPNOTSUPP: an old kernel. */
int db_ring_open(const struct db_ring_config *config, struct db_ring *out);
void db_ring_close(struct db_ring *ring);
/* In the child after a fork. */
void db_ring_abandon(struct db_ring *ring);

/* Registered memory of the table; with NULL and 0 the slot is empty again. */
int db_ring_set_memory(struct db_ring *ring, int32_t slot, void *start, uint64_t length);

/* How many of the `staged` entries, which are all in the ring, the kernel has taken now; or
 * -errno. */
int db_ring_submit(struct db_ring *ring, uint32_t staged);
/* After db_ring_submit() gave rc, which was not positive: whether it is to be tried again at once,
 * later, or never. May sleep a little. */
enum db_ring_answer { DB_RING_AGAIN, DB_RING_LATER, DB_RING_REFUSED };
enum db_ring_answer db_ring_after(struct db_ring *ring, int rc);

/* Waits for `least` completions or timeout_ns. Negative: for ever. */
void db_ring_wait(struct db_ring *ring, uint32_t least, int64_t timeout_ns);

#endif

#endif
