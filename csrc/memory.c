/* memory.c - page-aligned memory, and the counts of what is alive in the process. */

#include "counters.h"
#include "dualblade.h"

#include <assert.h>
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

/* Smaller mappings cannot hold a huge page of any common architecture. */
#define HUGE_PAGE_BYTES ((size_t)2 << 20)

_Atomic int64_t db_live_devices;
_Atomic int64_t db_live_requests;
_Atomic int64_t db_live_batches;
_Atomic int64_t db_live_buffers;
_Atomic int64_t db_live_extent_maps;
_Atomic int64_t db_live_tails;
_Atomic int64_t db_live_mappings;

int db_memory_map(size_t length, void **out)
{
    assert(out != NULL);
    if (length == 0)
        return -EINVAL;

    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        /* ENOMEM: no memory or no more mappings. EAGAIN: mlockall(MCL_FUTURE) is on and the
         * memlock limit is reached. EINVAL, EOVERFLOW: more than the address space. */
        return -ENOMEM;
    if (length >= HUGE_PAGE_BYTES)
        /* Advice only: a kernel built without huge pages says EINVAL and small pages serve. */
        (void)madvise(memory, length, MADV_HUGEPAGE);

    assert((uintptr_t)memory % (uintptr_t)sysconf(_SC_PAGESIZE) == 0);
    atomic_fetch_add(&db_live_buffers, 1);
    *out = memory;
    return 0;
}

void db_memory_unmap(void *memory, size_t length)
{
    if (memory == NULL)
        return;
    int rc = munmap(memory, length);
    assert(rc == 0); /* EINVAL: not what db_memory_map() gave, and then the caller is wrong */
    int64_t before = atomic_fetch_sub(&db_live_buffers, 1);
    assert(before > 0);
}

void db_counters(struct db_counters *out)
{
    out->devices = atomic_load(&db_live_devices);
    out->requests = atomic_load(&db_live_requests);
    out->batches = atomic_load(&db_live_batches);
    out->buffers = atomic_load(&db_live_buffers);
    out->extent_maps = atomic_load(&db_live_extent_maps);
    out->tails = atomic_load(&db_live_tails);
    out->mappings = atomic_load(&db_live_mappings);
}
