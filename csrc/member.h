/* member.h - one file or block device: opened on both paths, locked, flushed, discarded.
 *
 * An NVMe namespace may be given by either of its nodes: what is opened is the block device, and
 * the other one when it is wanted.
 *
 * Both paths are descriptors of the same file, one with O_DIRECT and one without. Offsets are the
 * member's own, in ranges that lie inside it. */
#ifndef DUALBLADE_MEMBER_H
#define DUALBLADE_MEMBER_H

#include "geometry.h"
#include "mapping.h"
#include "nvme.h"
#include "window.h"

#include <pthread.h>
#include <sys/types.h>

struct db_member {
    struct db_geometry geometry;
    int direct_fd, buffered_fd; /* -1: not open, or there is no O_DIRECT here */
    /* The kernel tells each open file of a failed write-back once. This one is asked for nothing
     * else, and under the mutex: so whatever another descriptor was told, and whoever heard it,
     * it is counted here, and the count is true the moment that it is read. */
    int watch_fd;
    pthread_mutex_t watch_lock;
    int write_back_error;         /* -errno of the last one */
    uint64_t write_back_failures; /* known of since it was opened */
    uint64_t failures_told;       /* of these, by db_member_flush() or _failures() */
    struct db_window window;      /* of the buffered descriptor, where it has one */
    struct db_lock *lock;       /* of the buffered descriptor; NULL: it has none yet */
    dev_t device;               /* of the block device, or of the file's filesystem */
    ino_t inode;                /* 0 for a block device, which may have several names */
    struct db_nvme_namespace space; /* its fd is -1 unless it is used */
    char node[32]; /* the block device's path, where the character device was given; else empty */
};

/* Finds out what it is and which, without opening it. Errors are those of db_device_open(). */
int db_member_identify(const char *path, struct db_member *member);
/* Opens what was identified, locks it and reads its geometry. It is to be closed all the same when
 * either of the two says no. */
int db_member_open(const char *path, bool read_only, struct db_member *member);
void db_member_close(struct db_member *member);
/* In the child after a fork: closes the descriptors, the parent keeps its lock. */
void db_member_abandon(struct db_member *member);

/* Opens the NVMe namespace that it is; see db_nvme_open(). -EBUSY: it was opened to be read only,
 * and others use it. From then on what the page cache held
 * before is gone from it, and flushes and discards are NVMe commands. */
int db_member_use_nvme(struct db_member *member, bool read_only);
void db_member_leave_nvme(struct db_member *member);

/* Of these two the result may also be positive: an NVMe status. */
int db_member_flush(struct db_member *member);
int db_member_discard(struct db_member *member, uint64_t offset, uint64_t length);
int db_member_write_back(struct db_member *member, uint64_t offset, uint64_t length, bool wait);
/* Drops the clean pages of a range. */
int db_member_drop_cached(struct db_member *member, uint64_t offset, uint64_t length);
/* How many failed write-backs are known of; the flush tells of those after these. */
uint64_t db_member_write_back_failures(struct db_member *member);

#endif
