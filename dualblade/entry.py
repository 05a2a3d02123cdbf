"""What the store knows of one tensor, and how a range of it becomes reads of its extent."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from dualblade import _core, tensor

BLOCK_BYTES = _core.BLOCK_BYTES
CHECKSUM_BYTES = 8


def round_up(value: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


class TensorInfo(NamedTuple):
    """What `store.info(key)` tells. `shape` is what is stored now, `capacity` what is reserved."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    capacity: tuple[int, ...]
    rows: int
    group: str
    path: str
    offset: int
    extent_bytes: int


class Layout(NamedTuple):
    """What the tensors of one shape and dtype have in common."""

    shape: tuple[int, ...]
    """The capacity: of a tensor that grows, rows that hold no data yet included."""
    dtype: str
    """A dtype tag."""
    rows: int
    """Rows that there is room for; a tensor without axes is one."""
    row_bytes: int
    nbytes: int
    extent_bytes: int
    chunk_bytes: int
    """What one checksum covers."""
    checksums_bytes: int
    """Of all checksums of a tensor that is full."""


@functools.lru_cache(maxsize=1024)
def layout_of(shape: tuple[int, ...], dtype: str, chunk_bytes: int) -> Layout:
    """The layout of tensors of this shape and dtype tag; those of a store share a few of them."""
    rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * tensor.itemsize(dtype)
    nbytes = rows * row_bytes
    extent_bytes = round_up(nbytes, BLOCK_BYTES)
    checksums_bytes = round_up(nbytes, chunk_bytes) // chunk_bytes * CHECKSUM_BYTES
    return Layout(shape, dtype, rows, row_bytes, nbytes, extent_bytes, chunk_bytes, checksums_bytes)


def footprint_of(nbytes: int) -> int:
    """Of so many bytes of a tensor, rounded up to whole pages."""
    return round_up(nbytes, BLOCK_BYTES)


