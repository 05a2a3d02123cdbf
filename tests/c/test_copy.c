/* test_copy.c - copies with their checksums: the same bytes and sums, and nothing around them. */
#include "check.h"
#include "copy.h"
#include "dualblade.h"

#include <string.h>

enum { BYTES = 300000, MARGIN = 64 };

static uint8_t from[BYTES + MARGIN], to[BYTES + 3 * MARGIN];

static void check_copy(size_t length, size_t from_shift, size_t to_shift, bool past_cache)
{
    uint8_t *start = (uint8_t *)(((uintptr_t)to + MARGIN + 31) / 32 * 32) + to_shift;
    memset(to, 0xa5, sizeof(to));
    CHECK_EQUAL(db_copy_checksum(start, from + from_shift, length, past_cache),
                db_checksum(from + from_shift, length));
    CHECK_EQUAL(memcmp(start, from + from_shift, length), 0);
    for (const uint8_t *byte = to; byte < start; byte++)
        CHECK(*byte == 0xa5);
    for (const uint8_t *byte = start + length; byte < to + sizeof(to); byte++)
        CHECK(*byte == 0xa5);
}

int main(void)
{
    uint64_t random = check_seed("test_copy");
    if (!db_copy_is_fast()) {
        printf("test_copy: skipped, neither AVX2 nor a known xxhash.h\n");
        return 0;
    }
    for (size_t i = 0; i < sizeof(from); i++)
        from[i] = (uint8_t)check_random(&random);
    for (size_t length = 0; length <= 2200; length++)
        check_copy(length, length % 7, length % 3 ? 0 : length % 32, length % 2);
    for (int i = 0; i < 300; i++)
        check_copy(check_random_below(&random, BYTES - 31), check_random_below(&random, 32),
                   check_random_below(&random, 2) ? 0 : check_random_below(&random, 32),
                   check_random_below(&random, 2));
    check_copy(256 << 10, 0, 0, true);
    check_copy(256 << 10, 0, 0, false);
    return check_report("test_copy");
}
