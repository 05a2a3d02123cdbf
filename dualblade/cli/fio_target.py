"""The file or device that a job runs on: made if missing, and never somebody else's data."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

import numpy as np

from dualblade import Device
from dualblade._core import find_signature, nvme_block_node
from dualblade.cli.fio_options import DEPTH_MAX, REQUEST_BYTES, Options
from dualblade.cli.fio_pylibaio import INSTALL, PylibaioDevice, load
from dualblade.errors import DeviceRefusedError, DualbladeError, UnsupportedError, device_error
from dualblade.header import HEADER_BYTES, Header
from dualblade.opening import refuse_missing_directory
from dualblade.safety import check_target

_LAYOUT_BYTES = 1 << 20
WORKERS_MAX = 64


class UsageError(Exception):
    """Options that turned out wrong once the target was looked at."""


@dataclass(frozen=True)
class Region:
    """What of the target a job uses."""

    size_bytes: int
    layout_from: int | None
    """Where a file that is about to be read has nothing written yet; None if it all has."""


def prepare(options: Options) -> Region:
    """Makes or lengthens the file, and checks that it may be written if the job writes.

    Raises DeviceRefusedError, DeviceError, UsageError.
    """
    path = nvme_block_node(options.filename) or options.filename
    if options.engine == "pylibaio":
        try:
            load()
        except ImportError as error:
            raise UsageError(f"--engine pylibaio needs {INSTALL} ({error})") from error
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return _create(options)
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=path, operation="open") from error
    is_block = stat.S_ISBLK(status.st_mode)
    if options.writes:
        check_writable(path, is_block=is_block, allowed=options.allow_device_write)
    existing = _block_device_bytes(path) if is_block else status.st_size
    wanted = existing if options.size is None else options.size
    layout_from = None
    if wanted > existing and is_block:
        raise UsageError(f"--size {wanted} is more than the {existing} bytes of {path}")
    if wanted > existing:
        check_writable(path, is_block=False, allowed=False)
        _allocate(path, existing, wanted, os.O_RDWR)
        layout_from = existing
    return Region(_whole_blocks(options, wanted), _layout(options, layout_from))


def check_writable(path: str, *, is_block: bool, allowed: bool) -> None:
    """Raises DeviceRefusedError unless `path` may be overwritten: not in use, no signature."""
    if is_block and not allowed:
        raise DeviceRefusedError(
            errno.EPERM,
            f"{path} is a block device, and the job writes to it: nothing was written. If "
            "everything on it may be lost, give --allow-device-write",
            path,
        )
    found = check_target(path, formatting=True)
    if found.size_bytes == 0:
        return
    held = _content(path, is_block=is_block)
    if held:
        raise DeviceRefusedError(
            errno.EPERM,
            f"{path} holds {held}: nothing was written. Use another "
            + ("device, or wipe this one yourself (wipefs -a)" if is_block else "file"),
            path,
        )


def _content(path: str, *, is_block: bool) -> str:
    """What is on it that somebody may want to keep; "" if nothing is known to be."""
    try:
        signature = find_signature(path)
    except UnsupportedError:
        if is_block:
            raise
        signature = ""  # without libblkid a file is taken for what it mostly is: an earlier job's
    if signature:
        return f"{signature} (a filesystem, partition table or volume signature)"
    with open(path, "rb") as file:
        beginning = file.read(HEADER_BYTES)
    try:
        is_store = Header.find(beginning.ljust(HEADER_BYTES, b"\0"), target=path) is not None
    except DualbladeError:
        is_store = True  # a damaged one, or one of another version
    return "a dualblade store" if is_store else ""


def _create(options: Options) -> Region:
    if options.size is None:
        raise UsageError(f"{options.filename} does not exist: give --size to make it")
    size_bytes = _whole_blocks(options, options.size)
    refuse_missing_directory(options.filename)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        _allocate(options.filename, 0, options.size, flags)
    except DualbladeError:
        if os.path.exists(options.filename) and os.path.getsize(options.filename) == 0:
            os.unlink(options.filename)
        raise
    return Region(size_bytes, _layout(options, 0))


def _allocate(path: str, start: int, end: int, flags: int) -> None:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, start, end - start)
        finally:
            os.close(fd)
    except OSError as error:
        raise device_error(
            error.errno or errno.EIO, device=path, operation="create", length=end
        ) from error


def _layout(options: Options, start: int | None) -> int | None:
    """Blocks that are allocated and not written are not read from the drive, but made up."""
    return start if "read" in options.directions else None


def _whole_blocks(options: Options, size_bytes: int) -> int:
    if size_bytes < options.bs:
        raise UsageError(
            f"{options.filename} has {size_bytes} bytes, less than --bs {options.bs}: give --size"
        )
    return size_bytes // options.bs * options.bs


def _block_device_bytes(path: str) -> int:
    try:
        with open(path, "rb") as device:
            return device.seek(0, os.SEEK_END)
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=path, operation="open") from error


def open_device(options: Options, region: Region) -> Device | PylibaioDevice:
    """What the job drives, with everything it is going to read written."""
    if options.engine == "pylibaio":
        if region.layout_from is not None:
            _open(options, region, "auto").close()
        return PylibaioDevice(options.filename, options.iodepth, read_only=not options.writes)
    return _open(options, region, options.engine)


def _open(options: Options, region: Region, engine: str) -> Device:
    pieces = -(-options.bs // (options.request_bytes or REQUEST_BYTES))
    depth = min(DEPTH_MAX, options.iodepth * options.numjobs * pieces)
    workers = {}
    if engine == "threads" or not options.direct:
        workers["threads"] = min(WORKERS_MAX, depth)
    device = Device.open(
        options.filename,
        engine,
        depth,
        request_bytes=options.request_bytes,
        read_only=not options.writes and region.layout_from is None,
        sqpoll=options.sqthread_poll,
        iopoll=options.hipri,
        **workers,
    )
    try:
        if options.direct and not device.info.direct:
            raise UsageError(
                f"the filesystem of {options.filename} has no O_DIRECT: use --direct 0, or "
                "another filesystem"
            )
        if region.layout_from is not None:
            _write_noise(device, region.layout_from, region.size_bytes)
        if not options.direct:
            device.flush()
            device.drop_cached(0, region.size_bytes)
    except BaseException:
        device.close()
        raise
    return device


def _write_noise(device: Device, start: int, end: int) -> None:
    noise = np.frombuffer(np.random.default_rng(0).bytes(_LAYOUT_BYTES), np.uint8)
    for offset in range(start, end, _LAYOUT_BYTES):
        # Through the page cache: a file that is made longer may end anywhere.
        device.write([(offset, noise[: end - offset])], path="pagecache").wait()
    device.flush()
    device.drop_cached(0, end)
