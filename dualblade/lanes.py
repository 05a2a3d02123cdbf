"""The threads of a pipeline: chunks between the storage and a device, in the order of their groups.

A lane is a thread with a share of the staging. What it waits for is I/O and copies, never whoever
asked for them: it takes hold of tensors only as their turn comes, and lets go of them when they
have been read.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from dualblade import tensor
from dualblade.entry import BLOCK_BYTES, round_up
from dualblade.errors import ClosedError
from dualblade.staging import Buffers, Ring
from dualblade.tuning import Choice, Tuner

Wanted = tuple[str, int | None, int | None]
"""A key, and of its rows the first and the one after the last; or None."""

IN_PLACE_CHUNK_BYTES = 16 << 20
IN_PLACE_DEPTH = 4
"""Without staging there is nothing to choose: the queue cuts requests itself, as the drive likes
them. This much is under way, so that one group can be let go while the next is read."""


class Reading(Protocol):
    """Tensors that are held while they are read: the store's."""

    parts: Sequence[Any]

    def read(self, pieces: Sequence[Any]) -> Any:
        """Starts reading parts of them; what it returns has wait()."""

    def end(self) -> None:
        """Lets go of them."""


class Span(NamedTuple):
    """A part of a chunk: bytes of one of a group's tensors."""

    which: int
    start: int
    stop: int
    memory: Any


