"""The durable index of a store: which tensor lies where, in one SQLite file beside the store.

One process writes it and nobody else reads it, so SQLite runs in exclusive WAL mode: a commit is
one append and one fsync, no shared memory file is needed (so it works on any filesystem), and
close() folds everything back into the one file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import sqlite3
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dualblade._core import Bracket, checksum
from dualblade.errors import (
    ClosedError,
    CorruptionError,
    DeviceError,
    DeviceRefusedError,
    DualbladeError,
    UnsupportedError,
    device_error,
)

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x44424C44  # "DBLD", so that file(1) and we can tell it from other databases
_Operation = Literal["create", "open", "read", "write"]
_SIDECARS = ("", "-wal", "-shm", "-journal")

_SCHEMA = """
CREATE TABLE store (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    store_id TEXT NOT NULL,
    clean INTEGER NOT NULL
);
CREATE TABLE tensor (
    key TEXT PRIMARY KEY NOT NULL,
    dtype TEXT NOT NULL,
    shape TEXT NOT NULL,        -- JSON: the capacity, rows first
    rows INTEGER NOT NULL,      -- of them, how many hold data
    offset INTEGER NOT NULL,    -- of the extent, in bytes on the device
    length INTEGER NOT NULL,
    stored_bytes INTEGER NOT NULL,
    checksums BLOB NOT NULL,    -- one uint64, little-endian, for each chunk
    group_name TEXT NOT NULL,
    path TEXT NOT NULL,         -- the one last used: a hint
    digest BLOB NOT NULL        -- of all the columns above: SQLite's pages have no checksums
);
"""
_COLUMNS = "key, dtype, shape, rows, offset, length, stored_bytes, checksums, group_name, path"
_UPSERT = f"""
INSERT INTO tensor ({_COLUMNS}, digest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET dtype = excluded.dtype, shape = excluded.shape,
    rows = excluded.rows, offset = excluded.offset, length = excluded.length,
    stored_bytes = excluded.stored_bytes, checksums = excluded.checksums,
    group_name = excluded.group_name, path = excluded.path, digest = excluded.digest
"""


class Record(NamedTuple):
    """One tensor."""

    key: str
    dtype: str
    """A dtype tag."""
    shape: tuple[int, ...]
    """The capacity: of a reserved tensor, rows that hold no data yet included."""
    rows: int
    """How many of the first dimension's rows hold data; 1 for a tensor without dimensions."""
    offset: int
    """Where its extent begins, in bytes on the device."""
    length: int
    """Bytes of the extent."""
    stored_bytes: int
    """Bytes of data on the device, from the extent's beginning on."""
    checksums: bytes
    """A uint64 for each chunk, little-endian: numpy.frombuffer(checksums, "<u8")."""
    group: str
    path: str
    """ "direct" or "pagecache": the path it was last reached on."""


def catalog_path(target: str | os.PathLike[str], kind: str, store_id: str) -> Path:
    """Where the catalog of a store lies: beside a "file", in the state directory for a "block".

    The state directory is $DUALBLADE_STATE_DIR, else /var/lib/dualblade for root and
    $XDG_STATE_HOME/dualblade (~/.local/state/dualblade) for others. Nothing is created.
    """
    if kind == "file":
        # Beside the file itself, not beside a link to it: any name finds the same catalog.
        return Path(os.path.realpath(target) + ".catalog")
    return _state_directory() / f"{store_id}.catalog"


def _state_directory() -> Path:
    chosen = os.environ.get("DUALBLADE_STATE_DIR")
    if chosen:
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/lib/dualblade")
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "dualblade"


class Catalog:
    """The index of one store. Not locked: the caller calls it from one thread at a time."""

    clean: bool
    """Whether the store was closed in order the last time, as found when this was opened."""

    def __init__(self, path: str | os.PathLike[str], connection: sqlite3.Connection) -> None:
        self.path = Path(path)
        self.clean = True
        self._connection: sqlite3.Connection | None = connection
        self._pid = os.getpid()
        _open_catalogs.add(self)

    @classmethod
    def create(cls, path: str | os.PathLike[str], store_id: str) -> Catalog:
        """A new, empty catalog in place of whatever has its name; directories are made 0700.

        Raises DeviceError if the filesystem refuses. That nobody uses it is for the caller to see
        to, who has the device locked.
        """
        path = Path(path)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for suffix in _SIDECARS:
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            # Made here and not by SQLite, so that nobody else can read it even for a moment.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
            _sync_directory(path.parent)
        except OSError as error:
            raise device_error(
                error.errno or errno.EIO, device=path, operation="create the catalog"
            ) from error
        catalog = cls(path, _connect(path))
        with catalog._closed_on_failure(), catalog._errors("create") as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # kept in the file
            connection.execute("PRAGMA synchronous = FULL")
        with (
            catalog._closed_on_failure(),
            catalog._errors("write") as connection,
            catalog._transaction(connection),
        ):
            # executescript() would commit the transaction that it finds open.
            for statement in filter(str.strip, _SCHEMA.split(";\n")):
                connection.execute(statement)
            connection.execute("INSERT INTO store VALUES (1, ?, 1)", (store_id,))
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
        return catalog

    @classmethod
    def open(cls, path: str | os.PathLike[str], store_id: str) -> Catalog:
        """The catalog of this store.

        Raises DeviceError (ENOENT) if there is none, DeviceRefusedError if it belongs to another
        store or is in use, CorruptionError if it is damaged, UnsupportedError for another version.
        """
        path = Path(path)
        if not path.is_file():
            raise DeviceError(
                errno.ENOENT,
                f"the catalog {path} of store {store_id} does not exist: it was deleted, or left "
                "behind when the store was moved. Put it back, or format the store anew, which "
                "loses what is stored",
                os.fspath(path),
                device=os.fspath(path),
                operation="open the catalog",
            )
        catalog = cls(path, _connect(path))
        with catalog._closed_on_failure(), catalog._errors("open") as connection:
            catalog.clean = _check_identity(connection, path, store_id)
            connection.execute("PRAGMA synchronous = FULL")
        return catalog

    def records(self) -> Iterator[Record]:
        """Every tensor, in the order in which they were first stored."""
        with self._errors("read") as connection:
            rows = connection.execute(
                f"SELECT {_COLUMNS}, digest FROM tensor ORDER BY rowid"
            ).fetchall()
        return (_record(row, self.path) for row in rows)

    def commit(self, upserts: Iterable[Record], deletes: Iterable[str], *, clean: bool) -> None:
        """Deletes, then stores or replaces: all of it or, if the process dies, nothing.

        When it returns, the change is on the medium. clean says whether the store's data is, too.
        """
        with self._errors("write") as connection, self._transaction(connection):
            connection.executemany("DELETE FROM tensor WHERE key = ?", ((key,) for key in deletes))
            connection.executemany(_UPSERT, map(_row, upserts))
            connection.execute("UPDATE store SET clean = ?", (int(clean),))
            connection.execute("COMMIT")

    def mark_dirty(self) -> None:
        """Says that the store is in use and has changed since the last commit; one fsync."""
        with self._errors("write") as connection, self._transaction(connection):
            connection.execute("UPDATE store SET clean = 0")
            connection.execute("COMMIT")

    def close(self) -> None:
        """Folds the write-ahead log into the file. Twice is fine; after a fork it does nothing."""
        if self._connection is not None and os.getpid() == self._pid:
            self._connection.close()
        self._connection = None  # last: after an interrupt it is closed once more

    def abandon(self) -> None:
        """In the child after a fork: the connection is the parent's, and never to be closed here.

        To SQLite the child would be its last user, at the interpreter's exit at the latest: it
        would fold the log back and delete it while the parent is writing to it. One reference too
        many is what keeps a connection open for good.
        """
        if self._connection is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))

    def __enter__(self) -> Catalog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _errors(self, operation: _Operation) -> Iterator[sqlite3.Connection]:
        if self._connection is None:
            raise ClosedError(f"the catalog {self.path} is closed; open the store again")
        if os.getpid() != self._pid:
            raise ClosedError(
                f"the catalog {self.path} was opened before a fork and this is the child process; "
                "open the store again in the child"
            )
        try:
            yield self._connection
        except sqlite3.Error as error:
            # The narrower classes are mistakes of the caller, not of the file.
            if type(error) not in (sqlite3.DatabaseError, sqlite3.OperationalError):
                raise
            raise _translated(error, self.path, operation) from error
        except UnicodeDecodeError as error:
            # SQLite's message about a damaged schema quotes the damage.
            if operation == "write":
                raise
            raise _translated(error, self.path, operation) from error

    @staticmethod
    def _transaction(connection: sqlite3.Connection) -> Bracket:
        """What is not committed at its end is rolled back, whatever interrupts it."""

        def roll_back() -> None:
            # After some errors (a full disk) SQLite has done so already.
            if connection.in_transaction:
                connection.execute("ROLLBACK")

        return Bracket(functools.partial(connection.execute, "BEGIN IMMEDIATE"), roll_back)

    @contextlib.contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


