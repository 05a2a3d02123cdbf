/* checksum_avx2.c - XXH3 in the 32-byte vectors that most x86-64 processors have. */

#include "checksum_avx2.h"

#if DB_HAVE_CHECKSUM_AVX2

/* For this file alone: the rest has to run on any x86-64. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define XXH_INLINE_ALL
#define XXH_VECTOR XXH_AVX2
#include <xxhash.h>

uint64_t db_checksum_avx2(const void *data, size_t length)
{
    return XXH3_64bits(data, length);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
