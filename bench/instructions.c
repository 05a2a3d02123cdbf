/* instructions.c - reads through the C core between marks, for bench/instructions.py to count.
 *
 * Arguments: FILE ENGINE BATCH READS ROUNDS. The marks are calls of getppid(), at which Callgrind
 * writes down what it has counted and begins again: one before the first reads, one after READS of
 * them and one after twice as many more, ROUNDS times. */
#include "dualblade.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DEPTH = 64 };

static int fail(const char *what, int rc)
{
    fprintf(stderr, "%s: %s\n", what, strerror(-rc));
    return 1;
}

static int read_blocks(struct db_device *device, uint8_t *memory, uint32_t batch_size, long reads)
{
    uint64_t blocks = db_device_geometry(device)->size_bytes / DB_BLOCK_BYTES;
    uint64_t place = 1;
    for (long done = 0; done < reads; done += batch_size) {
        struct db_io ios[DEPTH];
        for (uint32_t i = 0; i < batch_size; i++) {
            place = place * 6364136223846793005u + 1442695040888963407u;
            ios[i] = (struct db_io){
                .offset = (place >> 33) % blocks * DB_BLOCK_BYTES,
                .buffer = memory + (uint64_t)i * DB_BLOCK_BYTES,
                .length = DB_BLOCK_BYTES,
            };
        }
        struct db_batch batch = {
            .device = device,
            .path = DB_PATH_DIRECT,
            .direction = DB_READ,
            .ios = ios,
            .io_count = batch_size,
        };
        int rc = db_batch_submit(&batch);
        if (!rc)
            rc = db_batch_wait(&batch, -1);
        for (uint32_t i = 0; !rc && i < batch_size; i++)
            rc = ios[i].error;
        if (rc)
            return rc;
    }
    return 0;
}

static enum db_engine_id engine_named(const char *name)
{
    if (!strcmp(name, "uring"))
        return DB_ENGINE_URING;
    return !strcmp(name, "aio") ? DB_ENGINE_AIO : DB_ENGINE_THREADS;
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return fail("FILE ENGINE BATCH READS ROUNDS", -22);
    uint32_t batch_size = (uint32_t)atoi(argv[3]);
    long reads = atol(argv[4]);
    struct db_device_options options = {
        .engine = engine_named(argv[2]),
        .queue_depth = DEPTH,
        .threads = 4,
        .chunk_bytes = 262144,
        .request_bytes = 262144,
        .staging_bytes = 1048576,
        .read_only = true,
    };
    struct db_device *device;
    const char *path = argv[1];
    uint32_t failed;
    int rc = db_device_open(&path, 1, &options, &failed, &device);
    if (rc)
        return fail(argv[2], rc);
    void *memory;
    rc = db_memory_map(DEPTH * DB_BLOCK_BYTES, &memory);
    if (rc)
        return fail("memory", rc);
    memset(memory, 0, DEPTH * DB_BLOCK_BYTES);
    (void)db_device_register(device, memory, DEPTH * DB_BLOCK_BYTES); /* where the engine can */
    rc = read_blocks(device, memory, batch_size, reads);
    getppid();
    for (int round = atoi(argv[5]); !rc && round > 0; round--) {
        rc = read_blocks(device, memory, batch_size, reads);
        getppid();
        if (!rc)
            rc = read_blocks(device, memory, batch_size, 2 * reads);
        getppid();
    }
    db_device_close(device);
    db_memory_unmap(memory, DEPTH * DB_BLOCK_BYTES);
    return rc ? fail("read", rc) : 0;
}
