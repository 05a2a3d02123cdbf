/* queue.c - batches become requests: splitting, staging, resuming short I/O, completion.
 *
 * A batch lists contiguous runs. Each is carved into pieces of at most request_bytes; a piece takes
 * a request from a fixed pool and, where direct I/O cannot use the caller's memory (its address or
 * its length is not aligned), a slot of staging memory, which is smaller than a large request. A
 * piece holds whole checksum chunks, so that no two requests share one.
 *
 * There is no thread here. Whoever waits drives: the first waiter becomes the leader and reaps from
 * the engine for everybody, the others sleep until a batch is done or the leader leaves. So one
 * thread alone pays for no hand-over, and many threads can submit and wait at once.
 *
 * Locking: one mutex for the pool, the lists and the counters. It is never held across a wait in
 * the kernel, a copy or a checksum. */
#define _GNU_SOURCE
#include "queue.h"

#include "clock.h"
#include "counters.h"
#include "request_size.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    /* Prepared before the kernel is told, so that checksums and copies overlap I/O: pieces, and
     * bytes, which are that many and one piece at most. */
    CARVE_MAX = 16,
    CARVE_BYTES = 4 << 20,
    READS_IN_ROW_MAX = 16, /* while writes wait */
    /* Waited for at once, and so few of those in flight that the device does not run dry: each wait
     * in the kernel costs as much as several requests. */
    REAP_LEAST_MAX = 16,
    REAP_LEAST_OF = 8,
    /* Of reads whose bytes are looked at when they arrive, so many are at the device at most: the
     * next go out before those are looked at. Some drives tell of all they have been given at once,
     * when they have run out of work, and a queue that gave them everything would be left with all
     * of the looking at the end. It is more than a fast drive moves in two milliseconds. */
    UNSEEN_BYTES_MAX = 16 << 20,
    REAP_MAX = 64,
    SLOT_BYTES = 256 << 10, /* of staging, or one chunk where that is more */
    RETRIES_MAX = 64,    /* of a request that moved nothing: EINTR, EAGAIN, less than a block */
    /* The longest wait in the kernel. A request that the kernel would not take, when another
     * thread committed it, is the engine's to hand back and wakes nobody who waits there. */
    REAP_SLICE_NS = 100000000,
};

struct db_queue {
    struct db_queue_config config;
    int fds[DB_MEMBERS_MAX];
    struct db_engine *engine;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a batch is done, or there is no leader */
    bool has_leader;
    uint32_t followers; /* threads that wait while another leads */
    uint32_t in_flight;

    struct db_request *requests;
    struct db_request *free_requests;
    struct db_request *resumes; /* short transfers to be continued */
    /* Batches with pieces still to be carved. Reads go first, because somebody computes with what
     * they bring, but not for ever. */
    struct db_batch *pending[2], **pending_end[2];
    uint32_t reads_in_row;
    /* Of reads at the device that finish() has work with. */
    uint64_t unseen_bytes;
    uint32_t unseen_count;
    struct db_request_size sizes[2];

    uint8_t *staging;
    uint64_t staging_length;
    uint32_t slot_bytes;
    uint8_t **free_slots;
    uint32_t free_slot_count;
    struct db_regions regions; /* registered memory */
    uint64_t registered_bytes;

    struct db_path_stats stats;
};

static uint64_t round_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

/* ---- what is done to the bytes, outside the lock --------------------------------------------- */

static void prepare(struct db_request *request, void *context)
{
    struct db_queue *queue = context;
    if (request->prepared || request->direction == DB_READ)
        return;
    if (request->checksums)
        db_checksum_chunks(request->user, request->user_bytes, queue->config.chunk_bytes,
                           request->checksums);
    if (request->staging) {
        memcpy(request->staging, request->user, request->user_bytes);
        memset(request->staging + request->user_bytes, 0,
               request->piece_bytes - request->user_bytes);
    }
    request->prepared = true;
}

/* A chunk at a time, so that the copy and its checksum read the bytes once from memory. */
static void finish(struct db_request *request, void *context)
{
    struct db_queue *queue = context;
    if (request->direction == DB_WRITE || request->result < 0 ||
        request->moved_bytes + (uint64_t)request->result < request->piece_bytes)
        return;
    uint32_t chunk_bytes = queue->config.chunk_bytes;
    for (uint32_t at = 0, i = 0; at < request->user_bytes; at += chunk_bytes, i++) {
        uint32_t left = request->user_bytes - at;
        uint32_t length = left < chunk_bytes ? left : chunk_bytes;
        if (request->staging)
            memcpy(request->user + at, request->staging + at, length);
        if (request->checksums &&
            db_checksum(request->user + at, length) != request->checksums[i]) {
            request->moved_bytes = at; /* where it is wrong, for the message */
            request->result = -EBADMSG;
            return;
        }
    }
}

static bool needs_finish(const struct db_request *request)
{
    return request->direction == DB_READ && (request->checksums || request->staging);
}

/* ---- carving (lock held) --------------------------------------------------------------------- */

