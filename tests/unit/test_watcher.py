"""A store follows the memory: groups leave before the kernel has to take them, and come back."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dualblade
from tests.helpers import MIB, Memory, noise, residency, until

TIMEOUT_S = 120


@pytest.fixture
def store(memory: Memory, path: Path) -> Iterator[dualblade.TensorStore]:
    """8 groups of 8 MiB, of which all are page-cached: 84 MiB are free less the margin."""
    with dualblade.open(path, size="128MiB") as store:
        for i in range(8):
            store.put(f"k{i}", noise(4 * MIB, i), group=f"g{i}")
            store.put(f"v{i}", noise(4 * MIB, 100 + i), group=f"g{i}")
        assert cached(store) == list(range(8))
        yield store
        for i in range(8):
            np.testing.assert_array_equal(store.get(f"k{i}"), noise(4 * MIB, i))
            np.testing.assert_array_equal(store.get(f"v{i}"), noise(4 * MIB, 100 + i))
        assert store.check() == []
        assert memory.error is not None or residency(store)["problems"] == 0
    assert memory.is_closed


def cached(store: dualblade.TensorStore) -> list[int]:
    groups = store.stats()["groups"]
    return [i for i in range(8) if groups.get(f"g{i}", {"path": ""})["path"] == "pagecache"]


def resident_bytes(store: dualblade.TensorStore, group: int) -> int:
    found = 0
    for key in (f"k{group}", f"v{group}"):
        info = store.info(key)
        found += store._device.cached_bytes(info.offset, info.extent_bytes)[0]
    return found


def test_groups_leave_when_memory_goes_and_return_with_it(
    store: dualblade.TensorStore, memory: Memory
) -> None:
    memory.free_bytes = (16 + 33) * MIB
    until(lambda: len(cached(store)) == 4, "the groups stay")
    assert cached(store) == [0, 2, 4, 6]  # spread
    gone = (1, 3, 5, 7)
    until(lambda: not any(resident_bytes(store, group) for group in gone), "their pages stay")
    for group in cached(store):
        assert resident_bytes(store, group) == 8 * MIB
    # A move is counted after it is made.
    until(lambda: residency(store)["moves_to_direct"] == 4, "the moves are not counted")
    told = residency(store)
    assert told["budget_bytes"] == store.memory_budget == 33 * MIB
    assert "groups had to leave" in told["reason"]
    assert told["margin_bytes"] == 16 * MIB
    assert told["live"] is True
    assert told["binding"] == "spread"
    memory.free_bytes = 100 * MIB
    until(lambda: len(cached(store)) == 8, "the groups stay away")
    until(lambda: residency(store)["moves_to_pagecache"] == 4, "the moves are not counted")


def test_a_group_that_is_being_read_comes_back(
    store: dualblade.TensorStore, memory: Memory
) -> None:
    """A decoder always reads ahead the next layers on the direct path."""
    memory.free_bytes = 16 * MIB
    until(lambda: cached(store) == [], "some stay")
    reads = [store._shared(f"k{i}") for i in range(8)]
    with contextlib.ExitStack() as reading:
        for read in reads:
            reading.enter_context(read)
        memory.free_bytes = 100 * MIB
        until(lambda: len(cached(store)) == 8, "readers keep groups away")


def test_the_budget_reaches_nothing(store: dualblade.TensorStore, memory: Memory) -> None:
    memory.free_bytes = 0
    until(lambda: cached(store) == [], "some stay")
    assert store.stats()["pagecache_bytes"] == store.memory_budget == 0
    store.put("new", noise(MIB), group="another")
    assert store.info("new").path == "direct"


def test_a_group_in_use_leaves_too(store: dualblade.TensorStore, memory: Memory) -> None:
    """One by a ticket that nobody waits for, one by a reader that never stops."""
    forgotten = store.get_async("k7")
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            store.get_many(["k0", "v0"])

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            memory.free_bytes = 0
            until(lambda: cached(store) == [], "those in use stay")
        finally:
            ended.set()
        for reader in readers:
            reader.result(TIMEOUT_S)
    np.testing.assert_array_equal(forgotten.result(), noise(4 * MIB, 7))
    until(lambda: resident_bytes(store, 0) == 0, "its pages stay")


def test_what_somebody_asked_for_stays(store: dualblade.TensorStore, memory: Memory) -> None:
    store.set_path("g3", "direct")
    store.set_path("g7", "pagecache")
    memory.free_bytes = (16 + 17) * MIB
    until(lambda: len(cached(store)) == 2, "the groups stay")
    assert cached(store) == [0, 7]
    memory.free_bytes = 100 * MIB
    until(lambda: len(cached(store)) == 7, "the groups stay away")
    assert cached(store) == [0, 1, 2, 4, 5, 6, 7]


def test_room_that_is_freed_is_used(store: dualblade.TensorStore, memory: Memory) -> None:
    memory.free_bytes = (16 + 17) * MIB
    until(lambda: cached(store) == [0, 4], "the groups stay")
    store.delete_many(["k0", "v0"])
    until(lambda: len(cached(store)) == 2, "nobody takes the room")
    store.put("k0", noise(4 * MIB, 0), group="g0")
    store.put("v0", noise(4 * MIB, 100), group="g0")
    assert store.stats()["pagecache_bytes"] <= store.memory_budget


def test_the_watcher_survives_what_goes_wrong(store: dualblade.TensorStore, memory: Memory) -> None:
    memory.error = OSError("no /proc today")
    until(lambda: residency(store)["problems"] > 2, "nothing is said of it")
    assert "no /proc today" in residency(store)["last_problem"]
    memory.error = None
    memory.free_bytes = (16 + 17) * MIB
    until(lambda: len(cached(store)) == 2, "it gave up")
    memory.error = OSError("said at the end")


def test_a_group_that_cannot_be_written_back_keeps_no_other(
    memory: Memory, fault_device: Callable[..., Any], loop_over: Callable[..., str]
) -> None:
    """On a loop device over one that fails: the page cache is the kernel's."""
    fault = fault_device(64 * MIB)
    loop = loop_over(fault.path, "--direct-io=on")
    with dualblade.open(loop, format=True) as store:
        for i in range(4):
            store.put(f"k{i}", noise(4 * MIB, i), group=f"g{i}")
        store.flush()
        store.reserve("rows", (4 * MIB,), "uint8", group="g3")
        place = store.info("rows").offset
        fault.add_rule("write", "EIO", lo=place, hi=place + 4 * MIB)
        store.append("rows", noise(MIB))
        memory.free_bytes = 0
        until(lambda: cached(store) in ([], [3]), "one that fails keeps the others")
        until(lambda: residency(store)["problems"] > 0, "nothing is said of it")
        fault.clear()
        until(lambda: cached(store) == [], "it is not tried again")
        for i in range(4):
            np.testing.assert_array_equal(store.get(f"k{i}"), noise(4 * MIB, i))
        np.testing.assert_array_equal(store.get("rows"), noise(MIB))
        assert store.check() == []
        store.flush()


