"""Making memory cgroups of version 1 or 2, and putting this process into one and out again."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dualblade.errors import UnsupportedError
from dualblade.memory import format_size, limits

_LEAVE_S = 5.0
_MARGIN_BYTES = 16 << 20  # staging buffers, and what is imported once the job is known


def least_bytes() -> int:
    """The least limit, in whole MiB, that this process can go on under."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    needed = resident_pages * os.sysconf("SC_PAGE_SIZE") + _MARGIN_BYTES
    return -(-needed >> 20) << 20


@contextlib.contextmanager
def memory_group(
    limit_bytes: int, root: str | Path = "/", name: str = "dualblade"
) -> Iterator[Path]:
    """A new memory cgroup of `limit_bytes`, page cache included; its directory. Nobody is in it
    yet: whoever is to be writes its process id into "cgroup.procs". It is removed at the end, when
    its processes have ended.

    Raises UnsupportedError where a group can't be made.
    """
    before = limits(root)
    if before.cgroup_version == 0:
        raise _refused(limit_bytes, "no memory cgroup can be seen here")
    own = Path(before.cgroup_path)
    try:
        group = _make_group(own, before.cgroup_version, f"{name}-{os.getpid()}")
        try:
            set_limit(group, limit_bytes)
            _forbid_swap(group)
        except OSError:
            group.rmdir()
            raise
    except OSError as error:
        raise _refused(limit_bytes, f"{error.strerror} ({error.filename or own})") from error
    try:
        yield group
    finally:
        _remove(group)


@contextlib.contextmanager
def limited(limit_bytes: int, root: str | Path = "/") -> Iterator[Path]:
    """The process's memory from now on, page cache included, is at most `limit_bytes`.

    What it has already stays charged where it is. At the end it goes back to the group it came
    from. Yields the group's directory. Raises UnsupportedError where a group can't be made.
    """
    own = Path(limits(root).cgroup_path)
    with memory_group(limit_bytes, root, "dualblade-fio") as group:
        try:
            _join(group)
        except OSError as error:
            raise _refused(limit_bytes, f"{error.strerror} ({group})") from error
        try:
            yield group
        finally:
            with contextlib.suppress(OSError):
                _join(own)


def set_limit(group: Path, limit_bytes: int) -> None:
    """Changes the limit of a group, of either version. Raises OSError, as where the kernel can't
    reclaim what is over a lower one."""
    is_v1 = (group / "memory.limit_in_bytes").exists()
    (group / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(limit_bytes))


def _refused(limit_bytes: int, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"no memory cgroup of {format_size(limit_bytes)} can be made: {why}. Run as root, or start "
        f"it in one: systemd-run --scope -p MemoryMax={limit_bytes} dualblade-fio ..."
    )


def _make_group(own: Path, version: int, name: str) -> Path:
    """Version 2: a group that has processes hands its controllers to no child, so the new one is a
    sibling where that can be, and a child in the root alone."""
    if version == 1:
        group = own / name
        group.mkdir()
        return group
    has_siblings = (own / "memory.max").exists() and (own.parent / "cgroup.procs").exists()
    parent = own.parent if has_siblings else own
    group = parent / name
    group.mkdir()
    if not (group / "memory.max").exists():
        try:
            (parent / "cgroup.subtree_control").write_text("+memory")
        except OSError:
            group.rmdir()
            raise
    return group


def _forbid_swap(group: Path) -> None:
    swap = group / "memory.swap.max"
    if swap.exists():
        swap.write_text("0")


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _remove(group: Path) -> None:
    """Threads that are just ending keep the group busy for a moment."""
    with contextlib.suppress(OSError):
        deadline = time.monotonic() + _LEAVE_S
        while True:
            try:
                group.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
