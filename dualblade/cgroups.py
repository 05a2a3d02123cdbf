"""The memory cgroups that this process is in, of version 1 or 2: where they are, what they count.

A cgroup bounds the memory of all below it, so that every level from the process's own up to the
root may be the one that gives out first.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dualblade.kernelfile import Fields, KernelFile, field

_NO_LIMIT = 1 << 62  # version 1 says "no limit" with the largest multiple of a page
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Hierarchy(NamedTuple):
    """Where the process is: the version of its memory cgroups (0: none can be seen), and their
    directories, its own first, then those above it as far as they can be seen."""

    version: int
    directories: tuple[Path, ...]


class CgroupLevel(NamedTuple):
    """What one cgroup, with all below it, was charged for at one moment, in bytes."""

    path: str
    limit_bytes: int | None
    """None where it has no limit of its own."""
    limit_source: str
    """The file that sets it; empty where none does."""
    usage_bytes: int
    anon_bytes: int
    shmem_bytes: int
    """Shared memory and files on tmpfs."""
    kernel_bytes: int
    """The kernel's memory for it, without what version 2 says can be reclaimed."""
    file_bytes: int
    """Page cache, of all its processes, ours included, shared memory not."""
    mapped_bytes: int
    """Of file_bytes and shmem_bytes, what a process has mapped, as it does with its libraries."""
    dirty_bytes: int
    writeback_bytes: int
    refault_bytes: int | None
    """Of page cache that was read again after reclaim had taken it, since the cgroup was made."""
    reclaim_events: int | None
    """How often somebody ran into this level's limit, since the cgroup was made."""

    @property
    def unreclaimable_bytes(self) -> int:
        """What reclaim can't give back (swap aside)."""
        return self.anon_bytes + self.shmem_bytes + self.kernel_bytes


# ---- where ---------------------------------------------------------------------------------------


def find_hierarchy(root: Path) -> Hierarchy:
    """Where this process is now, of the tree whose /proc and /sys are below `root`."""
    entries = [
        line.split(":", 2)
        for line in _read_lines(root / "proc/self/cgroup")
        if line.count(":") >= 2
    ]
    # On a hybrid host a version 2 line ("0::/") is there too, but its tree has no memory
    # controller: a version 1 memory line goes first.
    for _, controllers, path in entries:
        if "memory" in controllers.split(","):
            return _hierarchy(1, _walk_up(root, "cgroup", "memory", path))
    for number, controllers, path in entries:
        if number == "0" and not controllers:
            return _hierarchy(2, _walk_up(root, "cgroup2", "", path))
    return Hierarchy(0, ())


def _hierarchy(version: int, directories: tuple[Path, ...]) -> Hierarchy:
    return Hierarchy(version if directories else 0, directories)


def _walk_up(root: Path, kind: str, controller: str, path: str) -> tuple[Path, ...]:
    """Existing directories from a cgroup's path up to where its tree is mounted. Of several mounts
    the one that shows most of them."""
    found: tuple[Path, ...] = ()
    for mount, mounted in _cgroup_mounts(root, kind, controller):
        # A bind mount (a container without a cgroup namespace) shows only the part of the tree
        # below `mounted`; a process outside its namespace's root has a path with "..".
        base = mounted.rstrip("/")
        inside = path[len(base) :] if path == base or path.startswith(base + "/") else path
        parts = [part for part in inside.split("/") if part not in ("", "..")]
        seen = tuple(
            directory
            for depth in range(len(parts), -1, -1)
            if _exists((directory := mount.joinpath(*parts[:depth])) / "memory.stat")
        )
        found = max(found, seen, key=len)
    return found


def _exists(path: Path) -> bool:
    """Not to be entered is as good as not there."""
    with suppress(OSError):
        return path.exists()
    return False


def _cgroup_mounts(root: Path, kind: str, controller: str) -> Iterator[tuple[Path, str]]:
    """Where a cgroup tree is mounted, and which of its directories is mounted there."""
    yield root / "sys/fs/cgroup" / controller, "/"
    for line in _read_lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) < 5 or len(right) < 3 or right[0] != kind:
            continue
        if not controller or controller in right[2].split(","):
            yield root / _unescape(left[4]).lstrip("/"), _unescape(left[3])


def _unescape(text: str) -> str:
    """mountinfo writes blanks, tabs, newlines and backslashes in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read_lines(path: Path) -> list[str]:
    """No lines if the file is not there: /proc may be restricted, and cgroups may be absent."""
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


# ---- what they count -----------------------------------------------------------------------------


class CgroupFiles(ABC):
    """The files of one cgroup, kept open."""

    _names: tuple[str, ...]
    events_name: str
    """The file that counts how often its limit was run into."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory)
        self._files = {name: KernelFile(directory / name) for name in self._names}

    @abstractmethod
    def limit(self) -> tuple[int | None, str]:
        """The limit, and the file that sets it; (None, "") where there is none."""

    @abstractmethod
    def read(self) -> CgroupLevel:
        """What the cgroup counts now. What can't be read counts as nothing."""

    def missing(self) -> list[str]:
        """The names of the files that can't be read."""
        return [name for name, file in self._files.items() if file.missing]

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def _stat(self) -> Fields:
        return Fields(self._files["memory.stat"].read())


