/* geometry.c - size, block sizes, alignment and limits of a file or block device. */
#define _GNU_SOURCE
#include "geometry.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { TRANSFER_UNKNOWN_BYTES = 128 * 1024 }; /* the smallest limit that drives commonly have */

int db_queue_attribute(dev_t device, const char *name, uint64_t *value)
{
    static const char *const places[] = {"/sys/dev/block/%u:%u/queue/%s",
                                         "/sys/dev/block/%u:%u/../queue/%s"};
    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        char path[128], text[32];
        snprintf(path, sizeof(path), places[i], major(device), minor(device), name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            continue;
        ssize_t length = read(fd, text, sizeof(text) - 1);
        close(fd);
        if (length <= 0)
            return -EIO;
        text[length] = '\0';
        *value = strtoull(text, NULL, 10);
        return 0;
    }
    return -ENOENT; /* tmpfs, FUSE, network: no block queue below */
}

static int read_block_device(int fd, struct db_geometry *out)
{
    uint64_t size_bytes = 0;
    int lba_bytes = 0;
    unsigned physical_bytes = 0;
    if (ioctl(fd, BLKGETSIZE64, &size_bytes) < 0 || ioctl(fd, BLKSSZGET, &lba_bytes) < 0 ||
        ioctl(fd, BLKPBSZGET, &physical_bytes) < 0)
        return -errno;
    out->size_bytes = size_bytes;
    out->lba_bytes = (uint32_t)lba_bytes;
    out->physical_block_bytes = physical_bytes;
    return 0;
}

/* Without a word from the kernel: the largest common block is safe everywhere. */
static void assume_file_blocks(struct db_geometry *out)
{
    out->lba_bytes = DB_BLOCK_BYTES;
    out->physical_block_bytes = DB_BLOCK_BYTES;
}

int db_geometry_read(int fd, bool is_block_device, struct db_geometry *out)
{
    struct stat status;
    uint32_t memory_bytes = 0, offset_bytes = 0;
    memset(out, 0, sizeof(*out));
    if (fstat(fd, &status) < 0)
        return -errno;
    out->is_block_device = is_block_device;
    if (is_block_device) {
        int rc = read_block_device(fd, out);
        if (rc)
            return rc;
    } else {
        out->size_bytes = (uint64_t)status.st_size;
        assume_file_blocks(out);
    }
    out->memory_align_bytes = out->lba_bytes;
    if (db_direct_alignment(fd, &memory_bytes, &offset_bytes) == 0 && memory_bytes > 0 &&
        offset_bytes > 0) {
        out->memory_align_bytes = memory_bytes;
        if (!is_block_device)
            out->lba_bytes = offset_bytes;
    }
    out->size_bytes -= out->size_bytes % DB_BLOCK_BYTES;
    if (out->size_bytes == 0)
        return -EINVAL;
    if (DB_BLOCK_BYTES % out->lba_bytes != 0)
        return -EOPNOTSUPP;

    dev_t queue = is_block_device ? status.st_rdev : status.st_dev;
    uint64_t value;
    out->max_transfer_bytes = TRANSFER_UNKNOWN_BYTES;
    if (db_queue_attribute(queue, "max_sectors_kb", &value) == 0 && value > 0)
        out->max_transfer_bytes = value * 1024;
    out->can_discard = !is_block_device;
    if (is_block_device && db_queue_attribute(queue, "discard_max_bytes", &value) == 0)
        out->can_discard = value > 0;
    out->can_poll = db_queue_attribute(queue, "io_poll", &value) != 0 || value > 0;
    return 0;
}

static uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

void db_geometry_join(struct db_geometry *all, const struct db_geometry *one)
{
    if (one->size_bytes < all->size_bytes)
        all->size_bytes = one->size_bytes;
    if (one->max_transfer_bytes < all->max_transfer_bytes)
        all->max_transfer_bytes = one->max_transfer_bytes;
    /* Each is a power of two, so the largest is a multiple of all. */
    all->lba_bytes = larger(all->lba_bytes, one->lba_bytes);
    all->memory_align_bytes = larger(all->memory_align_bytes, one->memory_align_bytes);
    all->physical_block_bytes = larger(all->physical_block_bytes, one->physical_block_bytes);
    all->is_block_device &= one->is_block_device;
    all->has_direct &= one->has_direct;
    all->can_discard &= one->can_discard;
    all->can_poll &= one->can_poll;
}
