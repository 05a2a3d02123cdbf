"""Pipeline: tensors between a store and a device, storage I/O under copies and kernels."""

from __future__ import annotations

import _thread
import contextlib
import os
import sys
import threading
import time
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dualblade import tensor
from dualblade.errors import ClosedError
from dualblade.gpu_schedule import is_worker
from dualblade.lanes import Fetch, FetchLane, Lane, Put, PutLane, Wanted, is_lanes
from dualblade.memory import format_size
from dualblade.staging import Buffers, Meter, Ring
from dualblade.ticket import Ticket
from dualblade.tuning import CHUNK_MIN_BYTES, MODES, Mode, Tuner, candidates

STAGING_BYTES = 64 << 20
STAGING_LEAST_BYTES = 4 * CHUNK_MIN_BYTES
SHARES = {"direct": 2, "pagecache": 1, "put": 1}
"""Of the staging, in quarters: what is read from the drive, what is copied out of the page cache,
and what is stored. Each lane has its own, so that none waits for another."""
AHEAD_GROUPS = 2
"""On each path so many groups are under way or there before they are asked for, and as many more
as fit into the lane's share of the staging, where groups are small."""
LOOKAHEAD_GROUPS = 64
"""So far ahead the next groups of each path are looked for."""

Key = str | tuple[str, int, int]

_open: weakref.WeakSet[Pipeline] = weakref.WeakSet()


def _where_one_can_wait(close: Callable[[], None]) -> None:
    """Calls it; in another thread where this is one that it waits for: what nobody has any more
    may be collected in any."""
    if is_lanes() or is_worker():
        _thread.start_new_thread(close, ())
    else:
        close()


def close_all() -> None:
    """Closes what nobody closed. At the end of the process, while there are threads."""
    for pipe in list(_open):
        with contextlib.suppress(Exception):
            pipe.close()


