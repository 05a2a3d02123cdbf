"""Putting this process into a memory cgroup of its own, of version 1 or 2, and out of it again."""

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
def limited(limit_bytes: int, root: str | Path = "/") -> Iterator[Path]:
    """The process's memory from now on, page cache included, is at most `limit_bytes`.

    What it has already stays charged where it is. At the end it goes back to the group it came
    from. Yields the group's directory. Raises UnsupportedError where a group can't be made.
    """
    before = limits(root)
    if before.cgroup_version == 0:
        raise _refused(limit_bytes, "no memory cgroup can be seen here")
    own = Path(before.cgroup_path)
    try:
        group = _make_group(own, before.cgroup_version)
        try:
            name = "memory.limit_in_bytes" if before.cgroup_version == 1 else "memory.max"
            (group / name).write_text(str(limit_bytes))
            _forbid_swap(group)
            _join(group)
        except OSError:
            group.rmdir()
            raise
    except OSError as error:
        raise _refused(limit_bytes, f"{error.strerror} ({error.filename or own})") from error
    try:
        yield group
    finally:
        _leave(group, own)


def _refused(limit_bytes: int, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"no memory cgroup of {format_size(limit_bytes)} can be made: {why}. Run as root, or start "
        f"it in one: systemd-run --scope -p MemoryMax={limit_bytes} dualblade-fio ..."
    )


def _make_group(own: Path, version: int) -> Path:
    """Version 2: a group that has processes hands its controllers to no child, so the new one is a
    sibling where that can be, and a child in the root alone."""
    name = f"dualblade-fio-{os.getpid()}"
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


def _leave(group: Path, own: Path) -> None:
    """Threads that are just ending keep the group busy for a moment."""
    with contextlib.suppress(OSError):
        _join(own)
        deadline = time.monotonic() + _LEAVE_S
        while True:
            try:
                group.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
