/* test_coherence.c - which blocks the page cache may hold, against an array of flags. */
#include "check.h"
#include "coherence.h"

enum { BLOCKS = 700, ROUNDS = 20000 };

static bool noted[BLOCKS];

static void check_same(const struct db_coherence *coherence)
{
    for (uint64_t i = 0; i < BLOCKS; i++)
        CHECK(db_coherence_has(coherence, i * DB_BLOCK_BYTES, 1) == noted[i]);
}

/* Every block of the range is noted then; what is said to be new is what was not. */
static void note(struct db_coherence *coherence, uint64_t offset, uint64_t length)
{
    struct db_run rest = {offset, length}, run;
    uint64_t first = offset / DB_BLOCK_BYTES;
    uint64_t end = (offset + length + DB_BLOCK_BYTES - 1) / DB_BLOCK_BYTES;
    bool is_new[BLOCKS] = {false};
    while (db_coherence_note(coherence, &rest, &run)) {
        CHECK(run.length > 0 && run.offset % DB_BLOCK_BYTES == 0);
        for (uint64_t i = 0; i < run.length / DB_BLOCK_BYTES; i++) {
            uint64_t block = run.offset / DB_BLOCK_BYTES + i;
            CHECK(block >= first && block < end && !is_new[block]);
            is_new[block] = true;
        }
    }
    for (uint64_t i = first; i < end; i++) {
        CHECK(is_new[i] != noted[i]);
        noted[i] = true;
    }
}

static void forget(struct db_coherence *coherence, uint64_t offset, uint64_t length)
{
    db_coherence_forget(coherence, offset, length);
    for (uint64_t i = 0; i < BLOCKS; i++)
        if (i * DB_BLOCK_BYTES >= offset && (i + 1) * DB_BLOCK_BYTES <= offset + length)
            noted[i] = false;
}

int main(void)
{
    struct db_coherence coherence;
    uint64_t seed = check_seed("test_coherence");
    CHECK(db_coherence_open(BLOCKS * (uint64_t)DB_BLOCK_BYTES, &coherence) == 0);
    check_same(&coherence);
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t offset = check_random_below(&seed, BLOCKS * DB_BLOCK_BYTES - 1);
        uint64_t length = 1 + check_random_below(&seed, BLOCKS * DB_BLOCK_BYTES - 1 - offset);
        if (check_random_below(&seed, 2))
            length = 1 + length % (DB_BLOCK_BYTES * 3);
        if (check_random_below(&seed, 2))
            note(&coherence, offset, length);
        else
            forget(&coherence, offset, length);
        bool any = false;
        for (uint64_t i = offset / DB_BLOCK_BYTES; i * DB_BLOCK_BYTES < offset + length; i++)
            any = any || noted[i];
        CHECK(db_coherence_has(&coherence, offset, length) == any);
        if (round % 100 == 0)
            check_same(&coherence);
    }
    check_same(&coherence);
    db_coherence_close(&coherence);
    return check_report("test_coherence");
}
