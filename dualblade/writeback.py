"""Dirty pages: written back early, so that writers never meet the kernel's own throttling, and what
freed extents have left in the page cache: dropped."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from dualblade import _core
from dualblade.errors import ClosedError, DualbladeError

DIRTY_MAX_BYTES = 512 << 20
"""Above this a writer waits: what is dirty can't be reclaimed, and has to be written before its
group can go direct. A drive writes so much in some tenths of a second, and the kernel's own
throttling begins at 15 % of the memory that is free."""
DIRTY_PART = 8
"""And above this part of the memory budget."""
DIRTY_LEAST_BYTES = 1 << 20
START_BYTES = 4 << 20
"""So much is written at once: less would be many small writes between a decoder's reads."""
START_AFTER_S = 1.0
"""Or what there is after so long, so that a group that goes direct has little left to write."""
BATCH_BYTES = 8 << 20
"""So much is started before a look at what else has been written."""
UNDER_WAY_BYTES = 32 << 20
"""At most so much is started and not waited for: a drive is busy with it, and reads that come
meanwhile do not wait behind more."""
NOTES_MAX = 256
"""So many notes may lie there before the thread is woken for them."""
BEHIND_BYTES = 16 << 20
"""With more than this dirty it comes faster than it is written back."""
BEHIND_S = 0.1
"""And that is taken to go on for so long after the last time that somebody asked."""
PART_BYTES = 8 << 20
"""Of a large write so much at most is made dirty at a time, and half of what may be."""
ADMIT_LOOK_S = 0.05
"""A writer that waits looks again after so long, whatever it was told."""


