/* checksum_avx2.h - XXH3 for processors with AVX2, where the compiler can make it. */
#ifndef DB_CHECKSUM_AVX2_H
#define DB_CHECKSUM_AVX2_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define DB_HAVE_CHECKSUM_AVX2 1
#else
#define DB_HAVE_CHECKSUM_AVX2 0
#endif

#if DB_HAVE_CHECKSUM_AVX2
/* The same values as XXH3_64bits() of any build; only on a processor with AVX2. */
uint64_t db_checksum_avx2(const void *data, size_t length);
#endif

#endif
