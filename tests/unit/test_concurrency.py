"""Many threads on one store: oracles that each keeps, closing in the midst of it, and waiting."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import os
import signal
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dualblade
from dualblade.errors import ClosedError, DeviceError, KeyNotFoundError
from tests.helpers import MIB, noise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CHUNK = 256 << 10
TIMEOUT_S = 60


@pytest.fixture
def store(path: Path) -> Iterator[dualblade.TensorStore]:
    with dualblade.open(path, size="64MiB", memory="2MiB") as opened:
        yield opened


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Runs these in threads that start together; their results, or the first one's error."""
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        barrier.wait(TIMEOUT_S)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(run, work) for work in works]
        for future in wait(futures, TIMEOUT_S, FIRST_EXCEPTION).done:
            future.result()
        return [future.result(0) for future in futures]


# ---- threads with keys of their own --------------------------------------------------------------


class Worker:
    """One thread's part of a store, and what it should hold."""

    def __init__(self, store: dualblade.TensorStore, number: int) -> None:
        self.store = store
        self.random = np.random.default_rng(number)
        self.name = f"{number}/"
        self.group = f"group {number % 2}"  # shared by several threads, moved by all
        self.whole: dict[str, np.ndarray] = {}
        self.rows = np.empty((0, 300), np.uint8)
        self.reads: list[tuple[dualblade.Ticket, np.ndarray]] = []
        self.writes: list[dualblade.Ticket] = []
        store.reserve(self.name + "rows", (4000, 300), "uint8", group=self.group)

    def step(self) -> None:
        random = self.random
        key = self.name + str(random.integers(3))
        action = random.choice(
            [
                "put", "put_async", "get", "get_async", "append", "append_many_async", "truncate",
                "delete", "path", "info",
            ]
        )  # fmt: skip
        if action in ("put", "put_async"):
            array = noise(int(random.choice([0, 100, 4096, 300_000])), int(random.integers(1000)))
            getattr(self.store, action)(key, array, group=self.group)
            self.whole[key] = array
        elif action == "delete" and key in self.whole:
            self.store.delete(key)
            del self.whole[key]
            assert key not in self.store
        elif action == "get" and key in self.whole:
            np.testing.assert_array_equal(self.store.get(key), self.whole[key])
        elif action == "get_async":
            self.reads.append((self.store.get_async(self.name + "rows"), self.rows))
        elif action in ("append", "append_many_async"):
            rows = noise(300 * int(random.choice([1, 7, 200]))).reshape(-1, 300)
            if len(self.rows) + len(rows) <= 4000:
                if action == "append":
                    self.store.append(self.name + "rows", rows)
                else:
                    self.writes.append(self.store.append_many_async({self.name + "rows": rows}))
                self.rows = np.concatenate([self.rows, rows])
        elif action == "truncate":
            count = int(random.integers(len(self.rows) + 1))
            self.store.truncate(self.name + "rows", count)
            self.rows = self.rows[:count]
        elif action == "path":
            try:
                self.store.set_path(self.group, str(random.choice(["direct", "pagecache"])))
            except ValueError:
                assert self.store.stats()["memory_budget_bytes"] == 2 * MIB
        elif action == "info":
            assert self.store.info(self.name + "rows").rows == len(self.rows)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
        self.compare(self.store)

    def compare(self, store: dualblade.TensorStore) -> None:
        for ticket, expected in self.reads:
            np.testing.assert_array_equal(ticket.result(TIMEOUT_S), expected)
        for ticket in self.writes:
            assert ticket.result(TIMEOUT_S) is None
        assert set(store.keys(self.name)) == {*self.whole, self.name + "rows"}
        for key, array in self.whole.items():
            np.testing.assert_array_equal(store.get(key), array)
        np.testing.assert_array_equal(store.get(self.name + "rows"), self.rows)


def test_threads_do_not_disturb_each_other(path: Path) -> None:
    with dualblade.open(path, size="64MiB", memory="2MiB") as store:
        workers = [Worker(store, number) for number in range(6)]
        at_once(
            *(lambda worker=worker: worker.run(120) for worker in workers),
            lambda: [store.flush() for _ in range(10)],
            lambda: [store.check() for _ in range(3)],
        )
        assert store.check() == []
        stats = store.stats()
        assert stats["operations_active"] == 0
        assert stats["pagecache_bytes"] <= stats["memory_budget_bytes"]
        taken = sum(store.info(key).extent_bytes for key in store.keys())
        assert stats["free_bytes"] == 63 * MIB - taken
    with dualblade.open(path) as store:
        for worker in workers:
            worker.reads.clear()
            worker.compare(store)


