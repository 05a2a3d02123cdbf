"""Pipelines that end early, fail or are forgotten, and memory that somebody still works with."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dualblade
from dualblade.gpu import HostDevice, HostStream
from dualblade.pipeline import Pipeline
from tests.helpers import Gate, noise, until

MIB = 1 << 20
FAST = 50e9
SMALL = {"staging": "8MiB", "chunk_bytes": MIB, "depth": 2}
GROUPS = 8


@pytest.fixture
def store(tmp_path: Path) -> Iterator[dualblade.TensorStore]:
    with dualblade.open(tmp_path / "kv.img", size="96MiB", memory="32MiB", live=False) as store:
        yield store
        until(lambda: store.stats()["operations_active"] == 0, "an operation is still under way")


@pytest.fixture
def expected(store: dualblade.TensorStore) -> dict[str, np.ndarray]:
    """Groups of two tensors, of a chunk each: the first ones on the drive, then page-cached."""
    found = {f"{n}/{which}": noise(MIB, 2 * n + (which == "v")) for n in range(2 * GROUPS)
             for which in "kv"}  # fmt: skip
    for n, keys in enumerate(groups(range(2 * GROUPS))):
        store.put_many({key: found[key] for key in keys}, group=str(n))
        store.set_path(str(n), "direct" if n < GROUPS else "pagecache")
    return found


def groups(numbers: range) -> list[list[str]]:
    return [[f"{n}/k", f"{n}/v"] for n in numbers]


def check(pipe: Pipeline, expected: dict[str, np.ndarray], wanted: list[list[str]]) -> None:
    for keys, arrays in zip(wanted, pipe.stream(wanted), strict=True):
        for key, array in zip(keys, arrays, strict=True):
            assert (array == expected[key]).all(), key


class Copies:
    """Lets so many copies by, and holds up the others until it is opened."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.opened = threading.Event()
        self.held = threading.Event()

    def __call__(self, direction: str, size: int) -> None:
        self.free -= 1
        if self.free < 0:
            self.held.set()
            assert self.opened.wait(60)


# ---- memory that somebody still works with -------------------------------------------------------


def test_memory_of_a_cancelled_group_waits_for_who_had_it_before(
    store: dualblade.TensorStore, expected: dict[str, np.ndarray]
):
    """A group gets memory that the caller's stream is still at work with, and is cancelled before
    any of it has come: who gets the memory next has to wait for the caller's stream all the same.
    """
    copies = Copies(free=4)
    device = HostDevice(copy_bytes_per_s=FAST, before_copy=copies)
    kernel = Gate()
    seen: list[np.ndarray] = []
    ours, theirs = device.stream(), device.stream()
    with store.pipeline(device, **SMALL) as pipe, ours:
        first, second = pipe.stream(groups(range(1))), pipe.stream(groups(range(1, 2)))
        next(first)
        with theirs:
            arrays = next(second)
            theirs.launch(kernel)
            theirs.launch(lambda: seen.extend(array.copy() for array in arrays))
        first.close()
        second.close()
        third = pipe.stream(groups(range(2, 4)))
        next(third)
        assert copies.held.wait(60)
        until(lambda: pipe.stats()["direct"]["jobs"] == 4, "the fourth group is not begun")
        threading.Timer(0.1, copies.opened.set).start()
        third.close()  # the fourth group had the second one's memory
        wanted = groups(range(GROUPS, 2 * GROUPS))
        checking = threading.Thread(target=check, args=(pipe, expected, wanted))
        checking.start()
        checking.join(1)
        kernel.opened.set()
        checking.join()
        for stream in (ours, theirs):
            stream.record().wait()
            stream.close()
    for array, key in zip(seen, groups(range(1, 2))[0], strict=True):
        assert (array == expected[key]).all()


