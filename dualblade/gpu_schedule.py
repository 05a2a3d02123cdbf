"""How the host stand-in runs streams: queues of operations, threads in place of a GPU's engines.

A line is what a stream is made of: a queue of operations that run one after the other. A copy is
done by the copy engine of its direction, one thread for all lines of a device; a launched function
by its line's own thread. No thread waits for another operation: whoever finishes one sends the next
on its way, so that an operation costs one hand-over.

Signal handlers may raise at any bytecode of the main thread. Each step here can be taken again, and
who waits does so in SimpleQueue.get, which is one call: a Condition or an Event that is interrupted
amid its own bookkeeping may stay locked.

With a bandwidth, a copy ends when it would on a bus of that speed: each operation has a time at
which it would have begun and ended, and the threads sleep until then. That a sleep lasts longer
than it should delays one copy and not those behind it, so that the rate is exact over many.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from dualblade.errors import ClosedError

Array = np.ndarray[Any, Any]


class HostEvent:
    """A point in a stream: done when everything before it is."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.error: BaseException | None = None
        """What went wrong before it, once it is done."""
        self.at = 0.0
        """When it was done, in seconds of time.monotonic()."""
        self.waiters: dict[Line, None] = {}
        """Lines that go on after it."""
        self._is_done = False
        self._sleepers: list[SimpleQueue[None]] = []

    @property
    def done(self) -> bool:
        """Whether everything before it has ended, well or not. Never blocks."""
        return self._is_done

    def wait(self, timeout: float | None = None) -> None:
        """Returns when everything before it is done; the GIL is free meanwhile.

        Raises TimeoutError, and what an operation before it has raised.
        """
        if not self._is_done:
            self.schedule.check_process()
            sleeper: SimpleQueue[None] = SimpleQueue()
            with self.schedule.lock:
                self._sleepers.append(sleeper)
                self.schedule.advance_all()  # an interrupt may have cut short who did
            self._sleep(sleeper, timeout)
        if self.error is not None:
            self.schedule.reported(self.error)
            raise self.error

    def _sleep(self, sleeper: SimpleQueue[None], timeout: float | None) -> None:
        if self._is_done:
            return
        try:
            sleeper.get(timeout=None if timeout is None else max(0.0, timeout))
        except Empty:
            raise TimeoutError(
                f"the stream had not come to this event after {timeout} seconds"
            ) from None

    def finish(self, at: float, error: BaseException | None) -> None:
        """It is done. With the schedule's lock held; twice does no harm."""
        if not self._is_done:
            self.at, self.error = at, error
            self._is_done = True
        for sleeper in self._sleepers:
            sleeper.put(None)


class Line:
    """A stream's queue, and what became of it. All with the schedule's lock held."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.queue: deque[Operation] = deque()
        self.worker = Worker(schedule, "dualblade-stream", lambda: self.has_ended)
        self.at = 0.0
        """When its last operation ended."""
        self.has_ended = False
        self.generation = 0
        """Of operations that are put here now. Those of a generation that failed, or an earlier
        one, come after the error; those of a later one were put here when it was known."""
        self._failed_generation = -1
        self._error: BaseException | None = None

    @property
    def head(self) -> Operation | None:
        """The operation whose turn it is."""
        return self.queue[0] if self.queue else None

    def drop(self, operation: Operation) -> None:
        """It has ended."""
        if self.head is operation:
            self.queue.popleft()

    def fail(self, error: BaseException, generation: int) -> None:
        """What follows, of this generation or an earlier one, comes after the error."""
        self._error, self._failed_generation = error, generation

    def error_before(self, operation: Operation) -> BaseException | None:
        """What went wrong before it."""
        return self._error if operation.generation <= self._failed_generation else None

    def forgive(self, error: BaseException) -> None:
        """What is put here from now on has nothing to do with the error."""
        if self._error is error and self.generation == self._failed_generation:
            self.generation += 1


# ---- operations ----------------------------------------------------------------------------------


class Operation(ABC):
    """One entry of a line's queue."""

    __slots__ = ("enqueued_at", "generation", "is_taken")
    enqueued_at: float
    generation: int

    def __init__(self) -> None:
        self.is_taken = False  # by a worker, which alone ends it

    @abstractmethod
    def step(self, line: Line, at: float) -> float | None:
        """Does it, or has it done: returns when it ended, or None where it has not yet.

        `at` is when its turn came. May be called again.
        """


