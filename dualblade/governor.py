"""How much memory page-cached tensors may take, as what is free goes up and down.

Pure logic: it is told the time and what was measured, so that it can be tested with a clock of the
tests' own. Less memory is believed at once, because the kernel reclaims meanwhile; more only after
it has stayed, because a group that comes back is read from the drive once more.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from dualblade.memory import format_size

if TYPE_CHECKING:
    from dualblade.memory import MemorySample

MARGIN_MIN_BYTES = 16 << 20
"""Kept free in any case: what a program may take between two samples without a warning, and the
pages of page tables, slabs and sockets that nobody announces."""
MARGIN_PART = 128
"""And of large memories this part: they are used by more at once."""
MARGIN_MAX_PART = 4
"""The margin never takes more than this part: with pressure that our leaving does not lift, more
would bring nothing."""
GROW_DELAY_S = 0.3
"""So long must memory be free before groups come back: longer than a spike of a computation, and
within a decode step or two."""
GROW_DELAY_MAX_S = 30.0
RELAPSE_S = 10.0
"""Groups that have to leave again so soon after they came back should have waited longer."""
CALM_S = 30.0
"""After so long without ups and downs the next growth waits no longer than the first one."""
PRESSURE_MIN_BYTES = 1 << 20
"""Pages reclaimed between two samples of which nothing is concluded: the kernel always finds a few
to try."""
EXPLAINED_S = 1.0
"""What is reclaimed so soon after memory became less was due to that, not to too small a margin."""
RAISE_PAUSE_S = 0.5
"""Time for a raised margin to show what it does before it is raised again."""
LOWER_PAUSE_S = 5.0
LOWER_PART = 8
LOWER_BYTES = 1 << 20
"""Calm gives back this part of what the margin was raised by, or so much, each LOWER_PAUSE_S."""


class Governor:
    """Turns samples of the memory into a budget of at most `cap_bytes`."""

    def __init__(self, cap_bytes: int | None = None) -> None:
        self.cap_bytes = cap_bytes
        self.budget_bytes = 0
        self.margin_bytes = MARGIN_MIN_BYTES
        self.grow_delay_s = GROW_DELAY_S
        self.reason = "no memory was measured yet"
        """Why the budget last changed."""
        self._rooms: deque[tuple[float, int]] = deque()
        """What was measured in the last CALM_S, as (time, bytes)."""
        self._returned_s: float | None = None
        self._shrunk_s = self._raised_s = self._lowered_s = float("-inf")

    def update(
        self, now_s: float, sample: MemorySample, pagecache_bytes: int, evicted_bytes: int = 0
    ) -> int:
        """The budget from now on. `pagecache_bytes`: what groups on the page-cache path take;
        `evicted_bytes`: what the kernel has reclaimed of it since the last update."""
        is_first = not self._rooms
        if sample.free_bytes - self.margin_bytes < pagecache_bytes:
            self._shrunk_s = now_s
        self._set_margin(now_s, sample, max(evicted_bytes, sample.refault_bytes))
        room = max(0, sample.free_bytes - self.margin_bytes)
        if self.cap_bytes is not None:
            room = min(room, self.cap_bytes)
        self._rooms.append((now_s, room))
        # One that is older stays: it tells that the whole window has been measured.
        while len(self._rooms) > 1 and self._rooms[1][0] <= now_s - CALM_S:
            self._rooms.popleft()
        if is_first:
            self.budget_bytes = room
            self.reason = f"{self._free(sample)} when it was opened"
        elif room < self.budget_bytes:
            self._shrink(now_s, sample, room, pagecache_bytes)
        else:
            self._grow(now_s, sample)
        return self.budget_bytes

    def came_back(self, now_s: float) -> None:
        """Groups were moved to the page cache because there was more room."""
        if self._shrunk_s > float("-inf"):  # else they come for the first time
            self._returned_s = now_s

    def _shrink(self, now_s: float, sample: MemorySample, room: int, pagecache_bytes: int) -> None:
        if room < pagecache_bytes:
            self.reason = f"{self._free(sample)}: groups had to leave"
            if self._returned_s is not None and now_s - self._returned_s < RELAPSE_S:
                self.grow_delay_s = min(2 * self.grow_delay_s, GROW_DELAY_MAX_S)
            self._returned_s = None
        self.budget_bytes = room

    def _grow(self, now_s: float, sample: MemorySample) -> None:
        lately = self._since(now_s - self.grow_delay_s)
        least = min(lately, default=0)
        if least > self.budget_bytes:
            self.budget_bytes = least
            self.reason = f"{self._free(sample)}, for {self.grow_delay_s:g} s"
        if self.grow_delay_s > GROW_DELAY_S:
            rooms = self._since(now_s - CALM_S)
            if rooms and max(rooms) - min(rooms) <= self.margin_bytes:
                self.grow_delay_s = GROW_DELAY_S

    def _since(self, start_s: float) -> list[int]:
        """What was measured since then, or nothing if the measurements do not go back so far."""
        if self._rooms[0][0] > start_s:
            return []
        found = []
        for at_s, room in reversed(self._rooms):
            found.append(room)
            if at_s <= start_s:
                break
        return found

    def _set_margin(self, now_s: float, sample: MemorySample, reclaimed_bytes: int) -> None:
        least = max(MARGIN_MIN_BYTES, sample.limit_bytes // MARGIN_PART)
        most = max(least, sample.limit_bytes // MARGIN_MAX_PART)
        if (
            reclaimed_bytes > PRESSURE_MIN_BYTES
            and now_s - self._shrunk_s >= EXPLAINED_S
            and now_s - self._raised_s >= RAISE_PAUSE_S
        ):
            self.margin_bytes += max(MARGIN_MIN_BYTES, reclaimed_bytes)
            self._raised_s = self._lowered_s = now_s
        elif now_s - self._lowered_s >= LOWER_PAUSE_S:
            raised_bytes = max(0, self.margin_bytes - least)
            self.margin_bytes -= min(raised_bytes, max(raised_bytes // LOWER_PART, LOWER_BYTES))
            self._lowered_s = now_s
        self.margin_bytes = min(max(self.margin_bytes, least), most)

    def _free(self, sample: MemorySample) -> str:
        capped = "" if self.cap_bytes is None else f", at most {format_size(self.cap_bytes)}"
        return (
            f"{format_size(sample.free_bytes)} free less a margin of "
            f"{format_size(self.margin_bytes)}{capped}"
        )
