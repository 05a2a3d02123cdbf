# What the page cache holds; included by _core.pyx.

class CacheState(NamedTuple):
    """What the page cache holds of a range, in bytes of whole pages.

    Of the resident ones, dirty are those that are changed and not yet being written, and writeback
    those that are. Evicted were taken by reclaim and not read again since, as far as the kernel
    remembers; of these, recently_evicted so lately that they were still in use. Before Linux 6.5
    only resident_bytes is known, the others are None."""

    resident_bytes: int
    dirty_bytes: object
    writeback_bytes: object
    evicted_bytes: object
    recently_evicted_bytes: object


cdef object _cache_state(const db_cached *found):
    if found.resident_only:
        return CacheState(found.resident_bytes, None, None, None, None)
    return CacheState(found.resident_bytes, found.dirty_bytes, found.writeback_bytes,
                      found.evicted_bytes, found.recently_evicted_bytes)


def cache_state_of(path):
    """What the page cache holds of all of a file or block device, whoever uses it: a CacheState.

    Raises UnsupportedError where the kernel does not say, and DeviceError."""
    cdef bytes name = os.fsencode(path)
    cdef const char *chars = name
    cdef db_cached found
    cdef int rc
    with nogil:
        rc = db_cached_of_path(chars, &found)
    if rc == -ENOSYS:
        raise UnsupportedError(f"the kernel does not say what it has cached of {path}")
    if rc != 0:
        raise device_error(-rc, device=os.fsdecode(path), operation="open")
    return _cache_state(&found)


def window_bytes():
    """Page cache that the devices of this process have mapped for themselves, so that reads can
    copy from it: it is counted as mapped, but is as free as the rest of the page cache.

    At most: of what the kernel has reclaimed since, nothing is known."""
    return db_window_bytes()
