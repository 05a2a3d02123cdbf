"""What Device promises, on every engine and every kind of device."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import os
import random
import struct
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from tests.helpers import MIB, flip, noise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.devices import Engine, Target

PATHS = ("direct", "pagecache")
BLOCK = _core.BLOCK_BYTES
CHUNK = 64 << 10
BLKGETSIZE64, BLKSSZGET = 0x80081272, 0x1268


def open_device(target: Target, engine: Engine, **options: Any) -> _core.Device:
    options = {"chunk_bytes": CHUNK, "request_bytes": CHUNK, "staging_bytes": 4 * CHUNK, **options}
    return _core.Device.open(target, engine=engine.name, **engine.options, **options)


@pytest.fixture
def device(target: Target, engine: Engine) -> Iterator[_core.Device]:
    with open_device(target, engine) as opened:
        yield opened


def skewed(size: int, skew: int) -> np.ndarray:
    """Memory that begins `skew` bytes behind a page."""
    return _core.aligned_empty(size + skew, np.uint8)[skew:]


def read(device: _core.Device, offset: int, size: int, path: str = "direct") -> np.ndarray:
    out = skewed(size, 0)
    device.read([(offset, out)], path=path).wait()
    return out


def medium(target: Target, offset: int, size: int) -> bytes:
    """What is on the device, read without dualblade."""
    with open(target, "rb") as file:
        file.seek(offset)
        return file.read(size)


# ---- what it is ----------------------------------------------------------------------------------


def test_the_geometry_is_the_devices_own(target: Target, engine: Engine, device: _core.Device):
    info = device.info
    assert info.engine == engine.name
    assert info.pagecache_engine == "threads"
    assert info.target == os.fspath(target)
    assert info.block_device == target.is_block_device
    assert info.direct
    fd = os.open(target, os.O_RDONLY)
    try:
        if target.is_block_device:
            (size,) = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))
            (lba,) = struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))
            assert info.lba_size == lba == target.lba_bytes
        else:
            size = os.fstat(fd).st_size
            assert info.lba_size in (512, 1024, 2048, 4096)
    finally:
        os.close(fd)
    assert info.size == size
    assert info.physical_block_size >= info.lba_size
    assert BLOCK % info.memory_align == 0
    assert info.max_transfer >= BLOCK
    assert info.discard


def test_a_kernel_thread_submits_only_where_it_is_asked_for(target: Target, engine: Engine):
    before = kernel_threads()  # one ends some time after its device is closed
    with open_device(target, engine):
        assert bool(kernel_threads() - before) == engine.options.get("sqpoll", False)


def kernel_threads() -> set[str]:
    """Those that poll a submission queue of this process: their ids."""
    found = set()
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            if name.read_text().startswith("iou-sqp"):
                found.add(name.parent.name)
    return found


def test_the_alignment_that_is_named_is_used_in_place(device: _core.Device):
    align = device.info.memory_align
    device.write([(0, skewed(CHUNK, align))]).wait()
    assert device.stats()["direct"]["staged_bytes"] == 0
    if align > 1:
        device.write([(0, skewed(CHUNK, align // 2))]).wait()
        assert device.stats()["direct"]["staged_bytes"] == CHUNK


def test_one_opener_at_a_time(target: Target, engine: Engine, device: _core.Device):
    with pytest.raises(DeviceRefusedError, match=os.path.basename(target.path)):
        open_device(target, engine)


def test_it_opens_again_after_close(target: Target, engine: Engine):
    for round_ in range(3):
        with open_device(target, engine) as device:
            device.write([(0, bytes([round_]) * BLOCK)]).wait()
        assert device.closed
    assert medium(target, 0, BLOCK) == bytes([2]) * BLOCK


# ---- what is written is read ---------------------------------------------------------------------


@pytest.mark.parametrize("queue_depth", [1, 7, 256])
def test_random_runs_come_back_on_either_path(target: Target, engine: Engine, queue_depth: int):
    """Random offsets, lengths and alignments; a bytearray is the model of the device."""
    dice = random.Random(queue_depth)
    area = 8 * MIB
    model = bytearray(area)
    with open_device(target, engine, queue_depth=queue_depth) as device:
        for round_ in range(25):
            count = dice.randrange(1, 5)
            slot = area // count // BLOCK * BLOCK
            writes, reads = [], []
            for i in range(count):
                offset = i * slot + dice.randrange(0, slot // 2, BLOCK)
                size = dice.choice([dice.randrange(1, 9000), dice.randrange(1, slot // 2)])
                data = skewed(size, dice.choice([0, 0, 1, 512, 513]))
                data[:] = noise(size, round_ * 8 + i)
                writes.append((offset, data))
                reads.append((offset, skewed(size, dice.choice([0, 0, 3, 512]))))
            path = dice.choice(PATHS)
            device.write(writes, path=path).wait()
            for offset, data in writes:
                model[offset : offset + len(data)] = data.tobytes()
                if path == "direct":  # the rest of the last logical block is zeros
                    end = offset + len(data)
                    pad = -end % device.info.lba_size
                    model[end : end + pad] = bytes(pad)
            device.read(reads, path=dice.choice(PATHS)).wait()
            for (offset, data), (_, got) in zip(writes, reads, strict=True):
                assert got.tobytes() == data.tobytes() == model[offset : offset + len(got)]
        for path in PATHS:
            assert read(device, 0, area, path).tobytes() == model
        device.flush()
    assert medium(target, 0, area) == model


@pytest.mark.parametrize("first", PATHS)
def test_each_path_sees_what_the_other_wrote(device: _core.Device, first: str):
    second = PATHS[1 - PATHS.index(first)]
    for round_ in range(10):
        data = noise(3 * CHUNK, round_)
        device.write([(CHUNK, data)], path=first).wait()
        assert np.array_equal(read(device, CHUNK, data.size, second), data)
        assert np.array_equal(read(device, CHUNK, data.size, first), data)
        first, second = second, first


@pytest.mark.parametrize("path", PATHS)
def test_bytes_around_a_read_stay(device: _core.Device, path: str):
    device.write([(0, noise(2 * BLOCK, 1))]).wait()
    for size in (1, 511, 512, 513, BLOCK - 1, BLOCK, BLOCK + 1):
        memory = np.full(size + 64, 0xEE, np.uint8)
        device.read([(0, memory[32 : 32 + size])], path=path).wait()
        assert np.array_equal(memory[32 : 32 + size], noise(2 * BLOCK, 1)[:size])
        assert (memory[:32] == 0xEE).all()
        assert (memory[32 + size :] == 0xEE).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("queue_depth", [1, 4])
def test_a_batch_larger_than_the_queue(target: Target, engine: Engine, path: str, queue_depth: int):
    with open_device(target, engine, queue_depth=queue_depth, staging_bytes=CHUNK) as device:
        data = [noise(3 * CHUNK + i, i) for i in range(40)]
        out = [np.zeros_like(part) for part in data]
        stride = 4 * CHUNK
        device.write([(i * stride, part) for i, part in enumerate(data)], path=path).wait()
        device.read([(i * stride, part) for i, part in enumerate(out)], path=path).wait()
        assert all(np.array_equal(a, b) for a, b in zip(data, out, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_nothing_to_do_is_done(device: _core.Device, path: str):
    for requests in ([], [(0, b"")], [(0, b""), (BLOCK, b"")], [(device.info.size, b"")]):
        done = device.write(requests, path=path)
        assert done.done()
        done.wait(0)
    device.read([(0, bytearray())], path=path).wait()
    some = bytearray(BLOCK)
    device.read([(0, bytearray()), (0, some), (BLOCK, bytearray())], path=path).wait()
    assert device.stats()[path]["reads"] == 1


def test_the_last_byte_of_the_device(target: Target, device: _core.Device):
    end = device.info.size
    for path in PATHS:
        data = noise(BLOCK, len(path))
        device.write([(end - BLOCK, data)], path=path).wait()
        assert np.array_equal(read(device, end - BLOCK, BLOCK, path), data)
    if not target.is_block_device:
        assert os.path.getsize(target) == target.size_bytes


# ---- checksums -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK + 5])
def test_checksums_are_filled_in_and_compared(device: _core.Device, path: str, size: int):
    data = noise(size, size)
    sums = np.zeros(-(-size // CHUNK), np.uint64)
    device.write([(0, data)], path=path, checksums=[sums]).wait()
    assert np.array_equal(sums, _core.checksum_chunks(data, CHUNK))
    out = np.zeros_like(data)
    for other in PATHS:
        device.read([(0, out)], path=other, checksums=[sums]).wait()
        assert np.array_equal(out, data)


@pytest.mark.parametrize("path", PATHS)
def test_one_wrong_bit_is_corruption_at_its_chunk(target: Target, device: _core.Device, path: str):
    data = noise(6 * CHUNK, 6)
    sums = np.zeros(6, np.uint64)
    device.write([(CHUNK, data)], checksums=[sums]).wait()
    device.flush()
    device.drop_cached(0, device.info.size)
    flip(target, CHUNK + 4 * CHUNK + 12345, 0x10)
    out = np.zeros_like(data)
    with pytest.raises(CorruptionError, match=str(5 * CHUNK)) as caught:
        device.read([(CHUNK, out)], path=path, checksums=[sums]).wait()
    assert caught.value.offset == 5 * CHUNK
    assert device.stats()[path]["checksum_mismatches"] == 1
    # The rest is sound, and without checksums nothing is compared.
    device.read([(CHUNK, out[: 4 * CHUNK])], path=path, checksums=[sums[:4]]).wait()
    assert np.array_equal(out[: 4 * CHUNK], data[: 4 * CHUNK])
    device.read([(CHUNK, out)], path=path).wait()
    assert np.count_nonzero(out != data) == 1


def test_checksums_of_some_of_a_batch(device: _core.Device):
    data = [noise(CHUNK, i) for i in range(3)]
    sums = np.zeros(1, np.uint64)
    writes = [(i * CHUNK, part) for i, part in enumerate(data)]
    device.write(writes, checksums=[None, sums, None]).wait()
    assert sums[0] == _core.checksum(data[1])


# ---- completions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_memory_nobody_else_holds_lives_until_the_io_is_done(device: _core.Device, path: str):
    """The only reference to the buffers is the batch in flight."""
    # Twice: what a failed read left in memory would be seen by the second.
    for seed in (1, 2):
        device.write([(i * CHUNK, noise(CHUNK, seed * 64 + i)) for i in range(64)], path=path)
        gc.collect()
        for i in range(64):
            assert np.array_equal(read(device, i * CHUNK, CHUNK), noise(CHUNK, seed * 64 + i))


def test_memory_is_let_go_when_the_io_is_done(device: _core.Device):
    data = noise(CHUNK, 1)
    alive = weakref.ref(data)
    done = device.write([(0, data)])
    del data
    done.wait()
    assert alive() is None


@pytest.mark.parametrize("path", PATHS)
def test_wait_and_done_agree(device: _core.Device, path: str):
    out = skewed(16 * MIB, 0)
    done = device.read([(0, out)], path=path)
    for timeout in (0, 1e-6, 0.001):
        try:
            done.wait(timeout)
        except TimeoutError:
            continue
        assert done.done()
    while not done.done():
        pass
    done.wait(0)
    done.wait()
    assert device.stats()[path]["in_flight"] == 0


def test_batches_may_be_waited_for_in_any_order(device: _core.Device):
    dice = random.Random(7)
    parts = [noise(dice.randrange(1, 3 * CHUNK), i) for i in range(50)]
    stride = 4 * CHUNK
    for path in PATHS:
        pending = [device.write([(i * stride, part)], path=path) for i, part in enumerate(parts)]
        dice.shuffle(pending)
        for done in pending:
            done.wait()
        outs = [np.zeros_like(part) for part in parts]
        pending = [device.read([(i * stride, out)], path=path) for i, out in enumerate(outs)]
        dice.shuffle(pending)
        for done in pending:
            done.wait()
        assert all(np.array_equal(a, b) for a, b in zip(parts, outs, strict=True))


# ---- the range calls -----------------------------------------------------------------------------


def test_flush_puts_buffered_writes_on_the_medium(target: Target, device: _core.Device):
    data = noise(4 * MIB, 4)
    device.write([(0, data)], path="pagecache").wait()
    device.flush()
    assert cached_bytes(device, 0, data.size)[1] == 0
    assert np.array_equal(read(device, 0, data.size, "direct"), data)


def cached_bytes(device: _core.Device, offset: int, length: int) -> tuple[int, int]:
    resident_bytes, dirty_bytes = device.cached_bytes(offset, length)
    if dirty_bytes is None:
        pytest.skip("cachestat(2) is missing: Linux 6.5 has it")
    return resident_bytes, dirty_bytes


def test_dropping_empties_the_page_cache_and_loses_nothing(device: _core.Device):
    data = noise(2 * MIB, 2)
    device.write([(MIB, data)], path="pagecache").wait()
    assert cached_bytes(device, MIB, data.size)[0] == data.size
    device.drop_cached(MIB, data.size)
    assert cached_bytes(device, MIB, data.size) == (0, 0)
    for path in ("direct", "pagecache"):
        assert np.array_equal(read(device, MIB, data.size, path), data)
    assert cached_bytes(device, MIB, data.size)[0] == data.size
    device.drop_cached(MIB, 0)
    assert cached_bytes(device, MIB, 0) == (0, 0)
    assert cached_bytes(device, MIB, data.size)[0] == data.size


def test_writing_back_keeps_the_pages_and_cleans_them(device: _core.Device):
    data = noise(2 * MIB, 2)
    device.write([(MIB, data)], path="pagecache").wait()
    device.write_back(MIB, data.size)
    device.write_back(MIB, data.size, wait=True)
    assert cached_bytes(device, MIB, data.size) == (data.size, 0)
    assert np.array_equal(read(device, MIB, data.size, "direct"), data)
    device.write([(MIB, data)], path="pagecache").wait()
    device.write_back(MIB + CHUNK, 0, wait=True)
    device.write_back(MIB + CHUNK, CHUNK, wait=True)
    assert cached_bytes(device, MIB + CHUNK, CHUNK) == (CHUNK, 0)


def test_dropping_one_range_leaves_the_next_one_cached(device: _core.Device):
    device.write([(0, noise(2 * MIB, 1))], path="pagecache").wait()
    device.flush()
    device.drop_cached(0, MIB)
    assert cached_bytes(device, 0, MIB)[0] == 0
    assert cached_bytes(device, MIB, MIB)[0] == MIB


def test_a_mapping_shows_what_is_written_and_outlives_the_device(target: Target, engine: Engine):
    data = noise(MIB, 1)
    with open_device(target, engine) as device:
        device.write([(0, data)], path="pagecache").wait()
        mapping = device.map(4097, 70_001)
        shown = np.frombuffer(mapping, np.uint8)
        assert np.array_equal(shown, data[4097:][:70_001])
        assert memoryview(mapping).readonly
        assert not shown.flags.writeable
        device.write([(0, data[::-1].copy())], path="pagecache").wait()
        assert np.array_equal(shown, data[::-1][4097:][:70_001])
    assert np.array_equal(shown, data[::-1][4097:][:70_001])
    assert _core.counters()["mappings"] == 1


def test_direct_io_leaves_the_page_cache_alone(device: _core.Device):
    device.drop_cached(0, device.info.size)
    device.write([(0, noise(MIB, 1))]).wait()
    read(device, 0, MIB)
    assert cached_bytes(device, 0, MIB)[0] == 0


def test_a_discard_spares_its_neighbours(target: Target, device: _core.Device):
    data = noise(3 * MIB, 3)
    for path in PATHS:
        device.write([(0, data)], path=path).wait()
        device.discard(MIB, MIB)
        for other in PATHS:
            got = read(device, 0, data.size, other)
            assert np.array_equal(got[:MIB], data[:MIB])
            assert np.array_equal(got[2 * MIB :], data[2 * MIB :])
        if target.kind != "given":
            assert not got[MIB : 2 * MIB].any()  # a hole, in a file or under a loop device
        device.write([(MIB, data[:MIB])], path=path).wait()
        assert np.array_equal(read(device, MIB, MIB), data[:MIB])
    device.discard(0, 0)


# ---- what is refused -----------------------------------------------------------------------------


def test_a_read_only_device_reads(target: Target, engine: Engine):
    with open_device(target, engine) as device:
        device.write([(0, noise(CHUNK, 1))]).wait()
    with open_device(target, engine, read_only=True) as device:
        for path in PATHS:
            assert np.array_equal(read(device, 0, CHUNK, path), noise(CHUNK, 1))
            with pytest.raises(DeviceError, match="read_only"):
                device.write([(0, bytes(BLOCK))], path=path)
        with pytest.raises(DeviceError, match="read_only"):
            device.discard(0, BLOCK)
        with open_device(target, engine, read_only=True) as beside:
            assert np.array_equal(read(beside, 0, CHUNK), noise(CHUNK, 1))
    assert medium(target, 0, CHUNK) == noise(CHUNK, 1).tobytes()


@pytest.mark.parametrize("path", PATHS)
def test_ranges_outside_the_device_start_nothing(device: _core.Device, path: str):
    size = device.info.size
    one = bytearray(BLOCK)
    for offset, memory in [
        (size, one),
        (size - BLOCK, bytearray(BLOCK + 1)),
        (1 << 62, one),
        (-BLOCK, one),
        (1 << 63, one),
    ]:
        with pytest.raises(ValueError):
            device.read([(0, one), (offset, memory)], path=path)
        with pytest.raises(ValueError):
            device.write([(0, b"x" * BLOCK), (offset, memory)], path=path)
    assert device.stats()[path]["reads"] == device.stats()[path]["writes"] == 0
    assert not read(device, 0, BLOCK).any()
    for call in (
        device.discard,
        device.write_back,
        device.drop_cached,
        device.cached_bytes,
        device.map,
    ):
        with pytest.raises(ValueError):
            call(size, BLOCK)
        with pytest.raises(ValueError):
            call(0, size + 1)
        with pytest.raises(ValueError):
            call(-1, 1)


def test_direct_offsets_are_whole_blocks(device: _core.Device):
    for offset in (1, 511, 512, BLOCK - 1, BLOCK + 1):
        with pytest.raises(AlignmentError, match=str(offset)):
            device.read([(offset, bytearray(BLOCK))])
    out = bytearray(3)
    device.read([(513, out)], path="pagecache").wait()


def test_after_close_everything_is_refused(target: Target, engine: Engine):
    device = open_device(target, engine)
    pending = device.read([(0, bytearray(CHUNK))])
    device.close()
    device.close()
    pending.wait()
    assert pending.done()
    for call in (
        lambda: device.read([(0, bytearray(BLOCK))]),
        lambda: device.write([(0, bytes(BLOCK))]),
        device.flush,
        lambda: device.discard(0, BLOCK),
        lambda: device.write_back(0, BLOCK),
        lambda: device.drop_cached(0, BLOCK),
        lambda: device.cached_bytes(0, BLOCK),
        device.stats,
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()


# ---- threads -------------------------------------------------------------------------------------


def run_threads(count: int, work: Any) -> None:
    """Runs work(0) .. work(count - 1) at once; raises what one of them raised."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - it is raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def differences(found: np.ndarray, data: np.ndarray) -> str:
    wrong = np.flatnonzero(found != data)
    if wrong.size == 0:
        return "none"
    zeros = np.count_nonzero(found[wrong] == 0)
    return f"{wrong.size} bytes in [{wrong[0]}, {wrong[-1]}] of {data.size}, {zeros} of them 0"