/* How much of the `left` bytes at `memory` the next piece takes, at most `limit`, and whether
 * through staging. Only what is not aligned goes there: of a run that ends within a block, the
 * last chunk. */
static uint32_t piece_length(const struct db_queue *queue, const void *memory, uint64_t left,
                             uint64_t limit, bool *staged)
{
    const struct db_queue_config *config = &queue->config;
    *staged = (uintptr_t)memory % config->memory_align_bytes != 0;
    if (!*staged && left <= limit && left % config->lba_bytes != 0) {
        *staged = left <= config->chunk_bytes;
        if (!*staged)
            left = (left - 1) / config->chunk_bytes * config->chunk_bytes;
    }
    if (*staged && limit > queue->slot_bytes)
        limit = queue->slot_bytes;
    return (uint32_t)(left < limit ? left : limit);
}

/* Moves the batch's cursor to the next byte that needs a request; false when there is none. */
static bool find_piece(struct db_batch *batch)
{
    while (batch->next_io < batch->io_count) {
        const struct db_io *io = &batch->ios[batch->next_io];
        if (batch->next_byte < io->length && !io->error)
            return true;
        batch->next_io++;
        batch->next_byte = 0;
    }
    return false;
}

/* At what has not moved yet, as far as it lies side by side on one member. */
static void point_at_rest(const struct db_queue *queue, struct db_request *request)
{
    const struct db_stripes *stripes = &queue->config.stripes;
    uint8_t *memory = request->staging ? request->staging : request->user;
    request->buffer = memory + request->moved_bytes;
    request->offset = request->piece_offset + request->moved_bytes;
    request->length = request->piece_bytes - request->moved_bytes;
    if (stripes->member_count > 1) {
        struct db_place place = db_stripes_find(stripes, request->offset);
        request->file = place.member;
        request->offset = place.offset;
        if (request->length > place.left)
            request->length = (uint32_t)place.left;
    }
    request->fd = queue->fds[request->file];
}

/* At most so much in one request: what the device likes, and no more than the rest of a stripe
 * unit, so that the members work on a run at the same time. Where a unit ends within a chunk that
 * has a checksum, the chunk is not broken. */
static uint64_t piece_limit(const struct db_queue *queue, const struct db_io *io, uint64_t at,
                            uint64_t limit)
{
    const struct db_stripes *stripes = &queue->config.stripes;
    if (stripes->member_count == 1)
        return limit;
    uint64_t left = db_stripes_find(stripes, io->offset + at).left;
    if (io->checksums)
        left = round_up(left, queue->config.chunk_bytes);
    return left < limit ? left : limit;
}

/* The next piece of the batch as a request; NULL when a request or a staging slot is lacking. */
static struct db_request *carve(struct db_queue *queue, struct db_batch *batch)
{
    struct db_io *io = &batch->ios[batch->next_io];
    uint8_t *user = (uint8_t *)io->buffer + batch->next_byte;
    struct db_request_size *size = &queue->sizes[batch->direction];
    uint64_t limit = piece_limit(queue, io, batch->next_byte, size->now_bytes);
    bool staged;
    uint32_t length = piece_length(queue, user, io->length - batch->next_byte, limit, &staged);
    if (!queue->free_requests || (staged && queue->free_slot_count == 0))
        return NULL;

    struct db_request *request = queue->free_requests;
    queue->free_requests = request->next;
    assert(!request->busy);
    uint64_t chunk = batch->next_byte / queue->config.chunk_bytes;
    *request = (struct db_request){
        .direction = batch->direction,
        .batch = batch,
        .io = io,
        .user = user,
        .user_bytes = length,
        .piece_offset = io->offset + batch->next_byte,
        .piece_bytes = (uint32_t)round_up(length, queue->config.lba_bytes),
        .staging = staged ? queue->free_slots[--queue->free_slot_count] : NULL,
        .checksums = io->checksums ? io->checksums + chunk : NULL,
        .size_tag = io->length >= DB_REQUEST_MOST_BYTES ? size->tag : 0,
        .busy = true,
    };
    if (request->size_tag && db_request_size_is_waiting(size))
        db_request_size_started(size, db_now_ns());
    point_at_rest(queue, request);
    request->slot = db_regions_find(&queue->regions, request->buffer, request->piece_bytes);
    assert(request->offset % queue->config.lba_bytes == 0);
    assert(request->length % queue->config.lba_bytes == 0);
    batch->next_byte += length;
    batch->in_flight++;
    queue->in_flight++;
    atomic_fetch_add_explicit(&db_live_requests, 1, memory_order_relaxed);
    return request;
}

static void batch_finished(struct db_queue *queue)
{
    atomic_fetch_sub_explicit(&db_live_batches, 1, memory_order_relaxed);
    pthread_cond_broadcast(&queue->changed);
}

/* The next piece of the batches of one direction; NULL if there is none, or no room for it. */
static struct db_request *carve_from(struct db_queue *queue, enum db_direction direction)
{
    struct db_batch *batch;
    while ((batch = queue->pending[direction])) {
        if (find_piece(batch))
            return carve(queue, batch);
        queue->pending[direction] = batch->next;
        if (!batch->next)
            queue->pending_end[direction] = &queue->pending[direction];
        batch->issued = true;
        if (batch->in_flight == 0)
            batch_finished(queue);
    }
    return NULL;
}