class Pipeline:
    """Made by `store.pipeline()`; to be closed. Safe for many threads.

    What is read goes from the drive to staging memory, and from there to the device, in chunks;
    what is stored goes the other way meanwhile. Three threads see to that: one for tensors on the
    direct path, one for page-cached ones, one for what is stored. Where the drive can read into
    the device's own memory there is neither staging nor a copy.
    """

    def __init__(
        self,
        source: Any,
        device: Any,
        *,
        staging_bytes: int = STAGING_BYTES,
        depth: int | None = None,
        chunk_bytes: int | None = None,
        mode: Mode | None = None,
    ) -> None:
        """`source` is the store (parts.py), `device` of gpu.py. Raises ValueError, MemoryError."""
        self.device = device
        self._source = source
        self._pid = os.getpid()
        self._is_closed = True  # until all is there
        self._closing = threading.RLock()
        self._in_place = device.unified or _is_plain_host(device)
        rooms = {} if self._in_place else _rooms(staging_bytes)
        self._rooms = rooms
        tuners = _tuners(rooms, source.chunk_bytes, depth, chunk_bytes, mode)
        self._meter = Meter(sum(rooms.values()))
        self._buffers = Buffers(device)
        self._counts: Counter[str] = Counter()
        self._waited_s = 0.0
        self._streams: list[Any] = []
        self._arena: Any = None
        self._registered: Any = None
        self._registered_bytes = 0
        self._lanes: dict[str, Any] = {}
        self._is_closed = False
        _open.add(self)
        try:
            if rooms:
                self._arena = device.arena(sum(rooms.values()))
                self._registered = self._arena.array
                self._registered_bytes = source.register_memory(self._registered)
            self._make_lanes(rooms, tuners)
        except BaseException:
            self.close()
            raise

    def _make_lanes(self, rooms: Mapping[str, int], tuners: Mapping[str, Tuner]) -> None:
        first = 0
        for name in SHARES:
            stream = ring = None
            if not self._in_place:
                memory = self._arena.array[first : first + rooms[name]]
                first += rooms[name]
                ring = Ring(memory, self._meter)
                stream = self.device.stream()
                self._streams.append(stream)
            if name == "put":
                self._lanes[name] = PutLane(name, stream, ring, tuners.get(name))
            else:
                self._lanes[name] = FetchLane(
                    name,
                    stream,
                    ring,
                    tuners.get(name),
                    source=self._source,
                    device=self.device,
                    buffers=self._buffers,
                )

    # ---- from the storage to the device -------------------------------------------------------

    def stream(
        self, groups: Iterable[Iterable[Key]], out: Iterable[Sequence[Any]] | None = None
    ) -> Iterator[list[Any]]:
        """The arrays of each group of keys, group after group, on the device.

        A key stands for a whole tensor, `(key, start, stop)` for some of its rows. The arrays are
        in the order of the keys. They are yielded in the order of the caller's current stream: what
        is enqueued there runs when they have come. Their memory is used again after what the caller
        has enqueued there until it asks for the next group; it is the caller's if `out` gives, for
        each group, arrays of the right shapes and dtypes to be filled. An array may come again:
        then that group begins to come when the one before has been used.

        The next groups are under way meanwhile, so `groups` and `out` are iterated ahead. Raises
        what the store's get() raises when it comes to the group that it is about, and then, as
        after close() of the iterator, nothing is under way any more.
        """
        self._check_open()
        outs = None if out is None else iter(out)
        return self._stream(map(_wanted, groups), outs)

    def _stream(
        self, groups: Iterator[list[Wanted]], outs: Iterator[Sequence[Any]] | None
    ) -> Iterator[list[Any]]:
        ahead = _Ahead(self, self._source, groups, outs)
        try:
            while (arrays := ahead.next()) is not None:
                yield arrays
                ahead.is_used()
        finally:
            _where_one_can_wait(ahead.close)

    def begin(self, fetch: Fetch) -> None:
        """Starts to read a group, for `take()` or `cancel()`. Raises ClosedError."""
        self._check_open()
        fetch.is_begun = True
        self._lanes[fetch.lane].submit(fetch)

    def lane_of(self, wanted: Sequence[Wanted]) -> str:
        """By the path that tensors take now: a group that moves meanwhile is read all right."""
        infos = [self._source.info(key) for key, _, _ in wanted]
        return "pagecache" if all(info.path == "pagecache" for info in infos) else "direct"

    def take(self, fetch: Fetch, stream: Any) -> list[Any]:
        """The arrays of a group, ordered in a stream. Raises what kept them from coming."""
        self._check_open()
        begin = time.monotonic()
        self._lanes[fetch.lane].wait(fetch)
        self._waited_s += time.monotonic() - begin
        if fetch.error is not None:
            raise fetch.error
        if fetch.event is not None:
            stream.wait(fetch.event)
        self._counts["groups"] += 1
        return list(fetch.arrays)

    def give_back(self, fetch: Fetch, events: Sequence[Any]) -> None:
        """The arrays of a group, which were taken, are not used any more after these events."""
        memory, fetch.memory = fetch.memory, None
        if memory is not None:
            self._buffers.take_back(memory, list(events))
        fetch.arrays, fetch.targets = [], []

    def cancel(self, fetch: Fetch) -> None:
        """Nobody wants a group that nobody has taken. Returns when nothing of it is under way."""
        if os.getpid() != self._pid or not fetch.is_begun:
            return
        lane = self._lanes[fetch.lane]
        lane.cancel(fetch)
        lane.wait(fetch)
        if fetch.event is not None:
            with contextlib.suppress(Exception):  # nobody asks any more how it went
                fetch.event.wait()
        self.give_back(fetch, fetch.after)  # others may still be at work with it

    def ahead_bytes(self, lane: str) -> int:
        """At least so much of small groups is under way."""
        if self._in_place:
            return STAGING_BYTES // len(SHARES)
        return self._rooms[lane]

    # ---- from the device to the storage -------------------------------------------------------

    def put(self, arrays: Mapping[str, Any], *, group: str | None = None) -> None:
        """Stores arrays of the device under their keys: all of them, or after an error none.

        As `store.put_many`; they are read after what the caller has enqueued so far.
        """
        self.put_async(arrays, group=group).result()

    def put_async(self, arrays: Mapping[str, Any], *, group: str | None = None) -> Ticket:
        """Starts a put. The arrays must stay as they are until the ticket is done.

        Raises NoSpaceError, TypeError, ValueError, UnsupportedError.
        """
        self._check_open()
        device = self.device
        found = {key: device.as_array(array) for key, array in arrays.items()}
        events = {id(s): s for s in (device.current_stream(a) for a in arrays.values())}
        after = [stream.record() for stream in events.values()]
        shapes = {
            key: (tuple(array.shape), tensor.dtype_tag(array.dtype)) for key, array in found.items()
        }
        sources = [self._bytes(device.bytes_of(array)) for array in found.values()]
        lane = self._lanes["put"]
        return self._source.put_parts(
            shapes, group, lambda writing: _UnderWay(lane, Put(writing, sources, after))
        )

    def _bytes(self, memory: Any) -> Any:
        return self.device.host_bytes_of(memory) if self._in_place else memory

    # ---- the whole ----------------------------------------------------------------------------

    def settle(self) -> None:
        """Returns when nothing is under way, and all staging was given back."""
        for lane in self._lanes.values():
            lane.settle()

    def stats(self) -> dict[str, Any]:
        """What is chosen and why, and what was moved.

        "direct", "pagecache", "put": of each lane its chunk size, depth and mode, whether they are
        settled, why they were chosen and what was tried; bytes, chunks, jobs and the seconds it
        was busy. "staging_bytes" is what there is, "staging_taken_bytes" what is taken now,
        "staging_most_bytes" what ever was; "registered_bytes" of it the kernel knows. "waited_s":
        how long callers have waited for groups.
        """
        return {
            "device": self.device.describe(),
            "in_place": self._in_place,
            "staging_bytes": self._meter.limit_bytes,
            "staging_taken_bytes": self._meter.taken_bytes,
            "staging_most_bytes": self._meter.most_bytes,
            "registered_bytes": self._registered_bytes,
            "groups": self._counts["groups"],
            "waited_s": self._waited_s,
            "buffers_allocated": self._buffers.allocated,
            **{name: lane.stats() for name, lane in self._lanes.items()},
        }

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._is_closed

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the pipeline is closed: make another with store.pipeline()")
        if os.getpid() != self._pid:
            raise ClosedError("the pipeline was made before a fork: make one where it is used")

    def close(self) -> None:
        """Ends reads that are under way, finishes puts, and lets all memory go. Idempotent."""
        self._is_closed = True
        if os.getpid() != self._pid:
            return  # its threads and their locks are the parent's
        with self._closing:  # who closes it at the same time returns when it is closed, too
            lanes: list[Lane] = list(self._lanes.values())
            for lane in lanes:
                lane.begin_close()
            for lane in lanes:
                lane.join()
            self._buffers.close()
            for stream in self._streams:
                stream.close()
            if self._registered is not None:
                self._source.unregister_memory(self._registered)
                self._registered = None
            if self._arena is not None:
                self._arena.close()
            _open.discard(self)

    def __enter__(self) -> Pipeline:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_is_closed", True) or sys.is_finalizing():
            return
        try:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
        finally:
            _where_one_can_wait(self.close)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<dualblade.Pipeline to {self.device.name!r} {state}>"


