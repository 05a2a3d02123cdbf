"""The index of a store in memory: which tensor lies in which extent, and what has changed since it
was last saved. The store's lock guards every call."""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dualblade import _core
from dualblade.catalog import Catalog, Record
from dualblade.entry import CHECKSUM_BYTES, Entry, footprint_of, layout_of
from dualblade.errors import CorruptionError, KeyNotFoundError, NoSpaceError
from dualblade.memory import format_size
from dualblade.residency import Residency

ROOM_ERRORS = (NoSpaceError, ValueError, OverflowError)
"""What the extent map says of a length that it has no room for, or that no device has."""
LARGE_BYTES = 1 << 20
LARGE_ALIGN_BYTES = 64 << 10
"""Large extents start at a multiple of what drives read at once: a start that is not costs up to a
fifth of the bandwidth (measured on flash drives with 16 KiB and larger indirection units)."""


class Index:
    """Entries by key, over one map of extents in [data_offset, size_bytes)."""

    def __init__(
        self, size_bytes: int, data_offset: int, chunk_bytes: int, *, is_striped: bool = False
    ) -> None:
        self.entries: dict[str, Entry] = {}
        self.extents = _core.ExtentMap(size_bytes, _core.BLOCK_BYTES)
        self.extents.reserve(0, data_offset)
        self.version = 0
        """Counts changes, so that a save can tell whether there were some meanwhile."""
        self.is_clean = True
        self.chunk_bytes = chunk_bytes
        self._data_offset = data_offset
        self._is_striped = is_striped
        self._used_bytes = 0
        self.kept: dict[Entry, None] = {}
        """Deleted or replaced, but still in use."""
        self.viewed_bytes = 0
        """Of the extents that callers have mapped."""
        self._changed: dict[str, None] = {}
        self._deleted: dict[str, None] = {}
        self.freed: list[tuple[int, int]] | None = None
        """Extents, (offset, bytes), that were page-cached when they were freed, if anybody takes
        them from here. An interrupt may leave one here twice."""
        self.erase: Callable[[int, int], None] | None = None
        """Called with the offset and the bytes of every extent before it is free."""
        self._taken: tuple[dict[str, None], dict[str, None]] = {}, {}
        """What a save is under way with."""

    @property
    def used_bytes(self) -> int:
        """Of all extents."""
        return self._used_bytes

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, key: str) -> Entry:
        """The entry of a key. Raises KeyNotFoundError."""
        return self.find_all([key])[0]

    def find_all(self, keys: Iterable[str]) -> list[Entry]:
        """The entries of keys, in their order. Raises KeyNotFoundError."""
        entries = self.entries
        try:
            return [entries[key] for key in keys]
        except KeyError as error:
            (key,) = error.args
            raise KeyNotFoundError(f"there is no tensor {key!r} in this store") from None

    def replaced_by(self, keys: Mapping[str, Any]) -> list[Entry]:
        """The entries that have to go when these keys are stored."""
        if self.entries.keys().isdisjoint(keys):
            return []
        return [self.entries[key] for key in keys if key in self.entries]

    def of_group(self, group: str) -> list[Entry]:
        """The entries of a group, which may not exist."""
        return [entry for entry in list(self.entries.values()) if entry.group == group]

    def viewed_groups(self) -> set[str]:
        """The groups that callers have tensors of mapped, those deleted or replaced included."""
        entries = itertools.chain(list(self.entries.values()), list(self.kept))
        return {entry.group for entry in entries if entry.views}

    # ---- entries come and go ----------------------------------------------------------------

    def place(self, entries: Sequence[Entry], residency: Residency, *, one_run: bool) -> None:
        """Gives new entries, not yet to be found by key, room for their capacity.

        With `one_run` their extents lie side by side. Raises NoSpaceError, and then none has any.
        """
        sizes = [entry.layout.extent_bytes for entry in entries]
        plan = residency.plan(
            [(entry.group, entry.layout.extent_bytes, entry.footprint) for entry in entries]
        )
        total = sum(sizes)
        runs = [total] if one_run else sizes
        runs = [size for size in runs if size]
        aligns = [self._align(size) for size in runs]
        offsets: list[int] = []
        is_accounted = False
        try:
            # One call into C: an interrupt finds every extent that it took in the list.
            offsets.extend(map(self.extents.allocate, runs, aligns))
            self._assign(entries, offsets, one_run)
            self._used_bytes += total
            _, residency.pagecache_bytes, residency.claimed_bytes, residency.stored_bytes = plan
            is_accounted = True  # nothing can be interrupted since the sum, until after this
            residency.groups.update(plan.groups)
        except BaseException as error:
            if is_accounted:
                self.discard(entries, residency)
                raise
            for entry in entries:
                entry.is_placed = False
            for offset, size in zip(offsets, runs, strict=False):
                self.extents.free(offset, size)
            if isinstance(error, ROOM_ERRORS):
                raise self._no_room(runs[len(offsets)]) from None
            raise

    def _assign(self, entries: Iterable[Entry], offsets: Iterable[int], one_run: bool) -> None:
        """Tells entries where they are."""
        following = iter(offsets)
        offset = next(following, 0) if one_run else 0
        for entry in entries:
            size = entry.layout.extent_bytes
            entry.offset = offset if one_run else next(following) if size else 0
            entry.is_placed = True
            offset += size

    def _align(self, size: int) -> int:
        if self._is_striped:
            # No request is to be on two members: a stripe unit is some chunks.
            return min(1 << (size - 1).bit_length(), self.chunk_bytes)
        return LARGE_ALIGN_BYTES if size >= LARGE_BYTES else 0

    def _no_room(self, size_bytes: int) -> NoSpaceError:
        return NoSpaceError(
            f"no room for {format_size(size_bytes)} in one run: "
            f"{format_size(self.extents.free_bytes)} of "
            f"{format_size(self.extents.total_bytes)} are free, the largest run is "
            f"{format_size(self.extents.largest_free_bytes)}; delete tensors, or make a "
            f"larger store"
        )

    # Each of these does nothing for what it has been done for, so that one which an interrupt cut
    # short can be done again.

    def publish(
        self, entries: Sequence[Entry], replaced: Iterable[Entry], residency: Residency
    ) -> None:
        """The entries are what their keys find from now on; what they replace is let go."""
        new = {entry.key: entry for entry in entries}
        self.entries.update(new)
        self._changed.update(dict.fromkeys(new))
        self.version += 1
        for old in replaced:
            self._retire(old, residency)

    def remove(self, entries: Iterable[Entry], residency: Residency) -> None:
        """Their keys find nothing from now on."""
        for entry in entries:
            if self.entries.get(entry.key) is entry:
                del self.entries[entry.key]
            self.version += 1
            self._changed.pop(entry.key, None)
            self._deleted[entry.key] = None
            self._retire(entry, residency)

    def discard(self, entries: Iterable[Entry], residency: Residency) -> None:
        """Gives back the room of entries that were never published."""
        for entry in entries:
            self._free(entry, residency)

    def _retire(self, entry: Entry, residency: Residency) -> None:
        entry.is_dead = True
        if entry.is_placed:
            self.kept[entry] = None
        if entry.users == 0:
            self._free(entry, residency)

    def release(
        self,
        entries: list[Entry],
        residency: Residency,
        *,
        is_appending: bool,
        is_exclusive: bool,
    ) -> None:
        """One user fewer of each, which it takes off the list; the last one of a dead entry frees
        its extent."""
        while entries:
            entry = entries[-1]
            if entry.is_dead and entry.users == 1:
                self._free(entry, residency)
            # No call, no interrupt until it is off the list.
            if is_appending:
                entry.is_appending = False
            if is_exclusive:
                entry.is_exclusive = False
            entry.users -= 1
            del entries[-1]

    def release_views(self, entries: list[Entry], residency: Residency) -> None:
        """One view fewer of each, as `release`. A signal handler may do the same to the same list
        in the midst of it."""
        while entries:
            entry = entries[-1]
            if entry.is_dead and entry.users == 1 and entry.is_placed:
                self._free(entry, residency)
                continue  # and look again
            entry.views -= 1
            if entry.views == 0:
                self.viewed_bytes -= entry.layout.extent_bytes
            entry.users -= 1
            del entries[-1]

    def _free(self, entry: Entry, residency: Residency) -> None:
        size_bytes = entry.layout.extent_bytes
        free = self.extents.free
        self.kept.pop(entry, None)
        if not entry.is_placed:
            return
        if self.freed is not None and residency.groups[entry.group].path == "pagecache":
            self.freed.append((entry.offset, size_bytes))
        if self.erase is not None and size_bytes:
            self.erase(entry.offset, size_bytes)
        group = residency.groups[entry.group]
        if group.tensors == 1:
            residency.filling.pop(entry.group, None)
        # From here to the call into C is no other, so no interrupt.
        footprint = entry.footprint
        group.size_bytes -= size_bytes
        group.stored_bytes -= footprint
        group.tensors -= 1
        residency.stored_bytes -= footprint
        if group.path == "pagecache":
            residency.pagecache_bytes -= footprint
            residency.claimed_bytes -= size_bytes if group.is_promised else footprint
        if group.tensors == 0:
            del residency.groups[entry.group]
        self._used_bytes -= size_bytes
        entry.is_placed = False
        if size_bytes:
            free(entry.offset, size_bytes)

    def account(self, entry: Entry, footprint: int, residency: Residency) -> None:
        """From now on an entry that is placed has this footprint."""
        growth = footprint - entry.footprint
        if growth == 0:
            return
        group = residency.groups[entry.group]
        # No call: an interrupt comes before or after all of it.
        entry.footprint = footprint
        group.stored_bytes += growth
        residency.stored_bytes += growth
        if group.path == "pagecache":
            residency.pagecache_bytes += growth
        if group.is_promised:
            residency.filling[entry.group] = None
        elif group.path == "pagecache":
            residency.claimed_bytes += growth
            if growth > 0:
                residency.grown_bytes += growth
        if growth < 0:
            residency.shrunk += 1

    def forget(self) -> None:
        """At close: lets go of every entry; the extents stay as they were for the next open."""
        self.entries.clear()

    # ---- saving and loading -----------------------------------------------------------------

    def changed(self, entry: Entry) -> None:
        """What is saved of this entry is no longer true. Of a dead one nothing will be saved."""
        self.version += 1
        if not entry.is_dead:
            self._changed[entry.key] = None

    def mark_dirty(self, catalog: Catalog) -> None:
        """Called before the first change after a save."""
        self.version += 1
        if self.is_clean:
            catalog.mark_dirty()
            self.is_clean = False

    def take_changes(self) -> tuple[list[str], list[str]]:
        """Keys changed and keys deleted since the last call.

        A key that was deleted and then stored anew is both: its record moves to the end.
        """
        # Kept here as well: an interrupt may keep what this returns from its caller.
        taken = changed, deleted = self._changed, self._deleted
        self._taken, self._changed, self._deleted = taken, {}, {}
        return list(changed), list(deleted)

    def restore_changes(self) -> None:
        """Takes back `take_changes` after a save that failed."""
        changed, deleted = self._taken
        still = [key for key in changed if key in self.entries]
        both = dict.fromkeys([*still, *self._changed]), dict.fromkeys([*deleted, *self._deleted])
        self._changed, self._deleted = both
        self._taken = {}, {}

    def saved(self) -> None:
        """What was taken is saved."""
        self._taken = {}, {}

    def record(self, entry: Entry, residency: Residency, last_checksum: int | None) -> Record:
        """What is saved of an entry; `last_checksum` is of its last chunk if bytes are held back.

        The bytes held back were written for this, padded to a block: to whoever loads the record,
        all bytes are on the device.
        """
        layout = entry.layout
        nbytes = entry.nbytes
        checksums = entry.checksums
        if last_checksum is not None:
            whole = (nbytes - 1) // layout.chunk_bytes * CHECKSUM_BYTES
            checksums = checksums[:whole] + last_checksum.to_bytes(CHECKSUM_BYTES, sys.byteorder)
        return Record(
            entry.key,
            layout.dtype,
            layout.shape,
            entry.rows,
            entry.offset,
            layout.extent_bytes,
            nbytes,
            little_endian(checksums),
            entry.group,
            residency.path_of(entry.group),
        )

    def load(self, catalog: Catalog, residency: Residency) -> None:
        """Takes in what a catalog has saved. CorruptionError if it contradicts itself."""
        with collector_paused():
            tensors = [self._load_record(record, catalog) for record in catalog.records()]
            residency.add(tensors)
            residency.bind_anew()

    def _load_record(self, record: Record, catalog: Catalog) -> tuple[str, int, int]:
        """Takes in one; its group, the bytes that it takes, and its footprint."""
        key, dtype, shape, rows, offset, length, stored, checksums, group, _ = record
        layout = layout_of(shape, dtype, self.chunk_bytes)
        if (
            rows > layout.rows
            or stored != rows * layout.row_bytes
            or length != layout.extent_bytes
            or len(checksums) != -(-stored // self.chunk_bytes) * CHECKSUM_BYTES
            or key in self.entries
        ):
            raise CorruptionError(
                f"the catalog {catalog.path} contradicts itself about tensor {key!r}: "
                f"restore it from a backup, or start anew with format=True"
            )
        try:
            if length:
                self.extents.reserve(offset, length)
        except (ValueError, OSError) as error:
            raise CorruptionError(
                f"the catalog {catalog.path} gives tensor {key!r} a place that is another "
                f"tensor's or outside the store: restore it from a backup, or start anew with "
                f"format=True"
            ) from error
        entry = self.entries[key] = Entry(key, layout, group, rows)
        entry.offset = offset
        entry.stored = stored
        entry.footprint = footprint_of(stored)
        entry.is_placed = True
        entry.checksums = little_endian(checksums)
        self._used_bytes += length
        return group, length, entry.footprint

    def check(self) -> list[str]:
        """What is wrong between entries and extents, a sentence each."""
        problems = []
        try:
            self.extents.verify()
        except CorruptionError as error:
            problems.append(f"the extent map is inconsistent: {error}")
        used = self.extents.total_bytes - self.extents.free_bytes - self._data_offset
        if used != self._used_bytes:
            problems.append(f"{used} bytes are taken, but tensors account for {self._used_bytes}")
        runs: list[Any] = sorted(
            (entry.offset, entry.layout.extent_bytes, entry.key)
            for entry in list(self.entries.values())
            if entry.layout.extent_bytes
        )
        for (offset, size, key), (after, _, other) in itertools.pairwise(runs):
            if offset + size > after:
                problems.append(f"tensors {key!r} and {other!r} overlap at byte {after}")
        return problems


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """While many objects are made that all stay: Python's collector would go over all of them again
    and again, and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def little_endian(checksums: bytes) -> bytes:
    """Checksums between the machine's byte order and that of the catalog."""
    if sys.byteorder == "little":
        return checksums
    return b"".join(
        checksums[at : at + CHECKSUM_BYTES][::-1] for at in range(0, len(checksums), CHECKSUM_BYTES)
    )
