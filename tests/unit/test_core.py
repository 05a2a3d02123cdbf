"""Device, Completion and Buffer: round trips, errors, lifetimes, closing, threads and forks."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualblade import _core
from dualblade.errors import (
    AlignmentError,
    ClosedError,
    CorruptionError,
    DeviceError,
    DeviceRefusedError,
)
from tests.helpers import MIB, noise, overwrite, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CHUNK = 65536
PATHS = ("direct", "pagecache")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "device.img"
    with open(path, "wb") as file:
        file.truncate(16 * MIB)
    return path


@pytest.fixture
def device(image: Path) -> Iterator[_core.Device]:
    with _core.Device.open(image, chunk_bytes=CHUNK) as opened:
        yield opened


def is_exported(memory: bytearray) -> bool:
    """Whether somebody holds the memory: a bytearray then refuses to grow."""
    try:
        memory.append(0)
    except BufferError:
        return True
    memory.pop()
    return False


# ---- moving bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_what_is_written_is_read(engine: str, path: str, image: Path) -> None:
    with _core.Device.open(image, engine) as device:
        runs = [(0, noise(3 * MIB + 5, 1)), (4 * MIB, noise(1, 2)), (8 * MIB, noise(4096, 3))]
        device.write(runs, path=path).wait()
        for other in PATHS:
            device.flush()
            if other == "pagecache":
                device.drop_cached(0, device.info.size)
            back = [(offset, np.zeros_like(data)) for offset, data in runs]
            device.read(back, path=other).wait()
            for (_, data), (_, found) in zip(runs, back, strict=True):
                np.testing.assert_array_equal(found, data)
    with open(image, "rb") as file:
        assert file.read(3 * MIB + 5) == runs[0][1].tobytes()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("skew", [0, 1, 511])
def test_memory_may_lie_anywhere(device: _core.Device, path: str, skew: int) -> None:
    memory = _core.aligned_empty(MIB + 1024, np.uint8)[skew : skew + MIB]
    memory[:] = noise(MIB)
    device.write([(4096, memory)], path=path).wait()
    back = _core.aligned_empty(MIB + 1024, np.uint8)[skew : skew + MIB]
    device.read([(4096, back)], path=path).wait()
    np.testing.assert_array_equal(back, memory)


def test_a_direct_write_pads_its_last_block_with_zeros(device: _core.Device) -> None:
    device.write([(0, b"\xff" * 8192)]).wait()
    device.write([(0, b"abc")]).wait()
    back = bytearray(8192)
    device.read([(0, back)]).wait()
    block = device.info.lba_size
    assert back[:block] == b"abc" + bytes(block - 3)
    assert back[4096:] == b"\xff" * 4096


@pytest.mark.parametrize(
    "memory",
    [
        bytearray(b"0123456789abcdef"),
        np.arange(4).astype("datetime64[s]"),
        np.ones((2, 3, 5), "complex128"),
        _core.aligned_empty((7,), "bfloat16"),
        memoryview(bytearray(24)).cast("d"),
    ],
    ids=["bytearray", "datetime", "complex", "bfloat16", "memoryview"],
)
def test_any_contiguous_memory_will_do(device: _core.Device, memory: object) -> None:
    before = bytes(np.asarray(memory).tobytes())
    device.write([(0, memory)]).wait()
    device.read([(0, memory)]).wait()
    assert np.asarray(memory).tobytes() == before


def test_nothing_to_do_is_done_at_once(device: _core.Device) -> None:
    for completion in (device.read([]), device.write([(5, b""), (0, np.empty((0, 3)))])):
        assert completion.done()
        completion.wait(0)
    assert device.stats()["direct"]["writes"] == 0


def test_a_batch_larger_than_the_queue(image: Path) -> None:
    with _core.Device.open(image, queue_depth=2, chunk_bytes=4096, request_bytes=4096) as device:
        data = noise(4 * MIB)
        device.write([(i, data[i : i + 65536]) for i in range(0, 4 * MIB, 65536)]).wait()
        back = np.zeros_like(data)
        device.read([(0, back)]).wait()
        np.testing.assert_array_equal(back, data)
        assert device.stats()["direct"]["writes"] == 1024


def test_large_transfers_are_split_at_the_request_size(image: Path) -> None:
    data = _core.aligned_empty(4 * MIB, np.uint8)
    for request_bytes, split_at in ((None, MIB), (512 << 10, 512 << 10)):
        with _core.Device.open(image, request_bytes=request_bytes) as device:
            device.write([(0, data)]).wait()
            device.read([(0, data)]).wait()
            stats = device.stats()["direct"]
        assert stats["read_request_bytes"] == stats["write_request_bytes"] == split_at
        assert stats["writes"] == stats["reads"] == 4 * MIB // split_at


def test_only_the_end_of_a_large_transfer_is_staged(image: Path) -> None:
    data = _core.aligned_empty(2 * MIB + 100, np.uint8)
    data[:] = noise(data.size)
    back = _core.aligned_empty(data.size, np.uint8)
    with _core.Device.open(image) as device:
        device.write([(0, data)]).wait()
        device.read([(0, back)]).wait()
        assert device.stats()["direct"]["staged_bytes"] == 2 * 100
    np.testing.assert_array_equal(back, data)


def test_drop_cached_and_discard(device: _core.Device) -> None:
    device.write([(0, noise(MIB))], path="pagecache").wait()
    cached, dirty = device.cached_bytes(0, MIB)
    assert cached == MIB
    assert dirty <= MIB
    device.drop_cached(0, MIB)
    assert device.cached_bytes(0, MIB) == (0, 0)
    assert device.info.discard
    device.discard(0, MIB)
    back = np.ones(MIB, np.uint8)
    device.read([(0, back)]).wait()
    assert not back.any()


# ---- checksums -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, 5 * CHUNK + 3])
def test_checksums_are_filled_in_and_compared(device: _core.Device, path: str, size: int) -> None:
    data = noise(size)
    sums = np.zeros(-(-size // CHUNK), np.uint64)
    device.write([(0, data)], path=path, checksums=[sums]).wait()
    expected = [_core.checksum(data[i : i + CHUNK]) for i in range(0, size, CHUNK)]
    assert sums.tolist() == expected
    assert _core.checksum_chunks(data, CHUNK).tolist() == expected
    back = np.zeros_like(data)
    device.read([(0, back)], path=path, checksums=[sums]).wait()
    np.testing.assert_array_equal(back, data)


@pytest.mark.parametrize("path", PATHS)
def test_a_flipped_bit_is_corruption(device: _core.Device, path: str) -> None:
    data = noise(4 * CHUNK)
    sums = np.zeros(4, np.uint64)
    device.write([(0, data), (MIB, data)], checksums=[sums, None]).wait()
    data[2 * CHUNK + 77] ^= 4
    device.write([(MIB, data)]).wait()
    device.read([(0, data)], path=path, checksums=[sums]).wait()
    completion = device.read([(MIB, data)], path=path, checksums=[sums])
    for _ in range(2):
        with pytest.raises(CorruptionError, match=f"at byte {MIB + 2 * CHUNK} of"):
            completion.wait()
    assert completion.done()
    assert device.stats()[path]["checksum_mismatches"] == 1


@pytest.mark.parametrize(
    "sums",
    [
        np.zeros(1, np.uint64),
        np.zeros(2, np.float64),
        np.zeros(4, np.uint32),
        np.zeros(4, np.uint64)[::2],
        b"0" * 16,
        7,
    ],
    ids=["few", "float", "uint32", "strided", "bytes", "int"],
)
def test_wrong_checksum_arrays(device: _core.Device, sums: object) -> None:
    with pytest.raises((ValueError, TypeError), match="checksums of request 0"):
        device.read([(0, bytearray(2 * CHUNK))], checksums=[sums])
    with pytest.raises(ValueError, match="2 checksums for 1 requests"):
        device.read([(0, bytearray(1))], checksums=[None, None])


@pytest.mark.parametrize("make", [bytearray, lambda size: np.zeros(size // 8, np.uint64)])
@pytest.mark.parametrize("path", PATHS)
def test_checksums_of_all_requests_in_one_array(
    device: _core.Device, path: str, make: Callable[[int], object]
) -> None:
    parts = [noise(size) for size in (CHUNK + 1, 0, 3, 2 * CHUNK)]
    sums = make(8 * 5)
    writes = [(i * MIB, part) for i, part in enumerate(parts)]
    device.write(writes, path=path, checksums=sums).wait()
    expected = [_core.checksum(part[i : i + CHUNK]) for part in parts
                for i in range(0, len(part), CHUNK)]  # fmt: skip
    assert np.frombuffer(sums, np.uint64).tolist() == expected
    back = [(i * MIB, np.zeros_like(part)) for i, part in enumerate(parts)]
    device.read(back, path=path, checksums=bytes(sums)).wait()
    for (_, found), part in zip(back, parts, strict=True):
        np.testing.assert_array_equal(found, part)
    wrong = np.frombuffer(sums, np.uint64).copy()
    wrong[3] += 1  # of the second chunk that the last request has
    with pytest.raises(CorruptionError, match=f"at byte {3 * MIB} of"):
        device.read(back, path=path, checksums=wrong).wait()
    with pytest.raises(ValueError, match="checksums: 4 given, but .* have 5"):
        device.read(back, path=path, checksums=bytes(32))
    with pytest.raises(ValueError, match="checksums must be an array of uint64"):
        device.read(back, path=path, checksums=np.zeros(5))
    with pytest.raises(ValueError, match="checksums must be writable"):
        device.write(writes, path=path, checksums=bytes(40))


# ---- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        ((-4096, b"x"), ValueError, "must not be negative"),
        ((1.0, b"x"), TypeError, "whole number"),
        ((None, b"x"), TypeError, "whole number"),
        ((1 << 70, b"x"), ValueError, "more than any device"),
        ((512, b"x"), AlignmentError, "multiple of 4096"),
        ((16 * MIB, b"x"), ValueError, "16777216"),
        ((16 * MIB - 4096, bytes(4097)), ValueError, "not all inside"),
        ((0, 5), TypeError, "buffer protocol"),
        ((0, np.zeros((4, 4))[:, 1]), ValueError, "contiguous"),
        (7, TypeError, "pair"),
        ((0, b"x", 1), TypeError, "pair"),
    ],
)
def test_a_bad_request_starts_nothing(
    device: _core.Device, request_: object, error: type[Exception], words: str
) -> None:
    good = bytearray(b"good")
    with pytest.raises(error, match=words):
        device.write([(0, good), request_])
    assert not is_exported(good)
    assert device.stats()["direct"]["writes"] == 0
    back = bytearray(4)
    device.read([(0, back)]).wait()
    assert back == bytes(4)


def test_reads_need_writable_memory(device: _core.Device) -> None:
    with pytest.raises(ValueError, match="writable"):
        device.read([(0, b"constant")])
    frozen = np.zeros(8)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        device.read([(0, frozen)])
    with pytest.raises(ValueError, match='"direct" or "pagecache"'):
        device.read([(0, bytearray(8))], path="mmap")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "spdk"}, "auto, nvme, uring, aio, threads"),
        ({"queue_depth": 0}, "1 to 4096"),
        ({"queue_depth": 4097}, "1 to 4096"),
        ({"threads": 65}, "1 to 64"),
        ({"chunk_bytes": 5000}, "power of two"),
        ({"chunk_bytes": 1024}, "4096"),
        ({"request_bytes": 300000}, "multiple of chunk_bytes"),
        ({"staging_bytes": 4096}, "one chunk"),
        ({"staging_bytes": -1}, "negative"),
    ],
)
def test_bad_options_are_named(image: Path, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _core.Device.open(image, **options)


def test_targets_that_cannot_be_opened(tmp_path: Path, image: Path) -> None:
    with pytest.raises(DeviceError, match="does not exist") as caught:
        _core.Device.open(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(DeviceError, match="is a directory"):
        _core.Device.open(tmp_path)
    with pytest.raises(DeviceError, match="neither a file nor a block device"):
        _core.Device.open("/dev/null")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is empty"):
        _core.Device.open(tmp_path / "empty")
    with pytest.raises(TypeError):
        _core.Device.open(7)
    with pytest.raises(ValueError, match="null character"):
        _core.Device.open(f"{image}\0")
    with pytest.raises(TypeError, match=r"Device\.open"):
        _core.Device()


def test_one_opener_at_a_time(image: Path, device: _core.Device) -> None:
    with pytest.raises(DeviceRefusedError, match="open"):
        _core.Device.open(image)
    device.close()
    _core.Device.open(image).close()


def test_a_read_only_device_refuses_writes(image: Path) -> None:
    with _core.Device.open(image, read_only=True) as device:
        device.read([(0, bytearray(4096))]).wait()
        with pytest.raises(DeviceError) as caught:
            device.write([(0, b"x")])
        assert caught.value.errno == errno.EBADF


def test_info_says_what_is_in_use(engine: str, image: Path) -> None:
    with _core.Device.open(image, engine, queue_depth=7) as device:
        info = device.info
        assert info.target == str(image)
        assert info.size == 16 * MIB
        assert info.engine == engine
        assert info.queue_depth == 7
        assert not info.block_device
        assert info.lba_size in (512, 4096)


# ---- failing devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_an_error_names_its_place(fault_device: Callable, engine: str, path: str) -> None:
    faulty = fault_device()
    with _core.Device.open(faulty.path, engine, chunk_bytes=CHUNK, request_bytes=CHUNK) as device:
        faulty.add_rule("read", "EIO", lo=MIB + CHUNK, hi=MIB + CHUNK + 512)
        good, bad = np.zeros(CHUNK, np.uint8), np.zeros(4 * CHUNK, np.uint8)
        completion = device.read([(0, good), (MIB, bad)], path=path)
        for _ in range(2):
            with pytest.raises(DeviceError) as caught:
                completion.wait()
            assert caught.value.errno == errno.EIO
            assert caught.value.operation == "read"
            assert caught.value.offset == MIB + CHUNK
            assert str(MIB + CHUNK) in str(caught.value)
        faulty.clear()
        device.read([(0, good), (MIB, bad)], path=path).wait()


# ---- waiting and lifetimes, on a device that holds I/O until told to go on -----------------------


@pytest.fixture
def held(fault_device: Callable, engine: str) -> Iterator[tuple]:
    """A device whose first MiB answers no read until faulty.release()."""
    faulty = fault_device()
    with _core.Device.open(faulty.path, engine) as device:
        device.write([(0, b"held" * 1024)]).wait()
        faulty.add_rule("read", "hold", hi=MIB)
        yield faulty, device
        faulty.clear()


def test_a_timeout_leaves_the_batch_in_flight(held: tuple) -> None:
    faulty, device = held
    memory = bytearray(4096)
    completion = device.read([(0, memory)])
    faulty.wait_held(1)
    assert not completion.done()
    for timeout in (0, 0.01, -1):
        with pytest.raises(TimeoutError, match="still in flight"):
            completion.wait(timeout)
    assert is_exported(memory)
    with pytest.raises(ValueError, match="nan"):
        completion.wait(float("nan"))
    faulty.release()
    completion.wait(30)
    assert memory == b"held" * 1024
    assert not is_exported(memory)


@contextlib.contextmanager
def interrupted_after(ready: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C once ready() returns, in a thread of its own; the block has to end by it."""

    def interrupt() -> None:
        ready()
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    interrupter.join()


