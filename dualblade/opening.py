"""dualblade.open: from a path to a store, made or opened as it is, or refused with the reason."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np

from dualblade import _core
from dualblade.catalog import Catalog, catalog_path
from dualblade.errors import (
    CorruptionError,
    DeviceError,
    DeviceRefusedError,
    DualbladeError,
    DualbladeWarning,
    UnsupportedError,
    device_error,
)
from dualblade.header import DATA_OFFSET, HEADER_BYTES, Header
from dualblade.index import Index
from dualblade.memory import format_size, page_cache_budget, parse_size
from dualblade.residency import POLICIES, Policy, Residency
from dualblade.safety import Target, check_target
from dualblade.store import TensorStore

CHUNK_BYTES = 256 << 10
"""What one checksum covers: small enough that reading a part of a tensor reads little more than
that part, large enough to cost next to nothing."""
STAGING_BYTES = 8 << 20
SIZE_MIN_BYTES = DATA_OFFSET + (1 << 20)
VERIFY = ("always", "open", "never")

_SQLITE_PAGE_BYTES = 4096

_open_stores: weakref.WeakSet[TensorStore] = weakref.WeakSet()
_said: set[str] = set()


def open_store(
    target: str | os.PathLike[str],
    *,
    size: str | int | None = None,
    create: bool | None = None,
    format: bool = False,
    memory: str | int = "auto",
    policy: Policy = "dual",
    engine: Literal["auto", "uring", "aio", "threads"] = "auto",
    queue_depth: int = 256,
    sqpoll: bool = False,
    iopoll: bool = False,
    durable: bool = False,
    verify: Literal["always", "open", "never"] = "always",
) -> TensorStore:
    """Opens the store on a file or block device.

    A file that does not exist is created when `size` ("8GiB", or bytes) is given; a store that
    exists is opened as it is, with what was stored at its last `flush()` or `close()`.

    create   True: it must not exist yet; False: it must exist.
    format   True: make a new, empty store of whatever is there. Never of a device in use.
    memory   what page-cached tensors may take: "auto" follows the memory that is free now, a size
             ("2GiB", or bytes) caps it.
    policy   "dual": groups that fit into `memory` are page-cached, the others are read past the
             page cache; "pagecache" or "direct": all of them.
    engine   of the direct path; "auto" takes the first of uring, aio and threads that works here.
    sqpoll, iopoll   a kernel thread submits, completions are polled for: less latency, for a
             processor each. See Device.open.
    verify   when checksums are compared: at every read ("always"), once now ("open"), or "never".

    Raises DeviceRefusedError for what is in use or not ours, NoSpaceError, DeviceError,
    CorruptionError, UnsupportedError, and ValueError for an option that makes no sense.
    """
    _check_options(policy, verify, durable)
    path = os.fsdecode(target)
    size_bytes = None if size is None else _checked_size(size)
    budget = page_cache_budget(memory, STAGING_BYTES)
    with _created(path, size_bytes, create) as is_new:
        found = check_target(path, formatting=format or is_new)
        if found.header is None and found.kind == "file":
            _refuse_strange_catalog(path)
            if not is_new:
                _set_size(found, size_bytes)
        elif size_bytes is not None and not is_new and found.header is not None:
            _mention_size(path, size_bytes, found.header.size_bytes)
        device = _core.Device.open(
            path,
            engine,
            queue_depth,
            chunk_bytes=found.header.chunk_bytes if found.header else CHUNK_BYTES,
            staging_bytes=STAGING_BYTES,
            sqpoll=sqpoll,
            iopoll=iopoll,
        )
        try:
            fallbacks = _fallbacks(device, engine)
            residency = Residency(policy, budget.bytes)
            index, catalog = _load(device, found, residency)
        except BaseException:
            device.close()
            raise
    store = TensorStore(device, index, catalog, residency, verify=verify, fallbacks=fallbacks)
    _open_stores.add(store)
    if verify == "open":
        _verify_all(store)
    return store


# ---- options ------------------------------------------------------------------------------------


def _check_options(policy: str, verify: str, durable: bool) -> None:
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is unknown: take one of {', '.join(POLICIES)}")
    if verify not in VERIFY:
        raise ValueError(f"verify={verify!r} is unknown: take one of {', '.join(VERIFY)}")
    if durable:
        raise UnsupportedError(
            "durable=True is not there yet: a store keeps what a returned close() or flush() has "
            "saved unless the process or the machine dies after a later change"
        )


def _checked_size(size: str | int) -> int:
    size_bytes = parse_size(size)
    if size_bytes < SIZE_MIN_BYTES:
        raise ValueError(
            f"size={size!r} is too small: a store takes at least {format_size(SIZE_MIN_BYTES)}"
        )
    return size_bytes // HEADER_BYTES * HEADER_BYTES


def _mention_size(path: str, size_bytes: int, found_bytes: int) -> None:
    if size_bytes != found_bytes:
        warnings.warn(
            f"{path} exists with {format_size(found_bytes)} and is opened as it is, not with "
            f"size={format_size(size_bytes)}; format=True would make it anew, empty",
            DualbladeWarning,
            stacklevel=3,
        )


def _fallbacks(device: _core.Device, engine: str) -> list[str]:
    """What is not used because it does not work here; each is said once in a process."""
    info = device.info
    notes = []
    if not info.direct:
        notes.append(
            f"the filesystem of {info.target} has no O_DIRECT: the direct path goes through the "
            f"page cache too; for full speed put the store on ext4, xfs or a block device"
        )
    elif engine == "auto":
        refused = [f"{name} ({reason})" for name, reason in info.engines_refused.items() if reason]
        if refused:
            notes.append(f"using the {info.engine} engine, because of {', '.join(refused)}")
    for note in notes:
        if note not in _said:
            _said.add(note)
            warnings.warn(note, DualbladeWarning, stacklevel=3)
    return notes


# ---- the file -----------------------------------------------------------------------------------


@contextmanager
def _created(path: str, size_bytes: int | None, create: bool | None) -> Iterator[bool]:
    """Makes the file if it is to be made; whether it was. Removed again if what follows fails."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        exists = False
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=path, operation="open") from error
    else:
        exists = True
    if exists:
        if create:
            raise DeviceError(
                errno.EEXIST,
                f"{path} exists: leave create=True out to open it, or use another path",
                path,
            )
        yield False
        return
    if size_bytes is None or create is False:
        raise device_error(errno.ENOENT, device=path, operation="open")
    if not os.path.isdir(os.path.dirname(path) or "."):
        # The kernel says ENOENT of the file, as if giving size= were what is missing.
        raise DeviceError(
            errno.ENOENT,
            f"{path!r} can't be created: there is no directory {os.path.dirname(path)!r}. Make it "
            f"first, or check the path",
            path,
        )
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=path, operation="create") from error
    try:
        try:
            # Now rather than later: a file with holes could run out of space under a tensor.
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            raise device_error(
                error.errno or errno.EIO, device=path, operation="create", length=size_bytes
            ) from error
        finally:
            os.close(fd)
        yield True
    except BaseException:
        os.unlink(path)
        raise


