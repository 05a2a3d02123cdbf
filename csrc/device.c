/* device.c - one file or block device: opened once, locked, and reached on two paths.
 *
 * Both paths are file descriptors of the same file, one with O_DIRECT and one without, each with a
 * queue of its own. A fork leaves the parent's device alone: the child's copies of the descriptors
 * are closed in the child as it starts, and every call there says -ECHILD. */
#define _GNU_SOURCE
#include "counters.h"
#include "geometry.h"
#include "queue.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

enum {
    ENGINE_COUNT = DB_ENGINE_THREADS + 1,
    DEPTH_MAX = 4096,
    THREADS_MAX = 64,
    /* A copy is spread over threads, and its checksum finds it in the processor's cache. */
    PAGECACHE_REQUEST_BYTES = 256 << 10,
};

struct db_device {
    struct db_geometry geometry;
    struct db_device_options options;
    int direct_fd, buffered_fd;
    struct db_queue *queues[DB_PATH_COUNT];
    int refusals[ENGINE_COUNT];
    _Atomic bool is_forked; /* this is the child's copy */
    struct db_device *next, **link;
};

/* ---- fork ------------------------------------------------------------------------------------ */

static pthread_mutex_t devices_lock = PTHREAD_MUTEX_INITIALIZER;
static struct db_device *devices;

static void before_fork(void)
{
    pthread_mutex_lock(&devices_lock);
}

static void after_fork_in_parent(void)
{
    pthread_mutex_unlock(&devices_lock);
}

static void after_fork_in_child(void)
{
    for (struct db_device *device = devices; device; device = device->next) {
        device->is_forked = true;
        close(device->direct_fd);
        close(device->buffered_fd);
        for (int path = 0; path < DB_PATH_COUNT; path++)
            db_queue_abandon(device->queues[path]);
    }
    devices = NULL;
    pthread_mutex_unlock(&devices_lock);
}

static void watch_forks(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static void list_device(struct db_device *device)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    pthread_mutex_lock(&devices_lock);
    device->next = devices;
    device->link = &devices;
    if (devices)
        devices->link = &device->next;
    devices = device;
    pthread_mutex_unlock(&devices_lock);
}

static void unlist_device(struct db_device *device)
{
    pthread_mutex_lock(&devices_lock);
    *device->link = device->next;
    if (device->next)
        device->next->link = device->link;
    pthread_mutex_unlock(&devices_lock);
}

/* ---- open ------------------------------------------------------------------------------------ */

static int check_options(const struct db_device_options *options)
{
    bool sane = (int)options->engine < ENGINE_COUNT && options->queue_depth >= 1 &&
                options->queue_depth <= DEPTH_MAX && options->threads >= 1 &&
                options->threads <= THREADS_MAX && options->chunk_bytes >= DB_BLOCK_BYTES &&
                (options->chunk_bytes & (options->chunk_bytes - 1)) == 0 &&
                options->request_bytes % options->chunk_bytes == 0 &&
                options->request_bytes <= (1u << 30) &&
                options->staging_bytes >= options->chunk_bytes;
    return sane ? 0 : -EINVAL;
}

/* Opens both descriptors. The buffered one carries the locks. */
static int open_descriptors(struct db_device *device, const char *path)
{
    struct stat status;
    int access = device->options.read_only ? O_RDONLY : O_RDWR;
    if (stat(path, &status) < 0)
        return -errno;
    if (S_ISDIR(status.st_mode))
        return -EISDIR;
    if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode))
        return -ENOTBLK;
    device->geometry.is_block_device = S_ISBLK(status.st_mode);
    /* On a block device O_EXCL without O_CREAT asks the kernel: not mounted, not held. */
    int exclusive = S_ISBLK(status.st_mode) && !device->options.read_only ? O_EXCL : 0;
    device->buffered_fd = open(path, access | exclusive | O_CLOEXEC);
    if (device->buffered_fd < 0)
        return -errno;
    if (flock(device->buffered_fd, (device->options.read_only ? LOCK_SH : LOCK_EX) | LOCK_NB) < 0)
        return -errno;
    /* No readahead: what lies behind a page-cached extent is another's, and mostly direct. Requests
     * are large enough to do without; if the advice is not taken, nothing but memory is lost. */
    posix_fadvise(device->buffered_fd, 0, 0, POSIX_FADV_RANDOM);
    device->direct_fd = open(path, access | O_DIRECT | O_CLOEXEC);
    return device->direct_fd >= 0 || errno == EINVAL ? 0 : -errno;
}

