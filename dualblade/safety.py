"""Whether a file or device may be written to: never somebody else's data.

These checks are for the message: they say what is on the device and who uses it. What closes the
race with a mount that comes after them is the open itself, with O_EXCL on a block device, which
the kernel refuses while anybody has the device claimed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Literal, NamedTuple

from dualblade._core import find_signature
from dualblade.errors import (
    DeviceRefusedError,
    DualbladeError,
    UnsupportedError,
    device_error,
)
from dualblade.header import HEADER_BYTES, Header

_LOOKED_AT_BYTES = 1 << 20  # of the beginning, to tell a blank device from one with strange data


class Target(NamedTuple):
    """A file or block device that may be written to."""

    path: str
    """As given."""
    kind: Literal["file", "block"]
    size_bytes: int
    header: Header | None
    """Of the store that is on it; None if it is empty or is about to be formatted over."""


def check_target(
    path: str | os.PathLike[str],
    *,
    formatting: bool,
    proc: str | Path = "/proc",
    sys: str | Path = "/sys",
) -> Target:
    """Looks at a file or block device before it is opened for writing.

    A file or device in use is refused in any case. What holds anything but a store of ours is
    refused unless it is being formatted; an empty file holds nothing. `proc` and `sys` are where
    those filesystems are found.

    Raises DeviceRefusedError; DeviceError if it is missing, a directory, or cannot be opened;
    and, unless formatting, UnsupportedError for a store of another format version and
    CorruptionError for a damaged header.
    """
    target = os.fspath(path)
    try:
        status = os.stat(target)
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=target, operation="open") from error
    kind = _kind(target, status)
    if kind == "block":
        _refuse_used_block_device(target, status.st_rdev, Path(proc), Path(sys))
    else:
        _refuse_used_file(target, status, Path(proc), Path(sys))
    _refuse_unwritable(target)
    beginning, size_bytes = _read_beginning(target, kind)
    if kind == "block" and size_bytes == 0:
        raise device_error(errno.ENOMEDIUM, device=target, operation="open")
    if formatting or size_bytes == 0:
        return Target(target, kind, size_bytes, None)
    header = Header.find(beginning[:HEADER_BYTES], target=target)
    if header is None:
        raise DeviceRefusedError(
            errno.EPERM, _not_a_store(target, kind, beginning, status, Path(sys)), target
        )
    return Target(target, kind, size_bytes, header)


# ---- what it is ---------------------------------------------------------------------------------


def _kind(target: str, status: os.stat_result) -> Literal["file", "block"]:
    if stat.S_ISREG(status.st_mode):
        return "file"
    if stat.S_ISBLK(status.st_mode):
        return "block"
    if stat.S_ISDIR(status.st_mode):
        raise device_error(errno.EISDIR, device=target, operation="open")
    generic = re.fullmatch(r"ng(\d+n\d+)", os.path.basename(os.path.realpath(target)))
    if stat.S_ISCHR(status.st_mode) and generic:
        raise UnsupportedError(
            f"{target} is an NVMe generic device, which needs passthrough commands; give the block "
            f"device of the same namespace, /dev/nvme{generic[1]}"
        )
    names = {stat.S_IFCHR: "character device", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    what = names.get(stat.S_IFMT(status.st_mode), "special file")
    raise DeviceRefusedError(
        errno.EPERM,
        f"{target} is a {what}; a store needs a regular file or a block device such as "
        "/dev/nvme1n1",
        target,
    )


def _refuse_unwritable(target: str) -> None:
    if os.access(target, os.R_OK | os.W_OK, effective_ids=True):
        return
    read_only = os.statvfs(target).f_flag & os.ST_RDONLY
    raise device_error(errno.EROFS if read_only else errno.EACCES, device=target, operation="open")


def _read_beginning(target: str, kind: str) -> tuple[bytes, int]:
    """The first bytes, and the size of all."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    if kind == "block":
        # Fails while anybody has it claimed, in another mount namespace too.
        flags |= os.O_EXCL
    try:
        fd = os.open(target, flags)
        try:
            size_bytes = os.lseek(fd, 0, os.SEEK_END)
            # No readahead: it would fill the page cache with tensors, up to megabytes of them.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            return os.pread(fd, _LOOKED_AT_BYTES, 0), size_bytes
        finally:
            os.close(fd)
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=target, operation="open") from error


def _not_a_store(
    target: str, kind: str, beginning: bytes, status: os.stat_result, sys: Path
) -> str:
    """Why this is not opened, and the command that would overrule it."""
    held = _held(target, kind, beginning, status, sys)
    return (
        f"{target} is not a dualblade store: {held}. Nothing was written. To lose what is on it "
        f"and make it a store: `dualblade format {target}`, or dualblade.open({target!r}, "
        "format=True)"
    )