static bool has_enough_unseen(const struct db_queue *queue)
{
    return queue->unseen_bytes >= UNSEEN_BYTES_MAX ||
           (queue->unseen_count > 0 && queue->unseen_count >= queue->config.depth / 2);
}

static struct db_request *carve_next(struct db_queue *queue)
{
    enum db_direction first = queue->reads_in_row < READS_IN_ROW_MAX ? DB_READ : DB_WRITE;
    struct db_request *request = NULL;
    for (int i = 0; i < 2 && !request; i++) {
        enum db_direction direction = i == 0 ? first : !first;
        if (direction == DB_WRITE || !has_enough_unseen(queue))
            request = carve_from(queue, direction);
    }
    if (!request)
        return NULL;
    bool passed_writes = request->direction == DB_READ && queue->pending[DB_WRITE];
    queue->reads_in_row = passed_writes ? queue->reads_in_row + 1 : 0;
    return request;
}

static uint32_t carve_some(struct db_queue *queue, struct db_request **out)
{
    uint32_t count = 0;
    uint64_t bytes = 0;
    while (count < CARVE_MAX && bytes < CARVE_BYTES) {
        struct db_request *request = queue->resumes;
        if (request)
            queue->resumes = request->next;
        else
            request = carve_next(queue);
        if (!request)
            break;
        bytes += request->length;
        if (needs_finish(request)) {
            queue->unseen_bytes += request->length;
            queue->unseen_count++;
        }
        out[count++] = request;
    }
    return count;
}

/* Whether prepare() would do something: it is worth letting the lock go for that alone. */
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
    struct db_request *some[CARVE_MAX];
    uint32_t count;
    do {
        count = carve_some(queue, some);
        if (!queue->config.engine->has_threads && have_work(some, count)) {
            pthread_mutex_unlock(&queue->lock);
            for (uint32_t i = 0; i < count; i++)
                prepare(some[i], queue);
            pthread_mutex_lock(&queue->lock);
        }
        for (uint32_t i = 0; i < count; i++)
            queue->config.engine->queue(queue->engine, some[i]);
        /* Even with nothing new: the kernel may now take what it would not take before. */
        queue->stats.submits += queue->config.engine->commit(queue->engine);
    } while (count > 0);
}

/* ---- completion ------------------------------------------------------------------------------ */

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
        batch_finished(queue);
}

static void fail(struct db_queue *queue, struct db_request *request, int error)
{
    /* Pieces end in any order: what is reported is where the trouble begins. */
    uint64_t offset = request->piece_offset + request->moved_bytes;
    if (!request->io->error || offset < request->io->error_offset) {
        request->io->error = error;
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
    point_at_rest(queue, request);
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
 * finish() has work with any of it. */
static bool count_seen(struct db_queue *queue, struct db_request *const *done, int count)
{
    bool has_work = false;
    for (int i = 0; i < count; i++) {
        if (!needs_finish(done[i]))
            continue;
        assert(queue->unseen_count > 0 && queue->unseen_bytes >= done[i]->length);
        queue->unseen_bytes -= done[i]->length;
        queue->unseen_count--;
        has_work = true;
    }
    return has_work;
}

/* How many completions are worth waiting for, to a thread that waits for this batch alone. */
static uint32_t least_to_reap(const struct db_queue *queue, const struct db_batch *batch)
{
    uint32_t least = batch && queue->followers == 0 ? batch->in_flight / REAP_LEAST_OF : 0;
    if (least > REAP_LEAST_MAX)
        return REAP_LEAST_MAX;
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
    if (timeout_ns < 0 || timeout_ns > REAP_SLICE_NS)
        timeout_ns = REAP_SLICE_NS;
    pthread_mutex_unlock(&queue->lock);
    int count = queue->config.engine->reap(queue->engine, done, least, REAP_MAX, timeout_ns);
    pthread_mutex_lock(&queue->lock);
    if (count_seen(queue, done, count) && !queue->config.engine->has_threads) {
        pump(queue);
        pthread_mutex_unlock(&queue->lock);
        for (int i = 0; i < count; i++)
            finish(done[i], queue);
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
    if (count < 0 && count != -EINTR)
        return count;
    return 0;
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
    queue->followers++;
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

int db_queue_register(struct db_queue *queue, void *memory, uint64_t length)
{
    const struct db_engine_ops *engine = queue->config.engine;
    if (length == 0 || !memory)
        return -EINVAL;
    if (!engine->add_memory)
        return -EOPNOTSUPP;
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

int db_queue_unregister(struct db_queue *queue, void *memory, uint64_t length)
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
            .fd_count = config->stripes.member_count,
            .depth = config->depth,
            .threads = config->threads,
            .sqpoll = config->sqpoll,
            .iopoll = config->iopoll,
            .before = prepare,
            .after = finish,
            .context = queue,
        };
        rc = config->engine->open(&engine, &queue->engine);
    }
    if (rc) {
        free_pool(queue);
        return rc;
    }
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
