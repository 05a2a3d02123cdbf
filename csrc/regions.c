/* regions.c - a sorted array: there are few regions, and they are looked up far more often than
 * they change. */
#include "regions.h"

#include <assert.h>
#include <string.h>

int32_t db_regions_take_slot(struct db_regions *regions)
{
    for (int32_t slot = 0; slot < DB_REGIONS_MAX; slot++)
        if (!regions->is_taken[slot]) {
            regions->is_taken[slot] = true;
            return slot;
        }
    return DB_REGION_NONE;
}

void db_regions_give_slot(struct db_regions *regions, int32_t slot)
{
    assert(slot >= 0 && slot < DB_REGIONS_MAX && regions->is_taken[slot]);
    regions->is_taken[slot] = false;
}

/* How many regions start at or before this address. */
static uint32_t count_before(const struct db_regions *regions, uintptr_t address)
{
    uint32_t low = 0, high = regions->count;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (regions->sorted[middle].start <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

void db_regions_insert(struct db_regions *regions, const void *start, uint64_t length,
                       int32_t slot)
{
    assert(regions->count < DB_REGIONS_MAX && length > 0);
    uint32_t at = count_before(regions, (uintptr_t)start);
    memmove(&regions->sorted[at + 1], &regions->sorted[at],
            (regions->count - at) * sizeof(regions->sorted[0]));
    regions->sorted[at] = (struct db_region){(uintptr_t)start, length, slot};
    regions->count++;
}

int32_t db_regions_remove(struct db_regions *regions, const void *start, uint64_t length)
{
    for (uint32_t at = count_before(regions, (uintptr_t)start); at-- > 0;) {
        struct db_region found = regions->sorted[at];
        if (found.start != (uintptr_t)start)
            break;
        if (found.length != length)
            continue;
        regions->count--;
        memmove(&regions->sorted[at], &regions->sorted[at + 1],
                (regions->count - at) * sizeof(regions->sorted[0]));
        return found.slot;
    }
    return DB_REGION_NONE;
}

int32_t db_regions_find(const struct db_regions *regions, const void *start, uint64_t length)
{
    uint32_t before = count_before(regions, (uintptr_t)start);
    if (before == 0)
        return DB_REGION_NONE;
    const struct db_region *last = &regions->sorted[before - 1];
    uint64_t skipped = (uintptr_t)start - last->start;
    bool inside = skipped <= last->length && length <= last->length - skipped;
    return inside ? last->slot : DB_REGION_NONE;
}
