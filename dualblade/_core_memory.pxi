# Buffer, Mapping and aligned_empty; included by _core.pyx.

@cython.final
@cython.no_gc
cdef class Buffer:
    """Page-aligned memory of its own; a writable buffer of `size` bytes."""

    cdef void *memory
    cdef Py_ssize_t size

    def __init__(self, size):
        cdef int64_t length = _bytes(size, "size")
        if self.memory != NULL:
            raise TypeError("a Buffer is initialised once")
        if db_memory_map(max(length, 1), &self.memory):
            raise MemoryError(f"cannot map {length} bytes of memory")
        self.size = length

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.memory, self.size, 0, flags)

    def __dealloc__(self):
        if self.memory != NULL:
            with nogil:
                db_memory_unmap(self.memory, max(self.size, 1))


# no_gc: who lets go of it must be told before what it would tell is cleared.
@cython.final
@cython.no_gc
cdef class Mapping:
    """A part of a device as memory, from Device.map(): a read-only buffer."""

    cdef db_mapping *mapping
    cdef const void *memory
    cdef Py_ssize_t size
    cdef public object when_gone
    """Called without arguments once it is unmapped, in whatever thread lets go of it last."""

    def __init__(self):
        raise TypeError("a Mapping comes from Device.map()")

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.memory, self.size, 1, flags)

    def __dealloc__(self):
        if self.mapping != NULL:
            with nogil:
                db_mapping_close(self.mapping)
        if self.when_gone is not None:
            self.when_gone()


def aligned_empty(shape, dtype):
    """An array in page-aligned memory, which direct I/O uses in place; its content is arbitrary.

    dtype is anything numpy takes, or the name of an ml_dtypes type such as "bfloat16"."""
    try:
        dtype = np.dtype(dtype)
    except TypeError:
        import ml_dtypes  # gives numpy the names "bfloat16", "float8_e4m3fn" and so on

        if not isinstance(dtype, str) or not hasattr(ml_dtypes, dtype):
            raise
        dtype = np.dtype(getattr(ml_dtypes, dtype))
    if dtype.hasobject:
        raise TypeError(f"dtype {dtype} holds Python objects, which raw memory cannot")
    dimensions = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    dimensions = tuple([operator.index(n) for n in dimensions])
    if any([n < 0 for n in dimensions]):
        raise ValueError(f"a shape has no negative dimensions: {dimensions}")
    size = math.prod(dimensions) * dtype.itemsize
    if size == 0:
        return np.empty(dimensions, dtype)
    return np.frombuffer(Buffer(size), np.uint8).view(dtype).reshape(dimensions)
