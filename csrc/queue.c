/* queue.c - requests on their way: a pool of them over one engine, resuming, completion, waiting.
 *
 * A batch lists contiguous runs, which pieces.c carves into requests from a fixed pool.
 *
 * There is no thread here. Whoever waits drives: the first waiter becomes the leader and reaps from
 * the engine for everybody, the others sleep until a batch is done or the leader leaves. So one
 * thread alone pays for no hand-over, and many threads can submit and wait at once.
 *
 * Locking: one mutex for the pool, the lists and the counters. It is never held across a wait in
 * the kernel, a copy or a checksum. */
#define _GNU_SOURCE
#include "queue_state.h"

#include "clock.h"
#include "counters.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    /* Waited for at once, and so few of those in flight that the device does not run dry: each wait
     * in the kernel costs as much as several requests. */
    REAP_LEAST_MAX = 16,
    REAP_LEAST_OF = 8,
    REAP_MAX = 64,
    SLOT_BYTES = 256 << 10, /* of staging, or one chunk where that is more */
    RETRIES_MAX = 64,       /* of a request that moved nothing: EINTR, EAGAIN, less than a block */
    NVME_RETRIES_MAX = 5,   /* where the drive does not say that it is of no use */
    NVME_DO_NOT_RETRY = 1 << 14,      /* in a status */
    REGION_DEFAULT_BYTES = 1 << 30, /* the kernel registers at most so much at once */
    /* The longest wait in the kernel. A request that the kernel would not take, when another
     * thread committed it, is the engine's to hand back and wakes nobody who waits there. */
    REAP_SLICE_NS = 100000000,
    REAP_MANY_NS = 2000000, /* and for several, of which others may want but the first */
};

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* ---- feeding the engine (lock held) ---------------------------------------------------------- */

/* Whether db_piece_prepare() would do something: it is worth letting the lock go for that alone. */
static bool have_work(struct db_request *const *requests, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (requests[i]->direction == DB_WRITE && (requests[i]->checksums || requests[i]->staging))
            return true;
    return false;
}

/* Feeds the engine until the pool or the work runs out. Called and returns with the lock held. */
static void pump(struct db_queue *queue)
{
    struct db_request *some[DB_CARVE_MAX];
    uint32_t count;
    do {
        count = db_pieces_carve(queue, some);
        if (!queue->config.engine->has_threads && have_work(some, count)) {
            pthread_mutex_unlock(&queue->lock);
            for (uint32_t i = 0; i < count; i++)
                db_piece_prepare(some[i], queue);
            pthread_mutex_lock(&queue->lock);
        }
        for (uint32_t i = 0; i < count; i++)
            queue->config.engine->queue(queue->engine, some[i]);
        /* Even with nothing new: the kernel may now take what it would not take before. */
        queue->stats.submits += queue->config.engine->commit(queue->engine);
    } while (count > 0);
}

/* ---- completion ------------------------------------------------------------------------------ */

void db_queue_batch_finished(struct db_queue *queue)
{
    atomic_fetch_sub_explicit(&db_live_batches, 1, memory_order_relaxed);
    pthread_cond_broadcast(&queue->changed);
}

static void release(struct db_queue *queue, struct db_request *request)
{
    struct db_batch *batch = request->batch;
    assert(request->busy && batch->in_flight > 0 && queue->in_flight > 0);
    if (request->staging)
        queue->free_slots[queue->free_slot_count++] = request->staging;
    request->busy = false;
    request->user = NULL;
    request->next = queue->free_requests;
    queue->free_requests = request;
    queue->in_flight--;
    atomic_fetch_sub_explicit(&db_live_requests, 1, memory_order_relaxed);
    if (--batch->in_flight == 0 && batch->issued)
        db_queue_batch_finished(queue);
}

static void fail(struct db_queue *queue, struct db_request *request, int error)
{
    /* Pieces end in any order: what is reported is where the trouble begins. */
    uint64_t offset = request->piece_offset + request->moved_bytes + request->error_at;
    if (!request->io->error || offset < request->io->error_offset) {
        request->io->error = error;
        request->io->nvme_status = request->nvme_status;
        request->io->error_offset = offset;
    }
    if (error == -EBADMSG)
        queue->stats.checksum_mismatches++;
    else
        queue->stats.errors++;
    release(queue, request);
}

static void resume(struct db_queue *queue, struct db_request *request)
{
    db_piece_point_at_rest(queue, request);
    request->next = queue->resumes;
    queue->resumes = request;
}

