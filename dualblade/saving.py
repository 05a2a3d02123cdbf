"""How a store is saved: first the drive has everything, then the index tells of it."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from dualblade.access import inside, is_written
from dualblade.catalog import Record
from dualblade.entry import Entry
from dualblade.errors import KeyNotFoundError, device_error
from dualblade.watcher import Watching


class Saving(Watching):
    """Saves the index together with what it tells of, under TensorStore."""

    @inside
    def flush(self) -> None:
        """Finishes what is under way, writes everything out and saves the index.

        Nothing is saved that the drive may not have: what it has refused is given to it again, and
        as long as it does not take that, every flush raises DeviceError. CorruptionError: it did
        not, and memory has lost it as well; delete the tensor or put it again. RuntimeError: a
        signal handler called it in the middle of a flush, which goes on when that returns.
        """
        with self._flushing:
            if self._is_flushing:
                raise RuntimeError(
                    "flush() was interrupted by a signal handler that calls flush(): the first one "
                    "goes on when the handler returns; call close() there, or flush() after it"
                )
            self._is_flushing = True
            try:
                self._flush()
            finally:
                self._is_flushing = False

    def _flush(self) -> None:
        self._settle_tickets()
        try:
            with self._operation(), self._lock:
                version = self._index.version
                changed, deleted = self._index.take_changes()
            self._settle_doubts()
            failures = self._doubts.look()
            records = self._persist_all(changed)
            written, turn = self._end_turn(changed)
            if self._write_back is not None:
                self._write_back.flush_begins()
            self._device.flush()
            if self._write_back is not None:
                self._write_back.flush_ended()
            with self._lock:
                if not self._doubts.settle(written, turn, failures):
                    raise self._refusal()
                is_clean = version == self._index.version
                # First: whoever is interrupted after the commit marks the next change all the same.
                self._index.is_clean = is_clean
                self._catalog.commit(records, deleted, clean=is_clean)
                self._index.saved()
        except BaseException:
            with self._lock:
                self._index.restore_changes()
            raise

    def _end_turn(self, keys: Iterable[str]) -> tuple[list[Entry], int]:
        """Of these keys the entries that nobody writes now, and the turn of their last write."""
        with self._lock:
            entries = self._index.entries
            found = [entries[key] for key in keys if key in entries]
            if any(map(self._doubts.has, found)):  # just stored, and refused before that
                raise self._refusal()
            return [entry for entry in found if not is_written(entry)], self._doubts.next_turn()

    def _refusal(self) -> Exception:
        return device_error(errno.EIO, device=self._device.info.target, operation="write back")

    def _persist_all(self, keys: Iterable[str]) -> list[Record]:
        """Writes what is held back of tensors; the records of those that are not gone."""
        records: list[Record | None] = []
        entries = self._index.entries
        for key in keys:
            with self._lock:
                entry = entries.get(key)
                if entry is None:
                    continue
                is_busy = entry.is_appending or entry.is_exclusive
                if not is_busy and not entry.held:
                    records.append(self._index.record(entry, self._residency, None))
                    continue
            records.append(self._persist(key))
        return [record for record in records if record is not None]

    def _persist(self, key: str) -> Record | None:
        """Writes what is held back of a tensor; its record, or None if it is gone."""
        try:
            with self._appending([key]) as (entry,):
                last_checksum = None
                if entry.held:
                    tail = self._tail_of(entry)
                    self._write([(entry, (entry.offset + entry.stored, bytes(tail.block())))])
                    last_checksum = tail.digest
                with self._lock:
                    return self._index.record(entry, self._residency, last_checksum)
        except KeyNotFoundError:
            return None
