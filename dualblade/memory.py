"""What memory this process may still use, and what of it page-cached tensors may take.

Two things limit the page cache that we can keep: the machine (MemAvailable) and every memory
cgroup that the process is in, up to the root. Page cache is charged to a cgroup but can be
reclaimed from it, so what a cgroup has to give is its limit less what cannot be reclaimed.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

BUDGET_MIN_BYTES = 1 << 20
"""Less than this cannot even hold one transfer on its way to the device."""

_SIZE_MAX = (1 << 63) - 1  # the largest offset that a file can have
_UNITS = {"": 1} | {
    prefix + infix + "b": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("kmgtp", start=1)
}
_UNITS["b"] = _UNITS["byte"] = _UNITS["bytes"] = 1
# Of a cgroup's memory, what reclaim cannot give back (swap aside). v1 counts kernel memory
# apart, in files that newer kernels no longer have.
_UNRECLAIMABLE_V1 = ("total_rss", "total_shmem")
_UNRECLAIMABLE_V2 = ("anon", "shmem", "kernel_stack", "pagetables", "slab_unreclaimable")
_NO_LIMIT_V1 = 1 << 62  # v1 says "no limit" with the largest multiple of a page


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


@dataclass(frozen=True)
class MemoryReport:
    """Memory of the machine and of the process's memory cgroup, in bytes, at one moment."""

    total_bytes: int
    available_bytes: int
    """What the machine could give to a new program without swapping (MemAvailable)."""
    cgroup_version: int
    """1 or 2; 0 if no memory cgroup can be seen."""
    cgroup_path: str
    """The directory of the process's own cgroup, or the nearest above it that can be seen."""
    cgroup_limit_bytes: int | None
    """The least limit from there up to the root, None if there is none."""
    cgroup_usage_bytes: int
    """Charged to the process's own cgroup, page cache included."""
    cgroup_anon_bytes: int
    """Of that, what cannot be reclaimed: anonymous and shared memory, and in v2 the kernel's."""
    cgroup_headroom_bytes: int | None
    """The least, over all cgroups with a limit, of the limit less what cannot be reclaimed."""

    @property
    def budget_bytes(self) -> int:
        """What the page cache may grow to before something has to be reclaimed or swapped."""
        if self.cgroup_headroom_bytes is None:
            return self.available_bytes
        return min(self.available_bytes, self.cgroup_headroom_bytes)

    @property
    def ceiling_bytes(self) -> int:
        """All the memory that this process could ever have."""
        if self.cgroup_limit_bytes is None:
            return self.total_bytes
        return min(self.total_bytes, self.cgroup_limit_bytes)


def limits(root: str | Path = "/") -> MemoryReport:
    """Reads what memory there is now. `root` is where /proc and /sys are found.

    Raises OSError if /proc/meminfo cannot be read.
    """
    root = Path(root)
    meminfo = _read_fields(root / "proc/meminfo")
    version, levels = _cgroup_levels(root)
    bounded = [level for level in levels if level.limit_bytes is not None]
    return MemoryReport(
        total_bytes=meminfo["MemTotal"] * 1024,
        available_bytes=meminfo["MemAvailable"] * 1024,
        cgroup_version=version,
        cgroup_path=levels[0].path if levels else "",
        cgroup_limit_bytes=min((level.limit_bytes for level in bounded), default=None),
        cgroup_usage_bytes=levels[0].usage_bytes if levels else 0,
        cgroup_anon_bytes=levels[0].anon_bytes if levels else 0,
        cgroup_headroom_bytes=min((level.headroom_bytes for level in bounded), default=None),
    )


class _Level(NamedTuple):
    """One cgroup on the way from the process's own to the root."""

    path: str
    limit_bytes: int | None
    usage_bytes: int
    anon_bytes: int

    @property
    def headroom_bytes(self) -> int:
        assert self.limit_bytes is not None
        return max(0, self.limit_bytes - self.anon_bytes)