class Work(Operation):
    """What a thread has to do; left out after an error."""

    __slots__ = ("_work", "duration_s", "worker")

    def __init__(
        self, worker: Worker, work: Callable[[], object], duration_s: float | None = None
    ) -> None:
        """`duration_s` is what it should take; None is as long as it does."""
        super().__init__()
        self.worker = worker
        self.duration_s = duration_s
        self._work = work

    def step(self, line: Line, at: float) -> float | None:
        """As Operation says."""
        if line.error_before(self) is not None:
            return at
        self.worker.give(line, at)
        return None

    def run(self) -> BaseException | None:
        """In the worker's thread, once. Returns what was raised."""
        # What it holds goes before anybody hears that it is done.
        work, self._work = self._work, _nothing
        try:
            work()
        except BaseException as error:  # noqa: BLE001, an event raises it to whoever waits
            # Without this frame, which holds the arrays.
            return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        return None


def _nothing() -> None:
    """Work that was done."""


class Record(Operation):
    """Everything before it is done: so is the event."""

    __slots__ = ("event",)

    def __init__(self, event: HostEvent) -> None:
        super().__init__()
        self.event = event

    def step(self, line: Line, at: float) -> float | None:
        """As Operation says."""
        self.event.finish(at, line.error_before(self))
        return at


class Wait(Operation):
    """Nothing after it begins before the event."""

    __slots__ = ("event",)

    def __init__(self, event: HostEvent) -> None:
        super().__init__()
        self.event = event

    def step(self, line: Line, at: float) -> float | None:
        """As Operation says."""
        if not self.event.done:
            self.event.waiters[line] = None
            return None
        if self.event.error is not None and line.error_before(self) is None:
            line.fail(self.event.error, self.generation)
        return max(at, self.event.at)


class End(Operation):
    """The last one of a line."""

    __slots__ = ()

    def step(self, line: Line, at: float) -> float | None:
        """As Operation says."""
        line.schedule.end(line)
        return at


# ---- threads -------------------------------------------------------------------------------------


class _ThisThread(threading.local):
    is_worker = False


_this_thread = _ThisThread()


def is_worker() -> bool:
    """Whether this thread does the work of a line: it can't wait for a line's end."""
    return _this_thread.is_worker


class Worker:
    """A thread that does the work at the head of the lines it is given, in that order.

    It starts with the first and ends when `is_over` says so and nothing is left.
    """

    def __init__(self, schedule: Schedule, name: str, is_over: Callable[[], bool]) -> None:
        self._schedule = schedule
        self._name = name
        self._is_over = is_over
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._given: dict[Line, float] = {}
        self._thread: threading.Thread | None = None
        self._free_at = 0.0

    def give(self, line: Line, at: float) -> None:
        """The work at the head of the line is due at `at`. With the lock held."""
        self._given[line] = at
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread
        self._bell.put(None)

    def look(self) -> None:
        """Has the thread look whether it is over."""
        self._bell.put(None)

    def join(self) -> None:
        """Returns when the thread has ended, or is wanted again. Not for workers."""
        thread = self._thread
        if thread is not None:
            self._schedule.wait_until(lambda: self._thread is not thread or not self._is_over())
            if self._thread is not thread:
                thread.join()

    def _take(self) -> tuple[Line, Work, float] | None:
        """The next work, when there is some; None when it is over."""
        while True:
            with self._schedule.lock:
                if self._thread is None:  # an interrupt came between its start and the note of it
                    self._thread = threading.current_thread()
                if self._thread is not threading.current_thread():
                    return None
                while self._given:
                    line = next(iter(self._given))
                    at = self._given.pop(line)
                    work = line.head
                    # An interrupt may have had a line given twice.
                    if isinstance(work, Work) and work.worker is self and not work.is_taken:
                        work.is_taken = True
                        return line, work, at
                if self._is_over():
                    self._thread = None
                    self._schedule.wake()
                    return None
            self._bell.get()

    def _run(self) -> None:
        _this_thread.is_worker = True
        while (taken := self._take()) is not None:
            line, work, at = taken
            started_at = max(at, self._free_at)
            error = work.run()
            ended_at = time.monotonic()
            if work.duration_s is not None:
                due = started_at + work.duration_s
                if due > ended_at:
                    time.sleep(due - ended_at)
                ended_at = due
            self._free_at = ended_at
            self._schedule.finished(line, work, ended_at, error)
            del error  # its traceback would keep alive what the function had, until the next