def test_an_interrupt_leaves_the_batch_in_flight(held: tuple) -> None:
    faulty, device = held
    memory = bytearray(4096)
    completion = device.read([(0, memory)])
    faulty.wait_held(1)
    waiting = threading.Event()
    with interrupted_after(waiting.wait):
        waiting.set()
        completion.wait()
    assert is_exported(memory)
    faulty.release()
    completion.wait()
    assert memory == b"held" * 1024


def test_many_threads_wait_for_one_batch(held: tuple) -> None:
    faulty, device = held
    memory = bytearray(4096)
    completion = device.read([(0, memory)])
    seen = []

    def wait() -> None:
        completion.wait()
        seen.append(bytes(memory))

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    faulty.wait_held(1)
    assert not seen  # and that this line runs shows that nobody waits with the GIL held
    faulty.release()
    for thread in threads:
        thread.join()
    assert seen == [b"held" * 1024] * 8
    assert not is_exported(memory)


def test_a_dropped_batch_keeps_its_memory_until_it_is_done(held: tuple) -> None:
    faulty, device = held
    memory = bytearray(4096)
    completions = [device.read([(0, memory)])]
    faulty.wait_held(1)
    dropper = threading.Thread(target=completions.clear)
    dropper.start()
    assert is_exported(memory)
    faulty.release()
    dropper.join()
    assert memory == b"held" * 1024
    assert not is_exported(memory)


