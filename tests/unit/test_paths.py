"""The two paths: who keeps the bytes, and that a tensor changes path without moving or changing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dualblade
from dualblade import _core
from dualblade.paths import open_paths
from tests.helpers import MIB, noise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.devices import Target

CHUNK = 256 << 10
TIMEOUT_S = 60


@pytest.fixture(scope="module", autouse=True)
def page_cache_can_be_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("probe") / "probe.img"
    path.write_bytes(bytes(MIB))
    with _core.Device.open(path) as device:
        if device.cached_bytes(0, MIB)[1] is None:
            pytest.skip("cachestat(2) is missing: Linux 6.5 has it")


@pytest.fixture
def store(target: Target) -> Iterator[dualblade.TensorStore]:
    with dualblade.open(target, format=True, memory="8MiB") as opened:
        yield opened


def cached(store: dualblade.TensorStore, key: str) -> int:
    """Bytes of a tensor's extent that the page cache holds."""
    info = store.info(key)
    return store._device.cached_bytes(info.offset, info.extent_bytes)[0]


def dirty(store: dualblade.TensorStore, key: str) -> int:
    info = store.info(key)
    return store._device.cached_bytes(info.offset, info.extent_bytes)[1]


def test_both_paths_reach_the_same_bytes(target: Target) -> None:
    with _core.Device.open(target) as device:
        paths = open_paths(device)
        assert list(paths) == ["direct", "pagecache"]
        for i, (there, back) in enumerate([("direct", "pagecache"), ("pagecache", "direct")]):
            offset = (1 + i) * MIB
            paths[there].write([(offset, noise(CHUNK, i))], None).wait()
            paths[back].enter(offset, CHUNK)
            assert device.cached_bytes(offset, CHUNK) == (0, 0)
            found = np.zeros(CHUNK, np.uint8)
            paths[back].read([(offset, found)], None).wait()
            np.testing.assert_array_equal(found, noise(CHUNK, i))


def test_direct_tensors_stay_out_of_the_page_cache(store: dualblade.TensorStore) -> None:
    """Also between two that are page-cached: reading ahead of one must not take it along."""
    store.put("before", noise(2 * MIB))
    store.reserve("grows", (2 * MIB,), "uint8")
    store.put("x", noise(2 * MIB, 1))
    store.put("after", noise(2 * MIB, 2))
    for key in ("x", "grows"):
        store.set_path(key, "direct")
    for key in ("before", "x", "after"):
        store.get(key)
        store.read(key, 100, 5000)
    store.append("grows", noise(MIB + 100))
    store.put("x", noise(2 * MIB, 3))
    store.get("x")
    store.get("grows")
    assert store.info("x").path == "direct"
    assert cached(store, "x") == cached(store, "grows") == 0
    store.get("before")
    store.get("after")
    assert cached(store, "before") == cached(store, "after") == 2 * MIB
    assert cached(store, "x") == cached(store, "grows") == 0
    # And when the device has to be read for them.
    for key in ("before", "after"):
        info = store.info(key)
        store._device.drop_cached(info.offset, info.extent_bytes)
        store.get(key)
        assert cached(store, key) == 2 * MIB
    assert cached(store, "x") == cached(store, "grows") == 0


def test_page_cached_tensors_stay_in_it(store: dualblade.TensorStore) -> None:
    store.put("x", noise(2 * MIB))
    assert store.info("x").path == "pagecache"
    assert cached(store, "x") == 2 * MIB
    before = store.stats()["paths"]["direct"]
    np.testing.assert_array_equal(store.get("x"), noise(2 * MIB))
    assert store.stats()["paths"]["direct"] == before


def test_a_group_that_goes_direct_leaves_the_page_cache(store: dualblade.TensorStore) -> None:
    store.put("k", noise(2 * MIB), group="layer")
    store.reserve("v", (2 * MIB,), "uint8", group="layer")
    store.append("v", noise(MIB + 5000, 1))
    store.put("other", noise(MIB, 2))
    assert cached(store, "k") == 2 * MIB
    places = {key: store.info(key).offset for key in store.keys()}
    store.set_path("layer", "direct")
    assert cached(store, "k") == cached(store, "v") == 0
    assert cached(store, "other") == MIB
    np.testing.assert_array_equal(store.get("k"), noise(2 * MIB))
    np.testing.assert_array_equal(store.get("v"), noise(MIB + 5000, 1))
    store.append("v", noise(CHUNK, 3))
    assert cached(store, "k") == cached(store, "v") == 0

    store.set_path("layer", "pagecache")
    np.testing.assert_array_equal(store.get("k"), noise(2 * MIB))
    expected = np.concatenate([noise(MIB + 5000, 1), noise(CHUNK, 3)])
    np.testing.assert_array_equal(store.get("v"), expected)
    assert cached(store, "k") == 2 * MIB
    assert {key: store.info(key).offset for key in store.keys()} == places
    assert store.check() == []


