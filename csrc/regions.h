/* regions.h - runs of memory that are registered with an engine, and which one an address is in. */
#ifndef DUALBLADE_REGIONS_H
#define DUALBLADE_REGIONS_H

#include <stdbool.h>
#include <stdint.h>

enum { DB_REGIONS_MAX = 1024, DB_REGION_NONE = -1 };

struct db_region {
    uintptr_t start;
    uint64_t length;
    int32_t slot; /* in the engine's table */
};

/* Sorted by address; regions may overlap, and the one that starts last is found. */
struct db_regions {
    struct db_region sorted[DB_REGIONS_MAX];
    uint32_t count;
    bool is_taken[DB_REGIONS_MAX]; /* slots */
};

/* The slot for one more region, or DB_REGION_NONE when the table is full. Not yet to be found. */
int32_t db_regions_take_slot(struct db_regions *regions);
void db_regions_give_slot(struct db_regions *regions, int32_t slot);
/* From now on this run is found by its addresses. */
void db_regions_insert(struct db_regions *regions, const void *start, uint64_t length,
                       int32_t slot);
/* No longer found; its slot is still taken. DB_REGION_NONE if no region is exactly this run. */
int32_t db_regions_remove(struct db_regions *regions, const void *start, uint64_t length);
/* The slot of a region that holds all of this run, or DB_REGION_NONE. O(log n). */
int32_t db_regions_find(const struct db_regions *regions, const void *start, uint64_t length);

#endif