def test_close_waits_for_what_is_in_flight(held: tuple) -> None:
    faulty, device = held
    memories = [bytearray(4096) for _ in range(3)]
    waited, unwaited = (device.read([(0, memory)]) for memory in memories[:2])
    dropped = [device.read([(0, memories[2])])]
    faulty.wait_held(3)
    threads = [
        threading.Thread(target=waited.wait),
        threading.Thread(target=dropped.clear),
        threading.Thread(target=device.close),
        threading.Thread(target=device.close),
    ]
    for thread in threads:
        thread.start()
    while not device.closed:
        threads[2].join(0.001)
    with pytest.raises(ClosedError, match="closed"):
        device.read([(0, bytearray(1))])
    assert threads[2].is_alive()
    assert all(is_exported(memory) for memory in memories)
    faulty.release()
    for thread in threads:
        thread.join()
    assert not any(is_exported(memory) for memory in memories)
    assert memories == [b"held" * 1024] * 3
    waited.wait()
    unwaited.wait()
    assert unwaited.done()


def test_an_interrupted_close_can_be_called_again(held: tuple) -> None:
    faulty, device = held
    completion = device.read([(0, bytearray(4096))])
    faulty.wait_held(1)
    with interrupted_after(lambda: until(lambda: device.closed, "it is not being closed")):
        device.close()
    faulty.release()
    device.close()
    completion.wait()


