"""What the drive sees of buffered reads: whole requests, and nothing around them."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualblade import _core
from dualblade.errors import CorruptionError
from dualblade.memory import MemoryWatch
from tests.devices import LoopDevice, Unavailable
from tests.helpers import MIB, until

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 32 * MIB
REQUEST = 256 << 10


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[LoopDevice]:
    try:
        made = LoopDevice(tmp_path, SIZE)
    except Unavailable as error:
        pytest.skip(str(error))
    with made:
        yield made


def reads_seen(device: str) -> tuple[int, int]:
    """Reads that a block device has completed, and their bytes."""
    reads, _, sectors, *_ = Path(f"/sys/block/{Path(device).name}/stat").read_text().split()
    return int(reads), int(sectors) * 512


@pytest.mark.parametrize("readahead_kb", [0, 4, 128, 8192])
def test_a_miss_is_read_whole_and_alone(loop: LoopDevice, readahead_kb: int):
    """Where readahead is set to 0, the kernel reads what was not asked for ahead page by page."""
    subprocess.run(["blockdev", "--setra", str(2 * readahead_kb), loop.path], check=True)
    data = np.random.default_rng(1).integers(0, 256, 8 * MIB, np.uint8)
    out = np.empty_like(data)
    with _core.Device.open(loop.path, chunk_bytes=REQUEST) as device:
        device.write([(MIB, data)]).wait()
        sums = np.array(_core.checksum_chunks(data, REQUEST))
        device.drop_cached(0, SIZE)
        before = reads_seen(loop.path)
        device.read([(MIB, out)], path="pagecache", checksums=sums).wait()
        after = reads_seen(loop.path)
    assert np.array_equal(out, data)
    assert after[1] - before[1] == data.size
    assert after[0] - before[0] <= 3 * data.size // REQUEST


def test_a_gap_in_the_page_cache_is_filled(loop: LoopDevice):
    data = np.random.default_rng(2).integers(0, 256, 8 * MIB, np.uint8)
    with _core.Device.open(loop.path, chunk_bytes=REQUEST) as device:
        device.write([(0, data)]).wait()
        for seed in range(20):
            dice = np.random.default_rng(seed)
            device.drop_cached(0, SIZE)
            for offset in dice.integers(0, len(data) // 4096, 100) * 4096:
                length = int(dice.integers(1, min(50_000, len(data) - offset)))
                device.read([(int(offset), bytearray(length))], path="pagecache").wait()
            start, stop = sorted(int(n) for n in dice.integers(0, len(data), 2))
            out = np.empty(stop - start, np.uint8)
            before = reads_seen(loop.path)[1]
            device.read([(start, out)], path="pagecache").wait()
            assert np.array_equal(out, data[start:stop])
            assert reads_seen(loop.path)[1] - before <= stop - start + 8192


# ---- what is there is copied from where it lies --------------------------------------------------


@pytest.fixture
def window(tmp_path: Path) -> Iterator[_core.Device]:
    """A device on a file whose pages can be copied from."""
    path = tmp_path / "kv.img"
    path.write_bytes(bytes(SIZE))
    with _core.Device.open(path) as device:
        data = np.random.default_rng(3).integers(0, 256, 8 * MIB, np.uint8)
        device.write([(0, data)], path="pagecache").wait()
        device.read([(0, np.empty(MIB, np.uint8))], path="pagecache").wait()
        if _core.window_bytes() == 0:
            pytest.skip("neither AVX2 nor a known xxhash.h, or no mappings here")
        yield device


@pytest.mark.parametrize("size", [300_000, MIB, 8 * MIB])
@pytest.mark.parametrize("start", [0, 1, 4096])
def test_every_bit_that_is_wrong_is_found(window: _core.Device, size: int, start: int):
    """Also where a copy and its checksum are one pass."""
    size = min(size, 8 * MIB - start)
    out = np.empty(size, np.uint8)
    window.read([(start, out)], path="pagecache").wait()
    data = np.random.default_rng(3).integers(0, 256, 8 * MIB, np.uint8)[start : start + size]
    assert np.array_equal(out, data)
    chunk = window.info.chunk_bytes
    sums = np.array(_core.checksum_chunks(data, chunk))
    out[:] = 0
    window.read([(start, out)], path="pagecache", checksums=sums).wait()
    assert np.array_equal(out, data)
    for i in {0, len(sums) // 2, len(sums) - 1}:
        wrong = sums.copy()
        wrong[i] ^= 1 << 40
        with pytest.raises(CorruptionError) as caught:
            window.read([(start, out)], path="pagecache", checksums=wrong).wait()
        assert str(start + i * chunk) in str(caught.value)


def test_what_reads_have_mapped_can_be_dropped(window: _core.Device):
    window.read([(0, np.empty(8 * MIB, np.uint8))], path="pagecache").wait()
    assert _core.window_bytes() == 8 * MIB
    window.flush()
    window.drop_cached(2 * MIB, 2 * MIB)  # as much as the kernel may hold in one piece
    assert window.cached_bytes(2 * MIB, 2 * MIB)[0] == 0
    assert _core.window_bytes() <= 6 * MIB
    window.drop_cached(0, SIZE)
    assert window.cached_bytes(0, SIZE)[0] == 0
    assert _core.window_bytes() == 0


def test_what_reads_have_mapped_is_free_memory(window: _core.Device):
    """Others' mapped files are not."""
    with MemoryWatch() as watch:
        window.drop_cached(0, SIZE)
        before = watch.sample().free_bytes
        window.read([(0, np.empty(8 * MIB, np.uint8))], path="pagecache").wait()
        window.read([(0, np.empty(8 * MIB, np.uint8))], path="pagecache").wait()
        report = watch.report()
        mapped = report.free_bytes(_core.window_bytes()) - report.free_bytes()
        assert mapped == _core.window_bytes() == 8 * MIB
        assert watch.sample().free_bytes > before - 64 * MIB  # others live on this machine too


def test_a_view_and_reads_do_not_both_map(window: _core.Device):
    whole = np.empty(8 * MIB, np.uint8)
    window.read([(0, whole)], path="pagecache").wait()
    mapping = window.map(0, 8 * MIB)
    assert _core.window_bytes() == 0
    window.read([(0, whole)], path="pagecache").wait()
    assert _core.window_bytes() == 0
    assert np.array_equal(np.frombuffer(mapping, np.uint8), whole)
    del mapping
    window.read([(0, whole)], path="pagecache").wait()
    assert _core.window_bytes() == 8 * MIB


def test_reads_while_others_drop(window: _core.Device):
    """What is pinned stays while it is copied; what was dropped is read again."""
    data = np.random.default_rng(3).integers(0, 256, 8 * MIB, np.uint8)
    sums = np.array(_core.checksum_chunks(data, window.info.chunk_bytes))
    window.flush()
    is_over = threading.Event()

    def drop() -> None:
        dice = np.random.default_rng(4)
        while not is_over.is_set():
            first = int(dice.integers(0, 2048)) * 4096
            window.drop_cached(first, min(MIB, 8 * MIB - first))

    dropping = threading.Thread(target=drop)
    dropping.start()
    try:
        out = np.empty_like(data)
        for _ in range(100):
            window.read([(0, out)], path="pagecache", checksums=sums).wait()
            assert np.array_equal(out, data)
    finally:
        is_over.set()
        dropping.join()

    def is_dropped() -> bool:  # a plain read may have had the kernel read ahead, and that goes on
        window.drop_cached(0, SIZE)
        return window.cached_bytes(0, SIZE)[0] == 0

    until(is_dropped, "it stays in the page cache")
