"""An interrupt at each point of what changes a layer: its tokens stay those that it says it has."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dualblade

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dualblade import KVCache, TensorStore

KIB = 1 << 10


class Interrupt:
    """Raises KeyboardInterrupt at the nth point at which Python lets a signal handler in: where a
    function of this package begins, or something in C that it called has returned."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.came = False

    def __call__(self, frame: Any, event: str, _: object) -> None:
        if event in ("call", "c_return") and "/dualblade/" in frame.f_code.co_filename:
            self.left -= 1
            if self.left < 0 and not self.came:
                self.came = True
                raise KeyboardInterrupt

    def during(self, call: Callable[[], object]) -> bool:
        """Whether it came."""
        sys.setprofile(self)
        try:
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        return self.came


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    """No collection meanwhile: the interrupt would come in some finalizer, which loses it."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=["direct", "pagecache"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[TensorStore]:
    with dualblade.open(tmp_path / "kv.img", size="32MiB", policy=request.param) as opened:
        yield opened


def rows(tokens: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1 << 16, (tokens, 1, 1, 1024), np.uint16).view(np.float16)  # 2 KiB each


OPERATIONS = {
    "a token": (1, lambda kv, k, v: kv.append(0, k, v)),
    "many": (60, lambda kv, k, v: kv.append(0, k, v)),
    "too many to be held": (300, lambda kv, k, v: kv.append(0, k, v)),
    "truncate": (0, lambda kv, _k, _v: kv.truncate(15)),
    "reset": (0, lambda kv, _k, _v: kv.reset()),
}


def continues(kv: KVCache, layer: int, k: np.ndarray, v: np.ndarray) -> None:
    """What it says it has is there, of all that it may have, and so is what is appended next."""
    tokens = kv.tokens(layer)
    more = rows(3, 90 + layer)
    kv.append(layer, more, more)
    for found, had in zip(kv.fetch(layer), (k, v), strict=True):
        np.testing.assert_array_equal(found, np.concatenate([had[:tokens], more]))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_layer_has_the_tokens_that_it_says(
    store: TensorStore, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualblade.write_behind.BEHIND_BYTES", 512 * KIB)
    count, call = OPERATIONS[name]
    pairs = [(rows(21 + count, layer), rows(21 + count, layer + 2)) for layer in range(2)]
    number, is_interrupted = 0, True
    while is_interrupted:
        with dualblade.KVCache(store, 2, 1, 1024, max_tokens=400) as kv:
            for layer, (k, v) in enumerate(pairs):
                kv.append(layer, k[:20], v[:20])
                kv.append(layer, k[20:21], v[20:21])
            k, v = pairs[0][0][21:], pairs[0][1][21:]
            is_interrupted = Interrupt(number).during(lambda: call(kv, k, v))  # noqa: B023
            for layer, pair in enumerate(pairs):
                continues(kv, layer, *pair)
            kv.reset()
            for layer in range(2):
                continues(kv, layer, *pairs[layer])
        number += 1
    assert number > 50


def test_a_tensor_that_is_cut_has_the_rows_that_it_says(store: TensorStore) -> None:
    data = rows(50, 1)
    number, is_interrupted = 0, True
    while is_interrupted:
        store.reserve_many(dict.fromkeys("ab", ((60, 1, 1, 1024), np.float16)))
        store.append_many({"a": data, "b": data})
        is_interrupted = Interrupt(number).during(lambda: store.truncate_many({"a": 15, "b": 15}))
        for key in "ab":
            kept = store.info(key).rows
            assert kept in (15, 50)
            store.append(key, data[:3])
            np.testing.assert_array_equal(store.get(key), np.concatenate([data[:kept], data[:3]]))
        store.delete_many(["a", "b"])
        number += 1
    assert number > 20


def test_a_store_can_be_saved_after_a_save_was_interrupted(store: TensorStore) -> None:
    number, is_interrupted = 0, True
    while is_interrupted:
        store.put("a", rows(number % 7, number))
        is_interrupted = Interrupt(number).during(store.flush)
        store.flush()
        number += 1
    assert number > 50
