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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

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
from dualblade.governor import Governor
from dualblade.header import DATA_OFFSET, HEADER_BYTES, Header
from dualblade.index import Index
from dualblade.memory import MemoryWatch, format_size, page_cache_budget, parse_size
from dualblade.pipeline import close_all as close_pipelines
from dualblade.residency import BINDINGS, POLICIES, Binding, Policy, Residency
from dualblade.safety import Target, check_targets
from dualblade.store import TensorStore
from dualblade.watcher import join_orphans, shared

CHUNK_BYTES = 256 << 10
"""What one checksum covers: small enough that reading a part of a tensor reads little more than
that part, large enough to cost next to nothing."""
STAGING_BYTES = 8 << 20
STRIPE_BYTES = 1 << 20
"""Of several drives, unless asked otherwise: a tensor of some megabytes is on all of them, and one
of them reads or writes enough at once for its own bandwidth."""
STRIPE_MAX_BYTES = 1 << 30
DATA_MIN_BYTES = 1 << 20
VERIFY = ("always", "open", "never")

_SQLITE_PAGE_BYTES = 4096

_open_stores: weakref.WeakSet[TensorStore] = weakref.WeakSet()
_said: set[str] = set()


def open_store(
    target: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    size: str | int | None = None,
    stripe: str | int | None = None,
    create: bool | None = None,
    format: bool = False,
    memory: str | int = "auto",
    policy: Policy = "dual",
    live: bool = True,
    binding: Binding = "spread",
    engine: Literal["auto", "nvme", "uring", "aio", "threads"] = "auto",
    queue_depth: int = 256,
    sqpoll: bool = False,
    iopoll: bool = False,
    discard: bool = False,
    durable: bool = False,
    verify: Literal["always", "open", "never"] = "always",
) -> TensorStore:
    """Opens the store on a file or block device, or one that is striped over several.

    A file that does not exist is created when `size` ("8GiB", or bytes) is given; a store that
    exists is opened as it is, with what was stored at its last `flush()` or `close()`.

    target   a path, or a list of paths, always in the same order: each tensor is spread over all
             of them then, and all work at it. Without one of them nothing can be read.
    size     of the whole store; several files that are created share it evenly.
    stripe   how much lies side by side on one of several: "1MiB", a power of two of at least
             256 KiB, fixed at the format.
    create   True: it must not exist yet; False: it must exist.
    format   True: make a new, empty store of whatever is there. Never of a device in use.
    memory   what page-cached tensors may take: "auto" is the memory that is free, a size ("2GiB",
             or bytes) caps it.
    policy   "dual": groups that fit into `memory` are page-cached, the others are read past the
             page cache; "pagecache" or "direct": all of them.
    live     "dual" follows the memory: groups leave the page cache before the kernel has to reclaim
             it for others, and come back when there is room. False: bound once, as it is now.
    binding  which groups "dual" keeps: "spread" evenly, so that the drive reads some while others
             are copied from memory; "head" the first ones.
    engine   of the direct path; "auto": the first of nvme, uring, aio, threads that works here.
    sqpoll, iopoll   a kernel thread submits, completions are polled for: less latency, for a
             processor each. See Device.open.
    discard  what is deleted is discarded (deallocated; in a file a hole), and with `format` all
             that there was: it does not fill the drive nor can be read. It is no secure erase.
    verify   when checksums are compared: at every read ("always"), once now ("open"), or "never".

    Raises DeviceRefusedError for what is in use or not ours, NoSpaceError, DeviceError,
    CorruptionError, UnsupportedError, and ValueError for an option that makes no sense.
    """
    _check_options(policy, verify, durable, binding)
    layout = _layout(target, stripe)
    size_bytes = None if size is None else layout.checked_size(size)
    budget = page_cache_budget(memory, STAGING_BYTES)
    with _created(layout, size_bytes, create, formatting=format) as is_new:
        found = check_targets(layout.paths, formatting=format or is_new)
        header = found[0].header
        if header is None:
            _make_ready(layout, found, None if is_new else size_bytes)
        else:
            layout = _as_it_is(layout, header, size, stripe)
        polling = {"sqpoll": sqpoll, "iopoll": iopoll}
        device = _open_device(layout, header, engine, queue_depth, polling)
        with _closed_on_error(device):
            notes = _fallbacks(device, engine)
            residency = Residency(policy, budget.bytes, binding)
            following = _following(residency, memory) if live and policy == "dual" else None
            index, catalog = _load(device, layout, found, residency, discard=discard)
    store = TensorStore(device, index, catalog, residency, verify=verify, fallbacks=notes)
    _open_stores.add(store)
    return _begun(store, following, verify)