def test_a_shared_key_always_holds_something_whole(store: dualblade.TensorStore) -> None:
    """Whoever reads while others put, delete and move a tensor finds one of theirs or none."""

    def write(number: int) -> None:
        for i in range(60):
            store.put("x", np.full(CHUNK + 1000 * number, number, np.uint8))
            if i % 5 == number:
                try:
                    store.delete("x")
                except KeyNotFoundError:
                    pass

    def read() -> None:
        for _ in range(120):
            try:
                found = store.get("x")
            except KeyNotFoundError:
                continue
            assert len(found) == CHUNK + 1000 * int(found[0])
            assert (found == found[0]).all()

    def move() -> None:
        for i in range(60):
            try:
                store.set_path("x", ("direct", "pagecache")[i % 2])
            except KeyNotFoundError:
                pass

    at_once(*(lambda n=n: write(n) for n in range(3)), read, read, move)
    assert store.check() == []
    assert store.stats()["free_bytes"] == 63 * MIB - sum(
        store.info(key).extent_bytes for key in store.keys()
    )


def test_rows_appended_by_many_threads_are_all_there(store: dualblade.TensorStore) -> None:
    store.reserve("x", (800, 100), "uint16")

    def append(number: int) -> None:
        for i in range(100):
            store.append("x", np.full((2, 100), number * 100 + i, np.uint16))

    def read() -> None:
        rows = 0
        while rows < 800:
            found = store.get("x")
            assert len(found) >= rows
            rows = len(found)
            assert (found == found[:, :1]).all()
            assert (found[::2] == found[1::2]).all()

    at_once(*(lambda n=n: append(n) for n in range(4)), read, read)
    found = store.get("x")[::2, 0]
    for number in range(4):
        own = [value for value in found if value // 100 == number]
        assert own == list(range(number * 100, number * 100 + 100))


@pytest.mark.parametrize("change", ["delete", "put"])
def test_an_append_that_ends_after_a_delete_brings_nothing_back(slow: Any, change: str) -> None:
    device, store = slow
    store.reserve("rows", (64, 4096), "uint8")
    store.flush()  # what is saved of it is to be forgotten
    device.add_rule("write", "hold")
    with ThreadPoolExecutor(1) as pool:
        appending = pool.submit(store.append, "rows", np.zeros((5, 4096), np.uint8))
        device.wait_held(1)
        if change == "put":  # an empty one: it writes nothing that would be held
            store.put("rows", noise(0))
        store.delete("rows")
        assert "rows" not in store
        device.release()
        appending.result(TIMEOUT_S)
    store.put("y", noise(MIB))
    store.close()
    with dualblade.open(device.path) as again:
        assert again.keys() == ["x", "y"]
        assert again.stats()["free_bytes"] == 13 * MIB
        np.testing.assert_array_equal(again.get("y"), noise(MIB))


def test_threads_that_put_into_one_group_keep_the_budget(path: Path) -> None:
    with dualblade.open(path, size="64MiB", memory="2MiB") as store:

        def put(number: int) -> None:
            for i in range(20):
                store.put(f"{number}/{i}", noise(64 << 10), group=f"g{i % 4}")
                stats = store.stats()
                assert stats["pagecache_bytes"] <= stats["memory_budget_bytes"]

        at_once(*(lambda n=n: put(n) for n in range(6)))
        paths = {group["path"] for group in store.stats()["groups"].values()}
        assert "direct" in paths


# ---- program order, and tickets ------------------------------------------------------------------


def test_a_key_put_by_two_threads_keeps_the_order_of_each(store: dualblade.TensorStore) -> None:
    """After a thread's put_async and delete, its own put can't come back: only the other's."""

    def work(number: int) -> None:
        for _ in range(40):
            store.put_async("x", np.full(300_000, number, np.uint8))
            store.put_async("x", np.full(300_000, number + 10, np.uint8))
            found = store.get("x")[0]
            assert found != number
            store.put("own" + str(number), noise(10))

    at_once(lambda: work(1), lambda: work(2), lambda: work(3))
    assert store.check() == []


@pytest.fixture
def slow(fault_device: Callable[..., Any]) -> Iterator[tuple[Any, dualblade.TensorStore]]:
    """A device on which operations can be held, and a store on it with "x", 1 MiB."""
    device = fault_device()
    with dualblade.open(device.path, format=True, policy="direct") as store:
        store.put("x", noise(MIB))
        yield device, store
        device.clear()


def test_a_ticket_times_out_and_then_succeeds(slow: Any) -> None:
    device, store = slow
    device.add_rule("read", "hold")
    ticket = store.get_async("x")
    device.wait_held(1)
    for _ in range(3):
        with pytest.raises(TimeoutError, match="still in flight"):
            ticket.result(timeout=0.01)
        with pytest.raises(TimeoutError):
            ticket.result(timeout=0)
        assert not ticket.done()
    device.release()
    np.testing.assert_array_equal(ticket.result(TIMEOUT_S), noise(MIB))
    assert ticket.done()


def test_a_time_out_at_the_last_moment_loses_nothing(store: dualblade.TensorStore) -> None:
    """A read that is done just as the time is up succeeds all the same."""
    store.put("x", noise(CHUNK))
    for _ in range(300):
        ticket = store.get_async("x")
        while True:
            try:
                found = ticket.result(timeout=0)
            except TimeoutError:
                assert not ticket._is_settled
            else:
                break
        assert len(found) == CHUNK


def test_a_put_that_nobody_waited_for_is_there_for_the_next(slow: Any) -> None:
    device, store = slow
    device.add_rule("write", "hold")
    ticket = store.put_async("y", noise(100, 1))
    device.wait_held(1)
    assert not ticket.done()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.get, "y")
        np.testing.assert_array_equal(store.get("x"), noise(MIB))  # another key does not wait
        assert not waiting.done()
        device.release()
        np.testing.assert_array_equal(waiting.result(TIMEOUT_S), noise(100, 1))
    assert ticket.done()