static struct db_queue_config configure(const struct db_device *device, enum db_path path)
{
    const struct db_device_options *options = &device->options;
    bool direct = path == DB_PATH_DIRECT && device->geometry.has_direct;
    uint32_t request_bytes = options->request_bytes;
    if (request_bytes == 0 && path == DB_PATH_PAGECACHE)
        request_bytes = PAGECACHE_REQUEST_BYTES > options->chunk_bytes ? PAGECACHE_REQUEST_BYTES
                                                                       : options->chunk_bytes;
    return (struct db_queue_config){
        .engine = &db_engine_threads,
        .fd = direct ? device->direct_fd : device->buffered_fd,
        .depth = path == DB_PATH_DIRECT ? options->queue_depth : 4 * options->threads,
        .threads = options->threads,
        .chunk_bytes = options->chunk_bytes,
        .request_bytes = request_bytes,
        .lba_bytes = direct ? device->geometry.lba_bytes : 1,
        .memory_align_bytes = direct ? device->geometry.memory_align_bytes : 1,
        .staging_bytes = direct ? options->staging_bytes : 0,
        .sqpoll = path == DB_PATH_DIRECT && options->sqpoll,
        .iopoll = path == DB_PATH_DIRECT && options->iopoll,
    };
}

/* Does this engine move bytes here? Set-up alone proves nothing: a container or a filesystem may
 * refuse only the I/O. So the first block is read. */
static int try_engine(struct db_device *device, enum db_engine_id id)
{
    static const struct db_engine_ops *const engines[ENGINE_COUNT] = {
        [DB_ENGINE_URING] = &db_engine_uring,
        [DB_ENGINE_AIO] = &db_engine_aio,
        [DB_ENGINE_THREADS] = &db_engine_threads,
    };
    struct db_queue_config config = configure(device, DB_PATH_DIRECT);
    config.engine = engines[id];
    struct db_queue *queue;
    int rc = db_queue_open(&config, &queue);
    if (!rc) {
        rc = db_queue_probe(queue);
        if (rc == -EINVAL || rc == -EOPNOTSUPP || rc == -ENOSYS || rc == -EPERM ||
            rc == -EACCES) {
            db_queue_close(queue);
        } else { /* works, or the device is at fault: that is for the first real read to say */
            device->queues[DB_PATH_DIRECT] = queue;
            rc = 0;
        }
    }
    device->refusals[id] = rc;
    return rc;
}

static int choose_engine(struct db_device *device)
{
    enum db_engine_id wanted = device->options.engine;
    if (device->options.sqpoll || device->options.iopoll) {
        if (wanted != DB_ENGINE_AUTO && wanted != DB_ENGINE_URING)
            return -EOPNOTSUPP;
        wanted = DB_ENGINE_URING;
    }
    if (wanted != DB_ENGINE_AUTO)
        return try_engine(device, wanted);
    int rc = try_engine(device, DB_ENGINE_URING);
    /* On buffered files AIO blocks in io_submit: the threads are better. */
    if (rc && device->geometry.has_direct)
        rc = try_engine(device, DB_ENGINE_AIO);
    if (rc)
        rc = try_engine(device, DB_ENGINE_THREADS);
    return rc;
}

