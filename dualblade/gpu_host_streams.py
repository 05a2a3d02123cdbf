"""The host stand-in's streams: of copies and functions beside the caller, and the caller's own."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from dualblade.errors import ClosedError
from dualblade.gpu_arena import count_closed, count_opened
from dualblade.gpu_schedule import (
    End,
    HostEvent,
    Operation,
    Record,
    Schedule,
    Wait,
    Work,
    is_worker,
)

Array = np.ndarray[Any, Any]


class CurrentStreams(threading.local):
    """Which stream is current in each thread."""

    def __init__(self) -> None:
        self._stack: list[HostStream | CallingThread] = []

    def push(self, stream: HostStream | CallingThread) -> None:
        """`with stream:` begins."""
        self._stack.append(stream)

    def pop(self) -> None:
        """It ends."""
        self._stack.pop()

    def top(self) -> HostStream | CallingThread | None:
        """The innermost `with stream:` of this thread."""
        return self._stack[-1] if self._stack else None


class HostStream:
    """Copies and functions that run in the order in which they were put here, beside the caller.

    `with stream:` makes it the thread's current one. All methods may be called from any thread.
    After an operation has failed, what follows it here is left out, and every event recorded raises
    the error, until one has raised it to somebody: what is put here after that runs again.
    """

    def __init__(self, schedule: Schedule, current: CurrentStreams) -> None:
        self._schedule = schedule
        self._current = current
        self._is_closed = False
        self._line = schedule.line()
        count_opened("gpu_streams", self)

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._is_closed

    def copy_to_device(self, dst: Array, src: Array) -> None:
        """Copies the bytes of `src` (host) to `dst` (device): flat uint8 of the same size.

        Both are kept alive until it is done, and have to be left alone until then. Raises
        ValueError, TypeError, ClosedError.
        """
        check_copy(dst, src)
        self._submit(self._schedule.copy("to_device", dst, src))

    def copy_to_host(self, dst: Array, src: Array) -> None:
        """Copies the bytes of `src` (device) to `dst` (host), as copy_to_device does."""
        check_copy(dst, src)
        self._submit(self._schedule.copy("to_host", dst, src))

    def record(self) -> HostEvent:
        """An event that is done when everything put here so far is."""
        event = HostEvent(self._schedule)
        self._submit(Record(event))
        return event

    def wait(self, event: HostEvent) -> None:
        """What is put here from now on runs after the event. Returns at once."""
        check_event(event, self._schedule)
        self._submit(Wait(event))

    def launch(self, fn: Callable[[], object]) -> None:
        """Runs fn() in the stream's own thread, in its turn: what a kernel is on a GPU."""
        self._submit(Work(self._line.worker, fn))

    def _submit(self, operation: Operation) -> None:
        self._schedule.check_process()
        with self._schedule.lock:
            if self._is_closed:
                raise ClosedError("this stream was closed; open another with device.stream()")
            self._schedule.submit(self._line, operation)

    def close(self) -> None:
        """Finishes what is under way, then ends; twice is fine.

        From a function that a stream runs it returns at once, and the stream ends after that.
        """
        if not self._schedule.is_forked:
            with self._schedule.lock:
                self._begin_end()
            if not is_worker():
                self._schedule.join(self._line)
        self._is_closed = True
        count_closed("gpu_streams", self)

    def _begin_end(self) -> None:
        if not self._is_closed:
            # In this order: an interrupt in between has a line ended twice, not never.
            self._schedule.submit(self._line, End())
            self._is_closed = True

    def __enter__(self) -> HostStream:
        self._current.push(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._current.pop()

    def __del__(self) -> None:
        if getattr(self, "_is_closed", True):
            return
        count_closed("gpu_streams", self)
        if not self._schedule.is_forked:
            with self._schedule.lock:
                self._begin_end()
        warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)


class CallingThread:
    """The stream of whoever calls: each operation is done when its call returns."""

    closed = False

    def __init__(self, schedule: Schedule, current: CurrentStreams) -> None:
        self._schedule = schedule
        self._current = current

    def copy_to_device(self, dst: Array, src: Array) -> None:
        """As HostStream.copy_to_device; returns when it is done."""
        self._copy(HostStream.copy_to_device, dst, src)

    def copy_to_host(self, dst: Array, src: Array) -> None:
        """As HostStream.copy_to_host; returns when it is done."""
        self._copy(HostStream.copy_to_host, dst, src)

    def _copy(self, copy: Callable[..., None], dst: Array, src: Array) -> None:
        stream = HostStream(self._schedule, self._current)
        try:
            copy(stream, dst, src)
            stream.record().wait()
        finally:
            stream.close()

    def record(self) -> HostEvent:
        """An event that is done."""
        event = HostEvent(self._schedule)
        event.finish(time.monotonic(), None)
        return event

    def wait(self, event: HostEvent) -> None:
        """Blocks until the event is done. Raises what the event does."""
        check_event(event, self._schedule)
        event.wait()

    def launch(self, fn: Callable[[], object]) -> None:
        """Calls fn()."""
        fn()

    def close(self) -> None:
        """Nothing: a thread's own stream is always there."""

    def __enter__(self) -> CallingThread:
        self._current.push(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._current.pop()


def check_copy(dst: Array, src: Array) -> None:
    """Raises TypeError or ValueError if these can't be copied as they are."""
    for name, array in (("dst", dst), ("src", src)):
        if type(array) is not np.ndarray or array.dtype != np.uint8 or array.ndim != 1:
            raise TypeError(
                f"{name} of a copy is a flat numpy array of uint8; device.bytes_of(array) makes "
                f"one of an array of the device, and this is {type(array).__name__}"
            )
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} of a copy is not contiguous")
    if dst.nbytes != src.nbytes:
        raise ValueError(f"a copy of {src.nbytes} bytes to {dst.nbytes}: the sizes differ")
    if not dst.flags.writeable:
        raise ValueError("dst of a copy is read-only")


def check_event(event: object, schedule: Schedule) -> None:
    """Raises TypeError if it is no event of this device."""
    if not isinstance(event, HostEvent) or event.schedule is not schedule:
        raise TypeError(
            f"this {type(event).__name__} is no event of this device; wait for it with event.wait()"
        )
