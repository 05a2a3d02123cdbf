"""Every exception that dualblade raises, and the words for what an operating system error means.

Each is a DualbladeError and also the builtin that a caller would expect: `except OSError` catches
a failed device, `except KeyError` an unknown key. All of them survive pickling.
"""

from __future__ import annotations

import errno as errnos
import os

from dualblade import nvme_status


class DualbladeError(Exception):
    """Whatever dualblade raises on its own account."""


class DualbladeWarning(UserWarning):
    """Something that was replaced by a slower or plainer way of doing it; said once."""


class _OSErrorText:
    """Shows the message alone: it names the errno itself, so "[Errno 5]" would say it twice."""

    def __str__(self) -> str:
        return getattr(self, "strerror", None) or super().__str__()


class DeviceError(_OSErrorText, DualbladeError, OSError):
    """A device or file did not do what it was asked to do.

    Takes what OSError takes: `(message)` or `(errno, message[, filename])`. The attributes
    `device` (str), `operation` (str), `offset` (bytes) and `length` (bytes) are None if unknown.
    """

    def __init__(
        self,
        *args: object,
        device: str | None = None,
        operation: str | None = None,
        offset: int | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(*args)
        self.device = device
        self.operation = operation
        self.offset = offset
        self.length = length


class NvmeError(DeviceError):
    """An NVMe command failed: `sct` is its status code type, `sc` its status code, `name` what the
    specification calls them; with `dnr` the same command would fail again.

    A status is not an errno: `errno` stays None unless the kernel gave one beside it.
    """

    def __init__(
        self,
        *args: object,
        sct: int | None = None,
        sc: int | None = None,
        dnr: bool | None = None,
        name: str | None = None,
        device: str | None = None,
        operation: str | None = None,
        offset: int | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__(*args, device=device, operation=operation, offset=offset, length=length)
        self.sct = sct
        self.sc = sc
        self.dnr = dnr
        self.name = name


class NoSpaceError(DeviceError):
    """There is no room left for this tensor. The store goes on working.

    Takes what DeviceError takes; given a message alone, its errno is ENOSPC all the same.
    """

    def __init__(
        self,
        *args: object,
        device: str | None = None,
        operation: str | None = None,
        offset: int | None = None,
        length: int | None = None,
    ) -> None:
        if len(args) == 1:
            args = (errnos.ENOSPC, *args)
        super().__init__(*args, device=device, operation=operation, offset=offset, length=length)


class DeviceRefusedError(_OSErrorText, DualbladeError, PermissionError):
    """The device is in use or holds what dualblade did not write: it was left untouched."""


class CorruptionError(DualbladeError):
    """What was read back is not what was stored. Nothing of it is returned."""


class KeyNotFoundError(DualbladeError, KeyError):
    """The store has no tensor of this key."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; ours is a sentence.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class LiveViewError(DualbladeError, BufferError):
    """Arrays that `view()` returned are still in use, and this would change what they show."""


class ClosedError(DualbladeError, ValueError):
    """The store, device or pipeline was closed, or belongs to the process before a fork."""


class AlignmentError(DualbladeError, ValueError):
    """An offset, length or address is not a multiple of what the device works in."""


class UnsupportedError(DualbladeError, NotImplementedError):
    """This build, kernel, device or data type cannot do it."""


# What each errno of the I/O path means here: (what happened, what to do).
_MEANING: dict[int, tuple[str, str]] = {
    errnos.EIO: (
        "the device reported an I/O error",
        "Look at the kernel log (dmesg) and the drive's health; data at this place may be lost.",
    ),
    errnos.EREMOTEIO: (
        "the device reported that it failed internally",
        "Look at the kernel log (dmesg) and the drive's health (nvme smart-log).",
    ),
    errnos.EILSEQ: (
        "the device's own integrity check failed",
        "Look at the kernel log (dmesg) and the drive's health; data at this place may be lost.",
    ),
    errnos.ENODATA: (
        "the device returned no data: the medium is bad there, or the file was truncated or the "
        "device removed",
        "Check that the device is still there with its full size, then the kernel log (dmesg).",
    ),
    errnos.ENOSPC: (
        "no space is left",
        "Delete tensors, or make the store or the filesystem that it lies on larger.",
    ),
    errnos.EDQUOT: (
        "the disk quota is used up",
        "Free some of the quota, or put the store on another filesystem.",
    ),
    errnos.EFBIG: (
        "the file would become larger than its filesystem or the process's limit allows",
        "Check `ulimit -f`, make the store smaller, or put it on another filesystem.",
    ),
    errnos.EINVAL: (
        "the kernel refused the request as invalid, mostly an alignment that the device needs",
        "Check the logical block size (dualblade info), or try engine='threads'.",
    ),
    errnos.ENODEV: (
        "the device is gone",
        "Check that the drive is attached and powered, then open the store again.",
    ),
    errnos.ENXIO: (
        "the device does not answer at this address: it is gone or smaller than it was",
        "Check that the drive is attached and has its full size, then open the store again.",
    ),
    errnos.ENOMEDIUM: (
        "there is no medium in it: its size is 0",
        "Insert or attach one (losetup for a loop device), or give another device.",
    ),
    errnos.ECANCELED: (
        "a write-back has failed meanwhile, and what is cached may be all there is of it",
        "Look at the kernel log (dmesg) and the drive's health.",
    ),
    errnos.EROFS: (
        "the device or filesystem is read-only",
        "Remount it read-write or remove the write protection (blockdev --setrw).",
    ),
    errnos.EBADF: (
        "it is not open for this operation",
        "Open the device without read_only, and not before a fork.",
    ),
    errnos.ECHILD: (
        "it was opened before a fork, and this is the child process",
        "Open the store again in the child process.",
    ),
    errnos.ETIMEDOUT: (
        "the device did not answer in time",
        "Look at the kernel log (dmesg); the drive or its link may be failing.",
    ),
    errnos.ENOMEM: (
        "the kernel had no memory for it",
        "Raise the locked-memory limit (ulimit -l) or the cgroup's, or lower the queue depth.",
    ),
    errnos.EACCES: (
        "permission was denied",
        "Give this user read and write permission on it, or run as a user who has it.",
    ),
    errnos.EPERM: (
        "the operation is not permitted to this process",
        "Run with the permission for it; in a container its seccomp or device rules may forbid it.",
    ),
    errnos.EBUSY: (
        "it is in use by the kernel or another process: mounted, part of a RAID or volume group, "
        "swap, or open elsewhere",
        "See who uses it (lsblk, fuser -v), and close, unmount or release it there first.",
    ),
    errnos.EWOULDBLOCK: (
        "another process has it open",
        "One process at a time can use a store: close it there (fuser -v shows who), or wait. "
        "Views of a closed store keep it locked too.",
    ),
    errnos.EOPNOTSUPP: (
        "the device or filesystem cannot do this operation",
        "Use another engine or filesystem; dualblade info says what this one can do.",
    ),
    errnos.ENOSYS: (
        "this kernel or this build has no such operation",
        "Use engine='auto', or build with the library for it.",
    ),
    errnos.ENOENT: (
        "it does not exist",
        "Check the path; to create a file of that name, pass size=.",
    ),
    errnos.EEXIST: (
        "it exists already",
        "Open it without create=True, or choose another path.",
    ),
    errnos.ENOTDIR: (
        "a part of its path is not a directory",
        "Check the path.",
    ),
    errnos.EISDIR: (
        "it is a directory",
        "Give the path of a file in it, such as kv.img, with size= to create it.",
    ),
    errnos.ENOTBLK: (
        "it is neither a file nor a block device",
        "Give a regular file or a block device such as /dev/nvme1n1.",
    ),
    errnos.ELOOP: (
        "its path has too many symbolic links",
        "Check where the links point.",
    ),
    errnos.EUSERS: (
        "a limit of the system on threads or on asynchronous I/O is reached",
        "Raise the limit (ulimit -u for threads, fs.aio-max-nr for the aio engine), or take "
        "another engine.",
    ),
    errnos.EMFILE: (
        "this process has too many files open",
        "Close some, or raise the limit (ulimit -n).",
    ),
    errnos.ENFILE: (
        "the system has too many files open",
        "Close some, or raise fs.file-max.",
    ),
}


def nvme_error(
    status: int,
    *,
    device: str | os.PathLike[str],
    operation: str,
    offset: int | None = None,
    length: int | None = None,
) -> NvmeError:
    """The exception for an NVMe command that a drive answered with this status, which is not 0.

    The rest is as of device_error.
    """
    target = os.fspath(device)
    found = nvme_status.decode(status)
    final = ", do not retry" if found.dnr else ""
    return NvmeError(
        f"{_subject(operation, offset, length)} on {target} failed: the drive answered "
        f"{found.name!r} (NVMe status type {found.sct:#x}, code {found.sc:#04x}{final}). "
        f"{found.advice}",
        sct=found.sct,
        sc=found.sc,
        dnr=found.dnr,
        name=found.name,
        device=target,
        operation=operation,
        offset=offset,
        length=length,
    )


def _subject(operation: str, offset: int | None, length: int | None) -> str:
    subject = operation
    if length is not None:
        subject += f" of {length} bytes"
    if offset is not None:
        subject += f" at offset {offset}"
    return subject


def device_error(
    errno: int,
    *,
    device: str | os.PathLike[str],
    operation: str,
    offset: int | None = None,
    length: int | None = None,
) -> DeviceError | DeviceRefusedError:
    """The exception for a failed operation on a device, to be raised by the caller.

    errno is the positive number; operation is a verb or noun such as "read" or "open"; offset and
    length are in bytes. ENOSPC and EDQUOT give NoSpaceError; an `open` that meets another user of
    the device (EBUSY, EWOULDBLOCK) gives DeviceRefusedError; the rest is DeviceError.
    """
    target = os.fspath(device)
    subject = _subject(operation, offset, length)
    name = errnos.errorcode.get(errno, "an errno without a name")
    if errno in _MEANING:
        happened, advice = _MEANING[errno]
        message = f"{subject} on {target} failed: {happened} ({name}). {advice}"
    else:
        message = (
            f"{subject} on {target} failed with an error not expected here: {os.strerror(errno)} "
            f"({name}, errno {errno}). Look at the kernel log (dmesg); please report this."
        )
    if operation == "open" and errno in (errnos.EBUSY, errnos.EWOULDBLOCK):
        return DeviceRefusedError(errno, message, target)
    kind = NoSpaceError if errno in (errnos.ENOSPC, errnos.EDQUOT) else DeviceError
    return kind(
        errno, message, target, device=target, operation=operation, offset=offset, length=length
    )
