"""How a store ends (close, exit, fork, garbage collection, kill) and what is found next."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import dualblade
from dualblade.errors import DualbladeWarning
from tests.helpers import MIB, noise

if TYPE_CHECKING:
    from collections.abc import Callable

CHUNK = 256 << 10
TIMEOUT_S = 60

PREAMBLE = """
    import gc, os, sys, threading, warnings
    import numpy as np
    import dualblade

    path, MIB = sys.argv[1], 1 << 20

    def noise(size, seed=0):
        return np.random.default_rng(seed).integers(0, 256, size, np.uint8)
"""


def command(program: str, path: Path, *options: str) -> list[str]:
    text = textwrap.dedent(PREAMBLE) + textwrap.dedent(program)
    return [sys.executable, *options, "-c", text, str(path)]


def python(program: str, path: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(program, path, *options),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


def runs_quietly(program: str, path: Path, *options: str) -> None:
    done = python(program, path, "-W", "error", *options)
    assert (done.returncode, done.stderr) == (0, "")


# ---- opened again --------------------------------------------------------------------------------


def test_a_store_opened_again_has_everything(path: Path) -> None:
    arrays: dict[str, Any] = {
        "scalar": np.float64(2.5),
        "empty": np.zeros((3, 0, 2), np.int8),
        "bf16": np.arange(300).reshape(3, 100).astype(ml_dtypes.bfloat16),
        "record": np.array([(1, 2.5)], [("a", "u1"), ("b", ">f4")]),
        "big": noise(3 * MIB + 17),
    }
    rows = noise(700 * 1000).reshape(1000, 700)
    with dualblade.open(path, size="16MiB", memory="1MiB") as store:
        store.put_many(arrays, group="g")
        for key, count in (("none", 0), ("some", 123), ("full", 1000)):
            store.reserve(key, (1000, 700), "uint8", group="rows")
            store.append(key, rows[:count])
        before = {key: store.info(key)._replace(path="") for key in store.keys()}
        free = store.stats()["free_bytes"]
    for _ in range(2):
        with dualblade.open(path, memory="1MiB") as store:
            assert {key: store.info(key)._replace(path="") for key in store.keys()} == before
            assert store.stats()["free_bytes"] == free
            for key, array in arrays.items():
                found = store.get(key)
                assert found.dtype == array.dtype
                np.testing.assert_array_equal(found, array)
            np.testing.assert_array_equal(store.get("some"), rows[:123])
            assert store.check() == []
    with dualblade.open(path, memory="1MiB") as store:
        for key, count in (("none", 0), ("some", 123)):
            for row in range(count, 200):
                store.append(key, rows[row : row + 1])
            store.append(key, rows[200:])
            np.testing.assert_array_equal(store.get(key), rows)
        store.truncate("full", 77)
    with dualblade.open(path) as store:
        np.testing.assert_array_equal(store.get("none"), rows)
        np.testing.assert_array_equal(store.get("full"), rows[:77])
        store.append("full", rows[77:])
        np.testing.assert_array_equal(store.get("full"), rows)


def test_rows_appended_between_two_saves_are_there(path: Path) -> None:
    """A flush writes the block that is not yet full; what follows fills the same block."""
    rows = noise(100 * 300).reshape(300, 100)
    with dualblade.open(path, size="4MiB") as store:
        store.reserve("x", (300, 100), "uint8")
        for row in range(150):
            store.append("x", rows[row : row + 1])
            if row % 7 == 0:
                store.flush()
                np.testing.assert_array_equal(store.get("x"), rows[: row + 1])
    for row in range(150, 160):
        with dualblade.open(path) as store:
            np.testing.assert_array_equal(store.get("x"), rows[:row])
            store.append("x", rows[row : row + 1])
            np.testing.assert_array_equal(store.get("x"), rows[: row + 1])


def test_files_are_private_and_nothing_is_left_beside_them(path: Path) -> None:
    dualblade.open(path, size="4MiB").close()
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["kv.img", "kv.img.catalog"]
    for entry in path.parent.iterdir():
        assert entry.stat().st_mode & 0o777 == 0o600


def test_opening_and_closing_leaves_no_descriptor_open(path: Path) -> None:
    dualblade.open(path, size="4MiB").close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with dualblade.open(path) as store:
            store.put("x", noise(100))
        with pytest.raises(ValueError, match="engine"):
            dualblade.open(path, engine="steam")  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_error_inside_with_closes_and_saves(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), dualblade.open(path, size="4MiB") as store:
        store.put("x", noise(100))
        1 / 0  # noqa: B018
    assert store.closed
    with dualblade.open(path) as store:
        np.testing.assert_array_equal(store.get("x"), noise(100))


def test_a_close_that_cannot_save_says_so_and_lets_go(fault_device: Callable[..., Any]) -> None:
    device = fault_device()
    store = dualblade.open(device.path, format=True)
    store.put("x", noise(100))
    device.add_rule("fsync", "EIO")
    with pytest.raises(dualblade.DeviceError):
        store.close()
    assert store.closed
    store.close()
    device.clear()
    with pytest.warns(DualbladeWarning, match="starts empty"):
        dualblade.open(device.path).close()


# ---- the end of the process ----------------------------------------------------------------------


def test_exit_with_an_open_store_and_io_in_flight_saves_quietly(path: Path) -> None:
    program = """
        store = dualblade.open(path, size="64MiB", memory="1MiB")
        store.put("x", noise(MIB))
        store.reserve("rows", (1000, 100), "uint8")
        store.append("rows", noise(12_300).reshape(123, 100))
        tickets = [store.put_async(f"y{i}", noise(4 * MIB, i)) for i in range(8)]
        reading = store.get_async("x")
    """
    runs_quietly(program, path)
    with dualblade.open(path) as store:
        assert store.keys() == ["x", "rows", *(f"y{i}" for i in range(8))]
        for i in range(8):
            np.testing.assert_array_equal(store.get(f"y{i}"), noise(4 * MIB, i))
        np.testing.assert_array_equal(store.get("rows").ravel(), noise(12_300))


def test_exit_with_threads_at_work_saves_quietly(path: Path) -> None:
    program = """
        store = dualblade.open(path, size="16MiB")
        store.put("x", noise(MIB))
        begun = threading.Semaphore(0)

        def work():
            try:
                while True:
                    store.get("x")
                    begun.release()
            except dualblade.ClosedError:
                pass

        for _ in range(4):
            threading.Thread(target=work, daemon=True).start()
        for _ in range(20):
            begun.acquire()
    """
    runs_quietly(program, path)
    with dualblade.open(path) as store:
        np.testing.assert_array_equal(store.get("x"), noise(MIB))


def test_exit_by_an_error_saves(path: Path) -> None:
    program = """
        store = dualblade.open(path, size="16MiB")
        store.put_async("x", noise(MIB))
        raise SystemExit(7)
    """
    done = python(program, path, "-W", "error")
    assert (done.returncode, done.stderr) == (7, "")
    with dualblade.open(path) as store:
        np.testing.assert_array_equal(store.get("x"), noise(MIB))


def test_exit_closes_every_store_even_if_one_fails(fault_device: Callable[..., Any]) -> None:
    """One in front of it and one behind: whichever is closed first."""
    device = fault_device()
    device.add_rule("fsync", "EIO", nth=2)  # the first is that of the format
    program = """
        stores = [dualblade.open(path + ".1", size="4MiB")]
        stores.append(dualblade.open(path, format=True))
        stores.append(dualblade.open(path + ".2", size="4MiB"))
        for store in stores:
            store.put("x", noise(1000))
    """
    done = python(program, device.path)
    assert "flush on" in done.stderr
    for suffix in (".1", ".2"):
        with dualblade.open(f"{device.path}{suffix}") as store:
            np.testing.assert_array_equal(store.get("x"), noise(1000))


def test_a_store_that_is_collected_warns_and_saves(path: Path) -> None:
    store = dualblade.open(path, size="4MiB")
    store.put_async("x", noise(MIB))
    with pytest.warns(ResourceWarning, match=r"unclosed <dualblade.TensorStore '.*' open>"):
        del store
        gc.collect()
    with dualblade.open(path) as store:
        np.testing.assert_array_equal(store.get("x"), noise(MIB))


def test_a_store_that_is_collected_saves_where_warnings_are_errors(path: Path) -> None:
    program = """
        store = dualblade.open(path, size="4MiB")
        store.put_async("x", noise(MIB))
        del store
        gc.collect()
        with dualblade.open(path) as store:
            assert (store.get("x") == noise(MIB)).all()
    """
    done = python(program, path, "-W", "error")
    assert done.returncode == 0, done.stderr
    assert "ResourceWarning: unclosed" in done.stderr


# ---- fork ----------------------------------------------------------------------------------------

FORK = """
    warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks
    store = dualblade.open(path, size="16MiB", memory="1MiB")
    store.put("x", noise(MIB))
    store.reserve("rows", (1000, 100), "uint8")
    store.append("rows", noise(100).reshape(1, 100))
    ticket = store.put_async("y", noise(2 * MIB, 1))
    reading = store.get_async("x")
    ended, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        uses = (
            lambda: store.get("x"), lambda: store.put("z", noise(5)), lambda: "x" in store,
            store.keys, store.flush, store.stats, store.check, store.__enter__,
            lambda: store.append("rows", noise(100).reshape(1, 100)),
            lambda: store.set_path("x", "direct"), lambda: store.delete("x"),
        )
        for use in uses:
            try:
                use()
            except dualblade.ClosedError:
                continue
            raise AssertionError(use)
        for waiting in (ticket, reading):
            try:
                waiting.result()
            except dualblade.ClosedError:
                pass
        store.close()
        os.read(ended, 1)  # until the parent has done its work
        %s
    os.close(ended)
    assert (store.get("x") == noise(MIB)).all()
    ticket.result()
    store.append("rows", noise(100, 1).reshape(1, 100))
    store.close()
    with dualblade.open(path) as store:
        assert store.keys() == ["x", "rows", "y"]
        assert (store.get("y") == noise(2 * MIB, 1)).all()
        assert store.read("rows", 1, 2).tobytes() == noise(100, 1).tobytes()
        assert store.check() == []
    os.close(end)
    assert os.waitpid(child, 0)[1] == 0
    with dualblade.open(path) as store:
        assert store.check() == []
        assert store.keys() == ["x", "rows", "y"]