def _refuse_strange_catalog(target: str) -> None:
    """The catalog of a new store replaces an old one, but never a file that only has its name."""
    path = catalog_path(target, "file", "")
    try:
        with open(path, "rb") as file:
            page = file.read(_SQLITE_PAGE_BYTES)
            is_one_page = not file.read(1)
    except FileNotFoundError:
        return
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=path, operation="open") from error
    is_sqlite = page.startswith(b"SQLite format 3\0")
    is_ours = is_sqlite and page[68:72] == b"DBLD"
    # Until SQLite first folds its log back there is one page, without a table and without our mark.
    is_blank = is_sqlite and is_one_page and page[103:105] == b"\0\0"
    # Under a header of ours, whatever it looks like now, it is the catalog of the store that goes.
    if page and not is_ours and not is_blank and not _bears_header(target):
        raise DeviceRefusedError(
            errno.EEXIST,
            f"the index of a store on {target} belongs into {path}, but that is a file which "
            f"dualblade did not write. Nothing was written: move it away, or give the store "
            f"another name",
            os.fspath(path),
        )


def _bears_header(target: str) -> bool:
    try:
        with open(target, "rb") as file:
            return Header.find(file.read(HEADER_BYTES), target=target) is not None
    except DualbladeError:
        return True  # damaged, or of another version