class Schedule:
    """The lines of one device, their lock, and its two copy engines."""

    def __init__(
        self,
        copy_bytes_per_s: float | None,
        before_copy: Callable[[str, int], object] | None,
    ) -> None:
        # Reentrant: a signal handler may come while the main thread holds it.
        self.lock = threading.RLock()
        self._copy_bytes_per_s = copy_bytes_per_s
        self._before_copy = before_copy
        self._lines: dict[Line, None] = {}
        self._sleepers: dict[SimpleQueue[None], None] = {}
        self._pid = os.getpid()
        self._engines = {
            direction: Worker(self, f"dualblade-copy-{direction}", lambda: not self._lines)
            for direction in ("to_device", "to_host")
        }

    @property
    def is_forked(self) -> bool:
        """Whether this is the child of a fork, which has none of the threads."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raises ClosedError in the child of a fork."""
        if self.is_forked:
            raise ClosedError(
                "this device was opened before a fork, and this is the child process; open it "
                "again here"
            )

    def line(self) -> Line:
        """A new line. To be ended."""
        self.check_process()
        line = Line(self)
        with self.lock:
            self._lines[line] = None
        return line

    def copy(self, direction: str, dst: Array, src: Array) -> Work:
        """The operation of a copy in this direction: "to_device" or "to_host"."""
        size = dst.nbytes

        def copy() -> None:
            if self._before_copy is not None:
                self._before_copy(direction, size)
            np.copyto(dst, src)  # without the GIL

        bandwidth = self._copy_bytes_per_s
        duration_s = None if bandwidth is None else size / bandwidth
        return Work(self._engines[direction], copy, duration_s)

    def submit(self, line: Line, operation: Operation) -> None:
        """Puts it at the end of a line. With the lock held."""
        operation.enqueued_at = time.monotonic()
        operation.generation = line.generation
        line.queue.append(operation)
        self.advance(line)

    def advance(self, line: Line) -> None:
        """Does what can be done now of a line, and of those that waited for it.

        With the lock held. An interrupt in here loses nothing: each step can be taken again.
        """
        ready = [line]
        while ready:
            line = ready[-1]
            operation = line.head
            if operation is None or operation.is_taken:
                ready.pop()
                continue
            ended_at = operation.step(line, max(operation.enqueued_at, line.at))
            if ended_at is None:
                ready.pop()
                continue
            line.at = ended_at
            if isinstance(operation, Record):
                ready[:0] = operation.event.waiters
            line.drop(operation)

    def advance_all(self) -> None:
        """The same of all lines. With the lock held."""
        for line in list(self._lines):
            self.advance(line)

    def finished(self, line: Line, work: Work, at: float, error: BaseException | None) -> None:
        """A worker has done what it took."""
        with self.lock:
            line.at = at
            if error is not None:
                line.fail(error, work.generation)
            line.drop(work)
            self.advance(line)

    def reported(self, error: BaseException) -> None:
        """Somebody was told of it: what is put into lines from now on comes after it."""
        with self.lock:
            for line in self._lines:
                line.forgive(error)

    def end(self, line: Line) -> None:
        """A line has come to its end. With the lock held; twice does no harm."""
        line.has_ended = True
        self._lines.pop(line, None)
        for worker in (*self._engines.values(), line.worker):
            worker.look()
        self.wake()

    def wake(self) -> None:
        """A line or a thread has ended. With the lock held."""
        for sleeper in self._sleepers:
            sleeper.put(None)

    def wait_until(self, is_true: Callable[[], bool]) -> None:
        """Returns when it is; looked at when a line or a thread has ended."""
        sleeper: SimpleQueue[None] = SimpleQueue()
        try:
            with self.lock:
                self._sleepers[sleeper] = None
            while not is_true():
                sleeper.get()
        finally:
            with self.lock:
                self._sleepers.pop(sleeper, None)

    def join(self, line: Line) -> None:
        """Returns when the line and its thread have ended, the engines too if it was the last."""
        with self.lock:
            self.advance(line)
        self.wait_until(lambda: line.has_ended)
        for worker in (line.worker, *self._engines.values()):
            worker.join()
