"""What memory this process may still use, and what of it page-cached tensors may take.

Two things limit the page cache that we can keep: the machine (MemAvailable) and every memory
cgroup that the process is in, up to the root. Page cache is charged to a cgroup but can be
reclaimed from it, so what a cgroup has to give is its limit less what cannot be reclaimed.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from dualblade._core import window_bytes
from dualblade.cgroups import CgroupFiles, CgroupLevel, find_hierarchy, open_levels
from dualblade.errors import ClosedError
from dualblade.kernelfile import KernelFile, field

BUDGET_MIN_BYTES = 1 << 20
"""Less than this cannot even hold one transfer on its way to the device."""

_SIZE_MAX = (1 << 63) - 1  # the largest offset that a file can have
_UNITS = {"": 1} | {
    prefix + infix + "b": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("kmgtp", start=1)
}
_UNITS["b"] = _UNITS["byte"] = _UNITS["bytes"] = 1

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_LOOKS = 256  # samples until the cgroups are looked for anew
_REFAULTS = (b"\nworkingset_refault_file ", b"\nworkingset_refault ")
_ZONES = (b"", b"_dma", b"_dma32", b"_normal", b"_movable")
_DIRECT_RECLAIMS = tuple(b"\nallocstall" + zone + b" " for zone in _ZONES)


# ---- sizes --------------------------------------------------------------------------------------


def parse_size(size: str | int) -> int:
    """Bytes of a size such as "2GiB" (1024s), "512MB" (1000s), "100 KiB", "4096" or 4096.

    Raises ValueError if it is negative, absurd or not a whole number of bytes, or its unit is
    unknown or ambiguous; TypeError if it is neither text nor an integer.
    """
    if isinstance(size, str):
        return _parse_size_text(size)
    try:
        count = operator.index(size)
    except TypeError:
        count = None
    if count is None or isinstance(size, bool):
        raise TypeError(
            f"{size!r} is not a size; give a number of bytes or text such as '2GiB' or '512MB'"
        )
    return _checked_size(count, size)


def _parse_size_text(text: str) -> int:
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example '2GiB', '512MB' or '4096'")
    number, unit = match.groups()
    if unit.lower() in {"k", "m", "g", "t", "p"}:
        letter = unit.upper()
        raise ValueError(
            f"{text!r} is ambiguous: write {number}{letter}iB for 1024s or {number}{letter}B for "
            "1000s"
        )
    if unit.lower() not in _UNITS:
        raise ValueError(
            f"{text!r} has an unknown unit {unit!r}; the units are KiB, MiB, GiB, TiB, PiB (1024s) "
            "and KB, MB, GB, TB, PB (1000s)"
        )
    count = Fraction(number) * _UNITS[unit.lower()]
    if count.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return _checked_size(int(count), text)


def _checked_size(count: int, given: str | int) -> int:
    if count < 0:
        raise ValueError(f"{given!r} is negative; a size is zero bytes or more")
    if count > _SIZE_MAX:
        raise ValueError(f"{given!r} is larger than any file or device can be (8 EiB)")
    return count


def format_size(size_bytes: int) -> str:
    """A size for people: "512 bytes", "1.5 GiB", "2 GiB"."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes} byte{'' if abs(size_bytes) == 1 else 's'}"
    value = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        value /= 1024
        # 1023.96 KiB would be rounded to 1024.0 KiB.
        if abs(value) < 1023.95 or unit == "EiB":
            break
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


# ---- what there is ------------------------------------------------------------------------------


class MachineMemory(NamedTuple):
    """The machine's memory at one moment, in bytes (/proc/meminfo)."""

    total_bytes: int
    available_bytes: int
    """What it could give to a new program without swapping, page cache included."""
    shmem_bytes: int
    mapped_bytes: int
    """Of page cache and shared memory, what a process has mapped."""
    dirty_bytes: int
    writeback_bytes: int


class ProcessMemory(NamedTuple):
    """What this process has in memory, in bytes (/proc/self/status)."""

    anon_bytes: int
    file_bytes: int
    """Of mapped files: the interpreter and its libraries."""
    shmem_bytes: int
    locked_bytes: int
    """By mlock(2)."""
    pinned_bytes: int
    """For the kernel or a device to reach; what is registered with io_uring is here, or locked."""


