/* engine_aio.c - Linux AIO: one io_submit for a batch, io_getevents to collect.
 *
 * Asynchronous only for O_DIRECT; for buffered files io_submit blocks. It is the way where
 * containers forbid io_uring. */
#define _GNU_SOURCE
#include "refused.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

enum { SUBMIT_RETRY_NS = 1000000 };

struct db_engine {
    io_context_t context;
    uint32_t depth;
    uint32_t staged_count;     /* under the queue's lock */
    _Atomic int64_t in_kernel;
    struct db_refused refused; /* what io_submit complained of */
    struct iocb *staged[];
};

static void aio_close(struct db_engine *engine)
{
    assert(engine->staged_count == 0 && engine->in_kernel == 0);
    int rc = io_destroy(engine->context);
    assert(rc == 0); /* EINVAL or EFAULT only: the context would be garbage */
    (void)rc;
    free(engine);
}

static int aio_open(const struct db_engine_config *config, struct db_engine **out)
{
    struct db_engine *engine =
        calloc(1, sizeof(*engine) + config->depth * sizeof(engine->staged[0]));
    if (!engine)
        return -ENOMEM;
    engine->depth = config->depth;
    int rc = io_setup((int)config->depth, &engine->context);
    if (rc) { /* EAGAIN: over /proc/sys/fs/aio-max-nr; ENOSYS, EPERM: forbidden; ENOMEM */
        free(engine);
        return rc;
    }
    /* A filter may let a context be made and refuse to use it. */
    rc = io_submit(engine->context, 0, engine->staged);
    if (rc >= 0)
        rc = io_getevents(engine->context, 0, 0, NULL, NULL);
    if (rc < 0) {
        io_destroy(engine->context);
        free(engine);
        return rc;
    }
    *out = engine;
    return 0;
}

static void aio_queue(struct db_engine *engine, struct db_request *request)
{
    assert(engine->staged_count < engine->depth);
    if (request->direction == DB_READ)
        io_prep_pread(&request->iocb, request->fd, request->buffer, request->length,
                      (long long)request->offset);
    else
        io_prep_pwrite(&request->iocb, request->fd, request->buffer, request->length,
                       (long long)request->offset);
    request->iocb.data = request;
    engine->staged[engine->staged_count++] = &request->iocb;
}

static void forget_staged(struct db_engine *engine, uint32_t count)
{
    engine->staged_count -= count;
    for (uint32_t i = 0; i < engine->staged_count; i++)
        engine->staged[i] = engine->staged[i + count];
}

static void refuse_first(struct db_engine *engine, int error)
{
    struct db_request *request = engine->staged[0]->data;
    forget_staged(engine, 1);
    db_refused_push(&engine->refused, request, error);
}

static uint32_t aio_commit(struct db_engine *engine)
{
    uint32_t crossings = 0;
    while (engine->staged_count > 0) {
        /* Counted before, so that whoever reaps sees what was written to the requests. */
        atomic_fetch_add(&engine->in_kernel, engine->staged_count);
        int rc = io_submit(engine->context, engine->staged_count, engine->staged);
        crossings++;
        atomic_fetch_sub(&engine->in_kernel, engine->staged_count - (rc > 0 ? rc : 0));
        if (rc > 0) {
            forget_staged(engine, (uint32_t)rc);
        } else if (rc == -EINTR) {
            continue;
        } else if (rc == -EAGAIN && engine->in_kernel > 0) {
            break; /* the kernel is out of room until something completes */
        } else if (rc == -EAGAIN) {
            struct timespec pause = {0, SUBMIT_RETRY_NS};
            nanosleep(&pause, NULL);
        } else { /* EINVAL, EBADF, EFAULT: the first one is at fault */
            refuse_first(engine, rc ? rc : -EIO);
        }
    }
    return crossings;
}

static int aio_reap(struct db_engine *engine, struct db_request **done, uint32_t least,
                    uint32_t max, int64_t timeout_ns)
{
    int refused = db_refused_pop(&engine->refused, done, max);
    if (refused > 0)
        return refused;
    struct io_event events[64];
    struct timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    if (max > 64)
        max = 64;
    assert(least <= max);
    int count = io_getevents(engine->context, timeout_ns ? (long)least : 0, (long)max, events,
                             timeout_ns < 0 ? NULL : &timeout);
    if (count > 0)
        atomic_fetch_sub(&engine->in_kernel, count);
    for (int i = 0; i < count; i++) {
        done[i] = events[i].data;
        done[i]->result = (int64_t)events[i].res;
    }
    return count;
}

static void aio_abandon(struct db_engine *engine)
{
    (void)engine; /* a context is not inherited across a fork */
}

const struct db_engine_ops db_engine_aio = {
    .name = "aio",
    .open = aio_open,
    .queue = aio_queue,
    .commit = aio_commit,
    .reap = aio_reap,
    .close = aio_close,
    .abandon = aio_abandon,
};
