"""Appends to the layers of a KVCache that are written while their caller goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dualblade import tensor
from dualblade._core import BLOCK_BYTES, Buffer, ExtentMap
from dualblade.errors import DualbladeError, NoSpaceError
from dualblade.kvlayer import Layer

if TYPE_CHECKING:
    from dualblade.buffer_pool import Array
    from dualblade.store import TensorStore
    from dualblade.ticket import Ticket

# Rows are held by so much memory at most until they are written.
BEHIND_BYTES = 16 << 20
# Memory for less need not be aligned nor kept.
STAGED_BYTES = 64 << 10


@dataclass
class _Writing:
    """Rows on their way to the store."""

    rows: list[Array]
    lent: list[tuple[int, int]]
    """What they take of the stage: (offset, length)."""
    first: int
    """How many tokens the layer had before them."""
    stop: int
    nbytes: int
    ticket: Ticket | None = None


class WriteBehind:
    """Writes rows from a copy of them, one append to a layer at a time.

    A small write to a drive that has tens of megabytes of reads before it takes as long as they do,
    and whoever waits for it starts no reads meanwhile. What could not be written stays here:
    whatever is done with the layer next tries again, and raises what goes wrong then.
    """

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self._stage: _Stage | None = None
        self._under_way: dict[Layer, _Writing] = {}

    @property
    def nbytes(self) -> int:
        """Of the rows that are held until they are written."""
        return sum(writing.nbytes for writing in self._under_way.values())

    def append(self, layer: Layer, rows: list[Array]) -> None:
        """Starts appending keys and values to a layer, which has room for them; or, where there is
        nothing to gain, appends them."""
        self.settle(layer)
        size_bytes = sum(each.nbytes for each in rows)
        if size_bytes <= BEHIND_BYTES:
            self._make_room(size_bytes)
        if self.nbytes + size_bytes > BEHIND_BYTES:  # also of what could not be written
            self._store.append_many(dict(zip(layer.keys, rows, strict=True)))
            return
        first, count = layer.tokens, len(rows[0])
        writing = _Writing([], [], first, first + count, size_bytes)
        given: dict[str, Array] = {}
        copies: dict[str, Array] = {}
        try:
            for which, (key, new) in enumerate(zip(layer.keys, rows, strict=True)):
                if new.nbytes < STAGED_BYTES:
                    given[key] = kept = new.copy()
                else:
                    kept = self._room(layer, which, new, writing.lent)
                    if new.flags.c_contiguous:
                        given[key], copies[key] = new, kept.reshape(-1).view(np.uint8)
                    else:
                        np.copyto(kept, new)
                        given[key] = kept
                writing.rows.append(kept)
            if not writing.lent and not any(each.lent for each in self._under_way.values()):
                self._stage = None  # prefill is over, and single tokens need none
            writing.ticket = self._store.append_many_async(given, copies)
        except Exception:  # but after an interrupt it may be under way
            if self._stage is not None:
                self._stage.take_back(writing.lent)
            raise
        self._under_way[layer] = writing

    def _room(self, layer: Layer, which: int, rows: Array, lent: list[tuple[int, int]]) -> Array:
        """Memory for a copy of rows that begins as far into a block as it is stored, so that direct
        I/O needs no other. It notes what it takes of the stage in `lent`."""
        if self._stage is None:
            self._stage = _Stage()
        lead = layer.tokens * layer.row_bytes(which) % BLOCK_BYTES
        memory = self._stage.lend(lead + rows.nbytes, lent)
        return np.ndarray(rows.shape, tensor.numpy_dtype(layer.dtype), memory, lead)

    def _forget(self, layer: Layer) -> None:
        writing = self._under_way.pop(layer)
        if self._stage is not None:
            self._stage.take_back(writing.lent)

    def _make_room(self, size_bytes: int) -> None:
        """Lets go of what is written, and waits for more if that is not enough."""
        for layer, writing in list(self._under_way.items()):
            is_full = self.nbytes + size_bytes > BEHIND_BYTES
            if not is_full and not writing.ticket.done():
                return
            writing.ticket.settle()
            if self._is_stored(layer, writing):
                self._forget(layer)

    def _is_stored(self, layer: Layer, writing: _Writing) -> bool:
        if writing.ticket.is_fulfilled:
            return True
        # An error of an interrupt may have come when all was stored.
        return all(self._store.info(key).rows == writing.stop for key in layer.keys)

    def is_busy(self, layer: Layer) -> bool:
        """Whether settle() would have to wait."""
        writing = self._under_way.get(layer)
        return writing is not None and not writing.ticket.done()

    def is_stored(self, layer: Layer) -> bool:
        """Whether all rows of a layer are in the store by now."""
        if self.is_busy(layer):
            return False
        writing = self._under_way.get(layer)
        return writing is None or self._is_stored(layer, writing)

    def settle(self, layer: Layer) -> None:
        """Returns when all rows of a layer are in the store. Raises what keeps them from it."""
        writing = self._under_way.get(layer)
        if writing is None:
            if not self._under_way:
                self._stage = None  # prefill is over
            return
        writing.ticket.settle()
        if not writing.ticket.is_fulfilled:
            self._write_again(layer, writing)
        self._forget(layer)

    def _write_again(self, layer: Layer, writing: _Writing) -> None:
        """Writes what is lacking once its ticket is done. Raises what keeps it from that."""
        try:
            writing.ticket.result()
        except (DualbladeError, OSError, KeyboardInterrupt):
            pass  # of then, as a signal that came meanwhile
        lacking = {
            key: rows
            for key, rows in zip(layer.keys, writing.rows, strict=True)
            if self._store.info(key).rows == writing.first
        }
        if lacking:
            self._store.append_many(lacking)  # what it raises is of now

    def settle_all(self) -> None:
        """As settle(), of every layer."""
        for layer in list(self._under_way):
            self.settle(layer)

    def begin_cut(self, layer: Layer, tokens: int) -> None:
        """Before a layer is cut to so many tokens: waits for what is to be cut off, settles the
        rest."""
        writing = self._under_way.get(layer)
        if writing is not None and tokens <= writing.first:
            writing.ticket.settle()
        else:
            self.settle(layer)

    def end_cut(self, layer: Layer) -> None:
        """After it: gives up what was cut off."""
        if layer in self._under_way:
            self._forget(layer)

    def close(self) -> None:
        """Waits for what is under way and forgets it: the tensors are about to go."""
        for writing in self._under_way.values():
            writing.ticket.settle()
        self._under_way.clear()
        self._stage = None


class _Stage:
    """Memory for rows until they are written: in one piece, since the processor and the kernel go
    through huge pages in less time than through small ones."""

    def __init__(self) -> None:
        # Rows begin within a block, and what is lent is whole blocks.
        self._memory = Buffer(2 * BEHIND_BYTES)
        self._free = ExtentMap(len(self._memory), BLOCK_BYTES)

    def lend(self, size: int, lent: list[tuple[int, int]]) -> memoryview | Buffer:
        """So much memory, which is noted in `lent`. Where what is free lies too scattered, memory
        of its own."""
        length = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        try:
            offset = self._free.allocate(length)
        except NoSpaceError:
            return Buffer(length)
        lent.append((offset, length))
        return memoryview(self._memory)[offset : offset + length]

    def take_back(self, lent: list[tuple[int, int]]) -> None:
        """What was lent is free again."""
        while lent:
            self._free.free(*lent.pop())
