/* dualblade.h - the whole of the C core as its callers see it.
 *
 * Conventions, for every function here:
 *   - int results are 0 or -errno, outputs go through pointers; errno itself is never set.
 *   - sizes and offsets are bytes unless the name says otherwise.
 *   - nothing here includes Python.h or calls back into a caller.
 *   - after db_device_open() no function on the I/O path allocates memory.
 */
#ifndef DUALBLADE_H
#define DUALBLADE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A page of the kernel's page cache, and the unit in which extents are laid out: two tensors
 * never share a page, so one can be dropped from the page cache without touching its neighbour. */
#define DB_BLOCK_BYTES 4096u

/* ---- device: files or block devices as one run of bytes, reached on two paths --------------- */

/* A device of several members is striped over them: its unit s of stripe_bytes is unit s / n of
 * member s % n. Offsets are the device's own everywhere. */
#define DB_MEMBERS_MAX 64u

enum db_path {
    DB_PATH_DIRECT = 0,    /* past the page cache: O_DIRECT, or NVMe commands */
    DB_PATH_PAGECACHE = 1, /* through the page cache: buffered I/O */
    DB_PATH_COUNT = 2,
};

enum db_direction { DB_READ = 0, DB_WRITE = 1 };

enum db_engine_id {
    DB_ENGINE_AUTO = 0, /* the first of nvme, uring, aio, threads that works here */
    DB_ENGINE_URING = 1,
    DB_ENGINE_AIO = 2,
    DB_ENGINE_THREADS = 3,
    DB_ENGINE_NVME = 4, /* commands to an NVMe namespace, by its character device */
};

struct db_device_options {
    enum db_engine_id engine; /* for the direct path; the page-cache path uses threads */
    uint32_t queue_depth;     /* requests in flight on the direct path for each member, 1 to 4096;
                                 16384 for all */
    uint32_t threads;         /* workers of each threads engine for each member, 1 to 64; 256 for
                                 all */
    uint32_t chunk_bytes;     /* what one checksum covers; a power of two >= DB_BLOCK_BYTES */
    uint32_t request_bytes;   /* larger transfers are split at this, a multiple of chunk_bytes; 0:
                                 at what is measured to be best while they run (direct path) */
    uint64_t staging_bytes;   /* aligned memory for buffers that direct I/O cannot use in place */
    uint64_t stripe_bytes;    /* of several members: a power of two >= chunk_bytes */
    bool read_only;
    bool sqpoll; /* a kernel thread takes requests without a system call; io_uring only */
    bool iopoll; /* completions are polled for, not interrupted for; io_uring, where the driver
                    has queues for it */
};

/* Of a device with several members: what suits all of them. */
struct db_geometry {
    uint64_t size_bytes;           /* several members: as many whole units of each as the smallest
                                      has */
    uint32_t lba_bytes;            /* logical block: the unit and alignment of direct I/O */
    uint32_t physical_block_bytes; /* what the device writes without reading first */
    uint32_t memory_align_bytes;   /* what direct I/O asks of a buffer's address */
    uint64_t max_transfer_bytes;   /* the largest transfer that the kernel does not split */
    bool has_placement; /* the direct path keeps writes to tails apart from others on the drive */
    bool is_block_device;
    bool has_direct;  /* false: this filesystem has no O_DIRECT, both paths are buffered */
    bool can_discard;
    bool can_poll; /* false: the driver has no polling queues; true: the first read will tell */
};

struct db_path_stats {
    uint64_t reads, writes;           /* requests completed */
    uint64_t read_bytes, write_bytes; /* moved to and from the device */
    uint64_t staged_bytes;            /* of these, copied through staging */
    uint64_t resumed;                 /* short transfers that were continued */
    uint64_t errors;                  /* requests that failed */
    uint64_t checksum_mismatches;
    uint64_t submits;                 /* crossings into the kernel to submit */
    uint64_t registered_bytes;        /* memory that the engine knows, staging included */
    uint32_t in_flight;               /* requests in use now */
    uint32_t read_request_bytes, write_request_bytes; /* at which large transfers are split now */
};

struct db_device;

/* Opens the members in their order and locks each against other processes (flock; O_EXCL on a
 * block device). *failed is the member that an error is about, path_count if none in particular.
 *   -ENOTUNIQ     it is the same file or device as an earlier one
 *   -EWOULDBLOCK  another process has it locked     -EBUSY  mounted or held by the kernel
 *   -EISDIR, -ENOTBLK  neither a file nor a block device
 *   -EINVAL  empty, less than a stripe unit, or an option out of range
 *   -ENOSYS  the engine asked for is not built in
 *   -EUSERS  a limit is reached: fs.aio-max-nr, or RLIMIT_NPROC for the threads
 *   -EOPNOTSUPP  sqpoll or iopoll with another engine, or on a device that can't
 *   and whatever open(2), io_uring_setup(2) or io_setup(2) gives. */
