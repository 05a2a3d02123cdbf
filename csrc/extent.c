/* extent.c - who owns which run of the device: best fit over the free runs.
 *
 * The free runs are kept twice, as pairs of integers: (offset, length) in one ordered set, which
 * finds neighbours, and (length, offset) in the other, which finds the best fit. Both sets are the
 * same B+ tree (btree.c). Binary trees threaded through one node for each run would need less
 * code, but with ten million runs a descent would be some twenty-five nodes, half of them cache
 * misses, and an allocation makes three descents: several microseconds. Of five levels of wide
 * nodes only the last misses. A run costs two pairs of 16 bytes, in nodes that are mostly three
 * quarters full.
 *
 * Lengths and offsets in here are in units; only the functions at the end see bytes. */

#include "btree.h"
#include "counters.h"
#include "dualblade.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

/* How many runs that are long enough, but perhaps not once aligned, are looked at one by one
 * before settling for one that is so long that its alignment cannot matter. */
#define ALIGNED_CANDIDATES 32

struct db_extent_map {
    struct db_btree by_offset; /* (offset, length) of every free run */
    struct db_btree by_length; /* (length, offset) of the same runs */
    uint64_t total;
    uint64_t free;
    uint32_t unit_shift;
};

struct run {
    uint64_t offset, length;
};

static struct db_pair offset_pair(struct run run)
{
    return (struct db_pair){run.offset, run.length};
}

static struct db_pair length_pair(struct run run)
{
    return (struct db_pair){run.length, run.offset};
}

static uint64_t end_of(struct run run)
{
    return run.offset + run.length;
}

static bool is_power_of_two(uint64_t value)
{
    return value != 0 && (value & (value - 1)) == 0;
}

/* Where a free run is in both sets, or would be. */
struct places {
    struct db_btree_cursor by_offset, by_length;
};

/* ---- changing both sets together ------------------------------------------------------------- */

static void check(const struct db_extent_map *map)
{
    assert(map->free <= map->total);
    assert(map->by_offset.count == map->by_length.count);
    assert(map->by_offset.count <= map->free);
    assert((map->by_offset.count == 0) == (map->free == 0));
}

static int make_room(struct db_extent_map *map)
{
    /* No operation inserts more often than this: a run with both its ends left over. */
    int rc = db_btree_make_room(&map->by_offset, 2);
    return rc != 0 ? rc : db_btree_make_room(&map->by_length, 2);
}

/* All that a change needs to find it searches side by side: with many runs most of its time goes
 * into waiting for two leaves that are not in the processor's cache. */
static struct places find(const struct db_extent_map *map, struct run run)
{
    struct db_btree_search searches[] = {
        {.tree = &map->by_offset, .pair = offset_pair(run)},
        {.tree = &map->by_length, .pair = length_pair(run)},
    };

    db_btree_find_all(searches, 2);
    return (struct places){searches[0].found, searches[1].found};
}

/* The places are those of this run, which is not free yet. */
static void add(struct db_extent_map *map, struct places places, struct run run)
{
    assert(run.length > 0);
    assert(run.offset < map->total);
    assert(run.length <= map->total - run.offset);
    db_btree_insert(&map->by_offset, places.by_offset, offset_pair(run));
    db_btree_insert(&map->by_length, places.by_length, length_pair(run));
}

static void drop(struct db_extent_map *map, struct run run)
{
    struct places places = find(map, run);

    db_btree_remove(&map->by_offset, places.by_offset);
    db_btree_remove(&map->by_length, places.by_length);
}

static void change(struct db_extent_map *map, struct run old, struct run new)
{
    struct db_btree_search searches[] = {
        {.tree = &map->by_offset, .pair = offset_pair(old)},
        {.tree = &map->by_length, .pair = length_pair(old)},
        {.tree = &map->by_offset, .pair = offset_pair(new)},
        {.tree = &map->by_length, .pair = length_pair(new)},
    };

    assert(new.length > 0);
    assert(end_of(new) <= map->total);
    db_btree_find_all(searches, 4);
    db_btree_replace(&map->by_offset, searches[0].found, searches[2].found, offset_pair(new));
    db_btree_replace(&map->by_length, searches[1].found, searches[3].found, length_pair(new));
}

/* Takes `taken` out of the free run that it lies in. */
static void take(struct db_extent_map *map, struct run run, struct run taken)
{
    assert(taken.length > 0);
    assert(taken.offset >= run.offset);
    assert(end_of(taken) <= end_of(run));
    struct run before = {run.offset, taken.offset - run.offset};
    struct run after = {end_of(taken), end_of(run) - end_of(taken)};

    if (before.length > 0) {
        change(map, run, before);
        if (after.length > 0)
            add(map, find(map, after), after);
    } else if (after.length > 0) {
        change(map, run, after);
    } else {
        drop(map, run);
    }
    assert(map->free >= taken.length);
    map->free -= taken.length;
    check(map);
}

/* ---- finding --------------------------------------------------------------------------------- */

