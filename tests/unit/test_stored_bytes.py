"""The memory budget counts what is stored: reservations that are mostly empty keep nobody out of
the page cache, and what grows past the budget leaves in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dualblade
from dualblade.residency import spread_order
from tests.helpers import MIB, Memory, noise, residency, until

LAYERS = 8
# Of a token in a layer: keys and values of 8 heads of 64 bytes each, so that a MiB is 1024 tokens.
SHAPE: dict[str, Any] = {"layers": LAYERS, "kv_heads": 8, "head_dim": 64, "dtype": "uint8"}
MIB_TOKENS = 1024


class Filled:
    """A KVCache, and what it should hold."""

    def __init__(self, store: dualblade.TensorStore, **options: Any) -> None:
        self.store = store
        self.cache = dualblade.KVCache(store, **SHAPE, **options)
        self.rows: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]

    def append(self, tokens: int, layer: int) -> None:
        rows = noise(tokens * 512, len(self.rows[layer])).reshape(tokens, 1, 8, 64)
        self.cache.append(layer, rows, rows ^ layer)
        self.rows[layer].append(rows)

    def append_all(self, tokens: int) -> None:
        for layer in range(LAYERS):
            self.append(tokens, layer)

    def check(self) -> None:
        for layer in range(LAYERS):
            keys, values = self.cache.fetch(layer)
            expected = np.concatenate(self.rows[layer])
            np.testing.assert_array_equal(keys, expected)
            np.testing.assert_array_equal(values, expected ^ layer)

    def cached(self) -> list[int]:
        name = self.cache.name
        paths = [self.store.path_of(f"{name}/{layer:03d}") for layer in range(LAYERS)]
        return [layer for layer, path in enumerate(paths) if path == "pagecache"]


@contextmanager
def kept_within_the_budget(store: dualblade.TensorStore) -> Iterator[None]:
    """Looks all the time whether page-cached tensors keep the budget."""
    ended = threading.Event()
    most = 0

    def look() -> None:
        nonlocal most
        while not ended.wait(0.0002):
            most = max(most, store._residency.pagecache_bytes - store.memory_budget)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield
    finally:
        ended.set()
        looking.join()
    assert most <= 0


def looks(store: dualblade.TensorStore, count: int) -> None:
    """Returns when the memory has been looked at so often."""
    seen = residency(store)["samples"]
    until(lambda: residency(store)["samples"] >= seen + count, "nobody looks")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups count by what is stored soon after they were last filled."""
    monkeypatch.setattr("dualblade.watcher.SETTLE_S", 0.2)


# ---- reservations that are mostly empty ----------------------------------------------------------


