/* ring.c - an io_uring: made, submitted to, waited on. */
#define _GNU_SOURCE
#include "ring.h"

#ifndef DUALBLADE_NO_URING

#include "clock.h"
#include "regions.h"

#include <errno.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

enum {
    RETRY_NS = 1000000,
    GIVEN_BACK_NS = 200000000,
    KERNEL_THREAD_IDLE_MS = 20, /* it spins for so long before it sleeps; by itself for a second */
};

static void pause_briefly(void)
{
    struct timespec pause = {0, RETRY_NS};
    nanosleep(&pause, NULL);
}

/* What is used, by asking and never by the kernel's version. */
static int check_features(struct io_uring *ring, const unsigned char *opcodes)
{
    /* Without EXT_ARG a timed wait would need a submission entry, which is another thread's;
     * without NODROP a completion could be lost when the ring overflows. */
    unsigned needed = IORING_FEAT_EXT_ARG | IORING_FEAT_NODROP;
    if ((ring->features & needed) != needed)
        return -EOPNOTSUPP;
    struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
    if (!probe)
        return -EOPNOTSUPP;
    bool able = true;
    for (; *opcodes; opcodes++)
        able = able && io_uring_opcode_supported(probe, *opcodes);
    io_uring_free_probe(probe);
    return able ? 0 : -EOPNOTSUPP;
}

/* A filter may let a ring be made and refuse to enter it. */
static int try_noop(struct io_uring *ring)
{
    struct io_uring_cqe *cqe;
    io_uring_prep_nop(io_uring_get_sqe(ring));
    int rc = io_uring_submit_and_wait(ring, 1);
    if (rc < 0)
        return rc;
    rc = io_uring_wait_cqe(ring, &cqe);
    if (!rc) {
        rc = cqe->res;
        io_uring_cqe_seen(ring, cqe);
    }
    return rc;
}

/* Some kernels count a ring against RLIMIT_MEMLOCK, and what a closed one took they give back some
 * tens of milliseconds later: who reopens a device must not be refused for that. */
static int make_ring(struct io_uring *ring, uint32_t entries, struct io_uring_params *params)
{
    int64_t deadline_ns = db_deadline_ns(GIVEN_BACK_NS);
    int rc;
    while ((rc = io_uring_queue_init_params(entries, ring, params)) == -ENOMEM &&
           db_now_ns() < deadline_ns)
        pause_briefly();
    return rc;
}

int db_ring_open(const struct db_ring_config *config, struct db_ring *out)
{
    struct io_uring_params params = {.flags = IORING_SETUP_CLAMP | config->flags,
                                     .sq_thread_idle = KERNEL_THREAD_IDLE_MS};
    if (config->sqpoll)
        params.flags |= IORING_SETUP_SQPOLL;
    if (config->iopoll)
        params.flags |= IORING_SETUP_IOPOLL;
    /* The kernel's thread gives entries back a batch at a time, after the first of the batch may
     * have completed: with twice as many as requests there is always one free. */
    uint32_t entries = config->sqpoll ? 2 * config->entries : config->entries;
    struct io_uring *ring = &out->ring;
    int rc = make_ring(ring, entries, &params);
    if (rc)
        return rc;
    rc = check_features(ring, config->opcodes);
    if (!rc)
        rc = io_uring_ring_dontfork(ring); /* a child must not write to our rings */
    if (!rc && params.sq_entries < entries)
        rc = -EINVAL;
    if (!rc && !config->iopoll) /* such a ring takes only what can be polled for */
        rc = try_noop(ring);
    if (rc) {
        io_uring_queue_exit(ring);
        return rc;
    }
    out->in_kernel = 0;
    out->has_kernel_thread = config->sqpoll;
    out->must_poll = config->iopoll && !config->sqpoll;
    /* Both spare the kernel work at each request, and neither is needed: a table that can be filled
     * later came with Linux 5.19. */
    out->has_files = io_uring_register_files(ring, config->fds, config->fd_count) == 0;
    out->has_memory = io_uring_register_buffers_sparse(ring, DB_REGIONS_MAX) == 0;
    return 0;
}