@pytest.mark.parametrize("bandwidth", [None, FAST])
@pytest.mark.parametrize("lanes", [range(GROUPS), range(GROUPS // 2, GROUPS + GROUPS // 2)])
def test_the_same_memory_may_be_given_again(
    store: dualblade.TensorStore,
    expected: dict[str, np.ndarray],
    bandwidth: float | None,
    lanes: range,
):
    """Two arrays in turn, as if by somebody with a double buffer, and then all in one array."""
    wanted = groups(lanes)
    device = HostDevice(copy_bytes_per_s=bandwidth)
    whole = np.zeros((2, 2, MIB), np.uint8)
    with store.pipeline(device) as pipe:
        for turns in (2, 1):
            out = [list(whole[n % turns]) for n in range(len(wanted))]
            for n, arrays in enumerate(pipe.stream(wanted, out=out)):
                for key, array, right in zip(wanted[n], arrays, whole[n % turns], strict=True):
                    assert np.shares_memory(array, right)
                    pipe.settle()  # what is under way has come
                    assert (array == expected[key]).all(), (turns, key)


def test_memory_that_the_caller_makes_on_the_way_is_written_after_it_was_made(
    store: dualblade.TensorStore, expected: dict[str, np.ndarray]
):
    """As cupy.zeros() in a generator: the zeros are in the caller's stream, before the group."""
    device = HostDevice(copy_bytes_per_s=FAST)
    gates = [Gate() for _ in range(GROUPS)]
    wanted = groups(range(GROUPS))

    def made(stream: HostStream) -> Iterator[list[np.ndarray]]:
        for gate in gates:
            arrays = [np.ones(MIB, np.uint8) for _ in "kv"]
            stream.launch(gate)
            for array in arrays:
                stream.launch(lambda array=array: array.fill(0))
            yield arrays

    seen: list[np.ndarray] = []
    with store.pipeline(device) as pipe, device.stream() as stream:
        for n, arrays in enumerate(pipe.stream(wanted, out=made(stream))):
            if n == 0:  # what could come already has
                for gate in gates:
                    gate.opened.set()
            stream.launch(lambda arrays=arrays: seen.extend(array.copy() for array in arrays))
            stream.record().wait()
        stream.close()
    for array, key in zip(seen, [key for keys in wanted for key in keys], strict=True):
        assert (array == expected[key]).all(), key


# ---- a device that fails -------------------------------------------------------------------------


class BrokenStream(HostStream):
    """From some time on events can't be recorded, as on a GPU after an illegal access."""

    is_broken = False

    def record(self) -> Any:
        if self.is_broken:
            raise dualblade.DeviceError(5, "an earlier kernel failed", device="here")
        return super().record()


class BrokenDevice(HostDevice):
    def stream(self) -> BrokenStream:
        return BrokenStream(self._schedule, self._current)


@pytest.mark.parametrize("put", [False, True])
def test_a_device_that_fails_raises_and_leaves_nothing_behind(
    store: dualblade.TensorStore,
    expected: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    put: bool,
):
    with store.pipeline(BrokenDevice(copy_bytes_per_s=FAST), **SMALL) as pipe:
        monkeypatch.setattr(BrokenStream, "is_broken", True)
        for _ in range(2):
            with pytest.raises(dualblade.DeviceError, match="an earlier kernel"):
                if put:
                    pipe.put({"new": np.zeros(3 * MIB, np.uint8)})
                else:
                    list(pipe.stream(groups(range(GROUPS))))
        pipe.settle()
        assert pipe.stats()["staging_taken_bytes"] == 0
        monkeypatch.setattr(BrokenStream, "is_broken", False)
        check(pipe, expected, groups(range(GROUPS)))
    assert "new" not in store


# ---- the end -------------------------------------------------------------------------------------


def test_a_put_may_be_waited_for_while_the_pipeline_closes(store: dualblade.TensorStore):
    copies = Copies(free=0)
    pipe = store.pipeline(HostDevice(copy_bytes_per_s=FAST, before_copy=copies), **SMALL)
    new = noise(5 * MIB, 5)
    ticket = pipe.put_async({"new": new})
    assert copies.held.wait(60)
    closing = threading.Thread(target=pipe.close)
    closing.start()
    until(lambda: pipe._lanes["put"]._is_closing, "the pipeline does not close")
    with pytest.raises(TimeoutError):
        ticket.result(timeout=0.1)
    assert not ticket.done()
    copies.opened.set()
    ticket.result()
    assert (store.get("new") == new).all()
    closing.join()


def test_a_lane_that_has_ended_is_not_waited_for(
    store: dualblade.TensorStore, expected: dict[str, np.ndarray]
):
    """As when another thread closes the pipeline just before a group would begin."""
    with store.pipeline(HostDevice(copy_bytes_per_s=FAST), **SMALL) as pipe:
        stream = pipe.stream(groups(range(GROUPS)))
        next(stream)
        for lane in pipe._lanes.values():
            lane.begin_close()
        raised: list[BaseException] = []

        def go_on() -> None:
            try:
                list(stream)
            except dualblade.ClosedError as error:
                raised.append(error)

        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        thread.join(60)
        assert raised


def test_garbage_that_a_copy_engine_collects_is_closed_all_the_same(
    store: dualblade.TensorStore, expected: dict[str, np.ndarray]
):
    """A pipeline that nobody has any more may be collected in any thread, so also in the one that
    it waits for."""
    copies = Copies(free=2)
    collected = threading.Event()

    def before_copy(direction: str, size: int) -> None:
        copies(direction, size)
        if copies.free < 0 and not collected.is_set():
            gc.collect()
            collected.set()

    device = HostDevice(copy_bytes_per_s=FAST, before_copy=before_copy)
    gc.disable()
    try:
        forgotten = store.pipeline(device, **SMALL)
        forgotten.stream_of_it = forgotten.stream(groups(range(GROUPS)))
        next(forgotten.stream_of_it)
        assert copies.held.wait(60)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            del forgotten
            copies.opened.set()
            assert collected.wait(60)
        assert "unclosed <dualblade.Pipeline" in " ".join(str(each.message) for each in warned)
    finally:
        gc.enable()
    until(lambda: dualblade.gpu.counters()["gpu_arenas"] == 0, "it is not closed")


@pytest.mark.parametrize("bandwidth", [None, 1e9])
def test_a_process_ends_with_a_pipeline_that_nobody_closed(tmp_path: Path, bandwidth: float | None):
    script = f"""
import dualblade, numpy
from dualblade.gpu import HostDevice

store = dualblade.open({str(tmp_path / "kv.img")!r}, size="64MiB", memory="32MiB")
keys = [f"key {{n}}" for n in range(6)]
store.put_many({{key: numpy.ones(1 << 20, numpy.uint8) for key in keys}})
pipe = store.pipeline(HostDevice(copy_bytes_per_s={bandwidth}))
stream = pipe.stream([[key] for key in keys])
next(stream)
pipe.itself = pipe
ticket = pipe.put_async({{"late": numpy.ones(1 << 20, numpy.uint8)}})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    with dualblade.open(tmp_path / "kv.img") as store:
        assert (store.get("late") == 1).all()