class Cuts:
    """What is left of a group's tensors, cut into chunks as it goes: their size may change."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._left = [[start, stop] for start, stop in ranges]
        self._turn = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left."""
        return all(start == stop for start, stop in self._left)

    def next(self, choice: Choice) -> list[tuple[int, int, int]]:
        """(which, start, stop) of the next chunk's parts, which are at most `chunk_bytes` with the
        bytes that lie before them in their blocks; none when nothing is left.

        Within a tensor parts begin at multiples of the chunk size, so also where a checksum does.
        """
        spans: list[tuple[int, int, int]] = []
        room = choice.chunk_bytes
        order = range(len(self._left))
        if choice.mode == "intra":
            order = [*order[self._turn :], *order[: self._turn]]
        for which in order:
            left = self._left[which]
            start, end = left
            if start == end:
                continue
            stop = min((start // choice.chunk_bytes + 1) * choice.chunk_bytes, end)
            if staged_bytes(start, stop) > room:
                break
            spans.append((which, start, stop))
            room -= staged_bytes(start, stop)
            left[0] = stop
            self._turn = (which + 1) % len(self._left)
            if stop < end:
                break  # of a tensor that goes on nothing more now
        return spans


def staged_bytes(start: int, stop: int) -> int:
    """What bytes of a tensor take of the staging: whole blocks, as on the drive."""
    return round_up(stop, BLOCK_BYTES) - start // BLOCK_BYTES * BLOCK_BYTES


class _ThisThread(threading.local):
    is_lanes = False


_this_thread = _ThisThread()


def is_lanes() -> bool:
    """Whether this thread is one of a lane's: it can't wait for a pipeline to close."""
    return _this_thread.is_lanes


class Job:
    """What a lane is asked for. Whoever asked waits for `is_ended`, in the lane's condition."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.is_cancelled = False
        """Nobody wants it any more."""
        self.is_ended = False
        self.is_known = False
        """Whether a lane has it, or had it."""
        self.under_way = 0
        """Chunks."""
        self.cuts: Cuts | None = None
        """None before it is begun."""
        self.is_cut = False
        """No more chunks are to begin."""

    def fail(self, error: BaseException) -> None:
        """Keeps the first error, and begins no more chunks."""
        self.error = self.error or error
        self.is_cut = True


class Fetch(Job):
    """A group of tensors on their way to the device."""

    def __init__(
        self, wanted: Sequence[Wanted], outs: Sequence[Any] | None, after: Sequence[Any]
    ) -> None:
        super().__init__()
        self.wanted = list(wanted)
        self.outs = outs
        self.after = list(after)
        """Events before which its memory is not to be written to."""
        self.claimed: list[tuple[int, int]] = []
        """Where the memory of `outs` is."""
        self.lane = ""
        self.nbytes = 0
        """As far as is known when it is begun."""
        self.is_begun = False
        self.reading: Reading | None = None
        self.memory: Any = None
        """Of the pipeline, flat, unless `outs` were given."""
        self.arrays: list[Any] = []
        self.targets: list[Any] = []
        """Their bytes."""
        self.event: Any = None
        """After the last copy, where there are copies."""
        self.is_ordered = False
        """Whether what comes next comes after `after`."""


class Put(Job):
    """Tensors on their way from the device to the storage."""

    def __init__(self, writing: Any, sources: Sequence[Any], after: Sequence[Any]) -> None:
        super().__init__()
        self.writing = writing
        self.sources = sources
        """The bytes of each tensor, in the device's memory."""
        self.after = after
        """The events before which they are not to be read."""


class Chunk:
    """A chunk on its way."""

    __slots__ = ("event", "io", "is_staged", "job", "nbytes", "spans")

    def __init__(self, job: Any, spans: list[Span], *, is_staged: bool) -> None:
        self.job = job
        self.spans = spans
        self.nbytes = sum([span.stop - span.start for span in spans])
        self.is_staged = is_staged
        self.io: Sequence[Any] = ()
        """What it is being read or written by: has wait()."""
        self.event: Any = None
        """After its copies; None where there are none, or the device has failed."""


class Lane(ABC):
    """A thread that moves the chunks of one job after the other, many chunks at a time."""

    def __init__(self, name: str, stream: Any, ring: Ring | None, tuner: Tuner | None) -> None:
        self.name = name
        self.changed = threading.Condition()
        self.counts: Counter[str] = Counter()
        self.busy_s = 0.0
        self._stream = stream
        """None where nothing is copied."""
        self._ring = ring
        self._tuner = tuner
        self._jobs: deque[Any] = deque()
        self._current: Any = None
        self._thread: threading.Thread | None = None
        self._is_closing = False
        self._is_idle = True
        self._since = 0.0
        """When a chunk came last, or work began."""

    # ---- for others --------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Puts a job behind the others; once, however often. It ends with ClosedError where it
        comes too late."""
        with self.changed:
            if not (job.is_known or job in self._jobs):
                if self._is_closing:
                    job.fail(_closed())
                    job.is_ended = True
                    return
                self._jobs.append(job)
            job.is_known = True
            self._go_on()

    def _go_on(self) -> None:
        """There is something to do. With the lock held; again where an interrupt cut it short."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=f"dualblade-{self.name}", daemon=True)
            thread.start()
            self._thread = thread
        self.changed.notify_all()

    def wait(self, job: Job, timeout: float | None = None) -> bool:
        """Whether a job has ended within the time."""
        with self.changed:
            return self.changed.wait_for(lambda: job.is_ended, timeout)

    def settle(self) -> None:
        """Returns when nothing is under way."""
        with self.changed:
            self.changed.wait_for(lambda: self._is_closing or (self._is_idle and not self._jobs))

    def cancel(self, job: Job) -> None:
        """Has no more chunks of it begun. It ends when those that are under way have."""
        job.is_cancelled = job.is_cut = True
        with self.changed:
            if job.is_known or job in self._jobs:
                self._go_on()
            else:
                job.is_ended = True  # an interrupt came before it was submitted

    @property
    def _gives_up(self) -> bool:
        """Whether what is not begun yet is not to be."""
        return self._is_closing

    def begin_close(self) -> None:
        """Ends what is under way, and after it the thread."""
        with self.changed:
            self._is_closing = True
            if self._jobs:
                self._go_on()
            self.changed.notify_all()

    def join(self) -> None:
        """Returns when the thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def stats(self) -> dict[str, Any]:
        """What it did, and how it does it."""
        found = {
            "bytes": self.counts["bytes"],
            "chunks": self.counts["chunks"],
            "jobs": self.counts["jobs"],
            "busy_s": self.busy_s,
            "under_way": len(self._jobs) + self._chunks() + (self._current is not None),
        }
        if self._tuner is None:
            why = "the drive reads into the device's own memory: there is no copy to overlap"
            return found | {"mode": "in place", "why": why}
        return found | self._tuner.stats()

    # ---- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        with self.changed:
            if self._thread not in (None, threading.current_thread()):
                return  # an interrupt came between its start and the note of it
            self._thread = threading.current_thread()
        _this_thread.is_lanes = True
        try:
            while self._wait_for_work():
                self._step()
        except BaseException as error:
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException) -> None:
        """Ends all jobs with an error that is this thread's own: nobody may wait for ever."""
        with self.changed:
            self._is_closing = True
            chunks = self._under_way()
            jobs = dict.fromkeys([*self._jobs, *[chunk.job for chunk in chunks]])
            jobs |= dict.fromkeys([self._current] if self._current else [])
            self._jobs.clear()
        for chunk in chunks:  # their memory is somebody else's afterwards
            for each in [*chunk.io, chunk.event]:
                with contextlib.suppress(Exception):
                    if each is not None:
                        each.wait()
        for job in jobs:
            job.fail(error)
            self._finish(job)

    def _wait_for_work(self) -> bool:
        with self.changed:
            is_idle = False
            while not (self._jobs or self._current or self._chunks()):
                if self._is_closing:
                    return False
                is_idle = self._is_idle = True
                self.changed.notify_all()
                self.changed.wait()
            self._is_idle = False
            if is_idle or not self._since:
                self._since = time.monotonic()
            return True

    @abstractmethod
    def _step(self) -> None:
        """Begins what can be begun, and waits for the oldest that is under way."""

    @abstractmethod
    def _under_way(self) -> list[Chunk]:
        """The chunks that are."""

    def _chunks(self) -> int:
        """How many are under way."""
        return len(self._under_way())

    @abstractmethod
    def _begin(self, job: Any) -> bool:
        """Makes a job ready to be cut; False if it can't be while others are under way."""

    @abstractmethod
    def _start(self, chunk: Chunk) -> None:
        """Begins to move a chunk."""

    @abstractmethod
    def _end(self, job: Any) -> None:
        """Nothing of a job is under way any more."""

    @property
    def _choice(self) -> Choice:
        if self._tuner is None:
            return Choice(IN_PLACE_CHUNK_BYTES, IN_PLACE_DEPTH, "cross")
        return self._tuner.choice

    def _start_chunks(self, memory_of: Callable[[Any, int], Any]) -> None:
        """Begins as many chunks as there may be. `memory_of` is the device's, (job, which)."""
        while True:
            if self._current is None and not self._begin_next():
                return
            job = self._current
            if self._gives_up and not job.is_cut:
                job.fail(_closed())
            if job.is_cut or job.cuts.is_empty:  # looked at first: who waits for it need not wait
                job.is_cut = True  # for room that it has no use for
                self._leave(job)
                continue
            choice = self._choice
            if self._chunks() >= choice.depth:
                return
            if self._ring is not None and not self._ring.has_room(choice.chunk_bytes):
                return
            self._start_chunk(job, job.cuts.next(choice), memory_of)

    def _start_chunk(
        self,
        job: Any,
        cuts: list[tuple[int, int, int]],
        memory_of: Callable[[Any, int], Any],
    ) -> None:
        if self._ring is None:
            spans = [
                Span(which, start, stop, memory_of(job, which)[start:stop])
                for which, start, stop in cuts
            ]
        else:
            room = self._ring.take(sum([staged_bytes(start, stop) for _, start, stop in cuts]))
            assert room is not None
            spans, at = [], 0
            for which, start, stop in cuts:
                # As far into a block as on the drive, so that direct I/O needs no copy.
                first = at + start % BLOCK_BYTES
                spans.append(Span(which, start, stop, room[first : first + stop - start]))
                at += staged_bytes(start, stop)
        chunk = Chunk(job, spans, is_staged=self._ring is not None)
        job.under_way += 1
        self.counts["chunks"] += 1
        try:
            self._start(chunk)
        except Exception as error:  # noqa: BLE001  of this job alone: whoever asked is told
            job.fail(error)
        self._add(chunk)

    def _wait_for(self, events: Sequence[Any]) -> None:
        """What is moved from now on is moved after these events."""
        for event in events:
            if self._stream is None:
                event.wait()
            else:
                self._stream.wait(event)

    def _record(self, chunk: Chunk) -> None:
        """Notes the place in the stream after a chunk's copies."""
        try:
            chunk.event = self._stream.record()
        except Exception as error:  # noqa: BLE001  of a device on which nothing runs any more
            chunk.job.fail(error)

    @abstractmethod
    def _add(self, chunk: Chunk) -> None:
        """Notes that a chunk is under way, or has failed to be."""

    def _begin_next(self) -> bool:
        """Makes the next job the current one; False if there is none or it has to wait."""
        with self.changed:
            if not self._jobs:
                return False
            job = self._jobs[0]
            job.is_known = True
        if self._gives_up:
            job.fail(_closed())
        if not job.is_cut:
            try:
                if not self._begin(job):
                    return False
            except Exception as error:  # noqa: BLE001  as above
                job.fail(error)
        with self.changed:
            self._current = self._jobs.popleft()
        self.counts["jobs"] += 1
        return True

    def _leave(self, job: Any) -> None:
        """The current job has no more chunks to begin."""
        self._current = None
        if not job.under_way:
            self._finish(job)

    def _is_over(self, chunk: Chunk) -> None:
        """A chunk is not under way any more."""
        job = chunk.job
        job.under_way -= 1
        if not job.under_way and job is not self._current:
            self._finish(job)

    def _finish(self, job: Any) -> None:
        try:
            self._end(job)
        except Exception as error:  # noqa: BLE001  as above
            job.fail(error)
        with self.changed:
            job.is_ended = True
            self.changed.notify_all()

    def _count(self, nbytes: int) -> None:
        """Bytes have come."""
        now = time.monotonic()
        taken_s, self._since = now - self._since, now
        self.counts["bytes"] += nbytes
        self.busy_s += taken_s
        if self._tuner is not None:
            self._tuner.moved(nbytes, taken_s)


class FetchLane(Lane):
    """From the storage to the device: chunks are read, copied, and forgotten when that is done."""

    def __init__(
        self,
        name: str,
        stream: Any,
        ring: Ring | None,
        tuner: Tuner | None,
        *,
        source: Any,
        device: Any,
        buffers: Buffers,
    ) -> None:
        super().__init__(name, stream, ring, tuner)
        self._source = source
        self._device = device
        self._buffers = buffers
        self._reads: deque[Chunk] = deque()
        self._copies: deque[Chunk] = deque()

    def _under_way(self) -> list[Chunk]:
        return [*self._reads, *self._copies]

    def _step(self) -> None:
        while self._copies and _is_done(self._copies[0].event):
            self._end_copy()
        self._start_chunks(lambda job, which: job.targets[which])
        if self._reads:
            self._end_read()
        elif self._copies:
            self._end_copy()

    def _begin(self, job: Fetch) -> bool:
        # Others may wait for all that this lane holds, and one of these may be what it wants next:
        # it waits for tensors only when it holds none.
        is_alone = not self._chunks()
        job.reading = self._source.hold_parts(job.wanted, wait=is_alone)
        if job.reading is None:
            return False
        parts = job.reading.parts
        job.cuts = Cuts([(part.start, part.stop) for part in parts])
        if job.outs is None:
            self._place(job)
        else:
            self._take_outs(job)
        if self._stream is None:
            self._order(job)
        return True

    def _order(self, job: Fetch) -> None:
        """Has its memory left alone by those before. As late as may be: in the stream, what is
        copied of the group before would wait as well."""
        if not job.is_ordered:
            self._wait_for(job.after)
            job.is_ordered = True

    def _place(self, job: Fetch) -> None:
        """Gives a job memory of the device."""
        parts = job.reading.parts
        places, end = [], 0
        for part in parts:
            # As far into a block as on the drive, where it is read to in place.
            first = end + part.start % BLOCK_BYTES if self._stream is None else end
            places.append(first)
            end = round_up(first + part.stop - part.start, BLOCK_BYTES)
        job.memory, job.after = self._buffers.lend(end, self._stream)
        for part, first in zip(parts, places, strict=True):
            target = job.memory[first : first + part.stop - part.start]
            job.arrays.append(self._device.array_over(target, part.shape, part.dtype))
            job.targets.append(_From(self._bytes(target), part.start))

    def _take_outs(self, job: Fetch) -> None:
        parts = job.reading.parts
        if len(job.outs) != len(parts):
            raise ValueError(f"out has {len(job.outs)} arrays for a group of {len(parts)} tensors")
        for part, out in zip(parts, job.outs, strict=True):
            tag = tensor.dtype_tag(out.dtype)
            if tuple(out.shape) != part.shape or tag != part.dtype:
                raise ValueError(
                    f"out of {part.key!r} is {tag} {tuple(out.shape)}; the tensor is "
                    f"{part.dtype} {part.shape}"
                )
            job.arrays.append(out)
            job.targets.append(_From(self._bytes(self._device.bytes_of(out)), part.start))

    def _bytes(self, memory: Any) -> Any:
        return self._device.host_bytes_of(memory) if self._stream is None else memory

    def _start(self, chunk: Chunk) -> None:
        chunk.io = [chunk.job.reading.read(chunk.spans)]

    def _add(self, chunk: Chunk) -> None:
        self._reads.append(chunk)

    def _end_read(self) -> None:
        """Waits for the oldest read, and begins to copy what it brought."""
        chunk = self._reads.popleft()
        job = chunk.job
        try:
            for io in chunk.io:
                io.wait()
            chunk.io = ()
            if self._stream is not None and not job.is_cancelled and job.error is None:
                self._order(job)
                for which, start, stop, memory in chunk.spans:
                    self._stream.copy_to_device(job.targets[which][start:stop], memory)
            self._count(chunk.nbytes)
        except Exception as error:  # noqa: BLE001  of this job alone: whoever asked is told
            job.fail(error)
        if self._stream is None:
            self._is_over(chunk)
            return
        self._record(chunk)  # also after an error: some of it may be on its way
        job.event = chunk.event or job.event
        self._copies.append(chunk)
        job.under_way -= 1
        if not job.under_way and job is not self._current:
            self._finish(job)

    def _end_copy(self) -> None:
        """Waits for the oldest copy, and takes its staging back."""
        chunk = self._copies.popleft()
        try:
            if chunk.event is not None:
                chunk.event.wait()
        except Exception as error:  # noqa: BLE001  as above
            # What was put into the stream behind it may have been left out.
            for each in [chunk, *self._copies]:
                each.job.fail(error)
        self._ring.give_back()

    def _end(self, job: Fetch) -> None:
        if job.reading is not None:
            job.reading.end()
            job.reading = None


def _is_done(event: Any) -> bool:
    return event is None or event.done


def _closed() -> ClosedError:
    return ClosedError("the pipeline was closed: make another with store.pipeline()")


class _From:
    """Bytes [start, ...) of a tensor, by their number in the tensor."""

    __slots__ = ("memory", "start")

    def __init__(self, memory: Any, start: int) -> None:
        self.memory = memory
        self.start = start

    def __getitem__(self, span: slice) -> Any:
        return self.memory[span.start - self.start : span.stop - self.start]


class PutLane(Lane):
    """From the device to the storage: chunks are copied, written, and forgotten."""

    def __init__(self, name: str, stream: Any, ring: Ring | None, tuner: Tuner | None) -> None:
        super().__init__(name, stream, ring, tuner)
        self._copies: deque[Chunk] = deque()
        self._writes: deque[Chunk] = deque()

    def _under_way(self) -> list[Chunk]:
        return [*self._copies, *self._writes]

    def _step(self) -> None:
        while self._writes and all(io.done() for io in self._writes[0].io):
            self._end_write()
        self._start_chunks(lambda job, which: job.sources[which])
        if self._copies:
            self._end_copy()
        elif self._writes:
            self._end_write()

    def _begin(self, job: Put) -> bool:
        job.cuts = Cuts([(part.start, part.stop) for part in job.writing.parts])
        self._wait_for(job.after)
        return True

    def _start(self, chunk: Chunk) -> None:
        if self._stream is None:
            return
        for which, start, stop, memory in chunk.spans:
            self._stream.copy_to_host(memory, chunk.job.sources[which][start:stop])

    def _add(self, chunk: Chunk) -> None:
        if self._stream is not None:
            self._record(chunk)
        self._copies.append(chunk)

    def _end_copy(self) -> None:
        """Waits for the oldest copy, and begins to write what it brought."""
        chunk = self._copies.popleft()
        job = chunk.job
        chunk.io = []
        try:
            self._wait_for_copy(chunk)
            if job.error is None:
                chunk.io = job.writing.write(chunk.spans)
        except Exception as error:  # noqa: BLE001  as above
            job.fail(error)
        self._writes.append(chunk)

    def _wait_for_copy(self, chunk: Chunk) -> None:
        if chunk.event is None:
            return
        try:
            chunk.event.wait()
        except Exception as error:
            # What was put into the stream behind it may have been left out.
            for each in self._copies:
                each.job.fail(error)
            raise

    def _end_write(self) -> None:
        """Waits for the oldest write, and takes its staging back."""
        chunk = self._writes.popleft()
        for io in chunk.io:
            try:
                io.wait()
            except Exception as error:  # noqa: BLE001  as above
                chunk.job.fail(error)
        self._count(chunk.nbytes)
        if chunk.is_staged:
            self._ring.give_back()
        self._is_over(chunk)

    @property
    def _gives_up(self) -> bool:
        return False  # what was put will be stored

    def _end(self, job: Put) -> None:
        job.sources = ()
