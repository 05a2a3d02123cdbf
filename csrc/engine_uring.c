/* engine_uring.c - io_uring on files and block devices.
 *
 * The kernel completes a request in the thread that submitted it, when that is in user space, makes
 * a system call, or sleeps where a signal would wake it. Only an uninterruptible call (a read from
 * a network filesystem that hangs) holds up whoever waits for what its thread has submitted. */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <stdlib.h>

#ifdef DUALBLADE_NO_URING

static int uring_open(const struct db_engine_config *config, struct db_engine **out)
{
    (void)config;
    (void)out;
    return -ENOSYS;
}

/* open() refuses, so nothing else of the table is ever called. */
const struct db_engine_ops db_engine_uring = {.name = "uring", .open = uring_open};

#else

#include "clock.h"
#include "refused.h"

#include <liburing.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

enum {
    RETRY_NS = 1000000,
    GIVEN_BACK_NS = 200000000,
    KERNEL_THREAD_IDLE_MS = 20, /* it spins for so long before it sleeps; by itself for a second */
};

struct db_engine {
    struct io_uring ring;
    /* In the submission ring and not yet taken by the kernel; under the queue's lock. */
    struct db_request *staged, **staged_end;
    uint32_t staged_count;
    _Atomic int64_t in_kernel;
    int refusal; /* not 0: the kernel no longer takes requests, and this is what it said */
    struct db_refused refused;
    bool has_files;  /* the files are registered, in their order */
    bool has_memory; /* there is a table for registered memory */
    bool has_kernel_thread; /* it takes entries from the ring as they appear: SQPOLL */
    bool must_poll; /* nothing completes unless we look: IOPOLL without such a thread */
};

static void uring_close(struct db_engine *engine)
{
    assert(engine->staged_count == 0 && engine->in_kernel == 0);
    io_uring_queue_exit(&engine->ring);
    free(engine);
}

/* What is used below, by asking and never by the kernel's version. */
static int check_features(struct io_uring *ring)
{
    /* Without EXT_ARG a timed wait would need a submission entry, which is another thread's;
     * without NODROP a completion could be lost when the ring overflows. */
    unsigned needed = IORING_FEAT_EXT_ARG | IORING_FEAT_NODROP;
    if ((ring->features & needed) != needed)
        return -EOPNOTSUPP;
    struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
    if (!probe)
        return -EOPNOTSUPP;
    bool able = io_uring_opcode_supported(probe, IORING_OP_READ) &&
                io_uring_opcode_supported(probe, IORING_OP_WRITE);
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
           db_now_ns() < deadline_ns) {
        struct timespec pause = {0, RETRY_NS};
        nanosleep(&pause, NULL);
    }
    return rc;
}

static int uring_open(const struct db_engine_config *config, struct db_engine **out)
{
    struct db_engine *engine = calloc(1, sizeof(*engine));
    if (!engine)
        return -ENOMEM;
    struct io_uring_params params = {.flags = IORING_SETUP_CLAMP,
                                     .sq_thread_idle = KERNEL_THREAD_IDLE_MS};
    if (config->sqpoll)
        params.flags |= IORING_SETUP_SQPOLL;
    if (config->iopoll)
        params.flags |= IORING_SETUP_IOPOLL;
    /* The kernel's thread gives entries back a batch at a time, after the first of the batch may
     * have completed: with twice as many as requests there is always one free. */
    uint32_t entries = config->sqpoll ? 2 * config->depth : config->depth;
    int rc = make_ring(&engine->ring, entries, &params);
    if (rc) { /* EPERM, ENOSYS: forbidden here; ENOMEM: RLIMIT_MEMLOCK; EINVAL: an old kernel */
        free(engine);
        return rc;
    }
    rc = check_features(&engine->ring);
    if (!rc)
        rc = io_uring_ring_dontfork(&engine->ring); /* a child must not write to our rings */
    if (!rc && params.sq_entries < entries)
        rc = -EINVAL;
    if (!rc && !config->iopoll) /* such a ring takes only what can be polled for */
        rc = try_noop(&engine->ring);
    if (rc) {
        io_uring_queue_exit(&engine->ring);
        free(engine);
        return rc;
    }
    engine->staged_end = &engine->staged;
    engine->has_kernel_thread = config->sqpoll;
    engine->must_poll = config->iopoll && !config->sqpoll;
    /* Both spare the kernel work at each request, and neither is needed: a table that can be filled
     * later came with Linux 5.19. */
    engine->has_files =
        io_uring_register_files(&engine->ring, config->fds, config->fd_count) == 0;
    engine->has_memory = io_uring_register_buffers_sparse(&engine->ring, DB_REGIONS_MAX) == 0;
    *out = engine;
    return 0;
}