def test_a_truncate_waits_for_readers_and_for_tickets_that_nobody_waits_for(slow: Any) -> None:
    device, store = slow
    device.add_rule("read", "hold")
    forgotten = store.get_async("x")
    device.wait_held(1)
    with ThreadPoolExecutor(2) as pool:
        truncating = pool.submit(store.truncate, "x", 5)
        reading = pool.submit(store.get, "x")
        device.release()
        truncating.result(TIMEOUT_S)
        assert len(reading.result(TIMEOUT_S)) in (5, MIB)
    np.testing.assert_array_equal(forgotten.result(), noise(MIB))
    np.testing.assert_array_equal(store.get("x"), noise(5))


def test_reads_that_begin_while_another_thread_truncates_block_nobody(
    store: dualblade.TensorStore,
) -> None:
    """Threads that leave tickets unsettled, and threads that must have a tensor to themselves."""
    store.reserve("x", (10_000,), "uint8")
    store.append("x", noise(5000))

    def read() -> None:
        for _ in range(200):
            store.get_async("x")

    def change() -> None:
        for i in range(100):
            store.truncate("x", 4000)
            store.append("x", noise(1000, i))
            store.set_path("x", ("direct", "pagecache")[i % 2])

    at_once(read, read, change)
    np.testing.assert_array_equal(store.read("x", 0, 4000), noise(5000)[:4000])


def test_the_gil_is_free_while_a_read_waits(slow: Any) -> None:
    device, store = slow
    device.add_rule("read", "hold")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.get, "x")
        device.wait_held(1)
        counted = 0
        began = time.monotonic()
        while time.monotonic() - began < 0.2:
            counted += 1
        assert not reading.done()
        device.release()
        np.testing.assert_array_equal(reading.result(TIMEOUT_S), noise(MIB))
    assert counted > 1000


@pytest.mark.parametrize("action", ["get", "put", "append", "truncate"])
def test_a_keyboard_interrupt_in_a_wait_leaves_the_store_usable(slow: Any, action: str) -> None:
    device, store = slow
    rows = noise(3 * CHUNK).reshape(-1, 1024)
    store.reserve("rows", rows.shape, "uint8")
    store.append("rows", rows[:400])
    op, work = {
        "get": ("read", lambda: store.get("x")),
        "put": ("write", lambda: store.put("x", noise(MIB, 1))),
        "append": ("write", lambda: store.append("rows", rows[400:500])),
        "truncate": ("read", lambda: store.truncate("rows", 399)),
    }[action]
    for _ in range(5):
        device.add_rule(op, "hold")

        def interrupt() -> None:
            device.wait_held(1)
            os.kill(os.getpid(), signal.SIGINT)
            device.release()

        thread = threading.Thread(target=interrupt)
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            work()
            while True:  # the wait was over just before: it comes here
                time.sleep(1)
        thread.join(TIMEOUT_S)
        device.clear()
    found = store.get("x")
    assert any((found == noise(MIB, seed)).all() for seed in (0, 1))
    found = store.get("rows")
    assert len(found) in ((399, 400) if action == "truncate" else range(400, 901, 100))
    np.testing.assert_array_equal(found[:399], rows[:399])
    store.truncate("rows", 399)
    store.append("rows", rows[399:])
    np.testing.assert_array_equal(store.get("rows"), rows)
    assert store.check() == []
    assert store.stats()["operations_active"] == 0