# ---- closing -------------------------------------------------------------------------------------


def test_use_after_close(device: _core.Device) -> None:
    completion = device.write([(0, b"x")])
    device.close()
    device.close()
    completion.wait()
    assert device.closed
    assert "closed" in repr(device)
    calls = [
        lambda: device.read([(0, bytearray(1))]),
        lambda: device.write([(0, b"x")]),
        lambda: device.write([]),
        device.flush,
        device.stats,
        lambda: device.discard(0, 4096),
        lambda: device.write_back(0, 4096),
        lambda: device.drop_cached(0, 4096),
        lambda: device.cached_bytes(0, 4096),
        device.__enter__,
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_a_forgotten_device_warns_and_closes(image: Path) -> None:
    opened = _core.Device.open(image)
    opened.write([(0, b"x")])
    with pytest.warns(ResourceWarning, match="unclosed .*device.img"):
        del opened
    _core.Device.open(image).close()


def test_closing_while_threads_do_io(image: Path) -> None:
    for round_ in range(10):
        device = _core.Device.open(image)
        started = threading.Barrier(5)
        unexpected = []

        def work(
            device: _core.Device = device,
            started: threading.Barrier = started,
            unexpected: list = unexpected,
        ) -> None:
            memory = _core.aligned_empty(65536, np.uint8)
            started.wait()
            try:
                for i in range(100000):
                    completion = device.read([(65536 * (i % 128), memory)], path=PATHS[i % 2])
                    if i % 3:
                        completion.wait()
                    device.flush()
            except ClosedError:
                return
            except BaseException as error:  # noqa: BLE001  shown by the assertion below
                unexpected.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        started.wait()
        while device.stats()["direct"]["reads"] < 5 * round_:
            threads[0].join(0.0001)
        device.close()
        for thread in threads:
            thread.join()
        assert not unexpected


def test_many_threads_on_one_device(device: _core.Device) -> None:
    failures = []

    def work(number: int) -> None:
        try:
            for round_ in range(30):
                data = noise(100000 + number, 1000 * number + round_)
                base = number * MIB
                device.write([(base, data)], path=PATHS[round_ % 2]).wait()
                back = np.zeros_like(data)
                device.read([(base, back)], path=PATHS[round_ % 2]).wait()
                np.testing.assert_array_equal(back, data)
        except BaseException as error:  # noqa: BLE001  shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- fork and exit -------------------------------------------------------------------------------


def in_child(act: Callable[[], None]) -> int:
    """The exit status of a forked child that calls act(): 0 when it returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that this process has threads
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            act()
            status = 0
        except BaseException:  # noqa: BLE001  the parent sees the status
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def test_a_child_cannot_use_the_parents_device(held: tuple) -> None:
    faulty, device = held
    memory = bytearray(4096)
    finished = device.write([(MIB, b"x")])
    finished.wait()
    things = [device.read([(0, memory)])]
    faulty.wait_held(1)

    def act() -> None:
        finished.wait()
        assert device.closed
        for method in ("wait", "done"):
            with pytest.raises(ClosedError, match="fork"):
                getattr(things[0], method)()
        calls = [
            device.flush,
            device.stats,
            lambda: device.read([(0, bytearray(1))]),
        ]
        for call in calls:
            with pytest.raises(ClosedError, match="fork"):
                call()
        things.clear()  # neither this nor close() waits: the parent's I/O is still held
        assert not is_exported(memory)
        device.close()
        device.close()

    assert in_child(act) == 0
    assert is_exported(memory)
    faulty.release()
    things[0].wait()
    assert memory == b"held" * 1024
    device.write([(2 * MIB, b"the parent goes on")]).wait()


def test_a_child_opens_its_own(image: Path) -> None:
    device = _core.Device.open(image)
    device.close()

    def act() -> None:
        with _core.Device.open(image) as own:
            own.write([(0, b"child")]).wait()

    assert in_child(act) == 0
    assert image.read_bytes()[:5] == b"child"


def test_the_parents_lock_outlives_the_child(image: Path, device: _core.Device) -> None:
    assert in_child(device.close) == 0
    with pytest.raises(DeviceRefusedError):
        _core.Device.open(image)


@pytest.mark.parametrize("drop", ["", "del completion", "del device", "device.close()"])
def test_the_interpreter_exits_with_io_in_flight(image: Path, drop: str) -> None:
    program = f"""
import dualblade._core as core
device = core.Device.open({str(image)!r})
completion = device.write([(0, b"last words" * 1000)], path="pagecache")
{drop}
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert image.read_bytes()[:10000] == b"last words" * 1000


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 4096, 3 * MIB])
def test_a_buffer_is_writable_aligned_memory(size: int) -> None:
    buffer = _core.Buffer(size)
    assert len(buffer) == size
    view = memoryview(buffer)
    del buffer  # the view keeps the memory
    assert not view.readonly
    assert view.nbytes == size
    view[size - 1] = 7
    array = np.frombuffer(view, np.uint8)
    assert array.ctypes.data % 4096 == 0
    assert array[-1] == 7