static int set_memory(struct db_engine *engine, int32_t slot, void *start, uint64_t length)
{
    struct iovec run = {.iov_base = start, .iov_len = length};
    int rc = io_uring_register_buffers_update_tag(&engine->ring, (unsigned)slot, &run, NULL, 1);
    return rc < 0 ? rc : 0;
}

static int uring_add_memory(struct db_engine *engine, int32_t slot, void *start, uint64_t length)
{
    return engine->has_memory ? set_memory(engine, slot, start, length) : -EOPNOTSUPP;
}

static void uring_remove_memory(struct db_engine *engine, int32_t slot)
{
    /* What is in flight keeps its pages: the kernel counts their users. ENOMEM is all that could go
     * wrong, and then the slot keeps memory until something else takes its place. */
    (void)set_memory(engine, slot, NULL, 0);
}

static void prepare_entry(struct db_engine *engine, struct db_request *request)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring);
    assert(sqe); /* the ring has an entry for every request of the pool */
    int fd = engine->has_files ? (int)request->file : request->fd;
    bool reads = request->direction == DB_READ;
    if (request->slot == DB_REGION_NONE)
        io_uring_prep_rw(reads ? IORING_OP_READ : IORING_OP_WRITE, sqe, fd, request->buffer,
                         request->length, request->offset);
    else if (reads)
        io_uring_prep_read_fixed(sqe, fd, request->buffer, request->length, request->offset,
                                 request->slot);
    else
        io_uring_prep_write_fixed(sqe, fd, request->buffer, request->length, request->offset,
                                  request->slot);
    if (engine->has_files)
        io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
    io_uring_sqe_set_data(sqe, request);
}

static void uring_queue(struct db_engine *engine, struct db_request *request)
{
    if (!engine->refusal)
        prepare_entry(engine, request);
    request->next = NULL;
    *engine->staged_end = request;
    engine->staged_end = &request->next;
    engine->staged_count++;
}

/* The first `count` staged requests are no longer ours to hand over. */
static void forget_staged(struct db_engine *engine, uint32_t count)
{
    assert(count <= engine->staged_count);
    engine->staged_count -= count;
    while (count-- > 0)
        engine->staged = engine->staged->next;
    if (!engine->staged)
        engine->staged_end = &engine->staged;
}

/* The kernel will never take them (a filter put in place after open() forbids it), so each fails
 * with what it said. Their entries stay in the ring, which is not submitted again. */
static void refuse_staged(struct db_engine *engine, int error)
{
    engine->refusal = error;
    for (struct db_request *request = engine->staged, *next; request; request = next) {
        next = request->next;
        db_refused_push(&engine->refused, request, error);
    }
    engine->staged = NULL;
    engine->staged_end = &engine->staged;
    engine->staged_count = 0;
}

/* How many of the staged requests the kernel has now, or -errno. */
static int submit(struct db_engine *engine)
{
    if (!engine->has_kernel_thread)
        return io_uring_submit(&engine->ring);
    /* Entries that the kernel's thread could not be woken for it would still find, whenever
     * something else wakes it, and move bytes for a request that has failed. So it is woken before
     * they are shown to it, and then takes them all, when it gets there. */
    bool sleeps = IO_URING_READ_ONCE(*engine->ring.sq.kflags) & IORING_SQ_NEED_WAKEUP;
    int rc = !sleeps ? 0
                     : io_uring_enter((unsigned)engine->ring.ring_fd, 0, 0,
                                      IORING_ENTER_SQ_WAKEUP, NULL);
    if (rc < 0)
        return rc;
    (void)io_uring_submit(&engine->ring);
    return (int)engine->staged_count;
}

