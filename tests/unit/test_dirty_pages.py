"""Dirty pages are written back early and within bounds; what freed extents leave is dropped."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dualblade
from dualblade import _core, writeback
from dualblade.errors import DeviceError
from dualblade.writeback import Ranges, WriteBack
from tests.helpers import MIB, noise, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT_S = 60


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "remove", "take"]),
            st.integers(0, 60),
            st.integers(0, 20),
        ),
        max_size=60,
    )
)
def test_ranges_are_a_set_of_bytes(steps: list[tuple[str, int, int]]) -> None:
    ranges, model = Ranges(), set[int]()
    for action, offset, length in steps:
        if action == "add":
            ranges.add(offset, length)
            model |= set(range(offset, offset + length))
        elif action == "remove":
            ranges.remove(offset, length)
            model -= set(range(offset, offset + length))
        else:
            taken = [at + i for at, count in ranges.take(length) for i in range(count)]
            assert taken == sorted(model)[:length]
            model -= set(taken)
        found = list(ranges)
        assert {at + i for at, count in found for i in range(count)} == model
        assert ranges.total_bytes == sum(count for _, count in found) == len(model)
        for (at, count), (after, _) in itertools.pairwise(found):
            assert at + count < after  # in order, and those that touch are one


@pytest.fixture
def store(path: Path) -> Iterator[dualblade.TensorStore]:
    with dualblade.open(path, size="256MiB", memory="128MiB") as store:
        yield store
        assert store.stats()["residency"]["problems"] == 0


def cached(store: dualblade.TensorStore, key: str) -> tuple[int, int]:
    info = store.info(key)
    return store._device.cached_bytes(info.offset, info.extent_bytes)


def dirty_bytes(store: dualblade.TensorStore) -> int:
    return store.stats()["residency"]["dirty_bytes"]


def samples(store: dualblade.TensorStore) -> int:
    return store.stats()["residency"]["samples"]


def test_what_is_put_is_written_back_without_a_flush(store: dualblade.TensorStore) -> None:
    store.put("x", noise(8 * MIB))
    until(lambda: dirty_bytes(store) == 0, "nobody wrote it back")
    resident, dirty = cached(store, "x")
    assert (resident, dirty) == (8 * MIB, 0)


def test_what_is_appended_little_by_little_is_too(store: dualblade.TensorStore) -> None:
    store.reserve("x", (MIB, 16), "uint8")
    rows = noise(MIB * 16).reshape(MIB, 16)
    for start in range(0, 65536, 2048):
        store.append("x", rows[start : start + 2048])
    assert dirty_bytes(store) > 0
    until(lambda: dirty_bytes(store) == 0, "what is older than a second is still dirty")
    assert cached(store, "x")[1] == 0
    np.testing.assert_array_equal(store.get("x"), rows[:65536])


def test_after_a_flush_nothing_is_dirty(store: dualblade.TensorStore) -> None:
    for i in range(5):
        store.put("x", noise(3 * MIB, i))
        store.put("small", noise(5000, i))
        store.flush()
        assert dirty_bytes(store) == 0
        assert cached(store, "x")[1] == cached(store, "small")[1] == 0


class MostDirty:
    """The most that is dirty at any time in a `with`, as the kernel says, sampled by a thread."""

    def __init__(self, store: dualblade.TensorStore) -> None:
        self.bytes = 0
        self._device = store._device
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> MostDirty:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.is_set():
            dirty_bytes = self._device.cached_bytes(0, self._device.info.size)[1]
            self.bytes = max(self.bytes, dirty_bytes or 0)


def append_one(store: dualblade.TensorStore) -> None:
    store.reserve("x", (96 * MIB,), "uint8")
    store.append("x", noise(96 * MIB))


def append_one_behind(store: dualblade.TensorStore) -> None:
    store.reserve("x", (96 * MIB,), "uint8")
    store.append_many_async({"x": noise(96 * MIB)}).result()


def put_many(size: int, count: int) -> Callable[[dualblade.TensorStore], object]:
    return lambda store: store.put_many({f"x{i}": noise(size, i) for i in range(count)})


def put_behind(store: dualblade.TensorStore) -> None:
    """Tickets that nobody waits for are no reason to wait for ever."""
    tickets = [store.put_async(f"x{i}", noise(3 * MIB, i)) for i in range(32)]
    for ticket in tickets:
        ticket.result()


def put_from_threads(store: dualblade.TensorStore) -> None:
    arrays = {f"x{i}": noise(3 * MIB, i) for i in range(32)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(store.put, arrays, arrays.values()))


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.put("x", noise(96 * MIB)),
        put_many(3 * MIB + 4097, 32),
        put_many(128 << 10, 768),
        append_one,
        append_one_behind,
        put_behind,
        put_from_threads,
    ],
    ids=["one", "large", "small", "append", "append_async", "async", "threads"],
)
def test_no_more_is_dirty_than_the_bound(
    store: dualblade.TensorStore, write: Callable[[dualblade.TensorStore], object]
) -> None:
    limit = store.memory_budget // writeback.DIRTY_PART
    assert 8 * MIB <= limit <= 16 * MIB
    with MostDirty(store) as most:
        write(store)
    assert limit // 4 < store.stats()["residency"]["dirty_most_bytes"] <= limit
    # The kernel does not count at one moment: what was cleaned and what became dirty meanwhile may
    # both be in its sum.
    assert most.bytes <= limit + limit // 4
    until(lambda: dirty_bytes(store) == 0, "nobody writes it back")
    keys = store.keys()
    sizes = {key: store.info(key).nbytes for key in keys}
    for key in keys:
        seed = int(key[1:] or 0)
        np.testing.assert_array_equal(store.get(key), noise(sizes[key], seed))
    assert store.check() == []


@pytest.fixture
def held(
    fault_device: Callable[..., Any], loop_over: Callable[..., str]
) -> Iterator[tuple[dualblade.TensorStore, Any]]:
    """A store whose drive takes no write before it is told to; 1 MiB may be dirty."""
    fault = fault_device(64 * MIB)
    loop = loop_over(fault.path, "--direct-io=on")
    with dualblade.open(loop, format=True, memory="8MiB") as store:
        fault.add_rule("write", "hold")
        store.put("first", noise(MIB, 1))
        yield store, fault
        fault.release()


def test_a_writer_that_waits_can_be_interrupted(held: tuple[dualblade.TensorStore, Any]) -> None:
    store, fault = held

    def interrupt() -> None:
        until(lambda: store.stats()["residency"]["dirty_waits"] > 0, "it does not wait")
        signal.raise_signal(signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        store.put("second", noise(MIB, 2))
        interrupting.join()  # or here, if it is late
    interrupting.join()
    fault.release()
    until(lambda: dirty_bytes(store) == 0, "what was interrupted counts as dirty for ever")
    assert store.keys() == ["first"]
    store.put("second", noise(MIB, 3))
    np.testing.assert_array_equal(store.get("first"), noise(MIB, 1))
    np.testing.assert_array_equal(store.get("second"), noise(MIB, 3))


def test_a_close_waits_for_a_writer_that_waits(held: tuple[dualblade.TensorStore, Any]) -> None:
    store, fault = held
    path = store.stats()["target"]
    with ThreadPoolExecutor(2) as pool:
        putting = pool.submit(store.put, "second", noise(MIB, 2))
        until(lambda: store.stats()["residency"]["dirty_waits"] > 0, "it does not wait")
        closing = pool.submit(store.close)
        until(lambda: store.closed, "it does not close")
        assert not putting.done()
        fault.release()
        putting.result(TIMEOUT_S)
        closing.result(TIMEOUT_S)
    with dualblade.open(path) as again:
        np.testing.assert_array_equal(again.get("first"), noise(MIB, 1))
        np.testing.assert_array_equal(again.get("second"), noise(MIB, 2))


def test_a_deleted_tensor_leaves_the_page_cache(store: dualblade.TensorStore) -> None:
    store.put("x", noise(8 * MIB))
    place = store.info("x").offset
    assert cached(store, "x")[0] == 8 * MIB
    store.delete("x")
    until(lambda: store._device.cached_bytes(place, 8 * MIB)[0] == 0, "what was deleted is cached")
    assert dirty_bytes(store) == 0


def test_an_extent_that_is_used_again_keeps_its_pages(store: dualblade.TensorStore) -> None:
    for i in range(30):
        store.put("x", noise(4 * MIB, i))
        store.delete("x")
    store.put("x", noise(4 * MIB, 99))
    for _ in range(3):  # the watcher has passed on all that was freed
        before = samples(store)
        until(lambda before=before: samples(store) > before, "the watcher stands still")
    np.testing.assert_array_equal(store.get("x"), noise(4 * MIB, 99))
    assert cached(store, "x")[0] == 4 * MIB


@pytest.mark.parametrize("on", ["file", "loop"])
def test_extents_change_hands_and_paths_under_write_back(
    path: Path, loop_device: Callable[..., Any], on: str
) -> None:
    """Buffered and direct writes take turns on the same blocks, beside neighbours that do too."""
    where = path if on == "file" else loop_device(64 * MIB).path
    options: Any = {"size": "64MiB"} if on == "file" else {"format": True}
    with dualblade.open(where, memory="16MiB", **options) as store:
        dice = np.random.default_rng(1)
        expected: dict[str, np.ndarray] = {}
        deadline = time.monotonic() + 5
        for i in range(2000):
            key = f"x{dice.integers(12)}"
            if key in expected and dice.random() < 0.4:
                np.testing.assert_array_equal(store.get(key), expected[key])
                store.delete(key)
                del expected[key]
            else:
                expected[key] = noise(int(dice.choice([5000, 100_000, MIB, 2 * MIB])), i)
                store.put(key, expected[key], group=f"g{dice.integers(6)}")
            if dice.random() < 0.1:
                group = store.info(key).group if key in expected else ""
                if group:
                    store.set_path(group, "direct")
            if time.monotonic() > deadline:
                break
        for key, array in expected.items():
            info = store.info(key)
            if dice.random() < 0.5:
                store._device.drop_cached(info.offset, info.extent_bytes)
            np.testing.assert_array_equal(store.get(key), array)
        assert store.check() == []
        assert store.stats()["residency"]["problems"] == 0


class SlowDevice:
    """Stands for a device whose write-back takes until it is told to go on."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.calls: list[tuple[str, int, int]] = []
        self.error: BaseException | None = None

    def write_back(self, offset: int, length: int, wait: bool = False) -> None:
        self.calls.append(("wait" if wait else "start", offset, length))
        if wait:
            self.go.acquire()
            if self.error is not None:
                raise self.error

    def write_back_failures(self) -> int:
        return 0

    def drop_cached(self, offset: int, length: int, failures: int) -> None:
        assert failures == 0
        self.calls.append(("drop", offset, length))