class Ranges:
    """Ranges of bytes, `(offset, length)`, disjoint and in order; those that touch are one."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start, stop in zip(self._starts, self._stops, strict=True):
            yield start, stop - start

    def add(self, offset: int, length: int) -> None:
        """Adds a range, of which parts may be there already."""
        if length <= 0:
            return
        start, stop = offset, offset + length
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._replace(first, last, [(start, stop)])

    def remove(self, offset: int, length: int) -> None:
        """Takes a range out, as far as it is there."""
        if length <= 0 or not self._starts:
            return
        start, stop = offset, offset + length
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first < last:
            left = (self._starts[first], start)
            right = (stop, self._stops[last - 1])
            self._replace(first, last, [part for part in (left, right) if part[0] < part[1]])

    def take(self, limit_bytes: int) -> list[tuple[int, int]]:
        """Takes the first ranges out, of at most so many bytes together."""
        taken = []
        while self._starts and limit_bytes > 0:
            start = self._starts[0]
            length = min(self._stops[0] - start, limit_bytes)
            self.remove(start, length)
            taken.append((start, length))
            limit_bytes -= length
        return taken

    def _replace(self, first: int, last: int, parts: Iterable[tuple[int, int]]) -> None:
        parts = list(parts)
        before = sum(self._stops[first:last]) - sum(self._starts[first:last])
        self._starts[first:last] = [start for start, _ in parts]
        self._stops[first:last] = [stop for _, stop in parts]
        self.total_bytes += sum(stop - start for start, stop in parts) - before


class WriteBack:
    """A thread that writes dirty pages of a device back, and drops those of freed extents.

    Any thread may call the methods, and none of them does I/O; without `start()` they do nothing.
    An interrupt may come at any moment of them: what they do is to leave a note for the thread, in
    one call, and the thread alone keeps the accounts; but for those of what is being written.
    """

    def __init__(self, device: _core.Device, budget_bytes: Callable[[], int]) -> None:
        self._device = device
        self._budget_bytes = budget_bytes
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self._is_running = False
        self._notes: deque[tuple[Callable[..., None], int, Any]] = deque()
        """What is to be called, the bytes that it makes dirty, and its argument."""
        self._dirty = Ranges()
        self._dirty_since_s = 0.0
        self._is_urgent = False
        """A writer waits."""
        self._flushed: list[tuple[int, int]] = []
        """What was dirty when the flush that is under way began."""
        self._freed = Ranges()
        self._under_way: deque[list[tuple[int, int]]] = deque()
        """What was started, the oldest first."""
        self._admitted: dict[object, list[tuple[int, int]]] = {}
        """What may be written now, by who writes it: no objects that lead to the store, which this
        thread must not keep alive."""
        self._admitted_bytes = self._noted_bytes = self._under_way_bytes = 0
        """Of these; of the notes; of what was started and is not known to be over."""
        self._behind_until_s = float("-inf")
        self.errors = 0
        """How often the device refused. flush() of the device tells why."""
        self.most_bytes = 0
        """The most that was dirty or about to be at any time."""

    # ---- the thread's life ------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread. RuntimeError where none can be had."""
        self._thread = threading.Thread(target=self._run, name="dualblade-writeback", daemon=True)
        self._is_running = True
        try:
            self._thread.start()
        except BaseException:
            self._is_running, self._thread = False, None
            raise

    def stop(self) -> None:
        """Ends the thread and returns when it has ended; what is dirty stays so."""
        with self._lock:
            self._is_stopped = True
            self._changed.notify_all()
            # A signal handler may be here while the frame that it interrupted holds the lock:
            # waiting gives that up, join() would not.
            while self._is_running:
                self._changed.wait()
        if self._thread is not None:
            self._thread.join()

    def forget_after_fork(self) -> None:
        """In the child there is no thread, and the lock may be held by one."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._is_running, self._thread, self._is_stopped = False, None, True

    # ---- what others tell -------------------------------------------------------------------

    @property
    def dirty_bytes(self) -> int:
        """Written into the page cache, or about to be, and not known to be on the device."""
        noted_bytes = self._noted_bytes + self._dirty.total_bytes + self._under_way_bytes
        return self._admitted_bytes + noted_bytes

    @property
    def limit_bytes(self) -> int:
        """So much may be dirty."""
        limit = min(DIRTY_MAX_BYTES, self._budget_bytes() // DIRTY_PART)
        return max(limit, DIRTY_LEAST_BYTES)

    @property
    def part_bytes(self) -> int:
        """How much should be written at a time: while it is, what came before is written back."""
        return min(PART_BYTES, max(self.limit_bytes // 2, DIRTY_LEAST_BYTES))

    def is_behind(self) -> bool:
        """Whether what is written into the page cache comes faster than it is written back: then
        writers that have a way past it do better to take it, all of them until there is a pause.
        Some on each way are slower than all on either: those through the page cache hold a file's
        lock while they copy."""
        now_s = time.monotonic()
        if now_s >= self._behind_until_s and self.dirty_bytes <= BEHIND_BYTES:
            return False
        self._behind_until_s = now_s + BEHIND_S
        return True

    def admit(self, writer: object, ranges: Sequence[tuple[int, int]]) -> bool:
        """Whether these ranges, `(offset, length)`, may be written into the page cache now: then
        they count as dirty, and `written()` is to be called for certain.

        False: there is no room for them. What others, or the same writer, have been admitted with
        may have to be written first; then `await_room()`.
        """
        total_bytes = sum([length for _, length in ranges])
        with self._lock:
            if self._is_over(total_bytes):
                return False
            admitted = [*self._admitted.get(writer, ()), *ranges]
            most_bytes = max(self.most_bytes, self.dirty_bytes + total_bytes)
            # No call, no interrupt until all of it is done.
            self._admitted[writer] = admitted
            self._admitted_bytes += total_bytes
            self.most_bytes = most_bytes
            return True

    def await_room(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Waits a while for room for these ranges, and has dirty pages written for it."""
        with self._lock:
            if self._is_over(sum([length for _, length in ranges])):
                # No note: of a drive that hangs one for each look would be kept.
                self._is_urgent = True
                self._changed.notify_all()
                self._changed.wait(ADMIT_LOOK_S)

    def is_due(self, writer: object) -> bool:
        """Whether a writer has been admitted with so much that it should be written back now."""
        return sum([length for _, length in self._admitted.get(writer, ())]) >= START_BYTES

    def writers(self) -> set[object]:
        """Those who were admitted and have not said that it is written."""
        with self._lock:
            return set(self._admitted)

    def _is_over(self, length: int) -> bool:
        if not self._is_running or self._is_stopped:
            return False
        dirty_bytes = self.dirty_bytes
        return dirty_bytes > 0 and dirty_bytes + length > self.limit_bytes

    def written(self, writer: object) -> None:
        """What the writer was admitted with is in the page cache, or will not come there. It can
        be done again."""
        if writer not in self._admitted:
            return
        with self._lock:
            ranges = self._admitted[writer]
            total_bytes = sum([length for _, length in ranges])
            self._note(self._add_dirty, total_bytes, ranges)
            # No call, no interrupt: neither stays without the other.
            self._admitted_bytes -= total_bytes
            del self._admitted[writer]
        if len(self._notes) >= NOTES_MAX or self._noted_bytes >= START_BYTES:
            self.wake()

    def freed(self, extents: Sequence[tuple[int, int]]) -> None:
        """These extents, which were page-cached, have been freed."""
        self._note(self._add_freed, 0, extents)

    def reused(self, extents: Sequence[tuple[int, int]]) -> None:
        """Extents were given out again for the page cache: what is there may stay."""
        if extents and (self._freed.total_bytes or self._notes):
            self._note(self._remove_freed, 0, extents)

    def flush_begins(self) -> None:
        """Called before a flush of the device."""
        self._note(self._begin_flush)

    def flush_ended(self) -> None:
        """Called after a flush that succeeded: what was dirty before is not any more."""
        is_known = threading.Event()
        self._note(self._end_flush, 0, is_known)
        with self._lock:
            self._changed.notify_all()
            while self._is_running and not is_known.is_set():
                self._changed.wait()

    def wake(self) -> None:
        """The thread looks at what it was told, if it has been told anything."""
        if self._notes:
            with self._lock:
                self._changed.notify_all()

    def _note(self, call: Callable[..., None], length: int = 0, argument: Any = None) -> None:
        if self._is_running:
            notes, note = self._notes, (call, length, argument)
            # Both or neither: an interrupt, or another thread, comes after the call.
            self._noted_bytes += length
            notes.append(note)

    # ---- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    self._take_notes()
                    while not (self._is_stopped or self._under_way or self._is_due()):
                        self._changed.wait(self._sleep_s())
                        self._take_notes()
                    if self._is_stopped:
                        return
                    started = self._take_dirty()
                    # Nothing more can be started: time to see the oldest end.
                    ended = self._under_way.popleft() if self._under_way and not started else []
                    if started:
                        self._under_way.append(started)
                self._each(started, self._device.write_back)
                self._each(ended, partial(self._device.write_back, wait=True))
                if not (started or ended):
                    self._drop_freed()
                if ended:
                    with self._lock:
                        self._under_way_bytes -= sum([length for _, length in ended])
                        self._changed.notify_all()
        finally:
            with self._lock:
                self._is_running = False
                self._changed.notify_all()

    def _drop_freed(self) -> None:
        if not self._freed.total_bytes:
            return
        try:
            failures = self._device.write_back_failures()
        except ClosedError:
            return
        with self._lock:
            # What was given out again before the count is known now; of the rest no write-back can
            # have failed before it, and if one does later, nothing is dropped.
            self._take_notes()
            freed = self._freed.take(BATCH_BYTES)
        self._each(freed, partial(self._device.drop_cached, failures=failures))

    def _take_dirty(self) -> list[tuple[int, int]]:
        """What is to be started now; it counts as under way."""
        if not self._is_dirty_due() or self._under_way_bytes >= UNDER_WAY_BYTES:
            return []
        started = self._dirty.take(BATCH_BYTES)
        self._under_way_bytes += sum([length for _, length in started])
        return started

    def _take_notes(self) -> None:
        while self._notes:
            call, length, argument = self._notes.popleft()
            call(argument)
            self._noted_bytes -= length

    def _add_dirty(self, ranges: Iterable[tuple[int, int]]) -> None:
        if not self._dirty.total_bytes:
            self._dirty_since_s = time.monotonic()
        for offset, length in ranges:
            self._dirty.add(offset, length)
            self._freed.remove(offset, length)  # cut off before, and appended to again

    def _add_freed(self, extents: Iterable[tuple[int, int]]) -> None:
        for offset, length in extents:
            self._dirty.remove(offset, length)
            self._freed.add(offset, length)

    def _remove_freed(self, extents: Iterable[tuple[int, int]]) -> None:
        for offset, length in extents:
            self._freed.remove(offset, length)

    def _begin_flush(self, _: None) -> None:
        self._flushed = list(self._dirty)

    def _end_flush(self, is_known: threading.Event) -> None:
        # What was written anew meanwhile goes too: then the kernel writes it in its own time.
        for offset, length in self._flushed:
            self._dirty.remove(offset, length)
        self._flushed = []
        self._under_way.clear()
        self._under_way_bytes = 0
        is_known.set()
        self._changed.notify_all()

    def _is_due(self) -> bool:
        return self._is_dirty_due() or self._freed.total_bytes > 0

    def _is_dirty_due(self) -> bool:
        total = self._dirty.total_bytes
        self._is_urgent = self._is_urgent and total > 0
        return total > 0 and (
            self._is_urgent
            or total >= START_BYTES
            or time.monotonic() - self._dirty_since_s >= START_AFTER_S
        )

    def _sleep_s(self) -> float | None:
        if not self._dirty.total_bytes:
            return None
        return max(0.0, self._dirty_since_s + START_AFTER_S - time.monotonic())

    def _each(self, ranges: Iterable[tuple[int, int]], call: Callable[[int, int], object]) -> None:
        for offset, length in ranges:
            try:
                call(offset, length)
            except ClosedError:
                return
            except DualbladeError:
                # The device counts it, and who counts writes it again (doubts.py). This thread
                # goes on with the rest.
                self.errors += 1
