/* checksum.c - XXH3 checksums of memory. */

#include "checksum_avx2.h"
#include "dualblade.h"

#include <assert.h>

/* Everything of xxHash that is used is compiled in here from its header: no library to find at run
 * time, and it is optimised with the flags of this build. The values are those of XXH3_64bits() of
 * every release since 0.8.0, which froze them. */
#define XXH_INLINE_ALL
#include <xxhash.h>

/* Bytes in the processor's cache at twice the speed, those in memory a quarter faster. AVX-512 adds
 * nothing to that in cache, and is slower in memory. */
static uint64_t xxh3(const void *data, size_t length)
{
#if DB_HAVE_CHECKSUM_AVX2
    if (__builtin_cpu_supports("avx2"))
        return db_checksum_avx2(data, length);
#endif
    return XXH3_64bits(data, length);
}

uint64_t db_checksum(const void *data, size_t length)
{
    assert(data != NULL || length == 0);
    return xxh3(data, length);
}

void db_checksum_chunks(const void *data, uint64_t length, uint32_t chunk_bytes, uint64_t *out)
{
    const uint8_t *bytes = data;

    assert(chunk_bytes > 0);
    assert(bytes != NULL || length == 0);
    while (length > 0) {
        uint64_t part = length < chunk_bytes ? length : chunk_bytes;
        *out++ = xxh3(bytes, part);
        bytes += part;
        length -= part;
    }
}