static uint32_t uring_commit(struct db_engine *engine)
{
    uint32_t crossings = 0;
    if (engine->refusal)
        refuse_staged(engine, engine->refusal);
    while (engine->staged_count > 0) {
        /* Counted before, so that whoever reaps sees what was written to the requests. */
        atomic_fetch_add(&engine->in_kernel, engine->staged_count);
        int rc = submit(engine);
        crossings++;
        assert(rc <= (int)engine->staged_count);
        atomic_fetch_sub(&engine->in_kernel, engine->staged_count - (rc > 0 ? rc : 0));
        if (rc > 0) {
            forget_staged(engine, (uint32_t)rc);
        } else if (rc == -EINTR) {
            continue;
        } else if (rc != 0 && rc != -EAGAIN && rc != -EBUSY && rc != -ENOMEM) {
            refuse_staged(engine, rc);
        } else if (engine->in_kernel > 0) {
            break; /* the kernel takes no more until something is reaped */
        } else {
            struct timespec pause = {0, RETRY_NS};
            nanosleep(&pause, NULL);
        }
    }
    return crossings;
}

/* Looks for completions until there is one or the time is up. The kernel could do so by itself, but
 * knows no end of it other than a completion. */
static int poll_in_kernel(struct db_engine *engine, int64_t timeout_ns)
{
    int64_t deadline_ns = timeout_ns < 0 ? INT64_MAX : db_deadline_ns(timeout_ns);
    do {
        if (engine->in_kernel == 0)
            sched_yield(); /* another thread is about to submit what we wait for */
        int rc = io_uring_get_events(&engine->ring);
        if (rc < 0 && rc != -EAGAIN && rc != -EBUSY)
            return rc;
        if (io_uring_cq_ready(&engine->ring) > 0)
            return 0;
    } while (db_now_ns() < deadline_ns);
    return -ETIME;
}

static void wait_in_kernel(struct db_engine *engine, uint32_t least, int64_t timeout_ns)
{
    struct io_uring_cqe *first;
    struct __kernel_timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    int rc;
    if (engine->must_poll)
        rc = poll_in_kernel(engine, timeout_ns);
    else if (timeout_ns < 0)
        rc = io_uring_wait_cqe_nr(&engine->ring, &first, least);
    else
        rc = io_uring_wait_cqes(&engine->ring, &first, least, &timeout, NULL);
    if (rc == 0 || rc == -ETIME || rc == -EINTR || rc == -EAGAIN)
        return;
    /* Forbidden after open(). What the kernel has taken it will still complete, in memory that we
     * share with it; and until then the callers' memory is its own. So look there again. */
    struct timespec pause = {0, RETRY_NS};
    nanosleep(&pause, NULL);
}

static int uring_reap(struct db_engine *engine, struct db_request **done, uint32_t least,
                      uint32_t max, int64_t timeout_ns)
{
    struct io_uring_cqe *cqes[64];
    int refused = db_refused_pop(&engine->refused, done, max);
    if (refused > 0)
        return refused;
    if (max > 64)
        max = 64;
    unsigned count = io_uring_peek_batch_cqe(&engine->ring, cqes, max);
    if (count == 0 && (timeout_ns != 0 || engine->must_poll)) {
        wait_in_kernel(engine, least, timeout_ns);
        count = io_uring_peek_batch_cqe(&engine->ring, cqes, max);
    }
    atomic_fetch_sub(&engine->in_kernel, count);
    for (unsigned i = 0; i < count; i++) {
        done[i] = io_uring_cqe_get_data(cqes[i]);
        done[i]->result = cqes[i]->res;
    }
    io_uring_cq_advance(&engine->ring, count);
    return (int)count;
}

static void uring_abandon(struct db_engine *engine)
{
    close(engine->ring.ring_fd); /* the maps are not inherited: io_uring_ring_dontfork() */
}

const struct db_engine_ops db_engine_uring = {
    .name = "uring",
    .open = uring_open,
    .queue = uring_queue,
    .commit = uring_commit,
    .reap = uring_reap,
    .add_memory = uring_add_memory,
    .remove_memory = uring_remove_memory,
    .close = uring_close,
    .abandon = uring_abandon,
};

#endif
