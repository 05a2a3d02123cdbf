/* window.c - a file mapped as long as it is open, and pages that stay while they are copied. */
#define _GNU_SOURCE
#include "window.h"

#include "cached.h"
#include "copy.h"
#include "dualblade.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    /* A fault maps so much around it, as far as it is in the page cache: aligned in memory, and so
     * in the file too, as long as the mapping is. */
    UNIT_BYTES = 64 << 10,
    FILL_BYTES = 2 << 20, /* the largest folio */
    ALIGN_BYTES = FILL_BYTES,
    WORD_BITS = 64,
    PAGE_BYTES = 4096, /* of any processor that has db_copy_checksum() */
    PIN_PAGES = DB_PIN_BYTES / PAGE_BYTES + 1,
    PIPE_BYTES = 2 * DB_PIN_BYTES, /* a slot for each page, and one if it begins within a page */
};

static _Atomic uint64_t all_mapped_bytes;

uint64_t db_window_bytes(void)
{
    return atomic_load(&all_mapped_bytes);
}

static void count(struct db_window *window, int64_t bytes)
{
    atomic_fetch_add(&window->mapped_bytes, (uint64_t)bytes);
    atomic_fetch_add(&all_mapped_bytes, (uint64_t)bytes);
}

/* ---- the mapping ----------------------------------------------------------------------------- */

/* After mlockall(MCL_FUTURE) the kernel would read all of it. A child has no use for it, and would
 * have to be given all of its page tables. */