static void succeed(struct db_queue *queue, struct db_request *request)
{
    struct db_path_stats *stats = &queue->stats;
    if (request->direction == DB_READ) {
        stats->reads++;
        stats->read_bytes += request->piece_bytes;
    } else {
        stats->writes++;
        stats->write_bytes += request->piece_bytes;
    }
    if (request->staging)
        stats->staged_bytes += request->user_bytes;
    release(queue, request);
}

/* Decides what becomes of a request the engine has given back (lock held). */
static void complete(struct db_queue *queue, struct db_request *request)
{
    int64_t result = request->result;
    if (request->nvme_status) {
        if (!(request->nvme_status & NVME_DO_NOT_RETRY) && request->retries++ < NVME_RETRIES_MAX)
            resume(queue, request);
        else
            fail(queue, request, (int)result);
        return;
    }
    /* ECANCELED: nobody here cancels, but io_uring does when the thread that submitted ends. */
    if (result == -EINTR || result == -EAGAIN || result == -ECANCELED) {
        if (request->retries++ < RETRIES_MAX)
            resume(queue, request);
        else
            fail(queue, request, (int)result);
        return;
    }
    if (result == -EFAULT && request->slot != DB_REGION_NONE) {
        request->slot = DB_REGION_NONE; /* unregistered between being staged and being taken */
        resume(queue, request);
        return;
    }
    if (result < 0) {
        fail(queue, request, (int)result);
        return;
    }
    if (result == 0) { /* a truncated file or a removed drive, which reads as empty */
        fail(queue, request, request->direction == DB_READ ? -ENODATA : -EIO);
        return;
    }
    assert(result <= request->length);
    if ((uint64_t)result == request->length) {
        request->moved_bytes += request->length;
        if (request->moved_bytes == request->piece_bytes)
            succeed(queue, request);
        else
            resume(queue, request); /* the rest is on another member */
        return;
    }
    /* Short. Direct I/O can only go on at a block, so a block moved in part is moved again. */
    uint32_t moved = (uint32_t)result / queue->config.lba_bytes * queue->config.lba_bytes;
    request->moved_bytes += moved;
    queue->stats.resumed++;
    if (moved == 0 && request->retries++ >= RETRIES_MAX)
        fail(queue, request, -EIO);
    else
        resume(queue, request);
}

struct moved {
    uint64_t large_bytes[2]; /* by direction: of large transfers, in requests of today's size */
    bool others;
};

static void count_moved(const struct db_queue *queue, struct moved *moved,
                        const struct db_request *request)
{
    if (request->size_tag == queue->sizes[request->direction].tag && request->result > 0)
        moved->large_bytes[request->direction] += (uint64_t)request->result;
    else
        moved->others = true;
}

/* Tells both measurements of the request size what the last reap brought. */
static void measure(struct db_queue *queue, const struct moved *moved)
{
    bool has_large = moved->large_bytes[DB_READ] + moved->large_bytes[DB_WRITE] > 0;
    if (!has_large && queue->sizes[DB_READ].busy_since_ns == 0 &&
        queue->sizes[DB_WRITE].busy_since_ns == 0)
        return; /* small transfers only: not worth a look at the clock */
    int64_t now_ns = db_now_ns();
    bool is_idle = queue->in_flight == 0;
    for (int direction = DB_READ; direction <= DB_WRITE; direction++) {
        struct db_request_size *size = &queue->sizes[direction];
        if (moved->others || moved->large_bytes[!direction] > 0)
            db_request_size_disturbed(size, now_ns, is_idle);
        else if (moved->large_bytes[direction] > 0)
            db_request_size_moved(size, moved->large_bytes[direction], now_ns, is_idle);
    }
}

/* What the engine has given back is no longer at the device, so more can be sent there. Whether
 * there is work left with any of it. */
static bool count_seen(struct db_queue *queue, struct db_request *const *done, int count)
{
    bool has_work = false;
    for (int i = 0; i < count; i++) {
        has_work = has_work || db_piece_needs_finish(done[i]);
        if (db_piece_is_ahead(queue, done[i])) {
            assert(queue->ahead_bytes >= done[i]->length);
            queue->ahead_bytes -= done[i]->length;
        }
        if (!db_piece_is_unseen(queue, done[i]))
            continue;
        assert(queue->unseen_count > 0 && queue->unseen_bytes >= done[i]->length);
        queue->unseen_bytes -= done[i]->length;
        queue->unseen_count--;
    }
    return has_work && !queue->config.engine->has_threads;
}

/* How many completions are worth waiting for, to a thread that waits for this batch alone. Threads
 * of the engine's own leave nothing to be done with them, as long as there is more to do. */
