"""What the drive refuses while it is written back is not lost as long as memory holds it."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dualblade
from dualblade.errors import CorruptionError, DeviceError, DualbladeWarning
from tests.helpers import MIB, noise, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.faultdev import FaultDevice

ATTEMPTS_MAX = 300
MODES: dict[str, dict[str, Any]] = {
    "live": {"policy": "dual", "memory": "64MiB"},
    "fixed": {"policy": "dual", "memory": "64MiB", "live": False},
    "pagecache": {"policy": "pagecache"},
}


@pytest.fixture
def fault(fault_device: Callable[..., FaultDevice]) -> FaultDevice:
    return fault_device(32 * MIB)


@pytest.fixture
def loop(fault: FaultDevice, loop_over: Callable[..., str]) -> str:
    """A block device whose page cache is the kernel's, over one that fails on request."""
    return loop_over(fault.path, "--direct-io=on")


@pytest.fixture(params=MODES)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODES[request.param]


def fill(store: dualblade.TensorStore) -> dict[str, np.ndarray]:
    """Stores what can be stored in several ways; what should be there then."""
    expected = {f"put{i}": noise(600_000 + i, i) for i in range(4)}
    store.put("put0", noise(300_000, 99))
    store.put_many(expected, group="many")
    store.reserve("rows", (2000, 1000), "uint8")
    rows = noise(500_000, 5).reshape(500, 1000)
    for start in range(0, 500, 100):
        store.append("rows", rows[start : start + 100])
    store.put("moved", noise(MIB, 6))
    store.reserve("grown", (100, 5000), "uint8", group="many")
    store.append_many_async({"grown": noise(500_000, 7).reshape(100, 5000)}).result()
    store.resize("grown", 120)
    return {
        **expected,
        "rows": rows,
        "moved": noise(MIB, 6),
        "grown": noise(500_000, 7).reshape(100, 5000),
    }


def assert_holds(store: dualblade.TensorStore, expected: dict[str, np.ndarray]) -> None:
    assert sorted(store.keys()) == sorted(expected)
    for key, array in expected.items():
        assert np.array_equal(store.get(key), array), key


def is_settled(store: dualblade.TensorStore) -> bool:
    """Whether the drive has all that was written, without a flush."""
    if store.stats()["residency"]["dirty_bytes"]:
        return False
    store._doubts.look()
    return not store._doubts.is_open


def flush_attempts(store: dualblade.TensorStore) -> int:
    """How often it had to be tried."""
    for attempt in range(1, 10):
        try:
            store.flush()
        except DeviceError:
            continue
        return attempt
    raise AssertionError("the drive is well, and it does not end")


@pytest.mark.parametrize("verify", ["always", "never"])
@pytest.mark.parametrize("moves", ["before", "after"])
def test_the_nth_write_fails_for_every_n(
    loop: str, fault: FaultDevice, options: dict[str, Any], verify: str, moves: str
) -> None:
    """Whether the groups go direct before anybody has flushed, or afterwards."""
    for n in range(1, ATTEMPTS_MAX):
        with dualblade.open(loop, format=True, verify=verify, **options) as store:
            fault.clear()
            fault.fail_nth("write", "EIO", n)
            expected = fill(store)
            if moves == "before":
                for group in store.stats()["groups"]:
                    try:
                        store.set_path(group, "direct")
                    except DeviceError:
                        store.set_path(group, "direct")  # it has failed once
                assert_holds(store, expected)
            else:
                assert flush_attempts(store) <= 2
            fired = fault.stats()["fired"]
            fault.clear()
            assert_holds(store, expected)
            for group in store.stats()["groups"]:
                store.set_path(group, "direct")
            assert store.check() == []
            assert_holds(store, expected)
            store.flush()
        with dualblade.open(loop, verify=verify, **options) as store:
            assert_holds(store, expected)
            assert store.check() == []
        if not fired:
            assert n > 5
            return
    pytest.fail("it never ends")


