"""How the stores of one process share the memory that is free: each would take all of it.

Pure but for the lock: whoever follows the memory says what it wants and asks for its share.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence


def fair_share(wants: Sequence[int], total_bytes: int) -> list[int]:
    """Of so many bytes each gets what it wants, or those that want most get equally much.

    What nobody wants yet is split evenly: there has to be room before something comes.
    """
    shares = [0] * len(wants)
    left_bytes = max(0, total_bytes)
    waiting = sorted(range(len(wants)), key=lambda index: wants[index])
    for turn, index in enumerate(waiting):
        shares[index] = min(wants[index], left_bytes // (len(waiting) - turn))
        left_bytes -= shares[index]
    return [share + left_bytes // len(wants) for share in shares]


class Sharing:
    """Who shares memory, and what each wants of it. An owner that is gone shares no more."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._wants: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    def share(self, owner: object, wanted_bytes: int, free_bytes: int) -> int:
        """What of the free memory is the owner's, who has or would have so much of it."""
        with self._lock:
            self._wants[owner] = wanted_bytes
            owners = list(self._wants.items())
        if len(owners) == 1:
            return free_bytes
        shares = fair_share([wanted for _, wanted in owners], free_bytes)
        return next(share for (each, _), share in zip(owners, shares, strict=True) if each is owner)

    def forget_after_fork(self) -> None:
        """In the child the stores are the parent's, and the lock may be held by one of its
        threads."""
        self._lock = threading.RLock()
        self._wants = weakref.WeakKeyDictionary()

    def leave(self, owner: object) -> None:
        """The owner takes nothing any more."""
        with self._lock:
            self._wants.pop(owner, None)


PROCESS = Sharing()
"""All stores of this process that follow the memory."""

os.register_at_fork(after_in_child=PROCESS.forget_after_fork)
