/* test_threads.c - whose turn it is in the threads engine. */
#define _GNU_SOURCE
#include "check.h"
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MIB = 1 << 20, REQUEST_BYTES = 64 << 10, WRITES = 100 };

struct order {
    struct db_request *done[WRITES + 1];
    uint32_t count;
};

static void before(struct db_request *request, void *context)
{
    (void)request;
    (void)context;
}

static void after(struct db_request *request, void *context)
{
    struct order *order = context; /* there is one thread */
    order->done[order->count++] = request;
}

static struct db_request request_of(int fd, enum db_direction direction, uint64_t offset,
                                    void *buffer)
{
    return (struct db_request){.fd = fd,
                               .direction = direction,
                               .buffer = buffer,
                               .offset = offset,
                               .length = REQUEST_BYTES};
}

/* A read that meets a gap goes on after some of the writes that wait, not after all of them. */
static void test_begun_beside_writes(int fd)
{
    static char in[REQUEST_BYTES], out[REQUEST_BYTES];
    struct order order = {.count = 0};
    struct db_engine_config config = {.fds = &fd,
                                      .fd_count = 1,
                                      .depth = WRITES + 1,
                                      .threads = 1,
                                      .is_buffered = true,
                                      .before = before,
                                      .after = after,
                                      .context = &order};
    const struct db_engine_ops *ops = &db_engine_threads;
    struct db_engine *engine;
    CHECK_EQUAL(ops->open(&config, &engine), 0);
    struct db_request read = request_of(fd, DB_READ, MIB, in);
    struct db_request writes[WRITES];
    for (uint32_t i = 0; i < WRITES; i++) {
        writes[i] = request_of(fd, DB_WRITE, 0, out);
        ops->queue(engine, &writes[i]);
    }
    ops->queue(engine, &read);
    CHECK_EQUAL(ops->commit(engine), 1);
    struct db_request *done[WRITES + 1];
    for (uint32_t count = 0; count < WRITES + 1;) {
        int more = ops->reap(engine, done, 1, WRITES + 1, -1);
        CHECK(more > 0);
        count += (uint32_t)more;
    }
    ops->close(engine);
    CHECK_EQUAL(read.result, REQUEST_BYTES);
    uint32_t turn = 0;
    while (order.done[turn] != &read)
        turn++;
    CHECK(turn < 10);
}

/* Whether a read that misses can be begun here. */
static bool can_begin(int fd)
{
    char byte;
    struct iovec one = {&byte, 1};
    return preadv2(fd, &one, 1, 0, RWF_NOWAIT) < 0 && errno == EAGAIN;
}

int main(void)
{
    char path[] = "/var/tmp/dualblade-threads-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    unlink(path);
    CHECK_EQUAL(posix_fallocate(fd, 0, 2 * MIB), 0);
    static char data[2 * MIB];
    CHECK_EQUAL(pwrite(fd, data, sizeof(data), 0), sizeof(data));
    CHECK_EQUAL(fsync(fd), 0);
    CHECK_EQUAL(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    if (can_begin(fd))
        test_begun_beside_writes(fd);
    close(fd);
    return check_report("test_threads");
}
