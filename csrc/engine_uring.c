/* engine_uring.c - io_uring on files and block devices. */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <stdlib.h>

#ifdef DUALBLADE_NO_URING

const struct db_engine_ops db_engine_uring = {.name = "uring", .open = db_engine_absent};

#else

#include "refused.h"
#include "ring.h"

struct db_engine {
    struct db_ring ring;
    /* In the submission ring and not yet taken by the kernel; under the queue's lock. */
    struct db_request *staged, **staged_end;
    uint32_t staged_count;
    int refusal; /* not 0: the kernel no longer takes requests, and this is what it said */
    struct db_refused refused;
};

static void uring_close(struct db_engine *engine)
{
    assert(engine->staged_count == 0);
    db_ring_close(&engine->ring);
    free(engine);
}

static int uring_open(const struct db_engine_config *config, struct db_engine **out)
{
    static const unsigned char opcodes[] = {IORING_OP_READ, IORING_OP_WRITE, 0};
    struct db_engine *engine = calloc(1, sizeof(*engine));
    if (!engine)
        return -ENOMEM;
    struct db_ring_config ring = {
        .entries = config->depth,
        .sqpoll = config->sqpoll,
        .iopoll = config->iopoll,
        .opcodes = opcodes,
        .fds = config->fds,
        .fd_count = config->fd_count,
    };
    int rc = db_ring_open(&ring, &engine->ring);
    if (rc) {
        free(engine);
        return rc;
    }
    engine->staged_end = &engine->staged;
    *out = engine;
    return 0;
}

static int uring_add_memory(struct db_engine *engine, int32_t slot, void *start, uint64_t length)
{
    return engine->ring.has_memory ? db_ring_set_memory(&engine->ring, slot, start, length)
                                   : -EOPNOTSUPP;
}

static void uring_remove_memory(struct db_engine *engine, int32_t slot)
{
    /* What is in flight keeps its pages: the kernel counts their users. ENOMEM is all that could go
     * wrong, and then the slot keeps memory until something else takes its place. */
    (void)db_ring_set_memory(&engine->ring, slot, NULL, 0);
}

static void prepare_entry(struct db_engine *engine, struct db_request *request)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring.ring);
    assert(sqe); /* the ring has an entry for every request of the pool */
    int fd = engine->ring.has_files ? (int)request->file : request->fd;
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
    if (engine->ring.has_files)
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

static uint32_t uring_commit(struct db_engine *engine)
{
    uint32_t crossings = 0;
    if (engine->refusal)
        refuse_staged(engine, engine->refusal);
    while (engine->staged_count > 0) {
        int rc = db_ring_submit(&engine->ring, engine->staged_count);
        crossings++;
        if (rc > 0) {
            forget_staged(engine, (uint32_t)rc);
            continue;
        }
        enum db_ring_answer answer = db_ring_after(&engine->ring, rc);
        if (answer == DB_RING_REFUSED)
            refuse_staged(engine, rc);
        else if (answer == DB_RING_LATER)
            break;
    }
    return crossings;
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
    unsigned count = io_uring_peek_batch_cqe(&engine->ring.ring, cqes, max);
    if (count == 0 && (timeout_ns != 0 || engine->ring.must_poll)) {
        db_ring_wait(&engine->ring, least, timeout_ns);
        count = io_uring_peek_batch_cqe(&engine->ring.ring, cqes, max);
    }
    atomic_fetch_sub(&engine->ring.in_kernel, count);
    for (unsigned i = 0; i < count; i++) {
        done[i] = io_uring_cqe_get_data(cqes[i]);
        done[i]->result = cqes[i]->res;
    }
    io_uring_cq_advance(&engine->ring.ring, count);
    return (int)count;
}

static void uring_abandon(struct db_engine *engine)
{
    db_ring_abandon(&engine->ring);
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
