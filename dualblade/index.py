"""The index of a store in memory: which tensor lies in which extent, and what has changed since it
was last saved. The store's lock guards every call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dualblade import _core, tensor
from dualblade.catalog import Catalog, Record
from dualblade.entry import Entry, round_up
from dualblade.errors import CorruptionError, KeyNotFoundError, NoSpaceError
from dualblade.memory import format_size
from dualblade.residency import Residency

Spec = tuple[str, tuple[int, ...], str, int]
"""Key, capacity, dtype tag, rows that hold data."""

LARGE_BYTES = 1 << 20
LARGE_ALIGN_BYTES = 64 << 10
"""Large extents start at a multiple of what drives read at once: a start that is not costs up to a
fifth of the bandwidth (measured on flash drives with 16 KiB and larger indirection units)."""


class Index:
    """Entries by key, over one map of extents in [data_offset, size_bytes)."""

    def __init__(self, size_bytes: int, data_offset: int, chunk_bytes: int) -> None:
        self.entries: dict[str, Entry] = {}
        self.extents = _core.ExtentMap(size_bytes, _core.BLOCK_BYTES)
        self.extents.reserve(0, data_offset)
        self.version = 0
        """Counts changes, so that a save can tell whether there were some meanwhile."""
        self.is_clean = True
        self._data_offset = data_offset
        self._chunk_bytes = chunk_bytes
        self._used_bytes = 0
        self._changed: dict[str, None] = {}
        self._deleted: dict[str, None] = {}

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, key: str) -> Entry:
        """The entry of a key. Raises KeyNotFoundError."""
        try:
            return self.entries[key]
        except KeyError:
            raise KeyNotFoundError(f"there is no tensor {key!r} in this store") from None

    def of_group(self, group: str) -> list[Entry]:
        """The entries of a group, which may not exist."""
        return [entry for entry in list(self.entries.values()) if entry.group == group]

    # ---- entries come and go ----------------------------------------------------------------

    def create(
        self, specs: Sequence[Spec], groups: Sequence[str], residency: Residency, *, one_run: bool
    ) -> list[Entry]:
        """New entries with room for their capacity, not yet to be found by key.

        With `one_run` their extents lie side by side. Raises NoSpaceError, and then none is made.
        """
        sizes = [
            round_up(math.prod(shape) * tensor.itemsize(dtype), _core.BLOCK_BYTES)
            for _, shape, dtype, _ in specs
        ]
        offsets = self._allocate_run(sizes) if one_run else self._allocate_each(sizes)
        self._used_bytes += sum(sizes)
        entries = [
            Entry(
                key=key,
                dtype=dtype,
                capacity=shape,
                offset=offset,
                extent_bytes=size,
                group=group,
                chunk_bytes=self._chunk_bytes,
                rows=rows,
                stored=0,
                checksums=np.zeros(-(-size // self._chunk_bytes), np.uint64),
            )
            for (key, shape, dtype, rows), size, offset, group in zip(
                specs, sizes, offsets, groups, strict=True
            )
        ]
        by_group: dict[str, list[int]] = {}
        for group, size in zip(groups, sizes, strict=True):
            by_group.setdefault(group, []).append(size)
        # The known ones first: they are on a path already, and new ones take the room left over.
        for group in sorted(by_group, key=lambda name: name not in residency.groups):
            residency.add(group, by_group[group])
        return entries

    def _allocate_run(self, sizes: Sequence[int]) -> list[int]:
        total = sum(sizes)
        offset = self._allocate(total) if total else 0
        offsets = []
        for size in sizes:
            offsets.append(offset)
            offset += size
        return offsets

    def _allocate_each(self, sizes: Sequence[int]) -> list[int]:
        offsets: list[int] = []
        try:
            for size in sizes:
                offsets.append(self._allocate(size) if size else 0)  # noqa: PERF401  undone below
        except BaseException:
            for offset, size in zip(offsets, sizes, strict=False):
                if size:
                    self.extents.free(offset, size)
            raise
        return offsets

    def _allocate(self, size_bytes: int) -> int:
        try:
            return self.extents.allocate(
                size_bytes, LARGE_ALIGN_BYTES if size_bytes >= LARGE_BYTES else 0
            )
        except (NoSpaceError, ValueError, OverflowError):
            raise NoSpaceError(
                f"no room for {format_size(size_bytes)} in one run: "
                f"{format_size(self.extents.free_bytes)} of "
                f"{format_size(self.extents.total_bytes)} are free, the largest run is "
                f"{format_size(self.extents.largest_free_bytes)}; delete tensors, or make a "
                f"larger store"
            ) from None

    def publish(self, entry: Entry, residency: Residency) -> None:
        """The entry is what its key finds from now on; what it replaces is let go."""
        old = self.entries.get(entry.key)
        self.entries[entry.key] = entry
        self.changed(entry)
        if old is not None:
            self._retire(old, residency)

    def remove(self, entry: Entry, residency: Residency) -> None:
        """The key finds nothing from now on."""
        del self.entries[entry.key]
        self.version += 1
        self._changed.pop(entry.key, None)
        self._deleted[entry.key] = None
        self._retire(entry, residency)

    def discard(self, entry: Entry, residency: Residency) -> None:
        """Gives back the room of an entry that was never published."""
        self._retire(entry, residency)

    def _retire(self, entry: Entry, residency: Residency) -> None:
        entry.is_dead = True
        if entry.users == 0:
            self._free(entry, residency)

    def release(self, entry: Entry, residency: Residency) -> None:
        """One user fewer; the last one of a dead entry frees its extent."""
        entry.users -= 1
        if entry.users == 0 and entry.is_dead:
            self._free(entry, residency)

    def _free(self, entry: Entry, residency: Residency) -> None:
        residency.remove(entry.group, entry.extent_bytes)
        self._used_bytes -= entry.extent_bytes
        if entry.extent_bytes:
            self.extents.free(entry.offset, entry.extent_bytes)

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
        changes = list(self._changed), list(self._deleted)
        self._changed.clear()
        self._deleted.clear()
        return changes

    def restore_changes(self, changed: Iterable[str], deleted: Iterable[str]) -> None:
        """Takes back `take_changes` after a save that failed."""
        still = [key for key in changed if key in self.entries]
        self._changed = dict.fromkeys([*still, *self._changed])
        self._deleted = dict.fromkeys([*deleted, *self._deleted])

    def record(self, entry: Entry, residency: Residency, last_checksum: int | None) -> Record:
        """What is saved of an entry; `last_checksum` is of its last chunk if bytes are held back.

        The bytes held back were written for this, padded to a block: to whoever loads the record,
        all bytes are on the device.
        """
        chunks = -(-entry.nbytes // entry.chunk_bytes)
        checksums = entry.checksums[:chunks].copy()
        if last_checksum is not None:
            checksums[-1] = last_checksum
        return Record(
            key=entry.key,
            dtype=entry.dtype,
            shape=entry.capacity,
            rows=entry.rows,
            offset=entry.offset,
            length=entry.extent_bytes,
            stored_bytes=entry.nbytes,
            checksums=checksums.astype("<u8").tobytes(),
            group=entry.group,
            path=residency.path_of(entry.group),
        )

    def load(self, catalog: Catalog, residency: Residency) -> None:
        """Takes in what a catalog has saved. CorruptionError if it contradicts itself."""
        groups: dict[str, list[int]] = {}
        for record in catalog.records():
            self._load_record(record, catalog)
            groups.setdefault(record.group, []).append(record.length)
        for group, sizes in groups.items():
            residency.add(group, sizes)

    def _load_record(self, record: Record, catalog: Catalog) -> None:
        saved = np.frombuffer(record.checksums, "<u8").astype(np.uint64)
        checksums = np.zeros(-(-record.length // self._chunk_bytes), np.uint64)
        entry = Entry(
            key=record.key,
            dtype=record.dtype,
            capacity=record.shape,
            offset=record.offset,
            extent_bytes=record.length,
            group=record.group,
            chunk_bytes=self._chunk_bytes,
            rows=record.rows,
            stored=record.stored_bytes,
            checksums=checksums,
        )
        if (
            entry.stored != entry.nbytes
            or entry.rows > entry.capacity_rows
            or entry.nbytes > entry.extent_bytes
            or len(saved) != len(entry.record_checksums)
            or record.key in self.entries
        ):
            raise CorruptionError(
                f"the catalog {catalog.path} contradicts itself about tensor {record.key!r}: "
                f"restore it from a backup, or start anew with format=True"
            )
        checksums[: len(saved)] = saved
        try:
            if record.length:
                self.extents.reserve(record.offset, record.length)
        except (ValueError, OSError) as error:
            raise CorruptionError(
                f"the catalog {catalog.path} gives tensor {record.key!r} a place that is another "
                f"tensor's or outside the store: restore it from a backup, or start anew with "
                f"format=True"
            ) from error
        self._used_bytes += record.length
        self.entries[record.key] = entry

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
            (entry.offset, entry.extent_bytes, entry.key)
            for entry in list(self.entries.values())
            if entry.extent_bytes
        )
        for (offset, size, key), (after, _, other) in itertools.pairwise(runs):
            if offset + size > after:
                problems.append(f"tensors {key!r} and {other!r} overlap at byte {after}")
        return problems
