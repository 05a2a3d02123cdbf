# Completion: one submitted batch, and the buffers that it holds; included by _core.pyx.

cdef enum:
    NEW = 0        # nothing was handed to C
    IN_FLIGHT = 1  # C may touch the batch and its buffers; the device has a pin for it
    FINISHED = 2   # C has let go of them


# no_gc: a Completion refers to its Device alone, which refers to nothing that could refer back, so
# there is no cycle to collect, and __dealloc__ can rely on the Device being there.
@cython.final
@cython.no_gc
cdef class Completion:
    """One submitted batch. It holds every buffer of the batch until the last byte has moved."""

    cdef Device device
    cdef db_batch batch
    cdef Py_buffer *views
    cdef Py_ssize_t view_count
    cdef int state
    # borrowed: the device's list of batches in flight; left before the last reference goes
    cdef void *previous
    cdef void *next
    # of the first request that failed
    cdef int error
    cdef unsigned short nvme_status
    cdef uint64_t error_offset
    cdef uint64_t run_offset
    cdef uint64_t run_length

    def __init__(self):
        raise TypeError("a Completion comes from Device.read() or Device.write()")

    def wait(self, timeout=None):
        """Returns when every byte has moved. Raises what went wrong, or TimeoutError.

        timeout is in seconds; None waits for as long as it takes. After a TimeoutError or a
        KeyboardInterrupt the batch is still in flight and can be waited for again. Waiting for
        a finished batch gives its result again."""
        cdef double seconds = -1
        if timeout is not None:
            seconds = timeout
            if math.isnan(seconds):
                raise ValueError("timeout must be a number of seconds, got nan")
            seconds = max(seconds, 0.0)
        if not self._drive(seconds):
            raise TimeoutError(
                f"I/O on {self.device.info.target} is still in flight after {timeout} s; "
                "its buffers stay in use: wait again"
            )
        if self.error == EBADMSG:
            target, offset = self.device.info.place(self.error_offset)
            corruption = CorruptionError(
                f"checksum mismatch in the chunk at byte {offset} of {target} "
                f"(read of {self.run_length} bytes at {self.run_offset}): what the device holds "
                "is not what was written"
            )
            corruption.offset = self.error_offset
            raise corruption
        if self.error:
            target, offset = self.device.info.place(self.error_offset)
            operation = "write" if self.batch.direction == DB_WRITE else "read"
            raise _device_error(self.error, self.nvme_status, target, operation, offset,
                                self.run_length)

    def done(self):
        """Whether every byte has moved, or what went wrong is known. Never blocks."""
        return bool(self._drive(0))

    cdef int _drive(self, double seconds) except -1:
        """Moves the batch along, for ever if seconds is negative; 1 when it is finished."""
        cdef double deadline = time.monotonic() + seconds if seconds > 0 else 0
        cdef double left = seconds
        cdef int64_t slice_ns
        cdef int rc
        while self.state == IN_FLIGHT:
            self.device._check_fork()
            slice_ns = SIGNAL_SLICE_NS
            if 0 <= left < 0.1:
                slice_ns = <int64_t>(left * 1e9)
            self.device.pins += 1
            with nogil:
                rc = db_batch_wait(&self.batch, slice_ns)
            self.device._unpin()
            if rc == 0:
                self._finish()
            elif rc == -ETIMEDOUT or rc == -EINTR:
                PyErr_CheckSignals()
                if seconds >= 0:
                    left = deadline - time.monotonic() if seconds > 0 else 0
                    if left <= 0:
                        return self.state != IN_FLIGHT
            else:
                raise device_error(-rc, device=self.device.info.target, operation="wait for I/O")
        return 1

    cdef void _finish(self) noexcept:
        """C is done with the batch: keeps its result, gives its buffers and its pin back."""
        cdef uint32_t i
        cdef db_io *io
        if self.state != IN_FLIGHT:
            return
        self.state = FINISHED
        for i in range(self.batch.io_count):
            io = &self.batch.ios[i]
            if io.error:
                self.error = -io.error
                self.nvme_status = io.nvme_status
                self.error_offset = io.error_offset
                self.run_offset = io.offset
                self.run_length = io.length
                break
        self.device._unlink(self)
        self.device._unpin()
        self._release_views()

    cdef void _release_views(self) noexcept:
        """Safe to enter twice: what a released object runs may lead back here."""
        while self.view_count > 0:
            self.view_count -= 1
            PyBuffer_Release(&self.views[self.view_count])

    cdef int _prepare(self, list requests, object checksums) except -1:
        cdef Py_ssize_t count = len(requests)
        cdef Py_ssize_t i
        cdef list each = None
        cdef db_io *io
        if count > 0x7FFFFFFF:
            raise ValueError(f"a batch of {count} requests is too large")
        if isinstance(checksums, (list, tuple)):
            each = list(checksums)
            if len(each) != count:
                raise ValueError(f"{len(each)} checksums for {count} requests: "
                                 "give one array or None for each")
        self.batch.ios = <db_io *>calloc(count + 1, sizeof(db_io))
        self.views = <Py_buffer *>calloc(2 * count + 1, sizeof(Py_buffer))
        if self.batch.ios == NULL or self.views == NULL:
            raise MemoryError()
        for i in range(count):
            io = self._prepare_one(i, requests[i])
            if each is not None and each[i] is not None and io.length:
                io.checksums = self._checksums(i, each[i], self._chunks(io))
            if io.length:
                self.batch.io_count += 1
        if checksums is not None and each is None:
            self._share_checksums(checksums)
        return 0

    cdef db_io *_prepare_one(self, Py_ssize_t i, object request) except NULL:
        """Fills in the next io, which counts only if it has a length."""
        if not isinstance(request, (tuple, list)) or len(request) != 2:
            raise TypeError(f"request {i} must be a pair (offset, buffer), got {request!r}")
        cdef int64_t offset = _bytes(request[0], "offset of request", i)
        cdef bint reads = self.batch.direction == DB_READ
        cdef Py_buffer *view = &self.views[self.view_count]
        cdef db_io *io = &self.batch.ios[self.batch.io_count]
        _export(request[1], view, PyBUF_WRITABLE if reads else PyBUF_SIMPLE, "buffer of request", i)
        self.view_count += 1
        if view.len and self.batch.path == DB_PATH_DIRECT and offset % DB_BLOCK_BYTES:
            raise AlignmentError(
                f"offset {offset} of request {i} is not a multiple of {DB_BLOCK_BYTES}: "
                'align it, or use path="pagecache"'
            )
        io.offset = offset
        io.buffer = view.buf
        io.length = view.len
        return io

    cdef uint64_t _chunks(self, const db_io *io) noexcept:
        return (io.length + self.device.chunk_bytes - 1) // self.device.chunk_bytes

    cdef int _share_checksums(self, object checksums) except -1:
        """Gives each io its part of one array."""
        cdef uint32_t i
        cdef uint64_t count = 0
        for i in range(self.batch.io_count):
            count += self._chunks(&self.batch.ios[i])
        if count == 0:
            return 0  # nothing has a length, and what has none may lie anywhere
        cdef uint64_t *part = self._checksums(-1, checksums, count)
        for i in range(self.batch.io_count):
            self.batch.ios[i].checksums = part
            part += self._chunks(&self.batch.ios[i])
        return 0

    cdef uint64_t *_checksums(self, Py_ssize_t i, object array, uint64_t count) except NULL:
        """The memory of an array of so many checksums, of request i or with -1 of all."""
        cdef Py_buffer *view = &self.views[self.view_count]
        cdef bint filled_in = self.batch.direction == DB_WRITE
        cdef str name = "checksums" if i < 0 else "checksums of request"
        _export(array, view, PyBUF_FORMAT | (PyBUF_WRITABLE if filled_in else PyBUF_SIMPLE),
                name, i)
        self.view_count += 1
        cdef bint words = view.format != NULL and view.itemsize == 8 and (
            not strcmp(view.format, b"L") or not strcmp(view.format, b"Q"))
        cdef bint octets = view.format != NULL and i < 0 and not strcmp(view.format, b"B")
        if not (words or octets) or <uintptr_t>view.buf % 8:
            raise ValueError(f"{_named(name, i)} must be an array of uint64")
        if <uint64_t>view.len != count * 8:
            raise ValueError(
                f"{_named(name, i)}: {view.len // 8} given, but the bytes in chunks of "
                f"{self.device.chunk_bytes} have {count}"
            )
        return <uint64_t *>view.buf

    def __dealloc__(self):
        cdef int rc = 0
        if self.state == IN_FLIGHT and not self.device._forked():
            # Off the list first: with the GIL free nobody may find an object that is going.
            self.device._unlink(self)
            with nogil:
                rc = db_batch_wait(&self.batch, -1)
            if rc != 0:
                # The kernel may still write into this memory: leaking it is the lesser evil.
                self.device.lost = True
                return
            self.state = FINISHED
            self.device._unpin()
        self._release_views()
        free(self.views)
        free(self.batch.ios)
