"""What KVCache reads ahead: which layers, in how much memory, and whatever happens meanwhile."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dualblade
from dualblade import _core
from dualblade.errors import DeviceError
from tests.helpers import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dualblade import KVCache, TensorStore

SHAPE = {"kv_heads": 2, "head_dim": 64, "dtype": "float16"}
ROW_BYTES = 256  # of the keys of a token, and of its values


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TensorStore]:
    path = tmp_path / "kv.img"
    with dualblade.open(path, size=160 * MIB, memory=64 * MIB, live=False) as opened:
        yield opened


def rows(tokens: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << 16, (tokens, 1, 2, 64), np.uint16).view(np.float16)


def filled(store: TensorStore, paths: str, tokens: int, **options: object) -> KVCache:
    """A cache with a layer for each letter: D on the direct path, C page-cached."""
    kv = dualblade.KVCache(store, len(paths), **SHAPE, max_tokens=tokens + 64, **options)
    for layer, path in enumerate(paths):
        store.set_path(f"{kv.name}/{layer:03d}", "direct" if path == "D" else "pagecache")
        kv.append(layer, rows(tokens, layer), rows(tokens, -1 - layer + 1000))
    store.flush()
    return kv


def under_way(kv: KVCache) -> set[int]:
    return set(kv._ahead._ahead)


# ---- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "ahead_of_0"),
    [
        ("DDDDDD", {1, 2}),
        ("CCCCCC", {1, 2}),
        ("CCCDCD", {3, 5, 1, 2}),
        ("CCCCCD", {5, 1, 2}),
        ("DCCCCC", {0, 1, 2}),  # the only direct one is read for the next step already
        ("DD", {1, 0}),
    ],
)
def test_the_next_direct_layers_are_read_however_far_they_are(
    store: TensorStore, paths: str, ahead_of_0: set[int]
) -> None:
    with filled(store, paths, 100) as kv:
        kv.fetch(0)
        assert under_way(kv) == ahead_of_0


def test_the_drive_has_its_next_layer_before_the_one_waited_for_has_come(
    fault_device: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualblade.readahead.LOOKAHEAD_LAYERS", 1)
    device = fault_device(32 * MIB)
    with (
        dualblade.open(device.path, format=True, memory=16 * MIB, live=False) as store,
        filled(store, "CCDCD", 1000) as kv,
    ):
        kv.fetch(0)
        kv.fetch(1)
        info = store.info(f"{kv.name}/004/k")
        device.add_rule("read", "hold", lo=info.offset, hi=info.offset + info.extent_bytes)
        np.testing.assert_array_equal(kv.fetch(2)[0], rows(1000, 2))
        device.wait_held(1)
        np.testing.assert_array_equal(kv.fetch(3)[0], rows(1000, 3))
        assert kv.stats()["ahead_unused"] == 0
        device.release()
        np.testing.assert_array_equal(kv.fetch(4)[0], rows(1000, 4))


def test_a_jump_forgets_what_is_not_next_any_more(store: TensorStore) -> None:
    with filled(store, "DDDDDD", 100) as kv:
        kv.fetch(0)
        kv.fetch(3)
        assert under_way(kv) == {4, 5}
        assert kv.stats()["ahead_unused"] == 2


def test_a_layer_that_changed_its_path_is_not_read_twice(store: TensorStore) -> None:
    with filled(store, "CCCCDC", 100) as kv:
        kv.fetch(0)
        assert 4 in under_way(kv)
        store.set_path(f"{kv.name}/003", "direct")
        for layer in range(1, 6):
            np.testing.assert_array_equal(kv.fetch(layer)[0], rows(100, layer))
            if layer == 1:
                assert {3, 4} <= under_way(kv)
        assert kv.stats()["ahead_unused"] == 0


# ---- how much memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("paths", ["DDDDDDDD", "CCCCCCCC", "CDCCDDCD"])
@pytest.mark.parametrize(
    ("tokens", "least"),
    [
        (4000, 2 * 4000 * 2 * ROW_BYTES),  # 2 MiB: two layers
        (20000, 20000 * ROW_BYTES),  # 9.8 MiB: the keys alone
        (50000, 11 * MIB),  # 24 MiB: a part of the keys
    ],
)
def test_staging_memory_is_bounded(
    store: TensorStore, monkeypatch: pytest.MonkeyPatch, paths: str, tokens: int, least: int
) -> None:
    if 2 * tokens * ROW_BYTES * len(paths) > 140 * MIB:
        paths = paths[:3]
    limit = 8 * MIB if tokens <= 20000 else 12 * MIB - 512 * 1024
    monkeypatch.setattr("dualblade.readahead.STAGING_BYTES", limit)
    kv = dualblade.KVCache(store, len(paths), **SHAPE, max_tokens=tokens + 8)
    for layer, path in enumerate(paths):
        if path == "D":
            store.set_path(f"{kv.name}/{layer:03d}", "direct")
        kv.append(layer, rows(tokens, layer), rows(tokens, layer + 100))
    store.flush()
    with kv:
        for step in range(2):
            for layer in range(len(paths)):
                k, v = kv.fetch(layer)
                stats = kv.stats()
                assert stats["staging_limit_bytes"] == limit
                assert stats["ahead_bytes"] <= limit
                if "D" in paths and step:
                    assert stats["ahead_bytes"] >= least
                np.testing.assert_array_equal(k[:tokens], rows(tokens, layer))
                np.testing.assert_array_equal(v[:tokens], rows(tokens, layer + 100))
                del k, v
                kv.append(layer, rows(1, 1000 + step), rows(1, 2000 + step))
        for layer in range(len(paths)):
            expected = np.concatenate([rows(1, 2000 + step) for step in range(2)])
            np.testing.assert_array_equal(kv.fetch(layer)[1][tokens:], expected)


@pytest.mark.parametrize("paths", ["DDDDD", "CCCCC", "CCCDC"])
@pytest.mark.parametrize("is_held", [False, True])
def test_a_step_uses_the_same_memory_again(store: TensorStore, paths: str, is_held: bool) -> None:
    # No block fills up meanwhile: a layer with a write under way is not read ahead.
    with filled(store, paths, 9008) as kv:

        def step() -> None:
            k = v = None
            for layer in range(len(paths)):
                if not is_held:
                    del k, v  # what they take serves this fetch()
                k, v = kv.fetch(layer)
                kv.append(layer, rows(1, 1), rows(1, 2))

        for _ in range(3):
            step()
        store.flush()  # gives back what belongs to no array
        before = _core.counters()["buffers"]
        taken = kv.stats()["lent_bytes"] + kv.stats()["idle_bytes"]
        for _ in range(5):
            step()
        store.flush()
        assert _core.counters()["buffers"] <= before
        assert kv.stats()["lent_bytes"] + kv.stats()["idle_bytes"] == taken


def test_a_direct_layer_takes_no_more_than_itself_and_the_one_ahead(
    store: TensorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what the caller dropped, the next layers are made: keys and values, here and ahead."""
    monkeypatch.setattr("dualblade.readahead.STAGING_BYTES", 5 * MIB)
    monkeypatch.setattr("dualblade.readahead.STAGING_LEAST_BYTES", MIB)
    with filled(store, "DDDCCD", 9000) as kv:  # 4.4 MiB each
        before = _core.counters()["buffers"]
        for _ in range(3):
            for layer in range(6):
                k, v = kv.fetch(layer)
                del k, v
        assert _core.counters()["buffers"] - before <= 4


