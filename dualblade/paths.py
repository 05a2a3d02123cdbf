"""The two ways to the same extents: through the page cache, or past it.

A path is a property of the access, not of the place. Both paths reach every extent of the device;
what distinguishes them is who keeps the bytes afterwards. A tensor changes path without moving:
what the page cache holds of it is written back and dropped, and the next access is direct.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dualblade._core import Completion, Device
from dualblade.errors import DeviceError, UnsupportedError

FOLIO_MAX_BYTES = 2 << 20
"""The page cache holds memory in pieces of up to this size, and drops them only whole."""

DROP_ATTEMPTS = 5
DROP_PAUSE_S = 0.001
"""The kernel drops no piece that is in use; a copy from one takes less than this."""

Request = tuple[int, Any]
"""(offset on the device in bytes, a contiguous buffer of bytes)."""


class DirectPath:
    """Past the page cache: O_DIRECT, in the order and at the depth that the queue decides."""

    name = "direct"

    def __init__(self, device: Device) -> None:
        self._device = device

    def read(
        self, requests: Sequence[Request], checksums: Sequence[Any] | None, *, ahead: bool = False
    ) -> Completion:
        """Starts reading into the requests' buffers; the completion compares the checksums.
        `ahead`: nobody waits for it yet."""
        return self._device.read(requests, path=self.name, checksums=checksums, ahead=ahead)

    def write(
        self, requests: Sequence[Request], checksums: Sequence[Any] | None, *, tail: bool = False
    ) -> Completion:
        """Starts writing the requests' buffers; fills the checksum arrays in before it returns
        or while the completion is waited for. `tail`: ends of tensors that grow."""
        return self._device.write(requests, path=self.name, checksums=checksums, tail=tail)

    def enter(self, offset: int, length: int, failures: int | None = None) -> None:
        """Called before an extent's first access on this path after it was on the other.

        `failures`: how many write-backs had failed when nothing that is cached was in doubt. None:
        something is, and the neighbours have to be left alone.
        """
        start, stop = offset, offset + length
        for attempt in range(DROP_ATTEMPTS):
            try:
                self._device.drop_cached(start, stop - start, failures if attempt else None)
            except DeviceError:
                if not attempt:
                    raise
                return  # a write-back has failed, perhaps of a neighbour
            if not self._has_cached(offset, length) or failures is None:
                return
            if attempt == 0:
                # Cached in one piece with the neighbours, since all this was one tensor that is
                # gone: the neighbours have to go too, and come back when they are read.
                # Of a striped device that many bytes of each member.
                unit = FOLIO_MAX_BYTES * len(self._device.info.targets)
                start = offset // unit * unit
                stop = min(-(-(offset + length) // unit) * unit, self._device.info.size)
            else:
                # Somebody reads a neighbour in the same piece or writes it back at this moment.
                time.sleep(DROP_PAUSE_S)

    def _has_cached(self, offset: int, length: int) -> bool:
        try:
            return self._device.cached_bytes(offset, length)[0] > 0
        except UnsupportedError:
            return True  # who knows


class PageCachePath(DirectPath):
    """Through the page cache: buffered I/O, kept by the kernel while memory is free.

    Entering it drops what is cached too: readahead for a neighbouring extent may have brought in
    pages that direct writes then went past.
    """

    name = "pagecache"

    def write_back(self, offset: int, length: int) -> None:
        """Called before an extent leaves this path, so that leaving takes no longer than it must:
        returns when what is dirty now is written."""
        self._device.write_back(offset, length, wait=True)


def open_paths(device: Device) -> dict[str, DirectPath]:
    """Both paths of a device, by name."""
    return {path.name: path(device) for path in (DirectPath, PageCachePath)}