def test_keyboard_interrupts_at_any_moment_lose_no_data(path: Path) -> None:
    with dualblade.open(path, size="32MiB", memory="1MiB") as store:
        store.put("x", noise(CHUNK))
        store.reserve("rows", (100_000, 100), "uint8")
        ended = threading.Event()

        def interrupt() -> None:
            while not ended.wait(0.003):
                _thread.interrupt_main()

        rows = 0
        thread = threading.Thread(target=interrupt)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            thread.start()
            for i in range(150):
                try:
                    np.testing.assert_array_equal(store.get("x"), noise(CHUNK))
                    store.append("rows", np.full((3, 100), i, np.uint8))
                except KeyboardInterrupt:
                    continue
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            ended.set()
            thread.join(TIMEOUT_S)
            signal.signal(signal.SIGINT, before)
        found = store.get("rows")
        rows = len(found)
        assert rows % 3 == 0
        assert (found == found[:, :1]).all()
        assert (found[::3] == found[2::3]).all()
        assert store.check() == []


# ---- appends that nobody waits for ---------------------------------------------------------------


def test_what_is_done_next_waits_for_an_append(slow: Any) -> None:
    device, store = slow
    store.reserve_many(dict.fromkeys("kv", ((64, 4096), "uint8")))
    row = noise(4096).reshape(1, 4096)
    device.add_rule("write", "hold")
    ticket = store.append_many_async({"k": row, "v": row[:, ::-1].copy()})
    device.wait_held(1)
    assert not ticket.done()
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(store.get, "v")
        appending = pool.submit(store.append, "k", row)
        device.release()
        np.testing.assert_array_equal(reading.result(TIMEOUT_S), row[:, ::-1])
        appending.result(TIMEOUT_S)
    np.testing.assert_array_equal(store.get("k"), np.concatenate([row, row]))
    assert ticket.result() is None


def test_the_mapping_of_an_append_is_the_callers_at_once(store: dualblade.TensorStore) -> None:
    store.reserve_many(dict.fromkeys("kv", ((64, 4096), "uint8")))
    row = noise(4096).reshape(1, 4096)
    rows = {"k": row, "v": row}
    ticket = store.append_many_async(rows)
    rows.clear()
    ticket.result(TIMEOUT_S)
    store.append("v", row)
    np.testing.assert_array_equal(store.get("v"), np.concatenate([row, row]))


def test_rows_with_copies_are_the_callers_at_once(slow: Any) -> None:
    device, store = slow
    store.reserve_many(dict.fromkeys("kv", ((64, 4096), "uint8")))
    device.add_rule("write", "hold")
    rows, kept = noise(40 * 4096).reshape(40, 4096), noise(40 * 4096).reshape(40, 4096)
    given = rows.copy()
    copies = {"k": dualblade.aligned_empty(given.nbytes, np.uint8)}
    ticket = store.append_many_async({"k": given, "v": kept}, copies)
    given[:] = 0
    device.wait_held(1)
    device.release()
    assert ticket.result(TIMEOUT_S) is None
    np.testing.assert_array_equal(store.get("k"), rows)
    np.testing.assert_array_equal(store.get("v"), kept)
    with pytest.raises(ValueError, match="copy must hold"):
        store.append_many_async({"k": rows[:1]}, copies)
    np.testing.assert_array_equal(store.get("k"), rows)


@pytest.mark.parametrize("live", [False, True])
def test_an_append_through_the_page_cache(path: Path, live: bool) -> None:
    with dualblade.open(path, size="64MiB", live=live) as store:
        store.reserve("x", (100, 5000), "uint8")
        assert store.path_of("x") == "pagecache"
        for number in range(100):
            row = np.full((1, 5000), number, np.uint8)
            assert store.append_many_async({"x": row}).result(TIMEOUT_S) is None
        assert (store.get("x") == np.arange(100, dtype=np.uint8)[:, None]).all()