def write(back: WriteBack, *ranges: tuple[int, int]) -> None:
    assert back.admit(write, ranges)
    back.written(write)


@pytest.fixture
def slow() -> Iterator[tuple[SlowDevice, WriteBack]]:
    device: Any = SlowDevice()
    back = WriteBack(device, lambda: 64 * MIB)
    back.start()
    yield device, back
    device.go.release(1000)
    back.stop()


def test_a_writer_waits_above_the_bound_only(slow: tuple[SlowDevice, WriteBack]) -> None:
    device, back = slow
    # Nothing is dirty: a write larger than the bound has to begin somewhere.
    assert back.admit("large", [(0, 100 * MIB)])
    assert not back.admit("small", [(100 * MIB, 1)])
    assert back.writers() == {"large"}
    back.freed([(0, 100 * MIB)])
    back.written("large")
    back.written("large")
    back.freed([(0, 100 * MIB)])
    until(lambda: back.admit("first", [(0, 6 * MIB)]), "what was freed counts")
    assert back.dirty_bytes == 6 * MIB
    back.written("first")
    assert back.admit("second", [(6 * MIB, 2 * MIB)])
    back.written("second")
    refused = threading.Event()
    admitted = threading.Event()

    def wait() -> None:
        while not back.admit("third", [(8 * MIB, 4 * MIB)]):
            refused.set()
            back.await_room([(8 * MIB, 4 * MIB)])
        admitted.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert refused.wait(TIMEOUT_S)
    assert not admitted.is_set()
    device.go.release()
    assert admitted.wait(TIMEOUT_S)
    waiting.join()
    back.written("third")
    device.go.release()
    until(lambda: back.dirty_bytes == 0, "it is stuck")
    assert back.most_bytes == 100 * MIB


