"""The catalog: what was committed is there again, all of it or nothing, and only for its store."""

import ctypes
import functools
import inspect
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualblade.catalog import Catalog, Record, catalog_path
from dualblade.errors import (
    ClosedError,
    CorruptionError,
    DeviceError,
    DeviceRefusedError,
    UnsupportedError,
)

STORE = "00112233445566778899aabbccddeeff"
OTHER = "ffeeddccbbaa99887766554433221100"


def record(key, **changes):
    usual = Record(
        key=key,
        dtype="float16",
        shape=(128, 8, 64),
        rows=100,
        offset=1 << 20,
        length=131072,
        stored_bytes=102400,
        checksums=(7).to_bytes(8, "little"),
        group="layer.0",
        path="direct",
    )
    return usual._replace(**changes)


sizes = st.integers(0, 2**63 - 1)
records = st.builds(
    Record,
    key=st.text(),
    dtype=st.text(max_size=20),
    shape=st.lists(sizes, max_size=4).map(tuple),
    rows=sizes,
    offset=sizes,
    length=sizes,
    stored_bytes=sizes,
    checksums=st.binary(max_size=100),
    group=st.text(max_size=10),
    path=st.sampled_from(["direct", "pagecache"]),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "kv.img.catalog"


def reopened(path, store=STORE):
    with Catalog.open(path, store) as catalog:
        return list(catalog.records())


# ---- what was committed is there ----------------------------------------------------------------


def test_a_new_catalog_is_empty_clean_and_private(tmp_path):
    path = tmp_path / "state" / "dualblade" / "x.catalog"
    with Catalog.create(path, STORE) as catalog:
        catalog.commit([record("a")], [], clean=False)
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["x.catalog"]


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.lists(records, max_size=4, unique_by=lambda r: r.key), st.sets(st.integers(0, 9))
        ),
        max_size=4,
    )
)
def test_commits_add_up_to_what_a_dict_holds(tmp_path_factory, commits):
    path = tmp_path_factory.mktemp("catalog") / "c"
    model = {}
    with Catalog.create(path, STORE) as catalog:
        for upserts, positions in commits:
            deletes = [key for place, key in enumerate(model) if place in positions]
            catalog.commit(upserts, deletes, clean=True)
            for key in deletes:
                del model[key]
            model.update({each.key: each for each in upserts})
            assert {each.key: each for each in catalog.records()} == model
    assert {each.key: each for each in reopened(path)} == model


def test_ten_thousand_tensors_come_back_in_order(path):
    many = [
        record(f"layer.{n % 32}/token.{n}", offset=n * 4096, checksums=os.urandom(8 * (n % 40)))
        for n in range(10_000)
    ]
    with Catalog.create(path, STORE) as catalog:
        catalog.commit(many, [], clean=True)
        # Replacing one does not move it.
        many[5] = many[5]._replace(rows=101)
        catalog.commit([many[5]], [], clean=True)
    assert reopened(path) == many


def test_deletes_come_before_upserts(path):
    with Catalog.create(path, STORE) as catalog:
        catalog.commit([record("a", rows=1)], [], clean=True)
        catalog.commit([record("a", rows=2)], ["a", "no such key"], clean=True)
        assert [each.rows for each in catalog.records()] == [2]


def test_records_may_be_read_while_the_catalog_changes(path):
    with Catalog.create(path, STORE) as catalog:
        catalog.commit([record("a"), record("b")], [], clean=True)
        found = catalog.records()
        catalog.commit([record("c")], ["a", "b"], clean=True)
        assert [each.key for each in found] == ["a", "b"]


def test_a_commit_that_fails_changes_nothing(path):
    def upserts():
        yield record("b")
        raise RuntimeError("half way")

    with Catalog.create(path, STORE) as catalog:
        catalog.commit([record("a")], [], clean=True)
        with pytest.raises(RuntimeError, match="half way"):
            catalog.commit(upserts(), ["a"], clean=False)
        with pytest.raises(OverflowError):
            catalog.commit([record("c"), record("d", offset=1 << 63)], ["a"], clean=False)
        with pytest.raises(ValueError, match="surrogates"):
            catalog.commit([record("\ud800")], ["a"], clean=False)
        catalog.commit([record("e")], [], clean=True)
    assert [each.key for each in reopened(path)] == ["a", "e"]