class _Ahead:
    """The groups of one iteration: those that are under way, and those that come after them."""

    def __init__(
        self,
        pipe: Pipeline,
        source: Any,
        groups: Iterator[list[Wanted]],
        outs: Iterator[Sequence[Any]] | None,
    ) -> None:
        self._pipe = pipe
        self._source = source
        self._groups = groups
        self._outs = outs
        self._known: deque[Fetch] = deque()
        """In their order, begun or not."""
        self._has_more = True
        self._current: Fetch | None = None
        self._is_taken = False
        self.stream: Any = None
        """The caller's, in whose order the current group is used."""

    def next(self) -> list[Any] | None:
        """The arrays of the next group, ordered in `stream`; None after the last."""
        self.stream = self._pipe.device.current_stream()
        self._fill()
        if not self._known:
            return None
        self._current = self._known[0]
        self._known.popleft()
        self._fill()  # while the caller waits for this one and uses it, the next are under way
        arrays = self._pipe.take(self._current, self.stream)
        self._is_taken = True
        return arrays

    def is_used(self) -> None:
        """The caller has enqueued all that uses the current group."""
        fetch, self._current, self._is_taken = self._current, None, False
        self._pipe.give_back(fetch, [self.stream.record()])

    def close(self) -> None:
        """Ends what is under way."""
        try:
            if self._is_taken:
                self.is_used()
        finally:
            self._cancel_all()

    def _cancel_all(self) -> None:
        known, self._known = [self._current, *self._known], deque()
        self._current = None
        self._has_more = False
        for fetch in known:
            if fetch is not None:
                fetch.is_cancelled = fetch.is_cut = True  # all at once, then each is waited for
        for fetch in known:
            if fetch is not None:
                self._pipe.cancel(fetch)

    def _fill(self) -> None:
        """Begins what should be under way."""
        ahead = {"direct": [0, 0], "pagecache": [0, 0]}
        claimed = [] if self._current is None else list(self._current.claimed)
        for fetch in self._known:
            self._count(fetch, ahead[fetch.lane], claimed)
        while self._has_more and len(self._known) < LOOKAHEAD_GROUPS:
            if all(self._is_enough(lane, counts) for lane, counts in ahead.items()):
                return
            fetch = self._look()
            if fetch is not None:
                self._known.append(fetch)
                self._count(fetch, ahead[fetch.lane], claimed)

    def _count(self, fetch: Fetch, counts: list[int], claimed: list[tuple[int, int]]) -> None:
        """Counts a group that is under way, or begins it if there is not enough yet.

        `claimed` is the memory of the groups before it, which is theirs until they were used.
        """
        may_begin = not (self._is_enough(fetch.lane, counts) or _overlap(fetch.claimed, claimed))
        claimed += fetch.claimed
        if not fetch.is_begun:
            if not may_begin:
                return
            if fetch.outs is not None:
                fetch.after = [self.stream.record()]  # the caller may just have made them
            self._pipe.begin(fetch)
        counts[0] += 1
        counts[1] += fetch.nbytes

    def _is_enough(self, lane: str, counts: list[int]) -> bool:
        groups, nbytes = counts
        return groups >= AHEAD_GROUPS and nbytes >= self._pipe.ahead_bytes(lane)

    def _look(self) -> Fetch | None:
        """The next group, not begun."""
        fetch = Fetch([], None, [])
        fetch.lane = "direct"
        try:
            wanted = next(self._groups, None)
            if wanted is None:
                self._has_more = False
                return None
            fetch.wanted = wanted
            if self._outs is not None:
                fetch.outs = next(self._outs, None)
                if fetch.outs is None:
                    raise ValueError("out has fewer groups than there are groups of keys")
                fetch.claimed = [self._pipe.device.span_of(array) for array in fetch.outs]
            infos = [self._source.info(key) for key, _, _ in wanted]
        except Exception as error:  # noqa: BLE001  raised when the caller comes to this group
            fetch.fail(error)
            self._has_more = False
            return fetch
        # A group that takes the other path meanwhile is read all right, by the lane of this one.
        if all(info.path == "pagecache" for info in infos):
            fetch.lane = "pagecache"
        fetch.nbytes = sum(info.nbytes for info in infos)
        return fetch


