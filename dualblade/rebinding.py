"""How groups of tensors change their path while others use them, under TensorStore."""

from __future__ import annotations

from collections.abc import Iterable

from dualblade.entry import Entry
from dualblade.errors import KeyNotFoundError
from dualblade.memory import format_size
from dualblade.residency import PathName
from dualblade.transfer import EntryTransfer


class Rebinding(EntryTransfer):
    """Moves groups to another path: what is cached of them goes, their bytes stay in place."""

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
        same blocks are reached the other way. ValueError if the group would not fit into the
        memory budget, KeyNotFoundError if there is no such group.
        """
        if path not in self._paths:
            raise ValueError(f"path={path!r} is unknown: take 'direct' or 'pagecache'")
        while True:
            keys = self._keys_of_group(group)
            try:
                with self._exclusive(keys) as entries:
                    if self._rebind(group, path, entries):
                        return
            except KeyNotFoundError:
                continue  # one was deleted meanwhile

    def _keys_of_group(self, group: str) -> list[str]:
        """The keys of a group, at a moment at which these are all its tensors: none is on its way
        in, and none is deleted but still being read."""
        while True:
            self._settle_tickets()
            with self._lock:
                self._check_open()
                if group not in self._residency.groups:
                    raise KeyNotFoundError(f"there is no group {group!r}")
                keys = [entry.key for entry in self._index.of_group(group)]
                if self._residency.groups[group].tensors == len(keys):
                    return keys
                if not self._tickets:
                    self._changed.wait()

    def _rebind(self, group: str, path: PathName, entries: list[Entry]) -> bool:
        """Moves a group whose entries the caller has for itself; False if these are not all."""
        with self._lock:
            bound = self._residency.groups[group]
            if bound.tensors != len(entries) or any(entry.group != group for entry in entries):
                return False
            before = bound.path
            if before == path:
                return True
            if path == "pagecache" and not self._residency.fits(bound.size_bytes):
                raise ValueError(
                    f"group {group!r} has {format_size(bound.size_bytes)}, and of the memory "
                    f"budget of {format_size(self._residency.budget_bytes)} page-cached tensors "
                    f"already take {format_size(self._residency.pagecache_bytes)}"
                )
            # Before the pages go: what is put from now on takes the new path.
            self._residency.move(group, path)
        try:
            for entry in entries:
                if entry.layout.extent_bytes:
                    self._paths[path].enter(entry.offset, entry.layout.extent_bytes)
        except BaseException:
            with self._lock:
                self._residency.move(group, before)
            raise
        return True

    def _go_direct(self, groups: Iterable[str]) -> None:
        """Makes room in the memory budget for groups that are about to grow."""
        for group in groups:
            try:
                self.set_path(group, "direct")
            except KeyNotFoundError:
                continue  # deleted meanwhile
