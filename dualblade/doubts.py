"""Which tensors the drive may not have, although nothing of them is dirty any more."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from dualblade import _core
from dualblade.entry import Entry


class Doubts:
    """Tells what was written through the page cache before a write-back failed, and was not known
    to be on the drive by then.

    The kernel takes the pages that the drive refused for clean: nobody writes them again, and when
    they are dropped what was in them is lost. Nor does it say which they were. So time is cut into
    turns, of which each failure ends one, and an entry knows the turns of the first and of the last
    write that the drive is not known to have. Any thread may call the methods; none waits for I/O.
    """

    def __init__(self, device: _core.Device) -> None:
        self._device = device
        self._lock = threading.RLock()
        self._failures = device.write_back_failures()
        self._turn = 1
        self._failed_turn = 0
        """The last one that a failure ended."""
        self.is_open = False
        """Whether there may be an entry in doubt."""

    def forget_after_fork(self) -> None:
        """In the child the lock may be held by a thread that there is not."""
        self._lock = threading.RLock()

    def mark(self, entries: Iterable[Entry]) -> None:
        """Called before these are written through the page cache."""
        with self._lock:
            turn = self._turn
            for entry in entries:
                entry.unsure_until = turn
                if not entry.unsure_since:
                    entry.unsure_since = turn

    def look(self) -> int:
        """How many write-backs have failed so far."""
        with self._lock:
            failures = self._device.write_back_failures()
            if failures != self._failures:
                # In this order, whatever an interrupt leaves out is done by the next look.
                self.is_open = True
                self._failed_turn = self._turn
                self._turn += 1
                self._failures = failures
            return failures

    def has(self, entry: Entry) -> bool:
        """Whether a write-back that has failed may have been of this entry."""
        return 0 < entry.unsure_since <= self._failed_turn

    def close(self, failures: int) -> None:
        """Nothing was in doubt when there were so many failures."""
        with self._lock:
            if failures == self._failures:
                self.is_open = False

    def next_turn(self) -> int:
        """Begins a turn; the one that it ends."""
        with self._lock:
            self._turn += 1
            return self._turn - 1

    def settle(self, entries: Iterable[Entry], turn: int, failures: int) -> bool:
        """The drive has all that was written of these up to the end of a turn, unless there have
        been more than so many failures by now: then False."""
        with self._lock:
            if self.look() != failures:
                return False
            for entry in entries:
                if entry.unsure_until <= turn:
                    entry.unsure_since = entry.unsure_until = 0
                elif entry.unsure_since:
                    entry.unsure_since = max(entry.unsure_since, turn + 1)
            return True
