/* test_extent.c - the extent map against a plain array of units searched by brute force. */

#include "check.h"
#include "dualblade.h"

#include <errno.h>
#include <malloc.h>
#include <stdbool.h>
#include <string.h>

/* ---- allocations that fail, and how much is allocated (linked with --wrap) ------------------- */

void *__real_malloc(size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
void *__real_realloc(void *memory, size_t size);
void *__real_calloc(size_t count, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);
void *__wrap_realloc(void *memory, size_t size);
void *__wrap_calloc(size_t count, size_t size);

static bool allocations_fail;
static long allocations_until_failure = -1; /* negative: none fails */
static size_t allocated_bytes;

static bool fails_now(void)
{
    return allocations_fail ||
           (allocations_until_failure >= 0 && allocations_until_failure-- == 0);
}

/* The compiler makes this of a realloc() of nothing. */
void *__wrap_malloc(size_t size)
{
    void *memory = fails_now() ? NULL : __real_malloc(size);
    if (memory != NULL)
        allocated_bytes += malloc_usable_size(memory);
    return memory;
}

void *__wrap_aligned_alloc(size_t alignment, size_t size)
{
    void *memory = fails_now() ? NULL : __real_aligned_alloc(alignment, size);
    if (memory != NULL)
        allocated_bytes += size; /* what lies before it for the alignment is never touched */
    return memory;
}

void *__wrap_realloc(void *memory, size_t size)
{
    if (fails_now())
        return NULL;
    size_t before = memory != NULL ? malloc_usable_size(memory) : 0;
    void *moved = __real_realloc(memory, size);
    if (moved != NULL)
        allocated_bytes += malloc_usable_size(moved) - before;
    return moved;
}

void *__wrap_calloc(size_t count, size_t size)
{
    return fails_now() ? NULL : __real_calloc(count, size);
}

/* ---- the oracle ------------------------------------------------------------------------------ */

enum { MOST_UNITS = 20000, CANDIDATES = 32 };

struct oracle {
    struct db_extent_map *map;
    uint64_t units;
    uint64_t unit_bytes;
    bool used[MOST_UNITS];
};

struct free_run {
    uint64_t offset, length;
};

/* The first free run at or after a unit; length 0 at the end. */
static struct free_run next_run(const struct oracle *oracle, uint64_t from)
{
    struct free_run run = {from, 0};

    while (run.offset < oracle->units && oracle->used[run.offset])
        run.offset++;
    while (run.offset + run.length < oracle->units && !oracle->used[run.offset + run.length])
        run.length++;
    return run;
}

static bool all_are(const struct oracle *oracle, uint64_t offset, uint64_t length, bool used)
{
    for (uint64_t i = offset; i < offset + length; i++)
        if (oracle->used[i] != used)
            return false;
    return true;
}

static void mark(struct oracle *oracle, uint64_t offset, uint64_t length, bool used)
{
    for (uint64_t i = offset; i < offset + length; i++)
        oracle->used[i] = used;
}

static void open_oracle(struct oracle *oracle, uint64_t units, uint32_t unit_bytes)
{
    CHECK(units <= MOST_UNITS);
    oracle->units = units;
    oracle->unit_bytes = unit_bytes;
    memset(oracle->used, 0, sizeof oracle->used);
    /* What is less than a unit at the end does not count. */
    CHECK_EQUAL(
        db_extent_map_open(units * unit_bytes + unit_bytes / 2, unit_bytes, &oracle->map), 0);
}

/* Every free run, one after another, and the totals. */
static void compare(const struct oracle *oracle)
{
    uint64_t at = 0, length = 0, free_units = 0, runs = 0, largest = 0, from = 0;
    struct db_extent_stats stats;

    for (struct free_run run; (run = next_run(oracle, from)).length > 0;) {
        CHECK_EQUAL(db_extent_next_free(oracle->map, &at, &length), 0);
        CHECK_EQUAL(at, run.offset * oracle->unit_bytes);
        CHECK_EQUAL(length, run.length * oracle->unit_bytes);
        at += length;
        from = run.offset + run.length;
        free_units += run.length;
        largest = run.length > largest ? run.length : largest;
        runs++;
    }
    CHECK_EQUAL(db_extent_next_free(oracle->map, &at, &length), -ENOENT);
    db_extent_map_stats(oracle->map, &stats);
    CHECK_EQUAL(stats.total_bytes, oracle->units * oracle->unit_bytes);
    CHECK_EQUAL(stats.free_bytes, free_units * oracle->unit_bytes);
    CHECK_EQUAL(stats.largest_free_bytes, largest * oracle->unit_bytes);
    CHECK_EQUAL(stats.free_extents, runs);
    CHECK_EQUAL(db_extent_map_verify(oracle->map), 0);
}

/* What brute force finds for an allocation. */
struct fit {
    struct free_run best;  /* the smallest that holds it aligned, the first of equal ones */
    uint64_t ample_length; /* of the smallest that would hold it at any alignment, or 0 */
    uint64_t candidates;   /* runs at least as long, aligned or not */
};

static struct fit find_fit(const struct oracle *oracle, uint64_t length, uint64_t align)
{
    struct fit fit = {0};
    uint64_t from = 0;

    for (struct free_run run; (run = next_run(oracle, from)).length > 0;) {
        uint64_t start = (run.offset + align - 1) / align * align;
        from = run.offset + run.length;
        if (run.length >= length)
            fit.candidates++;
        if (run.length >= length + align - 1 &&
            (fit.ample_length == 0 || run.length < fit.ample_length))
            fit.ample_length = run.length;
        if (start + length <= from && (fit.best.length == 0 || run.length < fit.best.length))
            fit.best = run;
    }
    return fit;
}

/* ---- random operations ----------------------------------------------------------------------- */

static uint64_t random_bytes(const struct oracle *oracle, uint64_t units, uint64_t *random)
{
    return units * oracle->unit_bytes - check_random_below(random, oracle->unit_bytes);
}

static void do_allocate(struct oracle *oracle, uint64_t length, uint64_t align, uint64_t *random)
{
    struct fit fit = find_fit(oracle, length, align);
    uint64_t align_bytes = align * oracle->unit_bytes, offset = 77;

    if (align == 1) /* all of these mean the same */
        align_bytes >>= check_random_below(random, 20);
    int rc = db_extent_allocate(oracle->map, random_bytes(oracle, length, random), align_bytes,
                                &offset);
    if (fit.best.length == 0) {
        CHECK_EQUAL(rc, -ENOSPC);
        CHECK_EQUAL(offset, 77);
        return;
    }
    CHECK_EQUAL(rc, 0);
    CHECK_EQUAL(offset % (align * oracle->unit_bytes), 0);
    uint64_t unit = offset / oracle->unit_bytes;
    CHECK(unit + length <= oracle->units);
    CHECK(all_are(oracle, unit, length, false));
    struct free_run run = next_run(oracle, unit);
    while (run.offset > 0 && !oracle->used[run.offset - 1]) {
        run.offset--;
        run.length++;
    }
    if (align == 1 || fit.candidates <= CANDIDATES || fit.ample_length == 0) {
        CHECK_EQUAL(run.offset, fit.best.offset);
        CHECK_EQUAL(unit, (run.offset + align - 1) / align * align);
    } else {
        CHECK(run.length <= fit.ample_length);
    }
    mark(oracle, unit, length, true);
}

static void do_reserve(struct oracle *oracle, uint64_t offset, uint64_t length, uint64_t *random)
{
    int rc = db_extent_reserve(oracle->map, offset * oracle->unit_bytes,
                               random_bytes(oracle, length, random));

    if (offset + length > oracle->units) {
        CHECK_EQUAL(rc, -EINVAL);
    } else if (!all_are(oracle, offset, length, false)) {
        CHECK_EQUAL(rc, -EEXIST);
    } else {
        CHECK_EQUAL(rc, 0);
        mark(oracle, offset, length, true);
    }
}

static void do_free(struct oracle *oracle, uint64_t offset, uint64_t length, uint64_t *random)
{
    int rc = db_extent_free(oracle->map, offset * oracle->unit_bytes,
                            random_bytes(oracle, length, random));

    if (offset + length > oracle->units) {
        CHECK_EQUAL(rc, -EINVAL);
    } else if (!all_are(oracle, offset, length, true)) {
        CHECK_EQUAL(rc, -ENOENT);
    } else {
        CHECK_EQUAL(rc, 0);
        mark(oracle, offset, length, false);
    }
}

/* The run of used units around one, so that freeing often succeeds and often joins. */
static struct free_run used_around(const struct oracle *oracle, uint64_t unit, uint64_t most)
{
    struct free_run run = {unit, 0};

    while (run.offset > 0 && unit - run.offset < most && oracle->used[run.offset - 1])
        run.offset--;
    while (run.length < most && run.offset + run.length < oracle->units &&
           oracle->used[run.offset + run.length])
        run.length++;
    return run;
}

/* The weights differ from round to round: mostly filling, mostly freeing, mostly refused ... */
struct swarm {
    uint64_t weights[4];
    uint64_t most_length;
    uint64_t most_align_shift;
};

static struct swarm random_swarm(const struct oracle *oracle, uint64_t *random)
{
    struct swarm swarm;

    for (int i = 0; i < 4; i++)
        swarm.weights[i] = 1 + (check_random(random) % 4) * check_random_below(random, 10);
    swarm.most_length = 1 + check_random_below(random, oracle->units) /
                                (1 + check_random_below(random, 100));
    swarm.most_align_shift = check_random_below(random, 8);
    return swarm;
}

static void step(struct oracle *oracle, const struct swarm *swarm, uint64_t *random)
{
    uint64_t sum = 0, length = 1 + check_random_below(random, swarm->most_length);
    uint64_t unit = check_random_below(random, oracle->units);

    for (int i = 0; i < 4; i++)
        sum += swarm->weights[i];
    uint64_t pick = check_random_below(random, sum);
    if (pick < swarm->weights[0]) {
        uint64_t align = (uint64_t)1 << check_random_below(random, swarm->most_align_shift + 1);
        do_allocate(oracle, length, align, random);
    } else if ((pick -= swarm->weights[0]) < swarm->weights[1]) {
        do_reserve(oracle, unit, length, random);
    } else if ((pick -= swarm->weights[1]) < swarm->weights[2]) {
        struct free_run run = used_around(oracle, unit, length);
        if (run.length > 0)
            do_free(oracle, run.offset, run.length, random);
    } else {
        do_free(oracle, unit, length, random);
    }
}

static void test_random(struct oracle *oracle, uint64_t units, int steps, int compare_every,
                        uint64_t *random)
{
    static const uint32_t unit_sizes[] = {1, 512, 4096, 65536};

    open_oracle(oracle, units, unit_sizes[check_random_below(random, 4)]);
    struct swarm swarm = random_swarm(oracle, random);
    for (int i = 0; i < steps; i++) {
        if (check_random_below(random, 256) == 0)
            swarm = random_swarm(oracle, random);
        step(oracle, &swarm, random);
        if (i % compare_every == 0)
            compare(oracle);
    }
    compare(oracle);
    db_extent_map_close(oracle->map);
}

/* Everything is taken and given back one unit at a time, in an order that makes the trees grow to
 * their largest and shrink to nothing again. */
static void test_grow_and_shrink(struct oracle *oracle, int order, uint64_t *random)
{
    static uint32_t sequence[MOST_UNITS / 2];
    const uint64_t count = MOST_UNITS / 2;

    open_oracle(oracle, MOST_UNITS, 4096);
    do_reserve(oracle, 0, MOST_UNITS, random);
    for (uint64_t i = 0; i < count; i++)
        sequence[i] = (uint32_t)(2 * (order == 1 ? count - 1 - i : i));
    for (uint64_t i = count - 1; order == 2 && i > 0; i--) {
        uint64_t j = check_random_below(random, i + 1);
        uint32_t swapped = sequence[i];
        sequence[i] = sequence[j];
        sequence[j] = swapped;
    }
    for (uint64_t pass = 0; pass < 4; pass++) {
        for (uint64_t i = 0; i < count; i++) {
            uint64_t unit = sequence[i] + pass % 2; /* holes, then what is between them ... */
            if (pass < 2)
                do_free(oracle, unit, 1, random);
            else
                do_reserve(oracle, unit, 1, random);
            if (i % 1999 == 0)
                compare(oracle);
        }
        compare(oracle);
    }
    db_extent_map_close(oracle->map);
}

/* ---- particular cases ------------------------------------------------------------------------ */

static void test_open_refused(void)
{
    struct db_extent_map *map = NULL;

    CHECK_EQUAL(db_extent_map_open(1 << 20, 0, &map), -EINVAL);
    CHECK_EQUAL(db_extent_map_open(1 << 20, 3000, &map), -EINVAL);
    CHECK_EQUAL(db_extent_map_open(0, 4096, &map), -EINVAL);
    CHECK_EQUAL(db_extent_map_open(4095, 4096, &map), -EINVAL);
    CHECK_EQUAL(db_extent_map_open((uint64_t)INT64_MAX + 1, 4096, &map), -EINVAL);
    for (int i = 0; i < 5; i++) {
        allocations_until_failure = i;
        CHECK_EQUAL(db_extent_map_open(1 << 20, 4096, &map), -ENOMEM);
    }
    allocations_until_failure = -1;
    CHECK(map == NULL);
    db_extent_map_close(NULL);
}

static void test_arguments_refused(struct oracle *oracle)
{
    const uint64_t block = 4096, absurd = (uint64_t)INT64_MAX + 1;
    uint64_t offset = 7;

    open_oracle(oracle, 100, 4096);
    struct db_extent_map *map = oracle->map;
    CHECK_EQUAL(db_extent_allocate(map, 0, 0, &offset), -EINVAL);
    CHECK_EQUAL(db_extent_allocate(map, absurd, 0, &offset), -EINVAL);
    CHECK_EQUAL(db_extent_allocate(map, UINT64_MAX, 0, &offset), -EINVAL);
    CHECK_EQUAL(db_extent_allocate(map, block, 3 * block, &offset), -EINVAL);
    CHECK_EQUAL(db_extent_allocate(map, INT64_MAX, 0, &offset), -ENOSPC);
    CHECK_EQUAL(db_extent_allocate(map, INT64_MAX, absurd, &offset), -ENOSPC);
    CHECK_EQUAL(db_extent_allocate(map, 100 * block + 1, 0, &offset), -ENOSPC);
    CHECK_EQUAL(offset, 7);
    int (*const change[])(struct db_extent_map *, uint64_t, uint64_t) = {db_extent_reserve,
                                                                         db_extent_free};
    for (int i = 0; i < 2; i++) {
        CHECK_EQUAL(change[i](map, 0, 0), -EINVAL);
        CHECK_EQUAL(change[i](map, 1, block), -EINVAL);
        CHECK_EQUAL(change[i](map, 99 * block, block + 1), -EINVAL);
        CHECK_EQUAL(change[i](map, 100 * block, 1), -EINVAL);
        CHECK_EQUAL(change[i](map, absurd, block), -EINVAL);
        CHECK_EQUAL(change[i](map, UINT64_MAX - block + 1, block), -EINVAL);
        CHECK_EQUAL(change[i](map, block, UINT64_MAX - block), -EINVAL);
        CHECK_EQUAL(change[i](map, block, absurd - block), -EINVAL);
    }
    compare(oracle);

    CHECK_EQUAL(db_extent_reserve(map, 10 * block, 10 * block), 0);
    mark(oracle, 10, 10, true);
    CHECK_EQUAL(db_extent_reserve(map, 19 * block, 1), -EEXIST);
    CHECK_EQUAL(db_extent_reserve(map, 9 * block, block + 1), -EEXIST);
    CHECK_EQUAL(db_extent_reserve(map, 5 * block, 20 * block), -EEXIST);
    CHECK_EQUAL(db_extent_free(map, 9 * block, 2 * block), -ENOENT);
    CHECK_EQUAL(db_extent_free(map, 19 * block, block + 1), -ENOENT);
    CHECK_EQUAL(db_extent_free(map, 5 * block, 20 * block), -ENOENT);
    compare(oracle);
    CHECK_EQUAL(db_extent_free(map, 12 * block, 3 * block), 0); /* a part, from the middle */
    mark(oracle, 12, 3, false);
    CHECK_EQUAL(db_extent_free(map, 12 * block, 3 * block), -ENOENT); /* twice */
    CHECK_EQUAL(db_extent_free(map, 14 * block, block), -ENOENT);
    compare(oracle);

    offset = 12 * block + 1; /* inside a run: the one that begins after it */
    uint64_t length;
    CHECK_EQUAL(db_extent_next_free(map, &offset, &length), 0);
    CHECK_EQUAL(offset, 20 * block);
    offset = UINT64_MAX;
    CHECK_EQUAL(db_extent_next_free(map, &offset, &length), -ENOENT);
    db_extent_map_close(map);
}

/* Forty runs that are long enough and none of them aligned, and then some. */
static void test_many_misaligned(struct oracle *oracle)
{
    uint64_t offset, random = 1;

    open_oracle(oracle, 2000, 4096);
    do_reserve(oracle, 0, 2000, &random);
    for (uint64_t i = 0; i < 40; i++)
        do_free(oracle, 16 * i + 1, 4, &random); /* 1..4, 17..20: no 4 at a multiple of 4 */
    CHECK_EQUAL(db_extent_allocate(oracle->map, 4 * 4096, 4 * 4096, &offset), -ENOSPC);
    do_free(oracle, 804, 4, &random); /* the last of equals, and there is no longer one */
    CHECK_EQUAL(db_extent_allocate(oracle->map, 4 * 4096, 4 * 4096, &offset), 0);
    CHECK_EQUAL(offset, 804 * 4096);
    do_free(oracle, 1001, 7, &random); /* long enough wherever it begins */
    CHECK_EQUAL(db_extent_free(oracle->map, 804 * 4096, 4 * 4096), 0);
    CHECK_EQUAL(db_extent_allocate(oracle->map, 4 * 4096, 4 * 4096, &offset), 0);
    CHECK_EQUAL(offset, 1004 * 4096);
    CHECK_EQUAL(db_extent_map_verify(oracle->map), 0);
    db_extent_map_close(oracle->map);
}

/* When memory runs out, an operation fails whole, and goes on working once there is some. Enough
 * runs to fill what a map begins with are too many for the oracle. */
static void test_out_of_memory(void)
{
    const uint64_t units = 1 << 20;
    uint64_t freed = 0, offset;
    struct db_extent_map *map;
    struct db_extent_stats stats;
    int rc = 0;

    CHECK_EQUAL(db_extent_map_open(units * 512, 512, &map), 0);
    CHECK_EQUAL(db_extent_reserve(map, 0, units * 512), 0);
    allocations_fail = true;
    for (; freed < units / 3; freed++) {
        rc = db_extent_free(map, freed * 3 * 512, 512);
        if (rc != 0)
            break;
    }
    CHECK_EQUAL(rc, -ENOMEM);
    CHECK_EQUAL(db_extent_free(map, freed * 3 * 512, 512), -ENOMEM);
    CHECK_EQUAL(db_extent_reserve(map, 0, 512), -ENOMEM);
    CHECK_EQUAL(db_extent_allocate(map, 512, 0, &offset), -ENOMEM);
    CHECK_EQUAL(db_extent_map_verify(map), 0);
    db_extent_map_stats(map, &stats);
    CHECK_EQUAL(stats.free_extents, freed);
    CHECK_EQUAL(stats.free_bytes, freed * 512);

    allocations_fail = false;
    CHECK_EQUAL(db_extent_free(map, freed * 3 * 512, 512), 0);
    CHECK_EQUAL(db_extent_reserve(map, 0, 512), 0);
    CHECK_EQUAL(db_extent_allocate(map, 512, 0, &offset), 0);
    CHECK_EQUAL(offset, 3 * 512);
    CHECK_EQUAL(db_extent_map_verify(map), 0);
    db_extent_map_close(map);
}

/* ---- size and speed -------------------------------------------------------------------------- */

#ifdef __SANITIZE_ADDRESS__
#define STRESS_RUNS 300000u
#else
#define STRESS_RUNS 1000000u
#endif

struct taken {
    uint64_t offset;
    uint32_t length;
};

static double cpu_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now); /* not of whoever else runs here */
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static uint32_t random_units(uint64_t *random)
{
    return 1 + (uint32_t)check_random_below(random, 1u << check_random_below(random, 7));
}