def test_evictions_are_seen_and_widen_the_margin(
    store: dualblade.TensorStore, memory: Memory
) -> None:
    until(lambda: residency(store)["resident_bytes"] == 64 * MIB, "nobody looks at the pages")
    info = store.info("k2")
    store._device.drop_cached(info.offset, info.extent_bytes)  # as the kernel would
    until(lambda: residency(store)["evicted_bytes"] > 0, "nobody misses them")
    assert residency(store)["evicted_bytes"] == 4 * MIB
    until(lambda: residency(store)["margin_bytes"] > 16 * MIB, "the margin stays")


def test_a_size_is_the_most_that_is_taken(memory: Memory, path: Path) -> None:
    with dualblade.open(path, size="64MiB", memory="8MiB") as store:
        assert store.memory_budget == 8 * MIB
        memory.free_bytes = 20 * MIB
        until(lambda: store.memory_budget == 4 * MIB, "the budget stays")
        memory.free_bytes = 100 * MIB
        until(lambda: store.memory_budget == 8 * MIB, "the budget stays")


def test_a_store_that_is_bound_once_has_no_thread(memory: Memory, path: Path) -> None:
    before = threading.active_count()
    for options in ({"live": False}, {"policy": "direct"}, {"policy": "pagecache"}):
        with dualblade.open(path, size="64MiB", memory="8MiB", format=True, **options) as store:
            assert threading.active_count() == before
            assert residency(store)["live"] is False
            assert store.memory_budget == 8 * MIB
            store.put("x", noise(MIB))
            store.flush()
            store.delete("x")