def test_what_was_dirty_is_on_the_device_before_it_is_dropped(
    store: dualblade.TensorStore,
) -> None:
    store.put("x", noise(4 * MIB))
    for i in range(4):
        store.put("x", noise(4 * MIB, i))
        store.set_path("x", "direct")
        assert (cached(store, "x"), dirty(store, "x")) == (0, 0)
        np.testing.assert_array_equal(store.get("x"), noise(4 * MIB, i))
        store.set_path("x", "pagecache")


def test_a_path_change_waits_for_what_is_under_way(store: dualblade.TensorStore) -> None:
    """Started on the old path, and not finished: of these too nothing stays cached."""
    store.put("x", noise(MIB), group="g")
    tickets = [store.put_async(f"y{i}", noise(MIB, i), group="g") for i in range(4)]
    tickets += [store.get_async("x") for _ in range(4)]
    store.set_path("g", "direct")
    assert all(ticket.done() for ticket in tickets)
    for key in store.keys():
        assert store.info(key).path == "direct"
        assert cached(store, key) == 0
    for i in range(4):
        np.testing.assert_array_equal(store.get(f"y{i}"), noise(MIB, i))


def test_an_extent_used_again_on_the_other_path_holds_the_new_bytes(
    store: dualblade.TensorStore,
) -> None:
    """What the page cache kept of a deleted tensor is neither read nor written back later."""
    for i in range(6):
        store.put("x", noise(2 * MIB, i))
        place = store.info("x").offset
        store.delete("x")
        store.reserve("hold", (0,), "uint8", group="other")
        store.put("z", noise(2 * MIB, 100 + i), group="other")
        store.set_path("other", ("direct", "pagecache")[i % 2])
        assert store.info("z").offset == place
        store.flush()
        np.testing.assert_array_equal(store.get("z"), noise(2 * MIB, 100 + i))
        store.set_path("other", ("pagecache", "direct")[i % 2])
        np.testing.assert_array_equal(store.get("z"), noise(2 * MIB, 100 + i))
        store.delete_many(["z", "hold"])


@pytest.mark.parametrize("size", [1, 8192, 100_000])
def test_what_lies_where_one_large_tensor_was_is_dropped_too(
    store: dualblade.TensorStore, size: int
) -> None:
    """The page cache holds large pieces, and may still hold one that spans several tensors."""
    store.put("old", noise(3 * MIB))
    store.delete("old")
    for i in range(4):
        store.put(f"x{i}", noise(size, i))
    store.set_path("x1", "direct")
    assert cached(store, "x1") == 0
    for i in range(4):
        np.testing.assert_array_equal(store.get(f"x{i}"), noise(size, i))


def test_paths_change_under_readers_and_writers(store: dualblade.TensorStore) -> None:
    rows = noise(4000 * 500).reshape(4000, 500)
    store.reserve("rows", rows.shape, "uint8", group="g")
    store.put("x", noise(MIB), group="g")
    ended = threading.Event()

    def move() -> int:
        count = 0
        while not ended.is_set():
            store.set_path("g", ("direct", "pagecache")[count % 2])
            count += 1
        return count

    def append() -> None:
        start = 0
        for size in [1, 3, 200, 7, 16, 333] * 5:
            store.append("rows", rows[start : start + size])
            start += size

    def read() -> None:
        for _ in range(60):
            found = store.get("rows")
            np.testing.assert_array_equal(found, rows[: len(found)])
            np.testing.assert_array_equal(store.get("x"), noise(MIB))

    def put() -> None:
        for i in range(30):
            store.put("y", noise(CHUNK, i), group="g")
            np.testing.assert_array_equal(store.get("y"), noise(CHUNK, i))

    with ThreadPoolExecutor(5) as pool:
        moving = pool.submit(move)
        works = [pool.submit(work) for work in (append, read, read, put)]
        try:
            for work in works:
                work.result(TIMEOUT_S)
        finally:
            ended.set()
        assert moving.result(TIMEOUT_S) > 0
    np.testing.assert_array_equal(store.get("rows"), rows[: 560 * 5])
    assert store.check() == []
    store.set_path("g", "direct")
    assert [cached(store, key) for key in ("rows", "x", "y")] == [0, 0, 0]


def test_a_path_that_is_none_is_refused(tmp_path: Path) -> None:
    with dualblade.open(tmp_path / "kv.img", size="4MiB") as store:
        store.put("x", noise(10), group="g")
        with pytest.raises(ValueError, match="'sideways' is unknown"):
            store.set_path("g", "sideways")  # type: ignore[arg-type]
        with pytest.raises(dualblade.KeyNotFoundError, match="no group 'x'"):
            store.set_path("x", "direct")
