"""Staging memory of a device, and how many streams and arenas are open."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from dualblade._core import Buffer
from dualblade.errors import ClosedError

Array = np.ndarray[Any, Any]

# By id, and without a lock: a stream that nobody closed may die anywhere, and a fork come any time.
_open: dict[str, dict[int, None]] = {"gpu_streams": {}, "gpu_arenas": {}}


def count_opened(name: str, what: object) -> None:
    """Notes that one more of these is open."""
    _open[name][id(what)] = None


def count_closed(name: str, what: object) -> None:
    """Notes that it is open no more."""
    _open[name].pop(id(what), None)


def counters() -> dict[str, int]:
    """What is open in this process: "gpu_streams" and "gpu_arenas"."""
    return {name: len(which) for name, which in _open.items()}


class Arena:
    """One run of page-aligned memory, in huge pages where the kernel has them.

    The drive reads into `array` and the copies to the device start from there. After `close` the
    memory goes when the last array over it is gone.
    """

    pinned = False
    """Whether the device has pinned it: copies from other memory hold up who starts them."""

    def __init__(self, size_bytes: int) -> None:
        """Raises ValueError, MemoryError."""
        if size_bytes <= 0:
            raise ValueError(f"an arena of {size_bytes} bytes holds nothing; give a size above 0")
        self.size_bytes = size_bytes
        self._lock = threading.RLock()
        self._array: Array | None = np.frombuffer(Buffer(size_bytes), np.uint8)
        count_opened("gpu_arenas", self)

    @property
    def array(self) -> Array:
        """All of it: uint8 [size_bytes]. Raises ClosedError."""
        array = self._array
        if array is None:
            raise ClosedError("this arena was closed; open the pipeline again")
        return array

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._array is None

    def close(self) -> None:
        """Lets go of the memory; copies under way from or to it are finished before it goes."""
        with self._lock:
            if self._array is None:
                return
            self._let_go()
            self._array = None
            count_closed("gpu_arenas", self)

    def _let_go(self) -> None:
        """What has to happen before the memory may go: nothing, as copies keep it alive."""

    def __del__(self) -> None:
        if getattr(self, "_array", None) is not None:
            self.close()
