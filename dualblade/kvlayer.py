"""What KVCache knows of one layer, and the tokens of one in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dualblade import tensor
from dualblade._core import BLOCK_BYTES
from dualblade.buffer_pool import BufferPool
from dualblade.errors import DualbladeError

if TYPE_CHECKING:
    from dualblade.store import TensorStore
    from dualblade.ticket import Ticket

Array = np.ndarray[Any, Any]

# Tokens that a layer which was read ahead can take in before its memory is full.
SPARE_TOKENS = 16
# Of a tensor that there is no room for at least so much is read ahead, up to the end of a chunk
# that has a checksum.
PART_BYTES = 4 << 20
PART_UNIT_BYTES = 256 << 10
# Beams are gathered this much at a time.
GATHER_BYTES = 1 << 20


@dataclass(eq=False)
class Layer:
    """One layer: index 0 of a pair is for its keys, 1 for its values."""

    heads: int
    dims: tuple[int, int]
    dtype: str
    batch: int
    capacity: int
    window: int | None
    group: str = ""
    keys: tuple[str, str] = ("", "")
    tokens: int = 0
    row_map: Array | None = None
    """[tokens, batch]: the row of the batch that a sequence's token is stored in; None, and the
    tokens after its last: each in its own row. Never changed in place: layers share it."""

    def row_shape(self, which: int) -> tuple[int, int, int]:
        """Of one token: batch, heads, dim."""
        return (self.batch, self.heads, self.dims[which])

    def row_bytes(self, which: int) -> int:
        """Of one token."""
        return math.prod(self.row_shape(which)) * tensor.itemsize(self.dtype)

    def first_token(self) -> int:
        """The first that a fetch() wants."""
        return 0 if self.window is None else max(0, self.tokens - self.window)

    def with_batch(self, batch: int) -> Layer:
        """An empty layer for the same tokens of another batch."""
        empty = (self.heads, self.dims, self.dtype, batch, self.capacity, self.window, self.group)
        return Layer(*empty)

    def until(self, tokens: int) -> Layer:
        """The same layer as if it had only so many tokens."""
        part = self.with_batch(self.batch)
        part.keys, part.tokens, part.row_map = self.keys, tokens, self.row_map
        return part


class _Rows:
    """The rows [first, stop) of one of a layer's two tensors, in memory that may have room for
    more; none, and no memory, at first."""

    __slots__ = ("memory", "stop")

    def __init__(self, first: int) -> None:
        self.memory: Array | None = None
        self.stop = first


class Snapshot:
    """A layer's tokens from `first` on in memory, or on their way there, in stored order.

    What is read ahead may be all of them, or where memory is short the keys alone, or only the
    first of these: then in memory for just so many, from which they are copied once there is
    memory for all. Tokens appended to the layer later are copied in as well.
    """

    def __init__(self, pool: BufferPool, layer: Layer, first: int) -> None:
        self.first = first
        self.tickets: list[Ticket] = []
        self._pool = pool
        self._layer = layer
        self._rows = (_Rows(first), _Rows(first))
        self._aside: list[tuple[Array, Array]] = []

    @property
    def nbytes(self) -> int:
        """Of the rows that are in memory or on their way there."""
        row_bytes = map(self._layer.row_bytes, (0, 1))
        return sum(
            (rows.stop - self.first) * size
            for rows, size in zip(self._rows, row_bytes, strict=True)
        )

    @property
    def is_whole(self) -> bool:
        """Whether all tokens of the layer are among it."""
        tokens = self._layer.tokens
        return all(rows.memory is not None and rows.stop == tokens for rows in self._rows)

    def serves(self, first: int) -> bool:
        """Whether it helps who wants the tokens from this one on."""
        if first < self.first:
            return False
        return self.is_whole or first - self.first <= SPARE_TOKENS

    def read_ahead(self, store: TensorStore, room_bytes: int, *, in_part: bool) -> int:
        """Starts reading what takes at most so many bytes; returns what it takes.

        The keys first, each tensor whole; with `in_part`, as many keys as there is room for.
        """
        taken_bytes = 0
        for which, rows in enumerate(self._rows):
            if rows.memory is None:
                room = room_bytes - taken_bytes
                stop = self._layer.tokens
                size_bytes = (stop - self.first) * self._layer.row_bytes(which)
                is_short = size_bytes > room
                if is_short:
                    is_worth = in_part and which == 0
                    stop = self._stop_within(which, room) if is_worth else self.first
                    size_bytes = (stop - self.first) * self._layer.row_bytes(which)
                if stop > self.first:
                    spare = 0 if is_short else SPARE_TOKENS
                    memory = self._lend(which, stop - self.first + spare)
                    self._fill(store, which, memory, stop)
                    taken_bytes += size_bytes
            if rows.stop < self._layer.tokens:
                break  # values before all keys would not be read in the order of the run
        return taken_bytes

    def read_rest(self, store: TensorStore) -> None:
        """Starts reading what is not there yet, of all tokens."""
        tokens = self._layer.tokens
        for which, rows in enumerate(self._rows):
            if rows.memory is not None and rows.stop == tokens:
                continue
            before, count = rows.memory, rows.stop - self.first
            memory = self._lend(which, tokens - self.first + SPARE_TOKENS)
            if before is not None:
                self._aside.append((before[:count], memory[:count]))
            self._fill(store, which, memory, tokens)

    def _fill(self, store: TensorStore, which: int, memory: Array, stop: int) -> None:
        """Starts reading what memory for the rows up to `stop` lacks, and takes it."""
        rows = self._rows[which]
        lacking = memory[rows.stop - self.first : stop - self.first]
        key = self._layer.keys[which]
        self.tickets.append(store.read_async(key, rows.stop, stop, lacking))
        rows.memory, rows.stop = memory, stop

    def _lend(self, which: int, count: int) -> Array:
        return lend_rows(self._pool, self._layer, which, self.first, count)

    def _stop_within(self, which: int, room_bytes: int) -> int:
        """Up to which row so many bytes reach, cut where a checksum ends."""
        if room_bytes < PART_BYTES:
            return self.first
        row_bytes = self._layer.row_bytes(which)
        end = (self.first * row_bytes + room_bytes) // PART_UNIT_BYTES * PART_UNIT_BYTES
        return max(self.first, end // row_bytes)

    @property
    def has_aside(self) -> bool:
        """Whether rows are to be moved to where the rest of their tensor is read to."""
        return bool(self._aside)

    def join(self) -> None:
        """Moves rows that were read ahead to the rest of their tensor, and lets their memory go.
        They have come: `fails()` was asked."""
        while self._aside:
            before, memory = self._aside.pop()
            memory[:] = before

    def append(self, added: list[Array], tokens: int) -> None:
        """Takes in what was just appended, after which the layer has so many tokens, where it has
        all that came before and memory for it."""
        count = len(added[0])
        for rows, new in zip(self._rows, added, strict=True):
            at = rows.stop - self.first
            if rows.memory is None or rows.stop + count != tokens:
                continue
            if at + count <= len(rows.memory):
                rows.memory[at : at + count] = new
                rows.stop = tokens

    def truncate(self, tokens: int) -> bool:
        """False if nothing of it is left. Not while it is being read."""
        for rows in self._rows:
            rows.stop = min(rows.stop, max(tokens, self.first))
        return self.first < tokens

    def fails(self) -> bool:
        """Waits for what has been started; True if some of it went wrong."""
        try:
            self.result()
        except (DualbladeError, OSError):
            return True
        return False

    def result(self) -> None:
        """Waits for what has been started, and raises what went wrong."""
        for ticket in self.tickets:
            ticket.result()

    def poll(self) -> None:
        """Sees to what has come: its checksums are compared in this thread."""
        for ticket in self.tickets:
            ticket.done()

    def take(self, first: int, layer: Layer) -> tuple[Array, Array]:
        """The tokens from `first` on as the caller is to see them: each sequence in its row."""
        keys, values = (
            rows.memory[first - self.first : rows.stop - self.first]
            for rows in self._rows
            if rows.memory is not None
        )
        if layer.row_map is not None:
            for memory in (keys, values):
                gather(memory, layer.row_map[first : layer.tokens])
        return keys, values


def lend_rows(pool: BufferPool, layer: Layer, which: int, first: int, count: int) -> Array:
    """Memory for rows of a layer, from row `first` on: as far into a block as they are stored, so
    that direct I/O needs no copying."""
    row_bytes = layer.row_bytes(which)
    lead = first * row_bytes % BLOCK_BYTES
    return np.ndarray(
        (count, *layer.row_shape(which)),
        tensor.numpy_dtype(layer.dtype),
        buffer=pool.lend(lead + count * row_bytes),
        offset=lead,
    )


def reordered(row_map: Array | None, tokens: int, order: Array) -> Array | None:
    """The row map after the batch was reordered; None if each row is in its own place."""
    result = np.empty((tokens, len(order)), np.int32)
    mapped = 0 if row_map is None else len(row_map)
    if row_map is not None:
        np.take(row_map, order, axis=1, out=result[:mapped], mode="clip")
    result[mapped:] = order
    return None if (result == np.arange(len(order))).all() else result


def gather(memory: Array, row_map: Array) -> None:
    """Puts the rows of the first tokens in the order of row_map [tokens, batch], in place."""
    if len(row_map) == 0:
        return
    batch = memory.shape[1]
    rows = np.ndarray((len(memory) * batch, memory[:1, 0].nbytes), np.uint8, buffer=memory)
    step = max(1, GATHER_BYTES // (batch * rows.shape[1]))
    for first in range(0, len(row_map), step):
        part = row_map[first : first + step]
        stored_in = (np.arange(len(part)) * batch)[:, None] + part
        block = rows[first * batch : (first + len(part)) * batch]
        block[:] = block.take(stored_in.ravel(), axis=0)