def test_an_append_that_fails_adds_nothing(slow: Any) -> None:
    device, store = slow
    store.reserve_many(dict.fromkeys("kv", ((64, 4096), "uint8")))
    row = noise(4096).reshape(1, 4096)
    store.append_many({"k": row, "v": row})
    v = store.info("v")
    device.add_rule("write", "EIO", lo=v.offset, hi=v.offset + v.extent_bytes)
    ticket = store.append_many_async({"k": row, "v": row})
    assert store.info("k").rows == store.info("v").rows == 1
    for _ in range(2):
        with pytest.raises(DeviceError, match="write"):
            ticket.result(TIMEOUT_S)
    device.clear()
    with pytest.raises(ValueError, match="no room"):
        store.append_many_async({"k": row, "v": np.zeros((64, 4096), np.uint8)})
    store.append_many_async({"k": row, "v": row[:, ::-1].copy()})
    np.testing.assert_array_equal(store.get("v"), np.concatenate([row, row[:, ::-1]]))
    np.testing.assert_array_equal(store.get("k"), np.concatenate([row, row]))


def test_threads_append_to_one_tensor_without_waiting(store: dualblade.TensorStore) -> None:
    store.reserve("rows", (800, 5000), "uint8")

    def work(number: int) -> None:
        for _ in range(100):
            store.append_many_async({"rows": np.full((2, 5000), number, np.uint8)})

    at_once(*(lambda number=number: work(number) for number in range(4)))
    found = store.get("rows")
    assert (found == found[:, :1]).all()
    assert (found[::2] == found[1::2]).all()
    assert np.bincount(found[:, 0]).tolist() == [200] * 4


# ---- asyncio -------------------------------------------------------------------------------------


def test_many_tickets_are_awaited_together(store: dualblade.TensorStore) -> None:
    async def main() -> None:
        arrays = {f"x{i}": noise(100_000 + i, i) for i in range(40)}
        await asyncio.gather(*(store.put_async(key, array) for key, array in arrays.items()))
        found = await asyncio.gather(*(store.get_async(key) for key in arrays))
        for array, expected in zip(found, arrays.values(), strict=True):
            np.testing.assert_array_equal(array, expected)
        with pytest.raises(KeyNotFoundError):
            await store.get_async("missing")
        assert await store.read_async("x0", 1, 3) is not None

    asyncio.run(main())


def test_an_event_loop_runs_while_a_ticket_is_awaited(slow: Any) -> None:
    device, store = slow
    device.add_rule("read", "hold")

    async def main() -> np.ndarray:
        task = asyncio.ensure_future(_await(store.get_async("x")))
        await asyncio.to_thread(device.wait_held, 1)
        assert not task.done()
        device.release()
        return await asyncio.wait_for(task, TIMEOUT_S)

    np.testing.assert_array_equal(asyncio.run(main()), noise(MIB))


async def _await(ticket: dualblade.Ticket) -> Any:
    return await ticket


# ---- closing -------------------------------------------------------------------------------------


def test_close_waits_for_what_is_under_way(slow: Any) -> None:
    device, store = slow
    device.add_rule("read", "hold")
    device.add_rule("write", "hold")
    forgotten = store.put_async("y", noise(5000, 1))
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(store.get, "x")
        device.wait_held(2)
        closing = pool.submit(store.close)
        while not store.closed:
            assert not closing.done()
        with pytest.raises(ClosedError):
            store.get("x")
        assert not closing.done()
        device.release()
        closing.result(TIMEOUT_S)
        np.testing.assert_array_equal(reading.result(TIMEOUT_S), noise(MIB))
    assert forgotten.result() is None
    device.clear()
    with dualblade.open(device.path) as again:
        np.testing.assert_array_equal(again.get("y"), noise(5000, 1))


