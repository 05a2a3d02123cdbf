"""Tensors as arrays over the page cache's own pages, under TensorStore."""

from __future__ import annotations

import collections
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from dualblade import _core, tensor
from dualblade.entry import Entry
from dualblade.errors import UnsupportedError
from dualblade.transfer import COPY_BYTES, EntryTransfer


class Views(EntryTransfer):
    """Hands out read-only arrays; where it can, without a copy."""

    get: Callable[[str], Any]
    """The store's: what cannot be mapped is read."""

    def view(self, key: str) -> np.ndarray[Any, Any]:
        """The array stored under a key, read-only; without a copy of it where it is page-cached.

        What is read first, and compared with its checksums unless `verify` is "never", is what the
        array then shows: the page cache's pages themselves. Of tensors on the direct path or on
        striped devices, and of those with rows that do not fill a block yet, it is a copy.

        The array shows the tensor as it was: rows appended later are not in it, and after `put` or
        `delete` it keeps the old content, whose room stays taken until the last array over it is
        gone. Until then the key's `truncate`, `resize` and `set_path` raise LiveViewError, and
        nobody can open the device again, even after `close()`.

        A page that the kernel had to drop, because memory ran out, is read again when it is looked
        at, unverified; if the device fails to, the process gets SIGBUS, as with every file in
        memory. `get` has neither weakness. torch.from_numpy warns of memory that is read-only:
        writing to such a tensor ends the process.
        """
        with self._shared(key) as entry:
            mapped = self._mapped(entry)
        if mapped is not None:
            return mapped
        array = self.get(key)
        array.flags.writeable = False
        return array

    def _mapped(self, entry: Entry) -> np.ndarray[Any, Any] | None:
        """A tensor that the caller holds, over the page cache; None where that can't be had."""
        with self._lock:
            rows, nbytes = entry.rows, entry.nbytes
            is_mappable = nbytes > 0 and not entry.held
            if not is_mappable or self._residency.path_of(entry.group) != "pagecache":
                return None
        self._bring_in(entry, nbytes)
        try:
            mapping = self._device.map(entry.offset, nbytes)
        except (UnsupportedError, MemoryError):
            return None
        layout = entry.layout
        when_gone = partial(collections.deque.append, self._views_gone, entry)
        with self._lock:
            # Assignments alone: an interrupt comes before or after all of them.
            if entry.views == 0:
                self._index.viewed_bytes += layout.extent_bytes
            entry.users += 1
            entry.views += 1
            mapping.when_gone = when_gone
        shape = (rows, *layout.shape[1:]) if layout.shape else ()
        return tensor.from_bytes(mapping, shape, layout.dtype)

    def _bring_in(self, entry: Entry, nbytes: int) -> None:
        """Reads it through the page cache, and compares it as `verify` says."""
        memory = _core.aligned_empty(min(COPY_BYTES, nbytes), np.uint8)
        for start in range(0, nbytes, COPY_BYTES):
            stop = min(start + COPY_BYTES, nbytes)
            self._read_bytes(entry, start, stop, memory=memory[: stop - start])