static void test_a_million_runs(uint64_t *random)
{
    struct taken *taken = malloc(2 * STRESS_RUNS * sizeof *taken);
    uint64_t units = 0;
    struct db_extent_map *map;
    struct db_extent_stats stats;

    for (uint32_t i = 0; i < 2 * STRESS_RUNS; i++) {
        taken[i] = (struct taken){units * 4096, random_units(random)};
        units += taken[i].length;
    }
    allocated_bytes = 0;
    CHECK_EQUAL(db_extent_map_open(units * 4096, 4096, &map), 0);
    CHECK_EQUAL(db_extent_reserve(map, 0, units * 4096), 0);
    for (uint32_t i = STRESS_RUNS - 1; i > 0; i--) { /* the even ones, shuffled, become free */
        uint32_t j = (uint32_t)check_random_below(random, i + 1);
        struct taken swapped = taken[2 * i];
        taken[2 * i] = taken[2 * j];
        taken[2 * j] = swapped;
    }
    double start = cpu_s();
    for (uint32_t i = 0; i < STRESS_RUNS; i++)
        CHECK(db_extent_free(map, taken[2 * i].offset, taken[2 * i].length * 4096ull) == 0);
    double freed = cpu_s();
    db_extent_map_stats(map, &stats);
    CHECK_EQUAL(stats.free_extents, STRESS_RUNS);
    double bytes_per_run = (double)allocated_bytes / (double)stats.free_extents;
    CHECK(bytes_per_run <= 64);

    double mixed = cpu_s();
    for (uint32_t i = 0; i < STRESS_RUNS / 2; i++) { /* one given back, one taken */
        struct taken *one = &taken[2 * check_random_below(random, STRESS_RUNS) + 1];
        CHECK(db_extent_free(map, one->offset, one->length * 4096ull) == 0);
        one->length = random_units(random);
        CHECK(db_extent_allocate(map, one->length * 4096ull, 0, &one->offset) == 0);
    }
    double done = cpu_s();
    CHECK_EQUAL(db_extent_map_verify(map), 0);
    printf("test_extent: %u free runs: %.1f bytes each, %.0f ns of CPU a free, %.0f a mixed call\n",
           STRESS_RUNS, bytes_per_run, (freed - start) / STRESS_RUNS * 1e9,
           (done - mixed) / STRESS_RUNS * 1e9);
    db_extent_map_close(map);
    free(taken);
}

int main(void)
{
    static struct oracle oracle;
    uint64_t random = check_seed("test_extent");
    struct db_counters live;

    test_open_refused();
    test_arguments_refused(&oracle);
    test_many_misaligned(&oracle);
    test_out_of_memory();
    for (int i = 0; i < 100; i++)
        test_random(&oracle, 1 + check_random_below(&random, 400), 400, 1, &random);
    for (int i = 0; i < 4; i++)
        test_random(&oracle, MOST_UNITS, 4000, 500, &random);
    for (int order = 0; order < 3; order++)
        test_grow_and_shrink(&oracle, order, &random);
    test_a_million_runs(&random);
    db_counters(&live);
    CHECK_EQUAL(live.extent_maps, 0);
    return check_report("test_extent");
}