void db_ring_close(struct db_ring *ring)
{
    assert(ring->in_kernel == 0);
    io_uring_queue_exit(&ring->ring);
}

void db_ring_abandon(struct db_ring *ring)
{
    close(ring->ring.ring_fd); /* the maps are not inherited: io_uring_ring_dontfork() */
}

int db_ring_set_memory(struct db_ring *ring, int32_t slot, void *start, uint64_t length)
{
    struct iovec run = {.iov_base = start, .iov_len = length};
    int rc = io_uring_register_buffers_update_tag(&ring->ring, (unsigned)slot, &run, NULL, 1);
    return rc < 0 ? rc : 0;
}

static int submit(struct db_ring *ring, uint32_t staged)
{
    if (!ring->has_kernel_thread)
        return io_uring_submit(&ring->ring);
    /* Entries that the kernel's thread could not be woken for it would still find, whenever
     * something else wakes it, and move bytes for a request that has failed. So it is woken before
     * they are shown to it, and then takes them all, when it gets there. */
    bool sleeps = IO_URING_READ_ONCE(*ring->ring.sq.kflags) & IORING_SQ_NEED_WAKEUP;
    int rc = !sleeps ? 0
                     : io_uring_enter((unsigned)ring->ring.ring_fd, 0, 0, IORING_ENTER_SQ_WAKEUP,
                                      NULL);
    if (rc < 0)
        return rc;
    (void)io_uring_submit(&ring->ring);
    return (int)staged;
}

int db_ring_submit(struct db_ring *ring, uint32_t staged)
{
    /* Counted before, so that whoever reaps sees what was written to the requests. */
    atomic_fetch_add(&ring->in_kernel, staged);
    int rc = submit(ring, staged);
    assert(rc <= (int)staged);
    atomic_fetch_sub(&ring->in_kernel, staged - (rc > 0 ? (uint32_t)rc : 0));
    return rc;
}

enum db_ring_answer db_ring_after(struct db_ring *ring, int rc)
{
    if (rc == -EINTR)
        return DB_RING_AGAIN;
    if (rc != 0 && rc != -EAGAIN && rc != -EBUSY && rc != -ENOMEM)
        return DB_RING_REFUSED;
    if (ring->in_kernel > 0)
        return DB_RING_LATER; /* the kernel takes no more until something is reaped */
    pause_briefly();
    return DB_RING_AGAIN;
}

/* Looks for completions until there is one or the time is up. The kernel could do so by itself, but
 * knows no end of it other than a completion. */
static int poll_in_kernel(struct db_ring *ring, int64_t timeout_ns)
{
    int64_t deadline_ns = timeout_ns < 0 ? INT64_MAX : db_deadline_ns(timeout_ns);
    do {
        if (ring->in_kernel == 0)
            sched_yield(); /* another thread is about to submit what we wait for */
        int rc = io_uring_get_events(&ring->ring);
        if (rc < 0 && rc != -EAGAIN && rc != -EBUSY)
            return rc;
        if (io_uring_cq_ready(&ring->ring) > 0)
            return 0;
    } while (db_now_ns() < deadline_ns);
    return -ETIME;
}

void db_ring_wait(struct db_ring *ring, uint32_t least, int64_t timeout_ns)
{
    struct io_uring_cqe *first;
    struct __kernel_timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    int rc;
    if (ring->must_poll)
        rc = poll_in_kernel(ring, timeout_ns);
    else if (timeout_ns < 0)
        rc = io_uring_wait_cqe_nr(&ring->ring, &first, least);
    else
        rc = io_uring_wait_cqes(&ring->ring, &first, least, &timeout, NULL);
    if (rc == 0 || rc == -ETIME || rc == -EINTR || rc == -EAGAIN)
        return;
    /* Forbidden after open(). What the kernel has taken it will still complete, in memory that we
     * share with it; and until then the callers' memory is its own. So look there again. */
    pause_briefly();
}

#endif
