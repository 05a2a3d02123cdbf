/* test_regions.c - which registered memory an address is in, against a plain search. */
#include "check.h"
#include "regions.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static struct db_regions regions;

/* The slot of the last-starting region at or before start, if it holds all of the run. */
static int32_t search(const struct db_region *known, uint32_t count, uintptr_t start,
                      uint64_t length)
{
    const struct db_region *best = NULL;
    for (uint32_t i = 0; i < count; i++)
        if (known[i].start <= start && (!best || known[i].start > best->start))
            best = &known[i];
    if (!best || start + length > best->start + best->length)
        return DB_REGION_NONE;
    return best->slot;
}

static void test_against_search(uint64_t *seed)
{
    struct db_region known[64];
    uint32_t count = 0;
    for (int step = 0; step < 20000; step++) {
        uintptr_t start = 1 + (uintptr_t)(check_random(seed) % 4096);
        uint64_t length = 1 + (uint64_t)(check_random(seed) % 200);
        if (check_random(seed) % 4 == 0 && count < 64) {
            bool is_new = true;
            for (uint32_t i = 0; i < count; i++)
                is_new = is_new && known[i].start != start;
            if (is_new) {
                int32_t slot = db_regions_take_slot(&regions);
                CHECK(slot != DB_REGION_NONE);
                db_regions_insert(&regions, (void *)start, length, slot);
                known[count++] = (struct db_region){start, length, slot};
            }
        } else if (check_random(seed) % 8 == 0 && count > 0) {
            struct db_region gone = known[check_random(seed) % count];
            CHECK(db_regions_remove(&regions, (void *)gone.start, gone.length + 1) ==
                  DB_REGION_NONE);
            CHECK(db_regions_remove(&regions, (void *)gone.start, gone.length) == gone.slot);
            db_regions_give_slot(&regions, gone.slot);
            for (uint32_t i = 0; i < count; i++)
                if (known[i].start == gone.start)
                    known[i] = known[--count];
        }
        CHECK(regions.count == count);
        CHECK(db_regions_find(&regions, (void *)start, length) ==
              search(known, count, start, length));
    }
}

static void test_full_table(void)
{
    memset(&regions, 0, sizeof(regions));
    for (int32_t i = 0; i < DB_REGIONS_MAX; i++) {
        CHECK(db_regions_take_slot(&regions) == i);
        db_regions_insert(&regions, (void *)(uintptr_t)(4096 * (i + 1)), 4096, i);
    }
    CHECK(db_regions_take_slot(&regions) == DB_REGION_NONE);
    CHECK(db_regions_find(&regions, (void *)(uintptr_t)4096, 4096) == 0);
    CHECK(db_regions_find(&regions, (void *)(uintptr_t)4095, 1) == DB_REGION_NONE);
    CHECK(db_regions_find(&regions, (void *)(uintptr_t)8000, 4096) == DB_REGION_NONE);
}

int main(void)
{
    uint64_t seed = check_seed("test_regions");
    test_against_search(&seed);
    test_full_table();
    return check_report("test_regions");
}
