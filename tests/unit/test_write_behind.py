"""KVCache.append() while the drive is busy or fails: nothing waits, nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dualblade
from dualblade.errors import DeviceError
from tests.helpers import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dualblade import KVCache, TensorStore


def rows(tokens: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << 16, (tokens, 1, 2, 1024), np.uint16).view(np.float16)  # 4 KiB each


@pytest.fixture
def parts(fault_device: Callable) -> Iterator[tuple[Any, TensorStore, KVCache]]:
    device = fault_device(64 * MIB)
    with (
        dualblade.open(device.path, format=True, policy="direct") as store,
        dualblade.KVCache(store, 3, 2, 1024, max_tokens=2500) as kv,
    ):
        for layer in range(3):
            kv.append(layer, rows(8, layer), rows(8, 10 + layer))
        store.flush()
        yield device, store, kv


def check(kv: KVCache, layer: int, *added: int) -> None:
    k, v = kv.fetch(layer)
    expected = [rows(8, layer), *(rows(1, seed) for seed in added)]
    np.testing.assert_array_equal(k, np.concatenate(expected))
    expected[0] = rows(8, 10 + layer)
    np.testing.assert_array_equal(v, np.concatenate(expected))


def test_a_step_does_not_wait_for_its_writes(parts: tuple) -> None:
    device, _, kv = parts
    for layer in range(3):
        kv.fetch(layer)
    device.add_rule("write", "hold")
    row = rows(1, 99)
    for layer in range(3):
        kv.append(layer, row, row)
        row[:] = 0  # the caller's again
        row = rows(1, 99)
        check(kv, layer, 99)
    assert kv.stats()["behind_bytes"] == 3 * 2 * 4096
    device.wait_held(1)
    device.release()
    for layer in range(3):
        kv.append(layer, row, row)
        check(kv, layer, 99, 99)


def test_what_is_held_is_bounded(parts: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, kv = parts
    monkeypatch.setattr("dualblade.write_behind.BEHIND_BYTES", 4 * MIB)
    for count in (200, 700, 100, 300):  # the second is written before append() returns
        for layer in range(3):
            kv.append(layer, rows(count, count), rows(count, count + 1))
            assert kv.stats()["behind_bytes"] <= 4 * MIB
    for layer in range(3):
        k, v = kv.fetch(layer)
        counts = (200, 700, 100, 300)
        np.testing.assert_array_equal(k[8:], np.concatenate([rows(n, n) for n in counts]))
        np.testing.assert_array_equal(v[8:], np.concatenate([rows(n, n + 1) for n in counts]))


def test_what_can_not_be_written_is_bounded_too(
    parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, _, kv = parts
    monkeypatch.setattr("dualblade.write_behind.BEHIND_BYTES", MIB)
    device.add_rule("write", "EIO")
    kv.append(0, rows(100, 20), rows(100, 20))
    for layer in (1, 2):
        with pytest.raises(DeviceError, match="write"):
            kv.append(layer, rows(100, 20), rows(100, 20))
        assert kv.tokens(layer) == 8
    assert kv.stats()["behind_bytes"] == 200 * 4096
    device.clear()
    np.testing.assert_array_equal(kv.fetch(0)[0][8:], rows(100, 20))
    check(kv, 1)


def test_memory_for_prefill_goes_when_it_is_over(parts: tuple) -> None:
    _, _, kv = parts
    for layer in range(3):
        kv.append(layer, rows(200, 20), rows(200, 20))
    assert kv._behind._stage is not None
    for _ in range(2):
        for layer in range(3):
            kv.fetch(layer)
    assert kv._behind._stage is None


def test_an_error_comes_with_the_next_append_and_nothing_is_lost(parts: tuple) -> None:
    device, store, kv = parts
    info = store.info(f"{kv.name}/001/v")
    device.add_rule("write", "EIO", lo=info.offset, hi=info.offset + info.extent_bytes)
    kv.append(1, rows(1, 20), rows(1, 20))
    kv.append(0, rows(1, 20), rows(1, 20))
    check(kv, 0, 20)  # another layer has nothing to do with it
    for _ in range(2):
        with pytest.raises(DeviceError, match="write"):
            kv.append(1, rows(1, 21), rows(1, 21))
        assert kv.tokens(1) == 9
    device.clear()
    check(kv, 1, 20)
    kv.append(1, rows(1, 22), rows(1, 22))
    check(kv, 1, 20, 22)


def test_an_error_comes_with_a_fetch_that_has_to_read(parts: tuple) -> None:
    device, store, kv = parts
    info = store.info(f"{kv.name}/002/k")
    device.add_rule("write", "EIO", lo=info.offset, hi=info.offset + info.extent_bytes)
    kv.append(2, rows(1, 20), rows(1, 20))
    with pytest.raises(DeviceError, match="write"):
        kv.fetch(2)
    with pytest.raises(DeviceError, match="write"):
        kv.repeat_batch(2)
    device.clear()
    check(kv, 2, 20)


@pytest.mark.parametrize("keep", [8, 5, 0])
def test_what_could_not_be_written_can_be_given_up(parts: tuple, keep: int) -> None:
    device, store, kv = parts
    info = store.info(f"{kv.name}/001/k")
    device.add_rule("write", "EIO", lo=info.offset, hi=info.offset + info.extent_bytes)
    kv.append(1, rows(1, 20), rows(1, 20))
    kv.truncate(keep)
    assert kv.tokens(1) == keep
    np.testing.assert_array_equal(kv.fetch(1)[0], rows(8, 1)[:keep])
    device.clear()
    kv.append(1, rows(1, 21), rows(1, 21))
    np.testing.assert_array_equal(kv.fetch(1)[1][keep:], rows(1, 21))


def test_what_was_to_be_given_up_is_there_if_nothing_is_cut(parts: tuple) -> None:
    device, store, kv = parts
    info = store.info(f"{kv.name}/001/k")
    device.add_rule("write", "EIO", lo=info.offset, hi=info.offset + info.extent_bytes)
    kv.append(1, rows(1, 20), rows(1, 20))
    device.add_rule("read", "EIO", lo=info.offset, hi=info.offset + info.extent_bytes)
    with pytest.raises(DeviceError, match="read"):
        kv.truncate(5)
    assert kv.tokens(1) == 9
    device.clear()
    check(kv, 1, 20)


def test_closing_gives_it_up(parts: tuple) -> None:
    device, store, kv = parts
    device.add_rule("write", "EIO")
    for layer in range(3):
        kv.append(layer, rows(1, 20), rows(1, 20))
    kv.close()
    assert len(store) == 0
    device.clear()
