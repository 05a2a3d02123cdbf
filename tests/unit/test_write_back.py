"""Dirty pages are written back when asked; what fails under the page cache is not kept quiet."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest

from dualblade import _core
from dualblade.errors import DeviceError, UnsupportedError
from tests.helpers import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.faultdev import FaultDevice

CHUNK = 64 << 10


@pytest.fixture
def faulty(fault_device: Callable[..., FaultDevice]) -> Iterator[FaultDevice]:
    made = fault_device(8 * MIB)
    yield made
    made.medium.unlink()


@pytest.fixture
def device(faulty: FaultDevice, loop_over: Callable[..., str]) -> Iterator[_core.Device]:
    """A block device whose page cache is the kernel's, and whose medium fails on request."""
    path = loop_over(faulty.path, "--direct-io=on")
    with _core.Device.open(path, chunk_bytes=CHUNK) as opened:
        faulty.clear()
        yield opened
        faulty.clear()


def dirty_bytes(device: _core.Device, offset: int, length: int) -> int:
    try:
        return device.cached_bytes(offset, length)[1]
    except UnsupportedError as error:
        pytest.skip(str(error))


def test_write_back_is_started_without_waiting_for_the_drive(
    device: _core.Device, faulty: FaultDevice
):
    device.write([(0, b"x" * MIB)], path="pagecache").wait()
    faulty.add_rule("write", "hold")
    try:
        device.write_back(0, MIB)
        faulty.wait_held(1)
        waiting = threading.Thread(target=device.write_back, args=(0, MIB, True))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        assert dirty_bytes(device, 0, MIB)
    finally:
        faulty.release()
    waiting.join()
    assert dirty_bytes(device, 0, MIB) == 0


def test_a_failed_write_back_is_told_to_whoever_waits_and_to_flush(
    device: _core.Device, faulty: FaultDevice
):
    device.write([(MIB, b"x" * MIB)], path="pagecache").wait()
    faulty.add_rule("write", "EIO")
    with pytest.raises(DeviceError, match="write back of 1048576 bytes at offset 1048576") as told:
        device.write_back(MIB, MIB, wait=True)
    assert told.value.errno == errno.EIO
    faulty.clear()
    with pytest.raises(DeviceError, match="flush"):
        device.flush()
    device.flush()


def test_a_failed_write_back_that_nobody_waited_for_fails_the_flush(
    device: _core.Device, faulty: FaultDevice
):
    device.write([(0, b"x" * MIB)], path="pagecache").wait()
    faulty.add_rule("write", "EIO")
    device.write_back(0, MIB)
    with contextlib.suppress(DeviceError):  # whoever drops the pages may hear of it first
        device.drop_cached(0, MIB)
    faulty.clear()
    with pytest.raises(DeviceError, match="flush"):
        device.flush()


def test_a_failed_read_of_the_page_cache_names_its_place(device: _core.Device, faulty: FaultDevice):
    """The drive is asked ahead of the read that tells of the error."""
    device.write([(0, b"x" * 4 * MIB)]).wait()
    faulty.add_rule("read", "EIO", lo=MIB + CHUNK, hi=MIB + CHUNK + 4096)
    out = bytearray(4 * MIB)
    with pytest.raises(DeviceError) as told:
        device.read([(0, out)], path="pagecache").wait()
    assert told.value.errno == errno.EIO
    assert told.value.offset is not None
    assert MIB <= told.value.offset <= MIB + CHUNK
    assert device.stats()["pagecache"]["in_flight"] == 0
    faulty.clear()
    device.read([(0, out)], path="pagecache").wait()
    assert out == b"x" * 4 * MIB


def test_each_member_writes_its_part_back(tmp_path: Path):
    paths = [tmp_path / f"member{i}" for i in range(3)]
    for path in paths:
        path.write_bytes(bytes(MIB))
    with _core.Device.open(paths, chunk_bytes=CHUNK, stripe_bytes=CHUNK) as device:
        size = device.info.size
        device.write([(0, b"x" * size)], path="pagecache").wait()
        start, stop = CHUNK - 4096, 7 * CHUNK + 4096
        device.write_back(start, stop - start, wait=True)
        assert dirty_bytes(device, start, stop - start) == 0
        assert device.cached_bytes(start, stop - start)[0] == stop - start
        with pytest.raises(ValueError, match=f"has {size} bytes"):
            device.write_back(0, size + 1)


def test_a_failure_is_counted_whoever_was_told_of_it(device: _core.Device, faulty: FaultDevice):
    before = device.write_back_failures()
    device.write([(MIB, b"x" * MIB)], path="pagecache").wait()
    faulty.add_rule("write", "EIO")
    with pytest.raises(DeviceError):
        device.write_back(MIB, MIB, wait=True)
    faulty.clear()
    device.write_back(MIB, MIB, wait=True)  # that is over: this range is clean, and it can't help
    after = device.write_back_failures()
    assert after > before
    assert device.write_back_failures() == after
    device.flush()  # it was told: what is new is for the flush to say
    device.write([(0, b"x" * MIB)], path="pagecache").wait()
    faulty.add_rule("write", "EIO")
    with pytest.raises(DeviceError, match="flush"):
        device.flush()
    assert device.write_back_failures() > after


def test_what_may_be_all_there_is_is_not_dropped(device: _core.Device, faulty: FaultDevice):
    data = os.urandom(MIB)
    before = device.write_back_failures()
    device.write([(MIB, data)], path="pagecache").wait()
    faulty.add_rule("write", "EIO")
    with pytest.raises(DeviceError, match="EIO"):
        device.drop_cached(MIB, MIB, before)
    faulty.clear()
    with pytest.raises(DeviceError, match="a write-back has failed meanwhile"):
        device.drop_cached(MIB, MIB, before)
    out = bytearray(MIB)
    device.read([(MIB, out)], path="pagecache").wait()
    assert out == data
    device.write([(MIB, out)], path="pagecache").wait()
    device.drop_cached(MIB, MIB, device.write_back_failures())
    device.read([(MIB, out)]).wait()
    assert out == data