class CgroupFilesV1(CgroupFiles):
    """Of version 1, where the total_ fields are those of the whole subtree."""

    _names = (
        "memory.stat",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "memory.failcnt",
        "memory.kmem.usage_in_bytes",
    )
    events_name = "memory.failcnt"

    def __init__(self, directory: Path, *, is_topmost: bool) -> None:
        super().__init__(directory)
        self._is_topmost = is_topmost

    def limit(self) -> tuple[int | None, str]:
        """Its own limit; of the topmost that can be seen, also the least of those above it."""
        found = [(self._files["memory.limit_in_bytes"].number(), "memory.limit_in_bytes")]
        if self._is_topmost:
            stat = self._files["memory.stat"].read()
            above = field(stat, b"\nhierarchical_memory_limit ")
            found.append((above, "memory.stat (hierarchical_memory_limit)"))
        return _least(found)

    def read(self) -> CgroupLevel:
        """What the cgroup and all below it count now."""
        stat = self._stat()
        shmem_bytes = _total(stat, b"shmem")
        refaults = stat.first(b"total_workingset_refault_file", b"total_workingset_refault")
        return CgroupLevel(
            self.path,
            *self.limit(),
            usage_bytes=self._files["memory.usage_in_bytes"].number() or 0,
            anon_bytes=_total(stat, b"rss"),
            shmem_bytes=shmem_bytes,
            kernel_bytes=self._files["memory.kmem.usage_in_bytes"].number() or 0,
            file_bytes=max(0, _total(stat, b"cache") - shmem_bytes),
            mapped_bytes=_total(stat, b"mapped_file"),
            dirty_bytes=_total(stat, b"dirty"),
            writeback_bytes=_total(stat, b"writeback"),
            refault_bytes=None if refaults is None else refaults * _PAGE_BYTES,
            reclaim_events=self._files["memory.failcnt"].number(),
        )


def _least(limits: Iterable[tuple[int | None, str]]) -> tuple[int | None, str]:
    found = [(limit, name) for limit, name in limits if limit is not None and limit < _NO_LIMIT]
    return min(found, default=(None, ""))


def _total(stat: Fields, name: bytes) -> int:
    """Of a cgroup and all below it; of itself where the kernel does not say more."""
    return stat.first(b"total_" + name, name) or 0


class CgroupFilesV2(CgroupFiles):
    """Of version 2, where every field is that of the whole subtree."""

    _names = ("memory.stat", "memory.max", "memory.high", "memory.current")
    _KERNEL_PARTS = (b"kernel_stack", b"pagetables", b"percpu", b"vmalloc", b"slab_unreclaimable")

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        # Since Linux 5.2 a level's own events are told from those below it.
        for self.events_name in ("memory.events.local", "memory.events"):
            self._events_file = KernelFile(directory / self.events_name)
            if not self._events_file.missing:
                break
        self._files[self.events_name] = self._events_file

    def limit(self) -> tuple[int | None, str]:
        """The lesser of two. Above memory.high the kernel slows processes down and fails none."""
        names = ("memory.max", "memory.high")
        return _least((self._files[name].number(), name) for name in names)

    def read(self) -> CgroupLevel:
        """What the cgroup and all below it count now."""
        stat = self._stat()
        shmem_bytes = stat.get(b"shmem")
        refaults = stat.first(b"workingset_refault_file", b"workingset_refault")
        events = Fields(self._events_file.read())
        at_max, at_high = events.first(b"max"), events.first(b"high")
        return CgroupLevel(
            self.path,
            *self.limit(),
            usage_bytes=self._files["memory.current"].number() or 0,
            anon_bytes=stat.get(b"anon"),
            shmem_bytes=shmem_bytes,
            kernel_bytes=self._kernel_bytes(stat),
            file_bytes=max(0, stat.get(b"file") - shmem_bytes),
            mapped_bytes=stat.get(b"file_mapped"),
            dirty_bytes=stat.get(b"file_dirty"),
            writeback_bytes=stat.get(b"file_writeback"),
            refault_bytes=None if refaults is None else refaults * _PAGE_BYTES,
            reclaim_events=None if at_max is None else at_max + (at_high or 0),
        )

    def _kernel_bytes(self, stat: Fields) -> int:
        """Since Linux 5.18 there is a sum; before that, only its parts."""
        kernel_bytes = stat.first(b"kernel")
        if kernel_bytes is None:
            kernel_bytes = sum(stat.get(name) for name in self._KERNEL_PARTS)
        else:
            kernel_bytes = max(0, kernel_bytes - stat.get(b"slab_reclaimable"))
        return kernel_bytes + stat.get(b"sock")


def open_levels(hierarchy: Hierarchy) -> list[CgroupFiles]:
    """The files of every level, the process's own first; whoever opens them closes them."""
    if hierarchy.version == 1:
        last = len(hierarchy.directories) - 1
        return [
            CgroupFilesV1(directory, is_topmost=i == last)
            for i, directory in enumerate(hierarchy.directories)
        ]
    return [CgroupFilesV2(directory) for directory in hierarchy.directories]