static struct run run_at(const struct db_extent_map *map, struct db_btree_cursor cursor)
{
    struct db_pair pair = db_btree_get(&map->by_offset, cursor);
    return (struct run){pair.major, pair.minor};
}

/* The free runs around `place` in order of offsets: the last before it, and the first that is not.
 * A run that does not exist has length 0. */
static void look_around(const struct db_extent_map *map, struct db_btree_cursor place,
                        struct run *before, struct run *after)
{
    struct db_btree_cursor cursor = place;

    *before = *after = (struct run){0, 0};
    if (db_btree_settle(&map->by_offset, &cursor))
        *after = run_at(map, cursor);
    if (db_btree_previous(&map->by_offset, &place))
        *before = run_at(map, place);
}

static bool fits(struct run run, uint64_t length, uint64_t align, uint64_t *offset)
{
    *offset = (run.offset + align - 1) & ~(align - 1);
    return *offset - run.offset <= run.length && run.length - (*offset - run.offset) >= length;
}

/* The free run that the cursor stands on, and whether it holds `length` aligned, and where. */
static bool try_fit(const struct db_extent_map *map, struct db_btree_cursor cursor,
                    uint64_t length, uint64_t align, struct run *run, uint64_t *offset)
{
    struct db_pair pair = db_btree_get(&map->by_length, cursor);

    *run = (struct run){pair.minor, pair.major};
    return fits(*run, length, align, offset);
}

/* The free run to take `length` from, and where in it. */
static int find_fit(const struct db_extent_map *map, uint64_t length, uint64_t align,
                    struct run *run, uint64_t *offset)
{
    /* A run of this length always has room, wherever it begins. At most 2^64 - 1. */
    uint64_t ample = length + align - 1;
    struct db_btree_cursor next, ample_at;

    if (!db_btree_seek(&map->by_length, (struct db_pair){length, 0}, &next))
        return -ENOSPC;
    for (int tried = 0; tried < ALIGNED_CANDIDATES; tried++) {
        if (try_fit(map, next, length, align, run, offset))
            return 0;
        if (!db_btree_next(&map->by_length, &next))
            return -ENOSPC; /* every run that is long enough was tried */
    }
    if (db_btree_seek(&map->by_length, (struct db_pair){ample, 0}, &ample_at)) {
        bool fit = try_fit(map, ample_at, length, align, run, offset);
        assert(fit);
        return 0;
    }
    /* Space is short. Before that is said, the rest of the runs are tried, however many. */
    do {
        if (try_fit(map, next, length, align, run, offset))
            return 0;
    } while (db_btree_next(&map->by_length, &next));
    return -ENOSPC;
}

/* ---- the interface: bytes to units and back -------------------------------------------------- */

/* Rounds up to units. False: zero, or more than any device has. */
static bool to_units(const struct db_extent_map *map, uint64_t bytes, uint64_t *units)
{
    uint64_t mask = ((uint64_t)1 << map->unit_shift) - 1;

    if (bytes == 0 || bytes > INT64_MAX)
        return false;
    *units = (bytes + mask) >> map->unit_shift;
    return true;
}

static bool to_run(const struct db_extent_map *map, uint64_t offset, uint64_t length,
                   struct run *run)
{
    uint64_t mask = ((uint64_t)1 << map->unit_shift) - 1;

    run->offset = offset >> map->unit_shift;
    return (offset & mask) == 0 && to_units(map, length, &run->length) &&
           run->offset < map->total && run->length <= map->total - run->offset;
}

int db_extent_map_open(uint64_t size_bytes, uint32_t unit_bytes, struct db_extent_map **out)
{
    assert(out != NULL);
    if (!is_power_of_two(unit_bytes) || size_bytes < unit_bytes || size_bytes > INT64_MAX)
        return -EINVAL;

    struct db_extent_map *map = calloc(1, sizeof *map);
    if (map == NULL)
        return -ENOMEM;
    map->unit_shift = (uint32_t)__builtin_ctz(unit_bytes);
    map->total = map->free = size_bytes >> map->unit_shift;
    int rc = db_btree_open(&map->by_offset);
    if (rc == 0)
        rc = db_btree_open(&map->by_length);
    if (rc == 0)
        rc = make_room(map);
    if (rc != 0) {
        db_btree_close(&map->by_offset);
        db_btree_close(&map->by_length);
        free(map);
        return rc;
    }
    struct run all = {0, map->total};
    add(map, find(map, all), all);
    check(map);
    atomic_fetch_add(&db_live_extent_maps, 1);
    *out = map;
    return 0;
}

void db_extent_map_close(struct db_extent_map *map)
{
    if (map == NULL)
        return;
    check(map);
    int64_t before = atomic_fetch_sub(&db_live_extent_maps, 1);
    assert(before > 0);
    db_btree_close(&map->by_offset);
    db_btree_close(&map->by_length);
    free(map);
}

