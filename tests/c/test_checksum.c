/* test_checksum.c - XXH3 against its authors' values, and the division into chunks. */

#include "check.h"
#include "dualblade.h"

#include <string.h>

enum { BUFFER_BYTES = 1 << 16 };

static uint8_t buffer[BUFFER_BYTES + 64];

/* The buffer and values of xxHash's own sanity test (xxhsum -b / xsum_sanity_check.c). */
static void test_published_values(void)
{
    static const struct {
        size_t length;
        uint64_t value;
    } cases[] = {
        {0, 0x2D06800538D394C2u},    {1, 0xC44BDFF4074EECDBu},    {6, 0x27B56A84CD2D7325u},
        {12, 0xA713DAF0DFBB77E7u},   {24, 0xA3FE70BF9D3510EBu},   {48, 0x397DA259ECBA1F11u},
        {80, 0xBCDEFBBB2C47C90Au},   {195, 0xCD94217EE362EC3Au},  {403, 0xCDEB804D65C6DEA4u},
        {512, 0x617E49599013CB6Bu},  {2048, 0xDD59E2C3A5F038E0u}, {2240, 0x6E73A90539CF2948u},
        {2367, 0xCB37AEB9E5D361EDu},
    };
    uint64_t generator = 2654435761u;

    for (size_t i = 0; i < BUFFER_BYTES; i++) {
        buffer[i] = (uint8_t)(generator >> 56);
        generator *= 11400714785074694797u;
    }
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        CHECK_EQUAL(db_checksum(buffer, cases[i].length), cases[i].value);
    CHECK_EQUAL(db_checksum(NULL, 0), cases[0].value);
}

static void test_position_in_memory(void)
{
    uint64_t expected = db_checksum(buffer, 10000);

    for (size_t shift = 1; shift < 64; shift++) {
        static uint8_t moved[10000 + 64];
        memcpy(moved + shift, buffer, 10000);
        CHECK_EQUAL(db_checksum(moved + shift, 10000), expected);
    }
}

static void test_one_bit(uint64_t *random)
{
    uint64_t before = db_checksum(buffer, BUFFER_BYTES);

    for (int i = 0; i < 1000; i++) {
        uint64_t bit = check_random_below(random, BUFFER_BYTES * 8);
        buffer[bit / 8] ^= (uint8_t)(1u << bit % 8);
        CHECK(db_checksum(buffer, BUFFER_BYTES) != before);
        buffer[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    CHECK_EQUAL(db_checksum(buffer, BUFFER_BYTES), before);
}

static void test_chunks(uint64_t *random)
{
    const uint64_t untouched = 0x5555555555555555u;

    for (int i = 0; i < 500; i++) {
        uint32_t chunk = 4096u << check_random_below(random, 4);
        uint64_t length = check_random_below(random, BUFFER_BYTES + 1);
        uint64_t chunks = (length + chunk - 1) / chunk;
        uint64_t out[BUFFER_BYTES / 4096 + 1];

        if (i % 4 == 0)
            length = length / chunk * chunk, chunks = length / chunk;
        for (size_t j = 0; j < sizeof out / sizeof out[0]; j++)
            out[j] = untouched;
        db_checksum_chunks(buffer, length, chunk, out);
        for (uint64_t j = 0; j < chunks; j++) {
            uint64_t rest = length - j * chunk;
            CHECK_EQUAL(out[j], db_checksum(buffer + j * chunk, rest < chunk ? rest : chunk));
        }
        CHECK_EQUAL(out[chunks], untouched);
    }
    db_checksum_chunks(NULL, 0, 4096, NULL);
}

int main(void)
{
    uint64_t random = check_seed("test_checksum");

    test_published_values();
    test_position_in_memory();
    test_one_bit(&random);
    test_chunks(&random);
    return check_report("test_checksum");
}
