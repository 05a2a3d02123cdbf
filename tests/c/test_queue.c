/* test_queue.c - batches on both paths of real files, one and several, with every engine. */
#define _GNU_SOURCE
#include "check.h"
#include "dualblade.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    FILE_BYTES = 32 << 20,
    CHUNK_BYTES = 64 * 1024,
    REQUEST_BYTES = 128 * 1024,
    MEMBERS = 3,
};

static char path[MEMBERS][64];
static const char *const paths[MEMBERS] = {path[0], path[1], path[2]};


static void run_batch(struct db_device *device, enum db_path where, enum db_direction direction,
                      struct db_io *ios, uint32_t count)
{
    struct db_batch batch = {
        .device = device, .path = where, .direction = direction, .ios = ios, .io_count = count};
    CHECK(db_batch_submit(&batch) == 0);
    CHECK(db_batch_wait(&batch, -1) == 0);
    CHECK(db_batch_wait(&batch, 0) == 0);
}

static void fill(uint8_t *memory, size_t length, unsigned *seed)
{
    uint64_t state = (uint64_t)rand_r(seed) + 1;
    for (size_t i = 0; i + sizeof(state) <= length; i += sizeof(state)) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memcpy(memory + i, &state, sizeof(state));
    }
}

/* Random lengths and misalignments, written on one path and read on the other, three at a time. */
static void test_round_trips(struct db_device *device, unsigned *seed)
{
    enum { RUN_BYTES = 1 << 20, RUNS = 3 };
    static uint8_t written[RUNS][RUN_BYTES + 64], got[RUNS][RUN_BYTES + 64];
    static uint64_t checksums[RUNS][RUN_BYTES / CHUNK_BYTES + 1];
    for (int round = 0; round < 40; round++) {
        struct db_io out[RUNS], in[RUNS];
        for (int i = 0; i < RUNS; i++) {
            uint64_t length = (uint64_t)rand_r(seed) % (round % 4 ? RUN_BYTES : 9000);
            uint64_t offset = (uint64_t)i * 8 * RUN_BYTES +
                              (uint64_t)(rand_r(seed) % 100) * DB_BLOCK_BYTES;
            fill(written[i], sizeof(written[i]), seed);
            memset(got[i], 0xEE, sizeof(got[i]));
            out[i] = (struct db_io){.offset = offset,
                                    .buffer = written[i] + rand_r(seed) % 64,
                                    .length = length,
                                    .checksums = checksums[i]};
            in[i] = out[i];
            in[i].buffer = got[i] + rand_r(seed) % 64;
        }
        enum db_path to = rand_r(seed) % 2, from = rand_r(seed) % 2;
        run_batch(device, to, DB_WRITE, out, RUNS);
        run_batch(device, from, DB_READ, in, RUNS);
        for (int i = 0; i < RUNS; i++) {
            CHECK(out[i].error == 0 && in[i].error == 0);
            CHECK(memcmp(out[i].buffer, in[i].buffer, out[i].length) == 0);
            uint8_t *end = (uint8_t *)in[i].buffer + in[i].length;
            if (end < got[i] + sizeof(got[i]))
                CHECK(*end == 0xEE); /* nothing past the length asked for */
        }
    }
}

static void test_checksum_mismatch(struct db_device *device)
{
    static uint8_t memory[4 * CHUNK_BYTES], got[4 * CHUNK_BYTES];
    uint64_t checksums[4];
    memset(memory, 7, sizeof(memory));
    struct db_io io = {.buffer = memory, .length = sizeof(memory), .checksums = checksums};
    run_batch(device, DB_PATH_DIRECT, DB_WRITE, &io, 1);
    checksums[2] ^= 1;
    io.buffer = got;
    run_batch(device, DB_PATH_DIRECT, DB_READ, &io, 1);
    CHECK(io.error == -EBADMSG);
    CHECK(io.error_offset == 2 * CHUNK_BYTES);
    struct db_path_stats stats;
    db_device_stats(device, DB_PATH_DIRECT, &stats);
    CHECK(stats.checksum_mismatches == 1 && stats.in_flight == 0);
}

