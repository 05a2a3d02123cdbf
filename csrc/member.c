/* member.c - one file or block device: opened on both paths, locked, flushed, discarded. */
#define _GNU_SOURCE
#include "member.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

int db_member_identify(const char *path, struct db_member *member)
{
    struct stat status;
    *member = (struct db_member){
        .direct_fd = -1, .buffered_fd = -1, .watch_fd = -1, .space.fd = -1};
    pthread_mutex_init(&member->watch_lock, NULL);
    if (stat(path, &status) < 0)
        return -errno;
    if (S_ISCHR(status.st_mode)) {
        int rc = db_nvme_sibling(status.st_rdev, true, member->node, sizeof(member->node));
        if (rc)
            return rc;
        if (stat(member->node, &status) < 0)
            return -errno;
    }
    if (S_ISDIR(status.st_mode))
        return -EISDIR;
    if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode))
        return -ENOTBLK;
    bool is_block_device = S_ISBLK(status.st_mode);
    member->geometry.is_block_device = is_block_device;
    member->device = is_block_device ? status.st_rdev : status.st_dev;
    member->inode = is_block_device ? 0 : status.st_ino;
    return 0;
}

/* The buffered descriptor carries the locks. */
static int open_descriptors(const char *path, bool read_only, struct db_member *member)
{
    int access = read_only ? O_RDONLY : O_RDWR;
    /* On a block device O_EXCL without O_CREAT asks the kernel: not mounted, not held. */
    int exclusive = member->geometry.is_block_device && !read_only ? O_EXCL : 0;
    member->buffered_fd = open(path, access | exclusive | O_CLOEXEC);
    if (member->buffered_fd < 0)
        return -errno;
    if (flock(member->buffered_fd, (read_only ? LOCK_SH : LOCK_EX) | LOCK_NB) < 0)
        return -errno;
    /* No readahead: what lies behind a page-cached extent is another's, and mostly direct. Requests
     * are large enough to do without; if the advice is not taken, nothing but memory is lost. */
    posix_fadvise(member->buffered_fd, 0, 0, POSIX_FADV_RANDOM);
    int rc = db_lock_open(member->buffered_fd, &member->lock);
    if (rc)
        return rc;
    member->direct_fd = open(path, access | O_DIRECT | O_CLOEXEC);
    if (member->direct_fd < 0 && errno != EINVAL)
        return -errno;
    member->watch_fd = open(path, O_RDONLY | O_CLOEXEC);
    return member->watch_fd >= 0 ? 0 : -errno;
}

int db_member_open(const char *path, bool read_only, struct db_member *member)
{
    int rc = open_descriptors(member->node[0] ? member->node : path, read_only, member);
    if (rc)
        return rc;
    (void)db_member_write_back_failures(member); /* what failed before is not about us */
    bool has_direct = member->direct_fd >= 0;
    rc = db_geometry_read(has_direct ? member->direct_fd : member->buffered_fd,
                          member->geometry.is_block_device, &member->geometry);
    member->geometry.has_direct = has_direct;
    if (!rc)
        db_window_open(member->buffered_fd, member->watch_fd, member->geometry.size_bytes,
                       member->lock, &member->window);
    return rc;
}

/* What others have read of the block device, and the kernel would not know to be old. */
static void forget_all_cached(struct db_member *member)
{
    unsigned all = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
    (void)sync_file_range(member->direct_fd, 0, 0, all); /* errors are for the next flush to tell */
    posix_fadvise(member->buffered_fd, 0, 0, POSIX_FADV_DONTNEED);
}