class _UnderWay:
    """A put on its way, as a ticket sees it."""

    def __init__(self, lane: Lane, job: Put) -> None:
        self._lane = lane
        self._job = job

    def begin(self) -> None:
        """Starts it. Whoever waits for it does, too: an interrupt may have come before."""
        self._lane.submit(self._job)

    def wait(self, timeout: float | None = None) -> None:
        """Returns when it is stored. Raises what went wrong, or TimeoutError."""
        if not self._job.is_ended:
            self.begin()
            if not self._lane.wait(self._job, timeout):
                raise TimeoutError(f"the put is still under way after {timeout} s: wait again")
        if self._job.error is not None:
            raise self._job.error

    def done(self) -> bool:
        """Whether wait() would return at once."""
        if not self._job.is_ended:
            self.begin()
        return self._job.is_ended


def _wanted(group: Iterable[Key]) -> list[Wanted]:
    if isinstance(group, str):
        raise TypeError(f"{group!r} is a str: a group is a list of keys")
    return [(key, None, None) if isinstance(key, str) else key for key in group]


def _overlap(some: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> bool:
    return any(a < d and c < b for a, b in some for c, d in others)


def _is_plain_host(device: Any) -> bool:
    """Whether copies would be from memory to memory, and take no set time."""
    return device.kind == "host" and device.copy_bytes_per_s is None


def _rooms(staging_bytes: int) -> dict[str, int]:
    """How much of the staging each lane has."""
    unit = staging_bytes // sum(SHARES.values()) // CHUNK_MIN_BYTES * CHUNK_MIN_BYTES
    if unit == 0:
        raise ValueError(
            f"staging of {format_size(staging_bytes)} is too little: "
            f"{format_size(STAGING_LEAST_BYTES)} at least"
        )
    return {name: share * unit for name, share in SHARES.items()}


def _tuners(
    rooms: Mapping[str, int],
    unit_bytes: int,
    depth: int | None,
    chunk_bytes: int | None,
    mode: Mode | None,
) -> dict[str, Tuner]:
    """What chooses for each lane. Raises ValueError where that is impossible."""
    if depth is not None and depth < 1:
        raise ValueError(f"depth={depth}: at least one chunk is under way")
    if chunk_bytes is not None and (chunk_bytes < CHUNK_MIN_BYTES or chunk_bytes % unit_bytes):
        raise ValueError(
            f"chunk_bytes={chunk_bytes}: a chunk is {CHUNK_MIN_BYTES} bytes or more, and a "
            f"multiple of {unit_bytes}, which is what a checksum covers"
        )
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode={mode!r}: there are {' and '.join(map(repr, MODES))}")
    return {
        name: Tuner(candidates(room, chunk_bytes=chunk_bytes, depth=depth, mode=mode))
        for name, room in rooms.items()
    }