def _held(target: str, kind: str, beginning: bytes, status: os.stat_result, sys: Path) -> str:
    partitions = _partitions(_block_directory(sys, status.st_rdev)) if kind == "block" else []
    if partitions:
        return f"it is partitioned ({', '.join(sorted(node.name for node in partitions))})"
    try:
        signature = find_signature(target)
    except DualbladeError:
        # No libblkid, or a bad sector. The name is for the message alone: it is refused anyway.
        signature = ""
    if signature:
        return f"it holds {signature} (a filesystem, partition table or volume signature)"
    if beginning.count(0) == len(beginning):
        return "it looks blank, but nothing says that it may be used"
    return "it holds data that dualblade did not write"


# ---- who uses it --------------------------------------------------------------------------------


def _refuse_used_block_device(target: str, device: int, proc: Path, sys: Path) -> None:
    own = _block_directory(sys, device)
    partitions = _partitions(own)
    names = {device: own.name} | {_device_number(node): node.name for node in partitions}
    mounts, swaps = _mounts(proc), _swaps(proc)
    for number, name in names.items():
        what = "it" if number == device else f"its partition {name}"
        if number in mounts:
            where = mounts[number]
            raise _in_use(target, f"{what} is mounted on {where}", f"umount {where}")
        if number in swaps:
            raise _in_use(target, f"{what} is swap space", f"swapoff /dev/{name}")
    for node in [own, *partitions]:
        holders = ", ".join(sorted(entry.name for entry in node.glob("holders/*")))
        if holders:
            held = f"{node.name} is part of {holders} (RAID, LVM, encryption or the like)"
            raise _in_use(target, held, "lsblk shows what to stop")


def _refuse_used_file(target: str, status: os.stat_result, proc: Path, sys: Path) -> None:
    for line in _lines(proc / "swaps")[1:]:
        if _same_file(_unescape(line.split()[0]), status):
            raise _in_use(target, "it is swap space", f"swapoff {target}")
    for backing in sorted((sys / "class/block").glob("loop*/loop/backing_file")):
        name = backing.parent.parent.name
        lines = _lines(backing)
        if lines and _same_file(lines[0], status):
            how = f"it is the backing file of /dev/{name}"
            raise _in_use(target, how, f"losetup -d /dev/{name}")


def _in_use(target: str, how: str, release: str) -> DeviceRefusedError:
    return DeviceRefusedError(
        errno.EBUSY,
        f"{target} is in use: {how}. Nothing was written, and formatting it is refused too. "
        f"Release it first ({release}), or use another device",
        target,
    )


def _block_directory(sys: Path, device: int) -> Path:
    """The device's directory in sysfs; one that does not exist if sysfs does not show it."""
    link = sys / "dev/block" / f"{os.major(device)}:{os.minor(device)}"
    return link.resolve()


def _partitions(directory: Path) -> list[Path]:
    """Partitions of a whole disk: its subdirectories that have a partition number."""
    return [entry.parent for entry in sorted(directory.glob("*/partition"))]


def _device_number(directory: Path) -> int:
    lines = _lines(directory / "dev")
    major, _, minor = (lines[0] if lines else "0:0").partition(":")
    return os.makedev(int(major), int(minor))


def _mounts(proc: Path) -> dict[int, str]:
    """Mount points by device number, of the filesystem and of the device that it names."""
    found: dict[int, str] = {}
    for line in _lines(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields = before.split()
        major, _, minor = fields[2].partition(":")
        where = _unescape(fields[4])
        found.setdefault(os.makedev(int(major), int(minor)), where)
        # A filesystem over several devices (btrfs) has a number of its own, but names one of them.
        source = _block_number(_unescape(after.split()[1]))
        if source is not None:
            found.setdefault(source, where)
    return found


def _swaps(proc: Path) -> set[int]:
    sources = (_unescape(line.split()[0]) for line in _lines(proc / "swaps")[1:])
    return {number for number in map(_block_number, sources) if number is not None}


def _block_number(source: str) -> int | None:
    """The number of a block device by its path; None for anything else."""
    try:
        status = os.stat(source) if source.startswith("/") else None
    except OSError:
        return None
    return status.st_rdev if status and stat.S_ISBLK(status.st_mode) else None


def _same_file(path: str, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), status)
    except OSError:
        return False


def _unescape(field: str) -> str:
    """The kernel writes blanks, tabs, newlines and backslashes in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _lines(path: Path) -> list[str]:
    """No lines if it is not there: a container may hide it, and the exclusive open still holds."""
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