static int open_queues(struct db_device *device)
{
    device->geometry.has_direct = device->direct_fd >= 0;
    int rc = choose_engine(device);
    if (rc == -EINVAL && device->geometry.has_direct) {
        /* Some filesystems take O_DIRECT when a file is opened and refuse it when it is used. */
        device->geometry.has_direct = false;
        rc = choose_engine(device);
    }
    if (!rc) {
        struct db_queue_config config = configure(device, DB_PATH_PAGECACHE);
        rc = db_queue_open(&config, &device->queues[DB_PATH_PAGECACHE]);
    }
    /* EAGAIN of io_setup or pthread_create, which flock's EWOULDBLOCK must not be taken for. */
    return rc == -EAGAIN ? -EUSERS : rc;
}

static void release(struct db_device *device)
{
    for (int path = 0; path < DB_PATH_COUNT; path++)
        if (device->queues[path])
            db_queue_close(device->queues[path]);
    if (device->direct_fd >= 0)
        close(device->direct_fd);
    if (device->buffered_fd >= 0) {
        /* A child that has not yet closed its copy must not keep the lock. */
        flock(device->buffered_fd, LOCK_UN);
        close(device->buffered_fd);
    }
    free(device);
}

int db_device_open(const char *path, const struct db_device_options *options,
                   struct db_device **out)
{
    int rc = check_options(options);
    if (rc)
        return rc;
    struct db_device *device = calloc(1, sizeof(*device));
    if (!device)
        return -ENOMEM;
    device->options = *options;
    device->direct_fd = device->buffered_fd = -1;
    rc = open_descriptors(device, path);
    if (!rc) {
        int fd = device->direct_fd >= 0 ? device->direct_fd : device->buffered_fd;
        rc = db_geometry_read(fd, device->geometry.is_block_device, &device->geometry);
    }
    if (!rc)
        rc = open_queues(device);
    if (rc) {
        release(device);
        return rc;
    }
    list_device(device);
    atomic_fetch_add(&db_live_devices, 1);
    *out = device;
    return 0;
}

void db_device_close(struct db_device *device)
{
    if (device->is_forked) {
        /* Its memory stays: the parent's threads may have held its locks at the fork. */
        atomic_fetch_sub(&db_live_devices, 1);
        return;
    }
    unlist_device(device);
    release(device);
    atomic_fetch_sub(&db_live_devices, 1);
}

/* ---- what it is, and what it did ------------------------------------------------------------- */

const struct db_geometry *db_device_geometry(const struct db_device *device)
{
    return &device->geometry;
}

const char *db_device_engine_name(const struct db_device *device, enum db_path path)
{
    return db_queue_engine_name(device->queues[path]);
}

int db_device_engine_refusal(const struct db_device *device, enum db_engine_id engine)
{
    return device->refusals[engine];
}

void db_device_stats(struct db_device *device, enum db_path path, struct db_path_stats *out)
{
    if (device->is_forked)
        memset(out, 0, sizeof(*out));
    else
        db_queue_stats(device->queues[path], out);
}

/* ---- I/O ------------------------------------------------------------------------------------- */

static int check_io(const struct db_device *device, enum db_path path, const struct db_io *io)
{
    const struct db_geometry *geometry = &device->geometry;
    if (io->length > 0 && !io->buffer)
        return -EINVAL;
    if (io->offset > geometry->size_bytes || io->length > geometry->size_bytes - io->offset)
        return -EINVAL;
    if (path == DB_PATH_DIRECT && geometry->has_direct && io->offset % geometry->lba_bytes != 0)
        return -EINVAL;
    return 0;
}

int db_batch_submit(struct db_batch *batch)
{
    struct db_device *device = batch->device;
    if (device->is_forked)
        return -ECHILD;
    if (batch->direction == DB_WRITE && device->options.read_only)
        return -EBADF;
    for (uint32_t i = 0; i < batch->io_count; i++) {
        int rc = check_io(device, batch->path, &batch->ios[i]);
        if (rc)
            return rc;
        batch->ios[i].error = 0;
        batch->ios[i].error_offset = 0;
    }
    batch->submitted = true;
    db_queue_submit(device->queues[batch->path], batch);
    return 0;
}