"""


@pytest.mark.parametrize(
    "leave", ["os._exit(0)", "sys.exit(0)", "del store, ticket, reading, uses, use; sys.exit(0)"]
)
def test_a_fork_leaves_the_parents_store_alone(path: Path, leave: str) -> None:
    runs_quietly(FORK % leave, path)


def test_a_child_may_open_what_the_parent_has_closed(path: Path) -> None:
    program = """
        warnings.simplefilter("ignore", DeprecationWarning)
        closed = dualblade.open(path, size="4MiB")
        closed.put("x", noise(100))
        closed.close()
        child = os.fork()
        if child == 0:
            with dualblade.open(path) as store:
                store.put("y", store.get("x"))
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with dualblade.open(path) as store:
            assert (store.get("y") == noise(100)).all()
    """
    runs_quietly(program, path)


# ---- kill ----------------------------------------------------------------------------------------


def killed(program: str, path: Path) -> None:
    """Runs a program until it says "ready", then kills it."""
    text = program + "\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen(
        command(text, path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)


SAVED = """
    store = dualblade.open(path, size="16MiB", memory="1MiB")
    store.put("x", noise(MIB))
    store.put("y", noise(4 * MIB, 1))
    store.reserve("rows", (1000, 100), "uint8")
    store.append("rows", noise(12_300).reshape(123, 100))
    store.flush()