def _open_device(
    layout: _Layout, header: Header | None, engine: str, queue_depth: int, polling: dict[str, bool]
) -> _core.Device:
    return _core.Device.open(
        layout.paths,
        engine,
        queue_depth,
        chunk_bytes=header.chunk_bytes if header else CHUNK_BYTES,
        staging_bytes=STAGING_BYTES,
        stripe_bytes=layout.stripe_bytes,
        **polling,
    )


def _begun(
    store: TensorStore, following: tuple[MemoryWatch, Governor] | None, verify: str
) -> TensorStore:
    """The store, closed again if it can't begin."""
    try:
        if following is not None:
            store.follow_memory(*following)
        if verify == "open":
            _verify_all(store)
    except BaseException:
        store.close()
        raise
    return store


def _following(residency: Residency, memory: str | int) -> tuple[MemoryWatch, Governor]:
    """What the store follows the memory with, which sets the first budget as well."""
    watch = MemoryWatch()
    governor = Governor(None if memory == "auto" else parse_size(memory))
    sample = shared(watch.sample(), governor, 0)
    residency.budget_bytes = governor.update(time.monotonic(), sample, 0)
    return watch, governor


@contextmanager
def _closed_on_error(device: _core.Device) -> Iterator[None]:
    try:
        yield
    except BaseException:
        device.close()
        raise


# ---- options ------------------------------------------------------------------------------------


def check_options(targets: Sequence[str], size: str | int | None, stripe: str | int | None) -> None:
    """Raises ValueError for what open_store would refuse whatever is on the targets."""
    layout = _layout(targets, stripe)
    if size is not None:
        layout.checked_size(size)


def _check_options(policy: str, verify: str, durable: bool, binding: str) -> None:
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is unknown: take one of {', '.join(POLICIES)}")
    if binding not in BINDINGS:
        raise ValueError(f"binding={binding!r} is unknown: take one of {', '.join(BINDINGS)}")
    if verify not in VERIFY:
        raise ValueError(f"verify={verify!r} is unknown: take one of {', '.join(VERIFY)}")
    if durable:
        raise UnsupportedError(
            "durable=True is not there yet: a store keeps what a returned close() or flush() has "
            "saved unless the process or the machine dies after a later change"
        )


class _Layout(NamedTuple):
    """Where a store lies: its members and what lies side by side on one of them."""

    paths: list[str]
    stripe_bytes: int
    """0 where there is only one."""

    @property
    def name(self) -> str:
        return ", ".join(self.paths)

    @property
    def data_offset(self) -> int:
        """Behind the headers, of which each is at the start of its member."""
        return max(DATA_OFFSET, len(self.paths) * self.stripe_bytes)

    @property
    def unit_bytes(self) -> int:
        """The size of a store is a multiple of this."""
        return len(self.paths) * self.stripe_bytes or HEADER_BYTES

    @property
    def least_bytes(self) -> int:
        return self.data_offset + max(DATA_MIN_BYTES, self.unit_bytes)

    @property
    def least_text(self) -> str:
        where = f" over {len(self.paths)} members" if len(self.paths) > 1 else ""
        return f"a store{where} takes at least {format_size(self.least_bytes)}"

    def header_offset(self, member: int) -> int:
        return member * self.stripe_bytes

    def checked_size(self, size: str | int) -> int:
        """Bytes of all members together."""
        size_bytes = parse_size(size)
        if size_bytes < self.least_bytes:
            raise ValueError(f"size={size!r} is too small: {self.least_text}")
        return size_bytes // self.unit_bytes * self.unit_bytes


def _layout(
    target: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], stripe: str | int | None
) -> _Layout:
    targets = target if isinstance(target, (list, tuple)) else [target]
    paths = [os.fsdecode(each) for each in targets]
    if not paths:
        raise ValueError("give at least one file or block device to open")
    for i, path in enumerate(paths):
        if not path:
            raise ValueError("the path is empty: give that of a file or block device")
        if os.path.realpath(path) in map(os.path.realpath, paths[:i]):
            raise ValueError(f"{path} is given twice: give each member of a striped store once")
    stripe_bytes = STRIPE_BYTES if stripe is None else parse_size(stripe)
    is_power = stripe_bytes & (stripe_bytes - 1) == 0
    if not is_power or not CHUNK_BYTES <= stripe_bytes <= STRIPE_MAX_BYTES:
        raise ValueError(
            f"stripe={stripe!r} must be a power of two from {format_size(CHUNK_BYTES)} to "
            f"{format_size(STRIPE_MAX_BYTES)}"
        )
    return _Layout(paths, stripe_bytes if len(paths) > 1 else 0)


