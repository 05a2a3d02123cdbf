# ExtentMap; included by _core.pyx.

@cython.final
@cython.no_gc
cdef class ExtentMap:
    """Who owns which run of [0, size_bytes); all free at first.

    unit_bytes, a power of two, is what lengths are rounded up to and the least alignment."""

    cdef db_extent_map *map

    def __init__(self, size_bytes, unit_bytes=4096):
        cdef uint64_t size = _bytes(size_bytes, "size_bytes")
        cdef uint32_t unit = _option(unit_bytes, "unit_bytes", 1, 1 << 30)
        if self.map != NULL:
            raise TypeError("an ExtentMap is initialised once")
        cdef int rc = db_extent_map_open(size, unit, &self.map)
        if rc == -ENOMEM:
            raise MemoryError("no memory for an extent map")
        if rc:
            raise ValueError(f"an extent map of {size} bytes in units of {unit}: the unit must "
                             "be a power of two and the size at least one unit")

    cdef int _require_map(self) except -1:
        if self.map == NULL:
            raise ClosedError("this ExtentMap was never initialised")
        return 0

    cdef db_extent_stats _stats(self) except *:
        cdef db_extent_stats stats
        self._require_map()
        db_extent_map_stats(self.map, &stats)
        return stats

    @property
    def total_bytes(self):
        return self._stats().total_bytes

    @property
    def free_bytes(self):
        return self._stats().free_bytes

    @property
    def largest_free_bytes(self):
        return self._stats().largest_free_bytes

    @property
    def free_extents(self):
        return self._stats().free_extents

    @property
    def fragmentation(self):
        """1 - largest free run / free bytes: 0 when all free space is one run."""
        cdef db_extent_stats stats = self._stats()
        if stats.free_bytes == 0:
            return 0.0
        return 1.0 - <double>stats.largest_free_bytes / <double>stats.free_bytes

    def allocate(self, length, align=0):
        """Offset of the smallest free run that holds length bytes at a multiple of align (a
        power of two; 0: the unit). Raises NoSpaceError, ValueError."""
        cdef uint64_t size = _bytes(length, "length")
        cdef uint64_t alignment = _bytes(align, "align")
        cdef uint64_t offset = 0
        cdef db_extent_stats stats
        self._require_map()
        cdef int rc = db_extent_allocate(self.map, size, alignment, &offset)
        if rc == -ENOSPC:
            stats = self._stats()
            raise NoSpaceError(
                ENOSPC,
                f"no free run of {size} bytes: {stats.free_bytes} of {stats.total_bytes} bytes "
                f"are free, the largest run has {stats.largest_free_bytes}; delete something, "
                "or use a larger device",
            )
        if rc == -ENOMEM:
            raise MemoryError("no memory for an extent")
        if rc:
            raise ValueError(f"cannot allocate {size} bytes at a multiple of {alignment}: the "
                             "length must be positive, the alignment a power of two")
        return offset

    def reserve(self, offset, length):
        """Takes exactly this run. Raises ValueError if part of it is taken or outside."""
        cdef uint64_t start = _bytes(offset, "offset")
        cdef uint64_t size = _bytes(length, "length")
        self._require_map()
        self._check(db_extent_reserve(self.map, start, size), start, size)

    def free(self, offset, length):
        """Gives a run back, or a part of one. Raises ValueError if part of it is free already
        or outside."""
        cdef uint64_t start = _bytes(offset, "offset")
        cdef uint64_t size = _bytes(length, "length")
        self._require_map()
        self._check(db_extent_free(self.map, start, size), start, size)

    cdef int _check(self, int rc, uint64_t offset, uint64_t length) except -1:
        if rc == 0:
            return 0
        run = f"the run of {length} bytes at {offset}"
        if rc == -EEXIST:
            raise ValueError(f"{run} is taken already, or part of it is")
        if rc == -ENOENT:
            raise ValueError(f"{run} is free already, or part of it is")
        if rc == -EINVAL:
            raise ValueError(
                f"{run} is empty, unaligned, or outside the map of {self.total_bytes} bytes"
            )
        if rc == -ENOMEM:
            raise MemoryError("no memory for an extent")
        raise OSError(-rc, os.strerror(-rc))

    def free_runs(self):
        """The free runs as a list of (offset, length), in order."""
        cdef uint64_t offset = 0
        cdef uint64_t length = 0
        self._require_map()
        runs = []
        while db_extent_next_free(self.map, &offset, &length) == 0:
            runs.append((offset, length))
            offset += length
        return runs

    def verify(self):
        """Recomputes every invariant; raises CorruptionError if one is broken. O(n)."""
        self._require_map()
        if db_extent_map_verify(self.map):
            raise CorruptionError("the extent map contradicts itself: this is a bug in dualblade")

    def __dealloc__(self):
        if self.map != NULL:
            db_extent_map_close(self.map)