# ---- whatever happens meanwhile ------------------------------------------------------------------


def test_layers_change_their_path_at_any_time(store: TensorStore) -> None:
    tokens = 5000
    with filled(store, "CDCDCDCC", tokens) as kv:
        ended = threading.Event()
        problems: list[BaseException] = []

        def move() -> None:
            random = np.random.default_rng(1)
            try:
                while not ended.is_set():
                    path = str(random.choice(["direct", "pagecache"]))
                    store.set_path(f"{kv.name}/{random.integers(8):03d}", path)
            except BaseException as error:  # noqa: BLE001  shown by the assertion below
                problems.append(error)

        thread = threading.Thread(target=move)
        thread.start()
        try:
            for step in range(15):
                for layer in range(8):
                    k, v = kv.fetch(layer)
                    assert k.shape[0] == v.shape[0] == tokens + step
                    np.testing.assert_array_equal(k[:tokens], rows(tokens, layer))
                    for before in range(step):
                        np.testing.assert_array_equal(v[tokens + before], rows(1, before)[0])
                    kv.append(layer, rows(1, -step + 50), rows(1, step))
        finally:
            ended.set()
            thread.join()
        assert problems == []


def test_a_path_set_before_each_fetch(store: TensorStore) -> None:
    random = np.random.default_rng(2)
    with filled(store, "CDDC", 3000) as kv:
        for _ in range(40):
            for layer in range(4):
                group = f"{kv.name}/{random.integers(4):03d}"
                store.set_path(group, str(random.choice(["direct", "pagecache"])))
                k, v = kv.fetch(layer)
                np.testing.assert_array_equal(k, rows(3000, layer))
                np.testing.assert_array_equal(v, rows(3000, 999 - layer))
        assert kv.stats()["ahead_used"] == 159


def test_what_fails_ahead_is_raised_by_the_fetch_of_that_layer(fault_device: Callable) -> None:
    device = fault_device(32 * MIB)
    with (
        dualblade.open(device.path, format=True, memory=16 * MIB, live=False) as store,
        filled(store, "CCCDCD", 1000) as kv,
    ):
        info = store.info(f"{kv.name}/003/v")
        device.add_rule("read", "EIO", lo=info.offset, hi=info.offset + info.extent_bytes)
        for layer in (0, 1, 2):
            np.testing.assert_array_equal(kv.fetch(layer)[0], rows(1000, layer))
        with pytest.raises(DeviceError) as caught:
            kv.fetch(3)
        assert info.offset <= caught.value.offset < info.offset + info.extent_bytes
        for layer in (4, 5, 0):
            np.testing.assert_array_equal(kv.fetch(layer)[0], rows(1000, layer))
        device.clear()
        np.testing.assert_array_equal(kv.fetch(3)[1], rows(1000, 996))