def _as_it_is(
    asked: _Layout, header: Header, size: str | int | None, stripe: str | int | None
) -> _Layout:
    """The layout of a store that exists, whatever was asked for."""
    differences = []
    words = []
    layout = asked._replace(stripe_bytes=header.stripe_bytes)
    if size is not None and layout.checked_size(size) != header.size_bytes:
        differences.append(format_size(header.size_bytes))
        words.append(f"size={format_size(parse_size(size))}")
    if stripe is not None and asked.stripe_bytes != header.stripe_bytes:
        differences.append(f"stripes of {format_size(header.stripe_bytes)}")
        words.append(f"stripe={format_size(asked.stripe_bytes)}")
    if differences:
        warnings.warn(
            f"{layout.name} exists with {' and '.join(differences)} and is opened as it is, not "
            f"with {' and '.join(words)}; format=True would make it anew, empty",
            DualbladeWarning,
            stacklevel=3,
        )
    return layout


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
def _created(
    layout: _Layout, size_bytes: int | None, create: bool | None, *, formatting: bool
) -> Iterator[bool]:
    """Makes the files if they are to be made; whether all of them were. Those that were are removed
    again if what follows fails."""
    missing = [path for path in layout.paths if not _exists(path)]
    present = [path for path in layout.paths if path not in missing]
    if create and present:
        raise DeviceError(
            errno.EEXIST,
            f"{present[0]} exists: leave create=True out to open it, or use another path",
            present[0],
        )
    if missing and present and not (formatting and size_bytes is not None):
        raise DeviceError(
            errno.ENOENT,
            f"{missing[0]} is missing: it does not exist, and {present[0]} does. A striped store "
            f"needs all its members, in the order of its format; only where none of the files "
            f"exists are they created",
            missing[0],
        )
    if missing and (size_bytes is None or create is False):
        raise device_error(errno.ENOENT, device=missing[0], operation="open")
    made: list[str] = []
    try:
        for path in missing:
            _create(path, (size_bytes or 0) // len(layout.paths))
            made.append(path)
        yield bool(missing) and not present
    except BaseException:
        for path in made:
            os.unlink(path)
        raise


def _exists(path: str) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=path, operation="open") from error
    return True


def refuse_missing_directory(path: str) -> None:
    """The kernel says ENOENT of a file to be created, as if the file were what is missing."""
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise DeviceError(
            errno.ENOENT,
            f"{path!r} can't be created: there is no directory {os.path.dirname(path)!r}. Make it "
            f"first, or check the path",
            path,
        )


