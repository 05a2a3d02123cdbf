"""Appends that come faster than they can be written back go past the page cache, and come into it
when they are read."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dualblade
from dualblade import writeback
from dualblade.errors import UnsupportedError
from tests.helpers import MIB, noise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STRESS_S = 5


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is dirty is too much."""
    monkeypatch.setattr(writeback, "BEHIND_BYTES", 0)


def past_bytes(store: dualblade.TensorStore) -> int:
    return store.stats()["residency"]["written_past_bytes"]


def resident_bytes(store: dualblade.TensorStore, key: str) -> int:
    info = store.info(key)
    try:
        return store._device.cached_bytes(info.offset, info.nbytes)[0]
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("behind")
def test_a_prompt_goes_past_and_stays_once_it_was_read(path: Path) -> None:
    with dualblade.open(path, size="256MiB", memory="128MiB") as store:
        if not store._device.info.direct:
            pytest.skip("there is no direct path here")
        store.reserve("x", (16 * MIB,), "uint8")
        everything = noise(12 * MIB)
        for start in range(0, 12 * MIB, MIB):
            store.append("x", everything[start : start + MIB])
        # The first found nothing dirty.
        assert past_bytes(store) == 11 * MIB
        assert store.path_of("x") == "pagecache"
        assert resident_bytes(store, "x") == MIB
        for _ in range(2):
            np.testing.assert_array_equal(store.get("x"), everything)
            assert resident_bytes(store, "x") == 12 * MIB
        store.append("x", everything[:5000])  # a token is short, and goes where it is read next
        assert 12 * MIB < resident_bytes(store, "x") <= 12 * MIB + 8192
        np.testing.assert_array_equal(store.get("x")[12 * MIB :], everything[:5000])
        assert store.check() == []


@pytest.mark.usefixtures("behind")
def test_a_prompt_in_place_of_one_that_was_cut_off_stays_once_it_was_read(path: Path) -> None:
    with dualblade.open(path, size="256MiB", memory="128MiB") as store:
        if not store._device.info.direct:
            pytest.skip("there is no direct path here")
        store.reserve("x", (16 * MIB,), "uint8")
        everything = noise(9 * MIB)
        for start in (0, MIB):
            store.append("x", everything[start : start + MIB])
        store.append("x", everything[2 * MIB :])
        assert store._watcher is not None
        store._watcher.stop()  # nobody wakes the thread that drops what is freed, but for below
        store.truncate("x", MIB)
        store.append("x", everything[MIB:])
        assert past_bytes(store) == 16 * MIB
        np.testing.assert_array_equal(store.get("x"), everything)
        store.flush()  # returns when the thread has taken its notes
        for _ in range(3):  # notes are taken only after what came before them is dropped
            store.truncate("x", 9 * MIB)
            store.flush()
        assert resident_bytes(store, "x") == 9 * MIB


def test_a_prompt_that_comes_slowly_does_not(path: Path) -> None:
    with dualblade.open(path, size="256MiB", memory="128MiB") as store:
        store.reserve("x", (8 * MIB,), "uint8")
        for number in range(8):
            store.append("x", noise(MIB, number))
            store.flush()  # as if there was all the time for it
        assert past_bytes(store) == 0
        assert resident_bytes(store, "x") == 8 * MIB


@pytest.mark.usefixtures("behind")
@pytest.mark.parametrize("on", ["file", "loop"])
def test_lengths_and_paths_change_at_random(
    path: Path, loop_device: Callable[..., Any], on: str
) -> None:
    """Buffered and direct writes to one tensor after the other, cut off and written again."""
    where = path if on == "file" else loop_device(128 * MIB).path
    options: Any = {"size": "128MiB"} if on == "file" else {"format": True}
    dice = np.random.default_rng(1)
    expected = {f"x{number}": b"" for number in range(8)}
    with dualblade.open(where, memory="48MiB", **options) as store:
        for number, key in enumerate(expected):
            store.reserve(key, (6 * MIB,), "uint8", group=f"g{number // 2}")
        deadline = time.monotonic() + STRESS_S
        for step in range(3000):
            key = str(dice.choice(list(expected)))
            action = dice.choice(["append", "append", "append", "get", "truncate", "path"])
            if action == "append":
                rows = noise(int(dice.choice([100, 5000, 300_000, MIB, 2 * MIB + 17])), step)
                if len(expected[key]) + len(rows) <= 6 * MIB:
                    store.append(key, rows)
                    expected[key] += rows.tobytes()
            elif action == "get":
                assert store.get(key).tobytes() == expected[key]
            elif action == "truncate":
                expected[key] = expected[key][: int(dice.integers(0, len(expected[key]) + 1))]
                store.truncate(key, len(expected[key]))
            else:
                with contextlib.suppress(ValueError):  # it has no room just now
                    store.set_path(store.info(key).group, str(dice.choice(["direct", "pagecache"])))
            if time.monotonic() > deadline:
                break
        assert past_bytes(store) > 0
        for key, data in expected.items():
            assert store.get(key).tobytes() == data
        assert store.check() == []
        assert store.stats()["residency"]["problems"] == 0
