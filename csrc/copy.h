/* copy.h - a copy and its checksum in one go, by which the bytes are read once. */
#ifndef DUALBLADE_COPY_H
#define DUALBLADE_COPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Whether this processor and this build have it. */
bool db_copy_is_fast(void);
/* Copies, and returns db_checksum() of what it has copied. With `past_cache` the copy is not left
 * in the processor's cache, which a large one would only run through: that takes no time to read
 * what is overwritten. Only where db_copy_is_fast(). */
uint64_t db_copy_checksum(void *to, const void *from, size_t length, bool past_cache);

#endif
