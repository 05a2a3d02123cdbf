/* copy_avx2.c - a copy and its XXH3 in one go, in 32-byte vectors.
 *
 * A copy that goes past the cache waits for memory, and so does a checksum. Side by side in one
 * loop they wait together: both take as long as the copy alone. Pieces that fit in the cache, first
 * summed up and then copied, do not. */
#include "copy.h"

#include "checksum_avx2.h"
#include "dualblade.h"

#include <assert.h>
#include <string.h>

#if DB_HAVE_CHECKSUM_AVX2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define XXH_INLINE_ALL
#define XXH_VECTOR XXH_AVX2
#include <xxhash.h>

/* Of these releases the names below are known; the values of all since 0.8.0 are the same. */
#if XXH_VERSION_NUMBER >= 800 && XXH_VERSION_NUMBER <= 803
#define HAVE_COPY 1

#include <immintrin.h>

enum {
    STRIPE_BYTES = 64,
    BLOCK_STRIPES = 16, /* as many as the secret has places for, eight bytes apart */
    BLOCK_BYTES = STRIPE_BYTES * BLOCK_STRIPES,
    SECRET_BYTES = 192,
    VECTOR_BYTES = 32,
};

/* The eight sums of XXH3, and a stripe of what they are of. */
struct sums {
    __m256i low, high;
};

static inline __attribute__((always_inline)) __m256i load(const void *bytes)
{
    return _mm256_loadu_si256(bytes);
}

static inline __attribute__((always_inline)) __m256i add(__m256i sum, __m256i data, __m256i secret)
{
    __m256i mixed = _mm256_xor_si256(data, secret);
    __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
    __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(product, _mm256_add_epi64(sum, swapped));
}

static inline __attribute__((always_inline)) struct sums add_stripe(struct sums sums, __m256i low,
                                                                    __m256i high,
                                                                    const uint8_t *secret)
{
    return (struct sums){add(sums.low, low, load(secret)),
                         add(sums.high, high, load(secret + VECTOR_BYTES))};
}

static inline __attribute__((always_inline)) __m256i scramble(__m256i sum, const uint8_t *secret)
{
    __m256i prime = _mm256_set1_epi32((int)XXH_PRIME32_1);
    sum = _mm256_xor_si256(sum, _mm256_srli_epi64(sum, 47));
    sum = _mm256_xor_si256(sum, load(secret));
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(sum, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(sum, prime), _mm256_slli_epi64(high, 32));
}

static inline __attribute__((always_inline)) struct sums copy_stripe(struct sums sums, uint8_t *to,
                                                                     const uint8_t *from,
                                                                     const uint8_t *secret,
                                                                     bool past_cache)
{
    __m256i low = load(from), high = load(from + VECTOR_BYTES);
    if (past_cache) {
        _mm256_stream_si256((__m256i *)to, low);
        _mm256_stream_si256((__m256i *)(to + VECTOR_BYTES), high);
    } else {
        _mm256_storeu_si256((__m256i *)to, low);
        _mm256_storeu_si256((__m256i *)(to + VECTOR_BYTES), high);
    }
    return add_stripe(sums, low, high, secret);
}

/* XXH3_64bits() of more than 240 bytes: blocks of 16 stripes, after each of which the sums are
 * scrambled, and the last 64 bytes once more. */
static inline __attribute__((always_inline)) uint64_t copy(uint8_t *to, const uint8_t *from,
                                                           size_t length, bool past_cache)
{
    XXH_ALIGN(64) xxh_u64 start[8] = XXH3_INIT_ACC;
    struct sums sums = {load(start), load(start + 4)};
    const uint8_t *secret = (const uint8_t *)XXH3_kSecret;
    const uint8_t *scrambler = secret + SECRET_BYTES - STRIPE_BYTES;
    const uint8_t *end = from + length;
    size_t stripes = (length - 1) / STRIPE_BYTES;
    for (; stripes >= BLOCK_STRIPES; stripes -= BLOCK_STRIPES) {
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK_STRIPES; i++)
            sums = copy_stripe(sums, to + i * STRIPE_BYTES, from + i * STRIPE_BYTES,
                               secret + i * 8, past_cache);
        sums.low = scramble(sums.low, scrambler);
        sums.high = scramble(sums.high, scrambler + VECTOR_BYTES);
        from += BLOCK_BYTES;
        to += BLOCK_BYTES;
    }
    for (size_t i = 0; i < stripes; i++) {
        sums = copy_stripe(sums, to, from, secret + i * 8, past_cache);
        from += STRIPE_BYTES;
        to += STRIPE_BYTES;
    }
    memcpy(to, from, (size_t)(end - from));
    const uint8_t *last = end - STRIPE_BYTES;
    sums = add_stripe(sums, load(last), load(last + VECTOR_BYTES),
                      scrambler - XXH_SECRET_LASTACC_START);
    if (past_cache)
        _mm_sfence(); /* before anybody is told that it is there */
    _mm256_storeu_si256((__m256i *)start, sums.low);
    _mm256_storeu_si256((__m256i *)(start + 4), sums.high);
    return XXH3_mergeAccs(start, secret + XXH_SECRET_MERGEACCS_START,
                          (xxh_u64)length * XXH_PRIME64_1);
}

static uint64_t copy_through_cache(void *to, const void *from, size_t length)
{
    return copy(to, from, length, false);
}

static uint64_t copy_past_cache(void *to, const void *from, size_t length)
{
    return copy(to, from, length, true);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
#endif

#ifndef HAVE_COPY
#define HAVE_COPY 0
#endif

bool db_copy_is_fast(void)
{
#if HAVE_COPY
    return __builtin_cpu_supports("avx2");
#else
    return false;
#endif
}

uint64_t db_copy_checksum(void *to, const void *from, size_t length, bool past_cache)
{
    assert(db_copy_is_fast());
#if HAVE_COPY
    if (length > XXH3_MIDSIZE_MAX) {
        bool is_aligned = (uintptr_t)to % VECTOR_BYTES == 0;
        return past_cache && is_aligned ? copy_past_cache(to, from, length)
                                        : copy_through_cache(to, from, length);
    }
#endif
    (void)past_cache;
    memcpy(to, from, length);
    return db_checksum(to, length);
}