def test_binding_head_keeps_the_first(memory: Memory, path: Path) -> None:
    memory.free_bytes = (16 + 33) * MIB
    with dualblade.open(path, size="128MiB", binding="head") as store:
        for i in range(8):
            store.put(f"k{i}", noise(8 * MIB), group=f"g{i}")
        assert cached(store) == [0, 1, 2, 3]
        memory.free_bytes = (16 + 17) * MIB
        until(lambda: len(cached(store)) == 2, "the groups stay")
        assert cached(store) == [0, 1]
    with pytest.raises(ValueError, match="binding='tail' is unknown: take one of spread, head"):
        dualblade.open(path, binding="tail")  # type: ignore[arg-type]


def test_rebalance_binds_what_is_empty_anew(memory: Memory, path: Path) -> None:
    memory.free_bytes = (16 + 33) * MIB
    with dualblade.open(path, size="128MiB", live=False, memory=32 * MIB) as store:
        for i in range(8):
            store.reserve(f"k{i}", (8 * MIB,), "uint8", group=f"g{i}")
        assert cached(store) == [0, 1, 2, 3]
        store.append("k1", noise(MIB))
        store.rebalance()
        assert cached(store) == [0, 1, 2, 4]
        store.rebalance()
        assert cached(store) == [0, 1, 2, 4]
        np.testing.assert_array_equal(store.get("k1"), noise(MIB))
        assert store.stats()["pagecache_bytes"] == MIB
        assert residency(store)["claimed_bytes"] == 32 * MIB
        assert store.path_of("g1") == "pagecache"
        assert store.path_of("g3") == "direct"
        with pytest.raises(dualblade.KeyNotFoundError, match="no group 'g9'"):
            store.path_of("g9")


# ---- how it ends ---------------------------------------------------------------------------------


def watchers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("dualblade-")]


def test_a_store_that_is_dropped_ends_its_threads(path: Path) -> None:
    store = dualblade.open(path, size="64MiB")
    store.put("x", noise(MIB))
    assert len(watchers()) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del store
        gc.collect()
        until(lambda: watchers() == [], "a thread keeps the store alive")
    with dualblade.open(path) as store:
        np.testing.assert_array_equal(store.get("x"), noise(MIB))


def test_close_in_the_midst_of_moves(memory: Memory, path: Path) -> None:
    for round_ in range(10):
        memory.free_bytes = 100 * MIB
        with dualblade.open(path, size="128MiB", format=True) as store:
            for i in range(8):
                store.put(f"k{i}", noise(4 * MIB, i), group=f"g{i}")
            memory.free_bytes = 0
            if round_ % 2:
                until(lambda store=store: len(cached(store)) < 8, "nothing moves")
        assert watchers() == []
        with dualblade.open(path, live=False, memory=MIB) as store:
            for i in range(8):
                np.testing.assert_array_equal(store.get(f"k{i}"), noise(4 * MIB, i))


def test_close_from_a_signal_handler(memory: Memory, path: Path) -> None:
    store = dualblade.open(path, size="128MiB")
    before = signal.signal(signal.SIGALRM, lambda *_: store.close())
    try:
        for i in range(4):
            store.put(f"k{i}", noise(4 * MIB, i), group=f"g{i}")
        memory.free_bytes = 0
        signal.setitimer(signal.ITIMER_REAL, 0.15)
        with pytest.raises(dualblade.ClosedError):
            while True:
                store.stats()
                store.get("k0")
    finally:
        signal.signal(signal.SIGALRM, before)
    store.close()
    assert watchers() == []


