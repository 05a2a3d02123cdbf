"""Who may use an entry when: the counting and waiting under TensorStore.

An operation has one of three kinds of hold on an entry:
  shared      it reads; any number at once
  appending   it writes behind what readers see; one at a time, beside readers
  exclusive   it moves or shortens what is stored, or changes its path; alone
Holds are taken and given back under one lock; nothing waits for I/O with it. A ticket that nobody
has waited for still holds its entries, so whoever must wait for a hold settles the tickets first.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dualblade import tensor
from dualblade.catalog import Catalog
from dualblade.entry import Entry
from dualblade.errors import ClosedError
from dualblade.index import Index
from dualblade.residency import Residency
from dualblade.ticket import Ticket

IS_EXCLUSIVE = operator.attrgetter("is_exclusive")


class _Here(threading.local):
    """How deep in operations of the store this thread is, and whether to close at its end."""

    depth = 0
    is_close_due = False


def inside(method: Callable[..., Any]) -> Callable[..., Any]:
    """Marks the part of an operation that close() must not wait for in the same thread."""

    @functools.wraps(method)
    def marked(self: EntryAccess, *arguments: Any, **options: Any) -> Any:
        with self._inside():
            return method(self, *arguments, **options)

    return marked


class EntryAccess:
    """The lock, the state and the holds of a store."""

    close: Callable[[], None]
    """The store's: it knows what to do once nothing is under way."""

    def __init__(self, index: Index, catalog: Catalog, residency: Residency) -> None:
        self._index = index
        self._catalog = catalog
        self._residency = residency
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._state = "open"
        self._closer = 0
        self._active = 0
        self._tickets: dict[Ticket, None] = {}
        self._pending: dict[str, tuple[Ticket, ...]] = {}
        """Puts under way, by key: whatever is done with the key next waits for them."""
        self._waiting: dict[object, list[str]] = {}
        """Who waits for which keys, the first one first."""
        self._flushing = threading.Lock()
        """One flush at a time: another would take an index for saved that is not yet."""
        self._here = _Here()

    # ---- open or not ------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._state == "open":
            return
        if self._state == "flushing" and self._closer == threading.get_ident():
            return
        if self._state == "forked":
            raise ClosedError("the store was opened before a fork: open it in one process only")
        raise ClosedError("the store is closed")

    def forget_after_fork(self) -> None:
        """In the child after a fork: the store is the parent's, and its locks may be held there."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._flushing = threading.Lock()
        self._here = _Here()
        if self._state != "closed":
            self._state = "forked"

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """A signal handler that closes the store in here would wait for itself, so its close() is
        put off to the end of this."""
        here = self._here
        here.depth += 1
        try:
            yield
        finally:
            here.depth -= 1
            if here.is_close_due and here.depth == 0:
                here.is_close_due = False
                self.close()

    # ---- operations -------------------------------------------------------------------------

    @contextmanager
    def _settled(self, keys: Iterable[str]) -> Iterator[None]:
        """Holds the lock, at a moment at which no put of these keys is under way."""
        keys = list(keys)
        while True:
            with self._lock:
                self._check_open()
                tickets = self._puts_of(keys)
                if not tickets:
                    yield
                    return
            for ticket in tickets:
                ticket.settle()

    def _puts_of(self, keys: Iterable[str]) -> list[Ticket]:
        if not self._pending:
            return []
        return [ticket for key in keys for ticket in self._pending.get(key, ())]

    @contextmanager
    def _operation(self, keys: Iterable[str]) -> Iterator[None]:
        """`_settled`, as an operation that close() waits for."""
        with self._inside(), self._settled(keys):
            self._active += 1
            try:
                yield
            finally:
                self._leave()

    @contextmanager
    def _starting(self, keys: Iterable[str]) -> Iterator[None]:
        """`_operation`, but one that goes on afterwards: `_leave` is the caller's to call then."""
        with self._settled(keys):
            self._active += 1
            try:
                yield
            except BaseException:
                self._leave()
                raise

    def _leave(self) -> None:
        with self._lock:
            self._active -= 1
            self._changed.notify_all()

    def _register(self, ticket: Ticket, writes: Iterable[str] = ()) -> None:
        with self._lock:
            self._changed.notify_all()
            for key in writes:
                self._pending[key] = (*self._pending.get(key, ()), ticket)
            self._tickets[ticket] = None
        self._settle_done(ticket)

    def _unregister(self, ticket: Ticket, writes: Iterable[str] = ()) -> None:
        with self._lock:
            self._tickets.pop(ticket, None)
            for key in writes:
                tickets = self._pending.pop(key, ())
                if len(tickets) > 1:
                    self._pending[key] = tuple(each for each in tickets if each is not ticket)
            self._leave()

    def _goes_on(self, ticket: Ticket) -> bool:
        """Whether a ticket was registered before the interrupt that is being handled came."""
        with self._lock:
            return ticket in self._tickets

    def _settle_done(self, newest: Ticket) -> None:
        """Lets go of the arrays of those that nobody waits for, as they get done."""
        while True:
            with self._lock:
                oldest = next(iter(self._tickets), newest)
            if oldest is newest or not oldest.done():
                return
            oldest.settle()

    def _settle_tickets(self) -> None:
        """Finishes what nobody has waited for; errors stay with the tickets."""
        with self._lock:
            tickets = list(self._tickets)
        for ticket in tickets:
            ticket.settle()

    # ---- holds on entries ---------------------------------------------------------------------

    def _wait_for(
        self, keys: Iterable[str], is_taken: Callable[[Entry], bool], *, in_turn: bool = False
    ) -> list[Entry]:
        """The entries of these keys, once none is taken. The lock is held, and waits release it.

        `in_turn` lets those go first who waited before: an exclusive hold can be taken again as
        soon as it is given back, before anybody else has woken up.
        """
        keys = list(keys)
        me = object()
        try:
            while True:
                entries = self._index.find_all(keys)
                taken = any(map(is_taken, entries))
                if not taken and not (in_turn and self._is_behind(me, keys)):
                    return entries
                self._waiting.setdefault(me, keys)
                self._changed.wait()
        finally:
            self._waiting.pop(me, None)

    def _is_behind(self, me: object, keys: Iterable[str]) -> bool:
        """Whether somebody who came before waits for one of these keys."""
        wanted = set(keys)
        for other, others_keys in self._waiting.items():
            if other is me:
                return False
            if not wanted.isdisjoint(others_keys):
                return True
        return False

    def _release(self, entries: Iterable[Entry]) -> None:
        with self._lock:
            self._index.release(entries, self._residency)
            self._changed.notify_all()

    @contextmanager
    def _shared(self, key: str) -> Iterator[Entry]:
        with self._inside():
            with self._starting([key]):
                (entry,) = self._wait_for([key], IS_EXCLUSIVE)
                entry.users += 1
            try:
                yield entry
            finally:
                self._release([entry])
                self._leave()

    @contextmanager
    def _appending(self, keys: Iterable[str]) -> Iterator[list[Entry]]:
        with self._inside():
            with self._starting(keys):
                entries = self._wait_for(
                    keys, lambda entry: entry.is_exclusive or entry.is_appending
                )
                for entry in entries:
                    entry.users += 1
                    entry.is_appending = True
            try:
                yield entries
            finally:
                with self._lock:
                    for entry in entries:
                        entry.is_appending = False
                    self._release(entries)
                    self._leave()

    @contextmanager
    def _exclusive(self, keys: Iterable[str]) -> Iterator[list[Entry]]:
        with self._inside():
            keys = list(dict.fromkeys(keys))
            with self._starting(keys):
                entries = self._wait_for(keys, IS_EXCLUSIVE, in_turn=True)
                for entry in entries:
                    entry.users += 1
                    entry.is_exclusive = True  # from here on nobody else begins
            try:
                self._wait_for_others(entries)
                yield entries
            finally:
                with self._lock:
                    for entry in entries:
                        entry.is_exclusive = False
                    self._release(entries)
                    self._leave()

    def _wait_for_others(self, entries: Iterable[Entry]) -> None:
        """Returns when nobody but the caller uses these entries."""
        while True:
            self._settle_tickets()
            with self._lock:
                if all(entry.users == 1 for entry in entries):
                    return
                # A read that was just being started may have registered its ticket by now.
                if not self._tickets:
                    self._changed.wait()


def rows_of(entries: Iterable[Entry], rows: Mapping[str, Any]) -> list[tensor.Tensor]:
    """The rows to be appended to each entry, as bytes. ValueError, TypeError if they don't fit."""
    parts = []
    for entry in entries:
        layout = entry.layout
        if not layout.shape:
            raise ValueError(f"{entry.key!r} has no axis to append along")
        part = tensor.as_rows(rows[entry.key], layout.shape[1:], layout.dtype)
        if entry.rows + part.shape[0] > layout.rows:
            raise ValueError(
                f"{entry.key!r} has {entry.rows} of {layout.rows} rows: there is no room for "
                f"{part.shape[0]} more; resize it first"
            )
        parts.append(part)
    return parts