int db_device_open(const char *const *paths, uint32_t path_count,
                   const struct db_device_options *options, uint32_t *failed,
                   struct db_device **out);
/* Waits for what is in flight, then frees. After a fork, in the child: frees without waiting. */
void db_device_close(struct db_device *device);

const struct db_geometry *db_device_geometry(const struct db_device *device);
const struct db_geometry *db_device_member_geometry(const struct db_device *device,
                                                    uint32_t member);
const char *db_device_engine_name(const struct db_device *device, enum db_path path);
void db_device_stats(struct db_device *device, enum db_path path, struct db_path_stats *out);
/* -errno of an engine that AUTO tried and could not use, 0 if it was not tried or works. */
int db_device_engine_refusal(const struct db_device *device, enum db_engine_id engine);

/* Registers memory with the direct path's engine, which then need not look up its pages for each
 * request; any part of it will do. It must stay mapped until it is unregistered, with the same
 * start and length. -EOPNOTSUPP: the engine or kernel can't; -ENOMEM: over RLIMIT_MEMLOCK;
 * -ENOSPC: the table is full; -EFAULT: not writable memory of ours; -EINVAL: empty. */
int db_device_register(struct db_device *device, void *memory, uint64_t length);
/* -ENOENT: nothing is registered with this start and length. */
int db_device_unregister(struct db_device *device, void *memory, uint64_t length);

/* In each of these *failed is what the error is about. */
struct db_failure {
    uint32_t member;      /* or the number of members */
    uint16_t nvme_status; /* not 0: what the drive answered; the error is -EIO then */
};

/* What was written reaches the medium (fdatasync): of every member, whatever becomes of one.
 * -EIO and what fdatasync(2) gives. */
int db_device_flush(struct db_device *device, struct db_failure *failed);
/* The content of a range is no longer needed and reads as anything. -EOPNOTSUPP if it can't. */
int db_device_discard(struct db_device *device, uint64_t offset, uint64_t length,
                      struct db_failure *failed);
/* Starts to write a range's dirty pages back, without waiting, as far as the drive's queue takes
 * them; with `wait` returns when all are written, which is not yet on the medium. The error of a
 * write-back of another range that failed meanwhile may come up here, and does so again in
 * db_device_flush(). -EIO, -ENOSPC, -ENOMEM. */
int db_device_write_back(struct db_device *device, uint64_t offset, uint64_t length, bool wait,
                         struct db_failure *failed);
/* How often a write-back of this device has failed since it was opened, as far as the kernel knows
 * by now, whoever asked for it and whoever was told. The kernel takes the pages for clean then, and
 * may drop them: a range whose pages were dirty, and that were written back between two calls that
 * give the same number, is on the drive; with another number it may be in memory alone.
 * db_device_flush() tells no more of the failures that were told here. Takes no time. -ECHILD. */
int db_device_write_back_failures(struct db_device *device, uint64_t *out);
#define DB_ANY_FAILURES UINT64_MAX
/* Writes a range's dirty pages back and drops it from the page cache. -ECANCELED, and nothing is
 * dropped: there have been other than so many failures, and what is cached may be all there is. */
int db_device_drop_cached(struct db_device *device, uint64_t offset, uint64_t length,
                          uint64_t failures, struct db_failure *failed);

/* What the page cache holds of a range, in whole pages. */
struct db_cached {
    uint64_t resident_bytes;
    uint64_t dirty_bytes;            /* of these, changed and not yet being written */
    uint64_t writeback_bytes;        /* of these, being written */
    uint64_t evicted_bytes;          /* that reclaim took and nobody has read again, as far as the
                                        kernel remembers */
    uint64_t recently_evicted_bytes; /* of these, so lately that they were in use */
    bool resident_only;              /* before Linux 6.5 the others are not known, and 0 */
};
/* -ENOSYS: the kernel does not say. */
int db_device_cached(struct db_device *device, uint64_t offset, uint64_t length,
                     struct db_cached *out, struct db_failure *failed);
/* The same of all of a file or block device that need not be a device of ours, nor free. Neither
 * locks nor reads it. -ENOSYS, -EISDIR, -ENOTBLK, and what open(2) gives. */
