/* cached.c - how much of a file or block device the page cache holds.
 *
 * cachestat(2) says everything, from Linux 6.5 on. mincore(2), through a mapping that is made for
 * it, says which pages are there, and nothing of those that are dirty or were reclaimed. */
#define _GNU_SOURCE
#include "cached.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

enum { PIECE_PAGES = 8192 }; /* of a mapping: as many bytes on the stack */

static uint64_t page_bytes(void)
{
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

static int count_by_cachestat(int fd, uint64_t offset, uint64_t length, struct db_cached *out)
{
    struct {
        uint64_t offset, length;
    } range = {offset, length};
    struct {
        uint64_t cached, dirty, writeback, evicted, recently_evicted;
    } pages;
    if (syscall(SYS_cachestat, fd, &range, &pages, 0) < 0)
        return -errno;
    out->resident_bytes += pages.cached * page_bytes();
    out->dirty_bytes += pages.dirty * page_bytes();
    out->writeback_bytes += pages.writeback * page_bytes();
    out->evicted_bytes += pages.evicted * page_bytes();
    out->recently_evicted_bytes += pages.recently_evicted * page_bytes();
    return 0;
}

bool db_cached_is_told(int fd)
{
    struct stat status;
    char path[sizeof("/proc/self/fd/-2147483648")];
    if (fstat(fd, &status) == 0 && status.st_uid == geteuid())
        return true;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return faccessat(AT_FDCWD, path, W_OK, AT_EACCESS) == 0;
}

static int count_by_mincore(int fd, uint64_t offset, uint64_t length, struct db_cached *out)
{
    unsigned char is_resident[PIECE_PAGES];
    uint64_t page = page_bytes();
    uint64_t end = (offset + length + page - 1) / page * page;
    uint64_t at = offset / page * page;
    while (at < end) {
        uint64_t piece = end - at < PIECE_PAGES * page ? end - at : PIECE_PAGES * page;
        /* Nothing is read through it. */
        void *mapped = mmap(NULL, piece, PROT_NONE, MAP_SHARED, fd, (off_t)at);
        if (mapped == MAP_FAILED)
            return -errno;
        int rc = mincore(mapped, piece, is_resident) < 0 ? -errno : 0;
        munmap(mapped, piece);
        if (rc)
            return rc;
        for (uint64_t i = 0; i < piece / page; i++)
            out->resident_bytes += (is_resident[i] & 1) * page;
        at += piece;
    }
    out->resident_only = true;
    return 0;
}

int db_cached_count(int fd, uint64_t offset, uint64_t length, struct db_cached *out)
{
    int rc = count_by_cachestat(fd, offset, length, out);
    /* EPERM: a filter on system calls that does not know it, or a file of somebody else's;
     * EOPNOTSUPP: hugetlbfs. */
    if (rc != -ENOSYS && rc != -EPERM && rc != -EOPNOTSUPP)
        return rc;
    return db_cached_is_told(fd) ? count_by_mincore(fd, offset, length, out) : -ENOSYS;
}

int db_cached_of_path(const char *path, struct db_cached *out)
{
    memset(out, 0, sizeof(*out));
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    struct stat status;
    int rc = fstat(fd, &status) < 0 ? -errno : 0;
    if (!rc && !S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode))
        rc = S_ISDIR(status.st_mode) ? -EISDIR : -ENOTBLK;
    off_t size_bytes = rc ? 0 : lseek(fd, 0, SEEK_END);
    if (size_bytes < 0)
        rc = -errno;
    else if (size_bytes > 0)
        rc = db_cached_count(fd, 0, (uint64_t)size_bytes, out);
    close(fd);
    return rc;
}
