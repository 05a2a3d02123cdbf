/* engine_uring.c - io_uring on files and block devices. */
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

#include <liburing.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

enum { SUBMIT_RETRY_NS = 1000000 };

struct db_engine {
    struct io_uring ring;
    uint32_t staged_count; /* under the queue's lock */
    _Atomic int64_t in_kernel;
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

static int uring_open(const struct db_engine_config *config, struct db_engine **out)
{
    struct db_engine *engine = calloc(1, sizeof(*engine));
    if (!engine)
        return -ENOMEM;
    struct io_uring_params params = {.flags = IORING_SETUP_CLAMP};
    int rc = io_uring_queue_init_params(config->depth, &engine->ring, &params);
    if (rc) { /* EPERM, ENOSYS: forbidden here; ENOMEM: RLIMIT_MEMLOCK; EINVAL: an old kernel */
        free(engine);
        return rc;
    }
    rc = check_features(&engine->ring);
    if (!rc)
        rc = io_uring_ring_dontfork(&engine->ring); /* a child must not write to our rings */
    if (!rc && params.sq_entries < config->depth)
        rc = -EINVAL;
    if (!rc)
        rc = try_noop(&engine->ring);
    if (rc) {
        io_uring_queue_exit(&engine->ring);
        free(engine);
        return rc;
    }
    *out = engine;
    return 0;
}

static void uring_queue(struct db_engine *engine, struct db_request *request)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring);
    assert(sqe); /* the ring has an entry for every request of the pool */
    if (request->direction == DB_READ)
        io_uring_prep_read(sqe, request->fd, request->buffer, request->length, request->offset);
    else
        io_uring_prep_write(sqe, request->fd, request->buffer, request->length, request->offset);
    io_uring_sqe_set_data(sqe, request);
    engine->staged_count++;
}

static uint32_t uring_commit(struct db_engine *engine)
{
    uint32_t crossings = 0;
    while (engine->staged_count > 0) {
        /* Counted before, so that whoever reaps sees what was written to the requests. */
        atomic_fetch_add(&engine->in_kernel, engine->staged_count);
        int rc = io_uring_submit(&engine->ring);
        crossings++;
        assert(rc <= (int)engine->staged_count);
        atomic_fetch_sub(&engine->in_kernel, engine->staged_count - (rc > 0 ? rc : 0));
        if (rc > 0) {
            engine->staged_count -= (uint32_t)rc;
        } else if (rc == -EINTR) {
            continue;
        } else if (engine->in_kernel > 0) {
            break; /* EAGAIN, EBUSY: the kernel takes no more until something is reaped */
        } else {
            assert(rc == 0 || rc == -EAGAIN || rc == -EBUSY || rc == -ENOMEM);
            struct timespec pause = {0, SUBMIT_RETRY_NS};
            nanosleep(&pause, NULL);
        }
    }
    return crossings;
}

static int uring_reap(struct db_engine *engine, struct db_request **done, uint32_t max,
                      int64_t timeout_ns)
{
    struct io_uring_cqe *cqes[64];
    struct __kernel_timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    if (max > 64)
        max = 64;
    unsigned count = io_uring_peek_batch_cqe(&engine->ring, cqes, max);
    if (count == 0 && timeout_ns != 0) {
        int rc = timeout_ns < 0
                     ? io_uring_wait_cqe(&engine->ring, &cqes[0])
                     : io_uring_wait_cqes(&engine->ring, &cqes[0], 1, &timeout, NULL);
        if (rc == -ETIME || rc == -EINTR || rc == -EAGAIN)
            return 0;
        if (rc)
            return rc;
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
    .close = uring_close,
    .abandon = uring_abandon,
};

#endif
