"""Tensors that are read and written a part at a time, under TensorStore: what pipelines ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dualblade import _core
from dualblade.access import IS_EXCLUSIVE, Operation, check_name, inside
from dualblade.entry import CHECKSUM_BYTES, Entry, ReadPlan
from dualblade.errors import ClosedError
from dualblade.gpu import open_device
from dualblade.lanes import Wanted
from dualblade.memory import parse_size
from dualblade.paths import Request
from dualblade.pipeline import STAGING_BYTES, STAGING_LEAST_BYTES, Pipeline
from dualblade.residency import PathName
from dualblade.ticket import Ticket
from dualblade.transfer import EntryTransfer, Written, blocks_of, drain, wait_all
from dualblade.tuning import Mode


class Piece(NamedTuple):
    """A part of a tensor, and the memory for it."""

    which: int
    """Of the tensors that are read or written together."""
    start: int
    stop: int
    """Bytes of the tensor. Parts begin where a checksum does, but for the first one."""
    memory: Any


WritePiece = tuple[Entry, Request, Any]
"""Of an entry what is written where, and an array for its checksums."""


class Part(NamedTuple):
    """What is wanted of a tensor."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    """A dtype tag."""
    start: int
    stop: int
    """Bytes of the tensor."""


class Parts(EntryTransfer):
    """Reads and writes tensors in parts that somebody else cuts."""

    _create: Callable[..., list[Entry]]
    """The store's: entries for a put, placed."""
    _ticket: Callable[..., Ticket]
    _starting: Callable[..., _core.Bracket]

    @property
    def chunk_bytes(self) -> int:
        """What one checksum covers: parts begin at multiples of it."""
        return self._index.chunk_bytes

    def register_memory(self, memory: Any) -> int:
        """Has the kernel know memory that will be read into and written from again and again.
        Returns how much of it is."""
        return self._device.register([memory])

    def unregister_memory(self, memory: Any) -> None:
        """Takes that back."""
        with contextlib.suppress(ClosedError):  # the device has let go of it already
            self._device.unregister([memory])

    def hold_parts(self, wanted: Sequence[Wanted], *, wait: bool) -> Reading | None:
        """Holds tensors as they are now, to be read in parts until `end()`.

        None without `wait` where somebody is about to change one: who holds others as well must not
        wait for that. Raises KeyNotFoundError, ClosedError. Not for the main thread: an interrupt
        would leave the tensors held.
        """
        operation = Operation()
        keys = [key for key, _, _ in wanted]
        try:
            if wait:
                entries = self._hold(operation, keys, IS_EXCLUSIVE)
            else:
                with self._lock:
                    self._check_open()
                    if self._puts_of(keys):
                        return None
                    entries = self._index.find_all(keys)
                    if any(map(IS_EXCLUSIVE, entries)):
                        return None
                    self._operations[operation] = None
                    self._take(operation, entries)
            with self._lock:
                parts = [
                    _part(entry, start, stop)
                    for entry, (_, start, stop) in zip(entries, wanted, strict=True)
                ]
                # For good: while somebody holds it a tensor does not leave the page cache, and what
                # was read past it stays true when it goes there; also of a replaced one.
                paths = self._paths_of(entries)
                return Reading(
                    parts,
                    partial(self._read_pieces, entries, paths),
                    partial(self._end, operation),
                )
        except BaseException:
            self._end(operation)
            raise

    @inside
    def put_parts(
        self,
        tensors: Mapping[str, tuple[tuple[int, ...], str]],
        group: str | None,
        start: Callable[[Writing], Any],
    ) -> Ticket:
        """Makes room for tensors, `{key: (shape, dtype tag)}`, and has `start` begin to write them.

        What `start` returns has begin(), wait(timeout), which raises what went wrong, and done().
        When it is done the ticket publishes all of them, or after an error none. Raises
        NoSpaceError.
        """
        named = {check_name(key): (None, *about) for key, about in tensors.items()}
        name = None if group is None else check_name(group)
        operation = Operation()
        under_way: list[Any] = []
        writings: list[Writing] = []

        def finish(error: BaseException | None) -> None:
            if error is not None:
                raise error
            for writing in writings:
                self._finish_writes(writing.written())
            operation.is_written = True  # so that the end publishes them

        ticket = self._ticket(under_way, finish, operation)
        with self._starting(operation, ticket, under_way):
            entries = self._create(operation, named, name)
            paths = self._paths_of(entries)
            writings.append(Writing(entries, paths, self._write_pieces))
            under_way.append(start(writings[0]))
            self._register(operation, ticket, named)
            under_way[0].begin()  # last: what is begun before it is registered has no owner
        return ticket

    def pipeline(
        self,
        device: str | Any = "cpu",
        *,
        staging: str | int | None = None,
        depth: int | None = None,
        chunk_bytes: int | None = None,
        mode: Mode | None = None,
    ) -> Pipeline:
        """Groups of tensors to a device and back, the next ones on their way while it computes::

            with store.pipeline(device="cuda") as pipe:
                for arrays in pipe.stream(groups_of_keys): ...

        device       "cuda", "cuda:1", or "cpu": then arrays are numpy's
        staging      memory between the drive and the device, "64MiB"; None: as much, or a quarter
                     of the memory budget if that is less
        depth        chunks under way at once on each path; None: found by trying
        chunk_bytes  of 1 MiB or more; None: found by trying
        mode         "intra": the tensors of a group take turns, "cross": one goes after the other;
                     None: found by trying

        Raises UnsupportedError where there is no such device, with what to install.
        """
        if isinstance(device, str):
            device = open_device(device)
        staging_bytes = STAGING_BYTES if staging is None else parse_size(staging)
        if staging is None:
            room = max(STAGING_LEAST_BYTES, self._residency.budget_bytes // 4)
            staging_bytes = min(staging_bytes, room)
        return Pipeline(
            self,
            device,
            staging_bytes=staging_bytes,
            depth=depth,
            chunk_bytes=chunk_bytes,
            mode=mode,
        )

    # ---- what Reading and Writing do ----------------------------------------------------------

    def _read_pieces(
        self, entries: Sequence[Entry], paths: Sequence[PathName], pieces: Iterable[Piece]
    ) -> PartRead:
        plans = {path: ReadPlan(self._verify == "always") for path in self._paths}
        with self._lock:  # rows may be appended meanwhile
            for which, start, stop, memory in pieces:
                plans[paths[which]].add(entries[which], start, stop, memoryview(memory))
        read = PartRead(entries, self._raise)
        try:
            self._start_reads(plans, read.completions, ahead=True)
        except BaseException:
            drain(read.completions)
            raise
        for plan in plans.values():
            read.copies += plan.finish
        return read

    def _write_pieces(self, path: PathName, pieces: Iterable[WritePiece]) -> _core.Completion:
        entries, requests, checksums = map(list, zip(*pieces, strict=True))
        if path in self._buffered:
            self._doubts.mark(entries)
        if self._write_back is None or path == "direct":
            return self._paths[path].write(requests, checksums)
        # A copy in memory, and waited for: nobody is to wait for room that this thread would give.
        writer = object()
        under_way: list[_core.Completion] = []
        try:
            self._admit(writer, blocks_of(requests), under_way)
            under_way.append(self._paths[path].write(requests, checksums))
            under_way[0].wait()
        finally:
            drain(under_way)
            self._write_back.written(writer)
        return under_way[0]

    def _paths_of(self, entries: Iterable[Entry]) -> list[PathName]:
        groups = self._residency.groups
        return [groups[entry.group].path for entry in entries]


class Reading:
    """Tensors that are held while they are read in parts.

    Whatever is appended, put or deleted meanwhile, they are read as they were in the beginning.
    """

    def __init__(
        self,
        parts: list[Part],
        read: Callable[[Iterable[Piece]], PartRead],
        end: Callable[[], None],
    ) -> None:
        self.parts = parts
        self.read = read
        """Starts reading pieces."""
        self.end = end
        """Lets go of the tensors, once nothing is under way."""


class PartRead:
    """Pieces on their way."""

    def __init__(
        self,
        entries: Sequence[Entry],
        raise_error: Callable[[BaseException, Sequence[Entry]], NoReturn],
    ) -> None:
        self.completions: list[_core.Completion] = []
        self.copies: list[Callable[[], None]] = []
        """What is to be done when they have come."""
        self._entries = entries
        self._raise_error = raise_error

    def wait(self) -> None:
        """Returns when all is there and compared with its checksums. After an error nothing is
        under way any more."""
        try:
            wait_all(self.completions)
        except Exception as error:  # noqa: BLE001  raised again, with the key of the tensor
            drain(self.completions)
            self._raise_error(error, self._entries)
        for copy in self.copies:
            copy()


class Writing:
    """Tensors that have room and are written in parts; nobody sees them yet."""

    def __init__(
        self,
        entries: list[Entry],
        paths: list[PathName],
        write: Callable[[PathName, Iterable[WritePiece]], _core.Completion],
    ) -> None:
        self._entries = entries
        self._paths = paths
        self._write = write
        self._checksums = [
            np.zeros(entry.layout.checksums_bytes // CHECKSUM_BYTES, np.uint64) for entry in entries
        ]

    @property
    def parts(self) -> list[Part]:
        """All of them, whole."""
        return [
            Part(entry.key, entry.layout.shape, entry.layout.dtype, 0, entry.layout.nbytes)
            for entry in self._entries
        ]

    def write(self, pieces: Iterable[Piece]) -> list[_core.Completion]:
        """Starts writing parts, each of them from where a checksum begins to where one ends."""
        by_path: dict[PathName, list[WritePiece]] = {}
        for which, start, stop, memory in pieces:
            entry = self._entries[which]
            chunk_bytes = entry.layout.chunk_bytes
            checksums = self._checksums[which][start // chunk_bytes : -(-stop // chunk_bytes)]
            request = (entry.offset + start, memory)
            by_path.setdefault(self._paths[which], []).append((entry, request, checksums))
        completions: list[_core.Completion] = []
        try:
            for path, members in by_path.items():
                completions.append(self._write(path, members))
        except BaseException:
            drain(completions)
            raise
        return completions

    def written(self) -> list[Written]:
        """What the store takes in when all has been written."""
        return [
            Written([entry], bytearray(checksums.tobytes()))
            for entry, checksums in zip(self._entries, self._checksums, strict=True)
        ]


def _part(entry: Entry, start: int | None, stop: int | None) -> Part:
    layout = entry.layout
    if start is None and stop is None:
        return Part(entry.key, entry.shape, layout.dtype, 0, entry.nbytes)
    if not layout.shape:
        raise ValueError(f"{entry.key!r} has no axis to read rows of: ask for all of it")
    first, last, _ = slice(start, stop).indices(entry.rows)
    last = max(first, last)
    shape = (last - first, *layout.shape[1:])
    return Part(entry.key, shape, layout.dtype, first * layout.row_bytes, last * layout.row_bytes)
