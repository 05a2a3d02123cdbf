/* device.c - one or several files or block devices, as one run of bytes that two paths reach.
 *
 * Each path has one queue for all members, so that one thread submits to all drives and reaps from
 * them in one crossing. A fork leaves the parent's device alone: the child's copies of the
 * descriptors are closed in the child as it starts, and every call there says -ECHILD. */
#define _GNU_SOURCE
#include "cached.h"
#include "coherence.h"
#include "counters.h"
#include "member.h"
#include "queue.h"
#include "request_size.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum {
    ENGINE_COUNT = DB_ENGINE_NVME + 1,
    DEPTH_MAX = 4096,
    DEPTH_SUM_MAX = 16384, /* of all members: twice this is what an io_uring has at most */
    THREADS_MAX = 64,
    THREADS_SUM_MAX = 256,
    /* A copy is spread over threads, and its checksum finds it in the processor's cache. */
    PAGECACHE_REQUEST_BYTES = 256 << 10,
    /* The threads go on by themselves with what they have been given, and nobody may look after
     * them while the drive is waited for: it is to last for more than what is read ahead. */
    PAGECACHE_DEPTH = 256,
};

struct db_device {
    struct db_geometry geometry;
    struct db_device_options options;
    struct db_stripes stripes;
    struct db_queue *queues[DB_PATH_COUNT];
    int refusals[ENGINE_COUNT];
    struct db_coherence coherence; /* without words unless NVMe commands are used */
    _Atomic bool is_forked; /* this is the child's copy */
    struct db_device *next, **link;
    struct db_member members[];
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
        for (uint32_t i = 0; i < device->stripes.member_count; i++)
            db_member_abandon(&device->members[i]);
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

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static bool is_power_of_two(uint64_t value)
{
    return value > 0 && (value & (value - 1)) == 0;
}

static int check_options(const struct db_device_options *options, uint32_t path_count)
{
    bool sane = (int)options->engine < ENGINE_COUNT && options->queue_depth >= 1 &&
                options->queue_depth <= DEPTH_MAX && options->threads >= 1 &&
                options->threads <= THREADS_MAX && options->chunk_bytes >= DB_BLOCK_BYTES &&
                is_power_of_two(options->chunk_bytes) &&
                options->request_bytes % options->chunk_bytes == 0 &&
                options->request_bytes <= (1u << 30) &&
                options->staging_bytes >= options->chunk_bytes;
    bool is_striped = path_count > 1;
    bool fits = path_count >= 1 && path_count <= DB_MEMBERS_MAX &&
                (!is_striped || (is_power_of_two(options->stripe_bytes) &&
                                 options->stripe_bytes >= options->chunk_bytes));
    return sane && fits ? 0 : -EINVAL;
}

static bool is_same(const struct db_member *a, const struct db_member *b)
{
    return a->device == b->device && a->inode == b->inode &&
           a->geometry.is_block_device == b->geometry.is_block_device;
}

static void join_geometries(struct db_device *device)
{
    uint32_t count = device->stripes.member_count;
    struct db_geometry *all = &device->geometry;
    *all = device->members[0].geometry;
    for (uint32_t i = 1; i < count; i++)
        db_geometry_join(all, &device->members[i].geometry);
    if (count == 1)
        return;
    /* Sparse files can be so large that offsets over all of them overflow: their ends go unused. */
    uint64_t row_bytes = device->stripes.unit_bytes * count;
    uint64_t rows = all->size_bytes / device->stripes.unit_bytes;
    uint64_t rows_max = INT64_MAX / row_bytes;
    all->size_bytes = (rows < rows_max ? rows : rows_max) * row_bytes;
}

/* Opens every member. Their own locks would call one that is given twice another process's. */
static int open_members(struct db_device *device, const char *const *paths, uint32_t path_count,
                        uint32_t *failed)
{
    for (uint32_t i = 0; i < path_count; i++) {
        struct db_member *member = &device->members[i];
        *failed = i;
        int rc = db_member_identify(paths[i], member);
        device->stripes.member_count = i + 1;
        for (uint32_t k = 0; !rc && k < i; k++)
            if (is_same(&device->members[k], member))
                rc = -ENOTUNIQ;
        if (!rc)
            rc = db_member_open(paths[i], device->options.read_only, member);
        if (!rc && path_count > 1 && member->geometry.size_bytes < device->stripes.unit_bytes)
            rc = -EINVAL;
        if (rc)
            return rc;
    }
    *failed = path_count;
    return 0;
}

/* What is asked of a queue for one path, with what it points to until it is open. */
struct setup {
    struct db_queue_config config;
    int fds[DB_MEMBERS_MAX];
    const struct db_nvme_namespace *spaces[DB_MEMBERS_MAX];
    struct db_window *windows[DB_MEMBERS_MAX];
};

static void configure(struct db_device *device, enum db_path path, struct setup *setup)
{
    const struct db_device_options *options = &device->options;
    bool direct = path == DB_PATH_DIRECT && device->geometry.has_direct;
    uint32_t request_bytes = options->request_bytes;
    if (request_bytes == 0 && path == DB_PATH_PAGECACHE)
        request_bytes = PAGECACHE_REQUEST_BYTES > options->chunk_bytes ? PAGECACHE_REQUEST_BYTES
                                                                       : options->chunk_bytes;
    uint32_t count = device->stripes.member_count;
    uint32_t depth = least(count * options->queue_depth, DEPTH_SUM_MAX);
    uint32_t threads = least(count * options->threads, THREADS_SUM_MAX);
    for (uint32_t i = 0; i < count; i++) {
        struct db_member *member = &device->members[i];
        setup->fds[i] = direct ? member->direct_fd : member->buffered_fd;
        setup->windows[i] = &member->window;
    }
    setup->config = (struct db_queue_config){
        .engine = &db_engine_threads,
        .fds = setup->fds,
        .windows = direct ? NULL : setup->windows,
        .stripes = device->stripes,
        .depth = path == DB_PATH_DIRECT ? depth : PAGECACHE_DEPTH,
        .threads = threads,
        .chunk_bytes = options->chunk_bytes,
        .request_bytes = request_bytes,
        .lba_bytes = direct ? device->geometry.lba_bytes : 1,
        .memory_align_bytes = direct ? device->geometry.memory_align_bytes : 1,
        .staging_bytes = direct ? options->staging_bytes : 0,
        .is_buffered = !direct,
        .sqpoll = path == DB_PATH_DIRECT && options->sqpoll,
        .iopoll = path == DB_PATH_DIRECT && options->iopoll,
    };
}

/* Every member is an NVMe namespace, and takes commands. */
static int use_nvme(struct db_device *device, struct setup *setup)
{
    uint32_t most_bytes = UINT32_MAX, drive_bytes = UINT32_MAX;
    bool has_placement = false;
    int rc = device->geometry.has_direct ? 0 : -ENODEV;
    for (uint32_t i = 0; !rc && i < device->stripes.member_count; i++) {
        struct db_member *member = &device->members[i];
        rc = db_member_use_nvme(member, device->options.read_only);
        setup->spaces[i] = &member->space;
        if (member->space.most_bytes < most_bytes)
            most_bytes = member->space.most_bytes;
        if (member->space.drive_bytes < drive_bytes)
            drive_bytes = member->space.drive_bytes;
        has_placement = has_placement || member->space.has_placement;
    }
    if (!rc)
        rc = db_coherence_open(device->geometry.size_bytes, &device->coherence);
    if (rc)
        return rc;
    setup->config.spaces = setup->spaces;
    setup->config.coherence = &device->coherence;
    device->geometry.max_transfer_bytes = most_bytes;
    device->geometry.has_placement = has_placement;
    /* One request is one command then, or several of a chunk; there is nothing to measure. */
    if (setup->config.request_bytes == 0 && drive_bytes <= DB_REQUEST_LEAST_BYTES)
        setup->config.request_bytes =
            drive_bytes > device->options.chunk_bytes ? drive_bytes : device->options.chunk_bytes;
    return 0;
}

static void leave_nvme(struct db_device *device)
{
    for (uint32_t i = 0; i < device->stripes.member_count; i++)
        db_member_leave_nvme(&device->members[i]);
    device->geometry.has_placement = false;
    db_coherence_close(&device->coherence);
}

/* Does this engine move bytes here? Set-up alone proves nothing: a container or a filesystem may
 * refuse only the I/O. So a block of each member is read. */
static int try_engine(struct db_device *device, enum db_engine_id id)
{
    static const struct db_engine_ops *const engines[ENGINE_COUNT] = {
        [DB_ENGINE_URING] = &db_engine_uring,
        [DB_ENGINE_AIO] = &db_engine_aio,
        [DB_ENGINE_THREADS] = &db_engine_threads,
        [DB_ENGINE_NVME] = &db_engine_nvme,
    };
    struct setup setup;
    struct db_queue *queue;
    configure(device, DB_PATH_DIRECT, &setup);
    setup.config.engine = engines[id];
    int rc = id == DB_ENGINE_NVME ? use_nvme(device, &setup) : 0;
    if (!rc)
        rc = db_queue_open(&setup.config, &queue);
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
    if (rc && id == DB_ENGINE_NVME) {
        leave_nvme(device);
        rc = rc == -EINVAL ? -EOPNOTSUPP : rc; /* so says a kernel that knows no such rings */
    }
    device->refusals[id] = rc;
    return rc;
}

/* NVMe commands if they were asked for, or may be what is best. */
static int try_nvme(struct db_device *device)
{
    int rc = try_engine(device, DB_ENGINE_NVME);
    if (device->options.engine == DB_ENGINE_AUTO && rc == -ENODEV)
        device->refusals[DB_ENGINE_NVME] = 0; /* it is something else: that is no refusal */
    return rc;
}

static int choose_engine(struct db_device *device)
{
    enum db_engine_id wanted = device->options.engine;
    if (device->options.sqpoll || device->options.iopoll) {
        if (wanted != DB_ENGINE_AUTO && wanted != DB_ENGINE_URING && wanted != DB_ENGINE_NVME)
            return -EOPNOTSUPP;
        /* The probe's read says no too, but not where it reads a hole of a file. */
        if (device->options.iopoll && !device->geometry.can_poll)
            return -EOPNOTSUPP;
        if (wanted == DB_ENGINE_AUTO)
            return try_nvme(device) == 0 ? 0 : try_engine(device, DB_ENGINE_URING);
    }
    if (wanted != DB_ENGINE_AUTO)
        return try_engine(device, wanted);
    int rc = try_nvme(device);
    if (rc)
        rc = try_engine(device, DB_ENGINE_URING);
    /* On buffered files AIO blocks in io_submit: the threads are better. */
    if (rc && device->geometry.has_direct)
        rc = try_engine(device, DB_ENGINE_AIO);
    if (rc)
        rc = try_engine(device, DB_ENGINE_THREADS);
    return rc;
}

static int open_queues(struct db_device *device)
{
    int rc = choose_engine(device);
    if (rc == -EINVAL && device->geometry.has_direct) {
        /* Some filesystems take O_DIRECT when a file is opened and refuse it when it is used. */
        device->geometry.has_direct = false;
        rc = choose_engine(device);
    }
    if (!rc) {
        struct setup setup;
        configure(device, DB_PATH_PAGECACHE, &setup);
        rc = db_queue_open(&setup.config, &device->queues[DB_PATH_PAGECACHE]);
    }
    /* EAGAIN of io_setup or pthread_create, which flock's EWOULDBLOCK must not be taken for. */
    return rc == -EAGAIN ? -EUSERS : rc;
}

static void release(struct db_device *device)
{
    for (int path = 0; path < DB_PATH_COUNT; path++)
        if (device->queues[path])
            db_queue_close(device->queues[path]);
    for (uint32_t i = 0; i < device->stripes.member_count; i++)
        db_member_close(&device->members[i]);
    db_coherence_close(&device->coherence);
    free(device);
}

int db_device_open(const char *const *paths, uint32_t path_count,
                   const struct db_device_options *options, uint32_t *failed,
                   struct db_device **out)
{
    *failed = path_count;
    int rc = check_options(options, path_count);
    if (rc)
        return rc;
    struct db_device *device = calloc(1, sizeof(*device) + path_count * sizeof(device->members[0]));
    if (!device)
        return -ENOMEM;
    device->options = *options;
    device->stripes.unit_bytes = path_count > 1 ? options->stripe_bytes : 0;
    rc = open_members(device, paths, path_count, failed);
    if (!rc) {
        join_geometries(device);
        rc = open_queues(device);
    }
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

const struct db_geometry *db_device_member_geometry(const struct db_device *device,
                                                    uint32_t member)
{
    assert(member < device->stripes.member_count);
    return &device->members[member].geometry;
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

/* A range of the device is one range on each member that it touches. */
struct part {
    struct db_member *member;
    uint64_t offset, length;
};

static struct part part_of(struct db_device *device, uint32_t member, uint64_t offset,
                           uint64_t length)
{
    uint64_t start = db_stripes_before(&device->stripes, member, offset);
    uint64_t end = db_stripes_before(&device->stripes, member, offset + length);
    return (struct part){&device->members[member], start, end - start};
}

/* ---- I/O ------------------------------------------------------------------------------------- */

/* The page cache is going to hold this, or does now. What it has got already of what NVMe commands
 * have reached until now, because somebody else looked, may be old. */
static void note_cached(struct db_device *device, const struct db_batch *batch, bool is_new)
{
    for (uint32_t i = 0; i < batch->io_count; i++) {
        struct db_run rest = {batch->ios[i].offset, batch->ios[i].length}, run;
        while (db_coherence_note(&device->coherence, &rest, &run)) {
            for (uint32_t k = 0; is_new && k < device->stripes.member_count; k++) {
                struct part part = part_of(device, k, run.offset, run.length);
                if (part.length > 0)
                    (void)db_member_drop_cached(part.member, part.offset, part.length);
            }
        }
    }
}

static bool notes_cached(const struct db_batch *batch)
{
    return batch->path == DB_PATH_PAGECACHE && batch->device->coherence.words;
}

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
        batch->ios[i].nvme_status = 0;
    }
    if (notes_cached(batch))
        note_cached(device, batch, true);
    batch->submitted = true;
    db_queue_submit(device->queues[batch->path], batch);
    return 0;
}

int db_batch_wait(struct db_batch *batch, int64_t timeout_ns)
{
    if (batch->device->is_forked)
        return -ECHILD;
    assert(batch->submitted);
    int rc = db_queue_wait(batch->device->queues[batch->path], batch, timeout_ns);
    if (!rc && notes_cached(batch)) /* it may have been dropped and forgotten in between */
        note_cached(batch->device, batch, false);
    return rc;
}

/* ---- registered memory ----------------------------------------------------------------------- */

int db_device_register(struct db_device *device, void *memory, uint64_t length)
{
    if (device->is_forked)
        return -ECHILD;
    return db_queue_register(device->queues[DB_PATH_DIRECT], memory, length);
}

int db_device_unregister(struct db_device *device, void *memory, uint64_t length)
{
    if (device->is_forked)
        return -ECHILD;
    return db_queue_unregister(device->queues[DB_PATH_DIRECT], memory, length);
}

/* ---- ranges ---------------------------------------------------------------------------------- */

static int check_range(const struct db_device *device, uint64_t offset, uint64_t length)
{
    if (device->is_forked)
        return -ECHILD;
    uint64_t size_bytes = device->geometry.size_bytes;
    return offset > size_bytes || length > size_bytes - offset ? -EINVAL : 0;
}

/* An error that a member gave, which may be an NVMe status: then it is -EIO. */
static int failed_on(struct db_failure *failed, uint32_t member, int error)
{
    *failed = (struct db_failure){.member = member, .nvme_status = error > 0 ? (uint16_t)error : 0};
    return error > 0 ? -EIO : error;
}

int db_device_flush(struct db_device *device, struct db_failure *failed)
{
    int rc = 0;
    *failed = (struct db_failure){.member = device->stripes.member_count};
    if (device->is_forked)
        return -ECHILD;
    for (uint32_t i = 0; i < device->stripes.member_count; i++) {
        int error = db_member_flush(&device->members[i]);
        if (error && !rc)
            rc = failed_on(failed, i, error);
    }
    return rc;
}

typedef int part_call(const struct part *part, void *context);

/* Calls this for each member's part of a range; *failed is the member that refuses, or their count
 * if it is the range. */
static int call_parts(struct db_device *device, uint64_t offset, uint64_t length, part_call *call,
                      void *context, struct db_failure *failed)
{
    *failed = (struct db_failure){.member = device->stripes.member_count};
    int rc = check_range(device, offset, length);
    for (uint32_t i = 0; !rc && i < device->stripes.member_count; i++) {
        struct part part = part_of(device, i, offset, length);
        if (part.length > 0) /* the kernel takes a length of 0 as the rest of the file */
            rc = call(&part, context);
        if (rc)
            rc = failed_on(failed, i, rc);
    }
    return rc;
}

static int discard_part(const struct part *part, void *context)
{
    (void)context;
    return db_member_discard(part->member, part->offset, part->length);
}

int db_device_discard(struct db_device *device, uint64_t offset, uint64_t length,
                      struct db_failure *failed)
{
    *failed = (struct db_failure){.member = device->stripes.member_count};
    int rc = check_range(device, offset, length);
    if (!rc && length > 0 && device->options.read_only)
        rc = -EBADF;
    return rc ? rc : call_parts(device, offset, length, discard_part, NULL, failed);
}

static int write_back_part(const struct part *part, void *wait)
{
    return db_member_write_back(part->member, part->offset, part->length, *(bool *)wait);
}

int db_device_write_back(struct db_device *device, uint64_t offset, uint64_t length, bool wait,
                         struct db_failure *failed)
{
    return call_parts(device, offset, length, write_back_part, &wait, failed);
}

int db_device_write_back_failures(struct db_device *device, uint64_t *out)
{
    *out = 0;
    if (device->is_forked)
        return -ECHILD;
    for (uint32_t i = 0; i < device->stripes.member_count; i++)
        *out += db_member_write_back_failures(&device->members[i]);
    return 0;
}

static int count_part(const struct part *part, void *out)
{
    return db_cached_count(part->member->buffered_fd, part->offset, part->length, out);
}

int db_device_cached(struct db_device *device, uint64_t offset, uint64_t length,
                     struct db_cached *out, struct db_failure *failed)
{
    memset(out, 0, sizeof(*out));
    return call_parts(device, offset, length, count_part, out, failed);
}

/* From now on NVMe commands may reach what is no longer in the page cache. Pages that are in use
 * stay there, and then so does the note of them. */
static void forget_dropped(struct db_device *device, uint64_t offset, uint64_t length)
{
    struct db_cached left;
    struct db_failure failed;
    if (db_coherence_has(&device->coherence, offset, length) &&
        db_device_cached(device, offset, length, &left, &failed) == 0 && left.resident_bytes == 0)
        db_coherence_forget(&device->coherence, offset, length);
}

static int drop_cached_part(const struct part *part, void *context)
{
    (void)context;
    return db_member_drop_cached(part->member, part->offset, part->length);
}

int db_device_drop_cached(struct db_device *device, uint64_t offset, uint64_t length,
                          uint64_t failures, struct db_failure *failed)
{
    int rc = db_device_write_back(device, offset, length, true, failed);
    uint64_t now = failures;
    if (!rc && failures != DB_ANY_FAILURES)
        rc = db_device_write_back_failures(device, &now);
    if (!rc && now != failures)
        rc = -ECANCELED;
    if (!rc)
        rc = call_parts(device, offset, length, drop_cached_part, NULL, failed);
    if (!rc && device->coherence.words)
        forget_dropped(device, offset, length);
    return rc;
}

int db_device_map(struct db_device *device, uint64_t offset, uint64_t length,
                  struct db_mapping **out, const void **bytes)
{
    int rc = check_range(device, offset, length);
    if (!rc && (length == 0 || device->stripes.member_count > 1))
        rc = -EOPNOTSUPP;
    if (!rc)
        rc = db_mapping_open(device->members[0].lock, offset, length, out, bytes);
    if (!rc) /* its pages are the caller's now, and counted by him */
        db_window_drop(&device->members[0].window, offset, length);
    return rc;
}