def test_buffers_of_bad_sizes() -> None:
    assert len(_core.Buffer(0)) == 0
    with pytest.raises(ValueError, match="negative"):
        _core.Buffer(-1)
    with pytest.raises(TypeError):
        _core.Buffer("4096")
    with pytest.raises(MemoryError, match="cannot map"):
        _core.Buffer(1 << 62)
    buffer = _core.Buffer(4096)
    with pytest.raises(TypeError, match="once"):
        buffer.__init__(8192)


@pytest.mark.parametrize("dtype", ["float32", np.int8, "bfloat16", "float8_e4m3fn", "M8[s]"])
@pytest.mark.parametrize("shape", [(), 5, (3, 4), (0, 4), (2, 0), (1, 1, 1)])
def test_aligned_empty(shape: int | tuple, dtype: object) -> None:
    array = _core.aligned_empty(shape, dtype)
    assert array.shape == np.empty(shape).shape
    assert array.flags.c_contiguous
    assert array.flags.writeable
    if array.size:
        assert array.ctypes.data % 4096 == 0


def test_aligned_empty_refuses() -> None:
    with pytest.raises(TypeError, match="objects"):
        _core.aligned_empty(3, object)
    with pytest.raises(TypeError):
        _core.aligned_empty(3, "float7")
    with pytest.raises(ValueError, match="negative"):
        _core.aligned_empty((3, -1), "f4")
    with pytest.raises(TypeError):
        _core.aligned_empty((3, 1.5), "f4")


def test_checksums_see_bytes_not_objects() -> None:
    data = noise(200000)
    assert _core.checksum(data) == _core.checksum(data.tobytes())
    assert _core.checksum(b"") == 0x2D06800538D394C2  # XXH3-64 of nothing, from its specification
    assert _core.checksum_chunks(b"", 4096).tolist() == []
    with pytest.raises(ValueError, match="contiguous"):
        _core.checksum(data[::2])
    with pytest.raises(ValueError, match="chunk_bytes"):
        _core.checksum_chunks(data, 0)


def test_find_signature(image: Path) -> None:
    assert _core.find_signature(image) == ""
    overwrite(image, 4096 - 10, b"SWAPSPACE2")
    assert _core.find_signature(image) in ("swap", "")  # libblkid also wants a sane swap header
    with pytest.raises(DeviceError, match="does not exist"):
        _core.find_signature(image.with_name("missing"))
