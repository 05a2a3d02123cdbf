"""Memory that is lent out as arrays, and comes back by itself when nothing refers to them."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np

from dualblade._core import BLOCK_BYTES, Buffer

Array = np.ndarray[Any, Any]


class BufferPool:
    """Page-aligned memory that is lent out as arrays and comes back when their last view is gone.

    Sizes are rounded up by at most an eighth, so that a cache which grows by a token a step finds
    the same memory again, its pages already there. At most `idle_limit` bytes wait to be used, or
    twice the largest buffer that was lent if that is more, keys and values: without them a step
    would need as much all the same.
    """

    def __init__(self, idle_limit: int) -> None:
        self._idle_limit = idle_limit
        self._largest = 0
        self._idle: list[Buffer] = []  # the longest unused first
        self._lent: dict[int, _Loan] = {}
        # Reentrant: an array may die anywhere, also in this thread while it holds the lock.
        self._lock = threading.RLock()
        self._is_closed = False

    @property
    def idle_bytes(self) -> int:
        """Of memory that waits to be used."""
        return sum(map(len, self._idle.copy()))

    @property
    def lent_bytes(self) -> int:
        """Of memory that somebody uses."""
        return sum(len(loan.buffer) for loan in self._lent.copy().values())

    @staticmethod
    def lent_size(size: int) -> int:
        """What a request for so many bytes is rounded up to."""
        step = max(BLOCK_BYTES, 1 << max(0, size.bit_length() - 4))
        return -(-size // step) * step

    def lend(self, size: int) -> Array:
        """An array of bytes, at least so many. Raises MemoryError."""
        length = self.lent_size(size)
        buffer = self._take_idle(length) or Buffer(length)
        self._largest = max(self._largest, length)
        # Every view that is ever made of this array refers to it: numpy goes no further back than
        # to the array whose memory belongs to something else.
        root = np.frombuffer(buffer, np.uint8)
        loan = _Loan(root, self._take_back)
        loan.buffer = buffer
        self._lent[id(loan)] = loan
        return root

    def _take_idle(self, length: int) -> Buffer | None:
        with self._lock:
            for buffer in reversed(self._idle.copy()):
                if len(buffer) == length:
                    try:
                        self._idle.remove(buffer)
                    except ValueError:
                        continue  # an array died just now, and made this one too many
                    return buffer
            # A cache that has grown asks for more than it did and will not ask for less again:
            # what is idle and smaller goes before new memory is taken, not after.
            self._idle = [buffer for buffer in self._idle if len(buffer) > length]
            return None

    def _take_back(self, loan: _Loan) -> None:
        with self._lock:
            del self._lent[id(loan)]
            if self._is_closed:
                return
            self._idle.append(loan.buffer)
            while self.idle_bytes > max(self._idle_limit, 2 * self._largest):
                self._idle.pop(0)

    def close(self) -> None:
        """Lets go of what is idle; what is lent goes when it comes back."""
        with self._lock:
            self._is_closed = True
            self._idle.clear()


class _Loan(weakref.ref):  # type: ignore[type-arg]
    """Says when the array is gone, and which buffer it used."""

    __slots__ = ("buffer",)
    buffer: Buffer