static void test_bad_ranges(struct db_device *device)
{
    uint8_t memory[DB_BLOCK_BYTES];
    uint64_t size_bytes = db_device_geometry(device)->size_bytes;
    struct db_io bad[] = {
        {.offset = size_bytes, .buffer = memory, .length = 1},
        {.offset = size_bytes + 1, .buffer = memory, .length = 0},
        {.offset = 0, .buffer = memory, .length = UINT64_MAX},
        {.offset = 0, .buffer = NULL, .length = 1},
        {.offset = 1, .buffer = memory, .length = 1},
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct db_batch batch = {
            .device = device, .direction = DB_READ, .ios = &bad[i], .io_count = 1};
        CHECK(db_batch_submit(&batch) == -EINVAL);
    }
    run_batch(device, DB_PATH_DIRECT, DB_READ, NULL, 0);
}

struct worker {
    struct db_device *device;
    unsigned seed;
    uint64_t base;
};

static void *hammer(void *argument)
{
    struct worker *worker = argument;
    enum { RUN_BYTES = 300 * 1000 };
    uint8_t *out = malloc(RUN_BYTES), *in = malloc(RUN_BYTES);
    for (int round = 0; round < 30; round++) {
        uint64_t checksums[RUN_BYTES / CHUNK_BYTES + 1];
        fill(out, RUN_BYTES, &worker->seed);
        struct db_io io = {
            .offset = worker->base, .buffer = out, .length = RUN_BYTES, .checksums = checksums};
        run_batch(worker->device, round % 2, DB_WRITE, &io, 1);
        io.buffer = in;
        run_batch(worker->device, DB_PATH_DIRECT, DB_READ, &io, 1);
        CHECK(io.error == 0);
        CHECK(memcmp(in, out, RUN_BYTES) == 0);
    }
    free(in);
    free(out);
    return NULL;
}

/* More threads than requests: they lead, follow, and wait for the pool in turn. */
static void test_many_threads(struct db_device *device)
{
    enum { COUNT = 6 };
    pthread_t threads[COUNT];
    struct worker workers[COUNT];
    for (int i = 0; i < COUNT; i++) {
        workers[i] = (struct worker){device, 100u + (unsigned)i, (uint64_t)i << 20};
        CHECK(pthread_create(&threads[i], NULL, hammer, &workers[i]) == 0);
    }
    for (int i = 0; i < COUNT; i++)
        pthread_join(threads[i], NULL);
}

static void test_second_open_is_refused(const struct db_device_options *options)
{
    struct db_device *second;
    uint32_t failed;
    CHECK(db_device_open(paths, 1, options, &failed, &second) == -EWOULDBLOCK);
    CHECK(failed == 0);
}