@pytest.mark.parametrize("verify", ["always", "never"])
def test_nothing_is_saved_before_the_drive_took_it(
    loop: str, fault: FaultDevice, options: dict[str, Any], verify: str
) -> None:
    with dualblade.open(loop, format=True, verify=verify, **options) as store:
        store.put("well", noise(MIB, 1))
        store.flush()
        store.reserve("x", (2 * MIB,), "uint8")
        place = store.info("x").offset
        fault.add_rule("write", "EIO", lo=place, hi=place + 2 * MIB)
        store.append("x", noise(MIB, 2))
        for _ in range(3):
            with pytest.raises(DeviceError, match="EIO"):
                store.flush()
            np.testing.assert_array_equal(store.get("x"), noise(MIB, 2))
        with pytest.raises(DeviceError, match="EIO"):
            store.set_path("x", "direct")
        assert store.path_of("x") == "pagecache"
        np.testing.assert_array_equal(store.get("x"), noise(MIB, 2))
        store.append("x", noise(MIB // 2, 3))
        fault.clear()
        store.flush()
        store.set_path("x", "direct")
        expected = np.concatenate([noise(MIB, 2), noise(MIB // 2, 3)])
        np.testing.assert_array_equal(store.get("x"), expected)
    with dualblade.open(loop, verify=verify, **options) as store:
        np.testing.assert_array_equal(store.get("x"), expected)
        np.testing.assert_array_equal(store.get("well"), noise(MIB, 1))


def test_a_drive_that_stays_broken_is_said_by_flush_and_close(
    loop: str, fault: FaultDevice, options: dict[str, Any]
) -> None:
    store = dualblade.open(loop, format=True, **options)
    try:
        fault.add_rule("write", "EIO")
        expected = fill(store)
        for _ in range(2):
            with pytest.raises(DeviceError, match="EIO"):
                store.flush()
            assert_holds(store, expected)
    finally:
        with pytest.raises(DeviceError, match="EIO"):
            store.close()
    assert store.closed
    fault.clear()
    with (
        pytest.warns(DualbladeWarning, match="starts empty"),
        dualblade.open(loop, **options) as store,
    ):
        assert store.keys() == []


def test_a_close_gives_the_drive_what_it_refused_before(
    loop: str, fault: FaultDevice, options: dict[str, Any]
) -> None:
    with dualblade.open(loop, format=True, **options) as store:
        fault.add_rule("write", "EIO")
        expected = fill(store)
        with pytest.raises(DeviceError, match="EIO"):
            store.flush()
        fault.clear()
    with dualblade.open(loop, **options) as store:
        assert_holds(store, expected)


def test_what_is_deleted_or_put_anew_is_in_doubt_no_more(
    loop: str, fault: FaultDevice, options: dict[str, Any]
) -> None:
    with dualblade.open(loop, format=True, **options) as store:
        store.put_many({"a": noise(MIB, 1), "b": noise(MIB, 2), "c": noise(MIB, 3)})
        first = store.info("a").offset
        last = store.info("b").offset
        fault.add_rule("write", "EIO", lo=min(first, last), hi=max(first, last) + MIB)
        with pytest.raises(DeviceError, match="EIO"):
            store.flush()
        store.put("b", noise(MIB, 4))  # elsewhere
        store.delete("a")
        store.flush()
        np.testing.assert_array_equal(store.get("b"), noise(MIB, 4))
    fault.clear()
    with dualblade.open(loop, **options) as store:
        assert_holds(store, {"b": noise(MIB, 4), "c": noise(MIB, 3)})


def test_what_memory_has_lost_too_is_said_and_never_returned(loop: str, fault: FaultDevice) -> None:
    with dualblade.open(loop, format=True, policy="pagecache", verify="never") as store:
        store.put("a", noise(MIB, 1))
        store.put("b", noise(MIB, 2))
        info = store.info("a")
        fault.add_rule("write", "EIO", lo=info.offset, hi=info.offset + MIB)
        with pytest.raises(DeviceError, match="EIO"):
            store.flush()
        fault.clear()
        fd = os.open(loop, os.O_RDONLY)
        os.posix_fadvise(fd, info.offset, MIB, os.POSIX_FADV_DONTNEED)  # as the kernel would
        os.close(fd)
        for _ in range(2):
            with pytest.raises(CorruptionError, match="'a'"):
                store.flush()
            with pytest.raises(CorruptionError, match="'a'"):
                store.get("a")
        np.testing.assert_array_equal(store.get("b"), noise(MIB, 2))
        store.delete("a")
        store.flush()
        np.testing.assert_array_equal(store.get("b"), noise(MIB, 2))


def test_a_live_store_mends_it_by_itself(loop: str, fault: FaultDevice) -> None:
    with dualblade.open(loop, format=True, **MODES["live"]) as store:
        fault.add_rule("write", "EIO")
        expected = fill(store)
        until(lambda: store.stats()["residency"]["problems"] > 3, "nobody writes it back")
        fault.clear()
        until(lambda: is_settled(store), "it is not tried again")
        for info in map(store.info, expected):  # what is on the drive now
            fd = os.open(loop, os.O_RDONLY)
            os.posix_fadvise(fd, info.offset, info.extent_bytes, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        assert_holds(store, expected)
        store.flush()


def test_failures_among_many_threads_lose_nothing(loop: str, fault: FaultDevice) -> None:
    """Groups change paths, tensors come and go, and writes fail now and then."""
    ended = threading.Event()
    with dualblade.open(loop, format=True, **MODES["live"]) as store:

        def work(worker: int) -> dict[str, np.ndarray]:
            dice = np.random.default_rng(worker)
            expected: dict[str, np.ndarray] = {}
            step = 0
            while not ended.is_set():
                step += 1
                key = f"{worker}-{dice.integers(4)}"
                action = dice.random()
                try:
                    if key not in expected or action < 0.3:
                        array = noise(int(dice.choice([5000, 100_000, MIB])), step)
                        store.put(key, array, group=f"g{dice.integers(4)}")
                        expected[key] = array
                    elif action < 0.4:
                        store.delete(key)
                        del expected[key]
                    elif action < 0.6:
                        path = "direct" if dice.random() < 0.5 else "pagecache"
                        store.set_path(store.info(key).group, path)
                    else:
                        np.testing.assert_array_equal(store.get(key), expected[key])
                except (DeviceError, dualblade.KeyNotFoundError, ValueError):
                    continue
            return expected

        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(work, worker) for worker in range(3)]
            flushed = 0
            for n in range(25):
                fault.add_rule("write", "EIO", nth=1 + n % 5, times=1 + n % 3)
                try:
                    store.flush()
                    flushed += 1
                except DeviceError:
                    pass
                time.sleep(0.02)
            fault.clear()
            ended.set()
            expected = {key: array for each in running for key, array in each.result().items()}
        flush_attempts(store)
        assert_holds(store, expected)
    with dualblade.open(loop, **MODES["live"]) as store:
        assert_holds(store, expected)
        assert store.check() == []
