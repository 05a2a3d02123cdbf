"""What a device that fails does to a Device and to a store on it: nothing that is not said."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

import dualblade
from dualblade import _core
from dualblade.errors import (
    CorruptionError,
    DeviceError,
    DualbladeWarning,
    NoSpaceError,
)
from tests.helpers import MIB, noise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.faultdev import FaultDevice

PATHS = ("direct", "pagecache")
BLOCK = _core.BLOCK_BYTES
CHUNK = 64 << 10
ATTEMPTS_MAX = 300  # far more I/Os than any operation here takes


@pytest.fixture
def faulty(fault_device: Callable[..., FaultDevice]) -> Iterator[FaultDevice]:
    made = fault_device(12 * MIB)
    yield made
    made.medium.unlink()  # many tests of many megabytes


@pytest.fixture
def device(faulty: FaultDevice, engine: str) -> Iterator[_core.Device]:
    with open_device(faulty, engine) as opened:
        faulty.clear()
        yield opened


def open_device(faulty: FaultDevice, engine: str) -> _core.Device:
    return _core.Device.open(
        faulty.path, engine=engine, chunk_bytes=CHUNK, request_bytes=CHUNK, staging_bytes=4 * CHUNK
    )


def aligned(data: np.ndarray) -> np.ndarray:
    memory = _core.aligned_empty(data.shape, data.dtype)
    memory[:] = data
    return memory


# ---- the device: short, late and failing I/O -----------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("moved", [1, 511, 512, 4095, 4096, 4097, 40_000, CHUNK - 1])
@pytest.mark.parametrize("skew", [0, 1])
def test_short_transfers_are_resumed(
    device: _core.Device, faulty: FaultDevice, engine: str, path: str, moved: int, skew: int
):
    """Each of the first transfers moves so many bytes; with skew they go through staging."""
    data = aligned(noise(3 * CHUNK + 100 * skew, moved))[skew:]
    sums = np.zeros(-(-data.size // CHUNK), np.uint64)
    faulty.add_rule("write", {"short": moved}, times=20)
    if path == "direct" and engine != "threads":
        # The kernel's FUSE makes an error of a short asynchronous write; that it is resumed where
        # it is one is seen in tests/c/test_queue_faults.c.
        with pytest.raises(DeviceError, match="write.*EIO"):
            device.write([(CHUNK, data)], path=path, checksums=[sums]).wait()
        faulty.clear()
        device.write([(CHUNK, data)], path=path, checksums=[sums]).wait()
    else:
        device.write([(CHUNK, data)], path=path, checksums=[sums]).wait()
        assert device.stats()[path]["resumed"] >= 3
        assert device.stats()[path]["errors"] == 0
    before = device.stats()[path]
    faulty.clear()
    faulty.add_rule("read", {"short": moved}, times=20)
    out = _core.aligned_empty(data.size + skew, np.uint8)[skew:]
    device.read([(CHUNK, out)], path=path, checksums=[sums]).wait()
    assert np.array_equal(out, data)
    stats = device.stats()[path]
    assert stats["resumed"] >= before["resumed"] + 3
    assert stats["errors"] == before["errors"]
    assert stats["in_flight"] == 0
    faulty.clear()
    out[:] = 0
    device.read([(CHUNK, out)], checksums=[sums]).wait()
    assert np.array_equal(out, data)


def test_a_device_that_never_moves_a_whole_block_is_an_error(
    device: _core.Device, faulty: FaultDevice
):
    for kind, start in (("write", device.write), ("read", device.read)):
        faulty.add_rule(kind, {"short": 100}, lo=CHUNK)
        done = start([(0, aligned(noise(2 * CHUNK, 1)))])
        with pytest.raises(DeviceError, match=kind) as caught:
            done.wait()
        assert (caught.value.errno, caught.value.offset) == (errno.EIO, CHUNK)
        faulty.clear()
        start([(0, aligned(noise(2 * CHUNK, 1)))]).wait()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EREMOTEIO"])
def test_an_error_names_its_place_and_spares_the_rest(
    device: _core.Device, faulty: FaultDevice, path: str, kind: str, name: str
):
    data = [aligned(noise(2 * CHUNK, i)) for i in range(8)]
    requests = [(i * 2 * CHUNK, part) for i, part in enumerate(data)]
    device.write(requests, path=path).wait()
    faulty.add_rule(kind, name, lo=7 * CHUNK, hi=8 * CHUNK)
    start = device.read if kind == "read" else device.write
    done = start(requests, path=path)
    expected = NoSpaceError if name == "ENOSPC" else DeviceError
    for _ in range(2):  # the result stays
        with pytest.raises(expected, match=name) as caught:
            done.wait()
        error = caught.value
        assert error.errno == getattr(errno, name)
        assert (error.device, error.operation) == (os.fspath(faulty.path), kind)
        assert (error.offset, error.length) == (7 * CHUNK, 2 * CHUNK)
        assert str(7 * CHUNK) in str(error)
        assert str(faulty.path) in str(error)
    assert device.stats()[path]["errors"] == 1
    for i, (offset, part) in enumerate(requests):  # the other requests of the batch are done
        if i != 3:
            out = np.zeros_like(part)
            device.read([(offset, out)], path=path).wait()
            assert np.array_equal(out, noise(2 * CHUNK, i))
    faulty.clear()
    start(requests, path=path).wait()


@pytest.mark.parametrize("path", PATHS)
def test_every_request_of_a_batch_may_fail(device: _core.Device, faulty: FaultDevice, path: str):
    faulty.add_rule("read", "EIO")
    pending = [device.read([(0, bytearray(20 * CHUNK + i))], path=path) for i in range(10)]
    for done in pending:
        with pytest.raises(DeviceError, match="EIO"):
            done.wait()
    assert device.stats()[path]["in_flight"] == 0
    faulty.clear()
    device.read([(0, bytearray(20 * CHUNK))], path=path).wait()


@pytest.mark.parametrize("path", PATHS)
def test_a_slow_request_holds_up_no_other(device: _core.Device, faulty: FaultDevice, path: str):
    """A thread waits for what is held; what others submit meanwhile completes for them."""
    device.write([(0, noise(2 * MIB, 1))]).wait()
    faulty.add_rule("read", "hold", hi=CHUNK)
    late = bytearray(CHUNK)
    done = device.read([(0, late)], path=path)
    waiting = threading.Thread(target=done.wait)
    waiting.start()
    try:
        faulty.wait_held(1)
        for i in range(20):
            out = np.zeros(CHUNK, np.uint8)
            device.read([(MIB + i % 4 * CHUNK, out)], path=path).wait(30)
            assert np.array_equal(out, noise(2 * MIB, 1)[MIB + i % 4 * CHUNK :][:CHUNK])
        assert not done.done()
        with pytest.raises(TimeoutError):
            done.wait(0.01)
    finally:
        faulty.release()
        waiting.join()
    assert late == noise(2 * MIB, 1)[:CHUNK].tobytes()


def test_a_slow_batch_holds_up_no_other(faulty: FaultDevice, engine: str, tmp_path: Path):
    """Who waits for many requests wakes up for several at once, but not at the cost of others."""
    if engine == "threads":
        pytest.skip("its workers are all in the slow reads")
    other = tmp_path / "other.img"
    other.write_bytes(bytes(faulty.size_bytes))
    with _core.Device.open(
        [faulty.path, other],
        engine=engine,
        chunk_bytes=CHUNK,
        request_bytes=CHUNK,
        stripe_bytes=CHUNK,
    ) as device:
        faulty.add_rule("read", "hold")
        late = device.read([(2 * i * CHUNK, bytearray(CHUNK)) for i in range(64)])
        waiting = threading.Thread(target=late.wait)
        waiting.start()
        out = _core.aligned_empty(BLOCK, np.uint8)
        took = 0.0
        try:
            for _ in range(50):
                start = time.monotonic()
                device.read([(CHUNK, out)]).wait()
                took += time.monotonic() - start
                time.sleep(0.01)  # the other thread leads meanwhile
        finally:
            faulty.release()
            waiting.join()
    assert took < 0.15


def test_delayed_requests_arrive(device: _core.Device, faulty: FaultDevice):
    data = noise(10 * CHUNK, 1)
    faulty.add_rule("write", {"delay": 0.05}, nth=3, times=2)
    faulty.add_rule("read", {"delay": 0.05}, nth=2, times=2)
    start = time.monotonic()
    device.write([(0, data)]).wait()
    out = np.zeros_like(data)
    device.read([(0, out)]).wait()
    assert time.monotonic() - start >= 0.1
    assert np.array_equal(out, data)


@pytest.mark.parametrize("skew", [0, 1])
def test_what_the_medium_lost_is_corruption(device: _core.Device, faulty: FaultDevice, skew: int):
    """A flipped bit, a torn and a dropped write: the checksum of the chunk says so."""
    data = aligned(noise(4 * CHUNK + skew, 1))[skew:]
    sums = np.zeros(4, np.uint64)
    out = _core.aligned_empty(data.size + skew, np.uint8)[skew:]
    for kind, fault in [("write", {"torn": 1000}), ("write", "drop"), ("read", "flip")]:
        device.write([(0, bytes(data.size))]).wait()
        faulty.add_rule(kind, fault, lo=2 * CHUNK, hi=3 * CHUNK)
        device.write([(0, data)], checksums=[sums]).wait()
        with pytest.raises(CorruptionError, match=str(2 * CHUNK)) as caught:
            device.read([(0, out)], checksums=[sums]).wait()
        assert caught.value.offset == 2 * CHUNK
        faulty.clear()
    device.read([(0, out)], checksums=[sums]).wait()  # a flip on the wire is not on the medium
    assert np.array_equal(out, data)


def test_a_failed_flush_and_discard_say_so(device: _core.Device, faulty: FaultDevice):
    faulty.fail_nth("fsync", "EIO", 1)
    with pytest.raises(DeviceError, match="flush") as caught:
        device.flush()
    assert (caught.value.errno, caught.value.operation) == (errno.EIO, "flush")
    device.flush()
    faulty.fail_nth("trim", "EIO", 1)
    with pytest.raises(DeviceError, match="discard") as caught:
        device.discard(CHUNK, CHUNK)
    assert (caught.value.offset, caught.value.length) == (CHUNK, CHUNK)
    device.discard(CHUNK, CHUNK)


@pytest.mark.parametrize("refused_at", ["open_direct", "read"])
def test_a_filesystem_without_o_direct(
    faulty: FaultDevice, engine: str, refused_at: str, monkeypatch: pytest.MonkeyPatch
):
    """Refused when the file is opened, or only when it is used: both paths are buffered then."""
    times = None if refused_at == "open_direct" else 1
    faulty.add_rule(refused_at, "EINVAL", times=times)
    with open_device(faulty, engine) as device:
        assert not device.info.direct
        data = noise(5 * CHUNK + 77, 1)[1:]
        sums = np.zeros(6, np.uint64)
        device.write([(BLOCK, data)], checksums=[sums]).wait()
        for path in PATHS:
            out = np.zeros_like(data)
            device.read([(BLOCK, out)], path=path, checksums=[sums]).wait()
            assert np.array_equal(out, data)
        assert device.stats()["direct"]["staged_bytes"] == 0
    faulty.clear()
    faulty.add_rule(refused_at, "EINVAL", lo=0, hi=1, nth=2 if times else 1, times=times)
    monkeypatch.setattr("dualblade.opening._said", set())
    with (
        pytest.warns(DualbladeWarning, match="O_DIRECT"),
        dualblade.open(faulty.path, format=True, engine=engine) as store,
    ):
        store.put("a", data)
        assert np.array_equal(store.get("a"), data)
        assert len(store.stats()["fallbacks"]) == 1


# ---- the store: every I/O of every operation fails once ------------------------------------------


def live() -> dict[str, int]:
    """What is alive in the C core, but for tails, which come and go with appends."""
    gc.collect()  # an error and its traceback are a cycle, which holds the buffers of its frames
    return {name: count for name, count in _core.counters().items() if name != "tails"}


class State(NamedTuple):
    """All that a user of a store can see of it."""

    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]
    capacities: dict[str, tuple[int, ...]]
    free_bytes: int


def state_of(store: dualblade.TensorStore) -> State:
    assert store.check() == []
    stats = store.stats()
    assert stats["operations_active"] == 0
    assert all(path["in_flight"] == 0 for path in stats["paths"].values())
    tensors = {key: store.get(key) for key in store.keys()}
    return State(
        {key: (str(array.dtype), array.shape, array.tobytes()) for key, array in tensors.items()},
        {key: store.info(key).capacity for key in tensors},
        store.stats()["free_bytes"],
    )


def fill(store: dualblade.TensorStore) -> None:
    store.put("a", noise(700_000, 1))
    store.put("b", noise(3 * BLOCK, 2).view(np.float16))
    store.reserve("rows", (2000, 1000), np.uint8)
    store.append("rows", noise(300_500, 3)[:300_000].reshape(300, 1000))
    store.reserve_many({"k": ((64, 5000), np.uint8), "v": ((64, 5000), np.uint8)}, group="kv")
    store.append_many({"k": noise(50_000, 4).reshape(10, 5000), "v": np.zeros((3, 5000), np.uint8)})
    store.flush()


OPERATIONS: dict[str, Callable[[dualblade.TensorStore], object]] = {
    "put": lambda store: store.put("new", noise(600_001, 11)),
    "overwrite": lambda store: store.put("a", noise(600_001, 11)),
    "put_many": lambda store: store.put_many(
        {"new": noise(100_000, 12), "a": noise(90_000, 13), "b": noise(10, 14)}
    ),
    "put_async": lambda store: store.put_async("new", noise(600_001, 11)).result(),
    "append": lambda store: store.append("rows", noise(555_000, 15).reshape(555, 1000)),
    "append_many": lambda store: store.append_many(
        {"k": noise(60_000, 16).reshape(12, 5000), "v": noise(60_000, 17).reshape(12, 5000)}
    ),
    "get": lambda store: store.get("a"),
    "get_many": lambda store: store.get_many(["a", "b", "rows", "k", "v"]),
    "read": lambda store: store.read("rows", 17, 290),
    "truncate": lambda store: store.truncate("rows", 123),
    "truncate_many": lambda store: store.truncate_many({"k": 7, "v": 1}),
    "resize": lambda store: store.resize("rows", 2500),
    "resize_many": lambda store: store.resize_many({"k": 100, "v": 100}),
    "delete": lambda store: store.delete_many(["a", "rows"]),
    "set_path": lambda store: [store.set_path("kv", path) for path in ("pagecache", "direct")],
}


# The page-cache path is the same whatever the engine of the other one.
@pytest.fixture(params=["uring-direct", "aio-direct", "threads-direct", "threads-pagecache"])
def options(request: pytest.FixtureRequest, engine_refusals: dict[str, str]) -> dict[str, Any]:
    engine, _, policy = request.param.partition("-")
    if engine in engine_refusals:
        pytest.skip(f"engine {engine}: {engine_refusals[engine]}")
    return {"engine": engine, "policy": policy}


@pytest.fixture
def store(faulty: FaultDevice, options: dict[str, Any]) -> Iterator[dualblade.TensorStore]:
    with dualblade.open(faulty.path, format=True, **options) as opened:
        fill(opened)
        faulty.clear()
        yield opened
        faulty.clear()


def assert_named(error: DeviceError, faulty: FaultDevice, kind: str, name: str) -> None:
    assert error.errno == getattr(errno, name)
    assert isinstance(error, NoSpaceError) == (name == "ENOSPC")
    assert error.device == os.fspath(faulty.path)
    assert str(faulty.path) in str(error)
    assert name in str(error)
    if kind == "fsync":
        assert error.operation == "flush"
    else:
        assert error.operation == kind
        assert error.offset % BLOCK == 0
        assert error.length > 0
        assert str(error.offset) in str(error)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_nth_io_fails_for_every_n(
    store: dualblade.TensorStore, faulty: FaultDevice, operation: str
):
    act = OPERATIONS[operation]
    before = state_of(store)
    alive = live()
    faults = [(kind, name) for kind in ("read", "write") for name in ("EIO", "ENOSPC")]
    faults = [fault for fault in faults if fault != ("read", "ENOSPC")]
    succeeded = 0
    for kind, name in faults:
        for n in range(1, ATTEMPTS_MAX):
            faulty.clear()
            faulty.fail_nth(kind, name, n)
            try:
                act(store)
            except DeviceError as error:
                assert_named(error, faulty, kind, name)
            else:
                assert faulty.stats()["fired"] == 0  # else an error was swallowed
                succeeded += 1
                break
            assert faulty.stats()["fired"] == 1
            faulty.clear()
            assert live() == alive
            assert state_of(store) == before
        faulty.clear()
        after = state_of(store)
        # Back to the beginning, for the next kind of fault.
        for key in store.keys():
            store.delete(key)
        fill(store)
        assert state_of(store)[:2] == before[:2]
        assert state_of(store).free_bytes == before.free_bytes
        assert after == before or operation not in {"get", "get_many", "read", "set_path"}
        before = state_of(store)
    assert succeeded == len(faults)


@pytest.mark.parametrize("n", [1, 70, 130])
def test_of_a_batch_that_is_handed_over_in_parts_none_is_stored_or_returned(
    store: dualblade.TensorStore, faulty: FaultDevice, n: int
):
    before = state_of(store)
    alive = live()
    arrays = {f"part {i}": noise(BLOCK, i) for i in range(130)}
    faulty.fail_nth("write", "EIO", n)
    with pytest.raises(DeviceError, match="EIO"):
        store.put_many({**arrays, "a": noise(BLOCK, 200)})
    faulty.clear()
    assert live() == alive
    assert state_of(store) == before
    store.put_many(arrays)
    faulty.fail_nth("read", "EIO", n)
    with pytest.raises(DeviceError, match="EIO"):
        store.get_many(arrays)
    faulty.clear()
    assert live() == alive
    found = store.get_many(arrays)
    assert all(np.array_equal(found[key], array) for key, array in arrays.items())


def test_operations_do_what_they_should_without_faults(store: dualblade.TensorStore):
    """The oracle of the test above: what its operations are to leave behind."""
    for operation in ("append", "append_many", "truncate_many", "resize", "put_many"):
        OPERATIONS[operation](store)
    rows = np.concatenate([noise(300_500, 3)[:300_000], noise(555_000, 15)])
    assert np.array_equal(store.get("rows").ravel(), rows)
    assert store.info("rows").capacity == (2500, 1000)
    assert np.array_equal(store.get("k").ravel(), noise(50_000, 4)[:35_000])
    assert np.array_equal(store.get("v"), np.zeros((1, 5000), np.uint8))
    assert np.array_equal(store.get("new"), noise(100_000, 12))
    assert np.array_equal(store.get("b"), noise(10, 14))


@pytest.mark.parametrize("kind", ["read", "write", "fsync"])
def test_a_flush_that_fails_is_done_again(
    store: dualblade.TensorStore, faulty: FaultDevice, options: dict[str, Any], kind: str
):
    store.put("new", noise(100_000, 5))
    store.append("rows", noise(5_500, 6)[:5_000].reshape(5, 1000))
    store.truncate("k", 3)
    store.delete("b")
    before = state_of(store)
    for n in range(1, ATTEMPTS_MAX):
        faulty.clear()
        faulty.fail_nth(kind, "EIO", n)
        try:
            store.flush()
        except DeviceError as error:
            assert_named(error, faulty, kind, "EIO")
        else:
            break
        faulty.clear()
        assert state_of(store) == before
        store.append("rows", noise(1000, n)[None])  # so that there is something to save again
        store.truncate("rows", 305)
    if kind != "read":
        assert n > 1
    faulty.clear()
    store.flush()
    assert state_of(store) == before
    store.close()
    with dualblade.open(faulty.path, **options) as again:
        assert state_of(again) == before


@pytest.mark.parametrize("kind", ["write", "fsync"])
def test_a_close_that_fails_closes(
    store: dualblade.TensorStore, faulty: FaultDevice, options: dict[str, Any], kind: str
):
    store.append("rows", noise(5_500, 6)[:5_000].reshape(5, 1000))
    faulty.fail_nth(kind, "EIO", 1)
    with pytest.raises(DeviceError) as caught:
        store.close()
    assert_named(caught.value, faulty, kind, "EIO")
    assert store.closed
    store.close()
    assert not any(_core.counters()[name] for name in ("devices", "requests", "batches"))
    # What was not saved is not there: never a mixture of old and new.
    with pytest.warns(DualbladeWarning, match="starts empty"):
        again = dualblade.open(faulty.path, **options)
    with again:
        assert again.keys() == []
        assert again.check() == []


@pytest.mark.parametrize("kind", ["open", "open_direct", "read", "write", "fsync"])
@pytest.mark.parametrize("formats", [True, False])
def test_an_open_that_fails_leaves_nothing_open(
    faulty: FaultDevice, engine: str, kind: str, formats: bool
):
    if not formats:
        with dualblade.open(faulty.path, format=True, engine=engine) as store:
            store.put("a", noise(100_000, 1))
        del store
    alive = live()
    for n in range(1, ATTEMPTS_MAX):
        faulty.clear()
        faulty.fail_nth(kind, "EIO", n)
        store = message = None
        try:
            store = dualblade.open(faulty.path, format=formats, engine=engine)
        except DeviceError as error:
            message = f"{error.errno} {error}"
        if store is None:
            assert message.startswith(str(errno.EIO))
            assert str(faulty.path) in message
            assert live() == alive
            continue
        with store:
            fired = faulty.stats()["fired"]
            faulty.clear()
            if formats:
                assert store.keys() == []
            else:
                assert np.array_equal(store.get("a"), noise(100_000, 1))
            assert store.check() == []
        if not fired:
            return
    pytest.fail("opening never ends")


@pytest.mark.parametrize("fault", [("read", "flip"), ("write", {"torn": 100}), ("write", "drop")])
def test_lost_and_flipped_bytes_are_never_returned(
    store: dualblade.TensorStore, faulty: FaultDevice, fault: tuple[str, Any]
):
    kind, do = fault
    free = store.stats()["free_bytes"]
    faulty.add_rule(kind, do, lo=MIB, nth=2, times=1)
    store.put("new", noise(700_001, 11))
    out = np.full(700_001, 0xEE, np.uint8)
    if kind == "read":
        store.get("b")
    with pytest.raises(CorruptionError, match="'new'"):
        store.get("new", out=out)
    assert store.stats()["corruptions"] == 1
    faulty.clear()
    assert len(store.check()) == (kind == "write")
    assert np.array_equal(store.get("a"), noise(700_000, 1))
    store.put("new", noise(700_001, 12))
    assert np.array_equal(store.get("new"), noise(700_001, 12))
    store.delete("new")
    assert store.check() == []
    assert store.stats()["free_bytes"] == free


@pytest.mark.parametrize("do", [{"torn": 100}, "drop"])
def test_a_lost_append_is_never_returned(
    store: dualblade.TensorStore, faulty: FaultDevice, do: Any
):
    rows = noise(300_500, 3)[:300_000].reshape(300, 1000)
    faulty.fail_nth("write", do, 1)
    store.append("rows", noise(555_000, 15).reshape(555, 1000))
    faulty.clear()
    with pytest.raises(CorruptionError, match="'rows'"):
        store.get("rows")
    assert np.array_equal(store.read("rows", 0, 262), rows[:262])  # the first chunk is sound
    assert len(store.check()) == 1


# ---- a file that is cut behind the store's back --------------------------------------------------


def test_a_truncated_file_gives_no_data(tmp_path: Path, options: dict[str, Any]):
    path = tmp_path / "kv.img"
    data = noise(2 * MIB, 1)
    with dualblade.open(path, size="12MiB", **options) as store:
        store.put("first", data)
        store.put("second", data)
        store.flush()
        place = store.info("second").offset
        os.truncate(path, place + MIB)
        assert np.array_equal(store.get("first"), data)
        with pytest.raises(DeviceError, match="truncated") as caught:
            store.get("second")
        assert caught.value.errno == errno.ENODATA
        assert caught.value.offset == place + MIB
        assert np.array_equal(store.read("second", 0, MIB), data[:MIB])
        os.truncate(path, 12 * MIB)  # its size again, but not its data
        with pytest.raises(CorruptionError, match="'second'"):
            store.get("second")
        store.put("second", data)
        assert store.check() == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dualblade.open(path, **options) as store:
            assert np.array_equal(store.get("second"), data)
