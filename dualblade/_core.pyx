# cython: language_level=3, embedsignature=True
"""The C core as Python sees it: bytes, offsets and checksums; no tensors and no policy.

It converts arguments, owns lifetimes and releases the GIL; everything else is in csrc/.

Lifetimes, and why closing is safe. Every field here is read and written with the GIL held.
A Device counts its *pins*: threads inside a C call on it, and batches in flight. The C device is
freed by close() only at zero pins, or by __dealloc__, when no Completion is left to refer to it.
A Completion owns all that its batch points to (the db_batch, its db_io array, the exported buffers)
and gives the buffers and its pin back in one place, _finish(), which runs once, after C has said
that the batch is done. So an interrupt or a timeout in wait() releases nothing, many threads can
wait for one batch, and a Completion that nobody waited for waits for itself in __dealloc__.
close() turns new work away, then finishes what is in flight itself: a Completion keeps its result
and never touches the device again.

In the child after a fork nothing is in flight, and the locks of C may be held by threads that do
not exist: every call there raises ClosedError, and memory is freed without waiting.
"""

cimport cython
from cpython.buffer cimport (
    Py_buffer,
    PyBUF_FORMAT,
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_FillInfo,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsLongLongAndOverflow
from cpython.number cimport PyNumber_Index
from libc.errno cimport (
    EACCES,
    EAGAIN,
    EBADF,
    EBADMSG,
    EBUSY,
    ECHILD,
    EEXIST,
    EFAULT,
    EINTR,
    EINVAL,
    ENODEV,
    ENOENT,
    ENOMEM,
    ENOSPC,
    ENOSYS,
    ENOTBLK,
    EOPNOTSUPP,
    EPERM,
    ETIMEDOUT,
)
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport strcmp
from posix.unistd cimport getpid, pid_t

from dualblade.csrc cimport *

import math
import operator
import os
import stat
import time
from typing import NamedTuple

import numpy as np

from dualblade.errors import (
    AlignmentError,
    ClosedError,
    CorruptionError,
    NoSpaceError,
    UnsupportedError,
    device_error,
    nvme_error,
)


cdef extern from "<errno.h>":
    enum:
        EMEDIUMTYPE
        ENOTUNIQ
        EREMOTEIO
        ESTALE

cdef extern from "Python.h":
    int PyErr_ResourceWarning(object source, Py_ssize_t level, const char *fmt, ...) except -1


BLOCK_BYTES = DB_BLOCK_BYTES

_ENGINES = {
    "auto": DB_ENGINE_AUTO,
    "nvme": DB_ENGINE_NVME,
    "uring": DB_ENGINE_URING,
    "aio": DB_ENGINE_AIO,
    "threads": DB_ENGINE_THREADS,
}

cdef enum:
    # How long a wait stays in C before Python gets to run signal handlers.
    SIGNAL_SLICE_NS = 100_000_000
    # Releasing the GIL costs more than it gives below this many bytes of checksum or copy.
    NOGIL_BYTES = 65536

cdef enum range_call:
    DISCARD
    WRITE_BACK
    WRITE_BACK_AND_WAIT
    DROP_CACHED


include "_core_arguments.pxi"
include "_core_completion.pxi"


# ---- device --------------------------------------------------------------------------------------

class DeviceInfo(NamedTuple):
    """What a device is: sizes in bytes, and what reaches it.

    Of a device striped over several members, target names all of them, and what is said of blocks
    and limits suits each. stripe_bytes is 0 where there is but one."""

    target: str
    targets: tuple
    member_sizes: tuple
    stripe_bytes: int
    size: int
    lba_size: int
    physical_block_size: int
    memory_align: int
    max_transfer: int
    placement: bool  # write(tail=True) makes a difference on the drive
    block_device: bool
    direct: bool
    discard: bool
    engine: str
    pagecache_engine: str
    queue_depth: int
    chunk_bytes: int
    engines_refused: dict

    def place(self, offset):
        """Where a byte of the device lies: (the member's target, the offset there)."""
        if not self.stripe_bytes:
            return self.target, offset
        unit, inside = divmod(offset, self.stripe_bytes)
        row, member = divmod(unit, len(self.targets))
        return self.targets[member], row * self.stripe_bytes + inside


@cython.final
@cython.no_gc
cdef class Device:
    """A file or block device, or several striped, reached past the page cache ("direct") or
    through it."""

    cdef db_device *ptr
    cdef readonly object info
    cdef pid_t pid
    cdef uint32_t chunk_bytes
    cdef bint closing
    cdef bint lost  # a batch can never be waited for: the C device stays for as long as the process
    # See the top of this file. `changes` moves with every pin given back while somebody closes.
    cdef Py_ssize_t pins
    cdef void *live  # borrowed: the first Completion in flight
    cdef uint64_t changes
    cdef list registered  # memoryviews: the kernel has their pages
    cdef pthread_mutex_t lock
    cdef pthread_cond_t changed

    def __cinit__(self):
        self.registered = []
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.changed, NULL)

    def __init__(self):
        raise TypeError("use Device.open(target)")

    @staticmethod
    def open(target, engine="auto", queue_depth=256, *, threads=4, chunk_bytes=262144,
             request_bytes=None, staging_bytes=8388608, stripe_bytes=1048576,
             read_only=False, sqpoll=False, iopoll=False):
        """Opens a file or a block device and locks it against other processes.

        target is a path, or a list of paths: these are one device then, striped over them in this
        order. stripe_bytes, a power of two of at least chunk_bytes, is what lies side by side on
        one of them. queue_depth and threads are for each.

        engine is that of the direct path: "nvme" (commands to an NVMe namespace, for which
        either of its nodes may be given), "uring", "aio", "threads", or "auto" for the first of
        these that works here. queue_depth: requests in flight, 1 to 4096. threads: workers of
        the page-cache path, 1 to 64. chunk_bytes is what one checksum covers. request_bytes is
        where larger transfers are split, a multiple of chunk_bytes; None: at what is measured to
        be best for this device while it is used, from 256 KiB to 4 MiB (see stats()).
        staging_bytes: aligned memory for buffers that direct I/O cannot use in place.

        sqpoll: a kernel thread takes the requests, which costs no system call and up to a
        processor. iopoll: completions are polled for, which takes a processor while anything is
        in flight and saves the interrupt; only devices whose driver has queues for it can. Both
        are io_uring's, on the direct path, which "nvme" and "uring" use.

        Raises DeviceRefusedError if another process, a mount or the kernel holds it, ValueError
        for an option out of range, UnsupportedError for an engine or a way of polling that does
        not work here, DeviceError for what the system refuses."""
        cdef db_device_options options
        cdef Device device = Device.__new__(Device)
        if engine not in _ENGINES:
            raise ValueError(f"engine must be one of {', '.join(_ENGINES)}; got {engine!r}")
        options.engine = _ENGINES[engine]
        options.queue_depth = _option(queue_depth, "queue_depth", 1, 4096)
        options.threads = _option(threads, "threads", 1, 64)
        options.chunk_bytes = _option(chunk_bytes, "chunk_bytes", DB_BLOCK_BYTES, 1 << 30)
        options.request_bytes = 0
        if request_bytes is not None:
            options.request_bytes = _option(request_bytes, "request_bytes", DB_BLOCK_BYTES, 1 << 30)
        options.staging_bytes = _option(staging_bytes, "staging_bytes", 0, 1 << 40)
        options.stripe_bytes = _option(stripe_bytes, "stripe_bytes", 0, 1 << 40)
        options.read_only = bool(read_only)
        options.sqpoll = bool(sqpoll)
        options.iopoll = bool(iopoll)
        if (sqpoll or iopoll) and engine not in ("auto", "nvme", "uring"):
            raise ValueError(f"sqpoll and iopoll are io_uring's: engine {engine!r} has neither")
        if options.chunk_bytes & (options.chunk_bytes - 1):
            raise ValueError(f"chunk_bytes must be a power of two, got {chunk_bytes}")
        if options.request_bytes % options.chunk_bytes:
            raise ValueError(
                f"request_bytes must be a multiple of chunk_bytes ({chunk_bytes}), "
                f"got {request_bytes}"
            )
        if options.staging_bytes < options.chunk_bytes:
            raise ValueError(
                f"staging_bytes must hold one chunk of {chunk_bytes} bytes, "
                f"got {staging_bytes}"
            )
        paths = _paths(target)
        if len(paths) > 1 and (options.stripe_bytes & (options.stripe_bytes - 1)
                               or options.stripe_bytes < options.chunk_bytes):
            raise ValueError(f"stripe_bytes must be a power of two of at least chunk_bytes "
                             f"({chunk_bytes}), got {stripe_bytes}")
        device._open(paths, engine, &options)
        return device

    cdef int _open(self, list paths, str engine, const db_device_options *options) except -1:
        cdef const char *c_paths[DB_MEMBERS_MAX]
        cdef uint32_t count = len(paths)
        cdef uint32_t failed
        cdef db_device *opened = NULL
        cdef int rc
        cdef Py_ssize_t i
        targets = tuple([os.fsdecode(path) for path in paths])
        for i, path in enumerate(paths):
            c_paths[i] = <bytes>path
        with nogil:
            rc = db_device_open(c_paths, count, options, &failed, &opened)
        if rc:
            _raise_open_error(-rc, targets, failed, engine, options)
        self.pid = getpid()
        self.ptr = opened
        self.chunk_bytes = options.chunk_bytes
        cdef const db_geometry *geometry = db_device_geometry(opened)
        refused = {}
        for name, number in _ENGINES.items():
            rc = db_device_engine_refusal(opened, number)
            if rc:
                refused[name] = _refusal(name, -rc)
        self.info = DeviceInfo(
            target=", ".join(targets),
            targets=targets,
            member_sizes=tuple([db_device_member_geometry(opened, i).size_bytes
                                for i in range(count)]),
            stripe_bytes=options.stripe_bytes if count > 1 else 0,
            size=geometry.size_bytes,
            lba_size=geometry.lba_bytes,
            physical_block_size=geometry.physical_block_bytes,
            memory_align=geometry.memory_align_bytes,
            max_transfer=geometry.max_transfer_bytes,
            placement=bool(geometry.has_placement),
            block_device=bool(geometry.is_block_device),
            direct=bool(geometry.has_direct),
            discard=bool(geometry.can_discard),
            engine=db_device_engine_name(opened, DB_PATH_DIRECT).decode(),
            pagecache_engine=db_device_engine_name(opened, DB_PATH_PAGECACHE).decode(),
            queue_depth=options.queue_depth,
            chunk_bytes=options.chunk_bytes,
            engines_refused=refused,
        )
        return 0

    @property
    def closed(self):
        """True once close() was called, and in the child after a fork."""
        return self.ptr == NULL or self.closing or self._forked()

    def read(self, requests, *, path="direct", checksums=None, ahead=False):
        """Starts reading; requests are pairs (offset, writable memory).

        path "direct" needs offsets that are multiples of 4096; memory may lie anywhere and have
        any length. Zero-length requests are skipped.

        checksums are compared as the bytes arrive, one uint64 for each chunk_bytes of a request:
        a list with an array or None for each request, or one array, or bytes, with those of all
        requests one after another. Of a read with checksums the device gets a part at a time, so
        that it reads on while they are compared; ahead=True, for what nobody waits for yet, gives
        it all at once.

        Raises before anything is started: ValueError for ranges outside the device and memory
        that can't be used, AlignmentError, ClosedError. Completion.wait() raises the rest."""
        return self._start(DB_READ, requests, path, checksums, ahead, False)

    def write(self, requests, *, path="direct", checksums=None, tail=False):
        """Starts writing; requests are pairs (offset, memory).

        As read(), but: checksums are filled in by the time wait() returns, and on the direct path
        the last block of a request is padded with zeros. tail=True is for the ends of what grows,
        which drives with data placement (info.placement) keep apart from the rest."""
        return self._start(DB_WRITE, requests, path, checksums, False, tail)

    cdef Completion _start(self, db_direction direction, object requests, object path,
                           object checksums, bint ahead, bint tail):
        cdef Completion done = Completion.__new__(Completion)
        cdef int rc
        self._check_open()
        done.device = self
        done.batch.path = _path(path)
        done.batch.direction = direction
        done.batch.is_ahead = ahead
        done.batch.is_tail = tail
        done._prepare(list(requests), checksums)
        if done.batch.io_count == 0:
            done.state = FINISHED
            done._release_views()
            return done
        self._check_open()  # again: converting the arguments ran other people's code
        done.batch.device = self.ptr
        self.pins += 1
        with nogil:
            rc = db_batch_submit(&done.batch)
        if rc:
            self._unpin()
            self._raise_submit_error(-rc, done)
        done.state = IN_FLIGHT
        self._link(done)
        return done

    cdef int _raise_submit_error(self, int error, Completion done) except -1:
        cdef uint32_t i
        cdef db_io *io
        if error == ECHILD:
            self._raise_forked()
        if error == EBADF:
            raise device_error(error, device=self.info.target, operation="write")
        if error != EINVAL:
            raise device_error(
                error, device=self.info.target,
                operation="write" if done.batch.direction == DB_WRITE else "read",
            )
        size = self.info.size
        for i in range(done.batch.io_count):
            io = &done.batch.ios[i]
            start, end = io.offset, io.offset + io.length
            if end > size:
                raise ValueError(
                    f"bytes {start} to {end} are not all inside {self.info.target}, "
                    f"which has {size} bytes"
                )
        raise ValueError(f"{self.info.target} ({size} bytes) cannot take a batch with these "
                         "offsets and lengths")

    def register(self, buffers):
        """Registers memory for direct I/O: the kernel then need not look its pages up for each
        request. Any part of a registered buffer qualifies. Returns how many bytes are registered
        of these: less than all where the engine, the kernel or RLIMIT_MEMLOCK (`ulimit -l`)
        does not allow more, and then the rest works as before, a little slower.

        buffers are writable and contiguous; they are held until unregister() or close().
        Raises ValueError for memory that can't be used, and then none of these is registered."""
        cdef list views = [self._whole(memory, i) for i, memory in enumerate(buffers)]
        cdef uint64_t total = 0
        cdef int rc = 0
        for i, view in enumerate(views):
            rc = self._register_one(view, True)
            if rc == -EFAULT or rc == -EINVAL:
                self.unregister(views[:i])
                raise ValueError(f"buffer {i} is not memory that the kernel can write to")
            if rc:
                break  # ENOMEM, ENOSPC, EOPNOTSUPP: this much and no more
            self.registered.append(view)
            total += view.nbytes
        return total

    def unregister(self, buffers):
        """Takes back register(), given the same buffers. Those not registered are passed over."""
        for i, memory in enumerate(buffers):
            view = self._whole(memory, i)
            if self._register_one(view, False) == 0:
                for held in self.registered:
                    if _address(held) == _address(view) and held.nbytes == view.nbytes:
                        self.registered.remove(held)
                        break

    cdef object _whole(self, object memory, Py_ssize_t i):
        cdef Py_buffer view
        _export(memory, &view, PyBUF_WRITABLE, f"buffer {i}")
        PyBuffer_Release(&view)
        return memoryview(memory)

    cdef int _register_one(self, object memory, bint adds) except 1:
        cdef void *start = <void *><uintptr_t>_address(memory)
        cdef uint64_t length = memory.nbytes
        cdef int rc
        if length == 0:
            return -ENOENT
        self._pin()
        with nogil:
            if adds:
                rc = db_device_register(self.ptr, start, length)
            else:
                rc = db_device_unregister(self.ptr, start, length)
        self._unpin()
        return rc

    def flush(self):
        """Returns when what was written has reached the medium."""
        cdef db_failure failed
        cdef int rc
        self._pin()
        with nogil:
            rc = db_device_flush(self.ptr, &failed)
        self._unpin()
        if rc:
            raise _device_error(-rc, failed.nvme_status, self._member(failed.member), "flush")

    cdef object _member(self, uint32_t failed):
        """The name of the member that failed; of all, where it is none in particular."""
        targets = self.info.targets
        return targets[failed] if failed < len(targets) else self.info.target

    def discard(self, offset, length):
        """Tells the device that a range is no longer needed; it then reads as anything.

        Raises UnsupportedError where the device can't."""
        self._range_call(DISCARD, offset, length, "discard")

    def write_back(self, offset, length, wait=False):
        """Starts to write a range's dirty pages back, so that nobody has to wait for it later.

        Returns when the drive's queue has taken them; with wait=True when all are written, which
        is not yet safe from a power loss: flush() is. An error of an earlier write-back may come
        up here; flush() raises it all the same."""
        self._range_call(WRITE_BACK_AND_WAIT if wait else WRITE_BACK, offset, length,
                         "write back")

    def drop_cached(self, offset, length, failures=None):
        """Writes a range's dirty pages back and drops it from the page cache.

        `failures`: as write_back_failures() gave it when all that is cached there was known to be
        on the drive or dirty. If there have been others, DeviceError, and nothing is dropped."""
        self._range_call(DROP_CACHED, offset, length, "drop the cached pages of",
                         DB_ANY_FAILURES if failures is None else failures)

    def write_back_failures(self):
        """How often a write-back of this device has failed since it was opened.

        The kernel takes pages that it could not write for clean, and may drop them. What was
        written back between two calls that give the same number is on the drive; with another one
        what the page cache holds may be all there is. flush() tells no more of these failures."""
        cdef uint64_t failures
        cdef int rc
        self._pin()
        with nogil:
            rc = db_device_write_back_failures(self.ptr, &failures)
        self._unpin()
        if rc:
            raise device_error(-rc, device=self.info.target, operation="write back")
        return failures

    cdef int _range_call(self, range_call which, object offset, object length,
                         str operation, uint64_t failures=DB_ANY_FAILURES) except -1:
        cdef uint64_t start = _bytes(offset, "offset")
        cdef uint64_t size = _bytes(length, "length")
        cdef db_failure failed
        cdef int rc
        self._pin()
        with nogil:
            if which == DISCARD:
                rc = db_device_discard(self.ptr, start, size, &failed)
            elif which != DROP_CACHED:
                rc = db_device_write_back(self.ptr, start, size, which == WRITE_BACK_AND_WAIT,
                                          &failed)
            else:
                rc = db_device_drop_cached(self.ptr, start, size, failures, &failed)
        self._unpin()
        self._check_range(rc, start, size, operation, &failed)
        return 0

    def cached_bytes(self, offset, length):
        """Bytes of the range that the page cache holds, and of these the dirty ones: cache_state
        in short. The dirty ones are None before Linux 6.5."""
        state = self.cache_state(offset, length)
        if state.dirty_bytes is None:
            return state.resident_bytes, None
        return state.resident_bytes, state.dirty_bytes + state.writeback_bytes

    def cache_state(self, offset, length):
        """What the page cache holds of the range, in whole pages: a CacheState.

        Raises UnsupportedError where the kernel does not say."""
        cdef uint64_t start = _bytes(offset, "offset")
        cdef uint64_t size = _bytes(length, "length")
        cdef db_cached found
        cdef db_failure failed
        cdef int rc
        self._pin()
        with nogil:
            rc = db_device_cached(self.ptr, start, size, &found, &failed)
        self._unpin()
        self._check_range(rc, start, size, "count the cached pages of", &failed)
        return _cache_state(&found)

    def map(self, offset, length):
        """The page cache's own pages of a range, as read-only memory: a Mapping.

        What is written to the range afterwards shows in it. Until it is gone nobody else can open
        the device, even when this Device is closed. A page that the kernel dropped meanwhile is
        read again when it is looked at; if that fails, the process gets SIGBUS.
        Raises UnsupportedError where there are no mappings (striped devices, some filesystems),
        MemoryError, ValueError for a range outside the device."""
        cdef uint64_t start = _bytes(offset, "offset")
        cdef uint64_t size = _bytes(length, "length")
        cdef Mapping mapping = Mapping.__new__(Mapping)
        cdef db_failure failed = db_failure(0, 0)
        cdef int rc
        self._pin()
        with nogil:
            rc = db_device_map(self.ptr, start, size, &mapping.mapping, &mapping.memory)
        self._unpin()
        if rc == -ENOMEM or rc == -EAGAIN:
            raise MemoryError(f"cannot map {size} bytes of {self.info.target}: the process has too "
                              "many mappings (vm.max_map_count) or too much locked memory")
        if rc == -ENODEV:
            rc = -EOPNOTSUPP
        self._check_range(rc, start, size, "map", &failed)
        mapping.size = size
        return mapping

    cdef int _check_range(self, int rc, uint64_t offset, uint64_t length,
                          str operation, const db_failure *failed) except -1:
        if rc == 0:
            return 0
        target = self._member(failed.member)
        if rc == -EINVAL:
            raise ValueError(
                f"cannot {operation} {length} bytes at {offset}: {self.info.target} has "
                f"{self.info.size} bytes"
            )
        if rc == -ENOSYS or rc == -EOPNOTSUPP:
            raise UnsupportedError(
                f"cannot {operation} {target}: the kernel or the device does not "
                f"offer it ({os.strerror(-rc)})"
            )
        if self.info.stripe_bytes:  # the range is the device's, the error a member's
            raise _device_error(-rc, failed.nvme_status, target, operation)
        raise _device_error(-rc, failed.nvme_status, target, operation, offset, length)

    def stats(self):
        """Counters of each path: {"direct": {"reads": ...}, "pagecache": {...}}."""
        cdef db_path_stats found
        cdef db_path path
        self._check_open()
        result = {}
        for name in ("direct", "pagecache"):
            path = _path(name)
            db_device_stats(self.ptr, path, &found)
            result[name] = found
        return result

    def close(self):
        """Turns new work away, waits for what is in flight, closes. From any thread, any number
        of times; returns when the device is closed. After a fork, in the child: only frees."""
        cdef db_device *ptr
        cdef Completion done
        self.closing = True
        if not self._forked():
            # A close() in another thread may be about to free; its pin says when it has.
            while self.pins and not self.lost:
                if self.live != NULL:
                    done = <Completion>self.live
                    done._drive(-1)
                    done = None
                else:
                    self._wait_change()
        if self.ptr == NULL or self.lost:
            return
        ptr = self.ptr
        self.ptr = NULL
        self.pins += 1
        with nogil:
            db_device_close(ptr)
        self._unpin()
        self.registered.clear()

    def __enter__(self):
        self._check_open()
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        target = self.info.target if self.info is not None else "?"
        return f"<dualblade.Device {target!r}{' (closed)' if self.closed else ''}>"

    def __del__(self):
        # Nothing is in flight: every Completion in flight holds a reference to its Device.
        if self.ptr == NULL or self._forked():
            return
        try:
            PyErr_ResourceWarning(self, 1, b"unclosed %R: call close(), or use `with`",
                                  <void *>self)
        finally:
            self.close()

    def __dealloc__(self):
        cdef db_device *ptr = self.ptr
        self.ptr = NULL
        if ptr != NULL and not self.lost:
            with nogil:
                db_device_close(ptr)
        if not self._forked():
            pthread_cond_destroy(&self.changed)
            pthread_mutex_destroy(&self.lock)

    # -- pins, and the list of what is in flight --

    cdef bint _forked(self) noexcept:
        return self.pid != 0 and getpid() != self.pid

    cdef int _raise_forked(self) except -1:
        raise ClosedError(
            f"{self.info.target} was opened before a fork and belongs to the parent process: "
            "open it in the child"
        )

    cdef int _check_fork(self) except -1:
        if self._forked():
            self._raise_forked()
        return 0

    cdef int _check_open(self) except -1:
        self._check_fork()
        if self.ptr == NULL or self.closing:
            raise ClosedError(f"{self.info.target} is closed: open it again")
        return 0

    cdef int _pin(self) except -1:
        self._check_open()
        self.pins += 1
        return 0

    cdef void _unpin(self) noexcept:
        self.pins -= 1
        self._notify()

    cdef void _notify(self) noexcept:
        if self.closing:
            pthread_mutex_lock(&self.lock)
            self.changes += 1
            pthread_cond_broadcast(&self.changed)
            pthread_mutex_unlock(&self.lock)

    cdef int _wait_change(self) except -1:
        """Sleeps until a pin is given back or a batch appears; called with the GIL held, so that
        nothing changes between the caller's look at the pins and the first line here."""
        cdef uint64_t seen = self.changes
        cdef timespec until
        with nogil:
            clock_gettime(CLOCK_REALTIME, &until)
            until.tv_nsec += SIGNAL_SLICE_NS
            if until.tv_nsec >= 1000000000:
                until.tv_nsec -= 1000000000
                until.tv_sec += 1
            pthread_mutex_lock(&self.lock)
            if self.changes == seen:
                pthread_cond_timedwait(&self.changed, &self.lock, &until)
            pthread_mutex_unlock(&self.lock)
        PyErr_CheckSignals()
        return 0

    cdef void _link(self, Completion done) noexcept:
        done.next = self.live
        if self.live != NULL:
            (<Completion>self.live).previous = <void *>done
        self.live = <void *>done
        self._notify()

    cdef void _unlink(self, Completion done) noexcept:
        if done.previous != NULL:
            (<Completion>done.previous).next = done.next
        elif self.live == <void *>done:
            self.live = done.next
        if done.next != NULL:
            (<Completion>done.next).previous = done.previous
        done.previous = NULL
        done.next = NULL


include "_core_target.pxi"
include "_core_memory.pxi"
include "_core_cached.pxi"
include "_core_bracket.pxi"
include "_core_extents.pxi"
include "_core_tail.pxi"
include "_core_checksum.pxi"