@pytest.mark.parametrize("seed", range(8))
def test_closing_in_the_midst_of_work_keeps_what_was_done(path: Path, seed: int) -> None:
    """Every operation succeeds or raises ClosedError; what succeeded is there afterwards."""
    store = dualblade.open(path, size="64MiB", memory="1MiB")
    begun = threading.Semaphore(0)

    def work(number: int) -> tuple[int, np.ndarray | None]:
        random = np.random.default_rng(100 * seed + number)
        rows = 0
        stored = None
        try:
            store.reserve(f"rows {number}", (5000, 100), "uint8")
            for i in range(100_000):
                array = noise(int(random.choice([10, 5000, 400_000])), i)
                if i % 2:
                    store.put(f"x {number}", array)
                else:
                    store.put_async(f"x {number}", array)
                stored = array
                if rows < 5000:
                    store.append(f"rows {number}", np.full((1, 100), number, np.uint8))
                    rows += 1
                if i % 3 == 0:
                    np.testing.assert_array_equal(store.get(f"x {number}"), array)
                if i % 7 == 0:
                    store.get_async(f"rows {number}")
                if i % 11 == number:
                    store.flush()
                begun.release()
        except ClosedError:
            pass
        return rows, stored

    def close() -> None:
        for _ in range(10 + 5 * seed):
            assert begun.acquire(timeout=TIMEOUT_S)
        at_once(store.close, store.close)

    *results, _ = at_once(*(lambda n=n: work(n) for n in range(4)), close)
    with dualblade.open(path) as again:
        assert again.check() == []
        for number, (rows, stored) in enumerate(results):
            if f"rows {number}" in again:
                found = again.get(f"rows {number}")
                assert found.shape == (rows, 100)
                assert (found == number).all()
            if stored is not None:
                np.testing.assert_array_equal(again.get(f"x {number}"), stored)


def test_two_threads_close_at_once(path: Path) -> None:
    for _ in range(10):
        store = dualblade.open(path, size="4MiB") if not path.exists() else dualblade.open(path)
        store.put_async("x", noise(CHUNK))
        at_once(store.close, store.close, store.close)
        assert store.closed
    with dualblade.open(path) as store:
        np.testing.assert_array_equal(store.get("x"), noise(CHUNK))


def test_a_flush_beside_a_close_loses_nothing(path: Path) -> None:
    dualblade.open(path, size="16MiB").close()
    for i in range(20):
        store = dualblade.open(path)
        for number in range(8):
            store.put(f"{number}", noise(5000, 10 * i + number))

        def flush(store: dualblade.TensorStore = store) -> None:
            try:
                store.flush()
            except ClosedError:
                pass

        at_once(flush, store.close, flush)
        with dualblade.open(path) as store:
            for number in range(8):
                np.testing.assert_array_equal(store.get(f"{number}"), noise(5000, 10 * i + number))


def test_a_signal_handler_may_close_what_is_being_closed(slow: Any) -> None:
    device, store = slow
    store.put("y", noise(10))
    device.add_rule("write", "hold")
    store.put_async("z", noise(10))
    device.wait_held(1)
    closed = threading.Event()

    def handler(*_: Any) -> None:
        store.close()
        closed.set()

    before = signal.signal(signal.SIGUSR1, handler)
    try:

        def interrupt() -> None:
            while not store.closed:
                pass
            _thread.interrupt_main(signal.SIGUSR1)
            closed.wait(TIMEOUT_S)
            device.release()

        thread = threading.Thread(target=interrupt)
        thread.start()
        store.close()
        thread.join(TIMEOUT_S)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert closed.is_set()
    device.clear()
    with dualblade.open(device.path) as again:
        assert again.keys() == ["x", "y", "z"]


def test_a_signal_handler_may_not_flush_what_is_being_flushed(slow: Any) -> None:
    device, store = slow
    store.put("y", noise(10))
    device.add_rule("fsync", "hold")
    errors = []

    def handler(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="goes on when the handler returns") as error:
            store.flush()
        errors.append(error)

    def interrupt() -> None:
        device.wait_held(1)
        _thread.interrupt_main(signal.SIGUSR1)
        device.release()

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        store.flush()
        thread.join(TIMEOUT_S)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(errors) == 1
    device.clear()
    store.flush()
    store.close()
    with dualblade.open(device.path) as again:
        assert "y" in again.keys()


def test_a_group_may_vanish_while_it_is_moved(store: dualblade.TensorStore) -> None:
    """Its only tensor is put into another group, by somebody who knows nothing of the move."""
    ended = threading.Event()

    def put() -> None:
        try:
            for number in range(1500):
                store.put("x", noise(5000), group="gh"[number % 2])
        finally:
            ended.set()

    def move() -> None:
        number = 0
        while not ended.is_set():
            number += 1
            with contextlib.suppress(KeyNotFoundError):
                store.set_path("g", ("direct", "pagecache")[number % 2])

    at_once(put, move, move)
