"""KVCache: what callers may pass, what it costs, and what a full or failing store does to it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dualblade
from dualblade import _core
from dualblade.errors import ClosedError, CorruptionError, DeviceError, NoSpaceError
from tests.helpers import MIB, overwrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dualblade import KVCache, TensorStore

SHAPE = {"kv_heads": 2, "head_dim": 32}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TensorStore]:
    with dualblade.open(tmp_path / "kv.img", size=64 * MIB, policy="direct") as opened:
        yield opened


@pytest.fixture
def kv(store: TensorStore) -> Iterator[KVCache]:
    with dualblade.KVCache(store, layers=3, **SHAPE, batch=2, max_tokens=64) as cache:
        yield cache


def rows(tokens: int, seed: int = 0, batch: int = 2, dim: int = 32) -> np.ndarray:
    rng = np.random.default_rng(abs(seed) + (seed < 0) * 1000)
    return rng.standard_normal((tokens, batch, 2, dim)).astype(np.float16)


def writes(store: TensorStore) -> int:
    return sum(path["write_bytes"] for path in store.stats()["paths"].values())


# ---- what goes in comes out ----------------------------------------------------------------------


def test_tokens_of_a_layer_come_back(kv: KVCache) -> None:
    kv.append(1, rows(5, 1), rows(5, 2))
    kv.append(1, rows(1, 3), rows(1, 4))
    k, v = kv.fetch(1)
    np.testing.assert_array_equal(k, np.concatenate([rows(5, 1), rows(1, 3)]))
    np.testing.assert_array_equal(v, np.concatenate([rows(5, 2), rows(1, 4)]))
    np.testing.assert_array_equal(kv.fetch(1, start=4)[0], k[4:])
    assert [kv.tokens(layer) for layer in range(3)] == [0, 6, 0]
    assert kv.length == 0
    assert kv.fetch(0)[1].shape == (0, 2, 2, 32)


def test_torch_tensors_of_any_strides(store: TensorStore) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with dualblade.KVCache(store, layers=1, **SHAPE, dtype=torch.bfloat16, batch=2) as kv:
        states = torch.randn(2, 2, 7, 32).to(torch.bfloat16)  # [batch, heads, tokens, dim]
        kv.append(0, states.permute(2, 0, 1, 3), states.permute(2, 0, 1, 3).flip(0))
        k, v = kv.fetch(0)
        found = torch.from_numpy(k.view(np.int16)).view(torch.bfloat16)
        assert torch.equal(found.permute(1, 2, 0, 3), states)
        np.testing.assert_array_equal(v[::-1], k)


def test_strided_numpy_arrays(kv: KVCache) -> None:
    wide = rows(10, dim=64)
    kv.append(0, wide[::2, :, :, ::2], wide[::-2, :, :, 32:])
    k, v = kv.fetch(0)
    np.testing.assert_array_equal(k, wide[::2, :, :, ::2])
    np.testing.assert_array_equal(v, wide[::-2, :, :, 32:])


def test_layers_may_differ(store: TensorStore) -> None:
    with dualblade.KVCache(store, layers=0, dtype="float32") as kv:
        assert kv.add_layer(1, 8) == 0
        assert kv.add_layer(4, 16, value_dim=24, dtype="float16", window=3) == 1
        k = np.arange(10 * 64, dtype=np.float16).reshape(10, 1, 4, 16)
        v = np.arange(10 * 96, dtype=np.float16).reshape(10, 1, 4, 24)
        for token in range(10):
            kv.append(1, k[token : token + 1], v[token : token + 1])
            found = kv.fetch(1)
            np.testing.assert_array_equal(found[0], k[max(0, token - 2) : token + 1])
            np.testing.assert_array_equal(found[1], v[max(0, token - 2) : token + 1])
        assert kv.tokens(1) == 10
        np.testing.assert_array_equal(kv.fetch(1, start=0)[0], k)
        with pytest.raises(ValueError, match="batch 3 does not fit"):
            kv.add_layer(1, 8, batch=3)


def test_keys_and_values_lie_in_one_run_and_one_group(store: TensorStore) -> None:
    with dualblade.KVCache(store, layers=2, **SHAPE, max_tokens=100, name="chat") as kv:
        assert store.keys() == ["chat/000/k", "chat/000/v", "chat/001/k", "chat/001/v"]
        k, v = store.info("chat/001/k"), store.info("chat/001/v")
        assert k.offset + k.extent_bytes == v.offset
        assert k.group == v.group == "chat/001"
        assert k.capacity == (100, 1, 2, 32)
        assert kv.stats()["name"] == "chat"


def test_fetched_arrays_are_the_callers(kv: KVCache) -> None:
    held = []
    for token in range(20):
        for layer in range(3):
            kv.append(layer, rows(1, token), rows(1, -token % 7))
            held.append((token, *kv.fetch(layer)))
    kv.close()
    whole = np.concatenate([rows(1, token) for token in range(20)])
    for token, k, _ in held:
        np.testing.assert_array_equal(k, whole[: token + 1])


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "v", "error", "words"),
    [
        (rows(3, batch=1), rows(3), ValueError, "^k: .*2, 2, 32"),
        (rows(3), rows(3)[0], ValueError, "^v: "),
        (rows(3), rows(2), ValueError, "k has 3 tokens and v 2"),
        (rows(3), rows(3).astype(np.float32), TypeError, "^v: .*float32"),
        (rows(3).tolist(), rows(3), TypeError, "^k: "),
    ],
    ids=["batch", "axes", "counts", "dtype", "list"],
)
def test_what_does_not_fit_changes_nothing(
    kv: KVCache, store: TensorStore, k: object, v: object, error: type[Exception], words: str
) -> None:
    kv.append(0, rows(4, 1), rows(4, 2))
    with pytest.raises(error, match=words):
        kv.append(0, k, v)
    assert kv.tokens(0) == 4
    assert {store.info(key).rows for key in store.keys(f"{kv.name}/000")} == {4}
    np.testing.assert_array_equal(kv.fetch(0)[1], rows(4, 2))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": -1}, ValueError, "layers"),
        ({"layers": 1.5}, TypeError, "layers"),
        ({"kv_heads": 0}, ValueError, "kv_heads"),
        ({"head_dim": "128"}, TypeError, "head_dim"),
        ({"value_dim": 0}, ValueError, "value_dim"),
        ({"batch": 0}, ValueError, "batch"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"lookahead": -1}, ValueError, "lookahead"),
        ({"dtype": object}, TypeError, "object"),
        ({"dtype": "float17"}, TypeError, "float17"),
    ],
)
def test_bad_options(store: TensorStore, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        dualblade.KVCache(store, **options)
    assert len(store) == 0


def test_bad_calls(kv: KVCache) -> None:
    kv.append(0, rows(4), rows(4))
    for layer in (3, -1):
        with pytest.raises(IndexError, match="3 layers"):
            kv.fetch(layer)
    with pytest.raises(ValueError, match="past the 4 tokens"):
        kv.fetch(0, start=5)
    with pytest.raises(ValueError, match="tokens"):
        kv.truncate(-1)
    for index in ([0], [0, 1, 1], [0, 2], [-1, 0], []):
        with pytest.raises(ValueError, match="index"):
            kv.reorder(index)
    with pytest.raises(ValueError, match="no sequences"):
        kv.select_batch([])
    for index in ([0.0, 1.0], [True, False], [[0, 1]]):
        with pytest.raises(TypeError, match="whole numbers"):
            kv.select_batch(index)
    with pytest.raises(ValueError, match="window"):
        kv.add_layer(2, 32, window=0)
    np.testing.assert_array_equal(kv.fetch(0)[0], rows(4))


def test_two_caches_of_one_name(store: TensorStore, kv: KVCache) -> None:
    with pytest.raises(ValueError, match="another name"):
        dualblade.KVCache(store, layers=1, **SHAPE, name=kv.name)
    assert len(store) == 6


# ---- a full store --------------------------------------------------------------------------------


def test_a_cache_that_does_not_fit_leaves_nothing(store: TensorStore) -> None:
    free = store.stats()["free_bytes"]
    with pytest.raises(NoSpaceError):
        dualblade.KVCache(store, layers=8, **SHAPE, max_tokens=65536)  # 8 x 16 MiB
    assert len(store) == 0
    assert store.stats()["free_bytes"] == free


def test_a_cache_grows_until_the_store_is_full(store: TensorStore) -> None:
    with dualblade.KVCache(store, layers=1, **SHAPE, batch=2, max_tokens=8) as kv:
        part = rows(4096)
        with pytest.raises(NoSpaceError):
            for _ in range(100):
                kv.append(0, part, part)
        tokens = kv.tokens(0)
        assert tokens >= 3 * 4096
        assert tokens % 4096 == 0
        k, v = kv.fetch(0)
        assert k.shape == v.shape == (tokens, 2, 2, 32)
        for first in range(0, tokens, 4096):
            np.testing.assert_array_equal(k[first : first + 4096], part)
        kv.truncate(10)
        kv.append(0, rows(1, 5), rows(1, 6))
        np.testing.assert_array_equal(kv.fetch(0)[1], np.concatenate([part[:10], rows(1, 6)]))


def test_a_prompt_longer_than_what_was_laid_out(store: TensorStore) -> None:
    with dualblade.KVCache(store, layers=1, **SHAPE, batch=2, max_tokens=None) as kv:
        capacity = store.info(f"{kv.name}/000/k").capacity[0]
        kv.append(0, rows(5 * capacity), rows(5 * capacity))
        assert store.info(f"{kv.name}/000/v").capacity[0] == 8 * capacity
        assert kv.stats()["grown"] == 1
        np.testing.assert_array_equal(kv.fetch(0)[0], rows(5 * capacity))


def test_a_batch_that_cannot_be_repeated_stays(store: TensorStore) -> None:
    with dualblade.KVCache(store, layers=2, **SHAPE, batch=2, max_tokens=16384) as kv:  # 16 MiB
        kv.append(0, rows(50, 1), rows(50, 2))
        free = store.stats()["free_bytes"]
        with pytest.raises(NoSpaceError):
            kv.repeat_batch(4)
        assert kv.batch == 2
        assert store.stats()["free_bytes"] == free
        assert len(store) == 4
        np.testing.assert_array_equal(kv.fetch(0)[1], rows(50, 2))
        kv.select_batch([1])
        np.testing.assert_array_equal(kv.fetch(0)[1], rows(50, 2)[:, [1]])


# ---- reading ahead -------------------------------------------------------------------------------


def decode(kv: KVCache, steps: int) -> None:
    for step in range(steps):
        for layer in range(len(kv)):
            kv.append(layer, rows(1, step), rows(1, step))
            kv.fetch(layer)


def test_each_layer_is_read_once_a_step(kv: KVCache, store: TensorStore) -> None:
    for layer in range(3):
        kv.append(layer, rows(40), rows(40))
    decode(kv, 10)
    stats = kv.stats()
    assert stats["fetches"] == 30
    # All but the first, and those of which the last token is still being written.
    assert 20 <= stats["ahead_used"] <= 29
    assert stats["ahead_unused"] == 0
    assert 0 <= stats["ahead_started"] - stats["ahead_used"] <= 2


@pytest.mark.parametrize(("lookahead", "used"), [(0, 0), (1, 27), (2, 27), (9, 27)])
def test_lookahead_is_the_callers_choice(store: TensorStore, lookahead: int, used: int) -> None:
    with dualblade.KVCache(store, layers=3, **SHAPE, batch=2, lookahead=lookahead) as kv:
        decode(kv, 10)  # in the first step only the first layer has anything to be read ahead
        # A layer of which a token is still being written is not read ahead.
        assert used * 2 // 3 <= kv.stats()["ahead_used"] <= used


def test_of_layers_too_large_for_the_staging_memory_a_part_is_read_ahead(tmp_path: Path) -> None:
    with (
        dualblade.open(tmp_path / "kv.img", size=256 * MIB, memory=MIB) as store,
        dualblade.KVCache(store, layers=4, **SHAPE, batch=2, max_tokens=65536) as kv,
    ):
        limit = kv.stats()["staging_limit_bytes"]
        assert 4 * MIB <= limit < 8 * MIB
        tokens = 30000  # keys of 7.3 MiB
        for layer in range(4):
            kv.append(layer, rows(tokens, layer), rows(tokens, -layer))
        store.flush()
        for step in range(2):
            for layer in range(4):
                k, v = kv.fetch(layer)
                assert 4 * MIB - 256 * 1024 <= kv.stats()["ahead_bytes"] <= limit
                kv.append(layer, rows(1, step), rows(1, step + 5))
                added = [rows(1, 5 * which + before) for which in (0, 1) for before in range(step)]
                expected_k = np.concatenate([rows(tokens, layer), *added[:step]])
                expected_v = np.concatenate([rows(tokens, -layer), *added[step:]])
                np.testing.assert_array_equal(k, expected_k)
                np.testing.assert_array_equal(v, expected_v)
                del k, v
        assert 4 <= kv.stats()["ahead_used"] <= 7  # not while a token is being written


def test_a_warm_decode_maps_no_memory(kv: KVCache) -> None:
    for layer in range(3):
        # The sizes of the next steps are rounded to the same.
        kv.append(layer, rows(208), rows(208))
    decode(kv, 3)
    before = _core.counters()["buffers"]
    idle = kv.stats()["idle_bytes"] + kv.stats()["lent_bytes"]
    decode(kv, 10)
    assert _core.counters()["buffers"] == before
    assert kv.stats()["idle_bytes"] + kv.stats()["lent_bytes"] == idle


def test_memory_that_nobody_uses_is_bounded(tmp_path: Path) -> None:
    with (
        dualblade.open(tmp_path / "kv.img", size=64 * MIB, memory=8 * MIB) as store,
        dualblade.KVCache(store, layers=1, **SHAPE, batch=2, max_tokens=8192) as kv,
    ):
        kv.append(0, rows(2000), rows(2000))  # 1 MiB with the values
        held = [kv.fetch(0) for _ in range(16)]
        assert kv.stats()["lent_bytes"] >= 16 * MIB
        held.clear()
        assert MIB <= kv.stats()["idle_bytes"] <= 2 * MIB
        kv.append(0, rows(6000), rows(6000))
        kv.fetch(0)
        kv.fetch(0)
        assert kv.stats()["idle_bytes"] <= 5 * MIB


def test_a_failed_read_ahead_is_read_again(fault_device: Callable) -> None:
    faulty = fault_device(32 * MIB)
    with (
        dualblade.open(faulty.path, format=True, policy="direct") as store,
        dualblade.KVCache(store, layers=2, **SHAPE, batch=2, max_tokens=4096) as kv,
    ):
        for layer in range(2):
            kv.append(layer, rows(2000, layer), rows(2000, layer))
        info = store.info(f"{kv.name}/001/k")
        faulty.add_rule("read", "EIO", lo=info.offset, hi=info.offset + info.extent_bytes)
        np.testing.assert_array_equal(kv.fetch(0)[0], rows(2000, 0))
        with pytest.raises(DeviceError) as caught:
            kv.fetch(1)
        assert info.offset <= caught.value.offset < info.offset + info.extent_bytes
        kv.fetch(0)  # starts to read it ahead once more
        faulty.clear()
        np.testing.assert_array_equal(kv.fetch(1)[0], rows(2000, 1))


def test_a_corrupt_layer_is_not_returned(store: TensorStore, kv: KVCache, tmp_path: Path) -> None:
    for layer in range(3):
        kv.append(layer, rows(64, layer), rows(64, layer))
    info = store.info(f"{kv.name}/001/v")
    overwrite(tmp_path / "kv.img", info.offset + 5, b"\xff\x00")
    np.testing.assert_array_equal(kv.fetch(0)[1], rows(64, 0))
    for _ in range(2):
        with pytest.raises(CorruptionError, match="001/v"):
            kv.fetch(1)
    np.testing.assert_array_equal(kv.fetch(2)[1], rows(64, 2))


# ---- the batch -----------------------------------------------------------------------------------


def test_reordering_writes_nothing(kv: KVCache, store: TensorStore) -> None:
    for layer in range(3):
        kv.append(layer, rows(50, layer), rows(50, layer))
    before = writes(store)
    for _ in range(20):
        kv.reorder(np.array([1, 0]))
        kv.reorder((1, 1))
    assert writes(store) == before
    for layer in range(3):
        expected = rows(50, layer)[:, [0, 0]]
        np.testing.assert_array_equal(kv.fetch(layer)[0], expected)
        kv.append(layer, rows(1, 9), rows(1, 9))
        np.testing.assert_array_equal(kv.fetch(layer)[1], np.concatenate([expected, rows(1, 9)]))


def test_a_new_batch_size_is_for_all_layers(kv: KVCache) -> None:
    for layer in range(3):
        kv.append(layer, rows(7, layer), rows(7, layer))
    kv.reorder([1, 0])
    kv.repeat_batch(2)
    assert kv.batch == 4
    for layer in range(3):
        np.testing.assert_array_equal(kv.fetch(layer)[0], rows(7, layer)[:, [1, 1, 0, 0]])
        kv.append(layer, rows(1, batch=4), rows(1, batch=4))
    kv.select_batch([3, 0])
    np.testing.assert_array_equal(kv.fetch(2)[1][:7], rows(7, 2)[:, [0, 1]])
    np.testing.assert_array_equal(kv.fetch(2)[1][7:], rows(1, batch=4)[:, [3, 0]])


# ---- the end -------------------------------------------------------------------------------------


def test_closing(store: TensorStore) -> None:
    free = store.stats()["free_bytes"]
    with dualblade.KVCache(store, layers=3, **SHAPE, batch=2) as kv:
        for layer in range(3):
            kv.append(layer, rows(10), rows(10))
        k, _ = kv.fetch(0)
    kv.close()
    assert len(store) == 0
    assert store.stats()["free_bytes"] == free
    np.testing.assert_array_equal(k, rows(10))
    calls = [
        lambda: kv.append(0, rows(1), rows(1)),
        lambda: kv.fetch(0),
        lambda: kv.truncate(0),
        lambda: kv.reorder([1, 0]),
        lambda: kv.repeat_batch(2),
        lambda: kv.add_layer(2, 32),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_closing_after_the_store(tmp_path: Path) -> None:
    with dualblade.open(tmp_path / "kv.img", size=16 * MIB) as store:
        kv = dualblade.KVCache(store, layers=2, **SHAPE, batch=2, max_tokens=64)
        for layer in range(2):
            kv.append(layer, rows(10), rows(10))
        kv.fetch(0)  # layer 1 is on its way
    with pytest.raises(ClosedError):
        kv.append(0, rows(1), rows(1))
    kv.close()
    kv.close()


def test_caches_of_many_threads_share_a_store(store: TensorStore) -> None:
    failures = []

    def work(seed: int) -> None:
        try:
            with dualblade.KVCache(store, layers=2, **SHAPE, batch=2, max_tokens=16) as kv:
                for step in range(30):
                    for layer in range(2):
                        kv.append(layer, rows(1, seed + step), rows(1, seed - step % 5))
                        k, _ = kv.fetch(layer)
                        assert (k[step] == rows(1, seed + step)[0]).all()
                expected = np.concatenate([rows(1, seed + step) for step in range(30)])
                np.testing.assert_array_equal(kv.fetch(0)[0], expected)
        except BaseException as error:  # noqa: BLE001  shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store) == 0