def wait_impatiently(done: _core.Completion, dice: random.Random) -> None:
    while True:
        try:
            return done.wait(dice.choice([0.0001, 1, None]))
        except TimeoutError:
            continue


@pytest.mark.parametrize("queue_depth", [1, 32])
def test_many_threads_share_a_device(target: Target, engine: Engine, queue_depth: int):
    with open_device(target, engine, queue_depth=queue_depth, staging_bytes=2 * CHUNK) as device:

        def work(number: int) -> None:
            dice = random.Random(number)
            base = number * 4 * MIB
            for round_ in range(12):
                data = noise(dice.randrange(1, MIB), 100 * number + round_)
                sums = np.zeros(-(-data.size // CHUNK), np.uint64)
                written, fetched = dice.choice(PATHS), dice.choice(PATHS)
                device.write([(base, data)], path=written, checksums=[sums]).wait()
                out = skewed(data.size, dice.choice([0, 5]))
                done = device.read([(base, out)], path=fetched, checksums=[sums])
                try:
                    wait_impatiently(done, dice)
                    assert np.array_equal(out, data)
                except (AssertionError, CorruptionError) as error:
                    # Bytes of another time look alike in every report: what is there now tells.
                    seen = {path: read(device, base, data.size, path) for path in PATHS}
                    raise AssertionError(
                        f"thread {number}, round {round_}, written {written}, read {fetched}; "
                        f"sums hold: {np.array_equal(sums, _core.checksum_chunks(data, CHUNK))}; "
                        f"differences: {differences(out, data)}, read again: "
                        f"{[(path, differences(again, data)) for path, again in seen.items()]}"
                    ) from error

        run_threads(8, work)
        stats = device.stats()
        assert sum(stats[path]["in_flight"] for path in PATHS) == 0
        assert sum(stats[path]["errors"] for path in PATHS) == 0


def test_a_batch_outlives_the_thread_that_submitted_it(device: _core.Device):
    data = noise(32 * MIB, 1)
    pending = []
    for path in PATHS:
        run_threads(1, lambda _, path=path: pending.append(device.write([(0, data)], path=path)))
        pending.pop().wait()
        out = np.zeros_like(data)
        run_threads(
            1, lambda _, path=path, out=out: pending.append(device.read([(0, out)], path=path))
        )
        pending.pop().wait()
        assert np.array_equal(out, data)
        device.write([(0, bytes(data.size))]).wait()


def test_a_submitter_that_computes_holds_nobody_up(device: _core.Device):
    """What a thread has submitted completes for others while it computes in C, without the GIL
    and without a system call."""
    # A busy machine may not let the waiter run in time: then the computation lasts longer.
    assert any(completes_during(device, rounds) for rounds in (500_000, 5_000_000))


def completes_during(device: _core.Device, rounds: int) -> bool:
    """Whether a read completes before its submitter has made so many rounds of a hash."""
    out = skewed(4 * MIB, 0)
    submitted: list[_core.Completion] = []
    ready, finished = threading.Event(), threading.Event()

    def submit_and_compute() -> None:
        submitted.append(device.read([(0, out)]))
        ready.set()
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", rounds)
        finished.set()

    thread = threading.Thread(target=submit_and_compute)
    thread.start()
    try:
        assert ready.wait(30)
        submitted.pop().wait()
        return not finished.is_set()
    finally:
        thread.join()


# ---- what is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_stats_count_what_moved(device: _core.Device, path: str):
    before = device.stats()
    sizes = {"registered_bytes", "read_request_bytes", "write_request_bytes"}
    assert not any(n for name, n in before[path].items() if name not in sizes)
    device.write([(0, skewed(3 * CHUNK, 0))], path=path).wait()
    device.read([(0, skewed(2 * CHUNK, 0)), (CHUNK, skewed(CHUNK, 0))], path=path).wait()
    stats = device.stats()
    other = PATHS[1 - PATHS.index(path)]
    assert stats[other] == before[other]
    expected = {"reads": 3, "read_bytes": 3 * CHUNK, "writes": 3, "write_bytes": 3 * CHUNK}
    assert {name: stats[path][name] for name in expected} == expected
    for name in ("staged_bytes", "resumed", "errors", "checksum_mismatches", "in_flight"):
        assert stats[path][name] == 0
    assert 2 <= stats[path]["submits"] <= 6


def test_the_core_counts_what_is_alive(target: Target, engine: Engine):
    before = _core.counters()
    device = open_device(target, engine)
    assert _core.counters()["devices"] == before["devices"] + 1
    done = device.read([(0, bytearray(8 * MIB))])
    assert _core.counters()["batches"] == before["batches"] + 1
    done.wait()
    del done
    now = _core.counters()
    assert (now["batches"], now["requests"]) == (before["batches"], before["requests"])
    device.close()
    assert _core.counters() == before