class Entry:
    """A tensor of the store, as what is on the device and what is held back in memory.

    Its bytes [0, stored) are on the device, covered by `checksums`; the bytes after these, fewer
    than a block, are in `held`. A reader that has taken `rows`, `stored`, `held` and `checksums`
    under the store's lock needs nothing more of the entry, so rows can be appended while it reads.
    """

    __slots__ = (
        "checksums",
        "footprint",
        "group",
        "held",
        "is_appending",
        "is_dead",
        "is_exclusive",
        "is_placed",
        "key",
        "layout",
        "offset",
        "rows",
        "stored",
        "tail",
        "unsure_since",
        "unsure_until",
        "users",
        "views",
    )

    def __init__(self, key: str, layout: Layout, group: str, rows: int) -> None:
        self.key = key
        self.layout = layout
        self.group = group
        self.rows = rows
        self.offset = 0
        """Of the extent, on the device in bytes."""
        self.stored = 0
        self.footprint = 0
        """Bytes that the page cache can hold of it, in whole pages: what was written, or is about
        to be. Accounted to its group while the entry is placed."""
        self.checksums = b""
        """A uint64 for each chunk of what is on the device, in the machine's byte order."""
        self.held = b""
        self.tail: _core.Tail | None = None
        """Where appends go on; None until the next one rebuilds it."""
        self.unsure_since = 0
        """When it was written through the page cache, while the drive is not known to have all of
        it: the turns of doubts.py, from the first to the last; 0: it has."""
        self.unsure_until = 0
        self.users = 0
        """Operations under way and views of this entry; its extent lives until there are none."""
        self.views = 0
        """Of these, arrays over its pages in the page cache: it can't be moved or cut meanwhile."""
        self.is_appending = False
        self.is_exclusive = False
        self.is_placed = False
        """Its extent is taken, and its bytes are accounted for."""
        self.is_dead = False
        """Deleted or replaced: the last user frees the extent."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is stored now."""
        return (self.rows, *self.layout.shape[1:]) if self.layout.shape else ()

    @property
    def is_full(self) -> bool:
        """All of it is on the device, so that it will not grow."""
        return self.stored == self.layout.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored now, those held back included."""
        return self.rows * self.layout.row_bytes

    def info(self, path: str) -> TensorInfo:
        """What callers may know of it."""
        return TensorInfo(
            key=self.key,
            shape=self.shape,
            dtype=self.layout.dtype,
            nbytes=self.nbytes,
            capacity=self.layout.shape,
            rows=self.rows,
            group=self.group,
            path=path,
            offset=self.offset,
            extent_bytes=self.layout.extent_bytes,
        )


def growth_of(entries: Iterable[Entry], replaced: Iterable[Entry]) -> dict[str, tuple[int, int]]:
    """By how much each group grows, on the device and of what is stored, when entries come and
    others go."""
    growth: dict[str, tuple[int, int]] = {}
    for entry in entries:
        size_bytes, stored_bytes = growth.get(entry.group, (0, 0))
        size_bytes += entry.layout.extent_bytes
        growth[entry.group] = size_bytes, stored_bytes + entry.footprint
    for entry in replaced:
        if entry.group in growth:
            size_bytes, stored_bytes = growth[entry.group]
            size_bytes -= entry.layout.extent_bytes
            growth[entry.group] = size_bytes, stored_bytes - entry.footprint
    return growth


def take_checksums(entries: Iterable[Entry], checksums: bytes | bytearray) -> None:
    """Gives full entries, which have been written, their part of the checksums of all."""
    start = 0
    checksums = bytes(checksums)
    for entry in entries:
        stop = start + entry.layout.checksums_bytes
        entry.checksums = checksums[start:stop]
        start = stop


class ReadPlan:
    """Reads of the device on one path, and what is to be done when they have come."""

    __slots__ = ("checksums", "finish", "requests", "verify")

    def __init__(self, verify: bool) -> None:
        self.verify = verify
        self.requests: list[tuple[int, Any]] = []
        self.checksums: list[bytes] = []
        """Of each request, if they are to be compared."""
        self.finish: list[Callable[[], None]] = []

    def add_whole(self, entry: Entry, out: Any) -> None:
        """Plans to read an entry that is full, all of it on the device, into memory as long."""
        if entry.stored:
            self.requests.append((entry.offset, out))
            self.checksums.append(entry.checksums)

    def add(self, entry: Entry, start: int, stop: int, out: memoryview) -> None:
        """Plans how the bytes [start, stop) of an entry come into `out`, which is as long.

        A checksum covers a whole chunk, so if they are compared, a chunk of which only a part is
        wanted is read whole into memory of its own; everything else goes straight into `out`. The
        bytes held back are copied at once.
        """
        stored = min(stop, entry.stored)
        if stop > entry.stored:
            first = max(start, entry.stored)
            out[first - start :] = entry.held[first - entry.stored : stop - entry.stored]
        if start >= stored:
            return

        unit = entry.layout.chunk_bytes if self.verify else BLOCK_BYTES
        body = round_up(start, unit)
        if start < body:
            head = out[: min(body, stored) - start]
            self._add_edge(entry, start, min(body, stored), head, unit)
        end = stored
        if self.verify and stored != entry.stored:
            end = stored // unit * unit
        if body < end:
            self._add_run(entry, body, end, out[body - start : end - start])
        if body <= end < stored:
            self._add_edge(entry, end, stored, out[end - start : stored - start], unit)

    def _add_run(self, entry: Entry, start: int, stop: int, memory: Any) -> None:
        first = start // entry.layout.chunk_bytes
        last = -(-stop // entry.layout.chunk_bytes)
        self.requests.append((entry.offset + start, memory))
        self.checksums.append(entry.checksums[first * CHECKSUM_BYTES : last * CHECKSUM_BYTES])

    def _add_edge(self, entry: Entry, start: int, stop: int, out: memoryview, unit: int) -> None:
        """Reads the unit around [start, stop) aside, to copy that part into `out`."""
        first = start // unit * unit
        last = min(round_up(stop, unit), entry.stored)
        aside = memoryview(_core.aligned_empty(last - first, np.uint8))

        def copy() -> None:
            out[:] = aside[start - first : stop - first]

        self._add_run(entry, first, last, aside)
        self.finish.append(copy)