"""


@pytest.mark.parametrize(
    "after",
    [
        "",
        "store.get('x'); store.check(); list(store.keys())",
        "store.set_path('x', 'direct'); store.get('x')",
        "store.flush()",
        "store.put('z', noise(10)); store.flush()",
    ],
)
def test_what_was_flushed_and_not_changed_survives_a_kill(path: Path, after: str) -> None:
    killed(f"{SAVED}\n    {after}", path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = dualblade.open(path)
    with store:
        assert store.check() == []
        assert store.keys() == ["x", "y", "rows", *(["z"] if "z" in after else [])]
        np.testing.assert_array_equal(store.get("x"), noise(MIB))
        np.testing.assert_array_equal(store.get("y"), noise(4 * MIB, 1))
        store.append("rows", noise(100, 1).reshape(1, 100))
        expected = np.concatenate([noise(12_300), noise(100, 1)]).reshape(124, 100)
        np.testing.assert_array_equal(store.get("rows"), expected)


@pytest.mark.parametrize(
    "change",
    [
        "store.put('x', noise(MIB, 2))",
        "ticket = store.put_async('new', noise(10))",
        "store.delete('x')",
        "store.append('rows', noise(100).reshape(1, 100))",
        "store.truncate('rows', 5)",
        "store.resize('rows', 500)",
        "store.reserve('new', (5,), 'uint8')",
    ],
)
def test_what_was_changed_after_the_flush_starts_empty_and_says_so(path: Path, change: str) -> None:
    killed(f"{SAVED}\n    {change}", path)
    with (
        pytest.warns(DualbladeWarning, match="starts empty, and the 3 tensors of its last save"),
        dualblade.open(path) as store,
    ):
        assert store.keys() == []
        assert store.stats()["free_bytes"] == 15 * MIB
        store.put("x", noise(MIB))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dualblade.open(path) as store:
            np.testing.assert_array_equal(store.get("x"), noise(MIB))


INTERRUPTED = """
    store.put("x", noise(MIB, 2))
    catalog, commit = store._catalog, store._catalog.commit
    def cut_short(*arguments, **options):
        commit(*arguments, **options)
        raise KeyboardInterrupt
    catalog.commit = cut_short
    try:
        store.flush()
    except KeyboardInterrupt:
        pass
    store.put("x", noise(MIB, 3))
