/* engine.h - the table of functions that an I/O engine fills, and the request it moves.
 *
 * An engine moves bytes between one buffer and one run of one file descriptor. It knows nothing of
 * batches, splitting, staging or checksums (queue.c), and retries nothing: whatever the kernel says
 * of a request is handed back in request->result.
 *
 * Threading: queue() and commit() are called with the queue's lock held. reap() is called without
 * it, by one thread at a time. */
#ifndef DUALBLADE_ENGINE_H
#define DUALBLADE_ENGINE_H

#include "dualblade.h"
#include "nvme.h"
#include "regions.h"
#include "window.h"

#include <assert.h>
#include <errno.h>
#include <libaio.h>

struct db_request {
    /* what the engine is to do */
    int fd;
    uint32_t file; /* which of the engine's files fd is */
    enum db_direction direction;
    void *buffer;
    uint64_t offset;
    uint32_t length;
    int32_t slot;   /* of the registered memory that buffer lies in, or DB_REGION_NONE */
    bool by_block_device; /* engine_nvme.c: the page cache may hold some of it */
    bool is_tail;         /* of a write: see db_batch */
    int64_t result;       /* bytes moved, or -errno */
    uint16_t nvme_status; /* not 0: what the drive answered; result is -EIO then */
    uint32_t error_at;    /* bytes from the beginning to what failed, if the engine knows */

    /* queue.c: the piece of a batch that this request carries */
    struct db_request *next;
    struct db_batch *batch;
    struct db_io *io;
    uint8_t *user;         /* the caller's memory for this piece */
    uint32_t user_bytes;
    uint64_t piece_offset; /* on the device */
    uint32_t piece_bytes;  /* user_bytes, rounded up to whole blocks on the direct path */
    uint32_t moved_bytes;
    uint32_t retries;
    uint8_t *staging; /* a slot of the queue's staging memory, or NULL */
    uint64_t *checksums;
    uint32_t size_tag; /* of a part of a large transfer: see request_size.h; else 0 */
    bool prepared; /* a write's checksums are taken; a read's have been compared */
    bool busy;

    uint32_t begun_bytes; /* engine_threads.c: moved so far of a read that met a gap */
    uint32_t sent_bytes, left_bytes; /* engine_nvme.c: in commands; of these, not done */
    struct iocb iocb;                /* engine_aio.c */
};

struct db_engine_config {
    const int *fds; /* the files of all requests, so that they can be registered; until open()
                       returns */
    const struct db_nvme_namespace *const *spaces; /* engine_nvme.c: of each file; until open()
                                                      returns */
    uint32_t fd_count;
    uint32_t depth;   /* requests that can be in flight at once */
    uint32_t threads; /* engine_threads.c */
    bool is_buffered; /* the files are reached through the page cache */
    bool sqpoll, iopoll; /* engine_uring.c, engine_nvme.c */
    /* For engines with threads of their own: called there, without locks, before a request moves
     * and after its result is known, so that checksums and copies run beside each other. */
    void (*before)(struct db_request *request, void *context);
    void (*after)(struct db_request *request, void *context);
    /* Where there are windows (until close()), one for each file: moves all the bytes of a read,
     * from where they are in memory, and sets its result. after() is called all the same. */
    struct db_window *const *windows;
    void (*copy)(struct db_request *request, const void *from, void *context);
    /* Of the file, what is being read around a piece; false: that is not one run. */
    bool (*find_run)(const struct db_request *request, uint64_t *start, uint64_t *end,
                     const void *context);
    void *context;
};

struct db_engine;

struct db_engine_ops {
    const char *name;
    bool has_threads; /* its threads call before() and after(); else queue.c does */
    /* -ENOSYS: not built in. Otherwise what the kernel says when it refuses. */
    int (*open)(const struct db_engine_config *config, struct db_engine **out);
    /* Takes a request. Never fails: the queue has no more requests than config.depth. */
    void (*queue)(struct db_engine *engine, struct db_request *request);
    /* Hands what was queued to the kernel. Returns how many crossings that took. What the kernel
     * would not take now stays queued for the next commit. */
    uint32_t (*commit)(struct db_engine *engine);
    /* Waits until something completed or timeout_ns passed (0: do not wait; negative: for ever).
     * An engine that would have to sleep may sleep until `least` are done. Returns how many
     * requests it put into done, or -errno; -EINTR is a reason to call again. */
    int (*reap)(struct db_engine *engine, struct db_request **done, uint32_t least, uint32_t max,
                int64_t timeout_ns);
    /* Another thread waits now: reap() is to return with the first that is done. NULL where it does
     * not sleep for long. */
    void (*hurry)(struct db_engine *engine);
    /* Memory whose pages need not be looked up again for each request; slot < DB_REGIONS_MAX.
     * NULL where that does not exist. -ENOMEM: more than RLIMIT_MEMLOCK; -EOPNOTSUPP: an old
     * kernel; -EFAULT: not the process's memory. */
    int (*add_memory)(struct db_engine *engine, int32_t slot, void *start, uint64_t length);
    void (*remove_memory)(struct db_engine *engine, int32_t slot);
    /* How long a run of memory is that add_memory() takes at most: a power of two, the same for as
     * long as the engine is open. NULL: REGION_DEFAULT_BYTES of queue.c. */
    uint64_t (*region_bytes)(const struct db_engine *engine);
    void (*close)(struct db_engine *engine);
    /* In the child after a fork: closes file descriptors, touches nothing else. */
    void (*abandon)(struct db_engine *engine);
};

/* The open() of an engine that is not built in: nothing else of its table is ever called. */
static inline int db_engine_absent(const struct db_engine_config *config, struct db_engine **out)
{
    (void)config;
    (void)out;
    return -ENOSYS;
}

extern const struct db_engine_ops db_engine_uring, db_engine_nvme, db_engine_aio,
    db_engine_threads;

#endif
