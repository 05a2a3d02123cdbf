/* pieces.c - batches are carved into the pieces that requests carry, and what is done to the bytes.
 *
 * A piece is a part of a contiguous run, of at most request_bytes. It holds whole checksum chunks,
 * so that no two requests share one. Where direct I/O cannot use the caller's memory (its address
 * or its length is not aligned) it has a slot of staging memory, which is smaller than a large
 * request. */
#define _GNU_SOURCE
#include "queue_state.h"

#include "clock.h"
#include "copy.h"
#include "counters.h"

#include <errno.h>
#include <string.h>

enum {
    /* Prepared before the kernel is told, so that checksums and copies overlap I/O: bytes, which
     * are that many and one piece at most. */
    CARVE_BYTES = 4 << 20,
    READS_IN_ROW_MAX = 16, /* while writes wait */
    /* Of reads that somebody waits for and whose bytes are looked at when they arrive, so many are
     * at the device at most: the next go out before those are looked at. Some drives tell of all
     * they have been given at once, when they have run out of work, and a queue that gave them
     * everything would be left with all of the looking at the end. It is more than a fast drive
     * moves in two milliseconds. */
    UNSEEN_BYTES_MAX = 16 << 20,
    /* A read that nobody waits for yet goes out whole, but not before those in front of it are down
     * to so many bytes. A drive that has more to do than that gains nothing; it may share its time
     * between them, and one that tells of everything at once keeps back what is wanted first. */
    AHEAD_BYTES_MAX = 48 << 20,
    /* A run of so many bytes is through the processor's cache before anybody looks at its
     * beginning: its copy goes to memory at once. */
    PAST_CACHE_BYTES = 4 << 20,
};

static uint64_t round_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

/* ---- what is done to the bytes, outside the lock --------------------------------------------- */

void db_piece_prepare(struct db_request *request, void *context)
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

bool db_piece_find_run(const struct db_request *request, uint64_t *start, uint64_t *end,
                       const void *context)
{
    const struct db_queue *queue = context;
    *start = request->io->offset;
    *end = request->io->offset + request->io->length;
    return queue->config.stripes.member_count == 1;
}

void db_piece_copy(struct db_request *request, const void *from, void *context)
{
    const struct db_queue *queue = context;
    uint32_t chunk_bytes = queue->config.chunk_bytes;
    bool past_cache = request->io->length >= PAST_CACHE_BYTES;
    assert(request->moved_bytes == 0 && request->length == request->user_bytes);
    request->prepared = true;
    request->result = request->length;
    for (uint32_t at = 0, i = 0; at < request->length; at += chunk_bytes, i++) {
        uint32_t left = request->length - at;
        uint32_t length = left < chunk_bytes ? left : chunk_bytes;
        uint64_t checksum = db_copy_checksum(request->user + at, (const uint8_t *)from + at, length,
                                             past_cache);
        if (request->checksums && checksum != request->checksums[i]) {
            request->moved_bytes = at;
            request->result = -EBADMSG;
            return;
        }
    }
}

/* A chunk at a time, so that the copy and its checksum read the bytes once from memory. */
void db_piece_finish(struct db_request *request, void *context)
{
    struct db_queue *queue = context;
    if (request->direction == DB_WRITE || request->result < 0 || request->prepared ||
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

bool db_piece_needs_finish(const struct db_request *request)
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
void db_piece_point_at_rest(const struct db_queue *queue, struct db_request *request)
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
        .is_tail = batch->is_tail,
        .size_tag = io->length >= DB_REQUEST_MOST_BYTES ? size->tag : 0,
        .busy = true,
    };
    if (request->size_tag && db_request_size_is_waiting(size))
        db_request_size_started(size, db_now_ns());
    db_piece_point_at_rest(queue, request);
    request->slot = db_regions_find(&queue->regions, request->buffer, request->piece_bytes);
    request->by_block_device =
        queue->config.coherence &&
        db_coherence_has(queue->config.coherence, request->piece_offset, request->piece_bytes);
    assert(request->offset % queue->config.lba_bytes == 0);
    assert(request->length % queue->config.lba_bytes == 0);
    batch->next_byte += length;
    batch->in_flight++;
    queue->in_flight++;
    atomic_fetch_add_explicit(&db_live_requests, 1, memory_order_relaxed);
    return request;
}

bool db_piece_is_unseen(const struct db_queue *queue, const struct db_request *request)
{
    return db_piece_needs_finish(request) && !request->batch->is_ahead &&
           !queue->config.engine->has_threads;
}

bool db_piece_is_ahead(const struct db_queue *queue, const struct db_request *request)
{
    return request->direction == DB_READ && request->batch->is_ahead &&
           !queue->config.engine->has_threads;
}

static bool has_enough_unseen(const struct db_queue *queue)
{
    return queue->unseen_bytes >= UNSEEN_BYTES_MAX ||
           (queue->unseen_count > 0 && queue->unseen_count >= queue->config.depth / 2);
}

/* Whether a batch is to wait for what is at the device, though there is room for it. */
static bool is_held_back(const struct db_queue *queue, const struct db_batch *batch)
{
    if (batch->direction == DB_WRITE)
        return false;
    if (!batch->is_ahead)
        return has_enough_unseen(queue);
    bool is_begun = batch->in_flight > 0 || batch->next_io > 0 || batch->next_byte > 0;
    return !is_begun && queue->ahead_bytes > AHEAD_BYTES_MAX;
}

/* The next piece of the batches of one direction; NULL if there is none, or no room for it. */
static struct db_request *carve_from(struct db_queue *queue, enum db_direction direction)
{
    struct db_batch *batch;
    while ((batch = queue->pending[direction])) {
        if (find_piece(batch))
            return is_held_back(queue, batch) ? NULL : carve(queue, batch);
        queue->pending[direction] = batch->next;
        if (!batch->next)
            queue->pending_end[direction] = &queue->pending[direction];
        batch->issued = true;
        if (batch->in_flight == 0)
            db_queue_batch_finished(queue);
    }
    return NULL;
}

static struct db_request *carve_next(struct db_queue *queue)
{
    enum db_direction first = queue->reads_in_row < READS_IN_ROW_MAX ? DB_READ : DB_WRITE;
    struct db_request *request = carve_from(queue, first);
    if (!request)
        request = carve_from(queue, !first);
    if (!request)
        return NULL;
    bool passed_writes = request->direction == DB_READ && queue->pending[DB_WRITE];
    queue->reads_in_row = passed_writes ? queue->reads_in_row + 1 : 0;
    return request;
}

uint32_t db_pieces_carve(struct db_queue *queue, struct db_request **out)
{
    uint32_t count = 0;
    uint64_t bytes = 0;
    while (count < DB_CARVE_MAX && bytes < CARVE_BYTES) {
        struct db_request *request = queue->resumes;
        if (request)
            queue->resumes = request->next;
        else
            request = carve_next(queue);
        if (!request)
            break;
        bytes += request->length;
        if (db_piece_is_unseen(queue, request)) {
            queue->unseen_bytes += request->length;
            queue->unseen_count++;
        }
        if (db_piece_is_ahead(queue, request))
            queue->ahead_bytes += request->length;
        out[count++] = request;
    }
    return count;
}
