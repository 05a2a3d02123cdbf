"""An interrupt at any moment leaves a store that accounts for every byte, and that closes."""

from __future__ import annotations

import gc
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dualblade

OPERATIONS = 400
KEYS = [f"k{number}" for number in range(60)]
CLOSE_S = 20.0


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    """No collection meanwhile: Hypothesis has a callback for it, which would lose the interrupt."""
    gc.disable()
    yield
    gc.enable()


def one_operation(store: Any, chance: random.Random, number: int) -> None:
    arrays = {
        key: np.full(chance.choice([0, 10, 1000, 5000]), number, "f4")
        for key in chance.sample(KEYS, chance.choice([1, 5, 50]))
    }
    known = [key for key in arrays if key in store]
    action = chance.choice(["put", "group", "get", "put_async", "get_async", "delete", "append"])
    after_s = 1e-6 + chance.choice([3e-5, 1e-4, 3e-4, 1e-3]) * chance.random()
    signal.setitimer(signal.ITIMER_REAL, after_s)
    if action == "put":
        store.put_many(arrays)
    elif action == "group":
        store.put_many(arrays, group="together")
    elif action == "get":
        store.get_many(known)
    elif action == "put_async":
        store.put_many_async(arrays).result()
    elif action == "get_async":
        store.get_many_async(known).result()
    elif action == "delete":
        store.delete_many(known)
    else:
        store.append("grows", np.ones((7, 10), "f4"))


def taken_bytes(store: Any) -> int:
    infos = [store.info(key) for key in store.keys()]
    return sum(info.extent_bytes for info in infos)


@pytest.mark.parametrize("seed", range(4))
def test_interrupts_at_any_moment(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "store"
    chance = random.Random(seed)
    interrupts = 0

    def handler(*_: object) -> None:
        if is_armed:
            raise KeyboardInterrupt

    is_armed = False
    before = signal.signal(signal.SIGALRM, handler)
    store = dualblade.open(path, size="64MiB", format=True, memory="1MiB")
    free_bytes = store.stats()["free_bytes"]
    store.reserve("grows", (OPERATIONS * 7, 10), "f4")
    try:
        for number in range(OPERATIONS):
            try:
                is_armed = number >= 50  # until then modules are imported
                one_operation(store, chance, number)
                is_armed = False
            except KeyboardInterrupt as error:
                is_armed = False
                interrupts += 1
                kept = error  # a traceback that lives on, as in an interactive session
            signal.setitimer(signal.ITIMER_REAL, 0)
            store.keys()  # settles what goes on
            stats = store.stats()
            assert stats["operations_active"] == 0, (number, kept.__traceback__)
            taken = taken_bytes(store)
            assert free_bytes - stats["free_bytes"] == taken, number
            groups = stats["groups"].values()
            assert sum(group["size_bytes"] for group in groups) == taken, number
            assert all(group["stored_bytes"] <= group["size_bytes"] for group in groups), number
            cached = [group for group in groups if group["path"] == "pagecache"]
            stored = sum(group["stored_bytes"] for group in cached)
            assert stats["pagecache_bytes"] == stored <= stats["memory_budget_bytes"], number
            assert stored <= stats["residency"]["claimed_bytes"], number
        assert interrupts > OPERATIONS // 20
        assert store.check() == []
        expected = store.get_many(store.keys())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    closing = threading.Thread(target=store.close, daemon=True)
    closing.start()
    closing.join(CLOSE_S)
    assert not closing.is_alive()
    with dualblade.open(path) as again:
        assert again.check() == []
        found = again.get_many(again.keys())
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)


@pytest.mark.filterwarnings("ignore:the store on")  # a save cut short was raised, and is none
@pytest.mark.parametrize("seed", range(30))
def test_close_closes_when_it_is_interrupted(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "store"
    chance = random.Random(seed)

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    store = dualblade.open(path, size="64MiB", format=True)
    store.put_many({key: np.arange(100) for key in KEYS})
    before = signal.signal(signal.SIGALRM, handler)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-6 + 2e-3 * chance.random())
            store.close()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            store.close()  # where it was interrupted before it began
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert store.closed
    with dualblade.open(path) as again:
        assert again.check() == []
