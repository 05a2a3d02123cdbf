"""TensorStore: tensors by key, each in one contiguous extent of one device.

How threads keep out of each other's way is in access.py, how bytes move in transfer.py, how groups
change their path in rebinding.py and watcher.py, how a store is saved in saving.py, what is known
of a tensor in entry.py and index.py, what pipelines ask for in parts.py; here is what callers ask
for.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from dualblade import _core, tensor
from dualblade.access import (
    IS_EXCLUSIVE,
    Operation,
    check_name,
    inside,
    is_written,
    rows_of,
)
from dualblade.catalog import Catalog
from dualblade.entry import Entry, Layout, ReadPlan, TensorInfo, footprint_of, growth_of, layout_of
from dualblade.errors import CorruptionError, DeviceError, KeyNotFoundError, UnsupportedError
from dualblade.index import Index
from dualblade.parts import Parts
from dualblade.residency import PathName, Residency
from dualblade.saving import Saving
from dualblade.ticket import Ticket
from dualblade.transfer import COPY_BYTES, SUBMIT_REQUESTS, AppendEnd, Written, drain
from dualblade.views import Views

IS_FULL = operator.attrgetter("is_full")


class TensorStore(Saving, Views, Parts):
    """Tensors on one file or block device, or striped over several. Made by `dualblade.open`; safe
    for many threads.

    Every method raises ClosedError after `close()`, KeyNotFoundError for an unknown key, and
    DeviceError with device, operation, offset and length when the device fails.
    """

    def __init__(
        self,
        device: _core.Device,
        index: Index,
        catalog: Catalog,
        residency: Residency,
        *,
        verify: str,
        fallbacks: Sequence[str] = (),
    ) -> None:
        super().__init__(device, index, catalog, residency, verify=verify)
        self._fallbacks = tuple(fallbacks)

    # ---- what callers store and read --------------------------------------------------------

    def put(self, key: str, array: Any, *, group: str | None = None) -> None:
        """Stores a copy of an array under a key, in place of what was there.

        `array` is a numpy array of any dtype but object, a torch CPU tensor, or anything with the
        buffer protocol or DLPack. Tensors of one `group` (by default the key) share a path. Raises
        NoSpaceError, TypeError, ValueError; then the key is as it was before.
        """
        self._start_put({key: array}, group).result()

    def put_many(self, arrays: Mapping[str, Any], *, group: str | None = None) -> None:
        """Stores many arrays at once: all of them, or after an error none."""
        self._start_put(arrays, group).result()

    def put_async(self, key: str, array: Any, *, group: str | None = None) -> Ticket:
        """Starts a put. The array's memory must stay as it is until the ticket is done."""
        return self._start_put({key: array}, group)

    def put_many_async(self, arrays: Mapping[str, Any], *, group: str | None = None) -> Ticket:
        """Starts a put_many. The arrays' memory must stay as it is until the ticket is done."""
        return self._start_put(arrays, group)

    def get(self, key: str, out: Any = None) -> Any:
        """The array stored under a key: a new numpy array, or `out` with its content replaced.

        bfloat16 and float8 come as arrays of ml_dtypes' dtypes. `out` is a numpy array, torch CPU
        tensor or buffer of the same shape and dtype, writable and contiguous.
        """
        return self._start_get([(key, None, None, out)]).result()[0]

    def get_many(self, keys: Iterable[str], out: Any = None) -> dict[str, Any]:
        """Many arrays at once, by key. `out`: a mapping from key, or a sequence beside `keys`.

        Nothing is read if a key is unknown. After any other error `out` may hold anything.
        """
        return self._start_get_many(keys, out).result()

    def get_async(self, key: str, out: Any = None) -> Ticket:
        """Starts a get; the ticket's result is the array."""
        return self._start_get([(key, None, None, out)], lambda arrays: arrays[0], ahead=True)

    def get_many_async(self, keys: Iterable[str], out: Any = None) -> Ticket:
        """Starts a get_many; the ticket's result is the dict."""
        return self._start_get_many(keys, out, ahead=True)

    def _start_get_many(self, keys: Iterable[str], out: Any, *, ahead: bool = False) -> Ticket:
        keys = _key_list(keys)
        if out is None:
            outs = [None] * len(keys)
        elif isinstance(out, Mapping):
            outs = [out.get(key) for key in keys]
        else:
            outs = list(out)
            if len(outs) != len(keys):
                raise ValueError(f"out has {len(outs)} arrays for {len(keys)} keys")
        wanted = [(key, None, None, array) for key, array in zip(keys, outs, strict=True)]
        return self._start_get(
            wanted, lambda arrays: dict(zip(keys, arrays, strict=True)), ahead=ahead
        )

    def reserve(
        self, key: str, shape: Sequence[int], dtype: Any, *, group: str | None = None
    ) -> None:
        """Makes room for a tensor that grows by `append` along its first axis up to `shape`."""
        self.reserve_many({key: (shape, dtype)}, group=group)

    def reserve_many(
        self, tensors: Mapping[str, tuple[Sequence[int], Any]], *, group: str | None = None
    ) -> None:
        """Reserves several tensors, `{key: (shape, dtype)}`, side by side in one run."""
        name = None if group is None else check_name(group)
        entries = [
            self._reservation(key, shape, dtype, name) for key, (shape, dtype) in tensors.items()
        ]
        while True:
            self._settle_puts(tensors)
            with self._operation() as operation, self._lock:
                if self._puts_of(tensors):
                    continue
                taken = [entry.key for entry in entries if entry.key in self._index]
                if taken:
                    raise ValueError(
                        f"{taken[0]!r} is stored already: delete it before it is reserved anew"
                    )
                operation.created = entries
                crowded = self._place(entries, one_run=True)
                if not crowded:
                    operation.is_written = True
                    self._change(operation)
                    return
            self._go_direct(crowded)

    def append(self, key: str, rows: Any) -> None:
        """Appends rows, `[n, *shape[1:]]`, to a reserved tensor. ValueError when it is full."""
        self.append_many({key: rows})

    def append_many(self, rows: Mapping[str, Any]) -> None:
        """Appends to several tensors at once: to all of them, or after an error to none."""
        can_leave = True
        while True:
            with self._appending(rows) as entries:
                parts = rows_of(entries, rows)
                growth = self._claim(entries, parts, is_forced=not can_leave)
                if not growth:
                    self._append(entries, parts)
                    return
            can_leave = self._make_way(growth)

    def append_many_async(
        self, rows: Mapping[str, Any], copies: Mapping[str, Any] | None = None
    ) -> Ticket:
        """Starts an append_many. The rows' memory must stay as it is until the ticket is done.

        With `copies`, contiguous memory as large as the rows of each key, that memory must: the
        rows are copied there as their checksums are taken, and are the caller's again at once.

        Whatever is done with one of the keys next waits for it. An error is raised by the ticket
        alone, and then nothing was appended to any of them.
        """
        can_leave = True
        while True:
            started = self._start_append(rows, copies or {}, is_forced=not can_leave)
            if isinstance(started, Ticket):
                return started
            can_leave = self._make_way(started)

    @inside
    def _start_append(
        self, rows: Mapping[str, Any], copies: Mapping[str, Any], *, is_forced: bool
    ) -> Ticket | dict[str, int]:
        """The ticket; or the growth for which the memory budget has no room."""
        operation = Operation(is_appending=True)
        completions: list[_core.Completion] = []
        ends: list[AppendEnd] = []

        def finish(error: BaseException | None) -> None:
            if error is not None:
                raise error
            self._end_append(ends)

        ticket = self._ticket(completions, finish, operation)
        with self._starting(operation, ticket, completions):
            entries = self._hold(operation, rows, is_written)
            parts = rows_of(entries, rows)
            growth = self._claim(entries, parts, is_forced=is_forced)
            if growth:
                return growth
            writes, found = self._plan_append(entries, parts, copies)
            ends += found
            self._start_parts(writes, completions, id(operation))
            # The mapping is the caller's, who may empty it at once.
            self._register(operation, ticket, [entry.key for entry in entries])
        return ticket

    def read(self, key: str, start: int, stop: int, out: Any = None) -> Any:
        """The rows [start, stop) of a tensor, as numpy slices count them."""
        return self._start_get([(key, start, stop, out)]).result()[0]

    def read_async(self, key: str, start: int, stop: int, out: Any = None) -> Ticket:
        """Starts a read; the ticket's result is the array."""
        return self._start_get([(key, start, stop, out)], lambda arrays: arrays[0], ahead=True)

    def read_many_async(self, reads: Iterable[tuple[str, int, int, Any]]) -> Ticket:
        """Starts several reads, `(key, start, stop, out)`; the result is the list of arrays."""
        return self._start_get(list(reads), ahead=True)

    def truncate(self, key: str, rows: int) -> None:
        """Keeps the first `rows` rows; the room stays reserved."""
        self.truncate_many({key: rows})

    def truncate_many(self, rows: Mapping[str, int]) -> None:
        """Keeps the first rows of several tensors: of all, or after an error of none."""
        with self._exclusive(rows) as entries:
            cuts = []
            for entry in entries:
                count = _row_count(rows[entry.key])
                if not entry.layout.shape:
                    raise ValueError(f"{entry.key!r} has no axis to be truncated along")
                if count > entry.rows:
                    raise ValueError(f"{entry.key!r} has {entry.rows} rows: it can't keep {count}")
                cuts.append((entry, count, self._cut(entry, count * entry.layout.row_bytes)))
            with self._lock:
                self._index.mark_dirty(self._catalog)
                for entry, count, (stored, held, checksums) in cuts:
                    self._index.changed(entry)
                    # Assignments alone: no interrupt comes between them.
                    entry.rows, entry.stored, entry.held = count, stored, held
                    entry.checksums, entry.tail = checksums, None
                    self._cut_off(entry)

    def resize(self, key: str, rows: int) -> None:
        """Changes how many rows there is room for, by moving the tensor to another extent."""
        self.resize_many({key: rows})

    def resize_many(self, rows: Mapping[str, int]) -> None:
        """Resizes several tensors into one new run. After an error all are as they were."""
        while True:
            with self._exclusive(rows) as entries:
                copies = []
                for entry in entries:
                    count = _row_count(rows[entry.key])
                    shape = entry.layout.shape
                    if not shape or count < entry.rows:
                        raise ValueError(
                            f"{entry.key!r} has {entry.rows} rows: it can't be resized to {count}"
                        )
                    layout = self._layout((count, *shape[1:]), entry.layout.dtype)
                    copies.append(Entry(entry.key, layout, entry.group, 0))
                    copies[-1].footprint = footprint_of(entry.nbytes)
                with self._lock:  # they outgrow what was kept for them: how much says nothing
                    for entry in entries:
                        if entry.rows:
                            self._residency.settle(entry.group)
                with self._operation() as operation:
                    operation.created = copies
                    crowded = self._place(copies, entries, one_run=True)
                    if not crowded:
                        self._move(operation, entries, copies)
                        return
            self._go_direct(crowded)

    def delete(self, key: str) -> None:
        """Forgets a tensor and frees its room."""
        self.delete_many([key])

    def delete_many(self, keys: Iterable[str]) -> None:
        """Forgets several tensors: all of them, or if one is unknown none."""
        keys = list(dict.fromkeys(_key_list(keys)))
        while True:
            self._settle_puts(keys)
            with self._operation() as operation, self._lock:
                if self._puts_of(keys):
                    continue
                entries = self._wait_for(keys, IS_EXCLUSIVE)
                if entries is None:
                    continue
                self._index.mark_dirty(self._catalog)
                operation.doomed = entries
                self._change(operation)
                return

    def __contains__(self, key: object) -> bool:
        self._settle_puts([key] if isinstance(key, str) else [])
        with self._lock:
            self._check_open()
            return key in self._index

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that start with `prefix`, in the order in which they were first stored."""
        self._settle_tickets()
        with self._lock:
            self._check_open()
            return [key for key in list(self._index.entries) if key.startswith(prefix)]

    def info(self, key: str) -> TensorInfo:
        """Shape, dtype, place and path of a tensor."""
        self._settle_puts([key])
        with self._lock:
            self._check_open()
            entry = self._index.find(key)
            return entry.info(self._residency.path_of(entry.group))

    # ---- the store as a whole ---------------------------------------------------------------

    @property
    def memory_budget(self) -> int:
        """Bytes that page-cached tensors may take."""
        return self._residency.budget_bytes

    @property
    def closed(self) -> bool:
        """Whether `close()` was called, or the process forked."""
        return self._state != "open"

    def stats(self) -> dict[str, Any]:
        """Counters and sizes, in bytes where the name says so."""
        self._release_views()
        with self._lock:
            self._check_open()
            extents = self._index.extents
            info = self._device.info
            return {
                "target": info.target,
                "targets": list(info.targets),
                "stripe_bytes": info.stripe_bytes,
                "engine": info.engine,
                "pagecache_engine": info.pagecache_engine,
                "direct": info.direct,
                "fallbacks": list(self._fallbacks),
                "policy": self._residency.policy,
                "verify": self._verify,
                "tensors": len(self._index),
                "operations_active": len(self._operations),
                "corruptions": self._corruptions,
                "total_bytes": extents.total_bytes,
                "free_bytes": extents.free_bytes,
                "largest_free_bytes": extents.largest_free_bytes,
                "free_extents": extents.free_extents,
                "fragmentation": extents.fragmentation,
                "memory_budget_bytes": self._residency.budget_bytes,
                "pagecache_bytes": self._residency.pagecache_bytes,
                "groups": {
                    name: {
                        "path": group.path,
                        "size_bytes": group.size_bytes,
                        "stored_bytes": group.stored_bytes,
                    }
                    for name, group in self._residency.groups.copy().items()
                },
                "residency": self._residency_stats(),
                "paths": self._device.stats(),
            }

    def check(self) -> list[str]:
        """Reads every tensor against its checksums and the extents against the index.

        What is wrong, a sentence each; an empty list when nothing is.
        """
        problems = []
        for key in self.keys():
            try:
                self._check_tensor(key)
            except KeyNotFoundError:
                continue  # deleted meanwhile
            except (CorruptionError, DeviceError) as error:
                problems.append(str(error))
        self._release_views()
        with self._lock:
            self._check_open()
            problems += self._index.check()
        return problems

    def close(self) -> None:
        """Waits for what is under way, saves the index and lets the device go. Idempotent.

        From a signal handler that interrupts an operation of this store in the same thread it
        returns at once, and the store closes when that operation ends.
        """
        if self._here.inside:
            self._here.is_close_due = True
            return
        me = threading.get_ident()
        is_begun = False
        problem: BaseException | None = None
        try:
            with self._lock:
                if self._state != "open":
                    # A signal handler may close what this very thread is closing.
                    by_another = self._closer != me
                    while by_another and self._state in ("closing", "flushing"):
                        self._changed.wait()
                    return
                self._state, self._closer, is_begun = "closing", me, True
            self._here.is_close_due = False
            self._wait_until_idle()
            self._state = "flushing"
            self.flush()
        except BaseException as error:
            if not is_begun:
                raise
            problem = error  # raised below, after the device is closed
        with _core.Bracket(self._catalog.close, self._let_go):
            pass
        if problem is not None:
            raise problem

    def _let_go(self) -> None:
        with contextlib.ExitStack() as stack:  # whatever goes wrong with one, the rest is done
            stack.callback(self._say_closed)
            stack.callback(self._device.close)
            stack.callback(self._stop_threads)
            self._catalog.close()

    def _say_closed(self) -> None:
        with self._lock:
            self._index.forget()
            self._state = "closed"
            self._changed.notify_all()

    def _wait_until_idle(self) -> None:
        while True:
            self._settle_tickets()
            with self._lock:
                if not self._operations:
                    return
                if not self._tickets:
                    self._changed.wait()

    def __enter__(self) -> TensorStore:
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_state", "closed") == "open" and not self._device.closed:
            try:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            finally:
                self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError(
            "a TensorStore can't be copied or pickled: it is the one owner of an open device; open "
            "the store where it is needed, in one process at a time"
        )

    def __repr__(self) -> str:
        return f"<dualblade.TensorStore {self._device.info.target!r} {self._state}>"

    # ---- writing ----------------------------------------------------------------------------

    @inside
    def _start_put(self, arrays: Mapping[str, Any], group: str | None) -> Ticket:
        if not isinstance(arrays, Mapping):
            raise TypeError(f"put_many takes a dict of arrays by key, not {type(arrays).__name__}")
        tensors = {check_name(key): tensor.memory_of(array) for key, array in arrays.items()}
        name = None if group is None else check_name(group)
        operation = Operation()
        memory = [memory for memory, _, _ in tensors.values()]
        completions: list[_core.Completion] = []
        written: list[Written] = []

        def finish(error: BaseException | None) -> None:
            if error is not None:
                raise error
            self._finish_writes(written)
            operation.is_written = True  # so that the end publishes them

        ticket = self._ticket(completions, finish, operation)
        with self._starting(operation, ticket, completions):
            entries = self._create(operation, tensors, name)
            members = zip(entries, memory, strict=True)
            written += self._start_writes(members, completions, operation)
            self._register(operation, ticket, tensors)
        return ticket

    def _ticket(
        self,
        completions: Sequence[_core.Completion],
        finish: Callable[[BaseException | None], Any],
        operation: Operation,
    ) -> Ticket:
        """The ticket of an operation. Whatever thread settles it is inside the operation meanwhile:
        a close() in a signal handler there would wait for itself."""

        def begin() -> None:
            self._here.inside[operation] = None

        return Ticket(completions, finish, partial(self._end_inside, operation), begin)

    def _starting(
        self, operation: Operation, ticket: Ticket, completions: Iterable[_core.Completion]
    ) -> _core.Bracket:
        """After it an operation goes on by its ticket, if that is registered, or has ended."""

        def end() -> None:
            if not self._goes_on(ticket):
                drain(completions)
                self._end(operation)

        return _core.Bracket(lambda: None, end)

    def _create(
        self,
        operation: Operation,
        tensors: Mapping[str, tuple[Any, tuple[int, ...], str]],
        group: str | None,
    ) -> list[Entry]:
        """Entries for a put, which its operation has placed."""
        entries = []
        for key, (_, shape, dtype) in tensors.items():
            layout = self._layout(shape, dtype)
            entry = Entry(key, layout, key if group is None else group, layout.rows)
            entry.stored = layout.nbytes
            entry.footprint = layout.extent_bytes
            entries.append(entry)
        while True:
            self._settle_puts(tensors)
            with self._lock:
                self._check_open()
                if self._puts_of(tensors):
                    continue
                self._operations[operation] = None
                replaced = self._index.replaced_by(tensors)
                if group is None and replaced:
                    groups = {old.key: old.group for old in replaced}
                    for entry in entries:
                        entry.group = groups.get(entry.key, entry.key)
                operation.created = entries
                crowded = self._place(entries, replaced)
                if not crowded:
                    return entries
                self._end(operation)
            self._go_direct(crowded)

    def _place(
        self, entries: Sequence[Entry], replaced: Iterable[Entry] = (), *, one_run: bool = False
    ) -> list[str]:
        """Gives new entries room in place of some; or none, and names who has to go direct before.

        Raises NoSpaceError, and that first: no group goes direct for what has no room anyway.
        """
        self._release_views()
        with self._lock:
            crowded = self._residency.crowded(growth_of(entries, replaced))
            if crowded and self._index.viewed_bytes:
                # These stay where they are, over the budget for as long as they are looked at.
                pinned = self._index.viewed_groups()
                crowded = [group for group in crowded if group not in pinned]
            self._index.mark_dirty(self._catalog)
            self._index.place(entries, self._residency, one_run=one_run)
            if crowded:
                self._index.discard(entries, self._residency)
            else:
                self._keep_freed(entries)
            return crowded

    def _layout(self, shape: tuple[int, ...], dtype: str) -> Layout:
        return layout_of(shape, dtype, self._index.chunk_bytes)

    def _reservation(self, key: Any, shape: Sequence[int], dtype: Any, group: str | None) -> Entry:
        dimensions = tuple(int(operator.index(length)) for length in shape)
        if not dimensions or min(dimensions) < 0:
            raise ValueError(
                f"shape={shape!r} of {key!r}: a reserved tensor has at least one axis, along which "
                f"it grows, and no negative length"
            )
        name = check_name(key)
        layout = self._layout(dimensions, tensor.dtype_tag(dtype))
        return Entry(name, layout, name if group is None else group, 0)

    # ---- reading ----------------------------------------------------------------------------

    @inside
    def _start_get(
        self,
        wanted: Sequence[tuple[str, int | None, int | None, Any]],
        shape_result: Callable[[list[Any]], Any] = lambda arrays: arrays,
        *,
        ahead: bool = False,
    ) -> Ticket:
        keys = [key for key, *_ in wanted]
        operation = Operation()
        entries: list[Entry] = []
        arrays: list[Any] = []
        copies: list[Callable[[], None]] = []
        completions: list[_core.Completion] = []

        def finish(error: BaseException | None) -> Any:
            if error is not None:
                self._raise(error, entries)
            for copy in copies:
                copy()
            return shape_result(arrays)

        ticket = self._ticket(completions, finish, operation)
        with self._starting(operation, ticket, completions):
            entries += self._hold(operation, keys, IS_EXCLUSIVE)
            # What can grow is read as it is at one moment; of the rest the device gets a part while
            # the next is planned.
            part = SUBMIT_REQUESTS if all(map(IS_FULL, entries)) else max(1, len(entries))
            for first in range(0, len(entries), part):
                some = slice(first, first + part)
                plans = self._plan_reads(entries[some], wanted[some], arrays)
                self._start_reads(plans, completions, ahead=ahead)
                for plan in plans.values():
                    copies += plan.finish
            self._register(operation, ticket)
        return ticket

    def _plan_reads(
        self,
        entries: Sequence[Entry],
        wanted: Sequence[tuple[str, int | None, int | None, Any]],
        arrays: list[Any],
    ) -> dict[PathName, ReadPlan]:
        """Plans how entries that the caller holds are read into `arrays`, which it adds to."""
        verify = self._verify == "always" or self._doubts.is_open
        plans = {path: ReadPlan(verify) for path in self._paths}
        with self._lock:
            groups = self._residency.groups
            for entry, (_, start, stop, out) in zip(entries, wanted, strict=True):
                plan = plans[groups[entry.group].path]
                arrays.append(self._plan_read(plan, entry, start, stop, out))
        return plans

    def _plan_read(
        self, plan: ReadPlan, entry: Entry, start: int | None, stop: int | None, out: Any
    ) -> Any:
        """Adds what is wanted of an entry to a plan; the array that it is read into."""
        layout = entry.layout
        shape = layout.shape
        is_whole = start is None and stop is None
        if is_whole and entry.is_full and tensor.takes_bytes(out, shape, layout.dtype):
            plan.add_whole(entry, out)
            return out
        first, last = 0, entry.rows
        if is_whole:
            shape = entry.shape
        else:
            if not shape:
                raise ValueError(f"{entry.key!r} has no axis to read rows of: use get()")
            first, last, _ = slice(start, stop).indices(entry.rows)
            last = max(first, last)
            shape = (last - first, *shape[1:])
        begin, end = first * layout.row_bytes, last * layout.row_bytes
        if out is None:
            memory = memoryview(_core.Buffer(end - begin))
            out = tensor.from_bytes(memory, shape, layout.dtype)
        else:
            memory, _ = tensor.writable_bytes(out, shape, layout.dtype)
        plan.add(entry, begin, end, memory)
        return out

    def _check_tensor(self, key: str) -> None:
        with self._shared(key) as entry:
            for start in range(0, entry.stored, COPY_BYTES):
                self._read_bytes(entry, start, min(start + COPY_BYTES, entry.stored), verify=True)

    # ---- moving the end of a tensor, and the tensor -------------------------------------------

    def _move(self, operation: Operation, entries: list[Entry], copies: list[Entry]) -> None:
        """Puts new entries, with their content, in place of those that the caller has to itself."""
        for entry, copy in zip(entries, copies, strict=True):
            self._copy(entry, copy)
        with self._lock:
            pairs = list(zip(entries, copies, strict=True))
            # Another thread may have put something else in the place of some.
            self._index.discard([copy for entry, copy in pairs if entry.is_dead], self._residency)
            alive = [copy for entry, copy in pairs if not entry.is_dead]
            operation.created, operation.is_written = alive, True
            self._change(operation)


def _row_count(rows: Any) -> int:
    count = int(operator.index(rows))
    if count < 0:
        raise ValueError(f"rows={count}: a number of rows can't be negative")
    return count


def _key_list(keys: Iterable[str]) -> list[str]:
    if isinstance(keys, str):  # would be taken for keys of a character each
        raise TypeError("keys is a str: give a list of keys")
    return list(keys)
