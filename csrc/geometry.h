/* geometry.h - what a file or block device asks of its I/O. */
#ifndef DUALBLADE_GEOMETRY_H
#define DUALBLADE_GEOMETRY_H

#include "dualblade.h"

#include <sys/types.h>

/* Fills everything but has_direct. -EINVAL: empty; -EOPNOTSUPP: blocks larger than ours. */
int db_geometry_read(int fd, bool is_block_device, struct db_geometry *out);

/* What suits this geometry and one more; size_bytes is the smaller one. */
void db_geometry_join(struct db_geometry *all, const struct db_geometry *one);

/* An attribute of the block queue under a device number, such as "max_sectors_kb"; a partition's is
 * its parent's. -ENOENT, -EIO. */
int db_queue_attribute(dev_t device, const char *name, uint64_t *value);

/* What statx(2) says of direct I/O here; -EOPNOTSUPP where kernel or filesystem say nothing.
 * Zero alignments mean that there is no direct I/O. */
int db_direct_alignment(int fd, uint32_t *memory_bytes, uint32_t *offset_bytes);

#endif