class Pressure(NamedTuple):
    """Counters of how short memory has been, since boot or since the cgroup was made; None where
    the kernel does not say."""

    refault_bytes: int | None
    """Page cache that was read again after reclaim had taken it."""
    reclaim_events: dict[str, int]
    """How often each cgroup's limit was run into; without any, how often somebody in the "machine"
    had to reclaim before going on."""
    stall_us: int | None
    """How long somebody waited for memory."""

    def since(self, before: Pressure) -> tuple[int, int, int]:
        """What was added to each, all cgroups together. A cgroup that has just come to have a limit
        starts at nothing."""
        events = sum(
            _rise(count, before.reclaim_events.get(name))
            for name, count in self.reclaim_events.items()
        )
        return (
            _rise(self.refault_bytes, before.refault_bytes),
            events,
            _rise(self.stall_us, before.stall_us),
        )


def _rise(now: int | None, before: int | None) -> int:
    return 0 if now is None or before is None else max(0, now - before)


class Bound(NamedTuple):
    """One of the things that limit the page cache, and what it leaves, in bytes."""

    name: str
    """A cgroup's directory, or "machine"."""
    limit_bytes: int
    taken_bytes: dict[str, int]
    """By whom of what reclaim can't or should not give back."""

    @property
    def free_bytes(self) -> int:
        """What page-cached tensors may take of it in all."""
        return max(0, self.limit_bytes - sum(self.taken_bytes.values()))


@dataclass(frozen=True)
class MemoryReport:
    """Memory of the machine, of every memory cgroup above the process and of itself, at one moment.

    Swap is left out of account: what is swapped out to make room comes back at the worst time.
    """

    machine: MachineMemory
    process: ProcessMemory
    cgroup_version: int
    """1 or 2; 0 if no memory cgroup can be seen."""
    levels: tuple[CgroupLevel, ...]
    """The process's own cgroup, or the nearest above it that can be seen, then those above."""
    pressure: Pressure
    sources: dict[str, str]
    """Which file each part is from, or that it is missing and why."""

    @property
    def total_bytes(self) -> int:
        """What the machine has."""
        return self.machine.total_bytes

    @property
    def available_bytes(self) -> int:
        """What the machine could give to a new program without swapping."""
        return self.machine.available_bytes

    @property
    def cgroup_path(self) -> str:
        """The directory of the process's own cgroup; empty if none can be seen."""
        return self.levels[0].path if self.levels else ""

    @property
    def cgroup_limit_bytes(self) -> int | None:
        """The least limit from there up to the root, None if there is none."""
        found = [level.limit_bytes for level in self.levels if level.limit_bytes is not None]
        return min(found, default=None)

    @property
    def ceiling_bytes(self) -> int:
        """All the memory that this process could ever have."""
        limit_bytes = self.cgroup_limit_bytes
        return self.total_bytes if limit_bytes is None else min(self.total_bytes, limit_bytes)

    def bounds(self, views_bytes: int = 0) -> list[Bound]:
        """The machine, and every cgroup with a limit. `views_bytes` of the page-cached tensors are
        mapped by callers."""
        machine = self.machine
        mapped_bytes = self._mapped_bytes(machine.mapped_bytes, machine.shmem_bytes, views_bytes)
        found = [Bound("machine", machine.available_bytes, {"mapped": mapped_bytes})]
        for level in self.levels:
            if level.limit_bytes is not None:
                mapped_bytes = self._mapped_bytes(
                    level.mapped_bytes, level.shmem_bytes, views_bytes
                )
                taken_bytes = {
                    "anon": level.anon_bytes,
                    "shmem": level.shmem_bytes,
                    "kernel": level.kernel_bytes,
                    "mapped": mapped_bytes,
                }
                found.append(Bound(level.path, level.limit_bytes, taken_bytes))
        return found

    def _mapped_bytes(self, mapped_bytes: int, shmem_bytes: int, views_bytes: int) -> int:
        """Pages of files that programs run from, which reclaim may take but must not.

        What is counted as mapped is partly shared memory, which is counted already. How much of it
        is not said: at most all, and what this process has mapped of files is not.
        """
        files_bytes = min(self.process.file_bytes, mapped_bytes)
        return max(0, max(mapped_bytes - shmem_bytes, files_bytes) - views_bytes)

    def free_bytes(self, views_bytes: int = 0) -> int:
        """What page-cached tensors may take in all before something else has to be reclaimed."""
        return min(bound.free_bytes for bound in self.bounds(views_bytes))

    @property
    def budget_bytes(self) -> int:
        """The same where callers have mapped none of them."""
        return self.free_bytes()


