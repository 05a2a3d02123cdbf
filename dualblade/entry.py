"""What the store knows of one tensor, and how a range of it becomes reads of its extent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dualblade import _core, tensor

BLOCK_BYTES = _core.BLOCK_BYTES


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


@dataclass(eq=False)
class Entry:
    """A tensor of the store, as what is on the device and what is held back in memory.

    Its bytes [0, stored) are on the device, covered by `checksums`, one for each chunk of them; the
    bytes after these, fewer than a block, are in `held`. A reader that has taken `rows`, `stored`,
    `held` and a copy of its checksums under the store's lock needs nothing more of the entry, so
    rows can be appended while it reads.
    """

    key: str
    dtype: str
    capacity: tuple[int, ...]
    offset: int
    extent_bytes: int
    group: str
    chunk_bytes: int
    rows: int
    stored: int
    checksums: np.ndarray[Any, Any]
    held: bytes = b""
    tail: _core.Tail | None = None
    """Where appends go on; None until the next one rebuilds it."""
    users: int = 0
    """Operations that are under way on this entry; its extent lives until there are none."""
    is_appending: bool = False
    is_exclusive: bool = False
    is_dead: bool = False
    """Deleted or replaced: the last user frees the extent."""
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.row_bytes = math.prod(self.capacity[1:]) * tensor.itemsize(self.dtype)

    @property
    def capacity_rows(self) -> int:
        """Rows that there is room for; a tensor without axes is one."""
        return self.capacity[0] if self.capacity else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is stored now."""
        return (self.rows, *self.capacity[1:]) if self.capacity else ()

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored now, those held back included."""
        return self.rows * self.row_bytes

    @property
    def record_checksums(self) -> np.ndarray[Any, Any]:
        """The checksums of what is on the device, as many as there are."""
        return self.checksums[: -(-self.stored // self.chunk_bytes)]

    def info(self, path: str) -> TensorInfo:
        """What callers may know of it."""
        return TensorInfo(
            key=self.key,
            shape=self.shape,
            dtype=self.dtype,
            nbytes=self.nbytes,
            capacity=self.capacity,
            rows=self.rows,
            group=self.group,
            path=path,
            offset=self.offset,
            extent_bytes=self.extent_bytes,
        )


class ReadPlan(NamedTuple):
    """Reads of the device, and what is to be done when they have come."""

    requests: list[tuple[int, Any]]
    checksums: list[Any]
    finish: list[Callable[[], None]]


def plan_read(entry: Entry, start: int, stop: int, out: memoryview, verify: bool) -> ReadPlan:
    """How the bytes [start, stop) of an entry come into `out`, which is as long.

    A checksum covers a whole chunk, so with `verify` a chunk of which only a part is wanted is read
    whole into memory of its own; everything else goes straight into `out`. The bytes held back are
    copied at once.
    """
    plan = ReadPlan([], [], [])
    stored = min(stop, entry.stored)
    if stop > entry.stored:
        first = max(start, entry.stored)
        out[first - start :] = entry.held[first - entry.stored : stop - entry.stored]
    if start >= stored:
        return plan

    unit = entry.chunk_bytes if verify else BLOCK_BYTES
    body = round_up(start, unit)
    if start < body:
        _plan_edge(plan, entry, start, min(body, stored), start, out, unit, verify)
    end = stored
    if verify and stored != entry.stored:
        end = stored // unit * unit
    if body < end:
        _plan_run(plan, entry, body, end, out[body - start : end - start], verify)
    if body <= end < stored:
        _plan_edge(plan, entry, end, stored, start, out, unit, verify)
    return plan


def _plan_run(
    plan: ReadPlan, entry: Entry, start: int, stop: int, memory: Any, verify: bool
) -> None:
    checksums = None
    if verify:
        first = start // entry.chunk_bytes
        last = -(-stop // entry.chunk_bytes)
        checksums = entry.checksums[first:last]
        if last * entry.chunk_bytes > entry.stored:
            checksums = checksums.copy()  # an append may renew the last one while this reads
    plan.requests.append((entry.offset + start, memory))
    plan.checksums.append(checksums)


def _plan_edge(
    plan: ReadPlan,
    entry: Entry,
    start: int,
    stop: int,
    origin: int,
    out: memoryview,
    unit: int,
    verify: bool,
) -> None:
    """Reads the unit around [start, stop) aside and copies that part into `out`."""
    first = start // unit * unit
    last = min(round_up(stop, unit), entry.stored)
    aside = memoryview(_core.aligned_empty(last - first, np.uint8))

    def copy() -> None:
        out[start - origin : stop - origin] = aside[start - first : stop - first]

    _plan_run(plan, entry, first, last, aside, verify)
    plan.finish.append(copy)