_open_catalogs: weakref.WeakSet[Catalog] = weakref.WeakSet()


def _abandon_after_fork() -> None:
    for catalog in list(_open_catalogs):
        catalog.abandon()


os.register_at_fork(after_in_child=_abandon_after_fork)


def _sync_directory(path: Path) -> None:
    """Makes a new file's name durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _connect(path: Path) -> sqlite3.Connection:
    connection = None
    try:
        connection = sqlite3.connect(
            path,
            timeout=0,  # a lock is held as long as the other store is open: waiting won't help
            isolation_level=None,  # transactions are begun and ended here, in the open
            check_same_thread=False,
        )
        # Before the file is first read: in WAL mode, this is what does without shared memory.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise _translated(error, path, "open") from error
    return connection


def _check_identity(connection: sqlite3.Connection, path: Path, store_id: str) -> bool:
    """Whether it was left clean; raises if it is not this store's or not one that we can read."""
    # Up to here a file that is not ours is only read.
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION_ID:
        raise DeviceRefusedError(
            f"{path} is not a catalog of dualblade; move it away, then open the store again"
        )
    if version != SCHEMA_VERSION:
        raise UnsupportedError(
            f"the catalog {path} has schema version {version}; this dualblade reads "
            f"{SCHEMA_VERSION}: use the release that wrote it, or format the store anew"
        )
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise _translated(sqlite3.DatabaseError(verdict), path, "open")
    row = connection.execute("SELECT store_id, clean FROM store").fetchone()
    if row is None:
        raise _translated(sqlite3.DatabaseError("it names no store"), path, "open")
    if row[0] != store_id:
        raise DeviceRefusedError(
            f"the catalog {path} belongs to store {row[0]}, not to {store_id}: the device was "
            "formatted or replaced since; restore the catalog that belongs to it, or format the "
            "store anew"
        )
    return bool(row[1])


