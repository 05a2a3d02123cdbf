/* test_window.c - pages copied from where the page cache has them: which can be pinned, that nobody
 * takes what is pinned, and that what is let go of can be dropped. */
#define _GNU_SOURCE
#include "cached.h"
#include "check.h"
#include "copy.h"
#include "window.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MIB = 1 << 20, FILE_BYTES = 4 * MIB, PAGE = 4096 };

static uint8_t bytes[FILE_BYTES];
static struct db_window window;
static struct db_lock *lock;
static struct db_pin pin;
static int fd;

static uint64_t resident_bytes(uint64_t offset, uint64_t length)
{
    struct db_cached found = {0};
    CHECK_EQUAL(db_cached_count(fd, offset, length, &found), 0);
    return found.resident_bytes;
}

static void drop(uint64_t offset, uint64_t length)
{
    CHECK_EQUAL(posix_fadvise(fd, (off_t)offset, (off_t)length, POSIX_FADV_DONTNEED), 0);
}

static void bring_in(uint64_t offset, uint64_t length)
{
    static uint8_t into[FILE_BYTES];
    CHECK_EQUAL(pread(fd, into, length, (off_t)offset), length);
}

static const void *take(uint64_t offset, uint64_t length)
{
    return db_pin_take(&pin, &window, offset, length);
}

static void test_contents(uint64_t *random)
{
    bring_in(0, FILE_BYTES);
    for (int i = 0; i < 1000; i++) {
        uint64_t length = 1 + check_random_below(random, DB_PIN_BYTES);
        uint64_t offset = check_random_below(random, FILE_BYTES - length + 1);
        const void *found = take(offset, length);
        CHECK(found != NULL);
        CHECK_EQUAL(memcmp(found, bytes + offset, length), 0);
        db_pin_give(&pin);
    }
    CHECK(take(0, DB_PIN_BYTES + 1) == NULL);
}

/* A gap is for the engine to read: nothing is pinned, and nothing is brought in. */
static void test_gap(void)
{
    db_window_drop(&window, 0, FILE_BYTES);
    drop(0, FILE_BYTES);
    CHECK_EQUAL(resident_bytes(0, FILE_BYTES), 0);
    CHECK(take(0, PAGE) == NULL);
    bring_in(0, MIB / 8);
    bring_in(MIB / 8 + PAGE, MIB / 8);
    uint64_t before = resident_bytes(0, FILE_BYTES);
    CHECK(take(0, MIB / 4) == NULL);
    CHECK_EQUAL(resident_bytes(0, FILE_BYTES), before);
    CHECK(take(0, MIB / 8) != NULL);
    db_pin_give(&pin);
}

/* Mapped pages are not dropped, and those that were are. */
static void test_drop(void)
{
    bring_in(0, FILE_BYTES);
    uint64_t before = db_window_bytes();
    for (uint64_t offset = 0; offset < FILE_BYTES; offset += DB_PIN_BYTES) {
        const uint8_t *found = take(offset, DB_PIN_BYTES);
        CHECK(found != NULL && found[PAGE] == bytes[offset + PAGE]);
        db_pin_give(&pin);
    }
    CHECK(db_window_bytes() >= before);
    CHECK_EQUAL(db_window_bytes(), FILE_BYTES);
    drop(0, FILE_BYTES);
    CHECK(resident_bytes(0, FILE_BYTES) > 0);
    db_window_drop(&window, MIB, 2 * MIB);
    CHECK_EQUAL(db_window_bytes(), 2 * MIB);
    drop(MIB, 2 * MIB);
    CHECK_EQUAL(resident_bytes(MIB, 2 * MIB), 0);
    CHECK(resident_bytes(0, MIB) > 0);
    db_window_drop(&window, 0, FILE_BYTES);
    drop(0, FILE_BYTES);
    CHECK_EQUAL(resident_bytes(0, FILE_BYTES), 0);
    CHECK_EQUAL(db_window_bytes(), 0);
}

