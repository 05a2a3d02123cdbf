/* test_request_size.c - the request size is found on a simulated drive with a clock of its own. */
#include "check.h"
#include "request_size.h"

enum { CHUNK = 256 << 10, BATCH = 16 << 20 };

static uint64_t seed;

/* Bytes per nanosecond at each of the three sizes, the longest first, and how much a batch's time
 * varies. */
struct drive {
    double rates[DB_REQUEST_SIZES];
    double noise;
    int64_t now_ns;
};

static double rate_now(const struct drive *drive, const struct db_request_size *size)
{
    for (int i = 0; i < DB_REQUEST_SIZES; i++)
        if (size->now_bytes == size->sizes[i])
            return drive->rates[i];
    CHECK(!"a size that was never announced");
    return 0;
}

/* Moves one batch, in one step for each request, and thinks between batches. */
static void move_batch(struct drive *drive, struct db_request_size *size)
{
    double factor = 1 + drive->noise * ((double)check_random_below(&seed, 2001) / 1000 - 1);
    double rate = rate_now(drive, size) * factor;
    uint32_t step = size->now_bytes, tag = size->tag;
    db_request_size_started(size, drive->now_ns);
    for (uint64_t moved = step; moved <= BATCH; moved += step) {
        drive->now_ns += (int64_t)(step / rate);
        if (size->tag == tag)
            db_request_size_moved(size, step, drive->now_ns, moved == BATCH);
        else /* what was on its way before the size changed */
            db_request_size_disturbed(size, drive->now_ns, moved == BATCH);
    }
    drive->now_ns += (int64_t)check_random_below(&seed, 100000000); /* must not count */
}

static void move_until_chosen(struct drive *drive, struct db_request_size *size)
{
    uint64_t moved = 0;
    while (!size->is_trusted) {
        move_batch(drive, size);
        moved += BATCH;
        CHECK(moved < 4ull << 30);
    }
}

static void check_choice(struct drive drive, uint32_t expected_bytes)
{
    struct db_request_size size;
    drive.now_ns = 1;
    db_request_size_open(&size, 0, CHUNK);
    CHECK_EQUAL(size.now_bytes, DB_REQUEST_DEFAULT_BYTES);
    move_until_chosen(&drive, &size);
    CHECK_EQUAL(size.now_bytes, expected_bytes);
}

static void test_the_fastest_is_chosen_and_the_longest_of_equals(void)
{
    for (int round = 0; round < 50; round++) {
        check_choice((struct drive){.rates = {1.5, 1.8, 2.0}, .noise = 0.02}, 256 << 10);
        check_choice((struct drive){.rates = {1.8, 2.0, 1.5}, .noise = 0.02}, 1 << 20);
        check_choice((struct drive){.rates = {2.0, 1.8, 1.5}, .noise = 0.02}, 4 << 20);
        check_choice((struct drive){.rates = {1.99, 2.0, 2.0}, .noise = 0.002}, 4 << 20);
    }
}

static void test_a_drive_that_changes_is_measured_again(void)
{
    struct db_request_size size;
    struct drive drive = {.rates = {2.0, 1.5, 1.0}, .now_ns = 1};
    db_request_size_open(&size, 0, CHUNK);
    move_until_chosen(&drive, &size);
    CHECK_EQUAL(size.now_bytes, 4 << 20);
    drive.rates[1] = 3.0;
    drive.rates[2] = 4.0;
    uint64_t moved = 0;
    for (; size.is_trusted; moved += BATCH) {
        CHECK_EQUAL(size.now_bytes, 4 << 20);
        move_batch(&drive, &size);
    }
    CHECK_EQUAL(moved, DB_REQUEST_TRUST_BYTES);
    move_until_chosen(&drive, &size);
    CHECK_EQUAL(size.now_bytes, 256 << 10);
}

/* Small transfers beside the large ones take time that is no fault of the size. */
static void test_a_disturbed_window_does_not_count(void)
{
    struct db_request_size size;
    struct drive drive = {.rates = {2.0, 1.5, 1.0}, .now_ns = 1};
    db_request_size_open(&size, 0, CHUNK);
    for (int i = 0; i < 1000; i++) {
        move_batch(&drive, &size);
        db_request_size_started(&size, drive.now_ns);
        drive.now_ns += 1000;
        db_request_size_disturbed(&size, drive.now_ns, true);
    }
    CHECK(!size.is_trusted);
    CHECK_EQUAL(size.windows, 0);
    CHECK_EQUAL(size.now_bytes, DB_REQUEST_DEFAULT_BYTES);
    move_until_chosen(&drive, &size);
    CHECK_EQUAL(size.now_bytes, 4 << 20);
}

static void test_a_size_that_was_asked_for_stays(void)
{
    struct db_request_size size;
    db_request_size_open(&size, 512 << 10, CHUNK);
    for (int64_t now_ns = 1; now_ns < 100000; now_ns++)
        db_request_size_moved(&size, DB_REQUEST_WINDOW_BYTES, now_ns, true);
    CHECK_EQUAL(size.now_bytes, 512 << 10);
}

static void test_sizes_hold_whole_chunks(void)
{
    for (uint32_t chunk = 4096; chunk <= 1u << 30; chunk *= 2) {
        struct db_request_size size;
        db_request_size_open(&size, 0, chunk);
        for (int i = 0; i < DB_REQUEST_SIZES; i++)
            CHECK(size.sizes[i] > 0 && size.sizes[i] % chunk == 0);
    }
}

int main(void)
{
    seed = check_seed("test_request_size");
    test_the_fastest_is_chosen_and_the_longest_of_equals();
    test_a_drive_that_changes_is_measured_again();
    test_a_disturbed_window_does_not_count();
    test_a_size_that_was_asked_for_stays();
    test_sizes_hold_whole_chunks();
    return check_report("test_request_size");
}
