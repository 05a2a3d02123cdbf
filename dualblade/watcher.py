"""Following the memory: a thread that binds groups anew as what is free goes up and down."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from dualblade import _core, sharing
from dualblade.access import is_written
from dualblade.entry import Entry
from dualblade.errors import ClosedError, CorruptionError, DeviceError, UnsupportedError
from dualblade.governor import EXPLAINED_S, Governor
from dualblade.index import collector_paused
from dualblade.memory import MemorySample, MemoryWatch
from dualblade.rebinding import Rebinding, Survey
from dualblade.residency import plan_moves
from dualblade.writeback import WriteBack

INTERVAL_S = 0.1
"""Between two looks at the memory: a program can touch some hundred megabytes meanwhile, which the
kernel takes from clean page cache; more often would cost more than a percent of a core."""
STABLE_S = 0.5
"""Groups come back once none has come or gone for so long."""
SPREAD_S = 5.0
"""Groups change places for a better binding once nothing has moved for so long, one pair at a time:
each is read from the drive once more."""
SPREAD_MIN_BYTES = 1 << 20
"""Where groups are smaller on average it is no use: their reads overlap in any order."""
FILL_S = 0.05
"""So much of an interval may go into moves that can wait."""
SETTLE_S = 3.0
SETTLE_FILL_S = 60.0
"""A group keeps the room that was reserved for it as long as it would be full within so long, at
the pace of the last SETTLE_S."""
SETTLE_GROUPS = 1000
"""So many are looked at in one go, while nobody else gets the store's lock."""
PACE_S = 3.0
"""How quickly groups grow is measured over so long."""
AHEAD_S = 3 * INTERVAL_S
AHEAD_PART = 16
"""For what is appended within so long, room is made beforehand, at most this part of the budget:
else who appends has to wait."""
SPARE_S = 10.0
"""Groups that come leave the room that is appended within so long: or they would soon go again."""
ROOM_PART = 256
"""What groups could come back for is looked for anew once there is more room by this part."""
PLAN_REST = 50
"""After a plan so many times as long as it took pass before the next one that is not urgent."""
MEND_S = 0.2
MEND_MAX_S = 60.0
"""What the drive refused is given to it again after so long, twice as long each time up to this."""
RETURN_PART = 8
"""In one go groups come back of this part of the budget at most: a decode step that has to read
all of them from the drive would be longer than one before or after it."""
CHECK_S = 0.0005
"""Of each interval, for asking the kernel which pages of ours are in memory."""
CHECK_MIN_BYTES = 64 << 10
"""Smaller tensors are not asked for."""


class Watcher:
    """A thread that calls a method of an object again and again, as long as the object lives."""

    def __init__(self, tick: Callable[[], bool], changed: threading.Condition) -> None:
        """`tick` is a bound method, which returns whether to go on; `changed` a condition with a
        reentrant lock, which is notified when the thread has ended."""
        self._tick = weakref.WeakMethod(tick)
        _watchers.add(self)
        self._changed = changed
        self._is_due = threading.Event()
        self._is_running = False
        self._thread = threading.Thread(target=self._run, name="dualblade-watcher", daemon=True)

    @property
    def is_orphan(self) -> bool:
        """Whether the object is gone."""
        return self._tick() is None

    def start(self) -> None:
        """Starts the thread. RuntimeError where none can be had."""
        self._is_running = True
        try:
            self._thread.start()
        except BaseException:
            self._is_running = False
            raise

    def stop(self) -> None:
        """Ends the thread and returns when it has ended, unless it is this very thread."""
        self._is_due.set()
        if self._thread is threading.current_thread():
            return
        with self._changed:
            # A signal handler may be here while the frame that it interrupted holds the lock:
            # waiting gives that up, join() would not.
            while self._is_running:
                self._changed.wait()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_due.wait(INTERVAL_S):
                tick = self._tick()
                if tick is None or not tick():
                    return
                # Else this thread would keep the object alive, and be the one that closes it.
                del tick
        finally:
            with self._changed:
                self._is_running = False
                self._changed.notify_all()


_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


def join_orphans() -> None:
    """At exit: waits for the threads whose object is gone. They end by themselves, but one of them
    may be closing it just now."""
    for watcher in list(_watchers):
        if watcher.is_orphan:
            watcher.stop()