def test_who_waits_for_a_drive_that_hangs_takes_no_memory(
    slow: tuple[SlowDevice, WriteBack], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, back = slow
    monkeypatch.setattr(writeback, "ADMIT_LOOK_S", 0)
    write(back, (0, 8 * MIB))
    until(lambda: ("wait", 0, 8 * MIB) in device.calls, "it is not written back")
    for _ in range(100):
        assert not back.admit("next", [(8 * MIB, 4096)])
        back.await_room([(8 * MIB, 4096)])
    assert len(back._notes) == 0
    device.go.release()
    until(lambda: back.dirty_bytes == 0, "it is stuck")


def test_ranges_are_put_together_and_those_freed_are_not_written(
    slow: tuple[SlowDevice, WriteBack],
) -> None:
    device, back = slow
    device.go.release(1000)
    write(back, (0, 4096), (8192, 4096))
    write(back, (4096, 4096))
    write(back, (10 * MIB, MIB))
    back.freed([(10 * MIB, 2 * MIB)])
    back.freed([(20 * MIB, MIB)])
    back.reused([(20 * MIB, MIB // 2)])
    back.wake()
    until(lambda: back.dirty_bytes == 0, "it is not written")
    assert [call for call in device.calls if call[0] != "drop"] == [
        ("start", 0, 12288),
        ("wait", 0, 12288),
    ]
    dropped = sorted(call[1:] for call in device.calls if call[0] == "drop")
    assert dropped == [(10 * MIB, 2 * MIB), (20 * MIB + MIB // 2, MIB // 2)]


def test_a_write_back_that_fails_stops_nobody(slow: tuple[SlowDevice, WriteBack]) -> None:
    device, back = slow
    device.go.release(1000)
    device.error = DeviceError(5, "broken")
    write(back, (0, 8 * MIB))
    until(lambda: back.dirty_bytes == 0 and back.errors > 0, "it is stuck")
    device.error = None
    errors = back.errors
    write(back, (0, 8 * MIB))
    until(lambda: back.dirty_bytes == 0, "it is stuck")
    assert back.errors == errors


def test_a_device_that_was_closed_ends_nothing_badly(path: Path) -> None:
    path.write_bytes(bytes(4 * MIB))
    device = _core.Device.open(path)
    back = WriteBack(device, lambda: 64 * MIB)
    back.start()
    device.close()
    write(back, (0, 4 * MIB))
    until(lambda: back.dirty_bytes == 0, "it is stuck")
    back.stop()
    back.stop()
    assert back.admit("any", [(0, 10 * MIB)])
    back.written("any")
    write(back, (0, 4 * MIB))
    assert back.dirty_bytes == 0