def _set_size(found: Target, size_bytes: int | None) -> None:
    """Gives a file that is about to be formatted the size asked for."""
    if size_bytes is None or size_bytes == found.size_bytes:
        if found.size_bytes < SIZE_MIN_BYTES:
            raise ValueError(
                f"{found.path} has {format_size(found.size_bytes)}, too little for a store: "
                f"give size="
            )
        return
    fd = os.open(found.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, min(size_bytes, found.size_bytes))
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        operation = "open" if error.errno == errno.EWOULDBLOCK else "resize"
        raise device_error(
            error.errno or errno.EIO, device=found.path, operation=operation, length=size_bytes
        ) from error
    finally:
        os.close(fd)


# ---- the store on it ----------------------------------------------------------------------------


def _load(device: _core.Device, found: Target, residency: Residency) -> tuple[Index, Catalog]:
    if found.header is None:
        header = _format(device)
        path = catalog_path(found.path, found.kind, header.store_id)
        catalog = Catalog.create(path, header.store_id)
        return Index(header.size_bytes, header.data_offset, header.chunk_bytes), catalog
    header = _read_header(device, found)
    header.check_device(device.info.size, device.info.lba_size, target=found.path)
    index = Index(header.size_bytes, header.data_offset, header.chunk_bytes)
    path = catalog_path(found.path, found.kind, header.store_id)
    try:
        catalog = Catalog.open(path, header.store_id)
    except DeviceError as error:
        if error.errno != errno.ENOENT:
            raise
        raise DeviceRefusedError(
            errno.EPERM,
            f"{found.path} holds a store, but its catalog {path} is missing: put it back, or start "
            f"anew with format=True, which loses what is stored",
            found.path,
        ) from error
    try:
        if catalog.clean:
            index.load(catalog, residency)
        else:
            catalog = _drop_unclean(catalog, path, header, found)
    except BaseException:
        catalog.close()
        raise
    return index, catalog


def _drop_unclean(
    catalog: Catalog, path: os.PathLike[str], header: Header, found: Target
) -> Catalog:
    """Without durability nothing says which of a killed process's writes arrived: better nothing
    than a mixture of old and new."""
    count = sum(1 for _ in catalog.records())
    catalog.close()
    warnings.warn(
        f"the store on {found.path} was changed and not closed or flushed when its process ended: "
        f"it starts empty, and the {count} tensors of its last save are dropped",
        DualbladeWarning,
        stacklevel=4,
    )
    return Catalog.create(path, header.store_id)


def _format(device: _core.Device) -> Header:
    info = device.info
    if info.size < SIZE_MIN_BYTES:
        raise ValueError(
            f"{info.target} has {format_size(info.size)}, too little for a store: it takes at "
            f"least {format_size(SIZE_MIN_BYTES)}"
        )
    header = Header(
        store_id=Header.new_store_id(),
        size_bytes=info.size,
        lba_bytes=info.lba_size,
        chunk_bytes=CHUNK_BYTES,
        data_offset=DATA_OFFSET,
        created_unix=int(time.time()),
    )
    device.write([(0, header.pack())]).wait()
    device.flush()
    return header


def _read_header(device: _core.Device, found: Target) -> Header:
    """Once more, now that nobody else can write to it."""
    block = _core.aligned_empty(HEADER_BYTES, np.uint8)
    device.read([(0, block)]).wait()
    header = Header.unpack(block, target=found.path)
    if header != found.header:
        raise DeviceRefusedError(
            errno.EPERM,
            f"{found.path} was formatted by another process just now: open it again",
            found.path,
        )
    return header


def _verify_all(store: TensorStore) -> None:
    problems = store.check()
    if problems:
        store.close()
        raise CorruptionError(
            f"{len(problems)} problems were found: {'; '.join(problems[:5])}. Open with "
            f"verify='always' to use what is sound, or start anew with format=True"
        )


# ---- the end of the process ---------------------------------------------------------------------


def _close_all() -> None:
    with contextlib.ExitStack() as stack:  # whatever goes wrong with one, the others are closed
        for store in list(_open_stores):
            stack.callback(store.close)


def _forget_all() -> None:
    for store in list(_open_stores):
        store.forget_after_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