static uint32_t least_to_reap(const struct db_queue *queue, const struct db_batch *batch)
{
    if (!batch || queue->followers > 0)
        return 1;
    uint32_t most = REAP_LEAST_MAX;
    uint32_t least = batch->in_flight / REAP_LEAST_OF;
    if (queue->config.engine->has_threads) {
        most = REAP_MAX;
        least = batch->issued ? batch->in_flight : batch->in_flight / 2;
    }
    if (least > most)
        return most;
    return least > 0 ? least : 1;
}

/* Reaps once as the leader, for `batch` if not NULL. Called and returns with the lock held; 0 or
 * -errno of the engine. */
static int lead(struct db_queue *queue, const struct db_batch *batch, int64_t timeout_ns)
{
    struct db_request *done[REAP_MAX];
    uint32_t least = least_to_reap(queue, batch);
    assert(!queue->has_leader);
    queue->has_leader = true;
    int64_t most_ns = least > 1 ? REAP_MANY_NS : REAP_SLICE_NS;
    if (timeout_ns < 0 || timeout_ns > most_ns)
        timeout_ns = most_ns;
    pthread_mutex_unlock(&queue->lock);
    int count = queue->config.engine->reap(queue->engine, done, least, REAP_MAX, timeout_ns);
    pthread_mutex_lock(&queue->lock);
    if (count_seen(queue, done, count)) {
        pump(queue);
        pthread_mutex_unlock(&queue->lock);
        for (int i = 0; i < count; i++)
            db_piece_finish(done[i], queue);
        pthread_mutex_lock(&queue->lock);
    }
    queue->has_leader = false;
    struct moved moved = {0};
    for (int i = 0; i < count; i++) {
        count_moved(queue, &moved, done[i]);
        complete(queue, done[i]);
    }
    if (count > 0)
        measure(queue, &moved);
    pump(queue);
    return count < 0 && count != -EINTR ? count : 0;
}

static bool is_done(const struct db_batch *batch)
{
    return batch->issued && batch->in_flight == 0;
}

void db_queue_submit(struct db_queue *queue, struct db_batch *batch)
{
    batch->next_io = 0;
    batch->next_byte = 0;
    batch->in_flight = 0;
    batch->issued = false;
    batch->next = NULL;
    atomic_fetch_add_explicit(&db_live_batches, 1, memory_order_relaxed);
    pthread_mutex_lock(&queue->lock);
    *queue->pending_end[batch->direction] = batch;
    queue->pending_end[batch->direction] = &batch->next;
    pump(queue);
    /* Nobody waits and the pool is empty: collect what is done, so that the batch gets going. */
    if (queue->pending[batch->direction] && !queue->has_leader) {
        lead(queue, NULL, 0);
        pthread_cond_broadcast(&queue->changed); /* whoever came to wait meanwhile leads now */
    }
    pthread_mutex_unlock(&queue->lock);
}

static int wait_for_leader(struct db_queue *queue, int64_t deadline_ns)
{
    struct timespec until = {deadline_ns / 1000000000, deadline_ns % 1000000000};
    if (queue->followers++ == 0 && queue->config.engine->hurry)
        queue->config.engine->hurry(queue->engine);
    int rc = deadline_ns == INT64_MAX
                 ? pthread_cond_wait(&queue->changed, &queue->lock)
                 : pthread_cond_timedwait(&queue->changed, &queue->lock, &until);
    queue->followers--;
    return rc;
}

int db_queue_wait(struct db_queue *queue, struct db_batch *batch, int64_t timeout_ns)
{
    int64_t deadline_ns = timeout_ns < 0 ? INT64_MAX : db_deadline_ns(timeout_ns);
    int64_t left_ns = timeout_ns;
    int rc = 0;
    pthread_mutex_lock(&queue->lock);
    while (!is_done(batch)) {
        if (queue->has_leader) {
            if (wait_for_leader(queue, deadline_ns) == ETIMEDOUT && !is_done(batch))
                rc = -ETIMEDOUT;
        } else {
            rc = lead(queue, batch, left_ns);
        }
        if (rc || is_done(batch))
            break;
        if (timeout_ns >= 0) {
            left_ns = deadline_ns - db_now_ns();
            if (left_ns <= 0) {
                rc = -ETIMEDOUT;
                break;
            }
        }
    }
    pthread_cond_broadcast(&queue->changed); /* somebody else may have to lead now */
    pthread_mutex_unlock(&queue->lock);
    return rc;
}

/* ---- open and close -------------------------------------------------------------------------- */

