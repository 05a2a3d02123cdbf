/* test_tail.c - a growing run, rebuilt from the writes that its tail asks for. */

#include "check.h"
#include "dualblade.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

enum { RUN_BYTES = 1 << 20 };

/* The oracle: all that was appended, what of it is on the device, and the checksums of that. */
struct run {
    struct db_tail *tail;
    uint32_t chunk_bytes;
    uint64_t length; /* appended */
    uint8_t bytes[RUN_BYTES];
    uint8_t device[RUN_BYTES];
    uint64_t digests[RUN_BYTES / DB_BLOCK_BYTES];
    /* Written to the device only just before the next call: until then it has to stay valid. */
    const void *head;
    uint64_t head_offset;
};

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static void write_head(struct run *run)
{
    if (run->head != NULL)
        memcpy(run->device + run->head_offset, run->head, DB_BLOCK_BYTES);
    run->head = NULL;
}

static void check_run(struct run *run)
{
    uint64_t stored = run->length / DB_BLOCK_BYTES * DB_BLOCK_BYTES;
    uint32_t held = (uint32_t)(run->length - stored);
    uint64_t last = stored / run->chunk_bytes * run->chunk_bytes;
    const uint8_t *block = db_tail_block(run->tail);

    CHECK_EQUAL(db_tail_stored(run->tail), stored);
    CHECK_EQUAL(db_tail_held(run->tail), held);
    CHECK(memcmp(block, run->bytes + stored, held) == 0);
    for (uint32_t i = held; i < DB_BLOCK_BYTES; i++)
        if (block[i] != 0)
            CHECK(!"the block is padded with zeros");
    CHECK_EQUAL(db_tail_digest(run->tail), db_checksum(run->bytes + last, run->length - last));
}

/* The device and the checksums of it, of all that is stored. */
static void check_device(struct run *run)
{
    uint64_t stored = db_tail_stored(run->tail);

    CHECK(run->head == NULL);
    CHECK(memcmp(run->device, run->bytes, stored) == 0);
    for (uint64_t at = 0; at < stored; at += run->chunk_bytes)
        CHECK_EQUAL(run->digests[at / run->chunk_bytes],
                    db_checksum(run->device + at, least(run->chunk_bytes, stored - at)));
}

static void append(struct run *run, uint64_t length, uint64_t *random)
{
    uint64_t stored = db_tail_stored(run->tail);
    uint32_t held = db_tail_held(run->tail);
    uint64_t limit = length / run->chunk_bytes + 2;
    /* Allocated to their exact sizes for AddressSanitizer to see a step too far. */
    uint64_t *digests = malloc(limit * sizeof *digests);
    uint8_t *data = malloc(length);
    struct db_tail_write write;

    write_head(run);
    for (uint64_t i = 0; i < length; i++)
        data[i] = (uint8_t)check_random(random);
    memcpy(run->bytes + run->length, data, length);
    run->length += length;
    bool is_copied = check_random_below(random, 2) == 0;
    uint8_t *copy = is_copied ? malloc(length) : NULL;
    db_tail_append(run->tail, data, length, copy, &write, digests);
    if (is_copied) {
        CHECK(memcmp(copy, data, length) == 0);
        free(data);
        data = copy;
    }

    uint64_t now_stored = db_tail_stored(run->tail);
    CHECK_EQUAL(write.first_chunk, stored / run->chunk_bytes);
    CHECK_EQUAL(write.head != NULL, held > 0 && held + length >= DB_BLOCK_BYTES);
    CHECK_EQUAL(write.body_bytes, now_stored - stored - (write.head ? DB_BLOCK_BYTES : 0));
    CHECK_EQUAL(write.body_bytes % DB_BLOCK_BYTES, 0);
    if (write.head != NULL) {
        CHECK_EQUAL(write.head_offset, stored);
        CHECK_EQUAL((uintptr_t)write.head % DB_BLOCK_BYTES, 0);
    }
    if (write.body_bytes > 0) {
        CHECK_EQUAL(write.body_offset, stored + (write.head ? DB_BLOCK_BYTES : 0));
        CHECK_EQUAL(write.body_start, write.body_offset - stored - held);
        CHECK(write.body_start + write.body_bytes <= length);
        memcpy(run->device + write.body_offset, data + write.body_start, write.body_bytes);
    }
    uint64_t chunks = (now_stored + run->chunk_bytes - 1) / run->chunk_bytes - write.first_chunk;
    CHECK_EQUAL(write.digest_count, now_stored > stored ? chunks : 0);
    CHECK(write.digest_count <= limit);
    memcpy(run->digests + write.first_chunk, digests, write.digest_count * sizeof *digests);
    run->head = write.head;
    run->head_offset = write.head_offset;
    check_run(run);
    free(data);
    free(digests);
}

