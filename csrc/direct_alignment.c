/* direct_alignment.c - STATX_DIOALIGN, alone because <linux/stat.h> and <sys/stat.h> both define
 * struct statx, and the C library's lacks the fields. */
#define _GNU_SOURCE
#include "geometry.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef AT_EMPTY_PATH
#define AT_EMPTY_PATH 0x1000
#endif

int db_direct_alignment(int fd, uint32_t *memory_bytes, uint32_t *offset_bytes)
{
#ifdef STATX_DIOALIGN
    struct statx status;
    if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) < 0)
        return -errno;
    if (status.stx_mask & STATX_DIOALIGN) {
        *memory_bytes = status.stx_dio_mem_align;
        *offset_bytes = status.stx_dio_offset_align;
        return 0;
    }
#else
    (void)fd;
    (void)memory_bytes;
    (void)offset_bytes;
#endif
    return -EOPNOTSUPP;
}