/* Small, so that many are in flight: what is copied is not worth large requests. */
static uint32_t slot_length(const struct db_queue_config *config)
{
    uint64_t length = SLOT_BYTES < config->staging_bytes ? SLOT_BYTES : config->staging_bytes;
    if (config->request_bytes > 0 && config->request_bytes < length)
        length = config->request_bytes;
    return length > config->chunk_bytes
               ? (uint32_t)(length / config->chunk_bytes * config->chunk_bytes)
               : config->chunk_bytes;
}

static int allocate_pool(struct db_queue *queue)
{
    const struct db_queue_config *config = &queue->config;
    queue->requests = calloc(config->depth, sizeof(*queue->requests));
    if (!queue->requests)
        return -ENOMEM;
    for (uint32_t i = 0; i < config->depth; i++) {
        queue->requests[i].next = queue->free_requests;
        queue->free_requests = &queue->requests[i];
    }
    if (config->staging_bytes == 0)
        return 0;
    queue->slot_bytes = slot_length(config);
    uint64_t slots = config->staging_bytes / queue->slot_bytes;
    queue->free_slots = calloc(slots, sizeof(*queue->free_slots));
    if (!queue->free_slots)
        return -ENOMEM;
    void *memory;
    int rc = db_memory_map(slots * queue->slot_bytes, &memory);
    if (rc)
        return rc;
    queue->staging = memory;
    queue->staging_length = slots * queue->slot_bytes;
    for (uint64_t i = 0; i < slots; i++)
        queue->free_slots[queue->free_slot_count++] = queue->staging + i * queue->slot_bytes;
    return 0;
}

static uint64_t region_bytes(const struct db_queue *queue)
{
    const struct db_engine_ops *engine = queue->config.engine;
    return engine->region_bytes ? engine->region_bytes(queue->engine) : REGION_DEFAULT_BYTES;
}

static int register_region(struct db_queue *queue, void *memory, uint64_t length)
{
    const struct db_engine_ops *engine = queue->config.engine;
    pthread_mutex_lock(&queue->lock);
    int32_t slot = db_regions_take_slot(&queue->regions);
    pthread_mutex_unlock(&queue->lock);
    if (slot == DB_REGION_NONE)
        return -ENOSPC;
    /* Without the lock: pinning gigabytes takes a while. The slot is ours alone. */
    int rc = engine->add_memory(queue->engine, slot, memory, length);
    pthread_mutex_lock(&queue->lock);
    if (rc)
        db_regions_give_slot(&queue->regions, slot);
    else {
        db_regions_insert(&queue->regions, memory, length, slot);
        queue->registered_bytes += length;
    }
    pthread_mutex_unlock(&queue->lock);
    return rc;
}

static int unregister_region(struct db_queue *queue, void *memory, uint64_t length)
{
    pthread_mutex_lock(&queue->lock);
    int32_t slot = db_regions_remove(&queue->regions, memory, length);
    if (slot != DB_REGION_NONE) {
        /* Requests that are staged with this slot must reach the kernel before it is empty. */
        queue->config.engine->commit(queue->engine);
        queue->config.engine->remove_memory(queue->engine, slot);
        db_regions_give_slot(&queue->regions, slot);
        queue->registered_bytes -= length;
    }
    pthread_mutex_unlock(&queue->lock);
    return slot == DB_REGION_NONE ? -ENOENT : 0;
}

/* A request across the border of two regions goes unregistered. */
int db_queue_register(struct db_queue *queue, void *memory, uint64_t length)
{
    uint64_t each = region_bytes(queue);
    uint64_t at = 0;
    int rc = length > 0 && memory ? 0 : -EINVAL;
    if (!rc && !queue->config.engine->add_memory)
        rc = -EOPNOTSUPP;
    for (; !rc && at < length; at += rc ? 0 : each)
        rc = register_region(queue, (char *)memory + at, least(length - at, each));
    if (rc)
        for (uint64_t done = 0; done < at; done += each)
            unregister_region(queue, (char *)memory + done, least(length - done, each));
    return rc;
}

int db_queue_unregister(struct db_queue *queue, void *memory, uint64_t length)
{
    uint64_t each = region_bytes(queue);
    int rc = length > 0 ? 0 : -ENOENT;
    for (uint64_t at = 0; !rc && at < length; at += each)
        rc = unregister_region(queue, (char *)memory + at, least(length - at, each));
    return rc;
}

/* As much of it as RLIMIT_MEMLOCK allows. With the rest each request looks its pages up: slower, no
 * less. */
static void register_staging(struct db_queue *queue)
{
    uint64_t length = queue->staging_length;
    while (length >= queue->slot_bytes &&
           db_queue_register(queue, queue->staging, length) == -ENOMEM)
        length /= 2;
}

