"""The fault device does to real I/O what its rules say, and nothing else."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.faultdev import FaultDevice

BLOCK = 4096


@pytest.fixture
def device(fault_device: Callable[..., FaultDevice]) -> FaultDevice:
    return fault_device(1 << 20)


@pytest.fixture
def fd(device: FaultDevice) -> Iterator[int]:
    fd = os.open(device.path, os.O_RDWR | os.O_DIRECT)
    yield fd
    os.close(fd)


@pytest.fixture
def aligned() -> Iterator[Callable[[bytes], mmap.mmap]]:
    made = []

    def make(data: bytes) -> mmap.mmap:
        made.append(mmap.mmap(-1, len(data)))
        made[-1][:] = data
        return made[-1]

    yield make
    for memory in made:
        memory.close()


def error_of(call: Callable, *arguments: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


def read(fd: int, length: int, offset: int) -> bytes:
    with mmap.mmap(-1, length) as memory:
        return memory[: os.preadv(fd, [memory], offset)]


def test_without_rules_it_is_an_ordinary_file(device, fd, aligned):
    data = os.urandom(256 * 1024)
    assert os.pwritev(fd, [aligned(data)], 8192) == len(data)
    assert read(fd, len(data), 8192) == data
    os.fsync(fd)
    assert device.medium.read_bytes()[8192 : 8192 + len(data)] == data
    assert os.fstat(fd).st_size == 1 << 20


def test_a_buffered_write_of_odd_bytes_keeps_its_neighbours(device):
    with device.path.open("r+b", buffering=0) as file:
        file.write(b"a" * 2000)
        file.seek(700)
        file.write(b"b" * 601)
        file.seek(0)
        assert file.read(2000) == b"a" * 700 + b"b" * 601 + b"a" * 699


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "ENODATA", "ETIMEDOUT"])
def test_errno_comes_from_the_range_named_and_from_no_other(device, fd, aligned, name):
    device.add_rule("write", name, lo=BLOCK, hi=2 * BLOCK)
    block = aligned(b"x" * BLOCK)
    assert os.pwritev(fd, [block], 0) == BLOCK
    assert error_of(os.pwritev, fd, [block], BLOCK) == getattr(errno, name)
    assert os.pwritev(fd, [block], 2 * BLOCK) == BLOCK
    device.clear()
    assert os.pwritev(fd, [block], BLOCK) == BLOCK


def test_the_nth_operation_fails_for_every_n(device, fd):
    for n in range(1, 5):
        device.clear()
        device.fail_nth("read", "EIO", n)
        failed = []
        for attempt in range(1, 6):
            try:
                os.preadv(fd, [mmap.mmap(-1, BLOCK)], 0)
            except OSError as error:
                failed.append((attempt, error.errno))
        assert failed == [(n, errno.EIO)]
        assert device.stats()["fired"] == 1


def test_times_bounds_how_often_a_rule_fires(device, fd):
    device.add_rule("fsync", "EIO", times=2)
    assert error_of(os.fsync, fd) == errno.EIO
    assert error_of(os.fsync, fd) == errno.EIO
    os.fsync(fd)


def test_short_transfers(device, fd, aligned):
    data = os.urandom(4 * BLOCK)
    device.add_rule("write", {"short": BLOCK}, times=1)
    assert os.pwritev(fd, [aligned(data)], 0) == BLOCK
    assert os.pwritev(fd, [aligned(data[BLOCK:])], BLOCK) == 3 * BLOCK
    device.add_rule("read", {"short": 512}, times=1)
    assert read(fd, len(data), 0) == data[:512]
    assert read(fd, len(data), 0) == data


def test_torn_dropped_and_flipped(device, fd, aligned):
    device.add_rule("write", {"torn": 1536}, lo=0, hi=BLOCK)
    device.add_rule("write", "drop", lo=BLOCK, hi=2 * BLOCK)
    assert os.pwritev(fd, [aligned(b"x" * BLOCK)], 0) == BLOCK
    assert os.pwritev(fd, [aligned(b"x" * BLOCK)], BLOCK) == BLOCK
    assert read(fd, 2 * BLOCK, 0) == b"x" * 1536 + bytes(2 * BLOCK - 1536)
    device.add_rule("read", "flip", times=1)
    wrong, right = read(fd, BLOCK, 0), read(fd, BLOCK, 0)
    assert [a ^ b for a, b in zip(wrong, right, strict=True) if a != b] == [1]


def test_a_filesystem_without_o_direct(device):
    device.add_rule("open_direct", "EINVAL")
    assert error_of(os.open, device.path, os.O_RDWR | os.O_DIRECT) == errno.EINVAL
    os.close(os.open(device.path, os.O_RDWR))
    device.clear()
    os.close(os.open(device.path, os.O_RDWR | os.O_DIRECT))


def test_crash_keeps_what_was_flushed_and_loses_some_of_the_rest(device, fd, aligned):
    old, new = b"o" * (64 * BLOCK), b"n" * (64 * BLOCK)
    os.pwritev(fd, [aligned(old)], 0)
    os.fsync(fd)
    os.pwritev(fd, [aligned(new)], 0)
    device.crash(seed=7)
    after = read(fd, len(new), 0)
    sectors = {after[i : i + 512] for i in range(0, len(after), 512)}
    assert sectors == {old[:512], new[:512]}
    os.pwritev(fd, [aligned(old)], 0)
    os.fsync(fd)
    os.pwritev(fd, [aligned(new)], 0)
    device.crash(seed=7)
    assert read(fd, len(new), 0) == after


def test_a_punched_hole_reads_as_zeros(device, fd, aligned):
    os.pwritev(fd, [aligned(b"x" * 4 * BLOCK)], 0)
    command = ["fallocate", "--punch-hole", "--offset", str(BLOCK), "--length", str(BLOCK)]
    subprocess.run([*command, str(device.path)], check=True)
    assert read(fd, 4 * BLOCK, 0) == b"x" * BLOCK + bytes(BLOCK) + b"x" * 2 * BLOCK
    assert device.stats()["trim"] == 1


def test_stats_count_each_kind(device, fd, aligned):
    device.clear()
    os.pwritev(fd, [aligned(b"x" * BLOCK)], 0)
    read(fd, BLOCK, 0)
    read(fd, BLOCK, 0)
    os.fsync(fd)
    seen = device.stats()
    assert (seen["write"], seen["read"], seen["fsync"], seen["fired"]) == (1, 2, 1, 0)


def test_held_operations_go_on_when_released(device, fd):
    device.add_rule("read", "hold", nth=2)
    assert len(read(fd, BLOCK, 0)) == BLOCK
    got = []
    readers = [
        threading.Thread(target=lambda i=i: got.append(read(fd, BLOCK, i * BLOCK)))
        for i in range(3)
    ]
    for reader in readers:
        reader.start()
    device.wait_held(3)
    assert got == []
    device.release()
    for reader in readers:
        reader.join()
    assert [len(data) for data in got] == [BLOCK] * 3
    assert len(read(fd, BLOCK, 0)) == BLOCK
    with pytest.raises(TimeoutError, match="0 operations are held"):
        device.wait_held(1, timeout_s=0.01)


@pytest.mark.parametrize(
    ("op", "do", "nth"),
    [("seek", "EIO", 1), ("read", "EWHAT", 1), ("read", {"late": 1}, 1), ("read", "EIO", 0)],
)
def test_a_rule_without_sense_is_refused(device, op, do, nth):
    with pytest.raises(ValueError, match="op|do|nth"):
        device.add_rule(op, do, nth=nth)


def test_close_unmounts_even_when_the_server_was_killed(fault_device):
    device = fault_device(1 << 20)
    assert str(device.path) in mounts()
    device._server.kill()
    device.close()
    assert str(device.path) not in mounts()
    device.close()


def test_close_lets_held_operations_go(device):
    fd = os.open(device.path, os.O_RDWR | os.O_DIRECT)
    device.add_rule("read", "hold")
    ended = []

    def reader() -> None:
        try:
            ended.append(len(read(fd, BLOCK, 0)))
        except OSError as error:
            ended.append(error.errno)

    thread = threading.Thread(target=reader)
    thread.start()
    device.wait_held(1)
    device.close()
    thread.join()
    # Answered on the way out, or cut off with the connection; never left hanging.
    assert ended[0] in (BLOCK, errno.ECONNABORTED, errno.ENOTCONN)
    with contextlib.suppress(OSError):  # ENOTCONN from a filesystem that is gone
        os.close(fd)


def mounts() -> set[str]:
    with open("/proc/mounts", encoding="utf-8") as file:
        return {line.split()[1] for line in file}
