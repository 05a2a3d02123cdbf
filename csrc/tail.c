/* tail.c - the end of a growing run of bytes, held back until it fills a block.
 *
 * Direct I/O moves whole blocks, and a row appended to a run is often less than one. Reading the
 * last block back to complete it would cost a read for each write, so its bytes wait here and are
 * written once, with the block that they are part of. */

#include "copy.h"
#include "counters.h"
#include "dualblade.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL /* why: see checksum.c */
#include <xxhash.h>

struct db_tail {
    /* Two, because a block that was handed out to be written must stay as it is until the next
     * call, while the bytes that follow it are already held. */
    _Alignas(DB_BLOCK_BYTES) uint8_t blocks[2][DB_BLOCK_BYTES];
    XXH3_state_t state; /* of the stored bytes of the chunk that byte `stored` is in */
    uint64_t stored;
    uint32_t held; /* bytes of blocks[current] in use; the others are zero */
    uint32_t chunk_bytes;
    uint32_t current;
};

static void check(const struct db_tail *tail)
{
    assert(tail->stored % DB_BLOCK_BYTES == 0);
    assert(tail->held < DB_BLOCK_BYTES);
    assert(tail->current < 2);
}

static void hold(struct db_tail *tail, const uint8_t *data, uint32_t length)
{
    uint8_t *block = tail->blocks[tail->current];

    assert(length < DB_BLOCK_BYTES);
    if (length > 0)
        memcpy(block, data, length);
    memset(block + length, 0, DB_BLOCK_BYTES - length);
    tail->held = length;
}

int db_tail_open(uint32_t chunk_bytes, struct db_tail **out)
{
    assert(out != NULL);
    if (chunk_bytes < DB_BLOCK_BYTES || (chunk_bytes & (chunk_bytes - 1)) != 0)
        return -EINVAL;

    struct db_tail *tail = aligned_alloc(_Alignof(struct db_tail), sizeof *tail);
    if (tail == NULL)
        return -ENOMEM;
    tail->chunk_bytes = chunk_bytes;
    db_tail_reset(tail, 0, NULL);
    atomic_fetch_add(&db_live_tails, 1);
    *out = tail;
    return 0;
}

void db_tail_close(struct db_tail *tail)
{
    if (tail == NULL)
        return;
    check(tail);
    int64_t before = atomic_fetch_sub(&db_live_tails, 1);
    assert(before > 0);
    free(tail);
}

void db_tail_reset(struct db_tail *tail, uint64_t stored, const void *chunk)
{
    uint64_t begun = stored % tail->chunk_bytes;

    assert(stored % DB_BLOCK_BYTES == 0);
    assert(chunk != NULL || begun == 0);
    XXH3_64bits_reset(&tail->state);
    if (begun > 0)
        XXH3_64bits_update(&tail->state, chunk, begun);
    tail->stored = stored;
    tail->current = 0;
    hold(tail, NULL, 0);
    check(tail);
}

/* The checksum of a chunk that nothing was stored of before. */
static uint64_t whole_chunk(const uint8_t *data, uint64_t length, uint8_t *copy)
{
    if (!copy)
        return db_checksum(data, length);
    if (db_copy_is_fast()) /* a drive reads the copy from memory, or the kernel much later */
        return db_copy_checksum(copy, data, length, true);
    memcpy(copy, data, length);
    return db_checksum(copy, length);
}

/* Counts whole blocks as stored, adding the checksum of each chunk that they complete. */
static void store(struct db_tail *tail, const uint8_t *data, uint64_t length, uint8_t *copy,
                  struct db_tail_write *out, uint64_t *digests)
{
    assert(length % DB_BLOCK_BYTES == 0);
    while (length > 0) {
        uint64_t room = tail->chunk_bytes - tail->stored % tail->chunk_bytes;
        uint64_t part = length < room ? length : room;

        if (part == tail->chunk_bytes) {
            digests[out->digest_count++] = whole_chunk(data, part, copy);
        } else {
            if (copy)
                memcpy(copy, data, part);
            XXH3_64bits_update(&tail->state, data, part);
            if (part == room) {
                digests[out->digest_count++] = XXH3_64bits_digest(&tail->state);
                XXH3_64bits_reset(&tail->state);
            }
        }
        tail->stored += part;
        data += part;
        if (copy)
            copy += part;
        length -= part;
    }
}

void db_tail_append(struct db_tail *tail, const void *data, uint64_t length, void *copy,
                    struct db_tail_write *out, uint64_t *digests)
{
    const uint8_t *bytes = data;
    uint8_t *copied = copy;
    uint64_t stored_before = tail->stored;
    uint64_t used = 0;

    check(tail);
    assert(length <= INT64_MAX);
    assert(bytes != NULL || length == 0);
    *out = (struct db_tail_write){.first_chunk = stored_before / tail->chunk_bytes};

    if (length < DB_BLOCK_BYTES - tail->held) {
        if (length > 0)
            memcpy(tail->blocks[tail->current] + tail->held, bytes, length);
        if (copied && length > 0)
            memcpy(copied, bytes, length);
        tail->held += (uint32_t)length;
        return;
    }
    if (tail->held > 0) {
        uint8_t *block = tail->blocks[tail->current];

        used = DB_BLOCK_BYTES - tail->held;
        memcpy(block + tail->held, bytes, used);
        if (copied)
            memcpy(copied, bytes, used);
        out->head = block;
        out->head_offset = tail->stored;
        store(tail, block, DB_BLOCK_BYTES, NULL, out, digests);
        tail->current ^= 1;
    }
    out->body_bytes = (length - used) / DB_BLOCK_BYTES * DB_BLOCK_BYTES;
    if (out->body_bytes > 0) {
        out->body_offset = tail->stored;
        out->body_start = used;
        store(tail, bytes + used, out->body_bytes, copied ? copied + used : NULL, out, digests);
        used += out->body_bytes;
    }
    hold(tail, bytes + used, (uint32_t)(length - used));
    if (copied && length > used)
        memcpy(copied + used, bytes + used, length - used);
    if (tail->stored % tail->chunk_bytes != 0)
        digests[out->digest_count++] = XXH3_64bits_digest(&tail->state);

    check(tail);
    assert(tail->stored > stored_before);
    assert(out->digest_count >= 1);
    assert(out->digest_count <= length / tail->chunk_bytes + 2);
}

uint64_t db_tail_stored(const struct db_tail *tail)
{
    return tail->stored;
}

uint32_t db_tail_held(const struct db_tail *tail)
{
    return tail->held;
}

const void *db_tail_block(const struct db_tail *tail)
{
    return tail->blocks[tail->current];
}

uint64_t db_tail_digest(const struct db_tail *tail)
{
    XXH3_state_t state;

    check(tail);
    XXH3_copyState(&state, &tail->state);
    if (tail->held > 0)
        XXH3_64bits_update(&state, tail->blocks[tail->current], tail->held);
    return XXH3_64bits_digest(&state);
}