static void test_fork(struct db_device *device)
{
    pid_t child = fork();
    if (child == 0) {
        uint8_t memory[DB_BLOCK_BYTES];
        struct db_io io = {.buffer = memory, .length = sizeof(memory)};
        struct db_batch batch = {
            .device = device, .direction = DB_READ, .ios = &io, .io_count = 1};
        int rc = db_batch_submit(&batch);
        db_device_close(device);
        _exit(rc == -ECHILD ? 0 : 1);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* What is striped lies where it should, whatever way it was written. */
static void test_places(struct db_device *device)
{
    enum { UNITS = 12 };
    static uint8_t memory[UNITS * CHUNK_BYTES], unit[CHUNK_BYTES];
    for (int i = 0; i < UNITS; i++)
        memset(memory + i * CHUNK_BYTES, 'a' + i, CHUNK_BYTES);
    for (uint64_t start = 0; start <= DB_BLOCK_BYTES; start += DB_BLOCK_BYTES) {
        struct db_path_stats before, after;
        struct db_io io = {.offset = start, .buffer = memory + start,
                           .length = sizeof(memory) - start};
        struct db_failure failed;
        db_device_stats(device, DB_PATH_DIRECT, &before);
        run_batch(device, DB_PATH_DIRECT, DB_WRITE, &io, 1);
        db_device_stats(device, DB_PATH_DIRECT, &after);
        CHECK(io.error == 0 && after.resumed == before.resumed);
        CHECK(after.write_bytes - before.write_bytes == io.length);
        CHECK(db_device_flush(device, &failed) == 0);
    }
    for (int i = 0; i < UNITS; i++) {
        int fd = open(path[i % MEMBERS], O_RDONLY);
        CHECK(pread(fd, unit, CHUNK_BYTES, i / MEMBERS * CHUNK_BYTES) == CHUNK_BYTES);
        CHECK(memcmp(unit, memory + i * CHUNK_BYTES, CHUNK_BYTES) == 0);
        close(fd);
    }
}

static void test_members_are_refused(void)
{
    struct db_device_options options = {.queue_depth = 4,
                                        .threads = 1,
                                        .chunk_bytes = CHUNK_BYTES,
                                        .request_bytes = REQUEST_BYTES,
                                        .staging_bytes = REQUEST_BYTES,
                                        .stripe_bytes = CHUNK_BYTES};
    struct db_device *device;
    uint32_t failed;
    const char *twice[] = {path[0], path[1], path[0]};
    CHECK(db_device_open(twice, 3, &options, &failed, &device) == -ENOTUNIQ && failed == 2);
    const char *missing[] = {path[0], "/tmp/dualblade-no-such-file"};
    CHECK(db_device_open(missing, 2, &options, &failed, &device) == -ENOENT && failed == 1);
    CHECK(db_device_open(paths, 0, &options, &failed, &device) == -EINVAL && failed == 0);
    options.stripe_bytes = CHUNK_BYTES / 2;
    CHECK(db_device_open(paths, 2, &options, &failed, &device) == -EINVAL && failed == 2);
    options.stripe_bytes = 3 * CHUNK_BYTES;
    CHECK(db_device_open(paths, 2, &options, &failed, &device) == -EINVAL && failed == 2);
    options.stripe_bytes = 2 * FILE_BYTES;
    CHECK(db_device_open(paths, 2, &options, &failed, &device) == -EINVAL && failed == 0);
}

static void test_engine(struct db_device_options options, const char *name, uint32_t members)
{
    unsigned seed = 1;
    options.threads = 3;
    options.chunk_bytes = CHUNK_BYTES;
    options.staging_bytes = 4 * REQUEST_BYTES;
    options.stripe_bytes = CHUNK_BYTES;
    for (options.queue_depth = 1; options.queue_depth <= 256; options.queue_depth *= 16) {
        struct db_device *device;
        uint32_t failed;
        if (db_device_open(paths, members, &options, &failed, &device) != 0) {
            CHECK(failed == members); /* the engine, not a file */
            printf("test_queue: %s cannot run here\n", name);
            return;
        }
        CHECK(strcmp(db_device_engine_name(device, DB_PATH_DIRECT), name) == 0);
        test_round_trips(device, &seed);
        test_many_threads(device);
        test_bad_ranges(device);
        test_checksum_mismatch(device);
        test_second_open_is_refused(&options);
        test_fork(device);
        test_round_trips(device, &seed);
        if (members > 1)
            test_places(device);
        db_device_close(device);
    }
}

int main(void)
{
    for (int i = 0; i < MEMBERS; i++) {
        strcpy(path[i], "/tmp/dualblade-test-queue-XXXXXX");
        int fd = mkstemp(path[i]);
        CHECK(fd >= 0);
        CHECK(posix_fallocate(fd, 0, FILE_BYTES) == 0);
        close(fd);
    }
    static const struct db_device_options runs[] = {
        {.engine = DB_ENGINE_THREADS, .request_bytes = REQUEST_BYTES},
        {.engine = DB_ENGINE_AIO, .request_bytes = REQUEST_BYTES},
        {.engine = DB_ENGINE_URING, .request_bytes = REQUEST_BYTES},
        {.engine = DB_ENGINE_URING, .request_bytes = REQUEST_BYTES, .sqpoll = true},
        {.engine = DB_ENGINE_URING, .request_bytes = 0}, /* measured */
    };
    static const char *const names[] = {"threads", "aio", "uring", "uring", "uring"};
    for (size_t i = 0; i < sizeof(runs) / sizeof(runs[0]); i++) {
        test_engine(runs[i], names[i], 1);
        if (!runs[i].sqpoll)
            test_engine(runs[i], names[i], MEMBERS);
    }
    test_members_are_refused();
    for (int i = 0; i < MEMBERS; i++)
        unlink(path[i]);
    struct db_counters live;
    db_counters(&live);
    CHECK(live.devices == 0 && live.requests == 0 && live.batches == 0 && live.buffers == 0);
    return check_report("test_queue");
}
