"""Memory that pipelines use again and again: between storage and device, and the device's own."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import Any

import numpy as np

from dualblade.entry import BLOCK_BYTES, round_up

Array = np.ndarray[Any, Any]


class Meter:
    """How many bytes of staging are taken, and how many there ever were at once."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.taken_bytes = 0
        self.most_bytes = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """So many more, or with a minus fewer."""
        with self._lock:
            self.taken_bytes += nbytes
            self.most_bytes = max(self.most_bytes, self.taken_bytes)
            assert 0 <= self.taken_bytes <= self.limit_bytes


class Ring:
    """Memory that is taken piece after piece, and given back in the same order."""

    def __init__(self, memory: Array, meter: Meter) -> None:
        self.memory = memory
        self._meter = meter
        self._taken: deque[tuple[int, int]] = deque()
        """(offset, bytes) of what is taken, the oldest first."""

    def take(self, nbytes: int) -> Array | None:
        """So much in one piece, whole blocks from a page on; None where that is not free."""
        length = round_up(nbytes, BLOCK_BYTES)
        offset = self._place(length)
        if offset is None:
            return None
        self._taken.append((offset, length))
        self._meter.add(length)
        return self.memory[offset : offset + length]

    def has_room(self, nbytes: int) -> bool:
        """Whether take() would find so much."""
        return self._place(round_up(nbytes, BLOCK_BYTES)) is not None

    def _place(self, length: int) -> int | None:
        size = len(self.memory)
        if not self._taken:
            return 0 if length <= size else None
        first = self._taken[0][0]
        end = sum(self._taken[-1])
        if end > first:  # what is free is behind the last, and before the first
            if end + length <= size:
                return end
            return 0 if length <= first else None
        return end if end + length <= first else None

    def give_back(self) -> None:
        """The oldest piece is free again."""
        _, length = self._taken.popleft()
        self._meter.add(-length)


class Buffers:
    """Device memory for groups, one flat run for each, lent again when nobody uses it any more.

    Memory that comes back brings events along: who has it next starts after these.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._idle: list[tuple[Any, list[Any]]] = []
        self._lock = threading.Lock()
        self.allocated = 0
        """How often there was none to be had."""

    def lend(self, nbytes: int, stream: Any) -> tuple[Any, list[Any]]:
        """So many bytes or more, in the order of a stream, and the events to wait for before."""
        with self._lock:
            fitting = [each for each in self._idle if nbytes <= each[0].nbytes]
            if fitting:
                found = min(fitting, key=_how_good)
                self._idle = [each for each in self._idle if each is not found]
                return found[0], [event for event in found[1] if not event.done]
            # Too small for what is wanted now: it would only lie there.
            self._idle = [each for each in self._idle if not all(e.done for e in each[1])]
            self.allocated += 1
        # Up to an eighth more, so that tensors which grow by a token a step find the same again.
        unit = max(BLOCK_BYTES, 1 << max(0, nbytes.bit_length() - 4))
        return self._device.empty(round_up(nbytes, unit), "uint8", stream=stream), []

    def take_back(self, memory: Any, events: list[Any]) -> None:
        """It may be lent again, to whoever waits for these events."""
        with self._lock:
            self._idle.append((memory, events))

    def close(self) -> None:
        """Waits until nothing uses it any more, and lets go of it."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, events in idle:
            for event in events:
                with contextlib.suppress(Exception):  # whose error it is hears of it there
                    event.wait()


def _how_good(lendable: tuple[Any, list[Any]]) -> tuple[bool, int]:
    """Less is better: memory that nobody is at work with, and then no larger than it must be."""
    memory, events = lendable
    return not all(event.done for event in events), memory.nbytes
