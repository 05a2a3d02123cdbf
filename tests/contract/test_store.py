"""What TensorStore promises, on every engine and every kind of device."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest

import dualblade
from dualblade import _core
from dualblade.errors import (
    ClosedError,
    CorruptionError,
    DeviceRefusedError,
    KeyNotFoundError,
    NoSpaceError,
)
from tests.helpers import MIB, flip

if TYPE_CHECKING:
    from tests.devices import Engine, Target

PATHS = ("direct", "pagecache")
POLICIES = ("direct", "pagecache", "dual")


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the catalogs of stores on block devices go."""
    path = tmp_path / "state"
    monkeypatch.setenv("DUALBLADE_STATE_DIR", str(path))
    return path


def open_store(target: Target, engine: Engine, **options: Any) -> dualblade.TensorStore:
    options = {"policy": "dual", "memory": "16MiB", **options}
    return dualblade.open(target, engine=engine.name, **engine.options, **options)


def format_store(target: Target, engine: Engine, **options: Any) -> dualblade.TensorStore:
    return open_store(target, engine, format=True, **options)


def noise(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- opening -------------------------------------------------------------------------------------


def test_a_device_that_holds_no_store_is_refused(target: Target, engine: Engine):
    with open(target, "rb") as file:
        before = file.read(64 * MIB)
    with pytest.raises(DeviceRefusedError, match="format"):
        open_store(target, engine)
    with open(target, "rb") as file:
        assert file.read(64 * MIB) == before


def test_a_formatted_device_is_opened_as_it_is(
    target: Target, engine: Engine, state_directory: Path
):
    with format_store(target, engine) as store:
        assert store.stats()["engine"] == engine.name
        assert store.stats()["fallbacks"] == []
        assert store.keys() == []
        store.put("a", np.arange(10))
    with open_store(target, engine) as store:
        assert same(store.get("a"), np.arange(10))
    with format_store(target, engine) as store:
        assert "a" not in store
    assert state_directory.exists() == target.is_block_device
    if target.is_block_device:
        assert all(path.stat().st_mode & 0o077 == 0 for path in state_directory.iterdir())


def test_a_store_has_one_process_and_one_opener(target: Target, engine: Engine):
    with format_store(target, engine) as store:
        store.put("a", np.arange(10))
        with pytest.raises(DeviceRefusedError):
            open_store(target, engine)
        with pytest.raises(DeviceRefusedError):
            format_store(target, engine)
        assert same(store.get("a"), np.arange(10))


# ---- what is put is got --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_arrays_come_back_as_they_went(target: Target, engine: Engine, policy: str):
    arrays = {
        "scalar": np.array(3.5),
        "empty": np.empty((0, 4), np.float32),
        "byte": noise((1,), np.uint8, 1),
        "block": noise((4096,), np.uint8, 2),
        "block and one": noise((4097,), np.uint8, 3),
        "chunk": noise((256, 1024), np.uint8, 4),
        "chunks": noise((3, 257, 513), np.float32, 5).astype(np.float32),
        "half": noise((100, 7), np.float16, 6),
        "brain": noise((33, 5), ml_dtypes.bfloat16, 7),
        "eight": noise((1000,), ml_dtypes.float8_e4m3fn, 8),
        "strided": noise((64, 64), np.int32, 9)[::2, ::3],
        "fortran": np.asfortranarray(noise((30, 40), np.int64, 10)),
    }
    with format_store(target, engine, policy=policy) as store:
        store.put_many(arrays)
        for key, array in arrays.items():
            assert same(store.get(key), np.ascontiguousarray(array).reshape(array.shape))
            out = np.empty(array.shape, array.dtype)
            assert store.get(key, out=out) is out
            assert same(out, np.ascontiguousarray(array).reshape(array.shape))
        got = store.get_many(list(arrays))
        assert list(got) == list(arrays)
        assert store.check() == []
    with open_store(target, engine, policy=policy, verify="open") as store:
        assert store.keys() == list(arrays)
        for key, array in arrays.items():
            assert same(store.get(key), np.ascontiguousarray(array).reshape(array.shape))


@pytest.mark.parametrize("verify", ["always", "never"])
def test_rows_of_a_tensor(target: Target, engine: Engine, verify: str):
    rows = noise((3000, 3, 37), np.float16, 1)
    with format_store(target, engine, verify=verify) as store:
        store.put("t", rows)
        for start, stop in [(0, 0), (0, 1), (0, 3000), (1499, 1501), (2999, 3000), (5, 2500)]:
            assert same(store.read("t", start, stop), rows[start:stop])
        out = np.empty((10, 3, 37), np.float16)
        assert store.read("t", 20, 30, out=out) is out
        assert same(out, rows[20:30])


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_are_appended_and_cut(target: Target, engine: Engine, policy: str):
    """numpy's concatenation is the model; rows smaller and larger than a block."""
    dice = random.Random(5)
    for width in (3, 1000, 9001):
        model = np.empty((0, width), np.uint8)
        with format_store(target, engine, policy=policy) as store:
            store.reserve("t", (400, width), np.uint8)
            for step in range(30):
                count = dice.randrange(0, 25)
                if len(model) + count <= 400:
                    rows = noise((count, width), np.uint8, step)
                    store.append("t", rows)
                    model = np.concatenate([model, rows])
                if step % 7 == 6:
                    keep = dice.randrange(0, len(model) + 1)
                    store.truncate("t", keep)
                    model = model[:keep]
                if step % 10 == 9:
                    store.flush()
                start = dice.randrange(0, len(model) + 1)
                assert same(store.read("t", start, len(model)), model[start:])
                assert same(store.get("t"), model)
            store.resize("t", 500)
            assert same(store.get("t"), model)
            assert store.check() == []
        with open_store(target, engine, policy=policy) as store:
            assert same(store.get("t"), model)
            store.append("t", np.full((5, width), 7, np.uint8))
            model = np.concatenate([model, np.full((5, width), 7, np.uint8)])
            assert same(store.get("t"), model)
            assert store.info("t").capacity == (500, width)


def test_overwriting_and_deleting_give_the_room_back(target: Target, engine: Engine):
    with format_store(target, engine) as store:
        free = store.stats()["free_bytes"]
        for size in (1, 5000, 3 * MIB, 100):
            store.put("a", noise((size,), np.uint8, size))
            store.put("b", noise((size,), np.uint8, size + 1))
            assert same(store.get("a"), noise((size,), np.uint8, size))
        store.delete_many(["a", "b"])
        assert store.stats()["free_bytes"] == free
        with pytest.raises(KeyNotFoundError, match="'a'"):
            store.get("a")
        store.put("empty", b"")
        assert store.stats()["free_bytes"] == free


def test_a_full_store_goes_on(target: Target, engine: Engine):
    if target.size_bytes > 1 << 30:
        pytest.skip(f"{target} is too large to be filled")
    with format_store(target, engine) as store:
        kept = noise((20 * MIB,), np.uint8, 1)
        store.put("kept", kept)
        free = store.stats()["free_bytes"]
        with pytest.raises(NoSpaceError, match="free"):
            store.put("large", np.zeros(free + 4096, np.uint8))
        with pytest.raises(NoSpaceError):
            store.put_many({"x": np.zeros(MIB, np.uint8), "kept": np.zeros(free, np.uint8)})
        assert store.stats()["free_bytes"] == free
        assert store.keys() == ["kept"]
        assert same(store.get("kept"), kept)
        store.put("fits", np.zeros(free, np.uint8))
        assert store.stats()["free_bytes"] == 0
        assert not store.get("fits").any()
        assert same(store.get("kept"), kept)


# ---- the two paths -------------------------------------------------------------------------------


def test_a_group_changes_path_and_keeps_its_place(target: Target, engine: Engine):
    data = noise((5 * MIB,), np.uint8, 1)
    with format_store(target, engine, policy="dual", memory="16MiB") as store:
        store.put("a", data, group="g")
        store.reserve("b", (1000, 100), np.uint8, group="g")
        model = np.empty((0, 100), np.uint8)
        place = store.info("a").offset
        assert store.info("a").path == "pagecache"
        for round_, path in enumerate(PATHS * 2):
            store.set_path("g", path)
            assert store.info("a").path == store.info("b").path == path
            before = store.stats()["paths"]
            assert same(store.get("a"), data)
            rows = noise((50, 100), np.uint8, round_)
            store.append("b", rows)
            model = np.concatenate([model, rows])
            after = store.stats()["paths"]
            other = PATHS[1 - PATHS.index(path)]
            assert after[path]["read_bytes"] - before[path]["read_bytes"] >= data.size
            assert after[other] == before[other]
            assert same(store.get("b"), model)
        assert store.info("a").offset == place
        assert store.check() == []


def test_only_what_fits_the_budget_is_page_cached(target: Target, engine: Engine):
    with format_store(target, engine, policy="dual", memory="16MiB") as store:
        for i in range(8):
            store.put(f"t{i}", noise((4 * MIB,), np.uint8, i))
        paths = [store.info(f"t{i}").path for i in range(8)]
        assert paths == ["pagecache"] * 4 + ["direct"] * 4
        assert store.stats()["pagecache_bytes"] == 16 * MIB
        with pytest.raises(ValueError, match="budget"):
            store.set_path("t7", "pagecache")
        store.set_path("t0", "direct")
        store.set_path("t7", "pagecache")
        for i in range(8):
            assert same(store.get(f"t{i}"), noise((4 * MIB,), np.uint8, i))


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_damaged_tensor_is_never_returned(target: Target, engine: Engine, path: str):
    data = noise((MIB,), np.uint8, 1)
    with format_store(target, engine, policy=path) as store:
        store.put("good", data)
        store.put("bad", data)
        store.flush()
        place = store.info("bad").offset + 700_001
    flip(target, place)
    with pytest.raises(CorruptionError, match="'bad'"):
        open_store(target, engine, policy=path, verify="open")
    with open_store(target, engine, policy=path) as store:
        with pytest.raises(CorruptionError, match="'bad'"):
            store.get("bad")
        assert same(store.read("bad", 0, 512 << 10), data[: 512 << 10])  # other chunks
        assert same(store.get("good"), data)
        assert len(store.check()) == 1
        store.put("bad", data)
        assert store.check() == []


# ---- at once -------------------------------------------------------------------------------------


def test_tickets(target: Target, engine: Engine):
    with format_store(target, engine) as store:
        data = [noise((300_000 + i,), np.uint8, i) for i in range(20)]
        tickets = [store.put_async(f"t{i}", array) for i, array in enumerate(data)]
        for ticket in reversed(tickets):
            ticket.result()
        tickets = [store.get_async(f"t{i}") for i in range(20)]
        assert all(same(t.result(), a) for t, a in zip(tickets, data, strict=True))
        store.put_async("forgotten", data[0])
        assert same(store.get("forgotten"), data[0])


def test_threads_and_close(target: Target, engine: Engine):
    """Threads put, append, get and delete until the store is closed under them."""
    with format_store(target, engine, policy="dual", memory="16MiB") as store:
        errors: list[BaseException] = []
        rounds = [0] * 4

        def work(number: int) -> None:
            dice = random.Random(number)
            try:
                while True:
                    data = noise((dice.randrange(1, 200_000),), np.uint8, rounds[number])
                    key = f"{number}"
                    store.put(key, data)
                    assert same(store.get(key), data)
                    store.set_path(key, dice.choice(PATHS))
                    assert same(store.read(key, 5, 50), data[5:50])
                    store.delete(key)
                    rounds[number] += 1
            except ClosedError:
                pass
            except BaseException as error:  # noqa: BLE001 - it is raised below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        while min(rounds) < 5 and not errors:
            threads[0].join(0.01)
        store.close()
        for thread in threads:
            thread.join()
        assert not errors, errors[0]
        with pytest.raises(ClosedError):
            store.get("0")
    with open_store(target, engine) as store:
        assert store.check() == []
    assert _core.counters()["requests"] == 0


@pytest.mark.parametrize("policy", PATHS)
def test_what_is_deleted_is_not_left_on_the_device(target: Target, engine: Engine, policy: str):
    arrays = {key: noise((2 * MIB,), "uint8", seed) for seed, key in enumerate("abc")}
    with format_store(target, engine, policy=policy, discard=True) as store:
        store.put_many(arrays)
        store.flush()
        assert [holds(target, array) for array in arrays.values()] == [True, True, True]
        store.delete("a")
        store.put("b", arrays["c"])
        store.flush()
        assert [holds(target, array) for array in arrays.values()] == [False, False, True]
        assert same(store.get("b"), arrays["c"])
        assert same(store.get("c"), arrays["c"])
    with format_store(target, engine, policy=policy, discard=True):
        assert not holds(target, arrays["c"])
    with open_store(target, engine) as store:
        store.put("c", arrays["c"])
        store.delete("c")
        store.flush()
        assert holds(target, arrays["c"])


def holds(target: Target, array: np.ndarray) -> bool:
    """Whether the beginning of an array is anywhere in the first part of the device."""
    fd = os.open(target, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return array[:4096].tobytes() in os.pread(fd, 16 * MIB, 0)
    finally:
        os.close(fd)