def limits(root: str | Path = "/") -> MemoryReport:
    """What memory there is now. `root` is where /proc and /sys are found. What can't be read is
    named in `sources`."""
    with MemoryWatch(root) as watch:
        return watch.report()


# ---- what there is, again and again -------------------------------------------------------------


class MemorySample(NamedTuple):
    """What MemoryWatch sees at one moment."""

    free_bytes: int
    """All that page-cached tensors may take now, those that are there included; no margin off."""
    limit_bytes: int
    """All the memory that this process could ever have."""
    refault_bytes: int
    """Page cache that was read again because reclaim had taken it, since the sample before."""
    reclaim_events: int
    """How often a limit was run into since the sample before."""
    stall_us: int
    """How long somebody waited for memory since the sample before."""
    sources: dict[str, str]
    """Which file each part is from, or that it is missing and why."""


class MemoryWatch:
    """Reads what memory is free again and again, cheaply: its files stay open.

    It follows the process into another cgroup. One thread at a time may use it. A file that is
    missing never raises: what it would say counts as nothing, and `sources` names it.
    """

    def __init__(self, root: str | Path = "/") -> None:
        self._root = Path(root)
        self._files: dict[str, KernelFile] = {}
        self._levels: list[CgroupFiles] = []
        self.closed = False
        self._open()

    def sample(self, views_bytes: int = 0) -> MemorySample:
        """What there is now, and what has happened since the sample before (the first: nothing).

        `views_bytes` is how much of the page-cached tensors callers have mapped: it is ours, other
        mapped pages are not. Raises ClosedError after close().
        """
        self._follow()
        # Of the levels above, only those with a limit have a say.
        own, above = self._levels[:1], self._levels[1:]
        report = self._read([*own, *(files for files in above if files.limit()[0] is not None)])
        before, self._before = self._before, report.pressure
        return MemorySample(
            report.free_bytes(views_bytes + window_bytes()),
            report.ceiling_bytes,
            *report.pressure.since(before or report.pressure),
            self._sources,
        )

    def report(self) -> MemoryReport:
        """Everything that is known now. Raises ClosedError after close()."""
        self._follow()
        return self._read(self._levels)

    def close(self) -> None:
        """Closes the files. It may be called twice."""
        self.closed = True
        for file in [*self._files.values(), *self._levels]:
            file.close()

    def __enter__(self) -> MemoryWatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _open(self) -> None:
        """Opens the files of where the process is now. What has happened is counted anew: other
        cgroups have other counters."""
        for file in [*self._files.values(), *self._levels]:
            file.close()
        proc = self._root / "proc"
        self._files = {
            "where": KernelFile(proc / "self/cgroup"),
            "machine": KernelFile(proc / "meminfo"),
            "process": KernelFile(proc / "self/status"),
            "events": KernelFile(proc / "vmstat"),
            "stalls": KernelFile(proc / "pressure/memory"),
        }
        self._process_id = os.getpid()
        self._where = self._files["where"].read()
        self._looks = 0
        self._hierarchy = find_hierarchy(self._root)
        self._levels = open_levels(self._hierarchy)
        if self._hierarchy.version == 2:
            stalls = KernelFile(self._hierarchy.directories[0] / "memory.pressure")
            if not stalls.missing:
                self._files["stalls"].close()
                self._files["stalls"] = stalls
        self._before: Pressure | None = None
        self._sources = self._name_sources()

    def _follow(self) -> None:
        """Opens other files if the process's cgroups are no longer those of the open ones.

        In the child after a fork /proc/self is another. That a level has come to count memory does
        not show in the process's own place, so it is looked for now and then.
        """
        if self.closed:
            raise ClosedError("the memory watch is closed; make a new one")
        self._looks += 1
        if (
            self._files["where"].read() != self._where
            or os.getpid() != self._process_id
            or (self._looks % _LOOKS == 0 and find_hierarchy(self._root) != self._hierarchy)
        ):
            self._open()

    def _read(self, levels: Sequence[CgroupFiles]) -> MemoryReport:
        found = tuple(files.read() for files in levels)
        return MemoryReport(
            machine=_machine(self._files["machine"].read()),
            process=_process(self._files["process"].read()),
            cgroup_version=self._hierarchy.version,
            levels=found,
            pressure=self._pressure(found),
            sources=self._sources,
        )

    def _pressure(self, levels: Sequence[CgroupLevel]) -> Pressure:
        refault_bytes = levels[0].refault_bytes if levels else None
        events = {
            level.path: level.reclaim_events
            for level in levels
            if level.limit_bytes is not None and level.reclaim_events is not None
        }
        if refault_bytes is None or not events:
            machine = self._files["events"].read()
            if refault_bytes is None:
                counts = [field(machine, label) for label in _REFAULTS]
                refault_bytes = next((n * _PAGE_BYTES for n in counts if n is not None), None)
            if not events:
                events = {"machine": sum(field(machine, label) or 0 for label in _DIRECT_RECLAIMS)}
        stall_us = field(self._files["stalls"].read(), b" total=")  # the first line's: "some"
        return Pressure(refault_bytes, events, stall_us)

    def _name_sources(self) -> dict[str, str]:
        machine = self._files["events"].source
        sources = {
            "machine": self._files["machine"].source,
            "process": self._files["process"].source,
            "cgroup": "missing: no memory cgroup can be seen",
            "refaults": machine,
            "reclaims": machine,
            "stalls": self._files["stalls"].source,
        }
        if self._levels:
            own = self._levels[0]
            level = own.read()
            sources["cgroup"] = own.path
            sources |= {f"cgroup {name}": f"missing: {own.path}/{name}" for name in own.missing()}
            if level.refault_bytes is not None:
                sources["refaults"] = f"{own.path}/memory.stat"
            if level.reclaim_events is not None:
                sources["reclaims"] = f"{own.path}/{own.events_name}, and of those above; {machine}"
        return sources