int db_extent_allocate(struct db_extent_map *map, uint64_t length, uint64_t align_bytes,
                       uint64_t *offset)
{
    uint64_t units, align, start;
    struct run run;

    if (!to_units(map, length, &units) || (align_bytes != 0 && !is_power_of_two(align_bytes)))
        return -EINVAL;
    align = align_bytes >> map->unit_shift;
    if (align == 0)
        align = 1;
    int rc = find_fit(map, units, align, &run, &start);
    if (rc == 0)
        rc = make_room(map);
    if (rc != 0)
        return rc;

    assert(start % align == 0);
    take(map, run, (struct run){start, units});
    *offset = start << map->unit_shift;
    return 0;
}

int db_extent_reserve(struct db_extent_map *map, uint64_t offset, uint64_t length)
{
    struct run wanted, before, after;

    if (!to_run(map, offset, length, &wanted))
        return -EINVAL;
    look_around(map, db_btree_find(&map->by_offset, (struct db_pair){wanted.offset, 0}), &before,
                &after);
    struct run run = after.length > 0 && after.offset == wanted.offset ? after : before;
    if (run.length == 0 || end_of(run) < end_of(wanted))
        return -EEXIST;
    int rc = make_room(map);
    if (rc == 0)
        take(map, run, wanted);
    return rc;
}

int db_extent_free(struct db_extent_map *map, uint64_t offset, uint64_t length)
{
    struct run freed, before, after;

    if (!to_run(map, offset, length, &freed))
        return -EINVAL;
    /* Most runs that are freed touch no other, so this is searched for at once. */
    struct places places = find(map, freed);
    look_around(map, places.by_offset, &before, &after);
    if (end_of(before) > freed.offset || (after.length > 0 && after.offset < end_of(freed)))
        return -ENOENT;
    int rc = make_room(map);
    if (rc != 0)
        return rc;

    bool joins_before = before.length > 0 && end_of(before) == freed.offset;
    bool joins_after = after.length > 0 && after.offset == end_of(freed);
    struct run joined = {joins_before ? before.offset : freed.offset, freed.length};
    joined.length += (joins_before ? before.length : 0) + (joins_after ? after.length : 0);
    if (joins_before && joins_after)
        drop(map, after);
    if (joins_before)
        change(map, before, joined);
    else if (joins_after)
        change(map, after, joined);
    else
        add(map, places, freed);
    map->free += freed.length;
    check(map);
    return 0;
}

void db_extent_map_stats(const struct db_extent_map *map, struct db_extent_stats *out)
{
    struct db_btree_cursor cursor;
    uint64_t largest = 0;

    db_btree_seek(&map->by_length, (struct db_pair){UINT64_MAX, 0}, &cursor);
    if (db_btree_previous(&map->by_length, &cursor))
        largest = db_btree_get(&map->by_length, cursor).major;
    check(map);
    assert(largest <= map->free);
    *out = (struct db_extent_stats){
        .total_bytes = map->total << map->unit_shift,
        .free_bytes = map->free << map->unit_shift,
        .largest_free_bytes = largest << map->unit_shift,
        .free_extents = map->by_offset.count,
    };
}

int db_extent_next_free(const struct db_extent_map *map, uint64_t *offset, uint64_t *length)
{
    struct db_btree_cursor cursor;
    uint64_t units;

    if (*offset == 0)
        units = 0;
    else if (!to_units(map, *offset, &units))
        return -ENOENT;
    if (!db_btree_seek(&map->by_offset, (struct db_pair){units, 0}, &cursor))
        return -ENOENT;
    struct run run = run_at(map, cursor);
    *offset = run.offset << map->unit_shift;
    *length = run.length << map->unit_shift;
    return 0;
}

int db_extent_map_verify(const struct db_extent_map *map)
{
    uint64_t free_units = 0, runs = 0, previous_end = 0;
    struct db_btree_cursor cursor, found;

    if (!db_btree_valid(&map->by_offset) || !db_btree_valid(&map->by_length))
        return -EUCLEAN;
    if (map->by_offset.count != map->by_length.count)
        return -EUCLEAN;
    bool more = db_btree_seek(&map->by_offset, (struct db_pair){0, 0}, &cursor);
    for (; more; more = db_btree_next(&map->by_offset, &cursor)) {
        struct run run = run_at(map, cursor);
        struct db_pair pair = length_pair(run);

        if (run.length == 0 || run.offset >= map->total || run.length > map->total - run.offset)
            return -EUCLEAN;
        if (runs > 0 && run.offset <= previous_end)
            return -EUCLEAN; /* runs that touch are one run */
        if (!db_btree_seek(&map->by_length, pair, &found))
            return -EUCLEAN;
        struct db_pair other = db_btree_get(&map->by_length, found);
        if (other.major != pair.major || other.minor != pair.minor)
            return -EUCLEAN;
        previous_end = end_of(run);
        free_units += run.length;
        runs++;
    }
    return runs == map->by_offset.count && free_units == map->free ? 0 : -EUCLEAN;
}