/* Whether anybody writes to it whom commands would not see: it is not ours alone. */
static int check_unclaimed(const struct db_member *member)
{
    char path[sizeof("/proc/self/fd/-2147483648")];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", member->buffered_fd);
    int fd = open(path, O_RDONLY | O_EXCL | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    close(fd);
    return 0;
}

int db_member_use_nvme(struct db_member *member, bool read_only)
{
    int rc = read_only && member->geometry.is_block_device ? check_unclaimed(member) : 0;
    if (!rc)
        rc = db_nvme_open(member->buffered_fd, read_only, &member->space);
    if (!rc)
        forget_all_cached(member);
    return rc;
}

void db_member_leave_nvme(struct db_member *member)
{
    if (member->space.fd >= 0)
        forget_all_cached(member);
    db_nvme_close(&member->space);
}

void db_member_close(struct db_member *member)
{
    db_window_close(&member->window);
    db_member_leave_nvme(member);
    if (member->direct_fd >= 0)
        close(member->direct_fd);
    if (member->watch_fd >= 0)
        close(member->watch_fd);
    pthread_mutex_destroy(&member->watch_lock);
    if (member->lock)
        db_lock_close(member->lock);
    else if (member->buffered_fd >= 0)
        close(member->buffered_fd);
}

void db_member_abandon(struct db_member *member)
{
    close(member->direct_fd);
    close(member->buffered_fd);
    close(member->watch_fd);
    db_window_abandon(&member->window);
    db_nvme_close(&member->space);
}

/* ---- write-back, and what became of it ------------------------------------------------------- */

/* The error of a write-back that failed, of which this descriptor has not been told yet. */
static int news_of(int fd)
{
    /* Where nothing lies nothing is waited for. */
    int rc = sync_file_range(fd, (off_t)1 << 62, 1, SYNC_FILE_RANGE_WAIT_BEFORE);
    return rc < 0 && errno != ENOSYS && errno != EPERM ? -errno : 0;
}

/* The lock is held. */
static void look(struct db_member *member)
{
    int error = news_of(member->watch_fd);
    if (error) {
        member->write_back_error = error;
        member->write_back_failures++;
    }
}

static uint64_t failures_so_far(struct db_member *member)
{
    pthread_mutex_lock(&member->watch_lock);
    look(member);
    uint64_t failures = member->write_back_failures;
    pthread_mutex_unlock(&member->watch_lock);
    return failures;
}

/* What a call that synced has to say (the lock is held): its own error, or that of a write-back
 * that failed after so many had, whoever was told of it. */
static int outcome(struct db_member *member, int rc, uint64_t failures)
{
    look(member);
    if (rc && member->write_back_failures == failures) { /* the drive refused in another way */
        member->write_back_error = rc;
        member->write_back_failures++;
    }
    return !rc && member->write_back_failures != failures ? member->write_back_error : rc;
}

uint64_t db_member_write_back_failures(struct db_member *member)
{
    pthread_mutex_lock(&member->watch_lock);
    look(member);
    uint64_t failures = member->failures_told = member->write_back_failures;
    pthread_mutex_unlock(&member->watch_lock);
    return failures;
}

/* fdatasync(2). With NVMe commands it is two steps, of which the second is the drive's: the kernel
 * leaves it out where it has been told that the drive's cache needs none. */
static int sync_all(const struct db_member *member)
{
    if (member->space.fd < 0)
        return fdatasync(member->buffered_fd) < 0 ? -errno : 0;
    unsigned all = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
    if (sync_file_range(member->buffered_fd, 0, 0, all) < 0)
        return -errno;
    int rc = db_nvme_flush(&member->space);
    if (rc == -EAGAIN) /* the block layer waits until there is a way to the drive again */
        rc = fdatasync(member->buffered_fd) < 0 ? -errno : 0;
    return rc;
}

int db_member_flush(struct db_member *member)
{
    (void)news_of(member->buffered_fd); /* old, and counted: sync_all() is to tell what is new */
    int status = sync_all(member);
    pthread_mutex_lock(&member->watch_lock);
    int rc = outcome(member, status > 0 ? -EIO : status, member->failures_told);
    member->failures_told = member->write_back_failures;
    pthread_mutex_unlock(&member->watch_lock);
    return status > 0 ? status : rc;
}

int db_member_write_back(struct db_member *member, uint64_t offset, uint64_t length, bool wait)
{
    int fd = member->direct_fd >= 0 ? member->direct_fd : member->buffered_fd;
    uint64_t before = failures_so_far(member);
    unsigned flags = SYNC_FILE_RANGE_WRITE;
    if (wait)
        flags |= SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER;
    (void)news_of(fd); /* old, and counted: of other ranges, or of an earlier try */
    int rc = sync_file_range(fd, (off_t)offset, (off_t)length, flags) < 0 ? -errno : 0;
    if (!wait && !rc)
        return 0;
    pthread_mutex_lock(&member->watch_lock);
    rc = outcome(member, rc, before);
    pthread_mutex_unlock(&member->watch_lock);
    return rc;
}

int db_member_drop_cached(struct db_member *member, uint64_t offset, uint64_t length)
{
    db_window_drop(&member->window, offset, length);
    return -posix_fadvise(member->buffered_fd, (off_t)offset, (off_t)length, POSIX_FADV_DONTNEED);
}

int db_member_discard(struct db_member *member, uint64_t offset, uint64_t length)
{
    const struct db_nvme_namespace *space = &member->space;
    int rc;
    if (space->fd >= 0 && space->deallocate_bytes > 0) {
        /* Of what is dirty nothing is to be written when the range is another's. */
        rc = db_member_write_back(member, offset, length, true);
        if (!rc)
            rc = db_member_drop_cached(member, offset, length);
        if (!rc)
            rc = db_nvme_deallocate(space, offset, length);
        if (rc != -EAGAIN)
            return rc;
    }
    db_window_drop(&member->window, offset, length);
    if (member->geometry.is_block_device) {
        uint64_t range[2] = {offset, length};
        bool has_to_write = space->fd >= 0 && space->zero_bytes > 0;
        rc = ioctl(member->buffered_fd, has_to_write ? BLKZEROOUT : BLKDISCARD, range);
    } else {
        rc = fallocate(member->buffered_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                       (off_t)offset, (off_t)length);
    }
    return rc < 0 ? -errno : 0;
}