/* Whole units that lie in the run, and nothing else. */
static void test_fill(void)
{
    db_window_drop(&window, 0, FILE_BYTES);
    drop(0, FILE_BYTES);
    CHECK_EQUAL(db_window_fill(&window, PAGE, MIB, PAGE, FILE_BYTES), DB_FILL_NONE);
    CHECK_EQUAL(db_window_fill(&window, 0, MIB, 0, 2 * MIB - 1), DB_FILL_NONE);
    CHECK_EQUAL(resident_bytes(0, FILE_BYTES), 0);
    enum db_fill found = db_window_fill(&window, 3 * MIB, PAGE, PAGE, FILE_BYTES);
    if (found == DB_FILL_NONE)
        return; /* an old kernel */
    CHECK_EQUAL(found, DB_FILL_DONE);
    CHECK_EQUAL(resident_bytes(0, 2 * MIB), 0);
    CHECK_EQUAL(resident_bytes(2 * MIB, 2 * MIB), 2 * MIB);
    CHECK_EQUAL(db_window_bytes(), 2 * MIB);
    db_window_drop(&window, 0, FILE_BYTES);
    drop(0, FILE_BYTES);
    /* Who looks at it has nothing read behind it. */
    CHECK_EQUAL(db_window_fill(&window, 0, MIB, 0, 2 * MIB), DB_FILL_DONE);
    CHECK(db_window_await(&window, 0, 2 * MIB));
    CHECK(!db_window_await(&window, MIB, MIB + PAGE));
    CHECK(take(0, DB_PIN_BYTES) != NULL);
    db_pin_give(&pin);
    CHECK_EQUAL(resident_bytes(2 * MIB, 2 * MIB), 0);
    CHECK_EQUAL(db_window_fill(&window, 2 * MIB - PAGE, 2 * PAGE, 0, FILE_BYTES), DB_FILL_DONE);
    CHECK_EQUAL(memcmp(window.start, bytes, FILE_BYTES), 0);
    CHECK(take(0, DB_PIN_BYTES) != NULL);
    db_pin_give(&pin);
    db_window_drop(&window, 0, FILE_BYTES);
    drop(0, FILE_BYTES);
    CHECK_EQUAL(resident_bytes(0, FILE_BYTES), 0);
}

/* What is pinned stays in the page cache though it is not mapped any more. */
static void test_pinned(void)
{
    bring_in(0, MIB);
    CHECK(take(0, DB_PIN_BYTES) != NULL);
    db_window_drop(&window, 0, FILE_BYTES);
    drop(0, FILE_BYTES);
    CHECK_EQUAL(resident_bytes(0, DB_PIN_BYTES), DB_PIN_BYTES);
    db_pin_give(&pin);
    drop(0, FILE_BYTES);
    CHECK_EQUAL(resident_bytes(0, DB_PIN_BYTES), 0);
}

/* Where the file has been cut off there is nothing to pin. */
static void test_cut_off(void)
{
    bring_in(0, FILE_BYTES);
    CHECK_EQUAL(ftruncate(fd, 2 * MIB), 0);
    CHECK(take(2 * MIB - PAGE, 2 * PAGE) == NULL);
    CHECK(take(3 * MIB, PAGE) == NULL);
    CHECK(take(MIB, DB_PIN_BYTES) != NULL);
    db_pin_give(&pin);
    CHECK_EQUAL(pwrite(fd, bytes + 2 * MIB, 2 * MIB, 2 * MIB), 2 * MIB);
}

/* While somebody has mapped parts of the file for himself nothing is pinned. */
static void test_shared(void)
{
    struct db_mapping *mapping;
    const void *start;
    bring_in(0, FILE_BYTES);
    CHECK_EQUAL(db_mapping_open(lock, 0, PAGE, &mapping, &start), 0);
    CHECK(take(MIB, PAGE) == NULL);
    db_mapping_close(mapping);
    CHECK(take(MIB, PAGE) != NULL);
    db_pin_give(&pin);
}

/* A child has neither the memory nor the count of it. */
static void test_fork(void)
{
    CHECK(take(0, PAGE) != NULL);
    db_pin_give(&pin);
    CHECK(db_window_bytes() > 0);
    pid_t child = fork();
    if (child == 0) {
        unsigned char page;
        bool is_there = mincore((void *)window.start, PAGE, &page) == 0;
        db_window_abandon(&window);
        _exit(is_there || db_window_bytes() > 0 ? 1 : 0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void)
{
    uint64_t random = check_seed("test_window");
    char path[] = "/var/tmp/dualblade-window-XXXXXX";
    fd = mkstemp(path);
    CHECK(fd >= 0);
    int map_fd = open(path, O_RDONLY);
    CHECK(map_fd >= 0);
    unlink(path);
    for (size_t i = 0; i < sizeof(bytes); i++)
        bytes[i] = (uint8_t)check_random(&random);
    CHECK_EQUAL(pwrite(fd, bytes, sizeof(bytes), 0), sizeof(bytes));
    CHECK_EQUAL(fsync(fd), 0);
    CHECK_EQUAL(posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM), 0);
    CHECK_EQUAL(db_lock_open(fd, &lock), 0);
    db_window_open(fd, map_fd, FILE_BYTES, lock, &window);
    if (!window.start) {
        CHECK(!db_copy_is_fast());
        printf("test_window: skipped, neither AVX2 nor a known xxhash.h\n");
        return 0;
    }
    db_pin_open(&pin, false);
    CHECK(take(0, PAGE) == NULL);
    db_pin_open(&pin, true);
    test_contents(&random);
    test_gap();
    test_drop();
    test_fill();
    test_pinned();
    test_shared();
    test_fork();
    test_cut_off();
    db_pin_close(&pin);
    db_window_close(&window);
    CHECK_EQUAL(db_window_bytes(), 0);
    db_lock_close(lock);
    close(map_fd);
    return check_report("test_window");
}
