/* test_mapping.c - parts of a file as memory: what they show, and how long they keep its lock. */
#define _GNU_SOURCE
#include "check.h"
#include "dualblade.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FILE_BYTES = 1 << 20 };

static char path[2][64];

static void make_file(char *name)
{
    static uint8_t bytes[FILE_BYTES];
    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (uint8_t)(i / DB_BLOCK_BYTES);
    strcpy(name, "/tmp/dualblade-test-mapping-XXXXXX");
    int fd = mkstemp(name);
    CHECK(fd >= 0 && write(fd, bytes, sizeof(bytes)) == FILE_BYTES);
    close(fd);
}

static int open_device(uint32_t members, struct db_device **device)
{
    const char *paths[2] = {path[0], path[1]};
    struct db_device_options options = {.queue_depth = 4,
                                        .threads = 1,
                                        .chunk_bytes = DB_BLOCK_BYTES,
                                        .stripe_bytes = DB_BLOCK_BYTES,
                                        .staging_bytes = DB_BLOCK_BYTES};
    uint32_t failed;
    return db_device_open(paths, members, &options, &failed, device);
}

static int64_t live_mappings(void)
{
    struct db_counters live;
    db_counters(&live);
    return live.mappings;
}

static void test_contents(struct db_device *device)
{
    struct db_mapping *mapping;
    const void *bytes;
    for (uint64_t offset = 0; offset < FILE_BYTES; offset += 5 * DB_BLOCK_BYTES + 17) {
        uint64_t length = FILE_BYTES - offset < 9000 ? FILE_BYTES - offset : 9000;
        CHECK_EQUAL(db_device_map(device, offset, length, &mapping, &bytes), 0);
        for (uint64_t i = 0; i < length; i++)
            CHECK(((const uint8_t *)bytes)[i] == (uint8_t)((offset + i) / DB_BLOCK_BYTES));
        db_mapping_close(mapping);
    }
    CHECK_EQUAL(db_device_map(device, 0, 0, &mapping, &bytes), -EOPNOTSUPP);
    CHECK_EQUAL(db_device_map(device, FILE_BYTES, 1, &mapping, &bytes), -EINVAL);
    CHECK_EQUAL(db_device_map(device, 1, UINT64_MAX, &mapping, &bytes), -EINVAL);
    CHECK_EQUAL(live_mappings(), 0);
}

/* The last of the device and its mappings gives the lock back; a child that closes its copy of one
 * does not. */
static void test_lock(struct db_device *device)
{
    struct db_mapping *mappings[2];
    struct db_device *again;
    const void *bytes;
    for (int i = 0; i < 2; i++)
        CHECK_EQUAL(db_device_map(device, DB_BLOCK_BYTES, 1, &mappings[i], &bytes), 0);
    db_device_close(device);
    CHECK_EQUAL(live_mappings(), 2);
    pid_t child = fork();
    if (child == 0) {
        db_mapping_close(mappings[0]);
        db_mapping_close(mappings[1]);
        _exit(live_mappings() == 0 ? 0 : 1);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    for (int i = 0; i < 2; i++) {
        CHECK_EQUAL(open_device(1, &again), -EWOULDBLOCK);
        CHECK(*(const uint8_t *)bytes == 1);
        db_mapping_close(mappings[i]);
    }
    CHECK_EQUAL(live_mappings(), 0);
    CHECK_EQUAL(open_device(1, &again), 0);
    db_device_close(again);
}

int main(void)
{
    struct db_device *device;
    struct db_mapping *mapping;
    const void *bytes;
    make_file(path[0]);
    make_file(path[1]);
    CHECK_EQUAL(open_device(2, &device), 0);
    CHECK_EQUAL(db_device_map(device, 0, 1, &mapping, &bytes), -EOPNOTSUPP);
    db_device_close(device);
    CHECK_EQUAL(open_device(1, &device), 0);
    test_contents(device);
    test_lock(device);
    unlink(path[0]);
    unlink(path[1]);
    return check_report("test_mapping");
}