def _row(record: Record) -> tuple[object, ...]:
    row = (record[0], record[1], _shape_as_text(record[2]), *record[3:])
    return (*row, _digest(row))


def _record(row: tuple[Any, ...], path: Path) -> Record:
    if _digest(row[:-1]) != row[-1]:
        raise _translated(
            sqlite3.DatabaseError(f"the entry of {row[0]!r} does not match its checksum"),
            path,
            "read",
        )
    key, dtype, shape, rows, offset, length, stored_bytes, checksums, group, last_path, _ = row
    shape = _shape_of_text(shape)
    return Record(
        key, dtype, shape, rows, offset, length, stored_bytes, checksums, group, last_path
    )


# The tensors of a store come in few shapes.


@functools.lru_cache(maxsize=1024)
def _shape_as_text(shape: tuple[int, ...]) -> str:
    return json.dumps(shape)


@functools.lru_cache(maxsize=1024)
def _shape_of_text(text: str) -> tuple[int, ...]:
    return tuple(json.loads(text))


def _digest(row: tuple[object, ...]) -> bytes:
    return checksum(repr(row).encode()).to_bytes(8, "little")


# SQLite's own words for its result codes, which Python before 3.11 does not pass on.
_ERRNO_OF: tuple[tuple[str, int], ...] = (
    ("full", errno.ENOSPC),
    ("disk I/O error", errno.EIO),
    ("readonly", errno.EROFS),
    ("unable to open", errno.EACCES),
    ("out of memory", errno.ENOMEM),
)


def _why_not_opened(path: Path) -> int:
    """The errno of a file that SQLite could not open, which it keeps to itself."""
    descriptors: list[int] = []
    try:
        while len(descriptors) < 4:  # the file, its log, its journal and its directory
            # Never the file itself: closing it would let go of the locks that SQLite has on it.
            descriptors.append(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return errno.EACCES


def _translated(error: Exception, path: Path, operation: _Operation) -> DualbladeError:
    text = str(error)
    if "locked" in text:
        return DeviceRefusedError(
            errno.EBUSY,
            f"the catalog {path} is in use by another process; one process at a time can use a "
            "store: close it there first",
            os.fspath(path),
        )
    for words, number in _ERRNO_OF:
        if words in text:
            why = _why_not_opened(path) if number == errno.EACCES else number
            return device_error(why, device=path, operation=f"{operation} the catalog")
    return CorruptionError(
        f"the catalog {path} is damaged ({text}): restore it from a backup together with the "
        "store, or format the store anew, which loses what is stored"
    )
