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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dualblade._core import find_signature, nvme_block_node
from dualblade.errors import (
    DeviceRefusedError,
    DualbladeError,
    device_error,
)
from dualblade.header import HEADER_BYTES, Header

_LOOKED_AT_BYTES = 1 << 20  # of the beginning, to tell a blank device from one with strange data


class Target(NamedTuple):
    """A file or block device that may be written to."""

    path: str
    """As given; of an NVMe character device, that of its block device."""
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
    look = _look_at(os.fspath(path), formatting, [], Path(proc), Path(sys))
    found = look.target
    if found.header is None and found.size_bytes and not formatting:
        raise _not_a_store(look, [found.path])
    if found.header is not None and found.header.members > 1:
        header = found.header
        raise _refused(
            found.path,
            f"{found.path} is member {header.member} of a store that is striped over "
            f"{header.members}: give all of them, from member 0 to member {header.members - 1}, as "
            f"a list",
        )
    return found


def check_targets(
    paths: Sequence[str | os.PathLike[str]],
    *,
    formatting: bool,
    proc: str | Path = "/proc",
    sys: str | Path = "/sys",
) -> list[Target]:
    """Looks at the members of a striped store, in their order, as `check_target` does at one.

    Either all of them have a header, and they are the members of one store, all of them, in the
    order and not smaller than at its format; or none has, because they are empty or are being
    formatted. Raises what check_target does, and ValueError for one that is given twice.
    """
    targets = [os.fspath(path) for path in paths]
    if len(targets) == 1:
        return [check_target(targets[0], formatting=formatting, proc=proc, sys=sys)]
    looks = [_look_at(target, formatting, targets, Path(proc), Path(sys)) for target in targets]
    _refuse_twice(looks)
    found = [look.target for look in looks]
    if formatting:
        return found
    if any(target.header for target in found):
        _check_members(looks)
    else:
        for look in looks:
            if look.target.size_bytes:
                raise _not_a_store(look, targets)
    return found


def _refused(target: str, words: str) -> DeviceRefusedError:
    return DeviceRefusedError(errno.EPERM, words, target)


# ---- members of a striped store -----------------------------------------------------------------


def _refuse_twice(looks: Sequence[_Look]) -> None:
    for i, look in enumerate(looks):
        for other in looks[:i]:
            if look.identity == other.identity:
                raise ValueError(
                    f"{look.target.path} is the same {look.target.kind} as {other.target.path}: "
                    f"give each member of a striped store once"
                )


def _check_members(looks: Sequence[_Look]) -> None:
    """Whether these, of which at least one has a header, are one striped store."""
    ids = Counter(look.target.header.store_id for look in looks if look.target.header)
    store_id = ids.most_common(1)[0][0]
    others = "give the member that belongs there, or start anew with format=True, which loses what "
    others += "is stored on all of them"
    known = [look.target for look in looks if _has(look.target, store_id)]
    for place, look in enumerate(looks):
        path, header = look.target.path, look.target.header
        if header is None:
            held = _held(look) if look.target.size_bytes else "it is empty"
            raise _refused(
                path, f"{path} is not a member of the store on {known[0].path}: {held}; {others}"
            )
        if header.members == 1:
            raise _refused(
                path,
                f"{path} holds a store of its own, not striped: open it alone, or {others}",
            )
        if header.store_id != store_id:
            raise _refused(
                path,
                f"{path}, given as member {place}, is member {header.member} of another store "
                f"({header.store_id}) than {known[0].path} ({store_id}); {others}",
            )
    _check_order([(target.path, target.header) for target in known if target.header])
    for target in known:
        if target.header and target.size_bytes < target.header.member_bytes:
            raise _refused(
                target.path,
                f"{target.path} was resized: it has {target.size_bytes} bytes, but had "
                f"{target.header.member_bytes} when the store was made; restore its size and "
                f"content, or start anew with format=True, which loses what is stored",
            )


def _has(target: Target, store_id: str) -> bool:
    return target.header is not None and target.header.store_id == store_id


def _check_order(members: Sequence[tuple[str, Header]]) -> None:
    by_place: dict[int, str] = {}
    for path, header in members:
        if header.member in by_place:
            raise _refused(
                path,
                f"{path} is a copy of {by_place[header.member]}: both say that they are member "
                f"{header.member} of the store; give the other members instead of one of them",
            )
        by_place[header.member] = path
    count = members[0][1].members
    missing = [str(place) for place in range(count) if place not in by_place]
    if missing:
        have = ", ".join(f"{path} is member {place}" for place, path in sorted(by_place.items()))
        raise _refused(
            members[0][0],
            f"the store is striped over {count}, and {len(members)} are given: member "
            f"{', '.join(missing)} is missing ({have}); give all of them",
        )
    for place, (path, header) in enumerate(members):
        if header.member != place:
            right = [by_place[each] for each in range(count)]
            raise _refused(
                path,
                f"{path} is given as member {place}, but is member {header.member}: the order is "
                f"swapped; give {right!r}",
            )


# ---- what it is ---------------------------------------------------------------------------------


class _Look(NamedTuple):
    target: Target
    status: os.stat_result
    beginning: bytes
    sys: Path

    @property
    def identity(self) -> tuple[str, int, int]:
        """What is the same of two names of the same file or device."""
        status = self.status
        if self.target.kind == "block":
            return "block", status.st_rdev, 0
        return "file", status.st_dev, status.st_ino


def _look_at(target: str, formatting: bool, members: Sequence[str], proc: Path, sys: Path) -> _Look:
    """Refuses what is in use or can't hold a store; whatever else it holds is for the caller."""
    target = nvme_block_node(target) or target  # the character device knows of no mounts
    try:
        status = os.stat(target)
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=target, operation="open") from error
    kind = _kind(target, status)
    if kind == "block":
        _refuse_used_block_device(target, status.st_rdev, proc, sys)
    else:
        _refuse_used_file(target, status, proc, sys)
    _refuse_unwritable(target)
    beginning, size_bytes = _read_beginning(target, kind)
    if kind == "block" and size_bytes == 0:
        raise device_error(errno.ENOMEDIUM, device=target, operation="open")
    header = None
    if not formatting:
        header = Header.find(beginning[:HEADER_BYTES], target=target, members=members)
    return _Look(Target(target, kind, size_bytes, header), status, beginning, sys)


def _kind(target: str, status: os.stat_result) -> Literal["file", "block"]:
    if stat.S_ISREG(status.st_mode):
        return "file"
    if stat.S_ISBLK(status.st_mode):
        return "block"
    if stat.S_ISDIR(status.st_mode):
        raise device_error(errno.EISDIR, device=target, operation="open")
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


def _not_a_store(look: _Look, targets: Sequence[str]) -> DeviceRefusedError:
    """Why this is not opened, and the command that would overrule it for all that were given."""
    path = look.target.path
    given = repr(targets[0] if len(targets) == 1 else list(targets))
    return _refused(
        path,
        f"{path} is not a dualblade store: {_held(look)}. Nothing was written. To lose what is on "
        f"it and make it a store: `dualblade format {' '.join(targets)}`, or dualblade.open("
        f"{given}, format=True)",
    )


def _held(look: _Look) -> str:
    target, beginning = look.target.path, look.beginning
    partitions = []
    if look.target.kind == "block":
        partitions = _partitions(_block_directory(look.sys, look.status.st_rdev))
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
