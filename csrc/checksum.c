/* checksum.c - XXH3 checksums of memory. */

#include "dualblade.h"

#include <assert.h>

/* Everything of xxHash that is used is compiled in here from its header: no library to find at run
 * time, and it is optimised with the flags of this build. The values are those of XXH3_64bits() of
 * every release since 0.8.0, which froze them. */
#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t db_checksum(const void *data, size_t length)
{
    assert(data != NULL || length == 0);
    return XXH3_64bits(data, length);
}

void db_checksum_chunks(const void *data, uint64_t length, uint32_t chunk_bytes, uint64_t *out)
{
    const uint8_t *bytes = data;

    assert(chunk_bytes > 0);
    assert(bytes != NULL || length == 0);
    while (length > 0) {
        uint64_t part = length < chunk_bytes ? length : chunk_bytes;
        *out++ = XXH3_64bits(bytes, part);
        bytes += part;
        length -= part;
    }
}
