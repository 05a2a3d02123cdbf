"""The bytes of entries on their way between memory and the device, under TensorStore.

Every method here is called by an operation that holds its entries (access.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np

from dualblade import _core, tensor
from dualblade.access import EntryAccess
from dualblade.catalog import Catalog
from dualblade.entry import Entry, plan_read
from dualblade.errors import CorruptionError
from dualblade.index import Index
from dualblade.paths import open_paths
from dualblade.residency import Residency

COPY_BYTES = 4 << 20
"""How much of a tensor is in memory at a time while it moves to another extent."""


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
        self._verify = verify
        self._corruptions = 0

    # ---- transfers --------------------------------------------------------------------------

    def _submit(
        self,
        direction: str,
        transfers: Iterable[tuple[Entry, tuple[int, Any], Any]],
        completions: list[_core.Completion],
    ) -> None:
        """Starts transfers, one batch for each path; adds to `completions` as they are started."""
        batches: dict[str, tuple[list[Any], list[Any]]] = {}
        for entry, request, checksums in transfers:
            batch = batches.setdefault(self._residency.path_of(entry.group), ([], []))
            batch[0].append(request)
            batch[1].append(checksums)
        for name, (requests, checksums) in batches.items():
            path = self._paths[name]
            start = path.read if direction == "read" else path.write
            completions.append(start(requests, checksums))

    def _transfer(
        self, direction: str, transfers: Iterable[tuple[Entry, tuple[int, Any], Any]]
    ) -> None:
        """Starts transfers and waits for them. After an error none is under way."""
        completions: list[_core.Completion] = []
        try:
            self._submit(direction, transfers, completions)
            for completion in completions:
                completion.wait()
        except BaseException:
            drain(completions)
            raise

    def _read_bytes(
        self, entry: Entry, start: int, stop: int, *, verify: bool | None = None
    ) -> np.ndarray[Any, Any]:
        """Bytes on the device of an entry that the caller holds."""
        if verify is None:
            verify = self._verify != "never"
        memory = _core.aligned_empty(stop - start, np.uint8)
        plan = plan_read(entry, start, stop, memoryview(memory), verify)
        reads = zip(plan.requests, plan.checksums, strict=True)
        try:
            self._transfer("read", [(entry, *read) for read in reads])
        except CorruptionError as error:
            self._raise(error, [entry])
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
                if offset is not None and 0 <= offset - entry.offset < entry.extent_bytes:
                    raise CorruptionError(
                        f"tensor {entry.key!r} is corrupt: {error}. Nothing was returned; "
                        f"delete it or put it again"
                    ) from error
        raise error

    # ---- the end of an entry ----------------------------------------------------------------

    def _append(self, entries: list[Entry], parts: list[tensor.Tensor]) -> None:
        with self._lock:
            self._index.mark_dirty(self._catalog)
        writes, ends = [], []
        for entry, part in zip(entries, parts, strict=True):
            # Taken from the entry until all is well: what is stored is not touched, and after an
            # error or an interrupt the next append finds again where to go on.
            tail, entry.tail = self._tail_of(entry), None
            tail_write = tail.append(part.data)
            for offset, data in tail_write.requests:
                writes.append((entry, (entry.offset + offset, data), None))
            chunks = slice(tail_write.first_chunk, tail_write.first_chunk + len(tail_write.digests))
            held = bytes(tail.block()[: tail.held])
            rows = entry.rows + part.shape[0]
            ends.append((entry, tail, chunks, tail_write.digests, tail.stored, held, rows))
        self._transfer("write", writes)
        with self._lock:
            for entry, tail, chunks, digests, stored, held, rows in ends:
                self._index.changed(entry)
                # Assignments alone: no interrupt comes between them.
                entry.checksums[chunks] = digests
                entry.stored, entry.held, entry.rows, entry.tail = stored, held, rows, tail

    def _tail_of(self, entry: Entry) -> _core.Tail:
        """Where appends to an entry go on, found again if need be by reading its last chunk."""
        if entry.tail is not None:
            return entry.tail
        if entry.stored % _core.BLOCK_BYTES:
            end = self._cut(entry, entry.nbytes)
            with self._lock:
                self._set_end(entry, *end)
        begun = entry.stored % entry.chunk_bytes
        tail = _core.Tail(entry.chunk_bytes)
        tail.reset(entry.stored, self._read_bytes(entry, entry.stored - begun, entry.stored))
        tail.append(entry.held)
        entry.tail = tail
        return tail

    def _cut(self, entry: Entry, nbytes: int) -> tuple[int, bytes, int | None]:
        """(stored, held, checksum of the last chunk) of an entry that keeps `nbytes` bytes."""
        if nbytes >= entry.stored and entry.stored % _core.BLOCK_BYTES == 0:
            return entry.stored, entry.held[: nbytes - entry.stored], None
        stored = nbytes // _core.BLOCK_BYTES * _core.BLOCK_BYTES
        first = stored // entry.chunk_bytes * entry.chunk_bytes
        if nbytes == first:  # nothing of a chunk is kept in part, so nothing has to be read
            return stored, b"", None
        chunk = self._read_bytes(entry, first, min(first + entry.chunk_bytes, entry.stored))
        checksum = _core.checksum(chunk[: stored - first]) if stored > first else None
        return stored, bytes(chunk[stored - first : nbytes - first]), checksum

    def _set_end(self, entry: Entry, stored: int, held: bytes, checksum: int | None) -> None:
        entry.stored, entry.held, entry.tail = stored, held, None
        if checksum is not None:
            entry.checksums[(stored - 1) // entry.chunk_bytes] = checksum
        self._index.changed(entry)

    def _copy(self, entry: Entry, copy: Entry) -> None:
        stored, held, checksum = self._cut(entry, entry.nbytes)
        for start in range(0, stored, COPY_BYTES):
            stop = min(start + COPY_BYTES, stored)
            data = self._read_bytes(entry, start, stop)
            chunks = slice(start // copy.chunk_bytes, -(-stop // copy.chunk_bytes))
            write = (copy, (copy.offset + start, data), copy.checksums[chunks])
            self._transfer("write", [write])
        copy.rows, copy.stored, copy.held = entry.rows, stored, held
        if checksum is not None:
            copy.checksums[(stored - 1) // copy.chunk_bytes] = checksum


def drain(completions: Iterable[_core.Completion]) -> None:
    """Waits, whatever happens: what is in flight still uses extents that are about to be freed."""
    for completion in completions:
        while not completion.done():
            try:
                completion.wait()
            except BaseException:  # noqa: BLE001
                continue  # its error, or an interrupt: the caller is raising one already
