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
    from dualblade.ticket import Ticket

Array = np.ndarray[Any, Any]

# Tokens that a layer which was read ahead can take in before its memory is full.
SPARE_TOKENS = 16
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


class Snapshot:
    """The tokens [first, stop) of a layer in memory, or on their way there, in stored order.

    Tokens appended to the layer later are copied in as well, so that it stays current.
    """

    ticket: Ticket

    def __init__(self, pool: BufferPool, layer: Layer, first: int) -> None:
        self.first = first
        self.stop = layer.tokens
        spans, capacity = self._plan(layer, first)
        root = pool.lend(spans[-1])
        self.nbytes = root.nbytes
        of = tensor.numpy_dtype(layer.dtype)
        self.memory = [
            # As far into a block as the stored rows start: direct I/O then needs no copying.
            np.ndarray(
                (capacity, *layer.row_shape(which)),
                of,
                buffer=root,
                offset=spans[which] + first * layer.row_bytes(which) % BLOCK_BYTES,
            )
            for which in (0, 1)
        ]

    @staticmethod
    def _plan(layer: Layer, first: int) -> tuple[tuple[int, int, int], int]:
        """Where keys and values start and the latter end, and the tokens there is room for."""
        capacity = layer.tokens - first + SPARE_TOKENS
        spans = [0]
        for which in (0, 1):
            row_bytes = layer.row_bytes(which)
            end = first * row_bytes % BLOCK_BYTES + capacity * row_bytes
            spans.append(spans[-1] + -(-end // BLOCK_BYTES) * BLOCK_BYTES)
        return (spans[0], spans[1], spans[2]), capacity

    @classmethod
    def size(cls, layer: Layer, first: int) -> int:
        """The bytes that one takes."""
        return BufferPool.lent_size(cls._plan(layer, first)[0][-1])

    def serves(self, first: int, stop: int) -> bool:
        """Whether the tokens [first, stop) are among it, and none after them."""
        return self.first <= first and self.stop == stop

    def append(self, rows: list[Array], stop: int) -> bool:
        """Takes in what was just appended; False if it can't be current any more."""
        count = len(rows[0])
        at = self.stop - self.first
        if self.stop + count != stop or at + count > len(self.memory[0]):
            return False
        for memory, new in zip(self.memory, rows, strict=True):
            memory[at : at + count] = new
        self.stop = stop
        return True

    def truncate(self, tokens: int) -> bool:
        """False if nothing of it is left. Not while it is being read."""
        self.stop = min(self.stop, tokens)
        return self.first < self.stop

    def fails(self) -> bool:
        """Waits until it is read; True if that went wrong."""
        try:
            self.ticket.result()
        except (DualbladeError, OSError):
            return True
        return False

    def take(self, first: int, layer: Layer) -> tuple[Array, Array]:
        """The tokens from `first` on as the caller is to see them: each sequence in its row."""
        wanted = slice(first - self.first, self.stop - self.first)
        keys, values = (memory[wanted] for memory in self.memory)
        if layer.row_map is not None:
            for memory in (keys, values):
                gather(memory, layer.row_map[first : self.stop])
        return keys, values


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