int db_cached_of_path(const char *path, struct db_cached *out);

/* The page cache's own pages of a range as memory that can be read, for as long as the mapping is
 * open, which may be longer than the device is: until then nobody else can open it. *bytes is where
 * the range begins. A page that the kernel has dropped is read again when it is looked at, and if
 * that fails the process gets SIGBUS: who maps a range should have read it just before.
 *   -EOPNOTSUPP  of several members, or length 0    -ENODEV  this filesystem has no mappings
 *   -ENOMEM, -EAGAIN  too many mappings, or too much locked memory */
struct db_mapping;
int db_device_map(struct db_device *device, uint64_t offset, uint64_t length,
                  struct db_mapping **out, const void **bytes);
void db_mapping_close(struct db_mapping *mapping);

/* ---- I/O: a batch of contiguous runs, submitted and waited for as one ----------------------- */

struct db_io {
    uint64_t offset;      /* on the device; a multiple of lba_bytes on the direct path */
    void *buffer;         /* any alignment; the caller keeps it until the batch is done */
    uint64_t length;      /* any length: the last block is padded with zeros on a direct write */
    uint64_t *checksums;  /* one for each chunk_bytes of the buffer, or NULL.
                             write: filled in.  read: compared, -EBADMSG on a mismatch */
    /* results */
    int error;             /* 0 or the -errno of the first of its pieces that failed */
    uint64_t error_offset; /* where on the device */
    uint16_t nvme_status;  /* not 0: what the drive answered there; error is -EIO then */
};

struct db_batch {
    /* set by the caller */
    struct db_device *device;
    enum db_path path;
    enum db_direction direction;
    struct db_io *ios;
    uint32_t io_count;
    bool is_ahead; /* a read that nobody waits for yet: all of it goes to the device at once, when
                      those before it are almost done */
    bool is_tail;  /* a write to the end of something that grows: a drive with data placement keeps
                      it apart from what is written whole; others take no notice */
    /* private to queue.c */
    uint32_t next_io;
    uint64_t next_byte;
    uint32_t in_flight;
    bool submitted;
    bool issued;
    struct db_batch *next;
};

/* Starts the batch and returns at once. -EINVAL: an offset, length or buffer out of range (then
 * nothing was started); -EBADF: read-only; -ECHILD: the device was opened before a fork. */
int db_batch_submit(struct db_batch *batch);
/* 0: done, and each io's error says how. -ETIMEDOUT: not yet. A negative timeout waits forever. */
int db_batch_wait(struct db_batch *batch, int64_t timeout_ns);

/* ---- checksums (XXH3, 64 bits) -------------------------------------------------------------- */

uint64_t db_checksum(const void *data, size_t length);
/* One checksum for each chunk_bytes of data. */
void db_checksum_chunks(const void *data, uint64_t length, uint32_t chunk_bytes, uint64_t *out);

/* ---- tail: the end of a growing run, held back until it fills a block ------------------------ */

/* Not thread-safe: callers hold a lock. A checksum here is db_checksum() of one chunk, which covers
 * the bytes from c * chunk_bytes to (c + 1) * chunk_bytes or to the end, whichever comes first. */
struct db_tail;

/* Empty, at byte 0. -EINVAL: chunk_bytes is not a power of two >= DB_BLOCK_BYTES; -ENOMEM. */
int db_tail_open(uint32_t chunk_bytes, struct db_tail **out);
void db_tail_close(struct db_tail *tail);
/* Forget everything and stand at byte `stored` (a multiple of DB_BLOCK_BYTES), where `chunk` holds
 * the stored bytes of the chunk begun before it (stored % chunk_bytes of them; NULL if none). */
void db_tail_reset(struct db_tail *tail, uint64_t stored, const void *chunk);
/* Appends data; with `copy`, memory of the same length, leaves a copy there, made while the
 * checksums are taken. Says what is to be written now as up to two runs: *head (one block, owned by
 * the tail and valid until the next call; head_offset) and the part of data that fills whole
 * blocks (body_offset on the run, body_start in data and in the copy, body_bytes). From here on
 * these count as stored. digests gets the checksum of every chunk that gained stored bytes, from
 * first_chunk on, which is the one that the first of them went to; the last one ends where the
 * stored bytes do. They are digest_count, at most length / chunk_bytes + 2, and none if everything
 * was held back. */
struct db_tail_write {
    const void *head;
    uint64_t head_offset;
    uint64_t body_offset, body_start, body_bytes;
    uint64_t first_chunk;
    uint32_t digest_count;
};
void db_tail_append(struct db_tail *tail, const void *data, uint64_t length, void *copy,
                    struct db_tail_write *out, uint64_t *digests);