/* Back to a shorter run, as a cropped tensor is: stored blocks by reset, the rest by appending. */
static void crop(struct run *run, uint64_t length, uint64_t *random)
{
    uint64_t stored = length / DB_BLOCK_BYTES * DB_BLOCK_BYTES;
    uint64_t begun = stored % run->chunk_bytes;

    write_head(run);
    memset(run->device + stored, 0xee, RUN_BYTES - stored);
    db_tail_reset(run->tail, stored, begun > 0 ? run->device + stored - begun : NULL);
    run->length = stored;
    check_run(run);
    if (begun > 0)
        run->digests[stored / run->chunk_bytes] = db_tail_digest(run->tail);
    append(run, length - stored, random);
}

static uint64_t random_length(struct run *run, uint64_t most, uint64_t *random)
{
    static const uint64_t near[] = {DB_BLOCK_BYTES, 2 * DB_BLOCK_BYTES};
    uint64_t length;

    switch (check_random_below(random, 5)) {
    case 0: /* exactly to the end of the block, or of the chunk */
        length = run->length % 2 ? DB_BLOCK_BYTES - run->length % DB_BLOCK_BYTES
                                 : run->chunk_bytes - run->length % run->chunk_bytes;
        break;
    case 1: /* about a block */
        length = near[check_random_below(random, 2)] - 2 + check_random_below(random, 5);
        break;
    case 2:
        length = check_random_below(random, 8);
        break;
    default:
        length = check_random_below(random, most);
    }
    return least(length, RUN_BYTES - run->length);
}

static void test_random_appends(struct run *run, uint64_t *random)
{
    run->chunk_bytes = DB_BLOCK_BYTES << check_random_below(random, 6);
    run->length = 0;
    CHECK_EQUAL(db_tail_open(run->chunk_bytes, &run->tail), 0);
    memset(run->device, 0xee, RUN_BYTES);
    check_run(run);

    uint64_t most = 1u << (1 + check_random_below(random, 18));
    bool crops = check_random_below(random, 2);
    for (int step = 0; step < 200 && run->length < RUN_BYTES; step++) {
        if (crops && check_random_below(random, 16) == 0)
            crop(run, check_random_below(random, run->length + 1), random);
        else
            append(run, random_length(run, most, random), random);
        if (step % 16 == 0) {
            write_head(run);
            check_device(run);
        }
    }
    write_head(run);
    check_device(run);
    db_tail_close(run->tail);
}

static void test_token_rows(struct run *run, uint64_t *random)
{
    run->chunk_bytes = 64 * 1024;
    run->length = 0;
    CHECK_EQUAL(db_tail_open(run->chunk_bytes, &run->tail), 0);
    while (run->length + 1536 <= 256 * 1024)
        append(run, 1536, random);
    write_head(run);
    check_device(run);
    db_tail_close(run->tail);
}

static void test_empty_append(void)
{
    struct db_tail *tail;
    struct db_tail_write write;

    CHECK_EQUAL(db_tail_open(8192, &tail), 0);
    db_tail_append(tail, NULL, 0, NULL, &write, NULL);
    CHECK(write.head == NULL);
    CHECK_EQUAL(write.body_bytes, 0);
    CHECK_EQUAL(write.digest_count, 0);
    CHECK_EQUAL(db_tail_digest(tail), db_checksum(NULL, 0));
    db_tail_close(tail);
    db_tail_close(NULL);
}

static void test_refused(void)
{
    static const uint32_t wrong[] = {0, 1, 2048, 4095, 4097, 12288, UINT32_MAX};
    struct db_tail *tail = NULL;

    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++)
        CHECK_EQUAL(db_tail_open(wrong[i], &tail), -EINVAL);
    CHECK(tail == NULL);
}

int main(void)
{
    uint64_t random = check_seed("test_tail");
    struct run *run = calloc(1, sizeof *run);
    struct db_counters live;

    CHECK(run != NULL);
    test_refused();
    test_empty_append();
    test_token_rows(run, &random);
    for (int i = 0; i < 150; i++)
        test_random_appends(run, &random);
    free(run);
    db_counters(&live);
    CHECK_EQUAL(live.tails, 0);
    return check_report("test_tail");
}