def test_clean_is_reported_as_it_was_left(path):
    def found_clean():
        with Catalog.open(path, STORE) as catalog:
            return catalog.clean

    with Catalog.create(path, STORE) as catalog:
        assert catalog.clean
    assert found_clean()
    with Catalog.open(path, STORE) as catalog:
        catalog.mark_dirty()
        assert catalog.clean, "it tells how it was found"
    assert not found_clean()
    with Catalog.open(path, STORE) as catalog:
        catalog.commit([], [], clean=False)
    assert not found_clean()
    with Catalog.open(path, STORE) as catalog:
        catalog.commit([], [], clean=True)
    assert found_clean()


def test_any_thread_may_call_it(path):
    with Catalog.create(path, STORE) as catalog:
        thread = threading.Thread(
            target=catalog.commit, args=([record("a")], []), kwargs={"clean": 1}
        )
        thread.start()
        thread.join()
        assert [each.key for each in catalog.records()] == ["a"]


# ---- what is not ours, or damaged ---------------------------------------------------------------


def test_a_catalog_of_another_store_is_refused(path):
    Catalog.create(path, OTHER).close()
    with pytest.raises(DeviceRefusedError, match=f"belongs to store {OTHER}, not to {STORE}"):
        Catalog.open(path, STORE)
    assert reopened(path, OTHER) == []


def test_creating_replaces_what_was_there(path):
    with Catalog.create(path, OTHER) as catalog:
        catalog.commit([record("old")], [], clean=True)
    path.with_name(path.name + "-wal").write_bytes(b"left over")
    with Catalog.create(path, STORE) as catalog:
        catalog.commit([record("new")], [], clean=True)
    assert [each.key for each in reopened(path)] == ["new"]


def test_no_catalog_is_an_error_and_makes_none(path):
    with pytest.raises(DeviceError, match="does not exist") as caught:
        Catalog.open(path, STORE)
    assert caught.value.filename == str(path)
    assert not path.exists()


def test_a_strange_database_is_refused_and_left_alone(path):
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE thesis (chapter TEXT)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(DeviceRefusedError, match="not a catalog of dualblade"):
        Catalog.open(path, STORE)
    assert path.read_bytes() == before


def test_another_schema_version_is_named(path):
    Catalog.create(path, STORE).close()
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA user_version = 9")
    raw.close()
    with pytest.raises(UnsupportedError, match="schema version 9"):
        Catalog.open(path, STORE)