/* Bytes that are on the device, and bytes held back after them. */
uint64_t db_tail_stored(const struct db_tail *tail);
uint32_t db_tail_held(const struct db_tail *tail);
/* The block that holds the bytes held back, padded with zeros; valid until the next call. */
const void *db_tail_block(const struct db_tail *tail);
/* The checksum of the chunk that byte `stored` is in, with the bytes held back included; where
 * there are none of either, because a chunk has just been completed, it is that of no bytes. */
uint64_t db_tail_digest(const struct db_tail *tail);

/* ---- extents: who owns which run of the device ----------------------------------------------- */

/* Not thread-safe: callers hold a lock. Whatever fails leaves the map as it was. */
struct db_extent_map;

struct db_extent_stats {
    uint64_t total_bytes;
    uint64_t free_bytes;
    uint64_t largest_free_bytes;
    uint64_t free_extents; /* runs that the free space is broken into */
};

/* A map of [0, size_bytes), all free. unit_bytes, a power of two, is what lengths are rounded up
 * to and the least alignment; size_bytes is rounded down to it. -EINVAL: unit_bytes is not a power
 * of two, or size_bytes is less than one unit or more than INT64_MAX; -ENOMEM. */
int db_extent_map_open(uint64_t size_bytes, uint32_t unit_bytes, struct db_extent_map **out);
void db_extent_map_close(struct db_extent_map *map);
/* Takes length bytes at a multiple of align_bytes (a power of two; 0 means unit_bytes) out of the
 * smallest free run that holds them; of equal ones, the first. Where align_bytes is more than
 * unit_bytes and the 32 smallest candidates do not hold them aligned, the smallest run of length +
 * align_bytes - unit_bytes is taken instead, though one in between might do. -ENOSPC: no run holds
 * them; -EINVAL: length 0 or more than INT64_MAX, or align_bytes not a power of two; -ENOMEM. */
int db_extent_allocate(struct db_extent_map *map, uint64_t length, uint64_t align_bytes,
                       uint64_t *offset);
/* Takes exactly this run; offset is a multiple of unit_bytes. -EEXIST: part of it is taken already;
 * -EINVAL: length 0, offset not a multiple, or outside the map; -ENOMEM. */
int db_extent_reserve(struct db_extent_map *map, uint64_t offset, uint64_t length);
/* Gives a run back, or a part of one. -ENOENT: part of it is free; -EINVAL: as above; -ENOMEM. */
int db_extent_free(struct db_extent_map *map, uint64_t offset, uint64_t length);
void db_extent_map_stats(const struct db_extent_map *map, struct db_extent_stats *out);
/* The first free run that begins at or after *offset; -ENOENT when there is none. For walking all
 * of them: begin at 0, go on at *offset + *length. */
int db_extent_next_free(const struct db_extent_map *map, uint64_t *offset, uint64_t *length);
/* Recomputes every invariant from the trees: 0, or -EUCLEAN. O(n log n), for tests and `check`. */
int db_extent_map_verify(const struct db_extent_map *map);

/* ---- memory, and what is alive --------------------------------------------------------------- */

/* Page-aligned memory, in huge pages where the kernel has them to give. -ENOMEM. */
int db_memory_map(size_t length, void **out);
void db_memory_unmap(void *memory, size_t length);

/* Objects alive in the process: all zero when everything is closed. */
struct db_counters {
    int64_t devices, requests, batches, buffers, extent_maps, tails, mappings;
};
void db_counters(struct db_counters *out);
/* Page cache that all devices together have mapped for themselves, so that reads can copy from it.
 * An upper bound: what the kernel has reclaimed of it is counted until it is dropped. */
uint64_t db_window_bytes(void);

/* ---- is it safe to write to this device? ----------------------------------------------------- */

/* What libblkid finds at the start of a device or file: a word such as "ext4", "gpt" or
 * "LVM2_member" in name; an empty name when it finds nothing.
 * -ENOSYS: there is no libblkid; -errno of open(2). */
int db_find_signature(const char *path, char *name, size_t name_size);
/* The path of the other node of an NVMe namespace: of its block device (/dev/nvme0n1) if this is
 * the number of its character device (/dev/ng0n1), else the other way. -ENOTBLK: it is no
 * namespace, but maybe a part of one; -ENODEV, -ENOENT: it has no such node here; -ENAMETOOLONG. */
int db_nvme_sibling(uint64_t device, bool is_character, char *path, size_t path_size);

#endif
