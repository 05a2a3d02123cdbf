/* cached.h - how much of a file or block device the page cache holds. */
#ifndef DUALBLADE_CACHED_H
#define DUALBLADE_CACHED_H

#include "dualblade.h"

/* Adds what there is of a range of more than 0 bytes to *out. -ENOSYS: the kernel does not say. */
int db_cached_count(int fd, uint64_t offset, uint64_t length, struct db_cached *out);
/* Whether mincore(2) tells of this file: of one that a process neither owns nor may write to it
 * says that all is there. */
bool db_cached_is_told(int fd);

#endif