def test_a_cache_that_is_an_eighth_full_is_page_cached_whole(
    memory: Memory, path: Path, quick: None
) -> None:
    memory.free_bytes = (16 + 40) * MIB
    with dualblade.open(path, size="512MiB") as store:
        kv = Filled(store, max_tokens=8 * 4 * MIB_TOKENS)  # 32 MiB a layer, of which 4 are stored
        assert len(kv.cached()) == 1
        kv.append_all(4 * MIB_TOKENS)
        until(lambda: kv.cached() == list(range(LAYERS)), "what fits stays away")
        kv.check()
        told = residency(store)
        assert told["pagecache_bytes"] == told["claimed_bytes"] == 32 * MIB
        assert told["budget_bytes"] == 40 * MIB
        # It grows: there is room for 8 MiB, and then for a layer less, and again.
        with kept_within_the_budget(store):
            for _ in range(20):
                kv.append_all(MIB_TOKENS // 2)
        assert 0 < len(kv.cached()) <= 40 // 14
        kv.check()
        assert residency(store)["problems"] == 0
        left = set(range(LAYERS)).difference(kv.cached())
        for layer in left:
            for key in (f"{kv.cache.name}/{layer:03d}/{which}" for which in "kv"):
                info = store.info(key)
                assert store._device.cached_bytes(info.offset, info.extent_bytes) == (0, 0)
        kv.cache.close()


def test_those_that_grow_leave_in_the_order_of_the_binding(path: Path) -> None:
    """Also where the memory is not followed."""
    with dualblade.open(path, size="512MiB", live=False, memory="40MiB") as store:
        for i in range(LAYERS):
            store.reserve(f"k{i}", (32 * MIB,), "uint8", group=f"g{i}")
            store.append(f"k{i}", noise(4 * MIB, i))
        assert [i for i in range(LAYERS) if store.path_of(f"g{i}") == "pagecache"] == [0]
    # What is found when it is opened counts by what it is.
    with dualblade.open(path, live=False, memory="40MiB") as store:
        cached = list(range(LAYERS))
        assert [i for i in range(LAYERS) if store.path_of(f"g{i}") == "pagecache"] == cached
        assert store.stats()["pagecache_bytes"] == 32 * MIB
        gone: list[int] = []
        with kept_within_the_budget(store):
            for turn in range(12):
                for i in range(LAYERS):
                    store.append(f"k{i}", noise(MIB, 100 * turn + i))
                    now = [i for i in range(LAYERS) if store.path_of(f"g{i}") == "pagecache"]
                    gone += [i for i in cached if i not in now]
                    cached = now
        order = list(spread_order(LAYERS))
        assert gone == order[: -len(gone) - 1 : -1]
        assert len(gone) == LAYERS - 2  # of 16 MiB each
        for i in range(LAYERS):
            parts = [noise(4 * MIB, i), *(noise(MIB, 100 * turn + i) for turn in range(12))]
            np.testing.assert_array_equal(store.get(f"k{i}"), np.concatenate(parts))
            info = store.info(f"k{i}")
            if i in gone:
                assert store._device.cached_bytes(info.offset, info.extent_bytes) == (0, 0)
        assert store.check() == []


def test_layers_that_double_keep_their_place(path: Path) -> None:
    with dualblade.open(path, size="512MiB", live=False, memory="40MiB") as store:
        kv = Filled(store, max_tokens=4 * MIB_TOKENS)
        kv.append_all(4 * MIB_TOKENS - 100)
        assert kv.cached() == list(range(LAYERS))
        with kept_within_the_budget(store):
            kv.append_all(200)
        assert kv.cache.stats()["grown"] == LAYERS
        assert kv.cached() == list(range(LAYERS))
        kv.check()
        kv.cache.close()


def test_a_reservation_that_is_filled_moves_nothing(memory: Memory, path: Path) -> None:
    """Piece by piece, with pauses: what it was bound to at first stays right."""
    memory.free_bytes = (16 + 33) * MIB
    with dualblade.open(path, size="256MiB") as store:
        kv = Filled(store, max_tokens=8 * MIB_TOKENS)
        bound = kv.cached()
        assert len(bound) == 4
        with kept_within_the_budget(store):
            for _ in range(8):
                kv.append_all(MIB_TOKENS)
                looks(store, 3)
        assert kv.cached() == bound
        told = residency(store)
        assert (told["moves_to_direct"], told["moves_to_pagecache"]) == (0, 0)
        kv.check()
        kv.cache.close()


def test_a_path_that_is_asked_for_needs_room_for_what_is_stored(path: Path) -> None:
    with dualblade.open(path, size="256MiB", live=False, memory="8MiB") as store:
        store.reserve("x", (64 * MIB,), "uint8")
        with pytest.raises(ValueError, match="64 MiB, and of the memory budget of 8 MiB"):
            store.set_path("x", "pagecache")
        store.append("x", noise(3 * MIB))
        store.set_path("x", "pagecache")
        assert store.stats()["pagecache_bytes"] == 3 * MIB
        store.append("x", noise(5 * MIB, 1))
        assert store.path_of("x") == "pagecache"
        store.append("x", noise(1, 2))
        assert store.path_of("x") == "direct"
        expected = np.concatenate([noise(3 * MIB), noise(5 * MIB, 1), noise(1, 2)])
        np.testing.assert_array_equal(store.get("x"), expected)


# ---- less again ----------------------------------------------------------------------------------


def test_what_is_cut_off_gives_its_room_back(memory: Memory, path: Path, quick: None) -> None:
    memory.free_bytes = (16 + 12) * MIB
    with dualblade.open(path, size="256MiB") as store:
        for name in "ab":
            store.reserve(name, (64 * MIB,), "uint8")
            store.append(name, noise(8 * MIB))
        until(lambda: store.stats()["pagecache_bytes"] == 8 * MIB, "none comes")
        (cached,) = (name for name in "ab" if store.path_of(name) == "pagecache")
        place = store.info(cached).offset
        store.truncate(cached, MIB + 1)
        kept = MIB + 4096
        assert store.stats()["groups"][cached]["stored_bytes"] == kept
        until(
            lambda: store._device.cached_bytes(place + kept, 7 * MIB - 4096)[0] == 0,
            "what was cut off stays in the page cache",
        )
        until(lambda: store.stats()["pagecache_bytes"] == kept + 8 * MIB, "nobody takes the room")
        for _ in range(3):
            store.append(cached, noise(MIB, 1))
            store.truncate(cached, MIB + 1)
        np.testing.assert_array_equal(store.get(cached), noise(8 * MIB)[: MIB + 1])


def test_what_is_appended_again_stays_in_the_page_cache(memory: Memory, path: Path) -> None:
    memory.free_bytes = (16 + 64) * MIB
    with dualblade.open(path, size="256MiB") as store:
        store.reserve("x", (32 * MIB,), "uint8")
        for i in range(10):
            store.append("x", noise(16 * MIB, i))
            if i < 9:
                store.truncate("x", 0)
        looks(store, 3)
        store.get("x")
        assert store._device.cached_bytes(store.info("x").offset, 16 * MIB)[0] == 16 * MIB
        np.testing.assert_array_equal(store.get("x"), noise(16 * MIB, 9))


@pytest.mark.parametrize("live", [True, False])
def test_groups_that_are_gone_leave_nothing_behind(path: Path, live: bool) -> None:
    with dualblade.open(path, size="64MiB", live=live, memory="16MiB") as store:
        for i in range(20):
            store.reserve(f"k{i}", (MIB,), "uint8")
            store.append(f"k{i}", noise(10_000))
            store.delete(f"k{i}")
        assert not store._residency.groups
        assert not store._residency.filling


# ---- when many grow ------------------------------------------------------------------------------


def count_surveys(store: dualblade.TensorStore, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An element for each look at all groups from now on."""
    surveys: list[None] = []
    survey = store._survey

    def counted(*arguments: Any) -> Any:
        surveys.append(None)
        return survey(*arguments)

    monkeypatch.setattr(store, "_survey", counted)
    return surveys


def test_small_groups_leave_many_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An append within the budget looks at no other group, one past it makes room for the next."""
    count = 1000
    names = [f"k{i}" for i in range(count)]
    with dualblade.open(path, size="64MiB", live=False, memory="4MiB") as store:
        for i, name in enumerate(names):
            store.reserve(name, (2, 4096), "uint8")
            store.append(name, noise(4096, i)[None])
    with dualblade.open(path, live=False, memory="4MiB") as store:
        assert all(store.path_of(name) == "pagecache" for name in names)
        surveys = count_surveys(store, monkeypatch)
        with kept_within_the_budget(store):
            for i, name in enumerate(names):
                store.append(name, noise(4096, i)[None])
                if i < 24:  # 1024 pages
                    assert not surveys
        assert 0 < len(surveys) <= count // 16 + 1
        for i, name in enumerate(names):
            np.testing.assert_array_equal(store.get(name), np.stack([noise(4096, i)] * 2))
        assert len([name for name in names if store.path_of(name) == "pagecache"]) >= 490


def test_many_that_append_at_once_keep_the_budget(path: Path) -> None:
    count, pieces = 12, 40
    with dualblade.open(path, size="256MiB", live=False, memory="8MiB") as store:
        for i in range(count):
            store.reserve(f"k{i}", (16 * MIB,), "uint8")
            store.append(f"k{i}", noise(10_000, i))
    with dualblade.open(path, live=False, memory="8MiB") as store:

        def grow(i: int) -> None:
            for piece in range(pieces):
                rows = noise(100_000, 1000 * i + piece)
                if i % 2:
                    store.append_many_async({f"k{i}": rows}).result()
                else:
                    store.append(f"k{i}", rows)

        with kept_within_the_budget(store), ThreadPoolExecutor(count) as pool:
            list(pool.map(grow, range(count)))
        cached = [i for i in range(count) if store.path_of(f"k{i}") == "pagecache"]
        assert 0 < len(cached) < count
        for i in range(count):
            parts = [noise(100_000, 1000 * i + piece) for piece in range(pieces)]
            expected = np.concatenate([noise(10_000, i), *parts])
            np.testing.assert_array_equal(store.get(f"k{i}"), expected)
        stored = {i: -(-len(store.get(f"k{i}")) // 4096) * 4096 for i in cached}
        assert store.stats()["pagecache_bytes"] == sum(stored.values())


def test_what_is_looked_at_grows_past_the_budget(path: Path) -> None:
    """It can't leave, and who appends does not wait for the views."""
    with dualblade.open(path, size="64MiB", live=False, memory="4MiB") as store:
        store.reserve("x", (4 * MIB,), "uint8")
        store.reserve("y", (4 * MIB,), "uint8")
        store.append("x", noise(2 * MIB))
        store.append("y", noise(MIB))
        store.set_path("x", "pagecache")
        store.set_path("y", "pagecache")
        view = store.view("x")
        store.append("x", noise(2 * MIB, 1))
        assert store.path_of("x") == "pagecache"
        assert store.path_of("y") == "direct"
        store.resize("y", 8 * MIB)
        store.put("z", noise(8192), group="x")
        store.delete("y")
        with pytest.raises(dualblade.LiveViewError):
            store.set_path("x", "direct")
        np.testing.assert_array_equal(view, noise(2 * MIB))
        del view
        expected = np.concatenate([noise(2 * MIB), noise(2 * MIB, 1)])
        np.testing.assert_array_equal(store.get("x"), expected)


def test_views_that_are_gone_keep_nobody_in_the_page_cache(path: Path) -> None:
    with dualblade.open(path, size="64MiB", live=False, memory="4MiB") as store:
        store.reserve("x", (8 * MIB,), "uint8")
        store.append("x", noise(3 * MIB))
        store.set_path("x", "pagecache")
        view = store.view("x")
        np.testing.assert_array_equal(view, noise(3 * MIB))
        del view
        store.append("x", noise(2 * MIB, 1))
        assert store.path_of("x") == "direct"


def test_nobody_looks_again_and_again_who_can_leave(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100,000 groups a look takes a second."""
    monkeypatch.setattr("dualblade.rebinding.WAY_REST", 1_000_000)
    with dualblade.open(path, size="64MiB", live=False, memory="1MiB") as store:
        store.reserve("x", (8 * MIB,), "uint8")
        store.append("x", noise(MIB))
        store.set_path("x", "pagecache")
        view = store.view("x")
        surveys = count_surveys(store, monkeypatch)
        for i in range(20):
            store.append("x", noise(4096, i))
        assert len(surveys) == 1
        np.testing.assert_array_equal(view, noise(MIB))
        del view
        store.append("x", noise(4096, 20))
        assert store.path_of("x") == "direct"
