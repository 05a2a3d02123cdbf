"""What store.view() promises, on every engine and every kind of device."""

from __future__ import annotations

import gc
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dualblade
from dualblade import _core
from dualblade.errors import (
    ClosedError,
    CorruptionError,
    DeviceRefusedError,
    DualbladeError,
    KeyNotFoundError,
    LiveViewError,
)
from tests.helpers import MIB, flip

if TYPE_CHECKING:
    from pathlib import Path

    from tests.devices import Engine, Target

PATHS = ("direct", "pagecache")


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALBLADE_STATE_DIR", str(tmp_path / "state"))


def open_store(target: Target, engine: Engine, **options: Any) -> dualblade.TensorStore:
    options = {"policy": "pagecache", **options}
    return dualblade.open(target, engine=engine.name, **engine.options, **options)


def mappings() -> int:
    return _core.counters()["mappings"]


def noise(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("verify", ["always", "never"])
@pytest.mark.parametrize("path", PATHS)
def test_a_view_is_the_array_read_only(target: Target, engine: Engine, path: str, verify: str):
    arrays = {
        "large": noise((1100, 1001), "float32", 1),  # more than is read at a time
        "scalar": noise((), "int64", 2),
        "odd": noise((7, 3), "uint8", 3),
        "empty": noise((0, 5), "float16", 4),
    }
    with open_store(target, engine, format=True, policy=path, verify=verify) as store:
        store.put_many(arrays)
        for key, array in arrays.items():
            view = store.view(key)
            assert same(view, array)
            assert not view.flags.writeable
            assert mappings() == (path == "pagecache" and array.size > 0)
            del view
        with pytest.raises(KeyNotFoundError):
            store.view("missing")
    with pytest.raises(ClosedError):
        store.view("large")


def test_rows_that_fill_no_block_yet_are_copied(target: Target, engine: Engine):
    rows = noise((40, 1024), "float32", 1)  # a row is a block
    small = noise((40, 100), "float32", 2)
    with open_store(target, engine, format=True) as store:
        store.reserve("whole", (64, 1024), "float32")
        store.reserve("part", (64, 100), "float32")
        store.append_many({"whole": rows[:30], "part": small[:30]})
        whole, part = store.view("whole"), store.view("part")
        assert mappings() == 1
        store.append_many({"whole": rows[30:], "part": small[30:]})
        assert same(whole, rows[:30])
        assert same(part, small[:30])
        assert same(store.view("whole"), rows)
        assert same(store.get("part"), small)


def test_a_view_outlives_what_replaces_its_tensor(target: Target, engine: Engine):
    old, new = noise((2 * MIB,), "uint8", 1), noise((2 * MIB,), "uint8", 2)
    with open_store(target, engine, format=True) as store:
        free = store.stats()["free_bytes"]
        store.put("a", old)
        first = store.view("a")
        store.put("a", new)
        second = store.view("a")[100:]
        store.delete("a")
        assert store.stats()["free_bytes"] == free - 4 * MIB
        for i in range(20):
            store.put(f"other{i % 4}", noise((2 * MIB,), "uint8", i))
        assert same(first, old)
        assert same(second, new[100:])
        taken = free - store.stats()["free_bytes"]
        del first
        assert free - store.stats()["free_bytes"] == taken - 2 * MIB
        del second
        assert free - store.stats()["free_bytes"] == taken - 4 * MIB == 8 * MIB
        assert store.check() == []


def test_a_full_store_takes_the_room_of_views_that_are_gone(target: Target, engine: Engine):
    with open_store(target, engine, format=True) as store:
        half = store.stats()["largest_free_bytes"] // 4096 // 2 * 4096
        store.put("a", np.zeros(half, np.uint8))
        view = store.view("a")
        store.delete("a")
        del view
        store.put("b", np.zeros(half + 4096, np.uint8))


def test_what_would_change_a_view_is_refused(target: Target, engine: Engine):
    rows = noise((32, 1024), "float32", 1)
    with open_store(target, engine, format=True) as store:
        store.reserve("a", (64, 1024), "float32", group="g")
        store.append("a", rows)
        views = [store.view("a"), store.view("a")[3:5]]
        changes = [
            lambda: store.truncate("a", 3),
            lambda: store.resize("a", 128),
            lambda: store.set_path("g", "direct"),
        ]
        while views:
            for change in changes:
                with pytest.raises(LiveViewError, match=rf"'a' has live views \({len(views)}\)"):
                    change()
            assert same(store.get("a"), rows)
            del views[0]
        assert issubclass(LiveViewError, (DualbladeError, BufferError))
        for change in changes:
            change()
        assert same(store.get("a"), rows[:3])
        assert store.path_of("g") == "direct"


def test_a_group_that_is_looked_at_grows_past_the_budget(target: Target, engine: Engine):
    """It can't leave the page cache, and what is put beside it need not wait for that."""
    options = {"policy": "dual", "memory": "8MiB", "live": False}
    with open_store(target, engine, format=True, **options) as store:
        store.put("seen", np.ones(4 * MIB, np.uint8), group="g")
        views = [store.view("seen")]
        store.put("other", np.full(5 * MIB, 2, np.uint8), group="g")
        store.reserve("rows", (5, MIB), "uint8", group="g")
        store.resize("rows", 6)
        store.delete("seen")  # its extent is kept, in the group
        store.put("another", np.full(MIB, 3, np.uint8), group="g")
        assert store.path_of("g") == "pagecache"
        assert views[0].all()
        views.clear()
        store.put("another", np.full(2 * MIB, 4, np.uint8), group="g")
        assert store.path_of("g") == "direct"
        assert (store.get("other") == 2).all()
        assert (store.get("another") == 4).all()


def test_a_shrinking_budget_goes_around_views(target: Target, engine: Engine):
    options = {"policy": "dual", "memory": "16MiB", "live": False}
    with open_store(target, engine, format=True, **options) as store:
        store.put_many({"seen": np.ones(MIB, np.uint8), "other": np.ones(MIB, np.uint8)})
        view = store.view("seen")
        store._residency.budget_bytes = 0
        assert store._make_room() == 1
        assert (store.path_of("seen"), store.path_of("other")) == ("pagecache", "direct")
        assert store._index.viewed_bytes == MIB
        assert view.all()
        del view
        store._release_views()
        assert store._make_room() == 1
        assert store.path_of("seen") == "direct"
        assert store._index.viewed_bytes == 0


def test_a_damaged_tensor_is_not_shown(target: Target, engine: Engine):
    data = noise((MIB,), "uint8", 1)
    with open_store(target, engine, format=True) as store:
        store.put("bad", data)
        store.flush()
        place = store.info("bad").offset + 700_001
    flip(target, place)
    with open_store(target, engine) as store:
        with pytest.raises(CorruptionError, match="'bad'"):
            store.view("bad")
        store.put("bad", data)
        assert same(store.view("bad"), data)
    assert mappings() == 0


def test_a_view_keeps_a_closed_store_to_itself(target: Target, engine: Engine):
    data = noise((MIB,), "uint8", 1)
    with open_store(target, engine, format=True) as store:
        store.put("a", data)
        view = store.view("a")
    assert same(view, data)
    with pytest.raises(DeviceRefusedError, match="in use|Views of a closed store"):
        open_store(target, engine)
    del view
    with open_store(target, engine) as store:
        assert same(store.get("a"), data)


def test_a_child_that_lets_go_of_a_view_leaves_the_parent_its_store(target: Target, engine: Engine):
    data = noise((MIB,), "uint8", 1)
    store = open_store(target, engine, format=True)
    store.put("a", data)
    view = store.view("a")
    child = os.fork()
    if child == 0:
        is_same = same(view, data)
        del view
        os._exit(0 if is_same and mappings() == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.close()
    with pytest.raises(DeviceRefusedError):
        open_store(target, engine)
    assert same(view, data)
    del view
    open_store(target, engine).close()


def test_views_come_and_go_in_threads_beside_changes(target: Target, engine: Engine):
    arrays = [noise((300_000,), "uint8", i) for i in range(4)]
    keys = [f"k{i}" for i in range(4)]
    problems: list[BaseException] = []
    with open_store(target, engine, format=True) as store:
        store.put_many(dict(zip(keys, arrays, strict=True)))

        def look(seed: int) -> None:
            chance = np.random.default_rng(seed)
            try:
                for _ in range(60):
                    at = int(chance.integers(4))
                    if seed % 2:
                        assert same(store.view(keys[at]), arrays[at])
                    else:
                        store.put(keys[at], arrays[at])
                        path = PATHS[int(chance.integers(2))]
                        try:
                            store.set_path(keys[at], path)
                        except LiveViewError:
                            continue
            except BaseException as error:  # noqa: BLE001  raised below, in the test's thread
                problems.append(error)

        threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []
        gc.collect()
        assert mappings() == 0
        assert store.check() == []
        for key in keys:
            store.set_path(key, "direct")


def test_an_interrupt_leaves_no_view_behind(target: Target, engine: Engine):
    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    interrupts = 0
    with open_store(target, engine, format=True) as store:
        store.put("a", np.zeros(64 << 10, np.uint8))
        before = signal.signal(signal.SIGALRM, handler)
        try:
            for i in range(300):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 + i % 100 * 4e-6)
                    while True:
                        store.view("a")
                except KeyboardInterrupt:
                    interrupts += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert interrupts == 300
        assert mappings() == 0
        store.set_path("a", "direct")
        assert store.stats()["operations_active"] == 0
        store.delete("a")
        assert store.check() == []
