"""How groups of tensors change their path while others use them, under TensorStore."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dualblade.access import IS_USED, Operation, inside, is_written, refuse_views
from dualblade.entry import Entry, footprint_of
from dualblade.errors import DeviceError, KeyNotFoundError, LiveViewError
from dualblade.index import collector_paused
from dualblade.memory import format_size
from dualblade.paths import PageCachePath
from dualblade.residency import Candidate, PathName, plan_moves
from dualblade.transfer import SURE_ATTEMPTS, EntryTransfer

WAY_PART = 64
"""Who appends past the budget frees this part of it at least: of many small groups some leave at
once, and not one for each append."""
WAY_REST = 20
"""After a look in vain so many times as long as it took pass before the next one, unless views come
or go: they are what keeps groups in the page cache."""
BUSY_S = 0.05
"""So long a group that has to leave the page cache may be in use before its users have to wait."""


class Survey(NamedTuple):
    """All groups at one moment, and the entries of each."""

    candidates: list[Candidate]
    members: dict[str, list[Entry]]


class Rebinding(EntryTransfer):
    """Moves groups to another path: what is cached of them goes, their bytes stay in place."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._resident: dict[Entry, int] = {}
        """Bytes of page-cached entries that were found in memory; read and changed freely."""
        self._making_way = threading.RLock()
        """One at a time has groups leave for appends; the others find room then."""
        self._way_after_s = 0.0
        self._way_views_bytes = 0
        """What was viewed when nobody could leave."""
        self._moves: Counter[PathName] = Counter()
        """How many groups were moved to each path for the memory's sake."""
        self._problems = 0
        self._last_problem = ""

    def forget_after_fork(self) -> None:
        """In the child after a fork: the lock may be held by a thread of the parent's."""
        super().forget_after_fork()
        self._making_way = threading.RLock()

    def path_of(self, group: str) -> PathName:
        """The path that a group takes now. KeyNotFoundError if there is no such group."""
        with self._lock:
            self._check_open()
            bound = self._residency.groups.get(group)
            if bound is None:
                raise KeyNotFoundError(f"there is no group {group!r}")
            return bound.path

    def set_path(self, group: str, path: PathName) -> None:
        """Moves a group to another path, while others read and write what they like.

        No data moves: what the page cache holds is written back and dropped, and from then on the
        same blocks are reached the other way. A store that follows the memory leaves the group
        there, unless it has to go direct for want of room. ValueError if the group would not fit
        into the memory budget, KeyNotFoundError if there is no such group, LiveViewError while
        there are views of its tensors.
        """
        if path not in self._paths:
            raise ValueError(f"path={path!r} is unknown: take 'direct' or 'pagecache'")
        if path == "pagecache":
            with self._lock:
                bound = self._residency.groups.get(group)
                if bound is not None and bound.stored_bytes:
                    self._residency.settle(group)  # what is asked for is not what may come one day
        self._bind(group, path, wish=path)

    def rebalance(self) -> None:
        """Binds the groups in which nothing is stored yet as if all had come at once.

        A group is bound when it is made, while there is room. Call this when all groups of a kind
        have been made and before anything is stored in them, so that the binding decides which of
        them are page-cached. It costs no I/O.
        """
        if self._residency.policy != "dual":
            return
        with self._operation(), self._lock:
            found = self._survey().candidates
            fixed = [group._replace(is_pinned=not group.is_empty) for group in found]
            residency = self._residency
            moves = plan_moves(fixed, residency.budget_bytes, residency.binding)
            for name in moves.to_direct:
                residency.move(name, "direct")
            for name in moves.to_pagecache:
                residency.move(name, "pagecache")

    def _bind(self, group: str, path: PathName, *, wish: PathName | None = None) -> None:
        while True:
            keys = self._keys_of_group(group)
            try:
                with self._exclusive(keys) as entries:
                    if self._rebind(group, path, entries):
                        if wish is not None:
                            with self._lock:  # a group that grows is replaced by another
                                self._residency.groups[group].wish = wish
                        return
            except KeyNotFoundError:
                continue  # one was deleted meanwhile

    def _keys_of_group(self, group: str) -> list[str]:
        """The keys of a group, at a moment at which these are all its tensors: none is on its way
        in, and none is deleted but still being read. LiveViewError: views are not waited for."""
        while True:
            self._settle_tickets()
            self._release_views()
            with self._lock:
                self._check_open()
                if group not in self._residency.groups:
                    raise KeyNotFoundError(f"there is no group {group!r}")
                keys = [entry.key for entry in self._index.of_group(group)]
                if self._residency.groups[group].tensors == len(keys):
                    return keys
                refuse_views(entry for entry in self._index.kept if entry.group == group)
                if not self._tickets:
                    self._changed.wait()

    def _rebind(
        self,
        group: str,
        path: PathName,
        entries: Sequence[Entry],
        operation: Operation | None = None,
    ) -> bool:
        """Moves a group whose entries the caller has for itself; False if these are not all.

        With the `operation` that holds them others use them again while their pages are dropped.
        """
        if not self._is_whole(group, entries):
            return False
        if self._residency.groups[group].path != path:
            self._make_sure(entries)  # what is dropped must not be all there is
        with self._lock:
            if not self._is_whole(group, entries):
                return False
            bound = self._residency.groups[group]
            before = bound.path
            if before == path:
                return True
            if path == "pagecache" and not self._residency.fits(bound.claim_bytes):
                raise ValueError(
                    f"group {group!r} has {format_size(bound.claim_bytes)}, and of the memory "
                    f"budget of {format_size(self._residency.budget_bytes)} page-cached tensors "
                    f"already take {format_size(self._residency.claimed_bytes)}"
                )
            for entry in entries:  # an append that failed may have left more
                self._index.account(entry, footprint_of(entry.nbytes), self._residency)
            # Before the pages go: what is put from now on takes the new path.
            self._residency.move(group, path)
            if operation is not None and path == "direct":
                # No buffered read or write of them is under way. What is read and written past the
                # page cache agrees with what is still in it: the kernel sees to that.
                self._share(operation)
        failures = self._doubts.look()
        spares = self._doubts.is_open
        try:
            for entry in entries:
                self._resident.pop(entry, None)
                if entry.layout.extent_bytes:
                    self._paths[path].enter(
                        entry.offset, entry.layout.extent_bytes, None if spares else failures
                    )
        except BaseException:
            with self._lock:
                self._residency.move(group, before)
            raise
        return True

    def _is_whole(self, group: str, entries: Sequence[Entry]) -> bool:
        """Whether these are all tensors of a group: their keys may have been put into others."""
        with self._lock:
            bound = self._residency.groups.get(group)
            if bound is None or bound.tensors != len(entries):
                return False
            return all(entry.group == group for entry in entries)

    def _go_direct(self, groups: Iterable[str]) -> None:
        """Makes room in the memory budget for groups that are about to grow."""
        for group in groups:
            try:
                self._bind(group, "direct")
            except (KeyNotFoundError, LiveViewError):
                continue  # deleted meanwhile, or looked at

    @inside
    def _make_way(self, growth: Mapping[str, int]) -> bool:
        """Has groups go direct, in the binding's order, so that some can grow by so many bytes;
        False if none can go. The caller holds no entries."""
        residency = self._residency
        moved = 0
        self._release_views()
        with self._making_way:
            begin_s, views_bytes = time.monotonic(), self._index.viewed_bytes
            is_vain = begin_s < self._way_after_s and views_bytes == self._way_views_bytes
            # Others may have had some go meanwhile.
            if residency.over(growth, by_claim=False) > 0 and not is_vain:
                moved = self._make_room(residency.budget_bytes // WAY_PART, growth)
                self._moves["direct"] += moved
                if not moved:
                    now_s = time.monotonic()
                    self._way_after_s = now_s + WAY_REST * (now_s - begin_s)
                    self._way_views_bytes = views_bytes
        return moved > 0 or residency.over(growth, by_claim=False) <= 0

    # ---- what the drive may not have --------------------------------------------------------

    def _doubted(self) -> list[str]:
        """The keys of what was in memory alone, perhaps, after a write-back had failed."""
        self._doubts.look()
        if not self._doubts.is_open:
            return []
        with self._lock:
            failures = self._doubts.look()
            has = self._doubts.has
            keys = [entry.key for entry in list(self._index.entries.values()) if has(entry)]
            # What is being put now is found once it is stored.
            if not keys and not any(has(e) for each in self._operations for e in each.created):
                self._doubts.close(failures)
            return keys

    def _settle_doubts(self) -> None:
        """Returns when the drive has what failed write-backs did not bring it. Raises as
        `_make_sure`."""
        for _ in range(SURE_ATTEMPTS):
            keys = self._doubted()
            if not keys:
                return
            for key in keys:
                self._settle_doubt(key)

    def _settle_doubt(self, key: str) -> None:
        try:
            with self._appending([key]) as (entry,):
                self._make_sure([entry])
        except KeyNotFoundError:
            return  # deleted meanwhile: nobody asks for it

    # ---- many at once -----------------------------------------------------------------------

    def _survey(self, growth: Mapping[str, int] | None = None) -> Survey:
        """All groups, and what each claims of the budget; or, if some are about to grow, what will
        be stored in it."""
        with self._lock:
            self._check_open()
            entries = list(self._index.entries.values())
            groups = list(self._residency.groups.items())
        # Without the lock from here on: whoever moves a group looks at it once more.
        members: dict[str, list[Entry]] = {}
        for entry in entries:
            members.setdefault(entry.group, []).append(entry)
        candidates = []
        for name, group in groups:
            own = members.get(name, ())
            is_empty = group.tensors == len(own) and not any(
                entry.users or entry.stored or entry.held for entry in own
            )
            is_viewed = any(entry.views for entry in own)
            if growth is None:
                taken_bytes = group.claim_bytes
            else:
                taken_bytes = group.stored_bytes + growth.get(name, 0)
            candidates.append(
                Candidate(name, taken_bytes, group.path, is_empty, is_viewed, group.wish)
            )
        return Survey(candidates, members)

    def _move_if_idle(self, group: str, path: PathName, entries: Sequence[Entry]) -> bool:
        """Moves a group if nobody uses it at this moment, and there is room; whether it did.

        Readers do not keep a group from the page cache: what they read past it stays true. A
        decoder always has its next direct layers under way.
        """
        in_use = is_written
        if path == "direct":
            in_use = IS_USED
            pagecache = self._paths["pagecache"]
            assert isinstance(pagecache, PageCachePath)
            for entry in entries:
                pagecache.write_back(entry.offset, entry.stored)
        with self._idle(group, entries, in_use) as operation:
            if operation is None:
                return False
            try:
                return self._rebind(group, path, entries, operation)
            except ValueError:  # others have taken the room meanwhile
                return False

    def _make_room(self, spare_bytes: int = 0, growth: Mapping[str, int] | None = None) -> int:
        """Moves groups to the direct path until the others leave so much of the budget; how many.

        What counts is what they claim; or, where some are about to grow, what will be stored.
        Those that are in use come last; then their users wait for it.
        """
        residency = self._residency

        def is_over() -> bool:
            return residency.over(growth or {}, by_claim=growth is None) + spare_bytes > 0

        with collector_paused():
            found = self._survey(growth)
        budget_bytes = max(0, residency.budget_bytes - spare_bytes)
        busy = plan_moves(found.candidates, budget_bytes, residency.binding).to_direct
        moved = 0
        until_s = time.monotonic() + BUSY_S
        while busy and is_over():
            again = []
            for group in busy:
                if not is_over():
                    break
                try:
                    if self._move_if_idle(group, "direct", found.members.get(group, ())):
                        moved += 1
                    else:
                        again.append(group)
                except DeviceError as error:  # others may still be able to leave
                    self._note_problem(error)
            busy = again
            if busy and time.monotonic() < until_s:
                self._settle_finished()
                with self._lock:
                    self._changed.wait(BUSY_S / 10)
            elif busy:
                try:
                    self._bind(busy.pop(0), "direct")
                    moved += 1
                except (KeyNotFoundError, LiveViewError):
                    continue  # deleted meanwhile, or looked at
                except DeviceError as error:
                    self._note_problem(error)
        return moved

    def _note_problem(self, error: Exception) -> None:
        """What went wrong in the background, for stats(): it is tried again."""
        self._problems += 1
        self._last_problem = f"{type(error).__name__}: {error}"