def test_a_child_has_no_watcher_and_disturbs_none(
    store: dualblade.TensorStore, memory: Memory
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            store.close()
            try:
                store.put("x", noise(10))
            except dualblade.ClosedError:
                status = 0 if watchers() == [] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    memory.is_closed = False  # the child's was a copy, but the stand-in is asked at the end
    memory.free_bytes = (16 + 17) * MIB
    until(lambda: len(cached(store)) == 2, "the parent's watcher has ended")


# ---- under load ----------------------------------------------------------------------------------


def test_data_is_right_while_paths_change_all_the_time(memory: Memory, path: Path) -> None:
    """Groups go and come by the watcher and by hand, under appends, reads, puts and deletes."""
    rows = noise(40_000 * 100).reshape(40_000, 100)
    deadline = time.monotonic() + 8
    with dualblade.open(path, size="256MiB") as store:
        for i in range(6):
            store.reserve(f"r{i}", rows.shape, "uint8", group=f"g{i}")
        memory.free_bytes = 60 * MIB
        moves = 0

        def append(i: int) -> int:
            dice = np.random.default_rng(i)
            done = 0
            while time.monotonic() < deadline and done < len(rows):
                count = int(dice.integers(1, 200))
                store.append(f"r{i}", rows[done : done + count])
                done = min(len(rows), done + count)
            return done

        def read(seed: int) -> None:
            dice = np.random.default_rng(seed)
            while time.monotonic() < deadline:
                found = store.get(f"r{dice.integers(6)}")
                np.testing.assert_array_equal(found, rows[: len(found)])

        def put() -> None:
            i = 0
            while time.monotonic() < deadline:
                i += 1
                store.put("x", noise(300_000, i), group="g0")
                store.put("y", noise(2 * MIB, i), group="alone")
                np.testing.assert_array_equal(store.get("x"), noise(300_000, i))
                store.delete("y")

        def move() -> None:
            nonlocal moves
            dice = np.random.default_rng(9)
            while time.monotonic() < deadline:
                store._bind(f"g{dice.integers(6)}", "direct")
                moves += 1
                store._fill(time.monotonic() + 100)
                assert store.stats()["pagecache_bytes"] <= 100 * MIB

        def tremble() -> None:
            dice = np.random.default_rng(10)
            while time.monotonic() < deadline:
                memory.free_bytes = int(dice.integers(10, 60)) * MIB
                time.sleep(0.05)

        with ThreadPoolExecutor(12) as pool:
            appends = [pool.submit(append, i) for i in range(6)]
            others = [pool.submit(read, seed) for seed in range(2)]
            others += [pool.submit(work) for work in (put, move, tremble)]
            done = [each.result(TIMEOUT_S) for each in appends]
            for each in others:
                each.result(TIMEOUT_S)
        told = residency(store)
        assert told["problems"] == 0, told["last_problem"]
        assert moves + told["moves_to_direct"] + told["moves_to_pagecache"] > 200
        for i in range(6):
            np.testing.assert_array_equal(store.get(f"r{i}"), rows[: done[i]])
        assert store.check() == []


PROGRAM = """
import json, sys, time
import numpy as np, dualblade
MIB = 1 << 20
def noise(i):
    return np.random.default_rng(i).integers(0, 256, 8 * MIB, np.uint8)
sums = {}
with dualblade.open(sys.argv[1], size="320MiB") as store:
    for i in range(32):
        array = noise(i)
        sums[i] = int(array.view(np.uint64).sum())
        store.put(f"x{i}", array, group=f"g{i}")
    del array
    out = dualblade.aligned_empty((8 * MIB,), np.uint8)
    for i in range(32): store.get(f"x{i}", out)
    def step():
        for i in range(32):
            store.get(f"x{i}", out)
            assert int(out.view(np.uint64).sum()) == sums[i], i
        stats = store.stats()
        assert stats["residency"]["problems"] == 0, stats["residency"]
        return sum(group["path"] == "pagecache" for group in stats["groups"].values())
    for line in sys.stdin:
        deadline = time.monotonic() + 20
        while True:
            cached = step()
            stats = store.stats()
            enough = eval(line, {"cached": cached})
            if enough or time.monotonic() > deadline: break
        print(json.dumps({"cached": cached, "budget": store.memory_budget,
            "pagecache": stats["pagecache_bytes"], "told": stats["residency"]}), flush=True)
"""


def test_groups_follow_the_limit_of_a_cgroup(
    memory_cgroup: Callable[[int], Any], path: Path
) -> None:
    """256 MiB of tensors are read while the limit falls from 512 MiB to 192 and rises again."""
    group = memory_cgroup(512 * MIB)
    command = [sys.executable, "-c", PROGRAM, str(path)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with group.start(command, **pipes) as process:

        def ask(condition: str) -> dict[str, Any]:
            process.stdin.write(condition + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        try:
            assert ask("cached == 32")["cached"] == 32
            group.set_limit(192 * MIB)
            # The interpreter and the margin take 48 MiB and more of it; each group has 8.
            less = ask("cached <= 18")
            assert 0 < less["cached"] <= 18
            assert less["pagecache"] <= less["budget"] < 192 * MIB
            steady = ask("True")
            assert steady["cached"] >= less["cached"]
            group.set_limit(512 * MIB)
            assert ask("cached == 32")["cached"] == 32
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert group.out_of_memory_kills == 0