def _create(path: str, size_bytes: int) -> None:
    refuse_missing_directory(path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=path, operation="create") from error
    try:
        # Now rather than later: a file with holes could run out of space under a tensor.
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        os.unlink(path)
        raise device_error(
            error.errno or errno.EIO, device=path, operation="create", length=size_bytes
        ) from error
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def _make_ready(layout: _Layout, found: Sequence[Target], size_bytes: int | None) -> None:
    """What is to be formatted gets the size asked for, if it is a file: all of them or none."""
    if found[0].kind == "file":
        _refuse_strange_catalog(found[0].path)
    least_bytes = layout.least_bytes // len(found)
    files = [target for target in found if target.kind == "file"]
    for target in found:
        is_resized = target.kind == "file" and size_bytes is not None
        if not is_resized and target.size_bytes < least_bytes:
            advice = "give size=" if target.kind == "file" else layout.least_text
            raise ValueError(
                f"{target.path} has {format_size(target.size_bytes)}, too little for a store: "
                f"{advice}"
            )
    if size_bytes is not None and files:
        _set_sizes([target.path for target in files], size_bytes // len(found))


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


def _set_sizes(paths: Sequence[str], size_bytes: int) -> None:
    """Each file has this size then; where that can't be, each has the size and content it had."""
    with contextlib.ExitStack() as stack:
        files = [(path, _locked(path, stack)) for path in paths]
        resized = [
            (path, fd, old_bytes)
            for path, fd in files
            if (old_bytes := os.fstat(fd).st_size) != size_bytes
        ]
        # Cut off last: up to then everything can be taken back.
        for i, (path, fd, _) in enumerate(resized):
            try:
                os.posix_fallocate(fd, 0, size_bytes)
            except OSError as error:
                for _, grown, old_bytes in resized[: i + 1]:
                    with contextlib.suppress(OSError):
                        os.ftruncate(grown, old_bytes)
                raise device_error(
                    error.errno or errno.EIO, device=path, operation="resize", length=size_bytes
                ) from error
        for path, fd, _ in resized:
            try:
                os.ftruncate(fd, size_bytes)
            except OSError as error:
                raise device_error(
                    error.errno or errno.EIO, device=path, operation="resize", length=size_bytes
                ) from error


def _locked(path: str, stack: contextlib.ExitStack) -> int:
    """Refuses a file of a store that is open, here or in another process."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise device_error(error.errno or errno.EIO, device=path, operation="open") from error
    return fd


# ---- the store on it ----------------------------------------------------------------------------


def _load(
    device: _core.Device,
    layout: _Layout,
    members: Sequence[Target],
    residency: Residency,
    *,
    discard: bool,
) -> tuple[Index, Catalog]:
    found = members[0]
    if found.header is None:
        if discard:
            device.discard(0, device.info.size)
        header = _format(device, layout)
        path = catalog_path(found.path, found.kind, header.store_id)
        catalog = Catalog.create(path, header.store_id)
        index = _index(header)
    else:
        _check_headers(device, layout, members)
        index, catalog = _saved(device, layout, found, residency)
    if discard:
        index.erase = _eraser(device)
    return index, catalog


def _eraser(device: _core.Device) -> Callable[[int, int], None]:
    """Discards a range. Where that fails nobody is kept from going on, but told."""

    def erase(offset: int, length: int) -> None:
        try:
            device.discard(offset, length)
        except DualbladeError as error:
            warnings.warn(
                f"what was deleted can still be read on {device.info.target}: {error}",
                DualbladeWarning,
                stacklevel=2,
            )

    return erase


def _saved(
    device: _core.Device, layout: _Layout, found: Target, residency: Residency
) -> tuple[Index, Catalog]:
    """What the store had when it was saved."""
    header = found.header
    assert header is not None
    header.check_device(device.info.size, device.info.lba_size, layout.name, layout.paths)
    index = _index(header)
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
            catalog = _drop_unclean(catalog, path, header, layout.name)
    except BaseException:
        catalog.close()
        raise
    return index, catalog


def _drop_unclean(catalog: Catalog, path: os.PathLike[str], header: Header, name: str) -> Catalog:
    """Without durability nothing says which of a killed process's writes arrived: better nothing
    than a mixture of old and new."""
    count = sum(1 for _ in catalog.records())
    catalog.close()
    warnings.warn(
        f"the store on {name} was changed and not closed or flushed when its process ended: "
        f"it starts empty, and the {count} tensors of its last save are dropped",
        DualbladeWarning,
        stacklevel=4,
    )
    return Catalog.create(path, header.store_id)


def _index(header: Header) -> Index:
    return Index(
        header.size_bytes,
        header.data_offset,
        header.chunk_bytes,
        is_striped=header.members > 1,
    )


def _format(device: _core.Device, layout: _Layout) -> Header:
    info = device.info
    if info.size < layout.least_bytes:
        raise ValueError(
            f"{info.target} has {format_size(info.size)}, too little: {layout.least_text}"
        )
    first = Header(
        store_id=Header.new_store_id(),
        size_bytes=info.size,
        lba_bytes=info.lba_size,
        chunk_bytes=CHUNK_BYTES,
        data_offset=layout.data_offset,
        created_unix=int(time.time()),
    )
    headers = [first]
    if layout.stripe_bytes:
        headers = [
            replace(
                first,
                member=member,
                members=len(layout.paths),
                stripe_bytes=layout.stripe_bytes,
                member_bytes=size_bytes,
            )
            for member, size_bytes in enumerate(info.member_sizes)
        ]
    device.write(
        [(layout.header_offset(member), each.pack()) for member, each in enumerate(headers)]
    ).wait()
    device.flush()
    return headers[0]


def _check_headers(device: _core.Device, layout: _Layout, members: Sequence[Target]) -> None:
    """Once more, now that nobody else can write to them."""
    blocks = [_core.aligned_empty(HEADER_BYTES, np.uint8) for _ in members]
    device.read(
        [(layout.header_offset(member), block) for member, block in enumerate(blocks)]
    ).wait()
    for found, block in zip(members, blocks, strict=True):
        if Header.unpack(block, found.path, layout.paths) != found.header:
            raise DeviceRefusedError(
                errno.EPERM,
                f"{found.path} was formatted by another process just now: open it again",
                found.path,
            )


def _verify_all(store: TensorStore) -> None:
    problems = store.check()
    if problems:
        raise CorruptionError(
            f"{len(problems)} problems were found: {'; '.join(problems[:5])}. Open with "
            f"verify='always' to use what is sound, or start anew with format=True"
        )


# ---- the end of the process ---------------------------------------------------------------------


def _close_all() -> None:
    with contextlib.ExitStack() as stack:  # whatever goes wrong with one, the others are closed
        stack.callback(join_orphans)
        for store in list(_open_stores):
            stack.callback(store.close)
        stack.callback(close_pipelines)  # first: the last that was put there


def _forget_all() -> None:
    for store in list(_open_stores):
        store.forget_after_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