static void free_pool(struct db_queue *queue)
{
    if (queue->staging)
        db_memory_unmap(queue->staging, queue->staging_length);
    free(queue->free_slots);
    free(queue->requests);
    pthread_cond_destroy(&queue->changed);
    pthread_mutex_destroy(&queue->lock);
    free(queue);
}

int db_queue_open(const struct db_queue_config *config, struct db_queue **out)
{
    assert(config->request_bytes % config->chunk_bytes == 0);
    struct db_queue *queue = calloc(1, sizeof(*queue));
    if (!queue)
        return -ENOMEM;
    queue->config = *config;
    for (int direction = DB_READ; direction <= DB_WRITE; direction++) {
        queue->pending_end[direction] = &queue->pending[direction];
        db_request_size_open(&queue->sizes[direction], config->request_bytes,
                             config->chunk_bytes);
    }
    memcpy(queue->fds, config->fds, config->stripes.member_count * sizeof(config->fds[0]));
    queue->config.fds = queue->fds;
    if (config->windows) {
        memcpy(queue->windows, config->windows,
               config->stripes.member_count * sizeof(config->windows[0]));
        queue->config.windows = queue->windows;
    }
    pthread_mutex_init(&queue->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&queue->changed, &attributes);
    pthread_condattr_destroy(&attributes);

    int rc = allocate_pool(queue);
    if (!rc) {
        struct db_engine_config engine = {
            .fds = queue->fds,
            .spaces = config->spaces,
            .fd_count = config->stripes.member_count,
            .depth = config->depth,
            .threads = config->threads,
            .is_buffered = config->is_buffered,
            .sqpoll = config->sqpoll,
            .iopoll = config->iopoll,
            .before = db_piece_prepare,
            .after = db_piece_finish,
            .copy = db_piece_copy,
            .find_run = db_piece_find_run,
            .windows = queue->config.windows,
            .context = queue,
        };
        rc = config->engine->open(&engine, &queue->engine);
    }
    if (rc) {
        free_pool(queue);
        return rc;
    }
    queue->config.spaces = NULL; /* the caller's */
    if (queue->staging)
        register_staging(queue);
    *out = queue;
    return 0;
}

void db_queue_close(struct db_queue *queue)
{
    int rc = 0;
    pthread_mutex_lock(&queue->lock);
    while (!rc && (queue->in_flight > 0 || queue->pending[DB_READ] || queue->pending[DB_WRITE])) {
        if (queue->has_leader)
            wait_for_leader(queue, INT64_MAX);
        else
            rc = lead(queue, NULL, -1);
    }
    assert(!queue->has_leader);
    pthread_mutex_unlock(&queue->lock);
    if (rc) /* The kernel does not say what it still does with this memory: it stays. */
        return;
    queue->config.engine->close(queue->engine);
    free_pool(queue);
}

int db_queue_probe(struct db_queue *queue)
{
    const struct db_stripes *stripes = &queue->config.stripes;
    struct db_io ios[DB_MEMBERS_MAX];
    void *memory;
    int rc = db_memory_map(stripes->member_count * DB_BLOCK_BYTES, &memory);
    if (rc)
        return rc;
    for (uint32_t i = 0; i < stripes->member_count; i++)
        ios[i] = (struct db_io){.offset = i * stripes->unit_bytes,
                                .buffer = (uint8_t *)memory + i * DB_BLOCK_BYTES,
                                .length = DB_BLOCK_BYTES};
    struct db_batch batch = {.direction = DB_READ, .ios = ios, .io_count = stripes->member_count};
    db_queue_submit(queue, &batch);
    rc = db_queue_wait(queue, &batch, -1);
    assert(!rc); /* every engine tries its system calls before its open() returns 0 */
    db_memory_unmap(memory, stripes->member_count * DB_BLOCK_BYTES);
    memset(&queue->stats, 0, sizeof(queue->stats));
    for (uint32_t i = 0; !rc && i < stripes->member_count; i++)
        rc = ios[i].error;
    return rc;
}

void db_queue_abandon(struct db_queue *queue)
{
    queue->config.engine->abandon(queue->engine);
}

const char *db_queue_engine_name(const struct db_queue *queue)
{
    return queue->config.engine->name;
}

void db_queue_stats(struct db_queue *queue, struct db_path_stats *out)
{
    pthread_mutex_lock(&queue->lock);
    *out = queue->stats;
    out->in_flight = queue->in_flight;
    out->registered_bytes = queue->registered_bytes;
    out->read_request_bytes = queue->sizes[DB_READ].now_bytes;
    out->write_request_bytes = queue->sizes[DB_WRITE].now_bytes;
    pthread_mutex_unlock(&queue->lock);
}