static void *map_unread(int fd, uint64_t length)
{
    size_t reserved = length + ALIGN_BYTES;
    uint8_t *room = mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                         -1, 0);
    if (room == MAP_FAILED)
        return NULL;
    uint8_t *start = room + (ALIGN_BYTES - (uintptr_t)room % ALIGN_BYTES) % ALIGN_BYTES;
    if (start > room)
        munmap(room, (size_t)(start - room));
    uint64_t behind = (length + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    if (start + behind < room + reserved)
        munmap(start + behind, (size_t)(room + reserved - start - behind));
    if (mmap(start, length, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        munmap(start, length);
        return NULL;
    }
    if (munlock(start, length) < 0 || mprotect(start, length, PROT_READ) < 0 ||
        madvise(start, length, MADV_DONTFORK) < 0 || madvise(start, length, MADV_RANDOM) < 0) {
        munmap(start, length);
        return NULL;
    }
    (void)madvise(start, length, MADV_HUGEPAGE); /* for db_window_fill(); not all kernels have it */
    return start;
}

static size_t bitmap_bytes(uint64_t length, uint64_t unit_bytes)
{
    uint64_t units = (length + unit_bytes - 1) / unit_bytes;
    return (size_t)(units / WORD_BITS + 1) * sizeof(uint64_t);
}

void db_window_open(int fd, int map_fd, uint64_t length, const struct db_lock *lock,
                    struct db_window *out)
{
    *out = (struct db_window){.length = length, .fd = fd, .lock = lock};
    if (!db_copy_is_fast() || !db_cached_is_told(fd))
        return;
    size_t units_length = bitmap_bytes(length, UNIT_BYTES);
    out->bits_length = units_length + bitmap_bytes(length, FILL_BYTES);
    /* Not taken before it is written to. */
    void *bits = mmap(NULL, out->bits_length, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (bits == MAP_FAILED)
        return;
    void *start = map_unread(map_fd, length);
    if (!start) {
        munmap(bits, out->bits_length);
        return;
    }
    out->units = bits;
    out->fills = (void *)((uint8_t *)bits + units_length);
    out->start = start;
}

static void forget(struct db_window *window)
{
    count(window, -(int64_t)atomic_load(&window->mapped_bytes));
    munmap((void *)window->units, window->bits_length);
    window->start = NULL;
}

void db_window_close(struct db_window *window)
{
    if (!window->start)
        return;
    munmap((void *)window->start, window->length);
    forget(window);
}

void db_window_abandon(struct db_window *window)
{
    if (window->start)
        forget(window);
}

static uint64_t unit_after(uint64_t offset)
{
    return (offset + UNIT_BYTES - 1) / UNIT_BYTES;
}

/* Of one word, the bits of units from `first` up to `end`. */
static uint64_t bits_of(uint64_t first, uint64_t end)
{
    uint64_t low = first % WORD_BITS, bits = end - first;
    if (bits >= WORD_BITS - low)
        return UINT64_MAX << low;
    return ((UINT64_C(1) << bits) - 1) << low;
}

/* Notes a range, or forgets it; returns how many units changed. */
static int64_t mark(struct db_window *window, uint64_t offset, uint64_t length, bool is_mapped)
{
    uint64_t end = unit_after(offset + length);
    int64_t changed = 0;
    for (uint64_t unit = offset / UNIT_BYTES; unit < end;) {
        uint64_t next = (unit / WORD_BITS + 1) * WORD_BITS;
        _Atomic uint64_t *word = &window->units[unit / WORD_BITS];
        uint64_t bits = bits_of(unit, end < next ? end : next);
        uint64_t before = atomic_load_explicit(word, memory_order_relaxed);
        if (is_mapped && (before & bits) != bits)
            changed += __builtin_popcountll(bits & ~atomic_fetch_or(word, bits));
        else if (!is_mapped && (before & bits))
            changed += __builtin_popcountll(bits & atomic_fetch_and(word, ~bits));
        unit = next;
    }
    return changed;
}

/* Whether a range may be mapped: a fault maps as much as a folio, of which one unit is noted. */
static bool may_be_mapped(const struct db_window *window, uint64_t offset, uint64_t length)
{
    uint64_t unit = offset / FILL_BYTES * (FILL_BYTES / UNIT_BYTES);
    uint64_t end = (offset + length + FILL_BYTES - 1) / FILL_BYTES * (FILL_BYTES / UNIT_BYTES);
    if (end > unit_after(window->length))
        end = unit_after(window->length);
    while (unit < end) {
        uint64_t next = (unit / WORD_BITS + 1) * WORD_BITS;
        const _Atomic uint64_t *word = &window->units[unit / WORD_BITS];
        if (atomic_load_explicit(word, memory_order_relaxed) &
            bits_of(unit, end < next ? end : next))
            return true;
        unit = next;
    }
    return false;
}

/* What could not be filled may be tried again. */
static void let_fill(struct db_window *window, uint64_t offset, uint64_t length)
{
    for (uint64_t unit = offset / FILL_BYTES; unit * FILL_BYTES < offset + length; unit++)
        atomic_fetch_and(&window->fills[unit / WORD_BITS], ~(UINT64_C(1) << unit % WORD_BITS));
}

void db_window_drop(struct db_window *window, uint64_t offset, uint64_t length)
{
    if (!window->start || length == 0 || !may_be_mapped(window, offset, length))
        return;
    int64_t units = mark(window, offset, length, false);
    if (atomic_load(&window->has_failed))
        let_fill(window, offset, length);
    /* All that a fault in the range may have mapped. Who uses the rest of it maps it again. */
    uint64_t first = offset / FILL_BYTES * FILL_BYTES;
    uint64_t end = (offset + length + FILL_BYTES - 1) / FILL_BYTES * FILL_BYTES;
    if (end > window->length)
        end = window->length;
    void *start = (uint8_t *)window->start + first;
    /* EINVAL: mlockall(2) has been called since it was made. */
    if (madvise(start, end - first, MADV_DONTNEED) < 0 && munlock(start, end - first) == 0)
        (void)madvise(start, end - first, MADV_DONTNEED);
    count(window, -units * UNIT_BYTES);
}

static void note_mapped(struct db_window *window, uint64_t offset, uint64_t length)
{
    int64_t units = mark(window, offset, length, true);
    if (units > 0)
        count(window, units * UNIT_BYTES);
}

/* A folio that could not be read is in the way: plain reads would try all of it again, and blame
 * whatever they are for. */
bool db_window_forget_failed(struct db_window *window, uint64_t offset, uint64_t length)
{
    if (!window->start || !atomic_load(&window->has_failed))
        return false;
    uint64_t start = offset / FILL_BYTES * FILL_BYTES;
    uint64_t end = (offset + length + FILL_BYTES - 1) / FILL_BYTES * FILL_BYTES;
    (void)posix_fadvise(window->fd, (off_t)start, (off_t)(end - start), POSIX_FADV_DONTNEED);
    return true;
}

/* Maps whole pages, and reads those that are not there. */
static bool populate(struct db_window *window, uint64_t offset, uint64_t length)
{
#ifdef MADV_POPULATE_READ
    int rc = madvise((uint8_t *)window->start + offset, length, MADV_POPULATE_READ);
    if (rc < 0 && errno == EINVAL) /* before Linux 5.14 */
        return false;
    note_mapped(window, offset, length);
    if (rc < 0)
        atomic_store(&window->has_failed, true);
    return rc == 0;
#else
    (void)window;
    (void)offset;
    (void)length;
    return false;
#endif
}

/* Of a whole aligned unit. The kernel reads all of it at once, and no more; the descriptor that is
 * mapped has no reader whose readahead would go on from there. */
static enum db_fill fill_unit(struct db_window *window, uint64_t unit)
{
    _Atomic uint64_t *word = &window->fills[unit / WORD_BITS];
    uint64_t bit = UINT64_C(1) << unit % WORD_BITS;
    if (atomic_fetch_or(word, bit) & bit)
        return DB_FILL_BUSY;
    /* Around what is there already the kernel makes small ones, of which plain reads of any would
     * have more read behind them. */
    struct db_cached there = {0};
    if (db_cached_count(window->fd, unit * FILL_BYTES, FILL_BYTES, &there) < 0 ||
        there.resident_bytes > 0) {
        atomic_fetch_and(word, ~bit);
        return DB_FILL_NONE;
    }
    if (!populate(window, unit * FILL_BYTES, FILL_BYTES)) {
        /* The bit stays: plain reads say what it is, each for itself. */
        (void)db_window_forget_failed(window, unit * FILL_BYTES, FILL_BYTES);
        return DB_FILL_NONE;
    }
    atomic_fetch_and(word, ~bit);
    return DB_FILL_DONE;
}

enum db_fill db_window_fill(struct db_window *window, uint64_t offset, uint64_t length,
                            uint64_t run_start, uint64_t run_end)
{
    enum db_fill found = DB_FILL_NONE;
    if (!db_window_is_open(window))
        return found;
    assert(run_end <= window->length && offset + length <= run_end && run_start <= offset);
    for (uint64_t unit = offset / FILL_BYTES; unit * FILL_BYTES < offset + length; unit++) {
        uint64_t start = unit * FILL_BYTES;
        if (start < run_start || run_end - start < FILL_BYTES)
            continue;
        enum db_fill one = fill_unit(window, unit);
        if (one == DB_FILL_BUSY || found == DB_FILL_NONE)
            found = one;
    }
    return found;
}

bool db_window_await(struct db_window *window, uint64_t offset, uint64_t length)
{
    if (!db_window_is_open(window))
        return false;
    uint64_t first = offset / PAGE_BYTES * PAGE_BYTES;
    uint64_t end = (offset + length + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    struct db_cached found = {0};
    return db_cached_count(window->fd, first, end - first, &found) == 0 &&
           found.resident_bytes >= end - first && populate(window, first, end - first);
}

/* ---- pins ------------------------------------------------------------------------------------ */

void db_pin_open(struct db_pin *pin, bool is_wanted)
{
    *pin = (struct db_pin){.ends = {-1, -1}, .nowhere = -1};
    if (!is_wanted || pipe2(pin->ends, O_CLOEXEC) < 0)
        return;
    pin->nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (pin->nowhere < 0 || fcntl(pin->ends[1], F_SETPIPE_SZ, PIPE_BYTES) < 0)
        db_pin_close(pin);
}

void db_pin_close(struct db_pin *pin)
{
    for (int i = 0; i < 2; i++)
        if (pin->ends[i] >= 0)
            close(pin->ends[i]);
    if (pin->nowhere >= 0)
        close(pin->nowhere);
    pin->ends[0] = pin->ends[1] = pin->nowhere = -1;
}

/* What is not there would be waited for, and more than was asked for would come with it. */
static bool is_resident(const uint8_t *bytes, uint64_t length)
{
    unsigned char pages[PIN_PAGES];
    uint64_t inside = (uintptr_t)bytes % PAGE_BYTES;
    uint64_t count = (inside + length + PAGE_BYTES - 1) / PAGE_BYTES;
    if (mincore((void *)(bytes - inside), inside + length, pages) < 0)
        return false;
    for (uint64_t i = 0; i < count; i++)
        if (!(pages[i] & 1))
            return false;
    return true;
}

const void *db_pin_take(struct db_pin *pin, struct db_window *window, uint64_t offset,
                        uint64_t length)
{
    if (!db_window_is_open(window) || pin->ends[0] < 0 || length > DB_PIN_BYTES)
        return NULL;
    assert(offset <= window->length && length <= window->length - offset);
    if (!is_resident(window->start + offset, length))
        return NULL;
    /* Not splice() of the file: where that meets a piece that came by a fault, it has the kernel
     * read on from there, as far as the file goes. */
    struct iovec left = {(void *)(window->start + offset), length};
    while (left.iov_len > 0) {
        ssize_t taken = vmsplice(pin->ends[1], &left, 1, SPLICE_F_NONBLOCK);
        if (taken <= 0) { /* the plain read says what it is */
            note_mapped(window, offset, length);
            db_pin_give(pin);
            return NULL;
        }
        left.iov_base = (uint8_t *)left.iov_base + taken;
        left.iov_len -= (size_t)taken;
        pin->held_bytes += (uint64_t)taken;
    }
    pin->window = window;
    pin->offset = offset;
    pin->length = length;
    note_mapped(window, offset, length);
    return window->start + offset;
}

void db_pin_give(struct db_pin *pin)
{
    /* Once more: what was let go of meanwhile, the copy has mapped again. */
    if (pin->window)
        note_mapped(pin->window, pin->offset, pin->length);
    pin->window = NULL;
    while (pin->held_bytes > 0) {
        ssize_t given = splice(pin->ends[0], NULL, pin->nowhere, NULL, pin->held_bytes, 0);
        if (given <= 0 || (uint64_t)given > pin->held_bytes) {
            db_pin_close(pin); /* that lets go of them, and of what else there may be */
            pin->held_bytes = 0;
            return;
        }
        pin->held_bytes -= (uint64_t)given;
    }
}