int db_batch_wait(struct db_batch *batch, int64_t timeout_ns)
{
    if (batch->device->is_forked)
        return -ECHILD;
    assert(batch->submitted);
    return db_queue_wait(batch->device->queues[batch->path], batch, timeout_ns);
}

/* ---- registered memory ----------------------------------------------------------------------- */

/* The kernel takes at most 1 GiB at once. A request across a border goes unregistered. */
enum { REGISTERED_MAX = 1 << 30 };

static uint64_t next_length(uint64_t length, uint64_t at)
{
    return length - at < REGISTERED_MAX ? length - at : REGISTERED_MAX;
}

int db_device_register(struct db_device *device, void *memory, uint64_t length)
{
    struct db_queue *queue = device->queues[DB_PATH_DIRECT];
    if (device->is_forked)
        return -ECHILD;
    int rc = length > 0 ? 0 : -EINVAL;
    uint64_t at = 0;
    while (!rc && at < length) {
        rc = db_queue_register(queue, (char *)memory + at, next_length(length, at));
        if (!rc)
            at += next_length(length, at);
    }
    if (rc)
        for (uint64_t done = 0; done < at; done += REGISTERED_MAX)
            db_queue_unregister(queue, (char *)memory + done, next_length(length, done));
    return rc;
}

int db_device_unregister(struct db_device *device, void *memory, uint64_t length)
{
    if (device->is_forked)
        return -ECHILD;
    int rc = length > 0 ? 0 : -ENOENT;
    for (uint64_t at = 0; !rc && at < length; at += REGISTERED_MAX)
        rc = db_queue_unregister(device->queues[DB_PATH_DIRECT], (char *)memory + at,
                                 next_length(length, at));
    return rc;
}

/* ---- ranges ---------------------------------------------------------------------------------- */

static int check_range(const struct db_device *device, uint64_t offset, uint64_t length)
{
    if (device->is_forked)
        return -ECHILD;
    uint64_t size_bytes = device->geometry.size_bytes;
    return offset > size_bytes || length > size_bytes - offset ? -EINVAL : 0;
}

int db_device_flush(struct db_device *device)
{
    if (device->is_forked)
        return -ECHILD;
    return fdatasync(device->buffered_fd) < 0 ? -errno : 0;
}

int db_device_discard(struct db_device *device, uint64_t offset, uint64_t length)
{
    int rc = check_range(device, offset, length);
    if (rc || length == 0)
        return rc;
    if (device->options.read_only)
        return -EBADF;
    if (device->geometry.is_block_device) {
        uint64_t range[2] = {offset, length};
        rc = ioctl(device->buffered_fd, BLKDISCARD, range);
    } else {
        rc = fallocate(device->buffered_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                       (off_t)offset, (off_t)length);
    }
    return rc < 0 ? -errno : 0;
}

int db_device_drop_cached(struct db_device *device, uint64_t offset, uint64_t length)
{
    int rc = check_range(device, offset, length);
    if (rc || length == 0)
        return rc;
    if (sync_file_range(device->buffered_fd, (off_t)offset, (off_t)length,
                        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
                            SYNC_FILE_RANGE_WAIT_AFTER) < 0)
        return -errno;
    return -posix_fadvise(device->buffered_fd, (off_t)offset, (off_t)length, POSIX_FADV_DONTNEED);
}

int db_device_cached(struct db_device *device, uint64_t offset, uint64_t length,
                     uint64_t *cached_bytes, uint64_t *dirty_bytes)
{
    struct {
        uint64_t offset, length;
    } range = {offset, length};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } pages;
    int rc = check_range(device, offset, length);
    *cached_bytes = *dirty_bytes = 0;
    if (rc || length == 0) /* the kernel takes a length of 0 as the rest of the file */
        return rc;
    if (syscall(SYS_cachestat, device->buffered_fd, &range, &pages, 0) < 0)
        return -errno;
    uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    *cached_bytes = pages.cached * page_bytes;
    *dirty_bytes = (pages.dirty + pages.writeback) * page_bytes;
    return 0;
}
