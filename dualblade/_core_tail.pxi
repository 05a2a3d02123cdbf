# Tail and what it hands out to be written; included by _core.pyx.

class TailWrite(NamedTuple):
    """What one append wants written: requests for Device.write(), offsets relative to the run;
    and the checksums of the chunks from first_chunk on."""

    requests: list
    first_chunk: int
    digests: np.ndarray


@cython.final
cdef class _Span:
    """A part of somebody's memory, which it keeps exported."""

    cdef Py_buffer owner
    cdef uint64_t start
    cdef Py_ssize_t length

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <char *>self.owner.buf + self.start, self.length, 1, flags)

    def __len__(self):
        return self.length

    def __dealloc__(self):
        PyBuffer_Release(&self.owner)


@cython.final
@cython.no_gc
cdef class _Head:
    """The tail's head block as it was after one append. While it is exported (to a write in
    flight) the tail refuses to change it; once the tail has moved on it exports no more."""

    cdef Tail tail
    cdef const void *memory
    cdef uint64_t version

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.version != self.tail.version:
            raise BufferError("the tail has moved on: write a head before the next append()")
        PyBuffer_FillInfo(view, self, <void *>self.memory, DB_BLOCK_BYTES, 1, flags)
        self.tail.exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self.tail.exports -= 1

    def __len__(self):
        return DB_BLOCK_BYTES


@cython.final
@cython.no_gc
cdef class Tail:
    """The end of a growing run: bytes held back until they fill a block, and its checksum."""

    cdef db_tail *tail
    cdef uint32_t chunk_bytes
    cdef uint64_t version
    cdef Py_ssize_t exports
    cdef bint busy

    def __init__(self, chunk_bytes):
        cdef int64_t chunk = _option(chunk_bytes, "chunk_bytes", DB_BLOCK_BYTES, 1 << 30)
        if chunk & (chunk - 1):
            raise ValueError(f"chunk_bytes must be a power of two, got {chunk}")
        if self.tail != NULL:
            raise TypeError("a Tail is initialised once")
        if db_tail_open(chunk, &self.tail):
            raise MemoryError("no memory for a tail")
        self.chunk_bytes = chunk

    cdef int _check_idle(self) except -1:
        if self.tail == NULL:
            raise ClosedError("this Tail was never initialised")
        if self.busy:
            raise RuntimeError("a Tail serves one thread at a time: append() is under way")
        return 0

    cdef int _check_free(self) except -1:
        self._check_idle()
        if self.exports:
            raise RuntimeError("the head of the last append() is still being written: wait for "
                               "that write before the tail changes")
        return 0

    @property
    def stored(self):
        """Bytes that are on the device, or handed out to be written."""
        self._check_idle()
        return db_tail_stored(self.tail)

    @property
    def held(self):
        """Bytes held back after these; less than a block."""
        self._check_idle()
        return db_tail_held(self.tail)

    @property
    def digest(self):
        """The checksum of the last chunk, with the bytes held back."""
        self._check_idle()
        return db_tail_digest(self.tail)

    def reset(self, stored, chunk):
        """Forgets everything and stands at byte `stored`, a multiple of 4096; chunk holds the
        stored bytes of the chunk begun before it (stored % chunk_bytes of them)."""
        cdef uint64_t position = _bytes(stored, "stored")
        cdef Py_buffer view
        self._check_free()
        if position % DB_BLOCK_BYTES:
            raise AlignmentError(f"stored must be a multiple of {DB_BLOCK_BYTES}, got {stored}")
        _export(chunk, &view, PyBUF_SIMPLE, "chunk")
        try:
            if <uint64_t>view.len != position % self.chunk_bytes:
                raise ValueError(
                    f"chunk must hold the {position % self.chunk_bytes} stored bytes of the "
                    f"chunk that byte {position} is in, got {view.len}"
                )
            self._check_free()
            self.version += 1
            db_tail_reset(self.tail, position, view.buf)
        finally:
            PyBuffer_Release(&view)

    def append(self, data, copy=None):
        """Takes data in; says what is to be written now. Offsets are relative to the run.

        A request's memory is the caller's own or the tail's; write the requests and wait before
        the next append() or reset(), which raise RuntimeError while that write is in flight. With
        `copy`, memory of the same length, data is copied there and requests are of the copy."""
        cdef Py_buffer view
        _export(data, &view, PyBUF_SIMPLE, "data")
        try:
            return self._append(&view, data if copy is None else copy, copy is not None)
        finally:
            PyBuffer_Release(&view)

    cdef object _append(self, Py_buffer *data, object kept, bint is_copied):
        cdef _Span body = _Span.__new__(_Span)
        cdef _Head head
        cdef db_tail_write out
        cdef uint64_t length = data.len
        _export(kept, &body.owner, PyBUF_WRITABLE if is_copied else PyBUF_SIMPLE, "copy")
        if body.owner.len != data.len:
            raise ValueError(f"copy must hold the {data.len} bytes of data, got {body.owner.len}")
        cdef void *copy = body.owner.buf if is_copied else NULL
        digests = np.empty(length // self.chunk_bytes + 2 if self.chunk_bytes else 2, np.uint64)
        cdef uint64_t *digests_at = <uint64_t *><uintptr_t>digests.ctypes.data
        self._check_free()
        self.version += 1
        if length > NOGIL_BYTES:
            self.busy = True
            with nogil:
                db_tail_append(self.tail, data.buf, length, copy, &out, digests_at)
            self.busy = False
        else:
            db_tail_append(self.tail, data.buf, length, copy, &out, digests_at)
        requests = []
        if out.head != NULL:
            head = _Head.__new__(_Head)
            head.tail = self
            head.memory = out.head
            head.version = self.version
            requests.append((out.head_offset, head))
        if out.body_bytes:
            body.start = out.body_start
            body.length = out.body_bytes
            requests.append((out.body_offset, body))
        return TailWrite(requests, out.first_chunk, digests[:out.digest_count])

    def block(self):
        """The bytes held back, padded with zeros to a block: a copy."""
        self._check_idle()
        cdef const char *memory = <const char *>db_tail_block(self.tail)
        return memoryview(PyBytes_FromStringAndSize(memory, DB_BLOCK_BYTES))

    def __dealloc__(self):
        if self.tail != NULL:
            db_tail_close(self.tail)
