/* member.c - one file or block device: opened on both paths, locked, flushed, discarded. */
#define _GNU_SOURCE
#include "member.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

int db_member_identify(const char *path, struct db_member *member)
{
    struct stat status;
    *member = (struct db_member){.direct_fd = -1, .buffered_fd = -1};
    if (stat(path, &status) < 0)
        return -errno;
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
    return member->direct_fd >= 0 || errno == EINVAL ? 0 : -errno;
}

int db_member_open(const char *path, bool read_only, struct db_member *member)
{
    int rc = open_descriptors(path, read_only, member);
    if (rc)
        return rc;
    bool has_direct = member->direct_fd >= 0;
    rc = db_geometry_read(has_direct ? member->direct_fd : member->buffered_fd,
                          member->geometry.is_block_device, &member->geometry);
    member->geometry.has_direct = has_direct;
    return rc;
}

void db_member_close(struct db_member *member)
{
    if (member->direct_fd >= 0)
        close(member->direct_fd);
    if (member->lock)
        db_lock_close(member->lock);
    else if (member->buffered_fd >= 0)
        close(member->buffered_fd);
}

void db_member_abandon(struct db_member *member)
{
    close(member->direct_fd);
    close(member->buffered_fd);
}

int db_member_flush(struct db_member *member)
{
    return fdatasync(member->buffered_fd) < 0 ? -errno : 0;
}

int db_member_discard(struct db_member *member, uint64_t offset, uint64_t length)
{
    int rc;
    if (member->geometry.is_block_device) {
        uint64_t range[2] = {offset, length};
        rc = ioctl(member->buffered_fd, BLKDISCARD, range);
    } else {
        rc = fallocate(member->buffered_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                       (off_t)offset, (off_t)length);
    }
    return rc < 0 ? -errno : 0;
}

int db_member_write_back(struct db_member *member, uint64_t offset, uint64_t length, bool wait)
{
    /* The kernel tells each open file of a failed write-back once: told to this descriptor, it is
     * still news to the one that is flushed, whose user may be somebody else. */
    int fd = member->direct_fd >= 0 ? member->direct_fd : member->buffered_fd;
    unsigned flags = SYNC_FILE_RANGE_WRITE;
    if (wait)
        flags |= SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER;
    return sync_file_range(fd, (off_t)offset, (off_t)length, flags) < 0 ? -errno : 0;
}

int db_member_drop_cached(struct db_member *member, uint64_t offset, uint64_t length)
{
    int rc = db_member_write_back(member, offset, length, true);
    if (rc)
        return rc;
    return -posix_fadvise(member->buffered_fd, (off_t)offset, (off_t)length, POSIX_FADV_DONTNEED);
}
