"""The bytes of entries on their way between memory and the device, under TensorStore.

Every method here is called by an operation that holds its entries (access.py).
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dualblade import _core, tensor
from dualblade.access import EntryAccess, Operation
from dualblade.catalog import Catalog
from dualblade.doubts import Doubts
from dualblade.entry import CHECKSUM_BYTES, Entry, ReadPlan, footprint_of, take_checksums
from dualblade.errors import CorruptionError, DeviceError, UnsupportedError, device_error
from dualblade.index import Index
from dualblade.paths import Request, open_paths
from dualblade.residency import PathName, Residency
from dualblade.writeback import WriteBack

SUBMIT_REQUESTS = 64
"""So many are handed over at a time: the device works on the first while others are prepared."""
RUN_BYTES = 256 << 10
"""A drive with data placement keeps shorter writes to growing tensors, tokens of all layers in
turn, apart from longer ones, whole prompts."""
COPY_BYTES = 4 << 20
"""How much of a tensor is in memory at a time while it moves to another extent."""
SURE_ATTEMPTS = 3
"""A write-back that fails meanwhile may have been of another tensor: then it is tried again."""

AppendEnd = tuple[Entry, _core.Tail, bytes, int, bytes, int]
"""What is true of an entry once rows are appended: its tail, checksums, stored, held and rows."""


class EntryTransfer(EntryAccess):
    """Reads, writes, appends to, shortens and copies entries, on the path of their group."""

    def __init__(
        self,
        device: _core.Device,
        index: Index,
        catalog: Catalog,
        residency: Residency,
        *,
        verify: str,
    ) -> None:
        super().__init__(index, catalog, residency)
        self._device = device
        self._paths = open_paths(device)
        self._buffered = ("pagecache",) if device.info.direct else ("pagecache", "direct")
        """The paths on which a write that has been done may still fail."""
        self._doubts = Doubts(device)
        self._write_back: WriteBack | None = None
        """Where there is one, it is told of all that is written into the page cache."""
        self._dirty_waits = 0
        """How often a writer had to wait for what is dirty."""
        self._past_bytes = 0
        """Of page-cached entries, written past the page cache."""
        self._verify = verify
        self._corruptions = 0

    def forget_after_fork(self) -> None:
        """In the child after a fork: the store is the parent's, and its locks may be held there."""
        super().forget_after_fork()
        self._doubts.forget_after_fork()

    # ---- transfers --------------------------------------------------------------------------

    def _start_reads(
        self,
        plans: Mapping[PathName, ReadPlan],
        completions: list[_core.Completion],
        *,
        ahead: bool = False,
    ) -> None:
        """Starts what was planned for each path; adds to `completions` as it is started."""
        for name, plan in plans.items():
            for first in range(0, len(plan.requests), SUBMIT_REQUESTS):
                part = slice(first, first + SUBMIT_REQUESTS)
                checksums = b"".join(plan.checksums[part]) if plan.verify else None
                requests = plan.requests[part]
                completions.append(self._paths[name].read(requests, checksums, ahead=ahead))

    def _start_writes(
        self,
        writes: Iterable[tuple[Entry, Any]],
        completions: list[_core.Completion],
        operation: Operation,
    ) -> list[Written]:
        """Starts writing whole entries, `(entry, memory)`; adds to `completions` as it goes.

        What it returns is for `_finish_writes` once all have been written.
        """
        written = []
        for name, members in self._by_path(writes).items():
            for first in range(0, len(members), SUBMIT_REQUESTS):
                part = members[first : first + SUBMIT_REQUESTS]
                entries = [entry for entry, _ in part]
                checksums = bytearray(sum([entry.layout.checksums_bytes for entry in entries]))
                if name in self._buffered:
                    self._doubts.mark(entries)
                if self._write_back is not None and name == "pagecache":
                    self._start_admitted(part, checksums, completions, operation)
                else:
                    requests = [(entry.offset, memory) for entry, memory in part]
                    completions.append(self._paths[name].write(requests, checksums))
                written.append(Written(entries, checksums))
        return written

    def _start_admitted(
        self,
        members: Sequence[tuple[Entry, Any]],
        checksums: bytearray,
        completions: list[_core.Completion],
        operation: Operation,
    ) -> None:
        """Starts writing whole entries into the page cache, as the dirty bound lets them in."""
        assert self._write_back is not None
        chunk_bytes = self._index.chunk_bytes
        part_bytes = max(chunk_bytes, self._write_back.part_bytes // chunk_bytes * chunk_bytes)
        path = self._paths["pagecache"]
        if sum([entry.layout.extent_bytes for entry, _ in members]) <= part_bytes:
            extents = [(entry.offset, entry.layout.extent_bytes) for entry, _ in members]
            self._admit(id(operation), extents, completions)
            requests = [(entry.offset, memory) for entry, memory in members]
            completions.append(path.write(requests, checksums))
            return
        whole = [(entry.offset, _bytes_of(memory)) for entry, memory in members]
        sums = np.frombuffer(checksums, np.uint64)
        for part in parts_of(whole, part_bytes):
            self._admit(id(operation), blocks_of(part), completions)
            count = sum([-(-len(data) // chunk_bytes) for _, data in part])
            completions.append(path.write(part, sums[:count]))
            sums = sums[count:]

    def _finish_writes(self, written: Iterable[Written]) -> None:
        """Takes in that whole entries have been written."""
        for entries, checksums in written:
            take_checksums(entries, checksums)

    def _admit(
        self,
        writer: object,
        ranges: Sequence[tuple[int, int]],
        completions: Iterable[_core.Completion],
    ) -> None:
        """Returns when a writer, whose `completions` are under way, may make these ranges dirty."""
        write_back = self._write_back
        assert write_back is not None
        # What is being written can't be written back before it is known that this is over.
        if write_back.is_due(writer):
            wait_all(completions)
            write_back.written(writer)
        if write_back.admit(writer, ranges):
            return
        self._dirty_waits += 1
        while not write_back.admit(writer, ranges):
            wait_all(completions)
            write_back.written(writer)
            writers = write_back.writers()
            with self._lock:
                operations = list(self._operations)
            for operation in operations:
                if id(operation) in writers and operation.ticket is not None:
                    operation.ticket.settle()
            write_back.await_room(ranges)

    def _end(self, operation: Operation) -> None:
        if self._write_back is not None:
            self._write_back.written(id(operation))
        super()._end(operation)

    def _by_path(
        self, members: Iterable[tuple[Entry, Any]]
    ) -> dict[PathName, list[tuple[Entry, Any]]]:
        groups = self._residency.groups
        by_path: dict[PathName, list[tuple[Entry, Any]]] = {name: [] for name in self._paths}
        for member in members:
            by_path[groups[member[0].group].path].append(member)
        return by_path

    def _write(self, writes: Iterable[tuple[Entry, Request]]) -> None:
        """Writes parts of entries and waits for it. After an error nothing is under way."""
        completions: list[_core.Completion] = []
        writer = object()

        def end() -> None:
            drain(completions)
            if self._write_back is not None:
                self._write_back.written(writer)

        with _core.Bracket(lambda: None, end):
            self._start_parts(writes, completions, writer)
            wait_all(completions)

    def _start_placed(
        self, name: PathName, requests: list[Request], completions: list[_core.Completion]
    ) -> None:
        """Starts writing parts of entries where nothing limits what is dirty."""
        if not self._device.info.placement:
            completions.append(self._paths[name].write(requests, None))
            return
        for is_tail in (False, True):
            some = [request for request in requests if (len(request[1]) < RUN_BYTES) == is_tail]
            if some:
                completions.append(self._paths[name].write(some, None, tail=is_tail))

    def _start_parts(
        self,
        writes: Iterable[tuple[Entry, Request]],
        completions: list[_core.Completion],
        writer: object,
    ) -> None:
        """Starts writing parts of entries; adds to `completions` as it goes. Once they are over,
        however they end, the write-back is to be told of this writer."""
        by_path = self._by_path(writes)
        through, past = self._part_by_pace(by_path["pagecache"])
        by_path |= {"pagecache": through, "direct": by_path["direct"] + past}
        for name, members in by_path.items():
            requests = [request for _, request in members]
            if not requests:
                continue
            if name in self._buffered:
                self._doubts.mark([entry for entry, _ in members])
            if self._write_back is None or name == "direct":
                self._start_placed(name, requests, completions)
                continue
            for part in parts_of(requests, self._write_back.part_bytes):
                self._admit(writer, blocks_of(part), completions)
                completions.append(self._paths[name].write(part, None))

    def _part_by_pace(
        self, members: list[tuple[Entry, Request]]
    ) -> tuple[list[tuple[Entry, Request]], list[tuple[Entry, Request]]]:
        """Of writes to page-cached entries, those that go through the page cache, and those that go
        past it: whole prompts that come faster than they could be written back. They are read
        from the device the first time, and kept from then on."""
        write_back = self._write_back
        # No generator: an interrupt within one is reported, and not raised.
        is_long = max([len(data) for _, (_, data) in members], default=0) >= RUN_BYTES
        if write_back is None or not (is_long and self._device.info.direct):
            return members, []
        if not write_back.is_behind():
            return members, []
        through, past = [], []
        for entry, (offset, data) in members:
            is_past = len(data) >= RUN_BYTES and self._is_cold(offset, len(data))
            (past if is_past else through).append((entry, (offset, data)))
        # Cut off before, perhaps: what is read of them from now on stays.
        write_back.reused(blocks_of([request for _, request in past]))
        self._past_bytes += sum([len(data) for _, (_, data) in past])
        return through, past

    def _is_cold(self, offset: int, length: int) -> bool:
        """Whether the page cache has nothing of a range, as far as that is known."""
        try:
            return self._device.cached_bytes(offset, length)[0] == 0
        except UnsupportedError:
            return False

    def _read_bytes(
        self,
        entry: Entry,
        start: int,
        stop: int,
        *,
        verify: bool | None = None,
        memory: np.ndarray[Any, Any] | None = None,
    ) -> np.ndarray[Any, Any]:
        """Bytes on the device of an entry that the caller holds, in new memory or in `memory`."""
        if verify is None:
            verify = self._verify != "never" or self._doubts.is_open
        if memory is None:
            memory = _core.aligned_empty(stop - start, np.uint8)
        plan = ReadPlan(verify)
        with self._lock:  # rows may be appended meanwhile
            plan.add(entry, start, stop, memoryview(memory))
        completions: list[_core.Completion] = []
        try:
            self._start_reads({self._residency.path_of(entry.group): plan}, completions)
            wait_all(completions)
        except BaseException as error:
            drain(completions)
            if isinstance(error, CorruptionError):
                self._raise(error, [entry])
            raise
        for copy in plan.finish:
            copy()
        return memory

    def _raise(self, error: BaseException, entries: Sequence[Entry]) -> NoReturn:
        """Raises it, with the key of the tensor that it is about where it is corrupt."""
        if isinstance(error, CorruptionError):
            with self._lock:
                self._corruptions += 1
            offset = getattr(error, "offset", None)
            for entry in entries:
                if offset is not None and 0 <= offset - entry.offset < entry.layout.extent_bytes:
                    raise CorruptionError(
                        f"tensor {entry.key!r} is corrupt: {error}. Nothing was returned; "
                        f"delete it or put it again"
                    ) from error
        raise error

    # ---- what the drive may not have --------------------------------------------------------

    def _make_sure(self, entries: Iterable[Entry]) -> None:
        """Returns when the drive has all that was written of entries that nobody else changes.

        DeviceError: it does not take it. CorruptionError: a write-back of it failed, and the page
        cache does not hold it any more.
        """
        for entry in entries:
            for attempt in range(SURE_ATTEMPTS):
                problem = self._try_to_make_sure(entry) if entry.unsure_since else None
                if problem is None:
                    break
                if attempt == SURE_ATTEMPTS - 1:
                    raise problem

    def _try_to_make_sure(self, entry: Entry) -> Exception | None:
        failures = self._doubts.look()
        place = {"offset": entry.offset, "length": entry.layout.extent_bytes}
        try:
            if self._doubts.has(entry):
                # What the kernel takes for clean is written again, if it is what it should be.
                for start in range(0, entry.stored, COPY_BYTES):
                    stop = min(start + COPY_BYTES, entry.stored)
                    data = self._read_bytes(entry, start, stop, verify=True)
                    self._write([(entry, (entry.offset + start, data))])
            self._device.write_back(**place, wait=True)
        except DeviceError as error:
            return error
        if self._doubts.settle([entry], entry.unsure_until, failures):
            return None
        return device_error(
            errno.EIO, device=self._device.info.target, operation="write back", **place
        )

    # ---- the end of an entry ----------------------------------------------------------------

    def _claim(
        self, entries: Sequence[Entry], parts: Sequence[tensor.Tensor], *, is_forced: bool = False
    ) -> dict[str, int]:
        """Accounts what is about to be appended, unless the memory budget has no room for that:
        then it does nothing, and says by how much each page-cached group would grow."""
        grown = [
            (entry, max(entry.footprint, footprint_of(entry.nbytes + part.data.nbytes)))
            for entry, part in zip(entries, parts, strict=True)
        ]
        with self._lock:
            groups = self._residency.groups
            growth: dict[str, int] = {}
            for entry, footprint in grown:
                if groups[entry.group].path == "pagecache":
                    growth_bytes = footprint - entry.footprint
                    growth[entry.group] = growth.get(entry.group, 0) + growth_bytes
            if not is_forced and not self._residency.has_room(sum(growth.values())):
                return growth
            for entry, footprint in grown:
                self._index.account(entry, footprint, self._residency)
            return {}

    def _append(self, entries: list[Entry], parts: list[tensor.Tensor]) -> None:
        writes, ends = self._plan_append(entries, parts)
        self._write(writes)
        self._end_append(ends)

    def _plan_append(
        self,
        entries: list[Entry],
        parts: list[tensor.Tensor],
        copies: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[list[tuple[Entry, Request]], list[AppendEnd]]:
        """What has to be written to append rows, and what is true when it has been: readers see
        the rows after `_end_append()` of that. It is written from `copies` where there are any."""
        with self._lock:
            self._index.mark_dirty(self._catalog)
        writes, ends = [], []
        for entry, part in zip(entries, parts, strict=True):
            # Taken from the entry until all is well: what is stored is not touched, and after an
            # error or an interrupt the next append finds again where to go on.
            tail, entry.tail = self._tail_of(entry), None
            tail_write = tail.append(part.data, copies.get(entry.key))
            for offset, data in tail_write.requests:
                writes.append((entry, (entry.offset + offset, data)))
            checksums = entry.checksums
            if len(tail_write.digests):
                whole = checksums[: tail_write.first_chunk * CHECKSUM_BYTES]
                checksums = whole + tail_write.digests.tobytes()
            held = bytes(tail.block()[: tail.held])
            rows = entry.rows + part.shape[0]
            ends.append((entry, tail, checksums, tail.stored, held, rows))
        return writes, ends

    def _end_append(self, ends: Iterable[AppendEnd]) -> None:
        """Publishes what has been appended."""
        with self._lock:
            for entry, tail, checksums, stored, held, rows in ends:
                self._index.changed(entry)
                # Assignments alone: no interrupt comes between them.
                entry.checksums = checksums
                entry.stored, entry.held, entry.rows, entry.tail = stored, held, rows, tail

    def _tail_of(self, entry: Entry) -> _core.Tail:
        """Where appends to an entry go on, found again if need be by reading its last chunk."""
        if entry.tail is not None:
            return entry.tail
        if entry.stored % _core.BLOCK_BYTES:
            end = self._cut(entry, entry.nbytes)
            with self._lock:
                self._set_end(entry, *end)
        chunk_bytes = entry.layout.chunk_bytes
        begun = entry.stored % chunk_bytes
        tail = _core.Tail(chunk_bytes)
        tail.reset(entry.stored, self._read_bytes(entry, entry.stored - begun, entry.stored))
        tail.append(entry.held)
        entry.tail = tail
        return tail

    def _cut(self, entry: Entry, nbytes: int) -> tuple[int, bytes, bytes]:
        """(stored, held, checksums) of an entry that keeps `nbytes` bytes."""
        if nbytes >= entry.stored and entry.stored % _core.BLOCK_BYTES == 0:
            return entry.stored, entry.held[: nbytes - entry.stored], entry.checksums
        chunk_bytes = entry.layout.chunk_bytes
        stored = nbytes // _core.BLOCK_BYTES * _core.BLOCK_BYTES
        first = stored // chunk_bytes * chunk_bytes
        checksums = entry.checksums[: first // chunk_bytes * CHECKSUM_BYTES]
        if nbytes == first:  # nothing of a chunk is kept in part, so nothing has to be read
            return stored, b"", checksums
        chunk = self._read_bytes(entry, first, min(first + chunk_bytes, entry.stored))
        if stored > first:
            checksums += _core.checksum(chunk[: stored - first]).to_bytes(
                CHECKSUM_BYTES, sys.byteorder
            )
        return stored, bytes(chunk[stored - first : nbytes - first]), checksums

    def _cut_off(self, entry: Entry) -> None:
        """What an entry no longer needs of its extent need not stay in the page cache."""
        before, kept = entry.footprint, footprint_of(entry.nbytes)
        is_cached = self._residency.path_of(entry.group) == "pagecache"
        self._index.account(entry, kept, self._residency)
        if is_cached and kept < before and self._write_back is not None:
            self._write_back.freed([(entry.offset + kept, before - kept)])

    def _set_end(self, entry: Entry, stored: int, held: bytes, checksums: bytes) -> None:
        entry.stored, entry.held, entry.checksums, entry.tail = stored, held, checksums, None
        self._index.changed(entry)

    def _copy(self, entry: Entry, copy: Entry) -> None:
        stored, held, checksums = self._cut(entry, entry.nbytes)
        for start in range(0, stored, COPY_BYTES):
            data = self._read_bytes(entry, start, min(start + COPY_BYTES, stored))
            self._write([(copy, (copy.offset + start, data))])
        copy.rows, copy.stored, copy.held, copy.checksums = entry.rows, stored, held, checksums


class Written(NamedTuple):
    """Entries that are being written whole, and where their checksums will be."""

    entries: list[Entry]
    checksums: bytearray


def _bytes_of(memory: Any) -> Any:
    """What `tensor.memory_of` gave, as bytes that can be cut."""
    return tensor.describe(memory).data if isinstance(memory, np.ndarray) else memory


def blocks_of(requests: Iterable[Request]) -> list[tuple[int, int]]:
    """The ranges that these make dirty."""
    return [(offset, footprint_of(len(data))) for offset, data in requests]


def parts_of(requests: Iterable[Request], part_bytes: int) -> Iterator[list[Request]]:
    """Requests of bytes in their order, cut and put together to parts of at most so many bytes."""
    requests = list(requests)
    if sum([len(data) for _, data in requests]) <= part_bytes:
        yield requests
        return
    part: list[Request] = []
    room = part_bytes
    for offset, data in requests:
        view = memoryview(data)
        for start in range(0, len(view), part_bytes):
            piece = view[start : start + part_bytes]
            if len(piece) > room:
                yield part
                part, room = [], part_bytes
            part.append((offset + start, piece))
            room -= len(piece)
    if part:
        yield part


def wait_all(completions: Iterable[_core.Completion]) -> None:
    """Waits for all of them, or until one fails."""
    for completion in completions:
        completion.wait()


def drain(completions: Iterable[_core.Completion]) -> None:
    """Waits, whatever happens: what is in flight still uses extents that are about to be freed."""
    for completion in completions:
        while not completion.done():
            try:
                completion.wait()
            except BaseException:  # noqa: BLE001
                continue  # its error, or an interrupt: the caller is raising one already
