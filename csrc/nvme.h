/* nvme.h - an NVMe namespace as its character device shows it: what it is, and commands that are
 * waited for. Those that move data are engine_nvme.c's.
 *
 * A namespace has two nodes: the block device (/dev/nvme0n1) and the character device (/dev/ng0n1)
 * that takes commands. Nothing splits a command on its way to the drive, counts its blocks, or
 * looks after the page cache. */
#ifndef DUALBLADE_NVME_H
#define DUALBLADE_NVME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct db_nvme_namespace {
    int fd; /* of the character device; -1: there is none, or it is not used */
    uint32_t nsid;
    uint32_t lba_bytes, lba_shift;
    uint32_t segments;       /* runs of memory in one command at most, a page each or more */
    uint32_t transfer_bytes; /* the largest command with memory that begins anywhere */
    uint32_t most_bytes;     /* the largest with memory that begins with a page */
    uint32_t drive_bytes;    /* the largest with memory in runs that are long enough */
    uint32_t boundary_bytes; /* commands should not cross a multiple of this; 0: any */
    uint64_t deallocate_bytes; /* the longest range of a deallocate; 0: it can't */
    bool forgets; /* what is deallocated reads as zeros, or as ones; else perhaps as it was, */
    /* and is overwritten by write zeroes commands: of so many bytes at most (0: no need, or it
     * can't), and whether they deallocate too. */
    uint32_t zero_bytes;
    bool zero_deallocates;
    /* Flexible data placement: what is written with one handle is kept apart from what is written
     * with another. Without, or with fewer than two, has_placement is false. */
    bool has_placement;
    uint16_t run_handle, tail_handle;
};

/* Opens the character device of an open block device, and asks the drive what it is.
 *   -ENODEV       it has none: no NVMe namespace, a partition, or an old kernel
 *   -EMEDIUMTYPE  its blocks carry metadata
 *   -ESTALE       the two nodes are not of one namespace
 *   -ENOENT, -EACCES, -EPERM  of the node; before Linux 6.2 commands need CAP_SYS_ADMIN
 *   -EREMOTEIO    the drive did not answer */
int db_nvme_open(int block_fd, bool read_only, struct db_nvme_namespace *out);
void db_nvme_close(struct db_nvme_namespace *space);

/* Both give 0, -errno, or the NVMe status that the drive answered with, which is positive. -EAGAIN:
 * of several ways to the drive there is none at the moment. */
int db_nvme_flush(const struct db_nvme_namespace *space);
/* What it held can't be read any more, where the drive can see to that. -EINVAL: not whole
 * blocks. */
int db_nvme_deallocate(const struct db_nvme_namespace *space, uint64_t offset, uint64_t length);

#endif
