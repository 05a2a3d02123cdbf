/* mapping.c - parts of a file as memory, and the lock that lasts as long as these do. */
#define _GNU_SOURCE
#include "mapping.h"

#include "counters.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

struct db_lock {
    int fd;
    pid_t owner;
    _Atomic uint32_t users;
};

struct db_mapping {
    void *start;
    size_t length;
    struct db_lock *lock;
};

int db_lock_open(int fd, struct db_lock **out)
{
    struct db_lock *lock = malloc(sizeof(*lock));
    if (!lock)
        return -ENOMEM;
    *lock = (struct db_lock){.fd = fd, .owner = getpid(), .users = 1};
    *out = lock;
    return 0;
}

void db_lock_close(struct db_lock *lock)
{
    /* In the child after a fork the number may be another file's. */
    if (lock->owner != getpid())
        return;
    uint32_t before = atomic_fetch_sub(&lock->users, 1);
    assert(before > 0);
    if (before > 1)
        return;
    /* A child that has not yet closed its copy must not keep the lock. */
    flock(lock->fd, LOCK_UN);
    close(lock->fd);
    free(lock);
}

bool db_lock_is_shared(const struct db_lock *lock)
{
    return atomic_load_explicit(&lock->users, memory_order_relaxed) > 1;
}

int db_mapping_open(struct db_lock *lock, uint64_t offset, uint64_t length,
                    struct db_mapping **out, const void **bytes)
{
    uint64_t inside = offset % (uint64_t)sysconf(_SC_PAGESIZE);
    struct db_mapping *mapping = malloc(sizeof(*mapping));
    if (!mapping)
        return -ENOMEM;
    *mapping = (struct db_mapping){.length = (size_t)(length + inside), .lock = lock};
    mapping->start = mmap(NULL, mapping->length, PROT_READ, MAP_SHARED, lock->fd,
                          (off_t)(offset - inside));
    if (mapping->start == MAP_FAILED) {
        int error = errno;
        free(mapping);
        return -error;
    }
    /* A page that is gone when it is looked at comes alone: what lies around may be another's. */
    (void)madvise(mapping->start, mapping->length, MADV_RANDOM);
    atomic_fetch_add(&lock->users, 1);
    atomic_fetch_add(&db_live_mappings, 1);
    *bytes = (const uint8_t *)mapping->start + inside;
    *out = mapping;
    return 0;
}

void db_mapping_close(struct db_mapping *mapping)
{
    int rc = munmap(mapping->start, mapping->length);
    assert(rc == 0);
    db_lock_close(mapping->lock);
    free(mapping);
    int64_t before = atomic_fetch_sub(&db_live_mappings, 1);
    assert(before > 0);
}