def _machine(meminfo: bytes) -> MachineMemory:
    """Where /proc is not there, sysinfo(2) still says what there is and what is quite free."""
    total_bytes = field(meminfo, b"\nMemTotal:")
    available_bytes = field(meminfo, b"\nMemAvailable:")
    return MachineMemory(
        total_bytes=_system("SC_PHYS_PAGES") if total_bytes is None else total_bytes,
        available_bytes=_system("SC_AVPHYS_PAGES") if available_bytes is None else available_bytes,
        shmem_bytes=field(meminfo, b"\nShmem:") or 0,
        mapped_bytes=field(meminfo, b"\nMapped:") or 0,
        dirty_bytes=field(meminfo, b"\nDirty:") or 0,
        writeback_bytes=field(meminfo, b"\nWriteback:") or 0,
    )


def _system(name: str) -> int:
    return max(0, os.sysconf(name)) * _PAGE_BYTES


def _process(status: bytes) -> ProcessMemory:
    labels = (b"\nRssAnon:", b"\nRssFile:", b"\nRssShmem:", b"\nVmLck:", b"\nVmPin:")
    return ProcessMemory(*(field(status, label) or 0 for label in labels))


# ---- what page-cached tensors may take ----------------------------------------------------------


class Budget(NamedTuple):
    """How much page cache tensors may take, and why that much."""

    bytes: int
    source: str


def page_cache_budget(memory: str | int, staging_bytes: int, root: str | Path = "/") -> Budget:
    """The budget for memory="auto" or a size; staging_bytes is pinned memory still to be taken.

    Raises ValueError if a size is more than the machine or cgroup has at all, or less than
    BUDGET_MIN_BYTES.
    """
    report = limits(root)
    inside = _describe_limit(report)
    if memory == "auto":
        # The consumer's own arrays (weights, activations, what fetch() returns) need room too and
        # grow after this: a quarter is left to them until the residency manager sees them come.
        free = max(0, report.free_bytes(window_bytes()) - staging_bytes)
        return Budget(
            free * 3 // 4,
            f"auto: 3/4 of the {format_size(free)} that are free now, {inside}",
        )
    size = parse_size(memory)
    if size < BUDGET_MIN_BYTES:
        raise ValueError(
            f"memory={memory!r} is less than {format_size(BUDGET_MIN_BYTES)}, too little to hold "
            "one transfer; give more, or use policy='direct' to do without the page cache"
        )
    if size > report.ceiling_bytes:
        raise ValueError(
            f"memory={memory!r} is more than there is: {inside}; give less, or memory='auto'"
        )
    return Budget(size, f"memory={memory!r}, {inside}")


def _describe_limit(report: MemoryReport) -> str:
    total = f"{format_size(report.total_bytes)} in this machine"
    limit = report.cgroup_limit_bytes
    if limit is None or limit >= report.total_bytes:
        return total
    return f"{format_size(limit)} limit of the cgroup {report.cgroup_path} ({total})"