def shared(sample: MemorySample, governor: Governor, wanted_bytes: int) -> MemorySample:
    """A sample with the part of the free memory that other stores of this process leave."""
    if governor.cap_bytes is not None:
        wanted_bytes = min(wanted_bytes, governor.cap_bytes)
    wanted_bytes += governor.margin_bytes
    return sample._replace(
        free_bytes=sharing.PROCESS.share(governor, wanted_bytes, sample.free_bytes)
    )


class Watching(Rebinding):
    """Keeps the page-cached groups within the memory that is free, while the store is used."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._memory: MemoryWatch | None = None
        self._governor: Governor | None = None
        self._watcher: Watcher | None = None
        self._evicted_bytes = self._samples = 0
        self._groups_mark: tuple[int, ...] = ()
        """Changes when groups come, go or grow."""
        self._changed_s = self._moved_s = self._plan_after_s = 0.0
        self._shrunk_s = self._room_after_s = float("-inf")
        self._filled: tuple[tuple[int, ...], int] = (), 0
        """For which groups and how much room nothing more could come back."""
        self._settle_after_s = 0.0
        self._pace: deque[tuple[float, int]] = deque()
        """(time, grown_bytes) of the last PACE_S."""
        self._is_spread = False
        self._mend_after_s = self._mend_pause_s = 0.0
        self._checked: list[Entry] = []
        self._check_next = 0
        self._sources: dict[str, str] = {}

    # ---- the threads' life --------------------------------------------------------------------

    def follow_memory(self, memory: MemoryWatch, governor: Governor) -> None:
        """From now on the budget is what the governor makes of the memory's samples. Called once.

        Where no thread can be had (at interpreter exit, say) it stays what it is.
        """
        residency = self._residency
        self._memory = memory
        self._index.freed = []
        self._write_back = WriteBack(self._device, lambda: residency.budget_bytes)
        self._watcher = Watcher(self._tick, self._changed)
        try:
            self._write_back.start()
            self._governor = governor
            self._watcher.start()
        except RuntimeError as error:
            self._stop_threads()
            self._watcher = self._write_back = self._governor = self._index.freed = None
            self._last_problem = f"the memory is not followed: {error}"

    def _stop_threads(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
        if self._write_back is not None:
            self._write_back.stop()
        if self._memory is not None:
            self._memory.close()
        if self._governor is not None:
            sharing.PROCESS.leave(self._governor)

    def forget_after_fork(self) -> None:
        """In the child after a fork: the threads are the parent's too."""
        super().forget_after_fork()
        self._watcher = None
        if self._write_back is not None:
            self._write_back.forget_after_fork()
        if self._memory is not None:
            self._memory.close()

    # ---- one look -----------------------------------------------------------------------------

    def _tick(self) -> bool:
        """Looks at the memory and does what follows. What goes wrong is tried again."""
        try:
            self._look(time.monotonic())
        except ClosedError:
            return False
        except Exception as error:  # noqa: BLE001  the store goes on, and says what it was
            self._note_problem(error)
        return True

    def _look(self, now_s: float) -> None:
        memory, governor, residency = self._memory, self._governor, self._residency
        assert memory is not None
        assert governor is not None
        assert self._write_back is not None
        self._release_views()
        self._mend(now_s)
        sample = shared(memory.sample(self._index.viewed_bytes), governor, self._wanted_bytes())
        self._samples, self._sources = self._samples + 1, sample.sources
        if now_s - self._shrunk_s < EXPLAINED_S:
            # Whatever the kernel took of those that stay, it took because there was less.
            self._resident.clear()
        evicted_bytes = self._find_evicted()
        self._evicted_bytes += evicted_bytes
        budget = governor.update(now_s, sample, residency.claimed_bytes, evicted_bytes)
        self._settle_slow(now_s)
        pace = self._growth_per_s(now_s)
        with self._lock:
            self._check_open()
            residency.budget_bytes = budget
            self._pass_on_freed()
            self._write_back.wake()
            mark = len(residency.groups), self._index.extents.free_bytes
            unfilled_bytes = max(0, self._index.used_bytes - residency.stored_bytes)
        ahead_bytes = min(int(pace * AHEAD_S), unfilled_bytes, budget // AHEAD_PART)
        if residency.claimed_bytes + ahead_bytes > budget:
            if now_s < self._room_after_s:
                return
            moved = self._make_room(ahead_bytes)
            if not moved:  # views keep what would have to go
                self._room_after_s = now_s + PLAN_REST * (time.monotonic() - now_s)
            self._moves["direct"] += moved
            self._moved_s = self._shrunk_s = now_s
            self._is_spread = False
        elif mark != self._groups_mark:
            self._groups_mark, self._changed_s, self._is_spread = mark, now_s, False
        elif now_s - self._changed_s >= STABLE_S and now_s >= self._plan_after_s:
            self._fill(now_s, min(int(pace * SPARE_S), unfilled_bytes))

    def _wanted_bytes(self) -> int:
        """What all groups would take of the page cache, as far as that is known."""
        residency = self._residency
        return residency.stored_bytes + residency.claimed_bytes - residency.pagecache_bytes

    def _settle_slow(self, now_s: float) -> None:
        """Gives up what is kept for groups that are not about to be filled."""
        if now_s < self._settle_after_s:
            return
        self._settle_after_s = now_s + SETTLE_S
        with self._lock:
            names = list(self._residency.filling)
        for first in range(0, len(names), SETTLE_GROUPS):
            with self._lock:
                self._residency.settle_slow(
                    names[first : first + SETTLE_GROUPS], SETTLE_S / SETTLE_FILL_S
                )

    def _growth_per_s(self, now_s: float) -> float:
        """Bytes by which the claims of page-cached groups grow each second."""
        pace = self._pace
        pace.append((now_s, self._residency.grown_bytes))
        while len(pace) > 2 and pace[1][0] <= now_s - PACE_S:
            pace.popleft()
        (before_s, before_bytes), (_, grown_bytes) = pace[0], pace[-1]
        return (grown_bytes - before_bytes) / max(now_s - before_s, PACE_S)

    def _mend(self, now_s: float) -> None:
        """Gives the drive once more what it refused, before the kernel drops the pages, which it
        takes for clean."""
        if now_s < self._mend_after_s:
            return
        keys = self._doubted()
        if not keys:
            self._mend_pause_s = 0.0
            return
        random.shuffle(keys)  # those that it never takes must not be in the way of the others
        has_failed = False
        until_s = time.perf_counter() + FILL_S
        for key in keys:
            if time.perf_counter() > until_s:
                break
            with self._lock:
                entry = self._index.entries.get(key)
                if entry is None or is_written(entry) or self._puts_of([key]):
                    continue
            try:
                self._settle_doubt(key)
            except (DeviceError, CorruptionError) as error:
                self._note_problem(error)
                has_failed = True
        if has_failed:
            self._mend_pause_s = max(MEND_S, min(2 * self._mend_pause_s, MEND_MAX_S))
            self._mend_after_s = now_s + self._mend_pause_s

    def _fill(self, now_s: float, spare_bytes: int = 0) -> None:
        """Brings back what fits and leaves so much of the budget, and improves the binding when it
        is quiet."""
        residency, governor = self._residency, self._governor
        assert governor is not None
        budget = residency.budget_bytes
        room_bytes = budget - residency.claimed_bytes - spare_bytes
        mark = (*self._groups_mark, residency.shrunk)
        is_known = mark == self._filled[0] and room_bytes <= self._filled[1] + budget // ROOM_PART
        used_bytes = self._index.used_bytes
        is_coarse = used_bytes >= SPREAD_MIN_BYTES * len(residency.groups)
        is_quiet = now_s - max(self._moved_s, self._changed_s) >= SPREAD_S
        if is_known and (self._is_spread or not is_quiet):
            return
        is_full = residency.claimed_bytes + _core.BLOCK_BYTES > min(budget, used_bytes)
        if is_full and not is_coarse:
            return
        begin_s = time.perf_counter()
        # Of many groups many objects are made, none of which can be garbage.
        with collector_paused():
            found = self._survey()
            self._check_anew(found)
            swaps = int(is_quiet and is_coarse)
            moves = plan_moves(
                found.candidates,
                budget,
                residency.binding,
                swaps=swaps,
                spare_bytes=spare_bytes,
            )
        self._plan_after_s = now_s + PLAN_REST * (time.perf_counter() - begin_s)
        if not (moves.to_direct or moves.to_pagecache):
            self._filled = mark, room_bytes
            self._is_spread = is_quiet
            return
        self._settle_finished()  # appends that nobody has waited for hold their groups
        until_s = begin_s + FILL_S
        for name in moves.to_direct:
            if time.perf_counter() > until_s:
                return
            if self._move_if_idle(name, "direct", found.members.get(name, ())):
                self._moves["direct"] += 1
                self._moved_s = now_s
        sizes = {each.name: each.size_bytes for each in found.candidates if not each.is_empty}
        returned_bytes = 0
        for name in moves.to_pagecache:
            if time.perf_counter() > until_s or returned_bytes >= budget // RETURN_PART:
                return
            if self._move_if_idle(name, "pagecache", found.members.get(name, ())):
                self._moves["pagecache"] += 1
                self._moved_s = now_s
                returned_bytes += sizes.get(name, 0)
                if not swaps:
                    governor.came_back(now_s)

    def _pass_on_freed(self) -> None:
        """Hands what was freed to the thread that drops it from the page cache."""
        freed = self._index.freed
        if freed and self._write_back is not None:
            # In this order: an interrupt in between leaves them to be passed on twice.
            self._write_back.freed(freed)
            self._index.freed = []

    def _keep_freed(self, entries: Iterable[Entry]) -> None:
        """What is cached of extents that are given out again for the page cache may stay."""
        if self._write_back is None:
            return
        self._pass_on_freed()
        groups = self._residency.groups
        self._write_back.reused(
            [
                (entry.offset, entry.layout.extent_bytes)
                for entry in entries
                if groups[entry.group].path == "pagecache"
            ]
        )

    # ---- what of ours is in memory ------------------------------------------------------------

    def _check_anew(self, found: Survey) -> None:
        """From now on the entries that are page-cached by now are checked."""
        entries = [
            entry
            for group in found.candidates
            if group.path == "pagecache"
            for entry in found.members.get(group.name, ())
            if entry.layout.extent_bytes >= CHECK_MIN_BYTES
        ]
        known = self._resident
        self._resident = {entry: known[entry] for entry in entries if entry in known}
        self._checked = entries

    def _find_evicted(self) -> int:
        """Bytes that the kernel has taken of some page-cached entries since they were last seen."""
        evicted_bytes = 0
        until_s = time.perf_counter() + CHECK_S
        groups = self._residency.groups
        for _ in self._checked:
            entry = self._checked[self._check_next % len(self._checked)]
            self._check_next += 1
            group = groups.get(entry.group)
            if group is not None and group.path == "pagecache" and not entry.is_dead:
                stored = entry.stored
                try:
                    cached_bytes, _ = self._device.cached_bytes(entry.offset, stored)
                except UnsupportedError:
                    self._checked = []
                    break
                evicted_bytes += max(0, min(self._resident.get(entry, 0), stored) - cached_bytes)
                self._resident[entry] = cached_bytes
            if time.perf_counter() > until_s:
                break
        return evicted_bytes

    # ---- what it has done ---------------------------------------------------------------------

    def _residency_stats(self) -> dict[str, Any]:
        governor, write_back = self._governor, self._write_back
        return {
            "live": governor is not None,
            "binding": self._residency.binding,
            "budget_bytes": self._residency.budget_bytes,
            "pagecache_bytes": self._residency.pagecache_bytes,
            "claimed_bytes": self._residency.claimed_bytes,
            "resident_bytes": sum(self._resident.copy().values()),
            "margin_bytes": governor.margin_bytes if governor else 0,
            "grow_delay_s": governor.grow_delay_s if governor else 0.0,
            "reason": governor.reason if governor else "bound once, when it was opened",
            "samples": self._samples,
            "sources": dict(self._sources),
            "moves_to_direct": self._moves["direct"],
            "moves_to_pagecache": self._moves["pagecache"],
            "evicted_bytes": self._evicted_bytes,
            "dirty_bytes": write_back.dirty_bytes if write_back else 0,
            "dirty_most_bytes": write_back.most_bytes if write_back else 0,
            "dirty_waits": self._dirty_waits,
            "written_past_bytes": self._past_bytes,
            "problems": self._problems + (write_back.errors if write_back else 0),
            "last_problem": self._last_problem,
        }