def _cgroup_levels(root: Path) -> tuple[int, list[_Level]]:
    """The version, and the cgroups with memory accounting, the process's own first."""
    lines = _read_lines(root / "proc/self/cgroup")
    entries = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    # On a hybrid host a version 2 line ("0::/") is there too, but its tree has no memory
    # controller: a version 1 memory line goes first.
    for _, controllers, path in entries:
        if "memory" in controllers.split(","):
            levels = [_read_v1(level) for level in _walk_up(root, "cgroup", "memory", path)]
            return (1, levels) if levels else (0, [])
    for hierarchy, controllers, path in entries:
        if hierarchy == "0" and not controllers:
            levels = [_read_v2(level) for level in _walk_up(root, "cgroup2", "", path)]
            return (2, levels) if levels else (0, [])
    return 0, []


def _walk_up(root: Path, kind: str, controller: str, path: str) -> list[Path]:
    """Existing directories from a cgroup's path up to where its tree is mounted."""
    mount, mounted = _cgroup_mount(root, kind, controller)
    # A bind mount (a container without a cgroup namespace) shows only the part of the tree
    # below `mounted`; a process outside its namespace's root has a path with "..".
    if path == mounted or path.startswith(mounted.rstrip("/") + "/"):
        path = path[len(mounted.rstrip("/")) :]
    parts = [part for part in path.split("/") if part not in ("", "..")]
    found = []
    for depth in range(len(parts), -1, -1):
        directory = mount.joinpath(*parts[:depth])
        if (directory / "memory.stat").exists():
            found.append(directory)
    return found


def _cgroup_mount(root: Path, kind: str, controller: str) -> tuple[Path, str]:
    """Where a cgroup tree is mounted, and which of its directories is mounted there."""
    for line in _read_lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if len(left) < 5 or len(right) < 3 or right[0] != kind:
            continue
        if not controller or controller in right[2].split(","):
            return root / _unescape(left[4]).lstrip("/"), _unescape(left[3])
    return root / "sys/fs/cgroup" / controller, "/"


def _unescape(field: str) -> str:
    """mountinfo writes blanks, tabs, newlines and backslashes in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _read_v1(directory: Path) -> _Level:
    stat = _read_fields(directory / "memory.stat")
    limit = _read_number(directory / "memory.limit_in_bytes")
    return _Level(
        path=str(directory),
        limit_bytes=None if limit is None or limit >= _NO_LIMIT_V1 else limit,
        usage_bytes=_read_number(directory / "memory.usage_in_bytes") or 0,
        anon_bytes=sum(stat.get(name, 0) for name in _UNRECLAIMABLE_V1),
    )


def _read_v2(directory: Path) -> _Level:
    stat = _read_fields(directory / "memory.stat")
    # Above memory.high the kernel slows the process down rather than fail it: that is a limit too.
    found = [_read_number(directory / name) for name in ("memory.max", "memory.high")]
    return _Level(
        path=str(directory),
        limit_bytes=min((limit for limit in found if limit is not None), default=None),
        usage_bytes=_read_number(directory / "memory.current") or 0,
        anon_bytes=sum(stat.get(name, 0) for name in _UNRECLAIMABLE_V2),
    )


def _read_lines(path: Path) -> list[str]:
    """No lines if the file is not there: /proc may be restricted, and cgroups may be absent."""
    try:
        return path.read_text().splitlines()
    except (FileNotFoundError, PermissionError):
        return []


def _read_number(path: Path) -> int | None:
    lines = _read_lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _read_fields(path: Path) -> dict[str, int]:
    """Lines "name 123" or "name: 123 kB" as numbers."""
    fields = {}
    for line in path.read_text().splitlines():
        name, *rest = line.replace(":", " ").split()
        if rest and rest[0].isdigit():
            fields[name] = int(rest[0])
    return fields


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
        free = max(0, report.budget_bytes - staging_bytes)
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
