"""What the drive sees of buffered reads: whole requests, and nothing around them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualblade import _core
from tests.devices import LoopDevice, Unavailable
from tests.helpers import MIB

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