@pytest.mark.parametrize("damage", ["text", "empty", "half", "zeros"])
def test_a_damaged_file_is_corrupt_and_says_what_to_do(path, damage):
    with Catalog.create(path, STORE) as catalog:
        catalog.commit([record(f"key {n}") for n in range(500)], [], clean=True)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "text": b"this is no database at all " * 300,
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "zeros": whole[:4096] + bytes(8192) + whole[12288:],
        }[damage]
    )
    with pytest.raises((CorruptionError, DeviceRefusedError), match=r"restore|move it away"):
        reopened(path)


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_seen_or_harmless(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("catalog") / "c"
    wanted = [record(f"key {n}", checksums=bytes([n]) * 16) for n in range(40)]
    with Catalog.create(path, STORE) as catalog:
        catalog.commit(wanted, [], clean=True)
    whole = bytearray(path.read_bytes())
    whole[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(whole)
    try:
        found = reopened(path)
    except (CorruptionError, DeviceRefusedError, UnsupportedError, DeviceError):
        return
    assert found == wanted


def test_one_process_at_a_time(path):
    with Catalog.create(path, STORE) as catalog:
        catalog.mark_dirty()
        code = (
            f"import sys; sys.path[:0] = {[entry for entry in sys.path if entry]!r}\n"
            "from dualblade.catalog import Catalog\n"
            "from dualblade.errors import DeviceRefusedError\n"
            f"try: Catalog.open({str(path)!r}, {STORE!r})\n"
            "except DeviceRefusedError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert "in use by another process" in done.stdout


def test_a_directory_that_cannot_be_written_is_a_device_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError) as caught:
        Catalog.create(tmp_path / "file" / "x.catalog", STORE)
    assert "x.catalog" in str(caught.value)


# ---- closing, forking, dying --------------------------------------------------------------------


def test_use_after_close_is_a_closed_error(path):
    catalog = Catalog.create(path, STORE)
    catalog.close()
    catalog.close()
    for use in (catalog.records, catalog.mark_dirty, lambda: catalog.commit([], [], clean=True)):
        with pytest.raises(ClosedError, match="closed"):
            use()


FORKS = """
import os, sys
sys.path[:0] = {path!r}
from dualblade.catalog import Catalog
from dualblade.errors import ClosedError
from tests_records import record
catalog = Catalog.create({file!r}, {store!r})
catalog.commit([record("before")], [], clean=False)
child = os.fork()
if child == 0:
    try:
        catalog.mark_dirty()
    except ClosedError as error:
        assert "fork" in str(error), error
    else:
        os._exit(3)
    catalog.close()
    sys.exit(0)  # the whole of the interpreter's end, which would close a connection
assert os.waitpid(child, 0)[1] == 0
assert os.path.getsize({file!r} + "-wal") > 0, "the child has folded the log"
catalog.commit([record("after")], [], clean=True)
catalog.close()
"""

DIES = """
import os, sys
sys.path[:0] = {path!r}
from dualblade.catalog import Catalog
from tests_records import record
catalog = Catalog.create({file!r}, {store!r})
generation = 0
while True:
    catalog.commit([record(f"key {{n}}", rows=generation) for n in range(200)], [], clean=False)
    print(generation, flush=True)
    generation += 1
"""


def script(tmp_path, text, path):
    """A program that has this file's record() at hand."""
    body = "from dualblade.catalog import Record\n" + inspect.getsource(record)
    (tmp_path / "tests_records.py").write_text(body)
    entries = [str(tmp_path), *filter(None, sys.path)]
    return [sys.executable, "-c", text.format(path=entries, file=str(path), store=STORE)]


def test_a_child_process_leaves_the_parents_catalog_alone(tmp_path, path):
    done = subprocess.run(
        script(tmp_path, FORKS, path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [each.key for each in reopened(path)] == ["before", "after"]


@pytest.mark.parametrize("acknowledged", [1, 2, 5, 9])
def test_after_a_kill_there_is_one_whole_generation(tmp_path, path, acknowledged):
    program = subprocess.Popen(script(tmp_path, DIES, path), stdout=subprocess.PIPE, text=True)
    with program:
        seen = [int(program.stdout.readline()) for _ in range(acknowledged)]
        program.send_signal(signal.SIGKILL)
        seen += map(int, program.stdout.read().split())
    with Catalog.open(path, STORE) as catalog:
        assert not catalog.clean
        generations = {each.rows for each in catalog.records()}
        assert len(list(catalog.records())) == 200
    assert generations in ({seen[-1]}, {seen[-1] + 1})


# ---- where it lies ------------------------------------------------------------------------------


def test_a_files_catalog_lies_beside_the_file_by_any_name(tmp_path):
    image = tmp_path / "kv.img"
    image.touch()
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(image)
    for name in (image, str(link)):
        assert catalog_path(name, "file", STORE) == tmp_path / "kv.img.catalog"


def test_a_devices_catalog_lies_in_the_state_directory_under_the_stores_id(tmp_path, monkeypatch):
    name = f"{STORE}.catalog"
    monkeypatch.setenv("DUALBLADE_STATE_DIR", str(tmp_path))
    assert catalog_path("/dev/nvme1n1", "block", STORE) == tmp_path / name
    monkeypatch.delenv("DUALBLADE_STATE_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert str(catalog_path("/dev/nvme1n1", "block", STORE)) == f"/var/lib/dualblade/{name}"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/x/state")
    assert str(catalog_path("/dev/nvme1n1", "block", STORE)) == f"/x/state/dualblade/{name}"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    expected = f"/home/user/.local/state/dualblade/{name}"
    assert str(catalog_path("/dev/nvme1n1", "block", STORE)) == expected


def test_an_interrupt_leaves_no_transaction_open(tmp_path):
    """It comes as soon as the transaction has begun; the traceback lives on."""
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    raise_it = functools.partial(ctypes.CDLL(None)["raise"], signal.SIGUSR1)  # in C alone
    try:
        with Catalog.create(tmp_path / "c", STORE) as catalog:
            catalog.commit([record("a")], [], clean=True)
            for change in (catalog.mark_dirty, lambda: catalog.commit([], ["a"], clean=True)):
                catalog._connection.set_trace_callback(raise_it)
                with pytest.raises(KeyboardInterrupt) as interrupted:
                    change()
                catalog._connection.set_trace_callback(None)
                assert interrupted.tb is not None
                assert not catalog._connection.in_transaction
            assert [each.key for each in catalog.records()] == ["a"]
            catalog.commit([record("b")], [], clean=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    with Catalog.open(tmp_path / "c", STORE) as catalog:
        assert [each.key for each in catalog.records()] == ["a", "b"]
