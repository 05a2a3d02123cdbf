"""Who may use an entry when: the counting and waiting under TensorStore.

An operation has one of three kinds of hold on an entry:
  shared      it reads; any number at once
  appending   it writes behind what readers see; one at a time, beside readers
  exclusive   it moves or shortens what is stored, or changes its path; alone
Holds are taken and given back under one lock; nothing waits for I/O with it. A ticket that nobody
has waited for still holds its entries, so whoever must wait for a hold settles the tickets first.
"""

from __future__ import annotations

import collections
import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from dualblade import _core, tensor
from dualblade.catalog import Catalog
from dualblade.entry import Entry
from dualblade.errors import ClosedError, LiveViewError
from dualblade.index import Index
from dualblade.residency import Residency
from dualblade.ticket import Ticket

IS_EXCLUSIVE = operator.attrgetter("is_exclusive")
IS_USED = operator.attrgetter("users")


def is_written(entry: Entry) -> bool:
    """Whether somebody changes it now."""
    return entry.is_exclusive or entry.is_appending


class _Here(threading.local):
    """In which operations of the store this thread is, and whether to close at their end."""

    is_close_due = False

    def __init__(self) -> None:
        self.inside: dict[object, None] = {}


class Operation:
    """What an operation has taken, so that it can be given back whenever an interrupt came."""

    __slots__ = (
        "created", "doomed", "held", "is_appending", "is_exclusive", "is_written", "replaced",
        "ticket", "writes",
    )  # fmt: skip

    def __init__(self, *, is_appending: bool = False, is_exclusive: bool = False) -> None:
        self.held: list[Entry] = []
        self.is_appending = is_appending
        self.is_exclusive = is_exclusive
        self.created: Sequence[Entry] = ()
        """Placed and not yet published; once they are written, they will be."""
        self.is_written = False
        self.replaced: Sequence[Entry] = ()
        self.doomed: Sequence[Entry] = ()
        """About to be removed."""
        self.ticket: Ticket | None = None
        self.writes: Iterable[str] = ()
        """The keys for which the ticket is pending."""


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
        self._operations: dict[Operation, None] = {}
        """Those that are under way."""
        self._tickets: dict[Ticket, None] = {}
        self._pending: dict[str, tuple[Ticket, ...]] = {}
        """Puts and appends under way, by key: whatever is done with the key next waits for them."""
        self._waiting: dict[object, list[str]] = {}
        """Who waits for which keys, the first one first."""
        self._views_gone: collections.deque[Entry] = collections.deque()
        """Entries of which a view has gone; the collector may add to it at any moment."""
        self._views_leaving: list[Entry] = []
        """Of these, those that are being seen to."""
        self._flushing = threading.RLock()
        """One flush at a time: another would take an index for saved that is not yet."""
        self._is_flushing = False
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
        self._flushing = threading.RLock()
        self._is_flushing = False
        self._here = _Here()
        if self._state != "closed":
            self._state = "forked"

    def _inside(self) -> _core.Bracket:
        """A signal handler that closes the store in here would wait for itself, so its close() is
        put off to the end of this."""
        token = object()
        return _core.Bracket(
            partial(operator.setitem, self._here.inside, token, None), partial(self._outside, token)
        )

    def _outside(self, token: object) -> None:
        here = self._here
        here.inside.pop(token, None)
        if here.is_close_due and not here.inside:
            self.close()

    # ---- operations -------------------------------------------------------------------------

    def _puts_of(self, keys: Iterable[str]) -> list[Ticket]:
        """The puts of these keys that are under way: who finds any settles them without the lock
        and looks again."""
        if not self._pending:
            return []
        return [ticket for key in keys for ticket in self._pending.get(key, ())]

    def _settle_puts(self, keys: Iterable[str]) -> None:
        with self._lock:
            self._check_open()
            tickets = self._puts_of(keys)
        for ticket in tickets:
            ticket.settle()

    def _operation(self) -> _core.Bracket:
        """An operation that close() waits for."""
        operation = Operation()
        return _core.Bracket(partial(self._begin, operation), partial(self._end_inside, operation))

    def _begin(self, operation: Operation) -> Operation:
        self._here.inside[operation] = None
        with self._lock:
            self._check_open()
            self._operations[operation] = None
        return operation

    def _end_inside(self, operation: Operation) -> None:
        self._end(operation)
        self._outside(operation)

    def _end(self, operation: Operation) -> None:
        """Finishes or takes back what an operation has begun. It can be done again if it was cut
        short, and does nothing the second time."""
        with self._lock:
            self._change(operation)
            self._index.release(
                operation.held,
                self._residency,
                is_appending=operation.is_appending,
                is_exclusive=operation.is_exclusive,
            )
            ticket = operation.ticket
            if ticket is not None:
                self._tickets.pop(ticket, None)
                for key in operation.writes:
                    tickets = self._pending.pop(key, ())
                    if tickets != (ticket,):
                        others = tuple(each for each in tickets if each is not ticket)
                        if others:
                            self._pending[key] = others
            self._operations.pop(operation, None)
            self._changed.notify_all()

    def _change(self, operation: Operation) -> None:
        """Publishes what is written, discards what is not, removes what is to go."""
        with self._lock:
            created, doomed = operation.created, operation.doomed
            if created and operation.is_written:
                if not operation.replaced:
                    new = set(created)
                    keys = {entry.key: entry for entry in created}
                    operation.replaced = [
                        old for old in self._index.replaced_by(keys) if old not in new
                    ]
                self._index.publish(created, operation.replaced, self._residency)
            elif created:
                self._index.discard(created, self._residency)
            operation.created = ()
            if doomed:
                self._index.remove(doomed, self._residency)
                operation.doomed = ()

    def _register(self, operation: Operation, ticket: Ticket, writes: Iterable[str] = ()) -> None:
        with self._lock:
            self._changed.notify_all()
            operation.writes = writes
            operation.ticket = ticket
            for key in writes:
                self._pending[key] = (*self._pending.get(key, ()), ticket)
            self._tickets[ticket] = None
        self._settle_done(ticket)

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
    ) -> list[Entry] | None:
        """The entries of these keys, once none is taken. The lock is held, and waits release it.
        None if a put or an append of one was started meanwhile, which has to be settled first.

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
                if self._puts_of(keys):
                    return None
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

    def _hold(
        self,
        operation: Operation,
        keys: Iterable[str],
        is_taken: Callable[[Entry], bool],
        *,
        in_turn: bool = False,
    ) -> list[Entry]:
        """Takes hold of the entries of these keys, for an operation that is ended in any case."""
        keys = list(keys)
        while True:
            with self._lock:
                self._check_open()
                if not self._puts_of(keys):
                    self._operations[operation] = None
                    entries = self._wait_for(keys, is_taken, in_turn=in_turn)
                    if entries is not None:
                        self._take(operation, entries)
                        return entries
            self._settle_puts(keys)

    @staticmethod
    def _take(operation: Operation, entries: Iterable[Entry]) -> None:
        held = operation.held
        for entry in entries:
            # All at once, with the call into C.
            entry.users += 1
            if operation.is_exclusive:
                entry.is_exclusive = True  # from here on nobody else begins
            elif operation.is_appending:
                entry.is_appending = True
            held.append(entry)

    def _shared(self, key: str) -> _core.Bracket:
        operation = Operation()

        def begin() -> Entry:
            self._here.inside[operation] = None
            (entry,) = self._hold(operation, [key], IS_EXCLUSIVE)
            return entry

        return _core.Bracket(begin, partial(self._end_inside, operation))

    def _appending(self, keys: Iterable[str]) -> _core.Bracket:
        operation = Operation(is_appending=True)

        def begin() -> list[Entry]:
            self._here.inside[operation] = None
            return self._hold(operation, keys, is_written)

        return _core.Bracket(begin, partial(self._end_inside, operation))

    def _idle(
        self, group: str, entries: Sequence[Entry], in_use: Callable[[Entry], object]
    ) -> _core.Bracket:
        """All entries of a group, exclusively, as the operation that holds them; or None if they
        are not all, or one is `in_use`. Who uses one without being that goes on."""
        operation = Operation(is_exclusive=True)

        def begin() -> Operation | None:
            self._here.inside[operation] = None
            with self._lock:
                self._check_open()
                bound = self._residency.groups.get(group)
                if (
                    bound is None
                    or bound.tensors != len(entries)
                    or any(
                        in_use(entry) or entry.is_dead or entry.group != group for entry in entries
                    )
                    or self._puts_of([entry.key for entry in entries])
                ):
                    return None
                self._operations[operation] = None
                self._take(operation, entries)
                return operation

        return _core.Bracket(begin, partial(self._end_inside, operation))

    def _share(self, operation: Operation) -> None:
        """Others may read and append from now on, but not move or shorten what it holds."""
        with self._lock:
            operation.is_exclusive = False
            for entry in operation.held:
                entry.is_exclusive = False
            self._changed.notify_all()

    def _settle_finished(self) -> None:
        """Gives back the holds of tickets that are done, for which nobody has waited."""
        with self._lock:
            tickets = list(self._tickets)
        for ticket in tickets:
            if ticket.done():
                ticket.settle()

    def _exclusive(self, keys: Iterable[str]) -> _core.Bracket:
        operation = Operation(is_exclusive=True)

        def begin() -> list[Entry]:
            self._here.inside[operation] = None
            self._release_views()
            entries = self._hold(operation, dict.fromkeys(keys), IS_EXCLUSIVE, in_turn=True)
            self._wait_for_others(entries)
            return entries

        return _core.Bracket(begin, partial(self._end_inside, operation))

    def _wait_for_others(self, entries: Iterable[Entry]) -> None:
        """Returns when nobody but the caller uses these entries. LiveViewError: views are not
        waited for."""
        while True:
            self._settle_tickets()
            self._release_views()
            with self._lock:
                refuse_views(entries)
                if all(entry.users == 1 for entry in entries):
                    return
                # A read that was just being started may have registered its ticket by now.
                if not self._tickets:
                    self._changed.wait()

    # ---- views --------------------------------------------------------------------------------

    def _release_views(self) -> None:
        """Frees what views have kept, that are gone."""
        if not self._views_gone and not self._views_leaving:
            return
        with self._lock:
            gone, leaving = self._views_gone, self._views_leaving
            # One call into C: an interrupt finds each entry in one of the two.
            leaving.extend(map(collections.deque.popleft, itertools.repeat(gone, len(gone))))
            self._index.release_views(leaving, self._residency)
            self._changed.notify_all()


def check_name(name: Any) -> str:
    """A key or the name of a group, as a plain str: what a subclass shows is not what it is."""
    if type(name) is str and name.isascii():
        return name
    if not isinstance(name, str):
        raise TypeError(f"a key or group is a str, not {type(name).__name__}: {name!r}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the key or group {name!r} is not valid Unicode") from None
    return str.__str__(name)


def refuse_views(entries: Iterable[Entry]) -> None:
    """Raises LiveViewError if an entry has views."""
    for entry in entries:
        if entry.views:
            raise LiveViewError(
                f"{entry.key!r} has live views ({entry.views}), so that its bytes must stay as "
                f"they are: let go of the arrays that view({entry.key!r}) returned, or copy them"
            )


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