"""


def test_what_was_changed_after_an_interrupted_flush_starts_empty_too(path: Path) -> None:
    """The interrupt comes after the index was saved, and before the store knows."""
    killed(f"{SAVED}{INTERRUPTED}", path)
    with (
        pytest.warns(DualbladeWarning, match="starts empty, and the 3 tensors of its last save"),
        dualblade.open(path) as store,
    ):
        assert store.keys() == []


def test_a_store_killed_before_its_first_flush_can_be_opened(path: Path) -> None:
    killed("\n    store = dualblade.open(path, size='4MiB')\n    store.put('x', noise(10))", path)
    with (
        pytest.warns(DualbladeWarning, match="was changed and not closed or flushed"),
        dualblade.open(path) as store,
    ):
        assert len(store) == 0


CLOSES_IN_HANDLER = """
import os, signal, sys, threading, numpy as np, dualblade
store = dualblade.open(sys.argv[1], size="64MiB", memory="4MiB", format=True)
store.reserve("rows", (1 << 20, 8), "float32")
store.put("large", np.ones(4 << 20, "float32"))
signal.signal(signal.SIGALRM, lambda *_: store.close())
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
rows = np.ones((1000, 8), "float32")
count = 0
try:
    while True:
        if sys.argv[3] == "append":
            store.append("rows", rows)
            store.truncate("rows", 0)
        elif sys.argv[3] == "flush":
            store.put("small", rows)
            store.flush()
        elif sys.argv[3] == "check":
            assert store.check() == []
        else:
            store.get("large")
        count += 1
except dualblade.ClosedError:
    print("closed")
"""


@pytest.mark.parametrize("operation", ["append", "flush", "check", "get"])
@pytest.mark.parametrize("after_s", [0.05, 0.173])
def test_a_signal_handler_may_close_the_store_it_interrupts(tmp_path, operation, after_s):
    done = subprocess.run(
        [sys.executable, "-c", CLOSES_IN_HANDLER, tmp_path / "kv.img", str(after_s), operation],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "closed", "")
    with dualblade.open(tmp_path / "kv.img") as store:
        assert "large" in store
        assert store.check() == []


def test_a_store_can_not_be_copied(tmp_path):
    with dualblade.open(tmp_path / "kv.img", size="4MiB") as store:
        store.put("a", np.ones(10))
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(dualblade.UnsupportedError, match="open device"):
                attempt(store)
        assert (store.get("a") == 1).all()


def test_tickets_that_nobody_waits_for_let_go_of_their_arrays(tmp_path):
    with dualblade.open(tmp_path / "kv.img", size="64MiB") as store:
        alive = []
        for i in range(50):
            array = dualblade.aligned_empty((1 << 20,), np.uint8)
            alive.append(weakref.ref(array))
            store.put_async(f"k{i % 40}", array)
            store.get("k0")
            del array
        gc.collect()
        assert sum(ref() is not None for ref in alive) < 10
